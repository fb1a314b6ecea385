"""The optimiser of fine-tuning and its schedule."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from pgl.downstream.config import FinetuneOptimizerSettings

POLY_EXPONENT = 0.9  # nnU-Net's


def build_optimizer(unet: nn.Module, settings: FinetuneOptimizerSettings) -> Optimizer:
    """The optimiser, with a group each for the weights and the vectors (biases, norms) of encoder and
    decoder; ``factor`` in a group scales the schedule's rate."""
    groups: list[dict[str, Any]] = []
    for part, factor in (("encoder.", settings.encoder_factor), ("decoder.", 1.0)):
        own = [p for name, p in unet.named_parameters() if name.startswith(part)]
        for parameters, decay in (
            ([p for p in own if p.ndim > 1], settings.weight_decay),
            ([p for p in own if p.ndim <= 1], 0.0),
        ):
            groups.append({"params": parameters, "weight_decay": decay, "factor": factor})
    if settings.name == "adamw":
        return AdamW(groups, lr=settings.learning_rate)
    return SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, nesterov=settings.momentum > 0)


def learning_rate_at(step: int, steps: int, settings: FinetuneOptimizerSettings) -> float:
    """The rate of step ``step`` (0-based) of ``steps``."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / (steps - settings.warmup_steps)
    if settings.schedule == "poly":
        return settings.learning_rate * (1 - done) ** POLY_EXPONENT
    return settings.learning_rate * (1 + math.cos(math.pi * done)) / 2


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Give each group its share of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
