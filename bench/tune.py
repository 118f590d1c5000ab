"""Try the kernels' launch options one by one on a GPU: python -m bench.tune [--out FILE] [--seconds 240]

At Qwen2.5-3B's width it tries every form that suits a number of rows, with other block sizes, warps and stages than
`launch_options` chooses. The row form is tried with a packed basis and with a basis stored column by column ("across").
The candidates of `kernel_surgery.ops.compiled` are tried too: they let more blocks share a multiprocessor. Some of them
are for another width or rank, which is then timed as well. PREPARED in the options: U comes in pieces made before the
timing.

An option set is timed only if its output meets the bound. Times are of replayed graphs, interleaved with the options
that the package ships. The benchmark changes nothing: edit `launch_options` and `form_of` by hand, and commit the file
of results with the edit.

Everything is compiled first, by several processes, and in the order of importance. Two thirds of --seconds are for
this; what is not compiled then is left out, and named.
"""

import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Collection, Iterator
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
OTHERS = ((16384, 2560, 16), (16384, 2048, 32))  # (rows, d, k): what only candidates are tried for
SHIPPED = "as shipped"
FLOOR = "floor"  # a copy, or the addition and the norm alone
LATE, NOT_COMPILED = "no time left", "not compiled in time"
FOR_COMPILING = 2 / 3  # of the time
TRIED: dict[str, dict[str, tuple]] = {
    "row": {"BLOCK_D": (1024, 2048), "num_warps": (8, 16, 32)},
    "tile": {"TILES": (1, 2), "KEEP": (False, True), "PREPARED": (False, True)},
    "two-pass": {"BLOCK_M": (32, 64), "BLOCK_D": (64, 128), "num_warps": (4, 8), "num_stages": (3,)},
}
Shape = tuple[int, int, int]  # rows, d, k
Key = tuple[str, str, str]  # form, layout of the basis, options as text


def candidates(case: str, shape: Shape, forms: Collection[str]) -> Iterator[tuple[str, str, dict]]:
    """(form, layout of the basis, options) of everything to try for a case and a shape."""
    from kernel_surgery.kernels.project import FEW_ROWS
    from kernel_surgery.ops.compiled import CANDIDATES

    rows, d, k = shape
    able = [form for form in forms if (form == "row") == (rows <= FEW_ROWS) or FEW_ROWS <= rows <= 16 * FEW_ROWS]
    for form in able:  # all forms only around FEW_ROWS, where the choice of form changes
        for made in CANDIDATES:
            if (made.form, *made.shape[1:]) == (form, d, k + -k % 16) and case in made.operations:
                yield form, "packed", made.options
        axes = TRIED[form] if (d, k) == (D, K) else {}
        for values in itertools.product(*axes.values()) if axes else ():
            options = dict(zip(axes, values, strict=True))
            for layout in ("packed", "across") if form == "row" else ("packed",):
                yield form, layout, options


def as_text(options: dict) -> str:
    """Options as they stand in the results."""
    return " ".join(f"{name}={value}" for name, value in options.items())


def kernel(case: str, shape: Shape, key: Key) -> tuple:
    """What tells the compiled kernel of a call from others: Triton compiles one for 1 row, one for multiples of 16, and
    one for other numbers of rows. What ships depends on the number itself."""
    rows, *width = shape
    return (case, key, rows if key[0] == SHIPPED else (rows == 1, rows % 16 == 0), *width)


def calls(case: str, t: dict, forms: Collection[str] = tuple(TRIED)) -> dict[Key, Callable]:
    """{(form, layout, options as text): call}. The floor and the options that ship come first."""
    from bench import baselines
    from kernel_surgery.kernels.project import prepared
    from kernel_surgery.kernels.project import project as launch
    from kernel_surgery.ops.library import packed

    more = {} if case == "project" else {"residual": t["residual"], "weight": t["weight"], "eps": EPS}
    bases = {"packed": packed(t["basis"]), "across": t["basis"].T.contiguous().T}
    split = prepared(bases["packed"]) if bases["packed"].shape[1] == 16 else None

    def result(basis, PREPARED=False, **options):
        outputs = launch(t["x"], basis, 1.0, **more, **options, **({"split": split} if PREPARED else {}))
        return outputs[0] if case == "project" else outputs

    x, residual, weight = t["x"], t["residual"], t["weight"]
    floor = x.clone if case == "project" else partial(baselines.add_rmsnorm, x, residual, weight, EPS)
    calls = {(FLOOR, "", ""): floor, (SHIPPED, "packed", ""): partial(result, bases["packed"])}
    shape = (*x.shape, t["basis"].shape[1])
    for form, layout, options in candidates(case, shape, forms):
        calls[form, layout, as_text(options)] = partial(result, bases[layout], form=form, **options)
    return calls


