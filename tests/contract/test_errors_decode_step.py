"""Bad input of decode_step: an error that names the argument, before anything is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_errors import (
    FIELDS,
    FLOAT8,
    HKV,
    HQ,
    HUGE,
    B,
    C,
    D,
    M,
    N,
    T,
    V,
    in_float8,
    rejects,
    step_arguments,
    zeros,
)

from attn_sampler import (
    decode_step,
)


def layers(index: int, **change: Any) -> list[tuple[Any, ...]]:
    """Two layers, with q, k or lse of one of them replaced."""
    result = [dict(zip(("q", "k", "lse"), layer, strict=True)) for layer in step_arguments()["layers"]]
    result[index] |= change
    return [tuple(layer.values()) for layer in result]


@pytest.mark.parametrize(
    ("change", "error", "start", "words"),
    [
        ({"tokens": [3]}, TypeError, "tokens", ["list"]),
        ({"tokens": zeros(T, dtype=torch.int64)}, ValueError, "tokens", ["2-dimensional"]),
        ({"tokens": zeros(B, T, dtype=torch.int32)}, ValueError, "tokens", ["int64", "int32"]),
        (
            {"tokens": zeros(1, T, dtype=torch.int64).expand(B, T)},
            ValueError,
            "tokens",
            ["apart in memory"],
        ),
        ({"block": slice(4, 4)}, ValueError, "block", ["empty"]),
        ({"block": slice(4, T + 1)}, ValueError, "block", ["outside", "12"]),
        ({"block": 4}, TypeError, "block", ["slice"]),
        ({"block": slice(4, 9)}, ValueError, "logits", ["[2, 5, 11]", "[2, 4, 11]"]),
        ({"logits": zeros(B + 1, C, V)}, ValueError, "logits", ["[2, 4, 11]", "[3, 4, 11]"]),
        ({"logits": zeros(B, C, V, dtype=torch.int64)}, ValueError, "logits", ["int64"]),
        ({"logits": zeros(B, C, V, device="meta")}, ValueError, "logits", ["cpu", "meta"]),
        ({"logits": zeros(B, C, 1), "mask_token_id": 0}, ValueError, "logits", ["V = 1"]),
        ({"mask_token_id": V}, ValueError, "mask_token_id", ["[0, 11)", "11"]),
        ({"mask_token_id": -1}, ValueError, "mask_token_id", ["[0, 11)", "-1"]),
        ({"mask_token_id": None}, TypeError, "mask_token_id", ["integer"]),
        ({"mask_token_id": True}, TypeError, "mask_token_id", ["integer", "bool"]),
        ({"block": slice(True, 5)}, TypeError, "block.start", ["integer", "bool"]),
        ({"block": slice(4, 1 << 63)}, ValueError, "block", ["outside"]),
        ({"columns": slice(4, 8, True + 1)}, ValueError, "columns", ["step 2"]),
        ({"rule": "random"}, ValueError, "rule", ["parallel, sequential", "'random'"]),
        ({"tau": 2}, ValueError, "tau", ["[0, 1]"]),
        ({"fallback": ""}, ValueError, "fallback", ["confidence, score"]),
        ({"metric": "margins"}, ValueError, "metric", ["'margins'"]),
        ({"temperature": -1.0}, ValueError, "temperature", [">= 0"]),
        ({"temperature": 1.0}, ValueError, "seed", ["temperature > 0"]),
        ({"seed": zeros(B + 1, dtype=torch.int64)}, ValueError, "seed", ["[2]", "[3]"]),
        ({"query_rows": "some"}, ValueError, "query_rows", ["all, masked", "'some'"]),
        ({"query_rows": "masked", "query_start": -1}, ValueError, "query_rows", ["-1 to 7"]),
        ({"query_rows": "masked", "query_start": 4}, ValueError, "query_rows", ["4 to 12"]),
        ({"columns": slice(4, 9)}, ValueError, "columns", ["4", "5"]),
        ({"columns": slice(9, 13)}, ValueError, "columns", ["outside"]),
        ({"lse_base": "10"}, ValueError, "lse_base", ["'10'"]),
        ({"softmax_scale": None, "softmax_scope": "window"}, ValueError, "softmax_scope", ["'window'"]),
        ({"softmax_scale": float("inf")}, ValueError, "softmax_scale", ["finite"]),
        ({"softmax_scale": 10**400}, ValueError, "softmax_scale", ["finite"]),
        ({"temperature": 10**400, "seed": 1}, ValueError, "temperature", ["finite"]),
        ({"seed": 10**5000}, ValueError, "seed", ["an integer of"]),
        (
            {"tokens": zeros(2 * T - 1, dtype=torch.int64).as_strided((B, T), (T - 1, 1))},
            ValueError,
            "tokens",
            ["apart in memory", "[11, 1]"],
        ),
        ({"softmax_scope": "block"}, ValueError, "layers[0] softmax_lse", ["block"]),
        ({"causal": "yes"}, TypeError, "causal", ["True or False"]),
        ({"window_size": (0, -2)}, ValueError, "window_size", ["integer in [-1,", "-2"]),
        ({"diagonal": 0}, TypeError, "diagonal", ["True or False"]),
        ({"reduction": "min"}, ValueError, "reduction", ["'min'"]),
        ({"key_mask": zeros(B, N)}, ValueError, "key_mask", ["bool"]),
        ({"query_mask": zeros(B, N, dtype=torch.bool)}, ValueError, "query_mask", ["[2, 9]"]),
        ({"query_start": "0"}, TypeError, "query_start", ["integer"]),
        ({"backend": "c"}, ValueError, "backend", ["'c'"]),
        ({"layers": None}, TypeError, "layers, scores", ["none"]),
        ({"scores": zeros(B, C)}, TypeError, "layers, scores", ["both"]),
        (
            {"layers": None, "scores": zeros(B, C, device="cpu").requires_grad_()},
            ValueError,
            "scores",
            ["gradient"],
        ),
        ({"layers": None, "scores": zeros(1, C).expand(B, C)}, ValueError, "scores", ["apart in memory"]),
        ({"logits": zeros(V)}, ValueError, "logits", ["3-dimensional"]),
        ({"layers": ((zeros(B, HQ, M, D), None),)}, TypeError, "layers[0] k", ["NoneType"]),
        ({"layers": []}, TypeError, "layers", ["empty"]),
        ({"layers": [zeros(B, HQ, M, D)]}, TypeError, "layers[0]", ["(q, k, softmax_lse)"]),
        ({"layers": [(zeros(B, HQ, M, D),)]}, TypeError, "layers[0]", ["(q, k, softmax_lse)"]),
        ({"layers": [(*in_float8().values(), None, None)]}, TypeError, "layers[0]", ["(q, k, softmax_lse"]),
        (
            {"layers": [(*layer, zeros(B, HKV), None) for layer in layers(0)]},
            ValueError,
            "layers[0] q_descale",
            ["float8_e4m3fn"],
        ),
        (
            {"layers": [(*in_float8().values(), None, zeros(B, HKV), zeros(B, HQ))]},
            ValueError,
            "layers[0] k_descale",
            ["[2, 2]", "[2, 4]"],
        ),
        (
            {"layers": [(*in_float8().values(), None, zeros(B, HKV), None), (*in_float8().values(), None)]},
            ValueError,
            "layers",
            ["q_descale for all layers or for none", "1 of 2"],
        ),
        ({"logits": zeros(B, C, V, dtype=FLOAT8)}, ValueError, "logits", ["float32", "float8_e4m3fn"]),
        ({"layers": None, "scores": zeros(B, C + 1)}, ValueError, "scores", ["[2, 4]", "[2, 5]"]),
        (
            {"layers": None, "scores": zeros(B, C, dtype=torch.float64)},
            ValueError,
            "scores",
            ["float32", "float64"],
        ),
        ({"layers": None, "scores": zeros(B, C, device="meta")}, ValueError, "scores", ["cpu", "meta"]),
        ({"layers": None, "scores": zeros(B, C), "lse_base": "10"}, ValueError, "lse_base", ["'10'"]),
        ({"layers": None, "scores": zeros(B, C), "causal": 3}, TypeError, "causal", ["True or False"]),
        (
            {"layers": None, "scores": zeros(B, C), "softmax_scale": float("nan")},
            ValueError,
            "softmax_scale",
            ["finite"],
        ),
        (
            {"layers": None, "scores": zeros(B, C), "query_start": 1 << 62},
            ValueError,
            "query_start",
            ["integer in"],
        ),
        ({"layers": None, "scores": zeros(B, C).to_sparse()}, ValueError, "scores", ["dense", "sparse_coo"]),
        (
            {"layers": None, "scores": torch.ones(B, C, dtype=torch.complex64).conj().imag},
            ValueError,
            "scores",
            ["negation"],
        ),
        ({"layers": None, "scores": HUGE}, ValueError, "scores", ["[2, 4]"]),
        ({"layers": [((zeros(B, HQ, M, D),) * 2, zeros(B, HKV, N, D))]}, TypeError, "layers[0] q", ["tuple"]),
        ({"layers": [(zeros(B, HQ, M, D), FIELDS)]}, TypeError, "layers[0] k", ["tuple"]),
        (
            {"layers": layers(0, q=zeros(B, HQ, M, D, device="meta"))},
            ValueError,
            "layers[0] q",
            ["cpu", "meta"],
        ),
        ({"layers": layers(0, q=zeros(B + 1, HQ, M, D))}, ValueError, "layers[0] k", ["[3, 2, 12, 8]"]),
        ({"layers": layers(1, q=None)}, TypeError, "layers[1] q", ["NoneType"]),
        ({"layers": layers(1, q=zeros(D))}, ValueError, "layers[1] q", ["4-dimensional"]),
        ({"layers": layers(1, k=zeros(B, 3, N, D))}, ValueError, "layers[1] k", ["4 heads"]),
        ({"layers": layers(1, k=zeros(B, HKV, N + 1, D))}, ValueError, "layers[1] k", ["[2, 2, 12, 8]"]),
        ({"layers": layers(1, k=zeros(B, HKV, N, D, device="meta"))}, ValueError, "layers[1] k", ["meta"]),
        (
            {"layers": layers(1, q=zeros(B, HQ, M - 1, D), lse=zeros(B, HQ, M - 1))},
            ValueError,
            "layers[1] q",
            ["[2, 4, 9, 8]", "[2, 4, 8, 8]"],
        ),
        (
            {"layers": layers(1, q=zeros(B, HQ, M, 16), k=zeros(B, HKV, N, 16))},
            ValueError,
            "layers[1] q",
            ["[2, 4, 9, 8]", "[2, 4, 9, 16]"],
        ),
        (
            {"layers": layers(1, q=zeros(B, HQ, M, D).half(), k=zeros(B, HKV, N, D).half())},
            ValueError,
            "layers[1] q",
            ["float32", "float16"],
        ),
        ({"layers": layers(1, lse=zeros(B, HQ, M + 1))}, ValueError, "layers[1] softmax_lse", ["[2, 4, 9]"]),
        (
            {"layers": layers(1, q=zeros(B, HQ, M, D).to_sparse())},
            ValueError,
            "layers[1] q",
            ["dense", "sparse_coo"],
        ),
        ({"layers": layers(1, lse="none")}, TypeError, "layers[1] softmax_lse", ["str"]),
        ({"layers": layers(1, lse=None)}, ValueError, "layers", ["all layers or for none", "1 of 2"]),
        ({"layers": layers(0, lse=None)}, ValueError, "layers", ["all layers or for none", "1 of 2"]),
    ],
)
def test_decode_step(change, error, start, words):
    rejects(decode_step, step_arguments() | change, error, start, *words)


def test_the_batch_of_the_layers_is_that_of_the_tokens():
    arguments = step_arguments()
    arguments["layers"] = [(zeros(3, HQ, M, D), zeros(3, HKV, N, D), None)]
    rejects(decode_step, arguments, ValueError, "layers[0] q", "[2, 4, 9, 8]", "[3, 4, 9, 8]")
