"""The adapters of published models, on stand-ins for their code, and decoding with caches."""

from __future__ import annotations

import sys
import types
from typing import Any

import published_models as published
import pytest
import torch
from published_models import MASK
from torch import Tensor

pytest.importorskip("transformers", reason="the caches of the adapters are those of transformers")

from attn_sampler import AttentionCapture, generate
from attn_sampler.adapters.models import FAMILIES, SDAR, LLaDA, adapt

BIDIRECTIONAL = {"llada": published.FastLLaDA, "dream": published.FastDream}
BLOCK_CAUSAL = {
    "sdar": published.SDARForCausalLM,
    "fast-dllm-v2": published.FastDLLMv2ForCausalLM,
    "llada2": published.LLaDA2MoeModelLM,
}
ALL = BIDIRECTIONAL | BLOCK_CAUSAL


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(MASK, (length,), generator=generator).tolist()


def decode(model: torch.nn.Module, prompts: Any, family: str | None = None, **options: Any) -> Any:
    adapter, found = adapt(model, family)
    found.pop("eos_token_id")  # outside these small vocabularies
    return generate(
        adapter, prompts, **{**found, "gen_length": 11, "block_length": 4, "trace": True, **options}
    )


def commits(generation: Any) -> list[tuple]:
    return [(c.sequence, c.step, c.position, c.token) for c in generation.trace.commits]


