"""Intensity: HU to network input, then random noise, blur, brightness and gamma for the whole batch at once.

What happens to a view is a function of (seed, sample index, view) alone: the few random numbers of a view are
drawn with the sample on the CPU and stay there, because what is to be done is decided there: looking at them
on the device would make the CPU wait for it in every step. The arithmetic runs on the views' device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pgl.config import AugmentSettings, IntensitySettings

# A Gaussian is cut where it has fallen to 1 % of its peak.
_SIGMAS_TO_EDGE = 3


@dataclass
class Augmentation:
    """What is done to each of N views; a neutral value (noise 0, blur 0, factor 1, exponent 1) does nothing.
    All on the CPU.

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


def sample_augmentation(rng: np.random.Generator, count: int, settings: AugmentSettings) -> Augmentation:
    """Draw what is done to ``count`` views; the result is a function of the generator's state."""

    def draw(name: str, probability: float, neutral: float) -> Tensor:
        low, high = getattr(settings, name)
        value = rng.uniform(low, high, count)
        chosen = np.where(rng.random(count) < probability, value, neutral)
        return torch.from_numpy(chosen.astype(np.float32))

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
        augmentation: for the same N views.

    Returns:
        A new tensor of the same shape.
    """
    views = add_noise(views, augmentation.noise_std, augmentation.noise_seed)
    views = blur(views, augmentation.blur_sigma)
    views = views * _per_view(_sent(augmentation.brightness, views))
    return apply_gamma(views, augmentation.gamma)


def add_noise(views: Tensor, std: Tensor, seed: Tensor) -> Tensor:
    """Add Gaussian noise of each view's deviation (CPU Tensor[N]), its field fixed by its seed (CPU
    int64[N])."""
    chosen = (std > 0).nonzero().squeeze(1)
    if len(chosen) == 0:
        return views
    noise = torch.empty_like(views[: len(chosen)])
    generator = torch.Generator(views.device)
    for row, (deviation, number) in enumerate(zip(std[chosen].tolist(), seed[chosen].tolist(), strict=True)):
        generator.manual_seed(number)
        noise[row].normal_(generator=generator).mul_(deviation)
    return views.index_add(0, _sent(chosen, views), noise)


def blur(views: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with each view's own σ (CPU Tensor[N], voxels; 0 for none); edges are repeated
    outwards."""
    chosen = (sigma > 0).nonzero().squeeze(1)
    if len(chosen) == 0:
        return views
    sigma = sigma[chosen]
    reach = (_SIGMAS_TO_EDGE * sigma).ceil()
    radius = int(reach.max())
    offsets = torch.arange(-radius, radius + 1, dtype=views.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    # A view's kernel must not depend on who else is in the batch.
    kernel = torch.where(offsets.abs() <= reach[:, None], kernel, 0.0)
    kernel = _sent(kernel / kernel.sum(1, keepdim=True), views)  # [n, 2 * radius + 1]
    chosen = _sent(chosen, views)
    blurred = views.index_select(0, chosen)
    for axis in (2, 3, 4):
        size = blurred.shape[axis]
        around = torch.arange(-radius, size + radius, device=views.device).clamp(0, size - 1)
        taps = blurred.index_select(axis, around).unfold(axis, kernel.shape[1], 1)
        blurred = (taps * kernel[:, None, None, None, None]).sum(-1)
    return views.index_copy(0, chosen, blurred)


def apply_gamma(views: Tensor, gamma: Tensor) -> Tensor:
    """x ← min + range·((x − min) / range)^γ with each view's own minimum, range and γ (CPU Tensor[N])."""
    chosen = (gamma != 1).nonzero().squeeze(1)
    if len(chosen) == 0:
        return views
    gamma, chosen = _sent(gamma[chosen], views), _sent(chosen, views)
    straight = views.index_select(0, chosen)
    low, high = straight.amin((1, 2, 3, 4), keepdim=True), straight.amax((1, 2, 3, 4), keepdim=True)
    span = (high - low).clamp(min=torch.finfo(views.dtype).tiny)
    curved = low + (high - low) * ((straight - low) / span).clamp(0, 1) ** _per_view(gamma)
    return views.index_copy(0, chosen, curved)


def _per_view(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1, 1)


def _sent(values: Tensor, views: Tensor) -> Tensor:
    """A few numbers on the views' device, without waiting for it."""
    return values.to(views.device, non_blocking=True)
