"""Signals to the whole process group, such as Ctrl-C, are for the training process alone.

A reading process that died of one would take the step in progress, and so ``last.pt``, with it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

from pgl.processes.orphans import end_with_the_trainer

# What asks a run to stop. SLURM sends SIGUSR1 some time before the end (`sbatch --signal=USR1@120`); Windows
# has none.
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


@contextmanager
def handled_by(
    handler: Callable[[int, FrameType | None], None], numbers: Sequence[signal.Signals] = STOPPING
) -> Iterator[None]:
    """Give these signals to ``handler`` for a while; outside the main thread, which alone may, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def shielded_children() -> Iterator[None]:
    """Processes started inside begin with the signals of a stop blocked; what comes meanwhile is not lost."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set(STOPPING))
    try:
        # multiprocessing's own helper process ignores the first two, and would die of the third; its start
        # unblocks the first two here.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, set(STOPPING))
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def survive_one_sigterm(worker: int) -> None:
    """For the start of a reading process: the second SIGTERM ends it, other signals of a stop are ignored; it
    ends with its parent.

    The first is the one sent to the whole group; its parent must still be able to end it.
    """

    end_with_the_trainer()

    def survive(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    for other in STOPPING:
        signal.signal(other, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, survive)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, set(STOPPING))
