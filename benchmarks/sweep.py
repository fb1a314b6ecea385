"""``python -m benchmarks.sweep``: is any small or odd problem slower than the reference?

Runs every op forward, and forward with backward, over sizes from a single voxel on, one and several RoIs, few
and many channels, all dtypes and both layouts, taking turns with ``pgl_ops.reference``. Prints the slowest
rows, writes them with the distribution as JSON, and ends with 1 if any is slower than the reference.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor

import pgl_ops
from benchmarks.ops import RESULTS, header
from benchmarks.timing import timed
from pgl_ops import reference

SIZES = ((1, 1, 1), (3, 5, 7), (1, 17, 33), (8, 24, 24))
BINS = ((1, 1, 1), (2, 3, 5), (7, 7, 7))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int16, torch.uint8)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}


def main(argv: list[str] | None = None) -> int:
    """Run the sweep; 1 if a row is slower than the reference."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--turns", type=int, default=5, help="turns of each side a row")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [
        {"row": name, "ratio": ratio(ours, theirs, device, options.turns)}
        for name, ours, theirs in problems(device)
    ]
    rows.sort(key=lambda row: row["ratio"])
    ratios = [row["ratio"] for row in rows]
    quarters = quantiles(ratios, n=4)
    for row in rows[:10]:
        print(f"{row['ratio']:7.2f}x  {row['row']}")
    print(f"{len(rows)} rows, quartiles {', '.join(f'{q:.1f}x' for q in quarters)} faster than the reference")
    record = {"header": header(device, 0.0), "rows": len(rows), "quartiles": quarters, "slowest": rows[:20]}
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"sweep-{device.type}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
    return 1 if ratios[0] < 1 else 0


def ratio(
    ours: Callable[[], object], theirs: Callable[[], object], device: torch.device, turns: int
) -> float:
    """Their time over ours: the median over turns, each after a run that is not timed."""
    found = []
    for _ in range(turns):
        spent = []
        for run in (ours, theirs):
            run()
            spent.append(median(timed(run, device) for _ in range(5)))
        found.append(spent[1] / spent[0])
    return median(found)


def problems(device: torch.device) -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    """Name, ours and the reference's of every row."""
    for size, bins, channels, rois, dtype, (layout, memory_format) in itertools.product(
        SIZES, BINS, (1, 3, 33), (1, 9), DTYPES, LAYOUTS.items()
    ):
        if layout == "channels_last" and channels == 1:
            continue
        generator = torch.Generator().manual_seed(0)
        volume = (torch.randn((2, channels, *size), generator=generator) * 50 + 100).to(dtype)
        volume = volume.to(memory_format=memory_format).to(device)
        boxes = torch.rand((rois, 7), generator=generator) * torch.tensor([0.0, *size, *size])
        boxes[:, 0] = torch.arange(rois) % 2
        low, high = boxes[:, 1:4].minimum(boxes[:, 4:]), boxes[:, 1:4].maximum(boxes[:, 4:])
        boxes = torch.cat([boxes[:, :1], low, high], 1).to(device)
        kind = str(dtype).removeprefix("torch.")
        name = f"{size} -> {bins}, {channels} channels, {rois} RoIs, {kind}, {layout}"
        ratio_of_samples = 2 if rois == 1 else -1
        yield (
            f"roi_align3d forward {name}",
            lambda v=volume, b=boxes, o=bins, r=ratio_of_samples: pgl_ops.roi_align3d(v, b, o, 1.0, r),
            lambda v=volume, b=boxes, o=bins, r=ratio_of_samples: reference.roi_align3d(v, b, o, 1.0, r),
        )
        if not dtype.is_floating_point:
            continue
        leaf = volume.requires_grad_()
        yield (
            f"roi_align3d both {name}",
            lambda v=leaf, b=boxes, o=bins: gradient(pgl_ops.roi_align3d(v, b, o, 1.0, 2), v),
            lambda v=leaf, b=boxes, o=bins: gradient(reference.roi_align3d(v, b, o, 1.0, 2), v),
        )
        prediction = torch.randn((rois, channels, *bins), generator=generator).to(dtype)
        prediction = prediction.to(memory_format=memory_format).to(device).requires_grad_()
        target = prediction.detach() * 0.5 + 1
        yield (
            f"voxel_cosine_loss both {name}",
            lambda p=prediction, z=target: gradient(pgl_ops.voxel_cosine_loss(p, z), p),
            lambda p=prediction, z=target: gradient(reference.voxel_cosine_loss(p, z), p),
        )
        features = volume.detach()
        yield (
            f"aligned_cosine_loss3d both {name}",
            lambda p=prediction, f=features, b=boxes: gradient(pgl_ops.aligned_cosine_loss3d(p, f, b), p),
            lambda p=prediction, f=features, b=boxes: gradient(reference.aligned_cosine_loss3d(p, f, b), p),
        )


def gradient(result: Tensor, leaf: Tensor) -> Tensor:
    """The gradient of a result's sum."""
    return torch.autograd.grad(result.sum(), leaf)[0]


if __name__ == "__main__":
    sys.exit(main())
