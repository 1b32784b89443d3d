"""The order in which a decoder committed its tokens: recorded, saved, drawn."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from attn_sampler import documents
from attn_sampler.documents import COUNT, OPTIONAL_NUMBER, TEXT, Kind

if TYPE_CHECKING:
    from rich.text import Text

_FORMAT = 1
_COMMIT = {
    **dict.fromkeys(("sequence", "step", "position", "token"), COUNT),
    **dict.fromkeys(("score", "confidence"), OPTIONAL_NUMBER),
}
_SHAPE = {
    "format": Kind(f"{_FORMAT}", lambda x: type(x) is int and x == _FORMAT),
    "prompt": [[COUNT]],
    "mask_token_id": COUNT,
    "policy": TEXT,
    "commits": [_COMMIT],
    "padding?": [COUNT],
}


class Commit(NamedTuple):
    """One token written."""

    sequence: int  # which sequence of the batch
    step: int  # forward passes of this sequence before it, from 0
    position: int
    token: int
    score: float  # column score; NaN where the policy reads none
    confidence: float  # in the policy's metric


@dataclasses.dataclass
class DecodeTrace:
    """Every commit of a decoding run, in order of time.

    Replaying the commits over ``prompt`` gives the tokens that ``generate`` returned. What an end-of-text
    token overwrote behind itself comes last: with the number of passes as its step, and NaN as score and
    confidence.
    """

    prompt: list[list[int]]  # [B, T], the tokens before decoding, mask_token_id where they were masked
    mask_token_id: int
    policy: str
    commits: list[Commit] = dataclasses.field(default_factory=list)
    padding: list[int] = dataclasses.field(default_factory=list)  # [B] positions at the left, or empty: none

    def steps(self, sequence: int) -> list[int | None]:
        """The (last) step that committed each position of a sequence; None for given positions."""
        steps: list[int | None] = [None] * len(self.prompt[sequence])
        for commit in self.commits:
            if commit.sequence == sequence:
                steps[commit.position] = commit.step
        return steps

    def tokens(self, sequence: int, until_step: int | None = None) -> list[int]:
        """The tokens of a sequence after the given step (default: at the end)."""
        tokens = list(self.prompt[sequence])
        for commit in self.commits:
            if commit.sequence == sequence and (until_step is None or commit.step <= until_step):
                tokens[commit.position] = commit.token
        return tokens

    def save(self, path: str | Path) -> None:
        """Write as JSON (a NaN or infinite score or confidence as null)."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data["commits"] = [
            {name: value if math.isfinite(value) else None for name, value in commit._asdict().items()}
            for commit in self.commits
        ]
        text = json.dumps({"format": _FORMAT, **data}, allow_nan=False)
        documents.write(path, text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> DecodeTrace:
        """Read what ``save`` wrote, null as NaN.

        Raises
        ------
        ValueError
            The file is no decode trace, or one of another format.
        """
        try:
            data = documents.parse_json(documents.read_text(path))
            documents.check_shape(data, _SHAPE)
            data["commits"] = [_read_commit(**commit) for commit in data["commits"]]
            trace = cls(**{name: value for name, value in data.items() if name != "format"})
            trace._check_places()
            return trace
        except ValueError as error:
            raise ValueError(f"path: {path} is not a decode trace ({error})") from error

    def _check_places(self) -> None:
        """Raise ValueError where a commit or the padding is outside the prompts."""
        lengths = [len(row) for row in self.prompt]
        if self.padding and len(self.padding) != len(lengths):
            raise ValueError(
                f"padding: expected one for each of {len(lengths)} prompts, got {len(self.padding)}"
            )
        for padding, length in zip(self.padding, lengths, strict=False):
            if padding > length:
                raise ValueError(f"padding: expected at most the {length} positions, got {padding}")
        for commit in self.commits:
            if commit.sequence >= len(lengths) or commit.position >= lengths[commit.sequence]:
                raise ValueError(f"commits: expected a position of the prompts, got {commit}")

    def render(
        self,
        sequence: int,
        symbols: Sequence[str] | Callable[[int], str],
        *,
        width: int | None = None,
        until_step: int | None = None,
    ) -> Text:
        """The sequence, without its padding, as a coloured block.

        Given tokens are dim, committed ones go from blue (first) to red (last), and those still to come are
        grey.

        Parameters
        ----------
        symbols
            What to print for each token id: a table, or a function such as a tokenizer's ``decode``.
        width
            Positions a line, set apart by spaces. Default: all on one, as they are.
        until_step
            Draw the state after this step. Default: the end.
        """
        from rich.text import Text

        symbol = symbols if callable(symbols) else symbols.__getitem__
        steps = self.steps(sequence)
        last = max((s for s in steps if s is not None), default=0)
        tokens = self.tokens(sequence, until_step)
        start = self.padding[sequence] if self.padding else 0
        text = Text()
        for index, (token, step) in enumerate(zip(tokens[start:], steps[start:], strict=True)):
            if width and index:
                text.append("\n" if index % width == 0 else " ")
            if step is None:
                style = "dim"
            elif until_step is not None and token == self.mask_token_id:
                style = "grey50"
            else:
                style = f"bold {step_colour(step, last)}"
            text.append(symbol(token), style=style)
        return text


def _read_commit(*, score: float | None, confidence: float | None, **place: int) -> Commit:
    undefined = math.nan
    return Commit(
        score=undefined if score is None else score,
        confidence=undefined if confidence is None else confidence,
        **place,
    )


def step_colour(step: int, last: int) -> str:
    """Blue for the first step through green and yellow to red for the last."""
    import colorsys

    hue = 0.62 * (1.0 - step / max(last, 1))
    red, green, blue = (round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.65, 0.95))
    return f"#{red:02x}{green:02x}{blue:02x}"
