"""Attention-guided decoding as transformers' ``generate``: its keywords, its configuration and its output.

>>> import attn_sampler.adapters.transformers  # attention that can be read
>>> from attn_sampler.adapters.transformers_generate import attn_generate, generate
>>> model.generate(input_ids, custom_generate=attn_generate, max_new_tokens=128, tau=0.8)
>>> generate(model, **tokenizer(texts, return_tensors="pt"), max_new_tokens=128, stop_strings=["."],
...          tokenizer=tokenizer, return_dict_in_generate=True)

Both take what ``GenerationConfig`` holds, from the model's ``generation_config``, one of yours or keywords,
and beside it the options of ``attn_generate``. ``generate`` is called by itself and serves models that have
no ``generate`` of their own, such as ``BertForMaskedLM``; it fills in masks of the prompt without
``max_new_tokens`` too. Served are ``max_new_tokens``, ``max_length``, ``eos_token_id`` (one or several),
``pad_token_id``, ``do_sample`` with ``temperature``, ``top_k`` (50 by transformers' default), ``top_p`` and
``min_p``, ``suppress_tokens``, ``sequence_bias`` of single tokens, ``guidance_scale`` and
``negative_prompt_ids``, ``num_return_sequences``, ``return_dict_in_generate``, ``output_scores`` and
``output_logits``; ``stop_strings`` with a ``tokenizer`` in ``generate`` alone, as transformers hands neither
tokenizer nor streamer to a ``custom_generate`` (``stop`` and ``decode`` are for that). What else asks for
something is an error that names it.

Models are those of ``attn_sampler.adapters.models``, and causal classes after ``make_bidirectional``.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput

from attn_sampler import checks
from attn_sampler import generate as decode_blocks
from attn_sampler.adapters._engine import unserved
from attn_sampler.adapters.models import adapt, find_family
from attn_sampler.endings import TextEnds
from attn_sampler.policy import Decision, Policy, StepState
from attn_sampler.reference import REPLACED, StepResult, truncation
from attn_sampler.sampler import make_policy


@dataclasses.dataclass
class AttnGenerateOutput(GenerateDecoderOnlyOutput):
    """As transformers' own; ``scores`` and ``logits`` have an entry [B, V] for each new position, of the pass
    that filled it, zeros where none did."""

    num_forward_passes: Tensor | None = None  # [B] int64


#: Of ``GenerationConfig``, what is read below, what is the host's book-keeping, and what changes no token.
_SERVED = (
    *("max_length", "max_new_tokens", "eos_token_id", "pad_token_id"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p"),
    *("suppress_tokens", "sequence_bias", "guidance_scale", "num_return_sequences", "stop_strings"),
    *("return_dict_in_generate", "output_scores", "output_logits"),
    *("bos_token_id", "decoder_start_token_id", "transformers_version", "use_cache", "cache_implementation"),
    *("cache_config", "max_cache_len", "compile_config", "disable_compile", "renormalize_logits"),
    "prefill_chunk_size",
)
#: What a greedy configuration does not read, and one that samples has to leave alone.
_SAMPLING = ("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
#: Values that ask for nothing, beside transformers' defaults.
_NEUTRAL: dict[str, list[Any]] = {
    "min_new_tokens": [0],
    "is_assistant": [False],
}
#: The processors and criteria that transformers makes, one of each, of fields that are served.
_MADE_OF = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "guidance_scale",
    "TemperatureLogitsWarper": "temperature",
    "TopKLogitsWarper": "top_k",
    "TopPLogitsWarper": "top_p",
    "MinPLogitsWarper": "min_p",
    "SuppressTokensLogitsProcessor": "suppress_tokens",
    "SequenceBiasLogitsProcessor": "sequence_bias",
    "LogitNormalization": "renormalize_logits",
    "MaxLengthCriteria": "max_length",
    "EosTokenCriteria": "eos_token_id",
}
#: Of the model's keywords, those that change nothing: every position is run, with its own position.
_PLAIN = ("use_cache", "cache", "past_key_values", "logits_to_keep", "position_ids")


def attn_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Sequence[Any] = (),
    stopping_criteria: Sequence[Any] = (),
    generation_config: GenerationConfig | None = None,
    synced_gpus: bool = False,
    streamer: Any = None,
    *,
    policy: str | Policy = "attn",
    tau: float | None = None,
    mask_token_id: int | None = None,
    block_length: int | None = None,
    family: str | None = None,
    seed: int | Sequence[int] | None = None,
    eos_last: bool = False,
    stop: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    decoder_cache: str = "none",
    layers: str | slice | Sequence[int] = "all",
    query_rows: str = "all",
    softmax_scope: str = "sequence",
    diagonal: bool = True,
    backend: str = "auto",
    **model_kwargs: Any,
) -> AttnGenerateOutput | Tensor:
    """What ``model.generate(..., custom_generate=attn_generate)`` calls, with all that it has prepared.

    Parameters
    ----------
    model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer
        As transformers gives them.
    mask_token_id, block_length, family
        Default: as ``adapters.models.adapt`` finds them; ``"bidirectional"`` where the model's config says
        that it is not causal.
    seed
        As in ``attn_sampler.generate``. Default: drawn from torch's generator, which ``set_seed`` of
        transformers sets.
    decoder_cache
        ``cache`` of ``attn_sampler.generate``.
    policy, tau, eos_last, stop, decode, layers, query_rows, softmax_scope, diagonal, backend
        As in ``attn_sampler.generate``.
    **model_kwargs
        ``attention_mask`` [B, T], and what leaves the model's output as it is.

    Returns
    -------
    AttnGenerateOutput or Tensor
        As the configuration says. int64 [B, T + new]: prompts and what follows them; behind the end of a text
        pad_token_id, and no longer than the longest of them.

    Raises
    ------
    NotImplementedError
        Something is asked for that is not served, by name.
    TypeError, ValueError, RuntimeError
        As ``attn_sampler.generate``.
    """
    config = _with_defaults(generation_config)
    attention_mask = model_kwargs.pop("attention_mask", None)
    types = model_kwargs.get("token_type_ids")
    if types is not None and not types.any():  # what models take by default
        del model_kwargs["token_type_ids"]
    negative = None
    for processor in logits_processor:
        context = getattr(processor, "unconditional_context", None) or {}
        negative = context.get("input_ids") if negative is None else negative
    given = {name: value for name, value in model_kwargs.items() if name not in _PLAIN}
    given["streamer"], given["synced_gpus"] = streamer, synced_gpus or None
    _refuse(config, given, [*logits_processor, *stopping_criteria])
    length = input_ids.shape[1]
    new = config.max_new_tokens
    if new is None:
        new = 0 if config.max_length is None else max(config.max_length - length, 0)

    if family is None and find_family(model.config) is None and not getattr(model.config, "is_causal", True):
        family = "bidirectional"
    adapter, options = adapt(model, family)
    if mask_token_id is None and "mask_token_id" not in options:
        raise ValueError("mask_token_id: neither given nor known of this model")
    options |= {} if mask_token_id is None else {"mask_token_id": mask_token_id}
    options |= {} if block_length is None else {"block_length": block_length}
    eos = _token_ids(config.eos_token_id)
    ends = [x for x in eos if x != options["mask_token_id"]] or options.get("eos_token_id")
    ends = [ends] if isinstance(ends, int) else ends
    pad = _token_ids(config.pad_token_id)
    filler = pad[0] if pad else (ends[0] if ends else None)
    chosen = make_policy(policy, **({} if tau is None else {"tau": tau}))
    draws = _draws(config) if config.do_sample else {"temperature": 0.0}
    keeps_scores = bool(config.return_dict_in_generate and (config.output_scores or config.output_logits))
    recorder = _Recorder(chosen, len(input_ids), length, new) if keeps_scores else None
    if seed is None:
        seed = int(torch.randint(0, 1 << 31, ()))
    generation = decode_blocks(
        adapter,
        input_ids,
        gen_length=new,
        policy=chosen if recorder is None else recorder,
        **draws,
        seed=seed,
        attention_mask=None if attention_mask is None else attention_mask.bool(),
        eos_last=eos_last,
        stop=stop,
        decode=decode,
        pad_token_id=filler,
        suppress_token_ids=_token_ids(config.suppress_tokens),
        logit_bias=_biases(config.sequence_bias),
        guidance_scale=0.0 if config.guidance_scale is None else float(config.guidance_scale) - 1.0,
        unconditional_prompt_ids=None if negative is None else list(negative),
        cache=decoder_cache,
        layers=layers,
        query_rows=query_rows,
        softmax_scope=softmax_scope,
        diagonal=diagonal,
        backend=backend,
        **(options | {"eos_token_id": ends}),
    )
    to_fill = torch.arange(length + new, device=input_ids.device) >= length
    ending = TextEnds(ends, stop, decode, options["mask_token_id"])
    sequences, count = _ended(generation.tokens, to_fill, ending, filler)
    if not config.return_dict_in_generate:
        return sequences
    kept = None if recorder is None else recorder.scores(count - length, options["mask_token_id"], **draws)
    return AttnGenerateOutput(
        sequences=sequences,
        scores=kept if config.output_scores else None,
        logits=recorder.logits(count - length) if recorder is not None and config.output_logits else None,
        num_forward_passes=generation.num_forward_passes,
    )


def generate(
    model: nn.Module,
    input_ids: Tensor,
    generation_config: GenerationConfig | None = None,
    *,
    tokenizer: Any = None,
    negative_prompt_ids: Tensor | None = None,
    **keywords: Any,
) -> AttnGenerateOutput | Tensor:
    """``model.generate``, attention-guided, of any model that ``adapters.models`` knows.

    Parameters
    ----------
    model
        Of transformers or of code that comes with a checkpoint.
    input_ids
        int64 [B, T], padded on the left.
    generation_config
        Default: the model's, or else transformers' defaults.
    tokenizer
        Whose ``decode`` finds ``stop_strings``, and whose mask token is taken where the model names none.
    negative_prompt_ids
        int64 [B, T], what guidance leads away from. Default: the prompts with all of their tokens masked.
    **keywords
        Fields of ``generation_config``, the options of ``attn_generate``, and ``attention_mask`` [B, T].

    Returns
    -------
    AttnGenerateOutput or Tensor
        As ``attn_generate``.

    Raises
    ------
    NotImplementedError, TypeError, ValueError, RuntimeError
        As ``attn_generate``.
    """
    source = generation_config or getattr(model, "generation_config", None) or GenerationConfig()
    config = copy.deepcopy(source)
    left = config.update(**keywords)
    mask = getattr(tokenizer, "mask_token_id", None)
    if mask is not None and getattr(model.config, "mask_token_id", None) is None:
        left.setdefault("mask_token_id", mask)
    if config.stop_strings is not None:
        if tokenizer is None:
            raise ValueError("stop_strings: expected a tokenizer to go with them, got None")
        texts = [config.stop_strings] if isinstance(config.stop_strings, str) else list(config.stop_strings)
        left |= {"stop": texts, "decode": tokenizer.decode}
    copies = config.num_return_sequences or 1
    if copies > 1:
        input_ids = input_ids.repeat_interleave(copies, dim=0)
        if left.get("attention_mask") is not None:
            left["attention_mask"] = left["attention_mask"].repeat_interleave(copies, dim=0)
        if negative_prompt_ids is not None:
            negative_prompt_ids = negative_prompt_ids.repeat_interleave(copies, dim=0)
    processors = [] if negative_prompt_ids is None else [_Negative({"input_ids": negative_prompt_ids})]
    return attn_generate(model, input_ids, processors, (), config, **left)


@dataclasses.dataclass
class _Negative:
    """Hands negative prompts on, as the processor does that transformers makes of them."""

    unconditional_context: dict[str, Tensor]


_Negative.__name__ = next(iter(_MADE_OF))


class _Recorder(Policy):
    """Keeps the logits from which each position was filled."""

    def __init__(self, policy: Policy, batch: int, start: int, count: int) -> None:
        self._policy, self._shape, self._start = policy, (batch, count), start
        for name in ("metric", "needs_scores", "needs_map", "revises", "shadows", "max_edits"):
            setattr(self, name, getattr(policy, name))
        self._kept: Tensor | None = None  # [B, new, V] float32

    def reset(self) -> None:
        self._policy.reset()

    def select(self, state: StepState) -> Tensor | Decision:
        return self._policy.select(state)

    def step(
        self, tokens: Tensor, logits: Tensor, attention: Any = None, *, block: slice, **options: Any
    ) -> StepResult:
        result = self._policy.step(tokens, logits, attention, block=block, **options)
        if self._kept is None:
            self._kept = logits.new_zeros(*self._shape, logits.shape[2], dtype=torch.float32)
        filled = result.selected if result.revised is None else result.selected | (result.revised == REPLACED)
        row, place = filled.nonzero(as_tuple=True)
        position = place + block.start - self._start
        own = position >= 0
        sequence = options["sequence"][row[own]]
        self._kept[sequence, position[own]] = logits[row[own], place[own]].float()
        return result

    def logits(self, count: int) -> tuple[Tensor, ...]:
        """[B, V] for each of the first new positions."""
        return () if self._kept is None else self._kept[:, :count].unbind(dim=1)

    def scores(
        self,
        count: int,
        mask_token_id: int,
        temperature: float,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
    ) -> tuple[Tensor, ...]:
        """As ``logits``, divided by the temperature where there is one; -inf for what may not be drawn."""
        if self._kept is None or temperature == 0.0:
            return self.logits(count)
        scaled = self._kept[:, :count] / temperature
        if (top_k, top_p, min_p) != (0, 1.0, 0.0):
            scaled[..., mask_token_id] = -torch.inf
            filters = (torch.tensor(x, device=scaled.device).view(1, 1, 1) for x in (top_k, top_p, min_p))
            scaled = scaled.masked_fill(~truncation(scaled, *filters), -torch.inf)
        return scaled.unbind(dim=1)


def _draws(config: GenerationConfig) -> dict[str, Any]:
    """How a configuration that samples draws, as ``attn_sampler.generate`` takes it.

    transformers' nucleus of ``top_p=0`` is the most probable token.
    """
    top_p = 1.0 if config.top_p is None else float(config.top_p)
    return {
        "temperature": float(config.temperature),
        "top_k": int(config.top_k or 0),
        "top_p": top_p if top_p > 0.0 else torch.finfo(torch.float32).tiny,
        "min_p": float(config.min_p or 0.0),
    }


def _with_defaults(given: GenerationConfig | None) -> GenerationConfig:
    """A copy in which fields that are None have transformers' defaults, but for lengths."""
    config = GenerationConfig() if given is None else copy.deepcopy(given)
    for name, value in config._get_default_generation_params().items():
        if name != "max_length" and getattr(config, name, None) is None:
            setattr(config, name, value)
    return config


