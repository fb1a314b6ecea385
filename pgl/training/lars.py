"""LARS, the optimiser of large batches, in a handful of calls for all parameters at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling, for large batches.

    For each parameter w with gradient g::

        d = g + weight_decay·w
        d = d · trust·‖w‖ / ‖d‖     where ``adapt`` is set and both norms are positive
        v = momentum·v + d
        w = w − lr·v

    Each line is one ``torch._foreach_*`` call over all parameters of a group: on a GPU a few launches, but
    for the second, which is one for each parameter. Nothing waits for the device.

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
            alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault((parameter.device, parameter.dtype), []).append(parameter)
            for parameters in alike.values():
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [parameter.grad for parameter in parameters]
        directions = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])  # type: ignore[arg-type]
        if group["adapt"]:
            weight_norms = torch.stack(torch._foreach_norm(parameters))
            norms = torch.stack(torch._foreach_norm(directions))
            usable = (weight_norms > 0) & (norms > 0)
            scales = torch.where(usable, group["trust"] * weight_norms / norms, 1.0)
            torch._foreach_mul_(directions, list(scales.unbind()))
        velocities = [self._velocity(parameter) for parameter in parameters]
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, directions)
        torch._foreach_add_(parameters, velocities, alpha=-group["lr"])

    def _velocity(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(parameter)
        return state["velocity"]
