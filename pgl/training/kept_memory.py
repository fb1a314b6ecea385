"""Memory of one training step kept for the next, where the C library would give it back in between."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress

# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Have this process reuse the memory that it frees, for the rest of its life.

    Feature maps of a network on the CPU are tens of megabytes. glibc asks the kernel for each such block and
    returns it when it is freed; the kernel hands out zeroed pages again in the next layer, and up to half of
    a training step goes there (docs/pretraining.md has a figure and how to measure it). The process's
    resident memory then stays at the highest that it ever needed, and some holes more.

    Returns:
        Whether glibc was told so (another allocator put in its place does not care). Other C libraries are
        left as they are, and so is glibc where the environment already says how it shall do this
        (``GLIBC_TUNABLES``, ``MALLOC_TRIM_THRESHOLD_``, …).
    """
    if not sys.platform.startswith("linux") or _is_set_by_hand():
        return False
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        # Of the main heap: no block by mmap of its own, and none of its end ever given back.
        return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
    return False


def _is_set_by_hand() -> bool:
    names = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return "glibc.malloc." in tunables or any(name in os.environ for name in names)
