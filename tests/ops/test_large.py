"""More than 2**31 elements addressed: any 32-bit index or byte offset on the way reads or writes elsewhere.

The tensors' memory is reserved, never filled: only the pages that a test touches exist (on a GPU all of it).
"""

from __future__ import annotations

import pytest
import torch

import pgl_ops
from tests.ops import oracle
from tests.ops.cases import laid_out, random_boxes, random_volume
from tests.ops.checks import on

TWO_TO_31 = 2**31


def far_view(values: torch.Tensor, axis: int, device) -> torch.Tensor:
    """``values`` with more than 2**31 elements between neighbours on ``axis``, on ``device``."""
    strides = list(values.contiguous().stride())
    strides[axis] = TWO_TO_31 // (values.shape[axis] - 1) + values.numel()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True))
    view = torch.empty(extent, dtype=values.dtype, device=device).as_strided(values.shape, strides)
    view.copy_(values)
    return view


@pytest.mark.parametrize("axis", [0, 1, 2, 3, 4])
def test_strides_of_more_than_2_to_31_elements(backend, axis):
    shape = [1, 2, 3, 4, 5]
    shape[axis] = 2
    values = random_volume(shape, torch.uint8)
    volume = far_view(values, axis, backend.device)
    assert volume.stride(axis) >= TWO_TO_31
    boxes = random_boxes(3, shape[0], shape[2:], dtype=torch.float64)
    if axis == 0:
        boxes[:, 0] = torch.tensor([1.0, 0.0, 1.0])
    out = pgl_ops.roi_align3d(volume, on(backend.device, boxes), 2)
    exact = oracle.roi_align3d(values, boxes, 2)
    torch.testing.assert_close(out.cpu().double(), exact, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 3, 720, 1000, 1000), (3, 2, 400, 900, 1000)], ids=str)
