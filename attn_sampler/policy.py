"""What a decoding policy is: it sees one step's state and answers which masked positions to commit."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from attn_sampler import checks
from attn_sampler.attention import column_scores
from attn_sampler.capture import CapturedLayer
from attn_sampler.errors import DecodingError
from attn_sampler.functional import token_confidence
from attn_sampler.reference import StepResult


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
            Column scores, float32 ``[B, C]``, or captured layers with their ``score_options``, either as
            ``AttentionCapture.step_input`` gives it; the block's map, float32 ``[B, C, C]``, as
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
        seen = (masked, token_ids, confidence, scores, logits, mask_token_id)
        chosen = self.select(StepState(*seen, sequence, seeds, backend, attention_map, padding))
        name = f"{type(self).__name__}.select"
        checks.tensor(name, chosen, "[B, C]", (torch.bool,), like=masked)
        checks.shape(name, chosen, "[B, C]", masked.shape)
        selected = masked & chosen
        block_tokens.copy_(torch.where(selected, token_ids, block_tokens))
        if scores is None:
            scores = torch.full_like(confidence, torch.nan)
        return StepResult(tokens, token_ids, confidence, scores, selected)


def top_positions(value: Tensor, masked: Tensor, count: int) -> Tensor:
    """The ``count`` masked positions of the largest value; the lower position on ties, NaN last."""
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
) -> int:
    """How many positions a step selected, after one wait for the device.

    Raises
    ------
    DecodingError
        A selected position's logits are undefined, or none is selected in a row that has masked ones, so that
        decoding would not end.
    """
    undefined = selected & confidence.isnan()
    stuck = masked.any(dim=1) & ~selected.any(dim=1)
    count, any_undefined, any_stuck = torch.stack([selected.sum(), undefined.any(), stuck.any()]).tolist()
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
