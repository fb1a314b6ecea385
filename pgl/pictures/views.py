"""``views.png``: pairs of views, the region they share, and its crops brought back to one orientation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from pgl.pictures.style import FIRST, INK, NOTE_SIZE, SECOND, STYLE, Sheet, bare, below, beside, panel, window

# Ends of the difference's colour scale, HU: half of the soft-tissue window.
DIFFERENCE_HU = 200.0
# Layout in inches: a square cell for each image, room for the notes under it.
_CELL, _NOTES, _TOP = 1.86, 0.42, 1.10
_LEFTS = (0.45, 2.40, 4.60, 6.55, 8.50)
_TITLES = ("view 1", "view 2", "shared, from view 1", "shared, from view 2", "difference")
_COLOURS = (FIRST, SECOND, FIRST, SECOND, INK)


@dataclass(frozen=True)
class Outline:
    """A region on the drawn slice of a view, in the coordinates of ``imshow``, where pixel i is centred on i.

    Args:
        slice: the slice (D) through the middle of the region.
        x, y: the corner nearest to pixel (0, 0).
        width, height: of the rectangle, along W and H.
        mark: (x, y) of the corner that has the lowest H and W in the volume, wherever flips put it.
    """

    slice: int
    x: float
    y: float
    width: float
    height: float
    mark: tuple[float, float]


def outline(placed: Sequence[float], flips: Sequence[bool], patch_size: Sequence[int]) -> Outline:
    """Where to draw a region on a view.

    Args:
        placed: (d1, h1, w1, d2, h2, w2) of the region in voxels of the view, voxel i covering [i, i + 1);
            flips are already in it (see :func:`pgl.views.place`).
        flips: the view's flips (D, H, W), which only tell which corner is which.
        patch_size: voxels of the view (D, H, W).
    """
    d1, h1, w1, d2, h2, w2 = (float(edge) for edge in placed)
    middle = min(max(math.floor((d1 + d2) / 2), 0), patch_size[0] - 1)
    # imshow covers [i - 0.5, i + 0.5] with pixel i.
    x1, y1, x2, y2 = w1 - 0.5, h1 - 0.5, w2 - 0.5, h2 - 0.5
    return Outline(middle, x1, y1, x2 - x1, y2 - y1, (x2 if flips[2] else x1, y2 if flips[1] else y1))


@dataclass
class PairPicture:
    """One row of ``views.png``.

    Args:
        name: the case.
        views: HU [2, D, H, W] as the network sees them, before intensity augmentation.
        outlines: of the shared region in each view.
        notes: what was done to each view, in words.
        crops: HU [2, h, w], the middle slice of the aligned region, from either view.
        crop_mm: (height, width) of the region.
    """

    name: str
    views: np.ndarray
    outlines: tuple[Outline, Outline]
    notes: tuple[str, str]
    crops: np.ndarray
    crop_mm: tuple[float, float]


def draw_views(rows: Sequence[PairPicture], path: Path) -> None:
    """``views.png``: do the two views, brought back by the known geometry, show the same place?"""
    with matplotlib.rc_context(STYLE):
        sheet = Sheet(
            11,
            _TOP + len(rows) * (_CELL + _NOTES),
            "Two views of one place, and what they share",
            "The rectangle is the region that both views show; its dot marks one and the same corner in the "
            "body. Notes: the crop's size in patches (D × H × W), and its flips.\n"
            "Look for: both crops of that region, brought back to the body's orientation, show the same "
            "anatomy; the difference is nearly white, but for edges.",
        )
        for left, title, colour in zip(_LEFTS, _TITLES, _COLOURS, strict=True):
            sheet.text(
                left + _CELL / 2,
                _TOP - 0.14,
                title,
                color=colour,
                fontsize=9.5,
                fontweight="bold",
                ha="center",
            )
        for row, pair in enumerate(rows):
            top = _TOP + row * (_CELL + _NOTES)
            axes = [sheet.axes(left, top, _CELL, _CELL) for left in _LEFTS]
            for view, colour in enumerate((FIRST, SECOND)):
                _view(axes[view], pair.views[view], pair.outlines[view], colour)
                below(axes[view], pair.notes[view])
                panel(axes[2 + view], window(pair.crops[view]), pair.crop_mm, frame=colour)
            difference = pair.crops[0] - pair.crops[1]
            scale: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -DIFFERENCE_HU, "vmax": DIFFERENCE_HU}
            image = panel(axes[4], difference, pair.crop_mm, frame="#d0d0d0", **scale)
            beside(axes[0], pair.name)
            below(axes[2], f"{pair.crop_mm[0]:.0f} × {pair.crop_mm[1]:.0f} mm")
            below(axes[4], f"mean |difference| {np.abs(difference).mean():.0f} HU")
        bar = sheet.axes(_LEFTS[-1] + _CELL + 0.12, _TOP, 0.09, _CELL)
        sheet.figure.colorbar(image, cax=bar, ticks=[-DIFFERENCE_HU, 0, DIFFERENCE_HU])
        bar.tick_params(labelsize=NOTE_SIZE, length=2)
        bar.set_title("HU", fontsize=NOTE_SIZE, pad=5)
        sheet.save(path)


def _view(ax: Axes, view_hu: np.ndarray, region: Outline, colour: str) -> None:
    ax.imshow(window(view_hu[region.slice]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    limits = ax.axis()
    edge: dict[str, Any] = {"edgecolor": colour, "linewidth": 2, "fill": False, "clip_on": False}
    ax.add_patch(Rectangle((region.x, region.y), region.width, region.height, **edge))
    ax.plot(*region.mark, "o", color=colour, markersize=6.5, markeredgecolor="white", clip_on=False, zorder=3)
    ax.axis(limits)
    ax.set_anchor("N")
    bare(ax, None)
