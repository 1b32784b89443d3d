"""Token confidence: one streaming pass over the vocabulary.

Where B * C is small the vocabulary is split among programs. What a program (or a lane of it) has seen of a
row is a *partial*, and partials merge in any grouping: of lanes and of splits.

A partial of the tokens seen so far, NaN logits counting as -inf except in ``l``:

    m      largest logit
    l      sum of exp(x - m); NaN where the softmax is undefined
    t      sum of exp(x - m) * (x - m)                (entropy)
    key    largest sampling key; the logit itself without sampling
    id     lowest token that has that key
    x      logit of that token
    other  largest logit of any other token           (margin)

Where only some tokens may be drawn, a second kernel, of which a program has a whole row, puts the token that
is drawn into the row's partials.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from attn_sampler.options import LOG2E, Sampling

from . import launch
from .draws import (
    MOST_NOISE,
    Bitmask,
    Draws,
    Logits,
    Rows,
    draw_of,
    gumbel_noise,
    inverse_of,
    is_allowed,
    normal,
)
from .tile import Matrix
from .truncation import truncate_kernel

_NO_TOKEN = tl.constexpr(2**31 - 1)  # loses every tie to a real token
_LOG2E = tl.constexpr(LOG2E)
_INF = tl.constexpr(float("inf"))


@triton.jit
def _finite_or_zero(m):
    """A maximum to subtract: 0 in place of -inf, whose terms are all 0 anyway."""
    return tl.where(m == -_INF, 0.0, m)


@triton.jit
def _distance(m, top):
    """From a maximum to a larger one, below 0; never -inf, because sums of 0 are multiplied by it too."""
    distance = m - _finite_or_zero(top)
    return tl.where(m == -_INF, 0.0, tl.where(distance < -1e4, -1e4, distance))


class Partial(NamedTuple):
    """A partial, or several side by side, inside a kernel; the fields are those of the module's text."""

    m: Any
    l: Any  # noqa: E741
    t: Any
    key: Any
    token: Any
    x: Any
    other: Any


@triton.jit
def _reduce_partials(p, AXIS: tl.constexpr, METRIC: tl.constexpr):
    """Merge the partials along an axis. What another metric needs is left at 0: each field that is merged is
    a reduction over the warps, and a part of the vocabulary is over in a few microseconds."""
    top = tl.max(p.m, AXIS, keep_dims=True)
    distance = _distance(p.m, top)
    weight = tl.exp2(distance * _LOG2E)
    l = tl.sum(weight * p.l, AXIS)  # noqa: E741
    t = tl.zeros_like(l)
    if METRIC == "entropy":
        t = tl.sum(weight * (p.t + distance * p.l), AXIS)
    best = tl.max(p.key, AXIS, keep_dims=True)
    winner = tl.min(tl.where(p.key == best, p.token, _NO_TOKEN), AXIS, keep_dims=True)
    won = p.token == winner
    x = tl.max(tl.where(won, p.x, -_INF), AXIS)
    other = tl.zeros_like(l)
    if METRIC == "margin":
        other = tl.max(tl.where(won, p.other, p.m), AXIS)
    return Partial(tl.max(p.m, AXIS), l, t, tl.max(p.key, AXIS), tl.min(winner, AXIS), x, other)


