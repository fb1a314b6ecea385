"""``pgl ablate``: what the priors are worth, as in the paper's ablation: each on or off, all else equal.

The output folder, DIR/::

    seed0-both/  seed0-crop/  seed0-flip/  seed0-none/   ordinary runs of ``pgl pretrain``, for each seed
    ablation.csv      one line a run
    ablation.json     the same, and mean and deviation over the seeds for each combination
    ablation.md       the table for people
    report.html       the runs' curves on the same axes

A prior that is off is a transform that the aligner ignores; the views are made with both all the same. The
matching accuracy is always measured with the true geometry (:mod:`pgl.validation`), so that the four numbers
of a seed are comparable: they share the initial network, the samples and the validation pairs.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pgl.atomic import write_json, write_text
from pgl.child_runs import is_pretrained as is_done
from pgl.child_runs import pretrain_in_child as _pretrain
from pgl.config import PretrainConfig, to_plain
from pgl.run_facts import RunFacts, flat, number, read_run
from pgl.run_folder import CONFIG, METRICS

# What the aligner knows: (name, crop prior, flip prior), in the order of the table.
COMBINATIONS = (("both", True, True), ("crop", True, False), ("flip", False, True), ("none", False, False))
TABLE = "ablation"
# Where a run lies, and whether it goes on, changes nothing that it computes.
_NOT_COMPARED = ("data", "output", "resume")


class AblationStopped(RuntimeError):
    """One of the runs did not come to its end; ``exit_code`` is its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def planned(config: PretrainConfig, seeds: Sequence[int]) -> list[PretrainConfig]:
    """The settings of all runs: for each seed the four combinations.

    Args:
        config: what they share; ``output`` is the folder of them all.
        seeds: seeds of the weights, samples and splits.

    Raises:
        ValueError: there is no seed, a negative one, or one twice.
    """
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different whole numbers of at least 0, got {list(seeds)}")
    return [
        replace(
            config,
            seed=seed,
            resume=False,
            output=Path(config.output) / f"seed{seed}-{name}",
            method=replace(config.method, crop_prior=crop, flip_prior=flip),
        )
        for seed in seeds
        for name, crop, flip in COMBINATIONS
    ]


