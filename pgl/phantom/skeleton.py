"""Ribs and the upper pelvis."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .canvas import Canvas
from .levelsets import Field, smooth_max
from .patient import VERTEBRAE, Patient
from .trunk import Trunk

# Vertebra of the rib; how far round the chest (0 spine, 1 breastbone) its bone and its cartilage end.
_RIBS = (
    ("T12", 0.24, 0.25),
    ("T11", 0.42, 0.44),
    ("T10", 0.60, 0.72),
    ("T9", 0.66, 0.80),
    ("T8", 0.72, 0.90),
    ("T7", 0.78, 0.97),
)
_RIB_FALL_MM = 178.0  # how much lower a rib would be in front than at the spine
_CARTILAGE_RISE_MM = 190.0
_HALF_ROUND_MM = 340.0  # along the chest wall from the spine to the breastbone
_RIB_DEPTH_MM = 6.5  # of its middle in the wall
_RIB_HALF_HEIGHT_MM = 6.6

_WING = ((46.0, 76.0), (66.0, 62.0), (90.0, 36.0), (108.0, 6.0), (112.0, -28.0))


def draw_ribs(canvas: Canvas, patient: Patient, trunk: Trunk) -> None:
    """Paint ribs 7 to 12 in the wall of the chest, and the cartilage of the costal arch.

    A rib runs within the wall, so it is described there: how far round the wall, how high, and how deep.
    """
    rng = patient.stream("ribs")
    shell = (trunk.cavity > -3) & (trunk.cavity < 16) & (canvas.z > 5)
    x, y, z = (coordinate[shell] for coordinate in canvas.coordinates())
    spine_x, _ = (v.astype(np.float32) for v in patient.spine(z))
    around = np.arctan2((x - spine_x * np.clip(y / 60, 0, 1)) / 125, (y + 8) / 92)
    around = np.abs(around) / np.float32(np.pi)
    bone, marrow, cartilage = (np.full(z.shape, 9.0, np.float32) for _ in range(3))
    for vertebra, bone_end, cartilage_end in _RIBS:
        head = VERTEBRAE[vertebra][0] + 7 + np.where(x > 0, rng.uniform(-4, 4), rng.uniform(-4, 4))
        end = bone_end + rng.uniform(-0.03, 0.03)
        fall = _RIB_FALL_MM + rng.uniform(-10, 10)
        middle = head.astype(np.float32) - fall * np.minimum(around, end) ** 1.08
        # Beyond its bone the rib climbs towards the breastbone.
        middle += _CARTILAGE_RISE_MM * np.clip(around - end, 0, None)
        slope = np.where(around < end, fall, _CARTILAGE_RISE_MM) / _HALF_ROUND_MM
        thick = 3.4 + 0.5 * np.sin(9 * around)
        wall = _InWall(z - middle, trunk.cavity[shell] - _RIB_DEPTH_MM, slope, canvas.voxel)
        for solid, shrink, last in ((bone, 0.0, end), (marrow, 1.3, end), (cartilage, -1.0, cartilage_end)):
            rib = wall.ellipse(_RIB_HALF_HEIGHT_MM - shrink, thick - shrink)
            rib = np.maximum(rib, (around - last) * _HALF_ROUND_MM / canvas.voxel[2])
            np.minimum(solid, rib, out=solid)
    hu = canvas.hu[shell]
    texture = 40 * canvas.fine[shell]
    cartilage = np.maximum(cartilage, -bone)
    for solid, value in (
        (cartilage, 95 + texture),
        (bone, 0.85 * patient.hu["cortical"]),
        (marrow, 115 + texture),
    ):
        share = np.clip(0.5 - solid, 0, 1)
        hu += share * (value - hu)
    canvas.hu[shell] = hu


@dataclass(frozen=True)
class _InWall:
    """Voxels seen from a rib: mm above it, mm deeper in the wall, the rib's slope, and the voxel size."""

    above: Field
    deeper: Field
    slope: Field
    voxel: tuple[float, ...]

    def ellipse(self, half_height: float, half_thickness: Field) -> Field:
        """Level set of the rib's cross-section in voxels, for voxels without neighbours in an array."""
        upright = np.sqrt(1 + self.slope * self.slope)
        high, deep = self.above / upright / half_height, self.deeper / half_thickness
        k = np.sqrt(high * high + deep * deep) + 1e-3
        high, deep = np.abs(high / half_height), np.abs(deep / half_thickness)
        hz, hy, hx = self.voxel
        in_plane = 0.5 * (hx + hy)
        across_voxel = high * (hz + self.slope * in_plane) / upright + deep * in_plane
        return k * (k - 1) / np.maximum(across_voxel, 1e-4)


def draw_pelvis(canvas: Canvas, patient: Patient) -> None:
    """Paint the iliac wings, which rise beside the sacrum at the lower end of the scan, and their muscles."""
    rng = patient.stream("pelvis")
    crest = -47 + rng.uniform(-10, 8)
    for side in (-1, 1):
        region = canvas.region(
            (min(side * 30, side * 150), -70, -150), (max(side * 30, side * 150), 115, crest + 25)
        )
        if region is None:
            continue
        x, y, z = canvas.coordinates(region)
        # Seen from above the wing is a shallow S from the sacrum to its front spine; it flares upwards.
        flare = (z - crest) * 0.22
        wing, along = np.full(x.shape, np.inf, np.float32), np.zeros(x.shape, np.float32)
        for i, ((x0, y0), (x1, y1)) in enumerate(pairwise(_WING)):
            dx, dy = x1 - x0, y1 - y0
            px, py = side * x - flare - x0, y - y0
            t = np.clip((px * dx + py * dy) / (dx * dx + dy * dy), 0, 1)
            distance = np.hypot(px - t * dx, py - t * dy)
            along = np.where(distance < wing, (i + t) / (len(_WING) - 1), along)
            wing = np.minimum(wing, distance)
        half = 4.2 + 3.5 * (2 * along - 1) ** 2 + 2.5 * np.clip(1 + (z - crest) / 18, 0, 1)
        top = crest - 75 * np.abs(along - 0.5) ** 1.7
        solid = smooth_max(wing - half, z - top, 6)
        solid = solid + 0.4 * canvas.relief[region]
        gluteus = smooth_max(wing - half - 15, z - top + 14, 14)
        canvas.paint(region, gluteus, patient.hu["muscle"] + 5 * canvas.fine[region])
        canvas.paint(region, solid, 0.9 * patient.hu["cortical"])
        canvas.paint(region, solid + 2.0, 0.8 * patient.hu["cancellous"] + 40 * canvas.fine[region])
