"""BYOL, as a baseline: two views of one place, each pooled to one vector, one predicted from the other.

Source: Grill et al., "Bootstrap Your Own Latent", arXiv 2006.07733. What it compares are whole views, so it
needs no aligner and does not know how the views were cut.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pgl.backbone import Backbone
from pgl.config import MethodSettings
from pgl.encoder_settings import EncoderSettings
from pgl.methods.base import Method
from pgl.methods.heads import compile_head, hidden_norm
from pgl.views import ViewPairs
from pgl_ops import voxel_cosine_loss


class GlobalHead(nn.Sequential):
    """Linear, normalisation, ReLU, linear without bias: BYOL's projector and predictor.

    Vectors are maps of one voxel here, so that linear layers are 1×1×1 convolutions and the normalisation is
    the one that :mod:`pgl.training.batch_norm` makes one over all processes.

    Args:
        channels, hidden, out_channels: of the input, in between, of the output.
        norm: ``batch`` or ``group``.
    """

    def __init__(self, channels: int, hidden: int, out_channels: int, norm: str) -> None:
        super().__init__(
            nn.Conv3d(channels, hidden, 1),
            hidden_norm(norm, hidden),
            nn.ReLU(inplace=True),
            nn.Conv3d(hidden, out_channels, 1, bias=False),
        )


class BYOL(Method):
    """The online network, the target network and the loss between whole views.

    Args:
        encoder: the network to pretrain.
        settings: ``feature_level``, the heads' widths and ``head_norm``; it has no use for the others.
        recompute: save memory in the backward pass, see :class:`pgl.backbone.Backbone`.
    """

    averaged = ("backbone", "projector")

    def __init__(self, encoder: EncoderSettings, settings: MethodSettings, recompute: bool = False) -> None:
        super().__init__(Backbone(encoder, settings.feature_level, recompute=recompute), settings)
        width, norm = settings.projector_channels, settings.head_norm
        self.projector = GlobalHead(self.backbone.channels, settings.projector_hidden, width, norm)
        self.predictor = GlobalHead(width, settings.predictor_hidden, width, norm)
        self.target_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def forward(self, inputs: Tensor, pairs: ViewPairs) -> Tensor:
        """The loss of a batch.

        Args:
            inputs: Tensor[2B, 1, *patch], first views then second ones, augmented.
            pairs: not looked at.

        Returns:
            Scalar in [0, 8]: the mean over samples of the sum over both directions of 2 − 2·cos between one
            view's prediction and the other view's target.
        """
        # First, while nothing is held for the backward pass.
        with torch.no_grad():
            first, second = self.target_projector(_pooled(self.target_backbone(inputs))).chunk(2)
            other = torch.cat([second, first])
        prediction = self.predictor(self.project(self.backbone(inputs)))
        # The mean over all 2B directions is half the mean over samples of both.
        return 2 * voxel_cosine_loss(prediction, other)

    def project(self, features: Tensor) -> Tensor:
        """The projected mean of each map, Tensor[N, projector_channels, 1, 1, 1]."""
        return self.projector(_pooled(features))  # type: ignore[no-any-return]

    def parts(self) -> dict[str, dict[str, nn.Module]]:
        """Encoder and projector of both networks, and the predictor."""
        return {
            "online": {
                "encoder": self.backbone.encoder,
                "projector": self.projector,
                "predictor": self.predictor,
            },
            "target": {"encoder": self.target_backbone.encoder, "projector": self.target_projector},
        }

    def compile_networks(self) -> None:
        """Have torch.compile translate both networks and all heads, each at its first call."""
        for backbone in (self.backbone, self.target_backbone):
            backbone.maps = torch.compile(backbone.maps)  # type: ignore[method-assign]
        for head in (self.projector, self.predictor, self.target_projector):
            compile_head(head)


def _pooled(features: Tensor) -> Tensor:
    """The mean over all voxels, Tensor[N, C, 1, 1, 1]."""
    return features.mean((2, 3, 4), keepdim=True)
