"""The manifest of a volume cache: what is in it, and the checks on what is read from it.

A manifest may be damaged, or come from somebody else: nothing in it is used before it is checked.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pgl.files.atomic import write_json

FORMAT = "pgl-volume-cache"
VERSION = 1
MANIFEST = "manifest.json"
REBUILD = "run pgl prepare with this output folder again, which lists the finished cases anew"
CASE_ID = re.compile(r"[A-Za-z0-9._-]{1,120}")
SHA256 = re.compile(r"[0-9a-f]{64}")
# 64 GiB of int16: a shape beyond that was never read from a scanner.
MOST_VOXELS = 2**35
AXES = "D, H, W; index grows toward superior, posterior, left"


class DamagedManifest(ValueError):
    """The manifest's text is broken; ``pgl prepare`` can make it anew from the cases."""


@dataclass(frozen=True)
class CaseRecord:
    """One case of the cache. All triples are (D, H, W).

    Attributes:
        case_id: its name; unique in the cache, and safe as a file name.
        file: its volume, relative to the cache folder.
        shape: voxels.
        spacing_mm: size of a voxel.
        origin_mm: centre of voxel (0, 0, 0) in the patient's frame: superior, posterior, left (LPS,
            reversed).
        sha256: checksum of the file.
        source: the image file or DICOM folder it was made from.
        original: geometry of the source as SimpleITK gives it (names end in _xyz), pixel type, file count,
            checksum of its content.
        key: fingerprint of source and settings, by which a later run knows whether the case is still current.
    """

    case_id: str
    file: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]
    sha256: str
    source: str = ""
    original: dict[str, Any] = field(default_factory=dict)
    key: str = ""

    @property
    def marks(self) -> set[str]:
        """What a copy of the case shares with it under whatever name: checksums of its voxels and of the
        content of its source."""
        content = str(self.original.get("content_sha256", ""))
        return {self.sha256, content} - {""}


def write_manifest(
    folder: Path,
    spacing_mm: tuple[float, float, float],
    records: list[CaseRecord],
    labels: Sequence[dict[str, Any]] = (),
) -> None:
    """Write ``folder``'s manifest, atomically; ``labels`` as :mod:`pgl.labels.records` makes them."""
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "axes": AXES,
        "dtype": "int16",
        "unit": "HU",
        "spacing_mm": spacing_mm,
        "cases": [asdict(record) for record in records],
        "labels": list(labels),
    }
    write_json(folder / MANIFEST, manifest)


def read_manifest(folder: Path, entry: Callable[[dict[str, Any]], Any] | None = None) -> dict[str, Any]:
    """The manifest of a cache, its frame checked; ``entry`` turns each object in it into something else."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise FileNotFoundError(
            f"cache folder {os.fspath(folder)!r} does not exist; make it with pgl prepare"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist, so {folder} is no finished cache; make one with pgl prepare "
            "(if finished cases lie in the folder, it lists them anew)"
        )
    try:
        manifest = json.loads(path.read_text("utf-8"), object_hook=entry)
    except (ValueError, RecursionError) as error:
        raise DamagedManifest(f"{path} is damaged ({error}); {REBUILD}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is not the manifest of a volume cache (format {FORMAT!r} expected)")
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {manifest.get('version')!r}, this program reads version {VERSION}; "
            "run pgl prepare with another output folder"
        )
    if not isinstance(manifest.get("cases"), list) or not _is_triple(manifest.get("spacing_mm")):
        raise DamagedManifest(f"{path} is damaged: it lacks 'cases' or 'spacing_mm'; {REBUILD}")
    return manifest


def parse_record(entry: Any, where: Path) -> CaseRecord:
    try:
        record = CaseRecord(
            case_id=text_of(entry, "case_id"),
            file=text_of(entry, "file"),
            shape=triple(entry["shape"], int),
            spacing_mm=triple(entry["spacing_mm"], float),
            origin_mm=triple(entry["origin_mm"], float),
            sha256=text_of(entry, "sha256"),
            source=text_of(entry, "source", ""),
            original=dict(entry.get("original", {})),
            key=text_of(entry, "key", ""),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{where} has a damaged entry ({error!r}); {REBUILD}") from error
    if not CASE_ID.fullmatch(record.case_id) or record.case_id.startswith("."):
        raise ValueError(f"{where}: {record.case_id!r} is no name of a case; {REBUILD}")
    if not SHA256.fullmatch(record.sha256):
        raise ValueError(f"{where}: case {record.case_id!r} has no SHA-256 but {record.sha256!r}; {REBUILD}")
    if min(record.shape) < 1 or math.prod(record.shape) > MOST_VOXELS:
        raise ValueError(
            f"{where}: case {record.case_id!r} has shape {record.shape}, expected three whole numbers from "
            f"1, and no more than {MOST_VOXELS} voxels; {REBUILD}"
        )
    if min(record.spacing_mm) <= 0:
        raise ValueError(
            f"{where}: case {record.case_id!r} has spacing {record.spacing_mm} mm, expected positive numbers"
        )
    # Checked on the text, before the file system is asked about it. Not with pathlib, which has the
    # interpreter remember every part of ten thousand names.
    if (
        record.file.startswith("/")
        or ".." in record.file.split("/")
        or "\\" in record.file
        or ":" in record.file
        or "\0" in record.file
    ):
        raise ValueError(
            f"{where}: case {record.case_id!r} points outside the cache: {record.file!r}; refused"
        )
    return record


def text_of(entry: Any, key: str, default: str | None = None) -> str:
    """The text under ``key``. Raises KeyError if it is missing, TypeError if it is no text."""
    value = entry[key] if default is None else entry.get(key, default)
    if not isinstance(value, str):
        raise TypeError(f"{key} must be text, got {value!r}")
    return value


def _is_triple(values: Any) -> bool:
    return isinstance(values, list) and len(values) == 3 and all(isinstance(v, int | float) for v in values)


def triple(values: Sequence[Any], kind: type) -> Any:
    if len(values) != 3:
        raise ValueError(f"expected three numbers (D, H, W), got {tuple(values)}")
    if any(isinstance(value, bool | str) for value in values):
        raise ValueError(f"expected three numbers (D, H, W), got {tuple(values)}")
    converted = tuple(kind(value) for value in values)
    if any(not math.isfinite(c) or c != v for c, v in zip(converted, values, strict=True)):
        raise ValueError(f"expected three {kind.__name__} numbers (D, H, W), got {tuple(values)}")
    return converted


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
