"""``pgl ablate``: four alike runs a seed, nothing done twice, and a table of what was measured."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from pgl import ablate as module
from pgl.ablate import COMBINATIONS, AblationStopped, ablate, is_done, markdown, means_of, planned, row_of
from pgl.cache import VolumeCache
from pgl.checkpoint import LAST, checkpoint_path, load_checkpoint
from pgl.cli import main
from pgl.config import PretrainConfig, from_plain, to_plain
from pgl.method import PGL
from pgl.networks import seeded_module
from pgl.pretrain import pretrain
from pgl.run_facts import read_run
from pgl.validation import Validation

from .training_data import make_cache, small_config


@pytest.fixture(autouse=True)
def _same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def config(tmp_path: Path) -> PretrainConfig:
    return small_config(make_cache(tmp_path / "cache"), tmp_path / "ablation", steps=4)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that were started, in this process to save time."""
    names: list[str] = []

    def here(run: PretrainConfig) -> int:
        names.append(Path(run.output).name)
        pretrain(run)
        return 0

    monkeypatch.setattr(module, "_pretrain", here)
    return names


def test_the_four_combinations_of_a_seed_differ_in_nothing_else(config):
    plain = [to_plain(run) for run in planned(config, [3, 5])]
    assert [(p["seed"], p["method"]["crop_prior"], p["method"]["flip_prior"]) for p in plain] == [
        (seed, *priors) for seed in (3, 5) for _, *priors in COMBINATIONS
    ]
    assert len({p["output"] for p in plain}) == 8
    for p in plain:
        for key in ("seed", "output"):
            p.pop(key)
        for key in ("crop_prior", "flip_prior"):
            p["method"].pop(key)
    assert all(p == plain[0] for p in plain)


