"""Column scores: attention weights, summed over query rows, heads and layers.

The kernel keeps a tile of keys (the columns) and streams query rows, over heads and layers. With the
log-sum-exp known, no other key is read. Rows and heads are split among programs, and layers always are. The
last program to finish a tile of columns in a layer adds up the layer's splits, the last one of all layers
adds those up, and in a decoding step the last one of a row of the batch selects and commits as well.

All of that goes in a fixed order, that of the layers one after another: a layer is cut as if it were alone
(``launch.parts``), so layers of the same number of heads give the bits in one call that they give in one
after another that accumulates (but for the mean, which divides once).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from attn_sampler.checks import Span
from attn_sampler.options import Attention, Layer, Masks

from . import launch
from .row_lse import OF_TILE, row_lse
from .select_tokens import commit_row
from .tile import (
    Cut,
    Matrix,
    Problem,
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
    of_layer,
    place,
    products_tile,
    visible,
    weights_tile,
)


class Out(NamedTuple):
    """Scores [B, C] or, per head, [B, Hq, C]."""

    data: Tensor
    stride_b: int
    stride_h: int
    stride_c: int


class Options(NamedTuple):
    """Compile-time options."""

    limited: bool  # to windows
    diagonal: bool
    reduction: str
    per_head: bool
    accumulate: bool
    masked_rows: bool  # only rows of masked tokens count
    lse_splits: int
    pack: int
    is_cut: bool  # each layer, into several splits


@triton.jit(
    do_not_specialize=[
        "n_groups",
        "n_columns",
        "row_start",
        "row_stop",
        "column_start",
        "query_start",
        "left",
        "right",
        "head_splits",
        "row_splits",
        "packs_per_split",
        "tiles",
        "block_start",
        "mask_token_id",
        "plane",
        "n_splits",
    ]
)
def column_scores_kernel(
    layers,
    lse,
    stride_layer,
    keys,
    query_mask,
    out,
    partials,
    counters,
    n_groups,
    n_columns,
    row_start,
    row_stop,
    column_start,
    query_start,
    left,
    right,
    head_splits,
    row_splits,
    packs_per_split,
    tiles,
    tokens,
    block_start,
    mask_token_id,
    commit,
    plane,
    n_splits,
    OPTIONS: tl.constexpr,
    COMMIT: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of columns of one layer, over one split of the rows and packs of heads.

    Program: ((group * layers + layer) * splits + split) * tiles + tile, where a group is a row of the batch
    (or one head of it, per head) and split = head split * row_splits + row split.
    """
    REDUCTION: tl.constexpr = OPTIONS.reduction
    N_LAYERS: tl.constexpr = len(layers.q.data)
    PACK: tl.constexpr = OPTIONS.pack
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    pid = tl.program_id(0)
    tile = pid % tiles
    pid = pid // tiles
    splits = head_splits * row_splits
    split = pid % splits
    pid = pid // splits
    layer = pid % N_LAYERS
    group = pid // N_LAYERS
    head_split = split // row_splits
    row_split = split % row_splits

    n_heads = of_layer(layers.heads, layer)
    if OPTIONS.per_head:
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
    ahead = keys_ahead(keys, b)
    there, key_ok, k_offset = find_keys(layers, keys, layer, b, key, column_ok, ahead, TILE)

    # The packed rows of this split: whole tiles, so that a split is never shared.
    first_row, end_row = row_start, row_stop
    if OPTIONS.limited:  # other rows see nothing of the tile
        own = column_start + tile * BLOCK_N - query_start  # the row that stands at the first column
        first_row = tl.minimum(tl.maximum(row_start, own - right), row_stop).to(tl.int32)
        end_row = tl.maximum(tl.minimum(row_stop, own + BLOCK_N + left), first_row).to(tl.int32)
    row_tiles = ((end_row - first_row) * PACK + BLOCK_M - 1) // BLOCK_M
    tiles_per_split = (row_tiles + row_splits - 1) // row_splits
    first_r = first_row * PACK + row_split * tiles_per_split * BLOCK_M
    last_r = tl.minimum(first_r + tiles_per_split * BLOCK_M, end_row * PACK)

    q_base = of_layer(layers.q.data, layer) + b * of_layer(layers.q.stride_b, layer)
    q_h = of_layer(layers.q.stride_h, layer)
    q_m = of_layer(layers.q.stride_r, layer)
    q_d = of_layer(layers.q.stride_d, layer)
    k_base = first_key_rows(layers, keys, layer, b)
    k_h = of_layer(layers.k.stride_h, layer)
    k_d = of_layer(layers.k.stride_d, layer)
    heads_per_key = of_layer(layers.groups, layer)
    if lse is not None:
        lse_base = (
            of_layer(lse.data, layer)
            + layer.to(tl.int64) * stride_layer
            + b * lse_stride(lse.stride_b, layer, OPTIONS.lse_splits)
        )
        lse_h = lse_stride(lse.stride_h, layer, OPTIONS.lse_splits)
        lse_m = of_layer(lse.stride_m, layer)

    score = tl.zeros([BLOCK_N], tl.float32)
    count = tl.zeros([BLOCK_N], tl.int32)
    for pack in range(first_pack, last_pack):
        head = pack * PACK
        kv_head = (head // heads_per_key).to(tl.int64)
        factor, unit = logit_units(logit_scale(layers, layer, b, kv_head), TILE)
        k = load_block(k_base + kv_head * k_h + k_offset, there, k_d, TILE)
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
            q = load_block(q_base + row_head * q_h + row.to(tl.int64) * q_m, in_range, q_d, TILE)
            logits = logits_tile(products_tile(q, k, TILE), factor, TILE)
            row_ok = is_set(query_mask, b, row, in_range)
            if OPTIONS.masked_rows:
                at = block_start + (query_start - column_start) + row
                offset = b * (tokens.stride_b16 >> 4) + at.to(tl.int64) * tokens.stride_n
                row_ok = row_ok & (tl.load(tokens.data + offset, mask=in_range, other=0) == mask_token_id)
            sees = visible(row_ok, position, key_ok, key, left, right, OPTIONS.limited)
            if lse is None:
                weights = weights_tile(logits, logits, logits, unit, sees, True)
            else:
                lse_rows = lse_base + row_head * lse_h + row.to(tl.int64) * lse_m
                top, rest = load_lse(lse_rows, in_range, lse.scale, unit, OPTIONS.lse_splits)
                weights = weights_tile(logits, top, rest, unit, sees, False)
            if not OPTIONS.diagonal:
                sees = sees & (key[None, :] != position[:, None])
                weights = tl.where(sees, weights, 0.0)
            if REDUCTION == "max":
                # The bits of non-negative numbers compare as they do, and NaN as the largest.
                acc = tl.maximum(acc, weights.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
            else:
                acc += weights
            if REDUCTION == "mean":
                # All heads and layers have the same rows: those of one head are counted.
                counted = row_head == first_pack if OPTIONS.per_head else row_head == 0
                count += tl.sum((sees & counted[:, None]).to(tl.int32), 0)
        if REDUCTION == "max":
            score += tl.max(acc, 0).to(tl.float32, bitcast=True)
        else:
            score += tl.sum(acc, 0)

    finished = True
    if partials is not None:
        # Of layers [group, layer, column], of splits [group, layer, split, column], and as many counts.
        plane_of = n_groups.to(tl.int64) * N_LAYERS * n_columns
        layers_of = partials + group.to(tl.int64) * N_LAYERS * n_columns + column
        row_of = partials + (group.to(tl.int64) * N_LAYERS + layer) * splits * n_columns + column
        if N_LAYERS > 1:
            row_of += plane_of
        counts_of = row_of + plane_of * splits
        tickets = counters + (group * tiles + tile) * (N_LAYERS + 1)
        if OPTIONS.is_cut:
            tl.store(row_of + split.to(tl.int64) * n_columns, score, mask=column_ok)
            if REDUCTION == "mean":
                bits = count.to(tl.float32, bitcast=True)
                tl.store(counts_of + split.to(tl.int64) * n_columns, bits, mask=column_ok)
            finished = is_last(tickets + layer, splits)
            if finished:
                if REDUCTION == "max":
                    score = _largest_of_splits(row_of, n_columns, column_ok, head_splits, row_splits)
                else:
                    score = _sum_of_splits(row_of, n_columns, column_ok, splits, tl.float32)
                if REDUCTION == "mean":
                    count = _sum_of_splits(counts_of, n_columns, column_ok, splits, tl.int32)
        if N_LAYERS > 1:  # noqa: SIM102 (the compiler's)
            if finished:
                tl.store(layers_of + layer.to(tl.int64) * n_columns, score, mask=column_ok)
                finished = is_last(tickets + N_LAYERS, N_LAYERS)
                if finished:
                    score = _sum_of_layers(layers_of, n_columns, column_ok, N_LAYERS)
    if finished:
        if REDUCTION == "mean":
            score = score / tl.maximum(count, 1).to(tl.float32)
        target = out.data + b * out.stride_b + column.to(tl.int64) * out.stride_c
        if OPTIONS.per_head:
            target += first_pack.to(tl.int64) * out.stride_h
        if OPTIONS.accumulate:
            score += tl.load(target, mask=column_ok, other=0.0)
        tl.store(target, score, mask=column_ok)
        if commit is not None:
            last_tile = is_last(counters + n_groups * tiles * (N_LAYERS + 1) + group, tiles)
            if last_tile:
                scores = Matrix(out.data, out.stride_b * 16, out.stride_c)
                commit_row(
                    group,
                    scores,
                    tokens,
                    block_start,
                    mask_token_id,
                    commit,
                    plane,
                    n_splits,
                    n_columns,
                    COMMIT,
                )


@triton.jit
def _largest_of_splits(row_of, n_columns, ok, head_splits, row_splits):
    """The sum over heads of the largest of their splits [block_n]."""
    score = tl.zeros([32, ok.shape[0]], tl.float32)
    for start in range(0, head_splits, 32):
        offs = start + tl.arange(0, 32)
        there = (offs < head_splits)[:, None] & ok[None, :]
        largest = tl.zeros([32, ok.shape[0]], tl.int32)
        for index in range(0, row_splits):
            at = (offs * row_splits + index).to(tl.int64)[:, None] * n_columns
            part = tl.load(row_of[None, :] + at, mask=there, other=0.0)
            largest = tl.maximum(largest, part.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        score += largest.to(tl.float32, bitcast=True)
    return tl.sum(score, 0)


@triton.jit
def _sum_of_splits(row_of, n_columns, ok, splits, DTYPE: tl.constexpr):
    """The sum of all splits [block_n], whose bits are of this type."""
    total = tl.zeros([32, ok.shape[0]], DTYPE)
    for start in range(0, splits, 32):
        offs = start + tl.arange(0, 32)
        at = offs.to(tl.int64)[:, None] * n_columns
        there = (offs < splits)[:, None] & ok[None, :]
        total += tl.load(row_of[None, :] + at, mask=there, other=0.0).to(DTYPE, bitcast=True)
    return tl.sum(total, 0)


@triton.jit
def _sum_of_layers(row_of, n_columns, ok, N_LAYERS: tl.constexpr):
    """The sum of all layers [block_n], one after another; none of the loads waits for a sum."""
    total = tl.zeros([ok.shape[0]], tl.float32)
    for layer in tl.static_range(N_LAYERS):
        total += tl.load(row_of + layer * n_columns.to(tl.int64), mask=ok, other=0.0)
    return total


class Plan(NamedTuple):
    """How a column reduction is cut into programs."""

    cut: Cut
    pack: int
    rows: Span  # the query rows that can contribute
    layers: int
    groups: int  # rows of the output
    tiles: int
    head_splits: int
    row_splits: int
    packs_per_split: int

    @property
    def counters(self) -> int:
        """How many the kernel needs, without those of a commit."""
        return self.groups * self.tiles * (self.layers + 1)


#: Of a layer's tile of columns at the most: its last program adds them up, 32 at a time.
_MOST_PARTIALS = 128


def plan_columns(problem: Problem, options: Attention) -> Plan:
    columns = options.columns
    rows = Span(0, problem.n_rows)
    if options.softmax_scope == "block":
        rows = _rows_at(columns, options.query_start, problem.n_rows)
    # Per head, and for the maximum of each head's rows, heads stay apart.
    pack = 1 if options.per_head or options.reduction == "max" else problem.group
    packed_rows = (rows.stop - rows.start) * pack
    cut = cut_columns("column_scores", problem, options, packed_rows)

    groups = problem.heads if options.per_head else 1
    tiles = launch.cdiv(columns.stop - columns.start, cut.tile.block_n)
    packs = 1 if options.per_head else problem.heads // pack
    # A part has 64 packed rows of several packs, 16 KB of most shapes, or 128 of one: keys are read for each.
    programs, units = groups * tiles, packs * packed_rows
    parts = min(_MOST_PARTIALS, launch.parts(programs, units, 64))
    packs_per_split = launch.cdiv(packs, min(packs, parts))
    head_splits = launch.cdiv(packs, packs_per_split)
    row_splits = 1
    if packs_per_split == 1:
        parts = min(_MOST_PARTIALS, launch.parts(programs, units, 128))
        row_splits = max(1, min(parts // head_splits, launch.cdiv(packed_rows, cut.tile.block_m)))
    groups, layers = groups * problem.batch, len(problem.layers.q.data)
    return Plan(cut, pack, rows, layers, groups, tiles, head_splits, row_splits, packs_per_split)


def _rows_at(columns: Span, query_start: int, n_rows: int) -> Span:
    """The query rows that stand at the columns."""
    first = min(max(columns.start - query_start, 0), n_rows)
    return Span(first, max(first, min(columns.stop - query_start, n_rows)))


#: The arguments of a kernel that is no part of a decoding step.
NO_STEP: Mapping[str, object] = {
    "tokens": None,
    "block_start": 0,
    "mask_token_id": 0,
    "commit": None,
    "plane": 0,
    "n_splits": 0,
    "COMMIT": None,
}


def reduce_columns(
    plan: Plan,
    problem: Problem,
    out: Tensor,
    softmax_lse: Sequence[Tensor | None],
    query_mask: Tensor | None,
    options: Attention,
    *,
    step: Mapping[str, object] = NO_STEP,
    masked_rows: bool = False,
    counters: Tensor | None = None,
) -> None:
    """Column scores of all layers in one launch (two where the log-sum-exp is to be computed).

    In a ``step`` that has a commit, the kernel also finishes it; ``counters`` are zero then, one for each
    tile and one for each row of the batch.
    """
    device, rows, window = problem.device, plan.rows, Window.of(problem, options)
    n_columns = options.columns.stop - options.columns.start
    lse = OF_TILE if plan.cut.of_tile else row_lse(problem, softmax_lse, options, rows)
    splits = plan.head_splits * plan.row_splits
    kept = splits * (2 if options.reduction == "mean" else 1) if splits > 1 else 0
    kept += plan.layers > 1
    partials = None
    if kept:
        partials = launch.workspace(device, plan.groups, plan.layers, kept, n_columns)
        if counters is None:
            counters = launch.tickets(device, plan.counters)
    launch.launch(
        column_scores_kernel,
        plan.groups * plan.layers * splits * plan.tiles,
        {
            "layers": problem.layers,
            "lse": lse.operand,
            "stride_layer": lse.stride_layer,
            "keys": problem.keys,
            "query_mask": Matrix.optional(query_mask),
            "out": Out(out, out.stride(0), out.stride(1) if options.per_head else 0, out.stride(-1)),
            "partials": partials,
            "counters": counters,
            "n_groups": plan.groups,
            "n_columns": n_columns,
            "row_start": rows.start,
            "row_stop": rows.stop,
            "column_start": options.columns.start,
            "query_start": near(options.query_start),
            "left": window.left,
            "right": window.right,
            "head_splits": plan.head_splits,
            "row_splits": plan.row_splits,
            "packs_per_split": plan.packs_per_split,
            "tiles": plan.tiles,
            **step,
            "OPTIONS": Options(
                window.limited,
                options.diagonal,
                options.reduction,
                options.per_head,
                options.accumulate,
                masked_rows,
                lse.splits,
                plan.pack,
                splits > 1,
            ),
            "TILE": plan.cut.tile,
        },
        plan.cut.parameters,
        device=device,
    )


def column_scores(out: Tensor, layer: Layer, masks: Masks, options: Attention) -> None:
    if layer.q.shape[0] == 0:
        return
    problem = gather([layer], masks, options.softmax_scale)
    options = place(options, masks, problem)
    plan = plan_columns(problem, options)
    reduce_columns(plan, problem, out, [layer.softmax_lse], masks.query_mask, options)
