"""The registered operators: their schemas and fake kernels, torch.compile of the public functions, and the
ways past them, which give the same and are not taken where somebody listens."""

from __future__ import annotations

import functools
import math
import weakref

import pytest
import torch
from problems import normal, row_lse
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from attn_sampler import (
    attention_map,
    backends,
    column_scores,
    decode_step,
    ops,
    options,
    revise_tokens,
    select_tokens,
    token_confidence,
    top_columns,
)
from attn_sampler.backends import extension
from attn_sampler.operator_arguments import flat
from attn_sampler.options import Attention, Layer, Masks, Sampling, Selection, Span, Step, Top

OPS = torch.ops.attn_sampler  # registered by the import above
MASK = 5
needs_extension = pytest.mark.skipif(extension.UNAVAILABLE is not None, reason=str(extension.UNAVAILABLE))


def inputs(device: torch.device, *, batch: int = 10, n_rows: int = 7, n_keys: int = 12) -> dict:
    """Tensors for every function: a block of 4 at key positions 4 to 7. All sizes differ, or torch.compile
    would take them for one."""
    q = normal(0, batch, n_rows, 6, 32).transpose(1, 2)  # as a model lays it out
    k = normal(1, batch, 3, n_keys, 32)
    tokens = torch.randint(6, 30, (batch, n_keys), generator=torch.Generator().manual_seed(0))
    tokens[:, 5:] = MASK
    g = torch.Generator().manual_seed(1)
    values = {
        "q": q,
        "k": k,
        "lse": row_lse(q, k),
        "key_mask": torch.rand(batch, n_keys, generator=g) < 0.8,
        "tokens": tokens,
        "logits": normal(2, batch, 4, 30),
        "scores": torch.rand(batch, 4, generator=g),
        "confidence": torch.rand(batch, 4, generator=g),
        "masked": torch.rand(batch, 4, generator=g) < 0.7,
        "seeds": torch.arange(batch),
        "descale": torch.rand(3, generator=g).expand(batch, 3),
        "budget": torch.randint(0, 3, (batch, 4), generator=g, dtype=torch.int32),
    }
    return {name: value.to(device) for name, value in values.items()}


def calls(x: dict, backend: str) -> dict:
    """Arguments for every operator."""
    masks, no_masks = flat(Masks(x["key_mask"])), flat(Masks())
    layer = flat(Layer(x["q"], x["k"], x["lse"]))
    how = (5, 0.2, "e", True, "sequence", False)  # from query_start to diagonal
    summed = Attention(Span(4, 8), Span(0, 7), *how, "sum", False, True)
    per_head = Attention(Span(4, 8), Span(0, 7), *how, "mean", True, False)
    mapped = Attention(Span(4, 8), Span(1, 4), *how, "none", False, False)
    massed = mapped._replace(reduction="sum", per_head=True)
    top = Top(summed._replace(accumulate=False), 3, "kv_head", 1, 1, ("mean", 3))
    best = torch.zeros_like(x["lse"][:, :3, :3], dtype=torch.int64)
    scores = torch.zeros_like(x["scores"])
    ids = torch.zeros_like(scores, dtype=torch.int64)
    batch = x["seeds"].shape[0]
    rows, words = torch.linspace(0.3, 0.9, batch, device=x["seeds"].device), x["tokens"][:, :1].int() | 7
    sampled = Sampling("entropy", rows, x["seeds"], MASK, 6, rows.int() + 9, 0.9, rows / 9, words)
    current, differs = x["confidence"] * 0.9, ~x["masked"]
    revised, selected = torch.zeros_like(ids, dtype=torch.uint8), x["masked"].clone()
    outputs = (x["tokens"], ids, x["confidence"], x["scores"], selected)
    no_revision = (None,) * 4
    revising = (torch.zeros_like(scores), torch.zeros_like(scores), revised, x["budget"])
    commits = (math.inf, 0.0, 64, "product")
    revises = Selection(rows.int() + 2, "confidence", rows, 0.3, 0.6, 2, "doubt")
    layers = ([x["q"]] * 2, [x["k"]] * 2, [x["lse"]] * 2, [], [])
    steps = [
        Step(Span(4, 8), MASK, "all", summed, sampled, Selection("parallel", "confidence", 0.1, *commits)),
        Step(
            Span(4, 8),
            MASK,
            "all",
            summed,
            Sampling("margin", 0.0, 0),
            Selection("sequential", "score", 0.9, *commits),
        ),
        Step(Span(4, 8), MASK, "all", summed, sampled, revises),
    ]
    return {
        "column_scores": [
            (scores, *layer, *masks, *flat(summed), backend),
            (torch.zeros_like(x["lse"][..., :4]), *layer, *no_masks, *flat(per_head), backend),
        ],
        "attention_map": [
            (scores[:, None].repeat(1, 3, 1), *layer, *masks, *flat(mapped), backend),
            (
                torch.zeros_like(x["lse"][..., 1:4]).contiguous(),
                *layer,
                *flat(Masks(column_mask=x["masked"])),
                *flat(massed),
                backend,
            ),
        ],
        "top_columns": [
            (best, best.float(), *layer, *masks, *flat(top), backend),
            (best[:, :1], best[:, :1].float(), *layer, *no_masks, *flat(top._replace(per="all")), backend),
        ],
        "token_confidence": [
            (ids, scores, current, None, x["logits"], None, *flat(Sampling("probability", 0.0, 0)), backend),
            (ids, scores, *revising[:2], x["logits"], x["tokens"][:, 4:8], *flat(sampled), backend),
        ],
        "select_tokens": [
            (
                *(selected, None, None, scores, x["confidence"], x["masked"], None, None),
                *(*flat(steps[0].selection), backend),
            ),
            (
                *(selected, revised, x["budget"], scores, x["confidence"], x["masked"], current, differs),
                *(*flat(revises), backend),
            ),
        ],
        "decode_step": [
            (*outputs, *no_revision, x["logits"], *layers, *masks, *flat(steps[0]), backend),
            (*outputs, *no_revision, x["logits"], *([],) * 5, *no_masks, *flat(steps[1]), backend),
            (*outputs, *revising, x["logits"], *layers, *masks, *flat(steps[2]), backend),
        ],
    }


