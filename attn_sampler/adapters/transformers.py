"""Attention of Hugging Face transformers 5 that ``AttentionCapture`` sees, with its log-sum-exp.

>>> import attn_sampler.adapters.transformers  # registers the names
>>> model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="attn_sampler")

===================  ==================================================================================
``attn_sampler``     PyTorch's attention; grouped heads and padding reach the kernels as they are
``attn_sampler_fa2``   flash-attn 2 (not installed with this package)
``attn_sampler_flex``  FlexAttention
===================  ==================================================================================

transformers' own ``"sdpa"`` is seen by ``AttentionCapture`` too, with repeated heads and materialised masks;
its ``"eager"``, ``"flash_attention_2"`` and ``"flex_attention"`` are not.

Each refuses by name what a model asks of its attention beside a mask: soft-capped logits, a position bias,
attention sinks, packed sequences, chosen keys, and what it does not know.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import compile_friendly_flex_attention
from transformers.masking_utils import (
    add_offsets_to_mask_function,
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    flash_attention_mask,
    flex_attention_mask,
    padding_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

from attn_sampler.adapters.remote_code import flash_mask, report_attention
from attn_sampler.capture import is_capturing


def make_bidirectional(model: torch.nn.Module) -> torch.nn.Module:
    """Let every position of a causal transformers model see every other, in place; returns it.

    LLaDA, Dream and their kin are Llama and Qwen2 in all but this.
    """
    model.config.is_causal = False  # type: ignore[union-attr]
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False  # type: ignore[assignment]
    return model


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,  # [B, Hq, M, D]
    key: Tensor,  # [B, Hkv, N, D]
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """``"attn_sampler"``: ``F.scaled_dot_product_attention``, whose log-sum-exp an open capture reads.

    Returns
    -------
    output, None
        [B, M, Hq, D], as transformers expects it.

    Raises
    ------
    NotImplementedError
        The model asks for an attention that is not served, by name.
    """
    _refuse(keywords)
    causal = _is_causal(module, is_causal) and attention_mask is None and query.shape[2] > 1
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).contiguous(), None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **keywords: Any,
) -> Tensor | None:
    """The masks of ``"attn_sampler"``: those of sdpa, but padding alone is a key mask [B, 1, 1, N]."""
    if mask_function is bidirectional_mask_function and not keywords.get("use_vmap", False):
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        if padding is None:
            return None
        return padding[:, None, None, kv_offset : kv_offset + kv_length].to(torch.bool)
    return sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **keywords
    )


def flex_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **keywords: Any,
) -> BlockMask | None:
    """The masks of ``"attn_sampler_flex"``: those of flex_attention, but not compiled for the CPU."""
    if torch.device(device).type != "cpu":
        options = {"mask_function": mask_function, "attention_mask": attention_mask, "device": device}
        return flex_attention_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, **options, **keywords
        )
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        mask_function = and_masks(mask_function, padding_mask_function(padding.to(torch.bool)))
    mask_function = add_offsets_to_mask_function(mask_function, q_offset, kv_offset)
    return create_block_mask(mask_function, batch_size, None, q_length, kv_length, device="cpu")


def flash_attention_forward(
    module: torch.nn.Module,
    query: Tensor,  # [B, Hq, M, D]
    key: Tensor,  # [B, Hkv, N, D]
    value: Tensor,
    attention_mask: Tensor | None,  # [B, N], False at padding
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """``"attn_sampler_fa2"``: flash-attn 2, which reports its log-sum-exp to the open captures.

    Raises
    ------
    ImportError
        flash-attn is not installed.
    NotImplementedError
        As ``attention_forward``, and for a sliding window shorter than the keys.
    """
    import flash_attn

    _refuse(keywords)
    if attention_mask is None and _packed(module, keywords.get("position_ids")):
        raise NotImplementedError("attn_sampler_fa2: attention with packed position_ids is not served")
    if sliding_window is not None and sliding_window < key.shape[2]:
        raise NotImplementedError("attn_sampler_fa2: a sliding window is not reported to the captures")
    causal = _is_causal(module, is_causal) and query.shape[2] > 1
    options = {"dropout_p": dropout, "softmax_scale": scaling, "causal": causal, "return_attn_probs": True}
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if attention_mask is None:
        output, softmax_lse, _ = flash_attn.flash_attn_func(q, k, v, **options)
    else:
        output, softmax_lse = _without_padding(
            flash_attn.flash_attn_varlen_func, q, k, v, attention_mask, options
        )
    report_attention(
        query, key, softmax_lse, attn_mask=flash_mask(query, key, attention_mask, causal), scale=scaling
    )
    return output, None


def flex_attention_forward(
    module: torch.nn.Module,
    query: Tensor,  # [B, Hq, M, D]
    key: Tensor,  # [B, Hkv, N, D]
    value: Tensor,
    attention_mask: BlockMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """``"attn_sampler_flex"``: FlexAttention, which reports its log-sum-exp to the open captures.

    Compiled on an accelerator; on the CPU, where the compiled kernel returns none, as plain operators.

    Raises
    ------
    NotImplementedError
        As ``attention_forward``, and for dropout or a mask that is no BlockMask.
    """
    from torch.nn.attention.flex_attention import AuxRequest  # of torch 2.9 and newer

    _refuse(keywords)
    if dropout > 0.0 or not (attention_mask is None or isinstance(attention_mask, BlockMask)):
        raise NotImplementedError("attn_sampler_flex: dropout and additive masks are not served")
    options: dict[str, Any] = {"block_mask": attention_mask, "scale": scaling}
    options |= {"enable_gqa": query.shape[1] != key.shape[1], "return_aux": AuxRequest(lse=True)}
    if query.device.type == "cpu":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            output, aux = flex_attention(query, key, value, **options)
    else:
        output, aux = compile_friendly_flex_attention(query, key, value, training=module.training, **options)
    _report_flex(query, key, aux.lse, attention_mask, scaling)
    return output.transpose(1, 2).contiguous(), None


@torch.compiler.disable
def _report_flex(
    query: Tensor, key: Tensor, softmax_lse: Tensor, block_mask: BlockMask | None, scale: float | None
) -> None:
    if not is_capturing():
        return
    mask = None
    if block_mask is not None:
        shape = (query.shape[0], 1, query.shape[2], key.shape[2])
        mask = create_mask(block_mask.mask_mod, *shape, device=str(query.device))
    report_attention(query, key, softmax_lse, attn_mask=mask, scale=scale)


#: What transformers hands to an attention that leaves it as it is, or has become a mask before.
_PLAIN = frozenset(
    {
        *("sliding_window", "position_ids", "cache_position", "position_embeddings", "use_cache"),
        *("return_dict", "output_hidden_states", "output_router_logits", "logits_to_keep"),
        *("num_items_in_batch", "seq_idx", "deterministic", "kernel_options"),
    }
)


def _refuse(keywords: dict[str, Any]) -> None:
    given = [
        name
        for name, value in keywords.items()
        if name not in _PLAIN and value is not None and value is not False
    ]
    if given:
        raise NotImplementedError(f"attn_sampler: attention with {', '.join(given)} is not served")


def _packed(module: torch.nn.Module, position_ids: Tensor | None) -> bool:
    """Whether several sequences stand in one row, as transformers tells flash-attn; the first layer asks."""
    if position_ids is None or position_ids.dim() != 2 or len(position_ids) != 1:
        return False
    return getattr(module, "layer_idx", 0) == 0 and bool((position_ids.diff() != 1).any())


def _is_causal(module: torch.nn.Module, given: bool | None) -> bool:
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _without_padding(
    varlen: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Output [B, M, Hq, D] and log-sum-exp [B, Hq, M]; 0 and -inf at padding."""
    rows, keys = mask[:, mask.shape[1] - q.shape[1] :].bool(), mask.bool()
    lengths = [x.sum(dim=1, dtype=torch.int32) for x in (rows, keys)]
    starts = [F.pad(x.cumsum(dim=0, dtype=torch.int32), (1, 0)) for x in lengths]
    longest = [int(x.max()) for x in lengths]
    packed, packed_lse, _ = varlen(q[rows], k[keys], v[keys], *starts, *longest, **options)  # [sum M, Hq, D]
    output = q.new_zeros(*q.shape[:3], v.shape[3])
    output[rows] = packed
    softmax_lse = packed_lse.new_full((*q.shape[:2], q.shape[2]), -torch.inf)
    softmax_lse[rows] = packed_lse.transpose(0, 1)  # flash-attn gives [Hq, sum M]
    return output, softmax_lse.transpose(1, 2)


for _name, _forward, _mask in (
    ("attn_sampler", attention_forward, attention_mask),
    ("attn_sampler_fa2", flash_attention_forward, flash_attention_mask),
    ("attn_sampler_flex", flex_attention_forward, flex_mask),
):
    AttentionInterface.register(_name, _forward)
    AttentionMaskInterface.register(_name, _mask)
