"""Smooth random fields in millimetres: the source of every variation and texture of the phantom."""

from __future__ import annotations

import math

import numpy as np

PERIOD_MM = 480.0  # longer than the trunk that is drawn, so that the repetition is never seen
# Mean over positions of the sum of squared cubic B-spline weights: 151/315.
_SPLINE_POWER = 151.0 / 315.0


def spline_noise(rng: np.random.Generator, axes: tuple[np.ndarray, ...], pitch_mm: float) -> np.ndarray:
    """Smooth Gaussian noise of unit variance, defined in millimetres and not in voxels.

    Cubic B-splines over a periodic lattice of random numbers. The draws depend on the pitch alone, so the
    same generator state gives the same field however finely it is sampled.

    Args:
        rng: source of the lattice values.
        axes: coordinates in mm along z, y and x, one vector each.
        pitch_mm: distance between lattice points; details are about twice that size.

    Returns:
        float32 array of shape (len(z), len(y), len(x)).
    """
    count = max(4, math.ceil(PERIOD_MM / pitch_mm))
    field = rng.standard_normal((count, count, count), dtype=np.float32)
    for axis, positions in enumerate(axes):
        field = _interpolate(field, axis, np.asarray(positions, dtype=np.float64) / pitch_mm)
    return field / np.float32(_SPLINE_POWER**1.5)


def smooth_curve(rng: np.random.Generator, positions: np.ndarray, pitch: float) -> np.ndarray:
    """Smooth Gaussian noise of unit variance along one axis; `positions` and `pitch` share a unit."""
    lattice = rng.standard_normal(64, dtype=np.float32)
    curve = _interpolate(lattice, 0, np.asarray(positions, dtype=np.float64) / pitch)
    return curve / np.float32(_SPLINE_POWER**0.5)


def _interpolate(values: np.ndarray, axis: int, positions: np.ndarray) -> np.ndarray:
    base = np.floor(positions).astype(np.int64)
    t = positions - base
    weights = (
        (1 - t) ** 3 / 6,
        (3 * t**3 - 6 * t**2 + 4) / 6,
        (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6,
        t**3 / 6,
    )
    shape = [1] * values.ndim
    shape[axis] = -1
    result = np.zeros(1, np.float32)
    # Four taps added one after the other, not a matrix product: a BLAS may sum in an order of its own.
    for offset, weight in enumerate(weights):
        taps = values.take((base + offset - 1) % values.shape[axis], axis=axis)
        taps *= weight.astype(np.float32).reshape(shape)
        result = np.add(result, taps, out=taps)
    return result