def ablate(
    config: PretrainConfig, seeds: Sequence[int], say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Run what is missing of the ablation, one run after the other, and write its tables and report.

    Runs that are done are kept, one that was interrupted goes on from its last checkpoint. Each is a process
    of its own, ``pgl pretrain``, so that no run inherits anything from the one before.

    Args:
        config: the settings that all runs share; ``output`` is the folder of the ablation, and ``seed`` and
            the two priors are set here.
        seeds: at least one.
        say: gets a line before each run.

    Returns:
        The rows of the table (:func:`rows_of`).

    Raises:
        ValueError: the seeds are wrong, or a run that is there has other settings.
        AblationStopped: a run failed or was interrupted; ablating again goes on there.
    """
    runs = planned(config, seeds)
    for run in runs:
        _refuse_other_settings(run)
    for place, run in enumerate(runs, start=1):
        name = Path(run.output).name
        if is_done(Path(run.output), run.train.steps):
            say(f"{name}: done before ({place} of {len(runs)})")
            continue
        say(f"{name}: run {place} of {len(runs)}")
        code = _pretrain(run)
        if code:
            raise AblationStopped(
                f"{name} ended with exit code {code}; the same command goes on from there", code
            )
    return write_tables(Path(config.output), runs)


def write_tables(folder: Path, runs: Sequence[PretrainConfig]) -> list[dict[str, Any]]:
    """Write ablation.csv, .json and .md and report.html of finished runs; returns the rows."""
    from pgl.report import REPORT, write_report

    facts = [read_run(run.output) for run in runs]
    rows = [row_of(run, fact) for run, fact in zip(runs, facts, strict=True)]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / f"{TABLE}.csv", text.getvalue())
    means = means_of(rows)
    write_json(folder / f"{TABLE}.json", {"runs": rows, "combinations": means})
    write_text(folder / f"{TABLE}.md", markdown(means))
    write_report([run.output for run in runs], folder / REPORT)
    return rows


def row_of(run: PretrainConfig, facts: RunFacts) -> dict[str, Any]:
    """A run as a row of the table.

    ``downstream_dice`` is empty: nothing here trains a segmentation yet.
    """
    first, last, best = facts.untrained or {}, (facts.measured[-1:] or [{}])[0], facts.best or {}
    return {
        "run": facts.name,
        "crop_prior": run.method.crop_prior,
        "flip_prior": run.method.flip_prior,
        "seed": run.seed,
        "steps": facts.step,
        "matching_accuracy_untrained": number(first, "matching_accuracy"),
        "matching_accuracy": number(last, "matching_accuracy"),
        "matching_accuracy_best": number(best, "matching_accuracy"),
        "best_step": best.get("step"),
        "chance": number(last, "chance"),
        "feature_spread": number(last, "feature_spread"),
        "feature_rank": number(last, "feature_rank"),
        "seconds": round(facts.seconds, 1),
        "downstream_dice": None,
    }


def means_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and, over two seeds or more, standard deviation of each combination."""
    result = []
    for name, crop, flip in COMBINATIONS:
        own = [row for row in rows if (row["crop_prior"], row["flip_prior"]) == (crop, flip)]
        entry: dict[str, Any] = {"combination": name, "crop_prior": crop, "flip_prior": flip}
        entry["seeds"] = len(own)
        for key in (
            "matching_accuracy_untrained", "matching_accuracy", "matching_accuracy_best", "feature_spread",
            "downstream_dice",
        ):  # fmt: skip
            values = [row[key] for row in own if row[key] is not None]
            entry[key] = statistics.mean(values) if values else None
            entry[f"{key}_deviation"] = statistics.stdev(values) if len(values) > 1 else None
        result.append(entry)
    return result


HEADINGS = ("crop + scale prior", "flip prior", "untrained", "last step", "best step", "spread", "Dice")


def table_rows(means: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The combinations as rows of text under ``HEADINGS``."""

    def cell(entry: dict[str, Any], key: str, digits: int = 4) -> str:
        mean, deviation = entry[key], entry[f"{key}_deviation"]
        if mean is None:
            return "–"
        return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation is not None else "")

    return [
        [
            "on" if entry["crop_prior"] else "off",
            "on" if entry["flip_prior"] else "off",
            cell(entry, "matching_accuracy_untrained"),
            cell(entry, "matching_accuracy"),
            cell(entry, "matching_accuracy_best"),
            cell(entry, "feature_spread", 3),
            cell(entry, "downstream_dice", 3),
        ]
        for entry in means
    ]


def markdown(means: Sequence[dict[str, Any]]) -> str:
    """The table, with what it shows."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|" + "---|" * len(HEADINGS)]
    lines += [f"| {' | '.join(row)} |" for row in table_rows(means)]
    seeds = means[0]["seeds"]
    over = (
        f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed, so without a deviation"
    )
    return (
        "\n".join(lines) + "\n\nMatching accuracy of the encoder's features (untrained, last and best step), "
        f"measured with the true geometry whatever the aligner knew; {over}. Dice: not measured.\n"
    )


def _refuse_other_settings(run: PretrainConfig) -> None:
    folder = Path(run.output)
    if not (folder / CONFIG).is_file() or not (folder / METRICS).is_file():
        return
    there, wanted = read_run(folder).settings, flat(to_plain(run))
    changed = sorted(key for key in wanted if key not in _NOT_COMPARED and there.get(key) != wanted[key])
    if changed:
        key = changed[0]
        raise ValueError(
            f"{folder} is a run with other settings: {', '.join(changed)} ({key} was {there.get(key)}, now "
            f"{wanted[key]}); runs of an ablation must be alike: give the same settings, or another --output"
        )
