"""Keys and values of a model's attention calls, kept outside the model.

A ``TorchFunctionMode`` takes part in the model's calls of ``F.scaled_dot_product_attention``: in an exact
pass it keeps what later passes will need, in those it puts what it kept beside the keys of the rows that run.
The model is not edited; the keys are those that its attention reads, after RoPE, whatever it caches itself.

``ChosenKeys``: what receives most attention from a block, for each layer and key head (MAGE, arXiv
2602.14209). ``FreshRows``: everything, and which rows have become stale by what they attend to. That the
drift of attended tokens tells is Elastic-Cache's idea (arXiv 2510.14973); here each row's attention to the
block's columns weighs it.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attn_sampler import checks
from attn_sampler.attention import attention_map, top_columns
from attn_sampler.attention_calls import Arguments, Call, as_is_causal, attention_with_lse, autocast, observe
from attn_sampler.attention_masks import read_mask
from attn_sampler.options import checked_pool

_ATTENTION = F.scaled_dot_product_attention
_THREAD = threading.local()


@dataclasses.dataclass(frozen=True)
class SparseCache:
    """``cache="sparse"`` of ``generate``, with its options.

    An exact pass chooses, for each layer and key head, the keys outside the block that receive most attention
    from the block's rows; the block's other passes attend to those and to the block alone.

    Parameters
    ----------
    budget
        How many keys are chosen, beside those of the block. All there are: the passes are those of "dual", or
        of "prefix" where attention is block-causal.
    refresh
        Passes between two exact ones in a block. Default 0: the block's first pass alone is exact.
    max_dropped
        The next pass is exact where the keys left out would receive a larger share of a sequence's attention:
        the mean over the block's rows, all heads and layers, measured in an exact pass, and after it reckoned
        from their log-sum-exp of that time. Then all sequences that run have an exact pass. Default 1: never,
        and nothing is reckoned.
    pool
        As in ``top_columns``: scores are pooled before the choice. Default: not.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.
    """

    budget: int = 512
    refresh: int = 0
    max_dropped: float = 1.0
    pool: tuple[str, int] | None = None

    def __post_init__(self) -> None:
        checks.integer("budget", self.budget, 1)
        checks.integer("refresh", self.refresh, 0)
        checks.unit_interval("max_dropped", self.max_dropped)
        checked_pool(self.pool)


@dataclasses.dataclass(frozen=True)
class AdaptiveCache:
    """``cache="adaptive"`` of ``generate``, with its options.

    As "dual"; but a row outside the block is computed again, beside the block, once what it attends to has
    changed: when the drift of the block's keys, weighed by the attention that the row gave them in the last
    pass over all rows, exceeds a threshold. The drift is 1 - cosine from pass to pass, the mean over layers
    and key heads, added up since the row was computed.

    Parameters
    ----------
    threshold
        Above 0: of that sum. At 0 every row that attends to what changed is stale.
    rows
        How many rows at most a pass computes again in each sequence, the stalest first. Sequences of a batch
        run as many as the one that has most. A model that cannot run rows apart (no ``forward_at``) runs all
        of them once one is stale.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.
    """

    threshold: float = 0.005
    rows: int = 32

    def __post_init__(self) -> None:
        checks.non_negative("threshold", self.threshold)
        checks.integer("rows", self.rows, 1)


def parse_cache(text: str) -> str | SparseCache | AdaptiveCache:
    """The cache written ``sparse:budget=256,pool=max/5`` or ``adaptive:threshold=0.01``; a name as it is.

    Raises
    ------
    ValueError
        The cache has no options, or not these, or a value is not accepted.
    """
    name, colon, rest = text.partition(":")
    kinds: dict[str, Any] = {"sparse": SparseCache, "adaptive": AdaptiveCache}
    if not colon and name not in kinds:
        return text
    if name not in kinds:
        raise ValueError(f"cache: expected options of {' or '.join(kinds)} alone, got {text!r}")
    readers: dict[str, Any] = {"threshold": float, "max_dropped": float, "pool": _parse_pool}
    known = [field.name for field in dataclasses.fields(kinds[name])]
    options: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        option, _, value = pair.partition("=")
        if option not in known or option in options:
            raise ValueError(f"cache: expected each of {', '.join(known)} once at most, got {text!r}")
        try:
            options[option] = readers.get(option, int)(value)
        except ValueError:
            raise ValueError(f"cache: {option} cannot be {value!r}") from None
    try:
        return kinds[name](**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"cache: {error}") from None


def _parse_pool(text: str) -> tuple[str, int]:
    how, _, width = text.partition("/")
    return how, int(width)


class KeyCache(TorchFunctionMode):
    """A part in the attention calls of the passes of one block."""

    def __init__(self) -> None:
        super().__init__()
        self.forget()

    def forget(self) -> None:
        """A block begins: nothing is kept."""
        self.layers: list[Any] = []
        self._exact = True
        self._num_calls = 0
        self._shape = (0, 0)  # query rows and keys of each call of an exact pass
        self._visible: Tensor | None = None  # [B, N] bool, the keys that it may read
        self._hides: Tensor | None = None  # [] bool, whether it hid others

    @property
    def is_empty(self) -> bool:
        """Whether no exact pass has run in this block."""
        return not self.layers

    def __enter__(self) -> KeyCache:
        self._num_calls = 0
        _THREAD.open = getattr(_THREAD, "open", 0) + 1
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        _THREAD.open -= 1

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not _ATTENTION:
            return func(*args, **kwargs) if kwargs else func(*args)
        return self._take(Arguments(*args, **(kwargs or {})))

    @torch._disable_dynamo  # a compiled model's graph breaks here; torch.compiler.disable is slow to import
    def _take(self, given: Arguments) -> Tensor:
        index, self._num_calls = self._num_calls, self._num_calls + 1
        if self._exact:
            return self._keep(given)
        if index >= len(self.layers):
            raise ValueError(f"cache: the exact pass had {len(self.layers)} attention calls, this has more")
        return self._attend(index, given)

    def check_seen(self) -> None:
        """Raise where the pass made no attention call, fewer than the exact one, or hid keys by itself."""
        if self._num_calls == 0:
            raise ValueError(
                "cache: 'sparse' and 'adaptive' need a model that calls "
                "torch.nn.functional.scaled_dot_product_attention (transformers: attn_implementation='sdpa')"
            )
        if self._num_calls < len(self.layers):
            raise ValueError(
                f"cache: the exact pass had {len(self.layers)} attention calls, this {self._num_calls}"
            )
        if self._exact and self._hides is not None and bool(self._hides):
            raise NotImplementedError("cache: the model's attention hides keys that attention_mask does not")

    def _observed(self, given: Arguments) -> tuple[Tensor, Call]:
        output, seen = observe(given)
        if isinstance(seen, Exception):
            raise seen
        call = f"cache: attention call {self._num_calls - 1}"
        shape = len(seen.query), seen.query.shape[2], seen.key.shape[2]
        if shape[1:] != self._shape:
            rows, keys = self._shape
            raise NotImplementedError(
                f"{call} has {shape[1]} query rows and {shape[2]} keys, in a pass of {rows} and {keys}: only "
                "attention among the tokens is served"
            )
        sees = read_mask(*as_is_causal(given.attn_mask, given.is_causal), *shape)
        if sees.bias is not None or sees.band != (None, None):
            raise NotImplementedError(f"{call} has a bias, or a mask that differs between rows")
        if sees.key_mask is not None:  # looked at once, after the pass: the host is not to wait for each call
            hidden = ~sees.key_mask if self._visible is None else self._visible & ~sees.key_mask
            self._hides = hidden.any() if self._hides is None else self._hides | hidden.any()
        return output, seen

    def _keep(self, given: Arguments) -> Tensor:
        raise NotImplementedError

    def _attend(self, index: int, given: Arguments) -> Tensor:
        raise NotImplementedError


def is_reading() -> bool:
    """Whether a ``KeyCache`` of this thread waits for calls of ``F.scaled_dot_product_attention``."""
    return getattr(_THREAD, "open", 0) > 0


class _Chosen(NamedTuple):
    keys: Tensor  # [B, H, K + M, D], the chosen ones by position, then room for the rows' own
    values: Tensor  # [B, H, K + M, D]
    dropped_lse: Tensor  # [B, Hq, M], of the keys left out, when they were


class ChosenKeys(KeyCache):
    """The keys of the largest scores of each layer and key head, and what that leaves out."""

    def __init__(self, options: SparseCache, backend: str) -> None:
        self._options, self._backend = options, backend
        super().__init__()

    def forget(self) -> None:
        super().forget()
        self.count = 0  # of keys chosen
        # [B] float32, the share of the attention left out: of the last pass, or the last that measured it
        self.dropped: Tensor | None = None
        self._shares: list[Tensor] = []  # of the layers of a pass

    def choose(self, rows: slice, own: slice, visible: Tensor | None, like: Tensor) -> KeyCache:
        """For an exact pass over these rows: those among them that are the block's own vote.

        ``visible`` is bool [B, N] or None, ``like`` [B, ...] a tensor of the batch.
        """
        self.forget()
        self._voters, self._own = slice(own.start - rows.start, own.stop - rows.start), own
        n_keys, batch, device = rows.stop, len(like), like.device
        self._shape, self._visible = (rows.stop - rows.start, n_keys), visible
        present = torch.ones(batch, n_keys, dtype=torch.bool, device=device) if visible is None else visible
        self._votes = None if visible is None else present[:, own]  # [B, M]
        self._present = present.clone()
        self._present[:, own] = False
        self.count = min(self._options.budget, n_keys - (own.stop - own.start))
        self._mask: Tensor | None = None  # [B, 1, 1, K + M], where a sequence has less than count
        if visible is not None:
            absent = self.count - self._present.sum(dim=1).clamp(max=self.count)  # [B], first by position
            chosen = torch.arange(self.count, device=device) >= absent[:, None]
            self._mask = torch.cat([chosen, present[:, own]], dim=1)[:, None, None]
        return self

    def read(self, own: slice) -> KeyCache:
        """For a pass over the block's rows, whose keys stand at ``own`` among those that the model passes."""
        self._exact, self._own, self._shares = False, own, []
        return self

    def select(self, index: Tensor) -> None:
        """Keep the sequences ``index``, int64 [B']."""
        self.layers = [_Chosen(*(x[index] for x in layer)) for layer in self.layers]
        self._votes, self._mask, self.dropped = (
            None if x is None else x[index] for x in (self._votes, self._mask, self.dropped)
        )

    def finish(self) -> None:
        """A pass has run."""
        self.check_seen()
        if self._shares:
            self.dropped = torch.stack(self._shares).mean(dim=0)

    def _keep(self, given: Arguments) -> Tensor:
        output, seen = self._observed(given)
        q, lse = seen.query[:, :, self._voters], seen.softmax_lse[:, :, self._voters]
        k, v = seen.key, autocast(given.value).expand(len(seen.key), -1, -1, -1)
        (batch, heads, *_), n_own = k.shape, self._own.stop - self._own.start
        with torch._C.DisableTorchFunction(), torch.autocast(q.device.type, enabled=False):
            keys, values = (x.new_empty(batch, heads, self.count + n_own, x.shape[-1]) for x in (k, v))
            if self.count:
                chosen = top_columns(
                    q,
                    k,
                    count=self.count,
                    pool=self._options.pool,
                    softmax_lse=lse,
                    softmax_scale=seen.scale,
                    key_mask=self._present,
                    query_mask=self._votes,
                    backend=self._backend,
                ).positions
                index = chosen.sort(dim=-1).values.clamp_(min=0)[..., None]  # [B, H, K, 1]
                for kept, x in ((keys, k), (values, v)):
                    kept[:, :, : self.count] = x.gather(2, index.expand(-1, -1, -1, x.shape[-1]))
            keys[:, :, self.count :], values[:, :, self.count :] = k[:, :, self._own], v[:, :, self._own]
            options = {"attn_mask": self._mask, "scale": seen.scale, "enable_gqa": heads != q.shape[1]}
            _, kept_lse = attention_with_lse(q, keys, values, **options)
            dropped = -torch.expm1((kept_lse - lse).clamp_(max=0.0))
            self._shares.append(self._mean(dropped.nan_to_num()))  # rows that see nothing drop nothing
        self.layers.append(_Chosen(keys, values, lse + dropped.log()))
        return output

    def _attend(self, index: int, given: Arguments) -> Tensor:
        layer: _Chosen = self.layers[index]
        heads = layer.keys.shape[1]
        for kept, x in ((layer.keys, given.key), (layer.values, given.value)):
            kept[:, :, self.count :] = _of_heads(autocast(x)[:, :, self._own], heads)
        options = (self._mask, given.dropout_p, False, given.scale, heads != given.query.shape[1])
        chosen = Arguments(given.query, layer.keys, layer.values, *options)
        if self._options.max_dropped >= 1.0:
            return chosen.passed_to(_ATTENTION)
        output, seen = observe(chosen)
        if isinstance(seen, Exception):
            raise seen
        self._shares.append(self._mean((layer.dropped_lse - seen.softmax_lse).sigmoid().nan_to_num()))
        return output

    def _mean(self, share: Tensor) -> Tensor:
        """float32 [B], over the heads and rows of [B, Hq, M]."""
        share = share.float().mean(dim=1)
        if self._votes is None:
            return share.mean(dim=1)
        return (share * self._votes).sum(dim=1) / self._votes.sum(dim=1).clamp(min=1)


