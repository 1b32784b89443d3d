"""The dInfer adapter, driven by a stand-in for dInfer's loops (commit fce4e32), or by the installed ones."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_toy import load, needs_installed, parameters, stub
from torch import Tensor
from torch.nn import functional as F
from toy_model import EOS, MASK, ToyModel, rotate

from attn_sampler import generate, reference

SOURCE = ("dinfer", "dinfer/decoding/generate_uniform.py")
PROMPT = torch.tensor([[5, 7, 2, 9, 11], [1, 4, 8, 6, 6]])
NEW, BLOCK = 8, 4


class CachedToy(ToyModel):
    """Called as dInfer calls LLaDA: with all tokens, or with some and the keys and values of all."""

    device = torch.device("cpu")

    def forward(
        self,
        tokens: Tensor,
        past_key_values: list[tuple[Tensor, Tensor]] | None = None,
        use_cache: bool = False,
        replace_position: tuple[int, int] | None = None,
    ) -> Any:
        start, stop = replace_position or (0, tokens.shape[1])
        self.weights, present = [], []
        x = self.embedding(tokens)
        for i, (projection, output) in enumerate(zip(self.projections, self.outputs, strict=True)):
            qkv = projection(F.rms_norm(x, x.shape[-1:])).unflatten(-1, (-1, self.headdim)).transpose(1, 2)
            q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
            q, k = (rotate(F.pad(y, (0, 0, start, 0)))[:, :, start:] for y in (q, k))
            if past_key_values is not None:
                new, (k, v) = (k, v), (y.clone() for y in past_key_values[i])
                k[:, :, start:stop], v[:, :, start:stop] = new
            present.append((k, v))
            x = x + output(self.attend(q, k, v, None).transpose(1, 2).flatten(2))
        logits = self.head(F.rms_norm(x, x.shape[-1:])) * 2.0
        return SimpleNamespace(logits=logits, past_key_values=present)


class TokenArray:
    def __init__(self, prompt: Tensor, gen_length: int, mask_id: int, eos_id: int, device: Any) -> None:
        self.data = torch.cat([prompt, torch.full((len(prompt), gen_length), mask_id)], dim=1)

    def __getitem__(self, index: Any) -> Tensor:
        return self.data[index]

    def __setitem__(self, index: Any, values: Tensor) -> None:
        self.data[index] = values


class ParallelDecoder:
    def __init__(self, temperature: float, remasking: str = "low_confidence", mask_id: int = 126336) -> None:
        self.temperature, self.remasking, self.mask_id = temperature, remasking, mask_id

    def block_init(self, block_x: Tensor, block_id: int) -> None:
        pass

    def decode(self, logits: Tensor, block_start: int, block_end: int, x: TokenArray) -> None:
        raise NotImplementedError


def run(
    model: CachedToy, decoder: Any, prompt: Tensor, cache: str = "none", thresholds: Any = None
) -> Tensor:
    """dInfer's block-wise loop: with a cache, one pass over all tokens at the start of each block."""
    x = TokenArray(prompt, NEW, MASK, EOS, "cpu")
    for block_id, start in enumerate(range(prompt.shape[1], x.data.shape[1], BLOCK)):
        stop, past, place = start + BLOCK, None, None
        decoder.block_init(x[:, start:stop], block_id)
        for _ in range(BLOCK + 1):  # once more than is needed: dInfer unrolls
            if cache == "none" or past is None:
                output = model(x.data, use_cache=True)
                logits, past = output.logits[:, start:stop], output.past_key_values
                place = (start, stop if cache == "dual" else x.data.shape[1])
            else:
                part = x[:, place[0] : place[1]].clone()
                logits = model(part, past_key_values=past, use_cache=True, replace_position=place).logits
                logits = logits[:, :BLOCK]
            decoder.decode(logits, start, stop, x, *(() if thresholds is None else (next(thresholds),)))
    return x.data


