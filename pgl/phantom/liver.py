"""Liver with its vessels and lesions, gallbladder, and spleen."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas, Region, crop
from .kidneys import kidney_bed
from .levelsets import ellipsoid, smooth_max
from .patient import LABELS, Patient
from .trunk import Trunk
from .tubes import branches, curve_through, path, tube_union


def draw_liver(canvas: Canvas, patient: Patient, trunk: Trunk) -> None:
    """Paint the liver: all of the space under the right dome down to a slanting visceral surface."""
    rng = patient.stream("liver")
    region = canvas.region((-150, -130, -70), (125, 110, 240))
    if region is None:
        return
    x, y, z = canvas.coordinates(region)
    relief = canvas.relief[region]
    tip = -8 + rng.uniform(-18, 16)
    rise = 0.72 + rng.uniform(-0.05, 0.06)
    underside = _underside(tip, rise, x, y) - z
    solid = smooth_max(trunk.abdomen[region] + 1.0, underside * 0.75 + 2.0 * relief, 16)
    # Behind the left lobe lie oesophagus, stomach and spleen: a wedge left of the vena cava stays free.
    edge = 0.58 * (x + 30) + 0.81 * (y - 10 + rng.uniform(-5, 5))
    wedge = np.maximum(-edge, -(x + 22 + 8 * np.clip((100 - z) / 40, 0, 1) + 0.12 * (y - 20)))
    solid = smooth_max(solid, -wedge + 1.2 * relief, 14)
    # The kidney lies against the back of the cavity, not wrapped in liver.
    solid = smooth_max(solid, 1.5 - kidney_bed(canvas, patient, region, behind=0.35), 6)
    ligament = ellipsoid((x - 0.15 * y, y, z), (24.0, -92.0, 62.0), (4.0, 34.0, 30.0))
    gate = ellipsoid((x, y + 0.4 * x, z - 0.5 * x), (-16.0, -44.0, 68.0), (36.0, 10.0, 13.0))
    solid = smooth_max(smooth_max(solid, -ligament, 4), -gate, 8)
    hu = patient.hu["liver"] + 4 * canvas.fine[region] + 3 * canvas.medium[region]
    canvas.paint(region, solid, hu, LABELS["liver"])

    _draw_vessels(canvas, patient, region, solid)
    _draw_lesions(canvas, patient, region, solid)
    # The gallbladder hangs half out of the visceral surface.
    points = np.array([(-38.0, -38.0, 8.0), (-47.0, -50.0, 2.0), (-56.0, -62.0, -3.0), (-63.0, -72.0, -9.0)])
    points[:, :2] += rng.uniform(-6, 6, 2)
    points[:, 2] += _underside(tip, rise, points[:, 0], points[:, 1])
    calibre = rng.uniform(0.75, 1.15)
    tubes = tube_union(canvas, path(curve_through(points, 10), calibre * np.linspace(5, 15, 10)))
    if tubes is None:
        return
    gallbladder = np.maximum(tubes.solid + 0.8 * canvas.relief[tubes.region], trunk.abdomen[tubes.region] + 3)
    canvas.paint(tubes.region, gallbladder - 1.6, patient.hu["bowel_wall"])
    canvas.paint(tubes.region, gallbladder, patient.hu["gallbladder"])


def _underside(tip: float, rise: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Height of the visceral surface, which climbs from the right flank to the left dome."""
    forwards = 0.20 + 0.22 * np.clip((x + 50) / 60, 0, 1)
    return tip + rise * (x + 125) + forwards * y + 0.0016 * (x + 20) ** 2


def _draw_vessels(canvas: Canvas, patient: Patient, region: Region, solid: np.ndarray) -> None:
    rng = patient.stream("liver vessels")
    veins, portal = [], []
    for heading, length in (((-1, 0.35, -0.45), 46), ((-0.55, -0.8, -0.6), 42), ((0.9, -0.7, -0.2), 38)):
        veins += branches(rng, np.array([-26.0, -36.0, 122.0]), np.array(heading), length, 4.6, 5, 0.55)
    for heading, length in (((-1, 0.3, -0.3), 36), ((-0.8, -0.3, 0.7), 36), ((0.7, -0.6, 0.6), 38)):
        portal += branches(rng, np.array([-50.0, -20.0, 84.0]), np.array(heading), length, 4.8, 5, 0.65)
    for segments, hu in ((veins, patient.hu["liver_vessel"]), (portal, patient.hu["portal_vein"])):
        tree = tube_union(canvas, segments, margin_mm=5)
        if tree is None:
            continue
        inside = np.maximum(tree.solid, crop(solid, region, tree.region) + 2.5)
        canvas.paint(tree.region, inside, hu, LABELS["liver"], 0.85 * tree.strength)


