"""``pgl prepare`` as a whole: good files are cached, bad ones named, interruptions survived."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from rich.console import Console

import pgl.prepare.run
from pgl.cache.volumes import VolumeCache
from pgl.files.lock import InUse, only_writer
from pgl.prepare.run import PrepareSettings, prepare
from tests.patience import PATIENCE_S, wait_until
from tests.pgl import ct_files
from tests.pgl.ct_files import body, to_image, write, write_series

SMALL = {"spacing_mm": (3.0, 2.0, 2.0), "minimum_size": (8, 16, 16), "workers": 2}
REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


def run(sources, output, terminal: io.StringIO | None = None, **settings):
    console = Console(file=terminal or io.StringIO(), width=80)
    return prepare(sources, output, PrepareSettings(**{**SMALL, **settings}), console)


def reasons(entries) -> dict[str, str]:
    return {os.path.basename(entry.path): entry.reason for entry in entries}


def write_bad_files(folder: Path) -> dict[str, str]:
    """Every kind of unusable file; returns its name and a part of the reason that it must be given."""
    ct = to_image(body())
    good = write(folder / "good.nii.gz").read_bytes()
    (folder / "good.nii.gz").unlink()
    (folder / "truncated.nii.gz").write_bytes(good[: len(good) // 2])
    (folder / "empty.nrrd").touch()
    (folder / "renamed text.nii.gz").write_text("This is not an image.")
    (folder / "no extension").write_text("This is not an image either.")
    (folder / "link.mha").symlink_to(folder / "nowhere.mha")
    sitk.WriteImage(sitk.JoinSeries([ct, ct]), str(folder / "4d.nii.gz"))
    sitk.WriteImage(ct[:, :, 4], str(folder / "2d.mha"))
    sitk.WriteImage(sitk.Compose([ct, ct, ct]), str(folder / "rgb.nrrd"))
    write(folder / "nan.nii.gz", np.where(body() > 720, np.nan, body()).astype(np.float32))
    write(folder / "small.nii.gz", body((5, 40, 48)))
    write(folder / "crop.nii.gz", body()[:5, 18:23, 22:27])  # has no air either
    write(folder / "a_seg.nii.gz", (body() > 0).astype(np.uint8))
    write(folder / "offset.nrrd", (body() + 1024).astype(np.uint16))
    write(folder / "thick.nrrd", spacing_xyz=(2.0, 2.0, 50.0))
    write_series(folder / "tilted", tilt_degrees=15)
    write_series(folder / "gap")[6].unlink()
    write_series(folder / "mr", modality="MR")
    write_series(folder / "broken")
    for path in (folder / "broken").iterdir():
        path.write_bytes(path.read_bytes()[:300])
    return {
        "truncated.nii.gz": "truncated: the compressed data end early",
        "empty.nrrd": "empty file (0 bytes)",
        "renamed text.nii.gz": "not a NIfTI file",
        "no extension": "in no format that is read by its name",
        "link.mha": "a link to nothing",
        "4d.nii.gz": "4D image",
        "2d.mha": "2D image",
        "rgb.nrrd": "3 values per voxel",
        "nan.nii.gz": "NaN or infinite",
        "small.nii.gz": "too small: 5x40x48 voxels",
        "crop.nii.gz": "too small: 5x5x5 voxels",
        "a_seg.nii.gz": "label map",
        "offset.nrrd": "rescale intercept",
        "thick.nrrd": "spacing 2x2x50 mm",
        "tilted": "gantry tilt: the slices are shifted sideways, 15.0 degrees",
        "gap": "uneven slice spacing",
        "mr": "modality 'MR'",
        **{path.name: "unreadable" for path in (folder / "broken").iterdir()},
    }


def test_good_files_are_cached_and_each_bad_one_is_named_with_its_reason(tmp_path):
    source = tmp_path / "Daten März (1)"
    bad = write_bad_files(source / "bad")
    write(source / "Müller, Jörg [bold].nii.gz", body(seed=1))
    write(source / "deep" / "er" / "b.mhd", body(seed=2))
    write(source / "evil\x1b[2J\nname.nrrd", body(seed=3))
    write(tmp_path / "plain.mha", body(seed=4)).rename(source / os.fsdecode(b"caf\xe9.mha"))
    write_series(source / "deep" / "series", body(seed=5), suffix="")
    (source / "notes.txt").write_text("?")
    (source / "bad" / "evil\x1b[2J\n.nii").write_text("?")
    terminal = io.StringIO()

    report = run([source], tmp_path / "cache", terminal)

    assert report.exit_code == 1
    rejected = reasons(report.rejected)
    assert rejected.pop("evil\x1b[2J\n.nii").startswith("not a NIfTI file")
    assert set(rejected) == set(bad)
    assert [name for name, part in bad.items() if part not in rejected[name]] == []
    assert sorted(reasons(report.accepted)) == [
        "Müller, Jörg [bold].nii.gz",
        "b.mhd",
        "caf\udce9.mha",
        "evil\x1b[2J\nname.nrrd",
        "series",
    ]
    assert sorted(reasons(report.ignored)) == ["b.raw", "notes.txt"]

    on_disk = json.loads((tmp_path / "cache" / "prepare_report.json").read_text("utf-8"))
    for name in ("accepted", "rejected", "ignored"):
        assert [(e["path"], e["reason"]) for e in on_disk[name]] == [
            (e.path, e.reason) for e in getattr(report, name)
        ]

    shown = terminal.getvalue()
    assert "5 accepted" in shown.rstrip("\n").split("\n")[-1]  # nothing comes after the summary
    assert all(name in shown for name in bad)
    assert "\x1b[2J" not in shown
    assert "evil\\x1b[2J\\n.nii" in shown

    cache = VolumeCache(tmp_path / "cache")
    assert cache.verify() == []
    seeds = {"Muller": 1, "deep_er_b": 2, "evil": 3, "caf": 4, "deep_series": 5}
    for index, case in enumerate(cache.cases):
        seed = next(seed for start, seed in seeds.items() if case.case_id.startswith(start))
        np.testing.assert_array_equal(cache.read_volume(index), body(seed=seed))
        assert case.origin_mm == pytest.approx((100.0, 12.5, -30.0), abs=1e-4)
        assert case.original["size_xyz"] == [48, 40, 16]
        assert case.original["spacing_xyz_mm"] == pytest.approx([2, 2, 3], abs=1e-5)
        assert case.original["direction_xyz"] == pytest.approx([1, 0, 0, 0, 1, 0, 0, 0, 1], abs=1e-5)
        assert os.path.exists(case.source)


def test_single_files_and_dicom_slices_can_be_given_as_sources(tmp_path):
    image = write(tmp_path / "in" / "a.nii.gz", body(seed=1))
    write(tmp_path / "in" / "not given.nii.gz", body(seed=2))
    slices = write_series(tmp_path / "in" / "series", body(seed=3))
    report = run([image, *slices], tmp_path / "cache")
    assert report.exit_code == 0
    assert sorted(reasons(report.accepted)) == ["a.nii.gz", "series"]
    cache = VolumeCache(tmp_path / "cache")
    np.testing.assert_array_equal(cache.read_volume(1), body(seed=3))


def test_a_second_run_keeps_what_is_current_and_redoes_what_is_not(tmp_path):
    source, cache = tmp_path / "in", tmp_path / "cache"
    for seed, name in enumerate(["same", "changed", "gone", "damaged"]):
        write(source / f"{name}.nrrd", body(seed=seed))
    run([source], cache)
    old = {case.case_id.rsplit("-", 1)[0]: case for case in VolumeCache(cache).cases}
    write(source / "changed.nrrd", body(seed=10))
    (source / "gone.nrrd").unlink()
    write(source / "new.nrrd", body(seed=11))
    (cache / old["damaged"].file).write_bytes(b"bad disk")

    report = run([source], cache)

    done = {name.removesuffix(".nrrd"): reason for name, reason in reasons(report.accepted).items()}
    assert done["same"] == "unchanged since it was cached"
    assert all(done[name].startswith("cached") for name in ("changed", "damaged", "new"))
    assert (report.cases, report.removed) == (4, 1)
    opened = VolumeCache(cache)
    now = {case.case_id.rsplit("-", 1)[0]: i for i, case in enumerate(opened.cases)}
    assert set(now) == {"same", "changed", "damaged", "new"}
    np.testing.assert_array_equal(opened.read_volume(now["changed"]), body(seed=10))
    np.testing.assert_array_equal(opened.read_volume(now["damaged"]), body(seed=3))
    assert not (cache / old["gone"].file).exists()


def test_cases_of_other_sources_stay_and_a_file_gone_bad_leaves(tmp_path):
    write(tmp_path / "one" / "a.nrrd")
    write(tmp_path / "one" / "b.nrrd", body(seed=1))
    write(tmp_path / "two" / "a.nrrd", body(seed=2))
    run([tmp_path / "one"], tmp_path / "cache")
    assert run([tmp_path / "two"], tmp_path / "cache").cases == 3
    (tmp_path / "one" / "b.nrrd").write_text("overwritten")
    report = run([tmp_path / "one"], tmp_path / "cache")
    assert report.cases == 2
    assert sorted(case.source for case in VolumeCache(tmp_path / "cache").cases) == [
        str(tmp_path / "one" / "a.nrrd"),
        str(tmp_path / "two" / "a.nrrd"),
    ]


@pytest.mark.parametrize("end", [0, -1])
@pytest.mark.parametrize("damage", ["truncated", "empty", "link to nothing"])
def test_a_series_whose_first_or_last_slice_is_unreadable_is_rejected_and_leaves(tmp_path, end, damage):
    slices = write_series(tmp_path / "in" / "series", body(seed=1))
    write(tmp_path / "in" / "good.nrrd")
    assert run([tmp_path / "in"], tmp_path / "cache").cases == 2
    whole = slices[end].read_bytes()
    if damage == "link to nothing":
        slices[end].unlink()
        slices[end].symlink_to(tmp_path / "nowhere.dcm")
    else:
        slices[end].write_bytes(whole[: len(whole) // 2 if damage == "truncated" else 0])

    report = run([tmp_path / "in"], tmp_path / "cache")

    assert (report.exit_code, report.cases) == (1, 1)
    rejected = reasons(report.rejected)
    assert set(rejected) == {"series", slices[end].name}
    name = slices[end].name
    assert rejected["series"] == f"incomplete: {name}, which may be a slice of it, cannot be read"

    report = run([tmp_path / "in"], tmp_path / "cache", exclude=[name])
    assert (report.exit_code, report.cases) == (0, 2)  # told to do without it
    slices[end].unlink()
    slices[end].write_bytes(whole)
    assert run([tmp_path / "in"], tmp_path / "cache").cases == 2
    cache = VolumeCache(tmp_path / "cache")
    index = next(i for i, case in enumerate(cache.cases) if case.case_id.startswith("series"))
    np.testing.assert_array_equal(cache.read_volume(index), body(seed=1))


def test_of_many_unreadable_slices_the_first_few_are_named(tmp_path):
    slices = write_series(tmp_path / "in" / "series")
    for path in slices[:7]:
        path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="no usable CT"):
        run([tmp_path / "in"], tmp_path / "cache")
    rejected = json.loads((tmp_path / "cache" / "prepare_report.json").read_text("utf-8"))["rejected"]
    [reason] = [entry["reason"] for entry in rejected if entry["path"].endswith("series")]
    names = sorted(path.name for path in slices[:7])
    assert reason == (
        "incomplete: 7 files that may be slices of it cannot be read: " + ", ".join(names[:5]) + " and 2 more"
    )


def test_include_and_exclude_keep_masks_out(tmp_path):
    write(tmp_path / "in" / "p1_ct.nii.gz")
    write(tmp_path / "in" / "p1_tumour.nii.gz", (body() > 0).astype(np.uint8))
    for settings in ({"include": "*_ct.nii.gz"}, {"exclude": ["*_tumour.nii.gz"]}):
        report = run([tmp_path / "in"], tmp_path / "cache", **settings)
        assert report.exit_code == 0
        assert list(reasons(report.accepted)) == ["p1_ct.nii.gz"]
        assert list(reasons(report.ignored)) == ["p1_tumour.nii.gz"]


def start_slow_run(source: Path, cache: Path) -> subprocess.Popen:
    code = (
        "import signal, sys, pgl.prepare.run\n"
        # A shell's background job and what it starts ignore Ctrl-C.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tests.pgl.ct_files import slow_prepare_case\n"
        "pgl.prepare.run.prepare_case = slow_prepare_case\n"
        "settings = pgl.prepare.run.PrepareSettings((3.0, 2.0, 2.0), (8, 16, 16), workers=1)\n"
        "pgl.prepare.run.prepare([sys.argv[1]], sys.argv[2], settings)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(source), str(cache)],
        env=environment,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_is_continued_by_the_next(tmp_path, end):
    source, cache = tmp_path / "in", tmp_path / "cache"
    for seed in range(6):
        write(source / f"{seed}.nrrd", body(seed=seed))
    process = start_slow_run(source, cache)
    wait_until(lambda: len(list((cache / "cases").glob("[!.]*.json"))) >= 2, process)
    process.send_signal(end)
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode != 0
    assert end != signal.SIGINT or "run the same command again to go on" in said
    finished = {path.stem for path in (cache / "cases").glob("[!.]*.json")}
    assert 2 <= len(finished) < 6
    (cache / "cases" / ".partial-00-x.b2nd").write_bytes(b"as if killed while writing")

    report = run([source], cache)

    kept = {entry.case_id for entry in report.accepted if entry.reason.startswith("unchanged")}
    assert finished <= kept
    assert report.cases == 6
    assert not list((cache / "cases").glob(".partial*"))
    opened = VolumeCache(cache)
    assert opened.verify() == []
    for index, case in enumerate(opened.cases):
        np.testing.assert_array_equal(opened.read_volume(index), body(seed=int(case.case_id[0])))


def test_a_file_that_crashes_the_reader_costs_only_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(pgl.prepare.run, "prepare_case", ct_files.crashing_prepare_case)
    for name in ("a", "crash", "c"):
        write(tmp_path / "in" / f"{name}.nrrd")
    report = run([tmp_path / "in"], tmp_path / "cache", workers=1)
    assert list(reasons(report.accepted)) == ["a.nrrd", "c.nrrd"]
    assert reasons(report.rejected)["crash.nrrd"].startswith(
        "crashes the reader: its process died (signal 6)"
    )


def test_a_full_disk_stops_the_run_and_blames_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(pgl.prepare.run, "prepare_case", ct_files.failing_prepare_case)
    write(tmp_path / "in" / "a.nrrd")
    with pytest.raises(RuntimeError, match=r"could not write a-.* No space left.*\(disk full\? .* GiB free"):
        run([tmp_path / "in"], tmp_path / "cache")


def test_one_and_two_workers_write_the_same_files(tmp_path, monkeypatch):
    monkeypatch.setattr("pgl.processes.workers.usable_cores", lambda: 8)
    for seed in range(3):
        write(tmp_path / "in" / f"{seed}.nrrd", body((33, 200, 260), seed))
    checksums = []
    for workers in (1, 2):
        run([tmp_path / "in"], tmp_path / f"cache{workers}", workers=workers)
        checksums.append([case.sha256 for case in VolumeCache(tmp_path / f"cache{workers}").cases])
    assert len(set(checksums[0])) == 3
    assert checksums[0] == checksums[1]


def test_a_cache_whose_manifest_is_damaged_is_mended_by_the_next_run(tmp_path):
    for seed in range(2):
        write(tmp_path / "in" / f"{seed}.nrrd", body(seed=seed))
    run([tmp_path / "in"], tmp_path / "cache")
    manifest = tmp_path / "cache" / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(whole[: len(whole) // 2])
    terminal = io.StringIO()
    report = run([tmp_path / "in"], tmp_path / "cache", terminal)
    assert "manifest.json was damaged or missing; made anew from 2 finished cases" in terminal.getvalue()
    assert {entry.reason for entry in report.accepted} == {"unchanged since it was cached"}
    assert manifest.read_text() == whole


def test_wrong_arguments_are_explained(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.nii").write_text("?")
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        run([tmp_path / "nowhere"], tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match=r"is no cache; give another output folder"):
        run([tmp_path / "in"], tmp_path / "in")
    assert sorted(os.listdir(tmp_path / "in")) == ["x.nii"]
    with pytest.raises(
        ValueError, match=r"no usable CT in .*: 1 rejected, 0 ignored; the reasons are in .*report"
    ):
        run([tmp_path / "in"], tmp_path / "cache")
    with pytest.raises(ValueError, match=r"holds a cache of spacing \(3.0, 2.0, 2.0\)"):
        run([tmp_path / "in"], tmp_path / "cache", spacing_mm=(1.0, 1.0, 1.0))
    for settings, name in (
        ({"spacing_mm": (1, 0, 1)}, "spacing_mm"),
        ({"minimum_size": (1, 1)}, "minimum_size"),
        ({"workers": -1}, "workers"),
        ({"slice_tolerance": 0.9}, "slice_tolerance"),
        ({"maximum_voxels": 0}, "maximum_voxels"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must"):
            PrepareSettings(**settings)


def test_two_runs_on_one_cache_do_not_mix(tmp_path):
    write(tmp_path / "in" / "a.nrrd")
    (tmp_path / "cache").mkdir()
    with (
        only_writer(tmp_path / "cache"),
        pytest.raises(InUse, match=r"is writing to .*cache: wait until it has ended"),
    ):
        run([tmp_path / "in"], tmp_path / "cache")
    assert run([tmp_path / "in"], tmp_path / "cache").exit_code == 0


# --- real CT -----------------------------------------------------------------------------------------------

EXPECTED_HARD = {
    "cip_chest64_rotated20deg_seg.nrrd": "label map",
    "dcm_head_tilt_variable_spacing": "gantry tilt: the slices are shifted sideways, 18.5 degrees",
    "derived_4d_ts_crop3mm.nii.gz": "4D image of 122x101x30x2 voxels",
    "niivue_head_oblique_uint8.nii.gz": "8-bit picture",
    "ts_pulm_crop_heart_othergrid_seg.nii.gz": "label map",
}
EXPECTED_ORGANS = {
    "cip_chest64_seg.nrrd": "label map",
    "ts_crop3mm_seg.nii.gz": "label map",
    "ts_dicom20": "too small: 13x500x500",
    "ts_dicom20_seg.nii.gz": "too small: 13x500x500",  # the size is looked at first
    "ts_trunk3mm_seg.nii.gz": "label map",
}


@pytest.mark.parametrize(
    ("folder", "rejected", "accepted"),
    [
        ("hard", EXPECTED_HARD, ["cip_chest64_rotated20deg"]),
        (
            "organs",
            EXPECTED_ORGANS,
            ["cip_chest64", "crlm_1004_abdomen", "elastix_lung_baseline_small", "ts_crop3mm", "ts_trunk3mm"],
        ),
    ],
)
def test_real_ct_is_accepted_and_real_traps_are_rejected(tmp_path, folder, rejected, accepted):
    if not (REAL / folder).is_dir():
        pytest.skip(f"real CT not found at {REAL / folder}")
    report = run([REAL / folder], tmp_path / "cache", spacing_mm=(3.0, 1.0, 1.0), minimum_size=(16, 48, 48))
    found = reasons(report.rejected)
    assert set(found) == set(rejected)
    assert [name for name, part in rejected.items() if part not in found[name]] == []
    if folder == "hard":
        assert "uneven slice spacing" in found["dcm_head_tilt_variable_spacing"]
    cache = VolumeCache(tmp_path / "cache")
    assert [case.case_id.rsplit("-", 1)[0] for case in cache.cases] == accepted
    for index, case in enumerate(cache.cases):
        volume = cache.read_volume(index)
        assert volume.shape == case.shape
        assert np.abs(np.median(volume[volume > -300])) < 150


def test_a_real_dicom_series_is_read_where_its_label_map_lies(tmp_path):
    if not (REAL / "organs").is_dir():
        pytest.skip(f"real CT not found at {REAL / 'organs'}")
    run([REAL / "organs" / "ts_dicom20"], tmp_path / "cache", minimum_size=(8, 48, 48))
    cache = VolumeCache(tmp_path / "cache")
    [case] = cache.cases
    # The label file is stored flipped in y; brought onto the cached grid by its geometry it must fit the CT.
    seg = sitk.ReadImage(str(REAL / "organs" / "ts_dicom20_seg.nii.gz"))
    grid = sitk.Image([int(n) for n in case.shape[::-1]], sitk.sitkInt16)
    grid.SetOrigin(case.origin_mm[::-1])
    grid.SetSpacing(case.spacing_mm[::-1])
    labels = sitk.GetArrayFromImage(sitk.Resample(seg, grid, sitk.Transform(), sitk.sitkNearestNeighbor))
    volume = cache.read_volume(0)
    assert np.count_nonzero(labels) > 10_000
    inside = volume[labels > 0]
    assert np.mean((inside > -200) & (inside < 1500)) > 0.9
    assert np.mean(volume[::-1, ::-1][labels > 0] > -200) < np.mean(inside > -200)
