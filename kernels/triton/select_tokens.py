"""Which masked positions to commit, which others to revise, and the commit.

A row of any length is handled by one program, a chunk of positions at a time. The rule needs two looks at
it: the first finds the threshold and the fallback's position, the second writes. A revision goes the same
way: the first look finds what fails and leaves it in ``revised``, the second keeps the first of those.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from attn_sampler.options import Selection
from attn_sampler.reference import REMASKED, REPLACED, RULE_CODES, Selected, StepResult

from . import launch
from .tile import Matrix
from .token_confidence import (
    Bitmask,
    Logits,
    Rows,
    confidence_of,
    log_prob_of,
    merge_partials,
    probability_of,
)

_NONE = tl.constexpr(2**31 - 1)  # loses every tie to a real position
_INF = tl.constexpr(float("inf"))
_SEQUENTIAL, _THRESHOLD = tl.constexpr(RULE_CODES["sequential"]), tl.constexpr(RULE_CODES["threshold"])
_REPLACED, _REMASKED = tl.constexpr(REPLACED), tl.constexpr(REMASKED)
_PAIRS = tl.constexpr(2048)  # of positions compared at a time; more would spill


class Options(NamedTuple):
    """Compile-time options of a selection; those of the confidence where it is still in partials."""

    rule: str  # or "", where each row has its own
    fallback: str
    block: int  # positions at a time
    metric: str = ""
    splits: int = 1  # of the partials, at the most
    order: str = ""  # of a revision


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


class Revision(NamedTuple):
    """What a revision reads and writes: [B, C], or one row of it inside a kernel."""

    revised: Any
    budget: Any
    current: Any  # written where it is part of a step
    differs: Any  # None in a step, whose predictions tell
    replace_tau: float
    remask_tau: float
    most: int  # positions of a row

    @classmethod
    def of(
        cls, out: Selected | StepResult, current: Tensor | None, differs: Tensor | None, options: Selection
    ) -> Revision | None:
        if out.budget is None:
            return None
        most = min(options.max_revisions, out.budget.shape[1])  # in 32 bits
        tensors = map(Matrix.optional, (out.revised, out.budget, current, differs))
        return cls(*tensors, options.replace_tau, options.remask_tau, most)


class Rules(NamedTuple):
    """What is selected by, where each row has its own."""

    rule: Rows | None
    tau: Rows | None

    @classmethod
    def of(cls, options: Selection) -> tuple[Rules, str, float]:
        """Those of each row, and those of all; no rule of all is ""."""
        rule, _ = Rows.split(options.rule)  # type: ignore[arg-type]
        taus, tau = Rows.split(options.tau)
        return cls(rule, taus), options.rule if rule is None else "", float(tau)


class Commit(NamedTuple):
    """The end of a decoding step. Tensors that are no matrices are [B, C] and contiguous."""

    partials: Tensor  # of the tokens, [7, B * C, S]
    token_ids: Tensor  # int64
    confidence: Tensor
    selected: Tensor
    rules: Rules | None
    tau: float
    logits: Logits | None  # None without a revision, as what follows
    bitmask: Bitmask | None
    log_prob: Tensor | None
    revision: Revision | None


@triton.jit
def _row(matrix, b):
    row = matrix
    if matrix is not None:
        row = Row(matrix.data + b * (matrix.stride_b16 >> 4), matrix.stride_n)
    return row


@triton.jit
def _row_of_revision(revision, b):
    row = revision
    if revision is not None:
        row = Revision(
            _row(revision.revised, b),
            _row(revision.budget, b),
            _row(revision.current, b),
            _row(revision.differs, b),
            revision.replace_tau,
            revision.remask_tau,
            revision.most,
        )
    return row


@triton.jit
def _load(row, at, ok, other):
    return tl.load(row.data + at.to(tl.int64) * row.stride, mask=ok, other=other)


@triton.jit
def _store(row, at, value, ok):
    tl.store(row.data + at.to(tl.int64) * row.stride, value, mask=ok)


@triton.jit
def _is_masked(marks, mask_token_id, at, ok):
    """Whether a position is marked: by the mask's token, or without one by True."""
    if mask_token_id is None:
        masked = _load(marks, at, ok, 0) != 0
    else:
        masked = _load(marks, at, ok, mask_token_id - 1) == mask_token_id
    return masked


@triton.jit
def _rule_of(rules, b):
    """The code of row b's rule, where rows have their own."""
    rule = 0
    if rules.rule is not None:
        rule = tl.load(rules.rule.data + b * rules.rule.stride)
    return rule


@triton.jit
def _tau_of(rules, tau, b):
    own = tau
    if rules.tau is not None:
        own = tl.load(rules.tau.data + b * rules.tau.stride)
    return own


