"""A penalty on channels that say the same: it keeps a network from comparing places in few dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from pgl.training.batch_norm import mean_over_processes

# Added to a variance, like batch normalisation's.
_EPS = 1e-5


def decorrelation(features: Tensor, together: bool = False) -> Tensor:
    """How much the channels tell of each other: Σ_{i≠j} ρ_ij² / C.

    ρ_ij is the correlation of channels i and j over all samples (of both views) and places, with 1e-5 added
    to each variance. VICReg's covariance term (Bardes et al., arXiv 2105.04906), of correlations, as those
    between two views are in Barlow Twins (Zbontar et al., arXiv 2103.03230). Independent channels of n
    samples and places together give about (C − 1)/n, channels that fill r directions alone about C/r − 1:
    so it depends on the number of channels.

    Args:
        features: Tensor[N, C, D, H, W], of any floating type; computed in float32 at least.
        together: over the samples of all processes; each must bring as many.

    Returns:
        Scalar in [0, C − 1]: 0 when no channel tells anything (linear) of another, C − 1 when all are the
        same. A constant channel, or one whose deviation is far below 0.003, counts as one that tells nothing.
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
