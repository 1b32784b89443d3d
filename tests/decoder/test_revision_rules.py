"""The rules that take back, bit for bit, against their statement over plain Python numbers."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_policies import (
    MASK_ID,
    NAN,
    PROBABILITIES,
    SCORES,
    Row,
    as_float32,
    open_positions,
    philox_word,
    ranked,
    state,
)

from attn_sampler.policy import Decision
from attn_sampler.revision import T2M, T2T, WINO, AttnCheck, Revising, Rollback, Saber
from attn_sampler.sampler import make_policy


@dataclasses.dataclass
class Seen:
    """What a rule sees of one sequence, and what it keeps from step to step."""

    p: Row
    current: Row
    predicted: list[int]
    tokens: list[int]
    masked: list[bool]
    editable: list[bool]
    scores: Row
    attention: list[Row]
    seed: int
    memory: dict[str, Any]

    def confident(self, tau: float) -> set[int]:
        passing = {i for i in open_positions(self.masked) if self.p[i] >= as_float32(tau)}
        return passing | set(ranked(self.p, self.masked)[:1])

    def contradicted(self, tau: float) -> set[int]:
        """Another token is predicted with p >= tau."""
        return {
            i
            for i in open_positions(self.editable)
            if self.predicted[i] != self.tokens[i] and self.p[i] >= as_float32(tau)
        }


Answer = tuple[set[int], set[int], set[int], bool]  # commit, replace, remask, recheck


def t2t(policy: T2T, seen: Seen) -> Answer:
    steps = seen.memory["steps"] = seen.memory.get("steps", 0) + (not any(seen.masked))
    replace = seen.contradicted(policy.edit_tau) if steps <= policy.max_steps else set()
    return seen.confident(policy.tau), replace, set(), policy.max_steps > 0


def t2m(policy: T2M, seen: Seen) -> Answer:
    commit, last = seen.confident(policy.tau), seen.memory.get("last", seen.current)
    fell = {i for i, p in enumerate(seen.current) if as_float32(last[i] - p) > as_float32(policy.drop)}
    low = {i for i, p in enumerate(seen.current) if p < as_float32(policy.remask_tau)}
    seen.memory["last"] = [seen.p[i] if i in commit else p for i, p in enumerate(seen.current)]
    return commit, set(), low | fell | seen.contradicted(policy.edit_tau), True


def saber(policy: Saber, seen: Seen) -> Answer:
    commit, at_commit = seen.confident(policy.tau), seen.memory.get("at_commit", seen.current)
    fall = [as_float32(a - b) for a, b in zip(at_commit, seen.current, strict=True)]
    fallen = [e and f > 0.0 for e, f in zip(seen.editable, fall, strict=True)]
    back = max(min(math.floor(policy.share * len(commit)), len(commit) - 1), 0)
    seen.memory["at_commit"] = [seen.p[i] if i in commit else a for i, a in enumerate(at_commit)]
    return commit, set(), set(ranked(fall, fallen)[:back]), False


def attn_check(policy: AttnCheck, seen: Seen) -> Answer:
    commit, count = seen.confident(policy.tau), len(seen.p)
    contradicted = seen.contradicted(policy.edit_tau)
    failing = [
        e and (i in contradicted or p < as_float32(policy.doubt_tau))
        for i, (e, p) in enumerate(zip(seen.editable, seen.current, strict=True))
    ]
    influence = {
        "attention": seen.scores,
        "confidence": [1.0] * count,
        "random": [float(philox_word(seen.seed, (1 << 32) - 1, i)) for i in range(count)],
    }[policy.order]
    key = [
        as_float32(as_float32(1.0 - p) * as_float32(x)) for p, x in zip(seen.current, influence, strict=True)
    ]
    failed = set(ranked(key, failing)[: policy.max_checks])
    replace = failed & contradicted
    remask = failed - replace
    if policy.lean < 1.0:
        written = seen.memory.setdefault("written", [0] * count)  # in which pass
        for i in set(open_positions(seen.editable)) - failed:
            given = [seen.attention[i][j] for j in failed if written[j] <= written[i]]
            if sum(x for x in given if not math.isnan(x)) > policy.lean:
                remask.add(i)
        now = max(written) + 1
        seen.memory["written"] = [now if i in commit | replace else w for i, w in enumerate(written)]
    return commit, replace, remask, any(seen.p[i] < as_float32(policy.sure) for i in commit | replace)


def wino(policy: WINO, seen: Seen) -> Answer:
    doubted = {i for i, p in enumerate(seen.current) if p < as_float32(policy.verify_tau)}
    return seen.confident(policy.tau), set(), doubted, True


def rollback(policy: Rollback, seen: Seen) -> Answer:
    """A log of the passes [(position, p)], walked back to the first one that was unsure."""
    log, careful = seen.memory.setdefault("log", []), seen.memory.get("careful", False)
    p_of = {i: p for written in log for i, p in written.items()}
    key = {
        "attention": seen.scores,
        "confidence": [-p_of.get(i, 0.0) for i in range(len(seen.p))],
        "random": [float(philox_word(seen.seed, (1 << 32) - 1, i)) for i in range(len(seen.p))],
    }[policy.order]
    looked_at = ranked(key, seen.editable)[: policy.max_checks]
    safe = as_float32(policy.safe_tau)
    back: set[int] = set()
    if any(seen.current[i] < as_float32(policy.doubt_tau) for i in looked_at):
        unsure = [n for n, written in enumerate(log) if any(p < safe for p in written.values())]
        for n in range(unsure[0], len(log)) if unsure else ():
            back |= {i for i, p in log[n].items() if n > unsure[0] or p < safe}
    back &= set(open_positions(seen.editable))
    commit = set() if back else seen.confident(policy.safe_tau if careful else policy.tau)
    seen.memory["careful"] = careful or bool(back)
    seen.memory["log"] = [{i: p for i, p in written.items() if i not in back} for written in log]
    if not back:
        seen.memory["log"].append({i: seen.p[i] for i in commit})
    return commit, set(), back, any(seen.p[i] < as_float32(policy.sure) for i in commit)


CASES: list[tuple[Revising, Callable[..., Answer]]] = [
    (T2T(), t2t),
    (T2T(tau=0.9, edit_tau=0.9, max_steps=1), t2t),
    (T2T(tau=0.5, edit_tau=0.0, max_steps=0), t2t),
    (T2M(), t2m),
    (T2M(tau=0.5, remask_tau=0.0, edit_tau=0.9, drop=1.0), t2m),  # contradiction alone
    (T2M(tau=0.5, remask_tau=0.0, edit_tau=1.0, drop=0.25), t2m),
    (T2M(tau=0.0, remask_tau=0.5), t2m),
    (Saber(), saber),
    (Saber(tau=0.75, share=1.0), saber),
    (Saber(tau=0.5, share=0.4), saber),
    (WINO(), wino),
    (WINO(tau=0.25, verify_tau=0.5), wino),
    (Rollback(), rollback),
    (Rollback(tau=0.25, safe_tau=0.75, doubt_tau=0.5, sure=0.5), rollback),
    (Rollback(tau=0.25, safe_tau=0.9, doubt_tau=0.9, max_checks=1), rollback),
    (Rollback(tau=0.5, safe_tau=0.9, max_checks=2, order="confidence"), rollback),
    (Rollback(tau=0.0, safe_tau=1.0, doubt_tau=0.75, max_checks=1, order="random"), rollback),
    (AttnCheck(), attn_check),
    (AttnCheck(tau=0.25, doubt_tau=0.9, edit_tau=0.5, max_checks=1, sure=0.5), attn_check),
    (AttnCheck(tau=0.25, doubt_tau=0.9, edit_tau=0.5, max_checks=2, lean=0.25), attn_check),
    (AttnCheck(tau=0.25, doubt_tau=0.75, lean=0.0, order="confidence"), attn_check),
    (AttnCheck(tau=0.25, doubt_tau=0.9, max_checks=2, order="random", sure=1.0), attn_check),
    (AttnCheck(doubt_tau=0.9, max_checks=2, order="confidence", sure=0.0), attn_check),
]
WEIGHTS = [0.0, 0.0, 0.03125, 0.0625, 0.125, 0.25]  # dyadic: sums are exact in every order


def positions(where: torch.Tensor | None, row: int) -> set[int]:
    return set() if where is None else set(where[row].nonzero().squeeze(1).tolist())


@pytest.mark.parametrize(("policy", "rule"), CASES, ids=[repr(policy) for policy, _ in CASES])
def test_rule(policy: Revising, rule: Callable[..., Answer]) -> None:
    """Several steps of a block, with sequences that leave the batch on the way, then a fresh block."""
    rng = random.Random(repr(policy))
    kinds: Counter[str] = Counter()
    for trial in range(120):
        undefined = 0.15 if trial % 4 == 3 else 0.0
        batch, count = rng.randint(1, 4), rng.randint(1, 8)
        tokens = [[rng.choice([MASK_ID, MASK_ID, 0, 1]) for _ in range(count)] for _ in range(batch)]
        budget = [[2 if t == MASK_ID else 0 for t in row] for row in tokens]
        memory: list[dict[str, Any]] = [{} for _ in range(batch)]
        rows = list(range(batch))
        policy.reset()
        for _ in range(7):
            seen = []
            for b in rows:
                masked = [t == MASK_ID for t in tokens[b]]
                p = [NAN if rng.random() < undefined else rng.choice(PROBABILITIES) for _ in range(count)]
                current = [
                    NAN if math.isnan(x) else 0.0 if m else rng.choice(PROBABILITIES)
                    for x, m in zip(p, masked, strict=True)
                ]
                editable = [
                    not m and n > 0 and not math.isnan(x)
                    for m, n, x in zip(masked, budget[b], p, strict=True)
                ]
                scores = [NAN if rng.random() < undefined / 2 else rng.choice(SCORES) for _ in range(count)]
                attention = [[rng.choice(WEIGHTS) for _ in range(count)] for _ in range(count)]
                predicted = [rng.randrange(3) for _ in range(count)]
                row = (predicted, tokens[b], masked, editable, scores, attention, rng.getrandbits(62))
                seen.append(Seen(p, current, *row, memory[b]))
            step = state(
                [s.p for s in seen],
                [s.masked for s in seen],
                scores=[s.scores for s in seen],
                seeds=[s.seed for s in seen],
                sequence=rows,
            )
            step.current = torch.tensor([s.current for s in seen], dtype=torch.float32)
            step.tokens = torch.tensor([s.tokens for s in seen])
            step.token_ids = torch.tensor([s.predicted for s in seen])
            step.editable = torch.tensor([s.editable for s in seen])
            step.budget = step.editable.to(torch.int32)
            step.attention_map = torch.tensor([s.attention for s in seen], dtype=torch.float32)
            decision = policy.select(step)
            assert isinstance(decision, Decision)
            for n, (b, s) in enumerate(zip(rows, seen, strict=True)):
                may = set(open_positions(s.editable))
                differs = {i for i in may if s.tokens[i] != s.predicted[i]}
                replace = positions(decision.replace, n) & differs  # as Policy.step has it
                remask = (positions(decision.remask, n) & may) - replace
                recheck = decision.recheck is not None and bool(decision.recheck[n])
                commit, *expected, asked = rule(policy, s)
                assert positions(decision.commit, n) == commit
                assert [replace, remask] == [expected[0], (expected[1] & may) - expected[0]], s
                assert recheck == asked
                if isinstance(policy, Saber):
                    assert len(remask) < len(commit) or not remask
                for i in commit | replace:
                    tokens[b][i] = s.predicted[i]
                for i in remask:
                    tokens[b][i] = MASK_ID
                for i in replace | remask:
                    budget[b][i] -= 1
                kinds += Counter(commit=len(commit), replace=len(replace), remask=len(remask))
            rows = [b for b in rows if rng.random() < 0.85]
            if not rows:
                break
    replaces = isinstance(policy, (T2T, AttnCheck))
    assert kinds["commit"] > 100
    assert (kinds["replace"] > 20) == replaces
    assert (kinds["remask"] > 0) == (not isinstance(policy, T2T))


def test_attn_check_worked_example() -> None:
    """Three doubtful tokens: the most attended one is judged first, though another is more doubtful."""
    step = state([[0.95, 0.95, 0.6, 0.99]], [[False, False, False, True]], scores=[[4.0, 1.0, 2.0, 9.0]])
    step.current = torch.tensor([[0.25, 0.0, 0.4, 0.0]])
    step.tokens = torch.tensor([[1, 1, 1, MASK_ID]])  # 0 is predicted everywhere
    step.editable = torch.tensor([[True, True, True, False]])
    step.budget = torch.ones(1, 4, dtype=torch.int32)
    step.attention_map = torch.zeros(1, 4, 4)
    for order, replaced in (("attention", 0), ("confidence", 1)):
        decision = AttnCheck(max_checks=1, order=order).select(step)
        assert positions(decision.replace, 0) == {replaced}
        assert positions(decision.remask, 0) == set()
        assert positions(decision.commit, 0) == {3}
        assert decision.recheck.tolist() == [True]  # 0.99 is sure, the 0.95 that replaces is not
    second = AttnCheck(max_checks=2).select(step)  # 4 x .75 and 2 x .6 before 1 x 1; p = 0.6 replaces nothing
    assert (positions(second.replace, 0), positions(second.remask, 0)) == ({0}, {2})


def test_attn_check_takes_back_what_leaned_on_a_failed_token() -> None:
    """Position 1 was written with 0 and leans on it; 2 was there before; 3 came later and leans elsewhere."""
    policy = AttnCheck(tau=0.5, lean=0.5, max_checks=1)
    step = state([[0.0, 0.0, 0.9, 0.0]], [[True] * 4], scores=[[1.0] * 4])
    step.attention_map = torch.tensor([[[0.0] * 4, [0.75, 0, 0, 0], [0.75, 0, 0, 0], [0.25, 0, 0.75, 0]]])
    step.current, step.editable = torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.bool)
    step.tokens = torch.full((1, 4), MASK_ID)
    step.budget = torch.ones(1, 4, dtype=torch.int32)
    order = [{2}, {0, 1}, {3}]
    for commit in order:
        step.confidence = torch.tensor([[0.9 if i in commit else 0.0 for i in range(4)]])
        assert positions(policy.select(step).commit, 0) == commit
        for i in commit:
            step.masked[0, i], step.tokens[0, i] = False, 1
    step.current, step.editable = torch.tensor([[0.1, 0.9, 0.9, 0.9]]), torch.ones(1, 4, dtype=torch.bool)
    assert positions(policy.select(step).remask, 0) == {0, 1}


@pytest.mark.parametrize(
    ("order", "lean", "needs"),
    [
        ("attention", 1.0, (True, False)),
        ("attention", 0.5, (True, True)),
        ("random", 1.0, (False, False)),
        ("confidence", 0.5, (True, True)),
    ],
)
def test_attn_check_asks_for_the_attention_it_reads(order: str, lean: float, needs: tuple) -> None:
    policy = AttnCheck(order=order, lean=lean)
    assert (policy.needs_scores, policy.needs_map) == needs


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("t2t", {"edit_tau": 1.5}, ValueError, "edit_tau: "),
        ("t2t", {"max_steps": -1}, ValueError, "max_steps: "),
        ("t2t", {"max_edits": 1.0}, TypeError, "max_edits: "),
        ("t2m", {"drop": -0.5}, ValueError, "drop: "),
        ("t2m", {"max_edits": -1}, ValueError, "max_edits: "),
        ("saber", {"share": 2}, ValueError, "share: "),
        (
            "attn-check",
            {"order": "reverse"},
            ValueError,
            "order: expected one of attention, random, confidence",
        ),
        ("wino", {"verify_tau": 2.0}, ValueError, "verify_tau: "),
        ("attn-check", {"shadow": 1}, TypeError, "shadow: "),
        ("attn-check", {"max_checks": 0}, ValueError, "max_checks: "),
        ("attn-check", {"lean": NAN}, ValueError, "lean: "),
    ],
)
def test_bad_options(name: str, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_policy(name, **options)
