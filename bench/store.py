"""The rows that benchmarks keep under bench/results/. Every row has the same fields, and a file holds run after run."""

import json
from pathlib import Path

from kernel_surgery.common.files import write_atomic

# Every row of every benchmark has these, None where a field does not apply. Rows may have more fields.
FIELDS = {
    "bench": "the benchmark: `python -m bench.NAME`",
    "case": "what is measured: an operator, prefill or decode, or the quantity that grows",
    "provider": "the method: one of the implementations that are compared",
    "device": "the processor or the GPU",
    "M": "rows of the edited activations; elsewhere the number of texts or prompts, or the size",
    "d": "d_model",
    "k": "rank of the basis",
    "dtype": "of activations and weights",
    "us_p20": "microseconds per call, 20th percentile of the rounds",
    "us_p50": "the median",
    "us_p80": "the 80th percentile",
    "gbps": "GB/s: the fewest bytes that have to be moved, over the median time",
    "fraction_of_copy": "`gbps` over that of a copy in the same run",
    "error_over_bound": "largest error over the bound for the way the method computes; above 1 it rounds more coarsely",
    "launches": "kernels, copies and fills that one call starts on a GPU",
    "cache": "warm or cold",
    "graph": "whether a captured CUDA graph was replayed",
    "torch": "version",
    "triton": "version",
    "commit": "of this project",
    "dirty": "whether the working tree had uncommitted changes when the run began",
    "date": "day of the run",
}
# {old name of a benchmark: its name today}. A file keeps the name of its day; `read` returns the name of today.
RENAMED = {"counted": "opcount"}


def record(bench: str, case: str, provider: str, **values) -> dict:
    """A row with every field, None where no value is given, and any other value that is given."""
    return dict.fromkeys(FIELDS) | {"bench": bench, "case": case, "provider": provider} | values


def keep(path: Path | None, rows: list[dict]) -> None:
    """Add the rows of a run to a file, atomically, and replace rows that the file already has of this run.

    Does nothing without a path or without rows. Rows name their run (`timing.stamp`).
    """
    if path is None or not rows:
        return
    older = [r for r in _stored(path) if r["run"] != rows[0]["run"]]
    lines = ",\n".join(json.dumps(r) for r in older + rows)
    write_atomic(path, f"[\n{lines}\n]\n")


def read(path: Path) -> list[dict]:
    """Every row of a file, under today's names of benchmarks. Empty if there is no file."""
    return [_today(row) for row in _stored(path)]


def newest(path: Path) -> list[dict]:
    """The rows of the last run in a file."""
    rows = read(path)
    return [r for r in rows if r["run"] == rows[-1]["run"]]


def _stored(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def _today(row: dict) -> dict:
    name = RENAMED.get(row.get("bench"))
    if name is None:
        return row
    command = row.get("command") and row["command"].replace(f"bench.{row['bench']}", f"bench.{name}", 1)
    return row | {"bench": name, "command": command}
