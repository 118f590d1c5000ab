"""Time the README's evaluation alone and beside busy processes: python -m bench.busy [--problems 10] [--out FILE]

Beside other work, OpenMP threads that spin while they wait can hold up the very thread they wait for. The evaluation is
run as it is (small models on one thread, threads that sleep while they wait) and as PyTorch alone would run it (a
thread for each core, which spins). Each round times both, alone and beside one busy process per core.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.parsing import bench_parser
from bench.store import keep, record
from bench.timing import interleaved, percentiles, ratio, stamp
from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.progress import progress_bar

OURS, SPINNING = "as it is", "PyTorch's own threads"
ALONE, BESIDE = "alone", "busy"
# At most this many times as long beside one busy process per core. A fair share of the processor is 2 times.
GOAL = 2.5


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep that many processes computing."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()


def environment(how: str) -> dict[str, str]:
    """The environment of a run: without the thread settings of the caller."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "GOMP_"))}
    if how == SPINNING:
        kept |= {"OMP_NUM_THREADS": str(os.cpu_count()), "OMP_WAIT_POLICY": "active"}
    return kept


def seconds(how: str, problems: int) -> float:
    """Seconds of one evaluation in a process of its own. Raises UserError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "kernel_surgery.eval", "--mode", "fused", "--problems", str(problems)]
        began = time.perf_counter()
        made = subprocess.run(
            [*words, "--out", f"{folder}/run"], env=environment(how), capture_output=True, text=True, check=False
        )
        took = time.perf_counter() - began
    if made.returncode:
        raise UserError(f"the evaluation failed: {made.stderr.strip()}")
    return took


def parser() -> Parser:
    """The command line."""
    p = bench_parser("busy", "Time the README's evaluation alone and beside busy processes.")
    p.add_argument("--problems", type=int, default=10, help="problems per category (default 10)")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--processes", type=int, default=os.cpu_count(), help="busy processes (default: one per core)")
    p.add_argument("--out", type=Path, help="JSON file for the rows")
    return p


def run(argv: list[str] | None = None) -> int:
    """Print the table. Returns 1 if the evaluation takes more than GOAL times as long beside busy processes."""
    args = parser().parse_args(argv)
    about, kinds = stamp(None), [(how, load) for how in (OURS, SPINNING) for load in (ALONE, BESIDE)]
    with progress_bar((args.rounds + 1) * len(kinds), "busy", unit="run") as bar:

        def one(how: str, load: str) -> float:
            with busy(args.processes if load == BESIDE else 0):
                return seconds(how, args.problems) * 1e6

        times = interleaved({kind: lambda kind=kind: one(*kind) for kind in kinds}, args.rounds, bar.update)
    rows = []
    for how, load in kinds:
        row = record("busy", load, how, M=args.problems, dtype="float32", cache="warm") | percentiles(times[how, load])
        row |= {"processes": args.processes if load == BESIDE else 0} | ratio(times[how, load], times[how, ALONE])
        rows.append(row | about)
        print(f"{how:<22} {load:<6} {row['us_p50'] / 1e6:>7.1f} s  {row['ratio']:.2f} times alone")
    keep(args.out, rows)
    worst = next(row["ratio"] for row in rows if (row["provider"], row["case"]) == (OURS, BESIDE))
    print(json.dumps({"case": "busy", "ratio": worst, "goal": GOAL, **about}))
    return 0 if worst <= GOAL else 1


if __name__ == "__main__":
    main(run)
