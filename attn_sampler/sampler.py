"""Decoding policies: which masked positions of the block a step commits.

A policy is a small object with ``select``, which sees one step's state and answers a boolean [B, C]. All of
them are vectorised over the batch and the block and stay on the device. ``POLICIES`` names them;
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

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from attn_sampler import checks
from attn_sampler.capture import CapturedLayer
from attn_sampler.functional import column_scores, decode_step, select_tokens, token_confidence
from attn_sampler.reference import StepResult, philox


@dataclasses.dataclass
class StepState:
    """What a policy may look at. B active sequences, C positions of the block."""

    masked: Tensor  # [B, C] bool, the positions still to fill
    token_ids: Tensor  # [B, C] int64, the prediction for each
    confidence: Tensor  # [B, C] float32, in the policy's metric
    scores: Tensor | None  # [B, C] float32 column scores, where the policy asks for attention
    logits: Tensor  # [B, C, V]
    mask_token_id: int
    sequence: Tensor  # [B] int64, which sequence of the whole batch each row is
    seeds: Tensor  # [B] int64, a fresh random stream for each row in each step
    backend: str = "auto"  # what library functions called by the policy should run on
    attention_map: Tensor | None = None  # [B, C, C] float32, rows = queries, where the policy asks for it
    padding: Tensor | None = None  # [B, C] bool, with the map: positions of no sequence; None: there are none


class Policy(abc.ABC):
    """A rule that chooses the positions to commit.

    Every rule commits at least one position of each row that has a masked one, so that decoding ends.
    """

    #: The confidence that ``select`` reads: "probability", "margin" or "entropy" (negated).
    metric: ClassVar[str] = "probability"
    #: Whether ``select`` reads column scores, so that attention has to be captured.
    needs_scores: ClassVar[bool] = False
    #: Whether ``select`` reads the block's attention map; goes with ``needs_scores = True``.
    needs_map: ClassVar[bool] = False

    def reset(self) -> None:  # noqa: B027  (optional: most rules carry nothing over)
        """Forget what was carried over from earlier steps; called before each block."""

    @abc.abstractmethod
    def select(self, state: StepState) -> Tensor:
        """The positions to commit, bool [B, C]; those that are not masked are left out."""

    def step(
        self,
        tokens: Tensor,
        logits: Tensor,
        attention: Tensor | Sequence[CapturedLayer] | None = None,
        *,
        block: slice,
        mask_token_id: int,
        sequence: Tensor,
        seeds: Tensor,
        temperature: float = 0.0,
        backend: str = "auto",
        padding: Tensor | None = None,
        **score_options: Any,
    ) -> StepResult:
        """Predict, select and commit into ``tokens``, in place.

        Parameters
        ----------
        tokens
            int64 ``[B, T]``; **updated in place**.
        logits
            ``[B, C, V]``, the predictions for the C positions of ``block``.
        attention
            Column scores, float32 ``[B, C]``, or captured layers with their ``score_options``, as
            ``AttentionCapture.step_input`` gives them; the block's map, float32 ``[B, C, C]``, as
            ``AttentionCapture.attention_map`` gives it, for a policy that needs that (its column sums are
            the scores then); None for a policy that needs no attention.
        block, mask_token_id, temperature, backend
            As in ``decode_step``.
        sequence
            int64 ``[B]``, ascending: which sequence of the whole run each row is.
        seeds
            int64 ``[B]``: a fresh random stream for each row.
        padding
            Boolean ``[B, C]``, for a policy that needs the map: the block's positions that are padding.

        Returns
        -------
        StepResult
            Its ``scores`` are NaN where no attention was given.

        Raises
        ------
        TypeError, ValueError
            ``attention`` is not what the policy needs, or ``select`` answers something else than bool [B, C].
        """
        block_tokens = tokens[:, block]
        masked = block_tokens == mask_token_id
        scores = attention if isinstance(attention, Tensor) else None
        attention_map = None
        if self.needs_map:
            if scores is None:
                raise ValueError("attention: expected the block's attention map [B, C, C]")
            checks.shape("attention", scores, "[B, C, C]", (*masked.shape, masked.shape[1]))
            attention_map, scores = scores, scores.sum(dim=1)
        if scores is None:
            for q, k, softmax_lse in attention or ():
                scores = column_scores(
                    q, k, softmax_lse=softmax_lse, out=scores, backend=backend, **score_options
                )
        token_ids, confidence = token_confidence(
            logits,
            metric=self.metric,
            temperature=temperature,
            seed=seeds,
            exclude_token_id=mask_token_id,
            backend=backend,
        )
        state = StepState(
            masked,
            token_ids,
            confidence,
            scores,
            logits,
            mask_token_id,
            sequence,
            seeds,
            backend,
            attention_map,
            padding,
        )
        chosen = self.select(state)
        name = f"{type(self).__name__}.select"
        checks.tensor(name, chosen, "[B, C]", (torch.bool,), like=masked)
        checks.shape(name, chosen, "[B, C]", masked.shape)
        selected = masked & chosen
        block_tokens.copy_(torch.where(selected, token_ids, block_tokens))
        if scores is None:
            scores = torch.full_like(confidence, torch.nan)
        return StepResult(tokens, token_ids, confidence, scores, selected)


@dataclasses.dataclass
class AttnSampler(Policy):
    """Attn-Sampler (arXiv 2604.08564): commit in descending attention received.

    ``mode="parallel"`` commits by the dynamic attention threshold at confidence ``tau``; ``"sequential"`` the
    one position of the largest score. ``fallback`` is what a parallel step without a passing position
    commits by. ``threshold`` is which statistic of the unconfident positions' scores the dynamic threshold
    is: their ``"max"`` (the paper's), in one ``decode_step`` call, or their ``"mean"``, in plain PyTorch.
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

    def select(self, state: StepState) -> Tensor:
        assert state.scores is not None
        if self.threshold == "mean":
            return self._select_above_mean(state.scores, state)
        return select_tokens(
            state.scores,
            state.confidence,
            state.masked,
            policy=self.mode,
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
        return decode_step(
            tokens,
            logits,
            attention,
            policy=self.mode,
            tau=self.tau,
            fallback=self.fallback,
            seed=seeds,
            **options,
        )


@dataclasses.dataclass
class RandomOrder(Policy):
    """One uniformly random masked position a step."""

    def select(self, state: StepState) -> Tensor:
        return top_positions(_random_words(state), state.masked, 1)


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
            _random_words(state).to(state.confidence.dtype),
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


def _random_words(state: StepState) -> Tensor:
    """A uniform 32-bit word for each position, float64 [B, C], fresh in each step."""
    position = torch.arange(state.masked.shape[1], device=state.masked.device)
    # A group far above any token's keeps these words apart from those that sample tokens.
    group = torch.full_like(position, (1 << 32) - 1)
    return philox(state.seeds[:, None], group[None, :], position[None, :])[0].to(torch.float64)


def top_positions(value: Tensor, masked: Tensor, count: int) -> Tensor:
    """The ``count`` masked positions of the largest value; the lower position on ties, NaN last."""
    _, order = ranked_positions(value, masked)
    rank = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return masked & torch.zeros_like(masked).scatter(1, order, rank < count)


def ranked_positions(value: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """Values of the masked positions in descending order, and the positions; -inf behind them."""
    value = value.masked_fill(value.isnan(), torch.finfo(value.dtype).min)
    return value.masked_fill(~masked, -torch.inf).sort(dim=1, descending=True, stable=True)


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
