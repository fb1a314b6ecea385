"""Whatever ends a run, what it has reached is on the disk, whole, and it goes on as if nothing had been."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from pgl import pretrain as module
from pgl.cache.integrity import DamagedCase
from pgl.cache.volumes import VolumeCache
from pgl.config import PretrainConfig
from pgl.pretrain import pretrain
from pgl.runs.folder import BEST, INITIAL, LAST, checkpoint_path
from pgl.settings import to_plain
from pgl.training.checkpoint import load_checkpoint
from tests.patience import PATIENCE_S

from .test_pretrain import assert_same_weights, interrupt_after, lines
from .training_data import make_cache, small_config

ROOT = Path(module.__file__).parents[1]
TIMES = ("seconds", "steps_per_s")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return make_cache(tmp_path_factory.mktemp("data") / "cache")


def config(data: Path, output: Path, steps: int = 10) -> PretrainConfig:
    """A run whose lines, checkpoints and validations fall on different steps."""
    made = small_config(data, output, steps=steps)
    made.train.log_every, made.train.checkpoint_every, made.validation.every = 3, 2, 5
    made.train.keep_every, made.train.kept = 4, 1
    return made


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory) -> Path:
    return pretrain(config(cache, tmp_path_factory.mktemp("runs") / "finished"))


def numbers(run: Path) -> list[dict]:
    every = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in every]


def assert_as_if_nothing_was(run: Path, finished: Path) -> None:
    assert numbers(run) == numbers(finished)
    assert_same_weights(run, finished)
    assert (
        load_checkpoint(checkpoint_path(run, BEST))["step"]
        == load_checkpoint(checkpoint_path(finished, BEST))["step"]
    )
    assert not [path for path in run.rglob("*") if path.name.startswith(".partial")]


def test_a_run_killed_at_many_points_has_the_metrics_and_weights_of_one_left_alone(cache, tmp_path):
    """SIGKILL before the first step, between steps, in the midst of checkpoints, renames and lines of
    metrics, and at random moments; each start goes on from what the one before has left."""
    chosen = config(cache, tmp_path / "run", steps=40)
    settings = tmp_path / "config.yaml"
    settings.write_text(yaml.safe_dump(to_plain(chosen)), "utf-8")
    points = ["save:1", "save:2", "step:0", "line:1", "line:2", "step:3", "save:1", "before-rename:5",
              "after-rename:3", "line:3", "save:2", "step:20", "before-rename:4", "line:2"]  # fmt: skip
    moments = [f"after:{random.uniform(0.02, 0.25):.3f}" for _ in range(5)]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed_runs.py")), str(settings), *points, *moments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ends = done.stdout.splitlines()
    assert ends[: len(points)] == [f"{point} {-signal.SIGKILL}" for point in points], done.stdout
    alone = pretrain(config(cache, tmp_path / "alone", steps=40))
    assert_as_if_nothing_was(chosen.output, alone)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_the_step_between_two_lines_of_metrics(cache, finished, tmp_path, monkeypatch, name):
    if not hasattr(signal, name):
        pytest.skip(f"this system has no {name}")
    chosen = config(cache, tmp_path / "run")
    interrupt_after(monkeypatch, 4, lambda: os.kill(os.getpid(), getattr(signal, name)))
    with pytest.raises(KeyboardInterrupt):
        pretrain(chosen)
    monkeypatch.undo()
    saved = load_checkpoint(checkpoint_path(chosen.output, LAST))
    assert saved["step"] == 5 and len(saved["pending_losses"]) == 2
    assert_as_if_nothing_was(pretrain(replace(chosen, resume=True)), finished)


def test_a_bounded_number_of_earlier_checkpoints_is_kept_and_can_be_resumed(cache, finished, tmp_path):
    folder = finished / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [BEST, INITIAL, LAST, "step-00000008.pt"]
    chosen = config(cache, tmp_path / "run")
    chosen.train.kept = 5
    run = pretrain(chosen)
    assert {path.name for path in (run / "checkpoints").glob("step-*")} == {
        "step-00000004.pt",
        "step-00000008.pt",
    }
    earlier = run / "checkpoints" / "step-00000004.pt"
    assert load_checkpoint(earlier)["step"] == 4
    os.replace(earlier, checkpoint_path(run, LAST))
    assert_as_if_nothing_was(pretrain(replace(chosen, resume=True)), finished)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a device that is always full")
@pytest.mark.parametrize(("name", "reached"), [("metrics.jsonl", 4), ("log.txt", 8)])
def test_a_record_that_cannot_be_written_is_named_and_the_run_goes_on_later(
    cache, finished, tmp_path, monkeypatch, name, reached
):
    chosen = config(cache, tmp_path / "run")
    file = chosen.output / name

    def fill() -> None:
        file.rename(file.with_suffix(".kept"))
        file.symlink_to("/dev/full")

    interrupt_after(monkeypatch, 5, fill)
    with pytest.raises(
        OSError, match=rf"cannot write .*{name}: No space left on device; the checkpoints"
    ) as e:
        pretrain(chosen)
    assert e.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert load_checkpoint(checkpoint_path(chosen.output, LAST))["step"] == reached
    file.unlink()
    file.with_suffix(".kept").rename(file)
    assert_as_if_nothing_was(pretrain(replace(chosen, resume=True)), finished)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few megabytes, enough for a small run."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here; /dev/full and RLIMIT_FSIZE are tested")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_stops_the_run_with_its_reason_and_leaves_the_last_good_checkpoint(
    cache, finished, small_disk, monkeypatch
):
    chosen = config(cache, small_disk / "run")
    ballast = small_disk / "ballast"

    def fill() -> None:
        room = os.statvfs(small_disk)
        ballast.write_bytes(bytes(room.f_bavail * room.f_frsize))

    interrupt_after(monkeypatch, 3, fill)
    with pytest.raises(OSError, match=r"cannot write .*(metrics\.jsonl|last\.pt): No space left on device"):
        pretrain(chosen)
    monkeypatch.undo()
    assert load_checkpoint(checkpoint_path(chosen.output, LAST))["step"] == 2
    ballast.unlink()
    assert_as_if_nothing_was(pretrain(replace(chosen, resume=True)), finished)


def test_an_output_that_may_not_be_written_is_named(cache, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match=r"cannot write .*run: Read-only file system"):
        pretrain(config(cache, small_disk / "run"))


def test_a_bad_loss_leaves_its_cases_and_the_boxes_of_its_views(cache, tmp_path, monkeypatch):
    original = module._Run._training_step

    def training_step(self, pieces):
        loss = original(self, pieces)
        return loss * torch.inf if self.step == 6 else loss

    monkeypatch.setattr(module._Run, "_training_step", training_step)
    chosen = config(cache, tmp_path / "run")
    with pytest.raises(FloatingPointError, match=r"loss became inf on cases case\d.*bad-batch-7\.json"):
        pretrain(chosen)
    # Step 8, at which a checkpoint was due, came after the bad one.
    assert load_checkpoint(checkpoint_path(chosen.output, LAST))["step"] == 6
    told = json.loads((chosen.output / "bad-batch-7.json").read_text("utf-8"))
    assert (told["step"], told["loss"]) == (7, "inf")
    assert [sample["sample"] for sample in told["samples"]] == [12, 13]
    shapes = {case.case_id: case.shape for case in VolumeCache(cache).cases}
    for sample in told["samples"]:
        assert len(sample["views"]) == 2
        for view in sample["views"]:
            low, high = view["box_voxels"][:3], view["box_voxels"][3:]
            inside = zip(low, high, shapes[sample["case"]], strict=True)
            assert all(0 <= a < b <= n for a, b, n in inside) and len(view["flips"]) == 3


def test_weights_that_a_bad_gradient_spoilt_do_not_replace_the_last_good_checkpoint(
    cache, tmp_path, monkeypatch
):
    chosen = config(cache, tmp_path / "run")
    runs = []
    original = module._Run._training_step

    def training_step(self, pieces):
        runs.append(self)
        loss = original(self, pieces)
        if self.step == 3:
            next(iter(self.method.predictor.parameters())).data.view(-1)[0] = torch.nan
        return loss

    monkeypatch.setattr(module._Run, "_training_step", training_step)
    with pytest.raises(FloatingPointError, match="weights are not finite after step 4"):
        pretrain(chosen)
    assert load_checkpoint(checkpoint_path(chosen.output, LAST))["step"] == 2


def damage(cache: Path, case: str) -> None:
    """Change one byte of a volume, where its first chunk lies."""
    file = cache / "cases" / f"{case}.b2nd"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x55
    file.write_bytes(content)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_case_is_named_and_stops_the_run(tmp_path, workers):
    data = make_cache(tmp_path / "cache")
    for case in VolumeCache(data).cases:
        damage(data, case.case_id)
    chosen = config(data, tmp_path / "run")
    chosen.train.workers = workers
    chosen.validation.fraction = 0.2
    with pytest.raises(DamagedCase) as error:
        pretrain(chosen)
    text = str(error.value)
    assert "damaged" in text and "case" in text and "train.skip_damaged" in text and "\n" not in text


def test_a_run_told_so_goes_on_without_the_damaged_case_and_says_which(tmp_path):
    data = make_cache(tmp_path / "cache")
    damage(data, "case1")
    chosen = config(data, tmp_path / "run")
    chosen.train.skip_damaged, chosen.validation.fraction = True, 0.0
    with_one_left_out = pretrain(chosen)
    log = (with_one_left_out / "log.txt").read_text("utf-8")
    assert log.count("case case1 is left out") == 1 and "case case0 is left out" not in log
    assert [line["step"] for line in lines(with_one_left_out, "train")] == [3, 6, 9, 10]
    # What a process happened to read before must not decide which samples there are.
    chosen.output, chosen.train.workers = tmp_path / "again", 1
    assert numbers(pretrain(chosen)) == numbers(with_one_left_out)


def test_a_cache_without_a_whole_case_is_refused_even_then(tmp_path):
    data = make_cache(tmp_path / "cache")
    for case in VolumeCache(data).cases:
        damage(data, case.case_id)
    chosen = config(data, tmp_path / "run")
    chosen.train.skip_damaged = True
    with pytest.raises(DamagedCase, match="every case is damaged"):
        pretrain(chosen)
