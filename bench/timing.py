"""One way of timing for every benchmark: interleaved, in rounds, with the original beside itself as the noise.

Every round takes each provider once, in an order that changes from round to round, so that a drift of the machine meets
all of them. Reported are the median with the 20th and 80th percentile, and, of a round's time over the original's in
the same round, the median with its 95% interval by order statistics. The original is among the providers twice, the
second time with weights of its own where those are edited elsewhere: how far that interval reaches from 1 is what a
ratio must leave before it means anything.
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
    """Cores, threads that torch takes, memory and Python: what a time depends on beside the processor's name."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    threads = torch.get_num_threads()
    return f"{os.cpu_count()} cores, {threads} threads, {memory:.0f} GiB, Python {platform.python_version()}"


def command() -> str:
    """How this process was started, without the folders and files it was given."""
    words, kept = iter(sys.argv[1:]), []
    for word in words:
        if word in ("--out", "--folder"):
            next(words, None)
        else:
            kept.append(word)
    name = os.path.basename(sys.argv[0]).removesuffix(".py")
    return " ".join(["python -m bench" + ("" if name == "__main__" else f".{name}"), *kept])


def stamp(device=None, *beside: str) -> dict:
    """Where and when rows are measured: versions (those of `beside` too), commit, device, machine, command, date, run.
    Asked for before the measuring begins: what is edited meanwhile is not what was measured."""
    environment = environment_record(device)
    found = {key: environment[key] for key in ("torch", "triton", "transformers", "commit", "dirty", "device")}
    found |= {name: version(name) for name in beside} | {"machine": machine(), "command": command()}
    return found | {"date": time.strftime("%Y-%m-%d"), "run": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def steady_memory() -> None:
    """Keep what is freed for what is taken next, as a process that serves does (glibc; elsewhere nothing happens).

    Else the C library gives every tensor of some megabytes back to the kernel and has its pages filled with zeros when
    they are touched again: at 1024 x 2048 float32 that took twenty times as long as copying them did.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for any block
        library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing is given back


def graphed(call: Callable, times: int = 1, before: Callable[[], None] = lambda: None) -> Callable:
    """`times` calls as one CUDA graph; its replay gives what the last of them gave.

    before: run before each of the calls that warm up, and before the capture.
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
    """Microseconds a call. how, on CUDA: "launched" by the host, whose own time it is where there is little work;
    "graph", replayed with no host in between; both with a warm cache; or "cold", the cache overwritten before."""

    def __init__(self, device, inner: int):
        import torch

        self.cuda, self.inner, self.replays = device.type == "cuda", inner, {}
        # Three times the cache, written before each cold call.
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
            torch.cuda._sleep(2_000_000)  # a millisecond in which the host launches what is timed
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
    """GB/s of copying a tensor well beyond the cache, bytes read plus bytes written."""
    import torch

    size = 2**30 if device.type == "cuda" else 2**27
    source, target = (torch.zeros(size, dtype=torch.int8, device=device) for _ in range(2))
    timer = Timer(device, 3)
    taken = [timer.once(lambda: target.copy_(source), "launched", "copy") for _ in range(6)]
    return 2 * size / statistics.median(taken[1:]) / 1e3


def launches(call: Callable) -> int | None:
    """How many kernels, copies and fills one call starts on the GPU; None where the profiler sees nothing."""
    import torch

    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        call()
        torch.cuda.synchronize()
    seen = profile.key_averages()
    return sum(event.count for event in seen if event.device_type == torch.autograd.DeviceType.CUDA) or None


def interleaved(
    calls: Mapping[str, Callable[[], float]], rounds: int, advance: Callable[[int], None] = lambda done: None
) -> dict[str, list[float]]:
    """{name: one time a round}. Each call takes its own time and returns it; a first round of all is thrown away."""
    order, shuffle = list(calls), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in order:
            taken = calls[name]()
            if number:
                times[name].append(taken)
            advance(1)
        shuffle.shuffle(order)
    return times


def percentiles(sample: Sequence[float]) -> dict[str, float]:
    """{"us_p20", "us_p50", "us_p80"} of a sample of times."""
    ordered = sorted(sample)
    found = {f"us_p{p}": ordered[round(p / 100 * (len(ordered) - 1))] for p in (20, 80)}
    return found | {"us_p50": statistics.median(ordered)}


def ratio(sample: Sequence[float], base: Sequence[float], name: str = "ratio") -> dict:
    """{"ratio", "ratio_ci95", "ratio_range"} of times taken in the same rounds, under another name if told: the median
    of the rounds' ratios, its interval by order statistics (None for fewer than six rounds), the least and the largest
    ratio."""
    import numpy as np
    from scipy.stats import quantile_test

    each = np.asarray(sample) / np.asarray(base)
    found = {name: float(np.median(each)), f"{name}_range": [float(each.min()), float(each.max())]}
    if len(each) < 6:
        # Of fewer than six rounds no interval holds the median 95 times in 100: everything from the least to the most
        # is what can be said (of three rounds, 75 times in 100).
        return found | {f"{name}_ci95": None}
    interval = quantile_test(each, p=0.5).confidence_interval(0.95)
    return found | {f"{name}_ci95": [float(interval.low), float(interval.high)]}


def ends(row: Mapping, name: str = "ratio") -> tuple[float, float]:
    """What is known of a ratio: its interval, or its range where there is none."""
    return tuple(row[f"{name}_ci95"] or row[f"{name}_range"])


def against(times: Mapping[str, Sequence[float]], base: str = "original", again: str = NOISE) -> dict[str, dict]:
    """{name: {"ratio", "ratio_ci95", "noise", "detectable", "verdict", "rounds"}} of every provider over `base`, which
    `again` repeats.

    noise: how far the interval of the repetition reaches from 1. "slower" and "faster" only where a provider's whole
    interval lies beyond that; "undecided" where it leaves out 1 and not the noise; else "within the noise".
    detectable: from what overhead on a provider would have been called slower, its interval being as wide as the
    others' (the median of the distances from a ratio to its interval's lower end, above the noise).
    """
    found = {name: ratio(sample, times[base]) for name, sample in times.items()}
    noise = max(abs(end - 1) for end in ends(found[again]))
    widths = [row["ratio"] - ends(row)[0] for name, row in found.items() if name != base]
    more = {"noise": noise, "detectable": noise + statistics.median(widths), "rounds": len(times[base])}
    for name, row in found.items():
        low, high = ends(row)
        apart = "slower" if low > 1 + noise else "faster" if high < 1 / (1 + noise) else "within the noise"
        if apart == "within the noise" and not low <= 1 <= high:
            apart = "undecided"
        row |= more | {"verdict": "-" if name in (base, again) else apart}
    return found
