"""Command: compile the Triton kernels ahead of time for GPUs that are not present.

python -m kernel_surgery.aot [--out FILE [--overwrite]]
"""

import argparse
import json
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernel_surgery.common.command import Parser, add_overwrite, main
from kernel_surgery.common.ending import Following, look_at, next_command, wrote
from kernel_surgery.common.files import check_output, write_atomic
from kernel_surgery.common.progress import progress_bar, waiting

if TYPE_CHECKING:
    from kernel_surgery.ops.compiled import Compiled


def parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    p = Parser("aot", description="Compile the Triton kernels ahead of time, without a GPU. Show what each one needs.")
    p.add_argument("--out", type=Path, help="also write the table to this JSON file")
    add_overwrite(p)
    return p


def run(argv: list[str] | None = None) -> int:
    """Print the table of compiled kernels and of the candidates. Return 1 if one spills or does not fit, else 0."""
    args = parser().parse_args(argv)
    if args.out is not None:
        check_output(args.out, overwrite=args.overwrite)

    with waiting("starting"):
        import triton

        from kernel_surgery.ops.compiled import (
            CANDIDATES,
            CASES,
            OBLIQUE_CASES,
            OPERATIONS,
            compile_project,
            kernel_sha256,
        )
        from kernel_surgery.ops.occupancy import ESTIMATE, ESTIMATE_OF, SHARED_LIMIT, bytes_needed

    print(
        "target operation           form     dtype     rows    d  k edit       registers spilled late loads blocks "
        "limited by    in flight  shared (limit)"
    )
    table: list[dict] = []
    tried: list[dict] = []

    def add(c: "Compiled", rows: list[dict], **more: Any) -> None:
        rows.append(asdict(c) | more | {"faults": c.faults()})
        bar.clear()  # the line takes its place
        print(
            f"sm_{c.sm:<3} {c.operation:<19} {c.form:<8} {c.dtype:<8} {c.rows:>5} {c.d:>4} {c.k:>2} "
            f"{'oblique' if c.oblique else 'orthogonal':<10} {c.registers:>9} "
            f"{c.spilled:>7} {c.late_loads:>10} {c.blocks:>6} {c.limit:<13} {c.in_flight:>9} {c.shared:>7} "
            f"({SHARED_LIMIT[c.sm]})",
            *(f"{name}={value}" for name, value in more.get("options", {}).items()),
            *c.faults(),
            flush=True,
        )
        bar.update()
        bar.refresh()

    cases = [(False, *case) for case in CASES] + [(True, *case) for case in OBLIQUE_CASES]
    every = list(product(SHARED_LIMIT, OPERATIONS, ("bfloat16", "float16", "float32"), cases))
    total = len(every) + sum(len(candidate.operations) for candidate in CANDIDATES)
    with progress_bar(total, "compile", unit="kernel", leave=False) as bar:
        for sm, operation, dtype, (oblique, rows, d, k) in every:
            add(compile_project(sm, dtype, rows, d, k, operation, oblique=oblique), table)
        print("candidates, with more blocks than what is launched today:")
        for candidate in CANDIDATES:
            for c in candidate.compiled():
                add(c, tried, options=candidate.options)
    if args.out:
        # Write one row per line, so that a diff of two tables shows the rows that changed.
        lines, more = (",\n".join(f"  {json.dumps(row)}" for row in rows) for rows in (table, tried))
        needed = {"device": ESTIMATE_OF, **ESTIMATE, "bytes": bytes_needed()}
        head = json.dumps({"triton": triton.__version__, "kernel_sha256": kernel_sha256(), "estimate": needed})[:-1]
        write_atomic(args.out, f'{head}, "rows": [\n{lines}\n], "candidates": [\n{more}\n]}}\n')
        wrote(args.out)
    every_row = table + tried
    if faulty := sum(bool(row["faults"]) for row in every_row):
        look_at(f"the {faulty} of {len(every_row)} lines above that end in a fault")
        return 1
    note = "On a machine with a GPU, this checks what was compiled here:"
    next_command(Following("verify", ["--model", "polyglot", "--device", "cuda"], note))
    return 0


if __name__ == "__main__":
    main(run)
