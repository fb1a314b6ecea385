"""DICOM in every form: of each byte order and compression, read to its place or refused with its reason."""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest
import SimpleITK as sitk

from pgl.images import RejectedImage, SliceHeader, group_slices, read_headers, read_series
from tests.pgl import dicom_files as dicom
from tests.pgl.ct_files import LIMITS
from tests.pgl.test_images_grid import SIGNED_PERMUTATIONS, rotation
from tests.pgl.test_reader_corpus import ORIGIN, SIZE, SPACING, Image, found_in

ROWS, PIXELS = b"\x28\x00\x10\x00US\x02\x00", b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff"
STORED = Image(rotation(1, 12.0), "u2", "<", 1.0, -1024.0)


def entries(paths) -> list[dict]:
    return read_headers([os.fspath(path) for path in sorted(paths)])


def stacks(paths) -> list[list[SliceHeader]]:
    found = entries(paths)
    assert not [entry for entry in found if "header" not in entry], found
    return group_slices([SliceHeader(**entry["header"]) for entry in found])


def assert_in_place(paths, image: Image, err_msg: str) -> None:
    [stack] = stacks(paths)
    read, _ = read_series(stack, LIMITS)
    np.testing.assert_allclose(found_in(read), image.truth_mm, atol=0.2, err_msg=err_msg)
    hu = dicom.stored(image) * image.slope + image.intercept
    along = np.cross(image.direction[:, 0], image.direction[:, 1]) @ image.direction[:, 2]
    np.testing.assert_array_equal(
        sitk.GetArrayFromImage(read), hu if along > 0 else hu[::-1], err_msg=err_msg
    )


@pytest.mark.parametrize("syntax", [dicom.IMPLICIT, dicom.EXPLICIT, dicom.BIG_ENDIAN])
@pytest.mark.parametrize("kind", ["i2", "u2"])
def test_every_byte_order_type_and_orientation_is_read_in_place(tmp_path, syntax, kind):
    oblique = [rotation(2, 20.0), rotation(0, 33.0) @ rotation(1, -15.0)]
    scales = [(1.0, -1024.0), (0.5, -2000.0)] if kind == "u2" else [(1.0, 0.0), (2.0, -24.0)]
    for place, direction in enumerate([*SIGNED_PERMUTATIONS[::12], *oblique]):
        image = Image(direction, kind, "<", *scales[place % 2])
        paths = dicom.write_slices(tmp_path / str(place), image, syntax, dicom.plain(syntax))
        assert_in_place(paths, image, str(direction))


@pytest.mark.parametrize("form", ["rle", "jpeg lossless", "jpeg 2000"])
def test_compressed_series_are_the_same_voxels_in_the_same_place(tmp_path, form):
    def pieces(stream: bytes) -> list[bytes]:
        return [stream[:66], stream[66:100], stream[100:]]

    syntax, encode = {
        "rle": (dicom.RLE, lambda plane: [dicom.rle(plane)]),
        "jpeg lossless": (dicom.JPEG_LOSSLESS, lambda plane: [dicom.jpeg_lossless(plane, tmp_path)]),
        "jpeg 2000": (dicom.JPEG_2000, lambda plane: pieces(dicom.jpeg_2000(plane))),
    }[form]
    for place, direction in enumerate([np.eye(3), rotation(0, 33.0) @ rotation(1, -15.0)]):
        image = Image(direction, "u2", "<", 1.0, -1024.0)
        paths = dicom.write_slices(
            tmp_path / str(place), image, syntax, lambda plane: dicom.encapsulated(encode(plane))
        )
        assert_in_place(paths, image, str(direction))


def refused_unread(tmp_path, monkeypatch, content: bytes) -> str:
    monkeypatch.setattr(sitk.ImageFileReader, "ReadImageInformation", lambda _: pytest.fail("given to GDCM"))
    (tmp_path / "a.dcm").write_bytes(content)
    [entry] = entries([tmp_path / "a.dcm"])
    return entry["rejected"]


def a_slice(syntax: str, stream: bytes) -> bytes:
    return dicom.file(syntax, dicom.header(STORED, 0, syntax), dicom.encapsulated([stream]))


def jpeg_claiming(rows: int, columns: int, frame: int = 0xC3) -> bytes:
    """The beginning of a JPEG: a comment that looks like a frame, the frame, and too few bytes."""
    comment = (
        b"\xff\xfe" + struct.pack(">H", 12) + b"\xff\xc3\0\x0b\x10" + struct.pack(">2H", *SIZE[:2]) + b"\1"
    )
    frame_header = struct.pack(">2BHB2HB3B", 0xFF, frame, 11, 16, rows, columns, 1, 1, 0x11, 0)
    return b"\xff\xd8" + comment + b"\xff" + frame_header + bytes(60)


