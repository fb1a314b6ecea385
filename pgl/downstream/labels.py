"""The labelled cases of a cache, in terms of the classes that are to be segmented."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pgl.cache.volumes import VolumeCache
from pgl.downstream.config import SplitSettings
from pgl.downstream.splits import Split, split_cases
from pgl.labels.classes import HIGHEST_CLASS
from pgl.labels.records import LabelRecord
from pgl.labels.store import read_label_block, read_label_volume, read_labels, verify_labels

# Enough for any patch to be found; a whole liver has millions.
MOST_LOCATIONS = 5000


@dataclass(frozen=True)
class Task:
    """What is segmented.

    Attributes:
        names: of the classes 1, 2, …; 0 is background.
        table: uint8 [256], number in the cache's labels → class.
    """

    names: tuple[str, ...]
    table: np.ndarray

    @property
    def outputs(self) -> int:
        """Channels of the network's output, background included."""
        return len(self.names) + 1


class LabelledCache:
    """A cache's labelled cases: images, and labels as classes of a task.

    Args:
        path: the cache.
        classes: see :class:`pgl.downstream.config.FinetuneConfig`.

    Attributes:
        subjects: names of the cases in their data set, in the order of the indices.

    Raises:
        FileNotFoundError: no cache there.
        ValueError: no labels in it, a damaged one, two cases of one name, or a class that its labels do not
            have.
    """

    def __init__(
        self, path: str | os.PathLike[str], classes: Mapping[str, Sequence[str | int]] | None = None
    ) -> None:
        self.path = Path(path)
        self.images = VolumeCache(path)
        self.records = sorted(read_labels(path), key=lambda record: record.subject)
        if not self.records:
            raise ValueError(
                f"{self.path} holds no labels: run pgl prepare with --labels DIR, or on a data set of a "
                "known layout"
            )
        damaged = verify_labels(self.path)
        if damaged:
            raise ValueError(f"{self.path}: {damaged[0]}: run pgl prepare again to remake it")
        self.subjects = [record.subject for record in self.records]
        twice = sorted({name for name in self.subjects if self.subjects.count(name) > 1})
        if twice:
            raise ValueError(
                f"{self.path}: several labelled cases are called {', '.join(twice[:5])}: prepare data sets "
                "with the same names into caches of their own"
            )
        where = {case.case_id: index for index, case in enumerate(self.images.cases)}
        self.numbers = [where[record.case_id] for record in self.records]
        self.task = make_task(self.records, classes, str(self.path))

    def __len__(self) -> int:
        return len(self.records)

    def shape(self, index: int) -> tuple[int, int, int]:
        """Voxels (D, H, W) of a case."""
        return self.records[index].shape

    def read_block(
        self, index: int, start: Sequence[int], size: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """A block of a case: int16 HU and uint8 classes; outside the volume air and background."""
        image = self.images.read_block(self.numbers[index], start, size)
        label = read_label_block(self.path, self.records[index], start, size)
        return image, self.task.table[label]

    def read_image(self, index: int) -> np.ndarray:
        """int16 HU [D, H, W]."""
        return self.images.read_volume(self.numbers[index])

    def read_classes(self, index: int) -> np.ndarray:
        """uint8 classes [D, H, W]."""
        return self.task.table[read_label_volume(self.path, self.records[index])]

    def split(self, settings: SplitSettings, fraction: float, seed: int) -> Split:
        """Who is tested on and who is trained on, see :func:`pgl.downstream.splits.split_cases`.

        Raises:
            ValueError: it cannot be, or a case that is tested on is trained on as well, under another name.
        """
        split = split_cases(self.subjects, settings, fraction, seed)
        marks = {
            subject: self.images.cases[number].marks
            for subject, number in zip(self.subjects, self.numbers, strict=True)
        }
        tested_as = {mark: subject for subject in split.test for mark in marks[subject]}
        for subject in split.training + split.unused:
            for mark in marks[subject] & tested_as.keys():
                raise ValueError(
                    f"{self.path}: the cases {tested_as[mark]} and {subject} hold the same image, and one is "
                    "tested on, the other to train on: prepare the data without one of them, or make them "
                    "one patient (split.patient)"
                )
        return split

    def locations(self, index: int) -> dict[int, np.ndarray]:
        """Class → int32 [n, 3] voxels (D, H, W) of it, at most 5000, the same in every run."""
        label = self.read_classes(index)
        rng = np.random.default_rng(0)
        found = {}
        for number in range(1, self.task.outputs):
            flat = np.flatnonzero(label == number)
            if flat.size > MOST_LOCATIONS:
                flat = rng.choice(flat, MOST_LOCATIONS, replace=False)
            if flat.size:
                found[number] = np.stack(np.unravel_index(flat, label.shape), axis=1).astype(np.int32)
        return found


def digest_of(records: Iterable[LabelRecord], *groups: Sequence[str]) -> str:
    """A SHA-256 over the images and labels of cases, in whatever order they are named.

    Args:
        records: the labels of a cache.
        groups: subjects, such as those that are tested on and those that are trained on.
    """
    sums = {record.subject: [record.case_sha256, record.sha256] for record in records}
    content = [[[subject, sums.get(subject)] for subject in sorted(group)] for group in groups]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def make_task(
    records: Sequence[LabelRecord], classes: Mapping[str, Sequence[str | int]] | None, where: str
) -> Task:
    """The classes to segment, from those of the labels.

    Raises:
        ValueError: a class of the task is not among those of the labels, or is in two of its classes.
    """
    known: dict[int, str] = {}
    for record in records:
        known.update({number: f"class_{number}" for number in record.voxels if number not in known})
        known.update(record.classes)
    numbers = {name: number for number, name in known.items()}
    wanted: Mapping[str, Sequence[str | int]] = classes or {
        known[number]: [known[number]] for number in sorted(known)
    }
    if not wanted:
        raise ValueError(f"{where}: its labels have no class at all")
    table = np.zeros(HIGHEST_CLASS + 1, np.uint8)
    for position, (name, parts) in enumerate(wanted.items(), start=1):
        for part in parts:
            number = numbers.get(str(part), int(part) if str(part).isdigit() else None)
            if number not in known:
                raise ValueError(
                    f"classes: {name!r} is made of {part!r}, but the labels in {where} have only "
                    f"{', '.join(f'{n} ({i})' for i, n in sorted(known.items()))}"
                )
            if table[number]:
                raise ValueError(
                    f"classes: {part!r} is in two classes, {list(wanted)[table[number] - 1]!r} and {name!r}"
                )
            table[number] = position
    return Task(tuple(wanted), table)
