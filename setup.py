"""Drives CMake, which holds everything about the native build; metadata is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Builds libpgl_ops.so and _C into the package folder."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # One build folder for each interpreter and torch, kept between builds so that they are incremental.
        import torch

        build = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{torch.__version__}"
        definitions = {
            "CMAKE_BUILD_TYPE": os.environ.get("PGL_OPS_BUILD_TYPE", "Release"),
            "PGL_OPS_OUTPUT": str(build / "out"),
            "PGL_OPS_VERSION": self.distribution.get_version(),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        if "PGL_OPS_CUDA_ARCHS" in os.environ:
            definitions["PGL_OPS_CUDA_ARCHS"] = os.environ["PGL_OPS_CUDA_ARCHS"].replace(",", ";")
        cmake = [shutil.which("cmake") or "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        subprocess.run([*cmake, *(f"-D{key}={value}" for key, value in definitions.items())], check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run([cmake[0], "--build", str(build), "--parallel", jobs], check=True)
        output.mkdir(parents=True, exist_ok=True)
        for library in (build / "out").glob("*.so"):
            # Copied beside and renamed: a process that has the old library loaded keeps its file.
            temporary = output / f".{library.name}.new"
            shutil.copy2(library, temporary)
            os.replace(temporary, output / library.name)


setup(ext_modules=[Extension("pgl_ops._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
