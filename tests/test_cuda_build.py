"""The CUDA build, which needs no GPU: all architectures, no spills, the instructions that were meant."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cmake_build import ROOT, build_once

from bench import cuda_resources

ARCHITECTURES = {"sm_80", "sm_90a", "sm_100a", "sm_120"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("nvcc") is None, reason="nvcc was not found: the CUDA part cannot be compiled"
    ),
]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A build folder of the C library for all architectures, and what the build printed."""
    return build_once(tmp_path_factory, "cuda", "-DATTN_SAMPLER_CUDA=1", "-DATTN_SAMPLER_WERROR=ON")


def test_no_kernel_spills(build: tuple[Path, str]) -> None:
    resources = cuda_resources.parse(build[1])
    print(cuda_resources.table(resources))
    kernels = {r.kernel for r in resources}
    assert {(r.kernel, r.architecture) for r in resources} == {(k, a) for k in kernels for a in ARCHITECTURES}
    for name in ("decode_step", "row_lse", "attention_map", "token_confidence", "select_tokens"):
        assert any(k.startswith(f"{name}_kernel") for k in kernels), kernels
    assert len(kernels) == 24
    spilling = [r for r in resources if r.stack or r.spill_stores or r.spill_loads]
    assert not spilling, cuda_resources.table(spilling)


def test_the_library_loads_without_a_driver(build: tuple[Path, str]) -> None:
    """It says why CUDA cannot run, or that it can; and exports the C API alone."""
    path = build[0] / "libattn_sampler.so"
    library = ctypes.CDLL(str(path))
    library.attn_sampler_cuda_unavailable.restype = ctypes.c_char_p
    reason = library.attn_sampler_cuda_unavailable()
    assert (
        reason is None
        or reason.startswith(b"the CUDA driver answers: ")
        or reason == b"there is no CUDA device"
    )
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True
    )
    names = symbols.stdout.split()[2::3]
    assert names
    assert all(name.startswith("attn_sampler_") for name in names), names


def test_the_example_runs_or_says_why_not(build: tuple[Path, str]) -> None:
    result = subprocess.run([str(build[0] / "decode_step_cuda")], capture_output=True, text=True)
    if result.returncode == 77:
        assert result.stdout.startswith("skipped: ")
    else:
        assert result.returncode == 0, result.stderr
        assert "CPU and GPU committed the block" in result.stdout


@pytest.mark.parametrize("source", ["column_scores", "row_lse", "attention_map", "token_confidence"])
def test_instructions(tmp_path: Path, source: str) -> None:
    """Tensor cores and asynchronous copies in every kernel that should have them; no atomics on floats."""
    ptx = tmp_path / "kernels.ptx"
    command = [
        *("nvcc", "-std=c++17", "-fmad=false", "-arch=compute_80", "-ptx", "-o", str(ptx)),
        *(f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}", str(ROOT / f"csrc/cuda/{source}.cu")),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    parts = re.split(r"\.entry (\w+)\(", ptx.read_text())
    kernels = dict(zip(cuda_resources.demangle(parts[1::2]), parts[2::2], strict=True))
    assert kernels
    for name, code in kernels.items():
        assert not re.search(r"\b(atom|red)\.[\w.:]*\.f(16|32|64)", code), name
        assert not re.search(r"\.local\b", code), f"{name} keeps an array in local memory"
        if name == "select_tokens_kernel":
            continue
        assert "ld.global.nc.L1::no_allocate.v4.u32" in code, name
        if name == "token_confidence_kernel":
            continue
        assert "cp.async.cg.shared.global" in code, name
        tensor_cores = set(re.findall(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(\w+)\.", code))
        expected = {"bf16"} if "BFloat16" in name else set() if "float" in name else {"f16"}
        assert tensor_cores == expected, name
        if "Float8" in name:  # widened by integer operations where there is no instruction for it
            assert "mul.rn.f16x2" in code, name
        # The sampling stream is fixed to the last bit: where it is, no product is fused that does not say so.
        if name.startswith("decode_step"):
            assert "mul.rn.f32" in code