@triton.jit
def merge_partials(
    partials, plane, row, row_ok, n_splits, exclude, METRIC: tl.constexpr, SPLITS: tl.constexpr
):
    """Merge the stored partials of rows: partials[field * plane + row * n_splits + split]. Where no token is
    present, any that is not excluded has to do."""
    split = tl.arange(0, SPLITS)[None, :]
    p = partials + row.to(tl.int64)[:, None] * n_splits + split
    ok = row_ok[:, None] & (split < n_splits)
    none = -_INF
    m = tl.load(p, mask=ok, other=none)
    l = tl.load(p + plane, mask=ok, other=0.0)  # noqa: E741
    t = tl.zeros_like(l)
    if METRIC == "entropy":
        t = tl.load(p + 2 * plane, mask=ok, other=0.0)
    key = tl.load(p + 3 * plane, mask=ok, other=none)
    token = tl.load(p + 4 * plane, mask=ok, other=0.0).to(tl.int32, bitcast=True)
    token = tl.where(ok, token, _NO_TOKEN)
    x = tl.load(p + 5 * plane, mask=ok, other=none)
    other = tl.zeros_like(l)
    if METRIC == "margin":
        other = tl.load(p + 6 * plane, mask=ok, other=none)
    best = _reduce_partials(Partial(m, l, t, key, token, x, other), 1, METRIC)
    token = tl.where(best.token == _NO_TOKEN, (exclude == 0).to(tl.int32), best.token)
    return Partial(best.m, best.l, best.t, best.key, token, best.x, best.other)


@triton.jit
def confidence_of(p, METRIC: tl.constexpr):
    """The metric of a complete partial."""
    shift = _finite_or_zero(p.m)
    if METRIC == "entropy":
        value = p.t / p.l - tl.log(p.l)
        value = tl.where(value > 0.0, 0.0, value)
    else:
        value = tl.exp2((p.x - shift) * _LOG2E)
        if METRIC == "margin":
            value -= tl.exp2((p.other - shift) * _LOG2E)
        value = value / p.l
    return value


@triton.jit
def log_prob_of(p):
    """The logarithm of the probability of a complete partial's token."""
    return (p.x - _finite_or_zero(p.m)) - tl.log(p.l)


@triton.jit
def probability_of(p, logits, bitmask, exclude, b, position, token, ok):
    """The probability of another token under a complete partial; NaN of what is none of the vocabulary."""
    known = (token >= 0) & (token < logits.vocab)
    row = logits.data + b.to(tl.int64) * logits.stride_b + position.to(tl.int64) * logits.stride_c
    there = is_allowed(bitmask, b, position, token, ok & known & (token != exclude))
    x = tl.load(row + token * logits.stride_v, mask=there, other=-_INF).to(tl.float32)
    return tl.where(known, tl.exp2((x - _finite_or_zero(p.m)) * _LOG2E) / p.l, float("nan"))


class Options(NamedTuple):
    """Compile-time options."""

    sample: bool
    lead: int
    metric: str
    block_k: int
    block_w: int


