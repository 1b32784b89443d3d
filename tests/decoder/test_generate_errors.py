"""generate() refuses what it cannot do, and stops where it cannot go on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoding import ALL_POLICIES, decode, prompt
from test_generate import Scripted
from torch import Tensor
from toy_model import MASK, VOCAB, ToyModel

from attn_sampler import BackendUnavailableError
from attn_sampler.generate import StepEvent
from attn_sampler.sampler import EBSampler, Policy, StepState


def never(*arguments: Any, **keywords: Any) -> Any:
    raise AssertionError("the model ran")


def padding_mask(*rows: list[bool]) -> Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "llada"}, TypeError, "model: expected a callable, got str"),
        ({"prompt_ids": torch.zeros(2, 3)}, ValueError, "prompt_ids: expected dtype int64"),
        (
            {"prompt_ids": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            "prompt_ids: expected a 2-dimensional",
        ),
        ({"prompt_ids": "text"}, TypeError, "prompt_ids: expected a tensor or a sequence, got str"),
        ({"prompt_ids": [[1.5]]}, ValueError, "prompt_ids: expected"),
        ({"prompt_ids": [1, 2]}, ValueError, "prompt_ids: expected"),
        ({"prompt_ids": ["a text"]}, TypeError, "prompt_ids: expected a sequence of token ids for each"),
        ({"prompt_ids": [[1], None]}, TypeError, "prompt_ids: expected a sequence of token ids for each"),
        ({"mask_token_id": -1}, ValueError, "mask_token_id: "),
        ({"mask_token_id": "[MASK]"}, TypeError, "mask_token_id: "),
        ({"mask_token_id": 1 << 63}, ValueError, "mask_token_id: expected an integer in"),
        ({"mask_token_id": 1 << 70}, ValueError, "mask_token_id: expected an integer in"),
        ({"eos_token_id": 1 << 70}, ValueError, "eos_token_id: expected an integer in"),
        ({"pad_token_id": 1 << 70}, ValueError, "pad_token_id: expected an integer in"),
        ({"gen_length": 1 << 70}, ValueError, "gen_length: expected an integer in"),
        ({"gen_length": -1}, ValueError, "gen_length: "),
        ({"gen_length": 2.0}, TypeError, "gen_length: "),
        ({"block_length": 0}, ValueError, "block_length: "),
        ({"policy": "nobody"}, ValueError, "policy: expected one of"),
        ({"policy": 3}, TypeError, "policy: expected a name"),
        ({"policy": "random", "tau": 0.5}, TypeError, "policy 'random': .*tau"),
        ({"policy": EBSampler(), "tau": 0.5}, TypeError, "policy: options"),
        ({"tau": 1.5}, ValueError, "tau: "),
        ({"temperature": -1.0}, ValueError, "temperature: "),
        ({"temperature": 1e-40}, ValueError, "temperature: expected 0 or at least"),
        ({"temperature": "hot"}, TypeError, "temperature: "),
        ({"seed": 0.5}, TypeError, "seed: "),
        ({"seed": "x"}, TypeError, "seed: "),
        ({"seed": [1, 2, 3]}, ValueError, "seed: expected an integer or 2 of them, got 3"),
        ({"seed": [1, None]}, TypeError, "seed: "),
        (
            {"attention_mask": padding_mask([True], [True])},
            ValueError,
            r"attention_mask: expected shape \[B, T\]",
        ),
        ({"attention_mask": torch.ones(2, 2)}, ValueError, "attention_mask: expected dtype bool"),
        ({"attention_mask": [[1, 1]]}, TypeError, "attention_mask: expected a tensor"),
        (
            {"attention_mask": padding_mask([True, False], [True, True])},
            ValueError,
            "attention_mask: expected padding on the left",
        ),
        (
            {"prompt_ids": [[1]], "attention_mask": padding_mask([True])},
            ValueError,
            "attention_mask: goes with a prompt_ids tensor",
        ),
        (
            {"prompt_ids": torch.tensor([[MASK, 1]]), "attention_mask": padding_mask([False, True])},
            ValueError,
            "prompt_ids: expected no mask_token_id at the padding",
        ),
        ({"eos_token_id": MASK}, ValueError, "eos_token_id: expected another token"),
        ({"eos_token_id": -2}, ValueError, "eos_token_id: "),
        ({"pad_token_id": MASK}, ValueError, "pad_token_id: expected another token"),
        ({"pad_token_id": 1.0}, TypeError, "pad_token_id: "),
        ({"logit_shift": 1}, TypeError, "logit_shift: "),
        ({"layers": "first"}, ValueError, "layers: "),
        ({"layers": []}, ValueError, "layers: "),
        ({"layers": 1}, TypeError, "layers: "),
        ({"policy": "confidence", "layers": 1}, TypeError, "layers: "),
        ({"query_rows": "some"}, ValueError, "query_rows: "),
        ({"softmax_scope": "all"}, ValueError, "softmax_scope: "),
        ({"diagonal": 0}, TypeError, "diagonal: "),
        ({"keep_layers": None}, TypeError, "keep_layers: "),
        ({"backend": "gpu"}, ValueError, "backend: "),
        ({"backend": "cuda"}, BackendUnavailableError, "backend"),
        ({"progress": "yes"}, TypeError, "progress: "),
        ({"trace": "out.json"}, TypeError, "trace: "),
        ({"on_step": 1}, TypeError, "on_step: expected a callable"),
    ],
    ids=str,
)
def test_bad_arguments(options: dict, error: type[Exception], message: str) -> None:
    options = {"model": never, "prompt_ids": torch.tensor([[1, MASK], [MASK, 2]]), **options}
    with pytest.raises(error, match=message):
        decode(options.pop("model"), options.pop("prompt_ids"), **options)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.zeros(1, 3, VOCAB), r"model output: expected shape \[B, T, V\] = \[1, 4, 23\]"),
        (torch.zeros(2, 4, VOCAB), "model output: expected shape"),
        (torch.zeros(4, VOCAB), "model output: expected a 3-dimensional"),
        (torch.zeros(1, 4, VOCAB, dtype=torch.int64), "model output: expected dtype"),
        (torch.zeros(1, 4, MASK), r"mask_token_id: expected an integer in \[0, 22\), got 22"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(list(value.shape)),
)
def test_bad_model_outputs(output: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(lambda tokens: output, [prompt(2)], gen_length=2, policy="confidence")
    with pytest.raises(TypeError, match="model output: expected a tensor"):
        decode(lambda tokens: None, [prompt(2)], gen_length=2, policy="confidence")


def test_a_model_without_visible_attention() -> None:
    with pytest.raises(RuntimeError, match="saw no call of"):
        decode(Scripted({}), [prompt(2)], gen_length=2)
    with pytest.raises(RuntimeError, match=r"layers: \(7,\) does not fit the 2 attention calls"):
        decode(ToyModel(), [prompt(2)], gen_length=2, layers=[7])


@pytest.mark.parametrize("policy", ALL_POLICIES)
@pytest.mark.parametrize("undefined", [torch.nan, torch.inf])
def test_undefined_logits_stop_the_run(policy: str, undefined: float) -> None:
    model, seen = ToyModel(), []

    def broken(tokens: Tensor, **keywords: Tensor) -> Tensor:
        logits = model(tokens, **keywords)
        if len(model.calls) > 1:
            logits[1] = undefined
        return logits

    message = r"the model's logits at position [5-9] of sequence 1 are undefined \(NaN, \+inf or all -inf\)"
    with pytest.raises(RuntimeError, match=message):
        decode(broken, [prompt(5), prompt(2)], gen_length=8, policy=policy, on_step=seen.append)
    assert len(seen) == 1  # the step before


@pytest.mark.parametrize("policy", ["attn", "confidence", "threshold", "eb", "factor"])
def test_one_undefined_position_waits_for_the_others(policy: str) -> None:
    model = ToyModel()

    def broken(tokens: Tensor) -> Tensor:
        logits = model(tokens)
        logits[:, 3] = torch.nan
        return logits

    seen: list[StepEvent] = []
    with pytest.raises(RuntimeError, match="at position 3 of sequence 0"):
        decode(broken, [prompt(2)], gen_length=4, policy=policy, on_step=seen.append)
    assert seen[-1].result.tokens[0].eq(MASK).tolist() == [False] * 3 + [True] + [False] * 2


def test_undefined_attention_stops_the_run() -> None:
    class Broken(ToyModel):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return torch.nan_to_num(super().attend(torch.full_like(q, torch.nan), k, v, mask))

    with pytest.raises(
        RuntimeError, match=r"nothing could be committed in sequences \[0, 1\]: the attention scores are NaN"
    ):
        decode(Broken(), [prompt(3), prompt(3)], gen_length=4)


@pytest.mark.parametrize("needs_scores", [False, True])
def test_a_policy_that_commits_nothing_does_not_run_forever(needs_scores: bool) -> None:
    class Nothing(Policy):
        def select(self, state: StepState) -> Tensor:
            return torch.zeros_like(state.masked)

    Nothing.needs_scores = needs_scores
    message = r"nothing could be committed in sequences \[0\]: the policy chose no masked position"
    with pytest.raises(RuntimeError, match=message):
        decode(ToyModel(), [prompt(3)], gen_length=4, policy=Nothing())


def test_an_exception_in_the_model_passes_through() -> None:
    with pytest.raises(AssertionError, match="the model ran"):
        decode(never, [prompt(3)], gen_length=4)
    assert torch._C._len_torch_function_stack() == 0
