"""The LMDeploy adapter, driven by a stand-in for LMDeploy 0.18.0's dLLM strategy, or the installed one."""

from __future__ import annotations

import enum
import importlib
import importlib.metadata
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_toy import (
    BLOCK,
    FlatToy,
    Request,
    attend_blocks,
    decode_whole,
    fields,
    load,
    needs_installed,
    sources,
    stub,
    toy,
)
from torch import Tensor, nn
from toy_model import MASK

from attn_sampler import column_scores

SOURCE = ("lmdeploy", "lmdeploy/pytorch/strategies/dllm/unmasking.py")
PROMPTS = [[5, 7, 2, 9, 11], [1, 4, 8], [2, 3, 5, 7, 11, 13]]
MASKED, UNMASKED, CACHED = 0, 1, 2


class UnmaskingStrategy(enum.Enum):
    SEQUENTIAL = enum.auto()
    LOW_CONFIDENCE_DYNAMIC = enum.auto()
    LOW_CONFIDENCE_STATIC = enum.auto()


def dllm_config(strategy: UnmaskingStrategy | None = UnmaskingStrategy.LOW_CONFIDENCE_DYNAMIC) -> Any:
    return SimpleNamespace(
        block_length=BLOCK, unmasking_strategy=strategy, denoising_steps=None, confidence_threshold=0.85
    )


class UnmaskingProcessor:
    def __init__(self, dllm_config: Any) -> None:
        self.dllm_config = dllm_config

    def __call__(self, logits: Tensor, input_ids: Tensor, token_ids: Tensor, dllm_mask: Tensor) -> Any:
        if self.dllm_config.unmasking_strategy is None:
            return dllm_mask
        raise AssertionError("LMDeploy's own unmasking")


class Attention(nn.Module):
    """Writes its output over the queries, as LMDeploy's kernels do."""

    def __init__(self, scale: float, layer: int, block_length: int = BLOCK) -> None:
        super().__init__()
        self.impl = SimpleNamespace(scale=scale, block_sparse_size=block_length)
        self.layer = layer

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        k_cache: Any,
        v_cache: Any,
        attn_metadata: Any,
        **_: Any,
    ) -> Tensor:
        if attn_metadata.is_decoding:
            return query.copy_(attend_blocks(query.clone(), key, value, attn_metadata.requests, self.layer))
        return query.zero_()


def build_patched_model(seed: int = 0) -> FlatToy:
    weights = toy(seed)
    return FlatToy(weights, lambda i: Attention(weights.headdim**-0.5, i))


@pytest.fixture(params=sources(*SOURCE))
def adapter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    context = SimpleNamespace(
        dist_config=SimpleNamespace(attn_tp=1), attn_tp_group=SimpleNamespace(gpu_group=None)
    )
    manager = SimpleNamespace(current_context=lambda: context)
    states = {"DLLM_MASKED": MASKED, "DLLM_UNMASKED": UNMASKED, "DLLM_CACHED": CACHED}
    stub(
        monkeypatch,
        {
            "lmdeploy": {"__version__": "0.18.0"},
            "lmdeploy.pytorch.consts": states,
            "lmdeploy.pytorch": {"consts": None},
            "lmdeploy.pytorch.config": {"DLLMConfig": object, "UnmaskingStrategy": UnmaskingStrategy},
            "lmdeploy.pytorch.distributed": {"get_dist_manager": lambda: manager},
            "lmdeploy.pytorch.nn.attention": {"Attention": Attention},
            "lmdeploy.pytorch.engine.model_agent.agent": {"build_patched_model": build_patched_model},
            "lmdeploy.pytorch.strategies.dllm.unmasking": {
                "UnmaskingProcessor": type("UnmaskingProcessor", (UnmaskingProcessor,), {})
            },
        },
    )
    sys.modules["lmdeploy.pytorch"].consts = sys.modules["lmdeploy.pytorch.consts"]
    if request.param == "installed":
        load(monkeypatch, "lmdeploy.pytorch.strategies.dllm.unmasking", *SOURCE)
    monkeypatch.delitem(sys.modules, "attn_sampler.adapters.lmdeploy", raising=False)
    module = importlib.import_module("attn_sampler.adapters.lmdeploy")
    yield module
    module.uninstall()


def engine(
    strategy: UnmaskingStrategy | None = UnmaskingStrategy.LOW_CONFIDENCE_DYNAMIC, seed: int = 0
) -> Any:
    """The processor and the model, in the order in which LMDeploy makes them."""
    processor = sys.modules["lmdeploy.pytorch.strategies.dllm.unmasking"].UnmaskingProcessor(
        dllm_config=dllm_config(strategy)
    )
    model = sys.modules["lmdeploy.pytorch.engine.model_agent.agent"].build_patched_model(seed)
    return processor, model


