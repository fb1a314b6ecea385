"""``features.png``: the features of shared places as colours, before and after pretraining."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from pgl.pictures.style import FIRST, SECOND, STYLE, Sheet, below, beside, panel, window

# Layout in inches: a square cell for each image, pairs of cells close together, room for notes under them.
_CELL, _GAP, _NOTES, _TOP = 1.60, 0.07, 0.34, 1.40
_LEFTS = (0.45, 2.12, 3.99, 5.66, 7.53, 9.20)
_COLOURS = (FIRST, SECOND)
_WHOLE = 3.36


@dataclass
class FeaturePicture:
    """One row of ``features.png``.

    Args:
        name: the case.
        crops: HU [2, h, w], the aligned region from either view.
        untrained, trained: colours [2, h, w, 3] of the aligned features from either view.
        untrained_accuracy, trained_accuracy: matching accuracy of this pair in [0, 1].
        crop_mm: (height, width) of the region.
    """

    name: str
    crops: np.ndarray
    untrained: np.ndarray
    trained: np.ndarray
    untrained_accuracy: float
    trained_accuracy: float
    crop_mm: tuple[float, float]


@dataclass
class SlicePicture:
    """The last row of ``features.png``.

    Args:
        name: the case.
        hu: a whole slice [h, w].
        untrained, trained: colours [h', w', 3] of the features there.
        size_mm: (height, width) of the slice.
    """

    name: str
    hu: np.ndarray
    untrained: np.ndarray
    trained: np.ndarray
    size_mm: tuple[float, float]


def draw_features(
    rows: Sequence[FeaturePicture],
    whole: SlicePicture,
    names: tuple[str, str],
    matched: tuple[float, float],
    chance: float,
    path: Path,
) -> None:
    """``features.png``: do the same places get the same colour in both views, and other places other colours?

    Args:
        rows: one a pair.
        whole: the slice below them, in the same colours.
        names: of the untrained and of the trained network.
        matched: their matching accuracy over all validation pairs.
        chance: the matching accuracy of a guess.
        path: the file.
    """
    titles = [f"{name}: {share:.1%} matched" for name, share in zip(names, matched, strict=True)]
    bottom = _TOP + len(rows) * (_CELL + _NOTES) + 0.40
    whole_height = _WHOLE * min(1.0, whole.size_mm[0] / whole.size_mm[1])
    with matplotlib.rc_context(STYLE):
        sheet = Sheet(
            11,
            bottom + whole_height + 0.15,
            "What the network sees in one place, before and after pretraining",
            "Colours are the three main directions of the features (PCA over the regions and the last "
            "row's slab; each network has its own colours).\n"
            "Look for: view 1 and view 2 agree, and tissues differ in colour. Matched: "
            "aligned voxels of view 1 whose nearest neighbour in view 2 is the right one (chance "
            f"{chance:.1%}).",
        )
        for left, title in zip(_LEFTS[::2], ("CT", *titles), strict=True):
            sheet.text(
                left + _CELL + _GAP / 2, _TOP - 0.36, title, fontsize=9.5, fontweight="bold", ha="center"
            )
        for column, left in enumerate(_LEFTS):
            sheet.text(
                left + _CELL / 2,
                _TOP - 0.13,
                f"view {column % 2 + 1}",
                color=_COLOURS[column % 2],
                fontsize=8.5,
                ha="center",
            )
        for row, pair in enumerate(rows):
            images = [*window(pair.crops), *pair.untrained, *pair.trained]
            top = _TOP + row * (_CELL + _NOTES)
            axes = [sheet.axes(left, top, _CELL, _CELL) for left in _LEFTS]
            for column, (ax, image) in enumerate(zip(axes, images, strict=True)):
                # The two views of a pair lean together, so that they are easily compared.
                panel(
                    ax, image, pair.crop_mm, frame=_COLOURS[column % 2], anchor="NW" if column % 2 else "NE"
                )
            beside(axes[0], pair.name)
            middle = 1 + _GAP / 2 / _CELL
            below(axes[2], f"this pair {pair.untrained_accuracy:.1%}", middle)
            below(axes[4], f"this pair {pair.trained_accuracy:.1%}", middle)
        last_row = (window(whole.hu), whole.untrained, whole.trained)
        for column, (image, title) in enumerate(zip(last_row, ("a whole slice", *names), strict=True)):
            ax = sheet.axes(_LEFTS[0] + column * (_WHOLE + 0.13), bottom, _WHOLE, whole_height)
            panel(ax, image, whole.size_mm)
            ax.set_title(title, fontsize=9.5, fontweight="bold", pad=5)
            if column == 0:
                beside(ax, whole.name)
        sheet.save(path)
