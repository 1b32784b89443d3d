"""SGLang: attention-guided decoding as its ``DllmAlgorithm``.

Install: ``pip install "sglang>=0.5.23,<0.6"`` beside attn_sampler, which SGLang then finds as a plugin.

    python -m sglang.launch_server --model-path inclusionAI/LLaDA2.0-mini --attention-backend flashinfer \\
        --dllm-algorithm AttnSampler --dllm-algorithm-config attn.yaml      # tau: 0.9

``OPTIONS`` are the keys of the file. A block's attention is read in each ``RadixAttention`` layer, with the
log-sum-exp that the FlashInfer backend computes to join the block to the cached context, and then throws
away, so that backend is chosen where scores are read; with ``softmax_scope: block`` others serve too. Tensor
parallelism works as it is: the ranks' heads are added up.

Interface of version 0.5.23, whose algorithm is given all logits, and of the main branch after it (commit
0929d6d of ``dllm/algorithm/base.py``), where it is given ``LogitsProcessorOutput``: its logits or, where the
ranks of the vocabulary exchange no more than that, the most probable token of each position and its
probability. The latter serves policies that judge by probability, at ``temperature: 0``. Tested without a
GPU, so not yet with CUDA graphs (``--disable-cuda-graph`` turns them off).

A rule that carries something over from step to step of a block (``klass``), or takes back what it committed
(``t2t``, LLaDA2.1's joint threshold; ``t2m``, ``saber``, ``rollback``), is kept for each request in SGLang's
step states, with a budget of ``max_edits`` for each position that the prompt does not hold, and its requests
are decoded one by one in a batch.

SGLang applies its stops, lengths and ``n`` to the finished blocks. How tokens are drawn the file says for all
requests, by a number as its ``temperature`` (by default 0), or each request does, with ``temperature:
request``: by its temperature (1 where it names none), ``top_k``, ``top_p``, ``min_p`` and, with
``--enable-deterministic-inference``, ``sampling_seed``, which makes its tokens the same in any batch.
``top_p`` is of what ``top_k`` leaves, as in SGLang's own sampler where a request of the batch has a
``min_p``; else that one takes it of all tokens, and draws from a few more.

A request that asks for what is not served (penalties; a grammar, which SGLang takes no further in blocks, and
which tells of the next token alone; log-probabilities, for which the results of a block have no place; ...;
under the file's temperature one of its own) is answered with an error that names it; but for a temperature of
0, with which SGLang itself asks: that is warned of, where the file has another.
``--sampling-defaults openai`` keeps a checkpoint's ``generation_config.json`` from asking for any in every
client's name.
"""

from __future__ import annotations

import copy
import functools
import importlib
import warnings
from typing import Any

import torch
from torch import Tensor

from attn_sampler import checks
from attn_sampler.adapters._engine import (
    OF_REQUEST,
    BlockDecoder,
    BlockScores,
    attention_layers,
    carries_over,
    read_policy,
    refuse_attention,
    require,
    unserved,
)
from attn_sampler.policy import Policy

NAME = "AttnSampler"

#: What ``--dllm-algorithm-config`` may set, beside SGLang's own keys.
OPTIONS = (
    *("policy", "tau", "temperature", "seed", "layers", "softmax_scope"),
    *("diagonal", "reduction", "backend"),
)

_SGLANG_KEYS = ("block_size",)

#: Of ``SamplingParams``, what SGLang applies before or after a block is decoded, and its own book-keeping.
_SGLANG_SERVES = (
    *("max_new_tokens", "n", "ignore_eos", "stop", "stop_token_ids", "stop_regex", "no_stop_trim"),
    *("skip_special_tokens", "spaces_between_special_tokens", "stream_interval", "custom_params"),
    *("stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len", "is_normalized"),
    "ebnf_full_assistant",
)
#: What a request asks for beside them.
_REQUEST = ("return_logprob", "return_hidden_states", "return_sampling_mask", "custom_logit_processor")


