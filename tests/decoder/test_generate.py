"""generate() against a decoder written out step by step, and its promises one by one."""

from __future__ import annotations

import itertools
import types
from typing import Any

import pytest
import rich.progress
import torch
from decoding import ALL_POLICIES, decode, prompt
from torch import Tensor
from toy_model import EOS, MASK, VOCAB, ToyModel

from attn_sampler.generate import StepEvent
from attn_sampler.sampler import EBSampler, LeftToRight, StepState


def written_out(
    model: ToyModel,
    tokens: list[int],
    prompt_length: int,
    *,
    policy: str,
    tau: float,
    block_length: int,
    eos: int | None = None,
    last_layer_only: bool = False,
    masked_rows_only: bool = False,
) -> tuple[list[int], int]:
    """One sequence, decoded over plain numbers from a model that shows its attention."""
    tokens, passes = list(tokens), 0
    to_fill = [t == MASK for t in tokens]
    first = prompt_length % block_length
    edges = sorted({0, *range(first, len(tokens), block_length), len(tokens)})
    for start, stop in itertools.pairwise(edges):
        while any(tokens[i] == MASK for i in range(start, stop)):
            logits = model(torch.tensor([tokens]))[0].double()
            passes += 1
            logits[:, MASK] = -torch.inf
            p, best = (x.tolist() for x in torch.softmax(logits, dim=-1).max(dim=-1))
            weights = torch.stack(model.weights[-1:] if last_layer_only else model.weights)[:, 0]
            if masked_rows_only:
                weights = weights[:, :, [i for i, t in enumerate(tokens) if t == MASK]]
            s = weights.sum(dim=(0, 1, 2)).tolist()
            candidates = [i for i in range(start, stop) if tokens[i] == MASK]
            if policy == "confidence":
                commit = [max(candidates, key=lambda i: p[i])]
            elif policy == "attn-sequential":
                commit = [max(candidates, key=lambda i: s[i])]
            else:
                commit = []
                for i in sorted(candidates, key=lambda i: -s[i]):  # walk down the scores
                    if p[i] < tau:
                        break
                    commit.append(i)
                commit = commit or [max(candidates, key=lambda i: p[i])]
            for i in commit:
                tokens[i] = best[i]
        if eos is not None and any(
            f and t == eos for f, t in zip(to_fill[:stop], tokens[:stop], strict=True)
        ):
            break
    if eos is not None:
        ends = [i for i, t in enumerate(tokens) if to_fill[i] and t == eos]
        if ends:
            tokens = [eos if to_fill[i] and i > ends[0] else t for i, t in enumerate(tokens)]
    return tokens, passes


@pytest.mark.parametrize("policy", ["attn", "attn-sequential", "confidence"])
@pytest.mark.parametrize("seed", range(4))
def test_against_decoding_written_out(policy: str, seed: int) -> None:
    model, truth = ToyModel(seed), ToyModel(seed, dtype=torch.float64)
    truth.by_hand = True
    tokens = prompt(6, seed)
    tokens[1] = tokens[4] = MASK
    tau = 0.4
    expected, passes = written_out(truth, tokens + [MASK] * 9, 6, policy=policy, tau=tau, block_length=4)
    options = {} if policy == "confidence" else {"tau": tau}
    got = decode(model, [tokens], gen_length=9, policy=policy, **options)
    assert got.tokens.tolist() == [expected]
    assert got.num_forward_passes.tolist() == [passes] == [len(model.calls)]
    assert policy != "attn" or passes < 11  # some steps committed several


