"""Does a label map lie where its image lies? Compared by the physical corners of both."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK as sitk

# Two grids may be half a voxel of the coarser one apart: rounding to whole voxels, centres against corners.
MOST_APART_VOXELS = 0.5
ROUNDING_MM = 0.01


@dataclass(frozen=True)
class Geometry:
    """Where an image's voxels lie, as SimpleITK gives it (x, y, z; direction row by row)."""

    size_xyz: Sequence[int]
    spacing_xyz_mm: Sequence[float]
    origin_xyz_mm: Sequence[float]
    direction_xyz: Sequence[float]

    @classmethod
    def of(cls, image: sitk.Image) -> Geometry:
        """That of a 3D image."""
        return cls(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())

    @classmethod
    def of_original(cls, original: Mapping[str, Any]) -> Geometry:
        """That of a case's source, see :class:`pgl.cache.manifest.CaseRecord`."""
        direction = np.asarray(original["direction_xyz"], dtype=float)
        rank = round(direction.size**0.5)
        return cls(
            tuple(original["size_xyz"][:3]),
            tuple(original["spacing_xyz_mm"][:3]),
            tuple(original["origin_xyz_mm"][:3]),
            tuple(direction.reshape(rank, rank)[:3, :3].ravel()),
        )

    @property
    def axes(self) -> np.ndarray:
        """Directions of the three index axes, as columns."""
        return np.asarray(self.direction_xyz, dtype=float).reshape(3, 3)

    def corners_mm(self) -> np.ndarray:
        """The eight outer corners [8, 3] in the patient's frame (x, y, z)."""
        ends = [(-0.5, n - 0.5) for n in self.size_xyz]
        index = np.array(list(itertools.product(*ends)))
        step = self.axes * np.asarray(self.spacing_xyz_mm, dtype=float)
        return index @ step.T + np.asarray(self.origin_xyz_mm, dtype=float)


def misalignment(label: Geometry, image: Geometry) -> str | None:
    """Why a label map does not belong to an image, in words; None if it lies where the image lies.

    The axes may be flipped or swapped and the spacing may differ: what counts is that each corner of the
    image is a corner of the label, to half a voxel of the coarser of the two along each axis.
    """
    # Everything along the image's own axes, in mm.
    theirs, ours = label.corners_mm() @ image.axes, image.corners_mm() @ image.axes
    along = np.abs(image.axes.T @ label.axes) * np.asarray(label.spacing_xyz_mm, dtype=float)
    coarser = np.maximum(np.asarray(image.spacing_xyz_mm, dtype=float), along.max(axis=1))
    allowed = MOST_APART_VOXELS * coarser + ROUNDING_MM
    apart = np.abs(theirs[None] - ours[:, None])  # [image corner, label corner, axis]
    nearest = (apart / allowed).max(axis=2).argmin(axis=1)
    gaps = apart[np.arange(len(ours)), nearest]
    if (gaps <= allowed).all() and len(set(nearest.tolist())) == len(ours):
        return None
    low = [np.round(corners.min(axis=0), 1) for corners in (label.corners_mm(), image.corners_mm())]
    high = [np.round(corners.max(axis=0), 1) for corners in (label.corners_mm(), image.corners_mm())]
    told = [
        f"{_times(g.size_xyz)} voxels of {_times(g.spacing_xyz_mm)} mm from ({_comma(a)}) to ({_comma(b)}) mm"
        for g, a, b in zip((label, image), low, high, strict=True)
    ]
    if tuple(label.size_xyz) == tuple(image.size_xyz):
        hint = "both have the same size, so one of them may have lost or changed its origin and direction"
    else:
        hint = "it belongs to another image, or one of them was cropped"
    return (
        f"not aligned with its image: the label covers {told[0]} (x, y, z), the image {told[1]}; corners are "
        f"up to {gaps.max():.1f} mm apart; {hint}"
    )


def _times(values: Sequence[float]) -> str:
    return "x".join(f"{v:.4g}" for v in values)


def _comma(values: Sequence[float]) -> str:
    return ", ".join(f"{v:g}" for v in values)
