"""Logits beyond float32's range, and so large that the logarithm of a sum is lost in them: by value,
everywhere.

Dot products are of a few numbers here, exact in every order. What softmax_scale makes of them need be no
float32: a row's weights are those of the differences.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attn_sampler import attention_map, column_scores, decode_step

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)

#: A query's element, keys' elements, scale, weights.
CASES = [
    (-1.0, [4.0, 8.0], 1e38, [1.0, 0.0]),
    (-1.0, [4.0, 4.0, 8.0], 1e38, [0.5, 0.5, 0.0]),
    (1.0, [4.0, 8.0, 8.0, 8.0, 8.0], 1e38, [0.0, 0.25, 0.25, 0.25, 0.25]),
    (1.0, [4.0, 8.0], -1e38, [1.0, 0.0]),
    (0.5, [-3.0, 4.0, 4.0], 2.3e38, [0.0, 0.5, 0.5]),
    (0.0, [-3.0, 4.0], 2.3e38, [0.5, 0.5]),
    (-1.0, [4.0, 4.0, 8.0], 1e30, [0.5, 0.5, 0.0]),
    (-1.0, [4.0, 4.0, 8.0], 1e12, [0.5, 0.5, 0.0]),
    (3.0, [0.375, 0.375, 0.5], 3e8, [0.0, 0.0, 1.0]),
    (-1.0, [4.0, 4.0, 8.0], 100.0, [0.5, 0.5, 0.0]),
]
#: With products as large as float32 has them.
WIDE = [
    (1e18, [1e18, -1e18, 2e18], 1e3, [0.0, 0.0, 1.0]),
    (1e18, [-1e18, -1e18, -2e18], 1e3, [0.5, 0.5, 0.0]),
    (1e18, [1e20, 1e20, 1e19], 1.0, [0.5, 0.5, 0.0]),
]


def vectors(values: list[float], headdim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[1, 1, len(values), headdim], zero but for the first elements."""
    x = torch.zeros(1, 1, len(values), headdim)
    x[..., 0] = torch.tensor(values)
    return x.to(device, dtype)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize(("headdim", "many"), [(1, 0), (32, 0), (32, 900)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_by_value(backend, device, dtype, headdim, many, rows):
    if backend == "triton" and device.type == "cpu":
        many = min(many, 200)  # interpreted, every tile takes its time
    for query, keys, scale, weights in CASES + (WIDE if dtype == torch.float32 else []):
        q = vectors([query] * rows, headdim, dtype, device)
        k = vectors([*keys, *[0.0] * many], headdim, dtype, device)
        count = len(keys)
        expected = torch.tensor(weights, device=device)
        options: dict = {
            "softmax_scale": scale,
            "columns": slice(0, count),
            "query_start": count,
            "backend": backend,
        }
        options["key_mask"] = (torch.arange(count + many, device=device) < count)[None]
        maps = [
            attention_map(q, k, **options),
            attention_map(q, k, **options, causal=True, diagonal=False, per_head=True)[:, 0],
        ]
        scores = [
            column_scores(q, k, **options) / rows,
            column_scores(q, k, **options, causal=True, reduction="mean"),
            column_scores(q, k, **options, reduction="max", per_head=True)[:, 0],
        ]
        if rows <= count:
            options["query_start"] = 0
            maps.append(attention_map(q, k, **options, softmax_scope="block"))
            scores.append(column_scores(q, k, **options, softmax_scope="block"))
        for result in (*maps, *scores):
            torch.testing.assert_close(result, expected.expand_as(result), rtol=1e-5, atol=0.0)


def test_a_step_scores_by_value(backend, device):
    for query, keys, scale, weights in CASES:
        q, k = (vectors(x, 16, torch.float32, device) for x in ([query], keys))
        count = len(keys)
        tokens = torch.full((1, count), 3, device=device)
        logits = torch.zeros(1, count, 5, device=device)
        step = decode_step(
            tokens,
            logits,
            [(q, k), (q, k)],
            block=slice(0, count),
            mask_token_id=3,
            softmax_scale=scale,
            backend=backend,
        )
        torch.testing.assert_close(
            step.scores[0], 2 * torch.tensor(weights, device=device), rtol=1e-5, atol=0.0
        )


@pytest.mark.parametrize("function", [column_scores, attention_map])
def test_what_is_not_finite_stays_so(backend, device, function):
    """Beside logits beyond float32: an infinite product makes the rest 0, a NaN makes the row NaN."""
    q = vectors([1.0], 16, torch.float32, device)
    for keys, expected in (
        ([4.0, -math.inf, 8.0], [0.0, 0.0, 1.0]),
        ([4.0, math.nan, 8.0], [math.nan] * 3),
        ([4.0, math.inf, 8.0], [0.0, math.nan, 0.0]),
        ([-math.inf] * 3, [0.0] * 3),
    ):
        k = vectors(keys, 16, torch.float32, device)
        k[..., 1:] = 0.0
        q1 = q.clone()
        q1[..., 1:] = 1.0  # 0 * inf is no part of the products
        result = function(q1, k, softmax_scale=1e38, backend=backend).flatten()
        torch.testing.assert_close(result, torch.tensor(expected, device=device), equal_nan=True)
