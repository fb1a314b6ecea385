"""The file of a fine-tuned network: plain tensors and plain data, loaded with ``weights_only=True``.

Keys::

    format           "pgl-segmenter"
    format_version   1
    network          the encoder's class and arguments, see pgl.networks.build_encoder
    decoder_convs    convolutions of each stage of the decoder
    classes          names of the classes 1, 2, …
    intensity        {"clip_hu": [low, high], "mean_hu", "std_hu"}
    spacing_mm       [D, H, W] of the volumes it was trained on
    patch_size       [D, H, W] of its patches
    precision        that it was trained and tested in, one of train.precision
    network_weights  state dict of ResidualEncoderUNet
    trained_steps    optimiser steps behind them
    pgl_ops_version  version that wrote it
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pgl
from pgl.config import IntensitySettings
from pgl.downstream.network import build_unet
from pgl.files.atomic import atomic_path
from pgl.files.safe_load import check_header, safe_load

FORMAT, FORMAT_VERSION = "pgl-segmenter", 1
NAME = "model.pt"
_KEYS = {
    "network", "decoder_convs", "classes", "intensity", "spacing_mm", "patch_size", "precision",
    "network_weights", "trained_steps", "pgl_ops_version",
}  # fmt: skip


@dataclass
class Segmenter:
    """A network and what it expects.

    Attributes:
        network: from normalised Tensor[N, 1, D, H, W] to logits.
        classes: names of the classes 1, 2, …
        intensity: HU to network input.
        spacing_mm: of its volumes (D, H, W).
        patch_size: window (D, H, W).
        precision: that it was trained and tested in.
    """

    network: nn.Module
    classes: list[str]
    intensity: IntensitySettings
    spacing_mm: tuple[float, float, float]
    patch_size: tuple[int, int, int]
    precision: str = "32-true"


def save_model(
    path: str | os.PathLike[str],
    segmenter: Segmenter,
    description: dict[str, Any],
    decoder_convs: int,
    steps: int,
) -> None:
    """Write the keys above, atomically."""
    weights = {name: tensor.detach().cpu() for name, tensor in segmenter.network.state_dict().items()}
    intensity = segmenter.intensity
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "network": description,
        "decoder_convs": decoder_convs,
        "classes": list(segmenter.classes),
        "intensity": {
            "clip_hu": [float(v) for v in intensity.clip_hu],
            "mean_hu": float(intensity.mean_hu),
            "std_hu": float(intensity.std_hu),
        },
        "spacing_mm": [float(s) for s in segmenter.spacing_mm],
        "patch_size": [int(n) for n in segmenter.patch_size],
        "precision": segmenter.precision,
        "network_weights": weights,
        "trained_steps": steps,
        "pgl_ops_version": pgl.__version__,
    }
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        torch.save(content, stream)


def load_model(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Segmenter:
    """Read a fine-tuned network; in evaluation mode.

    Args:
        path: a run's folder, or its model.pt.
        device: where to put it.

    Raises:
        FileNotFoundError: no such file, or the run has not finished.
        ValueError: damaged, or another kind of file.
    """
    path = Path(path)
    if path.is_dir():
        path = path / NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"no model at {path}: give the folder of a finished `pgl finetune` (--resume finishes one)"
        )
    advice = "restore it from a copy, or fine-tune anew"
    content = safe_load(path, "a fine-tuned network", advice)
    check_header(path, content, FORMAT, FORMAT_VERSION, "fine-tuned network", "pgl finetune")
    missing = sorted(_KEYS - set(content))
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it is damaged; {advice}")
    try:
        intensity = content["intensity"]
        network = build_unet(content["network"], len(content["classes"]) + 1, int(content["decoder_convs"]))
        network.load_state_dict(content["network_weights"], strict=True)
        return Segmenter(
            network.to(device).eval(),
            [str(name) for name in content["classes"]],
            IntensitySettings(tuple(intensity["clip_hu"]), intensity["mean_hu"], intensity["std_hu"]),
            tuple(content["spacing_mm"]),
            tuple(content["patch_size"]),
            str(content["precision"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} does not describe a network that can be built ({reason}); {advice}"
        ) from error
