"""The library's own caches around the models that serve them: stand-ins for remote code, and real classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import published_models as published
import pytest
import torch
from published_models import MASK
from torch import Tensor

pytest.importorskip("transformers", reason="the models are its classes")

import transformers

from attn_sampler import AttentionCapture, generate
from attn_sampler.adapters.models import adapt
from attn_sampler.adapters.transformers import make_bidirectional
from attn_sampler.caching import AdaptiveCache, ForwardPasses, SparseCache

VOCAB = published.VOCAB


def real(model_type: str, seed: int = 0, **options: Any) -> torch.nn.Module:
    """A small model of one of transformers' classes, a causal one made bidirectional."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.3}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    is_causal = model_type in ("llama", "qwen2")
    grouped = {"num_key_value_heads": 2} if is_causal else {}
    config = transformers.AutoConfig.for_model(model_type, **{**sizes, **ids, **grouped, **options})
    torch.manual_seed(seed)
    kind = transformers.AutoModelForCausalLM if is_causal else transformers.AutoModelForMaskedLM
    model = kind.from_config(config, attn_implementation="attn_sampler" if is_causal else "sdpa").eval()
    return make_bidirectional(model) if is_causal else model


#: How each is made, its family, what it caches itself, and whether a padded batch can be decoded.
MODELS: dict[str, tuple[Callable[..., torch.nn.Module], str, str | None, bool]] = {
    "llada": (published.FastLLaDA, "llada", "dual", False),
    "dream": (published.FastDream, "dream", "dual", True),
    "sdar": (lambda seed: published.SDARForCausalLM(seed, block_size=4), "sdar", "prefix", True),
    "fast-dllm-v2": (
        lambda seed: published.FastDLLMv2ForCausalLM(seed, bd_size=8),
        "fast-dllm-v2",
        "prefix",
        False,
    ),
    "llama": (lambda seed: real("llama", seed), "bidirectional", "dual", True),
    "qwen2": (lambda seed: real("qwen2", seed), "bidirectional", "dual", True),
    "bert": (lambda seed: real("bert", seed), "masked-lm", None, True),
    "albert": (lambda seed: real("albert", seed, embedding_size=16), "masked-lm", None, True),
    "roberta": (lambda seed: real("roberta", seed), "masked-lm", None, True),
    "esm": (
        lambda seed: real("esm", seed, position_embedding_type="rotary", mask_token_id=MASK),
        "masked-lm",
        None,
        True,
    ),
    "eurobert": (lambda seed: real("eurobert", seed), "masked-lm", None, True),
}


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, MASK, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def decode(name: str, prompts: Any, seed: int = 1, **options: Any) -> Any:
    make, family, _, _ = MODELS[name]
    adapter, found = adapt(make(seed=seed), family)
    found |= {"mask_token_id": MASK, "block_length": 4, "gen_length": 8, "policy": "attn-sequential"}
    found.pop("eos_token_id", None)
    return generate(adapter, prompts, **{**found, **options})


