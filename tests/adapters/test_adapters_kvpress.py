"""The kvpress adapter, over a stand-in for kvpress' presses (version 0.5.5), or its own."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_toy import needs_installed, sources, stub
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("transformers", reason="these are tests of its classes")

import transformers
from transformers import DynamicCache

from attn_sampler.adapters import untested_version

SOURCE = ("kvpress", "kvpress/presses/base_press.py")
real = pytest.mark.parametrize(
    "adapter", [pytest.param("installed", marks=needs_installed(*SOURCE))], indirect=True
)
NEWER = untested_version("transformers", transformers.__version__, "4.56", "5.3")
CACHE = "past_key_values" if NEWER is None else "cache"  # as transformers calls it
N = 40


@dataclasses.dataclass
class ScorerPress:
    compression_ratio: float = 0.0

    def compress(self, module: Any, hidden: Tensor, keys: Tensor, values: Tensor, *more: Any) -> Any:
        if self.compression_ratio == 0:
            return keys, values
        count = max(1, int(keys.shape[2] * (1 - self.compression_ratio)))
        index = self.score(module, hidden, keys, values, *more).topk(count, dim=-1).indices  # type: ignore[attr-defined]
        return tuple(x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3])) for x in (keys, values))

    def forward_hook(self, module: Any, input: Any, kwargs: dict[str, Any], output: Any) -> Any:
        hidden, cache = kwargs["hidden_states"], kwargs["past_key_values"]
        if kwargs["cache_position"][-1] + 1 == hidden.shape[1]:
            layer = cache.layers[module.layer_idx]
            layer.keys, layer.values = self.compress(
                module, hidden, layer.keys, layer.values, output[1], kwargs
            )
        return output

    @contextlib.contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        with contextlib.ExitStack() as hooks:
            for layer in model.model.layers:
                hook = layer.self_attn.register_forward_hook(self.forward_hook, with_kwargs=True)
                hooks.callback(hook.remove)
            yield


@dataclasses.dataclass
class SnapKVPress(ScorerPress):
    window_size: int = 64
    kernel_size: int = 5

    def score(self, module: Any, hidden: Any, keys: Tensor, values: Any, weights: Tensor, _: Any) -> Tensor:
        return snapkv(weights, keys.shape[1], self.window_size, self.kernel_size)


@dataclasses.dataclass
class PyramidKVPress(SnapKVPress):
    beta: int = 20


@dataclasses.dataclass
class ObservedAttentionPress(ScorerPress):
    def score(self, module: Any, hidden: Any, keys: Tensor, values: Any, weights: Tensor, _: Any) -> Tensor:
        return observed(weights, keys.shape[1])


def get_prerope_query_states(module: Any, hidden: Tensor) -> Tensor:
    width = module.config.num_attention_heads * module.head_dim
    q = module.qkv_proj(hidden)[..., :width] if hasattr(module, "qkv_proj") else module.q_proj(hidden)
    q = q.unflatten(2, (-1, module.head_dim)).transpose(1, 2)
    return module.q_norm(q) if hasattr(module, "q_norm") else q


def snapkv(attentions: Tensor, kv_heads: int, window: int, kernel: int) -> Tensor:
    """kvpress' scores [B, Hkv, N] of these attention weights [B, Hq, N, N]: SnapKV."""
    votes = attentions[:, :, -window:, :-window].mean(dim=2)
    pooled = sum(F.pad(votes, (kernel // 2 - i, i - kernel // 2)) for i in range(kernel)) / kernel
    scores = pooled.unflatten(1, (kv_heads, -1)).mean(dim=2)
    return F.pad(scores, (0, window), value=float(scores.max()) + 1)


def observed(attentions: Tensor, kv_heads: int) -> Tensor:
    """The same: the mean over the queries that may see a key, then over a key head's query heads."""
    later = attentions.shape[3] - torch.arange(attentions.shape[3])
    return (attentions.sum(dim=2) / later).unflatten(1, (kv_heads, -1)).mean(dim=2)


@pytest.fixture(params=sources(*SOURCE))
def adapter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "stand-in":
        presses = {x.__name__: x for x in (SnapKVPress, PyramidKVPress, ObservedAttentionPress)}
        for name in [name for name in sys.modules if name.partition(".")[0] == "kvpress"]:
            monkeypatch.delitem(sys.modules, name)
        stub(
            monkeypatch,
            {
                "kvpress": {"__version__": "0.5.5", **presses},
                "kvpress.utils": {"get_prerope_query_states": get_prerope_query_states},
            },
        )
    return loaded(monkeypatch)


def loaded(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delitem(sys.modules, "attn_sampler.adapters.kvpress", raising=False)
    return importlib.import_module("attn_sampler.adapters.kvpress")


SMALL: dict[str, Any] = {
    **{"vocab_size": 60, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 8, "num_key_value_heads": 2, "initializer_range": 0.3},
    **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "max_position_embeddings": 256},
}
MODELS = {
    "Llama": (transformers.LlamaConfig, {}),
    "Llama, no grouped heads": (transformers.LlamaConfig, {"num_key_value_heads": 8}),
    "Qwen2": (transformers.Qwen2Config, {}),
    "Qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
    "Mistral, sliding window": (transformers.MistralConfig, {"sliding_window": 13}),
    "Phi3, part of each head rotated": (transformers.Phi3Config, {"partial_rotary_factor": 0.5}),
}
IDS = torch.randint(60, (2, N), generator=torch.Generator().manual_seed(0))
WINDOWS = [(8, 5), (1, 1), (N - 1, 3), (16, 21)]  # window, kernel


def build(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    kind, more = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**SMALL | more), attn_implementation=attention)
    return model.to(dtype).eval()


@torch.no_grad()
def scored(press: Any, model: Any, **given: Any) -> list[tuple[tuple[Any, ...], Tensor]]:
    """What the press was asked of each layer of a prompt, and what it answered."""
    calls, score = [], press.score

    def recorded(*asked: Any) -> Tensor:
        calls.append((asked, score(*asked)))
        return calls[-1][1]

    press.score = recorded
    with press(model):
        model(IDS, **{CACHE: DynamicCache()}, **given)
    press.score = score
    return calls


@torch.no_grad()
def attentions(name: str, **given: Any) -> tuple[Tensor, ...]:
    """The weights [B, Hq, N, N] of each layer, written out."""
    return build(name, "eager")(IDS, output_attentions=True, **given).attentions


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padding", [0, 5])
def test_scores_are_those_of_the_attention_weights(adapter: Any, name: str, padding: int):
    mask = torch.arange(N) >= torch.tensor([0, padding])[:, None]
    given = {"attention_mask": mask.long()} if padding else {}
    model, weights = build(name), attentions(name, **given)
    weights = [x * mask[:, None, :, None] for x in weights]  # kvpress' would count padding's own rows
    heads = model.config.num_key_value_heads
    for window, kernel in WINDOWS if not padding else [(8, 5)]:
        press = adapter.SnapKVPress(compression_ratio=0.5, window_size=window, kernel_size=kernel)
        calls = scored(press, model, **given)
        assert len(calls) == 2
        for (asked, scores), layer in zip(calls, weights, strict=True):
            assert scores.dtype == torch.float32
            expected = snapkv(layer, heads, window, kernel)
            for answer in (scores, press.score(*asked)):  # as the layer ran, and computed once more
                torch.testing.assert_close(answer, expected, rtol=0, atol=1e-5)
    press = adapter.ObservedAttentionPress(compression_ratio=0.5)
    for (asked, scores), layer in zip(scored(press, model, **given), weights, strict=True):
        for answer in (scores, press.score(*asked)):
            torch.testing.assert_close(answer, observed(layer, heads), rtol=0, atol=1e-5)


@real
@pytest.mark.parametrize("name", ["Llama", "Llama, no grouped heads", "Qwen2", "Qwen3"])
def test_ranks_are_those_of_kvpress_itself(adapter: Any, name: str):
    kvpress, model = importlib.import_module("kvpress"), build(name)
    for window, kernel in WINDOWS:
        how = {"compression_ratio": 0.5, "window_size": window, "kernel_size": kernel}
        for kind in ("SnapKVPress", "PyramidKVPress"):
            theirs = getattr(kvpress, kind)(**how)
            for asked, scores in scored(getattr(adapter, kind)(**how), model):
                assert asked[4] is None
                assert_ranked(scores, theirs.score(*asked))
    weights = attentions(name)
    theirs = kvpress.ObservedAttentionPress(compression_ratio=0.5)
    calls = scored(adapter.ObservedAttentionPress(compression_ratio=0.5), model)
    for (asked, scores), layer in zip(calls, weights, strict=True):
        assert_ranked(scores, theirs.score(*asked[:4], layer, asked[5]))


def assert_ranked(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    first, second = (x.sort(dim=-1, descending=True, stable=True).indices for x in (ours, theirs))
    swapped = first != second  # only where scores are equal within rounding
    apart = theirs.gather(2, first) - theirs.gather(2, second)
    assert (apart.abs()[swapped] <= 1e-5).all()
    assert swapped.float().mean() < 0.02


PRESSES = {
    "SnapKVPress": {"window_size": 6, "kernel_size": 3},
    "PyramidKVPress": {"window_size": 6, "kernel_size": 3, "beta": 4},
    "ObservedAttentionPress": {},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", PRESSES)
@pytest.mark.parametrize("grouped", [True, False])
def test_a_model_generates_from_what_is_kept(adapter: Any, kind: str, grouped: bool):
    """With eager attention kvpress' own code scores: both must keep the same keys, and go on alike."""
    name = "Llama" if grouped else "Llama, no grouped heads"
    answers, lengths = [], []
    for attention in ("sdpa", "eager"):
        model, press = build(name, attention), getattr(adapter, kind)(0.6, **PRESSES[kind])
        cache = DynamicCache()
        with press(model):
            answers.append(model.generate(IDS, **{CACHE: cache}, max_new_tokens=9, do_sample=False))
        lengths.append([layer.keys.shape[2] for layer in cache.layers])
        assert not any(layer.self_attn._forward_hooks for layer in model.model.layers)
    assert torch.equal(*answers)
    assert lengths[0] == lengths[1]
    if kind != "PyramidKVPress":
        assert lengths[0] == [int(N * 0.4) + 8] * 2
    plain = build(name).generate(IDS, max_new_tokens=9, do_sample=False)
    assert not torch.equal(answers[0], plain)
    with getattr(adapter, kind)(0.0, **PRESSES[kind])(model):
        assert torch.equal(model.generate(IDS, max_new_tokens=9, do_sample=False), plain)


def test_a_press_takes_kvpress_own_options(adapter: Any):
    press = adapter.SnapKVPress(0.25, 32, 7)
    assert (press.compression_ratio, press.window_size, press.kernel_size, press.backend) == (
        *(0.25, 32, 7),
        "auto",
    )
    assert adapter.PyramidKVPress(0.25, 32, 7, 5).beta == 5
    kvpress = sys.modules["kvpress"]
    for kind in PRESSES:
        assert isinstance(getattr(adapter, kind)(), getattr(kvpress, kind))
    assert adapter.SnapKVPress() == adapter.SnapKVPress()


@torch.no_grad()
def test_the_layer_s_own_queries_are_read(adapter: Any, monkeypatch: pytest.MonkeyPatch):
    model, calls = build("Llama"), []
    project = adapter._utils.get_prerope_query_states
    monkeypatch.setattr(
        adapter._utils, "get_prerope_query_states", lambda *given: calls.append(given) or project(*given)
    )
    for kind, how in PRESSES.items():
        press = getattr(adapter, kind)(0.6, **how)
        asked = scored(press, model)[0][0]
        assert not calls
        press.score(*asked)
        assert len(calls) == 1
        calls.clear()


def test_a_layer_that_fails_is_watched_no_longer(adapter: Any):
    model, press = build("Llama"), adapter.ObservedAttentionPress(0.5)
    model.model.layers[1].self_attn.o_proj = nn.Linear(3, 3)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            scored(press, model)
        assert torch._C._len_torch_function_stack() == 0
        assert not any(layer.self_attn._forward_pre_hooks for layer in model.model.layers)


def test_low_precision_and_flash_s_padding(adapter: Any):
    press = adapter.SnapKVPress(0.5, 8, 5)
    for _, scores in scored(press, build("Qwen2", dtype=torch.bfloat16)):
        assert scores.dtype == torch.float32
        assert scores.isfinite().all()
    mask = torch.arange(N) >= torch.tensor([0, 5])[:, None]
    for kind in ("SnapKVPress", "ObservedAttentionPress"):
        for name in ("Llama", "Mistral, sliding window"):
            press = getattr(adapter, kind)(0.5, **PRESSES[kind])
            for asked, scores in scored(press, build(name), attention_mask=mask.long()):
                flat = asked[5] | {"attention_mask": mask}  # as flash-attn is told of it
                again = type(press)(0.5, **PRESSES[kind]).score(*asked[:5], flat)
                torch.testing.assert_close(again, scores, rtol=0, atol=1e-5)


@real
def test_kvpress_pipeline(adapter: Any):
    kvpress = importlib.import_module("kvpress")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(59)} | {"[UNK]": 59}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="w0")
    text = " ".join(f"w{i}" for i in IDS[0, :30].tolist())
    answers = []
    for attention in ("sdpa", "eager"):
        pipe = kvpress.KVPressTextGenerationPipeline(model=build("Llama", attention), tokenizer=fast)
        for kind, how in PRESSES.items():
            press = getattr(adapter, kind)(0.6, **how)
            answers.append(pipe(" " + text, question="w3 w4", press=press, max_new_tokens=6)["answer"])
    assert answers[:3] == answers[3:]
    assert all(len(answer.split()) == 6 for answer in answers)


@real
@pytest.mark.skipif(NEWER is not None, reason=f"kvpress 0.5.5's own hooks do not run here: {NEWER}")
@torch.no_grad()
def test_inside_a_press_of_kvpress(adapter: Any):
    kvpress, answers = importlib.import_module("kvpress"), []
    for source in (adapter, kvpress):
        for wrap in (kvpress.AdaKVPress, lambda press: kvpress.ChunkPress(press, chunk_length=20)):
            press, model = wrap(source.SnapKVPress(0.6, 6, 3)), build("Llama")
            with press(model):
                answers.append(model.generate(IDS[:1], max_new_tokens=6, do_sample=False))
    assert torch.equal(answers[0], answers[2])
    assert torch.equal(answers[1], answers[3])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"compression_ratio": 1}, ValueError, "compression_ratio: expected a number in [0, 1), got 1"),
        ({"compression_ratio": -0.1}, ValueError, "compression_ratio: expected a number in [0, 1), got -0.1"),
        ({"compression_ratio": float("nan")}, ValueError, "compression_ratio: expected a number in [0, 1)"),
        ({"compression_ratio": "1"}, TypeError, "compression_ratio: expected a number in [0, 1), got str"),
        ({"window_size": 0}, ValueError, "window_size: expected an integer in [1, inf), got 0"),
        ({"window_size": 8.0}, TypeError, "window_size: expected an integer, got float"),
        ({"kernel_size": 4}, ValueError, "kernel_size: expected an odd number, got 4"),
        ({"backend": "tpu"}, ValueError, "backend: expected one of "),
    ],
)
def test_wrong_options_are_named(adapter: Any, options: dict[str, Any], error: type, text: str):
    for kind in ("SnapKVPress", "PyramidKVPress"):
        with pytest.raises(error) as caught:
            getattr(adapter, kind)(**options)
        assert text in str(caught.value)


