"""Masked language models: transformers' own classes with random weights, alone and by the command."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the models are its classes")

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

import attn_sampler.adapters.transformers  # noqa: F401
from attn_sampler import AttentionCapture, generate
from attn_sampler.adapters.models import FAMILIES, WHOLE_TEXT, MaskedLM, adapt
from attn_sampler.adapters.run import LoadError, decode, load
from attn_sampler.cli import main
from attn_sampler.command_line import cpu_threads
from attn_sampler.sampler import POLICIES, make_policy

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
WORDS = [*SPECIAL, *(f"w{i}" for i in range(24)), "[MASK]"]
MASK, VOCAB = len(WORDS) - 1, len(WORDS) + 4  # four more rows than the tokenizer has tokens
LAYERS = 3

#: Configs beyond model_type: what differs inside one class.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in FAMILIES["masked-lm"].model_types},
    "esm": ("esm", {"position_embedding_type": "rotary", "token_dropout": True, "mask_token_id": MASK}),
    "esm-absolute": ("esm", {"position_embedding_type": "absolute", "mask_token_id": MASK}),
    "modernbert": ("modernbert", {"local_attention": 4}),  # layers 1 and 2 see two positions to each side
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with cpu_threads(1):  # for models this small more only wait for each other
        yield


def build(name: str, attention: str = "attn_sampler", **more: Any) -> Any:
    model_type, options = VARIANTS[name]
    sizes = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 24, "initializer_range": 0.4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = transformers.AutoConfig.for_model(
        model_type, **{"vocab_size": VOCAB, **sizes, **ids, **options, **more}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForMaskedLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():  # biases and position tables are not all 0 then
        torch.nn.init.normal_(parameter, std=0.4) if parameter.dim() == 1 else None
    return model.eval()


def with_attention(model: Any, attention: str) -> Any:
    """The same weights under another attention."""
    config = copy.deepcopy(model.config)
    other = transformers.AutoModelForMaskedLM.from_config(config, attn_implementation=attention)
    other.load_state_dict(model.state_dict())
    return other.to(next(model.parameters()).dtype).eval()


def padded(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens [2, 13] with masked ones among them, and which are none of padding: the last 8 of row 1."""
    tokens = torch.randint(4, MASK, (2, 13), generator=torch.Generator().manual_seed(seed))
    tokens[:, [0, 5]], tokens[:, [7, 10]], tokens[:, -1] = 1, MASK, 2
    visible = torch.ones_like(tokens, dtype=torch.bool)
    visible[1, :5] = False
    return tokens, visible


def test_the_family_and_its_facts() -> None:
    assert set(FAMILIES["masked-lm"].model_types) <= MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys()
    assert not any(
        set(FAMILIES["masked-lm"].model_types) & set(family.model_types)
        for name, family in FAMILIES.items()
        if name != "masked-lm"
    )
    adapter, options = adapt(build("esm"))
    assert type(adapter) is MaskedLM
    assert options == {"mask_token_id": MASK, "block_length": WHOLE_TEXT, "logit_shift": False}
    assert adapt(build("bert"))[1] == {"block_length": WHOLE_TEXT, "logit_shift": False}


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_a_padded_row_has_the_logits_that_it_has_alone(name: str) -> None:
    model = build(name)
    adapter, _ = adapt(model, suppressed_token_ids=range(4))
    tokens, visible = padded()
    adapter.check_padding(tokens.device)
    batch = adapter(tokens, attention_mask=visible)
    alone = adapter(tokens[1:, 5:])
    torch.testing.assert_close(batch[1:, 5:], alone, rtol=1e-5, atol=1e-5)
    own = model(tokens[1:, 5:]).logits  # as a call without any of the adapter's options gives them
    torch.testing.assert_close(alone[..., 4:], own[..., 4:], rtol=1e-5, atol=1e-5)
    assert own[0, :, 4:].std() > 0.1

    prompts = [tokens[0].tolist(), tokens[1, 5:].tolist()]
    options: dict[str, Any] = {"mask_token_id": MASK, "block_length": WHOLE_TEXT, "policy": "attn"}
    both = generate(adapter, prompts, **options)
    for i, prompt in enumerate(prompts):
        one = generate(adapter, [prompt], **options)
        assert both.tokens[i, both.attention_mask[i]].tolist() == one.tokens[0].tolist()
        assert MASK not in one.tokens
        assert both.num_forward_passes[i] == one.num_forward_passes[0]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["attn_sampler", "sdpa"])
