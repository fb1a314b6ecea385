"""What is read from an exported file is checked here before it is used: it may come from anybody."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# What holds tensors; the first is always there.
WEIGHTS = ("network_weights", "decoder_weights")
_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64}
_NETWORK_KEYS = {
    "class", "arguments", "input_channels", "feature_strides", "feature_level", "patch_size", "spacing_mm",
    "intensity", "pgl_ops_version", "format_version", "trained_steps",
}  # fmt: skip


def check_content(path: Path, content: dict[str, Any]) -> None:
    """Check what a reader relies on, but for the network itself, which ``encoder.restore`` builds.

    Raises:
        ValueError: a key is missing or has a wrong type; it names ``path`` and the key.
    """
    network = content.get("network")
    if not isinstance(network, dict) or not isinstance(network.get("arguments"), dict):
        raise ValueError(
            f"{path}: 'network' must be a dict with the network's class and arguments, got {network!r}"
        )
    missing = sorted(_NETWORK_KEYS - set(network))
    if missing:
        raise ValueError(f"{path}: 'network' lacks {', '.join(missing)}")
    for key, (holds, expected) in _EXPECTED.items():
        if not holds(network[key]):
            raise ValueError(f"{path}: network.{key} must be {expected}, got {network[key]!r}")
    for key in WEIGHTS:
        if key in content or key == WEIGHTS[0]:
            _check_tensors(path, key, content.get(key))
    if "decoder_weights" in content:
        stages, level = network["arguments"].get("n_stages"), network.get("decoder_level")
        if not (_is_whole(stages) and _is_whole(level) and level < stages - 1):
            raise ValueError(
                f"{path}: network.decoder_level must be a stage of the decoder, got {level!r} with "
                f"{stages!r} stages of the encoder"
            )


def _check_tensors(path: Path, key: str, weights: Any) -> None:
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise ValueError(f"{path}: {key!r} must be a dict of tensors")
    for name, tensor in weights.items():
        if not isinstance(name, str):
            raise ValueError(f"{path}: a tensor of {key!r} must be named by text, got {name!r}")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in _DTYPES:
            kind = f"{tensor.dtype}, {tensor.layout} on {tensor.device}"
            raise ValueError(f"{path}: tensor {name!r} of {key!r} must be dense real numbers, got {kind}")
        # A tensor can claim any shape by strides of zero; memory is only taken for what the file holds.
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            shape = tuple(tensor.shape)
            raise ValueError(
                f"{path}: tensor {name!r} of {key!r} has shape {shape}, but the file does not hold its values"
            )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_triple(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(holds(v) and v > 0 for v in value)


def _is_intensity(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"clip_hu", "mean_hu", "std_hu"}
        and isinstance(value["clip_hu"], list | tuple)
        and len(value["clip_hu"]) == 2
        and all(map(_is_number, [*value["clip_hu"], value["mean_hu"], value["std_hu"]]))
        and value["std_hu"] > 0
    )


_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "feature_level": (_is_whole, "a stage's number"),
    "trained_steps": (_is_whole, "a number of steps"),
    "patch_size": (lambda v: _is_triple(v, _is_whole), "three whole numbers (D, H, W)"),
    "spacing_mm": (lambda v: _is_triple(v, _is_number), "three numbers of mm (D, H, W)"),
    "intensity": (_is_intensity, "a dict of clip_hu [low, high], mean_hu and std_hu above 0"),
}
