"""The five functions of attention-guided decoding.

They validate, document and dispatch; the arithmetic is specified in ``attn_sampler.reference`` and
done by a backend. One decoding step flows as *q, k, lse -> column scores -> token confidence -> dynamic
threshold -> commit*; ``decode_step`` is all of it in one call.

All functions work on the tensors' device without synchronising with the host, and under
``torch.compile(fullgraph=True)``. Gradients do not flow through them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_sampler import checks, ops  # noqa: F401  (importing ops registers the operators)
from attn_sampler.backends import BACKENDS
from attn_sampler.reference import StepResult

_BACKEND_CHOICES = ("auto", *BACKENDS)
_OPS = torch.ops.attn_sampler

_INT64_MIN, _UINT64_END = -(1 << 63), 1 << 64


def column_scores(
    q: Tensor,  # [B, Hq, M, D]
    k: Tensor,  # [B, Hkv, N, D]
    *,
    columns: slice | None = None,
    softmax_lse: Tensor | None = None,  # [B, Hq, M]
    lse_base: str = "e",
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
        Post-RoPE queries ``[B, Hq, M, D]`` and keys ``[B, Hkv, N, D]``; float32, float16, bfloat16 (float64:
        reference only), one dtype and device. Hq is a multiple of Hkv: query head h reads key head
        ``h // (Hq // Hkv)``. Strided views are read as they are.
    columns
        Slice of key positions, C of them. Default: all N.
    softmax_lse
        Row log-sum-exp ``[B, Hq, M]``, float32, of the scaled (and masked) logits. Default: computed.
    lse_base
        ``"e"``, or ``"2"`` where softmax_lse is a base-2 logarithm (FlashInfer).
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
    lo, hi, start, scale = _check_attention(
        q,
        k,
        columns,
        softmax_lse,
        lse_base,
        softmax_scale,
        causal,
        key_mask,
        query_mask,
        query_start,
        softmax_scope,
        diagonal,
        per_head,
        backend,
    )
    checks.choice("reduction", reduction, ("sum", "mean", "max"))
    batch, heads = q.shape[:2]
    shape = (batch, heads, hi - lo) if per_head else (batch, hi - lo)
    accumulate = out is not None
    if out is None:
        out = q.new_empty(shape, dtype=torch.float32)
    else:
        checks.accumulator("out", out, "[B, Hq, C]" if per_head else "[B, C]", shape, q)
    _OPS.column_scores(
        out,
        q,
        k,
        softmax_lse,
        key_mask,
        query_mask,
        lo,
        hi,
        start,
        scale,
        lse_base,
        causal,
        softmax_scope,
        diagonal,
        reduction,
        per_head,
        accumulate,
        backend,
    )
    return out


def attention_map(
    q: Tensor,  # [B, Hq, M, D]
    k: Tensor,  # [B, Hkv, N, D]
    *,
    rows: slice | None = None,
    columns: slice | None = None,
    softmax_lse: Tensor | None = None,  # [B, Hq, M]
    lse_base: str = "e",
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
    lo, hi, start, scale = _check_attention(
        q,
        k,
        columns,
        softmax_lse,
        lse_base,
        softmax_scale,
        causal,
        key_mask,
        query_mask,
        query_start,
        softmax_scope,
        diagonal,
        per_head,
        backend,
    )
    batch, heads, n_rows = q.shape[:3]
    first, last = checks.span("rows", rows, n_rows, "query rows (M)")
    shape = (batch, heads, last - first, hi - lo) if per_head else (batch, last - first, hi - lo)
    accumulate = out is not None
    if out is None:
        out = q.new_empty(shape, dtype=torch.float32)
    else:
        checks.accumulator("out", out, "[B, Hq, R, C]" if per_head else "[B, R, C]", shape, q)
    _OPS.attention_map(
        out,
        q,
        k,
        softmax_lse,
        key_mask,
        query_mask,
        first,
        last,
        lo,
        hi,
        start,
        scale,
        lse_base,
        causal,
        softmax_scope,
        diagonal,
        per_head,
        accumulate,
        backend,
    )
    return out


def token_confidence(
    logits: Tensor,  # [B, C, V]
    *,
    metric: str = "probability",
    temperature: float = 0.0,
    seed: int | Tensor | None = None,
    exclude_token_id: int | None = None,
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
    checks.choice("backend", backend, _BACKEND_CHOICES)
    checks.tensor("logits", logits, "[B, C, V]", checks.FLOAT_DTYPES)
    vocab = logits.shape[2]
    if vocab < 1:
        raise ValueError("logits: expected at least one token in the vocabulary, got V = 0")
    seed, seeds, temperature = _check_sampling(logits, metric, temperature, seed)
    if exclude_token_id is not None:
        checks.integer("exclude_token_id", exclude_token_id, 0, vocab)
        if vocab == 1:
            raise ValueError("exclude_token_id: the vocabulary's only token cannot be excluded")
    return _OPS.token_confidence(
        logits,
        seeds,
        metric,
        temperature,
        seed,
        -1 if exclude_token_id is None else exclude_token_id,
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
    those with ``confidence >= tau`` and ``low`` the others; with ``theta`` the largest score in ``low`` (-inf if
    there is none), commit the ``high`` positions with ``score > theta``. Where none passes, exactly one is
    committed, so that every step makes progress. ``"sequential"``: the one masked position of the
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
        others; a NaN confidence is not confident and ranks last in the fallback. A row with no masked
        position (or only NaN scores) commits nothing.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As ``column_scores``.
    """
    checks.choice("backend", backend, _BACKEND_CHOICES)
    tau = _check_selection(policy, tau, fallback)
    dtypes = (torch.float32, torch.float64)
    checks.tensor("scores", scores, "[B, C]", dtypes)
    checks.tensor("confidence", confidence, "[B, C]", dtypes, like=scores)
    checks.shape("confidence", confidence, "[B, C]", scores.shape)
    if confidence.dtype != scores.dtype:
        raise ValueError(
            f"confidence: expected the dtype of scores, {scores.dtype}, got {confidence.dtype}"
        )
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
        A sequence of ``(q, k, softmax_lse)``, one for each layer that counts, in ``column_scores``' shapes; or
        an accumulated score buffer, float32 ``[B, C]``. The layers share B, M, N, D and dtype; softmax_lse
        is given for all of them or (None, or left out) for none.
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
    checks.choice("backend", backend, _BACKEND_CHOICES)
    tau = _check_selection(policy, tau, fallback)
    checks.tensor("tokens", tokens, "[B, T]", (torch.int64,))
    lo, hi = checks.span("block", block, tokens.shape[1], "token positions (T)")
    checks.tensor("logits", logits, "[B, C, V]", checks.FLOAT_DTYPES, like=tokens)
    batch, count = tokens.shape[0], hi - lo
    checks.shape("logits", logits, "[B, C, V]", (batch, count, logits.shape[2]))
    checks.integer("mask_token_id", mask_token_id, 0, logits.shape[2])
    if logits.shape[2] == 1:
        raise ValueError("logits: expected a vocabulary with more than the mask token, got V = 1")
    seed, seeds, temperature = _check_sampling(logits, metric, temperature, seed)
    checks.choice("rows", rows, ("all", "masked"))
    checks.choice("reduction", reduction, ("sum", "mean", "max"))

    q: list[Tensor] = []
    k: list[Tensor] = []
    lse: list[Tensor] = []
    column_start, column_stop, start = lo, hi, 0
    if isinstance(layers, Tensor):
        scores = layers
        checks.accumulator("layers", scores, "[B, C]", (batch, count), tokens)
    else:
        q, k, lse = _split_layers(layers)
        column_start, column_stop, start, _ = _check_attention(
            q[0],
            k[0],
            block if columns is None else columns,
            lse[0] if lse else None,
            lse_base,
            softmax_scale,
            causal,
            key_mask,
            query_mask,
            query_start,
            softmax_scope,
            diagonal,
            False,
            backend,
        )
        checks.shape("layers[0] q", q[0], "[B, Hq, M, D]", (batch, *q[0].shape[1:]))
        if q[0].device != tokens.device:
            raise ValueError(
                f"layers: expected tensors on {tokens.device} as tokens, got {q[0].device}"
            )
        if column_stop - column_start != count:
            raise ValueError(
                f"columns: expected as many key positions as the block has tokens, {count}, "
                f"got {column_stop - column_start}"
            )
        _check_layers_alike(q, k, lse)
        first_row = start - column_start + lo
        if rows == "masked" and (first_row < 0 or first_row + q[0].shape[2] > tokens.shape[1]):
            raise ValueError(
                f"rows: with 'masked', every query row must stand at one of the "
                f"{tokens.shape[1]} tokens; rows are at {first_row} to "
                f"{first_row + q[0].shape[2] - 1} (query_start, columns)"
            )
        scores = logits.new_empty((batch, count), dtype=torch.float32)
    token_ids, confidence, selected = _OPS.decode_step(
        tokens,
        scores,
        logits,
        q,
        k,
        lse,
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
        softmax_scale,
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


def _check_attention(
    q: Tensor,
    k: Tensor,
    columns: slice | None,
    softmax_lse: Tensor | None,
    lse_base: str,
    softmax_scale: float | None,
    causal: bool,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    query_start: int | None,
    softmax_scope: str,
    diagonal: bool,
    per_head: bool,
    backend: str,
) -> tuple[int, int, int, float]:
    """Column bounds, key position of row 0 and softmax scale of a valid problem."""
    checks.choice("backend", backend, _BACKEND_CHOICES)
    checks.tensor("q", q, "[B, Hq, M, D]", checks.FLOAT_DTYPES)
    checks.tensor("k", k, "[B, Hkv, N, D]", checks.FLOAT_DTYPES, like=q)
    batch, heads, n_rows, headdim = q.shape
    kv_heads, n_keys = k.shape[1:3]
    if k.dtype != q.dtype:
        raise ValueError(f"k: expected the dtype of q, {q.dtype}, got {k.dtype}")
    if k.shape[0] != batch:
        raise ValueError(f"k: expected the batch size of q, {batch}, got {k.shape[0]}")
    if headdim < 1 or k.shape[3] != headdim:
        raise ValueError(
            f"k: expected q and k of one head dimension D >= 1, got {headdim} and {k.shape[3]}"
        )
    if kv_heads < 1 or heads < 1 or heads % kv_heads != 0:
        raise ValueError(
            f"k: expected a number of heads that divides the {heads} heads of q, got {kv_heads}"
        )
    lo, hi = checks.span("columns", columns, n_keys, "key positions (N)")
    checks.choice("lse_base", lse_base, ("e", "2"))
    checks.choice("softmax_scope", softmax_scope, ("sequence", "block"))
    for name, value in (("causal", causal), ("diagonal", diagonal), ("per_head", per_head)):
        checks.flag(name, value)
    if softmax_lse is not None and softmax_scope == "block":
        raise ValueError(
            "softmax_lse: not accepted with softmax_scope='block', whose softmax is over the "
            "block's keys alone"
        )
    lse_dtypes = (torch.float32, torch.float64) if q.dtype == torch.float64 else (torch.float32,)
    rows_shape = (batch, heads, n_rows)
    checks.optional("softmax_lse", softmax_lse, "[B, Hq, M]", rows_shape, lse_dtypes, q)
    checks.optional("key_mask", key_mask, "[B, N]", (batch, n_keys), (torch.bool,), q)
    checks.optional("query_mask", query_mask, "[B, M]", (batch, n_rows), (torch.bool,), q)
    start = n_keys - n_rows
    if query_start is not None:
        start = checks.integer("query_start", query_start)
    if softmax_scale is None:
        return lo, hi, start, headdim**-0.5
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, (int, float)):
        raise TypeError(
            f"softmax_scale: expected a number, got {type(softmax_scale).__name__}"
        )
    if not abs(softmax_scale) < float("inf"):
        raise ValueError(f"softmax_scale: expected a finite number, got {softmax_scale}")
    return lo, hi, start, float(softmax_scale)


