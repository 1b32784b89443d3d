"""Masked language models: transformers' own classes with random weights, alone and by the command."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the models are its classes")

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

import attn_sampler.adapters.transformers  # noqa: F401
from attn_sampler import AttentionCapture, generate
from attn_sampler.adapters.models import FAMILIES, WHOLE_TEXT, MaskedLM, adapt
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
