"""Everything that needs a GPU, in one command and under nine minutes: make gpu, or python -m bench.gpu [--parts ...]

In this order: the kernels' tests, compute-sanitizer on every kernel, the other GPU tests; the operators' benchmark; a
whole model of Qwen2.5-3B's shapes, prefill and decode, every provider captured; a profile of the kernels by ncu; eval
on the embedded model in every mode. Each part has a limit, and what it leaves goes to those after it. `--parts` names
some of them, and those that are run by name alone: `compiled`, a decoding step of the same model compiled and captured
(36 layers a provider are compiled first), and `tune`, launch options one by one. Where time is to be taken the kernels'
tests come first in any case.

No time is taken on a device on which the kernels' own tests fail, or memcheck finds an error; a part that ran out of
time has failed and shown neither. What the other tests find, and racecheck, which takes some of a compiler's own
reductions for hazards, does not stop the benchmarks: they check every provider themselves and time no wrong one.

Writes into $OUT (default bench/results/): one log, one summary, and the rows; what was found before a part failed or
ran out of time is kept. Returns 1 if one did. A tool that is not installed is named, and is no failure.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.parsing import bench_parser
from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.environment import environment_record
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.files import write_atomic

TOTAL = 525  # seconds
GATE = "kernels"  # the part without which no time is taken
FOUND_ERRORS = 9  # compute-sanitizer's status where a kernel is wrong, as told by us
METRICS = (
    *("gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum", "launch__registers_per_thread"),
    *("dram__throughput.avg.pct_of_peak_sustained_elapsed", "sm__throughput.avg.pct_of_peak_sustained_elapsed"),
    *("sm__warps_active.avg.pct_of_peak_sustained_active", "lts__t_sector_hit_rate.pct"),
)


@dataclass(frozen=True)
class Part:
    """A part of the run: at most so many seconds, of which so many are kept for it whatever comes before."""

    name: str
    at_most: int
    kept: int
    command: list[str]
    needs: tuple[str, ...] = ()  # modules and programs
    gate: tuple[int, ...] | None = None  # exit statuses with which nothing is timed; () for any but 0
    timed: bool = False
    by_name: bool = False  # run where --parts names it, and only there


def parts(out: Path) -> list[Part]:
    """Everything that is run, in order."""
    python = sys.executable
    tests = [python, "-m", "pytest", "-m", "gpu", "-q", "-rP", "-o", "faulthandler_timeout=90"]
    if importlib.util.find_spec("xdist"):  # most of these tests' time is compiling, on one core each
        tests += ["-n", "6"]
    kernels = "tests/test_project_kernel.py"
    sanitize = ["compute-sanitizer", "--error-exitcode", str(FOUND_ERRORS), "--tool"]
    # Not what a library's probing of the driver returns, and no hazards that are only possible.
    memcheck, racecheck = ["memcheck", "--report-api-errors", "no"], ["racecheck", "--racecheck-detect-level", "error"]
    smoke = [python, "-m", "bench.smoke"]
    op = [python, "-m", "bench.op", "--device", "cuda", "--rounds", "12", "--out", str(out / "op.json")]
    model = [python, "-m", "bench.model", "--case", "qwen", "--device", "cuda", "--rounds", "12", "--how"]
    graph = [*model, "graph", "--out", str(out / "model.json")]
    compiled = [*model, "compile+graph", "--only", "decode:1:1024", "--methods", "fused,baked"]
    ncu = ["ncu", "--clock-control", "none", "--csv", "--kernel-name", "regex:_project", "--metrics", ",".join(METRICS)]
    evaluation = [python, "-m", "kernel_surgery.eval", "--mode", "all", "--device", "cuda", "--out", str(out / "eval")]
    tune = [python, "-m", "bench.tune", "--out", str(out / "tune.json")]
    return [
        Part("kernels", 200, 60, [*tests, kernels], gate=()),
        Part("memcheck", 60, 20, [*sanitize, *memcheck, *smoke], ("compute-sanitizer",), (FOUND_ERRORS,)),
        Part("racecheck", 60, 20, [*sanitize, *racecheck, *smoke], ("compute-sanitizer",)),
        Part("models", 120, 40, [*tests, "--ignore", kernels]),
        Part("op", 200, 90, op, timed=True),
        Part("model", 220, 130, graph, timed=True),
        Part("profile", 60, 20, [*ncu, "--log-file", str(out / "profile.csv"), *smoke, "--case", "qwen"], ("ncu",)),
        Part("eval", 60, 30, evaluation, ("py3langid",)),
        Part("compiled", 420, 300, [*compiled, "--out", str(out / "compiled.json")], timed=True, by_name=True),
        Part("tune", 300, 200, tune, timed=True, by_name=True),
    ]


def chosen(every: list[Part], names: str | None) -> list[Part]:
    """The parts that are run, in their own order: those named, and before any time is taken the gate. Without names
    all but those that are run by name alone. Raises UserError for a name that is none."""
    if names is None:
        return [part for part in every if not part.by_name]
    wanted = names.split(",")
    if unknown := [name for name in wanted if name not in {part.name for part in every}]:
        known = ", ".join(part.name for part in every)
        raise UserError(f"--parts: {unknown[0]!r} is no part; there are {known}. Nothing was run.")
    timed = any(part.timed for part in every if part.name in wanted)
    return [part for part in every if part.name in wanted or (timed and part.name == GATE)]


def missing(part: Part) -> str | None:
    """The first thing that a part needs and that is not here."""
    return next((n for n in part.needs if not shutil.which(n) and importlib.util.find_spec(n) is None), None)


def run_part(command: list[str], limit: float, log: Path) -> int | str:
    """A part's exit status, or that it was stopped. Its output, as it comes, goes to the end of `log`."""
    # Unbuffered: what a part said before it hung is what one needs to know. Memory is asked of CUDA itself under a
    # sanitizer, which sees nothing of an allocator's own blocks.
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if command[0] == "compute-sanitizer":
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n== {' '.join(command)}\n")
        file.flush()
        running = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            return running.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            for sent in (signal.SIGTERM, signal.SIGKILL):  # the whole session: compilers run beside it
                os.killpg(running.pid, sent)
                try:
                    running.wait(timeout=5)
                    break
                except subprocess.TimeoutExpired:
                    pass
            return f"stopped after {limit:.0f} s"


