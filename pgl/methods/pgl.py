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

from pgl.backbone import Backbone
from pgl.config import MethodSettings
from pgl.encoder_settings import EncoderSettings
from pgl.methods.base import Method
from pgl.methods.decorrelation import decorrelation
from pgl.methods.heads import compile_head, hidden_norm
from pgl.views import ViewPairs, assumed, numbered, scale_of
from pgl_ops import aligned_cosine_loss3d


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
        # The norm that follows has its own offset, so the first convolution needs no bias.
        super().__init__(
            nn.Conv3d(channels, hidden, 1, bias=False),
            hidden_norm(norm, hidden),
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


class PGL(Method):
    """The online network, the target network and the loss between them.

    With ``more_levels`` each further stage has a projector and a predictor of its own, the ``side_`` ones,
    and the loss is the mean over the stages.

    Args:
        encoder: the network to pretrain.
        settings: heads and alignment.
        recompute: save memory in the backward pass, see :class:`pgl.backbone.Backbone`.
    """

    averaged = ("backbone", "projector", "side_projectors")

    def __init__(self, encoder: EncoderSettings, settings: MethodSettings, recompute: bool = False) -> None:
        decoder = settings.features == "decoder"
        backbone = Backbone(encoder, settings.feature_level, settings.more_levels, decoder, recompute)
        super().__init__(backbone, settings)
        self.crop_prior, self.flip_prior = settings.crop_prior, settings.flip_prior
        self.decorrelation = settings.decorrelation
        projectors, predictors = zip(
            *(self._heads(channels, settings) for channels in self.backbone.channels_of), strict=True
        )
        self.projector, self.predictor = projectors[0], predictors[0]
        self.side_projectors = nn.ModuleList(projectors[1:])
        self.side_predictors = nn.ModuleList(predictors[1:])
        self.target_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.target_side_projectors = copy.deepcopy(self.side_projectors).requires_grad_(False)

    @staticmethod
    def _heads(channels: int, settings: MethodSettings) -> tuple[LocalProjector, Predictor]:
        width = settings.projector_channels
        projector = LocalProjector(
            channels, settings.projector_hidden, width, settings.head_norm, settings.output_norm
        )
        return projector, Predictor(width, settings.predictor_hidden, width, settings.head_norm)

    def forward(self, inputs: Tensor, pairs: ViewPairs) -> Tensor:
        """The loss of a batch, both ways round: each view's prediction against the other view's target.

        Args:
            inputs: Tensor[2B, 1, *patch], first views then second ones, augmented.
            pairs: where they were cut.

        Returns:
            Scalar in [0, 4]: the mean over samples, both directions, aligned voxels, regions and stages of
            ‖p̂ − ẑ‖². With ``settings.decorrelation`` so much of the projections' :func:`decorrelation` is
            added.
        """
        regions, flips = assumed(pairs, self.crop_prior, self.flip_prior)
        projectors, predictors = self._of_all_levels("projector"), self._of_all_levels("predictor")
        # First, while nothing is held for the backward pass.
        with torch.no_grad():
            target_features = self.target_backbone.maps(inputs)
            target_projectors = self._of_all_levels("target_projector")
            targets = [head(each) for head, each in zip(target_projectors, target_features, strict=True)]
            del target_features
        features = self.backbone.maps(inputs)
        losses = []
        for level, stride in enumerate(self.backbone.strides):
            online = projectors[level](features[level])
            prediction = predictors[level](self.align(online, regions, flips, stride))
            loss = aligned_cosine_loss3d(
                prediction=prediction,
                features=targets[level],
                boxes=_other_view(numbered(regions, len(inputs))),
                spatial_scale=scale_of(stride),
                sampling_ratio=self.sampling_ratio,
                flips=_other_view(flips),
            )
            if self.decorrelation:
                # Validation is one process's alone.
                together = self.training and self.processes > 1
                loss = loss + self.decorrelation * decorrelation(online, together)
            losses.append(loss)
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    def project(self, features: Tensor) -> Tensor:
        """The local projection of the first stage's map."""
        return self.projector(features)  # type: ignore[no-any-return]

    def parts(self) -> dict[str, dict[str, nn.Module]]:
        """The networks and heads that are in use."""
        found: dict[str, dict[str, nn.Module]] = {}
        for side, prefix in (("online", ""), ("target", "target_")):
            backbone = getattr(self, f"{prefix}backbone")
            found[side] = {"encoder": backbone.encoder, "projector": getattr(self, f"{prefix}projector")}
            if not prefix:
                found[side]["predictor"] = self.predictor
            if backbone.decoder is not None:
                found[side]["decoder"] = backbone.decoder
            for name in ("side_projectors", "side_predictors")[: 1 if prefix else 2]:
                if len(getattr(self, prefix + name)):
                    found[side][name] = getattr(self, prefix + name)
        return found

    def compile_networks(self) -> None:
        """Have torch.compile translate both networks and all heads, each at its first call."""
        for backbone in (self.backbone, self.target_backbone):
            # The whole path at once: stages share their code, each would count as a new version of it.
            backbone.maps = torch.compile(backbone.maps)  # type: ignore[method-assign]
        for name in ("projector", "predictor", "target_projector"):
            for head in self._of_all_levels(name):
                compile_head(head)

    def _of_all_levels(self, name: str) -> list[nn.Module]:
        side = f"target_side_{name[7:]}s" if name.startswith("target_") else f"side_{name}s"
        return [getattr(self, name), *getattr(self, side)]


def ema_decay(step: int, steps: int, start: float, end: float) -> float:
    """The target's decay after step ``step`` of ``steps``: half a cosine from ``start`` to ``end`` (BYOL)."""
    return end - (end - start) * (math.cos(math.pi * step / steps) + 1) / 2


def _other_view(rows: Tensor) -> Tensor:
    first, second = rows.chunk(2)
    return torch.cat([second, first])
