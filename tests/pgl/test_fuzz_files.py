"""The short form of the fuzzer of the readers; `make fuzz-files` is the long one."""

from __future__ import annotations

import pytest

from tests.fuzz_files import fuzz
from tests.pgl.mutated_files import REAL


@pytest.mark.skipif(not REAL.exists(), reason="no real CT at ../shared/data")
def test_damaged_real_files_are_read_or_rejected_and_nothing_else():
    counts, faults, (most_mib, which) = fuzz(cases=84, seed=5, workers=2, timeout_s=60.0)
    assert not faults
    assert counts["read"] + counts["rejected"] == 84
    assert counts["read"] and counts["rejected"]
    assert most_mib < 700, which
