"""``attn-sampler generate``, on small checkpoints in a folder, and what it says where it cannot run."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import published_models as published
import pytest
import torch

from attn_sampler.adapters import untested_version
from attn_sampler.cli import main

pytest.importorskip("transformers", reason="the command loads models with it")

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from attn_sampler import DecodeTrace, generate
from attn_sampler.adapters.models import adapt
from attn_sampler.adapters.run import Checkpoint, LoadError, decode, load, load_tokenizer, token_text
from attn_sampler.adapters.transformers import make_bidirectional

WORDS = ["[UNK]", "[PAD]", "[EOS]", *(f"w{i}" for i in range(28)), "[MASK]"]
MASK = len(WORDS) - 1

# Remote code as a checkpoint brings it: LLaDA's call structure around a Llama.
REMOTE = """
from transformers import LlamaConfig, LlamaModel, PreTrainedModel, PretrainedConfig
import torch, types

class TinyConfig(PretrainedConfig):
    model_type = "llada"

class TinyLLaDA(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        inner = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                            num_attention_heads=2, is_causal=False, attn_implementation="sdpa")
        self.inner, self.head = LlamaModel(inner), torch.nn.Linear(16, 32)
        for module in self.modules():
            if hasattr(module, "is_causal"):
                module.is_causal = False
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        hidden = self.inner(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return types.SimpleNamespace(logits=self.head(hidden))
"""


def save_tokenizer(path: Path, *, mask: bool = True) -> None:
    vocabulary = {word: i for i, word in enumerate(WORDS) if mask or word != "[MASK]"}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "[EOS]"}
    if mask:
        special["mask_token"] = "[MASK]"
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights and a tokenizer of words."""
    path = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.4,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    save_tokenizer(path)
    return path


def arguments(folder: Path, *more: str) -> list[str]:
    start = ["generate", "--model", str(folder), "--adapter", "bidirectional", "--gen-length", "12"]
    return [*start, "--block-length", "4", *more]


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_the_command_decodes_as_generate_does(
    folder: Path, cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "t.json"
    given = ["--policy", "attn", "--tau", "0.3", "--temperature", "0.7", "--seed", "5", "--cache", cache]
    given += ["--trace", str(trace), "--device", "cpu", "--dtype", "float32", "--layers", "last"]
    assert main(arguments(folder, "--prompt", "w1 w2 w3 w4 w5", "w6 w7", *given)) == 0
    captured = capsys.readouterr()
    model = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="attn_sampler").eval()
    adapter, options = adapt(make_bidirectional(model), "bidirectional")
    options |= {"block_length": 4, "mask_token_id": MASK, "eos_token_id": 2, "cache": cache, "layers": (-1,)}
    expected = generate(
        adapter, [[4, 5, 6, 7, 8], [9, 10]],
        gen_length=12, tau=0.3, temperature=0.7, seed=5, trace=True, **options,
    )  # fmt: skip
    texts = [" ".join(WORDS[t] for t in row if t > 2) for row in expected.tokens[:, 5:].tolist()]
    assert captured.out.splitlines() == texts
    assert f"{expected.num_forward_passes.tolist()} forward passes" in captured.err
    assert f"wrote {trace}" in captured.err
    loaded = DecodeTrace.load(trace)
    assert loaded == expected.trace
    assert loaded.symbols == {token: f" {WORDS[token]}" for token in loaded.token_ids()}


@pytest.mark.parametrize(
    ("decoder", "tokens", "texts"),
    [
        (decoders.ByteLevel(), ["a", "Ġthe", "ing", "Ċ"], ["a", " the", "ing", "\n"]),
        (decoders.Metaspace(), ["a", "▁the", "ing", "▁"], ["a", " the", "ing", " "]),
        (decoders.WordPiece(), ["a", "the", "##ing", "."], [" a", " the", "ing", "."]),
        (decoders.WordPiece(), ["the", "##ing"], [" the", "ing"]),  # that has no "a"
    ],
)
def test_what_a_token_adds_to_a_text(
    decoder: decoders.Decoder, tokens: list[str], texts: list[str], tmp_path: Path
) -> None:
    words = {word: i for i, word in enumerate(["[UNK]", "[MASK]", *tokens])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.decoder = decoder
    special = {"unk_token": "[UNK]", "mask_token": "[MASK]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert [token_text(loaded, words[token]) for token in tokens] == texts
    assert str(token_text(loaded, 1)).strip() == "[MASK]"
    assert [token_text(loaded, token) for token in (99, 2**40)] == [None, None]


def test_a_tokenizer_that_is_not_to_be_had(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no such folder"):
        load_tokenizer(str(tmp_path / "none"))
    with pytest.raises(LoadError, match="cannot load"):
        load_tokenizer(str(tmp_path))


def test_a_chat_template_is_used_unless_told_not_to(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "chat"
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["chat_template"] = "w9 {{ messages[0]['content'] }} w8"
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    seen: list[Any] = []
    original = generate

    def spy(model: Any, prompts: Any, **options: Any) -> Any:
        seen.append(prompts)
        return original(model, prompts, **options)

    monkeypatch.setattr("attn_sampler.adapters.run.generate", spy)
    assert main(arguments(path, "--prompt", "w1")) == 0
    assert main(arguments(path, "--prompt", "w1", "--no-chat")) == 0
    assert seen == [[[12, 4, 11]], [[4]]]


def test_masked_tokens_before_a_suffix_and_inside_a_prompt(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Models that continue a text fill in as well; the whole text is then told."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="attn_sampler").eval()
    adapter, options = adapt(make_bidirectional(model), "bidirectional")
    options |= {"block_length": 4, "mask_token_id": MASK, "eos_token_id": 2}

    def told(prompts: list[list[int]], **more: Any) -> list[str]:
        filled = generate(adapter, prompts, **options, **more)
        rows = [row[seen].tolist() for row, seen in zip(filled.tokens, filled.attention_mask, strict=True)]
        return [" ".join(WORDS[t] for t in row if t > 2) for row in rows]

    given = ["--prompt", "w1 w2 w3", "w4", "--suffix", " w5 w6"]
    assert main(arguments(folder, *given)) == 0
    expected = told([[4, 5, 6, *[MASK] * 12, 8, 9], [7, *[MASK] * 12, 8, 9]])
    assert capsys.readouterr().out.splitlines() == expected
    assert all(text.endswith("w5 w6") for text in expected)
    assert main([*arguments(folder, "--prompt", "w1 [MASK] w3"), "--gen-length", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == told([[4, MASK, 6]], gen_length=2)
    assert main([*arguments(folder, "--prompt", "w1 [MASK] w3"), "--gen-length", "0"]) == 0
    assert capsys.readouterr().out.splitlines() == told([[4, MASK, 6]])
    line = failure([*arguments(folder, "--prompt", "w1"), "--gen-length", "0"], capsys)
    assert "prompt 1: expected [MASK] where it is to be filled, or a gen_length > 0" in line


def test_ends_of_text(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All that the checkpoint names, those that the command names, and stop texts, which are cut off."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="attn_sampler").eval()
    adapter, options = adapt(make_bidirectional(model), "bidirectional")
    options |= {"block_length": 4, "mask_token_id": MASK, "gen_length": 12, "temperature": 20.0, "seed": 0}
    ids = generate(adapter, [[4, 5]], eos_token_id=2, **options).tokens[0, 2:].tolist()
    assert len(set(ids)) > 6
    assert min(ids) > 2
    middle = ids[5]
    at = ids.index(middle)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    named = {"eos_token_id": [2, middle, 126081], "transformers_version": transformers.__version__}
    (tmp_path / "generation_config.json").write_text(json.dumps(named))
    assert load(str(tmp_path), family="bidirectional", device="cpu").options["eos_token_id"] == [2, middle]
    assert load(str(folder), family="bidirectional", device="cpu").options["eos_token_id"] == [2]

    def told(path: Path, *more: str) -> list[str]:
        assert main(arguments(path, "--prompt", "w1 w2", "--temperature", "20", *more)) == 0
        return capsys.readouterr().out.splitlines()[0].split()

    words = [WORDS[i] for i in ids]
    assert told(tmp_path) == words[: at + 1]
    assert told(folder, "--eos-token-id", "2", str(middle)) == words[: at + 1]
    assert told(folder, "--eos-token-id", "0", "1") == words
    stop = " ".join(words[5:7])
    assert told(folder, "--stop", "none", stop) == " ".join(words).partition(stop)[0].split()
    guided = generate(adapter, [[4, 5]], eos_token_id=2, guidance_scale=2.0, **options).tokens[0, 2:].tolist()
    assert told(folder, "--guidance-scale", "2") == [WORDS[i] for i in guided if i > 2]
    last = generate(adapter, [[4, 5]], eos_token_id=middle, eos_last=True, **options).tokens[0, 2:].tolist()
    assert last != generate(adapter, [[4, 5]], eos_token_id=middle, **options).tokens[0, 2:].tolist()
    assert told(folder, "--eos-token-id", str(middle), "--eos-last") == [WORDS[i] for i in last if i > 2]
    line = failure(arguments(folder, "--prompt", "w1", "--guidance-scale", "1", "--cache", "dual"), capsys)
    assert "guidance_scale: goes with cache='none', got 'dual'" in line
    line = failure(arguments(folder, "--prompt", "w1 [MASK]", "--stop", "w3"), capsys)
    assert "stop: goes with text that is continued, not with text that is filled in" in line


def test_what_is_continued_has_128_new_tokens_unless_told_otherwise(folder: Path) -> None:
    checkpoint = load(str(folder), family="bidirectional", device="cpu")
    options = {"policy": "threshold", "tau": 0.0}
    assert decode(checkpoint, ["w1 w2"], **options)[1].tokens.shape == (1, 2 + 128)
    assert decode(checkpoint, ["w1 w2"], gen_length=3, **options)[1].tokens.shape == (1, 2 + 3)


def test_a_suffix_that_no_block_sees(folder: Path) -> None:
    adapter, options = adapt(published.SDARForCausalLM())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    checkpoint = Checkpoint(adapter, tokenizer, options | {"mask_token_id": MASK})
    with pytest.raises(ValueError, match="suffix: SDAR is block-causal, so that no block sees the text"):
        decode(checkpoint, ["w1"], suffixes=["w2"])


def test_remote_code_runs_where_it_is_trusted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = tmp_path / "remote"
    path.mkdir()
    (path / "modeling_tiny.py").write_text(REMOTE)
    names = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyLLaDA"}
    config = {"model_type": "llada", "auto_map": names, "mask_token_id": MASK, "architectures": ["TinyLLaDA"]}
    (path / "config.json").write_text(json.dumps(config))
    save_tokenizer(path)
    command = [
        "generate",
        "--model",
        str(path),
        "--prompt",
        "w1 w2",
        "w3",
        "--gen-length",
        "4",
        "--device",
        "cpu",
    ]
    assert main(command) == 1
    assert "its code comes with the checkpoint; --trust-remote-code runs it" in capsys.readouterr().err
    module = transformers.dynamic_module_utils.get_class_from_dynamic_module(names["AutoModel"], str(path))
    torch.manual_seed(0)
    model = module(module.config_class(mask_token_id=MASK))
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    assert main([*command, "--trust-remote-code"]) == 0
    captured = capsys.readouterr()
    expected = generate(
        *adapt(model.eval())[:1], [[4, 5], [6]], gen_length=4, mask_token_id=MASK, eos_token_id=2
    )
    texts = [" ".join(WORDS[t] for t in row if t > 2) for row in expected.tokens[:, 2:].tolist()]
    assert captured.out.splitlines() == texts
    assert main([*command, "--trust-remote-code", "--cache", "prefix"]) == 1
    assert capsys.readouterr().err.endswith("cache: LLaDA serves 'none', got 'prefix'\n")

    # `attn-sampler eval` decodes the same: the second of these answers is made wrong.
    options = {"gen_length": 4, "mask_token_id": MASK, "eos_token_id": 2, "policy": "confidence"}
    answers = [
        generate(*adapt(model)[:1], [p], **options).tokens[0, len(p) :].tolist() for p in ([4, 5], [6])
    ]
    answers[1][0] += 1
    problems = [{"prompt": p, "answer": a} for p, a in zip(("w1 w2", "w3"), answers, strict=True)]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, problems)))
    command = ["eval", "--model", f"hub:{path}", "--task-file", str(tmp_path / "problems.jsonl")]
    command += ["--rule", "confidence", "--out", str(tmp_path / "results.json")]
    assert main(command) == 1
    assert "--trust-remote-code" in capsys.readouterr().err
    assert main([*command, "--trust-remote-code"]) == 0
    assert "| `confidence` | 4.00 | 50.0 |" in capsys.readouterr().out


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a run that cannot be made."""
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    return lines[0]


def test_a_checkpoint_that_is_not_to_be_had(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["generate", "--prompt", "w1", "--model"]
    assert failure([*command, "/no/such"], capsys) == "attn-sampler: /no/such: no such folder"
    assert failure([*command, str(tmp_path)], capsys).startswith(f"attn-sampler: cannot load {tmp_path}: ")
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # as where there is no network
    line = failure([*command, "GSAI-ML/LLaDA-8B-Instruct"], capsys)
    assert line.startswith("attn-sampler: cannot load GSAI-ML/LLaDA-8B-Instruct: ")
    assert line.endswith(" (no folder here is called so: it was sought on the Hub)")


def test_a_folder_without_weights(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert "no file named model.safetensors" in failure(arguments(tmp_path, "--prompt", "w1"), capsys)


@pytest.mark.parametrize("device", ["cuda:99", "none-such"])
def test_a_device_that_is_not_there(folder: Path, device: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = failure(arguments(folder, "--prompt", "w1", "--device", device), capsys)
    assert f"device: expected a device that torch can use here, got '{device}' (" in line
    with pytest.raises(SystemExit, match="2"):
        main(["eval", "--device", device, "--problems", "1"])
    assert f"error: --device: expected a device that torch can use here, got '{device}' (" in (
        capsys.readouterr().err
    )


def test_eval_calls_a_checkpoint_as_its_adapter_says(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "problems.jsonl").write_text('{"prompt": "w1 w2", "answer": "w3 w4"}')
    command = ["eval", "--model", f"hub:{folder}", "--task-file", str(tmp_path / "problems.jsonl")]
    command += ["--rule", "confidence"]
    assert "none that is known here; --adapter names" in failure(command, capsys)
    out = tmp_path / "results.json"
    assert main([*command, "--adapter", "bidirectional", "--out", str(out)]) == 0
    assert "| `confidence` | 2.00 |" in capsys.readouterr().out
    assert f'"hub:{folder} as bidirectional"' in out.read_text()


def test_an_unknown_family_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = failure(["generate", "--model", str(folder), "--prompt", "w1"], capsys)
    assert f"{folder}: its model_type 'llama' is none that is known here; --adapter names" in line
    assert "llada, dream, fast-dllm-v2, llada2, sdar, masked-lm, bidirectional" in line


def test_a_mask_token_that_the_tokenizer_lacks(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--prompt", "w1", "--mask-token-id", "126336"]
    line = failure(arguments(folder, *more), capsys)
    assert (
        line == f"attn-sampler: {folder}: its tokenizer has no token 126336, which was to be the mask token"
    )
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_tokenizer(tmp_path, mask=False)
    line = failure(arguments(tmp_path, "--prompt", "w1"), capsys)
    assert "neither its config nor its tokenizer names a mask token; --mask-token-id does" in line


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--layers", "2"], "layers: (2,) does not fit the 2 attention calls of the model"),
        (["--attention", "eager"], "saw no call of torch.nn.functional.scaled_dot_product_attention"),
        (["--attention", "none_such"], 'Specified `attn_implementation="none_such"` is not supported'),
    ],
)
def test_attention_that_cannot_be_read(
    folder: Path, given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in failure(arguments(folder, "--prompt", "w1", *given), capsys)


def test_versions(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert untested_version("engine", "5.24.9.dev0", "5.24", "5.25") is None
    assert untested_version("engine", "0.10", "0.9", "1.0") is None
    assert untested_version("engine", "0.5.23.post1", "0.5.23", "0.6") is None
    assert untested_version("engine", "0.5.22", "0.5.23", "0.6") is not None
    assert untested_version("engine", "0.6rc1", "0.5.23", "0.6") is not None
    for version in ("5.23.0", "4.57.1", "5.25", "6.0.0"):
        message = f"engine {version} is outside the tested range, 5.24 to below 5.25"
        assert untested_version("engine", version, "5.24", "5.25") == message
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "5.99.0")
    line = failure(arguments(folder, "--prompt", "w1"), capsys)
    assert line == (
        "attn-sampler: transformers 5.99.0 is outside the tested range, 5.24 to below 5.25; "
        "--any-version tries it"
    )
    assert main(arguments(folder, "--prompt", "w1", "--any-version")) == 0

    def missing(_: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    capsys.readouterr()
    monkeypatch.setattr(importlib.metadata, "version", missing)
    line = failure(arguments(folder, "--prompt", "w1"), capsys)
    assert line == (
        "attn-sampler: transformers is not installed; pip install 'attn_sampler[transformers]' brings it"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--prompt", "w"], "required: --model"),
        (["--model", "m"], "required: --prompt"),
        (
            ["--model", "m", "--prompt", "w", "--gen-length", "-1"],
            "argument --gen-length: expected an integer from 0",
        ),
        (
            ["--model", "m", "--prompt", "w", "v", "u", "--suffix", "a", "b"],
            "argument --suffix: expected 1 or 3, as there are prompts, got 2",
        ),
        (["--model", "m", "--prompt", "w", "--cache", "all"], "argument --cache: expected one of none"),
        (["--model", "m", "--prompt", "w", "--cache", "sparse:budget=0"], "--cache: budget: expected"),
        (["--model", "m", "--prompt", "w", "--adapter", "gpt"], "argument --adapter: invalid choice: 'gpt'"),
        (
            ["--model", "m", "--prompt", "w", "--tau", "0.5", "--policy", "confidence"],
            "argument --tau: the rule confidence does not read it",
        ),
    ],
)
def test_bad_arguments_are_named(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["generate", *given])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
