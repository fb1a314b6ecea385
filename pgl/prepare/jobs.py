"""Found files -> jobs of ``pgl prepare``: DICOM slices become series, every volume gets its case's name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from rich.progress import Progress

from pgl.cache.manifest import CaseRecord
from pgl.files.atomic import is_full_disk
from pgl.images import (
    Found,
    Limits,
    SliceHeader,
    group_slices,
    read_headers,
    unreadable_slices,
)
from pgl.images.native import split_suffixes
from pgl.prepare.case import Job, content_of
from pgl.prepare.ids import choose_ids, possible_ids
from pgl.prepare.report import PrepareReport, ReportEntry
from pgl.processes.workers import JobFailed, WorkerDied, run_isolated

HEADERS_PER_JOB = 200


def list_jobs(
    found: Found,
    records: Sequence[CaseRecord],
    output: str,
    limits: Limits,
    workers: int,
    report: PrepareReport,
    progress: Progress,
    timeout_s: float = 0.0,
) -> list[Job]:
    """Read the headers of what may be DICOM, and make a job of each volume.

    Args:
        found: files below the SOURCEs.
        records: the cases that are in the cache.
        output: the cache folder.
        limits: what the volumes must fulfil.
        workers: number of processes.
        report: files that are ignored or rejected already now are entered here.
        progress: shows them, and how far the reading is.
        timeout_s: seconds that a batch of headers may take; 0 for no limit.

    Returns:
        The jobs, ordered by path.

    Raises:
        RuntimeError: the headers cannot be read for want of room for temporary files.
    """
    images = list(found.images)
    by_path = {file.path: file for file in found.maybe_dicom}
    headers: list[SliceHeader] = []
    unreadable = [path for path, _ in found.rejected]
    for entry in _read_all_headers(sorted(by_path), workers, progress, timeout_s):
        path = entry["path"]
        if "header" in entry:
            headers.append(SliceHeader(**entry["header"]))
        elif "ignored" in entry:
            report.ignored.append(ReportEntry(path, entry["ignored"]))
        else:
            unreadable.append(path)
            if "rejected" in entry:
                report.reject(path, entry["rejected"], progress.console)
            else:
                images.append(by_path[path])
    jobs = []
    for file in images:
        ids = possible_ids(file.path, file.name, suffix=split_suffixes(file.name)[1])
        jobs.append(Job(file.path, (), output, limits, ids))
    numbers: dict[tuple[str, str], int] = {}
    stacks = group_slices(sorted(headers, key=lambda header: header.path))
    for stack, lacking in zip(stacks, unreadable_slices(stacks, unreadable), strict=True):
        folder, series = os.path.dirname(stack[0].path), stack[0].series_uid
        name = os.path.dirname(by_path[stack[0].path].name) or os.path.basename(folder)
        number = numbers[folder, series] = numbers.get((folder, series), -1) + 1
        ids = possible_ids(folder, name, part=f"{series}\0{number}")
        path = folder if len(stack) > 1 else stack[0].path
        jobs.append(Job(path, tuple(stack), output, limits, ids, lacking))

    def fingerprints(some: Sequence[Job]) -> list[str]:
        return _read_contents(some, workers, progress, timeout_s)

    jobs = choose_ids(jobs, records, fingerprints)
    return sorted(jobs, key=lambda job: (job.path, job.case_id))


def _read_all_headers(
    paths: list[str], workers: int, progress: Progress, timeout_s: float
) -> Iterator[dict[str, Any]]:
    if not paths:
        return
    bar = progress.add_task("reading DICOM headers", total=len(paths))
    batches = [paths[i : i + HEADERS_PER_JOB] for i in range(0, len(paths), HEADERS_PER_JOB)]
    crashed: list[str] = []
    for batch, answer in run_isolated(read_headers, batches, min(workers, len(batches)), timeout_s):
        if isinstance(answer, WorkerDied | JobFailed):
            crashed += batch
        else:
            yield from answer
            progress.advance(bar, len(batch))
    for [path], answer in run_isolated(read_headers, [[path] for path in crashed], workers, timeout_s):
        if is_full_disk(answer):
            raise RuntimeError(
                f"could not read the header of {path}: {answer} (temporary files have no room?)"
            ) from answer
        if isinstance(answer, WorkerDied | JobFailed):
            answer = [{"path": path, "rejected": f"crashes the reader: {answer}"}]
        yield from answer
        progress.advance(bar)


def _read_contents(jobs: Sequence[Job], workers: int, progress: Progress, timeout_s: float) -> list[str]:
    bar = progress.add_task("looking for moved files", total=len(jobs))
    contents = {}
    for job, answer in run_isolated(content_of, jobs, min(workers, len(jobs)), timeout_s):
        contents[job.case_ids] = answer if isinstance(answer, str) else ""
        progress.advance(bar)
    return [contents[job.case_ids] for job in jobs]
