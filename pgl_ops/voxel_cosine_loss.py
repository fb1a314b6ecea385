"""The voxel-wise cosine loss: the public function and the registrations of its custom op, top to bottom."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _library, reference
from ._autograd import register_autograd
from .roi_align3d import empty_volume, is_channels_last

REDUCTION_CODES = {"none": 0, "mean": 1, "sum": 2}


def voxel_cosine_loss(
    prediction: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    eps: float = 1e-8,
) -> Tensor:
    """2 − 2·cos(prediction, target) over the channels of every voxel, which is ‖p̂ − ẑ‖².

    The regression loss of BYOL (arXiv 2006.07733) taken voxel by voxel, as in PGL (arXiv 2011.12640).

    Args:
        prediction: Tensor[N, C, *spatial], float64/32/16 or bfloat16, with any number of spatial axes.
        target: a tensor of the same shape and dtype; if it needs no gradient, none is computed.
        weight: Tensor[N, *spatial] with the voxels' weights, none negative (not checked); receives no
            gradient.
        reduction: "none" gives weight · loss for each voxel, "sum" their sum, "mean" Σ weight·loss /
            Σ weight, which is 0 where the weights sum to 0.
        eps: a voxel where either norm is under ``eps`` is dead: cos = 0, and its gradient is exactly 0.

    Returns:
        A scalar, or Tensor[N, *spatial] for "none"; float32, or float64 for float64. Sums and norms are held
        in that dtype, cos is clamped into [−1, 1], and all reductions are bitwise repeatable.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, value or device.

    Two voxels of two channels, the same direction and opposite ones:

    >>> import torch
    >>> prediction = torch.tensor([[[1.0, 3.0], [0.0, 4.0]]])
    >>> target = torch.tensor([[[2.0, -3.0], [0.0, -4.0]]])
    >>> voxel_cosine_loss(prediction, target, reduction="none").tolist()
    [[0.0, 4.0]]
    >>> voxel_cosine_loss(prediction, target).item()
    2.0
    """
    prediction, target = arguments.in_one_dtype("prediction", prediction, "target", target)
    if prediction.dim() < 2:
        raise ValueError(f"prediction must be a Tensor[N, C, *spatial], got {arguments.describe(prediction)}")
    if target.shape != prediction.shape:
        raise ValueError(
            f"target must have prediction's shape {list(prediction.shape)}, got {arguments.describe(target)}"
        )
    arguments.check_same_device("target", target, "prediction", prediction)
    weight = arguments.check_weight(weight, prediction)
    code = REDUCTION_CODES[arguments.check_reduction(reduction)]
    eps = arguments.check_eps(eps)
    save = torch.is_grad_enabled() and (prediction.requires_grad or target.requires_grad)
    return _library.ops().voxel_cosine_loss(prediction, target, weight, code, eps, save)[0]


# The custom op -------------------------------------------------------------------------------------------


def fake_loss(prediction: Tensor, reduction: int, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, saved, divisor) as the forward ops allocate them."""
    dtype = arguments.accumulation_dtype(prediction.dtype)
    voxels = [prediction.shape[0], *prediction.shape[2:]]
    loss = prediction.new_empty(voxels if reduction == 0 else [], dtype=dtype)
    saved = prediction.new_empty([3, *voxels] if save else [0], dtype=dtype)
    return loss, saved, prediction.new_empty([], dtype=dtype)


def fake_gradient(features: Tensor) -> Tensor:
    """A gradient as the backward ops allocate it."""
    if features.dim() == 5:
        return empty_volume(features, features.shape, features.dtype, is_channels_last(features))
    return torch.empty(features.shape, dtype=features.dtype, device=features.device)


def _fake(prediction, target, weight, reduction, eps, save):
    arguments.check_one_device("prediction", prediction, target=target, weight=weight)
    return fake_loss(prediction, reduction, save)


def _fake_backward(grad, prediction, target, weight, saved, divisor, reduction, need_prediction, need_target):
    arguments.check_one_device(
        "prediction", prediction, grad=grad, target=target, weight=weight, saved=saved, divisor=divisor
    )
    nothing = prediction.new_empty([0])
    return (
        fake_gradient(prediction) if need_prediction else nothing,
        fake_gradient(target) if need_target else prediction.new_empty([0]),
    )


