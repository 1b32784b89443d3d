"""The two tasks of the bundled models: 6x6 sudoku and fixed-width addition.

A task makes training sequences, makes held-out problems, and judges answers by its own rules rather than
by comparison with a stored solution, so that any valid fill counts.

**The split.** A full sequence (no blanks) is held out when the top five bits of its hash are zero, which
happens to one sequence in 32. The hash is 64-bit FNV-1a over the token ids, one byte each, followed by
one xor-shift-multiply round: ``h ^= h >> 32; h *= 0x9E3779B97F4A7C15`` (all modulo 2**64). ``sample`` with
``held_out=False`` returns no such sequence; ``problems`` returns only such sequences.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    BoolArray = NDArray[np.bool_]
    IntArray = NDArray[np.int64]

__all__ = ["Addition", "Score", "Sudoku", "Task", "is_held_out"]

HELD_OUT_ONE_IN = 32
SUDOKU_PUZZLES = Path(__file__).with_name("sudoku_heldout.txt")
SUDOKU_PUZZLES_SEED = 20
SUDOKU_PUZZLES_COUNT = 1000


def is_held_out(tokens: ArrayLike) -> BoolArray:  # [n, L] -> [n]
    """Whether each full sequence belongs to the held-out part (see the module's text for the rule)."""
    columns = np.asarray(tokens).astype(np.uint64).T
    hashed = np.full(columns.shape[1], 0xCBF29CE484222325, np.uint64)
    with np.errstate(over="ignore"):
        for column in columns:
            hashed = (hashed ^ column) * np.uint64(0x100000001B3)
        hashed ^= hashed >> np.uint64(32)
        hashed *= np.uint64(0x9E3779B97F4A7C15)
    return hashed >> np.uint64(59) == 0


@dataclasses.dataclass(frozen=True)
class Score:
    """Solved problems out of all, with Wilson's 95 % interval of the rate."""

    solved: int
    total: int

    @classmethod
    def of(cls, right: BoolArray) -> Score:  # [n]
        """Count what ``Task.check`` returned."""
        return cls(int(right.sum()), len(right))

    @property
    def rate(self) -> float:
        """Solved part, 0 to 1."""
        return self.solved / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval at 95 %."""
        z, n, p = 1.959964, self.total, self.rate
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)  # rounding would leave [0, 1]

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.solved}/{self.total} = {self.rate:.1%} (95 % interval {low:.1%} to {high:.1%})"


class Task(abc.ABC):
    """What a bundled model was trained on.

    Attributes
    ----------
    name
        The name under which ``load_task`` knows it.
    vocab_size, mask_token_id
        Number of token ids, and the id that stands for a blank (the last one).
    length
        Tokens per sequence, L.
    symbols
        What to print for each token id; the blank is a middle dot.
    grid_width
        Cells per printed line.
    cell_separator
        Printed between two cells of a line.
    """

    name: str
    vocab_size: int
    mask_token_id: int
    length: int
    symbols: tuple[str, ...]
    grid_width: int
    cell_separator: str

    def sample(self, n: int, rng: np.random.Generator, held_out: bool = False) -> tuple[IntArray, BoolArray]:
        """Draw full sequences from one side of the split.

        Parameters
        ----------
        n
            How many.
        rng
            Source of randomness.
        held_out
            Which side of the split; training code passes False.

        Returns
        -------
        tokens : int64 [n, L]
            Valid sequences without blanks.
        answer : bool [n, L]
            The positions that may be blanked in training.
        """
        tokens = np.empty((n, self.length), np.int64)
        filled = 0
        # The wanted side is 1/32 or 31/32 of all draws; a margin makes one round the usual case.
        surplus = HELD_OUT_ONE_IN * 1.25 if held_out else 1.1
        while filled < n:
            drawn = self._draw(int((n - filled) * surplus) + 8, rng)
            drawn = drawn[is_held_out(drawn) == held_out][: n - filled]
            tokens[filled : filled + len(drawn)] = drawn
            filled += len(drawn)
        return tokens, self._answer_positions(n, rng)

    @abc.abstractmethod
    def _draw(self, n: int, rng: np.random.Generator) -> IntArray:
        """Draw ``n`` valid sequences, whichever side of the split they fall on."""

    @abc.abstractmethod
    def _answer_positions(self, n: int, rng: np.random.Generator) -> BoolArray:
        """Choose for each of ``n`` training sequences the positions that may be blanked."""

    @abc.abstractmethod
    def problems(self, n: int, seed: int = 0) -> tuple[IntArray, IntArray]:
        """Make held-out problems.

        Returns
        -------
        prompt : int64 [n, L]
            Sequences with ``mask_token_id`` at the blanks.
        solution : int64 [n, L]
            A valid fill of each.
        """

    @abc.abstractmethod
    def _obeys_rules(self, tokens: IntArray) -> BoolArray:
        """Whether each full sequence is valid in itself, whatever the prompt was."""

    def check(self, tokens: ArrayLike, prompt: ArrayLike) -> BoolArray:  # [n, L], [n, L] -> [n]
        """Judge answers by the rules of the task.

        An answer is right when it keeps every given of its prompt and obeys the rules; it need not
        equal any particular solution.

        Raises
        ------
        ValueError
            If the arguments are not two arrays of the same shape [n, L].
        """
        answers, prompts = np.asarray(tokens), np.asarray(prompt)
        if answers.shape != prompts.shape or answers.ndim != 2 or answers.shape[1] != self.length:
            raise ValueError(
                f"{self.name}: tokens {answers.shape} and prompt {prompts.shape} must both be "
                f"[n, {self.length}]"
            )
        answers = answers.astype(np.int64)
        kept = ((prompts == self.mask_token_id) | (answers == prompts)).all(axis=1)
        return kept & self._obeys_rules(answers)

    def format(self, tokens_row: ArrayLike) -> str:
        """Render one sequence as text, ``grid_width`` cells to a line."""
        cells = [self.symbols[int(token)] for token in np.asarray(tokens_row)]
        starts = range(0, len(cells), self.grid_width)
        return "\n".join(self.cell_separator.join(cells[start : start + self.grid_width]) for start in starts)


def _sudoku_box(cell: int) -> int:
    row, column = divmod(cell, 6)
    return row // 2 * 2 + column // 3


_SUDOKU_BOX = tuple(_sudoku_box(cell) for cell in range(36))


def solve_sudoku(
    board: Sequence[int], limit: int = 2, shuffle: random.Random | None = None
) -> list[list[int]]:
    """Find solutions of a 6x6 board by depth-first search on the cell with the fewest candidates.

    Parameters
    ----------
    board
        36 cells, digit ids 0 to 5, -1 at blanks. The givens must not contradict each other.
    limit
        Stop after so many solutions; 2 is enough to tell whether a solution is the only one.
    shuffle
        Try the candidates of a cell in random order (for random boards), else in ascending order.
    """
    cells = list(board)
    # Bit v of used[u] says that digit v stands in unit u: rows 0-5, columns 6-11, boxes 12-17.
    used = [0] * 18
    units = [(cell // 6, 6 + cell % 6, 12 + _SUDOKU_BOX[cell]) for cell in range(36)]
    for cell, digit in enumerate(cells):
        if digit >= 0:
            for unit in units[cell]:
                used[unit] |= 1 << digit
    solutions: list[list[int]] = []

    def descend() -> None:
        target, candidates, fewest = -1, 0, 7
        for cell in range(36):
            if cells[cell] < 0:
                row, column, box = units[cell]
                free = 63 & ~(used[row] | used[column] | used[box])
                if free.bit_count() < fewest:
                    target, candidates, fewest = cell, free, free.bit_count()
                    if fewest <= 1:
                        break
        if target < 0:
            solutions.append(cells.copy())
            return
        digits = [digit for digit in range(6) if candidates >> digit & 1]
        if shuffle is not None:
            shuffle.shuffle(digits)
        for digit in digits:
            cells[target] = digit
            for unit in units[target]:
                used[unit] ^= 1 << digit
            descend()
            cells[target] = -1
            for unit in units[target]:
                used[unit] ^= 1 << digit
            if len(solutions) >= limit:
                return

    descend()
    return solutions


class Sudoku(Task):
    """6x6 sudoku with boxes of 2 rows by 3 columns; token ids 0 to 5 are the digits 1 to 6.

    Boards are drawn as random symmetries (digits renamed, bands, stacks, rows in a band and columns in a
    stack permuted) of 512 boards that a seeded search finds. The split is by board, not by symmetry
    class: there are 28,200,960 boards but only few classes, so held-out boards are symmetric to
    training ones.
    """

    name = "sudoku"
    vocab_size = 7
    mask_token_id = 6
    length = 36
    symbols = ("1", "2", "3", "4", "5", "6", "·")
    grid_width = 6
    cell_separator = " "

    def __init__(self) -> None:
        self._base_boards: IntArray | None = None

    def _bases(self) -> IntArray:  # [512, 6, 6]
        if self._base_boards is None:
            shuffle = random.Random(0)
            boards = [solve_sudoku([-1] * 36, 1, shuffle)[0] for _ in range(512)]
            self._base_boards = np.array(boards, np.int64).reshape(-1, 6, 6)
        return self._base_boards

    def _draw(self, n: int, rng: np.random.Generator) -> IntArray:
        bases = self._bases()
        board = bases[rng.integers(len(bases), size=n)]  # [n, 6, 6]
        names = rng.random((n, 6)).argsort(axis=1)
        board = np.take_along_axis(names, board.reshape(n, 36), axis=1).reshape(n, 6, 6)
        # 3 bands of 2 rows, 2 stacks of 3 columns.
        band = rng.random((n, 3, 1)).argsort(axis=1)
        rows = (band * 2 + rng.random((n, 3, 2)).argsort(axis=2)).reshape(n, 6)
        stack = rng.random((n, 2, 1)).argsort(axis=1)
        columns = (stack * 3 + rng.random((n, 2, 3)).argsort(axis=2)).reshape(n, 6)
        board = board[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
        return board.reshape(n, 36)

    def _answer_positions(self, n: int, rng: np.random.Generator) -> BoolArray:
        return np.ones((n, self.length), bool)

    def problems(self, n: int, seed: int = 0) -> tuple[IntArray, IntArray]:
        """Choose ``n`` of the 1000 packaged puzzles without repetition, in an order that ``seed`` decides.

        Every puzzle has exactly one solution, and no clue can be taken away without losing that.
        Returns ``(prompt, solution)``, both int64 [n, 36].

        Raises
        ------
        ValueError
            If ``n`` exceeds the number of packaged puzzles.
        """
        prompts, solutions = read_sudoku_puzzles(SUDOKU_PUZZLES)
        if not 0 <= n <= len(prompts):
            raise ValueError(f"sudoku: n must be 0 to {len(prompts)} (packaged puzzles), got {n}")
        rng = np.random.default_rng(seed)
        # The first half of the file comes first: it was all of it once, and figures were published of it.
        half = len(prompts) // 2
        chosen = np.concatenate([rng.permutation(half), half + rng.permutation(len(prompts) - half)])[:n]
        return prompts[chosen], solutions[chosen]

    def _obeys_rules(self, tokens: IntArray) -> BoolArray:
        rows = tokens.reshape(-1, 6, 6)
        boxes = rows.reshape(-1, 3, 2, 2, 3).swapaxes(2, 3).reshape(-1, 6, 6)
        valid = np.ones(len(rows), bool)
        for units in (rows, rows.swapaxes(1, 2), boxes):
            valid &= (np.sort(units, axis=2) == np.arange(6)).all(axis=(1, 2))
        return valid


def make_sudoku_puzzles(n: int, seed: int) -> tuple[IntArray, IntArray]:
    """Make held-out puzzles with one solution and locally minimal clues.

    From a held-out board the cells are visited once in random order, and a clue is taken away whenever
    the puzzle keeps its only solution. Puzzle ``i`` depends on ``(seed, i)`` alone. Returns `(prompt,
    solution)`, both int64 [n, 36].
    """
    sudoku = Sudoku()
    solution = np.empty((n, 36), np.int64)
    prompt = np.empty((n, 36), np.int64)
    for index in range(n):
        rng = np.random.default_rng((seed, index))
        solution[index] = sudoku.sample(1, rng, held_out=True)[0][0]
        cells = solution[index].tolist()
        for cell in rng.permutation(36).tolist():
            digit, cells[cell] = cells[cell], -1
            if len(solve_sudoku(cells)) > 1:
                cells[cell] = digit
        prompt[index] = [sudoku.mask_token_id if digit < 0 else digit for digit in cells]
    return prompt, solution


def write_sudoku_puzzles(
    path: str | Path, n: int = SUDOKU_PUZZLES_COUNT, seed: int = SUDOKU_PUZZLES_SEED
) -> None:
    """Write puzzles of ``make_sudoku_puzzles``, one ``puzzle solution`` line each, ``.`` for a blank."""
    symbols = "123456."
    with open(path, "w", encoding="ascii") as file:
        for pair in zip(*make_sudoku_puzzles(n, seed), strict=True):
            file.write(" ".join("".join(symbols[token] for token in row) for row in pair) + "\n")


def read_sudoku_puzzles(path: str | Path) -> tuple[IntArray, IntArray]:
    """Read the file that ``write_sudoku_puzzles`` wrote; returns ``(prompt, solution)``, int64 [n, 36]."""
    lines = Path(path).read_text(encoding="ascii").split("\n")
    pairs = [line.split() for line in lines if line]
    tokens = np.array([[["123456.".index(c) for c in text] for text in pair] for pair in pairs])
    return tokens[:, 0].astype(np.int64), tokens[:, 1].astype(np.int64)


class Addition(Task):
    """Addition of two numbers of ``digits`` digits: ``a + b = c``, most significant digit first.

    Token ids 0 to 9 are the digits, 10 is ``+``, 11 is ``=``. The sum has one digit more than the terms, and
    leading zeros are written. In half of the sequences seven digit pairs in ten are made to add up to
    nine, which lets a carry run far.

    In training the sum alone may be blanked in half of the sequences, any digit in a quarter, and one
    of the two terms in a quarter, so that the model also fills in what is missing on the left.
    """

    name = "addition"
    vocab_size = 13
    mask_token_id = 12
    symbols = (*"0123456789+=", "·")
    cell_separator = ""

    _PLUS = 10
    _EQUALS = 11

    def __init__(self, digits: int = 8) -> None:
        if not 1 <= digits <= 17:
            raise ValueError(f"addition: digits must be 1 to 17 (int64 arithmetic), got {digits}")
        self.digits = digits
        self.length = 3 * digits + 3
        self.grid_width = self.length
        self._first = slice(0, digits)
        self._second = slice(digits + 1, 2 * digits + 1)
        self._sum = slice(2 * digits + 2, None)

    def _draw(self, n: int, rng: np.random.Generator) -> IntArray:
        first = rng.integers(10, size=(n, self.digits))
        second = rng.integers(10, size=(n, self.digits))
        has_chain = rng.random((n, 1)) < 0.5
        pair_to_nine = has_chain & (rng.random((n, self.digits)) < 0.7)
        second = np.where(pair_to_nine, 9 - first, second)
        place = 10 ** np.arange(self.digits, -1, -1, dtype=np.int64)
        total = first @ place[1:] + second @ place[1:]
        tokens = np.empty((n, self.length), np.int64)
        tokens[:, self._first] = first
        tokens[:, self.digits] = self._PLUS
        tokens[:, self._second] = second
        tokens[:, 2 * self.digits + 1] = self._EQUALS
        tokens[:, self._sum] = total[:, None] // place % 10
        return tokens

    def _answer_positions(self, n: int, rng: np.random.Generator) -> BoolArray:
        # 0-3: the sum, 4 and 5: any digit, 6: the first term, 7: the second term.
        kind = rng.integers(8, size=n)
        answer = np.zeros((n, self.length), bool)
        answer[:, self._first] = np.isin(kind, (4, 5, 6))[:, None]
        answer[:, self._second] = np.isin(kind, (4, 5, 7))[:, None]
        answer[:, self._sum] = (kind < 6)[:, None]
        return answer

    def problems(self, n: int, seed: int = 0, blank: str = "sum") -> tuple[IntArray, IntArray]:
        """Draw ``n`` held-out problems with one of the three numbers blank.

        Parameters
        ----------
        n, seed
            How many, and which.
        blank
            ``"sum"``, or ``"first"`` or ``"second"`` for a missing term (a subtraction).

        Returns
        -------
        prompt, solution : int64 [n, L]
            The problem with ``mask_token_id`` at the blanks, and its only answer.
        """
        parts = {"sum": self._sum, "first": self._first, "second": self._second}
        if blank not in parts:
            raise ValueError(f"addition: blank must be one of {', '.join(parts)}, got {blank!r}")
        solution, _ = self.sample(n, np.random.default_rng(seed), held_out=True)
        prompt = solution.copy()
        prompt[:, parts[blank]] = self.mask_token_id
        return prompt, solution

    def _obeys_rules(self, tokens: IntArray) -> BoolArray:
        place = 10 ** np.arange(self.digits, -1, -1, dtype=np.int64)
        signs_stand = (tokens[:, self.digits] == self._PLUS) & (
            tokens[:, 2 * self.digits + 1] == self._EQUALS
        )
        numbers: list[Any] = []
        all_digits = np.ones(len(tokens), bool)
        for part in (self._first, self._second, self._sum):
            digits = tokens[:, part]
            all_digits &= ((digits >= 0) & (digits <= 9)).all(axis=1)
            numbers.append(digits @ place[-digits.shape[1] :])
        first, second, total = numbers
        return signs_stand & all_digits & (first + second == total)
