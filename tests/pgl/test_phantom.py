"""The phantom: anatomy in its place, plausible Hounsfield units, files that survive an interruption."""

from __future__ import annotations

import json
import math
import os

import numpy as np
import pytest

sitk = pytest.importorskip("SimpleITK")

from pgl.files.atomic import PARTIAL_PREFIX  # noqa: E402
from pgl.phantom import LABELS, Patient, draw_phantom, make_phantoms, rendering, writing  # noqa: E402
from pgl.phantom.canvas import coverage  # noqa: E402
from pgl.phantom.levelsets import ellipsoid, smooth_max, smooth_min  # noqa: E402
from pgl.phantom.noise import spline_noise  # noqa: E402
from pgl.phantom.patient import PHASES  # noqa: E402
from tests.pgl.full_disk import files_of_at_most  # noqa: E402

COARSE = (24, 64, 80)
TINY = (16, 40, 48)
ORGANS = [name for name in LABELS if name not in ("background", "liver_lesion", "kidney_tumour")]


@pytest.fixture(scope="module")
def cohort():
    return [draw_phantom(0, case, COARSE) for case in range(8)]


def voxel_ml(phantom):
    return math.prod(phantom.grid.spacing_mm) / 1000


def volume_ml(phantom, *names):
    return sum((phantom.labels == LABELS[name]).sum() for name in names) * voxel_ml(phantom)


def read(path):
    image = sitk.ReadImage(str(path))
    return image, sitk.GetArrayFromImage(image)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Reproducible


def test_same_seed_and_case_give_the_same_voxels():
    first, again = draw_phantom(3, 2, TINY), draw_phantom(3, 2, TINY)
    assert np.array_equal(first.hu, again.hu)
    assert np.array_equal(first.labels, again.labels)
    assert first.grid == again.grid


def test_a_case_does_not_depend_on_how_many_are_asked_for(tmp_path):
    make_phantoms(tmp_path / "one", cases=1, seed=5, size=TINY)
    make_phantoms(tmp_path / "three", cases=3, seed=5, size=TINY)
    for part in ("images", "labels"):
        name = f"{part}/phantom_000.nii.gz"
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()


def test_cases_and_seeds_differ_in_body_and_not_only_in_noise():
    one, other_case, other_seed = (draw_phantom(*key, TINY) for key in ((1, 0), (1, 1), (2, 0)))
    for other in (other_case, other_seed):
        overlap = (one.labels > 0) & (one.labels == other.labels)
        assert overlap.sum() < 0.9 * (one.labels > 0).sum()
        assert one.patient.scale != other.patient.scale


def test_the_grid_only_samples_the_same_anatomy():
    coarse, fine = draw_phantom(0, 4, COARSE), draw_phantom(0, 4, (48, 96, 120))
    for name in ORGANS:
        assert volume_ml(coarse, name) == pytest.approx(volume_ml(fine, name), rel=0.15), name


def test_noise_fields_have_unit_variance_and_depend_on_millimetres_alone():
    axes = tuple(np.arange(0, 300, 4.0) for _ in range(3))
    field = spline_noise(np.random.default_rng(0), axes, 12.0)
    assert field.std() == pytest.approx(1, abs=0.05)
    half = spline_noise(np.random.default_rng(0), tuple(axis[::2] for axis in axes), 12.0)
    assert np.allclose(field[::2, ::2, ::2], half, atol=1e-6)


# Anatomy


def test_every_organ_is_there_with_a_plausible_volume(cohort):
    plausible_ml = {
        "liver": (800, 2600),
        "spleen": (60, 400),
        "kidney_right": (70, 300),
        "kidney_left": (70, 300),
        "aorta": (25, 160),
        "spine": (200, 700),
    }
    for phantom in cohort:
        for name, (low, high) in plausible_ml.items():
            assert low < volume_ml(phantom, name) < high, (phantom.patient.case, name)


def test_left_and_right_front_and_back_are_right_in_patient_coordinates(tmp_path):
    paths = make_phantoms(tmp_path, cases=2, seed=11, size=COARSE)
    for path in paths:
        image, _ = read(tmp_path / "labels" / path.name)
        assert np.allclose(image.GetDirection(), np.eye(3).ravel())
        statistics = sitk.LabelShapeStatisticsImageFilter()
        statistics.Execute(image)
        x, y, z = ({name: statistics.GetCentroid(LABELS[name])[axis] for name in ORGANS} for axis in range(3))
        # LPS: x grows to the patient's left, y to the back, z to the head.
        assert x["liver"] < x["spine"] < x["spleen"]
        assert x["kidney_right"] < x["spine"] < x["kidney_left"]
        assert y["liver"] < y["spine"] and y["aorta"] < y["spine"] and y["aorta"] < y["kidney_left"]
        assert z["kidney_right"] < z["liver"] and z["kidney_left"] < z["spleen"]
        # The aorta runs left of the midline.
        assert x["spine"] < x["aorta"] < x["kidney_left"]


