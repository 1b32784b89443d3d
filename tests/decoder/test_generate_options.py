"""What generate() takes beyond a policy: ends of text, stop strings, suppressed tokens, a bias, guidance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from decoding import decode, prompt
from test_generate import Scripted
from torch import Tensor
from toy_model import EOS, MASK, VOCAB, ToyModel

from attn_sampler import revision  # noqa: F401  (registers its policies)
from attn_sampler.generate import Generation, StepEvent
from attn_sampler.reference import REMASKED

SCRIPT = [j % 7 + 4 for j in range(32)]
POLICIES = ("attn", "attn-sequential", "confidence", "threshold", "klass", "t2t", "attn-check")
ALL_AT_ONCE = {"policy": "threshold", "tau": 0.0}


def text(ids: list[int]) -> str:
    return "".join(chr(ord("a") + token) for token in ids)


def never(*arguments: Any, **keywords: Any) -> Any:
    raise AssertionError("the model ran")


class Biased(ToyModel):
    """A toy model whose logits have something added, written into them."""

    def __init__(self, seed: int, added: dict[int, float]) -> None:
        super().__init__(seed)
        self.added = added

    def compute(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits = super().compute(tokens, attention_mask)
        for token, value in self.added.items():
            logits[..., token] += value
        return logits


def check_batch(model: Any, **options: Any) -> Generation:
    """A padded batch, which is decoded as its prompts are one by one."""
    prompts = [prompt(5, 1), prompt(2, 2), prompt(7, 3)]
    batch = decode(model, prompts, gen_length=10, seed=[7, 8, 9], **options)
    unconditional = options.pop("unconditional_prompt_ids", None)
    for i, one in enumerate(prompts):
        if unconditional is not None:
            options["unconditional_prompt_ids"] = [unconditional[i]]
        alone = decode(model, [one], gen_length=10, seed=[7 + i], **options)
        assert batch.tokens[i, 7 - len(one) :].tolist() == alone.tokens[0].tolist()
        assert batch.num_forward_passes[i] == alone.num_forward_passes[0]
    return batch


def test_several_ends_of_text() -> None:
    """The first of any of them; what follows becomes the one named first."""
    prompts = torch.tensor([[10, 11], [12, 13]])
    model = Scripted({10: 5})
    got = decode(model, prompts, gen_length=12, eos_token_id=[SCRIPT[3], EOS], trace=True, **ALL_AT_ONCE)
    expected = [SCRIPT[2], SCRIPT[3], *[SCRIPT[3]] * 10]
    assert got.tokens[:, 2:].tolist() == [expected] * 2
    assert [got.trace.tokens(i) for i in range(2)] == got.tokens.tolist()
    assert got.num_forward_passes.tolist() == [1, 1]
    got = decode(model, prompts, gen_length=12, eos_token_id=(SCRIPT[8], EOS), **ALL_AT_ONCE)
    assert got.tokens[0, 2:].tolist() == [*SCRIPT[2:5], EOS, *[SCRIPT[8]] * 8]
    # Ids that no text has change nothing, and a sequence of one is that one.
    one = check_batch(ToyModel(3), eos_token_id=9)
    for ids in ([9], [9, 500]):
        assert torch.equal(check_batch(ToyModel(3), eos_token_id=ids).tokens, one.tokens)


@pytest.mark.parametrize("eos_token_id", [None, EOS])
def test_stop_strings(eos_token_id: int | None) -> None:
    prompts = torch.tensor([[10, 11], [12, 13], [14, SCRIPT[4]]])
    model = Scripted({12: 4})
    stop = [text(SCRIPT[5:8]), "never"]  # over the end of a block
    got = decode(
        model, prompts, gen_length=12, eos_token_id=eos_token_id, pad_token_id=1, stop=stop, decode=text,
        trace=True, **ALL_AT_ONCE,
    )  # fmt: skip
    filler = 1 if eos_token_id is None else EOS
    written = [*SCRIPT[2:8], *[filler] * 6]
    assert got.tokens[0, 2:].tolist() == got.tokens[2, 2:].tolist() == written
    end = [*SCRIPT[2:4], EOS, *SCRIPT[5:8]] if eos_token_id is None else [*SCRIPT[2:4], *[EOS] * 4]
    assert got.tokens[1, 2:].tolist() == [*end, *[filler] * 6]
    assert got.num_forward_passes.tolist() == [2, 2 if eos_token_id is None else 1, 2]
    assert [got.trace.tokens(i) for i in range(3)] == got.tokens.tolist()


def test_the_first_stop_string_of_a_block_and_what_stops_nothing() -> None:
    prompts, options = torch.tensor([[10, 11]]), {"gen_length": 8, "decode": text, **ALL_AT_ONCE}
    got = decode(Scripted({}), prompts, stop=[text([SCRIPT[5]]), text([SCRIPT[3]])], **options)
    assert got.tokens[0, 2:].tolist() == [*SCRIPT[2:4], *[0] * 6]
    # Neither the prompt's text nor what stands behind the end of text, in the same block.
    got = decode(Scripted({10: 3}), prompts, stop=["kl", text(SCRIPT[4:6])], eos_token_id=EOS, **options)
    assert got.tokens[0, 2:].tolist() == [SCRIPT[2], *[EOS] * 7]
    plain = check_batch(ToyModel(2))
    stop = [text(row[-5:-3]) for row in plain.tokens.tolist()][:1]
    stopped = check_batch(ToyModel(2), stop=stop, decode=text)
    for before, after in zip(plain.tokens[:, -10:].tolist(), stopped.tokens[:, -10:].tolist(), strict=True):
        at = text(before).find(stop[0])
        assert after == (before if at < 0 else before[: at + 2] + [0] * (8 - at))


@pytest.mark.parametrize("policy", ["attn", "confidence", "klass"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_and_suppressed_tokens(policy: str, temperature: float) -> None:
    common = {"policy": policy, "temperature": temperature}
    usual = check_batch(ToyModel(1), **common).tokens[:, -10:]
    gone = usual.flatten().bincount(minlength=VOCAB).topk(3).indices.tolist()
    added = {5: 1.5, 8: -0.5, 11: 0.25}
    truth = check_batch(Biased(1, added | dict.fromkeys(gone, -math.inf)), **common).tokens
    assert not torch.isin(truth[:, -10:], torch.tensor(gone)).any()
    options = {"suppress_token_ids": [*gone, MASK], **common}
    for token in gone:
        added.pop(token, None)
    bias = torch.zeros(VOCAB, dtype=torch.float64)
    bias[list(added)] = torch.tensor(list(added.values()), dtype=torch.float64)
    for given in (added, bias):
        assert torch.equal(check_batch(ToyModel(1), logit_bias=given, **options).tokens, truth)
    bias[gone] = -math.inf
    assert torch.equal(check_batch(ToyModel(1), logit_bias=bias, **common).tokens, truth)


def test_the_models_own_logits_stay() -> None:
    logits = torch.randn(1, 8, VOCAB, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    first = before[0, 4:, :MASK].argmax(dim=1).tolist()
    got = decode(
        lambda tokens: logits, [prompt(4)], gen_length=4, policy="confidence", suppress_token_ids=first,
        logit_bias={1: 1e-3},
    )  # fmt: skip
    assert torch.equal(logits, before)
    expected = before[0, 4:, :MASK].float()
    expected[:, first] = -math.inf
    expected[:, 1] += 1e-3
    assert got.tokens[0, 4:].tolist() == expected.argmax(dim=1).tolist()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_end_of_text_comes_last(policy: str) -> None:
    """As if positions that predict the end of text could not be chosen, while others are left."""
    seen: list[tuple[StepEvent, Tensor]] = []
    model = Biased(2, {EOS: 3.0})

    def on_step(event: StepEvent) -> None:
        seen.append((event, event.result.tokens.clone()))

    options = {"policy": policy, "eos_token_id": EOS, "eos_last": True, "block_length": 5}
    check_batch(model, **options)
    decode(model, [prompt(5, 1), prompt(2, 2)], gen_length=10, on_step=on_step, **options)
    held = 0
    for event, tokens in seen:
        left = tokens[:, event.block] == MASK
        if event.result.revised is not None:
            left &= event.result.revised != REMASKED
        masked, ends = left | event.result.selected, event.result.token_ids == EOS
        early = ends & event.result.selected & (masked & ~ends).any(dim=1, keepdim=True)
        assert not early.any()
        held += int((ends & left).sum())
    assert held > 0


@pytest.mark.parametrize("rule", ["confidence", "sequential"])
def test_the_end_of_text_last_written_out(rule: str) -> None:
    policy = "confidence" if rule == "confidence" else "attn-sequential"
    differs = 0
    for seed in range(4):
        model, truth = Biased(seed, {EOS: 3.0}), Biased(seed, {EOS: 3.0}).to(torch.float64)
        truth.by_hand = True
        tokens = [*prompt(4, seed), *[MASK] * 4]
        while MASK in tokens:
            logits = truth(torch.tensor([tokens]))[0]
            logits[:, MASK] = -math.inf
            p, best = logits.softmax(dim=-1).max(dim=-1)
            s = p if rule == "confidence" else torch.stack(truth.weights)[:, 0].sum(dim=(0, 1, 2))
            masked = [i for i, token in enumerate(tokens) if token == MASK]
            i = max([i for i in masked if best[i] != EOS] or masked, key=lambda i: s[i])
            tokens[i] = int(best[i])
        usual, got = (
            decode(model, [prompt(4, seed)], gen_length=4, policy=policy, eos_token_id=EOS, eos_last=last)
            for last in (False, True)
        )
        end = tokens.index(EOS, 4) if EOS in tokens[4:] else 8
        assert got.tokens[0].tolist() == tokens[:end] + [EOS] * (8 - end)
        differs += not torch.equal(usual.tokens, got.tokens)
    assert differs


@pytest.mark.parametrize("policy", ["attn", "confidence"])
@pytest.mark.parametrize("given", [False, True])
def test_guidance(policy: str, given: bool) -> None:
    """Against a model that runs both passes itself; the attention of the second one does not count."""
    scale, without = 0.7, [prompt(n, 9) for n in (5, 2, 7)] if given else None
    plain, guides = ToyModel(4), ToyModel(4)
    guides.by_hand = True

    def both(tokens: Tensor, **keywords: Tensor) -> Tensor:
        conditional = plain(tokens, **keywords)
        bare, length = tokens.clone(), tokens.shape[1] - 10
        for i, row in enumerate(tokens.tolist()):
            whole = next(p for p in prompts if row[length - len(p) : length] == p)
            start = length - len(whole)
            bare[i, start:length] = torch.tensor(prompt(len(whole), 9)) if given else MASK
        unconditional = guides(bare, **keywords)
        return unconditional + (scale + 1) * (conditional - unconditional)

    prompts = [prompt(5, 1), prompt(2, 2), prompt(7, 3)]
    expected = decode(both, prompts, gen_length=10, policy=policy)
    model = ToyModel(4)
    options = {"policy": policy, "guidance_scale": scale, "unconditional_prompt_ids": without}
    got = check_batch(model, **options)
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.num_forward_passes, expected.num_forward_passes)
    assert not torch.equal(got.tokens, decode(ToyModel(4), prompts, gen_length=10, policy=policy).tokens)


def test_guidance_keeps_what_the_model_rules_out() -> None:
    def model(tokens: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, VOCAB)
        logits[..., 7], logits[..., 5] = -math.inf, 1.0
        return logits

    got = decode(model, [prompt(2)], gen_length=3, policy="confidence", guidance_scale=2.0)
    assert got.tokens[0, 2:].tolist() == [5, 5, 5]


def test_guidance_and_a_shift_of_logits() -> None:
    model = ToyModel(8)
    options = {"policy": "confidence", "guidance_scale": 1.5}
    shifted = lambda tokens, **keywords: model(tokens, **keywords).roll(-1, dims=1)  # noqa: E731
    plain = check_batch(model, **options)
    assert torch.equal(check_batch(shifted, logit_shift=True, **options).tokens, plain.tokens)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eos_token_id": "x"}, TypeError, "eos_token_id: expected a sequence of integers, got str"),
        ({"eos_token_id": [3, MASK]}, ValueError, "eos_token_id: expected another token than mask_token_id"),
        ({"eos_token_id": [3, -1]}, ValueError, "eos_token_id: expected an integer in"),
        ({"eos_last": True}, ValueError, "eos_last: expected an eos_token_id to go with it, got none"),
        ({"eos_last": 1}, TypeError, "eos_last: expected True or False"),
        ({"stop": "x", "decode": text}, TypeError, "stop: expected a sequence of texts, got str"),
        ({"stop": [""], "decode": text}, ValueError, "stop: expected texts that are not empty, got ''"),
        ({"stop": [3], "decode": text}, ValueError, "stop: expected texts that are not empty, got 3"),
        ({"stop": ["x"]}, TypeError, "decode: expected a callable, which stop needs, got NoneType"),
        ({"decode": "x"}, TypeError, "decode: expected a callable"),
        ({"suppress_token_ids": 3}, TypeError, "suppress_token_ids: expected a sequence of integers, got"),
        ({"suppress_token_ids": [-1]}, ValueError, "suppress_token_ids: expected an integer in"),
        ({"logit_bias": [1.0]}, TypeError, "logit_bias: expected a mapping or a tensor .*, got list"),
        ({"logit_bias": {3: math.nan}}, ValueError, "logit_bias: expected a finite number or -inf, got nan"),
        ({"logit_bias": {"a": 1.0}}, TypeError, "logit_bias: expected an integer, got str"),
        ({"logit_bias": torch.full((VOCAB,), math.inf)}, ValueError, "logit_bias: expected finite numbers"),
        ({"logit_bias": torch.zeros(2, 3)}, ValueError, "logit_bias: expected a 1-dimensional"),
        (
            {"logit_bias": torch.zeros(VOCAB), "suppress_token_ids": range(MASK)},
            ValueError,
            "expected a token that may be predicted, got none of the 23 but the mask token",
        ),
        ({"guidance_scale": -1.0}, ValueError, "guidance_scale: expected a finite number >= 0"),
        ({"guidance_scale": "x"}, TypeError, "guidance_scale: "),
        ({"unconditional_prompt_ids": [[1, 2]]}, ValueError, "unconditional_prompt_ids: goes with a guid"),
        (
            {"guidance_scale": 1.0, "unconditional_prompt_ids": [[1, 2], [3]]},
            ValueError,
            r"unconditional_prompt_ids: expected the lengths of prompt_ids, \[2, 2\], got \[2, 1\]",
        ),
        (
            {"guidance_scale": 1.0, "unconditional_prompt_ids": "text"},
            TypeError,
            "unconditional_prompt_ids: expected a tensor or a sequence, got str",
        ),
    ],
)
def test_bad_arguments(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        decode(never, [[1, MASK], [MASK, 2]], gen_length=2, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"suppress_token_ids": [1, VOCAB]}, ValueError, r"suppress_token_ids: .* in \[0, 23\), got 23"),
        ({"logit_bias": {VOCAB: 1.0}}, ValueError, r"logit_bias: expected an integer in \[0, 23\), got 23"),
        ({"logit_bias": torch.zeros(5)}, ValueError, r"logit_bias: expected shape \[V\] = \[23\], got \[5\]"),
        ({"suppress_token_ids": range(MASK)}, ValueError, "expected a token that may be predicted, got none"),
        ({"stop": ["x"], "decode": str.split}, TypeError, "descriptor 'split'"),
        ({"stop": ["x"], "decode": list}, TypeError, "decode: expected a function that returns a str, got"),
    ],
)
def test_what_the_first_pass_tells(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        decode(ToyModel(), [prompt(3)], gen_length=2, policy="confidence", **options)


def test_guidance_goes_with_no_cache() -> None:
    never.caches = ("prefix",)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="guidance_scale: goes with cache='none', got 'prefix'"):
        decode(never, [prompt(3)], gen_length=2, cache="prefix", guidance_scale=1.0)


@pytest.mark.parametrize("policy", POLICIES)
def test_each_sequence_draws_by_its_own(policy: str) -> None:
    """Temperatures, top_k, top_p and min_p of a padded batch are those of its prompts alone."""
    model = ToyModel(3)
    prompts = [prompt(5, 1), prompt(2, 2), prompt(7, 3)]
    rows = {
        "temperature": [0.0, 1.5, 0.8],
        "top_k": [0, 4, 0],
        "top_p": [1.0, 1.0, 0.6],
        "min_p": [0.0, 0.2, 0.0],
    }
    batch = decode(model, prompts, gen_length=10, seed=[7, 8, 9], policy=policy, **rows)
    tensors = {name: torch.tensor(x) for name, x in rows.items()}
    again = decode(model, prompts, gen_length=10, seed=[7, 8, 9], policy=policy, **tensors)
    assert torch.equal(batch.tokens, again.tokens)
    for i, one in enumerate(prompts):
        own = {name: x[i] for name, x in rows.items()}
        alone = decode(model, [one], gen_length=10, seed=[7 + i], policy=policy, **own)
        assert batch.tokens[i, 7 - len(one) :].tolist() == alone.tokens[0].tolist()
    plain = decode(model, prompts, gen_length=10, seed=[7, 8, 9], policy=policy, temperature=1.5)
    assert not torch.equal(plain.tokens, batch.tokens)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_grammar_is_kept_to(policy: str) -> None:
    """Even positions get even tokens and odd ones odd, by words for each position; and by one for all."""
    seen: list[list[int]] = []

    def alternating(tokens: Tensor, block: slice, sequence: Tensor) -> Tensor:
        seen.append(sequence.tolist())
        even = 0x55555555
        words = torch.tensor([even, (even << 1) - (1 << 32)]).int()
        position = torch.arange(tokens.shape[1])[block] % 2
        return words[position][:, None].expand(len(sequence), -1, -(-VOCAB // 32))

    prompts = torch.tensor([prompt(4, 1), prompt(4, 2)])
    got = decode(ToyModel(2), prompts, gen_length=11, policy=policy, token_bitmask=alternating)
    assert (got.tokens[:, 4:] % 2 == torch.arange(11) % 2).all()
    assert len(seen) >= 2
    assert all(x in ([0, 1], [0], [1]) for x in seen)

    def low(tokens: Tensor, block: slice, sequence: Tensor) -> Tensor:
        return torch.full((len(sequence), 1), 0b1100, dtype=torch.int32).expand(-1, -(-VOCAB // 32))

    got = decode(ToyModel(2), prompts, gen_length=11, policy=policy, eos_token_id=EOS, token_bitmask=low)
    assert ((got.tokens[:, 4:] % 32 == 2) | (got.tokens[:, 4:] % 32 == 3)).all()
    nothing = decode(ToyModel(2), prompts, gen_length=11, policy=policy, token_bitmask=lambda *_: None)
    assert torch.equal(nothing.tokens, decode(ToyModel(2), prompts, gen_length=11, policy=policy).tokens)


@pytest.mark.parametrize("policy", ["attn", "confidence", "attn-check"])
def test_steps_and_log_probabilities_of_tokens(policy: str) -> None:
    """Against those of the logits that each step saw, by the events that tell what it wrote."""
    logits: list[Tensor] = []

    class Kept(ToyModel):
        def compute(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            logits.append(super().compute(tokens, attention_mask))
            return logits[-1]

    events: list[StepEvent] = []
    prompts = torch.tensor([prompt(4, 1), prompt(4, 2)])
    got = decode(
        Kept(5),
        prompts,
        gen_length=9,
        block_length=5,
        policy=policy,
        temperature=1.0,
        seed=4,
        suppress_token_ids=[9],
        top_log_probs=3,
        trace=True,
        on_step=events.append,
    )
    assert got.log_probs is not None
    assert got.top_token_ids is not None
    assert got.top_log_probs is not None
    expected, passes = {}, [0, 0]
    for event, seen in zip(events, logits, strict=True):
        for row, sequence in enumerate(event.sequence.tolist()):
            x = seen[row].double()
            x[:, [MASK, 9]] = -math.inf
            p = x.log_softmax(-1)
            for i, position in enumerate(range(event.block.start, event.block.stop)):
                revised = 0 if event.result.revised is None else int(event.result.revised[row, i])
                if revised == REMASKED:
                    del expected[sequence, position]
                elif event.result.selected[row, i] or revised:
                    token = int(event.result.token_ids[row, i])
                    top = p[position].topk(3)
                    expected[sequence, position] = (passes[sequence], p[position, token], top)
            passes[sequence] += 1
    assert len(expected) == 18
    for at, (step, own, top) in expected.items():
        assert got.commit_steps[at] == step
        torch.testing.assert_close(got.log_probs[at].double(), own, rtol=1e-5, atol=1e-5)
        assert got.top_token_ids[at].tolist() == top.indices.tolist()
        torch.testing.assert_close(got.top_log_probs[at].double(), top.values, rtol=1e-5, atol=1e-5)
    assert (got.commit_steps[:, :4] == -1).all()
    assert got.log_probs[:, :4].isnan().all()
    steps = [[-1 if x is None else x for x in got.trace.steps(i)] for i in range(2)]
    assert got.commit_steps.tolist() == steps
    plain = decode(ToyModel(5), prompts, gen_length=9, block_length=5, policy=policy)
    assert plain.log_probs is plain.top_token_ids is plain.top_log_probs is None
    assert (plain.commit_steps[:, 4:] >= 0).all()


def test_behind_the_end_of_a_text_nothing_is_probable() -> None:
    prompts = torch.tensor([[10, 11], [12, 13]])
    options = {"gen_length": 12, "eos_token_id": [SCRIPT[3], EOS], "top_log_probs": 0, **ALL_AT_ONCE}
    got = decode(Scripted({10: 5}), prompts, **options)
    assert got.log_probs is not None
    assert got.log_probs[:, 4:].isnan().sum() > 10
    assert not got.log_probs[:, 2:4].isnan().any()
    assert got.top_log_probs is not None
    assert got.top_log_probs.shape == (2, 14, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": [1.0]}, "temperature: expected a number or 2 of them, got 1"),
        ({"temperature": [1.0, -1.0]}, "temperature: expected a finite number >= 0"),
        ({"top_k": [1, 2.5]}, "top_k: expected an integer"),
        ({"top_p": torch.tensor([0.5, 0.0])}, r"top_p: expected a number in \(0, 1\]"),
        ({"min_p": torch.ones(2, 1)}, r"min_p: expected a 1-dimensional tensor \[B\]"),
        ({"token_bitmask": 3}, "token_bitmask: expected a callable, got int"),
        ({"top_log_probs": -1}, "top_log_probs: expected an integer in"),
    ],
    ids=str,
)
def test_what_sequences_draw_by_is_checked(options: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        decode(never, torch.tensor([[4, 5], [6, 7]]), gen_length=3, **options)


def test_a_wrong_bitmask_is_refused() -> None:
    with pytest.raises(ValueError, match="token_bitmask: expected dtype int32, got int64"):
        decode(ToyModel(1), [prompt(3, 1)], gen_length=4, token_bitmask=lambda *_: torch.ones(1, 9).long())
