"""Bad input: an error that names the argument, before anything is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_sampler import (
    BackendUnavailableError,
    attention_map,
    column_scores,
    select_tokens,
    token_confidence,
    top_columns,
)
from attn_sampler.ops import is_plain

B, HQ, HKV, M, N, D, C, V, T = 2, 4, 2, 9, 12, 8, 4, 11, 12
FLOAT8 = torch.float8_e4m3fn


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def attention_arguments() -> dict[str, Any]:
    return {"q": torch.ones(B, HQ, M, D), "k": torch.ones(B, HKV, N, D), "columns": slice(4, 8)}


def step_arguments() -> dict[str, Any]:
    return {
        "tokens": torch.full((B, T), 3),
        "logits": torch.ones(B, C, V),
        "layers": [(torch.ones(B, HQ, M, D), torch.ones(B, HKV, N, D), zeros(B, HQ, M)) for _ in range(2)],
        "block": slice(4, 8),
        "mask_token_id": 3,
    }


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in tensors(v)] if isinstance(value, (list, tuple)) else []


#: An address, a dtype, a shape and strides are no tensor.
FIELDS = (4096, 4, (B, N), (N, 1))


#: More elements than there is memory for, in four bytes.
HUGE = torch.zeros(1, 1).expand(1 << 24, 1 << 24)


def rejects(
    function: Any, arguments: dict[str, Any], error: type[Exception], start: str, *words: str
) -> None:
    """The call raises this error; its message starts with the argument's name; no tensor changed."""
    given = [t for t in tensors(arguments) if t.device.type != "meta" and is_plain(t) and t is not HUGE]
    before = [t.detach().clone() for t in given]
    with pytest.raises(error) as caught:
        function(**arguments)
    message = str(caught.value)
    assert message.startswith(f"{start}:"), message
    for word in words:
        assert word in message, message
    for tensor, copy in zip(given, before, strict=True):
        if tensor.dtype == FLOAT8:  # torch does not compare it
            tensor, copy = tensor.view(torch.uint8), copy.view(torch.uint8)
        assert torch.equal(tensor.detach(), copy)


def in_float8(**more: Any) -> dict[str, Any]:
    return {"q": zeros(B, HQ, M, D, dtype=FLOAT8), "k": zeros(B, HKV, N, D, dtype=FLOAT8)} | more


