"""The ops in plain PyTorch: the readable statement of what the kernels compute.

Same names, arguments and semantics as :mod:`pgl_ops`, differentiable through ordinary autograd, on any
device. They serve as documentation, as a fallback and as the baseline of the benchmarks.

RoIAlign is separable. For every RoI and axis a matrix W[P, S] holds the weight of each of the S voxels in
each of the P bins; the result is W_d, W_h and W_w applied to the volume, one axis after the other.

Two differences to the kernels, since these matrices are dense: the result is always contiguous, and a voxel
that is NaN or infinite reaches every bin of its RoI.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _arguments as arguments

# Keeps the copy of the volume that each RoI is contracted from within this many elements.
_CHUNK_ELEMENTS = 1 << 26
# Adaptive sampling of a huge box looks at this many samples a bin at a time.
_CHUNK_SAMPLES = 1 << 12
# Boxes beyond this many voxels are refused: positions would no longer be exact in float32 pipelines.
MAX_COORDINATE = 2.0**24


def roi_align3d(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float | Sequence[float] = 1.0,
    sampling_ratio: int | Sequence[int] = -1,
    aligned: bool = True,
    flips: Tensor | None = None,
) -> Tensor:
    """3D RoIAlign by dense per-axis matrices; see :func:`pgl_ops.roi_align3d`."""
    input = arguments.check_volume("input", input, arguments.VOLUME_DTYPES)
    boxes = arguments.check_boxes(arguments.boxes_in_float32(boxes), "input", input)
    flips = arguments.check_flips(flips, boxes)
    output_size = arguments.check_output_size(output_size)
    scales = arguments.check_spatial_scale(spatial_scale)
    ratios = arguments.check_sampling_ratio(sampling_ratio)
    arguments.check_bool("aligned", aligned)

    n_samples, channels = input.shape[:2]
    sum_dtype = arguments.accumulation_dtype(input.dtype)
    out_dtype = input.dtype if input.dtype.is_floating_point else torch.float32
    boxes = boxes.detach().double()
    valid = _valid_rows(boxes, n_samples, scales)
    boxes = torch.where(valid[:, None], boxes, 0.0)
    batch = boxes[:, 0].long()
    matrices = []
    for axis in range(3):
        lo, hi = boxes[:, 1 + axis], boxes[:, 4 + axis]
        matrix = axis_matrix(
            lo, hi, input.shape[2 + axis], output_size[axis], scales[axis], ratios[axis], aligned
        )
        if flips is not None:
            matrix = torch.where(flips[:, axis, None, None], matrix.flip(1), matrix)
        matrices.append(matrix.to(sum_dtype))

    if len(boxes) == 0 or n_samples == 0:
        return (input.sum() * 0).to(out_dtype).expand(len(boxes), channels, *output_size).clone()
    # Converted before indexing, so that the gradients of RoIs that share a sample are summed in it too.
    volume = input.to(sum_dtype)
    step = max(1, _CHUNK_ELEMENTS // max(1, input[0].numel()))
    parts = []
    for start in range(0, len(boxes), step):
        rows = slice(start, start + step)
        part = volume[batch[rows]]
        w_d, w_h, w_w = (matrix[rows, None, None] for matrix in matrices)
        with arguments.without_autocast(input.device):
            part = part @ w_w.mT  # [k, C, D, H, w]
            part = (w_h @ part).transpose(2, 3)  # [k, C, h, D, w]
            parts.append((w_d @ part).transpose(2, 3))  # [k, C, d, h, w]
    out = torch.cat(parts).to(out_dtype)
    return torch.where(valid[:, None, None, None, None], out, torch.nan)


def axis_matrix(
    lo: Tensor, hi: Tensor, size: int, bins: int, scale: float, ratio: int, aligned: bool
) -> Tensor:
    """The weights Tensor[K, bins, size] (float64) of one axis of K boxes ``[lo, hi]`` (Tensor[K])."""
    start = scale * lo - (0.5 if aligned else 0.0)
    length = scale * (hi - lo)
    if not aligned:
        length = length.clamp(min=1.0)
    bin_size = length / bins
    grid = torch.full_like(bin_size, ratio) if ratio > 0 else bin_size.ceil()
    matrix = lo.new_zeros((len(lo), bins, size))
    most = ratio if ratio > 0 else (int(grid.max()) if len(lo) else 0)
    bin_start = start[:, None] + torch.arange(bins, device=lo.device) * bin_size[:, None]  # [K, bins]
    for first in range(0, most, _CHUNK_SAMPLES):
        i = torch.arange(first, min(first + _CHUNK_SAMPLES, most), device=lo.device, dtype=lo.dtype)
        offset = (i + 0.5) * bin_size[:, None] / grid[:, None]  # [K, samples]
        t = bin_start[:, :, None] + offset[:, None, :]  # [K, bins, samples]
        counts = (t >= -1) & (t <= size) & (i < grid[:, None, None])
        t = torch.where(counts, t, 0.0).clamp(min=0)
        low = t.long().clamp(max=size - 1)
        fraction = torch.where(low >= size - 1, 0.0, t - low)
        share = counts / grid[:, None, None].clamp(min=1)
        matrix.scatter_add_(2, low, (1 - fraction) * share)
        matrix.scatter_add_(2, (low + 1).clamp(max=size - 1), fraction * share)
    return matrix


def voxel_cosine_loss(
    prediction: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    eps: float = 1e-8,
) -> Tensor:
    """2 − 2·cos over the channels of each voxel; see :func:`pgl_ops.voxel_cosine_loss`."""
    prediction, target = arguments.in_one_dtype("prediction", prediction, "target", target)
    if prediction.dim() < 2:
        raise ValueError(f"prediction must be a Tensor[N, C, *spatial], got {arguments.describe(prediction)}")
    if target.shape != prediction.shape:
        raise ValueError(
            f"target must have prediction's shape {list(prediction.shape)}, got {arguments.describe(target)}"
        )
    arguments.check_same_device("target", target, "prediction", prediction)
    arguments.check_reduction(reduction)
    weight = arguments.check_weight(weight, prediction)
    eps = arguments.check_eps(eps)

    sum_dtype = arguments.accumulation_dtype(prediction.dtype)
    p, p_norm = unit_and_norm(prediction.to(sum_dtype))
    z, z_norm = unit_and_norm(target.to(sum_dtype))
    threshold = max(eps, torch.finfo(sum_dtype).tiny)
    dead = ((p_norm < threshold) | (z_norm < threshold)).squeeze(1)
    cos = torch.where(dead, 0.0, (p * z).sum(1))
    cos = cos + (cos.clamp(-1, 1) - cos).detach()
    loss = 2 - 2 * cos
    if reduction == "none":
        return loss if weight is None else loss * weight
    total = loss.sum() if weight is None else (loss * weight).sum()
    if reduction == "sum":
        return total
    divisor = total.new_tensor(float(loss.numel())) if weight is None else weight.sum()
    return torch.where(divisor == 0, 0.0, total / torch.where(divisor == 0, 1.0, divisor))


def aligned_cosine_loss3d(
    prediction: Tensor,
    features: Tensor,
    boxes: Tensor | Sequence[Tensor],
    spatial_scale: float | Sequence[float] = 1.0,
    sampling_ratio: int | Sequence[int] = -1,
    aligned: bool = True,
    flips: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    eps: float = 1e-8,
) -> Tensor:
    """The loss against RoI-aligned ``features``; see :func:`pgl_ops.aligned_cosine_loss3d`."""
    prediction = arguments.check_volume("prediction", prediction, arguments.FLOAT_DTYPES)
    features = arguments.check_volume("features", features, arguments.FLOAT_DTYPES)
    prediction, features = arguments.in_one_dtype("prediction", prediction, "features", features)
    arguments.check_same_device("features", features, "prediction", prediction)
    boxes = arguments.check_boxes(arguments.boxes_in_float32(boxes), "features", features)
    arguments.check_prediction(prediction, boxes, features)
    target = roi_align3d(
        features, boxes, list(prediction.shape[2:]), spatial_scale, sampling_ratio, aligned, flips
    )
    return voxel_cosine_loss(prediction, target, weight, reduction, eps)


def unit_and_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / ‖x‖ [N, C, *spatial] and ‖x‖ [N, 1, *spatial]; 0 and 0 where x is 0.

    Entries are scaled by the largest one first, so that squares can neither overflow nor vanish.
    """
    largest = x.detach().abs().sum(1, keepdim=True)[:, :1] * 0
    if x.shape[1]:
        largest = x.detach().abs().amax(1, keepdim=True)
    largest = torch.where(largest == 0, 1.0, largest)  # NaN stays NaN
    scaled = x / largest
    square = (scaled * scaled).sum(1, keepdim=True)
    length = torch.where(square == 0, 1.0, square).sqrt()
    return scaled / length, torch.where(square == 0, 0.0, length) * largest


def _valid_rows(boxes: Tensor, n_samples: int, scales: Sequence[float]) -> Tensor:
    """Which rows of boxes Tensor[K, 7] (float64) can be sampled; raises on the CPU where one cannot."""
    batch = boxes[:, 0]
    scaled = boxes[:, 1:] * boxes.new_tensor([*scales, *scales])
    in_batch = (batch >= 0) & (batch < n_samples) & (batch == batch.floor())
    # The length overflows only where the scale is tiny.
    length = boxes[:, 4:] - boxes[:, 1:4]
    in_reach = (scaled.abs() <= MAX_COORDINATE).all(1) & (length.abs() <= 1e300).all(1)
    valid = in_batch & in_reach
    if boxes.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(valid.all()):
        row = int((~valid).nonzero()[0])
        reason = (
            f"batch index {boxes[row, 0].item():g}, expected a whole number in [0, {n_samples})"
            if not in_batch[row]
            else f"box {boxes[row, 1:].tolist()}, expected finite values within ±2^24 voxels after scaling"
        )
        raise ValueError(f"row {row} of boxes (of the whole list, if they are one) has {reason}")
    return valid
