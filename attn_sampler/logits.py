"""What becomes of a model's logits before tokens are predicted: guidance, a bias, suppressed tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attn_sampler import checks


class LogitEdits:
    """A bias on tokens, and tokens that are never predicted.

    Parameters
    ----------
    suppress_token_ids, logit_bias
        As in ``generate``.
    mask_token_id
        Which is never predicted in any case.

    Raises
    ------
    TypeError, ValueError
        They are of another kind, or leave no token to predict. In the first call, where the vocabulary is
        known: an id is outside it, or nothing is left of it.
    """

    def __init__(
        self, suppress_token_ids: Sequence[int], logit_bias: Mapping[int, float] | Tensor, mask_token_id: int
    ) -> None:
        self._suppressed = checks.integers("suppress_token_ids", suppress_token_ids, 0)
        self._given, self._mask_token_id = logit_bias, mask_token_id
        self._bias: Tensor | None = None  # [V] float32
        self._never: Tensor | None = None  # [V] bool
        if isinstance(logit_bias, Tensor):
            checks.tensor("logit_bias", logit_bias, "[V]", checks.FLOAT_DTYPES)
            if not (logit_bias < math.inf).all():
                raise ValueError("logit_bias: expected finite numbers or -inf, got NaN or +inf")
            self._prepare(len(logit_bias), logit_bias.device)
        elif isinstance(logit_bias, Mapping):
            for token_id, value in logit_bias.items():
                checks.integer("logit_bias", token_id, 0)
                checks.number("logit_bias", value, "a finite number or -inf", lambda x: x < math.inf)
        else:
            raise TypeError(
                f"logit_bias: expected a mapping or a tensor [V], got {type(logit_bias).__name__}"
            )

    def __call__(self, logits: Tensor) -> Tensor:
        """The logits [B, C, V] with the bias, -inf at what is suppressed; those given stay as they are."""
        if not self._suppressed and not len(self._given):
            return logits
        if self._never is None or self._never.device != logits.device or len(self._never) != logits.shape[2]:
            self._prepare(logits.shape[2], logits.device)
        assert self._never is not None
        if self._bias is not None:
            logits = logits + self._bias
        return logits.masked_fill(self._never, -math.inf)

    def _prepare(self, vocab_size: int, device: torch.device) -> None:
        for token_id in self._suppressed:
            checks.integer("suppress_token_ids", token_id, 0, vocab_size)
        if isinstance(self._given, Tensor):
            checks.shape("logit_bias", self._given, "[V]", (vocab_size,))
            bias = self._given.to(device, torch.float32)
        else:
            ids = [checks.integer("logit_bias", token_id, 0, vocab_size) for token_id in self._given]
            bias = torch.zeros(vocab_size)
            bias[ids] = torch.tensor([float(value) for value in self._given.values()])
            bias = bias.to(device)
        never = bias == -math.inf
        never[self._suppressed] = True
        left = ~never
        left[self._mask_token_id : self._mask_token_id + 1] = False
        if not left.any():
            raise ValueError(
                f"suppress_token_ids, logit_bias: expected a token that may be predicted, got none of the "
                f"{vocab_size} but the mask token"
            )
        self._bias, self._never = bias if len(self._given) else None, never


def log_probs(
    logits: Tensor, token_ids: Tensor, count: int, mask_token_id: int, token_bitmask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, float32, of tokens [K] under logits [K, V]: theirs [K], and the ``count`` most
    probable ones' ids and log-probabilities [K, count] in descending order.

    The mask token and what has no bit in the words [K, W] are absent.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    x = x.index_fill(1, torch.tensor([mask_token_id], device=x.device), -math.inf)
    if token_bitmask is not None:
        bits = (token_bitmask[..., None] >> torch.arange(32, device=x.device)) & 1
        x = x.masked_fill(bits.flatten(1)[:, : x.shape[1]] == 0, -math.inf)
    x = x.log_softmax(dim=1).to(torch.float32)
    top, ids = x.topk(min(count, x.shape[1]), dim=1)
    return x.gather(1, token_ids[:, None]).squeeze(1), ids, top


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Logits [B, C, V] of classifier-free guidance, in LLaDA's convention: a scale of 0 is none.

    In float32 at least. A token that the model gives no probability stays without.
    """
    dtype = torch.promote_types(conditional.dtype, torch.float32)
    conditional, unconditional = conditional.to(dtype), unconditional.to(dtype)
    away = unconditional + (scale + 1.0) * (conditional - unconditional)
    return torch.where(conditional == -math.inf, conditional, away)
