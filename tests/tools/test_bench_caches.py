"""Time by context and tokens by budget, on short contexts and few problems."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import caches


def test_tables_and_results(tmp_path: Path) -> None:
    short = ["--contexts", "40", "64", "--tasks", "addition", "--problems", "2", "--seconds", "0.01"]
    assert caches.main([*short, "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "caches.json").read_text())
    assert list(results["times"]["rows"]) == ["40", "64"]
    for row in results["times"]["rows"].values():
        assert {"all rows", "all rows, and the choice", "all keys", "512 keys", "choice"} <= row.keys()
        assert min(row.values()) > 0.0
    tokens = results["tokens"]["rows"]["addition"]
    assert tokens["none"] == {"same": 1.0, "right": tokens["none"]["right"], "rows": 27.0}
    assert tokens["sparse 19"]["dropped"] == pytest.approx(0.0, abs=1e-6)  # all keys there are
    assert {key: tokens["sparse 19"][key] for key in ("same", "right", "rows")} == tokens["dual"]
    assert tokens["sparse 2"]["dropped"] > tokens["sparse 8"]["dropped"]
    text = (tmp_path / "caches.md").read_text()
    assert "| 64 | " in text
    assert "| sparse 8 | " in text
    again = ["--contexts", "--tasks", "addition", "--problems", "1", "--output", str(tmp_path)]
    assert caches.main(again) == 0
    assert json.loads((tmp_path / "caches.json").read_text())["times"] == results["times"]
    with pytest.raises(SystemExit):
        caches.main(["--tasks", "chess"])


def test_a_wrong_pass_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = caches.PlacedModel(caches.VOCAB, 64, 2, 1).requires_grad_(False)
    right = model.forward_at
    with torch.no_grad():
        caches.passes_of(model, 16)
        monkeypatch.setattr(model, "forward_at", lambda tokens, places, mask=None: right(tokens, places + 1))
        with pytest.raises(AssertionError, match="not close"):
            caches.passes_of(model, 16)
