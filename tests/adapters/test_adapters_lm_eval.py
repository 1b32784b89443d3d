"""The model of lm-evaluation-harness, over the harness itself where it is installed, with local tasks."""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from launcher import launch
from torch import Tensor
from toy_model import EOS, MASK, ToyModel

from attn_sampler import generate

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a task of these tests that reaches for the network fails
pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install '.[lm-eval]')")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from attn_sampler.adapters import lm_eval as adapter
from attn_sampler.adapters.lm_eval import AttnSamplerLM, main


class Letters:
    """A tokenizer of letters: a is token 4, and so on."""

    bos_token, bos_token_id, mask_token_id, eos_token_id = "<", 1, MASK, EOS
    name_or_path = "tests/letters"
    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [1 if letter == "<" else 2 if letter == " " else ord(letter) - 93 for letter in text]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(" " if i == 2 else chr(i + 93) for i in ids if i not in (0, 1, EOS, MASK))


OPTIONS = {"block_length": 4, "tau": 0.3, "max_gen_toks": 8}


def make(model: Any = None, **options: Any) -> AttnSamplerLM:
    return AttnSamplerLM(model=model or ToyModel(), tokenizer=Letters(), **(OPTIONS | options))


def ask(context: str, **keywords: Any) -> Instance:
    return Instance("generate_until", {}, (context, {"until": [], **keywords}), 0)


def answer(context: str, length: int = 8, **options: Any) -> str:
    ids = torch.tensor([Letters()(context)["input_ids"]])
    options = {"mask_token_id": MASK, "eos_token_id": EOS, "block_length": 4, "tau": 0.3} | options
    tokens = generate(ToyModel(), ids, gen_length=length, **options).tokens
    return Letters().decode(tokens[0, ids.shape[1] :].tolist(), skip_special_tokens=True)


CONTEXTS = ["abc", "fedcba", "a", "hgf ab", "abcdefgh"]


@pytest.mark.parametrize("batch_size", [1, "3"])
def test_generates_as_generate(batch_size: int | str):
    lm = make(batch_size=batch_size)
    lengths = [8, 4, 8, 4, 8]
    requests = [ask(c, max_gen_toks=n) for c, n in zip(CONTEXTS, lengths, strict=True)]
    expected = [answer(c, n) for c, n in zip(CONTEXTS, lengths, strict=True)]
    assert lm.generate_until(requests, disable_tqdm=True) == expected
    assert len(set(expected)) > 2


def test_block_causal_models_get_prompts_whose_lengths_agree(monkeypatch: pytest.MonkeyPatch):
    lm, batches = make(batch_size=2), []
    lm.model.causal_block = 4

    def decode(
        prompts: list[list[int]], length: int, temperature: float, seeds: list[int]
    ) -> list[list[int]]:
        batches.append([len(prompt) % 4 for prompt in prompts])
        return [[4 + seed] for seed in seeds]

    monkeypatch.setattr(lm, "_decode", decode)
    answers = lm.generate_until([ask("a" * n) for n in (3, 8, 7, 4, 11, 12)])
    assert sorted(batches) == [[0], [0, 0], [1], [1, 1]]
    assert answers == list("abcdef")


def test_options_of_the_request():
    lm = make(seed=5)
    context = max(CONTEXTS, key=lambda c: len(set(answer(c))))
    greedy = answer(context)
    stop = greedy[-1]
    assert lm.generate_until([ask(context, until=[stop])]) == [greedy[: greedy.index(stop)]]
    assert lm.generate_until([ask(context, until=stop)]) == [greedy[: greedy.index(stop)]]
    sampled = [ask(context, do_sample=True, temperature=3.0) for _ in range(2)]
    expected = [answer(context, temperature=3.0, seed=5 + i) for i in range(2)]
    assert lm.generate_until(sampled) == expected
    assert expected[0] != expected[1]
    assert make(max_length=10).generate_until([ask("abcdef")]) == [
        Letters().decode(
            generate(
                ToyModel(),
                torch.tensor([[8, 9]]),
                mask_token_id=MASK,
                eos_token_id=EOS,
                gen_length=8,
                block_length=4,
                tau=0.3,
            )
            .tokens[0, 2:]
            .tolist(),
            skip_special_tokens=True,
        )
    ], "the prompt keeps its end"
    assert make().tok_encode("<a") == [1, 4], "no second token that begins the text"


