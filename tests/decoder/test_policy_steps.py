"""A policy's step, policies of the user, and the registry."""

from __future__ import annotations

import math
import re
import textwrap

import pytest
import torch
from test_policies import BUILT_IN, MASK_ID, NAN, softmax, state
from torch import Tensor

from attn_sampler import BackendUnavailableError, sampler
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
        result = run_step(policy, logits, masked, attention if policy.needs_scores else None)
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
        ("nobody", {}, ValueError, "policy: expected one of a, adas, attn, .*threshold, got 'nobody'"),
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
