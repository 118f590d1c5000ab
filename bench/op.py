"""The projection alone, providers side by side in one run: python -m bench.op [--out FILE] [--quick]

A row is printed and written only for a provider whose output meets Rule A on the very inputs that are timed.
Providers are interleaved, so that a drift of the machine meets all of them; medians with the 20th and 80th
percentile; a plain copy of x in the same run is the yardstick. On a CPU the ratios say how the ATen form compares
there; they say nothing about a GPU.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from kernel_surgery import cli

_SIZES = ((2048, 10), (2048, 64), (4096, 10), (8192, 10))
CUDA_CASES = [(m, d, k) for d, k in _SIZES for m in (1, 16, 256, 4096, 16384)]
CPU_CASES = [(m, 2048, 10) for m in (1, 64, 1024)]


def providers(x, basis, strength: float) -> dict[str, Callable]:
    """{name: function of x} for everything that is compared. Bases are prepared outside the timed part."""
    import torch

    from kernel_surgery.ops import project, provider
    from kernel_surgery.reference import project_eager

    wide = basis.float().contiguous()
    low = wide.to(x.dtype)
    padded = torch.nn.functional.pad(low, (0, -low.shape[1] % 16))  # N = 10 misaligns cuBLAS

    def addmm(t):
        return torch.addmm(t, t @ padded, padded.T, alpha=-strength)

    return {
        "copy": lambda t: t.clone(),
        "eager": lambda t: project_eager(t, wide, strength),
        f"addmm (U and z in {str(x.dtype).removeprefix('torch.')})": addmm,
        f"project ({provider(x)})": lambda t: project(t, wide, strength),
    }


def time_once(function: Callable, x, inner: int) -> float:
    """Microseconds a call, over `inner` calls."""
    import torch

    if x.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(inner):
            function(x)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / inner
    began = time.perf_counter()
    for _ in range(inner):
        function(x)
    return (time.perf_counter() - began) * 1e6 / inner


def graphed(function: Callable, x) -> Callable:
    """The same call as a replayed CUDA graph (launch overhead of the host taken out)."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function(x)
    return lambda _: graph.replay()


def measure(m: int, d: int, k: int, dtype, device, rounds: int) -> list[dict]:
    """Rows for one shape. `error_over_bound` is Rule A's, `fraction_of_copy` against the copy in the same run."""
    import torch

    from kernel_surgery.reference import project_oracle, rule_a_bound, worst_ratio

    generator = torch.Generator().manual_seed(m + d + k)
    basis = torch.linalg.qr(torch.randn(d, k, generator=generator))[0].contiguous().to(device)
    x = torch.randn(m, d, generator=generator).to(dtype).to(device)
    checked = min(m, 256)
    exact, bound = project_oracle(x[:checked], basis, 1.0), rule_a_bound(x[:checked], basis, 1.0)
    inner = max(1, min(50, int(2e7 / (m * d)))) if device.type == "cpu" else 20
    rows, calls = [], {}
    for name, function in providers(x, basis, 1.0).items():
        ratio = 0.0 if name == "copy" else worst_ratio((function(x)[:checked].double() - exact).abs(), bound)
        row = {
            "case": "project",
            "provider": name,
            "M": m,
            "d": d,
            "k": k,
            "dtype": str(dtype).removeprefix("torch."),
            "error_over_bound": ratio,
            "launches": None,
            "cache": "warm",
        }
        rows.append(row | {"graph": False})
        calls[name, False] = function
        if device.type == "cuda":
            rows.append(row | {"graph": True})
            calls[name, True] = graphed(function, x)
    times: dict[tuple, list[float]] = {key: [] for key in calls}
    for function in calls.values():
        time_once(function, x, inner)
    for _ in range(rounds):
        for key, function in calls.items():
            times[key].append(time_once(function, x, inner))
    copies = {graph: statistics.median(times["copy", graph]) for _, graph in calls}
    moved = 2 * m * d * x.element_size()
    for row in rows:
        sample = sorted(times[row["provider"], row["graph"]])
        middle = statistics.median(sample)
        row |= {f"us_p{p}": sample[int(p / 100 * (len(sample) - 1))] for p in (20, 80)} | {"us_p50": middle}
        row |= {"gbps": moved / middle / 1e3, "fraction_of_copy": copies[row["graph"]] / middle}
    return rows


def shown(row: dict) -> str:
    """One line of the table. A provider that breaks Rule A is shown as such: it does something else, faster or not."""
    head = f"{row['M']:>6} {row['d']:>5} {row['k']:>3} {row['dtype']:<8} {row['provider']:<28}"
    verdict = "" if row["error_over_bound"] <= 1 else "  breaks Rule A"
    return (
        f"{head} {'graph' if row['graph'] else '':<5} {row['us_p50']:>10.1f} us"
        f"  {row['fraction_of_copy']:>6.3f} of copy"
        f"  error/bound {row['error_over_bound']:.2f}{verdict}"
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(prog="python -m bench.op", description="Time the projection against its alternatives.")
    p.add_argument("--out", type=Path, help="JSON file for the rows")
    p.add_argument("--device", default="auto")
    p.add_argument("--rounds", type=int, default=20)
    p.add_argument("--quick", action="store_true", help="the smallest and one large shape only")
    return p


def run(argv: list[str] | None = None) -> int:
    """Print the table, write the rows; 1 if our own provider breaks Rule A."""
    args = parser().parse_args(argv)
    device = cli.parse_device(args.device)
    import torch

    cases = CUDA_CASES if device.type == "cuda" else CPU_CASES
    dtypes = (torch.bfloat16,) if device.type == "cuda" else (torch.float32, torch.bfloat16)
    cases = [cases[0], cases[-1]] if args.quick else cases
    stamp = {
        key: value for key, value in cli.environment(device).items() if key in ("torch", "triton", "commit", "dirty")
    }
    stamp |= {"device": cli.environment(device)["device"], "date": time.strftime("%Y-%m-%d")}
    rows = []
    for dtype in dtypes:
        for m, d, k in cases:
            for row in measure(m, d, k, dtype, device, args.rounds):
                rows.append(row | stamp)
                print(shown(row), flush=True)
    if args.out:
        cli.write_atomic(args.out, json.dumps(rows, indent=1) + "\n")
    broken = [row for row in rows if row["provider"].startswith("project") and row["error_over_bound"] > 1]
    if broken:
        print(f"{len(broken)} of our own rows break Rule A: their times mean nothing", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    cli.main(run)
