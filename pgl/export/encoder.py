"""``pgl export --format encoder``: the encoder as one file of plain tensors and plain data, and the way back.

Keys of an exported file::

    format               "pgl-encoder"
    format_version       1
    network_weights      the online encoder's state dict; its names are those of nnU-Net's ``encoder.*``
    decoder_weights      of a run with ``method.features decoder`` only: what it trained of the decoder, under
                         the names of nnU-Net's ``decoder.*``, see :mod:`pgl.export.decoder`
    network
        class            dotted name of the network's class
        arguments        what to construct it with, classes as dotted names
        input_channels   channels of an image
        feature_strides  [[D, H, W], ...] input voxels a feature voxel, for the feature map of each stage
        feature_level    the encoder's deepest stage that was trained, from 0; later ones hold initial weights
        patch_size       [D, H, W] voxels of the views it was trained on
        spacing_mm       [D, H, W] spacing of the volumes it was trained on
        intensity        {"clip_hu": [low, high], "mean_hu", "std_hu"}: input = (clip(HU) − mean) / std
        pgl_ops_version  version that wrote the file
        format_version   as above
        trained_steps    optimiser steps behind these weights
        decoder_level    with ``decoder_weights``: the finest stage of the decoder that was trained

It is written with ``torch.save`` and loads with ``torch.load(FILE, weights_only=True)``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pgl
from pgl.backbone import build_decoder
from pgl.export.checks import WEIGHTS, check_content
from pgl.export.decoder import decoder_level, trained_of_decoder
from pgl.files.atomic import atomic_path
from pgl.files.safe_load import check_header, safe_load
from pgl.networks import ENCODER_CLASS, build_encoder
from pgl.runs.folder import checkpoint_path
from pgl.training.checkpoint import load_checkpoint

FORMAT = "pgl-encoder"
FORMAT_VERSION = 1
CHECKPOINTS = ("last", "best", "initial")

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
    check_output(output, "encoder.pt", run)
    content = encoder_of_run(run, checkpoint)
    write_tensors(output, content)
    return content["network"]


def encoder_of(source: str | os.PathLike[str], checkpoint: str = "last") -> dict[str, Any]:
    """The content of an exported file, see above, from a run's folder or from such a file; its weights are
    known to fit its description.

    Raises:
        FileNotFoundError: there is neither a run nor a file.
        ValueError: like :func:`encoder_of_run` and :func:`load_encoder`.
    """
    if not Path(source).is_file():
        return encoder_of_run(source, checkpoint)
    content = read_export(source)
    check_networks(content, str(source))
    return content


def encoder_of_run(run: str | os.PathLike[str], checkpoint: str = "last") -> dict[str, Any]:
    """The content of an exported file, see above, from a run's checkpoint; raises like
    :func:`export_encoder`.
    """
    if checkpoint not in CHECKPOINTS:
        raise ValueError(f"checkpoint must be one of {', '.join(CHECKPOINTS)}, got {checkpoint!r}")
    run = Path(run)
    if not run.is_dir():
        raise FileNotFoundError(f"no run at {run}: give the folder that `pgl pretrain --output` made")
    path = checkpoint_path(run, f"{checkpoint}.pt")
    saved = load_checkpoint(path)
    try:
        content = _content(saved)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged: its settings are not those of a run ({type(error).__name__}: {error}); "
            "restore it from a copy, or take another checkpoint of the run"
        ) from error
    check_content(path, content)
    check_networks(content, str(path))
    for key in WEIGHTS:
        if key in content:
            # A clone per tensor: one that shares a larger storage would drag all of it into the file.
            content[key] = {name: tensor.detach().clone() for name, tensor in content[key].items()}
    return content


def _content(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The content of an exported file; its tensors are the checkpoint's own, not yet looked at."""
    arguments = checkpoint["network"]["arguments"]
    config = checkpoint["config"]
    content: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "network_weights": dict(checkpoint["online"]["encoder"]),
        "network": {
            **checkpoint["network"],
            "input_channels": arguments["input_channels"],
            "feature_strides": _feature_strides(arguments["strides"]),
            "feature_level": checkpoint["feature_level"],
            "patch_size": list(config["views"]["patch_size"]),
            "spacing_mm": [float(s) for s in checkpoint["spacing_mm"]],
            "intensity": dict(config["intensity"]),
            "pgl_ops_version": pgl.__version__,
            "format_version": FORMAT_VERSION,
            "trained_steps": checkpoint["step"],
        },
    }
    level = decoder_level(checkpoint)
    if level is not None:
        content["network"]["decoder_level"] = level
        content["decoder_weights"] = trained_of_decoder(
            checkpoint["online"]["decoder"], arguments["n_stages"], level
        )
    return content


