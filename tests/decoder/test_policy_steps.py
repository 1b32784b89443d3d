"""A policy's step, policies of the user, and the registry."""

from __future__ import annotations

import math
import re
import textwrap

import pytest
import torch
from test_policies import BUILT_IN, MASK_ID, NAN, softmax, state
from torch import Tensor

from attn_sampler import BackendUnavailableError, Decision, sampler
from attn_sampler.sampler import (
    KLASS,
    PARD,
    AttnSampler,
    Policy,
    StepState,
    make_policy,
    register_policy,
)


def run_step(policy: Policy, logits: Tensor, masked: Tensor, attention: object = None, **options: object):  # type: ignore[no-untyped-def]
    tokens = torch.where(masked, MASK_ID, 1)
    tokens = torch.cat([torch.full((len(tokens), 2), 2), tokens], dim=1)  # two given tokens before the block
    count = masked.shape[1]
    arguments = {
        "block": slice(2, 2 + count),
        "mask_token_id": MASK_ID,
        "sequence": torch.arange(len(tokens)),
        "seeds": torch.arange(len(tokens)),
        **options,
    }
    return policy.step(tokens, logits, attention, **arguments)  # type: ignore[arg-type]


METRICS = {
    "probability": lambda p: max(p),
    "margin": lambda p: sorted(p)[-1] - sorted(p)[-2],
    "entropy": lambda p: sum(x * math.log(x) for x in p if x > 0.0),
}


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_step_predicts_selects_and_commits(name: str) -> None:
    policy = make_policy(name)
    generator = torch.Generator().manual_seed(3)
    for _ in range(30):
        logits = torch.randn(3, 6, 5, generator=generator) * 3
        logits[..., MASK_ID] = 20.0  # never predicted
        masked = torch.rand(3, 6, generator=generator) > 0.4
        scores = torch.rand(3, 6, generator=generator)
        policy.reset()
        attention = torch.diag_embed(scores) if policy.needs_map else scores  # its column sums are the scores
        # No budget, nothing taken back.
        options = {"budget": torch.zeros(3, 6, dtype=torch.int32)} if policy.revises else {}
        result = run_step(policy, logits, masked, attention if policy.needs_scores else None, **options)
        probabilities = [[softmax(row) for row in rows] for rows in logits.tolist()]
        best = torch.tensor([[p.index(max(p)) for p in rows] for rows in probabilities])
        assert torch.equal(result.token_ids, best)
        confidence = torch.tensor([[METRICS[policy.metric](p) for p in rows] for rows in probabilities])
        torch.testing.assert_close(result.confidence, confidence, rtol=1e-5, atol=1e-5)
        assert not (result.selected & ~masked).any()
        assert torch.equal(result.selected.any(dim=1), masked.any(dim=1))
        expected = torch.where(result.selected, best, torch.where(masked, MASK_ID, 1))
        assert torch.equal(result.tokens[:, 2:], expected)
        assert (result.tokens[:, :2] == 2).all()
        assert torch.equal(result.scores, scores) if policy.needs_scores else result.scores.isnan().all()


def test_step_selects_by_the_confidence_in_its_metric() -> None:
    # The most probable, the largest margin and the lowest entropy stand at different positions.
    logits = torch.tensor(
        [[0.52, 0.47, 0.005, 0.005], [0.45, 0.19, 0.18, 0.18], [0.51, 0.245, 0.2449, 0.0001]]
    )
    logits = torch.nn.functional.pad(logits.log(), (0, 1), value=-5.0)[None]
    masked = torch.ones(1, 3, dtype=torch.bool)
    picks = {
        name: run_step(make_policy(name), logits, masked).selected[0].tolist()
        for name in ("confidence", "margin", "entropy")
    }
    assert picks == {
        "confidence": [True, False, False],
        "margin": [False, False, True],
        "entropy": [True, False, False],
    }


class ByScore(Policy):
    """A policy as a user writes one."""

    needs_scores = True

    def select(self, state: StepState) -> Tensor:
        assert state.scores is not None
        return state.scores > 0.0  # unmasked positions too: the step leaves those alone


