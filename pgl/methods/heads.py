"""What the heads of all methods have in common."""

from __future__ import annotations

import math

import torch
from torch import nn

# GroupNorm's usual number of groups (Wu & He 2018), or the largest one that divides the channels.
_GROUPS = 32


def hidden_norm(norm: str, channels: int) -> nn.Module:
    """The normalisation of a head's hidden layer.

    Heads are thrown away after pretraining: the batch at hand is all the statistics they ever need.

    Args:
        norm: ``batch`` or ``group``.
        channels: of that layer.

    Raises:
        ValueError: the normalisation is unknown.
    """
    if norm == "batch":
        return nn.BatchNorm3d(channels, track_running_stats=False)
    if norm == "group":
        return nn.GroupNorm(math.gcd(_GROUPS, channels), channels)
    raise ValueError(f"method.head_norm must be 'batch' or 'group', got {norm!r}")


def compile_head(head: nn.Module) -> None:
    """Have torch.compile translate a head that is an ``nn.Sequential``, at its first call.

    ``head.compile()`` would begin in torch's own files, which torch.compile leaves as they are.
    """
    head.forward = torch.compile(head.forward)  # type: ignore[method-assign]
