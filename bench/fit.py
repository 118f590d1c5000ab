"""Fitting, exact and not, beside the script's way: python -m bench.fit [--layers 36] [--out FILE]

Synthetic activations of a real model's size, 200 problems in seven languages at d_model 2048: what a problem's prompts
share, a few language directions of falling strength, and noise. The script that this project began with takes numpy's
full SVD of a layer's 1400 x 2048 deviations in float32. Each provider is given the same [problems, languages, d_model]
of every layer in turn and gives the k leading directions; every layer is one round.

Beside the time: the largest principal angle to the subspace of a float64 SVD (its sine), and the residual
norm(G u - s^2 u) / s_1^2 of the worst vector, G the scatter matrix: how far it is from being a singular vector at all.
An exact provider also gives every singular value, which `fit` keeps.
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
# A top-k solver gives the leading directions alone: no spectrum, and a residual that it does not say.
TOP = ("torch.svd_lowrank, 4 iterations", "scipy svds, PROPACK")
ANGLE = 1e-5


def activations(layer: int, d: int, problems: int = PROBLEMS, languages: int = LANGUAGES, directions: int = 24):
    """[problems, languages, d] float32 of one layer, with so many language directions of strengths 20 down to 1."""
    import torch

    generator = torch.Generator().manual_seed(layer)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    space = torch.linalg.qr(normal(d, directions))[0].T * torch.logspace(1.3, 0, directions)[:, None]
    language = normal(1, languages, directions) + 0.3 * normal(problems, languages, directions)
    return normal(problems, 1, d) + language @ space + 0.5 * normal(problems, languages, d)


def deviations(x):
    """[problems * languages, d] float32, as the script has them."""
    return (x - x.mean(1, keepdim=True)).reshape(-1, x.shape[-1])


def methods(k: int) -> dict[str, Callable]:
    """{name: x -> [d, k]}."""
    import numpy as np
    import torch
    from scipy.sparse.linalg import svds

    from kernel_surgery.subspace.fitting import language_rows, principal_basis

    def numpy_full(x):
        return np.linalg.svd(deviations(x).numpy(), full_matrices=False)[2][:k].T

    def torch_full(x):
        return torch.linalg.svd(deviations(x).double(), full_matrices=False)[2][:k].T

    def gram(x):
        found = deviations(x).double()
        values, vectors = torch.linalg.eigh(found @ found.T)
        return found.T @ vectors[:, -k:].flip(1) / values[-k:].flip(0).sqrt()

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


def quality(found, x, exact) -> dict[str, float]:
    """{"sine", "residual"} of a [d, k] basis against the exact [d, k] one."""
    import torch

    u = torch.as_tensor(found).double()
    scatter = deviations(x.double())
    image = scatter.T @ (scatter @ u)
    squares = (u * image).sum(0)
    off = (image - u * squares).norm(dim=0).max() / squares.max()
    sine = torch.linalg.matrix_norm(u - exact @ (exact.T @ u), 2)
    return {"sine": float(sine), "residual": float(off)}


def parser() -> Parser:
    """The command line."""
    p = bench_parser("fit", "Time fitting against full SVDs and top-k solvers.")
    p.add_argument("--layers", type=int, default=36)
    p.add_argument("--d", type=int, default=2048)
    p.add_argument("--rank", type=int, default=10)
    p.add_argument("--out", type=Path, help="JSON file for the rows")
    return p


def run(argv: list[str] | None = None) -> int:
    """Print the table; 1 if our subspace is more than 1e-5 away from the float64 SVD's."""
    args = parser().parse_args(argv)
    calls, about = methods(args.rank), stamp(None, "numpy", "scipy")
    rows_each = PROBLEMS * LANGUAGES
    print(
        f"{about['device']}: {args.layers} layers of {PROBLEMS} problems x {LANGUAGES} languages x {args.d}, "
        f"k = {args.rank}; the Gram matrix of {rows_each} rows alone, which every exact way but an SVD makes, takes "
        f"{product_seconds(rows_each, args.d):.3f} s a layer as one float32 product"
    )
    where, worst = {name: 0 for name in calls}, {name: {"sine": 0.0, "residual": 0.0} for name in calls}
    data = {}

    def one(name: str) -> float:
        # The first round, which is not counted, is the first layer too.
        layer = max(0, where[name] - 1)
        where[name] += 1
        if layer not in data:
            x = activations(layer, args.d)
            data.clear()
            data[layer] = x, deviations(x.double()).svd()[2][:, : args.rank]
        x, exact = data[layer]
        began = time.perf_counter()
        found = calls[name](x)
        taken = (time.perf_counter() - began) * 1e6
        for key, value in quality(found, x, exact).items():
            worst[name][key] = max(worst[name][key], value)
        return taken

    with progress_bar((args.layers + 1) * len(calls), "fit", unit="layer") as bar:
        times = interleaved({name: lambda name=name: one(name) for name in calls}, args.layers, bar.update)
    rows = []
    for name, taken in times.items():
        row = record("fit", "layer", name, M=rows_each, d=args.d, k=args.rank, dtype="float32", cache="warm")
        row |= {"layers": args.layers, "exact": name not in TOP} | worst[name] | percentiles(taken)
        row |= {"seconds": sum(taken) / 1e6} | ratio(times[SCRIPT], taken, "speedup") | about
        rows.append(row)
        low, high = ends(row, "speedup")
        print(
            f"{name:<36} {row['us_p50'] / 1e6:>7.3f} s a layer {row['seconds']:>7.1f} s in all  "
            f"{row['speedup']:>6.2f} times the script's speed ({low:.2f} to {high:.2f})  "
            f"sine {row['sine']:.1e}  residual {row['residual']:.1e}"
        )
    keep(args.out, rows)
    ours = next(row for row in rows if row["provider"] == OURS)
    print(json.dumps({"case": "fit", "speedup": ours["speedup"], "sine": ours["sine"], **about}))
    return 0 if ours["sine"] <= ANGLE else 1


if __name__ == "__main__":
    main(run)
