"""One step of the optimiser: learning rate, losses and gradients of a batch or of its pieces, update, target.

The step reads like the method: cut the views, augment them, loss, gradients, optimiser, slow average.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from lightning_fabric import Fabric

from pgl.config import PretrainConfig
from pgl.methods.base import Method
from pgl.methods.pgl import ema_decay
from pgl.training.batch_norm import over_all_processes
from pgl.training.contexts import Batch
from pgl.training.optimizers import build_optimizer, learning_rate_at


class TrainingStep:
    """The networks and their optimiser on the device, and what a step does with them.

    Args:
        config: the run's settings.
        method: the networks; they are moved to the device of ``fabric``.
        fabric: devices and precision.

    Attributes:
        method: the networks, as they are saved.
        optimizer: the optimiser, as it is saved.
    """

    def __init__(self, config: PretrainConfig, method: Method, fabric: Fabric) -> None:
        train = config.train
        self.config, self.fabric = config, fabric
        self.method: Method = over_all_processes(method, fabric.world_size, fabric.device)
        self.method.processes = fabric.world_size
        self.layout = torch.channels_last_3d if train.channels_last else torch.preserve_format
        if train.channels_last:
            self.method.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        if train.compile:
            self.method.compile_networks()
        self.forward, self.optimizer = fabric.setup(
            self.method, build_optimizer(self.method, config.optimizer)
        )

    def __call__(self, step: int, pieces: Sequence[Batch]) -> torch.Tensor:
        """Do step ``step`` (0-based) with the pieces of its batch, which lie on the device.

        Returns:
            The mean loss over the pieces, on the device, without its graph.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, self.config.train.steps, self.config.optimizer)
        self.optimizer.zero_grad()
        losses = []
        for number, batch in enumerate(pieces, 1):
            # Processes exchange gradients once a step, with the last piece.
            with self.fabric.no_backward_sync(self.forward, enabled=number < len(pieces)):
                loss = self.forward(self.inputs(batch), batch.pairs) / len(pieces)
                self.fabric.backward(loss)
            losses.append(loss.detach())
        self.optimizer.step()
        self.method.update_target(self.decay(step))
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def have_meanwhile(self, call: Callable[[], None] | None) -> None:
        """Have something called in each backward pass (:class:`pgl.backbone.Backbone`), or nothing any more.
        Compiled networks do not call it."""
        if not self.config.train.compile:
            self.method.backbone.meanwhile = call

    def inputs(self, batch: Batch) -> torch.Tensor:
        """The method's input for a batch, Tensor[2B, channels, *patch]."""
        return self.method.inputs(batch, self.config).contiguous(memory_format=self.layout)

    def decay(self, step: int) -> float:
        """The target's decay after step ``step`` (0-based)."""
        settings = self.config.method
        return ema_decay(step, self.config.train.steps, settings.ema_start, settings.ema_end)