def forward(model: FlatToy, tokens: Tensor, requests: list[Request]) -> Tensor:
    metadata = SimpleNamespace(is_decoding=True, requests=requests)
    return model(tokens, requests, lambda layer, q, k, v: layer(q, k, v, None, None, metadata))


def serve(processor: Any, model: FlatToy, num_blocks: int) -> list[list[int]]:
    """All prompts at once; a block is forwarded once more when it is full, which caches it."""
    requests = [Request(prompt) for prompt in PROMPTS]
    goals = [-(-(len(prompt) + 1) // BLOCK) + num_blocks - 1 for prompt in PROMPTS]
    states = {id(r): torch.tensor([MASKED if t == MASK else UNMASKED for t in r.block()]) for r in requests}
    for _ in range(100):
        running = [r for r, goal in zip(requests, goals, strict=True) if r.cached < goal * BLOCK]
        if not running:
            return [request.tokens for request in requests]
        tokens = torch.tensor([token for request in running for token in request.block()])
        logits = forward(model, tokens, running)
        drawn = logits.argmax(dim=-1)
        state = torch.cat([states[id(request)] for request in running])
        state, drawn = processor(logits, tokens, drawn, state)
        for i, request in enumerate(running):
            own = slice(i * BLOCK, (i + 1) * BLOCK)
            if (state[own] == CACHED).all():
                request.store(drawn[own].tolist())
                states[id(request)] = torch.tensor(
                    [MASKED if t == MASK else UNMASKED for t in request.block()]
                )
            else:
                kept = torch.where(state[own] == MASKED, MASK, drawn[own])
                request.tokens[request.cached :] = kept.tolist()
                states[id(request)] = state[own]
    raise AssertionError("the blocks are never done")


@pytest.mark.parametrize(
    "options",
    [
        {"tau": 0.3},
        {"policy": "attn-sequential"},
        {"tau": 0.3, "layers": slice(-1, None), "diagonal": False},
        {"policy": "threshold", "tau": 0.4},
    ],
)
def test_serves_the_tokens_of_generate(adapter: Any, options: dict[str, Any]):
    adapter.install(**options)
    served = serve(*engine(), 2)
    whole = {"policy": "attn", "softmax_scope": "block"} | options
    assert served == [decode_whole(toy(), prompt, 2, **whole) for prompt in PROMPTS]


def test_attention_of_a_prompt_is_that_of_its_last_block(adapter: Any):
    unmasking = adapter.install()
    _, model = engine()
    lengths = [3 * BLOCK, BLOCK, 2 * BLOCK]
    q, k = torch.randn(sum(lengths), 4, 8), torch.randn(sum(lengths), 2, 8)
    metadata = SimpleNamespace(is_decoding=False, q_seqlens=torch.tensor(lengths))
    for layer in model.attention:
        layer(q.clone(), k, k, None, None, metadata)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    for i, end in enumerate(ends):
        own = slice(end - BLOCK, end)
        expected = 2 * column_scores(
            q[own].transpose(0, 1)[None], k[own].transpose(0, 1)[None], softmax_scale=8**-0.5
        )
        torch.testing.assert_close(unmasking._scores.read(3)[i], expected[0])


def test_uninstall(adapter: Any):
    processor = sys.modules["lmdeploy.pytorch.strategies.dllm.unmasking"].UnmaskingProcessor
    agent = sys.modules["lmdeploy.pytorch.engine.model_agent.agent"]
    before = processor.__call__, agent.build_patched_model
    adapter.install()
    adapter.install(tau=0.5)
    assert processor.__call__ is not before[0]
    adapter.uninstall()
    assert (processor.__call__, agent.build_patched_model) == before


def test_engine_without_a_strategy_is_left_alone(adapter: Any):
    adapter.install()
    processor, _ = engine(None)
    state = torch.zeros(BLOCK, dtype=torch.int64)
    assert processor(torch.zeros(BLOCK, 3), state, state, state) is state


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "unmasking_strategy",
            "SEQUENTIAL",
            "dllm_unmasking_strategy: expected 'low_confidence_dynamic', got",
        ),
        (
            "unmasking_strategy",
            "LOW_CONFIDENCE_STATIC",
            "dllm_unmasking_strategy: .*, got 'low_confidence_st",
        ),
        ("denoising_steps", 2, "dllm_denoising_steps: expected None, got 2"),
        ("confidence_threshold", 0.9, r"dllm_confidence_threshold: expected 0\.85, got 0\.9"),
    ],
)
def test_ways_of_unmasking_of_the_engine_are_refused(adapter: Any, field: str, value: Any, message: str):
    config, plain = dllm_config(), dllm_config()
    setattr(config, field, UnmaskingStrategy[value] if isinstance(value, str) else value)
    processor = sys.modules["lmdeploy.pytorch.strategies.dllm.unmasking"].UnmaskingProcessor
    adapter.install()
    with pytest.raises(ValueError, match=message):
        processor(dllm_config=config)
    processor(plain)
    config.unmasking_strategy = None
    processor(config)  # unmasks nothing
    adapter.uninstall()
    processor(dllm_config=config)


