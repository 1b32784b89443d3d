"""The compiled extension ``attn_sampler._C`` behind the signatures of a backend.

The extension knows nothing of torch: it reads tensors by DLPack's C exchange, or is handed their addresses,
shapes and strides; and on CUDA the stream and a workspace. ``attempt`` leaves all checks to it; the functions
of a backend are called with validated tensors by ``attn_sampler.ops``.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

try:
    import attn_sampler._C as _C
except ImportError as error:
    #: Why the extension cannot be used; None where it can.
    UNAVAILABLE: str | None = (
        f"the compiled extension attn_sampler._C is not installed ({error}); in a clone, pip install -e . "
        "builds it in place"
    )
else:
    UNAVAILABLE = None

#: Whether the extension reads torch's tensors itself. Of an older torch it is handed their fields.
READS_TENSORS = UNAVAILABLE is None and _C.read_tensors_of(Tensor)

# The values of attn_sampler_dtype in csrc/include/attn_sampler.h.
_DTYPE = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.int64: 3,
    torch.bool: 4,
    torch.float8_e4m3fn: 5,
}

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


def _run(function: Callable[..., int], like: Tensor, arguments: tuple) -> None:
    """Run a function of the extension on the device of ``like``, on CUDA on torch's current stream."""
    if like.is_cpu:
        function(*arguments, (0, torch.get_num_threads(), 0, 0, 0, 0))
        return
    index = like.get_device()
    # What torch.cuda.current_stream(index).cuda_stream is, without an object made for it.
    stream = torch._C._cuda_getCurrentRawStream(index)
    # A captured graph outlives this call and may be replayed beside others: it has memory of its own.
    capturing = torch.cuda.is_current_stream_capturing()
    workspace = None if capturing else _workspaces.get((index, stream))
    address, size = (0, 0) if workspace is None else (workspace.data_ptr(), workspace.numel())
    while needed := function(*arguments, (1, 1, index, stream, address, size)):
        workspace = torch.zeros(needed, dtype=torch.uint8, device=like.device)
        if not capturing:
            _workspaces[index, stream] = workspace
        address, size = workspace.data_ptr(), needed


def attempt(op: str, like: Tensor, arguments: tuple) -> bool:
    """Run ``op`` of the extension on unchecked arguments, in its own order; False, and nothing has been
    written, where it does not take them as they are."""
    try:
        _run(getattr(_C, op), like, arguments)
    except _C.Refused:
        return False
    return True


def _view(x: Tensor | None) -> Any:
    """What the extension reads a tensor from."""
    if x is None or (READS_TENSORS and type(x) is Tensor):
        return x
    return _C.TensorView(x.data_ptr(), _DTYPE[x.dtype], x.shape, x.stride())


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
    arguments = (
        *map(_view, (out, q, k, softmax_lse, q_descale, k_descale, key_mask, query_mask)),
        slice(column_start, column_stop),
        lse_base,
        softmax_scale,
        causal,
        query_start,
        softmax_scope,
        diagonal,
        reduction,
        per_head,
        accumulate,
    )
    _run(_C.column_scores, q, arguments)


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
    arguments = (
        *map(_view, (out, q, k, softmax_lse, q_descale, k_descale, key_mask, query_mask)),
        slice(row_start, row_stop),
        slice(column_start, column_stop),
        lse_base,
        softmax_scale,
        causal,
        query_start,
        softmax_scope,
        diagonal,
        per_head,
        accumulate,
    )
    _run(_C.attention_map, q, arguments)


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
    arguments = (
        *map(_view, (token_ids, confidence, logits)),
        metric,
        temperature,
        seed if seeds is None else _view(seeds),
        None if exclude_token_id < 0 else exclude_token_id,
        vocab_start,
    )
    _run(_C.token_confidence, logits, arguments)


def select_tokens(
    selected: Tensor,
    scores: Tensor,
    confidence: Tensor,
    masked: Tensor,
    policy: str,
    tau: float,
    fallback: str,
) -> None:
    tensors = map(_view, (selected, scores, confidence, masked))
    _run(_C.select_tokens, scores, (*tensors, policy, tau, fallback))


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
    # What no layer has, is None in all of them.
    fields = (map(_view, x) if x else repeat(None) for x in (k, softmax_lse, q_descale, k_descale))
    layers = list(zip(map(_view, q), *fields, strict=False))
    scores = _view(scores)
    arguments = (
        _view(tokens),
        scores,
        *map(_view, (token_ids, confidence, selected, logits)),
        layers or scores,
        _view(key_mask),
        _view(query_mask),
        slice(block_start, block_stop),
        mask_token_id,
        policy,
        tau,
        fallback,
        metric,
        temperature,
        seed if seeds is None else _view(seeds),
        "masked" if masked_rows_only else "all",
        slice(column_start, column_stop),
        lse_base,
        softmax_scale,
        causal,
        query_start,
        softmax_scope,
        diagonal,
        reduction,
    )
    _run(_C.decode_step, logits, arguments)
