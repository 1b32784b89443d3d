"""Policies that take back: what was committed too early is replaced, or masked again and predicted anew.

They read ``state.current``, the probability that the model gives to the token that stands at a position while
it sees it there. A model trained on masked positions alone was never asked for that; one trained with wrong
tokens in its input (LLaDA2.1) was. All are vectorised over the batch and wait for no device. A position is
revised ``max_edits`` times at most, which most of the papers do not say and ``generate`` needs to end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from attn_sampler import checks
from attn_sampler.capture import CapturedLayer
from attn_sampler.dependency import attention_weights
from attn_sampler.functional import decode_step, revise_tokens
from attn_sampler.policy import Decision, Policy, StepState, top_positions
from attn_sampler.reference import REMASKED, REPLACED, StepResult
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

    The three tests are those of that line of work; a threshold of 0, or of 1 for ``edit_tau`` and ``drop``,
    takes one out (all but p = 1).
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

    Commits where p >= ``tau``, at least the most confident. A token of the block fails where another is
    predicted with p >= ``edit_tau``, which replaces it, and else where its own probability p(current) is
    below ``doubt_tau``: it is masked again. Of those that fail, a step revises the first ``max_checks``, in
    descending (1 - p(current)) x the attention that the position receives. Masked again too is what leaned on
    them: tokens that were written in the same pass as one of these or later, and give all such together more
    than ``lean`` of their attention (1, never: a step is one ``decode_step`` call then, and no map is
    needed).

    After the last mask another pass checks, but only if one of the tokens just written had p < ``sure``: easy
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

    tau: float = 0.9
    edit_tau: float = 0.9
    doubt_tau: float = 0.5
    max_checks: int = 4
    sure: float = 0.98
    lean: float = 1.0
    order: str = "attention"
    shadow: bool = False
    max_edits: int = 3

    def __post_init__(self) -> None:
        for name in ("tau", "edit_tau", "doubt_tau", "sure", "lean"):
            checks.unit_interval(name, getattr(self, name))
        checks.integer("max_checks", self.max_checks, 1)
        checks.choice("order", self.order, ("attention", "random", "confidence"))
        checks.integer("max_edits", self.max_edits, 0)
        checks.flag("shadow", self.shadow)
        # Instead of the class's: they follow from the options.
        self.shadows = self.shadow  # type: ignore[misc]
        self.needs_map = self.lean < 1.0  # type: ignore[misc]
        self.needs_scores = self.needs_map or self.order == "attention"  # type: ignore[misc]
        self._revision: dict[str, Any] = {
            "replace_tau": self.edit_tau,
            "remask_tau": self.doubt_tau,
            "max_revisions": self.max_checks,
            "revision_order": "doubt" if self.order == "confidence" else "product",
        }

    def select(self, state: StepState) -> Decision:
        assert state.current is not None
        assert state.budget is not None
        assert state.editable is not None
        assert state.tokens is not None
        reads_scores = self.order == "attention"
        scores = state.scores if reads_scores else self._influence(state.confidence, state.seeds)
        assert scores is not None
        commit = _confident(state, self.tau)
        revised = revise_tokens(
            *(scores, state.confidence, state.masked, state.current, state.token_ids != state.tokens),
            state.budget.clone(),
            backend=state.backend,
            **self._revision,
        )
        replace, remask = revised == REPLACED, revised == REMASKED
        if self.needs_map:
            written = commit | replace
            remask = remask | (state.editable & (revised == 0) & self._leaned(state, revised > 0, written))
        return Decision(commit, replace, remask, self._unsure(commit | replace, state.confidence))

    def step(
        self,
        tokens: Tensor,
        logits: Tensor,
        attention: Tensor | Sequence[CapturedLayer] | None = None,
        *,
        seeds: Tensor,
        sequence: Tensor,
        budget: Tensor | None = None,
        recheck: Tensor | None = None,
        **options: Any,
    ) -> StepResult:
        """As ``Policy.step``; without a map in one ``decode_step`` call."""
        if self.needs_map or budget is None:
            options |= {"budget": budget, "recheck": recheck}
            return super().step(tokens, logits, attention, seeds=seeds, sequence=sequence, **options)
        if self.order != "attention":
            attention = self._influence(logits[..., 0], seeds)
        elif attention is None:
            raise ValueError("attention: expected column scores or captured layers, got None")
        scores, layers = (attention, None) if isinstance(attention, Tensor) else (None, attention)
        result = decode_step(
            tokens,
            logits,
            layers,
            scores=scores,
            rule="threshold",
            tau=self.tau,
            budget=budget,
            seed=seeds,
            **self._revision,
            **options,
        )
        if recheck is not None:
            recheck.copy_(self._unsure(result.selected | (result.revised == REPLACED), result.confidence))
        return result

    def _influence(self, like: Tensor, seeds: Tensor) -> Tensor:
        """What stands in the place of the scores of attention, float32 of the shape of ``like``."""
        if self.order == "random":
            return random_words(seeds, like.shape[1]).to(torch.float32)
        return torch.zeros_like(like, dtype=torch.float32)

    def _unsure(self, written: Tensor, confidence: Tensor) -> Tensor:
        return (written & (confidence < self.sure)).any(dim=1)

    def _leaned(self, state: StepState, failed: Tensor, written: Tensor) -> Tensor:
        """Where more than ``lean`` of the attention goes to failed tokens that are no younger."""
        age = self.kept(state, torch.zeros_like(state.token_ids))  # [B, C], the pass that wrote each token
        self.keep(state, torch.where(written, age.amax(dim=1, keepdim=True) + 1, age))
        counts = failed[:, None, :] & (age[:, None, :] <= age[:, :, None])
        return attention_weights(state).masked_fill(~counts, 0.0).sum(dim=2) > self.lean


@dataclasses.dataclass
class Rollback(Revising):
    """Commit boldly, and go back to the last sure state where a token turns out to be doubtful.

    Commits where p >= ``tau``, at least the most confident. What stands is checked in the same pass: where a
    token of the block has p(current) < ``doubt_tau``, the tokens written in or after the first pass that
    wrote one with p < ``safe_tau`` are masked again, but for those of that pass that were surer. The sequence
    commits nothing in that pass, whose predictions saw a wrong token, and at ``safe_tau`` instead of ``tau``
    in the rest of the block. After the last mask another pass checks, but only if one of the tokens just
    written had p < ``sure``.

    A wrong token makes others wrong that then agree with it: to mask the doubtful ones alone, as ``T2M``
    does, leaves those.

    Parameters
    ----------
    max_checks, order
        The most tokens of a sequence that a pass looks at (None: all), and which: those that receive the most
        ``"attention"``, those that were committed with the least ``"confidence"``, or any, at ``"random"``.
    max_edits
        How often a position may be revised.
    """

    tau: float = 0.9
    safe_tau: float = 0.99
    doubt_tau: float = 0.9
    sure: float = 0.99
    max_checks: int | None = None
    order: str = "attention"
    max_edits: int = 1

    def __post_init__(self) -> None:
        for name in ("tau", "safe_tau", "doubt_tau", "sure"):
            checks.unit_interval(name, getattr(self, name))
        if self.max_checks is not None:
            checks.integer("max_checks", self.max_checks, 1)
        checks.choice("order", self.order, ("attention", "random", "confidence"))
        checks.integer("max_edits", self.max_edits, 0)
        # Instead of the class's: it follows from the options.
        self.needs_scores = self.max_checks is not None and self.order == "attention"  # type: ignore[misc]

    def select(self, state: StepState) -> Decision:
        assert state.current is not None
        assert state.editable is not None
        # Of each token its p when it was written and the pass, from 1; and whether its sequence is careful.
        fresh = torch.zeros(*state.masked.shape, 3, device=state.masked.device)
        p, age, careful = self.kept(state, fresh).unbind(2)
        doubted = self._checked(state, p) & (state.current < self.doubt_tau)
        unsure = (age > 0) & (p < self.safe_tau)
        first = age.masked_fill(~unsure, torch.inf).amin(dim=1, keepdim=True)
        back = state.editable & ((age > first) | ((age == first) & unsure)) & doubted.any(dim=1, keepdim=True)
        rolls = back.any(dim=1, keepdim=True)
        bold, safe = _confident(state, self.tau), _confident(state, self.safe_tau)
        commit = torch.where(careful > 0, safe, bold) & ~rolls
        age = torch.where(commit, age.amax(dim=1, keepdim=True) + 1, age.masked_fill(back, 0.0))
        p = torch.where(commit, state.confidence, p)
        self.keep(state, torch.stack([p, age, careful + rolls], dim=2))
        return Decision(commit, remask=back, recheck=(commit & (p < self.sure)).any(dim=1))

    def _checked(self, state: StepState, p: Tensor) -> Tensor:
        """The tokens that this pass looks at."""
        assert state.editable is not None
        if self.max_checks is None:
            return state.editable
        if self.order == "attention":
            assert state.scores is not None
            key = state.scores
        else:
            key = -p if self.order == "confidence" else random_words(state.seeds, p.shape[1])
        return top_positions(key, state.editable, self.max_checks)


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
register_policy("rollback", Rollback)