@pytest.mark.parametrize(
    "kind",
    [
        *({"alibi": True}, {"logit_softcapping": 30.0}, {"learnable_sink": True}),
        *({"sliding_window": BLOCK - 1}, {"sliding_window": (64, 0)}),
    ],
)
def test_kinds_of_attention_that_are_not_served(adapter: Any, kind: dict[str, Any]):
    unmasking, model = adapter.install(), build_patched_model()
    plain = {"alibi": False, "logit_softcapping": -1, "learnable_sink": False, "sliding_window": 4096}
    vars(model.attention[1].impl).update(plain)
    unmasking.watch(model)
    vars(model.attention[1].impl).update(kind)
    with pytest.raises(NotImplementedError, match=f"{next(iter(kind))}: attention with it is not served"):
        unmasking.watch(model)


@pytest.mark.parametrize("name", ["s_aux", "nsa_indices", "anything"])
def test_what_a_call_of_an_attention_brings_along(adapter: Any, name: str):
    adapter.install()
    _, model = engine()
    metadata = SimpleNamespace(is_decoding=False, q_seqlens=torch.tensor([BLOCK]))
    q, k = torch.randn(BLOCK, 4, 8), torch.randn(BLOCK, 2, 8)
    call = {"k_scales_zeros": torch.zeros(1), "v_scales_zeros": None, "inplace": True, "s_aux": None}
    model.attention[0](q, k, k, None, None, metadata, **call)
    with pytest.raises(NotImplementedError, match=f"{name}: attention with it is not served, got a Tensor"):
        model.attention[0](q, k, k, None, None, metadata, **(call | {name: torch.zeros(4)}))


#: What a request may ask for, and LMDeploy does itself: before the policy, to its logits and tokens ...
BEFORE = (
    *("do_sample", "temperature", "top_p", "top_k", "min_p", "random_seed", "repetition_penalty"),
    *("repetition_ngram_size", "repetition_ngram_threshold", "bad_words", "bad_token_ids", "min_new_tokens"),
    *("ignore_eos", "response_format", "logits_processors"),
)
#: ... and around it.
AROUND = (
    *("n", "max_new_tokens", "stop_words", "stop_token_ids", "include_stop_str_in_output", "logprobs"),
    *("skip_special_tokens", "spaces_between_special_tokens", "output_logits", "output_last_hidden_state"),
    *("return_ppl", "with_cache", "preserve_cache", "migration_request", "return_routed_experts"),
    "logprob_start_len",
)
GENERATION = ("lmdeploy", "lmdeploy/messages.py", "GenerationConfig")
ENGINE = ("lmdeploy", "lmdeploy/pytorch/config.py", "DLLMConfig")


@pytest.mark.parametrize("known", [pytest.param({*BEFORE, *AROUND}, marks=needs_installed(*GENERATION[:2]))])
def test_installed_options_are_classified(known: set[str]):
    assert set(fields(*GENERATION)) == known
    assert fields(*ENGINE) == list(vars(dllm_config()))


def test_misuse(adapter: Any, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="policy: expected one that judges tokens by their probability"):
        adapter.install("margin")
    for option in ({"backend": "gpu"}, {"reduction": "median"}, {"layers": "first"}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}: expected one of"):
            adapter.install(**option)
    with pytest.raises(ValueError, match="policy: 'clad' reads the block's attention map"):
        adapter.install("clad")
    with pytest.raises(ValueError, match="carries something over"):
        adapter.install("klass")
    processor, model = engine()
    adapter.install()
    state = torch.zeros(BLOCK, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="no model was watched"):
        processor(torch.zeros(BLOCK, 3), state, state, state)
    unmasking = adapter.install()
    processor, model = engine()
    with pytest.raises(RuntimeError, match="no attention of the model was seen"):
        processor(torch.zeros(BLOCK, 3), state, state, state)
    model.attention = nn.ModuleList()
    with pytest.raises(RuntimeError, match="FlatToy has no Attention layer"):
        unmasking.watch(model)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.9.0")
    with pytest.raises(RuntimeError, match=r"lmdeploy 0\.9\.0 is outside the tested range"):
        adapter.install()


def test_undefined_logits_are_an_error(adapter: Any):
    adapter.install(policy="threshold", tau=0.0)
    processor, _ = engine()
    state = torch.zeros(BLOCK, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="logits at position 0 of sequence 0 are undefined"):
        processor(torch.full((BLOCK, 3), torch.nan), state, state, state)


def test_engine_that_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lmdeploy", None)
    from attn_sampler.adapters import lmdeploy

    with pytest.raises(ImportError, match=r'lmdeploy cannot be imported .* pip install "lmdeploy'):
        lmdeploy.install()
