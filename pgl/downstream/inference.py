"""A whole volume through the network: windows that slide over it, weighted with a Gaussian (MONAI)."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from torch import Tensor

from pgl.augment import normalise
from pgl.config import IntensitySettings
from pgl.downstream.config import InferenceSettings

Triple = tuple[int, int, int]


@torch.no_grad()
def probabilities(
    network: Callable[[Tensor], Tensor],
    hu: np.ndarray,
    patch_size: Triple,
    intensity: IntensitySettings,
    settings: InferenceSettings,
    device: torch.device,
) -> np.ndarray:
    """Class probabilities of a volume.

    Args:
        network: from Tensor[N, 1, *patch] to logits Tensor[N, outputs, *patch]; in evaluation mode.
        hu: int16 [D, H, W] on the grid that the network was trained on. A volume smaller than a window is
            filled up with air.
        patch_size: the window.
        intensity: HU to network input.
        settings: overlap and the like.
        device: the network's.

    Returns:
        float32 [outputs, D, H, W], on the CPU, where a large volume fits.
    """
    inputs = normalise(torch.from_numpy(np.ascontiguousarray(hu))[None, None], intensity)
    air = float(normalise(torch.tensor(-1024.0), intensity))

    def window(batch: Tensor) -> Tensor:
        flips: list[tuple[int, ...]] = [()]
        if settings.mirror:
            flips = [axes for n in range(4) for axes in itertools.combinations((2, 3, 4), n)]
        total = sum(network(batch.flip(axes)).float().softmax(1).flip(axes) for axes in flips)
        return total / len(flips)  # type: ignore[operator, return-value]

    weighted = sliding_window_inference(
        inputs,
        patch_size,
        settings.batch_size,
        window,
        overlap=settings.overlap,
        mode="gaussian",
        cval=air,
        sw_device=device,
        device=torch.device("cpu"),
    )
    assert isinstance(weighted, Tensor)
    return weighted[0].numpy()
