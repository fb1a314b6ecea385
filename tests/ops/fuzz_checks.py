"""Runs one case of the fuzzer on a set of kernels: a correct result, or an error that tells what is wrong."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import pgl_ops
from pgl_ops import reference
from tests.ops import oracle
from tests.ops.cases import random_volume
from tests.ops.closeness import ROUNDINGS_OF_A_SUM, assert_rounded, slope_bound, sum_dtype
from tests.ops.guarded import GuardedMemory

GUARDED = GuardedMemory()
# A weight this small may be none in float32.
_NEGLIGIBLE = 1e-30
# Roundings of adaptive sums over many samples, relative to the sum of the magnitudes.
ROUNDINGS = 4 * ROUNDINGS_OF_A_SUM


def _options(case: dict) -> dict:
    names = ("spatial_scale", "sampling_ratio", "aligned", "flips")
    return {name: case[name] for name in names}


def _on(backend, *tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors on the backend's device; their gradients come back."""
    return [tensor if tensor is None else tensor.to(backend.device) for tensor in tensors]


def _boxes(case: dict) -> Tensor:
    return case["box_memory"].place(case["boxes"], GUARDED)


def _refuses(backend, case: dict, call) -> bool:
    """Whether the case has a row that the kernels must refuse; if they raise, that they do."""
    if case["bad"] is None:
        return False
    if backend.raises_on_bad_boxes:
        with pytest.raises(ValueError, match=rf"row {case['bad']} of boxes"):
            call()
    return True


def _split_bad(case: dict) -> tuple[Tensor, Tensor]:
    """The boxes with the bad row's replaced by a good one, and which rows are good, Tensor[K]."""
    boxes, good = case["boxes"].clone(), torch.ones(len(case["boxes"]), dtype=torch.bool)
    if case["bad"] is not None:
        boxes[case["bad"]] = 0.0
        good[case["bad"]] = False
    return boxes, good


def check_alignment(backend, case: dict) -> None:
    """``roi_align3d`` against the oracle: forward, backward and double backward."""
    GUARDED.clear()
    options, size, dtype = _options(case), case["output_size"], case["dtype"]
    original = random_volume(case["volume"], dtype, case["seed"])
    floating = dtype.is_floating_point
    poisoned = torch.zeros(case["volume"], dtype=torch.bool)
    if case["poison"] is not None and floating and original.numel() and not case["memory"].expanded:
        poisoned = torch.rand(case["volume"], generator=torch.Generator().manual_seed(case["seed"])) < 0.02
        original[poisoned] = case["poison"]
    volume, boxes = case["memory"].place(original, GUARDED), _boxes(case)
    before, boxes_before = volume.clone(), boxes.clone()

    def call() -> Tensor:
        (flips,) = _on(backend, options["flips"])
        return pgl_ops.roi_align3d(*_on(backend, leaf, boxes), size, **{**options, "flips": flips}).cpu()

    leaf = volume.detach().requires_grad_(floating)
    if _refuses(backend, case, call) and backend.raises_on_bad_boxes:
        return
    out = call()
    good_boxes, good = _split_bad(case)
    assert out.dtype == (dtype if floating else torch.float32)
    assert bool(out[~good].isnan().all()), "the output of a row that cannot be sampled is not NaN"
    finite = torch.where(poisoned, 0, volume)
    exact = oracle.roi_align3d(finite, good_boxes, size, **options)
    magnitude = oracle.roi_align3d(finite.double().abs(), good_boxes, size, **options)
    reach = torch.zeros_like(exact)
    if bool(poisoned.any()):
        reach = oracle.roi_align3d(poisoned, good_boxes, size, **options)
    got = out.detach()
    # A bin over a whole volume adds up its voxels along each axis in turn; equal ones all round the same way.
    roundings = max(ROUNDINGS, sum(case["volume"][2:]))
    clean = good[:, None, None, None, None] & (reach == 0)
    touched = good[:, None, None, None, None] & (reach > _NEGLIGIBLE)
    assert not bool(got[touched].isfinite().any()), "a voxel that is not finite was lost"
    assert_rounded(
        torch.where(clean, got, 0), torch.where(clean, exact, 0.0), magnitude, "forward", roundings
    )
    assert torch.equal(boxes, boxes_before) or case["bad"] is not None
    assert bool(((volume == before) | before.isnan()).all()), "the input was changed"
    if not floating:
        return

    upstream = random_volume(out.shape, dtype, case["seed"] + 1)
    upstream = case["grad_memory"].place(upstream, GUARDED).requires_grad_()
    (gradient,) = torch.autograd.grad(out, leaf, upstream, create_graph=True)
    kept = torch.where(good[:, None, None, None, None], upstream.detach(), 0)
    exact = oracle.roi_align3d_adjoint(kept, volume.shape, good_boxes, size, **options)
    magnitude = oracle.roi_align3d_adjoint(kept.double().abs(), volume.shape, good_boxes, size, **options)
    assert gradient.dtype == dtype
    assert_rounded(gradient, exact, magnitude, "backward", ROUNDINGS)
    if case["bad"] is None and gradient.requires_grad:
        direction = random_volume(volume.shape, dtype, case["seed"] + 2)
        (second,) = torch.autograd.grad(gradient, upstream, direction)
        exact = oracle.roi_align3d(direction, good_boxes, size, **options)
        magnitude = oracle.roi_align3d(direction.double().abs(), good_boxes, size, **options)
        assert_rounded(second, exact, magnitude, "double backward", roundings)


