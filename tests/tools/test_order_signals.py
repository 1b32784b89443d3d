"""What bench.order_signals says of a pass, against transformers' own attentions and plain counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from wheels import VOCABULARY, albert_wheel

from attn_sampler import published
from attn_sampler.problem_sets import EvaluatedModel, load_model, published_problems
from bench import order_signals


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> EvaluatedModel:
    folder = tmp_path_factory.mktemp("model")
    wheel = folder / "rxnmapper-0.4.3-py3-none-any.whl"
    (made,) = published.fetch(albert_wheel(wheel), archive=wheel, cache=folder)
    model = load_model(f"hub:{made}")
    with torch.no_grad():  # so that some predictions are right: it always says carbon
        model.model.model.get_output_embeddings().bias[VOCABULARY.index("C")] += 5
    return model


def test_auc_counts_pairs() -> None:
    value = torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0])
    right = torch.tensor([True, False, True, False, False])
    # (3, 2) against (1, 2, 0): five pairs won, one tied.
    assert order_signals.auc(value, right) == pytest.approx(5.5 / 6)
    assert order_signals.auc(-value, right) == pytest.approx(0.5 / 6)


def test_signals_are_what_the_attentions_say(model: EvaluatedModel) -> None:
    prompt = published_problems("reactions-50", 1, model).prompts[0]
    logits, maps = order_signals.attention(model, prompt)
    network = model.model.model
    network.set_attn_implementation("eager")
    with torch.no_grad():
        expected = torch.stack(network(prompt[None], output_attentions=True).attentions)[:, 0].double()
    network.set_attn_implementation("attn_sampler")
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-6)
    values = order_signals.signals(logits, maps, prompt, model)
    length, blank = len(prompt), model.mask_token_id
    masked = [i for i in range(length) if prompt[i] == blank]
    special = [0, length - 1]
    visible = [i for i in range(length) if i not in masked + special]
    assert len(masked) > 5
    mean = expected.mean(dim=(0, 1)).tolist()
    logits[:, blank] = -torch.inf  # never predicted
    p = logits.softmax(dim=-1).amax(dim=-1).tolist()
    for i in masked:
        received = sum(mean[r][i] for r in range(length))
        lean = sum(mean[i][j] * (1 - p[j]) for j in masked)
        plain = {
            "received": received,
            "received, masked rows": sum(mean[r][i] for r in masked),
            "received, visible rows": sum(mean[r][i] for r in visible),
            "received, special rows": sum(mean[r][i] for r in special),
            "received share": sum(mean[r][i] for r in visible + special) / received,
            "given, not to masked": 1 - sum(mean[i][j] for j in masked),
            "given, to special": sum(mean[i][j] for j in special),
            "diagonal": mean[i][i],
            "confidence x lean": p[i] * (1 - lean),
            "left to right": -i,
        }
        for name, value in plain.items():
            assert values[name][i].item() == pytest.approx(value, rel=1e-3, abs=1e-6), name


def test_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: EvaluatedModel) -> None:
    monkeypatch.setattr(order_signals, "load_model", lambda _: model)
    out = tmp_path / "signals.json"
    words = ["--task", "reactions-50", "reactions-100", "--problems", "12", "--out", str(out)]
    assert order_signals.main(words) == 0
    saved = json.loads(out.read_text())
    for task in ("reactions-50", "reactions-100"):
        assert saved[task]["problems"] == 12
        assert 0 < saved[task]["with both"] <= 12
        for signal in saved[task]["signals"].values():
            value, low, high = signal["auc"]
            assert 0 <= low <= value <= high <= 1
        assert saved[task]["signals"]["confidence"]["auc less confidence"] == [0, 0, 0]
    lines = out.with_suffix(".md").read_text().splitlines()
    assert lines[0] == "| signal | reactions-50 | reactions-100 |"
    assert any(line.startswith("| received, each head | 0.") for line in lines)
    before = out.read_bytes()
    assert order_signals.main(words) == 0  # nothing is done again
    assert out.read_bytes() == before
