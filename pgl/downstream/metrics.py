"""How well a segmentation fits: Dice and the 95 % Hausdorff distance of each class.

Dice is MONAI's. The surface distance follows MONAI's definition, computed with SimpleITK, since MONAI's own
needs a package that we do not depend on; a test compares the two where it is installed. Training needs a
cache alone, so where SimpleITK is not installed a slower way of our own is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.metrics import compute_dice

PERCENTILE = 95.0
_PAIRED_AT_ONCE = 1024  # rows, so that the table of distances stays small


@dataclass(frozen=True)
class Score:
    """One class of one case.

    Attributes:
        subject: the case's name.
        name: the class's name.
        dice: in [0, 1]; None if neither truth nor prediction has the class, 0 if only one has.
        hd95_mm: 95 % Hausdorff distance; None unless both have the class.
        voxels_true: voxels of the class in the truth.
        voxels_predicted: in the prediction.
    """

    subject: str
    name: str
    dice: float | None
    hd95_mm: float | None
    voxels_true: int
    voxels_predicted: int


def score_case(
    subject: str,
    prediction: np.ndarray,
    truth: np.ndarray,
    names: Sequence[str],
    spacing_mm: Sequence[float],
) -> list[Score]:
    """Score each class.

    Args:
        subject: the case's name.
        prediction, truth: uint8 [D, H, W] of classes, 0 for background.
        names: of the classes 1, 2, …
        spacing_mm: (D, H, W) of a voxel.

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"{subject}: prediction has shape {prediction.shape}, truth {truth.shape}")
    scores = []
    for number, name in enumerate(names, start=1):
        ours, theirs = prediction == number, truth == number
        scores.append(
            Score(
                subject,
                name,
                dice(ours, theirs),
                hausdorff95(ours, theirs, spacing_mm),
                int(theirs.sum()),
                int(ours.sum()),
            )
        )
    return scores


def dice(prediction: np.ndarray, truth: np.ndarray) -> float | None:
    """Dice of two masks; None if both are empty."""
    if not prediction.any() and not truth.any():
        return None
    pair = [torch.from_numpy(np.ascontiguousarray(mask))[None, None] for mask in (prediction, truth)]
    return float(compute_dice(pair[0], pair[1], ignore_empty=False))


def hausdorff95(prediction: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float]) -> float | None:
    """95 % Hausdorff distance of two masks' surfaces in mm; None if one is empty.

    A surface is the voxels of a mask of which a face touches what is not in it; outside the volume counts as
    such. Of all distances from one surface's voxels to the nearest of the other the 95th percentile is taken,
    and of the two directions the larger.

    Args:
        prediction, truth: bool [D, H, W].
        spacing_mm: (D, H, W) of a voxel.
    """
    if not prediction.any() or not truth.any():
        return None
    place = _around(prediction | truth)
    first, second = surface(prediction[place]), surface(truth[place])
    return max(_percentile(first, second, spacing_mm), _percentile(second, first, spacing_mm))


def surface(mask: np.ndarray) -> np.ndarray:
    """The voxels of a mask that have a face in common with what is not in it."""
    inner = mask.copy()
    for axis in range(mask.ndim):
        for shift in (1, -1):
            neighbour = np.roll(mask, shift, axis)
            edge: list[slice | int] = [slice(None)] * mask.ndim
            edge[axis] = 0 if shift == 1 else -1
            neighbour[tuple(edge)] = False
            inner &= neighbour
    return mask & ~inner


def _percentile(of: np.ndarray, to: np.ndarray, spacing_mm: Sequence[float]) -> float:
    return float(np.percentile(nearest_distances(of, to, spacing_mm), PERCENTILE))


def nearest_distances(of: np.ndarray, to: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Distance in mm of each voxel of one mask to the nearest of the other, float [n].

    Args:
        of, to: bool [D, H, W], not empty.
        spacing_mm: (D, H, W) of a voxel.
    """
    try:
        import SimpleITK as sitk
    except ImportError:
        return distances_by_pairs(of, to, spacing_mm)
    image = sitk.GetImageFromArray(to.astype(np.uint8))
    image.SetSpacing([float(s) for s in spacing_mm[::-1]])
    signed = sitk.SignedMaurerDistanceMap(image, squaredDistance=False, useImageSpacing=True)
    # Negative inside of what is thicker than a voxel: there the distance is 0.
    return np.maximum(sitk.GetArrayViewFromImage(signed)[of], 0)


def distances_by_pairs(of: np.ndarray, to: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """The same without SimpleITK: all pairs are tried, quick for surfaces of some thousand voxels."""
    first, second = (torch.from_numpy(np.argwhere(mask) * np.asarray(spacing_mm)) for mask in (of, to))
    parts = [
        torch.cdist(some, second, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
        for some in first.split(_PAIRED_AT_ONCE)
    ]
    return torch.cat(parts).numpy()


def _around(mask: np.ndarray) -> tuple[slice, ...]:
    """The box around a mask, with a voxel to spare inside the volume."""
    slices = []
    for axis in range(mask.ndim):
        there = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        slices.append(slice(max(int(there[0]) - 1, 0), int(there[-1]) + 2))
    return tuple(slices)
