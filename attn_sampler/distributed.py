"""Decoding with heads and vocabulary split over processes: tensor parallelism.

Each process (rank) holds some of the attention heads and some columns of the logits. A step sends a few
numbers for each position, in one collective, and ends with the same tokens on every rank, bit for bit:

- Column scores are sums over heads, so the ranks' partial scores add up.
- A token's confidence is a function of each shard's most probable token, its logit and its probability within
  the shard (and the shard's margin or entropy). Logits stay where they are.

The numbers are gathered, and every rank merges them alike. An all-reduce would leave the order of the
additions to the communication library: it may differ from one run, or one number of ranks, to the next, and
nothing promises that all ranks get equal bits. A gather moves bits and computes nothing.

Against one process the scores and confidences differ by rounding (they are added in another order;
confidences agree to about 1e-6), and so do the tokens where that decides a tie. Sampled tokens are the same:
noise belongs to a token's place in the whole vocabulary.

Collectives run on the current stream, as ``torch.distributed`` runs them, and nothing waits for the host, so
that a CUDA graph can hold a step with a group that it can hold (NCCL).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from attn_sampler import checks, functional, reference, stream
from attn_sampler.attention import column_scores
from attn_sampler.backends import BACKEND_CHOICES
from attn_sampler.checks import Span
from attn_sampler.functional import revise_tokens, select_tokens
from attn_sampler.options import (
    MAX_VOCAB,
    QUERY_ROWS,
    Attention,
    Masks,
    Sampling,
    Selection,
    check_layers,
    columns_of_block,
    renamed,
    token_of_row_0,
)
from attn_sampler.reference import Prediction, StepResult, masked_rows

_NO_TOKEN = float(1 << 53)  # above every token id, exact in float64
# What an Attention says beside where a block stands.
_HOW = (None, "e", False, "sequence", True, "sum", False, False)


@torch.no_grad()
def sum_scores(scores: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The column scores of all heads, from those of this rank's heads.

    Parameters
    ----------
    scores
        float32 ``[B, C]``, added up over this rank's heads and any layers.
    group
        The ranks that share the heads. Default: all.

    Returns
    -------
    Tensor
        float32 ``[B, C]``, the same bits on every rank. It is added up in float64.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, before anything is sent.
    RuntimeError
        torch.distributed is not initialised.
    """
    checks.tensor("scores", scores, "[B, C]", (torch.float32,))
    return _gather(scores.double(), group).sum(dim=0).float()


@torch.no_grad()
def token_confidence(
    logits: Tensor,  # [B, C, V of this rank]
    *,
    vocab_start: int,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    metric: str = "probability",
    temperature: float = 0.0,
    seed: int | Tensor | None = None,
    exclude_token_id: int | None = None,
    current_ids: Tensor | None = None,  # [B, C]
    backend: str = "auto",
) -> Prediction:
    """The predicted token of each position and how sure the model is of it, from a split vocabulary.

    Parameters
    ----------
    logits
        This rank's columns of the logits, in the dtypes of ``functional.token_confidence``. The ranks' shares
        may differ in size, and be empty.
    vocab_start
        The token of this rank's first column. The shares are disjoint and cover the vocabulary.
    vocab_size
        Tokens of the whole vocabulary. Columns beyond it are padding and are not read.
    group
        The ranks that share the vocabulary. Default: all.
    metric, temperature, seed, exclude_token_id, current_ids, backend
        As in ``functional.token_confidence``, the same on every rank; ids count in the whole vocabulary.

    Returns
    -------
    Prediction
        The same bits on every rank; ties, NaN and infinities as in ``functional.token_confidence``.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        Naming the argument, before anything is sent.
    RuntimeError
        torch.distributed is not initialised.

    Notes
    -----
    The logits are read twice for ``"probability"``, three times for the others, and once more where tokens
    are sampled. They are never copied.
    """
    sampling = (metric, temperature, seed, exclude_token_id)
    shard = _Shard(logits, vocab_start, vocab_size, *sampling, current_ids, backend)
    return shard.merge(_gather(torch.stack(shard.statistics()), group))


