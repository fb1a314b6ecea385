"""aligned_cosine_loss3d equals its parts, forward and backward, without the aligned target in between."""

from __future__ import annotations

import itertools

import pytest
import torch

import pgl_ops
from tests.ops import oracle
from tests.ops.cases import (
    FLOATS,
    LAYOUTS,
    RATIOS,
    SCALES,
    laid_out,
    name,
    random_boxes,
    random_flips,
    random_volume,
)
from tests.ops.checks import moved_keeping_strides, on
from tests.ops.closeness import assert_rounded, slope_bound, sum_dtype
from tests.ops.recording import RecordedCalls

SHAPE = (5, 6, 7)


def alignment_noise(features, boxes, size, **alignment):
    """How much larger a voxel's summands are than their sum, the target: rounding goes with the former."""
    aligned = oracle.norms(oracle.roi_align3d(features, boxes, size, **alignment))
    summands = oracle.norms(oracle.roi_align3d(features.double().abs(), boxes, size, **alignment))
    return torch.where(aligned > 0, 1 + summands / aligned.clamp(min=1e-300), 1.0)


def assert_fused_exact(
    device,
    prediction,
    features,
    boxes,
    weight=None,
    reduction="mean",
    what="",
    with_features=True,
    **alignment,
):
    """Loss and gradients of the op equal the oracle's of its two parts."""
    size = tuple(prediction.shape[2:])
    p = moved_keeping_strides(prediction.detach(), device).requires_grad_()
    f = moved_keeping_strides(features.detach(), device)
    moved = {key: on(device, value) for key, value in alignment.items()}
    arguments = {"weight": on(device, weight), "reduction": reduction, **moved}
    loss = pgl_ops.aligned_cosine_loss3d(p, f, on(device, boxes), **arguments)
    upstream = random_volume(loss.shape, loss.dtype, seed=11)
    (gradient,) = torch.autograd.grad(loss, p, on(device, upstream))

    target = oracle.roi_align3d(features, boxes, size, **alignment)
    noise = alignment_noise(features, boxes, size, **alignment)
    assert loss.dtype == sum_dtype(prediction.dtype), what
    assert gradient.dtype == prediction.dtype, what
    each = 4 * noise * (1.0 if weight is None else weight.double())
    total = 1.0
    if reduction != "none":
        each = each.sum()
        if reduction == "mean":
            total = noise.numel() if weight is None else float(weight.double().sum())
    exact = oracle.voxel_cosine_loss(prediction, target, weight, reduction)
    assert_rounded(loss, exact, each / total, what)
    exact, of_target = oracle.voxel_cosine_loss_gradients(
        prediction, target, weight, reduction, upstream=upstream
    )
    bound = slope_bound(prediction, weight, reduction, upstream) * noise[:, None]
    assert_rounded(gradient, exact, bound, f"{what}, gradient of prediction")

    if not with_features:
        return
    f.requires_grad_()
    loss = pgl_ops.aligned_cosine_loss3d(p, f, on(device, boxes), **arguments)
    both = torch.autograd.grad(loss, (p, f), on(device, upstream))
    assert_rounded(
        both[0], exact, bound * (1 if sum_dtype(p.dtype) == p.dtype else 1e5), f"{what}, with features"
    )
    if sum_dtype(p.dtype) == p.dtype:  # else the aligned target is rounded to half precision on the way
        exact = oracle.roi_align3d_adjoint(of_target, features.shape, boxes, size, **alignment)
        bound = slope_bound(target, weight, reduction, upstream) * noise[:, None]
        bound = bound.expand(target.shape)
        bound = oracle.roi_align3d_adjoint(bound, features.shape, boxes, size, **alignment)
        assert_rounded(both[1], exact, bound, f"{what}, gradient of features")


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_loss_equals_the_oracle_of_its_parts(backend, layout, dtype):
    features = laid_out(random_volume((2, 5, *SHAPE), dtype, seed=1), layout)
    prediction = laid_out(random_volume((3, 5, 2, 3, 2), dtype, seed=2), layout)
    reductions, needs_features = (
        itertools.cycle(("none", "mean", "sum")),
        itertools.cycle([True, *[False] * 3]),
    )
    for ratio, aligned, scale in itertools.product(RATIOS, (True, False), SCALES):
        assert_fused_exact(
            backend.device,
            prediction,
            features,
            random_boxes(3, 2, SHAPE, scale),
            reduction=next(reductions),
            with_features=next(needs_features),
            what=f"ratio {ratio}, aligned {aligned}, scale {scale}",
            flips=random_flips(3),
            spatial_scale=scale,
            sampling_ratio=ratio,
            aligned=aligned,
        )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_fused_loss_with_weights(backend, reduction):
    features = random_volume((2, 5, *SHAPE), torch.float32, seed=1)
    prediction = random_volume((3, 5, 2, 3, 2), torch.float32, seed=2)
    weight = torch.rand(3, 2, 3, 2)
    assert_fused_exact(
        backend.device, prediction, features, random_boxes(3, 2, SHAPE), weight, reduction, "random weights"
    )
    loss = pgl_ops.aligned_cosine_loss3d(
        *on(backend.device, prediction, features, random_boxes(3, 2, SHAPE)),
        weight=on(backend.device, 0 * weight),
    )
    assert loss.item() == 0.0


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_fused_loss_equals_the_composition_of_the_two_ops(backend, dtype):
    # In half precision the fused target is not rounded: the equal is the composition in float32.
    wide = sum_dtype(dtype)
    features = on(backend.device, random_volume((2, 5, *SHAPE), dtype, seed=1))
    prediction = on(backend.device, random_volume((3, 5, 2, 3, 2), dtype, seed=2)).requires_grad_()
    boxes, flips = on(backend.device, random_boxes(3, 2, SHAPE), random_flips(3))
    weight = torch.rand(3, 2, 3, 2, device=backend.device)
    atol = 1e-12 if dtype == torch.float64 else 2e-5
    for reduction in ("none", "mean", "sum"):
        fused = pgl_ops.aligned_cosine_loss3d(
            prediction, features, boxes, 0.8, 2, False, flips, weight, reduction, 1e-6
        )
        target = pgl_ops.roi_align3d(features.to(wide), boxes, (2, 3, 2), 0.8, 2, False, flips)
        parts = pgl_ops.voxel_cosine_loss(prediction.to(wide), target, weight, reduction, 1e-6)
        torch.testing.assert_close(fused, parts, rtol=0, atol=atol)
        gradient, expected = (torch.autograd.grad(loss.sum(), prediction)[0] for loss in (fused, parts))
        torch.testing.assert_close(gradient, expected, rtol=torch.finfo(dtype).eps, atol=atol)


