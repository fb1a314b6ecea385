"""``pgl predict``: segment CT images, each on its own grid."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import SimpleITK as sitk
import torch
from rich.console import Console
from rich.progress import Progress

from pgl.downstream.config import InferenceSettings
from pgl.downstream.inference import probabilities
from pgl.downstream.model_file import Segmenter, load_model
from pgl.downstream.reading import failure, read_image
from pgl.downstream.setup import accelerator as chosen_accelerator
from pgl.files.atomic import write_json
from pgl.images import Found, Grid, Limits, find_files, resample, write_image
from pgl.images.native import split_suffixes
from pgl.images.writing import NOTE, note_of
from pgl.labels.resampling import probabilities_onto
from pgl.prepare.case import Job
from pgl.prepare.jobs import list_jobs
from pgl.prepare.report import PrepareReport
from pgl.printing import printable
from pgl.processes.workers import TIMEOUT_S, check_timeout, run_isolated, usable_cores
from pgl.training.devices import autocast_to

CLASSES = "labels.json"
MADE_BY = "pgl predict"  # noted in the header of each mask, by which a later run knows its own
MAXIMUM_VOXELS = 2**30
SLICE_TOLERANCE = 0.1


def predict(
    run: str | os.PathLike[str],
    sources: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    accelerator: str = "auto",
    inference: InferenceSettings | None = None,
    console: Console | None = None,
    timeout_s: float = TIMEOUT_S,
) -> tuple[list[Path], PrepareReport]:
    """Segment every CT in ``sources``.

    An image is brought to the grid that the network was trained on, as by ``pgl prepare``; the probabilities
    are interpolated linearly back to the image's own grid, where the largest wins.

    Args:
        run: the folder of ``pgl finetune``, or its model.pt.
        sources: folders and files, as for ``pgl prepare``.
        output: folder for ``NAME.nii.gz``, uint8 with the image's own size, spacing, origin and direction,
            and for ``labels.json``, names and numbers of the classes. Only masks of an earlier run with the
            same classes are replaced.
        include, exclude: patterns as for ``pgl prepare``.
        accelerator: ``auto``, ``cpu`` or ``cuda``.
        inference: sliding window; the defaults if None.
        console: where progress and rejections are shown; standard error if None.
        timeout_s: seconds that reading one image may take before its process is ended and the image rejected;
            0 for no limit.

    Returns:
        The files written, and a report whose ``rejected`` names what could not be used.

    Raises:
        FileNotFoundError: no model or source.
        ValueError: a damaged model, or no usable CT.
        FileExistsError: a mask would replace a source, or anything else that this command did not write; or
            ``labels.json`` there names other classes. Nothing has been written then.
        OSError: a mask could not be written whole, as on a full disk; it is named.
    """
    check_timeout(timeout_s)
    device = torch.device("cuda" if chosen_accelerator(accelerator) in ("cuda", "gpu") else "cpu")
    model = load_model(run, device)
    limits = Limits(model.spacing_mm, (1, 1, 1), MAXIMUM_VOXELS, SLICE_TOLERANCE)
    classes = {name: n for n, name in enumerate(["background", *model.classes])}
    folder = Path(output)
    report = PrepareReport(os.fspath(folder))
    found = find_files(sources, include, exclude, skip_folder=folder)
    written: list[Path] = []
    with Progress(console=console or Console(stderr=True)) as progress:
        for entry in found.rejected:
            report.reject(*entry, progress.console)
        jobs = list_jobs(found, [], report.output, limits, usable_cores(), report, progress, timeout_s)
        targets = [folder / f"{name}.nii.gz" for name in _names(jobs)]
        _check_targets(targets, found, folder / CLASSES, classes)
        bar = progress.add_task("segmenting", total=len(jobs))
        target_of = dict(zip((job.case_ids for job in jobs), targets, strict=True))
        for job, answer in run_isolated(read_image, jobs, 1, timeout_s):
            reason = failure(answer)
            if reason is not None:
                report.reject(job.path, reason, progress.console)
            else:
                image, grid = answer
                mask = segment(model, image, grid, device, inference or InferenceSettings())
                mask.SetMetaData(NOTE, MADE_BY)
                if not written:  # before the first mask, so that none is there without its classes
                    write_json(folder / CLASSES, classes)
                write_image(target_of[job.case_ids], mask)
                written.append(target_of[job.case_ids])
            progress.advance(bar)
    if not written:
        shown = ", ".join(printable(os.fspath(s)) for s in sources)
        raise ValueError(f"no usable CT in {shown}: {len(report.rejected)} rejected")
    return written, report


def segment(
    model: Segmenter, image: sitk.Image, grid: Grid, device: torch.device, settings: InferenceSettings
) -> sitk.Image:
    """The classes of an image on its own grid: a uint8 image of the same geometry."""
    volume = resample(image, grid)
    with autocast_to(model.precision, device):
        found = probabilities(model.network, volume, model.patch_size, model.intensity, settings, device)
    mask = sitk.GetImageFromArray(probabilities_onto(image, found, grid))
    mask.CopyInformation(image)
    return mask


def _check_targets(
    targets: Sequence[Path], found: Found, classes_file: Path, classes: dict[str, int]
) -> None:
    """Make sure that nothing is replaced but masks of an earlier run, of the same classes."""
    there = [path for path in targets if os.path.lexists(path)]
    files = [file.path for file in (*found.images, *found.maybe_dicom)] if there else []
    files += [path for path, _ in (*found.ignored, *found.rejected)] if there else []
    sources = {os.path.realpath(path) for path in files}
    for path in there:
        if os.path.realpath(path) in sources:
            raise FileExistsError(
                f"output: the mask {path} would replace a file of SOURCE; masks go to a folder of their own, "
                "name another one"
            )
        if note_of(path) != MADE_BY:
            raise FileExistsError(
                f"output: {path} is there and is not marked as a mask of `pgl predict`, the only "
                "thing that is replaced; name another folder, or move it away"
            )
    if os.path.lexists(classes_file) and _read_classes(classes_file) != classes:
        raise FileExistsError(
            f"output: {classes_file} is not what this network's masks need ({json.dumps(classes)}), so it is "
            "of another network or of other label maps; name another folder"
        )


def _read_classes(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _names(jobs: Sequence[Job]) -> list[str]:
    """The name of each image's file or folder; of several with one name, their case's."""
    names = [_stem(job) for job in jobs]
    while len(set(names)) < len(names):
        # Cases' names differ from each other, but may be the file name of another image.
        count = Counter(names)
        names = [job.case_id if count[name] > 1 else name for name, job in zip(names, jobs, strict=True)]
    return names


def _stem(job: Job) -> str:
    name = os.path.basename(job.path)
    return name if job.headers else split_suffixes(name)[0]
