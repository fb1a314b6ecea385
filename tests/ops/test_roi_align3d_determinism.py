"""roi_align3d gives the same bits every time, with any number of threads."""

from __future__ import annotations

import pytest
import torch

import pgl_ops
from tests.ops.cases import laid_out, name, random_boxes, random_flips, random_volume
from tests.ops.checks import on

LOW_AND_FULL = [torch.float32, torch.float16]


def overlapping(backend, layout, dtype):
    """1000 RoIs on two small samples, so that hundreds add to every voxel; fewer where threads are fibers."""
    count = 60 if backend.name == "host_cuda" else 1000
    shape = (6, 9, 10)
    volume = laid_out(random_volume((2, 9, *shape), dtype), layout)
    upstream = laid_out(random_volume((count, 9, 2, 3, 3), dtype, seed=4), layout)
    return on(backend.device, volume, random_boxes(count, 2, shape), random_flips(count), upstream)


def forward_and_gradient(volume, boxes, flips, upstream):
    volume = volume.detach().requires_grad_()
    out = pgl_ops.roi_align3d(volume, boxes, (2, 3, 3), sampling_ratio=2, flips=flips)
    return out.detach(), torch.autograd.grad(out, volume, upstream)[0]


@pytest.fixture
def restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", LOW_AND_FULL, ids=name)
def test_overlapping_rois_give_the_same_bits_every_time(backend, dtype, layout):
    case = overlapping(backend, layout, dtype)
    first = forward_and_gradient(*case)
    for _ in range(1 if backend.name == "host_cuda" else 4):
        torch.full((1 << 18,), float("nan"), device=backend.device)  # leaves other bytes in freed memory
        again = forward_and_gradient(*case)
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", LOW_AND_FULL, ids=name)
def test_the_number_of_threads_changes_no_bit(backend, dtype, layout, restored_threads):
    case = overlapping(backend, layout, dtype)
    torch.set_num_threads(1)
    alone = forward_and_gradient(*case)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        together = forward_and_gradient(*case)
        assert torch.equal(together[0], alone[0]) and torch.equal(together[1], alone[1]), f"{threads} threads"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_roi_does_not_depend_on_the_others(backend, layout):
    volume, boxes, flips, _ = overlapping(backend, layout, torch.float32)
    together = pgl_ops.roi_align3d(volume, boxes, (2, 3, 3), flips=flips)
    for k in (0, 17, 59):
        alone = pgl_ops.roi_align3d(volume, boxes[k : k + 1], (2, 3, 3), flips=flips[k : k + 1])
        assert torch.equal(alone[0], together[k]), k


# Sizes whose rows, bins and channels leave some over from what kernels take together.
LEFT_OVER = [(1, (2, 9, 16)), (3, (2, 3, 16)), (5, (1, 7, 5)), (9, (2, 4, 3)), (1, (1, 2, 70))]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels, size", LEFT_OVER)
@pytest.mark.parametrize("ratio", [1, 2])
def test_flips_change_no_bit_but_reverse_the_output(backend, channels, size, ratio, layout):
    volume = on(backend.device, laid_out(random_volume((1, channels, 6, 32, 40), torch.float32), layout))
    boxes = torch.tensor([[0, 1.3, 3.3, 5.1, 4.7, 27.9, 30.4]], device=backend.device)
    plain = pgl_ops.roi_align3d(volume, boxes, size, sampling_ratio=ratio)
    for axis in range(3):
        flips = torch.zeros(1, 3, dtype=torch.bool, device=backend.device)
        flips[0, axis] = True
        flipped = pgl_ops.roi_align3d(volume, boxes, size, sampling_ratio=ratio, flips=flips)
        assert torch.equal(flipped, plain.flip(2 + axis)), axis


@pytest.mark.parametrize("channels, size", LEFT_OVER)
def test_a_channel_does_not_depend_on_the_others(backend, channels, size):
    volume = on(backend.device, random_volume((1, channels, 6, 32, 40), torch.float32))
    boxes = torch.tensor([[0, 1.3, 3.3, 5.1, 4.7, 27.9, 30.4]], device=backend.device)
    together = pgl_ops.roi_align3d(volume, boxes, size, sampling_ratio=1)
    for c in range(channels):
        alone = pgl_ops.roi_align3d(volume[:, c : c + 1], boxes, size, sampling_ratio=1)
        assert torch.equal(alone, together[:, c : c + 1]), c


def test_deterministic_mode_needs_nothing_else(backend):
    case = overlapping(backend, "contiguous", torch.float32)
    expected = forward_and_gradient(*case)
    torch.use_deterministic_algorithms(True)
    try:
        got = forward_and_gradient(*case)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
