"""The compiled module itself: it refuses what is not exactly as expected, and has written nothing then."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_sampler import options
from attn_sampler.backends import extension
from attn_sampler.checks import Span

pytestmark = pytest.mark.skipif(
    not extension.READS_TENSORS,
    reason=extension.UNAVAILABLE or "this torch lets no extension read its tensors",
)

WHERE = (0, 1, 0, 0, 0, 0)
ATTENTION = (slice(0, 4), slice(0, 3), 1, 0.5, "e", False, "sequence", True, "sum", False, False, (-1, -1))
SELECTION = ("parallel", "confidence", 0.5, 0.9, 0.5, 3, "product")


def calls() -> dict[str, tuple[Any, ...]]:
    """Arguments that each function takes; lists and tuples where either may be given."""
    q, k, lse = torch.randn(2, 2, 3, 8), torch.randn(2, 1, 6, 8), torch.zeros(2, 2, 3)
    masks = torch.ones(2, 6, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool), None, None, None
    counted = (*masks[:2], torch.ones(2, 4, dtype=torch.bool), None, None)
    ids, scores, masked = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4), torch.ones(2, 4) == 1
    shares, counts = torch.full((2,), 0.5), torch.full((2,), 5, dtype=torch.int32)
    seeds, words = torch.ones(2, dtype=torch.int64), torch.full((2, 1), -1, dtype=torch.int32)
    sampling = ("probability", shares, seeds, None, 0, counts, 0.9, shares, words)
    step = (slice(0, 4), 3, "all", ATTENTION, sampling, SELECTION)
    budget, revised = torch.ones(2, 4, dtype=torch.int32), torch.full((2, 4), 7, dtype=torch.uint8)
    revision = (scores + 2, scores + 3, revised, budget)
    results = (torch.full((2, 6), 3), ids, scores, scores + 1, ~masked, *revision)
    mapped = (*ATTENTION[:8], "none", *ATTENTION[9:])
    logits, layers = torch.randn(2, 4, 11), [(q, k, lse), [q, k, lse]]
    return {
        "column_scores": (scores, (q, k, lse, None, None), masks, ATTENTION, WHERE),
        "attention_map": (torch.zeros(2, 3, 4), [q, k, lse], counted, mapped, WHERE),
        "top_columns": (
            *((ids[:, None] + 7, scores[:, None] - 1), (q, k, lse), masks),
            *((ATTENTION, 4, "all", 1, 2, ("mean", 3)), WHERE),
        ),
        "token_confidence": ((ids, scores, scores + 1, scores + 2), logits, ids + 1, sampling, WHERE),
        "select_tokens": (
            *((~masked, revised, budget), scores, scores + 1, masked, scores + 0.5, masked),
            *(SELECTION, WHERE),
        ),
        "decode_step": (results, logits, layers, masks, step, WHERE),
    }


class Word(str):
    """A word of a user's enumeration."""


class Subclass(Tensor):
    """A tensor of which others may want to hear."""


def garbage() -> list[Any]:
    x = torch.zeros(2, 4)
    integers = [-(1 << 200), -(1 << 31) - 1, -1, 0, 1, 5, 1 << 31, 1 << 62, 1 << 63, 1 << 64]
    numbers = [True, False, 0.0, -1.0, 1e300, float("nan"), float("inf")]
    words = ["", "e", "sum", "masked", "ä", b"e", Word("max")]
    spans = [slice(None), slice(5, 2), slice("a"), slice(1 << 100, None), slice(0, 4, 2), Span(0, 9), (0, 4)]
    holders = [(), [], {}, [[]], *((None,) * n for n in (2, 3, 5, 6, 11)), [None] * 5]
    tensors = [x, x[0], x[:0], x[0, 0], x.t(), x.double(), x.to("meta"), x.to_sparse(), x[None, None, None]]
    others = [x[:1, :1].expand(2, 4), torch.complex(x, x).conj().imag, x.as_subclass(Subclass)]
    views = [extension._C.TensorView(0, dtype, (2, 4), (4, 1)) for dtype in (0, 77)]
    return [None, object(), int, *integers, *numbers, *words, *spans, *holders, *tensors, *others, *views]


def places(value: Any, place: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Where everything in nested tuples and lists is."""
    if place:
        yield place
    for i, item in enumerate(value if isinstance(value, (tuple, list)) else ()):
        yield from places(item, (*place, i))


def at(value: Any, place: tuple[int, ...]) -> Any:
    return at(value[place[0]], place[1:]) if place else value


def put(value: Any, place: tuple[int, ...], other: Any) -> Any:
    """The nested tuples and lists with something else at one place."""
    if not place:
        return other
    items = list(value)
    items[place[0]] = put(items[place[0]], place[1:], other)
    return type(value)(items)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, (tuple, list)):
        return [x for item in value for x in tensors(item)]
    return [value] if isinstance(value, Tensor) and value.is_cpu and value.layout == torch.strided else []


@pytest.mark.parametrize("name", calls())
def test_garbage_is_refused(name: str) -> None:
    function, arguments = getattr(extension._C, name), calls()[name]
    before = copy.deepcopy(tensors(arguments))
    assert function(*arguments) == 0
    assert not all(map(torch.equal, tensors(arguments), before))
    refused = 0
    for place in places(arguments):
        holder = at(arguments, place)
        others = garbage()
        if isinstance(holder, (tuple, list)):
            others += [type(holder)([*holder, None]), holder[:-1]]
        for other in others:
            before = [x.clone() for x in tensors(arguments)]
            try:
                function(*put(arguments, place, other))
            except extension._C.Refused:
                refused += 1
                assert all(map(torch.equal, tensors(arguments), before))
    assert refused > 40 * len(list(places(arguments)))


@pytest.mark.parametrize("name", calls())
def test_functions_have_one_arity(name: str) -> None:
    function, arguments = getattr(extension._C, name), calls()[name]
    for count in {*range(2 * len(arguments))} - {len(arguments)}:
        with pytest.raises(TypeError, match=f"expected {len(arguments)} arguments, got {count}"):
            function(*(arguments * 2)[:count])
    with pytest.raises(TypeError):
        function(*arguments, where=WHERE)


def test_a_step_has_layers_or_none() -> None:
    arguments = calls()["decode_step"]
    for layers in ([], ()):
        with pytest.raises(extension._C.Refused, match="expected at least one layer"):
            extension._C.decode_step(*put(arguments, (2,), layers))
    assert extension._C.decode_step(*put(arguments, (2,), None)) == 0


def test_limits_are_those_of_the_header() -> None:
    assert {name: getattr(options, name) for name in extension._C.LIMITS} == extension._C.LIMITS
    assert "MAX_HEADDIM" in extension._C.LIMITS
