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

CACHES = ("none", "prefix", "dual")


class CacheableModel(Protocol):
    """A model that runs over a slice of positions.

    Without a cache it is called as any other model of ``generate``.
    """

    caches: Sequence[str]
    """Which of ``"prefix"`` and ``"dual"`` it serves."""

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
        A callable; a ``CacheableModel`` where ``cache`` is not ``"none"``.
    cache
        A name of ``CACHES``.
    logit_shift
        As in ``generate``. Rows then begin one position early, to have the block's first prediction.
    shadows
        Whether the passes have shadows (``ShadowModel``).

    Raises
    ------
    TypeError, ValueError
        The model does not serve that cache, or no shadows with these options, or its ``causal_block`` is no
        number of positions.
    """

    def __init__(
        self, model: Callable[..., Any], cache: str, logit_shift: bool, shadows: bool = False
    ) -> None:
        checks.choice("cache", cache, CACHES)
        served = tuple(getattr(model, "caches", ()))
        if cache != "none" and cache not in served:
            accepted = ", ".join(repr(name) for name in ("none", *served))
            raise ValueError(f"cache: {type(model).__name__} serves {accepted}, got {cache!r}")
        self._model, self.cache, self.logit_shift = model, cache, logit_shift
        self._rows_model = cast(CacheableModel, model)  # asked for more than a call where there is a cache
        self.causal_block: int | None = getattr(model, "causal_block", None)
        if self.causal_block is not None:
            checks.integer("causal_block", self.causal_block, 1)
        self.shadows = shadows
        if shadows and not hasattr(model, "forward_shadow"):
            raise TypeError(f"policy: needs a model with forward_shadow, got {type(model).__name__}")
        if shadows and (cache != "none" or logit_shift or self.causal_block is not None):
            raise ValueError("policy: shadows go with a bidirectional model, cache='none' and no logit_shift")
        self._past: Any = None  # of the sequences below
        self._sequences: Tensor | None = None
        self._prefix: Any = None  # block-causal: of all sequences, and how many positions it covers
        self._prefix_length = 0
        self._carry: Tensor | None = None  # [B, V], the logits of the prefix's last position

    def enter(self, tokens: Tensor, attention_mask: Tensor | None, block: slice) -> None:
        """Prepare for a block of all sequences ``tokens`` [B, T]: what was cached in the last one is stale.

        Where attention is block-causal, the blocks before are final, and their keys are cached for good.
        """
        self._past = self._sequences = None
        if attention_mask is not None and hasattr(self._model, "check_padding"):
            self._model.check_padding(tokens.device)
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
        if self._prefix is not None:
            self._past, self._sequences = self._prefix, torch.arange(len(tokens), device=tokens.device)

    def rows(self, block: slice, length: int) -> slice:
        """The positions whose queries the next pass runs, of ``length`` tokens."""
        end = length
        if self.causal_block is not None:
            start = block.start - block.start % self.causal_block
            end = min(start + self.causal_block, length)
            return slice(0 if self.cache == "none" else start, end)
        if self._past is None:  # no cache, or the pass that fills it
            return slice(0, length)
        start = max(block.start - self.logit_shift, 0)
        return slice(start, block.stop if self.cache == "dual" else length)

    def logits(self, tokens: Tensor, attention_mask: Tensor | None, block: slice, sequences: Tensor) -> Any:
        """Run one pass over tokens [B', T] of ``sequences``; its output, for ``rows``."""
        rows = self.rows(block, tokens.shape[1])
        if self.causal_block is not None:
            attention_mask = None if attention_mask is None else attention_mask[:, : rows.stop]
        if self.cache == "none":
            keywords = {} if attention_mask is None else {"attention_mask": attention_mask}
            if self.shadows:
                return cast(ShadowModel, self._model).forward_shadow(tokens, block, **keywords)
            return self._model(tokens[:, rows], **keywords)
        self._narrow(sequences)
        fills = self.causal_block is None and self._past is None
        logits, past = self._rows_model.forward_rows(
            tokens[:, rows], rows, self._past, attention_mask=attention_mask, store=fills
        )
        if fills:
            if self.cache == "prefix":
                past = self._rows_model.crop(past, max(block.start - self.logit_shift, 0))
            self._past, self._sequences = past, sequences
        return logits

    def before(self, block: slice, sequences: Tensor) -> Tensor | None:
        """The logits [B', 1, V] of the position before the block, where no row of the pass gave them."""
        if self._carry is None or self.rows(block, block.stop).start < block.start:
            return None
        return self._carry[sequences, None]

    def _narrow(self, sequences: Tensor) -> None:
        """Leave out of the cache the sequences that have finished."""
        if self._sequences is not None and len(sequences) < len(self._sequences):
            index = torch.searchsorted(self._sequences, sequences)
            self._past = self._rows_model.select(self._past, index)
            self._sequences = sequences
