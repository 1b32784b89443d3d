"""The published masked-diffusion models and masked language models, as ``generate`` calls them.

``FAMILIES`` holds what is to be known of a family of checkpoints; its adapter says how the modelling code
that comes with them is called. ``adapt(model)`` finds both. The code of masked-diffusion models is remote
code on the hub, which is not part of this package's tests: those run small models of their own with the same
call structure. Masked language models (BERT, ESM, ...) are transformers' own classes.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attn_sampler import checks
from attn_sampler.caching import check_places

if TYPE_CHECKING:
    from attn_sampler.adapters.remote_code import RowCache

WHOLE_TEXT = 1 << 31
"""A block length beyond any text, all of which is then one block."""


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
    infills = False  # whether the model fills in what a text masks, rather than continuing it

    def __init__(self, model: torch.nn.Module, causal_block: int | None = None) -> None:
        self.model = model
        self.causal_block = None if causal_block is None else checks.integer("causal_block", causal_block, 1)
        self._takes = inspect.signature(model.forward).parameters
        self._padding_is_masked = self._places_are_read = False

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
        # Logits that are never predicted are -inf in both rows.
        masked, seen = (self(tokens, attention_mask=m)[:, 1].float().diff(dim=0) for m in (mask, None))
        # How far the padding's token moves the logits; rounding may leave a little, in low precision.
        if masked.nan_to_num().norm() > 0.1 * seen.nan_to_num().norm():
            raise ValueError(
                f"attention_mask: {type(self.model).__name__} ignores it, so that padding would be read as "
                "text; decode the prompts one by one, or those of one length together"
            )
        self._padding_is_masked = True


class Placed(Adapter):
    """An adapter whose model is told the positions of its rows, and so runs any of them by themselves."""

    def forward_at(self, tokens: Tensor, positions: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.model(tokens, position_ids=positions, use_cache=False).logits

    def check_places(self, tokens: Tensor) -> None:
        """Raise where ``forward_at`` does not give rows the logits of a whole pass, by a few tokens."""
        if not self._places_are_read:
            check_places(self, tokens)
            self._places_are_read = True


class MaskedLM(Placed):
    """A masked language model, of a class of ``AutoModelForMaskedLM``: BERT, RoBERTa, ESM and their kin.

    Position ids count a row's tokens without its padding, from where the model's own begin, so that a padded
    row has the logits that it has alone.

    Parameters
    ----------
    model, causal_block
        As in ``Adapter``.
    suppressed_token_ids
        The tokens that are never predicted: their logits are -inf in what the adapter returns. Default: the
        bos, cls, eos, pad, sep and unk tokens, as far as the model's config names them.

    Raises
    ------
    ValueError
        A suppressed token is outside the vocabulary, or the model is a decoder or has no head for tokens. In
        a call: a row has more tokens than the model's table has positions.
    """

    infills = True

    def __init__(
        self,
        model: torch.nn.Module,
        causal_block: int | None = None,
        suppressed_token_ids: Iterable[int] | None = None,
    ) -> None:
        super().__init__(model, causal_block)
        config: Any = model.config
        name, vocab_size = type(model).__name__, config.vocab_size
        if getattr(config, "is_decoder", False):
            raise ValueError(f"model: {name} attends causally, as is_decoder of its config says; unset it")
        head = getattr(model, "get_output_embeddings", None)
        if head is not None and head() is None:
            raise ValueError(f"model: {name} predicts no tokens; AutoModelForMaskedLM loads what does")
        if suppressed_token_ids is None:
            named = (getattr(config, f"{token}_token_id", None) for token in _SPECIAL_TOKENS)
            suppressed_token_ids = [x for x in named if isinstance(x, int) and 0 <= x < vocab_size]
        self._suppressed = torch.tensor(
            [checks.integer("suppressed_token_ids", x, 0, vocab_size) for x in suppressed_token_ids],
            dtype=torch.int64,
        )
        tables = (x for name, x in model.named_modules() if name.endswith("position_embeddings"))
        table = next((x for x in tables if isinstance(x, torch.nn.Embedding)), None)
        self._first_position, self._max_length = 0, sys.maxsize  # of rotary positions, which have no table
        if table is not None:  # RoBERTa and its kin count from behind the position of padding
            self._first_position = 0 if table.padding_idx is None else table.padding_idx + 1
            self._max_length = table.num_embeddings - self._first_position

    def __call__(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        visible = torch.ones_like(tokens) if attention_mask is None else attention_mask
        return self._run(tokens, (visible.cumsum(dim=1) - 1).clamp(min=0), attention_mask)

    def forward_at(self, tokens: Tensor, positions: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is not None:
            positions = (positions - (~attention_mask).sum(dim=1, keepdim=True)).clamp(min=0)
        return self._run(tokens, positions, None)

    def _run(self, tokens: Tensor, positions: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Logits of tokens [B, M] at positions [B, M], counted without padding."""
        if tokens.shape[1] > self._max_length and (longest := int(positions.max()) + 1) > self._max_length:
            raise ValueError(
                f"prompt_ids: expected at most {self._max_length} tokens, as {type(self.model).__name__} has "
                f"positions for (max_position_embeddings), got {longest}, those to fill in included"
            )
        taken = "position_ids" in self._takes
        options = {"position_ids": positions + self._first_position} if taken else {}
        logits = self.model(tokens, attention_mask=attention_mask, **options).logits
        self._suppressed = self._suppressed.to(logits.device)
        return logits.index_fill(-1, self._suppressed, -torch.inf)


