"""Every policy, bit for bit, against its rule stated over plain Python numbers."""

from __future__ import annotations

import collections
import math
import random
import statistics
import struct
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attn_sampler.sampler import (
    KLASS,
    PARD,
    POLICIES,
    AttnSampler,
    Confidence,
    EBSampler,
    Entropy,
    Factor,
    LeftToRight,
    Margin,
    Policy,
    RandomOrder,
    RandomScores,
    StepState,
    Threshold,
)

NAN = math.nan
Row = list[float]
Mask = list[bool]
MASK_ID = 4
BUILT_IN = dict(POLICIES)


def as_float32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def state(
    confidence: list[Row],
    masked: list[Mask],
    *,
    scores: list[Row] | None = None,
    seeds: list[int] | None = None,
    logits: Tensor | None = None,
    sequence: list[int] | None = None,
    backend: str = "auto",
) -> StepState:
    batch, count = len(masked), len(masked[0])
    return StepState(
        masked=torch.tensor(masked),
        token_ids=torch.zeros(batch, count, dtype=torch.int64),
        confidence=torch.tensor(confidence, dtype=torch.float32),
        scores=None if scores is None else torch.tensor(scores, dtype=torch.float32),
        logits=torch.zeros(batch, count, 5) if logits is None else logits,
        mask_token_id=MASK_ID,
        sequence=torch.tensor(sequence or list(range(batch))),
        seeds=torch.tensor(seeds or [0] * batch),
        backend=backend,
    )


def chosen(policy: Policy, step: StepState) -> list[set[int]]:
    selected = policy.select(step)
    assert selected.dtype == torch.bool
    assert selected.shape == step.masked.shape
    return [set(row.nonzero().squeeze(1).tolist()) for row in selected]


def open_positions(masked: Mask) -> list[int]:
    return [i for i, m in enumerate(masked) if m]


def ranked(value: Row, masked: Mask) -> list[int]:
    """Masked positions from the largest value; NaN behind all others, the lower position first on ties."""
    return sorted(
        open_positions(masked),
        key=lambda i: (math.isnan(value[i]), -value[i] if value[i] == value[i] else 0, i),
    )


# The rules. Each takes one row's confidence (and scores) and says which positions it commits.


def left_to_right(p: Row, s: Row, masked: Mask) -> set[int]:
    return set(open_positions(masked)[:1])


def top(count: int) -> Callable[[Row, Row, Mask], set[int]]:
    return lambda p, s, masked: set(ranked(p, masked)[:count])


def threshold(tau: float) -> Callable[[Row, Row, Mask], set[int]]:
    """All masked positions with p >= tau, and at any rate the most confident."""

    def rule(p: Row, s: Row, masked: Mask) -> set[int]:
        passing = {i for i in open_positions(masked) if p[i] >= as_float32(tau)}
        return passing | set(ranked(p, masked)[:1])

    return rule


def factor(f: float) -> Callable[[Row, Row, Mask], set[int]]:
    """From the most confident on: the n-th needs p >= 1 - f / (n + 1), the first nothing."""

    def rule(p: Row, s: Row, masked: Mask) -> set[int]:
        commit: set[int] = set()
        for n, i in enumerate(ranked(p, masked), start=1):
            if n > 1 and not p[i] >= 1.0 - f / (n + 1):
                break
            commit.add(i)
        return commit

    return rule


def entropy_bounded(gamma: float) -> Callable[[Row, Row, Mask], set[int]]:
    """The most positions, by ascending entropy, whose entropies less their maximum sum to at most gamma."""

    def rule(negated: Row, s: Row, masked: Mask) -> set[int]:
        order = ranked(negated, masked)
        best = order[:1]
        for size in range(1, len(order) + 1):
            entropies = [-negated[i] for i in order[:size]]
            if not any(map(math.isnan, entropies)) and sum(entropies) - max(entropies) <= gamma:
                best = order[:size]
        return set(best)

    return rule


def left_prefix(tau: float) -> Callable[[Row, Row, Mask], set[int]]:
    """Masked positions from the left while p >= tau, and at any rate the first."""

    def rule(p: Row, s: Row, masked: Mask) -> set[int]:
        commit = set(open_positions(masked)[:1])
        for i in open_positions(masked):
            if not p[i] >= as_float32(tau):
                break
            commit.add(i)
        return commit

    return rule


def attn_sequential(p: Row, s: Row, masked: Mask) -> set[int]:
    scored = [i for i in open_positions(masked) if not math.isnan(s[i])]
    return {min(scored, key=lambda i: (-s[i], i))} if scored else set()


