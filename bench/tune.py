"""Try the kernels' launch options one by one on a GPU: python -m bench.tune [--out FILE] [--seconds 240]

At Qwen2.5-3B's width it tries every form that suits a number of rows, with other block sizes, warps and stages than
`launch_options` chooses. The row form is tried with a packed basis and with a basis stored column by column ("across").
An option set is timed only if its output meets the bound. Times are of replayed graphs, interleaved with the options
that the package ships. The benchmark changes nothing: edit `launch_options` and `form_of` by hand, and commit the file
of results with the edit.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from bench.op import EPS, error_over_bound, inputs
from bench.parsing import bench_parser
from bench.timing import Timer, interleaved, percentiles, stamp
from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.files import write_atomic

D, K = 2048, 10
CASES = ("project", "project_add_rmsnorm")
ROWS = (1, 16384, 64, 8, 256, 2048)  # the most important first
SHIPPED = "as shipped"
FLOOR = "floor"  # a copy, or the addition and the norm alone
LATE = "no time left"
TRIED = {
    "row": {"BLOCK_D": (1024, 2048), "num_warps": (8, 16, 32)},
    "tile": {"WARPS": (8, 16), "TILES": (1, 2), "KEEP": (False, True)},
    "two-pass": {"BLOCK_M": (32, 64), "BLOCK_D": (64, 128), "num_warps": (4, 8), "num_stages": (3,)},
}


def candidates(rows: int, forms) -> Iterator[tuple[str, str, dict]]:
    """(form, layout of the basis, options) of everything to try for this number of rows."""
    from kernel_surgery.kernels.project import FEW_ROWS

    for form in forms:
        axes = TRIED[form]
        if (form == "row") != (rows <= FEW_ROWS) and not FEW_ROWS <= rows <= 16 * FEW_ROWS:
            continue  # all forms are tried only around FEW_ROWS, where the choice of form changes
        for values in itertools.product(*axes.values()):
            options = dict(zip(axes, values, strict=True))
            if form == "tile":
                options["num_warps"] = options["WARPS"]
            for layout in ("packed", "across") if form == "row" else ("packed",):
                yield form, layout, options


def calls(case: str, t: dict, forms=tuple(TRIED)) -> dict:
    """{(form, layout, options as text): call}. The floor and the options that ship come first."""
    from bench import baselines
    from kernel_surgery.kernels.project import project as launch
    from kernel_surgery.ops.library import packed

    more = {} if case == "project" else {"residual": t["residual"], "weight": t["weight"], "eps": EPS}
    bases = {"packed": packed(t["basis"]), "across": t["basis"].T.contiguous().T}

    def result(basis, **options):
        outputs = launch(t["x"], basis, 1.0, **more, **options)
        return outputs[0] if case == "project" else outputs

    x, residual, weight = t["x"], t["residual"], t["weight"]
    floor = x.clone if case == "project" else partial(baselines.add_rmsnorm, x, residual, weight, EPS)
    calls = {(FLOOR, "", ""): floor, (SHIPPED, "packed", ""): partial(result, bases["packed"])}
    for form, layout, options in candidates(len(t["x"]), forms):
        text = " ".join(f"{name}={value}" for name, value in options.items())
        calls[form, layout, text] = partial(result, bases[layout], form=form, **options)
    return calls


def warm(case: str, rows: int, part: int, parts: int, forms) -> None:
    """Run every `parts`-th call of a case once, so that Triton compiles it and keeps the result on disk."""
    import torch

    t = inputs(rows, D, K, torch.bfloat16, torch.device("cuda"))
    for number, call in enumerate(calls(case, t, forms).values()):
        if number % parts == part:
            with contextlib.suppress(Exception):  # `measure` says why an option set fails
                call()


def warm_all(workers: int, every_rows, forms) -> None:
    """Compile all candidates in processes of their own. Compiling takes far longer than timing."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        tasks = [(case, rows, part, 4, forms) for rows in every_rows for case in CASES for part in range(4)]
        list(pool.map(warm, *zip(*tasks, strict=True)))


