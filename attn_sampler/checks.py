"""What the public functions refuse, and in which words.

Every check names the argument, what was given and what is accepted, and runs before anything is
written. Shapes are checked with plain comparisons so that torch.compile can trace them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INT64_END = 1 << 63
FLOAT8 = torch.float8_e4m3fn
ATTENTION_DTYPES = (*FLOAT_DTYPES, FLOAT8)


def is_dense(value: Tensor) -> bool:
    """Whether its shape and strides say where its elements are."""
    return value.layout == torch.strided and not value.is_nested


def tensor(
    name: str,
    value: object,
    shape: str,
    dtypes: Sequence[torch.dtype],
    *,
    like: Tensor | None = None,
) -> Tensor:
    """A tensor of the rank that ``shape`` spells (as in "[B, C]"), of one of the dtypes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(value).__name__}")
    if not is_dense(value):
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise ValueError(f"{name}: expected a dense tensor {shape}, got a {layout} one")
    if value.dim() != shape.count(",") + 1:
        raise ValueError(
            f"{name}: expected a {shape.count(',') + 1}-dimensional tensor {shape}, "
            f"got shape {list(value.shape)}"
        )
    if value.dtype not in dtypes:
        accepted = ", ".join(_dtype_name(d) for d in dtypes)
        raise ValueError(f"{name}: expected dtype {accepted}, got {_dtype_name(value.dtype)}")
    if like is not None and value.device != like.device:
        raise ValueError(
            f"{name}: expected a tensor on {like.device} as the others, got one on {value.device}"
        )
    return value


def shape(name: str, value: Tensor, axes: str, expected: Sequence[int]) -> None:
    """The exact shape, whose axes are spelled as in "[B, C]"."""
    if len(value.shape) != len(expected) or any(a != b for a, b in zip(value.shape, expected, strict=True)):
        raise ValueError(f"{name}: expected shape {axes} = {list(expected)}, got {list(value.shape)}")


def size(name: str, sizes: Sequence[int], limit: int, what: str = "elements") -> None:
    """No more elements than the limit, a size of 0 counting as 1. Expanded views can have any number, so that
    the products with what is kept for each would be beyond 64 bits, or all patience."""
    if not torch.compiler.is_compiling() and math.prod(max(n, 1) for n in sizes) > limit:
        raise ValueError(f"{name}: expected at most 2^{limit.bit_length() - 1} {what}, got {list(sizes)}")


def device(name: str, value: str) -> str:
    """The name of a device that torch can use here."""
    try:
        torch.zeros(1, device=value).item()  # a value of "meta" cannot be read
    except (RuntimeError, AssertionError, ImportError) as error:  # no GPU in this build: an assertion
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{name}: expected a device that torch can use here, got {value!r} ({reason})"
        ) from None
    return value


def optional(
    name: str,
    value: Tensor | None,
    axes: str,
    expected: Sequence[int],
    dtypes: Sequence[torch.dtype],
    like: Tensor,
) -> None:
    """None, or a tensor of this shape and dtype on the same device."""
    if value is not None:
        tensor(name, value, axes, dtypes, like=like)
        shape(name, value, axes, expected)


def of_rows(name: str, value: object, batch: Sequence[int], dtype: torch.dtype, like: Tensor) -> bool:
    """Whether it is given for each row: then a tensor [B] of this dtype on the same device."""
    if not isinstance(value, Tensor):
        return False
    tensor(name, value, "[B]", (dtype,), like=like)
    shape(name, value, "[B]", batch)
    return True


def choice(name: str, value: object, accepted: Sequence[str]) -> None:
    """One of a few words."""
    if not isinstance(value, str) or value not in accepted:
        raise ValueError(f"{name}: expected one of {', '.join(accepted)}, got {_shown(value, quoted=True)}")


def flag(name: str, value: object) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {_shown(value, quoted=True)}")


class Span(NamedTuple):
    """Positions [start, stop), as a checked slice; the C API's attn_sampler_span."""

    start: int
    stop: int


def span(name: str, value: object, length: int, what: str, *, from_end: bool = False) -> Span:
    """The bounds of a non-empty slice of step 1 inside [0, length); all of it for None. ``from_end``: each
    sequence has an end of its own, from which the bounds count, -length <= start < stop <= 0."""
    lowest, highest = (-length, 0) if from_end else (0, length)
    # Asked first: torch.compile makes constants of a slice compared with None.
    if isinstance(value, (slice, Span)):
        if isinstance(value, slice) and value.step not in (None, 1):
            raise ValueError(f"{name}: expected a slice of step 1, got step {_shown(value.step)}")
        start = lowest if value.start is None else integer(f"{name}.start", value.start)
        stop = highest if value.stop is None else integer(f"{name}.stop", value.stop)
        if from_end:
            if stop > 0 or (value.start is not None and start >= 0):
                raise ValueError(
                    f"{name}: expected bounds counted from the end of each sequence, as in slice(-32, None), "
                    f"where the sequences have ends of their own, got {_shown(value)}"
                )
        else:
            start = start + length if start < 0 else start
            stop = stop + length if stop < 0 else stop
        if start < lowest or stop > highest:
            raise ValueError(f"{name}: {_shown(value)} reaches outside the {length} {what}")
    elif value is None:
        start, stop = lowest, highest
    else:
        raise TypeError(f"{name}: expected a slice of {what}, got {type(value).__name__}")
    if start >= stop:
        raise ValueError(
            f"{name}: expected at least one of the {length} {what}, got an empty range {_shown(value)}"
        )
    return Span(start, stop)