ATTENTION = [
    ({"q_descale": zeros(B, HKV)}, ValueError, "q_descale", ["float8_e4m3fn", "float32"]),
    ({"k_descale": zeros(B, HKV)}, ValueError, "k_descale", ["float8_e4m3fn", "float32"]),
    (in_float8(k=zeros(B, HKV, N, D)), ValueError, "k", ["float8_e4m3fn", "float32"]),
    (in_float8(q_descale=zeros(B, HQ)), ValueError, "q_descale", ["[B, Hkv] = [2, 2]", "[2, 4]"]),
    (in_float8(k_descale=zeros(B, HKV, 1)), ValueError, "k_descale", ["2-dimensional"]),
    (in_float8(k_descale=zeros(B, HKV).double()), ValueError, "k_descale", ["float32", "float64"]),
    (in_float8(k_descale=zeros(B, HKV, device="meta")), ValueError, "k_descale", ["cpu", "meta"]),
    (in_float8(q_descale=1.0), TypeError, "q_descale", ["float"]),
    ({"q": [1.0]}, TypeError, "q", ["list"]),
    ({"q": zeros(B, HQ, M, D).to_sparse()}, ValueError, "q", ["dense", "sparse_coo"]),
    ({"q": torch.nested.nested_tensor([zeros(HQ, M, D)] * B)}, ValueError, "q", ["dense", "nested"]),
    ({"k": zeros(B, HKV, N, D).to_sparse()}, ValueError, "k", ["dense", "sparse_coo"]),
    ({"k": torch.nested.nested_tensor([zeros(HKV, N, D)] * B)}, ValueError, "k", ["dense", "nested"]),
    ({"k": zeros(B, HKV, N, D).to_mkldnn()}, ValueError, "k", ["dense", "_mkldnn"]),
    ({"softmax_lse": (zeros(B, HQ, M), None)}, TypeError, "softmax_lse", ["tuple"]),
    ({"softmax_lse": zeros(B, HQ, M).to_sparse()}, ValueError, "softmax_lse", ["dense", "sparse_coo"]),
    ({"key_mask": FIELDS}, TypeError, "key_mask", ["tuple"]),
    ({"query_mask": ((), (), (), ())}, TypeError, "query_mask", ["tuple"]),
    ({"q": zeros(HQ, M, D)}, ValueError, "q", ["4-dimensional", "[4, 9, 8]"]),
    ({"q": zeros(B, HQ, M, D, dtype=torch.int64)}, ValueError, "q", ["float32", "int64"]),
    ({"q": zeros(B, HQ, M, 0), "k": zeros(B, HKV, N, 0)}, ValueError, "q", ["D >= 1"]),
    ({"k": None}, TypeError, "k", ["NoneType"]),
    ({"k": zeros(B, N, D)}, ValueError, "k", ["4-dimensional"]),
    ({"k": zeros(B, HKV, N, D, dtype=torch.float16)}, ValueError, "k", ["float32", "float16"]),
    ({"k": zeros(B, HKV, N, D, device="meta")}, ValueError, "k", ["cpu", "meta"]),
    ({"k": zeros(B + 1, HKV, N, D)}, ValueError, "k", ["[2, 2, 12, 8]", "[3, 2, 12, 8]"]),
    ({"k": zeros(B, HKV, N, D + 1)}, ValueError, "k", ["[2, 2, 12, 8]", "[2, 2, 12, 9]"]),
    ({"k": zeros(B, 3, N, D)}, ValueError, "k", ["4 heads", "3"]),
    ({"k": zeros(B, 8, N, D)}, ValueError, "k", ["4 heads", "8"]),
    ({"k": zeros(B, 0, N, D)}, ValueError, "k", ["4 heads", "0"]),
    ({"k": zeros(B, HKV, 0, D), "columns": None}, ValueError, "columns", ["at least one"]),
    ({"columns": 5}, TypeError, "columns", ["slice", "int"]),
    ({"columns": slice(4, 4)}, ValueError, "columns", ["empty", "slice(4, 4, None)"]),
    ({"columns": slice(8, 4)}, ValueError, "columns", ["empty"]),
    ({"columns": slice(4, 13)}, ValueError, "columns", ["outside", "12"]),
    ({"columns": slice(-13, 4)}, ValueError, "columns", ["outside", "12"]),
    ({"columns": slice(0, 8, 2)}, ValueError, "columns", ["step 1", "step 2"]),
    ({"columns": slice(0.0, 8)}, TypeError, "columns.start", ["integer", "float"]),
    ({"columns": slice(0, torch.tensor(8))}, TypeError, "columns.stop", ["integer", "Tensor"]),
    ({"softmax_lse": zeros(B, HQ, M - 1)}, ValueError, "softmax_lse", ["[2, 4, 9]", "[2, 4, 8]"]),
    ({"softmax_lse": zeros(B, HKV, M)}, ValueError, "softmax_lse", ["[2, 4, 9]", "[2, 2, 9]"]),
    ({"softmax_lse": zeros(B, HQ, M, 1)}, ValueError, "softmax_lse", ["3-dimensional"]),
    (
        {"softmax_lse": zeros(B, HQ, M, dtype=torch.float16)},
        ValueError,
        "softmax_lse",
        ["float32", "float16"],
    ),
    (
        {"softmax_lse": zeros(B, HQ, M, dtype=torch.float64)},
        ValueError,
        "softmax_lse",
        ["float32", "float64"],
    ),
    ({"softmax_lse": zeros(B, HQ, M, device="meta")}, ValueError, "softmax_lse", ["cpu", "meta"]),
    ({"softmax_lse": zeros(B, HQ, M), "softmax_scope": "block"}, ValueError, "softmax_lse", ["block"]),
    ({"lse_base": "10"}, ValueError, "lse_base", ["e, 2", "'10'"]),
    ({"lse_base": 2}, ValueError, "lse_base", ["e, 2"]),
    ({"softmax_scale": float("nan")}, ValueError, "softmax_scale", ["finite", "nan"]),
    ({"softmax_scale": float("inf")}, ValueError, "softmax_scale", ["finite", "inf"]),
    ({"softmax_scale": 10**400}, ValueError, "softmax_scale", ["finite", "an integer of 1329 bits"]),
    ({"softmax_scale": -(10**5000)}, ValueError, "softmax_scale", ["finite", "an integer of"]),
    ({"softmax_scale": 2.4e38}, ValueError, "softmax_scale", ["finite", "2.35e+38", "2.4e+38"]),
    ({"softmax_scale": -1e300}, ValueError, "softmax_scale", ["finite", "-1e+300"]),
    ({"softmax_scale": "0.1"}, TypeError, "softmax_scale", ["finite number", "str"]),
    ({"causal": 1}, TypeError, "causal", ["True or False", "1"]),
    ({"window_size": 4}, TypeError, "window_size", ["tuple (left, right)", "int"]),
    ({"window_size": [4, 4]}, TypeError, "window_size", ["tuple (left, right)", "list"]),
    ({"window_size": (4,)}, TypeError, "window_size", ["tuple (left, right)", "1 of them"]),
    ({"window_size": None}, TypeError, "window_size", ["tuple (left, right)", "NoneType"]),
    ({"window_size": (4, True)}, TypeError, "window_size", ["integer", "bool"]),
    ({"window_size": (4.0, 4)}, TypeError, "window_size", ["integer", "float"]),
    ({"window_size": (-2, 4)}, ValueError, "window_size", ["integer in [-1,", "-2"]),
    ({"window_size": (4, 1 << 62)}, ValueError, "window_size", ["integer in [-1,", str(1 << 62)]),
    ({"window_size": (4, 1 << 64)}, ValueError, "window_size", ["integer in [-1,", str(1 << 64)]),
    ({"diagonal": None}, TypeError, "diagonal", ["True or False"]),
    ({"per_head": "no"}, TypeError, "per_head", ["True or False"]),
    ({"per_head": zeros(3)}, TypeError, "per_head", ["True or False"]),
    ({"key_mask": zeros(B, N)}, ValueError, "key_mask", ["bool", "float32"]),
    ({"key_mask": zeros(B, M, dtype=torch.bool)}, ValueError, "key_mask", ["[2, 12]", "[2, 9]"]),
    ({"key_mask": zeros(N, dtype=torch.bool)}, ValueError, "key_mask", ["2-dimensional"]),
    ({"key_mask": zeros(B, N, dtype=torch.bool, device="meta")}, ValueError, "key_mask", ["cpu", "meta"]),
    ({"query_mask": zeros(B, N, dtype=torch.bool)}, ValueError, "query_mask", ["[2, 9]", "[2, 12]"]),
    ({"query_mask": zeros(B, M, dtype=torch.uint8)}, ValueError, "query_mask", ["bool", "uint8"]),
    ({"query_start": 1.0}, TypeError, "query_start", ["integer", "float"]),
    ({"query_start": True}, TypeError, "query_start", ["integer", "bool"]),
    ({"query_start": 1 << 63}, ValueError, "query_start", ["integer in"]),
    ({"softmax_scope": "window"}, ValueError, "softmax_scope", ["sequence, block", "'window'"]),
    ({"backend": "gpu"}, ValueError, "backend", ["auto, cuda, triton, cpu, reference", "'gpu'"]),
]


