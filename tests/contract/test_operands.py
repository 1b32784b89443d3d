"""What operands may be, whatever they hold: huge views, negated ones, and outputs in the memory of others."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_sampler import (
    BackendUnavailableError,
    attention_map,
    checks,
    column_scores,
    decode_step,
    ops,
    reference,
    revise_tokens,
    select_tokens,
    token_confidence,
    top_columns,
)

Call = tuple[Callable[..., Any], dict[str, Any]]


@pytest.fixture(params=["direct", "checked", "by operator"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the calls of a test get to the backend."""
    if request.param != "direct":
        monkeypatch.setattr(ops, "direct", lambda *_: None)
    if request.param == "by operator":
        monkeypatch.setattr(ops, "nothing_listens", lambda: False)
    return request.param


def small_calls(device: torch.device) -> dict[str, Call]:
    """A call of each function with every operand that there is."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(device)

    q, k, lse = random(2, 2, 4, 8), random(2, 1, 6, 8), random(2, 2, 4) + 2
    eighth = torch.float8_e4m3fn
    masks = {"key_mask": random(2, 6) < 0.8, "query_mask": random(2, 4) < 0.8}
    scales = {"q_descale": random(2, 1), "k_descale": random(2, 1)}
    attention = {"q": q, "k": k, "softmax_lse": lse, **masks, "columns": slice(1, 5)}
    logits, seed = random(2, 4, 11), torch.tensor([5, 6], device=device)
    tokens = torch.full((2, 6), 3, device=device)
    where = {"block": slice(1, 5), "mask_token_id": 3, "tau": 0.0}
    sampling = {"temperature": 1.0, "seed": seed}
    scores = {"scores": random(2, 4), "confidence": random(2, 4), "masked": random(2, 4) < 0.7}
    return {
        "scores": (column_scores, {**attention, "out": random(2, 4)}),
        "float8": (column_scores, {**attention, **scales, "q": q.to(eighth), "k": k.to(eighth)}),
        "map": (attention_map, {**attention, "out": random(2, 4, 4)}),
        "top_columns": (top_columns, {**attention, "count": 3, "recent": 1, "pool": ("mean", 3)}),
        "confidence": (token_confidence, {"logits": logits, **sampling}),
        "select": (select_tokens, scores),
        "judge": (token_confidence, {"logits": logits, "current_ids": tokens[:, 1:5] % 3}),
        "mass": (
            attention_map,
            {**attention, "column_mask": random(2, 4) < 0.6, "reduction": "sum", "out": random(2, 4)},
        ),
        "revise": (
            revise_tokens,
            {**scores, "current": random(2, 4), "differs": random(2, 4) < 0.7, "remask_tau": 0.9}
            | {"budget": torch.ones(2, 4, dtype=torch.int32, device=device)},
        ),
        "step": (
            decode_step,
            {
                "tokens": tokens,
                "logits": logits,
                "layers": [(q, k, lse), (k.repeat(1, 2, 1, 1)[:, :, :4], k, lse)],
            }
            | {**masks, **sampling, **where},
        ),
        "step of scores": (
            decode_step,
            {"tokens": tokens, "logits": logits, "scores": random(2, 4), **where},
        ),
    }


NAMES = (
    *("scores", "float8", "map", "confidence", "select", "step", "step of scores"),
    *("judge", "mass", "revise", "top_columns"),
)
WRITTEN = {
    **{"scores": "out", "map": "out", "mass": "out"},
    **{"step": "tokens", "step of scores": "tokens", "revise": "budget"},
}


def results(value: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(value) if x is not None]


def copied(call: Call) -> dict[str, Any]:
    return torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, call[1])


# --- Sizes.


def huge_calls(seed: int) -> dict[str, Call]:
    """Calls with tensors of more elements than any may have, each of them in the same few bytes."""
    rng = random.Random(seed)
    bits = rng.randint(41, 61)
    cuts = sorted(rng.randint(0, bits) for _ in range(2))
    batch, heads, rows = (1 << n for n in (cuts[0], cuts[1] - cuts[0], bits - cuts[1]))
    one = torch.ones(1, 1, 1, 1, dtype=rng.choice((torch.float32, torch.bfloat16)))
    many, few = one.expand(batch, heads, rows, 1), one.expand(batch, heads, 2, 1)
    lse, wide = torch.zeros(1, 1, 1).expand(batch, heads, rows), one.double()
    matrix = batch, heads * rows
    scores, marks = torch.zeros(1, 1).expand(matrix), torch.zeros(1, 1, dtype=torch.bool).expand(matrix)
    logits, tokens = one[0].expand(*matrix, 1), torch.ones(1, 1, dtype=torch.int64)
    small = {"logits": torch.ones(1, 4, 5), "block": slice(0, 4), "mask_token_id": 1}
    where = {"columns": slice(0, 1), "per_head": rng.random() < 0.5}
    return {
        "q": (column_scores, {"q": many, "k": few[:, :1], **where}),
        "lse": (column_scores, {"q": many, "k": few[:, :1], "softmax_lse": lse, **where}),
        "k": (column_scores, {"q": few, "k": many, "columns": slice(0, 1), "reduction": "max"}),
        "rows": (attention_map, {"q": many, "k": few, "rows": slice(0, 1), **where}),
        "map": (attention_map, {"q": many, "k": many}),
        "top": (top_columns, {"q": many, "k": few[:, :1], "columns": slice(0, 1), "count": 1}),
        "many rows": (
            column_scores,
            {"q": one.expand(1 << 16, 1, 1 << 17, 1), "k": one.expand(1 << 16, 1, 4, 1)},
        ),
        "float64": (column_scores, {"q": wide.expand(many.shape), "k": wide.expand(few.shape)}),
        "logits": (token_confidence, {"logits": logits, "temperature": 1.0, "seed": 3}),
        "vocabulary": (token_confidence, {"logits": one.float()[0].expand(1, 1, batch * heads * rows)}),
        "selection": (select_tokens, {"scores": scores, "confidence": scores, "masked": marks}),
        "step": (decode_step, {"tokens": tokens.expand(1, 4), "layers": [(many, few)], **small}),
        "step of logits": (
            decode_step,
            {"tokens": tokens.expand(matrix), "logits": logits, "scores": scores}
            | {"block": slice(None), "mask_token_id": 0},
        ),
    }


@pytest.mark.parametrize("seed", range(12))
def test_more_elements_than_may_be(way, seed):
    """Refused by the argument's name, on every way, long before anything is computed."""
    for name, (function, arguments) in huge_calls(seed).items():
        with pytest.raises((ValueError, MemoryError)) as caught:
            function(**arguments)
        start = str(caught.value).split(":")[0].split()[-1]
        assert start in ("q", "k", "out", "logits", "scores", "tokens"), (name, caught.value)


