"""nnU-Net's plans: which network they describe, and whether the encoder fits it.

A plans file is JSON that ``nnUNetv2_plan_experiment`` writes. What is read of it, for one entry of its
``configurations``: ``architecture`` (``network_class_name``, ``arch_kwargs``), ``spacing``, ``patch_size``,
``normalization_schemes``, and of the whole file ``transpose_forward`` and
``foreground_intensity_properties_per_channel``. Nothing in it is imported or called by name.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

UNET_CLASS = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
PLAN_ANEW = "nnUNetv2_plan_experiment -d DATASET -pl nnUNetPlannerResEncM"
AXES = [0, 1, 2]
_PER_STAGE = ("features_per_stage", "n_blocks_per_stage", "kernel_sizes", "strides")
_CLASSES = ("conv_op", "norm_op", "dropout_op", "nonlin", "block")
# Arguments that change nothing in the encoder, and those that only give more room to others.
_OF_THE_DECODER = {"n_conv_per_stage_decoder", "deep_supervision", "num_classes"}
_DEFAULTS: dict[str, Any] = {
    "conv_bias": False,
    "norm_op": None,
    "norm_op_kwargs": None,
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": None,
    "nonlin_kwargs": None,
    "block": "BasicBlockD",
    "bottleneck_channels": None,
    "stem_channels": None,
}
_NORM_DEFAULTS = {
    "InstanceNorm3d": {"eps": 1e-5, "momentum": 0.1, "affine": False, "track_running_stats": False},
    "BatchNorm3d": {"eps": 1e-5, "momentum": 0.1, "affine": True, "track_running_stats": True},
}


def read_json(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """The JSON object in ``path``; ``kind`` says what it should be, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, or no object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}: expected {kind}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as {kind}: {error or type(error).__name__}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} cannot be read as {kind}: expected a JSON object, got {content!r:.60}")
    return content


def read_configuration(plans: Mapping[str, Any], name: str, source: str) -> dict[str, Any]:
    """One configuration of the plans, what it inherits from others included.

    Raises:
        ValueError: the plans have no such configuration, or it is of an older form, without ``architecture``.
    """
    configurations = plans.get("configurations")
    if not isinstance(configurations, dict):
        raise ValueError(
            f"{source} has no 'configurations': expected plans of nnU-Net v2, such as {PLAN_ANEW} writes"
        )
    merged: dict[str, Any] = {}
    visited: list[str] = []
    heir: Any = name
    while heir is not None:
        entry = configurations.get(heir) if isinstance(heir, str) else None
        if not isinstance(entry, dict):
            known = ", ".join(map(str, configurations))
            raise ValueError(f"{source} has no configuration {heir!r}, expected one of {known}")
        if heir in visited:
            raise ValueError(f"{source}: configuration {name!r} inherits from itself")
        visited.append(heir)
        merged = {**entry, **merged}
        heir = entry.get("inherits_from")
    merged.pop("inherits_from", None)
    if "architecture" not in merged:
        raise ValueError(
            f"{source}: configuration {name!r} has no 'architecture', as in plans of an older nnU-Net: "
            f"update nnunetv2 and plan anew with {PLAN_ANEW}"
        )
    architecture = merged["architecture"]
    if not isinstance(architecture, dict) or not isinstance(architecture.get("arch_kwargs"), dict):
        raise ValueError(f"{source}: architecture of {name!r} must hold network_class_name and arch_kwargs")
    return merged


def differences(network: Mapping[str, Any], configuration: Mapping[str, Any], channels: int) -> list[str]:
    """Why the encoder does not fit the network of a configuration; empty if it does.

    Strides and the like are compared too, although weights of another stride would load: they would not
    mean the same.

    Args:
        network: ``network`` of an exported encoder.
        configuration: of :func:`read_configuration`.
        channels: image channels of the configuration's network.
    """
    architecture = configuration["architecture"]
    class_name = str(architecture.get("network_class_name"))
    found = []
    if class_name.split(".")[-1] != UNET_CLASS.split(".")[-1]:
        found.append(f"network_class_name: the plans have {class_name}, the encoder needs {UNET_CLASS}")
    planned = dict(architecture["arch_kwargs"])
    own = _comparable(network["arguments"])
    theirs = _comparable(planned)
    for key in [*own, *(key for key in theirs if key not in own)]:
        if key not in _OF_THE_DECODER and theirs.get(key) != own.get(key):
            found.append(f"{key}: the plans have {theirs.get(key)}, the encoder has {own.get(key)}")
    if configuration.get("previous_stage") is not None:
        found.append("previous_stage: the network of a cascade's second stage reads a segmentation too")
    if channels != network["input_channels"]:
        found.append(f"input channels: the plans have {channels}, the encoder {network['input_channels']}")
    return found


