"""Dice over the number of labelled cases, one line an initialisation, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from pgl.pictures.style import ALARM, FAINT, FIRST, GOOD, STYLE, Sheet

_COLOURS = {"random": FAINT, "genesis": "#E69F00", "byol": FIRST, "pgl": GOOD}
_WIDTH, _HEIGHT, _COLUMNS = 3.4, 2.5, 3


def draw(entries: Sequence[dict[str, Any]], initialisations: Sequence[str], path: Path) -> None:
    """Draw one panel a task; error bars are one standard deviation over seeds."""
    tasks = list(dict.fromkeys(entry["task"] for entry in entries))
    columns = min(len(tasks), _COLUMNS)
    rows = -(-len(tasks) // columns)
    with matplotlib.rc_context(STYLE):
        sheet = Sheet(
            max(columns * (_WIDTH + 0.85) + 0.4, 5.2),
            rows * (_HEIGHT + 0.95) + 0.85,
            "Dice over labels",
            "Mean over seeds, bars of one standard deviation;\nthe same network and budget from each start.",
        )
        for number, task in enumerate(tasks):
            row, column = divmod(number, columns)
            ax = sheet.axes(0.75 + column * (_WIDTH + 0.85), 1.1 + row * (_HEIGHT + 0.95), _WIDTH, _HEIGHT)
            if task:
                ax.set_title(task, loc="left", fontsize=10)
            for place, start in enumerate(initialisations):
                own = [e for e in entries if e["task"] == task and e["initialisation"] == start]
                if not own:
                    continue
                # Apart, so that bars do not hide one another.
                shift = 1 + 0.03 * (place - (len(initialisations) - 1) / 2)
                ax.errorbar(
                    [entry["training_cases"] * shift for entry in own],
                    [100 * entry["dice"] for entry in own],
                    [100 * (entry["deviation"] or 0) for entry in own],
                    color=_COLOURS.get(start, ALARM),
                    marker="o",
                    markersize=4,
                    linewidth=1.6,
                    capsize=2.5,
                    label=start,
                )
            counts = sorted({entry["training_cases"] for entry in entries if entry["task"] == task})
            ax.set_xscale("log")
            ax.set_xticks(counts, [str(count) for count in counts])
            ax.minorticks_off()
            ax.set_xlim(counts[0] / 1.3, counts[-1] * 1.3)
            ax.set_xlabel("labelled training cases, log scale")
            ax.set_ylabel("Dice, points")
            ax.grid(axis="y", color="#e6e6e6", linewidth=0.7)
            ax.legend(fontsize=7.5, frameon=False, loc="best")
        sheet.save(path)
