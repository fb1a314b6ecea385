"""roi_align3d's gradient: the adjoint of the forward, to any order, for gradients in any memory layout."""

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
from tests.ops.checks import assert_gradient_exact, moved_keeping_strides, on


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_equals_the_transposed_oracle(backend, layout, dtype):
    shape = (5, 6, 7)
    volume = laid_out(random_volume((2, 5, *shape), dtype), layout)
    gradient = laid_out(random_volume((4, 5, 2, 3, 2), dtype, seed=3), layout)
    for ratio, aligned, scale in itertools.product(RATIOS, (True, False), SCALES):
        boxes = random_boxes(4, 2, shape, scale, torch.float64 if aligned else torch.float32)
        assert_gradient_exact(
            pgl_ops.roi_align3d,
            backend.device,
            volume,
            boxes,
            (2, 3, 2),
            gradient,
            what=f"ratio {ratio}, aligned {aligned}, scale {scale}",
            flips=random_flips(4),
            spatial_scale=scale,
            sampling_ratio=ratio,
            aligned=aligned,
        )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=name)
def test_every_channel_count_up_to_a_vector_and_beyond(backend, layout, dtype):
    shape = (3, 4, 3)
    boxes = random_boxes(3, 2, shape)
    for channels in [*range(1, 10), 15, 16, 17, 31, 32, 33]:
        volume = laid_out(random_volume((2, channels, *shape), dtype), layout)
        gradient = laid_out(random_volume((3, channels, 2, 2, 2), dtype, seed=3), layout)
        assert_gradient_exact(
            pgl_ops.roi_align3d, backend.device, volume, boxes, 2, gradient, what=f"{channels} channels"
        )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape, output_size",
    [((3, 9, 40), (3, 5, 70)), ((33, 2, 3), (40, 1, 1)), ((2, 37, 5), (1, 9, 3))],
    ids=str,
)
def test_volumes_and_outputs_longer_than_a_tile(backend, layout, shape, output_size):
    volume = laid_out(random_volume((1, 2, *shape), torch.float32), layout)
    boxes = torch.tensor(
        [[0.0, 0.0, 0.0, 0.0, *map(float, shape)], [0.0, 0.3, 0.1, 0.2, *(0.9 * s for s in shape)]]
    )
    gradient = laid_out(random_volume((2, 2, *output_size), torch.float32, seed=3), layout)
    assert_gradient_exact(pgl_ops.roi_align3d, backend.device, volume, boxes, output_size, gradient)


def test_many_rois_on_few_voxels_in_any_order_of_samples(backend):
    shape = (4, 5, 6)
    boxes = random_boxes(40, 3, shape)
    boxes[:, 0] = torch.where(boxes[:, 0] == 1, 2.0, boxes[:, 0])  # sample 1 has none
    volume = random_volume((3, 2, *shape), torch.float32)
    gradient = random_volume((40, 2, 2, 2, 3), torch.float32, seed=3)
    got = assert_gradient_exact(pgl_ops.roi_align3d, backend.device, volume, boxes, (2, 2, 3), gradient)
    assert torch.count_nonzero(got[1]) == 0


def test_voxels_that_no_bin_reads_have_exactly_zero_gradient(backend):
    boxes = torch.tensor([[0, 1.2, 2.1, 1.3, 2.9, 4.2, 3.6], [0, 4.1, 4.4, 4.2, 5.6, 6.3, 5.9]])
    volume = on(backend.device, random_volume((1, 2, 7, 8, 9))).requires_grad_()
    for ratio in (-1, 1, 3):
        out = pgl_ops.roi_align3d(volume, on(backend.device, boxes), 2, sampling_ratio=ratio)
        (gradient,) = torch.autograd.grad(out, volume, torch.ones_like(out))
        ones = torch.ones(out.shape)
        read = oracle.roi_align3d_adjoint(ones, volume.shape, boxes, 2, sampling_ratio=ratio) > 0
        assert torch.equal(gradient.cpu() != 0, read), f"ratio {ratio}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("aligned", [True, False])
