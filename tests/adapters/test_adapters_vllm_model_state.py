"""The adapter for vLLM's own diffusion models: their samplers over an engine with a paged cache."""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine_toy import (
    BLOCK,
    FlatToy,
    attend,
    decode_whole,
    load_alone,
    needs_installed,
    stub,
    toy,
)
from torch import Tensor, nn
from toy_model import MASK, VOCAB

from attn_sampler import Policy, column_scores, select_tokens

PROMPTS = [[5, 7, 2, 9], [1, 4, 8, 3, 2, 6, 7, 7], [6] * 4]
PAGE, PAGES = 3, 64  # tokens, pages: a canvas lies over two or three pages
SLOTS = 5
DIFFUSION = ("vllm", "vllm/model_executor/models/diffusion_gemma.py")
STATISTICS = ("vllm", "vllm/model_executor/models/diffusion_gemma_sampler.py")


class Impl:
    """An attention backend: keys and values in pages, ``[pages, Hkv, page_size, 2 * D]``."""

    def __init__(self, weights: Any, window: int | None = None) -> None:
        self.num_heads, self.num_kv_heads, self.head_size = weights.heads, weights.kv_heads, weights.headdim
        self.scale = weights.headdim**-0.5
        self.sliding_window = (-1, -1) if window is None else (window - 1, 0)
        self.logits_soft_cap, self.alibi_slopes = 0, None

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Any,
        value: Any,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
    ) -> Tensor:
        if attn_metadata is None:
            return output.fill_(0)
        starts = attn_metadata.query_start_loc.tolist()
        for i, (lo, hi) in enumerate(itertools.pairwise(starts)):
            where = page_places(attn_metadata.block_table[i], int(attn_metadata.seq_lens[i]))
            pages = kv_cache.transpose(1, 2)[where]
            k, v = pages.split(self.head_size, dim=-1)
            output[lo:hi] = attend(query[lo:hi], k, v)[0]
        return output


class Attention(nn.Module):
    def __init__(self, weights: Any, window: int | None = None) -> None:
        super().__init__()
        self.impl = Impl(weights, window)
        self.kv_cache = torch.full((PAGES, weights.kv_heads, PAGE, 2 * weights.headdim), torch.nan)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, metadata: Any) -> Tensor:
        if metadata is not None:
            self.kv_cache.transpose(1, 2)[metadata.slots] = torch.cat([key, value], dim=-1)
        output = torch.zeros_like(query)
        return self.impl.forward(self, query, key, value, self.kv_cache, metadata, output=output)


