"""How every benchmark times: in interleaved rounds, with the original measured twice to give the noise.

Every round runs each method once. The order changes from round to round, so that drift of the machine affects all
methods alike. The results are the median time with the 20th and 80th percentiles, and a ratio: the median over rounds
of a method's time over the original's in the same round, with a 95% interval by order statistics. The original runs
twice per round. The second one has its own copies of the weights that other methods edit. The distance from 1 to the
far end of its interval is the noise. A ratio within the noise means nothing.
"""

import contextlib
import ctypes
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from kernel_surgery.common.environment import environment_record, version

NOISE = "original again"


def machine() -> str:
    """Cores, torch's threads, memory and Python version: a time depends on these too."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    threads = torch.get_num_threads()
    return f"{os.cpu_count()} cores, {threads} threads, {memory:.0f} GiB, Python {platform.python_version()}"


def command() -> str:
    """The command line of this process, without the folders and files in it."""
    words, named = iter(sys.argv[1:]), []
    for word in words:
        if word in ("--out", "--folder"):
            next(words, None)
        else:
            named.append(word)
    name = os.path.basename(sys.argv[0]).removesuffix(".py")
    return " ".join(["python -m bench" + ("" if name == "__main__" else f".{name}"), *named])


def stamp(device=None, *beside: str) -> dict:
    """Where and when rows are measured: versions, commit, device, machine, command, date, run.

    beside: further packages whose versions belong in the rows. Call it before measuring starts, since the working tree
    may change during the run.
    """
    environment = environment_record(device)
    values = {key: environment[key] for key in ("torch", "triton", "transformers", "commit", "dirty", "device")}
    values |= {name: version(name) for name in beside} | {"machine": machine(), "command": command()}
    return values | {"date": time.strftime("%Y-%m-%d"), "run": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def steady_memory() -> None:
    """Let the C library reuse freed memory, as a serving process does. Works with glibc, does nothing elsewhere.

    By default glibc returns every tensor of some megabytes to the kernel, which fills the pages with zeros at the next
    use. At 1024 x 2048 float32 this took twenty times as long as the copy itself.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(-4, 0)  # M_MMAP_MAX: no separate mapping for a large block
        library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: return nothing to the kernel


def graphed(call: Callable, times: int = 1, before: Callable[[], None] = lambda: None) -> Callable:
    """Capture `times` calls as one CUDA graph. The returned function replays it and returns the last call's result.

    before: runs before each warm-up call and before the capture.
    """
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            before()
            call()
        before()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            out = call()

    def replay():
        graph.replay()
        return out

    return replay


class Timer:
    """Measures microseconds per call.

    how, on CUDA: "launched" by the host, whose own time dominates if there is little work; "graph", replayed without
    the host; "cold", launched after the L2 cache has been overwritten. The first two have a warm cache. A CPU has only
    "launched".
    """

    def __init__(self, device, inner: int):
        import torch

        self.cuda, self.inner, self.replays = device.type == "cuda", inner, {}
        # Three times the L2 cache, overwritten before each cold call.
        size = 3 * torch.cuda.get_device_properties(device).L2_cache_size if self.cuda else 0
        self.scratch = torch.empty(size, dtype=torch.int8, device=device)
        if not self.cuda:
            steady_memory()

    def ways(self) -> tuple[str, ...]:
        return ("launched", "graph", "cold") if self.cuda else ("launched",)

    def once(self, call: Callable, how: str, key) -> float:
        if not self.cuda:
            began = time.perf_counter()
            for _ in range(self.inner):
                call()
            return (time.perf_counter() - began) * 1e6 / self.inner
        import torch

        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if how == "cold":
            self.scratch.zero_()
            torch.cuda._sleep(2_000_000)  # about a millisecond, in which the host launches the call
            start.record()
            call()
            times = 1
        elif how == "graph":
            if key not in self.replays:
                self.replays[key] = graphed(call, self.inner)
            start.record()
            self.replays[key]()
            times = self.inner
        else:
            start.record()
            for _ in range(self.inner):
                call()
            times = self.inner
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / times


