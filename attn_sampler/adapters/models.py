"""The published masked-diffusion models, as ``generate`` calls them.

``FAMILIES`` holds what is to be known of a family of checkpoints; its adapter says how the modelling code
that comes with them is called. ``adapt(model)`` finds both. That code is remote code on the hub, which is not
part of this package's tests: those run small models of their own with the same call structure.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attn_sampler import checks

if TYPE_CHECKING:
    from attn_sampler.adapters.remote_code import RowCache


class Adapter:
    """A ``CacheableModel`` around a transformers model, bidirectional and without a cache.

    Parameters
    ----------
    model
        The model: ``model(tokens, attention_mask=...)`` returns an object with ``.logits``.
    causal_block
        The positions of a block where attention is block-causal.
    """

    caches: tuple[str, ...] = ()

    def __init__(self, model: torch.nn.Module, causal_block: int | None = None) -> None:
        self.model = model
        self.causal_block = None if causal_block is None else checks.integer("causal_block", causal_block, 1)
        self._takes = inspect.signature(model.forward).parameters
        self._padding_is_masked = False

    def __call__(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.model(tokens, attention_mask=attention_mask, use_cache=False).logits

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        return self.model.parameters()

    def check_padding(self, device: torch.device) -> None:
        """Raise where the model does not mask what ``attention_mask`` says is padding.

        Some published modelling code takes the argument and ignores it.
        """
        if self._padding_is_masked:
            return
        tokens = torch.tensor([[0, 2], [1, 2]], device=device)
        mask = torch.tensor([[False, True]], device=device).expand(2, 2)
        masked, seen = (self(tokens, attention_mask=m)[:, 1].float() for m in (mask, None))
        # How far the padding's token moves the logits; rounding may leave a little, in low precision.
        if (masked[0] - masked[1]).norm() > 0.1 * (seen[0] - seen[1]).norm():
            raise ValueError(
                f"attention_mask: {type(self.model).__name__} ignores it, so that padding would be read as "
                "text; decode the prompts one by one, or those of one length together"
            )
        self._padding_is_masked = True


class RowCached(Adapter):
    """Keeps keys and values in a ``RowCache``."""

    def crop(self, past: RowCache, length: int) -> RowCache:
        return past.map(lambda x: x[:, :, :length])

    def select(self, past: RowCache, index: Tensor) -> RowCache:
        return past.map(lambda x: x[index])


class Bidirectional(RowCached):
    """A causal model class of transformers 5 that was made bidirectional (Llama, Qwen2, ...)."""

    caches = ("prefix", "dual")

    def __init__(self, model: torch.nn.Module, causal_block: int | None = None) -> None:
        super().__init__(model, causal_block)
        self._cache_name = "cache" if "cache" in self._takes else "past_key_values"

    def forward_rows(
        self,
        tokens: Tensor,
        rows: slice,
        past: RowCache | None,
        *,
        attention_mask: Tensor | None,
        store: bool,
    ) -> tuple[Tensor, RowCache]:
        past = _row_cache(past, rows, store)
        mask = None if attention_mask is None else attention_mask[:, None, None, :]
        logits = self.model(
            tokens,
            attention_mask=mask,
            position_ids=_positions(tokens, rows),
            use_cache=True,
            **{self._cache_name: past},
        ).logits
        return logits, past


class LLaDA(Adapter):
    """LLaDA and LLaDA-1.5. Caches need Fast-dLLM's modelling code (its ``LLaDAModelLM``).

    That code keeps [B, H, N, D] before RoPE for each layer, and ``replace_position`` marks the rows whose
    keys take the place of cached ones; its last axis alone is read, so that one row of it serves a batch.
    """

    _sequence_axis = 2

    def __init__(self, model: torch.nn.Module, causal_block: int | None = None) -> None:
        super().__init__(model, causal_block)
        if "replace_position" in self._takes:
            self.caches = ("prefix", "dual")

    def __call__(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.model(tokens, attention_mask=self._mask(attention_mask)).logits

    def forward_rows(
        self, tokens: Tensor, rows: slice, past: Any, *, attention_mask: Tensor | None, store: bool
    ) -> tuple[Tensor, Any]:
        options: dict[str, Any] = {"past_key_values": past, "use_cache": True}
        if past is not None and (cached := past[0][0].shape[self._sequence_axis]) > rows.start:
            options |= self._replacing(_marked(tokens, rows, cached))
        output = self.model(tokens, attention_mask=self._mask(attention_mask), **options)
        return output.logits, output.past_key_values if store else past

    def crop(self, past: Any, length: int) -> Any:
        return [tuple(x.narrow(self._sequence_axis, 0, length) for x in layer) for layer in past]

    def select(self, past: Any, index: Tensor) -> Any:
        return [tuple(x[index] for x in layer) for layer in past]

    def _mask(self, attention_mask: Tensor | None) -> Any:
        return None if attention_mask is None else attention_mask.long()

    def _replacing(self, marked: Tensor) -> dict[str, Any]:
        return {"replace_position": marked}


class Dream(LLaDA):
    """Dream. Caches need Fast-dLLM's modelling code (its ``DreamModel``), which keeps [B, N, H * D]."""

    _sequence_axis = 1

    def _mask(self, attention_mask: Tensor | None) -> Any:
        return "full" if attention_mask is None else attention_mask[:, None, None, :]

    def _replacing(self, marked: Tensor) -> dict[str, Any]:
        return {"replace_position": marked, "dual_cache": True}