def unit_interval(name: str, value: object) -> float:
    """A number in [0, 1]."""
    return number(name, value, "a number in [0, 1]", lambda x: 0.0 <= x <= 1.0)


def non_negative(name: str, value: object) -> float:
    """A finite number, zero or more."""
    # The largest float, written out, as a constant elsewhere would be no constant to torch.compile.
    return number(name, value, "a finite number >= 0", lambda x: 0.0 <= x <= 1.7976931348623157e308)


def number(name: str, value: object, what: str, accepted: Callable[[float], bool]) -> float:
    """A number that is accepted, ``what`` saying which are."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected {what}, got {type(value).__name__}")
    if not accepted(value):
        raise ValueError(f"{name}: expected {what}, got {_shown(value)}")
    return float(value)


def integer(name: str, value: object, low: int | None = None, high: int | None = None) -> int:
    """An integer in [low, high)."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if (low is not None and value < low) or (high is not None and value >= high):
        lower = "-inf" if low is None else low
        upper = "inf" if high is None else high
        raise ValueError(f"{name}: expected an integer in [{lower}, {upper}), got {_shown(value)}")
    return value  # type: ignore[return-value]


def integers(name: str, value: object, low: int | None = None, high: int | None = INT64_END) -> list[int]:
    """A sequence of integers in [low, high)."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected a sequence of integers, got {type(value).__name__}")
    return [integer(name, x, low, high) for x in value]


def pair(name: str, value: object, what: str, low: int, high: int) -> None:
    """A tuple of two integers in [low, high), which ``what`` names."""
    if not isinstance(value, tuple) or len(value) != 2:
        shown = f"{len(value)} of them" if isinstance(value, tuple) else type(value).__name__
        raise TypeError(f"{name}: expected a tuple {what} of integers, got {shown}")
    for item in value:
        integer(name, item, low, high)


def writable(name: str, value: Tensor) -> None:
    """A tensor that can be updated in place."""
    if not value.is_contiguous():
        axes = [(s, n) for s, n in zip(value.stride(), value.shape, strict=True) if n > 1]
        for stride, size in axes:  # each must step over all that the axes of smaller strides reach
            reach = sum([(n - 1) * s for s, n in axes if s <= stride]) - (size - 1) * stride
            if stride <= reach:
                raise ValueError(
                    f"{name}: expected a tensor whose elements are apart in memory, "
                    f"got shape {list(value.shape)} with strides {list(value.stride())}"
                )
    if value.requires_grad:
        raise ValueError(f"{name}: expected a tensor that does not require a gradient")
    if torch.compiler.is_compiling():
        return
    if value.is_neg():
        raise ValueError(f"{name}: expected a tensor without a pending negation (see resolve_neg)")
    if value._is_zerotensor():
        raise ValueError(f"{name}: expected a tensor with memory of its own, got zeros without any")


def own_memory(name: str, written: Tensor, read: Iterable[tuple[str, Tensor | None]]) -> None:
    """A tensor that is written shares no memory with the others, which are read."""
    for other, value in read:
        if value is not None and _meet(written, value):
            raise ValueError(f"{name}: expected memory of its own, got some of that of {other}")


def _meet(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have a byte in common. Twin of csrc/memory.h.

    Their differences in address are sums of steps, each taken a bounded number of times: one that is too
    small to part two elements is searched for from the longest step on. Where that takes long, as no views of
    one array do, the answer is yes.
    """
    apart = a.data_ptr() - b.data_ptr()
    steps: dict[int, int] = {}  # bytes: how often at the most; backward ones are taken back
    low, high = apart + 1 - b.element_size(), apart + a.element_size() - 1
    reach = [0, 0]
    for i, x in enumerate((a, b)):
        unit = x.element_size()
        for n, stride in zip(x.shape, x.stride(), strict=True):
            if n == 0:
                return False
            if n > 1 and stride > 0:
                steps[stride * unit] = steps.get(stride * unit, 0) + n - 1
                reach[i] += (n - 1) * stride * unit
    low, high = low + reach[0], high + reach[0]
    if high < 0 or low > sum(reach):
        return False
    patience = 1 << 12

    def found(ordered: list[int], low: int, high: int) -> bool:
        """Whether these steps, the longest first, lead to somewhere in [low, high]."""
        nonlocal patience
        if high < 0 or low <= 0:
            return high >= 0
        if not ordered or high % math.gcd(*ordered) > high - low:
            return False
        step, *rest = ordered
        least = max(0, -((sum(x * steps[x] for x in rest) - low) // step))
        for n in range(min(steps[step], high // step), least - 1, -1):
            patience -= 1
            if patience < 0 or found(rest, low - n * step, high - n * step):
                return True
        return False

    return found(sorted(steps, reverse=True), low, high)


def _shown(value: object, quoted: bool = False) -> str:
    if isinstance(value, int) and abs(value) > sys.float_info.max:  # Python may refuse to print it
        return f"an integer of {value.bit_length()} bits"
    try:
        return f"{value!r}" if quoted else f"{value}"
    except ValueError:  # as it does where one is part of the value
        return f"a {type(value).__name__} of large integers"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
