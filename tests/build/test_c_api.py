"""The C API from a small C program, built by CMake as a C++ engine would build it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from cmake_build import CPU_ISAS, build, tool

import attn_sampler


@pytest.mark.parametrize("sanitizers", ["", "address,undefined", "thread"])
def test_c_program_decodes_a_block(tmp_path: Path, sanitizers: str) -> None:
    """On each instruction set that this processor has."""
    build(
        tmp_path,
        *("-DATTN_SAMPLER_CUDA=0", "-DATTN_SAMPLER_WERROR=ON", f"-DATTN_SAMPLER_SANITIZE={sanitizers}"),
        # What threads do is the same code for every one, and compiling it sanitized takes a minute.
        f"-DATTN_SAMPLER_X86={'OFF' if sanitizers == 'thread' else 'ON'}",
    )
    ran = []
    for isa in CPU_ISAS:
        environment = {**os.environ, "ATTN_SAMPLER_CPU_ISA": isa}
        command = [tool("ctest"), "--verbose"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
        output = result.stdout + result.stderr
        if "ATTN_SAMPLER_CPU_ISA: expected one of" in output:
            continue
        assert result.returncode == 0, output
        assert "100% tests passed" in output
        assert f"attn_sampler {attn_sampler.__version__}, CPU kernels: {isa}" in output
        assert "refused: params.tau: expected a number in [0, 1], got 1.5" in output
        ran.append(isa)
    assert "portable" in ran
    if not sanitizers:  # they export symbols of their own
        command = ["nm", "-D", "--defined-only", "libattn_sampler.so"]
        listing = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        names = listing.split()[2::3]
        assert names
        assert all(name.startswith("attn_sampler_") for name in names), names
