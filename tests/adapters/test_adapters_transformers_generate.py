"""``generate`` of transformers, attention-guided: its own classes, small and random."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", "5.24")

from transformers import (
    BertConfig,
    BertForMaskedLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)
from transformers.generation import (
    LogitsProcessorList,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

import attn_sampler
from attn_sampler.adapters.models import Bidirectional
from attn_sampler.adapters.transformers import make_bidirectional
from attn_sampler.adapters.transformers_generate import attn_generate, generate

VOCAB, MASK, PAD, EOS = 40, 39, 0, 2
OPTIONS: dict[str, Any] = {"mask_token_id": MASK, "block_length": 4}
PROMPTS = torch.tensor([[5, 7, 21, 9, 11], [4, 8, 30, 13, 17]])
WAYS = ["custom_generate", "function"]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=EOS,
        attn_implementation="attn_sampler",
    )
    llama: Any = LlamaForCausalLM(config).eval()
    for parameter in llama.parameters():
        parameter.data.mul_(6.0 if parameter.dim() > 1 else 1.0)
    return make_bidirectional(llama)


def call(model: Any, way: str, input_ids: Tensor = PROMPTS, **keywords: Any) -> Any:
    keywords = OPTIONS | keywords
    if way == "function":
        return generate(model, input_ids, **keywords)
    return model.generate(input_ids, custom_generate=attn_generate, **keywords)


def expected(model: Any, prompts: Tensor = PROMPTS, **options: Any) -> Tensor:
    return attn_sampler.generate(Bidirectional(model), prompts, **(OPTIONS | options)).tokens


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("keywords", "options"),
    [
        ({"tau": 0.05}, {"tau": 0.05}),
        ({"policy": "entropy", "eos_token_id": None}, {"policy": "entropy"}),
        ({"suppress_tokens": [29, 33], "tau": 0.1}, {"suppress_token_ids": [29, 33], "tau": 0.1}),
        ({"sequence_bias": {(12,): 5.0}}, {"logit_bias": {12: 5.0}}),
        ({"guidance_scale": 2.5}, {"guidance_scale": 1.5}),
        ({"do_sample": True, "top_k": 0, "seed": 3, "temperature": 1.5}, {"seed": 3, "temperature": 1.5}),
        (
            {"do_sample": True, "seed": 3, "temperature": 2.5, "top_k": 5, "top_p": 0.7, "min_p": 0.1},
            {"seed": 3, "temperature": 2.5, "top_k": 5, "top_p": 0.7, "min_p": 0.1},
        ),
        ({"do_sample": True, "seed": 3, "temperature": 9.0, "top_p": 0.0}, {}),
        ({"top_k": 3, "top_p": 0.5, "min_p": 0.2}, {}),  # which a greedy configuration does not read
        ({"decoder_cache": "prefix", "renormalize_logits": True, "top_p": 0.5}, {"cache": "prefix"}),
    ],
)
def test_the_tokens_are_those_of_the_library(
    model: Any, way: str, keywords: dict[str, Any], options: dict[str, Any]
):
    eos = {} if "eos_token_id" in keywords else {"eos_token_id": EOS}
    tokens = call(model, way, max_new_tokens=8, **keywords)
    whole = expected(model, gen_length=8, **eos, **options)
    assert tokens.tolist() == whole[:, : tokens.shape[1]].tolist()
    assert tokens.shape[1] == whole.shape[1] or (whole == EOS).any(dim=1).all()


@pytest.mark.parametrize("way", WAYS)
def test_padded_prompts(model: Any, way: str):
    padded = torch.tensor([[PAD, PAD, 5, 7, 21], [4, 8, 30, 13, 17]])
    mask = (padded != PAD).long()
    tokens = call(model, way, padded, attention_mask=mask, max_new_tokens=4)
    alone = [call(model, way, padded[i : i + 1, start:], max_new_tokens=4) for i, start in ((0, 2), (1, 0))]
    assert tokens[:, -4:].tolist() == torch.cat([each[:, -4:] for each in alone]).tolist()


@pytest.mark.parametrize("way", WAYS)
def test_the_end_of_a_text_is_padded_and_nothing_is_longer_than_the_longest(model: Any, way: str):
    options = {"seed": 4, "temperature": 3.0}
    whole = expected(model, gen_length=8, **options)
    ends = {int(whole[0, 6]), int(whole[1, 9])}
    pad = next(token for token in range(VOCAB) if token not in whole)
    options |= {"do_sample": True, "top_k": 0, "eos_token_id": sorted(ends), "pad_token_id": pad}
    tokens = call(model, way, max_new_tokens=8, **options)
    assert (tokens == pad).any()
    for row, reference in zip(tokens.tolist(), whole.tolist(), strict=True):
        first = next(i for i, token in enumerate(reference) if i >= 5 and token in ends)
        assert row[: first + 1] == reference[: first + 1]
        assert set(row[first + 1 :]) <= {pad}
    last = [max(i for i, token in enumerate(row) if token != pad) for row in tokens.tolist()]
    assert len(set(last)) == 2
    assert max(last) == tokens.shape[1] - 1


def test_stop_strings_end_a_text(model: Any):
    """``generate`` of transformers gives no tokenizer to a custom_generate: ``stop`` and ``decode`` there."""
    whole = expected(model, gen_length=8)
    third = int(whole[0, 7])
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)) + " ", mask_token_id=None)
    one = call(
        model, "function", PROMPTS[:1], max_new_tokens=8, stop_strings=f"{third} ", tokenizer=tokenizer
    )
    stop = {"stop": [f"{third} "], "decode": tokenizer.decode}
    other = call(model, "custom_generate", PROMPTS[:1], max_new_tokens=8, **stop)
    assert one.tolist() == other.tolist()
    assert one[0, -1] == third
    assert third not in one[0, 5:-1].tolist()
    with pytest.raises(ValueError, match="stop_strings: expected a tokenizer"):
        call(model, "function", max_new_tokens=8, stop_strings=["x"])


@pytest.mark.parametrize("way", WAYS)
def test_scores_are_those_of_the_pass_that_filled_a_position(model: Any, way: str):
    options = {
        "max_new_tokens": 8,
        "return_dict_in_generate": True,
        "eos_token_id": None,
        "policy": "confidence",
    }
    output = call(model, way, output_scores=True, output_logits=True, **options)
    assert isinstance(output, GenerateDecoderOnlyOutput)
    assert len(output.scores) == 8
    assert output.num_forward_passes.tolist() == [8, 8]
    scores = torch.stack(output.scores, dim=1)
    scores[..., MASK] = -torch.inf
    assert scores.argmax(dim=-1).tolist() == output.sequences[:, 5:].tolist()
    # The last position of the last block was filled from a pass that saw all others.
    event: list[Any] = []
    attn_sampler.generate(
        Bidirectional(model), PROMPTS, gen_length=8, policy="confidence", on_step=event.append, **OPTIONS
    )
    last = event[-1].result
    place = last.selected[0].nonzero()[0, 0] + 4
    tokens = output.sequences.clone()
    tokens[0, 5 + place] = MASK
    torch.testing.assert_close(output.logits[place][0], model(tokens[:1]).logits[0, 5 + place])
    assert call(model, way, **options).scores is None
    warm = call(model, way, output_scores=True, do_sample=True, temperature=2.0, top_k=0, seed=1, **options)
    cold = call(model, way, output_logits=True, do_sample=True, temperature=2.0, top_k=0, seed=1, **options)
    torch.testing.assert_close(torch.stack(warm.scores) * 2.0, torch.stack(cold.logits))


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.3}, {"top_k": 9, "top_p": 0.7, "min_p": 0.2}]
)
def test_what_may_be_drawn_is_what_transformers_leaves(model: Any, filters: dict[str, Any]):
    """50 tokens by default: beyond that, ``scores`` are those of transformers' own filters."""
    output = call(
        model,
        "custom_generate",
        max_new_tokens=8,
        do_sample=True,
        temperature=3.0,
        seed=5,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **filters,
    )
    scores, logits = torch.stack(output.scores, dim=1), torch.stack(output.logits, dim=1)
    logits[..., MASK] = -torch.inf
    config = GenerationConfig(do_sample=True, temperature=3.0, **({"top_k": 50} | filters))
    warpers = model._get_logits_processor(config)
    assert len(warpers) == 2 + len(filters) - ("top_k" in filters)
    own = warpers(PROMPTS, logits.flatten(0, 1)).view_as(scores)
    torch.testing.assert_close(scores, own)
    drawn = output.sequences[:, PROMPTS.shape[1] :, None]
    assert scores.gather(-1, drawn).isfinite().all()
    assert MASK not in output.sequences


