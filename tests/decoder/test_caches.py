"""``cache="sparse"`` and ``"adaptive"``: passes over a model's rows beside keys that the library kept.

The judge is a model of two layers in float64 whose attention is written out, row by row and key by key.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from toy_model import EOS, MASK, ToyModel

from attn_sampler import generate
from attn_sampler.bundled import load_model, load_task
from attn_sampler.caching import AdaptiveCache, ForwardPasses, SparseCache
from attn_sampler.generate import Generation
from attn_sampler.key_cache import parse_cache

INFINITE = 1.7976931348623157e308


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions [B, M] on [B, H, M, 8]."""
    angle = (positions[:, None, :, None] * 3.0 ** -torch.arange(4)).to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)


class Placed(ToyModel):
    """A model that knows no cache; ``attention`` may be replaced by one that is written out."""

    def __init__(self, seed: int = 0, **sizes: Any) -> None:
        super().__init__(seed, dtype=torch.float64, **sizes)
        self.requires_grad_(False)
        self.rows_run: list[int] = []
        self.attention: Callable[..., Tensor] = lambda layer, q, k, v, mask: F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=True
        )

    def compute(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        positions = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
        return self.at(
            tokens, positions, None if attention_mask is None else attention_mask[:, None, None, :]
        )

    def forward_at(self, tokens: Tensor, positions: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.at(tokens, positions, None)

    def at(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        self.rows_run.append(tokens.shape[1])
        x = self.embedding(tokens)
        batch, length, width = x.shape
        for i, (projection, output) in enumerate(zip(self.projections, self.outputs, strict=True)):
            qkv = projection(F.rms_norm(x, (width,))).view(batch, length, -1, self.headdim).transpose(1, 2)
            q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
            y = self.attention(i, rotated(q, positions), rotated(k, positions), v, mask)
            x = x + output(y.transpose(1, 2).reshape(batch, length, width))
        return self.head(F.rms_norm(x, (width,))) * 2.0


class Judge:
    """The passes of one sequence, attention written out."""

    def __init__(self, model: Placed, tokens: Tensor, block: slice, early: int = 0) -> None:
        self.model, self.block = model, block
        self.own = list(range(max(block.start - early, 0), block.stop))
        self.others = [i for i in range(tokens.shape[1]) if i not in self.own]
        self.keys: list[Tensor] = [torch.empty(0)] * 2  # [H, N, D], of each layer
        self.values: list[Tensor] = [torch.empty(0)] * 2
        self.weights: list[Tensor] = [torch.empty(0)] * 2  # [Hq, M, N] of the last pass

    def run(self, tokens: Tensor, rows: list[int], sees: Callable[[int, int], list[int]]) -> Tensor:
        """Logits [M, V] of the rows, which put their keys in the place of those kept.

        A row reads the keys at the positions ``sees(layer, key head)``.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
            if len(rows) == tokens.shape[1]:
                self.keys[layer], self.values[layer] = k[0].clone(), v[0].clone()
            self.keys[layer][:, rows], self.values[layer][:, rows] = k[0], v[0]
            group = self.model.heads // self.model.kv_heads
            self.weights[layer] = torch.zeros(*q.shape[1:3], tokens.shape[1], dtype=q.dtype)
            result = torch.empty_like(q)
            for head in range(q.shape[1]):
                seen = sees(layer, head // group)
                keys = self.keys[layer][head // group, seen]
                weights = (q[0, head] @ keys.T * self.model.headdim**-0.5).softmax(dim=-1)
                self.weights[layer][head][:, seen] = weights
                result[0, head] = weights @ self.values[layer][head // group, seen]
            return result

        plain, self.model.attention = self.model.attention, attend
        try:
            positions = torch.tensor([rows])
            return self.model.at(tokens[:, rows], positions, None)[0]
        finally:
            self.model.attention = plain

    def exact(self, tokens: Tensor) -> Tensor:
        every = list(range(tokens.shape[1]))
        return self.run(tokens, every, lambda layer, head: every)

    def choose(self, budget: int) -> tuple[list[list[list[int]]], float]:
        """The keys of each layer and key head, and the share of the block's attention to the others."""
        group, dropped, chosen = self.model.heads // self.model.kv_heads, [], []
        for weights in self.weights:
            mine = weights[:, self.own]  # [Hq, M, N]
            received = mine.sum(dim=1).view(self.model.kv_heads, group, -1).sum(dim=1)
            chosen.append(
                [
                    sorted(sorted(self.others, key=lambda i, h=h: (-received[h, i], i))[:budget])
                    for h in range(self.model.kv_heads)
                ]
            )
            for head in range(self.model.heads):
                kept = [*chosen[-1][head // group], *self.own]
                dropped.append(1.0 - mine[head][:, kept].sum(dim=-1).mean())
        return chosen, float(torch.stack(dropped).mean())


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(4, MASK, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def decode(model: Any, prompts: Any, **options: Any) -> Generation:
    options = {"gen_length": 8, "block_length": 4, "trace": True, "policy": "attn-sequential", **options}
    return generate(model, prompts, mask_token_id=MASK, **options)


def commits(generation: Generation, sequence: int | None = None) -> list[tuple]:
    assert generation.trace is not None
    return [
        (c.sequence if sequence is None else 0, c.step, c.position, c.token)
        for c in generation.trace.commits
        if sequence in (None, c.sequence)
    ]


def next_token(
    logits: Tensor, scores: Tensor | None, tokens: Tensor, block: slice, shift: int, first: int
) -> tuple[int, int]:
    """The position that a rule commits, and its token, from logits whose rows begin at ``first``."""
    logits = logits.clone()
    logits[:, MASK] = -torch.inf
    p, best = logits.softmax(dim=-1).max(dim=-1)
    open_ = [i for i in range(block.start, block.stop) if tokens[0, i] == MASK]
    value = (lambda i: float(p[i - shift - first])) if scores is None else (lambda i: float(scores[i]))
    chosen = max(open_, key=value)
    return chosen, int(best[chosen - shift - first])


# --- sparse ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("policy", ["attn-sequential", "confidence"])
@pytest.mark.parametrize(("budget", "refresh"), [(1, 0), (3, 0), (3, 2), (7, 1), (100, 0)])
def test_sparse_decoding_written_out(budget: int, refresh: int, policy: str, shift: int) -> None:
    model = Placed(seed=3)
    tokens = torch.tensor([prompt(5, 1) + [MASK] * 8])
    dropped: list[float] = []
    got = decode(
        model,
        tokens,
        gen_length=0,
        policy=policy,
        logit_shift=bool(shift),
        cache=SparseCache(budget, refresh),
        on_step=lambda event: dropped.append(float(event.dropped)),
    )
    expected, position = [], 0
    for block in (slice(1, 5), slice(5, 9), slice(9, 13)):
        judge, chosen, share = Judge(model, tokens, block, shift), None, 0.0
        for step in range(int((tokens[0, block] == MASK).sum())):
            if chosen is None or (refresh and step % (refresh + 1) == 0):
                logits, first = judge.exact(tokens), 0
                received = sum(w.sum(dim=(0, 1)) for w in judge.weights)
                chosen, share = judge.choose(budget)
            else:
                own, picked = judge.own, chosen
                logits = judge.run(tokens, own, lambda layer, head: picked[layer][head] + own)  # noqa: B023
                first, received = own[0], sum(w.sum(dim=(0, 1)) for w in judge.weights)
            expected.append(share)
            scores = received if policy == "attn-sequential" else None
            position, token = next_token(logits, scores, tokens, block, shift, first)
            tokens[0, position] = token
    assert got.tokens.tolist() == tokens.tolist()
    torch.testing.assert_close(torch.tensor(dropped), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_what_a_pass_drops_is_reckoned_from_the_log_sum_exp_of_the_choice() -> None:
    """Of one layer, whose queries depend on their own tokens alone: exact while the tokens stay the same."""
    model = Placed(seed=4)
    model.projections, model.outputs = model.projections[:1], model.outputs[:1]
    tokens, block, all_ = torch.tensor([prompt(9, 2) + [MASK] * 8]), slice(9, 13), torch.tensor([0])
    judge = Judge(model, tokens, block)
    judge.keys, judge.values, judge.weights = judge.keys[:1], judge.values[:1], judge.weights[:1]
    judge.exact(tokens)
    chosen, share = judge.choose(3)
    passes = ForwardPasses(model, SparseCache(3, max_dropped=0.999), logit_shift=False)
    passes.begin(tokens, None)
    passes.enter(tokens, None, block)
    for _ in range(3):  # the exact pass, and two that read what was chosen
        passes.logits(tokens, None, block, all_)
        assert float(passes.dropped) == pytest.approx(share, abs=1e-6)
    tokens[0, 10] = 7
    passes.logits(tokens, None, block, all_)
    own, group = judge.own, model.heads // model.kv_heads
    judge.run(tokens, own, lambda layer, head: judge.others + own)  # with all keys, as they were
    kept = [judge.weights[0][h][:, chosen[0][h // group] + own].sum(-1).mean() for h in range(model.heads)]
    actual = 1.0 - float(torch.stack(kept).mean())
    assert abs(float(passes.dropped) - actual) < 0.2 * actual  # but for the row whose query is another
    assert abs(float(passes.dropped) - share) > 1e-4  # it follows the pass


@pytest.mark.parametrize("limit", [0.0, 0.3, 0.9])
def test_a_bound_on_what_is_dropped_makes_the_next_pass_exact(limit: float) -> None:
    model, seen = Placed(seed=5), []
    cache = SparseCache(2, max_dropped=limit)
    cached = decode(model, [prompt(8)], cache=cache, on_step=lambda event: seen.append(float(event.dropped)))
    exceeded = [True, *(share > limit for share in seen[:-1])]
    exceeded[4] = True  # a block begins
    assert model.rows_run == [16 if exact else 4 for exact in exceeded]
    if limit == 0.0:
        assert commits(cached) == commits(decode(Placed(seed=5), [prompt(8)]))
    assert (sum(exceeded) == 8) == (limit == 0.0)


def test_full_budgets_are_the_dual_cache() -> None:
    prompts = [prompt(9), prompt(4, 1), prompt(6, 2)]
    dual = decode(Placed(seed=6), prompts, cache="dual")
    for cache in ("sparse", SparseCache(100), AdaptiveCache(threshold=INFINITE)):
        model = Placed(seed=6)
        assert commits(decode(model, prompts, cache=cache)) == commits(dual)
        assert set(model.rows_run) == {17, 4}
    assert commits(dual) != commits(decode(Placed(seed=6), prompts))  # keys of a block's first pass


# --- adaptive --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("policy", ["attn-sequential", "confidence"])
@pytest.mark.parametrize(("threshold", "rows"), [(0.0, 100), (0.0, 2), (0.01, 3), (0.05, 100), (INFINITE, 1)])
def test_adaptive_decoding_written_out(threshold: float, rows: int, policy: str, shift: int) -> None:
    model = Placed(seed=7)
    tokens = torch.tensor([prompt(5, 3) + [MASK] * 8])
    cache, options = AdaptiveCache(threshold, rows), {"policy": policy, "logit_shift": bool(shift)}
    got = decode(model, tokens, gen_length=0, cache=cache, **options)
    lengths, model.rows_run = model.rows_run, []
    every = list(range(13))
    for block in (slice(1, 5), slice(5, 9), slice(9, 13)):
        judge, columns = Judge(model, tokens, block, shift), list(range(block.start, block.stop))
        extra: list[int] = []
        for step in range(int((tokens[0, block] == MASK).sum())):
            if step == 0:
                logits, first = judge.exact(tokens), 0
                gave = sum(w.sum(dim=0) for w in judge.weights)[:, columns] / (2 * model.heads)  # [N, C]
                stale = torch.zeros(13, dtype=torch.float64)
                received = sum(w.sum(dim=(0, 1)) for w in judge.weights)
            else:
                ran = judge.own + extra
                before = [k[:, columns].clone() for k in judge.keys]
                logits, first = judge.run(tokens, ran, lambda layer, head: every), judge.own[0]
                own = len(judge.own)
                received = sum(w[:, :own].sum(dim=(0, 1)) for w in judge.weights)
                drift = torch.zeros(4, dtype=torch.float64)
                for old, keys in zip(before, judge.keys, strict=True):
                    drift += 1.0 - F.cosine_similarity(keys[:, columns], old, dim=-1).mean(dim=0)
                stale += gave @ (drift / 2)
                stale[ran] = 0.0
            by_staleness = sorted(judge.others, key=lambda i: -float(stale[i]))
            extra = [i for i in by_staleness[:rows] if stale[i] > threshold]
            scores = received if policy == "attn-sequential" else None
            position, token = next_token(logits, scores, tokens, block, shift, first)
            tokens[0, position] = token
    assert got.tokens.tolist() == tokens.tolist()
    assert lengths == model.rows_run  # those of the judge: no row runs again that is not stale
    assert int(got.num_rows) == sum(lengths)
    if threshold == INFINITE:
        assert set(lengths) == {13, 4 + shift}
    elif rows < 4:
        assert 4 + shift + rows in lengths


def test_rows_that_keep_their_own_keys_are_never_wrong() -> None:
    """Of a single layer, whose keys depend on their own tokens alone: every cache is exact."""
    runs = []
    for cache in ("none", "dual", SparseCache(100), AdaptiveCache(0.0, rows=2), AdaptiveCache(0.02)):
        model = Placed(seed=8)
        model.projections, model.outputs = model.projections[:1], model.outputs[:1]
        runs.append(commits(decode(model, [prompt(6), prompt(9, 1)], cache=cache)))
    assert all(run == runs[0] for run in runs)


# --- batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(
    "cache", ["dual", SparseCache(3), SparseCache(6, refresh=2), AdaptiveCache(0.005, rows=2)]
)
def test_sequences_alone_and_in_a_padded_batch(cache: Any, shift: bool) -> None:
    """Prompts of several lengths, shorter than the budget, with masks, and ends at several steps."""
    prompts = [prompt(9), prompt(2, 1), prompt(6, 2), prompt(5, 3)]
    prompts[2][1] = prompts[3][2] = prompts[3][3] = MASK
    options: dict[str, Any] = {"cache": cache, "logit_shift": shift, "pad_token_id": 0, "policy": "attn"}
    options |= {"tau": 0.2, "query_rows": "masked"}
    batch = decode(Placed(seed=9), prompts, **options)
    for i, one in enumerate(prompts):
        alone = decode(Placed(seed=9), [one], **options)
        assert batch.tokens[i, -len(one) - 8 :].tolist() == alone.tokens[0].tolist()
        assert batch.num_forward_passes[i] == alone.num_forward_passes[0]
    assert len(set(batch.num_forward_passes.tolist())) > 1


@pytest.mark.parametrize("cache", ["sparse", "adaptive"])
def test_texts_that_end_and_policies_that_read_maps_or_revise(cache: str) -> None:
    prompts = [prompt(5), prompt(5, 1), prompt(5, 2)]
    for policy in ("dapd", "t2t", "wino"):
        if policy == "wino":
            with pytest.raises((ValueError, TypeError), match="policy: "):
                decode(Placed(seed=10), prompts, cache=cache, policy=policy)
            continue
        got = decode(Placed(seed=10), prompts, cache=cache, policy=policy, eos_token_id=EOS)
        assert not (got.tokens == MASK).any()
        small = SparseCache(2) if cache == "sparse" else AdaptiveCache(0.001, rows=1)
        other = decode(Placed(seed=10), prompts, cache=small, policy=policy, eos_token_id=EOS)
        assert not (other.tokens == MASK).any()


def test_an_empty_batch_and_a_block_without_others() -> None:
    for cache in ("sparse", "adaptive", "dual"):
        empty = decode(Placed(), torch.empty(0, 3, dtype=torch.int64), cache=cache)
        assert empty.tokens.shape == (0, 11)
        assert empty.num_rows.tolist() == []
        whole = decode(Placed(), [[]], gen_length=6, block_length=6, cache=cache)
        assert commits(whole) == commits(decode(Placed(), [[]], gen_length=6, block_length=6))


def test_a_pass_that_failed_counts_for_nothing() -> None:
    tokens, block, all_ = torch.tensor([prompt(9, 2) + [MASK] * 8]), slice(9, 13), torch.tensor([0])
    shares = []
    for fails in (False, True):
        model = Placed(seed=4)
        plain = model.attention
        passes = ForwardPasses(model, SparseCache(3, max_dropped=0.999), logit_shift=False)
        passes.begin(tokens, None)
        passes.enter(tokens, None, block)
        passes.logits(tokens, None, block, all_)
        if fails:
            model.attention = lambda layer, *qkvm: (plain, None)[layer](layer, *qkvm)  # noqa: B023
            with pytest.raises(TypeError, match="not callable"):
                passes.logits(tokens, None, block, all_)
            model.attention = plain
        passes.logits(tokens, None, block, all_)
        shares.append(passes.dropped)
    assert torch.equal(*shares)


@pytest.mark.parametrize("limit", [1.0, 0.9999])
def test_what_is_dropped_is_told_of_the_sequences_that_take_part(limit: float) -> None:
    prompts, told = [[*prompt(5), MASK, MASK], [*prompt(4, 1), MASK, *prompt(2)]], []
    cache = SparseCache(2, max_dropped=limit)
    decode(Placed(seed=9), prompts, gen_length=0, cache=cache, on_step=told.append)
    assert [event.sequence.tolist() for event in told] == [[0, 1], [0]]
    assert all(event.dropped.shape == event.sequence.shape for event in told)
    if limit == 1.0:  # nothing measures it after the exact pass
        assert torch.equal(told[1].dropped, told[0].dropped[:1])


# --- models ----------------------------------------------------------------------------------------------


class Repeating(Placed):
    """Repeats its key heads where there is a mask, as transformers does."""

    def __init__(self, seed: int, in_rows: bool) -> None:
        super().__init__(seed)
        self.in_rows = in_rows
        self.attention = self.repeat

    def repeat(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if (q.shape[2] < 13) == self.in_rows:
            k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize("cache", [SparseCache(100), AdaptiveCache(0.01, rows=3)])
def test_models_that_repeat_their_key_heads_in_some_passes(cache: Any) -> None:
    plain = decode(Placed(seed=11), [prompt(5)], cache=cache)
    for in_rows in (True, False):
        assert commits(decode(Repeating(11, in_rows), [prompt(5)], cache=cache)) == commits(plain)


def test_attention_that_cannot_be_served() -> None:
    class Biased(Placed):
        def compute(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            n = tokens.shape[1]
            distance = -(torch.arange(n)[:, None] - torch.arange(n)).abs().double()
            return self.at(tokens, torch.arange(n).expand(len(tokens), -1), distance[None, None])

    class ByHand(Placed):
        def __init__(self) -> None:
            super().__init__()
            self.attention = lambda layer, q, k, v, mask: q

    class Shrinking(Placed):
        def forward_at(
            self, tokens: Tensor, positions: Tensor, attention_mask: Tensor | None = None
        ) -> Tensor:
            self.projections, self.outputs = self.projections[:1], self.outputs[:1]
            return super().forward_at(tokens, positions)

    for cache in ("sparse", "adaptive"):
        with pytest.raises(NotImplementedError, match="cache: attention call 0 has a bias, or a mask that"):
            decode(Biased(), [prompt(5)], cache=cache)
        with pytest.raises(ValueError, match=r"cache: .* need a model that calls torch\.nn\.functional"):
            decode(ByHand(), [prompt(5)], cache=cache, policy="confidence")
        with pytest.raises(ValueError, match="cache: the exact pass had 2 attention calls, this 1"):
            decode(Shrinking(), [prompt(5)], cache=cache, policy="confidence")
        with pytest.raises(ValueError, match="cache: ToyModel serves 'none', got "):
            decode(ToyModel(), [prompt(5)], cache=cache)
    with pytest.raises(ValueError, match="guidance_scale: goes with cache='none'"):
        decode(Placed(), [prompt(5)], cache=SparseCache(), guidance_scale=1.0)


class Altered(Placed):
    """A model whose attention is PyTorch's, called with other tensors."""

    def __init__(self, alter: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__(seed=12)
        self.attention = lambda layer, *qkvm: F.scaled_dot_product_attention(*alter(*qkvm), enable_gqa=True)


@pytest.mark.parametrize("cache", ["dual", "sparse", "adaptive"])
def test_attention_that_is_not_among_the_tokens(cache: str) -> None:
    """Registers before the tokens, another text, one row that sums up the others."""
    registers = torch.ones(1, 2, 3, 8, dtype=torch.float64)
    for alter, message in (
        (lambda q, k, v, m: (q, *(torch.cat([registers, x], dim=2) for x in (k, v)), m), "13 .* and 16 keys"),
        (lambda q, k, v, m: (q, registers, registers, m), "13 query rows and 3 keys"),
        (lambda q, k, v, m: (q[:, :, :1], k, v, m), "1 query rows and 13 keys"),
    ):
        with pytest.raises(
            NotImplementedError, match=f"cache: attention call 0 has {message}, in a pass of 13 and 13"
        ):
            decode(Altered(alter), [prompt(5)], cache=cache, policy="confidence")


@pytest.mark.parametrize("cache", ["dual", "sparse", "adaptive"])
def test_attention_that_hides_more_than_padding(cache: str) -> None:
    hidden = torch.arange(13)[None, None, None] > 1
    for prompts in ([prompt(5)], [prompt(5), prompt(1)]):
        model = Altered(lambda q, k, v, m: (q, k, v, hidden if m is None else m & hidden))
        with pytest.raises(NotImplementedError, match="cache: the model's attention hides keys that"):
            decode(model, prompts, cache=cache, policy="confidence")
    same = Altered(
        lambda q, k, v, m: (q, k, v, torch.zeros(1, k.shape[2], dtype=k.dtype) if m is None else m)
    )
    plain = Altered(lambda q, k, v, m: (q, k, v, m))
    for prompts in ([prompt(5)], [prompt(5), prompt(1)]):
        assert commits(decode(same, prompts, cache=cache)) == commits(decode(plain, prompts, cache=cache))


@pytest.mark.parametrize("cache", ["dual", SparseCache(3), AdaptiveCache(0.0, rows=2)])
def test_models_that_answer_objects_or_run_in_inference_mode(cache: Any) -> None:
    class Answer(Placed):
        def compute(self, *arguments: Any, **options: Any) -> Any:
            return SimpleNamespace(logits=super().compute(*arguments, **options))

        def forward_at(self, *arguments: Any) -> Any:
            return SimpleNamespace(logits=super().forward_at(*arguments))

    class Inference(Placed):
        at = torch.inference_mode()(Placed.at)

    prompts = [prompt(5), prompt(2, 1)]
    plain = commits(decode(Placed(), prompts, cache=cache))
    assert commits(decode(Answer(), prompts, cache=cache)) == plain
    assert commits(decode(Inference(), prompts, cache=cache)) == plain


@pytest.mark.parametrize("cache", ["dual", "sparse", "adaptive"])
def test_rows_that_are_not_those_asked_for(cache: str) -> None:
    class Twice(Placed):
        def forward_at(self, *arguments: Any) -> Tensor:
            return super().forward_at(*arguments).repeat(1, 2, 1)

    with pytest.raises(
        ValueError, match=r"forward_at's output: expected shape .* = \[1, 4, 23\], got \[1, 8,"
    ):
        decode(Twice(), [prompt(5)], cache=cache)


def test_a_key_head_that_the_batch_shares() -> None:
    """PyTorch repeats a batch of 1."""
    for cache in ("dual", "sparse", "adaptive"):
        runs = []
        for alter in (
            lambda q, k, v, m: (q, k[:1], v[:1], m),
            lambda q, k, v, m: (q, *(x[:1].expand(len(q), -1, -1, -1) for x in (k, v)), m),
        ):
            runs.append(commits(decode(Altered(alter), [prompt(5), prompt(5, 1)], cache=cache)))
        assert runs[0] == runs[1]


def test_caches_written_as_text() -> None:
    assert parse_cache("sparse") == SparseCache()
    assert parse_cache("sparse:budget=64,refresh=3,max_dropped=0.1,pool=mean/7") == SparseCache(
        64, 3, 0.1, ("mean", 7)
    )
    assert parse_cache("adaptive:threshold=0.5,rows=8") == AdaptiveCache(0.5, 8)
    assert parse_cache("dual") == "dual"
    for text, message in (
        ("dual:budget=3", "cache: expected options of sparse or adaptive alone, got 'dual:budget=3'"),
        ("sparse:rows=3", "cache: expected each of budget, refresh, max_dropped, pool once at most"),
        ("sparse:budget=3,budget=4", "once at most"),
        ("sparse:budget=few", "cache: budget cannot be 'few'"),
        ("sparse:budget=0", r"cache: budget: expected an integer in \[1, inf\), got 0"),
        ("sparse:pool=max", "cache: pool cannot be 'max'"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_cache(text)
    named = decode(Placed(seed=6), [prompt(9)], cache="sparse:budget=2")
    assert commits(named) == commits(decode(Placed(seed=6), [prompt(9)], cache=SparseCache(2)))


def test_compiled_models() -> None:
    """Their graphs break at the attention calls."""
    task = load_task("addition")
    prompts = torch.as_tensor(task.problems(2, 0)[0])
    for cache in (SparseCache(6),):
        runs = []
        for compiled in (False, True):
            model = load_model("addition")
            if compiled:
                model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]
                model.forward_at = torch.compile(model.forward_at, backend="eager")  # type: ignore[method-assign]
            options = {"mask_token_id": model.mask_token_id, "block_length": 4, "policy": "attn-sequential"}
            runs.append(generate(model, prompts, cache=cache, **options).tokens)
        assert torch.equal(*runs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseCache(0), r"budget: expected an integer in \[1, inf\), got 0"),
        (lambda: SparseCache(2.5), "budget: expected an integer, got float"),
        (lambda: SparseCache(refresh=-1), r"refresh: expected an integer in \[0, inf\), got -1"),
        (lambda: SparseCache(max_dropped=1.5), r"max_dropped: expected a number in \[0, 1\], got 1.5"),
        (lambda: SparseCache(pool=("max", 4)), "pool: expected an odd width"),
        (lambda: SparseCache(pool=5), r"pool: expected a tuple \(how, width\) or None, got int"),
        (lambda: AdaptiveCache(-0.1), "threshold: expected a finite number >= 0, got -0.1"),
        (lambda: AdaptiveCache(rows=0), r"rows: expected an integer in \[1, inf\), got 0"),
    ],
)
def test_options_that_are_none(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()
