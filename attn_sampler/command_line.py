"""What the commands have in common: the kinds of their arguments, and how a mistake in them is told.

A mistake of the user is one line on stderr and an exit status; what is left to Python, with its traceback, is
a fault of the program.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import torch

from attn_sampler.options import check_temperature


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def guarded(run: Callable[[], int]) -> int:
    """The exit status of a command: that of ``run``, or what became of it.

    1 where a file could not be read or written or there was not enough memory, which is said in a line; 1,
    in silence, where nothing reads the output any more; 130 where the user interrupted.
    """
    try:
        try:
            if hasattr(sys.stdout, "reconfigure"):
                sys.stdout.reconfigure(errors="replace")  # a terminal without the middle dot gets "?"
            return run()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        _abandon_stdout()
    except OSError as error:
        _abandon_stdout()
        error.filename = error.filename or "standard output"
        fail(error)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        fail(error)
    except KeyboardInterrupt:
        return 130
    return 1


def fail(error: Exception) -> int:
    """Tell in a line what went wrong; the exit status 1."""
    what = "not enough memory: " if _is_out_of_memory(error) else ""
    print(f"attn-sampler: {what}{one_line(error)}", file=sys.stderr)
    return 1


def one_line(message: object) -> str:
    """A message of one line, whatever was in it."""
    return " ".join(str(message).split())


def _is_out_of_memory(error: Exception) -> bool:
    """Whether this is how Python, or torch, says that it could not allocate."""
    words = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(part in str(error) for part in words)
    )


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """As many threads of torch, until this is left."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _abandon_stdout() -> None:
    """What could not be written is not tried again when Python ends."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Kinds of arguments, for ``add_argument(type=...)``.


def number(low: float, high: float, accepted: str) -> Callable[[str], float]:
    """A number in [low, high], which ``accepted`` says in words."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {accepted}, got {text!r}")
        return value

    return convert


unit_interval = number(0.0, 1.0, "a number in [0, 1]")
non_negative = number(0.0, sys.float_info.max, "a finite number >= 0")
seconds = number(0.0, math.inf, "a number of seconds >= 0")


def temperature(text: str) -> float:
    """A temperature of sampling."""
    try:
        return check_temperature(non_negative(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("temperature: ")) from None


def top_p(text: str) -> float:
    """A share in (0, 1]."""
    value = unit_interval(text)
    if value == 0.0:
        raise argparse.ArgumentTypeError("expected a number above 0, up to 1, got 0")
    return value


def integer(low: int, high: int) -> Callable[[str], int]:
    """An integer in [low, high]."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected an integer from {low} to {high}, got {text!r}")
        return value

    return convert


positive = integer(1, 2**31)
threads = integer(1, 1024)
seed = integer(0, 2**62)


def layers(text: str) -> str | tuple[int, ...]:
    """Whose attention counts."""
    if text == "all":
        return text
    try:
        return (-1,) if text == "last" else tuple(int(index) for index in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected all, last or indices such as 0,1, got {text!r}") from None


def input_file(text: str) -> Path:
    """A file to read; whether it can be is seen when it is."""
    if not text or os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"expected a file, got {text!r}")
    return Path(text)


def output_file(text: str) -> Path:
    """A file to write, which may exist."""
    folder, is_special = os.path.dirname(text) or ".", os.path.exists(text) and not os.path.isfile(text)
    if not text or os.path.isdir(text) or not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"expected a file in a directory that exists, got {text!r}")
    if len(os.fsencode(os.path.basename(text))) > os.pathconf(folder, "PC_NAME_MAX"):
        raise argparse.ArgumentTypeError(f"expected a name that the file system takes, got {text!r}")
    if not os.access(text if is_special else folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a file that can be written, got {text!r}")
    return Path(text)


def text(given: str) -> str:
    """Text, and not bytes that are no UTF-8."""
    if any("\ud800" <= letter <= "\udfff" for letter in given):
        raise argparse.ArgumentTypeError(f"expected text in UTF-8, got {given!r}")
    return given


def check_distinct(files: Mapping[str, Path | None]) -> None:
    """Raise ValueError where two of the files, by the options that name them, are one."""
    seen: dict[str, str] = {}
    for option, path in files.items():
        if path is None or (os.path.exists(path) and not os.path.isfile(path)):  # a device takes everything
            continue
        other = seen.setdefault(os.path.realpath(path), option)
        if other != option:
            raise ValueError(f"argument {option}: expected another file than that of {other}, got {path}")
