"""The volumes to pretrain on: those of a cache, but for the cases that are tested on later."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path

from pgl.cache.manifest import CaseRecord, write_manifest
from pgl.cache.volumes import VolumeCache
from pgl.downstream.config import SplitSettings
from pgl.downstream.splits import split_cases
from pgl.files.atomic import atomic_path
from pgl.files.lock import reading
from pgl.labels.store import read_labels


def write_unseen(
    data: Path, unlabelled: Path | None, output: Path, split: SplitSettings
) -> tuple[list[str], list[str]]:
    """Make the cache ``output`` of the volumes of ``unlabelled`` (or ``data``) without the test cases.

    A case is left out if it is a test case, or has the same voxels or the same source file as one, under
    whatever name and in whatever cache. Volumes are hard links where the file system can. Both caches are
    kept as they are meanwhile.

    Args:
        data: the labelled cache.
        unlabelled: another cache to pretrain on, None for ``data``.
        output: the folder; written anew if it differs.
        split: who is tested on.

    Returns:
        Names of the cases that are kept, and of those that are left out.

    Raises:
        FileNotFoundError, ValueError: there is no such cache, it has no labels, or nothing is left of it.
        InUse: ``pgl prepare`` is changing one of them.
    """
    with ExitStack() as locks:
        for cache in {data, data if unlabelled is None else unlabelled}:
            locks.enter_context(reading(cache))
        return _write_unseen(data, unlabelled, output, split)


def _write_unseen(
    data: Path, unlabelled: Path | None, output: Path, split: SplitSettings
) -> tuple[list[str], list[str]]:
    labels = read_labels(data)
    if not labels:
        raise ValueError(f"{data} holds no labels: run pgl prepare with --labels DIR, see docs/data.md")
    # The test cases do not depend on fraction and seed.
    test = set(split_cases([record.subject for record in labels], split, 1.0, 0).test)
    test_ids = {record.case_id for record in labels if record.subject in test}
    labelled = {case.case_id: case for case in VolumeCache(data).cases}
    cache = VolumeCache(data if unlabelled is None else unlabelled)
    known = {mark for name in test_ids for mark in labelled[name].marks}
    # In another cache a name tells nothing.
    named = test_ids if unlabelled is None else set()
    left_out = [case for case in cache.cases if case.case_id in named or known & case.marks]
    names = {case.case_id for case in left_out}
    kept = [case for case in cache.cases if case.case_id not in names]
    if not kept:
        raise ValueError(f"{cache.path} holds test cases alone: nothing is left to pretrain on")
    if _listed(output) != kept:
        for case in kept:
            _bring(cache.path / case.file, output / case.file)
        write_manifest(output, cache.spacing_mm, kept)
    return [case.case_id for case in kept], sorted(names)


def _listed(folder: Path) -> list[CaseRecord]:
    try:
        return list(VolumeCache(folder).cases)
    except (OSError, ValueError):
        return []


def _bring(source: Path, target: Path) -> None:
    # Renaming one name of a file to another of the same file would do nothing.
    target.unlink(missing_ok=True)
    with atomic_path(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
