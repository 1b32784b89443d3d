"""Predicted tokens, bit for bit, and their confidence in float64, of every backend."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from problems import DTYPES, assert_accurate, normal
from torch import Tensor

from attn_sampler import reference, stream, token_confidence
from attn_sampler.backends import REGISTRY
from attn_sampler.options import Sampling

METRICS = ("probability", "margin", "entropy")
INF, NAN = torch.inf, torch.nan


def judge(backend: str, logits: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Tokens equal to the reference's, confidence as near to float64 as PyTorch's."""
    token_ids, confidence = token_confidence(logits, backend=backend, **options)
    expected_ids, same_precision = reference.token_confidence(logits, **options)
    true_ids, truth = reference.token_confidence(logits.double(), **options)
    assert token_ids.dtype == torch.int64
    assert torch.equal(token_ids, expected_ids)
    assert torch.equal(token_ids, true_ids)  # exact arithmetic finds the same ties
    assert_accurate(confidence, same_precision, truth)
    return token_ids, confidence


def random_logits(seed: int, vocab: int, dtype: torch.dtype) -> Tensor:
    """[3, 5, V], every other position of a wider tensor; few distinct values in some, specials in others."""
    rng = random.Random(seed)
    storage = torch.full((3, 10, vocab + 3), NAN, dtype=dtype)
    logits = storage[:, ::2, 2 : 2 + vocab]
    logits.copy_(normal(seed, 3, 5, vocab) * rng.choice((0.1, 3.0, 10.0)))
    if rng.random() < 0.4:
        logits.round_()
    specials = rng.choice(([], [], [-INF], [NAN], [INF], [-INF, NAN, INF]))
    for row in range(15):
        for value in specials:
            for _ in range(rng.randint(0, max(1, vocab // 2))):
                logits[row // 5, row % 5, rng.randrange(vocab)] = value
    if rng.random() < 0.3:
        logits[1] = -INF
    return logits


@pytest.mark.parametrize("vocab", [1, 2, 7, 63, 1000, 4097])
@pytest.mark.parametrize("seed", range(12))
def test_random_problems(backend, device, vocab, seed):
    logits = random_logits(seed, vocab, DTYPES[seed % 3]).to(device)
    options = {"metric": METRICS[(seed // 3) % 3], "temperature": (0.0, 0.7, 0.0, 1.0, 30.0)[seed % 5]}
    if options["temperature"]:
        rows = torch.tensor([5, -1, 1 << 62], device=device)
        options["seed"] = (3, rows, -(1 << 63), (1 << 63) - 1)[seed % 4]
    if vocab > 1 and seed % 2:
        options["exclude_token_id"] = (0, vocab - 1, vocab // 2)[seed % 3]
    judge(backend, logits, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_vocabulary_of_a_real_model(backend, device, dtype, temperature):
    logits = normal(0, 1, 3, 126464, dtype=dtype).mul(4).to(device)
    for metric in METRICS:
        judge(backend, logits, metric=metric, temperature=temperature, seed=11, exclude_token_id=126336)


@pytest.mark.parametrize("metric", METRICS)
def test_known_values(backend, device, metric):
    p = torch.tensor([[[0.2, 0.5, 0.3], [0.25, 0.25, 0.5], [1.0, 0.0, 0.0]]], device=device)
    token_ids, confidence = token_confidence(p.log(), metric=metric, backend=backend)
    assert token_ids.tolist() == [[1, 2, 0]]
    expected = {
        "probability": [0.5, 0.5, 1.0],
        "margin": [0.2, 0.25, 1.0],
        "entropy": [-1.0296530140645737, -1.0397207708399179, 0.0],
    }[metric]
    assert confidence[0].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("row", "excluded", "token", "defined"),
    [
        ([1.0, 3.0, 3.0, 3.0], None, 1, True),
        ([3.0, 1.0, 3.0, 3.0], 0, 2, True),
        ([-0.0, 0.0, -1.0, -2.0], None, 0, True),
        ([NAN, 1.0, 2.0, 0.0], None, 2, False),
        ([NAN, NAN, NAN, NAN], None, 0, False),
        ([NAN, NAN, NAN, NAN], 0, 1, False),
        ([0.0, INF, 1.0, INF], None, 1, False),
        ([0.0, INF, NAN, 1.0], None, 1, False),
        ([-INF, -INF, -INF, -INF], None, 0, False),
        ([-INF, -INF, -INF, -INF], 0, 1, False),
        ([-INF, -INF, -5.0, -INF], None, 2, True),
        ([-INF, NAN, -INF, -INF], None, 0, False),
        ([INF, 1.0, 2.0, 0.0], 0, 2, True),
        ([NAN, 1.0, 2.0, 2.0], 0, 2, True),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_and_specials(backend, device, row, excluded, token, defined, dtype):
    logits = torch.tensor([[row]], dtype=dtype, device=device)
    for metric in METRICS:
        token_ids, confidence = token_confidence(
            logits, metric=metric, exclude_token_id=excluded, backend=backend
        )
        assert token_ids.item() == token
        assert confidence.isnan().item() is not defined
    # The rest of the vocabulary of a real model beside it, far below.
    wide = torch.full((1, 1, 5000), -INF, dtype=dtype, device=device)
    wide[..., 4321:4325] = logits
    wide_excluded = None if excluded is None else 4321 + excluded
    token_ids, confidence = token_confidence(wide, exclude_token_id=wide_excluded, backend=backend)
    highest_is_finite = any(x == x and x > -INF for i, x in enumerate(row) if i != excluded)
    assert token_ids.item() == (4321 + token if highest_is_finite else 0)
    assert confidence.isnan().item() is not defined


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_levels_that_change_along_the_vocabulary(backend, device, dtype, metric):
    """No part of the vocabulary tells how large the logits of the rest are."""
    vocab = 20_000
    logits = normal(6, 1, 9, vocab)
    steps = (torch.arange(vocab) // 3000).float()
    logits[0, 0] += 30.0 * steps
    logits[0, 1] -= 30.0 * steps
    logits[0, 2] -= 1000.0
    logits[0, 2, :5000] = -INF
    logits[0, 3] = -3e38
    logits[0, 4] = -3e38
    logits[0, 4, 13_000] = 3e38
    logits[0, 5] *= 1e30
    logits[0, 6, [4999, 15_000]] = 40.0
    logits[0, 7, 70] = 40.0
    logits[0, 8] += 7.0 * steps
    judge(backend, logits.to(device, dtype), metric=metric, exclude_token_id=19_999)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_logit_far_above_a_few_levels(backend, device, dtype, metric):
    """The many equal terms are rounded the same way each time they are added to the large one."""
    uniform = torch.rand(1, 1, 4096, generator=torch.Generator().manual_seed(0))
    logits = -8.0 * (1 + (uniform >= 0.01).float() + (uniform >= 0.5))
    logits[..., 5] = -8.0
    logits[..., 1000] = 0.0
    judge(backend, logits.to(device, dtype), metric=metric)


def test_excluding_a_token_is_leaving_it_out(backend, device):
    logits = normal(3, 2, 4, 50).to(device)
    without = torch.cat([logits[..., :20], logits[..., 21:]], dim=-1)
    for metric in METRICS:
        ids, confidence = token_confidence(logits, metric=metric, exclude_token_id=20, backend=backend)
        expected_ids, expected = token_confidence(without, metric=metric, backend=backend)
        assert torch.equal(ids, expected_ids + (expected_ids >= 20))
        torch.testing.assert_close(confidence, expected)


def test_margin_of_a_sampled_token_can_be_negative(backend, device):
    logits = normal(4, 1, 64, 5).to(device)
    greedy, _ = token_confidence(logits, backend=backend)
    ids, margin = token_confidence(logits, metric="margin", temperature=2.0, seed=0, backend=backend)
    changed = ids != greedy
    assert 10 < changed.sum() < 60
    assert torch.equal(margin < 0.0, changed)


@pytest.mark.parametrize(
    ("temperature", "batch"), [(0.5, 128), (2.0, 128), pytest.param(1.0, 4096, marks=pytest.mark.slow)]
)
def test_samples_follow_the_softmax(backend, device, temperature, batch):
    """Chi-square of 8 * batch draws of 7 tokens; one honest seed in a million exceeds the threshold."""
    row = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, -INF, 0.3], device=device)
    seeds = torch.arange(batch, device=device) * 7919
    token_ids, _ = token_confidence(
        row.expand(batch, 8, 7).contiguous(), temperature=temperature, seed=seeds, backend=backend
    )
    counts = torch.bincount(token_ids.flatten().cpu(), minlength=7).double()
    expected = 8 * batch * torch.softmax(row.cpu().double() / temperature, dim=0)
    assert counts[5] == 0
    present = expected > 0
    statistic = ((counts - expected)[present] ** 2 / expected[present]).sum()
    assert statistic < 35.9  # 5 degrees of freedom
    assert statistic > 0.05  # not too good to be true either


def test_seeds_are_streams(backend, device):
    logits = normal(5, 3, 16, 40).to(device)

    def sample(seed, x=logits):
        return token_confidence(x, temperature=1.0, seed=seed, backend=backend).token_ids

    def rows(*seeds):
        return torch.tensor(seeds, dtype=torch.int64, device=device)

    assert torch.equal(sample(7), sample(rows(7, 7, 7)))
    assert torch.equal(sample((1 << 64) - 1), sample(-1))  # 64 bits, signed or not
    assert torch.equal(sample(1 << 63), sample(-(1 << 63)))
    both = sample(rows(7, 8, 7 + (1 << 32)))
    assert torch.equal(both[:1], sample(7)[:1])
    same = logits[:1].expand(3, 16, 40).contiguous()
    drawn = sample(rows(7, 8, 7 + (1 << 32)), same)
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])  # the upper half of the seed counts
    assert torch.equal(sample(7, same)[0], sample(7, same)[2])
    one_position = logits[:1, :1].expand(1, 16, 40).contiguous()
    assert sample(7, one_position).unique().numel() > 4  # each position has its own noise


@pytest.mark.parametrize(
    ("metric", "dtype", "bounds", "excluded"),
    [
        *((metric, torch.float32, (0, 1, 6, 7, 500, 998, 1003), 6) for metric in METRICS),
        ("margin", torch.bfloat16, (0, 3, 4102, 20_503), 4101),
        ("entropy", torch.float16, (0, 2, 2049, 5001), None),
    ],
)
def test_shards_draw_the_noise_of_the_whole_vocabulary(backend, device, metric, dtype, bounds, excluded):
    """The shards' tokens are those that are best of their shard; the best of them is that of the whole."""
    logits = normal(10, 2, 3, bounds[-1]).mul(2).to(device, dtype)
    temperature, seed = 0.8, torch.tensor([-5, 1 << 40], device=device)
    options = {"metric": metric, "temperature": temperature, "seed": seed, "backend": backend}
    whole, _ = token_confidence(logits, exclude_token_id=excluded, **options)
    keys = logits.float() * (1.0 / temperature) + stream.gumbel_noise(logits.shape, seed, device)
    winners = []
    for lo, hi in itertools.pairwise(bounds):
        alone = torch.full_like(logits, -INF)
        alone[..., lo:hi] = logits[..., lo:hi]
        here = excluded is not None and lo <= excluded < hi
        if here and hi - lo == 1:
            continue  # nothing to choose
        ids, confidence = token_confidence(
            logits[..., lo:hi], exclude_token_id=excluded - lo if here else None, vocab_start=lo, **options
        )
        expected_ids, expected = token_confidence(alone, exclude_token_id=excluded, **options)
        assert torch.equal(lo + ids, expected_ids)
        torch.testing.assert_close(confidence, expected, rtol=1e-5, atol=1e-6)
        winners.append(lo + ids)
    ids = torch.stack(winners, dim=-1)
    assert torch.equal(ids.gather(-1, keys.gather(-1, ids).argmax(-1, keepdim=True)).squeeze(-1), whole)


@pytest.mark.parametrize("vocab", [1, 7, 64, 2047, 4096])
@pytest.mark.parametrize("start", [1, 2, 3, 126_464, (1 << 31) - 3, (1 << 34) - 4096])
def test_a_shard_may_start_anywhere(backend, device, start, vocab):
    logits = normal(start % 97, 1, 4, vocab, dtype=torch.bfloat16).to(device)
    logits[0, 0] = -INF  # the lowest token of the shard is taken, and none before it
    logits[0, 1, 0] = NAN
    excluded = 0 if vocab > 1 and start % 2 else None
    judge(backend, logits, temperature=0.7, seed=start, vocab_start=start, exclude_token_id=excluded)


def test_without_sampling_the_start_of_the_vocabulary_changes_nothing(backend, device):
    logits = normal(11, 2, 3, 1001).to(device)
    for metric in METRICS:
        expected = token_confidence(logits, metric=metric, backend=backend)
        moved = token_confidence(logits, metric=metric, vocab_start=1003, backend=backend)
        assert all(map(torch.equal, moved, expected))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_splitting_the_batch_changes_nothing(backend, device, temperature):
    logits = normal(6, 6, 5, 1000, dtype=torch.bfloat16).to(device)
    seeds = torch.arange(6, device=device)
    for seed in (9, seeds):
        ids, confidence = token_confidence(logits, temperature=temperature, seed=seed, backend=backend)
        for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
            part_seed = seed[part] if isinstance(seed, Tensor) else seed
            part_ids, part_confidence = token_confidence(
                logits[part], temperature=temperature, seed=part_seed, backend=backend
            )
            assert torch.equal(part_ids, ids[part])
            assert torch.equal(part_confidence, confidence[part])


def test_every_element_of_the_outputs_is_written(backend, device):
    """Into memory that holds NaN and no token."""
    for vocab in (1, 7, 4097):
        logits = normal(7, 3, 5, vocab).to(device)
        token_ids = torch.full((3, 5), -7, device=device)
        confidence, log_prob, current = (torch.full((3, 5), NAN, device=device) for _ in range(3))
        current_ids = torch.zeros_like(token_ids)
        run = REGISTRY[backend].function("token_confidence")
        outputs = token_ids, confidence, log_prob, current
        run(outputs, logits, current_ids, Sampling("probability", 0.0, 0))
        expected = token_confidence(logits, current_ids=current_ids, backend=backend)
        assert all(map(torch.equal, outputs, (*expected, expected.log_prob, expected.current)))


@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7)])
def test_empty(backend, device, shape):
    token_ids, confidence = token_confidence(torch.zeros(shape, device=device), backend=backend)
    assert token_ids.shape == confidence.shape == shape[:2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_twenty_reruns_give_the_same_bits(backend, device, dtype):
    logits = normal(8, 1, 3, 4097, dtype=dtype).to(device)
    for options in ({"metric": "entropy"}, {"temperature": 0.9, "seed": 1, "metric": "margin"}):
        first = token_confidence(logits, backend=backend, **options)
        for _ in range(20):
            again = token_confidence(logits, backend=backend, **options)
            assert all(map(torch.equal, again, first))
            assert torch.equal(again.log_prob, first.log_prob)


def test_the_bits_do_not_depend_on_the_number_of_threads(backend, device):
    logits = normal(9, 2, 3, 40000).to(device)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(token_confidence(logits, metric="entropy", backend=backend))
    finally:
        torch.set_num_threads(threads)
    first_ids, first = results[0]
    for ids, confidence in results:
        assert torch.equal(ids, first_ids)
        if backend != "reference":  # whose sums are PyTorch's, which make no such promise
            assert torch.equal(confidence, first)


def test_philox_known_answer():
    """The published test vectors of Philox4x32-10 whose upper counter words are 0."""
    words = stream.philox(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]))
    assert [hex(w.item()) for w in words] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


def test_noise_of_a_part_of_the_vocabulary():
    whole = stream.gumbel_noise((2, 3, 1001), 5, torch.device("cpu"))
    for start in (1, 2, 3, 4, 500, 1000):
        part = stream.gumbel_noise((2, 3, 1001 - start), 5, torch.device("cpu"), start)
        assert torch.equal(part, whole[..., start:])


def test_noise_is_gumbel():
    """Kolmogorov-Smirnov at a fixed seed, and the logarithm against float64."""
    noise = stream.gumbel_noise((4, 8, 1000), 3, torch.device("cpu")).double().flatten().sort().values
    assert noise.dtype == torch.float64
    assert noise.isfinite().all()
    cdf = torch.exp(-torch.exp(-noise))
    n = cdf.numel()
    distance = (cdf - (torch.arange(n) + 0.5) / n).abs().max() + 0.5 / n
    # An integer seed gives all 4 sequences one stream, so there are 8000 different draws.
    assert distance * 8000**0.5 < 2.7
    x = torch.cat([torch.logspace(-37, 37, 20001), 1.0 + torch.linspace(-0.01, 0.01, 2001)])
    relative = (stream._exact_neg_log(x).double() + x.double().log()).abs() / x.double().log().abs()
    assert relative[x != 1.0].max() < 2.0**-22
