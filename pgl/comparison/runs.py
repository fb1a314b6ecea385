"""``pgl compare``: pretrain by every method, fine-tune from every start, and say what it was worth.

The output folder, DIR/::

    pretraining-cache/          the volumes that are pretrained on; no test case is among them
    pretrained/pgl-seed0/       runs of ``pgl pretrain``, one for each method and seed
    encoders/pgl-seed0.pt       what ``pgl export`` makes of their last step; made anew when it is of another
    finetuned/pgl-fraction0.1-seed0/    runs of ``pgl finetune`` (with tasks: liver-pgl-fraction0.1-seed0)
    compare.csv                 one line a fine-tuning
    classes.csv                 one line a fine-tuning and class
    compare.json                both, and the table with its intervals
    compare.md                  the tables for people
    compare.png                 Dice over the number of labelled cases
    report.html                 all of it on one page

    logs/                       with several jobs: what each run printed

The tables are written as fine-tunings end, so they can be read while the rest is still going on.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from pgl.comparison.classes import OF_CLASS
from pgl.comparison.config import Comparison, Tuning
from pgl.comparison.encoders import keep_exported, other_weights, refuse_tunings
from pgl.comparison.page import write_results
from pgl.comparison.side_by_side import INTERRUPTED, Job, cores_each, run_side_by_side
from pgl.comparison.unseen import write_unseen
from pgl.config import PretrainConfig
from pgl.downstream.beforehand import check_beforehand
from pgl.downstream.config import FinetuneConfig
from pgl.downstream.labels import digest_of
from pgl.downstream.resume import LAST
from pgl.downstream.train import RESULTS_FORMAT
from pgl.files.lock import only_writer, reading
from pgl.labels.store import read_labels
from pgl.processes.child_runs import (
    RunsStopped,
    is_pretrained,
    pretrain_in_child,
    remove_run,
    run_pgl,
    write_child_settings,
)
from pgl.runs.folder import CONFIG, SPLIT, cases_of
from pgl.settings import refuse_other_settings, to_plain

# Where a run lies, whether it goes on, and what only moves its work elsewhere.
NOT_COMPARED = {
    "data", "output", "resume", "weights", "source", "layout", "train.workers", "train.accelerator",
    "train.devices", "train.num_nodes", "train.prefetch", "train.threads", "train.log_every",
    "train.checkpoint_every", "train.keep_every", "train.kept", "inference.batch_size",
}  # fmt: skip

OUT_OF_TIME = 124  # the exit code of timeout(1)
# Time between two writings of the tables, in times of how long the last one took.
_LEAST_BETWEEN_WRITES = 10.0
Run = TypeVar("Run", PretrainConfig, FinetuneConfig)


class ComparisonStopped(RunsStopped):
    """Not all runs came to their end; ``exit_code`` is that of the first that failed, 124 after the time
    limit, 130 after an interruption."""


def compare(comparison: Comparison, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Do what is missing of a comparison, and write its tables and its page.

    Runs that are done are kept, one that was interrupted goes on from its last checkpoint. With
    ``settings.jobs`` above 1 several are in progress at once; what they print goes to files in DIR/logs.

    Args:
        comparison: the runs.
        say: gets a line at the start and end of each run.

    Returns:
        The content of compare.json.

    Raises:
        ValueError: a run that is there has other settings, other cases or other weights.
        InUse: another process is at this comparison, or ``pgl prepare`` is changing a cache.
        ComparisonStopped: a run failed, the time is over, or all was interrupted; comparing again goes on
            there.
    """
    # The labelled cases stay as they are from the first run to the last.
    with only_writer(comparison.settings.output), reading(comparison.settings.data):
        return _compare(comparison, say)