class ByHand:
    """The same decisions from the attention weights themselves."""

    def __init__(self, model: CachedToy, *, rule: str = "parallel", tau: float = 0.9) -> None:
        self.model, self.rule, self.tau = model, rule, tau
        model.by_hand = True

    def block_init(self, block_x: Tensor, block_id: int) -> None:
        pass

    def decode(self, logits: Tensor, start: int, stop: int, x: TokenArray, tau: float | None = None) -> None:
        scores = sum(weights[..., start:stop].sum(dim=(1, 2)) for weights in self.model.weights)
        tokens = x[:, start:stop].clone()
        reference.decode_step(
            tokens,
            logits,
            scores=scores,
            block=slice(0, BLOCK),
            mask_token_id=MASK,
            rule=self.rule,
            tau=self.tau if tau is None else tau,
        )
        x[:, start:stop] = tokens


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch):
    stub(
        monkeypatch,
        {
            "dinfer": {"__version__": "0.1"},
            "dinfer.decoding.parallel_strategy": {"ParallelDecoder": ParallelDecoder},
        },
    )
    monkeypatch.delitem(sys.modules, "attn_sampler.adapters.dinfer", raising=False)
    return importlib.import_module("attn_sampler.adapters.dinfer")


def make_decoder(adapter: Any, model: CachedToy, **options: Any) -> Any:
    return adapter.AttnParallelDecoder(model, mask_id=MASK, eos_id=EOS, **options)


@pytest.mark.parametrize(
    "options", [{"tau": 0.3}, {"policy": "attn-sequential"}, {"tau": 0.4, "layers": [-1]}]
)
def test_without_a_cache_as_generate(adapter: Any, options: dict[str, Any]):
    model = CachedToy()
    tokens = run(model, make_decoder(adapter, model, **options), PROMPT)
    options = {"policy": "attn", "mask_token_id": MASK, "gen_length": NEW, "block_length": BLOCK} | options
    assert torch.equal(tokens, generate(CachedToy(), PROMPT, **options).tokens)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("seed", range(3))
def test_with_caches_as_by_hand(adapter: Any, cache: str, seed: int):
    model, by_hand = CachedToy(seed), CachedToy(seed)
    with torch.no_grad():
        tokens = run(model, make_decoder(adapter, model, tau=0.3), PROMPT, cache)
        assert torch.equal(tokens, run(by_hand, ByHand(by_hand, tau=0.3), PROMPT, cache))


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_softmax_over_the_block(adapter: Any, cache: str):
    """The block's rows are found among those that run, wherever they stand."""
    for options in ({"softmax_scope": "block"}, {"diagonal": False}):
        model = CachedToy()
        decoder = make_decoder(adapter, model, policy="attn-sequential", **options)
        model(torch.cat([PROMPT, torch.full((2, NEW), MASK)], dim=1))
        first = decoder._capture.layers
        columns = slice(5, 9)
        expected = sum(
            reference.column_scores(
                layer.q[:, :, {"none": slice(0, None), "prefix": slice(5, None), "dual": columns}[cache]],
                layer.k,
                columns=columns,
                softmax_lse=None
                if "softmax_scope" in options
                else layer.softmax_lse[
                    :, :, {"none": slice(0, None), "prefix": slice(5, None), "dual": columns}[cache]
                ],
                query_start=0 if cache == "none" else 5,
                **options,
            )
            for layer in first
        )
        x = TokenArray(PROMPT, NEW, MASK, EOS, "cpu")
        past = model(x.data).past_key_values
        if cache != "none":
            place = (5, 9) if cache == "dual" else (5, 13)
            model(x[:, slice(*place)].clone(), past_key_values=past, replace_position=place)
        decoder.decode(torch.randn(2, BLOCK, MASK + 1), 5, 9, x)
        assert (x[:, 5:9] != MASK).int().argmax(dim=1).tolist() == expected.argmax(dim=1).tolist()


