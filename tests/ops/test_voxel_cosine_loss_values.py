"""voxel_cosine_loss's values: against closed forms in float64, and vectors where a naive formula breaks."""

from __future__ import annotations

import itertools

import pytest
import torch

import pgl_ops
from tests.ops import oracle
from tests.ops.cases import FLOATS, LAYOUTS, laid_out, name, random_volume, vectors
from tests.ops.checks import moved_keeping_strides, on
from tests.ops.closeness import sum_dtype

# cos is a sum of at most 1 in magnitude: this many roundings of the summing dtype are allowed.
ROUNDINGS = 24


def tolerance(dtype: torch.dtype) -> float:
    return ROUNDINGS * torch.finfo(sum_dtype(dtype)).eps


def assert_loss_exact(device, prediction, target, weight=None, reduction="mean", what="", **options):
    """The op's loss equals the oracle's; returns it."""
    loss = pgl_ops.voxel_cosine_loss(
        moved_keeping_strides(prediction, device),
        moved_keeping_strides(target, device),
        on(device, weight),
        reduction,
        **options,
    )
    exact = oracle.voxel_cosine_loss(prediction, target, weight, reduction, **options)
    assert loss.dtype == sum_dtype(prediction.dtype), what
    assert loss.shape == exact.shape, what
    if reduction == "none":
        allowed = tolerance(prediction.dtype) * (1 if weight is None else weight.double().clamp(min=1e-300))
    elif reduction == "sum":
        voxels = prediction.numel() / max(prediction.shape[1], 1)
        allowed = tolerance(prediction.dtype) * (voxels if weight is None else float(weight.sum()))
    else:
        allowed = tolerance(prediction.dtype)
    error = (loss.cpu().double() - exact).abs()
    assert bool((error <= allowed).all()), (
        f"{what}: off by {float(error.max()):.3g}, expected {exact}, got {loss}"
    )
    return loss


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_equals_the_oracle(backend, layout, dtype):
    shape = (2, 6, 3, 4, 5)
    prediction = laid_out(random_volume(shape, dtype, seed=1), layout)
    target = laid_out(random_volume(shape, dtype, seed=2), layout)
    weight = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(3))
    for reduction, weights in itertools.product(("none", "mean", "sum"), (None, weight)):
        what = f"{reduction}, {'un' if weights is None else ''}weighted"
        assert_loss_exact(backend.device, prediction, target, weights, reduction, what)


@pytest.mark.parametrize("spatial", [(), (7,), (3, 5), (2, 3, 4), (2, 3, 2, 3)], ids=str)
def test_any_number_of_spatial_axes(backend, spatial):
    for layout in LAYOUTS if spatial else ("contiguous",):
        prediction = laid_out(random_volume((3, 4, *spatial), torch.float32, seed=1), layout)
        target = laid_out(random_volume((3, 4, *spatial), torch.float32, seed=2), layout)
        weight = torch.rand(3, *spatial)
        for reduction in ("none", "mean", "sum"):
            assert_loss_exact(backend.device, prediction, target, weight, reduction, f"{layout}, {reduction}")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=name)
def test_odd_and_every_other_channel_count(backend, dtype, layout):
    for channels in [*range(1, 10), 15, 16, 17, 31, 33, 63, 64, 65, 255, 257]:
        shape = (2, channels, 1, 2, 3)
        prediction = laid_out(random_volume(shape, dtype, seed=1), layout)
        target = laid_out(random_volume(shape, dtype, seed=2), layout)
        assert_loss_exact(backend.device, prediction, target, reduction="none", what=f"{channels} channels")


@pytest.mark.parametrize("voxels", [1, 31, 32, 33, 127, 128, 129, 255, 256, 257, 1023, 1025, 5000])
def test_every_voxel_counts_once_in_the_mean_and_the_sum(backend, voxels):
    if backend.name == "host_cuda":
        voxels = min(voxels, 2100)
    for layout in ("contiguous", "channels_last"):
        prediction = laid_out(random_volume((1, 2, voxels), torch.float32, seed=1), layout)
        target = laid_out(random_volume((1, 2, voxels), torch.float32, seed=2), layout)
        for reduction in ("mean", "sum"):
            assert_loss_exact(backend.device, prediction, target, reduction=reduction, what=layout)


