"""``pgl prepare`` with labels: found by layout, held against their image, cached on its grid."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from rich.console import Console

from pgl.cache.volumes import CacheWriter, VolumeCache
from pgl.cli import main
from pgl.downstream.labels import LabelledCache
from pgl.images import Grid
from pgl.labels.alignment import Geometry, misalignment
from pgl.labels.classes import parse_classes
from pgl.labels.resampling import probabilities_onto, resample_label
from pgl.labels.settings import LabelSettings
from pgl.labels.store import (
    is_label_intact,
    read_label_block,
    read_label_volume,
    read_labels,
    verify_labels,
)
from pgl.prepare.run import PrepareSettings, prepare
from tests.pgl import labelled_trees as trees
from tests.pgl.ct_files import body, hanging_prepare_label, impatient, to_image, write, write_series

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
SMALL = PrepareSettings(spacing_mm=(3.0, 2.0, 2.0), minimum_size=(8, 16, 16), workers=1)


def run(source, output, **labels):
    console = Console(file=io.StringIO(), width=80)
    return prepare([source], output, SMALL, console, LabelSettings(**labels))


def by_subject(output: Path) -> dict:
    return {record.subject: record for record in read_labels(output)}


def rejections(report) -> dict[str, str]:
    return {os.path.basename(entry.path): entry.reason for entry in report.rejected}


LAYOUTS = {
    "msd": (trees.msd, {"liver_0", "liver_1"}, {1: "liver", 2: "cancer"}, 3),
    "kits": (trees.kits, {"case_00000", "case_00001"}, {1: "kidney", 2: "tumour"}, 3),
    "nnunet": (trees.nnunet, {"spleen_000", "spleen_001"}, {1: "spleen"}, 3),
    "bcv": (trees.bcv, {"0001", "0002"}, None, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_recognised_and_its_labels_cached(tmp_path, layout):
    make, subjects, classes, images = LAYOUTS[layout]
    report = run(make(tmp_path / "data"), tmp_path / "cache")
    assert report.rejected == []
    assert len(VolumeCache(tmp_path / "cache").cases) == images
    labels = by_subject(tmp_path / "cache")
    assert set(labels) == subjects
    cases = {case.case_id: case for case in VolumeCache(tmp_path / "cache").cases}
    for record in labels.values():
        if classes:
            assert record.classes == classes
        else:
            assert record.classes[6] == "liver" and len(record.classes) == 13 and record.voxels[13] > 0
        assert record.shape == cases[record.case_id].shape
        # The image's spacing is the cache's: the voxels are the file's own.
        expected = trees.organ(lesion=layout != "nnunet")
        if layout == "bcv":
            expected[-2:, -4:, -6:] = 13
        assert np.array_equal(read_label_volume(tmp_path / "cache", record), expected)


def test_a_folder_of_pairs_takes_names_and_classes_from_beside_it(tmp_path):
    root = trees.pairs(tmp_path / "data")
    report = run(root / "images", tmp_path / "cache", labels=str(root / "labels"))
    assert report.rejected == [] and report.exit_code == 0
    labels = by_subject(tmp_path / "cache")
    assert set(labels) == {"case_0", "case_1"}
    assert labels["case_0"].classes == {1: "organ", 2: "lesion"}
    manifest = json.loads((tmp_path / "cache/manifest.json").read_text("utf-8"))
    assert [entry["sha256"] for entry in manifest["labels"]] == [labels[s].sha256 for s in sorted(labels)]


def test_images_and_labels_in_one_folder_are_told_apart_by_name(tmp_path):
    for n in range(2):
        write(tmp_path / f"data/p{n}_ct.nii.gz", body(seed=n))
        write(tmp_path / f"data/p{n}_tumour.nii.gz", trees.organ(lesion=False))
    report = run(
        tmp_path / "data",
        tmp_path / "cache",
        labels=str(tmp_path / "data"),
        image_name="*_ct.nii.gz",
        label_name="*_tumour.nii.gz",
    )
    assert report.rejected == [] and len(report.accepted) == 2
    assert set(by_subject(tmp_path / "cache")) == {"p0", "p1"}


def test_a_dicom_series_goes_with_the_label_of_its_folders_name(tmp_path):
    write_series(tmp_path / "ct/patient7")
    write(tmp_path / "masks/patient7.nii.gz", trees.organ())
    report = run(tmp_path / "ct", tmp_path / "cache", labels=str(tmp_path / "masks"))
    assert report.rejected == []
    assert set(by_subject(tmp_path / "cache")) == {"patient7"}


def test_a_label_of_a_folder_with_two_series_is_refused(tmp_path):
    write_series(tmp_path / "ct/patient7")
    for path in write_series(tmp_path / "ct/other", body(seed=2), series=2):
        path.rename(tmp_path / "ct/patient7" / f"second_{path.name}")
    write(tmp_path / "masks/patient7.nii.gz", trees.organ())
    report = run(tmp_path / "ct", tmp_path / "cache", labels=str(tmp_path / "masks"))
    assert "label of a folder with 2 series" in rejections(report)["patient7.nii.gz"]
    assert len(report.accepted) == 2 and read_labels(tmp_path / "cache") == []


def test_other_layouts_than_asked_for_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no SOURCE is in the layout kits: expected folders case_00000"):
        run(trees.msd(tmp_path / "data"), tmp_path / "cache", layout="kits")


def test_layout_none_takes_images_alone(tmp_path):
    report = run(trees.msd(tmp_path / "data"), tmp_path / "cache", layout="none")
    assert "label map" in rejections(report)["liver_0.nii.gz"]
    assert read_labels(tmp_path / "cache") == []


# --- labels that cannot be used ---


def test_each_unusable_label_is_rejected_with_its_reason_and_its_image_kept(tmp_path):
    images, labels = tmp_path / "images", tmp_path / "labels"
    bad = {
        "undeclared": (
            np.where(trees.organ() == 2, 7, trees.organ()).astype(np.uint8),
            "undeclared classes 7",
        ),
        "empty": (np.zeros(trees.SHAPE, np.uint8), "empty label: every voxel is background"),
        "fractions": (trees.organ().astype(np.float32) / 2, "voxels are no whole numbers (such as 0.5)"),
        "negative": (-trees.organ().astype(np.int16), "values from -2 to 0"),
        "nan": (np.where(trees.organ() > 0, np.nan, 0).astype(np.float32), "voxels are NaN or infinite"),
    }
    for name, (array, _) in bad.items():
        write(images / f"{name}.nii.gz")
        write(labels / f"{name}.nii.gz", array)
    write(images / "lonely.nii.gz")
    write(labels / "orphan.nii.gz", trees.organ())
    write(images / "good.nii.gz")
    write(labels / "good.nii.gz", trees.organ().astype(np.float64) * 0.999999)
    (labels / "labels.json").write_text('{"organ": 1, "lesion": 2}')
    report = run(images, tmp_path / "cache", labels=str(labels))
    told = rejections(report)
    for name, (_, reason) in bad.items():
        assert reason in told.pop(f"{name}.nii.gz"), name
    assert "image without label: no file called lonely" in told.pop("lonely.nii.gz")
    assert "label without image" in told.pop("orphan.nii.gz")
    assert told == {} and report.exit_code == 1
    assert len(VolumeCache(tmp_path / "cache")) == 7
    assert set(by_subject(tmp_path / "cache")) == {"good"}
    kept = read_label_volume(tmp_path / "cache", by_subject(tmp_path / "cache")["good"])
    assert np.array_equal(kept, trees.organ())


def test_a_label_that_hangs_the_reader_is_ended_and_its_image_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("pgl.labels.prepare_labels.prepare_label", hanging_prepare_label)
    monkeypatch.setattr("pgl.labels.prepare_labels.run_isolated", impatient)
    write(tmp_path / "images/slow.nii.gz", body())
    write(tmp_path / "labels/slow.nii.gz", trees.organ())
    report = run(tmp_path / "images", tmp_path / "cache", labels=tmp_path / "labels")
    assert rejections(report) == {
        "slow.nii.gz": "label: crashes the reader: took longer than 3 s and was ended"
    }
    assert by_subject(tmp_path / "cache") == {} and len(VolumeCache(tmp_path / "cache").cases) == 1


def test_an_empty_label_may_be_allowed(tmp_path):
    write(tmp_path / "i/a.nii.gz")
    write(tmp_path / "l/a.nii.gz", np.zeros(trees.SHAPE, np.uint8))
    report = run(tmp_path / "i", tmp_path / "c", labels=str(tmp_path / "l"), allow_empty_labels=True)
    assert report.rejected == [] and by_subject(tmp_path / "c")["a"].voxels == {}


def test_missing_files_of_a_layout_are_named(tmp_path):
    root = trees.msd(tmp_path / "data", cases=3)
    (root / "labelsTr/liver_1.nii.gz").unlink()
    (root / "imagesTr/liver_2.nii.gz").unlink()
    told = rejections(run(root, tmp_path / "cache"))
    assert told["liver_1.nii.gz"].startswith("image without label: there is no ")
    assert told["liver_2.nii.gz"].startswith("label without image: there is no ")
    assert set(by_subject(tmp_path / "cache")) == {"liver_0"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modality": {"0": "FLAIR", "1": "T1w"}}, "CT has one"),
        ({"labels": {"0": "background"}}, "declares no class but the background"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "number 1 stands for 'a' and for 'b'"),
        ({"training": [{"image": "../secret.nii.gz", "label": "l.nii.gz"}]}, "outside its folder"),
    ],
)
def test_a_dataset_json_that_cannot_be_used_is_refused(tmp_path, change, message):
    root = trees.msd(tmp_path / "data")
    content = json.loads((root / "dataset.json").read_text("utf-8"))
    (root / "dataset.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match=message):
        run(root, tmp_path / "cache")


def test_regions_and_ignored_voxels_of_nnunet_are_refused():
    with pytest.raises(ValueError, match="made of several numbers"):
        parse_classes({"background": 0, "whole": [1, 2]}, "dataset.json")
    with pytest.raises(ValueError, match="'ignore'"):
        parse_classes({"background": 0, "liver": 1, "ignore": 2}, "dataset.json")


def test_two_sources_with_different_classes_are_refused(tmp_path):
    first, second = trees.msd(tmp_path / "a"), trees.kits(tmp_path / "b")
    with pytest.raises(ValueError, match="one cache has one set of classes"):
        prepare([first, second], tmp_path / "cache", SMALL, Console(file=io.StringIO()))


def test_the_command_line_says_what_is_wrong_with_label_settings(tmp_path, capsys):
    write(tmp_path / "i/a.nii.gz")
    common = ["prepare", str(tmp_path / "i"), "--output", str(tmp_path / "c")]
    assert main([*common, "--labels", str(tmp_path / "none")]) == 1
    assert "labels: " in capsys.readouterr().err
    assert main([*common, "--labels", str(tmp_path / "i"), "--label_name", "seg"]) == 2
    assert "label_name must hold one *" in capsys.readouterr().err
    assert main([*common, "--classes", str(tmp_path / "x.json")]) == 1
    assert "classes are given, but no labels" in capsys.readouterr().err


# --- running again ---


def test_unchanged_labels_are_kept_and_changed_or_damaged_ones_made_anew(tmp_path):
    root = trees.pairs(tmp_path / "data")
    arguments = {"labels": str(root / "labels")}
    run(root / "images", tmp_path / "cache", **arguments)
    first = by_subject(tmp_path / "cache")
    again = run(root / "images", tmp_path / "cache", **arguments)
    assert all(entry.reason.startswith("unchanged") for entry in again.labels) and len(again.labels) == 2
    (tmp_path / "cache" / first["case_0"].file).write_bytes(b"damaged")
    assert [line.split(":")[0] for line in verify_labels(tmp_path / "cache")] == [first["case_0"].case_id]
    with pytest.raises(ValueError, match="does not have its checksum: run pgl prepare again"):
        LabelledCache(tmp_path / "cache")
    write(root / "labels/case_1.nii.gz", trees.organ(lesion=False))
    run(root / "images", tmp_path / "cache", **arguments)
    now = by_subject(tmp_path / "cache")
    assert now["case_0"] == first["case_0"] and is_label_intact(tmp_path / "cache", now["case_0"])
    assert set(now["case_1"].voxels) == {1}
    (root / "labels/case_1.nii.gz").unlink()
    run(root / "images", tmp_path / "cache", **arguments)
    assert set(by_subject(tmp_path / "cache")) == {"case_0"}
    assert sorted(p.suffix for p in (tmp_path / "cache/labels").iterdir()) == [".b2nd", ".json"]


def test_labels_survive_a_lost_manifest_and_go_with_their_case(tmp_path):
    root = trees.pairs(tmp_path / "data")
    run(root / "images", tmp_path / "cache", labels=str(root / "labels"))
    before = by_subject(tmp_path / "cache")
    (tmp_path / "cache/manifest.json").unlink()
    writer = CacheWriter(tmp_path / "cache", (3.0, 2.0, 2.0))
    assert by_subject(tmp_path / "cache") == before
    writer.remove(before["case_0"].case_id)
    writer.finish()
    assert set(by_subject(tmp_path / "cache")) == {"case_1"}


def test_a_label_of_an_older_image_is_not_listed(tmp_path):
    root = trees.pairs(tmp_path / "data", cases=1)
    run(root / "images", tmp_path / "cache", labels=str(root / "labels"))
    write(root / "images/case_0.nii.gz", body(seed=5))
    prepare([root / "images"], tmp_path / "cache", SMALL, Console(file=io.StringIO()))
    assert read_labels(tmp_path / "cache") == []


def test_other_names_for_the_same_numbers_are_refused(tmp_path):
    root = trees.pairs(tmp_path / "data")
    run(root / "images", tmp_path / "cache", labels=str(root / "labels"))
    (root / "labels.json").write_text('{"spleen": 1, "lesion": 2}')
    with pytest.raises(ValueError, match="class 1 is 'organ', now 'spleen' is declared"):
        run(root / "images", tmp_path / "cache", labels=str(root / "labels"))


# --- geometry ---


def test_a_flipped_label_at_the_same_place_is_resampled_to_the_right_place(tmp_path):
    write(tmp_path / "i/a.nii.gz")
    label = to_image(trees.organ())
    (tmp_path / "l").mkdir()
    sitk.WriteImage(sitk.Flip(label, (False, True, True)), str(tmp_path / "l/a.nii.gz"))
    flipped = sitk.ReadImage(str(tmp_path / "l/a.nii.gz"))
    assert not np.array_equal(sitk.GetArrayFromImage(flipped), trees.organ())
    report = run(tmp_path / "i", tmp_path / "c", labels=str(tmp_path / "l"))
    assert report.rejected == []
    assert np.array_equal(read_label_volume(tmp_path / "c", by_subject(tmp_path / "c")["a"]), trees.organ())


def test_a_label_of_finer_spacing_over_the_same_extent_is_taken(tmp_path):
    write(tmp_path / "i/a.nii.gz")
    fine = np.kron(trees.organ(), np.ones((3, 2, 2), np.uint8))
    origin = (-30.0 - 0.5, 12.5 - 0.5, 100.0 - 1.0)
    write(tmp_path / "l/a.nii.gz", fine, spacing_xyz=(1.0, 1.0, 1.0), origin_xyz=origin)
    report = run(tmp_path / "i", tmp_path / "c", labels=str(tmp_path / "l"), label_interpolation="nearest")
    assert report.rejected == []
    assert np.array_equal(read_label_volume(tmp_path / "c", by_subject(tmp_path / "c")["a"]), trees.organ())


@pytest.mark.parametrize(
    ("geometry", "hint"),
    [
        ({"origin_xyz": (-28.0, 12.5, 100.0)}, "same size"),
        ({"origin_xyz": (0.0, 0.0, 0.0)}, "same size"),
        ({"spacing_xyz": (2.0, 2.0, 3.3)}, "same size"),
        ({"array": trees.organ()[2:]}, "cropped"),
    ],
)
def test_a_label_elsewhere_is_refused_with_both_extents(tmp_path, geometry, hint):
    write(tmp_path / "i/a.nii.gz")
    write(tmp_path / "l/a.nii.gz", **{"array": trees.organ(), **geometry})
    reason = rejections(run(tmp_path / "i", tmp_path / "c", labels=str(tmp_path / "l")))["a.nii.gz"]
    assert "not aligned with its image: the label covers 48x40x1" in reason and hint in reason


def test_alignment_allows_half_a_voxel_of_the_coarser_grid_and_no_more():
    def grid(shift_mm: float, spacing: float = 2.0, size: int = 40) -> Geometry:
        # Its lower face lies at shift_mm.
        return Geometry(
            (size,) * 3, (spacing,) * 3, (shift_mm + spacing / 2, spacing / 2, spacing / 2), np.eye(3).ravel()
        )

    image = grid(0.0)
    assert misalignment(grid(0.99), image) is None
    assert misalignment(grid(1.1), image) is not None
    assert misalignment(grid(1.9, spacing=4.0, size=20), image) is None
    assert misalignment(grid(2.1, spacing=4.0, size=20), image) is not None
    turned = np.array([[0, 1, 0], [-1, 0, 0], [0, 0, 1]], float)  # a quarter turn about the cube's middle
    middle = image.corners_mm().mean(0)
    origin = middle - turned @ (np.full(3, 2.0) * (np.full(3, 40) - 1) / 2)
    assert misalignment(Geometry((40,) * 3, (2.0,) * 3, origin, turned.ravel()), image) is None


def test_linear_interpolation_of_labels_halves_at_the_border():
    """A half-space whose border lies between voxels moves to the nearest border of the new grid."""
    label = np.zeros((4, 8, 20), np.uint8)
    label[:, :, 10:] = 3
    image = to_image(label, spacing_xyz=(1.0, 1.0, 1.0), origin_xyz=(0.5, 0.5, 0.5))
    grid = Grid((4, 8, 40), (1.0, 1.0, 0.5), (0.5, 0.5, 0.25))
    fine = resample_label(image, grid)
    assert (fine[:, :, :20] == 0).all() and (fine[:, :, 20:] == 3).all()
    coarse = resample_label(image, Grid((4, 8, 5), (1.0, 1.0, 4.0), (0.5, 0.5, 2.0)))
    assert coarse[0, 0].tolist() == [0, 0, 3, 3, 3] or coarse[0, 0].tolist() == [0, 0, 0, 3, 3]


def test_probabilities_come_back_to_a_rotated_image_at_the_same_physical_place():
    """Truth: a ball in the patient's frame, drawn on the oblique image by its own voxel centres."""
    angle = np.radians(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    turn = turn @ np.diag([-1, 1, 1])
    image = to_image(np.zeros((20, 30, 34), np.int16), (1.5, 1.5, 2.0), (40.0, -20.0, 10.0), turn)
    centre, radius = np.array(image.TransformContinuousIndexToPhysicalPoint((18.0, 13.0, 9.0))), 9.0
    grid = Grid((60, 90, 100), (1.0, 1.0, 1.0), (centre[2] - 30, centre[1] - 45, centre[0] - 50))
    z, y, x = np.meshgrid(
        *(np.arange(n) + o for n, o in zip(grid.shape, grid.origin_mm, strict=True)), indexing="ij"
    )
    inside = np.hypot(np.hypot(x - centre[0], y - centre[1]), z - centre[2]) - radius
    ball = 1 / (1 + np.exp(2 * inside))
    mask = probabilities_onto(image, np.stack([1 - ball, ball]).astype(np.float32), grid)
    index = np.stack(np.meshgrid(*(np.arange(n) for n in image.GetSize()), indexing="ij"), -1).reshape(-1, 3)
    points = index @ (turn * np.array(image.GetSpacing())).T + np.array(image.GetOrigin())
    truth = (np.linalg.norm(points - centre, axis=1) < radius).reshape(image.GetSize()).transpose(2, 1, 0)
    assert truth.sum() > 500
    assert 2 * (truth & (mask == 1)).sum() / (truth.sum() + (mask == 1).sum()) > 0.99


def test_a_block_reaching_out_of_a_label_is_background_there(tmp_path):
    root = trees.pairs(tmp_path / "data", cases=1)
    run(root / "images", tmp_path / "cache", labels=str(root / "labels"))
    record = by_subject(tmp_path / "cache")["case_0"]
    whole = np.pad(trees.organ(), 50)
    block = read_label_block(tmp_path / "cache", record, (-3, 7, 30), (30, 20, 40))
    assert np.array_equal(block, whole[47 : 47 + 30, 57 : 57 + 20, 80 : 80 + 40])


# --- real CT ---


@pytest.mark.skipif(not REAL.exists(), reason="no real CT at ../shared/data")
def test_the_real_flipped_label_fits_and_the_foreign_one_is_refused(tmp_path):
    organs = REAL / "organs"
    (tmp_path / "l").mkdir()
    for name in ("ts_crop3mm", "ts_dicom20"):
        (tmp_path / f"l/{name}.nii.gz").symlink_to(organs / f"{name}_seg.nii.gz")
    settings = PrepareSettings(spacing_mm=(3.0, 3.0, 3.0), minimum_size=(8, 16, 16), workers=1)
    sources = [organs / "ts_dicom20", organs / "ts_crop3mm.nii.gz"]
    quiet = Console(file=io.StringIO())
    report = prepare(sources, tmp_path / "c", settings, quiet, LabelSettings(labels=str(tmp_path / "l")))
    assert report.rejected == [] and set(by_subject(tmp_path / "c")) == {"ts_crop3mm", "ts_dicom20"}
    cache = VolumeCache(tmp_path / "c")
    record = by_subject(tmp_path / "c")["ts_dicom20"]
    number = next(i for i, case in enumerate(cache.cases) if case.case_id == record.case_id)
    hu, liver = cache.read_volume(number), read_label_volume(tmp_path / "c", record) == 5

    def soft(mask):
        return np.mean((hu[mask] > -50) & (hu[mask] < 250))

    assert soft(liver) > 0.97
    assert soft(liver[:, ::-1]) < 0.8  # as it would be by the order of the voxels on disk
    (tmp_path / "l/ts_crop3mm.nii.gz").unlink()
    (tmp_path / "l/ts_crop3mm.nii.gz").symlink_to(REAL / "hard/ts_pulm_crop_heart_othergrid_seg.nii.gz")
    report = prepare(sources, tmp_path / "c", settings, quiet, LabelSettings(labels=str(tmp_path / "l")))
    assert "not aligned with its image" in rejections(report)["ts_crop3mm.nii.gz"]


@pytest.mark.skipif(not REAL.exists(), reason="no real CT at ../shared/data")
@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
def test_a_real_tumour_keeps_its_volume_and_place_on_a_coarser_grid(tmp_path, interpolation):
    for part in ("ct", "tumour"):
        name = f"STS_001_{part}.nii.gz"
        (tmp_path / name).symlink_to(REAL / "sarcoma" / name)
    settings = PrepareSettings(spacing_mm=(4.0, 2.0, 2.0), minimum_size=(8, 16, 16), workers=1)
    names = {"image_name": "*_ct.nii.gz", "label_name": "*_tumour.nii.gz"}
    labels = LabelSettings(labels=str(tmp_path), label_interpolation=interpolation, **names)
    report = prepare([tmp_path], tmp_path / "c", settings, Console(file=io.StringIO()), labels)
    assert report.rejected == []
    record, case = by_subject(tmp_path / "c")["STS_001"], VolumeCache(tmp_path / "c").cases[0]
    mask = read_label_volume(tmp_path / "c", record) == 1
    truth = sitk.ReadImage(str(tmp_path / "STS_001_tumour.nii.gz"))
    voxels = np.argwhere(sitk.GetArrayFromImage(truth) > 0)
    assert mask.sum() * 16.0 == pytest.approx(len(voxels) * np.prod(truth.GetSpacing()), rel=0.02)
    step = np.array(truth.GetDirection()).reshape(3, 3) * np.array(truth.GetSpacing())
    there = (step @ voxels[:, ::-1].mean(0) + np.array(truth.GetOrigin()))[::-1]
    here = np.argwhere(mask).mean(0) * np.array([4.0, 2.0, 2.0]) + np.array(case.origin_mm)
    assert np.abs(here - there).max() < 0.5