def assert_same_decoding(one: Any, other: Any, tolerance: float = 1e-4) -> None:
    assert commits(one) == commits(other)
    for field in ("score", "confidence"):
        values = [torch.tensor([getattr(c, field) for c in g.trace.commits]) for g in (one, other)]
        torch.testing.assert_close(*values, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name", ALL)
def test_families_are_found_with_their_facts(name: str) -> None:
    adapter, options = adapt(ALL[name]())
    facts = FAMILIES[name]
    assert type(adapter) is facts.adapter
    assert adapter.causal_block == facts.causal_block
    expected = {"mask_token_id": MASK, "eos_token_id": facts.end_token_id, "logit_shift": facts.logit_shift}
    assert options == {**expected, "block_length": facts.block_length}


def test_facts_named_by_the_config_come_first() -> None:
    adapter, options = adapt(published.SDARForCausalLM(block_size=16))
    assert (adapter.causal_block, options["block_length"]) == (16, 4)
    adapter, options = adapt(published.FastDLLMv2ForCausalLM(bd_size=4))
    assert (adapter.causal_block, options["block_length"]) == (4, 4)
    model = published.SDARForCausalLM()
    model.config.mask_token_id = None
    assert adapt(model)[1]["mask_token_id"] == 151669


def test_unknown_families() -> None:
    model = published.FastLLaDA()
    with pytest.raises(ValueError, match=r"family: expected one of llada, .*, got 'gpt'"):
        adapt(model, "gpt")
    model.config.model_type = "gpt2"
    with pytest.raises(ValueError, match="got model_type 'gpt2'"):
        adapt(model)
    assert type(adapt(model, "llada")[0]) is LLaDA


@pytest.mark.parametrize("causal_block", [0, -4, True, 8.0, None])
def test_block_lengths_that_are_none(causal_block: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="causal_block: "):
        SDAR(published.SDARForCausalLM(), causal_block)
    if causal_block is not None:
        adapter, _ = adapt(published.SDARForCausalLM())
        adapter.causal_block = causal_block
        with pytest.raises((TypeError, ValueError), match="causal_block: expected an integer"):
            generate(adapter, [[1, 2]], mask_token_id=MASK, gen_length=4, block_length=4)


# --- without a cache: the model is called as its own decoder calls it -----------------------------------


@pytest.mark.parametrize("name", BLOCK_CAUSAL)
def test_block_causal_logits_against_attention_written_out(name: str) -> None:
    """A position's logits are those of the sequence that ends with its block."""
    model = ALL[name](seed=3)
    adapter, _ = adapt(model)
    adapter.causal_block = 4
    tokens = torch.tensor([prompt(10), prompt(10, 1)])
    logits = adapter(tokens)
    for stop in (4, 8, 10):
        torch.testing.assert_close(logits[:, :stop], adapter(tokens[:, :stop]), rtol=1e-4, atol=1e-4)
    changed = tokens.clone()
    changed[:, 8] = (changed[:, 8] + 1) % MASK
    assert torch.equal(adapter(changed)[:, :8], logits[:, :8])  # the last block is not seen
    assert not torch.allclose(adapter(changed)[:, 9], logits[:, 9])  # but both ways inside


@pytest.mark.parametrize("policy", ["attn", "attn-sequential", "confidence"])
@pytest.mark.parametrize("name", BLOCK_CAUSAL)
def test_block_causal_decoding_written_out(name: str, policy: str) -> None:
    """Position by position from logits of the sequence up to the end of the model's block."""
    model, shift = ALL[name](seed=4, bd_size=8, block_size=8), FAMILIES[name].logit_shift
    got = decode(model, [prompt(6)], policy=policy, **({"tau": 0.3} if policy == "attn" else {}))
    adapter, _ = adapt(model)
    tokens = torch.tensor([prompt(6) + [MASK] * 11])
    for start in range(4, 17, 4):
        stop, end = min(start + 4, 17), min((start // 8 + 1) * 8, 17)
        while (tokens[:, start:stop] == MASK).any():
            with torch.no_grad(), AttentionCapture(slice(start, stop)) as capture:
                logits = adapter(tokens[:, :end])[0]
            logits[:, MASK] = -torch.inf
            p, best = logits.softmax(dim=-1).max(dim=-1)
            if shift:
                p, best = p.roll(1), best.roll(1)
            score = dict(zip(range(start, stop), capture.scores[0].tolist(), strict=True))
            open_ = [i for i in range(start, stop) if tokens[0, i] == MASK]
            by_p = max(open_, key=lambda i: float(p[i]))
            chosen = [by_p] if policy == "confidence" else [max(open_, key=score.__getitem__)]
            if policy == "attn":
                low = [score[i] for i in open_ if p[i] < 0.3]
                chosen = [i for i in open_ if p[i] >= 0.3 and score[i] > max(low, default=-1.0)] or [by_p]
            for i in chosen:
                tokens[0, i] = best[i]
    assert got.tokens.tolist() == tokens.tolist()


def test_blocks_of_a_block_causal_model_are_counted_from_its_start() -> None:
    blocks = []
    decode(published.FastDLLMv2ForCausalLM(bd_size=8), [prompt(6)], on_step=lambda e: blocks.append(e.block))
    assert {(b.start, b.stop) for b in blocks} == {(4, 8), (8, 12), (12, 16), (16, 17)}
    with pytest.raises(
        ValueError, match="block_length: expected a divisor of the model's blocks of 8, got 3"
    ):
        decode(published.FastDLLMv2ForCausalLM(bd_size=8), [prompt(6)], block_length=3)


# --- with a cache ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["attn", "attn-sequential", "confidence", "klass"])
@pytest.mark.parametrize("name", ["sdar", "fast-dllm-v2"])
def test_block_causal_decoding_is_the_same_with_a_cache(name: str, policy: str) -> None:
    prompts = [prompt(6), prompt(6, 1), prompt(6, 2)]
    options: dict[str, Any] = {"policy": policy, "gen_length": 19, "query_rows": "masked"}
    if policy == "attn":
        options["tau"] = 0.3
    models = [ALL[name](seed=5, bd_size=8, block_size=8) for _ in range(2)]
    plain = decode(models[0], prompts, **options)
    cached = decode(models[1], prompts, cache="prefix", **options)
    assert_same_decoding(plain, cached)
    assert max(models[0].rows_run) == 25
    assert max(models[1].rows_run) == 8  # a block of the model at a time


@pytest.mark.parametrize("cache", ["none", "prefix"])
def test_ends_of_text_and_infilling_with_a_block_causal_cache(cache: str) -> None:
    """Sequences that have ended, and blocks in which some have nothing to fill, leave and enter the cache."""
    prompts = torch.tensor([prompt(21, i) for i in range(3)])
    prompts[0, 2], prompts[1, 9], prompts[2, 2], prompts[2, 18] = MASK, MASK, MASK, MASK
    model = published.SDARForCausalLM(seed=6, block_size=4)
    options = {"gen_length": 12, "policy": "attn-sequential", "cache": cache}
    free = decode(model, prompts, **options)
    ended = int(free.tokens[1, 22])
    batch = decode(model, prompts, eos_token_id=ended, **options)
    assert (batch.tokens[1, 23:] == ended).all()
    for i in range(3):
        alone = decode(model, prompts[i : i + 1], eos_token_id=ended, **options)
        assert torch.equal(batch.tokens[i], alone.tokens[0])
        assert batch.num_forward_passes[i] == alone.num_forward_passes[0]


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_bidirectional_caches_run_the_rows_that_they_say(name: str, cache: str) -> None:
    model = ALL[name](seed=7)
    decode(model, [prompt(5)], policy="left-to-right", gen_length=8, cache=cache)
    early = int(FAMILIES[name].logit_shift)
    rest = {"prefix": [8 + early, 4 + early], "dual": [4 + early] * 2}[cache]
    assert model.rows_run == [13, *[rest[0]] * 3, 13, *[rest[1]] * 3]


@pytest.mark.parametrize("policy", ["attn-sequential", "confidence"])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_bidirectional_caches_against_attention_written_out(name: str, cache: str, policy: str) -> None:
    """Every pass after a block's first: its rows against the first pass's keys of all other positions."""
    model = ALL[name](seed=8).double()
    got = decode(model, [prompt(5)], policy=policy, gen_length=8, cache=cache)
    tokens, shift = torch.tensor([prompt(5) + [MASK] * 8]), int(FAMILIES[name].logit_shift)
    for start in (5, 9):
        first = tokens.clone()  # what the cached keys were made of
        rows = list(range(start - shift, 13 if cache == "prefix" else start + 4))
        for step in range(4):
            logits, scores = written_out(model, first, tokens, rows if step else list(range(13)))
            logits[:, MASK] = -torch.inf
            p, best = logits.softmax(dim=-1).max(dim=-1)
            open_ = [i for i in range(start, start + 4) if tokens[0, i] == MASK]
            value = scores if policy == "attn-sequential" else {i: float(p[i - shift]) for i in open_}
            chosen = max(open_, key=value.__getitem__)
            tokens[0, chosen] = best[chosen - shift]
    assert got.tokens.tolist() == tokens.tolist()


def written_out(
    model: published.StandIn, first: Tensor, tokens: Tensor, rows: list[int]
) -> tuple[Tensor, dict[int, float]]:
    """Logits [T, V] of the rows, and the attention that each position receives from them, by plain softmax.

    Keys of the rows are of this pass, of other positions of the pass over the tokens ``first``.
    """
    D, H = published.D, published.HEADS
    norm = torch.nn.functional.rms_norm

    def layer_parts(layer: Any, x: Tensor) -> tuple[Tensor, ...]:
        h = norm(x, (H * D,))
        q, k, v = (
            published.split(linear(h), heads)
            for linear, heads in ((layer.q, H), (layer.k, published.KV_HEADS), (layer.v, published.KV_HEADS))
        )
        return published.rope(q, 0), published.repeated(published.rope(k, 0)), published.repeated(v)

    cached, now = model.embedding(first), model.embedding(tokens)
    received = torch.zeros(tokens.shape[1], dtype=torch.float64)
    for layer in model.layers:
        _, old_k, old_v = layer_parts(layer, cached)
        q, k, v = layer_parts(layer, now)
        k_used, v_used = old_k.clone(), old_v.clone()
        k_used[:, :, rows], v_used[:, :, rows] = k[:, :, rows], v[:, :, rows]
        weights = (q[:, :, rows] @ k_used.transpose(-1, -2) * D**-0.5).softmax(dim=-1)
        received += weights.sum(dim=(0, 1, 2))

        def add(x: Tensor, y: Tensor, layer: Any = layer) -> Tensor:
            x = x + layer.o(y.transpose(1, 2).flatten(2))
            return x + torch.nn.functional.silu(layer.up(norm(x, (H * D,))))

        q_old, _, _ = layer_parts(layer, cached)
        old = (q_old @ old_k.transpose(-1, -2) * D**-0.5).softmax(dim=-1) @ old_v
        cached = add(cached, old)
        y = torch.zeros_like(old)
        y[:, :, rows] = weights @ v_used
        now = add(now, y)
    return model.head(norm(now, (H * D,)))[0], dict(enumerate(received.tolist()))


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_sequences_that_finish_a_block_early_leave_its_cache(name: str, cache: str) -> None:
    prompts = torch.tensor([prompt(12, i) for i in range(3)])
    for i, filled in enumerate((slice(4, 5), slice(4, 8), slice(6, 12))):
        prompts[i, filled] = MASK
    model = ALL[name](seed=9)
    options = {"gen_length": 4, "policy": "attn-sequential", "cache": cache}
    batch = decode(model, prompts, **options)
    for i in range(3):
        alone = decode(model, prompts[i : i + 1], **options)
        assert torch.equal(batch.tokens[i], alone.tokens[0])
        mine = [c[1:] for c in commits(batch) if c[0] == i]
        assert mine == [c[1:] for c in commits(alone)]


@pytest.mark.parametrize("name", [*BIDIRECTIONAL, "sdar", "fast-dllm-v2"])
def test_caches_of_an_empty_prompt(name: str) -> None:
    options: dict[str, Any] = {"policy": "threshold", "tau": 0.0, "gen_length": 9}
    plain = decode(ALL[name](seed=12, block_size=4, bd_size=4), [[]], **options)
    for cache in adapt(ALL[name]())[0].caches:
        cached = decode(ALL[name](seed=12, block_size=4, bd_size=4), [[]], cache=cache, **options)
        assert_same_decoding(plain, cached)


def test_caches_that_a_model_does_not_serve() -> None:
    hub = published.PublishedLLaDA()  # the code on the hub takes no cache
    with pytest.raises(ValueError, match="cache: LLaDA serves 'none', got 'prefix'"):
        decode(hub, [prompt(5)], cache="prefix")
    with pytest.raises(
        ValueError, match="cache: SDAR serves 'none', 'prefix', 'sparse', 'adaptive', got 'dual'"
    ):
        decode(published.SDARForCausalLM(), [prompt(5)], cache="dual")
    with pytest.raises(ValueError, match="cache: LLaDA2 serves 'none', got 'prefix'"):
        decode(published.LLaDA2MoeModelLM(), [prompt(5)], cache="prefix")
    with pytest.raises(ValueError, match="cache: function serves 'none', got 'dual'"):
        generate(lambda tokens: tokens, [prompt(5)], mask_token_id=MASK, gen_length=1, cache="dual")
    with pytest.raises(
        ValueError, match="cache: expected one of none, prefix, dual, sparse, adaptive, got 'all'"
    ):
        decode(hub, [prompt(5)], cache="all")


# --- padding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model", "lengths", "cache"),
    [
        ("llada", published.PublishedLLaDA, (9, 3, 6), "none"),
        ("dream", published.FastDream, (9, 3, 6), "none"),
        ("dream", published.FastDream, (9, 3, 6), "prefix"),
        ("dream", published.FastDream, (9, 3, 6), "dual"),
        ("sdar", published.SDARForCausalLM, (9, 1, 5), "none"),
        ("sdar", published.SDARForCausalLM, (9, 1, 5), "prefix"),
        ("llada2", published.LLaDA2MoeModelLM, (37, 5), "none"),
    ],
)
@pytest.mark.parametrize("policy", ["attn", "confidence"])
def test_a_padded_batch_equals_one_by_one(
    name: str, model: Any, lengths: tuple[int, ...], cache: str, policy: str
) -> None:
    network = model(seed=10)
    prompts = [prompt(n, seed=n) for n in lengths]
    batch = decode(network, prompts, policy=policy, cache=cache, pad_token_id=0)
    for i, tokens in enumerate(prompts):
        alone = decode(network, [tokens], policy=policy, cache=cache)
        padding = max(lengths) - len(tokens)
        assert batch.tokens[i, padding:].tolist() == alone.tokens[0].tolist()
        assert batch.num_forward_passes[i] == alone.num_forward_passes[0]


@pytest.mark.parametrize("model", [published.FastLLaDA, published.FastDLLMv2ForCausalLM])
def test_models_that_ignore_padding_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=f"attention_mask: {model.__name__} ignores it"):
        decode(model(bd_size=4), [prompt(8), prompt(4)], pad_token_id=0)
    decode(model(bd_size=4), [prompt(8), prompt(8, 1)], gen_length=4)  # nothing is padded


def test_prompts_that_fit_no_common_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"agree modulo 4, got lengths \[8, 5\]"):
        decode(published.SDARForCausalLM(), [prompt(8), prompt(5)], pad_token_id=0)


