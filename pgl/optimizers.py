"""The optimiser, its parameter groups and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from pgl.config import OptimizerSettings


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling, for large batches.

    For each parameter w with gradient g::

        d = g + weight_decay·w
        d = d · trust·‖w‖ / ‖d‖     where ``adapt`` is set and both norms are positive
        v = momentum·v + d
        w = w − lr·v

    Source: You et al., arXiv 1708.03888, in the form that BYOL uses (biases and norms neither adapted nor
    decayed).

    Args:
        params: parameters or groups; a group may set ``adapt`` and ``weight_decay``.
        lr: learning rate.
        momentum: share of the velocity that is kept.
        weight_decay: L2 decay, added to the gradient.
        trust: the trust coefficient.
        adapt: whether a group's steps are scaled.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
        adapt: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust": trust,
            "adapt": adapt,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure`` re-evaluates the loss, as in every torch optimiser."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        direction = parameter.grad.add(parameter, alpha=group["weight_decay"])  # type: ignore[union-attr]
        if group["adapt"]:
            weight_norm, norm = parameter.norm(), direction.norm()
            usable = (weight_norm > 0) & (norm > 0)
            direction = direction * torch.where(usable, group["trust"] * weight_norm / norm, 1.0)
        state = self.state[parameter]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(parameter)
        velocity = state["velocity"].mul_(group["momentum"]).add_(direction)
        parameter.add_(velocity, alpha=-group["lr"])


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
        return AdamW(groups, lr=settings.learning_rate)
    if settings.name == "sgd":
        return SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)
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
