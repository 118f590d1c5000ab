"""What a benchmark keeps: rows of one shape, run after run in one file under bench/results/."""

import json
from pathlib import Path

from kernel_surgery.common.files import write_atomic

# Every row of every benchmark has these; null where a benchmark has no such thing. docs/benchmarks.md says what else.
FIELDS = {
    "bench": "the benchmark: python -m bench.NAME",
    "case": "what of it: an operator, prefill or decode, a quantity that grows",
    "provider": "an implementation that is compared",
    "device": "the processor or the GPU",
    "M": "rows of the activations that are edited, or the texts, prompts or sizes in their place",
    "d": "d_model",
    "k": "rank of the basis",
    "dtype": "of activations and weights",
    "us_p20": "microseconds a call, 20th percentile of the rounds",
    "us_p50": "the median",
    "us_p80": "the 80th percentile",
    "gbps": "GB/s of the bytes that have to be moved at least, over the median",
    "fraction_of_copy": "the same over that of a copy in the same run",
    "error_over_bound": "largest error over the bound of that way of computing; above 1 it is rounded more coarsely",
    "launches": "kernels, copies and fills a call starts on a GPU",
    "cache": "warm or cold",
    "graph": "whether a captured CUDA graph was replayed",
    "torch": "version",
    "triton": "version",
    "commit": "of this project",
    "dirty": "whether its tree had changes that were not committed when the run began",
    "date": "day of the run",
}


def record(bench: str, case: str, provider: str, **known) -> dict:
    """A row with every field, those not given as None, and whatever else is known."""
    return dict.fromkeys(FIELDS) | {"bench": bench, "case": case, "provider": provider} | known


def keep(path: Path | None, rows: list[dict]) -> None:
    """Add the rows of a run to a file, atomically; what it kept of this very run before is replaced. Nothing without a
    path. Rows carry their run (`timing.stamp`)."""
    if path is None or not rows:
        return
    older = [r for r in read(path) if r["run"] != rows[0]["run"]]
    lines = ",\n".join(json.dumps(r) for r in older + rows)
    write_atomic(path, f"[\n{lines}\n]\n")


def read(path: Path) -> list[dict]:
    """Every row of a file; none where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def newest(path: Path) -> list[dict]:
    """The rows of the last run in a file."""
    found = read(path)
    return [r for r in found if r["run"] == found[-1]["run"]]
