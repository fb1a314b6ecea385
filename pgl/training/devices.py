"""What a run's settings of devices and precision come to on this machine."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from lightning_fabric.plugins.environments import TorchElasticEnvironment

from pgl.config import TrainSettings


def precision_of(precision: str, accelerator: str) -> str:
    """What ``train.precision`` stands for with that ``train.accelerator``: ``auto`` is bf16 on GPUs that have
    it, float32 elsewhere."""
    if precision != "auto":
        return precision
    gpu = accelerator != "cpu" and torch.cuda.is_available()
    return "bf16-mixed" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


def autocast_to(precision: str, device: torch.device) -> AbstractContextManager:
    """A region in which a network runs in the precision that it was trained in, on a GPU.

    A processor, which may only emulate half precisions, stays with float32.
    """
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    return nullcontext() if dtype is None or device.type == "cpu" else torch.autocast(device.type, dtype)


def slow_precision(precision: str, device: torch.device) -> str | None:
    """A line on a precision that the processor only emulates; None otherwise.

    Args:
        precision: what :func:`precision_of` gave.
        device: where the run computes.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    if device.type != "cpu" or not precision.startswith("bf16") or supported():
        return None
    return (
        "note: this processor has no arithmetic for bf16; emulated, it is far slower than train.precision "
        "32-true"
    )


def devices_of(train: TrainSettings) -> tuple[int | str, int]:
    """Devices a machine and machines, for Lightning Fabric; ``torchrun`` has counted its processes."""
    if train.devices != "auto" or not TorchElasticEnvironment.detect():
        return train.devices, train.num_nodes
    here, everywhere = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    return here, everywhere // here
