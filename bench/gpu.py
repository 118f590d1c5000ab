"""Everything that needs a GPU, in one command and under nine minutes: make gpu, or python -m bench.gpu

In this order, each part with its own time limit: the GPU tests; the operators' benchmark; a whole model of
Qwen2.5-3B's shapes, prefill and decode, every provider captured; eval on the embedded model in every mode. Writes into
$OUT (default bench/results/) and returns 1 if any part failed or ran out of time; what the others found is kept. No
time is taken on a device on which the tests fail.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from kernel_surgery import cli


def parts(out: Path) -> list[tuple[str, int, list[str]]]:
    """(name, limit in seconds, command) of each part."""
    python = sys.executable
    return [
        ("tests", 230, [python, "-m", "pytest", "-m", "gpu", "-q", "-s"]),
        ("op", 120, [python, "-m", "bench.op", "--device", "cuda", "--out", str(out / "op.json")]),
        (
            "model",
            140,
            [
                *(python, "-m", "bench.model", "--case", "qwen", "--device", "cuda", "--how", "graph", "--rounds", "8"),
                *("--out", str(out / "model.json")),
            ],
        ),
        (
            "eval",
            45,
            [python, "-m", "kernel_surgery.eval", "--mode", "all", "--device", "cuda", "--out", str(out / "eval")],
        ),
    ]


def run_part(name: str, limit: int, command: list[str], log: Path) -> int | str:
    """A part's exit status, or why it has none. Its output goes to `log`."""
    if name == "eval" and importlib.util.find_spec("py3langid") is None:
        return "not run: py3langid is not installed here"
    with log.open("w", encoding="utf-8") as file:
        try:
            return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            return f"stopped after {limit} s"


def run(argv: list[str] | None = None) -> int:
    """Run the parts one after another; a summary goes to $OUT/summary.json."""
    parser = cli.Parser(prog="python -m bench.gpu", description="Run the GPU tests, then the GPU benchmarks.")
    parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        raise cli.UserError("no CUDA device here: nothing was run and nothing was written.")
    environment = cli.environment("cuda")
    stamp = time.strftime("%Y%m%d")
    name = environment["device"].lower().replace(" ", "-")
    out = Path(os.environ.get("OUT") or Path("bench") / "results") / f"{stamp}-{name}"
    out.mkdir(parents=True, exist_ok=True)
    summary = {"environment": environment, "date": stamp, "parts": {}}
    for part, limit, command in parts(out):
        began = time.monotonic()
        if part != "tests" and summary["parts"]["tests"]["status"] != 0:
            status = "not run: the tests are red"
        else:
            status = run_part(part, limit, command, out / f"{part}.txt")
        summary["parts"][part] = {"status": status, "seconds": round(time.monotonic() - began, 1)}
        cli.write_atomic(out / "summary.json", json.dumps(summary, indent=2) + "\n")
        print(f"{part}: status {status}, {summary['parts'][part]['seconds']} s, {out / part}.txt", flush=True)
        if part in ("tests", "op", "model") and (out / f"{part}.txt").exists():
            # The end of the table, for whoever sees this command's output alone.
            print("\n".join((out / f"{part}.txt").read_text(encoding="utf-8").splitlines()[-60:]), flush=True)
    return 0 if all(p["status"] == 0 for p in summary["parts"].values()) else 1


if __name__ == "__main__":
    cli.main(run)
