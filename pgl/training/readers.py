"""The processes that read for a training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from pgl.processes.safe_path import safe_path
from pgl.processes.worker_signals import shielded_children
from pgl.processes.workers import usable_cores


@contextmanager
def starting_readers() -> Iterator[None]:
    """Around the making of a loader and of its iterator, which starts its processes."""
    with shielded_children(), safe_path(), warnings.catch_warnings():
        # Said once, and shorter, by too_many_readers.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        yield


def too_many_readers(workers: int) -> str | None:
    """A line on more reading processes of one training process than it may use cores; None otherwise.

    Args:
        workers: ``train.workers``.
    """
    cores = usable_cores()
    if workers <= cores:
        return None
    return (
        f"note: train.workers is {workers}, but this process may use {cores} core{'s' if cores > 1 else ''}: "
        f"no more than {cores} read at once; lower train.workers"
    )