def _compare(comparison: Comparison, say: Callable[[str], None]) -> dict[str, Any]:
    settings, began = comparison.settings, time.monotonic()
    for pretraining in comparison.pretrainings.values():
        refuse_other_settings(Path(pretraining.output), pretraining, NOT_COMPARED, "a comparison")
    for tuning in comparison.tunings:
        refuse_other_settings(Path(tuning.config.output), tuning.config, NOT_COMPARED, "a comparison")
    check_beforehand((tuning.task, tuning.config) for tuning in comparison.tunings)
    split = comparison.tunings[0].config.split
    kept, left_out = write_unseen(settings.data, settings.unlabelled, comparison.pretraining_cache, split)
    say(f"pretraining on {len(kept)} cases, without {len(left_out)} volumes of test cases")
    for doubt in comparison.doubts:
        say(doubt)
    ready = _Ready(comparison, kept)
    ready.take_what_is_there(say)
    left_s = max(settings.time_limit_s - (time.monotonic() - began), 1e-9) if settings.time_limit_s else 0.0
    outcome = run_side_by_side(ready.jobs(), settings.jobs, say, settings.keep_going, left_s)
    content = ready.write()
    lacking = f"{len(comparison.tunings) - len(ready.results)} of {len(comparison.tunings)} fine-tunings"
    on = "the same command goes on from there"
    if outcome.interrupted:
        raise ComparisonStopped(f"interrupted, {lacking} are still to be done; {on}", INTERRUPTED)
    if outcome.out_of_time:
        raise ComparisonStopped(
            f"the time limit of {settings.time_limit_s:g} s is over, {lacking} are still to be done; {on}",
            OUT_OF_TIME,
        )
    if outcome.failed:
        name, code = next(iter(outcome.failed.items()))
        more = f", and {len(outcome.failed) - 1} others failed" if len(outcome.failed) > 1 else ""
        told = f" (see {_log(comparison, name)})" if settings.jobs > 1 else ""
        raise ComparisonStopped(f"{name} ended with exit code {code}{told}{more}; {on}", code)
    assert content is not None
    return content


class _Ready:
    """What is done so far, and the jobs that are not."""

    def __init__(self, comparison: Comparison, cases: list[str]) -> None:
        self.comparison, self.cases = comparison, cases
        self.encoders: dict[tuple[str, int], str] = {}  # the finished pretrainings, and their files' SHA-256
        self.results: dict[str, dict[str, Any]] = {}
        self.labels = read_labels(comparison.settings.data)
        self.written, self.writing_took = -math.inf, 0.0

    def take_what_is_there(self, say: Callable[[str], None]) -> None:
        """Note the runs that were done before.

        Raises:
            ValueError: one of them does not belong to the others.
        """
        comparison = self.comparison
        for source, run in comparison.pretrainings.items():
            if is_pretrained(Path(run.output), run.train.steps):
                self._take_pretraining(source)
        refused: list[tuple[Path, str]] = []
        for tuning in comparison.tunings:
            if is_tuned(tuning.config):
                results = _results(tuning.config)
                self.results[Path(tuning.config.output).name] = results
                refused += self._refusal(tuning, results)
            elif (Path(tuning.config.output) / LAST).is_file():
                refused += self._refusal(tuning)
        refuse_tunings(refused, "compare again")
        for place, tuning in enumerate(comparison.tunings, start=1):
            name = Path(tuning.config.output).name
            if name in self.results:
                say(f"{name}: done before ({place} of {len(comparison.tunings)} fine-tunings)")

    def jobs(self) -> list[Job]:
        """What is to be done, in the order in which it is wanted.

        One after the other, a pretraining comes just before the first run that needs it. Several at once,
        the pretrainings of a seed come first, since they take the longest and most of its runs wait for one
        of them; runs that do not wait fill the places that are left.
        """
        jobs = dict[str, Job]()

        def with_pretraining(tuning: Tuning) -> frozenset[str]:
            """What a fine-tuning waits for, which is among the jobs now."""
            source = self.comparison.source_of(tuning)
            if source is None or source in self.encoders:
                return frozenset()
            jobs.setdefault(_name(source), self._pretraining_job(source))
            return frozenset({_name(source)})

        left = [t for t in self.comparison.tunings if Path(t.config.output).name not in self.results]
        for _, of_seed in groupby(left, lambda tuning: tuning.seed):
            tunings = list(of_seed)
            if self.comparison.settings.jobs > 1:
                for tuning in tunings:
                    with_pretraining(tuning)
            for tuning in tunings:
                job = self._tuning_job(tuning, with_pretraining(tuning))
                jobs[job.name] = job
        return list(jobs.values())

    def write(self) -> dict[str, Any] | None:
        """Write the tables and the page; compare.json's content, None if nothing is done."""
        comparison = self.comparison
        done = [
            (tuning, self.results[name])
            for tuning in comparison.tunings
            if (name := Path(tuning.config.output).name) in self.results
        ]
        if not done:
            return None
        began = time.monotonic()
        content = write_results(comparison, done)
        self.written = time.monotonic()
        self.writing_took = self.written - began
        return content

    def _pretraining_job(self, source: tuple[str, int]) -> Job:
        run = _sharing(self.comparison.pretrainings[source], self.comparison.settings.jobs)
        log = self._log(_name(source))
        return Job(
            _name(source),
            lambda: run_pretraining(run, log) if log else run_pretraining(run),
            finished=lambda: self._take_pretraining(source),
        )

    def _tuning_job(self, tuning: Tuning, needs: frozenset[str]) -> Job:
        run = _sharing(tuning.config, self.comparison.settings.jobs)
        name = Path(run.output).name
        log = self._log(name)
        return Job(
            name,
            lambda: run_finetuning(run, log) if log else run_finetuning(run),
            needs,
            lambda: self._take_tuning(tuning, name),
        )

    def _log(self, name: str) -> Path | None:
        return _log(self.comparison, name) if self.comparison.settings.jobs > 1 else None

    def _take_pretraining(self, source: tuple[str, int]) -> None:
        folder = Path(self.comparison.pretrainings[source].output)
        trained_on = {name for names in cases_of(folder).values() for name in names}
        if trained_on != set(self.cases):
            other = ", ".join(sorted(trained_on ^ set(self.cases))[:5])
            raise ValueError(
                f"{folder} was pretrained on other cases ({other}): the cache or the split has changed "
                "since; give another --output"
            )
        self.encoders[source] = keep_exported(folder, self.comparison.encoder_file(*source))

    def _take_tuning(self, tuning: Tuning, name: str) -> None:
        results = _results(tuning.config)
        refuse_tunings(self._refusal(tuning, results), "compare again")
        self.results[name] = results
        # Drawing takes seconds; while runs end faster than that, not after each of them.
        if time.monotonic() - self.written > _LEAST_BETWEEN_WRITES * self.writing_took:
            self.write()

    def _refusal(self, tuning: Tuning, results: dict[str, Any] | None = None) -> list[tuple[Path, str]]:
        """Why a fine-tuning that is there cannot be taken, if so; without ``results`` it is not finished."""
        source, folder = self.comparison.source_of(tuning), Path(tuning.config.output)
        there = source is None or source in self.encoders
        wanted = None if source is None else self.encoders.get(source)
        if results is not None and self._is_of_other_data(results):
            data = self.comparison.settings.data
            why = f"{folder / 'results.json'} was made on other images or labels than {data} holds now"
            return [(folder, why)]
        # One that is not finished compares its weights itself, once there are some.
        if there and (results is None or results["weights_sha256"] == wanted):
            return []
        path = folder if results is None else folder / "results.json"
        if source is None:
            return [(folder, f"{path} was made with other weights than random ones")]
        file = self.comparison.encoder_file(*source)
        pretraining = Path(self.comparison.pretrainings[source].output)
        return [(folder, other_weights(path, pretraining, file, there))]

    def _is_of_other_data(self, results: dict[str, Any]) -> bool:
        """Whether a case of a fine-tuning has changed since."""
        now: str = digest_of(self.labels, results["test"], results["training"])
        return bool(results["data_sha256"] != now)


