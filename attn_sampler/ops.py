"""The registered torch operators ``torch.ops.attn_sampler.*`` and their way to a backend.

One operator for each function, opaque to torch.compile, with a schema that says what it writes. The
signatures are explicit and positional; ``attn_sampler.functional`` fills them in. A backend is a module (or
class) with the same functions, writing into tensors that are allocated here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_sampler import _core, reference
from attn_sampler.backends import choose_backend

_ATTENTION = (
    "Tensor q, Tensor k, Tensor? softmax_lse, Tensor? key_mask, Tensor? query_mask, "
    "{rows}SymInt column_start, SymInt column_stop, SymInt query_start, float softmax_scale, "
    "str lse_base, bool causal, str softmax_scope, bool diagonal, {reduction}bool per_head, "
    "bool accumulate, str backend"
)

_LIBRARY = torch.library.Library("attn_sampler", "DEF")
_LIBRARY.define(
    "column_scores(Tensor(a!) out, "
    + _ATTENTION.format(rows="", reduction="str reduction, ")
    + ") -> ()"
)
_LIBRARY.define(
    "attention_map(Tensor(a!) out, "
    + _ATTENTION.format(rows="SymInt row_start, SymInt row_stop, ", reduction="")
    + ") -> ()"
)
_LIBRARY.define(
    "token_confidence(Tensor logits, Tensor? seeds, str metric, float temperature, SymInt seed, "
    "SymInt exclude_token_id, str backend) -> (Tensor token_ids, Tensor confidence)"
)
_LIBRARY.define(
    "select_tokens(Tensor scores, Tensor confidence, Tensor masked, str policy, float tau, "
    "str fallback, str backend) -> Tensor"
)
_LIBRARY.define(
    "decode_step(Tensor(a!) tokens, Tensor(b!) scores, Tensor logits, Tensor[] q, Tensor[] k, "
    "Tensor[] softmax_lse, Tensor? key_mask, Tensor? query_mask, Tensor? seeds, "
    "SymInt block_start, SymInt block_stop, SymInt mask_token_id, bool masked_rows_only, "
    "SymInt column_start, SymInt column_stop, SymInt query_start, float? softmax_scale, "
    "str lse_base, bool causal, str softmax_scope, bool diagonal, str reduction, str metric, "
    "float temperature, SymInt seed, str policy, float tau, str fallback, str backend) "
    "-> (Tensor token_ids, Tensor confidence, Tensor selected)"
)


class _Reference:
    """``attn_sampler.reference`` behind the signatures of a backend."""

    @staticmethod
    def column_scores(
        out: Tensor,
        q: Tensor,
        k: Tensor,
        softmax_lse: Tensor | None,
        key_mask: Tensor | None,
        query_mask: Tensor | None,
        column_start: int,
        column_stop: int,
        query_start: int,
        softmax_scale: float,
        lse_base: str,
        causal: bool,
        softmax_scope: str,
        diagonal: bool,
        reduction: str,
        per_head: bool,
        accumulate: bool,
    ) -> None:
        scores = reference.column_scores(
            q,
            k,
            columns=slice(column_start, column_stop),
            softmax_lse=softmax_lse,
            lse_base=lse_base,
            softmax_scale=softmax_scale,
            causal=causal,
            key_mask=key_mask,
            query_mask=query_mask,
            query_start=query_start,
            softmax_scope=softmax_scope,
            diagonal=diagonal,
            reduction=reduction,
            per_head=per_head,
        )
        out.add_(scores) if accumulate else out.copy_(scores)

    @staticmethod
    def attention_map(
        out: Tensor,
        q: Tensor,
        k: Tensor,
        softmax_lse: Tensor | None,
        key_mask: Tensor | None,
        query_mask: Tensor | None,
        row_start: int,
        row_stop: int,
        column_start: int,
        column_stop: int,
        query_start: int,
        softmax_scale: float,
        lse_base: str,
        causal: bool,
        softmax_scope: str,
        diagonal: bool,
        per_head: bool,
        accumulate: bool,
    ) -> None:
        weights = reference.attention_map(
            q,
            k,
            rows=slice(row_start, row_stop),
            columns=slice(column_start, column_stop),
            softmax_lse=softmax_lse,
            lse_base=lse_base,
            softmax_scale=softmax_scale,
            causal=causal,
            key_mask=key_mask,
            query_mask=query_mask,
            query_start=query_start,
            softmax_scope=softmax_scope,
            diagonal=diagonal,
            per_head=per_head,
        )
        out.add_(weights) if accumulate else out.copy_(weights)

    @staticmethod
    def token_confidence(
        token_ids: Tensor,
        confidence: Tensor,
        logits: Tensor,
        seeds: Tensor | None,
        metric: str,
        temperature: float,
        seed: int,
        exclude_token_id: int,
    ) -> None:
        ids, value = reference.token_confidence(
            logits,
            metric=metric,
            temperature=temperature,
            seed=seed if seeds is None else seeds,
            exclude_token_id=None if exclude_token_id < 0 else exclude_token_id,
        )
        token_ids.copy_(ids)
        confidence.copy_(value)

    @staticmethod
    def select_tokens(
        selected: Tensor,
        scores: Tensor,
        confidence: Tensor,
        masked: Tensor,
        policy: str,
        tau: float,
        fallback: str,
    ) -> None:
        selected.copy_(
            reference.select_tokens(
                scores, confidence, masked, policy=policy, tau=tau, fallback=fallback
            )
        )

    @staticmethod
    def decode_step(
        tokens: Tensor,
        scores: Tensor,
        token_ids: Tensor,
        confidence: Tensor,
        selected: Tensor,
        logits: Tensor,
        q: list[Tensor],
        k: list[Tensor],
        softmax_lse: list[Tensor],
        key_mask: Tensor | None,
        query_mask: Tensor | None,
        seeds: Tensor | None,
        block_start: int,
        block_stop: int,
        mask_token_id: int,
        masked_rows_only: bool,
        column_start: int,
        column_stop: int,
        query_start: int,
        softmax_scale: float | None,
        lse_base: str,
        causal: bool,
        softmax_scope: str,
        diagonal: bool,
        reduction: str,
        metric: str,
        temperature: float,
        seed: int,
        policy: str,
        tau: float,
        fallback: str,
    ) -> None:
        lse = softmax_lse or [None] * len(q)
        result = reference.decode_step(
            tokens,
            logits,
            list(zip(q, k, lse, strict=True)) if q else scores,
            block=slice(block_start, block_stop),
            mask_token_id=mask_token_id,
            policy=policy,
            tau=tau,
            fallback=fallback,
            metric=metric,
            temperature=temperature,
            seed=seed if seeds is None else seeds,
            rows="masked" if masked_rows_only else "all",
            columns=slice(column_start, column_stop),
            query_mask=query_mask,
            query_start=query_start,
            softmax_scale=softmax_scale,
            lse_base=lse_base,
            causal=causal,
            key_mask=key_mask,
            softmax_scope=softmax_scope,
            diagonal=diagonal,
            reduction=reduction,
        )
        for buffer, value in (
            (token_ids, result.token_ids),
            (confidence, result.confidence),
            (selected, result.selected),
        ):
            buffer.copy_(value)
        if q:
            scores.copy_(result.scores)


_BACKENDS = {"cpu": _core, "reference": _Reference}


def _backend(op: str, name: str, *tensors: Tensor):  # type: ignore[no-untyped-def]
    return _BACKENDS[choose_backend(op, name, *tensors)]


def _column_scores(out: Tensor, q: Tensor, k: Tensor, *arguments: object) -> None:
    *rest, backend = arguments
    _backend("column_scores", backend, q, k).column_scores(out, q, k, *rest)


def _attention_map(out: Tensor, q: Tensor, k: Tensor, *arguments: object) -> None:
    *rest, backend = arguments
    _backend("attention_map", backend, q, k).attention_map(out, q, k, *rest)


def _token_confidence(
    logits: Tensor,
    seeds: Tensor | None,
    metric: str,
    temperature: float,
    seed: int,
    exclude_token_id: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    token_ids, confidence = _token_confidence_outputs(logits)
    _backend("token_confidence", backend, logits).token_confidence(
        token_ids, confidence, logits, seeds, metric, temperature, seed, exclude_token_id
    )
    return token_ids, confidence


def _token_confidence_outputs(logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    shape = logits.shape[:2]
    return (
        logits.new_empty(shape, dtype=torch.int64),
        logits.new_empty(shape, dtype=torch.float32),
    )


def _select_tokens(
    scores: Tensor,
    confidence: Tensor,
    masked: Tensor,
    policy: str,
    tau: float,
    fallback: str,
    backend: str,
) -> Tensor:
    selected = _select_tokens_output(scores, confidence, masked)
    _backend("select_tokens", backend, scores, confidence).select_tokens(
        selected, scores, confidence, masked, policy, tau, fallback
    )
    return selected


def _select_tokens_output(scores: Tensor, confidence: Tensor, masked: Tensor, *_: object) -> Tensor:
    return masked.new_empty(masked.shape)


def _decode_step(
    tokens: Tensor,
    scores: Tensor,
    logits: Tensor,
    q: list[Tensor],
    k: list[Tensor],
    *arguments: object,
) -> tuple[Tensor, Tensor, Tensor]:
    *rest, backend = arguments
    token_ids, confidence, selected = _decode_step_outputs(tokens, scores, logits)
    _backend("decode_step", backend, logits, *q, *k).decode_step(
        tokens, scores, token_ids, confidence, selected, logits, q, k, *rest
    )
    return token_ids, confidence, selected


def _decode_step_outputs(
    tokens: Tensor, scores: Tensor, logits: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        *_token_confidence_outputs(logits),
        logits.new_empty(logits.shape[:2], dtype=torch.bool),
    )


for _name, _run, _fake in (
    ("column_scores", _column_scores, lambda *_: None),
    ("attention_map", _attention_map, lambda *_: None),
    ("token_confidence", _token_confidence, _token_confidence_outputs),
    ("select_tokens", _select_tokens, _select_tokens_output),
    ("decode_step", _decode_step, _decode_step_outputs),
):
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _run, _key)
    torch.library.register_fake(f"attn_sampler::{_name}", _fake, lib=_LIBRARY)
