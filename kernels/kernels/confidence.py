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
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch

FIELDS = 7
_NO_TOKEN = tl.constexpr(2**31 - 1)  # loses every tie to a real token
_LOG2E = tl.constexpr(1.4426950408889634)
_INF = tl.constexpr(float("inf"))

# Constants of the sampling stream; csrc/include/attn_sampler_random.h is its specification.
_WORD_SCALE = tl.constexpr(2.0**-32)
_WORD_OFFSET = tl.constexpr(2.0**-33)
_WORD_MAX = tl.constexpr(1.0 - 2.0**-24)
_SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
_LOG2_HIGH = tl.constexpr(float.fromhex("0x1.63p-1"))
_LOG2_LOW = tl.constexpr(float.fromhex("-0x1.bd0106p-13"))
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
def _gumbel_noise(seed, position, group):
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
def _finite_or_zero(m):
    """A maximum to subtract: 0 in place of -inf, whose terms are all 0 anyway."""
    return tl.where(m == -_INF, 0.0, m)


@triton.jit
def _distance(m, top):
    """From a maximum to a larger one, below 0; never -inf, because sums of 0 are multiplied by it too."""
    distance = m - _finite_or_zero(top)
    return tl.where(m == -_INF, 0.0, tl.where(distance < -1e4, -1e4, distance))


@triton.jit
def _reduce_partials(m, l, t, key, token, x, other, AXIS: tl.constexpr):  # noqa: E741
    """Merge the partials along an axis."""
    top = tl.max(m, AXIS, keep_dims=True)
    distance = _distance(m, top)
    weight = tl.exp2(distance * _LOG2E)
    t = tl.sum(weight * (t + distance * l), AXIS)
    l = tl.sum(weight * l, AXIS)  # noqa: E741
    best = tl.max(key, AXIS, keep_dims=True)
    winner = tl.min(tl.where(key == best, token, _NO_TOKEN), AXIS, keep_dims=True)
    won = token == winner
    x = tl.max(tl.where(won, x, -_INF), AXIS)
    other = tl.max(tl.where(won, other, m), AXIS)
    return tl.max(m, AXIS), l, t, tl.max(key, AXIS), tl.min(winner, AXIS), x, other


@triton.jit
def merge_partials(partials, plane, row, row_ok, n_splits, SPLITS: tl.constexpr):
    """Merge the stored partials of rows: partials[field * plane + row * n_splits + split]."""
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
    return _reduce_partials(m, l, t, key, token, x, other, 1)


@triton.jit
def confidence_of(m, l, t, x, other, METRIC: tl.constexpr):  # noqa: E741
    """The metric of a complete partial."""
    shift = _finite_or_zero(m)
    if METRIC == "entropy":
        value = t / l - tl.log(l)
        value = tl.where(value > 0.0, 0.0, value)
    else:
        value = tl.exp2((x - shift) * _LOG2E)
        if METRIC == "margin":
            value -= tl.exp2((other - shift) * _LOG2E)
        value = value / l
    return value


