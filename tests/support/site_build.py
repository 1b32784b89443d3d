"""The documentation site, built once for all processes of a test run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]


def built_site(factory: pytest.TempPathFactory) -> Path:
    """Its folder; the test is skipped where the site cannot be built."""
    for module in ("zensical", "mkdocstrings", "matplotlib"):
        pytest.importorskip(module, reason=f"{module} is not installed (pip install '.[docs]')")
    from docs.__main__ import build

    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, log = base / "docs", base / "docs.log"
    with FileLock(base / "docs.lock"):
        if not log.exists():
            folder.mkdir()
            log.write_text("")
            try:
                build(folder)
            except RuntimeError as error:  # told by every test that wants the site, and built for none again
                log.write_text(str(error))
    assert not log.read_text(), log.read_text()[-8000:]
    return folder / "site"
