"""A whole small run: what it leaves, how it goes on after an interruption, and how it fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pgl import pretrain as module
from pgl.cache.volumes import CacheWriter
from pgl.config import from_plain
from pgl.networks import build_encoder
from pgl.pretrain import pretrain
from pgl.runs.folder import BEST, INITIAL, LAST, checkpoint_path
from pgl.settings import to_plain
from pgl.training.checkpoint import load_checkpoint
from pgl.training.record import write_environment
from tests.patience import PATIENCE_S, wait_until

from .training_data import blobs, make_cache, small_config


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return make_cache(tmp_path_factory.mktemp("data") / "cache")


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory) -> Path:
    """A run of four steps that nothing disturbed."""
    return pretrain(small_config(cache, tmp_path_factory.mktemp("runs") / "finished"))


def lines(run: Path, kind: str) -> list[dict]:
    every = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line for line in every if line["kind"] == kind]


def weights(run: Path, name: str = LAST) -> dict[str, torch.Tensor]:
    saved = load_checkpoint(checkpoint_path(run, name))
    return {
        f"{side}.{part}.{key}": value
        for side in ("online", "target")
        for part, state in saved[side].items()
        for key, value in state.items()
    }


def assert_same_weights(first: Path, second: Path) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    differing = [key for key in a if not torch.equal(a[key], b[key])]
    assert not differing


def interrupt_after(monkeypatch, step: int, how) -> None:
    """Do ``how()`` in the middle of the run's ``step``-th step (0-based)."""
    original = module._Run._training_step

    def training_step(self, pieces):
        if self.step == step:
            how()
        return original(self, pieces)

    monkeypatch.setattr(module._Run, "_training_step", training_step)


def test_the_run_folder_holds_what_the_docstring_says(finished):
    names = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    told = {"config.yaml", "environment.json", "log.txt", "metrics.jsonl"}
    told |= {f"checkpoints/{name}" for name in (INITIAL, LAST, BEST)}
    assert told <= names
    assert all(name in told or name.startswith("tensorboard/events.") for name in names)


def test_metrics_start_with_the_untrained_network_and_follow_every_step(finished):
    assert [line["step"] for line in lines(finished, "train")] == [1, 2, 3, 4]
    assert [line["step"] for line in lines(finished, "validation")] == [0, 2, 4]
    for line in lines(finished, "validation"):
        assert 0 <= line["matching_accuracy"] <= 1 and line["chance"] == 1 / 32
        assert 0 < line["feature_spread"] < 1.5 and 1 <= line["feature_rank"] <= 8
        assert 0 <= line["loss"] <= 4
    for line in lines(finished, "train"):
        assert 0 <= line["loss"] <= 4 and 0.9 <= line["ema"] <= 1 and line["steps_per_s"] > 0


def test_the_written_config_gives_the_same_run_again(finished, tmp_path):
    config = from_plain(yaml.safe_load((finished / "config.yaml").read_text("utf-8")))
    assert_same_weights(finished, pretrain(replace(config, output=tmp_path / "again")))


def test_checkpoints_hold_what_their_docstring_says(finished):
    initial, last = (load_checkpoint(checkpoint_path(finished, name)) for name in (INITIAL, LAST))
    assert (initial["step"], last["step"], last["samples"]) == (0, 4, 8)
    assert last["feature_level"] == 2 and last["feature_stride"] == [2, 4, 4]
    assert last["spacing_mm"] == [3, 1, 1]
    assert last["metrics"]["matching_accuracy"] == lines(finished, "validation")[-1]["matching_accuracy"]
    build_encoder(last["network"]).load_state_dict(last["online"]["encoder"], strict=True)
    before = weights(finished, INITIAL)
    changed = [key for key, value in weights(finished).items() if not torch.equal(value, before[key])]
    assert any(key.startswith("online.encoder") for key in changed)
    assert any(key.startswith("target.encoder") for key in changed)


def test_the_environment_names_the_cases_of_either_side(finished):
    environment = json.loads((finished / "environment.json").read_text("utf-8"))
    training, validation = environment["cases"]["training"], environment["cases"]["validation"]
    assert sorted(training + validation) == [f"case{i}" for i in range(5)] and len(validation) == 1
    assert environment["starts"][0]["torch"] == torch.__version__


