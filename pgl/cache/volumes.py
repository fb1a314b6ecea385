"""The volume cache: one chunked blosc2 file a case and a manifest, so that training reads small blocks
quickly.

Layout::

    CACHE/manifest.json           what the cache holds; VolumeCache reads only what is listed here
    CACHE/cases/ID.b2nd           int16 HU, axes (D, H, W) growing toward superior, posterior, left
    CACHE/cases/ID.json           the case's entry in the manifest, written when its .b2nd is complete
    CACHE/labels/ID.b2nd          uint8 class numbers on the case's grid, if it has a label (pgl.labels.store)
    CACHE/labels/ID.json          the label's entry in the manifest
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from pgl.cache.case_list import CaseList, packed
from pgl.cache.integrity import DamagedCase, chunks_of, damaged_chunk, store_checksums, stored_checksums
from pgl.cache.manifest import (
    CASE_ID,
    MANIFEST,
    REBUILD,
    CaseRecord,
    DamagedManifest,
    parse_record,
    read_manifest,
    sha256_of,
    triple,
    write_manifest,
)
from pgl.cache.volume_file import clipped, open_volume, write_volume
from pgl.files.atomic import PARTIAL_PREFIX, atomic_path, write_json
from pgl.labels.records import LABELS_FOLDER, labels_section, remove_label

CASES_FOLDER = "cases"

OPEN_FILES = 64


class CacheWriter:
    """Adds volumes to a cache; safe to interrupt at any moment, and usable from several processes on one
    folder.

    Args:
        path: the cache folder; made if missing.
        spacing_mm: spacing of all volumes in the cache, (D, H, W).

    Attributes:
        rebuilt: number of cases from which a manifest that was damaged or missing has been made anew; else 0.

    Raises:
        ValueError: the folder holds something else, or a cache of another spacing or version; or its manifest
            is damaged and no case is left.
    """

    def __init__(self, path: str | os.PathLike[str], spacing_mm: Sequence[float]) -> None:
        self.path = Path(path)
        self.spacing_mm = triple(spacing_mm, float)
        self.rebuilt = 0
        if (self.path / MANIFEST).exists():
            try:
                self._check_spacing(triple(read_manifest(self.path)["spacing_mm"], float))
            except DamagedManifest as error:
                if not self._rebuild():
                    raise ValueError(
                        f"{self.path / MANIFEST} is damaged and no finished case is left to make it from; "
                        "give another output folder, or delete this one"
                    ) from error
        elif self._rebuild():
            pass
        elif self.path.exists() and any(not entry.name.startswith(".") for entry in self.path.iterdir()):
            raise ValueError(
                f"{self.path} is not empty and holds no {MANIFEST}, so it is no cache; "
                "give another output folder"
            )
        else:
            write_manifest(self.path, self.spacing_mm, [])
        (self.path / CASES_FOLDER).mkdir(exist_ok=True)

    def _check_spacing(self, there: tuple[float, float, float]) -> None:
        if there != self.spacing_mm:
            raise ValueError(
                f"{self.path} holds a cache of spacing {there} mm (D, H, W), but {self.spacing_mm} was "
                "asked for; give another output folder, or delete this one to make it anew"
            )

    def _rebuild(self) -> int:
        """Make the manifest anew from the finished cases, if there are any; returns their number."""
        records = self.finished()
        for record in records:
            self._check_spacing(record.spacing_mm)
        if records:
            write_manifest(self.path, self.spacing_mm, records, labels_section(self.path, records))
        self.rebuilt = len(records)
        return self.rebuilt

    def add(
        self,
        case_id: str,
        volume: np.ndarray,
        origin_mm: Sequence[float] = (0.0, 0.0, 0.0),
        source: str = "",
        original: dict[str, Any] | None = None,
        key: str = "",
    ) -> CaseRecord:
        """Write one volume, replacing an older one of the same name. It enters the manifest with
        :meth:`finish`.

        Args:
            case_id: letters, digits, ``.``, ``_``, ``-``.
            volume: int16 array [D, H, W] in HU, axes growing toward superior, posterior, left.
            origin_mm, source, original, key: see :class:`CaseRecord`.

        Raises:
            ValueError, TypeError: a name or volume that cannot be stored.
        """
        if not CASE_ID.fullmatch(case_id) or case_id.startswith("."):
            raise ValueError(
                f"case_id must match {CASE_ID.pattern} and not begin with a dot, got {case_id!r}"
            )
        if volume.dtype != np.int16 or volume.ndim != 3 or 0 in volume.shape:
            raise TypeError(
                f"volume must be a non-empty int16 array [D, H, W], got {volume.dtype} {volume.shape}"
            )
        name = f"{CASES_FOLDER}/{case_id}.b2nd"
        sidecar = self._sidecar(case_id)
        sidecar.unlink(missing_ok=True)
        with atomic_path(self.path / name) as temporary:
            written = write_volume(temporary, volume)
            store_checksums(written)
            del written
            checksum = sha256_of(temporary)
        record = CaseRecord(
            case_id=case_id,
            file=name,
            shape=triple(volume.shape, int),
            spacing_mm=self.spacing_mm,
            origin_mm=triple(origin_mm, float),
            sha256=checksum,
            source=source,
            original=original or {},
            key=key,
        )
        write_json(sidecar, asdict(record))
        return record

    def case(self, case_id: str) -> CaseRecord | None:
        """The finished case of this name, or None."""
        sidecar = self._sidecar(case_id)
        try:
            record = parse_record(json.loads(sidecar.read_text("utf-8")), sidecar)
        except (ValueError, OSError, RecursionError):
            return None
        own = record.case_id == case_id and record.file == f"{CASES_FOLDER}/{case_id}.b2nd"
        return record if own and (self.path / record.file).is_file() else None

    def finished(self) -> list[CaseRecord]:
        """The finished cases in the folder, by name. An entry that cannot be read counts as not finished."""
        names = sorted(sidecar.stem for sidecar in (self.path / CASES_FOLDER).glob("*.json"))
        return [record for record in map(self.case, names) if record is not None]

    def is_intact(self, record: CaseRecord) -> bool:
        """Whether the case's file has the checksum that was noted when it was written."""
        try:
            return sha256_of(self.path / record.file) == record.sha256
        except OSError:
            return False

    def move(self, record: CaseRecord, source: str) -> None:
        """Note that what a finished case was made from lies at ``source`` now."""
        write_json(self._sidecar(record.case_id), asdict(replace(record, source=source)))

    def remove(self, case_id: str) -> None:
        """Delete a case, if it is there."""
        self._sidecar(case_id).unlink(missing_ok=True)
        (self.path / CASES_FOLDER / f"{case_id}.b2nd").unlink(missing_ok=True)
        remove_label(self.path, case_id)

    def remove_unfinished(self) -> None:
        """Delete what an interrupted run left behind: partial files, and volumes without their entry."""
        folder = self.path / CASES_FOLDER
        kept = {record.case_id for record in self.finished()}
        for place in (self.path, folder, self.path / LABELS_FOLDER):
            for file in place.glob(f"{PARTIAL_PREFIX}*"):
                file.unlink(missing_ok=True)
        for file in [*folder.glob("*.b2nd"), *folder.glob("*.json")]:
            if file.stem not in kept:
                file.unlink(missing_ok=True)

    def finish(self) -> list[CaseRecord]:
        """Write the manifest from the complete cases, and return them. May be called as often as wanted."""
        records = self.finished()
        write_manifest(self.path, self.spacing_mm, records, labels_section(self.path, records))
        return records

    def _sidecar(self, case_id: str) -> Path:
        return self.path / CASES_FOLDER / f"{case_id}.json"