@pytest.mark.parametrize("name", VARIANTS)
def test_scores_are_the_attentions_of_eager(name: str, attention: str) -> None:
    """Every layer counts, and what padding hides or a local layer does not reach does not."""
    # In float64 transformers' eager ModernBERT is NaN at padding that a local layer hides from itself.
    model = build(name, attention).to(torch.float32 if name == "modernbert" else torch.float64)
    tokens, visible = padded()
    adapter, _ = adapt(model)
    with AttentionCapture(query_mask=visible) as capture:
        logits = adapter(tokens, attention_mask=visible)
    assert capture.num_calls == LAYERS
    seen: list[Tensor] = []  # [B, H, M, N] of each layer
    eager = with_attention(model, "eager")

    def call(*given: Any, **options: Any) -> Any:
        output = model_forward(*given, output_attentions=True, **options)
        seen.extend(output.attentions)
        return output

    reference = adapt(eager)[0]
    model_forward, eager.forward = eager.forward, call
    expected = reference(tokens, attention_mask=visible)
    torch.testing.assert_close(logits[visible], expected[visible], rtol=1e-4, atol=1e-4)
    weights = torch.stack(seen).double()  # [L, B, H, M, N]
    assert len(weights) == LAYERS
    assert (weights[:, 1, :, 5:, :5] == 0).all()
    if name == "modernbert":
        local = weights[1:, 0].sum(dim=(0, 1))  # [M, N]
        far = (torch.arange(13)[:, None] - torch.arange(13)).abs() > 2
        assert (local[far] == 0).all()
        assert (local[~far] > 0).all()
    columns = (weights * visible[None, :, None, :, None]).sum(dim=(0, 2, 3))  # [B, N]
    torch.testing.assert_close(capture.scores.double(), columns, rtol=1e-4, atol=1e-4)
    assert columns.std() > 0.1


@torch.no_grad()
def test_special_tokens_are_never_predicted_and_the_model_keeps_its_logits() -> None:
    model = build("bert")
    model.cls.predictions.bias[:4], model.cls.predictions.bias[-4:] = 100.0, 100.0
    kept: list[Tensor] = []
    model.register_forward_hook(lambda *given: kept.append(given[-1].logits))
    tokens, _ = padded()
    suppressed = [*range(4), *range(MASK + 1, VOCAB)]
    adapter, options = adapt(model, suppressed_token_ids=suppressed)
    logits = adapter(tokens)
    assert (logits[..., suppressed] == -torch.inf).all()
    others = sorted(set(range(VOCAB)) - set(suppressed))
    assert torch.equal(logits[..., others], kept[0][..., others])
    assert kept[0][..., suppressed].isfinite().all()

    filled = generate(adapter, tokens, mask_token_id=MASK, policy="confidence", **options).tokens
    assert set(filled[tokens == MASK].tolist()) <= set(others) - {MASK}
    default, _ = adapt(model)  # of what this config names: [PAD], [CLS] and [SEP]
    assert (default(tokens) == -torch.inf).any(dim=1)[0].nonzero().squeeze(1).tolist() == [0, 1, 2]
    nothing, _ = adapt(model, suppressed_token_ids=[])
    assert torch.equal(nothing(tokens), kept[-1])


def test_every_rule_decodes() -> None:
    adapter, options = adapt(build("modernbert"), suppressed_token_ids=range(4))
    tokens, visible = padded()
    for name in POLICIES:
        if make_policy(name).shadows:
            with pytest.raises(TypeError, match="policy: needs a model with forward_shadow, got MaskedLM"):
                generate(adapter, tokens, mask_token_id=MASK, policy=name, **options)
            continue
        result = generate(adapter, tokens, attention_mask=visible, mask_token_id=MASK, policy=name, **options)
        assert torch.equal(result.tokens[tokens != MASK], tokens[tokens != MASK]), name
        assert (result.tokens[tokens == MASK] >= 4).all(), name
        assert (result.tokens[tokens == MASK] < VOCAB).all(), name
        assert MASK not in result.tokens, name


@pytest.mark.parametrize(("name", "longest"), [("bert", 24), ("roberta", 23), ("esm-absolute", 23)])
def test_texts_longer_than_the_table_of_positions(name: str, longest: int) -> None:
    model = build(name)
    adapter, options = adapt(model)
    passes: list[int] = []
    model.register_forward_pre_hook(
        lambda _, given, keywords: passes.append(given[0].shape[1]), with_kwargs=True
    )
    options |= {"mask_token_id": MASK, "gen_length": 2, "policy": "left-to-right"}
    message = rf"at most {longest} tokens, .* \(max_position_embeddings\), got {longest + 1}, those to fill"
    with pytest.raises(ValueError, match=message):
        generate(adapter, [[5] * (longest - 1)], **options)
    assert passes == []
    tokens = generate(adapter, [[5] * (longest - 2)], **options).tokens
    assert tokens.shape == (1, longest)
    assert MASK not in tokens
    # A row may be longer by its padding alone.
    visible = torch.ones(1, longest + 4, dtype=torch.bool)
    visible[:, :4] = False
    with torch.no_grad():
        wide = adapter(torch.nn.functional.pad(tokens, (4, 0)), attention_mask=visible)
        torch.testing.assert_close(wide[:, 4:], adapter(tokens), rtol=1e-5, atol=1e-5)


