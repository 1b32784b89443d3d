"""What an ``attn_mask`` lets each query row see, in the terms of the kernels if they have any for it.

Models spell one mask in many ways: booleans, zeros beside -inf or the lowest finite value, a subclass of
PyTorch's, each broadcast over what it does not depend on. The meaning of all is a mask of keys and a causal
limit, or a table.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

#: A float32 log-sum-exp so large still tells 1 of 10,000 apart.
_SHIFT = 1024.0


class Visible(NamedTuple):
    """What the rows see: the keys of the mask, up to the causal offset; or what the bias says."""

    key_mask: Tensor | None = None  # [B, N] bool
    causal_offset: int | None = None  # row i sees keys up to i + causal_offset
    bias: Tensor | None = None  # [B, Hq | 1, M, N]: bool, or added to the logits, -inf where hidden
    shifted: bool = False  # a float32 log-sum-exp of some row does not tell the weights of its keys


def read_mask(
    attn_mask: Tensor | None, is_causal: bool, batch: int, n_rows: int, n_keys: int, spreads: bool = True
) -> Visible:
    """What a call of ``F.scaled_dot_product_attention`` lets its rows see.

    A float mask, and a boolean one that differs from row to row, are read on the host, but not while a CUDA
    graph is captured.

    Parameters
    ----------
    attn_mask, is_causal
        Of the call; as in PyTorch, both limit where both are given. Of a float mask -inf hides; so does the
        lowest value of its dtype (for float32, of bfloat16 too), but where ``spreads`` in a row that has
        nothing higher: PyTorch spreads such a row over all its keys.
    batch, n_rows, n_keys
        B, M and N of the call.
    """
    if isinstance(attn_mask, CausalBias):
        lower_right = attn_mask.variant == CausalVariant.LOWER_RIGHT
        return Visible(causal_offset=attn_mask.seq_len_kv - attn_mask.seq_len_q if lower_right else 0)
    offset = 0 if is_causal else None
    if attn_mask is None or 0 in (batch, n_rows, n_keys):
        return Visible(causal_offset=offset)
    mask = attn_mask.detach()
    mask = mask[(None,) * (4 - mask.dim())]
    rows_alike, heads_alike = (mask.shape[axis] == 1 or mask.stride(axis) == 0 for axis in (2, 1))
    mask = mask.expand(batch, -1, n_rows, n_keys)
    if heads_alike:
        mask = mask[:, :1]
    may_read = not (mask.is_cuda and torch.cuda.is_current_stream_capturing())
    if mask.dtype != torch.bool:
        if not may_read:
            return Visible(bias=_limited(mask, offset), shifted=True)
        once = mask[:, :, :1] if rows_alike and offset is None else mask
        bias, is_mask, shifted = _read_bias(once, offset, spreads)
        if shifted or not is_mask:
            return Visible(bias=bias.expand(batch, -1, n_rows, n_keys), shifted=shifted)
        mask = mask == 0
    if rows_alike and heads_alike:
        return Visible(mask[:, 0, 0], offset)
    sees = _limited(mask, offset)
    causal = _read_causal(sees[:, 0]) if heads_alike and may_read else None
    return causal or Visible(bias=sees)


def table(visible: Visible, n_rows: int, n_keys: int, device: torch.device) -> Tensor:
    """The key mask and the causal offset as a boolean table [B | 1, 1, M, N]."""
    sees = torch.ones(1, 1, n_rows, n_keys, dtype=torch.bool, device=device)
    if visible.causal_offset is not None:
        sees = sees.tril(visible.causal_offset)
    return sees if visible.key_mask is None else sees & visible.key_mask[:, None, None]


def _limited(mask: Tensor, offset: int | None) -> Tensor:
    """The mask or bias [..., M, N], with what lies beyond the causal offset hidden."""
    if offset is None:
        return mask
    limit = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril(offset)
    return mask & limit if mask.dtype == torch.bool else mask.masked_fill(~limit, -torch.inf)


def _read_bias(mask: Tensor, offset: int | None, spreads: bool) -> tuple[Tensor, bool, bool]:
    """The bias with -inf where it hides; whether it does nothing else; whether it shifts a row."""
    bias = _limited(mask, offset)
    lowest = torch.finfo(torch.float16 if mask.dtype == torch.float16 else torch.bfloat16).min
    hidden = bias <= lowest
    if spreads:
        hidden &= bias.amax(dim=-1, keepdim=True) > lowest
    bias = bias.masked_fill(hidden, -torch.inf)
    top = bias.amax(dim=-1)
    is_mask = ((bias == 0) | (bias == -torch.inf)).all()
    shifted = ~((top.abs() <= _SHIFT) | (top == -torch.inf)).all()
    return bias, *torch.stack([is_mask, shifted]).tolist()


def _read_causal(sees: Tensor) -> Visible | None:
    """The table [B, M, N] as a key mask and a causal offset, if it is no more than that."""
    n_rows, n_keys = sees.shape[1:]
    row = torch.arange(n_rows, device=sees.device)
    last = n_keys - 1 - sees.flip(-1).to(torch.uint8).argmax(dim=-1)
    offset = torch.where(sees.any(dim=-1), last - row, -n_rows).amax()
    key_mask = sees.any(dim=1)
    key = torch.arange(n_keys, device=sees.device)
    causal = key <= row[:, None] + offset
    same = (sees == (key_mask[:, None] & causal)).all()
    whole = (key_mask | (key > n_rows - 1 + offset)).all()
    offset, same, whole = torch.stack([offset, same, whole]).tolist()
    return Visible(None if whole else key_mask, int(offset)) if same else None
