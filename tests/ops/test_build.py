"""The library under test is the one that these sources make."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pgl_ops
from pgl_ops.__main__ import report


def test_the_library_has_the_version_of_the_distribution() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.*)"$', project, re.M).group(1)
    assert pgl_ops.build_info()["version"] == version == pgl_ops.__version__


def test_cuda_kernels_are_built_wherever_nvcc_is() -> None:
    assert (pgl_ops.build_info()["cuda"] is not None) == (shutil.which("nvcc") is not None)


def test_the_report_says_that_the_cpu_kernels_give_the_right_result() -> None:
    text, right = report()
    assert right and "ok (differs from the reference by" in text
    assert "WRONG" not in text and "FAILED" not in text
