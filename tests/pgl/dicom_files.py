"""DICOM written element by element, from the standard's description, so that no reader checks itself."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from PIL import Image as Picture

from tests.pgl.test_reader_corpus import ORIGIN, SIZE, SPACING, Image

IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
RLE, JPEG_LOSSLESS, JPEG_LS = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.80"
JPEG_2000 = "1.2.840.10008.1.2.4.90"
CT, ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1"
UID = "1.2.826.0.1.3680043.2.1125"
LONG = ("OB", "OW", "SQ", "UN")
UNDEFINED = 0xFFFFFFFF
ITEM, ITEM_END, SEQUENCE_END = (0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)


class Coder:
    """Writes elements in one transfer syntax."""

    def __init__(self, syntax: str) -> None:
        self.implicit, self.order = syntax == IMPLICIT, ">" if syntax == BIG_ENDIAN else "<"

    def element(
        self, tag: tuple[int, int], vr: str, value: bytes | str | int, undefined: bool = False
    ) -> bytes:
        if isinstance(value, int):
            value = struct.pack(self.order + "H", value)
        if isinstance(value, str):
            value = value.encode() + b" "[: len(value) % 2 and vr != "UI"]
        value += b"\0"[: len(value) % 2]
        length = UNDEFINED if undefined else len(value)
        head = struct.pack(self.order + "2H", *tag)
        if tag[0] == 0xFFFE or self.implicit:
            return head + struct.pack(self.order + "I", length) + value
        if vr in LONG:
            return head + vr.encode() + b"\0\0" + struct.pack(self.order + "I", length) + value
        return head + vr.encode() + struct.pack(self.order + "H", length) + value

    def sequence(self, tag: tuple[int, int], items: Sequence[bytes], undefined: bool = False) -> bytes:
        whole = b"".join(
            self.element(ITEM, "", item + (self.element(ITEM_END, "", b"") if undefined else b""), undefined)
            for item in items
        )
        end = self.element(SEQUENCE_END, "", b"") if undefined else b""
        return self.element(tag, "SQ", whole + end, undefined)


def file(syntax: str, elements: dict[tuple[int, int], tuple[str, bytes | str | int]], pixels: bytes) -> bytes:
    """A file of ``elements``, tag → (VR, value), and of ``pixels``, encoded already."""
    coder, meta = Coder(syntax), Coder(EXPLICIT)
    group = b"".join(
        meta.element(tag, "UI", value)
        for tag, value in (((2, 2), CT), ((2, 3), UID + ".1"), ((2, 0x10), syntax), ((2, 0x12), UID))
    )
    body = b"".join(coder.element(tag, *elements[tag]) for tag in sorted(elements))
    size = meta.element((2, 0), "UL", struct.pack("<I", len(group)))
    return bytes(128) + b"DICM" + size + group + body + pixels


def encapsulated(fragments: Sequence[bytes]) -> bytes:
    coder = Coder(EXPLICIT)
    pieces = b"".join(coder.element(ITEM, "", piece) for piece in (b"", *fragments))
    return coder.element((0x7FE0, 0x10), "OB", pieces + coder.element(SEQUENCE_END, "", b""), undefined=True)


def plain(syntax: str) -> Callable[[np.ndarray], bytes]:
    coder = Coder(syntax)
    return lambda plane: coder.element(
        (0x7FE0, 0x10), "OW", plane.astype(plane.dtype.newbyteorder(coder.order)).tobytes()
    )


def rle(plane: np.ndarray) -> bytes:
    """A segment for each byte of a pixel, the highest first; in it runs and literals (PackBits)."""
    width = plane.dtype.itemsize
    planes = plane.astype(plane.dtype.newbyteorder(">")).view(np.uint8).reshape(*plane.shape, width)
    segments = [_packed(planes[..., n].tobytes()) for n in range(width)]
    starts = 64 + np.cumsum([0, *map(len, segments[:-1])])
    table = struct.pack("<16I", width, *starts, *[0] * (15 - width))
    return table + b"".join(segments)


def _packed(values: bytes) -> bytes:
    packed = bytearray()
    for value, run in groupby(values):
        left = len(list(run))
        while left:
            count = min(left, 128)
            packed += bytes([257 - count if count > 1 else 0, value])
            left -= count
    return bytes(packed) + b"\0"[: len(packed) % 2]


def jpeg_2000(plane: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Picture.fromarray(plane.astype(np.uint16)).save(buffer, "JPEG2000", irreversible=False, no_jp2=True)
    return buffer.getvalue()


def jpeg_lossless(plane: np.ndarray, folder: Path) -> bytes:
    """The stream of a file that GDCM wrote: no other library here can."""
    writer = sitk.ImageFileWriter()
    writer.SetFileName(str(folder / "stream.dcm"))
    writer.UseCompressionOn()
    writer.SetCompressor("JPEG")
    writer.Execute(sitk.GetImageFromArray(plane))
    content = (folder / "stream.dcm").read_bytes()
    pixels = content.index(b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff")
    start = content.index(b"\xff\xd8\xff", pixels)
    length = struct.unpack_from("<I", content, start - 4)[0]
    return content[start : start + length]


def stored(image: Image) -> np.ndarray:
    """The values that are written, [z, y, x]."""
    flat = np.frombuffer(image.data, image.order + image.kind)
    return flat.reshape(SIZE[::-1]).astype(image.kind)


def header(image: Image, number: int, syntax: str) -> dict[tuple[int, int], tuple[str, bytes | str | int]]:
    """What a slice says of itself."""
    place = ORIGIN + image.steps[:, 2] * number
    columns = (*image.direction[:, 0], *image.direction[:, 1])
    bits = 8 * int(image.kind[1])
    return {
        (0x08, 0x16): ("UI", CT), (0x08, 0x18): ("UI", f"{UID}.7.{number + 1}"), (0x08, 0x60): ("CS", "CT"),
        (0x20, 0x0D): ("UI", UID + ".9"), (0x20, 0x0E): ("UI", UID + ".8"),
        (0x20, 0x13): ("IS", str(number + 1)),
        (0x20, 0x32): ("DS", "\\".join(f"{v:.6f}" for v in place)),
        (0x20, 0x37): ("DS", "\\".join(f"{v:.8f}" for v in columns)),
        (0x28, 0x02): ("US", 1), (0x28, 0x04): ("CS", "MONOCHROME2"),
        (0x28, 0x10): ("US", SIZE[1]), (0x28, 0x11): ("US", SIZE[0]),
        (0x28, 0x30): ("DS", f"{SPACING[1]}\\{SPACING[0]}"),
        (0x28, 0x100): ("US", bits), (0x28, 0x101): ("US", bits), (0x28, 0x102): ("US", bits - 1),
        (0x28, 0x103): ("US", int(image.kind[0] == "i")),
        (0x28, 0x1052): ("DS", str(image.intercept)), (0x28, 0x1053): ("DS", str(image.slope)),
    }  # fmt: skip


def write_slices(
    folder: Path, image: Image, syntax: str, pixels: Callable[[np.ndarray], bytes]
) -> list[Path]:
    """A series, a file for each slice, in an order of names that is not that of the slices."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, plane in enumerate(stored(image)):
        paths.append(folder / f"{(7 * number) % SIZE[2]:03d}.dcm")
        paths[-1].write_bytes(file(syntax, header(image, number, syntax), pixels(plane)))
    return paths
