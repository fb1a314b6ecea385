"""``pgl compare``, ``pgl ablate``: fine-tunings of another pretraining are not taken for this one's."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pgl.ablation import dice as ablation_dice
from pgl.ablation import runs as ablate_module
from pgl.ablation.dice import AblationTuning
from pgl.ablation.runs import ablate, planned
from pgl.cache.manifest import sha256_of
from pgl.comparison.config import Comparison
from pgl.comparison.runs import compare
from pgl.config import PretrainConfig
from pgl.downstream.config import FinetuneConfig
from pgl.downstream.resume import LAST as LAST_OF_TUNING
from pgl.downstream.train import finetune
from pgl.export import read_export
from pgl.pretrain import pretrain
from pgl.runs.folder import LAST, checkpoint_path

from .comparisons import comparison, run_here, silently
from .labelled_data import labelled_cache, small_finetune
from .training_data import small_config

PGL = {"fractions": (1.0,), "seeds": (0,), "initialisations": ("random", "pgl")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled_cache(tmp_path_factory.mktemp("other_weights") / "cache")


@pytest.fixture(scope="module")
def compared(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared") / "c"
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        compare(comparison(data, folder, **PGL), silently)
    return folder


@pytest.fixture
def folder(compared: Path, tmp_path: Path) -> Path:
    """A copy of a finished comparison."""
    return shutil.copytree(compared, tmp_path / "c")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return run_here(monkeypatch)


def faster(runs: Comparison, rate: float = 0.05) -> Comparison:
    """The comparison with another learning rate of its pretrainings."""
    changed = replace(runs._pretrain, optimizer=replace(runs._pretrain.optimizer, learning_rate=rate))
    return Comparison(runs.settings, changed, runs._finetune)


def weights_of(file: Path) -> torch.Tensor:
    return next(iter(read_export(file)["network_weights"].values()))


def test_after_another_pretraining_nothing_of_the_old_one_is_shown(data, folder, started):
    runs = faster(comparison(data, folder, **PGL))
    file, tuned = folder / "encoders/pgl-seed0.pt", folder / "finetuned/pgl-fraction1-seed0"
    old, old_sha = weights_of(file), sha256_of(file)
    with pytest.raises(ValueError, match=r"delete that folder"):
        compare(runs, silently)
    shutil.rmtree(folder / "pretrained/pgl-seed0")
    with pytest.raises(ValueError) as refused:
        compare(runs, silently)
    assert str(refused.value) == (
        f"{tuned / 'results.json'} was made with other weights than the pretraining "
        f"{folder / 'pretrained/pgl-seed0'} will give, which is missing or not finished: delete {tuned} and "
        "compare again"
    )
    assert started == []
    shutil.rmtree(tuned)
    result = compare(runs, silently)
    assert started == ["pgl-seed0", "pgl-fraction1-seed0"] and result["complete"]
    assert not torch.equal(weights_of(file), old)
    (row,) = (row for row in result["runs"] if row["initialisation"] == "pgl")
    assert row["weights_sha256"] == sha256_of(file) != old_sha


def test_all_fine_tunings_of_a_pretraining_that_is_gone_are_named_at_once(data, tmp_path, started):
    folder = tmp_path / "c"
    runs = comparison(data, folder, **{**PGL, "fractions": (0.4, 1.0)})
    compare(runs, silently)
    shutil.rmtree(folder / "pretrained/pgl-seed0")
    # One that was stopped, and has not been tested, started from the old weights as well.
    (folder / "finetuned/pgl-fraction1-seed0/results.json").unlink()
    assert (folder / "finetuned/pgl-fraction1-seed0" / LAST_OF_TUNING).is_file()
    with pytest.raises(
        ValueError, match=r"delete \S*pgl-fraction0.4-seed0, \S*pgl-fraction1-seed0 and compare"
    ):
        compare(runs, silently)


def test_fine_tunings_of_the_pretraining_before_the_one_that_is_there_are_refused(data, folder, started):
    runs = faster(comparison(data, folder, **PGL))
    shutil.rmtree(folder / "pretrained/pgl-seed0")
    pretrain(runs.pretrainings["pgl", 0])
    with pytest.raises(
        ValueError,
        match=r"results\.json was made with other weights than \S*encoders/pgl-seed0\.pt holds now: delete ",
    ):
        compare(runs, silently)
    # With one more fraction, too: it would start from the new weights beside results of the old ones.
    with pytest.raises(ValueError, match=r"pgl-fraction1-seed0/results\.json was made with other weights"):
        compare(faster(comparison(data, folder, **{**PGL, "fractions": (0.4, 1.0)})), silently)
    assert started == []


@pytest.mark.parametrize("state", ["whole", "missing", "damaged", "of another"])
def test_a_pretraining_that_is_there_keeps_its_fine_tunings_whatever_became_of_the_file(
    data, folder, started, state
):
    file = folder / "encoders/pgl-seed0.pt"
    content, written = file.read_bytes(), file.stat().st_mtime_ns
    if state == "missing":
        file.unlink()
    elif state == "damaged":
        file.write_bytes(content[:1000])
    elif state == "of another":
        other = torch.load(file, weights_only=True)
        next(iter(other["network_weights"].values())).add_(1)
        torch.save(other, file)
    assert compare(comparison(data, folder, **PGL), silently)["complete"]
    assert started == [] and file.read_bytes() == content
    assert (file.stat().st_mtime_ns == written) == (state == "whole")


def test_fine_tunings_that_were_deleted_are_made_anew_from_the_same_file(data, folder, started):
    file, before = folder / "encoders/pgl-seed0.pt", json.loads((folder / "compare.json").read_text("utf-8"))
    written = file.stat().st_mtime_ns
    shutil.rmtree(folder / "finetuned")
    assert compare(comparison(data, folder, **PGL), silently) == before
    assert started == ["random-fraction1-seed0", "pgl-fraction1-seed0"]
    assert file.stat().st_mtime_ns == written


def test_pretrainings_can_be_brought_along_from_another_comparison(data, folder, tmp_path, started):
    new = tmp_path / "new"
    for name in ("pretrained", "encoders"):
        shutil.copytree(folder / name, new / name)
    written = (new / "encoders/pgl-seed0.pt").stat().st_mtime_ns
    assert compare(comparison(data, new, **PGL), silently)["complete"]
    assert started == ["random-fraction1-seed0", "pgl-fraction1-seed0"]
    assert (new / "encoders/pgl-seed0.pt").stat().st_mtime_ns == written


def test_encoders_without_their_pretrainings_are_made_anew(data, folder, tmp_path, started):
    new = tmp_path / "new"
    shutil.copytree(folder / "encoders", new / "encoders")
    runs = faster(comparison(data, new, **PGL))
    compare(runs, silently)
    assert "pgl-seed0" in started
    saved = torch.load(checkpoint_path(new / "pretrained/pgl-seed0", LAST), weights_only=True)
    first = next(iter(saved["online"]["encoder"].values()))
    assert torch.equal(weights_of(new / "encoders/pgl-seed0.pt"), first)
    assert not torch.equal(first, weights_of(folder / "encoders/pgl-seed0.pt"))


def test_pretraining_each_seed_after_pretraining_once_names_what_came_from_the_first(data, tmp_path, started):
    folder, both = tmp_path / "c", {**PGL, "seeds": (0, 1)}
    compare(comparison(data, folder, **both, pretrain_once=True), silently)
    started.clear()
    with pytest.raises(ValueError, match=r"pgl-fraction1-seed1/results\.json was made with other weights .*"
                                         r"delete \S*pgl-fraction1-seed1 and compare again"):  # fmt: skip
        compare(comparison(data, folder, **both), silently)
    assert started == []
    shutil.rmtree(folder / "finetuned/pgl-fraction1-seed1")
    assert compare(comparison(data, folder, **both), silently)["complete"]
    assert started == ["pgl-seed1", "pgl-fraction1-seed1"]
    with pytest.raises(ValueError, match=r"pgl-fraction1-seed1/results\.json was made with other weights"):
        compare(comparison(data, folder, **both, pretrain_once=True), silently)


# --- the Dice of an ablation ---


@pytest.fixture
def ablation(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[str]):
    """Settings of an ablation with a fine-tuning, whose runs start in this process."""

    def pretraining(run: PretrainConfig) -> int:
        started.append(Path(run.output).name)
        pretrain(run)
        return 0

    def finetuning(run: FinetuneConfig) -> int:
        started.append(f"tuned {Path(run.output).name}")
        finetune(run)
        return 0

    monkeypatch.setattr(ablate_module, "_pretrain", pretraining)
    monkeypatch.setattr(ablation_dice, "run_finetuning", finetuning)
    config = small_config(data, tmp_path / "abl", steps=2)
    shared = replace(small_finetune(data, tmp_path, steps=2), encoder=None)
    return config, AblationTuning(shared, Path(config.output))


def test_an_ablation_shows_no_dice_of_a_pretraining_that_is_gone(ablation, tmp_path, started):
    config, tuning = ablation
    file, tuned = tmp_path / "abl/encoders/seed0-both.pt", tmp_path / "abl/finetuned/seed0-both"
    ablate(config, [0], ["both"], silently, tuning)
    assert started == ["seed0-both", "tuned seed0-both"]
    old = weights_of(file)
    started.clear()
    other = replace(config, optimizer=replace(config.optimizer, learning_rate=0.05))
    shutil.rmtree(tmp_path / "abl/seed0-both")
    with pytest.raises(
        ValueError, match=r"made with other weights than the pretraining .* delete \S*/seed0-both and ablate"
    ):
        ablate(other, [0], ["both"], silently, tuning)
    assert started == []
    # Nor of the one before that which is there now.
    pretrain(replace(planned(other, [0])[0, "both"], data=tmp_path / "abl/pretraining-cache"))
    with pytest.raises(ValueError, match=r"made with other weights than \S*seed0-both\.pt holds now"):
        ablate(other, [0], ["both"], silently, tuning)
    shutil.rmtree(tuned)
    (row,) = ablate(other, [0], ["both"], silently, tuning)
    assert started == ["tuned seed0-both"] and not torch.equal(weights_of(file), old)
    results = json.loads((tuned / "results.json").read_text("utf-8"))
    assert row["downstream_dice"] == results["mean"]["dice"]
    assert results["weights_sha256"] == sha256_of(file)


def test_an_ablation_that_is_whole_is_left_as_it_is(ablation, tmp_path, started):
    config, tuning = ablation
    (row,) = ablate(config, [0], ["both"], silently, tuning)
    started.clear()
    (tmp_path / "abl/encoders/seed0-both.pt").unlink()
    (again,) = ablate(config, [0], ["both"], silently, tuning)
    assert started == [] and again == row