def test_what_is_not_served_is_named(adapter: Any):
    model, snap = build("Llama"), adapter.SnapKVPress(0.5, N)
    with pytest.raises(
        ValueError, match=f"window_size: expected less than the {N} keys of the prompt, got {N}"
    ):
        scored(snap, model)
    snap, every = adapter.SnapKVPress(0.5, 8), adapter.ObservedAttentionPress(0.5)
    with pytest.raises(ValueError, match="past_key_values: there is no cache to compress"), snap(model):
        model(IDS, use_cache=False)
    bias = torch.randn(1, 1, N, N)
    for press in (snap, every):
        with pytest.raises(NotImplementedError, match="attention_mask: neither padding nor a sliding window"):
            scored(press, model, attention_mask=bias)
    sliding = build("Mistral, sliding window")
    with (
        pytest.raises(NotImplementedError, match=f"layer 0 has 12 keys for {N} queries"),
        torch.no_grad(),
        every(sliding),
    ):
        sliding(IDS, **{CACHE: DynamicCache(config=sliding.config)})
    for name, value in {"attn_logit_softcapping": 30.0, "sinks": nn.Parameter(torch.zeros(8))}.items():
        setattr(model.model.layers[0].self_attn, name, value)
        with pytest.raises(NotImplementedError, match=f"{name}: .* are not served"):
            scored(adapter.ObservedAttentionPress(0.5), model)
        delattr(model.model.layers[0].self_attn, name)


def test_without_kvpress(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(
        ImportError, match=r"kvpress cannot be imported \(.*\): pip install 'attn_sampler\[kv"
    ):
        loaded(monkeypatch)
