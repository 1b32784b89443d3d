"""vLLM through vllm-project/dllm-plugin: attention-guided decoding in its sampler.

For the diffusion models that vLLM has itself see ``vllm_model_state``.

Install: ``pip install git+https://github.com/vllm-project/dllm-plugin`` (the package on PyPI is empty).

    llm = LLM("inclusionAI/LLaDA2.0-mini", enforce_eager=True, ...,
              additional_config={"attn_sampler": {"tau": 0.9}})

vLLM finds attn_sampler as a plugin; the entry in ``additional_config`` switches it on, with the options of
``Remask``. A block's attention is read in the model's ``Attention`` layers, inside the block: vLLM's layers
give no log-sum-exp over the context. The ranks of tensor parallelism add up their heads. ``Remask`` has the
interface of ``batched_remask`` and of ``RemaskingPolicy``, so that a worker of your own can use it too.

vLLM applies its stops, lengths and ``n`` to the finished blocks. How tokens are drawn the entry says for all
requests, by its ``temperature`` (by default 0), or with ``"temperature": "request"`` each request's
``SamplingParams`` do: ``temperature`` (vLLM's default is 1), ``top_k``, ``top_p``, ``min_p`` and ``seed``,
which makes its tokens the same in any batch. What else they ask for (penalties, a grammar, log-probabilities,
for which the plugin's output has no place, ...) is left out, which is warned of, once for each name: a worker
cannot turn a request down. ``min_p`` beside ``top_p`` is warned of too: vLLM filters by ``min_p`` first.
Interface of commit 33cd242; tested without a GPU, in eager mode.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attn_sampler.adapters._engine import (
    OF_REQUEST,
    BlockDecoder,
    BlockScores,
    attention_layers,
    last_tokens,
    on_device,
    refuse_attention,
    require,
    unserved,
)
from attn_sampler.policy import Policy

_INSTALL = "pip install git+https://github.com/vllm-project/dllm-plugin (not the package on PyPI)"

#: Of ``SamplingParams``, what vLLM applies before or after a block is decoded, and its own book-keeping.
_VLLM_SERVES = (
    *("n", "max_tokens", "ignore_eos", "stop", "stop_token_ids", "include_stop_str_in_output"),
    *("repetition_detection", "truncate_prompt_tokens", "skip_reading_prefix_cache"),
    *("prompt_logprobs", "prompt_logprob_token_ids", "prompt_logprob_start", "flat_logprobs"),
    *("detokenize", "skip_special_tokens", "spaces_between_special_tokens", "output_kind", "stream_interval"),
    *("skip_clone", "output_text_buffer_length", "routed_experts_prompt_start"),
    *("_eos_token_id", "_all_stop_token_ids", "_bad_words_token_ids", "_watermarking_skipped"),
)
#: And, where requests say how tokens are drawn, what is read of them.
_DRAWS = ("temperature", "top_k", "top_p", "min_p", "seed")
#: What of an attention is not among the scaled products of a block.
_KINDS = ("alibi_slopes", "logits_soft_cap", "sinks", "sliding_window")


def _require(module: str) -> Any:
    return require(module, "vllm-dllm-plugin", _INSTALL, "0", "0.2")


class Remask:
    """Commits by the attention that positions receive, or by another policy.

    Parameters
    ----------
    mask_token_id, block_length
        The mask token, and C, the tokens of a block (``DRAFT_SIZE``).
    policy, tau, seed, layers, diagonal, backend
        As in ``generate``.
    temperature
        A number, or ``"request"``: that of each request, and how else it draws.
    reduction
        As in ``column_scores``.
    """

    def __init__(
        self,
        mask_token_id: int,
        block_length: int,
        *,
        policy: str | Policy = "attn",
        tau: float | None = None,
        temperature: float | str = 0.0,
        seed: int = 0,
        layers: str | slice | Sequence[int] = "all",
        diagonal: bool = True,
        reduction: str = "sum",
        backend: str = "auto",
    ) -> None:
        self._by_request = temperature == OF_REQUEST
        self._decoder = BlockDecoder(
            policy,
            tau=tau,
            mask_token_id=mask_token_id,
            temperature=0.0 if self._by_request else temperature,  # type: ignore[arg-type]  # is checked
            seed=seed,
            backend=backend,
        )
        self._layers = layers
        self._scores = BlockScores(
            block_length, group=_head_group(), diagonal=diagonal, reduction=reduction, backend=backend
        )
        #: The requests whose blocks are handed over next, among those of the forward pass; None for all.
        self.requests: list[int] | None = None
        #: Their ``SamplingParams``, and where in their texts they are, where they say how tokens are drawn.
        self.params: list[Any] | None = None
        self.position: Tensor | None = None  # [B]
        self._added: dict[int, Any] = {}
        self._warned: set[str] = set()

    def add_request(self, slot: int, params: Any) -> None:
        """A request, by its place among those that vLLM is serving."""
        self.check_request(params)
        self._added[slot] = params

    def begin(self, input_batch: Any, requests: list[int]) -> None:
        """The blocks of these requests of the batch are handed over next."""
        self.requests = requests
        if self._by_request:
            slots = input_batch.idx_mapping_np
            self.params = [self._added[int(slots[i])] for i in requests]
            ends = input_batch.seq_lens
            self.position = ends.long()[on_device(requests, torch.int64, ends.device)]

    def _draws(self) -> dict[str, Any]:
        if not self._by_request:
            return {}
        if self.params is None:
            raise ValueError(
                "params: expected the SamplingParams of the requests whose blocks follow, got None"
            )
        draws: dict[str, Any] = {name: [getattr(x, name) for x in self.params] for name in _DRAWS}
        draws["top_k"] = [max(k, 0) for k in draws["top_k"]]  # -1, as 0, stands for all
        return draws | {"seeds": draws.pop("seed"), "position": self.position}

    def check_request(self, params: Any) -> None:
        """Warn of what a request's ``SamplingParams`` ask for in vain, once for each name."""
        kind = type(params)
        if hasattr(kind, "for_sampler_warmup") and params == kind.for_sampler_warmup():
            return  # vLLM's own, which ask for everything
        default = kind()
        if self._by_request and params.min_p > 0.0 and params.top_p < 1.0:
            self._warn("min_p beside top_p", "min_p: it filters after top_p here, and in vLLM before")
        served = (*_VLLM_SERVES, *_DRAWS) if self._by_request else _VLLM_SERVES
        for name in params.__struct_fields__:
            neutral = [getattr(default, name)]
            if name == "temperature":
                neutral.append(self._decoder.temperature)
            if name == "seed" and self._decoder.temperature == 0.0 and not self._by_request:
                continue  # nothing is drawn
            if text := unserved({name: getattr(params, name)}, served, {name: neutral}):
                more = " and requests' own ways" if self._by_request else " alone"
                self._warn(name, f"attn_sampler draws by additional_config{more}; {text}")

    def _warn(self, name: str, text: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(text, stacklevel=3)

    def watch(self, model: nn.Module) -> None:
        """Add up the attention inside the blocks that the model decodes from now on."""
        if not self._decoder.policy.needs_scores:
            return
        watched = attention_layers(model, _attention_class(), self._layers)
        for layer in watched:
            kinds: dict[str, Any] = {name: getattr(layer.impl, name, None) for name in _KINDS}
            refuse_attention(self._scores.block_length, **kinds)

        def before(layer: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            q, k = (*inputs, keywords.get("query"), keywords.get("key"))[:2]
            if k is None:  # the context's part of a layer that attends to context and block in two calls
                return
            self._scores.add(
                q.reshape(-1, layer.num_heads, layer.head_size),
                k.reshape(-1, layer.num_kv_heads, layer.head_size),
                first=layer is watched[0],
                last=layer is watched[-1],
                softmax_scale=layer.impl.scale,
                index=_block_tokens(layer, self._scores.block_length),
            )

        for layer in watched:
            layer.register_forward_pre_hook(before, with_kwargs=True)

    def __call__(
        self,
        logits: Tensor,  # [B, C, V]
        input_draft: Tensor,  # [B, C]
        mask_token_id: int,
        threshold: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``batched_remask``: the blocks after the step, which are done, how many tokens each committed.

        ``threshold``, the plugin's own, is not read: the policy has its ``tau``. Where vLLM was given another
        than the plugin's default, there was an error at the start.
        """
        if mask_token_id != self._decoder.mask_token_id:
            raise ValueError(
                f"mask_token_id: expected {self._decoder.mask_token_id}, as at the start, got {mask_token_id}"
            )
        draft = input_draft.to(torch.int64, copy=True)
        scores = None
        masked = draft == mask_token_id
        if self._decoder.policy.needs_scores:
            if self.requests is None:
                scores = self._scores.read(len(draft))
            else:
                scores = self._scores.read(max(self.requests) + 1)[self.requests]
        result = self._decoder.step(draft, logits, scores, **self._draws())
        committed = (result.selected & masked).sum(dim=-1)
        return draft, (draft != mask_token_id).all(dim=-1), committed

    def apply(
        self,
        *,
        input_draft: Sequence[int],
        logits: Any | None = None,
        remasking_config: Mapping[str, Any] | None = None,
    ) -> Any:
        """``RemaskingPolicy.apply``: one step of one request.

        Raises
        ------
        ValueError
            No logits; or ``remasking_config``, which is the default policy's, asks for something.
        """
        neutral = {"mask_token_id": [self._decoder.mask_token_id], "grammar_extra_transfer": [0]}
        if refusal := unserved(remasking_config or {}, ("denoise_step_index",), neutral):
            raise ValueError(f"remasking_config: {refusal}")
        if logits is None:
            raise ValueError("logits: expected the block's, got None (not the last pipeline stage?)")
        mask = self._decoder.mask_token_id
        logits = torch.as_tensor(logits)
        draft = torch.tensor([list(input_draft)], device=logits.device)
        if (draft != mask).all():
            done = True
        else:
            draft, all_done, _ = self(logits[None], draft, mask, 0.0)
            done = bool(all_done)
        block = tuple(draft[0].tolist())
        result = _remasking().RemaskStepResult
        if done:
            return result(committed_token_ids=block, next_input_block=(mask,) * len(block))
        return result(committed_token_ids=(), next_input_block=block)


def register() -> None:
    """Let ``additional_config={"attn_sampler": {...}}`` switch Remask on in this process.

    vLLM calls this in each of its processes (entry point ``vllm.general_plugins``). Without dllm-plugin there
    is nothing to switch.
    """
    if importlib.util.find_spec("dllm_plugin") is None:
        return
    state = _require("dllm_plugin.models.llada2_model_state").LLaDA2ModelState
    if hasattr(state, "_attn_sampler_remask"):
        return
    state._attn_sampler_remask = None
    init, custom_sampler = state.__init__, state.custom_sampler

    @functools.wraps(init)
    def wrapped_init(self: Any, vllm_config: Any, model: nn.Module, *arguments: Any, **keywords: Any) -> None:
        init(self, vllm_config, model, *arguments, **keywords)
        options = (vllm_config.additional_config or {}).get("attn_sampler")
        if options is not None:
            self._attn_sampler_remask = Remask(self._mask_id, self._draft_size, **options)
            self._attn_sampler_remask.watch(model)

    @functools.wraps(custom_sampler)
    def wrapped_sampler(self: Any, *arguments: Any, **keywords: Any) -> Any:
        result = custom_sampler(self, *arguments, **keywords)
        if self._attn_sampler_remask is not None:
            _use(result[0], self._attn_sampler_remask)
        return result

    state.__init__ = wrapped_init
    state.custom_sampler = wrapped_sampler


def _use(sampler: Any, remask: Remask) -> None:
    """Let a ``DiffusionSampler`` remask by the policy."""
    if not hasattr(sampler, "_remask_fn"):
        raise RuntimeError(
            f"this dllm-plugin's {type(sampler).__name__} has no _remask_fn to be replaced (the adapter was "
            "tested with commit 33cd242)"
        )
    if refusal := unserved({"threshold": getattr(sampler, "_threshold", None)}, (), {"threshold": [0.9]}):
        raise ValueError(
            f"dllm-plugin's {refusal}: the policy has a tau of its own, which additional_config gives"
        )
    denoise = sampler._denoise

    def wrapped(logits: Tensor, input_batch: Any) -> Any:
        ends = input_batch.cu_num_logits_np
        counts = [int(ends[i + 1] - ends[i]) for i in range(input_batch.num_reqs)]
        remask.begin(input_batch, [i for i, count in enumerate(counts) if count == sampler._draft_size])
        return denoise(logits, input_batch)

    def add_request(req_index: int, prompt_len: int, sampling_params: Any) -> None:
        remask.add_request(req_index, sampling_params)
        sampler._base_sampler.add_request(req_index, prompt_len, sampling_params)

    sampler._remask_fn = remask
    sampler._denoise = wrapped
    sampler.add_request = add_request  # else the base sampler's


def _block_tokens(layer: Any, block_length: int) -> Tensor | None:
    """The tokens of the requests' last blocks, where vLLM says where requests end."""
    metadata = importlib.import_module("vllm.forward_context").get_forward_context().attn_metadata
    if isinstance(metadata, dict):
        metadata = metadata.get(layer.layer_name)
    starts = getattr(metadata, "query_start_loc", None)
    return None if starts is None else last_tokens(starts[1:], block_length)


def _attention_class() -> Any:
    try:
        return importlib.import_module("vllm.model_executor.layers.attention").Attention
    except ImportError:  # vLLM before 0.14
        return importlib.import_module("vllm.attention.layer").Attention


def _remasking() -> Any:
    """The package that defines ``RemaskStepResult``: older plugins had another name."""
    name = "dllm_plugin" if importlib.util.find_spec("dllm_plugin") else "vllm_dllm_plugin"
    return _require(f"{name}.remasking")


def _head_group() -> Any:
    """The ranks that share the attention heads; None where there is one."""
    group = importlib.import_module("vllm.distributed.parallel_state").get_tp_group()
    return group.device_group if group.world_size > 1 else None