def layers(rows: int, seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(3):
        q, k = (torch.randn(2, 4, n, 8, generator=generator) for n in (rows, rows))
        result.append((q, k, torch.logsumexp(q @ k.transpose(2, 3) * 8**-0.5, dim=-1)))
    return result


@pytest.mark.parametrize("mode", ["parallel", "sequential", "mean"])
def test_attn_sampler_step_is_the_general_step(mode: str) -> None:
    """decode_step in one call, and column scores, confidence and selection one by one."""
    options = {"mean": {"tau": 0.5, "threshold": "mean"}, "parallel": {"tau": 0.5}}
    policy = AttnSampler(**options.get(mode, {"mode": mode}))
    logits = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1)) * 3
    masked = torch.rand(2, 6, generator=torch.Generator().manual_seed(2)) > 0.3
    for temperature in (0.0, 0.8):
        options = {"columns": slice(2, 8), "diagonal": False, "temperature": temperature}
        one = run_step(policy, logits, masked, layers(8), **options)
        general = AttnSampler.__mro__[1].step
        tokens = torch.cat([torch.full((2, 2), 2), torch.where(masked, MASK_ID, 1)], dim=1)
        many = general(
            policy,
            tokens,
            logits,
            layers(8),
            block=slice(2, 8),
            mask_token_id=MASK_ID,
            sequence=torch.arange(2),
            seeds=torch.arange(2),
            **options,
        )
        torch.testing.assert_close(one.scores, many.scores, rtol=1e-5, atol=1e-6)
        for name in ("tokens", "token_ids", "confidence", "selected"):
            assert torch.equal(getattr(one, name), getattr(many, name)), name


def test_policy_of_the_user_reads_scores_and_commits_masked_positions_only() -> None:
    masked = torch.tensor([[True, False, True, False, True, True], [True] * 6])
    result = run_step(ByScore(), torch.randn(2, 6, 5), masked, layers(8), columns=slice(2, 8))
    truth = sum(
        (q @ k.transpose(2, 3) * 8**-0.5 - lse[..., None]).exp().sum(dim=(1, 2)) for q, k, lse in layers(8)
    )
    torch.testing.assert_close(result.scores, truth[:, 2:], rtol=1e-5, atol=1e-5)
    assert torch.equal(result.selected, masked)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (None, TypeError, r"Broken.select: expected a tensor \[B, C\], got NoneType"),
        (torch.ones(1, 3), ValueError, "Broken.select: expected dtype bool, got float32"),
        (torch.ones(3, dtype=torch.bool), ValueError, "Broken.select: expected a 2-dimensional tensor"),
        (torch.ones(1, 1, dtype=torch.bool), ValueError, r"Broken.select: expected shape .* = \[1, 3\]"),
    ],
)
def test_policy_of_the_user_that_answers_something_else(
    answer: object, error: type[Exception], message: str
) -> None:
    class Broken(Policy):
        def select(self, state: StepState) -> Tensor:
            return answer  # type: ignore[return-value]

    with pytest.raises(error, match=message):
        run_step(Broken(), torch.randn(1, 3, 5), torch.ones(1, 3, dtype=torch.bool))


class Reviser(Policy):
    """Answers what it is told to, and keeps what it was shown."""

    revises = True

    def __init__(self, **decision: Tensor) -> None:
        self.decision = decision

    def select(self, state: StepState) -> Decision:
        self.state = state
        return Decision(**{"commit": state.masked, **self.decision})  # type: ignore[arg-type]


def revising_step(policy: Policy, logits: Tensor, **options: object):  # type: ignore[no-untyped-def]
    """Of the block's tokens [5, 1, 2, 3, mask, 1], where the first has no budget; 0 is predicted, last 1."""
    tokens = torch.tensor([[2, 2, 5, 1, 2, 3, MASK_ID, 1]])
    budget = torch.tensor([[0, 1, 2, 3, 3, 3]], dtype=torch.int32)
    arguments = {"block": slice(2, 8), "mask_token_id": MASK_ID, "seeds": torch.zeros(1, dtype=torch.int64)}
    arguments |= {"sequence": torch.zeros(1, dtype=torch.int64), "budget": budget, **options}
    return policy.step(tokens, logits, None, **arguments), budget  # type: ignore[arg-type]


