"""Time the operators alone, beside other implementations, in one run: python -m bench.op [--out FILE] [--quick]

There are two cases, each with a floor that moves the same bytes without an edit:

    project                 the edit. Its floor is a copy of x
    project_add_rmsnorm     the edit, the residual addition and the next norm. Its floor is the fastest plain addition
                            and norm ("add + rmsnorm")

A copy of as many bytes is timed in both cases. The benchmark first prints what a large copy's bandwidth allows.

Every output is compared with its bound, on the timed inputs (the first rows, the last, and some between). An output
outside its bound is a different computation, and its row says so. Timing is as in `bench.timing`, with the floor twice
for the noise. On CUDA there are three ways: launched by the host with a warm cache, replayed as a graph with a warm
cache, and launched with a cold cache. On a CPU the operators are ATen calls, so the ratios say nothing about a GPU.
"""

import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench.parsing import bench_parser
from bench.store import keep, record
from bench.timing import Timer, against, copy_bandwidth, ends, interleaved, launches, percentiles, stamp
from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.progress import progress_bar
from kernel_surgery.models.load import parse_device
from kernel_surgery.numerics.bounds import add_bound, rmsnorm_bound, rule_a_bound, worst_ratio
from kernel_surgery.numerics.oracle import project_oracle, rmsnorm_oracle
from kernel_surgery.numerics.projection import Projection

# Qwen2.5-3B's d_model at every number of rows; a larger d_model or rank with the fewest rows and the most. The most
# important come first, since a run that is stopped keeps its rows.
CUDA_CASES = [
    *((m, 2048, 10) for m in (1, 16384, 64, 4096, 256)),
    *((m, d, k) for d, k in ((2048, 64), (4096, 10), (8192, 10)) for m in (1, 16384)),
]
CPU_CASES = [(m, 2048, 10) for m in (1, 64, 1024)]
EPS = 1e-6
# {case: how the names of its floors begin}. A floor moves the same bytes and makes no edit.
FLOORS = {"project": "copy", "project_add_rmsnorm": "add + rmsnorm"}
AGAIN = "{} again"
AFFINE = "affine"  # in the name of a method whose edit has a dual and an offset
FORMS = ("row", "tile", "two-pass")


def inputs(m: int, d: int, k: int, dtype, device) -> dict:
    """The inputs that all methods share, from a seed that depends on the shape."""
    import torch

    from kernel_surgery.ops.library import packed

    generator = torch.Generator().manual_seed(m + d + k)
    basis = torch.linalg.qr(torch.randn(d, k, generator=generator))[0].contiguous().to(device)
    x, residual = (torch.randn(m, d, generator=generator).to(dtype).to(device) for _ in range(2))
    weight = torch.rand(d, generator=generator).to(dtype).to(device)
    wide = packed(basis) if x.is_cuda else basis
    # A = S U and B = S^-1 U with a diagonal S, so B^T A = I.
    sizes = torch.rand(d, 1, generator=generator).to(device) + 0.5
    affine = Projection(sizes * basis, basis / sizes, torch.randn(k, generator=generator).to(device))
    return {
        **{"x": x, "residual": residual, "weight": weight, "basis": basis, "wide": wide, "low": wide.to(dtype)},
        **{"affine": affine, "affine_wide": affine.map(packed) if x.is_cuda else affine},
    }


def forms(t: dict, launch: Callable) -> dict[str, Callable]:
    """Our kernels that this shape allows, one by one. The operator uses one of them."""
    from kernel_surgery.kernels.project import FEW_ROWS

    m, d = t["x"].shape
    able = ["two-pass"]
    if m <= FEW_ROWS:
        able.append("row")
    # Timed also where it spills registers and the operator does not choose it.
    if d % 512 == 0 and d <= 4096 and t["wide"].shape[1] == 16:
        able.append("tile")
    return {f"form {form}": lambda form=form: launch(form) for form in FORMS if form in able}