@pytest.mark.parametrize("content", ["{", "[]", '{"time": "of another form"}', '{"starts": "one"}'])
def test_a_damaged_record_of_the_environment_is_named(tmp_path, content):
    (tmp_path / "environment.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"environment.json is damaged .*delete it"):
        write_environment(tmp_path, torch.device("cpu"), 1, "32-true")
    assert (tmp_path / "environment.json").read_text("utf-8") == content


def test_a_run_stopped_by_a_signal_and_resumed_ends_in_the_same_weights(
    cache, finished, tmp_path, monkeypatch
):
    config = small_config(cache, tmp_path / "run")
    interrupt_after(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        pretrain(config)
    monkeypatch.undo()
    assert load_checkpoint(checkpoint_path(config.output, LAST))["step"] == 3
    pretrain(replace(config, resume=True))
    assert_same_weights(config.output, finished)
    assert "resuming" in (config.output / "log.txt").read_text("utf-8")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_as_soon_as_it_can_be_resumed_saves_a_step(
    cache, finished, tmp_path, monkeypatch, number
):
    original = module._Run._save

    def save(self, name, *arguments, **keywords):
        original(self, name, *arguments, **keywords)
        if name == LAST and self.step == 0:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(module._Run, "_save", save)
    config = small_config(cache, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        pretrain(config)
    monkeypatch.undo()
    assert load_checkpoint(checkpoint_path(config.output, LAST))["step"] == 1
    pretrain(replace(config, resume=True))
    assert_same_weights(config.output, finished)


def test_a_checkpoint_to_keep_that_a_kill_prevented_is_kept_by_the_next_start(cache, tmp_path, monkeypatch):
    config = small_config(cache, tmp_path / "run")
    config.train.keep_every, config.train.kept = 2, 3

    def killed(*arguments):
        raise RuntimeError("power cut")

    monkeypatch.setattr(module, "keep_last", killed)
    with pytest.raises(RuntimeError, match="power cut"):
        pretrain(config)
    monkeypatch.undo()
    for _ in range(2):  # the second finds all as it should be
        pretrain(replace(config, resume=True))
        names = {path.name for path in (config.output / "checkpoints").iterdir()}
        assert names == {INITIAL, BEST, LAST, "step-00000002.pt", "step-00000004.pt"}


def test_a_run_that_crashed_and_was_resumed_has_the_same_weights_and_metrics(
    cache, finished, tmp_path, monkeypatch
):
    def crash():
        raise RuntimeError("power cut")

    config = small_config(cache, tmp_path / "run")
    interrupt_after(monkeypatch, 3, crash)
    with pytest.raises(RuntimeError, match="power cut"):
        pretrain(config)
    monkeypatch.undo()
    with (config.output / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "st')
    assert load_checkpoint(checkpoint_path(config.output, LAST))["step"] == 2
    pretrain(replace(config, resume=True))
    assert_same_weights(config.output, finished)
    assert lines(config.output, "validation") == lines(finished, "validation")
    assert [(line["step"], line["loss"]) for line in lines(config.output, "train")] == [
        (line["step"], line["loss"]) for line in lines(finished, "train")
    ]


def test_resuming_a_finished_run_changes_nothing(finished):
    before = weights(finished)
    config = from_plain(load_checkpoint(checkpoint_path(finished, LAST))["config"])
    pretrain(replace(config, resume=True))
    after = weights(finished)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [line["step"] for line in lines(finished, "train")] == [1, 2, 3, 4]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("empty", [False, True])
def test_resume_with_nothing_there_is_refused(cache, tmp_path, empty):
    output = tmp_path / "new"
    if empty:
        output.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no run at .*new to resume; leave --resume out"):
        pretrain(replace(small_config(cache, output), resume=True))
    assert output.exists() == empty and snapshot(tmp_path) == {}


@pytest.mark.parametrize("names", [["thesis.txt"], ["metrics.jsonl"], ["config.yaml", "environment.json"]])
def test_resume_leaves_a_folder_that_is_no_run_alone(cache, tmp_path, names):
    for name in names:
        (tmp_path / name).write_text('{"irreplaceable": 1}')
    before = snapshot(tmp_path)
    with pytest.raises((FileExistsError, ValueError), match=r"no run of `pgl pretrain`|of another program"):
        pretrain(replace(small_config(cache, tmp_path), resume=True))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("left", ["best.pt", "metrics.jsonl"])
def test_a_lost_last_checkpoint_is_named_and_the_rest_kept(cache, finished, tmp_path, left):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    checkpoint_path(run, LAST).unlink()
    (run / "metrics.jsonl" if left == "best.pt" else checkpoint_path(run, BEST)).unlink()
    before = snapshot(run)
    with pytest.raises(FileNotFoundError, match=r"last\.pt is lost"):
        pretrain(replace(small_config(cache, run), resume=True))
    assert snapshot(run) == before


def test_a_run_stopped_before_its_first_step_resumes_from_the_start(cache, finished, tmp_path, monkeypatch):
    config = small_config(cache, tmp_path / "run")
    interrupt_after(monkeypatch, 0, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pretrain(config)
    monkeypatch.undo()
    assert_same_weights(pretrain(replace(config, resume=True)), finished)


def copied(finished: Path, tmp_path: Path, data: Path):
    shutil.copytree(finished, tmp_path / "run")
    return replace(small_config(data, tmp_path / "run"), resume=True)


def test_resuming_with_other_cases_names_them(finished, tmp_path):
    names = ["case0", "case1", "case2", "case3", "late"]
    other = make_cache(tmp_path / "other", {name: blobs(seed=i) for i, name in enumerate(names)})
    config = copied(finished, tmp_path, other)
    before = snapshot(config.output)
    with pytest.raises(ValueError, match="cases added: late; cases removed: case4"):
        pretrain(config)
    assert snapshot(config.output) == before


def test_resuming_with_another_spacing_names_both(finished, tmp_path):
    writer = CacheWriter(tmp_path / "other", (3.0, 2.0, 2.0))
    for i in range(5):
        writer.add(f"case{i}", blobs(seed=i))
    writer.finish()
    with pytest.raises(ValueError, match=r"spacing_mm was \(3.0, 1.0, 1.0\), now \(3.0, 2.0, 2.0\)"):
        pretrain(copied(finished, tmp_path, tmp_path / "other"))


def test_a_copy_of_the_cache_is_the_same_cache(cache, finished, tmp_path):
    shutil.copytree(cache, tmp_path / "moved")
    config = copied(finished, tmp_path, tmp_path / "moved")
    assert_same_weights(pretrain(config), finished)


ENDLESS = """
import sys
from pathlib import Path

import yaml

from pgl.config import from_plain
from pgl.pretrain import pretrain

if __name__ == "__main__":
    try:
        pretrain(from_plain(yaml.safe_load(Path(sys.argv[1]).read_text("utf-8"))))
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_ctrl_c_to_a_run_with_reading_processes_saves_and_exits_130(cache, tmp_path, number):
    config = small_config(cache, tmp_path / "run", steps=1_000_000)
    config.train.workers, config.train.checkpoint_every = 1, 1_000_000
    config.validation.every = 1_000_000
    script, settings = tmp_path / "endless.py", tmp_path / "config.yaml"
    script.write_text(ENDLESS, "utf-8")
    settings.write_text(yaml.safe_dump(to_plain(config)), "utf-8")
    process = subprocess.Popen(
        [sys.executable, str(script), str(settings)],
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(module.__file__).parents[1])},
    )
    try:
        metrics = config.output / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and '"train"' in metrics.read_text("utf-8"), process)
        os.killpg(process.pid, number)
        told = process.communicate(timeout=PATIENCE_S)[1].decode()
        assert process.returncode == 130
        assert "Traceback" not in told
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    step = load_checkpoint(checkpoint_path(config.output, LAST))["step"]
    assert step >= 1 and lines(config.output, "train")[-1]["step"] == step


def test_a_reader_that_fails_after_a_stop_was_asked_does_not_cost_the_last_step(cache, tmp_path, monkeypatch):
    config = small_config(cache, tmp_path / "run")

    def broken_loader(*arguments):
        loader = original(*arguments)
        for number, batch in enumerate(loader):
            if number == 1:
                os.kill(os.getpid(), signal.SIGINT)
                raise RuntimeError("a reading process was killed")
            yield batch

    original = module.make_loader
    monkeypatch.setattr(module, "make_loader", broken_loader)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config)
    assert load_checkpoint(checkpoint_path(config.output, LAST))["step"] == 1


def test_resuming_with_other_settings_names_them(finished, cache):
    config = replace(small_config(cache, finished), resume=True)
    config.method.ema_start = 0.5
    with pytest.raises(ValueError, match=r"method\.ema_start differ .*was 0\.9, now 0\.5"):
        pretrain(config)


def test_an_output_that_holds_something_is_left_alone(finished, cache, tmp_path):
    with pytest.raises(FileExistsError, match="already holds a run: give --resume"):
        pretrain(small_config(cache, finished))
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(FileExistsError, match="already holds other files"):
        pretrain(small_config(cache, tmp_path))


def test_a_missing_cache_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pretrain(small_config(tmp_path / "nowhere", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_infinite_loss_stops_the_run_and_names_the_cases(cache, tmp_path, monkeypatch):
    original = module._Run._training_step
    monkeypatch.setattr(
        module._Run,
        "_training_step",
        lambda self, pieces: original(self, pieces) * (self.step < 2 or torch.nan),
    )
    config = small_config(cache, tmp_path / "run")
    with pytest.raises(FloatingPointError, match=r"loss became nan on cases case\d"):
        pretrain(config)
    assert load_checkpoint(checkpoint_path(config.output, LAST))["step"] == 2


def test_collapse_is_said_aloud(cache, tmp_path):
    config = small_config(cache, tmp_path / "run", steps=2)
    config.validation.collapse_threshold = 10.0
    pretrain(config)
    assert "WARNING, COLLAPSE: feature_spread" in (config.output / "log.txt").read_text("utf-8")


def test_too_few_cases_to_hold_some_out_is_said(tmp_path):
    data = make_cache(tmp_path / "cache", {"only": blobs()})
    run = pretrain(small_config(data, tmp_path / "run", steps=2))
    assert "validation uses the training cases" in (run / "log.txt").read_text("utf-8")


def test_volumes_smaller_than_a_patch_train_on_padded_blocks(tmp_path):
    data = make_cache(
        tmp_path / "cache", {"thin": blobs((3, 12, 50)), "air": np.full((3, 4, 5), -1000, np.int16)}
    )
    run = pretrain(small_config(data, tmp_path / "run", steps=2))
    assert [line["step"] for line in lines(run, "train")] == [1, 2]


def test_small_runs_learn(cache, tmp_path):
    """Fifty steps on five small volumes lower the loss well below its start."""
    config = small_config(cache, tmp_path / "run", steps=50)
    config.train.batch_size = 4
    config.validation.every = 50
    losses = [line["loss"] for line in lines(pretrain(config), "train")]
    assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:3])