def _refusal(req: Any) -> str | None:
    """Why a request is turned down; ``custom_params`` go with a custom_logit_processor, which is."""
    params, config = req.sampling_params, req.dllm_config.algorithm_config or {}
    temperature = config.get("temperature", 0.0)
    default = type(params)()
    neutral = {name: [getattr(default, name)] for name in params.__struct_fields__}
    served: tuple[str, ...] = _SGLANG_SERVES
    draws = ("temperature", "top_k", "top_p", "min_p")
    by = "--dllm-algorithm-config alone"
    if temperature == OF_REQUEST:
        by = "--dllm-algorithm-config and by requests' temperature, top_k, top_p and min_p"
        served += draws
        if params.sampling_seed is not None and _is_deterministic():
            served += ("sampling_seed",)
    else:
        neutral["temperature"].append(temperature)
        if temperature == 0.0:
            served += ("sampling_seed",)
        if (
            params.top_k == 1
        ):  # what SGLang makes of a temperature of 0: its warm-up and health checks have it
            served += draws
            if temperature != 0.0:
                warnings.warn(
                    f"{NAME}: a request's temperature of 0 is not served beside the file's", stacklevel=2
                )
    asked = {name: getattr(params, name) for name in params.__struct_fields__}
    asked |= {name: getattr(req, name, None) or None for name in _REQUEST}
    refusal = unserved(asked, served, neutral)
    return f"{NAME} draws by {by}; {refusal}" if refusal else None


def _is_deterministic() -> bool:
    """Whether SGLang hands the requests' seeds on."""
    execution = _require("sglang.srt.runtime_context").get_exec()
    return bool(execution.deterministic.enable_deterministic_inference)


def _draws(forward_batch: Any, block_size: int) -> dict[str, Any]:
    """How the requests of a batch draw, as ``BlockDecoder.step`` takes it; no host reads the tensors."""
    info = forward_batch.sampling_info
    if info.is_all_greedy:
        return {"temperature": 0.0}
    # Of a temperature of 0 SGLang makes this top_k, at a temperature of 1.
    draws = {"temperature": torch.where(info.top_ks == 1, 0.0, info.temperatures.flatten())}
    if info.need_top_k_sampling:
        draws["top_k"] = info.top_ks
    if info.need_top_p_sampling:
        draws["top_p"] = info.top_ps
    if info.need_min_p_sampling:
        draws["min_p"] = info.min_ps
    if info.sampling_seed is not None:
        draws["seeds"] = info.sampling_seed
        draws["position"] = forward_batch.positions.view(-1, block_size)[:, 0].long()
    return draws


def _require(module: str) -> Any:
    return require(module, "sglang", 'pip install "sglang>=0.5.23,<0.6"', "0.5.23", "0.6")


def register() -> None:
    """Make ``--dllm-algorithm AttnSampler`` known to this process, and watch the models that it loads.

    SGLang calls this in each of its processes (entry point ``sglang.srt.plugins``).
    """
    _require("sglang.srt.dllm.algorithm").algo_name_to_cls[NAME] = algorithm()
    hooks = _require("sglang.srt.plugins.hook_registry")
    hooks.HookRegistry.register(
        "sglang.srt.model_executor.model_runner.ModelRunner.load_model", _watch_loaded, hooks.HookType.AFTER
    )


def _policy(options: dict[str, Any]) -> Policy:
    return read_policy(options.get("policy", "attn"), options.get("tau"), revises=True)


