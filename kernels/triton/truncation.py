"""Draws from those tokens alone that may be drawn, by several looks at a row whose largest logit is known."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .draws import MOST_NOISE, draw_of, exact_neg_log, gumbel_noise, is_allowed, token_weight

_INF = tl.constexpr(float("inf"))
_NO_TOKEN = tl.constexpr(2**31 - 1)
_ALL = tl.constexpr(0x7F800000)  # the bits of infinity: as far below the largest logit as what is absent
_LEAST_MIN_P = tl.constexpr(2.0**-126)


class Row(NamedTuple):
    """Inside a kernel: a row's logits, and what is told of their distances below the largest."""

    logits: Any
    bitmask: Any
    exclude: Any
    b: Any
    position: Any
    inverse_temperature: Any
    top: Any  # the largest logit, by the inverse temperature


@triton.jit
def _raw(row, here):
    """Logits; -inf of what is absent or NaN."""
    base = row.logits.data + row.b.to(tl.int64) * row.logits.stride_b
    base += row.position.to(tl.int64) * row.logits.stride_c
    there = (here >= 0) & (here < row.logits.vocab) & (here != row.exclude)
    there = is_allowed(row.bitmask, row.b, row.position, here, there)
    x = tl.load(base + here.to(tl.int64) * row.logits.stride_v, mask=there, other=-_INF).to(tl.float32)
    return tl.where(x == x, x, -_INF)


@triton.jit
def _below(row, scaled):
    """How far below the largest, as bits, in whose order the distances are."""
    return tl.where(scaled < row.top, row.top - scaled, 0.0).to(tl.int32, bitcast=True)


@triton.jit
def _count(row, most, BLOCK: tl.constexpr):
    """Tokens that are at most so far below."""
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, row.logits.vocab, BLOCK):
        here = start + tl.arange(0, BLOCK)
        near = _below(row, _raw(row, here) * row.inverse_temperature) <= most
        count += (near & (here < row.logits.vocab)).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _mass(row, most, BLOCK: tl.constexpr):
    """The weight of the tokens that are at most so far below."""
    mass = tl.zeros([BLOCK], tl.int64)
    for start in range(0, row.logits.vocab, BLOCK):
        here = start + tl.arange(0, BLOCK)
        below = _below(row, _raw(row, here) * row.inverse_temperature)
        weight = token_weight(-below.to(tl.float32, bitcast=True))
        mass += tl.where(below <= most, weight, 0).to(tl.int64)
    return tl.sum(mass, 0)


@triton.jit
def _kth_nearest(row, k, BLOCK: tl.constexpr):
    """How far below the k-th largest logit is. Of what each lane meets the four nearest are enough to know,
    unless one has met four nearer ones."""
    n0 = tl.full([BLOCK], _ALL, tl.int32)
    n1 = n0
    n2 = n0
    n3 = n0
    for start in range(0, row.logits.vocab, BLOCK):
        x = _below(row, _raw(row, start + tl.arange(0, BLOCK)) * row.inverse_temperature)
        y = tl.maximum(n0, x)
        n0 = tl.minimum(n0, x)
        x = tl.maximum(n1, y)
        n1 = tl.minimum(n1, y)
        y = tl.maximum(n2, x)
        n2 = tl.minimum(n2, x)
        n3 = tl.minimum(n3, y)
    kth = 0
    for bit in range(30, -1, -1):
        tried = kth + (1 << bit) - 1
        near = (n0 <= tried).to(tl.int32) + (n1 <= tried).to(tl.int32)
        near += (n2 <= tried).to(tl.int32) + (n3 <= tried).to(tl.int32)
        kth = tl.where((tried < _ALL) & (tl.sum(near, 0) < k), tried + 1, kth)
    if tl.max((n3 < kth).to(tl.int32), 0) > 0:
        kth = 0
        for bit in range(30, -1, -1):
            tried = kth + (1 << bit) - 1
            kth = tl.where((tried < _ALL) & (_count(row, tried, BLOCK) < k), tried + 1, kth)
    return kth