def revising_logits() -> Tensor:
    logits = torch.tensor([3.0, 1.0, 0.0, -1.0, 9.0, 0.5]).repeat(1, 6, 1)  # the mask token: never predicted
    logits[0, 5, 1] = 5.0
    return logits


EVERYWHERE = torch.ones(1, 6, dtype=torch.bool)
ONLY_1 = torch.tensor([[False, True, False, False, False, False]])


@pytest.mark.parametrize(
    ("decision", "tokens", "revised", "budget"),
    [
        ({}, [5, 1, 2, 3, 0, 1], [0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 3, 3]),
        # Not without budget, nor where the prediction stands already, nor where nothing stood.
        ({"replace": EVERYWHERE}, [5, 0, 0, 0, 0, 1], [0, 1, 1, 1, 0, 0], [0, 0, 1, 2, 3, 3]),
        ({"remask": EVERYWHERE}, [5, 4, 4, 4, 0, 4], [0, 2, 2, 2, 0, 2], [0, 0, 1, 2, 3, 2]),
        (
            {"replace": ONLY_1, "remask": EVERYWHERE},
            [5, 0, 4, 4, 0, 4],
            [0, 1, 2, 2, 0, 2],
            [0, 0, 1, 2, 3, 2],
        ),
    ],
)
def test_step_revises(decision: dict, tokens: list, revised: list, budget: list) -> None:
    result, left = revising_step(Reviser(**decision), revising_logits())
    assert result.tokens.tolist() == [[2, 2, *tokens]]
    assert result.revised.tolist() == [revised]
    assert result.revised.dtype == torch.uint8
    assert result.budget is left
    assert left.tolist() == [budget]
    assert result.selected.tolist() == [[False] * 4 + [True, False]]


@pytest.mark.parametrize("metric", ["probability", "entropy"])
def test_what_a_policy_that_revises_is_shown(metric: str) -> None:
    policy = Reviser(replace=EVERYWHERE)
    policy.metric = metric  # type: ignore[misc]
    result, _ = revising_step(policy, revising_logits())
    p = [softmax([*row[:4], -math.inf, row[5]]) for row in revising_logits()[0].tolist()]
    standing = [p[0][5], p[1][1], p[2][2], p[3][3], 0.0, p[5][1]]
    torch.testing.assert_close(result.current, torch.tensor([standing]))
    assert torch.equal(policy.state.current, result.current)
    assert policy.state.editable.tolist() == [[False, True, True, True, False, True]]
    best = torch.tensor([[max(row) for row in p]])
    torch.testing.assert_close(result.log_prob, best.log())
    plain = run_step(make_policy("confidence"), revising_logits(), ~EVERYWHERE)
    assert plain.current is plain.revised is plain.budget is None


def test_undefined_logits_revise_nothing() -> None:
    for undefined in (torch.nan, torch.inf):
        logits = revising_logits()
        logits[0, :4] = undefined
        result, _ = revising_step(Reviser(replace=EVERYWHERE, remask=EVERYWHERE), logits)
        assert result.revised.tolist() == [[0, 0, 0, 0, 0, 2]]


def test_step_says_which_sequences_ask_for_a_check() -> None:
    for asked in (True, False):
        recheck = torch.tensor([False])
        revising_step(Reviser(recheck=torch.tensor([asked])), revising_logits(), recheck=recheck)
        assert recheck.tolist() == [asked]
    revising_step(Reviser(recheck=torch.tensor([True])), revising_logits())  # nobody wants to know