#: What ``GenerationConfig`` can ask for beside a length and a temperature, each with a value that asks.
ASKS = {
    **{"top_h": 0.4, "typical_p": 0.5, "epsilon_cutoff": 1e-3},
    **{"eta_cutoff": 1e-3, "repetition_penalty": 1.2, "encoder_repetition_penalty": 1.2, "num_beams": 4},
    **{"no_repeat_ngram_size": 3, "encoder_no_repeat_ngram_size": 3, "length_penalty": 2.0},
    **{"diversity_penalty": 0.5, "num_beam_groups": 2, "num_return_sequences": 2, "early_stopping": True},
    **{"max_length": 20, "min_length": 5, "min_new_tokens": 5, "max_time": 1.0, "stop_strings": ["x"]},
    **{
        "bad_words_ids": [[4]],
        "suppress_tokens": [4],
        "begin_suppress_tokens": [4],
        "force_words_ids": [[4]],
    },
    **{"sequence_bias": {(4,): -1.0}, "constraints": ["x"], "forced_bos_token_id": 4, "low_memory": True},
    **{"forced_eos_token_id": 4, "exponential_decay_length_penalty": (3, 1.5), "guidance_scale": 1.5},
    **{
        "renormalize_logits": True,
        "remove_invalid_values": True,
        "token_healing": True,
        "is_assistant": True,
    },
    **{"watermarking_config": {}, "penalty_alpha": 0.6, "dola_layers": "high", "use_mtp": True},
    **{"bos_token_id": 4, "eos_token_id": 4, "pad_token_id": 4, "decoder_start_token_id": 4},
    **{"num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant", "prompt_lookup_num_tokens": 3},
    **{"assistant_confidence_threshold": 0.4, "assistant_early_exit": 2, "assistant_lookbehind": 10},
    **{"assistant_ensemble_weight": 0.5, "speculation_type": "x", "target_lookbehind": 10},
    **{
        "max_matching_ngram_size": 2,
        "cache_implementation": "static",
        "cache_config": {},
        "max_cache_len": 9,
    },
    **{"prefill_chunk_size": 4, "compile_config": {}, "continuous_batching_config": {}},
    **{"disable_compile": True, "return_dict_in_generate": True, "output_attentions": True},
    **{"output_hidden_states": True, "output_scores": True, "output_logits": True},
}
FILTERS = {"top_k": 2, "top_p": 0.6, "min_p": 0.3}
SERVED = ("max_new_tokens", "do_sample", "temperature", *FILTERS)
DRAW = {"do_sample": True, "temperature": 3.0}


