"""``python -m benchmarks.ops``: every op against its peers and against the memory bandwidth.

Each row takes turns with its peers (some runs of ours, some of the peer's, …), so that a drift of the
machine's speed meets both. A turn begins with a run that is not timed, so that each finds the caches and the
allocator as it leaves them itself; the ratio is the median over the turns' paired medians. On a GPU the runs
are replayed as CUDA graphs. Writes a table to the terminal, and JSON and a bar chart to
``benchmarks/results/``. ``--check`` exits with 1 where a ratio is under its bar.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

# Also to be run as `python benchmarks/ops.py`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# The profiler, which counts memory here, otherwise says on the terminal whenever it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
import torch

import pgl_ops
from benchmarks.workloads import Case, loss_cases, roi_cases, roi_workloads, torchvision_roi_align

RESULTS = Path(__file__).parent / "results"

#: Least ratio to a peer (its time over ours), by (workload, direction, peer); CPU, float32, two threads.
BARS = {
    ("bottleneck", "forward", "grid_sample"): 40,
    ("bottleneck", "backward", "grid_sample"): 30,
    ("dense", "forward", "grid_sample"): 60,
    ("dense", "backward", "grid_sample"): 30,
    ("views", "forward", "grid_sample"): 20,
    ("torchvision-2d", "forward", "torchvision"): 4,
    ("torchvision-2d", "backward", "torchvision"): 6,
    ("loss 8x256x4x16x16", "both", "composition"): 10,
    ("loss 2x32x16x96x96", "both", "composition"): 10,
    ("aligned loss bottleneck", "both", "its parts"): 1.5,
    ("aligned loss dense", "both", "its parts"): 1.5,
}

#: Goals on a GPU: least share of the copy's bandwidth, by (workload, direction), bfloat16 and channels_last.
SHARE_GOALS = {
    ("dense", "forward"): 0.75,
    ("dense", "backward"): 0.65,
    ("loss 64x256x4x16x16", "both"): 0.75,
    ("loss 16x32x16x96x96", "both"): 0.75,
}

#: Goals on a GPU: least ratio to a peer, in every layout and dtype.
RATIO_GOALS = {
    ("detection", "forward", "compiled"): 5,
    ("torchvision-2d", "forward", "torchvision"): 4,
    ("torchvision-2d", "backward", "torchvision"): 8,
}

#: Most microseconds of a call on a single voxel.
OVERHEAD_BARS = {"without_gradients": 40, "with_gradients": 80}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seconds", type=float, default=1.5, help="time for each pair of ours and a peer")
    parser.add_argument("--only", default="", help="run only workloads whose name contains this")
    parser.add_argument(
        "--compile",
        nargs="*",
        metavar="WORKLOAD",
        help="also the reference under torch.compile; with names, only of these, as float32 and contiguous",
    )
    parser.add_argument("--layouts", nargs="+", default=["contiguous", "channels_last"])
    parser.add_argument("--dtypes", nargs="+", default=None, help="default: float32, on a GPU also bfloat16")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--name", default=None, help="name of the result files, default ops-DEVICE")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_stream(torch.cuda.Stream())  # the default stream cannot be captured
    dtypes = options.dtypes or (["float32", "bfloat16"] if gpu else ["float32"])
    peers = {"reference", "grid_sample", "torchvision", "composition"}

    bandwidth = copy_bandwidth(device)
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / (options.name or f"ops-{device.type}")
    head = header(device, bandwidth)
    rows, missed = [], []
    for case in all_cases(device, gpu, dtypes, options.layouts, peers, options.compile, options.only):
        row = measure(case, device, options.seconds, bandwidth)
        rows.append(row)
        # A run that is cut off leaves what it has measured.
        write_json(stem, {"header": head, "rows": rows})
        print(summary(row), file=sys.stderr, flush=True)
        missed += missed_goals(row) if gpu else missed_bars(row)
    overhead = host_overhead()
    missed += [
        f"host overhead {name}: {overhead[name]:.0f} µs, bar {bar} µs"
        for name, bar in OVERHEAD_BARS.items()
        if overhead[name] > bar
    ]
    record = {"header": head, "host_overhead_us": overhead, "rows": rows}
    write_json(stem, record)
    print_table(record)
    draw(record, stem.with_suffix(".png"))
    calls = ", ".join(f"{name.replace('_', ' ')} {value:.0f} µs" for name, value in overhead.items())
    print(f"a call on one voxel: {calls}")
    print(f"written: {stem}.json, {stem}.png")
    for text in missed:
        print(f"under its bar: {text}", file=sys.stderr)
    if options.check:
        seen = {(row["workload"], row["direction"], peer) for row in rows for peer in row["ratio"]}
        shares = {(row["workload"], row["direction"], "the copy") for row in rows}
        wanted = {*RATIO_GOALS, *((*goal, "the copy") for goal in SHARE_GOALS)} if gpu else set(BARS)
        for bar in sorted(wanted - seen - shares):
            print(f"not checked here: {' '.join(bar[:2])} against {bar[2]}", file=sys.stderr)
    return 1 if options.check and missed else 0


def write_json(stem: Path, record: dict) -> None:
    """The record beside its picture."""
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def all_cases(device, gpu, dtypes, layouts, peers, compiled, only):
    """All rows whose workload's name contains ``only``, made one after the other: one workload in memory."""
    for work in roi_workloads(gpu):
        if only not in work.name:
            continue
        for dtype in dtypes if not work.integer else ["int16"]:
            for layout in layouts if work.channels > 1 else ["contiguous"]:
                kind = getattr(torch, dtype) if not work.integer else torch.float32
                chosen = compiled is not None and (
                    not compiled or (work.name in compiled and (dtype, layout) == ("float32", "contiguous"))
                )
                yield from roi_cases(work, kind, layout, device, peers | ({"compiled"} if chosen else set()))
    for dtype in dtypes:
        for layout in layouts:
            for case in loss_cases(device, getattr(torch, dtype), layout, peers, gpu):
                if only in case.workload:
                    yield case