@triton.jit(
    do_not_specialize=["seed", "exclude", "inverse_temperature", "first_group", "n_counters", "n_splits"]
)
def _token_partials_kernel(
    logits,
    stride_b,
    stride_c,
    stride_v,
    n_positions,
    vocab,
    first_group,
    seeds,
    stride_seed,
    seed,
    inverse_temperature,
    exclude,
    partials,
    plane,
    n_splits,
    split_size,
    counters,
    n_counters,
    SAMPLE: tl.constexpr,
    LEAD: tl.constexpr,
    METRIC: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """The partial of one row and one split of the vocabulary; clears the counters of the next kernel.

    Tiles begin with a group of four tokens of the sampling stream: the first of them LEAD places before the
    logits, with ``first_group``.
    """
    pid = tl.program_id(0)
    if counters is not None:
        for index in range(pid, n_counters, tl.num_programs(0)):
            tl.store(counters + index, 0)
    row = pid // n_splits
    split = pid % n_splits
    batch = row // n_positions
    position = row % n_positions
    base = logits + batch.to(tl.int64) * stride_b + position.to(tl.int64) * stride_c
    first = split * split_size - LEAD
    last = tl.minimum(first + split_size, vocab)
    if SAMPLE:
        row_seed = seed.to(tl.int64)
        if seeds is not None:
            row_seed = tl.load(seeds + batch.to(tl.int64) * stride_seed)

    # Sampling and the margin need the best token of every tile. Without them a lane only remembers the tile
    # in which its maximum rose, and looks the token up there at the end: half the work for each logit.
    KEYED: tl.constexpr = SAMPLE or METRIC == "margin"
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
        raw = tl.load(base + here.to(tl.int64) * stride_v, mask=there, other=-_INF).to(tl.float32)
        if (exclude >= start) & (exclude < start + BLOCK_K * BLOCK_W):
            raw = tl.where(here == exclude, -_INF, raw)

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
            if SAMPLE:
                group = (start + LEAD) // 4 + (
                    tl.arange(0, BLOCK_K)[:, None] * (BLOCK_W // 4) + tl.arange(0, BLOCK_W // 4)[None, :]
                )
                group = first_group.to(tl.uint32) + group.to(tl.uint32)
                keys = raw * inverse_temperature + _gumbel_noise(row_seed, position, group)
                keys = tl.where(keys == keys, keys, -_INF)
            else:
                keys = clean
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
        raw = tl.load(base + here.to(tl.int64) * stride_v, mask=here < last, other=-_INF).to(tl.float32)
        hit = found[None, :] & (raw == m[None, :]) & (here != exclude)
        token = tl.min(tl.where(hit, here, _NO_TOKEN), 0)
    m, l, t, key, token, x, other = _reduce_partials(m, l, t, key, token, x, other, 0)  # noqa: E741
    if not KEYED:
        # No logit above -inf: the first token there is.
        lowest = first + (exclude == first).to(tl.int32)
        token = tl.where((token == _NO_TOKEN) & (lowest < last), lowest, token)
    p = partials + row.to(tl.int64) * n_splits + split
    tl.store(p, m)
    tl.store(p + plane, l)
    tl.store(p + 2 * plane, t)
    tl.store(p + 3 * plane, key)
    tl.store(p + 4 * plane, token.to(tl.float32, bitcast=True))
    tl.store(p + 5 * plane, x)
    tl.store(p + 6 * plane, other)


@triton.jit(do_not_specialize=["n_rows", "n_splits"])
def _merge_partials_kernel(
    partials,
    plane,
    n_rows,
    n_splits,
    token_ids,
    confidence,
    METRIC: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Tokens and confidence of BLOCK rows."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = row < n_rows
    m, l, t, _, token, x, other = merge_partials(  # noqa: E741
        partials, plane, row, ok, n_splits, SPLITS
    )
    tl.store(token_ids + row, token.to(tl.int64), mask=ok)
    tl.store(confidence + row, confidence_of(m, l, t, x, other, METRIC), mask=ok)


def token_partials(
    logits: Tensor,  # [B, C, V]
    seeds: Tensor | None,  # [B] int64
    metric: str,
    temperature: float,
    seed: int,
    exclude_token_id: int,
    *,
    vocab_start: int = 0,
    counters: Tensor | None = None,
) -> Tensor:
    """Mergeable partials of every row, float32 ``[7, B * C, S]`` for S splits of the vocabulary.

    Token t draws the noise of token ``vocab_start + t``; sampling reads the logits in vectors only where that
    start is a multiple of 4. ``counters`` (int32) are set to 0 on the way.
    """
    batch, positions, vocab = logits.shape
    parameters = launch.config(
        "token_confidence", "float32" if logits.element_size() == 4 else "narrow", logits.device
    )
    tile = parameters.block_m * parameters.block_n
    rows = batch * positions
    lead = vocab_start % 4 if temperature > 0.0 else 0
    tiles = triton.cdiv(lead + vocab, tile)
    splits = min(tiles, 64, max(1, 4 * launch.processors(logits.device) // max(rows, 1)))
    tiles_per_split = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, tiles_per_split)
    partials = launch.workspace(logits, FIELDS, rows, splits)
    if rows == 0:
        return partials
    launch.launch(
        _token_partials_kernel,
        rows * splits,
        (
            logits,
            *logits.stride(),
            positions,
            vocab,
            vocab_start // 4,
            seeds,
            0 if seeds is None else seeds.stride(0),
            seed,
            1.0 / temperature if temperature > 0.0 else 0.0,
            exclude_token_id,
            partials,
            rows * splits,
            splits,
            tiles_per_split * tile,
            counters,
            0 if counters is None else counters.numel(),
        ),
        {
            "SAMPLE": temperature > 0.0,
            "LEAD": lead,
            "METRIC": metric,
            "BLOCK_K": parameters.block_m,
            "BLOCK_W": parameters.block_n,
        },
        parameters,
        device=logits.device,
        # The sampling stream is fixed to the last bit: every product and sum is rounded by itself.
        fuse_multiply_add=temperature == 0.0,
    )
    return partials


def merge_token_partials(
    partials: Tensor,  # [7, B * C, S]
    metric: str,
    token_ids: Tensor,  # [B, C] int64
    confidence: Tensor,  # [B, C] float32
) -> None:
    """Write the tokens and their confidence, from the partials of the whole vocabulary."""
    _, rows, splits = partials.shape
    if rows == 0:
        return
    width = triton.next_power_of_2(splits)
    block = max(1, min(32, 1024 // width))
    launch.launch(
        _merge_partials_kernel,
        triton.cdiv(rows, block),
        (partials, rows * splits, rows, splits, token_ids, confidence),
        {"METRIC": metric, "BLOCK": block, "SPLITS": width},
        launch.Config(block, width, 4, 1),
        device=partials.device,
    )


def token_confidence(
    token_ids: Tensor,
    confidence: Tensor,
    logits: Tensor,
    seeds: Tensor | None,
    metric: str,
    temperature: float,
    seed: int,
    exclude_token_id: int,
    vocab_start: int,
) -> None:
    partials = token_partials(
        logits, seeds, metric, temperature, seed, exclude_token_id, vocab_start=vocab_start
    )
    merge_token_partials(partials, metric, token_ids, confidence)