# --- flash-attn in remote code ---------------------------------------------------------------------------


def flash_attn_stub(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """A stand-in for flash-attn 2: [B, M, H, D], no torch attention inside, (out, lse, None) on demand."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    out = (logits.softmax(dim=-1) @ v).transpose(1, 2)
    return (out, logits.logsumexp(dim=-1), None) if return_attn_probs else out


@pytest.mark.parametrize("cache", ["none", "prefix"])
def test_sdar_with_flash_attn_decodes_as_without(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"policy": "attn-sequential", "cache": cache}
    plain = decode(published.SDARForCausalLM(seed=11), [prompt(6)], **options)
    monkeypatch.setattr(published, "flash_attn_func", flash_attn_stub)
    flash = decode(published.SDARForCausalLM(seed=11), [prompt(6)], **options)
    assert_same_decoding(plain, flash)
    assert published.flash_attn_func is flash_attn_stub  # given back


def test_flash_attn_is_given_back_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    from attn_sampler.adapters.remote_code import reported_flash_attention

    module = types.ModuleType("remote")
    module.flash_attn_func = flash_attn_stub
    monkeypatch.setitem(sys.modules, "remote", module)
    with reported_flash_attention(module):
        inside = module.flash_attn_func
        with pytest.raises(ZeroDivisionError), reported_flash_attention(module):
            raise ZeroDivisionError
        assert module.flash_attn_func is inside  # the outer one is still open
        assert inside is not flash_attn_stub
    assert module.flash_attn_func is flash_attn_stub
    empty = types.ModuleType("empty")
    with reported_flash_attention(empty):
        assert not hasattr(empty, "flash_attn_func")
