"""roi_align3d where it is easy to be wrong: borders, degenerate and huge boxes, empty tensors, bad rows."""

from __future__ import annotations

import itertools
import math
import time

import pytest
import torch

import pgl_ops
from tests.ops import oracle
from tests.ops.cases import LAYOUTS, laid_out, random_boxes, random_flips, random_volume
from tests.ops.checks import assert_forward_exact, assert_gradient_exact, on
from tests.ops.odd_boxes import BAD_ROWS, UNUSUAL_BOXES, box_of

SHAPE = (5, 6, 7)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", UNUSUAL_BOXES)
def test_unusual_box(backend, case, layout):
    volume = laid_out(random_volume((1, 3, *SHAPE)), layout)
    boxes = box_of(UNUSUAL_BOXES[case], SHAPE)
    gradient = random_volume((1, 3, 2, 3, 4), seed=9)
    for ratio, aligned in itertools.product((-1, 1, 2, 3), (True, False)):
        options = {"sampling_ratio": ratio, "aligned": aligned, "what": f"ratio {ratio}, aligned {aligned}"}
        args = backend.device, volume, boxes, (2, 3, 4)
        assert_forward_exact(pgl_ops.roi_align3d, *args, **options)
        assert_gradient_exact(pgl_ops.roi_align3d, *args, gradient, **options)


@pytest.mark.parametrize("ratio", [-1, 1, 3])
def test_box_wholly_outside_gives_exact_zeros_and_no_gradient(backend, ratio):
    volume = on(backend.device, random_volume((1, 3, *SHAPE))).requires_grad_()
    for case in UNUSUAL_BOXES:
        if "outside" in case:
            out = pgl_ops.roi_align3d(
                volume, on(backend.device, box_of(UNUSUAL_BOXES[case], SHAPE)), 2, sampling_ratio=ratio
            )
            (gradient,) = torch.autograd.grad(out, volume, torch.ones_like(out))
            assert torch.count_nonzero(out) == 0 and torch.count_nonzero(gradient) == 0, case


def test_samples_outside_stay_in_the_average(backend):
    ones = torch.ones(1, 1, 4, 1, 1, dtype=torch.float64)
    # Along D the samples lie at -1.5, -0.5, 0.5 and 1.5: the first is outside.
    boxes = torch.tensor([[0, -1.5, 0.0, 0.0, 2.5, 1.0, 1.0]], dtype=torch.float64)
    out = pgl_ops.roi_align3d(*on(backend.device, ones, boxes), 1, sampling_ratio=(4, 1, 1))
    assert out.item() == 0.75


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_samples_count_from_minus_one_to_the_size_both_included(backend, axis):
    shape = [3, 3, 3]
    shape[axis] = 6
    volume = random_volume((1, 1, *shape))
    first, last = volume.select(2 + axis, 0)[0, 0, 1, 1], volume.select(2 + axis, 5)[0, 0, 1, 1]
    for position, expected in [
        (-1.0, first),
        (math.nextafter(-1.0, -2.0), 0.0),
        (-0.5, first),
        (5.0, last),
        (5.5, last),
        (6.0, last),
        (math.nextafter(6.0, 7.0), 0.0),
    ]:
        point = [1.5, 1.5, 1.5]
        point[axis] = position + 0.5
        assert point[axis] - 0.5 == position  # no bit of the position is lost
        boxes = torch.tensor([[0, *point, *point]], dtype=torch.float64)
        out = pgl_ops.roi_align3d(*on(backend.device, volume, boxes), 1, sampling_ratio=1)
        assert out.item() == float(expected), f"sample at {position!r}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_huge_boxes_are_exact_and_take_no_longer_than_the_volume(backend, layout, dtype):
    # Adaptive, 5e6 samples a bin and axis: visiting each, on 48 x 3 axes, would take minutes.
    volume = laid_out(random_volume((1, 3, *SHAPE), dtype), layout)
    rows = []
    for k in range(48):
        reach = [1.0e7 + 12345.6 * k, 9.0e6 + 777.7 * k, 8.0e6 - 3.3 * k]
        rows.append([0.0, *(-r * (0.1 + 0.015 * k) for r in reach), *(r * (0.9 - 0.015 * k) for r in reach)])
    boxes = torch.tensor(rows, dtype=torch.float64)
    gradient = random_volume((48, 3, 2, 1, 3), dtype, seed=5)
    began = time.perf_counter()
    for aligned in (True, False):
        args = backend.device, volume, boxes, (2, 1, 3)
        assert_forward_exact(pgl_ops.roi_align3d, *args, aligned=aligned, what=f"aligned {aligned}")
        assert_gradient_exact(
            pgl_ops.roi_align3d, *args, gradient, aligned=aligned, what=f"aligned {aligned}"
        )
    assert time.perf_counter() - began < 20