def test_prediction_and_target_in_different_layouts(backend):
    shape = (2, 5, 3, 4, 5)
    for first, second in itertools.product(LAYOUTS, LAYOUTS):
        prediction = laid_out(random_volume(shape, torch.float32, seed=1), first)
        target = laid_out(random_volume(shape, torch.float32, seed=2), second)
        assert_loss_exact(backend.device, prediction, target, what=f"{first} against {second}")


def test_weight_in_any_layout_and_float_dtype(backend):
    shape = (2, 5, 3, 4, 5)
    prediction = random_volume(shape, torch.float32, seed=1)
    target = random_volume(shape, torch.float32, seed=2)
    weight = torch.randint(0, 9, (2, 3, 4, 5)) / 8
    for dtype in FLOATS:
        views = {
            "contiguous": weight.to(dtype),
            "permuted": weight.to(dtype).permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
            "sliced": torch.stack([weight, weight], dim=-1).to(dtype)[..., 0],
            "expanded": weight[:, :1].to(dtype).expand(2, 3, 4, 5),
        }
        for what, view in views.items():
            view = moved_keeping_strides(view, backend.device)
            for reduction in ("none", "mean"):
                loss = pgl_ops.voxel_cosine_loss(*on(backend.device, prediction, target), view, reduction)
                exact = oracle.voxel_cosine_loss(prediction, target, view, reduction)
                torch.testing.assert_close(
                    loss.cpu().double(),
                    exact,
                    rtol=0,
                    atol=4e-6,
                    msg=lambda m, w=what, d=dtype: f"{w} {d}: {m}",
                )


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_parallel_antiparallel_and_orthogonal_vectors(backend, dtype):
    prediction, target = vectors(
        dtype,
        same=([1.0, 2.0, -3.0], [1.0, 2.0, -3.0]),
        parallel=([1.0, 2.0, -3.0], [4.0, 8.0, -12.0]),
        antiparallel=([1.0, 2.0, -3.0], [-0.5, -1.0, 1.5]),
        orthogonal=([1.0, 2.0, 0.0], [-2.0, 1.0, 5.0]),
        sixty_degrees=([1.0, 1.0, 0.0], [0.0, 1.0, 1.0]),
    )
    loss = assert_loss_exact(backend.device, prediction, target, reduction="none").cpu().double()
    expected = torch.tensor([[0.0, 0.0, 4.0, 2.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(loss, expected, rtol=0, atol=tolerance(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_loss_stays_within_zero_and_four(backend, dtype):
    # Rounding makes |cos| of parallel vectors exceed 1 now and then: cos is clamped.
    x = random_volume((1, 7, 4000 if backend.name != "host_cuda" else 500), dtype)
    same = pgl_ops.voxel_cosine_loss(*on(backend.device, x, 2 * x), reduction="none")
    opposite = pgl_ops.voxel_cosine_loss(*on(backend.device, x, -x), reduction="none")
    assert same.min() >= 0 and same.max() <= tolerance(dtype)
    assert opposite.max() <= 4 and opposite.min() >= 4 - tolerance(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_a_voxel_with_a_zero_or_sub_eps_vector_is_dead_and_costs_two(backend, dtype):
    prediction, target = vectors(
        dtype,
        both_zero=([0.0, 0.0], [0.0, 0.0]),
        prediction_zero=([0.0, 0.0], [1.0, 2.0]),
        target_zero=([1.0, 2.0], [0.0, 0.0]),
        prediction_small=([6e-4, 6e-4], [6.0, 6.0]),
        target_small=([6.0, 6.0], [6e-4, 6e-4]),
        just_large_enough=([8e-4, 8e-4], [6.0, 6.0]),
    )
    loss = assert_loss_exact(backend.device, prediction, target, reduction="none", eps=1e-3)
    assert loss[0, :5].tolist() == [2.0] * 5
    assert loss[0, 5].item() == pytest.approx(0.0, abs=1e-2)
    for eps in (0.0, 1e-8):
        loss = assert_loss_exact(backend.device, prediction, target, reduction="none", eps=eps)
        assert loss[0, :3].tolist() == [2.0] * 3, eps
        assert loss[0, 3:].tolist() == pytest.approx([0.0] * 3, abs=1e-2), eps


def test_default_eps_is_1e_minus_8(backend):
    prediction, target = vectors(
        torch.float32, below=([9e-9, 0.0], [1.0, 0.0]), above=([1.1e-8, 0.0], [1.0, 0.0])
    )
    loss = pgl_ops.voxel_cosine_loss(*on(backend.device, prediction, target), reduction="none")
    assert loss[0].tolist() == pytest.approx([2.0, 0.0], abs=1e-6)


@pytest.mark.parametrize(
    "dtype, large",
    [(torch.float64, 1e300), (torch.float32, 1e38), (torch.bfloat16, 1e38), (torch.float16, 6e4)],
    ids=lambda v: name(v) if isinstance(v, torch.dtype) else f"{v:g}",
)
def test_vectors_whose_squares_overflow(backend, dtype, large):
    prediction, target = vectors(
        dtype,
        both=([large, large, -large], [large, -large, large]),
        one=([large, 0.5 * large, -large], [1.0, 2.0, 3.0]),
        same=([large, large, large], [large, large, large]),
        mixed=([large, 1.0, 1.0], [1.0, large, 0.0]),
    )
    loss = assert_loss_exact(backend.device, prediction, target, reduction="none")
    assert loss[0, 0].item() == pytest.approx(2 + 2 / 3, rel=1e-5)
    assert_loss_exact(backend.device, prediction, target, reduction="mean")


@pytest.mark.parametrize(
    "dtype, small", [(torch.float64, 1e-200), (torch.float32, 1e-30), (torch.bfloat16, 1e-30)]
)
def test_vectors_whose_squares_underflow_are_alive_without_eps(backend, dtype, small):
    prediction, target = vectors(
        dtype,
        both=([small, small, -small], [small, -small, small]),
        one=([small, 0.5 * small, -small], [1.0, 2.0, 3.0]),
        extremes=([small, 0.5 * small, -small], [1 / small, 2 / small, 3 / small]),
    )
    assert_loss_exact(backend.device, prediction, target, reduction="none", eps=0.0)


def test_many_channels_that_would_overflow_half_precision_sums(backend):
    for dtype in (torch.float16, torch.bfloat16):
        prediction = random_volume((1, 300, 4), dtype, seed=1) * 100
        target = random_volume((1, 300, 4), dtype, seed=2) * 100
        assert_loss_exact(backend.device, prediction, target, reduction="none", what=dtype)


def test_weighted_mean_divides_by_the_sum_of_the_weights(backend):
    prediction, target = vectors(
        first=([1.0, 0.0], [1.0, 0.0]), second=([1.0, 0.0], [0.0, 1.0]), third=([1.0, 0.0], [-1.0, 0.0])
    )  # losses 0, 2 and 4
    for weight, expected in [
        ([1, 1, 0], 1.0),
        ([0, 1, 3], 3.5),
        ([0, 0, 0.25], 4.0),
        ([1e-30, 0, 1e-30], 2.0),
    ]:
        weight = torch.tensor([weight], dtype=torch.float64)
        loss = pgl_ops.voxel_cosine_loss(*on(backend.device, prediction, target, weight))
        assert loss.item() == pytest.approx(expected, rel=1e-12), weight


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_weights_that_sum_to_zero_give_a_mean_of_zero(backend, dtype):
    x, y = random_volume((2, 3, 4), dtype, seed=1), random_volume((2, 3, 4), dtype, seed=2)
    zeros = torch.zeros(2, 4)
    for reduction in ("mean", "sum"):
        loss = pgl_ops.voxel_cosine_loss(*on(backend.device, x, y, zeros), reduction)
        assert loss.item() == 0.0, reduction
    loss = pgl_ops.voxel_cosine_loss(*on(backend.device, x, y, zeros), "none")
    assert torch.count_nonzero(loss) == 0


def test_weight_of_another_float_dtype_is_taken_at_its_value(backend):
    x, y = random_volume((1, 3, 4), seed=1), random_volume((1, 3, 4), seed=2)
    weight = torch.tensor([[0.5, 0.25, 2.0, 0.0]])
    expected = oracle.voxel_cosine_loss(x, y, weight)
    for dtype in FLOATS:
        loss = pgl_ops.voxel_cosine_loss(*on(backend.device, x, y, weight.to(dtype)))
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss.cpu(), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("shape", [(0, 3, 2, 2, 2), (2, 3, 0, 2, 2), (0, 0, 4), (0, 5)], ids=str)
def test_no_voxels(backend, shape):
    x = torch.zeros(shape, device=backend.device, requires_grad=True)
    for weight in (None, torch.zeros(shape[0], *shape[2:], device=backend.device)):
        none, mean, total = (
            pgl_ops.voxel_cosine_loss(x, x.detach(), weight, reduction)
            for reduction in ("none", "mean", "sum")
        )
        assert none.shape == (shape[0], *shape[2:])
        assert mean.item() == 0.0 and total.item() == 0.0
        (gradient,) = torch.autograd.grad(none.sum() + mean + total, x)
        assert gradient.shape == x.shape


def test_no_channels_means_dead_voxels(backend):
    x = torch.zeros(2, 0, 3, device=backend.device, requires_grad=True)
    loss = pgl_ops.voxel_cosine_loss(x, x.detach(), reduction="none")
    assert loss.tolist() == [[2.0] * 3] * 2
    assert torch.autograd.grad(loss.sum(), x)[0].shape == (2, 0, 3)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_shows_in_its_own_voxel_alone(backend, layout):
    shape = (2, 5, 2, 3, 4)
    for side in (0, 1):
        pair = [random_volume(shape, torch.float32, seed=1), random_volume(shape, torch.float32, seed=2)]
        exact = oracle.voxel_cosine_loss(*pair, reduction="none")
        pair[side][1, 3, 0, 2, 1] = float("nan")
        pair = [on(backend.device, laid_out(x, layout)) for x in pair]
        loss = pgl_ops.voxel_cosine_loss(*pair, reduction="none").cpu().double()
        assert loss[1, 0, 2, 1].isnan() and loss.isnan().sum() == 1
        torch.testing.assert_close(loss[~loss.isnan()], exact[~loss.isnan()], rtol=0, atol=4e-6)
        assert pgl_ops.voxel_cosine_loss(*pair).isnan()


def test_nan_among_zeros_is_not_taken_for_a_dead_voxel(backend):
    nan = float("nan")
    prediction, target = vectors(
        torch.float32,
        first=([nan, 0.0, 0.0], [1.0, 2.0, 3.0]),
        middle=([0.0, nan, 0.0], [1.0, 2.0, 3.0]),
        last=([0.0, 0.0, nan], [1.0, 2.0, 3.0]),
        with_large=([nan, 1e30, 0.0], [1.0, 2.0, 3.0]),
        in_target=([1.0, 2.0, 3.0], [nan, 0.0, 0.0]),
        good=([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),
    )
    prediction, target = on(backend.device, prediction, target)
    loss = pgl_ops.voxel_cosine_loss(prediction.requires_grad_(), target, reduction="none")
    assert loss[0].isnan().tolist() == [True] * 5 + [False]
    (gradient,) = torch.autograd.grad(loss.sum(), prediction)
    assert gradient[0].isnan().all(0).tolist() == [True] * 5 + [False]


def test_defaults_are_unweighted_mean_and_eps_1e_minus_8(backend):
    x, y = on(backend.device, random_volume((2, 3, 4), seed=1), random_volume((2, 3, 4), seed=2))
    spelt_out = pgl_ops.voxel_cosine_loss(x, y, weight=None, reduction="mean", eps=1e-8)
    assert torch.equal(pgl_ops.voxel_cosine_loss(x, y), spelt_out)


def test_arguments_are_never_modified(backend):
    tensors = on(backend.device, *(random_volume((2, 3, 4), seed=s) for s in (1, 2)), torch.rand(2, 4))
    copies = [t.clone() for t in tensors]
    versions = [t._version for t in tensors]
    tensors[0].requires_grad_()
    tensors[1].requires_grad_()
    for reduction in ("none", "mean", "sum"):
        pgl_ops.voxel_cosine_loss(*tensors, reduction).sum().backward()
    assert [t._version for t in tensors] == versions
    assert all(torch.equal(t.detach(), copy) for t, copy in zip(tensors, copies, strict=True))
