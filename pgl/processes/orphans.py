"""No process of ours outlives the one that started it, not even where that is killed without a word."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from contextlib import suppress

_PR_SET_PDEATHSIG = 1  # sys/prctl.h


def end_with(parent: int) -> None:
    """Let this process be killed when ``parent`` ends, or end at once if it already has. Linux alone can.

    Args:
        parent: number of the process that started this one.
    """
    if not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def end_with_the_trainer(worker: int = 0) -> None:
    """For the start of a data loader's process. PyTorch's own watch over the parent takes whoever is the
    parent when it begins; where that is no longer the trainer, the process would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        end_with(parent.pid)
