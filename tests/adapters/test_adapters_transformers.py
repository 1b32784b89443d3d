"""The attention implementations and adapters, in real classes of transformers with random weights."""

from __future__ import annotations

import sys
import threading
import types
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="these are tests of its classes")

import transformers

from attn_sampler import AttentionCapture, generate, select_tokens
from attn_sampler.adapters import transformers as adapter
from attn_sampler.adapters.models import adapt
from attn_sampler.sampler import AttnSampler, Confidence

VOCAB, MASK, T = 40, 39, 13
TAU = 0.0165  # of DiffusionGemma's 60 tokens, nearly equally probable without training
COLUMNS = slice(5, 9)
PADDED = torch.arange(T) >= torch.tensor([0, 4])[:, None]
TOKENS = torch.randint(MASK, (2, T), generator=torch.Generator().manual_seed(0))
SMALL = {
    **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "initializer_range": 0.3},
}
LLADA = transformers.LlamaConfig(
    **SMALL, num_key_value_heads=4
)  # LLaDA's shape: as many key heads as query heads
DREAM = transformers.Qwen2Config(
    **SMALL, num_key_value_heads=1
)  # Dream's and Fast-dLLM v2's: grouped heads, biases
SHAPES = {"LLaDA": LLADA, "Dream": DREAM}


def build(shape: str, attention: str, *, causal: bool = False, seed: int = 0) -> torch.nn.Module:
    config = SHAPES[shape].__class__(**SHAPES[shape].to_dict())
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    return model if causal else adapter.make_bidirectional(model)


@torch.no_grad()
def captured(model: torch.nn.Module, **options: Any) -> tuple[Tensor, AttentionCapture]:
    mask = options.pop("attention_mask", None)
    with AttentionCapture(COLUMNS, query_mask=mask, **options) as capture:
        logits = model(TOKENS, attention_mask=mask).logits
    return logits, capture