@pytest.mark.parametrize(
    ("syntax", "stream"),
    [
        (dicom.JPEG_LOSSLESS, jpeg_claiming(60_000, 60_000)),
        (dicom.JPEG_LOSSLESS, jpeg_claiming(SIZE[1], SIZE[0] + 1)),
        (dicom.JPEG_LS, jpeg_claiming(60_000, 60_000, 0xF7)),
        (dicom.JPEG_2000, b"SIZ 60000 60000"),
        (dicom.JPEG_2000, b"SIZ 14 17"),
    ],
)
def test_a_picture_that_claims_another_size_than_its_header_is_refused_unread(
    tmp_path, monkeypatch, syntax, stream
):
    if stream.startswith(b"SIZ"):
        whole = bytearray(dicom.jpeg_2000(dicom.stored(STORED)[0]))
        size = list(map(int, stream.split()[1:]))
        struct.pack_into(">2I", whole, 8, *size)
        struct.pack_into(">2I", whole, 24, *size)
        stream = bytes(whole)
    assert "the compressed picture claims" in refused_unread(tmp_path, monkeypatch, a_slice(syntax, stream))


def test_both_headers_may_not_claim_more_than_the_bytes_can_hold(tmp_path, monkeypatch):
    content = a_slice(dicom.JPEG_LOSSLESS, jpeg_claiming(60_000, 60_000))
    at = content.index(ROWS)
    content = content[: at + 8] + struct.pack("<H", 60_000) + content[at + 10 :]
    at = content.index(b"\x28\x00\x11\x00US")
    content = content[: at + 8] + struct.pack("<H", 60_000) + content[at + 10 :]
    assert "60000x60000 pixels (times 1) cannot be in" in refused_unread(tmp_path, monkeypatch, content)


def test_a_stream_of_a_thousand_tiles_or_of_uneven_components_is_refused_unread(tmp_path, monkeypatch):
    for at, value, message in (
        (24, struct.pack(">2I", 1, 1), "tiles; more than"),
        (43, b"\x02", "different sizes"),
    ):
        whole = bytearray(dicom.jpeg_2000(dicom.stored(STORED)[0]))
        whole[at : at + len(value)] = value
        if at == 24:  # 14 x 18 of them are allowed
            big = 2**20
            struct.pack_into(">2I", whole, 8, SIZE[0] + big, SIZE[1])
            struct.pack_into(">2I", whole, 16, big, 0)
        assert message in refused_unread(tmp_path, monkeypatch, a_slice(dicom.JPEG_2000, bytes(whole)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: struct.pack("<I", 15) + s[4:], "claims 15 bytes a pixel"),
        (lambda s: s[:8] + struct.pack("<I", 2**31) + s[12:], "damaged table"),
        (lambda s: s[:8] + struct.pack("<I", len(s) - 2) + s[12:], "cannot be in 2 compressed bytes"),
        (lambda s: s[:40], "end inside their table"),
    ],
)
def test_a_damaged_table_of_run_lengths_is_refused_unread(tmp_path, monkeypatch, change, message):
    stream = change(dicom.rle(dicom.stored(STORED)[0]))
    assert message in refused_unread(tmp_path, monkeypatch, a_slice(dicom.RLE, stream))


@pytest.mark.parametrize(
    ("syntax", "message"),
    [
        ("1.2.840.10008.1.2.4.102", "transfer syntax 1.2.840.10008.1.2.4.102, which is not read"),  # MPEG-4
        ("1.2.840.10008.1.2.4.201", "which is not read; decompress it first"),  # HTJ2K
        ("1.2.840.10008.1.2.1.99", "deflated as a whole"),
        (dicom.EXPLICIT, "whose header says uncompressed"),
        (dicom.JPEG_2000, "no bare JPEG 2000 stream"),
        (dicom.JPEG_LOSSLESS, "no JPEG"),
    ],
)
def test_other_compressions_are_refused_unread(tmp_path, monkeypatch, syntax, message):
    assert message in refused_unread(tmp_path, monkeypatch, a_slice(syntax, bytes(100)))


def test_pixels_cut_within_their_pieces_are_refused_unread(tmp_path, monkeypatch):
    whole = a_slice(dicom.RLE, dicom.rle(dicom.stored(STORED)[0]))
    assert "cut or damaged" in refused_unread(tmp_path, monkeypatch, whole[: whole.index(PIXELS) + 60])
    assert "ends inside" in refused_unread(tmp_path, monkeypatch, whole[:-8])