def test_shifted_runner(adapter: Any):
    """It hands over the tokens without the first, and locations that are one less."""
    model = CachedToy()
    decoder = make_decoder(adapter, model, policy="attn-sequential", logit_shift=True)
    x = TokenArray(PROMPT, NEW, MASK, EOS, "cpu")
    for _ in range(BLOCK):
        logits = model(x.data).logits[:, 4:8]
        shifted = TokenArray(x.data[:, 1:], 0, MASK, EOS, "cpu")
        decoder.decode(logits, 4, 8, shifted)
        x.data[:, 1:] = shifted.data
    options = {"mask_token_id": MASK, "gen_length": NEW, "block_length": BLOCK, "logit_shift": True}
    expected = generate(CachedToy(), PROMPT, policy="attn-sequential", **options).tokens
    assert torch.equal(x.data[:, :9], expected[:, :9])


def test_a_threshold_for_the_step_takes_the_place_of_tau(adapter: Any):
    model, by_hand = CachedToy(), CachedToy()
    decoder = make_decoder(adapter, model, tau=0.9)
    assert decoder.threshold == 0.9
    steps = [0.0, 0.3, 0.5, 0.9, 0.9]
    with torch.no_grad():
        tokens = run(model, decoder, PROMPT, thresholds=iter(steps * 2))
        assert torch.equal(tokens, run(by_hand, ByHand(by_hand), PROMPT, thresholds=iter(steps * 2)))
    assert decoder.policy.tau == 0.9


@pytest.mark.parametrize("policy", ["attn-sequential", "confidence"])
def test_a_threshold_for_a_policy_that_reads_none_is_warned_of_once(
    adapter: Any, policy: str, recwarn: pytest.WarningsRecorder
):
    plain, model = CachedToy(), CachedToy()
    expected = run(plain, make_decoder(adapter, plain, policy=policy), PROMPT)
    assert not recwarn.list
    decoder = make_decoder(adapter, model, policy=policy)
    with torch.no_grad():
        assert torch.equal(run(model, decoder, PROMPT, thresholds=iter([0.3] * 10)), expected)
    (warning,) = recwarn.list
    assert "iter_threshold: " in str(warning.message)
    assert "reads no threshold, got 0.3" in str(warning.message)


#: The options of dInfer's own decoders (commit fce4e32): those that this one has too, and the others.
SHARED = {"temperature", "mask_id", "eos_id"}
REFUSED = {"threshold", "low_threshold", "remasking", "use_float64", "steps"} | {
    *("credit_alpha", "boost_gamma", "decay_beta")
}
STRATEGY = ("dinfer", "dinfer/decoding/parallel_strategy.py")


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_options_of_dinfer_s_own_decoders_are_refused_by_name(adapter: Any, name: str):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        make_decoder(adapter, CachedToy(), **{name: 0.5})


@pytest.mark.parametrize("known", [pytest.param(SHARED | REFUSED, marks=needs_installed(*STRATEGY))])
def test_installed_options_are_classified(known: set[str]):
    found = parameters(*STRATEGY, suffix="Decoder", method="__init__")
    assert found - {"kwargs"} == known
    assert parameters(*STRATEGY, suffix="Decoder", method="decode") == {
        *("logits", "block_start", "block_end", "x", "iter_threshold")
    }


@pytest.mark.parametrize("policy", ["klass", "confidence", "pard"])
def test_other_policies(adapter: Any, policy: str):
    model = CachedToy()
    decoder = make_decoder(adapter, model, policy=policy)
    assert bool(model._forward_pre_hooks) == decoder.policy.needs_scores
    options = {"policy": policy, "mask_token_id": MASK, "gen_length": NEW, "block_length": BLOCK}
    assert torch.equal(run(model, decoder, PROMPT), generate(CachedToy(), PROMPT, **options).tokens)


