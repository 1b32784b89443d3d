"""A small masked-diffusion model whose attention can be read, for the tests of the decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB, MASK, EOS = 23, 22, 3


class ToyModel(nn.Module):
    """Two bidirectional layers with rotary positions, so that left padding changes nothing but rounding.

    ``by_hand`` writes attention out and keeps its weights, [B, H, M, N] a layer, in ``weights``.
    """

    def __init__(
        self, seed: int = 0, *, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float32
    ):
        super().__init__()
        self.heads, self.kv_heads, self.headdim, self.by_hand = heads, kv_heads, 8, False
        self.weights: list[Tensor] = []
        self.calls: list[dict[str, object]] = []
        width = heads * self.headdim
        self.embedding = nn.Embedding(VOCAB, width)
        self.projections = nn.ModuleList(
            nn.Linear(width, (heads + 2 * kv_heads) * self.headdim) for _ in range(2)
        )
        self.outputs = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, VOCAB)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * (
                0.4 if parameter.dim() > 1 else 0.1
            )
        self.to(dtype)

    def forward(self, tokens: Tensor, **keywords: Tensor) -> Tensor:
        self.calls.append({"tokens": tokens.clone(), **keywords})
        self.weights = []
        return self.compute(tokens, **keywords)

    def compute(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = None if attention_mask is None else self.attention_bias(attention_mask)
        x = self.embedding(tokens)
        batch, length, width = x.shape
        for projection, output in zip(self.projections, self.outputs, strict=True):
            qkv = projection(F.rms_norm(x, (width,))).view(batch, length, -1, self.headdim).transpose(1, 2)
            q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
            y = self.attend(rotate(q), rotate(k), v, mask)
            x = x + output(y.transpose(1, 2).reshape(batch, length, width))
        return self.head(F.rms_norm(x, (width,))) * 2.0

    def attention_bias(self, attention_mask: Tensor) -> Tensor:
        return attention_mask[:, None, None, :]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if not self.by_hand:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        logits = q @ k.transpose(-1, -2) * self.headdim**-0.5
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        self.weights.append(torch.softmax(logits, dim=-1))
        return self.weights[-1] @ v


def rotate(x: Tensor) -> Tensor:
    """Rotary positions on [B, H, T, 8]."""
    angle = torch.outer(torch.arange(x.shape[2]), 3.0 ** -torch.arange(4)).to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)
