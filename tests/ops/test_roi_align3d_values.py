"""roi_align3d's values: against the float64 oracle, published numbers and closed forms."""

from __future__ import annotations

import itertools

import pytest
import torch

import pgl_ops
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
)
from tests.ops.checks import assert_forward_exact, on

ALL_FLIPS = list(itertools.product([False, True], repeat=3))


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_equals_the_oracle(backend, layout, dtype):
    shape = (6, 7, 9)
    volume = laid_out(random_volume((2, 5, *shape), dtype), layout)
    for ratio, aligned, scale in itertools.product(RATIOS, (True, False), SCALES):
        box_dtype = torch.float64 if aligned else torch.float32
        boxes = random_boxes(4, 2, shape, scale, box_dtype)
        assert_forward_exact(
            pgl_ops.roi_align3d,
            backend.device,
            volume,
            boxes,
            (2, 3, 2),
            what=f"ratio {ratio}, aligned {aligned}, scale {scale}",
            flips=random_flips(4),
            spatial_scale=scale,
            sampling_ratio=ratio,
            aligned=aligned,
        )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.uint8], ids=name)
def test_every_channel_count_up_to_a_vector_and_beyond(backend, layout, dtype):
    shape = (3, 4, 5)
    boxes = random_boxes(3, 2, shape)
    for channels in [*range(1, 10), 15, 16, 17, 31, 32, 33]:
        volume = laid_out(random_volume((2, channels, *shape), dtype), layout)
        assert_forward_exact(
            pgl_ops.roi_align3d, backend.device, volume, boxes, 2, what=f"{channels} channels"
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape, output_size",
    [
        ((5, 19, 70), (3, 9, 40)),
        ((33, 2, 3), (40, 1, 1)),
        ((2, 70, 5), (1, 37, 3)),
        ((1, 1, 130), (1, 1, 129)),
    ],
    ids=str,
)
def test_volumes_and_outputs_longer_than_a_tile(backend, layout, shape, output_size):
    volume = laid_out(random_volume((1, 2, *shape), torch.float32), layout)
    boxes = torch.tensor(
        [[0.0, 0.0, 0.0, 0.0, *map(float, shape)], [0.0, 0.3, 0.1, 0.2, *(0.9 * s for s in shape)]]
    )
    assert_forward_exact(pgl_ops.roi_align3d, backend.device, volume, boxes, output_size, sampling_ratio=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=name)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_many_channels_of_many_rois(backend, layout, dtype):
    """More blocks than keep a GPU busy: each takes several parts of the channels, the last part smaller."""
    shape, count = (4, 12, 13), 900 if backend.name == "cuda" else 3
    volume = laid_out(random_volume((2, 272, *shape), dtype), layout)
    boxes, flips = random_boxes(count, 2, shape), random_flips(count)
    assert_forward_exact(
        pgl_ops.roi_align3d, backend.device, volume, boxes, (2, 7, 7), sampling_ratio=2, flips=flips
    )


def test_output_larger_than_the_box(backend):
    volume = random_volume((1, 3, 5, 6, 7))
    boxes = torch.tensor([[0, 1.2, 2.1, 3.3, 2.3, 3.4, 4.1]], dtype=torch.float64)
    for ratio, aligned in itertools.product((-1, 1, 2), (True, False)):
        assert_forward_exact(
            pgl_ops.roi_align3d,
            backend.device,
            volume,
            boxes,
            (5, 7, 9),
            what=f"ratio {ratio}, aligned {aligned}",
            sampling_ratio=ratio,
            aligned=aligned,
        )


@pytest.mark.parametrize("box_dtype", [torch.float32, torch.float64], ids=name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.int16], ids=name)
def test_boxes_keep_their_own_precision_whatever_the_input_dtype(backend, dtype, box_dtype):
    # 1/3 in float32 and in float64 differ by 1e-8: float64 values tell which of them was sampled.
    volume = random_volume((1, 2, 4, 5, 6), dtype)
    boxes = torch.tensor([[0, 1 / 3, 2 / 3, 1 / 7, 3 + 1 / 3, 4 + 1 / 7, 5 + 1 / 9]], dtype=box_dtype)
    assert_forward_exact(pgl_ops.roi_align3d, backend.device, volume, boxes, (2, 3, 4), sampling_ratio=2)


def test_list_of_boxes_equals_the_tensor_with_batch_indices(backend):
    volume = on(backend.device, random_volume((3, 4, 5, 6, 7)))
    tensor = random_boxes(6, 3, (5, 6, 7))
    tensor[:, 0] = torch.tensor([0, 0, 2, 2, 2, 2])  # sample 1 has no box
    boxes = [on(backend.device, tensor[tensor[:, 0] == n, 1:]) for n in range(3)]
    expected = pgl_ops.roi_align3d(volume, on(backend.device, tensor), 3)
    assert torch.equal(pgl_ops.roi_align3d(volume, boxes, 3), expected)
    assert torch.equal(pgl_ops.roi_align3d(volume, tuple(boxes), 3), expected)


def test_one_number_means_the_same_on_the_three_axes(backend):
    volume = on(backend.device, random_volume((1, 2, 5, 5, 5)))
    boxes = on(backend.device, random_boxes(3, 1, (5, 5, 5), 0.5))
    assert torch.equal(
        pgl_ops.roi_align3d(volume, boxes, 3, 0.5, 2),
        pgl_ops.roi_align3d(volume, boxes, [3, 3, 3], (0.5, 0.5, 0.5), torch.Size([2, 2, 2])),
    )