def _configure(server_args: Any) -> None:
    """Choose the attention backend whose log-sum-exp is read, where the options in the file need it."""
    arguments = _require("sglang.srt.arg_groups.overrides")
    view = arguments.resolving_view(server_args)
    options: Any = {}
    if view.dllm_algorithm_config is not None:
        with open(view.dllm_algorithm_config) as file:
            options = importlib.import_module("yaml").safe_load(file) or {}
    if not isinstance(options, dict):
        raise ValueError(f"{NAME}: expected a mapping in {view.dllm_algorithm_config}")
    policy = _policy(options)
    if not policy.needs_scores or options.get("softmax_scope", "sequence") != "sequence":
        return
    fields = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
    given = {name: getattr(view, name, None) for name in fields}
    wanted = [name for name in fields if given[name] not in (None, "flashinfer")]
    if given["attention_backend"] is None:
        wanted.append("attention_backend")
    if wanted:
        told = ", ".join(f"{name}={given[name]}" for name in wanted)
        warnings.warn(
            f"{NAME} reads the log-sum-exp of the flashinfer attention backend, which takes the place of "
            f"{told} (softmax_scope: block would do without)",
            stacklevel=2,
        )
        arguments.declare_resolution(server_args, NAME, **dict.fromkeys(wanted, "flashinfer"))


def _watch_loaded(result: Any, model_runner: Any, *_: Any, **__: Any) -> None:
    config = _require("sglang.srt.dllm.config").DllmConfig.from_server_args(model_runner.server_args)
    if config is None or config.algorithm != NAME:
        return
    options = config.algorithm_config or {}
    if _policy(options).needs_scores:
        watch(model_runner.model, config.block_size, options)


def watch(model: torch.nn.Module, block_length: int, options: dict[str, Any]) -> BlockScores:
    """The column scores of the blocks that the model decodes from now on.

    Called when the model is loaded, before SGLang captures CUDA graphs, which then hold the scores too.
    """
    if (scores := getattr(model, "_attn_sampler_scores", None)) is not None:
        return scores
    radix = _require("sglang.srt.layers.radix_attention").RadixAttention
    watched = attention_layers(model, radix, options.get("layers", "all"))
    for layer in watched:
        refuse_attention(block_length, **_kinds(layer))
    keywords = {key: options[key] for key in ("diagonal", "reduction", "backend") if key in options}
    scope = options.get("softmax_scope", "sequence")
    checks.choice("softmax_scope", scope, ("sequence", "block"))
    scores = BlockScores(block_length, group=_head_group(), **keywords)
    tap = _merged_lse()

    def before(layer: Any, inputs: tuple[Any, ...]) -> None:
        tap.lse = None

    def after(layer: Any, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        q, k, _, forward_batch, *_ = inputs
        if not forward_batch.forward_mode.is_dllm_extend():
            return
        refuse_attention(block_length, **{name: keywords[name] for name in keywords if name not in _PLAIN})
        lse = tap.lse if scope == "sequence" else None
        if lse is None and scope == "sequence" and _has_context(forward_batch):
            raise RuntimeError(
                "the attention backend computes no log-sum-exp that can be read: start the server with "
                "--attention-backend flashinfer, or set softmax_scope: block"
            )
        scores.add(
            q.reshape(-1, layer.tp_q_head_num, layer.head_dim),
            k.reshape(-1, layer.tp_k_head_num, layer.head_dim),
            first=layer is watched[0],
            last=layer is watched[-1],
            softmax_scale=layer.scaling,
            softmax_lse=lse,
            lse_base="2",
        )

    for layer in watched:
        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after, with_kwargs=True)
    model._attn_sampler_scores = scores  # type: ignore[assignment]
    return scores


#: Keywords of ``RadixAttention.forward`` that leave the attention as it is.
_PLAIN = ("save_kv_cache", "key_value_num_tokens", "return_lse")


def _kinds(layer: Any) -> dict[str, Any]:
    """What a layer's attention has beside the softmax over all of its block and context."""
    names = ("logit_cap", "sliding_window_size", "is_cross_attention", "use_irope", "xai_temperature_len")
    kinds = {name: getattr(layer, name, None) for name in names}
    for name, plain in (("pos_encoding_mode", "NONE"), ("attn_type", "encoder_only")):
        value = getattr(layer, name, None)
        value = getattr(value, "value", value)
        kinds[name] = None if value == plain else value
    return kinds