def test_largest_sampling_ratio(backend):
    volume = random_volume((1, 1, *SHAPE))
    boxes = torch.tensor([[0, -0.7, 1.1, 0.6, 5.9, 4.7, 7.9]], dtype=torch.float64)
    # 2**20 weights are summed, which costs some more rounding.
    args = pgl_ops.roi_align3d, backend.device, volume, boxes, 1
    assert_forward_exact(*args, sampling_ratio=(2**20, 1, 2), roundings=2**14)


def test_boxes_as_far_as_two_to_the_24_are_good(backend):
    volume = random_volume((1, 2, *SHAPE))
    far = 2.0**24
    for scale, reach in [(1.0, far), (0.25, 4 * far), (4.0, far / 4)]:
        boxes = torch.tensor([[0, -reach, -reach, -reach, reach, reach, reach]])
        for ratio in (-1, 2):
            assert_forward_exact(
                pgl_ops.roi_align3d,
                backend.device,
                volume,
                boxes,
                3,
                spatial_scale=scale,
                sampling_ratio=ratio,
                what=f"scale {scale}, ratio {ratio}",
            )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 6, 7), (5, 1, 7), (5, 6, 1), (1, 1, 7), (2, 1, 1)], ids=str)
def test_singleton_axes(backend, shape, layout):
    volume = laid_out(random_volume((2, 3, *shape)), layout)
    boxes = random_boxes(6, 2, shape, dtype=torch.float64)
    gradient = random_volume((6, 3, 2, 3, 2), seed=9)
    for ratio, aligned in itertools.product((-1, 1, 2), (True, False)):
        options = {"sampling_ratio": ratio, "aligned": aligned, "what": f"ratio {ratio}, aligned {aligned}"}
        args = backend.device, volume, boxes, (2, 3, 2)
        assert_forward_exact(pgl_ops.roi_align3d, *args, **options)
        assert_gradient_exact(pgl_ops.roi_align3d, *args, gradient, **options)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("samples, channels, count", [(2, 3, 0), (2, 0, 2), (0, 3, 0), (0, 0, 0), (2, 0, 0)])
def test_empty_tensors_give_empty_results_and_zero_gradients(backend, samples, channels, count, layout):
    volume = laid_out(random_volume((samples, channels, *SHAPE), torch.float32), layout)
    volume = on(backend.device, volume).requires_grad_()
    boxes = on(backend.device, random_boxes(count, max(samples, 1), SHAPE))
    flips = on(backend.device, random_flips(count))
    out = pgl_ops.roi_align3d(volume, boxes, (2, 3, 4), flips=flips)
    assert out.shape == (count, channels, 2, 3, 4) and out.dtype == torch.float32
    (gradient,) = torch.autograd.grad(out.sum(), volume)
    assert gradient.shape == volume.shape and torch.count_nonzero(gradient) == 0


def test_empty_list_of_boxes(backend):
    nothing = torch.zeros(0, 6, device=backend.device)
    volume = torch.zeros(2, 3, *SHAPE, device=backend.device)
    assert pgl_ops.roi_align3d(volume, [nothing, nothing], 2).shape == (0, 3, 2, 2, 2)
    assert pgl_ops.roi_align3d(volume[:0], [], 2).shape == (0, 3, 2, 2, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["nan", "inf"])
