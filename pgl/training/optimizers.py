"""The optimiser, its parameter groups and its learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from pgl.config import OptimizerSettings
from pgl.training.lars import LARS


def build_optimizer(module: nn.Module, settings: OptimizerSettings) -> Optimizer:
    """The optimiser over the module's trainable parameters; vectors (biases, norms) are not decayed."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.ndim > 1]
    vectors = [p for p in trainable if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if settings.name == "adamw":
        return AdamW(groups, lr=settings.learning_rate, fused=True)
    if settings.name == "sgd":
        return SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, fused=True)
    if settings.name == "lars":
        groups[1]["adapt"] = False
        return LARS(groups, lr=settings.learning_rate, momentum=settings.momentum)
    raise ValueError(f"optimizer.name must be 'adamw', 'sgd' or 'lars', got {settings.name!r}")


def learning_rate_at(step: int, steps: int, settings: OptimizerSettings) -> float:
    """The rate of step ``step`` (0-based) of ``steps``: a linear warm-up, then half a cosine to zero."""
    warmup = settings.warmup_steps
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    return settings.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
