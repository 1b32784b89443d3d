"""The log-sum-exp of query rows, from their queries and keys.

The kernel keeps a tile of query rows and streams keys. Where rows are few the keys are split among programs;
the splits' results are combined, in a fixed order, by whoever reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from attn_sampler.checks import Span
from attn_sampler.options import LOG2E, Attention

from . import launch
from .tile import (
    Lse,
    Problem,
    Window,
    find_keys,
    first_key_rows,
    fitting,
    keys_ahead,
    load_block,
    logit_scale,
    logit_units,
    logits_tile,
    near,
    of_layer,
    products_tile,
    safe_max,
    shared_strides,
    tile_of,
    visible,
)

_INF = tl.constexpr(float("inf"))


class Options(NamedTuple):
    """Compile-time options."""

    limited: bool  # to windows
    splits: int
    pack: int


@triton.jit(
    do_not_specialize=[
        "n_heads",
        "n_rows",
        "n_batch",
        "row_start",
        "row_stop",
        "key_start",
        "key_stop",
        "query_start",
        "left",
        "right",
        "packs",
    ]
)
def row_lse_kernel(
    layers,
    keys,
    lse,
    stride_layer,
    n_heads,
    n_rows,
    n_batch,
    row_start,
    row_stop,
    key_start,
    key_stop,
    query_start,
    left,
    right,
    packs,
    OPTIONS: tl.constexpr,
    TILE: tl.constexpr,
):
    """lse[layer, b, head, row, 0 and 1, split] of a tile of packed rows over a split of the keys.

    Program: (((layer * B + b) * packs + pack) * row tiles + row tile) * SPLITS + split.
    """
    SPLITS: tl.constexpr = OPTIONS.splits
    PACK: tl.constexpr = OPTIONS.pack
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
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
    if head < of_layer(layers.heads, layer):
        r = row_start * PACK + row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row_ok = r < row_stop * PACK
        row = r // PACK
        position = query_start + row
        q_rows = (
            of_layer(layers.q.data, layer)
            + b * of_layer(layers.q.stride_b, layer)
            + (head + r % PACK).to(tl.int64) * of_layer(layers.q.stride_h, layer)
            + row.to(tl.int64) * of_layer(layers.q.stride_r, layer)
        )
        q_d = of_layer(layers.q.stride_d, layer)
        kv_head = (head // of_layer(layers.groups, layer)).to(tl.int64)
        k_base = first_key_rows(layers, keys, layer, b) + kv_head * of_layer(layers.k.stride_h, layer)
        ahead = keys_ahead(keys, b)
        factor, unit = logit_units(logit_scale(layers, layer, b, kv_head), TILE)
        k_d = of_layer(layers.k.stride_d, layer)
        q = load_block(q_rows, row_ok, q_d, TILE)

        span = (key_stop - key_start + SPLITS - 1) // SPLITS
        span = (span + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        first = key_start + split * span
        last = tl.minimum(first + span, key_stop)
        if OPTIONS.limited:  # the tile's first row sees nothing before, its last one nothing beyond
            first_r = row_start * PACK + row_tile * BLOCK_M
            last_row = tl.minimum((first_r + BLOCK_M - 1) // PACK, row_stop - 1)
            last = tl.maximum(tl.minimum(last, query_start + last_row + right + 1), key_start).to(tl.int32)
            first = tl.minimum(tl.maximum(first, query_start + first_r // PACK - left), last).to(tl.int32)
        if keys.lengths is not None:
            first = tl.minimum(tl.maximum(first, ahead), last)
        m = tl.full([BLOCK_M], -_INF, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for start in range(first, last, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            there, key_ok, offset = find_keys(layers, keys, layer, b, key, key < last, ahead, TILE)
            k = load_block(k_base + offset, there, k_d, TILE)
            logits = logits_tile(products_tile(q, k, TILE), factor, TILE)
            logits = tl.where(
                visible(row_ok, position, key_ok, key, left, right, OPTIONS.limited), logits, -_INF
            )
            new_m = tl.maximum(m, tl.max(logits, 1))
            shift = safe_max(new_m)
            total = total * tl.exp2((m - shift) * unit) + tl.sum(tl.exp2((logits - shift[:, None]) * unit), 1)
            m = new_m
        out = lse + layer.to(tl.int64) * stride_layer + (head + r % PACK + b * n_heads) * n_rows * 2 * SPLITS
        out += row.to(tl.int64) * 2 * SPLITS + split
        tl.store(out, m, mask=row_ok)
        tl.store(out + SPLITS, tl.log2(total), mask=row_ok)


class RowLse(NamedTuple):
    """Where a kernel finds the row log-sum-exp, and in how many splits."""

    operand: Lse | None  # None: it is that of the tile itself
    stride_layer: int  # of what lies in one tensor for all layers
    splits: int  # 0: it was given


OF_TILE = RowLse(None, 0, 0)


def row_lse(
    problem: Problem,
    softmax_lse: Sequence[Tensor | None],
    options: Attention,
    rows: Span,
) -> RowLse:
    """The row log-sum-exp of all layers, as it was given or launched here for a range of rows."""
    if softmax_lse[0] is not None:
        scale = LOG2E if options.lse_base == "e" else 1.0
        (b, h, m) = shared_strides(softmax_lse)
        strides = tuple(16 * x for x in b), tuple(16 * x for x in h), m
        return RowLse(Lse(tuple(softmax_lse), *strides, scale), 0, 0)
    keys = options.columns if options.softmax_scope == "block" else Span(0, problem.n_keys)
    return _computed(problem, options, rows, keys)


def _computed(
    problem: Problem,
    options: Attention,
    rows: Span,
    keys: Span,
) -> RowLse:
    device, pack = problem.device, problem.group
    n_layers = len(problem.layers.q.data)
    n_keys, window = keys.stop - keys.start, Window.of(problem, options)
    n_rows = (rows.stop - rows.start) * pack
    shape_class = launch.attention_class(n_rows, problem.headdim, problem.element_size)
    parameters = launch.config("row_lse", shape_class, device)
    block_m = fitting(n_rows, parameters.block_m)
    block_n = fitting(n_keys, parameters.block_n)
    packs = problem.heads // pack
    of_sequence = packs * launch.cdiv(n_rows, block_m)
    programs = n_layers * problem.batch * of_sequence
    # A part has four tiles of keys, 64 KB of most shapes. A power of two of them, which a reader of the
    # results loads at once, and few, which add 8 bytes to what it reads of a row.
    parts = launch.parts(of_sequence, launch.cdiv(n_keys, block_n), 4)
    splits = min(32, 1 << (parts.bit_length() - 1))
    # Whole groups of 16 rows: the strides differ by that, in what they divide by, for no number of rows.
    kept_rows = launch.cdiv(problem.n_rows, 16) * 16
    lse = launch.workspace(device, n_layers, problem.batch, problem.heads, kept_rows, 2, splits)
    if programs > 0:
        launch.launch(
            row_lse_kernel,
            programs * splits,
            {
                "layers": problem.layers,
                "keys": problem.keys,
                "lse": lse,
                "stride_layer": lse.stride(0),
                "n_heads": problem.heads,
                "n_rows": kept_rows,
                "n_batch": problem.batch,
                "row_start": rows.start,
                "row_stop": rows.stop,
                "key_start": keys.start,
                "key_stop": keys.stop,
                "query_start": near(options.query_start),
                "left": window.left,
                "right": window.right,
                "packs": packs,
                "OPTIONS": Options(window.limited, splits, pack),
                "TILE": tile_of(problem, block_m, block_n),
            },
            parameters,
            device=device,
        )
    return RowLse(Lse((lse,), *((s,) for s in lse.stride()[1:4]), 1.0), lse.stride(0), splits)
