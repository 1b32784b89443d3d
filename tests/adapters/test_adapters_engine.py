"""What the engine adapters share: a step on rows that draw each in its own way, and keys in pages."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from toy_model import MASK, VOCAB

from attn_sampler import column_scores
from attn_sampler.adapters import _engine
from attn_sampler.adapters._engine import BlockDecoder, of_rows, paged_column_scores
from attn_sampler.reference import truncation

B, C = 5, 6
GENERATOR = torch.Generator().manual_seed(3)
LOGITS = torch.randn(4, B, C, VOCAB, generator=GENERATOR)
SCORES = torch.rand(4, B, C, generator=GENERATOR)
BITMASK = torch.randint(-(1 << 31), 1 << 31, (B, -(-VOCAB // 32)), generator=GENERATOR).to(torch.int32)
DRAWS: dict[str, Any] = {
    "temperature": [0.0, 0.7, 1.5, 1.0, 1.0],
    "top_k": [0, 0, 7, 1, 1 << 30],
    "top_p": [1.0, 0.6, 1.0, 0.9, 0.5],
    "min_p": [0.0, 0.0, 0.2, 0.0, 0.1],
    "seeds": [1, 1, 2, 3, 1 << 63],
}
DTYPES = {"temperature": torch.float32, "top_k": torch.int32, "seeds": torch.int64}


def decoded(policy: str, rows: list[int], draws: dict[str, Any], **keywords: Any) -> list[list[int]]:
    """Blocks of these rows, after so many steps as there are logits."""
    tau = {"attn": 0.1, "threshold": 0.0}.get(policy)
    decoder = BlockDecoder(policy, mask_token_id=MASK, tau=tau, **keywords)
    tokens = torch.full((B, C), MASK)
    tokens[:, 0] = torch.arange(B)
    tokens, position = tokens[rows], torch.arange(B)[rows] * C
    own = {
        name: x[rows] if isinstance(x, torch.Tensor) else [x[i] for i in rows] for name, x in draws.items()
    }
    for logits, scores in zip(LOGITS, SCORES, strict=True):
        if (tokens == MASK).any():
            decoder.step(tokens, logits[rows], scores[rows], position=position, **own)
    return tokens.tolist()


@pytest.mark.parametrize("policy", ["attn", "threshold", "confidence", "eb"])
def test_a_row_draws_the_same_alone_and_in_any_batch(policy: str):
    draws = DRAWS | {"token_bitmask": BITMASK}
    together = decoded(policy, list(range(B)), draws)
    for rows in ([0], [1], [2], [3], [4], [4, 2, 0], [3, 1, 2, 4, 0]):
        assert decoded(policy, rows, draws) == [together[i] for i in rows]
    assert together != decoded(policy, list(range(B)), draws | {"seeds": [5, 6, 7, 8, 9]})


def test_tensors_of_the_engine_say_what_numbers_say():
    seeds = [1, 1, 2, 3, -(1 << 63)]
    tensors = {
        name: torch.tensor(x, dtype=DTYPES.get(name, torch.float32))
        for name, x in (DRAWS | {"seeds": seeds}).items()
    }
    rows = list(range(B))
    assert decoded("threshold", rows, tensors) == decoded("threshold", rows, DRAWS)


def test_what_may_be_drawn():
    """Of uniformly noisy draws, over many seeds, none is of a token that is filtered out."""
    rows = list(range(B))
    logits = LOGITS[0].clone()
    for i in rows:
        allowed = (BITMASK[i, torch.arange(VOCAB) // 32] >> (torch.arange(VOCAB) % 32)) & 1
        logits[i, :, allowed == 0] = -torch.inf
    logits[..., MASK] = -torch.inf
    filters = [
        torch.tensor(DRAWS[name]).view(-1, 1, 1).to(DTYPES.get(name, torch.float32))
        for name in ("temperature", "top_k", "top_p", "min_p")
    ]
    warm = filters[0].clamp(min=1.0)
    kept = truncation(logits / torch.where(filters[0] > 0, filters[0], warm), *filters[1:])
    kept[0] = torch.zeros_like(kept[0]).scatter(-1, logits[0].argmax(dim=-1, keepdim=True), True)
    decoder = BlockDecoder("threshold", mask_token_id=MASK, tau=0.0)
    seen = torch.zeros_like(kept)
    for seed in range(40):
        tokens = torch.full((B, C), MASK)
        draws = DRAWS | {"seeds": [seed] * B}
        decoder.step(tokens, LOGITS[0], None, token_bitmask=BITMASK, **draws)
        seen.scatter_(-1, tokens[..., None], True)
    assert (seen & ~kept).sum() == 0
    assert seen[1:].sum() > kept[0].sum() * B, "draws differ"


def test_a_row_without_a_seed_draws_from_the_decoder_s_streams():
    rows = list(range(B))
    draws = {"temperature": [1.0] * B}
    plain = decoded("threshold", rows, draws, seed=4)
    assert plain == decoded("threshold", rows, draws | {"seeds": [None] * B}, seed=4)
    mixed = decoded("threshold", rows, draws | {"seeds": [None, 7, None, 7, None]}, seed=4)
    assert [mixed[i] for i in (0, 2, 4)] == [plain[i] for i in (0, 2, 4)]
    assert [mixed[i] for i in (1, 3)] == decoded("threshold", [1, 3], draws | {"seeds": [7] * B}, seed=9)


def test_the_streams_of_a_request_s_steps_and_blocks_differ():
    decoder = BlockDecoder("threshold", mask_token_id=MASK)
    masked = torch.arange(C)[None] >= torch.arange(C)[:, None]  # rows of one step after the other
    rows, budget = torch.arange(C), torch.full((C, C), 2, dtype=torch.int32)
    streams = [
        decoder._streams(rows, [7] * C, torch.full((C,), C * block), masked, budget)
        for block, budget in itertools.product(range(40), (None, budget, budget - 1))
    ]
    assert torch.cat(streams).unique().numel() == 40 * 3 * C


@pytest.mark.parametrize("policy", ["attn", "threshold", "confidence"])
def test_a_step_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch, policy: str):
    """To see whether it went on: of tensors without contents nothing else is read."""
    monkeypatch.setattr(_engine, "check_progress", lambda *_, **__: None)
    given = (torch.full((B, C), MASK), LOGITS[0], SCORES[0], BITMASK)
    with FakeTensorMode() as mode:
        decoder = BlockDecoder(policy, mask_token_id=MASK)
        draws = {
            name: torch.tensor(x, dtype=DTYPES.get(name, torch.float32))
            for name, x in DRAWS.items()
            if name != "seeds"
        }
        fake = [mode.from_tensor(x) for x in given]
        position = torch.empty(B, dtype=torch.int64)
        for own in (DRAWS, draws | {"seeds": position}):
            decoder.step(*fake[:3], token_bitmask=fake[3], position=position, **own)
        with pytest.raises(DataDependentOutputException):
            bool(fake[0].any())


@pytest.mark.parametrize("device", [torch.device("cpu")])
def test_rows_of_one_value_are_a_number(device: torch.device):
    assert of_rows([0.5, 0.5], torch.float32, device) == 0.5
    assert of_rows(3, torch.int32, device) == 3
    assert of_rows([1, 2], torch.int32, device).dtype == torch.int32
    assert of_rows(torch.tensor([1, 2]), torch.int32, device).dtype == torch.int32
    assert of_rows([], torch.int32, device).shape == (0,)


@pytest.mark.parametrize("window", [(-1, -1), (2, 2)])
def test_keys_in_pages(window: tuple[int, int]):
    """Of sequences of any length, the block's included, from a strided cache; no other page is read."""
    page, lengths = 3, [4, 11, 2, 7]
    cache = torch.full((20, page, 2, 16), torch.nan)  # keys and values side by side
    pages = torch.randperm(20, generator=GENERATOR).to(torch.int32)
    table = torch.full((len(lengths), 5), -1, dtype=torch.int32)
    q = torch.randn(len(lengths), 4, 4, 8, generator=GENERATOR)
    contexts, taken = [], 0
    for i, length in enumerate(lengths):
        count = -(-length // page)
        table[i, :count] = pages[taken : taken + count]
        taken += count
        contexts.append(torch.randn(length, 2, 8, generator=GENERATOR))
        for n in range(length):
            cache[table[i, n // page], n % page, :, :8] = contexts[i][n]
    out = torch.ones(len(lengths), 4)
    given = (cache[..., :8].transpose(1, 2), table, torch.tensor(lengths, dtype=torch.int32))
    row = torch.arange(4) >= 4 - torch.tensor(lengths)[:, None]
    paged_column_scores(q, *given, window_size=window, query_mask=row, out=out)
    for i, length in enumerate(lengths):
        own = min(length, 4)
        keys = contexts[i].transpose(0, 1)[None]
        expected = column_scores(
            q[i, None, :, 4 - own :], keys, columns=slice(length - own, length), window_size=window
        )
        torch.testing.assert_close(out[i, 4 - own :] - 1.0, expected[0])
        assert (out[i, : 4 - own] == 1.0).all()
