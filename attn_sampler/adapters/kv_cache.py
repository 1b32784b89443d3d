"""transformers: a cache that keeps the keys that were chosen, and goes on where it was.

    from transformers import AutoModelForCausalLM

    import attn_sampler.adapters.transformers  # registers the name below
    from attn_sampler import AttentionCapture, top_columns
    from attn_sampler.adapters.kv_cache import compress

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="attn_sampler")
    with AttentionCapture(keep=True) as capture:
        cache = model(ids[:, :-1], use_cache=True, logits_to_keep=1).cache

H2O, where all queries vote:

    kept = [
        top_columns(q, k, softmax_lse=lse, causal=True, count=512, recent=256).positions
        for q, k, lse in capture.layers
    ]

Or SnapKV, where the last ones do, and votes are pooled:

    kept = [
        top_columns(
            q[:, :, -32:], k, softmax_lse=lse[:, :, -32:], causal=True, count=512, recent=32, pool=("mean", 5)
        ).positions
        for q, k, lse in capture.layers
    ]

Then:

    compress(cache, kept)
    model.generate(ids, cache=cache, max_new_tokens=100)

A model with a scale of its own needs ``softmax_scale`` too. A captured prompt holds the queries of all layers
until the choice is made; the presses of ``attn_sampler.adapters.kvpress`` choose as each layer runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from attn_sampler import checks


class KeptLayer(DynamicLayer):
    """Some of a layer's keys and values, which counts those that it dropped among the tokens it has seen.

    So the next tokens stand at their true positions, and ``generate`` continues a prompt at its end.
    """

    def __init__(self, layer: DynamicLayer, positions: Tensor) -> None:
        super().__init__()
        self.device = layer.device
        index = positions[..., None]
        self.keys, self.values = (
            x.gather(2, index.expand(-1, -1, -1, x.shape[3])) for x in (layer.keys, layer.values)
        )
        self.is_initialized = True
        self.dropped: int = layer.get_seq_length() - positions.shape[2]

    def get_seq_length(self) -> int:
        """How many tokens it has seen."""
        return super().get_seq_length() + self.dropped

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys the next queries see, and the position of the first, as if the others came first."""
        return self.get_seq_length() - self.dropped + query_length, self.dropped

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.dropped = 0


def compress(cache: Cache, positions: Sequence[Tensor | None]) -> None:
    """Drop all keys and values but those at these positions, in place.

    What follows attends to the keys that are kept and to its own, and may be several tokens at once. A cache
    may be compressed again later: positions are then those among the keys that it has.

    Parameters
    ----------
    cache
        ``DynamicCache``, of a batch without padding.
    positions
        For each layer int64 ``[B, Hkv, count]``, as ``top_columns`` has them, in any order; the same count
        for all, because transformers makes one mask for them. None for layers that keep a sliding window,
        and for these alone.

    Raises
    ------
    TypeError, ValueError
        Naming the argument; also where a position is none of the layer's (-1 of ``top_columns``: there were
        fewer keys than count), or is there twice. Nothing has been written then.
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"cache: expected a transformers Cache, got {type(cache).__name__}")
    if len(positions) != len(cache.layers):
        raise ValueError(f"positions: expected {len(cache.layers)}, one a layer, got {len(positions)}")
    kept, counts = list(cache.layers), set()
    for i, (layer, chosen) in enumerate(zip(cache.layers, positions, strict=True)):
        if chosen is None and layer.is_sliding:
            continue
        if type(layer) not in (DynamicLayer, KeptLayer) or not layer.is_initialized:
            what = "one without keys" if type(layer) is DynamicLayer else type(layer).__name__
            raise TypeError(f"cache: expected layer {i} to be a DynamicLayer with keys, got {what}")
        kept[i] = KeptLayer(layer, _in_order(f"positions[{i}]", layer.keys, chosen))
        counts.add(kept[i].keys.shape[2])
    if len(counts) > 1:
        raise ValueError(f"positions: expected the same count for all layers, got {sorted(counts)}")
    cache.layers[:] = kept


def _in_order(name: str, keys: Tensor, positions: Tensor | None) -> Tensor:
    """A layer's positions, checked, from the first to the last."""
    chosen = checks.tensor(name, positions, "[B, Hkv, count]", (torch.int64,), like=keys)
    n_keys, count = keys.shape[2], chosen.shape[2]
    checks.shape(name, chosen, "[B, Hkv, count]", (*keys.shape[:2], count))
    if not 1 <= count <= n_keys:
        raise ValueError(f"{name}: expected a count from 1 to the layer's {n_keys} keys, got {count}")
    ordered = chosen.sort(dim=-1).values
    repeated = (ordered[..., 1:] == ordered[..., :-1]).any()
    low, high, twice = torch.stack([ordered.amin(), ordered.amax(), repeated.long()]).tolist()
    if low < 0 or high >= n_keys:
        raise ValueError(f"{name}: expected positions in [0, {n_keys}), got {low if low < 0 else high}")
    if twice:
        raise ValueError(f"{name}: expected each position once, got one twice")
    return ordered
