"""What the C++ CPU kernels promise beyond the contract, and corners of how they cut their work."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from attn_sampler import attention_map, collect_env, column_scores, token_confidence
from attn_sampler.backends import extension, unavailable

pytestmark = pytest.mark.skipif(unavailable("cpu") is not None, reason=str(unavailable("cpu")))


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


@pytest.mark.parametrize("function", [column_scores, attention_map])
@pytest.mark.parametrize("n_keys", [200, 1000, 9000, 30000])
@pytest.mark.parametrize("given_lse", [False, True])
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(function, n_keys: int, given_lse: bool) -> None:
    torch.manual_seed(0)
    batch = 9
    q, k = torch.randn(batch, 4, 5, 32), torch.randn(batch, 2, n_keys, 32)
    lse = torch.randn(batch, 4, 5) + 8 if given_lse else None
    columns = slice(3, 90) if function is attention_map or given_lse else None
    together = function(q, k, columns=columns, softmax_lse=lse, backend="cpu")
    for b in range(batch):
        one = slice(b, b + 1)
        alone = function(
            q[one], k[one], columns=columns, softmax_lse=None if lse is None else lse[one], backend="cpu"
        )
        assert torch.equal(_bits(alone), _bits(together[one]))


@pytest.mark.parametrize("metric", ["probability", "margin", "entropy"])
def test_a_position_has_the_same_confidence_alone_and_in_a_batch(metric: str) -> None:
    logits = torch.randn(20, 3, 40000, generator=torch.Generator().manual_seed(0))
    ids, confidence = token_confidence(logits, metric=metric, backend="cpu")
    for b in range(20):
        alone_ids, alone = token_confidence(logits[b : b + 1], metric=metric, backend="cpu")
        assert torch.equal(alone_ids[0], ids[b])
        assert torch.equal(_bits(alone[0]), _bits(confidence[b]))


@pytest.mark.parametrize("background", [0.0, -3e38, -math.inf, math.nan])
@pytest.mark.parametrize("peak", [[], [3e38, 3e38], [-3e38], [90.0, 90.5], [math.inf]])
@pytest.mark.parametrize("temperature", [2.0**-120, 0.01, 1.0, 1e30])
def test_sampling_where_few_tokens_can_win(background: float, peak: list[float], temperature: float) -> None:
    """Noise is worked out for the tokens that can still win only: they are found at every scale."""
    logits = torch.full((1, 4, 5000), background)
    for c, at in enumerate((0, 31, 2047, 4990)):
        logits[0, c, at : at + len(peak)] = torch.tensor(peak)
    options: dict = {"temperature": temperature, "seed": 7}
    for excluded in (None, 0, 4990):
        ids, _ = token_confidence(logits, backend="cpu", exclude_token_id=excluded, **options)
        expected, _ = token_confidence(logits, backend="reference", exclude_token_id=excluded, **options)
        assert torch.equal(ids, expected)


@pytest.mark.parametrize("n_keys", [4096, 32768])
@pytest.mark.parametrize("hidden", ["masked", "causal"])
def test_a_split_of_the_keys_that_no_row_sees(n_keys: int, hidden: str) -> None:
    """Logits far below the zero that an empty split starts from."""
    q, k = torch.ones(1, 1, 4, 16), torch.full((1, 1, n_keys, 16), -200.0)
    options: dict = {"causal": True, "query_start": 10}
    if hidden == "masked":
        options = {"key_mask": torch.arange(n_keys)[None] >= n_keys // 2}
    for function in (column_scores, attention_map):
        expected = function(q, k, backend="reference", **options)
        assert torch.isfinite(expected).all()
        torch.testing.assert_close(function(q, k, backend="cpu", **options), expected)


@pytest.mark.parametrize(
    "keys",
    [
        [-math.inf, 1.0, 2.0],
        [math.inf, 200.0, 0.0],
        [math.nan, 1.0, 2.0],
        [-math.inf, -math.inf, 0.0],
        [-math.inf, math.nan, -math.inf],
        [*[-math.inf] * 63, math.nan, 1.0, 2.0],
    ],
)
@pytest.mark.parametrize("reduction", ["sum", "max", "mean"])
@pytest.mark.parametrize("rows", [1, 3])
def test_keys_that_are_not_finite(keys: list[float], reduction: str, rows: int) -> None:
    q, k = torch.ones(1, 1, rows, 1), torch.tensor(keys).view(1, 1, -1, 1)
    expected = column_scores(q, k, reduction=reduction, backend="reference")
    torch.testing.assert_close(
        column_scores(q, k, reduction=reduction, backend="cpu"), expected, equal_nan=True
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [0.7, -0.7])
@pytest.mark.parametrize("function", [column_scores, attention_map])
def test_weights_of_large_logits_agree_with_their_sum(function, scale: float, causal: bool) -> None:
    """Products are exact here: no rounding of a logit may come between its weight and the log-sum-exp."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(1, 9, (1, 2, 40, 1), generator=generator).float()
    k = torch.randint(100_000, 100_003, (1, 1, 40, 1), generator=generator).float()
    options: dict = {"softmax_scale": scale, "causal": causal}
    expected = function(q.double(), k.double(), backend="reference", **options)
    scores = function(q, k, backend="cpu", **options)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("isa", "refusal", "line"),
    [
        ("avx2", None, "runs avx2"),
        ("amx", None, "runs amx, to which bfloat16 numbers below 2^-126 are 0"),
        ("avx512_bf16", "it says why", "runs avx512_bf16, without this processor's AMX: it says why"),
    ],
)
def test_the_report_tells_of_amx(isa: str, refusal: str | None, line: str) -> None:
    env = collect_env.collect_env()
    assert env["extension"]["cpu_isa"] == extension.cpu_isa()
    assert env["extension"]["cpu_amx_refusal"] == extension.cpu_amx_refusal()
    env["extension"] |= {"cpu_isa": isa, "cpu_amx_refusal": refusal}
    assert f"extension     {line}" in collect_env.format_env(env).splitlines()


def test_bfloat16_subnormals_count() -> None:
    """On the instruction sets of this place; not on the AMX unit, as is documented."""
    if extension.cpu_isa() == "amx":
        pytest.skip("to the AMX unit they are 0")
    small = torch.full((1, 1, 40, 32), 2.0**-130, dtype=torch.bfloat16)
    big = torch.zeros(1, 1, 40, 32, dtype=torch.bfloat16)
    big[0, 0, 1] = 2.0**120
    expected = attention_map(small, big, backend="reference", softmax_scale=256.0)
    torch.testing.assert_close(attention_map(small, big, backend="cpu", softmax_scale=256.0), expected)
    assert expected[0, 0, 1] > 0.5


def test_unknown_isa_is_refused_by_name() -> None:
    code = """
import torch, attn_sampler
q = torch.ones(1, 1, 2, 4)
print(attn_sampler.is_backend_supported("column_scores", "cpu", q).reason)
print(attn_sampler.column_scores(q, q).tolist())
attn_sampler.column_scores(q, q, backend="cpu")
"""
    environment = {**os.environ, "ATTN_SAMPLER_CPU_ISA": "sse9"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    reason = "ATTN_SAMPLER_CPU_ISA: expected one of "
    assert reason in done.stdout
    assert "portable here, got sse9" in done.stdout
    assert "[[1.0, 1.0]]" in done.stdout, "auto goes on to the reference"
    assert done.returncode == 1
    assert reason in done.stderr
