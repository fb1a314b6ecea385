"""Importing pgl_ops: only torch and numpy are needed, and a missing library says how to build it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pgl_ops

PACKAGE = Path(pgl_ops.__file__).parent
# An editable installation would find the library of the project's folder for the copy of the package, too.
ONLY_FOLDERS = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in f.__module__]; "


def python(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=200
    )


def test_a_missing_library_is_told_at_import_with_the_way_to_build_it(tmp_path):
    sources = shutil.ignore_patterns("*.so", "*.pyd", "*.dylib", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "pgl_ops", ignore=sources)
    done = python("-c", ONLY_FOLDERS + "import pgl_ops", folder=tmp_path)
    last_line = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0
    assert "ImportError: pgl_ops: the native library is missing" in last_line
    assert "pip install" in last_line


def test_import_needs_none_of_the_training_packages(tmp_path):
    others = (
        "pgl torchvision SimpleITK blosc2 monai lightning_fabric jsonargparse rich matplotlib tensorboard"
    )
    code = (
        ONLY_FOLDERS + f"import pgl_ops; print([name for name in '{others}'.split() if name in sys.modules])"
    )
    shutil.copytree(PACKAGE, tmp_path / "pgl_ops", ignore=shutil.ignore_patterns("__pycache__"))
    done = python("-c", code, folder=tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


def test_python_m_prints_a_report_to_paste_into_a_bug_report():
    done = python("-m", "pgl_ops", folder=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    for fact in ("pgl_ops", "torch", "compiler", "cuda", "threading", "cpu"):
        assert any(line.startswith(fact) for line in done.stdout.splitlines()), fact
    assert pgl_ops.__version__ in done.stdout
    assert "ok (differs from the reference by" in done.stdout
    assert "FAILED" not in done.stdout


@pytest.mark.parametrize("key", ["version", "compiler", "cuda", "cuda_architectures", "openmp"])
def test_build_info_tells_how_the_library_was_built(key):
    assert key in pgl_ops.build_info()
