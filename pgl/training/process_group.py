"""What connects the processes of a run, taken down while Python still runs."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed


class AgreedStop(KeyboardInterrupt):
    """A stop that all processes of the run have agreed upon, so that none waits for another."""


@contextmanager
def ends_with_the_run() -> Iterator[None]:
    """Take the process group down that is made within, if all goes well or all processes agreed to stop.

    Left to the end of the interpreter, gloo's threads may drop tensors that belong to Python when there is no
    Python any more, and the process of a run that went well ends in ``abort`` (pytorch/pytorch#190489). After
    an error the others may be waiting for this process, and taking down would wait for them: then it is left
    to the launcher.
    """
    if not distributed.is_available() or distributed.is_initialized():
        yield
        return
    try:
        yield
    except AgreedStop as stop:
        # The frames that it came through hold the networks, and these the group.
        traceback.clear_frames(stop.__traceback__)
        _take_down()
        raise
    _take_down()


def _take_down() -> None:
    if distributed.is_initialized():
        # Who still holds the group would keep its threads alive: networks, by references in a circle.
        gc.collect()
        distributed.destroy_process_group()
