"""The five functions of attention-guided decoding.

They validate, document and dispatch; the arithmetic is specified in ``attn_sampler.reference`` and
done by a backend. One decoding step flows as *q, k, lse -> column scores -> token confidence -> dynamic
threshold -> commit*; ``decode_step`` is all of it in one call.

A call first tries the direct way, which takes microseconds: the compiled extension checks the arguments
itself and refuses what is out of the ordinary. That goes the long way, which says what is wrong with it or
calls the torch operator, for the other backends and for whatever listens to operators.

All functions work on the tensors' device without synchronising with the host, and under
``torch.compile(fullgraph=True)``. Gradients do not flow through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attn_sampler import _core, checks, ops
from attn_sampler.backends import BACKENDS
from attn_sampler.reference import StepResult

BACKEND_CHOICES = ("auto", *BACKENDS)
_OPS = torch.ops.attn_sampler

ROWS = ("all", "masked")
REDUCTIONS = ("sum", "mean", "max")
_INT64_MIN, _UINT64_END = -(1 << 63), 1 << 64
_MAX_VOCAB = 1 << 34  # the sampling stream counts groups of 4 tokens in 32 bits
_MAX_POSITION = 1 << 62  # far enough from the end of int64 for sums of positions


def column_scores(
    q: Tensor,  # [B, Hq, M, D]
    k: Tensor,  # [B, Hkv, N, D]
    *,
    columns: slice | None = None,
    softmax_lse: Tensor | None = None,  # [B, Hq, M]
    lse_base: str = "e",
    q_descale: Tensor | None = None,  # [B, Hkv]
    k_descale: Tensor | None = None,  # [B, Hkv]
    softmax_scale: float | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,  # [B, N]
    query_mask: Tensor | None = None,  # [B, M]
    query_start: int | None = None,
    softmax_scope: str = "sequence",
    diagonal: bool = True,
    reduction: str = "sum",
    per_head: bool = False,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention that each key position receives: the column sums of the attention matrix.

    ``scores[b, c] = sum over heads h and query rows i of A[b, h, i, columns.start + c]`` with
    ``A = softmax(softmax_scale * q @ k^T)`` (arXiv 2604.08564, the score that Attn-Sampler ranks by). With
    ``softmax_lse`` from the forward attention only the keys of ``columns`` are read, whatever N.

    Parameters
    ----------
    q, k
        Post-RoPE queries ``[B, Hq, M, D]`` and keys ``[B, Hkv, N, D]``; float32, float16, bfloat16 or
        float8_e4m3fn (float64: reference only), one dtype and device. Hq is a multiple of Hkv: query head h
        reads key head ``h // (Hq // Hkv)``. Strided views are read as they are.
    columns
        Slice of key positions, C of them. Default: all N.
    softmax_lse
        Row log-sum-exp ``[B, Hq, M]``, float32, of the scaled (and masked) logits. Default: computed.
    lse_base
        ``"e"``, or ``"2"`` where softmax_lse is a base-2 logarithm (FlashInfer).
    q_descale, k_descale
        Scales of float8 queries and keys, float32 ``[B, Hkv]`` of any strides (one scale for all:
        ``scale.expand(B, Hkv)``): the real queries of head h are ``q * q_descale[:, h // (Hq // Hkv)]``, the
        real keys of key head h ``k * k_descale[:, h]``. Finite; not read on the host. Default: 1.
    softmax_scale
        Default ``D ** -0.5``.
    causal
        Row i sees keys up to its own position, ``query_start + i``.
    key_mask, query_mask
        Boolean ``[B, N]`` and ``[B, M]``; True takes part. Masked keys and rows contribute exactly 0,
        whatever they hold, NaN included.
    query_start
        Key position of query row 0. Default ``N - M``: the queries are the last M positions.
    softmax_scope
        ``"sequence"``: softmax over all visible keys. ``"block"``: the paper's block approximation, rows
        and keys both of ``columns`` only (softmax_lse is then not accepted).
    diagonal
        False drops the attention of a position to itself, after the softmax.
    reduction
        Over rows: ``"sum"``, ``"mean"`` over the rows that may see the column (0 if none), or ``"max"``.
    per_head
        True keeps the heads apart; else they are added up.
    out
        Float32 result to add into, so that layers add up in one buffer. Default: a new tensor.
    backend
        ``"auto"`` or a name of ``attn_sampler.backends.BACKENDS``, which runs or raises.

    Returns
    -------
    Tensor
        float32 ``[B, C]``, or ``[B, Hq, C]`` per head; ``out`` itself if given. A row that sees nothing
        (or whose lse is -inf) contributes 0. NaN in a visible entry makes its columns NaN.

    Raises
    ------
    TypeError, ValueError
        Naming the argument. Nothing has been written then.
    BackendUnavailableError
        The backend asked for cannot run this problem.
    """
    if _is_direct(backend, q, k, out):
        lo, hi = checks.span("columns", columns, k.shape[2], "key positions (N)")
        result = _new_output(q, per_head, hi - lo) if out is None else out
        tensors = (result, q, k, softmax_lse, q_descale, k_descale, key_mask, query_mask)
        options = (lse_base, softmax_scale, causal, query_start, softmax_scope, diagonal, reduction, per_head)
        if _core.attempt("column_scores", q, (*tensors, columns, *options, out is not None)):
            return result
    _check_options(lse_base, softmax_scale, causal, query_start, softmax_scope, diagonal, backend)
    checks.flag("per_head", per_head)
    _check_layer("", q, k, softmax_lse, q_descale, k_descale, softmax_scope)
    _check_masks(q, k, key_mask, query_mask)
    (batch, heads, n_rows, headdim), n_keys = q.shape, k.shape[2]
    lo, hi = checks.span("columns", columns, n_keys, "key positions (N)")
    checks.choice("reduction", reduction, REDUCTIONS)
    if per_head:
        result = _output(out, q, "[B, Hq, C]", (batch, heads, hi - lo))
    else:
        result = _output(out, q, "[B, C]", (batch, hi - lo))
    _OPS.column_scores(
        result,
        q,
        k,
        softmax_lse,
        q_descale,
        k_descale,
        key_mask,
        query_mask,
        lo,
        hi,
        n_keys - n_rows if query_start is None else query_start,
        headdim**-0.5 if softmax_scale is None else float(softmax_scale),
        lse_base,
        causal,
        softmax_scope,
        diagonal,
        reduction,
        per_head,
        out is not None,
        backend,
    )
    return result