def _refuse(config: GenerationConfig, given: Mapping[str, Any], made: Sequence[Any]) -> None:
    """Raise where something is asked for that is not served."""
    defaults = config._get_default_generation_params()
    neutral = {name: [value] for name, value in defaults.items()}
    for name, values in _NEUTRAL.items():
        neutral[name] = [*neutral.get(name, []), *values]
    asked = {name: x for name, x in vars(config).items() if not name.startswith("_") and x is not False}
    served = _SERVED if config.do_sample else (*_SERVED, *_SAMPLING)
    text = "; ".join(filter(None, (unserved(asked, served, neutral), unserved(given))))
    known = {kind: 1 for kind, name in _MADE_OF.items() if getattr(config, name, None) not in (None, False)}
    warps = {
        "TemperatureLogitsWarper": config.temperature != 1.0,
        "TopKLogitsWarper": config.top_k not in (None, 0),
        "TopPLogitsWarper": config.top_p is not None and config.top_p < 1.0,
        "MinPLogitsWarper": config.min_p is not None,
    }
    known |= {kind: int(bool(config.do_sample) and made) for kind, made in warps.items()}
    for kind in (type(each).__name__ for each in made):
        known[kind] = known.get(kind, 0) - 1
        if known[kind] < 0:
            text = text or f"logits_processor, stopping_criteria: expected none of your own, got a {kind}"
    if config.return_dict_in_generate is not True and (config.output_scores or config.output_logits):
        text = text or "output_scores, output_logits: go with return_dict_in_generate"
    guided = config.guidance_scale not in (None, 1, 1.0)
    if config.output_logits and (config.suppress_tokens or config.sequence_bias or guided):
        text = (
            text
            or "output_logits: expected no tokens suppressed, biased or guided, as these logits are not kept"
        )
    if guided and config.guidance_scale < 1.0:
        text = text or f"guidance_scale: expected 1 or more, got {config.guidance_scale}"
    if text:
        raise NotImplementedError(f"attn_generate: {text}")


