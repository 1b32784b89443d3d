"""Selection of every backend, bit for bit against the rule written out in plain Python."""

from __future__ import annotations

import math
import random
import struct

import pytest
import torch
from torch import Tensor

from attn_sampler import select_tokens
from attn_sampler.backends import REGISTRY
from attn_sampler.options import Selection
from attn_sampler.reference import Selected

INF, NAN = math.inf, math.nan
CHOICES = [(p, f) for p in ("parallel", "sequential") for f in ("confidence", "score")]


def float32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def by_hand(scores: list, confidence: list, masked: list, rule: str, tau: float, fallback: str) -> list:
    """One row. The positions to commit, by walking over the masked positions one at a time."""

    def single(value: list) -> list:
        best = None
        for j, is_masked in enumerate(masked):
            if not is_masked or math.isnan(scores[j]):
                continue
            x = -INF if math.isnan(value[j]) else value[j]
            if best is None or x > best[0]:
                best = (x, j)
        return [best is not None and j == best[1] for j in range(len(masked))]

    if rule == "sequential":
        return single(scores)
    theta = -INF
    high = []
    for j, is_masked in enumerate(masked):
        if is_masked and confidence[j] >= float32(tau):
            high.append(j)
        elif is_masked and scores[j] > theta:
            theta = scores[j]
    commit = [j for j in high if scores[j] > theta]
    if not commit:
        return single(confidence if fallback == "confidence" else scores)
    return [j in commit for j in range(len(masked))]


def judge(backend: str, scores: Tensor, confidence: Tensor, masked: Tensor, **options) -> Tensor:
    before = [x.clone() for x in (scores, confidence, masked)]
    selected = select_tokens(scores, confidence, masked, backend=backend, **options)
    assert selected.dtype == torch.bool
    filled = {"rule": "parallel", "tau": 0.9, "fallback": "confidence"} | options
    expected = [
        by_hand(*row, **filled)
        for row in zip(scores.tolist(), confidence.tolist(), masked.tolist(), strict=True)
    ]
    assert selected.tolist() == expected
    for x, y in zip((scores, confidence, masked), before, strict=True):
        assert torch.equal(
            x.nan_to_num(-7.0) if x.is_floating_point() else x,
            y.nan_to_num(-7.0) if y.is_floating_point() else y,
        )
    return selected


def draw(rng: random.Random, shape: tuple[int, int], values: list, device: torch.device) -> Tensor:
    """Values at random, as every other column of the memory."""
    rows = [[rng.choice(values) for _ in range(2 * shape[1])] for _ in range(shape[0])]
    return torch.tensor(rows, device=device).reshape(shape[0], 2 * shape[1])[:, ::2]


@pytest.mark.parametrize(("rule", "fallback"), CHOICES)
@pytest.mark.parametrize("tau", [0.0, 0.5, 0.9, 1.0])
def test_thousands_of_small_rows(backend, device, rule, fallback, tau):
    rng = random.Random(f"{rule} {fallback} {tau}")
    for count in (1, 2, 3, 5, 8) if tau < 0.9 else (3, 8):
        ties = draw(rng, (24, count), [0.0, 0.25, 0.5, 0.75], device)
        wild = draw(rng, (24, count), [-INF, INF, NAN, 0.0, -0.0, 1.0, 2.0], device)
        some = draw(rng, (24, count), [0.0, 0.5, float32(0.9), 0.95, 1.0, -1.0], device)
        odd = draw(rng, (24, count), [NAN, -INF, INF, 0.5, 0.95], device)
        masked = draw(rng, (24, count), [True, True, False], device)
        for scores in (ties, wild):
            for confidence in (some, odd):
                judge(backend, scores, confidence, masked, rule=rule, tau=tau, fallback=fallback)


@pytest.mark.parametrize("count", [32, 63, 113, 256, 1000])
def test_blocks(backend, device, count):
    g = torch.Generator().manual_seed(count)
    scores, confidence = torch.rand(2, 5, count, generator=g).to(device)
    masked = (torch.rand(5, count, generator=g) < 0.6).to(device)
    masked[3] = False
    for rule, fallback in CHOICES:
        for tau in (0.0, 0.3, 0.99, 1.0):
            judge(backend, scores, confidence, masked, rule=rule, tau=tau, fallback=fallback)


