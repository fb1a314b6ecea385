"""What the ops must compute, straight from their formulas: float64, one dense matrix per RoI and axis.

Written from the definition alone. It shares no code with ``pgl_ops``, knows nothing of tiles, tables or
vectors, and loops over RoIs and bins in plain Python, so that it can be read beside the formulas.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def as_triple(value):
    """One number or three, as three."""
    return tuple(value) if isinstance(value, tuple | list) else (value,) * 3


def _samples_that_may_count(first: float, bin_length: float, samples: int, size: int) -> NDArray[np.float64]:
    """Indices of a bin's samples that can lie in [-1, size]: a box of 1e7 voxels has few of them."""
    if bin_length == 0.0:
        return np.arange(samples, dtype=np.float64)
    ends = [(edge - first) * samples / bin_length for edge in (-1.0, float(size))]
    lowest = min(max(min(ends) - 3.0, 0.0), float(samples))
    highest = min(max(max(ends) + 3.0, 0.0), float(samples))
    return np.arange(math.floor(lowest), math.ceil(highest), dtype=np.float64)


def axis_matrix(
    lo: float, hi: float, size: int, bins: int, scale: float, ratio: int, aligned: bool, flip: bool = False
) -> NDArray[np.float64]:
    """W of one axis, Array[bins, size]: a bin's value is its row times the axis' voxels."""
    offset = 0.5 if aligned else 0.0
    start = scale * lo - offset
    length = scale * (hi - lo)
    if not aligned:
        length = max(length, 1.0)
    bin_length = length / bins
    samples = ratio if ratio > 0 else math.ceil(length / bins)
    matrix = np.zeros((bins, size))
    if samples <= 0:
        return matrix
    for p in range(bins):
        first = start + p * bin_length
        i = _samples_that_may_count(first, bin_length, samples, size)
        t = first + ((i + 0.5) * bin_length) / samples
        t = np.maximum(t[(t >= -1.0) & (t <= size)], 0.0)
        low = np.floor(t).astype(np.int64)
        at_end = low >= size - 1
        np.add.at(matrix[p], np.full(at_end.sum(), size - 1), 1.0)
        low, t = low[~at_end], t[~at_end]
        np.add.at(matrix[p], low, 1.0 - (t - low))
        np.add.at(matrix[p], low + 1, t - low)
    matrix /= samples
    return matrix[::-1] if flip else matrix


def _rows(boxes: Tensor | list[Tensor]) -> list[list[float]]:
    if isinstance(boxes, Tensor):
        return boxes.detach().cpu().double().tolist()
    return [[i, *row] for i, of_sample in enumerate(boxes) for row in of_sample.cpu().double().tolist()]


def roi_matrices(
    shape, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1, aligned=True, flips=None
) -> list[tuple[int, list[NDArray[np.float64]]]]:
    """For every RoI its batch index and its three matrices; ``shape`` is the volume's (D, H, W)."""
    sizes, scales, ratios = as_triple(output_size), as_triple(spatial_scale), as_triple(sampling_ratio)
    rows = _rows(boxes)
    mirrored = [[False] * 3] * len(rows) if flips is None else flips.cpu().tolist()
    return [
        (
            int(row[0]),
            [
                axis_matrix(
                    row[1 + a], row[4 + a], shape[a], sizes[a], scales[a], ratios[a], aligned, flip[a]
                )
                for a in range(3)
            ],
        )
        for row, flip in zip(rows, mirrored, strict=True)
    ]


def _contract(volume: NDArray, along_d: NDArray, along_h: NDArray, along_w: NDArray) -> NDArray:
    """[C, D, H, W] by three matrices, one an axis."""
    volume = np.einsum("rw,cdhw->cdhr", along_w, volume, optimize=True)
    volume = np.einsum("qh,cdhr->cdqr", along_h, volume, optimize=True)
    return np.einsum("pd,cdqr->cpqr", along_d, volume, optimize=True)


def roi_align3d(input: Tensor, boxes, output_size, *args, **kwargs) -> Tensor:
    """A x: float64 Tensor[K, C, d, h, w] on the CPU; arguments as the op's."""
    volumes = input.detach().cpu().double().numpy()
    rois = roi_matrices(input.shape[2:], boxes, output_size, *args, **kwargs)
    out = np.zeros((len(rois), input.shape[1], *as_triple(output_size)))
    for k, (n, matrices) in enumerate(rois):
        out[k] = _contract(volumes[n], *matrices)
    return torch.from_numpy(out)


