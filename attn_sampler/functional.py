"""The five functions of attention-guided decoding.

They validate, document and dispatch; the arithmetic is specified in ``attn_sampler.reference`` and
done by a backend. One decoding step flows as *q, k, lse -> column scores -> token confidence -> dynamic
threshold -> commit*; ``decode_step`` is all of it in one call.

A call first tries the direct way, which takes microseconds: the compiled extension checks the arguments
itself and refuses what is out of the ordinary. That goes the long way, which says what is wrong with it or
runs it on any backend, by a torch operator where something listens to operators.

All functions work on the tensors' device without synchronising with the host, and under
``torch.compile(fullgraph=True)``. Gradients do not flow through them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attn_sampler import checks, ops, outputs
from attn_sampler.backends import BACKEND_CHOICES
from attn_sampler.options import (
    MAX_ELEMENTS,
    Attention,
    Layer,
    Masks,
    Sampling,
    Selection,
    Step,
    bounds,
    check_layers,
    renamed,
)
from attn_sampler.reference import StepResult


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
    window_size: tuple[int, int] = (-1, -1),
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
        Default ``D ** -0.5``. A dot product of q and k is a float32; what the scale makes of it need not be:
        unless softmax_lse is given, weights are those of the differences, however large the logits.
    causal
        Row i sees keys up to its own position, ``query_start + i``.
    window_size
        ``(left, right)``: row i sees keys from ``query_start + i - left`` up to ``query_start + i + right``,
        without limit at a side of -1. With causal, none after its own, whatever right is. Default: all keys.
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
        Float32 result to add into, so that layers add up in one buffer. It shares no memory with what is
        read, and autograd knows that it is written. Default: a new tensor.
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
        Naming the argument. Nothing has been written then. (A tensor may have up to 2^40 elements.)
    MemoryError
        There is no memory for the result or on the way to it.
    BackendUnavailableError
        The backend asked for cannot run this problem.
    """
    layer, masks = (q, k, softmax_lse, q_descale, k_descale), (key_mask, query_mask)
    how = (softmax_scale, lse_base, causal, softmax_scope, diagonal, reduction, per_head, out is not None)
    options = (bounds(columns), None, query_start, *how, window_size)
    return _attend(ops.column_scores, layer, masks, options, out, backend)


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
    window_size: tuple[int, int] = (-1, -1),
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
    layer, masks = (q, k, softmax_lse, q_descale, k_descale), (key_mask, query_mask)
    how = (softmax_scale, lse_base, causal, softmax_scope, diagonal, "sum", per_head, out is not None)
    options = (bounds(columns), bounds(rows), query_start, *how, window_size)
    return _attend(ops.attention_map, layer, masks, options, out, backend)


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
    given = (metric, temperature, seed, exclude_token_id, vocab_start)
    direct = ops.direct(backend, logits)
    if direct is not None and logits.dim() == 3:
        result = outputs.attempted(outputs.predictions, logits)
        if result is not None and direct.attempt("token_confidence", result, logits, given):
            return result
    checks.choice("backend", backend, BACKEND_CHOICES)
    options = Sampling(*given).checked(logits)
    result = outputs.made(outputs.predictions, logits)
    ops.token_confidence(backend, result, logits, options)
    return result


