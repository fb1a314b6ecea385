"""One image file or DICOM series -> one case of the cache. Runs in a worker process of ``prepare.py``."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from pgl.cache.manifest import sha256_of
from pgl.cache.volumes import CacheWriter
from pgl.files.atomic import is_full_disk
from pgl.images import (
    HU_RANGE,
    Limits,
    RejectedImage,
    SliceHeader,
    check_intensities,
    check_size,
    files_of,
    read_file,
    read_series,
    resample,
)

# Raise when the same source and settings would give other voxels than before: then every case is made anew.
PROCESSING_VERSION = 1
MOST_NAMED = 5


@dataclass(frozen=True)
class Job:
    """A volume to prepare.

    Attributes:
        path: what the report names: the file, or the folder of the DICOM series.
        headers: of the DICOM slices; empty for an image file.
        output: the cache folder.
        limits: what the volume must fulfil.
        case_ids: the names it may have in the cache, the preferred one first.
        unreadable: names of unreadable files that may be slices of the series.
        case_id: the one of ``case_ids`` that it has.
        readers: who is reading the cache, in words; then a case that is there must stay as it is.
    """

    path: str
    headers: tuple[SliceHeader, ...]
    output: str
    limits: Limits
    case_ids: tuple[str, ...]
    unreadable: tuple[str, ...] = ()
    case_id: str = ""
    readers: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a job: ``status`` is "new", "unchanged" or "rejected"; ``reason`` says it in words."""

    status: str
    reason: str


def prepare_case(job: Job) -> Outcome:
    """Read, check, resample and store one volume, unless a current copy is already in the cache.

    Anything that is wrong with the source is an :class:`Outcome` "rejected"; exceptions are those of writing.

    Raises:
        OSError: something cannot be written, for example because the disk is full.
    """
    writer = CacheWriter(job.output, job.limits.spacing_mm)
    try:
        if job.unreadable:
            raise RejectedImage(_incomplete(job.unreadable))
        key = _key(job)
        there = writer.case(job.case_id)
        current = there if there is not None and there.key == key and writer.is_intact(there) else None
        if current is None:
            if there is not None and job.readers:
                return Outcome("rejected", stays(job.readers))
            volume, origin_mm, original = _read(job)
    except RejectedImage as error:
        return Outcome("rejected", str(error))
    except MemoryError:
        return Outcome("rejected", "not enough memory to read it; use fewer workers")
    except Exception as error:
        if is_full_disk(error):
            raise
        return Outcome("rejected", f"unreadable: {type(error).__name__}: {error}")
    # From here on whatever fails is the cache's, not the source's.
    if current is not None:
        if current.source == job.path:
            return Outcome("unchanged", "unchanged since it was cached")
        writer.move(current, job.path)
        return Outcome("unchanged", f"unchanged since it was cached from {current.source}")
    writer.add(job.case_id, volume, origin_mm, job.path, original, key)
    before, after = ("x".join(map(str, size)) for size in (original["size_xyz"][::-1], volume.shape))
    return Outcome("new", f"cached: {before} voxels (D, H, W) became {after}")


def _read(job: Job) -> tuple[np.ndarray, tuple[float, float, float], dict[str, Any]]:
    """The job's volume on the common grid, the origin of that grid, and what the source says of itself."""
    if job.headers:
        image, grid = read_series(job.headers, job.limits)
    else:
        image, grid = read_file(job.path, job.limits)
    check_size(grid, job.limits)
    check_intensities(sitk.GetArrayViewFromImage(image))
    original = {
        "size_xyz": image.GetSize(),
        "spacing_xyz_mm": image.GetSpacing(),
        "origin_xyz_mm": image.GetOrigin(),
        "direction_xyz": image.GetDirection(),
        "pixel_type": image.GetPixelIDTypeAsString(),
        "files": len(job.headers) or 1,
        "series_uid": job.headers[0].series_uid if job.headers else "",
        "content_sha256": content_of(job),
    }
    return resample(image, grid), grid.origin_mm, original


def stays(readers: str) -> str:
    """Why something is left in the cache as it is."""
    return f"left as it is in the cache, though it changed: read by {readers}; prepare again after that"


def content_of(job: Job) -> str:
    """A checksum of the bytes of all source files, wherever they lie."""
    digests = sorted(sha256_of(Path(file)) for file in _files(job))
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _key(job: Job) -> str:
    """Changes when the source files, the settings or the processing change, but not with their folder."""
    content: dict[str, Any] = {
        "processing": PROCESSING_VERSION,
        "hu_range": HU_RANGE,
        "limits": asdict(job.limits),
        "files": sorted(
            (os.path.basename(f), os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in _files(job)
        ),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _files(job: Job) -> list[str]:
    return [header.path for header in job.headers] or files_of(job.path)


def _incomplete(unreadable: tuple[str, ...]) -> str:
    if len(unreadable) == 1:
        return f"incomplete: {unreadable[0]}, which may be a slice of it, cannot be read"
    names = ", ".join(unreadable[:MOST_NAMED])
    if len(unreadable) > MOST_NAMED:
        names += f" and {len(unreadable) - MOST_NAMED} more"
    return f"incomplete: {len(unreadable)} files that may be slices of it cannot be read: {names}"
