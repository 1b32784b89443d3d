"""The policies on the attention map, bit for bit, against their rules stated over plain Python numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from test_policies import NAN, PROBABILITIES, Mask, Row, as_float32, chosen, open_positions, ranked, state
from toy_model import MASK, ToyModel

from attn_sampler import (
    ADAS,
    CLAD,
    DAPD,
    DAWN,
    DOS,
    AttentionCapture,
    Grounded,
    Policy,
    StepState,
    generate,
    make_policy,
)

Map = list[Row]


def without_diagonal(attention: Map) -> Map:
    """NaN counts as 0, as in every rule."""
    zeroed = [[0.0 if math.isnan(a) else a for a in row] for row in attention]
    return [[0.0 if i == j else a for j, a in enumerate(row)] for i, row in enumerate(zeroed)]


def best_first(value: dict[int, float]) -> list[int]:
    return sorted(value, key=lambda i: (-value[i], i))


def dawn(policy: DAWN, p: Row, attention: Map, masked: Mask, open_share: float) -> set[int]:
    positions, tau = range(len(p)), as_float32(policy.tau)
    whole = [[0.0 if math.isnan(a) else a for a in row] for row in attention]
    a = without_diagonal(attention)
    for j in positions:
        if sum(whole[i][j] for i in positions) / len(p) > policy.tau_sink:
            for i in positions:
                a[i][j] = 0.0
    depends = {(i, j) for i in positions for j in positions if a[i][j] >= policy.tau_edge}
    anchors = [j for j in positions if not masked[j] and p[j] >= tau]
    commit = set()
    for i in open_positions(masked):
        induced = any((i, j) in depends for j in anchors)
        if p[i] >= tau or (induced and p[i] >= as_float32(policy.tau_induced)):
            commit.add(i)

    def clashes(i: int) -> bool:
        return any((i, j) in depends or (j, i) in depends for j in commit)

    rest = {
        i: p[i]
        for i in open_positions(masked)
        if i not in commit and p[i] >= as_float32(policy.tau_low) and not clashes(i)
    }
    for i in best_first(rest):
        if not clashes(i):
            commit.add(i)
    return commit or set(ranked(p, masked)[:1])


def dapd(policy: DAPD, p: Row, attention: Map, masked: Mask, open_share: float) -> set[int]:
    nodes, a = open_positions(masked), without_diagonal(attention)
    if open_share < policy.switch_ratio:
        confident = {i for i in nodes if p[i] > as_float32(policy.tau)}
        return confident or set(ranked(p, masked)[:1])
    weight = {(i, j): 0.5 * (a[i][j] + a[j][i]) for i in nodes for j in nodes}
    threshold = policy.tau_min + (policy.tau_max - policy.tau_min) * (1.0 - open_share)
    degree = [sum(weight[i, j] for j in nodes) if masked[i] else 0.0 for i in range(len(p))]
    commit: set[int] = set()
    for i in ranked([d * x for d, x in zip(degree, p, strict=True)], masked):
        if all(weight[i, j] <= threshold for j in commit):
            commit.add(i)
    return commit


def clad(policy: CLAD, p: Row, attention: Map, masked: Mask, open_share: float) -> set[int]:
    a, count = without_diagonal(attention), len(p)
    link = [[max(a[i][j], a[j][i]) for j in range(count)] for i in range(count)]
    candidates = {i for i in open_positions(masked) if p[i] >= as_float32(policy.tau)}
    candidates |= set(ranked(p, masked)[:1])
    clusters: list[list[int]] = []
    for i in sorted(candidates):
        if clusters and clusters[-1][-1] == i - 1:
            clusters[-1].append(i)
        else:
            clusters.append([i])
    indices = range(len(clusters))

    def one_way(x: int, y: int) -> float:
        return max(sum(link[i][j] for j in clusters[y]) / len(clusters[y]) for i in clusters[x])

    between = {(x, y): max(one_way(x, y), one_way(y, x)) for x in indices for y in indices if x != y}
    mean = [sum(between[x, y] for y in indices if y != x) / max(len(clusters) - 1, 1) for x in indices]
    partner = {
        x: max((y for y in indices if y != x), key=lambda y: (between[x, y], -y), default=x) for x in indices
    }
    commit = set(candidates)
    for x in indices:
        y = partner[x]
        if y == x or partner[y] != x or between[x, y] == 0.0:
            continue
        if len(clusters) == 2:
            strong = between[x, y] >= policy.tau_link / count
        else:
            strong = between[x, y] >= mean[x] and between[x, y] >= mean[y]
        if strong and (len(clusters[x]), -x) < (len(clusters[y]), -y):
            commit -= set(clusters[x])
    return commit


def adas(policy: ADAS, p: Row, attention: Map, masked: Mask, open_share: float) -> set[int]:
    a, nodes = without_diagonal(attention), open_positions(masked)
    count = policy.count or max(1, sum(p[i] >= as_float32(policy.tau) for i in nodes))
    commit: list[int] = []
    while len(commit) < min(count, len(nodes)):
        value = list(p)
        for i in nodes:
            for j in commit:
                value[i] -= policy.strength * (a[i][j] * (1.0 - (0.0 if math.isnan(p[j]) else p[j])))
        commit += ranked(value, [m and i not in commit for i, m in enumerate(masked)])[:1]
    return set(commit)


def dos(policy: DOS, p: Row, attention: Map, masked: Mask, open_share: float) -> set[int]:
    a, filled = without_diagonal(attention), [j for j in range(len(p)) if not masked[j]]
    mass = {i: sum(a[i][j] for j in filled) for i in open_positions(masked)}
    by_p = ranked(p, masked)
    return set(sorted(mass, key=lambda i: (-mass[i], by_p.index(i)))[: policy.count])


def grounded(policy: Grounded, p: Row, attention: Map, masked: Mask, open_share: float) -> set[int]:
    nodes = open_positions(masked)
    known = [0.0 if math.isnan(x) else x for x in p]
    value = [NAN] * len(p)
    for i in nodes:
        lean = sum(
            a * (1.0 - known[j]) for j, a in enumerate(attention[i]) if j in nodes and not math.isnan(a)
        )
        value[i] = p[i] * (1.0 - lean)
    commit = set(ranked(value, masked)[:1])
    if policy.tau is not None:
        commit |= {i for i in nodes if value[i] >= as_float32(policy.tau)}
    return commit


CASES: list[tuple[Policy, Callable[..., set[int]]]] = [
    (DAWN(), dawn),
    (DAWN(tau_sink=1.0, tau_edge=0.25), dawn),
    (DAWN(tau_sink=0.2, tau_edge=0.125, tau_low=0.25, tau_induced=0.5), dawn),
    (DAWN(tau_sink=0.25, tau_edge=0.0, tau_low=0.0), dawn),
    (DAPD(), dapd),
    (DAPD(tau_min=0.0, tau_max=0.5), dapd),
    (DAPD(tau_min=0.125, tau_max=0.25, switch_ratio=0.0), dapd),
    (DAPD(tau_min=0.25, tau_max=0.25, switch_ratio=0.75, tau=0.5), dapd),
    (CLAD(), clad),
    (CLAD(tau=0.25), clad),
    (CLAD(tau=0.0, tau_link=0.1), clad),
    (CLAD(tau=0.9, tau_link=3.0), clad),
    (ADAS(), adas),
    (ADAS(tau=0.25, strength=4.0), adas),
    (ADAS(count=1), adas),
    (ADAS(count=3, strength=2.0), adas),
    (DOS(), dos),
    (DOS(count=3), dos),
    (Grounded(), grounded),
    (Grounded(tau=0.25), grounded),
    (Grounded(tau=None), grounded),
]
# Dyadic and few: sums are exact in every order, and ties and thresholds are hit.
WEIGHTS = [0.0, 0.0, 0.0, 0.03125, 0.0625, 0.125, 0.25, 0.5]


def with_map(step: StepState, attention: list[Map]) -> StepState:
    step.attention_map = torch.tensor(attention, dtype=torch.float32)
    return step


@pytest.mark.parametrize(("policy", "rule"), CASES, ids=[repr(policy) for policy, _ in CASES])
def test_rule(policy: Policy, rule: Callable[..., set[int]]) -> None:
    """A first step of the block, then a second one where some positions are filled and some rows are done."""
    rng = random.Random(repr(policy))
    sizes = set()
    for trial in range(100):
        undefined = 0.2 if trial % 4 == 3 else 0.0
        batch, count = rng.randint(1, 4), rng.randint(1, 9)
        masked = [[rng.random() < 0.8 for _ in range(count)] for _ in range(batch)]
        masked = [row if any(row) else [True] * count for row in masked]
        at_first = [sum(row) for row in masked]
        policy.reset()
        rows = list(range(batch))
        while rows:
            p = [
                [NAN if rng.random() < undefined else rng.choice(PROBABILITIES) for _ in range(count)]
                for _ in rows
            ]
            attention = [
                [
                    [NAN if rng.random() < undefined / 4 else rng.choice(WEIGHTS) for _ in range(count)]
                    for _ in range(count)
                ]
                for _ in rows
            ]
            step = state(p, [masked[b] for b in rows], sequence=rows)
            got = chosen(policy, with_map(step, attention))
            expected = [
                rule(policy, p[n], attention[n], masked[b], sum(masked[b]) / at_first[b])
                for n, b in enumerate(rows)
            ]
            assert got == expected, (p, attention, [masked[b] for b in rows])
            for commit, b in zip(got, rows, strict=True):
                assert commit
                assert commit <= set(open_positions(masked[b]))
                sizes.add(len(commit))
                for i in commit:
                    masked[b][i] = False
            rows = [b for b in rows if any(masked[b])]
    one = policy in (ADAS(count=1), DOS(), Grounded(tau=None))
    assert sizes >= ({1} if one else {1, 2, 3})


def test_dawn_worked_example() -> None:
    """Four masked positions and a filled, confident one; column 4 is the filled one."""
    attention = [
        [0.0, 0.0, 0.3, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.3],
        [0.0, 0.0, 0.0, 0.3, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0],
    ]
    step = state([[0.95, 0.72, 0.8, 0.85, 0.99]], [[True, True, True, True, False]])
    policy = DAWN(tau_sink=0.5, tau_edge=0.1)
    # 0 is confident, 1 is anchored by 4, 2 clashes with 0; 3, whose neighbour is out, is free.
    assert chosen(policy, with_map(step, [attention])) == [{0, 1, 3}]
    assert chosen(DAWN(tau_sink=0.05, tau_edge=0.1), step) == [{0, 2, 3}]  # all columns are sinks: no edges


@pytest.mark.parametrize("name", ["dawn", "dapd", "clad", "adas"])
def test_a_fully_masked_map_leaves_the_confidence_to_decide(name: str) -> None:
    step = with_map(state([[0.2, 0.95, 0.97]], [[True] * 3]), [[[0.0] * 3] * 3])
    commit = chosen(make_policy(name), step)[0]
    assert commit == ({0, 1, 2} if name == "dapd" else {1, 2})


def test_the_map_is_the_mean_attention_of_the_block() -> None:
    model = ToyModel(1)
    tokens = torch.randint(0, MASK, (2, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[1, :3] = False
    truth = ToyModel(1, dtype=torch.float64)
    truth.by_hand = True
    for layers, chosen_layers in (("all", [0, 1]), ([-1], [1]), (slice(0, 1), [0])):
        for diagonal in (True, False):
            with AttentionCapture(slice(4, 9), layers, keep=True, diagonal=diagonal) as capture:
                model(tokens, attention_mask=mask)
            truth(tokens, attention_mask=mask)
            expected = torch.stack([truth.weights[i] for i in chosen_layers]).mean(dim=(0, 2))[:, 4:9, 4:9]
            if not diagonal:
                expected = expected * (1 - torch.eye(5, dtype=torch.float64))
            got, options = capture.step_input(as_map=True)
            assert options == {}
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
            columns = torch.tensor([[True, False, True, True, False]]).expand(2, 5)
            masses = {
                capture.row_mass(): expected.sum(dim=2),
                capture.row_mass(columns): (expected * columns[:, None]).sum(dim=2),
                capture.row_mass(reduction="diagonal"): expected.diagonal(dim1=1, dim2=2),
            }
            for mass, of_map in masses.items():
                torch.testing.assert_close(mass.double(), of_map, rtol=1e-5, atol=1e-6)


def test_the_map_of_a_model_with_a_full_mask() -> None:
    """A mask of its own for each row, as block-causal models have, is served by plain PyTorch."""
    q, k, v = (torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    sees = torch.ones(6, 6, dtype=torch.bool).tril()
    query_mask = torch.tensor([[True] * 6, [True, True, True, False, True, True]])
    capture = AttentionCapture(slice(1, 5), keep=True, query_mask=query_mask)
    with capture:
        torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=sees)
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    weights = torch.softmax((q @ k.transpose(2, 3) * 8**-0.5).masked_fill(~sees, -math.inf), dim=-1)
    expected = (weights * query_mask[:, None, :, None]).mean(dim=1)[:, 1:5, 1:5]
    torch.testing.assert_close(capture.attention_map, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(capture.row_mass(), expected.sum(dim=2), rtol=1e-5, atol=1e-6)


def test_a_map_needs_the_blocks_rows() -> None:
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 8, 8)
    with AttentionCapture(slice(2, 6), keep=True) as capture:
        torch.nn.functional.scaled_dot_product_attention(q, k, k)
    with pytest.raises(ValueError, match="a map needs a query row at each of the 4 columns"):
        capture.step_input(as_map=True)
    with AttentionCapture(slice(5, 8)) as capture:
        torch.nn.functional.scaled_dot_product_attention(q, k, k)
    with pytest.raises(RuntimeError, match="keeps no layers to map"):
        _ = capture.attention_map


def test_step_wants_a_map() -> None:
    tokens = torch.full((1, 3), MASK)
    arguments = {
        "block": slice(0, 3),
        "mask_token_id": MASK,
        "sequence": torch.arange(1),
        "seeds": torch.arange(1),
    }
    for attention in (None, torch.rand(1, 3), torch.rand(1, 2, 3)):
        with pytest.raises(ValueError, match="attention: expected"):
            DAWN().step(tokens, torch.randn(1, 3, 23), attention, **arguments)  # type: ignore[arg-type]
    assert (tokens == MASK).all()
    attention = torch.rand(1, 3, 3)
    result = DAWN().step(tokens, torch.randn(1, 3, 23), attention, **arguments)  # type: ignore[arg-type]
    assert torch.equal(result.scores, attention.sum(dim=1))


@pytest.mark.parametrize("name", ["dawn", "dapd", "clad", "adas", "dos", "grounded"])
def test_generate_batch_equals_one_by_one(name: str) -> None:
    model = ToyModel(3)
    prompts = [torch.randint(0, MASK, (n,), generator=torch.Generator().manual_seed(n)) for n in (3, 8, 5)]
    options = {"mask_token_id": MASK, "gen_length": 12, "block_length": 6, "policy": name}
    for extra in ({}, {"keep_layers": False}, {"query_rows": "masked", "layers": [-1]}):
        together = generate(model, prompts, **options, **extra)
        for i, p in enumerate(prompts):
            alone = generate(model, [p], **options, **extra)
            assert torch.equal(alone.tokens[0], together.tokens[i, -len(p) - 12 :])
            assert int(alone.num_forward_passes) == int(together.num_forward_passes[i])
        assert (together.tokens != MASK).all()
        assert (together.num_forward_passes >= 2).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dawn", {"tau_edge": 2.0}, "tau_edge: "),
        ("dapd", {"switch_ratio": -0.5}, "switch_ratio: "),
        ("clad", {"tau_link": -1.0}, "tau_link: "),
        ("adas", {"count": 0}, "count: "),
        ("adas", {"strength": NAN}, "strength: "),
        ("dos", {"count": 0}, "count: "),
        ("grounded", {"tau": 1.5}, "tau: "),
    ],
)
def test_bad_options(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy(name, **options)


@pytest.mark.parametrize(
    "policy",
    [
        DAWN(tau=0.3, tau_induced=0.2, tau_low=0.1, tau_sink=0.05, tau_edge=0.05),
        CLAD(tau=0.2),
        DAPD(tau=0.3),
        Grounded(tau=0.2),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_padding_inside_a_block_changes_nothing(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(0)
    options = {"mask_token_id": MASK, "gen_length": 4, "block_length": 16, "policy": policy}
    for _ in range(12):
        longer, tokens = (torch.randint(4, 20, (n,), generator=generator).tolist() for n in (11, 6))
        tokens = [MASK if i in (1, 2, 4) else token for i, token in enumerate(tokens)]
        batch, alone = (generate(ToyModel(), p, **options) for p in ([longer, tokens], [tokens]))
        assert torch.equal(batch.tokens[1, 5:], alone.tokens[0])
        assert batch.num_forward_passes[1] == alone.num_forward_passes[0]
