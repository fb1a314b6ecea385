"""The picture being painted: Hounsfield units and labels on a grid, and the body's own coordinates there."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .levelsets import Field, Point
from .noise import spline_noise

Region = tuple[slice, ...]  # along (D, H, W)
WHOLE: Region = (slice(None), slice(None), slice(None))

AIR_HU = -1000.0
WARP_PITCH_MM = 75.0
WARP_SIGMA_MM = 4.5
RELIEF_PITCH_MM = 16.0
FINE_PITCH_MM = 3.0
MEDIUM_PITCH_MM = 8.0


class Canvas:
    """Voxels of one case and where they lie in the body.

    Body coordinates are millimetres of a person of average size: x to the left, y to the back, z to the
    head, zero in the middle of the trunk at the third lumbar vertebra. A smooth random warp separates them
    from the straight axes of the grid.

    Args:
        axes: straight body coordinates in mm of the voxel centres along z, y and x.
        streams: gives the random generator that belongs to a name.
    """

    def __init__(self, axes: tuple[np.ndarray, ...], streams: Callable[[str], np.random.Generator]) -> None:
        self.axes = tuple(axis.astype(np.float32) for axis in axes)
        self.voxel = tuple(float(axis[1] - axis[0]) for axis in axes)
        self.shape = tuple(len(axis) for axis in axes)
        z, y, x = np.meshgrid(*self.axes, indexing="ij", sparse=True)
        warp = [WARP_SIGMA_MM * spline_noise(streams(f"warp {name}"), axes, WARP_PITCH_MM) for name in "xyz"]
        self._reach = max(float(np.abs(component).max()) for component in warp)
        self.x, self.y, self.z = x + warp[0], y + warp[1], z + warp[2]
        self.relief = spline_noise(streams("relief"), axes, RELIEF_PITCH_MM)
        self.fine = spline_noise(streams("fine texture"), axes, FINE_PITCH_MM)
        self.medium = spline_noise(streams("medium texture"), axes, MEDIUM_PITCH_MM)
        self.hu = np.full(self.shape, AIR_HU, dtype=np.float32)
        self.labels = np.zeros(self.shape, dtype=np.uint8)

    def region(self, low: Point, high: Point) -> Region | None:
        """Smallest block of voxels that holds the body box low..high (x, y, z in mm); None if outside."""
        slices = []
        for axis, first, last, step in zip(self.axes, low[::-1], high[::-1], self.voxel, strict=True):
            margin = self._reach + 1.5 * step
            start = int(np.searchsorted(axis, first - margin))
            stop = int(np.searchsorted(axis, last + margin))
            if stop <= start:
                return None
            # Slopes are taken between neighbours, so a block is two voxels thick at least.
            if stop - start == 1:
                start = min(start, len(axis) - 2)
                stop = start + 2
            slices.append(slice(start, stop))
        return tuple(slices)

    def around(self, centre: Point, radius: float) -> Region | None:
        """Block of voxels that holds a ball."""
        return self.region([c - radius for c in centre], [c + radius for c in centre])

    def coordinates(self, region: Region | None = None) -> tuple[Field, Field, Field]:
        """Body coordinates (x, y, z) in mm of the voxels of a block."""
        if region is None:
            return self.x, self.y, self.z
        return self.x[region], self.y[region], self.z[region]

    def paint(
        self, region: Region, solid: Field, hu: Field | float, label: int = 0, strength: Field | float = 1.0
    ) -> None:
        """Lay a solid over what is there, mixing both in the voxels that its surface crosses.

        Args:
            region: block of voxels.
            solid: level set on that block.
            hu: Hounsfield units of the solid.
            label: label of the voxels that lie in it by half or more.
            strength: largest share of a voxel that the solid can fill, for vessels thinner than a voxel.
        """
        share = coverage(solid)
        if not share.any():
            return
        share *= strength
        values = self.hu[region]
        values += share * (hu - values)
        self.labels[region][share >= 0.5] = label


def crop(values: np.ndarray, have: Region, want: Region) -> np.ndarray:
    """Values known on the block `have`, on the block `want`; far outside the solid where not known."""
    result = np.full([w.stop - w.start for w in want], 1e3, np.float32)
    source, target = [], []
    for h, w in zip(have, want, strict=True):
        start, stop = max(h.start, w.start), min(h.stop, w.stop)
        source.append(slice(start - h.start, max(start, stop) - h.start))
        target.append(slice(start - w.start, max(start, stop) - w.start))
    result[tuple(target)] = values[tuple(source)]
    return result


def coverage(solid: Field) -> Field:
    """Share of each voxel (0 to 1) that lies inside the surface where the level set is zero.

    A voxel is a box, and the surface is nearly flat inside it, so the share falls from 1 to 0 while the
    level set changes by its difference across the voxel. No unit enters: any smooth level set will do.
    """
    width = sum(np.abs(step) for step in _steps(solid))
    return np.clip(0.5 - solid / np.maximum(width, 1e-3), 0, 1)


def _steps(values: Field) -> list[Field]:
    steps = []
    for axis in range(values.ndim):
        step = np.empty_like(values)
        inner, first, last = ([slice(None)] * values.ndim for _ in range(3))
        inner[axis], first[axis], last[axis] = slice(1, -1), slice(0, 1), slice(-1, None)
        before, after = list(inner), list(inner)
        before[axis], after[axis] = slice(0, -2), slice(2, None)
        np.subtract(values[tuple(after)], values[tuple(before)], out=step[tuple(inner)])
        step[tuple(inner)] *= 0.5
        second, before_last = list(first), list(last)
        second[axis], before_last[axis] = slice(1, 2), slice(-2, -1)
        step[tuple(first)] = values[tuple(second)] - values[tuple(first)]
        step[tuple(last)] = values[tuple(last)] - values[tuple(before_last)]
        steps.append(step)
    return steps
