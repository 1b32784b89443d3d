"""The attention map of every backend against the reference in float64;
and the reference against the definition.
"""

from __future__ import annotations

import math

import pytest
import torch
from problems import (
    ATTENTION_DTYPES,
    DTYPES,
    FLOAT8,
    AttentionProblem,
    judge,
    normal,
    random_attention,
    row_lse,
)

from attn_sampler import attention_map, column_scores, reference
from attn_sampler.backends import REGISTRY
from attn_sampler.options import Attention, Layer, Masks, Span


@pytest.mark.parametrize("seed", range(1000, 1050))
def test_random_problems(backend, device, seed):
    problem = random_attention(seed).to(device)
    n_rows = problem.q.shape[2]
    rows = (None, slice(n_rows // 3, n_rows // 3 + 1), slice(n_rows // 2, n_rows))[seed % 3]
    judge("attention_map", backend, problem, rows=rows, per_head=seed % 4 == 0)


@pytest.mark.parametrize("seed", range(3000, 3020))
def test_random_float8_problems(backend, device, seed):
    problem = random_attention(seed, dtypes=(FLOAT8,)).to(device)
    judge("attention_map", backend, problem, per_head=seed % 4 == 0)


@pytest.mark.parametrize("seed", range(2000, 2012))
def test_its_sums_over_rows_are_the_column_scores(backend, device, seed):
    problem = random_attention(seed).to(device)
    for per_head in (False, True):
        torch.testing.assert_close(
            problem.run(attention_map, per_head=per_head, backend=backend).sum(dim=-2),
            problem.run(column_scores, per_head=per_head, backend=backend),
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.parametrize("dtype", ATTENTION_DTYPES)
def test_rows_over_all_keys_sum_to_one(backend, device, dtype):
    q, k = normal(0, 2, 4, 9, 40, dtype=dtype).to(device), normal(1, 2, 2, 21, 40, dtype=dtype).to(device)
    weights = attention_map(q, k, per_head=True, backend=backend)
    assert (weights >= 0.0).all()
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 4, 9, device=device))
    torch.testing.assert_close(attention_map(q, k, backend=backend), weights.sum(dim=1))


def test_rows_stand_at_their_key_positions(backend, device):
    """A slice of rows keeps the positions that causality and the diagonal go by."""
    q, k = normal(0, 1, 2, 9, 40).to(device), normal(1, 1, 2, 21, 40).to(device)
    options = {"causal": True, "diagonal": False, "columns": slice(10, 21), "backend": backend}
    whole = attention_map(q, k, **options)
    torch.testing.assert_close(attention_map(q, k, rows=slice(4, 7), **options), whole[:, 4:7])
    row, column = torch.meshgrid(torch.arange(12, 21), torch.arange(10, 21), indexing="ij")
    assert torch.equal(whole[0].cpu() != 0.0, column < row)


def test_out_is_added_into(backend, device):
    q, k = normal(0, 2, 4, 9, 40).to(device), normal(1, 2, 2, 21, 40).to(device)
    storage = torch.full((2, 9, 50), 3.0, device=device)
    out = storage[..., 4:46:2]
    result = attention_map(q, k, out=out, backend=backend)
    assert result is out
    torch.testing.assert_close(out, 3.0 + attention_map(q, k, backend=backend))
    untouched = torch.ones(50, dtype=torch.bool)
    untouched[4:46:2] = False
    assert (storage[..., untouched] == 3.0).all()


@pytest.mark.parametrize("per_head", [False, True])
def test_every_element_of_the_output_is_written(backend, device, per_head):
    q, k = normal(0, 2, 4, 9, 40).to(device), normal(1, 2, 2, 21, 40).to(device)
    key_mask = torch.rand(2, 21, generator=torch.Generator().manual_seed(0)).to(device) < 0.5
    out = torch.full((2, 4, 5, 11) if per_head else (2, 5, 11), torch.nan, device=device)
    how = (12, 40**-0.5, "e", True, "sequence", True, "none", per_head, False)
    options = Attention(Span(6, 17), Span(2, 7), *how)
    REGISTRY[backend].function("attention_map")(out, Layer(q, k), Masks(key_mask), options)
    expected = attention_map(
        q,
        k,
        rows=slice(2, 7),
        columns=slice(6, 17),
        causal=True,
        key_mask=key_mask,
        per_head=per_head,
        backend=backend,
    )
    assert torch.equal(out, expected)


@pytest.mark.parametrize("with_lse", [False, True])
def test_twenty_reruns_give_the_same_bits(backend, device, with_lse):
    q, k = normal(0, 2, 4, 20, 96, dtype=torch.bfloat16), normal(1, 2, 2, 70, 96, dtype=torch.bfloat16)
    options = {"columns": slice(30, 70), "softmax_lse": row_lse(q, k).to(device) if with_lse else None}
    q, k = q.to(device), k.to(device)
    first = attention_map(q, k, backend=backend, **options)
    for _ in range(20):
        assert torch.equal(attention_map(q, k, backend=backend, **options), first)


def test_no_sequences(backend, device):
    q, k = torch.zeros(0, 4, 9, 40, device=device), torch.zeros(0, 2, 21, 40, device=device)
    assert attention_map(q, k, backend=backend).shape == (0, 9, 21)


@pytest.mark.parametrize("seed", range(100))
def test_the_reference_is_the_definition(seed):
    """Entry by entry, in plain Python."""
    problem = random_attention(
        seed,
        sizes=(1, 3, 5),
        headdims=(1, 3),
        groups=(1, 2),
        dtypes=(FLOAT8,) if seed % 4 == 0 else DTYPES,
    ).double()
    actual = problem.run(reference.attention_map, per_head=True)
    expected = torch.tensor(_definition(problem), dtype=torch.float64).reshape(actual.shape)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12, equal_nan=True)
    scores = problem.run(reference.column_scores, per_head=True)
    torch.testing.assert_close(scores, expected.sum(dim=2), rtol=1e-10, atol=1e-12)
    largest = expected.amax(dim=2)
    torch.testing.assert_close(problem.run(reference.column_scores, reduction="max", per_head=True), largest)


