"""One image file or DICOM series -> one case of the cache. Runs in a worker process of ``prepare.py``."""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from dataclasses import asdict, dataclass
from typing import Any

import SimpleITK as sitk

from pgl.cache import CacheWriter
from pgl.images import (
    HU_RANGE,
    Limits,
    RejectedImage,
    SliceHeader,
    SourceFile,
    check_intensities,
    check_size,
    files_of,
    read_file,
    read_series,
    resample,
)
from pgl.images.native import split_suffixes

# Raise when the same source and settings would give other voxels than before: then every case is made anew.
PROCESSING_VERSION = 1
LONGEST_NAME = 80


@dataclass(frozen=True)
class Job:
    """A volume to prepare.

    Attributes:
        case_id: its name in the cache.
        path: what the report names: the file, or the folder of the DICOM series.
        headers: of the DICOM slices; empty for an image file.
        output: the cache folder.
        limits: what the volume must fulfil.
    """

    case_id: str
    path: str
    headers: tuple[SliceHeader, ...]
    output: str
    limits: Limits


@dataclass(frozen=True)
class Outcome:
    """What became of a job: ``status`` is "new", "unchanged" or "rejected"; ``reason`` says it in words."""

    status: str
    reason: str


def file_job(file: SourceFile, output: str, limits: Limits) -> Job:
    """The job for an image file."""
    name = file.name[: -len(split_suffixes(file.name)[1]) or None]
    return Job(_case_id(name, file.path), file.path, (), output, limits)


def series_job(
    folder: SourceFile, headers: list[SliceHeader], number: int, output: str, limits: Limits
) -> Job:
    """The job for stack ``number`` of the DICOM files in ``folder``."""
    case_id = _case_id(folder.name, f"{folder.path}\0{headers[0].series_uid}\0{number}")
    path = folder.path if len(headers) > 1 else headers[0].path
    return Job(case_id, path, tuple(headers), output, limits)


def prepare_case(job: Job) -> Outcome:
    """Read, check, resample and store one volume, unless a current copy is already in the cache.

    Anything that is wrong with the source is an :class:`Outcome` "rejected"; exceptions are those of writing.
    """
    writer = CacheWriter(job.output, job.limits.spacing_mm)
    try:
        key = _key(job)
        there = writer.case(job.case_id)
        if there is not None and there.key == key and writer.is_intact(there):
            return Outcome("unchanged", "unchanged since it was cached")
        if job.headers:
            image, grid = read_series(job.headers, job.limits)
        else:
            image, grid = read_file(job.path, job.limits)
        check_intensities(sitk.GetArrayViewFromImage(image))
        check_size(grid, job.limits)
        original = {
            "size_xyz": image.GetSize(),
            "spacing_xyz_mm": image.GetSpacing(),
            "origin_xyz_mm": image.GetOrigin(),
            "direction_xyz": image.GetDirection(),
            "pixel_type": image.GetPixelIDTypeAsString(),
            "files": len(job.headers) or 1,
            "series_uid": job.headers[0].series_uid if job.headers else "",
        }
        volume = resample(image, grid)
    except RejectedImage as error:
        return Outcome("rejected", str(error))
    except MemoryError:
        return Outcome("rejected", "not enough memory to read it; use fewer workers")
    except Exception as error:
        return Outcome("rejected", f"unreadable: {type(error).__name__}: {error}")
    writer.add(job.case_id, volume, grid.origin_mm, job.path, original, key)
    before, after = ("x".join(map(str, size)) for size in (image.GetSize()[::-1], volume.shape))
    return Outcome("new", f"cached: {before} voxels (D, H, W) became {after}")


def _key(job: Job) -> str:
    """Changes when the source files, the settings or the processing change."""
    files = [header.path for header in job.headers] or files_of(job.path)
    content: dict[str, Any] = {
        "processing": PROCESSING_VERSION,
        "hu_range": HU_RANGE,
        "limits": asdict(job.limits),
        "files": sorted((os.path.abspath(f), os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _case_id(name: str, identity: str) -> str:
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    slug = (
        re.sub(r"[^A-Za-z0-9._]+", "-", ascii_name.replace("/", "_"))
        .strip("-._")[-LONGEST_NAME:]
        .strip("-._")
    )
    digest = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{slug or 'case'}-{digest}"