@pytest.mark.parametrize(
    ("options", "truth_options"),
    [
        ({"layers": [-1]}, {"last_layer_only": True}),
        ({"query_rows": "masked"}, {"masked_rows_only": True}),
        (
            {"layers": slice(-1, None), "query_rows": "masked"},
            {"last_layer_only": True, "masked_rows_only": True},
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("keep_layers", [True, False])
def test_which_attention_counts(options: dict, truth_options: dict, keep_layers: bool) -> None:
    model, truth = ToyModel(1), ToyModel(1, dtype=torch.float64)
    truth.by_hand = True
    everything = decode(
        model, [prompt(6)], gen_length=12, block_length=12, policy="attn-sequential", trace=True
    )
    got = decode(
        model,
        [prompt(6)],
        gen_length=12,
        block_length=12,
        policy="attn-sequential",
        keep_layers=keep_layers,
        trace=True,
        **options,
    )
    expected, _ = written_out(
        truth,
        prompt(6) + [MASK] * 12,
        6,
        policy="attn-sequential",
        tau=0.0,
        block_length=12,
        **truth_options,
    )
    assert got.tokens.tolist() == [expected]
    order = [[c.position for c in g.trace.commits] for g in (everything, got)]
    assert order[0] != order[1]  # the option made a difference


@pytest.mark.parametrize("keep_layers", [True, False])
def test_scope_and_diagonal(keep_layers: bool) -> None:
    truth = ToyModel(2, dtype=torch.float64)
    truth.by_hand = True
    tokens = torch.tensor([[*prompt(5), *[MASK] * 8], [0, 0, *prompt(3, 1), *[MASK] * 8]])
    visible = torch.ones(2, 13, dtype=torch.bool)
    visible[1, :2] = False
    truth(tokens, attention_mask=visible)
    block = slice(5, 9)
    weights = torch.stack(truth.weights) * visible[:, None, :, None]  # [L, B, H, M, N]
    inner = weights[..., block, block]
    eye = torch.eye(4, dtype=torch.bool)
    expected = {
        "plain": weights[..., block].sum(dim=(0, 2, 3)),
        "block": (inner / inner.sum(dim=-1, keepdim=True)).sum(dim=(0, 2, 3)),
        "off diagonal": weights[..., block].sum(dim=(0, 2, 3)) - (inner * eye).sum(dim=(0, 2, 3)),
    }
    given = {"plain": {}, "block": {"softmax_scope": "block"}, "off diagonal": {"diagonal": False}}
    for name, options in given.items():
        seen: list[StepEvent] = []
        decode(
            ToyModel(2),
            [prompt(5), prompt(3, 1)],
            gen_length=8,
            pad_token_id=0,
            keep_layers=keep_layers,
            on_step=lambda e, seen=seen: seen.append(e),
            **options,
        )
        assert seen[0].block == block
        torch.testing.assert_close(seen[0].result.scores.double(), expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("policy", ALL_POLICIES)
def test_batch_of_ragged_prompts_equals_one_by_one(policy: str, temperature: float) -> None:
    model = ToyModel(3)
    prompts = [prompt(n, seed=n) for n in (9, 3, 5, 1, 8)]
    options = {"gen_length": 10, "policy": policy, "temperature": temperature, "trace": True}
    batch = decode(model, prompts, seed=[10, 11, 12, 13, 14], **options)
    assert batch.tokens.shape == (5, 19)
    for i, tokens in enumerate(prompts):
        alone = decode(model, [tokens], seed=[10 + i], **options)
        padding = 9 - len(tokens)
        assert batch.tokens[i, padding:].tolist() == alone.tokens[0].tolist()
        assert batch.tokens[i, padding : padding + len(tokens)].tolist() == tokens
        assert batch.num_forward_passes[i] == alone.num_forward_passes[0]
        shifted = [(c.step, c.position + padding, c.token) for c in alone.trace.commits]
        assert [(c.step, c.position, c.token) for c in batch.trace.commits if c.sequence == i] == shifted
        assert (~batch.attention_mask[i]).sum() == padding
    assert not (batch.tokens == MASK).any()
    # Split differently, with the seeds that an integer stands for.
    halves = [decode(model, p, seed=s, **options) for p, s in ((prompts[:2], 10), (prompts[2:], 12))]
    got = [row[-10:].tolist() for half in halves for row in half.tokens]
    assert got == batch.tokens[:, -10:].tolist()


class Scripted(torch.nn.Module):
    """Predicts token j % 7 + 4 at position j, the end of text at ``ends[first token]``; earlier is surer."""

    def __init__(self, ends: dict[int, int]) -> None:
        super().__init__()
        self.ends = ends
        self.batches: list[list[int]] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.batches.append(tokens[:, 0].tolist())
        position = torch.arange(tokens.shape[1])
        scripted = torch.nn.functional.one_hot(position % 7 + 4, VOCAB) * (5.0 - position[:, None] / 10)
        logits = scripted.repeat(len(tokens), 1, 1)
        for row, first in enumerate(tokens[:, 0].tolist()):
            if first in self.ends:
                logits[row, self.ends[first], EOS] = 9.0
        return logits


def test_end_of_text() -> None:
    prompts = torch.tensor([[10, 11], [12, 13], [14, EOS]])
    model = Scripted({10: 3, 12: 9})
    got = decode(model, prompts, gen_length=12, policy="threshold", tau=0.0, eos_token_id=EOS, trace=True)
    script = [j % 7 + 4 for j in range(14)]
    assert got.tokens.tolist() == [
        [10, 11, script[2], *[EOS] * 11],
        [12, 13, *script[2:9], *[EOS] * 5],
        [14, EOS, *script[2:]],  # the prompt's own does not end it
    ]
    assert got.num_forward_passes.tolist() == [1, 2, 3]
    assert model.batches == [[10, 12, 14], [12, 14], [14]]
    for i in range(3):
        assert got.trace.tokens(i) == got.tokens[i].tolist()
    overwritten = [c for c in got.trace.commits if c.sequence == 0 and c.step == 1]
    assert [c.position for c in overwritten] == list(range(4, 14))
    assert all(c.token == EOS and c.score != c.score and c.confidence != c.confidence for c in overwritten)
    assert decode(Scripted({10: 3}), prompts, gen_length=4, policy="threshold", tau=0.0).tokens[0, 4] != EOS


def test_end_of_text_keeps_given_tokens() -> None:
    tokens = torch.tensor([[10, MASK, MASK, 5, MASK, 6, MASK, MASK]])
    got = decode(Scripted({10: 2}), tokens, policy="left-to-right", eos_token_id=EOS)
    assert got.tokens.tolist() == [[10, 5, EOS, 5, EOS, 6, EOS, EOS]]
    assert got.num_forward_passes.tolist() == [2]


def test_against_decoding_written_out_with_an_end() -> None:
    ended = 0
    for seed in range(12):
        model, truth = ToyModel(seed), ToyModel(seed, dtype=torch.float64)
        truth.by_hand = True
        for end in range(4, 12):  # whichever token is taken for the end of text
            expected, passes = written_out(
                truth, prompt(4, seed) + [MASK] * 12, 4, policy="attn", tau=0.3, block_length=4, eos=end
            )
            got = decode(model, [prompt(4, seed)], gen_length=12, tau=0.3, eos_token_id=end)
            assert got.tokens.tolist() == [expected]
            assert got.num_forward_passes.tolist() == [passes]
            ended += end in expected[4:]
    assert ended > 5


def test_seeds() -> None:
    model, prompts = ToyModel(7), torch.tensor([prompt(4)] * 3)
    options = {"gen_length": 12, "temperature": 2.0}
    first, again = (decode(model, prompts, seed=5, **options).tokens for _ in range(2))
    assert torch.equal(first, again)
    assert len({tuple(row) for row in first.tolist()}) == 3  # each sequence has its own stream
    assert not torch.equal(first, decode(model, prompts, seed=50, **options).tokens)
    assert torch.equal(first[1:], decode(model, prompts[:2], seed=6, **options).tokens)
    same = decode(model, prompts, seed=[9, 9, 9], **options).tokens
    assert torch.equal(same[0], same[1])
    extreme = decode(model, prompts, seed=[(1 << 63) + 1, -1, (1 << 64) - 1], **options).tokens
    assert torch.equal(extreme[1], extreme[2])  # the same 64 bits


def test_steps_draw_fresh_noise() -> None:
    """A uniform model commits one position at a time; equal noise in each step would repeat tokens."""
    got = decode(
        lambda tokens: torch.zeros(*tokens.shape, VOCAB),
        torch.full((1, 64), MASK),
        block_length=1,
        policy="left-to-right",
        temperature=1.0,
    )
    assert len(set(got.tokens[0].tolist())) > 15


def test_logit_shift() -> None:
    model = ToyModel(8)

    def shifted(tokens: Tensor, **keywords: Tensor) -> Tensor:
        """Row j - 1 predicts position j."""
        return model(tokens, **keywords).roll(-1, dims=1)

    prompts = [prompt(5), prompt(2, 1)]
    prompts[0][3] = MASK
    for policy in ("attn", "confidence"):
        plain = decode(model, prompts, gen_length=7, policy=policy)
        got = decode(shifted, prompts, gen_length=7, policy=policy, logit_shift=True)
        assert torch.equal(got.tokens, plain.tokens)
        assert not torch.equal(decode(shifted, prompts, gen_length=7, policy=policy).tokens, plain.tokens)


def test_logit_shift_of_the_first_position() -> None:
    logits = torch.zeros(1, 3, VOCAB)
    for row, token in enumerate((7, 8, 9)):
        logits[0, row, token] = 5.0
    got = decode(lambda tokens: logits, torch.full((1, 3), MASK), policy="left-to-right", logit_shift=True)
    assert got.tokens.tolist() == [[7, 7, 8]]  # nothing precedes row 0, so it speaks for itself too


@pytest.mark.parametrize("policy", ["attn", "confidence", "left-to-right"])
def test_logit_shift_of_the_first_position_behind_padding(policy: str) -> None:
    prompts = [prompt(9), [MASK, *prompt(3), MASK], [*prompt(2), MASK], [MASK, *prompt(5)], [MASK]]
    options = {"gen_length": 6, "policy": policy, "logit_shift": True}
    batch = decode(ToyModel(3), prompts, **options)
    for i, tokens in enumerate(prompts):
        alone = decode(ToyModel(3), [tokens], **options)
        assert torch.equal(batch.tokens[i, 9 - len(tokens) :], alone.tokens[0])
        assert batch.num_forward_passes[i] == alone.num_forward_passes[0]


def test_models_that_return_an_object() -> None:
    model = ToyModel(9)
    wrapped = lambda tokens: types.SimpleNamespace(logits=model(tokens), loss=None)  # noqa: E731
    expected = decode(model, [prompt(4)], gen_length=5).tokens
    assert torch.equal(decode(wrapped, [prompt(4)], gen_length=5).tokens, expected)


@pytest.mark.parametrize("policy", ["attn", "attn-sequential"])
def test_kept_layers_and_layers_reduced_at_once_agree(policy: str) -> None:
    for prompts in ([prompt(6), prompt(6, 1)], [prompt(6), prompt(2, 1)]):
        runs = [
            decode(ToyModel(10), prompts, gen_length=12, policy=policy, keep_layers=keep, trace=True)
            for keep in (True, False)
        ]
        assert torch.equal(runs[0].tokens, runs[1].tokens)
        kept, reduced = (torch.tensor([c.score for c in run.trace.commits]) for run in runs)
        torch.testing.assert_close(kept, reduced, rtol=1e-5, atol=1e-6)


class FullMask(ToyModel):
    """Masks rows and keys, as models do that build a [B, 1, N, N] mask; padding rows see themselves."""

    def attention_bias(self, attention_mask: Tensor) -> Tensor:
        both = attention_mask[:, None, :, None] & attention_mask[:, None, None, :]
        return both | torch.eye(attention_mask.shape[1], dtype=torch.bool)


@pytest.mark.parametrize("keep_layers", [True, False])
def test_models_with_a_full_mask(keep_layers: bool) -> None:
    prompts = [prompt(6), prompt(2, 1)]
    expected = decode(ToyModel(11), prompts, gen_length=8, trace=True)
    got = decode(FullMask(11), prompts, gen_length=8, keep_layers=keep_layers, trace=True)
    assert torch.equal(got.tokens, expected.tokens)
    for a, b in zip(got.trace.commits, expected.trace.commits, strict=True):
        assert a[:4] == b[:4]
        assert a.score == pytest.approx(b.score, rel=1e-5)


def test_compiled_model() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model = ToyModel(12)
    prompts = [prompt(6), prompt(6, 1)]
    expected = decode(model, prompts, gen_length=12)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.compute, backend=graphs, fullgraph=True)
    got = decode(compiled, prompts, gen_length=12)
    assert torch.equal(got.tokens, expected.tokens)
    assert graphs.frame_count <= 2  # one more where a sequence has finished its block, none for block or step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    got = decode(ToyModel(13, dtype=dtype), [prompt(4), prompt(6)], gen_length=8)
    assert not (got.tokens == MASK).any()


@pytest.mark.parametrize("policy", ALL_POLICIES)
def test_events_and_trace(policy: str) -> None:
    model, events = ToyModel(14), []

    def on_step(event: StepEvent) -> None:
        fields = (None if x is None else x.clone() for x in event.result)
        events.append(event._replace(result=type(event.result)(*fields)))

    prompts = [[*prompt(5), MASK, *prompt(2)], prompt(3, 1), [MASK, *prompt(4, 2)]]
    got = decode(model, prompts, gen_length=9, policy=policy, trace=True, on_step=on_step)
    assert [e.step for e in events] == list(range(1, len(model.calls) + 1))
    trace = got.trace
    assert trace is not None
    assert (trace.policy, trace.mask_token_id, trace.padding) == (policy, MASK, [0, 5, 3])
    assert [trace.prompt[i][trace.padding[i] :] for i in range(3)] == [p + [MASK] * 9 for p in prompts]
    taken, commits = [0, 0, 0], iter(trace.commits)
    replay = [list(row) for row in trace.prompt]
    for event, call in zip(events, model.calls, strict=True):
        assert call["tokens"].tolist() == [replay[i] for i in event.sequence.tolist()]
        for row, i in enumerate(event.sequence.tolist()):
            for column in event.result.selected[row].nonzero().squeeze(1).tolist():
                commit = next(commits)
                position = event.block.start + column
                assert commit[:4] == (i, taken[i], position, event.result.token_ids[row, column])
                assert replay[i][position] == MASK
                replay[i][position] = commit.token
                assert commit.confidence == event.result.confidence[row, column]
                score = event.result.scores[row, column]
                assert commit.score == score if policy.startswith("attn") else commit.score != commit.score
            taken[i] += 1
        assert event.result.tokens.tolist() == [replay[i] for i in event.sequence.tolist()]
    assert next(commits, None) is None
    assert replay == got.tokens.tolist() == [trace.tokens(i) for i in range(3)]
    assert got.num_forward_passes.tolist() == taken
    assert got.forward_seconds > 0.0
    assert got.sampling_seconds > 0.0
    assert decode(model, prompts, gen_length=9, policy=policy).trace is None


def test_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    class Recorder(rich.progress.Progress):
        def __init__(self, *columns: Any, **options: Any) -> None:
            super().__init__(*columns, **options)
            bars.append(self)

        def advance(self, task: rich.progress.TaskID, advance: float = 1) -> None:
            steps.append(advance)
            super().advance(task, advance)

    steps: list[float] = []
    monkeypatch.setattr(rich.progress, "Progress", Recorder)
    got = decode(ToyModel(), [prompt(3), [MASK, 5]], gen_length=6, progress=True)
    (task,) = bars[0].tasks
    assert (task.total, task.completed, sum(steps)) == (13, 13, 13)
    assert len(steps) >= int(got.num_forward_passes.max())
    assert bars[0].finished
    assert not bars[0].live.is_started
    decode(ToyModel(), [prompt(3)], gen_length=6)
    assert len(bars) == 1


@pytest.mark.parametrize("prompts", [torch.empty(0, 5, dtype=torch.int64), []], ids=["tensor", "list"])
@pytest.mark.parametrize("gen_length", [0, 3])
def test_empty_batch(prompts: Any, gen_length: int) -> None:
    model = ToyModel()
    got = decode(model, prompts, gen_length=gen_length, trace=True, seed=3)
    length = gen_length + (5 if isinstance(prompts, Tensor) else 0)
    assert got.tokens.shape == got.attention_mask.shape == (0, length)
    assert got.num_forward_passes.shape == (0,)
    assert got.trace.commits == []
    assert not model.calls


def test_nothing_to_fill() -> None:
    model = ToyModel()
    with pytest.raises(ValueError, match="prompt_ids: expected masked positions to fill"):
        decode(model, [prompt(4)])
    # One sequence with nothing to do takes no pass.
    got = decode(model, torch.tensor([prompt(4), [MASK, *prompt(3)]]))
    assert got.num_forward_passes.tolist() == [0, 1]
    assert got.tokens[0].tolist() == prompt(4)
    assert [len(call["tokens"]) for call in model.calls] == [1]


def test_a_policy_object_carries_nothing_from_run_to_run() -> None:
    class Counter(LeftToRight):
        resets = 0

        def reset(self) -> None:
            self.resets += 1

    policy = Counter()
    decode(ToyModel(), [prompt(4)], gen_length=8, policy=policy)
    assert policy.resets == 3  # once a block, the prompt's own included
    eb = EBSampler(gamma=2.0)
    runs = [decode(ToyModel(), [prompt(4)], gen_length=8, policy=eb, trace=True) for _ in range(2)]
    assert torch.equal(runs[0].tokens, runs[1].tokens)
    assert runs[0].trace.policy == "EBSampler(gamma=2.0)"


def test_the_policy_knows_which_sequence_each_row_is() -> None:
    class Recorder(LeftToRight):
        def select(self, state: StepState) -> Tensor:
            rows.append(state.sequence.tolist())
            seeds.append(state.seeds.tolist())
            return super().select(state)

    rows: list[list[int]] = []
    seeds: list[list[int]] = []
    tokens = torch.tensor([[MASK, 1, 1, 1], [MASK, MASK, 1, MASK], [MASK, MASK, 1, 1]])
    decode(ToyModel(), tokens, policy=Recorder())
    assert rows == [[0, 1, 2], [1, 2], [1]]
    assert len({seed for step in seeds for seed in step}) == 6  # a fresh stream for each row and step


def test_no_gradient_is_recorded() -> None:
    model = ToyModel()
    states: list[bool] = []
    decode(model, [prompt(3)], gen_length=2, on_step=lambda e: states.append(torch.is_grad_enabled()))
    assert states
    assert not any(states)
    assert torch.is_grad_enabled()
