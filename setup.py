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
        import torch

        # One build folder for each interpreter and torch, kept between builds so that they are incremental.
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{torch.__version__}"
        self.libraries_folder = build / "out"
        definitions = {
            "CMAKE_BUILD_TYPE": os.environ.get("PGL_OPS_BUILD_TYPE", "Release"),
            "PGL_OPS_OUTPUT": str(self.libraries_folder),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            # Said every time: the kept build folder would remember what an earlier build was told.
            "PGL_OPS_WARNINGS_AS_ERRORS": os.environ.get("PGL_OPS_WARNINGS_AS_ERRORS", "OFF"),
            "PGL_OPS_CUDA_ARCHS": os.environ.get("PGL_OPS_CUDA_ARCHS", "80;90").replace(",", ";"),
        }
        # The environment's own cmake and ninja, whether or not it is activated.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        environment = {**os.environ, "PATH": path}
        cmake = shutil.which("cmake", path=path) or "cmake"
        definitions["CMAKE_MAKE_PROGRAM"] = shutil.which("ninja", path=path) or "ninja"
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        subprocess.run(
            [*configure, *(f"-D{key}={value}" for key, value in definitions.items())],
            env=environment,
            check=True,
        )
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], env=environment, check=True)
        self._place_libraries(Path(self.get_ext_fullpath(ext.name)).resolve().parent)

    def copy_extensions_to_source(self) -> None:
        """In-place and editable builds: setuptools knows of _C, but not of the library that it loads."""
        self._place_libraries(ROOT / "pgl_ops")

    def _place_libraries(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for library in self.libraries_folder.glob("*.so"):
            # Copied beside and renamed: a process that has the old library loaded keeps its file.
            temporary = folder / f".{library.name}.new"
            shutil.copy2(library, temporary)
            os.replace(temporary, folder / library.name)


setup(ext_modules=[Extension("pgl_ops._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
