"""``python -m benchmarks.ptxas_report``: registers, spills and shared memory of every hot CUDA kernel.

Compiles the .cu files with the flags of CMakeLists.txt and ``-Xptxas -v`` and prints a markdown table; needs
nvcc and c++filt, but no GPU. With ``--check`` the exit status is 1 if a kernel of the table spills.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("roi_align3d.cu", "voxel_cosine_loss.cu", "aligned_cosine_loss3d.cu")
HOT = ("forward_kernel", "backward_kernel", "backward_many_kernel", "cosine_", "aligned_")
# As in CMakeLists.txt.
FLAGS = (
    "-O3", "-DNDEBUG", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000", "--extended-lambda",
    "--expt-relaxed-constexpr", "-Werror=all-warnings",
    "-Xcompiler", "-Wall,-fvisibility=hidden,-ffp-contract=off,-fPIC",
)  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel; all sizes in bytes, a thread's or a block's."""

    arch: str
    name: str
    registers: int
    spills: int  # stores and loads
    shared: int


def compile_kernels(source: str, arch: str) -> list[Kernel]:
    """Compile one file for ``sm_<arch>`` and read ptxas' report.

    Raises:
        RuntimeError: the compilation failed, or its report holds no kernel.
    """
    include = Path(torch.__file__).parent / "include"
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *FLAGS, "-isystem", str(include), "-Xptxas", "-v"]
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        command += ["-c", str(ROOT / "csrc" / source), "-o", f"{folder}/kernels.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    kernels = parse(done.stdout + done.stderr, arch)
    if not kernels:
        raise RuntimeError(f"ptxas reported no kernel of {source} for sm_{arch}")
    return kernels


def parse(report: str, arch: str) -> list[Kernel]:
    """The kernels in what ``-Xptxas -v`` wrote."""
    found: list[tuple[str, int, int, int]] = []
    name, spills = "", 0
    for line in report.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)'", line):
            name = entry[1]
        elif frame := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills = int(frame[1]) + int(frame[2])
        elif used := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found.append((name, int(used[1]), spills, int(shared[1]) if shared else 0))
    names = subprocess.run(
        ["c++filt"], input="\n".join(row[0] for row in found), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [Kernel(arch, _short(full), *row[1:]) for full, row in zip(names, found, strict=True)]


def _short(name: str) -> str:
    """Without namespaces, return type, parameters and casts."""
    name = re.sub(r"\(anonymous namespace\)::|pgl_ops::|\(int\)|^void ", "", name)
    name = name.replace("(bool)1", "true").replace("(bool)0", "false")
    return name.split("(", 1)[0]


def table(kernels: list[Kernel]) -> str:
    """A markdown table, a row for each kernel and a group of columns for each architecture."""
    archs = sorted({kernel.arch for kernel in kernels})
    rows = ["| kernel |" + "".join(f" sm_{a} registers | spills | shared |" for a in archs)]
    rows.append("|---|" + "---|---|---|" * len(archs))
    by_name: dict[str, dict[str, Kernel]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, {})[kernel.arch] = kernel
    for name, of_arch in sorted(by_name.items()):
        cells = [of_arch[a] for a in archs if a in of_arch]
        rows.append(f"| `{name}` |" + "".join(f" {k.registers} | {k.spills} | {k.shared} |" for k in cells))
    return "\n".join(rows)


def main() -> int:
    """Compile, print the table, and with ``--check`` judge it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ptxas_report", description=__doc__)
    parser.add_argument("--archs", nargs="+", default=["80", "90"])
    parser.add_argument("--all", action="store_true", help="all kernels and types, not only the hot ones")
    parser.add_argument("--check", action="store_true", help="fail where a kernel of the table spills")
    options = parser.parse_args()
    kernels = [k for arch in options.archs for source in SOURCES for k in compile_kernels(source, arch)]
    if not options.all:
        kernels = [
            k for k in kernels if k.name.startswith(HOT) and re.search(r"<(float|BFloat16|short)", k.name)
        ]
    print(table(kernels))
    return 1 if options.check and any(k.spills for k in kernels) else 0


if __name__ == "__main__":
    sys.exit(main())