def test_as_many_as_may_be_need_memory(way):
    """Within the limits, it is what would be kept for them that is too much."""
    one, wide = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    scores = one[0, 0].expand(1 << 20, 1 << 20)
    for function, arguments in (
        (column_scores, (wide.expand(1, 1 << 16, 1 << 16, 1), wide.expand(1, 1, 1 << 12, 1))),
        (attention_map, (one.expand(1, 1, 1 << 20, 2), one.expand(1, 1, 1 << 19, 2))),  # the reference's too
        (token_confidence, (one[0].expand(1 << 20, 1 << 20, 1),)),
        (select_tokens, (scores, scores, torch.zeros(1, 1, dtype=torch.bool).expand(scores.shape))),
    ):
        with pytest.raises(MemoryError):
            function(*arguments)


def test_strides_that_no_step_takes(backend, device):
    """Of dimensions of size 1: they may be anything."""
    q, k = torch.rand(1, 1, 1, 8, device=device), torch.rand(1, 1, 5, 8, device=device)
    far = 1 << 61
    for function in (column_scores, attention_map):
        wide = function(
            q.as_strided(q.shape, (far, far, far, 1)),
            k.as_strided(k.shape, (far, far, 8, 1)),
            backend=backend,
        )
        assert torch.equal(wide, function(q, k, backend=backend))
    logits = torch.rand(1, 1, 9, device=device)
    same = [
        token_confidence(x, backend=backend) for x in (logits, logits.as_strided(logits.shape, (far, far, 1)))
    ]
    assert all(map(torch.equal, *same))


@pytest.mark.parametrize(
    "start", [-(1 << 61), -(1 << 31), -(1 << 31) + 2, -5, 3, (1 << 31) - 3, (1 << 32) - 2, 1 << 61]
)
@pytest.mark.parametrize("function", [column_scores, attention_map])
@pytest.mark.parametrize("scope", ["sequence", "block"])
def test_rows_that_stand_anywhere(backend, device, function, scope, start):
    q, k = torch.rand(1, 1, 6, 8, device=device), torch.rand(1, 1, 9, 8, device=device)
    options = {
        "columns": slice(2, 7),
        "causal": True,
        "diagonal": False,
        "softmax_scope": scope,
        "query_start": start,
    }
    expected = getattr(reference, function.__name__)(q, k, **options)
    torch.testing.assert_close(function(q, k, **options, backend=backend), expected)


