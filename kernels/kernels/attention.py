"""Attention logits in tiles, and what is made of them: row log-sum-exp, column scores, attention map.

All three share ``_logits_tile`` and what follows it. In order:

1. ``_row_lse_kernel`` keeps a tile of query rows and streams keys. Where rows are few the keys are split among
   programs; the splits' results are combined, in a fixed order, by whoever reads them.
2. ``column_scores_kernel`` keeps a tile of keys (the columns) and streams query rows, over heads and layers. With
   the log-sum-exp known, no other key is read. Rows, heads and layers are split among programs where
   there are too few of those; the last program to finish a tile of columns adds the splits up in a fixed order, and
   in a decoding step the last one of a row of the batch selects and commits as well.
3. ``_attention_map_kernel`` is one tile for each program, over heads.

The query heads that share a key head are packed into the rows of a tile: row r is query row r // PACK of head
r % PACK of the pack. Logarithms are to base 2 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .selection import commit_row

_LOG2E = math.log2(math.e)
_INF = tl.constexpr(float("inf"))

MAX_HEADDIM = 512
MAX_LAYERS = 128


@triton.jit
def _of_layer(values, layer):
    """The entry of a tuple that has one for each layer, or one for all of them."""
    value = values[0]
    for index in tl.static_range(1, len(values)):
        value = tl.where(layer == index, values[index], value)
    return value


@triton.jit
def _load_chunk(
    pointers, ok, stride_d, CHUNK: tl.constexpr, HEADDIM: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr
):
    """Chunk CHUNK of the head dimension of some rows: [BLOCK, BLOCK_D], zero where there is nothing."""
    offs_d = CHUNK * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = ok[:, None]
    if HEADDIM % BLOCK_D != 0:
        mask = mask & (offs_d < HEADDIM)[None, :]
    x = tl.load(pointers[:, None] + offs_d.to(tl.int64)[None, :] * stride_d, mask=mask, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _logits_tile(
    q0,
    q,
    q_ok,
    q_sd,
    k0,
    k,
    k_ok,
    k_sd,
    scale_log2,
    HEADDIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Scaled logits to base 2 [BLOCK_M, BLOCK_N]; the first chunks of q and k are loaded by the caller."""
    acc = tl.dot(q0, tl.trans(k0), input_precision="ieee")
    for chunk in tl.static_range(1, (HEADDIM + BLOCK_D - 1) // BLOCK_D):
        q_chunk = _load_chunk(q, q_ok, q_sd, chunk, HEADDIM, BLOCK_D, UPCAST)
        k_chunk = _load_chunk(k, k_ok, k_sd, chunk, HEADDIM, BLOCK_D, UPCAST)
        acc = tl.dot(q_chunk, tl.trans(k_chunk), acc, input_precision="ieee")
    return acc * scale_log2


@triton.jit
def _visible(row_ok, position, key_ok, key, CAUSAL: tl.constexpr):
    """Which rows see which keys [BLOCK_M, BLOCK_N]."""
    sees = row_ok[:, None] & key_ok[None, :]
    if CAUSAL:
        sees = sees & (key[None, :] <= position[:, None])
    return sees


@triton.jit
def _safe_max(m):
    """A maximum that can be subtracted: 0 in place of an infinity."""
    return tl.where((m == _INF) | (m == -_INF), 0.0, m)


@triton.jit
def _load_lse(pointers, ok, scale, SPLITS: tl.constexpr):
    """Row log-sum-exp to base 2 [BLOCK_M], from SPLITS partial ones that lie side by side."""
    if SPLITS == 1:
        lse = tl.load(pointers, mask=ok, other=-_INF) * scale
    else:
        parts = tl.load(pointers[:, None] + tl.arange(0, SPLITS)[None, :], mask=ok[:, None], other=-_INF)
        m = _safe_max(tl.max(parts, 1))
        lse = m + tl.log2(tl.sum(tl.exp2(parts - m[:, None]), 1))
    return lse


@triton.jit
def _weights_tile(logits, lse, sees, LSE_OF_TILE: tl.constexpr):
    """Attention weights [BLOCK_M, BLOCK_N], exactly 0 where a row sees nothing.

    With LSE_OF_TILE the tile holds all the keys of the softmax, and lse is not read.
    """
    if LSE_OF_TILE:
        visible = tl.where(sees, logits, -_INF)
        m = _safe_max(tl.max(visible, 1))
        lse = m + tl.log2(tl.sum(tl.exp2(visible - m[:, None]), 1))
    weights = tl.exp2(logits - lse[:, None])
    return tl.where(sees & (lse != -_INF)[:, None], weights, 0.0)


@triton.jit
def _is_last(counter, total):
    """Whether all the other programs that count here have finished; their results can be read then.

    The barrier puts the writes of all threads of this program before the increment, which releases them and
    acquires those of the others.
    """
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == total - 1


@triton.jit(
    do_not_specialize=["n_batch", "n_rows", "row_start", "row_stop", "key_start", "key_stop", "query_start", "packs"]
)
def _row_lse_kernel(
    q,
    q_sb,
    q_sh,
    q_sm,
    q_sd,
    k,
    k_sb,
    k_sh,
    k_sn,
    k_sd,
    heads,
    groups,
    key_mask,
    key_mask_sb,
    key_mask_sn,
    lse,
    lse_sl,
    lse_sh,
    n_batch,
    n_rows,
    row_start,
    row_stop,
    key_start,
    key_stop,
    query_start,
    packs,
    scale_log2,
    CAUSAL: tl.constexpr,
    SPLITS: tl.constexpr,
    PACK: tl.constexpr,
    HEADDIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """lse[layer, b, head, row, split] of a tile of packed rows over one split of the keys.

    Program: ((layer * B + b) * packs + pack) * row tiles + row tile) * SPLITS + split.
    """
    pid = tl.program_id(0)
    split = pid % SPLITS
    pid = pid // SPLITS
    row_tiles = ((row_stop - row_start) * PACK + BLOCK_M - 1) // BLOCK_M
    row_tile = pid % row_tiles
    pid = pid // row_tiles
    pack = pid % packs
    pid = pid // packs
    b = (pid % n_batch).to(tl.int64)
    layer = pid // n_batch

    head = pack * PACK
    if head < _of_layer(heads, layer):
        r = row_start * PACK + row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row_ok = r < row_stop * PACK
        row = r // PACK
        position = query_start + row
        q_rows = (
            _of_layer(q, layer)
            + b * _of_layer(q_sb, layer)
            + (head + r % PACK).to(tl.int64) * _of_layer(q_sh, layer)
            + row.to(tl.int64) * _of_layer(q_sm, layer)
        )
        q_d = _of_layer(q_sd, layer)
        k_base = (
            _of_layer(k, layer)
            + b * _of_layer(k_sb, layer)
            + (head // _of_layer(groups, layer)).to(tl.int64) * _of_layer(k_sh, layer)
        )
        k_n = _of_layer(k_sn, layer)
        k_d = _of_layer(k_sd, layer)
        q0 = _load_chunk(q_rows, row_ok, q_d, 0, HEADDIM, BLOCK_D, UPCAST)

        span = (key_stop - key_start + SPLITS - 1) // SPLITS
        span = (span + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        first = key_start + split * span
        last = tl.minimum(first + span, key_stop)
        if CAUSAL:  # nothing is visible beyond the last row of the tile
            last_row = tl.minimum((row_start * PACK + row_tile * BLOCK_M + BLOCK_M - 1) // PACK, row_stop - 1)
            last = tl.minimum(last, query_start + last_row + 1).to(tl.int32)
        m = tl.full([BLOCK_M], -_INF, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for start in range(first, last, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            key_ok = key < last
            k_rows = k_base + key.to(tl.int64) * k_n
            k0 = _load_chunk(k_rows, key_ok, k_d, 0, HEADDIM, BLOCK_D, UPCAST)
            logits = _logits_tile(
                q0, q_rows, row_ok, q_d, k0, k_rows, key_ok, k_d, scale_log2, HEADDIM, BLOCK_D, UPCAST
            )
            if key_mask is not None:
                offset = b * key_mask_sb + key.to(tl.int64) * key_mask_sn
                key_ok = key_ok & (tl.load(key_mask + offset, mask=key_ok, other=0) != 0)
            logits = tl.where(_visible(row_ok, position, key_ok, key, CAUSAL), logits, -_INF)
            new_m = tl.maximum(m, tl.max(logits, 1))
            shift = _safe_max(new_m)
            total = total * tl.exp2(m - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
            m = new_m
        out = lse + layer.to(tl.int64) * lse_sl + (head + r % PACK + b * lse_sh) * n_rows * SPLITS
        tl.store(out + row.to(tl.int64) * SPLITS + split, _safe_max(m) + tl.log2(total), mask=row_ok)


@triton.jit(
    do_not_specialize=[
        "tokens_offset",
        "mask_token_id",
        "lse_sl",
        "n_columns",
        "n_rows",
        "row_start",
        "row_stop",
        "column_start",
        "query_start",
        "n_groups",
        "n_layers",
        "head_splits",
        "packs_per_split",
        "tiles",
        "block_start",
        "conf_plane",
        "conf_splits",
        "tau",
    ]
)
def column_scores_kernel(
    q,
    q_sb,
    q_sh,
    q_sm,
    q_sd,
    k,
    k_sb,
    k_sh,
    k_sn,
    k_sd,
    heads,
    groups,
    lse,
    lse_sl,
    lse_sb,
    lse_sh,
    lse_sm,
    key_mask,
    key_mask_sb,
    key_mask_sn,
    query_mask,
    query_mask_sb,
    query_mask_sm,
    tokens,
    tokens_sb,
    tokens_st,
    tokens_offset,
    mask_token_id,
    out,
    out_sb,
    out_sh,
    out_sc,
    partials,
    counters,
    n_groups,
    n_columns,
    row_start,
    row_stop,
    column_start,
    query_start,
    scale_log2,
    lse_scale,
    n_layers,
    head_splits,
    packs_per_split,
    tiles,
    conf_partials,
    conf_plane,
    conf_splits,
    block_start,
    token_ids,
    confidence,
    selected,
    tau,
    CAUSAL: tl.constexpr,
    DIAGONAL: tl.constexpr,
    BLOCK_SCOPE: tl.constexpr,
    REDUCTION: tl.constexpr,
    PER_HEAD: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    MASKED_ROWS: tl.constexpr,
    LSE_SPLITS: tl.constexpr,
    ROW_SPLITS: tl.constexpr,
    COMBINE: tl.constexpr,
    COMMIT: tl.constexpr,
    METRIC: tl.constexpr,
    POLICY: tl.constexpr,
    FALLBACK: tl.constexpr,
    COMMIT_BLOCK: tl.constexpr,
    CONF_SPLITS: tl.constexpr,
    PACK: tl.constexpr,
    HEADDIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of columns, over one split of the rows, packs of heads and layers.

    Program: ((group * splits + split) * tiles + tile, where a group is a row of the batch (or one head of it, per
    head) and split = (layer * head_splits + head split) * ROW_SPLITS + row split.
    """
    pid = tl.program_id(0)
    tile = pid % tiles
    pid = pid // tiles
    splits = n_layers * head_splits * ROW_SPLITS
    split = pid % splits
    group = pid // splits
    layer = split // (head_splits * ROW_SPLITS)
    head_split = split // ROW_SPLITS % head_splits
    row_split = split % ROW_SPLITS

    n_heads = _of_layer(heads, layer)
    if PER_HEAD:
        b = (group // n_heads).to(tl.int64)
        first_pack = group % n_heads
        last_pack = first_pack + 1
    else:
        b = group.to(tl.int64)
        first_pack = head_split * packs_per_split
        last_pack = tl.minimum(first_pack + packs_per_split, n_heads // PACK)

    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = column < n_columns
    key = column_start + column
    key_ok = column_ok
    if key_mask is not None:
        offset = b * key_mask_sb + key.to(tl.int64) * key_mask_sn
        key_ok = key_ok & (tl.load(key_mask + offset, mask=column_ok, other=0) != 0)

    # The packed rows of this split: whole tiles, so that a split is never shared.
    first_row = row_start
    if CAUSAL:  # rows before the first column see nothing of the tile
        first_row = tl.maximum(row_start, column_start + tile * BLOCK_N - query_start)
        first_row = tl.minimum(first_row, row_stop).to(tl.int32)
    row_tiles = ((row_stop - first_row) * PACK + BLOCK_M - 1) // BLOCK_M
    tiles_per_split = (row_tiles + ROW_SPLITS - 1) // ROW_SPLITS
    first_r = first_row * PACK + row_split * tiles_per_split * BLOCK_M
    last_r = tl.minimum(first_r + tiles_per_split * BLOCK_M, row_stop * PACK)

    q_base = _of_layer(q, layer) + b * _of_layer(q_sb, layer)
    q_h = _of_layer(q_sh, layer)
    q_m = _of_layer(q_sm, layer)
    q_d = _of_layer(q_sd, layer)
    k_base = _of_layer(k, layer) + b * _of_layer(k_sb, layer)
    k_h = _of_layer(k_sh, layer)
    k_d = _of_layer(k_sd, layer)
    k_offset = key.to(tl.int64) * _of_layer(k_sn, layer)
    heads_per_key = _of_layer(groups, layer)
    if not BLOCK_SCOPE:
        lse_base = _of_layer(lse, layer) + layer.to(tl.int64) * lse_sl + b * _of_layer(lse_sb, layer)
        lse_h = _of_layer(lse_sh, layer)
        lse_m = _of_layer(lse_sm, layer)

    score = tl.zeros([BLOCK_N], tl.float32)
    count = tl.zeros([BLOCK_N], tl.int32)
    for pack in range(first_pack, last_pack):
        head = pack * PACK
        k_rows = k_base + (head // heads_per_key).to(tl.int64) * k_h + k_offset
        k0 = _load_chunk(k_rows, column_ok, k_d, 0, HEADDIM, BLOCK_D, UPCAST)
        if REDUCTION == "max":
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        else:
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(first_r, last_r, BLOCK_M):
            r = start + tl.arange(0, BLOCK_M)
            in_range = r < last_r
            row = r // PACK
            position = query_start + row
            row_head = (head + r % PACK).to(tl.int64)
            q_rows = q_base + row_head * q_h + row.to(tl.int64) * q_m
            q0 = _load_chunk(q_rows, in_range, q_d, 0, HEADDIM, BLOCK_D, UPCAST)
            logits = _logits_tile(
                q0, q_rows, in_range, q_d, k0, k_rows, column_ok, k_d, scale_log2, HEADDIM, BLOCK_D, UPCAST
            )
            row_ok = in_range
            if query_mask is not None:
                offset = b * query_mask_sb + row.to(tl.int64) * query_mask_sm
                row_ok = row_ok & (tl.load(query_mask + offset, mask=in_range, other=0) != 0)
            if MASKED_ROWS:
                offset = b * tokens_sb + (tokens_offset + row).to(tl.int64) * tokens_st
                row_ok = row_ok & (tl.load(tokens + offset, mask=in_range, other=0) == mask_token_id)
            sees = _visible(row_ok, position, key_ok, key, CAUSAL)
            if BLOCK_SCOPE:
                weights = _weights_tile(logits, logits, sees, True)
            else:
                lse_rows = lse_base + row_head * lse_h + row.to(tl.int64) * lse_m
                row_lse = _load_lse(lse_rows, in_range, lse_scale, LSE_SPLITS)
                weights = _weights_tile(logits, row_lse, sees, False)
            if not DIAGONAL:
                sees = sees & (key[None, :] != position[:, None])
                weights = tl.where(sees, weights, 0.0)
            if REDUCTION == "max":
                # The bits of non-negative numbers compare as they do, and NaN as the largest.
                acc = tl.maximum(acc, weights.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
            else:
                acc += weights
            if REDUCTION == "mean":
                first_head = (row_head == 0) & (layer == 0)
                count += tl.sum((sees & first_head[:, None]).to(tl.int32), 0)
        if REDUCTION == "max":
            score += tl.max(acc, 0).to(tl.float32, bitcast=True)
        else:
            score += tl.sum(acc, 0)

    finished = True
    if COMBINE:
        # partials[group, split, column], then, for the mean, as many counts.
        plane = n_groups.to(tl.int64) * splits * n_columns
        row_of = partials + group.to(tl.int64) * splits * n_columns + column
        tl.store(row_of + split.to(tl.int64) * n_columns, score, mask=column_ok)
        if REDUCTION == "mean":
            bits = count.to(tl.float32, bitcast=True)
            tl.store(row_of + plane + split.to(tl.int64) * n_columns, bits, mask=column_ok)
        finished = _is_last(counters + group * tiles + tile, splits)
    if finished:
        if COMBINE:
            score = tl.zeros([BLOCK_N], tl.float32)
            if REDUCTION == "max":
                offs = tl.arange(0, ROW_SPLITS)
                for index in range(0, n_layers * head_splits):
                    at = (index * ROW_SPLITS + offs).to(tl.int64)[:, None] * n_columns
                    part = tl.load(row_of[None, :] + at, mask=column_ok[None, :], other=0.0)
                    score += tl.max(part.to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)
            else:
                acc = tl.zeros([32, BLOCK_N], tl.float32)
                counts = tl.zeros([32, BLOCK_N], tl.int32)
                for start in range(0, splits, 32):
                    offs = start + tl.arange(0, 32)
                    at = offs.to(tl.int64)[:, None] * n_columns
                    ok = (offs < splits)[:, None] & column_ok[None, :]
                    acc += tl.load(row_of[None, :] + at, mask=ok, other=0.0)
                    if REDUCTION == "mean":
                        bits = tl.load(row_of[None, :] + plane + at, mask=ok, other=0.0)
                        counts += bits.to(tl.int32, bitcast=True)
                score = tl.sum(acc, 0)
                count = tl.sum(counts, 0)
        if REDUCTION == "mean":
            score = score / tl.maximum(count, 1).to(tl.float32)
        target = out + b * out_sb + column.to(tl.int64) * out_sc
        if PER_HEAD:
            target += first_pack.to(tl.int64) * out_sh
        if ACCUMULATE:
            score += tl.load(target, mask=column_ok, other=0.0)
        tl.store(target, score, mask=column_ok)
        if COMMIT:
            last_tile = _is_last(counters + n_groups * tiles + group, tiles)
            if last_tile:
                commit_row(
                    group,
                    out,
                    out_sb,
                    out_sc,
                    conf_partials,
                    conf_plane,
                    conf_splits,
                    tokens,
                    tokens_sb,
                    tokens_st,
                    block_start,
                    mask_token_id,
                    token_ids,
                    confidence,
                    selected,
                    n_columns,
                    tau,
                    METRIC,
                    POLICY,
                    FALLBACK,
                    COMMIT_BLOCK,
                    CONF_SPLITS,
                )


@triton.jit(
    do_not_specialize=[
        "n_rows",
        "n_columns",
        "row_start",
        "row_stop",
        "column_start",
        "query_start",
        "head_splits",
        "heads_per_split",
        "row_tiles",
        "column_tiles",
    ]
)
def _attention_map_kernel(
    q,
    q_sb,
    q_sh,
    q_sm,
    q_sd,
    k,
    k_sb,
    k_sh,
    k_sn,
    k_sd,
    n_heads,
    heads_per_key,
    lse,
    lse_sb,
    lse_sh,
    lse_sm,
    key_mask,
    key_mask_sb,
    key_mask_sn,
    query_mask,
    query_mask_sb,
    query_mask_sm,
    out,
    out_sb,
    out_sh,
    out_sr,
    out_sc,
    partials,
    counters,
    n_columns,
    row_start,
    row_stop,
    column_start,
    query_start,
    scale_log2,
    lse_scale,
    head_splits,
    heads_per_split,
    row_tiles,
    column_tiles,
    CAUSAL: tl.constexpr,
    DIAGONAL: tl.constexpr,
    BLOCK_SCOPE: tl.constexpr,
    PER_HEAD: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    LSE_SPLITS: tl.constexpr,
    COMBINE: tl.constexpr,
    HEADDIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of the map, over one split of the heads (or of one head, per head).

    Program: ((b * head_splits + head split) * row_tiles + row tile) * column_tiles + column tile.
    """
    pid = tl.program_id(0)
    column_tile = pid % column_tiles
    pid = pid // column_tiles
    row_tile = pid % row_tiles
    pid = pid // row_tiles
    head_split = pid % head_splits
    batch = pid // head_splits
    b = batch.to(tl.int64)
    first_head = head_split * heads_per_split
    last_head = tl.minimum(first_head + heads_per_split, n_heads)

    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = column < n_columns
    key = column_start + column
    key_ok = column_ok
    if key_mask is not None:
        offset = b * key_mask_sb + key.to(tl.int64) * key_mask_sn
        key_ok = key_ok & (tl.load(key_mask + offset, mask=column_ok, other=0) != 0)
    row = row_start + row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    in_range = row < row_stop
    position = query_start + row
    row_ok = in_range
    if BLOCK_SCOPE:
        row_ok = row_ok & (position >= column_start) & (position < column_start + n_columns)
    if query_mask is not None:
        offset = b * query_mask_sb + row.to(tl.int64) * query_mask_sm
        row_ok = row_ok & (tl.load(query_mask + offset, mask=in_range, other=0) != 0)
    sees = _visible(row_ok, position, key_ok, key, CAUSAL)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for head in range(first_head, last_head):
        q_rows = q + b * q_sb + head.to(tl.int64) * q_sh + row.to(tl.int64) * q_sm
        k_rows = k + b * k_sb + (head // heads_per_key).to(tl.int64) * k_sh + key.to(tl.int64) * k_sn
        q0 = _load_chunk(q_rows, in_range, q_sd, 0, HEADDIM, BLOCK_D, UPCAST)
        k0 = _load_chunk(k_rows, column_ok, k_sd, 0, HEADDIM, BLOCK_D, UPCAST)
        logits = _logits_tile(
            q0, q_rows, in_range, q_sd, k0, k_rows, column_ok, k_sd, scale_log2, HEADDIM, BLOCK_D, UPCAST
        )
        if lse is None:
            acc += _weights_tile(logits, logits, sees, True)
        else:
            lse_rows = lse + b * lse_sb + head.to(tl.int64) * lse_sh + row.to(tl.int64) * lse_sm
            acc += _weights_tile(logits, _load_lse(lse_rows, in_range, lse_scale, LSE_SPLITS), sees, False)
    if not DIAGONAL:
        acc = tl.where(key[None, :] != position[:, None], acc, 0.0)

    ok = in_range[:, None] & column_ok[None, :]
    finished = True
    if COMBINE:
        inside = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tile = (batch * row_tiles + row_tile) * column_tiles + column_tile
        tiles = partials + tile.to(tl.int64) * head_splits * BLOCK_M * BLOCK_N + inside
        tl.store(tiles + head_split * BLOCK_M * BLOCK_N, acc)
        finished = _is_last(counters + tile, head_splits)
    if finished:
        if COMBINE:
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for index in range(0, head_splits):
                acc += tl.load(tiles + index * BLOCK_M * BLOCK_N)
        target = out + b * out_sb
        if PER_HEAD:
            target += first_head.to(tl.int64) * out_sh
        target = target + (row - row_start).to(tl.int64)[:, None] * out_sr + column.to(tl.int64)[None, :] * out_sc
        if ACCUMULATE:
            acc += tl.load(target, mask=ok, other=0.0)
        tl.store(target, acc, mask=ok)