def test_nan_and_inf_reach_only_the_bins_that_read_them(backend, bad, layout):
    shape = (7, 8, 9)
    values = random_volume((1, 2, *shape))
    values[0, 1, 3, 4, 4] = 0
    spot = torch.zeros_like(values)
    spot[0, 1, 3, 4, 4] = 1
    volume = laid_out(torch.where(spot > 0, bad, values), layout)
    boxes = random_boxes(8, 1, shape, dtype=torch.float64)
    for ratio in (-1, 1, 2):
        for size in (2, 3, 4):
            out = pgl_ops.roi_align3d(*on(backend.device, volume, boxes), size, sampling_ratio=ratio).cpu()
            reads_it = oracle.roi_align3d(spot, boxes, size, sampling_ratio=ratio) > 0
            assert torch.equal(~out.isfinite(), reads_it), f"ratio {ratio}, size {size}"
            exact = oracle.roi_align3d(values, boxes, size, sampling_ratio=ratio)
            torch.testing.assert_close(out[~reads_it], exact[~reads_it], rtol=0, atol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_gradient_reaches_only_the_voxels_that_its_bin_read(backend, layout):
    shape = (7, 8, 9)
    boxes = random_boxes(8, 1, shape, dtype=torch.float64)
    spot = torch.zeros(8, 2, 3, 2, 2, dtype=torch.float64)
    spot[4, 1, 1, 0, 1] = 1
    volume = on(backend.device, laid_out(random_volume((1, 2, *shape)), layout)).requires_grad_()
    for ratio in (-1, 1, 2):
        out = pgl_ops.roi_align3d(volume, on(backend.device, boxes), (3, 2, 2), sampling_ratio=ratio)
        upstream = on(backend.device, torch.where(spot > 0, math.nan, 1.0))
        (gradient,) = torch.autograd.grad(out, volume, upstream)
        read = oracle.roi_align3d_adjoint(spot, volume.shape, boxes, (3, 2, 2), sampling_ratio=ratio) > 0
        assert read.any() and torch.equal(gradient.isnan().cpu(), read), f"ratio {ratio}"


@pytest.mark.parametrize("box_dtype", [torch.float32, torch.float64])
def test_a_bad_row_is_named_or_gives_nan_there_alone(backend, box_dtype):
    volume = on(backend.device, random_volume((2, 3, *SHAPE))).requires_grad_()
    upstream = on(backend.device, random_volume((4, 3, 2, 2, 2), seed=7))
    good, aligned = [0, 1, 3], itertools.cycle([True, True, False])
    for case, (entries, scale) in BAD_ROWS.items():
        boxes = random_boxes(4, 2, SHAPE, scale, box_dtype)
        for column, value in entries.items():
            boxes[2, column] = value
        boxes = on(backend.device, boxes)
        options = {"spatial_scale": scale, "aligned": next(aligned)}
        if backend.raises_on_bad_boxes:
            with pytest.raises(ValueError, match=r"row 2 of boxes"):
                pgl_ops.roi_align3d(volume, boxes, 2, **options)
            continue
        out = pgl_ops.roi_align3d(volume, boxes, 2, **options)
        assert out[2].isnan().all(), case
        expected = pgl_ops.roi_align3d(volume, boxes[good], 2, **options)
        assert torch.equal(out[good], expected), case
        (gradient,) = torch.autograd.grad(out, volume, upstream)
        (expected,) = torch.autograd.grad(expected, volume, upstream[good])
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-13, msg=lambda m, c=case: f"{c}: {m}")


def test_no_sample_to_read_makes_every_row_bad(backend):
    volume = torch.zeros(0, 3, *SHAPE, device=backend.device)
    boxes = torch.tensor([[0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]], device=backend.device)
    if backend.raises_on_bad_boxes:
        with pytest.raises(ValueError, match=r"row 0 of boxes"):
            pgl_ops.roi_align3d(volume, boxes, 2)
    else:
        assert pgl_ops.roi_align3d(volume, boxes, 2).isnan().all()


def test_a_volume_of_more_bytes_than_64_bits_count_is_read_where_it_lies(backend):
    if backend.device.type == "cuda":
        pytest.skip("the same arithmetic on the host for all devices; a GPU has nothing to add")
    volume = torch.ones(1, dtype=torch.float64).expand(1, 1, 2**24, 2**24, 2**13)
    out = pgl_ops.roi_align3d(volume, torch.tensor([[0, 0, 0, 0, 3.0, 3.0, 3.0]]), 1)
    torch.testing.assert_close(out.item(), 1.0, rtol=1e-12, atol=0)


def test_one_bin_over_a_very_long_row_takes_time_and_memory_as_the_row_does(backend):
    width = 2**18
    volume = on(backend.device, torch.arange(width, dtype=torch.float64)[None, None, None, None])
    boxes = on(backend.device, torch.tensor([[0, 0, 0, 0, 1.0, 1.0, width]]))
    # Bins of one voxel's samples, adaptive: the mean of all voxels. Pairs of windows and taps would be 2 GB.
    out = pgl_ops.roi_align3d(volume, boxes, 1)
    torch.testing.assert_close(out.item(), (width - 1) / 2, rtol=1e-12, atol=0)


