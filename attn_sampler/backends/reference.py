"""The backend that is the specification: any device, any floating dtype."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attn_sampler import reference
from attn_sampler.backends.base import Backend
from attn_sampler.options import Attention, Layer, Masks, Sampling, Selection, Span, Step, Top
from attn_sampler.reference import Selected, StepResult, TopColumns


def _plain(function: Callable[..., None]) -> Callable[..., None]:
    """Without gradients, which would tie ``out`` to the graph of q and k, and without autocast."""

    @functools.wraps(function)
    def run(self: Any, out: Any, *arguments: Any) -> None:
        device = (out if isinstance(out, Tensor) else out[0]).device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            function(self, out, *arguments)

    return run


def _check_memory(name: str, held: str, like: Tensor, *sizes: int) -> None:
    """Refuse what this machine cannot hold a few of: torch might take all of its memory before it fails."""
    needed = 3 * math.prod(sizes) * (8 if like.dtype == torch.float64 else 4)
    if like.is_cpu and needed > _physical_memory():
        raise MemoryError(
            f"{name}: the reference holds all of {held} = {list(sizes)} a few times over, "
            f"{needed / 2**30:.3g} GiB, and this machine has {_physical_memory() / 2**30:.3g}"
        )


@functools.cache
def _physical_memory() -> int:
    """In bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check_attention(layer: Layer, masks: Masks, prefix: str = "") -> None:
    q, k = layer[:2]
    _check_memory(f"{prefix}q", "[B, Hq, M, N]", q, *q.shape[:3], masks.n_keys(k))


def _keywords(masks: Masks, options: Attention, *without: str) -> dict[str, Any]:
    keywords = {**masks._asdict(), **options._asdict()}
    return {name: _sliced(value) for name, value in keywords.items() if name not in without}


def _sliced(value: Any) -> Any:
    return slice(*value) if isinstance(value, Span) else value


class Reference(Backend):
    """``attn_sampler.reference`` as a backend."""

    name = "reference"
    auto = None
    counts_writes = True

    def refuses(self, op: str, tensors: Sequence[Tensor]) -> str | None:
        return None

    def function(self, op: str) -> Callable[..., None]:
        return getattr(self, op)

    @_plain
    def column_scores(self, out: Tensor, layer: Layer, masks: Masks, options: Attention) -> None:
        _check_attention(layer, masks)
        keywords = _keywords(masks, options, "rows", "accumulate", "column_mask")
        _store(out, reference.column_scores(**layer._asdict(), **keywords), options.accumulate)

    @_plain
    def attention_map(self, out: Tensor, layer: Layer, masks: Masks, options: Attention) -> None:
        _check_attention(layer, masks)
        keywords = _keywords(masks, options, "accumulate")
        _store(out, reference.attention_map(**layer._asdict(), **keywords), options.accumulate)

    @_plain
    def top_columns(self, out: TopColumns, layer: Layer, masks: Masks, options: Top) -> None:
        _check_attention(layer, masks)
        choice = options._asdict()
        keywords = _keywords(masks, choice.pop("attention"), "rows", "per_head", "accumulate", "column_mask")
        _copy(out, reference.top_columns(**layer._asdict(), **choice, **keywords))

    @_plain
    def token_confidence(
        self, out: tuple[Tensor, ...], logits: Tensor, current_ids: Tensor | None, options: Sampling
    ) -> None:
        _check_memory("logits", "[B, C, V]", logits, *logits.shape)
        result = reference.token_confidence(logits, current_ids=current_ids, **options._asdict())
        _copy(out, (result.token_ids, result.confidence, result.log_prob, result.current))

    @_plain
    def select_tokens(
        self,
        out: Selected,
        scores: Tensor,
        confidence: Tensor,
        masked: Tensor,
        current: Tensor | None,
        differs: Tensor | None,
        options: Selection,
    ) -> None:
        revision = options._asdict()
        commit = {name: revision.pop(name) for name in ("rule", "fallback", "tau")}
        out.selected.copy_(reference.select_tokens(scores, confidence, masked, **commit))
        if current is not None and differs is not None:
            given = (scores, confidence, masked, current, differs, out.budget)
            out.revised.copy_(reference.revise_tokens(*given, **revision))

    @_plain
    def decode_step(
        self, out: StepResult, logits: Tensor, layers: list[Layer], masks: Masks, options: Step
    ) -> None:
        for index, layer in enumerate(layers):
            _check_attention(layer, masks, f"layers[{index}] ")
        _check_memory("logits", "[B, C, V]", logits, *logits.shape)
        given = {"layers": layers} if layers else {"scores": out.scores}
        sampling = options.sampling._asdict()
        del sampling["exclude_token_id"], sampling["vocab_start"]
        result = reference.decode_step(
            out.tokens,
            logits,
            **given,
            block=_sliced(options.block),
            mask_token_id=options.mask_token_id,
            query_rows=options.query_rows,
            **options.selection._asdict(),
            budget=out.budget,
            **sampling,
            **_keywords(masks, options.attention, "rows", "per_head", "accumulate", "column_mask"),
        )
        _copy(out[1:], result[1:])


def _store(out: Tensor, result: Tensor, accumulate: bool) -> None:
    if accumulate:
        out.add_(result)
    else:
        out.copy_(result)


def _copy(out: Sequence[Tensor | None], result: Sequence[Tensor | None]) -> None:
    for to, value in zip(out, result, strict=True):
        if to is not None and value is not None and to is not value:
            to.copy_(value)


REFERENCE = Reference()
