"""``pgl evaluate``: Dice and Hausdorff distance of a folder of segmentations."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from pgl.cli import main
from pgl.downstream import evaluate as evaluate_module
from pgl.downstream.evaluate import evaluate
from tests.pgl import labelled_trees as trees
from tests.pgl.command_line import run_cli
from tests.pgl.ct_files import hanging_read_pair, impatient, to_image, write


def test_scores_of_a_folder_are_those_of_the_definition(tmp_path, capsys):
    truth = trees.organ()
    shifted = np.roll(truth, 2, axis=2)
    write(tmp_path / "labels/p0.nii.gz", truth)
    write(tmp_path / "labels/p1.nii.gz", truth)
    write(tmp_path / "predictions/p0.nii.gz", shifted)
    write(tmp_path / "predictions/p1.nii.gz", truth)
    (tmp_path / "predictions/labels.json").write_text('{"background": 0, "organ": 1, "lesion": 2}')
    code = main(["evaluate", str(tmp_path / "predictions"), str(tmp_path / "labels")])
    assert code == 0 and "organ" in capsys.readouterr().out
    with (tmp_path / "predictions/scores.csv").open(encoding="utf-8", newline="") as file:
        rows = {(r["subject"], r["class"]): r for r in csv.DictReader(file)}
    for number, name in ((1, "organ"), (2, "lesion")):
        expected = trees.overlap(shifted == number, truth == number)
        assert float(rows["p0", name]["dice"]) == pytest.approx(expected)
        assert float(rows["p1", name]["dice"]) == 1 and float(rows["p1", name]["hd95_mm"]) == 0
    # Two voxels of 2 mm along a row: no surface voxel is farther away.
    assert float(rows["p0", "organ"]["hd95_mm"]) == pytest.approx(4.0)


def test_a_prediction_on_another_grid_is_compared_at_the_same_physical_place(tmp_path):
    write(tmp_path / "l/p.nii.gz", trees.organ())
    (tmp_path / "p").mkdir()
    sitk.WriteImage(sitk.Flip(to_image(trees.organ()), (True, True, False)), str(tmp_path / "p/p.nii.gz"))
    scores, problems = evaluate(tmp_path / "p", tmp_path / "l")
    assert problems == [] and [s.dice for s in scores] == [1.0, 1.0]


def test_a_pair_that_hangs_the_reader_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("pgl.downstream.evaluate.read_pair", hanging_read_pair)
    monkeypatch.setattr("pgl.downstream.evaluate.run_isolated", impatient)
    for folder in "pl":
        write(tmp_path / f"{folder}/slow.nii.gz", trees.organ())
    with pytest.raises(ValueError, match=r"slow.*crashes the reader: took longer than 3 s and was ended"):
        evaluate(tmp_path / "p", tmp_path / "l")


def test_merged_classes_are_scored_as_one(tmp_path):
    write(tmp_path / "l/p.nii.gz", trees.organ())
    write(tmp_path / "p/p.nii.gz", (trees.organ() > 0).astype(np.uint8))
    scores, _ = evaluate(tmp_path / "p", tmp_path / "l", merge={"all": [1, 2]})
    assert [(s.name, s.dice) for s in scores] == [("all", 1.0)]


def test_classes_that_both_folders_name_otherwise_are_refused(tmp_path):
    for folder in "pl":
        write(tmp_path / folder / "maps/p.nii.gz", trees.organ())
    (tmp_path / "l/labels.json").write_text('{"organ": 1, "lesion": 2}')
    scores, _ = evaluate(tmp_path / "p/maps", tmp_path / "l/maps")
    assert [score.name for score in scores] == ["organ", "lesion"]
    (tmp_path / "p/labels.json").write_text('{"lesion": 1, "organ": 2}')
    with pytest.raises(ValueError, match=r"class 1 is 'lesion' in .*p/labels.json and 'organ' in .*--merge"):
        evaluate(tmp_path / "p/maps", tmp_path / "l/maps")
    scores, _ = evaluate(tmp_path / "p/maps", tmp_path / "l/maps", classes=tmp_path / "l/labels.json")
    assert [score.dice for score in scores] == [1.0, 1.0]
    (tmp_path / "p/labels.json").write_text('{"Organ": 1, "Lesion": 2}')
    assert [score.name for score in evaluate(tmp_path / "p/maps", tmp_path / "l/maps")[0]] == [
        "Organ",
        "Lesion",
    ]
    (tmp_path / "l/labels.json").write_text('[{"id": 7}]')
    with pytest.raises(ValueError, match=r"l/labels.json: expected class names .* give --classes FILE"):
        evaluate(tmp_path / "p/maps", tmp_path / "l/maps")


def test_a_damaged_file_is_read_once_and_does_not_hide_the_others(tmp_path, monkeypatch):
    for name in ("good", "bad"):
        for folder in "pl":
            write(tmp_path / f"{folder}/{name}.nii.gz", trees.organ())
    damaged = tmp_path / "l/bad.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:90])
    read: list[str] = []
    isolated = evaluate_module.run_isolated

    def noting(work, jobs, *more):
        read.extend(str(job) for job in jobs)
        return isolated(work, jobs, *more)

    monkeypatch.setattr(evaluate_module, "run_isolated", noting)
    scores, problems = evaluate(tmp_path / "p", tmp_path / "l")
    assert {score.subject for score in scores} == {"good"}
    assert [Path(path).name for path, _ in problems] == ["bad.nii.gz"] and "with " in problems[0][1]
    assert sum("l/bad.nii.gz" in job for job in read) == 1


def test_labels_of_background_alone_need_classes(tmp_path):
    for folder in "pl":
        write(tmp_path / f"{folder}/a.nii.gz", np.zeros_like(trees.organ()))
    with pytest.raises(ValueError, match=r"background alone, and nothing declares classes: give --classes"):
        evaluate(tmp_path / "p", tmp_path / "l")


def test_why_pairs_cannot_be_compared_comes_before_what_has_no_partner(tmp_path):
    for name in ("a", "b", "c", "z"):
        write(tmp_path / f"l/{name}.nii.gz", trees.organ())
    write(tmp_path / "p/z.nii.gz", (7 * (trees.organ() > 0)).astype(np.uint8))
    (tmp_path / "p/labels.json").write_text('{"organ": 1, "lesion": 2}')
    with pytest.raises(ValueError) as refused:
        evaluate(tmp_path / "p", tmp_path / "l")
    told = str(refused.value)
    assert told.index("the prediction has undeclared classes 7") < told.index("label without prediction")
    assert "declared are 1 (organ), 2 (lesion): by " in told and "give --merge" in told
    assert told.endswith("; and 1 more")


def test_what_cannot_be_compared_is_named(tmp_path, capsys):
    for name in ("good", "unpredicted", "elsewhere", "seven"):
        write(tmp_path / f"l/{name}.nii.gz", trees.organ())
    write(tmp_path / "p/good.nii.gz", trees.organ())
    write(tmp_path / "p/unknown.nii.gz", trees.organ())
    write(tmp_path / "p/elsewhere.nii.gz", trees.organ(), origin_xyz=(0.0, 0.0, 0.0))
    write(tmp_path / "p/seven.nii.gz", (7 * (trees.organ() > 0)).astype(np.uint8))
    code, said = run_cli(capsys, "evaluate", tmp_path / "p", tmp_path / "l")
    assert code == 1
    assert "unpredicted.nii.gz: label without prediction" in said
    assert "unknown.nii.gz: prediction without label" in said
    assert "elsewhere.nii.gz: prediction and label: not aligned" in said
    assert "seven.nii.gz: the prediction has undeclared classes 7" in said
    assert "declared are 1 (class_1), 2 (class_2): the numbers in the labels" in said
    assert main(["evaluate", str(tmp_path / "p"), str(tmp_path / "none")]) == 1


def test_scores_that_cannot_be_written_are_shown_all_the_same(tmp_path, capsys):
    for folder in "pl":
        write(tmp_path / f"{folder}/a.nii.gz", trees.organ())
    (tmp_path / "file").write_text("no folder")
    words = ["evaluate", str(tmp_path / "p"), str(tmp_path / "l")]
    assert main([*words, "--output", str(tmp_path / "file/scores.csv")]) == 1
    said = capsys.readouterr()
    assert "class_1" in said.out and "file" in said.err


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_a_time_limit_that_is_none_is_refused(tmp_path, seconds):
    with pytest.raises(ValueError, match="timeout_s must be 0"):
        evaluate(tmp_path, tmp_path, timeout_s=seconds)
