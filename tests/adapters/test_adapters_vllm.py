"""The vLLM adapter, driven by a stand-in for the sampler of dllm-plugin (commit 33cd242)."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine_toy import (
    BLOCK,
    FlatToy,
    Request,
    attend_blocks,
    decode_whole,
    fields,
    load_alone,
    needs_installed,
    request_class,
    stub,
    toy,
)
from torch import Tensor, nn
from toy_model import MASK

from attn_sampler import column_scores
from attn_sampler.reference import truncation

PROMPTS = [[5, 7, 2, 9, 11], [1, 4, 8], [2, 3, 5, 7, 11, 13]]
CONTEXT = SimpleNamespace(attn_metadata=None)


class Attention(nn.Module):
    def __init__(self, weights: Any, layer: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_size = weights.heads, weights.kv_heads, weights.headdim
        self.impl = SimpleNamespace(scale=weights.headdim**-0.5)
        self.layer, self.layer_name = layer, f"model.layers.{layer}.attn"
        self.requests: list[Request] = []

    def forward(self, query: Tensor, key: Tensor | None, value: Tensor | None, **_: Any) -> Tensor:
        if key is None or not self.requests:
            return torch.zeros_like(query)
        q, k, v = (x.unflatten(1, (-1, self.head_size)) for x in (query, key, value))
        return attend_blocks(q, k, v, self.requests, self.layer).flatten(1)


def batched_remask(logits: Tensor, input_draft: Tensor, mask_token_id: int, threshold: float) -> Any:
    raise AssertionError("the plugin's own remasking")


class DiffusionSampler:
    def __init__(
        self,
        base_sampler: Any,
        model_state: Any,
        device: torch.device,
        mask_token_id: int,
        draft_size: int,
        threshold: float,
        max_denoise_iters: int,
        slot_width: int,
    ) -> None:
        self._base_sampler = base_sampler
        self.model_state, self._mask_id, self._draft_size = model_state, mask_token_id, draft_size
        self._threshold = threshold
        self._remask_fn = batched_remask

    def __call__(self, logits: Tensor, input_batch: Any) -> Any:
        return self._denoise(logits, input_batch)

    def _denoise(self, logits: Tensor, input_batch: Any) -> Any:
        ends = input_batch.cu_num_logits_np
        parts = [(int(ends[i]), int(ends[i + 1])) for i in range(input_batch.num_reqs)]
        decoding = [i for i, (lo, hi) in enumerate(parts) if hi - lo == self._draft_size]
        drafts = self.model_state.drafts
        updated, all_done, transferred = self._remask_fn(
            logits=torch.stack([logits[slice(*parts[i])] for i in decoding]),
            input_draft=torch.stack([drafts[i] for i in decoding]),
            mask_token_id=self._mask_id,
            threshold=self._threshold,
        )
        for place, i in enumerate(decoding):
            assert int(transferred[place]) == int((updated[place] != drafts[i]).sum())
            drafts[i] = updated[place]
        return all_done


class LLaDA2ModelState:
    def __init__(self, vllm_config: Any, model: nn.Module, encoder_cache: Any, device: torch.device) -> None:
        self._mask_id, self._draft_size = MASK, BLOCK
        self.device = device
        self.drafts: dict[int, Tensor] = {}

    def custom_sampler(self, sampler: Any, config: Any) -> tuple[Any, Any]:
        options = {"threshold": 0.9, "max_denoise_iters": 64, "slot_width": BLOCK}
        return (
            DiffusionSampler(
                base_sampler=sampler,
                model_state=self,
                device=self.device,
                mask_token_id=self._mask_id,
                draft_size=self._draft_size,
                **options,
            ),
            None,
        )


@dataclasses.dataclass(frozen=True)
class RemaskStepResult:
    committed_token_ids: tuple[int, ...]
    next_input_block: tuple[int, ...]


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch):
    group = SimpleNamespace(world_size=1, device_group=None)
    CONTEXT.attn_metadata = None
    stub(
        monkeypatch,
        {
            "vllm": {"__version__": "0.14.0"},
            "vllm.forward_context": {"get_forward_context": lambda: CONTEXT},
            "vllm.distributed.parallel_state": {"get_tp_group": lambda: group},
            "vllm.model_executor.layers.attention": {"Attention": Attention},
            "dllm_plugin": {"__version__": "0.1.dev50"},
            "dllm_plugin.models.llada2_model_state": {
                "LLaDA2ModelState": type("LLaDA2ModelState", (LLaDA2ModelState,), {})
            },
            "dllm_plugin.remasking": {"RemaskStepResult": RemaskStepResult},
        },
    )
    monkeypatch.delitem(sys.modules, "attn_sampler.adapters.vllm", raising=False)
    return importlib.import_module("attn_sampler.adapters.vllm")


def make_model(seed: int = 0) -> FlatToy:
    weights = toy(seed)
    return FlatToy(weights, lambda i: Attention(weights, i))


def start(adapter: Any, model: nn.Module, options: dict[str, Any] | None) -> Any:
    """What vLLM does in a worker: plugins, then the model's state, then its sampler."""
    adapter.register()
    adapter.register()
    config = SimpleNamespace(additional_config=None if options is None else {"attn_sampler": options})
    state_class = sys.modules["dllm_plugin.models.llada2_model_state"].LLaDA2ModelState
    state = state_class(config, model, None, torch.device("cpu"))
    return state.custom_sampler(None, None)[0]


