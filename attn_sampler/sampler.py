"""Decoding policies: which masked positions of the block a step commits.

A policy is a small object with ``select``, which sees one step's state and answers a boolean [B, C], or a
``Decision`` where it takes back too, as the rules in ``revision`` do. All of them are vectorised over the
batch and the block and stay on the device. ``POLICIES`` names them;
``make_policy("threshold", tau=0.95)`` builds one; ``register_policy`` adds another. One of your own is a
subclass of ``Policy`` with ``select`` (and ``needs_scores = True`` where it reads the attention received;
``needs_map = True`` too where it reads the block's attention map, as the rules in ``dependency`` do)::

    class AboveMean(Policy):
        needs_scores = True

        def select(self, state: StepState) -> Tensor:
            best = top_positions(state.scores, state.masked, 1)  # one at least, so that decoding ends
            return best | (state.masked & (state.scores > state.scores.mean(dim=1, keepdim=True)))

``generate(model, prompts, policy=AboveMean(), ...)`` decodes by it; after ``register_policy("above-mean",
AboveMean)`` its name does, also in the ``--rule`` of ``attn_sampler.cli.main(["eval", ...])``.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from attn_sampler import checks
from attn_sampler.capture import CapturedLayer
from attn_sampler.functional import decode_step, select_tokens
from attn_sampler.policy import Policy, StepState, ranked_positions, top_positions
from attn_sampler.reference import StepResult
from attn_sampler.stream import philox


@dataclasses.dataclass
class AttnSampler(Policy):
    """Attn-Sampler (arXiv 2604.08564): commit in descending attention received.

    ``mode="parallel"`` commits by the dynamic attention threshold at confidence ``tau``; ``"sequential"`` the
    one position of the largest score, whatever the rest. ``fallback`` is what a parallel step without a
    passing position commits by. ``threshold`` is which statistic of the unconfident positions' scores the
    dynamic threshold is: their ``"max"`` (the paper's), in one ``decode_step`` call, or their ``"mean"``, in
    plain PyTorch.
    """

    needs_scores: ClassVar[bool] = True

    mode: str = "parallel"
    tau: float = 0.9
    fallback: str = "confidence"
    threshold: str = "max"

    def __post_init__(self) -> None:
        checks.choice("mode", self.mode, ("parallel", "sequential"))
        checks.unit_interval("tau", self.tau)
        checks.choice("fallback", self.fallback, ("confidence", "score"))
        checks.choice("threshold", self.threshold, ("max", "mean"))
        if self.mode == "sequential" and self.threshold == "mean":
            raise ValueError("threshold: 'mean' goes with mode='parallel': the sequential rule has none")
        if self.mode == "sequential" and (self.tau, self.fallback) != (0.9, "confidence"):
            warnings.warn("tau, fallback: the sequential rule reads neither", stacklevel=3)

    def select(self, state: StepState) -> Tensor:
        assert state.scores is not None
        if self.threshold == "mean":
            return self._select_above_mean(state.scores, state)
        return select_tokens(
            state.scores,
            state.confidence,
            state.masked,
            rule=self.mode,
            tau=self.tau,
            fallback=self.fallback,
            backend=state.backend,
        )

    def _select_above_mean(self, scores: Tensor, state: StepState) -> Tensor:
        scored = state.masked & ~scores.isnan()
        high = scored & (state.confidence >= self.tau)
        low = scored & ~high
        # Of no position: 0 / 0, which is above no score, so the threshold is dropped.
        theta = scores.to(torch.float64).masked_fill(~low, 0.0).sum(dim=1, keepdim=True) / low.sum(
            dim=1, keepdim=True
        )
        selected = high & ~(scores <= theta)
        value = state.confidence if self.fallback == "confidence" else scores
        return torch.where(selected.any(dim=1, keepdim=True), selected, top_positions(value, scored, 1))

    def step(
        self,
        tokens: Tensor,
        logits: Tensor,
        attention: Tensor | Sequence[CapturedLayer] | None = None,
        *,
        sequence: Tensor,
        seeds: Tensor,
        **options: Any,
    ) -> StepResult:
        """As ``Policy.step``, in one ``decode_step`` call."""
        if attention is None:
            raise ValueError("attention: expected column scores or captured layers, got None")
        if self.threshold == "mean":
            return super().step(tokens, logits, attention, sequence=sequence, seeds=seeds, **options)
        scores, layers = (attention, None) if isinstance(attention, Tensor) else (None, attention)
        return decode_step(
            tokens,
            logits,
            layers,
            scores=scores,
            rule=self.mode,
            tau=self.tau,
            fallback=self.fallback,
            seed=seeds,
            **options,
        )


@dataclasses.dataclass
class RandomOrder(Policy):
    """One uniformly random masked position a step."""

    def select(self, state: StepState) -> Tensor:
        return top_positions(random_words(state.seeds, state.masked.shape[1]), state.masked, 1)


@dataclasses.dataclass
class RandomScores(Policy):
    """A control for Attn-Sampler: its dynamic threshold over scores drawn at random in each step.

    What it gains over the confidence rules is the threshold's doing, and what Attn-Sampler gains over it the
    attention's.
    """

    tau: float = 0.9
    fallback: str = "confidence"

    def __post_init__(self) -> None:
        checks.unit_interval("tau", self.tau)
        checks.choice("fallback", self.fallback, ("confidence", "score"))

    def select(self, state: StepState) -> Tensor:
        return select_tokens(
            random_words(state.seeds, state.masked.shape[1]).to(state.confidence.dtype),
            state.confidence,
            state.masked,
            tau=self.tau,
            fallback=self.fallback,
            backend=state.backend,
        )


@dataclasses.dataclass
class LeftToRight(Policy):
    """The leftmost masked position."""

    def select(self, state: StepState) -> Tensor:
        return state.masked & (state.masked.cumsum(dim=1) == 1)


@dataclasses.dataclass
class Confidence(Policy):
    """The ``count`` positions of the largest top-1 probability (LLaDA's low-confidence remasking)."""

    count: int = 1

    def __post_init__(self) -> None:
        checks.integer("count", self.count, 1)

    def select(self, state: StepState) -> Tensor:
        return top_positions(state.confidence, state.masked, self.count)


@dataclasses.dataclass
class Margin(Confidence):
    """The ``count`` positions of the largest difference between the two top probabilities."""

    metric: ClassVar[str] = "margin"


@dataclasses.dataclass
class Entropy(Confidence):
    """The ``count`` positions of the lowest entropy."""

    metric: ClassVar[str] = "entropy"


@dataclasses.dataclass
class Threshold(Policy):
    """Fast-dLLM's threshold (arXiv 2505.22618): all positions with p >= tau, at least the best."""

    tau: float = 0.9

    def __post_init__(self) -> None:
        checks.unit_interval("tau", self.tau)

    def select(self, state: StepState) -> Tensor:
        passing = state.masked & (state.confidence >= self.tau)
        return passing | top_positions(state.confidence, state.masked, 1)


@dataclasses.dataclass
class Factor(Policy):
    """Fast-dLLM's factor (arXiv 2505.22618): the n-th most confident needs p >= 1 - factor / (n + 1).

    The first that falls short ends the commit; the most confident needs nothing.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        checks.non_negative("factor", self.factor)

    def select(self, state: StepState) -> Tensor:
        p, order = ranked_positions(state.confidence, state.masked)
        n = torch.arange(1, p.shape[1] + 1, device=p.device)
        return _prefix(p >= 1.0 - self.factor / (n + 1).to(torch.float64), order, state.masked)


@dataclasses.dataclass
class EBSampler(Policy):
    """EB-Sampler (arXiv 2505.24857): entropy-bounded sets.

    In ascending entropy, the largest prefix whose entropies, less the largest of them, sum to at most
    ``gamma`` (nats).
    """

    metric: ClassVar[str] = "entropy"

    gamma: float = 0.1

    def __post_init__(self) -> None:
        checks.non_negative("gamma", self.gamma)

    def select(self, state: StepState) -> Tensor:
        negated, order = ranked_positions(state.confidence, state.masked)
        # Undefined entropies stand at the end of the masked positions, and infinite ones beyond.
        defined = negated > torch.finfo(negated.dtype).min
        entropy = torch.where(defined, -negated, 0.0).to(torch.float64)
        # Ascending, so the largest of a prefix is its last: what is left is the sum before that one.
        before = torch.nn.functional.pad(entropy.cumsum(dim=1)[:, :-1], (1, 0))
        return _prefix(defined & (before <= self.gamma), order, state.masked)


@dataclasses.dataclass
class KLASS(Policy):
    """KLASS (arXiv 2511.05664): positions that are confident and whose distribution has settled.

    Commits where p >= tau and KL(this step's distribution, the step's before) < ``kl`` (nats) in each of the
    last ``history`` steps of the block; where there is no such position, the most confident one.
    """

    tau: float = 0.9
    kl: float = 0.01
    history: int = 2

    def __post_init__(self) -> None:
        checks.unit_interval("tau", self.tau)
        checks.non_negative("kl", self.kl)
        checks.integer("history", self.history, 1)
        self.reset()

    def reset(self) -> None:
        # Of the last step: sequence [B], log p [B, C, V], for how many steps it has been settled [B, C].
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def select(self, state: StepState) -> Tensor:
        logits = state.logits.to(torch.float32, copy=True)
        logits[..., state.mask_token_id] = -torch.inf
        log_p = torch.log_softmax(logits, dim=-1)
        settled = torch.zeros_like(state.masked, dtype=torch.int64)
        if self._last is not None:
            sequence, last_log_p, last_settled = self._last
            # Rows that have finished since then are gone from the batch; the others keep their order.
            still = torch.searchsorted(sequence, state.sequence)
            # p (log p - log p') is 0 where p is 0, and inf where only p' is.
            terms = (log_p.exp() * (log_p - last_log_p[still])).masked_fill(log_p == -torch.inf, 0.0)
            settled = torch.where(terms.sum(dim=-1) < self.kl, last_settled[still] + 1, 0)
        self._last = (state.sequence, log_p, settled)
        passing = state.masked & (state.confidence >= self.tau) & (settled >= self.history)
        return passing | top_positions(state.confidence, state.masked & ~passing.any(dim=1)[:, None], 1)


@dataclasses.dataclass
class PARD(Policy):
    """PARD (arXiv 2607.24306): the longest left prefix of masked positions with p >= tau, at least one."""

    tau: float = 0.9

    def __post_init__(self) -> None:
        checks.unit_interval("tau", self.tau)

    def select(self, state: StepState) -> Tensor:
        failing = state.masked & ~(state.confidence >= self.tau)
        prefix = state.masked & (failing.cumsum(dim=1) == 0)
        return prefix | (state.masked & (state.masked.cumsum(dim=1) == 1))


def random_words(seeds: Tensor, count: int) -> Tensor:
    """A uniform 32-bit word for each of C positions, float64 [B, C], fresh in each step."""
    position = torch.arange(count, device=seeds.device)
    # A group far above any token's keeps these words apart from those that sample tokens.
    group = torch.full_like(position, (1 << 32) - 1)
    return philox(seeds[:, None], group[None, :], position[None, :])[0].to(torch.float64)


def _prefix(passing: Tensor, order: Tensor, masked: Tensor) -> Tensor:
    """The positions of the longest passing prefix of ``order``, at least its first one."""
    chosen = (~passing).cumsum(dim=1) == 0
    chosen[:, :1] = True
    return masked & torch.zeros_like(masked).scatter(1, order, chosen)


#: The policies by name: a factory, or the name of another policy.
POLICIES: dict[str, Callable[..., Policy] | str] = {
    "attn": AttnSampler,
    "attn-parallel": "attn",
    "attn-sequential": lambda **options: AttnSampler(mode="sequential", **options),
    "attn-random": RandomScores,
    "random": RandomOrder,
    "left-to-right": LeftToRight,
    "confidence": Confidence,
    "margin": Margin,
    "entropy": Entropy,
    "threshold": Threshold,
    "factor": Factor,
    "eb": EBSampler,
    "klass": KLASS,
    "pard": PARD,
}


def register_policy(name: str, policy: Callable[..., Policy] | str) -> None:
    """Add a policy, or another name for one.

    Parameters
    ----------
    name
        What ``generate(policy=name)`` and the commands' ``--policy`` and ``--rule`` take, in this process.
    policy
        A class, or a function, that returns a ``Policy``; its keywords are the policy's options, and one
        called ``tau`` is what ``generate(tau=...)`` sets. Or a name that is registered already.

    Raises
    ------
    TypeError, ValueError
        The name is taken, the policy it stands for is unknown, or the names would run in a circle.
    """
    if name in POLICIES:
        raise ValueError(f"name: {name!r} is registered already")
    if isinstance(policy, str):
        _resolve(policy, {**POLICIES, name: policy})
    elif not callable(policy):
        raise TypeError(f"policy: expected a factory or a name, got {type(policy).__name__}")
    POLICIES[name] = policy


def make_policy(policy: str | Policy, **options: Any) -> Policy:
    """The policy of that name with these options; a Policy is returned as it is.

    Parameters
    ----------
    policy
        A name of ``POLICIES``, or a Policy.
    **options
        Of the policy of that name, such as ``tau``; none go with an object.

    Raises
    ------
    ValueError, TypeError
        An unknown name, a name whose aliases run in a circle, or options that the policy does not take.
    """
    if isinstance(policy, Policy):
        if options:
            raise TypeError(f"policy: options {sorted(options)} go with a name, not with an object")
        return policy
    if not isinstance(policy, str):
        given = f"the class {policy.__name__}" if isinstance(policy, type) else type(policy).__name__
        raise TypeError(f"policy: expected a name or a Policy, got {given}")
    factory = _resolve(policy, POLICIES)
    try:
        return factory(**options)
    except TypeError as error:
        raise TypeError(f"policy {policy!r}: {error}") from None


def _resolve(name: str, policies: dict[str, Callable[..., Policy] | str]) -> Callable[..., Policy]:
    seen = [name]
    while True:
        if seen[-1] not in policies:
            raise ValueError(f"policy: expected one of {', '.join(sorted(policies))}, got {seen[-1]!r}")
        target = policies[seen[-1]]
        if not isinstance(target, str):
            return target
        if target in seen:
            raise ValueError(f"policy: the names run in a circle: {' -> '.join([*seen, target])}")
        seen.append(target)
