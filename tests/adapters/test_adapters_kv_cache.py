"""A compressed cache: what follows is what a model says that hides the dropped keys."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="these are tests of its classes")

import transformers
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

import attn_sampler.adapters.transformers as _names  # noqa: F401
from attn_sampler import AttentionCapture, top_columns
from attn_sampler.adapters import kv_cache
from attn_sampler.adapters.kv_cache import compress

N, NEW = 40, 9
SMALL: dict[str, Any] = {
    **{"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.4},
    **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
}
MODELS = {
    "llama": transformers.LlamaConfig(**SMALL),
    "qwen2": transformers.Qwen2Config(**SMALL),
    "qwen2, one layer of three with a sliding window": transformers.Qwen2Config(
        **SMALL,
        use_sliding_window=True,
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
}
IDS = torch.randint(60, (2, N + 1), generator=torch.Generator().manual_seed(0))


def build(config: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation="attn_sampler"
    ).eval()


def votes(rule: str, q: Tensor, k: Tensor, lse: Tensor, count: int) -> Tensor:
    if rule == "H2O":
        return top_columns(
            q, k, softmax_lse=lse, causal=True, count=count, recent=min(4, count // 2)
        ).positions
    last, how = slice(-8, None), {"recent": min(8, count), "pool": ("mean", 5)}
    return top_columns(
        q[:, :, last], k, softmax_lse=lse[:, :, last], causal=True, count=count, **how
    ).positions


@torch.no_grad()
def prefilled(model: Any, rule: str, count: int) -> tuple[DynamicCache, list[Tensor | None]]:
    """The prompt's cache but for its last token, whole, and what is to be kept of it."""
    with AttentionCapture(keep=True) as capture:
        cache = model(IDS[:, :-1], use_cache=True).cache
    kept = [
        None if layer.is_sliding else votes(rule, *seen, count)
        for layer, seen in zip(cache.layers, capture.layers, strict=True)
    ]
    return cache, kept


