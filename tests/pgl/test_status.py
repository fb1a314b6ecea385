"""``pgl status``: what it says of runs in every state, and its exit code."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import pgl.pretrain
from pgl.cli import main
from pgl.runs.folder import LAST, checkpoint_path
from pgl.runs.status import Status, status_of
from pgl.training.checkpoint import save_checkpoint

from .run_files import training_line, validation_line, write_run
from .training_data import make_cache, small_config

NOW = 1_800_000_000.0
DONE = "done: 100 steps, everything lies in run"


def aged(run: Path, line_s: float, checkpoint_s: float | None = None) -> Path:
    """The run with a last line, and perhaps a checkpoint, of the given ages."""
    os.utime(run / "metrics.jsonl", (NOW - line_s,) * 2)
    if checkpoint_s is not None:
        last = checkpoint_path(run, LAST)
        last.parent.mkdir(exist_ok=True)
        last.write_bytes(b"")
        os.utime(last, (NOW - checkpoint_s,) * 2)
    return run


def seen(tmp_path: Path, step: int, line_s: float, checkpoint_s: float | None = None, **more) -> Status:
    lines = [validation_line(0, 0.05), *(training_line(s, 2 - s / 100) for s in range(10, step + 1, 10))]
    return status_of(aged(write_run(tmp_path / "run", lines, **more), line_s, checkpoint_s), NOW)


def test_a_run_that_writes_lines_is_running_and_says_how_long_it_still_takes(tmp_path):
    status = seen(tmp_path, 40, line_s=5, checkpoint_s=70)
    assert (status.state, status.step, status.steps) == ("running", 40, 100)
    assert status.loss == pytest.approx(1.6)
    assert status.steps_per_s == pytest.approx(2.0)  # the lines' seconds: 10 steps in 5 s
    assert status.seconds_left == pytest.approx(30)
    assert status.checkpoint_s == 70


def test_the_time_left_counts_validation_and_checkpoints(tmp_path):
    # Training alone makes 2 steps a second, but 10 steps took 20 s of wall time.
    lines = [training_line(step, seconds=2 * step) for step in (10, 20, 30)]
    status = status_of(aged(write_run(tmp_path / "run", lines), 1), NOW)
    assert status.steps_per_s == pytest.approx(0.5)
    assert status.seconds_left == pytest.approx(140)


def test_the_speed_is_that_of_the_last_start(tmp_path):
    lines = [training_line(10, seconds=100), training_line(20, seconds=200)]
    lines += [training_line(30, seconds=10), training_line(40, seconds=20)]
    assert status_of(write_run(tmp_path / "run", lines)).steps_per_s == pytest.approx(1.0)


def test_a_run_without_a_new_line_for_long_is_silent(tmp_path):
    assert seen(tmp_path, 40, line_s=59).state == "running"
    assert seen(tmp_path, 40, line_s=61).state == "silent"


def test_a_slow_run_gets_more_patience(tmp_path):
    lines = [training_line(step, seconds=60 * step) for step in (1, 2, 3)]
    run = write_run(tmp_path / "run", lines)  # a line each step, a minute each
    assert status_of(aged(run, 500), NOW).state == "running"
    assert status_of(aged(run, 601), NOW).state == "silent"


def test_a_run_at_its_last_step_has_finished_however_old_it_is(tmp_path):
    log = [DONE, "resuming run after step 100 of 100"]
    status = seen(tmp_path, 100, line_s=1e6, checkpoint_s=1e6, log=log)
    assert (status.state, status.seconds_left) == ("finished", 0)


@pytest.mark.parametrize(("line_s", "state"), [(30, "running"), (1e6, "silent")])
def test_a_run_in_or_killed_in_its_last_validation_has_not_finished(tmp_path, line_s, state):
    # last.pt is of an earlier step, though a copy of the folder may have made it the newer file.
    for checkpoint_s in (line_s + 100, line_s - 1):
        status = seen(tmp_path, 100, line_s, checkpoint_s, log=["step 0: matching accuracy 0.05"])
        assert (status.state, status.step) == (state, 100)
    assert status.well == (state == "running")


def test_a_real_run_has_finished_when_its_last_checkpoint_is_written_and_not_before(tmp_path, monkeypatch):
    states = []

    def noted(path, content):
        states.append((content["step"], path.name, status_of(tmp_path / "run").state))
        save_checkpoint(path, content)

    monkeypatch.setattr(pgl.pretrain, "save_checkpoint", noted)
    run = pgl.pretrain.pretrain(small_config(make_cache(tmp_path / "cache"), tmp_path / "run", steps=2))
    assert states[-1] == (2, LAST, "running")
    assert status_of(run).state == "finished"


def test_a_run_that_was_stopped_is_not_called_silent(tmp_path):
    status = seen(tmp_path, 40, 1e6, 1e6, log=["stopped after step 40; `--resume` goes on from here"])
    assert status.state == "stopped"


def test_a_run_whose_loss_broke_has_failed_until_it_is_past_that_step(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "bad-batch-43.json").write_text("{}", encoding="utf-8")
    assert seen(tmp_path, 40, line_s=1).state == "failed"
    assert seen(tmp_path, 50, line_s=1).state == "running"


def test_a_run_that_was_stopped_and_resumed_is_running(tmp_path):
    log = ["stopped after step 40; `--resume` goes on from here", "resuming run after step 40 of 100"]
    assert seen(tmp_path, 40, line_s=1, log=log).state == "running"


@pytest.mark.parametrize(
    ("line_s", "log", "code"),
    [
        (0, [], 0),
        (1000, [], 3),
        (0, ["WARNING, COLLAPSE: feature_spread is 0.01"], 4),
        (0, ["stopped after step 4"], 3),
    ],
)
def test_the_exit_code_tells_whether_all_is_well(tmp_path, capsys, line_s, log, code):
    run = write_run(tmp_path / "run", [training_line(2), training_line(4)], log=log)
    file = run / "metrics.jsonl"
    os.utime(file, (file.stat().st_mtime - line_s,) * 2)
    assert main(["status", str(run)]) == code
    out = capsys.readouterr().out
    assert "4 of 100 (4%)" in out
    assert ("warning" in out) == (code == 4)


def test_json_holds_the_same(tmp_path, capsys):
    run = write_run(tmp_path / "run", [validation_line(0, 0.05), training_line(4), validation_line(4, 0.2)])
    assert main(["status", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["step"], told["matching_accuracy"], told["best_step"]) == (
        "running",
        4,
        0.2,
        4,
    )


def test_what_is_no_run_is_code_1(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 1
    assert "is no run of `pgl pretrain`" in capsys.readouterr().err