def _draw_lesions(canvas: Canvas, patient: Patient, region: Region, solid: np.ndarray) -> None:
    rng = patient.stream("liver lesions")
    # Drawn before any is tried, so that a rejected place does not move the lesions that follow.
    places = rng.uniform((-115, -85, 0), (50, 70, 140), (120, 3))
    radii = rng.uniform(7, 19, 120)
    taken: list[tuple[np.ndarray, float]] = []
    for place, radius in zip(places, radii, strict=True):
        if len(taken) == patient.liver_lesions:
            break
        if any(np.linalg.norm(place - other) < radius + size + 4 for other, size in taken):
            continue
        if _value_at(canvas, region, solid, place) > -0.55 * radius - 3:
            continue
        block = canvas.around(place, radius + 8)
        if block is None:
            continue
        taken.append((place, radius))
        x, y, z = canvas.coordinates(block)
        stretch = rng.uniform(0.85, 1.15, 3)
        lesion = ellipsoid((x, y, z), tuple(place), tuple(float(radius * s) for s in stretch))
        lesion += 0.12 * radius * canvas.relief[block]
        lesion = np.maximum(lesion, crop(solid, region, block) + 1.0)
        label = LABELS["liver_lesion"]
        texture = 5 * canvas.fine[block] + 5 * canvas.medium[block]
        canvas.paint(block, lesion, patient.hu["liver_lesion_rim"] + texture, label)
        core = patient.hu["liver_lesion"] - 14 * np.clip(-lesion / radius - 0.35, 0, 1)
        canvas.paint(block, lesion + 0.16 * radius + 0.8, core + texture, label)


def draw_spleen(canvas: Canvas, patient: Patient, trunk: Trunk) -> None:
    """Paint the spleen under the left dome, hollow towards stomach and kidney."""
    rng = patient.stream("spleen")
    region = canvas.region((25, -60, -20), (150, 120, 200))
    if region is None:
        return
    x, y, z = canvas.coordinates(region)
    relief = canvas.relief[region]
    centre = (100 + rng.uniform(-4, 4), 40 + rng.uniform(-6, 6), 80 + rng.uniform(-8, 6))
    size = rng.uniform(0.92, 1.2)
    lean = 0.45
    v = (y - centre[1]) * np.cos(lean) + (z - centre[2]) * np.sin(lean)
    w = -(y - centre[1]) * np.sin(lean) + (z - centre[2]) * np.cos(lean)
    solid = ellipsoid((x - centre[0], w, v), (0.0, 0.0, 0.0), (40 * size, 43 * size, 63 * size))
    hollow = ellipsoid((x, y, z), (50.0, 6 + rng.uniform(-6, 6), 74.0), (32.0, 42.0, 66.0))
    solid = smooth_max(solid + 1.6 * relief, -hollow + 1.5 * relief, 9)
    solid = smooth_max(solid, 2 - kidney_bed(canvas, patient, region), 6)
    solid = smooth_max(solid, trunk.abdomen[region] + 2.2, 5)
    hu = patient.hu["spleen"] + 4 * canvas.fine[region]
    if patient.phase == "arterial":
        # Early on the red pulp fills in bands.
        hu = hu + 16 * np.sin(canvas.medium[region] * 1.5 + x / 6)
    canvas.paint(region, solid - 1.2, patient.hu["fat"])
    canvas.paint(region, solid, hu, LABELS["spleen"])


def _value_at(canvas: Canvas, region: Region, solid: np.ndarray, place: np.ndarray) -> float:
    index = []
    for axis, block, coordinate in zip(canvas.axes, region, place[::-1], strict=True):
        nearest = int(np.argmin(np.abs(axis - coordinate))) - block.start
        if not 0 <= nearest < block.stop - block.start:
            return np.inf
        index.append(nearest)
    return float(solid[tuple(index)])
