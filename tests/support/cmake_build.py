"""Building CMakeLists.txt for a test, once for all processes of a test run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]

#: What ATTN_SAMPLER_CPU_ISA may ask for, where the processor has it.
CPU_ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "portable")


def tool(name: str) -> str:
    """One of CMake's programs, which the package "cmake" (or "ninja") of the test extra brings."""
    return str(Path(sys.executable).with_name(name))


def python_module() -> tuple[str, ...]:
    """Options that build the extension module for this interpreter."""
    import pybind11

    return (
        "-DATTN_SAMPLER_PYTHON=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    )


def build(folder: Path, *options: str) -> str:
    """Configure and build in this folder; what the build printed."""
    configure = [tool("cmake"), str(ROOT), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", *options]
    output = ""
    for command in (configure, [tool("cmake"), "--build", "."]):
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        output = result.stdout + result.stderr
        assert result.returncode == 0, output[-8000:]
    return output


def build_once(factory: pytest.TempPathFactory, name: str, *options: str) -> tuple[Path, str]:
    """The folder of a build that all processes of this run share, and what the build printed."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / name
    log = base / f"{name}.log"
    with FileLock(base / f"{name}.lock"):
        if not log.exists():
            folder.mkdir(exist_ok=True)
            output = build(folder, *options)
            log.write_text(output)
    return folder, log.read_text()
