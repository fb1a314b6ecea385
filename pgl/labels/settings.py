"""The settings of ``pgl prepare`` that are about labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LAYOUTS = ("auto", "none", "msd", "kits", "bcv", "nnunet")


@dataclass(frozen=True)
class LabelSettings:
    """Where the label maps of the images lie and what their numbers mean.

    Attributes:
        labels: folder of label maps that are paired with the images by name; a layout is then not looked for.
        image_name: with ``labels``: how images are called, one ``*`` for the part that an image shares with
            its label, for example ``*_ct.nii.gz``.
        label_name: with ``labels``: how label maps are called, likewise, for example ``*_tumour.nii.gz``.
        layout: how labelled data lie below a SOURCE: msd, kits, bcv or nnunet; ``auto`` recognises them,
            ``none`` takes no labels.
        classes: JSON or YAML file of class names and numbers, such as ``{"liver": 1, "lesion": 2}``; it goes
            before what a layout declares. Without any, every number is a class.
        label_interpolation: how labels are resampled: ``linear`` interpolates each class between 0 and 1 and
            takes the largest, ``nearest`` takes the nearest voxel's.
        allow_empty_labels: keep a label map without any foreground instead of rejecting it.
    """

    labels: str | None = None
    image_name: str = "*"
    label_name: str = "*"
    layout: Literal["auto", "none", "msd", "kits", "bcv", "nnunet"] = "auto"
    classes: str | None = None
    label_interpolation: Literal["linear", "nearest"] = "linear"
    allow_empty_labels: bool = False

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        if self.label_interpolation not in ("linear", "nearest"):
            raise ValueError(
                f"label_interpolation must be linear or nearest, got {self.label_interpolation!r}"
            )
        if self.labels is not None and self.layout not in ("auto", "none"):
            raise ValueError(f"give labels or layout, not both: got {self.labels!r} and {self.layout!r}")
        for name in ("image_name", "label_name"):
            pattern = getattr(self, name)
            if pattern.count("*") != 1:
                raise ValueError(
                    f"{name} must hold one * for the part that an image shares with its label, such as "
                    f"'*_seg.nii.gz', got {pattern!r}"
                )
            if pattern != "*" and self.labels is None:
                raise ValueError(f"{name} is about a folder of label maps: give that with labels")