# --- What autograd knows of.


@pytest.mark.parametrize("name", WRITTEN)
def test_writes_are_counted(way, backend, device, name):
    function, arguments = small_calls(device)[name]
    written = arguments[WRITTEN[name]]
    before = written._version
    function(**arguments, backend=backend)
    assert written._version == before + 1
    others = [
        x for x in torch.utils._pytree.tree_leaves(arguments) if isinstance(x, Tensor) and x is not written
    ]
    assert not any(x._version for x in others)


def test_a_graph_that_kept_the_tokens_says_so(way, backend, device):
    weight = torch.randn(11, 4, device=device, requires_grad=True)
    _, arguments = small_calls(device)["step"]
    loss = F.embedding(arguments["tokens"], weight).sum()
    decode_step(**arguments, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- Negated views, and zeros without memory.


def operands(arguments: dict[str, Any]) -> list[tuple[str, Callable[[Tensor], dict[str, Any]], Tensor]]:
    """Each tensor of a call: its name, the call's arguments with another in its place, itself."""

    def put(name: str, layer: int | None = None, place: int = 0) -> Callable[[Tensor], dict[str, Any]]:
        if layer is None:
            return lambda x: arguments | {name: x}
        layers = [list(x) for x in arguments["layers"]]

        def with_it(x: Tensor) -> dict[str, Any]:
            layers[layer][place] = x
            return arguments | {"layers": layers}

        return with_it

    found = [(name, put(name), x) for name, x in arguments.items() if isinstance(x, Tensor)]
    for index, layer in enumerate(arguments.get("layers", ())):
        found += [(f"layer {index}", put("layers", index, place), x) for place, x in enumerate(layer)]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_negated_operands(way, backend, device, name):
    """Read as what they are, or refused where they are written; with the strides of any other tensor."""
    function, arguments = call = small_calls(device)[name]
    for operand, put, x in operands(arguments):
        if x.dtype in (torch.bool, torch.float8_e4m3fn):  # torch negates neither
            continue
        negated = torch._neg_view(x.new_empty_strided(x.shape, x.stride()).copy_(-x))
        assert negated.is_neg()
        assert negated.stride() == x.stride()
        if operand in (*WRITTEN.values(), *(["scores"] if name == "step of scores" else [])):
            with pytest.raises(ValueError, match=f"^{operand}: .*negation"):
                function(**put(negated), backend=backend)
            continue
        expected = results(function(**copied((function, put(x))), backend=backend))
        written = {k: v.clone() for k, v in call[1].items() if k in WRITTEN.values()}
        actual = results(function(**{**put(negated), **written}, backend=backend))
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def test_a_negated_view_in_any_layout(backend, device):
    z = torch.randn(1, 1, 4, 8, dtype=torch.complex64, device=device)
    q, k = z.conj().imag.as_strided((1, 1, 4, 8), (64, 64, 16, 1)), torch.randn(1, 1, 5, 8, device=device)
    expected = column_scores(q.resolve_neg().clone(), k, backend=backend)
    assert torch.equal(column_scores(q, k, backend=backend), expected)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_without_memory(way, backend, device, name):
    function, arguments = small_calls(device)[name]
    for operand, put, x in operands(arguments):
        if x.dtype == torch.float8_e4m3fn:
            continue
        none = torch._efficientzerotensor(x.shape, dtype=x.dtype, device=device)
        if operand in (*WRITTEN.values(), *(["scores"] if name == "step of scores" else [])):
            with pytest.raises(ValueError, match=f"^{operand}: "):
                function(**put(none), backend=backend)
            continue
        expected = results(function(**copied((function, put(torch.zeros_like(x)))), backend=backend))
        written = {k: v.clone() for k, v in arguments.items() if k in WRITTEN.values()}
        try:
            actual = results(function(**{**put(none), **written}, backend=backend))
        except BackendUnavailableError:  # torch makes a view of a single zero of it, which not all read
            continue
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0.0, atol=0.0, equal_nan=True)


# --- Outputs in the memory of others.


