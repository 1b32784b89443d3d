"""Stand-ins for the modelling code that is published with the checkpoints.

Small random-weight models of our own with the call structure of that code: argument names, mask conventions,
cache layouts, where RoPE is applied. They are not that code, and share only what a decoder can see of it.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB, MASK, HEADS, KV_HEADS, D = 40, 39, 4, 2, 8
WIDTH, LAYERS = HEADS * D, 2


class Layer(nn.Module):
    """Pre-norm attention and a feed-forward layer, with the attention itself left to the model."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, HEADS * D)
        self.k = nn.Linear(WIDTH, KV_HEADS * D)
        self.v = nn.Linear(WIDTH, KV_HEADS * D)
        self.o = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH)


class StandIn(nn.Module):
    """Embedding, layers, head; ``attend(layer, x, ...)`` is the model's own."""

    model_type = ""

    def __init__(self, seed: int = 0, **config: Any) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.config = types.SimpleNamespace(model_type=self.model_type, mask_token_id=MASK, **config)
        self.rows_run: list[int] = []
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            spread = 0.5 if parameter.dim() > 1 else 0.1
            parameter.data = torch.randn(parameter.shape, generator=generator) * spread

    def run(self, tokens: Tensor, attend: Callable[[int, Tensor], Tensor]) -> Tensor:
        self.rows_run.append(tokens.shape[1])
        x = self.embedding(tokens)
        for i, layer in enumerate(self.layers):
            y = attend(i, F.rms_norm(x, (WIDTH,)))
            x = x + layer.o(y.transpose(1, 2).reshape(x.shape))
            x = x + F.silu(layer.up(F.rms_norm(x, (WIDTH,))))
        return self.head(F.rms_norm(x, (WIDTH,)))


def split(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:2], heads, D).transpose(1, 2)


def rope(x: Tensor, start: int) -> Tensor:
    """Rotary positions on [B, H, M, D] of rows at ``start`` and on."""
    angle = torch.outer(torch.arange(start, start + x.shape[2]), 4.0 ** -torch.arange(D // 2)).to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)


def repeated(x: Tensor) -> Tensor:
    return x.repeat_interleave(HEADS // KV_HEADS, dim=1)


class PublishedLLaDA(StandIn):
    """LLaDA as on the hub: no cache, and ``attention_mask`` [B, T] is applied."""

    model_type = "llada"

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False
    ) -> Any:
        assert not use_cache, "The kvcache is not supported"
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]

        def attend(i: int, x: Tensor) -> Tensor:
            layer = self.layers[i]
            q, k, v = split(layer.q(x), HEADS), split(layer.k(x), KV_HEADS), split(layer.v(x), KV_HEADS)
            q, k = rope(q, 0), rope(k, 0)
            return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=mask)

        return types.SimpleNamespace(logits=self.run(input_ids, attend))


class FastLLaDA(StandIn):
    """Fast-dLLM's LLaDA: caches [B, H, N, D] before RoPE, replaces rows in place, and never masks."""

    model_type = "llada"

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        replace_position: Tensor | None = None,
    ) -> Any:
        present = []

        def attend(i: int, x: Tensor) -> Tensor:
            layer = self.layers[i]
            q, k, v = split(layer.q(x), HEADS), split(layer.k(x), KV_HEADS), split(layer.v(x), KV_HEADS)
            end = None
            if past_key_values is not None:
                past_k, past_v = past_key_values[i]
                if replace_position is None:
                    k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
                else:
                    index = replace_position.nonzero(as_tuple=True)[1]
                    past_k[:, :, index], past_v[:, :, index] = k, v
                    k, v, end = past_k, past_v, int(index.max()) + 1
            present.append((k, v))
            end = k.shape[2] if end is None else end
            q, k = rope(q, end - q.shape[2]), rope(k, 0)
            return F.scaled_dot_product_attention(q, repeated(k), repeated(v))

        logits = self.run(input_ids, attend)
        return types.SimpleNamespace(logits=logits, past_key_values=present if use_cache else None)


