"""PGL: local self-supervised pretraining of 3D networks on CT (arXiv 2011.12640)."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("pgl-ops")
except PackageNotFoundError:
    __version__ = "0+source"

__all__ = ["__version__", "load_encoder"]


def __getattr__(name: str) -> Any:
    # Late, so that `import pgl` stays quick and needs none of the training extras.
    if name == "load_encoder":
        from pgl.export import load_encoder

        return load_encoder
    raise AttributeError(f"module 'pgl' has no attribute {name!r}")