def projections(t: dict, compiled: bool) -> dict[str, Callable]:
    """{name: call} for y = x - U (U^T x). The bases are prepared before the timing."""
    import torch

    from kernel_surgery.ops.eager import project_eager
    from kernel_surgery.ops.library import project, provider

    # N = 10 misaligns cuBLAS, so on CUDA every method gets a basis padded with zero columns.
    x, wide, low, affine = t["x"], t["wide"], t["low"], t["affine_wide"]
    basis = wide if x.is_cuda else t["basis"]
    calls = {
        "copy": lambda: x.clone(),
        "eager": lambda: project_eager(x, basis, 1.0),
        f"addmm (U and z in {str(x.dtype).removeprefix('torch.')})": lambda: torch.addmm(x, x @ low, low.T, alpha=-1.0),
        f"project ({provider(x)})": lambda: project(x, wide),
        f"project, {AFFINE} ({provider(x)})": lambda: project(x, affine.basis, dual=affine.dual, offset=affine.offset),
    }
    if compiled:
        function = torch.compile(project_eager, dynamic=False)
        calls["eager, torch.compile"] = lambda: function(x, basis, 1.0)
    if x.is_cuda:
        from bench.baselines import lora
        from kernel_surgery.kernels.project import project as launch

        calls["LoRA shrink + expand (stand-in)"] = lambda: lora(x, low, 1.0)
        calls |= forms(t, lambda form: launch(x, wide, 1.0, form=form)[0])
    return calls


def add_rmsnorm(x, residual, weight, eps: float):
    """(h, n) as a Llama-shaped model computes them: two operations, each with its own rounding."""
    import torch

    h = residual + x
    wide = h.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return h, weight * wide.to(h.dtype)


def additions(t: dict, compiled: bool) -> dict[str, Callable]:
    """{name: call} for (h, n) = (residual + y, rmsnorm(h) * weight), with the edit and without it."""
    import torch

    from kernel_surgery.ops.eager import project_eager
    from kernel_surgery.ops.library import project, project_add_rmsnorm, provider

    x, residual, weight, wide = (t[name] for name in ("x", "residual", "weight", "wide"))
    basis, affine = wide if x.is_cuda else t["basis"], t["affine_wide"]
    edit = {"dual": affine.dual, "offset": affine.offset}
    calls = {
        "copy": lambda: (x.clone(), residual.clone()),
        "add + rmsnorm, eager": lambda: add_rmsnorm(x, residual, weight, EPS),
        "eager, add, rmsnorm": lambda: add_rmsnorm(project_eager(x, basis, 1.0), residual, weight, EPS),
        "project, add, rmsnorm": lambda: add_rmsnorm(project(x, wide), residual, weight, EPS),
        f"project_add_rmsnorm ({provider(x)})": lambda: project_add_rmsnorm(x, residual, weight, EPS, wide),
        f"project_add_rmsnorm, {AFFINE} ({provider(x)})": lambda: project_add_rmsnorm(
            x, residual, weight, EPS, affine.basis, **edit
        ),
    }
    if compiled:
        function = torch.compile(add_rmsnorm, dynamic=False)
        calls["add + rmsnorm, torch.compile"] = lambda: function(x, residual, weight, EPS)

        def edited(x, basis, residual, weight):
            return add_rmsnorm(project_eager(x, basis, 1.0), residual, weight, EPS)

        chain = torch.compile(edited, dynamic=False)
        calls["eager, add, rmsnorm, torch.compile"] = lambda: chain(x, basis, residual, weight)
    if x.is_cuda:
        from bench import baselines
        from kernel_surgery.kernels.project import project as launch

        calls["add + rmsnorm, triton"] = lambda: baselines.add_rmsnorm(x, residual, weight, EPS)
        more = {"residual": residual, "weight": weight, "eps": EPS}
        calls |= forms(t, lambda form: launch(x, wide, 1.0, form=form, **more))
    return calls