def select_tokens(
    scores: Tensor,  # [B, C]
    confidence: Tensor,  # [B, C]
    masked: Tensor,  # [B, C]
    *,
    rule: str = "parallel",
    tau: float = 0.9,
    fallback: str = "confidence",
    backend: str = "auto",
    policy: str | None = None,
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
    rule
        ``"parallel"`` or ``"sequential"``. (``policy`` is its former name, taken for one release more.)
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
    if policy is not None:
        rule = renamed("rule", rule, "policy", policy)
    given = (rule, fallback, tau)
    direct = ops.direct(backend, masked)
    if direct is not None:
        selected = outputs.attempted(masked.new_empty, masked.shape)
        if selected is not None and direct.attempt(
            "select_tokens", selected, scores, confidence, masked, given
        ):
            return selected
    checks.choice("backend", backend, BACKEND_CHOICES)
    options = Selection(*given).checked()
    dtypes = (torch.float32, torch.float64)
    checks.tensor("scores", scores, "[B, C]", dtypes)
    checks.size("scores", scores.shape, MAX_ELEMENTS)
    checks.tensor("confidence", confidence, "[B, C]", dtypes, like=scores)
    checks.shape("confidence", confidence, "[B, C]", scores.shape)
    if confidence.dtype != scores.dtype:
        raise ValueError(f"confidence: expected the dtype of scores, {scores.dtype}, got {confidence.dtype}")
    checks.tensor("masked", masked, "[B, C]", (torch.bool,), like=scores)
    checks.shape("masked", masked, "[B, C]", scores.shape)
    selected = outputs.made(masked.new_empty, masked.shape)
    ops.select_tokens(backend, selected, scores, confidence, masked, options)
    return selected


def decode_step(
    tokens: Tensor,  # [B, T]
    logits: Tensor,  # [B, C, V]
    layers: Sequence[Sequence[Tensor | None]] | None = None,
    *,
    scores: Tensor | None = None,  # [B, C]
    block: slice,
    mask_token_id: int,
    rule: str = "parallel",
    tau: float = 0.9,
    fallback: str = "confidence",
    metric: str = "probability",
    temperature: float = 0.0,
    seed: int | Tensor | None = None,
    query_rows: str = "all",
    columns: slice | None = None,
    lse_base: str = "e",
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    key_mask: Tensor | None = None,  # [B, N]
    query_mask: Tensor | None = None,  # [B, M]
    query_start: int | None = None,
    softmax_scope: str = "sequence",
    diagonal: bool = True,
    reduction: str = "sum",
    backend: str = "auto",
    policy: str | None = None,
    rows: str | None = None,
) -> StepResult:
    """One step of attention-guided decoding, from the forward pass's tensors to committed tokens.

    Scores the block's columns over all layers, predicts a token for each position, selects the masked
    positions to commit and writes their tokens into ``tokens``.

    Parameters
    ----------
    tokens
        int64 ``[B, T]``; **updated in place**, as autograd knows. They share no memory with what is read.
    logits
        ``[B, C, V]``: the predictions for the C positions of the block, already shifted for models
        that predict position j from row j - 1. The mask token is never predicted.
    layers
        A sequence of ``(q, k, softmax_lse)`` or, in float8, ``(q, k, softmax_lse, q_descale, k_descale)``,
        one for each layer that counts, in the shapes of ``column_scores``. The layers share B, M, N, D and
        dtype; softmax_lse and the descales are each given for all of them or (None, or left out) for none.
    scores
        Instead of layers, an accumulated score buffer, float32 ``[B, C]``, which is read as it is: what
        follows from ``query_rows`` to ``reduction`` then changes nothing.
    block
        Slice of the T token positions, C of them.
    mask_token_id
        The id of ``[MASK]``, inside the vocabulary.
    rule, tau, fallback
        As in ``select_tokens``.
    metric, temperature, seed
        As in ``token_confidence``.
    query_rows
        Which query rows count: ``"all"``, or ``"masked"`` (those at a position that is still masked).
    columns
        The block's key positions in ``k``. Default: the same as ``block``. They differ where the keys given
        are not aligned with ``tokens`` (a slice of them, a packed cache).
    lse_base, softmax_scale, causal, window_size, key_mask, query_mask, query_start, softmax_scope, diagonal,
    reduction
        As in ``column_scores``; heads and layers are added up.
    backend
        As in ``column_scores``.
    policy, rows
        The former names of rule and query_rows, taken, as scores in the place of layers are, for one release
        more.

    Returns
    -------
    StepResult
        ``(tokens, token_ids, confidence, scores, selected)``.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As ``column_scores``. ``tokens`` is untouched then.
    """
    if isinstance(layers, Tensor):
        warnings.warn("layers: scores are given as scores= now", DeprecationWarning, stacklevel=2)
        layers, scores = None, layers
    if policy is not None:
        rule = renamed("rule", rule, "policy", policy)
    if rows is not None:
        query_rows = renamed("query_rows", query_rows, "rows", rows)
    # Where the scores are made, there is nothing left to mask.
    masks = (key_mask, query_mask) if scores is None else (None, None)
    how = (softmax_scale, lse_base, causal, softmax_scope, diagonal, reduction, False, False)
    attention = (bounds(columns), None, query_start, *how, window_size)
    sampling, selection = (metric, temperature, seed, None, 0), (rule, fallback, tau)
    place = (bounds(block), mask_token_id, query_rows)
    one_given = (layers is None) != (scores is None)
    direct = ops.direct(backend, tokens)
    if direct is not None and ops.is_plain(logits) and logits.dim() == 3 and one_given:
        result = outputs.attempted(outputs.step_result, tokens, logits, scores)
        arguments = (result, logits, layers, masks, (*place, attention, sampling, selection))
        plain = result is not None and not result.scores.requires_grad
        if plain and direct.attempt("decode_step", *arguments):
            ops.count_write(tokens)
            return result
    checks.choice("backend", backend, BACKEND_CHOICES)
    options = Step(*place, Attention(*attention), Sampling(*sampling), Selection(*selection))
    options = options.checked(tokens, logits)
    records: list[Layer] = []
    if not one_given:
        raise TypeError(f"layers, scores: expected one of them, got {'none' if scores is None else 'both'}")
    if scores is not None:
        outputs.check_output("scores", scores, tokens, "[B, C]", logits.shape[:2])
    else:
        records = check_layers(layers, tokens, softmax_scope)  # type: ignore[arg-type]
        Masks(*masks).check(*records[0][:2])
        options = options.placed(Attention(*attention), records[0], tokens)
    result = outputs.made(outputs.step_result, tokens, logits, scores)
    ops.decode_step(backend, result, logits, records, Masks(*masks), options)
    return result


def _attend(
    function: ops.Function, given: tuple, masked: tuple, how: tuple, out: Tensor | None, backend: str
) -> Tensor:
    """column_scores or attention_map of what ``Layer``, ``Masks`` and ``Attention`` hold."""
    q, k, is_map = given[0], given[1], function is ops.attention_map
    direct = ops.direct(backend, q)
    if direct is not None and ops.is_plain(k) and q.dim() == k.dim() == 4:
        if out is None:
            rows = (outputs.count(how[1], q.shape[2]),) if is_map else ()
            result = outputs.attempted(outputs.attended, q, how[9], *rows, outputs.count(how[0], k.shape[2]))
            plain = result is not None
        else:
            result, plain = out, type(out) is Tensor and not out.requires_grad
        if plain and direct.attempt(function.name, result, given, masked, how):
            if out is not None:
                ops.count_write(out)
            return result
    checks.choice("backend", backend, BACKEND_CHOICES)
    layer, masks = Layer(*given), Masks(*masked)
    options = Attention(*how).checked(layer, is_map)
    masks.check(q, k)
    spans: tuple[Any, ...] = (options.rows, options.columns) if is_map else (options.columns,)
    sizes = [x.stop - x.start for x in spans]
    checks.size("out", (*q.shape[: 2 if options.per_head else 1], *sizes), MAX_ELEMENTS)
    result = outputs.made(outputs.attended, q, options.per_head, *sizes)
    if out is not None:
        axes = f"[B{', Hq' if options.per_head else ''}{', R' if is_map else ''}, C]"
        outputs.check_output("out", out, q, axes, result.shape)
        result = out
    function(backend, result, layer, masks, options)
    return result
