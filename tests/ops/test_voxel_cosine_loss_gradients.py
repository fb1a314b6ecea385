"""voxel_cosine_loss's gradients: the closed form, 0 where a voxel is dead, repeatable to the bit."""

from __future__ import annotations

import itertools

import pytest
import torch

import pgl_ops
from tests.ops import oracle
from tests.ops.cases import FLOATS, LAYOUTS, laid_out, name, random_volume, vectors
from tests.ops.checks import moved_keeping_strides, on
from tests.ops.closeness import assert_rounded, slope_bound


def assert_gradients_exact(
    device, prediction, target, weight=None, reduction="mean", upstream=None, what="", **options
):
    """Both gradients equal the oracle's; returns them."""
    leaves = [moved_keeping_strides(x.detach(), device).requires_grad_() for x in (prediction, target)]
    loss = pgl_ops.voxel_cosine_loss(*leaves, on(device, weight), reduction, **options)
    sent = torch.ones_like(loss) if upstream is None else moved_keeping_strides(upstream, device)
    gradients = torch.autograd.grad(loss, leaves, sent)
    factor = 1.0 if upstream is None else upstream
    exact = oracle.voxel_cosine_loss_gradients(
        prediction, target, weight, reduction, upstream=factor, **options
    )
    for side, got, expected, features in zip("pz", gradients, exact, (prediction, target), strict=True):
        assert got.dtype == features.dtype, what
        bound = slope_bound(features, weight, reduction, factor)
        assert_rounded(got, expected, bound, f"{what}, gradient of {side}")
    return gradients


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_equal_the_closed_form(backend, layout, dtype):
    shape = (2, 6, 3, 4, 5)
    prediction = laid_out(random_volume(shape, dtype, seed=1), layout)
    target = laid_out(random_volume(shape, dtype, seed=2), layout)
    weight = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(3))
    each = random_volume((2, 3, 4, 5), torch.float64 if dtype == torch.float64 else torch.float32, seed=4)
    for reduction, weights in itertools.product(("none", "mean", "sum"), (None, weight)):
        upstream = each if reduction == "none" else None
        what = f"{reduction}, {'un' if weights is None else ''}weighted"
        assert_gradients_exact(backend.device, prediction, target, weights, reduction, upstream, what)


@pytest.mark.parametrize("spatial", [(), (7,), (3, 5), (2, 3, 2, 3)], ids=str)
def test_any_number_of_spatial_axes(backend, spatial):
    prediction = random_volume((3, 4, *spatial), torch.float32, seed=1)
    target = random_volume((3, 4, *spatial), torch.float32, seed=2)
    for reduction in ("none", "mean"):
        assert_gradients_exact(
            backend.device, prediction, target, torch.rand(3, *spatial), reduction, what=reduction
        )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=name)
def test_odd_and_every_other_channel_count(backend, dtype, layout):
    for channels in [*range(1, 10), 15, 16, 17, 33, 65, 257]:
        shape = (2, channels, 1, 2, 3)
        prediction = laid_out(random_volume(shape, dtype, seed=1), layout)
        target = laid_out(random_volume(shape, dtype, seed=2), layout)
        assert_gradients_exact(
            backend.device, prediction, target, reduction="sum", what=f"{channels} channels"
        )


def test_prediction_and_target_in_different_layouts(backend):
    shape = (2, 5, 3, 4, 5)
    for first, second in itertools.product(LAYOUTS, LAYOUTS):
        prediction = laid_out(random_volume(shape, torch.float32, seed=1), first)
        target = laid_out(random_volume(shape, torch.float32, seed=2), second)
        assert_gradients_exact(backend.device, prediction, target, what=f"{first} against {second}")


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_channels_that_start_or_step_between_two_vectors_in_memory(backend, dtype):
    for extra in (1, 3, 16):
        pair = [
            random_volume((2, 3, 4, 16 + extra), dtype, seed=s)[..., extra:].movedim(-1, 1) for s in (1, 2)
        ]
        assert_gradients_exact(backend.device, *pair, what=f"{extra} elements further")


