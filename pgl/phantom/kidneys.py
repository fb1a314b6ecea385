"""Kidneys with cortex, pyramids and sinus, adrenal glands, and a renal tumour where the patient has one."""

from __future__ import annotations

from typing import Any

import numpy as np

from .canvas import Canvas, Region
from .levelsets import ellipsoid, smooth_max
from .patient import LABELS, Patient
from .trunk import Trunk
from .tubes import Segment, tube_union

_SIDES = {"right": -1, "left": 1}
_CENTRES = {"right": (-68.0, 31.0, 28.0), "left": (70.0, 33.0, 40.0)}


class _Frame:
    """A kidney's own axes: along it, out of its gate, and across both."""

    def __init__(self, patient: Patient, side: str) -> None:
        rng = patient.stream(f"kidney {side}")
        self.sign = sign = _SIDES[side]
        self.centre = np.array(_CENTRES[side]) + rng.uniform(-1, 1, 3) * (4, 4, 8)
        self.size = rng.uniform(0.95, 1.12)
        # The upper pole leans towards the spine and to the back; the gate looks to the middle and forwards.
        long_axis = np.array([-0.24 * sign, 0.30, 0.92])
        long_axis /= np.linalg.norm(long_axis)
        gate_axis = np.array([-0.82 * sign, -0.57, 0.0])
        gate_axis -= long_axis * (gate_axis @ long_axis)
        gate_axis /= np.linalg.norm(gate_axis)
        self.axes = (long_axis, gate_axis, np.cross(long_axis, gate_axis))

    def coordinates(
        self, canvas: Canvas, region: Region, behind: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions in mm along the three axes; the second is bent so that both poles lean to the gate.

        Distances behind the long axis are multiplied by `behind`: below 1 the room reaches further back.
        """
        offsets: list[Any] = [
            c - np.float32(m) for c, m in zip(canvas.coordinates(region), self.centre, strict=True)
        ]
        if behind != 1.0:
            lean = np.float32(self.axes[0][1] / self.axes[0][2])
            offsets[1] = offsets[1] + (behind - 1) * np.maximum(offsets[1] - lean * offsets[2], 0)
        u, v, w = (self._along(axis, offsets) for axis in self.axes)
        return u, v - 0.0022 * u * u, w

    @staticmethod
    def _along(axis: np.ndarray, offsets: list[Any]) -> Any:
        return sum(offset * np.float32(part) for offset, part in zip(offsets, axis, strict=True))

    def outline(self, u: np.ndarray, v: np.ndarray, w: np.ndarray) -> np.ndarray:
        """The kidney without its gate, as a level set."""
        radii = tuple(radius * self.size for radius in (53.0, 28.0, 25.0))
        return ellipsoid((u, v, w), (0.0, 0.0, 0.0), radii)


def kidney_bed(canvas: Canvas, patient: Patient, region: Region, behind: float = 1.0) -> np.ndarray:
    """Level set of the room of both kidneys, which other organs keep out of; see `_Frame.coordinates`."""
    beds = []
    for side in _SIDES:
        frame = _Frame(patient, side)
        beds.append(frame.outline(*frame.coordinates(canvas, region, behind)))
    return np.minimum(beds[0], beds[1])


def draw_kidneys(canvas: Canvas, patient: Patient, trunk: Trunk) -> None:
    """Paint both kidneys in their fat, and the adrenal glands above them."""
    for side in _SIDES:
        _draw_kidney(canvas, patient, trunk, side)


def _draw_kidney(canvas: Canvas, patient: Patient, trunk: Trunk, side: str) -> None:
    rng = patient.stream(f"kidney {side} details")
    sign = _SIDES[side]
    frame = _Frame(patient, side)
    size = frame.size
    region = canvas.around(frame.centre, 85)
    if region is None:
        return
    relief, fine = canvas.relief[region], canvas.fine[region]
    u, v, w = frame.coordinates(canvas, region)

    outline = frame.outline(u, v, w) + 0.9 * relief
    notch = ellipsoid((u, v, w), (0.0, 31 * size, 0.0), (17.0, 17.0, 9.0))
    outline = smooth_max(outline, -notch, 8)
    outline = smooth_max(outline, trunk.abdomen[region] + 3, 4)
    angle = np.arctan2(w, v + 14)
    fingers = 3.0 * np.sin(u / 4.8 + 1.5 * np.sin(2 * angle))
    sinus = ellipsoid((u, v, w), (0.0, 12 * size, 0.0), (26.0 * size, 13.0 * size, 10.0)) + fingers

    label = LABELS[f"kidney_{side}"]
    gap = 1.2 + 3.0 * patient.visceral_fat
    canvas.paint(region, np.maximum(outline - gap, trunk.abdomen[region]), patient.hu["fat"] + 5 * fine)
    canvas.paint(region, outline, patient.hu["kidney_cortex"] + 4 * fine, label)
    pyramids = np.cos(u / 3.6 + rng.uniform(0, 6)) + np.cos(4.2 * angle) - 0.25
    medulla = smooth_max(smooth_max(outline + 6.5, 1.5 - sinus, 3), -2.6 * pyramids, 3)
    canvas.paint(region, medulla, patient.hu["kidney_medulla"] + 4 * fine, label)
    canvas.paint(region, sinus, patient.hu["fat"] + 30 + 14 * fine)
    pelvis = ellipsoid((u, v, w), (-3.0, 16 * size, 0.0), (11.0, 10.0, 4.0)) + 1.2 * relief
    canvas.paint(region, np.maximum(pelvis, sinus + 0.5), patient.hu["kidney_pelvis"] + 4 * fine)

    if patient.kidney_tumour_side == sign:
        _draw_tumour(canvas, patient, trunk, rng, frame)
    _draw_adrenal(canvas, patient, sign)


def _draw_tumour(
    canvas: Canvas, patient: Patient, trunk: Trunk, rng: np.random.Generator, frame: _Frame
) -> None:
    radius = rng.uniform(10, 22)
    turn = rng.uniform(0.3, 1.5)
    long_axis, gate_axis, third_axis = frame.axes
    # Sideways to forwards: behind the kidney there is no room.
    outwards = -gate_axis * np.cos(turn) + third_axis * np.sin(turn) * frame.sign
    middle = frame.centre + long_axis * rng.uniform(-30, 30) + outwards * 24 * frame.size
    region = canvas.around(middle, radius + 10)
    if region is None:
        return
    tumour = ellipsoid(canvas.coordinates(region), tuple(middle), (radius,) * 3)
    tumour = tumour + 0.10 * radius * canvas.relief[region]
    tumour = np.maximum(tumour, trunk.abdomen[region] + 1.5)
    texture = 9 * canvas.medium[region] + 5 * canvas.fine[region]
    label = LABELS["kidney_tumour"]
    canvas.paint(region, tumour, patient.hu["kidney_tumour"] + texture, label)
    necrosis = tumour + radius * (0.55 + 0.22 * canvas.medium[region])
    canvas.paint(region, necrosis, 0.45 * patient.hu["kidney_tumour"] + 10, label)


def _draw_adrenal(canvas: Canvas, patient: Patient, sign: int) -> None:
    """An inverted Y of thin limbs beside the crus."""
    x, y = patient.spine(84.0)
    crotch = np.array([float(x) + 33.0 * sign, float(y) - 12, 84.0])
    limbs = np.array([(3.0 * sign, -13, 3), (9.0 * sign, 9, -8), (-2.0 * sign, 11, -8)])
    tubes = tube_union(canvas, [Segment(crotch, tip, (2.8, 2.0)) for tip in crotch + limbs])
    if tubes is None:
        return
    canvas.paint(tubes.region, tubes.solid - 1.5, patient.hu["fat"])
    canvas.paint(tubes.region, tubes.solid, 0.85 * patient.hu["pancreas"], 0, tubes.strength)
