"""DICOM series: sorted and read by their tags; uneven or tilted stacks are rejected."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from pgl.images import (
    RejectedImage,
    SliceHeader,
    group_slices,
    order_slices,
    read_headers,
    read_series,
    unreadable_slices,
)
from tests.pgl.ct_files import LIMITS, body, write_series


def headers_of(paths) -> list[SliceHeader]:
    return [SliceHeader(**entry["header"]) for entry in read_headers([os.fspath(p) for p in sorted(paths)])]


def rejection(paths) -> str:
    with pytest.raises(RejectedImage) as caught:
        read_series(headers_of(paths), LIMITS)
    return str(caught.value)


def oblique() -> np.ndarray:
    angle = np.radians(25)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    return np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]]) @ turn


@pytest.mark.parametrize("axes", [np.eye(3), np.diag([-1, -1, 1]), oblique()])
@pytest.mark.parametrize("suffix", [".dcm", "", ".IMA"])
def test_shuffled_slices_become_the_volume_at_its_place(tmp_path, axes, suffix):
    paths = write_series(tmp_path / "series", axes=axes, suffix=suffix)
    image, _ = read_series(headers_of(paths), LIMITS)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), body())
    np.testing.assert_allclose(image.GetSpacing(), (2.0, 2.0, 3.0), atol=1e-5)
    for index in ((0, 0, 0), (47, 39, 15)):
        expected = np.array([-30.0, 12.5, 100.0]) + axes @ (np.array(index) * (2.0, 2.0, 3.0))
        np.testing.assert_allclose(image.TransformIndexToPhysicalPoint(index), expected, atol=1e-3)


@pytest.mark.parametrize("missing", [1, 8, 14])
def test_a_missing_slice_is_noticed(tmp_path, missing):
    paths = write_series(tmp_path)
    paths[missing].unlink()
    reason = rejection(paths[:missing] + paths[missing + 1 :])
    assert "uneven slice spacing: gaps from 3 to 6 mm" in reason
    assert paths[missing - 1].name in reason
    assert paths[missing + 1].name in reason


def test_spacing_that_changes_within_the_stack_is_noticed(tmp_path):
    lower = write_series(tmp_path / "a", body()[:8])
    upper = write_series(tmp_path / "a2", body()[8:], (2, 2, 3.6), (-30.0, 12.5, 100.0 + 7 * 3 + 3.6))
    for path in upper:
        path.rename(tmp_path / "a" / f"upper{path.name}")
    assert "uneven slice spacing" in rejection(list((tmp_path / "a").iterdir()))
    assert lower


def test_positions_rounded_to_a_tenth_of_a_millimetre_are_even(tmp_path):
    headers = headers_of(write_series(tmp_path, spacing_xyz=(0.7, 0.7, 0.625)))
    rounded = [
        SliceHeader(**{**vars(h), "position_mm": tuple(round(p, 1) for p in h.position_mm)}) for h in headers
    ]
    _, spacing = order_slices(rounded, tolerance=0.1)
    assert spacing == pytest.approx(0.625, abs=0.01)


def test_a_repeated_slice_is_noticed(tmp_path):
    paths = write_series(tmp_path)
    copy = tmp_path / "copy.dcm"
    copy.write_bytes(paths[5].read_bytes())
    reason = rejection([*paths, copy])
    assert reason.startswith("two slices at one place")
    assert "copy.dcm" in reason


@pytest.mark.parametrize("degrees", [1.0, -18.5])
def test_gantry_tilt_is_noticed_and_measured(tmp_path, degrees):
    reason = rejection(write_series(tmp_path, body((40, 40, 48)), tilt_degrees=degrees))
    assert f"gantry tilt: the slices are shifted sideways, {abs(degrees):.1f} degrees" in reason


def test_other_modalities_single_slices_and_missing_positions_are_rejected(tmp_path):
    assert rejection(write_series(tmp_path / "mr", modality="MR")) == "DICOM modality 'MR', not CT"
    assert rejection(write_series(tmp_path / "one", body((1, 40, 48)))).startswith(
        "2D image: a single DICOM slice"
    )
    unplaced = write_series(tmp_path / "unplaced", drop_tag="0020|0032")
    headers = [SliceHeader(**{**vars(h), "position_mm": None}) for h in headers_of(unplaced)]
    with pytest.raises(RejectedImage, match="no ImagePositionPatient"):
        order_slices(headers, 0.1)


PIXEL_SPACING = b"\x28\x00\x30\x00"  # tag (0028,0030), written without a VR


def hide_pixel_spacing(path: Path, imager: bytes = b"") -> None:
    """Take PixelSpacing out of a slice, and give it an ImagerPixelSpacing."""
    content = path.read_bytes()
    at = content.index(PIXEL_SPACING)
    length = int.from_bytes(content[at + 4 : at + 8], "little")
    content = content[:at] + content[at + 8 + length :]
    group_20 = content.index(b"\x20\x00\x0d\x00")
    element = b"\x18\x00\x64\x11" + len(imager).to_bytes(4, "little") + imager if imager else b""
    path.write_bytes(content[:group_20] + element + content[group_20:])


@pytest.mark.parametrize("lacking_it", [[0], [7], [15], range(16)])
def test_a_series_with_a_slice_without_pixel_spacing_is_rejected_whole(tmp_path, lacking_it):
    paths = write_series(tmp_path, spacing_xyz=(1.0, 1.0, 3.0))
    for index in lacking_it:
        hide_pixel_spacing(paths[index])
    [stack] = group_slices(headers_of(paths))
    assert len(stack) == 16
    with pytest.raises(RejectedImage, match=r"^no PixelSpacing in IM\d+\.dcm"):
        read_series(stack, LIMITS)


def test_pixel_spacing_is_that_of_rows_first_and_else_the_imagers(tmp_path):
    paths = write_series(tmp_path, spacing_xyz=(0.75, 1.5, 3.0))
    for path in paths:
        hide_pixel_spacing(path, imager=b"1.5\\0.75")
    image, _ = read_series(headers_of(paths), LIMITS)
    np.testing.assert_allclose(image.GetSpacing(), (0.75, 1.5, 3.0), atol=1e-5)
    paths = write_series(tmp_path / "plain", spacing_xyz=(0.75, 1.5, 3.0))
    image, _ = read_series(headers_of(paths), LIMITS)
    np.testing.assert_allclose(image.GetSpacing(), (0.75, 1.5, 3.0), atol=1e-5)


def test_series_and_scouts_in_one_folder_are_told_apart(tmp_path):
    first = write_series(tmp_path / "mixed", series=1)
    moved = []
    for series, array, axes in ((2, body(seed=2), np.eye(3)), (1, body((1, 60, 60)), oblique())):
        for path in write_series(tmp_path / f"s{series}{len(array)}", array, axes=axes, series=series):
            moved.append(path.rename(tmp_path / "mixed" / f"{series}{len(array)}{path.name}"))
    stacks = group_slices(headers_of([*first, *moved]))
    assert sorted(len(stack) for stack in stacks) == [1, 16, 16]
    volumes = [read_series(stack, LIMITS)[0] for stack in stacks if len(stack) > 1]
    arrays = [sitk.GetArrayFromImage(volume) for volume in volumes]
    assert any(np.array_equal(a, body()) for a in arrays)
    assert any(np.array_equal(a, body(seed=2)) for a in arrays)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_truncated_slice_is_rejected_by_name(tmp_path, part):
    path = write_series(tmp_path)[3]
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    [entry] = read_headers([str(path)])
    assert entry["rejected"].startswith("unreadable")


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def lacking(folder: Path) -> list[tuple[str, ...]]:
    """What each stack of the folder lacks."""
    entries = read_headers([os.fspath(path) for path in sorted(folder.iterdir())])
    stacks = group_slices([SliceHeader(**entry["header"]) for entry in entries if "header" in entry])
    return unreadable_slices(stacks, [entry["path"] for entry in entries if "header" not in entry])


@pytest.mark.parametrize("suffix", [".dcm", "", ".IMA"])
@pytest.mark.parametrize("length", [0, 100, 300, 3000])  # nothing, no magic, no series UID, no end of pixels
def test_an_unreadable_slice_is_missed_by_its_series(tmp_path, suffix, length):
    paths = write_series(tmp_path, suffix=suffix)
    assert lacking(tmp_path) == [()]
    cut(paths[0], length)
    cut(paths[9], length)
    assert lacking(tmp_path) == [tuple(sorted([paths[0].name, paths[9].name]))]


@pytest.mark.parametrize("explicit", [False, True])
def test_a_truncated_slice_is_missed_by_its_own_series_and_not_by_the_other_in_its_folder(tmp_path, explicit):
    first = write_series(tmp_path, series=1)
    for path in write_series(tmp_path / "second", body(seed=2), series=2):
        path.rename(tmp_path / f"second {path.name}")
    (tmp_path / "second").rmdir()
    cut(first[0], 3000)
    if explicit:  # two bytes of VR and two of length, in place of four of length
        content = first[0].read_bytes()
        for tag in (b"\x20\x00\x0d\x00", b"\x20\x00\x0e\x00"):
            at = content.index(tag) + 4
            content = content[:at] + b"UI" + content[at : at + 2] + content[at + 4 :]
        first[0].write_bytes(content)
    assert lacking(tmp_path) == [(first[0].name,), ()]
    cut(first[0], 300)  # now nothing says which series it is of
    assert lacking(tmp_path) == [(first[0].name,), (first[0].name,)]


def test_a_series_named_in_a_nested_item_is_not_taken_for_the_slices_own(tmp_path):
    paths = write_series(tmp_path)
    whole = paths[0].read_bytes()
    other = b"1.2.3.4\0"
    nested = b"\x20\x00\x0e\x00UI" + len(other).to_bytes(2, "little") + other
    start = whole.index(b"\x08\x00\x60\x00\x02\x00")  # the modality
    paths[0].write_bytes(whole[:start] + nested + whole[start:3000])
    assert lacking(tmp_path) == [(paths[0].name,)]


def test_other_unreadable_files_beside_a_series_are_not_taken_for_slices(tmp_path):
    write_series(tmp_path / "series", suffix="")
    (tmp_path / "series" / "NOTES").write_text("no slice")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "IM000.dcm").write_text("of another folder")
    assert lacking(tmp_path / "series") == [()]
    [stack] = group_slices(headers_of(p for p in (tmp_path / "series").iterdir() if p.name != "NOTES"))
    assert unreadable_slices([stack], [str(tmp_path / "other" / "IM000.dcm")]) == [()]


def test_a_file_that_may_not_be_read_is_rejected_with_the_systems_reason(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("pgl.images.dicom._file_meta", refuse)
    [entry] = read_headers([str(write_series(tmp_path)[0])])
    assert entry["rejected"] == "unreadable: Permission denied"


def test_a_slice_that_breaks_after_its_header_was_read_is_named(tmp_path):
    paths = write_series(tmp_path)
    headers = headers_of(paths)
    paths[3].write_bytes(paths[3].read_bytes()[:2000])
    with pytest.raises(RejectedImage, match=f"slice {paths[3].name} is unreadable"):
        read_series(headers, LIMITS)


def test_other_dicom_objects_are_ignored_and_other_files_are_not_dicom(tmp_path):
    meta = bytes(128) + b"DICM" + b"\x02\x00\x02\x00UI" + (30).to_bytes(2, "little")
    (tmp_path / "rt").write_bytes(meta + b"1.2.840.10008.5.1.4.1.1.481.3\0" + bytes(50))
    (tmp_path / "DATA").write_bytes(b"something else" * 100)
    rt, other = read_headers([str(tmp_path / "rt"), str(tmp_path / "DATA")])
    assert rt["ignored"] == "DICOM radiotherapy object"
    assert "not_dicom" in other
