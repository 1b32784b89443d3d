"""The Triton kernels' own tests: what the contract's do not reach, and how many launches a call takes.

They run on the GPU where there is one, else in a place of their own, under ``TRITON_INTERPRET=1`` on CPU
tensors. There bfloat16 operands are widened to float32 on load, since the interpreter has no bfloat16
arithmetic; what a GPU does with them shows on a GPU alone.

Every workspace starts out poisoned, and parts may be small, so that whatever can be split is.
"""

from __future__ import annotations

import dataclasses
import importlib
import math

import pytest
import test_attention_map
import test_decode_step
import test_revision
import test_select_tokens
import test_token_confidence
import torch
import triton
import triton.language as tl
from attn_sampler.kernels import launch
from attn_sampler.kernels.decode_step import MAX_LAYERS
from attn_sampler.kernels.draws import MOST_NOISE, gumbel_noise
from problems import AttentionProblem, assert_accurate, generator, judge, normal, random_attention, row_lse
from test_decode_step import MASK, VOCAB, Step
from torch import Tensor

from attn_sampler import (
    attention_map,
    column_scores,
    decode_step,
    kernels,
    reference,
    stream,
    token_confidence,
)
from attn_sampler.options import MAX_HEADDIM

pytestmark = [
    pytest.mark.slow,
    pytest.mark.places("triton", "triton@interpreter"),
    pytest.mark.usefixtures("backend"),
]

DEVICE = torch.device("cpu" if launch.INTERPRET else "cuda")
NAN, INF = math.nan, math.inf
needs_gpu = pytest.mark.skipif(launch.INTERPRET, reason="no GPU here: CUDA graphs need one")


@pytest.fixture(autouse=True)
def poisoned_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every workspace starts as NaN (or a large count): what a kernel reads, it must have written."""
    allocate = launch.workspace

    def poisoned(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return allocate(device, *shape, dtype=dtype).fill_(NAN if dtype.is_floating_point else 0x7FFFFFF0)

    monkeypatch.setattr(launch, "workspace", poisoned)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = launch.parts
    monkeypatch.setattr(
        launch, "parts", lambda programs, units, least: parts(programs, units, max(1, least // 4))
    )


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched."""
    launched: list[str] = []
    start = launch.launch

    def counted(kernel, *args, **kwargs):  # type: ignore[no-untyped-def]
        launched.append(kernel.__name__)
        start(kernel, *args, **kwargs)

    monkeypatch.setattr(launch, "launch", counted)
    return launched


@pytest.fixture
def small_vocabulary_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several splits of the steps' small vocabulary."""
    for shape_class in ("narrow", "float32"):
        small = launch.Config(1, 16, 4, 1)
        monkeypatch.setitem(launch.TABLE, ("token_confidence", "any", shape_class), small)


# --- Column scores and attention map.


@pytest.mark.parametrize("seed", range(80, 112))
def test_random_column_scores(seed: int) -> None:
    problem = random_attention(seed, headdims=(3, 16, 40, 192, 512)).to(DEVICE)
    reduction = ("sum", "mean", "max", "sum")[seed % 4]
    judge("column_scores", "triton", problem, reduction=reduction, per_head=seed % 5 == 0)


@pytest.mark.parametrize("seed", range(1000, 1018))
def test_random_attention_maps(seed: int) -> None:
    test_attention_map.test_random_problems("triton", DEVICE, seed)


#: Number of heads, key heads, rows and keys, the columns, and options.
SPLITS = {
    "rows": (1, 1, 700, 720, (600, 613), {}),
    "rows of packed heads": (7, 1, 65, 70, (3, 40), {}),
    "heads": (6, 6, 20, 70, (3, 40), {}),
    "keys": (2, 2, 4, 600, (590, 600), {"softmax_lse": None}),
    "many columns": (2, 1, 40, 200, (0, 200), {}),
    "block beyond one tile": (1, 1, 160, 200, (20, 170), {"softmax_scope": "block", "softmax_lse": None}),
}


@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
@pytest.mark.parametrize("name", SPLITS)
def test_splits_combine(name: str, reduction: str) -> None:
    heads, kv_heads, n_rows, n_keys, columns, options = SPLITS[name]
    for seed in (1, 2):
        q, k = normal(seed, 1, heads, n_rows, 16), normal(seed + 9, 1, kv_heads, n_keys, 16)
        options = {"causal": seed == 2, "columns": slice(*columns), **options}
        options.setdefault("softmax_lse", row_lse(q, k, causal=options["causal"]))
        problem = AttentionProblem(q, k, options).to(DEVICE)
        judge("column_scores", "triton", problem, reduction=reduction)


