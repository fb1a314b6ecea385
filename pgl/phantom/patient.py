"""Who is scanned: size and habitus, contrast phase, findings, and the Hounsfield units of the tissues."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np

LABELS = {
    "background": 0,
    "liver": 1,
    "liver_lesion": 2,
    "spleen": 3,
    "kidney_right": 4,
    "kidney_left": 5,
    "kidney_tumour": 6,
    "aorta": 7,
    "spine": 8,
}

PHASES = ("native", "arterial", "portal venous")
_PHASE_SHARES = (0.2, 0.25, 0.55)

# Typical attenuation at 120 kV in Hounsfield units: native, late arterial, portal venous phase.
_ENHANCEMENT = {
    "liver": (56, 74, 112),
    "liver_vessel": (42, 82, 168),
    "portal_vein": (42, 120, 172),
    "liver_lesion": (34, 48, 62),
    "liver_lesion_rim": (44, 108, 88),
    "spleen": (48, 118, 124),
    "kidney_cortex": (33, 178, 186),
    "kidney_medulla": (30, 88, 168),
    "kidney_pelvis": (8, 14, 60),
    "kidney_tumour": (36, 108, 84),
    "aorta": (42, 318, 158),
    "vena_cava": (40, 92, 138),
    "heart": (42, 190, 150),
    "myocardium": (45, 112, 115),
    "pancreas": (38, 106, 98),
    "bowel_wall": (38, 88, 96),
    "muscle": (54, 58, 64),
    "gallbladder": (10, 10, 11),
}

# Centres of the vertebral bodies: height, depth (z and y in mm), and half of the height of the bone.
VERTEBRAE = {
    "L5": (-68.0, 17.0, 13.0),
    "L4": (-35.0, 10.0, 13.5),
    "L3": (0.0, 10.0, 13.5),
    "L2": (34.0, 13.0, 13.0),
    "L1": (66.5, 19.0, 12.5),
    "T12": (97.0, 27.0, 12.0),
    "T11": (125.0, 35.0, 11.2),
    "T10": (151.0, 42.0, 10.5),
    "T9": (176.0, 47.0, 10.0),
    "T8": (200.0, 50.0, 9.6),
    "T7": (223.5, 51.0, 9.4),
}


@dataclass
class Patient:
    """One synthetic person in one scanner, drawn from (seed, case).

    Args:
        seed, case: name the patient.
        only_phase: one of ``PHASES``, for the same person in this contrast phase; None draws it.

    Every group of random numbers comes from a stream of its own (see `stream`), so that no decision about one
    organ, nor the sampling grid, moves another.
    """

    seed: int
    case: int
    only_phase: str | None = None
    scale: tuple[float, float, float] = field(init=False)
    """Size against the average person along x, y, z."""
    fat_mm: float = field(init=False)
    """Subcutaneous fat at the flank."""
    visceral_fat: float = field(init=False)
    """0 (bowel loops touch) to 1 (organs float in fat)."""
    muscle: float = field(init=False)
    """Bulk of the muscles against the average."""
    phase: str = field(init=False)
    hu: dict[str, float] = field(init=False)
    liver_lesions: int = field(init=False)
    kidney_tumour_side: int = field(init=False)
    """-1 right, +1 left, 0 none."""
    age: float = field(init=False)
    """0 young (dense bone) to 1 old (calcified vessels, fatty muscle)."""
    noise_hu: float = field(init=False)

    def __post_init__(self) -> None:
        rng = self.stream("patient")
        overall = rng.uniform(0.93, 1.07)
        width = overall * rng.uniform(0.96, 1.06)
        self.scale = (width, width * rng.uniform(0.95, 1.05), overall * rng.uniform(0.96, 1.04))
        build = rng.uniform()
        self.fat_mm = 7 + 26 * build**1.4
        self.visceral_fat = float(np.clip(0.75 * build + rng.uniform(-0.05, 0.35), 0, 1))
        self.muscle = rng.uniform(0.85, 1.15)
        self.age = rng.uniform()
        number = int(rng.choice(3, p=_PHASE_SHARES))
        if self.only_phase is not None:
            number = PHASES.index(self.only_phase)
        self.phase = PHASES[number]
        self.hu = {name: values[number] * rng.uniform(0.93, 1.07) for name, values in _ENHANCEMENT.items()}
        # Fatty livers are common and darker than their own vessels.
        fatty = rng.uniform() < 0.2
        self.hu["liver"] -= rng.uniform(8, 22) if fatty else 0.0
        # A finding that cannot be seen is of no use to anyone.
        self.hu["liver_lesion"] = min(self.hu["liver_lesion"], self.hu["liver"] - 16)
        self.hu["fat"] = rng.uniform(-112, -98)
        self.hu["cancellous"] = 235 - 95 * self.age + rng.uniform(-15, 15)
        self.hu["cortical"] = 640 - 120 * self.age
        self.liver_lesions = int(rng.integers(1, 4)) if rng.uniform() < 0.5 else 0
        has_tumour = rng.uniform() < 0.45
        self.kidney_tumour_side = int(rng.choice([-1, 1])) if has_tumour else 0
        self.noise_hu = rng.uniform(8, 14) * (1 + 0.5 * build)
        curve = self.stream("spine curve")
        self._scoliosis = curve.uniform(-5, 5), curve.uniform(0, 2 * np.pi), curve.uniform(120, 190)
        self._lordosis = curve.uniform(-5, 5)

    def stream(self, name: str) -> np.random.Generator:
        """Random generator of this case that belongs to `name` alone."""
        return np.random.default_rng([self.seed, self.case, zlib.crc32(name.encode())])

    def spine(self, z):
        """Middle of the vertebral bodies at height z (mm): (x, y) in mm."""
        heights, depths, _ = np.asarray(sorted(VERTEBRAE.values())).T
        amplitude, phase, wavelength = self._scoliosis
        x = amplitude * np.sin(np.asarray(z) / wavelength * np.pi + phase)
        knots = np.concatenate([[-125.0, -97.0], heights])
        y = np.interp(z, knots, np.concatenate([[50.0, 30.0], depths]))
        return x, y + self._lordosis * np.sin((np.asarray(z) + 40) / 90)
