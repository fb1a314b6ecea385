"""Level sets: negative inside, about millimetres near the surface, combined like solids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Field = np.ndarray
Point = Sequence[Any] | np.ndarray  # of numbers, or of fields where the solid bends from slice to slice


def smooth_max(a: Field, b: Field, blend_mm: float) -> Field:
    """Intersection of two solids whose edge is rounded over `blend_mm`."""
    overlap = np.maximum(blend_mm - np.abs(a - b), 0)
    return np.maximum(a, b) + overlap * overlap * (0.25 / blend_mm)


def smooth_min(a: Field, b: Field, blend_mm: float) -> Field:
    """Union of two solids whose seam is rounded over `blend_mm`."""
    overlap = np.maximum(blend_mm - np.abs(a - b), 0)
    return np.minimum(a, b) - overlap * overlap * (0.25 / blend_mm)


def ellipsoid(coordinates: Sequence[Field], centre: Point, radii: Point) -> Field:
    """Ellipsoid (three coordinates) or ellipse (two); near its surface the value is the distance in mm."""
    squares: Any = 0.0
    gradient: Any = 0.0
    for coordinate, middle, radius in zip(coordinates, centre, radii, strict=True):
        scaled = (coordinate - np.asarray(middle, np.float32)) / np.asarray(radius, np.float32)
        scaled = scaled * scaled
        squares = squares + scaled
        gradient = gradient + scaled / np.asarray(radius, np.float32) ** 2
    k = np.sqrt(squares)
    return k * (k - 1) / np.sqrt(np.maximum(gradient, 1e-12))


def superellipse(x: Field, y: Field, centre: Point, radii: Point, power: float) -> Field:
    """Rounded box in the plane (|x/a|^p + |y/b|^p = 1); near its outline the value is in mm."""
    qx = np.abs(x - centre[0]) / radii[0]
    qy = np.abs(y - centre[1]) / radii[1]
    px, py = qx ** (power - 1), qy ** (power - 1)
    f = np.maximum(px * qx + py * qy, 1e-3) ** (1 / power)
    slope = f ** (1 - power) * np.hypot(px / radii[0], py / radii[1])
    return (f - 1) / np.maximum(slope, 1e-4)


def capsule(coordinates: Sequence[Field], start: Point, end: Point, radii: Point) -> Field:
    """Rod with round ends from `start` to `end` (x, y, z in mm) whose radius goes from one to the other."""
    distance, along = closest_on_segment(coordinates, start, end)
    return distance - (radii[0] + (radii[1] - radii[0]) * along)


def closest_on_segment(coordinates: Sequence[Field], start: Point, end: Point) -> tuple[Field, Field]:
    """Distance in mm to a segment, and where along it (0 to 1) the closest point lies."""
    offsets = [coordinate - np.float32(first) for coordinate, first in zip(coordinates, start, strict=True)]
    axis = [np.float32(last - first) for first, last in zip(start, end, strict=True)]
    length = max(float(sum(step * step for step in axis)), 1e-6)
    along: Any = sum(offset * step for offset, step in zip(offsets, axis, strict=True)) * np.float32(
        1 / length
    )
    along = np.clip(along, 0, 1)
    squares: Any = 0.0
    for offset, step in zip(offsets, axis, strict=True):
        residue = offset - along * step
        squares = squares + residue * residue
    return np.sqrt(squares), along