def test_tau_is_compared_in_float32(backend, device):
    """A confidence of float32(0.9), which is below 0.9, passes tau 0.9; the next one below does not."""
    at = float32(0.9)
    assert at < 0.9
    below = torch.nextafter(torch.tensor(at), torch.tensor(0.0)).item()
    confidence = torch.tensor([[at, below]], device=device)
    scores, masked = (
        torch.tensor([[2.0, 1.0]], device=device),
        torch.ones(1, 2, dtype=torch.bool, device=device),
    )
    assert judge(backend, scores, confidence, masked).tolist() == [[True, False]]
    # float32(0.3) is above 0.3.
    confidence = torch.tensor(
        [[0.3, torch.nextafter(torch.tensor(0.3), torch.tensor(0.0)).item()]], device=device
    )
    assert judge(backend, scores, confidence, masked, tau=0.3).tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("scores", "confidence", "expected"),
    [
        # The first unconfident position in the order of scores stops the walk.
        ([5.0, 4.0, 3.0, 2.0], [0.99, 0.95, 0.1, 0.99], [0, 1]),
        # A confident position that only ties with the threshold is not above it.
        ([5.0, 4.0, 4.0, 2.0], [0.99, 0.95, 0.1, 0.99], [0]),
        # All confident: everything, down to the smallest score.
        ([5.0, 4.0, 0.0, -2.0], [0.9, 0.95, 1.0, 0.99], [0, 1, 2, 3]),
        # A score of -inf is above no threshold, even without an unconfident position.
        ([5.0, -INF, 1.0, 1.0], [0.9, 0.95, 1.0, 0.99], [0, 2, 3]),
        # A NaN score is never committed and never a threshold.
        ([NAN, 2.0, 1.0, NAN], [0.99, 0.99, 0.99, 0.1], [1, 2]),
        # A NaN confidence is not confident.
        ([1.0, 2.0, 3.0, 0.0], [0.99, NAN, 0.99, 0.99], [2]),
        # None passes: the most confident, the first of equals.
        ([1.0, 2.0, 3.0, 0.0], [0.5, 0.6, 0.1, 0.6], [1]),
        ([1.0, 2.0, 3.0, 0.0], [NAN, NAN, NAN, NAN], [0]),
        ([NAN, NAN, NAN, NAN], [0.99, 0.6, 0.1, 0.6], []),
    ],
)
def test_stated_cases(backend, device, scores, confidence, expected):
    masked = torch.ones(1, 4, dtype=torch.bool, device=device)
    selected = judge(
        backend, torch.tensor([scores], device=device), torch.tensor([confidence], device=device), masked
    )
    assert selected[0].nonzero().flatten().tolist() == expected


def test_fallbacks_differ(backend, device):
    scores, confidence = torch.tensor([[[1.0, 2.0, 0.5]], [[0.2, 0.1, 0.8]]], device=device)
    masked = torch.ones(1, 3, dtype=torch.bool, device=device)
    assert judge(backend, scores, confidence, masked).tolist() == [[False, False, True]]
    assert judge(backend, scores, confidence, masked, fallback="score").tolist() == [[False, True, False]]


def test_float64_goes_to_the_reference(device):
    scores = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64, device="cpu")
    selected = select_tokens(scores, scores, torch.ones(1, 2, dtype=torch.bool), rule="sequential")
    assert selected.tolist() == [[False, True]]


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_empty(backend, device, shape):
    x = torch.zeros(shape, device=device)
    for rule, fallback in CHOICES:
        selected = select_tokens(x, x, x.bool(), rule=rule, fallback=fallback, backend=backend)
        assert selected.shape == shape


def test_every_element_of_the_output_is_written(backend, device):
    rng = random.Random(0)
    scores, confidence = (draw(rng, (9, 13), [0.1, 0.5, 0.95, NAN], device) for _ in range(2))
    masked = draw(rng, (9, 13), [True, False], device)
    for rule, fallback in CHOICES:
        expected = select_tokens(scores, confidence, masked, rule=rule, fallback=fallback, backend=backend)
        for before in (False, True):
            selected = torch.full((9, 13), before, device=device)
            run = REGISTRY[backend].function("select_tokens")
            out = Selected(selected, None, None)
            run(out, scores, confidence, masked, None, None, Selection(rule, fallback, 0.9))
            assert torch.equal(selected, expected)
