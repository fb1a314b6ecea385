"""``pgl predict``: segmentations on each image's own grid."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from pgl.config import IntensitySettings
from pgl.downstream import predict as predict_module
from pgl.downstream.model_file import Segmenter, load_model, save_model
from pgl.downstream.predict import predict
from pgl.networks import describe
from tests.pgl import labelled_trees as trees
from tests.pgl.command_line import run_cli
from tests.pgl.ct_files import body, hanging_read_image, impatient, write, write_series
from tests.pgl.full_disk import files_of_at_most
from tests.pgl.test_downstream_parts import Threshold
from tests.pgl.training_data import small_encoder


class Embedded(Threshold):
    """A pointwise network behind the interface of the real one."""


@pytest.fixture
def threshold(monkeypatch) -> None:
    """``pgl predict`` with a network that marks what is denser than 400 HU."""
    intensity = IntensitySettings((-1024.0, 1500.0), 0.0, 500.0)
    model = Segmenter(Embedded(400, intensity), ["bone"], intensity, (3.0, 2.0, 2.0), (8, 16, 16))
    monkeypatch.setattr("pgl.downstream.predict.load_model", lambda run, device: model)


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
    assert trees.overlap(found, dense) > 0.9
    for axis in range(3):
        assert trees.overlap(np.flip(found, axis), dense) < 0.7
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


def test_a_case_named_like_another_image_gets_a_file_of_its_own():
    paths = {"a/ct.nii.gz": "ct", "b/ct.nii.gz": "b_ct", "b_ct.nii.gz": "b_ct_2", "other.nii.gz": "x"}
    jobs = [SimpleNamespace(path=path, case_id=case, headers=()) for path, case in paths.items()]
    assert predict_module._names(jobs) == ["ct", "b_ct", "b_ct_2", "other"]


def bytes_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("source", "output", "said"),
    [
        ("p/a.nii.gz", "p", r"p/a\.nii\.gz would replace a file of SOURCE"),
        ("p/a.nii.gz", "link", r"link/a\.nii\.gz would replace a file of SOURCE"),
        ("p/sub", "p", r"p/a\.nii\.gz is there and is not marked as a mask of `pgl predict`"),
    ],
)
@pytest.mark.parametrize("classes", [None, {"background": 0, "bone": 1}])
def test_an_image_is_never_replaced_by_a_mask(threshold, tmp_path, source, output, said, classes):
    """Nor where a labels.json with the network's own classes lies beside it."""
    write(tmp_path / "p/a.nii.gz", body(), compress=True)
    write(tmp_path / "p/sub/a.nii.gz", body(seed=1), compress=True)
    (tmp_path / "link").symlink_to("p")
    if classes:
        (tmp_path / "p/labels.json").write_text(json.dumps(classes))
    before = bytes_below(tmp_path)
    with pytest.raises(FileExistsError, match=said):
        predict("RUN", [tmp_path / source], tmp_path / output)
    assert bytes_below(tmp_path) == before


def test_masks_of_an_earlier_run_are_replaced_and_those_of_other_classes_kept(threshold, tmp_path):
    path = write(tmp_path / "in/a.nii.gz", body())
    [mask], _ = predict("RUN", [path], tmp_path / "out")
    first = mask.read_bytes()
    write(path, np.flip(body(), 1))
    predict("RUN", [path], tmp_path / "out")
    assert mask.read_bytes() != first
    (tmp_path / "out/labels.json").write_text('{"liver": 1}')
    before = bytes_below(tmp_path)
    with pytest.raises(
        FileExistsError, match=r'out/labels\.json is not what .*"bone": 1.*name another folder'
    ):
        predict("RUN", [path], tmp_path / "out")
    assert bytes_below(tmp_path) == before


def test_a_file_whose_name_is_not_utf8_is_segmented_as_any_other(threshold, tmp_path):
    odd = os.fsdecode(b"gr\xf6\xdfe.nii.gz")
    write(tmp_path / "z.nii.gz", body()).rename(tmp_path / odd)
    written, report = predict("RUN", [tmp_path / odd], tmp_path / "out")
    assert report.exit_code == 0 and sorted(os.listdir(tmp_path / "out")) == sorted([odd, "labels.json"])
    plain = written[0].rename(tmp_path / "mask.nii.gz")
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(plain))) == 1, body() > 400)


def test_a_mask_that_a_full_disk_cut_off_is_named_and_not_left_behind(threshold, tmp_path):
    noise = np.where(np.random.default_rng(0).random((20, 64, 64)) < 0.15, 700, body((20, 64, 64)))
    path = write(tmp_path / "in/case.nii.gz", noise.astype(np.int16))
    predict("RUN", [path], tmp_path / "out")
    before = (tmp_path / "out/case.nii.gz").read_bytes()
    with files_of_at_most(5000), pytest.raises(OSError, match=r"cannot write .*case\.nii\.gz: .*make room"):
        predict("RUN", [path], tmp_path / "out")
    assert (tmp_path / "out/case.nii.gz").read_bytes() == before
    assert sorted(os.listdir(tmp_path / "out")) == ["case.nii.gz", "labels.json"]


def test_an_image_that_hangs_the_reader_is_ended(threshold, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("pgl.downstream.predict.read_image", hanging_read_image)
    monkeypatch.setattr("pgl.downstream.predict.run_isolated", impatient)
    path = write(tmp_path / "in/slow.nii.gz", body())
    with pytest.raises(ValueError, match=r"no usable CT in .*: 1 rejected"):
        predict("RUN", [path], tmp_path / "out")
    assert "crashes the reader: took longer than 3 s and was ended" in " ".join(
        capfd.readouterr().err.split()
    )


def test_predicting_needs_a_finished_run(tmp_path, capsys):
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
    model = Segmenter(network, ["a", "b"], intensity, (3.0, 1.0, 1.0), (8, 16, 16), "bf16-mixed")
    save_model(tmp_path / "model.pt", model, description, 1, 7)
    again = load_model(tmp_path / "model.pt")
    images = torch.randn(1, 1, 8, 16, 16)
    with torch.no_grad():
        assert torch.equal(again.network(images), network(images))
    assert replace(again, network=network) == model


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_a_time_limit_that_is_none_is_refused(tmp_path, seconds):
    with pytest.raises(ValueError, match="timeout_s must be 0"):
        predict(tmp_path, [tmp_path], tmp_path / "masks", timeout_s=seconds)