def hidden(length: int) -> bytes:
    """A slice with a sequence of unknown type in it, and inside an element that claims ``length`` bytes."""
    coder = dicom.Coder(dicom.IMPLICIT)
    inside = struct.pack("<2HI", 0x0009, 0x1001, length) + b"ab"
    item = coder.element(dicom.ITEM, "", inside + coder.element(dicom.ITEM_END, "", b""), undefined=True)
    end = coder.element(dicom.SEQUENCE_END, "", b"")
    unknown = struct.pack("<2H2s2xI", 0x0009, 0x1000, b"UN", dicom.UNDEFINED) + item + end
    elements = dicom.header(STORED, 0, dicom.EXPLICIT)
    content = dicom.file(dicom.EXPLICIT, elements, dicom.plain(dicom.EXPLICIT)(dicom.stored(STORED)[0]))
    at = content.index(b"\x20\x00\x0d\x00UI")
    return content[:at] + unknown + content[at:]


def test_elements_of_unknown_type_are_looked_into(tmp_path, monkeypatch):
    (tmp_path / "good.dcm").write_bytes(hidden(2))
    [entry] = entries([tmp_path / "good.dcm"])
    assert entry["header"]["series_uid"] == dicom.UID + ".8"
    assert "(0009,1001) claims 4294967000 bytes" in refused_unread(tmp_path, monkeypatch, hidden(4294967000))


def test_after_a_type_that_does_not_exist_nobody_guesses_how_the_file_goes_on(tmp_path, monkeypatch):
    whole = dicom.file(
        dicom.EXPLICIT,
        dicom.header(STORED, 0, dicom.EXPLICIT),
        dicom.plain(dicom.EXPLICIT)(dicom.stored(STORED)[0]),
    )
    (tmp_path / "padded.dcm").write_bytes(whole + bytes(512))
    [entry] = entries([tmp_path / "padded.dcm"])
    assert entry["header"]["series_uid"] == dicom.UID + ".8"
    at = whole.index(b"\x20\x00\x0d\x00UI")
    for inserted in (bytes(24), b"\x19\x00\x10\x00ZZ\x02\x00ab"):
        told = refused_unread(tmp_path, monkeypatch, whole[:at] + inserted + whole[at:])
        assert "values of an unknown type" in told


def test_a_giant_element_of_a_file_without_preamble_is_refused_unread(tmp_path, monkeypatch):
    coder = dicom.Coder(dicom.IMPLICIT)
    elements = dicom.header(STORED, 0, dicom.IMPLICIT)
    content = b"".join(coder.element(tag, *elements[tag]) for tag in sorted(elements))
    content += struct.pack("<2HI", 0x7FE0, 0x10, 0xFFFFFFF0) + bytes(100)
    assert "(7fe0,0010) claims 4294967280" in refused_unread(tmp_path, monkeypatch, content)


def test_sequences_nested_beyond_sense_are_refused_unread(tmp_path, monkeypatch):
    coder = dicom.Coder(dicom.EXPLICIT)
    nested = b""
    for _ in range(2000):
        nested = coder.sequence((0x0008, 0x1140), [nested])
    content = dicom.file(dicom.EXPLICIT, dicom.header(STORED, 0, dicom.EXPLICIT), b"")
    at = content.index(b"\x20\x00\x0d\x00UI")
    assert "nested" in refused_unread(tmp_path, monkeypatch, content[:at] + nested + content[at:])


def test_the_rows_of_an_icon_are_not_taken_for_the_pictures(tmp_path):
    coder = dicom.Coder(dicom.EXPLICIT)
    icon = coder.element((0x28, 0x10), "US", 60_000) + coder.element((0x28, 0x11), "US", 60_000)
    icon += coder.element((0x7FE0, 0x10), "OW", bytes(8))
    paths = dicom.write_slices(tmp_path, STORED, dicom.EXPLICIT, dicom.plain(dicom.EXPLICIT))
    for path in paths:
        content = path.read_bytes()
        at = content.index(b"\x20\x00\x0d\x00UI")
        path.write_bytes(content[:at] + coder.sequence((0x08, 0x1140), [icon], undefined=True) + content[at:])
    assert_in_place(paths, STORED, "icon")


# --- several frames in a file ----------------------------------------------------------------------------