def forward(model: FlatToy, requests: list[Request]) -> Tensor:
    for layer in model.attention:
        layer.requests = requests
    tokens = torch.tensor([token for request in requests for token in request.block()])
    return model(
        tokens,
        requests,
        lambda layer, q, k, v: layer(query=q.flatten(1), key=k.flatten(1), value=v.flatten(1)),
    )


def serve(
    sampler: Any, model: FlatToy, num_blocks: int, prompts: list[list[int]] = PROMPTS, asked: Any = ()
) -> list[list[int]]:
    """All prompts at once; a block that is done is forwarded once more, for its keys and values."""
    requests = [Request(prompt) for prompt in prompts]
    goals = [-(-(len(prompt) + 1) // BLOCK) + num_blocks - 1 for prompt in prompts]
    slots = {id(request): 5 - i for i, request in enumerate(requests)}
    for request, params in zip(requests, asked, strict=False):
        sampler.add_request(slots[id(request)], len(request.tokens), params)
    for _ in range(100):
        running = [r for r, goal in zip(requests, goals, strict=True) if r.cached < goal * BLOCK]
        if not running:
            return [request.tokens for request in requests]
        logits = forward(model, running)
        ends = np.arange(len(running) + 1) * BLOCK
        sampler.model_state.drafts = {i: torch.tensor(r.block()) for i, r in enumerate(running)}
        was_full = [MASK not in request.block() for request in running]
        batch = SimpleNamespace(
            cu_num_logits_np=ends,
            num_reqs=len(running),
            idx_mapping_np=np.array([slots[id(request)] for request in running]),
            seq_lens=torch.tensor([request.cached + BLOCK for request in running], dtype=torch.int32),
        )
        sampler(logits, batch)
        for i, request in enumerate(running):
            block = sampler.model_state.drafts[i].tolist()
            if was_full[i]:
                request.store(block)
            else:
                request.tokens[request.cached :] = block
    raise AssertionError("the blocks are never done")


@pytest.mark.parametrize(
    "options", [{"tau": 0.3}, {"policy": "attn-sequential", "layers": [0]}, {"policy": "confidence"}]
)
def test_serves_the_tokens_of_generate(adapter: Any, options: dict[str, Any]):
    model = make_model()
    served = serve(start(adapter, model, options), model, 2)
    whole = {"policy": "attn", "softmax_scope": "block"} | options
    assert served == [decode_whole(toy(), prompt, 2, **whole) for prompt in PROMPTS]


def test_requests_that_are_still_in_their_prompt(adapter: Any):
    """A batch of a prompt of 7 tokens between two blocks: the prompt has one row of logits, and no draft."""
    model = make_model()
    sampler = start(adapter, model, {"policy": "attn-sequential"})
    starts = torch.tensor([0, BLOCK, BLOCK + 7, 2 * BLOCK + 7])
    CONTEXT.attn_metadata = {
        layer.layer_name: SimpleNamespace(query_start_loc=starts) for layer in model.attention
    }
    q, k = torch.randn(2 * BLOCK + 7, 32), torch.randn(2 * BLOCK + 7, 16)
    for layer in model.attention:
        layer(q, k, k)
    sampler.model_state.drafts = {i: torch.full((BLOCK,), MASK) for i in range(3)}
    logits = torch.randn(2 * BLOCK + 1, MASK + 1)
    ends = np.array([0, BLOCK, BLOCK + 1, 2 * BLOCK + 1])
    sampler(logits, SimpleNamespace(cu_num_logits_np=ends, num_reqs=3))
    assert (sampler.model_state.drafts[1] == MASK).all()
    for i, lo in ((0, 0), (2, BLOCK + 7)):
        heads = (x[lo : lo + BLOCK].unflatten(1, (-1, 8)).transpose(0, 1)[None] for x in (q, k))
        best = int(column_scores(*heads).argmax())
        assert (sampler.model_state.drafts[i] != MASK).tolist() == [j == best for j in range(BLOCK)]


def test_the_context_s_part_of_an_attention_in_two_calls_is_left_out(adapter: Any):
    model = make_model()
    remask = adapter.Remask(MASK, BLOCK)
    remask.watch(model)
    q, k = torch.randn(BLOCK, 32), torch.randn(BLOCK, 16)
    for layer in model.attention:
        layer(query=q, key=None, value=None)
        layer(query=q, key=k, value=k)
    heads = (x.unflatten(1, (-1, 8)).transpose(0, 1)[None] for x in (q, k))
    torch.testing.assert_close(remask._scores.read(1), 2 * column_scores(*heads))


def test_remasking_policy(adapter: Any):
    """``RemaskingPolicy.apply``, a request at a time, to the end of a block."""
    model, request = make_model(), Request([1, 4, 8, 6, 5])
    first = Request([1, 4, 8, 6])
    forward(model, [first])
    request.fresh = first.fresh
    request.store([1, 4, 8, 6])
    remask = adapter.Remask(MASK, BLOCK, tau=0.3)
    remask.watch(model)
    while MASK in request.block():
        logits = forward(model, [request])
        result = remask.apply(input_draft=tuple(request.block()), logits=logits, remasking_config={})
        request.tokens[request.cached :] = result.next_input_block
        if result.committed_token_ids:
            request.tokens[request.cached :] = result.committed_token_ids
            assert result.next_input_block == (MASK,) * BLOCK
    assert request.tokens == decode_whole(toy(), [1, 4, 8, 6, 5], 1, tau=0.3, softmax_scope="block")
    again = remask.apply(input_draft=tuple(request.block()), logits=torch.zeros(BLOCK, MASK + 1))
    assert again.committed_token_ids == tuple(request.block())
    with pytest.raises(ValueError, match="logits: expected the block's, got None"):
        remask.apply(input_draft=(MASK,) * BLOCK)


PLUGIN = ("vllm-dllm-plugin", "vllm_dllm_plugin/remasking/handoff.py")


@pytest.mark.parametrize("size", [pytest.param(32, marks=needs_installed(*PLUGIN))])
def test_installed_plugin_hands_over(adapter: Any, monkeypatch: pytest.MonkeyPatch, size: int):
    monkeypatch.delitem(sys.modules, "dllm_plugin")
    from vllm_dllm_plugin.remasking import RemaskingPolicy, remask_after_block_forward

    policy = adapter.Remask(MASK, size, policy="confidence")
    assert isinstance(policy, RemaskingPolicy)
    logits = torch.randn(size, MASK + 1, generator=torch.Generator().manual_seed(0))
    draft, steps = (MASK,) * size, 0
    while True:
        result = remask_after_block_forward(input_draft=draft, logits=logits, policy=policy)
        draft, steps = result.next_input_block, steps + 1
        if result.committed_token_ids:
            break
    assert steps == size
    assert result.committed_token_ids == tuple(logits[:, :MASK].argmax(dim=-1).tolist())


def test_draws_a_stream_of_its_own_for_each_row_and_step(adapter: Any):
    """Uniform logits, so that all depends on the noise."""
    logits, draft = torch.zeros(3, BLOCK, MASK + 1), torch.full((3, BLOCK), MASK)

    def draw(seed: int) -> list[list[int]]:
        remask = adapter.Remask(MASK, BLOCK, policy="threshold", tau=0.0, temperature=1.0, seed=seed)
        return [remask(logits, draft, MASK, 0.9)[0].flatten().tolist() for _ in range(3)]

    drawn = draw(7)
    assert draw(7) == drawn
    assert draw(8) != drawn
    rows = {tuple(step[i : i + BLOCK]) for step in drawn for i in range(0, 3 * BLOCK, BLOCK)}
    assert len(rows) == 9
    assert MASK not in {token for row in rows for token in row}


def test_scores_that_are_nan_end_with_an_error(adapter: Any):
    model = make_model()
    remask = adapter.Remask(MASK, BLOCK)
    remask.watch(model)
    q, k = torch.full((BLOCK, 32), torch.nan), torch.randn(BLOCK, 16)
    for layer in model.attention:
        layer(q, k, k)
    with pytest.raises(
        RuntimeError, match=r"nothing could be committed in sequences \[0\]: the attention scores are NaN"
    ):
        remask(torch.randn(1, BLOCK, MASK + 1), torch.full((1, BLOCK), MASK), MASK, 0.9)


#: vLLM's ``SamplingParams`` (0.33.0): what it applies around a block's decoding, and the rest's defaults.
PARAMS = ("vllm", "vllm/sampling_params.py", "SamplingParams")
APPLIED = {
    **{"n": 1, "max_tokens": 16, "ignore_eos": False, "stop": None, "stop_token_ids": None},
    **{"include_stop_str_in_output": False, "repetition_detection": None, "skip_reading_prefix_cache": None},
    **{"prompt_logprobs": None, "prompt_logprob_token_ids": None, "prompt_logprob_start": None},
    **{"flat_logprobs": False, "detokenize": True, "skip_special_tokens": True, "output_kind": 0},
    **{"spaces_between_special_tokens": True, "stream_interval": None, "skip_clone": False},
    **{"output_text_buffer_length": 0, "routed_experts_prompt_start": 0, "_eos_token_id": None},
    **{"_all_stop_token_ids": (), "_bad_words_token_ids": None, "_watermarking_skipped": False},
}
IGNORED = {
    **{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": None, "min_tokens": 0},
    **{"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "logprobs": None},
    **{"logprob_token_ids": None, "structured_outputs": None, "logit_bias": None, "bad_words": None},
    **{"allowed_token_ids": None, "extra_args": None, "thinking_token_budget": None},
    **{"trace_decode_token_ids": None, "watermarking": None},
}
SamplingParams = request_class(APPLIED | IGNORED)


@pytest.mark.parametrize("name", [*APPLIED, *IGNORED])
def test_what_a_request_asks_for_is_applied_or_warned_of(
    adapter: Any, name: str, recwarn: pytest.WarningsRecorder
):
    """A request is added to the sampler, which has the base sampler's method."""
    added = []
    sampler = start(adapter, make_model(), {"temperature": 0.5})
    sampler._base_sampler = SimpleNamespace(add_request=lambda *request: added.append(request))
    requests = [SamplingParams(), SamplingParams(**{name: "asked"}), SamplingParams(**{name: "again"})]
    requests.append(SamplingParams(temperature=0.5))
    for request in requests:
        sampler.add_request(3, 7, request)
    assert added == [(3, 7, request) for request in requests]
    texts = [str(warning.message) for warning in recwarn]
    if name in APPLIED:
        assert texts == []
    else:
        (text,) = texts
        assert f"{name}: expected {IGNORED[name]!r}" in text
        assert "got 'asked'" in text


def test_requests_that_ask_for_nothing(adapter: Any, recwarn: pytest.WarningsRecorder):
    remask = adapter.Remask(MASK, BLOCK)
    remask.check_request(SamplingParams(temperature=0.0, seed=5))  # as decided as without
    warmup = SamplingParams(top_p=0.9, seed=5)
    SamplingParams.for_sampler_warmup = staticmethod(lambda: warmup)
    remask.check_request(warmup)
    del SamplingParams.for_sampler_warmup
    assert not recwarn.list


@pytest.mark.parametrize("policy", ["attn", "threshold"])
def test_requests_that_draw_in_their_own_way(adapter: Any, policy: str, recwarn: pytest.WarningsRecorder):
    """Each as it would alone, by its seed; one of a temperature of 0 as by an entry that says so."""
    asked = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.8, top_k=-1, min_p=0.05, seed=5),
        SamplingParams(temperature=1.5, top_k=7, top_p=0.9, seed=6),
    ]
    model = make_model()

    def served(rows: list[int], asked: list[Any] = asked) -> list[list[int]]:
        sampler = start(adapter, model, {"temperature": "request", "policy": policy})
        sampler._base_sampler = SimpleNamespace(add_request=lambda *_: None)
        return serve(sampler, model, 2, [PROMPTS[i] for i in rows], [asked[i] for i in rows])

    together = served([0, 1, 2])
    assert together[0] == decode_whole(toy(), PROMPTS[0], 2, policy=policy, softmax_scope="block")
    for rows in ([1], [2], [2, 1]):
        assert served(rows) == [together[i] for i in rows]
    others = [SamplingParams(**(vars(params) | {"seed": 9})) for params in asked]
    assert served([0, 1, 2], others) != together
    assert not recwarn.list


FILTERS = ("vllm", "vllm/v1/sample/ops/topk_topp_sampler.py")


@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [pytest.param(*x, marks=needs_installed(*FILTERS)) for x in ((4, 1.0), (0, 0.7), (9, 0.6), (-1, 1.0))],
)
def test_what_may_be_drawn_is_what_the_installed_filters_leave(
    adapter: Any, monkeypatch: pytest.MonkeyPatch, top_k: int, top_p: float
):
    """vLLM's own, in PyTorch, which is given ``top_k`` as the size of the vocabulary where that is all."""
    filters = load_alone(monkeypatch, "vllm.v1.sample.ops.topk_topp_sampler", *FILTERS, {})
    logits = torch.randn(60, MASK, generator=torch.Generator().manual_seed(2)) * 2.0
    k = torch.full((60,), top_k if top_k > 0 else MASK)
    own = filters.apply_top_k_top_p_pytorch(logits.clone(), k, torch.full((60,), top_p)).isfinite()
    remask = adapter.Remask(MASK, BLOCK, temperature="request")
    remask.params = [SamplingParams(top_k=top_k, top_p=top_p)]
    draws = {name: torch.tensor(remask._draws()[name]).view(1, 1, 1) for name in ("top_k", "top_p", "min_p")}
    assert torch.equal(truncation(logits[None], *draws.values())[0], own)


def test_what_a_request_that_draws_in_its_own_way_is_warned_of(adapter: Any):
    remask = adapter.Remask(MASK, BLOCK, policy="threshold", temperature="request")
    with pytest.warns(UserWarning, match="min_p: it filters after top_p here, and in vLLM before"):
        remask.check_request(SamplingParams(min_p=0.1, top_p=0.5))
    with pytest.warns(UserWarning, match="and requests' own ways; logprobs: expected None, got 3"):
        remask.check_request(SamplingParams(logprobs=3))
    with pytest.raises(ValueError, match="params: expected the SamplingParams"):
        remask(torch.zeros(1, BLOCK, MASK + 1), torch.full((1, BLOCK), MASK), MASK, 0.9)
    remask.params = [SamplingParams(top_k=1)]
    logits = torch.randn(1, BLOCK, MASK + 1)
    drawn = remask(logits, torch.full((1, BLOCK), MASK), MASK, 0.9)[0]
    best = logits[..., :MASK].argmax(dim=-1)
    assert ((drawn == best) | (drawn == MASK)).all()
    with pytest.raises(TypeError, match="temperature: expected"):
        adapter.Remask(MASK, BLOCK, temperature="asked")


@pytest.mark.parametrize("known", [pytest.param(APPLIED | IGNORED, marks=needs_installed(*PARAMS[:2]))])
def test_installed_parameters_are_classified(known: dict[str, Any]):
    assert set(fields(*PARAMS)) == set(known)


@pytest.mark.parametrize(
    "kind",
    [
        *({"alibi_slopes": [0.5] * 4}, {"logits_soft_cap": 30.0}, {"sinks": torch.zeros(4)}),
        *({"sliding_window": (BLOCK - 1, BLOCK - 1)}, {"sliding_window": (64, 0)}),
    ],
)
def test_kinds_of_attention_that_are_not_served(adapter: Any, kind: dict[str, Any]):
    model = make_model()
    plain = {"alibi_slopes": None, "logits_soft_cap": 0, "sinks": None, "sliding_window": (64, 64)}
    vars(model.attention[1].impl).update(plain)
    adapter.Remask(MASK, BLOCK).watch(model)
    vars(model.attention[1].impl).update(kind)
    with pytest.raises(NotImplementedError, match=f"{next(iter(kind))}: attention with it is not served"):
        adapter.Remask(MASK, BLOCK).watch(model)


@pytest.mark.parametrize(
    "config", [{"commit_confidence_threshold": 0.5}, {"denoise_steps": 8}, {"num_transfer": 2}, {"other": 1}]
)
def test_the_default_policy_s_options_are_refused(adapter: Any, config: dict[str, Any]):
    remask = adapter.Remask(MASK, BLOCK, policy="confidence")
    arguments = {"input_draft": (MASK,) * BLOCK, "logits": torch.randn(BLOCK, MASK + 1)}
    plain = {"mask_token_id": MASK, "denoise_step_index": 3, "grammar_extra_transfer": 0}
    assert remask.apply(**arguments, remasking_config=plain).committed_token_ids == ()
    with pytest.raises(ValueError, match=f"remasking_config: {next(iter(config))}: expected None, got "):
        remask.apply(**arguments, remasking_config=config)


def test_the_plugin_s_own_threshold_is_refused(adapter: Any):
    sampler = DiffusionSampler(None, None, torch.device("cpu"), MASK, BLOCK, 0.7, 64, BLOCK)
    with pytest.raises(ValueError, match=r"dllm-plugin's threshold: expected 0\.9, got 0\.7: the policy has"):
        adapter._use(sampler, adapter.Remask(MASK, BLOCK))


def test_switched_off(adapter: Any):
    model = make_model()
    sampler = start(adapter, model, None)
    assert sampler._remask_fn is batched_remask
    assert not any(layer._forward_pre_hooks for layer in model.attention)


def test_misuse(adapter: Any, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="backend: expected one of"):
        adapter.Remask(MASK, BLOCK, backend="gpu")
    with pytest.raises(ValueError, match="policy: 'clad' reads the block's attention map"):
        adapter.Remask(MASK, BLOCK, policy="clad")
    with pytest.raises(ValueError, match="carries something over"):
        adapter.Remask(MASK, BLOCK, policy="klass")
    remask = adapter.Remask(MASK, BLOCK)
    draft, logits = torch.full((1, BLOCK), MASK), torch.zeros(1, BLOCK, MASK + 1)
    with pytest.raises(RuntimeError, match="no attention of the model was seen"):
        remask(logits, draft, MASK, 0.9)
    with pytest.raises(ValueError, match="mask_token_id: expected 22, as at the start, got 3"):
        remask(logits, draft, 3, 0.9)
    with pytest.raises(RuntimeError, match="Linear has no Attention layer"):
        remask.watch(nn.Linear(1, 1))
    for layers in ([5], [-3, 0], slice(2, None)):
        with pytest.raises(RuntimeError, match="does not fit the 2 attention layers of the model"):
            adapter.Remask(MASK, BLOCK, layers=layers).watch(make_model())
    with pytest.raises(TypeError, match="threshold"):
        start(adapter, make_model(), {"threshold": 0.5})
    monkeypatch.delattr(DiffusionSampler, "__call__")
    with pytest.raises(RuntimeError, match="SimpleNamespace has no _remask_fn"):
        adapter._use(SimpleNamespace(), remask)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "1.0")
    with pytest.raises(RuntimeError, match=r"dllm_plugin 1\.0 is outside the tested range"):
        adapter.register()


def test_without_the_plugin_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch):
    from attn_sampler.adapters import vllm

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert vllm.register() is None
    monkeypatch.setitem(sys.modules, "vllm_dllm_plugin.remasking", None)
    with pytest.raises(ImportError, match=r"vllm_dllm_plugin cannot be imported .* pip install git\+https"):
        vllm._remasking()
