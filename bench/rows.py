"""Decode shapes of real models and engines: what one sampling step sees."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Row(NamedTuple):
    """One shape. M query rows, N keys, C candidate columns, D head dimension, V vocabulary."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    n_rows: int
    n_keys: int
    columns: int
    headdim: int
    layers: int
    vocab: int

    def attention(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k and their exact log-sum-exp."""
        generator = torch.Generator(device).manual_seed(0)
        q_shape = (self.batch, self.heads, self.n_rows, self.headdim)
        k_shape = (self.batch, self.kv_heads, self.n_keys, self.headdim)
        q = torch.randn(q_shape, generator=generator, device=device).to(dtype)
        k = torch.randn(k_shape, generator=generator, device=device).to(dtype)
        lse = torch.empty(self.batch, self.heads, self.n_rows, device=device)
        group = self.heads // self.kv_heads
        for h in range(self.heads):  # a head at a time: [B, M, N] at the longest context is large
            logits = q[:, h].float() @ k[:, h // group].float().transpose(-1, -2)
            lse[:, h] = torch.logsumexp(logits * self.headdim**-0.5, dim=-1)
        return q, k, lse

    def logits(self, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        """Random predictions [B, C, V]."""
        generator = torch.Generator(device).manual_seed(1)
        shape = (self.batch, self.columns, self.vocab)
        return 3 * torch.randn(shape, generator=generator, dtype=dtype, device=device)


ROWS = {
    1: Row("LLaDA-8B, no cache, zero-shot", 1, 32, 32, 384, 384, 32, 128, 32, 126464),
    2: Row("LLaDA-8B, no cache, 5-shot + 256", 1, 32, 32, 1280, 1280, 32, 128, 32, 126464),
    3: Row("Fast-dLLM prefix cache", 1, 32, 32, 256, 1280, 32, 128, 32, 126464),
    4: Row("Fast-dLLM dual cache", 8, 32, 32, 32, 1280, 32, 128, 32, 126464),
    5: Row("LLaDA-MoE, dInfer, block 64 + vicinity", 1, 16, 16, 96, 1280, 64, 128, 16, 157184),
    6: Row("LLaDA2.0-mini, block diffusion", 32, 16, 4, 32, 2080, 32, 128, 20, 157184),
    7: Row("LLaDA2.0-flash, one rank of four", 8, 8, 1, 32, 2080, 32, 128, 32, 157184),
    8: Row("Dream-7B, no cache", 1, 28, 4, 1024, 1024, 32, 128, 28, 152064),
    9: Row("d3LLM-Dream, 4 blocks of 32 at once", 1, 28, 4, 128, 768, 128, 128, 28, 152064),
    10: Row("Fast-dLLM v2 7B, sub-block", 1, 28, 4, 8, 2080, 8, 128, 28, 152064),
    11: Row("SDAR-8B, block 4", 64, 32, 8, 4, 1024, 4, 128, 36, 151936),
    12: Row("DiffusionGemma, canvas 256", 1, 8, 4, 256, 1280, 256, 512, 5, 262144),
    13: Row("long context, block decode", 1, 32, 8, 32, 131072, 32, 128, 32, 126464),
}
