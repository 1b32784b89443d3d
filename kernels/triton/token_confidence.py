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

import ctypes
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from attn_sampler.options import LOG2E, Sampling

from . import launch
from .tile import Matrix

_NO_TOKEN = tl.constexpr(2**31 - 1)  # loses every tie to a real token
_LOG2E = tl.constexpr(LOG2E)
_INF = tl.constexpr(float("inf"))

# Constants of the sampling stream; csrc/include/attn_sampler_random.h is its specification.
_WORD_SCALE = tl.constexpr(2.0**-32)
_WORD_OFFSET = tl.constexpr(2.0**-33)
_WORD_MAX = tl.constexpr(1.0 - 2.0**-24)
_SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
_LOG2_HIGH = tl.constexpr(float.fromhex("0x1.63p-1"))
_LOG2_LOW = tl.constexpr(float.fromhex("-0x1.bd0106p-13"))
_EXP2_UNIT = tl.constexpr(float.fromhex("0x1.715476p+0"))
_E0 = tl.constexpr(float.fromhex("0x1.eeabe2p-11"))
_E1 = tl.constexpr(float.fromhex("0x1.2d8974p-7"))
_E2 = tl.constexpr(float.fromhex("0x1.c4f802p-5"))
_E3 = tl.constexpr(float.fromhex("0x1.ebe2eap-3"))
_E4 = tl.constexpr(float.fromhex("0x1.62e3b6p-1"))
_ALL = tl.constexpr(0x7F800000)  # the bits of infinity: as far below the largest logit as what is absent
_LEAST_TEMPERATURE, _MOST_TEMPERATURE = tl.constexpr(2.0**-120), tl.constexpr(2.0**126)
_LEAST_MIN_P = tl.constexpr(2.0**-126)
_P0 = tl.constexpr(float.fromhex("-0x1.38b81ap-4"))
_P1 = tl.constexpr(float.fromhex("0x1.055bdcp-3"))
_P2 = tl.constexpr(float.fromhex("-0x1.0d84eep-3"))
_P3 = tl.constexpr(float.fromhex("0x1.22da06p-3"))
_P4 = tl.constexpr(float.fromhex("-0x1.54724cp-3"))
_P5 = tl.constexpr(float.fromhex("0x1.99a00ap-3"))
_P6 = tl.constexpr(float.fromhex("-0x1.000226p-2"))
_P7 = tl.constexpr(float.fromhex("0x1.555554p-2"))


