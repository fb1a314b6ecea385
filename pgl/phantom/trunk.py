"""Skin, fat and muscles of the body wall, the cavity inside, and the diaphragm that divides it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .canvas import WHOLE, Canvas
from .levelsets import Field, ellipsoid, smooth_max, smooth_min, superellipse
from .patient import Patient

# Inner wall of the trunk at several heights, in mm: half width, front, back.
_CAVITY_HEIGHTS = (-140.0, -95.0, -60.0, -20.0, 30.0, 80.0, 120.0, 160.0, 220.0)
_CAVITY_WIDTH = (116.0, 117.0, 119.0, 122.0, 127.0, 131.0, 130.0, 127.0, 118.0)
_CAVITY_FRONT = (-84.0, -90.0, -92.0, -94.0, -98.0, -101.0, -100.0, -97.0, -90.0)
_CAVITY_BACK = (62.0, 56.0, 52.0, 55.0, 64.0, 77.0, 86.0, 92.0, 94.0)
_CAVITY_POWER = 2.35


@dataclass(frozen=True)
class Trunk:
    """The spaces that the organs fill, as level sets in mm on the whole grid."""

    cavity: Field
    """Inside of the body wall, chest and abdomen together."""
    diaphragm: Field
    """Signed distance from the diaphragm: negative below."""
    abdomen: Field
    """Cavity below the diaphragm."""
    back_mm: float
    """How far back (y) the skin reaches near the midline: there the couch begins."""


@dataclass(frozen=True)
class _Wall:
    """Shares of the body wall around a voxel, seen from the middle of the trunk; they add up to 1."""

    lateral: Field
    anterior: Field
    posterior: Field
    chest: Field
    """0 at the belly to 1 at the chest, one value a slice."""
    seams: Field
    """1 where the straight muscles of the belly end."""
    thickness: Field
    """Of the muscular wall, mm."""


def draw_trunk(canvas: Canvas, patient: Patient) -> Trunk:
    """Paint the body without its organs and return the spaces inside it."""
    z = canvas.axes[0][:, None, None]
    half_width, front, back = (
        np.interp(z, _CAVITY_HEIGHTS, values).astype(np.float32)
        for values in (_CAVITY_WIDTH, _CAVITY_FRONT, _CAVITY_BACK)
    )
    front -= np.exp(-(((z + 5) / 75) ** 2)) * (22 * patient.visceral_fat - 9)
    middle, half_depth = (front + back) / 2, (back - front) / 2
    cavity = superellipse(canvas.x, canvas.y, (0.0, middle), (half_width, half_depth), _CAVITY_POWER)
    cavity += 0.8 * canvas.relief
    wall = _wall(canvas, patient, canvas.x / half_width, (canvas.y - middle) / half_depth)
    back_muscle = _back_muscle(canvas, patient, wall.chest)
    muscle = smooth_min(cavity - wall.thickness, back_muscle, 8)
    skin = _skin(canvas, patient, cavity, back_muscle, wall, front, back)

    canvas.paint(WHOLE, skin, 55 + 12 * canvas.fine)
    canvas.paint(WHOLE, skin + 2.4, fat_texture(canvas, patient, 0.7))
    canvas.paint(WHOLE, muscle, _muscle_texture(canvas, patient, cavity, back_muscle, wall))
    canvas.paint(WHOLE, cavity, fat_texture(canvas, patient, 1.3))
    diaphragm = _diaphragm(canvas, patient, cavity)
    dome = np.maximum(cavity, np.abs(diaphragm + 0.9) - 1.3)
    canvas.paint(WHOLE, dome, patient.hu["muscle"] + 5 * canvas.fine)

    reached = np.flatnonzero((skin[:, :, np.abs(canvas.axes[2]) < 60] < 0).any(axis=(0, 2)))
    back_mm = float(canvas.axes[1][reached[-1]]) if len(reached) else 120.0
    return Trunk(cavity, diaphragm, smooth_max(cavity + 0.5, diaphragm + 2.0, 6), back_mm)


def _wall(canvas: Canvas, patient: Patient, across: Field, depth: Field) -> _Wall:
    lateral = across * across
    lateral = lateral / np.maximum(lateral + depth * depth, 0.05)
    anterior = np.where(depth < 0, 1 - lateral, 0)
    posterior = 1 - lateral - anterior
    chest = np.clip((canvas.axes[0][:, None, None] - 20) / 80, 0, 1)
    outer = np.abs(canvas.x) - 68 - 0.10 * canvas.z
    seams = np.maximum(np.exp(-((canvas.x / 5.0) ** 2)), np.exp(-((outer / 6.0) ** 2)))
    bulk = patient.muscle
    thickness = lateral * (22 * bulk - 3 * chest) + posterior * (15 + 4 * chest)
    thickness += anterior * (12.5 * bulk + 5 * chest) * (1 - 0.4 * seams * (1 - chest))
    return _Wall(lateral, anterior, posterior, chest, seams, thickness)


def _back_muscle(canvas: Canvas, patient: Patient, chest: Field) -> Field:
    """The erector spinae on both sides of the spinous processes."""
    spine_x, spine_y = (v.astype(np.float32) for v in patient.spine(canvas.axes[0][:, None, None]))
    width = 34.0 * (0.9 + 0.1 * patient.muscle) - 6 * chest
    depth = 24 * patient.muscle - 4 * chest
    right, left = (
        superellipse(
            canvas.x,
            canvas.y,
            (spine_x + side * (0.98 * width + 1), spine_y + 60 - 5 * chest),
            (width, depth),
            2.3,
        )
        for side in (-1, 1)
    )
    return smooth_min(right, left, 2) + 1.2 * canvas.relief


def _skin(
    canvas: Canvas,
    patient: Patient,
    cavity: Field,
    back_muscle: Field,
    wall: _Wall,
    front: Field,
    back: Field,
) -> Field:
    """Outline of the body: the wall under its fat, rounded over the muscles of the back, with a navel."""
    z = canvas.axes[0][:, None, None]
    _, spine_y = (v.astype(np.float32) for v in patient.spine(z))
    fat = patient.fat_mm * (1.12 - 0.45 * wall.chest + 0.15 * np.clip(-z / 80, 0, 1))
    rear = spine_y + 64 + 24 * patient.muscle - 9 * wall.chest + 0.55 * fat
    padding = fat * (wall.lateral + 0.85 * wall.anterior) + (rear - back - wall.thickness) * wall.posterior
    padding = np.maximum(padding, 4)
    skin = smooth_min(cavity - wall.thickness - padding, back_muscle - 5 - 0.3 * fat, 14)
    navel = ellipsoid(
        canvas.coordinates(), (0.0, front - 16 - 0.85 * fat, -42.0), (9.0, 7.0 + 0.35 * patient.fat_mm, 9.0)
    )
    return smooth_max(skin, -navel, 8)


def fat_texture(canvas: Canvas, patient: Patient, strands: float) -> Field:
    """Fat with the thin septa and small vessels that make it look woven."""
    septa = np.exp(-((canvas.medium / 0.10) ** 2)) * (canvas.relief > -0.2)
    return patient.hu["fat"] + 5 * canvas.fine + strands * 26 * septa


def _muscle_texture(
    canvas: Canvas, patient: Patient, cavity: Field, back_muscle: Field, wall: _Wall
) -> Field:
    """Muscle with fat between its layers: three at the flank, straight ones in front, bundles at the back."""
    hu = patient.hu["muscle"] + 5 * canvas.fine
    layer = np.clip(cavity / np.maximum(wall.thickness, 1), -1, 2)
    flank = np.clip(wall.lateral * 1.6 - 0.35, 0, 1) * np.clip((canvas.z + 85) / 30, 0, 1)
    chest = wall.chest
    first = np.exp(-(((layer - 0.33) * wall.thickness / 0.9) ** 2))
    second = np.exp(-(((layer - 0.66 - 0.1 * chest) * wall.thickness / 0.9) ** 2))
    planes = first * (1 - chest) + second * (1 - 0.2 * chest)
    gaps = flank * planes * np.clip(0.5 + 0.4 * canvas.relief, 0.05, 0.9)
    gaps = np.maximum(gaps, 0.55 * wall.anterior * wall.seams * (1 - chest) * np.exp(-((canvas.x / 60) ** 4)))
    # Clefts between the bundles of the erector spinae, bent by the relief.
    bundle = np.sin((np.abs(canvas.x) + 2.5 * canvas.relief + 0.4 * canvas.y) / 6.5)
    cleft = np.exp(-((bundle / 0.14) ** 2)) * np.clip(canvas.relief + 0.2 + 0.6 * patient.age, 0, 1)
    gaps = np.maximum(gaps, 0.65 * cleft * (back_muscle < -2) * (cavity > 8))
    return hu + gaps * (patient.hu["fat"] - hu)


def _diaphragm(canvas: Canvas, patient: Patient, cavity: Field) -> Field:
    """Signed distance (mm) from two domes that hug the wall before they rise: the costophrenic recess."""
    rng = patient.stream("diaphragm")
    x, y, z = canvas.coordinates()
    right, left = 30 + rng.uniform(-6, 7), 20 + rng.uniform(-7, 6)
    level = 119 + rng.uniform(-6, 6)
    top = (
        level
        + right * np.exp(-(((x + 68) / 55) ** 2) - ((y - 2) / 70) ** 2)
        + left * np.exp(-(((x - 74) / 50) ** 2) - ((y - 4) / 66) ** 2)
    )
    # Lowest where the recess is deepest, at the back; highest in front.
    rim = 84 - 0.42 * y
    depth = np.clip(-cavity, 0, None)
    rise = np.exp(-depth / 15)
    height = top - (top - rim) * rise
    slope = np.abs(top - rim) / 15 * rise
    return (z - height) / np.sqrt(1 + slope * slope)
