"""The kernel of the Hugging Face Hub that release/hf_kernel.py writes, loaded as its users would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import attn_sampler
from attn_sampler import reference

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = tmp_path_factory.mktemp("kernel")
    subprocess.run([sys.executable, ROOT / "release" / "hf_kernel.py", result], check=True)
    return result


@pytest.fixture(scope="module")
def kernel(folder: Path) -> ModuleType:
    kernels = pytest.importorskip("kernels", reason="the package kernels is not installed")
    return kernels.get_local_kernel(folder, backend="cpu")


def test_it_answers_as_the_reference_beside_the_package(kernel: ModuleType) -> None:
    q, k = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16)
    scores = kernel.column_scores(q, k, columns=slice(3, 8), causal=True)
    assert torch.equal(scores, reference.column_scores(q, k, columns=slice(3, 8), causal=True))
    assert attn_sampler.column_scores(q, k).shape == (2, 9)
    with pytest.raises(ValueError, match="columns: "):
        kernel.column_scores(q, k, columns=slice(3, 80))
    compiled = torch.compile(kernel.column_scores, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, columns=slice(3, 8), causal=True), scores)
    unavailable = kernel.is_backend_supported("column_scores", "cpu").reason
    assert "the compiled extension" in unavailable
    assert kernel.decode_step.__module__.startswith("_attn_sampler_cpu_")
    assert kernel.column_scores is not attn_sampler.column_scores


def test_its_description_is_what_the_builder_reads(folder: Path, kernel: ModuleType) -> None:
    from kernels._rust import Build

    Build.open(str(folder))
    parts = [sorted(p.relative_to(x) for p in x.rglob("*.py")) for x in folder.glob("build/*")]
    assert (
        parts
        == [
            sorted(
                p.relative_to(folder / "torch-ext/attn_sampler") for p in folder.rglob("torch-ext/**/*.py")
            )
        ]
        * 3
    )
    for path in folder.glob("build/*/metadata.json"):
        metadata = json.loads(path.read_text())
        assert path.parent.name == f"torch-{metadata['backend']['type']}"


def test_the_triton_kernels_come_with_it(folder: Path) -> None:
    """In a process of its own, in which Triton interprets, and which cannot import the package."""
    pytest.importorskip("triton", reason="triton is not installed")
    pytest.importorskip("kernels", reason="the package kernels is not installed")
    code = """
import sys
sys.modules["attn_sampler"] = None
import pathlib, kernels, torch
kernel = kernels.get_local_kernel(pathlib.Path(sys.argv[1]), backend="cpu")
q = torch.randn(1, 2, 16, 16)
found, expected = (kernel.column_scores(q, q, backend=name) for name in ("triton", "reference"))
torch.testing.assert_close(found, expected)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code, folder], check=True, env=environment)


def test_a_module_that_needs_more_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "release"))
    import hf_kernel

    (tmp_path / "attention.py").write_text("import numpy\n")
    monkeypatch.setattr(hf_kernel, "PACKAGE", tmp_path)
    with pytest.raises(ValueError, match="imports numpy, which a kernel may not"):
        hf_kernel.imports("attention")
