"""The curves of a report as plain data; ``page.js`` draws them.

They are drawn in the page, not by matplotlib: so a reader can take the numbers of any step off them, their
text keeps its size on a phone, and their colours follow the reader's light or dark theme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pgl.runs.facts import RunFacts, number
from pgl.runs.words import loss_in_words

# Points of a curve; a page is at most about 1,000 pixels wide. Longer curves are averaged in runs of lines.
MOST_POINTS = 1200
# The bold line is a running mean over this share of the run, so that it is as smooth for any length.
_SMOOTHED_SHARE = 0.04
# Decimals that are kept, so that the page holds no digits that nobody can tell apart.
_DIGITS = 6

Curve = dict[str, Any]
Chart = dict[str, Any]


def charts_of_run(run: RunFacts) -> list[Chart]:
    """All charts of one run."""
    losses = _points(run.train, "loss")
    charts = [
        _chart(
            "Loss",
            loss_in_words(run.settings) + ", on a log scale. Alone it proves nothing: "
            "it also falls when all features become one.",
            [
                _curve("training", losses, 0, faint=True),
                _curve("training, smoothed", smoothed(losses), 0),
                _curve("validation", _points(run.validation, "loss"), 1, dots=True),
            ],
            log=True,
        ),
        _matching(run),
        _chart(
            "Feature spread",
            "1: the features point everywhere alike; 0: all are one. The shaded zone raises the alarm.",
            [
                _curve("encoder", _points(run.validation, "feature_spread"), 2, dots=True),
                _curve("after the projector", _points(run.validation, "projected_spread"), 3, dots=True),
            ],
            zone={"below": run.settings["validation.collapse_threshold"], "name": "collapse"},
            zero=True,
        ),
        _chart(
            "Feature rank",
            "How many directions the encoder's features use.",
            [_curve("encoder", _points(run.validation, "feature_rank"), 2, dots=True)],
            zero=True,
        ),
        _chart(
            "Throughput",
            "Training steps a second between two lines of metrics, without validation.",
            [_curve("steps/s", _points(run.train, "steps_per_s"), 0)],
            zero=True,
        ),
        _chart(
            "Learning rate",
            "As the schedule gave it.",
            [_curve("learning rate", _points(run.train, "learning_rate"), 4)],
            zero=True,
        ),
    ]
    return [chart for chart in charts if chart["curves"]]


def charts_of_runs(runs: Sequence[RunFacts], names: Sequence[str]) -> list[Chart]:
    """The charts in which several runs are compared, one curve a run, the same colour everywhere."""

    def compared(title: str, note: str, kind: str, key: str, **style: Any) -> Chart:
        curves = []
        for place, (run, name) in enumerate(zip(runs, names, strict=True)):
            points = _points(run.train if kind == "train" else run.validation, key)
            shown = smoothed(points) if kind == "train" else points
            curves.append(_curve(name, shown, place, dots=kind == "validation"))
        return _chart(title, note, curves, **style)

    thresholds = {run.settings["validation.collapse_threshold"] for run in runs}
    zone = {"below": thresholds.pop(), "name": "collapse"} if len(thresholds) == 1 else None
    charts = [
        compared(
            "Matching accuracy", "Of the encoder's features, on each run's own validation pairs.",
            "validation", "matching_accuracy", zero=True,
        ),
        compared("Training loss", "Smoothed, on a log scale.", "train", "loss", log=True),
        compared(
            "Feature spread", "Of the encoder's features; 0: all are one.",
            "validation", "feature_spread", zero=True, zone=zone,
        ),
        compared("Throughput", "Training steps a second, smoothed.", "train", "steps_per_s", zero=True),
    ]  # fmt: skip
    return [chart for chart in charts if chart["curves"]]


def smoothed(points: list[list[float | None]]) -> list[list[float | None]]:
    """Running mean over a share of the curve; a gap takes the mean around it.

    The window is centred. At the start it shrinks on both sides alike, so that a steep beginning stays where
    it is; at the end it only looks back, so that the last value is a mean too.
    """
    half = max(1, round(len(points) * _SMOOTHED_SHARE)) if len(points) > 4 else 0
    result: list[list[float | None]] = []
    for i, (step, _) in enumerate(points):
        back = min(half, i)
        near = [y for _, y in points[i - back : i + back + 1] if y is not None]
        result.append([step, _rounded(sum(near) / len(near)) if near else None])
    return result


def _matching(run: RunFacts) -> Chart:
    lines = []
    first = run.untrained
    if first is not None and (then := number(first, "matching_accuracy")) is not None:
        lines.append({"name": "untrained", "y": _rounded(then)})
    if run.validation and (guess := number(run.validation[-1], "chance")) is not None:
        lines.append({"name": "chance", "y": _rounded(guess)})
    return _chart(
        "Matching accuracy",
        "Share of aligned voxels whose nearest neighbour in the other view is the same place.",
        [
            _curve("encoder", _points(run.validation, "matching_accuracy"), 2, dots=True),
            _curve(
                "after the projector", _points(run.validation, "projected_matching_accuracy"), 3, dots=True
            ),
        ],
        lines=lines,
        zero=True,
    )


def _chart(
    title: str,
    note: str,
    curves: list[Curve],
    log: bool = False,
    zero: bool = False,
    lines: list[dict[str, Any]] | None = None,
    zone: dict[str, Any] | None = None,
) -> Chart:
    known = [curve for curve in curves if any(y is not None for _, y in curve["points"])]
    positive = all(y is None or y > 0 for curve in known for _, y in curve["points"])
    return {
        "title": title,
        "note": note,
        "curves": known,
        "log": log and positive,
        "zero": zero,
        "lines": lines or [],
        "zone": zone,
    }


def _curve(
    name: str, points: list[list[float | None]], colour: int, faint: bool = False, dots: bool = False
) -> Curve:
    return {"name": name, "points": points, "colour": colour, "faint": faint, "dots": dots}


def _points(lines: list[dict[str, Any]], key: str) -> list[list[float | None]]:
    """[step, value or None] of each line, averaged in equal runs of lines if there are too many."""
    points = [(float(line["step"]), number(line, key)) for line in lines]
    together = max(1, math.ceil(len(points) / MOST_POINTS))
    if together == 1:
        return [[step, None if y is None else _rounded(y)] for step, y in points]
    result: list[list[float | None]] = []
    for first in range(0, len(points), together):
        part = points[first : first + together]
        values = [y for _, y in part if y is not None]
        # A value that is not finite stays a gap that can be seen.
        whole = len(values) == len(part)
        result.append([part[-1][0], _rounded(sum(values) / len(values)) if whole else None])
    return result


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
