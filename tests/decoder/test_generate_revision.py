"""generate() with policies that take back: it ends, it is what is written out, prompts stay as they are."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import rich.progress
import torch
from decoding import decode, prompt
from test_generate import Scripted
from torch import Tensor, nn
from toy_model import EOS, MASK, VOCAB, ToyModel, rotate

from attn_sampler.generate import Generation, StepEvent
from attn_sampler.policy import Decision, Policy, StepState, top_positions
from attn_sampler.revision import T2M, T2T, AttnCheck, Saber


class Chaos(nn.Module):
    """Other logits, and so other predictions, wherever any visible token of the sequence changes."""

    def __init__(self, scale: float = 6.0) -> None:
        super().__init__()
        self.scale = scale
        self.calls: list[Tensor] = []

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.calls.append(tokens.clone())
        place = torch.arange(tokens.shape[1], 0, -1)  # from the end, so that padding changes nothing
        seen = tokens + 1 if attention_mask is None else (tokens + 1) * attention_mask
        mixed = (seen * place * place * 7919).sum(dim=1)[:, None, None] + place[:, None] * 104729
        hashed = (mixed + torch.arange(VOCAB) * 1299709) * 2654435761 % (1 << 32)
        return (hashed.double() / 2.0**32 * self.scale).float()


class Contrary(nn.Module):
    """Sure of another token than the one that stands there, whichever it is."""

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return nn.functional.one_hot((tokens + 1) % MASK, VOCAB) * 50.0


class Noise(nn.Module):
    """Random logits in each pass."""

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return torch.randn(*tokens.shape, VOCAB, generator=self.generator) * 3

    generator = torch.Generator().manual_seed(0)


class Restless(Policy):
    """Takes back whatever it may, by another token, by the mask or as it comes, and always asks for more."""

    revises = True

    def __init__(self, kind: str, max_edits: int = 3) -> None:
        self.kind, self.max_edits = kind, max_edits

    def select(self, state: StepState) -> Decision:
        assert state.tokens is not None
        everywhere = torch.ones_like(state.masked)
        replace = (state.tokens % 2 == 0) if self.kind == "both" else everywhere & (self.kind == "replace")
        commit = top_positions(state.confidence, state.masked, 1)
        return Decision(commit, replace, everywhere & (self.kind != "replace"), everywhere[:, 0])


RULES: dict[str, Policy] = {
    **{f"{kind}-{n}": Restless(kind, n) for kind in ("replace", "remask", "both") for n in (0, 1, 3)},
    "t2t": T2T(tau=0.3, edit_tau=0.0),
    "t2m": T2M(tau=0.3, remask_tau=0.9, max_edits=2),
    "saber": Saber(tau=0.0, share=1.0),
    "attn-check": AttnCheck(tau=0.3, doubt_tau=0.9, edit_tau=0.3, max_checks=32, sure=1.0, order="random"),
}
PROMPTS = [[*prompt(7), MASK, 5], prompt(3, 1), [MASK, MASK, *prompt(4, 2), MASK]]


def assert_bounded(events: list[StepEvent], to_fill: Tensor, max_edits: int) -> None:
    passes = Counter((e.block.start, e.block.stop, i) for e in events for i in e.sequence.tolist())
    assert passes
    for (start, stop, i), count in passes.items():
        count_masked = int(to_fill[i, start:stop].sum())
        assert count <= count_masked * (1 + 2 * max_edits) + 1, (start, i)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("model", [Chaos(), Contrary(), Noise()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.5}, {"eos_token_id": EOS}, {"logit_shift": True, "eos_token_id": 7}],
    ids=str,
)
def test_decoding_ends_whatever_the_model(rule: str, model: nn.Module, options: dict) -> None:
    events: list[StepEvent] = []
    got = decode(
        model, PROMPTS, gen_length=9, policy=RULES[rule], trace=True, on_step=events.append, **options
    )
    assert got.trace is not None
    given = torch.tensor(got.trace.prompt)
    to_fill = given == MASK
    assert_bounded(events, to_fill, RULES[rule].max_edits)
    assert not (got.tokens == MASK).any()
    assert torch.equal(got.tokens[~to_fill], given[~to_fill])  # prompts and padding are as they were
    assert [got.trace.tokens(i) for i in range(3)] == got.tokens.tolist()
    edits = Counter((c.sequence, c.position) for c in got.trace.commits if c.kind != "commit")
    assert max(edits.values(), default=0) <= RULES[rule].max_edits
    if rule in ("replace-3", "remask-3", "both-3") and not isinstance(model, Noise):
        assert max(edits.values()) == 3


def test_the_bound_is_nearly_met() -> None:
    """One position, taken back as often as may be: a mask and a commit each time, and no pass for nothing."""
    for edits in range(4):
        got = decode(Chaos(), [prompt(3)], gen_length=1, policy=Restless("remask", edits))
        assert got.num_forward_passes.tolist() == [1 + 2 * edits]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.5, "eos_token_id": 7, "logit_shift": True}], ids=str
)
def test_a_sequence_alone_and_in_a_batch(rule: str, options: dict) -> None:
    options = {"gen_length": 9, "policy": RULES[rule], "trace": True, **options}
    prompts = [*PROMPTS[:2], [*prompt(4, 2), MASK, 5]]  # no mask in a block that padding makes longer
    batch = decode(Chaos(), prompts, seed=[5, 6, 7], **options)
    for i, tokens in enumerate(prompts):
        alone = decode(Chaos(), [tokens], seed=[5 + i], **options)
        padding = 9 - len(tokens)
        assert batch.tokens[i, padding:].tolist() == alone.tokens[0].tolist()
        assert batch.num_forward_passes[i] == alone.num_forward_passes[0]
        commits = [(c.step, c.position, c.token, c.kind) for c in batch.trace.commits if c.sequence == i]
        assert commits == [(c.step, c.position + padding, c.token, c.kind) for c in alone.trace.commits]


@pytest.mark.parametrize("rule", ["attn-check", "lean"])
def test_a_sequence_alone_and_in_a_batch_by_attention(rule: str) -> None:
    policy = AttnCheck(tau=0.3, doubt_tau=0.6, edit_tau=0.3, sure=1.0, lean=0.2 if rule == "lean" else 1.0)
    prompts = [prompt(n, seed=n) for n in (9, 3, 5)]
    batch = decode(ToyModel(3), prompts, gen_length=12, policy=policy, trace=True)
    for i, tokens in enumerate(prompts):
        alone = decode(ToyModel(3), [tokens], gen_length=12, policy=policy, trace=True)
        assert batch.tokens[i, 9 - len(tokens) :].tolist() == alone.tokens[0].tolist()
        assert batch.num_forward_passes[i] == alone.num_forward_passes[0]
    assert {c.kind for c in batch.trace.commits} == {"commit", "replace", "remask"}


def written_out(tokens: list[int], gen_length: int, policy: T2T) -> tuple[list[int], int]:
    """Decoding of one sequence by LLaDA2.1's rule over plain numbers."""
    model, passes = Chaos(), 0
    length, tokens = len(tokens), tokens + [MASK] * gen_length
    budget = [policy.max_edits if t == MASK else 0 for t in tokens]
    edges = sorted({0, *range(length % 4, len(tokens), 4), len(tokens)})
    for start, stop in itertools.pairwise(edges):
        block, steps = range(start, stop), 0
        if not any(tokens[i] == MASK for i in block):
            continue
        while True:
            logits = model(torch.tensor([tokens]))[0].double()
            logits[:, MASK] = -torch.inf
            p, best = (x.tolist() for x in torch.softmax(logits, dim=-1).max(dim=-1))
            passes += 1
            masked = [i for i in block if tokens[i] == MASK]
            steps += not masked
            commit = {i for i in masked if p[i] >= policy.tau} | set(sorted(masked, key=lambda i: -p[i])[:1])
            replace = {
                i
                for i in block
                if i not in masked and budget[i] and tokens[i] != best[i] and p[i] >= policy.edit_tau
            }
            replace = replace if steps <= policy.max_steps else set()
            for i in commit | replace:
                tokens[i] = best[i]
            for i in replace:
                budget[i] -= 1
            full = not any(tokens[i] == MASK for i in block)
            if full and (not (replace or masked) or not any(budget[i] for i in block)):
                break
    return tokens, passes


