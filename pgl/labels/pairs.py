"""Images and labels in two folders, or in one, paired by their names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from pgl.images.find import IMAGE_SUFFIXES, walk
from pgl.images.native import split_suffixes
from pgl.labels.classes import read_classes
from pgl.labels.layouts import LabelPlan, LabelTarget
from pgl.labels.settings import LabelSettings

CLASS_FILES = ("labels.json", "classes.json")


def named_files(folder: Path, pattern: str) -> tuple[dict[str, Path], list[tuple[str, str]]]:
    """Image files below a folder by the part of their name that ``*`` stands for, and what is wrong there:
    files whose part another file already has, and folders that cannot be read, each with the reason.

    Links are followed, and a file that is reached twice under one name counts once.
    """
    found: dict[str, Path] = {}
    problems: list[tuple[str, str]] = []
    for path in map(Path, walk(os.fspath(folder), problems)):
        part = shared_part(path.name, pattern)
        if part is None or split_suffixes(path.name)[1].lower() not in IMAGE_SUFFIXES:
            continue
        if part not in found:
            found[part] = path
        elif os.path.realpath(path) != os.path.realpath(found[part]):
            problems.append((str(path), f"has the same name as {found[part]}: rename one"))
    return found, problems


def without_partner(files: Mapping[str, Path], paired: Iterable[str]) -> list[str]:
    """The names of files that are not among the ``paired``; other names (links) of paired files are none."""
    names = set(paired)
    used = {os.path.realpath(files[name]) for name in names}
    return [name for name in sorted(set(files) - names) if os.path.realpath(files[name]) not in used]


def shared_part(name: str, pattern: str) -> str | None:
    """What the ``*`` of the pattern stands for in a file's name without its suffixes; None if it does not
    match."""
    stem = split_suffixes(name)[0]
    before, after = (split_suffixes(pattern)[0] if "*" in split_suffixes(pattern)[0] else pattern).split("*")
    match = re.fullmatch(re.escape(before) + "(.+)" + re.escape(after), stem)
    return match[1] if match else None


class Pairs:
    """Labels of one folder, to be paired with images as these are found.

    Args:
        settings: with ``labels``.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no label map in it.
    """

    def __init__(self, settings: LabelSettings) -> None:
        folder = Path(os.path.abspath(settings.labels or ""))
        if not folder.is_dir():
            raise FileNotFoundError(f"labels: {os.fspath(settings.labels or '')!r} is no folder")
        self.folder, self.settings = folder, settings
        self.labels, problems = named_files(folder, settings.label_name)
        if not self.labels:
            raise ValueError(
                f"labels: {folder} holds no image file whose name matches {settings.label_name!r} "
                "(label_name)"
            )
        self.plan = LabelPlan("pairs", self._classes(), problems=problems)
        self.plan.label_files = {os.path.realpath(path) for path in self.labels.values()}

    def _classes(self) -> dict[int, str]:
        if self.settings.classes:
            return read_classes(self.settings.classes)
        places = (folder / name for folder in (self.folder, self.folder.parent) for name in CLASS_FILES)
        path = next((place for place in places if place.is_file()), None)
        return read_classes(path) if path else {}

    def match(self, images: list[str]) -> LabelPlan:
        """Pair the images with the labels.

        Args:
            images: paths of image files and of folders of DICOM series.

        Returns:
            The plan, with what has no partner among its problems.
        """
        taken: dict[str, str] = {}
        for image in sorted(images):
            part = shared_part(os.path.basename(image), self.settings.image_name)
            if part is None:
                reason = f"image without label: its name does not match {self.settings.image_name!r}"
                self.plan.problems.append((image, f"{reason} (image_name)"))
            elif part not in self.labels:
                wanted = self.settings.label_name.replace("*", part)
                reason = (
                    f"image without label: no file called {wanted} in {self.folder}; add it, or say with "
                    "--label_name how labels are called (the image is cached without one)"
                )
                self.plan.problems.append((image, reason))
            elif part in taken:
                self.plan.problems.append((image, f"has the label of {taken[part]}: rename one"))
            else:
                taken[part] = image
                self.plan.targets[os.path.realpath(image)] = LabelTarget(str(self.labels[part]), part)
        for part in without_partner(self.labels, taken):
            self.plan.problems.append(
                (str(self.labels[part]), f"label without image: no image is called {part!r}")
            )
        return self.plan
