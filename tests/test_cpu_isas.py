"""The contract's tests again, once for each instruction set that the CPU kernels can be pinned to.

The AMX kernels also run where the processor has no AMX: their tiles are then plain arrays, which proves the
index arithmetic, though not the unit.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cmake_build import ROOT, build, python_module

from attn_sampler import _core

TESTS = ("test_column_scores.py", "test_attention_map.py", "test_token_confidence.py", "test_decode_step.py")

pytestmark = pytest.mark.skipif(_core.UNAVAILABLE is not None, reason=str(_core.UNAVAILABLE))


def _problem(isa: str, package_root: Path) -> str:
    """Why the extension cannot run an instruction set that it is asked for; "None" where it can."""
    code = "from attn_sampler import _core; print(_core.cpu_unavailable())"
    environment = {**os.environ, "ATTN_SAMPLER_CPU_ISA": isa, "PYTHONPATH": str(package_root)}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=package_root, env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


def _run_tests(isa: str, package_root: Path, *files: str) -> None:
    command = [
        *(sys.executable, "-m", "pytest", "-q", "--backend", "cpu", "-m", "not slow and not long"),
        *("-p", "no:cacheprovider", "-o", f"pythonpath={package_root}"),
        *(str(ROOT / "tests" / name) for name in files),
    ]
    environment = {**os.environ, "ATTN_SAMPLER_CPU_ISA": isa, "PYTHONPATH": str(package_root)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@pytest.mark.parametrize("isa", ["amx", "avx512_bf16", "avx512", "avx2", "portable"])
def test_contract_on(isa: str) -> None:
    if (problem := _problem(isa, ROOT)) != "None":
        pytest.skip(problem)
    _run_tests(isa, ROOT, *TESTS)


def test_contract_on_emulated_amx(tmp_path: Path) -> None:
    if (problem := _problem("avx512_bf16", ROOT)) != "None":
        pytest.skip(f"the code around the tiles: {problem}")
    folder = tmp_path / "build"
    folder.mkdir()
    build(folder, *python_module(), "-DATTN_SAMPLER_CUDA=0", "-DATTN_SAMPLER_EMULATE_AMX=ON")
    package = tmp_path / "attn_sampler"
    shutil.copytree(ROOT / "attn_sampler", package, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    (module,) = folder.glob("_C.*.so")
    shutil.copy(module, package)
    assert _problem("amx", tmp_path) == "None"
    _run_tests("amx", tmp_path, "test_column_scores.py", "test_attention_map.py")