def parser() -> Parser:
    """The command line."""
    p = bench_parser("gpu", "Run the GPU tests, then the GPU benchmarks.")
    p.add_argument("--parts", help="comma-separated, see above (default: all but compiled and tune)")
    return p


def run(argv: list[str] | None = None) -> int:
    """Run the parts one after another; a summary goes to $OUT/DATE-DEVICE/summary.json after each."""
    args = parser().parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        raise UserError("no CUDA device here: nothing was run and nothing was written.")
    environment = environment_record("cuda")
    stamp = time.strftime("%Y%m%d")
    name = environment["device"].lower().replace(" ", "-")
    every = parts(Path())  # a name that is none is refused before anything is written
    chosen(every, args.parts)
    out = Path(os.environ.get("OUT") or Path("bench") / "results") / f"{stamp}-{name}"
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    log.write_text("", encoding="utf-8")
    summary = {"environment": environment, "date": stamp, "parts": {}}
    end, red, failed = time.monotonic() + TOTAL, None, False
    waiting = chosen(parts(out), args.parts)
    for part in waiting:
        if absent := missing(part):  # known now, so that nothing is kept for it
            summary["parts"][part.name] = {"status": f"not run: {absent} is not installed here", "seconds": 0.0}
            print(f"{part.name}: {summary['parts'][part.name]['status']}")
    waiting = [part for part in waiting if part.name not in summary["parts"]]
    while waiting:
        part = waiting.pop(0)
        began, at = time.monotonic(), log.stat().st_size
        limit = min(part.at_most, end - began - sum(later.kept for later in waiting))
        if part.timed and red:
            status: int | str = f"not run: {red} is red"
            failed = True
        else:
            status = run_part(part.command, limit, log)
            failed = failed or status != 0
            if part.gate is not None and isinstance(status, int) and (status in part.gate if part.gate else status):
                red = part.name
        summary["parts"][part.name] = {"status": status, "seconds": round(time.monotonic() - began, 1)}
        write_atomic(out / "summary.json", json.dumps(summary, indent=2) + "\n")
        with log.open("rb") as file:
            file.seek(at)
            said = file.read().decode(errors="replace").splitlines()
        # The end of what it said, for whoever sees this command's output alone.
        print("\n".join(said[-40:]))
        print(f"{part.name}: status {status}, {summary['parts'][part.name]['seconds']} s", flush=True)
    print(f"{out}: " + ", ".join(f"{name} {part['status']}" for name, part in summary["parts"].items()))
    return 1 if failed else 0


if __name__ == "__main__":
    main(run)