@pytest.mark.parametrize("prediction_layout", LAYOUTS)
@pytest.mark.parametrize("features_layout", LAYOUTS)
def test_prediction_and_features_in_different_layouts(backend, features_layout, prediction_layout):
    features = laid_out(random_volume((2, 6, *SHAPE), torch.float32, seed=1), features_layout)
    prediction = laid_out(random_volume((3, 6, 2, 3, 2), torch.float32, seed=2), prediction_layout)
    assert_fused_exact(backend.device, prediction, features, random_boxes(3, 2, SHAPE))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name)
def test_odd_and_every_other_channel_count(backend, dtype, layout):
    boxes = random_boxes(2, 2, (3, 4, 5))
    for channels in [*range(1, 10), 15, 16, 17, 33, 65, 129]:
        features = laid_out(random_volume((2, channels, 3, 4, 5), dtype, seed=1), layout)
        prediction = laid_out(random_volume((2, channels, 2, 1, 3), dtype, seed=2), layout)
        assert_fused_exact(
            backend.device, prediction, features, boxes, reduction="none", what=f"{channels} channels"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name)
def test_channels_that_start_or_step_between_two_vectors_in_memory(backend, dtype):
    def beside(shape, extra, seed):
        roomy = random_volume((shape[0], *shape[2:], shape[1] + extra), dtype, seed)
        return roomy[..., extra:].movedim(-1, 1)

    for extra in (1, 3, 8):
        features, prediction = beside((2, 16, *SHAPE), extra, 1), beside((3, 16, 2, 3, 2), extra, 2)
        assert_fused_exact(
            backend.device, prediction, features, random_boxes(3, 2, SHAPE), what=f"{extra} elements further"
        )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(1, 1, 131), (2, 70, 3), (33, 1, 5)], ids=str)
def test_grids_longer_than_a_tile(backend, size, layout):
    features = laid_out(random_volume((1, 3, *SHAPE), torch.float32, seed=1), layout)
    prediction = laid_out(random_volume((2, 3, *size), torch.float32, seed=2), layout)
    boxes = torch.tensor([[0, 0.2, 0.1, 0.4, 4.6, 5.7, 6.8], [0, -1.0, 2.0, 3.0, 2.0, 9.0, 5.0]])
    assert_fused_exact(backend.device, prediction, features, boxes, reduction="none")


