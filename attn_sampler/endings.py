"""Where a text ends: at a token that says so, or where a stop string is complete."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attn_sampler import checks

GOES_ON = torch.iinfo(torch.int64).max
"""In the place of a text's last position, where it has not ended."""


class TextEnds:
    """What ends a text.

    Parameters
    ----------
    eos_token_id, stop, decode
        As in ``generate``.
    mask_token_id
        Which is no end-of-text token.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.
    """

    def __init__(
        self,
        eos_token_id: int | Sequence[int] | None,
        stop: Sequence[str],
        decode: Callable[[list[int]], str] | None,
        mask_token_id: int,
    ) -> None:
        given = () if eos_token_id is None else eos_token_id
        self.token_ids = checks.integers("eos_token_id", given if isinstance(given, Sequence) else [given], 0)
        if mask_token_id in self.token_ids:
            raise ValueError(f"eos_token_id: expected another token than mask_token_id, got {mask_token_id}")
        if isinstance(stop, str) or not isinstance(stop, Sequence):
            raise TypeError(f"stop: expected a sequence of texts, got {type(stop).__name__}")
        for text in stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop: expected texts that are not empty, got {text!r}")
        if not callable(decode) and (stop or decode is not None):
            raise TypeError(f"decode: expected a callable, which stop needs, got {type(decode).__name__}")
        self._stop, self._decode = tuple(stop), decode

    def __bool__(self) -> bool:
        return bool(self.token_ids or self._stop)

    def is_end(self, tokens: Tensor) -> Tensor:
        """Which of the tokens are end-of-text tokens, bool of their shape."""
        found = torch.zeros_like(tokens, dtype=torch.bool)
        for token_id in self.token_ids:
            found |= tokens == token_id
        return found

    def find(self, tokens: Tensor, written: Tensor) -> Tensor:
        """The position of each text's last token, int64 [B], or ``GOES_ON``.

        Parameters
        ----------
        tokens
            int64 ``[B, S]``.
        written
            Boolean ``[B, S]``: which of them were filled in. The text consists of these.
        """
        position = torch.arange(tokens.shape[1], device=tokens.device)
        last = torch.where(written & self.is_end(tokens), position, GOES_ON).amin(dim=1)
        if not self._stop:
            return last
        found = last.tolist()
        for i, (row, mine) in enumerate(zip(tokens.tolist(), written.tolist(), strict=True)):
            where = [j for j, m in enumerate(mine) if m and j <= found[i]]
            ids = [row[j] for j in where]
            if self._stopped(ids):
                count = next(n for n in range(1, len(ids) + 1) if self._stopped(ids[:n]))
                found[i] = where[count - 1]
        return last.new_tensor(found)

    def _stopped(self, ids: list[int]) -> bool:
        assert self._decode is not None
        text = self._decode(ids)
        if not isinstance(text, str):
            raise TypeError(f"decode: expected a function that returns a str, got {type(text).__name__}")
        return cut(text, self._stop) < len(text)


def cut(text: str, stop: Sequence[str]) -> int:
    """Where the first of the stop strings in the text begins, or the text's length."""
    return min((at for at in map(text.find, stop) if at >= 0), default=len(text))