class VolumeCache:
    """Reads blocks of volumes from a cache that ``pgl prepare`` made.

    A process that reads from a chunk for the first time holds it against its checksum.

    Files are opened when first read, anew in every process, so an object travels into data loader workers, by
    fork as well as by pickling.

    Args:
        path: the cache folder.

    Attributes:
        cases: what the cache holds, in the order of the indices.
        spacing_mm: spacing (D, H, W) of all volumes.

    Raises:
        FileNotFoundError: no such folder, no manifest in it, or a listed file is missing.
        ValueError: a manifest of another format or version, damaged, empty, or with a file outside the cache.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        manifest = read_manifest(self.path, packed)
        self.spacing_mm: tuple[float, float, float] = triple(manifest["spacing_mm"], float)
        self.cases: Sequence[CaseRecord] = CaseList(manifest["cases"], self.path / MANIFEST)
        if not self.cases:
            raise ValueError(
                f"{self.path} holds no finished case; run pgl prepare (again) with this output folder"
            )
        # Not with pathlib, which has the interpreter remember every part of ten thousand names.
        folder = os.path.realpath(self.path)
        names: set[str] = set()
        for record in self.cases:
            if record.case_id in names:
                raise ValueError(f"{self.path / MANIFEST} lists case {record.case_id!r} twice; {REBUILD}")
            names.add(record.case_id)
            if record.spacing_mm != self.spacing_mm:
                raise ValueError(
                    f"{self.path / MANIFEST}: case {record.case_id!r} has spacing {record.spacing_mm} mm, "
                    f"the cache {self.spacing_mm} mm; {REBUILD}"
                )
            file = os.path.join(self.path, record.file)
            if not os.path.realpath(file).startswith(os.path.join(folder, "")):
                raise ValueError(
                    f"case {record.case_id!r} points outside the cache: {record.file!r}; refused"
                )
            if not os.path.isfile(file):
                raise FileNotFoundError(
                    f"{file}, listed in {MANIFEST}, is missing; run pgl prepare again to remake it"
                )
        self._reset()

    def __len__(self) -> int:
        return len(self.cases)

    def read_block(
        self, index: int, start: Sequence[int], size: Sequence[int], fill: int = -1024
    ) -> np.ndarray:
        """Read a block of a volume.

        Args:
            index: which case.
            start: first voxel (D, H, W); may be negative.
            size: voxels to read (D, H, W); may reach beyond the volume.
            fill: value of voxels outside the volume: air.

        Returns:
            int16 array of ``size``.

        Raises:
            DamagedCase: the file is damaged where the block lies, or cannot be opened.
        """
        extent = triple(size, int)
        part = clipped(triple(start, int), extent, self.cases[index].shape)
        if part is None:
            return np.full(extent, fill, dtype=np.int16)
        found = self._read(index, part[0])
        if found.shape == extent:
            return found
        block = np.full(extent, fill, dtype=np.int16)
        block[part[1]] = found
        return block

    def read_volume(self, index: int) -> np.ndarray:
        """Read a whole volume: int16 [D, H, W]; raises like :meth:`read_block`."""
        return self._read(index, tuple(slice(0, n) for n in self.cases[index].shape))

    def damage(self, index: int) -> str | None:
        """What is wrong with a case's file, None if all of it is as it was written. A process reads the file
        for this once."""
        if index not in self._damage:
            try:
                with self._opened(index) as (volume, sums):
                    self._check(index, volume, sums, range(volume.schunk.nchunks))
                self._damage[index] = None
            except DamagedCase as error:
                self._damage[index] = str(error)
        return self._damage[index]

    def verify(self) -> list[str]:
        """Read every file and hold it against its checksum.

        Returns:
            One line for each case that is damaged; empty if all are intact.
        """
        return [
            f"{record.case_id}: {record.file} does not have its checksum"
            for record in self.cases
            if sha256_of(self.path / record.file) != record.sha256
        ]

    def _read(self, index: int, region: tuple[slice, ...]) -> np.ndarray:
        with self._opened(index) as (volume, sums):
            self._check(index, volume, sums, chunks_of(volume, region))
            return volume[region]

    @contextmanager
    def _opened(self, index: int) -> Iterator[tuple[blosc2.NDArray, np.ndarray]]:
        """A case's open file and its checksums, for one thread at a time."""
        # After a fork, open anew: an inherited lock may be held by a thread that is not there any more, and
        # inherited handles may share one file position.
        if self._process != os.getpid():
            self._reset()
        record = self.cases[index]
        with self._lock:
            opened = self._volumes.pop(record.file, None) or self._open(index, record)
            self._volumes[record.file] = opened
            if len(self._volumes) > OPEN_FILES:
                self._volumes.popitem(last=False)
            try:
                yield opened
            except RuntimeError as error:
                raise self._damaged(record, str(error)) from error

    def _check(self, index: int, volume: blosc2.NDArray, sums: np.ndarray, numbers: Iterable[int]) -> None:
        bad = damaged_chunk(volume, sums, numbers, self._checked[index])
        if bad is not None:
            raise self._damaged(self.cases[index], f"chunk {bad} does not have its checksum")

    def _open(self, index: int, record: CaseRecord) -> tuple[blosc2.NDArray, np.ndarray]:
        volume = _open_volume(self.path, record)
        try:
            sums = stored_checksums(volume)
        except Exception as error:  # whatever a damaged file makes of it
            raise self._damaged(record, str(error)) from error
        self._checked.setdefault(index, bytearray(len(sums)))
        return volume, sums

    def _damaged(self, record: CaseRecord, how: str) -> DamagedCase:
        return DamagedCase(
            f"{self.path / record.file} is damaged ({how}); run pgl prepare again to remake it, or go on "
            "without it with train.skip_damaged"
        )

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._volumes: OrderedDict[str, tuple[blosc2.NDArray, np.ndarray]] = OrderedDict()
        # By case: which of its chunks this process has found in order; and the answer of `damage`.
        self._checked: dict[int, bytearray] = {}
        self._damage: dict[int, str | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "spacing_mm": self.spacing_mm, "cases": self.cases}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()


def _open_volume(folder: Path, record: CaseRecord) -> blosc2.NDArray:
    file = folder / record.file
    try:
        return open_volume(file, record.shape, np.int16, folder)
    except Exception as error:  # blosc2 raises nearly any of them
        raise DamagedCase(f"{file} cannot be opened ({error}); run pgl prepare again to remake it") from error
