"""What generate() fills: prompts of any length, given tokens behind them, padding."""

from __future__ import annotations

import pytest
import torch
from decoding import ALL_POLICIES, decode, prompt
from toy_model import EOS, MASK, ToyModel

from attn_sampler.generate import StepEvent, generate


@pytest.mark.parametrize("policy", ALL_POLICIES)
def test_infilling(policy: str) -> None:
    given = torch.tensor([prompt(13, 1), prompt(13, 2), prompt(13, 3)])
    holes = torch.rand(3, 13, generator=torch.Generator().manual_seed(4)) < 0.5
    holes[2] = False
    holes[2, 7] = True
    tokens = given.masked_fill(holes, MASK)
    before = tokens.clone()
    got = decode(ToyModel(4), tokens, policy=policy, block_length=5)
    assert torch.equal(tokens, before)  # the prompt tensor is the caller's
    assert torch.equal(got.tokens[~holes], given[~holes])
    assert not (got.tokens == MASK).any()
    assert got.num_forward_passes[2] == 1
    assert got.attention_mask.all()


def test_an_empty_prompt() -> None:
    batch = decode(ToyModel(4), [prompt(3), []], gen_length=5, policy="left-to-right")
    alone = decode(ToyModel(4), [[]], gen_length=5, policy="left-to-right")
    assert alone.tokens.shape == (1, 5)
    assert torch.equal(batch.tokens[1, 3:], alone.tokens[0])


def test_given_tokens_behind_the_blanks_guide_them() -> None:
    tokens = torch.tensor([[*prompt(3), MASK, *prompt(4, 5)], [*prompt(3), MASK, *prompt(4, 6)]])
    got = decode(ToyModel(0), tokens, policy="confidence").tokens
    assert got[0, 3] != got[1, 3]


@pytest.mark.parametrize(
    ("prompt_length", "gen_length", "expected"),
    [
        (8, 8, [(0, 4), (4, 8), (8, 12), (12, 16)]),
        (6, 5, [(0, 2), (2, 6), (6, 10), (10, 11)]),
        (3, 2, [(0, 3), (3, 5)]),
        (3, 0, [(0, 3)]),
        (0, 6, [(0, 4), (4, 6)]),
    ],
)
def test_blocks_are_counted_from_the_end_of_the_prompt(
    prompt_length: int, gen_length: int, expected: list[tuple[int, int]]
) -> None:
    tokens = torch.full((2, prompt_length), MASK)
    seen: list[StepEvent] = []
    got = decode(
        ToyModel(), tokens, gen_length=gen_length, policy="left-to-right", on_step=seen.append, trace=True
    )
    assert list(dict.fromkeys((e.block.start, e.block.stop) for e in seen)) == expected
    positions = [c.position for c in got.trace.commits if c.sequence == 0]
    assert positions == list(range(prompt_length + gen_length))  # left to right, over the blocks too


def test_padding_moves_no_block() -> None:
    prompts = [[*prompt(2), MASK, MASK, *prompt(2), MASK], [*prompt(2), MASK, MASK, *prompt(2), MASK]]
    longer = [prompt(5, 9) + prompts[0], prompts[1]]
    alone, padded = (
        decode(ToyModel(5), p, gen_length=6, policy="threshold", tau=0.3) for p in (prompts, longer)
    )
    assert torch.equal(alone.tokens[1], padded.tokens[1, 5:])
    assert alone.num_forward_passes[1] == padded.num_forward_passes[1]


def test_an_attention_mask_is_the_padding_of_a_list() -> None:
    prompts = [prompt(6), prompt(4, 1)]
    as_list = decode(ToyModel(6), prompts, gen_length=5, pad_token_id=7)
    tokens = torch.tensor([prompts[0], [7, 7, *prompts[1]]])
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, :2] = False
    as_tensor = decode(ToyModel(6), tokens, attention_mask=mask, gen_length=5)
    assert torch.equal(as_list.tokens, as_tensor.tokens)
    assert torch.equal(as_list.attention_mask, as_tensor.attention_mask)
    assert as_list.tokens[1, :2].tolist() == [7, 7]


@pytest.mark.parametrize(
    ("options", "pad"), [({}, 0), ({"eos_token_id": EOS}, EOS), ({"eos_token_id": EOS, "pad_token_id": 1}, 1)]
)
def test_padding_token(options: dict, pad: int) -> None:
    got = decode(ToyModel(), [prompt(3), prompt(1)], gen_length=1, **options)
    assert got.tokens[1, :2].tolist() == [pad, pad]


def test_padding_is_not_the_mask_token() -> None:
    model = ToyModel()
    got = generate(model, [prompt(3), prompt(1)], mask_token_id=0, gen_length=2)
    assert got.tokens[1, :2].tolist() == [1, 1]
    assert not (got.tokens == 0).any()


def test_the_model_gets_an_attention_mask_only_where_there_is_padding() -> None:
    model = ToyModel()
    decode(model, [prompt(3), prompt(3, 1)], gen_length=4)
    decode(model, torch.tensor([prompt(3)]), gen_length=4, attention_mask=torch.ones(1, 3, dtype=torch.bool))
    assert model.calls
    assert all(set(call) == {"tokens"} for call in model.calls)
    model.calls.clear()
    decode(model, [prompt(3), prompt(2, 1)], gen_length=4)
    expected = torch.ones(2, 7, dtype=torch.bool)
    expected[1, 0] = False
    assert model.calls[0]["attention_mask"].equal(expected)
    assert all(call["attention_mask"].shape == call["tokens"].shape for call in model.calls)