@pytest.mark.parametrize("function", [column_scores, attention_map])
@pytest.mark.parametrize(("change", "error", "start", "words"), ATTENTION)
def test_attention(function, change, error, start, words):
    shape = (B, C) if function is column_scores else (B, M, C)
    arguments = attention_arguments() | {"out": torch.full(shape, 5.0)} | change
    rejects(function, arguments, error, start, *words)


@pytest.mark.parametrize(("change", "error", "start", "words"), [x for x in ATTENTION if x[2] != "per_head"])
def test_attention_of_top_columns(change, error, start, words):
    rejects(top_columns, attention_arguments() | {"count": 2} | change, error, start, *words)


@pytest.mark.parametrize("function", [column_scores, attention_map])
@pytest.mark.parametrize("per_head", [False, True])
def test_out(function, per_head):
    shape = [B, HQ, C] if per_head else [B, C]
    if function is attention_map:
        shape.insert(-1, M)
    arguments = attention_arguments() | {"per_head": per_head}
    for out, words in (
        (torch.ones(*shape, dtype=torch.float16), ["float32", "float16"]),
        (torch.ones(*shape, dtype=torch.float64), ["float32", "float64"]),
        (torch.ones(*shape[:-1], C + 1), [str(shape)]),
        (torch.ones(*shape, 1), ["dimensional"]),
        (torch.ones(*shape, device="meta"), ["cpu", "meta"]),
        (torch.ones(1, *shape[1:]).expand(*shape), ["apart in memory"]),
        (torch.ones(100).as_strided(shape, [1] * len(shape)), ["apart in memory"]),
        (torch.ones(100).as_strided(shape, [C - 1] * (len(shape) - 1) + [1]), ["apart in memory"]),
        (torch.ones(*shape, requires_grad=True), ["gradient"]),
        (torch.ones(*shape, dtype=torch.complex64).conj().imag, ["negation"]),
    ):
        rejects(function, arguments | {"out": out}, ValueError, "out", *words)
    rejects(function, arguments | {"out": [0.0]}, TypeError, "out", "list")


