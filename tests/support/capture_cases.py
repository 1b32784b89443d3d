"""Calls of attention for the tests of AttentionCapture, as torch computes them and written out by hand."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from attn_sampler import AttentionCapture, attention_calls

B, H, M, N, D = 2, 4, 7, 13, 16
COLUMNS = slice(3, 9)


def qkv(
    seed: int = 0, *, rows: int = N, kv_heads: int = H, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, rows, D), (B, kv_heads, N, D), (B, kv_heads, N, D)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


def by_hand(
    q: Tensor,
    k: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    columns: slice = COLUMNS,
    query_mask: Tensor | None = None,
    start: int | None = None,
    block: bool = False,
    diagonal: bool = True,
    reduction: str = "sum",
) -> Tensor:
    """Column scores [B, C], one row at a time."""
    heads, rows, keys = q.shape[1], q.shape[2], k.shape[2]
    start = (0 if causal else keys - rows) if start is None else start
    scale = q.shape[3] ** -0.5 if scale is None else scale
    lo, hi, _ = columns.indices(keys)
    scores = torch.zeros(q.shape[0], hi - lo, dtype=dtype)
    if mask is not None:
        mask = mask.expand(q.shape[0], heads, rows, keys)
    for b in range(q.shape[0]):
        for h in range(heads):
            key = k[b, h * k.shape[1] // heads].to(dtype)
            received: list[list[Tensor]] = [[] for _ in range(hi - lo)]
            for i in range(rows):
                logits = key @ q[b, h, i].to(dtype) * scale
                sees = torch.ones(keys, dtype=torch.bool)
                if causal:
                    sees &= torch.arange(keys) <= i  # torch aligns at the top left
                if mask is not None and mask.dtype == torch.bool:
                    sees &= mask[b, h, i]
                elif mask is not None:
                    seen = mask[b, h, i] > torch.finfo(mask.dtype).min
                    sees &= seen if seen.any() else mask[b, h, i] > -torch.inf
                    logits = logits + mask[b, h, i].to(dtype)
                if query_mask is not None:
                    sees &= query_mask[b, i]
                if block:
                    inside = (torch.arange(keys) >= lo) & (torch.arange(keys) < hi)
                    sees &= inside if lo <= start + i < hi else False
                weights = (
                    torch.where(sees, torch.exp(logits - logits[sees].max()), 0.0) if sees.any() else None
                )
                for c in range(lo, hi):
                    if sees[c] and (diagonal or c != start + i):
                        received[c - lo].append(weights[c] / weights.sum())
            for c, values in enumerate(received):
                if values:
                    reduce = {"sum": torch.sum, "mean": torch.mean, "max": torch.max}[reduction]
                    scores[b, c] += reduce(torch.stack(values))
    return scores


def captured(
    q: Tensor, k: Tensor, v: Tensor, attention: dict, **options: object
) -> tuple[Tensor, AttentionCapture]:
    with AttentionCapture(options.pop("columns", COLUMNS), **options) as capture:  # type: ignore[arg-type]
        output = F.scaled_dot_product_attention(q, k, v, **attention)
    return output, capture


def random_bool(*shape: int, seed: int = 5) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.3


def random_bias(*shape: int, seed: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def without_row(mask: Tensor) -> Tensor:
    """Row 2 sees nothing."""
    mask = mask.clone()
    mask[..., 2, :] = False if mask.dtype == torch.bool else -torch.inf
    return mask


lowest = torch.finfo(torch.float32).min
# name -> attn_mask, rows, kv_heads, is_causal, scale
CALLS: dict[str, dict] = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal, fewer rows": {"is_causal": True, "rows": M},
    "cache": {"rows": M},
    "one row": {"rows": 1, "attn_mask": random_bool(1, N)},
    "scale": {"scale": 0.7},
    "grouped heads": {"kv_heads": 2, "enable_gqa": True},
    "one key head": {"kv_heads": 1, "enable_gqa": True, "rows": M},
    "key mask": {"attn_mask": random_bool(B, 1, 1, N)},
    "key mask, cache": {"attn_mask": random_bool(B, 1, 1, N), "rows": M},
    "key mask, grouped": {"attn_mask": random_bool(B, 1, 1, N), "kv_heads": 2, "enable_gqa": True},
    "key mask, expanded": {"attn_mask": random_bool(B, 1, 1, N).expand(B, H, N, N)},
    "key mask, shared": {"attn_mask": random_bool(1, N)},
    "key mask, a sequence sees nothing": {"attn_mask": torch.tensor([True, False])[:, None, None, None]},
    "row mask": {"attn_mask": random_bool(B, 1, N, 1)},
    "full mask": {"attn_mask": random_bool(B, 1, N, N)},
    "full mask, grouped": {"attn_mask": random_bool(B, 1, N, N), "kv_heads": 2, "enable_gqa": True},
    "full mask, a row sees nothing": {"attn_mask": without_row(random_bool(B, H, N, N))},
    "2-d mask": {"attn_mask": random_bool(N, N)},
    "3-d mask": {"attn_mask": random_bool(H, N, N)},
    "3-d key mask": {"attn_mask": random_bool(1, 1, N)},
    "3-d bias": {"attn_mask": random_bias(H, N, N)},
    "3-d mask, a row sees nothing": {"attn_mask": without_row(random_bool(1, N, N))},
    "bias": {"attn_mask": random_bias(B, 1, N, N)},
    "bias per head, cache": {"attn_mask": random_bias(1, H, M, N), "rows": M},
    "bias, a row sees nothing": {"attn_mask": without_row(random_bias(B, H, N, N))},
    "lowest finite bias": {"attn_mask": torch.where(without_row(random_bool(B, 1, N, N)), 0.0, lowest)},
}  # fmt: skip


def forward(layers: int, *, attention: dict | None = None, seed: int = 0, rows: int = N) -> list[Tensor]:
    """As many attention calls; the float64 scores of each."""
    truths = []
    for layer in range(layers):
        q, k, v = qkv(seed + layer, rows=rows)
        F.scaled_dot_product_attention(q, k, v, **(attention or {}))
        truths.append((q, k))
    return [by_hand(q, k) for q, k in truths]


def nothing_is_left() -> bool:
    return torch._C._len_torch_function_stack() == 0 and not attention_calls.open_captures()