class FastDream(StandIn):
    """Fast-dLLM's Dream: caches [B, N, H * D]; the mask is "full" or 4-dimensional."""

    model_type = "Dream"

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | str | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        dual_cache: bool = False,
        replace_position: Tensor | None = None,
    ) -> Any:
        assert attention_mask == "full" or attention_mask.dim() == 4
        present = []

        def attend(i: int, x: Tensor) -> Tensor:
            layer = self.layers[i]
            q, k, v = layer.q(x), layer.k(x), layer.v(x)
            end = None
            if past_key_values is not None:
                past_k, past_v = past_key_values[i]
                if dual_cache:
                    index = replace_position.nonzero(as_tuple=True)[1]
                    past_k[:, index], past_v[:, index] = k, v
                    k, v, end = past_k, past_v, int(index.max()) + 1
                else:
                    k, v = torch.cat([past_k, k], dim=1), torch.cat([past_v, v], dim=1)
            present.append((k, v))
            end = k.shape[1] if end is None else end
            q, k, v = split(q, HEADS), split(k, KV_HEADS), split(v, KV_HEADS)
            q, k = rope(q, end - q.shape[2]), rope(k, 0)
            mask = attention_mask if isinstance(attention_mask, Tensor) else None
            return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=mask)

        logits = self.run(input_ids, attend)
        return types.SimpleNamespace(logits=logits, past_key_values=present if use_cache else None)


def sdar_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """flash-attn where the mask lets everything through, as SDAR has it."""
    if torch.all(mask) and flash_attn_func is not None:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flash_attn_func(q, k, v, causal=False, softmax_scale=D**-0.5).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.bool(), scale=D**-0.5, enable_gqa=True)


flash_attn_func: Callable[..., Any] | None = None  # a test puts a stub of flash-attn here


class SDARForCausalLM(StandIn):
    """SDAR: a mask is required, ``store_kv`` appends, the cache is read by ``cache[layer]``."""

    model_type = "sdar"

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        store_kv: bool = False,
    ) -> Any:
        start = int(position_ids[0, 0])

        def attend(i: int, x: Tensor) -> Tensor:
            layer = self.layers[i]
            q, k, v = split(layer.q(x), HEADS), split(layer.k(x), KV_HEADS), split(layer.v(x), KV_HEADS)
            q, k = rope(q, start), rope(k, start)
            if past_key_values is not None and store_kv:
                k, v = past_key_values.update(k, v, i)
            elif past_key_values is not None and len(past_key_values) > i:
                past_k, past_v = past_key_values[i]
                k, v = torch.cat([past_k, k], dim=-2), torch.cat([past_v, v], dim=-2)
            return sdar_attention(q, k, v, attention_mask)

        return types.SimpleNamespace(logits=self.run(input_ids, attend))


class FastDLLMv2ForCausalLM(StandIn):
    """Fast-dLLM v2: makes its mask from ``block_size`` and the cache's length, and reads no other."""

    model_type = "Fast_dLLM_Qwen"

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        update_past_key_values: bool = False,
        block_size: int = 32,
    ) -> Any:
        start = 0 if past_key_values is None else past_key_values.get_seq_length()
        q_index = torch.arange(input_ids.shape[1]) + start
        k_index = torch.arange(input_ids.shape[1] + start)
        mask = q_index[:, None] // block_size >= k_index[None, :] // block_size

        def attend(i: int, x: Tensor) -> Tensor:
            layer = self.layers[i]
            q, k, v = split(layer.q(x), HEADS), split(layer.k(x), KV_HEADS), split(layer.v(x), KV_HEADS)
            q, k = rope(q, start), rope(k, start)
            if past_key_values is not None:
                if update_past_key_values:
                    k, v = past_key_values.update(k, v, i, {})
                elif len(past_key_values) > i:
                    k = torch.cat((past_key_values[i][0], k), dim=-2)
                    v = torch.cat((past_key_values[i][1], v), dim=-2)
            return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=mask)

        return types.SimpleNamespace(logits=self.run(input_ids, attend))


class LLaDA2MoeModelLM(StandIn):
    """LLaDA2.x: takes a square mask [B, 1, T, T] of zeros and ones alone."""

    model_type = "llada2_moe"

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> Any:
        batch, length = input_ids.shape
        assert attention_mask is not None
        assert attention_mask.shape == (batch, 1, length, length)
        assert attention_mask.dtype == self.head.weight.dtype
        bias = (1.0 - attention_mask).masked_fill(attention_mask == 0, torch.finfo(attention_mask.dtype).min)

        def attend(i: int, x: Tensor) -> Tensor:
            layer = self.layers[i]
            q, k, v = split(layer.q(x), HEADS), split(layer.k(x), KV_HEADS), split(layer.v(x), KV_HEADS)
            q, k = rope(q, 0), rope(k, 0)
            return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=bias)

        return types.SimpleNamespace(logits=self.run(input_ids, attend))
