"""The choice of columns: on exact scores against a plain statement of it, on random ones within rounding."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from problems import ATTENTION_DTYPES, FLOAT8, RELATIVE_TOLERANCE, AttentionProblem, normal, random_attention
from test_paged_keys import in_pages, random_case
from torch import Tensor

from attn_sampler import (
    TopColumns,
    column_scores,
    reference,
    top_columns,
)
from attn_sampler.backends import triton

INF, NAN = math.inf, math.nan
POOLS = (None, ("max", 1), ("max", 3), ("max", 7), ("mean", 1), ("mean", 5), ("mean", 301))


def grouped(scores: Tensor, per: str, kv_heads: int) -> Tensor:
    """Scores per head [B, Hq, C] added up over the heads that share a choice."""
    groups = {"kv_head": kv_heads, "head": scores.shape[1], "all": 1}[per]
    return scores.reshape(len(scores), groups, scores.shape[1] // groups, -1).sum(dim=2)


def kept_of(present: list[bool], sinks: int, recent: int) -> list[int]:
    columns = [c for c, there in enumerate(present) if there]
    return sorted({*columns[:sinks], *columns[max(len(columns) - recent, 0) :]})


def pooled(scores: list[float], candidates: list[int], pool: tuple[str, int] | None) -> dict[int, float]:
    """The scores by which the candidates are chosen."""
    how, width = pool or ("max", 1)
    values = {}
    for c in candidates:
        window = [scores[i] for i in candidates if abs(i - c) <= width // 2]
        unknown = any(map(math.isnan, window))
        values[c] = NAN if unknown else max(window) if how == "max" else sum(window) / width
    return values


def choice(
    scores: list[float],
    present: list[bool],
    count: int,
    sinks: int,
    recent: int,
    pool: tuple[str, int] | None,
) -> list[tuple[int, float]]:
    """The columns and scores that one group of one sequence is answered."""
    kept = kept_of(present, sinks, recent)
    candidates = [c for c, there in enumerate(present) if there and c not in kept]
    values = pooled(scores, candidates, pool)
    order = sorted(candidates, key=lambda c: (math.isnan(values[c]), -values[c], c))
    if any(map(math.isnan, values.values())):  # of which no comparison tells anything
        order = sorted((c for c in candidates if not math.isnan(values[c])), key=lambda c: (-values[c], c))
        order += [c for c in candidates if math.isnan(values[c])]
    answer = [(c, scores[c]) for c in kept] + [(c, values[c]) for c in order]
    return (answer + [(-1, -INF)] * count)[:count]


# --- Exact scores.


def exact_problem(scores: Tensor, dtype: torch.dtype = torch.float32) -> AttentionProblem:
    """Scores [B, H, C] of whole numbers up to 31: so many of 31 rows give a column a weight of 1, the others
    of 0. NaN and infinity are those of a row that all columns of them are alone to see."""
    batch, heads, columns = scores.shape
    rows = torch.arange(32)
    q = torch.eye(32).expand(batch, heads, 32, 32)
    hidden = rows[:, None] >= scores[:, :, None, :].nan_to_num(0.0, 0.0)
    k = torch.zeros(batch, heads, columns, 32).masked_fill(hidden.transpose(2, 3), -448.0)
    lse = torch.zeros(batch, heads, 32)
    if not scores.isfinite().all():  # the last row gives 0 to all others
        k[..., 31] = -448.0
        k[..., 31] = torch.where(scores == INF, 300.0, torch.where(scores.isnan(), NAN, k[..., 31]))
    return AttentionProblem(q.to(dtype), k.to(dtype), {"softmax_lse": lse, "softmax_scale": 4.0})


def assert_exact(result: TopColumns, scores: Tensor, present: Tensor, first: int = 0, **how: Any) -> None:
    how = {"sinks": 0, "recent": 0, "pool": None, **how}
    assert result.positions.dtype == torch.int64
    assert result.scores.dtype == torch.float32
    assert result.positions.shape == result.scores.shape == (*scores.shape[:2], how["count"])
    for b in range(scores.shape[0]):
        for g in range(scores.shape[1]):
            expected = choice(scores[b, g].tolist(), present[b].tolist(), **how)
            positions = [c if c < 0 else first + c for c, _ in expected]
            assert result.positions[b, g].tolist() == positions, (b, g)
            values = torch.tensor([x for _, x in expected], dtype=torch.float32)
            torch.testing.assert_close(result.scores[b, g].cpu(), values, rtol=1e-6, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("dtype", ATTENTION_DTYPES)
@pytest.mark.parametrize("seed", range(12))
def test_exact_scores_with_many_ties(backend, device, dtype, seed):
    rng = random.Random(f"exact {seed}")
    columns = rng.choice((1, 2, 40, 70, 150))
    scores = torch.randint(
        0, rng.choice((2, 4, 32)), (2, 2, columns), generator=torch.Generator().manual_seed(seed)
    )
    present = torch.rand(2, columns, generator=torch.Generator().manual_seed(seed)) < rng.choice(
        (0.1, 0.7, 2.0)
    )
    count = rng.choice((1, columns, rng.randint(1, columns)))
    sinks = rng.choice((0, rng.randint(0, count)))
    how = {"count": count, "sinks": sinks, "recent": rng.randint(0, count - sinks), "pool": rng.choice(POOLS)}
    problem = exact_problem(scores.float(), dtype).to(device)
    result = problem.run(top_columns, key_mask=present.to(device), **how, backend=backend)
    assert_exact(result, scores, present, **how)
    everything = problem.run(top_columns, key_mask=present.to(device), per="all", **how, backend=backend)
    assert_exact(everything, scores.sum(dim=1, keepdim=True), present, **how)


@pytest.mark.parametrize("pool", [None, ("max", 3), ("mean", 3)])
def test_infinity_then_numbers_then_nan(backend, device, pool):
    scores = torch.tensor([[[3.0, NAN, 0.0, INF, 5.0, 5.0, NAN, INF, 0.0, 2.0, 1.0, 7.0]]])
    present = torch.ones(1, 12, dtype=torch.bool)
    for count in range(1, 13):
        for recent in (0, min(count, 6)):
            problem = exact_problem(scores).to(device)
            result = problem.run(top_columns, count=count, recent=recent, pool=pool, backend=backend)
            assert_exact(result, scores, present, count=count, recent=recent, pool=pool)
    without = problem.run(top_columns, count=12, backend=backend).positions
    assert without.tolist() == [[[3, 7, 11, 4, 5, 0, 9, 10, 2, 8, 1, 6]]]


def test_a_prefix_is_the_choice_of_fewer(backend, device):
    scores = torch.randint(0, 20, (1, 1, 90), generator=torch.Generator().manual_seed(0)).float()
    problem, how = exact_problem(scores).to(device), {"sinks": 3, "recent": 5, "pool": ("mean", 5)}
    whole = problem.run(top_columns, count=90, **how, backend=backend)
    for count in (8, 9, 40, 89):
        part = problem.run(top_columns, count=count, **how, backend=backend)
        assert torch.equal(part.positions, whole.positions[..., :count])
        assert torch.equal(part.scores, whole.scores[..., :count])


def test_fewer_present_than_wanted(backend, device):
    """Also none, and sinks and recent that meet."""
    scores = torch.tensor([[[4.0, 1.0, 3.0, 2.0]], [[4.0, 1.0, 3.0, 2.0]], [[4.0, 1.0, 3.0, 2.0]]])
    present = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]) == 1
    problem = exact_problem(scores).to(device)
    for how in ({}, {"sinks": 2, "recent": 2}, {"sinks": 1}, {"recent": 4}):
        result = problem.run(top_columns, count=4, key_mask=present.to(device), **how, backend=backend)
        assert_exact(result, scores, present, count=4, **how)
    assert (result.positions[1] == -1).all()
    assert (result.scores[1] == -INF).all()


def test_positions_are_those_of_the_keys(backend, device):
    """Of columns that start somewhere, and of sequences that end somewhere, whose keys lie in pages."""
    scores = torch.randint(0, 6, (2, 2, 48), generator=torch.Generator().manual_seed(1)).float()
    problem, everywhere = exact_problem(scores).to(device), torch.ones(2, 48, dtype=torch.bool)
    how = {"count": 9, "sinks": 2, "recent": 3}
    result = problem.run(top_columns, columns=slice(11, 40), **how, backend=backend)
    assert_exact(result, scores[..., 11:40], everywhere[:, 11:40], 11, **how)

    ends = torch.tensor([48, 20], dtype=torch.int32, device=device)
    options = {**problem.options, "seqlens_k": ends, "columns": slice(-30, None)}
    result = top_columns(problem.q, problem.k, **options, **how, backend=backend)
    for b, (first, end) in enumerate(((18, 48), (0, 20))):
        own = TopColumns(*(x[b : b + 1] for x in result))
        assert_exact(own, scores[b : b + 1, :, first:end], everywhere[:1, first:end], first, **how)
    cache, table = in_pages(random.Random(3), problem.k, 16, "NHD")
    paged = top_columns(problem.q, cache, **options, block_table=table, **how, backend=backend)
    assert all(map(torch.equal, paged, result))
    table[0, 1] = -1  # positions 16 to 31
    paged = top_columns(problem.q, cache, **options, block_table=table, **how, backend=backend)
    own = TopColumns(*(x[:1] for x in paged))
    present = everywhere[:1, 18:].clone()
    present[:, : 32 - 18] = False
    assert_exact(own, scores[:1, :, 18:], present, 18, **how)


def test_snapkv_by_its_own_words(backend, device):
    """The window's votes for the keys before it, pooled by torch, and the window itself."""
    window, kept, width = 8, 24, 5
    q, k = normal(0, 2, 4, window, 32).to(device), normal(1, 2, 4, 100, 32).to(device)
    logits = q @ k.transpose(2, 3) * 32**-0.5
    causal = torch.ones(window, window, dtype=torch.bool, device=device).triu(1)
    logits[..., -window:].masked_fill_(causal, -INF)
    votes = logits.softmax(dim=-1)[..., :-window].sum(dim=2)
    for how, pool in (("mean", torch.nn.functional.avg_pool1d), ("max", torch.nn.functional.max_pool1d)):
        expected = pool(votes, width, stride=1, padding=width // 2).topk(kept - window)
        result = top_columns(q, k, count=kept, causal=True, recent=window, pool=(how, width), backend=backend)
        assert result.positions[..., :window].tolist() == [[[*range(92, 100)]] * 4] * 2
        torch.testing.assert_close(result.scores[..., window:], expected.values)
        if how == "mean":  # maxima are often equal, and torch breaks ties as it likes
            assert torch.equal(result.positions[..., window:], expected.indices)


# --- Any scores.


def judge(
    given: AttentionProblem, plain: AttentionProblem, backend: str, ends: Tensor | None, **how: Any
) -> None:
    """The choice is right but for scores that are as close as roundings may move them."""
    count, per, pool = how["count"], how["per"], how["pool"]
    kv_heads, reduction = plain.k.shape[1], how["reduction"]
    specified = {"per_head": True, "reduction": reduction}
    truth = grouped(plain.double().run(reference.column_scores, **specified), per, kv_heads)
    same_precision = grouped(plain.run(reference.column_scores, **specified), per, kv_heads)
    result = given.run(top_columns, backend=backend, **how)
    groups, n_keys = truth.shape[1], plain.k.shape[2]
    assert result.positions.shape == result.scores.shape == (len(truth), groups, count)
    columns = range(n_keys)[plain.options.get("columns") or slice(None)]
    key_mask = plain.options.get("key_mask")
    known = ~truth.isnan()
    baseline = (same_precision - truth)[known].abs().max().item() if known.any() else 0.0
    largest = truth[known].abs().max().item() if known.any() else 0.0
    allowed = 2.0 * baseline + RELATIVE_TOLERANCE * largest
    for b in range(len(truth)):
        ahead = 0 if ends is None else n_keys - int(ends[b].clamp(0, n_keys))
        present = [True if key_mask is None else bool(key_mask[b, n]) for n in columns]
        kept = kept_of(present, how["sinks"], how["recent"])
        candidates = [c for c, there in enumerate(present) if there and c not in kept]
        total = len(kept) + len(candidates)
        for g in range(groups):
            scores = truth[b, g].tolist()
            values = pooled(scores, candidates, pool) | {c: scores[c] for c in kept}
            answers = result.scores[b, g].tolist()
            chosen = [n if n < 0 else n + ahead - columns.start for n in result.positions[b, g].tolist()]
            assert chosen[: len(kept)] == kept
            assert chosen[total:] == [-1] * (count - total)
            assert answers[total:] == [-INF] * (count - total)
            chosen, answers = chosen[:total], answers[:total]
            assert len({*chosen}) == len(chosen)
            assert {*chosen} <= {*kept, *candidates}
            for c, answer in zip(chosen, answers, strict=True):
                if math.isnan(values[c]):
                    assert math.isnan(answer)
                else:
                    assert abs(answer - values[c]) <= allowed
            rest = [*zip(answers, chosen, strict=True)][len(kept) :]
            for (x, c), (y, d) in itertools.pairwise(rest):
                assert x > y or (x == y and c < d) or (math.isnan(y) and (not math.isnan(x) or c < d))
            left = [values[c] for c in candidates if c not in chosen]
            most = max((x for x in left if not math.isnan(x)), default=-INF)
            assert not rest or most == -INF or most <= rest[-1][0] + 2 * allowed


def random_choice(seed: int, columns: int) -> dict[str, Any]:
    rng = random.Random(f"choice {seed}")
    count = rng.choice((1, columns, rng.randint(1, columns), rng.randint(1, columns)))
    sinks = rng.choice((0, 0, rng.randint(0, count)))
    return {
        "count": count,
        "per": ("kv_head", "head", "all")[seed % 3],
        "sinks": sinks,
        "recent": rng.choice((0, rng.randint(0, count - sinks))),
        "pool": rng.choice(POOLS),
        "reduction": rng.choice(("sum", "sum", "mean", "max")),
    }


@pytest.mark.parametrize("dtypes", [ATTENTION_DTYPES[:3], (FLOAT8,)], ids=["wide", "float8"])
@pytest.mark.parametrize("seed", range(40))
def test_random_problems(backend, device, seed, dtypes):
    problem = random_attention(seed, sizes=(1, 7, 63, 113), headdims=(32, 33, 64), dtypes=dtypes).to(device)
    columns = len(range(problem.k.shape[2])[problem.options.get("columns") or slice(None)])
    judge(problem, problem, backend, None, **random_choice(seed, columns))


@pytest.mark.parametrize("seed", range(40))
def test_random_problems_of_paged_keys(backend, device, seed):
    case = random_case(seed).to(device)
    columns = len(range(case.plain.k.shape[2])[case.plain.options.get("columns") or slice(None)])
    judge(
        case.given, case.plain, backend, case.given.options.get("seqlens_k"), **random_choice(seed, columns)
    )


@pytest.mark.parametrize("per", ["kv_head", "head", "all"])
def test_no_rows_and_no_sequences(backend, device, per):
    q, k = normal(0, 2, 4, 0, 32).to(device), normal(1, 2, 2, 9, 32).to(device)
    groups = {"kv_head": 2, "head": 4, "all": 1}[per]
    result = top_columns(q, k, count=5, per=per, recent=2, backend=backend)
    assert result.positions.tolist() == [[[7, 8, 0, 1, 2]] * groups] * 2
    assert (result.scores == 0.0).all()
    empty = top_columns(q[:0], k[:0], count=5, per=per, backend=backend)
    assert empty.positions.shape == empty.scores.shape == (0, groups, 5)


@pytest.mark.parametrize("per", ["kv_head", "head", "all"])
@pytest.mark.parametrize("with_lse", [False, True])
def test_same_bits_for_any_threads_and_batch(backend, device, per, with_lse):
    q, k = normal(0, 5, 4, 6, 32).to(device), normal(1, 5, 2, 3000, 32).to(device)
    lse = torch.full((5, 4, 6), 9.0, device=device) if with_lse else None
    how = {"count": 700, "per": per, "sinks": 4, "recent": 32, "pool": ("mean", 7), "backend": backend}
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 20):
            torch.set_num_threads(count)
            results.append(top_columns(q, k, softmax_lse=lse, **how))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
    for b in (0, 3):
        one = slice(b, b + 1)
        alone = top_columns(q[one], k[one], softmax_lse=lse if lse is None else lse[one], **how)
        assert all(torch.equal(x, y[one]) for x, y in zip(alone, results[0], strict=True))