@pytest.mark.parametrize(
    ("decision", "options", "error", "message"),
    [
        ({}, {"budget": None}, TypeError, r"budget: expected a tensor \[B, C\], got NoneType"),
        ({}, {"budget": torch.ones(1, 6)}, ValueError, "budget: expected dtype int32"),
        ({}, {"budget": torch.ones(1, 5, dtype=torch.int32)}, ValueError, "budget: expected shape"),
        ({"replace": torch.ones(1, 6)}, {}, ValueError, "Reviser.select: expected dtype bool"),
        ({"remask": torch.ones(6) > 0}, {}, ValueError, "Reviser.select: expected a 2-dimensional"),
        ({"recheck": EVERYWHERE}, {}, ValueError, r"Reviser.select: expected a 1-dimensional tensor \[B\]"),
        ({"recheck": EVERYWHERE[0]}, {}, ValueError, r"Reviser.select: expected shape \[B\] = \[1\]"),
        ({"commit": None}, {}, TypeError, r"Reviser.select: expected a tensor \[B, C\], got NoneType"),
    ],
)
def test_decisions_that_are_none(decision: dict, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        revising_step(Reviser(**decision), revising_logits(), **options)


def test_a_policy_that_does_not_say_so_revises_nothing() -> None:
    policy = Reviser(remask=EVERYWHERE)
    policy.revises = False  # type: ignore[misc]
    with pytest.raises(ValueError, match="expected no remask of a policy whose revises is False"):
        run_step(policy, torch.randn(1, 6, 5), EVERYWHERE)


def test_policy_of_the_documentation() -> None:
    code = textwrap.dedent("\n".join(re.findall(r"(?m)^(?: {4}.*)?$", sampler.__doc__ or "")))
    names = vars(sampler).copy()
    exec(compile(code, "the module's docstring", "exec"), names)
    scores = torch.tensor([[3.0, 1.0, 2.5, 0.1], [1.0, 9.0, 8.0, 1.0]])
    masked = torch.tensor([[True, True, True, True], [True, False, False, True]])
    logits = torch.randn(2, 4, 5)
    result = run_step(names["AboveMean"](), logits, masked, scores)
    assert result.selected.tolist() == [[True, False, True, False], [True, False, False, False]]


def test_attn_sampler_needs_attention() -> None:
    with pytest.raises(ValueError, match="attention: expected column scores"):
        run_step(AttnSampler(), torch.randn(1, 2, 5), torch.ones(1, 2, dtype=torch.bool))


@pytest.mark.parametrize("name", ["attn", "confidence"])
def test_backend_reaches_every_function(name: str) -> None:
    policy, masked = make_policy(name), torch.ones(1, 2, dtype=torch.bool)
    scores = torch.rand(1, 2) if policy.needs_scores else None
    with pytest.raises(BackendUnavailableError, match="'cuda' cannot run"):
        run_step(policy, torch.randn(1, 2, 5), masked, scores, backend="cuda")
    assert run_step(policy, torch.randn(1, 2, 5), masked, scores, backend="reference").selected.any()


def test_select_runs_on_the_backend_of_the_state() -> None:
    step = state([[0.5]], [[True]], scores=[[1.0]], backend="cuda")
    with pytest.raises(BackendUnavailableError, match="'cuda' cannot run select_tokens"):
        AttnSampler().select(step)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict:
    copy = dict(BUILT_IN)
    monkeypatch.setattr(sampler, "POLICIES", copy)
    return copy


def test_registry_names() -> None:
    assert {name: type(make_policy(name)).__name__ for name in BUILT_IN} == {
        "attn": "AttnSampler",
        "attn-parallel": "AttnSampler",
        "attn-sequential": "AttnSampler",
        "attn-random": "RandomScores",
        "random": "RandomOrder",
        "left-to-right": "LeftToRight",
        "confidence": "Confidence",
        "margin": "Margin",
        "entropy": "Entropy",
        "threshold": "Threshold",
        "factor": "Factor",
        "eb": "EBSampler",
        "klass": "KLASS",
        "pard": "PARD",
        "dawn": "DAWN",
        "dapd": "DAPD",
        "clad": "CLAD",
        "adas": "ADAS",
        "dos": "DOS",
        "grounded": "Grounded",
        "t2t": "T2T",
        "t2m": "T2M",
        "saber": "Saber",
        "wino": "WINO",
        "attn-check": "AttnCheck",
        "rollback": "Rollback",
    }
    assert make_policy("attn-sequential") == AttnSampler(mode="sequential")
    assert make_policy("attn-parallel", tau=0.7, fallback="score") == AttnSampler("parallel", 0.7, "score")
    policy = KLASS(kl=0.1)
    assert make_policy(policy) is policy


@pytest.mark.parametrize("options", [{"tau": 0.5}, {"fallback": "score"}])
def test_the_sequential_rule_warns_of_what_it_does_not_read(options: dict) -> None:
    with pytest.warns(UserWarning, match="tau, fallback: the sequential rule reads neither"):
        make_policy("attn-sequential", **options)


def test_register(registry: dict) -> None:
    register_policy("by-score", ByScore)
    register_policy("mine", "by-score")
    assert isinstance(make_policy("mine"), ByScore)
    with pytest.raises(ValueError, match="name: 'mine' is registered"):
        register_policy("mine", ByScore)
    with pytest.raises(ValueError, match=r"policy: expected one of .*, got 'nobody'"):
        register_policy("other", "nobody")
    with pytest.raises(ValueError, match="policy: the names run in a circle: self -> self"):
        register_policy("self", "self")
    with pytest.raises(TypeError, match="policy: expected a factory or a name, got int"):
        register_policy("other", 3)  # type: ignore[arg-type]
    assert set(registry) == {*BUILT_IN, "by-score", "mine"}


@pytest.mark.parametrize(
    ("policy", "options", "error", "message"),
    [
        ("nobody", {}, ValueError, "policy: expected one of a, adas, attn, .*threshold, .*got 'nobody'"),
        ("a", {}, ValueError, "policy: the names run in a circle: a -> b -> a"),
        (3, {}, TypeError, "policy: expected a name or a Policy, got int"),
        (PARD, {}, TypeError, "policy: expected a name or a Policy, got the class PARD"),
        ("random", {"tau": 0.5}, TypeError, "policy 'random': .*'tau'"),
        ("attn-sequential", {"mode": "parallel"}, TypeError, "policy 'attn-sequential': .*'mode'"),
        (PARD(), {"tau": 0.5}, TypeError, r"policy: options \['tau'\] go with a name"),
        ("attn", {"tau": 1.5}, ValueError, r"tau: expected a number in \[0, 1\], got 1.5"),
        ("attn", {"tau": "high"}, TypeError, "tau: "),
        ("attn", {"mode": "fast"}, ValueError, "mode: expected one of parallel, sequential"),
        ("attn", {"fallback": "none"}, ValueError, "fallback: expected one of"),
        ("attn", {"threshold": "median"}, ValueError, "threshold: expected one of max, mean"),
        ("attn-sequential", {"threshold": "mean"}, ValueError, "threshold: 'mean' goes with mode='parallel'"),
        ("attn-random", {"tau": -0.5}, ValueError, "tau: "),
        ("confidence", {"count": 0}, ValueError, "count: "),
        ("entropy", {"count": 1.0}, TypeError, "count: "),
        ("threshold", {"tau": NAN}, ValueError, "tau: "),
        ("factor", {"factor": -1.0}, ValueError, "factor: "),
        ("eb", {"gamma": math.inf}, ValueError, "gamma: "),
        ("klass", {"kl": -0.1}, ValueError, "kl: "),
        ("klass", {"history": 0}, ValueError, "history: "),
        ("pard", {"tau": -0.1}, ValueError, "tau: "),
    ],
)
def test_registry_errors(
    policy: object, options: dict, error: type[Exception], message: str, registry: dict
) -> None:
    registry.update({"a": "b", "b": "a"})
    with pytest.raises(error, match=message):
        make_policy(policy, **options)  # type: ignore[arg-type]