def measure(case: str, rows: int, device, rounds: int, until: float, forms) -> list[dict]:
    """Result rows for one case and number of rows, fastest first. Options that fail or break their bound come last."""
    import torch

    t = inputs(rows, D, K, torch.bfloat16, device)
    able, left_out = {}, []
    for key, call in calls(case, t, forms).items():
        about = {"case": case, "M": rows, "d": D, "k": K, "dtype": "bfloat16"} | dict(
            zip(("form", "layout", "options"), key, strict=True)
        )
        if time.monotonic() > until:
            left_out.append(about | {"left_out": LATE})
            continue
        try:
            name = "" if key[0] != FLOOR else "copy" if case == "project" else "add + rmsnorm"
            ratio = error_over_bound(case, name, call(), t)
        except Exception as error:  # such as too few registers or too little shared memory
            first = (str(error).splitlines() or [""])[0]
            left_out.append(about | {"left_out": f"{type(error).__name__}: {first[:120]}"})
            continue
        about["error_over_bound"] = ratio
        if ratio <= 1:
            able[key] = call, about
        else:
            left_out.append(about | {"left_out": "exceeds its bound"})
    timer = Timer(device, 20)
    times = interleaved({key: partial(timer.once, call, "graph", key) for key, (call, _) in able.items()}, rounds)
    timed = [able[key][1] | {"left_out": None} | percentiles(sample) for key, sample in times.items()]
    for row in timed:
        for base in (SHIPPED, FLOOR):
            other = next((r["us_p50"] for r in timed if r["form"] == base), None)
            row[f"of_{base.split()[-1]}"] = row["us_p50"] / other if other else None
    return sorted(timed, key=lambda row: row["us_p50"]) + left_out


def parser() -> Parser:
    """The command line."""
    p = bench_parser("tune", "Try the kernels' launch options on a GPU.")
    p.add_argument("--rows", type=int, nargs="*", default=ROWS, help="numbers of rows")
    p.add_argument("--forms", nargs="*", default=tuple(TRIED), help="forms to try")
    p.add_argument("--show", type=int, default=5, help="how many of the fastest to print")
    p.add_argument("--rounds", type=int, default=12)
    p.add_argument("--seconds", type=int, default=240, help="start no new compilation after this many (default: 240)")
    p.add_argument("--out", type=Path, help="JSON file for the rows")
    return p


def run(argv: list[str] | None = None) -> int:
    """Print what ships and the five fastest for every case and number of rows. Returns 1 if what ships fails."""
    args = parser().parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        raise UserError("no CUDA device here: nothing was run and nothing was written.")
    device, results = torch.device("cuda"), []
    about, until = stamp(device), time.monotonic() + args.seconds
    broken = False
    warm_all(max(1, min(12, (os.cpu_count() or 2) - 2)), args.rows, args.forms)
    print(f"compiled after {time.monotonic() - until + args.seconds:.0f} s", flush=True)
    for rows in args.rows:
        for case in CASES:
            measured = measure(case, rows, device, args.rounds, until, args.forms)
            results += [row | about for row in measured]
            timed = [row for row in measured if not row["left_out"]]
            broken = broken or any(row["form"] == SHIPPED and row["left_out"] not in (None, LATE) for row in measured)
            print(f"{case}, {rows} x {D}: {len(timed)} timed, {len(measured) - len(timed)} left out")
            for row in [r for r in timed if r["form"] in (SHIPPED, FLOOR)] + timed[: args.show]:
                print(
                    f"  {row['us_p50']:>9.2f} us  {row['of_floor'] or 0:.3f} of the floor's  {row['form']:<10} "
                    f"{row['layout']:<7} {row['options']}  error/bound {row['error_over_bound']:.2f}",
                    flush=True,
                )
            if args.out:
                write_atomic(args.out, json.dumps(results, indent=1) + "\n")
    print(json.dumps({"case": "tune", "rows": len(results), **about}))
    return 1 if broken else 0


if __name__ == "__main__":
    main(run)
