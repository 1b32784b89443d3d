"""The dLLM adapter, over a stand-in for dLLM's ``BaseSampler`` (commit ca17675), or its own."""

from __future__ import annotations

import abc
import dataclasses
import importlib
import importlib.metadata
import inspect
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_toy import fields, load, needs_installed, sources, stub
from torch import Tensor
from toy_model import EOS, MASK, ToyModel

from attn_sampler import generate

SOURCE = ("dllm", "dllm/core/samplers/base.py")
PROMPTS = [[5, 7, 2, 9, 11], [1, 4, 8], [6, 6, 1, 2, 3], [9]]
TOKENIZER = SimpleNamespace(mask_token_id=MASK, eos_token_id=EOS, bos_token_id=1)


@dataclasses.dataclass
class BaseSamplerOutput:
    sequences: Tensor
    histories: list[Tensor] | None = None


@dataclasses.dataclass
class BaseSamplerConfig:
    return_dict: bool = False


@dataclasses.dataclass
class BaseSampler(abc.ABC):
    model: Any
    tokenizer: Any
    scheduler: Any = None

    @abc.abstractmethod
    def sample(self, prompts: list[Any], config: BaseSamplerConfig | None = None, **kwargs: Any) -> Any: ...

    @abc.abstractmethod
    def infill(self, inputs: list[Any], config: BaseSamplerConfig | None = None, **kwargs: Any) -> Any: ...


class HFToy(ToyModel):
    """Called as dLLM calls transformers' models."""

    device = torch.device("cpu")

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Any:
        assert attention_mask.dtype == torch.int64
        assert attention_mask.all(), "padding"
        return SimpleNamespace(logits=self.compute(tokens, attention_mask.bool()))


@pytest.fixture(params=sources(*SOURCE))
def adapter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    own = {
        "BaseSampler": BaseSampler,
        "BaseSamplerConfig": BaseSamplerConfig,
        "BaseSamplerOutput": BaseSamplerOutput,
    }
    schedulers = {"BaseAlphaScheduler": object, "LinearAlphaScheduler": object}
    stub(
        monkeypatch,
        {"dllm": {"__version__": "0.1.0"}, "dllm.core.samplers": own, "dllm.core.schedulers": schedulers},
    )
    if request.param == "installed":
        base = load(monkeypatch, "dllm.core.samplers.base", *SOURCE)
        for name in own:
            setattr(sys.modules["dllm.core.samplers"], name, getattr(base, name))
    monkeypatch.delitem(sys.modules, "attn_sampler.adapters.dllm", raising=False)
    return importlib.import_module("attn_sampler.adapters.dllm")


def alone(prompt: list[int], **options: Any) -> list[int]:
    options = {"mask_token_id": MASK, "block_length": 4} | options
    return generate(ToyModel(), torch.tensor([prompt]), **options).tokens[0].tolist()


@pytest.mark.parametrize(
    "options",
    [{"tau": 0.3}, {"policy": "attn-sequential", "query_rows": "masked"}, {"temperature": 0.7, "seed": 5}],
)
@pytest.mark.parametrize("tensors", [False, True])
def test_sample(adapter: Any, options: dict[str, Any], tensors: bool):
    """As dLLM's evaluation calls it."""
    sampler = adapter.AttnSampler(model=HFToy(), tokenizer=TOKENIZER)
    config = adapter.AttnSamplerConfig(max_new_tokens=8, block_size=4, **options)
    inputs = [torch.tensor(prompt) for prompt in PROMPTS] if tensors else PROMPTS
    canvas = sampler.sample(inputs=inputs, config=config, return_dict=False)
    assert canvas.shape == (4, 13)
    for i, (row, prompt) in enumerate(zip(canvas.tolist(), PROMPTS, strict=True)):
        seeded = {**options, "seed": options["seed"] + i} if "seed" in options else options
        expected = alone(prompt, gen_length=8, **seeded)
        assert row == expected + [EOS] * (13 - len(expected))