@pytest.mark.parametrize(
    "out",
    [
        torch.zeros(B, C),
        torch.zeros(C, B).T,
        torch.zeros(B, 2 * C - 1)[:, ::2],  # the rows are closer than C strides of a column
        torch.zeros(B, 3, C)[:, 1],
        torch.zeros(1000).as_strided((B, C), (1, 7)),
        torch.zeros(B, C + 3)[:, :C],
    ],
)
def test_views_that_can_be_written(out):
    arguments = attention_arguments() | {"softmax_scale": 0.3}
    expected = column_scores(**arguments)
    assert column_scores(**arguments, out=out) is out
    torch.testing.assert_close(out, expected)
    torch._dynamo.reset()
    compiled = torch.compile(column_scores, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(**arguments, out=out)
    torch.testing.assert_close(out, 2 * expected)


def test_column_scores_alone():
    arguments = attention_arguments() | {"reduction": "median"}
    rejects(column_scores, arguments, ValueError, "reduction", "sum, mean, max", "'median'")


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        (slice(3, 3), ValueError, ["empty"]),
        (slice(0, M + 1), ValueError, ["outside", "9 query rows"]),
        (slice(None, None, -1), ValueError, ["step 1"]),
        (range(3), TypeError, ["slice"]),
    ],
)
def test_attention_map_alone(rows, error, words):
    rejects(attention_map, attention_arguments() | {"rows": rows}, error, "rows", *words)


