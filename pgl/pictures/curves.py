"""``curves.png``: a run's loss, matching accuracy and feature spread over its steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from pgl.pictures.style import ALARM, FAINT, FIRST, GOOD, INK, NOTE_SIZE, SECOND, STYLE, Sheet

# The bold line is a running mean over this share of the run, so that it is as smooth for any length.
_SMOOTHED_SHARE = 0.04
_TITLE: dict[str, Any] = {"fontsize": 10, "fontweight": "bold", "loc": "left", "pad": 8}
_LEGEND: dict[str, Any] = {"frameon": False, "fontsize": NOTE_SIZE}
_ENCODER: dict[str, Any] = {
    "color": GOOD, "linewidth": 2, "marker": "o", "markersize": 3.5, "label": "encoder's features",
}  # fmt: skip
_VALIDATION: dict[str, Any] = {**_ENCODER, "color": "#CC79A7", "linewidth": 1.2, "label": "validation"}
_PROJECTED: dict[str, Any] = {"color": SECOND, "linewidth": 1.2, "label": "after the projector"}

# What the loss of each method is, and in which unit.
_LOSSES = {
    "pgl": ("distance to the target's features", "2 − 2·cos"),
    "byol": ("distance to the other view's target", "2 − 2·cos, two ways"),
    "genesis": ("distance to the clean views", "mean square"),
}


def draw_curves(
    metrics: dict[str, list[dict[str, Any]]],
    collapse_threshold: float,
    path: Path,
    method: str = "pgl",
    decorrelated: bool = False,
) -> None:
    """Draw ``curves.png`` from :func:`pgl.runs.facts.read_metrics`.

    Args:
        metrics: what was measured.
        collapse_threshold: spread under which the alarm is raised.
        path: the file to write.
        method: whose loss it is, see :class:`pgl.config.MethodSettings`.
        decorrelated: whether a penalty on correlated channels is part of the loss.

    Raises:
        ValueError: nothing was measured yet.
    """
    train, validation = metrics.get("train", []), metrics.get("validation", [])
    if not train and not validation:
        raise ValueError(
            "metrics.jsonl holds no measurement yet: let the run do a few steps, then show it again"
        )
    with matplotlib.rc_context(STYLE):
        sheet = Sheet(
            11,
            4.3,
            "How the pretraining went",
            "Look for: a loss that falls, a matching accuracy that climbs well above the untrained network, "
            "and a spread that stays clear of the red zone.\n"
            "A falling loss alone proves nothing: it also falls when all features collapse into one.",
        )
        axes = [sheet.axes(left, 1.35, 2.95, 2.35) for left in (0.70, 4.30, 7.90)]
        title, unit = _LOSSES[method]
        _loss(axes[0], train, validation, title, f"{unit}, and penalty" if decorrelated else unit)
        _accuracy(axes[1], validation)
        _spread(axes[2], validation, collapse_threshold)
        last = max(1, *(entry["step"] for entry in [*train, *validation]))
        for ax in axes:
            ax.set_xlim(-0.02 * last, 1.02 * last)
            ax.set_xlabel("step")
            ax.grid(axis="y", color="#e6e6e6", linewidth=0.7)
            ax.set_axisbelow(True)
        sheet.save(path)


def _loss(
    ax: Axes, train: list[dict[str, Any]], validation: list[dict[str, Any]], title: str, unit: str
) -> None:
    ax.set_title(f"Loss: {title}", **_TITLE)
    steps, values = _series(train, "loss")
    ax.plot(steps, values, color=FIRST, linewidth=0.8, alpha=0.45, label="training, as measured")
    ax.plot(steps, _smooth(values), color="#0072B2", linewidth=2, label="training, smoothed")
    ax.plot(*_series(validation, "loss"), **_VALIDATION)
    ax.set_yscale("log")
    finite = [value for value in values if value > 0]
    wide = bool(finite) and max(finite) > 20 * min(finite)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if wide else (1, 1.5, 2, 3, 4, 5, 6, 8)))
    ax.yaxis.set_major_formatter(ScalarFormatter())
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_ylabel(f"{unit}, log scale")
    ax.legend(**_LEGEND, loc="upper right")


def _accuracy(ax: Axes, validation: list[dict[str, Any]]) -> None:
    ax.set_title("Matching: voxels that find their partner", **_TITLE)
    steps, values = _series(validation, "matching_accuracy")
    projected = _series(validation, "projected_matching_accuracy")
    ax.plot(steps, values, **_ENCODER)
    ax.plot(*projected, **_PROJECTED)
    best = max((v for v in values if not math.isnan(v)), default=0.0)
    if steps and steps[0] == 0:
        gain = f" (best: {best / values[0]:.1f}×)" if values[0] > 0 and len(values) > 1 else ""
        ax.axhline(
            values[0], color=INK, linestyle="--", linewidth=1, label=f"untrained {values[0]:.3f}{gain}"
        )
    if validation and "chance" in validation[-1]:
        guess = validation[-1]["chance"]
        ax.axhline(guess, color=FAINT, linestyle=":", linewidth=1.5, label=f"chance {guess:.4f}")
    top = max([best, 0.01, *(v for v in projected[1] if not math.isnan(v))])
    ax.set_ylim(0, min(1.45 * top, 1.02 if top > 0.72 else 1.0))
    ax.set_ylabel("share of aligned voxels")
    ax.legend(**_LEGEND, loc="upper left" if top <= 0.7 else "lower right")


def _spread(ax: Axes, validation: list[dict[str, Any]], threshold: float) -> None:
    ax.set_title("Spread: are features still different?", **_TITLE)
    ax.axhspan(0, threshold, color=ALARM, alpha=0.25, linewidth=0)
    place: dict[str, Any] = {"ha": "right", "va": "bottom", "transform": ax.get_yaxis_transform()}
    ax.text(0.985, threshold, "collapse", color=ALARM, fontsize=NOTE_SIZE, **place)
    ax.plot(*_series(validation, "feature_spread"), **_ENCODER)
    ax.plot(*_series(validation, "projected_spread"), **_PROJECTED)
    ax.set_ylim(0, 1.25)
    ax.set_ylabel("1: evenly spread, 0: all the same")
    ax.legend(**_LEGEND, loc="upper left", ncols=2)


def _series(entries: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a key; an entry without a finite number there leaves a gap."""
    values = [entry.get(key) for entry in entries]
    numbers = [float(v) if isinstance(v, int | float) and math.isfinite(v) else math.nan for v in values]
    return [entry["step"] for entry in entries], numbers


def _smooth(values: list[float]) -> np.ndarray:
    """Centred running mean with shrinking ends; a gap takes the mean of what is around it."""
    half = max(1, round(len(values) * _SMOOTHED_SHARE)) if len(values) > 4 else 0
    known = ~np.isnan(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    middle = np.arange(len(values))
    first, last = np.maximum(middle - half, 0), np.minimum(middle + half + 1, len(values))
    count = counts[last] - counts[first]
    return np.where(count > 0, (sums[last] - sums[first]) / np.maximum(count, 1), np.nan)