def measure(case: Case, device: torch.device, seconds: float, bandwidth: float) -> dict:
    """Times of one case, ours interleaved with each peer."""
    expected = case.ours()
    ours_alone = replay(case.ours, device)
    times, ratios = [], {}
    for peer, run in case.peers.items():
        try:
            theirs_result = run()
        except (NotImplementedError, RuntimeError) as error:
            print(f"{case.workload} {case.direction}: {peer} cannot do this: {error}", file=sys.stderr)
            continue
        check_equal(case, peer, expected, theirs_result)
        ours, theirs = paired(ours_alone, replay(run, device), device, seconds)
        times += ours
        ratios[peer] = median(t / o for o, t in zip(ours, theirs, strict=True))
    if not times:
        times, _ = paired(ours_alone, lambda: None, device, seconds)
    best = median(times)
    return {
        "workload": case.workload,
        "direction": case.direction,
        "dtype": case.dtype,
        "layout": case.layout,
        "milliseconds": best * 1e3,
        "timed_by": "graph replay" if isinstance(ours_alone, Replay) else "single calls",
        "runs": len(times),
        "ratio": ratios,
        "floor_bytes": case.floor_bytes,
        "share_of_copy_bandwidth": case.floor_bytes / best / bandwidth,
        "extra_bytes": {
            "ours": extra_memory(case.ours, device),
            **{peer: extra_memory(case.peers[peer], device) for peer in ratios},
        },
    }


