"""Spine: discs, vertebrae with their arches, the canal with its cord, and the upper sacrum."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas
from .levelsets import Field, capsule, ellipsoid, smooth_max, smooth_min, superellipse
from .patient import LABELS, VERTEBRAE, Patient

DEPTH = 0.70  # of a vertebral body against its width


def draw_spine(canvas: Canvas, patient: Patient) -> None:
    """Paint discs, vertebrae with their arches, the canal with its cord, and the upper sacrum."""
    rng = patient.stream("spine")
    region = canvas.region((-62, -20, -150), (62, 135, 260))
    if region is None:
        return
    heights = canvas.axes[0][region[0]][:, None, None]
    spine_x, spine_y = (v.astype(np.float32) for v in patient.spine(heights))
    x, y, _ = canvas.coordinates(region)
    size = _half_width(heights)
    column = superellipse(x, y, (spine_x, spine_y), (size - 0.6, DEPTH * size), 2.5)
    canvas.paint(region, column, 82 + 8 * canvas.fine[region])
    for name, (height, _, half_height) in VERTEBRAE.items():
        _draw_vertebra(canvas, patient, name, height, half_height * rng.uniform(0.96, 1.03))
    _draw_sacrum(canvas, patient)
    _draw_canal(canvas, patient)


def _half_width(height):
    """Of the vertebral bodies at a height, mm; they taper upwards."""
    return np.clip(24.5 - (height - 30) * 0.034, 17.5, 25.5)


def _draw_vertebra(canvas: Canvas, patient: Patient, name: str, height: float, half_height: float) -> None:
    middle_x, middle_y = (float(v) for v in patient.spine(height))
    region = canvas.region(
        (middle_x - 56, middle_y - 26, height - 32), (middle_x + 56, middle_y + 86, height + 26)
    )
    if region is None:
        return
    below, above = patient.spine(height - 12), patient.spine(height + 12)
    tilt = float(np.arctan2(above[1] - below[1], 24.0))
    x, y, z = canvas.coordinates(region)
    u = x - middle_x
    v = (y - middle_y) * np.cos(tilt) - (z - height) * np.sin(tilt)
    w = (y - middle_y) * np.sin(tilt) + (z - height) * np.cos(tilt)
    size = float(_half_width(height))
    lumbar = name.startswith("L")
    fine, relief = canvas.fine[region], canvas.relief[region]

    waist = 1 - 0.10 * (1 - np.clip(w / half_height, -1, 1) ** 2)
    body = superellipse(u, v, (0.0, 0.0), (size * waist, DEPTH * size * waist), 2.5) + 0.3 * relief
    body = smooth_max(body, np.abs(w) - half_height, 3)
    hollow = ellipsoid((u, v), (0.0, DEPTH * size + 8.5), (12.0, 10.0))
    body = smooth_max(body, -hollow, 2)
    arch = _arch(u, v, w, DEPTH * size, lumbar)
    arch = np.maximum(arch, -ellipsoid((u, v), (0.0, DEPTH * size + 8.5), (10.5, 8.5)))

    cortical, cancellous = patient.hu["cortical"], patient.hu["cancellous"]
    spine = LABELS["spine"]
    canvas.paint(region, arch, 0.72 * cortical, spine)
    canvas.paint(region, arch + 1.8, cancellous + 90 + 45 * fine, spine)
    canvas.paint(region, body, cortical, spine)
    trabeculae = cancellous + (20 + 12 * patient.age) * fine - 18 * np.exp(-((w / 5) ** 2))
    canvas.paint(region, body + 1.5, trabeculae, spine)


def _arch(u: Field, v: Field, w: Field, rear: float, lumbar: bool) -> Field:
    """Pedicles, laminae, joints, spinous and transverse processes of a vertebra whose body ends at `rear`."""
    u = np.abs(u)
    here = (u, v, w)
    pedicle = capsule(here, (12.5, rear - 5, 4), (15.5, rear + 10, 3), (4.5, 4.5))
    lamina = capsule((u, v, 0.42 * w), (15.5, rear + 13, 0), (0.5, rear + 21, -2.5), (3.8, 3.4))
    joints = ellipsoid(here, (17.5, rear + 13.5, 0.0), (7.0, 6.0, 19.5 if lumbar else 15.0))
    if lumbar:
        spinous = ellipsoid(here, (0.0, rear + 35, -7.0), (4.2, 16.0, 12.0))
        transverse = capsule(here, (15, rear + 8, 2), (41, rear + 15, 4), (4.2, 2.8))
    else:
        spinous = capsule(here, (0.0, rear + 24, -8.0), (0.0, rear + 44, -24.0), (3.8, 3.4))
        transverse = capsule(here, (15, rear + 9, 2), (29, rear + 22, 6), (4.4, 4.6))
    arch = pedicle
    for part in (lamina, joints, spinous, transverse):
        arch = smooth_min(arch, part, 3)
    return arch


def _draw_sacrum(canvas: Canvas, patient: Patient) -> None:
    middle_x, middle_y = (float(v) for v in patient.spine(-100.0))
    region = canvas.region((middle_x - 70, middle_y - 30, -150), (middle_x + 70, middle_y + 60, -70))
    if region is None:
        return
    x, y, z = canvas.coordinates(region)
    u, v, w = np.abs(x - middle_x), y - middle_y, z + 100
    lean = v + 0.55 * w
    body = smooth_max(superellipse(u, lean, (0.0, 0.0), (26.0, 17.0), 2.5), w + 0.25 * v - 15, 4)
    wing = ellipsoid((u, lean, w), (38.0, 13.0, -16.0), (26.0, 16.0, 26.0))
    rear = ellipsoid((u, lean, w), (0.0, 34.0, -6.0), (14.0, 9.0, 14.0))
    solid = smooth_min(smooth_min(body, wing, 8), rear, 6)
    spine = LABELS["spine"]
    canvas.paint(region, solid, 0.8 * patient.hu["cortical"], spine)
    canvas.paint(region, solid + 2, 0.85 * patient.hu["cancellous"] + 40 * canvas.fine[region], spine)


def _draw_canal(canvas: Canvas, patient: Patient) -> None:
    region = canvas.region((-40, -20, -150), (40, 110, 260))
    if region is None:
        return
    heights = canvas.axes[0][region[0]][:, None, None]
    spine_x, spine_y = (v.astype(np.float32) for v in patient.spine(heights))
    size = _half_width(heights)
    x, y, _ = canvas.coordinates(region)
    centre = (spine_x, spine_y + DEPTH * size + 9.0)
    canvas.paint(region, ellipsoid((x, y), centre, (9.6, 8.0)), patient.hu["fat"] * 0.6)
    canvas.paint(region, ellipsoid((x, y), centre, (7.6, 6.6)), 18 + 5 * canvas.fine[region])
    cord = ellipsoid((x, y), centre, (4.6, 3.8))
    canvas.paint(region, np.maximum(cord, 75 - heights), 38.0)
