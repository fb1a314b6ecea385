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
from benchmarks.machine import machine
from benchmarks.ops_tables import draw, print_table, summary
from benchmarks.timing import Replay, copy_bandwidth, extra_memory, launch_seconds, paired, replay
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
    overhead = host_overhead(device)
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
    times, ratios, peers_timed_by = [], {}, {}
    for peer, run in case.peers.items():
        try:
            theirs_result = run()
        except (NotImplementedError, RuntimeError) as error:
            print(f"{case.workload} {case.direction}: {peer} cannot do this: {error}", file=sys.stderr)
            continue
        check_equal(case, peer, expected, theirs_result)
        theirs_alone = replay(run, device)
        ours, theirs = paired(ours_alone, theirs_alone, device, seconds)
        times += ours
        ratios[peer] = median(t / o for o, t in zip(ours, theirs, strict=True))
        peers_timed_by[peer] = timed_by(theirs_alone)
    if not times:
        times, _ = paired(ours_alone, lambda: None, device, seconds)
    best = median(times)
    return {
        "workload": case.workload,
        "direction": case.direction,
        "dtype": case.dtype,
        "layout": case.layout,
        "milliseconds": best * 1e3,
        "timed_by": timed_by(ours_alone),
        "peers_timed_by": peers_timed_by,
        "runs": len(times),
        "ratio": ratios,
        "floor_bytes": case.floor_bytes,
        "share_of_copy_bandwidth": case.floor_bytes / best / bandwidth,
        "extra_bytes": {
            "ours": extra_memory(case.ours, device),
            **{peer: extra_memory(case.peers[peer], device) for peer in ratios},
        },
    }


def timed_by(run) -> str:
    """How a function is timed: what cannot be captured is, on a GPU, with the gaps between its launches."""
    return "graph replay" if isinstance(run, Replay) else "single calls"


def check_equal(case: Case, peer: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """A peer that computes something else is no peer."""
    scale = ours.abs().max().item()
    difference = (ours.float() - theirs.float()).abs().max().item()
    # A NaN is no agreement.
    if not difference <= case.tolerance * max(scale, 1e-12) * (1 if peer != "grid_sample" else 10):
        raise RuntimeError(f"{case.workload} {case.direction}: {peer} differs by {difference:g} of {scale:g}")


def host_overhead(device: torch.device) -> dict[str, float]:
    """Microseconds of a call on a single voxel, the best of many turns: what it costs besides its work.

    On a GPU the host's part alone: the device is waited for between turns.
    """
    volume = torch.zeros(1, 1, 1, 1, 1, device=device)
    boxes = torch.tensor([[0.0, 0, 0, 0, 1, 1, 1]], device=device)
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
        took = (time.perf_counter() - began) / 100 * 1e6
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return took

    turns = [{name: each(call) for name, call in calls.items()} for _ in range(40)]
    return {name: min(turn[name] for turn in turns) for name in calls}


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
    least = launch_seconds(device)
    return {
        **machine(device),
        "pgl_ops": pgl_ops.build_info(),
        "copy_gigabytes_per_second": bandwidth / 1e9,
        "smallest_kernel_us": None if least is None else least * 1e6,
        "torchvision_ops": torchvision_roi_align() is not None,
    }


if __name__ == "__main__":
    sys.exit(main())
