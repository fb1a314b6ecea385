"""``pgl export``: the pretrained encoder as one file of plain tensors and plain data, and the way back.

Keys of an exported file::

    format               "pgl-encoder"
    format_version       1
    network_weights      the online encoder's state dict; its names are those of nnU-Net's ``encoder.*``
    network
        class            dotted name of the network's class
        arguments        what to construct it with, classes as dotted names
        input_channels   channels of an image
        feature_strides  [[D, H, W], ...] input voxels a feature voxel, for the feature map of each stage
        feature_level    the stage whose features were trained, from 0; later ones hold initial weights
        patch_size       [D, H, W] voxels of the views it was trained on
        spacing_mm       [D, H, W] spacing of the volumes it was trained on
        intensity        {"clip_hu": [low, high], "mean_hu", "std_hu"}: input = (clip(HU) − mean) / std
        pgl_ops_version  version that wrote the file
        format_version   as above
        trained_steps    optimiser steps behind these weights

It is written with ``torch.save`` and loads with ``torch.load(FILE, weights_only=True)``.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pgl
from pgl.atomic import atomic_path
from pgl.checkpoint import checkpoint_path, load_checkpoint
from pgl.networks import ENCODER_CLASS, build_encoder
from pgl.safe_load import check_header, safe_load

FORMAT = "pgl-encoder"
FORMAT_VERSION = 1
CHECKPOINTS = ("last", "best", "initial")

_NETWORK_KEYS = {
    "class", "arguments", "input_channels", "feature_strides", "feature_level", "patch_size", "spacing_mm",
    "intensity", "pgl_ops_version", "format_version", "trained_steps",
}  # fmt: skip
# The construction arguments that a file may set. Everything else of the class stays at its default, so that a
# file cannot reach an argument which calls what it is given.
_ARGUMENTS = {
    "input_channels", "n_stages", "features_per_stage", "conv_op", "kernel_sizes", "strides", "norm_op",
    "n_blocks_per_stage", "conv_bias", "norm_op_kwargs", "nonlin", "nonlin_kwargs", "return_skips",
}  # fmt: skip


def export_encoder(
    run: str | os.PathLike[str], output: str | os.PathLike[str], checkpoint: str = "last"
) -> dict[str, Any]:
    """Write the online encoder of a run to ``output``; an older file there is replaced in one step.

    Args:
        run: the folder of ``pgl pretrain``.
        output: the file to write, usually ``*.pt``.
        checkpoint: ``last``, ``best`` (highest matching accuracy) or ``initial`` (untrained, for comparison).

    Returns:
        What was written under ``network``.

    Raises:
        FileNotFoundError: the run or its checkpoint does not exist.
        ValueError: ``checkpoint`` is unknown, ``output`` is a folder, or the checkpoint is damaged.
    """
    if checkpoint not in CHECKPOINTS:
        raise ValueError(f"checkpoint must be one of {', '.join(CHECKPOINTS)}, got {checkpoint!r}")
    if Path(output).is_dir():
        raise ValueError(
            f"output must be a file to write, got the folder {output}: add a name such as encoder.pt"
        )
    run = Path(run)
    if not run.is_dir():
        raise FileNotFoundError(f"no run at {run}: give the folder that `pgl pretrain --output` made")
    content = load_checkpoint(checkpoint_path(run, f"{checkpoint}.pt"))

    arguments = content["network"]["arguments"]
    config = content["config"]
    network = {
        **content["network"],
        "input_channels": arguments["input_channels"],
        "feature_strides": _feature_strides(arguments["strides"]),
        "feature_level": content["feature_level"],
        "patch_size": list(config["views"]["patch_size"]),
        "spacing_mm": [float(s) for s in content["spacing_mm"]],
        "intensity": dict(config["intensity"]),
        "pgl_ops_version": pgl.__version__,
        "format_version": FORMAT_VERSION,
        "trained_steps": content["step"],
    }
    # A clone per tensor: one that shares a larger storage would drag all of it into the file.
    weights = {name: tensor.detach().cpu().clone() for name, tensor in content["online"]["encoder"].items()}
    _restore(network, weights, "the checkpoint")
    file = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "network_weights": weights,
        "network": network,
    }
    # Opened here, because torch turns a folder that may not be written into an error of its own.
    with atomic_path(output) as temporary, temporary.open("wb") as stream:
        torch.save(file, stream)
    return network


def load_encoder(path: str | os.PathLike[str], map_location: str | torch.device = "cpu") -> nn.Module:
    """The pretrained encoder of a file that ``pgl export --format encoder`` wrote.

    Its input is a float Tensor[N, input_channels, D, H, W] at the file's ``spacing_mm``, normalised as the
    file's ``intensity`` says (:func:`read_export` gives both). Its output is the list of all stages' feature
    maps, finest first.

    Args:
        path: the file.
        map_location: the device to put it on.

    Returns:
        The network in evaluation mode; call ``.train()`` before fine-tuning.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another kind or of a later format, names a network that is not on
            the list of those allowed, or its weights do not fit that network. Nothing in a file is executed.
    """
    content = read_export(path)
    encoder = _restore(content["network"], content["network_weights"], str(path))
    return encoder.to(map_location).eval()


def read_export(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of an exported file, on the CPU and checked, without building the network; raises like
    :func:`load_encoder`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}: expected one that `pgl export --format encoder` wrote")
    content = safe_load(path, "an exported encoder", "export it anew with `pgl export --format encoder`")
    check_header(path, content, FORMAT, FORMAT_VERSION, "exported encoder", "pgl export --format encoder")
    _check_content(path, content)
    return content


def _check_content(path: Path, content: dict[str, Any]) -> None:
    network, weights = content.get("network"), content.get("network_weights")
    if not isinstance(network, dict) or not isinstance(network.get("arguments"), dict):
        raise ValueError(
            f"{path}: 'network' must be a dict with the network's class and arguments, got {network!r}"
        )
    missing = sorted(_NETWORK_KEYS - set(network))
    if missing:
        raise ValueError(f"{path}: 'network' lacks {', '.join(missing)}")
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise ValueError(f"{path}: 'network_weights' must be a dict of tensors")


def _restore(network: dict[str, Any], weights: dict[str, Tensor], source: str) -> nn.Module:
    if network["class"] != ENCODER_CLASS:
        raise ValueError(
            f"{source}: network class {network['class']!r} is not allowed, expected {ENCODER_CLASS!r}"
        )
    unknown = sorted(set(network["arguments"]) ^ _ARGUMENTS)
    if unknown:
        raise ValueError(
            f"{source}: network arguments missing or not allowed: {', '.join(map(str, unknown))}"
        )
    try:
        # The initial weights are overwritten: draw them without touching the caller's random numbers.
        with torch.random.fork_rng(devices=[]):
            encoder = build_encoder(network)
    except (ValueError, TypeError, AssertionError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"{source}: the network cannot be built from its arguments: {_first_line(error)}"
        ) from error
    try:
        encoder.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"{source}: the weights do not fit the network that the file describes: {error}"
        ) from error
    return encoder


def _feature_strides(strides: list[list[int]]) -> list[list[int]]:
    return [[math.prod(axis) for axis in zip(*strides[: i + 1], strict=True)] for i in range(len(strides))]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()