def test_models_and_tokens_that_are_refused() -> None:
    model = build("bert")
    with pytest.raises(ValueError, match=rf"suppressed_token_ids: expected an integer in \[0, {VOCAB}\)"):
        adapt(model, suppressed_token_ids=[VOCAB])
    with pytest.raises(TypeError, match="suppressed_token_ids: expected an integer, got str"):
        adapt(model, suppressed_token_ids=["[PAD]"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="suppressed_token_ids: expected none with the family llada"):
        adapt(model, "llada", suppressed_token_ids=[1])
    with pytest.raises(ValueError, match="model: BertModel predicts no tokens; AutoModelForMaskedLM loads"):
        adapt(transformers.BertModel(model.config))
    model.config.is_decoder = True
    with pytest.raises(ValueError, match="model: BertForMaskedLM attends causally, as is_decoder"):
        adapt(model)
    model.config.model_type = "deberta-v2"
    with pytest.raises(ValueError, match=r"family: expected one of .*, got model_type 'deberta-v2'"):
        adapt(model)


@pytest.mark.parametrize("policy", ["attn", "dawn"])
def test_eager_attention_shows_no_scores(policy: str) -> None:
    adapter, options = adapt(build("albert", "eager"))
    tokens, _ = padded()
    options |= {"mask_token_id": MASK}
    with pytest.raises(RuntimeError, match="'eager' in transformers, whose 'sdpa' is seen"):
        generate(adapter, tokens, policy=policy, **options)
    assert MASK not in generate(adapter, tokens, policy="confidence", **options).tokens


# --- the command -------------------------------------------------------------------------------------------


def save(path: Path, name: str = "bert", tokens: list[str] = WORDS, **more: Any) -> Path:
    """A checkpoint that likes special tokens, and those that its tokenizer does not have, best."""
    model = build(name, "sdpa", **more)
    (bias,) = (x for x in model.parameters() if x.shape == (VOCAB,))
    with torch.no_grad():
        bias[:4], bias[MASK + 1 :] = 100.0, 100.0
    model.save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(name, tokens.index(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "unk", "mask")}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("bert"))