def test_an_ablation_writes_what_its_runs_measured_and_does_nothing_twice(config, started, tmp_path):
    rows = ablate(config, [0, 1], say=lambda line: None)
    folder = tmp_path / "ablation"
    assert started == [f"seed{seed}-{name}" for seed in (0, 1) for name in ("both", "crop", "flip", "none")]
    for row in rows:
        facts = read_run(folder / row["run"])
        assert row["matching_accuracy"] == facts.measured[-1]["matching_accuracy"]
        assert row["matching_accuracy_untrained"] == facts.validation[0]["matching_accuracy"]
        assert row["downstream_dice"] is None
    for seed in (0, 1):
        own = [row for row in rows if row["seed"] == seed]
        # One initial network and one set of pairs, measured with the true geometry: one number.
        assert len({row["matching_accuracy_untrained"] for row in own}) == 1
        # And yet they learned from different targets.
        weights = [
            load_checkpoint(checkpoint_path(folder / row["run"], LAST))["online"]["encoder"] for row in own
        ]
        name = next(iter(weights[0]))
        assert len({tuple(w[name].flatten().tolist()) for w in weights}) == 4

    with (folder / "ablation.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [line["run"] for line in table] == started
    assert [float(line["matching_accuracy"]) for line in table] == [row["matching_accuracy"] for row in rows]
    assert table[0]["downstream_dice"] == ""
    written = json.loads((folder / "ablation.json").read_text("utf-8"))
    both = [row["matching_accuracy"] for row in rows if row["crop_prior"] and row["flip_prior"]]
    assert written["combinations"][0]["matching_accuracy"] == pytest.approx(sum(both) / 2)
    assert "seed1-none" in (folder / "report.html").read_text("utf-8")

    started.clear()
    before = (folder / "ablation.csv").read_text("utf-8")
    ablate(config, [0, 1], say=lambda line: None)
    assert started == []
    assert (folder / "ablation.csv").read_text("utf-8") == before


def test_validation_knows_the_true_geometry_whatever_the_aligner_knows(config):
    cache = VolumeCache(config.data)
    measured = []
    for run in planned(config, [0]):
        network = seeded_module(0, lambda run=run: PGL(run.encoder, run.method))
        measured.append(Validation(cache, [0, 1], run).measure(network))
    losses = [numbers.pop("loss") for numbers in measured]
    assert all(numbers == measured[0] for numbers in measured)
    # The loss is that of training, so it sees what the aligner sees.
    assert len(set(losses)) == 4


def test_a_run_with_other_settings_is_refused_by_name(config, started):
    ablate(config, [0], say=lambda line: None)
    other = replace(config, optimizer=replace(config.optimizer, learning_rate=0.5))
    with pytest.raises(ValueError, match=r"seed0-both.*optimizer\.learning_rate \(.*was 0\.002, now 0\.5\)"):
        ablate(other, [0], say=lambda line: None)


def test_the_means_and_deviations_are_those_of_the_seeds():
    priors = [(crop, flip) for _, crop, flip in COMBINATIONS]
    keys = ("matching_accuracy_untrained", "matching_accuracy", "matching_accuracy_best", "feature_spread")
    rows = [
        {"crop_prior": crop, "flip_prior": flip, **dict.fromkeys(keys, value), "downstream_dice": None}
        for crop, flip in priors
        for value in (0.1, 0.4)
    ]
    both = means_of(rows)[0]
    assert both["matching_accuracy"] == pytest.approx(0.25)
    assert both["matching_accuracy_deviation"] == pytest.approx(0.3 / 2**0.5)
    text = markdown(means_of(rows))
    assert "| on | off | 0.2500 ± 0.2121 |" in text and "over 2 seeds" in text
    assert (
        "one seed" in markdown(means_of(rows[::2])) and "±" not in text.replace("±", "", 16).split("mean")[0]
    )


def test_no_downstream_dice_is_made_up(config, started):
    row = row_of(planned(config, [0])[0], read_run(pretrain(planned(config, [0])[0])))
    assert row["downstream_dice"] is None


@pytest.mark.parametrize("seeds", [[], [-1], [1, 1]])
def test_wrong_seeds_are_refused(config, seeds):
    with pytest.raises(ValueError, match="seeds must be different whole numbers"):
        planned(config, seeds)


def test_a_run_is_resumed_only_from_a_checkpoint_and_starts_anew_without_one(config, monkeypatch):
    started: list[list[str]] = []

    class Finished:
        def __init__(self, words: list[str]) -> None:
            started.append(words)

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(subprocess, "Popen", Finished)
    run = planned(config, [0])[0]
    folder = Path(run.output)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n", encoding="utf-8")
    assert module._pretrain(run) == 0
    assert not folder.exists() and "--resume" not in started[0]
    checkpoint_path(folder, LAST).parent.mkdir(parents=True)
    checkpoint_path(folder, LAST).write_bytes(b"")
    assert module._pretrain(run) == 0
    assert started[1][-1] == "--resume" and checkpoint_path(folder, LAST).exists()
    # The settings that it is started with are those of the plan.
    written = yaml.safe_load((folder.parent / "seed0-both.yaml").read_text("utf-8"))
    assert from_plain(written) == run


# --- as processes ---


def as_a_process(config: PretrainConfig, tmp_path: Path) -> subprocess.Popen[str]:
    plain = to_plain(config)
    for name in ("data", "output", "resume", "seed"):
        del plain[name]
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    words = ["--data", str(config.data), "--output", str(config.output)]
    words += ["--config", str(tmp_path / "settings.yaml"), "--seeds", "7"]
    return subprocess.Popen(
        [sys.executable, "-m", "pgl", "ablate", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).resolve().parents[2],
    )


def test_an_ablation_that_is_stopped_goes_on_where_it_was(config, tmp_path):
    config.train.steps = 150
    config.validation.every = 1000
    process = as_a_process(config, tmp_path)
    metrics = tmp_path / "ablation" / "seed7-both" / "metrics.jsonl"
    end = time.monotonic() + 60
    while not (metrics.is_file() and '"train"' in metrics.read_text("utf-8")) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "seed7-both ended with exit code 130; the same command goes on from there" in err
    saved = load_checkpoint(checkpoint_path(metrics.parent, LAST))["step"]
    assert 0 < saved < 150
    assert not is_done(metrics.parent, 150)
    assert not (tmp_path / "ablation" / "ablation.csv").exists()

    # It resumes with exactly the settings of the table of runs, and the others follow.
    run = planned(config, [7])[0]
    assert module._pretrain(run) == 0
    assert is_done(metrics.parent, 150)
    assert "resuming" in (metrics.parent / "log.txt").read_text("utf-8")


def test_a_run_that_fails_ends_the_ablation_with_its_code(config, monkeypatch):
    monkeypatch.setattr(module, "_pretrain", lambda run: 1)
    with pytest.raises(AblationStopped, match="seed0-both ended with exit code 1") as stopped:
        ablate(config, [0], say=lambda line: None)
    assert stopped.value.exit_code == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "x"], "missing --output"),
        (["--data", "x", "--output", "y", "--seeds", "0,a"], "--seeds must be whole numbers such as 0,1,2"),
        (["--data", "x", "--output", "y", "--seeds", "1,1"], "seeds must be different"),
        (["--data", "x", "--output", "y", "--train.steps", "0"], "train.steps must be at least 1"),
    ],
)
def test_wrong_usage_is_one_line(words, message, capsys):
    assert main(["ablate", *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
