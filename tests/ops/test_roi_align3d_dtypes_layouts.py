"""roi_align3d's dtypes and memory formats: what comes out, and coordinates in full precision."""

from __future__ import annotations

import itertools

import pytest
import torch

import pgl_ops
from tests.ops.cases import (
    FLOATS,
    INTEGERS,
    LAYOUTS,
    laid_out,
    name,
    random_boxes,
    random_flips,
    random_volume,
)
from tests.ops.checks import assert_forward_exact, assert_gradient_exact, moved_keeping_strides, on

SHAPE = (4, 5, 6)


# The first whole number that the dtype does not hold: coordinates and indices rounded to it would miss.
FIRST_INEXACT = {torch.bfloat16: 257, torch.float16: 2049}


@pytest.mark.parametrize("dtype", FIRST_INEXACT, ids=name)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_half_precision_with_coordinates_beyond_256(backend, axis, dtype):
    first = FIRST_INEXACT[dtype]
    shape = [1, 1, 1]
    shape[axis] = first + 30
    volume = random_volume((1, 1, *shape), dtype)
    low, high, size = [0.0] * 3, [1.0] * 3, [1] * 3
    size[axis] = 3
    rows = []
    for begin, end in [(0.25, 3.5), (2.1, 5.7), (9.3, 20.6), (-1.6, 30.4)]:
        low[axis], high[axis] = first + begin, first + end
        rows.append([0.0, *low, *high])
    boxes = torch.tensor(rows)
    gradient = random_volume((len(rows), 1, *size), dtype, seed=3)
    assert_forward_exact(pgl_ops.roi_align3d, backend.device, volume, boxes, size)
    assert_gradient_exact(pgl_ops.roi_align3d, backend.device, volume, boxes, size, gradient)


@pytest.mark.parametrize("dtype", FIRST_INEXACT, ids=name)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_half_precision_with_batch_indices_beyond_256(backend, layout, dtype):
    first = FIRST_INEXACT[dtype]
    volume = laid_out(random_volume((first + 5, 2, 1, 1, 2), dtype), layout)
    boxes = random_boxes(5, 1, (1, 1, 2))
    boxes[:, 0] = torch.tensor([first, first + 2, 0, first + 4, first - 1])
    gradient = random_volume((5, 2, 1, 1, 1), dtype, seed=3)
    assert_forward_exact(pgl_ops.roi_align3d, backend.device, volume, boxes, 1)
    assert_gradient_exact(pgl_ops.roi_align3d, backend.device, volume, boxes, 1, gradient)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
def test_half_precision_sums_are_held_in_float32(backend, dtype):
    # 16**3 samples of 1 + one ulp: summed in half precision they would stall or drift far off.
    volume = torch.full((1, 1, 16, 16, 16), 1 + torch.finfo(dtype).eps, dtype=dtype)
    boxes = torch.tensor([[0, 0.0, 0.0, 0.0, 16.0, 16.0, 16.0]])
    out = pgl_ops.roi_align3d(*on(backend.device, volume, boxes), 1)
    assert out.item() == 1 + torch.finfo(dtype).eps
    gradient = torch.full((1, 1, 1, 1, 1), 4096 * (1 + torch.finfo(dtype).eps), dtype=dtype)
    assert_gradient_exact(pgl_ops.roi_align3d, backend.device, volume, boxes, 1, gradient)


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_largest_values_average_to_themselves_without_overflow(backend, dtype):
    # Weights and sums are at most 1 here: neither 65504 nor 3e38 may become inf on the way.
    largest = torch.finfo(dtype).max / (1 if dtype == torch.float16 else 2)
    volume = torch.full((1, 1, 4, 4, 4), largest, dtype=dtype)
    boxes = torch.tensor([[0, 0.0, 0.0, 0.0, 4.0, 4.0, 4.0]])
    out = pgl_ops.roi_align3d(*on(backend.device, volume, boxes), 2)
    assert torch.equal(out.cpu(), torch.full((1, 1, 2, 2, 2), largest, dtype=dtype))