@pytest.mark.parametrize(
    ("change", "error", "start", "words"),
    [
        ({"logits": [[0.0]]}, TypeError, "logits", ["list"]),
        ({"logits": zeros(B, V)}, ValueError, "logits", ["3-dimensional", "[2, 11]"]),
        ({"logits": zeros()}, ValueError, "logits", ["3-dimensional", "[]"]),
        ({"logits": zeros(B, C, V).to_sparse()}, ValueError, "logits", ["dense", "sparse_coo"]),
        ({"temperature": 1.0, "seed": FIELDS}, TypeError, "seed", ["tuple"]),
        ({"logits": zeros(B, C, V, dtype=torch.int32)}, ValueError, "logits", ["float32", "int32"]),
        ({"logits": zeros(B, C, 0)}, ValueError, "logits", ["V = 0"]),
        ({"metric": "p"}, ValueError, "metric", ["probability, margin, entropy", "'p'"]),
        ({"temperature": -0.1}, ValueError, "temperature", [">= 0", "-0.1"]),
        ({"temperature": float("nan")}, ValueError, "temperature", ["nan"]),
        ({"temperature": float("inf")}, ValueError, "temperature", ["inf"]),
        ({"temperature": 10**400}, ValueError, "temperature", ["finite", "an integer of 1329 bits"]),
        ({"temperature": 1e-40, "seed": 1}, ValueError, "temperature", ["0 or at least", "1e-40"]),
        ({"temperature": "hot"}, TypeError, "temperature", ["str"]),
        ({"temperature": 1.0}, ValueError, "seed", ["temperature > 0"]),
        ({"temperature": 1.0, "seed": 1.5}, TypeError, "seed", ["integer", "float"]),
        ({"temperature": 1.0, "seed": 1 << 64}, ValueError, "seed", ["integer in"]),
        ({"temperature": 1.0, "seed": -(1 << 63) - 1}, ValueError, "seed", ["integer in"]),
        ({"seed": zeros(B)}, ValueError, "seed", ["int64", "float32"]),
        ({"seed": zeros(B + 1, dtype=torch.int64)}, ValueError, "seed", ["[2]", "[3]"]),
        ({"seed": zeros(B, 1, dtype=torch.int64)}, ValueError, "seed", ["1-dimensional"]),
        ({"seed": zeros(B, dtype=torch.int64, device="meta")}, ValueError, "seed", ["cpu", "meta"]),
        ({"exclude_token_id": V}, ValueError, "exclude_token_id", ["[0, 11)", "11"]),
        ({"exclude_token_id": -1}, ValueError, "exclude_token_id", ["[0, 11)", "-1"]),
        ({"exclude_token_id": 1.0}, TypeError, "exclude_token_id", ["integer"]),
        ({"exclude_token_id": True}, TypeError, "exclude_token_id", ["integer", "bool"]),
        ({"vocab_start": -1}, ValueError, "vocab_start", ["[0, 17179869174)", "-1"]),
        ({"vocab_start": (1 << 34) - V + 1}, ValueError, "vocab_start", ["[0, 17179869174)", "17179869174"]),
        ({"vocab_start": 1 << 70}, ValueError, "vocab_start", ["integer in"]),
        ({"vocab_start": -4, "temperature": 1.0, "seed": 1}, ValueError, "vocab_start", ["integer in", "-4"]),
        ({"vocab_start": 4.0}, TypeError, "vocab_start", ["integer", "float"]),
        ({"vocab_start": True}, TypeError, "vocab_start", ["integer", "bool"]),
        ({"vocab_start": None}, TypeError, "vocab_start", ["integer", "NoneType"]),
        ({"temperature": True, "seed": 1}, TypeError, "temperature", ["bool"]),
        ({"seed": True}, TypeError, "seed", ["integer", "bool"]),
        ({"metric": zeros(2).numpy()}, ValueError, "metric", ["probability, margin, entropy"]),
        ({"metric": b"margin"}, ValueError, "metric", ["b'margin'"]),
        ({"logits": zeros(B, C, 1), "exclude_token_id": 0}, ValueError, "exclude_token_id", ["only token"]),
        ({"backend": None}, ValueError, "backend", ["auto"]),
    ],
)
def test_token_confidence(change, error, start, words):
    rejects(token_confidence, {"logits": torch.ones(B, C, V)} | change, error, start, *words)


