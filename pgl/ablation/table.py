"""The tables of an ablation: one line a run, and mean and deviation of each row over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pgl.ablation.rows import described
from pgl.cache.volumes import VolumeCache
from pgl.config import PretrainConfig
from pgl.files.atomic import write_json, write_text
from pgl.methods.registry import build_method
from pgl.runs.facts import RunFacts, number, read_run
from pgl.runs.folder import INITIAL, LAST, checkpoint_path
from pgl.table_text import csv_text, markdown_table
from pgl.training.checkpoint import load_checkpoint
from pgl.training.contexts import hold_out
from pgl.training.validation import Validation

TABLE = "ablation"
HEADINGS = (
    "row", "crop + scale prior", "flip prior", "untrained", "last step", "best step", "encoder, untrained",
    "encoder, last step", "spread", "Dice",
)  # fmt: skip
# Of which the table has mean and deviation.
_MEASURED = (
    "matching_accuracy_untrained", "matching_accuracy", "matching_accuracy_best", "encoder_untrained",
    "encoder", "feature_spread", "downstream_dice",
)  # fmt: skip


def write_tables(
    config: PretrainConfig,
    runs: Mapping[tuple[int, str], PretrainConfig],
    dice: Mapping[tuple[int, str], float | None],
) -> list[dict[str, Any]]:
    """Write ablation.csv, .json and .md and report.html of finished runs.

    Args:
        config: what the runs share; ``output`` is the folder of the ablation.
        runs: their settings, by seed and row.
        dice: of their networks, fine-tuned; empty where that was not done.

    Returns:
        A dict for each run (:func:`row_of`).
    """
    from pgl.report import REPORT, write_report

    folder = Path(config.output)
    rows = [row_of(key[1], run, read_run(run.output), config, dice.get(key)) for key, run in runs.items()]
    write_text(folder / f"{TABLE}.csv", csv_text(list(rows[0]), rows))
    means = means_of(rows)
    write_json(folder / f"{TABLE}.json", {"runs": rows, "combinations": means})
    write_text(folder / f"{TABLE}.md", markdown(means))
    write_report([run.output for run in runs.values()], folder / REPORT)
    return rows


def row_of(
    name: str, run: PretrainConfig, facts: RunFacts, shared: PretrainConfig, dice: float | None = None
) -> dict[str, Any]:
    """A run as a line of the table.

    ``matching_accuracy`` is of the features that the run compares. ``encoder`` is that of the features which
    the shared settings name, in all rows alike: a run that compares others is measured for it.

    Args:
        name: of the row.
        run: its settings.
        facts: what it left behind.
        shared: the settings that all rows share.
        dice: after fine-tuning, if that was done.
    """
    first, last, best = facts.untrained or {}, (facts.measured[-1:] or [{}])[0], facts.best or {}
    untrained, trained = number(first, "matching_accuracy"), number(last, "matching_accuracy")
    if _features(run) == _features(shared):
        encoder = (untrained, trained)
    else:
        encoder = (encoder_accuracy(run, shared, INITIAL), encoder_accuracy(run, shared, LAST))
    return {
        "run": facts.name,
        "row": name,
        "change": described(name, run.method),
        "crop_prior": run.method.crop_prior,
        "flip_prior": run.method.flip_prior,
        "seed": run.seed,
        "steps": facts.step,
        "matching_accuracy_untrained": untrained,
        "matching_accuracy": trained,
        "matching_accuracy_best": number(best, "matching_accuracy"),
        "best_step": best.get("step"),
        "encoder_untrained": encoder[0],
        "encoder": encoder[1],
        "chance": number(last, "chance"),
        "feature_spread": number(last, "feature_spread"),
        "feature_rank": number(last, "feature_rank"),
        "seconds": round(facts.seconds, 1),
        "downstream_dice": dice,
    }


def encoder_accuracy(run: PretrainConfig, shared: PretrainConfig, checkpoint: str) -> float:
    """Matching accuracy of a checkpoint's encoder, on the run's validation pairs, at the stage that the
    shared settings name."""
    config = replace(shared, seed=run.seed)
    cache = VolumeCache(run.data)
    _, held_out = hold_out([case.case_id for case in cache.cases], run.validation.fraction, run.seed)
    method = build_method(config)
    weights = load_checkpoint(checkpoint_path(run.output, checkpoint))["online"]["encoder"]
    method.backbone.encoder.load_state_dict(weights)
    threads = torch.get_num_threads()
    if run.train.threads:
        torch.set_num_threads(run.train.threads)
    try:
        return Validation(cache, held_out, config).measure(method)["matching_accuracy"]
    finally:
        torch.set_num_threads(threads)


def means_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and, over two seeds or more, standard deviation of each row of the table."""
    result = []
    for name in dict.fromkeys(row["row"] for row in rows):
        own = [row for row in rows if row["row"] == name]
        entry = {"combination": name, **{key: own[0][key] for key in ("change", "crop_prior", "flip_prior")}}
        entry["seeds"] = len(own)
        for key in _MEASURED:
            values = [row[key] for row in own if row[key] is not None]
            entry[key] = statistics.mean(values) if values else None
            entry[f"{key}_deviation"] = statistics.stdev(values) if len(values) > 1 else None
        result.append(entry)
    return result


def table_rows(means: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The means as rows of text under ``HEADINGS``."""

    def cell(entry: dict[str, Any], key: str) -> str:
        mean, deviation = entry[key], entry[f"{key}_deviation"]
        digits = 4 if key.startswith(("matching", "encoder")) else 3
        if mean is None:
            return "–"
        return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation is not None else "")

    return [
        [
            entry["change"],
            "on" if entry["crop_prior"] else "off",
            "on" if entry["flip_prior"] else "off",
            *(cell(entry, key) for key in _MEASURED),
        ]
        for entry in means
    ]


def markdown(means: Sequence[dict[str, Any]]) -> str:
    """The table, with what it shows."""
    seeds = means[0]["seeds"]
    over = (
        f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed, so without a deviation"
    )
    dice = (
        "not measured"
        if means[0]["downstream_dice"] is None
        else (
            "mean over classes and test cases, which no run has seen, after fine-tuning from the last step's "
            "encoder (and decoder, in a row that pretrains it)"
        )
    )
    return (
        markdown_table(HEADINGS, table_rows(means))
        + "\nMatching accuracy (untrained, last and best step) of the features that a row "
        "compares, measured with the true geometry whatever the aligner knew; *encoder*: of the encoder's "
        f"features that the first rows compare, in all rows; {over}. Dice: {dice}.\n"
    )


def _features(run: PretrainConfig) -> tuple[str, int]:
    return run.method.features, run.method.feature_level
