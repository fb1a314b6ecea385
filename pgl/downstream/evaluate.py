"""``pgl evaluate``: score a folder of predicted label maps against a folder of true ones."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from pgl.downstream.metrics import Score, score_case
from pgl.downstream.reading import failure, read_numbers, read_pair
from pgl.images import RejectedImage
from pgl.labels.alignment import Geometry, misalignment
from pgl.labels.classes import HIGHEST_CLASS, read_classes
from pgl.labels.pairs import CLASS_FILES, named_files, without_partner
from pgl.labels.reading import check_classes
from pgl.processes.workers import TIMEOUT_S, check_timeout, run_isolated

SAME_GRID_MM = 1e-3
_MOST_TOLD = 3
_OTHERWISE = (
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
        predictions, labels: folders of label maps, searched to the bottom. Links are followed; a file
            that is reached twice under one name counts once.
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
    paired = sorted(set(ours) & set(theirs))
    unpaired += [(str(ours[n]), "prediction without label") for n in without_partner(ours, paired)]
    # A label under two names is that of two cases.
    unpaired += [(str(theirs[n]), "label without prediction") for n in sorted(set(theirs) - set(ours))]
    jobs = [(str(ours[name]), str(theirs[name]), name) for name in paired]
    scores: list[Score] = []
    refused: list[tuple[str, str]] = []
    declared = _declared(folders, classes, merge)
    if declared is None:
        numbers, unread = _numbers_in([other for _, other, _ in jobs], timeout_s)
        refused += [(path, f"with {other}: {unread[other]}") for path, other, _ in jobs if other in unread]
        jobs = [job for job in jobs if job[1] not in unread]
        if jobs and not numbers:
            raise ValueError(
                f"{labels}: the labels hold background alone, and nothing declares classes: give --classes "
                "FILE"
            )
        declared = _of_labels(numbers)
    # Pair by pair: all volumes of a data set need not fit into memory.
    for (path, other, name), answer in run_isolated(read_pair, jobs, 1, timeout_s):
        reason = failure(answer)
        if reason is None:
            prediction, label = answer
            try:
                scores += _score(name, prediction, label, declared)
            except RejectedImage as error:
                reason = str(error)
        if reason is not None:
            refused.append((path, f"with {other}: {reason}"))
    problems = refused + unpaired
    if not scores:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in problems[:_MOST_TOLD])
        more = f"; and {len(problems) - _MOST_TOLD} more" if len(problems) > _MOST_TOLD else ""
        raise ValueError(
            f"nothing to compare in {predictions} and {labels}: {reasons or 'no label maps'}{more}"
        )
    return scores, problems


def _score(name: str, prediction: sitk.Image, label: sitk.Image, declared: _Declared) -> list[Score]:
    for what, image in (("the label has ", label), ("the prediction has ", prediction)):
        # Other numbers of the labels than those that are merged are background.
        if not (declared.merged and image is label):
            check_classes(image, declared.names, allow_empty=True, remedy=declared.remedy, what=what)
    prediction = _onto(prediction, label)
    truth = declared.table[sitk.GetArrayViewFromImage(label)]
    mask = table_of(declared.names)[sitk.GetArrayViewFromImage(prediction)]
    return score_case(name, mask, truth, list(declared.names.values()), label.GetSpacing()[::-1])


def table_of(names: Mapping[int, str]) -> np.ndarray:
    """uint8 [256]: number in a file → position of its class, from 1."""
    table = np.zeros(HIGHEST_CLASS + 1, np.uint8)
    for position, number in enumerate(names, start=1):
        table[number] = position
    return table


@dataclass(frozen=True)
class _Declared:
    """Which classes are scored.

    Attributes:
        names: number → name in the predictions.
        table: uint8 [256], the labels' number → position of its class, from 1.
        remedy: what to do about other numbers.
        merged: whether classes are made of several of the labels' numbers.
    """

    names: dict[int, str]
    table: np.ndarray
    remedy: str
    merged: bool = False


def _declared(
    folders: Sequence[Path], file: str | os.PathLike[str] | None, merge: Mapping[str, Sequence[int]] | None
) -> _Declared | None:
    """The classes of the arguments or of a file in the folders; None if nothing tells them."""
    if merge is not None:
        table = np.zeros(HIGHEST_CLASS + 1, np.uint8)
        for position, (name, numbers) in enumerate(merge.items(), start=1):
            for number in numbers:
                if not 0 < number <= HIGHEST_CLASS or table[number]:
                    raise ValueError(f"merge: number {number} of {name!r} is 0, above 255 or there twice")
                table[number] = position
        remedy = "--merge must name as many classes as the predictions have"
        return _Declared(dict(enumerate(merge, start=1)), table, remedy, merged=True)
    if file is not None:
        return _of_names(read_classes(file), f"correct the map, or declare them in {file}")
    there = [path for folder in folders if (path := _class_file(folder))]
    if not there:
        return None
    known = [_names_in(path) for path in there]
    for number, name in known[0].items():
        other = known[-1].get(number, name)
        if other.casefold() != name.casefold():
            raise ValueError(
                f"class {number} is {name!r} in {there[0]} and {other!r} in {there[-1]}: {_OTHERWISE}"
            )
    return _of_names(known[0], f"by {there[0]}; {_OTHERWISE}")


def _class_file(folder: Path) -> Path | None:
    places = (where / name for where in (folder, folder.parent) for name in CLASS_FILES)
    return next((place for place in places if place.is_file()), None)


def _names_in(path: Path) -> dict[int, str]:
    try:
        return read_classes(path)
    except ValueError as error:
        raise ValueError(f"{error}; to do without that file give --classes FILE") from error


def _numbers_in(paths: Sequence[str], timeout_s: float) -> tuple[set[int], dict[str, str]]:
    """The class numbers of these labels, and why some cannot be read."""
    numbers: set[int] = set()
    unread: dict[str, str] = {}
    for path, answer in run_isolated(read_numbers, list(paths), 1, timeout_s):
        reason = failure(answer)
        if reason is None:
            numbers |= answer
        else:
            unread[path] = reason
    return numbers, unread


def _of_labels(numbers: set[int]) -> _Declared:
    names = {number: f"class_{number}" for number in sorted(numbers)}
    return _of_names(names, "the numbers in the labels; correct the prediction, or give --classes with all")


def _of_names(names: dict[int, str], remedy: str) -> _Declared:
    return _Declared(names, table_of(names), remedy)


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
