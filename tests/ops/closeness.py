"""How close an op must come to the float64 truth: the rounding of its sums and of its output, no more."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.ops import oracle

# A sum's rounding error relative to the sum of its terms' magnitudes: some tens of additions in a row.
ROUNDINGS_OF_A_SUM = 32


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that the ops sum in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_rounded(
    actual: Tensor, exact: Tensor, magnitude: Tensor | float, what: object = "", roundings=ROUNDINGS_OF_A_SUM
) -> None:
    """``actual`` is ``exact`` (float64), summed in float32 or float64 and rounded once to its own dtype.

    Args:
        actual: the op's output, on any device.
        exact: the truth, float64 on the CPU.
        magnitude: the same sums over magnitudes; the error of a sum is relative to it.
        what: the case, for the failure message.
        roundings: how many rounding errors of the summing dtype are allowed.
    """
    assert actual.shape == exact.shape, f"{what}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    out = torch.finfo(actual.dtype)
    error_of_sum = roundings * torch.finfo(sum_dtype(actual.dtype)).eps / 2 * magnitude
    allowed = error_of_sum + (out.eps / 2) * (exact.abs() + error_of_sum) + out.smallest_normal * out.eps
    error = (actual.detach().cpu().double() - exact).abs()
    worst = (error - allowed).nan_to_num(nan=float("inf"))
    if exact.numel() and bool((worst > 0).any()):
        at = tuple(int(i) for i in torch.unravel_index(worst.argmax(), worst.shape))
        raise AssertionError(
            f"{what}: {int((worst > 0).sum())} of {exact.numel()} values differ; at {at} got "
            f"{actual[at].item()!r}, expected {exact[at].item()!r} ± {float((allowed + 0 * exact)[at]):.3g}"
        )


def slope_bound(
    features: Tensor, weight: Tensor | None, reduction: str, upstream: Tensor | float = 1.0
) -> Tensor:
    """2 |factor| / |p| per voxel, Tensor[N, 1, *spatial]: no gradient of the loss is larger than this."""
    norms = oracle.norms(features)
    factor = torch.ones_like(norms) if weight is None else weight.double()
    if reduction == "mean":
        factor = factor / factor.sum().clamp(min=1e-300)
    upstream = upstream.double() if isinstance(upstream, Tensor) else upstream
    return (2 * (factor * upstream).abs() / norms.clamp(min=1e-300) * (norms > 0))[:, None]
