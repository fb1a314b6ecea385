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


def of_itself(ops, name, prediction, features, boxes):
    return loss_of(ops, name, prediction, features, boxes)


def squared(ops, name, prediction, features, boxes):
    return loss_of(ops, name, prediction, features, boxes) ** 2


def times_its_prediction(ops, name, prediction, features, boxes):
    return loss_of(ops, name, prediction, features, boxes) * prediction.pow(2).sum()


def of_features_that_follow_the_prediction(ops, name, prediction, features, boxes):
    return loss_of(ops, name, prediction, features * prediction.sum() + prediction.mean(), boxes)


def derivative(function, order, create_graph, ops, name, prediction, features, boxes):
    """The gradient of a function with terms of its own, for order 2 of the squares of that gradient, …"""
    tensors = [x.clone().requires_grad_() for x in (prediction, features)]
    value = function(ops, name, *tensors, boxes) + sum((x**3).sum() for x in tensors)
    for _ in range(order - 1):
        gradients = torch.autograd.grad(value, tensors, create_graph=True)
        value = sum((g**2).sum() for g in gradients)
    return torch.autograd.grad(value, tensors, create_graph=create_graph)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(
    "function", [of_itself, squared, times_its_prediction, of_features_that_follow_the_prediction]
)
@pytest.mark.parametrize("name", LOSSES)
def test_higher_derivatives_equal_those_of_the_reference(backend, name, function, order, create_graph):
    arguments = problem(backend)
    found = derivative(function, order, create_graph, pgl_ops, name, *arguments)
    expected = derivative(function, order, create_graph, pgl_ops.reference, name, *arguments)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_a_batch_of_gradients_are_those_of_one_after_another(backend, name):
    prediction, features, boxes = problem(backend)
    prediction.requires_grad_()

    def each_voxel(prediction):
        if name == "aligned_cosine_loss3d":
            return pgl_ops.aligned_cosine_loss3d(prediction, features, boxes, reduction="none").flatten()[:5]
        target = pgl_ops.roi_align3d(features * prediction.sum(), boxes, SIZE)
        return pgl_ops.voxel_cosine_loss(prediction, target, reduction="none").flatten()[:5]

    found = []
    for vectorize in (False, True):
        rows = torch.autograd.functional.jacobian(
            each_voxel, prediction, create_graph=True, vectorize=vectorize
        )
        found.append(torch.autograd.grad(rows.square().sum() + prediction.square().sum(), prediction)[0])
    assert (found[0] - 2 * prediction).abs().max() > 1e-3  # the rows have a gradient
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


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
