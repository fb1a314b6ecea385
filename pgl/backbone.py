"""The network that is pretrained, read at one stage or at several: the encoder, or the whole U-Net."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pgl.encoder_settings import EncoderSettings, chosen_levels, stride_at
from pgl.networks import build_encoder, describe, draw_weights

# nnU-Net's residual U-Nets have one convolution a decoder stage.
_CONVOLUTIONS = 1


class Backbone(nn.Module):
    """The encoder, and if wanted the decoder above it, as far as the chosen feature maps need them.

    Parts that no chosen map needs are kept, so that what is exported is whole, but ask for no gradient. The
    decoder is that of ``ResidualEncoderUNet`` in dynamic-network-architectures, with its parameter names.

    Args:
        settings: the encoder.
        level: the stage whose features matter most, by its resolution: 0 is the finest, −1 the deepest that
            there is. The decoder has no stage at the encoder's deepest level.
        more_levels: further stages.
        decoder: read the decoder's stages in place of the encoder's.
        recompute: keep the outputs of stages only, and compute what lies inside them again in the backward
            pass: less memory, about a third more time.

    Attributes:
        level, stride, channels: of the first chosen map.
        levels, strides, channels_of: of all of them, the first one first.
        deepest: the last stage of the encoder that they need.
        meanwhile: called when a backward pass reaches the stages: from then on, but for recomputing, the
            thread that runs it leaves Python to others for long.

    Raises:
        ValueError: there is no such stage, or one is chosen twice.
    """

    def __init__(
        self,
        settings: EncoderSettings,
        level: int = -1,
        more_levels: Sequence[int] = (),
        decoder: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.levels = chosen_levels(settings, level, more_levels, decoder)
        self.strides = [stride_at(settings, one) for one in self.levels]
        self.channels_of = [settings.features_per_stage[one] for one in self.levels]
        self.level, self.stride, self.channels = self.levels[0], self.strides[0], self.channels_of[0]
        self.deepest = len(settings.strides) - 1 if decoder else max(self.levels)
        self.recompute = recompute
        self.meanwhile: Callable[[], None] | None = None
        whole: Any = build_encoder(describe(settings))
        above: Any = build_decoder(whole) if decoder else None
        if decoder:
            above.seg_layers.requires_grad_(False)
            # Decoder stages are counted from the deepest.
            idle = len(whole.stages) - 1 - min(self.levels)
            above.stages[idle:].requires_grad_(False)
            above.transpconvs[idle:].requires_grad_(False)
        else:
            whole.stages[self.deepest + 1 :].requires_grad_(False)
        self.encoder, self.decoder = whole, above

    def forward(self, images: Tensor) -> Tensor:
        """The first chosen map, Tensor[N, channels, D/sd, H/sh, W/sw] of the images Tensor[N, 1, D, H, W]."""
        return self.maps(images)[0]

    def maps(self, images: Tensor) -> list[Tensor]:
        """All chosen maps of the images, in the order of ``levels``."""
        features = self._run(self.encoder.stem, images)
        found = []
        for stage in self.encoder.stages[: self.deepest + 1]:
            features = self._run(stage, features)
            found.append(features)
        if self.decoder is not None:
            found = self._decode(found)
        chosen = [found[level] for level in self.levels]
        meanwhile = self.meanwhile
        if meanwhile is not None and chosen[0].requires_grad:
            chosen[0].register_hook(lambda gradient: meanwhile())
        return chosen

    def _decode(self, skips: list[Tensor]) -> list[Tensor]:
        """The decoder's maps, each in the place of the encoder's of the same resolution."""
        found = list(skips)
        for number, level in enumerate(range(len(skips) - 2, min(self.levels) - 1, -1)):
            up, stage = self.decoder.transpconvs[number], self.decoder.stages[number]

            def raise_one(below: Tensor, skip: Tensor, up: Any = up, stage: Any = stage) -> Tensor:
                return cast(Tensor, stage(torch.cat((up(below), skip), 1)))

            found[level] = self._run(raise_one, found[level + 1], skips[level], of=(up, stage))
        return found

    def _run(self, part: Any, *inputs: Tensor, of: Sequence[nn.Module] = ()) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return recomputed(of or (part,), part, *inputs)
        return cast(Tensor, part(*inputs))


def recomputed(of: Sequence[nn.Module], part: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """``part(*inputs)``, of which nothing inside is kept: it is computed again in the backward pass.

    Nothing in it may be random. Running statistics of the modules that ``part`` is made ``of`` count once.
    """
    norms = [
        one
        for module in of
        for one in module.modules()
        if isinstance(one, nn.modules.batchnorm._BatchNorm) and one.track_running_stats
    ]

    @contextmanager
    def without_counting() -> Iterator[None]:
        # The statistics are still handed on: as many tensors must be saved as before.
        before = [(norm, norm.momentum, cast(Tensor, norm.num_batches_tracked).clone()) for norm in norms]
        for norm in norms:
            norm.momentum = 0.0
        try:
            yield
        finally:
            for norm, momentum, batches in before:
                norm.momentum = momentum
                cast(Tensor, norm.num_batches_tracked).copy_(batches)

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), without_counting()

    options: dict[str, Any] = {"context_fn": contexts} if norms else {}
    return cast(Tensor, checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False, **options))


def build_decoder(encoder: Any) -> Any:
    """The decoder of ``ResidualEncoderUNet`` above an encoder, with fresh weights and one output channel."""
    from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder

    decoder = UNetDecoder(encoder, num_classes=1, n_conv_per_stage=_CONVOLUTIONS, deep_supervision=False)
    # It would appear under a second name in every list of parameters.
    del decoder.encoder
    draw_weights(decoder)
    return decoder
