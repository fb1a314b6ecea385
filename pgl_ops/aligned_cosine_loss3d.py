"""The fused op: the cosine loss against an aligned target that is never stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _library
from ._autograd import register_autograd
from .roi_align3d import is_channels_last
from .voxel_cosine_loss import (
    REDUCTION_CODES,
    differentiate_gradients,
    fake_gradient,
    fake_loss,
)


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
    """The voxel-wise cosine loss of ``prediction`` against RoI-aligned ``features``, in one pass.

    Equals ``voxel_cosine_loss(prediction, roi_align3d(features, boxes, prediction.shape[2:], …), …)``, but
    the aligned target is formed in registers, forward and again backward, and is not rounded to the features'
    dtype in between. PGL (arXiv 2011.12640): the target network's features need no gradient; if they do, it
    is computed by the two ops.

    Args:
        prediction: Tensor[K, C, d, h, w], one a box, float64/32/16 or bfloat16.
        features: Tensor[N, C, D, H, W] of the same dtype.
        boxes, spatial_scale, sampling_ratio, aligned, flips: see :func:`pgl_ops.roi_align3d`.
        weight, reduction, eps: see :func:`pgl_ops.voxel_cosine_loss`.

    Returns:
        A scalar, or Tensor[K, d, h, w] for "none"; float32, or float64 for float64.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, value or device, or (on the CPU) a box cannot be sampled.

    >>> import torch
    >>> features = torch.ones(1, 2, 4, 4, 4)
    >>> boxes = torch.tensor([[0, 0.0, 0.0, 0.0, 4.0, 4.0, 4.0]])
    >>> aligned_cosine_loss3d(torch.ones(1, 2, 2, 2, 2), features, boxes).item()
    0.0
    >>> aligned_cosine_loss3d(-torch.ones(1, 2, 2, 2, 2), features, boxes).item()
    4.0
    """
    prediction, features = arguments.in_one_dtype("prediction", prediction, "features", features)
    arguments.check_volume("prediction", prediction, arguments.FLOAT_DTYPES)
    arguments.check_volume("features", features, arguments.FLOAT_DTYPES)
    arguments.check_same_device("features", features, "prediction", prediction)
    boxes = arguments.check_boxes(arguments.boxes_in_float32(boxes), "features", features)
    arguments.check_prediction(prediction, boxes, features)
    flips = arguments.check_flips(flips, boxes)
    scales = arguments.check_spatial_scale(spatial_scale)
    ratios = arguments.check_sampling_ratio(sampling_ratio)
    arguments.check_bool("aligned", aligned)
    weight = arguments.check_weight(weight, prediction)
    code = REDUCTION_CODES[arguments.check_reduction(reduction)]
    eps = arguments.check_eps(eps)
    save = torch.is_grad_enabled() and (prediction.requires_grad or features.requires_grad)
    return _library.ops().aligned_cosine_loss3d(
        prediction, features, boxes, scales, ratios, aligned, flips, weight, code, eps, save
    )[0]


# The custom op -------------------------------------------------------------------------------------------


def _fake(
    prediction, features, boxes, spatial_scale, sampling_ratio, aligned, flips, weight, reduction, eps, save
):
    arguments.check_one_device(
        "prediction", prediction, features=features, boxes=boxes, flips=flips, weight=weight
    )
    return fake_loss(prediction, reduction, save)


def _fake_backward(
    grad,
    prediction,
    features,
    boxes,
    spatial_scale,
    sampling_ratio,
    aligned,
    flips,
    weight,
    saved,
    divisor,
    reduction,
):
    arguments.check_one_device(
        "prediction",
        prediction,
        grad=grad,
        features=features,
        boxes=boxes,
        flips=flips,
        weight=weight,
        saved=saved,
        divisor=divisor,
    )
    return fake_gradient(prediction)


def _setup_context(ctx, inputs, output):
    prediction, features, boxes, *ctx.settings, flips, weight, ctx.reduction, ctx.eps, _ = inputs
    _, saved, divisor = output
    ctx.save_for_backward(prediction, features, boxes, flips, weight, saved, divisor)
    ctx.mark_non_differentiable(saved, divisor)
    ctx.set_materialize_grads(False)


def _setup_context_backward(ctx, inputs, output):
    grad, prediction, features, boxes, *ctx.settings, flips, weight, saved, divisor, _ = inputs
    ctx.save_for_backward(grad, prediction, features, boxes, flips, weight, saved, divisor)


def register(namespace: str) -> None:
    """Registers fake tensors and autograd for the kernels in ``torch.ops.<namespace>``."""
    ops = _library.ops(namespace)

    def backward(ctx, grad, *_):
        prediction, features, boxes, flips, weight, saved, divisor = ctx.saved_tensors
        nothing = (None,) * 9
        if grad is None:
            return None, None, *nothing
        if saved.numel() == 0 and prediction.numel() > 0:
            raise RuntimeError("aligned_cosine_loss3d was called with save=False, so it has no gradient")
        need_prediction, need_features = ctx.needs_input_grad[:2]
        if not need_features:
            grad_prediction = ops.aligned_cosine_loss3d_backward(
                grad, prediction, features, boxes, *ctx.settings, flips, weight, saved, divisor, ctx.reduction
            )
            return grad_prediction, None, *nothing
        target = ops.roi_align3d(features, boxes, list(prediction.shape[2:]), *ctx.settings, flips)
        # Of the target as it is here, in the features' dtype: it was not rounded in forward.
        _, saved, divisor = ops.voxel_cosine_loss(prediction, target, weight, ctx.reduction, ctx.eps, True)
        grad_prediction, grad_target = ops.voxel_cosine_loss_backward(
            grad, prediction, target, weight, saved, divisor, ctx.reduction, need_prediction, True
        )
        grad_features = ops.roi_align3d_backward(
            grad_target, boxes, list(features.shape), *ctx.settings, flips, is_channels_last(features)
        )
        return grad_prediction if need_prediction else None, grad_features, *nothing

    def double_backward(ctx, grad_grad):
        grad, prediction, features, boxes, flips, weight, saved, divisor = ctx.saved_tensors
        target = ops.roi_align3d(features, boxes, list(prediction.shape[2:]), *ctx.settings, flips)
        grad_grad_out, grad_prediction, grad_target = differentiate_gradients(
            (grad, prediction, target, weight, saved, divisor), True, False, (grad_grad, None)
        )
        grad_features = None
        if ctx.needs_input_grad[2]:
            grad_features = ops.roi_align3d_backward(
                grad_target, boxes, list(features.shape), *ctx.settings, flips, is_channels_last(features)
            )
        return grad_grad_out, grad_prediction, grad_features, *((None,) * 9)

    name = f"{namespace}::aligned_cosine_loss3d"
    backward_name = f"{name}_backward"
    torch.library.register_fake(name, _fake)
    torch.library.register_fake(backward_name, _fake_backward)
    ops.aligned_cosine_loss3d = register_autograd(name, backward, _setup_context)
    backward_call = register_autograd(backward_name, double_backward, _setup_context_backward)
    ops.aligned_cosine_loss3d_backward = backward_call


register("pgl_ops")
