"""``python -m benchmarks.small_shapes``: every op once, forward and backward, on small shapes of all kinds.

Meant to run under compute-sanitizer; also checks that each device gives the CPU kernels' results.
"""

from __future__ import annotations

import itertools
import sys

import torch

import pgl_ops

#: Differences are relative to the largest value, or to this.
SMALLEST_SCALE = 1e-2


def main() -> int:
    """Run everything; returns the exit code."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    worst = {}
    runs = 0
    for dtype, channels, layout, ratio in itertools.product(
        (torch.float32, torch.float64, torch.bfloat16, torch.float16),
        (1, 3, 8, 16),
        (torch.contiguous_format, torch.channels_last_3d),
        (-1, 2),
    ):
        found = run(device, dtype, channels, layout, ratio)
        expected = run(torch.device("cpu"), dtype, channels, layout, ratio)
        for name, value in found.items():
            difference = (value.double().cpu() - expected[name].double()).abs().max().item()
            # With one channel the loss has no slope: what is left of it is rounding on either device.
            scale = max(expected[name].double().abs().max().item(), SMALLEST_SCALE)
            key = f"{name} {str(value.dtype).removeprefix('torch.')}"
            worst[key] = max(worst.get(key, 0.0), difference / scale)
        runs += 1
    limits = {"float64": 1e-12, "float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}
    wrong = {key: value for key, value in worst.items() if not value <= limits[key.split()[-1]]}
    for key in sorted(worst):
        print(f"{key:<40} differs from the CPU by {worst[key]:.1e} of the largest value")
    bad_rows_are_nan(device)
    print(f"{runs} combinations on {device}, {len(wrong)} beyond their limits")
    return 1 if wrong else 0


def run(device, dtype, channels, layout, ratio) -> dict[str, torch.Tensor]:
    """All results of one combination."""
    generator = torch.Generator().manual_seed(channels)
    features = torch.randn((2, channels, 5, 6, 7), generator=generator).to(dtype)
    features = features.to(memory_format=layout).to(device).requires_grad_()
    boxes = torch.rand((5, 7), generator=generator) * 8 - 1
    boxes[:, 0] = torch.tensor([0, 1, 1, 0, 1])
    boxes = boxes.to(device)
    flips = (torch.rand((5, 3), generator=generator) < 0.5).to(device)
    prediction = torch.randn((5, channels, 3, 2, 4), generator=generator).to(dtype).to(device)
    prediction.requires_grad_()
    weight = torch.rand((5, 3, 2, 4), generator=generator).to(device)
    aligned = pgl_ops.roi_align3d(features, boxes, (3, 2, 4), 0.9, ratio, True, flips)
    gradient = torch.randn(aligned.shape, generator=generator).to(aligned)
    (grad_features,) = torch.autograd.grad(aligned, features, gradient)
    stored = pgl_ops.voxel_cosine_loss(prediction, aligned.detach(), weight)
    (grad_stored,) = torch.autograd.grad(stored, prediction)
    fused = pgl_ops.aligned_cosine_loss3d(
        prediction, features.detach(), boxes, 0.9, ratio, True, flips, weight
    )
    (grad_fused,) = torch.autograd.grad(fused, prediction)
    views = pgl_ops.roi_align3d((features * 100).detach().short(), boxes, (3, 2, 4), 0.9, ratio)
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
