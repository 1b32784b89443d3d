"""What a revision needs and does, on every backend: probabilities of the tokens that stand, row masses, and
which tokens are taken back.
"""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from problems import DTYPES, FLOAT8, assert_accurate, judge, normal, random_attention
from torch import Tensor

from attn_sampler import attention_map, decode_step, reference, revise_tokens, select_tokens, token_confidence
from attn_sampler.reference import REMASKED, REPLACED

INF, NAN = math.inf, math.nan
ORDERS = ("product", "doubt", "score")


@pytest.mark.parametrize("reduction", ["sum", "diagonal"])
@pytest.mark.parametrize("seed", range(40))
def test_reduced_rows(backend, device, seed, reduction):
    problem = random_attention(seed, dtypes=(*DTYPES, FLOAT8)).to(device)
    n_rows, n_keys = problem.q.shape[2], problem.k.shape[2]
    columns = problem.options.get("columns", slice(0, n_keys))
    if seed % 3 == 0:
        drawn = torch.rand(len(problem.q), 2 * (columns.stop - columns.start), generator=_generator(seed))
        problem.options["column_mask"] = (drawn < 0.5).to(device)[:, ::2]
    rows = (None, slice(n_rows // 3, n_rows // 3 + 1), slice(n_rows // 2, n_rows))[seed % 3]
    judge("attention_map", backend, problem, rows=rows, per_head=seed % 4 == 0, reduction=reduction)


@pytest.mark.parametrize("seed", range(500, 506))
def test_a_column_mask_leaves_out_columns_of_the_map(backend, device, seed):
    problem = random_attention(seed).to(device)
    columns = problem.options.setdefault("columns", slice(0, problem.k.shape[2]))
    counts = (torch.arange(columns.stop - columns.start, device=device) % 2 == 0).expand(len(problem.q), -1)
    problem.options["column_mask"] = counts
    judged = judge("attention_map", backend, problem)
    assert (judged[..., 1::2] == 0.0).all()


def test_reduced_rows_are_added_into_out(backend, device):
    q, k = normal(0, 2, 4, 9, 40).to(device), normal(1, 2, 2, 21, 40).to(device)
    out = torch.full((2, 20), 3.0, device=device)[:, 1:19:2]
    assert attention_map(q, k, reduction="sum", out=out, backend=backend) is out
    torch.testing.assert_close(out, torch.full((2, 9), 7.0, device=device))  # 4 heads, all keys


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [3, 63, 4097, 20_000])
@pytest.mark.parametrize("metric", ["probability", "margin", "entropy"])
def test_predictions_tell_of_the_current_tokens(backend, device, vocab, dtype, metric):
    logits = (normal(vocab, 3, 5, vocab) * 3.0).to(dtype)
    logits[0, 0, 0], logits[0, 1], logits[0, 2, vocab - 1] = NAN, -INF, INF
    logits[1, 0, 1:] = -INF
    logits = logits.to(device)
    current = torch.randint(0, vocab, (3, 10), generator=_generator(vocab)).to(device)[:, ::2]
    current[2, :3] = torch.tensor([-1, vocab, 1 << 40])
    options = {"exclude_token_id": vocab // 2, "current_ids": current, "metric": metric}
    if dtype == torch.float32:
        options |= {"temperature": 0.7, "seed": 5}
    result = token_confidence(logits, backend=backend, **options)
    same_precision = reference.token_confidence(logits, **options)
    truth = reference.token_confidence(logits.double(), **options)
    plain_ids, plain = token_confidence(
        logits, backend=backend, **{name: value for name, value in options.items() if name != "current_ids"}
    )
    assert torch.equal(result.token_ids, same_precision.token_ids)
    assert torch.equal(result.token_ids, plain_ids)
    torch.testing.assert_close(result.confidence, plain, rtol=0, atol=0, equal_nan=True)
    for name in ("log_prob", "current"):
        assert_accurate(*(getattr(x, name) for x in (result, same_precision, truth)))
    assert result.current[0, :3].isnan().all()
    assert result.current[2, :3].isnan().all()
    assert (result.current[current == vocab // 2].nan_to_num(0.0) == 0.0).all()


def test_without_current_ids_there_is_no_current(backend, device):
    result = token_confidence(normal(0, 1, 2, 9).to(device), backend=backend)
    token_ids, confidence = result
    assert result.current is None
    assert token_ids is result.token_ids
    torch.testing.assert_close(result.log_prob.exp(), confidence)


def _drawn(seed: int, device: torch.device) -> dict[str, Tensor]:
    """Operands of a selection with a revision, with ties, NaN and infinities."""
    rng = random.Random(seed)
    batch, columns = rng.randint(1, 4), rng.choice((1, 2, 7, 32, 33, 64, 200, 1030))
    steps = rng.choice((3, 8, 1000))

    def numbers(scale: float) -> Tensor:
        x = (
            torch.randint(0, steps + 1, (batch, columns), generator=_generator(rng.randrange(1 << 30)))
            / steps
        )
        for value in (NAN, INF, -INF, NAN) if rng.random() < 0.4 else ():
            x[rng.randrange(batch), rng.randrange(columns)] = value
        wide = torch.full((batch, 2 * columns), NAN)
        wide[:, ::2] = x * scale
        return wide.to(device)[:, ::2]

    def flags(share: float) -> Tensor:
        x = torch.rand(batch, columns, generator=_generator(rng.randrange(1 << 30))) < share
        return x.to(device)

    budget = torch.randint(-1, 4, (batch, columns), generator=_generator(seed), dtype=torch.int32).to(device)
    return {
        "scores": numbers(5.0),
        "confidence": numbers(1.0),
        "masked": flags(rng.choice((0.0, 0.3, 1.0))),
        "current": numbers(1.0),
        "differs": flags(0.7),
        "budget": budget,
    }


def _brute_force(x: dict[str, Tensor], replace_tau, remask_tau, most, order) -> tuple[Tensor, Tensor]:
    """The rule, one position at a time, in numpy's float32."""
    x = {name: value.cpu().numpy() for name, value in x.items()}
    revised, budget = x["masked"].astype("uint8") * 0, x["budget"].copy()
    replace_tau, remask_tau = torch.tensor([replace_tau, remask_tau]).numpy()
    for b in range(len(budget)):
        failing = []
        for c in range(budget.shape[1]):
            if x["masked"][b, c] or budget[b, c] <= 0:
                continue
            replaces = x["differs"][b, c] and x["confidence"][b, c] >= replace_tau
            if replaces or x["current"][b, c] < remask_tau:
                doubt, score = 1 - x["current"][b, c], x["scores"][b, c]
                with np.errstate(invalid="ignore"):
                    key = {"doubt": doubt, "score": score, "product": doubt * score}[order]
                failing.append((INF if key != key else -key, c, REPLACED if replaces else REMASKED))
        for _, c, verdict in sorted(failing)[:most]:
            revised[b, c] = verdict
            budget[b, c] -= 1
    return torch.from_numpy(revised), torch.from_numpy(budget)


@pytest.mark.parametrize("seed", range(60))
def test_revisions_against_brute_force(backend, device, seed):
    rng, operands = random.Random(seed), _drawn(seed, device)
    replace_tau, remask_tau = rng.choice((INF, 0.0, 0.5, 0.9)), rng.choice((0.0, 0.3, 0.5, 1.0))
    most, order = rng.choice((None, 0, 1, 2, 5, 64, 1 << 40)), ORDERS[seed % 3]
    expected = _brute_force(operands, replace_tau, remask_tau, most, order)
    revised = revise_tokens(
        *operands.values(),
        replace_tau=replace_tau,
        remask_tau=remask_tau,
        max_revisions=most,
        revision_order=order,
        backend=backend,
    )
    assert revised.dtype == torch.uint8
    assert torch.equal(revised.cpu(), expected[0])
    assert torch.equal(operands["budget"].cpu(), expected[1])


@pytest.mark.parametrize("fallback", ["confidence", "score"])
@pytest.mark.parametrize("seed", range(100, 120))
def test_threshold_commits_whatever_the_scores(backend, device, seed, fallback):
    x = _drawn(seed, device)
    scores, confidence, masked = x["scores"], x["confidence"], x["masked"]
    selected = select_tokens(
        scores, confidence, masked, rule="threshold", tau=0.5, fallback=fallback, backend=backend
    )
    for b in range(len(masked)):
        passing = [c for c in range(masked.shape[1]) if masked[b, c] and confidence[b, c] >= 0.5]
        value = confidence if fallback == "confidence" else scores
        ranks = [
            (-(-INF if value[b, c].isnan() else value[b, c].item()), c)
            for c in range(masked.shape[1])
            if masked[b, c] and not (fallback == "score" and scores[b, c].isnan())
        ]
        expected = passing or [c for _, c in sorted(ranks)[:1]]
        assert selected[b].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("seed", range(16))
def test_a_step_is_its_parts(backend, device, seed):
    """Commits, replacements and re-maskings of one call, bit for bit what the functions say one by one."""
    rng = random.Random(seed)
    batch, block, vocab, mask = rng.randint(1, 3), rng.choice((1, 8, 32, 33)), rng.choice((9, 300, 5000)), 3
    tokens = torch.randint(0, vocab, (batch, block + 7), generator=_generator(seed))
    tokens[torch.rand(tokens.shape, generator=_generator(seed + 1)) < 0.3] = mask
    tokens, place = tokens.to(device), slice(4, 4 + block)
    before = tokens.clone()
    logits = (normal(seed, batch, block, vocab, dtype=DTYPES[seed % 3]) * 2.0).to(device)
    budget = torch.randint(0, 3, (batch, block), generator=_generator(seed), dtype=torch.int32).to(device)
    expected_budget = budget.clone()
    how = {
        "replace_tau": rng.choice((0.05, 0.5, INF)),
        "remask_tau": rng.choice((0.0, 0.02, 0.5)),
        "max_revisions": rng.choice((None, 2)),
        "revision_order": ORDERS[seed % 3],
    }
    rule = ("parallel", "threshold", "sequential")[seed % 3]
    layers = scores = None
    if seed % 2:
        q = normal(seed, batch, 4, block + 7, 32).to(device)
        k = normal(seed + 1, batch, 2, block + 7, 32).to(device)
        layers = [(q, k), (k.repeat(1, 2, 1, 1), k)]
    else:
        scores = normal(seed, batch, block).to(device)
    result = decode_step(
        tokens,
        logits,
        layers,
        scores=scores,
        block=place,
        mask_token_id=mask,
        rule=rule,
        tau=0.3,
        budget=budget,
        backend=backend,
        **how,
    )
    stood, masked = before[:, place], before[:, place] == mask
    predicted = token_confidence(logits, exclude_token_id=mask, current_ids=stood, backend=backend)
    selected = select_tokens(result.scores, predicted.confidence, masked, rule=rule, tau=0.3, backend=backend)
    seen = (result.scores, predicted.confidence, masked, predicted.current, predicted.token_ids != stood)
    revised = revise_tokens(*seen, expected_budget, backend=backend, **how)
    assert torch.equal(result.selected, selected)
    assert torch.equal(result.revised, revised)
    assert result.budget is budget
    assert torch.equal(budget, expected_budget)
    for name in ("token_ids", "log_prob", "current"):
        assert torch.equal(getattr(result, name), getattr(predicted, name))
    written = before.clone()
    written[:, place] = torch.where(selected | (revised == REPLACED), predicted.token_ids, stood)
    written[:, place].masked_fill_(revised == REMASKED, mask)
    assert torch.equal(tokens, written)


def test_autograd_knows_that_the_budget_is_written(backend, device):
    operands = _drawn(3, device)
    version = operands["budget"]._version
    revise_tokens(*operands.values(), remask_tau=0.5, backend=backend)
    assert operands["budget"]._version > version


def test_memory_of_an_operand_is_not_written(backend, device):
    operands = _drawn(3, device)
    operands["budget"] = operands["scores"].contiguous().view(torch.int32)
    operands["scores"] = operands["budget"].view(torch.float32)
    with pytest.raises(ValueError, match="budget: expected memory of its own"):
        revise_tokens(*operands.values(), remask_tau=0.5, backend=backend)


def _step(**options):
    tokens, logits = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, 5)
    step = {"scores": torch.zeros(1, 4), "block": slice(0, 4), "mask_token_id": 0, "backend": "cpu"}
    decode_step(tokens, logits, **{**step, **options})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: _step(remask_tau=0.5), TypeError, "budget: needed for replace_tau, remask_tau"),
        (lambda: _step(budget=torch.ones(1, 4)), ValueError, "budget: expected dtype int32, got float32"),
        (
            lambda: _step(budget=torch.ones(1, 3, dtype=torch.int32)),
            ValueError,
            r"budget: expected shape \[B, C\]",
        ),
        (
            lambda: _step(budget=torch.ones(1, 4, dtype=torch.int32), remask_tau=1.5),
            ValueError,
            r"remask_tau: expected a number in \[0, 1\], got 1.5",
        ),
        (
            lambda: _step(budget=torch.ones(1, 4, dtype=torch.int32), replace_tau=-1.0),
            ValueError,
            "replace_tau: expected a number >= 0, got -1.0",
        ),
        (
            lambda: _step(budget=torch.ones(1, 4, dtype=torch.int32), max_revisions=-1),
            ValueError,
            "max_revisions",
        ),
        (
            lambda: _step(budget=torch.ones(1, 4, dtype=torch.int32), revision_order="best"),
            ValueError,
            "revision_order: expected one of product, doubt, score, got 'best'",
        ),
        (
            lambda: token_confidence(torch.zeros(1, 4, 5), current_ids=torch.zeros(1, 4), backend="cpu"),
            ValueError,
            "current_ids: expected dtype int64, got float32",
        ),
        (
            lambda: attention_map(
                torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8), reduction="max", backend="cpu"
            ),
            ValueError,
            "reduction: expected one of none, sum, diagonal, got 'max'",
        ),
        (
            lambda: attention_map(
                *(torch.zeros(1, 1, 2, 8),) * 2, column_mask=torch.ones(1, 3, dtype=torch.bool), backend="cpu"
            ),
            ValueError,
            r"column_mask: expected shape \[B, C\] = \[1, 2\], got \[1, 3\]",
        ),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
