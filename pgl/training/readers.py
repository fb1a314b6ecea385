"""The processes that read for a training."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from pgl.processes.safe_path import safe_path
from pgl.processes.worker_signals import shielded_children
from pgl.processes.workers import usable_cores


@contextmanager
def starting_readers() -> Iterator[None]:
    """Around the making of a loader and of its iterator, which starts its processes."""
    with shielded_children(), safe_path(), _no_main_module(), warnings.catch_warnings():
        # Said once, and shorter, by too_many_readers.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        yield


@contextmanager
def _no_main_module() -> Iterator[None]:
    """Processes of multiprocessing started inside do not run the main script, which they need nothing of.

    A script without ``if __name__ == "__main__"`` would train again in each; and one that fails before it has
    read what it is sent leaves its parent waiting for ever.
    """
    main = sys.modules["__main__"]
    missing = object()
    before = {name: main.__dict__.pop(name, missing) for name in ("__spec__", "__file__")}
    main.__spec__ = None
    try:
        yield
    finally:
        for name, value in before.items():
            if value is missing:
                main.__dict__.pop(name, None)
            else:
                main.__dict__[name] = value


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