def copy_bandwidth(device) -> float:
    """GB/s of copying a tensor much larger than the cache: bytes read plus bytes written."""
    import torch

    size = 2**30 if device.type == "cuda" else 2**27
    source, target = (torch.zeros(size, dtype=torch.int8, device=device) for _ in range(2))
    timer = Timer(device, 3)
    times = [timer.once(lambda: target.copy_(source), "launched", "copy") for _ in range(6)]
    return 2 * size / statistics.median(times[1:]) / 1e3


def launches(call: Callable) -> int | None:
    """How many kernels, copies and fills one call starts on the GPU. None if the profiler sees nothing."""
    import torch

    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        call()
        torch.cuda.synchronize()
    events = profile.key_averages()
    return sum(event.count for event in events if event.device_type == torch.autograd.DeviceType.CUDA) or None


def interleaved(
    calls: Mapping[str, Callable[[], float]], rounds: int, advance: Callable[[int], None] = lambda done: None
) -> dict[str, list[float]]:
    """{name: one time per round}. Each call measures and returns its own time. The first round is discarded."""
    order, shuffle = list(calls), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in order:
            microseconds = calls[name]()
            if number:
                times[name].append(microseconds)
            advance(1)
        shuffle.shuffle(order)
    return times


def percentiles(sample: Sequence[float]) -> dict[str, float]:
    """{"us_p20", "us_p50", "us_p80"} of a sample of times."""
    ordered = sorted(sample)
    values = {f"us_p{p}": ordered[round(p / 100 * (len(ordered) - 1))] for p in (20, 80)}
    return values | {"us_p50": statistics.median(ordered)}


def ratio(sample: Sequence[float], base: Sequence[float], name: str = "ratio") -> dict:
    """{"ratio", "ratio_ci95", "ratio_range"} of times from the same rounds; `name` replaces "ratio" in the keys.

    The ratio is the median of the rounds' ratios, with its interval by order statistics (None for fewer than six
    rounds). The range is the smallest and the largest ratio.
    """
    import numpy as np
    from scipy.stats import quantile_test

    each = np.asarray(sample) / np.asarray(base)
    values = {name: float(np.median(each)), f"{name}_range": [float(each.min()), float(each.max())]}
    if len(each) < 6:
        # With fewer than six rounds no interval covers the median with 95% probability. The whole range of three
        # rounds covers it with 75%.
        return values | {f"{name}_ci95": None}
    interval = quantile_test(each, p=0.5).confidence_interval(0.95)
    return values | {f"{name}_ci95": [float(interval.low), float(interval.high)]}


def ends(row: Mapping, name: str = "ratio") -> tuple[float, float]:
    """(low, high) of a ratio: its interval, or its range if there is no interval."""
    return tuple(row[f"{name}_ci95"] or row[f"{name}_range"])


def against(times: Mapping[str, Sequence[float]], base: str = "original", again: str = NOISE) -> dict[str, dict]:
    """{name: {"ratio", "ratio_ci95", "noise", "detectable", "verdict", "rounds"}}: every method over `base`.

    again: the repetition of `base`. noise: the distance from 1 to the far end of its interval.
    verdict: "slower" or "faster" if the whole interval lies beyond the noise; "undecided" if it excludes 1 but overlaps
    the noise; else "within the noise".
    detectable: the smallest slowdown that would have been called slower. It is the noise plus the median distance from
    a ratio to the lower end of its interval.
    """
    rows = {name: ratio(sample, times[base]) for name, sample in times.items()}
    noise = max(abs(end - 1) for end in ends(rows[again]))
    widths = [row["ratio"] - ends(row)[0] for name, row in rows.items() if name != base]
    more = {"noise": noise, "detectable": noise + statistics.median(widths), "rounds": len(times[base])}
    for name, row in rows.items():
        low, high = ends(row)
        verdict = "slower" if low > 1 + noise else "faster" if high < 1 / (1 + noise) else "within the noise"
        if verdict == "within the noise" and not low <= 1 <= high:
            verdict = "undecided"
        row |= more | {"verdict": "-" if name in (base, again) else verdict}
    return rows
