"""What the code that comes with checkpoints is given: a cache to read, and a flash-attn that reports.

Needs no more of transformers than its ``DynamicCache``, because that code is often written for version 4.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import DynamicCache

from attn_sampler import capture
from attn_sampler.adapters._engine import unserved
from attn_sampler.key_cache import is_reading

report_attention = torch.compiler.disable(capture.report_attention)


class RowCache(DynamicCache):
    """Keys and values that a pass over some rows reads, and changes only as told.

    ``store=True`` appends the rows' keys, as any cache; False gives the model the cached keys and the rows'
    behind them, and keeps none of the rows'; a slice puts the rows' keys in the place of those cached there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.store: bool | slice = True

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.store is True:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx >= len(self.layers):
            return key_states, value_states
        keys, values = self[layer_idx]
        if isinstance(self.store, slice):
            keys[:, :, self.store], values[:, :, self.store] = key_states, value_states
            return keys, values
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)

    def __getitem__(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer: the way in which remote code of transformers 4 reads a cache."""
        layer: Any = self.layers[layer_idx]
        return layer.keys, layer.values

    def map(self, function: Callable[[Tensor], Tensor]) -> RowCache:
        """A cache of its own, of ``function`` of all keys and values."""
        result = RowCache()
        for i in range(len(self.layers)):
            keys, values = self[i]
            result.update(function(keys), function(values), i)
        return result


@contextlib.contextmanager
def reported_flash_attention(module: ModuleType) -> Iterator[None]:
    """Make ``flash_attn_func``, a name in a model's own module, report to the captures while this is open.

    For remote code that calls flash-attn by itself (SDAR). Does nothing to a module without the name. Threads
    may open it together; the last to leave restores the name. A call with a window, soft-capped logits or
    ALiBi raises where a capture is open.
    """
    if getattr(module, "flash_attn_func", None) is None:
        yield
        return
    with _REPORTING_LOCK:
        if _REPORTING[module.__name__] == 0:
            module.flash_attn_func = _reporting(module.flash_attn_func)  # type: ignore[attr-defined]
        _REPORTING[module.__name__] += 1
    try:
        yield
    finally:
        with _REPORTING_LOCK:
            _REPORTING[module.__name__] -= 1
            if _REPORTING[module.__name__] == 0:
                module.flash_attn_func = module.flash_attn_func.__wrapped__  # type: ignore[attr-defined]


def flash_mask(query: Tensor, key: Tensor, padding: Tensor | None, causal: bool) -> Tensor | None:
    """What the rows of a flash-attn call saw; its causal mask is aligned at the last row and key."""
    mask = None if padding is None else padding[:, None, None, :].bool()
    if not causal:
        return mask
    n_rows, n_keys = query.shape[2], key.shape[2]
    visible = torch.ones(n_rows, n_keys, dtype=torch.bool, device=query.device).tril(n_keys - n_rows)
    return visible[None, None] if mask is None else mask & visible


_REPORTING: Counter[str] = Counter()
_REPORTING_LOCK = threading.Lock()


def _reporting(function: Callable[..., Any]) -> Callable[..., Tensor]:
    def flash_attn_func(
        q: Tensor,  # [B, M, Hq, D]
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        **options: Any,
    ) -> Tensor:
        asked = unserved(options, ("deterministic",), {"window_size": [(-1, -1)], "softcap": [0.0]})
        if asked and capture.is_capturing():
            raise NotImplementedError(f"flash_attn_func is not reported to the captures with {asked}")
        query, key = q.transpose(1, 2), k.transpose(1, 2)
        if is_reading() and not asked and not causal:  # keys are put beside these in PyTorch's call alone
            grouped = q.shape[2] != k.shape[2]
            output = scaled_dot_product_attention(
                query, key, v.transpose(1, 2), dropout_p=dropout_p, scale=softmax_scale, enable_gqa=grouped
            )
            return output.transpose(1, 2)
        output, softmax_lse, _ = function(
            q, k, v, dropout_p, softmax_scale, causal, return_attn_probs=True, **options
        )
        mask = flash_mask(query, key, None, causal)
        report_attention(query, key, softmax_lse, attn_mask=mask, scale=softmax_scale)
        return output

    flash_attn_func.__wrapped__ = function  # type: ignore[attr-defined]
    return flash_attn_func
