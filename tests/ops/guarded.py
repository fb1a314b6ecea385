"""Memory with a forbidden page before and behind it: one byte read or written too far ends the process.

Sanitizers see accesses that were compiled as such; a masked vector load is none of them. This sees all.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
_FORBIDDEN, _READ_WRITE = 0, 3


class GuardedMemory:
    """Hands out tensors that begin or end where a forbidden page does; reused after ``clear``.

    Args:
        regions: how many tensors may live at once.
        size: the most bytes of one.
    """

    def __init__(self, regions: int = 12, size: int = 1 << 23) -> None:
        self.size = (size + PAGE - 1) // PAGE * PAGE
        self._free, self._used = list(range(regions)), 0
        self._pitch = self.size + PAGE
        self._memory = mmap.mmap(-1, regions * self._pitch + PAGE)
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        if sys.platform == "linux":
            protect = ctypes.CDLL(None, use_errno=True).mprotect
            protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
            for region in range(regions + 1):
                if protect(self._start + region * self._pitch, PAGE, _FORBIDDEN) != 0:
                    raise OSError(ctypes.get_errno(), "mprotect failed")

    def clear(self) -> None:
        """All regions are free again; tensors handed out before must not be used any more."""
        self._used = 0

    def empty(self, elements: int, dtype: torch.dtype, at_end: bool) -> Tensor:
        """Tensor[elements] of bytes 0xff (NaN, for floats) that touches a forbidden page."""
        n_bytes = elements * dtype.itemsize
        if n_bytes == 0 or n_bytes > self.size or self._used == len(self._free):
            return torch.empty(n_bytes, dtype=torch.uint8).fill_(255).view(dtype)
        region = self._used
        self._used += 1
        begin = self._start + region * self._pitch + PAGE
        if at_end:
            begin += self.size - n_bytes
        buffer = (ctypes.c_char * n_bytes).from_address(begin)
        ctypes.memset(begin, 255, n_bytes)
        return torch.frombuffer(buffer, dtype=dtype)
