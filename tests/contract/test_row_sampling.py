"""Sampling parameters of each row, and which tokens may be drawn, on every backend, token for token."""

from __future__ import annotations

import random

import pytest
import torch
from problems import DTYPES, assert_accurate, normal
from torch import Tensor

from attn_sampler import decode_step, reference, select_tokens, stream, token_confidence

METRICS = ("probability", "margin", "entropy")
INF, NAN = torch.inf, torch.nan
MASK = 3


def random_problem(seed: int, device: torch.device) -> tuple[Tensor, dict]:
    """Logits [B, C, V] of every kind, and keywords, each a number or one for each row."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, positions = rng.choice((1, 2, 3)), rng.choice((1, 2, 5))
    vocab = rng.choice((1, 2, 5, 17, 64, 65, 130, 1000, 4099, 9000))
    logits = torch.randn(batch, positions, vocab, generator=g) * rng.choice((0.01, 1.0, 3.0, 10.0, 30.0))
    if rng.random() < 0.3:
        logits.round_()
    for share, value in ((0.3, -INF), (0.1, NAN), (0.05, INF)):
        if rng.random() < 0.12:
            logits[torch.rand(logits.shape, generator=g) < share] = value
    if rng.random() < 0.05:
        logits[0] = -INF

    def value(accepted: tuple, others: tuple, dtype: torch.dtype) -> float | Tensor:
        if rng.random() < 0.4:
            return rng.choice(accepted)
        values = [rng.choice(accepted if rng.random() < 0.8 else others) for _ in range(2 * batch)]
        return torch.tensor(values, dtype=dtype, device=device)[::2]

    words = -(-vocab // 32) + rng.choice((0, 0, 1))
    shape = rng.choice(((batch, words), (batch, positions, words)))
    bits = torch.randint(-(1 << 31), 1 << 31, shape, generator=g).to(torch.int32)
    bits = rng.choice((bits, bits, torch.full_like(bits, -1), torch.zeros_like(bits)))
    options = {
        "temperature": value((0.0, 0.3, 1.0, 2.5, 100.0, 1e-6), (-1.0, NAN, INF, 1e-40), torch.float32),
        "top_k": value((0, 1, 2, 5, 50, 200, vocab), (-5, (1 << 31) - 1), torch.int32),
        "top_p": value((1.0, 0.9, 0.5, 0.1, 0.999, 1e-6), (0.0, -1.0, 2.0, NAN), torch.float32),
        "min_p": value((0.0, 0.05, 0.5, 1.0, 1e-3, 1e-40), (-1.0, 2.0, NAN), torch.float32),
        "seed": rng.choice((rng.getrandbits(63), torch.randint(1 << 60, (batch,), generator=g).to(device))),
        "token_bitmask": rng.choice((None, bits.to(device))),
        "exclude_token_id": rng.choice((None, 0, vocab - 1, vocab // 2)) if vocab > 1 else None,
        "vocab_start": rng.choice((0, 0, 1, 2, 3, 77)),
        "current_ids": torch.randint(-1, vocab + 1, (batch, positions), generator=g).to(device),
        "metric": rng.choice(METRICS),
    }
    return logits.to(device, rng.choice(DTYPES)), options


@pytest.mark.parametrize(
    "seed", [*range(80), *(pytest.param(x, marks=pytest.mark.slow) for x in range(80, 400))]
)
def test_random_problems(backend, device, seed):
    logits, options = random_problem(seed, device)
    result = token_confidence(logits, backend=backend, **options)
    expected = reference.token_confidence(logits, **options)
    truth = reference.token_confidence(logits.double(), **options)
    assert torch.equal(result.token_ids, expected.token_ids)
    assert_accurate(result.confidence, expected.confidence, truth.confidence)
    assert_accurate(result.current, expected.current, truth.current)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 40, "top_p": 0.8, "min_p": 0.02},
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in (
                *({"top_k": 1}, {"top_k": 50}, {"top_k": 300}, {"top_k": 5000}),
                *({"top_p": 0.9}, {"top_p": 0.3}, {"min_p": 0.05}),
            )
        ),
    ],
    ids=str,
)
def test_vocabulary_of_a_real_model(backend, device, options):
    for scale in (0.5, 4.0):  # flat, and peaked
        logits = normal(0, 1, 2, 151_936, dtype=torch.bfloat16).mul(scale).to(device)
        drawn = token_confidence(logits, temperature=1.0, seed=5, backend=backend, **options).token_ids
        assert torch.equal(
            drawn, reference.token_confidence(logits, temperature=1.0, seed=5, **options).token_ids
        )


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 0.9, 0.0), (50, 1.0, 0.0), (0, 1.0, 0.05), (20, 0.8, 0.01), (1, 0.3, 0.0), (0, 0.01, 0.0)],
)
def test_what_is_kept_is_what_transformers_keeps(temperature, top_k, top_p, min_p):
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = normal(4, 15, 1000, dtype=torch.float32).mul(3)
    processors = [warpers.TemperatureLogitsWarper(temperature)]
    if top_k:
        processors.append(warpers.TopKLogitsWarper(top_k))
    if top_p < 1.0:
        processors.append(warpers.TopPLogitsWarper(top_p))
    if min_p:
        processors.append(warpers.MinPLogitsWarper(min_p))
    theirs = logits
    for processor in processors:
        theirs = processor(None, theirs)
    rows = [
        torch.tensor(x, dtype=dtype).reshape(1, 1, 1)
        for x, dtype in ((top_k, torch.int32), (top_p, torch.float32), (min_p, torch.float32))
    ]
    ours = stream.truncation((logits / temperature)[None], *rows)[0]
    assert torch.equal(ours, theirs > -INF)
    assert 15 <= ours.sum() < ours.numel()


def test_weights_are_those_of_the_exponential():
    distance = torch.linspace(-30.0, 0.0, 100_001)
    weight = stream.token_weight(distance).double() / (1 << 30)
    truth = distance.double().exp()
    assert ((weight - truth).abs() <= 2.0**-30 + 2e-6 * truth).all()
    assert stream.token_weight(torch.tensor([0.0, -INF, -100.0])).tolist() == [1 << 30, 0, 0]


def test_a_number_is_a_tensor_of_it(backend, device):
    logits = normal(1, 2, 3, 300).mul(2).to(device)
    numbers = {"temperature": 0.7, "top_k": 20, "top_p": 0.85, "min_p": 0.02}
    dtypes = {"top_k": torch.int32}
    rows = {
        name: torch.full((2,), value, dtype=dtypes.get(name, torch.float32), device=device)
        for name, value in numbers.items()
    }
    expected = token_confidence(logits, seed=5, backend=backend, **numbers)
    assert torch.equal(
        token_confidence(logits, seed=5, backend=backend, **rows).token_ids, expected.token_ids
    )
    for name, value in rows.items():
        mixed = token_confidence(logits, seed=5, backend=backend, **{**numbers, name: value})
        assert torch.equal(mixed.token_ids, expected.token_ids)


def test_rows_are_as_alone(backend, device):
    """Whatever the others ask for, the most probable token included."""
    logits = normal(2, 5, 6, 500).mul(2).to(device)
    rows = {
        "temperature": [0.0, 1.0, 0.5, 2.0, 1.0],
        "top_k": [0, 0, 5, 0, 40],
        "top_p": [1.0, 1.0, 1.0, 0.7, 0.9],
        "min_p": [0.0, 0.0, 0.0, 0.0, 0.05],
    }
    tensors = {
        name: torch.tensor(x, dtype=torch.int32 if name == "top_k" else torch.float32, device=device)
        for name, x in rows.items()
    }
    seeds = torch.arange(5, device=device) * 91
    together = token_confidence(logits, seed=seeds, backend=backend, **tensors)
    for row in range(5):
        alone = token_confidence(
            logits[row : row + 1],
            seed=seeds[row : row + 1],
            backend=backend,
            **{name: x[row] for name, x in rows.items()},
        )
        assert torch.equal(alone.token_ids[0], together.token_ids[row])
        assert torch.equal(alone.confidence[0], together.confidence[row])
    assert torch.equal(together.token_ids[0], logits[0].argmax(-1))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 3}, [1, 4, 6]),
        ({"top_p": 0.85}, [1, 3, 4, 6]),
        ({"min_p": 0.3}, [1, 4]),
        ({"top_k": 4, "top_p": 0.7}, [1, 4]),
    ],
    ids=str,
)
def test_samples_follow_the_softmax_of_what_is_kept(backend, device, options, kept):
    """Chi-square of 2048 draws; one honest seed in a million exceeds the threshold."""
    row = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, -INF, 0.7], device=device)
    seeds = torch.arange(256, device=device) * 7919
    logits = row.expand(256, 8, 7).contiguous()
    ids = token_confidence(logits, temperature=1.0, seed=seeds, backend=backend, **options).token_ids
    counts = torch.bincount(ids.flatten().cpu(), minlength=7).double()
    assert counts.nonzero().flatten().tolist() == kept
    expected = 2048 * torch.softmax(row.cpu().double()[kept], dim=0)
    statistic = ((counts[kept] - expected) ** 2 / expected).sum()
    assert statistic < 33.0
    assert statistic > 1e-4


def test_bits_are_tokens(backend, device):
    """Packed words say the same as logits of -inf, and bits beyond the vocabulary nothing."""
    logits = normal(3, 2, 3, 150).mul(2).to(device)
    g = torch.Generator().manual_seed(0)
    allowed = torch.rand(2, 3, 150, generator=g) < 0.3
    padded = torch.nn.functional.pad(allowed, (0, 10), value=True).reshape(2, 3, 5, 32)
    words = (padded.long() << torch.arange(32)).sum(-1)
    bitmask = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).to(device)
    current = logits.argmin(-1)
    sampled = {"temperature": 1.0, "seed": 3}
    for options in ({}, sampled, {**sampled, "top_k": 7}):
        for metric in METRICS if not options else ("margin",):
            options = {**options, "metric": metric, "current_ids": current, "backend": backend}
            ours = token_confidence(logits, token_bitmask=bitmask, **options)
            plain = token_confidence(logits.masked_fill(~allowed.to(device), -INF), **options)
            for name in ("token_ids", "confidence", "log_prob", "current"):
                assert torch.equal(getattr(ours, name), getattr(plain, name))
    first = token_confidence(logits, token_bitmask=bitmask[:, 0], backend=backend)
    each = bitmask[:, :1].expand(2, 3, 5)
    assert torch.equal(
        first.token_ids, token_confidence(logits, token_bitmask=each, backend=backend).token_ids
    )


def test_where_no_token_is_left(backend, device):
    logits = normal(3, 2, 3, 50).to(device)
    nothing = torch.zeros(2, 2, dtype=torch.int32, device=device)
    for options in ({}, {"temperature": 1.0, "seed": 1}, {"temperature": 1.0, "seed": 1, "top_p": 0.5}):
        result = token_confidence(
            logits, token_bitmask=nothing, exclude_token_id=0, backend=backend, **options
        )
        assert torch.equal(result.token_ids, torch.ones_like(result.token_ids))
        assert result.confidence.isnan().all()


@pytest.mark.parametrize("seed", range(8))
def test_a_step_of_rows_is_that_of_each(backend, device, seed):
    """decode_step with everything by row, against a step of each row with numbers."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, positions, vocab = 4, 6, 70
    logits = torch.randn(batch, positions, vocab, generator=g).mul(3).to(device)
    scores = torch.rand(batch, positions, generator=g).to(device)
    tokens = torch.randint(vocab, (batch, positions), generator=g)
    tokens[torch.rand(tokens.shape, generator=g) < 0.8] = MASK
    rules = [rng.choice(list(reference.RULE_CODES)) for _ in range(batch)]
    rows = {
        "temperature": [rng.choice((0.0, 0.7, 1.5)) for _ in range(batch)],
        "top_k": [rng.choice((0, 1, 8)) for _ in range(batch)],
        "top_p": [rng.choice((1.0, 0.6)) for _ in range(batch)],
        "min_p": [rng.choice((0.0, 0.1)) for _ in range(batch)],
        "tau": [rng.choice((0.1, 0.5, 0.9)) for _ in range(batch)],
    }
    tensors = {
        name: torch.tensor(x, dtype=torch.int32 if name == "top_k" else torch.float32, device=device)
        for name, x in rows.items()
    }
    codes = torch.tensor([reference.RULE_CODES[x] for x in rules], dtype=torch.int32, device=device)
    bits = torch.randint(-(1 << 31), 1 << 31, (batch, 3), generator=g).to(torch.int32).to(device)
    budget = torch.ones(batch, positions, dtype=torch.int32, device=device) if seed % 2 else None
    revises = {} if budget is None else {"replace_tau": 0.4, "remask_tau": 0.05}
    seeds = torch.arange(batch, device=device)
    same = {"block": slice(0, positions), "mask_token_id": MASK, "backend": backend, **revises}
    together = decode_step(
        tokens.clone().to(device),
        logits,
        scores=scores,
        seed=seeds,
        rule=codes,
        token_bitmask=bits,
        budget=None if budget is None else budget.clone(),
        **same,
        **tensors,
    )
    for row in range(batch):
        part = slice(row, row + 1)
        alone = decode_step(
            tokens[part].clone().to(device),
            logits[part],
            scores=scores[part],
            seed=seeds[part],
            rule=rules[row],
            token_bitmask=bits[part],
            budget=None if budget is None else budget[part].clone(),
            **same,
            **{name: x[row] for name, x in rows.items()},
        )
        for ours, theirs in zip(together, alone, strict=True):
            assert ours is theirs is None or torch.equal(ours[part], theirs)


