"""The registered torch operators ``torch.ops.attn_sampler.*`` and their way to a backend.

One operator for each function, opaque to torch.compile, with a schema that says what it writes. The
signatures are explicit and positional; ``attn_sampler.functional`` fills them in. A backend is a module (or
class) with the same functions, writing into tensors that are allocated here.

Most calls need no operator: ``is_direct`` tells which may go straight to the extension.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import DeviceContext

from attn_sampler import _core, checks, reference
from attn_sampler.backends import TRITON_MODULE, choose_backend, names_extension

_ATTENTION = (
    "Tensor q, Tensor k, Tensor? softmax_lse, Tensor? q_descale, Tensor? k_descale, "
    "Tensor? key_mask, Tensor? query_mask, "
    "{rows}SymInt column_start, SymInt column_stop, SymInt query_start, float softmax_scale, "
    "str lse_base, bool causal, str softmax_scope, bool diagonal, {reduction}bool per_head, "
    "bool accumulate, str backend"
)
_COLUMN_SCORES = _ATTENTION.format(rows="", reduction="str reduction, ")
_ATTENTION_MAP = _ATTENTION.format(rows="SymInt row_start, SymInt row_stop, ", reduction="")

_LIBRARY = torch.library.Library("attn_sampler", "DEF")
for _schema in (
    f"column_scores(Tensor(a!) out, {_COLUMN_SCORES}) -> ()",
    f"attention_map(Tensor(a!) out, {_ATTENTION_MAP}) -> ()",
    "token_confidence(Tensor logits, Tensor? seeds, str metric, float temperature, SymInt seed, "
    "SymInt exclude_token_id, SymInt vocab_start, str backend) -> (Tensor token_ids, Tensor confidence)",
    "select_tokens(Tensor scores, Tensor confidence, Tensor masked, str policy, float tau, "
    "str fallback, str backend) -> Tensor",
    "decode_step(Tensor(a!) tokens, Tensor(b!) scores, Tensor logits, Tensor[] q, Tensor[] k, "
    "Tensor[] softmax_lse, Tensor[] q_descale, Tensor[] k_descale, "
    "Tensor? key_mask, Tensor? query_mask, Tensor? seeds, "
    "SymInt block_start, SymInt block_stop, SymInt mask_token_id, bool masked_rows_only, "
    "SymInt column_start, SymInt column_stop, SymInt query_start, float softmax_scale, "
    "str lse_base, bool causal, str softmax_scope, bool diagonal, str reduction, str metric, "
    "float temperature, SymInt seed, str policy, float tau, str fallback, str backend) "
    "-> (Tensor token_ids, Tensor confidence, Tensor selected)",
):
    # Compiled graphs hand over tensors in the memory layout that eager code would.
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))


def _store(out: Tensor, result: Tensor, accumulate: bool) -> None:
    if accumulate:
        out.add_(result)
    else:
        out.copy_(result)


def _plain(function: Callable[..., None]) -> Callable[..., None]:
    """Without gradients, which would tie ``out`` to the graph of q and k, and without autocast."""

    @functools.wraps(function)
    def run(*arguments: Any) -> None:
        with torch.no_grad(), torch.autocast(arguments[0].device.type, enabled=False):
            function(*arguments)

    return run


class _Reference:
    """``attn_sampler.reference`` behind the signatures of a backend."""

    @staticmethod
    @_plain
    def column_scores(
        out: Tensor,
        q: Tensor,
        k: Tensor,
        softmax_lse: Tensor | None,
        q_descale: Tensor | None,
        k_descale: Tensor | None,
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
        result = reference.column_scores(
            q,
            k,
            columns=slice(column_start, column_stop),
            softmax_lse=softmax_lse,
            q_descale=q_descale,
            k_descale=k_descale,
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
        _store(out, result, accumulate)

    @staticmethod
    @_plain
    def attention_map(
        out: Tensor,
        q: Tensor,
        k: Tensor,
        softmax_lse: Tensor | None,
        q_descale: Tensor | None,
        k_descale: Tensor | None,
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
        result = reference.attention_map(
            q,
            k,
            rows=slice(row_start, row_stop),
            columns=slice(column_start, column_stop),
            softmax_lse=softmax_lse,
            q_descale=q_descale,
            k_descale=k_descale,
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
        _store(out, result, accumulate)

    @staticmethod
    @_plain
    def token_confidence(
        token_ids: Tensor,
        confidence: Tensor,
        logits: Tensor,
        seeds: Tensor | None,
        metric: str,
        temperature: float,
        seed: int,
        exclude_token_id: int,
        vocab_start: int,
    ) -> None:
        ids, value = reference.token_confidence(
            logits,
            metric=metric,
            temperature=temperature,
            seed=seed if seeds is None else seeds,
            exclude_token_id=None if exclude_token_id < 0 else exclude_token_id,
            vocab_start=vocab_start,
        )
        token_ids.copy_(ids)
        confidence.copy_(value)

    @staticmethod
    @_plain
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
            reference.select_tokens(scores, confidence, masked, policy=policy, tau=tau, fallback=fallback)
        )

    @staticmethod
    @_plain
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
        q_descale: list[Tensor],
        k_descale: list[Tensor],
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
        softmax_scale: float,
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
        none: list[Any] = [None] * len(q)
        fields = (q, k, softmax_lse or none, q_descale or none, k_descale or none)
        layers = list(zip(*fields, strict=True))
        result = reference.decode_step(
            tokens,
            logits,
            layers or scores,
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
        token_ids.copy_(result.token_ids)
        confidence.copy_(result.confidence)
        selected.copy_(result.selected)
        if layers:
            scores.copy_(result.scores)


def is_direct(backend: str, tensor: Any) -> bool:
    """Whether a call may go straight to the extension: that is the backend for this plain tensor, and nothing
    is at work that has to see a torch operator."""
    return (
        not torch.compiler.is_compiling()
        and _core.READS_TENSORS
        and is_plain(tensor)
        and names_extension(backend, tensor)
        and not torch._C._len_torch_dispatch_stack()
        and (not torch._C._len_torch_function_stack() or _modes_only_choose_devices())
        and not torch._C._autograd._profiler_enabled()
        and torch._C._get_tracing_state() is None
    )


def is_plain(tensor: Any) -> bool:
    """Whether it is a dense tensor of no subclass."""
    return type(tensor) is Tensor and checks.is_dense(tensor)


def _modes_only_choose_devices() -> bool:
    """Whether every mode is that of torch.set_default_device, which is about new tensors alone."""
    count = torch._C._len_torch_function_stack()
    return all(type(torch._C._get_function_stack_at(i)) is DeviceContext for i in range(count))


def implementation(backend: str) -> Any:
    """The module or class whose functions write a backend's results into tensors they are given."""
    if backend == "triton":
        return importlib.import_module(TRITON_MODULE)
    return _Reference if backend == "reference" else _core


