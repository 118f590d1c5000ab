"""Measure how time and memory grow with the work: python -m bench.growth [--out FILE]

One quantity doubles while the others stay fixed:

    tokens, d, k    `project` on [tokens, d] float32 with a basis of rank k
    layers          one pass of a model with N layers edited by `fused`: the cost of the hooks and replaced layers
    problems        `fit` of one layer from N problems
    languages       `fit` of one layer from N languages
    moments         `Moments.add` of 2048 tokens at width N: `collect --pool tokens` of one layer
    oblique         `fit --method oblique` of one layer at width N, from its moments
    checkpoint      `bake` of N layers at d_model 512, from disk to disk

The slope is that of a least-squares line through the logarithms: at 1, twice the work takes twice the time. Its 95%
interval is Student's, with two degrees of freedom fewer than there are sizes. The expected slope and its reason are
printed first. The output says so if the interval excludes the expected slope. All sizes of a quantity are in one
regime: a product that fits into a cache grows differently from one that does not.

Times are medians over rounds. Each round runs every size once, in changing order. Peak memory is the growth of the
process's anonymous pages during a call, from the kernel's account.
"""

import contextlib
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.parsing import bench_parser
from bench.store import keep, record
from bench.timing import interleaved, percentiles, stamp, steady_memory
from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.progress import progress_bar

SIZES = {
    "tokens": (1024, 2048, 4096, 8192, 16384),
    "d": (2048, 4096, 8192, 16384, 32768),
    "k": (4, 8, 16, 32, 64),
    "layers": (2, 4, 8, 16, 32),
    "problems": (25, 50, 100, 200),
    "languages": (2, 4, 8, 16),
    "moments": (512, 1024, 2048, 4096),
    "oblique": (512, 1024, 2048, 4096),
    "checkpoint": (4, 8, 16, 32),
}
# {quantity: ((lowest, highest) expected slope of time, why)}
EXPECTED = {
    "tokens": ((1, 1), "every row is read and written once"),
    "d": ((1, 1), "every column is read and written once"),
    "k": ((0, 1), "two thin products, and reading x, which does not grow"),
    "layers": ((1, 1), "one edit per layer"),
    "problems": ((2, 3), "a Gram matrix of fewer rows than d_model, and its eigenvectors"),
    "languages": ((2, 3), "as above: there are problems x (languages - 1) rows"),
    "moments": ((1, 2), "one float64 product of [d, tokens] and [tokens, d], and a pass over the tokens"),
    "oblique": ((2, 3), "the eigenvectors of a [d, d] matrix, and passes over it"),
    "checkpoint": ((1, 1), "every byte is read, hashed and written once; memory 0: one tensor at a time"),
}


def anonymous() -> int:
    """Anonymous memory of this process in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def peak_of(call: Callable[[], object]) -> int:
    """The peak growth of anonymous memory during a call, sampled every millisecond."""
    import ctypes
    import threading

    # Freed memory that the C library still holds would hide new allocations.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    before, most, done = anonymous(), 0, threading.Event()

    def watch():
        nonlocal most
        while not done.wait(0.001):
            most = max(most, anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return most


def workload(what: str, size: int, folder: Path) -> Callable[[], object]:
    """A function that does the work of one size of a quantity."""
    import torch

    from bench import fit as fitting
    from kernel_surgery import fused
    from kernel_surgery.ops.library import project
    from kernel_surgery.subspace.fitting import language_rows, principal_basis

    generator = torch.Generator().manual_seed(size)
    if what in ("tokens", "d", "k"):
        rows, d, k = ({"tokens": 1024, "d": 2048, "k": 16} | {what: size}).values()
        x = torch.randn(rows, d, generator=generator)
        u = torch.linalg.qr(torch.randn(d, k, generator=generator))[0].contiguous()
        return lambda: [project(x, u) for _ in range(8)]
    if what == "layers":
        from bench.shapes import random_bases, random_model

        model = random_model(torch.float32, "cpu", num_hidden_layers=size, **LITTLE)
        bases, ids = random_bases(model, 8, range(size)), torch.arange(32)[None]

        def run():
            with fused(model, bases), torch.no_grad():
                for _ in range(4):
                    model(input_ids=ids, use_cache=False)

        return run
    if what in ("problems", "languages"):
        problems, languages = ({"problems": 100, "languages": 7} | {what: size}).values()
        x = fitting.activations(0, 2048, problems=problems, languages=languages)
        return lambda: principal_basis(language_rows(x, "deviations"), min(8, languages))
    if what in ("moments", "oblique"):
        return of_moments(what, size)
    from bench.checkpoint import make_source
    from kernel_surgery.checkpoint.baking import bake_checkpoint
    from kernel_surgery.subspace.artifact import Subspace

    source = folder / str(size) / "source"
    source.parent.mkdir()
    wide = {"hidden_size": 512, "intermediate_size": 8192, "num_attention_heads": 4, "num_key_value_heads": 1}
    make_source(source, size, **wide, vocab_size=512)
    space = Subspace.load(source.with_name("subspace.safetensors"))

    def bake():
        shutil.rmtree(source.with_name("baked"), ignore_errors=True)
        bake_checkpoint(source, space, source.with_name("baked"))

    return bake


def of_moments(what: str, d: int) -> Callable[[], object]:
    """A function that adds TOKENS activations of width d to a layer's moments, or fits the oblique edit to them."""
    import torch

    from kernel_surgery.subspace.erasing import erasing_edit
    from kernel_surgery.subspace.moments import Moments

    generator = torch.Generator().manual_seed(d)
    x, labels = torch.randn(TOKENS, d, generator=generator), torch.arange(TOKENS) % 7
    moments = Moments.empty(7, d)
    if what == "moments":
        return lambda: moments.add(x, labels)
    # Languages must differ. The shrinkage gives every direction a variance, so all of them are used.
    moments.add(x + torch.randn(7, d, generator=generator)[labels], labels)
    return lambda: erasing_edit(moments)


