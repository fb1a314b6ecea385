"""More samples, channels, RoIs or voxels than one axis of a CUDA grid has blocks for (65,535)."""

from __future__ import annotations

import pytest
import torch

import pgl_ops
from tests.ops import oracle
from tests.ops.cases import laid_out, random_boxes, random_volume
from tests.ops.checks import assert_gradient_exact, on

MANY = 65_535 + 10


@pytest.fixture(autouse=True)
def quick_enough(backend):
    if backend.name == "host_cuda":
        pytest.skip("tens of millions of threads: too many for fibers")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_rois_than_blocks_in_a_grid(backend, layout):
    volume = on(backend.device, laid_out(random_volume((2, 2, 2, 3, 2)), layout)).requires_grad_()
    boxes = random_boxes(MANY, 2, (2, 3, 2))
    out = pgl_ops.roi_align3d(volume, on(backend.device, boxes), 1, sampling_ratio=1)
    some = [0, 1, 40_000, 65_534, 65_535, 65_536, MANY - 1]
    exact = oracle.roi_align3d(volume, boxes[some], 1, sampling_ratio=1)
    torch.testing.assert_close(out[some].cpu(), exact, rtol=0, atol=1e-13)
    upstream = torch.zeros(out.shape, dtype=torch.float64)
    upstream[some] = random_volume((len(some), 2, 1, 1, 1), seed=3)
    (gradient,) = torch.autograd.grad(out, volume, on(backend.device, upstream))
    exact = oracle.roi_align3d_adjoint(upstream[some], volume.shape, boxes[some], 1, sampling_ratio=1)
    torch.testing.assert_close(gradient.cpu(), exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(MANY, 1, 1, 1, 2), (1, MANY, 1, 1, 2)], ids=["samples", "channels"])
def test_more_samples_or_channels_than_blocks_in_a_grid(backend, shape, layout):
    volume = laid_out(random_volume(shape), layout)
    boxes = torch.tensor([[shape[0] - 1, 0, 0, 0.3, 1, 1, 1.6], [0, 0, 0, 0.2, 1, 1, 1.1]])
    out = pgl_ops.roi_align3d(*on(backend.device, volume, boxes), 1)
    torch.testing.assert_close(out.cpu(), oracle.roi_align3d(volume, boxes, 1), rtol=0, atol=1e-13)
    gradient = laid_out(random_volume(out.shape, seed=3), layout)
    assert_gradient_exact(pgl_ops.roi_align3d, backend.device, volume, boxes, 1, gradient)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(MANY, 2, 1), (1, 2, MANY), (1, MANY, 1)], ids=str)
def test_losses_of_more_samples_voxels_or_channels_than_blocks_in_a_grid(backend, shape, layout):
    pair = [
        on(backend.device, laid_out(random_volume(shape, seed=s), layout)).requires_grad_() for s in (1, 2)
    ]
    loss = pgl_ops.voxel_cosine_loss(*pair)
    torch.testing.assert_close(loss.cpu(), oracle.voxel_cosine_loss(*pair), rtol=1e-12, atol=0)
    for got, exact in zip(
        torch.autograd.grad(loss, pair), oracle.voxel_cosine_loss_gradients(*pair), strict=True
    ):
        torch.testing.assert_close(got.cpu(), exact, rtol=1e-9, atol=1e-15)


def test_fused_loss_of_more_rois_than_blocks_in_a_grid(backend):
    features = random_volume((2, 2, 2, 3, 2), seed=1)
    prediction = random_volume((MANY, 2, 1, 1, 1), seed=2)
    boxes = torch.tensor([[1, 0.2, 0.3, 0.1, 1.8, 2.9, 1.7]]).repeat(MANY, 1)
    moved = on(backend.device, prediction, features, boxes)
    moved[0].requires_grad_()
    loss = pgl_ops.aligned_cosine_loss3d(*moved, reduction="none")
    target = oracle.roi_align3d(features, boxes[:1], 1).expand_as(prediction)
    exact = oracle.voxel_cosine_loss(prediction, target, reduction="none")
    torch.testing.assert_close(loss.cpu(), exact, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), moved[0])
    exact, _ = oracle.voxel_cosine_loss_gradients(prediction, target, reduction="none")
    torch.testing.assert_close(gradient.cpu(), exact, rtol=1e-9, atol=1e-12)
