"""The operators alone, providers side by side in one run: python -m bench.op [--out FILE] [--quick]

Two cases: `project`, and `project_add_rmsnorm` with the residual addition and the norm that follow. The yardstick of
the first is a copy of x in the same run, of the second adding and normalising without an edit ("add + rmsnorm", the
fastest of those that are there), which needs the same bytes at least. A copy of as many bytes stands beside both. What
they would take at a large copy's bandwidth is printed before anything is timed.

A row says whether its output meets the bound on the very inputs that are timed (the first rows, the last and some
between); one that does not does something else, faster or not: it is shown as such. Timed as `bench.timing` says,
interleaved, with the yardstick twice for the noise. On CUDA each is timed three ways: warm as launched by the host
(whose time it is where there is little work), warm as a replayed graph, and after the L2 cache has been overwritten. On
a CPU the ratios say how the ATen form compares there; they say nothing about a GPU.
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

# d_model of Qwen2.5-3B at every number of rows; wider ones, and a wider subspace, at both ends. What matters most is
# first: the rows of a run that is stopped are kept.
CUDA_CASES = [
    *((m, 2048, 10) for m in (1, 16384, 64, 4096, 256)),
    *((m, d, k) for d, k in ((2048, 64), (4096, 10), (8192, 10)) for m in (1, 16384)),
]
CPU_CASES = [(m, 2048, 10) for m in (1, 64, 1024)]
EPS = 1e-6
# What each case is held against: the same bytes moved, no edit.
FLOORS = {"project": "copy", "project_add_rmsnorm": "add + rmsnorm"}
AGAIN = "{} again"
FORMS = ("row", "tile", "two-pass")


def inputs(m: int, d: int, k: int, dtype, device) -> dict:
    """Everything that the providers share, made from a seed of the shape."""
    import torch

    from kernel_surgery.ops.library import packed

    generator = torch.Generator().manual_seed(m + d + k)
    basis = torch.linalg.qr(torch.randn(d, k, generator=generator))[0].contiguous().to(device)
    x, residual = (torch.randn(m, d, generator=generator).to(dtype).to(device) for _ in range(2))
    weight = torch.rand(d, generator=generator).to(dtype).to(device)
    wide = packed(basis) if x.is_cuda else basis
    return {
        "x": x,
        "residual": residual,
        "weight": weight,
        "basis": basis,
        "wide": wide,
        "low": wide.to(dtype),
    }


def forms(t: dict, launch: Callable) -> dict[str, Callable]:
    """Our kernels one by one, those that this shape allows. The operator itself is one of them."""
    from kernel_surgery.kernels.project import FEW_ROWS

    m, d = t["x"].shape
    able = ["two-pass"]
    if m <= 4 * FEW_ROWS:
        able.append("row")
    # Also where it spills a little and is not chosen: whether that matters is for the clock to say.
    if d % 128 == 0 and d <= 4096 and t["wide"].shape[1] in (16, 32):
        able.append("tile")
    return {f"form {form}": lambda form=form: launch(form) for form in FORMS if form in able}


def projections(t: dict, compiled: bool) -> dict[str, Callable]:
    """{name: call} for y = x - U (U^T x). Bases are prepared outside the timed part."""
    import torch

    from kernel_surgery.ops.eager import project_eager
    from kernel_surgery.ops.library import project, provider

    # N = 10 misaligns cuBLAS: there the basis is padded with zero columns for every provider.
    x, wide, low = t["x"], t["wide"], t["low"]
    basis = wide if x.is_cuda else t["basis"]
    found = {
        "copy": lambda: x.clone(),
        "eager": lambda: project_eager(x, basis, 1.0),
        f"addmm (U and z in {str(x.dtype).removeprefix('torch.')})": lambda: torch.addmm(x, x @ low, low.T, alpha=-1.0),
        f"project ({provider(x)})": lambda: project(x, wide),
    }
    if compiled:
        function = torch.compile(project_eager, dynamic=False)
        found["eager, torch.compile"] = lambda: function(x, basis, 1.0)
    if x.is_cuda:
        from bench.baselines import lora
        from kernel_surgery.kernels.project import project as launch

        found["LoRA shrink + expand (stand-in)"] = lambda: lora(x, low, 1.0)
        found |= forms(t, lambda form: launch(x, wide, 1.0, form=form)[0])
    return found


def add_rmsnorm(x, residual, weight, eps: float):
    """(h, n) as a Llama-shaped model computes them: two operations, with their roundings."""
    import torch

    h = residual + x
    wide = h.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return h, weight * wide.to(h.dtype)


def additions(t: dict, compiled: bool) -> dict[str, Callable]:
    """{name: call} for (h, n) = (residual + y, rmsnorm(h) * weight), and for the same without an edit."""
    import torch

    from kernel_surgery.ops.eager import project_eager
    from kernel_surgery.ops.library import project, project_add_rmsnorm, provider

    x, residual, weight, wide = (t[name] for name in ("x", "residual", "weight", "wide"))
    basis = wide if x.is_cuda else t["basis"]
    found = {
        "copy": lambda: (x.clone(), residual.clone()),
        "add + rmsnorm, eager": lambda: add_rmsnorm(x, residual, weight, EPS),
        "eager, add, rmsnorm": lambda: add_rmsnorm(project_eager(x, basis, 1.0), residual, weight, EPS),
        "project, add, rmsnorm": lambda: add_rmsnorm(project(x, wide), residual, weight, EPS),
        f"project_add_rmsnorm ({provider(x)})": lambda: project_add_rmsnorm(x, residual, weight, EPS, wide),
    }
    if compiled:
        function = torch.compile(add_rmsnorm, dynamic=False)
        found["add + rmsnorm, torch.compile"] = lambda: function(x, residual, weight, EPS)

        def edited(x, basis, residual, weight):
            return add_rmsnorm(project_eager(x, basis, 1.0), residual, weight, EPS)

        chain = torch.compile(edited, dynamic=False)
        found["eager, add, rmsnorm, torch.compile"] = lambda: chain(x, basis, residual, weight)
    if x.is_cuda:
        from bench import baselines
        from kernel_surgery.kernels.project import project as launch

        found["add + rmsnorm, triton"] = lambda: baselines.add_rmsnorm(x, residual, weight, EPS)
        more = {"residual": residual, "weight": weight, "eps": EPS}
        found |= forms(t, lambda form: launch(x, wide, 1.0, form=form, **more))
    return found


def error_over_bound(case: str, name: str, result, t: dict) -> float:
    """How far a result is from the oracle, in units of its bound; of many rows the first, the last and some between."""
    import torch

    if name == "copy":
        given = (t["x"], t["residual"]) if case != "project" else (t["x"],)
        made = result if case != "project" else (result,)
        return 0.0 if all(map(torch.equal, given, made)) else float("inf")
    m = len(t["x"])
    rows = (
        torch.arange(m)
        if m <= 512
        else torch.cat([torch.arange(128), torch.arange(m - 128, m), torch.arange(0, m, m // 128)])
    )
    rows = rows.to(t["x"].device)
    x, residual, weight, basis = t["x"][rows], t["residual"][rows], t["weight"], t["basis"]
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
    """({name: error/bound}, {name: why it cannot be run}). Everybody's first call, in which things are compiled."""
    ratios, left_out = {}, {}
    for name, call in calls.items():
        try:
            ratios[name] = error_over_bound(case, name, call(), t)
        except Exception as error:  # what one shape or device cannot do leaves the others alone
            left_out[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    return ratios, left_out


def measure(case: str, m: int, d: int, k: int, dtype, device, rounds: int, compiled: bool) -> list[dict]:
    """Rows for one shape. `of_floor`: the speed over the fastest yardstick's, way by way, in the same run."""
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
        # The yardstick of this way is the fastest of those that only do what has to be done without an edit.
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
    """Fill in, for one shape, how many kernels every provider starts that is not compiled. When everything is timed: a
    profiler may slow what follows it."""
    t = inputs(m, d, k, dtype, device)
    for case in FLOORS:
        counts = {
            name: launches(call) for name, call in (projections if case == "project" else additions)(t, False).items()
        }
        for row in rows:
            if (row["case"], row["M"], row["d"], row["k"]) == (case, m, d, k) and not row["left_out"]:
                row["launches"] = counts.get(row["provider"])


def shown(row: dict) -> str:
    """One line of the table. A provider that breaks its bound is shown as such: it does something else."""
    head = f"{row['M']:>6} {row['d']:>5} {row['k']:>3} {row['dtype']:<8} {row['provider']:<34}"
    if row["left_out"]:
        return f"{head} {row['left_out']}"
    how = "graph" if row["graph"] else "cold" if row["cache"] == "cold" else "launched"
    low, high = ends(row)
    count = "" if row["launches"] is None else f"  launches {row['launches']}"
    verdict = "" if row["error_over_bound"] <= 1 else "  breaks its bound"
    return (
        f"{head} {how:<8} {row['us_p50']:>10.1f} us {row['gbps']:>7.1f} GB/s {row['of_floor']:>6.3f} "
        f"({1 / high:.3f} to {1 / low:.3f}) of {row['floor']}, {row['verdict']}  "
        f"error/bound {row['error_over_bound']:.2f}{count}{verdict}"
    )


def parser() -> Parser:
    """The command line."""
    p = bench_parser("op", "Time the operators against their alternatives.")
    p.add_argument("--out", type=Path, help="JSON file for the rows")
    p.add_argument("--device", default="auto")
    p.add_argument("--rounds", type=int, default=20)
    p.add_argument("--compile", action="store_true", help="torch.compile of the eager forms too (always on CUDA)")
    p.add_argument("--quick", action="store_true", help="the smallest and one large shape only")
    return p


def run(argv: list[str] | None = None) -> int:
    """Print the ceiling, the table, and the rows as JSON; 1 if one of our own providers breaks its bound."""
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
                    torch._dynamo.reset()  # its limit of recompilations would end in eager code without a word
                    # Compiled where it matters: a dozen of seconds a shape on a GPU.
                    compiled = args.compile or (cuda and (d, k) == (2048, 10))
                    for row in measure(case, m, d, k, dtype, device, args.rounds, compiled):
                        rows.append(row | {"copy_gbps": bandwidth} | about)
                        bar.write(shown(row))
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
        print(f"{len(broken)} of our own rows break their bound: their times mean nothing", file=sys.stderr)
    if absent:
        print(f"{len(absent)} of our own rows could not be run: {absent[0]['left_out']}", file=sys.stderr)
    return 1 if broken or absent else 0


if __name__ == "__main__":
    main(run)
