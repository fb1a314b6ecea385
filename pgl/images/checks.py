"""What may enter the cache: checks on geometry and intensities, each with its reason in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pgl.images.grid import ORTHONORMAL_TOLERANCE, Grid, common_grid

# Scanners make 0.2-10 mm; beyond these bounds the header is wrong (metres, missing values, a crafted file).
SPACING_BOUNDS_MM = (0.05, 20.0)

SAMPLED_VOXELS = 4_000_000
FEWEST_DISTINCT_VALUES = 50  # real CT has hundreds; masks and posterised pictures have a few
LABEL_VALUES = 256
AIR_WINDOW_HU = (-1200.0, -300.0)
TISSUE_FLOOR_HU = -500.0
SOFT_WINDOW_HU = (-200.0, 300.0)
LEAST_AIR = 1e-4
LEAST_SOFT = 0.01
LEAST_SOFT_OF_TISSUE = 0.3
METAL_HU = 4000.0
MOST_METAL = 0.02
BEYOND_ANY_HU = 100_000.0

NOT_AT_RIGHT_ANGLES = "the axes are not at right angles"
TILT = "sheared, as by an uncorrected gantry tilt; correct the tilt first, for example with dcm2niix"


class RejectedImage(ValueError):
    """An image that must not enter the cache; the message is the reason given to the user."""


@dataclass(frozen=True)
class Limits:
    """What a volume must fulfil, beyond being CT.

    Attributes:
        spacing_mm: spacing of the common grid (D, H, W).
        minimum_size: fewest voxels (D, H, W) after resampling.
        maximum_voxels: most voxels, as stored and after resampling.
        slice_tolerance: how far a DICOM slice may lie from the even grid, as a part of the mean slice
            spacing.
    """

    spacing_mm: tuple[float, float, float]
    minimum_size: tuple[int, int, int]
    maximum_voxels: int
    slice_tolerance: float


def check_geometry(
    size_xyz: Sequence[int],
    spacing_xyz_mm: Sequence[float],
    origin_xyz_mm: Sequence[float],
    direction_xyz: Sequence[float],
    components: int,
    limits: Limits,
) -> Grid:
    """Check what a header claims, before any memory is taken for its voxels.

    Args:
        size_xyz, spacing_xyz_mm, origin_xyz_mm, direction_xyz: as SimpleITK gives them.
        components: values per voxel.
        limits: what is allowed.

    Returns:
        The grid that the image will be resampled to.

    Raises:
        RejectedImage: vectors or colours, not 3D, a nonsensical or sheared geometry, too large.
    """
    shown = "x".join(str(n) for n in size_xyz)
    if components != 1:
        raise RejectedImage(f"{components} values per voxel (RGB or vectors); CT has one")
    extents = [n for n in size_xyz if n != 1]
    if len(size_xyz) > 3 and any(n != 1 for n in size_xyz[3:]):
        raise RejectedImage(f"{len(size_xyz)}D image of {shown} voxels; split it into 3D volumes first")
    if len(size_xyz) < 3 or len(extents) < 3:
        raise RejectedImage(f"2D image of {shown} voxels; a volume is needed")
    if math.prod(size_xyz) > limits.maximum_voxels:
        raise RejectedImage(
            f"the header claims {shown} voxels; more than {limits.maximum_voxels} are refused "
            "(maximum_voxels)"
        )
    spacing = spacing_xyz_mm[:3]
    low, high = SPACING_BOUNDS_MM
    if not all(math.isfinite(s) and low <= s <= high for s in spacing):
        raise RejectedImage(
            f"spacing {_numbers(spacing)} mm (x, y, z) is not between {low:g} and {high:g} mm"
        )
    matrix = _spatial_part(direction_xyz)
    if not all(math.isfinite(o) for o in origin_xyz_mm) or not np.isfinite(matrix).all():
        raise RejectedImage("the header's origin or direction is not finite")
    if np.abs(matrix.T @ matrix - np.eye(3)).max() > ORTHONORMAL_TOLERANCE:
        raise RejectedImage(f"{NOT_AT_RIGHT_ANGLES}: {TILT}")
    grid = common_grid(size_xyz[:3], spacing, origin_xyz_mm[:3], matrix.ravel().tolist(), limits.spacing_mm)
    if grid.voxels > limits.maximum_voxels:
        raise RejectedImage(
            f"would have {_after_resampling(grid)}; more than {limits.maximum_voxels} voxels are refused "
            "(maximum_voxels)"
        )
    return grid


def check_size(grid: Grid, limits: Limits) -> None:
    """Raise RejectedImage if the resampled volume is smaller than ``limits.minimum_size`` on any axis."""
    if any(n < least for n, least in zip(grid.shape, limits.minimum_size, strict=True)):
        least = "x".join(map(str, limits.minimum_size))
        raise RejectedImage(
            f"too small: {_after_resampling(grid)}; at least {least} are needed (minimum_size)"
        )


def check_intensities(values: np.ndarray) -> None:
    """Check that voxel values can be Hounsfield units of a body: air near -1000, water at 0.

    Padding below -1024, metal above 3071, float and 32-bit storage are all fine.

    Args:
        values: any real dtype, any shape.

    Raises:
        RejectedImage: NaN or infinity, a label map or 8-bit picture, stored values without their rescale
            intercept, normalised intensities, no air, no soft tissue, values beyond any HU.
    """
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = int(values.size - np.isfinite(values).sum())
        raise RejectedImage(not_finite_reason(bad))
    seen = f"values from {low:g} to {high:g}"
    flat = values.reshape(-1)
    sample = flat[:: max(1, flat.size // SAMPLED_VOXELS) | 1]
    distinct = np.unique(sample)
    whole = bool(np.equal(np.rint(distinct), distinct).all())
    exclude = "leave such files out with --exclude, for example --exclude '*_seg.nii.gz'"
    if low == high:
        raise RejectedImage(f"every voxel is {low:g}: no image in it")
    if distinct.size < FEWEST_DISTINCT_VALUES or (low >= 0 and high < LABEL_VALUES and whole):
        raise RejectedImage(
            f"not HU: {distinct.size} different values from {low:g} to {high:g}, "
            f"as in a label map or an 8-bit picture; {exclude}"
        )
    if low >= 0:
        raise RejectedImage(
            f"not HU: {seen}, none below 0, but air is near -1000 HU; another modality, or stored values "
            "whose rescale intercept (often -1024) was lost"
        )
    if max(-low, high) > BEYOND_ANY_HU:
        raise RejectedImage(f"not HU: {seen}")

    def part(lower: float, upper: float) -> float:
        return float(np.count_nonzero((sample >= lower) & (sample < upper))) / sample.size

    soft, tissue = part(*SOFT_WINDOW_HU), part(TISSUE_FLOOR_HU, math.inf)
    if part(*AIR_WINDOW_HU) < LEAST_AIR:
        raise RejectedImage(
            f"not HU: {seen}, but no air (between {AIR_WINDOW_HU[0]:g} and {AIR_WINDOW_HU[1]:g}); normalised "
            "intensities, a crop inside the body, or stored values whose rescale intercept was lost"
        )
    if soft < LEAST_SOFT or soft < LEAST_SOFT_OF_TISSUE * tissue:
        raise RejectedImage(
            f"not HU: {seen}, but only {100 * soft:.2g} % of the voxels are soft tissue "
            f"({SOFT_WINDOW_HU[0]:g} to {SOFT_WINDOW_HU[1]:g}); no body, or shifted or scaled values"
        )
    if part(METAL_HU, math.inf) > MOST_METAL:
        raise RejectedImage(
            f"not HU: {seen}, and {100 * part(METAL_HU, math.inf):.2g} % are above {METAL_HU:g}"
        )


def not_finite_reason(count: int) -> str:
    """What is said of an image in which ``count`` voxels are NaN or infinite."""
    return f"{count} {'voxel is' if count == 1 else 'voxels are'} NaN or infinite"


def _spatial_part(direction: Sequence[float]) -> np.ndarray:
    rank = math.isqrt(len(direction))
    return np.asarray(direction, dtype=np.float64).reshape(rank, rank)[:3, :3]


def _after_resampling(grid: Grid) -> str:
    shape, spacing = "x".join(map(str, grid.shape)), _numbers(grid.spacing_mm)
    return f"{shape} voxels (D, H, W) after resampling to {spacing} mm"


def _numbers(values: Sequence[float]) -> str:
    return "x".join(f"{v:g}" for v in values)
