"""A run in words and key figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pgl.runs.facts import RunFacts, number

# What the loss of each method is.
LOSSES = {
    "pgl": "2 − 2·cos between prediction and target of aligned voxels; it starts near 2",
    "byol": "2 − 2·cos between prediction and target of whole views, both directions added; it starts near 4",
    "genesis": "mean squared difference between restored and clean voxels, which lie in [0, 1]",
}


def loss_in_words(settings: Mapping[str, Any]) -> str:
    """What the loss of a run is, from its settings by their dotted names."""
    words = LOSSES[str(settings["method.name"])]
    weight = settings["method.decorrelation"]
    if not weight:
        return words
    return f"{words}, and {shown_value(weight)} times the correlations of the projection's channels"


def names_of(runs: Sequence[RunFacts]) -> list[str]:
    """What to call each run: its folder's name, with as many parents as it takes to tell them apart."""
    paths = [run.folder.resolve() for run in runs]
    names = [path.name for path in paths]
    for parts in range(2, max(len(path.parts) for path in paths) + 1):
        if len(set(names)) == len(names):
            break
        names = ["/".join(path.parts[-parts:]) for path in paths]
    return names


def summary(run: RunFacts) -> str:
    """The run in two sentences."""
    done = f"{run.step:,} of {run.steps:,} steps" if run.step < run.steps else f"All {run.steps:,} steps"
    text = f"{done}, in {duration(run.seconds)}."
    first, last, best = run.untrained, run.measured[-1:], run.best
    if first is None or not last or best is None:
        return text + " The network in training was not measured yet."
    then, now = number(first, "matching_accuracy"), number(last[0], "matching_accuracy")
    if then is None or now is None:
        return text
    text += f" The matching accuracy went from {then:.4f}, untrained, to {now:.4f}"
    if best["step"] != last[0]["step"]:
        text += f"; at best {best['matching_accuracy']:.4f}, at step {best['step']:,}"
    guess = number(last[0], "chance")
    return text + (f". Guessing gives {guess:.4f}." if guess is not None else ".")


def figures(run: RunFacts) -> list[tuple[str, str]]:
    """The key figures by their names, the same for every run, so that they make a table."""
    first, last, best = run.untrained or {}, (run.measured[-1:] or [{}])[0], run.best or {}
    speed = run.steps_per_s
    final = number(run.train[-1], "loss") if run.train else None
    then, peak = number(first, "matching_accuracy"), number(best, "matching_accuracy")
    device = str(run.starts[-1].get("device", "")) if run.starts else ""
    return [
        ("steps", f"{run.step:,} of {run.steps:,}"),
        ("training loss", _fixed(final, 3)),
        ("matching, untrained", _fixed(then, 4)),
        ("matching, last", _fixed(number(last, "matching_accuracy"), 4)),
        ("matching, best", _fixed(peak, 4) + (f" at step {best['step']:,}" if best else "")),
        ("best to untrained", f"{peak / then:.2f}×" if peak is not None and then else "–"),
        ("chance", _fixed(number(last or first, "chance"), 4)),
        ("feature spread", _fixed(number(last, "feature_spread"), 3)),
        ("feature rank", _fixed(number(last, "feature_rank"), 1)),
        ("steps/s, median", _fixed(speed, 2)),
        ("pairs/s, median", _fixed(speed and speed * run.settings["train.batch_size"], 1)),
        ("time", duration(run.seconds)),
        ("device", device or "–"),
    ]


def duration(seconds: float) -> str:
    """Seconds in words: ``48 s``, ``12 min``, ``3 h 05 min``, ``2 d 4 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h"


def shown_value(value: Any) -> str:
    """A value from a file as text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.5g}" if math.isfinite(value) else str(value)
    if isinstance(value, list):
        between = " " if any(isinstance(item, str) for item in value) else ", "
        return between.join(
            f"({shown_value(item)})" if isinstance(item, list) else shown_value(item) for item in value
        )
    return "–" if value is None else str(value)


def _fixed(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
