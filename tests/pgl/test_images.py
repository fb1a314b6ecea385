"""Image files: whole ones are read, everything else is rejected with its reason; geometry and intensities."""

from __future__ import annotations

import gzip
import os
import struct

import numpy as np
import pytest
import SimpleITK as sitk

from pgl.images import (
    RejectedImage,
    check_intensities,
    find_files,
    read_file,
)
from tests.pgl.ct_files import LIMITS, body, to_image, write

SUFFIXES = [
    ".nii",
    ".nii.gz",
    ".nrrd",
    ".nhdr",
    ".mha",
    ".mhd",
    ".hdr",
]
DATA_FILE = {".nhdr": (".raw", ".raw.gz"), ".mhd": (".raw", ".zraw"), ".hdr": (".img", ".img")}


def read(path) -> np.ndarray:
    return sitk.GetArrayFromImage(read_file(str(path), LIMITS)[0])


def rejection(path) -> str:
    with pytest.raises(RejectedImage) as caught:
        read_file(str(path), LIMITS)
    return str(caught.value)


# --- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_whole_files_of_every_format_are_read(tmp_path, suffix, compress):
    np.testing.assert_array_equal(read(write(tmp_path / f"a{suffix}", compress=compress)), body())


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_files_of_every_format_are_rejected(tmp_path, suffix, compress):
    path = write(tmp_path / f"a{suffix}", compress=compress)
    data = path.with_suffix(DATA_FILE[suffix][compress]) if suffix in DATA_FILE else path
    content = data.read_bytes()
    for part in (0.2, 0.7, 0.999):
        data.write_bytes(content[: int(len(content) * part)])
        reason = rejection(path)
        assert any(word in reason for word in ("truncated", "unreadable", "damaged")), reason


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd"])
def test_a_flipped_byte_in_compressed_data_is_noticed(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", compress=True)
    data = path.with_suffix(DATA_FILE[suffix][1]) if suffix in DATA_FILE else path
    content = bytearray(data.read_bytes())
    content[int(len(content) * 0.7)] ^= 0xFF
    data.write_bytes(content)
    assert any(word in rejection(path) for word in ("damaged", "unreadable", "truncated"))


@pytest.mark.parametrize(
    ("suffix", "reason"),
    [
        (".gipl", "does not say where its axes point"),
        (".gipl.gz", "does not say where its axes point"),
        (".vtk", "does not say where its axes point"),
        (".tif", "nor how far slices are apart"),
        (".lsm", "nor how far slices are apart"),
        (".h5", "can have other files of this machine read"),
        (".HDF5", "can have other files of this machine read"),
        (".mnc", "can have other files of this machine read"),
        (".jp2", "in no format that is read by its name"),
        (".mrc", "in no format that is read by its name"),
        ("", "in no format that is read by its name"),
    ],
)
def test_formats_without_a_place_or_with_links_are_rejected_unopened(tmp_path, monkeypatch, suffix, reason):
    path = write(tmp_path / "a.nrrd").rename(tmp_path / f"a{suffix}")  # a reader that asked would read it
    if suffix in (".gipl", ".gipl.gz", ".vtk", ".tif", ".h5", ".mnc"):
        write(path)
    monkeypatch.setattr(sitk.ImageFileReader, "ReadImageInformation", lambda _: pytest.fail("opened"))
    assert reason in rejection(path)
    found = find_files([path])
    # Named in the report, not passed over; what is no format by its name may still be DICOM.
    assert len(found.maybe_dicom if "in no format" in reason else found.images) == 1


def test_analyze_is_rejected_since_left_could_be_right(tmp_path):
    pair = write(tmp_path / "a.hdr")
    content = bytearray(pair.read_bytes())
    content[344:348] = bytes(4)
    pair.write_bytes(content)
    assert rejection(pair).startswith("Analyze 7.5")


def test_nothing_is_printed_by_native_readers(tmp_path, capfd):
    path = write(tmp_path / "a.mha")
    path.write_bytes(path.read_bytes()[:-100])
    rejection(path)
    assert capfd.readouterr() == ("", "")


def test_an_empty_file_and_a_renamed_text_are_rejected(tmp_path):
    for suffix in SUFFIXES:
        empty, text = tmp_path / f"empty{suffix}", tmp_path / f"text{suffix}"
        empty.touch()
        text.write_text("Dear colleague, please find attached the scans of the first patient.\n" * 20)
        assert rejection(empty) == "empty file (0 bytes)"
        assert any(word in rejection(text) for word in ("unreadable", "not a NIfTI file", ".img file"))


def test_of_two_nifti_files_with_one_stem_each_gives_its_own_voxels(tmp_path):
    write(tmp_path / "a.nii", body(seed=1))
    write(tmp_path / "a.nii.gz", body(seed=2))
    np.testing.assert_array_equal(read(tmp_path / "a.nii"), body(seed=1))
    np.testing.assert_array_equal(read(tmp_path / "a.nii.gz"), body(seed=2))


@pytest.mark.parametrize(
    "name", ["Müller, März (2).nii.gz".encode(), b"caf\xe9\xff.nrrd", b"a\nb\x1b[31m.mha"]
)
def test_files_with_odd_names_are_read(tmp_path, name):
    plain = write(tmp_path / ("plain" + os.fsdecode(name[name.rindex(b".n" if b".nii" in name else b".") :])))
    odd = plain.rename(tmp_path / os.fsdecode(name))
    np.testing.assert_array_equal(read(odd), body())


def test_a_compressed_nifti_that_is_not_named_so_is_to_be_renamed(tmp_path):
    write(tmp_path / "a.nii.gz").rename(tmp_path / "a.nii")
    assert rejection(tmp_path / "a.nii") == "a.nii is gzip-compressed but not named so; rename it to a.nii.gz"
    pair = write(tmp_path / "b.hdr")
    voxels = tmp_path / "b.img"
    voxels.write_bytes(gzip.compress(voxels.read_bytes()))
    assert rejection(pair) == "b.img is gzip-compressed but not named so; rename it to b.img.gz"


def test_images_that_are_not_3d_scalar_are_rejected(tmp_path):
    ct = to_image(body())
    sitk.WriteImage(sitk.JoinSeries([ct, ct]), str(tmp_path / "four.nii.gz"))
    sitk.WriteImage(ct[:, :, 3], str(tmp_path / "two.nii.gz"))
    sitk.WriteImage(ct[:, :, 3:4], str(tmp_path / "slice.nrrd"))
    sitk.WriteImage(sitk.Compose([ct, ct, ct]), str(tmp_path / "rgb.mha"))
    assert rejection(tmp_path / "four.nii.gz").startswith("4D image of 48x40x16x2 voxels")
    assert rejection(tmp_path / "two.nii.gz").startswith("2D image of 48x40 voxels")
    assert rejection(tmp_path / "slice.nrrd").startswith("2D image of 48x40x1 voxels")
    assert rejection(tmp_path / "rgb.mha").startswith("3 values per voxel")


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_a_fourth_dimension_of_one_is_a_volume(tmp_path, suffix):
    sitk.WriteImage(sitk.JoinSeries([to_image(body())]), str(tmp_path / f"a{suffix}"))
    image, _ = read_file(str(tmp_path / f"a{suffix}"), LIMITS)
    assert image.GetDimension() == 3
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), body())