def _chosen(op: str, backend: str, *tensors: Tensor) -> Any:
    return getattr(implementation(choose_backend(op, backend, *tensors)), op)


def _column_scores(out: Tensor, q: Tensor, k: Tensor, *arguments: Any) -> None:
    *rest, backend = arguments
    _chosen("column_scores", backend, q, k)(out, q, k, *rest)


def _attention_map(out: Tensor, q: Tensor, k: Tensor, *arguments: Any) -> None:
    *rest, backend = arguments
    _chosen("attention_map", backend, q, k)(out, q, k, *rest)


def _token_confidence(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *rest, backend = arguments
    outputs = token_confidence_outputs(logits)
    _chosen("token_confidence", backend, logits)(*outputs, logits, *rest)
    return outputs


def token_confidence_outputs(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """token_ids and confidence."""
    confidence = logits.new_empty(*logits.shape[:2], dtype=torch.float32)
    return torch.empty_like(confidence, dtype=torch.int64), confidence


def _select_tokens(scores: Tensor, confidence: Tensor, masked: Tensor, *arguments: Any) -> Tensor:
    *rest, backend = arguments
    selected = select_tokens_output(scores, confidence, masked)
    _chosen("select_tokens", backend, scores, confidence)(selected, scores, confidence, masked, *rest)
    return selected


def select_tokens_output(scores: Tensor, confidence: Tensor, masked: Tensor, *_: Any) -> Tensor:
    """selected."""
    return masked.new_empty(masked.shape)


def _decode_step(
    tokens: Tensor, scores: Tensor, logits: Tensor, q: list[Tensor], k: list[Tensor], *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *rest, backend = arguments
    outputs = decode_step_outputs(tokens, scores)
    _chosen("decode_step", backend, logits, *q, *k)(tokens, scores, *outputs, logits, q, k, *rest)
    return outputs


def decode_step_outputs(tokens: Tensor, scores: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """token_ids, confidence and selected."""
    new = functools.partial(torch.empty_like, scores, memory_format=torch.contiguous_format)
    return new(dtype=torch.int64), new(), new(dtype=torch.bool)


for _name, _run, _fake in (
    ("column_scores", _column_scores, lambda *_: None),
    ("attention_map", _attention_map, lambda *_: None),
    ("token_confidence", _token_confidence, token_confidence_outputs),
    ("select_tokens", _select_tokens, select_tokens_output),
    ("decode_step", _decode_step, decode_step_outputs),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"attn_sampler::{_name}", _fake, lib=_LIBRARY)