class BlockCausal(RowCached):
    """Shared by the block-causal families: the mask, and a cache that stores finished blocks alone."""

    caches: tuple[str, ...] = ("prefix",)

    def __init__(self, model: torch.nn.Module, causal_block: int | None = None) -> None:
        if causal_block is None:
            raise TypeError(f"causal_block: {type(self).__name__} needs the model's block length, got None")
        super().__init__(model, causal_block)

    def __call__(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self._run(tokens, slice(0, tokens.shape[1]), attention_mask, False, use_cache=False)

    def forward_rows(
        self,
        tokens: Tensor,
        rows: slice,
        past: RowCache | None,
        *,
        attention_mask: Tensor | None,
        store: bool,
    ) -> tuple[Tensor, RowCache]:
        past = _row_cache(past, rows, store)
        return self._run(tokens, rows, attention_mask, store, past_key_values=past, use_cache=True), past

    def _run(self, tokens: Tensor, rows: slice, padding: Tensor | None, store: bool, **cache: Any) -> Tensor:
        raise NotImplementedError

    def _mask(self, tokens: Tensor, rows: slice, padding: Tensor | None) -> Tensor:
        """Which of the keys 0 to ``rows.stop`` each row sees, bool [1 | B, 1, 1 | M, N]."""
        assert self.causal_block is not None
        key = torch.arange(rows.stop, device=tokens.device) // self.causal_block
        row = key[rows.start :] if rows.stop - rows.start else key
        if rows.start // self.causal_block == (rows.stop - 1) // self.causal_block:
            row = row[:1]  # rows of one block see the same: a key mask, which the kernels take
        mask = (key <= row[:, None])[None, None]
        return mask if padding is None else mask & padding[:, None, None, :]


class SDAR(BlockCausal):
    """SDAR: ``store_kv`` says whether a pass is cached. Its flash-attn calls are reported to the captures."""

    def _run(self, tokens: Tensor, rows: slice, padding: Tensor | None, store: bool, **cache: Any) -> Tensor:
        from attn_sampler.adapters.remote_code import reported_flash_attention

        with reported_flash_attention(sys.modules[type(self.model).__module__]):
            return self.model(
                tokens,
                attention_mask=self._mask(tokens, rows, padding),
                position_ids=_positions(tokens, rows),
                store_kv=store,
                **cache,
            ).logits


class FastDLLMv2(BlockCausal):
    """Fast-dLLM v2: makes its block-causal mask itself; ``update_past_key_values`` caches a pass."""

    def _run(self, tokens: Tensor, rows: slice, padding: Tensor | None, store: bool, **cache: Any) -> Tensor:
        return self.model(
            tokens,
            attention_mask=padding,  # the model ignores it, which check_padding finds
            update_past_key_values=store,
            block_size=self.causal_block,
            **cache,
        ).logits


class LLaDA2(BlockCausal):
    """LLaDA2.0 and 2.1: a square mask of zeros and ones in the model's dtype, and so no cache."""

    caches = ()

    def _run(self, tokens: Tensor, rows: slice, padding: Tensor | None, store: bool, **cache: Any) -> Tensor:
        batch, length = tokens.shape
        mask = self._mask(tokens, rows, padding).expand(batch, 1, length, length)
        mask, positions = mask.to(next(self.model.parameters()).dtype), _positions(tokens, rows)
        return self.model(tokens, attention_mask=mask, position_ids=positions, **cache).logits


@dataclasses.dataclass(frozen=True)
class Family:
    """What ``generate`` is to be told about the checkpoints of a family."""

    adapter: type[Adapter]
    model_types: tuple[str, ...]  # of the checkpoint's config.json
    mask_token_id: int | None  # where config and tokenizer name none
    end_token_id: int | None
    block_length: int = 32  # positions decoded together
    causal_block: int | None = None  # where config names none; None: bidirectional
    logit_shift: bool = False
    auto_class: str = "AutoModelForCausalLM"


#: The families by the name that ``attn-sampler generate --adapter`` takes.
FAMILIES: dict[str, Family] = {
    "llada": Family(LLaDA, ("llada",), 126336, 126081, auto_class="AutoModel"),
    "dream": Family(Dream, ("Dream", "dream"), 151666, 151643, logit_shift=True, auto_class="AutoModel"),
    "fast-dllm-v2": Family(
        FastDLLMv2,
        ("Fast_dLLM_Qwen",),
        151665,
        151645,
        block_length=8,  # its sub-block
        causal_block=32,
        logit_shift=True,
    ),
    "llada2": Family(LLaDA2, ("llada2_moe",), 156895, 156892, causal_block=32),
    "sdar": Family(SDAR, ("sdar", "sdar_moe"), 151669, 151645, block_length=4, causal_block=4),
    "bidirectional": Family(Bidirectional, (), None, None),
}


def find_family(config: Any) -> str | None:
    """The name of the family of a checkpoint's config, or None."""
    model_type = getattr(config, "model_type", None)
    return next((name for name, family in FAMILIES.items() if model_type in family.model_types), None)


def adapt(model: torch.nn.Module, family: str | None = None) -> tuple[Adapter, dict[str, Any]]:
    """An adapter around a model, and the options of ``generate`` that go with its family.

    Parameters
    ----------
    model
        A model of transformers, or of the code that comes with a checkpoint, with its ``config``.
    family
        A name of ``FAMILIES``. Default: found by ``config.model_type``.

    Returns
    -------
    adapter, options
        ``generate(adapter, prompt_ids, **options, gen_length=..., ...)``. The options hold ``mask_token_id``
        and ``eos_token_id`` where they are known, ``block_length`` and ``logit_shift``.

    Raises
    ------
    ValueError
        The family is unknown, or is not found.
    """
    config = getattr(model, "config", None)
    name = find_family(config) if family is None else family
    if name not in FAMILIES:
        given = f"model_type {getattr(config, 'model_type', None)!r}" if family is None else repr(family)
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {given}")
    facts = FAMILIES[name]
    causal_block = facts.causal_block
    if causal_block is not None:
        named = (getattr(config, key, None) for key in ("bd_size", "block_size"))
        causal_block = next((value for value in named if isinstance(value, int)), causal_block)
    options: dict[str, Any] = {"logit_shift": facts.logit_shift, "block_length": facts.block_length}
    if causal_block is not None and causal_block % facts.block_length:
        options["block_length"] = causal_block
    for key, named_by, default in (
        ("mask_token_id", "mask_token_id", facts.mask_token_id),
        ("eos_token_id", None, facts.end_token_id),
    ):
        value = getattr(config, named_by, None) if named_by else None
        if isinstance(value, int) or default is not None:
            options[key] = value if isinstance(value, int) else default
    return facts.adapter(model, causal_block), options


def _row_cache(past: RowCache | None, rows: slice, store: bool) -> RowCache:
    """The cache, told what to do with the keys of these rows."""
    from attn_sampler.adapters.remote_code import RowCache

    past = RowCache() if past is None else past
    past.store = store or (rows if past.get_seq_length() > rows.start else False)
    return past


def _positions(tokens: Tensor, rows: slice) -> Tensor:
    return torch.arange(rows.start, rows.stop, device=tokens.device)[None]


def _marked(tokens: Tensor, rows: slice, length: int) -> Tensor:
    """bool [1, length], True at the rows."""
    marked = torch.zeros(1, length, dtype=torch.bool, device=tokens.device)
    marked[:, rows] = True
    return marked
