"""Policies that take back: what was committed too early is replaced, or masked again and predicted anew.

They read ``state.current``, the probability that the model gives to the token that stands at a position while
it sees it there. A model trained on masked positions alone was never asked for that; one trained with wrong
tokens in its input (LLaDA2.1) was. All are vectorised over the batch and wait for no device. A position is
revised ``max_edits`` times at most, which most of the papers do not say and ``generate`` needs to end.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from attn_sampler import checks
from attn_sampler.dependency import attention_weights
from attn_sampler.policy import Decision, Policy, StepState, top_positions
from attn_sampler.sampler import random_words, register_policy


class Revising(Policy):
    """A policy that takes back, and may carry a tensor over from step to step of a block."""

    revises: ClassVar[bool] = True
    _kept: tuple[Tensor, Tensor] | None = None  # sequence [B], and a row for each

    def reset(self) -> None:
        self._kept = None

    def keep(self, state: StepState, value: Tensor) -> None:
        """Carry ``value``, a row for each sequence, over to the next step."""
        self._kept = state.sequence, value

    def kept(self, state: StepState, default: Tensor) -> Tensor:
        """What was carried over; ``default`` in a block's first step."""
        if self._kept is None:
            return default
        sequence, value = self._kept
        # Rows that have finished since then are gone from the batch; the others keep their order.
        return value[torch.searchsorted(sequence, state.sequence)]


@dataclasses.dataclass
class T2T(Revising):
    """LLaDA2.1's joint threshold (arXiv 2602.08676): commit, and replace what is contradicted.

    Commits where p >= ``tau``, at least the most confident. Replaces a token of the block where another is
    predicted with p >= ``edit_tau``. Goes on after the last mask until nothing changes, replacing in at most
    ``max_steps`` more passes. The thresholds are the authors' for quality (0.5 and 0 for speed).
    """

    tau: float = 0.7
    edit_tau: float = 0.5
    max_steps: int = 16
    max_edits: int = 3

    def __post_init__(self) -> None:
        checks.unit_interval("tau", self.tau)
        checks.unit_interval("edit_tau", self.edit_tau)
        checks.integer("max_steps", self.max_steps, 0)
        checks.integer("max_edits", self.max_edits, 0)

    def select(self, state: StepState) -> Decision:
        full = ~state.masked.any(dim=1)  # [B]
        steps = self.kept(state, torch.zeros_like(state.sequence)) + full
        self.keep(state, steps)
        replace = _contradicted(state, self.edit_tau) & (steps <= self.max_steps)[:, None]
        return Decision(
            _confident(state, self.tau), replace, recheck=torch.full_like(full, self.max_steps > 0)
        )


@dataclasses.dataclass
class T2M(Revising):
    """Token to mask (arXiv 2604.18738): commit, and mask again what is doubtful.

    Commits where p >= ``tau``, at least the most confident. A token of the block is masked again where its
    probability is below ``remask_tau``, or another is predicted with p >= ``edit_tau`` (where ``T2T`` would
    replace it), or its probability fell by more than ``drop`` since the pass before; in the pass after its
    commit, since that. Goes on after the last mask until nothing changes.

    The three tests are the paper's, each of which it uses by itself; a threshold of 0, or of 1 for
    ``edit_tau`` and ``drop``, takes one out (all but p = 1).
    """

    tau: float = 0.7
    remask_tau: float = 0.3
    edit_tau: float = 0.9
    drop: float = 0.3
    max_edits: int = 3

    def __post_init__(self) -> None:
        for name in ("tau", "remask_tau", "edit_tau", "drop"):
            checks.unit_interval(name, getattr(self, name))
        checks.integer("max_edits", self.max_edits, 0)

    def select(self, state: StepState) -> Decision:
        assert state.current is not None
        commit = _confident(state, self.tau)
        fell = self.kept(state, state.current) - state.current > self.drop
        self.keep(state, torch.where(commit, state.confidence, state.current))
        remask = (state.current < self.remask_tau) | _contradicted(state, self.edit_tau) | fell
        return Decision(commit, remask=remask, recheck=torch.ones_like(commit[:, 0]))


@dataclasses.dataclass
class Saber(Revising):
    """Backtracking as in Saber (arXiv 2510.18165): of each step forward, a part back.

    Commits where p >= ``tau``, at least the most confident. Of the block's tokens whose probability is lower
    than when they were committed, those that fell most are masked again: at most ``share`` of the number
    committed in this step, rounded down, and always fewer than that.

    The paper's text was not at hand beyond its abstract. Its threshold adapts to the tokens committed
    before; this one is fixed, as in the rules that it is compared with.
    """

    tau: float = 0.7
    share: float = 0.5
    max_edits: int = 3

    def __post_init__(self) -> None:
        checks.unit_interval("tau", self.tau)
        checks.unit_interval("share", self.share)
        checks.integer("max_edits", self.max_edits, 0)

    def select(self, state: StepState) -> Decision:
        assert state.current is not None
        assert state.editable is not None
        commit = _confident(state, self.tau)
        at_commit = self.kept(state, state.current)
        self.keep(state, torch.where(commit, state.confidence, at_commit))
        fall = at_commit - state.current
        number = commit.sum(dim=1, keepdim=True)
        back = torch.minimum((self.share * number.to(torch.float64)).floor(), number - 1)
        return Decision(commit, remask=top_positions(fall, state.editable & (fall > 0.0), back))


