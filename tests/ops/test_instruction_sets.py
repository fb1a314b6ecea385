"""The CPU kernels of the instruction sets that this processor would not choose give the same results."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import pgl_ops

ROOT = Path(__file__).resolve().parents[2]
TESTS = ["values", "edges", "dtypes_layouts", "gradients", "determinism"]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="one instruction set only")
@pytest.mark.parametrize("instructions", ["baseline", "avx2"])
def test_the_op_tests_pass_with_older_instruction_sets(instructions: str) -> None:
    environment = {**os.environ, "PGL_OPS_CPU_INSTRUCTIONS": instructions, "OMP_NUM_THREADS": "1"}
    if pgl_ops.build_info()["cpu_instruction_set"] == instructions:
        pytest.skip(f"{instructions} is what this process runs, and so all op tests beside this one")
    chosen = subprocess.run(
        [sys.executable, "-c", "import pgl_ops; print(pgl_ops.build_info()['cpu_instruction_set'])"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    if chosen != instructions:
        pytest.skip(f"this processor has {chosen} only")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops",
         "-k", f"cpu and not compile and ({' or '.join(TESTS)}) and not instruction_sets"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
