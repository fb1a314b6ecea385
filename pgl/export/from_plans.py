"""The other way round: settings with which ``pgl pretrain`` trains the encoder of given plans."""

from __future__ import annotations

import os
from typing import Any

from pgl.encoder_settings import EncoderSettings
from pgl.export.encoder import listed
from pgl.export.plans import differences, read_configuration, read_json
from pgl.networks import describe


def pretraining_settings(
    plans: str | os.PathLike[str], configuration: str = "3d_fullres"
) -> dict[str, dict[str, Any]]:
    """Settings of a run whose encoder is that of nnU-Net's plans: plain data for a config file.

    Args:
        plans: the plans file, of a residual encoder.
        configuration: the entry of its ``configurations``.

    Returns:
        ``encoder``, and for plans of CT ``intensity``: what nnU-Net does to HU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no plans file, or its network has an encoder that ``pgl`` does not build; the list
            of what differs.
    """
    content = read_json(plans, "plans of nnU-Net v2")
    planned = read_configuration(content, configuration, str(plans))
    arguments = planned["architecture"]["arch_kwargs"]
    schemes = planned.get("normalization_schemes")
    channels = len(schemes) if isinstance(schemes, list) else 0
    try:
        encoder: dict[str, Any] = {
            "features_per_stage": [int(n) for n in arguments["features_per_stage"]],
            "strides": [[int(n) for n in stride] for stride in arguments["strides"]],
            "kernel_sizes": [[int(n) for n in kernel] for kernel in arguments["kernel_sizes"]],
            "n_blocks_per_stage": [int(n) for n in arguments["n_blocks_per_stage"]],
            "norm": "batch" if "BatchNorm" in str(arguments.get("norm_op")) else "instance",
            "conv_bias": bool(arguments.get("conv_bias", False)),
            "input_channels": channels,
        }
        settings = EncoderSettings(**encoder)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{plans}: {configuration!r} has no residual encoder in 3D that pgl builds: "
            f"{type(error).__name__}: {error}"
        ) from error
    found = differences({**describe(settings), "input_channels": channels}, planned, channels)
    if found:
        raise ValueError(f"{plans}: pgl does not build the encoder of {configuration!r}: {listed(found)}")
    properties = content.get("foreground_intensity_properties_per_channel")
    channel = properties.get("0") if isinstance(properties, dict) else None
    if schemes != ["CTNormalization"] or not isinstance(channel, dict):
        return {"encoder": encoder}
    return {
        "encoder": encoder,
        "intensity": {
            "clip_hu": [channel["percentile_00_5"], channel["percentile_99_5"]],
            "mean_hu": channel["mean"],
            "std_hu": channel["std"],
        },
    }
