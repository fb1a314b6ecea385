"""The scanner: couch, noise, streaks and quantisation."""

from __future__ import annotations

import numpy as np

from .canvas import AIR_HU, Canvas, coverage
from .patient import Patient

LOWEST_HU = -1024
HIGHEST_HU = 3071  # 12 bits
SHELL_MM = 3.2


def draw_couch(canvas: Canvas, patient: Patient, back_y: float) -> None:
    """Paint the couch under a back that reaches `back_y` mm: a hollowed carbon shell around foam."""
    rng = patient.stream("couch")
    curve = rng.uniform(0.0005, 0.0013)
    top = back_y + rng.uniform(3, 9)
    y, x = np.meshgrid(canvas.axes[1], canvas.axes[2], indexing="ij")
    width = 240 + rng.uniform(-15, 15)
    surface = top - curve * x * x - y
    floor = y - (top + 42 - 0.00035 * x * x)
    solid = np.maximum(np.maximum(surface, floor), np.abs(x) - width).astype(np.float32)
    shell = coverage(solid) - coverage(solid + SHELL_MM)
    foam = coverage(solid + SHELL_MM)
    couch = AIR_HU + foam * 45 + shell * rng.uniform(1550, 1950)
    np.maximum(canvas.hu, couch.astype(np.float32), out=canvas.hu)


def blur(canvas: Canvas, spacing_mm: tuple[float, ...]) -> None:
    """Apply the point spread of scanner and reconstruction in the slice: Gaussian, 0.6 mm and 0.5 voxels."""
    for axis in (1, 2):
        variance = (0.6 / spacing_mm[axis]) ** 2 + 0.25
        # A kernel (w, 1 - 2w, w) has variance 2w, and stays close to a Gaussian up to w = 1/4.
        passes = max(1, int(np.ceil(variance / 0.5)))
        weight = np.float32(variance / passes / 2)
        for _ in range(passes):
            values = np.moveaxis(canvas.hu, axis, 0)
            step = np.diff(values, axis=0) * weight
            values[:-1] += step
            values[1:] -= step


def add_noise(canvas: Canvas, patient: Patient, spacing_mm: tuple[float, ...]) -> None:
    """Add noise with the spectrum of filtered back-projection, strongest where rays are weakest.

    In the slice the power rises with the frequency and then falls off with the kernel, so the noise looks
    grainy and not like snow. Across slices it is nearly independent. Behind bones and in wide bodies more of
    it runs from side to side, along the rays that lose most.
    """
    rng = patient.stream("noise")
    _, height, width = canvas.shape
    white = rng.standard_normal(canvas.shape, dtype=np.float32)
    fy = np.fft.fftfreq(height, spacing_mm[1])[:, None]
    fx = np.fft.rfftfreq(width, spacing_mm[2])[None, :]
    radial = np.hypot(fy, fx)
    cutoff = 0.42  # cycles/mm of a body kernel
    kernel = np.sqrt(radial + 0.012) * np.exp(-((radial / cutoff) ** 2))
    streak = kernel * np.exp(-((fx / 0.035) ** 2))
    spectrum = np.fft.rfft2(white)
    grain = np.fft.irfft2(spectrum * kernel, (height, width)).astype(np.float32)
    lines = np.fft.irfft2(spectrum * streak, (height, width)).astype(np.float32)
    grain /= grain.std()
    lines /= lines.std()

    # Attenuation along x and y stands for the rays' loss; smooth, because every ray sees the whole body.
    water = np.clip(canvas.hu / 1000 + 1, 0, 2.2)
    along_x = water.sum(axis=2) * spacing_mm[2] / 300
    along_y = water.sum(axis=1) * spacing_mm[1] / 220
    loss_x = _smooth(along_x, 6)[:, :, None]
    loss_y = _smooth(along_y, 6)[:, None, :]
    level = 0.25 + 0.75 * np.sqrt(np.clip(loss_x * loss_y, 0, 3))
    lean = np.clip(loss_x - 0.9, 0, 1.2) * 0.45
    # Larger voxels and thicker slices average more of the same dose.
    volume = (spacing_mm[0] / 4) * (spacing_mm[1] * spacing_mm[2]) / 1.8**2
    sigma = patient.noise_hu * np.clip(volume**-0.35, 0.5, 2.0)
    canvas.hu += sigma * level * (grain + lean * lines)


def _smooth(values: np.ndarray, radius: int) -> np.ndarray:
    padded = np.pad(values, [(0, 0), (radius, radius)], mode="edge")
    windows = [padded[:, i : i + values.shape[1]] for i in range(2 * radius + 1)]
    return np.mean(windows, axis=0)


def quantise(hu: np.ndarray) -> np.ndarray:
    """Round to the whole Hounsfield units of a 12-bit scanner, int16."""
    return np.clip(np.rint(hu), LOWEST_HU, HIGHEST_HU).astype(np.int16)
