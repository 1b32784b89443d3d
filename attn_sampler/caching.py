"""Forward passes over part of a sequence, with the keys and values of the rest cached, or with shadows.

``generate`` asks for the logits of a block; what runs for them depends on the model's attention and on the
cache chosen. Models take part through ``CacheableModel``; the adapters of known checkpoints implement it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from attn_sampler import checks
from attn_sampler.key_cache import AdaptiveCache, ChosenKeys, FreshRows, SparseCache, parse_cache

CACHES = ("none", "prefix", "dual", "sparse", "adaptive")
_OURS = ("sparse", "adaptive")  # the library keeps the keys, not the model


class CacheableModel(Protocol):
    """A model that runs over a slice of positions.

    Without a cache it is called as any other model of ``generate``.
    """

    caches: Sequence[str]
    """Which of ``"prefix"`` and ``"dual"`` it serves.

    With ``"dual"``, or ``"prefix"`` where attention is block-causal, ``"sparse"`` and ``"adaptive"`` too.
    """

    causal_block: int | None
    """Where attention is block-causal, the positions of a block, counted from position 0: a position sees its
    own block and those before. None: every position sees every other."""

    def __call__(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Logits [B, T, V] (or an object with ``.logits``) of all positions."""

    def forward_rows(
        self, tokens: Tensor, rows: slice, past: Any, *, attention_mask: Tensor | None, store: bool
    ) -> tuple[Tensor, Any]:
        """Logits [B, M, V] of the positions ``rows``, whose tokens [B, M] are given, and a cache.

        Parameters
        ----------
        tokens
            int64 [B, M].
        rows
            Their M positions in the sequence.
        past
            The cache: None, or keys and values of positions 0 to P. Where P = rows.start the rows stand
            behind them; where P is beyond, the rows' keys take the place of those cached.
        attention_mask
            Boolean [B, N] over the positions of all N keys, or None where nothing is padded.
        store
            Whether the cache returned covers the rows too; else it is ``past``, with the keys of positions
            below ``rows.start`` unchanged.
        """

    def crop(self, past: Any, length: int) -> Any:
        """The cache of the first ``length`` positions."""

    def select(self, past: Any, index: Tensor) -> Any:
        """A cache of the sequences ``index``, int64 [B'], that leaves the given one as it is."""


