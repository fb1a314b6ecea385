"""Label maps onto a case's grid; class probabilities back onto an image's own grid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import SimpleITK as sitk

from pgl.images import Grid
from pgl.images.grid import antialias_sigma_voxels


def resample_label(label: sitk.Image, grid: Grid, interpolation: str = "linear") -> np.ndarray:
    """Bring a label map onto a grid; background outside of it.

    ``linear``: each class as a volume of 0 and 1 is smoothed where the grid is coarser (as images are),
    interpolated linearly, and the largest wins; the lower number where two are equal.

    Args:
        label: uint8 image.
        grid: where to.
        interpolation: ``linear`` or ``nearest``.

    Returns:
        uint8 array [D, H, W].
    """
    if interpolation == "nearest":
        return sitk.GetArrayFromImage(_onto(grid, sitk.sitkNearestNeighbor, 0).Execute(label))
    numbers = [0, *(int(n) for n in np.unique(sitk.GetArrayViewFromImage(label)) if n)]
    sigma = antialias_sigma_voxels(label.GetSpacing(), label.GetDirection(), grid.spacing_mm)

    def shares() -> Iterable[np.ndarray]:
        for number in numbers:
            share = sitk.Cast(label == number, sitk.sitkFloat32)
            if any(sigma):
                share = sitk.DiscreteGaussian(
                    share,
                    variance=[s * s for s in sigma],
                    maximumKernelWidth=64,
                    maximumError=0.01,
                    useImageSpacing=False,
                )
            outside = 1.0 if number == 0 else 0.0
            yield sitk.GetArrayFromImage(_onto(grid, sitk.sitkLinear, outside).Execute(share))

    return largest(shares(), numbers)


def probabilities_onto(image: sitk.Image, probabilities: np.ndarray, grid: Grid) -> np.ndarray:
    """The most likely class of each voxel of an image, from probabilities on a grid.

    Args:
        image: the image whose own grid is wanted, whatever its orientation.
        probabilities: float32 [classes, D, H, W] on ``grid``, background first.
        grid: where they lie.

    Returns:
        uint8 array in the image's own array order.
    """
    resampler = sitk.ResampleImageFilter()
    resampler.SetReferenceImage(image)
    resampler.SetInterpolator(sitk.sitkLinear)
    # The grid is rounded to whole voxels and may end a quarter of one short of the image's border.
    resampler.UseNearestNeighborExtrapolatorOn()

    def shares() -> Iterable[np.ndarray]:
        for volume in probabilities:
            share = sitk.GetImageFromArray(np.ascontiguousarray(volume, dtype=np.float32))
            share.SetSpacing(grid.spacing_mm[::-1])
            share.SetOrigin(grid.origin_mm[::-1])
            yield sitk.GetArrayFromImage(resampler.Execute(share))

    return largest(shares(), list(range(len(probabilities))))


def largest(shares: Iterable[np.ndarray], numbers: Sequence[int]) -> np.ndarray:
    """uint8 array of the number whose share is largest in each voxel, the first of equals; one share at a
    time is held."""
    best: np.ndarray | None = None
    chosen = np.zeros(0, np.uint8)
    for number, share in zip(numbers, shares, strict=True):
        if best is None:
            best, chosen = share, np.full(share.shape, number, np.uint8)
        else:
            more = share > best
            best[more] = share[more]
            chosen[more] = number
    return chosen


def _onto(grid: Grid, interpolator: int, outside: float) -> sitk.ResampleImageFilter:
    resampler = sitk.ResampleImageFilter()
    resampler.SetSize(grid.shape[::-1])
    resampler.SetOutputSpacing(grid.spacing_mm[::-1])
    resampler.SetOutputOrigin(grid.origin_mm[::-1])
    resampler.SetInterpolator(interpolator)
    resampler.SetDefaultPixelValue(float(outside))
    return resampler
