"""The tensors that the public functions write: new ones, and what is refused of those that a user gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attn_sampler import checks
from attn_sampler.reference import Selected, StepResult, TopColumns


def count(span: Any, length: int, from_end: bool = False) -> int:
    """How many positions a slice takes, whose bounds may all count from the end: a stop of 0 is the end then.
    The extension asks whether it is one, and inside the length."""
    if span is None:
        return length
    try:
        if from_end and span.stop == 0:
            span = slice(span.start, None, span.step)
        return len(range(*span.indices(length)))
    except (AttributeError, TypeError):
        return 0


def attempted(new: Callable[..., Any], *arguments: Any) -> Any:
    """New results; None where torch cannot make them: whether they may be so large is to be checked first."""
    try:
        return new(*arguments)
    except RuntimeError:
        return None


def made(new: Callable[..., Any], *arguments: Any) -> Any:
    """New results of checked sizes."""
    if torch.compiler.is_compiling():
        return new(*arguments)
    try:
        return new(*arguments)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # on the CPU torch has no other name for it
        raise MemoryError(f"out: there is no memory for the result ({str(error).splitlines()[0]})") from None


def attended(q: Tensor, per_head: bool, *sizes: int) -> Tensor:
    """A new float32 [B, C] or [B, R, C] or, per head, [B, Hq, C] or [B, Hq, R, C]."""
    # What per_head has to be is for the extension to ask: anything may be given.
    return q.new_empty(*q.shape[: 2 if per_head is True else 1], *sizes, dtype=torch.float32)


def top_columns(q: Tensor, k: Tensor, per: str, count: int) -> TopColumns:
    """New positions and scores [B, Hkv, count], [B, Hq, count] or [B, 1, count]."""
    groups = {"kv_head": k.shape[1], "head": q.shape[1]}.get(per, 1)
    positions = q.new_empty(q.shape[0], groups, count, dtype=torch.int64)
    return TopColumns(positions, torch.empty_like(positions, dtype=torch.float32))


def predictions(logits: Tensor, with_current: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """New token_ids, confidence, log_prob and current [B, C]."""
    confidence = logits.new_empty(logits.size(0), logits.size(1), dtype=torch.float32)
    token_ids, log_prob = torch.empty_like(confidence, dtype=torch.int64), torch.empty_like(confidence)
    return token_ids, confidence, log_prob, torch.empty_like(confidence) if with_current else None


def selection(masked: Tensor, budget: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """New selected and revised [B, C], and the budget."""
    revised = None if budget is None else torch.empty_like(masked, dtype=torch.uint8)
    return Selected(masked.new_empty(masked.shape), revised, budget)  # type: ignore[arg-type]


def step_result(tokens: Tensor, logits: Tensor, scores: Tensor | None, budget: Tensor | None) -> StepResult:
    """The step's tensors: those given, and new ones."""
    confidence = logits.new_empty(logits.size(0), logits.size(1), dtype=torch.float32)
    token_ids = torch.empty_like(confidence, dtype=torch.int64)
    given = torch.empty_like(confidence) if scores is None else scores
    result = StepResult(tokens, token_ids, confidence, given, torch.empty_like(confidence, dtype=torch.bool))
    if budget is None:
        return result
    revised = torch.empty_like(confidence, dtype=torch.uint8)
    return StepResult(
        *result[:5], torch.empty_like(confidence), torch.empty_like(confidence), revised, budget
    )


def check_output(name: str, out: Any, like: Tensor, axes: str, shape: Sequence[int]) -> None:
    checks.tensor(name, out, axes, (torch.float32,), like=like)
    checks.shape(name, out, axes, shape)
    checks.writable(name, out)
