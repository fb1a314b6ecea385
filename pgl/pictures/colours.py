"""Features as colours: the first three principal components shown as red, green and blue."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

# Colours span this share of the values of each component; the rest, outliers, is cut at the ends.
_SHOWN_QUANTILES = (0.02, 0.98)
# Below this standard deviation of unit vectors differences are rounding, and are not blown up to colours.
_FLAT = 1e-5
# torch.quantile refuses more than 16 million values, and an even subset gives the same colours.
_MOST_VALUES = 1 << 20


def pca_colours(maps: Sequence[Tensor]) -> list[Tensor]:
    """Colours in which voxels with similar features look alike, by one PCA over all maps.

    The features are normalised to unit length first, because the loss and the matching only see directions.
    The result does not depend on the orientation of the feature space: the sign of a component is chosen so
    that its longer tail is bright.

    Args:
        maps: feature maps Tensor[N, C, *spatial] of one network that shall be comparable, with the same C.

    Returns:
        For each map a float32 Tensor[N, *spatial, 3] in [0, 1]; middle grey where the features do not vary.

    Raises:
        ValueError: a map has no spatial axis, is empty, or holds NaN or infinity.
    """
    for features in maps:
        if features.dim() < 3 or 0 in features.shape:
            raise ValueError(f"maps must be non-empty Tensor[N, C, *spatial], got {list(features.shape)}")
        if not bool(torch.isfinite(features).all()):
            raise ValueError(
                "the features hold NaN or infinity, so they have no colours: did the training diverge?"
            )
    unit = [functional.normalize(features.movedim(1, -1).double(), dim=-1) for features in maps]
    rows = torch.cat([features.flatten(0, -2) for features in unit])  # [voxels, C]
    colours = _row_colours(rows - rows.mean(0))
    parts = colours.split([features[..., 0].numel() for features in unit])
    return [part.view(*features.shape[:-1], 3) for part, features in zip(parts, unit, strict=True)]


def _row_colours(rows: Tensor) -> Tensor:
    """Colours Tensor[voxels, 3] of centred features Tensor[voxels, C]."""
    # eigh sorts ascending: the last three are the strongest.
    spectrum, directions = torch.linalg.eigh(rows.T @ rows / len(rows))
    kept = min(3, rows.shape[1])
    deviations = spectrum[-kept:].flip(0).clamp(min=0).sqrt()
    scores = rows @ directions[:, -kept:].flip(1)  # [voxels, kept]
    scores = scores * torch.where((scores**3).sum(0) < 0, -1.0, 1.0)

    colours = torch.full((len(rows), 3), 0.5, dtype=torch.float32)
    quantiles = torch.tensor(_SHOWN_QUANTILES, dtype=scores.dtype)
    for component, (values, deviation) in enumerate(zip(scores.T, deviations.tolist(), strict=True)):
        if deviation <= _FLAT:
            continue
        low, high = torch.quantile(values[:: -(-len(values) // _MOST_VALUES)], quantiles)
        if high <= low:  # a few voxels differ from a flat rest
            low, high = values.min(), values.max()
        colours[:, component] = ((values - low) / (high - low)).clamp(0, 1).float()
    return colours
