"""``pgl compare``: pretrain by every method, fine-tune from every start, and say what it was worth.

The output folder, DIR/::

    pretraining-cache/          the volumes that are pretrained on; no test case is among them
    pretrained/pgl-seed0/       runs of ``pgl pretrain``, one for each method and seed
    encoders/pgl-seed0.pt       what ``pgl export`` made of their last step
    finetuned/pgl-fraction0.1-seed0/    runs of ``pgl finetune`` (with tasks: liver-pgl-fraction0.1-seed0)
    compare.csv                 one line a fine-tuning
    compare.json                the same, and the table with its intervals
    compare.md                  the table for people
    compare.png                 Dice over the number of labelled cases
    report.html                 all of it on one page

The tables are written after every fine-tuning, so they can be read while the rest is still going on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pgl.child_runs import is_pretrained, pretrain_in_child, run_pgl, write_child_settings
from pgl.comparison.config import Comparison, Tuning
from pgl.comparison.page import write_results
from pgl.comparison.unseen import write_unseen
from pgl.config import PretrainConfig
from pgl.config import to_plain as plain_pretraining
from pgl.downstream.config import FinetuneConfig
from pgl.downstream.config import to_plain as plain_finetuning
from pgl.downstream.train import RESULTS_FORMAT
from pgl.export import export_encoder
from pgl.manifest import sha256_of
from pgl.run_facts import flat
from pgl.run_folder import CONFIG, ENVIRONMENT, METRICS, cases_of

# Where a run lies, whether it goes on, and what only moves its work elsewhere.
_NOT_COMPARED = {
    "data", "output", "resume", "weights", "source", "layout", "train.workers", "train.accelerator",
    "train.devices", "train.num_nodes", "train.prefetch", "train.threads", "train.log_every",
    "train.checkpoint_every", "train.keep_every", "train.kept", "inference.batch_size",
}  # fmt: skip


class ComparisonStopped(RuntimeError):
    """One of the runs did not come to its end; ``exit_code`` is its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def compare(comparison: Comparison, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Do what is missing of a comparison, one run after the other, and write its tables and its page.

    Runs that are done are kept, one that was interrupted goes on from its last checkpoint.

    Args:
        comparison: the runs.
        say: gets a line before each run.

    Returns:
        The content of compare.json.

    Raises:
        ValueError: a run that is there has other settings, other cases or other weights.
        ComparisonStopped: a run failed or was interrupted; comparing again goes on there.
    """
    settings = comparison.settings
    for pretraining in comparison.pretrainings.values():
        _refuse_other_settings(Path(pretraining.output), plain_pretraining(pretraining))
    for tuning in comparison.tunings:
        _refuse_other_settings(Path(tuning.config.output), plain_finetuning(tuning.config))
    split = comparison.tunings[0].config.split
    kept, left_out = write_unseen(settings.data, settings.unlabelled, comparison.pretraining_cache, split)
    say(f"pretraining on {len(kept)} cases, without {len(left_out)} test cases")
    done: list[tuple[Tuning, dict[str, Any]]] = []
    for place, tuning in enumerate(comparison.tunings, start=1):
        source = comparison.source_of(tuning)
        if source is not None:
            _pretrain(comparison.pretrainings[source], comparison.encoder_file(*source), kept, say)
        name = Path(tuning.config.output).name
        where = f"({place} of {len(comparison.tunings)} fine-tunings)"
        if is_tuned(tuning.config):
            say(f"{name}: done before {where}")
            done.append((tuning, _results(tuning.config)))
            continue
        say(f"{name} {where}")
        _finetune(tuning.config, name)
        done.append((tuning, _results(tuning.config)))
        write_results(comparison, done)
    return write_results(comparison, done)


def is_tuned(run: FinetuneConfig) -> bool:
    """Whether a fine-tuning has been tested."""
    return (Path(run.output) / "results.json").is_file()


def _pretrain(run: PretrainConfig, file: Path, cases: list[str], say: Callable[[str], None]) -> None:
    folder = Path(run.output)
    if not is_pretrained(folder, run.train.steps):
        say(f"{folder.name}: pretraining")
        code = run_pretraining(run)
        if code:
            raise _stopped(folder.name, code)
    trained_on = {name for names in cases_of(folder).values() for name in names}
    if trained_on != set(cases):
        raise ValueError(
            f"{folder} was pretrained on other cases ({', '.join(sorted(trained_on ^ set(cases))[:5])}): the "
            "cache or the split has changed since; give another --output"
        )
    if not file.is_file():
        export_encoder(folder, file)


def _finetune(run: FinetuneConfig, name: str) -> None:
    code = run_finetuning(run)
    if code:
        raise _stopped(name, code)


def run_pretraining(run: PretrainConfig) -> int:
    """Run or go on with a pretraining; its exit code."""
    return pretrain_in_child(run)


def run_finetuning(run: FinetuneConfig) -> int:
    """Run or go on with a fine-tuning; its exit code."""
    folder = Path(run.output)
    words = ["finetune", "--config", str(write_child_settings(folder, plain_finetuning(run)))]
    if (folder / CONFIG).is_file() and (folder / "split.json").is_file():
        words.append("--resume")
    elif folder.is_dir():
        # Killed before it had written who trains: there is nothing to go on from.
        shutil.rmtree(folder)
    return run_pgl(words)


def _stopped(name: str, code: int) -> ComparisonStopped:
    return ComparisonStopped(f"{name} ended with exit code {code}; the same command goes on from there", code)


def _results(run: FinetuneConfig) -> dict[str, Any]:
    path = Path(run.output) / "results.json"
    try:
        results = json.loads(path.read_text("utf-8"))
        good = results["format"] == RESULTS_FORMAT and results["steps"] == run.train.steps
        weights = results["weights_sha256"]
        assert isinstance(results["mean"]["classes"], dict) and isinstance(results["cases"], list)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(
            f"{path} cannot be read ({error!r}): delete {path.parent} and compare again"
        ) from error
    if not good:
        raise ValueError(
            f"{path} is of {results['steps']} steps, not {run.train.steps}: give another --output"
        )
    if weights is not None and weights != sha256_of(Path(run.weights)):
        raise ValueError(
            f"{path} was made with other weights than {run.weights} holds now: delete {path.parent} and "
            "compare again"
        )
    return dict(results)


def _refuse_other_settings(folder: Path, wanted_plain: dict[str, Any]) -> None:
    import yaml

    if not (folder / CONFIG).is_file() or not (
        (folder / METRICS).is_file() or (folder / ENVIRONMENT).is_file()
    ):
        return
    there = _by_name(yaml.safe_load((folder / CONFIG).read_text("utf-8")) or {})
    wanted = _by_name(wanted_plain)
    changed = sorted(k for k in wanted if k not in _NOT_COMPARED and k in there and there[k] != wanted[k])
    if changed:
        key = changed[0]
        raise ValueError(
            f"{folder} is a run with other settings: {', '.join(changed)} ({key} was {there[key]}, now "
            f"{wanted[key]}); runs of a comparison must be alike: give the same settings, or another --output"
        )


def _by_name(plain: dict[str, Any]) -> dict[str, Any]:
    """Settings by their dotted names, but the classes as one: their names are no settings."""
    classes = {"classes": plain["classes"]} if "classes" in plain else {}
    return {**flat({key: value for key, value in plain.items() if key != "classes"}), **classes}
