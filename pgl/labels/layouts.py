"""Which label belongs to which image: the layouts of public data sets, recognised by what lies in a folder.

Each layout is one function from a SOURCE folder to a :class:`LabelPlan`, or None if the folder is not of it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pgl.labels.classes import parse_classes, read_classes
from pgl.labels.settings import LabelSettings

KITS_CASE = re.compile(r"case_\d{5}")
KITS_CLASSES = {1: "kidney", 2: "tumour"}
BCV_CLASSES = dict(
    enumerate(
        [
            "spleen", "right_kidney", "left_kidney", "gallbladder", "oesophagus", "liver", "stomach", "aorta",
            "inferior_vena_cava", "portal_and_splenic_vein", "pancreas", "right_adrenal_gland",
            "left_adrenal_gland",
        ],
        start=1,
    )
)  # fmt: skip
DEEPEST_BCV = 2  # RawData/Training/img below the folder that is given


@dataclass(frozen=True)
class LabelTarget:
    """The label file of an image, and the case's name in its data set."""

    path: str
    subject: str


@dataclass
class LabelPlan:
    """Which images have which labels.

    Attributes:
        layout: its name, for the report.
        classes: number → name; empty if nothing declares them.
        targets: real path of an image → its label.
        label_files: real paths of files that are no images.
        problems: (path, reason) of what the layout promises and is not there.
    """

    layout: str
    classes: dict[int, str] = field(default_factory=dict)
    targets: dict[str, LabelTarget] = field(default_factory=dict)
    label_files: set[str] = field(default_factory=set)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def add(self, image: Path, label: Path, subject: str) -> None:
        """Pair an image with its label, or note which of them is not there."""
        self.label_files.add(os.path.realpath(label))
        if not image.is_file():
            self.problems.append((str(label), f"label without image: there is no {image}"))
        elif not label.is_file():
            self.problems.append((str(image), f"image without label: there is no {label}"))
        else:
            self.targets[os.path.realpath(image)] = LabelTarget(str(label), subject)


def plan_layouts(sources: Sequence[str | os.PathLike[str]], settings: LabelSettings) -> LabelPlan | None:
    """Recognise the layout of each SOURCE and list which image has which label.

    Returns:
        The plan of all SOURCEs together; None if none of them is of a known layout.

    Raises:
        ValueError: ``settings.layout`` names a layout that no SOURCE has, two SOURCEs declare different
            classes, or a ``dataset.json`` cannot be used.
    """
    if settings.layout == "none":
        return None
    plans = []
    for source in sources:
        root = Path(os.path.abspath(source))
        tried = LAYOUTS if settings.layout == "auto" else {settings.layout: LAYOUTS[settings.layout]}
        found = (layout(root) for layout in tried.values()) if root.is_dir() else iter(())
        plan = next((p for p in found if p is not None), None)
        if plan is not None:
            plans.append((source, plan))
    if not plans:
        if settings.layout != "auto":
            raise ValueError(
                f"no SOURCE is in the layout {settings.layout}: expected {EXPECTED[settings.layout]}"
            )
        return None
    whole = LabelPlan("+".join(sorted({plan.layout for _, plan in plans})))
    declared = read_classes(settings.classes) if settings.classes else None
    for source, plan in plans:
        classes = plan.classes if declared is None else declared
        if whole.classes and classes != whole.classes:
            raise ValueError(
                f"SOURCE {os.fspath(source)!r} declares the classes {classes}, another one {whole.classes}: "
                "one cache has one set of classes; prepare them into two caches, or give --classes"
            )
        whole.classes = classes
        whole.targets.update(plan.targets)
        whole.label_files.update(plan.label_files)
        whole.problems += plan.problems
    return whole


def _msd(root: Path) -> LabelPlan | None:
    content = _dataset_json(root)
    if content is None or not isinstance(content.get("training"), list):
        return None
    where = str(root / "dataset.json")
    _one_channel(content.get("modality", {"0": "CT"}), where)
    plan = LabelPlan("msd", parse_classes(content.get("labels"), where))
    for entry in content["training"]:
        if not isinstance(entry, dict) or not {"image", "label"} <= set(entry):
            raise ValueError(f"{where}: 'training' must hold pairs of image and label, got {entry!r}")
        image, label = (_below(root, str(entry[key]), where) for key in ("image", "label"))
        plan.add(image, label, _stem(image.name))
    return plan