def nifti_by_hand(array: np.ndarray, order: str) -> bytes:
    """A NIfTI-1 file from the format's definition: header fields at their offsets, then the voxels."""
    header = bytearray(352)
    fields = {
        0: ("i", 348),
        40: ("8h", 3, *array.shape[::-1], 1, 1, 1, 1),
        70: ("2h", 4, 16),
        108: ("f", 352),
    }
    fields |= {76: ("8f", 1, 2, 2, 3, 0, 0, 0, 0), 123: ("b", 2), 252: ("2h", 0, 1), 344: ("4s", b"n+1\0")}
    fields |= {280: ("4f", 2, 0, 0, 0), 296: ("4f", 0, 2, 0, 0), 312: ("4f", 0, 0, 3, 0)}
    for offset, (form, *values) in fields.items():
        struct.pack_into(order + form, header, offset, *values)
    return bytes(header) + array.astype(f"{order}i2").tobytes()


@pytest.mark.parametrize("order", ["<", ">"])
def test_nifti_of_either_byte_order_is_read_if_whole(tmp_path, order):
    content = nifti_by_hand(body(), order)
    path = tmp_path / "a.nii"
    path.write_bytes(content)
    np.testing.assert_array_equal(read(path), body())
    path.write_bytes(content[:-1])
    assert rejection(path).startswith("truncated: 48x40x16 voxels need")
    path.write_bytes(struct.pack(f"{order}i", 540) + bytes(600))
    assert rejection(path).startswith("NIfTI-2")


