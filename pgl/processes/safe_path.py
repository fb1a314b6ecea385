"""Our other processes import nothing from the working folder, where a user may have a ``numbers.py``.

Python looks there first whenever it is started with ``-m`` or ``-c``, as most of our processes are. From 3.11
on the environment can forbid it, also to processes that those start; 3.10 takes no notice.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_NAME = "PYTHONSAFEPATH"
# What forbids it, in the environment of a process.
FORBIDDEN = {_NAME: "1"}


def environment() -> dict[str, str]:
    """What to add to the environment of ``python -m pgl``: nothing where that finds pgl in the working folder
    alone."""
    return {} if _is_here() else FORBIDDEN


@contextmanager
def safe_path() -> Iterator[None]:
    """For processes of multiprocessing started inside, which are told where this one looks for modules."""
    before = os.environ.get(_NAME)
    os.environ.update(FORBIDDEN)
    try:
        yield
    finally:
        del os.environ[_NAME]
        if before is not None:
            os.environ[_NAME] = before


def _is_here() -> bool:
    source = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
    try:
        return os.path.samefile(source, os.curdir)
    except OSError:
        return False