def _check_sampling(
    logits: Tensor, metric: str, temperature: float, seed: int | Tensor | None
) -> tuple[int, Tensor | None, float]:
    """The seed as a signed 64-bit integer, the per-row seeds, and the temperature."""
    checks.choice("metric", metric, ("probability", "margin", "entropy"))
    temperature = checks.non_negative("temperature", temperature)
    if seed is None:
        if temperature > 0.0:
            raise ValueError(
                "seed: needed where temperature > 0 (an integer, or an int64 tensor [B])"
            )
        return 0, None, temperature
    if isinstance(seed, Tensor):
        checks.tensor("seed", seed, "[B]", (torch.int64,), like=logits)
        checks.shape("seed", seed, "[B]", logits.shape[:1])
        return 0, seed, temperature
    checks.integer("seed", seed, _INT64_MIN, _UINT64_END)
    # The stream is keyed by 64 bits; an operator argument is a signed integer.
    return seed - _UINT64_END if seed >= 1 << 63 else seed, None, temperature


def _check_selection(policy: str, tau: float, fallback: str) -> float:
    checks.choice("policy", policy, ("parallel", "sequential"))
    checks.choice("fallback", fallback, ("confidence", "score"))
    return checks.unit_interval("tau", tau)


def _split_layers(
    layers: Sequence[Sequence[Tensor | None]],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The layers' q, k and (for all of them, or for none) softmax_lse."""
    if not isinstance(layers, (list, tuple)) or not layers:
        raise ValueError(
            "layers: expected a score buffer [B, C] or a non-empty sequence of "
            f"(q, k, softmax_lse), got {layers if layers else type(layers).__name__!r}"
        )
    q: list[Tensor] = []
    k: list[Tensor] = []
    lse: list[Tensor] = []
    for index, layer in enumerate(layers):
        if not isinstance(layer, (list, tuple)) or len(layer) not in (2, 3):
            raise ValueError(f"layers[{index}]: expected (q, k, softmax_lse) or (q, k)")
        for name, value in zip(("q", "k"), layer, strict=False):
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"layers[{index}] {name}: expected a tensor, got {type(value).__name__}"
                )
        q.append(layer[0])  # type: ignore[arg-type]
        k.append(layer[1])  # type: ignore[arg-type]
        if len(layer) == 3 and layer[2] is not None:
            lse.append(layer[2])
    if lse and len(lse) != len(q):
        raise ValueError(
            f"layers: expected softmax_lse for all layers or for none, got {len(lse)} of {len(q)}"
        )
    return q, k, lse


