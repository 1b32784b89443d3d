"""vLLM's own diffusion models: attention-guided decoding in the sampler that their ``ModelState`` brings.

Install: ``pip install "vllm>=0.33,<0.34"`` beside attn_sampler, which vLLM then finds as a plugin.

    llm = LLM("google/diffusiongemma-26B-A4B-it", diffusion_config={"canvas_length": 256},
              compilation_config={"cudagraph_mode": "PIECEWISE"},
              additional_config={"attn_sampler": {"tau": 0.8}})

The entry in ``additional_config`` switches it on, with the options of ``PolicySampler``. vLLM's sampler
stays in its place and keeps all that it does (prompts, canvases of other widths, constrained and pinned ones,
``top_k`` and ``top_p`` of a request, log-probabilities, self-conditioning, when a canvas is done); of its
step one thing is replaced, which positions are accepted. Two of its samplers are known:

``DiffusionSampler``
    of DiffusionGemma: canvases of random tokens, each drawn anew in every step; the positions that the policy
    chooses are accepted, in the place of the entropy bound, and a position's confidence is the probability of
    its token in the distribution that it was drawn from.
``MaskedDiffusionSampler``
    of masked models (Nemotron Labs Diffusion, vLLM's pull request 48279, not released yet): the policy
    chooses which predictions stay. The engine's temperature, and a request's of 0, are served; its
    ``selection_policy`` and ``confidence_threshold``, whose place the policy takes, are refused.

What else a request may ask for vLLM answers itself, with an error at its front: no other temperature, no
``min_p``, ``seed``, grammar or bias goes with its diffusion models, whatever the sampler.

vLLM's attention gives no log-sum-exp, so the queries of a canvas meet the keys of the paged cache once more,
in every layer that counts: exact, at the price of reading these keys. A policy that needs no attention reads
none. The ranks of tensor parallelism add up their heads. Attention is read inside vLLM's compiled models too,
but not in full CUDA graphs: those are refused for policies that read it, as are quantized caches and pipeline
parallelism.
Interface of 0.33.0, whose sampler is what the tests run, on a CPU; not run on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attn_sampler.adapters._engine import (
    BlockDecoder,
    BlockScores,
    attention_layers,
    key_pages,
    last_tokens,
    refuse_attention,
    require,
    step_seeds,
)
from attn_sampler.functional import token_confidence
from attn_sampler.policy import Policy, StepState, check_progress

_OPTION = "attn_sampler"

#: What of an attention is not among the scaled products of a block.
_KINDS = ("alibi_slopes", "logits_soft_cap", "sinks")
_NO_MASK = -1  # a canvas of random tokens has no mask token


def _require(module: str) -> Any:
    return require(module, "vllm", 'pip install "vllm>=0.33,<0.34"', "0.33", "0.34")


def register() -> None:
    """Let ``additional_config={"attn_sampler": {...}}`` reach the samplers of vLLM's diffusion models.

    vLLM calls this in each of its processes (entry point ``vllm.general_plugins``), before the models' files
    are imported. Without the option nothing changes.
    """
    try:
        base = importlib.import_module("vllm.v1.worker.gpu.model_states.interface").ModelState
    except ImportError:  # a vLLM that has no such models
        return
    if "_attn_sampler_known" in vars(base):
        return
    base._attn_sampler_known = True
    own_hook = base.__init_subclass__

    def hook(cls: type, **keywords: Any) -> None:
        own_hook(**keywords)
        _wrap(cls)

    base.__init_subclass__ = classmethod(hook)
    known = [base]
    for cls in known:
        _wrap(cls)
        known += cls.__subclasses__()


def _wrap(cls: Any) -> None:
    """Let what this class of ModelState answers as its custom sampler follow the policy."""
    custom_sampler = vars(cls).get("custom_sampler")
    plugins = ("dllm_plugin", "vllm_dllm_plugin")  # which have an adapter of their own
    if custom_sampler is None or cls.__module__.startswith(plugins):
        return

    @functools.wraps(custom_sampler)
    def wrapped(self: Any, *arguments: Any, **keywords: Any) -> Any:
        answer = custom_sampler(self, *arguments, **keywords)
        options = (self.vllm_config.additional_config or {}).get(_OPTION)
        if options is None or type(self).custom_sampler is not wrapped:  # a subclass asks what to build on
            return answer
        if answer is None:
            raise ValueError(
                f"additional_config: {_OPTION} goes with a diffusion model, but {type(self).__name__} has no "
                "sampler of its own"
            )
        return PolicySampler(self, answer[0], **options), *answer[1:]

    cls.custom_sampler = wrapped


class PolicySampler:
    """A sampler of vLLM's, whose step commits by the attention that positions receive, or by another policy.

    Parameters
    ----------
    state, sampler
        The model's ModelState, and the sampler that it brought, which is asked for everything else.
    policy, tau, seed, layers, diagonal, backend
        As in ``generate``. A canvas of random tokens takes policies that judge by probability or entropy.
    reduction
        As in ``column_scores``.

    Raises
    ------
    NotImplementedError, ValueError, RuntimeError
        The sampler, its step or the engine's settings are not of a kind that is served, by name.
    """

    def __init__(
        self,
        state: Any,
        sampler: Any,
        *,
        policy: str | Policy = "attn",
        tau: float | None = None,
        seed: int = 0,
        layers: str | slice | Sequence[int] = "all",
        diagonal: bool = True,
        reduction: str = "sum",
        backend: str = "auto",
    ) -> None:
        _require("vllm")
        kinds: dict[str, Any] = {"DiffusionSampler": _CanvasStep, "MaskedDiffusionSampler": _MaskedStep}
        if (kind := type(sampler).__name__) not in kinds:
            raise NotImplementedError(f"{_OPTION}: expected a sampler among {', '.join(kinds)}, got {kind}")
        states = sampler.diffusion_states
        decoder = BlockDecoder(
            policy,
            tau=tau,
            mask_token_id=getattr(states, "mask_token_id", 0),
            seed=seed,
            backend=backend,
        )
        attention = None
        if decoder.policy.needs_scores:
            _check_engine(state.vllm_config)
            scores = BlockScores(
                states.canvas_length,
                group=_head_group(),
                diagonal=diagonal,
                reduction=reduction,
                backend=backend,
            )
            attention = CanvasAttention(state.model, scores, layers)
            prepare_inputs = state.prepare_inputs

            @functools.wraps(prepare_inputs)
            def prepared(input_batch: Any, *arguments: Any, **keywords: Any) -> Any:
                attention.begin(input_batch)
                return prepare_inputs(input_batch, *arguments, **keywords)

            state.prepare_inputs = prepared
        self._sampler = sampler
        self._module = sys.modules[type(sampler).__module__]
        self.step = kinds[kind](state, sampler, self._module, decoder, attention)

    def __getattr__(self, name: str) -> Any:
        if name == "_sampler":  # of a copy that is yet to be filled
            raise AttributeError(name)
        return getattr(self._sampler, name)

    def __call__(self, logits: Tensor, input_batch: Any, *arguments: Any, **keywords: Any) -> Any:
        """vLLM's sampler, with the policy's step in the place of its own."""
        self.step.begin(input_batch)
        with _in_place(self._module, self.step.functions):
            return self._sampler(logits, input_batch, *arguments, **keywords)


@contextlib.contextmanager
def _in_place(module: Any, functions: dict[str, Callable[..., Any]]) -> Iterator[None]:
    own = {name: getattr(module, name) for name in functions}
    vars(module).update(functions)
    try:
        yield
    finally:
        vars(module).update(own)


class CanvasAttention:
    """The scores of the canvases in a batch, added up as the model's attention layers run."""

    def __init__(self, model: nn.Module, scores: BlockScores, layers: Any) -> None:
        self._scores, self._length = scores, scores.block_length
        self._rows: Tensor | None = None  # [B], which requests of the batch have a canvas
        self._batch = 0
        self._counts: Tensor | None = None  # [B], how long their canvases are, where one is short
        self._seen = 0
        watched = attention_layers(model, _attention_class(), layers)
        self._depth = len(watched)
        for index, layer in enumerate(watched):
            impl: Any = layer.impl
            refuse_attention(self._length, **{name: getattr(impl, name, None) for name in _KINDS})
            # Inside the operator that vLLM's compiled models call: unlike the layer, it runs in Python.
            impl.forward = self._tapped(impl, index)

    def begin(self, input_batch: Any) -> None:
        """A forward pass of this batch follows."""
        count = input_batch.num_reqs
        lengths = np.diff(input_batch.cu_num_logits_np[: count + 1])
        rows = np.flatnonzero(lengths) if input_batch.num_draft_tokens > 0 else lengths[:0]
        device = input_batch.seq_lens.device
        self._rows = torch.from_numpy(rows.astype(np.int64)).to(device)
        self._counts = None
        if (lengths[rows] < self._length).any():
            self._counts = torch.from_numpy(lengths[rows].astype(np.int64)).to(device)
        self._batch = count
        self._seen = 0

    def read(self) -> Tensor:
        """float32 [requests, C]: the scores of the canvas of each request of the batch, else 0.

        Raises
        ------
        RuntimeError
            Not all of the layers ran since ``begin``.
        """
        if self._rows is None or self._seen != self._depth:
            raise RuntimeError(
                f"no attention of the model was seen: {self._seen} of {self._depth} layers ran outside of "
                "CUDA graphs in this process"
            )
        scores = self._scores.read(len(self._rows))
        if self._counts is not None:  # a short canvas's scores stand at the end
            place = torch.arange(self._length, device=scores.device) + (self._length - self._counts)[:, None]
            scores = scores.gather(1, place.clamp(max=self._length - 1))
        whole = scores.new_zeros(self._batch, self._length)
        return whole.index_copy_(0, self._rows, scores)

    def _tapped(self, impl: Any, index: int) -> Callable[..., Any]:
        forward = impl.forward

        @functools.wraps(forward)
        def tapped(
            layer: Any,
            query: Tensor,
            key: Any,
            value: Any,
            kv_cache: Tensor,
            attn_metadata: Any,
            *rest: Any,
            **kw: Any,
        ) -> Any:
            output = forward(layer, query, key, value, kv_cache, attn_metadata, *rest, **kw)
            if attn_metadata is not None and self._rows is not None and self._seen == index:
                self._add(impl, index, query, kv_cache, attn_metadata)
            return output

        return tapped

    def _add(self, impl: Any, index: int, query: Tensor, kv_cache: Tensor, metadata: Any) -> None:
        self._seen = index + 1
        rows = self._rows
        assert rows is not None
        last = self._seen == self._depth
        options: dict[str, Any] = {"softmax_scale": impl.scale}
        # vLLM writes a causal window; what a canvas sees reaches as far behind a position as before it.
        left = (getattr(impl, "sliding_window", None) or (-1,))[0]
        if left >= 0:
            options["window_size"] = (left, left)
        if self._counts is not None:
            place = torch.arange(self._length, device=rows.device)
            options["query_mask"] = place >= (self._length - self._counts)[:, None]
        tokens = last_tokens(metadata.query_start_loc[1:][rows], self._length)
        q = query.view(-1, impl.num_heads, impl.head_size)[tokens].unflatten(0, (len(rows), self._length))
        self._scores.add_paged(
            q.transpose(1, 2),
            key_pages(kv_cache, impl.head_size),
            metadata.block_table[rows],
            metadata.seq_lens[rows],
            first=index == 0,
            last=last,
            **options,
        )