def attn_parallel(
    tau: float, fallback: str, statistic: Callable[[Row], float] = max
) -> Callable[[Row, Row, Mask], set[int]]:
    """The confident positions above the best-scored unconfident one; where there is none, one position."""

    def rule(p: Row, s: Row, masked: Mask) -> set[int]:
        scored = [i for i in open_positions(masked) if not math.isnan(s[i])]
        high = [i for i in scored if p[i] >= as_float32(tau)]
        low = [s[i] for i in scored if i not in high]
        theta = statistic(low) if low else -math.inf
        commit = {i for i in high if s[i] > theta}
        if not commit and scored:
            value = p if fallback == "confidence" else s
            commit = {ranked(value, [i in scored for i in range(len(masked))])[0]}
        return commit

    return rule


CASES: list[tuple[Policy, Callable[[Row, Row, Mask], set[int]]]] = [
    (LeftToRight(), left_to_right),
    (Confidence(), top(1)),
    (Confidence(count=3), top(3)),
    (Margin(count=2), top(2)),
    (Entropy(), top(1)),
    (Entropy(count=4), top(4)),
    *((Threshold(tau=tau), threshold(tau)) for tau in (0.0, 0.5, 0.9, 1.0)),
    *((Factor(factor=f), factor(f)) for f in (0.0, 0.5, 1.0, 1.5)),
    *((EBSampler(gamma=gamma), entropy_bounded(gamma)) for gamma in (0.0, 0.25, 1.0)),
    *((PARD(tau=tau), left_prefix(tau)) for tau in (0.0, 0.5, 0.9, 1.0)),
    (AttnSampler(mode="sequential"), attn_sequential),
    *(
        (AttnSampler(tau=tau, fallback=fallback), attn_parallel(tau, fallback))
        for tau in (0.0, 0.5, 0.9)
        for fallback in ("confidence", "score")
    ),
    (AttnSampler(tau=0.5, threshold="mean"), attn_parallel(0.5, "confidence", statistics.mean)),
    (AttnSampler(threshold="mean", fallback="score"), attn_parallel(0.9, "score", statistics.mean)),
]
# Few values, so that ties are common; exact in float32, and 0.9 as float32 has it.
PROBABILITIES = [0.0, 0.125, 0.25, 0.5, 0.625, 0.75, as_float32(0.9), 0.9375, 1.0]
SCORES = [0.0, 0.5, 0.5, 1.0, 2.0, 3.5]


def random_rows(
    rng: random.Random, values: list[float], batch: int, count: int, undefined: float
) -> list[Row]:
    return [
        [NAN if rng.random() < undefined else rng.choice(values) for _ in range(count)] for _ in range(batch)
    ]


@pytest.mark.parametrize(("policy", "rule"), CASES, ids=[repr(policy) for policy, _ in CASES])
def test_rule(policy: Policy, rule: Callable[[Row, Row, Mask], set[int]]) -> None:
    rng = random.Random(repr(policy))
    values = [-v for v in PROBABILITIES] if policy.metric == "entropy" else PROBABILITIES
    for undefined in (0.0, 0.0, 0.2, 1.0):
        for _ in range(250):
            batch, count = rng.randint(1, 4), rng.randint(1, 8)
            open_share = rng.choice([0.0, 0.3, 0.7, 1.0])
            masked = [[rng.random() < open_share for _ in range(count)] for _ in range(batch)]
            p = random_rows(rng, values, batch, count, undefined)
            s = random_rows(rng, SCORES, batch, count, undefined / 2)
            got = chosen(policy, state(p, masked, scores=s))
            expected = [rule(*row) for row in zip(p, s, masked, strict=True)]
            assert got == expected, (p, s, masked)
            for commit, row, score in zip(got, masked, s, strict=True):
                positions = set(open_positions(row))
                assert commit <= positions
                if policy.needs_scores:  # a NaN score is never selected
                    positions = {i for i in positions if not math.isnan(score[i])}
                assert bool(commit) == bool(positions)


def philox_word(seed: int, group: int, position: int) -> int:
    """The first word of Philox4x32-10 with the counter (group, position, 0, 0)."""
    low = (1 << 32) - 1
    key = [seed & low, seed >> 32 & low]
    counter = [group, position, 0, 0]
    for _ in range(10):
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [b >> 32 ^ counter[1] ^ key[0], b & low, a >> 32 ^ counter[3] ^ key[1], a & low]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return counter[0]


def test_philox_word_is_the_published_one() -> None:
    # Known answer of the Random123 distribution for a counter and key of zeros.
    assert philox_word(0, 0, 0) == 0x6627E8D5


def test_random_order() -> None:
    rng = random.Random(0)
    policy = RandomOrder()
    for _ in range(500):
        batch, count = rng.randint(1, 4), rng.randint(1, 8)
        masked = [[rng.random() < 0.6 for _ in range(count)] for _ in range(batch)]
        seeds = [rng.randrange(-(1 << 63), 1 << 63) for _ in range(batch)]
        p = random_rows(rng, PROBABILITIES, batch, count, 0.1)
        expected = []
        for row, seed in zip(masked, seeds, strict=True):
            words = [float(philox_word(seed, (1 << 32) - 1, i)) for i in range(count)]
            expected.append(set(ranked(words, row)[:1]))
        assert chosen(policy, state(p, masked, seeds=seeds)) == expected


