"""``pgl compare``: fine-tunings on different labels or images do not stand in one table."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pgl.cache.volumes import CacheWriter
from pgl.comparison.runs import compare
from pgl.downstream.train import finetune
from pgl.labels.store import write_label

from .comparisons import comparison, run_here, silently
from .labelled_data import CLASSES, labelled_cache, tissue

RANDOM = {"fractions": (1.0,), "initialisations": ("random",)}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A cache, and a comparison on it."""
    folder = tmp_path_factory.mktemp("other_labels")
    data = labelled_cache(folder / "cache")
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        compare(comparison(data, folder / "c", **RANDOM, seeds=(0,)), silently)
    return data, folder / "c"


@pytest.fixture
def copies(compared: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    return shutil.copytree(compared[0], tmp_path / "cache"), shutil.copytree(compared[1], tmp_path / "c")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return run_here(monkeypatch)


def label_anew(data: Path, subject: str, change: int) -> None:
    """Write a case's label once more, otherwise in ``change`` of its voxels."""
    writer = CacheWriter(data, (3.0, 1.0, 1.0))
    (record,) = (r for r in writer.finish() if r.case_id == f"{subject}-id")
    label = tissue(int(subject.removeprefix("p")))[1]
    label.flat[:change] = 1
    write_label(data, record, label, subject, CLASSES, "", "")
    writer.finish()


def results_of(folder: Path, seed: int = 0) -> Path:
    return folder / f"finetuned/random-fraction1-seed{seed}/results.json"


@pytest.mark.parametrize("group", ["test", "training"])
def test_one_more_seed_on_changed_labels_is_refused_by_the_name_of_what_is_there(copies, started, group):
    data, folder = copies
    subject = json.loads(results_of(folder).read_text("utf-8"))[group][0]
    label_anew(data, subject, change=40)
    runs = comparison(data, folder, **RANDOM, seeds=(0, 1))
    with pytest.raises(ValueError) as refused:
        compare(runs, silently)
    assert str(refused.value) == (
        f"{results_of(folder)} was made on other images or labels than {data} holds now: delete "
        f"{results_of(folder).parent} and compare again"
    )
    assert started == []
    shutil.rmtree(results_of(folder).parent)
    assert compare(runs, silently)["complete"]
    assert started == ["random-fraction1-seed0", "random-fraction1-seed1"]


def test_labels_that_were_prepared_anew_and_came_out_alike_change_nothing(copies, started):
    data, folder = copies
    for n in range(8):
        label_anew(data, f"p{n}", change=0)
    assert compare(comparison(data, folder, **RANDOM, seeds=(0,)), silently)["complete"]
    assert started == []


def test_results_that_do_not_tell_their_labels_are_refused(copies, started):
    data, folder = copies
    file = results_of(folder)
    results = json.loads(file.read_text("utf-8"))
    assert len(results.pop("data_sha256")) == 64
    file.write_text(json.dumps(results), "utf-8")
    with pytest.raises(ValueError, match=f"{file} cannot be read .*: delete {file.parent} and compare again"):
        compare(comparison(data, folder, **RANDOM, seeds=(0,)), silently)
    assert started == []


def test_a_stopped_fine_tuning_does_not_go_on_with_other_labels(copies, started):
    data, folder = copies
    run = results_of(folder).parent
    subject = json.loads(results_of(folder).read_text("utf-8"))["training"][0]
    results_of(folder).unlink()
    label_anew(data, subject, change=40)
    config = next(iter(comparison(data, folder, **RANDOM, seeds=(0,)).tunings)).config
    with pytest.raises(
        ValueError, match=f"images or labels of {data} have changed since the run in {run} was"
    ):
        finetune(replace(config, resume=True))
    label_anew(data, subject, change=0)
    assert finetune(replace(config, resume=True))["steps"] == config.train.steps
