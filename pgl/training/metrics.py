"""What tells whether pretraining works: voxel matching accuracy, and the spread of features (collapse)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def matching_accuracy(first: Tensor, second: Tensor) -> Tensor:
    """Share of voxels of the first view whose nearest neighbour in the second one is the same place.

    The neighbour is the one with the highest cosine among all voxels of the same sample's second view.

    Args:
        first: aligned features of the first views, Tensor[B, C, *spatial].
        second: of the second views, same shape, voxel matching voxel.

    Returns:
        Tensor[B] in [0, 1]; guessing gives :func:`chance`.

    Raises:
        ValueError: the shapes differ.
    """
    if first.shape != second.shape or first.dim() < 3:
        raise ValueError(
            "first and second must be the same Tensor[B, C, *spatial], "
            f"got {list(first.shape)} and {list(second.shape)}"
        )
    a = functional.normalize(first.flatten(2).float(), dim=1)
    b = functional.normalize(second.flatten(2).float(), dim=1)
    # In bfloat16 cosines near 1 lie 1/256 apart, and neighbours would tie.
    with torch.autocast(first.device.type, enabled=False):
        nearest = (a.mT @ b).argmax(-1)  # [B, voxels]
    return (nearest == torch.arange(nearest.shape[1], device=nearest.device)).float().mean(1)


def chance(aligned_size: tuple[int, int, int]) -> float:
    """The matching accuracy of a guess: one over the number of aligned voxels."""
    return 1 / (aligned_size[0] * aligned_size[1] * aligned_size[2])


def feature_spread(features: Tensor) -> float:
    """Standard deviation of the L2-normalised features over samples and voxels, averaged over channels,
    times √C.

    1 when they point everywhere alike, 0 when all are one (the measure of Chen & He, arXiv 2011.10566).

    Args:
        features: Tensor[N, C, *spatial].
    """
    unit = _unit_rows(features)
    return float(unit.std(0, correction=0).mean() * unit.shape[1] ** 0.5)


def effective_rank(features: Tensor) -> float:
    """How many directions the normalised features use: exp of the entropy of their covariance's spectrum,
    in [1, C].

    Source: Roy & Vetterli 2007.

    Args:
        features: Tensor[N, C, *spatial].
    """
    unit = _unit_rows(features)
    centred = unit - unit.mean(0)
    spectrum = torch.linalg.eigvalsh(centred.T @ centred / len(unit)).clamp(min=0)
    total = spectrum.sum()
    if total <= 0:
        return 1.0
    share = spectrum / total
    return float(torch.special.entr(share).sum().exp())


def _unit_rows(features: Tensor) -> Tensor:
    return functional.normalize(features.transpose(0, 1).flatten(1).T.double(), dim=1)
