"""Records of ``options`` as the arguments of torch operators, which are taken field by field."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor

from attn_sampler.checks import Span

# Fields as arguments of a torch operator, by their type.
_ARGUMENTS = {
    Tensor: "Tensor {}",
    Tensor | None: "Tensor? {}",
    slice | Span: "SymInt {0}_start, SymInt {0}_stop",
    slice | Span | None: "SymInt {0}_start, SymInt {0}_stop",
    tuple[int, int]: "SymInt {0}_left, SymInt {0}_right",
    tuple[str, int] | None: "str {0}, SymInt {0}_width",
    int: "SymInt {}",
    int | None: "SymInt? {}",
    int | Tensor | None: "SymInt {0}, Tensor? {0}_rows",
    int | Tensor: "SymInt {0}, Tensor? {0}_rows",
    float | Tensor: "float {0}, Tensor? {0}_rows",
    str | Tensor: "str {0}, Tensor? {0}_rows",
    float: "float {}",
    float | None: "float {}",
    str: "str {}",
    bool: "bool {}",
}

# Fields that are a value of all rows, or a tensor with one for each: then this stands in its place.
_OF_ROWS: dict[str, Any] = {
    **{"seed": 0, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    **{"rule": "", "tau": 0.0},
}

Record = TypeVar("Record", bound=tuple)


def schema(record: type) -> str:
    """A record's fields as the arguments of a torch operator."""
    return ", ".join(
        _ARGUMENTS[kind].format(name) if kind in _ARGUMENTS else schema(kind)
        for name, kind in record.__annotations__.items()
    )


def flat(record: tuple) -> list[Any]:
    """A checked record's fields as these arguments."""
    values: list[Any] = []
    for name, value in zip(record._fields, record, strict=True):  # type: ignore[attr-defined]
        if name in _OF_ROWS:
            values += (_OF_ROWS[name], value) if isinstance(value, Tensor) else (value, None)
        elif isinstance(value, tuple):
            values += flat(value) if hasattr(value, "_fields") else value
        else:
            values.append(value)
    return values


def unflat(record: type[Record], values: Iterator[Any]) -> Record:
    """The record of these arguments."""
    fields: list[Any] = []
    for name, kind in record.__annotations__.items():
        if kind in (slice | Span, slice | Span | None):
            fields.append(Span(next(values), next(values)))
        elif kind in (tuple[int, int], tuple[str, int] | None):
            fields.append((next(values), next(values)))
        elif name in _OF_ROWS:
            value, of_rows = next(values), next(values)
            fields.append(value if of_rows is None else of_rows)
        elif kind in _ARGUMENTS:
            fields.append(next(values))
        else:
            fields.append(unflat(kind, values))
    return record(*fields)
