"""When each token of a decoding run was written, and how probable it was then."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_sampler.logits import log_probs
from attn_sampler.reference import REMASKED, REPLACED, StepResult


class TokenRecord:
    """The steps and, where ``count`` is not None, the log-probabilities of tokens [B, T].

    ``commit_steps``, ``log_probs``, ``top_token_ids`` and ``top_log_probs`` as ``Generation`` has them.
    """

    def __init__(self, tokens: Tensor, mask_token_id: int, count: int | None) -> None:
        self.commit_steps = torch.full_like(tokens, -1)
        self.log_probs: Tensor | None = None
        self.top_token_ids: Tensor | None = None
        self.top_log_probs: Tensor | None = None
        self._mask_token_id, self._count = mask_token_id, count
        if count is not None:
            self.log_probs = torch.full(tokens.shape, torch.nan, device=tokens.device)
            self.top_token_ids = tokens.new_full((*tokens.shape, count), -1)
            self.top_log_probs = torch.full(self.top_token_ids.shape, torch.nan, device=tokens.device)

    def add(
        self,
        result: StepResult,
        logits: Tensor,
        token_bitmask: Tensor | None,
        sequence: Tensor,
        block: slice,
        steps: Tensor,
    ) -> None:
        """What a step of some sequences [B'] did with its block, ``steps`` [B'] passes after their first."""
        written, remasked = result.selected, torch.zeros_like(result.selected)
        if result.revised is not None:
            written, remasked = written | (result.revised == REPLACED), result.revised == REMASKED
        at_step = torch.where(written, steps[:, None], self.commit_steps[sequence, block])
        self.commit_steps[sequence, block] = at_step.masked_fill(remasked, -1)
        if self.log_probs is None or self.top_token_ids is None or self.top_log_probs is None:
            return
        row, column = remasked.nonzero(as_tuple=True)
        self._forget(sequence[row], column + block.start)
        row, column = written.nonzero(as_tuple=True)
        words = token_bitmask
        if token_bitmask is not None:
            words = token_bitmask[row] if token_bitmask.dim() == 2 else token_bitmask[row, column]
        own, ids, top = log_probs(
            logits[row, column],
            result.token_ids[row, column],
            self.top_token_ids.shape[2],
            self._mask_token_id,
            words,
        )
        row, column, shown = sequence[row], column + block.start, slice(ids.shape[1])
        self.log_probs[row, column] = own
        self.top_token_ids[row, column, shown] = ids  # a vocabulary may have fewer than are asked for
        self.top_log_probs[row, column, shown] = top

    def end(self, ended: Tensor, steps: Tensor) -> None:
        """Where texts had ended, bool [B, T], something else stands since their last step [B]."""
        self.commit_steps = torch.where(ended, steps[:, None], self.commit_steps)
        self._forget(*ended.nonzero(as_tuple=True))

    def _forget(self, row: Tensor, column: Tensor) -> None:
        """The probabilities of tokens that do not stand any more."""
        if self.log_probs is None or self.top_token_ids is None or self.top_log_probs is None:
            return
        self.log_probs[row, column] = torch.nan
        self.top_token_ids[row, column] = -1
        self.top_log_probs[row, column] = torch.nan
