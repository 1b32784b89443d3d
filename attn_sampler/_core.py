"""The compiled extension ``attn_sampler._C`` behind the signatures of a backend.

The extension knows nothing of torch: it is handed addresses, shapes and strides, and on CUDA the stream and a
workspace. Everything here is called with validated tensors by ``attn_sampler.ops``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    torch.float8_e4m3fn: 5,
}
_LSE_BASE = {"e": 0, "2": 1}
_SCOPE = {"sequence": 0, "block": 1}
_REDUCTION = {"sum": 0, "mean": 1, "max": 2}
_METRIC = {"probability": 0, "margin": 1, "entropy": 2}
_POLICY = {"sequential": 0, "parallel": 1}
_FALLBACK = {"confidence": 0, "score": 1}

_MAX_HEADDIM = 512  # of the CUDA kernels: a tile of keys has to fit the shared memory


def cpu_unavailable() -> str | None:
    """Why the extension's CPU kernels cannot run here; None where they can."""
    return _C.cpu_unavailable() if UNAVAILABLE is None else UNAVAILABLE


def cuda_unavailable() -> str | None:
    """Why the extension's CUDA kernels cannot run here; None where they can."""
    return _C.cuda_unavailable() if UNAVAILABLE is None else UNAVAILABLE


def cuda_problem(op: str, tensors: tuple[Tensor, ...]) -> str | None:
    """Why the CUDA kernels do not serve ``op`` on these tensors; None where they do."""
    attention = {"column_scores": tensors, "attention_map": tensors, "decode_step": tensors[1:]}.get(op, ())
    if any(x.shape[-1] > _MAX_HEADDIM for x in attention):
        return f"its kernels take head dimensions up to {_MAX_HEADDIM}"
    return None


def cpu_isa() -> str:
    """The instruction set that the CPU kernels run with here."""
    return _C.cpu_isa()


#: Zero-filled device memory for what the kernels pass on to one another, by device and stream.
_workspaces: dict[tuple[int, int], Tensor] = {}


def _run(function: Callable[..., int], like: Tensor, *arguments: Any) -> None:
    """Run a function of the extension on the device of ``like``, on CUDA on torch's current stream."""
    if like.device.type == "cpu":
        function(*arguments, (0, torch.get_num_threads(), 0, 0, 0, 0))
        return
    index = like.device.index
    stream = torch.cuda.current_stream(index).cuda_stream
    # A captured graph outlives this call and may be replayed beside others: it has memory of its own.
    capturing = torch.cuda.is_current_stream_capturing()
    workspace = None if capturing else _workspaces.get((index, stream))
    address, size = (0, 0) if workspace is None else (workspace.data_ptr(), workspace.numel())
    while needed := function(*arguments, (1, 1, index, stream, address, size)):
        workspace = torch.zeros(needed, dtype=torch.uint8, device=like.device)
        if not capturing:
            _workspaces[index, stream] = workspace
        address, size = workspace.data_ptr(), needed


def _view(x: Tensor | None) -> tuple | None:
    """What the extension reads a tensor from."""
    return None if x is None else (x.data_ptr(), _DTYPE[x.dtype], x.shape, x.stride())


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
    _run(
        _C.column_scores,
        q,
        _view(out),
        _view(q),
        _view(k),
        _view(softmax_lse),
        _view(q_descale),
        _view(k_descale),
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
    )


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
    _run(
        _C.attention_map,
        q,
        _view(out),
        _view(q),
        _view(k),
        _view(softmax_lse),
        _view(q_descale),
        _view(k_descale),
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
    _run(
        _C.token_confidence,
        logits,
        _view(token_ids),
        _view(confidence),
        _view(logits),
        _view(seeds),
        _METRIC[metric],
        temperature,
        seed,
        exclude_token_id,
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
    _run(
        _C.select_tokens,
        scores,
        _view(selected),
        _view(scores),
        _view(confidence),
        _view(masked),
        _POLICY[policy],
        tau,
        _FALLBACK[fallback],
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
    _run(
        _C.decode_step,
        logits,
        _view(tokens),
        _view(scores),
        _view(token_ids),
        _view(confidence),
        _view(selected),
        _view(logits),
        [_view(x) for x in q],
        [_view(x) for x in k],
        [_view(x) for x in softmax_lse],
        [_view(x) for x in q_descale],
        [_view(x) for x in k_descale],
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
    )
