"""Tubes: unions of tapered rods, from which vessels, bowel and long muscles are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .canvas import Canvas, Region
from .levelsets import Field, Point, closest_on_segment


@dataclass(frozen=True)
class Segment:
    """A rod from `start` to `end` (x, y, z in mm) with a radius in mm at either end."""

    start: np.ndarray
    end: np.ndarray
    radii: tuple[float, float]


@dataclass(frozen=True)
class Tubes:
    """Union of segments on a block of voxels."""

    region: Region
    solid: Field
    """Level set of the union, in mm."""
    number: Field
    """Which segment is nearest."""
    along: Field
    """Where along it the nearest point lies, 0 to 1."""
    strength: Field
    """Largest share of a voxel that the nearest segment can fill; below 1 if thinner than a voxel."""

    def attribute(self, at_points: np.ndarray) -> Field:
        """Values given at the n + 1 points of a path of n segments, spread to the voxels."""
        start = at_points[:-1].astype(np.float32)[self.number]
        end = at_points[1:].astype(np.float32)[self.number]
        return start + (end - start) * self.along


def tube_union(canvas: Canvas, segments: Sequence[Segment], margin_mm: float = 8.0) -> Tubes | None:
    """Join segments to one solid; None where all of them lie outside the canvas.

    Args:
        canvas: the grid.
        segments: the rods.
        margin_mm: how far around each of them the level set is followed; beyond it is just `margin_mm`.
    """
    widest = max(max(segment.radii) for segment in segments) + margin_mm
    ends = np.array([(segment.start, segment.end) for segment in segments]).reshape(-1, 3)
    region = canvas.region(ends.min(axis=0) - widest, ends.max(axis=0) + widest)
    if region is None:
        return None
    shape = canvas.hu[region].shape
    solid, along = np.full(shape, margin_mm, np.float32), np.zeros(shape, np.float32)
    number = np.zeros(shape, np.int32)
    # A rod much thinner than a voxel would slip between the centres: it is widened and made weaker instead.
    thinnest = 0.45 * min(canvas.voxel)
    strength = np.ones(len(segments), np.float32)
    for index, segment in enumerate(segments):
        reach = max(segment.radii) + margin_mm
        block = canvas.region(
            np.minimum(segment.start, segment.end) - reach, np.maximum(segment.start, segment.end) + reach
        )
        if block is None:
            continue
        outer = tuple(
            slice(max(b.start, r.start), min(b.stop, r.stop)) for b, r in zip(block, region, strict=True)
        )
        if any(part.stop <= part.start for part in outer):
            continue
        inner = tuple(slice(o.start - r.start, o.stop - r.start) for o, r in zip(outer, region, strict=True))
        distance, where = closest_on_segment(canvas.coordinates(outer), segment.start, segment.end)
        first, last = (float(np.hypot(radius, thinnest)) for radius in segment.radii)
        distance -= first + (last - first) * where
        closer = distance < solid[inner]
        solid[inner][closer] = distance[closer]
        along[inner][closer] = where[closer]
        number[inner][closer] = index
        radius = sum(segment.radii) / 2
        strength[index] = radius**2 / (radius**2 + thinnest**2)
    return Tubes(region, solid, number, along, strength[number])


def path(points: np.ndarray, radii: np.ndarray) -> list[Segment]:
    """The segments of a polyline of points [n, 3] with a radius at every point."""
    return [
        Segment(points[i], points[i + 1], (float(radii[i]), float(radii[i + 1])))
        for i in range(len(points) - 1)
    ]


def curve_through(knots: Sequence[Point] | np.ndarray, count: int) -> np.ndarray:
    """`count` points [count, width] of a smooth (Catmull-Rom) curve through the given knots."""
    inner = np.asarray(knots, dtype=np.float64)
    padded = np.concatenate([2 * inner[:1] - inner[1:2], inner, 2 * inner[-1:] - inner[-2:-1]])
    at = np.linspace(0, len(inner) - 1, count)
    base = np.minimum(at.astype(int), len(inner) - 2)
    t = (at - base)[:, None]
    a, b, c, d = (padded[base + i] for i in range(4))
    return 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)


def branches(
    rng: np.random.Generator,
    start: np.ndarray,
    heading: np.ndarray,
    length: float,
    radius: float,
    generations: int,
    spread: float = 0.6,
) -> list[Segment]:
    """A tree of vessels that thins and forks.

    Args:
        rng: source of the directions.
        start: first point (x, y, z) in mm.
        heading: direction of the first branch; it need not be a unit vector.
        length: length of the first branch in mm.
        radius: radius there in mm.
        generations: number of branches on the way to a tip.
        spread: how far a daughter leaves her mother's direction, as a tangent.
    """
    heading = heading / np.linalg.norm(heading)
    points, radii = [np.asarray(start, dtype=np.float64)], [radius]
    for step in range(3):
        heading = heading + 0.16 * rng.standard_normal(3)
        heading /= np.linalg.norm(heading)
        points.append(points[-1] + heading * length / 3)
        radii.append(radius * (1 - 0.1 * (step + 1)))
    segments = path(np.array(points), np.array(radii))
    if generations > 1:
        side = np.cross(heading, rng.standard_normal(3))
        side *= spread / max(float(np.linalg.norm(side)), 1e-6)
        for sign in (-1, 1):
            daughter = radius * rng.uniform(0.6, 0.8)
            segments += branches(
                rng,
                points[-1],
                heading + sign * side * rng.uniform(0.6, 1.3),
                length * rng.uniform(0.7, 0.9),
                daughter,
                generations - 1,
                spread,
            )
    return segments
