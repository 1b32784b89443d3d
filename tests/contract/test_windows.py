"""Sliding windows, on every backend: small cases written out, and many keys against the reference."""

from __future__ import annotations

import pytest
import torch
from problems import AttentionProblem, judge, normal, row_lse
from torch import Tensor

from attn_sampler import attention_map, column_scores, decode_step

FAR = 1 << 62  # positions are of a magnitude below it


def uniform(device: torch.device) -> tuple[Tensor, Tensor]:
    """Three rows that weigh all of the five keys that they see alike."""
    return torch.zeros(1, 1, 3, 32, device=device), torch.zeros(1, 1, 5, 32, device=device)


# What the keys receive of rows at positions 1, 2 and 3, or from the query_start given.
WRITTEN_OUT = {
    "left": ({"window_size": (1, -1)}, [1 / 5, 9 / 20, 47 / 60, 47 / 60, 47 / 60]),
    "right": ({"window_size": (-1, 0)}, [1 / 2 + 1 / 3 + 1 / 4] * 2 + [1 / 3 + 1 / 4, 1 / 4, 0]),
    "both": ({"window_size": (1, 1)}, [1 / 3, 2 / 3, 1, 2 / 3, 1 / 3]),
    "own": ({"window_size": (0, 0)}, [0, 1, 1, 1, 0]),
    "own, dropped": ({"window_size": (0, 0), "diagonal": False}, [0] * 5),
    "causal": ({"window_size": (1, 3), "causal": True}, [1 / 2, 1, 1, 1 / 2, 0]),
    "causal, no left": ({"window_size": (-1, 3), "causal": True}, [13 / 12, 13 / 12, 7 / 12, 1 / 4, 0]),
    "mean": ({"window_size": (1, 1), "reduction": "mean"}, [1 / 3] * 5),
    "mean, own dropped": (
        {"window_size": (1, 1), "reduction": "mean", "diagonal": False},
        [1 / 3] * 5,
    ),
    "max": ({"window_size": (1, 0), "reduction": "max"}, [1 / 2] * 4 + [0]),
    "some columns": ({"window_size": (1, 0), "columns": slice(2, 5)}, [1, 1 / 2, 0]),
    "block": (
        {"window_size": (1, 0), "columns": slice(1, 4), "softmax_scope": "block"},
        [1 + 1 / 2, 1, 1 / 2],
    ),
    "two rows beyond": ({"window_size": (3, -1), "query_start": 7}, [0, 0, 0, 0, 1]),
    "two rows before": ({"window_size": (-1, 3), "query_start": -5}, [1, 0, 0, 0, 0]),
    "nothing": ({"window_size": (2, 3), "query_start": -10}, [0] * 5),
    "far before": (
        {"window_size": (0, FAR - 8), "query_start": 10 - FAR},
        [47 / 60] * 3 + [9 / 20, 1 / 5],
    ),
    "far beyond": (
        {"window_size": (FAR - 4, 0), "query_start": FAR - 3},
        [0, 1 / 4, 7 / 12, 13 / 12, 13 / 12],
    ),
    "as far as can be": ({"window_size": (FAR - 1, FAR - 1)}, [3 / 5] * 5),
}


@pytest.mark.parametrize("name", WRITTEN_OUT)
@pytest.mark.parametrize("with_lse", [False, True])
def test_written_out(backend, device, name, with_lse):
    options, expected = WRITTEN_OUT[name]
    options = {"query_start": 1, **options}
    q, k = uniform(device)
    if with_lse:
        if options.get("softmax_scope") == "block":
            return
        kept = {x: options[x] for x in ("window_size", "query_start", "causal") if x in options}
        options["softmax_lse"] = row_lse(q.cpu(), k.cpu(), **kept).to(device)
    assert column_scores(q, k, **options, backend=backend)[0].tolist() == pytest.approx(expected)
    if "reduction" not in options:
        table = attention_map(q, k, **options, backend=backend)[0]
        assert table.sum(dim=0).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("rows", ["all", "masked"])
def test_step(backend, device, rows):
    """Rows of the block alone, at positions 1, 2 and 3; the one at 2 is not masked."""
    q, k = uniform(device)
    tokens = torch.tensor([[5, 9, 5, 9, 5]], device=device)
    options = {"block": slice(1, 4), "mask_token_id": 9, "query_start": 1, "query_rows": rows}
    logits = torch.zeros(1, 3, 10, device=device)
    layers = [(q, k, None)] * 2
    result = decode_step(tokens, logits, layers, window_size=(1, 0), **options, backend=backend)
    expected = [2.0, 2.0, 1.0] if rows == "all" else [1.0, 1.0, 1.0]
    assert result.scores[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("window", [(3, 2), (60, -1), (-1, 30), (100, 0), (0, 170)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_and_columns(backend, device, window, dtype):
    """More than one of the widest tiles of rows and columns, some of which no row or no column reaches."""
    q, k = normal(0, 1, 2, 140, 40, dtype=dtype), normal(1, 1, 1, 300, 40, dtype=dtype)
    options = {"window_size": window, "query_start": 90}
    problem = AttentionProblem(q, k, options).to(device)
    judge("column_scores", backend, problem, reduction="mean", diagonal=False)
    judge("attention_map", backend, problem, rows=slice(5, 140), columns=slice(60, 250))
    lse = row_lse(q, k, **options).to(device)
    judge("column_scores", backend, problem, softmax_lse=lse, columns=slice(100, 290))


def test_keys_that_no_row_sees_are_not_looked_at(backend, device):
    q, k = normal(0, 1, 2, 5, 16), normal(1, 1, 1, 2600, 16)
    k[:, :, :1993], k[:, :, 2008:] = torch.nan, torch.inf
    problem = AttentionProblem(q, k, {"window_size": (7, 3), "query_start": 2000}).to(device)
    for options in ({"columns": slice(1990, 2012)}, {}):
        scores = judge("column_scores", backend, problem, **options)
        assert scores.sum().item() == pytest.approx(10.0)


def test_compiled(backend, device):
    """As one graph, for any window."""
    q, k = normal(0, 1, 2, 5, 16).to(device), normal(1, 1, 1, 9, 16).to(device)

    def scores(left: int, right: int) -> Tensor:
        return 2.0 * column_scores(q, k, window_size=(left, right), backend=backend)

    compiled = torch.compile(scores, fullgraph=True, backend="aot_eager")
    for window in ((-1, -1), (2, 1), (0, 3), (4, -1)):
        assert torch.equal(compiled(*window), scores(*window))