@pytest.mark.parametrize("op", backends.OPS)
def test_opcheck(backend, device, op):
    for arguments in calls(inputs(device), backend)[op]:
        results = torch.library.opcheck(getattr(OPS, op).default, arguments)
        assert set(results.values()) == {"SUCCESS"}


def functions(backend: str) -> dict:
    """Every public function, called on the tensors of ``inputs`` alone."""
    of_step = {"block": slice(4, 8), "mask_token_id": MASK, "backend": backend}

    def scores(x):
        return column_scores(
            x["q"], x["k"], columns=slice(4, 8), softmax_lse=x["lse"], key_mask=x["key_mask"], backend=backend
        )

    def scores_of_layers(x):
        out = None
        for _ in range(3):
            out = column_scores(x["q"] * 1.5, x["k"], causal=True, reduction="mean", out=out, backend=backend)
        return out * 2

    def attention(x):
        return attention_map(
            x["q"], x["k"], columns=slice(-4, None), rows=slice(1, 4), per_head=True, backend=backend
        )

    def confidence(x):
        return token_confidence(x["logits"] + 1, metric="margin", exclude_token_id=MASK, backend=backend)

    def sample(x):
        return token_confidence(x["logits"], temperature=0.7, seed=x["seeds"], backend=backend)

    def select(x):
        return select_tokens(x["scores"], x["confidence"].sqrt(), x["masked"], tau=0.5, backend=backend)

    def judge(x):
        return token_confidence(x["logits"], current_ids=x["tokens"][:, 4:8], backend=backend)

    def mass(x):
        return attention_map(x["q"], x["k"], reduction="sum", column_mask=x["key_mask"], backend=backend)

    def choice_of_top_columns(x):
        pool = ("max", 3)
        return top_columns(x["q"] * 2, x["k"], count=5, sinks=1, recent=2, pool=pool, backend=backend)

    def one_choice_of_top_columns(x):
        where = {"columns": slice(-4, None), "key_mask": x["key_mask"]}
        return top_columns(x["q"], x["k"], count=4, per="all", softmax_lse=x["lse"], **where, backend=backend)

    def revise(x):
        seen = (x["scores"], x["confidence"], x["masked"], x["confidence"] * 0.9, ~x["masked"])
        return revise_tokens(*seen, x["budget"], remask_tau=0.6, max_revisions=1, backend=backend)

    def revising_step(x):
        layers, how = [(x["q"], x["k"], x["lse"])] * 2, {"remask_tau": 0.9, "rule": "threshold"}
        return decode_step(x["tokens"], x["logits"], layers, budget=x["budget"], **how, **of_step)

    def step(x):
        layers = [(x["q"], x["k"], x["lse"])] * 2
        result = decode_step(x["tokens"], x["logits"], layers, tau=0.1, query_rows="masked", **of_step)
        return result, (x["tokens"] == MASK).sum(dim=1)

    def step_in_float8(x):
        q, k = (x[name].to(torch.float8_e4m3fn) for name in "qk")
        layers = [(q, k, None, None, x["descale"]), (q, k, None, None, x["descale"] * 2)]
        return decode_step(x["tokens"], x["logits"], layers, **of_step)

    def step_from_scores(x):
        return decode_step(x["tokens"], x["logits"], scores=x["scores"], rule="sequential", **of_step)

    return {
        f.__name__: f
        for f in (
            *(scores, scores_of_layers, attention, confidence, sample, select),
            *(step, step_in_float8, step_from_scores, judge, mass, revise, revising_step),
            *(choice_of_top_columns, one_choice_of_top_columns),
        )
    }


