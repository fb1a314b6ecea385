"""Batch normalisation over the samples of all processes, so that a run does not depend on their number.

On GPUs this is torch's SyncBatchNorm, which does not run on CPU tensors. For those the same is written here
with all-reduces that any backend has, gloo too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp, all_reduce, get_world_size


def over_all_processes(module: Any, processes: int, device: torch.device) -> Any:
    """The module with each batch normalisation in it made one over all processes; in place where it can be.

    Args:
        module: any module; its parameters and the names of its state stay as they are.
        processes: how many train together; with one nothing changes.
        device: of the inputs.
    """
    if processes == 1:
        return module
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for child in module.modules():
        if type(child) is nn.BatchNorm3d:
            child.__class__ = AllProcessesBatchNorm
    return module


class AllProcessesBatchNorm(nn.BatchNorm3d):
    """``nn.BatchNorm3d`` whose batch, in training, is that of all processes. Each must bring as many values.

    In evaluation it is ``nn.BatchNorm3d``: one process may then run alone.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Tensor[N, C, D, H, W], normalised; the processes wait for each other."""
        if not self.training:
            return super().forward(input)
        mean, variance = self._statistics(input)
        if self.track_running_stats:
            self._note(mean, variance, input)
        normalised = (input - mean) * torch.rsqrt(variance + self.eps)
        if self.affine:
            normalised = normalised * _per_channel(self.weight) + _per_channel(self.bias)
        return normalised.to(input.dtype)

    def _statistics(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each channel, float32 at least, shaped to broadcast."""
        axes = (0, 2, 3, 4)
        wide = input if input.dtype == torch.float64 else input.float()
        # The deviations in a second pass: a difference of two large sums would lose the small variances.
        mean = mean_over_processes(wide.mean(axes, keepdim=True))
        return mean, mean_over_processes((wide - mean).square().mean(axes, keepdim=True))

    @torch.no_grad()
    def _note(self, mean: Tensor, variance: Tensor, input: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        count = input.numel() // input.shape[1] * get_world_size()
        self.running_mean.lerp_(mean.flatten().to(self.running_mean.dtype), share)
        unbiased = variance.flatten() * (count / max(count - 1, 1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes, with its gradient; they wait for each other."""
    return _MeanOverProcesses.apply(value)  # type: ignore[no-any-return]


class _MeanOverProcesses(torch.autograd.Function):
    """The mean over processes. The loss is the mean of the processes' own losses, whose gradients DDP
    averages: so what arrives here from all of them is averaged in the same way."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return _averaged(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _averaged(gradient)


def _averaged(value: Tensor) -> Tensor:
    total = value.contiguous().clone()
    all_reduce(total, ReduceOp.SUM)
    return total / get_world_size()


def _per_channel(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
