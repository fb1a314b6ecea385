"""The lengths in a DICOM file held against the file, before a native reader believes them.

GDCM takes memory for the length that an element claims, up to 4 GiB for a file of some kB, before it sees
that the file ends earlier; and its decoders take it for the size that a compressed picture claims.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass

from pgl.images.checks import RejectedImage
from pgl.images.dicom_streams import check_stream

PREAMBLE = 132
UNDEFINED = 0xFFFFFFFF
LONG_VALUES = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
# Of all types of value (PS3.5, 6.2). After another one GDCM guesses how the file goes on.
KNOWN_VALUES = LONG_VALUES | {
    b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL",
    b"SS", b"ST", b"TM", b"UI", b"UL", b"US",
}  # fmt: skip
ITEM, ITEM_END, SEQUENCE_END = (0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)
ITEM_GROUP, PIXEL_DATA, TRANSFER_SYNTAX = 0xFFFE, (0x7FE0, 0x0010), (0x0002, 0x0010)
ROWS, COLUMNS, FRAMES, SAMPLES = (0x28, 0x10), (0x28, 0x11), (0x28, 0x08), (0x28, 0x02)
BITS_ALLOCATED = (0x28, 0x100)
IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
UNCOMPRESSED = (IMPLICIT, EXPLICIT, BIG_ENDIAN)
DEFLATED = "1.2.840.10008.1.2.1.99"
# No medium holds more elements before its pixels; a bound on the time that a file may take.
MOST_ELEMENTS = 200_000
DEEPEST = 64  # GDCM calls itself for each level
FIRST_GROUPS = (b"\x02\x00", b"\x08\x00")  # of a file without preamble


def check_lengths(path: str) -> None:
    """Hold every element of a DICOM file against the file's length, and the pixels against its rows and
    columns. Files of another kind pass.

    Raises:
        RejectedImage: an element claims more bytes than follow, or the image more pixels than there are; or
            the file is deflated as a whole, or nested beyond sense.
    """
    with open(path, "rb") as file:
        head = file.read(PREAMBLE)
        is_dicom = head[128:] == b"DICM"
        if not is_dicom and head[:2] not in FIRST_GROUPS:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _Walk(content, PREAMBLE if is_dicom else 0).check()


@dataclass
class _Open:
    """A sequence or an item that is being walked: its end, or None where a delimiter will tell."""

    end: int | None
    implicit: bool


class _Walk:
    """All elements one after the other; what is open is kept in a list, so nothing here calls itself."""

    def __init__(self, content: mmap.mmap, start: int) -> None:
        self.content = content
        self.at = start
        self.syntax = ""
        if start == 0 and content[:2] != b"\x02\x00" and not content[4:6].isalpha():
            self.syntax = IMPLICIT
        self.facts: dict[tuple[int, int], int] = {}
        self.open: list[_Open] = []

    def check(self) -> None:
        for _ in range(MOST_ELEMENTS):
            while self.open and self.open[-1].end is not None and self.at >= self.open[-1].end:
                self.open.pop()
            if self.at + 8 > len(self.content) or self._is_padding():
                return
            meta = not self.open and self.content[self.at : self.at + 2] == b"\x02\x00"
            if not meta and self.syntax == DEFLATED:
                raise RejectedImage(
                    "DICOM that is deflated as a whole, which is not read; convert it first, for example "
                    "with gdcmconv --raw"
                )
            self._step(meta)
        raise RejectedImage(f"unreadable: more than {MOST_ELEMENTS} DICOM elements")

    def _is_padding(self) -> bool:
        """Whether nothing but zeros follows, to fill up a block of some medium."""
        return self.content[self.at : self.at + 8] == bytes(8) and not self.content[self.at :].strip(b"\0")

    def _step(self, meta: bool) -> None:
        implicit = self.open[-1].implicit if self.open else self.syntax == IMPLICIT
        tag, vr, length, start = self._header(implicit and not meta, meta)
        self.at = start
        if tag in (ITEM_END, SEQUENCE_END):
            if self.open and self.open[-1].end is None:
                self.open.pop()
            return
        if length != UNDEFINED and length > len(self.content) - start:
            raise RejectedImage(
                f"unreadable: DICOM element ({tag[0]:04x},{tag[1]:04x}) claims {length} bytes, "
                f"{len(self.content) - start} follow"
            )
        if tag == PIXEL_DATA and length == UNDEFINED:
            fragments = self._fragments()
            if not self.open:
                self._check_compressed(fragments)
        elif tag[0] == ITEM_GROUP or vr == b"SQ" or length == UNDEFINED:
            if len(self.open) >= DEEPEST:
                raise RejectedImage(f"unreadable: DICOM sequences nested more than {DEEPEST} deep")
            # Whoever wrote UN of undefined length did not know what is inside: it is in implicit VR.
            inside = implicit or (vr == b"UN" and tag[0] != ITEM_GROUP)
            self.open.append(_Open(None if length == UNDEFINED else start + length, inside))
        else:
            if tag == PIXEL_DATA and not self.open:
                self._check_pixels(length)
            if not self.open:  # a picture in a sequence, such as an icon, has sizes of its own
                self._note(tag, start, length)
            self.at = start + length

    def _header(self, implicit: bool, meta: bool) -> tuple[tuple[int, int], bytes, int, int]:
        order = ">" if self.syntax == BIG_ENDIAN and not meta else "<"
        group, element = struct.unpack_from(f"{order}2H", self.content, self.at)
        start = self.at + 8
        if group == ITEM_GROUP or implicit:
            return (group, element), b"", struct.unpack_from(f"{order}I", self.content, self.at + 4)[0], start
        vr = self.content[self.at + 4 : self.at + 6]
        if vr not in KNOWN_VALUES:
            raise RejectedImage(
                f"unreadable: DICOM element ({group:04x},{element:04x}) has values of an unknown type, "
                f"{vr.decode('latin-1')!r}: the file is damaged, or not in the transfer syntax that it names"
            )
        if vr not in LONG_VALUES:
            return (group, element), vr, struct.unpack_from(f"{order}H", self.content, self.at + 6)[0], start
        if start + 4 > len(self.content):
            raise RejectedImage("unreadable: it ends inside a DICOM element")
        return (group, element), vr, struct.unpack_from(f"{order}I", self.content, start)[0], start + 4

    def _fragments(self) -> list[tuple[int, int]]:
        """Where the pieces of the compressed pixels lie: (start, length), behind the table of offsets."""
        found: list[tuple[int, int]] = []
        for _ in range(MOST_ELEMENTS):
            if self.at + 8 > len(self.content):
                raise RejectedImage("unreadable: it ends inside its compressed pixels")
            group, element, length = struct.unpack_from("<2HI", self.content, self.at)
            self.at += 8
            if (group, element) == SEQUENCE_END:
                return found[1:]
            if (group, element) != ITEM or length > len(self.content) - self.at:
                raise RejectedImage("unreadable: its compressed pixels are cut or damaged")
            found.append((self.at, length))
            self.at += length
        raise RejectedImage(f"unreadable: more than {MOST_ELEMENTS} pieces of compressed pixels")

    def _note(self, tag: tuple[int, int], start: int, length: int) -> None:
        value = self.content[start : start + min(length, 64)]
        if tag == TRANSFER_SYNTAX:
            self.syntax = value.decode("ascii", "replace").strip(" \0")
        elif tag in (ROWS, COLUMNS, SAMPLES, BITS_ALLOCATED) and length == 2 and tag not in self.facts:
            self.facts[tag] = struct.unpack(">H" if self.syntax == BIG_ENDIAN else "<H", value)[0]
        elif tag == FRAMES and tag not in self.facts:
            text = value.decode("ascii", "replace").strip(" \0")
            number = text.removeprefix("+")
            self.facts[tag] = int(number) if number.isdecimal() and len(number) < 10 else 1

    def _check_pixels(self, length: int) -> None:
        facts = self.facts
        if self.syntax and self.syntax not in UNCOMPRESSED:
            raise RejectedImage(f"unreadable: pixels of one piece in DICOM of transfer syntax {self.syntax}")
        if ROWS not in facts or COLUMNS not in facts:
            return
        pixels = facts[ROWS] * facts[COLUMNS] * facts.get(FRAMES, 1) * facts.get(SAMPLES, 1)
        claimed = pixels * facts.get(BITS_ALLOCATED, 8) // 8
        shown = f"{facts[COLUMNS]}x{facts[ROWS]} pixels need {claimed} bytes, the file holds {length}"
        if claimed > length:
            raise RejectedImage(f"unreadable: {shown}")
        if length >= 2 * claimed > 0:
            raise RejectedImage(f"unreadable: {shown}: several frames that its header does not count?")

    def _check_compressed(self, fragments: list[tuple[int, int]]) -> None:
        facts = self.facts
        if self.syntax in UNCOMPRESSED:
            raise RejectedImage("unreadable: compressed pixels in DICOM whose header says uncompressed")
        if ROWS in facts and COLUMNS in facts:
            check_stream(
                self.syntax,
                self.content,
                fragments,
                (facts[COLUMNS], facts[ROWS]),
                facts.get(SAMPLES, 1),
                facts.get(BITS_ALLOCATED, 8) // 8,
                facts.get(FRAMES, 1),
            )