@pytest.mark.parametrize(
    "dtype, layout, channels",
    [
        (torch.float32, "channels_last", 72),
        (torch.float32, "contiguous", 30),
        (torch.bfloat16, "channels_last", 136),
    ],
    ids=str,
)
def test_more_channels_voxels_and_boxes_than_a_block_takes_at_once(backend, dtype, layout, channels):
    """On CUDA: channels in several parts, tiles along all three axes, more boxes than a grid
    is deep (3 in the host's build)."""
    features = laid_out(random_volume((2, channels, *SHAPE), dtype, seed=1), layout)
    prediction = laid_out(random_volume((5, channels, 9, 9, 10), dtype, seed=2), layout)
    assert_fused_exact(
        backend.device,
        prediction,
        features,
        random_boxes(5, 2, SHAPE),
        torch.rand(5, 9, 9, 10),
        with_features=False,
        sampling_ratio=2,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(2, 3, 4), (1, 1, 1)], ids=str)
def test_voxels_without_channels_are_dead(backend, size, layout, dtype):
    features = on(backend.device, laid_out(torch.randn(1, 0, *SHAPE, dtype=dtype), layout))
    prediction = laid_out(torch.randn(2, 0, *size, dtype=dtype), layout)
    prediction = on(backend.device, prediction).requires_grad_()
    boxes = on(backend.device, random_boxes(2, 1, SHAPE))
    loss = pgl_ops.aligned_cosine_loss3d(prediction, features, boxes)
    assert loss.item() == 2.0
    loss.backward()
    assert prediction.grad.shape == prediction.shape


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_target_outside_the_volume_is_dead(backend, layout):
    features = on(backend.device, laid_out(random_volume((1, 3, *SHAPE), seed=1), layout)).requires_grad_()
    prediction = on(backend.device, laid_out(random_volume((2, 3, 2, 3, 2), seed=2), layout)).requires_grad_()
    boxes = torch.tensor(
        [[0, 20.0, 0.0, 0.0, 25.0, 5.0, 5.0], [0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]], device=backend.device
    )
    loss = pgl_ops.aligned_cosine_loss3d(prediction, features, boxes, reduction="none")
    assert loss.eq(2.0).all()
    for gradient in torch.autograd.grad(loss.sum(), (prediction, features)):
        assert torch.count_nonzero(gradient) == 0


def test_no_boxes(backend):
    features = torch.zeros(2, 3, *SHAPE, device=backend.device, requires_grad=True)
    prediction = torch.zeros(0, 3, 2, 3, 2, device=backend.device, requires_grad=True)
    boxes = torch.zeros(0, 7, device=backend.device)
    for reduction in ("mean", "sum"):
        loss = pgl_ops.aligned_cosine_loss3d(prediction, features, boxes, reduction=reduction)
        assert loss.item() == 0.0
        gradients = torch.autograd.grad(loss, (prediction, features))
        assert gradients[0].shape == prediction.shape and torch.count_nonzero(gradients[1]) == 0
    assert pgl_ops.aligned_cosine_loss3d(prediction, features, boxes, reduction="none").shape == (0, 2, 3, 2)


def test_list_of_boxes_equals_the_tensor(backend):
    features = on(backend.device, random_volume((2, 3, *SHAPE), seed=1))
    prediction = on(backend.device, random_volume((3, 3, 2, 3, 2), seed=2))
    boxes = random_boxes(3, 1, SHAPE)
    boxes[:, 0] = torch.tensor([0.0, 1.0, 1.0])
    listed = [on(backend.device, boxes[:1, 1:]), on(backend.device, boxes[1:, 1:])]
    expected = pgl_ops.aligned_cosine_loss3d(prediction, features, on(backend.device, boxes))
    assert torch.equal(pgl_ops.aligned_cosine_loss3d(prediction, features, listed), expected)


