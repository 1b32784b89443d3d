"""The documentation site, built once for all processes of a test run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]


def built_site(factory: pytest.TempPathFactory) -> Path:
    """Its folder; the test is skipped where the site cannot be built."""
    for module in ("zensical", "mkdocstrings", "matplotlib"):
        pytest.importorskip(module, reason=f"{module} is not installed (pip install '.[docs]')")
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, log = base / "docs", base / "docs.log"
    with FileLock(base / "docs.lock"):
        if not log.exists():
            command = [sys.executable, "-m", "docs", str(folder)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            log.write_text(f"{done.stdout}{done.stderr}" if done.returncode else "")
    assert not log.read_text(), log.read_text()[-8000:]
    return folder / "site"