def enhanced(
    frames: int, count: str | None = None, sop_class: str = dicom.ENHANCED_CT, top: bool = False
) -> bytes:
    """Enhanced CT: spacing and rescale shared, position and orientation of each frame in its own item."""
    coder = dicom.Coder(dicom.EXPLICIT)
    elements = dicom.header(STORED, 0, dicom.EXPLICIT)
    elements[0x08, 0x16] = ("UI", sop_class)
    if count is not None:
        elements[0x28, 0x08] = ("IS", count)
    moved = {tag: elements[tag] for tag in ((0x28, 0x30), (0x28, 0x1052), (0x28, 0x1053))}
    if not top:
        for tag in (*moved, (0x20, 0x32), (0x20, 0x37)):
            del elements[tag]
    measures, rescale = (
        coder.sequence(tag, [b"".join(coder.element(t, *moved[t]) for t in parts)])
        for tag, parts in (
            ((0x28, 0x9110), [(0x28, 0x30)]),
            ((0x28, 0x9145), [(0x28, 0x1052), (0x28, 0x1053)]),
        )
    )
    per_frame = []
    for number in range(frames):
        own = dicom.header(STORED, number, dicom.EXPLICIT)
        per_frame.append(
            coder.sequence((0x20, 0x9113), [coder.element((0x20, 0x32), *own[0x20, 0x32])])
            + coder.sequence((0x20, 0x9116), [coder.element((0x20, 0x37), *own[0x20, 0x37])])
        )
    groups = coder.sequence((0x5200, 0x9229), [measures + rescale])
    groups += coder.sequence((0x5200, 0x9230), per_frame, undefined=True)
    pixels = dicom.plain(dicom.EXPLICIT)(dicom.stored(STORED)[:frames])
    return dicom.file(dicom.EXPLICIT, elements, groups + pixels)


@pytest.mark.parametrize(
    ("frames", "count", "sop_class", "top"),
    [
        (SIZE[2], str(SIZE[2]), dicom.ENHANCED_CT, False),
        (SIZE[2], str(SIZE[2]), dicom.ENHANCED_CT, True),  # with a place that is that of no frame
        (SIZE[2], f"+{SIZE[2]}", dicom.ENHANCED_CT, True),
        (SIZE[2], str(SIZE[2]), dicom.CT, True),  # a stack in one file of the old kind
        (1, "1", dicom.ENHANCED_CT, False),
        (1, None, dicom.ENHANCED_CT, True),
    ],
)
def test_several_frames_in_a_file_are_rejected_with_that_reason(tmp_path, frames, count, sop_class, top):
    for name in ("a.dcm", "b.dcm"):
        (tmp_path / name).write_bytes(enhanced(frames, count, sop_class, top))
    [stack] = stacks(tmp_path.iterdir())
    for part in (stack, stack[:1]):
        with pytest.raises(RejectedImage, match=r"^multi-frame DICOM \(\d+ frames? in .*convert it first"):
            read_series(part, LIMITS)


@pytest.mark.parametrize("count", [None, "1", "x"])
def test_frames_that_the_header_does_not_count_are_noticed(tmp_path, count):
    (tmp_path / "a.dcm").write_bytes(enhanced(SIZE[2], count, dicom.CT, top=True))
    [entry] = entries([tmp_path / "a.dcm"])
    assert "several frames that its header does not count" in entry["rejected"]


def test_a_frame_among_plain_slices_does_not_mix_with_them(tmp_path):
    paths = dicom.write_slices(tmp_path, STORED, dicom.EXPLICIT, dicom.plain(dicom.EXPLICIT))
    (tmp_path / "z.dcm").write_bytes(enhanced(SIZE[2], str(SIZE[2]), top=True))
    found = stacks([*paths, tmp_path / "z.dcm"])
    assert sorted(map(len, found)) == [1, SIZE[2]]
    read, _ = read_series(max(found, key=len), LIMITS)
    np.testing.assert_allclose(found_in(read), STORED.truth_mm, atol=0.2)
    assert tuple(SPACING) == pytest.approx(read.GetSpacing()) and tuple(ORIGIN) == pytest.approx(
        read.GetOrigin()
    )


def test_an_object_that_is_no_image_is_ignored_whatever_its_form(tmp_path):
    """A deflated report would be refused as an image; beside a series it must not make that incomplete."""

    def element(number: int, text: bytes) -> bytes:
        text += b"\0" * (len(text) % 2)
        return struct.pack("<2H2sH", 2, number, b"UI", len(text)) + text

    meta = element(2, b"1.2.840.10008.5.1.4.1.1.88.33") + element(16, b"1.2.840.10008.1.2.1.99")
    (tmp_path / "report.dcm").write_bytes(b"\0" * 128 + b"DICM" + meta + b"deflated")
    [entry] = entries([tmp_path / "report.dcm"])
    assert entry["ignored"] == "DICOM report"
