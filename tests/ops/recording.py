"""The calls that reach the native ops underneath the public functions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pgl_ops
from tests.ops.cases import laid_out, random_boxes, random_flips, random_volume
from tests.ops.checks import on

OPS = (
    "roi_align3d",
    "roi_align3d_backward",
    "voxel_cosine_loss",
    "voxel_cosine_loss_backward",
    "aligned_cosine_loss3d",
    "aligned_cosine_loss3d_backward",
)


@dataclass
class Call:
    """One call of a native op; ``arguments`` by the names of its schema."""

    op: torch._ops.OpOverload
    arguments: dict

    @property
    def name(self) -> str:
        return self.op._opname

    def run(self, **changes):
        """Calls the op again, some arguments changed."""
        return self.op(*{**self.arguments, **changes}.values())


class RecordedCalls(TorchDispatchMode):
    """Collects the calls of a namespace's ops, below autograd."""

    def __init__(self, namespace: str) -> None:
        super().__init__()
        self.namespace = namespace
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == self.namespace:
            names = [argument.name for argument in func._schema.arguments]
            arguments = {**dict(zip(names, args, strict=False)), **kwargs}
            copies = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
            self.calls.append(Call(func, copies))
        return func(*args, **kwargs)

    @property
    def names(self) -> list[str]:
        return [call.name for call in self.calls]


SHAPE = (3, 4, 5)


def example(backend, layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Small good arguments of all three ops: three boxes in two samples."""
    return {
        "features": on(backend.device, laid_out(random_volume((2, 3, *SHAPE), dtype, seed=1), layout)),
        "prediction": on(backend.device, laid_out(random_volume((3, 3, 2, 1, 2), dtype, seed=2), layout)),
        "target": on(backend.device, laid_out(random_volume((3, 3, 2, 1, 2), dtype, seed=3), layout)),
        "boxes": on(backend.device, random_boxes(3, 2, SHAPE)),
        "flips": on(backend.device, random_flips(3)),
        "weight": on(backend.device, torch.rand(3, 2, 1, 2)),
    }


def recorded(backend, layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """One good call of every native op, by name, as the public functions make them."""
    case = example(backend, layout, dtype)
    features, prediction = case["features"].requires_grad_(), case["prediction"].requires_grad_()
    boxes, flips, weight = case["boxes"], case["flips"], case["weight"]
    with RecordedCalls(backend.namespace) as log:
        pgl_ops.roi_align3d(features, boxes, (2, 1, 2), 0.9, -1, True, flips).sum().backward()
        pgl_ops.voxel_cosine_loss(prediction, case["target"], weight).backward()
        alignment = 0.9, -1, True, flips
        pgl_ops.aligned_cosine_loss3d(prediction, features.detach(), boxes, *alignment, weight).backward()
    return {call.name: call for call in log.calls}