def test_infill(adapter: Any):
    sampler = adapter.AttnSampler(model=HFToy(), tokenizer=TOKENIZER)
    inputs = [[5, MASK, MASK, 2, MASK], [4, 4], [MASK, 3, MASK, MASK, 1, 7]]
    config = adapter.AttnSamplerConfig(block_size=4, tau=0.3, return_dict=True)
    output = sampler.infill(inputs, config)
    canvas = output.sequences.tolist()
    assert output.histories is None
    assert canvas[0] == [*alone(inputs[0], tau=0.3), EOS]
    assert canvas[1] == [4, 4, EOS, EOS, EOS, EOS]
    assert canvas[2] == alone(inputs[2], tau=0.3)


def test_options_of_dllm(adapter: Any):
    sampler = adapter.AttnSampler(model=HFToy(), tokenizer=TOKENIZER)
    greedy = sampler.sample(PROMPTS, max_new_tokens=8, block_size=4)
    assert torch.equal(sampler.sample(PROMPTS, max_new_tokens=None, max_length=13, block_size=4), greedy)
    suppressed = int(greedy[0, 5:].mode().values)
    without = sampler.sample(PROMPTS, max_new_tokens=8, block_size=4, suppress_tokens=[suppressed])
    assert not (without[0, 5:] == suppressed).any()
    shifted = sampler.sample([[], [1]], max_new_tokens=8, block_size=4, right_shift_logits=True)
    expected = alone([1], gen_length=8, logit_shift=True)
    assert shifted.tolist() == [expected, expected], "an empty prompt becomes the token that begins text"


def test_guidance_and_an_early_end(adapter: Any):
    sampler = adapter.AttnSampler(model=HFToy(), tokenizer=TOKENIZER)
    prompts = [[5, 7, 2, 9, 11], [1, 4, 8, 5, 5]]
    for keep in (None, [5, 9]):
        guided = {"cfg_scale": 1.5, "cfg_keep_tokens": keep}
        canvas = sampler.sample(prompts, max_new_tokens=8, block_size=4, **guided).tolist()
        for row, prompt in zip(canvas, prompts, strict=True):
            without = [token if token in (keep or []) else MASK for token in prompt]
            options = {"guidance_scale": 1.5, "unconditional_prompt_ids": [without]}
            assert row == alone(prompt, gen_length=8, **options)
    plain = sampler.sample(prompts, max_new_tokens=8, block_size=4)
    ended = SimpleNamespace(**vars(TOKENIZER) | {"eos_token_id": int(plain[0, 6])})
    sampler = adapter.AttnSampler(model=HFToy(), tokenizer=ended)
    row = sampler.sample(prompts[:1], max_new_tokens=8, block_size=4, eos_early_stop=True)[0].tolist()
    first = row.index(ended.eos_token_id, 5)
    assert row[: first + 1] == plain[0, : first + 1].tolist()
    assert set(row[first:]) == {ended.eos_token_id}


def test_rules_that_take_back(adapter: Any):
    sampler = adapter.AttnSampler(model=HFToy(), tokenizer=TOKENIZER)
    row = sampler.sample(PROMPTS[:1], max_new_tokens=8, block_size=4, policy="t2t")[0].tolist()
    assert row == alone(PROMPTS[0], gen_length=8, policy="t2t")


#: Those of its ``MDLMSamplerConfig`` (commit ca17675) that are served, and others with a value that asks.
MDLM = ("dllm", "dllm/core/samplers/mdlm.py", "MDLMSamplerConfig")
SERVED = {"max_new_tokens", "max_length", "block_size", "temperature"} | {
    *("suppress_tokens", "right_shift_logits", "return_dict", "cfg_scale", "cfg_keep_tokens")
}
REFUSED = {
    **{"steps": 128, "remasking": "random", "stochastic_transfer": True},
    **{"begin_suppress_tokens": [5], "anything": 1},
    **{"top_k": 3, "threshold": 0.95, "editing_threshold": 0.9, "max_post_steps": 16},  # of LLaDA2.1's
}
NOTHING = {
    **{"steps": None, "remasking": "low_confidence", "stochastic_transfer": False},
    **{"begin_suppress_tokens": []},
}


