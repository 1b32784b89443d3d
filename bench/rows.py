"""The shapes: decode steps of real models and engines, the peer's benchmark, and sweeps of one dimension."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Row(NamedTuple):
    """One shape. M query rows, N keys, C candidate columns (the last), D head dimension, V vocabulary."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    n_rows: int
    n_keys: int
    columns: int
    headdim: int
    layers: int = 1
    vocab: int = 0
    causal: bool = False

    @property
    def block(self) -> slice:
        """The candidate columns."""
        return slice(self.n_keys - self.columns, self.n_keys)

    def attention(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Random q and k."""
        generator = torch.Generator(device).manual_seed(0)
        q_shape = (self.batch, self.heads, self.n_rows, self.headdim)
        k_shape = (self.batch, self.kv_heads, self.n_keys, self.headdim)
        q = torch.randn(q_shape, generator=generator, device=device, dtype=dtype)
        return q, torch.randn(k_shape, generator=generator, device=device, dtype=dtype)

    def softmax_lse(self, q: Tensor, k: Tensor) -> Tensor:
        """Log-sum-exp of each row over all keys, [B, Hq, M]."""
        lse = torch.empty(q.shape[:3], device=q.device)
        group = self.heads // self.kv_heads
        for b in range(self.batch):  # a head at a time: [M, N] at the longest context is large
            for h in range(self.heads):
                logits = q[b, h].float() @ k[b, h // group].float().T
                lse[b, h] = torch.logsumexp(logits * self.headdim**-0.5, dim=-1)
        return lse

    def logits(self, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        """Random predictions [B, C, V]."""
        generator = torch.Generator(device).manual_seed(1)
        shape = (self.batch, self.columns, self.vocab)
        return torch.randn(shape, generator=generator, dtype=dtype, device=device).mul_(3)


DECODE = {
    "1": Row("LLaDA-8B, no cache, zero-shot", 1, 32, 32, 384, 384, 32, 128, 32, 126464),
    "2": Row("LLaDA-8B, no cache, 5-shot + 256", 1, 32, 32, 1280, 1280, 32, 128, 32, 126464),
    "3": Row("Fast-dLLM prefix cache", 1, 32, 32, 256, 1280, 32, 128, 32, 126464),
    "4": Row("Fast-dLLM dual cache", 8, 32, 32, 32, 1280, 32, 128, 32, 126464),
    "5": Row("LLaDA-MoE, dInfer, block 64 + vicinity", 1, 16, 16, 96, 1280, 64, 128, 16, 157184),
    "6": Row("LLaDA2.0-mini, block diffusion", 32, 16, 4, 32, 2080, 32, 128, 20, 157184),
    "7": Row("LLaDA2.0-flash, one rank of four", 8, 8, 1, 32, 2080, 32, 128, 32, 157184),
    "8": Row("Dream-7B, no cache", 1, 28, 4, 1024, 1024, 32, 128, 28, 152064),
    "9": Row("d3LLM-Dream, 4 blocks of 32 at once", 1, 28, 4, 128, 768, 128, 128, 28, 152064),
    "10": Row("Fast-dLLM v2 7B, sub-block", 1, 28, 4, 8, 2080, 8, 128, 28, 152064),
    "11": Row("SDAR-8B, block 4", 64, 32, 8, 4, 1024, 4, 128, 36, 151936),
    "12": Row("DiffusionGemma, canvas 256", 1, 8, 4, 256, 1280, 256, 512, 5, 262144),
    "13": Row("long context, block decode", 1, 32, 8, 32, 131072, 32, 128, 32, 126464),
}

#: Those that differ in what token confidence sees: rows 2, 3 and 13 are row 1 to it.
VOCABULARY = {key: row for key, row in DECODE.items() if key not in ("2", "3", "13")}


def _all_columns(batch: int, n_rows: int, n_keys: int, causal: bool = False) -> Row:
    """32 heads of 128, every key a candidate."""
    name = f"B={batch} M={n_rows} N={n_keys}" + (" causal" if causal else "")
    return Row(name, batch, 32, 32, n_rows, n_keys, n_keys, 128, causal=causal)


ALL_COLUMNS = {"a1": _all_columns(1, 1024, 1024), "a2": _all_columns(1, 32, 4096)}

#: Steps of engines whose keys lie in the pages of a cache.
PAGED = {key: DECODE[key] for key in ("4", "6", "11", "13")}

#: The last queries of a long context choose, of each key head, a 16th of its keys to keep.
LONG = {
    f"k{number}": Row(f"window of 32, N={n}", 1, 32, 8, 32, n, n, 128)
    for number, n in enumerate((4096, 8192, 32768, 131072), start=1)
}

#: The last 64 queries of a prompt choose what stays of its cache, in a layer of Llama 3 8B.
SNAPKV = {
    f"s{number}": Row(f"SnapKV, N={n}", 1, 32, 8, 64, n, n, 128, causal=True)
    for number, n in enumerate((4096, 16384, 32768), start=1)
}
#: All its queries do.
OBSERVED = {
    f"h{number}": Row(f"H2O, N={n}", 1, 32, 8, n, n, n, 128, causal=True)
    for number, n in enumerate((1024, 2048, 4096), start=1)
}

#: flash-colreduce's own benchmark.
PEER = {
    f"p{number}": row
    for number, row in enumerate(
        (
            *(_all_columns(batch, 1024, 1024) for batch in (1, 4, 16, 64, 256)),
            *(_all_columns(1, n, n) for n in (2048, 4096, 8192, 16384)),
            *(_all_columns(batch, 64, 16384, True) for batch in (1, 4, 16, 64, 256)),
            *(_all_columns(1, 512, n, True) for n in (16384, 32768, 65536, 131072, 262144)),
        ),
        start=1,
    )
}

BY_KEYS = {
    f"N={n}": Row(f"row 13 at N={n}", 1, 32, 8, 32, n, 32, 128) for n in (1024, 4096, 16384, 65536, 131072)
}
BY_COLUMNS = {
    f"C={c}": Row(f"row 3 at C={c}", 1, 32, 32, 256, 1280, c, 128) for c in (1, 8, 32, 128, 512, 1280)
}
BY_ROWS = {
    f"M={m}": Row(f"B=4, no cache, M=N={m}, 32 columns", 4, 32, 32, m, m, 32, 128)
    for m in (64, 256, 512, 1024)
}
BY_BATCH = {f"B={b}": Row(f"row 4 at B={b}", b, 32, 32, 32, 1280, 32, 128) for b in (1, 2, 4, 8, 16, 32)}

ROWS = {
    **DECODE,
    **ALL_COLUMNS,
    **LONG,
    **SNAPKV,
    **OBSERVED,
    **PEER,
    **BY_KEYS,
    **BY_ROWS,
    **BY_COLUMNS,
    **BY_BATCH,
}
QUICK = ("1", "4", "10", "a1", "a2", "p1", "N=1024", "N=16384", "C=8", "C=128", "B=1", "B=8")
