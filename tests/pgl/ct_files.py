"""Small synthetic CT, and files made of it, for the tests of ``pgl prepare``."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

import pgl.cache.volumes
import pgl.downstream.reading
import pgl.images.dicom
import pgl.labels.prepare_labels
import pgl.labels.reading
from pgl.images import Limits, read_file
from pgl.labels.prepare_labels import LabelJob
from pgl.prepare.case import Job, Outcome, prepare_case
from pgl.processes.workers import run_isolated

LIMITS = Limits(
    spacing_mm=(3.0, 2.0, 2.0), minimum_size=(8, 16, 16), maximum_voxels=10**7, slice_tolerance=0.1
)


def body(shape: tuple[int, int, int] = (16, 40, 48), seed: int = 0) -> np.ndarray:
    """int16 HU [D, H, W]: noise of air around an ellipse of fat, muscle and a bone."""
    rng = np.random.default_rng(seed)
    _, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    radius = np.hypot(x / 0.8, y / 0.7)
    hu = np.where(radius < 1, -100.0, -1000.0)
    hu[radius < 0.8] = 50.0
    hu[np.hypot(x, y - 0.4) < 0.15] = 700.0
    return np.rint(np.clip(hu + rng.normal(0, 12, shape), -1024, 3071)).astype(np.int16)


def to_image(
    array: np.ndarray,
    spacing_xyz: tuple[float, ...] = (2.0, 2.0, 3.0),
    origin_xyz: tuple[float, ...] = (-30.0, 12.5, 100.0),
    direction: np.ndarray | None = None,
) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing_xyz)
    image.SetOrigin(origin_xyz)
    if direction is not None:
        image.SetDirection(np.asarray(direction, dtype=float).ravel().tolist())
    return image


def write(path: Path, array: np.ndarray | None = None, compress: bool = False, **geometry) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(to_image(body() if array is None else array, **geometry), str(path), compress)
    return path


def write_series(
    folder: Path,
    array: np.ndarray | None = None,
    spacing_xyz: tuple[float, float, float] = (2.0, 2.0, 3.0),
    origin_xyz: tuple[float, float, float] = (-30.0, 12.5, 100.0),
    axes: np.ndarray | None = None,
    tilt_degrees: float = 0.0,
    series: int = 1,
    suffix: str = ".dcm",
    modality: str = "CT",
    drop_tag: str | None = None,
) -> list[Path]:
    """Write CT as DICOM slices, file names in an order that says nothing of their position.

    ``axes``: directions of a row, a column and the stack, as columns. ``tilt_degrees``: the stack leans away
    from the slices' normal, toward the columns' direction, as with a tilted gantry.
    """
    array = body() if array is None else array
    axes = np.eye(3) if axes is None else axes
    folder.mkdir(parents=True, exist_ok=True)
    lean = axes[:, 1] * np.tan(np.radians(tilt_degrees))
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    names = np.random.default_rng(series).permutation(len(array))
    paths = []
    for number, plane in enumerate(array):
        position = np.asarray(origin_xyz) + number * spacing_xyz[2] * (axes[:, 2] + lean)
        image = sitk.GetImageFromArray(plane)  # the writer itself takes out slope and intercept
        image.SetSpacing(spacing_xyz[:2])
        tags = {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"1.2.826.0.1.3680043.2.1125.{series}.{number + 1}",
            "0008|0060": modality,
            "0010|0010": "Test^Case",
            "0020|000d": "1.2.826.0.1.3680043.2.1125.9",
            "0020|000e": f"1.2.826.0.1.3680043.2.1125.{series}",
            "0020|0013": str(number + 1),
            "0020|0032": "\\".join(f"{p:.6f}" for p in position),
            "0020|0037": "\\".join(f"{c:.6f}" for c in (*axes[:, 0], *axes[:, 1])),
            "0028|1052": "-1024",
            "0028|1053": "1",
        }
        for key, value in tags.items():
            if key != drop_tag:
                image.SetMetaData(key, value)
        path = folder / f"IM{names[number]:03d}{suffix}"
        writer.SetFileName(str(path if suffix == ".dcm" else path.with_suffix(".dcm")))
        writer.Execute(image)
        if suffix != ".dcm":
            path.with_suffix(".dcm").rename(path)
        paths.append(path)
    return paths


def double(job: int) -> int:
    """A job for the tests of worker processes: odd numbers kill the process, negative ones raise."""
    if job < 0:
        raise ValueError(f"negative: {job}")
    if job % 2:
        os.abort()
    return 2 * job


def crashing_prepare_case(job: Job) -> Outcome:
    """As ``prepare_case``, but a file with "crash" in its name brings the process down."""
    if "crash" in os.path.basename(job.path):
        os.abort()
    return prepare_case(job)


def slow_prepare_case(job: Job) -> Outcome:
    """As ``prepare_case``, but slow enough to be interrupted."""
    time.sleep(0.25)
    return prepare_case(job)


def failing_prepare_case(job: Job) -> Outcome:
    """As ``prepare_case`` when the disk is full."""
    raise OSError(28, "No space left on device")


def _no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


def prepare_case_without_room(job: Job) -> Outcome:
    """As ``prepare_case``, with a cache that has no room for a case's entry."""
    pgl.cache.volumes.write_json = _no_space
    return prepare_case(job)


def prepare_label_without_room(job: LabelJob) -> Outcome:
    """As ``prepare_label``, with a reader that has no room for its temporary files."""
    pgl.labels.prepare_labels.read_label = _no_space
    return pgl.labels.prepare_labels.prepare_label(job)


def read_headers_without_room(paths: Sequence[str]) -> list[dict[str, Any]]:
    """As ``read_headers``, with a reader that has no room for its temporary files."""
    pgl.images.dicom._read_header = _no_space
    return pgl.images.dicom.read_headers(paths)


def temporary_folder_is(folder: str) -> bool:
    """Whether this process keeps its temporary files there."""
    return tempfile.gettempdir() == folder


def nap(seconds: float) -> float:
    """A job that takes its time."""
    time.sleep(seconds)
    return seconds


def _hang_over_slow(path: str, limits: Limits) -> object:
    """A reader that never comes back from a file with "slow" in its name."""
    while "slow" in os.path.basename(path):
        time.sleep(60)
    return read_file(path, limits)


def hanging_prepare_label(job: LabelJob) -> Outcome:
    """As ``prepare_label``, with a reader that hangs."""
    pgl.labels.reading.read_file = _hang_over_slow
    return pgl.labels.prepare_labels.prepare_label(job)


def hanging_read_pair(job: tuple[str, str, str]) -> object:
    """As ``read_pair``, with a reader that hangs."""
    pgl.labels.reading.read_file = _hang_over_slow
    return pgl.downstream.reading.read_pair(job)


def hanging_read_image(job: Job) -> object:
    """As ``read_image``, with a reader that hangs."""
    pgl.downstream.reading.read_file = _hang_over_slow
    return pgl.downstream.reading.read_image(job)


def impatient(function, jobs, workers: int, timeout_s: float):
    """``run_isolated`` with three seconds in place of the half hour that it must have been given."""
    assert timeout_s == 1800.0
    return run_isolated(function, jobs, workers, 3.0)
