"""Conversions from other libraries' box conventions."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _arguments as arguments


def boxes_from_xyz(boxes: Tensor) -> Tensor:
    """Boxes from x-first order to the axis order of :func:`pgl_ops.roi_align3d`.

    Args:
        boxes: Tensor[K, 6] as (x1, y1, z1, x2, y2, z2), or Tensor[K, 7] with the batch index first. x runs
            along W, y along H, z along D; same units and origin (voxel i covers [i, i + 1)).

    Returns:
        A tensor of the same shape as (z1, y1, x1, z2, y2, x2), the batch index, if any, kept in front.

    Raises:
        TypeError: ``boxes`` is no floating-point tensor.
        ValueError: its shape is not [K, 6] or [K, 7].

    >>> import torch
    >>> boxes_from_xyz(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])).tolist()
    [[3.0, 2.0, 1.0, 6.0, 5.0, 4.0]]
    """
    boxes = arguments.check_tensor("boxes", boxes, arguments.FLOAT_DTYPES)
    if boxes.dim() != 2 or boxes.shape[1] not in (6, 7):
        raise ValueError(f"boxes must be a Tensor[K, 6] or Tensor[K, 7], got {arguments.describe(boxes)}")
    return torch.cat([boxes[:, :-6], boxes[:, -6:-3].flip(1), boxes[:, -3:].flip(1)], 1)
