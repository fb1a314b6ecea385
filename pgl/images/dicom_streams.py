"""Compressed pixels of a DICOM file: what their own header claims, held against the DICOM header.

A decoder takes memory for the size that the picture's header (SOF of JPEG, SIZ of JPEG 2000) claims, whatever
the DICOM header says and however few bytes follow.
"""

from __future__ import annotations

import mmap
import struct

from pgl.images.checks import RejectedImage

JPEG = {f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 57, 70)}
JPEG_LS = {f"1.2.840.10008.1.2.4.{n}" for n in (80, 81)}
JPEG_2000 = {f"1.2.840.10008.1.2.4.{n}" for n in (90, 91)}
RLE = "1.2.840.10008.1.2.5"

HEADER_BYTES = 1 << 20  # of a picture; application segments of JPEG have up to 64 KiB each
JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC} | {0xF7}  # SOF0 to SOF15, SOF55 of JPEG-LS
JPEG_SCAN, JPEG_END = 0xDA, 0xD9
MOST_TILES = 1024  # of JPEG 2000: its library takes kilobytes for each
# A picture of air alone can be very small, so small ones may be of any length.
FREE_PIXELS = 1 << 22
MOST_PIXELS_PER_BYTE = 1000
RLE_FACTOR = 64  # two bytes become 128 at most
RLE_HEADER_BYTES, RLE_SEGMENTS = 64, 15


def check_stream(
    syntax: str,
    content: mmap.mmap,
    fragments: list[tuple[int, int]],
    size_xy: tuple[int, int],
    samples: int,
    sample_bytes: int,
    frames: int,
) -> None:
    """Hold the first picture of a file's compressed pixels against what its DICOM header claims.

    Args:
        syntax: the file's transfer syntax.
        content: the file.
        fragments: (start, length) of the pieces that the picture may be cut into.
        size_xy, samples, sample_bytes: columns and rows; values per pixel; bytes per value.
        frames: the number of pictures.

    Raises:
        RejectedImage: another size, far more pixels than the bytes can hold, damaged, or a compression that
            is not read.
    """
    length = sum(size for _, size in fragments)
    pixels = size_xy[0] * size_xy[1] * frames
    if pixels > FREE_PIXELS and pixels > MOST_PIXELS_PER_BYTE * length:
        raise RejectedImage(
            f"unreadable: {size_xy[0]}x{size_xy[1]} pixels (times {frames}) cannot be in {length} compressed "
            "bytes"
        )
    head = _head(content, fragments)
    claimed: tuple[int, int, int]
    if syntax in JPEG or syntax in JPEG_LS:
        claimed = _jpeg(head)
    elif syntax in JPEG_2000:
        claimed = _jpeg_2000(head)
    elif syntax == RLE:
        _check_rle(head, length, size_xy, samples * sample_bytes, frames)
        return
    else:
        raise RejectedImage(
            f"DICOM of transfer syntax {syntax[:64] or 'unknown'}, which is not read; decompress it first, "
            "for example with gdcmconv --raw"
        )
    if claimed != (*size_xy, samples):
        raise RejectedImage(
            f"unreadable: the compressed picture claims {claimed[0]}x{claimed[1]} pixels of {claimed[2]} "
            f"values, its DICOM header {size_xy[0]}x{size_xy[1]} of {samples}"
        )


def _head(content: mmap.mmap, fragments: list[tuple[int, int]]) -> bytes:
    head = b""
    for start, length in fragments:
        head += content[start : start + min(length, HEADER_BYTES - len(head))]
        if len(head) >= HEADER_BYTES:
            break
    return head


def _jpeg(head: bytes) -> tuple[int, int, int]:
    """Columns, rows, components of the frame header (ITU-T T.81, B.2.2; T.87, C.2.2)."""
    if head[:2] != b"\xff\xd8":
        raise RejectedImage(f"unreadable: compressed pixels that are no JPEG: they begin with {head[:8]!r}")
    at = 2
    while at + 4 <= len(head) and head[at] == 0xFF:
        marker = head[at + 1]
        if marker == 0xFF:  # a byte to fill up
            at += 1
            continue
        if marker in JPEG_FRAMES and at + 10 <= len(head):
            _, rows, columns, components = struct.unpack_from(">B2HB", head, at + 4)
            return columns, rows, components
        if marker in (JPEG_SCAN, JPEG_END):
            break
        at += 2 + struct.unpack_from(">H", head, at + 2)[0]
    raise RejectedImage("unreadable: a JPEG without the size of its picture")


def _jpeg_2000(head: bytes) -> tuple[int, int, int]:
    """Columns, rows, components of the SIZ segment (ITU-T T.800, A.5.1)."""
    if head[:4] != b"\xff\x4f\xff\x51" or len(head) < 42:
        raise RejectedImage(
            f"unreadable: compressed pixels that are no bare JPEG 2000 stream: they begin with {head[:8]!r}; "
            "convert them (gdcmconv --raw) if a viewer shows them"
        )
    right, bottom, left, top, tile_width, tile_height, tile_left, tile_top = struct.unpack_from(
        ">8I", head, 8
    )
    components = struct.unpack_from(">H", head, 40)[0]
    steps = head[42 : 42 + 3 * components]
    if len(steps) < 3 * components or any(n != 1 for k, n in enumerate(steps) if k % 3):
        raise RejectedImage("unreadable: a JPEG 2000 stream of components of different sizes")
    if not (tile_width and tile_height and left < right and top < bottom):
        raise RejectedImage("unreadable: a JPEG 2000 stream without pixels")
    tiles = -(-(right - tile_left) // tile_width) * -(-(bottom - tile_top) // tile_height)
    if tiles > MOST_TILES:
        raise RejectedImage(
            f"unreadable: a JPEG 2000 stream of {tiles} tiles; more than {MOST_TILES} are refused"
        )
    return right - left, bottom - top, components


def _check_rle(head: bytes, length: int, size_xy: tuple[int, int], pixel_bytes: int, frames: int) -> None:
    """The table of segments, one for each byte of a pixel (DICOM PS3.5, annex G)."""
    if len(head) < RLE_HEADER_BYTES:
        raise RejectedImage("unreadable: compressed pixels that end inside their table")
    count, *offsets = struct.unpack_from("<16I", head)
    starts = offsets[:count]
    if count != pixel_bytes or not 0 < count <= RLE_SEGMENTS:
        raise RejectedImage(
            f"unreadable: the compressed picture claims {count} bytes a pixel, its DICOM header {pixel_bytes}"
        )
    if starts[0] != RLE_HEADER_BYTES or starts != sorted(starts) or starts[-1] >= length:
        raise RejectedImage("unreadable: compressed pixels with a damaged table")
    ends = [*starts[1:], length]
    needed = size_xy[0] * size_xy[1]
    for start, end in zip(starts, ends, strict=True):
        if frames == 1 and RLE_FACTOR * (end - start) < needed:
            raise RejectedImage(
                f"unreadable: {size_xy[0]}x{size_xy[1]} pixels cannot be in {end - start} compressed bytes"
            )
