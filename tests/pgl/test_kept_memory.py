"""Freed memory is used again instead of being fetched from the kernel for every step."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Page faults of eight blocks of 64 MiB, each written to and freed before the next. Twenty come before, until
# the heap has its size.
COUNTING = """
import resource, sys
import torch
from pgl.training.kept_memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

kept = keep_freed_memory() if sys.argv[1] == "keep" else None
for turn in range(28):
    if turn == 20:
        before = faults()
    torch.ones(16 * 2**20)
print(kept, faults() - before)
"""


def counted(how: str, **environment: str) -> tuple[str, int]:
    words = [sys.executable, "-c", COUNTING, how]
    done = subprocess.run(
        words, capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


def test_memory_that_was_freed_is_not_fetched_again():
    kept, faults = counted("keep")
    if kept == "False":
        pytest.skip("the C library is not glibc")
    _, without = counted("leave")
    # 2 MiB pages at the most: 256 of them; with pages of 4 KiB it is 131,072.
    assert without >= 256
    assert faults < 64


def test_whoever_has_set_the_allocator_keeps_his_settings():
    assert counted("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
    assert counted("keep", GLIBC_TUNABLES="glibc.malloc.mmap_threshold=131072")[0] == "False"
