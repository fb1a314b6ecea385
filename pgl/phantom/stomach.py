"""Oesophagus, stomach, duodenum and pancreas."""

from __future__ import annotations

import numpy as np

from .bowel import Hollow, draw_hollow
from .canvas import Canvas
from .noise import smooth_curve
from .patient import Patient
from .trunk import Trunk
from .tubes import curve_through, path, tube_union
from .vessels import beside_spine

# Paths (x, y, z in mm). Stomach: fundus under the left dome to the pylorus.
_STOMACH = (
    (60, 16, 116),
    (70, 4, 104),
    (74, -24, 84),
    (66, -54, 58),
    (40, -68, 40),
    (8, -66, 36),
    (-24, -54, 42),
)
_DUODENUM = ((-24, -54, 42), (-46, -38, 38), (-50, -20, 14), (-38, -18, -8), (-8, -30, -10), (26, -34, 4))
# Head to tail.
_PANCREAS = ((-32, -30, 16), (-22, -36, 34), (0, -47, 50), (26, -42, 58), (54, -12, 68), (80, 14, 72))


def draw_stomach(canvas: Canvas, patient: Patient, trunk: Trunk) -> None:
    """Paint the food's way from the oesophagus to the duodenum, then the pancreas."""
    rng = patient.stream("stomach")
    _draw_oesophagus(canvas, patient)

    points = curve_through(_STOMACH + rng.standard_normal((len(_STOMACH), 3)) * 4, 26)
    radii = np.interp(np.linspace(0, 1, 26), (0, 0.15, 0.4, 0.6, 0.8, 1), (36, 41, 36, 29, 21, 11))
    stomach = Hollow(points, radii * rng.uniform(0.78, 1.08), 3.2, level_mm=rng.uniform(-76, -40))
    tubes = stomach.tubes(canvas)
    meal = rng.uniform(18, 28) + (160 if rng.uniform() < 0.3 else 0)
    if tubes is not None:
        draw_hollow(canvas, patient, trunk, stomach, tubes, meal + 7 * canvas.medium[tubes.region])

    points = curve_through(_DUODENUM + rng.standard_normal((len(_DUODENUM), 3)) * 2, 22)
    radii = 11.5 * (1 + 0.08 * smooth_curve(rng, np.arange(22), 2.0))
    duodenum = Hollow(points, radii, 2.6)
    draw_hollow(canvas, patient, trunk, duodenum, duodenum.tubes(canvas), 22.0)
    _draw_pancreas(canvas, patient, trunk)


def _draw_oesophagus(canvas: Canvas, patient: Patient) -> None:
    beside = beside_spine(patient, [(16, -14, 240), (14, -16, 165), (14, -20, 132)])
    points = curve_through([*beside, (30.0, -4.0, 116.0), (52.0, 4.0, 108.0)], 16)
    tubes = tube_union(canvas, path(points, np.full(16, 8.0)))
    if tubes is not None:
        hu = patient.hu["bowel_wall"] - 25 * canvas.relief[tubes.region] ** 2
        canvas.paint(tubes.region, tubes.solid, hu)


def _draw_pancreas(canvas: Canvas, patient: Patient, trunk: Trunk) -> None:
    rng = patient.stream("pancreas")
    points = curve_through(_PANCREAS + rng.standard_normal((len(_PANCREAS), 3)) * 3, 20)
    radii = np.interp(np.linspace(0, 1, 20), (0, 0.2, 0.4, 0.7, 1), (14, 14, 9, 10.5, 8))
    tubes = tube_union(canvas, path(points, radii * rng.uniform(0.9, 1.1)))
    if tubes is None:
        return
    region = tubes.region
    # Fat grows between the lobules with age.
    lobules = (1.6 + 1.4 * patient.age) * canvas.medium[region]
    around = np.maximum(tubes.solid - 2.5, trunk.abdomen[region])
    canvas.paint(region, around, patient.hu["fat"] + 5 * canvas.fine[region])
    canvas.paint(region, tubes.solid + lobules + 1.0, patient.hu["pancreas"] + 8 * canvas.fine[region])
