"""The attention map: weights of query rows and columns, summed over heads or of each head.

A program makes a tile of it. Where rows are reduced to a number each, it walks along the columns and adds up
its tiles, or meets those alone where its rows stand. Whatever is split among programs, the last of them to
finish adds up in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

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
    find_keys,
    first_key_rows,
    gather,
    is_last,
    is_set,
    keys_ahead,
    load_block,
    load_lse,
    logit_scale,
    logit_units,
    logits_tile,
    lse_stride,
    near,
    place,
    products_tile,
    visible,
    weights_tile,
)


class Out(NamedTuple):
    """A map [B, R, C] or, per head, [B, Hq, R, C]; reduced, without the C."""

    data: Tensor
    stride_b: int
    stride_h: int
    stride_r: int
    stride_c: int


class Options(NamedTuple):
    """Compile-time options."""

    limited: bool  # to windows
    diagonal: bool
    reduction: str
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
        "column_splits",
        "row_tiles",
        "column_tiles",
    ]
)
def attention_map_kernel(
    layers,
    lse,
    keys,
    query_mask,
    column_mask,
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
    column_splits,
    row_tiles,
    column_tiles,
    OPTIONS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of the map of one layer, or one of its rows, over one split of the heads and columns.

    Program: ((group * splits + split) * row_tiles + row tile) * column_tiles + column tile, where a group is
    a row of the batch (or one head of it, per head), split = head split * column_splits + column split, and
    reduced rows have one column tile.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    pid = tl.program_id(0)
    column_tile = pid % column_tiles
    pid = pid // column_tiles
    row_tile = pid % row_tiles
    pid = pid // row_tiles
    splits = head_splits * column_splits
    split = pid % splits
    group = pid // splits
    if OPTIONS.per_head:
        b = (group // layers.heads[0]).to(tl.int64)
        first_head = group % layers.heads[0]
        last_head = first_head + 1
    else:
        b = group.to(tl.int64)
        first_head = split // column_splits * heads_per_split
        last_head = tl.minimum(first_head + heads_per_split, layers.heads[0])

    row = row_start + row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    in_range = row < row_stop
    position = query_start + row
    row_ok = is_set(query_mask, b, row, in_range)
    if OPTIONS.block_scope:
        row_ok = row_ok & (position >= column_start) & (position < column_start + n_columns)

    if OPTIONS.reduction == "none":
        first_tile = column_tile
        last_tile = column_tile + 1
    else:
        # The columns that a row of the tile may see, or that one stands at.
        own = query_start + row_start + row_tile * BLOCK_M - column_start
        before, after = left, right
        if OPTIONS.reduction == "diagonal":
            before, after = 0, 0
        first_tile = tl.maximum(own - before, 0) // BLOCK_N
        last_tile = (tl.minimum(own + BLOCK_M + after, n_columns) + BLOCK_N - 1) // BLOCK_N
        tiles_per_split = (last_tile - first_tile + column_splits - 1) // column_splits
        first_tile += split % column_splits * tiles_per_split
        last_tile = tl.minimum(first_tile + tiles_per_split, last_tile)

    q, k = layers.q, layers.k
    q_rows = q.data[0] + b * q.stride_b[0] + row.to(tl.int64) * q.stride_r[0]
    k_base = first_key_rows(layers, keys, 0, b)
    ahead = keys_ahead(keys, b)
    if OPTIONS.reduction == "none":
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(first_tile, last_tile):
        column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        column_ok = column < n_columns
        key = column_start + column
        there, key_ok, offset = find_keys(layers, keys, 0, b, key, column_ok, ahead, TILE)
        sees = visible(row_ok, position, key_ok, key, left, right, OPTIONS.limited)
        k_rows = k_base + offset
        part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for index in range(first_head, last_head):
            head = tl.cast(index, tl.int64)
            kv_head = head // layers.groups[0]
            q_block = load_block(q_rows + head * q.stride_h[0], in_range, q.stride_d[0], TILE)
            k_block = load_block(k_rows + kv_head * k.stride_h[0], there, k.stride_d[0], TILE)
            products = products_tile(q_block, k_block, TILE)
            factor, unit = logit_units(logit_scale(layers, 0, b, kv_head), TILE)
            logits = logits_tile(products, factor, TILE)
            if lse is None:
                part += weights_tile(logits, logits, logits, unit, sees, True)
            else:
                lse_rows = lse.data[0] + b * lse_stride(lse.stride_b, 0, OPTIONS.lse_splits)
                lse_rows += head * lse_stride(lse.stride_h, 0, OPTIONS.lse_splits)
                lse_rows += row.to(tl.int64) * lse.stride_m[0]
                top, rest = load_lse(lse_rows, in_range, lse.scale, unit, OPTIONS.lse_splits)
                part += weights_tile(logits, top, rest, unit, sees, False)
        if column_mask is not None:
            part = tl.where(is_set(column_mask, b, column, column_ok)[None, :], part, 0.0)
        if OPTIONS.reduction == "diagonal":
            part = tl.where(key[None, :] == position[:, None], part, 0.0)
        if not OPTIONS.diagonal:
            part = tl.where(key[None, :] != position[:, None], part, 0.0)
        if OPTIONS.reduction != "none":
            part = tl.sum(part, 1)
        acc += part

    finished = True
    if partials is not None:
        inside = tl.arange(0, BLOCK_M)
        SIZE = BLOCK_M
        if OPTIONS.reduction == "none":
            inside = inside[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
            SIZE = BLOCK_M * BLOCK_N
        place = (group * row_tiles + row_tile) * column_tiles + column_tile
        parts = partials + place.to(tl.int64) * splits * SIZE + inside
        tl.store(parts + split * SIZE, acc)
        finished = is_last(counters + place, splits)
    if finished:
        if partials is not None:
            acc = tl.zeros_like(acc)
            for index in range(0, splits):
                acc += tl.load(parts + index * SIZE)
        target = out.data + b * out.stride_b + (row - row_start).to(tl.int64) * out.stride_r
        ok = in_range
        if OPTIONS.per_head:
            target += first_head.to(tl.int64) * out.stride_h
        if OPTIONS.reduction == "none":
            column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
            target = target[:, None] + column.to(tl.int64)[None, :] * out.stride_c
            ok = ok[:, None] & (column < n_columns)[None, :]
        if OPTIONS.accumulate:
            acc += tl.load(target, mask=ok, other=0.0)
        tl.store(target, acc, mask=ok)


def attention_map(out: Tensor, layer: Layer, masks: Masks, options: Attention) -> None:
    if out.numel() == 0:
        return
    problem = gather([layer], masks, options.softmax_scale)
    options = place(options, masks, problem)
    device, rows, columns = problem.device, options.rows, options.columns
    window = Window.of(problem, options)
    n_rows, n_columns = rows.stop - rows.start, columns.stop - columns.start
    reduced = options.reduction != "none"
    cut = cut_columns("reduced_map" if reduced else "attention_map", problem, options, n_rows)
    lse = OF_TILE
    if not cut.of_tile:
        lse = row_lse(problem, [layer.softmax_lse], options, rows)

    block_m, block_n = cut.tile.block_m, cut.tile.block_n
    row_tiles, column_tiles = launch.cdiv(n_rows, block_m), launch.cdiv(n_columns, block_n)
    size = block_m * block_n
    # Two heads a part, or two tiles of a reduced row: their keys cost more than a partial result then.
    column_parts = column_tiles if options.reduction == "sum" else 1
    if reduced:
        column_tiles, size = 1, block_m
    tiles = row_tiles * column_tiles * (problem.heads if options.per_head else 1)
    head_splits = heads_per_split = 1
    if not options.per_head:
        heads_per_split = launch.cdiv(problem.heads, launch.parts(tiles, problem.heads, 2))
        head_splits = launch.cdiv(problem.heads, heads_per_split)
    column_splits = launch.parts(tiles * head_splits, column_parts, 2)
    tiles *= problem.batch
    splits = head_splits * column_splits
    partials = counters = None
    if splits > 1:
        partials = launch.workspace(device, tiles, splits, size)
        counters = launch.tickets(device, tiles)
    strides = out.stride()[2 if options.per_head else 1 :]  # of rows and columns, or of rows alone
    launch.launch(
        attention_map_kernel,
        tiles * splits,
        {
            "layers": problem.layers,
            "lse": lse.operand,
            "keys": problem.keys,
            "query_mask": Matrix.optional(masks.query_mask),
            "column_mask": Matrix.optional(masks.column_mask),
            "out": Out(out, out.stride(0), out.stride(1) if options.per_head else 0, strides[0], strides[-1]),
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
            "column_splits": column_splits,
            "row_tiles": row_tiles,
            "column_tiles": column_tiles,
            "OPTIONS": Options(
                window.limited,
                options.diagonal,
                options.reduction,
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
