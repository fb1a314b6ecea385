"""``python -m benchmarks.small_shapes``: every op, forward and backward, on small shapes of all kinds.

Meant to run under compute-sanitizer; also checks that each device gives the CPU kernels' results.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

import pgl_ops

#: Differences are relative to the largest value, or to this.
SMALLEST_SCALE = 1e-2
#: The largest that is rounding.
LIMITS = {"float64": 1e-12, "float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}


@dataclass(frozen=True)
class Problem:
    """One set of sizes."""

    channels: int
    ratio: int = 2
    samples: int = 2
    rois: int = 5
    size: tuple[int, int, int] = (5, 6, 7)
    output: tuple[int, int, int] = (3, 2, 4)


#: Sizes that take each way through the CUDA kernels.
WAYS = {
    "at most one RoI a sample: backward marches": Problem(8, samples=5, rois=3),
    "a single RoI": Problem(16, samples=1, rois=1, size=(6, 12, 12), output=(4, 8, 8)),
    "more RoIs than threads a block": Problem(8, samples=300, rois=300, size=(2, 1, 2), output=(2, 2, 2)),
    "several parts of the channels": Problem(72, rois=3, size=(6, 9, 9), output=(9, 9, 10)),
    "many samples a bin: taps are tabulated": Problem(8, ratio=17, rois=3),
    "several parts of the channels with the same taps": Problem(272, rois=900, output=(2, 7, 7)),
    "rows longer than a tile": Problem(8, rois=24, samples=1, size=(1, 2, 257), output=(1, 2, 9)),
    "more bins than can be staged": Problem(8, rois=3, samples=1, size=(2, 3, 4), output=(1, 1, 1030)),
}


def problems() -> Iterator[tuple[Problem, torch.dtype, torch.memory_format]]:
    """All combinations that are run."""
    layouts = (torch.contiguous_format, torch.channels_last_3d)
    every = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for dtype, channels, layout, ratio in itertools.product(every, (1, 3, 8, 16), layouts, (-1, 2)):
        yield Problem(channels, ratio), dtype, layout
    for problem, dtype, layout in itertools.product(WAYS.values(), (torch.float32, torch.bfloat16), layouts):
        yield problem, dtype, layout


def main() -> int:
    """Run everything; returns the exit code."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    worst: dict[str, float] = {}
    runs = 0
    for problem, dtype, layout in problems():
        note_differences(
            run(problem, dtype, layout, device), run(problem, dtype, layout, torch.device("cpu")), worst
        )
        runs += 1
    wrong = beyond_limits(worst)
    for key in sorted(worst):
        print(f"{key:<40} differs from the CPU by {worst[key]:.1e} of the largest value")
    bad_rows_are_nan(device)
    for key in wrong:
        print(f"WRONG: {key}")
    print(f"{runs} combinations on {device}, {len(wrong)} beyond their limits")
    return 1 if wrong else 0


def note_differences(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], worst: dict[str, float]
) -> None:
    """Enter the largest difference of each result into ``worst``; one that is NaN stays."""
    for name, value in found.items():
        difference = (value.double().cpu() - expected[name].double()).abs().max().item()
        # With one channel the loss has no slope: what is left of it is rounding on either device.
        scale = max(expected[name].double().abs().max().item(), SMALLEST_SCALE)
        key = f"{name} {str(value.dtype).removeprefix('torch.')}"
        # `not <=`, and not `max`, which would lose a NaN.
        if not difference / scale <= worst.setdefault(key, 0.0) and worst[key] == worst[key]:
            worst[key] = difference / scale


def beyond_limits(worst: dict[str, float]) -> list[str]:
    """The results whose difference is more than rounding, or NaN."""
    return [key for key, value in sorted(worst.items()) if not value <= LIMITS[key.split()[-1]]]


def run(
    problem: Problem, dtype: torch.dtype, layout: torch.memory_format, device: torch.device
) -> dict[str, torch.Tensor]:
    """All results of one combination."""
    generator = torch.Generator().manual_seed(problem.channels)
    n, k, c, ratio = problem.samples, problem.rois, problem.channels, problem.ratio
    features = torch.randn((n, c, *problem.size), generator=generator).to(dtype)
    features = features.to(memory_format=layout).to(device).requires_grad_()
    room = torch.tensor(problem.size) + 3
    boxes = torch.rand((k, 7), generator=generator) * torch.cat([torch.ones(1), room, room]) - 1
    # Every sample has one, as far as there are enough; where some have several, these lie apart.
    boxes[:, 0] = torch.arange(k) % n
    boxes = boxes.to(device)
    flips = (torch.rand((k, 3), generator=generator) < 0.5).to(device)
    prediction = torch.randn((k, c, *problem.output), generator=generator).to(dtype)
    prediction = prediction.to(memory_format=layout).to(device).requires_grad_()
    weight = torch.rand((k, *problem.output), generator=generator).to(device)
    aligned = pgl_ops.roi_align3d(features, boxes, problem.output, 0.9, ratio, True, flips)
    gradient = torch.randn(aligned.shape, generator=generator).to(aligned)
    (grad_features,) = torch.autograd.grad(aligned, features, gradient)
    stored = pgl_ops.voxel_cosine_loss(prediction, aligned.detach(), weight)
    (grad_stored,) = torch.autograd.grad(stored, prediction)
    fused = pgl_ops.aligned_cosine_loss3d(
        prediction, features.detach(), boxes, 0.9, ratio, True, flips, weight
    )
    (grad_fused,) = torch.autograd.grad(fused, prediction)
    views = pgl_ops.roi_align3d((features * 100).detach().short(), boxes, problem.output, 0.9, ratio)
    return {
        "roi_align3d": aligned.detach(),
        "roi_align3d backward": grad_features,
        "voxel_cosine_loss": stored.detach(),
        "voxel_cosine_loss backward": grad_stored,
        "aligned_cosine_loss3d": fused.detach(),
        "aligned_cosine_loss3d backward": grad_fused,
        "roi_align3d of int16": views,
    }


def bad_rows_are_nan(device: torch.device) -> None:
    """On CUDA a row that cannot be sampled gives NaN and touches nothing else."""
    if device.type != "cuda":
        return
    volume = torch.ones((1, 2, 4, 4, 4), device=device, requires_grad=True)
    boxes = torch.tensor(
        [[0, 0, 0, 0, 4, 4, 4], [7, 0, 0, 0, 4, 4, 4], [0, 0, 0, float("inf"), 4, 4, 4]],
        dtype=torch.float32,
        device=device,
    )
    out = pgl_ops.roi_align3d(volume, boxes, 2)
    out.sum().backward()
    assert out[0].eq(1).all() and out[1:].isnan().all() and volume.grad.isfinite().all()


if __name__ == "__main__":
    sys.exit(main())
