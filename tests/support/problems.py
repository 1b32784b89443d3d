"""Seeded problems with everything a caller may hand over, and the rule that judges an answer.

The memory around a view, and whatever the masks hide, holds NaN or infinity: a kernel that reads it shows.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import attn_sampler
from attn_sampler import reference

#: Allowed on top of twice the error of PyTorch in the same precision, relative to the largest true value:
#: what the roundings of a float32 dot product that ends near 20 make of exp() of it. (PyTorch's own largest
#: error over a tensor of few elements is a matter of luck.)
RELATIVE_TOLERANCE = 5e-6

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOAT8 = torch.float8_e4m3fn
ATTENTION_DTYPES = (*DTYPES, FLOAT8)
SIZES = (1, 7, 63, 113)
HEAD_DIMS = (32, 33, 40, 64, 80, 96, 128, 160, 256)
GROUPS = (1, 4, 7)
LAYOUTS = ("contiguous", "transposed", "every other row", "wide rows")
MASKS = ("none", "left", "right", "random", "one sequence hidden", "all hidden")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def descale(rng: random.Random, batch: int, kv_heads: int) -> Tensor:
    """Scales [B, Hkv] of a quantised tensor: one for all, or one for each head in memory of any order."""
    if rng.random() < 0.3:
        return torch.tensor(rng.uniform(0.25, 2.0)).expand(batch, kv_heads)
    values = torch.rand(kv_heads, 2 * batch, generator=generator(rng.randrange(1 << 30))) * 1.75 + 0.25
    return values[:, ::2].T


def dequantised(x: Tensor, scale: Tensor | None) -> Tensor:
    """The real values, in float64, of x [B, H, L, D] whose scales are [B, Hkv]."""
    if scale is None:
        return x.double()
    return x.double() * scale.double().repeat_interleave(x.shape[1] // scale.shape[1], dim=1)[..., None, None]


def strided(values: Tensor, layout: str) -> Tensor:
    """The values of [B, H, M, D] in a view of this memory layout, with NaN in the memory between."""
    batch, heads, rows, width = values.shape
    if layout == "transposed":
        storage = values.new_full((batch, rows, heads, width), torch.nan).transpose(1, 2)
    elif layout == "every other row":
        storage = values.new_full((batch, heads, 2 * rows + 1, width), torch.nan)[:, :, 1::2]
    elif layout == "wide rows":
        storage = values.new_full((batch, heads, rows, width + 5), torch.nan)[..., 3 : 3 + width]
    else:
        storage = torch.empty_like(values)
    return storage.copy_(values)


def boolean_mask(rng: random.Random, kind: str, batch: int, length: int) -> Tensor | None:
    """A mask [B, length], True where visible, as every other column of its memory."""
    if kind == "none":
        return None
    at = torch.arange(length).expand(batch, length)
    hidden = torch.tensor([[rng.randrange(length + 1)] for _ in range(batch)])
    if kind == "left":
        mask = at >= hidden
    elif kind == "right":
        mask = at < length - hidden
    elif kind == "random":
        mask = torch.rand(batch, length, generator=generator(rng.randrange(1 << 30))) < 0.6
    elif kind == "one sequence hidden":
        mask = torch.arange(batch)[:, None].expand(batch, length) != rng.randrange(batch)
    else:
        mask = torch.zeros(batch, length, dtype=torch.bool)
    storage = torch.ones(batch, 2 * length, dtype=torch.bool)
    storage[:, ::2] = mask
    return storage[:, ::2]


@dataclasses.dataclass
class AttentionProblem:
    """q, k and the keyword arguments that column_scores and attention_map share."""

    q: Tensor
    k: Tensor
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to(self, device: torch.device) -> AttentionProblem:
        """The same problem on a device, in the same memory layout."""
        options = {name: _to(value, device) for name, value in self.options.items()}
        return AttentionProblem(_to(self.q, device), _to(self.k, device), options)

    def double(self) -> AttentionProblem:
        """The same problem in float64: the rounded inputs, exact arithmetic on them."""
        options = {
            name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in self.options.items()
        }
        return AttentionProblem(self.q.double(), self.k.double(), options)

    def run(self, function: Callable[..., Tensor], **more: Any) -> Tensor:
        return function(self.q, self.k, **{**self.options, **more})


def _to(value: Any, device: torch.device) -> Any:
    if not isinstance(value, Tensor) or value.device == device:
        return value
    extent = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    if value.numel() == 0:
        return value.to(device)
    flat = value.as_strided((extent,), (1,), value.storage_offset()).to(device)
    return flat.as_strided(value.shape, value.stride())


def random_attention(
    seed: int,
    *,
    sizes: Sequence[int] = SIZES,
    key_sizes: Sequence[int] = (),
    headdims: Sequence[int] = HEAD_DIMS,
    groups: Sequence[int] = GROUPS,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> AttentionProblem:
    """A problem drawn from all layouts, sizes (of the keys: ``key_sizes`` if given), masks and options."""
    rng = random.Random(seed)
    window = random_window(seed)
    batch, kv_heads, group = rng.randint(1, 3), rng.randint(1, 2), rng.choice(groups)
    n_rows, n_keys = rng.choice(sizes), rng.choice(key_sizes or sizes)
    headdim, dtype = rng.choice(headdims), rng.choice(dtypes)
    spread = rng.choice((0.3, 1.0, 1.7))  # near uniform to peaked
    wide = torch.float32 if dtype == FLOAT8 else dtype
    q = normal(rng.randrange(1 << 30), batch, kv_heads * group, n_rows, headdim, dtype=wide) * spread
    k = normal(rng.randrange(1 << 30), batch, kv_heads, n_keys, headdim, dtype=wide) * spread
    key_mask = boolean_mask(rng, rng.choice(MASKS), batch, n_keys)
    query_mask = boolean_mask(rng, rng.choice(MASKS), batch, n_rows)
    options: dict[str, Any] = {
        "causal": rng.random() < 0.4,
        "diagonal": rng.random() < 0.7,
        "softmax_scope": "block" if rng.random() < 0.25 else "sequence",
        "softmax_scale": rng.choice((None, None, 1.5 * headdim**-0.5)),
        "query_start": rng.choice((None, None, 0, -3, -200, n_keys - 2, n_keys + 5)),
        "key_mask": key_mask,
        "query_mask": query_mask,
        "window_size": window,
    }
    if dtype == FLOAT8:
        scales = {name: descale(rng, batch, kv_heads) for name in ("q_descale", "k_descale")}
        q = dequantised(q, 1.0 / scales["q_descale"]).to(FLOAT8)
        k = dequantised(k, 1.0 / scales["k_descale"]).to(FLOAT8)
        options |= {name: value for name, value in scales.items() if rng.random() < 0.8}
    if rng.random() < 0.7:
        start = rng.randrange(n_keys)
        options["columns"] = slice(start, rng.randint(start + 1, min(n_keys, start + 40)))
    if options["softmax_scope"] == "sequence" and rng.random() < 0.5:
        lse = row_lse(q, k, **{n: v for n, v in options.items() if n in _LSE_OPTIONS})
        options["lse_base"] = rng.choice("e2")
        if options["lse_base"] == "2":
            lse = lse / torch.log(torch.tensor(2.0))
        lse[lse == -torch.inf] = rng.choice((0.0, -torch.inf, torch.inf, torch.nan))
        if rng.random() < 0.5:  # the strides of the CPU flash attention's lse
            lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
        options["softmax_lse"] = lse
    poison = torch.tensor(rng.choice((torch.nan, torch.inf, -torch.inf))).to(dtype)
    if key_mask is not None:
        k = torch.where(key_mask[:, None, :, None], k, poison)
    if query_mask is not None:
        q = torch.where(query_mask[:, None, :, None], q, poison)
    return AttentionProblem(strided(q, rng.choice(LAYOUTS)), strided(k, rng.choice(LAYOUTS)), options)


def random_window(seed: int) -> tuple[int, int]:
    """None, or one that ends at either side or both."""
    rng = random.Random(f"window {seed}")  # of its own: it takes nothing from what else is drawn
    left, right = (rng.choice((-1, 0, 1, rng.randint(2, 12), rng.randint(13, 90))) for _ in range(2))
    return (left, right) if rng.random() < 0.4 else (-1, -1)


_LSE_OPTIONS = (
    *("q_descale", "k_descale", "causal", "window_size", "softmax_scale", "query_start"),
    *("key_mask", "query_mask"),
)


def row_lse(q: Tensor, k: Tensor, **options: Any) -> Tensor:
    """Natural row log-sum-exp [B, Hq, M] float32, found in float64 without reference.attention's help."""
    batch, heads, n_rows, headdim = q.shape
    kv_heads, n_keys = k.shape[1:3]
    scale = options.get("softmax_scale") or headdim**-0.5
    q, k = dequantised(q, options.get("q_descale")), dequantised(k, options.get("k_descale"))
    grouped = q.view(batch, kv_heads, heads // kv_heads, n_rows, headdim)
    logits = scale * torch.einsum("bkgmd,bknd->bkgmn", grouped, k).flatten(1, 2)
    start = options.get("query_start")
    start = n_keys - n_rows if start is None else start
    if options.get("causal"):
        logits[..., torch.arange(n_keys)[None] > start + torch.arange(n_rows)[:, None]] = -torch.inf
    after = torch.arange(n_keys)[None] - start - torch.arange(n_rows)[:, None]  # a row's own key
    left, right = options.get("window_size", (-1, -1))
    if left >= 0:
        logits[..., after < -left] = -torch.inf
    if right >= 0:
        logits[..., after > right] = -torch.inf
    if options.get("key_mask") is not None:
        logits = logits.masked_fill(~options["key_mask"][:, None, None, :], -torch.inf)
    if options.get("query_mask") is not None:
        logits = logits.masked_fill(~options["query_mask"][:, None, :, None], -torch.inf)
    return logits.logsumexp(dim=-1).float()


def assert_accurate(actual: Tensor, same_precision: Tensor, truth: Tensor) -> None:
    """The largest error is at most twice PyTorch's in the same precision, plus the tolerance; NaN is NaN."""
    assert actual.dtype == torch.float32
    assert actual.shape == truth.shape
    assert truth.dtype == torch.float64
    actual, same_precision, truth = (x.detach().cpu().double() for x in (actual, same_precision, truth))
    assert torch.equal(actual.isnan(), truth.isnan())
    known = ~truth.isnan()
    actual, same_precision, truth = actual[known], same_precision[known], truth[known]
    if truth.numel() == 0:
        return
    assert truth.isfinite().all()
    error, baseline = (actual - truth).abs().max().item(), (same_precision - truth).abs().max().item()
    allowed = 2.0 * baseline + RELATIVE_TOLERANCE * truth.abs().max().item()
    assert error <= allowed, (
        f"error {error:.3g} > {allowed:.3g} (PyTorch in the same precision: {baseline:.3g})"
    )


def judge(name: str, backend: str, problem: AttentionProblem, **more: Any) -> Tensor:
    """Run column_scores or attention_map on a backend, judge the result and return it."""
    specification = getattr(reference, name)
    truth = problem.double().run(specification, **more)
    same_precision = problem.run(specification, **more)
    actual = problem.run(getattr(attn_sampler, name), backend=backend, **more)
    assert_accurate(actual, same_precision, truth)
    # What no row may see is exactly 0 (and what is exactly 0 in float64 is nothing else).
    assert (actual[truth == 0.0] == 0.0).all()
    return actual
