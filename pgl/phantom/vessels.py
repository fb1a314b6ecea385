"""Large vessels of the abdomen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .canvas import Canvas
from .patient import LABELS, Patient
from .tubes import Segment, Tubes, curve_through, path, tube_union

Knots = Sequence[Sequence[float]]

PLAQUE_HU = 620.0

# From the front of the spine (x, y), at height z, in mm.
_CAVA = ((-15, -9, -34), (-17, -10, 0), (-19, -12, 45), (-22, -18, 80), (-25, -38, 118), (-24, -52, 165))
_AORTA = ((18, 4, 240), (17, -2, 180), (12, -9, 140), (8, -13, 95), (8, -12, 40), (5, -11, 0), (2, -10, -32))
# From the root of the superior mesenteric artery, in mm.
_MESENTERIC = ((0, 0, 0), (0, -14, -8), (-4, -22, -40), (-14, -28, -80), (-26, -26, -110))
_CELIAC = ((0, 0, 0), (0, -14, 3), (-22, -18, 4))


def beside_spine(patient: Patient, knots: Knots) -> np.ndarray:
    """Points given as (x, y, z) from the front of the spine, in body coordinates [n, 3]."""
    points = np.array(knots, dtype=np.float64)
    x, y = patient.spine(points[:, 2])
    points[:, 0] += x
    points[:, 1] += y - 17
    return points


def draw_great_vessels(canvas: Canvas, patient: Patient) -> None:
    """Paint vena cava, aorta, and their branches to the pelvis, the kidneys and the bowel."""
    rng = patient.stream("great vessels")
    hu = patient.hu
    veins = _tapered(beside_spine(patient, _CAVA), 11.5, 13.0)
    arteries = []
    for side in (-1, 1):
        out = 40 if side < 0 else 34
        iliac = [
            (-15, -9, -34),
            (-6 + 9 * side, -7, -52),
            (0.75 * out * side, -3, -80),
            (out * side, 4, -140),
        ]
        veins += _tapered(beside_spine(patient, iliac), 8.5, 7.5)
        start = beside_spine(patient, [(-15 if side < 0 else 9, -12, 40)])[0]
        hilum = np.array([side * 52.0, 10.0 + 4 * side, 36 + 4 * side])
        veins += _tapered(np.array([start, (start + hilum) / 2 + (0, -6, 3), hilum]), 5.0, 3.6)

        iliac = [(2, -10, -32), (12 * side, -12, -52), (30 * side, -12, -85), (44 * side, -6, -140)]
        arteries += _tapered(beside_spine(patient, iliac), 6.5, 4.8)
        start = beside_spine(patient, [(8, -12, 44)])[0]
        renal = np.array([start, (side * 30.0, 2.0, 42.0), (side * 54.0, 14.0, 38.0)])
        arteries += _tapered(renal, 3.0, 2.2)
    root = beside_spine(patient, [(8, -16, 64)])[0]
    arteries += _tapered(np.add(_MESENTERIC, root), 3.8, 2.0)
    root = beside_spine(patient, [(8, -16, 78)])[0]
    arteries += _tapered(np.add(_CELIAC, root), 3.4, 2.4)
    _draw(canvas, veins, hu["vena_cava"])
    _draw(canvas, arteries, hu["aorta"])

    course = beside_spine(patient, _AORTA)
    course[4:6, 0] += rng.uniform(-4, 5)
    radius = rng.uniform(8.5, 11.5)
    aorta = _tapered(course, radius + 1.5, radius - 1.0)
    tubes = _draw(canvas, aorta, hu["aorta"], LABELS["aorta"])
    if tubes is not None and patient.age > 0.45:
        # Plaques lie in the wall, in patches.
        patches = (2.2 - patient.age - canvas.medium[tubes.region]) * 3
        plaque = np.maximum(np.abs(tubes.solid + 0.3) - 1.2, patches)
        canvas.paint(tubes.region, plaque, PLAQUE_HU, LABELS["aorta"])


def draw_portal_system(canvas: Canvas, patient: Patient) -> None:
    """Paint superior mesenteric, splenic and portal vein up to the liver's gate."""
    confluence = (2.0, -36.0, 44.0)
    portal = np.array([confluence, (-16, -38, 60), (-36, -30, 78), (-52, -22, 86)])
    splenic = np.array([confluence, (28, -30, 58), (58, 0, 70), (84, 22, 76)])
    mesenteric = np.array([confluence, (-6, -44, 10), (-14, -50, -30), (-26, -50, -60)])
    veins = _tapered(portal, 7.0, 6.5) + _tapered(splenic, 4.6, 3.6) + _tapered(mesenteric, 5.5, 2.4)
    _draw(canvas, veins, patient.hu["portal_vein"])


def _tapered(knots: np.ndarray, first_radius: float, last_radius: float) -> list[Segment]:
    points = curve_through(knots, 4 * len(knots))
    return path(points, np.linspace(first_radius, last_radius, len(points)))


def _draw(canvas: Canvas, segments: list[Segment], hu: float, label: int = 0) -> Tubes | None:
    tubes = tube_union(canvas, segments)
    if tubes is not None:
        canvas.paint(tubes.region, tubes.solid, hu, label, tubes.strength)
    return tubes
