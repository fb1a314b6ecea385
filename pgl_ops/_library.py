"""Loads the native library and says which of its op namespaces the Python functions call."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

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


_ops: defaultdict[str, SimpleNamespace] = defaultdict(SimpleNamespace)


def ops(namespace: str | None = None) -> SimpleNamespace:
    """What calls each op of a namespace, by default of the kernels in use, the shortest way.

    As in :mod:`torch.ops`, but all arguments by position. Each op's file adds its own.
    """
    return _ops[namespace or NAMESPACE]


def build_info() -> dict:
    """How the native library was built: compiler, CUDA version, architectures, threading."""
    return _C.build_info()