def page_places(block_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    position = torch.arange(length)
    return block_table[position // PAGE].long(), position % PAGE


class Buffer:
    """vLLM's UvaBackedTensor."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.gpu = torch.zeros(size, dtype=dtype)
        self.np = self.gpu.numpy()

    def copy_to_uva(self) -> None:
        pass


class ModelState:
    num_new_sampled_tokens_per_step = 1

    def __init__(self, vllm_config: Any, model: nn.Module) -> None:
        self.vllm_config, self.model = vllm_config, model

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any] | None:
        return None

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        return {}


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Any:
    group = SimpleNamespace(world_size=1, device_group=None)
    state = type("ModelState", (), {name: x for name, x in vars(ModelState).items() if name != "__dict__"})
    stub(
        monkeypatch,
        {
            "vllm": {"__version__": "0.33.0"},
            "vllm.v1.worker.gpu.model_states.interface": {"ModelState": state},
            "vllm.model_executor.layers.attention": {"Attention": Attention},
            "vllm.distributed.parallel_state": {"get_tp_group": lambda: group},
        },
    )
    return importlib.import_module("attn_sampler.adapters.vllm_model_state")


def config(options: dict[str, Any] | None, **diffusion: Any) -> Any:
    return SimpleNamespace(
        additional_config=None if options is None else {"attn_sampler": options},
        model_config=SimpleNamespace(enforce_eager=True),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        diffusion_config=SimpleNamespace(canvas_length=BLOCK, **diffusion),
    )


class RequestStates:
    """What vLLM keeps for its requests."""

    def __init__(self) -> None:
        self.draft_tokens = torch.zeros(SLOTS, BLOCK, dtype=torch.int64)


class BaseSampler:
    def __init__(self) -> None:
        self.req_states = RequestStates()
        self.sampling_states = SimpleNamespace(temperature=Buffer(SLOTS, torch.float32))
        self.sampling_states.temperature.np[:] = 1.0
        self.logprob_token_ids_state, self.logprobs_mode = None, "raw_logprobs"


class Engine:
    """vLLM's scheduler, cache and runner, as far as samplers see them. Prompts run in chunks of BLOCK."""

    def __init__(self, model: FlatToy, state: Any, sampler: Any, prompts: list[list[int]]) -> None:
        self.model, self.state, self.sampler = model, state, sampler
        generator = torch.Generator().manual_seed(1)
        pages = torch.randperm(PAGES, generator=generator)[: SLOTS * 8].view(SLOTS, 8)
        self.pages = pages.to(torch.int32)
        order = [3, 0, 4, 2, 1]
        self.requests = [
            SimpleNamespace(tokens=list(prompt), prompt=len(prompt), cached=0, slot=order[i], fresh=[])
            for i, prompt in enumerate(prompts)
        ]

    def step(self, running: list[Any]) -> Any:
        drafts = self.sampler.req_states.draft_tokens
        for request in running:
            own = request.tokens[request.cached : request.cached + BLOCK]
            request.denoises = request.cached >= request.prompt
            request.input = drafts[request.slot].tolist() if request.denoises else own
        slots = np.array([request.slot for request in running])
        counts = np.array([BLOCK * request.denoises for request in running])
        starts = np.arange(len(running) + 1) * BLOCK
        lengths = torch.tensor([request.cached + BLOCK for request in running], dtype=torch.int32)
        cached = np.array([min(request.cached, request.prompt) for request in running])
        batch = SimpleNamespace(
            num_reqs=len(running),
            idx_mapping=torch.from_numpy(slots),
            idx_mapping_np=slots,
            cu_num_logits_np=np.concatenate([[0], counts.cumsum()]),
            num_draft_tokens=int(counts.sum()),
            query_start_loc=torch.from_numpy(starts),
            query_start_loc_np=starts,
            seq_lens=lengths,
            num_computed_prefill_tokens_np=cached,
            num_scheduled_tokens=np.full(len(running), BLOCK),
            prefill_len_np=np.array([request.prompt for request in running]),
        )
        table = self.pages[torch.from_numpy(slots)]
        where = [page_places(table[i], int(n)) for i, n in enumerate(lengths)]
        places = tuple(torch.cat([each[part][-BLOCK:] for each in where]) for part in (0, 1))
        metadata = SimpleNamespace(
            query_start_loc=batch.query_start_loc, seq_lens=lengths, block_table=table, slots=places
        )
        self.state.prepare_inputs(batch, None)
        tokens = torch.tensor([token for request in running for token in request.input])
        logits = self.model(tokens, running, lambda layer, q, k, v: layer(q, k, v, metadata))
        chosen = torch.from_numpy(np.repeat(counts > 0, BLOCK))
        output = self.sampler(logits[chosen], batch)
        for i, request in enumerate(running):
            emitted = int(output.num_sampled[i])
            if request.denoises:
                sampled = output.sampled_token_ids[i, :emitted].tolist()
                assert sampled == request.input[:emitted], "the keys in the cache are of other tokens"
                request.tokens += sampled
                request.cached += emitted
            else:
                request.cached += BLOCK
        return output

    def serve(self, num_blocks: int) -> list[list[int]]:
        """All prompts at once, the last one a step later."""
        for step in range(100):
            running = [r for r in self.requests if len(r.tokens) < r.prompt + num_blocks * BLOCK]
            if not running:
                return [request.tokens for request in self.requests]
            self.step(running[: len(running) - (step == 0)])
        raise AssertionError("the canvases are never done")


# A masked model: a stand-in for the sampler of vLLM's pull request 48279 (there is no release with it).
def masked_step(
    logits: Tensor,
    decode_slots: Tensor,
    decode_idx: Tensor,
    all_slots: Tensor,
    valid_canvas_len: Tensor,
    req_temps: Tensor,
    canvas: Tensor,
    step_tensor: Tensor,
    is_encoder_phase: Tensor,
    unmask_logprobs: Tensor,
    unmask_ranks: Tensor,
    sampled: Tensor,
    num_sampled: Tensor,
    draft_tokens: Tensor,
    max_denoising_steps: int,
    mask_token_id: int,
    CL: int,
    temperature: float,
    capture_logprobs: bool,
    leftmost: bool,
) -> Tensor:
    raise AssertionError("the engine's own step")


_compiled_masked_step = masked_step


class MaskedDiffusionSampler:
    def __init__(self, sampler: Any, temperature: float, steps: int, capture: bool = False) -> None:
        self.sampling_states, self.req_states = sampler.sampling_states, sampler.req_states
        self.temperature, self.capture = temperature, capture
        self.diffusion_states = SimpleNamespace(
            canvas_length=BLOCK,
            mask_token_id=MASK,
            max_denoising_steps=steps,
            canvas=torch.full((SLOTS, BLOCK), MASK),
            step=torch.zeros(SLOTS, dtype=torch.int32),
            is_encoder_phase=torch.ones(SLOTS, dtype=torch.bool),
            unmask_logprobs=torch.zeros(SLOTS, BLOCK),
            unmask_ranks=torch.zeros(SLOTS, BLOCK, dtype=torch.int32),
        )
        self.penalties_state = "none"

    def __call__(self, logits: Tensor, input_batch: Any, draft_logits: Any = None) -> Any:
        states, count = self.diffusion_states, input_batch.num_reqs
        slots = input_batch.idx_mapping
        lengths = torch.from_numpy(np.diff(input_batch.cu_num_logits_np))
        rows = lengths.nonzero().flatten()
        ready = (lengths == 0) & torch.from_numpy(
            input_batch.num_computed_prefill_tokens_np + BLOCK >= input_batch.prefill_len_np
        )
        states.canvas[slots[ready]] = MASK
        states.is_encoder_phase[slots[ready]] = False
        self.req_states.draft_tokens[slots[ready]] = MASK
        sampled = torch.zeros(count, BLOCK, dtype=torch.int32)
        num_sampled = torch.zeros(count, dtype=torch.int32)
        if len(rows):
            _compiled_masked_step(
                logits,
                slots[rows],
                rows,
                slots,
                lengths[rows],
                self.sampling_states.temperature.gpu[slots[rows]],
                states.canvas,
                states.step,
                states.is_encoder_phase,
                states.unmask_logprobs,
                states.unmask_ranks,
                sampled,
                num_sampled,
                self.req_states.draft_tokens,
                max_denoising_steps=states.max_denoising_steps,
                mask_token_id=MASK,
                CL=BLOCK,
                temperature=self.temperature,
                capture_logprobs=self.capture,
                leftmost=False,
            )
        return SimpleNamespace(sampled_token_ids=sampled, num_sampled=num_sampled)


def masked_engine(
    adapter: Any,
    options: dict[str, Any],
    prompts: list[list[int]] = PROMPTS,
    *,
    temperature: float = 0.0,
    steps: int = 99,
    capture: bool = False,
    **diffusion: Any,
) -> Engine:
    adapter.register()
    adapter.register()
    base = sys.modules["vllm.v1.worker.gpu.model_states.interface"].ModelState

    class MaskedState(base):  # type: ignore[misc, valid-type]
        num_new_sampled_tokens_per_step = 0

        def custom_sampler(self, sampler: Any) -> tuple[Any, Any] | None:
            return MaskedDiffusionSampler(sampler, temperature, steps, capture), None

    weights = toy()
    model = FlatToy(weights, lambda i: Attention(weights))
    state = MaskedState(config(options, **diffusion), model)
    sampler, rejection = state.custom_sampler(BaseSampler())
    assert rejection is None
    return Engine(model, state, sampler, prompts)


@pytest.mark.parametrize(
    "options",
    [{"tau": 0.3}, {"policy": "attn-sequential", "layers": [0]}, {"policy": "threshold", "tau": 0.4}],
)
def test_masked_canvases_are_those_of_generate(adapter: Any, options: dict[str, Any]):
    """Exactly: the softmax is over the whole context. (The toy commits a canvas as it denoised it.)"""
    engine = masked_engine(adapter, options)
    served = engine.serve(2)
    assert served == [decode_whole(toy(), p, 2, **({"policy": "attn"} | options)) for p in PROMPTS]
    assert engine.sampler.penalties_state == "none"
    assert _compiled_masked_step is masked_step


def test_a_threshold_reads_no_attention(adapter: Any):
    engine = masked_engine(adapter, {"policy": "threshold"})
    assert not hasattr(engine.model.attention[0].impl.forward, "__wrapped__")


def test_the_step_budget_fills_what_is_left(adapter: Any):
    engine = masked_engine(adapter, {"policy": "attn-sequential"}, PROMPTS[:1], steps=2)
    outputs = [engine.step(engine.requests) for _ in range(4)]
    assert [int(output.num_sampled) for output in outputs] == [0, 0, 0, BLOCK]
    assert MASK not in engine.requests[0].tokens


def test_log_probabilities_are_those_of_the_step_that_filled(adapter: Any, monkeypatch: pytest.MonkeyPatch):
    engine = masked_engine(adapter, {"policy": "confidence"}, PROMPTS[:1], capture=True)
    seen = []
    own = engine.sampler._sampler

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            return getattr(own, name)

        def __call__(self, logits: Tensor, batch: Any) -> Any:
            before = own.diffusion_states.canvas[3].clone()
            output = own(logits, batch)
            changed = (before == MASK) & (own.diffusion_states.canvas[3] != MASK)
            seen.append((logits.clone(), changed))
            return output

    monkeypatch.setattr(engine.sampler, "_sampler", Recorder())
    for _ in range(5):
        engine.step(engine.requests)
    states = own.diffusion_states
    assert (states.unmask_ranks[3] == 1).all(), "a greedy token is the most probable"
    for logits, changed in seen[1:]:
        best = logits[:, :MASK].log_softmax(dim=-1).amax(dim=-1)
        torch.testing.assert_close(states.unmask_logprobs[3][changed], best[changed])


def test_a_request_s_temperature_of_0_is_served_beside_the_engine_s(adapter: Any):
    """Its tokens are those of a greedy engine, in a batch of which the others draw."""
    greedy = masked_engine(adapter, {"policy": "attn", "tau": 0.3}).serve(1)
    drawing = masked_engine(adapter, {"policy": "attn", "tau": 0.3}, temperature=1.5)
    own = [request.slot for request in drawing.requests]
    drawing.sampler.sampling_states.temperature.np[own[2]] = 0.0
    served = drawing.serve(1)
    assert served[2] == greedy[2]
    assert served[0] != greedy[0] or served[1] != greedy[1]


def test_log_probabilities_are_those_of_each_row_s_temperature(adapter: Any):
    engine = masked_engine(adapter, {"policy": "threshold", "tau": 0.0}, temperature=2.5, capture=True)
    first, last = engine.requests[0].slot, engine.requests[2].slot
    engine.sampler.sampling_states.temperature.np[last] = 0.0
    engine.step(engine.requests)
    seen, forward = [], engine.model.forward
    engine.model.forward = lambda *given: seen.append(forward(*given)) or seen[-1]  # type: ignore[method-assign]
    states = engine.sampler.diffusion_states
    while (states.canvas[[first, last]] == MASK).any():
        masked = (states.canvas[[first, last]] == MASK).all(dim=1)
        engine.step(engine.requests)
        for slot, row, temperature, fresh in ((first, 0, 2.5, masked[0]), (last, 2, 1.0, masked[1])):
            if fresh and (states.canvas[slot] != MASK).all():
                x = seen[-1].unflatten(0, (-1, BLOCK))[row] / temperature
                x[:, MASK] = -torch.inf
                expected = x.log_softmax(dim=-1).gather(-1, states.canvas[slot][:, None])[:, 0]
                torch.testing.assert_close(states.unmask_logprobs[slot], expected)
    assert len(seen) >= 1


# A canvas of random tokens: a stand-in for DiffusionSampler of 0.33.0, or that itself.
def sample_row_stats_reference(logits: Tensor, temps: Tensor, canvas_len: int, probs_dtype: Any) -> Any:
    scaled = logits / temps.repeat_interleave(canvas_len)[:, None]
    noise = -torch.log(-torch.log(torch.rand_like(scaled)))
    log_p = scaled.log_softmax(dim=-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return scaled.argmax(dim=-1), (scaled + noise).argmax(dim=-1), entropy, None


def canvas_step(
    new_tokens: Tensor,
    argmax_tokens: Tensor,
    token_entropy: Tensor,
    decode_slots: Tensor,
    decode_idx: Tensor,
    all_slots: Tensor,
    valid_canvas_len: Tensor,
    canvas: Tensor,
    is_encoder_phase: Tensor,
    pin_mask: Tensor,
    sampled: Tensor,
    num_sampled: Tensor,
    draft_tokens: Tensor,
    vocab_size: int,
    CL: int,
) -> None:
    """Accepts nothing, and is never done; what was committed goes on."""
    is_encoder_phase[decode_slots] = False
    canvas[decode_slots] = torch.where(pin_mask[decode_slots], canvas[decode_slots], 0)
    draft_tokens[all_slots, :CL] = canvas[all_slots]


_compiled_sample_step = canvas_step


class DiffusionSampler:
    def __init__(self, sampler: Any, **_: Any) -> None:
        self.req_states, self.sampling_states = sampler.req_states, sampler.sampling_states
        self.diffusion_states = SimpleNamespace(
            canvas_length=BLOCK,
            canvas=torch.zeros(SLOTS, BLOCK, dtype=torch.int64),
            is_encoder_phase=torch.ones(SLOTS, dtype=torch.bool),
            pin_mask=torch.zeros(SLOTS, BLOCK, dtype=torch.bool),
        )

    def __call__(self, logits: Tensor, input_batch: Any, draft_logits: Any = None) -> Any:
        states, slots = self.diffusion_states, input_batch.idx_mapping
        lengths = torch.from_numpy(np.diff(input_batch.cu_num_logits_np))
        rows = lengths.nonzero().flatten()
        states.is_encoder_phase[slots[lengths == 0]] = False
        sampled = torch.zeros(len(slots), BLOCK, dtype=torch.int32)
        num_sampled = torch.zeros(len(slots), dtype=torch.int32)
        if len(rows):
            temps = torch.full((len(rows),), 0.7)
            best, drawn, entropy, _ = sample_row_stats_reference(logits, temps, BLOCK, None)
            _compiled_sample_step(
                drawn.view(-1, BLOCK),
                best.view(-1, BLOCK),
                entropy.view(-1, BLOCK),
                slots[rows],
                rows,
                slots,
                lengths[rows],
                states.canvas,
                states.is_encoder_phase,
                states.pin_mask,
                sampled,
                num_sampled,
                self.req_states.draft_tokens,
                vocab_size=VOCAB,
                CL=BLOCK,
            )
        return SimpleNamespace(sampled_token_ids=sampled, num_sampled=num_sampled)


def installed_canvas_sampler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's own file, with its sampler, states and step."""
    monkeypatch.setattr(torch, "compile", lambda *_, **__: lambda function: function)
    identity = SimpleNamespace(register_processor=lambda *_, **__: lambda cls: cls)
    given = {
        "MULTIMODAL_REGISTRY": identity,
        "current_platform": SimpleNamespace(simple_compile_backend="eager"),
        "init_logger": lambda _: SimpleNamespace(warning_once=print),
        "UvaBackedTensor": Buffer,
        "async_tensor_h2d": lambda data, dtype=None, device=None: torch.as_tensor(data, dtype=dtype),
        "SamplerOutput": lambda **fields: SimpleNamespace(**fields),
        "use_penalty": lambda _: False,
        "ModelState": sys.modules["vllm.v1.worker.gpu.model_states.interface"].ModelState,
        "triton": SimpleNamespace(jit=lambda function: function),
        "tl": SimpleNamespace(constexpr=int),
    }
    name = "vllm.model_executor.models.diffusion_gemma"
    load_alone(monkeypatch, f"{name}_sampler", *STATISTICS, given)
    return load_alone(monkeypatch, name, *DIFFUSION, given)


def canvas_engine(
    adapter: Any, monkeypatch: pytest.MonkeyPatch, source: str, options: dict[str, Any]
) -> Engine:
    module = installed_canvas_sampler(monkeypatch) if source == "installed" else sys.modules[__name__]
    adapter.register()
    base = sys.modules["vllm.v1.worker.gpu.model_states.interface"].ModelState

    class CanvasState(base):  # type: ignore[misc, valid-type]
        def custom_sampler(self, sampler: Any) -> tuple[Any, Any] | None:
            if source != "installed":
                return DiffusionSampler(sampler), None
            sampler.logprob_token_ids_state = SimpleNamespace(max_num_token_ids=lambda _: 0)
            states = module.DiffusionGemmaRequestStates(
                SLOTS, BLOCK, VOCAB, 9, torch.device("cpu"), hidden_size=6, stability_threshold=2
            )
            nothing = (None, None, None)
            sampler.sampling_states.get_top_k_top_p = lambda *_: nothing
            sampler.sampling_states.max_num_logprobs = lambda _: -1
            monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda: (1 << 30, 1 << 30))
            return module.DiffusionSampler(
                sampler,
                SimpleNamespace(canvas_length=BLOCK),
                VOCAB,
                states,
                confidence_threshold=0.0,
                t_min=0.4,
                t_max=0.8,
                entropy_bound=0.1,
                embed_weight=torch.randn(VOCAB, 6),
                normalizer=torch.tensor(1.0),
            ), None

    weights = toy()
    model = FlatToy(weights, lambda i: Attention(weights, window=BLOCK + 2 if i else None))
    state = CanvasState(config(options), model)
    sampler, _ = state.custom_sampler(BaseSampler())
    return Engine(model, state, sampler, PROMPTS)


canvas_sources = pytest.mark.parametrize(
    "source", ["stand-in", pytest.param("installed", marks=needs_installed(*DIFFUSION))]
)


@canvas_sources
@pytest.mark.parametrize("rule", ["attn", "attn-sequential", "eb", "threshold"])
def test_a_random_canvas_keeps_what_the_policy_accepts(
    adapter: Any, monkeypatch: pytest.MonkeyPatch, source: str, rule: str
):
    """By scores of attention written out, with a window in one layer, to keys in pages in random order."""
    engine = canvas_engine(adapter, monkeypatch, source, {"policy": rule})
    step, drawn = engine.sampler.step, []
    accepted = step._accepted
    noise = VOCAB - 3
    monkeypatch.setattr(torch, "randint_like", lambda x, *_: torch.full_like(x, noise))

    def recorded(call: Any, free: Tensor) -> Tensor:
        drawn.append((call.new_tokens.clone(), step._drawn[0], free, call.token_entropy))
        return accepted(call, free)

    step._accepted = recorded
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for index, layer in enumerate(engine.model.attention):
        whole = layer.forward

        def kept(
            q: Tensor, k: Tensor, v: Tensor, metadata: Any, index: int = index, whole: Any = whole
        ) -> Tensor:
            seen.setdefault(index, []).append((q.clone(), k.clone()))
            return whole(q, k, v, metadata)

        layer.forward = kept  # type: ignore[method-assign]
    requests = engine.requests
    keys: list[list[Tensor]] = [[torch.zeros(0, 2, 8)] * 2 for _ in requests]
    for number in range(5):
        engine.step(requests)
        canvases = [i for i, request in enumerate(requests) if request.denoises]
        expected = torch.zeros(len(canvases), BLOCK)
        for layer in range(2):
            q, k = seen[layer][number]
            for i, request in enumerate(requests):
                own = slice(i * BLOCK, (i + 1) * BLOCK)
                if not request.denoises:
                    keys[i][layer] = torch.cat([keys[i][layer], k[own]])
                    continue
                context = torch.cat([keys[i][layer], k[own]]).transpose(0, 1)[None]
                window = (BLOCK + 1, BLOCK + 1) if layer else (-1, -1)
                column_scores(
                    q[own].transpose(0, 1)[None],
                    context,
                    columns=slice(context.shape[2] - BLOCK, context.shape[2]),
                    window_size=window,
                    out=expected[canvases.index(i)][None],
                    backend="reference",
                )
        if not canvases:
            continue
        tokens, scaled, free, entropy = drawn[-1]
        assert free.all()
        confidence = scaled.softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
        if rule in ("attn", "attn-sequential"):
            kind = {"attn": "parallel"}.get(rule, "sequential")
            mine = select_tokens(expected, confidence, free, rule=kind)
        elif rule == "threshold":
            mine = confidence >= 0.9
            mine |= (confidence == confidence.amax(dim=1, keepdim=True)) & ~mine.any(dim=1, keepdim=True)
        else:
            order = entropy.argsort(dim=1, stable=True)
            ordered = entropy.gather(1, order)
            mine = torch.zeros_like(free).scatter(1, order, ordered.cumsum(dim=1) - ordered <= 0.1)
        slots = torch.tensor([requests[i].slot for i in canvases])
        canvas = engine.sampler.diffusion_states.canvas[slots]
        assert canvas.tolist() == torch.where(mine, tokens, noise).tolist()
        assert engine.sampler.req_states.draft_tokens[slots].tolist() == canvas.tolist()
    assert len(drawn) >= 3


def test_a_canvas_that_vllm_commits_is_left_to_it(adapter: Any, monkeypatch: pytest.MonkeyPatch):
    engine = canvas_engine(adapter, monkeypatch, "stand-in", {"policy": "attn"})
    states, slot = engine.sampler.diffusion_states, engine.requests[0].slot
    for _ in range(2):
        engine.step(engine.requests[:1])
    assert states.canvas[slot].any()
    states.is_encoder_phase[slot] = True
    engine.step(engine.requests[:1])
    assert not states.canvas[slot].any()


@canvas_sources
def test_pinned_positions_stay(adapter: Any, monkeypatch: pytest.MonkeyPatch, source: str):
    engine = canvas_engine(adapter, monkeypatch, source, {"policy": "attn"})
    states = engine.sampler.diffusion_states
    for _ in range(2):
        engine.step(engine.requests[:1])
    slot = engine.requests[0].slot
    states.pin_mask[slot, 1] = True
    states.canvas[slot, 1] = 17
    if source == "installed":
        states.seed_canvas[slot, 1] = 17
    for _ in range(3):
        engine.step(engine.requests[:1])
        assert int(states.canvas[slot, 1]) == 17


@pytest.mark.parametrize("source", [pytest.param("installed", marks=needs_installed(*DIFFUSION))])
def test_installed_sampler_decodes_to_the_end(adapter: Any, monkeypatch: pytest.MonkeyPatch, source: str):
    """Nine steps a canvas, which vLLM then commits as its most probable tokens."""
    engine = canvas_engine(adapter, monkeypatch, source, {"policy": "attn", "tau": 0.5})
    served = engine.serve(2)
    assert [len(tokens) for tokens in served] == [len(prompt) + 2 * BLOCK for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("lengths", "all_tokens", "canvases"), [([2, 5, 3], [6, 5, 3], [0, 2]), ([3, 1], [3, 9], [0])]
)
def test_short_canvases(adapter: Any, lengths: list[int], all_tokens: list[int], canvases: list[int]):
    """Of less than 4 tokens, beside a prompt, as at the longest length of the model."""
    weights = toy()
    model = FlatToy(weights, lambda i: Attention(weights))
    scores = adapter.BlockScores(BLOCK)
    attention = adapter.CanvasAttention(model, scores, "all")
    count, totals = len(lengths), torch.tensor(all_tokens, dtype=torch.int32)
    starts = torch.tensor([0, *itertools.accumulate(lengths)])
    table = torch.randperm(PAGES)[: 3 * count].view(count, 3).to(torch.int32)
    drafts = [length * (i in canvases) for i, length in enumerate(lengths)]
    batch = SimpleNamespace(
        num_reqs=count,
        cu_num_logits_np=np.array([0, *itertools.accumulate(drafts)]),
        num_draft_tokens=sum(drafts),
        seq_lens=totals,
        seq_lens_cpu_upper_bound=totals,
    )
    where = [page_places(table[i], int(n)) for i, n in enumerate(totals)]
    metadata = SimpleNamespace(query_start_loc=starts, seq_lens=totals, block_table=table)
    attention.begin(batch)
    expected = torch.zeros(count, BLOCK)
    for layer in model.attention:
        q, context = torch.randn(sum(lengths), 4, 8), [torch.randn(n, 2, 8) for n in all_tokens]
        for place, k in zip(where, context, strict=True):
            layer.kv_cache.transpose(1, 2)[place] = torch.cat([k, k], dim=-1)
        layer.impl.forward(layer, q, None, None, layer.kv_cache, metadata, output=torch.zeros_like(q))
        for i in canvases:
            rows, k = q[starts[i] : starts[i + 1]], context[i]
            columns = slice(len(k) - lengths[i], len(k))
            heads = (x.transpose(0, 1)[None] for x in (rows, k))
            expected[i, : lengths[i]] += column_scores(*heads, columns=columns)[0]
    read = attention.read()
    for i in canvases:
        torch.testing.assert_close(read[i, : lengths[i]], expected[i, : lengths[i]])
    assert (read[1] == 0).all()


def test_without_the_option_nothing_changes(adapter: Any):
    adapter.register()
    base = sys.modules["vllm.v1.worker.gpu.model_states.interface"].ModelState

    class Plain(base):  # type: ignore[misc, valid-type]
        pass

    assert Plain(config(None), nn.Linear(1, 1)).custom_sampler(None) is None
    with pytest.raises(ValueError, match="goes with a diffusion model, but Plain has no sampler"):
        Plain(config({}), nn.Linear(1, 1)).custom_sampler(None)

    class Other(Plain):
        def custom_sampler(self, sampler: Any) -> Any:
            assert super().custom_sampler(sampler) is None
            return SimpleNamespace(), None

    with pytest.raises(NotImplementedError, match="expected a sampler among DiffusionSampler, Masked"):
        Other(config({}), nn.Linear(1, 1)).custom_sampler(None)
    assert isinstance(Other(config(None), nn.Linear(1, 1)).custom_sampler(None)[0], SimpleNamespace)


def test_what_the_engine_or_the_policy_does_not_allow(adapter: Any, monkeypatch: pytest.MonkeyPatch):
    for name, value in (("selection_policy", "leftmost"), ("confidence_threshold", 0.8)):
        with pytest.raises(ValueError, match=f"diffusion_config: {name} has no effect"):
            masked_engine(adapter, {}, **{name: value})
    with pytest.raises(TypeError, match="temperature"):
        masked_engine(adapter, {"temperature": 0.5})
    with pytest.raises(ValueError, match="policy: 't2t' takes back what was committed"):
        masked_engine(adapter, {"policy": "t2t"})
    with pytest.raises(ValueError, match=r"judges by probability or entropy, got .*margin"):
        canvas_engine(adapter, monkeypatch, "stand-in", {"policy": "margin"})

    class Mode(str):
        def has_full_cudagraphs(self) -> bool:
            return self == "FULL_AND_PIECEWISE"

        @property
        def name(self) -> str:
            return str(self)

    checked = config({})
    checked.model_config.enforce_eager = False
    checked.compilation_config = SimpleNamespace(cudagraph_mode=Mode("PIECEWISE"))
    adapter._check_engine(checked)
    checked.compilation_config.cudagraph_mode = Mode("FULL_AND_PIECEWISE")
    with pytest.raises(ValueError, match=r"cudagraph_mode has to be PIECEWISE or NONE .* got FULL_AND_PIECE"):
        adapter._check_engine(checked)
    checked = config({})
    checked.parallel_config.pipeline_parallel_size = 2
    with pytest.raises(ValueError, match=r"pipeline_parallel_size: expected 1 .* got 2"):
        adapter._check_engine(checked)


def test_attention_that_cannot_be_read(adapter: Any):
    weights = toy()
    model = FlatToy(weights, lambda i: Attention(weights))
    model.attention[1].impl.logits_soft_cap = 30.0
    with pytest.raises(NotImplementedError, match=r"logits_soft_cap: .* got 30\.0"):
        adapter.CanvasAttention(model, adapter.BlockScores(BLOCK), "all")
    for cache in (
        torch.zeros(4, 2, PAGE, 16, dtype=torch.uint8),
        torch.zeros(4, 2, PAGE, 17),
        torch.zeros(4, 3, PAGE, 2, 8),
    ):
        with pytest.raises(NotImplementedError, match="kv_cache: expected unquantized pages of keys of 8"):
            adapter.key_pages(cache, 8)
    for shape in ((2, 5, PAGE, 3, 8), (5, 2, PAGE, 3, 8)):
        assert adapter.key_pages(torch.zeros(shape), 8).shape == (5, 3, PAGE, 8)
    model = FlatToy(weights, lambda i: Attention(weights))
    attention = adapter.CanvasAttention(model, adapter.BlockScores(BLOCK), "all")
    lengths = torch.tensor([BLOCK])
    attention.begin(
        SimpleNamespace(
            num_reqs=1,
            cu_num_logits_np=np.array([0, BLOCK]),
            num_draft_tokens=BLOCK,
            seq_lens=lengths,
        )
    )
    with pytest.raises(RuntimeError, match="no attention of the model was seen: 0 of 2 layers"):
        attention.read()


def test_a_step_that_has_moved_is_refused(adapter: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules[__name__], "_compiled_masked_step", lambda logits: None)
    with pytest.raises(
        RuntimeError, match=r"_compiled_masked_step: expected arguments among them decode_slots"
    ):
        masked_engine(adapter, {"policy": "threshold"})
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.40.0")
    with pytest.raises(RuntimeError, match=r"vllm 0\.40\.0 is outside the tested range"):
        masked_engine(adapter, {"policy": "threshold"})


def test_policies_of_one_s_own(adapter: Any):
    class Last(Policy):
        def select(self, state: Any) -> Tensor:
            return state.masked & (state.masked.flip(1).cumsum(dim=1).flip(1) == 1)

    engine = masked_engine(adapter, {"policy": Last()}, PROMPTS[:1])
    engine.step(engine.requests)
    engine.step(engine.requests)
    assert (engine.sampler.diffusion_states.canvas[3] != MASK).tolist() == [False, False, False, True]


def test_without_vllm_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch):
    from attn_sampler.adapters import vllm_model_state

    monkeypatch.setitem(sys.modules, "vllm", None)
    assert vllm_model_state.register() is None