@functools.lru_cache(1)
def inputs_on_gpu(shape: Shape) -> dict:
    """The inputs of a shape. A process that compiles needs those of one shape after another."""
    import torch

    return inputs(*shape, torch.bfloat16, torch.device("cuda"))


def warm(task: tuple[str, Shape, tuple, Key]) -> tuple:
    """Run one call once, so that Triton compiles it and keeps the result on disk. Returns the task."""
    case, shape, forms, key = task
    with contextlib.suppress(Exception):  # `measure` says why an option set fails
        calls(case, inputs_on_gpu(shape), forms)[key]()
    return task


def tasks(shapes: Collection[Shape], forms: tuple) -> list[tuple]:
    """Every kernel to compile, once each: (case, shape, forms, key), the most important first."""
    found: dict[tuple, tuple] = {}
    for shape in shapes:
        for case in CASES:
            keys = [(form, layout, as_text(options)) for form, layout, options in candidates(case, shape, forms)]
            for key in [(SHIPPED, "packed", ""), *keys]:
                found.setdefault(kernel(case, shape, key), (case, shape, forms, key))
    return list(found.values())


def warm_all(workers: int, todo: list, until: float, work: Callable = warm) -> list:
    """Do tasks in processes of their own, and return those that are done at time `until`. The others are given up.

    Compiling takes far longer than timing, and a single kernel may take a minute. work: what does a task.
    """
    done: list = []
    with multiprocessing.get_context("spawn").Pool(workers) as pool:  # leaving it ends its processes
        results = pool.imap_unordered(work, todo)
        try:
            while len(done) < len(todo):
                done.append(results.next(timeout=max(0.0, until - time.monotonic())))
        except multiprocessing.TimeoutError:
            print(f"{len(todo) - len(done)} of {len(todo)} kernels are not compiled in time", flush=True)
    return done


def measure(
    case: str,
    shape: Shape,
    device,
    rounds: int,
    until: float,
    forms: Collection[str],
    compiled: Collection[tuple] | None = None,
) -> list[dict]:
    """Result rows for one case and shape, fastest first. Options that fail or break their bound come last.

    compiled: `kernel` of what `warm_all` has compiled; None is everything. The rest is left out, but for what ships.
    """
    import torch

    t = inputs(*shape, torch.bfloat16, device)
    able, left_out = {}, []
    for key, call in calls(case, t, forms).items():
        about = dict(zip(("case", "M", "d", "k", "dtype"), (case, *shape, "bfloat16"), strict=True))
        about |= dict(zip(("form", "layout", "options"), key, strict=True))
        if time.monotonic() > until:
            left_out.append(about | {"left_out": LATE})
            continue
        if compiled is not None and key[0] not in (SHIPPED, FLOOR) and kernel(case, shape, key) not in compiled:
            left_out.append(about | {"left_out": NOT_COMPILED})
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
    shapes = [*((rows, D, K) for rows in args.rows), *(shape for shape in OTHERS if shape[0] in args.rows)]
    todo = tasks(shapes, tuple(args.forms))
    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    done = warm_all(workers, todo, until - args.seconds * (1 - FOR_COMPILING))
    compiled = {kernel(case, shape, key) for case, shape, _, key in done}
    print(f"compiled {len(done)} kernels in {time.monotonic() - until + args.seconds:.0f} s", flush=True)
    for shape in shapes:
        for case in CASES:
            measured = measure(case, shape, device, args.rounds, until, args.forms, compiled)
            results += [row | about for row in measured]
            timed = [row for row in measured if not row["left_out"]]
            broken = broken or any(row["form"] == SHIPPED and row["left_out"] not in (None, LATE) for row in measured)
            size = "{} x {}, k = {}".format(*shape)
            print(f"{case}, {size}: {len(timed)} timed, {len(measured) - len(timed)} left out")
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
