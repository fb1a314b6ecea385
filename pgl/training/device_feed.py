"""Batches on their device when they are needed: one is copied while the one before it is computed on."""

from __future__ import annotations

from collections.abc import Generator, Iterable

import torch

from pgl.training.contexts import Batch


def on_device(batches: Iterable[Batch], device: torch.device) -> Generator[Batch, None, None]:
    """The batches, in order, on ``device``.

    On a GPU a batch in pinned memory travels on a stream of its own. The next one is asked for as soon as the
    last step has been launched, long before the GPU is done with it, so that its copy runs beside the
    computation; the stream that computes waits for the copy, the CPU never does. On the CPU nothing happens.

    Args:
        batches: on the CPU.
        device: where they go.
    """
    if device.type != "cuda":
        yield from batches
        return
    copying = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(copying):
            arriving = batch.to(device)
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copying)
        for tensor in (arriving.contexts, *arriving.pairs.tensors()):
            # Their memory was taken on the other stream: it must not be given away while this one reads it.
            tensor.record_stream(computing)
        yield arriving
