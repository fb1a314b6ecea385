"""What holds for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """A test may set torch's number of threads: the next one finds what was there before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
