"""The operators alone, providers side by side in one run: python -m bench.op [--out FILE] [--quick]

Two cases: `project`, and `project_add_rmsnorm` with the residual addition and the norm that follow. The yardstick of
the first is a copy of x in the same run, of the second adding and normalising without an edit ("add + rmsnorm"), which
moves the same bytes. What the yardsticks would take at the copy's bandwidth is printed before anything is timed.

A row says whether its output meets the bound on the very inputs that are timed (the first rows, the last and some
between); one that does not does something else, faster or not. Providers are interleaved, so that a drift of the
machine meets all of them; medians with the 20th and
80th percentile. On CUDA each is timed three ways: warm as launched, warm as a replayed graph (no launch overhead of the
host), and after the L2 cache has been overwritten. On a CPU the ratios say how the ATen form compares there; they say
nothing about a GPU.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from bench.timing import Timer, copy_bandwidth, launches, percentiles, stamp
from kernel_surgery import cli

# d_model of Qwen2.5-3B at every number of rows; wider ones, and a wider subspace, at both ends.
CUDA_CASES = [
    *((m, 2048, 10) for m in (1, 16, 256, 4096, 16384)),
    *((m, d, k) for d, k in ((2048, 64), (4096, 10), (8192, 10)) for m in (1, 16384)),
]
CPU_CASES = [(m, 2048, 10) for m in (1, 64, 1024)]
EPS = 1e-6
FORMS = ("row", "tile", "two-pass")


def inputs(m: int, d: int, k: int, dtype, device) -> dict:
    """Everything that the providers share, made from a seed of the shape."""
    import torch

    from kernel_surgery.ops import packed

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
        "low": packed(basis).to(dtype),
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

    from kernel_surgery.ops import project, provider
    from kernel_surgery.reference import project_eager

    x, basis, wide, low = t["x"], t["basis"], t["wide"], t["low"]
    found = {
        "copy": lambda: x.clone(),
        "eager": lambda: project_eager(x, basis, 1.0),
        # N = 10 misaligns cuBLAS: the basis is padded with zero columns for it too.
        f"addmm (U and z in {str(x.dtype).removeprefix('torch.')})": lambda: torch.addmm(x, x @ low, low.T, alpha=-1.0),
        f"project ({provider(x)})": lambda: project(x, wide),
    }
    if compiled:
        function = torch.compile(project_eager, dynamic=False)
        found["eager, torch.compile"] = lambda: function(x, basis, 1.0)
    if x.is_cuda:
        from bench.stand_ins import lora
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

    from kernel_surgery.ops import project, project_add_rmsnorm, provider
    from kernel_surgery.reference import project_eager

    x, residual, weight, basis, wide = (t[name] for name in ("x", "residual", "weight", "basis", "wide"))
    found = {
        "add + rmsnorm, eager": lambda: add_rmsnorm(x, residual, weight, EPS),
        "eager, add, rmsnorm": lambda: add_rmsnorm(project_eager(x, basis, 1.0), residual, weight, EPS),
        "project, add, rmsnorm": lambda: add_rmsnorm(project(x, wide), residual, weight, EPS),
        f"project_add_rmsnorm ({provider(x)})": lambda: project_add_rmsnorm(x, residual, weight, EPS, wide),
    }
    if compiled:
        function = torch.compile(add_rmsnorm, dynamic=False)
        found["add + rmsnorm, torch.compile"] = lambda: function(x, residual, weight, EPS)
    if x.is_cuda:
        from bench import stand_ins
        from kernel_surgery.kernels.project import project as launch

        found["add + rmsnorm, triton"] = lambda: stand_ins.add_rmsnorm(x, residual, weight, EPS)
        more = {"residual": residual, "weight": weight, "eps": EPS}
        found |= forms(t, lambda form: launch(x, wide, 1.0, form=form, **more))
    return found


def error_over_bound(case: str, name: str, result, t: dict) -> float:
    """How far a result is from the oracle, in units of its bound; of many rows the first, the last and some between."""
    import torch

    from kernel_surgery import reference as ref

    m = len(t["x"])
    rows = (
        torch.arange(m)
        if m <= 512
        else torch.cat([torch.arange(128), torch.arange(m - 128, m), torch.arange(0, m, m // 128)])
    )
    rows = rows.to(t["x"].device)
    x, residual, weight, basis = t["x"][rows], t["residual"][rows], t["weight"], t["basis"]
    strength = 0.0 if name == "copy" or name.startswith("add + rmsnorm") else 1.0
    exact = ref.project_oracle(x, basis, strength)
    if case == "project":
        return ref.worst_ratio((result[rows].double() - exact).abs(), ref.rule_a_bound(x, basis, strength))
    h, n = (part[rows] for part in result)
    off = (h.double() - residual.double() - exact).abs()
    first = ref.worst_ratio(off, ref.add_bound(x, residual, basis, strength))
    off = (n.double() - ref.rmsnorm_oracle(h, weight, EPS)).abs()
    return max(first, ref.worst_ratio(off, ref.rmsnorm_bound(h, weight, EPS)))


def measure(case: str, m: int, d: int, k: int, dtype, device, rounds: int, compiled: bool) -> list[dict]:
    """Rows for one shape. `fraction_of_copy` is against the yardstick in the same run, way by way."""
    t = inputs(m, d, k, dtype, device)
    calls = (projections if case == "project" else additions)(t, compiled)
    timer = Timer(device, max(1, min(50, int(2e7 / (m * d)))) if device.type == "cpu" else 20)
    # Correctness before any time is taken; also the first call, in which things are compiled.
    ratios = {name: error_over_bound(case, name, call(), t) for name, call in calls.items()}
    counts = {name: launches(call) if device.type == "cuda" else None for name, call in calls.items()}
    times = {(name, how): [] for how in timer.ways() for name in calls}
    for name, how in times:
        timer.once(calls[name], how, name)
    for _ in range(rounds):
        for name, how in times:
            times[name, how].append(timer.once(calls[name], how, name))
    medians = {key: statistics.median(sample) for key, sample in times.items()}
    floors = [name for name in calls if name == "copy" or name.startswith("add + rmsnorm")]
    moved = (2 if case == "project" else 4) * m * d * t["x"].element_size()
    rows = []
    for (name, how), sample in times.items():
        middle = medians[name, how]
        floor = min(medians[other, how] for other in floors)
        rows.append(
            {"case": case, "provider": name, "M": m, "d": d, "k": k, "dtype": str(dtype).removeprefix("torch.")}
            | percentiles(sample)
            | {"gbps": moved / middle / 1e3, "fraction_of_copy": floor / middle}
            | {"error_over_bound": ratios[name], "launches": counts[name]}
            | {"cache": "cold" if how == "cold" else "warm", "graph": how == "graph"}
        )
    return rows


def shown(row: dict) -> str:
    """One line of the table. A provider that breaks its bound is shown as such: it does something else."""
    head = f"{row['M']:>6} {row['d']:>5} {row['k']:>3} {row['dtype']:<8} {row['provider']:<32}"
    how = "graph" if row["graph"] else "cold" if row["cache"] == "cold" else ""
    floor = "copy" if row["case"] == "project" else "add + rmsnorm"
    count = "" if row["launches"] is None else f"  launches {row['launches']}"
    verdict = "" if row["error_over_bound"] <= 1 else "  breaks its bound"
    return (
        f"{head} {how:<5} {row['us_p50']:>10.1f} us {row['gbps']:>7.1f} GB/s {row['fraction_of_copy']:>6.3f} of {floor}"
        f"  error/bound {row['error_over_bound']:.2f}{count}{verdict}"
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(prog="python -m bench.op", description="Time the operators against their alternatives.")
    p.add_argument("--out", type=Path, help="JSON file for the rows")
    p.add_argument("--device", default="auto")
    p.add_argument("--rounds", type=int, default=20)
    p.add_argument("--compile", action="store_true", help="torch.compile of the eager forms too (always on CUDA)")
    p.add_argument("--quick", action="store_true", help="the smallest and one large shape only")
    return p


def run(argv: list[str] | None = None) -> int:
    """Print the ceiling, the table, and the rows as JSON; 1 if one of our own providers breaks its bound."""
    args = parser().parse_args(argv)
    device = cli.parse_device(args.device)
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
    for case in ("project", "project_add_rmsnorm"):
        print(case)
        for dtype in (torch.bfloat16,) if cuda else (torch.float32, torch.bfloat16):
            for m, d, k in cases:
                torch._dynamo.reset()  # its limit of recompilations would end in eager code without a word
                for row in measure(case, m, d, k, dtype, device, args.rounds, cuda or args.compile):
                    rows.append(row | {"copy_gbps": bandwidth} | about)
                    print(shown(row), flush=True)
                if args.out:
                    cli.write_atomic(args.out, json.dumps(rows, indent=1) + "\n")
    print(json.dumps({"case": "op", "rows": len(rows), "copy_gbps": bandwidth, **about}))
    broken = [r for r in rows if r["provider"].startswith(("project", "form")) and r["error_over_bound"] > 1]
    if broken:
        print(f"{len(broken)} of our own rows break their bound: their times mean nothing", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    cli.main(run)