def _weight(case: dict, shape, seed: int) -> Tensor | None:
    if not case["weighted"]:
        return None
    weight = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return weight * (weight > 0.2)


def _loss_roundings(channels: int) -> float:
    return 8 * ROUNDINGS_OF_A_SUM + channels


def _assert_loss(
    loss: Tensor, exact: Tensor, weight: Tensor | None, case: dict, channels: int, extra=0.0
) -> None:
    eps = torch.finfo(loss.dtype).eps * _loss_roundings(channels)
    largest = 1.0
    if case["reduction"] != "mean" and weight is not None:
        largest = float(weight.max()) if weight.numel() else 0.0
    count = 1 if case["reduction"] != "sum" else max(1, case["count"])
    allowed = (eps * 4 + extra) * max(largest, 1e-3) * count
    assert loss.shape == exact.shape
    error = (loss.detach().double() - exact).abs()
    assert bool((error <= allowed).all()), f"the loss is off by {float(error.max()):.3g}, allowed {allowed}"


def check_loss(backend, case: dict) -> None:
    """``voxel_cosine_loss`` against the oracle, with the gradients to both sides; twice in float64."""
    GUARDED.clear()
    shape, dtype = case["shape"], case["dtype"]
    sides = []
    for i, memory in enumerate((case["memory"], case["target_memory"])):
        side = random_volume(shape, dtype, case["seed"] + i) * case["magnitude"]
        if case["zeros"] and side.numel():
            dead = torch.rand((shape[0], 1, *shape[2:]), generator=torch.Generator().manual_seed(i)) < 0.2
            side = torch.where(dead, 0, side)
        sides.append(memory.place(side, GUARDED).requires_grad_())
    weight = _weight(case, (shape[0], *shape[2:]), case["seed"])
    loss = pgl_ops.voxel_cosine_loss(*_on(backend, *sides, weight), case["reduction"]).cpu()
    case = {**case, "count": math.prod([shape[0], *shape[2:]])}
    exact = oracle.voxel_cosine_loss(*sides, weight, case["reduction"])
    _assert_loss(loss, exact, weight, case, shape[1])
    upstream = torch.ones_like(loss)
    if case["reduction"] == "none":
        upstream = random_volume(loss.shape, loss.dtype, 7)
    gradients = torch.autograd.grad(loss, sides, upstream, create_graph=dtype == torch.float64)
    truths = oracle.voxel_cosine_loss_gradients(*sides, weight, case["reduction"], upstream=upstream)
    for side, gradient, truth in zip(sides, gradients, truths, strict=True):
        assert gradient.dtype == dtype
        bound = slope_bound(side, weight, case["reduction"], upstream).expand(truth.shape)
        assert_rounded(gradient, truth, bound, "gradient", _loss_roundings(shape[1]))
    if dtype == torch.float64 and gradients[0].numel() and gradients[0].requires_grad:
        directions = [random_volume(shape, dtype, s) for s in (11, 12)]
        second = torch.autograd.grad(gradients, sides, directions)
        twins = [side.detach().clone().requires_grad_() for side in sides]
        twin = reference.voxel_cosine_loss(*twins, weight, case["reduction"])
        firsts = torch.autograd.grad(twin, twins, upstream, create_graph=True)
        for got, want in zip(second, torch.autograd.grad(firsts, twins, directions), strict=True):
            assert bool(got.isfinite().all())
            torch.testing.assert_close(
                got, want.nan_to_num(), rtol=1e-5, atol=1e-5 * float(want.abs().nan_to_num().max())
            )


