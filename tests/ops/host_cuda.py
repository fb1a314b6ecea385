"""Builds and loads the CUDA sources compiled for the host (csrc/host_cuda). As a program it only builds."""

from __future__ import annotations

import fcntl
import functools
import os
import subprocess
import sys
from pathlib import Path

import torch

from pgl_ops import aligned_cosine_loss3d, roi_align3d, voxel_cosine_loss  # noqa: F401  (registers pgl_ops)

NAMESPACE = "pgl_ops_host_cuda"
ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / f"host_cuda-torch{torch.__version__}"


def build(folder: Path, sanitize: bool = False) -> Path:
    """Compiles what has changed and returns the library."""
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DPGL_OPS_HOST_CUDA=ON"]
    configure += [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DPGL_OPS_SANITIZE={'ON' if sanitize else 'OFF'}",
        f"-DPGL_OPS_WARNINGS_AS_ERRORS={os.environ.get('PGL_OPS_WARNINGS_AS_ERRORS', 'OFF')}",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    # The environment's own cmake and ninja, whether or not it is activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    with open(folder / ".lock", "w") as lock:  # tests may run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", str(folder)]):
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return folder / "libpgl_ops_host_cuda.so"


@functools.cache
def load() -> None:
    """Registers the kernels for CPU tensors under ``torch.ops.pgl_ops_host_cuda``; once a process."""
    torch.ops.load_library(os.environ.get("PGL_OPS_HOST_CUDA_LIBRARY") or str(build(BUILD)))
    for module in ("roi_align3d", "voxel_cosine_loss", "aligned_cosine_loss3d"):
        sys.modules[f"pgl_ops.{module}"].register(NAMESPACE)


if __name__ == "__main__":
    build(BUILD)
