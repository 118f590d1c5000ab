"""Run everything that needs a GPU in under nine minutes: make gpu, or python -m bench.gpu [--parts ...] [--dry]

The parts, in order:

    kernels                 the kernels' tests
    memcheck, racecheck     compute-sanitizer on every kernel
    models                  the other GPU tests
    op                      the operators' benchmark
    model                   a whole model of Qwen2.5-3B's shapes, prefill and decode, every method captured as a graph
    profile                 a profile of the kernels by ncu
    eval                    the evaluation of the embedded model in every mode
    compiled                only by name: a decoding step of the same model, compiled and captured. It first compiles 36
                            layers for each method
    tune                    only by name: the kernels' launch options one by one
    vllm                    only by name: a strength for each request in vLLM, then every mode's throughput there. It
                            runs in an environment that has vLLM

--parts selects parts by name. Each part has a limit, and the time that it does not use goes to the parts after it.

--dry runs each part up to its first use of the GPU, on any machine, and writes nothing. Tests are collected; for the
rest see `bench.dry`.

Nothing is timed on a device where the kernels' tests fail or memcheck finds an error, so the kernels' tests come before
any timed part. A part that runs out of time counts as failed but does not stop the timing. The other tests do not stop
it either, because the benchmarks check every method themselves. Nor does racecheck, which reports some of the
compiler's own reductions as hazards.

It writes one log, one summary and the rows into $OUT (default bench/results/). Results from before a failure or a
timeout are stored. Returns 1 if a part failed or timed out. A tool that is not installed is named, and its part counts
as not run. That is a failure only of a part that --parts names.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from bench import per_request
from bench.parsing import bench_parser
from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.environment import environment_record
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
TOTAL = 525  # seconds
KERNEL_TESTS = "tests/ops/test_kernels.py"
GATE = "kernels"  # the part that has to run before any timed part
FOUND_ERRORS = 9  # the exit status that compute-sanitizer is told to use for an error
METRICS = (
    *("gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum", "launch__registers_per_thread"),
    *("dram__throughput.avg.pct_of_peak_sustained_elapsed", "sm__throughput.avg.pct_of_peak_sustained_elapsed"),
    *("sm__warps_active.avg.pct_of_peak_sustained_active", "lts__t_sector_hit_rate.pct"),
)


@dataclass(frozen=True)
class Part:
    """A part of the run. at_most: its limit in seconds. reserved: the seconds that earlier parts leave to it."""

    name: str
    at_most: int
    reserved: int
    command: list[str]
    needs: tuple[str, ...] = ()  # modules and programs
    gate: tuple[int, ...] | None = None  # exit statuses that stop the timed parts; () means any but 0
    timed: bool = False  # does not run after a gate has failed
    by_name: bool = False  # runs only if --parts names it
    lacking: Callable[[], str | None] = lambda: None  # what else is missing here, in words


def gpu_tests(tests: Path = ROOT / "tests") -> list[str]:
    """The files of tests that have a GPU test, but for the kernels' own, relative to the working tree.

    Only these are collected: another file may import a package that the machine with the GPU does not have.
    """
    marked = (f for f in sorted(tests.rglob("test_*.py")) if "\n@pytest.mark.gpu" in f.read_text(encoding="utf-8"))
    return [where for f in marked if (where := f.relative_to(tests.parent).as_posix()) != KERNEL_TESTS]


def parts(out: Path) -> list[Part]:
    """All parts, in the order in which they run."""
    python = sys.executable
    tests = [python, "-m", "pytest", "-o", "addopts=", "-m", "gpu", "-q", "-rP", "-o", "faulthandler_timeout=90"]
    if importlib.util.find_spec("xdist"):  # these tests mostly compile, on one core each
        tests += ["-n", "12"]
    sanitize = ["compute-sanitizer", "--error-exitcode", str(FOUND_ERRORS), "--tool"]
    # Ignore what a library's probing of the driver returns, and hazards that are merely possible.
    memcheck, racecheck = ["memcheck", "--report-api-errors", "no"], ["racecheck", "--racecheck-detect-level", "error"]
    smoke = [python, "-m", "bench.smoke"]
    op = [python, "-m", "bench.op", "--device", "cuda", "--rounds", "12", "--out", str(out / "op.json")]
    model = [python, "-m", "bench.model", "--case", "qwen", "--device", "cuda", "--rounds", "12", "--how"]
    graph = [*model, "graph", "--out", str(out / "model.json")]
    compiled = [*model, "compile+graph", "--only", "decode:1:1024", "--methods", "fused,baked"]
    ncu = ["ncu", "--clock-control", "none", "--csv", "--kernel-name", "regex:_project", "--metrics", ",".join(METRICS)]
    evaluation = [python, "-m", "kernel_surgery.eval", "--mode", "all", "--device", "cuda", "--out", str(out / "eval")]
    tune = [python, "-m", "bench.tune", "--out", str(out / "tune.json")]
    vllm = [python, "-m", "bench.per_request", "--out", str(out / "vllm.json")]
    return [
        Part("kernels", 200, 60, [*tests, KERNEL_TESTS], gate=()),
        Part("memcheck", 120, 20, [*sanitize, *memcheck, *smoke], ("compute-sanitizer",), (FOUND_ERRORS,)),
        Part("racecheck", 60, 20, [*sanitize, *racecheck, *smoke], ("compute-sanitizer",)),
        Part("models", 120, 40, [*tests, *gpu_tests()]),
        Part("op", 200, 90, op, timed=True),
        Part("model", 220, 130, graph, timed=True),
        Part("profile", 60, 20, [*ncu, "--log-file", str(out / "profile.csv"), *smoke, "--case", "qwen"], ("ncu",)),
        Part("eval", 60, 30, evaluation, ("py3langid",)),
        Part("compiled", 420, 300, [*compiled, "--out", str(out / "compiled.json")], timed=True, by_name=True),
        Part("tune", 300, 200, tune, timed=True, by_name=True),
        Part("vllm", 420, 300, vllm, timed=True, by_name=True, lacking=per_request.lacking),
    ]


def chosen(every: list[Part], names: str | None) -> list[Part]:
    """The parts to run, in their own order: those named, and the gate if any of them is timed.

    Without names: all parts except those that run only by name. Raises UserError for an unknown name.
    """
    if names is None:
        return [part for part in every if not part.by_name]
    wanted = names.split(",")
    if unknown := [name for name in wanted if name not in {part.name for part in every}]:
        known = ", ".join(part.name for part in every)
        raise UserError(f"--parts: {unknown[0]!r} is not a part; the parts are {known}. Nothing was run.")
    timed = any(part.timed for part in every if part.name in wanted)
    return [part for part in every if part.name in wanted or (timed and part.name == GATE)]


def missing(part: Part) -> str | None:
    """Why a part cannot run here: the first module or program that is not installed, or what its command lacks."""
    absent = next((n for n in part.needs if not shutil.which(n) and importlib.util.find_spec(n) is None), None)
    return f"{absent} is not installed here" if absent else part.lacking()


def run_part(command: list[str], limit: float, log: Path) -> int | str:
    """Run a part and append its output to `log`. Returns its exit status, or a text if it was stopped."""
    # Unbuffered, so that the log has everything a part printed before it hung. The sanitizer cannot see into blocks of
    # PyTorch's allocator, so memory comes from CUDA itself.
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
            for sent in (signal.SIGTERM, signal.SIGKILL):  # the whole process group, with any compilers
                os.killpg(running.pid, sent)
                try:
                    running.wait(timeout=5)
                    break
                except subprocess.TimeoutExpired:
                    pass
            return f"stopped after {limit:.0f} s"


def run_parts(
    selected: list[Part], out: Path, environment: dict, execute: Callable = run_part, named: Collection[str] = ()
) -> int:
    """Run parts one after another into `out`, and write its summary.json after each. Returns 1 if a part failed.

    execute: runs a command, like `run_part`. named: the parts that were asked by name; one that is not run has failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    log.write_text("", encoding="utf-8")
    results: dict[str, dict] = {}
    summary = {"environment": environment, "date": time.strftime("%Y%m%d"), "parts": results}
    end, red, failed = time.monotonic() + TOTAL, None, False
    for part in selected:
        if absent := missing(part):  # known now, so that no time is reserved for it
            results[part.name] = {"status": f"not run: {absent}", "seconds": 0.0}
            print(f"{part.name}: {results[part.name]['status']}")
            failed = failed or part.name in named
    write_atomic(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    waiting = [part for part in selected if part.name not in results]
    while waiting:
        part = waiting.pop(0)
        began, start = time.monotonic(), log.stat().st_size
        limit = min(part.at_most, end - began - sum(later.reserved for later in waiting))
        if part.timed and red:
            status: int | str = f"not run: {red} failed"
            failed = True
        else:
            status = execute(part.command, limit, log)
            failed = failed or status != 0
            if part.gate is not None and isinstance(status, int) and (status in part.gate if part.gate else status):
                red = part.name
        results[part.name] = {"status": status, "seconds": round(time.monotonic() - began, 1)}
        write_atomic(out / "summary.json", json.dumps(summary, indent=2) + "\n")
        with log.open("rb") as file:
            file.seek(start)
            lines = file.read().decode(errors="replace").splitlines()
        # The end of the part's output, for readers who do not have the log.
        print("\n".join(lines[-40:]))
        print(f"{part.name}: status {status}, {results[part.name]['seconds']} s", flush=True)
    print(f"{out}: " + ", ".join(f"{name} {result['status']}" for name, result in results.items()))
    return 1 if failed else 0


def dry_command(part: Part) -> list[str]:
    """The command that runs a part up to its first use of the GPU, without the tool that watches it."""
    python, _, module, *words = part.command[part.command.index("-m") - 1 :]
    if module == "pytest":
        return [python, "-m", module, *words, "--collect-only", *(["-n", "0"] if "-n" in words else [])]
    return [python, "-m", "bench.dry", module, *words]


def run_dry(selected: list[Part], out: Path, execute: Callable = run_part) -> int:
    """Run parts up to their first use of the GPU. Writes nothing. Returns 1 if a part does not get so far.

    Raises UserError if `out` could not be made.
    """
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise UserError(f"{place}: cannot be written to ({error.strerror}). Nothing was run.") from error
    broken = []
    with tempfile.TemporaryDirectory() as folder:
        for part in selected:
            log = Path(folder) / part.name
            status = execute(dry_command(part), 120, log)
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            if status != 0:
                broken.append(part.name)
                print("\n".join(lines[-40:]))
            here = missing(part)
            said = f"{'broken' if status else 'ok'}; {lines[-1].strip('= ')}"
            print(f"{part.name}: {said}" + (f" (here: {here})" if here else ""))
    print(f"dry run: {len(selected) - len(broken)} of {len(selected)} parts ok. Nothing was run on a GPU.")
    return 1 if broken else 0


def parser() -> Parser:
    """The command line."""
    p = bench_parser("gpu", "Run the GPU tests, then the GPU benchmarks.")
    p.add_argument("--parts", help="comma-separated names (default: all but compiled, tune and vllm)")
    p.add_argument("--dry", action="store_true", help="run each part up to its first use of the GPU, on any machine")
    return p


def run(argv: list[str] | None = None) -> int:
    """Run the selected parts into $OUT/DATE-DEVICE/."""
    args = parser().parse_args(argv)
    results = Path(os.environ.get("OUT") or Path("bench") / "results")
    if args.dry:
        with tempfile.TemporaryDirectory() as folder:
            return run_dry(chosen(parts(Path(folder)), args.parts), results)
    import torch

    if not torch.cuda.is_available():
        raise UserError("no CUDA device here: nothing was run and nothing was written.")
    environment = environment_record("cuda")
    name = environment["device"].lower().replace(" ", "-")
    chosen(parts(Path()), args.parts)  # refuses an unknown name before anything is written
    out = results / f"{time.strftime('%Y%m%d')}-{name}"
    named = args.parts.split(",") if args.parts else ()
    return run_parts(chosen(parts(out), args.parts), out, environment, named=named)


if __name__ == "__main__":
    main(run)
