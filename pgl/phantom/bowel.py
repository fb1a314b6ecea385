"""Hollow organs of the belly: wall, content, and gas that rises to the front. Small bowel and colon."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .canvas import Canvas
from .kidneys import kidney_bed
from .levelsets import Field, smooth_max
from .noise import smooth_curve
from .patient import Patient
from .trunk import Trunk
from .tubes import Tubes, branches, curve_through, path, tube_union

GAS_HU = -960.0

# Path of the colon (x, y, z in mm), caecum to sigmoid; the transverse part sags by an amount of its own.
_ASCENDING = ((-84, 4, -110), (-98, 6, -70), (-104, 12, -30), (-98, 4, 5), (-78, -40, 14))
_TRANSVERSE = ((-50, -72, 6), (0, -80, -4), (50, -76, 10))
_SAG = (0.6, 1.0, 0.6)
_DESCENDING = ((88, -44, 42), (104, -2, 62), (108, 18, 36), (106, 26, 0), (104, 26, -40))
_SIGMOID = ((98, 12, -76), (92, -8, -112), (66, -22, -140))

# Where the loops of the small bowel are centred: opposite corners in mm.
_LOOPS_LOW, _LOOPS_HIGH = np.array([-88.0, -86.0, -135.0]), np.array([100.0, 14.0, 26.0])
# Steps of an additive recurrence: it fills a box evenly for any number of points, without a lattice.
_RECURRENCE = (0.8191725, 0.6710436, 0.5497005)


@dataclass(frozen=True)
class Hollow:
    """A hollow organ along a path."""

    points: np.ndarray
    """Path [n, 3], x, y, z in mm."""
    radii: np.ndarray
    """Outer radius [n] in mm."""
    wall_mm: float
    fill: np.ndarray | float = -1.0
    """Gas reaches this many radii behind the middle of the tube: -1 none, 1 all."""
    level_mm: float | None = None
    """Instead of `fill`, one level (y) of the fluid for the whole organ."""

    def tubes(self, canvas: Canvas) -> Tubes | None:
        """The organ on the grid, or None where it lies outside."""
        return tube_union(canvas, path(self.points, self.radii))


def draw_hollow(
    canvas: Canvas,
    patient: Patient,
    trunk: Trunk,
    organ: Hollow,
    tubes: Tubes | None,
    content_hu: Field | float,
) -> None:
    """Paint a hollow organ: fat around it, wall, content, and gas in front of a level surface.

    Args:
        canvas, patient, trunk: what is painted, who, and the room there is.
        organ, tubes: the organ, and the same on the grid; nothing is painted where `tubes` is None.
        content_hu: Hounsfield units of the content, a number or one per voxel of the block of `tubes`.
    """
    if tubes is None:
        return
    region = tubes.region
    solid = tubes.solid + 1.1 * canvas.relief[region]
    solid = np.maximum(solid, trunk.abdomen[region] + 1.5)
    solid = smooth_max(solid, 3 - kidney_bed(canvas, patient, region), 6)
    gap = 0.8 + 2.5 * patient.visceral_fat
    around = np.maximum(solid - gap, trunk.abdomen[region])
    canvas.paint(region, around, patient.hu["fat"] + 5 * canvas.fine[region])
    canvas.paint(region, solid, patient.hu["bowel_wall"] + 5 * canvas.fine[region])
    lumen = solid + organ.wall_mm * (1 + 0.45 * np.abs(canvas.medium[region]))
    canvas.paint(region, lumen, content_hu)
    level: Field | float
    if organ.level_mm is None:
        level = tubes.attribute(organ.points[:, 1] + organ.fill * organ.radii)
    else:
        level = organ.level_mm
    # Fluid is level in the room, not in the warped body. The level jumps where the nearest part of the path
    # changes, so it limits the gas as a share and not as a surface.
    y = canvas.axes[1][region[1]][None, :, None]
    gas = np.clip(0.5 - (y - level) / canvas.voxel[1], 0, 1)
    canvas.paint(region, lumen + 0.4, GAS_HU, strength=gas)


def draw_small_bowel(canvas: Canvas, patient: Patient, trunk: Trunk) -> None:
    """Paint loops in the middle and lower abdomen, and the vessels of their mesentery."""
    rng = patient.stream("small bowel")
    vessels = []
    for z in (30.0, 5.0, -20.0, -45.0, -70.0):
        root = np.array([rng.uniform(-20, 10), -38.0, z])
        for _ in range(2):
            heading = np.array([rng.uniform(-1, 1), rng.uniform(-1.0, -0.2), rng.uniform(-0.8, 0.3)])
            vessels += branches(rng, root, heading, rng.uniform(24, 34), rng.uniform(1.7, 2.6), 4)
    tree = tube_union(canvas, vessels, margin_mm=5)
    if tree is not None:
        inside = np.maximum(tree.solid, trunk.abdomen[tree.region] + 3)
        canvas.paint(tree.region, inside, patient.hu["portal_vein"], strength=tree.strength)

    oral_contrast = rng.uniform() < 0.25
    count = round(56 - 20 * patient.visceral_fat)
    places = (np.outer(np.arange(1, count + 1), _RECURRENCE) + rng.uniform(0, 1, 3)) % 1
    for centre in _LOOPS_LOW + places * (_LOOPS_HIGH - _LOOPS_LOW):
        centre[2] += 0.12 * centre[0]
        points = curve_through(centre + rng.standard_normal((6, 3)) * (19, 12, 15), 20)
        # Loops hang in front of spine, psoas and great vessels.
        _, spine_y = patient.spine(points[:, 2])
        rear = spine_y - 50 + 1.1 * np.maximum(np.abs(points[:, 0]) - 38, 0)
        points[:, 1] = np.minimum(points[:, 1], rear)
        radii = rng.uniform(8.5, 12.5) * (1 + 0.10 * smooth_curve(rng, np.arange(20), 1.5))
        has_contrast = oral_contrast and rng.uniform() < 0.5
        content = rng.uniform(90, 190) if has_contrast else rng.uniform(8, 38)
        loop = Hollow(points, radii, 2.4, rng.uniform(-1.5, 0.2))
        draw_hollow(canvas, patient, trunk, loop, loop.tubes(canvas), content)


def draw_colon(canvas: Canvas, patient: Patient, trunk: Trunk) -> None:
    """Paint the frame of the colon with its haustra, stool and gas."""
    rng = patient.stream("colon")
    transverse = np.array(_TRANSVERSE, dtype=np.float64)
    transverse[:, 2] += rng.uniform(-30, 30) * np.array(_SAG)
    knots = np.concatenate([_ASCENDING, transverse, _DESCENDING, _SIGMOID])
    knots += rng.standard_normal(knots.shape) * (4, 4, 6)
    count = 130
    points = curve_through(knots, count)
    points += 3 * np.stack([smooth_curve(rng, np.arange(count), 5.0) for _ in range(3)], axis=1)
    place = np.linspace(0, 1, count)
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    calibre = np.interp(place, (0, 0.1, 0.3, 0.6, 0.75, 1), (27, 25, 21, 19, 14, 12)) * rng.uniform(0.85, 1.1)
    haustra = 0.11 * np.sin(2 * np.pi * length / 27) + 0.12 * smooth_curve(rng, length, 30.0)
    fill = np.interp(place, (0, 0.25, 0.5, 0.75, 1), (-0.9, -0.5, 0.2, -0.6, -0.9))
    fill = fill + 0.8 * smooth_curve(rng, length, 40.0)
    colon = Hollow(points, calibre * (1 + haustra), 2.2, fill)
    tubes = colon.tubes(canvas)
    if tubes is None:
        return
    fine, medium = canvas.fine[tubes.region], canvas.medium[tubes.region]
    bubbles = np.clip(1.3 * fine + 0.5 * medium - 1.1, 0, 1)
    draw_hollow(canvas, patient, trunk, colon, tubes, 28 + 20 * medium + 15 * fine - 560 * bubbles)
