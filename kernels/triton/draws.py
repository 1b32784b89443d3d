"""The sampling stream, logits and which tokens are there, and what each row draws by."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# Constants of the sampling stream; csrc/include/attn_sampler_random.h is its specification.
_WORD_SCALE = tl.constexpr(2.0**-32)
_WORD_OFFSET = tl.constexpr(2.0**-33)
_WORD_MAX = tl.constexpr(1.0 - 2.0**-24)
#: The largest noise of all words, that of word 0.
MOST_NOISE = tl.constexpr(float.fromhex("0x1.6dfb52p+4"))
_SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
_LOG2_HIGH = tl.constexpr(float.fromhex("0x1.63p-1"))
_LOG2_LOW = tl.constexpr(float.fromhex("-0x1.bd0106p-13"))
_EXP2_UNIT = tl.constexpr(float.fromhex("0x1.715476p+0"))
_E0 = tl.constexpr(float.fromhex("0x1.eeabe2p-11"))
_E1 = tl.constexpr(float.fromhex("0x1.2d8974p-7"))
_E2 = tl.constexpr(float.fromhex("0x1.c4f802p-5"))
_E3 = tl.constexpr(float.fromhex("0x1.ebe2eap-3"))
_E4 = tl.constexpr(float.fromhex("0x1.62e3b6p-1"))
_LEAST_TEMPERATURE, _MOST_TEMPERATURE = tl.constexpr(2.0**-120), tl.constexpr(2.0**126)
_P0 = tl.constexpr(float.fromhex("-0x1.38b81ap-4"))
_P1 = tl.constexpr(float.fromhex("0x1.055bdcp-3"))
_P2 = tl.constexpr(float.fromhex("-0x1.0d84eep-3"))
_P3 = tl.constexpr(float.fromhex("0x1.22da06p-3"))
_P4 = tl.constexpr(float.fromhex("-0x1.54724cp-3"))
_P5 = tl.constexpr(float.fromhex("0x1.99a00ap-3"))
_P6 = tl.constexpr(float.fromhex("-0x1.000226p-2"))
_P7 = tl.constexpr(float.fromhex("0x1.555554p-2"))


@triton.jit
def exact_neg_log(x):
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
    exponential = (w - (1.0 - u)) + exact_neg_log(u)
    return exact_neg_log(exponential)


@triton.jit
def token_weight(distance):
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


class Logits(NamedTuple):
    """Logits [B, C, V]."""

    data: Tensor
    stride_b: int
    stride_c: int
    stride_v: int
    vocab: int

    @classmethod
    def of(cls, x: Tensor) -> Logits:
        return cls(x, *x.stride(), x.shape[2])


@triton.jit
def is_allowed(bitmask, b, position, token, ok):
    """Whether a token's bit is set, or there are none."""
    allowed = ok
    if bitmask is not None:
        word = bitmask.data + b.to(tl.int64) * bitmask.stride_b + position.to(tl.int64) * bitmask.stride_c
        bits = tl.load(word + (token // 32) * bitmask.stride_w, mask=ok, other=0)
        allowed = ok & (((bits >> (token % 32)) & 1) != 0)
    return allowed


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
def draw_of(draws, seed, inverse_temperature, top_k, top_p, min_p, b):
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


def normal(x: float) -> float:
    """0, or a number that the interpreter, too, takes for a float32; what is smaller asks for the same."""
    return max(float(x), 2.0**-126) if x > 0.0 else 0.0


def inverse_of(temperature: float) -> float:
    """Of a number in float32, rounded once; 0 of 0."""
    t = ctypes.c_float(min(temperature, 2.0**126)).value
    return ctypes.c_float(1.0 / t).value if t > 0.0 else 0.0
