"""Base of the lungs with their vessels, and the lower part of the heart."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas, crop
from .levelsets import ellipsoid, smooth_max, smooth_min
from .patient import Patient
from .trunk import Trunk, fat_texture
from .tubes import branches, tube_union


def draw_chest(canvas: Canvas, patient: Patient, trunk: Trunk) -> None:
    """Paint the base of the lungs with their vessels, and the lower part of the heart."""
    rng = patient.stream("chest")
    region = canvas.region((-150, -130, 55), (150, 130, 400))
    if region is None:
        return
    x, y, z = canvas.coordinates(region)
    relief = canvas.relief[region]
    spine_x, spine_y = (v.astype(np.float32) for v in patient.spine(canvas.axes[0][region[0]][:, None, None]))
    heart_centre = (32 + rng.uniform(-6, 6), -38 + rng.uniform(-6, 6), 176 + rng.uniform(-8, 8))
    heart = ellipsoid((x, y, z), heart_centre, (62.0, 50.0, 46.0)) + 1.2 * relief
    # Between the lungs: oesophagus, aorta and fat in front of the spine, the heart's fat further forward.
    column = ellipsoid((x, y), (spine_x + 6, spine_y - 22), (27.0, 30.0))
    mediastinum = smooth_min(smooth_min(heart - 6, column, 18), ellipsoid((x, y), (8, -80), (22, 34)), 20)
    mediastinum = smooth_min(mediastinum, ellipsoid((x, y), (spine_x, spine_y + 14), (24.0, 34.0)), 14)
    lungs = smooth_max(np.maximum(trunk.cavity[region] + 2.5, 0.9 - trunk.diaphragm[region]), -mediastinum, 8)
    density = -868 + 0.35 * np.clip(y + 40, 0, 160) + 14 * canvas.medium[region] + 12 * canvas.fine[region]
    above = np.maximum(trunk.cavity[region], 0.6 - trunk.diaphragm[region])
    canvas.paint(region, above, fat_texture(canvas, patient, 0.7)[region])
    canvas.paint(region, lungs, density)

    vessels = []
    for side in (-1, 1):
        root = np.array([side * 42.0 + 6, 12.0, 205.0])
        for _ in range(9):
            heading = np.array(
                [side * rng.uniform(0.0, 1.0), rng.uniform(-0.9, 1.0), rng.uniform(-1.2, -0.4)]
            )
            vessels += branches(rng, root, heading, rng.uniform(34, 50), rng.uniform(2.4, 3.6), 4)
    tree = tube_union(canvas, vessels, margin_mm=6)
    if tree is not None:
        inside = np.maximum(tree.solid, crop(lungs, region, tree.region) + 1.5)
        canvas.paint(tree.region, inside, patient.hu["heart"] * 0.55 + 15, strength=tree.strength)

    canvas.paint(region, np.maximum(heart, 0.6 - trunk.diaphragm[region]), patient.hu["myocardium"])
    chambers = np.minimum(
        ellipsoid((x, y, z), tuple(np.add(heart_centre, (17, 3, 8))), (27.0, 23.0, 30.0)),
        ellipsoid((x, y, z), tuple(np.add(heart_centre, (-22, -14, 6))), (26.0, 24.0, 32.0)),
    )
    canvas.paint(
        region, np.maximum(chambers + 1.5 * relief, 4 - trunk.diaphragm[region]), patient.hu["heart"]
    )
