"""``pgl finetune``, ``pgl predict`` and ``pgl evaluate`` as a whole."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import yaml

from pgl.cli import main
from pgl.config import IntensitySettings
from pgl.downstream import evaluate as evaluate_module
from pgl.downstream.evaluate import evaluate
from pgl.downstream.model_file import Segmenter, load_model, save_model
from pgl.downstream.predict import predict
from pgl.downstream.train import finetune
from pgl.export import export_encoder, load_encoder
from pgl.networks import describe
from pgl.pretrain import pretrain
from pgl.settings import to_plain
from tests.pgl import labelled_trees as trees
from tests.pgl.ct_files import (
    body,
    hanging_read_image,
    hanging_read_pair,
    impatient,
    to_image,
    write,
    write_series,
)
from tests.pgl.labelled_data import labelled_cache, small_finetune
from tests.pgl.test_downstream_parts import Threshold
from tests.pgl.training_data import make_cache, small_config, small_encoder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled_cache(tmp_path_factory.mktemp("finetune") / "cache")


@pytest.fixture(scope="module")
def encoder(data: Path) -> Path:
    """An encoder that ``pgl pretrain`` trained and ``pgl export`` wrote."""
    run, file = data.parent / "pretrained", data.parent / "encoder.pt"
    pretrain(small_config(make_cache(data.parent / "unlabelled"), run, steps=2))
    export_encoder(run, file)
    return file


# --- training ---


def test_a_network_learns_blocks_that_it_can_see_and_writes_what_is_promised(data, tmp_path):
    results = finetune(small_finetune(data, tmp_path / "run", steps=120))
    untrained = finetune(small_finetune(data, tmp_path / "untrained", steps=2))
    assert results["mean"]["dice"] > 0.8 > 0.4 > untrained["mean"]["dice"]
    run = tmp_path / "run"
    written = json.loads((run / "results.json").read_text("utf-8"))
    assert written == results and written["weights"] == "random" and written["classes"] == ["bright", "dark"]
    with (run / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["subject"] for row in rows} == set(written["test"]) and len(rows) == 2 * len(written["test"])
    means = [np.mean([float(r["dice"]) for r in rows if r["class"] == name]) for name in ("bright", "dark")]
    assert written["mean"]["dice"] == pytest.approx(np.mean(means))
    assert len(written["training"]) == 6 and len(written["test"]) == 2
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert steps[-1]["step"] == 120 and steps[-1]["loss"] < steps[0]["loss"]
    torch.load(run / "model.pt", weights_only=True)
    torch.load(run / "checkpoints/last.pt", weights_only=True)
    assert load_model(run).classes == ["bright", "dark"]


def test_weights_of_pgl_export_become_the_encoder_and_are_named(data, encoder, tmp_path, capfd):
    config = small_finetune(data, tmp_path / "run", steps=1, weights=str(encoder), encoder=None)
    frozen = replace(config.optimizer, encoder_factor=0.0, warmup_steps=0)
    finetune(replace(config, optimizer=frozen))
    told = " ".join(capfd.readouterr().err.split())
    named = json.loads((tmp_path / "run/weights.json").read_text("utf-8"))
    expected = {f"encoder.{name}" for name, _ in load_encoder(encoder).named_parameters()}
    assert set(named["loaded"]) == expected and named["unused"] == []
    assert f"{len(expected)} tensors loaded: encoder.stem (4), encoder.stages.0" in told
    assert f"{len(named['missing'])} missing, so they start at random: decoder.stages.0" in told
    assert "0 unused: none" in told
    # With a rate of 0 the encoder that was tested is the one of the file.
    trained = load_model(tmp_path / "run").network.encoder.state_dict()
    assert all(torch.equal(trained[n], t) for n, t in load_encoder(encoder).state_dict().items())


def test_weights_that_would_mean_something_else_here_are_told(data, encoder, tmp_path, capfd):
    other = small_encoder()
    other.strides = [(1, 1, 1), (2, 2, 2), (1, 2, 2)]
    config = small_finetune(data, tmp_path / "run", steps=2, weights=str(encoder), encoder=other)
    finetune(replace(config, intensity=IntensitySettings((-160.0, 240.0), 40.0, 100.0)))
    told = " ".join(capfd.readouterr().err.split())
    assert (
        "WARNING: the network is not the one that the weights were trained in: strides [[1, 1, 1], "
        "[1, 2, 2], [2, 2, 2]], now [[1, 1, 1], [2, 2, 2], [1, 2, 2]]"
    ) in told
    assert "trained on HU clipped to [-1024.0, 325.0], less -158.58, divided by 324.7; now [-160.0, 2" in told
    finetune(replace(config, encoder=None, output=tmp_path / "alike"))
    assert "WARNING" not in capfd.readouterr().err


def test_the_same_decoder_starts_beside_any_encoder(data, encoder, tmp_path):
    for weights in ("random", str(encoder)):
        config = small_finetune(data, tmp_path / Path(weights).stem, steps=1, weights=weights)
        still = replace(config.optimizer, learning_rate=1e-30, warmup_steps=0)
        finetune(replace(config, optimizer=still))
    one, other = (load_model(tmp_path / name).network for name in ("random", "encoder"))
    for name, tensor in one.decoder.named_parameters():
        if not name.startswith("encoder."):
            # Even a rate of 1e-30 moves a bias off its 0.
            assert torch.allclose(tensor, dict(other.decoder.named_parameters())[name], rtol=0, atol=1e-20)
    assert not torch.equal(one.encoder.stem.convs[0].conv.weight, other.encoder.stem.convs[0].conv.weight)


def test_a_resumed_run_ends_in_the_same_weights_and_scores(data, tmp_path, monkeypatch):
    whole = finetune(small_finetune(data, tmp_path / "whole", steps=6))
    import pgl.downstream.train as train

    real, calls = train._Run._training_step, []

    def break_down(self, patches):
        if len(calls) == 5:
            raise RuntimeError("power cut")
        calls.append(1)
        return real(self, patches)

    monkeypatch.setattr(train._Run, "_training_step", break_down)
    with pytest.raises(RuntimeError, match="power cut"):
        finetune(small_finetune(data, tmp_path / "cut", steps=6))
    monkeypatch.undo()
    assert not (tmp_path / "cut/results.json").exists()
    with pytest.raises(ValueError, match="seed differ from the run"):
        finetune(small_finetune(data, tmp_path / "cut", steps=6, resume=True, seed=1))
    resumed = finetune(small_finetune(data, tmp_path / "cut", steps=6, resume=True))
    assert resumed["cases"] == whole["cases"]
    first, second = (load_model(tmp_path / name).network.state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    lines = [json.loads(line)["step"] for line in (tmp_path / "cut/metrics.jsonl").read_text().splitlines()]
    assert lines == [2, 4, 6]


def test_ctrl_c_finishes_the_step_and_the_run_goes_on_from_there(data, tmp_path, monkeypatch):
    import pgl.downstream.train as train

    real, done = train._Run._training_step, []

    def interrupted(self, patches):
        done.append(1)
        if len(done) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, patches)

    monkeypatch.setattr(train._Run, "_training_step", interrupted)
    config = small_finetune(data, tmp_path / "run", steps=5)
    rarely = replace(config, train=replace(config.train, checkpoint_every=100))
    with pytest.raises(KeyboardInterrupt):
        finetune(rarely)
    assert torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)["step"] == 3
    assert finetune(replace(rarely, resume=True))["steps"] == 5 and len(done) == 5


def test_patches_read_by_other_processes_are_the_same(data, tmp_path):
    for workers in (0, 2):
        config = small_finetune(data, tmp_path / str(workers), steps=3)
        finetune(replace(config, train=replace(config.train, workers=workers)))
    first, second = (load_model(tmp_path / name).network.state_dict() for name in "02")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_settings_written_by_a_run_start_the_same_run_from_the_command_line(data, tmp_path):
    config = small_finetune(data, tmp_path / "first", steps=2, classes={"any": ["bright", "dark"]})
    first = finetune(config)
    code = main(
        ["finetune", "--config", str(tmp_path / "first/config.yaml"), "--output", str(tmp_path / "b")]
    )
    assert code == 0
    second = json.loads((tmp_path / "b/results.json").read_text("utf-8"))
    assert second["cases"] == first["cases"] and second["classes"] == ["any"]
    assert main(["finetune", "--output", str(tmp_path / "b"), "--resume"]) == 0


# --- wrong inputs ---


def run_cli(capsys, *words) -> tuple[int, str]:
    code = main([str(word) for word in words])
    return code, " ".join(capsys.readouterr().err.split())


@pytest.fixture
def settings(tmp_path) -> Path:
    plain = to_plain(small_finetune(Path("x"), Path("x")))
    for name in ("data", "output", "weights", "resume"):
        del plain[name]
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


def test_wrong_inputs_are_told_in_one_line(data, encoder, settings, tmp_path, capsys):
    common = ["finetune", "--config", settings, "--output", tmp_path / "run"]
    code, said = run_cli(capsys, *common, "--data", data, "--weights", "random", "--fraction", "0.05")
    assert code == 1 and "fraction 0.05 of 6 training patients leaves no case: give at least 0.084" in said
    code, said = run_cli(capsys, *common, "--data", data, "--weights", "random", "--fraction", "1.5")
    assert code == 2 and "fraction must lie in (0, 1], got 1.5" in said
    code, said = run_cli(capsys, *common, "--data", data, "--weights", tmp_path / "none.pt")
    assert code == 1 and "no file at" in said
    unlabelled = data.parent / "unlabelled"
    code, said = run_cli(capsys, *common, "--data", unlabelled, "--weights", "random")
    assert code == 1 and "holds no labels: run pgl prepare with --labels" in said
    odd = ["--patches.patch_size", "9,16,16"]
    code, said = run_cli(capsys, *common, "--data", data, "--weights", "random", *odd)
    assert code == 1 and "must be a multiple, at least twice, of the encoder's total stride (2, 4, 4)" in said
    code, said = run_cli(capsys, "finetune", "--output", tmp_path / "run", "--resume")
    assert code == 1 and "no run of `pgl finetune` at" in said
    assert not (tmp_path / "run").exists()


def test_weights_of_another_network_are_refused_before_anything_is_written(data, encoder, tmp_path):
    wider = small_encoder()
    wider.features_per_stage = [5, 6, 7]
    config = small_finetune(data, tmp_path / "run", weights=str(encoder), encoder=wider)
    with pytest.raises(ValueError, match=r"none of the .* fits the network .*in the file"):
        finetune(config)
    assert not (tmp_path / "run").exists()
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(ValueError, match="cannot be read as an exported encoder"):
        finetune(replace(config, weights=str(tmp_path / "text.pt")))


@pytest.mark.parametrize("chances", [(0.5, 0.5), (0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 1.5)])
def test_mirrors_that_are_not_three_chances_are_refused(data, tmp_path, chances):
    wrong = small_finetune(data, tmp_path / "run")
    wrong = replace(wrong, patches=replace(wrong.patches, flip_probability=chances))
    with pytest.raises(ValueError, match=r"patches\.flip_probability must "):
        finetune(wrong)
    assert not (tmp_path / "run").exists()


def test_an_output_that_holds_something_is_left_alone(data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.txt").write_text("dear")
    for resume in (False, True):
        with pytest.raises(FileExistsError):
            finetune(small_finetune(data, tmp_path / "run", resume=resume))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


# --- predicting ---


class Embedded(Threshold):
    """A pointwise network behind the interface of the real one."""


@pytest.fixture
def threshold(monkeypatch) -> None:
    """``pgl predict`` with a network that marks what is denser than 400 HU."""
    intensity = IntensitySettings((-1024.0, 1500.0), 0.0, 500.0)
    model = Segmenter(Embedded(400, intensity), ["bone"], intensity, (3.0, 2.0, 2.0), (8, 16, 16))
    monkeypatch.setattr("pgl.downstream.predict.load_model", lambda run, device: model)


def overlap(mask: np.ndarray, truth: np.ndarray) -> float:
    return 2 * (mask & truth).sum() / (mask.sum() + truth.sum())


TURN = np.array([[np.cos(0.3), -np.sin(0.3), 0], [np.sin(0.3), np.cos(0.3), 0], [0, 0, 1.0]])
GRIDS = {
    "the network's own": {},
    "shifted": {"origin_xyz": (123.4, -56.7, 8.9)},
    "flipped": {"direction": np.diag([-1.0, -1.0, 1.0])},
    "head last": {"direction": np.diag([1.0, 1.0, -1.0])},
    "axes swapped": {"direction": np.array([[0, 0, 1.0], [1, 0, 0], [0, 1, 0]])},
    "rotated": {"direction": TURN},
    "finer": {"spacing_xyz": (1.3, 1.7, 2.1)},
}


@pytest.mark.parametrize("grid", GRIDS)
def test_a_mask_lies_where_the_image_is_dense_on_the_images_own_grid(threshold, tmp_path, grid):
    """Truth: the image's own voxels; the network marks bone, a column in the back that no symmetry hides."""
    array = body((20, 48, 52))
    array[:7, 4:12, 30:44] = 900  # something that is different on every side
    path = write(tmp_path / "images/case.nii.gz", array, **GRIDS[grid])
    written, report = predict("RUN", [path.parent], tmp_path / "out")
    assert [p.name for p in written] == ["case.nii.gz"] and report.exit_code == 0
    image, mask = sitk.ReadImage(str(path)), sitk.ReadImage(str(written[0]))
    assert mask.GetPixelID() == sitk.sitkUInt8 and mask.GetSize() == image.GetSize()
    for name in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert np.allclose(getattr(mask, name)(), getattr(image, name)(), atol=1e-4)
    found = sitk.GetArrayFromImage(mask) == 1
    dense = array > 400
    if grid in ("the network's own", "shifted", "flipped", "head last"):
        assert np.array_equal(found, dense)
    assert overlap(found, dense) > 0.9
    for axis in range(3):
        assert overlap(np.flip(found, axis), dense) < 0.7
    assert json.loads((tmp_path / "out/labels.json").read_text("utf-8")) == {"background": 0, "bone": 1}


