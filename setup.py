"""Builds the compiled extension by calling CMake; everything else is declared in pyproject.toml.

The extension needs no torch to build. Without a C++ compiler the package is built without it and says so;
with one, a build that fails is an error. ATTN_SAMPLER_CUDA=0|1 switches the CUDA part off or insists on it
(default: built where nvcc is found), CUDAARCHS names other GPU architectures than all that are served.
ATTN_SAMPLER_WGMMA=ON takes the kernels for Hopper, which have not run on a GPU yet; ATTN_SAMPLER_CHECKS=ON
builds the programs beside it that check the CUDA part.
"""

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
    """Configures and builds CMakeLists.txt, with the module placed where setuptools wants it."""

    def run(self) -> None:
        compilers = (os.environ.get("CXX"), "c++", "g++", "clang++")
        if not any(shutil.which(name) for name in compilers if name):
            print(
                "attn_sampler: no C++ compiler was found (CXX, c++, g++, clang++): building without the "
                "compiled extension; the reference and Triton backends remain",
                file=sys.stderr,
            )
            self.extensions = []
        super().run()

    def build_extension(self, extension: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        # Not setuptools' own folder: an editable installation throws that away, and this one is incremental.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        configure = [
            *("cmake", str(ROOT), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
            "-DATTN_SAMPLER_PYTHON=ON",
            f"-DATTN_SAMPLER_CUDA={os.environ.get('ATTN_SAMPLER_CUDA', 'auto')}",
            f"-DATTN_SAMPLER_WGMMA={os.environ.get('ATTN_SAMPLER_WGMMA', 'OFF')}",
            f"-DATTN_SAMPLER_CHECKS={os.environ.get('ATTN_SAMPLER_CHECKS', 'OFF')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            # Named, because an earlier build's may lie in an isolated environment that is gone.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
        ]
        subprocess.run(configure, cwd=build, check=True)
        # One source's architectures side by side: the longest to compile is the last to end.
        environment = {"NVCC_APPEND_FLAGS": "--threads=4", **os.environ}
        subprocess.run(["cmake", "--build", "."], cwd=build, check=True, env=environment)
        (built,) = build.glob("_C.*.so")
        shutil.copy(built, target)


setup(
    packages=[
        "attn_sampler",
        *(f"attn_sampler.{name}" for name in ("adapters", "backends", "bundled", "kernels", "published")),
    ],
    package_dir={"attn_sampler.kernels": "kernels/triton"},
    package_data={
        "attn_sampler": ["py.typed", "viewer.html"],
        "attn_sampler.bundled": ["*.safetensors", "*.md", "*.txt"],
    },
    ext_modules=[Extension("attn_sampler._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
