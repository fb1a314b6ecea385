"""The encoder that is pretrained: nnU-Net's residual encoder, built from plain settings and described by
them.

The parameter names are those of ``ResidualEncoderUNet.encoder`` in dynamic-network-architectures, which is
what nnU-Net trains; that is why its weights load there without renaming.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pgl.encoder_settings import NORMS, EncoderSettings

ENCODER_CLASS = "dynamic_network_architectures.building_blocks.residual_encoders.ResidualEncoder"
# A description comes out of a file, so only these names are ever turned into classes.
_CLASSES = {
    "torch.nn.Conv3d": nn.Conv3d,
    "torch.nn.InstanceNorm3d": nn.InstanceNorm3d,
    "torch.nn.BatchNorm3d": nn.BatchNorm3d,
    "torch.nn.LeakyReLU": nn.LeakyReLU,
}
# nnU-Net's slope for the weights' initialisation (He et al. 2015 for leaky ReLU).
_INITIAL_SLOPE = 1e-2


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
            "norm_op": NORMS[settings.norm],
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