def decode_step(
    tokens: Tensor,  # [B, T]
    logits: Tensor,  # [B, C, V of this rank]
    layers: Sequence[Sequence[Tensor | None]] | None = None,
    *,
    scores: Tensor | None = None,  # [B, C]
    block: slice,
    mask_token_id: int,
    vocab_start: int,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    rule: str = "parallel",
    tau: float = 0.9,
    fallback: str = "confidence",
    budget: Tensor | None = None,  # [B, C]
    replace_tau: float = math.inf,
    remask_tau: float = 0.0,
    max_revisions: int | None = None,
    revision_order: str = "product",
    metric: str = "probability",
    temperature: float = 0.0,
    seed: int | Tensor | None = None,
    query_rows: str = "all",
    backend: str = "auto",
    policy: str | None = None,
    rows: str | None = None,
    **score_options: Any,
) -> StepResult:
    """One step of attention-guided decoding with heads and vocabulary split over ranks.

    ``functional.decode_step`` with one collective: every rank calls it with its own share and ends with the
    same tokens. Where every rank has the whole logits (most engines gather them), use ``sum_scores`` and
    ``functional.decode_step`` instead.

    Parameters
    ----------
    tokens
        int64 ``[B, T]``, the same on every rank; **updated in place**, as the budget is.
    logits, vocab_start, vocab_size, group
        As in ``token_confidence``.
    layers, scores
        This rank's heads, as ``functional.decode_step`` takes layers; or instead their scores, float32
        ``[B, C]``.
    block, mask_token_id, rule, tau, ..., query_rows, backend
        As in ``functional.decode_step``, the same on every rank; mask_token_id counts in the whole
        vocabulary.
    policy, rows
        The former names of rule and query_rows, taken, as scores in the place of layers are, for one release
        more.
    **score_options
        ``columns`` and what else ``functional.decode_step`` reads ``layers`` with.

    Returns
    -------
    StepResult
        All its fields are the same bits on every rank.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        Naming the argument, before anything is sent. ``tokens`` is untouched then. Ranks whose arguments are
        valid wait for the others.
    RuntimeError
        torch.distributed is not initialised.
    """
    if isinstance(layers, Tensor):
        warnings.warn("layers: scores are given as scores= now", DeprecationWarning, stacklevel=2)
        layers, scores = None, layers
    query_rows = renamed("query_rows", query_rows, "rows", rows)
    if budget is None and (replace_tau, remask_tau, max_revisions) != (math.inf, 0.0, None):
        raise TypeError("budget: needed for replace_tau, remask_tau and max_revisions, got None")
    checks.tensor("tokens", tokens, "[B, T]", (torch.int64,))
    checks.writable("tokens", tokens)
    place = checks.span("block", block, tokens.shape[1], "token positions (T)")
    block_tokens = tokens[:, slice(*place)]
    checks.integer("mask_token_id", mask_token_id, 0, vocab_size)
    checks.tensor("logits", logits, "[B, C, V]", checks.FLOAT_DTYPES, like=tokens)
    checks.shape("logits", logits, "[B, C, V]", (*block_tokens.shape, logits.shape[2]))
    commit = (renamed("rule", rule, "policy", policy), fallback, tau)
    selection = Selection(*commit, replace_tau, remask_tau, max_revisions, revision_order)
    selection.checked(budget, tokens, block_tokens.shape)
    current_ids = None if budget is None else block_tokens
    sampling = (metric, temperature, seed, mask_token_id)
    shard = _Shard(logits, vocab_start, vocab_size, *sampling, current_ids, backend)
    if (layers is None) == (scores is None):
        raise TypeError(f"layers, scores: expected one of them, got {'none' if scores is None else 'both'}")
    if layers is not None:
        how = {"query_rows": query_rows, "backend": backend, **score_options}
        scores = partial_scores(tokens, layers, place, mask_token_id, **how)
    partial = checks.tensor("scores", scores, "[B, C]", (torch.float32,), like=tokens)
    checks.shape("scores", partial, "[B, C]", block_tokens.shape)

    with torch.no_grad():
        gathered = _gather(torch.stack([partial.double(), *shard.statistics()]), group)
        scores = gathered[:, 0].sum(dim=0).float()
        predicted = shard.merge(gathered[:, 1:])
        (token_ids, confidence), masked = predicted, block_tokens == mask_token_id
        seen = (scores, confidence, masked)
        selected = select_tokens(*seen, rule=commit[0], tau=tau, fallback=fallback, backend=backend)
        result = StepResult(tokens, token_ids, confidence, scores, selected)
        if budget is not None:
            assert predicted.current is not None
            revised = revise_tokens(
                *(*seen, predicted.current, token_ids != block_tokens, budget),
                replace_tau=replace_tau,
                remask_tau=remask_tau,
                max_revisions=max_revisions,
                revision_order=revision_order,
                backend=backend,
            )
            result = StepResult(*result[:5], predicted.log_prob, predicted.current, revised, budget)
        reference.commit_tokens(block_tokens, token_ids, selected, result.revised, mask_token_id)
    return result


