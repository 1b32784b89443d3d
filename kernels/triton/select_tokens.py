"""Which masked positions to commit, and the commit.

A row of any length is handled by one program, a chunk of positions at a time. The rule needs two looks at
it: the first finds the threshold and the fallback's position, the second writes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from attn_sampler.options import Selection

from . import launch
from .tile import Matrix
from .token_confidence import confidence_of, merge_partials

_NONE = tl.constexpr(2**31 - 1)  # loses every tie to a real position
_INF = tl.constexpr(float("inf"))


class Options(NamedTuple):
    """Compile-time options of a selection; those of the confidence where it is still in partials."""

    rule: str
    fallback: str
    block: int  # positions at a time
    metric: str = ""
    splits: int = 1  # of the partials, at the most


class Row(NamedTuple):
    """One row of a matrix inside a kernel."""

    data: Any
    stride: Any


class Look(NamedTuple):
    """What the first look at a row has found.

    A position is confident and above the threshold exactly where the largest confident score is, so the
    second look needs no third one to know whether any position passes.
    """

    theta: Any  # the threshold: the largest score that is not confident
    top_high: Any  # the largest confident one
    best: Any  # the fallback's value and position
    best_at: Any


class Commit(NamedTuple):
    """The end of a decoding step. All but the partials are [B, C] and contiguous."""

    partials: Tensor  # of the tokens, [7, B * C, S]
    token_ids: Tensor  # int64
    confidence: Tensor
    selected: Tensor
    tau: float


@triton.jit
def _row(matrix, b):
    return Row(matrix.data + b * matrix.stride_b, matrix.stride_n)


@triton.jit
def _load(row, at, ok, other):
    return tl.load(row.data + at.to(tl.int64) * row.stride, mask=ok, other=other)


@triton.jit
def _is_masked(marks, mask_token_id, at, ok):
    """Whether a position is marked: by the mask's token, or without one by True."""
    if mask_token_id is None:
        masked = _load(marks, at, ok, 0) != 0
    else:
        masked = _load(marks, at, ok, mask_token_id - 1) == mask_token_id
    return masked


@triton.jit
def _first_look(look, scores, confidence, masked, offs, tau, OPTIONS: tl.constexpr):
    """Carry over one more chunk."""
    candidate = masked & (scores == scores)
    high = masked & (confidence >= tau)
    theta = tl.maximum(look.theta, tl.max(tl.where(candidate & ~high, scores, -_INF), 0))
    top_high = tl.maximum(look.top_high, tl.max(tl.where(candidate & high, scores, -_INF), 0))
    value = scores if OPTIONS.rule == "sequential" or OPTIONS.fallback == "score" else confidence
    value = tl.where(candidate & (value == value), value, -_INF)
    best = tl.max(value, 0)
    best_at = tl.min(tl.where(candidate & (value == best), offs, _NONE), 0)
    take = (best_at != _NONE) & ((best > look.best) | (look.best_at == _NONE))
    return Look(theta, top_high, tl.where(take, best, look.best), tl.where(take, best_at, look.best_at))


@triton.jit
def _second_look(look, scores, confidence, masked, offs, tau, OPTIONS: tl.constexpr):
    """The selected positions of a chunk."""
    single = offs == look.best_at
    if OPTIONS.rule == "sequential":
        selected = single
    else:
        passing = masked & (confidence >= tau) & (scores > look.theta)
        selected = tl.where(look.top_high > look.theta, passing, single)
    return selected


@triton.jit
def _select_row(
    scores, confidence, marks, mask_token_id, selected, tokens, n_positions, tau, OPTIONS: tl.constexpr
):
    """Both looks at a row. ``tokens``, where given, are the row's partials and predictions; they are merged
    and written in the first look, together with their confidence, and committed in the second."""
    look = Look(-_INF, -_INF, -_INF, _NONE)
    for start in range(0, n_positions, OPTIONS.block):
        offs = start + tl.arange(0, OPTIONS.block)
        ok = offs < n_positions
        if tokens is None:
            value = _load(confidence, offs, ok, 0.0)
        else:
            best = merge_partials(
                tokens.partials, tokens.plane, tokens.first + offs, ok, tokens.n_splits, OPTIONS.splits
            )
            value = confidence_of(best, OPTIONS.metric)
            tl.store(tokens.ids + offs, best.token.to(tl.int64), mask=ok)
            tl.store(confidence.data + offs, value, mask=ok)
        masked = _is_masked(marks, mask_token_id, offs, ok)
        look = _first_look(look, _load(scores, offs, ok, 0.0), value, masked, offs, tau, OPTIONS)
    if tokens is not None:
        # The second look reads what other threads of this program wrote in the first.
        tl.debug_barrier()
    for start in range(0, n_positions, OPTIONS.block):
        offs = start + tl.arange(0, OPTIONS.block)
        ok = offs < n_positions
        value = _load(confidence, offs, ok, 0.0)
        masked = _is_masked(marks, mask_token_id, offs, ok)
        chosen = _second_look(look, _load(scores, offs, ok, 0.0), value, masked, offs, tau, OPTIONS)
        tl.store(selected.data + offs.to(tl.int64) * selected.stride, chosen, mask=ok)
        if tokens is not None:
            # A position may be read by several threads, and all have to read it before one writes it.
            tl.debug_barrier()
            ids = tl.load(tokens.ids + offs, mask=ok, other=0)
            tl.store(marks.data + offs.to(tl.int64) * marks.stride, ids, mask=ok & chosen)


@triton.jit(do_not_specialize=["n_positions", "tau"])
def select_tokens_kernel(scores, confidence, masked, selected, n_positions, tau, OPTIONS: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    _select_row(
        _row(scores, b),
        _row(confidence, b),
        _row(masked, b),
        None,
        _row(selected, b),
        None,
        n_positions,
        tau,
        OPTIONS,
    )


class Predictions(NamedTuple):
    """A row's tokens inside a kernel that commits."""

    partials: Any
    plane: Any
    n_splits: Any
    first: Any  # the number of the row's first position in the batch
    ids: Any


@triton.jit
def commit_row(
    b,
    scores,
    tokens,
    block_start,
    mask_token_id,
    commit,
    plane,
    n_splits,
    n_positions,
    OPTIONS: tl.constexpr,
):
    """Finish the step of row b, whose scores are in memory: confidence, selection, commit into tokens."""
    first = b * n_positions
    wide = b.to(tl.int64)
    marks = _row(tokens, wide)
    _select_row(
        _row(scores, wide),
        Row(commit.confidence + first, 1),
        Row(marks.data + block_start.to(tl.int64) * marks.stride, marks.stride),
        mask_token_id,
        Row(commit.selected + first, 1),
        Predictions(commit.partials, plane, n_splits, first, commit.token_ids + first),
        n_positions,
        commit.tau,
        OPTIONS,
    )


def select_tokens(
    selected: Tensor, scores: Tensor, confidence: Tensor, masked: Tensor, options: Selection
) -> None:
    batch, positions = scores.shape
    if batch == 0 or positions == 0:
        return
    block = min(1024, launch.next_power_of_2(positions))
    launch.launch(
        select_tokens_kernel,
        batch,
        {
            "scores": Matrix.of(scores),
            "confidence": Matrix.of(confidence),
            "masked": Matrix.of(masked),
            "selected": Matrix.of(selected),
            "n_positions": positions,
            "tau": options.tau,
            "OPTIONS": Options(options.rule, options.fallback, block),
        },
        launch.Config(1, block, 1 if block <= 128 else 4, 1),
        device=scores.device,
    )