@pytest.mark.parametrize("seed", range(8))
def test_against_decoding_written_out(seed: int) -> None:
    tokens = prompt(6, seed)
    tokens[1] = tokens[4] = MASK
    policy = T2T(tau=0.25, edit_tau=0.1, max_steps=1 + seed % 3, max_edits=1 + seed // 2)
    expected, passes = written_out(tokens, 9, policy)
    got = decode(Chaos(), [tokens], gen_length=9, policy=policy, trace=True)
    assert got.tokens.tolist() == [expected]
    assert got.num_forward_passes.tolist() == [passes]
    assert any(c.kind == "replace" for c in got.trace.commits)


def test_every_pass_is_a_step_of_the_trace() -> None:
    model, events = Chaos(), []
    options: dict[str, Any] = {"policy": RULES["both-3"], "trace": True, "on_step": events.append}
    got = decode(model, PROMPTS, gen_length=9, **options)
    assert [e.step for e in events] == list(range(1, len(model.calls) + 1))
    trace, taken = got.trace, [0, 0, 0]
    for event, tokens in zip(events, model.calls, strict=True):
        sequences = event.sequence.tolist()
        assert tokens.tolist() == [trace.tokens(i, taken[i] - 1) for i in sequences]
        for row, i in enumerate(sequences):
            here = [c for c in trace.commits if (c.sequence, c.step) == (i, taken[i])]
            revised = event.result.revised[row].tolist()
            for commit in here:
                column = commit.position - event.block.start
                assert commit.kind == ("commit", "replace", "remask")[revised[column]]
                assert event.result.selected[row, column] == (commit.kind == "commit")
                seen = event.result.current if commit.kind == "remask" else event.result.confidence
                assert commit.confidence == seen[row, column]
            assert len(here) == int(event.result.selected[row].sum()) + sum(x > 0 for x in revised)
            taken[i] += 1
    assert got.num_forward_passes.tolist() == taken


class Checks(Policy):
    """Commits everything at once and revises nothing; ``recheck`` asks for one more pass."""

    revises = True

    def __init__(self, recheck: Tensor | None) -> None:
        self.recheck = recheck

    def select(self, state: StepState) -> Decision:
        recheck = None if self.recheck is None else self.recheck[state.sequence]
        return Decision(state.masked, recheck=recheck)


def test_a_check_that_changes_nothing_is_the_last() -> None:
    for recheck, passes in ((None, [3, 3]), (torch.tensor([True, False]), [6, 3])):
        got = decode(Chaos(), [prompt(4), prompt(4, 1)], gen_length=12, policy=Checks(recheck))
        assert got.num_forward_passes.tolist() == passes


def test_undefined_logits_where_something_stands_revise_nothing() -> None:
    class Broken(Chaos):
        def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            logits = super().forward(tokens, attention_mask)
            return logits.masked_fill((tokens != MASK)[..., None], torch.nan)

    got = decode(Broken(), [prompt(4)], gen_length=8, policy=RULES["both-3"], trace=True)
    assert {c.kind for c in got.trace.commits} == {"commit"}
    assert got.num_forward_passes.tolist() == [10]  # and a check for each block


def test_the_end_of_text_is_that_of_the_finished_block() -> None:
    """An end that is taken back in its block does not end the text; one that stands does."""

    class Ends(Scripted):
        def forward(self, tokens: Tensor) -> Tensor:
            logits = super().forward(tokens)
            logits[:, 2, EOS] = torch.where(tokens[:, 2] == MASK, 99.0, 0.0)
            return logits

    options = {"gen_length": 8, "eos_token_id": EOS}
    stays = decode(Ends({}), [[10, 11]], policy="threshold", tau=0.0, **options)
    assert stays.tokens[0, 2:].tolist() == [EOS] * 8
    taken_back = decode(Ends({}), [[10, 11]], policy=T2T(tau=0.0), **options)
    assert taken_back.tokens[0].tolist() == [10, 11, *(j % 7 + 4 for j in range(2, 10))]


def test_progress_counts_what_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[float] = []
    advance = rich.progress.Progress.advance

    def record(self: Any, task: Any, count: float = 1) -> None:
        steps.append(count)
        advance(self, task, count)

    monkeypatch.setattr(rich.progress.Progress, "advance", record)
    got = decode(Contrary(), [prompt(3)], gen_length=6, policy=RULES["t2m"], progress=True)
    assert sum(steps) == 6
    assert steps[:3] == [4, -4, 4]
    assert len(steps) == got.num_forward_passes


def test_a_pass_commits_whatever_it_takes_back() -> None:
    class Stuck(Restless):
        def select(self, state: StepState) -> Decision:
            decision = super().select(state)
            return decision._replace(commit=decision.commit & ~state.editable.any(dim=1, keepdim=True))

    message = r"nothing could be committed in sequences \[0\]: the policy chose no masked position"
    with pytest.raises(RuntimeError, match=message):
        decode(Chaos(), [prompt(3)], gen_length=4, policy=Stuck("replace"))


# --- with a cache ----------------------------------------------------------------------------------------


class OneLayer(ToyModel):
    """Its keys are those of each position's own token: cached ones are exact, bidirectional as it is."""

    caches, causal_block = ("prefix", "dual"), None

    def compute(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.forward_rows(tokens, slice(0, None), None, attention_mask=attention_mask, store=False)[0]

    def forward_rows(
        self, tokens: Tensor, rows: slice, past: Any, *, attention_mask: Tensor | None, store: bool
    ) -> tuple[Tensor, Any]:
        x = self.embedding(tokens)
        batch, count, width = x.shape
        qkv = self.projections[0](nn.functional.rms_norm(x, (width,)))
        qkv = qkv.view(batch, count, -1, self.headdim).transpose(1, 2)
        qkv = nn.functional.pad(qkv, (0, 0, rows.start, 0))  # rotary positions count from the front
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = rotate(q)[:, :, rows.start :], rotate(k)
        if past is not None:
            stop = rows.start + count
            k, v = (
                torch.cat([old[:, :, : rows.start], new[:, :, rows.start :], old[:, :, stop:]], dim=2)
                for old, new in zip(past, (k, v), strict=True)
            )
        mask = None if attention_mask is None else self.attention_bias(attention_mask)
        y = self.attend(q, k, v, mask).transpose(1, 2).reshape(batch, count, width)
        logits = self.head(nn.functional.rms_norm(x + self.outputs[0](y), (width,))) * 2.0
        return logits, (k, v) if store else past

    def crop(self, past: Any, length: int) -> Any:
        return tuple(x[:, :, :length] for x in past)

    def select(self, past: Any, index: Tensor) -> Any:
        return tuple(x[index] for x in past)


def commits(generation: Generation) -> list[tuple]:
    assert generation.trace is not None
    return [(c.sequence, c.step, c.position, c.token, c.kind) for c in generation.trace.commits]


@pytest.mark.parametrize("logit_shift", [False, True])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_cache_serves_what_was_revised(cache: str, logit_shift: bool) -> None:
    prompts = [prompt(5), prompt(8, 1), prompt(3, 2)]
    options: dict[str, Any] = {"gen_length": 12, "logit_shift": logit_shift, "trace": True}
    for policy in (RULES["both-3"], AttnCheck(tau=0.3, doubt_tau=0.6, edit_tau=0.3, sure=1.0)):
        plain = decode(OneLayer(4), prompts, policy=policy, **options)
        cached = decode(OneLayer(4), prompts, policy=policy, cache=cache, **options)
        assert commits(cached) == commits(plain)
        assert {c.kind for c in plain.trace.commits} == {"commit", "replace", "remask"}


@pytest.mark.parametrize("causal_block", [4, 8])
def test_a_block_causal_cache_serves_what_was_revised(causal_block: int) -> None:
    pytest.importorskip("transformers", reason="the caches of the adapters are those of transformers")
    import published_models

    from attn_sampler.adapters.models import adapt

    prompts = [prompt(5), prompt(5, 1)]
    runs = []
    for cache in ("none", "prefix"):
        model, _ = adapt(published_models.SDARForCausalLM(seed=5, block_size=causal_block))
        options = {"mask_token_id": published_models.MASK, "gen_length": 14, "trace": True}
        runs.append(decode(model, prompts, policy=RULES["both-3"], cache=cache, **options))
    assert commits(runs[0]) == commits(runs[1])
    assert {c.kind for c in runs[0].trace.commits} == {"commit", "replace", "remask"}
