"""The C API from a small C program, built by CMake as a C++ engine would build it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import attn_sampler

ROOT = Path(__file__).resolve().parent.parent


def _cmake(*arguments: str, cwd: Path) -> str:
    """Output of CMake's own tools, which the package "cmake" of the test extra brings."""
    program, *rest = arguments
    command = [str(Path(sys.executable).with_name(program)), *rest]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("sanitizers", ["", "address,undefined", "thread"])
def test_c_program_decodes_a_block(tmp_path: Path, sanitizers: str) -> None:
    ninja = Path(sys.executable).with_name("ninja")
    _cmake(
        *("cmake", str(ROOT), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
        *("-DATTN_SAMPLER_CUDA=0", "-DATTN_SAMPLER_WERROR=ON", f"-DATTN_SAMPLER_SANITIZE={sanitizers}"),
        # Sanitized code for every instruction set takes minutes to compile, and it is the same code.
        f"-DATTN_SAMPLER_X86={'OFF' if sanitizers else 'ON'}",
        cwd=tmp_path,
    )
    _cmake("cmake", "--build", ".", cwd=tmp_path)
    output = _cmake("ctest", "--verbose", cwd=tmp_path)
    assert "100% tests passed" in output
    assert f"attn_sampler {attn_sampler.__version__}" in output
    assert "refused: params.tau: expected a number in [0, 1], got 1.5" in output
    if not sanitizers:  # they export symbols of their own
        command = ["nm", "-D", "--defined-only", "libattn_sampler.so"]
        listing = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        names = listing.split()[2::3]
        assert names
        assert all(name.startswith("attn_sampler_") for name in names), names