@triton.jit
def _first_look(look, scores, confidence, masked, offs, rule, tau, OPTIONS: tl.constexpr):
    """Carry over one more chunk."""
    high = masked & (confidence >= tau)
    scored = masked & (scores == scores)
    by_threshold = masked if OPTIONS.fallback == "confidence" else scored  # which no score can fail
    if OPTIONS.rule == "threshold":
        candidate = by_threshold
        theta = look.theta
        top_high = tl.maximum(look.top_high, tl.max(tl.where(high, 0.0, -_INF), 0))
    else:
        candidate = scored
        theta = tl.maximum(look.theta, tl.max(tl.where(candidate & ~high, scores, -_INF), 0))
        top_high = tl.maximum(look.top_high, tl.max(tl.where(candidate & high, scores, -_INF), 0))
        if OPTIONS.rule == "":
            is_threshold = rule == _THRESHOLD
            candidate = tl.where(is_threshold, by_threshold, candidate)
            theta = tl.where(is_threshold, look.theta, theta)
            any_high = tl.maximum(look.top_high, tl.max(tl.where(high, 0.0, -_INF), 0))
            top_high = tl.where(is_threshold, any_high, top_high)
    value = scores if OPTIONS.rule == "sequential" or OPTIONS.fallback == "score" else confidence
    if OPTIONS.rule == "":
        value = tl.where(rule == _SEQUENTIAL, scores, value)
    value = tl.where(candidate & (value == value), value, -_INF)
    best = tl.max(value, 0)
    best_at = tl.min(tl.where(candidate & (value == best), offs, _NONE), 0)
    take = (best_at != _NONE) & ((best > look.best) | (look.best_at == _NONE))
    return Look(theta, top_high, tl.where(take, best, look.best), tl.where(take, best_at, look.best_at))


@triton.jit
def _second_look(look, scores, confidence, masked, offs, rule, tau, OPTIONS: tl.constexpr):
    """The selected positions of a chunk."""
    single = offs == look.best_at
    if OPTIONS.rule == "sequential":
        selected = single
    else:
        passing = masked & (confidence >= tau)
        if OPTIONS.rule == "parallel":
            passing = passing & (scores > look.theta)
        if OPTIONS.rule == "":
            passing = passing & tl.where(rule == _THRESHOLD, passing, scores > look.theta)
        selected = tl.where(look.top_high > look.theta, passing, single)
        if OPTIONS.rule == "":
            selected = tl.where(rule == _SEQUENTIAL, single, selected)
    return selected


@triton.jit
def _verdicts(revision, confidence, masked, current, differs, offs, ok):
    """What becomes of the tokens of a chunk if they are among the first."""
    may_change = ~masked & (_load(revision.budget, offs, ok, 0) > 0)
    replaces = differs & (confidence >= revision.replace_tau)
    verdict = tl.where(replaces, _REPLACED, tl.where(current < revision.remask_tau, _REMASKED, 0))
    return tl.where(may_change, verdict, 0).to(tl.uint8)


@triton.jit
def _doubted(revision, scores, at, ok, ORDER: tl.constexpr):
    """The verdicts of some positions, and what they are ranked by. Nothing is added to the product, so it is
    rounded by itself whatever the compiler may fuse."""
    verdict = _load(revision.revised, at, ok, 0)
    if ORDER == "score":
        key = _load(scores, at, ok, 0.0)
    else:
        key = 1.0 - _load(revision.current, at, ok, 0.0)
        if ORDER == "product":
            key = key * _load(scores, at, ok, 0.0)
    return verdict, tl.where(key == key, key, -_INF)


