"""Intensity: HU to network input, then random noise, blur, brightness and gamma for the whole batch at once.

What happens to a view is a function of (seed, sample index, view) alone: the few random numbers of a view are
drawn with the sample on the CPU, the arithmetic runs on the batch's device.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from pgl.config import AugmentSettings, IntensitySettings

# A Gaussian is cut where it has fallen to 1 % of its peak.
_SIGMAS_TO_EDGE = 3


@dataclass
class Augmentation:
    """What is done to each of N views; a neutral value (noise 0, blur 0, factor 1, exponent 1) does nothing.

    Args:
        noise_std: Tensor[N], standard deviation of the noise.
        noise_seed: int64 Tensor[N], seed of each view's noise field.
        blur_sigma: Tensor[N], in voxels.
        brightness: Tensor[N], factor.
        gamma: Tensor[N], exponent.
    """

    noise_std: Tensor
    noise_seed: Tensor
    blur_sigma: Tensor
    brightness: Tensor
    gamma: Tensor

    def __len__(self) -> int:
        return len(self.gamma)

    def to(self, device: torch.device | str) -> Augmentation:
        """The same on another device; the seeds stay on the CPU, where they are read."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "noise_seed"}
        return Augmentation(noise_seed=self.noise_seed, **moved)


def sample_augmentation(rng: np.random.Generator, count: int, settings: AugmentSettings) -> Augmentation:
    """Draw what is done to ``count`` views; the result is a function of the generator's state."""

    def draw(name: str, probability: float, neutral: float) -> Tensor:
        low, high = getattr(settings, name)
        value = rng.uniform(low, high, count)
        return torch.from_numpy(np.where(rng.random(count) < probability, value, neutral)).float()

    return Augmentation(
        noise_std=draw("noise_variance", settings.noise_probability, 0.0).sqrt(),
        noise_seed=torch.from_numpy(rng.integers(0, 2**62, count)),
        blur_sigma=draw("blur_sigma", settings.blur_probability, 0.0),
        brightness=draw("brightness_factor", settings.brightness_probability, 1.0),
        gamma=draw("gamma_exponent", settings.gamma_probability, 1.0),
    )


def normalise(views_hu: Tensor, settings: IntensitySettings) -> Tensor:
    """HU to network input: ``(clip(x) − mean) / std``, float32."""
    low, high = settings.clip_hu
    return (views_hu.float().clamp(low, high) - settings.mean_hu) / settings.std_hu


def augment(views: Tensor, augmentation: Augmentation) -> Tensor:
    """Apply each view's own augmentation: noise, blur, brightness, gamma, in this order.

    Args:
        views: float32 Tensor[N, C, D, H, W], normalised.
        augmentation: for the same N views, on the same device.

    Returns:
        A new tensor of the same shape.
    """
    views = add_noise(views, augmentation.noise_std, augmentation.noise_seed)
    views = blur(views, augmentation.blur_sigma)
    views = views * _per_view(augmentation.brightness)
    return apply_gamma(views, augmentation.gamma)


def add_noise(views: Tensor, std: Tensor, seed: Tensor) -> Tensor:
    """Add Gaussian noise of each view's deviation (Tensor[N]), its field fixed by its seed (CPU int64[N])."""
    noise = torch.zeros_like(views)
    generator = torch.Generator(views.device)
    for row, (deviation, number) in enumerate(zip(std.tolist(), seed.tolist(), strict=True)):
        if deviation > 0:
            generator.manual_seed(number)
            noise[row].normal_(generator=generator).mul_(deviation)
    return views + noise


def blur(views: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with each view's own σ (Tensor[N], voxels; 0 for none); edges are repeated outwards."""
    chosen = (sigma > 0).nonzero().squeeze(1)
    if len(chosen) == 0:
        return views
    blurred, sigma = views[chosen], sigma[chosen]
    reach = (_SIGMAS_TO_EDGE * sigma).ceil()
    radius = int(reach.max())
    offsets = torch.arange(-radius, radius + 1, device=views.device, dtype=views.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    # A view's kernel must not depend on who else is in the batch.
    kernel = torch.where(offsets.abs() <= reach[:, None], kernel, 0.0)
    kernel = kernel / kernel.sum(1, keepdim=True)  # [n, 2 * radius + 1]
    for axis in (2, 3, 4):
        size = blurred.shape[axis]
        around = torch.arange(-radius, size + radius, device=views.device).clamp(0, size - 1)
        padded = blurred.index_select(axis, around)
        blurred = sum(
            padded.narrow(axis, tap, size) * _per_view(kernel[:, tap]) for tap in range(kernel.shape[1])
        )  # type: ignore[assignment]
    return views.index_copy(0, chosen, blurred)


def apply_gamma(views: Tensor, gamma: Tensor) -> Tensor:
    """x ← min + range·((x − min) / range)^γ with each view's own minimum, range and γ (Tensor[N])."""
    low, high = views.amin((1, 2, 3, 4), keepdim=True), views.amax((1, 2, 3, 4), keepdim=True)
    span = (high - low).clamp(min=torch.finfo(views.dtype).tiny)
    curved = low + (high - low) * ((views - low) / span).clamp(0, 1) ** _per_view(gamma)
    return torch.where(_per_view(gamma) == 1, views, curved)


def _per_view(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1, 1)