def test_every_option_of_the_harness_and_of_transformers_is_classified():
    """Its model for transformers hands all that a task asks for to ``model.generate``."""
    transformers = pytest.importorskip("transformers", reason="the list is its GenerationConfig's")
    names = {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")}
    assert names == {*ASKS, *SERVED, "use_cache", "transformers_version"}
    own = lm_eval.models.utils.GenKwargs.__annotations__
    assert {*own, *FILTERS} - {"__extra_items__"} == set(adapter.GEN_KWARGS)


@pytest.mark.parametrize("name", [*ASKS, "seed", "stop", "anything"])
def test_options_that_are_not_served_are_refused_by_name(name: str):
    lm, value = make(), ASKS.get(name, 7)
    with pytest.raises(
        ValueError, match=rf"serves until, .*; {name}: expected .*, got {re.escape(repr(value))} "
    ):
        lm.generate_until([ask("ab"), ask("ab", **DRAW, **{name: value})])
    assert lm.model.calls == []


@pytest.mark.parametrize("name", FILTERS)
def test_requests_draw_from_what_they_ask_for(name: str):
    """Each by its own, in batches of their own; -1 is all tokens, as vLLM has it."""
    lm, context = make(batch_size=4, seed=3), max(CONTEXTS, key=lambda c: len(set(answer(c))))
    options = [{}, {name: FILTERS[name]}, {"top_k": -1}, {**FILTERS, name: FILTERS[name]}]
    answers = lm.generate_until([ask(context, **DRAW, **x) for x in options])
    given = [{**x, "top_k": max(x.get("top_k", 0), 0)} for x in options]
    expected = [answer(context, temperature=3.0, seed=3 + i, **x) for i, x in enumerate(given)]
    assert answers == expected
    assert answer(context, temperature=3.0, seed=4) != expected[1]


def test_options_that_ask_for_nothing():
    nothing = {name: value for name, values in adapter._NEUTRAL.items() for value in values}
    expected = answer("hgf ab", temperature=3.0)
    for options in (nothing, dict.fromkeys(ASKS), {"top_k": 0, "use_cache": True}):
        assert make().generate_until([ask("hgf ab", **DRAW, **options)]) == [expected]
    greedy = {"do_sample": False, "top_k": 1, "top_p": 0.5, "min_p": 0.5, "typical_p": 0.5}
    assert make().generate_until([ask("hgf ab", **greedy)]) == [answer("hgf ab")] != [expected]


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_the_names_of_a_length(name: str):
    assert make().generate_until([ask("ab", **{name: 4})]) == [answer("ab", 4)]


def test_options_of_a_model_that_is_loaded(caplog: pytest.LogCaptureFixture):
    for name in ("device", "dtype", "family", "attention", "trust_remote_code"):
        with pytest.raises(ValueError, match=f"with a model that is loaded already, {name}: expected "):
            make(**{name: "llada"})
    make(device=None, dtype="auto", trust_remote_code=False, max_batch_size=None)
    assert not caplog.text
    make(max_batch_size=8)
    assert "max_batch_size=8 is not read" in caplog.text


class Table(torch.nn.Module):
    """Knows, for two positions after a context of one token, what each says given the other or a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(2, MASK + 1, MASK + 1) * 2.0)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, MASK + 1)
        for position in (1, 2):
            logits[:, position] = self.table[position - 1][tokens[:, 3 - position]]
        return logits


def test_likelihood_is_the_mean_over_masks():
    torch.manual_seed(0)
    model = Table()
    log_p = model.table.detach().log_softmax(dim=-1)
    x, y = 4, 9
    # One mask: twice one of the two conditionals; two masks: both marginals.
    single = log_p[0, y, x] + log_p[1, x, y]
    exact = float(0.5 * (single + log_p[0, MASK, x] + log_p[1, MASK, y]))
    lm = make(model, mc_samples=2000, batch_size=64)
    ((estimate, greedy),) = lm._loglikelihood_tokens([(None, [2], [x, y])], disable_tqdm=True)
    assert abs(estimate - exact) < 0.05 * abs(exact)
    assert not greedy
    assert lm._loglikelihood_tokens([(None, [2], [x, y])])[0][0] == estimate, "the same in every run"
    other = make(model, mc_samples=2000, batch_size=7)
    assert math.isclose(other._loglikelihood_tokens([(None, [2], [x, y])])[0][0], estimate, rel_tol=1e-6)


def test_likelihood_of_one_token_is_exact():
    lm, model = make(), ToyModel()
    with torch.no_grad():
        logits = model(torch.tensor([[1, 4, 5, MASK]]))[0]
    request = Instance("loglikelihood", {}, ("ab", "c"), 0)
    ((value, _),) = lm.loglikelihood([request])
    torch.testing.assert_close(value, float(logits[3].log_softmax(dim=-1)[6]), rtol=1e-5, atol=1e-6)
    assert len(lm.model.calls) == 1
    ((shifted, _),) = make(logit_shift=True).loglikelihood([request])
    torch.testing.assert_close(shifted, float(logits[2].log_softmax(dim=-1)[6]), rtol=1e-5, atol=1e-6)


def test_greedy_continuations():
    best = answer("ab", 2)
    lm = make(check_greedy=True, mc_samples=4)
    others = Instance("loglikelihood", {}, ("ab", "zz"[:2].replace("z", "c")), 0)
    results = lm.loglikelihood([Instance("loglikelihood", {}, ("ab", best), 0), others])
    assert [greedy for _, greedy in results] == [True, best == "cc"]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Two tasks on local files: one that generates and one that compares likelihoods."""
    rows = [{"text": c, "answer": answer(c)} for c in CONTEXTS[:2]] + [{"text": "a", "answer": "z"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shared = f"""
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path / "rows.jsonl"}
test_split: test
doc_to_text: "{{{{text}}}}"
metadata:
  version: 1.0
"""
    (tmp_path / "letters.yaml").write_text(
        f"""
task: letters{shared}
output_type: generate_until
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
generation_kwargs:
  until: []
metric_list:
  - metric: exact_match
"""
    )
    (tmp_path / "choice.yaml").write_text(
        f"""
task: choice{shared}
output_type: multiple_choice
doc_to_choice: ["c", "de"]
doc_to_target: 0
target_delimiter: ""
metric_list:
  - metric: acc
"""
    )
    return tmp_path


def test_harness_runs_local_tasks(tasks: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tasks / "cache"))
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    lm = make(mc_samples=4)
    results = lm_eval.simple_evaluate(
        lm, tasks=["letters", "choice"], task_manager=manager, bootstrap_iters=0
    )
    assert results["results"]["letters"]["exact_match,none"] == pytest.approx(2 / 3)
    pairs = [(lm._encode_pair(c, t)) for c in (*CONTEXTS[:2], "a") for t in ("c", "de")]
    values = [lm._estimate(c, t) for c, t in pairs]
    first = sum(values[i] > values[i + 1] for i in (0, 2, 4))
    assert results["results"]["choice"]["acc,none"] == pytest.approx(first / 3)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What the loader of checkpoints was asked for: one that has the toy model alone."""
    calls = []

    def load(path: str, **keywords: Any) -> tuple[Any, ...]:
        calls.append((path, keywords))
        return ToyModel(), Letters(), {"mask_token_id": MASK, "eos_token_id": EOS, "block_length": 32}

    monkeypatch.setitem(sys.modules, "attn_sampler.adapters.run", ModuleType("run"))
    sys.modules["attn_sampler.adapters.run"].load = load
    return calls


ARGUMENTS = "pretrained=some/model,policy=attn,tau=0.3,block_length=4,trust_remote_code=true,max_gen_toks=8"


def test_registered_under_its_name(loaded: list):
    lm = get_model("attn_sampler").create_from_arg_string(
        ARGUMENTS, {"batch_size": 2, "max_batch_size": None, "device": None}
    )
    ((path, keywords),) = loaded
    assert path == "some/model"
    assert keywords["trust_remote_code"] is True
    assert lm.generate_until([ask(c) for c in CONTEXTS]) == [answer(c) for c in CONTEXTS]
    assert lm.tokenizer_name == "tests__letters"


@pytest.mark.parametrize(("gpu", "device"), [(False, "cpu"), (True, "cuda:0")])
def test_the_harness_asks_for_a_gpu_unless_told_otherwise(
    gpu: bool, device: str, loaded: list, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    get_model("attn_sampler").create_from_arg_string(ARGUMENTS, {"batch_size": 1, "device": "cuda:0"})
    assert loaded[0][1]["device"] == device
    assert ("the model runs on the CPU instead of on cuda:0" in caplog.text) is not gpu


def test_command_line(
    loaded: list, tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The harness's own, with its thousands of tasks left out."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tasks / "cache"))
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    command = ["lm_eval", "--model", "attn_sampler", "--model_args", ARGUMENTS, "--tasks", "letters"]
    monkeypatch.setattr(sys, "argv", [*command, "--include_path", str(tasks)])
    main()
    assert loaded[0][0] == "some/model"
    assert re.search(r"\|letters\|.*\|exact_match\|.*0\.6667", capsys.readouterr().out)


def evaluate_tasks(tasks: Path) -> int:
    """What a rank does: the tasks with sampling, its report and how many prompts it decoded to files."""
    prompts = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal prompts
        prompts += len(arguments[1])
        return generate(*arguments, **options)

    adapter.generate = counted
    sys.modules["attn_sampler.adapters.run"] = ModuleType("run")
    sys.modules["attn_sampler.adapters.run"].load = lambda *_, **__: (
        ToyModel(),
        Letters(),
        {"mask_token_id": MASK, "eos_token_id": EOS},
    )
    report = lm_eval.simple_evaluate(
        "attn_sampler",
        model_args=f"{ARGUMENTS},mc_samples=4,batch_size=2",
        tasks=["letters", "choice"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        gen_kwargs="do_sample=true,temperature=3.0",
    )
    if report is not None:
        kept = {name: report[name] for name in ("results", "samples", "n-samples")}
        (tasks / "report.json").write_text(json.dumps(kept, default=str))
    (tasks / f"prompts{os.environ.get('RANK')}").write_text(str(prompts))
    return 0


@pytest.mark.slow
def test_ranks_report_what_one_process_does(tasks: Path, monkeypatch: pytest.MonkeyPatch):
    """Three documents on two ranks, and none is asked for again to make these equal."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tasks / "cache"))
    monkeypatch.setitem(sys.modules, "attn_sampler.adapters.run", None)
    (tasks / "letters.yaml").write_text((tasks / "letters.yaml").read_text() + "repeats: 2\n")
    monkeypatch.setattr(adapter, "generate", generate)  # and what the function puts in its place is undone
    evaluate_tasks(tasks)
    expected = json.loads((tasks / "report.json").read_text())
    (tasks / "report.json").unlink()
    first, second = launch(2, tasks, evaluate_tasks, tasks)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert json.loads((tasks / "report.json").read_text()) == expected
    assert (tasks / "prompts0").read_text() == "4", "two documents of three, each twice"
    assert (tasks / "prompts1").read_text() == "2"
    sampled = [sample["resps"][0] for sample in expected["samples"]["letters"]]
    assert [len(set(texts)) for texts in sampled] == [2, 2, 2]


def test_checkpoint_in_a_folder(tmp_path: Path):
    """The loader of ``attn-sampler generate`` on a Llama of random weights, made bidirectional."""
    run = pytest.importorskip("attn_sampler.adapters.run", reason="the loader of checkpoints is not there")
    transformers = pytest.importorskip("transformers", reason="the loader needs transformers")
    tokenizers = pytest.importorskip("tokenizers", reason="the loader needs transformers")
    words = ["[UNK]", "[PAD]", "[EOS]", *(f"w{i}" for i in range(28)), "[MASK]"]
    by_word = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    by_word.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "[EOS]", "mask_token": "[MASK]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=by_word, **special).save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=len(words), initializer_range=0.4, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)

    lm = AttnSamplerLM(str(tmp_path), family="bidirectional", device="cpu", batch_size=2, **OPTIONS)
    contexts = ["w3 w4", "w9", "w1 w2 w5 w7"]
    checkpoint = run.load(str(tmp_path), family="bidirectional", device="cpu")
    options = {"gen_length": 8, "block_length": 4, "tau": 0.3}
    expected = [run.decode(checkpoint, [context], **options)[0][0] for context in contexts]
    assert lm.generate_until([ask(context) for context in contexts]) == expected
    assert len(set(expected)) == 3
    ((value, _),) = lm.loglikelihood([Instance("loglikelihood", {}, ("w3 w4", " w5 w6"), 0)])
    assert -60.0 < value < 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, "pretrained: expected a checkpoint, or a model"),
        ({"tokenizer": None}, "tokenizer: goes with a model"),
        ({"batch_size": "auto"}, "batch_size: expected an integer of at least 1, got 'auto'"),
        ({"policy": "best"}, "policy: expected one of"),
        ({"steps": 3}, "attn_sampler: no such argument: steps"),
        ({"tokenizer": SimpleNamespace(eos_token_id=3)}, "mask_token_id: needed"),
        ({"mc_samples": 0}, "mc_samples: expected an integer"),
    ],
)
def test_misuse(options: dict[str, Any], message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        AttnSamplerLM(**({"model": ToyModel(), "tokenizer": Letters()} | options))


def test_refusals_with_their_reasons(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(NotImplementedError, match="no perplexity of whole texts"):
        make().loglikelihood_rolling([])
    model = ToyModel()
    model.causal_block = 4
    with pytest.raises(NotImplementedError, match="this one's is block-causal"):
        make(model)._loglikelihood_tokens([])
    with pytest.raises(ValueError, match="leaves no room for a prompt and 8 tokens"):
        make(max_length=8).generate_until([ask("abc")])
    with pytest.raises(ValueError, match="continuation: expected at least one token"):
        make()._loglikelihood_tokens([(("ab", ""), [4, 5], [])])
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "attn_sampler.adapters.lm_eval")
    with pytest.raises(
        ImportError, match=r"lm_eval cannot be imported .* pip install 'attn_sampler\[lm-eval\]'"
    ):
        importlib.import_module("attn_sampler.adapters.lm_eval")