@pytest.mark.parametrize("causal", [False, True])
def test_heads_of_a_map_combine(causal: bool) -> None:
    q, k = normal(1, 2, 8, 16, 32), normal(2, 2, 2, 40, 32)
    judge("attention_map", "triton", AttentionProblem(q, k, {"causal": causal}).to(DEVICE))


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "diagonal"])
def test_parts_of_reduced_rows_combine(reduction: str, per_head: bool) -> None:
    """Of heads and of tiles of columns, which the window of some rows does not meet."""
    q, k = normal(1, 1, 2, 20, 16), normal(2, 1, 1, 300, 16)
    for window in ((-1, -1), (60, 20)):
        mask = (torch.arange(200) % 3 > 0)[None]
        options = {"columns": slice(80, 280), "query_start": 250, "window_size": window, "column_mask": mask}
        problem = AttentionProblem(q, k, options).to(DEVICE)
        judge("attention_map", "triton", problem, reduction=reduction, per_head=per_head)


@pytest.mark.parametrize("reduction", ["sum", "max"])
def test_same_bits_every_run(reduction: str) -> None:
    rows, times = (20, 1) if launch.INTERPRET else (130, 20)  # interpreted, one order is all there is
    q, k = normal(3, 2, 4, rows, 16).to(DEVICE), normal(4, 2, 2, rows + 10, 16).to(DEVICE)
    first = column_scores(q, k, reduction=reduction, backend="triton")
    for _ in range(times):
        assert torch.equal(column_scores(q, k, reduction=reduction, backend="triton"), first)


def alone(x: Tensor, index: int) -> Tensor:
    return x[index : index + 1].clone()


#: Sequences beside the one that is compared: interpreted, every program takes its time.
BATCH = 2 if launch.INTERPRET else 64


@pytest.mark.parametrize(("reduction", "per_head"), [("sum", False), ("mean", True), ("max", False)])
def test_scores_are_the_same_bits_in_any_batch(reduction: str, per_head: bool) -> None:
    """However many programs the others take: rows, heads and keys are cut as if a sequence were alone."""
    q, k = normal(1, BATCH, 4, 20, 16).to(DEVICE), normal(2, BATCH, 2, 270, 16).to(DEVICE)
    options = {"columns": slice(200, 210), "per_head": per_head, "reduction": reduction, "backend": "triton"}
    together = column_scores(q, k, **options)
    assert torch.equal(column_scores(alone(q, 1), alone(k, 1), **options), together[1:2])


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_maps_are_the_same_bits_in_any_batch(reduction: str) -> None:
    q, k = normal(1, BATCH, 4, 10, 16).to(DEVICE), normal(2, BATCH, 2, 130, 16).to(DEVICE)
    options = {"columns": slice(10, 130), "reduction": reduction, "backend": "triton"}
    together = attention_map(q, k, **options)
    assert torch.equal(attention_map(alone(q, 1), alone(k, 1), **options), together[1:2])


def test_predictions_are_the_same_bits_in_any_batch() -> None:
    logits = normal(3, BATCH, 2, 9000).to(DEVICE)
    together = token_confidence(logits, metric="entropy", backend="triton")
    own = token_confidence(alone(logits, 1), metric="entropy", backend="triton")
    for a, b in zip(own[:3], together[:3], strict=True):
        assert torch.equal(a, b[1:2])


@pytest.mark.usefixtures("small_vocabulary_tiles")
def test_steps_are_the_same_bits_in_any_batch_and_layer_by_layer() -> None:
    block, batch = slice(10, 18), BATCH
    tokens, logits = torch.full((batch, 20), MASK, device=DEVICE), normal(4, batch, 8, VOCAB).to(DEVICE)
    layers = [
        (normal(seed, batch, 2, 20, 16).to(DEVICE), normal(seed + 9, batch, 1, 20, 16).to(DEVICE))
        for seed in range(2)
    ]
    together = decode_step(tokens.clone(), logits, layers, block=block, mask_token_id=MASK, backend="triton")
    own = decode_step(
        alone(tokens, 1),
        alone(logits, 1),
        [(alone(q, 1), alone(k, 1)) for q, k in layers],
        block=block,
        mask_token_id=MASK,
        backend="triton",
    )
    for a, b in zip(own[:5], together[:5], strict=True):
        assert torch.equal(a, b[1:2])
    scores = torch.zeros_like(own.scores)
    for q, k in layers:
        column_scores(alone(q, 1), alone(k, 1), columns=block, out=scores, backend="triton")
    assert torch.equal(scores, own.scores)