NAMES = list(functions("auto"))


def leaves(result) -> list[Tensor]:
    """The tensors of a result, without what was not asked for."""
    return [x for x in torch.utils._pytree.tree_leaves(result) if x is not None]


def same(actual, expected) -> None:
    torch.testing.assert_close(leaves(actual), leaves(expected), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_to_one_graph(backend, device, name, dynamic):
    """One graph without a break; with dynamic shapes it serves other batch sizes, rows and keys too."""
    torch._dynamo.reset()
    function = functions(backend)[name]
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    sizes = [{}, {}] if dynamic is None else [{}, {"batch": 11}, {"n_keys": 15, "n_rows": 9}]
    for index, size in enumerate(sizes):
        x, y = inputs(device, **size), inputs(device, **size)
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            actual = compiled(x)
        same(actual, function(y))
        same(x, y)  # committed tokens and accumulated scores too


def test_moving_blocks_do_not_recompile(backend, device):
    """Each step of a decoder has its own block."""
    torch._dynamo.reset()

    def step(x, start):
        block = slice(start, start + 4)
        return decode_step(
            x["tokens"],
            x["logits"],
            [(x["q"], x["k"], x["lse"])],
            block=block,
            mask_token_id=MASK,
            backend=backend,
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for index, start in enumerate((2, 3, 4, 5, 7, 8)):
        x, y = inputs(device), inputs(device)
        with torch._dynamo.config.patch(error_on_recompile=index > 1):
            actual = compiled(x, start)
        same(actual, step(y, start))


@pytest.mark.parametrize("name", ["scores_of_layers", "step"])
def test_inductor_gives_the_same(backend, device, name):
    torch._dynamo.reset()
    function = functions(backend)[name]
    compiled = torch.compile(function, fullgraph=True)
    x, y = inputs(device), inputs(device)
    torch.testing.assert_close(leaves(compiled(x)), leaves(function(y)))
    same(x["tokens"], y["tokens"])


def test_checks_run_while_compiling(backend, device):
    torch._dynamo.reset()
    compiled = torch.compile(
        functools.partial(column_scores, columns=slice(4, 4), backend=backend), backend="aot_eager"
    )
    x = inputs(device)
    with pytest.raises(ValueError, match=r"^columns: expected at least one"):
        compiled(x["q"], x["k"])


def test_meta_tensors_have_the_shapes():
    x = inputs(torch.device("cpu"))
    meta = {name: value.to("meta") for name, value in x.items()}
    for function in functions("auto").values():
        actual, expected = (leaves(function(values)) for values in (meta, x))
        assert len(actual) == len(expected) >= 1
        for a, e in zip(actual, expected, strict=True):
            assert a.device.type == "meta"
            assert (a.shape, a.dtype, a.stride()) == (e.shape, e.dtype, e.stride())


def test_fake_tensors_stay_fake():
    with FakeTensorMode() as mode:
        x = {name: mode.from_tensor(value) for name, value in inputs(torch.device("cpu")).items()}
        for function in functions("auto").values():
            for leaf in leaves(function(x)):
                assert isinstance(leaf, torch._subclasses.FakeTensor)


def test_no_gradient_and_no_warning_where_inputs_require_one(backend, device, recwarn):
    x = inputs(device)
    for name in ("q", "k", "logits"):
        x[name].requires_grad_()
    for name in ("scores", "attention", "sample", "step"):
        for leaf in leaves(functions(backend)[name](x)):
            assert not leaf.requires_grad
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


class Operators:
    """Notes which operators are called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.called: list[str] = []
        for name in backends.OPS:
            monkeypatch.setattr(getattr(ops, name), "_operator", functools.partial(self._call, name))

    def _call(self, name: str, *arguments) -> None:
        self.called.append(name)
        getattr(OPS, name)(*arguments)


def names_of(function: str) -> list[str]:
    """The operators that one of ``functions`` calls."""
    operators = {
        "scores": ["column_scores"],
        "scores_of_layers": ["column_scores"] * 3,
        "attention": ["attention_map"],
        "confidence": ["token_confidence"],
        "sample": ["token_confidence"],
        "select": ["select_tokens"],
        "judge": ["token_confidence"],
        "mass": ["attention_map"],
        "revise": ["select_tokens"],
        "choice_of_top_columns": ["top_columns"],
        "one_choice_of_top_columns": ["top_columns"],
    }
    return operators.get(function, ["decode_step"])


@pytest.mark.parametrize("name", NAMES)
def test_every_backend_is_called_past_the_operators(monkeypatch, backend, device, name):
    operators = Operators(monkeypatch)
    functions(backend)[name](inputs(device))
    assert operators.called == []


def test_a_default_device_does_not_listen(monkeypatch, backend, device):
    operators = Operators(monkeypatch)
    x = inputs(device)
    expected = functions(backend)["confidence"](x)
    with torch.device("meta"):  # of new tensors, not of ours
        actual = functions(backend)["confidence"](x)
    assert operators.called == []
    same(actual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_all_ways_give_the_same(monkeypatch, backend, device, name):
    """Straight to the backend that checks itself; with Python's checks, also where torch's tensors cannot be
    read by an extension; and by the operator."""
    x, expected = inputs(device), None
    operators = Operators(monkeypatch)
    for patch in (None, (extension, "READS_TENSORS", False), (ops, "nothing_listens", lambda: False)):
        if patch is not None:
            monkeypatch.setattr(*patch)
            backends._first_choice.cache_clear()
        y = inputs(device)
        actual = functions(backend)[name](y)
        if expected is None:
            x, expected = y, actual
        same(actual, expected)
        same(y, x)
        strides = [[t.stride() for t in leaves(r)] for r in (actual, expected)]
        assert strides[0] == strides[1]
    assert operators.called == names_of(name)


def heard(functions: list[str]) -> list[str]:
    """The operators among them."""
    parts = [name.split(".") for name in functions]
    return [p[1] for p in parts if p[0] == "attn_sampler"]


class DispatchListener(TorchDispatchMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class FunctionListener(TorchFunctionMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("listener", [DispatchListener, FunctionListener])
@pytest.mark.parametrize("name", NAMES)
def test_who_listens_hears_the_operators(backend, device, name, listener):
    seen: list[str] = []
    with listener(seen):
        functions(backend)[name](inputs(device))
    assert heard(seen) == names_of(name)


@pytest.mark.parametrize("name", NAMES)
def test_profiles_name_the_operators(backend, device, name):
    x = inputs(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        functions(backend)[name](x)
    events = [e.name for e in profile.events() if e.name.startswith("attn_sampler::")]
    assert events == [f"attn_sampler::{name}" for name in names_of(name)]


def test_traces_contain_the_operators(backend, device):
    x = inputs(device)

    def function(logits):
        return tuple(token_confidence(logits, metric="margin", backend=backend))

    traced = torch.jit.trace(function, x["logits"])
    assert "attn_sampler::token_confidence" in str(traced.graph)
    same(traced(x["logits"] * 2), function(x["logits"] * 2))


class Subclass(Tensor):
    seen: list[str] = []  # noqa: RUF012  (one list, of all tensors)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(str(function))
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("name", ["scores", "attention", "confidence", "select", "step"])
def test_tensors_of_a_subclass_hear_of_it(backend, device, name):
    x, y = inputs(device), inputs(device)
    plain = {"scores": "lse", "attention": "q", "confidence": "logits", "select": "confidence", "step": "lse"}
    x[plain[name]] = x[plain[name]].as_subclass(Subclass)
    Subclass.seen.clear()
    actual = functions(backend)[name](x)
    assert heard(Subclass.seen) == names_of(name)
    for a, b in zip(*map(leaves, (actual, functions(backend)[name](y))), strict=True):
        same(torch.as_tensor(a).as_subclass(Tensor), b)


def test_a_pending_negation_is_seen(backend, device):
    """The imaginary part of a conjugate holds the negative of what its memory says."""
    x = inputs(device)
    scores = torch.complex(x["scores"], -x["scores"]).conj().imag
    assert scores.is_neg()
    arguments = (x["confidence"], x["masked"])
    same(
        select_tokens(scores, *arguments, tau=0.3, backend=backend),
        select_tokens(x["scores"], *arguments, tau=0.3, backend=backend),
    )
    lse = torch.complex(x["lse"], -x["lse"]).conj().imag
    for one in (slice(0, 1), slice(None)):  # of a single row, without a stride that tells
        q, k = x["q"][:1, :1, one], x["k"][:1, :1]
        given = (lse[:1, :1, one], x["lse"][:1, :1, one])
        same(*(column_scores(q, k, softmax_lse=y, backend=backend) for y in given))


@needs_extension
def test_the_extension_refuses_what_it_must_not_write():
    q = torch.ones(2, 1, 3, 8)
    how = Attention(None, None, None, None, "e", False, "sequence", True, "sum", False, False)
    for out in (torch.zeros(1, 3).expand(2, 3), torch.zeros(4).as_strided((2, 3), (1, 1))):
        arguments = map(extension._view, (out, Layer(q, q), Masks(), how))
        with pytest.raises(extension._C.Refused, match="out: expected elements that are apart in memory"):
            extension._C.column_scores(*arguments, (0, 1, 0, 0, 0, 0))
        assert not out.any()


@needs_extension
@pytest.mark.parametrize(("window", "side"), [((-2, 0), "left"), ((0, 1 << 62), "right")])
def test_the_extension_refuses_windows_without_meaning(window, side):
    q, out = torch.ones(2, 1, 3, 8), torch.zeros(2, 3)
    how = Attention(None, None, None, None, "e", False, "sequence", True, "sum", False, False, window)
    arguments = map(extension._view, (out, Layer(q, q), Masks(), how))
    with pytest.raises(extension._C.Refused, match=f"window_{side}: expected -1, or 0 to 2\\^62 - 1, got "):
        extension._C.column_scores(*arguments, (0, 1, 0, 0, 0, 0))
    assert not out.any()


@needs_extension
@pytest.mark.parametrize("start", [-1, (1 << 34) - 3])
def test_the_extension_refuses_a_start_without_noise(start):
    outputs = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), torch.zeros(2, 3), None
    sampling = Sampling("probability", 1.0, 7, None, start)
    arguments = map(extension._view, (outputs, torch.ones(2, 3, 4), None, sampling))
    with pytest.raises(extension._C.Refused, match=f"vocab_start: expected 0 to 17179869180, got {start}"):
        extension._C.token_confidence(*arguments, (0, 1, 0, 0, 0, 0))
    assert not any(x.any() for x in outputs[:3])


@needs_extension
def test_the_extension_has_the_same_limits():
    assert {"MAX_ROWS", "MAX_SCALE"} < extension._C.LIMITS.keys()
    assert {name: getattr(options, name) for name in extension._C.LIMITS} == extension._C.LIMITS


@needs_extension
def test_lists_of_layers_may_change_during_a_step(monkeypatch, request):
    """Another thread can take the lists apart: here, the method that tells of a negation does."""
    if not extension.READS_TENSORS:
        pytest.skip(f"torch {torch.__version__} lets no extension read its tensors")
    given = [(torch.randn(1, 1, 1, 8), torch.randn(1, 1, 4, 8), torch.zeros(1, 1, 1)) for _ in range(2)]
    layers = [[x.clone() for x in layer] for layer in given]
    kept = [weakref.ref(x) for layer in layers for x in layer]
    first = layers[0]
    alive = []

    def is_neg(x: Tensor) -> bool:
        if x.shape == (1, 1, 1):
            layers.clear()
            first.clear()
            alive.append([reference() is not None for reference in kept])
        return False

    request.addfinalizer(extension._find_flags)
    extension._C.find_flags([], 0)  # so that tensors are asked
    monkeypatch.setattr(Tensor, "is_neg", is_neg)
    tokens, logits = torch.full((1, 4), 10), torch.randn(1, 2, 11)
    options = {"block": slice(1, 3), "mask_token_id": 10}
    actual = decode_step(tokens.clone(), logits, layers, **options, backend="cpu")
    assert alive == [[True] * 6] * 2
    same(actual, decode_step(tokens, logits, given, **options, backend="cpu"))
