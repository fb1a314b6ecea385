"""boxes_from_xyz turns x-first boxes into the order of the tensor's axes."""

from __future__ import annotations

import pytest
import torch

import pgl_ops


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_six_columns_are_turned_from_xyz_to_dhw(dtype):
    boxes = torch.tensor([[1, 2, 3, 4, 5, 6], [10, 20, 30, 40, 50, 60]], dtype=dtype)
    converted = pgl_ops.boxes_from_xyz(boxes)
    assert converted.dtype == dtype
    assert converted.tolist() == [[3, 2, 1, 6, 5, 4], [30, 20, 10, 60, 50, 40]]


def test_the_batch_index_stays_in_front():
    boxes = torch.tensor([[9.0, 1, 2, 3, 4, 5, 6]])
    assert pgl_ops.boxes_from_xyz(boxes).tolist() == [[9, 3, 2, 1, 6, 5, 4]]


@pytest.mark.parametrize("columns", [6, 7])
def test_converting_twice_gives_the_boxes_back_and_changes_no_argument(columns):
    boxes = torch.rand(5, columns)
    before = boxes.clone()
    assert torch.equal(pgl_ops.boxes_from_xyz(pgl_ops.boxes_from_xyz(boxes)), boxes)
    assert torch.equal(boxes, before)
    assert pgl_ops.boxes_from_xyz(boxes).data_ptr() != boxes.data_ptr()


@pytest.mark.parametrize("columns", [6, 7])
def test_no_boxes(columns):
    assert pgl_ops.boxes_from_xyz(torch.zeros(0, columns)).shape == (0, columns)


def test_a_box_around_one_voxel_cuts_that_voxel_out():
    volume = torch.arange(4.0 * 5 * 6).reshape(1, 1, 4, 5, 6)
    x, y, z = 5.0, 3.0, 2.0
    boxes = pgl_ops.boxes_from_xyz(torch.tensor([[0, x, y, z, x + 1, y + 1, z + 1]]))
    assert pgl_ops.roi_align3d(volume, boxes, 1).item() == volume[0, 0, 2, 3, 5].item()


@pytest.mark.parametrize(
    "boxes, exception, message",
    [
        ([[1.0] * 6], TypeError, r"boxes must be a torch.Tensor, got \[\[1.0"),
        (torch.zeros(2, 6).long(), TypeError, r"boxes must have one of the dtypes.*got.*int64"),
        (
            torch.zeros(2, 5),
            ValueError,
            r"boxes must be a Tensor\[K, 6\] or Tensor\[K, 7\], got Tensor\[2, 5\]",
        ),
        (torch.zeros(6), ValueError, r"boxes must be a Tensor\[K, 6\] or Tensor\[K, 7\], got Tensor\[6\]"),
    ],
)
def test_wrong_boxes_are_named(boxes, exception, message):
    with pytest.raises(exception, match="^" + message):
        pgl_ops.boxes_from_xyz(boxes)