@torch.no_grad()
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_rows_beside_the_keys_of_a_whole_pass(name: str, is_padded: bool) -> None:
    """While the tokens are the same, logits and scores of the block's rows are those of the whole pass."""
    make, family, own, serves_padding = MODELS[name]
    if is_padded and not serves_padding:
        pytest.skip(f"the published code of {name} reads no padding")
    adapter, options = adapt(make(seed=2), family)
    tokens = torch.tensor([prompt(8) + [MASK] * 8, prompt(8, 1) + [MASK] * 8])
    visible, block, both = torch.ones(2, 16, dtype=torch.bool), slice(8, 12), torch.tensor([0, 1])
    visible[1, : 4 * is_padded] = False
    mask = visible if is_padded else None
    for cache in (SparseCache(100), AdaptiveCache(0.0, rows=3), own or "dual"):
        passes = ForwardPasses(adapter, cache, options["logit_shift"])
        passes.begin(tokens, mask)
        passes.enter(tokens, mask, block)
        logits, scores = [], []
        for _ in range(3):
            rows = passes.rows(block, 16)
            columns, start = passes.places(block, 16)
            voting = torch.zeros(2, rows.stop - rows.start + passes.num_extra, dtype=torch.bool)
            voting[:, block.start - rows.start : block.stop - rows.start] = True
            with AttentionCapture(columns, query_start=start, query_mask=voting) as capture:
                output = passes.logits(tokens, mask, block, both)
            logits.append(output[:, block.start - rows.start : block.stop - rows.start].nan_to_num())
            scores.append(capture.scores)
        for other in (1, 2):
            torch.testing.assert_close(logits[other], logits[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(scores[other], scores[0], rtol=1e-4, atol=1e-4)
        if isinstance(cache, SparseCache):
            assert passes.dropped.abs().max() < 1e-5


@pytest.mark.parametrize("name", [name for name, (_, _, own, _) in MODELS.items() if own])
def test_full_budgets_decode_as_the_model_s_own_cache(name: str) -> None:
    own = MODELS[name][2]
    expected = decode(name, [prompt(6), prompt(6, 1)], cache=own)
    for cache in (SparseCache(100), AdaptiveCache(1e9)):
        got = decode(name, [prompt(6), prompt(6, 1)], cache=cache)
        assert got.tokens.tolist() == expected.tokens.tolist()
        assert got.num_rows.tolist() == expected.num_rows.tolist()


@pytest.mark.parametrize("cache", [SparseCache(3, refresh=2), AdaptiveCache(0.001, rows=2)])
@pytest.mark.parametrize("name", MODELS)
def test_small_budgets_alone_and_in_a_batch(name: str, cache: Any) -> None:
    lengths = (8, 4, 8) if MODELS[name][3] else (8, 8, 8)
    prompts = [prompt(n, i) for i, n in enumerate(lengths)]
    options = {"cache": cache, "pad_token_id": 0, "policy": "attn", "tau": 0.9}
    batch = decode(name, prompts, **options)
    exact = decode(name, prompts, **{**options, "cache": "none"})
    assert not (batch.tokens == MASK).any()
    for i, one in enumerate(prompts):
        alone = decode(name, [one], **options)
        assert batch.tokens[i, 8 - len(one) :].tolist() == alone.tokens[0].tolist()
    assert batch.num_rows.sum() < exact.num_rows.sum()


def test_stale_rows_of_models_that_run_rows_in_one_piece_are_renewed_by_a_whole_pass() -> None:
    model = published.FastLLaDA(seed=3)
    adapter, _ = adapt(model, "llada")
    options = {"mask_token_id": MASK, "gen_length": 8, "block_length": 4, "policy": "left-to-right"}
    generate(adapter, [prompt(5)], cache=AdaptiveCache(0.0), **options)
    # A pass over the block tells that rows outside it have become stale.
    assert model.rows_run == [13, 4, 13, 4, 13, 4, 13, 4]


def test_flash_attention_of_remote_code_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def flash_attn(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
        calls.append(q.shape[1])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        logits = q @ k.repeat_interleave(2, dim=1).transpose(-1, -2) * published.D**-0.5
        output = (logits.softmax(dim=-1) @ v.repeat_interleave(2, dim=1)).transpose(1, 2)
        return (output, logits.logsumexp(dim=-1), None) if options.get("return_attn_probs") else output

    calls: list[int] = []
    expected = [decode("sdar", [prompt(6)], cache=cache) for cache in (SparseCache(3), "prefix")]
    monkeypatch.setattr(published, "flash_attn_func", flash_attn)
    got = [decode("sdar", [prompt(6)], cache=SparseCache(3))]
    assert calls == [4] * 6  # what goes before each of three blocks, in two layers
    got.append(decode("sdar", [prompt(6)], cache="prefix"))
    for one, other in zip(got, expected, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()


@pytest.mark.parametrize("cache", ["sparse", "adaptive"])
def test_models_whose_rows_cannot_run_by_themselves(cache: str) -> None:
    for name, options, kind, message in (
        ("esm", {"token_dropout": True}, ValueError, "cache: EsmForMaskedLM computes rows that run by them"),
        ("modernbert", {"local_attention": 4}, NotImplementedError, "a mask that differs between rows"),
    ):
        adapter, _ = adapt(real(name, mask_token_id=MASK, **options), "masked-lm")
        with pytest.raises(kind, match=message):
            generate(
                adapter,
                [prompt(8)],
                mask_token_id=MASK,
                gen_length=8,
                block_length=4,
                cache=cache,
                policy="attn",
            )