def _name(source: tuple[str, int]) -> str:
    return f"{source[0]}-seed{source[1]}"


def _log(comparison: Comparison, name: str) -> Path:
    return comparison.folder / "logs" / f"{name}.txt"


def _sharing(run: Run, jobs: int) -> Run:
    """A run with no more threads and reading processes than its share of the cores."""
    if jobs == 1:
        return run
    share = cores_each(jobs)
    train = replace(
        run.train,
        threads=min(run.train.threads or share, share),
        workers=min(run.train.workers, share - 1),
    )
    return replace(run, train=train)


def is_tuned(run: FinetuneConfig) -> bool:
    """Whether a fine-tuning has been tested."""
    return (Path(run.output) / "results.json").is_file()


def run_pretraining(run: PretrainConfig, log: Path | None = None) -> int:
    """Run or go on with a pretraining; its exit code."""
    return pretrain_in_child(run, log)


def run_finetuning(run: FinetuneConfig, log: Path | None = None) -> int:
    """Run or go on with a fine-tuning; its exit code."""
    folder = Path(run.output)
    words = ["finetune", "--config", str(write_child_settings(folder, to_plain(run)))]
    if (folder / CONFIG).is_file() and (folder / SPLIT).is_file():
        words.append("--resume")
    elif folder.is_dir():
        # Killed before it had written who trains: there is nothing to go on from.
        remove_run(folder)
    return run_pgl(words, log)


def _results(run: FinetuneConfig) -> dict[str, Any]:
    path = Path(run.output) / "results.json"
    try:
        results = json.loads(path.read_text("utf-8"))
        good = results["format"] == RESULTS_FORMAT and results["steps"] == run.train.steps
        assert results["weights_sha256"] is None or isinstance(results["weights_sha256"], str)
        assert isinstance(results["data_sha256"], str)
        assert all(isinstance(results[name], list) for name in ("cases", "test", "training"))
        assert all(set(own) >= set(OF_CLASS) for own in results["mean"]["classes"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(
            f"{path} cannot be read ({error!r}): delete {path.parent} and compare again"
        ) from error
    if not good:
        raise ValueError(
            f"{path} is of {results['steps']} steps, not {run.train.steps}: give another --output"
        )
    return dict(results)