def test_fifty_tokens_are_drawn_from_by_default():
    from attn_sampler.adapters import transformers_generate as module

    config = module._with_defaults(GenerationConfig(do_sample=True))
    assert module._draws(config) == {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
    config = module._with_defaults(GenerationConfig(do_sample=True, top_k=0, temperature=0.5, min_p=0.1))
    assert module._draws(config) == {"temperature": 0.5, "top_k": 0, "top_p": 1.0, "min_p": 0.1}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_drawn_follows_set_seed(model: Any, way: str):
    drawn = []
    for seed in (1, 1, 2):
        set_seed(seed)
        keywords = {"do_sample": True, "top_k": 0, "temperature": 3.0, "num_return_sequences": 2}
        drawn.append(call(model, way, max_new_tokens=8, eos_token_id=None, **keywords).tolist())
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 4
    assert drawn[0][0] != drawn[0][1]


def test_a_configuration_of_one_s_own_and_the_model_s(model: Any):
    config = GenerationConfig(max_new_tokens=4, eos_token_id=None, do_sample=False)
    for way in WAYS:
        assert call(model, way, generation_config=config).tolist() == expected(model, gen_length=4).tolist()
    assert call(model, "function", max_length=9, eos_token_id=None).shape == (2, 9)
    assert generate(model, PROMPTS, config, **OPTIONS, max_new_tokens=2).shape == (2, 7)
    assert config.max_new_tokens == 4


def test_negative_prompts(model: Any):
    away = PROMPTS.flip(1)
    options = {"max_new_tokens": 4, "guidance_scale": 3.0, "eos_token_id": None, "negative_prompt_ids": away}
    mine = expected(model, gen_length=4, guidance_scale=2.0, unconditional_prompt_ids=away)
    for way in WAYS:
        assert call(model, way, **options).tolist() == mine.tolist()


def test_masks_of_a_prompt_are_filled_by_models_without_generate():
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=32,
        pad_token_id=PAD,
    )
    bert = BertForMaskedLM(config).eval()
    prompt = torch.tensor([[5, MASK, 7, MASK, 9]])
    options = {"tokenizer": SimpleNamespace(mask_token_id=MASK), "policy": "confidence"}
    filled = generate(bert, prompt, token_type_ids=torch.zeros_like(prompt), **options)
    assert (filled != MASK).all()
    assert filled[0, ::2].tolist() == [5, 7, 9]
    with pytest.raises(ValueError, match="mask_token_id: neither given nor known"):
        generate(bert, prompt)
    with pytest.raises(NotImplementedError, match="token_type_ids: expected None"):
        generate(bert, prompt, token_type_ids=torch.ones_like(prompt), **options)