def test_many_columns(backend, device):
    """Scores of many magnitudes, in the order in which a sort has them."""
    q, k = normal(0, 1, 1, 1, 8).to(device), 9 * normal(1, 1, 1, 40_000, 8).to(device)
    scores = column_scores(q, k, backend=backend)
    result = top_columns(q, k, count=40_000, backend=backend)
    expected = scores.sort(descending=True, stable=True)
    assert torch.equal(result.positions[:, 0], expected.indices)
    assert torch.equal(result.scores[:, 0], expected.values)


def test_more_scores_than_are_held_at_once(backend, device):
    q, k = normal(0, 1, 1, 1, 2).to(device), normal(1, 1, 1, 40_000, 2).to(device)
    alone = top_columns(q, k, count=30, backend=backend)
    result = top_columns(q.expand(250, 1, 1, 2), k.expand(250, 1, 40_000, 2), count=30, backend=backend)
    assert all(torch.equal(x, y.expand_as(x)) for x, y in zip(result, alone, strict=True))


# --- What is refused.


def arguments(**changes: Any) -> dict[str, Any]:
    return {
        "q": torch.ones(2, 4, 3, 8),
        "k": torch.ones(2, 2, 12, 8),
        "columns": slice(4, 10),
        "count": 4,
    } | changes


