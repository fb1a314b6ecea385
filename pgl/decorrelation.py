"""A penalty on channels that say the same: it keeps a network from comparing places in few dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from pgl.batch_norm import mean_over_processes

# Added to a variance, like batch normalisation's.
_EPS = 1e-5


def decorrelation(features: Tensor, together: bool = False) -> Tensor:
    """How much the channels tell of each other: Σ_{i≠j} ρ_ij² / C.

    ρ_ij is the correlation of channels i and j over all samples and places. The off-diagonal term is that of
    Barlow Twins (Zbontar et al., arXiv 2103.03230) within one view, the scale that of VICReg's covariance
    (Bardes et al., arXiv 2105.04906).

    Args:
        features: Tensor[N, C, D, H, W], of any floating type; computed in float32 at least.
        together: over the samples of all processes; each must bring as many.

    Returns:
        Scalar in [0, C − 1]: 0 when no channel tells anything (linear) of another, C − 1 when all are the
        same. A constant channel counts as one that tells nothing.
    """
    with torch.autocast(features.device.type, enabled=False):
        wide = features if features.dtype == torch.float64 else features.float()
        rows = wide.movedim(1, -1).flatten(0, -2)
        average = mean_over_processes if together else _itself
        centred = rows - average(rows.mean(0))
        covariance = average(centred.T @ centred / len(rows))
        scale = torch.rsqrt(covariance.diagonal() + _EPS)
        correlation = covariance * scale[:, None] * scale
        others = correlation - torch.diag(correlation.diagonal())
        return others.square().sum() / len(others)


def _itself(value: Tensor) -> Tensor:
    return value
