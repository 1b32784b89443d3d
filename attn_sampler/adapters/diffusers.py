"""diffusers: attention-guided decoding as the scheduler of its ``LLaDA2Pipeline``.

Install: ``pip install 'attn_sampler[diffusers]'``.

    from attn_sampler.adapters.diffusers import AttnSamplerScheduler
    pipe = LLaDA2Pipeline(model=model, scheduler=AttnSamplerScheduler(rule="parallel"), tokenizer=tokenizer)
    pipe.scheduler.attach(pipe.model)  # for good, or while: with pipe.scheduler.attach(pipe.model):
    pipe("Why is the sky blue?", gen_length=256, threshold=0.9, editing_threshold=None)

It takes the place of ``BlockRefinementScheduler``, also by ``from_config(pipe.scheduler.config)``, and under
``rule="threshold"`` returns the same, but that the mask token is never predicted (it counts as absent from
the vocabulary), that every step commits something, that of equal confidences the lowest position comes first,
and that sampling draws other random numbers: of one stream for each sequence and step, which the generator
seeds. Decoding without a mask token is refused. The model has to call PyTorch's
``scaled_dot_product_attention`` (``attn_implementation="sdpa"``) or an attention of
``attn_sampler.adapters.transformers``. Interface of version 0.42.1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attn_sampler import checks
from attn_sampler.adapters._engine import require
from attn_sampler.backends import BACKEND_CHOICES
from attn_sampler.capture import AttentionCapture
from attn_sampler.errors import DecodingError
from attn_sampler.functional import decode_step
from attn_sampler.options import RULES, check_temperature
from attn_sampler.policy import top_positions
from attn_sampler.reference import REPLACED


def _part(name: str) -> Any:
    """A module of diffusers."""
    return require(f"diffusers.{name}", "diffusers", "pip install 'attn_sampler[diffusers]'", "0.42", "1")


_configuration: Any = _part("configuration_utils")
_refinement: Any = _part("schedulers.scheduling_block_refinement")
# By this name here ``from_pretrained`` of a whole pipeline knows that this module's scheduler is one.
SchedulerMixin: Any = _part("schedulers.scheduling_utils").SchedulerMixin


class AttnSamplerScheduler(SchedulerMixin, _configuration.ConfigMixin):
    """Commits by the attention that positions receive, or by another rule of ``decode_step``.

    Parameters
    ----------
    block_length, num_inference_steps, threshold, editing_threshold, minimal_topk
        As in ``BlockRefinementScheduler``; a pipeline brings its own. A block of C positions decoded in n
        steps commits C / n of them at least in each. ``minimal_topk`` is what the pipeline derives n from,
        and no step reads it.
    rule, fallback, metric
        As in ``decode_step``, whose tau is ``threshold``. Where the rule commits fewer positions than a step
        has to, those that are missing are the best by ``fallback`` (by score, under ``"sequential"``).
    layers
        ``"all"``, or a list of the attention layers that count, as in ``AttentionCapture``.
    softmax_scope, diagonal, backend
        As in ``column_scores``.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.
    """

    @_configuration.register_to_config
    def __init__(
        self,
        block_length: int = 32,
        num_inference_steps: int = 32,
        threshold: float = 0.9,
        editing_threshold: float | None = None,
        minimal_topk: int = 1,
        rule: str = "parallel",
        fallback: str = "confidence",
        metric: str = "probability",
        layers: str | Sequence[int] = "all",
        softmax_scope: str = "sequence",
        diagonal: bool = True,
        backend: str = "auto",
    ) -> None:
        checks.choice("rule", rule, RULES)
        checks.choice("fallback", fallback, ("confidence", "score"))
        checks.choice("metric", metric, ("probability", "margin", "entropy"))
        checks.choice("backend", backend, BACKEND_CHOICES)
        if isinstance(layers, slice):
            raise TypeError(f"layers: expected 'all' or a list, which a file can hold, got {layers}")
        self._by_score = rule == "sequential" or fallback == "score"
        self._reads_attention = rule != "threshold" or self._by_score
        self._hooks = contextlib.ExitStack()
        self._capture = AttentionCapture(
            layers=layers, keep=True, softmax_scope=softmax_scope, diagonal=diagonal, backend=backend
        )
        self.set_timesteps(num_inference_steps, block_length=block_length)

    def attach(self, model: nn.Module) -> contextlib.ExitStack:
        """Watch the model's forward passes, and no longer those of another one.

        Returns
        -------
        contextlib.ExitStack
            Its ``close()``, or the end of a ``with`` block over it, lets go of the model, which a rule that
            reads no attention leaves alone.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self._hooks.close()
        if self._reads_attention:
            self._hooks.enter_context(model.register_forward_pre_hook(self._begin, with_kwargs=True))
            self._hooks.enter_context(model.register_forward_hook(self._end, always_call=True))
        return self._hooks

    def _begin(self, module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
        mask = keywords.get("attention_mask")
        is_padding = isinstance(mask, Tensor) and mask.dim() == 2
        self._capture.query_mask = mask.bool() if is_padding else None  # type: ignore[union-attr]
        self._capture.__enter__()

    def _end(self, *_: Any) -> None:
        self._capture.__exit__(None, None, None)

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: str | torch.device | None = None,
        block_length: int | None = None,
    ) -> None:
        """Decode blocks of this length, the last of the model's positions, in so many steps at most."""
        steps = checks.integer("num_inference_steps", num_inference_steps, 1)
        length = self.config.block_length if block_length is None else block_length
        length = checks.integer("block_length", length, 1)
        self.num_inference_steps = steps
        self.timesteps = torch.arange(steps - 1, -1, -1, device=device)
        self._quotas = [length // steps + (i < length % steps) for i in range(steps)]
        self._capture.columns = slice(-length, None)

    @torch.no_grad()
    def step(
        self,
        model_output: Tensor,  # [B, C, V]
        timestep: int | Tensor,
        sample: Tensor,  # [B, C]
        *,
        mask_token_id: int | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        sampling_method: str = "auto",
        threshold: float | None = None,
        editing_threshold: float | None = None,
        minimal_topk: int | None = None,
        prompt_mask: Tensor | None = None,  # [C]
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Commit tokens of the block and, above a positive ``editing_threshold``, replace some of them.

        Nothing waits for the device (but for a ``timestep`` that is a tensor there).

        Parameters
        ----------
        model_output, timestep, sample, mask_token_id
            Logits, the number of the step within the block, and the block's tokens, which are left as they
            are.
        temperature, top_p, top_k, sampling_method
            Tokens are drawn with ``"multinomial"`` or ``"auto"`` at a temperature above 0, of the ``top_k``
            most probable and of these the most probable ones that hold ``top_p``; else the most probable is
            taken. Their probabilities are those under which they are drawn.
        threshold, editing_threshold
            The confidence to exceed. Where they are None, those of the configuration.
        prompt_mask
            Boolean: positions that are never replaced.
        generator
            Seeds the draws; it may be on the CPU.

        Returns
        -------
        BlockRefinementSchedulerOutput
            Or, unless ``return_dict``, its fields.

        Raises
        ------
        TypeError, ValueError
            Naming the argument.
        DecodingError
            The rule reads attention, and none was seen since the last step.
        """
        config = self.config
        if mask_token_id is None:
            raise ValueError("mask_token_id: expected an id, got None: decoding without one is not served")
        checks.tensor("sample", sample, "[B, C]", (torch.int64,))
        checks.tensor("model_output", model_output, "[B, C, V]", checks.FLOAT_DTYPES, like=sample)
        checks.shape("model_output", model_output, "[B, C, V]", (*sample.shape, model_output.shape[2]))
        checks.integer("mask_token_id", mask_token_id, 0, model_output.shape[2])
        if minimal_topk is not None:
            checks.integer("minimal_topk", minimal_topk, 1)
        threshold = config.threshold if threshold is None else threshold
        threshold = checks.number("threshold", threshold, "a number >= 0", lambda x: x >= 0.0)
        editing_threshold = config.editing_threshold if editing_threshold is None else editing_threshold
        edits = editing_threshold is not None and (
            checks.number("editing_threshold", editing_threshold, "a number", lambda x: x == x) > 0.0
        )
        budget = torch.full(sample.shape, int(edits), dtype=torch.int32, device=sample.device)
        if prompt_mask is not None:
            checks.tensor("prompt_mask", prompt_mask, "[C]", (torch.bool,), like=sample)
            checks.shape("prompt_mask", prompt_mask, "[C]", sample.shape[1:])
            budget.masked_fill_(prompt_mask, 0)
        checks.choice("sampling_method", sampling_method, ("auto", "greedy", "multinomial"))
        logits, seeds = model_output, None
        if check_temperature(temperature) > 0.0 and sampling_method != "greedy":
            logits = model_output / temperature
            logits[..., mask_token_id] = -torch.inf
            logits = _likeliest(logits, top_k, top_p)
            seeds = _seeds(len(sample), generator, sample.device)
        tokens = sample.clone()
        result = decode_step(
            tokens,
            logits,
            **self._attention(sample),
            block=slice(0, sample.shape[1]),
            mask_token_id=mask_token_id,
            rule=config.rule,
            tau=min(_above(threshold), 1.0),
            fallback=config.fallback,
            budget=budget,
            replace_tau=_above(editing_threshold) if edits else torch.inf,
            metric=config.metric,
            temperature=0.0 if seeds is None else 1.0,
            seed=seeds,
            backend=config.backend,
        )
        selected, edited = result.selected, result.revised == REPLACED
        quota = max(self._quotas[min(int(timestep), len(self._quotas) - 1)], 1)
        unreachable = _above(threshold) > 1.0  # but decode_step's tau is not
        if quota > 1 or unreachable:
            passing = torch.zeros_like(selected) if unreachable else selected
            value = result.scores if self._by_score else result.confidence
            first = value.masked_fill(passing, torch.inf)
            selected = passing | top_positions(first, sample == mask_token_id, quota)
            tokens = torch.where(selected | edited, result.token_ids, sample)
        probability = result.confidence if config.metric == "probability" else result.log_prob.exp()  # type: ignore[union-attr]
        fields = (tokens, selected, edited, result.token_ids, probability, model_output)
        return _refinement.BlockRefinementSchedulerOutput(*fields) if return_dict else fields

    def _attention(self, sample: Tensor) -> dict[str, Any]:
        """The attention of the last forward pass, as ``decode_step`` takes it."""
        if not self._reads_attention:
            return {"scores": torch.zeros(sample.shape, dtype=torch.float32, device=sample.device)}
        if self._capture.num_calls == 0:
            raise DecodingError(
                f"rule: {self.config.rule!r} reads attention, and none was seen since the last step: call "
                "scheduler.attach(pipe.model) before the pipeline, with a model that calls PyTorch's "
                "scaled_dot_product_attention (attn_implementation='sdpa') or an attention of "
                "attn_sampler.adapters.transformers; or choose rule='threshold', which reads none"
            )
        attention, options = self._capture.step_input()
        self._capture.reset()  # lets go of the queries, and of this pass
        return {"scores" if isinstance(attention, Tensor) else "layers": attention, **options}

    @staticmethod
    def check_eos_finished(
        cur_x: Tensor,  # [B, T]
        sampled_tokens: Tensor,  # [B, C]
        final_transfer: Tensor,  # [B, C]
        finished: Tensor,  # [B]
        eos_token_id: int,
        mask_token_id: int,
        prompt_length: int,
    ) -> Tensor:
        """Which sequences are finished, bool [B]: now also those whose end was written and has no gap before.

        A prompt that holds the token of the end is never finished, as in ``BlockRefinementScheduler``.
        """
        ends = cur_x == eos_token_id
        written = (final_transfer & (sampled_tokens == eos_token_id)).any(dim=1)
        before = ends.cumsum(dim=1) == 0
        gap = (before & (cur_x == mask_token_id))[:, prompt_length:].any(dim=1)
        in_prompt = ends[:, :prompt_length].any(dim=1)
        return finished | (written & ends.any(dim=1) & ~in_prompt & ~gap)

    def check_block_should_continue(
        self,
        step_idx: int,
        masks_remaining: bool | Tensor,
        editing_enabled: bool,
        editing_transfer_index: Tensor,  # [B, C]
        post_steps: int,
        max_post_steps: int,
        finished: Tensor,  # [B]
    ) -> bool:
        """Whether the block needs another step: to be filled, or because its last one replaced something."""
        if finished.all():
            return False
        if masks_remaining:
            return step_idx < self.num_inference_steps
        return editing_enabled and post_steps <= max_post_steps and bool(editing_transfer_index.any())


def _above(x: float) -> float:
    """The float32 after x: to reach it is to exceed x, and ``decode_step`` asks for the former."""
    return float(np.nextafter(np.float32(x), np.float32(np.inf)))


def _likeliest(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits that are -inf but for the k largest (and those equal to the last), and of these the nucleus."""
    if top_k is not None and 0 < checks.integer("top_k", top_k) < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and checks.number("top_p", top_p, "a number > 0", lambda x: x > 0.0) < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        mass = torch.softmax(ordered, dim=-1, dtype=torch.float32).cumsum(dim=-1)
        outside = F.pad(mass[..., :-1] > top_p, (1, 0))  # what comes before holds enough
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
    return logits


def _seeds(batch: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """int64 [B]: a stream for each sequence, fresh in each step, made where the generator is."""
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    place = device if generator is None else generator.device
    bounds = (-(1 << 63), (1 << 63) - 1)
    seeds = torch.randint(*bounds, (batch,), generator=generator, device=place)
    return seeds.to(device, non_blocking=True)
