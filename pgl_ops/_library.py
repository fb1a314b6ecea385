"""Loads the native library and says which of its op namespaces the Python functions call."""

from __future__ import annotations

import torch

#: The ops' namespace. The tests register the CUDA sources compiled for the host under another one and
#: point this at it, so that the same Python code runs on them.
NAMESPACE = "pgl_ops"

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"pgl_ops: the native library is missing or cannot be loaded ({error}). Build it from the project's "
        "folder with `pip install --no-build-isolation .` (or `make install`), which needs a C++17 compiler, "
        "cmake, ninja and pybind11; for CUDA kernels nvcc must be on the PATH at that time."
    ) from error


def ops() -> torch._ops._OpNamespace:
    """The namespace of :mod:`torch.ops` that holds the kernels in use."""
    return getattr(torch.ops, NAMESPACE)


def build_info() -> dict:
    """How the native library was built: compiler, CUDA version, architectures, threading."""
    return _C.build_info()
