"""The settings of the encoder, and the stages that they make.

What builds the network is in pgl.networks; this file, which every command reads, needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Triple = tuple[int, int, int]
#: The class of each normalisation.
NORMS = {"instance": "torch.nn.InstanceNorm3d", "batch": "torch.nn.BatchNorm3d"}


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
        if self.norm not in NORMS:
            raise ValueError(f"encoder.norm must be one of {sorted(NORMS)}, got {self.norm!r}")


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


def chosen_levels(
    settings: EncoderSettings, level: int, more_levels: Sequence[int], decoder: bool
) -> list[int]:
    """The stages by their number from 0, the first one first.

    Raises:
        ValueError: there is no such stage, or one is chosen twice.
    """
    return stages_by_number(
        len(settings.strides) - int(decoder), level, more_levels, "decoder" if decoder else "encoder"
    )


def stages_by_number(stages: int, level: int, more_levels: Sequence[int], of: str) -> list[int]:
    """:func:`chosen_levels` of so many stages, ``of`` what they are."""
    levels = [stage_number(stages, level, "feature_level", of)]
    levels += [stage_number(stages, one, "more_levels", of) for one in more_levels]
    if len(set(levels)) < len(levels):
        raise ValueError(
            f"method.more_levels must name other stages than method.feature_level {level}, each once, got "
            f"{list(more_levels)}"
        )
    return levels
