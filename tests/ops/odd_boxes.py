"""Boxes that are unusual, and rows of boxes that cannot be sampled."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Name, and the box as fractions of the axes: (d1, h1, w1, d2, h2, w2).
UNUSUAL_BOXES = {
    "across the low corner": (-0.4, -0.3, -0.6, 0.5, 0.6, 0.4),
    "across the high corner": (0.5, 0.7, 0.6, 1.5, 1.4, 1.9),
    "around the whole volume": (-0.5, -0.7, -0.2, 1.3, 1.9, 1.1),
    "outside below one axis": (-3.0, 0.1, 0.1, -1.0, 0.9, 0.9),
    "outside above one axis": (0.1, 0.1, 2.0, 0.9, 0.9, 3.0),
    "outside in a corner": (2.0, 2.0, 2.0, 4.0, 4.0, 4.0),
    "zero-size": (0.5, 0.4, 0.3, 0.5, 0.4, 0.3),
    "zero-size outside": (-2.0, 0.4, 0.3, -2.0, 0.4, 0.3),
    "flat on one axis": (0.2, 0.5, 0.1, 0.8, 0.5, 0.9),
    "negative": (0.8, 0.9, 0.7, 0.2, 0.1, 0.3),
    "negative on one axis": (0.2, 0.9, 0.3, 0.8, 0.1, 0.7),
    "negative beyond a voxel": (1.4, 1.2, 1.9, -0.6, -0.5, -0.3),
    "sub-voxel": (0.41, 0.52, 0.33, 0.42, 0.53, 0.34),
    "tenfold": (-4.0, -5.0, -4.5, 6.0, 5.0, 5.5),
    "a thousandfold": (-600.0, -400.0, -500.0, 400.0, 600.0, 500.0),
}

FAR = 2.0**24 + 2  # the next float32 after 2**24
# Name, and the entries by column that make the row bad (N = 2), with the spatial_scale at which they do.
BAD_ROWS = {
    "batch index below 0": ({0: -1.0}, 1.0),
    "batch index of N": ({0: 2.0}, 1.0),
    "batch index between samples": ({0: 0.5}, 1.0),
    "batch index NaN": ({0: math.nan}, 1.0),
    "batch index inf": ({0: math.inf}, 1.0),
    "batch index beyond int64": ({0: 1e30}, 1.0),
    "batch index beyond int64, negative": ({0: -1e30}, 1.0),
    **{f"NaN in column {i}": ({i: math.nan}, 1.0) for i in range(1, 7)},
    **{f"inf in column {i}": ({i: math.inf}, 1.0) for i in range(1, 7)},
    "minus inf": ({2: -math.inf}, 1.0),
    "beyond 2**24": ({4: FAR}, 1.0),
    "beyond -2**24": ({1: -FAR}, 1.0),
    "beyond 2**24 after scaling": ({5: FAR / 4}, (1.0, 4.0, 1.0)),
    "largest float32": ({6: 3.4e38}, 1.0),
}


def box_of(fractions, shape) -> Tensor:
    """Tensor[1, 7] (float64) in sample 0, from the fractions of ``shape``'s axes."""
    sides = torch.tensor([*shape, *shape], dtype=torch.float64)
    return torch.cat([sides.new_zeros(1), torch.tensor(fractions, dtype=torch.float64) * sides])[None]