@triton.jit
def _draw_from(row, seed, first_group, most, LEAD: tl.constexpr, BLOCK: tl.constexpr):
    """The token of the largest key of those that are at most so far below."""
    key = -_INF
    token = _NO_TOKEN
    for start in range(-LEAD, row.logits.vocab, BLOCK):
        here = start + tl.arange(0, BLOCK)
        scaled = _raw(row, here) * row.inverse_temperature
        near = (_below(row, scaled) <= most) & (scaled > -_INF)
        # Of what is not near, and of what cannot exceed the best key, the noise need not be known.
        if tl.max(tl.where(near, scaled, -_INF), 0) + MOST_NOISE > key:
            group = (start + LEAD) // 4 + tl.arange(0, BLOCK // 4)[None, :]
            noise = gumbel_noise(seed, row.position, first_group.to(tl.uint32) + group.to(tl.uint32))
            keys = tl.where(near, scaled + tl.reshape(noise, [BLOCK]), -_INF)
            tile_key = tl.max(keys, 0)
            tile_token = tl.min(tl.where(keys == tile_key, here, _NO_TOKEN), 0)
            token = tl.where(tile_key > key, tile_token, token)
            key = tl.maximum(tile_key, key)
    return token


@triton.jit(do_not_specialize=["positions", "first_group", "seed", "top_k", "exclude", "plane", "n_splits"])
def truncate_kernel(
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
    LEAD: tl.constexpr,
    METRIC: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Draws a row's token where only some may be drawn, and puts it into all of the row's partials."""
    pid = tl.program_id(0)
    b = pid // positions
    position = pid % positions
    draw = draw_of(draws, seed, inverse_temperature, top_k, top_p, min_p, b)
    split = tl.arange(0, SPLITS)
    ok = split < n_splits
    p = partials + pid.to(tl.int64) * n_splits + split
    largest = tl.max(tl.load(p, mask=ok, other=-_INF), 0)
    if draw.truncates & (largest > -_INF):
        inverse = draw.inverse_temperature
        row = Row(logits, bitmask, exclude, b, position, inverse, largest * inverse)
        kth = _ALL
        if (draw.top_k > 0) & (draw.top_k < logits.vocab):
            kth = _kth_nearest(row, draw.top_k, BLOCK)
        most = kth
        if draw.min_p > 0.0:
            least = tl.minimum(tl.maximum(draw.min_p, _LEAST_MIN_P), 1.0)
            most = tl.minimum(most, (exact_neg_log(least) + 0.0).to(tl.int32, bitcast=True))
        mass = tl.zeros([], tl.int64)
        if draw.top_p < 1.0:
            mass = _mass(row, kth, BLOCK)
        token = _NO_TOKEN
        x = -_INF
        found = False
        while not found:
            token = _draw_from(row, draw.seed, first_group, most, LEAD, BLOCK)
            x = tl.max(_raw(row, token + tl.zeros([1], tl.int32)), 0)
            below = tl.max(_below(row, (x * inverse) + tl.zeros([1], tl.float32)), 0)
            found = True
            # A draw from more than may be drawn is right if it may be. If not, nothing that far may.
            if (draw.top_p < 1.0) & (below > 0):
                above = _mass(row, below - 1, BLOCK)
                found = above.to(tl.float64) < draw.top_p.to(tl.float64) * mass.to(tl.float64)
            most = below - 1
        zeros = tl.zeros([SPLITS], tl.float32)
        tl.store(p + 3 * plane, zeros, mask=ok)
        tl.store(p + 4 * plane, (token + tl.zeros([SPLITS], tl.int32)).to(tl.float32, bitcast=True), mask=ok)
        tl.store(p + 5 * plane, x + zeros, mask=ok)
        if METRIC == "margin":
            others = tl.full([BLOCK], -_INF, tl.float32)
            for start in range(0, logits.vocab, BLOCK):
                here = start + tl.arange(0, BLOCK)
                others = tl.maximum(others, tl.where(here == token, -_INF, _raw(row, here)))
            tl.store(p + 6 * plane, tl.max(others, 0) + zeros, mask=ok)