def test_a_nifti_header_with_a_broken_spacing_is_not_mended_in_silence(tmp_path):
    path = write(tmp_path / "a.nii")
    header = bytearray(path.read_bytes())
    for value in (0.0, -2.0, float("nan"), float("inf")):
        header[84:88] = struct.pack("<f", value)
        path.write_bytes(header)
        assert "spacing" in rejection(path)
    header[84:88] = struct.pack("<f", 1e-12)
    header[254:256] = bytes(2)  # no sform, which would tell another
    path.write_bytes(header)
    assert "is not between 0.05 and 20 mm" in rejection(path)


def test_sheared_axes_are_rejected(tmp_path):
    content = (
        "NRRD0005\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 30 30 30\n"
        "space directions: (2,0,0) (0,2,0) (0,0.4,3)\nspace origin: (0,0,0)\nencoding: raw\n"
        "endian: little\n\n"
    ).encode("ascii") + bytes(2 * 30**3)
    (tmp_path / "a.nrrd").write_bytes(content)
    assert "not at right angles" in rejection(tmp_path / "a.nrrd")


def test_a_header_that_claims_a_giant_volume_is_refused_before_memory_is_taken(tmp_path):
    meta = "ObjectType = Image\nNDims = 3\nBinaryData = True\nElementSpacing = 1 1 1\nDimSize = {}\n"
    meta += "ElementType = MET_DOUBLE\nElementDataFile = LOCAL\n"
    (tmp_path / "a.mha").write_text(meta.format("90000 90000 90000"))
    assert "claims 90000x90000x90000 voxels" in rejection(tmp_path / "a.mha")
    (tmp_path / "b.mha").write_text(meta.format("200 200 200"))  # within the limit, but not on the disk
    assert "truncated: the header claims 64000000 bytes" in rejection(tmp_path / "b.mha")
    header = bytearray(write(tmp_path / "c.nii").read_bytes()[:400])
    header[42:48] = struct.pack("<3h", 30000, 30000, 30000)
    (tmp_path / "c.nii").write_bytes(header)
    assert "claims 30000x30000x30000 voxels" in rejection(tmp_path / "c.nii")
    write(tmp_path / "d.nrrd", body((60, 60, 60)), spacing_xyz=(19, 19, 19))  # large only once resampled
    assert "after resampling" in rejection(tmp_path / "d.nrrd")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".hdr", ".nrrd", ".mha"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_single_voxel_that_is_not_finite_is_found_in_any_format(tmp_path, suffix, value):
    hu = body((40, 90, 100)).astype(np.float32)  # more than one piece of a MiB
    hu[-1, -1, -1] = value
    path = write(tmp_path / f"a{suffix}", hu)
    with pytest.raises(RejectedImage, match=r"^1 voxel is NaN or infinite"):
        check_intensities(read(path))
    hu[-1, -1, -1] = 0
    check_intensities(read(write(path, hu)))


# --- which files are taken ---------------------------------------------------------------------------------