class _Step:
    """What is called in the place of a function of vLLM's, with the names of its arguments."""

    #: The function, and those of its arguments that are read or written.
    name: str
    needs: tuple[str, ...]

    def __init__(self, module: Any, decoder: BlockDecoder, attention: CanvasAttention | None) -> None:
        self._decoder, self._attention = decoder, attention
        self._own: Any = getattr(module, self.name, None)
        self._signature = inspect.signature(self._own) if self._own is not None else inspect.Signature()
        if missing := [name for name in self.needs if name not in self._signature.parameters]:
            raise RuntimeError(
                f"{module.__name__}.{self.name}: expected arguments among them {', '.join(missing)}, as in "
                "vLLM 0.33.0 (DiffusionGemma) or pull request 48279 (masked models); this vLLM has others"
            )
        self.functions: dict[str, Callable[..., Any]] = {self.name: self}

    def begin(self, input_batch: Any) -> None:
        """A step on this batch follows."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        raise NotImplementedError

    def _named(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        call = self._signature.bind(*arguments, **keywords)
        call.apply_defaults()
        return SimpleNamespace(**call.arguments)

    def _scores(self, call: Any) -> Tensor | None:
        return None if self._attention is None else self._attention.read()[call.decode_idx, : call.CL]


class _CanvasStep(_Step):
    """Canvases of random tokens: accepts by the policy what the entropy bound would have accepted."""

    name = "_compiled_sample_step"
    needs = (
        *("new_tokens", "token_entropy", "decode_slots", "decode_idx", "all_slots", "valid_canvas_len"),
        *("canvas", "is_encoder_phase", "pin_mask", "num_sampled", "draft_tokens", "vocab_size", "CL"),
    )

    def __init__(self, state: Any, sampler: Any, module: Any, decoder: BlockDecoder, attention: Any) -> None:
        super().__init__(module, decoder, attention)
        metric = decoder.policy.metric
        if metric not in ("probability", "entropy"):
            raise ValueError(
                f"policy: expected one that judges by probability or entropy, got {decoder.policy!r} "
                f"({metric})"
            )
        self._drawn: tuple[Tensor, Tensor] | None = None
        self._steps = 0
        for name in ("sample_row_stats", "sample_row_stats_reference"):
            if (own := getattr(module, name, None)) is not None:
                self.functions[name] = self._keeping(own)

    def _keeping(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """Keeps the logits [B, C, V] that tokens are drawn from, and these [B, C], by their column."""

        def draw(logits: Tensor, temps: Tensor, canvas_len: int, *rest: Any) -> Any:
            answer = own(logits, temps, canvas_len, *rest)
            scaled = logits.view(len(temps), canvas_len, -1).float() / temps[:, None, None].clamp(min=1e-10)
            self._drawn = scaled, answer[1].view(len(temps), canvas_len)
            return answer

        return draw

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        call = self._named(arguments, keywords)
        slots = call.decode_slots
        committing = call.is_encoder_phase[slots]
        answer = self._own(*arguments, **keywords)
        done = committing | call.is_encoder_phase[slots] | (call.num_sampled[call.decode_idx] > 0)
        real = torch.arange(call.CL, device=slots.device) < call.valid_canvas_len[:, None]
        free = real & ~call.pin_mask[slots] & ~done[:, None]
        accepted = self._accepted(call, free)
        noise = torch.randint_like(call.new_tokens, call.vocab_size)
        canvas = torch.where(accepted, call.new_tokens, noise).to(call.canvas.dtype)
        call.canvas[slots] = torch.where(free, canvas, call.canvas[slots])
        call.draft_tokens[call.all_slots, : call.CL] = call.canvas[call.all_slots].to(call.draft_tokens.dtype)
        return answer

    def _accepted(self, call: Any, free: Tensor) -> Tensor:
        if self._drawn is None:
            raise RuntimeError("vLLM's sampler drew its tokens by a function that is not known here")
        logits, drawn = self._drawn
        self._drawn = None
        policy, backend = self._decoder.policy, self._decoder.backend
        if policy.metric == "entropy":
            confidence = -call.token_entropy
        else:
            current = token_confidence(logits, current_ids=drawn, backend=backend).current
            assert current is not None
            confidence = current
        sequence = torch.arange(len(drawn), device=drawn.device)
        seeds = step_seeds(self._decoder.seed, self._steps, sequence)
        self._steps += 1
        scores = self._scores(call)
        seen = (free, call.new_tokens, confidence, scores, logits, _NO_MASK)
        selected = policy.select(StepState(*seen, sequence, seeds, backend))
        assert isinstance(selected, Tensor)
        check_progress(free, free & selected, confidence, scores, sequence)
        return selected


class _MaskedStep(_Step):
    """Canvases of masks: the policy chooses which predictions stay."""

    name = "_compiled_masked_step"
    needs = (
        *("logits", "decode_slots", "decode_idx", "all_slots", "valid_canvas_len", "canvas", "step_tensor"),
        *("is_encoder_phase", "unmask_logprobs", "unmask_ranks", "sampled", "num_sampled", "draft_tokens"),
        *("max_denoising_steps", "mask_token_id", "CL", "temperature", "capture_logprobs"),
    )

    def __init__(self, state: Any, sampler: Any, module: Any, decoder: BlockDecoder, attention: Any) -> None:
        super().__init__(module, decoder, attention)
        self._sampling = sampler.sampling_states
        config = state.vllm_config.diffusion_config
        for name in ("selection_policy", "confidence_threshold"):
            if (value := getattr(config, name, None)) is not None:
                raise ValueError(
                    f"diffusion_config: {name} has no effect beside a policy of {_OPTION}, got {value!r}"
                )

    def __call__(self, *arguments: Any, **keywords: Any) -> Tensor:
        call = self._named(arguments, keywords)
        slots, mask = call.decode_slots, call.mask_token_id
        logits = call.logits.reshape(len(slots), call.CL, -1)
        committing, canvas = call.is_encoder_phase[slots], call.canvas[slots]
        real = torch.arange(call.CL, device=slots.device) < call.valid_canvas_len[:, None]
        masked = (canvas == mask) & real
        free = masked & ~committing[:, None]

        temperature: float | Tensor = float(call.temperature)
        if temperature > 0.0:
            temperature = torch.where(self._sampling.temperature.gpu[slots] > 0.0, temperature, 0.0)
        tokens = torch.where(free, mask, int(mask == 0))  # what is not free looks filled
        scores = self._scores(call)
        result = self._decoder.step(tokens, logits, scores, temperature=temperature)
        step = call.step_tensor[slots] + 1
        at_last = step >= call.max_denoising_steps
        filled = free & (result.selected | at_last[:, None])
        if call.capture_logprobs:
            self._keep_log_probs(call, logits, result.token_ids, filled, temperature)
        after = torch.where(filled, result.token_ids.to(canvas.dtype), canvas)

        call.canvas[slots] = torch.where(committing[:, None], mask, after)
        call.step_tensor[slots] = torch.where(committing, 0, step).to(call.step_tensor.dtype)
        # A canvas that is committed before it is full, at the longest length, ends at its first mask.
        position = torch.arange(call.CL, device=slots.device)
        first = torch.where(masked, position, call.CL).amin(dim=1)
        emitted = torch.minimum(call.valid_canvas_len, first) * committing
        call.sampled[call.decode_idx] = (canvas * committing[:, None]).to(call.sampled.dtype)
        call.num_sampled[call.decode_idx] = emitted.to(call.num_sampled.dtype)
        done = ~((after == mask) & real).any(dim=1) | at_last
        call.is_encoder_phase[slots] = done & ~committing
        call.draft_tokens[call.all_slots, : call.CL] = call.canvas[call.all_slots].to(call.draft_tokens.dtype)
        return logits.float()

    def _keep_log_probs(
        self, call: Any, logits: Tensor, token_ids: Tensor, filled: Tensor, temperature: float | Tensor
    ) -> None:
        """Of what is filled in now: its log-probability in the distribution drawn from, and its rank."""
        scale: float | Tensor = 1.0
        if isinstance(temperature, Tensor):
            scale = torch.where(temperature > 0.0, temperature, 1.0)[:, None, None]
        x = logits.float() / scale
        x[..., call.mask_token_id] = -torch.inf
        chosen = x.gather(-1, token_ids[..., None])
        log_prob = (chosen - x.logsumexp(dim=-1, keepdim=True))[..., 0]
        rank = (x >= chosen).sum(dim=-1)
        for kept, new in ((call.unmask_logprobs, log_prob), (call.unmask_ranks, rank)):
            kept[call.decode_slots] = torch.where(filled, new.to(kept.dtype), kept[call.decode_slots])


def _check_engine(config: Any) -> None:
    """Raise where the engine runs the model so that its attention cannot be read."""
    if not config.model_config.enforce_eager:
        mode = config.compilation_config.cudagraph_mode
        if mode is not None and mode.has_full_cudagraphs():
            raise ValueError(
                f"compilation_config: cudagraph_mode has to be PIECEWISE or NONE where the policy reads "
                f"attention, got {mode.name}"
            )
    stages = config.parallel_config.pipeline_parallel_size
    if stages > 1:
        raise ValueError(f"pipeline_parallel_size: expected 1 where the policy reads attention, got {stages}")


def _attention_class() -> Any:
    return _require("vllm.model_executor.layers.attention").Attention


def _head_group() -> Any:
    """The ranks that share the attention heads; None where there is one."""
    group = _require("vllm.distributed.parallel_state").get_tp_group()
    return group.device_group if group.world_size > 1 else None
