"""The CUDA build, which needs no GPU: all architectures, no spills, the instructions that were meant."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cmake_build import ROOT, build_once

from bench import cuda_resources, sass

ARCHITECTURES = {"sm_80", "sm_90a", "sm_100", "sm_120"}

#: What a greedy logit of 16 bits, and one of 32, may cost: issued instructions on the common path of the loop
#: that reads the logits. At the most a twentieth more than it takes.
MOST_FOR_A_LOGIT = {"sm_80": (7.1, 9.1), "sm_90a": (7.0, 9.1), "sm_100": (7.1, 9.4), "sm_120": (7.3, 9.4)}

#: Functions that kernels call, by all names that ptxas reports on.
FUNCTIONS = {"read_logits"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("nvcc") is None, reason="nvcc was not found: the CUDA part cannot be compiled"
    ),
]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A build folder of the C library, all kernels for all architectures, and what the build printed."""
    options = ("-DATTN_SAMPLER_CUDA=1", "-DATTN_SAMPLER_WGMMA=ON", "-DATTN_SAMPLER_WERROR=ON")
    return build_once(tmp_path_factory, "cuda", *options)


def test_no_kernel_spills(build: tuple[Path, str]) -> None:
    resources = cuda_resources.parse(build[1])
    print(cuda_resources.table(resources))
    names = {r.kernel for r in resources}
    assert {(r.kernel, r.architecture) for r in resources} == {(n, a) for n in names for a in ARCHITECTURES}
    assert {r.kernel for r in resources if r.registers is None} == FUNCTIONS
    kernels = names - FUNCTIONS
    assert {re.sub("_kernel.*", "", k) for k in kernels} == {
        *("row_lse", "column_scores", "column_scores_or_step", "attention_map", "token_confidence_or_step"),
        *("select_tokens", "top_columns"),
    }
    # Of a step: tiles of 8, 32 and, of 16 bits, 64 columns, and one for what may start anywhere.
    assert sum(k.startswith("column_scores_or_step") for k in kernels) == 3 + 4 + 4 + 3
    assert len(kernels) == 37
    spilling = [r for r in resources if r.stack or r.spill_stores or r.spill_loads]
    assert not spilling, cuda_resources.table(spilling)


def test_a_step_runs_in_one_wave(build: tuple[Path, str]) -> None:
    """As many blocks are launched as block.cuh says that run at once; on sm_120 the widest tile has fewer."""
    for r in cuda_resources.parse(build[1]):
        if (found := re.match(r"column_scores_or_step_kernel<(\w+), (\d), (\w+)>", r.kernel)) is None:
            continue
        dtype, tiles, unaligned = found.groups()
        blocks = (
            2 if dtype == "float" else 3 if dtype == "Float8" or tiles == "8" or unaligned == "true" else 4
        )
        assert r.registers is not None
        held, _ = cuda_resources.resident_blocks(r.architecture, r.registers, 0) or (0, "")
        assert held >= blocks - (r.architecture == "sm_120" and tiles == "8"), r