@triton.jit(
    do_not_specialize=[
        "positions",
        "first_group",
        "seed",
        "top_k",
        "exclude",
        "plane",
        "n_splits",
        "n_counters",
    ]
)
def token_partials_kernel(
    logits,
    positions,
    bitmask,
    first_group,
    draws,
    seed,
    inverse_temperature,
    top_k,
    top_p,
    min_p,
    exclude,
    partials,
    plane,
    n_splits,
    split_size,
    counters,
    n_counters,
    OPTIONS: tl.constexpr,
):
    """The partial of one row and one split of the vocabulary; clears the counters of the next kernel.

    Tiles begin with a group of four tokens of the sampling stream: the first of them LEAD places before the
    logits, with ``first_group``.
    """
    SAMPLE: tl.constexpr = OPTIONS.sample
    LEAD: tl.constexpr = OPTIONS.lead
    METRIC: tl.constexpr = OPTIONS.metric
    BLOCK_K: tl.constexpr = OPTIONS.block_k
    BLOCK_W: tl.constexpr = OPTIONS.block_w
    pid = tl.program_id(0)
    if counters is not None:
        for index in range(pid, n_counters, tl.num_programs(0)):
            tl.store(counters + index, 0)
    row = pid // n_splits
    split = pid % n_splits
    batch = row // positions
    position = row % positions
    base = logits.data + batch.to(tl.int64) * logits.stride_b + position.to(tl.int64) * logits.stride_c
    first = split * split_size - LEAD
    last = tl.minimum(first + split_size, logits.vocab)
    if SAMPLE:
        draw = draw_of(draws, seed, inverse_temperature, top_k, top_p, min_p, batch)
        samples = (draw.inverse_temperature > 0.0) & (draw.truncates == 0)
        best = tl.full([], -_INF, tl.float32)

    # Sampling and the margin need the best token of every tile. Without them a lane only remembers the tile
    # in which its maximum rose, and looks the token up there at the end: half the work for each logit.
    KEYED: tl.constexpr = SAMPLE or METRIC == "margin" or bitmask is not None
    lane = tl.arange(0, BLOCK_K)[:, None] * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
    m = tl.full([BLOCK_W], -_INF, tl.float32)
    l = tl.zeros([BLOCK_W], tl.float32)  # noqa: E741
    t = tl.zeros([BLOCK_W], tl.float32)
    key = tl.full([BLOCK_W], -_INF, tl.float32)
    token = tl.full([BLOCK_W], _NO_TOKEN, tl.int32)
    x = tl.full([BLOCK_W], -_INF, tl.float32)
    other = tl.full([BLOCK_W], -_INF, tl.float32)
    for start in range(first, last, BLOCK_K * BLOCK_W):
        here = start + lane
        there = here < last
        if LEAD > 0:
            there = there & (here >= 0)
        raw = tl.load(base + here.to(tl.int64) * logits.stride_v, mask=there, other=-_INF).to(tl.float32)
        if (exclude >= start) & (exclude < start + BLOCK_K * BLOCK_W):
            raw = tl.where(here == exclude, -_INF, raw)
        if bitmask is not None:
            there = is_allowed(bitmask, batch, position, here, there)
            raw = tl.where(there, raw, -_INF)

        tile_m = tl.max(raw, 0)  # passes over NaN
        rises = tile_m > m
        new_m = tl.where(rises, tile_m, m)
        shift = _finite_or_zero(new_m)
        distance = _distance(m, new_m)
        rescale = tl.exp2(distance * _LOG2E)
        weight = tl.exp2((raw - shift[None, :]) * _LOG2E)
        if METRIC == "entropy":
            terms = tl.where(weight > 0.0, weight * (raw - shift[None, :]), 0.0)
            t = rescale * (t + distance * l) + tl.sum(terms, 0)
        l = rescale * l + tl.sum(weight, 0)  # noqa: E741

        if KEYED:
            present = there & (here != exclude)
            clean = tl.where(raw == raw, raw, -_INF)
            looks = True
            if SAMPLE:
                # Multiplying and adding round monotonically: the key of no token here is above that of the
                # largest logit with the largest noise. What is not above the best key loses to it, which an
                # earlier token has; its noise need not be known.
                bound = tl.max(tile_m, 0) * draw.inverse_temperature + MOST_NOISE
                looks = (samples == 0) | (bound > best) | (best == -_INF)
            if looks:
                keys = clean
                if SAMPLE:  # noqa: SIM102 (of the two the first is the compiler's)
                    if samples:
                        group = (start + LEAD) // 4 + (
                            tl.arange(0, BLOCK_K)[:, None] * (BLOCK_W // 4)
                            + tl.arange(0, BLOCK_W // 4)[None, :]
                        )
                        group = first_group.to(tl.uint32) + group.to(tl.uint32)
                        keys = raw * draw.inverse_temperature + gumbel_noise(draw.seed, position, group)
                        keys = tl.where(keys == keys, keys, -_INF)
                tile_key = tl.max(tl.where(present, keys, -_INF), 0)
                tile_token = tl.min(tl.where(present & (keys == tile_key[None, :]), here, _NO_TOKEN), 0)
                # Tokens are met in ascending order: a tie changes nothing, unless no token had been met.
                take = (tile_key > key) | (token == _NO_TOKEN)
                chosen = here == tile_token[None, :]
                tile_other = tl.max(tl.where(chosen, -_INF, clean), 0)
                other = tl.where(take, tl.maximum(tile_other, m), tl.maximum(other, tl.max(clean, 0)))
                key = tl.where(take, tile_key, key)
                x = tl.where(take, tl.max(tl.where(chosen, clean, -_INF), 0), x)
                token = tl.where(take, tile_token, token)
                if SAMPLE:
                    best = tl.max(key, 0)
            else:
                other = tl.maximum(other, tl.max(clean, 0))
        else:
            token = tl.where(rises, start, token)
        m = new_m

    if not KEYED:
        key = m
        x = m
        found = token != _NO_TOKEN
        here = tl.where(found, token, first)[None, :] + lane
        raw = tl.load(base + here.to(tl.int64) * logits.stride_v, mask=here < last, other=-_INF).to(
            tl.float32
        )
        hit = found[None, :] & (raw == m[None, :]) & (here != exclude)
        token = tl.min(tl.where(hit, here, _NO_TOKEN), 0)
    best = _reduce_partials(Partial(m, l, t, key, token, x, other), 0, METRIC)
    token = best.token
    if not KEYED:
        # No logit above -inf: the first token there is.
        lowest = first + (exclude == first).to(tl.int32)
        token = tl.where((token == _NO_TOKEN) & (lowest < last), lowest, token)
    p = partials + row.to(tl.int64) * n_splits + split
    tl.store(p, best.m)
    tl.store(p + plane, best.l)
    if METRIC == "entropy":
        tl.store(p + 2 * plane, best.t)
    tl.store(p + 3 * plane, best.key)
    tl.store(p + 4 * plane, token.to(tl.float32, bitcast=True))
    tl.store(p + 5 * plane, best.x)
    if METRIC == "margin":
        tl.store(p + 6 * plane, best.other)


class Current(NamedTuple):
    """Other tokens whose probabilities are asked for."""

    logits: Logits
    bitmask: Bitmask | None
    ids: Matrix
    probability: Tensor


@triton.jit(do_not_specialize=["plane", "n_rows", "positions", "n_splits", "exclude"])
def merge_partials_kernel(
    partials,
    plane,
    n_rows,
    positions,
    n_splits,
    token_ids,
    confidence,
    log_prob,
    current,
    exclude,
    METRIC: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """What is predicted of BLOCK rows."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = row < n_rows
    best = merge_partials(partials, plane, row, ok, n_splits, exclude, METRIC, SPLITS)
    tl.store(token_ids + row, best.token.to(tl.int64), mask=ok)
    tl.store(confidence + row, confidence_of(best, METRIC), mask=ok)
    tl.store(log_prob + row, log_prob_of(best), mask=ok)
    if current is not None:
        b = row // positions
        position = row % positions
        ids = current.ids.data + b.to(tl.int64) * (current.ids.stride_b16 >> 4)
        token = tl.load(ids + position.to(tl.int64) * current.ids.stride_n, mask=ok, other=0)
        probability = probability_of(best, current.logits, current.bitmask, exclude, b, position, token, ok)
        tl.store(current.probability + row, probability, mask=ok)


def token_partials(logits: Tensor, options: Sampling, counters: Tensor | None = None) -> Tensor:
    """Mergeable partials of every row, float32 ``[7, B * C, S]`` for S splits of the vocabulary.

    Sampling reads the logits in vectors only where the shard begins at a multiple of 4. ``counters`` (int32)
    are set to 0 on the way.
    """
    batch, positions, vocab = logits.shape
    metric, temperature, exclude, vocab_start = (
        options.metric,
        options.temperature,
        options.exclude_token_id,
        options.vocab_start,
    )
    samples = isinstance(temperature, Tensor) or temperature > 0.0
    filters = ((options.top_k, 0), (options.top_p, 1.0), (options.min_p, 0.0))
    truncates = samples and any(isinstance(x, Tensor) or x != off for x, off in filters)
    all_are_truncated = samples and any(not isinstance(x, Tensor) and x != off for x, off in filters)
    sample = samples and not all_are_truncated
    parameters = launch.config(
        "token_confidence", "float32" if logits.element_size() == 4 else "narrow", logits.device
    )
    tile = parameters.block_m * parameters.block_n
    rows = batch * positions
    lead = vocab_start % 4 if sample else 0
    tiles = launch.cdiv(lead + vocab, tile)
    # Two tiles a part, 16 KB: the partials of all lanes are merged at its end. 64 parts are merged at once.
    splits = min(64, launch.parts(positions, tiles, 2))
    tiles_per_split = launch.cdiv(tiles, splits)
    splits = launch.cdiv(tiles, tiles_per_split)
    partials = launch.workspace(logits.device, len(Partial._fields), rows, splits)
    if rows == 0:
        return partials
    inverse = 0.0 if isinstance(temperature, Tensor) else inverse_of(temperature)
    given = (options.seed, temperature, options.top_k, options.top_p, options.min_p)
    of_rows, numbers = zip(*map(Rows.split, given), strict=True)
    arguments = {
        "logits": Logits.of(logits),
        "positions": positions,
        "bitmask": Bitmask.optional(options.token_bitmask),
        "first_group": vocab_start // 4,
        "draws": Draws(*of_rows),
        "seed": numbers[0],
        "inverse_temperature": inverse,
        "top_k": numbers[2],
        "top_p": normal(numbers[3]),
        "min_p": normal(numbers[4]),
        "exclude": -1 if exclude is None else exclude,
        "partials": partials,
        "plane": rows * splits,
        "n_splits": splits,
    }
    launch.launch(
        token_partials_kernel,
        rows * splits,
        {
            **arguments,
            "split_size": tiles_per_split * tile,
            "counters": counters,
            "n_counters": 0 if counters is None else counters.numel(),
            "OPTIONS": Options(sample, lead, metric, parameters.block_m, parameters.block_n),
        },
        parameters,
        device=logits.device,
        # The sampling stream is fixed to the last bit: every product and sum is rounded by itself.
        fuse_multiply_add=not sample,
    )
    if truncates:
        launch.launch(
            truncate_kernel,
            rows,
            {
                **arguments,
                "LEAD": vocab_start % 4,
                "METRIC": metric,
                "SPLITS": launch.next_power_of_2(splits),
                "BLOCK": tile // 4,
            },
            launch.Config(1, tile // 4, 8, 1),
            device=logits.device,
            fuse_multiply_add=False,
        )
    return partials


def token_confidence(
    out: tuple[Tensor, Tensor, Tensor, Tensor | None],
    logits: Tensor,
    current_ids: Tensor | None,
    options: Sampling,
) -> None:
    token_ids, confidence, log_prob, probability = out
    partials = token_partials(logits, options)
    _, rows, splits = partials.shape
    if rows == 0:
        return
    current = None
    if current_ids is not None:
        bitmask = Bitmask.optional(options.token_bitmask)
        current = Current(Logits.of(logits), bitmask, Matrix.of(current_ids), probability)
    width = launch.next_power_of_2(splits)
    block = max(1, min(32, 1024 // width))
    launch.launch(
        merge_partials_kernel,
        launch.cdiv(rows, block),
        {
            "partials": partials,
            "plane": rows * splits,
            "n_rows": rows,
            "positions": logits.shape[1],
            "n_splits": splits,
            "token_ids": token_ids,
            "confidence": confidence,
            "log_prob": log_prob,
            "current": current,
            "exclude": -1 if options.exclude_token_id is None else options.exclude_token_id,
            "METRIC": options.metric,
            "BLOCK": block,
            "SPLITS": width,
        },
        launch.Config(block, width, 4, 1),
        device=partials.device,
    )