@triton.jit
def _first_verdicts(revision, scores, offs, ok, n_positions, OPTIONS: tl.constexpr):
    """The verdicts of a chunk, 0 where ``most`` others come before.

    Chunks that are done have lost verdicts of theirs. So many come before each of these that to lose them
    changes nothing.
    """
    BESIDE: tl.constexpr = min(OPTIONS.block, 16, _PAIRS // OPTIONS.block)
    verdict, key = _doubted(revision, scores, offs, ok, OPTIONS.order)
    rank = tl.zeros([OPTIONS.block], tl.int32)
    for start in range(0, n_positions, BESIDE):
        at = start + tl.arange(0, BESIDE)
        other_verdict, other = _doubted(revision, scores, at, at < n_positions, OPTIONS.order)
        before = other[None, :] > key[:, None]
        before = before | ((other[None, :] == key[:, None]) & (at[None, :] < offs[:, None]))
        rank += tl.sum((before & (other_verdict != 0)[None, :]).to(tl.int32), 1)
    return tl.where(rank < revision.most, verdict, 0).to(tl.uint8)


@triton.jit
def _select_row(
    scores,
    confidence,
    marks,
    mask_token_id,
    selected,
    tokens,
    revision,
    n_positions,
    rule,
    tau,
    OPTIONS: tl.constexpr,
):
    """Both looks at a row. ``tokens``, where given, are the row's partials and predictions; they are merged
    and written in the first look, together with their confidence, and committed in the second."""
    look = Look(-_INF, -_INF, -_INF, _NONE)
    failing = 0
    for start in range(0, n_positions, OPTIONS.block):
        offs = start + tl.arange(0, OPTIONS.block)
        ok = offs < n_positions
        if tokens is None:
            value = _load(confidence, offs, ok, 0.0)
        else:
            best = merge_partials(
                tokens.partials,
                tokens.plane,
                tokens.first + offs,
                ok,
                tokens.n_splits,
                mask_token_id,
                OPTIONS.metric,
                OPTIONS.splits,
            )
            value = confidence_of(best, OPTIONS.metric)
            tl.store(tokens.ids + offs, best.token.to(tl.int64), mask=ok)
            tl.store(confidence.data + offs, value, mask=ok)
        masked = _is_masked(marks, mask_token_id, offs, ok)
        if revision is not None:
            if tokens is None:
                current = _load(revision.current, offs, ok, 0.0)
                differs = _load(revision.differs, offs, ok, 0) != 0
            else:
                stands = _load(marks, offs, ok, 0)
                current = probability_of(
                    best, tokens.logits, tokens.bitmask, mask_token_id, tokens.b, offs, stands, ok
                )
                differs = best.token != stands
                tl.store(tokens.log_prob + tokens.first + offs, log_prob_of(best), mask=ok)
                _store(revision.current, offs, current, ok)
            verdict = _verdicts(revision, value, masked, current, differs, offs, ok)
            _store(revision.revised, offs, verdict, ok)
            failing += tl.sum((verdict != 0).to(tl.int32), 0)
        look = _first_look(look, _load(scores, offs, ok, 0.0), value, masked, offs, rule, tau, OPTIONS)
    WRITES: tl.constexpr = (tokens is not None) or (revision is not None)
    if WRITES:
        # The second look reads what other threads of this program wrote in the first.
        tl.debug_barrier()
    for start in range(0, n_positions, OPTIONS.block):
        offs = start + tl.arange(0, OPTIONS.block)
        ok = offs < n_positions
        value = _load(confidence, offs, ok, 0.0)
        masked = _is_masked(marks, mask_token_id, offs, ok)
        chosen = _second_look(look, _load(scores, offs, ok, 0.0), value, masked, offs, rule, tau, OPTIONS)
        _store(selected, offs, chosen, ok)
        if revision is not None:
            verdict = _load(revision.revised, offs, ok, 0)
            if failing > revision.most:
                verdict = _first_verdicts(revision, scores, offs, ok, n_positions, OPTIONS)
            budget = _load(revision.budget, offs, ok, 0)
        if WRITES:
            # A position may be read by several threads, and all have to read it before one writes it.
            tl.debug_barrier()
        if revision is not None:
            _store(revision.revised, offs, verdict, ok)
            _store(revision.budget, offs, budget - 1, ok & (verdict != 0))
        if tokens is not None:
            ids = tl.load(tokens.ids + offs, mask=ok, other=0)
            if revision is not None:
                ids = tl.where(verdict == _REMASKED, mask_token_id, ids)
                chosen = chosen | (verdict != 0)
            _store(marks, offs, ids, ok & chosen)


@triton.jit(do_not_specialize=["n_positions", "tau"])
def select_tokens_kernel(
    scores, confidence, masked, selected, revision, n_positions, rules, tau, OPTIONS: tl.constexpr
):
    b = tl.program_id(0).to(tl.int64)
    _select_row(
        _row(scores, b),
        _row(confidence, b),
        _row(masked, b),
        None,
        _row(selected, b),
        None,
        _row_of_revision(revision, b),
        n_positions,
        _rule_of(rules, b),
        _tau_of(rules, tau, b),
        OPTIONS,
    )


class Predictions(NamedTuple):
    """A row's tokens inside a kernel that commits."""

    partials: Any
    plane: Any
    n_splits: Any
    first: Any  # the number of the row's first position in the batch
    ids: Any
    log_prob: Any  # of all rows, as the logits
    logits: Any
    bitmask: Any
    b: Any


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
        Predictions(
            commit.partials,
            plane,
            n_splits,
            first,
            commit.token_ids + first,
            commit.log_prob,
            commit.logits,
            commit.bitmask,
            b,
        ),
        _row_of_revision(commit.revision, wide),
        n_positions,
        _rule_of(commit.rules, wide),
        _tau_of(commit.rules, commit.tau, wide),
        OPTIONS,
    )


def select_tokens(
    out: Selected,
    scores: Tensor,
    confidence: Tensor,
    masked: Tensor,
    current: Tensor | None,
    differs: Tensor | None,
    options: Selection,
) -> None:
    batch, positions = scores.shape
    if batch == 0 or positions == 0:
        return
    block = min(1024, launch.next_power_of_2(positions))
    rules, rule, tau = Rules.of(options)
    launch.launch(
        select_tokens_kernel,
        batch,
        {
            "scores": Matrix.of(scores),
            "confidence": Matrix.of(confidence),
            "masked": Matrix.of(masked),
            "selected": Matrix.of(out.selected),
            "revision": Revision.of(out, current, differs, options),
            "n_positions": positions,
            "rules": rules,
            "tau": tau,
            "OPTIONS": Options(rule, options.fallback, block, order=options.revision_order),
        },
        launch.Config(1, block, 1 if block <= 128 else 4, 1),
        device=scores.device,
    )