def test_upstream_gradients_of_any_layout(backend):
    shape = (2, 5, 3, 4, 6)
    prediction, target = random_volume(shape, seed=1), random_volume(shape, seed=2)
    weight = torch.rand(2, 3, 4, 6, dtype=torch.float64)
    upstreams = {
        "expanded from one number": random_volume((1, 1, 1, 1), seed=3).expand(2, 3, 4, 6),
        "expanded over samples": random_volume((1, 3, 4, 6), seed=3).expand(2, 3, 4, 6),
        "expanded over voxels": random_volume((2, 1, 1, 1), seed=3).expand(2, 3, 4, 6),
        "permuted": random_volume((6, 4, 3, 2), seed=3).permute(3, 2, 1, 0),
        "sliced": random_volume((2, 3, 8, 12), seed=3)[:, :, ::2, ::2],
    }
    for what, upstream in upstreams.items():
        assert_gradients_exact(backend.device, prediction, target, weight, "none", upstream, what)


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_dead_voxels_have_a_gradient_of_exactly_zero(backend, dtype):
    prediction, target = vectors(
        dtype,
        both_zero=([0.0, 0.0], [0.0, 0.0]),
        prediction_zero=([0.0, 0.0], [1.0, 2.0]),
        target_zero=([1.0, 2.0], [0.0, 0.0]),
        prediction_small=([6e-4, 6e-4], [6.0, 3.0]),
        target_small=([6.0, 3.0], [6e-4, 6e-4]),
        alive=([8e-4, 8e-4], [6.0, 3.0]),
    )
    for reduction in ("none", "mean", "sum"):
        for gradient in assert_gradients_exact(backend.device, prediction, target, None, reduction, eps=1e-3):
            assert torch.count_nonzero(gradient[0, :, :5]) == 0, reduction
            assert torch.count_nonzero(gradient[0, :, 5]) == 2, reduction
    for eps in (0.0, 1e-8):
        for gradient in assert_gradients_exact(backend.device, prediction, target, eps=eps):
            assert torch.count_nonzero(gradient[0, :, :3]) == 0, eps
            assert gradient.isfinite().all(), eps


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_gradient_vanishes_for_parallel_and_antiparallel_vectors(backend, dtype):
    prediction, target = vectors(
        dtype,
        same=([1.0, 2.0, -3.0], [1.0, 2.0, -3.0]),
        parallel=([1.0, 2.0, -3.0], [4.0, 8.0, -12.0]),
        antiparallel=([1.0, 2.0, -3.0], [-0.5, -1.0, 1.5]),
    )
    for gradient in assert_gradients_exact(backend.device, prediction, target, reduction="sum"):
        assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize(
    "dtype, large",
    [(torch.float64, 1e300), (torch.float32, 1e38), (torch.bfloat16, 1e38), (torch.float16, 6e4)],
    ids=lambda v: name(v) if isinstance(v, torch.dtype) else f"{v:g}",
)
def test_vectors_whose_squares_overflow(backend, dtype, large):
    prediction, target = vectors(
        dtype,
        both=([large, large, -large], [large, -large, large]),
        prediction=([large, 0.5 * large, -large], [1.0, 2.0, 3.0]),
        target=([1.0, 2.0, 3.0], [large, 0.5 * large, -large]),
        half_way=([large, 1.0, 1.0], [1.0, large, 0.0]),
    )
    for gradient in assert_gradients_exact(backend.device, prediction, target, reduction="sum"):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype, small", [(torch.float64, 1e-200), (torch.float32, 1e-30)])
def test_vectors_whose_squares_underflow_are_alive_without_eps(backend, dtype, small):
    prediction, target = vectors(
        dtype,
        one=([small, 0.5 * small, -small], [1.0, 2.0, 3.0]),
        both=([small, 0.0, 0.0], [small, small, 0.0]),
    )
    assert_gradients_exact(backend.device, prediction, target, reduction="sum", eps=0.0)


def test_weights_that_sum_to_zero_give_zero_gradients(backend):
    pair = [random_volume((2, 3, 4), torch.float32, seed=s) for s in (1, 2)]
    for reduction in ("none", "mean", "sum"):
        for gradient in assert_gradients_exact(backend.device, *pair, torch.zeros(2, 4), reduction):
            assert torch.count_nonzero(gradient) == 0, reduction


