"""The decoder in an exported file, which is there where ``method.features decoder`` pretrained it.

Settings count the decoder's stages from the finest, nnU-Net's names from the deepest: stage ``level`` of the
settings is ``stages.N`` with N = n_stages − 2 − level.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pgl.encoder_settings import stages_by_number

# Modules of a stage; the segmentation layers are nobody's who pretrains.
PARTS = ("stages", "transpconvs")


def decoder_level(checkpoint: Mapping[str, Any]) -> int | None:
    """The finest stage of the decoder that a checkpoint's run trained, None where it trained the encoder
    alone.

    Raises:
        ValueError: there is no such stage.
    """
    method = checkpoint["config"]["method"]
    if method["features"] != "decoder":
        return None
    stages = checkpoint["network"]["arguments"]["n_stages"] - 1
    return min(stages_by_number(stages, method["feature_level"], method["more_levels"], "decoder"))


def trained_of_decoder(tensors: Mapping[str, Tensor], n_stages: int, level: int) -> dict[str, Tensor]:
    """Those tensors of a decoder that work towards its stage ``level``."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if (found := stage_of(name)) is not None and found <= n_stages - 2 - level
    }


def stage_of(name: str) -> int | None:
    """The stage of a decoder's tensor, counted from the deepest, or of an encoder's, from the finest; None
    where it is of no stage.
    """
    part, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    return int(number) if part in PARTS and number.isascii() and number.isdecimal() else None


def leading_stages(tensors: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the stages, from the deepest on, that another decoder has just so; none of those after
    the first that differs.
    """
    found: dict[str, Tensor] = {}
    for stage in sorted({stage for name in tensors if (stage := stage_of(name)) is not None}):
        of_stage = {name: tensor for name, tensor in tensors.items() if stage_of(name) == stage}
        wanted = {name: tensor.shape for name, tensor in there.items() if stage_of(name) == stage}
        if {name: tensor.shape for name, tensor in of_stage.items()} != wanted:
            break
        found |= of_stage
    return found