def input_notes(
    network: Mapping[str, Any], plans: Mapping[str, Any], configuration: Mapping[str, Any]
) -> list[str]:
    """What nnU-Net would feed the network differently from pretraining: spacing, axes, intensities."""
    notes = []
    spacing, wanted = configuration.get("spacing"), network["spacing_mm"]
    if not _close(spacing, wanted):
        notes.append(f"the plans' spacing is {spacing} mm, pretraining's was {wanted} mm")
    if plans.get("transpose_forward", AXES) != AXES:
        notes.append(
            f"the plans transpose the axes by {plans['transpose_forward']}, pretraining kept (D, H, W)"
        )
    schemes = configuration.get("normalization_schemes")
    intensities = ct_properties(network)
    expected = f"clips to {network['intensity']['clip_hu']} HU, then (HU − {intensities['mean']}) / "
    expected += str(intensities["std"])
    if not isinstance(schemes, list) or set(schemes) != {"CTNormalization"}:
        notes.append(f"the plans normalise with {schemes}, pretraining {expected}")
    else:
        properties = plans.get("foreground_intensity_properties_per_channel")
        properties = properties if isinstance(properties, dict) else {}
        for channel, values in properties.items():
            theirs = {key: values.get(key) for key in intensities} if isinstance(values, dict) else None
            if theirs is None or not _close(list(theirs.values()), list(intensities.values())):
                notes.append(f"the plans normalise channel {channel} with {theirs}, pretraining {expected}")
    return notes


def ct_properties(network: Mapping[str, Any]) -> dict[str, float]:
    """The intensity properties with which nnU-Net's ``CTNormalization`` does what pretraining did."""
    intensity = network["intensity"]
    low, high = intensity["clip_hu"]
    return {
        "mean": float(intensity["mean_hu"]),
        "std": float(intensity["std_hu"]),
        "percentile_00_5": float(low),
        "percentile_99_5": float(high),
    }


def _comparable(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Construction arguments in one form: scalars spread over the stages, classes by name, defaults filled
    in, and without what has no effect.
    """
    values = {**_DEFAULTS, **arguments}
    for key in ("input_channels", "return_skips"):
        values.pop(key, None)
    stages = values.get("n_stages")
    for key in _PER_STAGE:
        values[key] = _spread(values.get(key), stages, triples=key in ("kernel_sizes", "strides"))
    for key in _CLASSES:
        values[key] = values[key].split(".")[-1] if isinstance(values[key], str) else values[key]
    if values["dropout_op"] is None:
        values["dropout_op_kwargs"] = None
    if values["block"] is None:
        values["block"] = _DEFAULTS["block"]
    if values["block"] == _DEFAULTS["block"]:
        values["bottleneck_channels"] = None
    widths = values["features_per_stage"]
    if isinstance(widths, list) and widths and values["stem_channels"] == widths[0]:
        values["stem_channels"] = None
    norm = values["norm_op"]
    if isinstance(norm, str) and isinstance(values["norm_op_kwargs"], dict | None):
        values["norm_op_kwargs"] = {**_NORM_DEFAULTS.get(norm, {}), **(values["norm_op_kwargs"] or {})}
    if values["nonlin"] == "LeakyReLU" and isinstance(values["nonlin_kwargs"], dict | None):
        settings = {"negative_slope": 0.01, **(values["nonlin_kwargs"] or {})}
        values["nonlin_kwargs"] = {key: value for key, value in settings.items() if key != "inplace"}
    return values


def _spread(value: Any, stages: Any, triples: bool) -> Any:
    if not isinstance(stages, int) or not 0 < stages < 100:
        return value
    per_stage = [value] * stages if isinstance(value, int) else value
    if not isinstance(per_stage, list | tuple):
        return value
    if not triples:
        return list(per_stage)
    return [
        [entry] * 3 if isinstance(entry, int) else list(entry) if isinstance(entry, list | tuple) else entry
        for entry in per_stage
    ]


def are_numbers(values: Any, count: int = 3) -> TypeGuard[list[float]]:
    """Whether ``values`` is a list of ``count`` positive numbers."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(v, int | float) and math.isfinite(v) and v > 0 for v in values)
    )


def _close(values: Any, wanted: Sequence[float]) -> bool:
    return (
        isinstance(values, list)
        and len(values) == len(wanted)
        and all(isinstance(v, int | float) for v in values)
        and all(math.isclose(v, w, rel_tol=0.01, abs_tol=1e-6) for v, w in zip(values, wanted, strict=True))
    )
