"""Whole comparisons of an op, or of its reference twin, with the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.ops import oracle
from tests.ops.closeness import ROUNDINGS_OF_A_SUM, assert_rounded


def on(device, *values):
    """Tensors and lists of tensors on ``device``; anything else as it is."""
    moved = [
        v.to(device) if isinstance(v, Tensor) else [b.to(device) for b in v] if isinstance(v, list) else v
        for v in values
    ]
    return moved[0] if len(moved) == 1 else moved


def moved_keeping_strides(values: Tensor, device) -> Tensor:
    """The tensor on ``device``, its gaps and the order of its axes kept (``Tensor.to`` drops gaps)."""
    if values.device == torch.device(device) or values.numel() == 0:
        return values.to(device)
    storage = torch.empty(values.untyped_storage().nbytes(), dtype=torch.uint8, device=device)
    storage.copy_(torch.empty(0, dtype=torch.uint8).set_(values.untyped_storage()))
    moved = torch.empty(0, dtype=values.dtype, device=device)
    return moved.set_(storage.untyped_storage(), values.storage_offset(), values.shape, values.stride())


def assert_forward_exact(
    roi_align3d: Callable[..., Tensor],
    device,
    input: Tensor,
    boxes,
    output_size,
    what: object = "",
    flips: Tensor | None = None,
    roundings: float = ROUNDINGS_OF_A_SUM,
    **options,
) -> Tensor:
    """The op's output equals the oracle's; returns it."""
    out = roi_align3d(
        moved_keeping_strides(input, device),
        on(device, boxes),
        output_size,
        flips=on(device, flips),
        **options,
    )
    assert out.dtype == (input.dtype if input.dtype.is_floating_point else torch.float32), what
    assert out.device.type == torch.device(device).type, what
    exact = oracle.roi_align3d(input, boxes, output_size, flips=flips, **options)
    magnitude = oracle.roi_align3d(input.double().abs(), boxes, output_size, flips=flips, **options)
    assert_rounded(out, exact, magnitude, what, roundings)
    return out


def assert_gradient_exact(
    roi_align3d: Callable[..., Tensor],
    device,
    input: Tensor,
    boxes,
    output_size,
    gradient: Tensor,
    what: object = "",
    flips: Tensor | None = None,
    roundings: float = ROUNDINGS_OF_A_SUM,
    **options,
) -> Tensor:
    """The op's gradient with respect to ``input`` equals the oracle's; returns it."""
    leaf = moved_keeping_strides(input.detach(), device).requires_grad_()
    out = roi_align3d(leaf, on(device, boxes), output_size, flips=on(device, flips), **options)
    (got,) = torch.autograd.grad(out, leaf, moved_keeping_strides(gradient, device))
    assert got.dtype == input.dtype, what
    exact = oracle.roi_align3d_adjoint(gradient, input.shape, boxes, output_size, flips=flips, **options)
    magnitude = oracle.roi_align3d_adjoint(
        gradient.double().abs(), input.shape, boxes, output_size, flips=flips, **options
    )
    assert_rounded(got, exact, magnitude, what, roundings)
    return got