@pytest.mark.parametrize("name", WRITTEN)
def test_outputs_in_the_memory_of_operands(way, backend, device, name):
    function, arguments = small_calls(device)[name]
    for operand, put, x in operands(arguments):
        if operand == WRITTEN[name]:
            continue
        output = arguments[WRITTEN[name]]
        size, start = output.element_size(), x.element_size()
        # The last byte of the operand is in the first element of the output.
        memory = torch.zeros(4096, dtype=torch.uint8, device=device)
        at = (x.numel() * start - 1) // size * size
        view = memory[: x.numel() * start].view(x.dtype).view(x.shape).copy_(x)
        over = memory[at : at + output.numel() * size].view(output.dtype).view(output.shape)
        before = memory.clone()
        with pytest.raises(
            ValueError, match=f"^{WRITTEN[name]}: expected memory of its own, got some of that of "
        ):
            function(**{**put(view), WRITTEN[name]: over}, backend=backend)
        assert torch.equal(memory, before)
        # And right behind it, all is well.
        at = -(-x.numel() * start // size) * size
        beside = memory[at : at + output.numel() * size].view(output.dtype).view(output.shape).copy_(output)
        actual = function(**{**put(view), WRITTEN[name]: beside}, backend=backend)
        expected = function(**copied((function, arguments)), backend=backend)
        for a, b in zip(results(actual), results(expected), strict=True):
            assert torch.equal(a, b)


def test_interleaved_views(backend, device):
    """An output may lie between the elements of an operand."""
    q, k = torch.rand(2, 3, 4, 8, device=device), torch.rand(2, 1, 4, 8, device=device)
    memory = torch.zeros(2, 3, 4, 2, device=device)
    lse, out = memory[..., 0], memory[..., 1]
    lse += 3.0
    options = {"per_head": True, "backend": backend}
    assert torch.equal(
        column_scores(q, k, softmax_lse=lse, out=out, **options),
        column_scores(q, k, softmax_lse=lse.clone(), **options),
    )
    assert (lse == 3.0).all()


def test_whether_views_meet():
    """Against the elements themselves."""
    rng, memory = random.Random(0), torch.zeros(4000, dtype=torch.uint8)
    found = set()
    for _ in range(3000):
        views = []
        for _ in range(2):
            dtype = rng.choice((torch.uint8, torch.float16, torch.float32, torch.int64))
            shape = [rng.choice((0, 1, 2, 2, 3, 5)) for _ in range(rng.randint(1, 3))]
            strides = [rng.choice((0, 1, 2, 3, 4, 7, 12, 30)) for _ in shape]
            x = memory.view(dtype)
            views.append(x.as_strided(shape, strides, rng.randint(0, 60)))
        bytes_of = [
            {
                x.data_ptr()
                + x.element_size() * sum(i * s for i, s in zip(at, x.stride(), strict=True))
                + byte
                for at in itertools.product(*map(range, x.shape))
                for byte in range(x.element_size())
            }
            for x in views
        ]
        meet = not bytes_of[0].isdisjoint(bytes_of[1])
        assert checks._meet(*views) is meet
        found.add(meet)
    assert found == {False, True}


# --- Integers.


@pytest.mark.parametrize(
    "value", [1 << 31, 1 << 62, (1 << 63) - 1, 1 << 63, 1 << 64, 1 << 70, 1 << 20000], ids=int.bit_length
)
@pytest.mark.parametrize("sign", [1, -1])
def test_integers_of_any_size(way, backend, device, value, sign):
    calls, n = small_calls(device), sign * value
    function, arguments = calls["confidence"]
    bad = {"exclude_token_id": n}
    bad |= {"vocab_start": n} if not 0 <= n <= 1 << 33 else {}
    bad |= {"seed": n} if not -(1 << 63) <= n < 1 << 64 else {}
    for name, x in bad.items():
        with pytest.raises(ValueError, match=f"^{name}: "):
            function(**arguments | {name: x}, backend=backend)
    function, arguments = calls["step"]
    for name, x in {
        "mask_token_id": n,
        "block": slice(n, None),
        "columns": slice(n, n + 4),
        **({"query_start": n} if abs(n) > 1 << 62 else {}),
    }.items():
        with pytest.raises(ValueError, match=f"^({name}|logits|query_rows)[:.]") as caught:
            function(**arguments | {name: x}, backend=backend)
        assert "OverflowError" not in repr(caught.value.__cause__)
    function, arguments = calls["map"]
    for name in ("columns", "rows"):
        for span in (slice(n, n + 1), slice(0, n), slice(0, 3, n)):
            if span.stop == n and sign < 0:
                continue
            with pytest.raises(ValueError, match=f"^{name}: "):
                function(**arguments | {name: span}, backend=backend)
