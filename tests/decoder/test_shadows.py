"""Shadows: what stands is judged where the model sees all but that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoding import decode, prompt
from torch import Tensor
from toy_model import MASK, VOCAB, ToyModel

from attn_sampler.bundled.model import TinyMaskedLM, TinyMaskedLMConfig
from attn_sampler.generate import StepEvent
from attn_sampler.revision import WINO, AttnCheck


def tiny(num_layers: int = 2, seed: int = 0) -> TinyMaskedLM:
    torch.manual_seed(seed)
    model = TinyMaskedLM(
        TinyMaskedLMConfig(VOCAB, MASK, hidden_size=32, num_layers=num_layers, num_heads=2, ffn_size=16)
    )
    for parameter in model.parameters():  # larger than at the start of training: tokens differ
        parameter.data *= 4.0
    return model.eval().requires_grad_(False)


def padded() -> tuple[Tensor, Tensor]:
    tokens = torch.tensor([prompt(9), prompt(9, 1)])
    tokens[0, 4] = tokens[1, 7] = MASK
    visible = torch.ones(2, 9, dtype=torch.bool)
    visible[1, :2] = False
    return tokens, visible


@pytest.mark.parametrize("with_padding", [False, True])
def test_nothing_sees_a_shadow(with_padding: bool) -> None:
    tokens, visible = padded()
    mask = visible if with_padding else None
    logits = tiny().forward_shadow(tokens, slice(3, 8), mask)
    assert logits.shape == (2, 14, VOCAB)
    expected = tiny()(tokens, mask)
    real = visible if with_padding else torch.ones_like(visible)
    torch.testing.assert_close(logits[:, :9][real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_padding", [False, True])
def test_a_shadow_sees_all_but_what_it_stands_for(with_padding: bool) -> None:
    """In one layer that is the sequence with this position masked."""
    tokens, visible = padded()
    mask = visible if with_padding else None
    model = tiny(num_layers=1)
    logits = model.forward_shadow(tokens, slice(3, 8), mask)
    for position in range(3, 8):
        without = tokens.clone()
        without[:, position] = MASK
        expected = model(without, mask)[:, position]
        torch.testing.assert_close(logits[:, 9 + position - 3], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", [WINO(tau=0.3), AttnCheck(tau=0.3, order="random", shadow=True)], ids=repr)
def test_what_stands_is_judged_at_its_shadow(policy: Any) -> None:
    """Masked positions are predicted at themselves, the others at their shadows."""
    model, prompts, checked = tiny(), [prompt(5), prompt(3, 1)], 0
    events: list[tuple[Tensor, StepEvent]] = []
    forward, seen = model.forward_shadow, []

    def record(tokens: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        seen.append((tokens.clone(), forward(tokens, *arguments, **keywords)))
        return seen[-1][1]

    model.forward_shadow = record  # type: ignore[method-assign]
    got = decode(model, prompts, gen_length=8, policy=policy, on_step=lambda e: events.append(e))
    assert not (got.tokens == MASK).any()
    for (tokens, logits), event in zip(seen, events, strict=True):
        p = logits.softmax(dim=-1)
        own, shadows = p[:, event.block], p[:, tokens.shape[1] :]
        stands = tokens[:, event.block]
        expected = shadows.gather(2, stands[..., None]).squeeze(2)
        visible = stands != MASK
        torch.testing.assert_close(event.result.current[visible], expected[visible])
        best = torch.where(visible, shadows.amax(dim=2), own.amax(dim=2))
        torch.testing.assert_close(event.result.confidence, best)
        checked += int(visible.sum())
    assert checked > 10


@pytest.mark.parametrize("query_rows", ["all", "masked"])
def test_shadows_give_no_attention(query_rows: str) -> None:
    """The scores of a first pass are those without shadows."""
    scores = []
    for shadow in (False, True):
        events: list[StepEvent] = []
        policy = AttnCheck(tau=0.3, doubt_tau=0.0, shadow=shadow)
        decode(
            tiny(),
            [prompt(6), prompt(3, 1)],
            gen_length=6,
            policy=policy,
            query_rows=query_rows,
            on_step=events.append,
        )
        scores.append(events[0].result.scores)
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-5)


def test_what_serves_no_shadows() -> None:
    with pytest.raises(TypeError, match="policy: needs a model with forward_shadow, got ToyModel"):
        decode(ToyModel(), [prompt(3)], gen_length=4, policy="wino")
    with pytest.raises(ValueError, match="policy: shadows go with a bidirectional model"):
        decode(tiny(), [prompt(3)], gen_length=4, policy="wino", logit_shift=True)
    model = tiny()
    model.causal_block = 4  # type: ignore[assignment]
    with pytest.raises(ValueError, match="policy: shadows go with a bidirectional model"):
        decode(model, [prompt(4)], gen_length=4, policy="wino")