def test_the_library_loads_without_a_driver(build: tuple[Path, str]) -> None:
    """It says why CUDA cannot run, or that it can; and exports the C API alone."""
    path = build[0] / "libattn_sampler.so"
    library = ctypes.CDLL(str(path))
    library.attn_sampler_cuda_unavailable.restype = ctypes.c_char_p
    reason = library.attn_sampler_cuda_unavailable()
    assert (
        reason is None
        or reason.startswith(
            (b"the CUDA driver answers: ", b"there is no NVIDIA driver, or it is older than CUDA 1")
        )
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


def test_images(build: tuple[Path, str]) -> None:
    """Machine code for each architecture in each source, and PTX of the oldest for those that come."""
    needs_tool("cuobjdump")
    objects = sorted(build[0].glob("CMakeFiles/cuda_kernels.dir/csrc/cuda/*.cu.o"))
    assert len(objects) == 7
    for path in [*objects, build[0] / "libattn_sampler.so"]:
        assert sass.images(path) == {*ARCHITECTURES, "compute_80"}, path.name


@pytest.mark.parametrize(
    ("source", "kernels", "architectures"),
    [
        ("token_confidence", "^token_confidence", ARCHITECTURES),
        ("decode_step", r"^column_scores_or_step_kernel<BFloat16, 4, false>", {"sm_90a"}),
    ],
)
def test_a_greedy_logit_costs_few_instructions(
    build: tuple[Path, str], source: str, kernels: str, architectures: set[str]
) -> None:
    needs_tool("cuobjdump")
    path = build[0] / f"CMakeFiles/cuda_kernels.dir/csrc/cuda/{source}.cu.o"
    for architecture in sorted(architectures):
        machines = cuda_resources.machine_code(path, kernels, architecture)
        assert machines
        print(cuda_resources.machine_table(machines))
        for m in machines:
            of_logits = [s for s in m.streams if s.dtype is not None and s.loop.global_loads]
            assert sorted(s.dtype or "" for s in of_logits) == ["bfloat16", "float16", "float32"]
            for s in of_logits:
                each, most = s.per_element, MOST_FOR_A_LOGIT[architecture][s.dtype == "float32"]
                assert each is not None
                assert 0.9 * most < each <= most, (m.kernel, architecture, s.dtype, each)
                # To be asked for noise costs less than to make it, which is apart from the common path.
                assert 0 < s.loop.asked < s.loop.noise, s


def needs_tool(name: str) -> None:
    try:
        sass.tool(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def compile_ptx(folder: Path, source: str, *options: str) -> dict[str, str]:
    """The PTX of a source's kernels and of the functions that they call, by name."""
    ptx = folder / "kernels.ptx"
    command = [
        *("nvcc", "-std=c++17", "-fmad=false", *options, "-ptx", "-o", str(ptx)),
        *(f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}", str(ROOT / f"csrc/cuda/{source}.cu")),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    parts = re.split(r"\.(?:entry|func) (\w+)\(", ptx.read_text())
    return dict(zip(cuda_resources.demangle(parts[1::2]), parts[2::2], strict=True))


@pytest.mark.parametrize(
    "source", ["row_lse", "attention_map", "token_confidence", "select_tokens", "decode_step"]
)
def test_instructions(tmp_path: Path, source: str) -> None:
    """Tensor cores and asynchronous copies in every kernel that should have them; no atomics on floats."""
    kernels = compile_ptx(tmp_path, source, "-arch=compute_80")
    assert ("read_logits" in kernels) == (source == "decode_step")
    assert kernels
    for name, code in kernels.items():
        # Those for wgmma are built only where asked for.
        assert not re.match(r"column_scores_kernel|row_lse_kernel<\w+, 16>", name), name
        assert not re.search(r"\b(atom|red)\.[\w.:]*\.f(16|32|64)", code), name
        assert not re.search(r"\.local\b", code), f"{name} keeps an array in local memory"
        if name == "select_tokens_kernel":
            continue
        assert "ld.global.nc.L1::no_allocate.v4.u32" in code, name
        if name in ("token_confidence_or_step_kernel", "read_logits"):
            # The sampling stream is fixed to the last bit: no product is fused that does not say so.
            assert "mul.rn.f32" in code, name
            continue
        assert "cp.async.cg.shared.global" in code, name
        tensor_cores = set(re.findall(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(\w+)\.", code))
        expected = {"bf16"} if "BFloat16" in name else set() if "float" in name else {"f16"}
        assert tensor_cores == expected, name
        if "Float8" in name:  # widened by integer operations where there is no instruction for it
            assert "mul.rn.f16x2" in code, name


@pytest.mark.parametrize("source", ["column_scores", "row_lse"])
def test_wgmma(tmp_path: Path, source: str) -> None:
    """In the kernels for Hopper alone, in the order that the PTX ISA asks for."""
    kernels = compile_ptx(
        tmp_path, source, "-gencode=arch=compute_90a,code=compute_90a", "-DATTN_SAMPLER_WGMMA"
    )
    own = {"column_scores": "column_scores_kernel<{}>", "row_lse": "row_lse_kernel<{}, 16>"}[source]
    for name, code in kernels.items():
        types = [t for t in ("Half", "BFloat16") if name == own.format(t)]
        steps = re.findall(r"wgmma\.(?:fence|mma_async|commit_group|wait_group)", code)
        if not types:
            assert not steps, name
            continue
        (dtype,) = types
        operand = {"Half": "f16", "BFloat16": "bf16"}[dtype]
        product = f"wgmma.mma_async.sync.aligned.m64n128k16.f32.{operand}.{operand} "
        chunks = range(1, 5)  # of 32 elements, two products each: one straight line of code for each count
        assert code.count(product) == sum(2 * n for n in chunks) == steps.count("wgmma.mma_async")
        groups = re.findall(
            r"wgmma\.fence((?: wgmma\.mma_async)+) wgmma\.commit_group wgmma\.wait_group", " ".join(steps)
        )
        assert sorted(g.count("mma_async") for g in groups) == [2 * n for n in chunks], name
        assert "mma.sync" not in code, name
        # What cp.async wrote is shown to the tensor cores' proxy before a barrier.
        shown = re.findall(r"cp\.async\.wait_group|fence\.proxy\.async\.shared::cta|bar(?:rier)?\.sync", code)
        waits = [i for i, x in enumerate(shown) if x == "cp.async.wait_group"]
        assert waits, name
        for i in waits:
            assert shown[i + 1].startswith("fence.proxy.async"), name
            assert shown[i + 2].startswith("bar"), name
    assert {own.format(t) for t in ("Half", "BFloat16")} <= kernels.keys()
