"""The segmentation network: nnU-Net's residual U-Net around the encoder that was pretrained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pgl.networks import ENCODER_CLASS, build_encoder


@dataclass
class Loaded:
    """What became of the tensors of a weights file, by name.

    Attributes:
        loaded: tensors of the network that came from the file.
        missing: tensors of the network that did not, so they start at random.
        unused: tensors of the file that the network does not have, has in another shape, or that were left
            out.
        reshaped: ``name: shape in the file, shape in the network`` of those with another shape.
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)


def build_unet(description: Mapping[str, Any], outputs: int, decoder_convs: int = 1) -> nn.Module:
    """A ``ResidualEncoderUNet`` with fresh weights (nnU-Net's own initialisation).

    Args:
        description: of the encoder, see :func:`pgl.networks.describe`.
        outputs: channels of the output: classes and background.
        decoder_convs: convolutions of each stage of the decoder.

    Returns:
        A module from Tensor[N, 1, D, H, W] to logits Tensor[N, outputs, D, H, W].

    Raises:
        ValueError: the description is not of the encoder's class, or has one stage only.
    """
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    if description.get("class") != ENCODER_CLASS:
        raise ValueError(f"network class must be {ENCODER_CLASS}, got {description.get('class')!r}")
    encoder: Any = build_encoder(description)  # checks the description, and turns its names into classes
    arguments = dict(description["arguments"])
    check_stages(arguments)
    for name in ("conv_op", "norm_op", "nonlin"):
        arguments[name] = getattr(encoder, name)
    arguments.pop("return_skips")
    unet = ResidualEncoderUNet(**arguments, num_classes=outputs, n_conv_per_stage_decoder=decoder_convs)
    unet.apply(unet.initialize)
    return unet


def check_stages(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if an encoder has too few stages for a U-Net."""
    if len(arguments["strides"]) < 2:
        raise ValueError("the encoder has one stage only: a U-Net needs two or more")


def load_pretrained(unet: nn.Module, weights: Mapping[str, Tensor], source: str) -> Loaded:
    """Copy pretrained tensors into a U-Net.

    Args:
        unet: of :func:`build_unet`.
        weights: names as in the encoder itself; names that begin with ``encoder.`` or ``decoder.`` are taken
            as the U-Net's own.
        source: for messages.

    Raises:
        ValueError: no tensor fits.
    """
    own = {id(t): name for name, t in [*unet.named_buffers(), *unet.named_parameters()]}
    # A module's tensors have several names in a state dict; each counts once.
    by_name = unet.state_dict(keep_vars=True)
    report = Loaded()
    loaded: set[str] = set()
    for name, tensor in weights.items():
        full = name if name.split(".")[0] in ("encoder", "decoder") else f"encoder.{name}"
        target = by_name.get(full)
        if target is not None and target.shape == tensor.shape:
            target.data.copy_(tensor)
            loaded.add(own[id(target)])
        elif not is_alias(name):
            report.unused.append(name)
            if target is not None:
                report.reshaped.append(f"{full}: {list(tensor.shape)} in the file, {list(target.shape)} here")
    report.loaded = [name for name in own.values() if name in loaded]
    report.missing = [name for name in own.values() if name not in loaded]
    if not loaded:
        first = report.reshaped[:1] or [f"{name} is not in the network" for name in report.unused[:1]]
        count = sum(not is_alias(name) for name in weights)
        raise ValueError(
            f"none of the {count} tensors of {source} fits the network ({''.join(first)}): leave "
            "encoder out to take the network from the file, or give the encoder it was trained with"
        )
    return report


def is_alias(name: str) -> bool:
    """Whether a file's tensor is one that it has by another name anyway."""
    return ".all_modules." in name


def summary(names: list[str], most: int = 6) -> str:
    """Names in brief: how many, grouped by the module two levels down."""
    groups: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        key = ".".join(parts[:3] if len(parts) > 2 and parts[2].isdigit() else parts[:2])
        groups[key] = groups.get(key, 0) + 1
    shown = [f"{key} ({count})" for key, count in groups.items()]
    more = f", and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more
