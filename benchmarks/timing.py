"""How the op benchmarks measure time, memory and bandwidth, on a CPU and on a GPU."""

from __future__ import annotations

import sys
import time
from statistics import median

import torch


def paired(ours, theirs, device: torch.device, seconds: float) -> tuple[list[float], list[float]]:
    """Seconds of a run, the median of each turn, for both."""
    times: tuple[list[float], list[float]] = ([], [])
    began = time.perf_counter()
    while len(times[0]) < 3 or (time.perf_counter() - began < seconds and len(times[0]) < 100):
        for run, spent in zip((ours, theirs), times, strict=True):
            spent.append(turn(run, device))
    return times


def turn(run, device: torch.device, least: float = 0.02, most_runs: int = 20) -> float:
    """The median of some runs after one that warms up; the shorter a run, the more."""
    if isinstance(run, Replay):
        run.seconds()
        return run.seconds()
    timed(run, device)
    times = [timed(run, device)]
    while sum(times) < least and len(times) < most_runs:
        times.append(timed(run, device))
    return median(times)


def timed(run, device: torch.device) -> float:
    """Seconds of one run; by events on a GPU."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


#: A run this long hides its launches by itself.
LONG_SECONDS = 5e-3


class Replay:
    """A function's kernels as a CUDA graph of a few repetitions, so that no launch waits for the host.

    The inputs stay where they are; what fits into the second-level cache is found there again, by all alike.
    """

    REPEATS = 5

    def __init__(self, run) -> None:
        for _ in range(2):
            run()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        # The stream that the forward pass ran on, which a backward pass returns to.
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
            for _ in range(self.REPEATS):
                run()
        self.seconds()

    def seconds(self) -> float:
        """Of one of the repetitions."""
        return timed(self.graph.replay, torch.device("cuda")) / self.REPEATS


def replay(run, device: torch.device):
    """The function as a graph where the device has graphs, it can be captured, and launches may matter."""
    if device.type != "cuda" or min(timed(run, device) for _ in range(2)) > LONG_SECONDS:
        return run
    try:
        return Replay(run)
    except RuntimeError as error:
        torch.cuda.synchronize()
        print(f"timed call by call, as it cannot be captured: {str(error).splitlines()[0]}", file=sys.stderr)
        return run


def extra_memory(run, device: torch.device) -> int:
    """Most memory of torch's allocator that one run holds beyond what was held before it.

    What kernels take besides is not seen: on the CPU a few hundred KiB a thread.
    """
    if device.type != "cuda":
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            run()
        held = most = 0
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            most = max(most, held)
        return most
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second (read plus written) of a copy much larger than the caches, the fastest way."""
    size = 1 << (30 if device.type == "cuda" else 27)
    source = torch.zeros(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    ways = [lambda: target.copy_(source)]
    if device.type == "cuda":  # a kernel of vectors can be faster than the driver's copy
        words = source.view(torch.int64), target.view(torch.int64)
        ways.append(lambda: torch.bitwise_not(words[0], out=words[1]))
    return 2 * size / min(median([timed(way, device) for _ in range(10)][1:]) for way in ways)


def launch_seconds(device: torch.device) -> float | None:
    """What the smallest kernel takes in a graph of many: the least that any call can."""
    if device.type != "cuda":
        return None
    one = torch.zeros(1, device=device)
    return Replay(lambda: one.fill_(1.0)).seconds()