class PlacedModel(Protocol):
    """A model that runs over any positions by themselves: all that the library's own caches ask for."""

    def forward_at(self, tokens: Tensor, positions: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Logits [B, M, V] (or an object with ``.logits``) of the tokens [B, M] at the positions [B, M].

        They attend to one another alone. ``attention_mask`` is boolean [B, N] over all positions, for what
        counts positions without padding, or None where nothing is padded; the attention itself is not
        masked. The keys of the other positions join them in the attention call,
        ``F.scaled_dot_product_attention``. A method ``check_places(tokens)``, where there is one, is called
        before decoding: the function of that name, below, tells by a few tokens whether the model keeps this.
        """


class ShadowModel(Protocol):
    """A model that predicts a token that stands from all the others."""

    def forward_shadow(self, tokens: Tensor, block: slice, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B, T + C, V] of all T positions, as they are without the rest, and of C shadows.

        Shadow c is a masked position that stands where position ``block.start + c`` does and sees every
        position but that one; nothing else sees it. They are the last C queries and keys of each attention
        call.
        """


class ForwardPasses:
    """The forward passes of one ``generate`` run.

    Parameters
    ----------
    model
        A callable; a ``CacheableModel`` where ``cache`` is not ``"none"``, or, for ``"dual"``, ``"sparse"``
        and ``"adaptive"``, a ``PlacedModel``.
    cache
        A name of ``CACHES``, a ``SparseCache`` or an ``AdaptiveCache``, or what ``parse_cache`` makes one of.
    logit_shift
        As in ``generate``. Rows then begin one position early, to have the block's first prediction.
    shadows
        Whether the passes have shadows (``ShadowModel``).
    backend
        Of the kernels that choose keys.

    Raises
    ------
    TypeError, ValueError
        The model does not serve that cache, or no shadows with these options, or its ``causal_block`` is no
        number of positions.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        cache: str | SparseCache | AdaptiveCache,
        logit_shift: bool,
        shadows: bool = False,
        backend: str = "auto",
    ) -> None:
        options = cache = parse_cache(cache) if isinstance(cache, str) else cache
        if isinstance(cache, (SparseCache, AdaptiveCache)):
            cache = "sparse" if isinstance(cache, SparseCache) else "adaptive"
        checks.choice("cache", cache, CACHES)
        self.causal_block: int | None = getattr(model, "causal_block", None)
        if self.causal_block is not None:
            checks.integer("causal_block", self.causal_block, 1)
        self._is_placed = hasattr(model, "forward_at")
        served = _served(model, self.causal_block, self._is_placed)
        if cache not in served:
            accepted = ", ".join(repr(name) for name in served)
            raise ValueError(f"cache: {type(model).__name__} serves {accepted}, got {cache!r}")
        self._model, self.cache, self.logit_shift = model, cache, logit_shift
        self._rows_model = cast(CacheableModel, model)  # asked for more than a call where there is a cache
        self.shadows = shadows
        if shadows and not hasattr(model, "forward_shadow"):
            raise TypeError(f"policy: needs a model with forward_shadow, got {type(model).__name__}")
        if shadows and (cache != "none" or logit_shift or self.causal_block is not None):
            raise ValueError("policy: shadows go with a bidirectional model, cache='none' and no logit_shift")
        self._chosen: ChosenKeys | None = None
        self._fresh: FreshRows | None = None
        if cache == "sparse":
            assert isinstance(options, SparseCache)
            self._sparse = options
            self._chosen = ChosenKeys(self._sparse, backend)
        elif self.causal_block is None and (
            cache == "adaptive" or (cache == "dual" and "dual" not in getattr(model, "caches", ()))
        ):  # what precedes a block of a block-causal model never becomes stale
            self._adaptive = options if isinstance(options, AdaptiveCache) else None  # "dual": none is stale
            self._fresh = FreshRows(self._adaptive is not None, backend)
        self.num_rows = torch.empty(0)  # [B] int64, the query rows that each sequence has run; set by begin
        self._past: Any = None  # of the sequences below
        self._sequences: Tensor | None = None
        self._forget()
        self._prefix: Any = None  # block-causal: of all sequences, and how many positions it covers
        self._prefix_length = 0
        self._carry: Tensor | None = None  # [B, V], the logits of the prefix's last position

    def begin(self, tokens: Tensor, attention_mask: Tensor | None) -> None:
        """Prepare for a run over the sequences ``tokens`` [B, T]: check what a model cannot say of itself."""
        self.num_rows = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        if attention_mask is not None and hasattr(self._model, "check_padding"):
            self._model.check_padding(tokens.device)
        if (self._chosen or self._fresh) and hasattr(self._model, "check_places"):
            self._model.check_places(tokens)

    def enter(self, tokens: Tensor, attention_mask: Tensor | None, block: slice) -> None:
        """Prepare for a block of all sequences ``tokens`` [B, T]: what was cached in the last one is stale.

        Where attention is block-causal, the blocks before are final, and their keys are cached for good.
        """
        self._forget()
        if self.causal_block is None or self.cache == "none":
            return
        start = block.start - block.start % self.causal_block
        if start > self._prefix_length:
            rows = slice(self._prefix_length, start)
            mask = None if attention_mask is None else attention_mask[:, :start]
            logits, self._prefix = self._rows_model.forward_rows(
                tokens[:, rows], rows, self._prefix, attention_mask=mask, store=True
            )
            self._prefix_length, self._carry = start, logits[:, -1]
            self.num_rows += rows.stop - rows.start
        if self._prefix is not None:
            self._past, self._sequences = self._prefix, torch.arange(len(tokens), device=tokens.device)

    def _forget(self) -> None:
        self._past = self._sequences = None
        self._is_exact = True  # the next pass runs all rows, or reads all keys, and fills the cache
        self._passes = 0  # after the last exact one
        self._extra: Tensor | None = None  # [B, R] int64, positions of rows that the next pass runs too
        self._renewed = torch.empty(0)  # [B, R] bool, which of these are stale

    def rows(self, block: slice, length: int) -> slice:
        """The positions whose queries the next pass runs, of ``length`` tokens, but for ``num_extra``."""
        if self.causal_block is not None:
            start = block.start - block.start % self.causal_block
            end = min(start + self.causal_block, length)
            return slice(0 if self.cache == "none" else start, end)
        if self.cache == "none" or self._is_exact:
            return slice(0, length)
        start = max(block.start - self.logit_shift, 0)
        return slice(start, length if self.cache == "prefix" else block.stop)

    @property
    def num_extra(self) -> int:
        """How many rows the next pass runs behind those of ``rows``: they count for nothing."""
        return 0 if self._extra is None else self._extra.shape[1]

    @property
    def dropped(self) -> Tensor | None:
        """[B'] float32, the share of the last pass's attention that ``"sparse"`` left out, if it is known."""
        return None if self._chosen is None else self._chosen.dropped

    def places(self, block: slice, length: int) -> tuple[slice, int | None]:
        """Where the block's columns and the first query row of the next pass stand among its keys."""
        if self.cache == "none":
            return block, None
        start = self.rows(block, length).start
        if self._chosen is None or self._is_exact:
            return block, start
        offset = self._chosen.count - start
        return slice(block.start + offset, block.stop + offset), self._chosen.count

    def logits(self, tokens: Tensor, attention_mask: Tensor | None, block: slice, sequences: Tensor) -> Any:
        """Run one pass over tokens [B', T] of ``sequences``; its output, for ``rows``."""
        rows = self.rows(block, tokens.shape[1])
        if self.causal_block is not None:
            attention_mask = None if attention_mask is None else attention_mask[:, : rows.stop]
        self.num_rows[sequences] += rows.stop - rows.start + self.num_extra
        if self.cache == "none":
            keywords = {} if attention_mask is None else {"attention_mask": attention_mask}
            if self.shadows:
                return cast(ShadowModel, self._model).forward_shadow(tokens, block, **keywords)
            return self._model(tokens[:, rows], **keywords)
        self._narrow(sequences)
        if self._chosen is not None:
            return self._run_sparse(self._chosen, tokens, attention_mask, block, rows)
        if self._fresh is not None:
            return self._run_adaptive(self._fresh, tokens, attention_mask, block, rows)
        fills = self.causal_block is None and self._is_exact
        logits = self._run(tokens, rows, attention_mask, fills)
        if fills and self.cache == "prefix":
            self._past = self._rows_model.crop(self._past, max(block.start - self.logit_shift, 0))
        self._is_exact = False
        return logits

    def before(self, block: slice, sequences: Tensor) -> Tensor | None:
        """The logits [B', 1, V] of the position before the block, where no row of the pass gave them."""
        if self._carry is None or self.rows(block, block.stop).start < block.start:
            return None
        return self._carry[sequences, None]

    def _run_sparse(
        self, keys: ChosenKeys, tokens: Tensor, attention_mask: Tensor | None, block: slice, rows: slice
    ) -> Any:
        own = rows
        if self.causal_block is None:
            own = slice(max(block.start - self.logit_shift, 0), block.stop)
        if self._is_exact:
            with keys.choose(rows, own, attention_mask, tokens):
                output = self._run_exact(tokens, rows, attention_mask)
            self._passes = 0
        else:
            with keys.read(slice(0, own.stop - own.start) if self._is_placed else own):
                output = self._run_beside(tokens, rows, None, attention_mask)
            self._passes += 1
        keys.finish()
        limit, due = self._sparse.max_dropped, self._sparse.refresh
        exceeds = limit < 1.0 and keys.dropped is not None and bool((keys.dropped > limit).any())
        self._is_exact = exceeds or (0 < due <= self._passes)
        return output

    def _run_adaptive(
        self, keys: FreshRows, tokens: Tensor, attention_mask: Tensor | None, block: slice, rows: slice
    ) -> Any:
        if self._is_exact:
            with keys.fill(tokens.shape[1], block, attention_mask, self._is_placed):
                output = self._run_exact(tokens, rows, attention_mask)
        else:
            positions, renewed, first = None, None, block.start
            if self._is_placed:
                first -= rows.start
                positions = torch.arange(rows.start, rows.stop, device=tokens.device).expand(len(tokens), -1)
                if self._extra is not None:
                    renewed = torch.cat([torch.ones_like(positions, dtype=torch.bool), self._renewed], dim=1)
                    positions = torch.cat([positions, self._extra], dim=1)
            with keys.read(positions, renewed, slice(first, first + block.stop - block.start)):
                output = self._run_beside(tokens, rows, positions, attention_mask)
        keys.finish()
        self._is_exact, self._extra = False, None
        if self._adaptive is not None:
            own = slice(max(block.start - self.logit_shift, 0), block.stop)
            self._renew(keys, self._adaptive, attention_mask, own)
        return output

    def _renew(
        self, keys: FreshRows, options: AdaptiveCache, attention_mask: Tensor | None, own: slice
    ) -> None:
        """Choose the rows that the next pass runs beside those that run anyway."""
        assert keys.stale is not None
        stale = keys.stale.clone() if attention_mask is None else keys.stale * attention_mask
        stale[:, own] = -1.0
        count = int((stale > options.threshold).sum(dim=1).max())
        if count > 0 and not self._is_placed:
            self._is_exact = True
        elif count > 0:  # rows that are not stale fill up a batch, and are left as they are
            value, self._extra = stale.topk(min(options.rows, count), dim=1)
            self._renewed = value > options.threshold

    def _run_exact(self, tokens: Tensor, rows: slice, attention_mask: Tensor | None) -> Any:
        """A pass over all rows, or all keys; with the model's own cache only where later passes need that."""
        if self._is_placed and self.causal_block is None:
            keywords = {} if attention_mask is None else {"attention_mask": attention_mask}
            return self._model(tokens, **keywords)
        if self.causal_block is None:
            self._past = None
        return self._run(tokens, rows, attention_mask, self.causal_block is None)

    def _run_beside(
        self, tokens: Tensor, rows: slice, positions: Tensor | None, attention_mask: Tensor | None
    ) -> Any:
        """A pass over some rows, whose attention has the library's keys beside theirs."""
        if not self._is_placed:
            return self._run(tokens, rows, attention_mask, False)
        if positions is None:
            positions = torch.arange(rows.start, rows.stop, device=tokens.device).expand(len(tokens), -1)
        output = cast(PlacedModel, self._model).forward_at(
            tokens.gather(1, positions), positions, attention_mask
        )
        logits: Tensor = getattr(output, "logits", output)
        checks.tensor("forward_at's output", logits, "[B, M, V]", checks.FLOAT_DTYPES, like=tokens)
        checks.shape("forward_at's output", logits, "[B, M, V]", (*positions.shape, logits.shape[2]))
        return logits[:, : rows.stop - rows.start]

    def _run(self, tokens: Tensor, rows: slice, attention_mask: Tensor | None, store: bool) -> Tensor:
        """A pass with the model's own cache, which it keeps where it is to ``store`` it."""
        logits, past = self._rows_model.forward_rows(
            tokens[:, rows], rows, self._past, attention_mask=attention_mask, store=store
        )
        if store:
            self._past = past
        return logits

    def _narrow(self, sequences: Tensor) -> None:
        """Leave out of the cache the sequences that have finished."""
        if self._sequences is not None and len(sequences) < len(self._sequences):
            index = torch.searchsorted(self._sequences, sequences)
            if self._past is not None:
                self._past = self._rows_model.select(self._past, index)
            for keys in (self._chosen, self._fresh):
                if keys is not None and not (self._is_exact or keys.is_empty):
                    keys.select(index)
            if self._extra is not None:
                self._extra, self._renewed = self._extra[index], self._renewed[index]
        self._sequences = sequences


def check_places(model: PlacedModel, tokens: Tensor) -> None:
    """Raise where rows beside the keys of a whole pass have other logits than they had in it.

    Some models count positions by themselves, or scale what they embed by what else runs. The probe is a few
    tokens of the first sequence of ``tokens`` [B, T], two small passes.

    Raises
    ------
    ValueError
        They have.
    """
    length = min(tokens.shape[1], getattr(model, "causal_block", None) or 8, 8)
    if len(tokens) == 0 or length < 2:
        return
    some = tokens[:1, torch.linspace(0, tokens.shape[1] - 1, length).long().to(tokens.device)]
    own, keys = slice(length // 2, length), ChosenKeys(SparseCache(length), "reference")
    with keys.choose(slice(0, length), own, None, some):
        output = cast(Callable[..., Any], model)(some)
    whole = getattr(output, "logits", output)[:, own]
    with keys.read(slice(0, length - length // 2)):
        output = model.forward_at(some[:, own], torch.arange(own.start, own.stop, device=some.device)[None])
    keys.finish()
    alone = getattr(output, "logits", output)
    whole, alone = (x.float().nan_to_num(neginf=0.0) for x in (whole, alone))  # never predicted in both
    rounding = 1e-3 if keys.layers[0].keys.element_size() >= 4 else 0.05
    if (whole - alone).norm() > rounding * whole.norm():
        raise ValueError(
            f"cache: {type(getattr(model, 'model', model)).__name__} computes rows that run by themselves "
            "otherwise than in a whole pass, so that no keys can be kept for them; use cache='none'"
        )


def _served(model: Any, causal_block: int | None, is_placed: bool) -> tuple[str, ...]:
    """The caches that the model can be decoded with: its own, and those that the library keeps."""
    own = tuple(getattr(model, "caches", ()))
    if causal_block is not None:
        return ("none", *own, *(_OURS if "prefix" in own else ()))
    own = own if "dual" in own or not is_placed else (*own, "dual")
    return ("none", *own, *(_OURS if "dual" in own else ()))