@pytest.mark.parametrize(
    ("change", "error", "start", "words"),
    [
        ({"scores": None}, TypeError, "scores", ["NoneType"]),
        ({"scores": zeros(C)}, ValueError, "scores", ["2-dimensional"]),
        ({"scores": zeros(B, C, dtype=torch.bfloat16)}, ValueError, "scores", ["float32", "bfloat16"]),
        ({"confidence": zeros(B, C + 1)}, ValueError, "confidence", ["[2, 4]", "[2, 5]"]),
        ({"confidence": zeros(B, C, dtype=torch.float64)}, ValueError, "confidence", ["float32", "float64"]),
        ({"confidence": zeros(B, C, device="meta")}, ValueError, "confidence", ["cpu", "meta"]),
        ({"scores": FIELDS}, TypeError, "scores", ["tuple"]),
        ({"masked": zeros(B, C)}, ValueError, "masked", ["bool", "float32"]),
        ({"masked": zeros(B, C, dtype=torch.bool).to_sparse()}, ValueError, "masked", ["dense"]),
        ({"masked": zeros(B, C - 1, dtype=torch.bool)}, ValueError, "masked", ["[2, 4]", "[2, 3]"]),
        ({"masked": zeros(B, C, dtype=torch.bool, device="meta")}, ValueError, "masked", ["cpu", "meta"]),
        ({"rule": "greedy"}, ValueError, "rule", ["parallel, sequential", "'greedy'"]),
        ({"tau": 1.1}, ValueError, "tau", ["[0, 1]", "1.1"]),
        ({"tau": -0.1}, ValueError, "tau", ["[0, 1]", "-0.1"]),
        ({"tau": float("nan")}, ValueError, "tau", ["nan"]),
        ({"tau": True}, TypeError, "tau", ["bool"]),
        ({"tau": "0.9"}, TypeError, "tau", ["str"]),
        ({"tau": 1.1, "rule": "sequential"}, ValueError, "tau", ["[0, 1]"]),
        ({"fallback": "none"}, ValueError, "fallback", ["confidence, score", "'none'"]),
        ({"backend": "numpy"}, ValueError, "backend", ["'numpy'"]),
    ],
)
def test_select_tokens(change, error, start, words):
    arguments = {
        "scores": torch.ones(B, C),
        "confidence": torch.ones(B, C),
        "masked": torch.ones(B, C, dtype=torch.bool),
    }
    rejects(select_tokens, arguments | change, error, start, *words)


def test_last_dimension_that_is_not_contiguous(backend, device):
    """Served by the reference; by the others refused, before anything is written."""
    q, k = torch.rand(B, HQ, M, D, device=device), torch.rand(B, HKV, N, D, device=device)
    transposed = torch.rand(B, HQ, D, M, device=device).transpose(2, 3)
    logits = torch.rand(B, V, C, device=device).transpose(1, 2)
    if backend == "reference":
        torch.testing.assert_close(
            column_scores(transposed, k, backend=backend),
            column_scores(transposed.contiguous(), k, backend=backend),
        )
        ids, _ = token_confidence(logits, backend=backend)
        assert torch.equal(ids, token_confidence(logits.contiguous(), backend=backend)[0])
        return
    out = torch.full((B, N), 5.0, device=device)
    for function, arguments in (
        (column_scores, {"q": transposed, "k": k, "out": out}),
        (column_scores, {"q": q[..., :4], "k": k[..., ::2], "out": out}),
        (token_confidence, {"logits": logits}),
    ):
        rejects(
            function,
            arguments | {"backend": backend},
            BackendUnavailableError,
            "backend",
            f"'{backend}'",
            "last dimension is contiguous",
            "contiguous()",
        )