class FreshRows(KeyCache):
    """All keys and values, those of rows that run anew, and (``watches``) how stale the other rows are."""

    def __init__(self, watches: bool, backend: str) -> None:
        self._watches, self._backend = watches, backend
        super().__init__()

    def forget(self) -> None:
        super().forget()
        self._map: Tensor | None = None  # [B, N, C], what rows gave to the block's columns, then as a share
        self.stale: Tensor | None = None  # [B, N]
        self._count = 0  # of heads whose attention the map adds up

    def fill(self, length: int, block: slice, visible: Tensor | None, stores: bool) -> KeyCache:
        """For an exact pass over all rows; ``stores``: the later ones run without the model's own cache."""
        self.forget()
        self._shape = length, length
        self._block, self._visible, self._stores = block, visible, stores
        return self

    def read(self, rows: Tensor | None, renewed: Tensor | None, own: slice) -> KeyCache:
        """For a pass over the rows at these positions, [B, M], among which ``own`` are the block's.

        ``renewed`` is bool [B, M], the rows whose keys take the place of those kept; None: all. Without rows
        the model has a cache of its own, and passes all keys.
        """
        self._exact, self._rows, self._renewed, self._own = False, rows, renewed, own
        self._drift: Tensor | None = None
        return self

    def select(self, index: Tensor) -> None:
        """Keep the sequences ``index``, int64 [B']."""
        self.layers = [[x[index] for x in layer] for layer in self.layers]
        self._visible, self._map, self.stale = (
            None if x is None else x[index] for x in (self._visible, self._map, self.stale)
        )

    def finish(self) -> None:
        """A pass has run."""
        self.check_seen()
        if not self._watches:
            return
        assert self._map is not None
        if self._exact:
            self._map = self._map / self._count  # not in place: a model may run in inference mode
            self.stale = self._map.new_zeros(self._map.shape[:2])
            return
        assert self.stale is not None
        assert self._drift is not None
        # Before the rows that ran are as good as new: they saw the keys of this pass.
        self.stale += (self._map @ (self._drift / len(self.layers))[..., None]).squeeze(-1)
        if self._rows is not None:
            ran = torch.zeros_like(self._rows, dtype=self.stale.dtype)
            if self._renewed is not None:
                ran = torch.where(self._renewed, ran, self.stale.gather(1, self._rows))
            self.stale.scatter_(1, self._rows, ran)

    def _keep(self, given: Arguments) -> Tensor:
        output, seen = self._observed(given)
        k, v = seen.key, autocast(given.value).expand(len(seen.key), -1, -1, -1)
        if self._watches:
            with torch._C.DisableTorchFunction(), torch.autocast(k.device.type, enabled=False):
                self._map = attention_map(
                    seen.query,
                    k,
                    columns=self._block,
                    softmax_lse=seen.softmax_lse,
                    softmax_scale=seen.scale,
                    key_mask=self._visible,
                    query_mask=self._visible,
                    out=self._map,
                    backend=self._backend,
                )
            self._count += seen.query.shape[1]
        # Written later, and k and v may be views of what the model goes on with.
        kept = (k, v) if self._stores else (k[:, :, self._block],)
        self.layers.append([x.clone(memory_format=torch.contiguous_format) for x in kept])
        return output

    def _attend(self, index: int, given: Arguments) -> Tensor:
        layer = self.layers[index]
        heads = layer[0].shape[1]
        new = _of_heads(autocast(given.key), heads)
        if self._watches:
            old, now = layer[0][:, :, self._block] if self._stores else layer[0], new[:, :, self._own]
            drift = 1.0 - F.cosine_similarity(now.float(), old.float(), dim=-1).mean(dim=1)  # [B, C]
            self._drift = drift if self._drift is None else self._drift + drift
        if self._rows is None:
            layer[0] = new[:, :, self._own].clone()
            return given.passed_to(_ATTENTION)
        for kept, x in zip(layer, (new, _of_heads(autocast(given.value), heads)), strict=True):
            places = self._rows[:, None, :, None].expand(-1, heads, -1, x.shape[-1])
            x = x.expand(places.shape)
            if self._renewed is not None:
                x = torch.where(self._renewed[:, None, :, None], x, kept.gather(2, places))
            kept.scatter_(2, places, x)
        mask = None if self._visible is None else self._visible[:, None, None]
        options = (mask, given.dropout_p, False, given.scale, heads != given.query.shape[1])
        return Arguments(given.query, layer[0], layer[1], *options).passed_to(_ATTENTION)


def _of_heads(x: Tensor, heads: int) -> Tensor:
    """Keys [B, H, M, D] as so many heads: models repeat them for some masks, and not for others."""
    if x.shape[1] < heads:
        return x.repeat_interleave(heads // x.shape[1], dim=1)
    return x[:, :: x.shape[1] // heads]