@dataclasses.dataclass
class WINO(Revising):
    """WINO (arXiv 2507.18578): draft widely, verify where the model sees all but the token in question.

    Commits where p >= ``tau``, at least the most confident. A token of the block is masked again where its
    probability at its shadow (``caching.ShadowModel``) is below ``verify_tau``. Goes on after the last mask
    until nothing changes.
    """

    shadows: ClassVar[bool] = True

    tau: float = 0.6
    verify_tau: float = 0.9
    max_edits: int = 3

    def __post_init__(self) -> None:
        checks.unit_interval("tau", self.tau)
        checks.unit_interval("verify_tau", self.verify_tau)
        checks.integer("max_edits", self.max_edits, 0)

    def select(self, state: StepState) -> Decision:
        assert state.current is not None
        recheck = torch.ones_like(state.sequence, dtype=torch.bool)
        return Decision(_confident(state, self.tau), remask=state.current < self.verify_tau, recheck=recheck)


@dataclasses.dataclass
class AttnCheck(Revising):
    """Commit by confidence, check by attention: doubtful tokens that others lean on come first.

    Commits where p >= ``tau``, at least the most confident. A token of the block is in doubt where its
    probability p(current) is below ``doubt_tau``. In descending (1 - p(current)) x the attention that its
    position receives, the first ``max_checks`` in doubt fail: each is replaced where another token is
    predicted with p >= ``edit_tau``, else masked again. Masked again too is what leaned on them: tokens that
    were written in the same pass as a failed one or later, and give such failed ones together more than
    ``lean`` of their attention (1, never: then no map is needed).

    After the last mask another pass checks, but only if a token of the last commit had p < ``sure``: easy
    blocks pay nothing.

    Parameters
    ----------
    order
        ``"attention"``, as above; or a control, which reads none: ``"random"``, random numbers in its place,
        or ``"confidence"``, 1 - p(current) alone.
    shadow
        Whether what stands is judged at its shadow, as by ``WINO``: for models trained on masked positions
        alone.
    max_edits
        How often a position may be revised.
    """

    tau: float = 0.7
    doubt_tau: float = 0.5
    edit_tau: float = 0.9
    max_checks: int = 4
    sure: float = 0.98
    lean: float = 1.0
    order: str = "attention"
    shadow: bool = False
    max_edits: int = 3

    def __post_init__(self) -> None:
        for name in ("tau", "doubt_tau", "edit_tau", "sure", "lean"):
            checks.unit_interval(name, getattr(self, name))
        checks.integer("max_checks", self.max_checks, 1)
        checks.choice("order", self.order, ("attention", "random", "confidence"))
        checks.integer("max_edits", self.max_edits, 0)
        checks.flag("shadow", self.shadow)
        # Instead of the class's: they follow from the options.
        self.shadows = self.shadow  # type: ignore[misc]
        self.needs_map = self.lean < 1.0  # type: ignore[misc]
        self.needs_scores = self.needs_map or self.order == "attention"  # type: ignore[misc]

    def select(self, state: StepState) -> Decision:
        assert state.current is not None
        assert state.editable is not None
        commit = _confident(state, self.tau)
        doubtful = state.editable & (state.current < self.doubt_tau)
        failed = top_positions(self._key(state), doubtful, self.max_checks)
        replace = failed & _contradicted(state, self.edit_tau)
        remask = failed & ~replace
        if self.needs_map:
            remask = remask | (state.editable & ~failed & self._leaned(state, failed, commit | replace))
        recheck = (commit & (state.confidence < self.sure)).any(dim=1)
        return Decision(commit, replace, remask, recheck)

    def _key(self, state: StepState) -> Tensor:
        assert state.current is not None
        doubt = 1.0 - state.current.to(torch.float64)
        if self.order == "confidence":
            return doubt
        if self.order == "random":
            return doubt * random_words(state)
        assert state.scores is not None
        return doubt * state.scores.to(torch.float64)

    def _leaned(self, state: StepState, failed: Tensor, written: Tensor) -> Tensor:
        """Where more than ``lean`` of the attention goes to failed tokens that are no younger."""
        age = self.kept(state, torch.zeros_like(state.token_ids))  # [B, C], the pass that wrote each token
        self.keep(state, torch.where(written, age.amax(dim=1, keepdim=True) + 1, age))
        counts = failed[:, None, :] & (age[:, None, :] <= age[:, :, None])
        return attention_weights(state).masked_fill(~counts, 0.0).sum(dim=2) > self.lean


def _confident(state: StepState, tau: float) -> Tensor:
    """The masked positions with p >= tau, at least the most confident."""
    return (state.masked & (state.confidence >= tau)) | top_positions(state.confidence, state.masked, 1)


def _contradicted(state: StepState, tau: float) -> Tensor:
    """The positions where another token than the one that stands there is predicted with p >= tau."""
    return (state.token_ids != state.tokens) & (state.confidence >= tau)


register_policy("t2t", T2T)
register_policy("t2m", T2M)
register_policy("saber", Saber)
register_policy("wino", WINO)
register_policy("attn-check", AttnCheck)
