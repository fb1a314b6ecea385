"""Names of cases: they follow from a file's name below its SOURCE, not from where the SOURCE lies.

So the same data get the same names, and the same split into training and validation, on every machine. A name
that another file already has is made longer, folder by folder, up to the absolute path.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from pgl.cache.manifest import CaseRecord
from pgl.prepare.case import Job

LONGEST_NAME = 80

Fingerprints = Callable[[Sequence[Job]], Sequence[str]]


def possible_ids(path: str, name: str, suffix: str = "", part: str = "") -> tuple[str, ...]:
    """The names that a case may have in the cache, the preferred one first.

    Args:
        path: absolute path of the image file or DICOM folder.
        name: the end of ``path``, from below its SOURCE on, with "/".
        suffix: the end of ``name`` that is not to be seen in the case's name.
        part: which of several volumes at ``path``.

    Returns:
        One for each number of parts of ``path``, from ``name`` to all. The last belongs to no other path.
    """
    parts = Path(path).parts
    fewest = len(PurePosixPath(name).parts)
    longer = ("/".join(parts[-count:]) for count in range(fewest, len(parts) + 1))
    return tuple(_case_id(n[: -len(suffix) or None], f"{n}\0{part}") for n in longer)


def choose_ids(jobs: Sequence[Job], records: Sequence[CaseRecord], fingerprints: Fingerprints) -> list[Job]:
    """Give each job its case: the one it had before, else one that no other file has.

    A file that lies where a case of one of its names was made from is that case. So is a file of the same
    content where that case's source is gone: it was moved. Any other file gets the first name that is free.
    Of several that want one name, the one whose folders' names come first gets it: neither the order of the
    SOURCEs nor their place matters.

    Args:
        jobs: with ``case_ids``.
        records: the cases that are in the cache.
        fingerprints: gives the content of each of some jobs (see :func:`prepare_case.content_of`), "" if it
            cannot be read; asked only about files that may have been moved, as it reads them whole.

    Returns:
        The jobs in their order, with ``case_id``; no two have the same.
    """
    there = {record.case_id: record for record in records}
    chosen: dict[int, str] = {}
    order = sorted(range(len(jobs)), key=lambda i: Path(jobs[i].path).parts[::-1])

    def claim(wanted: Callable[[int, CaseRecord], bool]) -> None:
        taken = set(chosen.values())
        for i in (i for i in order if i not in chosen):
            own = next(
                (n for n in jobs[i].case_ids if n in there and n not in taken and wanted(i, there[n])), None
            )
            if own is not None:
                chosen[i] = own
                taken.add(own)

    claim(lambda i, record: _is_at(jobs[i].path, record))
    wanted_ids = {n for i in order if i not in chosen for n in jobs[i].case_ids}
    lost = {n for n in wanted_ids.intersection(there).difference(chosen.values()) if _is_lost(there[n])}
    maybe_moved = [i for i in order if i not in chosen and not lost.isdisjoint(jobs[i].case_ids)]
    if maybe_moved:
        contents = dict(zip(maybe_moved, fingerprints([jobs[i] for i in maybe_moved]), strict=True))
        claim(lambda i, record: record.case_id in lost and contents.get(i) == _content(record))
    taken = {*there, *chosen.values()}
    for choices in (1, None):  # the first choice of all goes before the second of any
        for i in (i for i in order if i not in chosen):
            free = next((n for n in jobs[i].case_ids[:choices] if n not in taken), None)
            if free is not None:
                chosen[i] = free
                taken.add(free)
    return [replace(job, case_id=chosen[i]) for i, job in enumerate(jobs)]


def _is_at(path: str, record: CaseRecord) -> bool:
    return path == record.source or os.path.realpath(path) == os.path.realpath(record.source)


def _is_lost(record: CaseRecord) -> bool:
    return bool(_content(record)) and not os.path.exists(record.source)


def _content(record: CaseRecord) -> str:
    return str(record.original.get("content_sha256", ""))


def _case_id(name: str, identity: str) -> str:
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    slug = (
        re.sub(r"[^A-Za-z0-9._]+", "-", ascii_name.replace("/", "_"))
        .strip("-._")[-LONGEST_NAME:]
        .strip("-._")
    )
    digest = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{slug or 'case'}-{digest}"
