"""What all figures share: colours, the CT window, headings, image panels, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from pgl.files.atomic import atomic_path

# Okabe & Ito's colours, told apart with any colour vision.
FIRST, SECOND, GOOD, ALARM = "#56B4E9", "#E69F00", "#009E73", "#D55E00"
INK, FAINT = "#222222", "#8a8a8a"
# The abdominal soft-tissue window, HU.
WINDOW_CENTRE_HU, WINDOW_WIDTH_HU = 40.0, 400.0
DPI = 150
NOTE_SIZE = 7.5
LONGEST_NAME = 26
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def window(hu: np.ndarray) -> np.ndarray:
    """HU to grey values in [0, 1] in the soft-tissue window."""
    low = WINDOW_CENTRE_HU - WINDOW_WIDTH_HU / 2
    return np.clip((np.asarray(hu, np.float32) - low) / WINDOW_WIDTH_HU, 0, 1)


class Sheet:
    """A figure laid out in inches from its top left corner, with a heading.

    Args:
        width, height: of the figure.
        title: what it shows.
        explanation: what to look at, its lines already broken.
    """

    def __init__(self, width: float, height: float, title: str, explanation: str) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height))
        FigureCanvasAgg(self.figure)
        self.text(0.25, 0.28, title, fontsize=14, fontweight="bold")
        self.text(0.25, 0.44, explanation, fontsize=8.5, color="#555555", va="top", linespacing=1.35)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes whose top left corner is at (left, top)."""
        bottom = self.height - top - height
        return self.figure.add_axes(
            (left / self.width, bottom / self.height, width / self.width, height / self.height)
        )

    def text(self, left: float, top: float, text: str, **style: Any) -> None:
        """Text at (left, top), vertically centred unless ``style`` says otherwise."""
        shown = {"va": "center", **style}
        self.figure.text(left / self.width, 1 - top / self.height, text, **shown)

    def save(self, path: Path) -> None:
        """Write the PNG, atomically."""
        with atomic_path(path) as temporary:
            self.figure.savefig(temporary, dpi=DPI)


def panel(
    ax: Axes,
    image: np.ndarray,
    size_mm: tuple[float, float],
    frame: str | None = None,
    anchor: str = "N",
    **style: Any,
) -> AxesImage:
    """Show an image of ``size_mm`` (height, width) undistorted, every pixel a flat square.

    Args:
        ax: where; what the image leaves free lies opposite to ``anchor``.
        image: grey values [h, w] in [0, 1] or colours [h, w, 3].
        size_mm: what it covers.
        frame: colour of a frame, if any.
        anchor: the side it is pushed to, as a compass direction.
        style: overrides for ``imshow``.
    """
    shown = {"cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "nearest", **style}
    drawn = ax.imshow(image, extent=(0, size_mm[1], size_mm[0], 0), **shown)
    ax.set_anchor(anchor)
    bare(ax, frame)
    return drawn


def below(ax: Axes, text: str, x: float = 0.5) -> None:
    """A small note under the axes; ``x`` in widths of the axes."""
    ax.text(
        x, -0.035, text, transform=ax.transAxes, ha="center", va="top", fontsize=NOTE_SIZE, linespacing=1.3
    )


def beside(ax: Axes, text: str) -> None:
    """A name along the left side of the axes, shortened in the middle if it is long."""
    if len(text) > LONGEST_NAME:
        half = LONGEST_NAME // 2
        text = f"{text[:half]}…{text[-half + 1 :]}"
    ax.text(
        -0.04, 0.5, text, transform=ax.transAxes, rotation=90, ha="right", va="center", fontsize=NOTE_SIZE
    )


def bare(ax: Axes, frame: str | None) -> None:
    """Take away the ticks, and leave nothing around the image but the frame, if any."""
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(frame is not None)
        spine.set_color(frame or FAINT)
        spine.set_linewidth(1.5)
