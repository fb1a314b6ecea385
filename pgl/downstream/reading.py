"""Files from strangers read in a process that may die over them, or hang: for ``predict`` and ``evaluate``.

Nothing here needs torch, so that such a process starts quickly.
"""

from __future__ import annotations

import SimpleITK as sitk

from pgl.images import Grid, Limits, RejectedImage, check_intensities, read_file, read_series
from pgl.labels.reading import class_numbers, read_label
from pgl.prepare.case import Job
from pgl.processes.workers import JobFailed, WorkerDied

LABEL_LIMITS = Limits((1.0, 1.0, 1.0), (1, 1, 1), 2**31, 0.1)


def read_image(job: Job) -> tuple[sitk.Image, Grid] | str:
    """Read and check one image; or say why it cannot be used."""
    try:
        if job.unreadable:
            raise RejectedImage("incomplete: files that may be slices of it cannot be read")
        if job.headers:
            image, grid = read_series(job.headers, job.limits)
        else:
            image, grid = read_file(job.path, job.limits)
        check_intensities(sitk.GetArrayViewFromImage(image))
    except RejectedImage as error:
        return str(error)
    return image, grid


def read_pair(job: tuple[str, str, str]) -> tuple[sitk.Image, sitk.Image] | str:
    """Read two label maps, given their paths and their common name; or say why they cannot be used."""
    try:
        return read_label(job[0], LABEL_LIMITS), read_label(job[1], LABEL_LIMITS)
    except RejectedImage as error:
        return str(error)


def read_numbers(path: str) -> set[int] | str:
    """The class numbers of one label map, without the background; or say why it cannot be used."""
    try:
        return class_numbers(read_label(path, LABEL_LIMITS))
    except RejectedImage as error:
        return str(error)


def failure(answer: object) -> str | None:
    """Why an answer of one of these functions, or the end of its process, is no image; None if it is one."""
    if isinstance(answer, WorkerDied):
        return f"crashes the reader: {answer}"
    if isinstance(answer, JobFailed):
        return f"unreadable: {answer}"
    return answer if isinstance(answer, str) else None