TOKENS = 2048  # of "moments" and "oblique"
LITTLE = {
    **{"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2, "num_key_value_heads": 1},
    **{"vocab_size": 512},
}


def slope(sizes, values) -> tuple[float, float]:
    """(slope, half-width of its 95% interval) of log(value) over log(size), for at least three sizes."""
    from scipy.stats import linregress, t

    line = linregress([math.log(s) for s in sizes], [math.log(v) for v in values])
    return float(line.slope), float(line.stderr * t.ppf(0.975, len(sizes) - 2))


def as_expected(what: str, rate: float, half: float) -> bool:
    """Whether the interval of a slope overlaps the expected range."""
    (least, most), _ = EXPECTED[what]
    return rate - half <= most and rate + half >= least


def measure(what: str, rounds: int, folder: Path, advance: Callable[[int], None]) -> list[dict]:
    """One row for each size of a quantity."""
    calls = {str(size): workload(what, size, folder) for size in SIZES[what]}

    cpu: dict[str, list[float]] = {name: [] for name in calls}

    def timed(name: str) -> float:
        began, busy = time.perf_counter(), time.process_time()
        calls[name]()
        cpu[name].append((time.process_time() - busy) * 1e6)
        return (time.perf_counter() - began) * 1e6

    times = interleaved({name: lambda name=name: timed(name) for name in calls}, rounds, advance)
    # The fixed sizes. None if they do not apply to the quantity.
    about = {"M": 1024, "d": 2048, "k": 16, "dtype": "float32"}
    if what not in ("tokens", "d", "k"):
        about |= {"M": None, "k": None, "d": {"layers": LITTLE["hidden_size"], "checkpoint": 512}.get(what, 2048)}
    if what in ("moments", "oblique"):
        about |= {"M": TOKENS, "dtype": "float64"}
    if what == "checkpoint":
        about["dtype"] = "bfloat16"
    grows, rows = {"tokens": "M", "k": "k"}.get(what, "d" if what in ("d", "moments", "oblique") else None), []
    for size, (name, call) in zip(SIZES[what], calls.items(), strict=True):
        sample = percentiles(times[name]) | {"size": size, "peak_bytes": peak_of(call)}
        sample["cpu_us_p50"] = statistics.median(cpu[name][1:])  # the first round is discarded
        known = about | ({grows: size} if grows else {})
        rows.append(record("growth", what, "kernel_surgery", **known, cache="warm") | sample)
    return rows


def parser() -> Parser:
    """The command line."""
    p = bench_parser("growth", "Measure how time and memory grow with the work.")
    p.add_argument("--what", help=f"comma-separated quantities (default: all of {', '.join(SIZES)})")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--out", type=Path, help="JSON file for the rows")
    return p


def run(argv: list[str] | None = None) -> int:
    """Print the times of every size, then the slopes."""
    args = parser().parse_args(argv)
    chosen = args.what.split(",") if args.what else list(SIZES)
    if unknown := [name for name in chosen if name not in SIZES]:
        raise UserError(f"unknown quantity {unknown[0]!r}; known: {', '.join(SIZES)}. Nothing was run.")
    about, rows = stamp(), []
    steady_memory()
    total = sum(len(SIZES[what]) for what in chosen) * (args.rounds + 1)
    with tempfile.TemporaryDirectory() as name, progress_bar(total, "growth", unit="call") as bar:
        for what in chosen:
            (least, most), why = EXPECTED[what]
            expected = f"{least:g}" if least == most else f"{least:g} to {most:g}"
            bar.write(f"{what:<11} expected slope {expected}: {why}")
            measured = measure(what, args.rounds, Path(name), bar.update)
            rate, half = slope([row["size"] for row in measured], [row["us_p50"] for row in measured])
            # The kernel's account is too coarse below a megabyte, and a slope needs three sizes.
            points = [(row["size"], row["peak_bytes"]) for row in measured if row["peak_bytes"] > 2**20]
            memory = slope(*zip(*points, strict=True))[0] if len(points) > 2 else None
            bar.write(" " * 12 + "  ".join(f"{row['size']}: {row['us_p50'] / 1e3:.1f} ms" for row in measured))
            said = "" if as_expected(what, rate, half) else ", not as expected"
            held = f"at most {max(row['peak_bytes'] for row in measured) / 1e6:.0f} MB"
            held += "" if memory is None else f", slope {memory:.2f}"
            bar.write(f"{'':<11} slope {rate:.2f} ({rate - half:.2f} to {rate + half:.2f}){said}; memory {held}")
            more = {"expected": [least, most], "why": why, "slope": rate, "slope_ci95": [rate - half, rate + half]}
            more |= {"memory_slope": memory, "rounds": args.rounds}
            rows += [row | more | about for row in measured]
            keep(args.out, rows)
    print(json.dumps({"case": "growth", "slopes": {row["case"]: round(row["slope"], 3) for row in rows}, **about}))
    return 0


if __name__ == "__main__":
    main(run)