def test_a_box_whose_length_overflows_is_refused():
    boxes = torch.tensor([[0, -1e308, 0, 0, 1e308, 1, 1]], dtype=torch.float64)
    for op in (pgl_ops.roi_align3d, pgl_ops.reference.roi_align3d):
        with pytest.raises(ValueError, match=r"row 0 of boxes.*expected finite values"):
            op(torch.ones(1, 1, 3, 3, 3), boxes, 2, spatial_scale=(1e-305, 1, 1))


@pytest.mark.parametrize("channels, width, bins", [(8, 8, 3), (16, 3, 2), (16, 9, 4), (4, 8, 2), (2, 16, 2)])
def test_voxels_that_no_bin_reads_are_skipped_in_channels_last_rows_too(backend, channels, width, bins):
    # One sample in a long bin: some voxels along W are read by none.
    volume = laid_out(random_volume((1, channels, 4, 5, width)), "channels_last")
    boxes = torch.tensor([[0, 0.3, 0.2, 0, 3.1, 4.4, width]], dtype=torch.float64)
    gradient = random_volume((1, channels, 2, 3, bins), seed=3)
    args = backend.device, volume, boxes, (2, 3, bins)
    assert_forward_exact(pgl_ops.roi_align3d, *args, sampling_ratio=1)
    assert_gradient_exact(pgl_ops.roi_align3d, *args, gradient, sampling_ratio=1)


def test_rows_with_any_stride_are_read_right_where_their_pitch_is_a_cache_line(backend):
    expanded = random_volume((1, 2, 4, 8, 16))[..., 3:4].expand(-1, -1, -1, -1, 16)
    turned = random_volume((6, 16, 8, 8, 2)).permute(4, 3, 0, 2, 1)
    boxes = torch.tensor([[0, 1.3, 2.2, 0, 3.1, 6.4, 16]], dtype=torch.float64)
    for volume in (expanded, turned):
        assert_forward_exact(pgl_ops.roi_align3d, backend.device, volume, boxes, (2, 3, 16), sampling_ratio=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("begin", [0, 16, 48])
def test_rows_that_begin_within_a_cache_line_are_read_right_where_some_are_skipped(backend, begin, dtype):
    # The rows along H that no bin reads part the plane in runs of rows, each as long as its pitch.
    shape = (1, 1, 6, 48, 64)
    memory = torch.zeros(math.prod(shape) + 16, dtype=dtype)
    skipped = (begin - memory.data_ptr()) % 64 // memory.element_size()
    volume = memory[skipped : skipped + math.prod(shape)].view(shape).copy_(random_volume(shape))
    boxes = torch.tensor([[0, 1.3, 4, 0, 4.7, 44, 64]], dtype=torch.float64)
    assert_forward_exact(pgl_ops.roi_align3d, backend.device, volume, boxes, (3, 8, 32), sampling_ratio=1)


def test_samples_at_the_edge_are_decided_by_operations_that_are_rounded_one_by_one(backend):
    """A sample of each box lies on the volume's far edge, but for the last bit: fused, or in another order,
    the same operations would decide some of them otherwise."""
    size, bins, ratio, scale, count = SHAPE, 7, 3, 0.37, 600
    generator = torch.Generator().manual_seed(0)

    def drawn(low, high):
        return low + (high - low) * torch.rand(count, 3, generator=generator, dtype=torch.float64)

    lo, edge = drawn(-3, 3), torch.tensor(size, dtype=torch.float64)
    # Which sample of which bin it is, in bins from the box's start.
    place = (drawn(0, bins).floor() + (drawn(0, ratio).floor() + 0.5) / ratio) / bins
    hi = lo + (edge + 0.5 - scale * lo) / (scale * place)
    landed = (scale * lo - 0.5) + (scale * (hi - lo)) * place
    assert ((landed - edge).abs() < 1e-13).all() and 0.1 < (landed > edge).double().mean() < 0.9
    boxes = on(backend.device, torch.cat([torch.zeros(count, 1, dtype=torch.float64), lo, hi], 1))
    volume = on(backend.device, torch.ones(1, 1, *size, dtype=torch.float64))
    options = {"output_size": bins, "spatial_scale": scale, "sampling_ratio": ratio}
    found = pgl_ops.roi_align3d(volume, boxes, **options)
    # On the CPU, whose operations are those of the formula.
    expected = pgl_ops.reference.roi_align3d(volume.cpu(), boxes.cpu(), **options)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-12)