def test_dense_volume_of_more_than_2_to_31_voxels(backend, shape, layout):
    n, c, *sides = shape
    storage = torch.empty(n * c * sides[0] * sides[1] * sides[2], dtype=torch.uint8, device=backend.device)
    assert storage.numel() > TWO_TO_31
    channels_inside = storage.view(n, *sides, c).movedim(-1, 1)
    volume = storage.view(shape) if layout == "contiguous" else channels_inside
    corner = random_volume((1, c, 4, 4, 4), torch.uint8)
    volume[-1:, :, -4:, -4:, -4:] = on(backend.device, corner)
    inside = torch.tensor([[0, 0.7, 0.6, 1.1, 3.4, 3.1, 3.8]], dtype=torch.float64)
    boxes = inside.clone()
    boxes[0, 0] = n - 1
    boxes[0, 1:] += torch.tensor([s - 4.0 for s in sides] * 2, dtype=torch.float64)
    out = pgl_ops.roi_align3d(volume, on(backend.device, boxes), (2, 3, 2))
    exact = oracle.roi_align3d(corner, inside, (2, 3, 2))
    torch.testing.assert_close(out.cpu().double(), exact, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("axis", [0, 1, 2, 3, 4])
def test_gradient_strides_of_more_than_2_to_31_elements(backend, axis, layout):
    shape = [2, 3, 3, 4, 2]
    shape[axis] = 2
    values = random_volume(shape, torch.float16)
    boxes = random_boxes(2 if axis == 0 else shape[0], 1, (4, 5, 6))
    upstream = far_view(values, axis, backend.device)
    x = laid_out(torch.zeros(1, shape[1], 4, 5, 6, dtype=torch.float16), layout)
    x = on(backend.device, x).requires_grad_()
    out = pgl_ops.roi_align3d(x, on(backend.device, boxes), shape[2:])
    (gradient,) = torch.autograd.grad(out, x, upstream)
    exact = oracle.roi_align3d_adjoint(values, x.shape, boxes, shape[2:])
    torch.testing.assert_close(gradient.cpu().double(), exact, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("axis", [0, 1, 2, 4])
def test_cosine_loss_over_strides_of_more_than_2_to_31_elements(backend, axis):
    shape = [2, 2, 2, 3, 2]
    near = [random_volume(shape, torch.float16, seed=s) for s in (1, 2)]
    weight = torch.rand(2, 2, 3, 2)
    prediction, target = (far_view(values, axis, backend.device) for values in near)
    prediction.requires_grad_()
    loss = pgl_ops.voxel_cosine_loss(prediction, target, on(backend.device, weight))
    (gradient,) = torch.autograd.grad(loss, prediction)
    exact = oracle.voxel_cosine_loss(*near, weight)
    slope, _ = oracle.voxel_cosine_loss_gradients(*near, weight)
    torch.testing.assert_close(loss.cpu().double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.cpu().double(), slope, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1, 2, 4])
def test_fused_loss_over_strides_of_more_than_2_to_31_elements(backend, axis):
    features = random_volume((2, 2, 3, 4, 5), torch.float16, seed=1)
    prediction = random_volume((2, 2, 2, 1, 2), torch.float16, seed=2)
    boxes = random_boxes(2, 2, (3, 4, 5))
    far_features = far_view(features, axis, backend.device)
    far_prediction = far_view(prediction, axis, backend.device).requires_grad_()
    loss = pgl_ops.aligned_cosine_loss3d(far_prediction, far_features, on(backend.device, boxes))
    (gradient,) = torch.autograd.grad(loss, far_prediction)
    target = oracle.roi_align3d(features, boxes, (2, 1, 2))
    torch.testing.assert_close(
        loss.cpu().double(), oracle.voxel_cosine_loss(prediction, target), rtol=1e-5, atol=1e-5
    )
    slope, _ = oracle.voxel_cosine_loss_gradients(prediction, target)
    torch.testing.assert_close(gradient.cpu().double(), slope, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_output_of_more_than_2_to_31_elements(backend, layout):
    if backend.name != "cuda":
        pytest.skip("writes 4 GiB: on a GPU only")
    count, shape = 2**17 + 3, (5, 6, 7)
    volume = laid_out(random_volume((2, 16, *shape), torch.float16), layout)
    boxes = random_boxes(count, 2, shape)
    out = pgl_ops.roi_align3d(*on(backend.device, volume, boxes), (4, 16, 16))
    assert out.numel() > TWO_TO_31
    exact = oracle.roi_align3d(volume, boxes[-2:], (4, 16, 16))
    torch.testing.assert_close(out[-2:].cpu().double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradient_of_more_than_2_to_31_elements(backend, layout):
    if backend.name != "cuda":
        pytest.skip("writes 8 GiB: on a GPU only")
    sides = (514, 1024, 1024)
    volume = torch.empty(2, 2, *sides, dtype=torch.float16, device=backend.device)
    if layout == "channels_last":
        volume = volume.view(2, *sides, 2).movedim(-1, 1)
    assert volume.numel() > TWO_TO_31
    volume.requires_grad_()
    inside = torch.tensor([[0, 0.7, 0.6, 1.1, 3.4, 3.1, 3.8]], dtype=torch.float64)
    boxes = inside.clone()
    boxes[0, 0] = 1
    boxes[0, 1:] += torch.tensor([s - 4.0 for s in sides] * 2, dtype=torch.float64)
    out = pgl_ops.roi_align3d(volume, on(backend.device, boxes), (2, 3, 2))
    upstream = random_volume(out.shape, torch.float16)
    (gradient,) = torch.autograd.grad(out, volume, on(backend.device, upstream))
    exact = oracle.roi_align3d_adjoint(upstream, (1, 2, 4, 4, 4), inside, (2, 3, 2))
    corner = gradient[1:, :, -4:, -4:, -4:]
    torch.testing.assert_close(corner.cpu().double(), exact, rtol=1e-3, atol=1e-3)
    assert torch.count_nonzero(gradient) == torch.count_nonzero(corner)
