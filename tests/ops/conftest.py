"""The op tests run on every set of kernels that this machine can run.

``cpu``        the CPU kernels;
``host_cuda``  the CUDA sources compiled by the host compiler, each block's threads run as fibers;
``cuda``       the CUDA kernels on a GPU (marker ``cuda``).
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from pgl_ops import _library
from tests.ops import host_cuda


@dataclass(frozen=True)
class Backend:
    """One set of kernels; ``raises_on_bad_boxes`` is False where kernels must not synchronise."""

    name: str
    device: torch.device
    namespace: str = "pgl_ops"

    @property
    def raises_on_bad_boxes(self) -> bool:
        return self.name == "cpu"


BACKENDS = {
    "cpu": Backend("cpu", torch.device("cpu")),
    "host_cuda": Backend("host_cuda", torch.device("cpu"), host_cuda.NAMESPACE),
    "cuda": Backend("cuda", torch.device("cuda")),
}


@pytest.fixture(params=["cpu", "host_cuda", pytest.param("cuda", marks=pytest.mark.cuda)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    backend = BACKENDS[request.param]
    if backend.name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if backend.name == "host_cuda":
        host_cuda.load()
    monkeypatch.setattr(_library, "NAMESPACE", backend.namespace)
    return backend
