"""The common grid: axis-aligned in the patient, one spacing, growing toward superior, posterior, left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

HU_RANGE = (-1024, 3071)  # what a 12-bit CT scanner stores; padding below it and metal above it are clipped
AIR_HU = HU_RANGE[0]

# Full width at half maximum of a Gaussian, in standard deviations.
FWHM_PER_SIGMA = 2.0 * math.sqrt(2.0 * math.log(2.0))
# A narrower Gaussian than this (in voxels) changes a voxel by under 0.1 % of a step: not worth the pass.
SMALLEST_SIGMA_VOXELS = 0.2
ORTHONORMAL_TOLERANCE = 2e-3  # headers round direction cosines to 3 decimals or more


@dataclass(frozen=True)
class Grid:
    """Where a volume's voxels lie: all triples (D, H, W); origin is the centre of voxel (0, 0, 0).

    The axes grow toward superior, posterior and left, which are SimpleITK's z, y, x (LPS) in array order.
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]

    @property
    def voxels(self) -> int:
        return math.prod(self.shape)


def common_grid(
    size_xyz: Sequence[int],
    spacing_xyz_mm: Sequence[float],
    origin_xyz_mm: Sequence[float],
    direction_xyz: Sequence[float],
    spacing_mm: tuple[float, float, float],
) -> Grid:
    """The axis-aligned grid of ``spacing_mm`` that covers an image's physical extent.

    An image whose axes are parallel to the patient's is covered exactly, but for rounding to whole voxels,
    which is shared between both ends (at most a quarter of a voxel each). An oblique image is covered by its
    bounding box: the corners that it does not reach become air.

    Args:
        size_xyz, spacing_xyz_mm, origin_xyz_mm, direction_xyz: the image's, as SimpleITK gives them (x, y, z;
            direction row by row).
        spacing_mm: spacing of the new grid, (D, H, W).
    """
    size = np.asarray(size_xyz, dtype=np.float64)
    step = np.asarray(direction_xyz, dtype=np.float64).reshape(3, 3) * np.asarray(
        spacing_xyz_mm, dtype=np.float64
    )
    ends = np.stack([np.full(3, -0.5), size - 0.5])
    corners = np.array([[ends[i, 0], ends[j, 1], ends[k, 2]] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    physical = corners @ step.T + np.asarray(origin_xyz_mm, dtype=np.float64)
    low, high = physical.min(axis=0), physical.max(axis=0)
    target = np.asarray(spacing_mm[::-1], dtype=np.float64)
    shape = np.maximum(np.rint((high - low) / target), 1)
    origin = (low + high) / 2 - (shape - 1) / 2 * target
    depth, height, width = (int(n) for n in shape[::-1])
    z, y, x = (float(o) for o in origin[::-1])
    return Grid((depth, height, width), spacing_mm, (z, y, x))


def resample(image: sitk.Image, grid: Grid) -> np.ndarray:
    """Bring an image of HU onto ``grid``.

    Values are clipped to :data:`HU_RANGE` first, so that padding such as -3024 cannot bleed into the body.
    Where the new spacing is coarser than the image's, a Gaussian matches the point spread function to it (its
    width is that of Cardoso et al., "Scale factor point spread function matching", MICCAI 2015), because
    linear interpolation alone would alias noise into the coarse grid. Then linear interpolation; air outside.

    Args:
        image: 3D scalar SimpleITK image in HU.
        grid: where to.

    Returns:
        int16 array [D, H, W].
    """
    image = sitk.Clamp(image, sitk.sitkFloat32, *(float(bound) for bound in HU_RANGE))
    sigma = antialias_sigma_voxels(image.GetSpacing(), image.GetDirection(), grid.spacing_mm)
    if any(sigma):
        image = sitk.DiscreteGaussian(
            image,
            variance=[s * s for s in sigma],
            maximumKernelWidth=64,
            maximumError=0.01,
            useImageSpacing=False,
        )
    resampler = sitk.ResampleImageFilter()
    resampler.SetSize(grid.shape[::-1])
    resampler.SetOutputSpacing(grid.spacing_mm[::-1])
    resampler.SetOutputOrigin(grid.origin_mm[::-1])
    resampler.SetInterpolator(sitk.sitkLinear)
    resampler.SetDefaultPixelValue(float(AIR_HU))
    values = sitk.GetArrayFromImage(resampler.Execute(image))
    return np.rint(values, out=values).astype(np.int16)


def antialias_sigma_voxels(
    spacing_xyz_mm: Sequence[float], direction_xyz: Sequence[float], spacing_mm: tuple[float, float, float]
) -> list[float]:
    """Standard deviation of the smoothing before resampling, in the image's own voxels along its own axes."""
    direction = np.asarray(direction_xyz, dtype=np.float64).reshape(3, 3)
    target = np.asarray(spacing_mm[::-1], dtype=np.float64)
    # The distance between the new grid's samples as met when walking along each of the image's axes.
    met = 1.0 / np.linalg.norm(direction / target[:, None], axis=0)
    factors = met / np.asarray(spacing_xyz_mm, dtype=np.float64)
    sigma = np.sqrt(np.maximum(factors**2 - 1.0, 0.0)) / FWHM_PER_SIGMA
    return [float(s) if s >= SMALLEST_SIGMA_VOXELS else 0.0 for s in sigma]
