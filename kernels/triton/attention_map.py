"""The attention map: weights of query rows and columns, summed over heads or of each head."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_sampler.options import Attention, Layer, Masks

from . import launch
from .row_lse import OF_TILE, row_lse
from .tile import (
    Matrix,
    Window,
    cut_columns,
    gather,
    is_last,
    is_set,
    load_block,
    load_lse,
    logit_scale,
    logit_units,
    logits_tile,
    near,
    products_tile,
    visible,
    weights_tile,
)


class Out(NamedTuple):
    """A map [B, R, C] or, per head, [B, Hq, R, C]."""

    data: Tensor
    stride_b: int
    stride_h: int
    stride_r: int
    stride_c: int


class Options(NamedTuple):
    """Compile-time options."""

    limited: bool  # to windows
    diagonal: bool
    block_scope: bool
    per_head: bool
    accumulate: bool
    lse_splits: int


@triton.jit(
    do_not_specialize=[
        "n_columns",
        "row_start",
        "row_stop",
        "column_start",
        "query_start",
        "left",
        "right",
        "head_splits",
        "heads_per_split",
        "row_tiles",
        "column_tiles",
    ]
)
def attention_map_kernel(
    layers,
    lse,
    key_mask,
    query_mask,
    out,
    partials,
    counters,
    n_columns,
    row_start,
    row_stop,
    column_start,
    query_start,
    left,
    right,
    head_splits,
    heads_per_split,
    row_tiles,
    column_tiles,
    OPTIONS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of the map of one layer, over one split of the heads (or of one head, per head).

    Program: ((b * head_splits + head split) * row_tiles + row tile) * column_tiles + column tile.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    pid = tl.program_id(0)
    column_tile = pid % column_tiles
    pid = pid // column_tiles
    row_tile = pid % row_tiles
    pid = pid // row_tiles
    head_split = pid % head_splits
    batch = pid // head_splits
    b = batch.to(tl.int64)
    first_head = head_split * heads_per_split
    last_head = tl.minimum(first_head + heads_per_split, layers.heads[0])

    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = column < n_columns
    key = column_start + column
    key_ok = is_set(key_mask, b, key, column_ok)
    row = row_start + row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    in_range = row < row_stop
    position = query_start + row
    row_ok = is_set(query_mask, b, row, in_range)
    if OPTIONS.block_scope:
        row_ok = row_ok & (position >= column_start) & (position < column_start + n_columns)
    sees = visible(row_ok, position, key_ok, key, left, right, OPTIONS.limited)

    q, k = layers.q, layers.k
    q_rows = q.data[0] + b * q.stride_b[0] + row.to(tl.int64) * q.stride_r[0]
    k_rows = k.data[0] + b * k.stride_b[0] + key.to(tl.int64) * k.stride_r[0]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for index in range(first_head, last_head):
        head = tl.cast(index, tl.int64)
        kv_head = head // layers.groups[0]
        q_block = load_block(q_rows + head * q.stride_h[0], in_range, q.stride_d[0], TILE)
        k_block = load_block(k_rows + kv_head * k.stride_h[0], column_ok, k.stride_d[0], TILE)
        products = products_tile(q_block, k_block, TILE)
        factor, unit = logit_units(logit_scale(layers, 0, b, kv_head), TILE)
        logits = logits_tile(products, factor, TILE)
        if lse is None:
            acc += weights_tile(logits, logits, logits, unit, sees, True)
        else:
            lse_rows = lse.data[0] + b * lse.stride_b[0] + head * lse.stride_h[0]
            lse_rows += row.to(tl.int64) * lse.stride_m[0]
            top, rest = load_lse(lse_rows, in_range, lse.scale, unit, OPTIONS.lse_splits)
            acc += weights_tile(logits, top, rest, unit, sees, False)
    if not OPTIONS.diagonal:
        acc = tl.where(key[None, :] != position[:, None], acc, 0.0)

    ok = in_range[:, None] & column_ok[None, :]
    finished = True
    if partials is not None:
        inside = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tile = (batch * row_tiles + row_tile) * column_tiles + column_tile
        tiles = partials + tile.to(tl.int64) * head_splits * BLOCK_M * BLOCK_N + inside
        tl.store(tiles + head_split * BLOCK_M * BLOCK_N, acc)
        finished = is_last(counters + tile, head_splits)
    if finished:
        if partials is not None:
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for index in range(0, head_splits):
                acc += tl.load(tiles + index * BLOCK_M * BLOCK_N)
        target = out.data + b * out.stride_b
        if OPTIONS.per_head:
            target += first_head * out.stride_h
        target = (
            target
            + (row - row_start).to(tl.int64)[:, None] * out.stride_r
            + column.to(tl.int64)[None, :] * out.stride_c
        )
        if OPTIONS.accumulate:
            acc += tl.load(target, mask=ok, other=0.0)
        tl.store(target, acc, mask=ok)


def attention_map(out: Tensor, layer: Layer, masks: Masks, options: Attention) -> None:
    if out.numel() == 0:
        return
    problem = gather([layer], options.softmax_scale)
    device, rows, columns = problem.device, options.rows, options.columns
    window = Window.of(problem, options)
    n_rows, n_columns = rows.stop - rows.start, columns.stop - columns.start
    cut = cut_columns("attention_map", problem, options, n_rows)
    lse = OF_TILE
    if not cut.of_tile:
        lse = row_lse(problem, [layer.softmax_lse], masks.key_mask, options, rows)

    block_m, block_n = cut.tile.block_m, cut.tile.block_n
    row_tiles, column_tiles = launch.cdiv(n_rows, block_m), launch.cdiv(n_columns, block_n)
    tiles = problem.batch * row_tiles * column_tiles
    wanted = max(1, 2 * launch.processors(device) // tiles)
    heads_per_split = 1 if options.per_head else launch.cdiv(problem.heads, min(problem.heads, wanted))
    head_splits = launch.cdiv(problem.heads, heads_per_split)
    partials = counters = None
    if head_splits > 1 and not options.per_head:
        partials = launch.workspace(device, tiles, head_splits, block_m, block_n)
        counters = torch.zeros(tiles, dtype=torch.int32, device=device)
    launch.launch(
        attention_map_kernel,
        tiles * head_splits,
        {
            "layers": problem.layers,
            "lse": lse.operand,
            "key_mask": Matrix.optional(masks.key_mask),
            "query_mask": Matrix.optional(masks.query_mask),
            "out": Out(out, out.stride(0), out.stride(1) if options.per_head else 0, *out.stride()[-2:]),
            "partials": partials,
            "counters": counters,
            "n_columns": n_columns,
            "row_start": rows.start,
            "row_stop": rows.stop,
            "column_start": columns.start,
            "query_start": near(options.query_start),
            "left": window.left,
            "right": window.right,
            "head_splits": head_splits,
            "heads_per_split": heads_per_split,
            "row_tiles": row_tiles,
            "column_tiles": column_tiles,
            "OPTIONS": Options(
                window.limited,
                options.diagonal,
                options.softmax_scope == "block",
                options.per_head,
                options.accumulate,
                lse.splits,
            ),
            "TILE": cut.tile,
        },
        cut.parameters,
        device=device,
    )
