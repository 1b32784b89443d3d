"""The order in which a decoder committed its tokens and revised them: recorded, saved, drawn."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from attn_sampler import documents
from attn_sampler.documents import COUNT, OPTIONAL_NUMBER, TEXT, Kind
from attn_sampler.reference import REMASKED, StepResult

if TYPE_CHECKING:
    from rich.text import Text
    from torch import Tensor

_FORMAT = 3
_KINDS = ("commit", "replace", "remask")  # by the values of StepResult.revised
_COMMIT = {
    **dict.fromkeys(("sequence", "step", "position", "token"), COUNT),
    **dict.fromkeys(("score", "confidence"), OPTIONAL_NUMBER),
    "kind?": Kind(f"one of {', '.join(_KINDS)}", lambda x: x in _KINDS),  # not in format 1
}
_SHAPE = {
    "format": Kind(f"1 to {_FORMAT}", lambda x: type(x) is int and 1 <= x <= _FORMAT),
    "prompt": [[COUNT]],
    "mask_token_id": COUNT,
    "policy": TEXT,
    "commits": [_COMMIT],
    "padding?": [COUNT],
    "symbols?": {...: TEXT},  # this and the next: from format 3
    "width?": Kind("an integer >= 1 or null", lambda x: x is None or (COUNT.accepts(x) and x > 0)),
}


class Commit(NamedTuple):
    """One token written, or taken back."""

    sequence: int  # which sequence of the batch
    step: int  # forward passes of this sequence before it, from 0
    position: int
    token: int  # mask_token_id where it was masked again
    score: float  # column score; NaN where the policy reads none
    confidence: float  # in the policy's metric; of a token masked again, its probability
    kind: str = "commit"  # into a masked position; or "replace", another token; or "remask"


@dataclasses.dataclass
class DecodeTrace:
    """Every commit and revision of a decoding run, in order of time.

    Replaying the commits over ``prompt`` gives the tokens that ``generate`` returned. What an end-of-text
    token overwrote behind itself comes last: with the number of passes as its step, and NaN as score and
    confidence.
    """

    prompt: list[list[int]]  # [B, T], the tokens before decoding, mask_token_id where they were masked
    mask_token_id: int
    policy: str
    commits: list[Commit] = dataclasses.field(default_factory=list)
    padding: list[int] = dataclasses.field(default_factory=list)  # [B] positions at the left, or empty: none
    # How it is drawn, which plays no part when traces are compared:
    symbols: dict[int, str] = dataclasses.field(default_factory=dict, compare=False)  # of token ids
    width: int | None = dataclasses.field(default=None, compare=False)  # positions a line; None: running text

    def steps(self, sequence: int, until_step: int | None = None) -> list[int | None]:
        """The step that wrote the token at each position of a sequence; None for given and masked positions.

        ``until_step`` as in ``tokens``.
        """
        steps: list[int | None] = [None] * len(self.prompt[sequence])
        for commit in self._of(sequence, until_step):
            steps[commit.position] = None if commit.kind == "remask" else commit.step
        return steps

    def revised(self, sequence: int, until_step: int | None = None) -> set[int]:
        """The positions of a sequence at which a token was taken back."""
        return {commit.position for commit in self._of(sequence, until_step) if commit.kind != "commit"}

    def tokens(self, sequence: int, until_step: int | None = None) -> list[int]:
        """The tokens of a sequence after the given step (default: at the end)."""
        tokens = list(self.prompt[sequence])
        for commit in self._of(sequence, until_step):
            tokens[commit.position] = commit.token
        return tokens

    def token_ids(self) -> list[int]:
        """Every token that occurs, ascending, the mask token among them."""
        written = {commit.token for commit in self.commits}
        return sorted({self.mask_token_id, *written, *(token for row in self.prompt for token in row)})

    def name_tokens(self, symbols: Sequence[str] | Callable[[int], str | None]) -> None:
        """Keep what to print for each token that occurs, in ``symbols``, and so in the file and the pictures.

        Parameters
        ----------
        symbols
            A table, or a function of a token id. None from it leaves a token without: its id is shown.
        """
        symbol = symbols if callable(symbols) else symbols.__getitem__
        named = ((token, symbol(token)) for token in self.token_ids())
        self.symbols = {token: text for token, text in named if text is not None}

    def _of(self, sequence: int, until_step: int | None) -> Iterator[Commit]:
        for commit in self.commits:
            if commit.sequence == sequence and (until_step is None or commit.step <= until_step):
                yield commit

    def save(self, path: str | Path) -> None:
        """Write as JSON (a NaN or infinite score or confidence as null)."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data["commits"] = [
            {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in commit._asdict().items()
            }
            for commit in self.commits
        ]
        text = json.dumps({"format": _FORMAT, **data}, allow_nan=False)
        documents.write(path, text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> DecodeTrace:
        """Read what ``save`` wrote, null as NaN.

        Files of the former formats too: 1, which knows commits alone, and 2, which has no symbols.

        Raises
        ------
        ValueError
            The file is no decode trace, or one of another format.
        """
        try:
            data = documents.parse_json(documents.read_text(path))
            documents.check_shape(data, _SHAPE)
            data["commits"] = [_read_commit(**commit) for commit in data["commits"]]
            data["symbols"] = {_read_id(token): text for token, text in data.get("symbols", {}).items()}
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
        symbols: Sequence[str] | Callable[[int], str] | None = None,
        *,
        width: int | None = None,
        until_step: int | None = None,
    ) -> Text:
        """The sequence, without its padding, as a coloured block.

        Given tokens are dim, committed ones go from blue (first) to red (last), and those still to come are
        grey. Where a token was taken back, what stands there now is underlined.

        Parameters
        ----------
        symbols
            What to print for each token id: a table, or a function such as a tokenizer's ``decode``. Default:
            the trace's own, ids where it has none, and a middle dot for what is masked.
        width
            Positions a line, set apart by spaces. Default: the trace's own, or all on one, as they are.
        until_step
            Draw the state after this step. Default: the end.
        """
        from rich.text import Text

        if symbols is None:
            symbols = self._own_symbol
        symbol = symbols if callable(symbols) else symbols.__getitem__
        width = self.width if width is None else width
        last = max((s for s in self.steps(sequence) if s is not None), default=0)
        steps, tokens = self.steps(sequence, until_step), self.tokens(sequence, until_step)
        revised = self.revised(sequence, until_step)
        start = self.padding[sequence] if self.padding else 0
        text = Text()
        for index, position in enumerate(range(start, len(tokens))):
            token, step = tokens[position], steps[position]
            if width and index:
                text.append("\n" if index % width == 0 else " ")
            if step is not None:
                style = f"bold {step_colour(step, last)}"
            else:
                style = "grey50" if token == self.mask_token_id else "dim"
            if position in revised:
                style = f"underline {style}"
            text.append(symbol(token), style=style)
        return text

    def _own_symbol(self, token: int) -> str:
        return "·" if token == self.mask_token_id else self.symbols.get(token, f"⟨{token}⟩")


