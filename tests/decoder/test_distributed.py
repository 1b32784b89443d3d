"""Tensor parallelism: a step on 2 and 4 ranks against the same step in one process."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_cases import CASES, Case, adapters_step
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_sampler import distributed, stream, token_confidence
from attn_sampler.reference import StepResult

RANKS = 4
TIME_LIMIT = 100  # seconds


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of four processes computed, alone or in pairs, for all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    worker = Path(__file__).parents[1] / "support" / "distributed_worker.py"
    command = [sys.executable, str(worker)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(RANKS), str(folder)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        errors = [process.communicate(timeout=TIME_LIMIT)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * RANKS, "\n".join(errors)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    bits = {torch.float32: torch.int32}.get(a.dtype, a.dtype)
    return a.dtype == b.dtype and torch.equal(a.view(bits), b.view(bits))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_step(results: list[dict], name: str, ranks: int):
    whole = CASES[name].whole()
    for rank in range(RANKS):
        step = StepResult(*results[rank][name, ranks])
        first = results[rank // ranks * ranks][name, ranks]
        for field, value, of_first in zip(StepResult._fields, step, first, strict=True):
            same = value is of_first if value is None else same_bits(value, of_first)
            assert same, f"rank {rank} differs from the first in {field}"
        assert torch.equal(step.token_ids, whole.token_ids)
        assert torch.equal(step.selected, whole.selected)
        assert torch.equal(step.tokens, whole.tokens)
        torch.testing.assert_close(step.scores, whole.scores, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(step.confidence, whole.confidence, rtol=2e-6, atol=1e-6, equal_nan=True)
        assert (step.revised is None) == ("budget" not in CASES[name].options)
        if step.revised is not None:
            assert torch.equal(step.revised, whole.revised)
            assert torch.equal(step.budget, whole.budget)
            torch.testing.assert_close(step.current, whole.current, rtol=2e-6, atol=1e-6)
            torch.testing.assert_close(step.log_prob, whole.log_prob, rtol=2e-6, atol=1e-6)
            assert whole.revised.any()
    if CASES[name].tokens.numel():
        assert whole.selected.any()


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_confidence_is_as_exact_as_in_one_process(results: list[dict], name: str, ranks: int):
    case = CASES[name]
    metric = case.options.get("metric", "probability")
    exact = _exact_confidence(case, metric)
    whole, split = case.whole().confidence.double(), results[0][name, ranks][2].double()
    defined = ~exact.isnan()
    assert torch.equal(split.isnan(), ~defined)
    error = (split - exact)[defined].abs().amax() if defined.any() else 0.0
    whole_error = (whole - exact)[defined].abs().amax() if defined.any() else 0.0
    assert error <= 2.0 * whole_error + 1e-6


def _exact_confidence(case: Case, metric: str) -> Tensor:
    """In float64, of the tokens that one process takes."""
    mask = case.options["mask_token_id"]
    x = case.logits.double().clone()
    x[..., mask] = -torch.inf
    p = torch.softmax(x, dim=-1)
    if metric == "entropy":
        return torch.special.xlogy(p, p).sum(dim=-1)
    ids = case.whole().token_ids[..., None]
    chosen = p.gather(-1, ids).squeeze(-1)
    return chosen - p.scatter(-1, ids, 0.0).amax(dim=-1) if metric == "margin" else chosen


def test_cases_reach_what_they_are_for():
    sampled, greedy = CASES["margin, temperature 0.7"].whole(), CASES["margin, temperature 0.0"].whole()
    assert (sampled.token_ids != greedy.token_ids).any()
    assert (sampled.confidence < 0).any(), "a sampled token that is not the top one"
    tied = CASES["ties"]
    x = tied.logits.clone()
    x[..., tied.options["mask_token_id"]] = -torch.inf
    largest = x == x.amax(dim=-1, keepdim=True)
    assert (largest[..., :60].any(dim=-1) & largest[..., 60:].any(dim=-1)).any(), "a tie between ranks"
    undefined = CASES["probability, temperature 0.0, undefined"].whole().confidence
    assert undefined.isnan().tolist() == [
        [True, False, False, True, True, True, True, True],
        [False] * 8,
        [False] * 8,
    ]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_split_of_the_vocabulary(data: st.DataObject):
    """Any shares; ties, infinities and NaN; any temperature: what the ranks would gather, merged."""
    vocab = data.draw(st.integers(2, 24), label="vocabulary")
    cuts = data.draw(st.lists(st.integers(0, vocab), max_size=4), label="cuts")
    exclude = data.draw(st.none() | st.integers(0, vocab - 1), label="excluded")
    metric = data.draw(st.sampled_from(["probability", "margin", "entropy"]), label="metric")
    temperature = data.draw(st.sampled_from([0.0, 0.0, 1e-3, 0.7, 1.0, 50.0]), label="temperature")
    special = [-math.inf, -math.inf, math.nan, math.inf, 0.0, 1.0, 2.0, -300.0, 3e38, -3e38]
    values = st.sampled_from(special) | st.floats(-20.0, 20.0, width=32)
    rows = data.draw(st.lists(st.lists(values, min_size=vocab, max_size=vocab), min_size=3, max_size=3))
    logits = torch.tensor([rows])
    options = {"metric": metric, "temperature": temperature, "seed": data.draw(st.integers(0, 2**64 - 1))}
    options["current_ids"] = torch.tensor(
        [data.draw(st.lists(st.integers(-1, vocab), min_size=3, max_size=3))]
    )

    expected = token_confidence(logits, exclude_token_id=exclude, **options)
    bounds = [0, *sorted(cuts), vocab]
    shards = [
        distributed._Shard(logits[..., lo:hi], lo, vocab, exclude_token_id=exclude, backend="auto", **options)
        for lo, hi in itertools.pairwise(bounds)
    ]
    merged = shards[0].merge(torch.stack([torch.stack(shard.statistics()) for shard in shards]))
    assert torch.equal(merged.token_ids, expected.token_ids)
    for name in ("confidence", "log_prob", "current"):
        pair = getattr(merged, name), getattr(expected, name)
        torch.testing.assert_close(*pair, rtol=2e-6, atol=1e-6, equal_nan=True)


def test_sampling_costs_the_shard_alone():
    """The tokens before it would fill the memory."""
    logits, start = CASES["ties"].logits, (1 << 33) + 3
    drawn = {"temperature": 0.5, "seed": 4}
    shard = distributed._Shard(logits, start, 1 << 34, "probability", 0.5, 4, None, None, "auto")
    *_, token, logit, noisy = shard.statistics()
    ids, _ = token_confidence(logits, vocab_start=start, **drawn)
    noise = stream.gumbel_noise(logits.shape, 4, logits.device, start)
    assert torch.equal(token, (start + ids).double())
    assert torch.equal(logit, logits.gather(-1, ids[..., None]).squeeze(-1).double())
    assert torch.equal(noisy, (2.0 * logits + noise).amax(dim=-1).double())


def test_sum_scores(results: list[dict]):
    exact = sum(torch.full((2, 3), 0.1 * (rank + 1)).double() for rank in range(RANKS))
    for result in results:
        assert torch.equal(result["sum_scores", 4][0], exact.float())


def test_adapters_add_up_the_heads_of_all_ranks(results: list[dict]):
    tokens, scores = adapters_step(0, 1, None)
    assert (tokens != CASES["probability, temperature 0.0"].tokens).any()
    for result in results:
        assert torch.equal(result["adapters", 4][0], tokens)
        assert same_bits(result["adapters", 4][1], results[0]["adapters", 4][1])
        torch.testing.assert_close(result["adapters", 4][1], scores, rtol=1e-5, atol=1e-5)


@pytest.fixture
def one_rank(tmp_path: Path):
    dist.init_process_group("gloo", init_method=(tmp_path / "one").as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_token_confidence_on_one_rank(one_rank: None):
    logits = CASES["ties"].logits
    for metric in ("probability", "margin", "entropy"):
        options = {"metric": metric, "temperature": 0.5, "seed": 4, "exclude_token_id": 7}
        ids, confidence = distributed.token_confidence(logits, vocab_start=0, vocab_size=101, **options)
        expected_ids, expected = token_confidence(logits, **options)
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(confidence, expected, rtol=2e-6, atol=1e-6)


def test_given_scores_are_added_up(one_rank: None):
    case = CASES["bfloat16"]
    whole = case.whole()
    step = distributed.decode_step(
        case.tokens.clone(), case.logits, scores=whole.scores, vocab_start=0, vocab_size=101, **case.options
    )
    assert torch.equal(step.scores, whole.scores)
    assert torch.equal(step.tokens, whole.tokens)


def test_former_names(one_rank: None):
    case = CASES["bfloat16"]

    def run(layers: object = None, **options: object) -> StepResult:
        options |= {"vocab_start": 0, "vocab_size": 101, **case.options}
        return distributed.decode_step(case.tokens.clone(), case.logits, layers, **options)

    scores = case.whole().scores
    for old, new in (
        ({"rows": "masked"}, {"query_rows": "masked"}),
        ({"policy": "sequential"}, {"rule": "sequential"}),
        ({"layers": scores}, {"scores": scores}),
    ):
        given = {} if "layers" in old else {"layers": case.layers}
        with pytest.warns(DeprecationWarning, match=" now") as caught:
            step = run(**given, **old)
        assert [warning.filename for warning in caught] == [__file__]
        assert all(torch.equal(x, y) for x, y in zip(step[:5], run(**given, **new)[:5], strict=True))


@pytest.mark.parametrize("inference", [False, True])
def test_carries_no_gradient(one_rank: None, inference: bool):
    case = CASES["margin, temperature 0.7"]
    with torch.inference_mode(inference):
        logits = case.logits.clone().requires_grad_(not inference)
        layers = [tuple(x.clone().requires_grad_(not inference) for x in layer) for layer in case.layers]
        tokens = case.tokens.clone()
        step = distributed.decode_step(tokens, logits, layers, vocab_start=0, vocab_size=101, **case.options)
        assert torch.equal(step.tokens, case.whole().tokens)
        assert not any(field.requires_grad for field in step if field is not None)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vocab_start": -1}, "vocab_start: expected an integer in"),
        ({"vocab_start": 102}, "vocab_start: expected an integer in"),
        ({"vocab_size": 1}, "mask_token_id: expected an integer in"),
        ({"mask_token_id": 101}, "mask_token_id: expected an integer in"),
        ({"temperature": 0.5}, "seed: needed where temperature > 0"),
        ({"metric": "best"}, "metric: expected one of"),
        ({"backend": "gpu"}, "backend: expected one of"),
        ({"tau": 2.0}, "tau: expected a number in"),
        ({"block": slice(0, 5)}, r"logits: expected shape \[B, C, V\]"),
        ({"layers": None, "scores": torch.zeros(3, 7)}, r"scores: expected shape \[B, C\]"),
        ({"layers": []}, "layers: expected"),
        ({"layers": None}, "layers, scores: expected one of them, got none"),
        ({"scores": torch.zeros(3, 8)}, "layers, scores: expected one of them, got both"),
        ({"query_rows": "masked", "query_start": 15}, "query_rows: with 'masked'"),
    ],
)
def test_refuses_before_anything_is_sent(changed: dict, message: str):
    case = CASES["probability, temperature 0.0"]
    arguments = {"layers": case.layers, "vocab_start": 0, "vocab_size": 101, **case.options, **changed}
    tokens = case.tokens.clone()
    with pytest.raises((TypeError, ValueError), match=message):
        distributed.decode_step(tokens, case.logits, **arguments)
    assert torch.equal(tokens, case.tokens)


def test_needs_a_process_group():
    with pytest.raises(RuntimeError, match="is not initialised"):
        distributed.sum_scores(torch.zeros(1, 2))