def test_lesions_and_tumours_appear_in_some_cases_and_only_where_the_patient_has_them(cohort):
    for label, has in (
        ("liver_lesion", lambda patient: patient.liver_lesions > 0),
        ("kidney_tumour", lambda patient: patient.kidney_tumour_side != 0),
    ):
        drawn = [volume_ml(phantom, label) > 0.5 for phantom in cohort]
        assert drawn == [has(phantom.patient) for phantom in cohort]
        assert 0 < sum(drawn) < len(cohort)


def test_findings_and_phases_are_spread_over_a_large_cohort():
    patients = [Patient(7, case) for case in range(300)]
    assert 0.4 < np.mean([patient.liver_lesions > 0 for patient in patients]) < 0.6
    sides = [patient.kidney_tumour_side for patient in patients]
    assert {-1, 0, 1} == set(sides)
    assert 0.35 < np.mean(np.array(sides) != 0) < 0.55
    assert {patient.phase for patient in patients} == {"native", "arterial", "portal venous"}
    assert max(p.fat_mm for p in patients) > 2.5 * min(p.fat_mm for p in patients)


# Hounsfield units


def test_each_label_lies_in_its_band_of_hounsfield_units(cohort):
    bands = {
        "native": {"liver": (15, 70), "spleen": (20, 60), "aorta": (10, 60), "kidney_left": (0, 45)},
        "arterial": {"liver": (30, 90), "spleen": (70, 140), "aorta": (220, 360), "kidney_left": (90, 190)},
        "portal venous": {
            "liver": (65, 130),
            "spleen": (80, 150),
            "aorta": (105, 185),
            "kidney_left": (110, 215),
        },
    }
    seen = set()
    for phantom in cohort:
        phase = phantom.patient.phase
        seen.add(phase)
        for name, (low, high) in {**bands[phase], "spine": (130, 400)}.items():
            median = np.median(phantom.hu[phantom.labels == LABELS[name]])
            assert low < median < high, (phantom.patient.case, phase, name)
    assert seen == set(bands)


def test_a_lesion_is_darker_than_the_liver_around_it(cohort):
    for phantom in cohort:
        lesion = phantom.labels == LABELS["liver_lesion"]
        # In the arterial phase the rim is brighter than the liver, and a coarse voxel sees mostly rim.
        if lesion.sum() > 20 and phantom.patient.phase != "arterial":
            liver = phantom.labels == LABELS["liver"]
            assert np.median(phantom.hu[lesion]) < np.median(phantom.hu[liver]) - 4


def test_air_surrounds_a_body_of_fat_muscle_lung_and_bone(cohort):
    for phantom in cohort:
        hu = phantom.hu
        assert hu.dtype == np.int16 and hu.min() >= -1024 and hu.max() <= 3071
        assert np.median(hu[:, :4, :4]) < -950
        middle = hu[:, 8:-8, 8:-8]
        for low, high, least in ((-130, -70, 0.08), (20, 90, 0.08), (-930, -700, 0.01), (250, 1500, 0.001)):
            assert ((middle > low) & (middle < high)).mean() > least, (phantom.patient.case, low, high)


def test_noise_is_grainy_in_the_slice_and_independent_between_slices(monkeypatch):
    size, spacing = (16, 96, 96), (4.0, 1.7, 1.7)
    noisy = draw_phantom(0, 0, size, spacing).hu.astype(float)
    monkeypatch.setattr(rendering, "add_noise", lambda *arguments: None)
    noise = noisy - draw_phantom(0, 0, size, spacing).hu
    centre = noise[:, 24:72, 24:72]
    assert 4 < centre.std() < 40
    power = (np.abs(np.fft.fft2(noise)) ** 2).mean(axis=0)
    frequency = np.hypot(*np.meshgrid(*[np.fft.fftfreq(96, 1.7)] * 2))
    low = power[(frequency > 0.005) & (frequency < 0.04)].mean()
    peak = power[(frequency > 0.12) & (frequency < 0.22)].mean()
    assert peak > 2 * low
    assert abs(np.corrcoef(centre[:-1].ravel(), centre[1:].ravel())[0, 1]) < 0.1


