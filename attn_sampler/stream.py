"""The sampling stream and what may be drawn, as plain PyTorch: the part of the specification that is exact.

Twin of csrc/include/attn_sampler_random.h, equal to the last bit: additions, subtractions and multiplications
in float32, each rounded once, and no library logarithm or exponential.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_INF = float("inf")


def truncation(
    scaled: Tensor,  # [B, C, V] float32, logits times the inverse temperature
    top_k: Tensor,  # [B, 1, 1] int32, as the others
    top_p: Tensor,
    min_p: Tensor,
) -> Tensor:
    """Which tokens may be drawn: bool [B, C, V].

    Everything is said of a token's distance below the largest, in float32, so that ties are kept or dropped
    together. ``top_k`` keeps the tokens that fewer than k are above; ``top_p``, of the mass of those, the
    tokens above which less than p of it lies; ``min_p`` those whose probability is at least min_p times
    the largest. A token of the largest logit always stays. The mass is counted in integers: its sums do not
    depend on an order.
    """
    scaled = scaled.masked_fill(scaled.isnan(), -_INF)
    top = scaled.amax(dim=-1, keepdim=True)
    distance = torch.where(scaled < top, scaled - top, 0.0)

    ordered = distance.sort(dim=-1, descending=True).values
    first = torch.searchsorted(-ordered, -ordered)  # how many lie above each
    k = torch.where(top_k > 0, top_k, distance.shape[-1])
    weights = token_weight(ordered).where(first < k, 0)
    above = (weights.cumsum(dim=-1) - weights).gather(-1, first)
    mass = weights.sum(dim=-1, keepdim=True)
    kept = first < k
    within = above.to(torch.float64) < top_p.to(torch.float64) * mass.to(torch.float64)
    kept = kept & (within | ~((top_p > 0.0) & (top_p < 1.0)))
    least = -_exact_neg_log(min_p.clamp(2.0**-126, 1.0))
    kept = (kept & ((ordered >= least) | ~(min_p > 0.0))) | (ordered == 0.0)
    lowest = ordered.masked_fill(~kept, 0.0).amin(dim=-1, keepdim=True)
    return distance >= lowest


def token_weight(distance: Tensor) -> Tensor:
    """exp(distance) in units of 2^-30, rounded down; int64 of float32 distances <= 0. The same everywhere."""
    t = (distance * float.fromhex("0x1.715476p+0")).clamp(min=-64.0)
    whole = t.to(torch.int32)  # rounded towards 0
    f = t - whole.to(torch.float32)  # in (-1, 0]
    p = torch.full_like(f, _EXP2_POLYNOMIAL[0])
    for coefficient in _EXP2_POLYNOMIAL[1:]:
        p = p * f + coefficient
    scale = ((whole + (127 + 30)) << 23).view(torch.float32)
    return (p * scale).to(torch.int64)


def inverse_temperature(temperature: Tensor) -> Tensor:
    """1 / temperature in float32, a normal number, or 0 for what is none: 0, below the least, or NaN."""
    return torch.where(temperature >= 2.0**-120, 1.0 / temperature.clamp(max=2.0**126), 0.0)


def gumbel_noise(
    shape: Sequence[int], seed: int | Tensor, device: torch.device, vocab_start: int = 0
) -> Tensor:
    """Standard Gumbel noise, float32 [B, C, V], of the stream (seed, position, token), from a token on."""
    batch, positions, vocab = shape
    skipped = vocab_start % 4  # tokens of the first group
    groups = -(-(skipped + vocab) // 4)
    if not isinstance(seed, Tensor):
        seed = torch.full((batch,), seed, dtype=torch.int64, device=device)
    key = seed[:, None, None]
    group = vocab_start // 4 + torch.arange(groups, device=device)[None, None, :]
    position = torch.arange(positions, device=device)[None, :, None]
    words = torch.stack(philox(key, group, position), dim=-1)  # [B, C, groups, 4]
    return gumbel(words.reshape(batch, positions, groups * 4)[..., skipped : skipped + vocab])


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, of 32-bit random words."""
    w = (words.to(torch.float32) * 2.0**-32 + 2.0**-33).clamp(max=1.0 - 2.0**-24)
    u = 1.0 - w
    exponential = (w - (1.0 - u)) + _exact_neg_log(u)  # what rounding took off 1 - w, put back
    return _exact_neg_log(exponential)


def philox(seed: Tensor, group: Tensor, position: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words, held in int64."""
    word = 0xFFFFFFFF
    k0, k1 = seed & word, (seed >> 32) & word
    c0, c1 = torch.broadcast_tensors(group, position + torch.zeros_like(seed))
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps; its 64 bits are the product's
        c0, c1, c2, c3 = (
            ((p1 >> 32) & word) ^ c1 ^ k0,
            p1 & word,
            ((p0 >> 32) & word) ^ c3 ^ k1,
            p0 & word,
        )
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return c0, c1, c2, c3


# 2^f on (-1, 0], highest power first, 1 at 0.
_EXP2_POLYNOMIAL = tuple(
    float.fromhex(c)
    for c in (
        *("0x1.eeabe2p-11", "0x1.2d8974p-7", "0x1.c4f802p-5", "0x1.ebe2eap-3"),
        *("0x1.62e3b6p-1", "0x1p+0"),
    )
)
# log(1 + f) = f - f^2 / 2 + f^3 p(f) on [sqrt(1/2) - 1, sqrt(2) - 1], highest power first.
_LOG_POLYNOMIAL = tuple(
    float.fromhex(c)
    for c in (
        *("-0x1.38b81ap-4", "0x1.055bdcp-3", "-0x1.0d84eep-3", "0x1.22da06p-3"),
        *("-0x1.54724cp-3", "0x1.99a00ap-3", "-0x1.000226p-2", "0x1.555554p-2"),
    )
)


def _exact_neg_log(x: Tensor) -> Tensor:
    """-log(x) of normal positive float32 values."""
    bits = x.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - exponent * (1 << 23)).view(torch.float32) - 1.0
    e = exponent.to(torch.float32)
    z = f * f
    p = torch.full_like(f, _LOG_POLYNOMIAL[0])
    for coefficient in _LOG_POLYNOMIAL[1:]:
        p = p * f + coefficient
    y = (f * z) * p
    y = y + e * float.fromhex("-0x1.bd0106p-13")
    y = y - 0.5 * z
    return -((f + y) + e * float.fromhex("0x1.63p-1"))
