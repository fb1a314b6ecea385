"""``pgl evaluate``: score a folder of predicted label maps against a folder of true ones."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from pgl.downstream.metrics import Score, score_case
from pgl.downstream.reading import failure, read_pair
from pgl.images import RejectedImage
from pgl.labels.alignment import Geometry, misalignment
from pgl.labels.classes import HIGHEST_CLASS, read_classes
from pgl.labels.pairs import CLASS_FILES, named_files
from pgl.labels.reading import check_classes
from pgl.workers import TIMEOUT_S, check_timeout, run_isolated

SAME_GRID_MM = 1e-3
_MOST_TOLD = 3
_REMEDY = (
    "give --merge with the labels' numbers that make up each predicted class, or --classes with the names of "
    "all numbers"
)


def evaluate(
    predictions: str | os.PathLike[str],
    labels: str | os.PathLike[str],
    prediction_name: str = "*",
    label_name: str = "*",
    classes: str | os.PathLike[str] | None = None,
    merge: Mapping[str, Sequence[int]] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> tuple[list[Score], list[tuple[str, str]]]:
    """Score each prediction against the label of the same name, on the label's grid.

    Args:
        predictions, labels: folders of label maps, searched to the bottom.
        prediction_name, label_name: how the files are called, one ``*`` for what a pair has in common.
        classes: JSON or YAML file of class names and numbers; otherwise ``labels.json`` in or beside
            ``predictions`` or ``labels``, otherwise the numbers in the labels.
        merge: name → numbers in the labels that make it up; the predictions hold the classes numbered from 1
            in this order. For a network that was trained on merged classes.
        timeout_s: seconds that reading one pair may take before its process is ended; 0 for no limit.

    Returns:
        The scores, and (path, reason) of what has no partner or cannot be compared.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: nothing can be compared, or both folders name one number differently.
    """
    check_timeout(timeout_s)
    folders = [Path(predictions), Path(labels)]
    for name, folder in zip(("predictions", "labels"), folders, strict=True):
        if not folder.is_dir():
            raise FileNotFoundError(f"{name}: no folder at {folder}")
    (ours, first), (theirs, second) = (
        named_files(folder, pattern)
        for folder, pattern in zip(folders, (prediction_name, label_name), strict=True)
    )
    unpaired = [*first, *second]
    unpaired += [(str(ours[n]), "prediction without label") for n in sorted(set(ours) - set(theirs))]
    unpaired += [(str(theirs[n]), "label without prediction") for n in sorted(set(theirs) - set(ours))]
    jobs = [(str(ours[name]), str(theirs[name]), name) for name in sorted(set(ours) & set(theirs))]
    names, table = _declared(folders, classes, merge) or _of_numbers(_numbers_in(jobs, timeout_s))
    scores: list[Score] = []
    refused: list[tuple[str, str]] = []
    # One pair at a time: all volumes of a data set need not fit into memory.
    for (path, other, name), answer in run_isolated(read_pair, jobs, 1, timeout_s):
        reason = failure(answer)
        if reason is not None:
            refused.append((path, f"with {other}: {reason}"))
            continue
        prediction, label = answer
        try:
            if merge is None:
                check_classes(label, names, allow_empty=True, remedy=_REMEDY)
            check_classes(prediction, names, allow_empty=True, remedy=_REMEDY)
            prediction = _onto(prediction, label)
        except RejectedImage as error:
            refused.append((path, f"with {other}: {error}"))
            continue
        truth = table[sitk.GetArrayViewFromImage(label)]
        mask = table_of(names)[sitk.GetArrayViewFromImage(prediction)]
        scores += score_case(name, mask, truth, list(names.values()), label.GetSpacing()[::-1])
    problems = refused + unpaired
    if not scores:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in problems[:_MOST_TOLD])
        more = f"; and {len(problems) - _MOST_TOLD} more" if len(problems) > _MOST_TOLD else ""
        raise ValueError(
            f"nothing to compare in {predictions} and {labels}: {reasons or 'no label maps'}{more}"
        )
    return scores, problems


def table_of(names: Mapping[int, str]) -> np.ndarray:
    """uint8 [256]: number in a file → position of its class, from 1."""
    table = np.zeros(HIGHEST_CLASS + 1, np.uint8)
    for position, number in enumerate(names, start=1):
        table[number] = position
    return table


def _declared(
    folders: Sequence[Path], file: str | os.PathLike[str] | None, merge: Mapping[str, Sequence[int]] | None
) -> tuple[dict[int, str], np.ndarray] | None:
    """Number → name in the predictions, and the table from the labels' numbers to positions; None if nothing
    tells the classes."""
    if merge is not None:
        table = np.zeros(HIGHEST_CLASS + 1, np.uint8)
        for position, (name, numbers) in enumerate(merge.items(), start=1):
            for number in numbers:
                if not 0 < number <= HIGHEST_CLASS or table[number]:
                    raise ValueError(f"merge: number {number} of {name!r} is 0, above 255 or there twice")
                table[number] = position
        return dict(enumerate(merge, start=1)), table
    if file is not None:
        return _of_names(read_classes(file))
    there = [path for folder in folders if (path := _class_file(folder))]
    if not there:
        return None
    known = [read_classes(path) for path in there]
    for number, name in known[0].items():
        other = known[-1].get(number, name)
        if other != name:
            raise ValueError(
                f"class {number} is {name!r} in {there[0]} and {other!r} in {there[-1]}: {_REMEDY}"
            )
    return _of_names(known[0])


def _class_file(folder: Path) -> Path | None:
    places = (where / name for where in (folder, folder.parent) for name in CLASS_FILES)
    return next((place for place in places if place.is_file()), None)


def _numbers_in(jobs: Sequence[tuple[str, str, str]], timeout_s: float) -> set[int]:
    """The class numbers of all labels that can be read."""
    numbers: set[int] = set()
    for _, answer in run_isolated(read_pair, jobs, 1, timeout_s):
        if failure(answer) is None:
            numbers |= {int(n) for n in np.unique(sitk.GetArrayViewFromImage(answer[1])) if n}
    return numbers


def _of_numbers(numbers: set[int]) -> tuple[dict[int, str], np.ndarray]:
    return _of_names({number: f"class_{number}" for number in sorted(numbers)})


def _of_names(names: dict[int, str]) -> tuple[dict[int, str], np.ndarray]:
    return names, table_of(names)


def _onto(prediction: sitk.Image, label: sitk.Image) -> sitk.Image:
    """The prediction on the label's grid.

    Raises:
        RejectedImage: it lies elsewhere.
    """
    ours, theirs = Geometry.of(prediction), Geometry.of(label)
    same = tuple(ours.size_xyz) == tuple(theirs.size_xyz)
    if same and np.abs(ours.corners_mm() - theirs.corners_mm()).max() < SAME_GRID_MM:
        return prediction
    reason = misalignment(ours, theirs)
    if reason:
        raise RejectedImage(f"prediction and label: {reason.replace('its image', 'the other')}")
    return sitk.Resample(prediction, label, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