@pytest.mark.parametrize("fallback", ["confidence", "score"])
def test_random_scores(fallback: str) -> None:
    """The dynamic threshold over random words; float32 as they are compared, so that ties are the same."""
    rng = random.Random(1)
    policy, rule = RandomScores(tau=0.5, fallback=fallback), attn_parallel(0.5, fallback)
    for _ in range(300):
        batch, count = rng.randint(1, 4), rng.randint(1, 8)
        masked = [[rng.random() < 0.6 for _ in range(count)] for _ in range(batch)]
        seeds = [rng.randrange(-(1 << 63), 1 << 63) for _ in range(batch)]
        p = random_rows(rng, PROBABILITIES, batch, count, 0.1)
        words = [[as_float32(philox_word(seed, (1 << 32) - 1, i)) for i in range(count)] for seed in seeds]
        expected = [rule(*row) for row in zip(p, words, masked, strict=True)]
        assert chosen(policy, state(p, masked, seeds=seeds)) == expected


def test_random_order_is_uniform() -> None:
    draws, masked = 6000, [True, False, True, True]
    step = state([[0.0] * 4] * draws, [masked] * draws, seeds=list(range(draws)))
    counts = collections.Counter(next(iter(c)) for c in chosen(RandomOrder(), step))
    assert set(counts) == {0, 2, 3}
    # Chi-squared with two degrees of freedom: 13.8 is exceeded once in a thousand seeds.
    assert sum((c - draws / 3) ** 2 / (draws / 3) for c in counts.values()) < 13.8


def softmax(logits: Row) -> Row:
    """Over all tokens but the mask token."""
    present = [i for i in range(len(logits)) if i != MASK_ID]
    largest = max(logits[i] for i in present)
    total = sum(math.exp(logits[i] - largest) for i in present)
    return [math.exp(logits[i] - largest) / total if i in present else 0.0 for i in range(len(logits))]


def divergence(p: Row, q: Row) -> float:
    return sum(a * (math.log(a / b) if b > 0.0 else math.inf) for a, b in zip(p, q, strict=True) if a > 0.0)


@pytest.mark.parametrize("history", [1, 2, 3])
def test_klass(history: int) -> None:
    """Several steps, some sequences finishing on the way, distributions that stay or jump."""
    rng = random.Random(history)
    settled_commits = 0
    for _ in range(300):
        batch, count, tau = rng.randint(1, 4), rng.randint(1, 5), rng.choice([0.5, 0.9])
        policy = KLASS(tau=tau, kl=0.01, history=history)
        # Distributions that are far from each other; one has a token of probability 0.
        kinds = [[0.0, 5.0, 1.0, -2.0, 9.0], [4.0, 0.0, 0.0, 0.0, 9.0], [0.0, 0.0, 0.0, -math.inf, 9.0]]
        current = [[rng.choice(kinds) for _ in range(count)] for _ in range(batch)]
        masked = {b: [rng.random() < 0.8 for _ in range(count)] for b in range(batch)}
        past: dict[int, list[list[Row]]] = {b: [] for b in range(batch)}
        for _ in range(6):
            rows = [b for b in range(batch) if any(masked[b])]
            if not rows:
                break
            for b in rows:
                past[b].append([softmax(row) for row in current[b]])
            confidence = [[as_float32(max(p)) for p in past[b][-1]] for b in rows]
            logits = torch.tensor([current[b] for b in rows])
            step = state(confidence, [masked[b] for b in rows], logits=logits, sequence=rows)
            got = chosen(policy, step)
            for commit, b, p in zip(got, rows, confidence, strict=True):
                steps = past[b]
                passing = {
                    i
                    for i in open_positions(masked[b])
                    if p[i] >= as_float32(tau)
                    and len(steps) > history
                    and all(divergence(steps[-n][i], steps[-n - 1][i]) < 0.01 for n in range(1, history + 1))
                }
                assert commit == (passing or set(ranked(p, masked[b])[:1]))
                settled_commits += len(passing)
                for i in commit:
                    masked[b][i] = False
                for i in range(count):
                    if rng.random() < 0.3:
                        current[b][i] = rng.choice(kinds)
    assert settled_commits > 30
    policy.reset()
    assert policy._last is None


def test_klass_does_not_touch_the_logits() -> None:
    logits = torch.randn(1, 2, 5)
    before = logits.clone()
    KLASS().select(state([[0.5, 0.5]], [[True, True]], logits=logits))
    assert torch.equal(logits, before)
