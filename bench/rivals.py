"""What one would write without this library."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_scores(q: Tensor, k: Tensor, columns: slice) -> Tensor:
    """The whole attention matrix in the inputs' precision, then its column sums."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    attention = torch.softmax(q.shape[-1] ** -0.5 * (q @ k.transpose(-1, -2)), dim=-1, dtype=torch.float32)
    return attention[..., columns].sum(dim=(1, 2))


def block_scores(q: Tensor, k: Tensor, softmax_lse: Tensor, columns: slice) -> Tensor:
    """The candidate columns alone, with the log-sum-exp that the forward attention computed."""
    k = k[:, :, columns].repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = q.shape[-1] ** -0.5 * (q @ k.transpose(-1, -2)).float()
    return torch.exp(logits - softmax_lse[..., None]).sum(dim=(1, 2))


def softmax_max(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Token and probability by a float32 softmax."""
    confidence, token_ids = torch.softmax(logits, dim=-1, dtype=torch.float32).max(dim=-1)
    return token_ids, confidence


def float64_confidence(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Token and probability through float64, the precision that LLaDA's own script samples in."""
    token_ids = logits.argmax(dim=-1)
    p = torch.softmax(logits.to(torch.float64), dim=-1)
    return token_ids, p.gather(-1, token_ids[..., None]).squeeze(-1)
