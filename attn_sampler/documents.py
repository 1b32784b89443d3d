"""Files: read with a clear error for what they should not hold, and written whole or not at all."""

from __future__ import annotations

import json
import os
import reprlib
import secrets
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """What a plain JSON value has to be, in words and as a test."""

    what: str
    accepts: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    # Compared with the largest float, as an integer of JSON may be larger and not convert.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


ANYTHING = Kind("a value", lambda _: True)
TEXT = Kind("text", lambda x: isinstance(x, str))
COUNT = Kind("an integer >= 0", lambda x: type(x) is int and 0 <= x < 1 << 63)
NUMBER = Kind("a finite number", _is_number)
OPTIONAL_NUMBER = Kind("a finite number or null", lambda x: x is None or _is_number(x))


def read_text(path: str | Path) -> str:
    """The text of a file or a pipe: UTF-8, with or without a byte order mark.

    Raises
    ------
    OSError
        It cannot be read.
    ValueError
        It is a device or is no text.
    """
    with open(path, encoding="utf-8-sig") as file:
        mode = os.fstat(file.fileno()).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):  # some devices have no end
            raise ValueError("expected a file, got a device")
        try:
            return file.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"expected text in UTF-8: {error.reason}") from None


def parse_json(text: str) -> Any:
    """The value of a JSON document, in which no object has a key twice.

    Raises
    ------
    ValueError
        It is none, or is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shown(twice)} stands twice in an object")
    return result


def check_shape(value: Any, shape: Any, place: str = "the document") -> None:
    """Raise ValueError, naming the place, where a JSON value is not of this shape.

    A shape is a ``Kind``; ``[shape]``, a list of such values; or ``{"key": shape, "other?": shape}``, an
    object with a key that may be missing. The key ``...`` gives the shape of all other keys' values.
    """
    if isinstance(shape, Kind):
        if not shape.accepts(value):
            raise ValueError(f"{place}: expected {shape.what}, got {shown(value)}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"{place}: expected a list, got {shown(value)}")
        for index, item in enumerate(value):
            check_shape(item, shape[0], f"{place}[{index}]")
    else:
        if not isinstance(value, dict):
            raise ValueError(f"{place}: expected an object, got {shown(value)}")
        for key in shape:
            if key is not ... and not key.endswith("?") and key not in value:
                raise ValueError(f"{place}: expected the key {key!r}, which is missing")
        for key, item in value.items():
            inner = shape.get(key, shape.get(f"{key}?", shape.get(...)))
            if inner is None:
                raise ValueError(f"{place}: got the key {shown(key)}, which is not known")
            check_shape(item, inner, f"{place}[{shown(key)}]")


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


def shown(value: Any) -> str:
    """A value in a message: in one line and short, whatever it is."""
    return _SHORT.repr(value)


def write(path: str | Path, content: str | bytes) -> None:
    """Write a file: all of it, or what was there before stays. Text becomes UTF-8.

    A device or a pipe, which nothing can be put in the place of, is written to.

    Raises
    ------
    OSError
        Naming the file.
    """
    path = Path(path)
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        target = Path(os.path.realpath(path))  # what a link leads to, as the link stays
        scratch = target.with_name(f".{secrets.token_hex(8)}.part")
        try:
            with open(scratch, "xb") as file:
                file.write(data)
            if target.exists():
                shutil.copymode(target, scratch)
            os.replace(scratch, target)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
    except OSError as error:  # names the scratch file, or none
        raise OSError(error.errno, error.strerror, str(path)) from None
