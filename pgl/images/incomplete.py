"""Unreadable files beside DICOM slices: each may be a slice, and without it the series is incomplete.

The slices' positions cannot tell: a stack that lost its first or last slice is still even.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from pgl.images.dicom import SliceHeader

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
STUDY_UID, SERIES_UID = b"\x20\x00\x0d\x00", b"\x20\x00\x0e\x00"  # tags (0020,000D), (0020,000E)
LONGEST_UID = 64
HEADER_BYTES = 1 << 20
CHANGING_PART = re.compile(r"[0-9a-f]{8,}|\d+")  # counters, UIDs, hashes


def unreadable_slices(
    stacks: Sequence[Sequence[SliceHeader]], unreadable: Sequence[str]
) -> list[tuple[str, ...]]:
    """Find the unreadable files that may be slices of DICOM stacks.

    They are those in the stack's folder that name its series in what is left of their header. Where that much
    is not left: those that begin as DICOM does, and those named as slices are.

    Args:
        stacks: slices that belong together (:func:`group_slices`).
        unreadable: paths of files that cannot be read, DICOM or not.

    Returns:
        For each stack the file names, sorted.
    """
    suspects: dict[str, list[tuple[str, bool, str | None]]] = {}
    folders = {os.path.dirname(stack[0].path) for stack in stacks}
    for path in sorted(unreadable):
        folder, name = os.path.split(path)
        if folder in folders:
            head = _head(path)
            suspects.setdefault(folder, []).append((name, head[128:132] == b"DICM", _series_uid(head)))
    found = []
    for stack in stacks:
        lacking = []
        patterns = {_pattern(header.name) for header in stack}
        for name, is_dicom, series_uid in suspects.get(os.path.dirname(stack[0].path), []):
            is_named_so = name.lower().endswith(DICOM_SUFFIXES) or _pattern(name) in patterns
            if series_uid == stack[0].series_uid or (series_uid is None and (is_dicom or is_named_so)):
                lacking.append(name)
        found.append(tuple(lacking))
    return found


def _head(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(HEADER_BYTES)
    except OSError:
        return b""


def _pattern(name: str) -> str:
    return CHANGING_PART.sub("0", name.lower())


def _series_uid(head: bytes) -> str | None:
    # Nested items may name other series; only at the top level does the study's UID stand just before it.
    start = head.find(STUDY_UID)
    while start >= 0:
        study = _uid_at(head, start)
        if study is not None and head[study[1] : study[1] + 4] == SERIES_UID:
            series = _uid_at(head, study[1])
            if series is not None:
                return series[0]
        start = head.find(STUDY_UID, start + 1)
    return None


def _uid_at(head: bytes, start: int) -> tuple[str, int] | None:
    """The UID of the element at ``start`` (little endian, explicit or implicit VR), and where it ends."""
    explicit = head[start + 4 : start + 6] == b"UI"
    length = head[start + 6 : start + 8] if explicit else head[start + 4 : start + 8]
    end = start + 8 + int.from_bytes(length, "little")
    if end - start - 8 > LONGEST_UID or end > len(head):
        return None
    return head[start + 8 : end].decode("ascii", "replace").strip(" \0"), end
