"""Which masked positions to commit, and the commit.

A row of any length is handled by one program, a chunk of positions at a time. The rule needs two looks at
it: the first finds the threshold and the fallback's position, the second writes.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .confidence import confidence_of, merge_partials

_NONE = tl.constexpr(2**31 - 1)  # loses every tie to a real position
_INF = tl.constexpr(float("inf"))


@triton.jit
def _first_look(
    scores,
    confidence,
    masked,
    offs,
    theta,
    top_high,
    best,
    best_at,
    tau,
    POLICY: tl.constexpr,
    FALLBACK: tl.constexpr,
):
    """Carry over one more chunk: threshold, largest confident score, and the fallback so far.

    A position is confident and above the threshold exactly where the largest confident score is, so the
    second look needs no third one to know whether any position passes.
    """
    candidate = masked & (scores == scores)
    high = masked & (confidence >= tau)
    theta = tl.maximum(theta, tl.max(tl.where(candidate & ~high, scores, -_INF), 0))
    top_high = tl.maximum(top_high, tl.max(tl.where(candidate & high, scores, -_INF), 0))
    value = scores if POLICY == "sequential" or FALLBACK == "score" else confidence
    value = tl.where(candidate & (value == value), value, -_INF)
    chunk_best = tl.max(value, 0)
    chunk_at = tl.min(tl.where(candidate & (value == chunk_best), offs, _NONE), 0)
    take = (chunk_at != _NONE) & ((chunk_best > best) | (best_at == _NONE))
    return theta, top_high, tl.where(take, chunk_best, best), tl.where(take, chunk_at, best_at)


@triton.jit
def _second_look(scores, confidence, masked, offs, theta, top_high, best_at, tau, POLICY: tl.constexpr):
    """The selected positions of a chunk."""
    single = offs == best_at
    if POLICY == "sequential":
        selected = single
    else:
        passing = masked & (confidence >= tau) & (scores > theta)
        selected = tl.where(top_high > theta, passing, single)
    return selected


@triton.jit(do_not_specialize=["n_positions", "tau"])
def select_tokens_kernel(
    scores,
    scores_sb,
    scores_sc,
    confidence,
    confidence_sb,
    confidence_sc,
    masked,
    masked_sb,
    masked_sc,
    selected,
    selected_sb,
    selected_sc,
    n_positions,
    tau,
    POLICY: tl.constexpr,
    FALLBACK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    scores += b * scores_sb
    confidence += b * confidence_sb
    masked += b * masked_sb
    selected += b * selected_sb
    theta = -_INF
    top_high = -_INF
    best = -_INF
    best_at = _NONE
    for start in range(0, n_positions, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        ok = offs < n_positions
        at = offs.to(tl.int64)
        theta, top_high, best, best_at = _first_look(
            tl.load(scores + at * scores_sc, mask=ok, other=0.0),
            tl.load(confidence + at * confidence_sc, mask=ok, other=0.0),
            tl.load(masked + at * masked_sc, mask=ok, other=0) != 0,
            offs,
            theta,
            top_high,
            best,
            best_at,
            tau,
            POLICY,
            FALLBACK,
        )
    for start in range(0, n_positions, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        ok = offs < n_positions
        at = offs.to(tl.int64)
        chosen = _second_look(
            tl.load(scores + at * scores_sc, mask=ok, other=0.0),
            tl.load(confidence + at * confidence_sc, mask=ok, other=0.0),
            tl.load(masked + at * masked_sc, mask=ok, other=0) != 0,
            offs,
            theta,
            top_high,
            best_at,
            tau,
            POLICY,
        )
        tl.store(selected + at * selected_sc, chosen, mask=ok)


@triton.jit
def commit_row(
    b,
    scores,
    scores_sb,
    scores_sc,
    partials,
    plane,
    n_splits,
    tokens,
    tokens_sb,
    tokens_st,
    block_start,
    mask_token_id,
    token_ids,
    confidence,
    selected,
    n_positions,
    tau,
    METRIC: tl.constexpr,
    POLICY: tl.constexpr,
    FALLBACK: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Finish the step of row b, whose scores are in memory: confidence, selection, commit into tokens.

    ``token_ids``, ``confidence`` and ``selected`` are contiguous [B, C].
    """
    scores += b.to(tl.int64) * scores_sb
    tokens += b.to(tl.int64) * tokens_sb + block_start.to(tl.int64) * tokens_st
    theta = -_INF
    top_high = -_INF
    best = -_INF
    best_at = _NONE
    for start in range(0, n_positions, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        ok = offs < n_positions
        at = offs.to(tl.int64)
        row = b * n_positions + offs
        m, l, t, _, token, x, other = merge_partials(  # noqa: E741
            partials, plane, row, ok, n_splits, SPLITS
        )
        value = confidence_of(m, l, t, x, other, METRIC)
        tl.store(token_ids + row, token.to(tl.int64), mask=ok)
        tl.store(confidence + row, value, mask=ok)
        theta, top_high, best, best_at = _first_look(
            tl.load(scores + at * scores_sc, mask=ok, other=0.0),
            value,
            tl.load(tokens + at * tokens_st, mask=ok, other=mask_token_id - 1) == mask_token_id,
            offs,
            theta,
            top_high,
            best,
            best_at,
            tau,
            POLICY,
            FALLBACK,
        )
    # The second look reads what other threads of this program wrote in the first.
    tl.debug_barrier()
    for start in range(0, n_positions, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        ok = offs < n_positions
        at = offs.to(tl.int64)
        row = b * n_positions + offs
        chosen = _second_look(
            tl.load(scores + at * scores_sc, mask=ok, other=0.0),
            tl.load(confidence + row, mask=ok, other=0.0),
            tl.load(tokens + at * tokens_st, mask=ok, other=mask_token_id - 1) == mask_token_id,
            offs,
            theta,
            top_high,
            best_at,
            tau,
            POLICY,
        )
        tl.store(selected + row, chosen, mask=ok)
        # A position may be read by several threads, and all have to read it before one writes it.
        tl.debug_barrier()
        tl.store(tokens + at * tokens_st, tl.load(token_ids + row, mask=ok, other=0), mask=ok & chosen)


@triton.jit(do_not_specialize=["block_start", "mask_token_id", "n_positions", "n_splits", "tau"])
def commit_kernel(
    scores,
    scores_sb,
    scores_sc,
    partials,
    plane,
    n_splits,
    tokens,
    tokens_sb,
    tokens_st,
    block_start,
    mask_token_id,
    token_ids,
    confidence,
    selected,
    n_positions,
    tau,
    METRIC: tl.constexpr,
    POLICY: tl.constexpr,
    FALLBACK: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One program for each row: finish a step whose scores are there."""
    commit_row(
        tl.program_id(0),
        scores,
        scores_sb,
        scores_sc,
        partials,
        plane,
        n_splits,
        tokens,
        tokens_sb,
        tokens_st,
        block_start,
        mask_token_id,
        token_ids,
        confidence,
        selected,
        n_positions,
        tau,
        METRIC,
        POLICY,
        FALLBACK,
        BLOCK,
        SPLITS,
    )


def select_tokens(
    selected: Tensor,
    scores: Tensor,
    confidence: Tensor,
    masked: Tensor,
    policy: str,
    tau: float,
    fallback: str,
) -> None:
    batch, positions = scores.shape
    if batch == 0 or positions == 0:
        return
    block = min(1024, triton.next_power_of_2(positions))
    launch.launch(
        select_tokens_kernel,
        batch,
        (
            scores,
            *scores.stride(),
            confidence,
            *confidence.stride(),
            masked,
            *masked.stride(),
            selected,
            *selected.stride(),
            positions,
            tau,
        ),
        {"POLICY": policy, "FALLBACK": fallback, "BLOCK": block},
        launch.Config(1, block, 1 if block <= 128 else 4, 1),
        device=scores.device,
    )


#: The constants of a kernel that commits nothing.
NO_COMMIT = {"METRIC": "", "POLICY": "", "FALLBACK": "", "COMMIT_BLOCK": 1, "CONF_SPLITS": 1}


class Commit(NamedTuple):
    """The end of a decoding step: what is selected, by which rule, and where it is written."""

    tokens: Tensor  # [B, T] int64
    block_start: int
    mask_token_id: int
    masked_rows_only: bool
    partials: Tensor  # of the tokens, [7, B * C, S]
    token_ids: Tensor  # [B, C] int64, contiguous as the next two
    confidence: Tensor  # [B, C] float32
    selected: Tensor  # [B, C] bool
    metric: str
    policy: str
    tau: float
    fallback: str

    def token_arguments(self, offset: int) -> tuple[object, ...]:
        """The token tensor, the token of query row 0 (``offset`` before the block), and the mask's id."""
        return (self.tokens, *self.tokens.stride(), self.block_start + offset, self.mask_token_id)

    def arguments(self) -> tuple[object, ...]:
        _, rows, splits = self.partials.shape
        return (
            self.partials,
            rows * splits,
            splits,
            self.block_start,
            self.token_ids,
            self.confidence,
            self.selected,
            self.tau,
        )

    def constants(self) -> dict[str, object]:
        splits = triton.next_power_of_2(self.partials.shape[2])
        positions = triton.next_power_of_2(self.selected.shape[1])
        return {
            "METRIC": self.metric,
            "POLICY": self.policy,
            "FALLBACK": self.fallback,
            "COMMIT_BLOCK": min(positions, 256, max(1, 1024 // splits)),
            "CONF_SPLITS": splits,
        }

    def launch(self, scores: Tensor) -> None:
        """Finish the step in a launch of its own, from scores that are in memory."""
        batch, positions = self.selected.shape
        partials, plane, splits, block_start, token_ids, confidence, selected, tau = self.arguments()
        constants = self.constants()
        launch.launch(
            commit_kernel,
            batch,
            (
                scores,
                *scores.stride(),
                partials,
                plane,
                splits,
                self.tokens,
                *self.tokens.stride(),
                block_start,
                self.mask_token_id,
                token_ids,
                confidence,
                selected,
                positions,
                tau,
            ),
            {
                "METRIC": self.metric,
                "POLICY": self.policy,
                "FALLBACK": self.fallback,
                "BLOCK": constants["COMMIT_BLOCK"],
                "SPLITS": constants["CONF_SPLITS"],
            },
            launch.Config(1, 1, 4, 1),
            device=scores.device,
        )