def error_over_bound(case: str, name: str, result, t: dict) -> float:
    """The largest error of a result over its bound. Of many rows it takes the first, the last and some between."""
    import torch

    if name == "copy":
        sources = (t["x"], t["residual"]) if case != "project" else (t["x"],)
        copies = result if case != "project" else (result,)
        return 0.0 if all(map(torch.equal, sources, copies)) else float("inf")
    m = len(t["x"])
    rows = (
        torch.arange(m)
        if m <= 512
        else torch.cat([torch.arange(128), torch.arange(m - 128, m), torch.arange(0, m, m // 128)])
    )
    rows = rows.to(t["x"].device)
    x, residual, weight, basis = (
        t["x"][rows],
        t["residual"][rows],
        t["weight"],
        t["affine" if AFFINE in name else "basis"],
    )
    strength = 0.0 if name.startswith("add + rmsnorm") else 1.0
    exact = project_oracle(x, basis, strength)
    if case == "project":
        return worst_ratio((result[rows].double() - exact).abs(), rule_a_bound(x, basis, strength))
    h, n = (part[rows] for part in result)
    off = (h.double() - residual.double() - exact).abs()
    first = worst_ratio(off, add_bound(x, residual, basis, strength))
    off = (n.double() - rmsnorm_oracle(h, weight, EPS)).abs()
    return max(first, worst_ratio(off, rmsnorm_bound(h, weight, EPS)))


def checked(case: str, calls: dict[str, Callable], t: dict) -> tuple[dict[str, float], dict[str, str]]:
    """({name: error/bound}, {name: why it cannot run}), from the first call of each, which also compiles it."""
    ratios, left_out = {}, {}
    for name, call in calls.items():
        try:
            ratios[name] = error_over_bound(case, name, call(), t)
        except Exception as error:  # a method that fails on this shape or device does not stop the others
            left_out[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    return ratios, left_out


def measure(case: str, m: int, d: int, k: int, dtype, device, rounds: int, compiled: bool) -> list[dict]:
    """Rows for one shape. `of_floor` is the speed over that of the fastest floor, timed in the same way and run."""
    t = inputs(m, d, k, dtype, device)
    calls = (projections if case == "project" else additions)(t, compiled)
    ratios, left_out = checked(case, calls, t)
    calls = {name: calls[name] for name in ratios}
    timer = Timer(device, max(1, min(50, int(2e7 / (m * d)))) if device.type == "cpu" else 20)
    moved = (2 if case == "project" else 4) * m * d * t["x"].element_size()
    about = {"M": m, "d": d, "k": k, "dtype": str(dtype).removeprefix("torch."), "left_out": None}
    rows = [record("op", case, name, **about | {"left_out": why}) for name, why in left_out.items()]
    floors = [name for name in calls if name.startswith(FLOORS[case])]
    for how in timer.ways():
        chosen = {name: partial(timer.once, call, how, name) for name, call in calls.items()}
        # The floor is whichever of the methods without an edit is fastest when timed in this way.
        fastest = min(floors, key=lambda name: min(chosen[name]() for _ in range(4)))
        chosen[AGAIN.format(fastest)] = chosen[fastest]
        times = interleaved(chosen, rounds)
        compared = against(times, fastest, AGAIN.format(fastest))
        copied = statistics.median(times["copy"]) if "copy" in times else None
        for name in calls:
            row = record("op", case, name, **about) | percentiles(times[name]) | compared[name]
            row |= {"gbps": moved / row["us_p50"] / 1e3, "of_floor": 1 / row["ratio"], "floor": fastest}
            row["fraction_of_copy"] = copied and copied / row["us_p50"]
            row |= {"error_over_bound": ratios[name], "cache": "cold" if how == "cold" else "warm"}
            rows.append(row | {"graph": how == "graph"})
    return rows


def count_launches(rows: list[dict], m: int, d: int, k: int, dtype, device) -> None:
    """Fill in how many kernels every method starts at one shape, except compiled methods.

    Runs when all times are taken, because a profiler may slow what follows it.
    """
    t = inputs(m, d, k, dtype, device)
    for case in FLOORS:
        counts = {
            name: launches(call) for name, call in (projections if case == "project" else additions)(t, False).items()
        }
        for row in rows:
            if (row["case"], row["M"], row["d"], row["k"]) == (case, m, d, k) and not row["left_out"]:
                row["launches"] = counts.get(row["provider"])


def row_text(row: dict) -> str:
    """One line of the table. The line says so if the output exceeds its bound."""
    head = f"{row['M']:>6} {row['d']:>5} {row['k']:>3} {row['dtype']:<8} {row['provider']:<34}"
    if row["left_out"]:
        return f"{head} {row['left_out']}"
    how = "graph" if row["graph"] else "cold" if row["cache"] == "cold" else "launched"
    low, high = ends(row)
    count = "" if row["launches"] is None else f"  launches {row['launches']}"
    verdict = "" if row["error_over_bound"] <= 1 else "  exceeds its bound"
    return (
        f"{head} {how:<8} {row['us_p50']:>10.1f} us {row['gbps']:>7.1f} GB/s {row['of_floor']:>6.3f} "
        f"({1 / high:.3f} to {1 / low:.3f}) of {row['floor']}, {row['verdict']}  "
        f"error/bound {row['error_over_bound']:.2f}{count}{verdict}"
    )


def parser() -> Parser:
    """The command line."""
    p = bench_parser("op", "Time the operators beside other implementations.")
    p.add_argument("--out", type=Path, help="JSON file for the rows")
    p.add_argument("--device", default="auto")
    p.add_argument("--rounds", type=int, default=20)
    p.add_argument(
        "--compile", action="store_true", help="also time the eager forms under torch.compile (always on CUDA)"
    )
    p.add_argument("--no-compile", action="store_true", help="never compile the eager forms")
    p.add_argument("--quick", action="store_true", help="only the smallest shape and one large shape")
    return p


def run(argv: list[str] | None = None) -> int:
    """Print the ceiling and the table, store the rows. Returns 1 if one of our methods fails or exceeds its bound."""
    args = parser().parse_args(argv)
    device = parse_device(args.device)
    import torch

    cuda = device.type == "cuda"
    cases = CUDA_CASES if cuda else CPU_CASES
    cases = [cases[0], cases[4 if cuda else -1]] if args.quick else cases
    about = stamp(device)
    bandwidth = copy_bandwidth(device)
    print(f"{about['device']}: a large copy moves {bandwidth:.0f} GB/s. At that rate")
    for m, d, k in cases:
        unit = m * d * (2 if cuda else 4) / bandwidth / 1e3
        print(
            f"  {m:>6} x {d} {'bfloat16' if cuda else 'float32'}, k={k}: project {2 * unit:.2f} us, "
            f"project_add_rmsnorm {4 * unit:.2f} us"
        )
    rows = []
    dtypes = (torch.bfloat16,) if cuda else (torch.float32, torch.bfloat16)
    with progress_bar(len(FLOORS) * len(dtypes) * len(cases), "op", unit="shape") as bar:
        for dtype in dtypes:
            for m, d, k in cases:
                for case in FLOORS:
                    torch._dynamo.reset()  # beyond its recompile limit it falls back to eager code silently
                    # On a GPU, compile only the shapes that matter: each takes some twelve seconds.
                    compiled = args.compile or (cuda and (d, k) == (2048, 10) and not args.no_compile)
                    for row in measure(case, m, d, k, dtype, device, args.rounds, compiled):
                        rows.append(row | {"copy_gbps": bandwidth} | about)
                        bar.write(row_text(row))
                    keep(args.out, rows)
                    bar.update()
    for m, d, k in cases[:2] if cuda else ():
        count_launches(rows, m, d, k, dtypes[0], device)
    keep(args.out, rows)
    print(json.dumps({"case": "op", "rows": len(rows), "copy_gbps": bandwidth, **about}))
    own = [r for r in rows if r["provider"].startswith(("project", "form"))]
    absent = [r for r in own if r["left_out"]]
    broken = [r for r in own if not r["left_out"] and not r["error_over_bound"] <= 1]
    if broken:
        print(f"{len(broken)} of our own rows exceed their bound: their times mean nothing", file=sys.stderr)
    if absent:
        print(f"{len(absent)} of our own rows could not be run: {absent[0]['left_out']}", file=sys.stderr)
    return 1 if broken or absent else 0


if __name__ == "__main__":
    main(run)
