"""What an ``attn_mask`` lets each query row see, in the terms of the kernels if they have any for it.

Models spell one mask in many ways: booleans, zeros beside -inf or the lowest finite value, a subclass of
PyTorch's, each broadcast over what it does not depend on. Most mean no more than a mask of keys and a band of
them about each row: a causal limit, a sliding window.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

#: A float32 log-sum-exp so large still tells 1 of 10,000 apart.
_SHIFT = 1024.0


class Visible(NamedTuple):
    """What the rows see: the keys of the mask inside the band; or what the bias says."""

    key_mask: Tensor | None = None  # [B, N] bool
    band: tuple[int | None, int | None] = (None, None)  # row i sees from i + band[0] to i + band[1]
    bias: Tensor | None = None  # [B, Hq | 1, M, N]: bool, or added to the logits, -inf where hidden
    shifted: bool = False  # a float32 log-sum-exp of some row does not tell the weights of its keys

    def window_size(self, start: int) -> tuple[int, int] | None:
        """The band as ``column_scores`` takes it for rows that start at this key; None where it cannot."""
        low, high = self.band
        left, right = -1 if low is None else start - low, -1 if high is None else high - start
        fits = (low is None or left >= 0) and (high is None or right >= 0)
        return (left, right) if fits else None

    def table(self, n_rows: int, n_keys: int, device: torch.device) -> Tensor:
        """The key mask and the band as a boolean table [B | 1, 1, M, N]."""
        sees = _in_band(self.band, n_rows, n_keys, device)[None, None]
        return sees if self.key_mask is None else sees & self.key_mask[:, None, None]


def is_causal_bias(attn_mask: Any) -> bool:
    """Whether it is PyTorch's ``CausalBias``, whose module takes seconds to import."""
    kind = type(attn_mask)
    return kind.__name__ == "CausalBias" and kind.__module__ == "torch.nn.attention.bias"


def as_is_causal(attn_mask: Any, is_causal: bool) -> tuple[Any, bool]:
    """The mask and ``is_causal`` of a call, a ``CausalBias`` being the latter where PyTorch makes it so."""
    if is_causal_bias(attn_mask):
        square = attn_mask.seq_len_q == attn_mask.seq_len_kv
        if square or attn_mask.variant.name == "UPPER_LEFT":
            return None, True
    return attn_mask, is_causal


def read_mask(
    attn_mask: Any, is_causal: bool, batch: int, n_rows: int, n_keys: int, spreads: bool = True
) -> Visible:
    """What a call of ``F.scaled_dot_product_attention`` lets its rows see.

    A float mask, and a boolean one that differs from row to row, are read on the host, but not while a CUDA
    graph is captured.

    Parameters
    ----------
    attn_mask, is_causal
        Of the call, as ``as_is_causal`` has them; as in PyTorch, both limit where both are given. Of a float
        mask -inf hides; so does the lowest value of its dtype (for float32, of bfloat16 too), but where
        ``spreads`` in a row that has nothing higher: PyTorch spreads such a row over all its keys.
    batch, n_rows, n_keys
        B, M and N of the call.
    """
    if is_causal_bias(attn_mask):
        return Visible(band=(None, attn_mask.seq_len_kv - attn_mask.seq_len_q))
    band = (None, 0 if is_causal else None)
    if attn_mask is None or 0 in (batch, n_rows, n_keys):
        return Visible(band=band)
    mask = attn_mask.detach()
    mask = mask[(None,) * (4 - mask.dim())]
    rows_alike, heads_alike = (mask.shape[axis] == 1 or mask.stride(axis) == 0 for axis in (2, 1))
    mask = mask.expand(batch, -1, n_rows, n_keys)
    if heads_alike:
        mask = mask[:, :1]
    may_read = not (mask.is_cuda and torch.cuda.is_current_stream_capturing())
    if mask.dtype != torch.bool:
        if not may_read:
            return Visible(bias=_limited(mask, is_causal), shifted=True)
        once = mask[:, :, :1] if rows_alike and not is_causal else mask
        bias, is_mask, shifted = _read_bias(once, is_causal, spreads)
        if shifted or not is_mask:
            return Visible(bias=bias.expand(batch, -1, n_rows, n_keys), shifted=shifted)
        mask = mask == 0
    if rows_alike and heads_alike:
        return Visible(mask[:, 0, 0], band)
    sees = _limited(mask, is_causal)
    banded = _read_band(sees[:, 0]) if heads_alike and may_read else None
    return banded or Visible(bias=sees)


def _in_band(band: tuple[int | None, int | None], n_rows: int, n_keys: int, device: torch.device) -> Tensor:
    """Which keys [M, N] lie in the band."""
    sees = torch.ones(n_rows, n_keys, dtype=torch.bool, device=device)
    low, high = band
    sees = sees if high is None else sees.tril(high)
    return sees if low is None else sees.triu(low)


def _limited(mask: Tensor, is_causal: bool) -> Tensor:
    """The mask or bias [..., M, N], with what lies after a row hidden from it where it is causal."""
    if not is_causal:
        return mask
    limit = _in_band((None, 0), mask.shape[-2], mask.shape[-1], mask.device)
    return mask & limit if mask.dtype == torch.bool else mask.masked_fill(~limit, -torch.inf)


def _read_bias(mask: Tensor, is_causal: bool, spreads: bool) -> tuple[Tensor, bool, bool]:
    """The bias with -inf where it hides; whether it does nothing else; whether it shifts a row."""
    bias = _limited(mask, is_causal)
    lowest = torch.finfo(torch.float16 if mask.dtype == torch.float16 else torch.bfloat16).min
    hidden = bias <= lowest
    if spreads:
        hidden &= bias.amax(dim=-1, keepdim=True) > lowest
    bias = bias.masked_fill(hidden, -torch.inf)
    top = bias.amax(dim=-1)
    is_mask = ((bias == 0) | (bias == -torch.inf)).all()
    shifted = ~((top.abs() <= _SHIFT) | (top == -torch.inf)).all()
    bias = bias.masked_fill((top == torch.inf)[..., None], torch.nan)  # PyTorch's own answer to such a row
    return bias, *torch.stack([is_mask, shifted]).tolist()


def _read_band(sees: Tensor) -> Visible | None:
    """The table [B, M, N] as a key mask and a band, if it is no more than that."""
    n_rows, n_keys = sees.shape[1:]
    row = torch.arange(n_rows, device=sees.device)
    shown = sees.any(dim=-1)
    first = sees.to(torch.uint8).argmax(dim=-1)
    last = n_keys - 1 - sees.flip(-1).to(torch.uint8).argmax(dim=-1)
    low = torch.where(shown, first - row, n_keys).amin()
    high = torch.where(shown, last - row, -n_rows).amax()
    low, high = torch.stack([low, high]).tolist()
    band = (low if low > 1 - n_rows else None, high if high < n_keys - 1 else None)
    inside = _in_band(band, n_rows, n_keys, sees.device)
    key_mask = sees.any(dim=1)
    same = (sees == (key_mask[:, None] & inside)).all()
    whole = (key_mask | ~inside.any(dim=0)).all()
    same, whole = torch.stack([same, whole]).tolist()
    return Visible(None if whole else key_mask, band) if same else None
