"""What a decoding policy is: it sees one step's state and answers what to commit, and what to take back."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from attn_sampler import checks
from attn_sampler.attention import column_scores
from attn_sampler.capture import CapturedLayer
from attn_sampler.errors import DecodingError
from attn_sampler.functional import token_confidence
from attn_sampler.reference import REMASKED, REPLACED, StepResult, commit_tokens


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
    # Of a policy that revises, else None:
    tokens: Tensor | None = None  # [B, C] int64, what stands there, mask_token_id where nothing does
    current: Tensor | None = None  # [B, C] float32, the probability of that, whatever the metric
    budget: Tensor | None = None  # [B, C] int32, how often each position may yet be revised
    editable: Tensor | None = None  # [B, C] bool, filled by the decoder, with budget and defined logits


class Decision(NamedTuple):
    """What a policy does in a step; bool, None stands for nowhere."""

    commit: Tensor  # [B, C]; those that are not masked are left out
    replace: Tensor | None = None  # [B, C], by the prediction; the editable ones where it is another token
    remask: Tensor | None = None  # [B, C]; the editable ones that are not replaced
    #: [B], the sequences that want one more pass where nothing is left masked, if this one filled or revised
    #: something; None: those of which something was revised.
    recheck: Tensor | None = None


class Policy(abc.ABC):
    """A rule that chooses the positions to commit and, where it ``revises``, those to replace or mask again.

    Every rule commits at least one position of each row that has a masked one, or masks one again; what it
    revises is taken from a position's budget of ``max_edits``. So decoding ends.
    """

    #: The confidence that ``select`` reads: "probability", "margin" or "entropy" (negated).
    metric: ClassVar[str] = "probability"
    #: Whether ``select`` reads column scores, so that attention has to be captured.
    needs_scores: ClassVar[bool] = False
    #: Whether ``select`` reads the block's attention map; goes with ``needs_scores = True``.
    needs_map: ClassVar[bool] = False
    #: Whether ``select`` takes back what was committed, and reads what stands where nothing is masked.
    revises: ClassVar[bool] = False
    #: Whether what stands is judged where the model sees all but that (``caching.ShadowModel``).
    shadows: ClassVar[bool] = False
    #: How often a policy that revises may do so at each position.
    max_edits: int = 3

    def reset(self) -> None:  # noqa: B027  (optional: most rules carry nothing over)
        """Forget what was carried over from earlier steps; called before each block."""

    @abc.abstractmethod
    def select(self, state: StepState) -> Tensor | Decision:
        """The positions to commit, bool [B, C]; those that are not masked are left out. Or a ``Decision``."""

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
        temperature: float | Tensor = 0.0,
        top_k: int | Tensor = 0,
        top_p: float | Tensor = 1.0,
        min_p: float | Tensor = 0.0,
        token_bitmask: Tensor | None = None,
        backend: str = "auto",
        padding: Tensor | None = None,
        budget: Tensor | None = None,
        recheck: Tensor | None = None,
        **score_options: Any,
    ) -> StepResult:
        """Predict, select, and commit, replace and mask again in ``tokens``, in place.

        Parameters
        ----------
        tokens
            int64 ``[B, T]``; **updated in place**.
        logits
            ``[B, C, V]``, the predictions for the C positions of ``block``.
        attention
            Column scores, float32 ``[B, C]``, or captured layers with their ``score_options``, either as
            ``AttentionCapture.step_input`` gives it; the block's map, float32 ``[B, C, C]``, as
            ``AttentionCapture.attention_map`` gives it, for a policy that needs that (its column sums are
            the scores then); None for a policy that needs no attention.
        block, mask_token_id, temperature, top_k, top_p, min_p, token_bitmask, backend
            As in ``decode_step``.
        sequence
            int64 ``[B]``, ascending: which sequence of the whole run each row is.
        seeds
            int64 ``[B]``: a fresh random stream for each row.
        padding
            Boolean ``[B, C]``, for a policy that needs the map: the block's positions that are padding.
        budget
            int32 ``[B, C]``, for a policy that revises: how often each position may be, 0 where the token was
            given or is padding; **updated in place**.
        recheck
            Boolean ``[B]``, for a policy that revises; **written in place**: the sequences that want one more
            pass though nothing of their block is masked.

        Returns
        -------
        StepResult
            Its ``scores`` are NaN where no attention was given. The fields from ``log_prob`` on are None
            unless the policy revises.

        Raises
        ------
        TypeError, ValueError
            ``attention`` or ``budget`` is not what the policy needs, or ``select`` answers something else
            than bool [B, C] or a ``Decision`` of such.
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
        prediction = token_confidence(
            logits,
            metric=self.metric,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seeds,
            exclude_token_id=mask_token_id,
            token_bitmask=token_bitmask,
            current_ids=block_tokens if self.revises else None,
            backend=backend,
        )
        token_ids, confidence = prediction
        seen = (masked, token_ids, confidence, scores, logits, mask_token_id)
        state = StepState(*seen, sequence, seeds, backend, attention_map, padding)
        if self.revises:
            budget = checks.tensor("budget", budget, "[B, C]", (torch.int32,), like=masked)
            checks.shape("budget", budget, "[B, C]", masked.shape)
            state.tokens, state.current, state.budget = block_tokens, prediction.current, budget
            state.editable = ~masked & (budget > 0) & ~confidence.isnan()
        decision = self._decision(state)
        selected = masked & decision.commit
        revised = None
        if budget is not None and state.editable is not None:
            nowhere = torch.zeros_like(masked)
            replace, remask = (nowhere if x is None else x & state.editable for x in decision[1:3])
            replace = replace & (token_ids != block_tokens)
            remask = remask & ~replace
            revised = (replace * REPLACED + remask * REMASKED).to(torch.uint8)
            budget -= (revised > 0).to(torch.int32)
            if recheck is not None:
                changed = (revised > 0).any(dim=1)
                recheck.copy_(changed if decision.recheck is None else decision.recheck)
        commit_tokens(block_tokens, token_ids, selected, revised, mask_token_id)
        if scores is None:
            scores = torch.full_like(confidence, torch.nan)
        result = StepResult(tokens, token_ids, confidence, scores, selected)
        if revised is None:
            return result
        return StepResult(*result[:5], prediction.log_prob, prediction.current, revised, budget)

    def _decision(self, state: StepState) -> Decision:
        """What ``select`` answers, checked."""
        answer = self.select(state)
        decision = answer if isinstance(answer, Decision) else Decision(answer)
        name = f"{type(self).__name__}.select"
        for field, value in decision._asdict().items():
            if value is None and field != "commit":
                continue
            if field != "commit" and not self.revises:
                raise ValueError(f"{name}: expected no {field} of a policy whose revises is False")
            axes, like = ("[B]", state.sequence) if field == "recheck" else ("[B, C]", state.masked)
            checks.tensor(name, value, axes, (torch.bool,), like=like)
            checks.shape(name, value, axes, like.shape)
        return decision