# Partial volume


def test_coverage_gives_a_ball_its_volume_on_an_anisotropic_grid():
    step = (4.0, 1.5, 1.5)
    axes = [np.arange(-40, 40, s, dtype=np.float32) + 0.3 for s in step]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    # The surface is taken as flat within a voxel, so a ball of few voxels is a little too large.
    for radius, tolerance in ((9.0, 0.06), (21.0, 0.015), (33.0, 0.006)):
        share = coverage(ellipsoid((x, y, z), (1.0, -2.0, 0.5), (radius,) * 3))
        assert share.sum() * math.prod(step) == pytest.approx(4 / 3 * math.pi * radius**3, rel=tolerance)


def test_coverage_of_a_plane_is_the_share_of_the_voxel_below_it():
    z = np.arange(8, dtype=np.float32)[:, None, None] + np.zeros((8, 4, 4), np.float32)
    share = coverage((z - 3.25) * 7.0)
    assert np.allclose(share[:, 0, 0], [1, 1, 1, 0.75, 0, 0, 0, 0])


def test_the_dome_of_the_liver_mixes_with_the_lung_above_it(monkeypatch):
    monkeypatch.setattr(rendering, "add_noise", lambda *arguments: None)
    phantom = draw_phantom(0, 0, (40, 64, 80))
    liver = phantom.labels == LABELS["liver"]
    top = liver.shape[0] - 1 - np.argmax(liver[::-1], axis=0)
    covered = liver.any(axis=0) & (top < liver.shape[0] - 3)
    rows, columns = np.nonzero(covered)
    column = phantom.hu[:, rows, columns]
    level = top[rows, columns]
    index = np.arange(len(level))
    under_lung = column[level + 3, index] < -700
    border = np.stack([column[level + k, index] for k in (0, 1, 2)])[:, under_lung]
    mixed = (border > -650) & (border < -150)
    assert under_lung.sum() > 30
    assert mixed.any(axis=0).mean() > 0.4


def test_smooth_union_and_intersection_only_round_the_seam():
    a, b = np.array([-5.0, 1.0, 9.0]), np.array([6.0, 1.0, -4.0])
    assert np.allclose(smooth_min(a, b, 4)[[0, 2]], [-5, -4])
    assert np.allclose(smooth_max(a, b, 4)[[0, 2]], [6, 9])
    assert smooth_min(a, b, 4)[1] < 1 < smooth_max(a, b, 4)[1]


# Files


def test_images_and_labels_share_one_grid_and_the_asked_one(tmp_path):
    calls = []
    paths = make_phantoms(
        tmp_path, cases=2, size=TINY, spacing_mm=(6.0, 9.0, 9.0), progress=lambda *call: calls.append(call)
    )
    assert [path.name for path in paths] == ["phantom_000.nii.gz", "phantom_001.nii.gz"]
    assert calls == [(0, 2), (1, 2), (2, 2)]
    origins = set()
    for path in paths:
        image, hu = read(path)
        labels_image, labels = read(tmp_path / "labels" / path.name)
        assert hu.shape == labels.shape == TINY
        assert image.GetSpacing() == pytest.approx((9.0, 9.0, 6.0))
        for get in ("GetSpacing", "GetOrigin", "GetDirection", "GetSize"):
            assert getattr(image, get)() == getattr(labels_image, get)()
        assert hu.dtype == np.int16 and labels.dtype == np.uint8
        origins.add(image.GetOrigin())
    assert len(origins) == 2
    assert json.loads((tmp_path / "labels.json").read_text()) == LABELS


def test_files_hold_what_was_drawn(tmp_path):
    (path,) = make_phantoms(tmp_path, cases=1, seed=4, size=TINY)
    phantom = draw_phantom(4, 0, TINY)
    image, hu = read(path)
    assert np.array_equal(hu, phantom.hu)
    assert np.array_equal(read(tmp_path / "labels" / path.name)[1], phantom.labels)
    assert image.GetOrigin()[::-1] == pytest.approx(phantom.grid.origin_mm, abs=1e-3)


def test_by_default_the_field_of_view_holds_the_body_in_anisotropic_voxels():
    for case in range(20):
        grid = rendering.plan_grid(Patient(0, case))
        assert grid.size[1:] == (192, 224) and 46 <= grid.size[0] <= 105
        assert grid.spacing_mm[0] >= 3 and 1.4 < grid.spacing_mm[1] == grid.spacing_mm[2] < 2.3
    assert len({rendering.plan_grid(Patient(0, case)).spacing_mm for case in range(20)}) > 10