def _check_layers_alike(q: list[Tensor], k: list[Tensor], lse: list[Tensor]) -> None:
    """Every layer has the batch, rows, keys, head dimension, dtype and device of the first."""
    (batch, _, n_rows, headdim), n_keys = q[0].shape, k[0].shape[2]
    for index in range(1, len(q)):
        heads, kv_heads = q[index].shape[1], k[index].shape[1]
        expected = {
            "q": (q[index], (batch, heads, n_rows, headdim), q[0].dtype),
            "k": (k[index], (batch, kv_heads, n_keys, headdim), q[0].dtype),
        }
        if lse:
            expected["softmax_lse"] = (lse[index], (batch, heads, n_rows), lse[0].dtype)
        for name, (value, shape, dtype) in expected.items():
            if value.shape != shape or value.dtype != dtype or value.device != q[0].device:
                raise ValueError(
                    f"layers[{index}] {name}: expected shape {list(shape)}, {dtype} on "
                    f"{q[0].device} as in layer 0, got {list(value.shape)}, {value.dtype} on "
                    f"{value.device}"
                )
        if kv_heads < 1 or heads % kv_heads != 0:
            raise ValueError(
                f"layers[{index}] k: expected a number of heads that divides the {heads} heads "
                f"of q, got {kv_heads}"
            )
