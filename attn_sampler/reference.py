"""The specification, as plain PyTorch: every backend is tested against this file.

It materialises whatever it needs, on any device and for any floating dtype. Arithmetic is float64 for
float64 inputs and float32 for all others, and so are the results; dot products are, and scaled they may be
of any size where the log-sum-exp is computed. Nothing is validated here;
``attn_sampler.functional`` does that.

Shapes: B sequences, Hq query heads, Hkv key heads, M query rows, N keys, D head dimension, C candidate
columns, R rows of a map, V vocabulary, T tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_sampler.stream import gumbel_noise, inverse_temperature, truncation

_INF = math.inf

#: What ``StepResult.revised`` says of a position; 0: its token was kept.
REPLACED, REMASKED = 1, 2

#: What an int32 tensor of rules holds for each; anything else counts as "parallel".
RULE_CODES = {"sequential": 0, "parallel": 1, "threshold": 2}


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """What the logits of each position say. It unpacks, and is indexed, as ``token_ids, confidence``."""

    token_ids: Tensor  # [B, C] int64
    confidence: Tensor  # [B, C] float32, in the metric asked for
    log_prob: Tensor  # [B, C] float32, the natural logarithm of the predicted token's probability
    current: Tensor | None = (
        None  # [B, C] float32, the probability of the token that stands there, if asked for
    )

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.token_ids, self.confidence))

    def __getitem__(self, index: int) -> Tensor:
        return (self.token_ids, self.confidence)[index]


torch.utils._pytree.register_pytree_node(  # to torch a record of tensors, as a named tuple is one
    Prediction,
    lambda x: ([x.token_ids, x.confidence, x.log_prob, x.current], None),
    lambda values, _: Prediction(*values),
    serialized_type_name=f"{__name__.rpartition('.')[0]}.Prediction",
)


class StepResult(NamedTuple):
    """What one decoding step saw and did, for the C positions of the block."""

    tokens: Tensor  # [B, T] int64, the tensor that was given, updated in place
    token_ids: Tensor  # [B, C] int64, the prediction at every position
    confidence: Tensor  # [B, C] float32
    scores: Tensor  # [B, C] float32, column scores
    selected: Tensor  # [B, C] bool, the positions committed in this step
    # Of a step that may revise; else None.
    log_prob: Tensor | None = None  # [B, C] float32, of the predictions
    current: Tensor | None = None  # [B, C] float32, the probability of what stood there before
    revised: Tensor | None = None  # [B, C] uint8: 0, REPLACED or REMASKED
    budget: Tensor | None = None  # [B, C] int32, the tensor that was given, updated in place


class Selected(NamedTuple):
    """What ``select_tokens`` answers where it may revise."""

    selected: Tensor  # [B, C] bool, the masked positions to commit
    revised: Tensor  # [B, C] uint8: 0, REPLACED or REMASKED
    budget: Tensor  # [B, C] int32, the tensor that was given, updated in place


class TopColumns(NamedTuple):
    """The columns that receive most attention, in the order of ``attn_sampler.top_columns``."""

    positions: Tensor  # [B, G, count] int64, key positions; -1 where there is none
    scores: Tensor  # [B, G, count] float32; -inf where there is none


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _dequantised(x: Tensor, descale: Tensor | None) -> Tensor:
    """The real values [B, H, ., D] that x stands for; descale is [B, Hkv], and H a multiple of Hkv."""
    dtype = _compute_dtype(x)
    if descale is None:
        return x.to(dtype)
    descale = descale.to(dtype).repeat_interleave(x.shape[1] // descale.shape[1], dim=1)
    return x.to(dtype) * descale[:, :, None, None]


def _paged_keys(k: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor]:
    """The keys [B, Hkv, N, D] of a cache [pages, Hkv, page_size, D], and which of them there are [B, N]."""
    pages, kv_heads, page_size, headdim = k.shape
    there = (block_table >= 0) & (block_table < pages)
    of_sequence = (k if pages else k.new_zeros(1, *k.shape[1:]))[block_table.where(there, 0).long()]
    n_keys = block_table.shape[1] * page_size
    of_sequence = of_sequence.transpose(1, 2).reshape(len(block_table), kv_heads, n_keys, headdim)
    return of_sequence, there.repeat_interleave(page_size, dim=1)


def _place(
    columns: slice | None, query_start: int | None, n_rows: int, n_keys: int, from_end: bool
) -> tuple[int, int, int]:
    """The bounds of the columns and the position of row 0, all counted from the end or from key 0."""
    bounds = columns or slice(None)
    if from_end:
        lo, hi = -n_keys if bounds.start is None else bounds.start, bounds.stop or 0
    else:
        lo, hi, _ = bounds.indices(n_keys)
    start = (0 if from_end else n_keys) - n_rows
    return lo, hi, start if query_start is None else query_start


def attention(
    q: Tensor,  # [B, Hq, M, D]
    k: Tensor,  # [B, Hkv, N, D]; with a block table [pages, Hkv, page_size, D]
    *,
    columns: slice | None = None,
    softmax_lse: Tensor | None = None,  # [B, Hq, M]
    lse_base: str = "e",
    q_descale: Tensor | None = None,  # [B, Hkv], of quantised q
    k_descale: Tensor | None = None,  # [B, Hkv], of quantised k
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),  # keys before and after a row's own; -1: all
    key_mask: Tensor | None = None,  # [B, N] bool
    query_mask: Tensor | None = None,  # [B, M] bool
    bias: Tensor | None = None,  # [B, Hq | 1, M, N], a mask, or added to the logits; -inf masks
    query_start: int | None = None,
    softmax_scope: str = "sequence",
    diagonal: bool = True,
    block_table: Tensor | None = None,  # [B, P] int32, the pages of k that hold a sequence's keys
    seqlens_k: Tensor | None = None,  # [B] int32: columns and query_start count from these ends
) -> tuple[Tensor, Tensor]:
    """The attention weights [B, Hq, M, C] of the columns, and which of them count [B, Hq | 1, M, C]."""
    batch, heads, n_rows, headdim = q.shape
    k, there = k.to(_compute_dtype(k)), None
    if block_table is not None:
        k, there = _paged_keys(k, block_table)
    n_keys = k.shape[2]
    end: int | Tensor = 0
    if seqlens_k is not None:
        end = seqlens_k.long().clamp(0, n_keys)[:, None, None, None]
    lo, hi, start = _place(columns, query_start, n_rows, n_keys, seqlens_k is not None)
    scale = headdim**-0.5 if softmax_scale is None else softmax_scale
    row = end + start + torch.arange(n_rows, device=q.device)[:, None]  # key position of each row
    key = torch.arange(n_keys, device=q.device)[None, :]

    sees = torch.ones(batch, 1, n_rows, n_keys, dtype=torch.bool, device=q.device)
    if causal:
        sees = sees & (key <= row)
    left, right = window_size
    if left >= 0:
        sees = sees & (row - key <= left)
    if right >= 0:
        sees = sees & (key - row <= right)
    if seqlens_k is not None:
        sees = sees & (key < end)
    for mask in (key_mask, there):
        if mask is not None:
            sees = sees & mask[:, None, None, :]
    if query_mask is not None:
        sees = sees & query_mask[:, None, :, None]
    if softmax_scope == "block":
        sees = sees & (end + lo <= row) & (row < end + hi) & (end + lo <= key) & (key < end + hi)
    if bias is not None:
        sees = sees & (bias if bias.dtype == torch.bool else bias != -_INF)

    q, k = _dequantised(q, q_descale), _dequantised(k, k_descale)
    k = k.repeat_interleave(heads // k.shape[1], dim=1)
    products = q @ k.transpose(-1, -2)
    if softmax_lse is None:
        products = products - _large(products, scale, sees)
    logits = scale * products
    if softmax_lse is None:  # beside an infinite product the others stay finite
        largest = torch.finfo(logits.dtype).max
        logits = torch.where(products.isfinite(), logits.clamp(-largest, largest), logits)
    if bias is not None and bias.dtype != torch.bool:
        logits = logits + bias
    logits = logits.masked_fill(~sees, -_INF)
    if softmax_lse is None:
        top = logits.amax(dim=-1, keepdim=True)  # of any size, beside which the rest of a sum may be lost
        logits = logits - top.masked_fill(~top.isfinite(), 0.0)
        lse = torch.logsumexp(logits, dim=-1, keepdim=True)
    else:
        lse = softmax_lse.to(q.dtype)[..., None] * (math.log(2.0) if lse_base == "2" else 1.0)
    # A row that saw nothing has lse -inf; it contributes zeros, not exp(-inf - -inf).
    weights = torch.exp(logits - lse).masked_fill(lse == -_INF, 0.0)
    if not diagonal:
        sees = sees & (key != row)
    weights = weights.masked_fill(~sees, 0.0)
    if isinstance(end, int):
        return weights[..., lo:hi], sees[..., lo:hi]
    column = end + torch.arange(lo, hi, device=q.device)
    before = column < 0  # a sequence's first key
    return tuple(  # type: ignore[return-value]
        x.gather(-1, column.clamp(min=0).expand(*x.shape[:-1], -1)).masked_fill(before, 0)
        for x in (weights, sees)
    )


def _large(products: Tensor, scale: float, sees: Tensor) -> Tensor:
    """The product of each row's largest logit [B, Hq, M, 1] where that logit is so large that nothing can be
    added to it, or infinite, and the product is not; else 0. The softmax is the same without it."""
    sign = -1.0 if scale < 0.0 else 1.0
    top = sign * (sign * products).masked_fill(~sees, -_INF).amax(dim=-1, keepdim=True)
    return top.masked_fill(~top.isfinite() | ((scale * top).abs() < 2.0**32), 0.0)


def column_scores(
    q: Tensor,
    k: Tensor,
    *,
    reduction: str = "sum",
    per_head: bool = False,
    out: Tensor | None = None,
    **attention_options: Any,
) -> Tensor:
    """Attention received by each column: [B, C], or [B, Hq, C] per head."""
    weights, counts = attention(q, k, **attention_options)
    if reduction == "max":  # the appended zero row is the maximum over no rows
        scores = torch.nn.functional.pad(weights, (0, 0, 0, 1)).amax(dim=2)
    else:
        scores = weights.sum(dim=2)
    if reduction == "mean":
        scores = scores / counts.sum(dim=2).clamp(min=1)
    if not per_head:
        scores = scores.sum(dim=1)
    return scores if out is None else out.add_(scores)


def _columns(
    batch: int,
    k: Tensor,
    columns: slice | None = None,
    key_mask: Tensor | None = None,
    block_table: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The key position of each column, and whether there is a key that counts: [B, C] both."""
    n_keys, there = k.shape[2], torch.ones(1, 1, dtype=torch.bool, device=k.device)
    if block_table is not None:
        n_keys = block_table.shape[1] * k.shape[2]
        there = ((block_table >= 0) & (block_table < k.shape[0])).repeat_interleave(k.shape[2], dim=1)
    if key_mask is not None:
        there = there & key_mask
    lo, hi = _place(columns, None, 0, n_keys, seqlens_k is not None)[:2]
    position = torch.arange(lo, hi, device=k.device)[None, :]
    if seqlens_k is not None:
        position = position + seqlens_k.long().clamp(0, n_keys)[:, None]
    position, there = position.expand(batch, -1), there.expand(batch, n_keys)
    return position, there.gather(1, position.clamp(min=0)) & (position >= 0)