def test_counters_are_left_at_zero_and_forgotten_by_a_failed_launch() -> None:
    q, k = normal(1, 1, 4, 20, 16).to(DEVICE), normal(2, 1, 2, 20, 16).to(DEVICE)
    expected = column_scores(q, k, backend="triton")
    counters = launch.tickets(DEVICE, 1)
    assert launch.tickets(DEVICE, 1) is counters
    assert not counters.any()
    counters.fill_(1)
    with pytest.raises(Exception):  # noqa: B017, PT011 (the interpreter's, or the compiler's)
        launch.launch(_noise_kernel, 1, {}, launch.Config(1, 1, 4, 1), device=DEVICE)
    assert launch.tickets(DEVICE, 1) is not counters
    assert torch.equal(column_scores(q, k, backend="triton"), expected)
    assert launch.tickets(DEVICE, 10**5).numel() >= 10**5


def test_cost_is_bounded_by_the_columns(names: list[str]) -> None:
    """With the log-sum-exp given, keys outside the columns are not read, and one launch does it."""
    q, k = normal(5, 2, 4, 16, 64), normal(6, 2, 2, 63, 64)
    options = {"columns": slice(30, 41), "softmax_lse": row_lse(q, k)}
    problem = AttentionProblem(q, k, options).to(DEVICE)
    expected = problem.run(column_scores, backend="triton")
    problem.k[:, :, :30], problem.k[:, :, 41:] = NAN, NAN
    names.clear()
    assert torch.equal(problem.run(column_scores, backend="triton"), expected)
    assert names == ["column_scores_kernel"]