def roi_align3d_adjoint(gradient: Tensor, input_shape, boxes, output_size, *args, **kwargs) -> Tensor:
    """A^T g: the gradient with respect to the input, float64 Tensor[N, C, D, H, W] on the CPU."""
    gradients = gradient.detach().cpu().double().numpy()
    out = np.zeros(tuple(input_shape))
    rois = roi_matrices(input_shape[2:], boxes, output_size, *args, **kwargs)
    for k, (n, matrices) in enumerate(rois):
        out[n] += _contract(gradients[k], *(matrix.T for matrix in matrices))
    return torch.from_numpy(out)


def _voxel_vectors(features: Tensor) -> NDArray[np.float64]:
    """[N, C, *spatial] as [N, *spatial, C]."""
    return np.moveaxis(features.detach().cpu().double().numpy(), 1, -1)


def _unit_vectors(vectors: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Directions, and norms as m * 2**e: exact powers of two are taken out, so that no square overflows."""
    exponents = np.frexp(np.abs(vectors).max(axis=-1, initial=0.0))[1]
    vectors = np.ldexp(vectors, -exponents[..., None])
    norms = np.sqrt((vectors**2).sum(axis=-1))
    return vectors / np.where(norms == 0, 1.0, norms)[..., None], norms, exponents


def _cosines(prediction: Tensor, target: Tensor, eps: float):
    p, p_norm, p_exponent = _unit_vectors(_voxel_vectors(prediction))
    z, z_norm, z_exponent = _unit_vectors(_voxel_vectors(target))
    dead = np.zeros(p_norm.shape, dtype=bool)
    for norm, exponent in ((p_norm, p_exponent), (z_norm, z_exponent)):
        dead |= (norm == 0) | (np.ldexp(norm, exponent) < eps)
    cosines = np.where(dead, 0.0, np.clip((p * z).sum(axis=-1), -1.0, 1.0))
    return p, z, cosines, dead, (p_norm, p_exponent), (z_norm, z_exponent)


def _weights(weight: Tensor | None, shape: tuple[int, ...]) -> NDArray[np.float64]:
    return np.ones(shape) if weight is None else weight.detach().cpu().double().numpy()


def voxel_cosine_loss(
    prediction: Tensor, target: Tensor, weight: Tensor | None = None, reduction="mean", eps=1e-8
) -> Tensor:
    """Float64 loss on the CPU: a scalar, or Tensor[N, *spatial] for "none"."""
    cosines = _cosines(prediction, target, eps)[2]
    weights = _weights(weight, cosines.shape)
    losses = weights * (2.0 - 2.0 * cosines)
    if reduction == "none":
        return torch.from_numpy(losses)
    total = weights.sum() if reduction == "mean" else 1.0
    return torch.tensor(losses.sum() / total if total != 0 else 0.0, dtype=torch.float64)


def voxel_cosine_loss_gradients(
    prediction: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction="mean",
    eps=1e-8,
    upstream: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to prediction and target, float64 on the CPU.

    d(2 - 2 cos)/dp = -2 (z^ - cos p^) / |p|, and the same with p and z exchanged; 0 in dead voxels.
    """
    p, z, cosines, dead, p_norm, z_norm = _cosines(prediction, target, eps)
    factor = _weights(weight, cosines.shape)
    if reduction == "mean":
        factor = factor / factor.sum() if factor.sum() != 0 else np.zeros_like(factor)
    factor = factor * (upstream.cpu().double().numpy() if isinstance(upstream, Tensor) else upstream)

    def gradient(own, other, norm, exponent):
        length = np.where(norm == 0, 1.0, norm)
        slope = -2.0 * (other - cosines[..., None] * own) * (factor / length)[..., None]
        slope = np.where(dead[..., None], 0.0, np.ldexp(slope, -exponent[..., None]))
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(slope, -1, 1)))

    return gradient(p, z, *p_norm), gradient(z, p, *z_norm)


def norms(features: Tensor) -> Tensor:
    """|p| per voxel, float64 Tensor[N, *spatial]."""
    _, norm, exponent = _unit_vectors(_voxel_vectors(features))
    return torch.from_numpy(np.ldexp(norm, exponent))
