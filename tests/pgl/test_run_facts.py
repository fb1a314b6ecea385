"""A run's record, read back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from pgl.runs.facts import read_run
from pgl.runs.words import duration, figures, names_of, summary

from .run_files import training_line, validation_line, write_run


def test_the_key_figures_are_those_of_the_lines(tmp_path):
    lines = [validation_line(0, 0.05), training_line(10, 1.5), validation_line(10, 0.2)]
    lines += [training_line(20, 0.5), validation_line(20, 0.15)]
    run = read_run(write_run(tmp_path / "run", lines))
    assert (run.step, run.steps) == (20, 100)
    assert run.best is not None and run.best["step"] == 10
    shown = dict(figures(run))
    assert shown["matching, untrained"] == "0.0500"
    assert shown["matching, last"] == "0.1500"
    assert shown["matching, best"] == "0.2000 at step 10"
    assert shown["best to untrained"] == "4.00×"
    assert shown["pairs/s, median"] == "4.0"  # two steps a second of two pairs each
    assert summary(run) == (
        "20 of 100 steps, in 10 s. The matching accuracy went from 0.0500, untrained, to 0.1500; at best "
        "0.2000, at step 10. Guessing gives 0.0300."
    )


def test_step_zero_never_counts_as_best(tmp_path):
    run = read_run(write_run(tmp_path / "run", [validation_line(0, 0.9), validation_line(5, 0.1)]))
    assert run.best is not None and run.best["step"] == 5


def test_the_time_of_a_resumed_run_is_that_of_all_its_starts(tmp_path):
    # 30 s until step 10; then, in a second start whose clock begins again, 4 s and 9 s.
    lines = [training_line(5, seconds=15), training_line(10, seconds=30)]
    lines += [training_line(12, seconds=4), training_line(14, seconds=9)]
    assert read_run(write_run(tmp_path / "run", lines)).seconds == 39


def test_settings_newer_than_the_run_have_their_defaults(tmp_path):
    folder = write_run(tmp_path / "run", [training_line(1)])
    plain = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    del plain["method"]["crop_prior"]
    (folder / "config.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    assert read_run(folder).settings["method.crop_prior"] is True


def test_the_same_warning_is_told_once_with_its_latest_numbers(tmp_path):
    log = [
        "WARNING, COLLAPSE: feature_spread is 0.0400, below 0.05: lower it",
        "step 20: all is well",
        "WARNING, COLLAPSE: feature_spread is 0.0100, below 0.05: lower it",
        "WARNING, COLLAPSE: projected_spread is 0.0100, below 0.05: lower it",
        "validation uses the training cases: 2 cases are too few",
    ]
    run = read_run(write_run(tmp_path / "run", [training_line(1)], log=log))
    assert run.warnings() == [
        "WARNING, COLLAPSE: feature_spread is 0.0100, below 0.05: lower it (the last of 2)",
        "WARNING, COLLAPSE: projected_spread is 0.0100, below 0.05: lower it",
        "validation uses the training cases: 2 cases are too few",
    ]


def test_warnings_about_different_cases_are_different(tmp_path):
    log = [f"WARNING: case {case} is left out" for case in ("a_001", "a_002", "1.2.840.1", "1.2.840.2")]
    run = read_run(write_run(tmp_path / "run", [training_line(1)], log=log))
    assert run.warnings() == log


def test_a_loss_that_is_no_number_and_an_accuracy_that_did_not_rise_are_warned_of(tmp_path):
    lines = [
        validation_line(0, 0.1),
        training_line(10),
        training_line(20, math.nan),
        validation_line(20, 0.1),
    ]
    first, second = read_run(write_run(tmp_path / "run", lines)).warnings()
    assert "not finite at step 20" in first
    assert "0.1000 at step 20, is not above that of the untrained network" in second


def test_a_batch_that_was_described_is_pointed_at_once(tmp_path):
    folder = write_run(tmp_path / "run", [training_line(10)])
    for name in ("bad-batch-17-process-0.json", "bad-batch-17-process-1.json"):
        (folder / name).write_text("{}", encoding="utf-8")
    (told,) = read_run(folder).warnings()
    assert "not finite in step 17" in told


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "b" / "other"]
    runs = [read_run(write_run(folder, [training_line(1)])) for folder in folders]
    assert names_of(runs) == ["a/run", "b/run", "b/other"]
    assert names_of(runs[1:]) == ["run", "other"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (99.4, "99 s"), (700, "12 min"), (3 * 3600 + 310, "3 h 05 min"), (52 * 3600, "2 d 4 h")],
)
def test_durations_are_said_as_people_do(seconds, words):
    assert duration(seconds) == words


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run at"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no .*config\.yaml"):
        read_run(tmp_path)
    folder = write_run(tmp_path / "run", [training_line(1)])
    (folder / "config.yaml").write_text("train: [", encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.yaml cannot be read as YAML"):
        read_run(folder)


def test_a_damaged_environment_is_not_fatal(tmp_path: Path):
    folder = write_run(tmp_path / "run", [training_line(1)])
    (folder / "environment.json").write_text(json.dumps({"starts": "?"})[:-1], encoding="utf-8")
    assert read_run(folder).starts == []
