"""``pgl ablate``: what the priors are worth, as in the paper's ablation, and what options beyond it add.

The output folder, DIR/::

    seed0-both/  seed0-crop/  seed0-flip/  seed0-none/   ordinary runs of ``pgl pretrain``, for each seed
    seed0-regions/  seed0-levels/  seed0-unet/           with ``--rows``, and
    seed0-decorrelated/
    pretraining-cache/  encoders/  finetuned/            with ``--finetune``
    ablation.csv      one line a run
    ablation.json     the same, and mean and deviation over the seeds for each row
    ablation.md       the table for people
    report.html       the runs' curves on the same axes

A prior that is off is a transform that the aligner ignores; the views are made with both all the same. The
matching accuracy is always measured with the true geometry (:mod:`pgl.training.validation`), so that the
numbers of a seed are comparable: its runs share the initial encoder, the samples and the validation pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pgl.ablation.dice import AblationTuning
from pgl.ablation.rows import PRIORS, changed
from pgl.ablation.table import write_tables
from pgl.config import PretrainConfig
from pgl.files.lock import only_writer
from pgl.processes.child_runs import RunsStopped
from pgl.processes.child_runs import is_pretrained as is_done
from pgl.processes.child_runs import pretrain_in_child as _pretrain
from pgl.settings import refuse_other_settings

# Where a run lies, and whether it goes on, changes nothing that it computes.
_NOT_COMPARED = ("data", "output", "resume")


class AblationStopped(RunsStopped):
    """One of the runs did not come to its end; ``exit_code`` is its own."""


def planned(
    config: PretrainConfig, seeds: Sequence[int], rows: Sequence[str] = PRIORS
) -> dict[tuple[int, str], PretrainConfig]:
    """The settings of all runs, by seed and row.

    Args:
        config: what they share; ``output`` is the folder of them all.
        seeds: seeds of the weights, samples and splits.
        rows: names in :mod:`pgl.ablation.rows`, by default the four combinations of the priors.

    Raises:
        ValueError: there is no seed or row, an unknown one, or one twice, or the method is another one.
    """
    if config.method.name != "pgl":
        raise ValueError(
            "method.name must be pgl, whose priors and options an ablation changes, got "
            f"{config.method.name!r}"
        )
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different whole numbers of at least 0, got {list(seeds)}")
    if not rows or len(set(rows)) < len(rows):
        raise ValueError(f"rows must be different names of rows, at least one, got {list(rows)}")
    return {
        (seed, row): replace(
            config,
            seed=seed,
            resume=False,
            output=Path(config.output) / f"seed{seed}-{row}",
            method=changed(config, row),
        )
        for seed in seeds
        for row in rows
    }


def ablate(
    config: PretrainConfig,
    seeds: Sequence[int],
    rows: Sequence[str] = PRIORS,
    say: Callable[[str], None] = print,
    tuning: AblationTuning | None = None,
) -> list[dict[str, Any]]:
    """Run what is missing of the ablation, one run after the other, and write its tables and report.

    Runs that are done are kept, one that was interrupted goes on from its last checkpoint. Each is a process
    of its own, ``pgl pretrain``, so that no run inherits anything from the one before.

    Args:
        config: the settings that all runs share; ``output`` is the folder of the ablation, and ``seed`` and
            what the rows change is set here.
        seeds: at least one.
        rows: names in :mod:`pgl.ablation.rows`.
        say: gets a line before each run.
        tuning: fine-tune each run's network for its Dice. The pretrainings then leave out the test cases.

    Returns:
        A dict for each run (:func:`pgl.ablation.table.row_of`).

    Raises:
        ValueError: seeds or rows are wrong, or a run that is there has other settings or other weights.
        InUse: another process is at this ablation.
        AblationStopped: a run failed or was interrupted; ablating again goes on there.
    """
    planned(config, seeds, rows)
    with only_writer(config.output):
        return _ablate(config, seeds, rows, say, tuning)


def _ablate(
    config: PretrainConfig,
    seeds: Sequence[int],
    rows: Sequence[str],
    say: Callable[[str], None],
    tuning: AblationTuning | None,
) -> list[dict[str, Any]]:
    wanted = list(planned(config, seeds, rows).values())
    for run in wanted:
        refuse_other_settings(Path(run.output), run, _NOT_COMPARED, "an ablation")
    if tuning is not None:
        tuning.check(wanted)
        config = tuning.without_test_cases(config, say)
    runs = planned(config, seeds, rows)
    if tuning is not None:
        for run in runs.values():
            tuning.refuse_seen(run)
        tuning.refuse_other_weights(list(runs.values()))
    for place, run in enumerate(runs.values(), start=1):
        name = Path(run.output).name
        if is_done(Path(run.output), run.train.steps):
            say(f"{name}: done before ({place} of {len(runs)})")
        else:
            say(f"{name}: run {place} of {len(runs)}")
            _stop_at(_pretrain(run), name)
        if tuning is not None:
            say(f"{name}: fine-tuning")
            _stop_at(tuning.run(run), f"the fine-tuning of {name}")
    dice = {} if tuning is None else {key: tuning.dice(run) for key, run in runs.items()}
    return write_tables(config, runs, dice)


def _stop_at(code: int, name: str) -> None:
    if code:
        raise AblationStopped(
            f"{name} ended with exit code {code}; the same command goes on from there", code
        )
