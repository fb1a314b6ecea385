"""What every pretraining method is to the trainer: a network whose encoder is kept, and a loss of a batch."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pgl.augment import augment, normalise
from pgl.backbone import Backbone
from pgl.config import MethodSettings, PretrainConfig
from pgl.training.contexts import Batch
from pgl.views import ViewPairs, align, cut

_Tensors = list[Tensor]


def prepare_views(batch: Batch, config: PretrainConfig) -> Tensor:
    """The network's input for a batch: both views cut, normalised and augmented, Tensor[2B, 1, *patch]."""
    return augment(normalise(cut(batch.contexts, batch.pairs), config.intensity), batch.augmentation)


class Method(nn.Module):
    """A pretraining method. The trainer, the validation and the checkpoints know no more of it than this.

    A part that has a slow average of itself is called ``NAME``, its average ``target_NAME``.

    Args:
        backbone: the network that is pretrained, read at the stages that the settings name.
        settings: of the method.

    Attributes:
        averaged: names of the parts that have such an average.
        processes: how many train it together; set by the trainer.
    """

    averaged: ClassVar[tuple[str, ...]] = ()
    processes: int = 1
    backbone: Backbone

    def __init__(self, backbone: Backbone, settings: MethodSettings) -> None:
        super().__init__()
        self.aligned_size = settings.aligned_size
        self.sampling_ratio = settings.sampling_ratio
        self.backbone = backbone
        self._pairs: tuple[_Tensors, _Tensors, _Tensors, _Tensors] | None = None

    def forward(self, inputs: Tensor, pairs: ViewPairs) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            inputs: what :meth:`inputs` gave: rows [0, B) are the first views, [B, 2B) the second ones.
            pairs: where the views were cut.
        """
        raise NotImplementedError

    def inputs(self, batch: Batch, config: PretrainConfig) -> Tensor:
        """What :meth:`forward` takes, Tensor[2B, channels, *patch]; by default the augmented views."""
        return self.views(batch, config)

    def views(self, batch: Batch, config: PretrainConfig) -> Tensor:
        """The augmented views as the encoder takes them, Tensor[2B, 1, *patch]; what is measured is measured
        on these."""
        return prepare_views(batch, config)

    def project(self, features: Tensor) -> Tensor | None:
        """The space in which the loss compares, from the backbone's first map; None if it compares none.

        Returns:
            Tensor[N, channels, *grid of the map] where places are compared, Tensor[N, channels, 1, 1, 1]
            where whole views are.
        """
        return None

    def parts(self) -> dict[str, dict[str, nn.Module]]:
        """What a checkpoint holds under ``online`` and under ``target``, by name; ``online`` has the
        ``encoder``."""
        raise NotImplementedError

    def compile_networks(self) -> None:
        """Have torch.compile translate the networks, each at its first call."""
        raise NotImplementedError

    def align(
        self,
        features: Tensor,
        regions: Tensor,
        flips: Tensor,
        stride: tuple[int, int, int] | None = None,
    ) -> Tensor:
        """``regions`` (Tensor[2B·R, 6], voxels of the views) of the feature maps (of ``stride``, by default
        that of the first stage), oriented as the volume is."""
        stride = stride or self.backbone.stride
        return align(features, regions, flips, stride, self.aligned_size, self.sampling_ratio)

    @torch.no_grad()
    def update_target(self, decay: float) -> None:
        """target ← decay·target + (1 − decay)·online, for weights and running statistics alike."""
        if not self.averaged:
            return
        if self._pairs is None:
            self._pairs = self._pairs_to_average()
        slow, fast, counters, counted = self._pairs
        torch._foreach_lerp_(slow, fast, 1 - decay)
        for old, new in zip(counters, counted, strict=True):
            old.copy_(new)

    def _pairs_to_average(self) -> tuple[_Tensors, _Tensors, _Tensors, _Tensors]:
        slow: _Tensors = []
        fast: _Tensors = []
        counters: _Tensors = []
        counted: _Tensors = []
        for name in self.averaged:
            target, online = getattr(self, f"target_{name}"), getattr(self, name)
            for old, new in zip(
                [*target.parameters(), *target.buffers()],
                [*online.parameters(), *online.buffers()],
                strict=True,
            ):
                into, of = (slow, fast) if old.is_floating_point() else (counters, counted)
                into.append(old)
                of.append(new)
        return slow, fast, counters, counted

    def _apply(self, *arguments: Any, **options: Any) -> Method:
        # A move to another device or layout makes new buffers.
        self._pairs = None
        return super()._apply(*arguments, **options)
