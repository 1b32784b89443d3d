"""Policies on the block's attention map: commit together what does not depend on each other.

Masked positions are the nodes of a graph whose edges come from the attention among them; a step commits
positions that do not conflict. DAWN, DAPD and CLAD forbid conflicts, ADAS only discounts them. All are
vectorised over the batch and wait for no device; where a set is built greedily, the loop has a fixed length
of C steps of elementwise work.

The map is the mean over heads and the chosen layers (the papers take the last few: ``generate(...,
layers=slice(-4, None))``), so weights are shares of a row's attention, and thresholds on them depend on the
length of the sequence: the defaults are the papers', for hundreds of tokens. Diagonals are ignored; a NaN
weight counts as 0. Only the block is seen: the papers' sinks and anchors outside it are not.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from attn_sampler import checks
from attn_sampler.policy import Policy, StepState, ranked_positions, top_positions
from attn_sampler.sampler import register_policy


class MapPolicy(Policy):
    """A policy whose ``select`` reads ``state.attention_map``."""

    needs_scores: ClassVar[bool] = True
    needs_map: ClassVar[bool] = True


@dataclasses.dataclass
class DAWN(MapPolicy):
    """DAWN (arXiv 2602.06953): confident positions, those anchored by committed ones, and an independent set.

    Columns whose mean weight over the block's rows exceeds ``tau_sink`` are sinks and dropped. Position i
    depends on j where it attends to it with at least ``tau_edge``. Committed together are (1) positions with
    p >= ``tau``; (2) those with p >= ``tau_induced`` that depend on an anchor, a filled position of the block
    whose own prediction has p >= ``tau``; (3) of the others with p >= ``tau_low`` and no edge to (1) or (2),
    in descending p, each without an edge to one taken before. Where there is none, the most confident.

    Sections 4.1 to 4.3 and Algorithm 1 of the paper; the defaults are its authors' for LLaDA-8B. Assumed: an
    anchor is confident now (as in their code), not when it was committed.
    """

    tau: float = 0.9
    tau_induced: float = 0.7
    tau_low: float = 0.75
    tau_sink: float = 0.01
    tau_edge: float = 0.07

    def __post_init__(self) -> None:
        for name in ("tau", "tau_induced", "tau_low", "tau_sink", "tau_edge"):
            checks.unit_interval(name, getattr(self, name))

    def select(self, state: StepState) -> Tensor:
        p, masked = state.confidence, state.masked
        attention = attention_weights(state, keep_diagonal=True)
        sink = attention.sum(dim=1) / _block_size(state) > self.tau_sink  # [B, C]
        attention = _without_diagonal(attention.masked_fill(sink[:, None, :], 0.0))
        depends = attention >= self.tau_edge  # [B, C, C]: row on column
        anchor = ~masked & (p >= self.tau)
        induced = (depends & anchor[:, None, :]).any(dim=2)
        first = masked & ((p >= self.tau) | (induced & (p >= self.tau_induced)))
        conflict = depends | depends.transpose(1, 2)
        candidates = masked & (p >= self.tau_low) & ~first & ~(conflict & first[:, None, :]).any(dim=2)
        selected = first | independent_set(candidates, conflict, p)
        return _or_most_confident(selected, state)


@dataclasses.dataclass
class DAPD(MapPolicy):
    """DAPD (arXiv 2603.12996): an independent set of the masked positions, by degree times confidence.

    The edge weight of two masked positions is the mean of their attention to each other. In descending
    (sum of a position's edge weights) x p, each position is taken that has no weight above a threshold with
    one taken before; the threshold rises from ``tau_min`` to ``tau_max`` as the block fills. Once less than
    ``switch_ratio`` of the block's masks are left, all positions with p > ``tau`` are taken, at least the
    most confident.

    The paper's text was not at hand: the rule and the defaults are those of the implementation that CLAD's
    authors compare with (tau_min 0.001 and tau_max 0.004 there for LLaDA-8B).
    """

    tau: float = 0.9
    tau_min: float = 0.01
    tau_max: float = 0.05
    switch_ratio: float = 0.5

    def __post_init__(self) -> None:
        for name in ("tau", "tau_min", "tau_max", "switch_ratio"):
            checks.unit_interval(name, getattr(self, name))
        self.reset()

    def reset(self) -> None:
        # Of the block's first step: sequence [B], how many positions were masked [B].
        self._first: tuple[Tensor, Tensor] | None = None

    def select(self, state: StepState) -> Tensor:
        p, masked = state.confidence, state.masked
        count = masked.sum(dim=1)
        if self._first is None:
            self._first = (state.sequence, count)
        sequence, at_first = self._first
        left = count / at_first[torch.searchsorted(sequence, state.sequence)].to(torch.float64)
        weight = attention_weights(state)
        weight = 0.5 * (weight + weight.transpose(1, 2))
        weight = weight.masked_fill(~(masked[:, :, None] & masked[:, None, :]), 0.0)
        threshold = self.tau_min + (self.tau_max - self.tau_min) * (1.0 - left)
        value = weight.sum(dim=2) * p
        independent = independent_set(masked, weight > threshold[:, None, None], value)
        confident = _or_most_confident(masked & (p > self.tau), state)
        return torch.where((left < self.switch_ratio)[:, None], confident, independent)


@dataclasses.dataclass
class CLAD(MapPolicy):
    """CLAD (arXiv 2605.29607): runs of confident positions, of which two that depend on each other wait.

    Candidates are the positions with p >= ``tau``, at least the most confident; a cluster is a run of
    adjacent ones. The link of two positions is the larger of their attention to each other; that of a
    position to a cluster its mean over the cluster; that of two clusters the largest of any position of one
    to the other, in either direction. Two clusters conflict where each is the other's strongest link (the
    left one on ties) and the link is at least each one's mean link; of only two clusters, at least
    ``tau_link`` / C. The shorter of a conflicting pair waits (the right one on ties).

    The paper's text was not at hand beyond its abstract: this is the rule of its authors' code. Added: a
    link of 0 is no conflict.
    """

    tau: float = 0.7
    tau_link: float = 1.2

    def __post_init__(self) -> None:
        checks.unit_interval("tau", self.tau)
        checks.non_negative("tau_link", self.tau_link)

    def select(self, state: StepState) -> Tensor:
        masked = state.masked
        candidate = (masked & (state.confidence >= self.tau)) | top_positions(state.confidence, masked, 1)
        begins = candidate & ~torch.nn.functional.pad(candidate, (1, 0))[:, :-1]
        cluster = (begins.cumsum(dim=1) - 1).clamp(min=0)  # [B, C], of candidates
        index = torch.arange(masked.shape[1], device=masked.device)
        member = candidate[:, None, :] & (cluster[:, None, :] == index[:, None])  # [B, cluster, C]
        size = member.sum(dim=2)
        exists = size > 0
        number = exists.sum(dim=1)[:, None]

        link = attention_weights(state)
        link = torch.maximum(link, link.transpose(1, 2))
        to_cluster = link @ member.transpose(1, 2).to(link.dtype) / size.clamp(min=1)[:, None, :]
        to_cluster = to_cluster.masked_fill(~candidate[:, :, None], 0.0)
        between = torch.zeros_like(link).scatter_reduce(
            1, cluster[:, :, None].expand_as(link), to_cluster, "amax"
        )
        between = _without_diagonal(torch.maximum(between, between.transpose(1, 2)))

        mean = between.sum(dim=2) / (number - 1).clamp(min=1)
        others = exists[:, None, :] & (index != index[:, None])
        partner = between.masked_fill(~others, -1.0).argmax(dim=2)  # the first on ties
        strongest = between.gather(2, partner[:, :, None]).squeeze(2)
        mutual = partner.gather(1, partner) == index
        strong = torch.where(
            number == 2,
            strongest >= self.tau_link / _block_size(state),
            (strongest >= mean) & (strongest >= mean.gather(1, partner)),
        )
        partner_size = size.gather(1, partner)
        waits = mutual & strong & (strongest > 0.0)
        waits &= (size < partner_size) | ((size == partner_size) & (partner < index))
        return candidate & ~waits.gather(1, cluster)


@dataclasses.dataclass
class ADAS(MapPolicy):
    """ADAS (arXiv 2606.10829): as many positions as another rule commits, chosen with an eye on each other.

    The base rule says how many: ``count``, or, where that is None, as many as have p >= ``tau`` (Fast-dLLM's
    threshold), at least one. They are chosen one at a time by the largest p less ``strength`` times the sum,
    over the positions j chosen before, of the attention to j times 1 - p[j].

    The paper's text was not at hand beyond its abstract, which says that a candidate is discounted by its
    attention to chosen, still uncertain positions, softly and greedily, and that the base rule's stopping is
    unchanged. The linear form, 1 - p as the uncertainty and ``strength`` are assumed.
    """

    tau: float = 0.9
    count: int | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        checks.unit_interval("tau", self.tau)
        checks.non_negative("strength", self.strength)
        if self.count is not None:
            checks.integer("count", self.count, 1)

    def select(self, state: StepState) -> Tensor:
        masked = state.masked
        passing = masked & (state.confidence >= self.tau)
        count = passing.sum(dim=1, keepdim=True).clamp(min=1) if self.count is None else self.count
        attention, value = attention_weights(state), state.confidence.to(torch.float64)
        doubt = 1.0 - value.nan_to_num(nan=0.0)
        selected = torch.zeros_like(masked)
        for rank in range(masked.shape[1]):
            best = top_positions(value, masked & ~selected, 1) & (rank < count)
            selected = selected | best
            discount = (attention * doubt.masked_fill(~best, 0.0)[:, None, :]).sum(dim=2)
            value = value - self.strength * discount
        return selected


@dataclasses.dataclass
class DOS(MapPolicy):
    """DOS (arXiv 2603.15340), its order: what depends most on what is known.

    The ``count`` masked positions that give the most of their attention to filled ones; the more confident
    first on ties, as in a block in which nothing is filled.

    The paper's text was not at hand beyond its abstract, which says that attention approximates the
    dependency between tokens and that unmasked ones are emphasised. Assumed: the plain sum.
    """

    count: int = 1

    def __post_init__(self) -> None:
        checks.integer("count", self.count, 1)

    def select(self, state: StepState) -> Tensor:
        mass = attention_weights(state).masked_fill(state.masked[:, None, :], 0.0).sum(dim=2)  # [B, C]
        _, order = ranked_positions(state.confidence, state.masked)
        order = order.gather(1, ranked_positions(mass.gather(1, order), state.masked.gather(1, order))[1])
        rank = torch.arange(order.shape[1], device=order.device).expand_as(order)
        return state.masked & torch.zeros_like(state.masked).scatter(1, order, rank < self.count)


@dataclasses.dataclass
class Grounded(MapPolicy):
    """Ours: confidence, less what it leans on that is itself doubtful.

    A masked position's value is p_i x (1 - sum over masked j of a_ij (1 - p_j)), its own column included: a
    prediction that was read off other blanks is as doubtful as they are. Committed are the positions of value
    >= ``tau``, at least the one of the largest; with ``tau=None``, that one. Where masked positions look at
    what is known, this is confidence; where they look at each other, as in an answer that is masked as a
    whole, the attention they give to masks counts. So the rule tells by itself which of the two it is in.
    """

    tau: float | None = 0.9

    def __post_init__(self) -> None:
        if self.tau is not None:
            checks.unit_interval("tau", self.tau)

    def select(self, state: StepState) -> Tensor:
        p, masked = state.confidence.to(torch.float64), state.masked
        doubt = (1 - p.nan_to_num(nan=0.0)) * masked
        lean = (attention_weights(state, keep_diagonal=True) * doubt[:, None, :]).sum(dim=2)
        value = (p * (1 - lean)).to(torch.float32)
        best = top_positions(value, masked, 1)
        return best if self.tau is None else best | (masked & (value >= self.tau))


def attention_weights(state: StepState, keep_diagonal: bool = False) -> Tensor:
    """The attention map [B, C, C], float64, in which sums of its weights hardly round, and without NaN."""
    assert state.attention_map is not None
    weights = state.attention_map.to(torch.float64).nan_to_num(nan=0.0)
    return weights if keep_diagonal else _without_diagonal(weights)


def _block_size(state: StepState) -> Tensor:
    """How many of the block's positions are not padding, float64 [B, 1]."""
    real = torch.ones_like(state.masked) if state.padding is None else ~state.padding
    return real.sum(dim=1, keepdim=True).to(torch.float64)