def check_equal(case: Case, peer: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """A peer that computes something else is no peer."""
    scale = ours.abs().max().item()
    difference = (ours.float() - theirs.float()).abs().max().item()
    if difference > case.tolerance * max(scale, 1e-12) * (1 if peer != "grid_sample" else 10):
        raise RuntimeError(f"{case.workload} {case.direction}: {peer} differs by {difference:g} of {scale:g}")


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


def host_overhead() -> dict[str, float]:
    """Microseconds of a call on a single voxel, the best of many turns: what it costs besides its work."""
    volume = torch.zeros(1, 1, 1, 1, 1)
    boxes = torch.tensor([[0.0, 0, 0, 0, 1, 1, 1]])
    leaf = volume.clone().requires_grad_()
    calls = {
        "without_gradients": lambda: pgl_ops.roi_align3d(volume, boxes, 1),
        "with_gradients": lambda: pgl_ops.roi_align3d(leaf, boxes, 1),
        "with_backward": lambda: torch.autograd.grad(pgl_ops.roi_align3d(leaf, boxes, 1), leaf, volume),
    }

    def each(call) -> float:
        began = time.perf_counter()
        for _ in range(100):
            call()
        return (time.perf_counter() - began) / 100 * 1e6

    turns = [{name: each(call) for name, call in calls.items()} for _ in range(40)]
    return {name: min(turn[name] for turn in turns) for name in calls}


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


def missed_bars(row: dict) -> list[str]:
    """The bars that a row is under."""
    found = []
    for (workload, direction, peer), bar in BARS.items():
        applies = (row["workload"], row["direction"], row["layout"]) == (workload, direction, "contiguous")
        if applies and row["dtype"] in ("float32", "int16") and peer in row["ratio"]:
            ratio = row["ratio"][peer]
            if ratio < bar:
                found.append(f"{workload} {direction}: {ratio:.1f}x {peer}, bar {bar}x")
    return found


def missed_goals(row: dict) -> list[str]:
    """The goals for a GPU that a row does not reach."""
    found = []
    share = SHARE_GOALS.get((row["workload"], row["direction"]))
    kind = (row["dtype"], row["layout"])
    if share and kind == ("bfloat16", "channels_last") and row["share_of_copy_bandwidth"] < share:
        reached = row["share_of_copy_bandwidth"]
        found.append(f"{row['workload']} {row['direction']}: {reached:.0%} of the copy, goal {share:.0%}")
    for (workload, direction, peer), bar in RATIO_GOALS.items():
        ratio = row["ratio"].get(peer)
        if (row["workload"], row["direction"]) == (workload, direction) and ratio and ratio < bar:
            found.append(f"{workload} {direction} {' '.join(kind)}: {ratio:.1f}x {peer}, goal {bar}x")
    return found


def header(device: torch.device, bandwidth: float) -> dict:
    """Where and with what the record was made."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=RESULTS.parent, capture_output=True, text=True
    ).stdout.strip()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "pgl_ops": pgl_ops.build_info(),
        "commit": commit or "unknown",
        "copy_gigabytes_per_second": bandwidth / 1e9,
        "smallest_kernel_us": None if (least := launch_seconds(device)) is None else least * 1e6,
        "torchvision_ops": torchvision_roi_align() is not None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown CPU"


def summary(row: dict) -> str:
    """A row in one line."""
    ratios = ", ".join(f"{ratio:.1f}x {peer}" for peer, ratio in row["ratio"].items())
    return f"{row['workload']} {row['direction']} {row['dtype']} {row['layout']}: {ratios}"


def print_table(record: dict) -> None:
    """The record as a table."""
    from rich.console import Console
    from rich.table import Table

    head = record["header"]
    torchvision = "" if head["torchvision_ops"] else "; torchvision's compiled ops are not available here"
    title = (
        f"{head['device']}, {head['threads']} threads, torch {head['torch']}, {head['commit']}{torchvision}"
    )
    table = Table(title=title)
    for name in ("workload", "direction", "dtype", "layout", "ms", "faster than", "bandwidth", "extra MiB"):
        table.add_column(name, justify="right" if name in ("ms", "bandwidth", "extra MiB") else "left")
    for row in record["rows"]:
        extra = row["extra_bytes"]["ours"]
        table.add_row(
            row["workload"],
            row["direction"],
            row["dtype"],
            row["layout"],
            f"{row['milliseconds']:.3f}",
            ", ".join(f"{peer} {ratio:.1f}x" for peer, ratio in row["ratio"].items()),
            f"{row['share_of_copy_bandwidth']:.0%}",
            f"{extra / 2**20:.1f}",
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def draw(record: dict, path: Path) -> None:
    """The ratios as a bar chart."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [
        (f"{row['workload']} {row['direction']} {row['dtype']} {row['layout']}", peer, ratio)
        for row in record["rows"]
        for peer, ratio in row["ratio"].items()
    ]
    peers = sorted({peer for _, peer, _ in bars})
    colours = dict(
        zip(peers, ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"], strict=False)
    )
    figure, axes = plt.subplots(figsize=(9, 0.28 * len(bars) + 1.5), layout="constrained")
    axes.barh(
        [f"{name} vs {peer}" for name, peer, _ in bars],
        [r for *_, r in bars],
        color=[colours[p] for _, p, _ in bars],
    )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("times faster than the peer (paired medians)")
    axes.tick_params(labelsize=7)
    head = record["header"]
    axes.set_title(f"{head['device']}, {head['threads']} threads, torch {head['torch']}", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