def _setup_context(ctx, inputs, output):
    prediction, target, weight, ctx.reduction, _, _ = inputs
    _, saved, divisor = output
    ctx.save_for_backward(prediction, target, weight, saved, divisor)
    ctx.mark_non_differentiable(saved, divisor)
    ctx.set_materialize_grads(False)


def _setup_context_backward(ctx, inputs, output):
    grad, prediction, target, weight, _, divisor, ctx.reduction, ctx.need_prediction, ctx.need_target = inputs
    ctx.save_for_backward(grad, prediction, target, weight, inputs[4], divisor)


def differentiate_gradients(
    saved_tensors: tuple[Tensor, ...], need_prediction: bool, need_target: bool, grad_grads: tuple
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradient of the backward op, to (grad, prediction, target), by differentiating its formula.

    Double backward is rare; ordinary PyTorch is fast enough for it, and gives the derivatives beyond.
    """
    grad, prediction, target, weight, saved, divisor = saved_tensors
    dtype, and_beyond = grad.dtype, torch.is_grad_enabled()

    def tracked(x: Tensor) -> Tensor:
        # A node of its own: what the three depend on, perhaps each other, is the caller's to walk through.
        x = x.to(dtype)
        return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()

    with torch.enable_grad():
        grad, p, z = (tracked(x) for x in (grad, prediction, target))
        live = (saved[1] != 0).unsqueeze(1)
        scale = grad if weight is None else grad * weight
        scale = torch.where(divisor == 0, 0.0, -2 * scale / torch.where(divisor == 0, 1.0, divisor))
        scale = scale.expand(saved.shape[1:]).unsqueeze(1)
        p_live, z_live = torch.where(live, p, 1.0), torch.where(live, z, 1.0)
        p_unit, p_norm = reference.unit_and_norm(p_live)
        z_unit, z_norm = reference.unit_and_norm(z_live)
        cos = (p_unit * z_unit).sum(1, keepdim=True)
        outputs, grads = [], []
        if need_prediction and grad_grads[0] is not None:
            outputs.append(torch.where(live, scale * (z_unit - cos * p_unit) / p_norm, 0.0))
            grads.append(grad_grads[0].to(dtype))
        if need_target and grad_grads[1] is not None:
            outputs.append(torch.where(live, scale * (p_unit - cos * z_unit) / z_norm, 0.0))
            grads.append(grad_grads[1].to(dtype))
        if not outputs:
            return None, None, None
        found = torch.autograd.grad(outputs, (grad, p, z), grads, create_graph=and_beyond)
    return found[0], found[1].to(prediction.dtype), found[2].to(target.dtype)


def register(namespace: str) -> None:
    """Registers fake tensors and autograd for the kernels in ``torch.ops.<namespace>``."""
    ops = _library.ops(namespace)

    def backward(ctx, grad, *_):
        prediction, target, weight, saved, divisor = ctx.saved_tensors
        if grad is None:
            return (None,) * 6
        need_prediction, need_target = ctx.needs_input_grad[:2]
        if saved.numel() == 0 and prediction.numel() > 0:
            raise RuntimeError("voxel_cosine_loss was called with save=False, so it has no gradient")
        grad_prediction, grad_target = ops.voxel_cosine_loss_backward(
            grad, prediction, target, weight, saved, divisor, ctx.reduction, need_prediction, need_target
        )
        return (
            grad_prediction if need_prediction else None,
            grad_target if need_target else None,
            None,
            None,
            None,
            None,
        )

    def double_backward(ctx, *grad_grads):
        found = differentiate_gradients(ctx.saved_tensors, ctx.need_prediction, ctx.need_target, grad_grads)
        return *found, None, None, None, None, None, None

    name, backward_name = f"{namespace}::voxel_cosine_loss", f"{namespace}::voxel_cosine_loss_backward"
    torch.library.register_fake(name, _fake)
    torch.library.register_fake(backward_name, _fake_backward)
    ops.voxel_cosine_loss = register_autograd(name, backward, _setup_context)
    backward_call = register_autograd(backward_name, double_backward, _setup_context_backward)
    ops.voxel_cosine_loss_backward = backward_call


register("pgl_ops")
