"""The plain PyTorch twins agree with the float64 oracle and have the ops' signatures."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch

import pgl_ops
from pgl_ops import reference
from tests.ops import oracle
from tests.ops.cases import (
    FLOATS,
    INTEGERS,
    LAYOUTS,
    RATIOS,
    SCALES,
    laid_out,
    name,
    random_boxes,
    random_flips,
    random_volume,
    vectors,
)
from tests.ops.checks import assert_forward_exact, assert_gradient_exact
from tests.ops.closeness import assert_rounded, slope_bound, sum_dtype
from tests.ops.odd_boxes import BAD_ROWS, UNUSUAL_BOXES, box_of

CPU = torch.device("cpu")
SHAPE = (5, 6, 7)


@pytest.mark.parametrize("op", ["roi_align3d", "voxel_cosine_loss", "aligned_cosine_loss3d"])
def test_signatures_are_those_of_the_ops(op):
    twin, kernel = inspect.signature(getattr(reference, op)), inspect.signature(getattr(pgl_ops, op))
    assert [(p.name, p.default) for p in twin.parameters.values()] == [
        (p.name, p.default) for p in kernel.parameters.values()
    ]


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=name)
def test_roi_align3d_equals_the_oracle(dtype):
    layouts = itertools.cycle(LAYOUTS)
    for ratio, aligned, scale in itertools.product(RATIOS, (True, False), SCALES):
        args = (
            reference.roi_align3d,
            CPU,
            laid_out(random_volume((2, 5, *SHAPE), dtype), next(layouts)),
            random_boxes(4, 2, SHAPE, scale),
            (2, 3, 2),
        )
        options = {
            "what": f"ratio {ratio}, aligned {aligned}, scale {scale}",
            "flips": random_flips(4),
            "spatial_scale": scale,
            "sampling_ratio": ratio,
            "aligned": aligned,
        }
        assert_forward_exact(*args, **options)
        if dtype.is_floating_point:
            assert_gradient_exact(*args, random_volume((4, 5, 2, 3, 2), dtype, seed=3), **options)


@pytest.mark.parametrize("case", UNUSUAL_BOXES)
def test_roi_align3d_of_unusual_boxes(case):
    volume, gradient = random_volume((1, 3, *SHAPE)), random_volume((1, 3, 2, 3, 4), seed=9)
    for ratio, aligned in itertools.product((-1, 2), (True, False)):
        args = reference.roi_align3d, CPU, volume, box_of(UNUSUAL_BOXES[case], SHAPE), (2, 3, 4)
        assert_forward_exact(*args, sampling_ratio=ratio, aligned=aligned)
        assert_gradient_exact(*args, gradient, sampling_ratio=ratio, aligned=aligned)


def test_roi_align3d_of_more_rois_than_one_chunk(monkeypatch):
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 2000)
    volume, boxes = random_volume((2, 3, *SHAPE)), random_boxes(20, 2, SHAPE)
    args = reference.roi_align3d, CPU, volume, boxes, 2
    assert_forward_exact(*args)
    assert_gradient_exact(*args, random_volume((20, 3, 2, 2, 2), seed=9))


def test_roi_align3d_of_more_samples_than_one_chunk(monkeypatch):
    monkeypatch.setattr(reference, "_CHUNK_SAMPLES", 5)
    boxes = random_boxes(6, 2, SHAPE)
    boxes[0, 1:4] -= 40
    for ratio in (-1, 5, 6, 12):
        assert_forward_exact(
            reference.roi_align3d, CPU, random_volume((2, 3, *SHAPE)), boxes, 2, sampling_ratio=ratio
        )


@pytest.mark.parametrize("samples, channels, count", [(2, 3, 0), (2, 0, 2), (0, 3, 0)])
def test_roi_align3d_of_nothing(samples, channels, count):
    volume = torch.zeros(samples, channels, *SHAPE, requires_grad=True)
    out = reference.roi_align3d(volume, random_boxes(count, max(samples, 1), SHAPE), 2)
    assert out.shape == (count, channels, 2, 2, 2)
    assert torch.count_nonzero(torch.autograd.grad(out.sum(), volume)[0]) == 0


@pytest.mark.parametrize("case", BAD_ROWS)
def test_roi_align3d_names_a_bad_row(case):
    entries, scale = BAD_ROWS[case]
    boxes = random_boxes(4, 2, SHAPE, scale)
    for column, value in entries.items():
        boxes[2, column] = value
    with pytest.raises(ValueError, match=r"row 2 of boxes"):
        reference.roi_align3d(torch.zeros(2, 3, *SHAPE), boxes, 2, scale)


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_voxel_cosine_loss_equals_the_oracle(dtype):
    shape = (2, 6, 3, 4, 5)
    prediction = random_volume(shape, dtype, seed=1).requires_grad_()
    target = random_volume(shape, dtype, seed=2).requires_grad_()
    weight = torch.rand(2, 3, 4, 5)
    for reduction, weights in itertools.product(("none", "mean", "sum"), (None, weight)):
        loss = reference.voxel_cosine_loss(prediction, target, weights, reduction)
        assert loss.dtype == sum_dtype(dtype)
        exact = oracle.voxel_cosine_loss(prediction, target, weights, reduction)
        rtol = 1e-13 if dtype == torch.float64 else 2e-6
        torch.testing.assert_close(loss.detach().double(), exact, rtol=rtol, atol=rtol)
        gradients = torch.autograd.grad(loss.sum(), (prediction, target))
        exact = oracle.voxel_cosine_loss_gradients(prediction, target, weights, reduction)
        for got, expected, features in zip(gradients, exact, (prediction, target), strict=True):
            assert_rounded(got, expected, slope_bound(features, weights, reduction), reduction)


@pytest.mark.parametrize(
    "dtype, large, small",
    [(torch.float64, 1e300, 1e-200), (torch.float32, 1e38, 1e-30), (torch.float16, 6e4, 1e-7)],
    ids=lambda v: name(v) if isinstance(v, torch.dtype) else f"{v:g}",
)
def test_voxel_cosine_loss_of_extreme_vectors(dtype, large, small):
    prediction, target = vectors(
        dtype,
        zero=([0.0, 0.0], [1.0, 2.0]),
        large=([large, large], [large, -0.5 * large]),
        small=([small, 2 * small], [3.0, 1.0]),
        parallel=([1.0, 2.0], [2.0, 4.0]),
        antiparallel=([1.0, 2.0], [-2.0, -4.0]),
    )
    prediction.requires_grad_()
    target.requires_grad_()
    loss = reference.voxel_cosine_loss(prediction, target, reduction="none", eps=0.0)
    exact = oracle.voxel_cosine_loss(prediction, target, reduction="none", eps=0.0)
    torch.testing.assert_close(loss.detach().double(), exact, rtol=1e-5, atol=1e-6)
    assert loss.min() >= 0 and loss.max() <= 4
    for gradient in torch.autograd.grad(loss[0, [0, 1, 3, 4]].sum(), (prediction, target)):
        assert gradient.isfinite().all() and torch.count_nonzero(gradient[0, :, 0]) == 0


def test_voxel_cosine_loss_lets_nan_through():
    prediction = torch.tensor([[[float("nan"), 1.0], [0.0, 2.0]]])
    loss = reference.voxel_cosine_loss(prediction, torch.ones(1, 2, 2), reduction="none")
    assert loss.isnan().tolist() == [[True, False]]


@pytest.mark.parametrize("aligned", [True, False])
def test_aligned_cosine_loss3d_equals_the_oracle(aligned):
    features, prediction = random_volume((2, 5, *SHAPE), seed=1), random_volume((3, 5, 2, 3, 2), seed=2)
    boxes, flips, weight = random_boxes(3, 2, SHAPE), random_flips(3), torch.rand(3, 2, 3, 2)
    target = oracle.roi_align3d(features, boxes, (2, 3, 2), 0.8, 2, aligned, flips)
    for reduction in ("none", "mean", "sum"):
        loss = reference.aligned_cosine_loss3d(
            prediction, features, boxes, 0.8, 2, aligned, flips, weight, reduction
        )
        exact = oracle.voxel_cosine_loss(prediction, target, weight, reduction)
        torch.testing.assert_close(loss, exact, rtol=1e-12, atol=1e-12)


def test_all_three_are_differentiable_twice():
    features = random_volume((1, 2, 3, 2, 3), seed=1).requires_grad_()
    prediction = random_volume((2, 2, 1, 2, 2), seed=2).requires_grad_()
    boxes = torch.tensor([[0, 0.2, 0.3, 0.1, 2.7, 1.6, 2.8], [0, 0.4, 0.1, 0.3, 1.9, 1.9, 2.6]])
    target = random_volume((2, 2, 1, 2, 2), seed=3).requires_grad_()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: reference.roi_align3d(x, boxes, 2), features, fast_mode=True)
        assert check(reference.voxel_cosine_loss, (prediction, target), fast_mode=True)
        assert check(
            lambda p, f: reference.aligned_cosine_loss3d(p, f, boxes), (prediction, features), fast_mode=True
        )
