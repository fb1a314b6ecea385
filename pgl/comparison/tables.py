"""What the fine-tunings of a comparison scored, as rows and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pgl.comparison.config import Comparison, Tuning
from pgl.comparison.statistics import paired_difference

Done = Sequence[tuple[Tuning, dict[str, Any]]]
MEAN = "mean of tasks"
BASES = ("random", "byol")
HEADINGS = ("task", "label fraction", "labelled cases", "start", "Dice", "over random", "over BYOL")


def place_of(tuning: Tuning) -> dict[str, Any]:
    """Which fine-tuning a row is of: the first columns of every CSV."""
    return {
        "run": Path(tuning.config.output).name,
        "task": tuning.task,
        "initialisation": tuning.initialisation,
        "fraction": tuning.fraction,
        "seed": tuning.seed,
    }


def rows_of(done: Done) -> list[dict[str, Any]]:
    """One row a fine-tuning, for the CSV."""
    return [
        {
            **place_of(tuning),
            "training_cases": len(results["training"]),
            "test_cases": len(results["test"]),
            "steps": results["steps"],
            "dice": results["mean"]["dice"],
            "hd95_mm": results["mean"]["hd95_mm"],
            "weights_sha256": results["weights_sha256"] or "",
        }
        for tuning, results in done
    ]


def scores_of(results: Sequence[dict[str, Any]]) -> np.ndarray:
    """Dice of runs on the same test cases, float [runs, cases, classes]; NaN where there is none.

    Raises:
        ValueError: the runs were tested on different cases or classes.
    """
    subjects, classes = results[0]["test"], results[0]["classes"]
    scores = np.full((len(results), len(subjects), len(classes)), np.nan)
    for number, result in enumerate(results):
        if result["test"] != subjects or result["classes"] != classes:
            raise ValueError("runs of one task were tested on different cases or classes: not comparable")
        for case in result["cases"]:
            if case["dice"] is not None:
                row, column = subjects.index(case["subject"]), classes.index(case["class"])
                scores[number, row, column] = case["dice"]
    return scores


def summarise(comparison: Comparison, done: Done) -> list[dict[str, Any]]:
    """One entry for each task (and their mean), fraction and initialisation of which something is done.

    ``dice`` is the mean over seeds, ``deviation`` their standard deviation (None for one seed),
    ``dice_of_seeds`` that of each, by its number as text, ``over`` the differences to random and BYOL on the
    seeds that both have.
    """
    by_place = {(t.task, t.fraction, t.initialisation, t.seed): r for t, r in done}
    entries = []
    for task in comparison.tasks:
        for fraction, starts in comparison.settings.starts().items():
            for start in starts:
                entries.append(_entry(comparison, by_place, [task], task, fraction, start))
    if len(comparison.tasks) > 1:
        for fraction, starts in comparison.settings.starts().items():
            for start in starts:
                entries.append(_entry(comparison, by_place, comparison.tasks, MEAN, fraction, start))
    return [entry for entry in entries if entry["seeds"]]


def _entry(
    comparison: Comparison,
    by_place: dict[tuple[str, float, str, int], dict[str, Any]],
    tasks: Sequence[str],
    name: str,
    fraction: float,
    start: str,
) -> dict[str, Any]:
    def seeds_of(which: str) -> list[int]:
        return [
            seed
            for seed in comparison.settings.seeds
            if all((task, fraction, which, seed) in by_place for task in tasks)
        ]

    def runs(task: str, which: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
        return [by_place[task, fraction, which, seed] for seed in seeds]

    seeds = seeds_of(start)
    dice = [
        statistics.mean(_known(by_place[task, fraction, start, seed]["mean"]["dice"], task) for task in tasks)
        for seed in seeds
    ]
    over = {}
    for base in BASES:
        both = [seed for seed in seeds if seed in seeds_of(base)]
        if base != start and both:
            pairs = [(scores_of(runs(t, start, both)), scores_of(runs(t, base, both))) for t in tasks]
            over[base] = asdict(paired_difference(pairs))
    return {
        "task": name,
        "fraction": fraction,
        "initialisation": start,
        "training_cases": len(runs(tasks[0], start, seeds)[0]["training"]) if seeds else None,
        "seeds": len(seeds),
        "dice": statistics.mean(dice) if dice else None,
        "deviation": statistics.stdev(dice) if len(dice) > 1 else None,
        "dice_of_seeds": dict(zip(map(str, seeds), dice, strict=True)),
        "over": over,
    }


def _known(value: float | None, task: str) -> float:
    if value is None:
        raise ValueError(
            f"no test case has any class of {f'task {task}' if task else 'the task'}, so there is no Dice: "
            "raise finetune.split.test_fraction, or name other finetune.split.test_subjects"
        )
    return value


def table_rows(entries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The entries as rows of text under ``HEADINGS``, in Dice points (hundredths)."""
    return [
        [
            entry["task"] or "–",
            f"{entry['fraction']:g}",
            str(entry["training_cases"]),
            entry["initialisation"],
            points(entry["dice"], entry["deviation"]),
            _difference(entry["over"].get("random")),
            _difference(entry["over"].get("byol")),
        ]
        for entry in entries
    ]