def test_a_dicom_series_is_segmented_and_a_mask_among_the_images_is_named(threshold, tmp_path):
    write_series(tmp_path / "in/series", body())
    write(tmp_path / "in/mask.nii.gz", trees.organ())
    written, report = predict("RUN", [tmp_path / "in"], tmp_path / "out")
    assert [p.name for p in written] == ["series.nii.gz"] and report.exit_code == 1
    assert "label map" in report.rejected[0].reason
    # The array of the written volume is in the order of the slices' positions, as `body` is.
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(written[0]))) == 1, body() > 400)


def test_images_of_one_name_get_names_of_their_own(threshold, tmp_path):
    for folder in "ab":
        write(tmp_path / f"in/{folder}/ct.nii.gz", body())
    written, _ = predict("RUN", [tmp_path / "in"], tmp_path / "out")
    assert len({p.name for p in written}) == 2


def test_an_image_that_hangs_the_reader_is_ended(threshold, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("pgl.downstream.predict.read_image", hanging_read_image)
    monkeypatch.setattr("pgl.downstream.predict.run_isolated", impatient)
    path = write(tmp_path / "in/slow.nii.gz", body())
    with pytest.raises(ValueError, match=r"no usable CT in .*: 1 rejected"):
        predict("RUN", [path], tmp_path / "out")
    assert "crashes the reader: took longer than 3 s and was ended" in " ".join(
        capfd.readouterr().err.split()
    )


def test_predicting_needs_a_finished_run(data, tmp_path, capsys):
    code, said = run_cli(capsys, "predict", tmp_path, tmp_path, "--output", tmp_path / "out")
    assert code == 1 and "give the folder of a finished `pgl finetune`" in said
    torch.save({"format": "other"}, tmp_path / "model.pt")
    code, said = run_cli(capsys, "predict", tmp_path, tmp_path, "--output", tmp_path / "out")
    assert code == 1 and "is no fine-tuned network" in said


def test_a_model_file_gives_the_network_back(tmp_path):
    from pgl.downstream.network import build_unet

    description = describe(small_encoder())
    network = build_unet(description, 3).eval()
    intensity = IntensitySettings((-900.0, 300.0), 12.0, 345.0)
    model = Segmenter(network, ["a", "b"], intensity, (3.0, 1.0, 1.0), (8, 16, 16))
    save_model(tmp_path / "model.pt", model, description, 1, 7)
    again = load_model(tmp_path / "model.pt")
    images = torch.randn(1, 1, 8, 16, 16)
    with torch.no_grad():
        assert torch.equal(again.network(images), network(images))
    assert (again.classes, again.intensity, again.spacing_mm, again.patch_size) == (
        model.classes, intensity, (3.0, 1.0, 1.0), (8, 16, 16)
    )  # fmt: skip


# --- evaluating ---


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
        expected = overlap(shifted == number, truth == number)
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


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_a_time_limit_that_is_none_is_refused(tmp_path, seconds):
    with pytest.raises(ValueError, match="timeout_s must be 0"):
        evaluate(tmp_path, tmp_path, timeout_s=seconds)
    with pytest.raises(ValueError, match="timeout_s must be 0"):
        predict(tmp_path, [tmp_path], tmp_path / "masks", timeout_s=seconds)
