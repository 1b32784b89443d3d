"""The order in which a decoder committed its tokens: recorded, saved, drawn."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.text import Text


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

    ``prompt`` holds the tokens before decoding, [B, T], ``mask_token_id`` where they were masked.
    """

    prompt: list[list[int]]
    mask_token_id: int
    policy: str
    commits: list[Commit] = dataclasses.field(default_factory=list)

    def steps(self, sequence: int) -> list[int | None]:
        """The step that committed each position of a sequence; None for given positions."""
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
        """Write as JSON (a NaN score as null)."""
        data = dataclasses.asdict(self)
        data["commits"] = [
            {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in c._asdict().items()}
            for c in self.commits
        ]
        Path(path).write_text(json.dumps({"format": 1, **data}), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> DecodeTrace:
        """Read what ``save`` wrote."""
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data.pop("format", None) != 1:
            raise ValueError(f"path: {path} is not a decode trace of format 1")
        data["commits"] = [
            Commit(**{k: math.nan if v is None else v for k, v in c.items()})
            for c in data["commits"]
        ]
        return cls(**data)

    def render(
        self,
        sequence: int,
        symbols: Sequence[str] | Callable[[int], str],
        *,
        width: int | None = None,
        until_step: int | None = None,
    ) -> Text:
        """The sequence as a coloured block: given tokens plain, committed ones from blue (first) to red (last).

        Parameters
        ----------
        symbols
            What to print for each token id: a table, or a function such as a tokenizer's ``decode``.
        width
            Positions a line. Default: all on one.
        until_step
            Draw the state after this step. Default: the end.
        """
        from rich.text import Text

        symbol = symbols if callable(symbols) else symbols.__getitem__
        steps = self.steps(sequence)
        last = max((s for s in steps if s is not None), default=0)
        text = Text()
        for position, token in enumerate(self.tokens(sequence, until_step)):
            if width and position and position % width == 0:
                text.append("\n")
            step = steps[position]
            if step is None:
                style = "dim"
            elif until_step is not None and step > until_step:
                style = "grey50"
            else:
                style = f"bold {step_colour(step, last)}"
            text.append(symbol(token) + (" " if width else ""), style=style)
        return text


def step_colour(step: int, last: int) -> str:
    """Blue for the first step through green and yellow to red for the last."""
    import colorsys

    hue = 0.62 * (1.0 - step / max(last, 1))
    red, green, blue = (round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.65, 0.95))
    return f"#{red:02x}{green:02x}{blue:02x}"