@pytest.mark.parametrize("with_lse", [True, False])
@pytest.mark.parametrize("reduction", ["sum", "max"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_visible_nan_and_infinity(value: float, reduction: str, with_lse: bool) -> None:
    q, k = normal(12, 2, 2, 16, 40), normal(13, 2, 1, 63, 40)
    options = {"columns": slice(40, 60), "causal": True}
    if with_lse:
        options["softmax_lse"] = row_lse(q, k, causal=True)
    problem = AttentionProblem(q, k, options).to(DEVICE)
    problem.k[0, 0, 50, 3] = value  # one of the columns
    problem.k[1, 0, 10, 3] = value  # a key outside them
    actual = problem.run(column_scores, reduction=reduction, backend="triton")
    expected = problem.run(reference.column_scores, reduction=reduction)
    assert not expected.isfinite().all()
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_offsets_beyond_32_bits() -> None:
    """Rows and keys over 2**31 elements apart."""
    far = (1 << 30) + 8
    memory = torch.empty(2 * far + 64, dtype=torch.float16, device=DEVICE)
    near = normal(0, 1, 1, 3, 32, dtype=torch.float16).to(DEVICE)
    x = memory.as_strided((1, 1, 3, 32), (far, far, far, 1))
    x.copy_(near)
    assert torch.equal(*(column_scores(tensor, tensor, backend="triton") for tensor in (near, x)))


# --- Token confidence and selection.


@pytest.mark.parametrize("seed", range(12))
def test_random_logits(seed: int) -> None:
    test_token_confidence.test_random_problems("triton", DEVICE, 9001, seed)


def test_one_token_stands_out() -> None:
    """The winner in every lane, at the edge of every tile, and tied with a later one."""
    places = [0, 1, 3, 1023, 1024, 4095, 4096, 8191, 8192, 9000]
    logits = torch.zeros(1, len(places), 9001, device=DEVICE)
    for row, place in enumerate(places):
        logits[0, row, place] = 3.0
        logits[0, row, -1] = 3.0
    token_ids, value = token_confidence(logits, metric="margin", backend="triton")
    assert token_ids.tolist() == [places]
    assert value[0, :-1].abs().max() == 0.0  # tied
    assert value[0, -1] > 0.0


@triton.jit
def _noise_kernel(out, seeds, position, GROUPS: tl.constexpr):
    group = tl.arange(0, 4)[:, None] * (GROUPS // 4) + tl.arange(0, GROUPS // 4)[None, :]
    noise = gumbel_noise(tl.load(seeds), position, group)
    token = tl.arange(0, 4)[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    tl.store(out + token, noise)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, 123456789123])
def test_noise_is_equal_to_the_last_bit(seed: int) -> None:
    out = torch.full((4 * 1024,), NAN, device=DEVICE)
    launch.launch(
        _noise_kernel,
        1,
        {"out": out, "seeds": torch.tensor([seed], device=DEVICE), "position": 5, "GROUPS": 1024},
        launch.Config(1, 1, 4, 1),
        device=DEVICE,
        fuse_multiply_add=False,
    )
    expected = stream.gumbel_noise((1, 6, 4 * 1024), seed, DEVICE)[0, 5]
    assert torch.equal(out.view(torch.int32), expected.contiguous().view(torch.int32))


def test_no_noise_is_above_the_largest() -> None:
    """exponential(w) grows with w, but for its rounding, and it is the more than 2^-16 from word 2^16 on."""
    first = stream.gumbel(torch.arange(1 << 17, dtype=torch.int64))
    rest = stream.gumbel(torch.randint(1 << 17, 1 << 32, (1 << 17,), generator=generator(3)))
    assert first.max() == first[0] == MOST_NOISE.value
    assert max(first[1 << 16 :].max(), rest.max()) < MOST_NOISE.value - 10


@pytest.mark.skipif(not launch.INTERPRET, reason="a compiled kernel calls nothing")
@pytest.mark.usefixtures("small_vocabulary_tiles")
def test_noise_is_made_where_it_may_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten tiles, those up to a token that stands out, and all of a flat row."""
    made: list[int] = []

    def counted(*arguments):  # type: ignore[no-untyped-def]
        made.append(1)
        return gumbel_noise(*arguments)

    module = importlib.import_module("attn_sampler.kernels.token_confidence")
    monkeypatch.setattr(module, "gumbel_noise", counted)
    monkeypatch.setattr(launch, "parts", lambda programs, units, least: 1)
    for place, expected in ((None, 10), (20, 2), (159, 10)):
        logits = torch.zeros(1, 1, 160)
        if place is not None:
            logits[0, 0, place] = 60.0
        for temperature in (1.0, torch.ones(1)):
            made.clear()
            how = {"temperature": temperature, "seed": 1, "metric": "margin"}
            ours = token_confidence(logits, backend="triton", **how)
            theirs = token_confidence(logits, backend="reference", **how)
            assert torch.equal(ours[0], theirs[0])
            torch.testing.assert_close(ours[1:3], theirs[1:3])
            assert len(made) == expected


@pytest.mark.parametrize("start", [0, 1, 1202, 1203, 2**31, 2**34 - 8192])
def test_a_vocabulary_shard_in_splits_of_whole_tiles(start: int) -> None:
    test_token_confidence.test_a_shard_may_start_anywhere("triton", DEVICE, start, 8192)


def test_selection_of_several_chunks() -> None:
    test_select_tokens.test_blocks("triton", DEVICE, 2500)


def test_predictions_of_current_tokens_in_splits() -> None:
    options = {"vocab": 9001, "metric": "margin", "dtype": torch.float32}
    test_revision.test_predictions_tell_of_the_current_tokens("triton", DEVICE, **options)


# --- Decoding steps.


@pytest.mark.usefixtures("small_vocabulary_tiles")
@pytest.mark.parametrize("seed", range(100, 132))
def test_random_decode_steps(seed: int, names: list[str]) -> None:
    test_decode_step.test_random_steps("triton", DEVICE, seed, test_decode_step.DTYPES)
    assert names[0] == "token_partials_kernel"
    assert names[-1] == "column_scores_kernel"
    assert len(names) == len(set(names)) <= 3


@pytest.mark.parametrize("seed", range(132, 138))
def test_decode_step_finished_in_a_launch_of_its_own(
    seed: int, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "last_program_commits", lambda device: False)
    test_decode_step.test_random_steps("triton", DEVICE, seed, test_decode_step.DTYPES)
    assert names[-2:] == ["column_scores_kernel", "commit_kernel"]


REVISION = {"replace_tau": 0.6, "remask_tau": 0.2, "max_revisions": 9}


@pytest.mark.usefixtures("small_vocabulary_tiles")
@pytest.mark.parametrize(
    ("rule", "fallback", "in_kernel", "revision"),
    [
        ("parallel", "confidence", True, {}),
        ("parallel", "score", False, {}),
        ("sequential", "score", True, {}),
        ("parallel", "confidence", False, REVISION),
        ("threshold", "score", True, REVISION),
    ],
)
def test_decode_step_of_several_chunks(
    rule: str, fallback: str, in_kernel: bool, revision: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "last_program_commits", lambda device: in_kernel)
    batch = 1 if launch.INTERPRET and rule != "sequential" else 2  # of a minute's work, half
    tokens = torch.randint(VOCAB, (batch, 340), generator=generator(0))
    tokens[torch.rand(tokens.shape, generator=generator(1)) < 0.6] = MASK
    layers = [(normal(2, batch, 2, 340, 16).to(DEVICE), normal(3, batch, 1, 340, 16).to(DEVICE), None)]
    logits = (4.0 * normal(4, batch, 300, VOCAB)).to(DEVICE)
    options = {"block": slice(20, 320), "mask_token_id": MASK, "tau": 0.7}
    step = Step(tokens.to(DEVICE), logits, layers, {**options, "rule": rule, "fallback": fallback})
    plain = step.copy().run(reference.decode_step)
    more = [
        {**revision, "budget": torch.full((batch, 300), 2, dtype=torch.int32, device=DEVICE)}
        if revision
        else {}
        for _ in range(2)
    ]
    expected = step.double().run(reference.decode_step, **more[0])
    result = step.run(backend="triton", **more[1])
    assert_accurate(result.confidence, plain.confidence, expected.confidence)
    for name in ("tokens", "selected", *(("revised", "budget") if revision else ())):
        assert torch.equal(getattr(result, name), getattr(expected, name))
    assert not revision or (result.revised > 0).sum(dim=1).tolist() == [9] * batch


def test_many_layers_take_no_more_launches(names: list[str]) -> None:
    step = test_decode_step.small_step(DEVICE, tau=0.3)
    count = 24 if launch.INTERPRET else MAX_LAYERS
    step = dataclasses.replace(step, layers=[step.layers[index % 3] for index in range(count)])
    truth, plain = (x.run(reference.decode_step) for x in (step.double(), step.copy()))
    result = step.run(backend="triton")
    assert_accurate(result.scores, plain.scores, truth.scores)
    assert len(names) <= 3


@pytest.mark.usefixtures("small_vocabulary_tiles")
def test_decode_step_same_bits_every_run() -> None:
    step = test_decode_step.random_step(51, DEVICE)
    first, *others = (
        step.copy().run(backend="triton", remask_tau=0.5, budget=torch.ones_like(step.logits[..., 0]).int())
        for _ in range(3 if launch.INTERPRET else 20)
    )
    for other in others:
        for a, b in zip(other, first, strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


@needs_gpu
def test_captured_step_replays_with_changed_inputs() -> None:
    """A graph of the step, replayed after its inputs changed, does what an eager step does."""
    step = test_decode_step.small_step(DEVICE, tau=0.3)
    given, budget = step.tokens.clone(), torch.full_like(step.logits[..., 0], 2).int()
    how = {"remask_tau": 0.5, "max_revisions": 1, "backend": "triton"}
    step.copy().run(budget=budget.clone(), **how)  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step.run(budget=budget, **how)
    for seed in range(3):
        g = torch.Generator(DEVICE).manual_seed(seed)
        for x in (step.logits, *(x for q, k, _ in step.layers for x in (q, k))):
            x.copy_(torch.randn(x.shape, generator=g, device=DEVICE))
        for _ in range(2):  # a replay leaves nothing behind that the next one trips over
            step.tokens.copy_(given)
            budget.fill_(2)
            graph.replay()
        expected = dataclasses.replace(step, tokens=given.clone()).run(
            budget=torch.full_like(budget, 2), **how
        )
        for a, b in zip(captured, expected, strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


# --- What they refuse, and how the head dimension is cut.


def test_refusals_have_reasons() -> None:
    q = torch.zeros(1, 1, 2, 16, device=DEVICE)
    assert kernels.refuses("column_scores", ()) is None
    assert kernels.refuses("column_scores", (q, q)) is None
    wide = torch.zeros(1, 1, 2, 520, device=DEVICE)
    assert kernels.refuses("column_scores", (wide, wide)) == (
        "it serves head dimensions up to 512, and this one is 520"
    )
    logits = torch.zeros(1, 2, 9, device=DEVICE)
    assert kernels.refuses("decode_step", (logits, *[q] * 256)) is None
    assert kernels.refuses("decode_step", (logits, *[q] * 258)) == (
        "it serves up to 128 layers in a step, and these are 129"
    )


def test_chunks_of_the_head_dimension_cover_it_with_little_padding() -> None:
    for headdim in range(1, MAX_HEADDIM + 1):
        for size in (2, 4):
            block = launch.block_d(headdim, size)
            padded = math.ceil(headdim / block) * block
            assert headdim <= padded < headdim + 64
    assert [launch.block_d(d, 2) for d in (64, 96, 128, 192, 256, 512)] == [64, 32, 128, 64, 128, 128]