#: Every field of GenerationConfig that is not served, with a value that asks for something.
REFUSED: dict[str, Any] = {
    **{"min_length": 3, "min_new_tokens": 3, "max_time": 1.0, "num_beams": 2, "repetition_penalty": 1.2},
    **{"no_repeat_ngram_size": 2, "bad_words_ids": [[3]], "forced_bos_token_id": 1, "forced_eos_token_id": 2},
    **{"remove_invalid_values": True, "exponential_decay_length_penalty": (2, 1.5), "token_healing": True},
    **{"begin_suppress_tokens": [3], "output_attentions": True, "output_hidden_states": True},
    **{"prompt_lookup_num_tokens": 2, "encoder_repetition_penalty": 1.5, "penalty_alpha": 0.5},
    **{"force_words_ids": [[3]], "dola_layers": "low", "encoder_no_repeat_ngram_size": 2},
}
SAMPLING = {
    "typical_p": 0.5,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
}


@pytest.mark.parametrize("name", [*REFUSED, *SAMPLING])
def test_what_is_not_served_is_refused_by_name(model: Any, name: str):
    value = (REFUSED | SAMPLING)[name]
    extra = {"do_sample": True} if name in SAMPLING else {}
    with pytest.raises(NotImplementedError, match=f"{name}: expected"):
        call(model, "function", max_new_tokens=4, **(extra | {name: value}))
    if name in SAMPLING:
        with pytest.raises(NotImplementedError, match=f"{name}: expected"):
            call(model, "custom_generate", max_new_tokens=4, **(extra | {name: value}))


def test_what_else_is_refused(model: Any):
    ids = PROMPTS[:1]

    def refused(match: str, way: str = "custom_generate", **keywords: Any) -> None:
        with pytest.raises((NotImplementedError, ValueError), match=match):
            call(model, way, ids, max_new_tokens=4, **keywords)

    refused("sequence_bias: expected biases of single tokens", sequence_bias={(3, 4): 1.0})
    refused(
        "none of your own, got a TemperatureLogits",
        logits_processor=LogitsProcessorList([TemperatureLogitsWarper(2.0)]),
    )
    drawing = {"do_sample": True, "top_k": 0, "logits_processor": LogitsProcessorList([TopKLogitsWarper(3)])}
    refused("none of your own, got a TopKLogits", **drawing)
    refused("none of your own, got a function", stopping_criteria=StoppingCriteriaList([lambda *_: False]))
    refused("none of your own, got a PrefixConstr", prefix_allowed_tokens_fn=lambda *_: [3])
    refused("guidance_scale: expected 1 or more, got 0.5", "function", guidance_scale=0.5)
    refused("go with return_dict_in_generate", "function", output_scores=True)
    kept = {"output_logits": True, "return_dict_in_generate": True}
    refused("output_logits: expected no tokens suppressed", suppress_tokens=[3], **kept)
    refused("inputs_embeds", "function", inputs_embeds=torch.zeros(1, 2, 32))
    refused("synced_gpus", "function", synced_gpus=True)
    refused("family: expected one of", "function", family="other")


def test_every_field_of_the_configuration_is_served_or_refused():
    from attn_sampler.adapters import transformers_generate as module

    known = {*module._SERVED, *module._SAMPLING, *REFUSED, *SAMPLING}
    #: Of assistants, beams and what transformers moved to its hub: refused where they ask for something.
    others = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - known
    config = GenerationConfig()
    defaults = config._get_default_generation_params()
    for name in others:
        asking = GenerationConfig()
        vars(asking)[name] = "asked"
        with pytest.raises(NotImplementedError, match=f"{name}: expected"):
            module._refuse(module._with_defaults(asking), {}, [])
    assert "num_beam_groups" in others or "num_beam_groups" in defaults
