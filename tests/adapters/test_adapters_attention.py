"""What an attention is asked for beside a mask, by transformers and by remote code: known, or refused."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="these are tests of what its models ask for")

import transformers
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils.generic import TransformersKwargs

from attn_sampler import AttentionCapture
from attn_sampler.adapters import transformers as adapter
from attn_sampler.adapters.remote_code import reported_flash_attention

#: What changes an attention, and is in no mask that it is given.
REFUSED = (
    *("softcap", "position_bias", "s_aux", "sinks", "indices", "block_indices", "output_attentions"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
)
FORWARDS = (adapter.attention_forward, adapter.flash_attention_forward, adapter.flex_attention_forward)
Q, K = (torch.randn(1, h, 5, 8, generator=torch.Generator().manual_seed(h)) for h in (4, 2))


@pytest.fixture(autouse=True)
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub of flash-attn 2."""
    module = types.ModuleType("flash_attn")
    module.flash_attn_func = attend
    monkeypatch.setitem(sys.modules, "flash_attn", module)


def attend(  # type: ignore[no-untyped-def]
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
) -> Any:  # fmt: skip
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    logits = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    output = (logits.softmax(dim=-1) @ v).transpose(1, 2)
    return (output, logits.logsumexp(dim=-1), None) if return_attn_probs else output


def keywords_of_models() -> set[str]:
    """The keywords with which the models of the installed transformers call their attention."""
    found = set()
    folder = Path(inspect.getfile(transformers)).parent / "models"
    for file in folder.glob("*/modeling_*.py"):
        text = file.read_text(encoding="utf-8")
        for match in re.finditer(r"\battention_interface\(", text):
            depth, end = 1, match.end()
            while depth:
                depth += {"(": 1, ")": -1}.get(text[end], 0)
                end += 1
            call = ast.parse("f(" + text[match.end() : end], mode="eval").body
            assert isinstance(call, ast.Call)
            found |= {keyword.arg for keyword in call.keywords if keyword.arg is not None}
    return found


def test_every_keyword_of_transformers_is_known() -> None:
    asked = keywords_of_models() | set(TransformersKwargs.__annotations__)
    asked |= set(FlashAttentionKwargs.__annotations__)
    for forward in (sdpa_attention_forward, flex_attention_forward, flash_attention_forward):
        asked |= set(inspect.signature(forward).parameters)
    parameters = set(inspect.signature(adapter.attention_forward).parameters) - {"keywords"}
    assert asked - {"kwargs"} - parameters - adapter._PLAIN == set(REFUSED)
    assert {"s_aux", "softcap", "dropout", "sliding_window"} <= asked


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("name", [*REFUSED, "anything"])
def test_what_is_not_served_is_refused_by_name(name: str, forward: Callable[..., Any]) -> None:
    module = torch.nn.Module()
    forward(module, Q, K, K, None, is_causal=False, **{name: None})
    for value in (torch.zeros(4), 30.0, True):
        with pytest.raises(NotImplementedError, match=f"attention with {name} is not served"):
            forward(module, Q, K, K, None, is_causal=False, **{name: value})


@pytest.mark.parametrize("forward", FORWARDS)
def test_what_leaves_an_attention_as_it_is(forward: Callable[..., Any]) -> None:
    plain = dict.fromkeys(adapter._PLAIN, 7) | {"position_ids": torch.arange(5)[None], "use_cache": True}
    module = torch.nn.Module()
    expected, got = (forward(module, Q, K, K, None, is_causal=False, **given)[0] for given in ({}, plain))
    assert torch.equal(got, expected)


def test_packed_sequences_are_refused() -> None:
    """transformers tells flash-attn of them by position_ids alone; other masks know of them."""
    module, packed = torch.nn.Module(), torch.tensor([[0, 1, 2, 0, 1]])
    for layer in (0, 1):
        module.layer_idx = layer  # type: ignore[assignment]
        call = {"is_causal": False, "position_ids": torch.arange(7, 12)[None]}
        adapter.flash_attention_forward(module, Q, K, K, None, **call)
    module.layer_idx = 0  # type: ignore[assignment]
    with pytest.raises(NotImplementedError, match="attn_sampler_fa2: attention with packed position_ids"):
        adapter.flash_attention_forward(module, Q, K, K, None, **(call | {"position_ids": packed}))


@pytest.mark.parametrize(("kind", "name"), [("Gemma2", "softcap"), ("GptOss", "s_aux")])
def test_models_whose_attention_is_not_served(kind: str, name: str) -> None:
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1} if kind == "GptOss" else {}
    config = getattr(transformers, f"{kind}Config")(**sizes, **experts)
    for attention in ("attn_sampler", "attn_sampler_fa2", "attn_sampler_flex"):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
        with (
            pytest.raises(NotImplementedError, match=f"attention with {name} is not served"),
            torch.no_grad(),
        ):
            model(torch.arange(6)[None])


@pytest.mark.parametrize(
    "asked", [{"window_size": (2, 2)}, {"softcap": 30.0}, {"alibi_slopes": torch.zeros(4)}, {"other": 1}]
)
def test_flash_attn_of_remote_code(asked: dict[str, Any]) -> None:
    """Refused where a capture is open, which would be told of another attention."""
    module = types.ModuleType("remote")
    module.flash_attn_func = attend  # type: ignore[attr-defined]
    q, k = (x.transpose(1, 2) for x in (Q, K))
    plain = {"window_size": (-1, -1), "softcap": 0.0, "alibi_slopes": None, "deterministic": True}
    with reported_flash_attention(module):
        if "other" not in asked:
            module.flash_attn_func(q, k, k, **asked)  # type: ignore[attr-defined]
        with AttentionCapture() as capture:
            module.flash_attn_func(q, k, k, **plain)  # type: ignore[attr-defined]
            with pytest.raises(NotImplementedError, match=f"with {next(iter(asked))}: expected "):
                module.flash_attn_func(q, k, k, **asked)  # type: ignore[attr-defined]
    weights: Tensor = (Q @ K.repeat_interleave(2, dim=1).transpose(2, 3) * 8**-0.5).softmax(dim=-1)
    torch.testing.assert_close(capture.scores, weights.sum(dim=(1, 2)), rtol=1e-5, atol=1e-5)