def test_rules_of_rows(backend, device):
    g = torch.Generator().manual_seed(0)
    scores, confidence = torch.rand(2, 40, 9, generator=g).to(device)
    masked = (torch.rand(40, 9, generator=g) < 0.7).to(device)
    codes = (torch.arange(40, dtype=torch.int32, device=device) % 5) - 1  # -1 and 3 are none, and parallel
    taus = torch.rand(40, generator=g).to(device)
    names = {0: "sequential", 2: "threshold"}
    for fallback in ("confidence", "score"):
        together = select_tokens(
            scores, confidence, masked, rule=codes, tau=taus, fallback=fallback, backend=backend
        )
        for row in range(40):
            part = slice(row, row + 1)
            alone = select_tokens(
                scores[part],
                confidence[part],
                masked[part],
                rule=names.get(int(codes[row]), "parallel"),
                tau=float(taus[row]),
                fallback=fallback,
                backend=backend,
            )
            assert torch.equal(alone, together[part])


def _named(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": -1}, r"top_k: expected an integer in \[0"),
        ({"top_k": 1.5}, "top_k: expected an integer, got float"),
        ({"top_k": _named(torch.int64, 2)}, "top_k: expected dtype int32, got int64"),
        ({"top_k": _named(torch.int32, 3)}, r"top_k: expected shape \[B\] = \[2\], got \[3\]"),
        ({"top_p": 0.0}, r"top_p: expected a number in \(0, 1\], got 0.0"),
        ({"top_p": NAN}, r"top_p: expected a number in \(0, 1\], got nan"),
        ({"top_p": _named(torch.float64, 2)}, "top_p: expected dtype float32, got float64"),
        ({"min_p": 1.5}, "min_p: expected a number in .*, got 1.5"),
        ({"min_p": "0.1"}, "min_p: expected a number in .*, got str"),
        ({"min_p": _named(torch.float32, 2, 1)}, r"min_p: expected a 1-dimensional tensor \[B\]"),
        ({"temperature": _named(torch.float16, 2)}, "temperature: expected dtype float32, got float16"),
        ({"temperature": _named(torch.float32, 2), "seed": None}, "seed: needed where temperature > 0"),
        ({"token_bitmask": _named(torch.int32, 2, 1)}, "token_bitmask: expected at least 2 words"),
        ({"token_bitmask": _named(torch.int64, 2, 2)}, "token_bitmask: expected dtype int32, got int64"),
        ({"token_bitmask": _named(torch.int32, 2, 4, 2)}, r"token_bitmask: expected shape \[B, C, W\]"),
        ({"token_bitmask": _named(torch.int32, 2)}, r"token_bitmask: expected a 2-dimensional tensor"),
    ],
    ids=str,
)
def test_errors(backend, device, options, message):
    logits = torch.zeros(2, 3, 40, device=device)
    given = {
        name: x.to(device) if isinstance(x, Tensor) else x
        for name, x in {"temperature": 1.0, "seed": 0, **options}.items()
    }
    with pytest.raises((TypeError, ValueError), match=message):
        token_confidence(logits, backend=backend, **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": _named(torch.float64, 2)}, "tau: expected dtype float32, got float64"),
        ({"tau": _named(torch.float32, 1)}, r"tau: expected shape \[B\] = \[2\], got \[1\]"),
        ({"rule": _named(torch.int64, 2)}, "rule: expected dtype int32, got int64"),
        ({"rule": 1}, "rule: expected one of parallel, sequential, threshold, got 1"),
    ],
    ids=str,
)
def test_errors_of_a_selection(backend, device, options, message):
    scores, masked = torch.zeros(2, 5, device=device), torch.ones(2, 5, dtype=torch.bool, device=device)
    given = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    with pytest.raises((TypeError, ValueError), match=message):
        select_tokens(scores, scores, masked, backend=backend, **given)


def test_what_is_read_is_not_written(backend, device):
    """A row's budget shares no memory with what the step is asked by."""
    memory = torch.ones(64, dtype=torch.int32, device=device)
    tokens = torch.full((2, 3), MASK, device=device)
    logits = torch.zeros(2, 3, 40, device=device)
    with pytest.raises(ValueError, match=r"budget: expected memory of its own, got some of that of .*top_k"):
        decode_step(
            tokens,
            logits,
            scores=torch.zeros(2, 3, device=device),
            block=slice(0, 3),
            mask_token_id=MASK,
            budget=memory[:6].view(2, 3),
            remask_tau=0.5,
            temperature=1.0,
            seed=0,
            top_k=memory[4:6],
            backend=backend,
        )
    assert (tokens == MASK).all()