@pytest.mark.parametrize("batch", [pytest.param(n, marks=needs_installed(*SOURCE)) for n in (1, 2)])
def test_installed_loop(adapter: Any, monkeypatch: pytest.MonkeyPatch, batch: int):
    name = "transformers.models.layoutlmv2.modeling_layoutlmv2"  # imported there, and not used
    stub(monkeypatch, {name: {"relative_position_bucket": None}})
    load(monkeypatch, "dinfer.decoding.utils", "dinfer", "dinfer/decoding/utils.py")
    strategy = "dinfer.decoding.parallel_strategy"
    base = load(monkeypatch, strategy, "dinfer", "dinfer/decoding/parallel_strategy.py").ParallelDecoder
    monkeypatch.delitem(sys.modules, "attn_sampler.adapters.dinfer")
    adapter = importlib.import_module("attn_sampler.adapters.dinfer")
    assert issubclass(adapter.AttnParallelDecoder, base)
    dinfer = load(monkeypatch, "dinfer.decoding.generate_uniform", *SOURCE)
    model, factory = CachedToy(), sys.modules["dinfer.decoding.utils"].BlockIteratorFactory()
    decoder = make_decoder(adapter, model, tau=0.3)
    llm = dinfer.BlockWiseDiffusionLLM(model, decoder, factory, early_stop=False)
    tokens = llm.generate(PROMPT[:batch], gen_length=NEW, block_length=BLOCK)
    options = {"tau": 0.3, "mask_token_id": MASK, "gen_length": NEW, "block_length": BLOCK}
    expected = generate(CachedToy(), PROMPT[:batch], **options).tokens
    assert torch.equal(tokens, expected[expected != EOS][None] if batch == 1 else expected)


def test_misuse(adapter: Any, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(
        TypeError, match=r"model: expected the torch\.nn\.Module that dInfer runs, got function"
    ):
        make_decoder(adapter, lambda tokens: tokens)
    model = CachedToy()
    decoder = make_decoder(adapter, model)
    x = TokenArray(PROMPT, NEW, MASK, EOS, "cpu")
    logits = torch.zeros(2, BLOCK, MASK + 1)
    with pytest.raises(RuntimeError, match="no forward pass ran inside the context"):
        decoder.decode(logits, 5, 9, x)
    model.by_hand = True
    model(x.data)
    with pytest.raises(RuntimeError, match="attention written out by hand"):
        decoder.decode(logits, 5, 9, x)
    with pytest.raises(ValueError, match=r"logits: expected shape \[B, C, V\]"):
        decoder.decode(logits[:, 1:], 5, 9, x)
    assert (x[:, 5:] == MASK).all()
    model.by_hand = False
    vicinity = make_decoder(adapter, model, softmax_scope="block")
    past = model(x.data).past_key_values
    model(x[:, 4:10].clone(), past_key_values=past, replace_position=(4, 10))
    with pytest.raises(
        NotImplementedError, match="with the vicinity cache the rows' positions are not known"
    ):
        vicinity.decode(logits, 5, 9, x)
    with pytest.raises(ValueError, match="policy: 'dawn' reads the block's attention map"):
        make_decoder(adapter, model, policy="dawn")
    monkeypatch.delitem(sys.modules, "attn_sampler.adapters.dinfer")
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.2.1")
    with pytest.raises(RuntimeError, match=r"dinfer 0\.2\.1 is outside the tested range, 0\.1 to"):
        importlib.import_module("attn_sampler.adapters.dinfer")


def test_model_that_fails_leaves_nothing_open(adapter: Any):
    model = CachedToy()
    decoder = make_decoder(adapter, model)
    with pytest.raises(IndexError):
        model(torch.tensor([[10**6]]))
    x = TokenArray(PROMPT, NEW, MASK, EOS, "cpu")
    logits = model(x.data).logits
    other = CachedToy()
    other(x.data)
    assert decoder._capture.num_calls == 2, "another model's attention is not counted"
    decoder.decode(logits[:, 5:9], 5, 9, x)
    assert (x[:, 5:9] != MASK).any(dim=1).all()


def test_engine_that_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "dinfer", None)
    monkeypatch.delitem(sys.modules, "attn_sampler.adapters.dinfer", raising=False)
    with pytest.raises(
        ImportError, match=r"dinfer cannot be imported .* pip install git\+https://github\.com"
    ):
        importlib.import_module("attn_sampler.adapters.dinfer")
