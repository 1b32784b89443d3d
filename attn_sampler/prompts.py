"""The prompts that ``generate`` is given: read, checked, padded and lengthened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attn_sampler import checks
from attn_sampler.options import signed_seed

_MAX_LENGTH = 1 << 40  # far beyond any model's; the memory is asked for next


def read(
    name: str,
    prompt_ids: Tensor | Sequence[Tensor] | Sequence[Sequence[int]],
    model: Callable[..., Any],
    attention_mask: Tensor | None,
    mask_token_id: int,
    pad_token_id: int,
) -> tuple[Tensor, Tensor]:
    """Tokens [B, T], a copy, and which of them are not padding."""
    if checks.integer("pad_token_id", pad_token_id, 0, checks.INT64_END) == mask_token_id:
        raise ValueError(f"pad_token_id: expected another token than mask_token_id, got {pad_token_id}")
    if isinstance(prompt_ids, Tensor):
        checks.tensor(name, prompt_ids, "[B, T]", (torch.int64,))
        if attention_mask is None:
            return prompt_ids.clone(), torch.ones_like(prompt_ids, dtype=torch.bool)
        shape = prompt_ids.shape
        checks.tensor("attention_mask", attention_mask, "[B, T]", (torch.bool,), like=prompt_ids)
        checks.shape("attention_mask", attention_mask, "[B, T]", shape)
        if (attention_mask[:, :-1] & ~attention_mask[:, 1:]).any():
            raise ValueError("attention_mask: expected padding on the left: False, then True, in each row")
        if ((prompt_ids == mask_token_id) & ~attention_mask).any():
            raise ValueError(f"{name}: expected no mask_token_id at the padding of attention_mask")
        return prompt_ids.clone(), attention_mask.clone()
    if attention_mask is not None:
        raise ValueError("attention_mask: goes with a prompt_ids tensor, not with a list of prompts")
    if isinstance(prompt_ids, str) or not isinstance(prompt_ids, Sequence):
        raise TypeError(f"{name}: expected a tensor or a sequence, got {type(prompt_ids).__name__}")
    try:
        rows = [torch.as_tensor(row) for row in prompt_ids]
    except (TypeError, ValueError, RuntimeError) as error:  # text that is yet to be tokenized, for one
        raise TypeError(f"{name}: expected a sequence of token ids for each prompt: {error}") from None
    if any(row.dim() != 1 or (len(row) and row.dtype != torch.int64) for row in rows):
        raise ValueError(f"{name}: expected [B, T], or a sequence of 1-dimensional int64 prompts")
    parameter = next(model.parameters(), None) if hasattr(model, "parameters") else None
    device = rows[0].device if parameter is None and rows else getattr(parameter, "device", None)
    length = max(map(len, rows), default=0)
    tokens = torch.full((len(rows), length), pad_token_id, dtype=torch.int64, device=device)
    visible = torch.zeros_like(tokens, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = row
        visible[i, length - len(row) :] = True
    return tokens, visible


def unconditional(
    prompt_ids: Tensor | Sequence[Tensor] | Sequence[Sequence[int]] | None,
    tokens: Tensor,
    visible: Tensor,
    *source: Any,
) -> Tensor:
    """What a guiding pass has in the place of the prompts ``tokens``, int64 [B, T]. Default: masks."""
    if prompt_ids is None:
        return tokens.masked_fill(visible, source[2])
    name = "unconditional_prompt_ids"
    others, theirs = read(name, prompt_ids, *source)
    checks.tensor(name, others, "[B, T]", (torch.int64,), like=tokens)
    if not torch.equal(theirs, visible):
        expected, given = (x.sum(dim=1).tolist() for x in (visible, theirs))
        raise ValueError(f"{name}: expected the lengths of prompt_ids, {expected}, got {given}")
    return others


def check_alignment(visible: Tensor, causal_block: int, block_length: int) -> None:
    """The blocks that are decoded lie in those of a block-causal model."""
    if causal_block % block_length != 0:
        raise ValueError(
            f"block_length: expected a divisor of the model's blocks of {causal_block}, got {block_length}"
        )
    if ((~visible).sum(dim=1) % causal_block != 0).any():
        raise ValueError(
            f"prompt_ids: expected padding by multiples of the model's blocks of {causal_block}, so prompts "
            f"whose lengths agree modulo {causal_block}, got lengths {visible.sum(dim=1).tolist()}"
        )


def append_masked(tokens: Tensor, visible: Tensor, count: int, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """The prompts with ``count`` masked positions behind each."""
    checks.integer("gen_length", count, 0, _MAX_LENGTH)
    shape = (len(tokens), count)
    masked = tokens.new_full(shape, mask_token_id)
    return torch.cat([tokens, masked], dim=1), torch.cat([visible, visible.new_ones(shape)], dim=1)


def of_sequences(
    name: str, value: object, tokens: Tensor, dtype: torch.dtype, check: Callable[[Any], Any]
) -> Any:
    """A checked number for all sequences, or a tensor of one for each: of a tensor [B], or of B numbers."""
    if not isinstance(value, (Sequence, Tensor)) or isinstance(value, str):
        return check(value)
    if isinstance(value, Tensor):
        checks.tensor(name, value, "[B]", (*checks.FLOAT_DTYPES, torch.int32, torch.int64))
    values = [check(x) for x in (value.tolist() if isinstance(value, Tensor) else value)]
    if len(values) != len(tokens):
        raise ValueError(f"{name}: expected a number or {len(tokens)} of them, got {len(values)}")
    return torch.tensor(values, dtype=dtype, device=tokens.device)


def sequence_seeds(seed: int | Sequence[int], tokens: Tensor) -> Tensor:
    """One int64 seed a sequence."""
    batch = len(tokens)
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        values = [checks.integer("seed", s) for s in seed]
        if len(values) != batch:
            raise ValueError(f"seed: expected an integer or {batch} of them, got {len(values)}")
    else:
        first = checks.integer("seed", seed)
        values = [first + i for i in range(batch)]
    return torch.tensor([signed_seed(x) for x in values], dtype=torch.int64, device=tokens.device)
