"""Read a label map and check that it is one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import SimpleITK as sitk

from pgl.images import Limits, RejectedImage, read_file
from pgl.labels.classes import HIGHEST_CLASS

MOST_NAMED = 5
ROUNDING = 1e-4  # what a header's scale factor leaves of a whole number


def read_label(path: str, limits: Limits) -> sitk.Image:
    """Read a label map: NIfTI, NRRD or MetaImage.

    Returns:
        A 3D uint8 image.

    Raises:
        RejectedImage: the file is not whole, or its values are no whole numbers from 0 to 255.
    """
    image, _ = read_file(path, limits)
    values = sitk.GetArrayViewFromImage(image)
    if not np.issubdtype(values.dtype, np.integer):
        wrong = values[~(np.abs(np.rint(values) - values) <= ROUNDING)]
        if wrong.size:
            shown = ", ".join(f"{v:g}" for v in np.unique(wrong)[:MOST_NAMED])
            raise RejectedImage(
                f"not a label map: {wrong.size} voxels are no whole numbers (such as {shown}); an image, a "
                "probability, or a label that was resampled with linear interpolation"
            )
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > HIGHEST_CLASS:
        raise RejectedImage(
            f"not a label map: values from {low:g} to {high:g}; expected class numbers from 0 to "
            f"{HIGHEST_CLASS}"
        )
    label = sitk.GetImageFromArray(np.rint(values).astype(np.uint8))
    label.CopyInformation(image)
    return label


def class_numbers(label: sitk.Image) -> set[int]:
    """The numbers of a label map, without the background."""
    return {int(n) for n in np.unique(sitk.GetArrayViewFromImage(label)) if n}


def check_classes(
    label: sitk.Image,
    declared: Mapping[int, str],
    allow_empty: bool,
    remedy: str = "correct the label, or declare them with `pgl prepare --classes FILE`",
    what: str = "",
) -> None:
    """Hold a label map's numbers against the declared classes.

    Args:
        label: uint8 image.
        declared: number → name without the background; none means that any number is a class.
        allow_empty: whether a map without foreground is fine.
        remedy: what to do about undeclared numbers.
        what: whose numbers they are, before the reason.

    Raises:
        RejectedImage: undeclared numbers, or no foreground.
    """
    numbers, counts = np.unique(sitk.GetArrayViewFromImage(label), return_counts=True)
    present = {int(n): int(c) for n, c in zip(numbers, counts, strict=True) if n}
    known = sorted(declared)
    undeclared = {n: c for n, c in present.items() if known and n not in known}
    if undeclared:
        told = ", ".join(f"{n} ({c} voxels)" for n, c in list(undeclared.items())[:MOST_NAMED])
        more = f" and {len(undeclared) - MOST_NAMED} more" if len(undeclared) > MOST_NAMED else ""
        raise RejectedImage(
            f"{what}undeclared classes {told}{more}; declared are "
            f"{', '.join(f'{number} ({declared[number]})' for number in known)}: {remedy}"
        )
    if not present and not allow_empty:
        raise RejectedImage(
            "empty label: every voxel is background; leave the case out, or keep it as one without findings "
            "with --allow_empty_labels true"
        )