def top_columns(
    q: Tensor,
    k: Tensor,
    *,
    count: int,
    per: str = "kv_head",
    sinks: int = 0,
    recent: int = 0,
    pool: tuple[str, int] | None = None,  # "max" or "mean", and an odd width
    **scores_options: Any,
) -> TopColumns:
    """The columns that receive most attention, for each key head, for each query head or for all."""
    scores = column_scores(q, k, per_head=True, **scores_options)
    groups = {"kv_head": k.shape[1], "head": q.shape[1], "all": 1}[per]
    return choose_columns(scores, k, groups, count, sinks, recent, pool, **scores_options)


def choose_columns(
    scores: Tensor,  # [B, Hq, C]
    k: Tensor,
    groups: int,  # of heads that share a choice
    count: int,
    sinks: int,
    recent: int,
    pool: tuple[str, int] | None,
    *,
    ordered: Callable[[Tensor, Tensor, int], Tensor] | None = None,
    **scores_options: Any,
) -> TopColumns:
    """The columns of the largest scores; ``ordered`` may do what ``_ordered`` does in another way."""
    scores = scores.unflatten(1, (groups, scores.shape[1] // groups)).sum(dim=2)
    position, present = (x[:, None].expand(scores.shape) for x in _columns(len(scores), k, **scores_options))
    first, total = present.cumsum(dim=-1), present.sum(dim=-1, keepdim=True)
    kept = present & ((first <= sinks) | (first > total - recent))

    if pool is not None:  # of the columns to choose among
        how, width = pool
        nothing = -_INF if how == "max" else 0.0
        padded = torch.nn.functional.pad(
            scores.masked_fill(kept | ~present, nothing), (width // 2, width // 2), value=nothing
        )
        windows = padded.unfold(-1, width, 1)
        pooled = windows.amax(dim=-1) if how == "max" else windows.sum(dim=-1) / width
        scores = torch.where(kept, scores, pooled)

    # Those that are kept, then numbers, then NaN, then what is absent; the lowest position wins ties.
    rank = torch.where(kept, 0, 1 + scores.isnan().int()).masked_fill(~present, 3)
    order = (ordered or _ordered)(rank, scores.masked_fill(rank != 1, 0.0), count)
    return TopColumns(
        position.masked_fill(~present, -1).gather(-1, order),
        scores.masked_fill(~present, -_INF).gather(-1, order),
    )


def _ordered(rank: Tensor, scores: Tensor, count: int) -> Tensor:
    """The first columns by rank, then by falling score, then by index: [..., count] of [..., C]."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order.gather(-1, rank.gather(-1, order).argsort(dim=-1, stable=True))[..., :count]


def attention_map(
    q: Tensor,
    k: Tensor,
    *,
    rows: slice | None = None,
    column_mask: Tensor | None = None,  # [B, C] bool
    reduction: str = "none",
    per_head: bool = False,
    out: Tensor | None = None,
    **attention_options: Any,
) -> Tensor:
    """Attention among rows and columns: [B, R, C], or [B, Hq, R, C] per head; reduced, without the C."""
    weights, _ = attention(q, k, **attention_options)
    weights = weights[:, :, rows or slice(None)]
    if column_mask is not None:
        weights = weights.masked_fill(~column_mask[:, None, None, :], 0.0)
    if reduction == "sum":
        weights = weights.sum(dim=3)
    elif reduction == "diagonal":
        options, table = attention_options, attention_options.get("block_table")
        n_keys = k.shape[2] if table is None else k.shape[2] * table.shape[1]
        given = (options.get("columns"), options.get("query_start"))
        lo, hi, start = _place(*given, q.shape[2], n_keys, options.get("seqlens_k") is not None)
        key = torch.arange(lo, hi, device=q.device)
        row = start + torch.arange(q.shape[2], device=q.device)[rows or slice(None)]
        weights = weights.masked_fill(row[:, None] != key, 0.0).sum(dim=3)
    if not per_head:
        weights = weights.sum(dim=1)
    return weights if out is None else out.add_(weights)


def token_confidence(
    logits: Tensor,  # [B, C, V]
    *,
    metric: str = "probability",
    temperature: float | Tensor = 0.0,  # one number, or [B] float32, as those of the truncation
    top_k: int | Tensor = 0,  # [B] int32
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor | None = None,  # one stream, or [B] int64: one for each row
    exclude_token_id: int | None = None,
    token_bitmask: Tensor | None = None,  # [B, W] or [B, C, W] int32, a bit for each token
    vocab_start: int = 0,  # whose noise the first token draws
    current_ids: Tensor | None = None,  # [B, C] int64
) -> Prediction:
    """The predicted token of each position, and how likely it and the current one are."""
    vocab = torch.arange(logits.shape[-1], device=logits.device)
    not_excluded = vocab != (-1 if exclude_token_id is None else exclude_token_id)
    present = not_excluded.expand(logits.shape)
    if token_bitmask is not None:
        present = present & _unpacked(token_bitmask, logits.shape)
    x = logits.to(_compute_dtype(logits)).masked_fill(~present, -_INF)

    inverse = inverse_temperature(_of_rows(temperature, torch.float32, logits))  # 0: greedy
    key = x
    if isinstance(temperature, Tensor) or temperature > 0.0:
        assert seed is not None
        # In float32 for every dtype: the product and the sum are each rounded once.
        scaled = x.to(torch.float32) * inverse
        noise = gumbel_noise(logits.shape, seed, logits.device, vocab_start)
        rows = [
            _of_rows(value, dtype, logits)
            for value, dtype in ((top_k, torch.int32), (top_p, torch.float32), (min_p, torch.float32))
        ]
        sampled = (scaled + noise).masked_fill(~truncation(scaled, *rows), -_INF)
        key = torch.where(inverse > 0.0, sampled.to(x.dtype), x)
    key = key.masked_fill(key.isnan(), -_INF)
    # Where no token is present any that is not excluded has to do.
    possible = torch.where(present.any(dim=-1, keepdim=True), present, not_excluded)
    best = (key == key.amax(dim=-1, keepdim=True)) & possible
    token_ids = vocab.where(best, logits.shape[-1]).amin(dim=-1)  # the lowest token wins ties

    p = torch.softmax(x, dim=-1)
    chosen = p.gather(-1, token_ids[..., None]).squeeze(-1)
    log_prob = torch.log_softmax(x, dim=-1).gather(-1, token_ids[..., None]).squeeze(-1)
    current = None
    if current_ids is not None:
        known = (current_ids >= 0) & (current_ids < logits.shape[-1])
        current = (
            p.gather(-1, current_ids.where(known, 0)[..., None]).squeeze(-1).masked_fill(~known, math.nan)
        )
    if metric == "entropy":
        chosen = torch.special.xlogy(p, p).sum(dim=-1)
    elif metric == "margin":
        chosen = chosen - p.scatter(-1, token_ids[..., None], 0.0).amax(dim=-1)
    return Prediction(token_ids, chosen, log_prob, current)


def select_tokens(
    scores: Tensor,  # [B, C]
    confidence: Tensor,  # [B, C]
    masked: Tensor,  # [B, C] bool
    *,
    rule: str | Tensor = "parallel",  # or [B] int32 of RULE_CODES
    tau: float | Tensor = 0.9,  # or [B] float32
    fallback: str = "confidence",
) -> Tensor:
    """The positions to commit, [B, C] bool (arXiv 2604.08564, dynamic attention threshold)."""
    if isinstance(rule, Tensor):
        chosen = [
            select_tokens(scores, confidence, masked, rule=name, tau=tau, fallback=fallback)
            for name in RULE_CODES
        ]
        code = torch.where((rule < 0) | (rule > 2), RULE_CODES["parallel"], rule.long())
        return torch.stack(chosen)[code, torch.arange(code.shape[0], device=code.device)]
    candidates = masked & ~scores.isnan()
    if rule == "sequential":
        return _first_largest(scores, candidates)
    selected = masked & _at_least(confidence, tau)
    if rule == "threshold":
        candidates = masked if fallback == "confidence" else candidates
    else:
        low = candidates & ~selected
        theta = scores.masked_fill(~low, -_INF)
        theta = torch.nn.functional.pad(theta, (0, 1), value=-_INF).amax(dim=-1, keepdim=True)
        selected = selected & (scores > theta)
    single = _first_largest(confidence if fallback == "confidence" else scores, candidates)
    return torch.where(selected.any(dim=-1, keepdim=True), selected, single)


def revise_tokens(
    scores: Tensor,  # [B, C]
    confidence: Tensor,  # [B, C]
    masked: Tensor,  # [B, C] bool
    current: Tensor,  # [B, C], the probability of the token that stands there
    differs: Tensor,  # [B, C] bool, whether another is predicted
    budget: Tensor,  # [B, C] int32, updated in place
    *,
    replace_tau: float,
    remask_tau: float,
    max_revisions: int,
    revision_order: str = "product",
) -> Tensor:
    """What becomes of the tokens that stand: uint8 [B, C] of 0, ``REPLACED`` and ``REMASKED``."""
    may_change = ~masked & (budget > 0)
    replaces = may_change & differs & _at_least(confidence, replace_tau)
    remasks = may_change & ~replaces & _below(current, remask_tau)
    doubt = 1.0 - current
    key = {"doubt": doubt, "score": scores, "product": doubt * scores}[revision_order]
    failing = replaces | remasks
    # Stable, so that the lowest position wins ties; what does not fail comes last, whatever its key.
    order = key.masked_fill(key.isnan(), -_INF).sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(-1, (~failing).gather(-1, order).to(torch.uint8).sort(dim=-1, stable=True).indices)
    rank = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    chosen = failing & torch.zeros_like(failing).scatter(-1, order, rank < max_revisions)
    budget.sub_(chosen.to(budget.dtype))
    return (replaces * REPLACED + remasks * REMASKED).masked_fill(~chosen, 0).to(torch.uint8)


def _at_least(x: Tensor, bound: float | Tensor) -> Tensor:
    """x >= bound, a number or one for each row, in float32 on every backend."""
    if isinstance(bound, Tensor):
        return x.to(torch.float32) >= bound[:, None]
    return x.to(torch.float32) >= torch.tensor(bound, dtype=torch.float32)


def _below(x: Tensor, bound: float) -> Tensor:
    return x.to(torch.float32) < torch.tensor(bound, dtype=torch.float32)


def _first_largest(value: Tensor, candidates: Tensor) -> Tensor:
    """One-hot of the largest value among the candidates: lowest index on ties, NaN as -inf."""
    if value.shape[-1] == 0:
        return candidates.clone()
    value = value.masked_fill(~candidates | value.isnan(), -_INF)
    best = candidates & (value == value.amax(dim=-1, keepdim=True))
    return best & (best.cumsum(dim=-1) == 1)


def masked_rows(tokens: Tensor, mask_token_id: int, rows: slice, query_mask: Tensor | None) -> Tensor:
    """The query rows, at the token positions ``rows``, that are still masked and may count: bool [B, M]."""
    masked = tokens[:, rows] == mask_token_id
    return masked if query_mask is None else masked & query_mask


def decode_step(
    tokens: Tensor,  # [B, T] int64, updated in place
    logits: Tensor,  # [B, C, V], the predictions for the block
    layers: Sequence[Sequence[Any]] | None = None,  # (q, k, softmax_lse, q_descale, k_descale) each
    *,
    scores: Tensor | None = None,  # [B, C], where there are no layers
    block: slice,
    mask_token_id: int,
    rule: str | Tensor = "parallel",
    tau: float | Tensor = 0.9,
    fallback: str = "confidence",
    budget: Tensor | None = None,  # [B, C] int32, updated in place; revises nothing without one
    replace_tau: float = _INF,
    remask_tau: float = 0.0,
    max_revisions: int = 1 << 30,
    revision_order: str = "product",
    metric: str = "probability",
    temperature: float | Tensor = 0.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor | None = None,
    token_bitmask: Tensor | None = None,
    query_rows: str = "all",
    columns: slice | None = None,
    query_mask: Tensor | None = None,
    query_start: int | None = None,
    block_table: Tensor | None = None,  # [B, P] int32, of every layer's k
    seqlens_k: Tensor | None = None,  # [B] int32
    **score_options: Any,
) -> StepResult:
    """Column scores, token confidence, selection, revision and commit of one step."""
    block_tokens = tokens[:, block]
    masked = block_tokens == mask_token_id
    if scores is None:
        assert layers is not None
        columns = columns or block
        n_rows, n_keys = layers[0][0].shape[2], layers[0][1].shape[2]
        n_keys *= 1 if block_table is None else block_table.shape[1]
        lo, _, start = _place(columns, query_start, n_rows, n_keys, seqlens_k is not None)
        if query_rows == "masked":
            # Row 0 stands at this token: key positions may be offset from token positions.
            first = start - lo + block.indices(tokens.shape[1])[0]
            query_mask = masked_rows(tokens, mask_token_id, slice(first, first + n_rows), query_mask)
        scores = torch.zeros(masked.shape, dtype=_compute_dtype(layers[0][0]), device=tokens.device)
        for layer in layers:
            q, k, lse, q_descale, k_descale = (*layer, None, None, None)[:5]  # what is left out is None
            column_scores(
                q,
                k,
                columns=columns,
                softmax_lse=lse,
                q_descale=q_descale,
                k_descale=k_descale,
                query_mask=query_mask,
                query_start=start,
                block_table=block_table,
                seqlens_k=seqlens_k,
                out=scores,
                **score_options,
            )
    predicted = token_confidence(
        logits,
        metric=metric,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        exclude_token_id=mask_token_id,
        token_bitmask=token_bitmask,
        current_ids=block_tokens,
    )
    token_ids, confidence = predicted
    selected = select_tokens(scores, confidence, masked, rule=rule, tau=tau, fallback=fallback)
    result = StepResult(tokens, token_ids, confidence, scores, selected)
    if budget is not None:
        assert predicted.current is not None
        revised = revise_tokens(
            scores,
            confidence,
            masked,
            predicted.current,
            token_ids != block_tokens,
            budget,
            replace_tau=replace_tau,
            remask_tau=remask_tau,
            max_revisions=max_revisions,
            revision_order=revision_order,
        )
        result = StepResult(*result[:5], predicted.log_prob, predicted.current, revised, budget)
    commit_tokens(block_tokens, token_ids, selected, result.revised, mask_token_id)
    return result


def commit_tokens(
    block_tokens: Tensor,  # [B, C] int64, updated in place
    token_ids: Tensor,  # [B, C] int64
    selected: Tensor,  # [B, C] bool
    revised: Tensor | None,  # [B, C] uint8
    mask_token_id: int,
) -> None:
    """Write predictions where they are selected or replace a token, the mask token where one is re-masked."""
    written = selected
    if revised is not None:
        written = selected | (revised == REPLACED)
        block_tokens.masked_fill_(revised == REMASKED, mask_token_id)
    block_tokens.copy_(torch.where(written, token_ids, block_tokens))


def _of_rows(value: float | Tensor, dtype: torch.dtype, like: Tensor) -> Tensor:
    """A number for all rows, or one for each, as [B | 1, 1, 1]."""
    return torch.as_tensor(value, dtype=dtype, device=like.device).reshape(-1, 1, 1)


def _unpacked(bitmask: Tensor, shape: Sequence[int]) -> Tensor:
    """The bits of int32 words [B, W] or [B, C, W], the lowest first, as bool [B, C, V]."""
    bits = (bitmask[..., None] >> torch.arange(32, device=bitmask.device)) & 1
    bits = bits.flatten(-2).to(torch.bool)[..., : shape[-1]]
    return (bits[:, None, :] if bits.dim() == 2 else bits).expand(shape)
