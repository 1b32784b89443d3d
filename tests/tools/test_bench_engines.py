"""The table of what a step costs in the engines: judged before it is timed, and what is missing is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import engines, timing


def test_the_engines_that_are_there_are_timed_and_the_others_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for module in (engines, timing):
        monkeypatch.setattr(module, "last_level_cache_bytes", lambda: 1 << 10)
    small = ["--batch", "1", "--block", "8", "--vocab", "64", "--seconds", "0.001"]
    assert engines.main([*small, "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "engines.json").read_text())
    timed = {row["engine"] for row in results["steps"]}
    assert timed | set(results["absent"]) == set(engines.ENGINES) | set(engines.LEFT_OUT)
    for row in results["steps"]:
        assert min(row["ms"].values()) > 0.0
    text = (tmp_path / "engines.md").read_text()
    assert all(name in text for name in (*timed, *results["absent"]))


def test_another_choice_under_the_same_rule_is_an_error():
    scene = engines.make_scene(1, 4, 16)

    def step(value: int) -> engines.Step:
        return engines.Step(lambda: None, lambda: None, lambda: torch.full((4,), value))

    engines.check({"its own": step(1), "ours, threshold": step(1)}, scene)
    with pytest.raises(RuntimeError, match="ours chooses otherwise under the engine's rule"):
        engines.check({"its own": step(1), "ours, threshold": step(2)}, scene)