def _definition(problem: AttentionProblem) -> list:
    q, k, options = problem.q.tolist(), problem.k.tolist(), problem.options
    heads, kv_heads, n_rows, headdim = *problem.q.shape[1:2], *problem.k.shape[1:2], *problem.q.shape[2:]
    n_keys = problem.k.shape[2]
    lo, hi, _ = options.get("columns", slice(None)).indices(n_keys)
    start = n_keys - n_rows if options["query_start"] is None else options["query_start"]
    scale = options["softmax_scale"] or headdim**-0.5
    block = options["softmax_scope"] == "block"
    left, right = options.get("window_size", (-1, -1))

    def visible(b: int, i: int, j: int) -> bool:
        at = start + i
        return (
            (options["key_mask"] is None or bool(options["key_mask"][b, j]))
            and (options["query_mask"] is None or bool(options["query_mask"][b, i]))
            and (j <= at or not options["causal"])
            and (left < 0 or at - j <= left)
            and (right < 0 or j - at <= right)
            and (not block or (lo <= at < hi and lo <= j < hi))
        )

    def logit(b: int, h: int, i: int, j: int) -> float:
        kv_head = h // (heads // kv_heads)
        product = scale * sum(x * y for x, y in zip(q[b][h][i], k[b][kv_head][j], strict=True))
        for name in ("q_descale", "k_descale"):
            product *= options[name][b, kv_head].item() if name in options else 1.0
        return product

    def weight(b: int, h: int, i: int, j: int) -> float:
        if not visible(b, i, j) or (not options["diagonal"] and j == start + i):
            return 0.0
        if "softmax_lse" in options:
            base = 2.0 if options["lse_base"] == "2" else math.e
            return math.exp(logit(b, h, i, j)) / base ** options["softmax_lse"][b, h, i].item()
        total = sum(math.exp(logit(b, h, i, n)) for n in range(n_keys) if visible(b, i, n))
        return math.exp(logit(b, h, i, j)) / total

    return [
        [[[weight(b, h, i, j) for j in range(lo, hi)] for i in range(n_rows)] for h in range(heads)]
        for b in range(problem.q.shape[0])
    ]