def test_a_bad_row_is_named_or_gives_nan_there_alone(backend):
    features = on(backend.device, random_volume((2, 3, *SHAPE), torch.float32, seed=1))
    prediction = on(backend.device, random_volume((3, 3, 2, 3, 2), torch.float32, seed=2)).requires_grad_()
    for column, value in [(0, 2.0), (0, float("nan")), (3, float("inf")), (5, float("nan")), (6, 3e7)]:
        boxes = random_boxes(3, 2, SHAPE)
        boxes[1, column] = value
        boxes = on(backend.device, boxes)
        if backend.raises_on_bad_boxes:
            with pytest.raises(ValueError, match=r"row 1 of boxes"):
                pgl_ops.aligned_cosine_loss3d(prediction, features, boxes)
            continue
        loss = pgl_ops.aligned_cosine_loss3d(prediction, features, boxes, reduction="none")
        good = pgl_ops.aligned_cosine_loss3d(prediction[[0, 2]], features, boxes[[0, 2]], reduction="none")
        assert loss[1].isnan().all() and torch.equal(loss[[0, 2]], good), (column, value)
        (gradient,) = torch.autograd.grad(loss[[0, 2]].sum(), prediction)
        (expected,) = torch.autograd.grad(good.sum(), prediction)
        assert torch.equal(gradient[[0, 2]], expected[[0, 2]]), (column, value)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradcheck_and_gradgradcheck(backend, reduction, layout):
    pair = [
        on(backend.device, laid_out(random_volume(shape, seed=s), layout)).requires_grad_()
        for s, shape in enumerate([(2, 3, 1, 2, 2), (2, 3, 2, 3, 2)])
    ]
    # Boxes inside: a voxel whose target is 0 would be dead, and next to that nothing is differentiable.
    boxes = torch.tensor([[1, 0.2, 0.3, 0.1, 1.7, 2.6, 1.8], [0, 0.4, 1.1, 0.3, 1.9, 2.9, 1.6]])
    boxes, flips = on(backend.device, boxes, random_flips(2))
    weight = torch.rand(2, 1, 2, 2, dtype=torch.float64, device=backend.device) + 0.1

    def loss(p, f):
        return pgl_ops.aligned_cosine_loss3d(p, f, boxes, 1.0, 2, True, flips, weight, reduction)

    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(loss, pair, fast_mode=True)
        assert check(lambda p: loss(p, pair[1].detach()), pair[:1], fast_mode=True)
        assert check(lambda f: loss(pair[0].detach(), f), pair[1:], fast_mode=True)


def test_the_aligned_target_is_never_formed_when_features_need_no_gradient(backend):
    features = on(backend.device, random_volume((2, 3, *SHAPE), seed=1))
    prediction = on(backend.device, random_volume((3, 3, 2, 3, 2), seed=2)).requires_grad_()
    with RecordedCalls(backend.namespace) as called:
        pgl_ops.aligned_cosine_loss3d(
            prediction, features, on(backend.device, random_boxes(3, 2, SHAPE))
        ).backward()
    assert called.names == ["aligned_cosine_loss3d", "aligned_cosine_loss3d_backward"]


def test_only_what_needs_a_gradient_gets_one(backend):
    features = on(backend.device, random_volume((2, 3, *SHAPE), seed=1))
    prediction = on(backend.device, random_volume((3, 3, 2, 3, 2), seed=2)).requires_grad_()
    boxes = on(backend.device, random_boxes(3, 2, SHAPE)).requires_grad_()
    weight = torch.rand(3, 2, 3, 2, device=backend.device, requires_grad=True)
    pgl_ops.aligned_cosine_loss3d(prediction, features, boxes, weight=weight).backward()
    assert prediction.grad is not None
    assert features.grad is None and boxes.grad is None and weight.grad is None
    loss = pgl_ops.aligned_cosine_loss3d(prediction.detach(), features, boxes, weight=weight)
    assert not loss.requires_grad
    features.requires_grad_()
    pgl_ops.aligned_cosine_loss3d(prediction.detach(), features, boxes, weight=weight).backward()
    assert features.grad is not None and boxes.grad is None and weight.grad is None


def test_arguments_are_never_modified(backend):
    tensors = on(
        backend.device,
        random_volume((3, 3, 2, 3, 2), seed=2),
        random_volume((2, 3, *SHAPE), seed=1),
        random_boxes(3, 2, SHAPE),
        random_flips(3),
        torch.rand(3, 2, 3, 2),
    )
    copies, versions = [t.clone() for t in tensors], [t._version for t in tensors]
    prediction, features, boxes, flips, weight = tensors
    prediction.requires_grad_()
    features.requires_grad_()
    pgl_ops.aligned_cosine_loss3d(prediction, features, boxes, flips=flips, weight=weight).backward()
    pgl_ops.aligned_cosine_loss3d(prediction, features.detach(), boxes, flips=flips, weight=weight).backward()
    assert [t._version for t in tensors] == versions
    assert all(torch.equal(t.detach(), copy) for t, copy in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_same_bits_every_time_with_any_number_of_threads(backend, layout):
    count, channels, size = (8, 5, (2, 3, 4)) if backend.name == "host_cuda" else (100, 17, (6, 7, 8))
    features = laid_out(random_volume((2, channels, 7, 8, 9), torch.float32, seed=1), layout)
    prediction = laid_out(random_volume((count, channels, *size), torch.float32, seed=2), layout)
    features, prediction, boxes = on(backend.device, features, prediction, random_boxes(count, 2, (7, 8, 9)))
    prediction.requires_grad_()
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            both = features.detach().requires_grad_()
            alone = pgl_ops.aligned_cosine_loss3d(prediction, features, boxes)
            loss = pgl_ops.aligned_cosine_loss3d(prediction, both, boxes)
            runs.append(
                [
                    alone,
                    *torch.autograd.grad(alone, prediction),
                    *torch.autograd.grad(loss, (prediction, both)),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
