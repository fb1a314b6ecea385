"""``pgl prepare``: folders of CT (DICOM, NIfTI, NRRD, MetaImage) become one cache on a common grid.

files -> find -> group DICOM slices -> (in worker processes: read, check, resample, store) -> manifest and
report
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from pgl.cache.manifest import MANIFEST
from pgl.cache.volumes import CacheWriter
from pgl.files.lock import keep_readers_out, only_writer
from pgl.images import Limits, find_files
from pgl.labels.prepare_labels import LabelPreparation
from pgl.labels.settings import LabelSettings
from pgl.prepare.case import Job, Outcome, prepare_case
from pgl.prepare.jobs import list_jobs
from pgl.prepare.report import PrepareReport, ReportEntry
from pgl.printing import printable
from pgl.processes.workers import TIMEOUT_S, JobFailed, WorkerDied, check_timeout, run_isolated, usable_cores

MOST_DEFAULT_WORKERS = 8  # a worker can need some GB for a large CT
SECONDS_BETWEEN_MANIFESTS = 10.0


@dataclass(frozen=True)
class PrepareSettings:
    """Settings of ``pgl prepare``. Triples are in the order (D, H, W): head-foot, front-back, left-right.

    Attributes:
        spacing_mm: voxel size of all volumes in the cache, in mm. One cache has one spacing.
        minimum_size: fewest voxels after resampling; a smaller volume is rejected. A volume that is large
            enough here, but smaller than what training cuts out of it, is padded with air then.
        include: glob patterns; when any is given, only files that match one are taken, for example
            ``*_ct.nii.gz``. A pattern matches a file's name, its path below the SOURCE, or a folder below the
            SOURCE that holds it.
        exclude: glob patterns of files to leave out, such as label maps: ``*_seg.nii.gz``.
        workers: number of processes; 0 takes one for each core, at most 8 (each may need some GB of memory).
        slice_tolerance: how far a DICOM slice may lie from the even grid, as a part of the mean slice
            spacing.
        maximum_voxels: volumes with more voxels, as stored or after resampling, are rejected before memory is
            taken for them (a damaged header can claim any size).
        timeout_s: seconds that one volume, one label, or the headers of 200 DICOM files may take before the
            process is ended and the file rejected; 0 for no limit.
    """

    spacing_mm: tuple[float, float, float] = (3.0, 1.0, 1.0)
    minimum_size: tuple[int, int, int] = (16, 48, 48)
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    workers: int = 0
    slice_tolerance: float = 0.1
    maximum_voxels: int = 2**30
    timeout_s: float = TIMEOUT_S

    def __post_init__(self) -> None:
        for name in ("spacing_mm", "minimum_size"):
            values = tuple(getattr(self, name))
            if len(values) != 3 or not all(math.isfinite(v) and v > 0 for v in values):
                raise ValueError(f"{name} must be three positive numbers (D, H, W), got {values}")
            object.__setattr__(self, name, values)
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            object.__setattr__(self, name, [patterns] if isinstance(patterns, str) else list(patterns))
        if self.workers < 0:
            raise ValueError(f"workers must be 0 (one for each core) or more, got {self.workers}")
        if not 0 < self.slice_tolerance < 0.5:
            raise ValueError(f"slice_tolerance must lie between 0 and 0.5, got {self.slice_tolerance}")
        if self.maximum_voxels < 1:
            raise ValueError(f"maximum_voxels must be at least 1, got {self.maximum_voxels}")
        check_timeout(self.timeout_s)

    @property
    def limits(self) -> Limits:
        """The part of the settings that every volume is held against."""
        spacing = tuple(float(s) for s in self.spacing_mm)
        return Limits(spacing, self.minimum_size, self.maximum_voxels, self.slice_tolerance)  # type: ignore[arg-type]


def prepare(
    sources: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    settings: PrepareSettings | None = None,
    console: Console | None = None,
    labels: LabelSettings | None = None,
) -> PrepareReport:
    """Make or update the volume cache at ``output`` from the CT found in ``sources``.

    Every volume is brought to patient axes (index growing toward superior, posterior, left), resampled to the
    common spacing, clipped to [-1024, 3071] HU and stored as int16 in chunks. What cannot be used is rejected
    with a reason, named on the terminal and listed in ``prepare_report.json``; the good files are cached all
    the same.

    It may be interrupted at any moment and run again: finished cases are kept if their source and the
    settings are the same, others are made anew. A source given again is mirrored, so cases whose file is gone
    from it or now left out are removed. Cases from sources that are not given this time stay, and, with a
    warning, those of a source in which no volume is found (an unmounted disk). A source that was moved keeps
    its cases; a file of the same name and other content, elsewhere, is another case.

    While a run trains on the cache, cases are added, but none is changed or removed: what would be is
    rejected, for now.

    Args:
        sources: folders (searched to the bottom) and files; NIfTI, NRRD, MetaImage, and DICOM
            series.
        output: the cache folder; made if missing.
        settings: see :class:`PrepareSettings`.
        console: where progress and rejections are shown; standard error if None.
        labels: where label maps lie; None recognises the known layouts.

    Returns:
        The report; its ``exit_code`` is 1 if anything was rejected.

    Raises:
        FileNotFoundError: a source or the folder of labels does not exist.
        ValueError: no usable CT in the sources; labels cannot be used as they are declared; or ``output``
            holds something else, or a cache of another spacing.
        InUse: another run is writing to ``output``.
        RuntimeError: a case or a temporary file could not be written (a full disk).
    """
    started = time.monotonic()
    settings = settings or PrepareSettings()
    if not sources:
        raise ValueError("sources must name at least one folder or file")
    missing = next((s for s in sources if not os.path.exists(s)), None)
    if missing is not None:
        raise FileNotFoundError(f"SOURCE {printable(os.fspath(missing))!r} does not exist")
    output = os.path.abspath(output)
    labelling = LabelPreparation(sources, labels or LabelSettings())
    workers = settings.workers or min(usable_cores(), MOST_DEFAULT_WORKERS)
    report = PrepareReport(output)
    console = console or Console(stderr=True)
    with ExitStack() as locks:
        locks.enter_context(only_writer(output))
        writer = CacheWriter(output, settings.limits.spacing_mm)
        # Not before it is known to be a cache: the lock leaves a file.
        readers = locks.enter_context(keep_readers_out(output))
        if writer.rebuilt:
            line = f"{MANIFEST} was damaged or missing; made anew from {writer.rebuilt} finished cases"
            console.print(Text(printable(line)), soft_wrap=True)
        if not readers:
            writer.remove_unfinished()
        labelling.check_names(writer)
        try:
            with _progress(console) as progress:
                found = find_files(sources, settings.include, settings.exclude, skip_folder=output)
                report.ignored += [ReportEntry(*entry) for entry in found.ignored]
                report.ignored += [ReportEntry(f, "a label map") for f in found.leave_out(labelling.is_label)]
                for entry in found.rejected:
                    report.reject(*entry, console)
                jobs = list_jobs(
                    found,
                    writer.finished(),
                    output,
                    settings.limits,
                    workers,
                    report,
                    progress,
                    settings.timeout_s,
                )
                jobs = [replace(job, readers=readers) for job in jobs]
                _run_jobs(jobs, workers, settings.timeout_s, writer, report, progress)
                labelling.run(writer, settings.limits, workers, report, progress, readers, settings.timeout_s)
        except BaseException:
            with suppress(OSError):  # a full disk: the next run writes the manifest
                writer.finish()
            finished = len(writer.finished())
            console.print(f"stopped with {finished} cases finished; run the same command again to go on")
            raise
        if jobs and not readers:
            report.removed = _remove_outdated(writer, sources, jobs, report, console)
        report.cases = len(writer.finish())
        report.seconds = time.monotonic() - started
        path = report.write()
        _summarise(report, path, console)
    if not report.accepted and not readers:
        raise ValueError(
            f"no usable CT in {', '.join(printable(os.fspath(s)) for s in sources)}: "
            f"{len(report.rejected)} rejected, {len(report.ignored)} ignored; the reasons are in {path}"
        )
    return report


def _run_jobs(
    jobs: list[Job],
    workers: int,
    timeout_s: float,
    writer: CacheWriter,
    report: PrepareReport,
    progress: Progress,
) -> None:
    bar = progress.add_task("preparing", total=len(jobs))
    manifest_written = time.monotonic()
    stacks_in = Counter(job.path for job in jobs if job.headers)
    for job, outcome in run_isolated(prepare_case, jobs, max(1, min(workers, len(jobs))), timeout_s):
        if isinstance(outcome, JobFailed):
            raise RuntimeError(
                f"could not write {job.case_id} to the cache {job.output}: {outcome} "
                f"(disk full? it has {shutil.disk_usage(job.output).free / 2**30:.1f} GiB free)"
            ) from outcome
        if isinstance(outcome, WorkerDied):
            outcome = Outcome("rejected", f"crashes the reader: {outcome}")
        reason = outcome.reason
        if stacks_in[job.path] > 1:
            reason = f"series {job.headers[0].series_uid or '(unnamed)'}, {len(job.headers)} slices: {reason}"
        if outcome.status == "rejected":
            if not job.readers:
                writer.remove(job.case_id)
            report.reject(job.path, reason, progress.console)
        else:
            report.accepted.append(ReportEntry(job.path, reason, job.case_id))
        progress.advance(bar)
        if time.monotonic() - manifest_written > SECONDS_BETWEEN_MANIFESTS:
            writer.finish()
            manifest_written = time.monotonic()
    report.accepted.sort(key=lambda entry: (entry.path, entry.case_id))
    report.rejected.sort(key=lambda entry: (entry.path, entry.reason))


def _remove_outdated(
    writer: CacheWriter,
    sources: Sequence[str | os.PathLike[str]],
    jobs: Sequence[Job],
    report: PrepareReport,
    console: Console,
) -> int:
    """Remove the cases that their SOURCE no longer has. Where it has no volume at all, its disk may not be
    mounted: then they stay, with a warning."""
    current = {entry.case_id for entry in report.accepted}
    roots = [os.path.abspath(source) for source in dict.fromkeys(sources)]
    # A SOURCE may be reached through another's links.
    paths = {path for job in jobs for path in (job.path, os.path.realpath(job.path))}
    empty = [
        root
        for root in roots
        if os.path.isdir(root)
        and not any(_lies_in(path, place) for place in (root, os.path.realpath(root)) for path in paths)
    ]
    removed, kept = 0, Counter[str]()
    for record in writer.finished():
        owners = [root for root in roots if _lies_in(record.source, root)]
        if record.case_id in current or not owners:
            continue
        doubtful = next((root for root in owners if root in empty), None)
        if doubtful is None:
            writer.remove(record.case_id)
            removed += 1
        else:
            kept[doubtful] += 1
    for root, count in kept.items():
        cases = "1 case made from it stays" if count == 1 else f"{count} cases made from it stay"
        line = f"no volume was found in SOURCE {printable(root)}, so the {cases} in the cache: "
        line += "is its disk mounted?"
        console.print(Text.assemble(("WARNING ", "bold red"), line), soft_wrap=True)
    return removed


def _lies_in(path: str, root: str) -> bool:
    return path == root or path.startswith(os.path.join(root, ""))


def _summarise(report: PrepareReport, path: Path, console: Console) -> None:
    counts = (
        f"{len(report.accepted)} accepted, {len(report.rejected)} rejected, {len(report.ignored)} ignored"
    )
    if report.labels:
        counts += f", {len(report.labels)} labels"
    if report.removed:
        counts += f", {report.removed} removed whose source is gone or left out"
    line = f"{counts} in {report.seconds:.1f} s; {report.cases} cases in {report.output}; report: {path}"
    console.print(Text(printable(line)), soft_wrap=True)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
