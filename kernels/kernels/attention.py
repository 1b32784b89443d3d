"""Attention logits in tiles, and what is made of them: row log-sum-exp, column scores, attention map.

All three share ``_logits_tile`` and what follows it. In order:

1. ``_row_lse_kernel`` keeps a tile of query rows and streams keys. Where rows are few the keys are split
   among programs; the splits' results are combined, in a fixed order, by whoever reads them.
2. ``column_scores_kernel`` keeps a tile of keys (the columns) and streams query rows, over heads and
   layers. With the log-sum-exp known, no other key is read. Rows, heads and layers are split among programs
   where there are too few of those; the last program to finish a tile of columns adds the splits up in a
   fixed order, and in a decoding step the last one of a row of the batch selects and commits as well.
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
from .selection import NO_COMMIT, Commit, commit_row

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
def _widened(x):
    """float8 as float16, which can hold every e4m3; as bits (uint8) where the device has no such type."""
    if x.dtype == tl.uint8:
        # Exponent and fraction moved into place, a NaN's exponent filled up; the product rebases it.
        bits = x.to(tl.uint16)
        magnitude = (bits & 0x7F) << 7
        magnitude = magnitude | ((magnitude + 0x80) & 0x4000)
        x = (magnitude | ((bits & 0x80) << 8)).to(tl.float16, bitcast=True) * 256.0
    elif x.dtype == tl.float8e4nv:
        x = x.to(tl.float16)
    return x


@triton.jit
def _load_chunk(
    pointers,
    ok,
    stride_d,
    CHUNK: tl.constexpr,
    HEADDIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Chunk CHUNK of the head dimension of some rows: [BLOCK, BLOCK_D], zero where there is nothing."""
    offs_d = CHUNK * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = ok[:, None]
    if HEADDIM % BLOCK_D != 0:
        mask = mask & (offs_d < HEADDIM)[None, :]
    x = tl.load(pointers[:, None] + offs_d.to(tl.int64)[None, :] * stride_d, mask=mask, other=0.0)
    x = _widened(x)
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
def _logit_scale(scale_log2, b, kv_head, layer, q_descale, q_sb, q_sh, k_descale, k_sb, k_sh):
    """From products of a key head to logits to base 2."""
    scale = scale_log2
    if q_descale is not None:
        at = b * _of_layer(q_sb, layer) + kv_head * _of_layer(q_sh, layer)
        scale = scale * tl.load(_of_layer(q_descale, layer) + at)
    if k_descale is not None:
        at = b * _of_layer(k_sb, layer) + kv_head * _of_layer(k_sh, layer)
        scale = scale * tl.load(_of_layer(k_descale, layer) + at)
    return scale


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

    The increment releases this program's results and acquires the others'. It is one thread's: the first
    barrier puts the writes of all threads before it, the second puts their reads after it.
    """
    tl.debug_barrier()
    before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return before == total - 1


@triton.jit(
    do_not_specialize=[
        "n_batch",
        "row_start",
        "row_stop",
        "key_start",
        "key_stop",
        "query_start",
        "packs",
    ]
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
    q_descale,
    q_descale_sb,
    q_descale_sh,
    k_descale,
    k_descale_sb,
    k_descale_sh,
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

    Program: (((layer * B + b) * packs + pack) * row tiles + row tile) * SPLITS + split.
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
        kv_head = (head // _of_layer(groups, layer)).to(tl.int64)
        k_base = _of_layer(k, layer) + b * _of_layer(k_sb, layer) + kv_head * _of_layer(k_sh, layer)
        scale = _logit_scale(
            scale_log2,
            b,
            kv_head,
            layer,
            q_descale,
            q_descale_sb,
            q_descale_sh,
            k_descale,
            k_descale_sb,
            k_descale_sh,
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
            last = tl.maximum(tl.minimum(last, query_start + last_row + 1), key_start).to(tl.int32)
        m = tl.full([BLOCK_M], -_INF, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for start in range(first, last, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            key_ok = key < last
            k_rows = k_base + key.to(tl.int64) * k_n
            k0 = _load_chunk(k_rows, key_ok, k_d, 0, HEADDIM, BLOCK_D, UPCAST)
            logits = _logits_tile(
                q0, q_rows, row_ok, q_d, k0, k_rows, key_ok, k_d, scale, HEADDIM, BLOCK_D, UPCAST
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
    q_descale,
    q_descale_sb,
    q_descale_sh,
    k_descale,
    k_descale_sb,
    k_descale_sh,
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

    Program: (group * splits + split) * tiles + tile, where a group is a row of the batch (or one head of
    it, per head) and split = (layer * head_splits + head split) * ROW_SPLITS + row split.
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
    if lse is not None:
        lse_base = _of_layer(lse, layer) + layer.to(tl.int64) * lse_sl + b * _of_layer(lse_sb, layer)
        lse_h = _of_layer(lse_sh, layer)
        lse_m = _of_layer(lse_sm, layer)

    score = tl.zeros([BLOCK_N], tl.float32)
    count = tl.zeros([BLOCK_N], tl.int32)
    for pack in range(first_pack, last_pack):
        head = pack * PACK
        kv_head = (head // heads_per_key).to(tl.int64)
        k_rows = k_base + kv_head * k_h + k_offset
        scale = _logit_scale(
            scale_log2,
            b,
            kv_head,
            layer,
            q_descale,
            q_descale_sb,
            q_descale_sh,
            k_descale,
            k_descale_sb,
            k_descale_sh,
        )
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
                q0, q_rows, in_range, q_d, k0, k_rows, column_ok, k_d, scale, HEADDIM, BLOCK_D, UPCAST
            )
            row_ok = in_range
            if query_mask is not None:
                offset = b * query_mask_sb + row.to(tl.int64) * query_mask_sm
                row_ok = row_ok & (tl.load(query_mask + offset, mask=in_range, other=0) != 0)
            if MASKED_ROWS:
                offset = b * tokens_sb + (tokens_offset + row).to(tl.int64) * tokens_st
                row_ok = row_ok & (tl.load(tokens + offset, mask=in_range, other=0) == mask_token_id)
            sees = _visible(row_ok, position, key_ok, key, CAUSAL)
            if lse is None:
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
                # All heads and layers have the same rows: those of one are counted.
                counted = row_head == first_pack if PER_HEAD else (row_head == 0) & (layer == 0)
                count += tl.sum((sees & counted[:, None]).to(tl.int32), 0)
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
                    score += tl.max(part.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0).to(
                        tl.float32, bitcast=True
                    )
            else:
                acc = tl.zeros([32, BLOCK_N], tl.float32)
                counts = tl.zeros([32, BLOCK_N], tl.int32)
                for start in range(0, splits, 32):
                    offs = start + tl.arange(0, 32)
                    at = offs.to(tl.int64)[:, None] * n_columns
                    ok = (offs < splits)[:, None] & column_ok[None, :]
                    acc += tl.load(row_of[None, :] + at, mask=ok, other=0.0)
                    if REDUCTION == "mean":
                        part = tl.load(row_of[None, :] + plane + at, mask=ok, other=0.0)
                        counts += part.to(tl.int32, bitcast=True)
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
    q_descale,
    q_descale_sb,
    q_descale_sh,
    k_descale,
    k_descale_sb,
    k_descale_sh,
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
    for index in range(first_head, last_head):
        head = tl.cast(index, tl.int64)
        q_rows = q + b * q_sb + head * q_sh + row.to(tl.int64) * q_sm
        kv_head = head // heads_per_key
        k_rows = k + b * k_sb + kv_head * k_sh + key.to(tl.int64) * k_sn
        scale = _logit_scale(
            scale_log2,
            b,
            kv_head,
            0,
            q_descale,
            q_descale_sb,
            q_descale_sh,
            k_descale,
            k_descale_sb,
            k_descale_sh,
        )
        q0 = _load_chunk(q_rows, in_range, q_sd, 0, HEADDIM, BLOCK_D, UPCAST)
        k0 = _load_chunk(k_rows, column_ok, k_sd, 0, HEADDIM, BLOCK_D, UPCAST)
        logits = _logits_tile(
            q0, q_rows, in_range, q_sd, k0, k_rows, column_ok, k_sd, scale, HEADDIM, BLOCK_D, UPCAST
        )
        if lse is None:
            acc += _weights_tile(logits, logits, sees, True)
        else:
            lse_rows = lse + b * lse_sb + head * lse_sh + row.to(tl.int64) * lse_sm
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
            target += first_head * out_sh
        target = (
            target + (row - row_start).to(tl.int64)[:, None] * out_sr + column.to(tl.int64)[None, :] * out_sc
        )
        if ACCUMULATE:
            acc += tl.load(target, mask=ok, other=0.0)
        tl.store(target, acc, mask=ok)


def _fields(values: Sequence[int]) -> tuple[int, ...]:
    """One value for all layers where they agree, else one for each."""
    return (values[0],) if len(set(values)) == 1 else tuple(values)


class Layers(NamedTuple):
    """The layers' queries and keys as the kernels take them."""

    arguments: tuple[object, ...]  # pointers, strides, descales, heads and heads per key head
    descales: tuple[object, ...]
    batch: int
    n_rows: int
    headdim: int
    max_heads: int
    total_heads: int
    group: int  # number of query heads that share a key head in every layer
    n_layers: int


