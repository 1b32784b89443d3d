"""The CUDA kernels' own sources, compiled as C++ and run on the CPU, one fiber a thread (tests/cuda_host).

The suite that judges every backend judges them too, in shuffled orders of blocks and threads. A program built
with the sanitizers runs them on buffers of exact size, and shows that broken kernels are reported.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cmake_build import ROOT, build, build_once, python_module, tool
from cuda_host import plugin
from problems import normal, row_lse

from attn_sampler import _core

CPU, CUDA = 0, 1
OPTIONS = ("-DATTN_SAMPLER_CUDA=host", "-DATTN_SAMPLER_X86=OFF", "-DATTN_SAMPLER_WERROR=ON")


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python module, with the CUDA kernels on the host."""
    folder, _ = build_once(tmp_path_factory, "cuda_host", *OPTIONS, *python_module())
    (module,) = folder.glob("_C.*.so")
    return module


@pytest.mark.parametrize(
    ("seed", "tests"),
    [
        (1, ("test_column_scores.py",)),
        (2, ("test_column_scores.py", "-k", "random_problems")),
        (3, ("test_attention_map.py",)),
        (4, ("test_token_confidence.py",)),
        (5, ("test_select_tokens.py",)),
        (6, ("test_decode_step.py",)),
        (7, ("test_decode_step.py", "-k", "random_steps")),
    ],
    ids=lambda x: str(x) if isinstance(x, int) else " ".join(x),
)
def test_the_suite_of_all_backends(extension: Path, seed: int, tests: tuple[str, ...]) -> None:
    name, *options = tests
    command = [
        *(
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "not slow",
            "-p",
            "cuda_host.plugin",
            "--backend",
            "cpu",
        ),
        *(f"--cuda-host={extension}", f"--cuda-host-seed={seed}", str(ROOT / "tests" / name), *options),
    ]
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


class Step:
    """A decoding step of 70 layers, more than one launch's table holds, straight at the extension."""

    def __init__(self, extension: Path, n_layers: int, with_lse: bool) -> None:
        self.module = plugin.load(str(extension))
        self.host = ctypes.CDLL(str(extension))
        q = [normal(i, 2, 4, 6, 32, dtype=torch.bfloat16) for i in range(n_layers)]
        k = [normal(100 + i, 2, 2, 24, 32, dtype=torch.bfloat16) for i in range(n_layers)]
        lse = [row_lse(x, y) for x, y in zip(q, k, strict=True)] if with_lse else []
        self.tokens = torch.full((2, 24), 7)
        self.start = self.tokens.clone()
        self.scores = torch.full((2, 6), torch.nan)
        self.token_ids, self.confidence = torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6)
        self.selected = torch.zeros(2, 6, dtype=torch.bool)
        self.logits = normal(7, 2, 6, 11, dtype=torch.float32).mul(5)
        self.keep = q, k, lse
        outputs = (self.tokens, self.scores, self.token_ids, self.confidence, self.selected, self.logits)
        self.arguments = (
            *map(_core._view, outputs),
            list(zip(*(map(_core._view, xs) for xs in (q, k, lse) if xs), strict=True)),
            *(None, None, slice(18, 24), 7, "parallel", 0.4, "confidence", "probability", 0.0, None),
            *("all", slice(18, 24), "e", None, False, 18, "sequence", True, "sum"),
        )

    def run(self, where: tuple) -> int:
        self.tokens.copy_(self.start)
        return self.module.decode_step(*self.arguments, where)

    def results(self) -> list[torch.Tensor]:
        return [x.clone() for x in (self.tokens, self.scores, self.token_ids, self.confidence, self.selected)]


@pytest.mark.parametrize(("n_layers", "with_lse", "launches"), [(28, True, 1), (28, False, 2), (70, True, 2)])
def test_a_step_of_many_layers(extension: Path, n_layers: int, with_lse: bool, launches: int) -> None:
    step = Step(extension, n_layers, with_lse)
    assert step.run((CPU, 1, 0, 0, 0, 0)) == 0
    expected = step.results()
    needed = step.run((CUDA, 1, 0, 0, 0, 0))
    workspace = plugin.aligned(needed)
    workspace.zero_()
    first = None
    for seed in range(5):  # one workspace, as a replayed graph uses it, in different orders of the blocks
        step.host.cuda_host_shuffle(ctypes.c_uint64(seed))
        before = step.host.cuda_host_launches()
        assert step.run((CUDA, 1, 0, 0, workspace.data_ptr(), needed)) == 0
        assert step.host.cuda_host_launches() - before == launches
        results = step.results()
        for result, other in zip(results, expected, strict=True):
            torch.testing.assert_close(result, other, rtol=1e-5, atol=1e-5)
        first = first or results
        assert all(torch.equal(x, y) for x, y in zip(results, first, strict=True))


def test_the_device_is_current_during_the_call_only(extension: Path) -> None:
    step = Step(extension, 1, True)
    needed = step.run((CUDA, 1, 1, 0, 0, 0))
    workspace = plugin.aligned(needed)
    workspace.zero_()
    for device in (1, 0):
        assert step.run((CUDA, 1, device, 0, workspace.data_ptr(), needed)) == 0
        assert step.host.cuda_host_launch_device() == device
        assert step.host.cuda_host_current_device() == 0
    with pytest.raises(RuntimeError, match="cudaSetDevice: invalid device ordinal"):
        step.run((CUDA, 1, 2, 0, workspace.data_ptr(), needed))


def test_a_small_workspace_runs_nothing(extension: Path) -> None:
    step = Step(extension, 1, True)
    needed = step.run((CUDA, 1, 0, 0, 0, 0))
    workspace = plugin.aligned(needed)
    workspace.zero_()
    before = step.host.cuda_host_launches()
    assert step.run((CUDA, 1, 0, 0, workspace.data_ptr(), needed - 1)) == needed
    assert step.host.cuda_host_launches() == before
    assert torch.equal(step.tokens, step.start)
    with pytest.raises(ValueError, match="workspace: expected an address aligned to 256 bytes"):
        step.run((CUDA, 1, 0, 0, workspace.data_ptr() + 16, needed))


def test_what_the_kernels_do_not_take(extension: Path) -> None:
    module = plugin.load(str(extension))
    q, k, out = torch.zeros(1, 1, 2, 520), torch.zeros(1, 1, 3, 520), torch.zeros(1, 3)
    options = (slice(0, 3), "e", 1.0, False, 1, "sequence", True, "sum", False, False)
    with pytest.raises(module.Refused, match="q: head dimension: the CUDA kernels take at most 512, got 520"):
        module.column_scores(
            *map(_core._view, (out, q, k)), None, None, None, *options, (CUDA, 1, 0, 0, 0, 0)
        )


def test_under_the_sanitizers(tmp_path: Path) -> None:
    build(tmp_path, *OPTIONS, "-DATTN_SAMPLER_SANITIZE=address,undefined", "-DCMAKE_BUILD_TYPE=Debug")
    result = subprocess.run([tool("ctest"), "--verbose"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr
    assert "CPU and GPU committed the block in the same" in result.stdout
    assert "all agree" in result.stdout
    for report in (
        "waits at cuda_host_check.cpp:",
        "while others are at cuda_host_check.cpp:",
        "have ended",
        "a write beyond the 1024 bytes of shared memory",
    ):
        assert report in result.stdout, result.stdout