def test_defaults_are_scale_one_adaptive_aligned_without_flips(backend):
    volume = on(backend.device, random_volume((1, 2, 5, 6, 7)))
    boxes = on(backend.device, random_boxes(3, 1, (5, 6, 7)))
    spelt_out = pgl_ops.roi_align3d(
        volume, boxes, 2, spatial_scale=1.0, sampling_ratio=-1, aligned=True, flips=None
    )
    assert torch.equal(pgl_ops.roi_align3d(volume, boxes, 2), spelt_out)
    assert torch.equal(pgl_ops.roi_align3d(volume, boxes, 2, sampling_ratio=0), spelt_out)


# detectron2's published example (tests/layers/test_roi_align.py): a 5×5 arange, box (1, 1, 3, 3), 4×4 bins.
DETECTRON2 = {
    False: [[7.5, 8, 8.5, 9], [10, 10.5, 11, 11.5], [12.5, 13, 13.5, 14], [15, 15.5, 16, 16.5]],
    True: [[4.5, 5.0, 5.5, 6.0], [7.0, 7.5, 8.0, 8.5], [9.5, 10.0, 10.5, 11.0], [12.0, 12.5, 13.0, 13.5]],
}


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=name)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("third_axis", [0, 1, 2])
@pytest.mark.parametrize("thickness", [1, 4])
def test_published_arange_example_of_detectron2(backend, thickness, third_axis, aligned, dtype):
    plane = torch.arange(25, dtype=dtype).reshape(5, 5)
    volume = torch.stack([plane] * thickness, dim=third_axis)[None, None]
    low, high, size = [1.0, 1.0], [3.0, 3.0], [4, 4]
    low.insert(third_axis, 0.0)
    high.insert(third_axis, float(thickness))
    size.insert(third_axis, 1)
    boxes = torch.tensor([[0.0, *low, *high]])
    out = pgl_ops.roi_align3d(*on(backend.device, volume, boxes), size, aligned=aligned)
    assert out[0, 0].squeeze(third_axis).tolist() == DETECTRON2[aligned]


@pytest.mark.parametrize("ratio", [-1, 1, 2, 3])
def test_linear_ramp_is_read_at_the_centres_of_the_bins(backend, ratio):
    shape, scale, size = (8, 10, 12), (0.5, 2.0, 1.0), (3, 4, 5)
    slope = torch.tensor([0.7, -1.3, 0.11], dtype=torch.float64)
    centres = [torch.arange(s, dtype=torch.float64) + 0.5 for s in shape]
    grid = torch.stack(torch.meshgrid(*centres, indexing="ij"), dim=-1)
    volume = (5.0 + grid @ slope)[None, None]
    low = torch.tensor([1.1, 0.9, 1.7], dtype=torch.float64)
    high = torch.tensor([7.3, 8.8, 10.9], dtype=torch.float64)
    factor = torch.tensor(scale, dtype=torch.float64)
    boxes = torch.cat([torch.zeros(1, dtype=torch.float64), low / factor, high / factor])[None]
    bins = [
        low[a] + (torch.arange(size[a], dtype=torch.float64) + 0.5) * (high[a] - low[a]) / size[a]
        for a in range(3)
    ]
    expected = 5.0 + torch.stack(torch.meshgrid(*bins, indexing="ij"), dim=-1) @ slope
    out = pgl_ops.roi_align3d(*on(backend.device, volume, boxes), size, scale, ratio)
    torch.testing.assert_close(out[0, 0].cpu(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=name)
def test_flip_equals_torch_flip(backend, dtype, layout):
    volume = on(backend.device, laid_out(random_volume((2, 3, 6, 7, 8), dtype), layout))
    boxes = on(backend.device, random_boxes(4, 2, (6, 7, 8)))
    plain = pgl_ops.roi_align3d(volume, boxes, (3, 4, 2))
    for flip in ALL_FLIPS:
        flips = torch.tensor([flip] * len(boxes), device=backend.device)
        expected = plain.flip([2 + axis for axis in range(3) if flip[axis]])
        assert torch.equal(pgl_ops.roi_align3d(volume, boxes, (3, 4, 2), flips=flips), expected), flip


def test_every_roi_has_its_own_flips(backend):
    volume = on(backend.device, random_volume((2, 3, 6, 7, 8)))
    boxes = on(backend.device, random_boxes(8, 2, (6, 7, 8)))
    flips = torch.tensor(ALL_FLIPS, device=backend.device)
    together = pgl_ops.roi_align3d(volume, boxes, (3, 4, 2), flips=flips)
    plain = pgl_ops.roi_align3d(volume, boxes, (3, 4, 2))
    for k, flip in enumerate(ALL_FLIPS):
        assert torch.equal(together[k], plain[k].flip([1 + a for a in range(3) if flip[a]])), flip


@pytest.mark.parametrize("ratio", [-1, 2])
def test_mirrored_volume_with_mirrored_box_gives_the_mirrored_result(backend, ratio):
    shape = (6, 7, 8)
    volume = random_volume((1, 3, *shape))
    boxes = random_boxes(5, 1, shape, dtype=torch.float64)
    plain = pgl_ops.roi_align3d(*on(backend.device, volume, boxes), (3, 4, 2), sampling_ratio=ratio)
    for flip in ALL_FLIPS:
        axes = [axis for axis in range(3) if flip[axis]]
        mirrored = boxes.clone()
        for axis in axes:
            mirrored[:, 1 + axis] = shape[axis] - boxes[:, 4 + axis]
            mirrored[:, 4 + axis] = shape[axis] - boxes[:, 1 + axis]
        out = pgl_ops.roi_align3d(
            *on(backend.device, volume.flip([2 + axis for axis in axes]), mirrored),
            (3, 4, 2),
            sampling_ratio=ratio,
            flips=torch.tensor([flip] * 5, device=backend.device),
        )
        torch.testing.assert_close(out, plain, rtol=0, atol=1e-12, msg=lambda m, f=flip: f"{f}: {m}")
