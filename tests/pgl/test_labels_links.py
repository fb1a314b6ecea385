"""Links in a folder of labels: followed, never in circles, and a file that is reached twice counts once."""

from __future__ import annotations

import io
import os
from pathlib import Path

from rich.console import Console

from pgl.downstream.evaluate import evaluate
from pgl.labels.pairs import named_files
from pgl.labels.settings import LabelSettings
from pgl.labels.store import read_labels
from pgl.prepare.report import PrepareReport
from pgl.prepare.run import PrepareSettings, prepare
from tests.pgl import labelled_trees as trees
from tests.pgl.ct_files import write

SMALL = PrepareSettings(spacing_mm=(3.0, 2.0, 2.0), minimum_size=(8, 16, 16), workers=1)


def run(root: Path, cache: Path) -> PrepareReport:
    console = Console(file=io.StringIO(), width=80)
    labels = LabelSettings(labels=str(root / "labels"))
    return prepare([root / "images"], cache, SMALL, console, labels)


def add_links(labels: Path, name: str) -> None:
    """A circle, and the file once more in a folder, by a link of that folder, and under another name."""
    (labels / "loop").symlink_to(labels)
    (labels / "by_patient").mkdir()
    (labels / "by_patient" / name).symlink_to(Path("..", name))
    (labels / "again").symlink_to("by_patient")
    (labels / f"copy_of_{name}").symlink_to(name)


def test_links_in_a_folder_of_labels_reject_nothing(tmp_path):
    root = trees.pairs(tmp_path / "data")
    add_links(root / "labels", "case_0.nii.gz")
    report = run(root, tmp_path / "cache")
    assert report.rejected == [] and report.exit_code == 0
    assert {record.subject for record in read_labels(tmp_path / "cache")} == {"case_0", "case_1"}


def test_one_label_under_two_names_goes_with_two_images(tmp_path):
    for name in ("early", "late"):
        write(tmp_path / "images" / f"{name}.nii.gz")
    write(tmp_path / "labels" / "early.nii.gz", trees.organ())
    (tmp_path / "labels" / "late.nii.gz").symlink_to("early.nii.gz")
    assert run(tmp_path, tmp_path / "cache").rejected == []
    assert {record.subject for record in read_labels(tmp_path / "cache")} == {"early", "late"}


def test_another_file_of_one_name_is_still_refused(tmp_path):
    for place in ("a", "b"):
        write(tmp_path / place / "x.nii.gz", trees.organ())
    (tmp_path / "c").symlink_to("b")
    found, problems = named_files(tmp_path, "*")
    assert found == {"x": tmp_path / "a" / "x.nii.gz"}
    assert problems == [
        (str(tmp_path / "b" / "x.nii.gz"), f"has the same name as {found['x']}: rename one"),
    ]


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def forbidding(path):
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidding)
    reason = "unreadable folder: Permission denied"
    assert named_files(tmp_path, "*") == ({}, [(str(tmp_path / "locked"), reason)])


def test_links_beside_predictions_and_labels_are_no_problem_of_evaluate(tmp_path):
    write(tmp_path / "ours" / "x.nii.gz", trees.organ())
    write(tmp_path / "labels" / "x.nii.gz", trees.organ())
    for folder in ("ours", "labels"):
        add_links(tmp_path / folder, "x.nii.gz")
    for folder in ("ours", "labels"):
        (tmp_path / folder / "copy_of_x.nii.gz").unlink()
    (tmp_path / "ours" / "other_name.nii.gz").symlink_to("x.nii.gz")
    scores, problems = evaluate(tmp_path / "ours", tmp_path / "labels")
    assert problems == []
    assert {(score.subject, score.dice) for score in scores} == {("x", 1.0)}


def test_a_label_under_two_names_wants_two_predictions(tmp_path):
    for folder in ("ours", "labels"):
        write(tmp_path / folder / "early.nii.gz", trees.organ())
    late = tmp_path / "labels" / "late.nii.gz"
    late.symlink_to("early.nii.gz")
    _, problems = evaluate(tmp_path / "ours", tmp_path / "labels")
    assert problems == [(str(late), "label without prediction")]
