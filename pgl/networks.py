"""The encoder that is pretrained: nnU-Net's residual encoder, built from plain settings and described by
them.

The parameter names are those of ``ResidualEncoderUNet.encoder`` in dynamic-network-architectures, which is
what nnU-Net trains; that is why its weights load there without renaming.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

Triple = tuple[int, int, int]

ENCODER_CLASS = "dynamic_network_architectures.building_blocks.residual_encoders.ResidualEncoder"
_NORMS = {"instance": "torch.nn.InstanceNorm3d", "batch": "torch.nn.BatchNorm3d"}
# A description comes out of a file, so only these names are ever turned into classes.
_CLASSES = {
    "torch.nn.Conv3d": nn.Conv3d,
    "torch.nn.InstanceNorm3d": nn.InstanceNorm3d,
    "torch.nn.BatchNorm3d": nn.BatchNorm3d,
    "torch.nn.LeakyReLU": nn.LeakyReLU,
}
# nnU-Net's slope for the weights' initialisation (He et al. 2015 for leaky ReLU).
_INITIAL_SLOPE = 1e-2


@dataclass
class EncoderSettings:
    """The residual encoder, one entry a stage.

    The defaults are our choice: nnU-Net's residual encoder (its "M" preset up to the fifth stage) with
    strides for slices that are thicker than their pixels.

    Args:
        features_per_stage: channels of each stage's output.
        strides: (D, H, W) stride of each stage relative to the one before it.
        kernel_sizes: (D, H, W) convolution kernel of each stage, odd numbers.
        n_blocks_per_stage: residual blocks of each stage.
        norm: normalisation inside the encoder; nnU-Net uses ``instance``.
        conv_bias: whether convolutions have a bias; nnU-Net's do.
        input_channels: channels of the image; CT has one.
    """

    features_per_stage: list[int]
    strides: list[Triple]
    kernel_sizes: list[Triple]
    n_blocks_per_stage: list[int]
    norm: Literal["instance", "batch"] = "instance"
    conv_bias: bool = True
    input_channels: int = 1

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in _PER_STAGE}
        if len(set(lengths.values())) != 1 or not self.features_per_stage:
            raise ValueError(
                f"encoder: every list needs one entry a stage and at least one, got lengths {lengths}"
            )
        for name in ("features_per_stage", "n_blocks_per_stage"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"encoder.{name} must hold positive numbers, got {getattr(self, name)}")
        for name in ("strides", "kernel_sizes"):
            setattr(self, name, [tuple(triple) for triple in getattr(self, name)])
            for triple in getattr(self, name):
                if len(triple) != 3 or min(triple) < 1:
                    raise ValueError(f"encoder.{name} must hold three positive numbers a stage, got {triple}")
        if any(size % 2 == 0 for kernel in self.kernel_sizes for size in kernel):
            raise ValueError(f"encoder.kernel_sizes must be odd, got {self.kernel_sizes}")
        if self.norm not in _NORMS:
            raise ValueError(f"encoder.norm must be one of {sorted(_NORMS)}, got {self.norm!r}")


_PER_STAGE = ("features_per_stage", "strides", "kernel_sizes", "n_blocks_per_stage")


def default_encoder() -> EncoderSettings:
    """The encoder of ``configs/paper.yaml``: five stages, total stride (4, 16, 16)."""
    return EncoderSettings(
        features_per_stage=[32, 64, 128, 256, 320],
        strides=[(1, 1, 1), (1, 2, 2), (2, 2, 2), (1, 2, 2), (2, 2, 2)],
        kernel_sizes=[(1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)],
        n_blocks_per_stage=[1, 3, 4, 6, 6],
    )


def stage_number(stages: int, level: int, setting: str = "feature_level", of: str = "encoder") -> int:
    """The stage in [0, stages) of ``level``, which may count from the end (−1 is the deepest).

    Args:
        stages: how many there are.
        level: which one.
        setting: of ``method``, that names it.
        of: what the stages are of.

    Raises:
        ValueError: there is no such stage.
    """
    if not -stages <= level < stages:
        raise ValueError(
            f"method.{setting} must lie in [{-stages}, {stages - 1}] for the {stages} stages of the {of}, "
            f"got {level}"
        )
    return level % stages


def stride_at(settings: EncoderSettings, level: int) -> Triple:
    """The total (D, H, W) stride of the feature map of stage ``level``, in input voxels a feature voxel."""
    strides = settings.strides[: stage_number(len(settings.strides), level) + 1]
    return tuple(math.prod(axis) for axis in zip(*strides, strict=True))  # type: ignore[return-value]


def describe(settings: EncoderSettings) -> dict[str, Any]:
    """The encoder as plain data (JSON holds it): class name and construction arguments.

    :func:`build_encoder` makes the network from it, and nnU-Net's plans hold the same arguments.
    """
    return {
        "class": ENCODER_CLASS,
        "arguments": {
            "input_channels": settings.input_channels,
            "n_stages": len(settings.strides),
            "features_per_stage": list(settings.features_per_stage),
            "conv_op": "torch.nn.Conv3d",
            "kernel_sizes": [list(kernel) for kernel in settings.kernel_sizes],
            "strides": [list(stride) for stride in settings.strides],
            "n_blocks_per_stage": list(settings.n_blocks_per_stage),
            "conv_bias": settings.conv_bias,
            "norm_op": _NORMS[settings.norm],
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
            "return_skips": True,
        },
    }


def build_encoder(description: Mapping[str, Any]) -> nn.Module:
    """The encoder of :func:`describe`, with fresh weights; it returns the feature maps of all stages as a
    list.

    Raises:
        ValueError: the description names a class that is not one of the encoder's own.
    """
    if description.get("class") != ENCODER_CLASS:
        raise ValueError(f"network class must be {ENCODER_CLASS}, got {description.get('class')!r}")
    from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder

    encoder = ResidualEncoder(**constructor_arguments(description))
    draw_weights(encoder)
    return encoder


def draw_weights(network: nn.Module) -> None:
    """Draw the weights of a network anew as nnU-Net draws them."""
    from dynamic_network_architectures.initialization.weight_init import InitWeights_He

    network.apply(InitWeights_He(_INITIAL_SLOPE))


def constructor_arguments(description: Mapping[str, Any]) -> dict[str, Any]:
    """The ``arguments`` of :func:`describe` with classes in place of their names.

    Raises:
        ValueError: a name is not on the list of those allowed.
    """
    arguments = dict(description["arguments"])
    for name in ("conv_op", "norm_op", "nonlin"):
        if arguments.get(name) not in _CLASSES:
            raise ValueError(
                f"network argument {name} must be one of {sorted(_CLASSES)}, got {arguments.get(name)!r}"
            )
        arguments[name] = _CLASSES[arguments[name]]
    return arguments


def count_parameters(module: nn.Module) -> int:
    """Trainable parameters of a module."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def seeded_module(seed: int, build: Any) -> Any:
    """``build()`` with torch's random numbers set by ``seed``; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
