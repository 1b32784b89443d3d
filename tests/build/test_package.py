"""What a user installs: the built package with and without a compiler, and what importing it costs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_USE = """
import sys
# An editable installation of the package, which would fill in for what is missing from the one under test.
sys.meta_path = [f for f in sys.meta_path if getattr(f, "__name__", "") != "_EditableFinder"]
import torch, attn_sampler
from attn_sampler import BackendUnavailableError, column_scores, is_backend_supported
q = torch.ones(1, 2, 3, 4)
assert torch.allclose(column_scores(q, q), torch.full((1, 3), 2.0))
support = is_backend_supported("column_scores", "cpu", q)
try:
    column_scores(q, q, backend="cpu")
    print(attn_sampler.__file__, "ran")
except BackendUnavailableError as error:
    assert not support.supported and support.reason in str(error)
    print(attn_sampler.__file__, error)
"""


def _python(*arguments: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_wheel_of_the_sdist_holds_everything_and_runs_outside_the_tree(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy, so that the tree's own build folder plays no part
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    _python("setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path), cwd=source)
    (sdist,) = tmp_path.glob("attn_sampler-*.tar.gz")
    # Isolated, as pip does it for users; the CUDA part has tests of its own.
    _python(
        *("-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), str(sdist)),
        cwd=tmp_path,
        ATTN_SAMPLER_CUDA="0",
    )
    (wheel,) = tmp_path.glob("attn_sampler-*.whl")
    site = tmp_path / "site"
    _python("-m", "pip", "install", "--no-deps", "--target", str(site), str(wheel), cwd=tmp_path)
    package = site / "attn_sampler"
    for name in (
        "py.typed",
        "viewer.html",
        "kernels/__init__.py",
        "adapters/models.py",
        "bundled/MODEL_CARD.md",
        "bundled/sudoku.safetensors",
    ):
        assert (package / name).is_file(), name
    assert not (site / "kernels").exists(), "a top-level package named kernels would shadow others"
    output = _python("-c", _USE, cwd=tmp_path, PYTHONPATH=str(site))
    assert str(package) in output
    assert output.rstrip().endswith("ran")
    info = _python("-m", "attn_sampler.collect_env", cwd=tmp_path, PYTHONPATH=str(site))
    assert "cpu" in info


def test_without_a_compiler_the_python_part_remains(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    build = _python(
        *("setup.py", "build", "--build-base", str(tmp_path / "build"), "--build-lib", str(tmp_path / "lib")),
        cwd=ROOT,
        PATH=str(tools),
        CXX="",
    )
    assert "no C++ compiler was found" in build
    output = _python("-c", _USE, cwd=tmp_path, PYTHONPATH=str(tmp_path / "lib"))
    assert "'cpu' cannot run column_scores here: the compiled extension" in output
    assert "No module named 'attn_sampler._C'" in output


def test_import_brings_nothing_heavy() -> None:
    loaded = _python(
        "-c",
        "import torch, sys; before = set(sys.modules); import attn_sampler; print(set(sys.modules) - before)",
        cwd=ROOT,
    )
    for name in ("rich", "safetensors", "triton", "pytest", "matplotlib"):
        assert f"'{name}'" not in loaded, loaded


def test_setup_stays_short() -> None:
    assert len((ROOT / "setup.py").read_text().splitlines()) < 120
