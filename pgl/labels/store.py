"""Label volumes in a cache: written by ``pgl prepare``, read by block for training."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pgl.cache.manifest import MANIFEST, CaseRecord, read_manifest, sha256_of, triple
from pgl.cache.volume_file import clipped, open_volume, write_volume
from pgl.files.atomic import atomic_path, write_json
from pgl.labels.records import LabelRecord, label_file, parse_label, plain_label


def write_label(
    folder: Path,
    case: CaseRecord,
    label: np.ndarray,
    subject: str,
    classes: dict[int, str],
    source: str,
    key: str,
) -> LabelRecord:
    """Write a case's label, replacing an older one; it enters the manifest with ``CacheWriter.finish``.

    Args:
        folder: the cache.
        case: the case, finished.
        label: uint8 array of the case's shape.
        subject, classes, source, key: see :class:`LabelRecord`.

    Raises:
        TypeError: not a uint8 array of the case's shape.
    """
    if label.dtype != np.uint8 or label.shape != case.shape:
        raise TypeError(f"label must be a uint8 array {case.shape}, got {label.dtype} {label.shape}")
    name = label_file(case.case_id)
    sidecar = (folder / name).with_suffix(".json")
    sidecar.unlink(missing_ok=True)
    with atomic_path(folder / name) as temporary:
        write_volume(temporary, label)
        checksum = sha256_of(temporary)
    counts = np.bincount(label.ravel(), minlength=1)
    record = LabelRecord(
        case_id=case.case_id,
        subject=subject,
        file=name,
        shape=case.shape,
        sha256=checksum,
        case_sha256=case.sha256,
        classes=dict(classes),
        voxels={n: int(c) for n, c in enumerate(counts) if n and c},
        source=source,
        key=key,
    )
    write_json(sidecar, plain_label(record))
    return record


def read_labels(folder: str | os.PathLike[str]) -> list[LabelRecord]:
    """The labels that a cache's manifest lists.

    Raises:
        FileNotFoundError: no cache there, or a listed file is missing.
        ValueError: the manifest is damaged.
    """
    folder = Path(folder)
    entries = read_manifest(folder).get("labels", [])
    if not isinstance(entries, list):
        raise ValueError(f"{folder / MANIFEST} is damaged: 'labels' is no list; run pgl prepare again")
    records = [parse_label(entry, folder / MANIFEST) for entry in entries]
    for record in records:
        if not (folder / record.file).is_file():
            raise FileNotFoundError(
                f"{folder / record.file}, listed in {MANIFEST}, is missing; run pgl prepare again"
            )
    return records


def read_label_block(
    folder: Path, record: LabelRecord, start: Sequence[int], size: Sequence[int]
) -> np.ndarray:
    """A block of a label: uint8 of ``size``; what lies outside the volume is background.

    Args:
        folder: the cache.
        record: the label.
        start: first voxel (D, H, W); may be negative.
        size: voxels to read (D, H, W); may reach beyond the volume.

    Raises:
        ValueError: the file is damaged, or a negative size.
    """
    extent = triple(size, int)
    part = clipped(triple(start, int), extent, record.shape)
    block = np.zeros(extent, np.uint8)
    if part is not None:
        block[part[1]] = _read(folder, record, part[0])
    return block


def read_label_volume(folder: Path, record: LabelRecord) -> np.ndarray:
    """A whole label: uint8 [D, H, W]. Raises ValueError if the file is damaged."""
    return _read(folder, record, (slice(None),) * 3)


def verify_labels(folder: str | os.PathLike[str]) -> list[str]:
    """Hold every label of a cache against its checksum: one line for each that is damaged."""
    return [
        f"{record.case_id}: {record.file} does not have its checksum"
        for record in read_labels(folder)
        if not is_label_intact(Path(folder), record)
    ]


def is_label_intact(folder: Path, record: LabelRecord) -> bool:
    """Whether the file has the checksum that was noted when it was written."""
    try:
        return sha256_of(folder / record.file) == record.sha256
    except OSError:
        return False


def _read(folder: Path, record: LabelRecord, region: tuple[slice, ...]) -> np.ndarray:
    file = folder / record.file
    try:
        return open_volume(file, record.shape, np.uint8, folder)[region]
    except Exception as error:  # blosc2 raises nearly any of them
        raise ValueError(f"label {file} is damaged ({error}); run pgl prepare again to remake it") from error