class RowCached(Adapter):
    """Keeps keys and values in a ``RowCache``."""

    def crop(self, past: RowCache, length: int) -> RowCache:
        return past.map(lambda x: x[:, :, :length])

    def select(self, past: RowCache, index: Tensor) -> RowCache:
        return past.map(lambda x: x[index])


class Bidirectional(RowCached, Placed):
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


class SDAR(BlockCausal, Placed):
    """SDAR: ``store_kv`` says whether a pass is cached. Its flash-attn calls are reported to the captures."""

    def forward_at(self, tokens: Tensor, positions: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        every = torch.ones(1, 1, 1, tokens.shape[1], dtype=torch.bool, device=tokens.device)
        return self._seen(tokens, every, positions, use_cache=False)

    def _run(self, tokens: Tensor, rows: slice, padding: Tensor | None, store: bool, **cache: Any) -> Tensor:
        mask, positions = self._mask(tokens, rows, padding), _positions(tokens, rows)
        return self._seen(tokens, mask, positions, store_kv=store, **cache)

    def _seen(self, tokens: Tensor, mask: Tensor, positions: Tensor, **cache: Any) -> Tensor:
        from attn_sampler.adapters.remote_code import reported_flash_attention

        with reported_flash_attention(sys.modules[type(self.model).__module__]):
            return self.model(tokens, attention_mask=mask, position_ids=positions, **cache).logits


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


_SPECIAL_TOKENS = ("bos", "cls", "eos", "pad", "sep", "unk")

_MASKED_LM_TYPES = (
    *("albert", "bert", "camembert", "data2vec-text", "distilbert", "electra", "ernie", "esm", "esmc"),
    *("eurobert", "gte", "modernbert", "nomic_bert", "roberta", "roberta-prelayernorm", "xlm-roberta"),
    "xlm-roberta-xl",
)


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
    "masked-lm": Family(
        MaskedLM, _MASKED_LM_TYPES, None, None, block_length=WHOLE_TEXT, auto_class="AutoModelForMaskedLM"
    ),
    "bidirectional": Family(Bidirectional, (), None, None),
}


def find_family(config: Any) -> str | None:
    """The name of the family of a checkpoint's config, or None."""
    model_type = getattr(config, "model_type", None)
    return next((name for name, family in FAMILIES.items() if model_type in family.model_types), None)


def adapt(
    model: torch.nn.Module, family: str | None = None, suppressed_token_ids: Iterable[int] | None = None
) -> tuple[Adapter, dict[str, Any]]:
    """An adapter around a model, and the options of ``generate`` that go with its family.

    Parameters
    ----------
    model
        A model of transformers, or of the code that comes with a checkpoint, with its ``config``.
    family
        A name of ``FAMILIES``. Default: found by ``config.model_type``.
    suppressed_token_ids
        Of a masked language model, the tokens that are never predicted, as in ``MaskedLM``: those that its
        tokenizer calls special, but for the mask token.

    Returns
    -------
    adapter, options
        ``generate(adapter, prompt_ids, **options, gen_length=..., ...)``. The options hold ``mask_token_id``
        and ``eos_token_id`` where they are known, ``block_length`` and ``logit_shift``.

    Raises
    ------
    ValueError
        The family is unknown, or is not found; or tokens are suppressed in a family that is not
        ``"masked-lm"``.
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
    if suppressed_token_ids is None:
        return facts.adapter(model, causal_block), options
    if not issubclass(facts.adapter, MaskedLM):
        raise ValueError(f"suppressed_token_ids: expected none with the family {name}, which predicts all")
    return facts.adapter(model, causal_block, suppressed_token_ids), options


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