def _operand(x: Tensor) -> Tensor:
    """x as a kernel takes it: float8 as bits where the device does not convert it by itself."""
    is_bits = x.dtype == torch.float8_e4m3fn and not launch.converts_float8(x.device)
    return x.view(torch.uint8) if is_bits else x


def _descale_arguments(descale: Sequence[Tensor] | None) -> tuple[object, ...]:
    if not descale:
        return None, (0,), (0,)
    return (tuple(descale), *(_fields([x.stride(axis) for x in descale]) for axis in range(2)))


def gather(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    q_descale: Sequence[Tensor] | None = None,
    k_descale: Sequence[Tensor] | None = None,
) -> Layers:
    q, k = [_operand(x) for x in q], [_operand(x) for x in k]
    heads = [x.shape[1] for x in q]
    groups = [x.shape[1] // y.shape[1] for x, y in zip(q, k, strict=True)]
    strides = [tuple(_fields([x.stride(axis) for x in tensors]) for axis in range(4)) for tensors in (q, k)]
    descales = (*_descale_arguments(q_descale), *_descale_arguments(k_descale))
    arguments = (tuple(q), *strides[0], tuple(k), *strides[1], *descales, _fields(heads), _fields(groups))
    batch, _, n_rows, headdim = q[0].shape
    return Layers(
        arguments, descales, batch, n_rows, headdim, max(heads), sum(heads), math.gcd(*groups), len(q)
    )


def _tile(size: int, limit: int) -> int:
    """Tile size for so many rows or columns: a power of two, from 16 (tl.dot's least) to the limit."""
    return min(limit, max(16, triton.next_power_of_2(size)))


def largest_softmax_tile(q: Tensor) -> int:
    """The most keys whose softmax is taken inside one tile."""
    return 64 if q.element_size() == 4 else 128


def _listed(x: Tensor | None) -> list[Tensor] | None:
    return None if x is None else [x]


def _mask_arguments(mask: Tensor | None) -> tuple[object, ...]:
    return (mask, 0, 0) if mask is None else (mask, *mask.stride())


class _Lse(NamedTuple):
    """Where a kernel finds the row log-sum-exp, and how many splits of each value."""

    arguments: tuple[object, ...]  # pointers (None: of the tile itself), layer stride, strides
    scale: float  # to base 2
    splits: int


_OF_TILE = _Lse((None, 0, (0,), (0,), (0,)), 1.0, 1)


def _given_lse(softmax_lse: Sequence[Tensor], lse_base: str) -> _Lse:
    strides = (_fields([x.stride(axis) for x in softmax_lse]) for axis in range(3))
    return _Lse((tuple(softmax_lse), 0, *strides), _LOG2E if lse_base == "e" else 1.0, 1)


def _computed_lse(
    layers: Layers,
    q: Tensor,
    key_mask: Tensor | None,
    rows: tuple[int, int],
    keys: tuple[int, int],
    query_start: int,
    scale: float,
    causal: bool,
) -> _Lse:
    """Launch the row log-sum-exp of all layers over the keys of a range."""
    device = q.device
    n_rows = (rows[1] - rows[0]) * layers.group
    shape_class = launch.attention_class(n_rows, layers.headdim, q.element_size())
    parameters = launch.config("row_lse", shape_class, device)
    block_m = _tile(n_rows, parameters.block_m)
    block_n = _tile(keys[1] - keys[0], parameters.block_n)
    packs = layers.max_heads // layers.group
    programs = layers.n_layers * layers.batch * packs * triton.cdiv(max(n_rows, 0), block_m)
    splits = 1
    while (
        splits < 32
        and 2 * splits * block_n < keys[1] - keys[0]
        and programs * splits < 2 * launch.processors(device)
    ):
        splits *= 2
    lse = launch.workspace(q, layers.n_layers, layers.batch, layers.max_heads, layers.n_rows, splits)
    if programs > 0:
        launch.launch(
            _row_lse_kernel,
            programs * splits,
            (
                *layers.arguments,
                *_mask_arguments(key_mask),
                lse,
                lse.stride(0),
                layers.max_heads,
                layers.batch,
                layers.n_rows,
                *rows,
                *keys,
                query_start,
                packs,
                scale * _LOG2E,
            ),
            {
                "CAUSAL": causal,
                "SPLITS": splits,
                "PACK": layers.group,
                "HEADDIM": layers.headdim,
                "BLOCK_M": block_m,
                "BLOCK_N": block_n,
                "BLOCK_D": launch.block_d(layers.headdim, q.element_size()),
                "UPCAST": launch.INTERPRET,
            },
            parameters,
            device=device,
        )
    return _Lse(((lse,), lse.stride(0), *((s,) for s in lse.stride()[1:4])), 1.0, splits)


class ColumnPlan(NamedTuple):
    """How a column reduction is cut into programs."""

    parameters: launch.Config
    block_m: int
    block_n: int
    pack: int
    rows: tuple[int, int]  # the query rows that can contribute
    of_tile: bool  # the softmax's keys fit one tile
    groups: int  # rows of the output
    tiles: int
    head_splits: int
    row_splits: int
    packs_per_split: int
    counters: int  # how many the kernel needs, without those of a commit


def plan_columns(
    layers: Layers,
    q: Tensor,
    column_start: int,
    column_stop: int,
    query_start: int,
    softmax_scope: str,
    reduction: str,
    per_head: bool,
) -> ColumnPlan:
    n_columns = column_stop - column_start
    rows = (0, layers.n_rows)
    # Per head, and for the maximum of each head's rows, heads stay apart.
    pack = 1 if per_head or reduction == "max" else layers.group
    shape_class = launch.attention_class(n_columns, layers.headdim, q.element_size())
    parameters = launch.config("column_scores", shape_class, q.device)
    block_m, block_n = parameters.block_m, _tile(n_columns, parameters.block_n)
    of_tile = softmax_scope == "block" and n_columns <= largest_softmax_tile(q)
    if softmax_scope == "block":
        rows = _rows_at(column_start, column_stop, query_start, layers.n_rows)
    if of_tile:
        block_m, block_n = min(32, block_m), _tile(n_columns, largest_softmax_tile(q))
    packed_rows = (rows[1] - rows[0]) * pack
    block_m = _tile(packed_rows, block_m)

    groups = layers.batch * (layers.max_heads if per_head else 1)
    tiles = triton.cdiv(n_columns, block_n)
    packs = 1 if per_head else layers.max_heads // pack
    row_tiles = triton.cdiv(packed_rows, block_m)
    wanted = 4 * launch.processors(q.device) // max(groups * tiles * layers.n_layers, 1)
    packs_per_split = triton.cdiv(packs, min(packs, max(wanted, 1)))
    head_splits = triton.cdiv(packs, packs_per_split)
    row_splits = 1
    # A program has two tiles of rows at the least, or loading its keys costs more than its rows.
    while (
        packs_per_split == 1
        and row_splits < 64
        and 4 * row_splits <= row_tiles
        and head_splits * row_splits < wanted
    ):
        row_splits *= 2
    return ColumnPlan(
        parameters,
        block_m,
        block_n,
        pack,
        rows,
        of_tile,
        groups,
        tiles,
        head_splits,
        row_splits,
        packs_per_split,
        groups * tiles,
    )


def _rows_at(column_start: int, column_stop: int, query_start: int, n_rows: int) -> tuple[int, int]:
    """The query rows that stand at the columns."""
    first = min(max(column_start - query_start, 0), n_rows)
    return first, max(first, min(column_stop - query_start, n_rows))


def reduce_columns(
    plan: ColumnPlan,
    layers: Layers,
    out: Tensor,
    q: Sequence[Tensor],
    softmax_lse: Sequence[Tensor] | None,
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
    n_keys: int,
    commit: Commit | None = None,
    counters: Tensor | None = None,
) -> None:
    """Column scores of all layers in one launch (two where the log-sum-exp is to be computed).

    With ``commit``, the kernel also finishes the decoding step; ``counters`` are zero then, one for each tile
    and one for each row of the batch.
    """
    device = out.device
    n_columns = column_stop - column_start
    if plan.of_tile:
        lse = _OF_TILE
    elif softmax_lse:
        lse = _given_lse(softmax_lse, lse_base)
    else:
        keys = (column_start, column_stop) if softmax_scope == "block" else (0, n_keys)
        lse = _computed_lse(layers, q[0], key_mask, plan.rows, keys, query_start, softmax_scale, causal)

    splits = layers.n_layers * plan.head_splits * plan.row_splits
    partials = None
    if splits > 1:
        partials = launch.workspace(out, 2 if reduction == "mean" else 1, plan.groups, splits, n_columns)
        if counters is None:
            counters = torch.zeros(plan.counters, dtype=torch.int32, device=device)
    # Where the last program may not, a launch of its own commits.
    in_kernel = commit if launch.last_program_commits(device) else None
    launch.launch(
        column_scores_kernel,
        plan.groups * splits * plan.tiles,
        (
            *layers.arguments,
            *lse.arguments,
            *_mask_arguments(key_mask),
            *_mask_arguments(query_mask),
            *((None, 0, 0, 0, 0) if commit is None else commit.token_arguments(query_start - column_start)),
            out,
            out.stride(0),
            out.stride(1) if per_head else 0,
            out.stride(-1),
            partials,
            counters,
            plan.groups,
            n_columns,
            *plan.rows,
            column_start,
            query_start,
            softmax_scale * _LOG2E,
            lse.scale,
            layers.n_layers,
            plan.head_splits,
            plan.packs_per_split,
            plan.tiles,
            *(in_kernel.arguments() if in_kernel else (None, 0, 0, 0, None, None, None, 0.0)),
        ),
        {
            "CAUSAL": causal,
            "DIAGONAL": diagonal,
            "REDUCTION": reduction,
            "PER_HEAD": per_head,
            "ACCUMULATE": accumulate,
            "MASKED_ROWS": commit is not None and commit.masked_rows_only,
            "LSE_SPLITS": lse.splits,
            "ROW_SPLITS": plan.row_splits,
            "COMBINE": splits > 1,
            "COMMIT": in_kernel is not None,
            **(in_kernel.constants() if in_kernel else NO_COMMIT),
            "PACK": plan.pack,
            "HEADDIM": layers.headdim,
            "BLOCK_M": plan.block_m,
            "BLOCK_N": plan.block_n,
            "BLOCK_D": launch.block_d(layers.headdim, q[0].element_size()),
            "UPCAST": launch.INTERPRET,
        },
        plan.parameters,
        device=device,
    )
    if commit is not None and in_kernel is None:
        commit.launch(out)


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
    if q.shape[0] == 0:
        return
    layers = gather([q], [k], _listed(q_descale), _listed(k_descale))
    plan = plan_columns(layers, q, column_start, column_stop, query_start, softmax_scope, reduction, per_head)
    reduce_columns(
        plan,
        layers,
        out,
        [q],
        _listed(softmax_lse),
        key_mask,
        query_mask,
        column_start,
        column_stop,
        query_start,
        softmax_scale,
        lse_base,
        causal,
        softmax_scope,
        diagonal,
        reduction,
        per_head,
        accumulate,
        k.shape[2],
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
    if out.numel() == 0:
        return
    device = q.device
    layers = gather([q], [k], _listed(q_descale), _listed(k_descale))
    heads, n_keys = layers.max_heads, k.shape[2]
    n_rows, n_columns = row_stop - row_start, column_stop - column_start
    shape_class = launch.attention_class(n_columns, layers.headdim, q.element_size())
    parameters = launch.config("attention_map", shape_class, device)
    block_m, block_n = parameters.block_m, _tile(n_columns, parameters.block_n)
    of_tile = softmax_scope == "block" and n_columns <= largest_softmax_tile(q)
    if of_tile:
        block_m, block_n = min(32, block_m), _tile(n_columns, largest_softmax_tile(q))
    block_m = _tile(n_rows, block_m)
    if of_tile:
        lse = _OF_TILE
    elif softmax_lse is not None:
        lse = _given_lse([softmax_lse], lse_base)
    else:
        keys = (column_start, column_stop) if softmax_scope == "block" else (0, n_keys)
        rows = (row_start, row_stop)
        lse = _computed_lse(layers, q, key_mask, rows, keys, query_start, softmax_scale, causal)
    pointers, _, *lse_strides = lse.arguments

    row_tiles, column_tiles = triton.cdiv(n_rows, block_m), triton.cdiv(n_columns, block_n)
    tiles = layers.batch * row_tiles * column_tiles
    wanted = max(1, 2 * launch.processors(device) // tiles)
    heads_per_split = 1 if per_head else triton.cdiv(heads, min(heads, wanted))
    head_splits = triton.cdiv(heads, heads_per_split)
    combine = head_splits > 1 and not per_head
    partials = counters = None
    if combine:
        partials = launch.workspace(out, tiles, head_splits, block_m, block_n)
        counters = torch.zeros(tiles, dtype=torch.int32, device=device)
    launch.launch(
        _attention_map_kernel,
        tiles * head_splits,
        (
            _operand(q),
            *q.stride(),
            _operand(k),
            *k.stride(),
            *layers.descales,
            heads,
            layers.group,
            None if pointers is None else pointers[0],  # type: ignore[index]
            *(stride[0] for stride in lse_strides),  # type: ignore[index]
            *_mask_arguments(key_mask),
            *_mask_arguments(query_mask),
            out,
            out.stride(0),
            out.stride(1) if per_head else 0,
            *out.stride()[-2:],
            partials,
            counters,
            n_columns,
            row_start,
            row_stop,
            column_start,
            query_start,
            softmax_scale * _LOG2E,
            lse.scale,
            head_splits,
            heads_per_split,
            row_tiles,
            column_tiles,
        ),
        {
            "CAUSAL": causal,
            "DIAGONAL": diagonal,
            "BLOCK_SCOPE": softmax_scope == "block",
            "PER_HEAD": per_head,
            "ACCUMULATE": accumulate,
            "LSE_SPLITS": lse.splits,
            "COMBINE": combine,
            "HEADDIM": layers.headdim,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_D": launch.block_d(layers.headdim, q.element_size()),
            "UPCAST": launch.INTERPRET,
        },
        parameters,
        device=device,
    )
