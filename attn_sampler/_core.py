"""The compiled extension ``attn_sampler._C`` behind the signatures of a backend.

The extension knows nothing of torch: it is handed addresses, shapes and strides. Everything here is called
with validated tensors by ``attn_sampler.ops``.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import attn_sampler._C as _C
except ImportError as error:
    #: Why the extension cannot be used; None where it can.
    UNAVAILABLE: str | None = f"the compiled extension attn_sampler._C is not installed ({error})"
else:
    UNAVAILABLE = None

# The values of the enumerations in csrc/include/attn_sampler.h.
_DTYPE = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.int64: 3,
    torch.bool: 4,
}
_LSE_BASE = {"e": 0, "2": 1}
_SCOPE = {"sequence": 0, "block": 1}
_REDUCTION = {"sum": 0, "mean": 1, "max": 2}
_METRIC = {"probability": 0, "margin": 1, "entropy": 2}
_POLICY = {"sequential": 0, "parallel": 1}
_FALLBACK = {"confidence": 0, "score": 1}


def cuda_unavailable() -> str | None:
    """Why the extension's CUDA kernels cannot run here; None where they can."""
    return _C.cuda_unavailable() if UNAVAILABLE is None else UNAVAILABLE


def cpu_isa() -> str:
    """The instruction set that the CPU kernels run with here."""
    return _C.cpu_isa()


def _view(x: Tensor | None) -> tuple | None:
    """What the extension reads a tensor from."""
    return None if x is None else (x.data_ptr(), _DTYPE[x.dtype], x.shape, x.stride())


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
    _C.column_scores(
        _view(out),
        _view(q),
        _view(k),
        _view(softmax_lse),
        _view(key_mask),
        _view(query_mask),
        column_start,
        column_stop,
        query_start,
        softmax_scale,
        _LSE_BASE[lse_base],
        causal,
        _SCOPE[softmax_scope],
        diagonal,
        _REDUCTION[reduction],
        per_head,
        accumulate,
        torch.get_num_threads(),
    )


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
    _C.attention_map(
        _view(out),
        _view(q),
        _view(k),
        _view(softmax_lse),
        _view(key_mask),
        _view(query_mask),
        row_start,
        row_stop,
        column_start,
        column_stop,
        query_start,
        softmax_scale,
        _LSE_BASE[lse_base],
        causal,
        _SCOPE[softmax_scope],
        diagonal,
        per_head,
        accumulate,
        torch.get_num_threads(),
    )


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
    _C.token_confidence(
        _view(token_ids),
        _view(confidence),
        _view(logits),
        _view(seeds),
        _METRIC[metric],
        temperature,
        seed,
        exclude_token_id,
        torch.get_num_threads(),
    )


def select_tokens(
    selected: Tensor,
    scores: Tensor,
    confidence: Tensor,
    masked: Tensor,
    policy: str,
    tau: float,
    fallback: str,
) -> None:
    _C.select_tokens(
        _view(selected),
        _view(scores),
        _view(confidence),
        _view(masked),
        _POLICY[policy],
        tau,
        _FALLBACK[fallback],
        torch.get_num_threads(),
    )


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
    if softmax_scale is None:  # None also where scores are given, and no layer has a head dimension
        softmax_scale = q[0].shape[-1] ** -0.5 if q else 1.0
    _C.decode_step(
        _view(tokens),
        _view(scores),
        _view(token_ids),
        _view(confidence),
        _view(selected),
        _view(logits),
        [_view(x) for x in q],
        [_view(x) for x in k],
        [_view(x) for x in softmax_lse],
        _view(key_mask),
        _view(query_mask),
        _view(seeds),
        block_start,
        block_stop,
        mask_token_id,
        masked_rows_only,
        column_start,
        column_stop,
        query_start,
        softmax_scale,
        _LSE_BASE[lse_base],
        causal,
        _SCOPE[softmax_scope],
        diagonal,
        _REDUCTION[reduction],
        _METRIC[metric],
        temperature,
        seed,
        _POLICY[policy],
        tau,
        _FALLBACK[fallback],
        torch.get_num_threads(),
    )
