"""Volumes as sprites: all slices of one under another in one PNG, written into the page itself."""

from __future__ import annotations

import base64
import io
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from pgl.pictures.style import window
from pgl.pictures.views import DIFFERENCE_HU

Sprite = dict[str, Any]


def grey_sprite(hu: Tensor, most_voxels: int) -> Sprite:
    """HU Tensor[D, H, W] in the soft-tissue window."""
    values = window(fitted(hu.float(), most_voxels).numpy())
    return _sprite(Image.fromarray(_stacked(np.rint(values * 255)), "L"), values.shape)


def difference_sprite(first: Tensor, second: Tensor, most_voxels: int) -> Sprite:
    """HU differences Tensor[D, H, W] in colours: white is none, red where the first one is denser."""
    difference = fitted(first.float() - second.float(), most_voxels).numpy()
    index = np.rint((np.clip(difference / DIFFERENCE_HU, -1, 1) + 1) / 2 * 255)
    image = Image.fromarray(_stacked(index), "P")
    table = matplotlib.colormaps["RdBu_r"](np.arange(256))[:, :3]
    image.putpalette(np.rint(table * 255).astype(np.uint8).tobytes())
    return _sprite(image, difference.shape)


def colour_sprite(colours: Tensor, most_voxels: int) -> Sprite:
    """Colours Tensor[D, H, W, 3] in [0, 1]."""
    values = torch.stack([fitted(channel, most_voxels) for channel in colours.unbind(-1)], -1).numpy()
    return _sprite(Image.fromarray(_stacked(np.rint(values * 255)), "RGB"), values.shape[:3])


def fitted(volume: Tensor, most_voxels: int) -> Tensor:
    """The volume Tensor[D, H, W] with at most ``most_voxels``: averaged in the plane and, if need be, with
    slices left out.

    The page must stay small, however large the patch.
    """
    depth, height, width = volume.shape
    # Slices carry the scrolling: they go only where a slice of 64 × 64 would not fit otherwise.
    kept = max(1, min(depth, most_voxels // min(64 * 64, height * width)))
    slices = torch.linspace(0, depth - 1, kept).round().long()
    volume = volume[slices]
    shrink = min(1.0, (most_voxels / volume.numel()) ** 0.5)
    if shrink == 1:
        return volume
    size = (max(1, int(height * shrink)), max(1, int(width * shrink)))
    return functional.interpolate(volume[None], size, mode="area")[0]


def _stacked(slices: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(slices.reshape(-1, *slices.shape[2:]).astype(np.uint8))


def _sprite(image: Image.Image, shape: tuple[int, ...]) -> Sprite:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    return {"source": source, "slices": shape[0], "height": shape[1], "width": shape[2]}
