"""The labels of the cases that ``pgl prepare`` has just cached: checked, resampled, stored.

They come after the images, so that a label can be held against the geometry of its image.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from pgl.cache.manifest import CaseRecord
from pgl.cache.volumes import CacheWriter
from pgl.files.atomic import is_full_disk
from pgl.images import Grid, Limits, RejectedImage, files_of
from pgl.labels.alignment import Geometry, misalignment
from pgl.labels.layouts import LabelPlan, LabelTarget, plan_layouts
from pgl.labels.pairs import Pairs
from pgl.labels.reading import check_classes, class_numbers, read_label
from pgl.labels.records import LabelRecord, finished_labels, remove_label
from pgl.labels.resampling import resample_label
from pgl.labels.settings import LabelSettings
from pgl.labels.store import is_label_intact, write_label
from pgl.prepare.case import Outcome, stays
from pgl.prepare.report import PrepareReport, ReportEntry
from pgl.processes.workers import JobFailed, WorkerDied, run_isolated

# Raise when the same label and settings would give other voxels than before.
LABEL_VERSION = 1


@dataclass(frozen=True)
class LabelJob:
    """A label to prepare: for which case, from which file, how; ``readers`` as in :class:`Job`."""

    output: str
    case: CaseRecord
    target: LabelTarget
    classes: tuple[tuple[int, str], ...]
    limits: Limits
    settings: LabelSettings
    readers: str = ""


class LabelPreparation:
    """What a run of ``pgl prepare`` does about labels.

    Args:
        sources: the SOURCEs.
        settings: where labels lie.

    Raises:
        FileNotFoundError, ValueError: see :func:`plan_layouts` and :class:`Pairs`.
    """

    def __init__(self, sources: Sequence[str | os.PathLike[str]], settings: LabelSettings) -> None:
        self.settings = settings
        self.pairs = Pairs(settings) if settings.labels is not None else None
        self.plan: LabelPlan | None = self.pairs.plan if self.pairs else plan_layouts(sources, settings)
        if self.plan is None and settings.classes:
            raise ValueError(
                "classes are given, but no labels: give --labels, or a SOURCE of a layout with labels"
            )

    def is_label(self, path: str) -> bool:
        """Whether a file is a label map, and so no image."""
        return self.plan is not None and os.path.realpath(path) in self.plan.label_files

    def check_names(self, writer: CacheWriter) -> None:
        """Raise ValueError if the cache already has other names for the declared classes."""
        if self.plan is None:
            return
        for record in finished_labels(writer.path, writer.finished()):
            clash = [
                n for n in record.classes if self.plan.classes.get(n, record.classes[n]) != record.classes[n]
            ]
            if clash:
                number = clash[0]
                raise ValueError(
                    f"{writer.path} has labels in which class {number} is {record.classes[number]!r}, now "
                    f"{self.plan.classes[number]!r} is declared: give another output folder, or correct "
                    "--classes"
                )

    def run(
        self,
        writer: CacheWriter,
        limits: Limits,
        workers: int,
        report: PrepareReport,
        progress: Progress,
        readers: str = "",
        timeout_s: float = 0.0,
    ) -> None:
        """Prepare the labels of the accepted images, and enter what became of them in the report.

        A label that takes longer than ``timeout_s`` (0: no limit) costs its process, and is rejected.

        While there are ``readers`` of the cache, a label that is there is neither changed nor removed.
        """
        if self.plan is None:
            return
        images: dict[str, list[str]] = {}
        for entry in report.accepted:
            images.setdefault(entry.path, []).append(entry.case_id)
        plan = self.pairs.match(list(images)) if self.pairs else self.plan
        for path, reason in plan.problems:
            report.reject(path, reason, progress.console)
        jobs = []
        for path, case_ids in images.items():
            target, case = plan.targets.get(os.path.realpath(path)), writer.case(case_ids[0])
            if target is not None and len(case_ids) > 1:
                reason = f"label of a folder with {len(case_ids)} series: put each into a folder of its own"
                report.reject(target.path, reason, progress.console)
                target = None
            if target is None or case is None:
                for case_id in case_ids if not readers else ():
                    remove_label(writer.path, case_id)
                continue
            classes = tuple(plan.classes.items())
            jobs.append(
                LabelJob(os.fspath(writer.path), case, target, classes, limits, self.settings, readers)
            )
        bar = progress.add_task("labels", total=len(jobs))
        for job, outcome in run_isolated(prepare_label, jobs, max(1, min(workers, len(jobs))), timeout_s):
            if isinstance(outcome, JobFailed):
                free = shutil.disk_usage(job.output).free / 2**30
                raise RuntimeError(
                    f"could not write the label of {job.case.case_id} to {job.output}: {outcome} "
                    f"(disk full? it has {free:.1f} GiB free)"
                ) from outcome
            if isinstance(outcome, WorkerDied):
                outcome = Outcome("rejected", f"crashes the reader: {outcome}")
            if outcome.status == "rejected":
                if not readers:
                    remove_label(writer.path, job.case.case_id)
                report.reject(job.target.path, f"label: {outcome.reason}", progress.console)
            else:
                report.labels.append(ReportEntry(job.target.path, outcome.reason, job.case.case_id))
            progress.advance(bar)
        report.labels.sort(key=lambda entry: entry.path)


def prepare_label(job: LabelJob) -> Outcome:
    """Read, check, resample and store one label, unless a current copy is in the cache.

    Anything that is wrong with the label is an :class:`Outcome` "rejected"; exceptions are those of writing.

    Raises:
        OSError: something cannot be written, for example because the disk is full.
    """
    folder, case = Path(job.output), job.case
    try:
        key = _key(job)
        there = finished_labels(folder, [case])
        if there and there[0].key == key and is_label_intact(folder, there[0]):
            return Outcome("unchanged", f"unchanged since it was cached: {_shown(there[0])}")
        if there and job.readers:
            return Outcome("rejected", stays(job.readers))
        label = read_label(job.target.path, job.limits)
        reason = misalignment(Geometry.of(label), Geometry.of_original(case.original))
        if reason:
            raise RejectedImage(reason)
        check_classes(label, dict(job.classes), job.settings.allow_empty_labels)
        grid = Grid(case.shape, case.spacing_mm, case.origin_mm)
        volume = resample_label(label, grid, job.settings.label_interpolation)
        before = class_numbers(label)
        lost = sorted(before - {int(n) for n in np.unique(volume)})
        if before and len(lost) == len(before):
            raise RejectedImage(
                f"no voxel of it is left at {_mm(case.spacing_mm)} mm: its structures are too small for this "
                "spacing; give a finer --spacing_mm"
            )
    except RejectedImage as error:
        return Outcome("rejected", str(error))
    except MemoryError:
        return Outcome("rejected", "not enough memory to read it; use fewer workers")
    except Exception as error:
        if is_full_disk(error):
            raise
        return Outcome("rejected", f"unreadable: {type(error).__name__}: {error}")
    subject = job.target.subject
    record = write_label(folder, case, volume, subject, dict(job.classes), job.target.path, key)
    gone = f"; lost at this spacing: class {', '.join(map(str, lost))}" if lost else ""
    return Outcome("new", f"cached: {_shown(record)}{gone}")


def _shown(record: LabelRecord) -> str:
    names: Mapping[int, str] = record.classes
    counts = ", ".join(f"{names.get(n, f'class {n}')} {count}" for n, count in record.voxels.items())
    return f"{record.subject}, voxels: {counts or 'none'}"


def _key(job: LabelJob) -> str:
    stats = ((os.path.basename(f), os.stat(f)) for f in files_of(job.target.path))
    content: dict[str, Any] = {
        "version": LABEL_VERSION,
        "interpolation": job.settings.label_interpolation,
        "empty": job.settings.allow_empty_labels,
        "classes": job.classes,
        "subject": job.target.subject,
        "files": sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _mm(spacing: Sequence[float]) -> str:
    return "x".join(f"{s:g}" for s in spacing)