@torch.no_grad()
def by_eager(shape: str, attention_mask: Tensor | None, *, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Logits and column scores [B, C] of the model that materialises its attention, in float64.

    In float32 for a causal padded model: its eager masks overflow in float64.
    """
    model = build(shape, "eager", causal=causal)
    if attention_mask is None or not causal:
        model = model.double()
    output = model(TOKENS, attention_mask=attention_mask, output_attentions=True)
    weights = torch.stack(output.attentions)  # [L, B, H, M, N]
    if attention_mask is not None:
        weights = weights * attention_mask[:, None, :, None]
    return output.logits.double(), weights.double()[..., COLUMNS].sum(dim=(0, 2, 3))


def flash_attn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stub of flash-attn 2 after its documented signatures; the calls that it got."""
    calls: list[str] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # [H, M, D]
        k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
        logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if causal:
            sees = torch.ones(logits.shape[1:], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
            logits = logits.masked_fill(~sees, -torch.inf)
        return (logits.softmax(dim=-1) @ v).transpose(0, 1), logits.logsumexp(dim=-1)

    def flash_attn_func(  # type: ignore[no-untyped-def]
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, return_attn_probs=False
    ):
        calls.append("dense")
        results = [attend(*x, softmax_scale, causal) for x in zip(q, k, v, strict=True)]
        out, lse = (torch.stack(x) for x in zip(*results, strict=True))
        return (out, lse, None) if return_attn_probs else out

    def flash_attn_varlen_func(  # type: ignore[no-untyped-def]
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=None, causal=False, return_attn_probs=False,
    ):  # fmt: skip
        calls.append("varlen")
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        ends = [cu_seqlens_q.tolist(), cu_seqlens_k.tolist()]
        assert [max(b - a for a, b in pairwise(e)) for e in ends] == [max_seqlen_q, max_seqlen_k]
        pieces = [
            attend(q[a:b], k[c:d], v[c:d], softmax_scale, causal)
            for (a, b), (c, d) in zip(pairwise(ends[0]), pairwise(ends[1]), strict=True)
        ]
        out = torch.cat([piece[0] for piece in pieces])
        return out, torch.cat([piece[1] for piece in pieces], dim=1), None

    module = types.ModuleType("flash_attn")
    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return calls


# --- the attention implementations -----------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attention", ["attn_sampler", "attn_sampler_flex", "attn_sampler_fa2", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_of_a_real_model_are_those_of_its_attention(
    shape: str, attention: str, padded: bool, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = flash_attn(monkeypatch)
    mask = PADDED if padded else None
    model = build(shape, attention, causal=causal)
    logits, capture = captured(model, attention_mask=mask)
    assert capture.num_calls == 3
    assert calls == (["varlen" if padded else "dense"] * 3 if attention == "attn_sampler_fa2" else [])
    true_logits, truth = by_eager(shape, mask, causal=causal)
    torch.testing.assert_close(capture.scores.double(), truth, rtol=1e-4, atol=1e-4)
    visible = torch.ones(2, T, dtype=torch.bool) if mask is None else mask
    torch.testing.assert_close(logits[visible].double(), true_logits[visible], rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(model(TOKENS, attention_mask=mask).logits, logits)  # the capture changes no bit


def test_both_interfaces_are_registered() -> None:
    """A name in AttentionInterface alone would leave the model without a mask, silently."""
    attentions = transformers.AttentionInterface()
    masks = transformers.AttentionMaskInterface()
    for name in ("attn_sampler", "attn_sampler_fa2", "attn_sampler_flex"):
        assert name in attentions
        assert name in masks


@pytest.mark.parametrize("padded", [False, True])
def test_padding_and_grouped_heads_reach_the_kernels(padded: bool) -> None:
    _, capture = captured(
        build("Dream", "attn_sampler"), attention_mask=PADDED if padded else None, keep=True
    )
    layers, options = capture.step_input()
    assert isinstance(layers, list)
    assert [layer.k.shape for layer in layers] == [(2, 1, 4, 8)] * 3  # one key head, not repeated
    assert [layer.q.shape for layer in layers] == [(2, 4, T, 8)] * 3
    if padded:
        assert torch.equal(options["key_mask"], PADDED[:, COLUMNS])
    else:
        assert options["key_mask"] is None
    _, sdpa = captured(build("Dream", "sdpa"), attention_mask=PADDED if padded else None)
    torch.testing.assert_close(capture.scores, sdpa.scores, rtol=1e-5, atol=1e-5)


def test_masks_of_causal_models_are_those_of_sdpa() -> None:
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    options = {"batch_size": 2, "q_length": 3, "kv_length": T, "q_offset": 10, "attention_mask": PADDED}
    options |= {"mask_function": causal_mask_function}
    assert torch.equal(adapter.attention_mask(**options), sdpa_mask(**options))


def test_attention_that_is_not_served_is_refused() -> None:
    q = torch.randn(1, 2, 4, 8)
    module = torch.nn.Module()
    for forward in (adapter.attention_forward, adapter.flex_attention_forward):
        with pytest.raises(NotImplementedError, match="attention with softcap is not served"):
            forward(module, q, q, q, None, softcap=30.0)
    with pytest.raises(NotImplementedError, match="dropout and additive masks"):
        adapter.flex_attention_forward(module, q, q, q, torch.zeros(1, 1, 4, 4))


def test_flash_attn_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    q, module = torch.randn(1, 2, 4, 8), torch.nn.Module()
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ImportError, match="flash_attn"):
        adapter.flash_attention_forward(module, q, q, q, None)
    flash_attn(monkeypatch)
    with pytest.raises(NotImplementedError, match="sliding window"):
        adapter.flash_attention_forward(module, q, q, q, None, sliding_window=2)
    with pytest.raises(NotImplementedError, match="s_aux"):
        adapter.flash_attention_forward(module, q, q, q, None, s_aux=torch.zeros(2))


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attn_with_fewer_rows_than_keys(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last rows of a padded batch; flash-attn's causal mask ends at the last key."""
    flash_attn(monkeypatch)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, h, n, 8, generator=generator) for h, n in ((4, 5), (2, T), (2, T)))
    module = torch.nn.Module()
    for mask in (None, PADDED):
        with AttentionCapture(COLUMNS) as capture:
            output, _ = adapter.flash_attention_forward(module, q, k, v, mask, is_causal=causal)
        sees = torch.ones(2, 1, 5, T, dtype=torch.bool)
        if mask is not None:
            sees = sees & mask[:, None, None, :]
        if causal:
            sees = sees.tril(T - 5)
        logits = q @ k.repeat_interleave(2, dim=1).transpose(-1, -2) * 8**-0.5
        weights = logits.masked_fill(~sees, -torch.inf).softmax(dim=-1)
        truth = (weights @ v.repeat_interleave(2, dim=1)).transpose(1, 2)
        torch.testing.assert_close(output, truth, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            capture.scores, weights[..., COLUMNS].sum(dim=(1, 2)), rtol=1e-5, atol=1e-5
        )


def test_attention_that_is_never_seen() -> None:
    _, capture = captured(build("LLaDA", "eager"))
    with pytest.raises(RuntimeError, match=r"saw no call of .*attn_implementation='eager' in transformers"):
        _ = capture.scores
    _, capture = captured(build("LLaDA", "attn_sampler_flex"), layers=[3])
    with pytest.raises(RuntimeError, match=r"layers: \(3,\) does not fit the 3 attention calls"):
        _ = capture.scores


@torch.no_grad()
@pytest.mark.parametrize("attention", ["attn_sampler", "sdpa"])
def test_compiled_model_is_compiled_once(attention: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = build("Dream", attention)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda tokens: model(tokens, use_cache=False).logits, backend=graphs, fullgraph=True
    )
    options = {"mask_token_id": MASK, "gen_length": 9, "block_length": 4, "policy": "attn-sequential"}
    got = generate(compiled, TOKENS[:1], **options)
    assert got.num_forward_passes.item() == 9
    assert graphs.frame_count == 1  # over blocks and steps
    assert got.tokens.tolist() == generate(model, TOKENS[:1], **options).tokens.tolist()


def test_threads_capture_their_own_model(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_attn(monkeypatch)
    results: dict[str, Tensor] = {}
    barrier = threading.Barrier(2, timeout=60)
    pairs = {"LLaDA": "attn_sampler", "Dream": "attn_sampler_fa2"}
    models = {shape: build(shape, attention) for shape, attention in pairs.items()}

    def run(shape: str) -> None:
        barrier.wait()
        for _ in range(3):
            results[shape] = captured(models[shape])[1].scores

    threads = [threading.Thread(target=run, args=(shape,)) for shape in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for shape, attention in pairs.items():
        assert torch.equal(results[shape], captured(build(shape, attention))[1].scores)


# --- decoding --------------------------------------------------------------------------------------------


def decode(model: torch.nn.Module, prompts: Any, **options: Any) -> Any:
    adapted, found = adapt(model, "bidirectional")
    return generate(
        adapted, prompts, **{**found, "mask_token_id": MASK, "gen_length": 10, "block_length": 4, **options}
    )


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize(("shape", "logit_shift"), [("LLaDA", False), ("Dream", True)])
def test_padded_batches_equal_one_by_one(shape: str, logit_shift: bool, cache: str) -> None:
    model = build(shape, "attn_sampler", seed=1)
    prompts = [TOKENS[0, :n].tolist() for n in (9, 4, 6)]
    options = {"cache": cache, "logit_shift": logit_shift, "pad_token_id": 0}
    for policy in ("attn", "confidence"):
        batch = decode(model, prompts, policy=policy, **options)
        for i, prompt in enumerate(prompts):
            alone = decode(model, [prompt], policy=policy, **options)
            assert batch.tokens[i, 9 - len(prompt) :].tolist() == alone.tokens[0].tolist()
            assert batch.num_forward_passes[i] == alone.num_forward_passes[0]


@torch.no_grad()
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_cached_passes_against_the_model_itself(cache: str) -> None:
    """Rows of the tokens that the cache was made of have the logits and scores of a whole pass."""
    model = build("Dream", "attn_sampler", seed=2)
    adapted, _ = adapt(model, "bidirectional")
    for mask in (None, PADDED):
        logits, past = adapted.forward_rows(TOKENS, slice(0, T), None, attention_mask=mask, store=True)
        plain = adapted(TOKENS, attention_mask=mask)
        visible = torch.ones(2, T, dtype=torch.bool) if mask is None else mask
        torch.testing.assert_close(logits[visible], plain[visible], rtol=1e-4, atol=1e-4)
        rows = slice(5, T) if cache == "prefix" else slice(5, 9)
        past = adapted.crop(past, 5) if cache == "prefix" else past
        for index in (torch.tensor([0, 1]), torch.tensor([1])):
            some = adapted.select(past, index)
            with AttentionCapture(COLUMNS, query_start=5) as capture:
                part, _ = adapted.forward_rows(
                    TOKENS[index, rows],
                    rows,
                    some,
                    attention_mask=None if mask is None else mask[index],
                    store=False,
                )
            torch.testing.assert_close(part, plain[index, rows], rtol=1e-4, atol=1e-4)
            voting = torch.zeros(2, T, dtype=torch.bool)
            voting[:, rows] = True
            with AttentionCapture(COLUMNS, query_mask=voting) as whole:
                adapted(TOKENS, attention_mask=mask)
            torch.testing.assert_close(capture.scores, whole.scores[index], rtol=1e-4, atol=1e-4)
        assert past.get_seq_length() == (5 if cache == "prefix" else T)  # kept as it was


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_block_of_one_pass_agrees_with_no_cache(cache: str) -> None:
    model = build("LLaDA", "attn_sampler", seed=3)
    options = {"policy": "threshold", "tau": 0.0, "gen_length": 12}
    got, plain = (decode(model, TOKENS[:1], cache=c, **options) for c in (cache, "none"))
    assert got.num_forward_passes.tolist() == [3]
    assert torch.equal(got.tokens, plain.tokens)


# --- DiffusionGemma --------------------------------------------------------------------------------------


def diffusion_gemma(attention: str) -> Any:
    from transformers.models.diffusion_gemma.configuration_diffusion_gemma import DiffusionGemmaTextConfig
    from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig

    from attn_sampler.adapters.diffusion_gemma import DiffusionGemmaForAttnSampling

    text = DiffusionGemmaTextConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=8, max_position_embeddings=128, num_experts=4,
        layer_types=["sliding_attention", "full_attention"], top_k_experts=2, moe_intermediate_size=16,
        initializer_range=0.3,
    )  # fmt: skip
    vision = Gemma4VisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, position_embedding_size=16,
    )  # fmt: skip
    config = transformers.DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=8)
    config._attn_implementation = attention
    torch.manual_seed(0)
    return DiffusionGemmaForAttnSampling(config).eval()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "attn_sampler"])