def test_a_spacing_alone_chooses_the_size_that_holds_the_body():
    grid = rendering.plan_grid(Patient(0, 0), spacing_mm=(5.0, 3.0, 3.0))
    default = rendering.plan_grid(Patient(0, 0))
    for axis in range(3):
        extent = default.size[axis] * default.spacing_mm[axis]
        assert grid.size[axis] * grid.spacing_mm[axis] == pytest.approx(extent, abs=5)


def test_a_second_run_leaves_complete_cases_alone_and_redraws_what_is_missing(tmp_path):
    make_phantoms(tmp_path, cases=2, size=TINY)
    before = contents(tmp_path)
    kept, lost = tmp_path / "images" / "phantom_000.nii.gz", tmp_path / "labels" / "phantom_001.nii.gz"
    written = kept.stat().st_mtime_ns
    lost.unlink()
    make_phantoms(tmp_path, cases=2, size=TINY)
    assert contents(tmp_path) == before
    assert kept.stat().st_mtime_ns == written


def test_an_interrupted_run_leaves_only_whole_files_and_can_be_finished(tmp_path, monkeypatch):
    whole = make_phantoms(tmp_path / "whole", cases=2, size=TINY)
    original, writes = sitk.WriteImage, []

    def interrupted(image, path, **options):
        writes.append(path)
        original(image, path, **options)
        if len(writes) == 4:
            raise KeyboardInterrupt

    folder = tmp_path / "cut"
    monkeypatch.setattr(writing.sitk, "WriteImage", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_phantoms(folder, cases=2, size=TINY)
    assert sorted(path.name for path in (folder / "images").iterdir()) == ["phantom_000.nii.gz"]
    monkeypatch.undo()
    # What a killed process leaves behind is no image and must not be taken for one.
    (folder / "images" / f"{PARTIAL_PREFIX}dead-phantom_001.nii.gz").write_bytes(b"half")
    assert [path.name for path in make_phantoms(folder, cases=2, size=TINY)] == [p.name for p in whole]
    assert contents(folder) == contents(tmp_path / "whole")
    assert not list(folder.rglob(f"{PARTIAL_PREFIX}*"))


def test_an_unreadable_file_is_replaced(tmp_path):
    (path,) = make_phantoms(tmp_path, cases=1, size=TINY)
    good = path.read_bytes()
    path.write_bytes(b"no image")
    make_phantoms(tmp_path, cases=1, size=TINY)
    assert path.read_bytes() == good


def test_a_full_disk_is_said_leaves_no_stump_and_the_cohort_can_be_finished(tmp_path):
    make_phantoms(tmp_path / "whole", cases=1, size=TINY)
    for length in (400, 20_000):
        with files_of_at_most(length), pytest.raises(OSError, match=r"phantom_000\.nii\.gz.*make room"):
            make_phantoms(tmp_path / "cut", cases=1, size=TINY)
        assert not list((tmp_path / "cut/images").glob("*"))
    make_phantoms(tmp_path / "cut", cases=1, size=TINY)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_truncated_image_whose_header_is_whole_is_replaced(tmp_path):
    (path,) = make_phantoms(tmp_path, cases=1, size=TINY)
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    make_phantoms(tmp_path, cases=1, size=TINY)
    assert path.read_bytes() == good


def test_a_folder_whose_name_is_not_utf8_is_written_and_recognised(tmp_path):
    folder = tmp_path / os.fsdecode(b"ph\xf6")
    (path,) = make_phantoms(folder, cases=1, size=TINY)
    written = path.stat().st_mtime_ns
    make_phantoms(folder, cases=1, size=TINY)
    make_phantoms(tmp_path / "plain", cases=1, size=TINY)
    assert contents(folder) == contents(tmp_path / "plain") and path.stat().st_mtime_ns == written


def test_a_folder_with_other_things_is_refused_and_left_as_it_was(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"thesis\.txt"):
        make_phantoms(tmp_path, cases=1, size=TINY)
    assert contents(tmp_path) == {"thesis.txt": b"precious"}
    with pytest.raises(FileExistsError, match="is a file"):
        make_phantoms(tmp_path / "thesis.txt", cases=1, size=TINY)


def test_phantoms_of_another_seed_are_replaced_only_on_request(tmp_path):
    make_phantoms(tmp_path, cases=2, seed=0, size=TINY)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="seed 0 there, 1 asked for"):
        make_phantoms(tmp_path, cases=1, seed=1, size=TINY)
    assert contents(tmp_path) == before
    make_phantoms(tmp_path, cases=1, seed=1, size=TINY, overwrite=True)
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["phantom_000.nii.gz"]
    assert np.array_equal(read(tmp_path / "images" / "phantom_000.nii.gz")[1], draw_phantom(1, 0, TINY).hu)