def check_fused(backend, case: dict) -> None:
    """``aligned_cosine_loss3d`` against the oracle's two steps, with the gradient to the prediction."""
    GUARDED.clear()
    options, size, dtype = _options(case), case["output_size"], case["dtype"]
    rois, channels = len(case["boxes"]), case["volume"][1]
    features = case["memory"].place(random_volume(case["volume"], dtype, case["seed"]), GUARDED)
    prediction = random_volume((rois, channels, *size), dtype, case["seed"] + 1)
    prediction = case["prediction_memory"].place(prediction, GUARDED).requires_grad_()
    boxes, weight = _boxes(case), _weight(case, (rois, *size), case["seed"])

    def call() -> Tensor:
        flips, there = _on(backend, options["flips"], weight)
        return pgl_ops.aligned_cosine_loss3d(
            *_on(backend, prediction, features, boxes),
            **{**options, "flips": flips},
            weight=there,
            reduction=case["reduction"],
        ).cpu()

    refused = _refuses(backend, case, call)
    if refused and backend.raises_on_bad_boxes:
        return
    loss = call()
    upstream = torch.ones_like(loss)
    (gradient,) = torch.autograd.grad(loss, prediction, upstream)
    assert gradient.shape == prediction.shape and gradient.dtype == dtype
    if refused:
        return
    target = oracle.roi_align3d(features, case["boxes"], size, **options)
    magnitude = oracle.roi_align3d(features.double().abs(), case["boxes"], size, **options)
    # Where a target is a small difference of large terms its direction is not known well, or not at all.
    norms, sums = target.norm(dim=1), magnitude.norm(dim=1)
    blur = ROUNDINGS * torch.finfo(sum_dtype(dtype)).eps * sums / norms.clamp(min=1e-300)
    blur = torch.where(sums == 0, 0.0, blur)
    unsure = (blur > 1e-2) | ((sums > 0) & (norms < 1e-6))
    exact = oracle.voxel_cosine_loss(prediction, target, weight, case["reduction"])
    (truth, _) = oracle.voxel_cosine_loss_gradients(prediction, target, weight, case["reduction"])
    case = {**case, "count": math.prod([rois, *size])}
    if case["reduction"] == "none":
        kept = torch.where(unsure, 0.0, exact)
        extra = 8 * torch.where(unsure, 0.0, blur).max() if blur.numel() else 0.0
        _assert_loss(torch.where(unsure, 0, loss), kept, weight, case, channels, float(extra))
    elif not bool(unsure.any()):
        extra = 8 * blur.max() if blur.numel() else 0.0
        _assert_loss(loss, exact, weight, case, channels, float(extra))
    bound = slope_bound(prediction, weight, case["reduction"]).expand(truth.shape)
    known = ~unsure[:, None].expand(truth.shape)
    roundings = _loss_roundings(channels)
    blurred = bound * (1 + 8 * blur[:, None] / (roundings * torch.finfo(sum_dtype(dtype)).eps / 2))
    assert_rounded(
        torch.where(known, gradient, 0), torch.where(known, truth, 0.0), blurred, "fused gradient", roundings
    )


CHECKS = {
    "roi_align3d": check_alignment,
    "voxel_cosine_loss": check_loss,
    "aligned_cosine_loss3d": check_fused,
}