def _nnunet(root: Path) -> LabelPlan | None:
    content = _dataset_json(root)
    if content is None or not isinstance(content.get("channel_names"), dict) or "training" in content:
        return None
    where = str(root / "dataset.json")
    _one_channel(content["channel_names"], where)
    plan = LabelPlan("nnunet", parse_classes(content.get("labels"), where))
    ending = str(content.get("file_ending", ".nii.gz"))
    for part, required in (("Tr", True), ("Ts", False)):
        images, labels = root / f"images{part}", root / f"labels{part}"
        names = {p.name[: -len(ending)] for p in _visible(labels) if p.name.endswith(ending)}
        if required:
            channel = re.compile(r"(.+)_0000" + re.escape(ending))
            names |= {m[1] for p in _visible(images) if (m := channel.fullmatch(p.name))}
        for name in sorted(names):
            plan.add(images / f"{name}_0000{ending}", labels / f"{name}{ending}", name)
    return plan


def _kits(root: Path) -> LabelPlan | None:
    for folder in (root, root / "data"):
        cases = [p for p in _visible(folder) if KITS_CASE.fullmatch(p.name) and p.is_dir()]
        if any(_kits_files(case)[0].is_file() for case in cases):
            plan = LabelPlan("kits", dict(KITS_CLASSES))
            for case in cases:
                image, label = _kits_files(case)
                # The test cases of the challenge have no segmentation.
                if label.exists():
                    plan.add(image, label, case.name)
                others = (p for p in _visible(case) if p.is_file() and p != image)
                plan.label_files.update(os.path.realpath(p) for p in others)
            return plan
    return None


def _bcv(root: Path) -> LabelPlan | None:
    folders, level = [root], [root]
    for _ in range(DEEPEST_BCV):
        level = [below for folder in level for below in _folders(folder)]
        folders += level
    pairs = [f for f in folders if (f / "img").is_dir() and (f / "label").is_dir()]
    if not pairs:
        return None
    plan = LabelPlan("bcv", dict(BCV_CLASSES))
    for folder in pairs:
        images = {_after("img", p): p for p in _visible(folder / "img") if p.is_file()}
        labels = {_after("label", p): p for p in _visible(folder / "label") if p.is_file()}
        for name in sorted(set(images) | set(labels)):
            image = images.get(name, folder / "img" / f"img{name}.nii.gz")
            plan.add(image, labels.get(name, folder / "label" / f"label{name}.nii.gz"), name)
    return plan


LAYOUTS: dict[str, Callable[[Path], LabelPlan | None]] = {
    "msd": _msd,
    "nnunet": _nnunet,
    "kits": _kits,
    "bcv": _bcv,
}
EXPECTED = {
    "msd": "dataset.json with a list 'training' of images and labels",
    "nnunet": "dataset.json with 'channel_names', and imagesTr/NAME_0000… and labelsTr/NAME…",
    "kits": "folders case_00000 with imaging.nii.gz and segmentation.nii.gz",
    "bcv": "folders img and label with img0001.nii.gz and label0001.nii.gz",
}


def _dataset_json(root: Path) -> dict[str, Any] | None:
    path = root / "dataset.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}); correct it, or take the images alone with --layout none"
        ) from error
    return content if isinstance(content, dict) else None


def _one_channel(channels: Any, where: str) -> None:
    if not isinstance(channels, dict) or len(channels) != 1:
        raise ValueError(
            f"{where} declares the channels {channels}; CT has one: several channels are not supported"
        )


def _below(root: Path, name: str, where: str) -> Path:
    path = Path(os.path.normpath(root / name))
    if not path.is_relative_to(root):
        raise ValueError(f"{where} names a file outside its folder: {name!r}; refused")
    return path


def _kits_files(case: Path) -> tuple[Path, Path]:
    return case / "imaging.nii.gz", case / "segmentation.nii.gz"


def _after(prefix: str, path: Path) -> str:
    stem = _stem(path.name)
    return stem[len(prefix) :] if stem.startswith(prefix) else stem


def _visible(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _folders(folder: Path) -> list[Path]:
    # A folder of DICOM may hold many thousand files: they are not asked one by one what they are.
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(e.path) for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError:  # it may not be read: what walks through the SOURCE names it
        return []


def _stem(name: str) -> str:
    from pgl.images.native import split_suffixes

    return split_suffixes(name)[0]
