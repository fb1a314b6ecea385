"""Scores as a table: means, results.json, results.csv, and what the terminal shows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pgl.downstream.metrics import Score
from pgl.files.atomic import write_text
from pgl.printing import printable
from pgl.table_text import csv_text

COLUMNS = ("subject", "class", "dice", "hd95_mm", "voxels_true", "voxels_predicted")


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of what is not None; None if nothing is left."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def summarise(scores: Sequence[Score]) -> dict[str, Any]:
    """Means over cases for each class, and the mean of the classes' means.

    Returns:
        ``{"dice", "hd95_mm", "classes": {name: {"dice", "hd95_mm", "cases", "missed"}}}``: ``cases`` is the
        number of cases in the mean of Dice, ``missed`` those whose truth has the class and whose prediction
        has not, which have no Hausdorff distance.
    """
    classes = {}
    for name in dict.fromkeys(score.name for score in scores):
        own = [score for score in scores if score.name == name]
        classes[name] = {
            "dice": mean([score.dice for score in own]),
            "hd95_mm": mean([score.hd95_mm for score in own]),
            "cases": sum(score.dice is not None for score in own),
            "missed": sum(bool(score.voxels_true) and not score.voxels_predicted for score in own),
        }
    overall = {key: mean([entry[key] for entry in classes.values()]) for key in ("dice", "hd95_mm")}
    return {**overall, "classes": classes}


def plain_scores(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Scores as JSON holds them."""
    return [{("class" if key == "name" else key): v for key, v in asdict(s).items()} for s in scores]


def write_csv(path: str | os.PathLike[str], scores: Sequence[Score]) -> Path:
    """One line a case and class; an empty field where there is no value."""
    rows = [{key: row[key] for key in COLUMNS} for row in plain_scores(scores)]
    write_text(path, csv_text(COLUMNS, rows))
    return Path(path)


def show(scores: Sequence[Score], console: Console, title: str) -> None:
    """Print the means of each class."""
    table = Table("class", "Dice", "HD95 mm", "cases", "missed", title=title, title_justify="left")
    summary = summarise(scores)
    for name, entry in summary["classes"].items():
        table.add_row(
            Text(printable(name)),
            _number(entry["dice"], 4),
            _number(entry["hd95_mm"], 2),
            str(entry["cases"]),
            str(entry["missed"]),
        )
    if len(summary["classes"]) > 1:
        table.add_section()
        table.add_row("mean of classes", _number(summary["dice"], 4), _number(summary["hd95_mm"], 2), "", "")
    console.print(table)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