def hiding(kept: list[Tensor | None]) -> Any:
    """Attention written out, in which what follows the prompt does not see its dropped keys."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        group, n_keys = query.shape[1] // key.shape[1], key.shape[2]
        logits = query @ key.repeat_interleave(group, dim=1).mT * scaling
        if attention_mask is not None:
            logits = logits + attention_mask
        positions = kept[module.layer_idx]
        if positions is not None:
            hidden = torch.ones(*key.shape[:2], n_keys, dtype=torch.bool)
            hidden.scatter_(2, positions, False)[..., N:] = False
            logits = logits.masked_fill(hidden.repeat_interleave(group, dim=1)[:, :, None], -torch.inf)
        output = logits.softmax(-1) @ value.repeat_interleave(group, dim=1)
        return output.transpose(1, 2).contiguous(), None

    return attention


def generated(model: Any, cache: DynamicCache) -> tuple[Tensor, Tensor]:
    """The tokens after the prompt, and their logits."""
    how = {"max_new_tokens": NEW, "do_sample": False}
    result = model.generate(IDS, cache=cache, return_dict_in_generate=True, output_logits=True, **how)
    return result.sequences[:, N + 1 :], torch.stack(result.logits, dim=1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("rule", "count"), [("H2O", 16), ("SnapKV", 16), ("SnapKV", 1), ("H2O", N)])
def test_what_follows_sees_the_keys_that_are_kept(name: str, rule: str, count: int):
    model = build(MODELS[name])
    cache, kept = prefilled(model, rule, count)
    whole = copy.deepcopy(cache)
    AttentionInterface.register("hiding", hiding(kept))
    AttentionMaskInterface.register("hiding", eager_mask)
    truth = copy.deepcopy(model)
    truth.set_attn_implementation("hiding")
    expected, expected_logits = generated(truth, copy.deepcopy(whole))

    compress(cache, kept)
    for layer, positions in zip(cache.layers, kept, strict=True):
        assert layer.get_seq_length() == N
        assert positions is None or layer.keys.shape[2] == layer.values.shape[2] == count
    tokens, logits = generated(model, cache)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(tokens, expected)
    assert cache.get_seq_length() == N + NEW  # the last token's keys are not computed

    plain, plain_logits = generated(model, whole)
    if count == N:
        assert torch.equal(logits, plain_logits)
    else:
        assert (logits - plain_logits).abs().max() > 1e-2
        assert not torch.equal(tokens, plain)


@torch.no_grad()
def test_several_tokens_at_once_and_one_at_a_time_are_the_same():
    model = build(MODELS["llama"])
    more = torch.randint(60, (2, 5), generator=torch.Generator().manual_seed(1))
    cache, kept = prefilled(model, "H2O", 12)
    compress(cache, kept)
    one = copy.deepcopy(cache)
    at_once = model(more, cache=cache).logits
    singly = torch.cat([model(more[:, i : i + 1], cache=one).logits for i in range(5)], dim=1)
    torch.testing.assert_close(at_once, singly, rtol=1e-4, atol=1e-4)
    positions = torch.arange(N, N + 5)[None]
    fresh, kept = prefilled(model, "H2O", 12)
    compress(fresh, kept)
    assert torch.equal(model(more, cache=fresh, position_ids=positions).logits, at_once)


@torch.no_grad()
def test_a_cache_is_compressed_again():
    model = build(MODELS["qwen2"])
    cache, kept = prefilled(model, "H2O", 20)
    once = copy.deepcopy(cache)
    compress(cache, kept)
    compress(cache, [torch.arange(0, 20, 2).expand(2, 2, 10)] * 3)
    compress(once, [positions.sort(dim=-1).values[..., ::2] for positions in kept if positions is not None])
    for first, second in zip(cache.layers, once.layers, strict=True):
        assert torch.equal(first.keys, second.keys)
        assert torch.equal(first.values, second.values)
        assert first.get_seq_length() == second.get_seq_length() == N
    assert torch.equal(generated(model, cache)[0], generated(model, once)[0])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(IDS, cache=cache).logits, model(IDS).logits)


def test_a_cache_follows_its_beams():
    model = build(MODELS["llama"])
    cache, kept = prefilled(model, "H2O", N)
    whole = copy.deepcopy(cache)
    compress(cache, kept)
    for each in (cache, whole):  # as ``generate`` wants a prompt's cache
        each.batch_repeat_interleave(3)
    how = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(IDS, cache=cache, **how), model.generate(IDS, cache=whole, **how))


def test_the_example_runs_as_printed(tmp_path: Path):
    build(MODELS["llama"]).save_pretrained(tmp_path)
    ids = torch.randint(60, (1, 601), generator=torch.Generator().manual_seed(0))
    names: dict[str, Any] = {"path": tmp_path, "ids": ids}
    lines = (line[4:] for line in str(kv_cache.__doc__).splitlines() if line.startswith("    ") or not line)
    with torch.no_grad():
        exec(compile("\n".join(lines), "kv_cache.__doc__", "exec"), names)
    assert all(layer.keys.shape[2] == 512 + 100 for layer in names["cache"].layers)
    assert names["cache"].get_seq_length() == 700


CHOSEN = torch.arange(8).expand(2, 2, 8)
WRONG = {
    "one layer": ([CHOSEN] * 2, ValueError, "positions: expected 3, one a layer, got 2"),
    "no tensor": (
        [CHOSEN, [0], CHOSEN],
        TypeError,
        "positions[1]: expected a tensor [B, Hkv, count], got list",
    ),
    "None": ([CHOSEN, CHOSEN, None], TypeError, "positions[2]: expected a tensor"),
    "int32": ([CHOSEN.int()] * 3, ValueError, "positions[0]: expected dtype int64, got int32"),
    "a head": ([CHOSEN[:, :1]] * 3, ValueError, "positions[0]: expected shape [B, Hkv, count] = [2, 2, 8]"),
    "none": ([CHOSEN[..., :0]] * 3, ValueError, "a count from 1 to the layer's 40 keys, got 0"),
    "too many": ([torch.arange(41).expand(2, 2, 41)] * 3, ValueError, "layer's 40 keys, got 41"),
    "-1": ([CHOSEN, CHOSEN, CHOSEN - 1], ValueError, "positions[2]: expected positions in [0, 40), got -1"),
    "beyond": ([CHOSEN + 33] * 3, ValueError, "positions[0]: expected positions in [0, 40), got 40"),
    "twice": ([CHOSEN // 2 * 2] * 3, ValueError, "positions[0]: expected each position once, got one twice"),
    "counts": ([CHOSEN, CHOSEN, CHOSEN[..., 1:]], ValueError, "the same count for all layers, got [7, 8]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_kept_is_an_error(case: str):
    positions, error, text = WRONG[case]
    cache, _ = prefilled(build(MODELS["llama"]), "H2O", 8)
    before = list(cache.layers)
    with pytest.raises(error) as caught:
        compress(cache, positions)
    assert text in str(caught.value)
    assert cache.layers == before


def test_other_caches_are_refused():
    with pytest.raises(TypeError, match="cache: expected a transformers Cache, got tuple"):
        compress((), [])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="layer 0 to be a DynamicLayer with keys, got one without keys"):
        compress(DynamicCache(config=MODELS["llama"]), [CHOSEN] * 3)
    sliding, _ = prefilled(build(MODELS["qwen2, one layer of three with a sliding window"]), "H2O", 8)
    with pytest.raises(TypeError, match="layer 1 to be a DynamicLayer with keys, got DynamicSlidingWindow"):
        compress(sliding, [CHOSEN] * 3)
