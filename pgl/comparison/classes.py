"""What the fine-tunings of a comparison scored for each class: their mean hides one that is missed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from pgl.comparison.config import Comparison
from pgl.comparison.tables import Done, place_of, points

CLASSES = "classes.csv"
OF_CLASS = ("dice", "hd95_mm", "cases", "missed")  # what results.json has of each
COLUMNS = ("run", "task", "initialisation", "fraction", "seed", "class", *OF_CLASS)
TITLE = "Dice of each class"
NOTE = (
    "Dice in points: the mean over test cases, then over the seeds that are done and have one, with their "
    f"standard deviation over two or more; – where there is none. {CLASSES} has each seed, and in how many "
    "cases a class was missed altogether."
)


def class_rows(done: Done) -> list[dict[str, Any]]:
    """One row a fine-tuning and class, under ``COLUMNS``: ``cases`` are those with a Dice, ``missed`` those
    of them that have the class while the prediction has not."""
    return [
        {
            **place_of(tuning),
            "class": name,
            **{key: own[key] for key in OF_CLASS},
        }
        for tuning, results in done
        for name, own in results["mean"]["classes"].items()
    ]


def class_headings(comparison: Comparison) -> list[str]:
    """Of :func:`class_table`."""
    return ["task", "label fraction", "class", *comparison.settings.initialisations]


def class_table(comparison: Comparison, rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row for each task, fraction and class, in the order of the other table, with a column for each
    initialisation, in Dice points.

    Args:
        comparison: whose fine-tunings they are.
        rows: of :func:`class_rows`.
    """
    scores: dict[tuple[str, float, str, str], list[float]] = {}
    classes: dict[tuple[str, float], dict[str, None]] = {}
    for row in rows:
        place = row["task"], row["fraction"]
        classes.setdefault(place, {})[row["class"]] = None
        if row["dice"] is not None:
            scores.setdefault((*place, row["class"], row["initialisation"]), []).append(row["dice"])
    starts = comparison.settings.initialisations
    return [
        [
            task or "–",
            f"{fraction:g}",
            name,
            *(_mean(scores.get((task, fraction, name, s), [])) for s in starts),
        ]
        for task in comparison.tasks
        for fraction in comparison.settings.starts()
        for name in classes.get((task, fraction), {})
    ]


def _mean(dice: list[float]) -> str:
    if not dice:
        return "–"
    return points(statistics.mean(dice), statistics.stdev(dice) if len(dice) > 1 else None)