@pytest.mark.parametrize(
    ("change", "error", "start", "words"),
    [
        ({"count": 0}, ValueError, "count", ["[1,", "0"]),
        ({"count": -3}, ValueError, "count", ["-3"]),
        ({"count": 7}, ValueError, "count", ["6 columns", "7"]),
        ({"count": 1 << 70}, ValueError, "count", ["integer in"]),
        ({"count": 2.0}, TypeError, "count", ["integer", "float"]),
        ({"count": True}, TypeError, "count", ["integer", "bool"]),
        ({"count": None}, TypeError, "count", ["integer", "NoneType"]),
        ({"count": torch.tensor(3)}, TypeError, "count", ["integer", "Tensor"]),
        ({"per": "layer"}, ValueError, "per", ["kv_head, head, all", "'layer'"]),
        ({"per": None}, ValueError, "per", ["kv_head, head, all", "None"]),
        ({"per": ["head"]}, ValueError, "per", ["kv_head, head, all"]),
        ({"sinks": -1}, ValueError, "sinks", ["[0,", "-1"]),
        ({"sinks": 1.0}, TypeError, "sinks", ["integer", "float"]),
        ({"recent": -1}, ValueError, "recent", ["[0,", "-1"]),
        ({"recent": "4"}, TypeError, "recent", ["integer", "str"]),
        ({"sinks": 3, "recent": 2}, ValueError, "sinks, recent", ["count = 4", "3 and 2"]),
        ({"sinks": 5}, ValueError, "sinks, recent", ["count = 4", "5 and 0"]),
        ({"recent": (1 << 63) - 1}, ValueError, "sinks, recent", ["count = 4"]),
        ({"pool": "max"}, TypeError, "pool", ["tuple (how, width)", "str"]),
        ({"pool": 5}, TypeError, "pool", ["tuple (how, width)", "int"]),
        ({"pool": ["max", 5]}, TypeError, "pool", ["tuple (how, width)", "list"]),
        ({"pool": ("max",)}, TypeError, "pool", ["tuple (how, width)"]),
        ({"pool": ("avg", 5)}, ValueError, "pool", ["max, mean", "'avg'"]),
        ({"pool": (5, "max")}, ValueError, "pool", ["max, mean", "5"]),
        ({"pool": ("max", 4)}, ValueError, "pool", ["odd", "4"]),
        ({"pool": ("max", 0)}, ValueError, "pool", ["[1, 1024)", "0"]),
        ({"pool": ("mean", 1025)}, ValueError, "pool", ["[1, 1024)", "1025"]),
        ({"pool": ("mean", 5.0)}, TypeError, "pool", ["integer", "float"]),
        ({"columns": slice(4, 4)}, ValueError, "columns", ["empty"]),
        ({"q": torch.ones(2, 3, 3, 8)}, ValueError, "k", ["3 heads", "2"]),
        ({"k": torch.ones(2, 2, 12, 7)}, ValueError, "k", ["[2, 2, 12, 8]"]),
        ({"key_mask": torch.ones(2, 11) == 1}, ValueError, "key_mask", ["[2, 12]", "[2, 11]"]),
        ({"softmax_lse": torch.ones(2, 2, 3)}, ValueError, "softmax_lse", ["[2, 4, 3]"]),
        ({"reduction": "none"}, ValueError, "reduction", ["sum, mean, max", "'none'"]),
        ({"backend": "tpu"}, ValueError, "backend", ["'tpu'"]),
    ],
)
def test_bad_arguments(change, error, start, words):
    with pytest.raises(error) as caught:
        top_columns(**arguments(**change))
    message = str(caught.value)
    assert message.startswith(f"{start}:"), message
    assert all(word in message for word in words), message


def test_selection_by_one_key_is_the_order_by_sorting() -> None:
    """How the Triton backend chooses: by rank, score and column in one integer."""
    generator = torch.Generator().manual_seed(0)
    for width in (1, 7, 300):
        scores = torch.randn(2, 3, width, generator=generator).mul(4).round().div(4)  # ties, -0.0, negatives
        scores[0, 0, : width // 3] = -torch.inf
        scores[1, 1, : width // 4] = torch.inf
        scores[1, 2] = torch.rand(width, generator=generator) * 1e-40
        rank = torch.randint(0, 4, scores.shape, generator=generator)
        scores = scores.masked_fill(rank != 1, 0.0)
        for count in {1, width // 2 + 1, width}:
            expected = reference._ordered(rank, scores, count)
            assert torch.equal(triton._ordered(rank, scores, count), expected)
