"""What keys receive of attention, and what rows give: ``column_scores``, ``top_columns`` of the largest, and
``attention_map``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attn_sampler import checks, ops, outputs
from attn_sampler.backends import BACKEND_CHOICES, Backend
from attn_sampler.options import MAX_ELEMENTS, Attention, Layer, Masks, Top, bounds
from attn_sampler.reference import TopColumns


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
    block_table: Tensor | None = None,  # [B, P]
    seqlens_k: Tensor | None = None,  # [B]
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
    block_table
        int32 ``[B, P]``: k is a cache ``[pages, Hkv, page_size, D]`` then, of any strides and any page_size,
        and key n of sequence b lies in row ``n % page_size`` of page ``block_table[b, n // page_size]``;
        ``N = P * page_size``. (A cache ``[pages, page_size, Hkv, D]`` is given as ``cache.transpose(1, 2)``,
        which copies nothing.) An entry outside ``[0, pages)`` is a page without keys: nothing is read.
    seqlens_k
        int32 ``[B]``: sequence b has the first ``seqlens_k[b]`` of its N keys (0 to N, to which it is
        clamped) and ends there; not read on the host. Key positions are counted from each sequence's own
        end then: query row 0 stands at ``seqlens_k[b] + query_start``, by default ``-M``, and the bounds of
        ``columns`` are negative, or 0 or None for the end (``slice(-32, None)``). What of the columns is
        before a short sequence's first key scores 0.
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
    layer = (q, k, softmax_lse, q_descale, k_descale)
    masks = (key_mask, query_mask, None, block_table, seqlens_k)
    how = (softmax_scale, lse_base, causal, softmax_scope, diagonal, reduction, per_head, out is not None)
    options = (bounds(columns), None, query_start, *how, window_size)
    return _attend(ops.column_scores, layer, masks, options, out, backend)


def top_columns(
    q: Tensor,  # [B, Hq, M, D]
    k: Tensor,  # [B, Hkv, N, D]
    *,
    count: int,
    per: str = "kv_head",
    sinks: int = 0,
    recent: int = 0,
    pool: tuple[str, int] | None = None,
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
    block_table: Tensor | None = None,  # [B, P]
    seqlens_k: Tensor | None = None,  # [B]
    backend: str = "auto",
) -> TopColumns:
    """The columns of the largest column scores: the keys of a cache that matter to these queries.

    The choice of SnapKV (arXiv 2404.14469: the last queries vote, and votes are pooled), of H2O (arXiv
    2306.14048: heavy hitters beside recent keys) and, of a diffusion model's block, of MAGE (arXiv
    2602.14209). On the CPU the scores of all columns never leave the kernel.

    Parameters
    ----------
    count
        How many columns to choose for each of the G groups, 1 to C.
    per
        What shares a choice, and whose scores are added up: ``"kv_head"``, the query heads of a key head
        (G = Hkv: an index into its cache); ``"head"``, each query head alone (G = Hq); ``"all"`` (G = 1).
    sinks, recent
        So many of the first and of the last present columns are chosen whatever their scores. They count
        towards ``count``, which is no less than both together.
    pool
        ``("max", width)`` or ``("mean", width)``, width odd and at most 1023: the scores, added up over
        heads, are pooled over so many columns around each before the choice (SnapKV: 5 or 7), at stride 1. In
        a window, what is beyond the columns, absent or kept by sinks or recent has no part in the maximum and
        counts as 0 in the mean, which divides by the width. Default: the scores as they are.
    q, k, columns, ..., backend
        As in ``column_scores``.

    Returns
    -------
    TopColumns
        ``positions`` int64 and ``scores`` float32, both ``[B, G, count]``. First what sinks and recent keep,
        by position and with the scores themselves; then the others by their (pooled) scores, the largest
        first, NaN after all numbers, the lowest position first among equals: the first n of a group are the
        choice of a smaller count n. A column whose key is masked or not there is absent and never chosen:
        where fewer are present than count, the rest is position -1 with score -inf. Positions are those of
        ``k``, from 0 at each sequence's first key, also where columns count from its end. On the CPU the bits
        are the same with any number of threads and in any batch; where another backend rounds otherwise,
        columns of all but equal scores may change places.

    Raises
    ------
    TypeError, ValueError, MemoryError, BackendUnavailableError
        As ``column_scores``.
    """
    given = (q, k, softmax_lse, q_descale, k_descale)
    masked = (key_mask, query_mask, None, block_table, seqlens_k)
    how = (softmax_scale, lse_base, causal, softmax_scope, diagonal, reduction, False, False)
    attention = (bounds(columns), None, query_start, *how, window_size)
    choice = (count, per, sinks, recent, pool)
    direct, layer, masks = _direct(backend, q, k, block_table), Layer(*given), Masks(*masked)
    # Before anything is checked no more memory is taken than any choice needs.
    if direct is not None and type(per) is str and type(count) is int and 0 < count <= masks.n_keys(k):
        result = outputs.attempted(outputs.top_columns, q, k, per, count)
        if result is not None and direct.attempt("top_columns", result, given, masked, (attention, *choice)):
            return result
    checks.choice("backend", backend, BACKEND_CHOICES)
    options = Top(Attention(*attention), *choice).checked(layer, masks)
    masks.check(q, k)
    result = outputs.made(outputs.top_columns, q, k, per, count)
    ops.top_columns(backend, result, layer, masks, options)
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
    window_size: tuple[int, int] = (-1, -1),
    key_mask: Tensor | None = None,  # [B, N]
    query_mask: Tensor | None = None,  # [B, M]
    query_start: int | None = None,
    softmax_scope: str = "sequence",
    diagonal: bool = True,
    column_mask: Tensor | None = None,  # [B, C]
    reduction: str = "none",
    per_head: bool = False,
    out: Tensor | None = None,
    block_table: Tensor | None = None,  # [B, P]
    seqlens_k: Tensor | None = None,  # [B]
    backend: str = "auto",
) -> Tensor:
    """Attention among a slice of query rows and a slice of key positions, added up over heads.

    The matrix whose sums over all rows are ``column_scores``; what the dependency-aware samplers (DAWN, DAPD,
    CLAD, ADAS) build their graphs from. Reduced, it is what each row gives: the mass that it gives to a set
    of columns (DOS weighs masked rows by what they give to unmasked ones), or to its own position (which
    tells, with the log-sum-exp, what the row's attention would be without its own token).

    Parameters
    ----------
    rows
        Slice of the M query rows, R of them. Default: all. Row r of the map stands at key position
        ``query_start + rows.start + r``.
    column_mask
        Boolean ``[B, C]``: the columns that count; the others' entries are 0. Unlike key_mask it comes after
        the softmax.
    reduction
        Over columns: ``"none"``; ``"sum"``, the row's mass; or ``"diagonal"``, the entry at its own position
        (0 where that is none of the columns). No map is made for these.
    q, k, columns, ..., backend
        As in ``column_scores``.

    Returns
    -------
    Tensor
        float32 ``[B, R, C]``, or ``[B, Hq, R, C]`` per head; reduced, ``[B, R]`` or ``[B, Hq, R]``; ``out``
        itself if given.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As ``column_scores``.
    """
    layer = (q, k, softmax_lse, q_descale, k_descale)
    masks = (key_mask, query_mask, column_mask, block_table, seqlens_k)
    how = (softmax_scale, lse_base, causal, softmax_scope, diagonal, reduction, per_head, out is not None)
    options = (bounds(columns), bounds(rows), query_start, *how, window_size)
    return _attend(ops.attention_map, layer, masks, options, out, backend)


def _direct(backend: str, q: Tensor, k: Tensor, table: Tensor | None) -> Backend | None:
    """What takes a call on these tensors before it is checked, if there is something."""
    direct = ops.direct(backend, q)
    spans_pages = table is None or (ops.is_plain(table) and table.dim() == 2)
    plain = direct is not None and spans_pages and ops.is_plain(k) and q.dim() == k.dim() == 4
    return direct if plain else None


def _attend(
    function: ops.Function, given: tuple, masked: tuple, how: tuple, out: Tensor | None, backend: str
) -> Tensor:
    """column_scores or attention_map of what ``Layer``, ``Masks`` and ``Attention`` hold."""
    q, k, is_map = given[0], given[1], function is ops.attention_map
    table, seqlens_k = masked[3], masked[4]
    direct = _direct(backend, q, k, table)
    if direct is not None:
        if out is None:
            n_keys = k.shape[2] if table is None else k.shape[2] * table.shape[1]
            sizes = [outputs.count(how[1], q.shape[2])] if is_map else []
            if not is_map or how[8] == "none":
                sizes.append(outputs.count(how[0], n_keys, seqlens_k is not None))
            result = outputs.attempted(outputs.attended, q, how[9], *sizes)
            plain = result is not None
        else:
            result, plain = out, type(out) is Tensor and not out.requires_grad
        if plain and direct.attempt(function.name, result, given, masked, how):
            if out is not None:
                ops.count_write(out)
            return result
    checks.choice("backend", backend, BACKEND_CHOICES)
    layer, masks = Layer(*given), Masks(*masked)
    options = Attention(*how).checked(layer, masks, is_map)
    masks.check(q, k, options.columns.stop - options.columns.start)  # type: ignore[union-attr]
    kept = options.reduction == "none"
    spans: tuple[Any, ...] = (options.rows, options.columns)[not is_map : 2 if kept or not is_map else 1]
    sizes = [x.stop - x.start for x in spans]
    checks.size("out", (*q.shape[: 2 if options.per_head else 1], *sizes), MAX_ELEMENTS)
    result = outputs.made(outputs.attended, q, options.per_head, *sizes)
    if out is not None:
        axes = (
            f"[B{', Hq' if options.per_head else ''}{', R' if is_map else ''}{', C' * (len(sizes) > is_map)}]"
        )
        outputs.check_output("out", out, q, axes, result.shape)
        result = out
    function(backend, result, layer, masks, options)
    return result
