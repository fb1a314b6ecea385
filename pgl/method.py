"""PGL, the method: two views of one place, one seen by a network in training, one by its slow average.

Source: Xie et al., "PGL: Prior-Guided Local Self-supervised Learning for 3D Medical Image Segmentation",
arXiv 2011.12640, built on BYOL (Grill et al., arXiv 2006.07733). What the paper leaves open is marked in
:mod:`pgl.config`.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from pgl.config import MethodSettings
from pgl.networks import EncoderSettings, FeatureLevel
from pgl.views import ViewPairs, align, assumed, numbered, scale_of
from pgl_ops import aligned_cosine_loss3d

# GroupNorm's usual number of groups (Wu & He 2018), or the largest one that divides the channels.
_GROUPS = 32


class VoxelHead(nn.Sequential):
    """1×1×1 convolution, normalisation, ReLU, 1×1×1 convolution: BYOL's head at each voxel, keeping the grid.

    Args:
        channels: of the input.
        hidden: in between.
        out_channels: of the output.
        norm: ``batch`` or ``group``.
        output_norm: ``none``, or ``batch`` or ``instance`` for a last normalisation without scale and offset.

    Raises:
        ValueError: a normalisation is unknown.
    """

    def __init__(
        self, channels: int, hidden: int, out_channels: int, norm: str, output_norm: str = "none"
    ) -> None:
        if norm not in ("batch", "group"):
            raise ValueError(f"method.head_norm must be 'batch' or 'group', got {norm!r}")
        # The norm that follows has its own offset, so the first convolution needs no bias. Heads are thrown
        # away after pretraining: the batch at hand is all the statistics they ever need.
        super().__init__(
            nn.Conv3d(channels, hidden, 1, bias=False),
            nn.BatchNorm3d(hidden, track_running_stats=False)
            if norm == "batch"
            else nn.GroupNorm(math.gcd(_GROUPS, hidden), hidden),
            nn.ReLU(inplace=True),
            nn.Conv3d(hidden, out_channels, 1),
        )
        if output_norm not in ("none", "batch", "instance"):
            raise ValueError(f"method.output_norm must be 'none', 'batch' or 'instance', got {output_norm!r}")
        if output_norm != "none":
            kind = nn.BatchNorm3d if output_norm == "batch" else nn.InstanceNorm3d
            self.append(kind(out_channels, affine=False, track_running_stats=False))


class LocalProjector(VoxelHead):
    """Features to the space in which voxels are compared, before alignment."""


class Predictor(VoxelHead):
    """Guesses the target's aligned projection from the online one; only the online path has it."""


class PGL(nn.Module):
    """The online network, the target network and the loss between them.

    Args:
        encoder: the network to pretrain.
        settings: heads and alignment.
    """

    def __init__(self, encoder: EncoderSettings, settings: MethodSettings) -> None:
        super().__init__()
        self.aligned_size = settings.aligned_size
        self.sampling_ratio = settings.sampling_ratio
        self.crop_prior, self.flip_prior = settings.crop_prior, settings.flip_prior
        width = settings.projector_channels
        self.backbone = FeatureLevel(encoder, settings.feature_level)
        self.projector = LocalProjector(
            self.backbone.channels,
            settings.projector_hidden,
            width,
            settings.head_norm,
            settings.output_norm,
        )
        self.predictor = Predictor(width, settings.predictor_hidden, width, settings.head_norm)
        self.target_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def forward(self, views: Tensor, pairs: ViewPairs) -> Tensor:
        """The loss of a batch, both ways round: each view's prediction against the other view's target.

        Args:
            views: Tensor[2B, 1, *patch], first views then second ones, augmented.
            pairs: where they were cut.

        Returns:
            Scalar in [0, 4]: the mean over samples, both directions and aligned voxels of ‖p̂ − ẑ‖².
        """
        regions, flips = assumed(pairs, self.crop_prior, self.flip_prior)

        online = self.projector(self.backbone(views))
        prediction = self.predictor(self.align(online, regions, flips))
        with torch.no_grad():
            target = self.target_projector(self.target_backbone(views))

        return aligned_cosine_loss3d(
            prediction=prediction,
            features=_other_view(target),
            boxes=numbered(_other_view(regions)),
            spatial_scale=scale_of(self.backbone.stride),
            sampling_ratio=self.sampling_ratio,
            flips=_other_view(flips),
        )

    def align(self, features: Tensor, regions: Tensor, flips: Tensor) -> Tensor:
        """``regions`` (Tensor[2B, 6], voxels of the views) of the feature maps, oriented as the volume is."""
        return align(features, regions, flips, self.backbone.stride, self.aligned_size, self.sampling_ratio)

    @torch.no_grad()
    def update_target(self, decay: float) -> None:
        """target ← decay·target + (1 − decay)·online, for weights and running statistics alike."""
        for target, online in (
            (self.target_backbone, self.backbone),
            (self.target_projector, self.projector),
        ):
            slow = [*target.parameters(), *target.buffers()]
            fast = [*online.parameters(), *online.buffers()]
            for old, new in zip(slow, fast, strict=True):
                if old.is_floating_point():
                    old.lerp_(new, 1 - decay)
                else:
                    old.copy_(new)


def ema_decay(step: int, steps: int, start: float, end: float) -> float:
    """The target's decay after step ``step`` of ``steps``: half a cosine from ``start`` to ``end`` (BYOL)."""
    return end - (end - start) * (math.cos(math.pi * step / steps) + 1) / 2


def _other_view(rows: Tensor) -> Tensor:
    first, second = rows.chunk(2)
    return torch.cat([second, first])
