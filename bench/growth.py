"""How time and memory grow with the work: python -m bench.growth [--out FILE]

One quantity at a time doubles and everything else stays; the slope of a least-squares line through the logarithms is
printed with its standard error: 1 means twice the work takes twice the time. Peak memory is what the process held
beyond its start (anonymous pages, from the kernel's account), its slope beside it. A quantity that the edit does not
depend on shows a slope near 0.

    tokens, d, k    `project` on [tokens, d] float32 with a basis of rank k
    layers          `fused` over so many edited layers: what the hooks and replaced layers themselves cost, per pass
    problems        `fit` of one layer from so many problems
    languages       `fit` of one layer from so many languages
    checkpoint      `bake` of so many layers at d_model 512, from disk to disk
"""

import argparse
import contextlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.timing import stamp
from kernel_surgery import cli

SIZES = {
    "tokens": (256, 512, 1024, 2048, 4096),
    "d": (512, 1024, 2048, 4096, 8192),
    "k": (4, 8, 16, 32, 64),
    "layers": (2, 4, 8, 16),
    "problems": (25, 50, 100, 200, 400),
    "languages": (2, 4, 8, 16),
    "checkpoint": (4, 8, 16, 32),
}
# What the work is proportional to, and why; the slope is held against it by eye, not by a test.
EXPECTED = {
    "tokens": "1: every row is read and written once",
    "d": "1",
    "k": "0 to 1: two thin products beside reading x, which does not grow",
    "layers": "1",
    "problems": "2 to 3 until rows outnumber d_model: a Gram matrix of the rows and its eigenvectors; then 1",
    "languages": "2 to 3: rows are problems x (languages - 1)",
    "checkpoint": "1; memory 0: one tensor at a time",
}


def anonymous() -> int:
    """Anonymous memory of this process in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def peak_of(call: Callable[[], object]) -> int:
    """The most anonymous memory that a call held beyond what was there before, sampled every millisecond."""
    import ctypes
    import threading

    # What freed tensors left with the C library would hide what is taken again.
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


def made(what: str, size: int, folder: Path) -> Callable[[], object]:
    """A call that does so much work."""
    import torch

    from bench import fit as fitting
    from kernel_surgery import fused
    from kernel_surgery.fit import language_rows, principal_basis
    from kernel_surgery.ops import project

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
    from bench.checkpoint import make_source
    from kernel_surgery.checkpoint import bake_checkpoint
    from kernel_surgery.subspace import Subspace

    source = folder / str(size) / "source"
    source.parent.mkdir()
    wide = {"hidden_size": 512, "intermediate_size": 8192, "num_attention_heads": 4, "num_key_value_heads": 1}
    make_source(source, size, **wide, vocab_size=512)
    space = Subspace.load(source.with_name("subspace.safetensors"))

    def bake():
        shutil.rmtree(source.with_name("baked"), ignore_errors=True)
        bake_checkpoint(source, space, source.with_name("baked"))

    return bake


LITTLE = {
    **{"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2, "num_key_value_heads": 1},
    **{"vocab_size": 512},
}


def slope(sizes, values) -> tuple[float, float]:
    """(slope, its standard error) of log(value) over log(size)."""
    from scipy.stats import linregress

    line = linregress([math.log(s) for s in sizes], [math.log(v) for v in values])
    return float(line.slope), float(line.stderr)


def measure(what: str, rounds: int, folder: Path, advance: Callable[[int], None]) -> Iterator[dict]:
    """A row for every size: the fastest of so many rounds, and the most memory of one more."""
    for size in SIZES[what]:
        call = made(what, size, folder)
        call()
        times = []
        for _ in range(rounds):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        yield {"case": what, "size": size, "seconds": min(times), "peak_bytes": peak_of(call)}
        advance(1)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(prog="python -m bench.growth", description="Fit how time and memory grow with the work.")
    p.add_argument("--what", help=f"comma-separated (default: all of {', '.join(SIZES)})")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--out", type=Path, help="JSON file for the rows")
    return p


def run(argv: list[str] | None = None) -> int:
    """Print every size, then the slopes."""
    args = parser().parse_args(argv)
    chosen = args.what.split(",") if args.what else list(SIZES)
    if unknown := [name for name in chosen if name not in SIZES]:
        raise cli.UserError(f"unknown quantity {unknown[0]!r}; known: {', '.join(SIZES)}. Nothing was run.")
    about = stamp()
    rows = []
    with (
        tempfile.TemporaryDirectory() as name,
        cli.bar(sum(len(SIZES[what]) for what in chosen), "growth", unit="size") as bar,
    ):
        for what in chosen:
            found = list(measure(what, args.rounds, Path(name), bar.update))
            sizes = [row["size"] for row in found]
            rate, error = slope(sizes, [row["seconds"] for row in found])
            # Below a megabyte the kernel's account says nothing, and two sizes make no slope.
            told = [(row["size"], row["peak_bytes"]) for row in found if row["peak_bytes"] > 2**20]
            memory = slope(*zip(*told, strict=True))[0] if len(told) > 2 else None
            taken = "  ".join(f"{row['size']}: {row['seconds'] * 1e3:.1f} ms" for row in found)
            bar.write(f"{what:<11} {taken}")
            said = f"at most {max(row['peak_bytes'] for row in found) / 1e6:.0f} MB"
            said += "" if memory is None else f", slope {memory:.2f}"
            bar.write(f"{'':<11} slope {rate:.2f} (s.e. {error:.2f}); expected {EXPECTED[what]}; memory {said}")
            more = {"expected": EXPECTED[what]}
            rows += [row | more | {"slope": rate, "slope_se": error, "memory_slope": memory} | about for row in found]
    if args.out:
        cli.write_atomic(args.out, json.dumps(rows, indent=1) + "\n")
    print(json.dumps({"case": "growth", "slopes": {row["case"]: round(row["slope"], 3) for row in rows}, **about}))
    return 0


if __name__ == "__main__":
    cli.main(run)
