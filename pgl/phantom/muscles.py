"""Muscles along the spine inside the belly."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas
from .patient import Patient
from .tubes import path, tube_union


def draw_deep_muscles(canvas: Canvas, patient: Patient) -> None:
    """Paint psoas, quadratus lumborum and the crura of the diaphragm along the spine."""
    for side in (-1, 1):
        psoas, inner_quadratus, outer_quadratus, crus = [], [], [], []
        for z in np.linspace(90, -140, 24):
            middle_x, middle_y = (float(v) for v in patient.spine(z))
            low = np.clip((75 - z) / 165, 0, 1.2)
            psoas.append((middle_x + side * (23 + 24 * low), middle_y + 7 - 6 * low, z, 4 + 18 * low**0.75))
            if -75 < z < 75:
                splay = 0.10 * (20 - z)
                inner_quadratus.append((middle_x + side * (52 + splay), middle_y + 31, z, 9.5))
                outer_quadratus.append((middle_x + side * (69 + splay), middle_y + 32, z, 8.0))
        for z in np.linspace(150, 20, 14):
            middle_x, middle_y = (float(v) for v in patient.spine(z))
            lift = np.clip((z - 20) / 130, 0, 1)
            crus.append(
                (middle_x + 3 + side * (14 + 5 * lift), middle_y - 20 - 3 * lift, z, 5.0 + 3.0 * lift)
            )
        for muscle in (inner_quadratus, outer_quadratus, crus, psoas):
            rods = np.array(muscle)
            tubes = tube_union(canvas, path(rods[:, :3], rods[:, 3] * patient.muscle))
            if tubes is None:
                continue
            solid = tubes.solid + 1.8 * canvas.relief[tubes.region]
            canvas.paint(tubes.region, solid + 0.4, patient.hu["muscle"] + 6 * canvas.fine[tubes.region])