def test_diffusion_gemma_accepts_by_attention(
    attention: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step of ``generate`` against the attention weights of the same pass, made eagerly."""
    from transformers.models.diffusion_gemma import modeling_diffusion_gemma as modeling

    from attn_sampler.adapters.diffusion_gemma import CanvasSampler

    model, eager = diffusion_gemma(attention), diffusion_gemma("eager")
    model.attn_sampler = AttnSampler(tau=TAU)
    received: list[Tensor] = []
    accept, forward = CanvasSampler.accept_canvas, modeling.DiffusionGemmaForBlockDiffusion.forward
    counts: list[int] = []

    def both(**keywords: Any) -> Any:
        received.clear()
        lowest = torch.finfo(torch.float32).min
        masks = {
            kind: None if mask is None else torch.where(mask, 0.0, lowest)
            for kind, mask in keywords["decoder_attention_mask"].items()
        }
        eager(**{**keywords, "decoder_attention_mask": masks})
        return forward(model, **keywords)

    def checked(sampler: Any, current: Tensor, drawn: Tensor, logits: Tensor, step: Tensor) -> Tensor:
        canvas = accept(sampler, current, drawn, logits, step)
        torch.testing.assert_close(sampler.capture.scores, sum(received), rtol=1e-4, atol=1e-4)
        p = logits.softmax(dim=-1).gather(-1, drawn[..., None])[..., 0]
        everywhere = torch.ones_like(drawn, dtype=torch.bool)
        accepted = select_tokens(sampler.capture.scores, p, everywhere, tau=TAU)
        assert torch.equal(sampler.accepted_token_mask, accepted)
        assert torch.equal(canvas, torch.where(accepted, drawn, current))
        counts.extend(accepted.sum(dim=1).tolist())
        return canvas

    for module in eager.modules():
        if isinstance(module, modeling.DiffusionGemmaDecoderTextAttention):
            module.register_forward_hook(lambda *call: received.append(call[2][1][..., -8:].sum(dim=(1, 2))))
    monkeypatch.setattr(CanvasSampler, "accept_canvas", checked)
    monkeypatch.setattr(model, "forward", both)
    prompts = torch.randint(3, 60, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = {"attention_mask": torch.arange(11) >= torch.tensor([0, 3])[:, None]} if padded else {}
    out = model.generate(prompts, max_new_tokens=16, max_denoising_steps=4, **mask)
    assert torch.equal(out.sequences[:, :11], prompts)
    assert out.sequences.shape == (2, 27)
    assert len(counts) > 8  # two canvases of two sequences
    assert min(counts) == 1
    assert max(counts) > 1


@pytest.mark.parametrize(
    "options", [{"threshold": "mean"}, {"fallback": "score"}, {"mode": "sequential", "tau": 0.9}]
)
def test_diffusion_gemma_follows_the_policy(options: dict[str, str]) -> None:
    from attn_sampler.adapters.diffusion_gemma import CanvasSampler

    scores = torch.tensor([[5.0, 4.0, 3.0, 1.0, 2.0], [1.0, 5.0, 2.0, 3.0, 4.0]])
    p = torch.tensor([[0.9, 0.2, 0.8, 0.1, 0.3], [0.3, 0.2, 0.4, 0.1, 0.35]])
    logits = torch.stack([p, 1 - p], dim=-1).log()  # the token drawn is 0
    drawn, canvas = torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64)
    policy = AttnSampler(**{"tau": 0.5, **options})
    sampler = CanvasSampler(policy, 5, 2)
    sampler.capture = types.SimpleNamespace(scores=scores)  # type: ignore[assignment]
    got = sampler.accept_canvas(canvas, drawn, logits, 0)
    expected = {
        "threshold": [[0, 2], [2]],  # above the mean of the unconfident, 7 / 3; where none is, the surest
        "fallback": [[0], [1]],
        "mode": [[0], [1]],
    }[next(iter(options))]
    assert [row.nonzero().flatten().tolist() for row in got == 0] == expected


def test_diffusion_gemma_refuses_other_policies() -> None:
    model = diffusion_gemma("sdpa")
    model.attn_sampler = Confidence()
    with pytest.raises(TypeError, match="attn_sampler: expected an AttnSampler, got Confidence"):
        model.generate(TOKENS, max_new_tokens=8)


def test_diffusion_gemma_refuses_static_caches() -> None:
    with pytest.raises(NotImplementedError, match="Attn-Sampler needs the dynamic cache, got 'static'"):
        diffusion_gemma("sdpa").generate(TOKENS, max_new_tokens=8, cache_implementation="static")


def test_diffusion_gemma_refuses_an_entropy_bound_of_a_call() -> None:
    from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation

    config, bound = generation.DiffusionGemmaGenerationConfig, generation.EntropyBoundSamplerConfig
    assert {name for name in vars(config()) if name[0] != "_"} - {"sampler_config"} == {
        *("max_new_tokens", "max_length", "max_denoising_steps", "t_min", "t_max", "stability_threshold"),
        *("confidence_threshold", "cache_implementation", "cache_config", "disable_compile"),
        *("bos_token_id", "pad_token_id", "eos_token_id", "return_dict_in_generate", "transformers_version"),
    }, "what is served by the model itself"
    model = diffusion_gemma("sdpa")
    model.generation_config = config(sampler_config=bound(entropy_bound=0.3))
    options = {"max_new_tokens": 8, "max_denoising_steps": 1}
    for own in ({}, {"sampler_config": bound(entropy_bound=0.3)}, {"sampler_config": None}):
        model.generate(TOKENS, **options, **own)
    with pytest.raises(ValueError, match=r"sampler_config: expected the checkpoint's, .*entropy_bound=0\.5"):
        model.generate(TOKENS, **options, sampler_config=bound(entropy_bound=0.5))


def test_diffusion_gemma_leaves_nothing_open_after_an_exception() -> None:
    model = diffusion_gemma("eager")
    with pytest.raises(RuntimeError, match="saw no call"):
        model.generate(TOKENS, max_new_tokens=8)
    assert torch._C._len_torch_function_stack() == 0