def _token_ids(given: Any) -> list[int]:
    if given is None:
        return []
    if isinstance(given, Tensor):
        given = given.tolist()
    return list(given) if isinstance(given, (list, tuple)) else [checks.integer("token id", given)]


def _biases(given: Any) -> dict[int, float]:
    """transformers' sequence_bias, of single tokens."""
    pairs = given.items() if isinstance(given, Mapping) else given or ()
    biases = {}
    for tokens, bias in pairs:
        if len(tokens) != 1:
            raise NotImplementedError(
                f"attn_generate: sequence_bias: expected biases of single tokens, got {list(tokens)}"
            )
        biases[int(tokens[0])] = float(bias)
    return biases


def _ended(tokens: Tensor, to_fill: Tensor, ends: TextEnds, filler: int | None) -> tuple[Tensor, int]:
    """The tokens with the filler behind each text's end, and how long the longest text is."""
    length = tokens.shape[1]
    if not ends:
        return tokens, length
    last = ends.find(tokens, to_fill.expand_as(tokens))
    position = torch.arange(length, device=tokens.device)
    if filler is not None:
        tokens = tokens.masked_fill(to_fill & (position > last[:, None]), filler)
    first_new = int((~to_fill).sum())
    longest = max(min(int(last.max()) + 1, length), first_new) if len(tokens) else length
    return tokens[:, :longest], longest
