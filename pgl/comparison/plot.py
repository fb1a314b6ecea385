"""Dice over the number of labelled cases, one line a start, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes

from pgl.pictures.style import ALARM, FAINT, FIRST, GOOD, STYLE, Sheet

_COLOURS = {"random": FAINT, "genesis": "#E69F00", "byol": FIRST, "pgl": GOOD}
_WIDTH, _HEIGHT, _COLUMNS = 3.4, 2.5, 3


def draw(entries: Sequence[dict[str, Any]], initialisations: Sequence[str], path: Path) -> None:
    """Draw one panel a task; error bars are one standard deviation over seeds, dashes single seeds."""
    tasks = list(dict.fromkeys(entry["task"] for entry in entries))
    columns = min(len(tasks), _COLUMNS)
    rows = -(-len(tasks) // columns)
    with matplotlib.rc_context(STYLE):
        sheet = Sheet(
            max(columns * (_WIDTH + 0.85) + 0.4, 5.2),
            rows * (_HEIGHT + 0.95) + 0.85,
            "Dice from each start",
            "Mean over seeds, bars of one standard deviation, a dash for each seed;\n"
            "the same network and budget from each start.",
        )
        for number, task in enumerate(tasks):
            row, column = divmod(number, columns)
            ax = sheet.axes(0.75 + column * (_WIDTH + 0.85), 1.1 + row * (_HEIGHT + 0.95), _WIDTH, _HEIGHT)
            if task:
                ax.set_title(task, loc="left", fontsize=10)
            own = [entry for entry in entries if entry["task"] == task]
            _panel(ax, own, [start for start in initialisations if _of(own, start)])
        sheet.save(path)


def _panel(ax: Axes, entries: Sequence[dict[str, Any]], starts: Sequence[str]) -> None:
    """One task; with one number of labelled cases the starts stand side by side."""
    counts = sorted({entry["training_cases"] for entry in entries})
    side_by_side = len(counts) == 1
    for place, start in enumerate(starts):
        own = _of(entries, start)
        # Apart, so that bars do not hide one another.
        shift = 1 + 0.03 * (place - (len(starts) - 1) / 2)
        # Two fractions may come to one number of cases.
        beside = [place + 0.08 * number for number in range(len(own))]
        across = beside if side_by_side else [entry["training_cases"] * shift for entry in own]
        for x, entry in zip(across, own, strict=True):
            single = [100 * dice for dice in entry["dice_of_seeds"].values()]
            ax.plot([x] * len(single), single, "_", color=_COLOURS.get(start, ALARM), alpha=0.6)
        ax.errorbar(
            across,
            [100 * entry["dice"] for entry in own],
            [100 * (entry["deviation"] or 0) for entry in own],
            color=_COLOURS.get(start, ALARM),
            marker="o",
            markersize=4,
            linewidth=1.6,
            capsize=2.5,
            label=start,
        )
    if side_by_side:
        ax.set_xticks(range(len(starts)), starts)
        ax.set_xlim(-0.6, len(starts) - 0.4)
        ax.set_xlabel(f"start, {counts[0]} labelled training case{'s' if counts[0] > 1 else ''}")
    else:
        ax.set_xscale("log")
        ax.set_xticks(counts, [str(count) for count in counts])
        ax.minorticks_off()
        ax.set_xlim(counts[0] / 1.3, counts[-1] * 1.3)
        ax.set_xlabel("labelled training cases, log scale")
        ax.legend(fontsize=7.5, frameon=False, loc="best")
    ax.set_ylabel("Dice, points")
    ax.grid(axis="y", color="#e6e6e6", linewidth=0.7)


def _of(entries: Sequence[dict[str, Any]], start: str) -> list[dict[str, Any]]:
    return [entry for entry in entries if entry["initialisation"] == start]
