"""What one would use without this library, each in its own few lines of PyTorch.

Scores are over the keys ``columns``; queries are the last M positions, as in ``column_scores``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_INF = float("inf")


def _logits(q: Tensor, k: Tensor, causal: bool = False, first_row: int = 0) -> Tensor:
    """Scaled products [B, Hq, M, N] in the inputs' precision; row 0 stands at key ``first_row``."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = q.shape[-1] ** -0.5 * (q @ k.transpose(-1, -2))
    if causal:
        row = first_row + torch.arange(q.shape[2], device=q.device)[:, None]
        logits = logits.masked_fill(torch.arange(k.shape[2], device=q.device) > row, -_INF)
    return logits


def naive_scores(
    q: Tensor, k: Tensor, columns: slice, causal: bool = False, per_head: bool = False
) -> Tensor:
    """The whole attention matrix, then its column sums."""
    logits = _logits(q, k, causal, k.shape[2] - q.shape[2])
    attention = torch.softmax(logits, dim=-1, dtype=torch.float32)
    return attention[..., columns].sum(dim=2 if per_head else (1, 2))


def tiled_scores(
    q: Tensor,
    k: Tensor,
    columns: slice,
    causal: bool = False,
    per_head: bool = False,
    tile_bytes: int | None = None,
) -> Tensor:
    """The same by tiles of heads and rows that stay in the cache: float32 tiles of ``tile_bytes``."""
    if tile_bytes is None:
        tile_bytes = 4 << 20 if q.device.type == "cpu" else 256 << 20
    (batch, heads, n_rows, _), n_keys = q.shape, k.shape[2]
    group = heads // k.shape[1]
    tile = tile_bytes // 4
    rows = max(1, min(n_rows, tile // (batch * group * n_keys)))
    key_heads = max(1, tile // (batch * group * n_keys * rows))
    result = torch.zeros(batch, heads, columns.stop - columns.start, device=q.device)
    for h in range(0, k.shape[1], key_heads):
        some_heads = slice(h * group, (h + key_heads) * group)
        for i in range(0, n_rows, rows):
            logits = _logits(
                q[:, some_heads, i : i + rows], k[:, h : h + key_heads], causal, n_keys - n_rows + i
            )
            attention = torch.softmax(logits, dim=-1, dtype=torch.float32)
            result[:, some_heads] += attention[..., columns].sum(dim=2)
    return result if per_head else result.sum(dim=1)


def block_scores(q: Tensor, k: Tensor, softmax_lse: Tensor, columns: slice) -> Tensor:
    """The candidate columns alone, with the log-sum-exp that the forward attention computed."""
    logits = _logits(q, k[:, :, columns]).to(softmax_lse.dtype)
    return torch.exp(logits - softmax_lse[..., None]).sum(dim=(1, 2))


def top_columns(q: Tensor, k: Tensor, softmax_lse: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The keys of the largest scores of each key head, and these, as torch.topk has them."""
    attention = torch.exp(_logits(q, k).to(softmax_lse.dtype) - softmax_lse[..., None])
    scores, positions = attention.unflatten(1, (k.shape[1], -1)).sum(dim=(2, 3)).topk(count)
    return positions, scores


def snapkv(q: Tensor, k: Tensor, count: int, width: int) -> Tensor:
    """SnapKV's choice as kvpress makes it: the positions of count keys of each key head, the window first.

    The window's weights in the inputs' precision, averaged over its rows, pooled, averaged over the heads of
    a key head; its own keys are given one more than the largest score.
    """
    window, n_keys = q.shape[2], k.shape[2]
    weights = torch.softmax(_logits(q, k, True, n_keys - window), dim=-1, dtype=torch.float32).to(q.dtype)
    scores = weights[..., :-window].mean(dim=2)
    scores = torch.nn.functional.avg_pool1d(scores, width, stride=1, padding=width // 2)
    scores = scores.unflatten(1, (k.shape[1], -1)).mean(dim=2)
    scores = torch.nn.functional.pad(scores, (0, window), value=scores.max().item() + 1)
    return scores.topk(count).indices


def block_scope_scores(q: Tensor, k: Tensor, columns: slice) -> Tensor:
    """Queries and keys both of the block, softmax over the block."""
    size = columns.stop - columns.start
    attention = torch.softmax(_logits(q[:, :, -size:], k[:, :, columns]), dim=-1, dtype=torch.float32)
    return attention.sum(dim=(1, 2))


def output_attentions(q: Tensor, k: Tensor, v: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Attention written out, as models run it when asked for their weights; and the weights' column sums."""
    attention = torch.softmax(_logits(q, k), dim=-1, dtype=torch.float32).to(q.dtype)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return attention @ v, attention[..., columns].sum(dim=(1, 2), dtype=torch.float32)


def softmax_max(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Token and probability by a float32 softmax."""
    confidence, token_ids = torch.softmax(logits, dim=-1, dtype=torch.float32).max(dim=-1)
    return token_ids, confidence


def softmax_sample(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """A token sampled with Gumbel noise, and its probability, in float32."""
    x = logits.float()
    noise = -torch.log(-torch.log(torch.rand_like(x).clamp_(min=1e-30)))
    token_ids = (x / temperature + noise).argmax(dim=-1)
    return token_ids, torch.softmax(x, dim=-1).gather(-1, token_ids[..., None]).squeeze(-1)


def truncated_sample(logits: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """A token of the top_k largest and, of those, of the top_p of the mass, by sorting, in float32."""
    x = logits.float() / temperature
    x = x.masked_fill(x < x.topk(min(top_k, x.shape[-1]), dim=-1).values[..., -1:], -torch.inf)
    ordered, order = x.sort(dim=-1)
    removed = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - top_p
    removed[..., -1] = False
    x = x.masked_fill(removed.scatter(-1, order, removed), -torch.inf)
    noise = -torch.log(-torch.log(torch.rand_like(x).clamp_(min=1e-30)))
    token_ids = (x + noise).argmax(dim=-1)
    p = torch.softmax(logits, dim=-1, dtype=torch.float32)
    return token_ids, p.gather(-1, token_ids[..., None]).squeeze(-1)


def llada_confidence(logits: Tensor, temperature: float = 0.0) -> tuple[Tensor, Tensor]:
    """What LLaDA's generation script does: exponential noise and softmax, both in float64."""
    x = logits.double()
    noisy = x.exp() / (-torch.log(torch.rand_like(x))) ** temperature if temperature else x
    token_ids = noisy.argmax(dim=-1)
    return token_ids, torch.softmax(x, dim=-1).gather(-1, token_ids[..., None]).squeeze(-1)


def llada_step(tokens: Tensor, block: slice, logits: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """LLaDA's low-confidence remasking at one token a step: no attention; the block's logits only."""
    token_ids, confidence = llada_confidence(logits)
    masked = tokens[:, block] == mask_token_id
    candidates = torch.where(masked, confidence, -_INF)
    selected = torch.zeros_like(masked)
    for b in range(len(tokens)):
        selected[b, torch.topk(candidates[b], k=1).indices] = True
    tokens[:, block] = torch.where(selected & masked, token_ids, tokens[:, block])
    return token_ids, confidence


def attention_step(
    tokens: Tensor,
    block: slice,
    logits: Tensor,
    layers: Sequence[tuple[Tensor, Tensor, Tensor]],
    mask_token_id: int,
    tau: float = 0.9,
    scores_of: Callable[..., Tensor] = block_scores,
    confidence_of: Callable[..., tuple[Tensor, Tensor]] = softmax_max,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attn-Sampler's step in PyTorch: scores of all layers, confidence, dynamic threshold, commit."""
    scores = scores_of(*layers[0], slice(0, layers[0][1].shape[2]))
    for layer in layers[1:]:
        scores = scores + scores_of(*layer, slice(0, layer[1].shape[2]))
    token_ids, confidence = confidence_of(logits)
    masked = tokens[:, block] == mask_token_id
    high = masked & (confidence >= tau)
    theta = torch.where(masked & ~high, scores, -_INF).amax(dim=-1, keepdim=True)
    selected = high & (scores > theta)
    best = torch.where(masked, confidence, -_INF).argmax(dim=-1, keepdim=True)
    single = torch.zeros_like(masked).scatter_(-1, best, True) & masked
    selected = torch.where(selected.any(dim=-1, keepdim=True), selected, single)
    tokens[:, block] = torch.where(selected, token_ids, tokens[:, block])
    return token_ids, confidence, scores