def test_a_phase_gives_the_same_people_in_that_phase_alone(tmp_path):
    mixed = [Patient(3, case) for case in range(40)]
    for phase in PHASES:
        alone = [Patient(3, case, phase) for case in range(40)]
        assert {patient.phase for patient in alone} == {phase}
        for one, other in zip(mixed, alone, strict=True):
            assert (one.scale, one.liver_lesions, one.noise_hu) == (
                other.scale,
                other.liver_lesions,
                other.noise_hu,
            )
            assert (one.hu == other.hu) == (one.phase == phase)
    case = next(patient.case for patient in mixed if patient.phase == "native")
    (*_, path) = make_phantoms(tmp_path, cases=case + 1, seed=3, size=TINY, phase="portal_venous")
    expected = draw_phantom(3, case, TINY, only_phase="portal venous")
    assert np.array_equal(read(path)[1], expected.hu)
    assert not np.array_equal(expected.hu, draw_phantom(3, case, TINY).hu)
    assert np.mean(expected.labels == draw_phantom(3, case, TINY).labels) > 0.98
    # A folder knows its phase, also one that has none in its recipe.
    with pytest.raises(FileExistsError, match="phase portal_venous there, mixed asked for"):
        make_phantoms(tmp_path, cases=1, seed=3, size=TINY)
    make_phantoms(tmp_path, cases=1, seed=3, size=TINY, overwrite=True)
    with pytest.raises(FileExistsError, match="phase mixed there, arterial asked for"):
        make_phantoms(tmp_path, cases=1, seed=3, size=TINY, phase="arterial")
    recipe = json.loads((tmp_path / "phantom.json").read_text("utf-8"))
    assert recipe.pop("phase") == "mixed"
    (tmp_path / "phantom.json").write_text(json.dumps(recipe), encoding="utf-8")
    with pytest.raises(FileExistsError, match="phase mixed there, arterial asked for"):
        make_phantoms(tmp_path, cases=1, seed=3, size=TINY, phase="arterial")
    make_phantoms(tmp_path, cases=1, seed=3, size=TINY)


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ({"phase": "venous"}, ValueError, "phase must be one of mixed, native, arterial, portal_venous, got"),
        ({"phase": None}, ValueError, "phase must be one of"),
        ({"cases": 0}, ValueError, "cases must be 1 or more, got 0"),
        ({"cases": 2.5}, TypeError, "cases must be a whole number, got 2.5"),
        ({"cases": True}, TypeError, "cases"),
        ({"seed": -1}, ValueError, "seed must be 0 or more, got -1"),
        ({"seed": "a"}, TypeError, "seed"),
        ({"size": (64, 64)}, ValueError, "size must be three numbers"),
        ({"size": 64}, TypeError, "size must be three numbers"),
        ({"size": (8, 64, 64)}, ValueError, "size must be 16 to 2048"),
        ({"size": (64, 64.5, 64)}, TypeError, "size must be a whole number, got 64.5"),
        ({"spacing_mm": (1.0, 0.0, 1.0)}, ValueError, "spacing_mm must be above 0"),
        ({"spacing_mm": (1.0, float("nan"), 1.0)}, ValueError, "spacing_mm must be above 0"),
        ({"spacing_mm": "1,1,1"}, TypeError, "spacing_mm must be three numbers"),
        ({"spacing_mm": (1.0, None, 1.0)}, TypeError, "spacing_mm must be three numbers"),
        ({"spacing_mm": (29.0, 2.0, 2.0)}, ValueError, "choose a spacing that gives 16 to 2048 voxels"),
        ({"spacing_mm": (5.0, 0.01, 2.0)}, ValueError, "choose a spacing that gives 16 to 2048 voxels"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_written(tmp_path, arguments, error, names):
    folder = tmp_path / "new"
    with pytest.raises(error, match=names):
        make_phantoms(folder, **{"cases": 1, **arguments})
    assert not folder.exists()
