"""nnU-Net plans whose network and input are those of pretraining."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pgl.export.plans import AXES, UNET_CLASS, are_numbers, ct_properties, read_configuration

# Lists of the whole file with an entry an axis, in the order that transpose_forward gives.
_TRANSPOSED = ("original_median_shape_after_transp", "original_median_spacing_after_transp")


def architecture_block(network: Mapping[str, Any]) -> dict[str, Any]:
    """The ``architecture`` of a configuration whose network has this encoder; decoder as nnU-Net's ResEnc
    planners choose it.
    """
    arguments = copy.deepcopy(dict(network["arguments"]))
    for key in ("input_channels", "return_skips"):
        arguments.pop(key)
    return {
        "network_class_name": UNET_CLASS,
        "arch_kwargs": {
            **arguments,
            "n_conv_per_stage_decoder": [1] * (arguments["n_stages"] - 1),
            "dropout_op": None,
            "dropout_op_kwargs": None,
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def fitting_patch(network: Mapping[str, Any], wanted: Sequence[float]) -> list[int]:
    """The patch nearest to ``wanted`` whose axes the encoder's strides divide, not below pretraining's."""
    total = network["feature_strides"][-1]
    return [
        max(round(size / stride) * stride, math.ceil(least / stride) * stride)
        for size, stride, least in zip(wanted, total, network["patch_size"], strict=True)
    ]


def adapted(
    plans: Mapping[str, Any],
    name: str,
    network: Mapping[str, Any],
    plans_name: str,
    source: str,
    patch_size: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Plans like ``plans``, with one configuration, whose network and input are those of pretraining.

    Changed are: the architecture, the spacing, the order of the axes, the patch (unless given,
    :func:`fitting_patch` of the configuration's own), the normalisation, and the names under which nnU-Net
    finds plans and preprocessed data. Everything else, batch size included, stays as planned for the dataset.

    Raises:
        ValueError: the configuration is not 3D, is a cascade's second stage, or has another number of
            channels; the encoder cannot be part of a U-Net; the strides do not divide ``patch_size``.
    """
    configuration = copy.deepcopy(read_configuration(plans, name, source))
    _check_that_it_can_be_adapted(configuration, name, network, source)
    new = copy.deepcopy(dict(plans))
    _undo_transposition(new, configuration)
    if patch_size is None:
        patch_size = fitting_patch(network, configuration["patch_size"])
    check_patch(network, patch_size)
    channels = len(configuration["normalization_schemes"])
    configuration |= {
        "architecture": architecture_block(network),
        "spacing": list(network["spacing_mm"]),
        "patch_size": [int(size) for size in patch_size],
        "normalization_schemes": ["CTNormalization"] * channels,
        "data_identifier": f"{plans_name}_{name}",
    }
    shape, spacing = (new.get(key) for key in _TRANSPOSED)
    if are_numbers(shape) and are_numbers(spacing):
        configuration["median_image_size_in_voxels"] = [
            float(round(voxels * old / mm))
            for voxels, old, mm in zip(shape, spacing, network["spacing_mm"], strict=True)
        ]
    for key in ("previous_stage", "next_stage"):
        configuration.pop(key, None)
    properties = new.get("foreground_intensity_properties_per_channel")
    properties = properties if isinstance(properties, dict) else {}
    new["foreground_intensity_properties_per_channel"] = {
        str(channel): {**properties.get(str(channel), {}), **ct_properties(network)}
        for channel in range(channels)
    }
    new["plans_name"] = plans_name
    new["configurations"] = {name: configuration}
    return new


def _check_that_it_can_be_adapted(
    configuration: Mapping[str, Any], name: str, network: Mapping[str, Any], source: str
) -> None:
    schemes, patch = configuration.get("normalization_schemes"), configuration.get("patch_size")
    if not are_numbers(patch):
        raise ValueError(
            f"{source}: patch_size of {name!r} must be three numbers for this encoder, got {patch}"
        )
    if configuration.get("previous_stage") is not None:
        raise ValueError(
            f"{source}: {name!r} is a cascade's second stage, whose network reads a segmentation too: "
            "take 3d_fullres or 3d_lowres"
        )
    if not isinstance(schemes, list) or len(schemes) != network["input_channels"]:
        count = len(schemes) if isinstance(schemes, list) else schemes
        raise ValueError(
            f"{source}: the dataset has {count} image channels, the encoder {network['input_channels']}"
        )
    check_that_it_fits_a_unet(network)


def check_that_it_fits_a_unet(network: Mapping[str, Any]) -> None:
    """Raises ValueError if nnU-Net's U-Net cannot be built around the encoder."""
    strides = network["arguments"]["strides"]
    if len(strides) < 2 or list(strides[0]) != [1, 1, 1]:
        raise ValueError(
            f"an encoder of strides {strides} cannot be part of nnU-Net's U-Net, which needs two stages or "
            "more, the first of stride 1"
        )


def check_patch(network: Mapping[str, Any], patch_size: Sequence[int]) -> None:
    """Raises ValueError if the encoder's strides do not divide the patch."""
    total = network["feature_strides"][-1]
    if any(size < 1 or size % stride for size, stride in zip(patch_size, total, strict=True)):
        raise ValueError(
            f"patch_size must be a multiple of the encoder's stride {total}, got {list(patch_size)}"
        )


def _undo_transposition(plans: dict[str, Any], configuration: dict[str, Any]) -> None:
    """Keep (D, H, W): that is how the encoder has seen images."""
    forward = plans.get("transpose_forward", AXES)
    if not isinstance(forward, list) or sorted(forward) != AXES:
        raise ValueError(f"transpose_forward of the plans must order the axes {AXES}, got {forward!r}")
    for holder, keys in ((plans, _TRANSPOSED), (configuration, ("patch_size",))):
        for key in keys:
            if are_numbers(holder.get(key)):
                # Entry i belongs to axis forward[i].
                holder[key] = [holder[key][forward.index(axis)] for axis in AXES]
    plans["transpose_forward"] = plans["transpose_backward"] = list(AXES)