def test_backward_is_the_adjoint_of_forward(backend, aligned, layout):
    shape = (6, 7, 8)
    for ratio, scale in itertools.product((-1, 2), SCALES):
        x = on(backend.device, laid_out(random_volume((2, 4, *shape)), layout)).requires_grad_()
        boxes = on(backend.device, random_boxes(5, 2, shape, scale))
        out = pgl_ops.roi_align3d(
            x, boxes, (2, 3, 4), scale, ratio, aligned, on(backend.device, random_flips(5))
        )
        g = on(backend.device, random_volume(out.shape, seed=8))
        (transposed,) = torch.autograd.grad(out, x, g)
        torch.testing.assert_close((out * g).sum(), (x * transposed).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck_and_gradgradcheck(backend, layout):
    shape = (2, 1, 3)
    values = moved_keeping_strides(laid_out(random_volume((1, 2, *shape)), layout), backend.device)
    boxes, flips = on(backend.device, random_boxes(2, 1, shape, 0.5), random_flips(2))
    for ratio, aligned in ((-1, True), (2, False)):

        def op(x, ratio=ratio, aligned=aligned):
            return pgl_ops.roi_align3d(x, boxes, (2, 1, 2), 0.5, ratio, aligned, flips)

        x = values.detach().requires_grad_()
        assert torch.autograd.gradcheck(op, x)
        assert torch.autograd.gradgradcheck(op, x, fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_double_backward_is_the_forward_again(backend, dtype, layout):
    # The op is linear: differentiating <v, A^T g> with respect to g gives A v.
    shape = (4, 5, 6)
    x = moved_keeping_strides(laid_out(random_volume((2, 3, *shape), dtype), layout), backend.device)
    v = moved_keeping_strides(laid_out(random_volume((2, 3, *shape), dtype, seed=6), layout), backend.device)
    boxes, flips = on(backend.device, random_boxes(4, 2, shape), random_flips(4))
    x.requires_grad_()
    out = pgl_ops.roi_align3d(x, boxes, 2, flips=flips)
    g = on(backend.device, random_volume(out.shape, dtype, seed=7)).requires_grad_()
    (transposed,) = torch.autograd.grad(out, x, g, create_graph=True)
    (again,) = torch.autograd.grad(transposed, g, v)
    expected = pgl_ops.roi_align3d(v, boxes, 2, flips=flips)
    assert again.dtype == dtype
    torch.testing.assert_close(again, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_expanded_gradients_are_read_with_their_strides(backend, layout):
    shape = (4, 5, 6)
    volume = laid_out(random_volume((2, 3, *shape)), layout)
    boxes = random_boxes(4, 2, shape)
    full = (4, 3, 2, 3, 2)
    for source in [(1, 1, 1, 1, 1), (4, 1, 1, 1, 1), (1, 3, 1, 1, 1), (1, 1, 2, 1, 2), (4, 3, 1, 3, 1)]:
        gradient = random_volume(source, seed=4).expand(full)
        assert_gradient_exact(
            pgl_ops.roi_align3d, backend.device, volume, boxes, (2, 3, 2), gradient, what=f"from {source}"
        )


def test_gradient_of_a_sum_arrives_expanded_and_is_right(backend):
    shape = (4, 5, 6)
    boxes = random_boxes(4, 2, shape)
    x = on(backend.device, random_volume((2, 3, *shape))).requires_grad_()
    pgl_ops.roi_align3d(x, on(backend.device, boxes), 2).sum().backward()
    exact = oracle.roi_align3d_adjoint(torch.ones(4, 3, 2, 2, 2), x.shape, boxes, 2)
    torch.testing.assert_close(x.grad.cpu(), exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("input_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("gradient_layout", [*LAYOUTS, "permuted", "reversed axes", "sliced channels"])
def test_gradients_in_any_memory_layout(backend, gradient_layout, input_layout):
    shape = (4, 5, 6)
    volume = laid_out(random_volume((2, 3, *shape)), input_layout)
    boxes = random_boxes(4, 2, shape)
    if gradient_layout == "permuted":
        gradient = random_volume((2, 3, 4, 4, 3), seed=4).permute(3, 4, 2, 1, 0)
    elif gradient_layout == "reversed axes":
        gradient = random_volume((2, 4, 3, 3, 4), seed=4).permute(4, 3, 1, 2, 0)
    elif gradient_layout == "sliced channels":
        gradient = random_volume((4, 7, 4, 3, 2), seed=4)[:, 1::2]
    else:
        gradient = laid_out(random_volume((4, 3, 4, 3, 2), seed=4), gradient_layout)
    assert_gradient_exact(pgl_ops.roi_align3d, backend.device, volume, boxes, (4, 3, 2), gradient)


def test_gradient_accumulates_over_calls(backend):
    shape = (4, 5, 6)
    boxes = random_boxes(3, 1, shape)
    x = on(backend.device, random_volume((1, 2, *shape))).requires_grad_()
    for _ in range(2):
        pgl_ops.roi_align3d(x, on(backend.device, boxes), 2).sum().backward()
    exact = 2 * oracle.roi_align3d_adjoint(torch.ones(3, 2, 2, 2, 2), x.shape, boxes, 2)
    torch.testing.assert_close(x.grad.cpu(), exact, rtol=0, atol=1e-13)


def test_boxes_get_no_gradient(backend):
    x = on(backend.device, random_volume((1, 2, 4, 5, 6))).requires_grad_()
    boxes = on(backend.device, random_boxes(3, 1, (4, 5, 6))).requires_grad_()
    pgl_ops.roi_align3d(x, boxes, 2).sum().backward()
    assert boxes.grad is None and x.grad is not None
    assert not pgl_ops.roi_align3d(x.detach(), boxes, 2).requires_grad


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_boxes_are_cut_off_even_where_they_need_no_gradient_yet(backend):
    x = on(backend.device, random_volume((1, 2, 4, 5, 6)))
    boxes = on(backend.device, random_boxes(3, 1, (4, 5, 6)))
    # A graph that was made with such boxes may be called with boxes that a network has computed.
    traced = torch.jit.trace(lambda x, boxes: pgl_ops.roi_align3d(x, boxes, 2), (x, boxes))
    assert not traced(x, boxes.clone().requires_grad_()).requires_grad
    # The saved boxes are the call's own tensor: what becomes of the caller's changes no gradient.
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(pgl_ops.roi_align3d(leaf, boxes, 2).sum(), leaf)
    out = pgl_ops.roi_align3d(leaf, boxes, 2)
    boxes.data = boxes / 2
    (got,) = torch.autograd.grad(out.sum(), leaf)
    assert torch.equal(got, expected)
    # Nor do tangents pass.
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(boxes, torch.ones_like(boxes))
        assert pgl_ops.roi_align3d(leaf, dual, 2).requires_grad


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16], ids=name)
def test_integer_input_gives_a_result_without_gradient(backend, dtype):
    volume = on(backend.device, random_volume((1, 2, 4, 5, 6), dtype))
    out = pgl_ops.roi_align3d(volume, on(backend.device, random_boxes(3, 1, (4, 5, 6))), 2)
    assert out.dtype == torch.float32 and not out.requires_grad