def check_output(output: str | os.PathLike[str], example: str, source: str | os.PathLike[str]) -> None:
    """Raises ValueError if ``output`` is a folder, ``source`` itself, or among the checkpoints of a run."""
    if Path(output).is_dir():
        raise ValueError(
            f"output must be a file to write, got the folder {output}: add a name such as {example}"
        )
    target = Path(output).resolve()
    if target == Path(source).resolve() or target.parent == checkpoint_path(Path(source), "").resolve():
        raise ValueError(
            f"output must be a file of its own, got {output}, which belongs to what is exported: give "
            f"another name such as {example}"
        )


def write_tensors(output: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """``torch.save`` of ``content`` to ``output``, atomically."""
    # Opened here, because torch turns a folder that may not be written into an error of its own.
    with atomic_path(output) as temporary, temporary.open("wb") as stream:
        torch.save(content, stream)


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
    encoder = restore(content["network"], content["network_weights"], str(path))
    return encoder.to(map_location).eval()


def read_export(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of an exported file, on the CPU and checked, without building the network; raises like
    :func:`load_encoder`.
    """
    path = Path(path)
    if not path.is_file():
        what = f"{path} is a folder" if path.is_dir() else f"no file at {path}"
        raise FileNotFoundError(f"{what}: expected a file that `pgl export --format encoder` wrote")
    content = safe_load(path, "an exported encoder", "export it anew with `pgl export --format encoder`")
    check_header(path, content, FORMAT, FORMAT_VERSION, "exported encoder", "pgl export --format encoder")
    check_content(path, content)
    return content


def restore(network: dict[str, Any], weights: dict[str, Tensor], source: str) -> nn.Module:
    """The encoder that ``network`` describes, with these weights, in training mode.

    Memory is only taken once the description and the weights are known to agree.

    Raises:
        ValueError: the class or an argument is not allowed, or the weights do not fit; it names ``source``.
    """
    if network["class"] != ENCODER_CLASS:
        raise ValueError(
            f"{source}: network class {network['class']!r} is not allowed, expected {ENCODER_CLASS!r}"
        )
    arguments = network["arguments"]
    unknown = sorted(set(arguments) ^ _ARGUMENTS, key=str)
    if unknown:
        raise ValueError(
            f"{source}: network arguments missing or not allowed: {', '.join(map(str, unknown))}"
        )
    try:
        if arguments["n_stages"] + sum(arguments["n_blocks_per_stage"]) > len(weights):
            raise ValueError("it has more blocks than the file has tensors")
        if (
            _feature_strides(arguments["strides"]) != network["feature_strides"]
            or arguments["input_channels"] != network["input_channels"]
            or network["feature_level"] >= arguments["n_stages"]
        ):
            raise ValueError("feature_strides, input_channels or feature_level contradict them")
        # Without memory for its values, which a description could make arbitrarily many.
        with torch.device("meta"):
            encoder = build_encoder(network)
    except (ValueError, TypeError, AssertionError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"{source}: the network cannot be built from its arguments: {_first_line(error)}"
        ) from error
    wrong = _misfits(encoder.state_dict(), weights)
    if wrong:
        raise ValueError(
            f"{source}: the weights do not fit the network that the file describes: {listed(wrong)}"
        )
    encoder.to_empty(device="cpu")
    encoder.load_state_dict(weights, strict=True)
    return encoder


def check_networks(content: dict[str, Any], source: str) -> None:
    """Check that the weights of an exported file fit what it says of the network, the decoder's too.

    Raises:
        ValueError: like :func:`restore`.
    """
    encoder = restore(content["network"], content["network_weights"], source)
    if "decoder_weights" not in content:
        return
    with torch.device("meta"):
        whole = build_decoder(encoder.to("meta")).state_dict()
    arguments, level = content["network"]["arguments"], content["network"]["decoder_level"]
    wanted = trained_of_decoder(whole, arguments["n_stages"], level)
    wrong = _misfits(wanted, content["decoder_weights"])
    if wrong:
        raise ValueError(
            f"{source}: the decoder's weights do not fit the network that the file describes: {listed(wrong)}"
        )


def _misfits(wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    wrong = [f"{name} is missing" for name in wanted if name not in weights]
    wrong += [f"{name} is not part of it" for name in weights if name not in wanted]
    wrong += [
        f"{name} has shape {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    return wrong


def listed(items: Sequence[str], limit: int = 12) -> str:
    """The items in one line, the first ``limit`` of them."""
    more = f"; and {len(items) - limit} more" if len(items) > limit else ""
    return "; ".join(items[:limit]) + more


def _feature_strides(strides: list[list[int]]) -> list[list[int]]:
    return [[math.prod(axis) for axis in zip(*strides[: i + 1], strict=True)] for i in range(len(strides))]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()