def attention_map(
    q: Tensor,  # [B, Hq, M, D]
    k: Tensor,  # [B, Hkv, N, D]
    *,
    rows: slice | None = None,
    columns: slice | None = None,
    softmax_lse: Tensor | None = None,  # [B, Hq, M]
    lse_base: str = "e",
    q_descale: Tensor | None = None,  # [B, Hkv]
    k_descale: Tensor | None = None,  # [B, Hkv]
    softmax_scale: float | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,  # [B, N]
    query_mask: Tensor | None = None,  # [B, M]
    query_start: int | None = None,
    softmax_scope: str = "sequence",
    diagonal: bool = True,
    per_head: bool = False,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention among a slice of query rows and a slice of key positions, added up over heads.

    The matrix whose sums over all rows are ``column_scores``; what the dependency-aware samplers (DAWN, DAPD,
    CLAD, ADAS) build their graphs from.

    Parameters
    ----------
    rows
        Slice of the M query rows, R of them. Default: all. Row r of the map stands at key position
        ``query_start + rows.start + r``.
    columns, softmax_lse, ..., backend
        As in ``column_scores``.

    Returns
    -------
    Tensor
        float32 ``[B, R, C]``, or ``[B, Hq, R, C]`` per head; ``out`` itself if given.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As ``column_scores``.
    """
    if _is_direct(backend, q, k, out):
        lo, hi = checks.span("columns", columns, k.shape[2], "key positions (N)")
        first, last = checks.span("rows", rows, q.shape[2], "query rows (M)")
        result = _new_output(q, per_head, last - first, hi - lo) if out is None else out
        tensors = (result, q, k, softmax_lse, q_descale, k_descale, key_mask, query_mask)
        options = (lse_base, softmax_scale, causal, query_start, softmax_scope, diagonal, per_head)
        if _core.attempt("attention_map", q, (*tensors, rows, columns, *options, out is not None)):
            return result
    _check_options(lse_base, softmax_scale, causal, query_start, softmax_scope, diagonal, backend)
    checks.flag("per_head", per_head)
    _check_layer("", q, k, softmax_lse, q_descale, k_descale, softmax_scope)
    _check_masks(q, k, key_mask, query_mask)
    (batch, heads, n_rows, headdim), n_keys = q.shape, k.shape[2]
    lo, hi = checks.span("columns", columns, n_keys, "key positions (N)")
    first, last = checks.span("rows", rows, n_rows, "query rows (M)")
    if per_head:
        result = _output(out, q, "[B, Hq, R, C]", (batch, heads, last - first, hi - lo))
    else:
        result = _output(out, q, "[B, R, C]", (batch, last - first, hi - lo))
    _OPS.attention_map(
        result,
        q,
        k,
        softmax_lse,
        q_descale,
        k_descale,
        key_mask,
        query_mask,
        first,
        last,
        lo,
        hi,
        n_keys - n_rows if query_start is None else query_start,
        headdim**-0.5 if softmax_scale is None else float(softmax_scale),
        lse_base,
        causal,
        softmax_scope,
        diagonal,
        per_head,
        out is not None,
        backend,
    )
    return result


def token_confidence(
    logits: Tensor,  # [B, C, V]
    *,
    metric: str = "probability",
    temperature: float = 0.0,
    seed: int | Tensor | None = None,
    exclude_token_id: int | None = None,
    vocab_start: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The predicted token of each position and how sure the model is of it.

    Parameters
    ----------
    logits
        ``[B, C, V]``, float32, float16 or bfloat16 (float64: reference only). Read once; never copied.
    metric
        ``"probability"`` of the token; ``"margin"`` of its probability over the most probable other token's
        (negative where a sampled token is not the top one); ``"entropy"``, negated, in nats. All of
        ``softmax(logits)``, without the temperature.
    temperature
        0 takes the most probable token (the lowest on ties); above 0 samples from
        ``softmax(logits / temperature)`` with Philox-Gumbel noise.
    seed
        Needed where temperature > 0. An integer: every row of the batch draws from that one stream, so
        that splitting a batch changes nothing (and equal rows draw equal tokens). An int64 tensor ``[B]``: a
        stream for each row. The noise depends on (seed, position in C, token) alone and is the same
        to the last bit on every backend.
    exclude_token_id
        A token treated as absent from the vocabulary (such as the mask token).
    vocab_start
        Where ``logits`` are a part of the vocabulary, the place of the first one in the whole: at least 0,
        and ``vocab_start + V`` at most 2^34. It moves the noise and nothing else: token t draws that of token
        ``vocab_start + t``. ``token_ids`` and ``exclude_token_id`` are counted in ``logits``.
    backend
        As in ``column_scores``.

    Returns
    -------
    token_ids, confidence
        int64 and float32, both ``[B, C]``. NaN logits are never chosen; a row whose softmax is
        undefined (a NaN or +inf, or all -inf) has confidence NaN.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As ``column_scores``.
    """
    if ops.is_direct(backend, logits) and logits.dim() == 3:
        outputs = ops.token_confidence_outputs(logits)
        options = (metric, temperature, seed, exclude_token_id, vocab_start)
        if _core.attempt("token_confidence", logits, (*outputs, logits, *options)):
            return outputs
    checks.choice("backend", backend, BACKEND_CHOICES)
    checks.tensor("logits", logits, "[B, C, V]", checks.FLOAT_DTYPES)
    vocab = logits.shape[2]
    if vocab < 1:
        raise ValueError("logits: expected at least one token in the vocabulary, got V = 0")
    seed, seeds, temperature = check_sampling(logits, metric, temperature, seed)
    if exclude_token_id is not None:
        checks.integer("exclude_token_id", exclude_token_id, 0, vocab)
        if vocab == 1:
            raise ValueError("exclude_token_id: the vocabulary's only token cannot be excluded")
    checks.integer("vocab_start", vocab_start, 0, _MAX_VOCAB - vocab + 1)
    return _OPS.token_confidence(
        logits,
        seeds,
        metric,
        temperature,
        seed,
        -1 if exclude_token_id is None else exclude_token_id,
        vocab_start,
        backend,
    )


def select_tokens(
    scores: Tensor,  # [B, C]
    confidence: Tensor,  # [B, C]
    masked: Tensor,  # [B, C]
    *,
    policy: str = "parallel",
    tau: float = 0.9,
    fallback: str = "confidence",
    backend: str = "auto",
) -> Tensor:
    """Which masked positions to commit in this step.

    ``"parallel"`` (arXiv 2604.08564, dynamic attention threshold): of the masked positions, ``high`` are
    those with ``confidence >= tau`` and ``low`` the others; with ``theta`` the largest score in ``low`` (-inf
    if there is none), commit the ``high`` positions with ``score > theta``. Where none passes, exactly one
    is committed, so that every step makes progress. ``"sequential"``: the one masked position of the
    largest score.

    Parameters
    ----------
    scores, confidence
        float32 ``[B, C]`` (float64: reference only). The comparison with tau is made in float32.
    masked
        bool ``[B, C]``: the positions still to fill.
    policy
        ``"parallel"`` or ``"sequential"``.
    tau
        Confidence threshold in [0, 1]; not read by ``"sequential"``.
    fallback
        What the single position of a parallel step without a passing one maximises:
        ``"confidence"`` or ``"score"``.
    backend
        As in ``column_scores``.

    Returns
    -------
    Tensor
        bool ``[B, C]``. Ties go to the lowest position. A NaN score is never selected and ranks below all
        others; a NaN confidence is not confident and counts as -inf in the fallback. A row with no
        masked position (or only NaN scores) commits nothing.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As ``column_scores``.
    """
    if ops.is_direct(backend, masked):
        selected = ops.select_tokens_output(scores, confidence, masked)
        tensors = (selected, scores, confidence, masked)
        if _core.attempt("select_tokens", masked, (*tensors, policy, tau, fallback)):
            return selected
    checks.choice("backend", backend, BACKEND_CHOICES)
    tau = check_selection(policy, tau, fallback)
    dtypes = (torch.float32, torch.float64)
    checks.tensor("scores", scores, "[B, C]", dtypes)
    checks.tensor("confidence", confidence, "[B, C]", dtypes, like=scores)
    checks.shape("confidence", confidence, "[B, C]", scores.shape)
    if confidence.dtype != scores.dtype:
        raise ValueError(f"confidence: expected the dtype of scores, {scores.dtype}, got {confidence.dtype}")
    checks.tensor("masked", masked, "[B, C]", (torch.bool,), like=scores)
    checks.shape("masked", masked, "[B, C]", scores.shape)
    return _OPS.select_tokens(scores, confidence, masked, policy, tau, fallback, backend)


def decode_step(
    tokens: Tensor,  # [B, T]
    logits: Tensor,  # [B, C, V]
    layers: Tensor | Sequence[Sequence[Tensor | None]],
    *,
    block: slice,
    mask_token_id: int,
    policy: str = "parallel",
    tau: float = 0.9,
    fallback: str = "confidence",
    metric: str = "probability",
    temperature: float = 0.0,
    seed: int | Tensor | None = None,
    rows: str = "all",
    columns: slice | None = None,
    lse_base: str = "e",
    softmax_scale: float | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,  # [B, N]
    query_mask: Tensor | None = None,  # [B, M]
    query_start: int | None = None,
    softmax_scope: str = "sequence",
    diagonal: bool = True,
    reduction: str = "sum",
    backend: str = "auto",
) -> StepResult:
    """One step of attention-guided decoding, from the forward pass's tensors to committed tokens.

    Scores the block's columns over all layers, predicts a token for each position, selects the masked
    positions to commit and writes their tokens into ``tokens``.

    Parameters
    ----------
    tokens
        int64 ``[B, T]``; **updated in place**.
    logits
        ``[B, C, V]``: the predictions for the C positions of the block, already shifted for models
        that predict position j from row j - 1. The mask token is never predicted.
    layers
        A sequence of ``(q, k, softmax_lse)`` or, in float8, ``(q, k, softmax_lse, q_descale, k_descale)``,
        one for each layer that counts, in the shapes of ``column_scores``; or an accumulated score buffer,
        float32 ``[B, C]``, which is read as it is: what follows from ``rows`` to ``reduction`` then changes
        nothing. The layers share B, M, N, D and dtype; softmax_lse and the descales are each given for all
        of them or (None, or left out) for none.
    block
        Slice of the T token positions, C of them.
    mask_token_id
        The id of ``[MASK]``, inside the vocabulary.
    policy, tau, fallback
        As in ``select_tokens``.
    metric, temperature, seed
        As in ``token_confidence``.
    rows
        Which query rows count: ``"all"``, or ``"masked"`` (those at a position that is still masked).
    columns
        The block's key positions in ``k``. Default: the same as ``block``. They differ where the keys given
        are not aligned with ``tokens`` (a slice of them, a packed cache).
    lse_base, softmax_scale, causal, key_mask, query_mask, query_start, softmax_scope, diagonal, reduction
        As in ``column_scores``; heads and layers are added up.
    backend
        As in ``column_scores``.

    Returns
    -------
    StepResult
        ``(tokens, token_ids, confidence, scores, selected)``.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As ``column_scores``. ``tokens`` is untouched then.
    """
    if ops.is_direct(backend, tokens) and ops.is_plain(logits) and logits.dim() == 3:
        scores = logits.new_empty(logits.size(0), logits.size(1), dtype=torch.float32)
        outputs = token_ids, confidence, selected = ops.decode_step_outputs(tokens, scores)
        masks: tuple[Tensor | None, ...] = (key_mask, query_mask)
        if isinstance(layers, Tensor):
            scores, masks = layers, (None, None)  # the scores are made: there is nothing left to mask
        tensors = (tokens, scores, *outputs, logits, layers, *masks)
        choosing = (block, mask_token_id, policy, tau, fallback, metric, temperature, seed, rows, columns)
        options = (lse_base, softmax_scale, causal, query_start, softmax_scope, diagonal, reduction)
        arguments = (*tensors, *choosing, *options)
        if not scores.requires_grad and _core.attempt("decode_step", tokens, arguments):
            return StepResult(tokens, token_ids, confidence, scores, selected)
    _check_options(lse_base, softmax_scale, causal, query_start, softmax_scope, diagonal, backend)
    checks.choice("rows", rows, ROWS)
    checks.choice("reduction", reduction, REDUCTIONS)
    tau = check_selection(policy, tau, fallback)
    checks.tensor("tokens", tokens, "[B, T]", (torch.int64,))
    checks.writable("tokens", tokens)
    lo, hi = checks.span("block", block, tokens.shape[1], "token positions (T)")
    checks.tensor("logits", logits, "[B, C, V]", checks.FLOAT_DTYPES, like=tokens)
    batch, count = tokens.shape[0], hi - lo
    checks.shape("logits", logits, "[B, C, V]", (batch, count, logits.shape[2]))
    checks.integer("mask_token_id", mask_token_id, 0, logits.shape[2])
    if logits.shape[2] == 1:
        raise ValueError("logits: expected a vocabulary with more than the mask token, got V = 1")
    seed, seeds, temperature = check_sampling(logits, metric, temperature, seed)

    fields: tuple[list[Tensor], ...] = ([], [], [], [], [])  # of the layers, as the operator takes them
    column_start, column_stop, start, headdim = lo, hi, 0, 1
    if isinstance(layers, Tensor):
        scores = _output(layers, tokens, "[B, C]", (batch, count), name="layers")
        key_mask = query_mask = None  # the scores are made: there is nothing left to mask
    else:
        q, k, *_ = fields = check_layers(layers, tokens, softmax_scope)
        _check_masks(q[0], k[0], key_mask, query_mask)
        headdim = q[0].shape[3]
        column_start, column_stop, start, _ = place_block(
            q[0], k[0], tokens, lo, hi, rows=rows, columns=columns, query_start=query_start
        )
        scores = _output(None, tokens, "[B, C]", (batch, count))
    token_ids, confidence, selected = _OPS.decode_step(
        tokens,
        scores,
        logits,
        *fields,
        key_mask,
        query_mask,
        seeds,
        lo,
        hi,
        mask_token_id,
        rows == "masked",
        column_start,
        column_stop,
        start,
        headdim**-0.5 if softmax_scale is None else float(softmax_scale),
        lse_base,
        causal,
        softmax_scope,
        diagonal,
        reduction,
        metric,
        temperature,
        seed,
        policy,
        tau,
        fallback,
        backend,
    )
    return StepResult(tokens, token_ids, confidence, scores, selected)


def _is_direct(backend: str, q: Any, k: Any, out: Any) -> bool:
    """Whether an attention function may go the direct way."""
    return (
        ops.is_direct(backend, q)
        and ops.is_plain(k)
        and q.dim() == k.dim() == 4
        and (out is None or (type(out) is Tensor and not out.requires_grad))
    )


def _new_output(q: Tensor, per_head: bool, *sizes: int) -> Tensor:
    """float32 [B, *sizes] or, per head, [B, Hq, *sizes]."""
    # What per_head has to be is for the extension to ask: anything may be given.
    return q.new_empty(*q.shape[: 2 if per_head is True else 1], *sizes, dtype=torch.float32)


def _output(
    out: Tensor | None, like: Tensor, axes: str, shape: tuple[int, ...], *, name: str = "out"
) -> Tensor:
    """A float32 tensor of this shape, on the device of ``like``: the one given, or a new one."""
    if out is None:
        return like.new_empty(shape, dtype=torch.float32)
    checks.tensor(name, out, axes, (torch.float32,), like=like)
    checks.shape(name, out, axes, shape)
    checks.writable(name, out)
    return out


def _check_options(
    lse_base: str,
    softmax_scale: float | None,
    causal: bool,
    query_start: int | None,
    softmax_scope: str,
    diagonal: bool,
    backend: str,
) -> None:
    checks.choice("backend", backend, BACKEND_CHOICES)
    checks.choice("lse_base", lse_base, ("e", "2"))
    checks.choice("softmax_scope", softmax_scope, ("sequence", "block"))
    checks.flag("causal", causal)
    checks.flag("diagonal", diagonal)
    if softmax_scale is not None:
        checks.finite("softmax_scale", softmax_scale)
    if query_start is not None:
        checks.integer("query_start", query_start, -_MAX_POSITION, _MAX_POSITION)


def _check_layer(
    prefix: str,
    q: Tensor,
    k: Tensor,
    softmax_lse: Tensor | None,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    softmax_scope: str,
    *,
    dtypes: Sequence[torch.dtype] = checks.ATTENTION_DTYPES,
    like: Tensor | None = None,
) -> None:
    """q, k and what belongs to them are valid and fit together."""
    checks.tensor(f"{prefix}q", q, "[B, Hq, M, D]", dtypes, like=like)
    checks.tensor(f"{prefix}k", k, "[B, Hkv, N, D]", (q.dtype,), like=q)
    batch, heads, n_rows, headdim = q.shape
    kv_heads, n_keys = k.shape[1:3]
    if headdim < 1:
        raise ValueError(f"{prefix}q: expected a head dimension D >= 1, got shape {list(q.shape)}")
    if kv_heads < 1 or heads < 1 or heads % kv_heads != 0:
        raise ValueError(
            f"{prefix}k: expected a number of heads that divides the {heads} heads of q, got {kv_heads}"
        )
    checks.shape(f"{prefix}k", k, "[B, Hkv, N, D]", (batch, kv_heads, n_keys, headdim))
    if softmax_lse is not None:
        if softmax_scope == "block":
            raise ValueError(
                f"{prefix}softmax_lse: not accepted with softmax_scope='block', whose softmax is over the "
                "block's keys alone"
            )
        dtypes = (torch.float32, torch.float64) if q.dtype == torch.float64 else (torch.float32,)
        checks.optional(f"{prefix}softmax_lse", softmax_lse, "[B, Hq, M]", (batch, heads, n_rows), dtypes, q)
    for name, descale in (("q_descale", q_descale), ("k_descale", k_descale)):
        if descale is not None and q.dtype != checks.FLOAT8:
            raise ValueError(
                f"{prefix}{name}: accepted with q and k of float8_e4m3fn only, these are {q.dtype}"
            )
        checks.optional(f"{prefix}{name}", descale, "[B, Hkv]", (batch, kv_heads), (torch.float32,), q)


def _check_masks(q: Tensor, k: Tensor, key_mask: Tensor | None, query_mask: Tensor | None) -> None:
    checks.optional("key_mask", key_mask, "[B, N]", (q.shape[0], k.shape[2]), (torch.bool,), q)
    checks.optional("query_mask", query_mask, "[B, M]", (q.shape[0], q.shape[2]), (torch.bool,), q)


def check_layers(
    layers: Sequence[Sequence[Tensor | None]], tokens: Tensor, softmax_scope: str
) -> tuple[list[Tensor], ...]:
    """The layers' q, k and (each for all of them, or for none) softmax_lse, q_descale and k_descale.

    They are of one batch, M, N, D and dtype.
    """
    if not isinstance(layers, (list, tuple)) or not layers:
        raise TypeError(
            "layers: expected a score buffer [B, C] or a non-empty sequence of (q, k, softmax_lse), "
            f"got {'an empty one' if isinstance(layers, (list, tuple)) else type(layers).__name__}"
        )
    first: Sequence[Any] = ()
    for index, layer in enumerate(layers):
        if not isinstance(layer, (list, tuple)) or len(layer) not in (2, 3, 5):
            raise TypeError(
                f"layers[{index}]: expected (q, k), (q, k, softmax_lse) or "
                "(q, k, softmax_lse, q_descale, k_descale)"
            )
        if len(layer) == len(first) and all(map(_alike, layer, first)):
            continue  # most layers are like the first: a quick way
        first = first or layer
        prefix = f"layers[{index}] "
        q, k, lse, q_descale, k_descale = layer_fields(layer)
        dtypes = checks.ATTENTION_DTYPES if index == 0 else (first[0].dtype,)
        _check_layer(prefix, q, k, lse, q_descale, k_descale, softmax_scope, dtypes=dtypes, like=tokens)
        batch, (n_rows, headdim), n_keys = tokens.shape[0], first[0].shape[2:], first[1].shape[2]
        checks.shape(f"{prefix}q", q, "[B, Hq, M, D]", (batch, q.shape[1], n_rows, headdim))
        checks.shape(f"{prefix}k", k, "[B, Hkv, N, D]", (batch, k.shape[1], n_keys, headdim))
    names = ("q", "k", "softmax_lse", "q_descale", "k_descale")
    fields = []
    for name, values in zip(names, zip(*map(layer_fields, layers), strict=True), strict=True):
        given = [x for x in values if x is not None]
        if given and len(given) != len(layers):
            raise ValueError(
                f"layers: expected {name} for all layers or for none, got {len(given)} of {len(layers)}"
            )
        fields.append(given)
    return tuple(fields)


def place_block(
    q: Tensor,
    k: Tensor,
    tokens: Tensor,
    lo: int,
    hi: int,
    *,
    rows: str,
    columns: slice | None,
    query_start: int | None,
) -> tuple[int, int, int, int]:
    """Where the block of tokens [lo, hi) stands in the layers: its columns' begin and end, the key position
    of query row 0, and the token position of that row.
    """
    n_rows, n_keys = q.shape[2], k.shape[2]
    chosen = slice(lo, hi) if columns is None else columns
    first, last = checks.span("columns", chosen, n_keys, "key positions (N)")
    if last - first != hi - lo:
        raise ValueError(
            f"columns: expected as many key positions as the block has tokens, {hi - lo}, got {last - first}"
        )
    start = n_keys - n_rows if query_start is None else query_start
    row = start - first + lo
    if rows == "masked" and (row < 0 or row + n_rows > tokens.shape[1]):
        raise ValueError(
            f"rows: with 'masked', every query row must stand at one of the {tokens.shape[1]} tokens; "
            f"rows are at {row} to {row + n_rows - 1} (query_start, columns)"
        )
    return first, last, start, row


def layer_fields(layer: Sequence[Any]) -> tuple[Any, ...]:
    """(q, k, softmax_lse, q_descale, k_descale), with None for what is left out."""
    return (*layer, None, None, None)[:5]


def _alike(x: object, y: Tensor | None) -> bool:
    """Whether x is dense and has the shape, dtype and device of y, or both are None."""
    if x is None or y is None:
        return x is y
    if not isinstance(x, Tensor) or not checks.is_dense(x):
        return False
    return x.shape == y.shape and x.dtype == y.dtype and x.device == y.device


def check_sampling(
    logits: Tensor, metric: str, temperature: float, seed: int | Tensor | None
) -> tuple[int, Tensor | None, float]:
    """The seed as a signed 64-bit integer, the per-row seeds, and the temperature."""
    checks.choice("metric", metric, ("probability", "margin", "entropy"))
    temperature = checks.temperature("temperature", temperature)
    if seed is None:
        if temperature > 0.0:
            raise ValueError("seed: needed where temperature > 0 (an integer, or an int64 tensor [B])")
        return 0, None, temperature
    if isinstance(seed, Tensor):
        checks.tensor("seed", seed, "[B]", (torch.int64,), like=logits)
        checks.shape("seed", seed, "[B]", logits.shape[:1])
        return 0, seed, temperature
    checks.integer("seed", seed, _INT64_MIN, _UINT64_END)
    # The stream is keyed by 64 bits; an operator argument is a signed integer.
    return seed - _UINT64_END if seed >= 1 << 63 else seed, None, temperature


def check_selection(policy: str, tau: float, fallback: str) -> float:
    checks.choice("policy", policy, ("parallel", "sequential"))
    checks.choice("fallback", fallback, ("confidence", "score"))
    return checks.unit_interval("tau", tau)