def step_commits(
    result: StepResult,
    sequence: Tensor,  # [B] int64
    step: Tensor,  # [B] int64, of each sequence
    block: slice,
    mask_token_id: int,
) -> list[Commit]:
    """What a step wrote and took back, sequence by sequence."""
    revised = result.selected.new_zeros(result.selected.shape) if result.revised is None else result.revised
    row, column = (result.selected | (revised > 0)).nonzero(as_tuple=True)
    kind, confidence = revised[row, column], result.confidence[row, column]
    token = result.token_ids[row, column].masked_fill(kind == REMASKED, mask_token_id)
    if result.current is not None:
        confidence = torch.where(kind == REMASKED, result.current[row, column], confidence)
    fields = (sequence[row], step[row], column + block.start, token, result.scores[row, column], confidence)
    columns = [*(field.tolist() for field in fields), [_KINDS[k] for k in kind.tolist()]]
    return [Commit(*values) for values in zip(*columns, strict=True)]


def _read_commit(*, score: float | None, confidence: float | None, **place: Any) -> Commit:
    undefined = math.nan
    return Commit(
        score=undefined if score is None else score,
        confidence=undefined if confidence is None else confidence,
        **place,
    )


def _read_id(key: str) -> int:
    """A token id, which JSON has as text where it is a key."""
    if not (key.isascii() and key.isdigit() and len(key) < 20 and key == str(int(key))):
        raise ValueError(f"symbols: expected token ids as keys, got {documents.shown(key)}")
    return int(key)


def step_colour(step: int, last: int) -> str:
    """Blue for the first step through green and yellow to red for the last."""
    import colorsys

    hue = 0.62 * (1.0 - step / max(last, 1))
    red, green, blue = (round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.65, 0.95))
    return f"#{red:02x}{green:02x}{blue:02x}"