def command(folder: Path, *more: str) -> list[str]:
    return ["generate", "--model", str(folder), "--device", "cpu", *more]


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a run that cannot be made."""
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    return captured.err


def test_the_command_fills_in_masked_tokens(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["w1 [MASK] w3[MASK]", "[MASK] w7 w8 w9 w10"]
    trace = tmp_path / "trace.json"
    assert main(command(folder, "--prompt", *prompts, "--trace", str(trace), "--tau", "0.5")) == 0
    captured = capsys.readouterr()
    model = transformers.BertForMaskedLM.from_pretrained(folder, attn_implementation="attn_sampler").eval()
    unwanted = [*range(4), *range(MASK + 1, VOCAB)]
    adapter, options = adapt(model, suppressed_token_ids=unwanted)
    ids = [[1, 5, MASK, 7, MASK, 2], [1, MASK, 11, 12, 13, 14, 2]]
    expected = generate(adapter, ids, mask_token_id=MASK, tau=0.5, **options)
    rows = [expected.tokens[0, 2:-1].tolist(), expected.tokens[1, 1:-1].tolist()]
    assert all(4 <= token < MASK for row in rows for token in row)
    assert captured.out.splitlines() == [" ".join(WORDS[token] for token in row) for row in rows]
    assert f"{expected.num_forward_passes.tolist()} forward passes" in captured.err
    blocks = {(c["sequence"], c["position"]) for c in json.loads(trace.read_text())["commits"]}
    assert blocks == {(0, 3), (0, 5), (1, 1)}


def test_a_length_and_a_suffix_are_masked_tokens_inside_the_special_ones(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def out(*more: str) -> str:
        assert main(command(folder, *more)) == 0
        return capsys.readouterr().out

    typed = out("--prompt", "w1 [MASK][MASK][MASK] w4 w5", "w2 w3 [MASK][MASK][MASK] w4 w5")
    assert out("--prompt", "w1", "w2 w3", "--gen-length", "3", "--suffix", "w4 w5") == typed
    first, second = typed.splitlines()
    assert first.startswith("w1 ")
    assert second.endswith(" w4 w5")
    assert (len(first.split()), len(second.split())) == (6, 7)
    each = out("--prompt", "w1", "w2", "--gen-length", "2", "--suffix", "w4", "w5 w6")
    assert each == out("--prompt", "w1[MASK][MASK]w4", "w2[MASK][MASK]w5 w6")
    assert out("--prompt", "w1", "--gen-length", "2") == out("--prompt", "w1[MASK][MASK]")
    assert out("--prompt", "w1", "--gen-length", "4", "--block-length", "2", "--policy", "left-to-right")


def test_what_the_command_cannot_fill(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = failure(command(folder, "--prompt", "[MASK] w1", "w2"), capsys)
    assert "prompt 2: expected [MASK] where it is to be filled, or a gen_length > 0" in line
    line = failure(command(folder, "--prompt", "w1", "--gen-length", "22"), capsys)
    assert "at most 24 tokens, as BertForMaskedLM has positions for (max_position_embeddings), got 25" in line
    line = failure(command(folder, "--prompt", "w1", "--gen-length", "2", "--mask-token-id", "6"), capsys)
    assert "does not read 'w2', the text of the mask token, as that token" in line
    line = failure(command(folder, "--prompt", "[MASK]", "--attention", "eager"), capsys)
    assert "attn_implementation='eager' in transformers, whose 'sdpa' is seen" in line
    line = failure(command(folder, "--prompt", "[MASK]", "--policy", "wino"), capsys)
    assert "policy: needs a model with forward_shadow, got MaskedLM" in line
    line = failure(command(folder, "--prompt", "[MASK]", "--cache", "prefix"), capsys)
    assert "cache: MaskedLM serves 'none', 'dual', 'sparse', 'adaptive', got 'prefix'" in line

    path = save(tmp_path / "words", tokens=[*WORDS[:-1], *(f"v{i}" for i in range(9)), "[MASK]"])
    line = failure(command(path, "--prompt", "[MASK]"), capsys)
    assert f"token 37 of the tokenizer is outside the model's vocabulary of {VOCAB}" in line
    path = save(tmp_path / "decoder", is_decoder=True)
    capsys.readouterr()  # what transformers warns of
    line = failure(command(path, "--prompt", "[MASK]"), capsys)
    assert f"{path}: model: BertForMaskedLM attends causally" in line


def test_a_class_whose_attention_nothing_can_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mpnet"
    for file in folder.iterdir():
        if "token" in file.name:
            path.mkdir(exist_ok=True)
            (path / file.name).write_bytes(file.read_bytes())
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MPNetConfig(vocab_size=VOCAB, max_position_embeddings=24, **sizes)
    transformers.MPNetForMaskedLM(config).save_pretrained(path)
    given = command(path, "--prompt", "w1 [MASK] w3")
    line = failure(given, capsys)
    assert "model_type 'mpnet' is none that is known here; --adapter names" in line
    given += ["--adapter", "masked-lm"]
    line = failure(given, capsys)
    assert (
        "MPNetForMaskedLM writes its attention out by hand, so that nothing can read it; --attention" in line
    )
    assert main([*given, "--attention", "eager", "--policy", "confidence"]) == 0
    assert len(capsys.readouterr().out.split()) == 3


@pytest.mark.parametrize("name", ["albert", "roberta", "esm", "distilbert", "modernbert"])
def test_checkpoints_of_other_classes_load(name: str, tmp_path: Path) -> None:
    checkpoint = load(str(save(tmp_path, name)), device="cpu")
    assert checkpoint.options["mask_token_id"] == MASK
    assert checkpoint.options["eos_token_id"] is None
    texts, generation = decode(checkpoint, ["w1", "w5 [MASK] w6"], gen_length=2, suffixes=["w2", ""])
    words = [text.split() for text in texts]
    assert words[0][0] == "w1"
    assert words[0][3:] == ["w2"]
    assert words[1][0] == "w5"
    assert words[1][2] == "w6"
    assert len(words[1]) == 5
    assert all(word in WORDS[4:MASK] for row in words for word in row)
    assert generation.tokens[:, -1].tolist() == [2, 2]  # [SEP] stands behind what was filled in


def test_decode_names_what_is_wrong(folder: Path) -> None:
    checkpoint = load(str(folder), device="cpu")
    with pytest.raises(ValueError, match="suffix: expected one for each of 1 prompts, got 2"):
        decode(checkpoint, ["w1"], gen_length=1, suffixes=["w2", "w3"])
    with pytest.raises(ValueError, match="prompt 1: expected "):
        decode(checkpoint, ["w1"])
    with pytest.raises(LoadError, match="no such folder"):
        load("/no/such")
