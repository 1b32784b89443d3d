"""Thousands of random problems for all functions, each judged against the reference in float64.

A seed is one problem. To run one alone, with the whole traceback:
``python tests/contract/test_fuzz.py BACKEND SEED``.
A plain run of the tests takes the first few; ``-m long`` takes the thousands.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import test_decode_step
import test_select_tokens
import test_token_confidence
import test_top_columns
import torch
from places import device_of
from problems import ATTENTION_DTYPES, AttentionProblem, assert_accurate, random_attention
from torch import Tensor

import attn_sampler
from attn_sampler import reference

INF, NAN = torch.inf, torch.nan
QUICK, ALL = 160, 5200


@pytest.mark.parametrize(
    "seeds",
    [range(0, QUICK // 2), range(QUICK // 2, QUICK)]
    + [pytest.param(range(i, i + 210), marks=pytest.mark.long) for i in range(QUICK, ALL, 210)],
    ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}",
)
def test_problems(backend: str, seeds: range) -> None:
    if backend == "reference":
        pytest.skip("the reference is what the others are judged by")
    for seed in seeds:
        try:
            check(backend, seed)
        except Exception as error:
            raise AssertionError(f"python tests/contract/test_fuzz.py {backend} {seed}") from error


def check(backend: str, seed: int) -> None:
    """Judge the problem of this seed."""
    rng = random.Random(f"problem {seed}")
    device = device_of(backend)
    with threads(rng.choice((1, 2, 5))):
        kind = rng.choice(
            ("column_scores",) * 3 + ("attention_map",) * 2 + ("confidence", "select", "step", "top")
        )
        if kind == "confidence":
            vocab = rng.choice((1, 2, 3, 17, 64, 257, 1023, 2048, 2049, 8191, rng.randint(1, 5000)))
            test_token_confidence.test_random_problems(backend, device, vocab, 1000 + seed)
        elif kind == "top":
            if attn_sampler.is_backend_supported("top_columns", backend).supported:
                test_top_columns.test_random_problems(backend, device, 1000 + seed, ATTENTION_DTYPES)
        elif kind == "select":
            check_selection(backend, device, rng)
        elif kind == "step":
            test_decode_step.test_random_steps(backend, device, 1000 + seed, ATTENTION_DTYPES)
        else:
            check_attention(kind, backend, device, rng)


def check_attention(name: str, backend: str, device: torch.device, rng: random.Random) -> None:
    """column_scores or attention_map: accuracy, what is not finite, and equal bits for any threads."""
    problem = random_problem(rng).to(device)
    more: dict = {"per_head": rng.random() < 0.3}
    n_rows = problem.q.shape[2]
    if name == "column_scores":
        more["reduction"] = rng.choice(("sum", "mean", "max"))
    elif n_rows > 0 and rng.random() < 0.6:
        start = rng.randrange(n_rows)
        more["rows"] = slice(start, rng.randint(start + 1, n_rows))
    elif n_rows == 0:
        return  # there is no row to map
    truth = problem.double().run(getattr(reference, name), **more)
    same_precision = problem.run(getattr(reference, name), **more)

    def run() -> Tensor:
        return problem.run(getattr(attn_sampler, name), backend=backend, **more)

    actual = run()
    infinite = truth.float().isinf()  # some of the truth is beyond float32
    assert torch.equal(actual.isinf(), infinite)
    assert_accurate(*(x.masked_fill(infinite, 0.0) for x in (actual, same_precision, truth)))
    assert (actual[truth == 0.0] == 0.0).all()
    with threads(rng.choice((1, 3, 4))):
        assert torch.equal(run().view(torch.int32), actual.view(torch.int32))

    storage = torch.full((*truth.shape[:-1], 2 * truth.shape[-1] + 1), 3.0, device=device)
    out = storage[..., 1::2]
    assert problem.run(getattr(attn_sampler, name), backend=backend, out=out, **more) is out
    assert torch.equal(out.nan_to_num(-1.0), (3.0 + actual).nan_to_num(-1.0))
    assert (storage[..., ::2] == 3.0).all()


def random_problem(rng: random.Random) -> AttentionProblem:
    """Any sizes, none among them; values that are not finite in sight of some."""
    seed = rng.randrange(1 << 30)
    long = rng.random() < 0.03  # more keys than any kernel takes at once
    problem = random_attention(
        seed,
        sizes=(1, 2, 5) if long else (0, 1, 2, 3, 15, 16, 17, 33, rng.randint(1, 150)),
        key_sizes=(rng.randint(2049, 16000),) if long else (1, 2, 3, 16, 33, 64, 65, rng.randint(1, 150)),
        headdims=(1, 8, 17) if long else (1, 2, 3, 16, 31, 32, 33, 62, 64, 128, rng.randint(1, 200)),
        groups=(1, 2, 3, 8),
        dtypes=ATTENTION_DTYPES,
    )
    q, k, lse = problem.q, problem.k, problem.options.get("softmax_lse")
    if rng.random() < 0.1:  # no sequence at all
        options = {n: v[:0] if isinstance(v, Tensor) else v for n, v in problem.options.items()}
        return AttentionProblem(q[:0], k[:0], options)
    if rng.random() < 0.2:
        place(rng, rng.choice((q, k)), rng.choice((INF, -INF, NAN)))
    if lse is not None and rng.random() < 0.2:
        place(rng, lse, rng.choice((INF, -INF, NAN)))
    return problem


def place(rng: random.Random, x: Tensor, value: float) -> None:
    """The value at one to three elements of x."""
    for _ in range(rng.randint(1, 3) if x.numel() > 0 else 0):
        x[tuple(rng.randrange(n) for n in x.shape)] = value


def check_selection(backend: str, device: torch.device, rng: random.Random) -> None:
    values = rng.choice(
        ([0.0, 0.25, 0.5, 0.75], [rng.random() for _ in range(50)], [0.5, NAN, INF, -INF, 0.9])
    )
    shape = rng.randint(1, 4), rng.randint(1, 70)
    test_select_tokens.judge(
        backend,
        *(test_select_tokens.draw(rng, shape, values, device) for _ in range(2)),
        test_select_tokens.draw(rng, shape, [True, False], device),
        rule=rng.choice(("parallel", "sequential")),
        tau=rng.choice((0.0, 0.5, 0.9, 1.0)),
        fallback=rng.choice(("confidence", "score")),
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    check(sys.argv[1], int(sys.argv[2]))
