"""Names of the release before: they warn, and do the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_decode_step import small_step
from toy_model import MASK, ToyModel

from attn_sampler import decode_step, generate, select_tokens
from attn_sampler.evaluate import Results, Rule, expand

CPU = torch.device("cpu")


def former(function: Any, *arguments: Any, **options: Any) -> Any:
    """The result of a call that warns, naming the line of the call."""
    with pytest.warns(DeprecationWarning, match=" now") as caught:
        result = function(*arguments, **options)
    assert {warning.filename for warning in caught} == {__file__}
    return result


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"policy": "sequential"}, {"rule": "sequential"}),
        ({"rows": "masked"}, {"query_rows": "masked"}),
        ({"policy": "sequential", "rows": "masked"}, {"rule": "sequential", "query_rows": "masked"}),
    ],
    ids=str,
)
def test_decode_step(old: dict, new: dict) -> None:
    step = small_step(CPU, tau=0.1)
    expected = step.copy().run(**new)
    plain = step.copy().run()
    assert not (torch.equal(expected.scores, plain.scores) and torch.equal(expected.tokens, plain.tokens))
    got = former(decode_step, step.tokens, step.logits, step.layers, **step.options, **old)
    assert all(torch.equal(x, y) for x, y in zip(got[:5], expected[:5], strict=True))


def test_scores_as_layers() -> None:
    step = small_step(CPU)
    scores = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    expected = decode_step(step.tokens.clone(), step.logits, scores=scores, **step.options)
    got = former(decode_step, step.tokens.clone(), step.logits, scores, **step.options)
    assert got.scores is scores
    assert all(torch.equal(x, y) for x, y in zip(got[:5], expected[:5], strict=True))
    with pytest.raises(TypeError, match="expected one of them, got both"):
        decode_step(step.tokens, step.logits, step.layers, scores=scores, **step.options)
    with pytest.raises(TypeError, match="expected one of them, got none"):
        decode_step(step.tokens, step.logits, **step.options)


def test_select_tokens() -> None:
    scores, confidence = torch.rand(2, 3, 9, generator=torch.Generator().manual_seed(0))
    arguments = (scores, confidence, torch.ones(3, 9, dtype=torch.bool))
    got = former(select_tokens, *arguments, policy="sequential")
    assert torch.equal(got, select_tokens(*arguments, rule="sequential"))
    assert not torch.equal(got, select_tokens(*arguments, tau=0.0))


def test_generate() -> None:
    def decode(**options: Any) -> list[int]:
        options |= {"mask_token_id": MASK, "gen_length": 12, "policy": "attn-sequential", "trace": True}
        return [commit.position for commit in generate(ToyModel(1), [[1, 2, 3]], **options).trace.commits]

    with pytest.warns(DeprecationWarning, match="query_rows") as caught:
        order = decode(rows="masked")
    assert [warning.filename for warning in caught] == [__file__]
    assert order == decode(query_rows="masked") != decode()
    with pytest.raises(ValueError, match="query_rows: expected one of"), pytest.warns(match="query_rows"):
        decode(rows="some")


def test_rules() -> None:
    for text in ("attn:rows=masked", "attn:tau=0.5,rows=masked,layers=last"):
        rule = former(Rule.parse, text)
        assert rule.label == text.replace("rows", "query_rows")
        assert rule == Rule.parse(rule.label)
        assert rule.attention["query_rows"] == "masked"
    with pytest.warns(DeprecationWarning, match="query_rows"):
        labels = [rule.label for rule in expand(["attn:rows=masked", "attn:query_rows=masked"], [0.5])]
    assert labels == ["attn:query_rows=masked,tau=0.5"]


def test_results_are_read(tmp_path: Path) -> None:
    decoded = {"right": [1, 0], "passes": [3, 4]}
    cell = {"problems": 2, "rules": {"attn:tau=1,rows=masked": decoded, "confidence": decoded}, "orders": {}}
    (tmp_path / "old.json").write_text(json.dumps({"tasks": {"toy": cell}}))
    results = Results(tmp_path / "old.json", "attn:tau=1,rows=masked")
    assert results.cells["toy"]["rules"] == {"attn:tau=1,query_rows=masked": decoded, "confidence": decoded}
    assert results.baseline == "attn:tau=1,query_rows=masked"