@pytest.mark.parametrize("dtype", INTEGERS, ids=name)
def test_integer_extremes_keep_their_sign_and_value(backend, dtype):
    info = torch.iinfo(dtype)
    values = torch.tensor([info.min, info.max, 0, 1, info.max - 1, info.min + 1, 127, 128], dtype=dtype)
    volume = values.reshape(1, 1, 1, 1, 8)
    boxes = torch.tensor([[0, 0.0, 0.0, 0.0, 1.0, 1.0, 8.0]])
    out = pgl_ops.roi_align3d(*on(backend.device, volume, boxes), (1, 1, 8))
    assert out.dtype == torch.float32
    assert out.flatten().tolist() == [float(v) for v in values]


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=name)
def test_output_and_gradient_follow_the_inputs_memory_format(backend, dtype):
    boxes, flips = on(backend.device, random_boxes(3, 2, SHAPE), random_flips(3))
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}
    for layout, memory_format in formats.items():
        volume = on(backend.device, laid_out(random_volume((2, 3, *SHAPE), dtype), layout))
        assert volume.is_contiguous(memory_format=memory_format)
        volume.requires_grad_(dtype.is_floating_point)
        out = pgl_ops.roi_align3d(volume, boxes, (2, 3, 4), flips=flips)
        assert out.is_contiguous(memory_format=memory_format), layout
        if dtype.is_floating_point:
            (gradient,) = torch.autograd.grad(out, volume, torch.ones_like(out))
            assert gradient.is_contiguous(memory_format=memory_format), layout


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=name)
def test_values_do_not_depend_on_the_memory_layout(backend, dtype):
    values = random_volume((3, 4, *SHAPE), dtype)
    boxes = random_boxes(4, 3, SHAPE)
    roomy = torch.zeros(3, 9, 5, 7, 13, dtype=dtype)
    roomy[:, 1:9:2, 1:, 2:, 1::2] = values
    views = {
        **{layout: laid_out(values, layout) for layout in LAYOUTS},
        "slice of a larger tensor": roomy[:, 1:9:2, 1:, 2:, 1::2],
        "axes in reverse order": values.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0),
        "spatial axes exchanged": values.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2),
        "batch innermost": values.movedim(0, -1).contiguous().movedim(-1, 0),
    }
    for what, view in views.items():
        assert torch.equal(view, values), what
        assert_forward_exact(pgl_ops.roi_align3d, backend.device, view, boxes, (2, 3, 2), what=what)


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=name)
def test_volumes_that_start_or_step_between_two_vectors_in_memory(backend, dtype):
    # Vectors of 16 bytes cannot be loaded there: one element further, or voxels an odd number of bytes apart.
    values = random_volume((2, 16, *SHAPE), dtype)
    gradient = random_volume((3, 16, 2, 3, 2), dtype, seed=3)
    boxes = random_boxes(3, 2, SHAPE)

    def beside(tensor, layout, extra):
        """The tensor behind ``extra`` more channels, or ``extra`` elements into a contiguous memory."""
        if layout == "channels_last":
            roomy = torch.zeros(
                tensor.shape[0], *tensor.shape[2:], tensor.shape[1] + extra, dtype=tensor.dtype
            )
            view = roomy[..., extra:].movedim(-1, 1)
        else:
            view = torch.zeros(tensor.numel() + extra, dtype=tensor.dtype)[extra:].view(tensor.shape)
        return view.copy_(tensor)

    for layout in ("contiguous", "channels_last"):
        for extra in (1, 3, 16):
            args = backend.device, beside(values, layout, extra), boxes, (2, 3, 2)
            what = f"{layout}, {extra} elements further"
            assert_forward_exact(pgl_ops.roi_align3d, *args, what=what)
            if dtype.is_floating_point:
                upstream = beside(gradient, layout, extra)
                assert_gradient_exact(pgl_ops.roi_align3d, *args, upstream, what=what)


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (3, 4), (0, 1, 2, 3, 4)], ids=str)
def test_expanded_input_is_read_with_its_strides(backend, axes):
    shape = [2, 3, *SHAPE]
    source = [1 if axis in axes else size for axis, size in enumerate(shape)]
    volume = random_volume(source).expand(shape)
    boxes = random_boxes(4, 2, SHAPE)
    gradient = random_volume((4, 3, 2, 2, 2), seed=3)
    assert_forward_exact(pgl_ops.roi_align3d, backend.device, volume, boxes, 2)
    assert_gradient_exact(pgl_ops.roi_align3d, backend.device, volume, boxes, 2, gradient)


def test_boxes_and_flips_are_read_with_their_strides(backend):
    volume = on(backend.device, random_volume((2, 3, *SHAPE)))
    boxes, flips = random_boxes(4, 2, SHAPE), random_flips(4)
    expected = pgl_ops.roi_align3d(volume, on(backend.device, boxes), 2, flips=on(backend.device, flips))
    wide = torch.zeros(8, 14)
    wide[::2, ::2] = boxes
    many = torch.zeros(3, 8, dtype=torch.bool)
    many[:, ::2] = flips.t()
    strided = moved_keeping_strides(wide, backend.device)[::2, ::2]
    mirrored = moved_keeping_strides(many, backend.device)[:, ::2].t()
    assert not strided.is_contiguous() and not mirrored.is_contiguous()
    assert torch.equal(pgl_ops.roi_align3d(volume, strided, 2, flips=mirrored), expected)
    one_for_all = torch.tensor([[True, False, True]], device=backend.device).expand(4, 3)
    expected = pgl_ops.roi_align3d(volume, strided, 2, flips=one_for_all.contiguous())
    assert torch.equal(pgl_ops.roi_align3d(volume, strided, 2, flips=one_for_all), expected)


def test_arguments_are_never_modified(backend):
    volume = on(backend.device, random_volume((2, 3, *SHAPE))).requires_grad_()
    boxes = on(backend.device, random_boxes(4, 2, SHAPE))
    flips = on(backend.device, random_flips(4))
    upstream = on(backend.device, random_volume((4, 3, 2, 2, 2), seed=5))
    arguments = (volume, boxes, flips, upstream)
    copies = [a.detach().clone() for a in arguments]
    versions = [a._version for a in arguments]
    for ratio, aligned in itertools.product((-1, 2), (True, False)):
        out = pgl_ops.roi_align3d(volume, boxes, 2, 1.0, ratio, aligned, flips)
        torch.autograd.grad(out, volume, upstream)
    assert [a._version for a in arguments] == versions
    assert all(torch.equal(a.detach(), copy) for a, copy in zip(arguments, copies, strict=True))


def test_result_never_shares_memory_with_the_input(backend):
    volume = on(backend.device, random_volume((1, 1, 4, 4, 4)))
    boxes = torch.tensor([[0, 0.0, 0.0, 0.0, 4.0, 4.0, 4.0]], device=backend.device)
    out = pgl_ops.roi_align3d(volume, boxes, 4)
    assert torch.equal(out, volume)
    out.zero_()
    assert torch.count_nonzero(volume) > 0