def points(dice: float, deviation: float | None) -> str:
    """A Dice in points, with its standard deviation where there is one, as text."""
    return f"{100 * dice:.2f}" + (f" ± {100 * deviation:.2f}" if deviation is not None else "")


def _difference(over: dict[str, Any] | None) -> str:
    if over is None:
        return "–"
    text = f"{100 * over['mean']:+.2f}".replace("-", "−")
    if over["low"] is not None:
        between = f"[{100 * over['low']:+.2f}, {100 * over['high']:+.2f}]".replace("-", "−")
        text += f" {between}"
    return f"{text}, {over['wins']} of {over['seeds']} seeds"


def notes(comparison: Comparison, done: Done) -> list[str]:
    """What a reader must know to read the table."""
    settings = comparison.settings
    seeds = len(settings.seeds)
    low, high = (f"{hu:g}".replace("-", "−") for hu in comparison.genesis_clip_hu)
    told = [
        "Dice in points (hundredths): the mean over test cases for each class, then over classes; the mean "
        "and, over two seeds or more, the standard deviation over seeds.",
        "Differences are paired: same seed, same labelled cases, same test cases. In brackets the 95 % "
        "interval of a bootstrap that draws seeds and test cases anew (10,000 times), then on how many seeds "
        "it is better. The interval knows nothing of other data, networks or budgets.",
        "The network of the last step is tested; nothing was chosen by its score. Test cases were in no "
        "pretraining.",
        f"Models Genesis takes its own intensities, HU in [{low}, {high}] scaled to [0, 1], in "
        "fine-tuning too.",
    ]
    if comparison.carries_decoder:
        told.append(
            "From pgl the decoder is carried over as well, as far as it was pretrained; from no other method."
        )
    if fresh := comparison.fresh_stages:
        which = "deepest pretrained stage" if fresh == 1 else f"{fresh} deepest pretrained stages"
        told.append(f"Not carried over, from any method: the encoder's {which} (fresh_stages {fresh}).")
    if seeds == 1:
        told.append("One seed: nothing tells how much another seed changes; intervals are over cases alone.")
    elif seeds < 3:
        told.append(f"Only {seeds} seeds: the spread over seeds is hardly known.")
    if settings.pretrain_once and seeds > 1:
        told.append("Pretrained once: the spread over seeds is that of fine-tuning alone.")
    if done and len(done[0][1]["test"]) < 10:
        told.append(f"Only {len(done[0][1]['test'])} test cases.")
    lacking = len(comparison.tunings) - len(done)
    if lacking:
        told.append(
            f"Not finished: {lacking} of {len(comparison.tunings)} fine-tunings are still to be done."
        )
    return told