def _without_diagonal(weights: Tensor) -> Tensor:
    diagonal = torch.eye(weights.shape[1], dtype=torch.bool, device=weights.device)
    return weights.masked_fill(diagonal, 0.0)


def independent_set(
    candidates: Tensor,  # [B, C] bool
    conflict: Tensor,  # [B, C, C] bool, symmetric
    value: Tensor,  # [B, C]
) -> Tensor:
    """In descending value, each candidate that conflicts with none taken before it."""
    _, order = ranked_positions(value, candidates)
    index = order[:, :, None].expand_as(conflict)
    conflict = conflict.gather(1, index).gather(2, index.transpose(1, 2))
    free = candidates.gather(1, order)
    for rank in range(free.shape[1] - 1):
        taken = free[:, rank : rank + 1]  # settled: everything before it has had its say
        free[:, rank + 1 :] &= ~(conflict[:, rank, rank + 1 :] & taken)
    return torch.zeros_like(candidates).scatter(1, order, free)


def _or_most_confident(selected: Tensor, state: StepState) -> Tensor:
    alone = top_positions(state.confidence, state.masked, 1)
    return torch.where(selected.any(dim=1, keepdim=True), selected, alone)


register_policy("dawn", DAWN)
register_policy("dapd", DAPD)
register_policy("clad", CLAD)
register_policy("adas", ADAS)
register_policy("dos", DOS)
register_policy("grounded", Grounded)
