"""Models Genesis, as a baseline: encoder and decoder restore what a view was before it was distorted.

Source: Zhou et al., "Models Genesis", arXiv 1908.06912, from its description. The two views of a sample are
two pictures here; that they show one place is not used.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from pgl.augment import augment, normalise
from pgl.backbone import Backbone, build_decoder, recomputed
from pgl.config import IntensitySettings, MethodSettings, PretrainConfig
from pgl.encoder_settings import EncoderSettings, chosen_levels
from pgl.methods.base import Method
from pgl.methods.genesis_transforms import distort, sample_distortion
from pgl.training.contexts import Batch
from pgl.views import ViewPairs, cut


class Genesis(Method):
    """The encoder, a decoder above it, and the loss between what it restores and what was there.

    The decoder is nnU-Net's, with one output channel. All stages of the encoder are trained, whichever is
    measured.

    Args:
        encoder: the network to pretrain, of two stages or more.
        settings: ``feature_level`` and ``aligned_size``, for the measurements; the rest is of no use here.
        recompute: save memory in the backward pass, see :class:`pgl.backbone.Backbone`.

    Raises:
        ValueError: the encoder has one stage only.
    """

    def __init__(self, encoder: EncoderSettings, settings: MethodSettings, recompute: bool = False) -> None:
        stages = len(encoder.strides)
        if stages < 2:
            raise ValueError("method.name genesis needs an encoder of two stages or more, got one")
        (measured,) = chosen_levels(encoder, settings.feature_level, (), decoder=False)
        others = [stage for stage in range(stages) if stage != measured]
        super().__init__(Backbone(encoder, measured, others, recompute=recompute), settings)
        decoder = build_decoder(self.backbone.encoder)
        # Those of coarser stages are for deep supervision.
        decoder.seg_layers[:-1].requires_grad_(False)
        self.decoder: nn.Module = decoder

    def forward(self, inputs: Tensor, pairs: ViewPairs) -> Tensor:
        """The mean squared difference between the restored and the clean views, over all voxels.

        Args:
            inputs: int32 Tensor[2B, 2, *patch], see :meth:`inputs`.
            pairs: not looked at.
        """
        distorted, clean = inputs.view(torch.float32).split(1, dim=1)
        return mse_loss(self.restore(distorted).float(), clean)

    def restore(self, distorted: Tensor) -> Tensor:
        """What the network makes of distorted views, Tensor[N, 1, *patch]."""
        by_stage = sorted(zip(self.backbone.levels, self.backbone.maps(distorted), strict=True))
        skips = [features for _, features in by_stage]
        if self.backbone.recompute and torch.is_grad_enabled():
            return recomputed((self.decoder,), self.decoder, skips)
        return self.decoder(skips)  # type: ignore[no-any-return]

    def inputs(self, batch: Batch, config: PretrainConfig) -> Tensor:
        """Distorted views, and the same clean, in [0, 1]: a float32 Tensor[2B, 2, *patch], seen as int32.

        As integers, since Fabric rounds floating-point arguments to the precision of the networks, in which
        the clean voxels would be up to 4 HU off.
        """
        clean = normalise(cut(batch.contexts, batch.pairs), config.intensity)
        # The view's own random number, a function of seed, sample and view.
        distortion = sample_distortion(batch.augmentation.noise_seed, batch.pairs.patch_size)
        return torch.cat([distort(clean, distortion), clean], 1).view(torch.int32)

    def views(self, batch: Batch, config: PretrainConfig) -> Tensor:
        """Views that are augmented like those of the other methods, as strongly in HU, and then scaled."""
        usual, own = IntensitySettings(), config.intensity
        like_others = IntensitySettings(own.clip_hu, usual.mean_hu, usual.std_hu)
        views = augment(normalise(cut(batch.contexts, batch.pairs), like_others), batch.augmentation)
        return (views * usual.std_hu + usual.mean_hu - own.mean_hu) / own.std_hu

    def parts(self) -> dict[str, dict[str, nn.Module]]:
        """Encoder and decoder; there is no target."""
        return {"online": {"encoder": self.backbone.encoder, "decoder": self.decoder}, "target": {}}

    def compile_networks(self) -> None:
        """Have torch.compile translate encoder and decoder, each at its first call."""
        self.backbone.maps = torch.compile(self.backbone.maps)  # type: ignore[method-assign]
        self.decoder.compile()