def top_positions(value: Tensor, masked: Tensor, count: int | Tensor) -> Tensor:
    """The ``count`` (or [B, 1]) masked positions of the largest value; the lower one on ties, NaN last."""
    _, order = ranked_positions(value, masked)
    rank = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return masked & torch.zeros_like(masked).scatter(1, order, rank < count)


def ranked_positions(value: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """Values of the masked positions in descending order, and the positions; -inf behind them."""
    value = value.masked_fill(value.isnan(), torch.finfo(value.dtype).min)
    return value.masked_fill(~masked, -torch.inf).sort(dim=1, descending=True, stable=True)


def check_progress(
    masked: Tensor,  # [B, C] bool, before or after the commit
    selected: Tensor,  # [B, C] bool
    confidence: Tensor,  # [B, C]
    scores: Tensor | None,  # [B, C], where the policy reads them
    sequence: Tensor,  # [B], what the rows are called
    start: int = 0,  # the position of the first column
    revised: Tensor | None = None,  # [B, C] uint8, where the policy revises
) -> int:
    """How many positions a step filled, less those it masked again, after one wait for the device.

    Raises
    ------
    DecodingError
        A selected position's logits are undefined, or none is selected in a row that has masked ones, so that
        decoding would not end.
    """
    remasked = torch.zeros_like(masked) if revised is None else revised == REMASKED
    masked = masked & ~remasked
    undefined = selected & confidence.isnan()
    stuck = masked.any(dim=1) & ~(selected | remasked).any(dim=1)
    count, any_undefined, any_stuck = torch.stack(
        [selected.sum() - remasked.sum(), undefined.any(), stuck.any()]
    ).tolist()
    if any_undefined:
        row, column = undefined.nonzero()[0].tolist()
        raise DecodingError(
            f"the model's logits at position {start + column} of sequence {int(sequence[row])} are undefined "
            "(NaN, +inf or all -inf), and the policy chose it"
        )
    if any_stuck:
        scored = scores is None or bool((masked & ~scores.isnan())[stuck].any())
        reason = (
            "the policy chose no masked position"
            if scored
            else "the attention scores are NaN at every masked position"
        )
        raise DecodingError(f"nothing could be committed in sequences {sequence[stuck].tolist()}: {reason}")
    return count