def _has_context(forward_batch: Any) -> bool:
    """Whether a block of the batch has cached tokens before it; a first block's softmax is its own."""
    lengths = forward_batch.extend_prefix_lens_cpu
    return lengths is None or any(lengths)


class _Tap:
    """The log-sum-exp of the attention call that has just run, [T, Hq], base 2."""

    lse: Tensor | None = None


@functools.cache
def _merged_lse() -> _Tap:
    """Keeps what the FlashInfer backend's ``_safe_merge_state`` returns beside the output."""
    tap = _Tap()
    backend = _require("sglang.srt.layers.attention.flashinfer_backend")
    merge = getattr(backend, "_safe_merge_state", None)
    if merge is None:  # FlashInfer is not installed: the block's own softmax is all there is
        return tap

    @functools.wraps(merge)
    def tapped(*states: Tensor) -> tuple[Tensor, Tensor]:
        output, tap.lse = merge(*states)
        return output, tap.lse

    backend._safe_merge_state = tapped
    return tap


def _head_group() -> Any:
    """The ranks that share the attention heads; None where there is one."""
    group = _require("sglang.srt.distributed.parallel_state").get_attn_tp_group()
    return group.device_group if group.world_size > 1 else None


def _each(draws: dict[str, Any], batch: int) -> list[dict[str, Any]]:
    """Of each row its own."""
    return [
        {name: x[i : i + 1] if isinstance(x, Tensor) else x for name, x in draws.items()}
        for i in range(batch)
    ]


class _Block:
    """A request's block under a policy that remembers its steps.

    Parameters
    ----------
    decoder
        Of this block alone.
    budget
        int32 ``[1, C]``: how often each position may be revised, 0 where the prompt holds it.
    """

    def __init__(self, decoder: BlockDecoder, budget: Tensor) -> None:
        decoder.policy.reset()
        self._decoder, self._budget = decoder, budget
        self._final = False

    def step(self, tokens: Tensor, logits: Tensor, scores: Tensor | None, draws: dict[str, Any]) -> bool:
        """Whether the block was done before this step, so that the last pass kept its keys and values."""
        decoder = self._decoder
        if self._final:
            return True
        before = tokens.clone()
        full = not bool((before == decoder.mask_token_id).any())
        if not decoder.policy.revises:
            if not full:
                decoder.step(tokens, logits, scores, **draws)
            return full
        recheck = torch.zeros(1, dtype=torch.bool, device=tokens.device)
        decoder.step(tokens, logits, scores, budget=self._budget, recheck=recheck, **draws)
        left, changed, again, spare = torch.stack(
            [
                (tokens == decoder.mask_token_id).any(),
                (tokens != before).any(),
                recheck.any(),
                self._budget.any(),
            ]
        ).tolist()
        self._final = not left and not (again and changed and spare)
        return full and not changed