class _Shard:
    """One rank's columns of the logits: what it tells the others, and how all merge what they hear."""

    def __init__(
        self,
        logits: Tensor,
        vocab_start: int,
        vocab_size: int,
        metric: str,
        temperature: float,
        seed: int | Tensor | None,
        exclude_token_id: int | None,
        current_ids: Tensor | None,
        backend: str,
    ) -> None:
        checks.tensor("logits", logits, "[B, C, V]", checks.FLOAT_DTYPES)
        checks.integer("vocab_size", vocab_size, 1 if exclude_token_id is None else 2, MAX_VOCAB + 1)
        checks.integer("vocab_start", vocab_start, 0, vocab_size + 1)
        checks.choice("backend", backend, BACKEND_CHOICES)
        self.logits = logits[..., : vocab_size - vocab_start]
        self.start = vocab_start
        self.exclude: int | None = None  # counted in the shard
        if exclude_token_id is not None:
            checks.integer("exclude_token_id", exclude_token_id, 0, vocab_size)
            if vocab_start <= exclude_token_id < vocab_start + self.logits.shape[2]:
                self.exclude = exclude_token_id - vocab_start
        checks.optional("current_ids", current_ids, "[B, C]", logits.shape[:2], (torch.int64,), logits)
        self.current_ids, self.vocab_size = current_ids, vocab_size
        sampling = Sampling(metric, temperature, seed).of_stream(logits)
        self.metric, self.temperature = sampling.metric, temperature
        self.inverse_temperature = float(stream.inverse_temperature(torch.tensor(temperature)))
        self.seed = 0 if sampling.seed is None else sampling.seed
        self.backend = backend

    def statistics(self) -> list[Tensor]:
        """What the others need to know, float64 [B, C] each.

        The most probable token, its logit and its probability in the shard; the shard's margin or entropy,
        where that is the metric; where tokens are sampled, the shard's, its logit and its noisy logit; and,
        where they are asked for, the current tokens' logits.
        """
        if self.logits.shape[2] == (0 if self.exclude is None else 1):
            return self._nothing()
        top, p = self._confidence("probability")
        # Without a logit above -inf, the shard's probabilities are undefined, and it weighs nothing. If a NaN
        # made them undefined, they stay so.
        weightless = self._largest() == -torch.inf
        statistics = [(top + self.start).double(), self._logit(top), p.double().masked_fill(weightless, 1.0)]
        if self.metric != "probability":
            _, value = self._confidence(self.metric)
            statistics.append(value.double().masked_fill(weightless, self._certain))
        if self.temperature > 0.0:
            token, noisy = self._sample()
            statistics += [(token + self.start).double(), self._logit(token), noisy.double()]
        if self.current_ids is not None:
            ids = self.current_ids - self.start
            here = (
                (ids >= 0)
                & (ids < self.logits.shape[2])
                & (ids != (-1 if self.exclude is None else self.exclude))
            )
            statistics.append(self._logit(ids.where(here, 0)).masked_fill(~here, -torch.inf))
        return statistics

    def _nothing(self) -> list[Tensor]:
        """The statistics of a shard without tokens."""
        values = [_NO_TOKEN, -torch.inf, 1.0]
        if self.metric != "probability":
            values.append(self._certain)
        if self.temperature > 0.0:
            values += [_NO_TOKEN, -torch.inf, -torch.inf]
        values += [-torch.inf] * (self.current_ids is not None)
        zeros = torch.zeros(self.logits.shape[:2], dtype=torch.float64, device=self.logits.device)
        return [zeros + value for value in values]

    @property
    def _certain(self) -> float:
        """The metric's value where one token has all the probability."""
        return 0.0 if self.metric == "entropy" else 1.0

    def merge(self, gathered: Tensor) -> Prediction:
        """What the statistics [R, K, B, C] of all ranks say together."""
        top_ids, top, p, *rest = gathered.unbind(dim=1)
        largest = _nan_lowest(top).amax(dim=0)
        weight = torch.exp(top - largest) / p  # of a shard, in units of the largest logit's
        total = weight.sum(dim=0)
        extra = rest.pop(0) if self.metric != "probability" else None
        current = None
        if self.current_ids is not None:
            known = (self.current_ids >= 0) & (self.current_ids < self.vocab_size)
            current = torch.exp(rest.pop().amax(dim=0) - largest) / total
            current = current.masked_fill(~known, torch.nan).float()
        if self.temperature > 0.0:
            ids, logit, key = rest
            token = _first_largest(key, ids)
            logit = _of_token(logit, ids, token)
        else:
            token = _first_largest(top, top_ids)
            logit = _of_token(top, top_ids, token)
        confidence = torch.exp(logit - largest) / total
        log_prob = logit - largest - total.log()
        if self.metric == "entropy":
            assert extra is not None
            share = weight / total
            inside = (share * extra).masked_fill(share == 0.0, 0.0)
            confidence = (inside + torch.special.xlogy(share, share)).sum(dim=0)
        elif self.metric == "margin":
            assert extra is not None
            second = (p - extra) * weight / total
            other = torch.where(top_ids == token, second, torch.exp(top - largest) / total)
            confidence = confidence - other.amax(dim=0)
        return Prediction(token.long(), confidence.float(), log_prob.float(), current)

    def _confidence(self, metric: str) -> Prediction:
        return functional.token_confidence(
            self.logits, metric=metric, exclude_token_id=self.exclude, backend=self.backend
        )

    def _logit(self, ids: Tensor) -> Tensor:
        return self.logits.gather(-1, ids[..., None]).squeeze(-1).double()

    def _largest(self) -> Tensor:
        """The largest logit; NaN where there is one."""
        parts = [self.logits]
        if self.exclude is not None:
            parts = [self.logits[..., : self.exclude], self.logits[..., self.exclude + 1 :]]
        first, *others = [part.amax(dim=-1) for part in parts if part.shape[2] > 0]
        return torch.maximum(first, others[0]) if others else first

    def _sample(self) -> tuple[Tensor, Tensor]:
        """The shard's sampled token, counted in the shard, and the noisy logit that it won with."""
        ids, _ = functional.token_confidence(
            self.logits,
            temperature=self.temperature,
            seed=self.seed,
            exclude_token_id=self.exclude,
            vocab_start=self.start,
            backend=self.backend,
        )
        return ids, self._logit(ids).float() * self.inverse_temperature + self._noise(ids + self.start)

    def _noise(self, ids: Tensor) -> Tensor:
        """The noise of one token [B, C] at each position."""
        position = torch.arange(ids.shape[1], device=ids.device)[None, :]
        seeds = self.seed[:, None] if isinstance(self.seed, Tensor) else torch.full_like(ids, self.seed)
        words = torch.stack(stream.philox(seeds, ids // 4, position), dim=-1)
        return stream.gumbel(words.gather(-1, (ids % 4)[..., None]).squeeze(-1))


def _nan_lowest(x: Tensor) -> Tensor:
    return x.masked_fill(x.isnan(), -torch.inf)


def _first_largest(value: Tensor, ids: Tensor) -> Tensor:
    """Among the ranks' tokens [R, B, C], that of the largest value; the lowest on ties, NaN as -inf."""
    value = _nan_lowest(value)
    return ids.masked_fill(value != value.amax(dim=0), _NO_TOKEN).amin(dim=0)


def _of_token(value: Tensor, ids: Tensor, token: Tensor) -> Tensor:
    """The value [B, C] that belongs to the token."""
    return value.masked_fill(ids != token, 0.0).sum(dim=0)


@torch.no_grad()
def partial_scores(
    tokens: Tensor,
    layers: Sequence[Sequence[Tensor | None]],
    block: Span,
    mask_token_id: int,
    *,
    query_rows: str = "all",
    columns: slice | None = None,
    query_mask: Tensor | None = None,
    query_start: int | None = None,
    softmax_scope: str = "sequence",
    block_table: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """float32 [B, C], the column scores of this rank's heads, as ``functional.decode_step`` reads layers."""
    masks = Masks(block_table=block_table, seqlens_k=seqlens_k)
    records = check_layers(layers, tokens, softmax_scope, masks.paged)
    first = records[0]
    masks.check_keys(first.q)
    checks.choice("query_rows", query_rows, QUERY_ROWS)
    where = Attention(columns, None, query_start, *_HOW)
    place = columns_of_block(where, first, masks, block)
    where = where.placed(first, masks, place, Span(0, 0))
    if query_rows == "masked":
        row = token_of_row_0(where, first, block, tokens)
        query_mask = masked_rows(tokens, mask_token_id, slice(row, row + first.q.shape[2]), query_mask)
    scores: Tensor | None = None
    for layer in records:
        scores = column_scores(
            **layer._asdict(),
            columns=slice(*place),
            query_mask=query_mask,
            query_start=where.query_start,
            softmax_scope=softmax_scope,
            block_table=block_table,
            seqlens_k=seqlens_k,
            out=scores,
            **options,
        )
    assert scores is not None
    return scores


def _gather(numbers: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The numbers of all ranks, stacked in rank order."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("group: torch.distributed is not initialised (call init_process_group first)")
    result = numbers.new_empty((dist.get_world_size(group), *numbers.shape))
    dist.all_gather(list(result.unbind()), numbers.contiguous(), group=group)
    return result
