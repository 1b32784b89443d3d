"""The contract's tests again, once for each instruction set that the CPU kernels can be pinned to.

The AMX kernels also run where the processor has no AMX: there an emulator (amx_emulator.cpp) executes the
instructions that the compiler made, as Intel's manual describes them. That says nothing of the unit itself.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cmake_build import CPU_ISAS, ROOT, build_once, python_module

from attn_sampler import _core

CONTRACT = ROOT / "tests" / "contract"
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


def _run_tests(isa: str, package_root: Path, *arguments: str) -> str:
    """Run the contract's tests, given as pytest's arguments; what the run printed to stderr."""
    command = [
        *(sys.executable, "-m", "pytest", "-q", "--backend", "cpu", "-m", "not slow and not long"),
        *("-p", "no:cacheprovider", "-o", f"pythonpath={package_root} {ROOT}/tests/support", *arguments),
    ]
    environment = {**os.environ, "ATTN_SAMPLER_CPU_ISA": isa, "PYTHONPATH": str(package_root)}
    result = subprocess.run(command, cwd=CONTRACT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    return result.stderr


@pytest.mark.parametrize("isa", CPU_ISAS)
def test_contract_on(isa: str) -> None:
    if (problem := _problem(isa, ROOT)) != "None":
        pytest.skip(problem)
    _run_tests(isa, ROOT, *TESTS)


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build whose AMX kernels run on the emulator."""
    if _problem("amx", ROOT) == "None":
        pytest.skip("this processor has AMX: test_contract_on[amx] uses the unit itself")
    if (problem := _problem("avx512_bf16", ROOT)) != "None":
        pytest.skip(f"the code around the tiles: {problem}")
    compiler = (os.environ.get("CXX", "c++"), "-mamx-bf16", "-fsyntax-only", "-x", "c++", os.devnull)
    if subprocess.run(compiler, capture_output=True).returncode != 0:
        pytest.skip("the compiler has no AMX")
    options = ("-DATTN_SAMPLER_CUDA=0", "-DATTN_SAMPLER_EMULATE_AMX=ON", "-DATTN_SAMPLER_WERROR=ON")
    folder, _ = build_once(tmp_path_factory, "emulate_amx", *python_module(), *options)
    return folder


def test_amx_emulator(emulation: Path) -> None:
    """Instructions, addressing, arithmetic and refusals against values worked out by hand."""
    result = subprocess.run([emulation / "amx_emulator_check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"\d+ checks\n", result.stdout)


def test_contract_on_emulated_amx(emulation: Path, tmp_path: Path) -> None:
    package = tmp_path / "attn_sampler"
    shutil.copytree(ROOT / "attn_sampler", package, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    (module,) = emulation.glob("_C.*.so")
    shutil.copy(module, package)
    assert _problem("amx", tmp_path) == "None"
    # The emulator needs the signal that pytest's faulthandler would take, and to be heard when it refuses.
    options = ("-p", "no:faulthandler", "--capture=sys")
    printed = _run_tests("amx", tmp_path, *options, "test_column_scores.py", "test_attention_map.py")
    products = re.search(r"amx_emulator: (\d+) tile products, 0 threads with tiles left", printed)
    assert products is not None, printed
    assert int(products[1]) > 1000, "the tests must reach the tiles"