@functools.cache
def algorithm() -> type:
    """The ``DllmAlgorithm`` subclass that SGLang runs."""
    base = _require("sglang.srt.dllm.algorithm.base").DllmAlgorithm

    class AttnSampler(base):  # type: ignore[misc, valid-type]
        """Commits by the attention that positions receive, or by another policy."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.options = dict(config.algorithm_config or {})
            unknown = sorted(set(self.options) - {*OPTIONS, *_SGLANG_KEYS})
            if unknown:
                raise ValueError(
                    f"{NAME}: expected options among {', '.join(OPTIONS)}, got {', '.join(unknown)}"
                )
            keywords = {
                key: self.options[key]
                for key in ("policy", "tau", "temperature", "seed", "backend")
                if key in self.options
            }
            policy = _policy(self.options)
            self._remembers = policy.revises or carries_over(policy)
            keywords |= {"policy": policy, "one_block": self._remembers, "revises": self._remembers}
            keywords.pop("tau", None)  # is in the policy
            self._by_request = keywords.get("temperature") == OF_REQUEST
            if self._by_request:
                del keywords["temperature"]
            self._decoder = BlockDecoder(mask_token_id=self.mask_id, **keywords)
            self._started = 0
            self._scores: BlockScores | None = None

        @classmethod
        def configure_server_args(cls, server_args: Any) -> None:
            _configure(server_args)

        @classmethod
        def validate_request(cls, req: Any) -> str | None:
            return _refusal(req)

        def max_steps(self, block_size: int) -> int:
            revisions = self._decoder.policy.max_edits if self._decoder.policy.revises else 0
            return block_size * (1 + 2 * revisions) + 2 if revisions else block_size + 1

        def init_step_state(self, forward_batch: Any) -> list[Any]:
            if not self._remembers:
                return [None] * forward_batch.batch_size
            tokens = self._tokens(forward_batch)
            policy, edits = self._decoder.policy, self._decoder.policy.max_edits
            budgets = ((tokens == self.mask_id) * edits).to(torch.int32)
            blocks = []
            for budget in budgets.split(1):
                decoder = copy.copy(self._decoder)
                decoder.policy = copy.deepcopy(policy)
                decoder.seed += self._started  # a stream of its own
                self._started += 1
                blocks.append(_Block(decoder, budget.clone()))
            return blocks

        def _tokens(self, forward_batch: Any) -> Tensor:
            """int64 [B, C], a copy, in which a mask token that a prompt holds as text is not to be filled."""
            tokens = forward_batch.input_ids.view(forward_batch.batch_size, self.block_size)
            tokens = tokens.to(torch.int64, copy=True)
            literal = getattr(forward_batch, "dllm_prompt_mask", None)
            if literal is not None:
                tokens.masked_fill_(literal, int(self.mask_id == 0))
            return tokens

        def prepare_inputs(self, model_runner: Any, forward_batch: Any, states: list[Any]) -> None:
            if self._scores is None and self._decoder.policy.needs_scores:
                self._scores = watch(model_runner.model, self.block_size, self.options)

        def step(self, forward_batch: Any, logits_output: Any, states: list[Any]) -> list[bool]:
            batch = forward_batch.batch_size
            tokens = self._tokens(forward_batch)
            before = tokens.clone()
            done = (tokens != self.mask_id).all(dim=1).tolist()
            if all(done) and not self._remembers:
                return done
            scores = None if self._scores is None else self._scores.read(batch)
            logits, compact = logits_output, None
            if not isinstance(logits_output, Tensor):  # after 0.5.23
                logits = logits_output.full_logits
                compact = getattr(logits_output, "dllm_vocab_state", None)
            if compact is None:
                logits = logits.view(batch, self.block_size, logits.shape[-1])
            elif self._remembers:
                raise RuntimeError(
                    f"{NAME}: {self._decoder.policy!r} needs all logits, which SGLang kept apart"
                )
            draws = _draws(forward_batch, self.block_size) if self._by_request else {}
            if self._remembers:
                rows = [None] * batch if scores is None else scores.split(1)
                blocks = zip(states, tokens.split(1), logits.split(1), rows, _each(draws, batch), strict=True)
                done = [state.step(*block) for state, *block in blocks]
            elif compact is None:
                self._decoder.step(tokens, logits, scores, **draws)
            elif isinstance(draws.get("temperature"), Tensor):
                raise RuntimeError(f"{NAME}: a request that draws needs all logits, which SGLang kept apart")
            else:
                best, p = (x.view(batch, self.block_size) for x in (compact.argmax_ids, compact.max_probs))
                self._decoder.step_predicted(tokens, best, p, scores)
            kept = forward_batch.input_ids.view(batch, self.block_size)
            # In place: this is the tensor that CUDA graphs read.
            kept.copy_(torch.where(tokens != before, tokens, kept))
            return done

    return AttnSampler