@triton.jit
def _exact_neg_log(x):
    """-log(x) of normal positive float32 values; exact only in a kernel without fused multiply-add."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    z = f * f
    p = f * _P0 + _P1
    p = p * f + _P2
    p = p * f + _P3
    p = p * f + _P4
    p = p * f + _P5
    p = p * f + _P6
    p = p * f + _P7
    y = (f * z) * p
    y = y + e * _LOG2_LOW
    y = y - 0.5 * z
    return -((f + y) + e * _LOG2_HIGH)


@triton.jit
def gumbel_noise(seed, position, group):
    """Standard Gumbel noise of tokens 4 * group ... 4 * group + 3, interleaved: [K, W / 4] -> [K, W]."""
    zero = tl.zeros_like(group)
    w0, w1, w2, w3 = tl.philox(seed, group, position + zero, zero, zero)
    word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    w = word.to(tl.float32) * _WORD_SCALE + _WORD_OFFSET
    w = tl.minimum(w, _WORD_MAX)
    u = 1.0 - w
    exponential = (w - (1.0 - u)) + _exact_neg_log(u)
    return _exact_neg_log(exponential)


@triton.jit
def _token_weight(distance):
    """exp(distance) in units of 2^-30, rounded down, of distances <= 0; exact as the logarithm is."""
    t = tl.maximum(distance * _EXP2_UNIT, -64.0)
    whole = t.to(tl.int32)
    f = t - whole.to(tl.float32)
    p = f * _E0 + _E1
    p = p * f + _E2
    p = p * f + _E3
    p = p * f + _E4
    p = p * f + 1.0
    return (p * ((whole + 157) << 23).to(tl.float32, bitcast=True)).to(tl.int32)


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
def _reduce_partials(p, AXIS: tl.constexpr):
    """Merge the partials along an axis."""
    top = tl.max(p.m, AXIS, keep_dims=True)
    distance = _distance(p.m, top)
    weight = tl.exp2(distance * _LOG2E)
    t = tl.sum(weight * (p.t + distance * p.l), AXIS)
    l = tl.sum(weight * p.l, AXIS)  # noqa: E741
    best = tl.max(p.key, AXIS, keep_dims=True)
    winner = tl.min(tl.where(p.key == best, p.token, _NO_TOKEN), AXIS, keep_dims=True)
    won = p.token == winner
    x = tl.max(tl.where(won, p.x, -_INF), AXIS)
    other = tl.max(tl.where(won, p.other, p.m), AXIS)
    return Partial(tl.max(p.m, AXIS), l, t, tl.max(p.key, AXIS), tl.min(winner, AXIS), x, other)


@triton.jit
def merge_partials(partials, plane, row, row_ok, n_splits, exclude, SPLITS: tl.constexpr):
    """Merge the stored partials of rows: partials[field * plane + row * n_splits + split]. Where no token is
    present, any that is not excluded has to do."""
    split = tl.arange(0, SPLITS)[None, :]
    p = partials + row.to(tl.int64)[:, None] * n_splits + split
    ok = row_ok[:, None] & (split < n_splits)
    none = -_INF
    m = tl.load(p, mask=ok, other=none)
    l = tl.load(p + plane, mask=ok, other=0.0)  # noqa: E741
    t = tl.load(p + 2 * plane, mask=ok, other=0.0)
    key = tl.load(p + 3 * plane, mask=ok, other=none)
    token = tl.load(p + 4 * plane, mask=ok, other=0.0).to(tl.int32, bitcast=True)
    token = tl.where(ok, token, _NO_TOKEN)
    x = tl.load(p + 5 * plane, mask=ok, other=none)
    other = tl.load(p + 6 * plane, mask=ok, other=none)
    best = _reduce_partials(Partial(m, l, t, key, token, x, other), 1)
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
def _is_allowed(bitmask, b, position, token, ok):
    """Whether a token's bit is set, or there are none."""
    allowed = ok
    if bitmask is not None:
        word = bitmask.data + b.to(tl.int64) * bitmask.stride_b + position.to(tl.int64) * bitmask.stride_c
        bits = tl.load(word + (token // 32) * bitmask.stride_w, mask=ok, other=0)
        allowed = ok & (((bits >> (token % 32)) & 1) != 0)
    return allowed


@triton.jit
def probability_of(p, logits, bitmask, exclude, b, position, token, ok):
    """The probability of another token under a complete partial; NaN of what is none of the vocabulary."""
    known = (token >= 0) & (token < logits.vocab)
    row = logits.data + b.to(tl.int64) * logits.stride_b + position.to(tl.int64) * logits.stride_c
    there = _is_allowed(bitmask, b, position, token, ok & known & (token != exclude))
    x = tl.load(row + token * logits.stride_v, mask=there, other=-_INF).to(tl.float32)
    return tl.where(known, tl.exp2((x - _finite_or_zero(p.m)) * _LOG2E) / p.l, float("nan"))


class Logits(NamedTuple):
    """Logits [B, C, V]."""

    data: Tensor
    stride_b: int
    stride_c: int
    stride_v: int
    positions: int
    vocab: int

    @classmethod
    def of(cls, x: Tensor) -> Logits:
        return cls(x, *x.stride(), *x.shape[1:])


class Bitmask(NamedTuple):
    """Words [B, C, W] of a bit for each token."""

    data: Tensor
    stride_b: int
    stride_c: int
    stride_w: int

    @classmethod
    def optional(cls, x: Tensor | None) -> Bitmask | None:
        if x is None:
            return None
        return cls(x, *x.stride()) if x.dim() == 3 else cls(x, x.stride(0), 0, x.stride(1))


class Rows(NamedTuple):
    """A value for each row of the batch."""

    data: Tensor
    stride: int

    @classmethod
    def split(cls, value: float | Tensor) -> tuple[Rows | None, Any]:
        """Those of a tensor, or a number for all."""
        return (cls(value, value.stride(0)), 0) if isinstance(value, Tensor) else (None, value)


class Draws(NamedTuple):
    """What is drawn by, where each row has its own."""

    seed: Rows | None
    temperature: Rows | None
    top_k: Rows | None
    top_p: Rows | None
    min_p: Rows | None


class Draw(NamedTuple):
    """Inside a kernel: of a row."""

    seed: Any
    inverse_temperature: Any  # 0: the most probable token is taken
    top_k: Any
    top_p: Any
    min_p: Any
    truncates: Any  # whether only some tokens may be drawn


@triton.jit
def _value_of(rows, value, b):
    own = value
    if rows is not None:
        own = tl.load(rows.data + b.to(tl.int64) * rows.stride)
    return own


@triton.jit
def _draw_of(draws, seed, inverse_temperature, top_k, top_p, min_p, b):
    zero = tl.full([], 0.0, tl.float32)  # numbers have no type yet where kernels are interpreted
    inverse = zero + inverse_temperature
    if draws.temperature is not None:
        t = tl.load(draws.temperature.data + b.to(tl.int64) * draws.temperature.stride)
        one = tl.full([], 1.0, tl.float32)
        inverse = tl.div_rn(one, tl.minimum(tl.maximum(t, _LEAST_TEMPERATURE), _MOST_TEMPERATURE))
        inverse = tl.where(t >= _LEAST_TEMPERATURE, inverse, 0.0)
    k = _value_of(draws.top_k, top_k, b)
    p = zero + _value_of(draws.top_p, top_p, b)
    m = zero + _value_of(draws.min_p, min_p, b)
    p = tl.where((p > 0.0) & (p < 1.0), p, 1.0)
    truncates = (inverse > 0.0) & ((k > 0) | (p < 1.0) | (m > 0.0))
    return Draw(_value_of(draws.seed, seed, b).to(tl.int64), inverse, k, p, m, truncates)


class Options(NamedTuple):
    """Compile-time options."""

    sample: bool
    lead: int
    metric: str
    block_k: int
    block_w: int


@triton.jit(do_not_specialize=["first_group", "seed", "top_k", "exclude", "n_splits", "n_counters"])
def token_partials_kernel(
    logits,
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
    batch = row // logits.positions
    position = row % logits.positions
    base = logits.data + batch.to(tl.int64) * logits.stride_b + position.to(tl.int64) * logits.stride_c
    first = split * split_size - LEAD
    last = tl.minimum(first + split_size, logits.vocab)
    if SAMPLE:
        draw = _draw_of(draws, seed, inverse_temperature, top_k, top_p, min_p, batch)
        samples = (draw.inverse_temperature > 0.0) & (draw.truncates == 0)

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
            there = _is_allowed(bitmask, batch, position, here, there)
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
            keys = clean
            if SAMPLE:  # noqa: SIM102 (of the two the first is the compiler's)
                if samples:
                    group = (start + LEAD) // 4 + (
                        tl.arange(0, BLOCK_K)[:, None] * (BLOCK_W // 4) + tl.arange(0, BLOCK_W // 4)[None, :]
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
    best = _reduce_partials(Partial(m, l, t, key, token, x, other), 0)
    token = best.token
    if not KEYED:
        # No logit above -inf: the first token there is.
        lowest = first + (exclude == first).to(tl.int32)
        token = tl.where((token == _NO_TOKEN) & (lowest < last), lowest, token)
    p = partials + row.to(tl.int64) * n_splits + split
    tl.store(p, best.m)
    tl.store(p + plane, best.l)
    tl.store(p + 2 * plane, best.t)
    tl.store(p + 3 * plane, best.key)
    tl.store(p + 4 * plane, token.to(tl.float32, bitcast=True))
    tl.store(p + 5 * plane, best.x)
    tl.store(p + 6 * plane, best.other)


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
    there = _is_allowed(row.bitmask, row.b, row.position, here, there)
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
        weight = _token_weight(-below.to(tl.float32, bitcast=True))
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
        if tl.max(near.to(tl.int32), 0) > 0:
            group = (start + LEAD) // 4 + tl.arange(0, BLOCK // 4)[None, :]
            noise = gumbel_noise(seed, row.position, first_group.to(tl.uint32) + group.to(tl.uint32))
            keys = tl.where(near, scaled + tl.reshape(noise, [BLOCK]), -_INF)
            tile_key = tl.max(keys, 0)
            tile_token = tl.min(tl.where(keys == tile_key, here, _NO_TOKEN), 0)
            token = tl.where(tile_key > key, tile_token, token)
            key = tl.maximum(tile_key, key)
    return token


@triton.jit(do_not_specialize=["first_group", "seed", "top_k", "exclude", "n_splits"])
def truncate_kernel(
    logits,
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
    b = pid // logits.positions
    position = pid % logits.positions
    draw = _draw_of(draws, seed, inverse_temperature, top_k, top_p, min_p, b)
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
            most = tl.minimum(most, (_exact_neg_log(least) + 0.0).to(tl.int32, bitcast=True))
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
        other = -_INF
        if METRIC == "margin":
            others = tl.full([BLOCK], -_INF, tl.float32)
            for start in range(0, logits.vocab, BLOCK):
                here = start + tl.arange(0, BLOCK)
                others = tl.maximum(others, tl.where(here == token, -_INF, _raw(row, here)))
            other = tl.max(others, 0)
        zeros = tl.zeros([SPLITS], tl.float32)
        tl.store(p + 3 * plane, zeros, mask=ok)
        tl.store(p + 4 * plane, (token + tl.zeros([SPLITS], tl.int32)).to(tl.float32, bitcast=True), mask=ok)
        tl.store(p + 5 * plane, x + zeros, mask=ok)
        tl.store(p + 6 * plane, other + zeros, mask=ok)


class Current(NamedTuple):
    """Other tokens whose probabilities are asked for."""

    logits: Logits
    bitmask: Bitmask | None
    ids: Matrix
    probability: Tensor


@triton.jit(do_not_specialize=["n_rows", "n_splits", "exclude"])
def merge_partials_kernel(
    partials,
    plane,
    n_rows,
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
    best = merge_partials(partials, plane, row, ok, n_splits, exclude, SPLITS)
    tl.store(token_ids + row, best.token.to(tl.int64), mask=ok)
    tl.store(confidence + row, confidence_of(best, METRIC), mask=ok)
    tl.store(log_prob + row, log_prob_of(best), mask=ok)
    if current is not None:
        b = row // current.logits.positions
        position = row % current.logits.positions
        ids = current.ids.data + b.to(tl.int64) * current.ids.stride_b
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
    splits = min(tiles, 64, max(1, 4 * launch.processors(logits.device) // max(rows, 1)))
    tiles_per_split = launch.cdiv(tiles, splits)
    splits = launch.cdiv(tiles, tiles_per_split)
    partials = launch.workspace(logits.device, len(Partial._fields), rows, splits)
    if rows == 0:
        return partials
    inverse = 0.0 if isinstance(temperature, Tensor) else _inverse(temperature)
    given = (options.seed, temperature, options.top_k, options.top_p, options.min_p)
    of_rows, numbers = zip(*map(Rows.split, given), strict=True)
    arguments = {
        "logits": Logits.of(logits),
        "bitmask": Bitmask.optional(options.token_bitmask),
        "first_group": vocab_start // 4,
        "draws": Draws(*of_rows),
        "seed": numbers[0],
        "inverse_temperature": inverse,
        "top_k": numbers[2],
        "top_p": _normal(numbers[3]),
        "min_p": _normal(numbers[4]),
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


def _normal(x: float) -> float:
    """0, or a number that the interpreter, too, takes for a float32; what is smaller asks for the same."""
    return max(float(x), 2.0**-126) if x > 0.0 else 0.0


def _inverse(temperature: float) -> float:
    """Of a number in float32, rounded once; 0 of 0."""
    t = ctypes.c_float(min(temperature, 2.0**126)).value
    return ctypes.c_float(1.0 / t).value if t > 0.0 else 0.0


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
