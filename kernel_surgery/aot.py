"""Command: compile the Triton kernels ahead of time for GPUs that are not present.

python -m kernel_surgery.aot [--out FILE [--overwrite]]
"""

import argparse
import json
from dataclasses import asdict
from itertools import product
from pathlib import Path

from kernel_surgery.common.command import Parser, add_overwrite, main
from kernel_surgery.common.ending import Following, look_at, next_command, wrote
from kernel_surgery.common.files import check_output, write_atomic
from kernel_surgery.common.progress import progress_bar, waiting


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

    with waiting("starting"):
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
    every = list(product(SHARED_LIMIT, OPERATIONS, ("bfloat16", "float16", "float32"), cases))
    with progress_bar(len(every), "compile", unit="kernel", leave=False) as bar:
        for sm, operation, dtype, (oblique, rows, d, k) in every:
            c = compile_project(sm, dtype, rows, d, k, operation, oblique=oblique)
            table.append(asdict(c) | {"faults": c.faults()})
            bar.clear()  # the line takes its place
            print(
                f"sm_{sm:<3} {operation:<19} {c.form:<8} {dtype:<8} {rows:>5} {d:>4} {k:>2} "
                f"{'oblique' if oblique else 'orthogonal':<10} {c.registers:>9} "
                f"{c.spilled:>7} {c.late_loads:>10} {c.blocks:>6} {c.in_flight:>9} {c.shared:>7} "
                f"({SHARED_LIMIT[sm]})",
                *c.faults(),
                flush=True,
            )
            bar.update()
            bar.refresh()
    if args.out:
        # Write one row per line, so that a diff of two tables shows the rows that changed.
        lines = ",\n".join(f"  {json.dumps(row)}" for row in table)
        head = json.dumps({"triton": triton.__version__, "kernel_sha256": kernel_sha256()})[:-1]
        write_atomic(args.out, f'{head}, "rows": [\n{lines}\n]}}\n')
        wrote(args.out)
    if faulty := sum(bool(row["faults"]) for row in table):
        look_at(f"the {faulty} of {len(table)} lines above that end in a fault")
        return 1
    note = "On a machine with a GPU, this checks what was compiled here:"
    next_command(Following("verify", ["--model", "polyglot", "--device", "cuda"], note))
    return 0


if __name__ == "__main__":
    main(run)