def test_files_are_found_recursively_and_sorted_by_kind(tmp_path):
    for name in (
        "p1/scan_ct.nii.gz",
        "p1/scan_seg.nii.gz",
        "p2/deep/er/x.nrrd",
        "p2/IM0001",
        "notes.txt",
        "LICENSE",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"?")
    for name in (".hidden.nii", "p1/._scan_ct.nii.gz", ".git/x.nii", "cache/cases/x.nii"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"?")
    write(tmp_path / "p3" / "a.mhd")
    (tmp_path / "p3" / "text.dat").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "p2" / "gone.nii").symlink_to(tmp_path / "nowhere")
    (tmp_path / "p2" / "again").symlink_to(tmp_path)  # a loop
    os.mkfifo(tmp_path / "p2" / "pipe.nii")
    found = find_files([tmp_path, tmp_path / "p1"], skip_folder=tmp_path / "cache")
    assert [f.name for f in found.images] == [
        "p1/scan_ct.nii.gz",
        "p1/scan_seg.nii.gz",
        "p2/deep/er/x.nrrd",
        "p3/a.mhd",
    ]
    assert [f.name for f in found.maybe_dicom] == ["p2/IM0001", "p3/text.dat"]
    assert [os.path.relpath(p, tmp_path) for p, _ in found.ignored] == [
        "LICENSE",
        "notes.txt",
        "p2/pipe.nii",
        "p3/a.raw",
    ]
    assert [(os.path.relpath(p, tmp_path), reason) for p, reason in found.rejected] == [
        ("p2/gone.nii", "a link to nothing")
    ]


@pytest.mark.parametrize(
    ("include", "exclude", "taken"),
    [
        (["*_ct.nii"], [], ["a/1_ct.nii", "b/2_ct.nii"]),
        ([], ["*_seg.nii"], ["a/1_ct.nii", "b/2_ct.nii"]),
        (["a"], [], ["a/1_ct.nii", "a/1_seg.nii"]),
        (["a", "b/*"], ["*_seg*", "b"], ["a/1_ct.nii"]),
        (["nothing"], [], []),
    ],
)
def test_include_and_exclude_choose_by_name_path_and_folder(tmp_path, include, exclude, taken):
    for name in ("a/1_ct.nii", "a/1_seg.nii", "b/2_ct.nii", "b/2_seg.nii"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"?")
    found = find_files([tmp_path], include, exclude)
    assert [f.name for f in found.images] == taken
    assert len(found.ignored) == 4 - len(taken)


# --- intensities -------------------------------------------------------------------------------------------


def with_padding(value: int) -> np.ndarray:
    hu = body().astype(np.int32)
    hu[:, :4] = value
    return hu


@pytest.mark.parametrize(
    "hu",
    [
        body(),
        body().astype(np.int32),
        body().astype(np.float32) + 0.25,
        body().astype(np.float64),
        with_padding(-2000),
        with_padding(-3024),
        with_padding(-32768),
        np.where(body() > 720, 15000, body()),
    ],
)
def test_ct_in_any_storage_is_accepted(hu):
    check_intensities(hu)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ((body() > 0).astype(np.uint8), "label map"),
        ((body() > 0).astype(np.float32) * 3 - 1, "label map"),
        (np.interp(body(), [-1000, 1000], [0, 255]).astype(np.uint8), "8-bit picture"),
        ((body().astype(np.int32) + 1024).astype(np.uint16), "none below 0.*rescale intercept"),
        (np.interp(body(), [-1000, 1000], [0, 1]), "none below 0"),
        (np.interp(body(), [-1000, 1000], [-1, 1]), "no air"),
        (np.clip(body(), -160, 240), "no air"),
        (with_padding(-2000) + np.where(with_padding(-2000) > -2000, 1024, 0), "no air"),
        (body().astype(np.int32) - 1024, "soft tissue"),
        (body().astype(np.int32) * 10, "not HU"),
        (np.where(body() > 0, np.float32(1e30), body()), "not HU"),
        (np.where(body() > 720, np.nan, body()), "NaN or infinite"),
        (np.where(body() > 720, -np.inf, body()), "NaN or infinite"),
        (np.full((8, 8, 8), -1000, np.int16), "every voxel is -1000"),
        (np.random.default_rng(0).normal(-1000, 15, (30, 30, 30)), "soft tissue"),
    ],
)
def test_values_that_cannot_be_hu_are_rejected(values, reason):
    with pytest.raises(RejectedImage, match=reason):
        check_intensities(values)
