"""Time exact and approximate ways to fit a subspace: python -m bench.fit [--layers 36] [--out FILE]

The activations are synthetic and of a real model's size: 200 problems in seven languages at d_model 2048. They are the
sum of a part that all prompts of a problem share, a few language directions of falling strength, and noise. The script
that this project began with takes numpy's full SVD of a layer's 1400 x 2048 deviations in float32. Every method gets
the same [problems, languages, d_model] of each layer and returns the k leading directions. Each layer is one round.

Accuracy is reported beside the time. The sine is that of the largest principal angle to the subspace of a float64 SVD.
The residual is norm(G u - s^2 u) / s_1^2 of the worst vector, where G is the scatter matrix. It is 0 for a singular
vector. An exact method also gives every singular value, which `fit` stores.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

from bench.parsing import bench_parser
from bench.store import keep, record
from bench.timing import ends, interleaved, percentiles, ratio, stamp
from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.progress import progress_bar

PROBLEMS, LANGUAGES = 200, 7
SCRIPT, OURS = "numpy.linalg.svd, full (the script)", "kernel_surgery.fit"
# Top-k solvers give the leading directions only, without the spectrum and without a residual.
TOP = ("torch.svd_lowrank, 4 iterations", "scipy svds, PROPACK")
ANGLE = 1e-5


def activations(layer: int, d: int, problems: int = PROBLEMS, languages: int = LANGUAGES, directions: int = 24):
    """[problems, languages, d] float32 of one layer. The language directions have strengths from 20 down to 1."""
    import torch

    generator = torch.Generator().manual_seed(layer)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    space = torch.linalg.qr(normal(d, directions))[0].T * torch.logspace(1.3, 0, directions)[:, None]
    language = normal(1, languages, directions) + 0.3 * normal(problems, languages, directions)
    return normal(problems, 1, d) + language @ space + 0.5 * normal(problems, languages, d)


def deviations(x):
    """[problems * languages, d]: each prompt less the mean of its problem, as in the script."""
    return (x - x.mean(1, keepdim=True)).reshape(-1, x.shape[-1])


def methods(k: int) -> dict[str, Callable]:
    """{method: function from activations to a basis [d, k]}."""
    import numpy as np
    import torch
    from scipy.sparse.linalg import svds

    from kernel_surgery.subspace.fitting import language_rows, principal_basis

    def numpy_full(x):
        return np.linalg.svd(deviations(x).numpy(), full_matrices=False)[2][:k].T

    def torch_full(x):
        return torch.linalg.svd(deviations(x).double(), full_matrices=False)[2][:k].T

    def gram(x):
        rows = deviations(x).double()
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        return rows.T @ vectors[:, -k:].flip(1) / values[-k:].flip(0).sqrt()

    def lowrank(x):
        torch.manual_seed(0)
        return torch.svd_lowrank(deviations(x), q=k + 10, niter=4)[2][:, :k]

    def propack(x):
        return svds(deviations(x).numpy(), k=k, solver="propack", rng=np.random.default_rng(0))[2][::-1].T.copy()

    return {
        SCRIPT: numpy_full,
        "torch.linalg.svd, full, float64": torch_full,
        "torch.linalg.eigh of D D^T, float64": gram,
        OURS: lambda x: principal_basis(language_rows(x, "deviations"), k)[0],
        TOP[0]: lowrank,
        TOP[1]: propack,
    }


def product_seconds(rows: int, d: int) -> float:
    """Seconds of one float32 product [rows, d] x [d, rows], the fastest of three."""
    import torch

    x, times = torch.randn(rows, d), []
    for _ in range(3):
        began = time.perf_counter()
        torch.mm(x, x.T)
        times.append(time.perf_counter() - began)
    return min(times)


def quality(basis, x, exact) -> dict[str, float]:
    """{"sine", "residual"} of a basis [d, k], given the exact basis [d, k]."""
    import torch

    u = torch.as_tensor(basis).double()
    scatter = deviations(x.double())
    image = scatter.T @ (scatter @ u)
    squares = (u * image).sum(0)
    off = (image - u * squares).norm(dim=0).max() / squares.max()
    sine = torch.linalg.matrix_norm(u - exact @ (exact.T @ u), 2)
    return {"sine": float(sine), "residual": float(off)}


def parser() -> Parser:
    """The command line."""
    p = bench_parser("fit", "Time fitting beside full SVDs and top-k solvers.")
    p.add_argument("--layers", type=int, default=36)
    p.add_argument("--d", type=int, default=2048)
    p.add_argument("--rank", type=int, default=10)
    p.add_argument("--out", type=Path, help="JSON file for the rows")
    return p


def run(argv: list[str] | None = None) -> int:
    """Print the table. Returns 1 if the sine of our subspace exceeds ANGLE."""
    args = parser().parse_args(argv)
    calls, about = methods(args.rank), stamp(None, "numpy", "scipy")
    rows_each = PROBLEMS * LANGUAGES
    print(
        f"{about['device']}: {args.layers} layers of {PROBLEMS} problems x {LANGUAGES} languages x {args.d}, "
        f"k = {args.rank}; the Gram matrix of {rows_each} rows, which every exact method but an SVD needs, takes "
        f"{product_seconds(rows_each, args.d):.3f} s per layer as one float32 product"
    )
    where, worst = {name: 0 for name in calls}, {name: {"sine": 0.0, "residual": 0.0} for name in calls}
    data = {}

    def one(name: str) -> float:
        # The first round is discarded, so it takes the first layer too.
        layer = max(0, where[name] - 1)
        where[name] += 1
        if layer not in data:
            x = activations(layer, args.d)
            data.clear()
            data[layer] = x, deviations(x.double()).svd()[2][:, : args.rank]
        x, exact = data[layer]
        began = time.perf_counter()
        basis = calls[name](x)
        microseconds = (time.perf_counter() - began) * 1e6
        for key, value in quality(basis, x, exact).items():
            worst[name][key] = max(worst[name][key], value)
        return microseconds

    with progress_bar((args.layers + 1) * len(calls), "fit", unit="layer") as bar:
        times = interleaved({name: lambda name=name: one(name) for name in calls}, args.layers, bar.update)
    rows = []
    for name, sample in times.items():
        row = record("fit", "layer", name, M=rows_each, d=args.d, k=args.rank, dtype="float32", cache="warm")
        row |= {"layers": args.layers, "exact": name not in TOP} | worst[name] | percentiles(sample)
        row |= {"seconds": sum(sample) / 1e6} | ratio(times[SCRIPT], sample, "speedup") | about
        rows.append(row)
        low, high = ends(row, "speedup")
        print(
            f"{name:<36} {row['us_p50'] / 1e6:>7.3f} s per layer {row['seconds']:>7.1f} s in total  "
            f"{row['speedup']:>6.2f} times the script's speed ({low:.2f} to {high:.2f})  "
            f"sine {row['sine']:.1e}  residual {row['residual']:.1e}"
        )
    keep(args.out, rows)
    ours = next(row for row in rows if row["provider"] == OURS)
    print(json.dumps({"case": "fit", "speedup": ours["speedup"], "sine": ours["sine"], **about}))
    return 0 if ours["sine"] <= ANGLE else 1


if __name__ == "__main__":
    main(run)