def test_voxels_of_weight_zero_have_zero_gradient(backend):
    pair = [random_volume((2, 3, 4), torch.float32, seed=s) for s in (1, 2)]
    weight = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.5]])
    for gradient in assert_gradients_exact(backend.device, *pair, weight):
        assert torch.equal((gradient != 0).all(1).cpu(), weight > 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradcheck_and_gradgradcheck(backend, reduction, layout):
    shape = (2, 3, 1, 2, 2)
    pair = [
        moved_keeping_strides(laid_out(random_volume(shape, seed=s), layout), backend.device).requires_grad_()
        for s in (1, 2)
    ]
    weight = on(backend.device, torch.rand(2, 1, 2, 2, dtype=torch.float64) + 0.1)

    def loss(p, z):
        return pgl_ops.voxel_cosine_loss(p, z, weight, reduction)

    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(loss, pair, fast_mode=True)
        assert check(lambda p: loss(p, pair[1].detach()), pair[:1], fast_mode=True)
        assert check(lambda z: loss(pair[0].detach(), z), pair[1:], fast_mode=True)


def test_double_backward_of_dead_voxels_is_finite(backend):
    prediction, target = vectors(dead=([0.0, 0.0], [1.0, 2.0]), alive=([1.0, 3.0], [1.0, 2.0]))
    p, z = (x.requires_grad_() for x in on(backend.device, prediction, target))
    loss = pgl_ops.voxel_cosine_loss(p, z, reduction="sum")
    gradients = torch.autograd.grad(loss, (p, z), create_graph=True)
    second = torch.autograd.grad(sum((g**2).sum() for g in gradients), (p, z))
    for gradient in second:
        assert gradient.isfinite().all() and torch.count_nonzero(gradient[0, :, 0]) == 0
        assert torch.count_nonzero(gradient[0, :, 1]) == 2


def test_only_what_needs_a_gradient_gets_one(backend):
    x, y = on(backend.device, random_volume((2, 3, 4), seed=1), random_volume((2, 3, 4), seed=2))
    weight = torch.rand(2, 4, device=backend.device, requires_grad=True)
    p = x.clone().requires_grad_()
    pgl_ops.voxel_cosine_loss(p, y, weight).backward()
    assert p.grad is not None and y.grad is None and weight.grad is None
    z = y.clone().requires_grad_()
    pgl_ops.voxel_cosine_loss(x, z, weight).backward()
    assert z.grad is not None and x.grad is None
    assert not pgl_ops.voxel_cosine_loss(x, y, weight).requires_grad
    torch.testing.assert_close(z.grad.cpu(), oracle.voxel_cosine_loss_gradients(x, y, weight)[1])


def test_the_same_tensor_on_both_sides_gets_the_sum_of_both_gradients(backend):
    x = on(backend.device, random_volume((2, 3, 4), seed=1)).requires_grad_()
    y = on(backend.device, random_volume((2, 3, 4), seed=2))
    (got,) = torch.autograd.grad(pgl_ops.voxel_cosine_loss(x, x * y), x)
    first, second = oracle.voxel_cosine_loss_gradients(x, x * y)
    torch.testing.assert_close(got.cpu(), first + second * y.cpu())


def test_gradients_follow_the_features_memory_format(backend):
    shape = (2, 3, 2, 3, 4)
    for layout, memory_format in (
        ("contiguous", torch.contiguous_format),
        ("channels_last", torch.channels_last_3d),
    ):
        pair = [
            on(backend.device, laid_out(random_volume(shape, seed=s), layout)).requires_grad_()
            for s in (1, 2)
        ]
        for gradient in torch.autograd.grad(pgl_ops.voxel_cosine_loss(*pair), pair):
            assert gradient.is_contiguous(memory_format=memory_format), layout


def everything(prediction, target, weight):
    pair = [x.detach().requires_grad_() for x in (prediction, target)]
    results = []
    for reduction in ("none", "mean", "sum"):
        loss = pgl_ops.voxel_cosine_loss(*pair, weight, reduction)
        results += [loss.detach(), *torch.autograd.grad(loss.sum(), pair)]
    return results


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_same_bits_every_time_with_any_number_of_threads(backend, layout):
    shape = (2, 3, 3, 7, 8) if backend.name == "host_cuda" else (3, 9, 24, 25, 26)
    case = on(
        backend.device,
        *(laid_out(random_volume(shape, torch.float32, seed=s), layout) for s in (1, 2)),
        torch.rand(shape[0], *shape[2:]),
    )
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(everything(*case))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
