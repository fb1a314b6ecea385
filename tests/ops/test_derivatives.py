"""Derivatives beyond the ordinary: third ones, forward mode, torch.func, both sides in low precision."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import pgl_ops
from tests.ops.cases import random_boxes, random_volume
from tests.ops.checks import on

SIZE = (2, 2, 2)
LOSSES = ("voxel_cosine_loss", "aligned_cosine_loss3d")


def problem(backend, dtype=torch.float64):
    """Prediction, features and boxes on the backend's device."""
    boxes = random_boxes(3, 2, (3, 4, 3))
    volumes = random_volume((3, 4, *SIZE), dtype), random_volume((2, 4, 3, 4, 3), dtype, seed=5)
    return *(on(backend.device, volume) for volume in volumes), on(backend.device, boxes)


def loss_of(ops, name, prediction, features, boxes):
    if name == "aligned_cosine_loss3d":
        return ops.aligned_cosine_loss3d(prediction, features, boxes)
    return ops.voxel_cosine_loss(prediction, ops.roi_align3d(features, boxes, SIZE))


def third_derivatives(ops, name, prediction, features, boxes):
    """Of a sum of the loss and something that has third derivatives of its own."""
    tensors = [x.clone().requires_grad_() for x in (prediction, features)]
    value = loss_of(ops, name, *tensors, boxes) + sum((x**3).sum() for x in tensors)
    for _ in range(2):
        gradients = torch.autograd.grad(value, tensors, create_graph=True)
        value = sum((g**2).sum() for g in gradients)
    return torch.autograd.grad(value, tensors)


@pytest.mark.parametrize("name", LOSSES)
def test_third_derivatives_equal_those_of_the_reference(backend, name):
    arguments = problem(backend)
    found = third_derivatives(pgl_ops, name, *arguments)
    expected = third_derivatives(pgl_ops.reference, name, *arguments)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_low_precision_are_those_of_the_two_ops_when_features_need_one(backend, dtype):
    prediction, features, boxes = problem(backend, dtype)
    found = []
    for name in LOSSES:
        tensors = [x.clone().requires_grad_() for x in (prediction, features)]
        found.append(torch.autograd.grad(loss_of(pgl_ops, name, *tensors, boxes), tensors))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_single_channel_has_no_gradient_in_low_precision_either(backend):
    """The cosine of single numbers is a sign; a rounded target must meet norms of that same target."""
    prediction = on(backend.device, random_volume((3, 1, *SIZE), torch.bfloat16).abs() + 0.5).requires_grad_()
    features = on(backend.device, random_volume((2, 1, 3, 4, 3), torch.bfloat16, seed=5).abs() + 0.5)
    boxes = on(backend.device, torch.tensor([[0, 0.3, 0.4, 0.5, 3, 3, 3.0]] * 3))
    loss = pgl_ops.aligned_cosine_loss3d(prediction, features.requires_grad_(), boxes, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", ["roi_align3d", *LOSSES])
def test_forward_mode_is_refused_and_not_taken_for_zero(backend, name, requires_grad):
    prediction, features, boxes = problem(backend)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(features.requires_grad_(requires_grad), torch.ones_like(features))
        with pytest.raises(NotImplementedError, match=r"no forward-mode derivative; pgl_ops.reference has"):
            if name == "roi_align3d":
                pgl_ops.roi_align3d(dual, boxes, SIZE)
            else:
                loss_of(pgl_ops, name, prediction, dual, boxes)
        # What has no tangent is computed as ever.
        assert torch.equal(
            pgl_ops.roi_align3d(prediction, boxes[:0], SIZE), prediction.new_zeros((0, 4, *SIZE))
        )


def test_transforms_of_torch_func_say_what_serves_instead(backend):
    _, features, boxes = problem(backend)
    with pytest.raises(NotImplementedError, match=r"torch.func; torch.autograd can, and pgl_ops.reference"):
        torch.func.grad(lambda x: pgl_ops.roi_align3d(x, boxes, SIZE).sum())(features)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: pgl_ops.roi_align3d(x, boxes, SIZE), (features,), (features,))
    expected = torch.func.grad(lambda x: pgl_ops.reference.roi_align3d(x, boxes, SIZE).sum())(features)
    leaf = features.clone().requires_grad_()
    pgl_ops.roi_align3d(leaf, boxes, SIZE).sum().backward()
    torch.testing.assert_close(leaf.grad, expected)
