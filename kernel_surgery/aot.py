"""Command: compile the Triton kernels ahead of time for GPUs that are not present.

python -m kernel_surgery.aot [--out FILE [--overwrite]]
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from kernel_surgery.common.command import Parser, add_overwrite, main
from kernel_surgery.common.files import check_output, write_atomic


def parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    p = Parser("aot", description="Compile the Triton kernels ahead of time, without a GPU. Show what each one needs.")
    p.add_argument("--out", type=Path, help="also write the table to this JSON file")
    add_overwrite(p)
    return p


def run(argv: list[str] | None = None) -> int:
    """Print the table of compiled kernels. Return 1 if one spills registers or does not fit, else 0."""
    args = parser().parse_args(argv)
    if args.out is not None:
        check_output(args.out, overwrite=args.overwrite)

    import triton

    from kernel_surgery.ops.compiled import (
        CASES,
        OBLIQUE_CASES,
        OPERATIONS,
        SHARED_LIMIT,
        compile_project,
        kernel_sha256,
    )

    print(
        "target operation           form     dtype     rows    d  k edit       registers spilled late loads blocks "
        "in flight  shared (limit)"
    )
    table = []
    cases = [(False, *case) for case in CASES] + [(True, *case) for case in OBLIQUE_CASES]
    for sm in SHARED_LIMIT:
        for operation in OPERATIONS:
            for dtype in ("bfloat16", "float16", "float32"):
                for oblique, rows, d, k in cases:
                    c = compile_project(sm, dtype, rows, d, k, operation, oblique=oblique)
                    table.append(asdict(c) | {"faults": c.faults()})
                    print(
                        f"sm_{sm:<3} {operation:<19} {c.form:<8} {dtype:<8} {rows:>5} {d:>4} {k:>2} "
                        f"{'oblique' if oblique else 'orthogonal':<10} {c.registers:>9} "
                        f"{c.spilled:>7} {c.late_loads:>10} {c.blocks:>6} {c.in_flight:>9} {c.shared:>7} "
                        f"({SHARED_LIMIT[sm]})",
                        *c.faults(),
                        flush=True,
                    )
    if args.out:
        # Write one row per line, so that a diff of two tables shows the rows that changed.
        lines = ",\n".join(f"  {json.dumps(row)}" for row in table)
        head = json.dumps({"triton": triton.__version__, "kernel_sha256": kernel_sha256()})[:-1]
        write_atomic(args.out, f'{head}, "rows": [\n{lines}\n]}}\n')
    return 1 if any(row["faults"] for row in table) else 0


if __name__ == "__main__":
    main(run)
