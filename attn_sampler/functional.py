"""The functions of attention-guided decoding, with those of ``attention.py``.

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

import math
import warnings
from collections.abc import Sequence

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
from attn_sampler.reference import Prediction, Selected, StepResult


def token_confidence(
    logits: Tensor,  # [B, C, V]
    *,
    metric: str = "probability",
    temperature: float | Tensor = 0.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor | None = None,
    exclude_token_id: int | None = None,
    token_bitmask: Tensor | None = None,  # [B, W] or [B, C, W]
    vocab_start: int = 0,
    current_ids: Tensor | None = None,  # [B, C]
    backend: str = "auto",
) -> Prediction:
    """The token predicted at each position, how sure the model is of it, and how likely the current one is.

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
        ``softmax(logits / temperature)`` with Philox-Gumbel noise. A number, or a float32 tensor ``[B]`` on
        the logits' device with one for each row: no host reads it, and what is no temperature there (below
        2^-120, NaN) takes the most probable token.
    top_k, top_p, min_p
        What may be drawn: the ``top_k`` most probable tokens (0: all); of those, the most probable ones that
        make up ``top_p`` of their mass (in (0, 1]); and, of these, those at least ``min_p`` (in [0, 1]) times
        as probable as the most probable one: the filters of ``transformers``, in its order, at the
        temperature. They are exact and keep or drop ties together: a token is out that k others are above,
        or that p of the mass is above, counted in integers, so that every backend draws the same token.
        Each is a number or a tensor ``[B]``, int32 for top_k and float32 for the others, in which a value
        that is none (0 or less, NaN, a top_p from 1 on) keeps all.
    seed
        Needed where temperature > 0. An integer: every row of the batch draws from that one stream, so
        that splitting a batch changes nothing (and equal rows draw equal tokens). An int64 tensor ``[B]``: a
        stream for each row. The noise depends on (seed, position in C, token) alone and is the same
        to the last bit on every backend.
    exclude_token_id
        A token treated as absent from the vocabulary (such as the mask token).
    token_bitmask
        int32 ``[B, W]`` or ``[B, C, W]``, ``W >= ceil(V / 32)``: the tokens whose bit is 0 are treated as
        absent. Token t has bit ``t % 32`` of word ``t // 32``, as in grammar engines (xgrammar, llguidance).
        Where none is left, everything but the token is NaN.
    vocab_start
        Where ``logits`` are a part of the vocabulary, the place of the first one in the whole: at least 0,
        and ``vocab_start + V`` at most 2^34. It moves the noise and nothing else: token t draws that of token
        ``vocab_start + t``. ``token_ids``, ``current_ids`` and ``exclude_token_id`` are counted in
        ``logits``.
    current_ids
        int64 ``[B, C]``: the tokens that stand at the positions, whose probabilities are wanted too. They
        come from the same pass over the vocabulary.
    backend
        As in ``column_scores``.

    Returns
    -------
    Prediction
        ``token_ids`` int64, ``confidence`` and ``log_prob`` float32, all ``[B, C]``; ``current`` too where
        current_ids are given, else None. It unpacks as ``token_ids, confidence``. ``log_prob`` is the natural
        logarithm of the predicted token's probability and ``current`` the probability of the current one, 0
        for the excluded token and NaN for an id outside the vocabulary. All of ``softmax(logits)``, without
        the temperature. NaN logits are never chosen; a row whose softmax is undefined (a NaN or +inf, or all
        -inf) has NaN in all three.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As ``column_scores``.
    """
    given = (
        *(metric, temperature, seed, exclude_token_id, vocab_start),
        *(top_k, top_p, min_p, token_bitmask),
    )
    direct, has_current = ops.direct(backend, logits), current_ids is not None
    if direct is not None and logits.dim() == 3:
        result = outputs.attempted(outputs.predictions, logits, has_current)
        if result is not None and direct.attempt("token_confidence", result, logits, current_ids, given):
            return Prediction(*result)
    checks.choice("backend", backend, BACKEND_CHOICES)
    options = Sampling(*given).checked(logits)
    checks.optional("current_ids", current_ids, "[B, C]", logits.shape[:2], (torch.int64,), logits)
    result = outputs.made(outputs.predictions, logits, has_current)
    ops.token_confidence(backend, result, logits, current_ids, options)
    return Prediction(*result)


def select_tokens(
    scores: Tensor,  # [B, C]
    confidence: Tensor,  # [B, C]
    masked: Tensor,  # [B, C]
    *,
    rule: str | Tensor = "parallel",
    tau: float | Tensor = 0.9,
    fallback: str = "confidence",
    backend: str = "auto",
    policy: str | None = None,
) -> Tensor:
    """Which masked positions to commit in this step.

    ``"parallel"`` (arXiv 2604.08564, dynamic attention threshold): of the masked positions, ``high`` are
    those with ``confidence >= tau`` and ``low`` the others; with ``theta`` the largest score in ``low`` (-inf
    if there is none), commit the ``high`` positions with ``score > theta``. Where none passes, exactly one
    is committed, so that every step makes progress. ``"sequential"``: the one masked position of the
    largest score. ``"threshold"`` (arXiv 2505.22618): the masked positions with ``confidence >= tau``,
    whatever their scores; one where there is none.

    Parameters
    ----------
    scores, confidence
        float32 ``[B, C]`` (float64: reference only). The comparisons with thresholds are made in float32.
    masked
        bool ``[B, C]``: the positions still to fill.
    rule
        ``"parallel"``, ``"sequential"`` or ``"threshold"``; or an int32 tensor ``[B]`` on the same device
        with the ``attn_sampler.reference.RULE_CODES`` of each row's rule (anything else is ``"parallel"``).
    tau
        Confidence threshold in [0, 1], or a float32 tensor ``[B]`` with one for each row; not read by
        ``"sequential"``.
    fallback
        What the single position of a step without a passing one maximises: ``"confidence"`` or ``"score"``.
    backend
        As in ``column_scores``.
    policy
        The former name of rule, taken for one release more.

    Returns
    -------
    Tensor
        bool ``[B, C]``. Ties go to the lowest position. Under ``"parallel"`` and ``"sequential"``, and in a
        fallback by score, a NaN score is never selected; a NaN confidence is not confident and counts as -inf
        in the fallback. A row with no position that may be selected commits nothing.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As ``column_scores``.
    """
    if policy is not None:
        rule = renamed("rule", rule, "policy", policy)
    return _select(
        scores, confidence, masked, None, None, None, Selection(rule, fallback, tau), backend
    ).selected


def revise_tokens(
    scores: Tensor,  # [B, C]
    confidence: Tensor,  # [B, C]
    masked: Tensor,  # [B, C]
    current: Tensor,  # [B, C]
    differs: Tensor,  # [B, C]
    budget: Tensor,  # [B, C]
    *,
    replace_tau: float = math.inf,
    remask_tau: float = 0.0,
    max_revisions: int | None = None,
    revision_order: str = "product",
    backend: str = "auto",
) -> Tensor:
    """Which committed tokens to take back in this step.

    A position that is not masked and has budget left is *replaced* where another token is predicted with
    ``confidence >= replace_tau``, and else *re-masked* where ``current < remask_tau`` (the token-to-token
    edits of LLaDA2.1 and the token-to-mask edits of arXiv 2604.18738). Of these the first ``max_revisions``
    of each sequence are revised, in descending order of doubt, ``1 - current``; of score, the attention that
    the token receives; or of the product of both: a wrong token matters as far as others read it.

    Parameters
    ----------
    scores, confidence, current
        float32 ``[B, C]`` (float64: reference only): column scores; confidence in the predicted token; the
        probability of the token that stands there (``token_confidence(current_ids=...)``).
    masked, differs
        bool ``[B, C]``: the positions still to fill; where another token is predicted than stands there.
    budget
        int32 ``[B, C]``, **updated in place**: how often each position may still be revised, 0 or less for a
        prompt. Each revision takes one, so that decoding ends.
    replace_tau, remask_tau
        Thresholds, compared in float32; remask_tau in [0, 1]. Nothing is replaced at a replace_tau above 1,
        and nothing re-masked at a remask_tau of 0, as by default.
    max_revisions
        The most positions of a sequence to revise. Default: all.
    revision_order
        ``"product"``, ``"doubt"`` or ``"score"``.
    backend
        As in ``column_scores``.

    Returns
    -------
    Tensor
        uint8 ``[B, C]``: 0, 1 (replaced) or 2 (re-masked), ``attn_sampler.reference.REPLACED`` and
        ``REMASKED``. What is NaN passes no threshold and counts as -inf in the order; the lowest position
        wins ties.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As ``column_scores``. ``budget`` is untouched then.
    """
    # Of the positions that the kernel would commit beside nothing is made.
    options = Selection(
        "threshold", "confidence", 1.0, replace_tau, remask_tau, max_revisions, revision_order
    )
    if budget is None:
        raise TypeError("budget: expected a tensor [B, C], got NoneType")
    return _select(scores, confidence, masked, current, differs, budget, options, backend).revised


def _select(
    scores: Tensor,
    confidence: Tensor,
    masked: Tensor,
    current: Tensor | None,
    differs: Tensor | None,
    budget: Tensor | None,
    given: Selection,
    backend: str,
) -> Selected:
    operands = (scores, confidence, masked, current, differs)
    direct = ops.direct(backend, masked)
    if direct is not None:
        result = outputs.attempted(outputs.selection, masked, budget)
        if result is not None and direct.attempt("select_tokens", result, *operands, given):
            if budget is not None:
                ops.count_write(budget)
            return result
    checks.choice("backend", backend, BACKEND_CHOICES)
    dtypes = (torch.float32, torch.float64)
    checks.tensor("scores", scores, "[B, C]", dtypes)
    checks.size("scores", scores.shape, MAX_ELEMENTS)
    checks.tensor("confidence", confidence, "[B, C]", dtypes, like=scores)
    checks.shape("confidence", confidence, "[B, C]", scores.shape)
    if confidence.dtype != scores.dtype:
        raise ValueError(f"confidence: expected the dtype of scores, {scores.dtype}, got {confidence.dtype}")
    checks.tensor("masked", masked, "[B, C]", (torch.bool,), like=scores)
    checks.shape("masked", masked, "[B, C]", scores.shape)
    options = given.checked(budget, scores, scores.shape)
    if budget is not None:
        for name, operand, dtype in (("current", current, scores.dtype), ("differs", differs, torch.bool)):
            checks.tensor(name, operand, "[B, C]", (dtype,), like=scores)
            checks.shape(name, operand, "[B, C]", scores.shape)  # type: ignore[arg-type]
    result = outputs.made(outputs.selection, masked, budget)
    ops.select_tokens(backend, result, *operands, options)
    return result


def decode_step(
    tokens: Tensor,  # [B, T]
    logits: Tensor,  # [B, C, V]
    layers: Sequence[Sequence[Tensor | None]] | None = None,
    *,
    scores: Tensor | None = None,  # [B, C]
    block: slice,
    mask_token_id: int,
    rule: str | Tensor = "parallel",
    tau: float | Tensor = 0.9,
    fallback: str = "confidence",
    budget: Tensor | None = None,  # [B, C]
    replace_tau: float = math.inf,
    remask_tau: float = 0.0,
    max_revisions: int | None = None,
    revision_order: str = "product",
    metric: str = "probability",
    temperature: float | Tensor = 0.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor | None = None,
    token_bitmask: Tensor | None = None,  # [B, W] or [B, C, W]
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
    block_table: Tensor | None = None,  # [B, P]
    seqlens_k: Tensor | None = None,  # [B]
    backend: str = "auto",
    policy: str | None = None,
    rows: str | None = None,
) -> StepResult:
    """One step of attention-guided decoding, from the forward pass's tensors to committed tokens.

    Scores the block's columns over all layers, predicts a token for each position, selects the masked
    positions to commit and writes their tokens into ``tokens``. With a budget it also replaces and re-masks
    tokens that stand there, by what the same pass says of them.

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
        follows from ``query_rows`` to ``seqlens_k`` then changes nothing.
    block
        Slice of the T token positions, C of them.
    mask_token_id
        The id of ``[MASK]``, inside the vocabulary.
    rule, tau, fallback
        As in ``select_tokens``.
    budget, replace_tau, remask_tau, max_revisions, revision_order
        As in ``revise_tokens``; what stands there and its probability are found on the way. Default: nothing
        is revised.
    metric, temperature, top_k, top_p, min_p, seed, token_bitmask
        As in ``token_confidence``.
    query_rows
        Which query rows count: ``"all"``, or ``"masked"`` (those at a position that is still masked).
    columns
        The block's key positions in ``k``. Default: the same as ``block``. They differ where the keys given
        are not aligned with ``tokens`` (a slice of them, a packed cache), and have to be given with
        seqlens_k, from which they are counted.
    lse_base, softmax_scale, causal, window_size, key_mask, query_mask, query_start, softmax_scope, diagonal,
    reduction, block_table, seqlens_k
        As in ``column_scores``, the same for all layers; heads and layers are added up.
    backend
        As in ``column_scores``.
    policy, rows
        The former names of rule and query_rows, taken, as scores in the place of layers are, for one release
        more.

    Returns
    -------
    StepResult
        ``(tokens, token_ids, confidence, scores, selected, log_prob, current, revised, budget)``; the last
        four are None without a budget.

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
    if budget is None and (replace_tau, remask_tau, max_revisions) != (math.inf, 0.0, None):
        raise TypeError("budget: needed for replace_tau, remask_tau and max_revisions, got None")
    # Where the scores are made, there is nothing left to mask.
    masks = (key_mask, query_mask, None, block_table, seqlens_k) if scores is None else (None,) * 5
    how = (softmax_scale, lse_base, causal, softmax_scope, diagonal, reduction, False, False)
    attention = (bounds(columns), None, query_start, *how, window_size)
    sampling = (metric, temperature, seed, None, 0, top_k, top_p, min_p, token_bitmask)
    selection = (rule, fallback, tau, replace_tau, remask_tau, max_revisions, revision_order)
    place = (bounds(block), mask_token_id, query_rows)
    one_given = (layers is None) != (scores is None)
    direct = ops.direct(backend, tokens)
    if direct is not None and ops.is_plain(logits) and logits.dim() == 3 and one_given:
        result = outputs.attempted(outputs.step_result, tokens, logits, scores, budget)
        arguments = (result, logits, layers, masks, (*place, attention, sampling, selection))
        plain = result is not None and not result.scores.requires_grad
        if plain and direct.attempt("decode_step", *arguments):
            ops.count_write(tokens)
            if budget is not None:
                ops.count_write(budget)
            return result
    checks.choice("backend", backend, BACKEND_CHOICES)
    options = Step(*place, Attention(*attention), Sampling(*sampling), Selection(*selection))
    options = options.checked(tokens, logits, budget)
    records: list[Layer] = []
    if not one_given:
        raise TypeError(f"layers, scores: expected one of them, got {'none' if scores is None else 'both'}")
    if scores is not None:
        outputs.check_output("scores", scores, tokens, "[B, C]", logits.shape[:2])
    else:
        where = Masks(*masks)
        records = check_layers(layers, tokens, softmax_scope, where.paged)  # type: ignore[arg-type]
        where.check_keys(records[0].q)
        where.check(*records[0][:2])
        options = options.placed(Attention(*attention), records[0], where, tokens)
    result = outputs.made(outputs.step_result, tokens, logits, scores, budget)
    ops.decode_step(backend, result, logits, records, Masks(*masks), options)
    return result