@pytest.mark.parametrize("method", ["sample", "infill"])
@pytest.mark.parametrize("name", REFUSED)
def test_options_of_dllm_that_are_not_served_are_refused_by_name(adapter: Any, name: str, method: str):
    model = HFToy()
    call = getattr(adapter.AttnSampler(model=model, tokenizer=TOKENIZER), method)
    with pytest.raises(TypeError, match=f"{name}: expected .*, got "):
        call([[5, MASK]], **{name: REFUSED[name]})
    assert model.calls == []


def test_options_of_dllm_that_ask_for_nothing(adapter: Any):
    sampler = adapter.AttnSampler(model=HFToy(), tokenizer=TOKENIZER, scheduler=None)
    options = {"max_new_tokens": 8, "block_size": 4}
    assert torch.equal(sampler.sample(PROMPTS, **options, **NOTHING), sampler.sample(PROMPTS, **options))
    assert {field.name for field in dataclasses.fields(adapter.AttnSamplerConfig)} >= SERVED


def test_what_would_be_read_by_another_sampler(adapter: Any):
    with pytest.raises(
        ValueError, match="scheduler: expected None, as the policy takes its place, got a SimpleN"
    ):
        adapter.AttnSampler(model=HFToy(), tokenizer=TOKENIZER, scheduler=SimpleNamespace())
    sampler = adapter.AttnSampler(model=HFToy(), tokenizer=TOKENIZER)
    with pytest.raises(TypeError, match="config: expected an AttnSamplerConfig, got BaseSamplerConfig"):
        sampler.sample(PROMPTS, sys.modules["dllm.core.samplers"].BaseSamplerConfig())
    for name in ("max_new_tokens", "max_length"):
        with pytest.raises(TypeError, match=f"infill: {name}: expected None, got 8"):
            sampler.infill([[5, MASK]], **{name: 8})


@pytest.mark.parametrize("known", [pytest.param(SERVED | set(NOTHING), marks=needs_installed(*MDLM[:2]))])
def test_installed_options_are_classified(known: set[str]):
    inherited = fields(*SOURCE, "BaseSamplerConfig")
    assert {*inherited, *fields(*MDLM)} == known


def test_signatures(adapter: Any):
    base = sys.modules["dllm.core.samplers"].BaseSampler
    for name in ("sample", "infill"):
        own = list(inspect.signature(getattr(adapter.AttnSampler, name)).parameters.values())
        theirs = list(inspect.signature(getattr(base, name)).parameters.values())
        assert [p.kind for p in own] == [p.kind for p in theirs]
        assert [p.default for p in own] == [p.default for p in theirs]
    assert not adapter.AttnSampler.__abstractmethods__


def test_misuse(adapter: Any, monkeypatch: pytest.MonkeyPatch):
    sampler = adapter.AttnSampler(model=HFToy(), tokenizer=TOKENIZER)
    with pytest.raises(TypeError, match="steps"):
        sampler.sample(PROMPTS, steps=128)
    with pytest.raises(ValueError, match="expected max_new_tokens or max_length"):
        sampler.sample(PROMPTS, max_new_tokens=None)
    plain = SimpleNamespace(mask_token_id=None, eos_token_id=EOS)
    with pytest.raises(ValueError, match="tokenizer: expected one with a mask_token_id"):
        adapter.AttnSampler(model=HFToy(), tokenizer=plain).sample(PROMPTS)
    model = HFToy()
    model.by_hand = True
    with pytest.raises(RuntimeError, match="attention written out by hand"):
        adapter.AttnSampler(model=model, tokenizer=TOKENIZER).sample(PROMPTS)
    monkeypatch.delitem(sys.modules, "attn_sampler.adapters.dllm")
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.2")
    with pytest.raises(RuntimeError, match=r"dllm 0\.2 is outside the tested range"):
        importlib.import_module("attn_sampler.adapters.dllm")


def test_engine_that_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "dllm", None)
    monkeypatch.delitem(sys.modules, "attn_sampler.adapters.dllm", raising=False)
    with pytest.raises(ImportError, match=r"dllm cannot be imported .* pip install git\+https://github\.com"):
        importlib.import_module("attn_sampler.adapters.dllm")
