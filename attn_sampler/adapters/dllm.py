"""dLLM (ZHZisZZ/dllm): attention-guided decoding as its ``BaseSampler``.

Install: ``pip install git+https://github.com/ZHZisZZ/dllm``.

    from attn_sampler.adapters.dllm import AttnSampler, AttnSamplerConfig
    sampler = AttnSampler(model=model, tokenizer=tokenizer)
    sampler.sample(inputs, AttnSamplerConfig(max_new_tokens=128, block_size=32, tau=0.9))

The inputs, the canvas that is returned (prompts first, the end-of-text token behind shorter ones) and
``infill`` are those of ``MDLMSampler``; how many steps a block takes is the policy's choice. Prompts of one
length are decoded together, so that nothing is padded and every position encoding is right. Models have to
call PyTorch's ``scaled_dot_product_attention`` (``attn_implementation="sdpa"``). Rules that take back serve
models that are trained for it (LLaDA2.1: ``policy="t2t"``). dLLM's own options that are no fields of
``AttnSamplerConfig`` are refused by name where they ask for something. Interface of version 0.1.0, commit
ca17675, the newest of its main branch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attn_sampler.adapters._engine import require, unserved
from attn_sampler.generate import generate
from attn_sampler.policy import Policy

_samplers: Any = require(
    "dllm.core.samplers", "dllm", "pip install git+https://github.com/ZHZisZZ/dllm", "0.1", "0.2"
)


@dataclasses.dataclass
class AttnSamplerConfig(_samplers.BaseSamplerConfig):
    """As in ``MDLMSamplerConfig`` and, from ``policy`` on, as in ``attn_sampler.generate``.

    ``eos_early_stop`` is that of LLaDA2.1's sampler: a text that has ended is not decoded further, and the
    end-of-text token is behind it.
    """

    max_new_tokens: int | None = 128
    max_length: int | None = None
    block_size: int | None = 32
    suppress_tokens: list[int] | None = None
    right_shift_logits: bool = False
    cfg_scale: float = 0.0
    cfg_keep_tokens: list[int] | None = None
    eos_early_stop: bool = False
    policy: str | Policy = "attn"
    tau: float | None = None
    temperature: float = 0.0
    seed: int = 0
    layers: str | slice | Sequence[int] = "all"
    query_rows: str = "all"
    softmax_scope: str = "sequence"
    diagonal: bool = True
    backend: str = "auto"
    rows: str | None = None  # the former name of query_rows


#: With which values options of dLLM's samplers ask for nothing here.
_NEUTRAL: dict[str, list[Any]] = {
    "remasking": ["low_confidence"],
    "stochastic_transfer": [False],
    "begin_suppress_tokens": [[]],
}


@dataclasses.dataclass
class AttnSampler(_samplers.BaseSampler):
    """Decodes by the attention that positions receive, or by any other policy.

    Raises
    ------
    ValueError
        ``scheduler`` is given: how many tokens a step commits is the policy's choice.
    """

    def __post_init__(self) -> None:
        if self.scheduler is not None:
            given = type(self.scheduler).__name__
            raise ValueError(f"scheduler: expected None, as the policy takes its place, got a {given}")

    @torch.no_grad()
    def sample(
        self, inputs: list[Tensor | list[int]], config: AttnSamplerConfig | None = None, **changes: Any
    ) -> Any:
        """Append to each prompt; ``changes`` replace fields of ``config``."""
        config = _changed(config, changes)
        prompts = self._prompts(inputs, config)
        longest = max(map(len, prompts))
        new = config.max_new_tokens
        if not new:
            if config.max_length is None:
                raise ValueError("config: expected max_new_tokens or max_length, got neither")
            new = config.max_length - longest
        return self._decode(prompts, new, config)

    @torch.no_grad()
    def infill(
        self, inputs: list[Tensor | list[int]], config: AttnSamplerConfig | None = None, **changes: Any
    ) -> Any:
        """Fill the mask tokens of each input; ``changes`` replace fields of ``config``, but no lengths."""
        lengths = ("max_new_tokens", "max_length")
        if refusal := unserved({name: changes.get(name) for name in lengths}):
            raise TypeError(f"infill: {refusal}")
        config = _changed(config, changes)
        return self._decode(self._prompts(inputs, config), 0, config)

    def _prompts(self, inputs: list[Tensor | list[int]], config: AttnSamplerConfig) -> list[Tensor]:
        prompts = [torch.as_tensor(x, dtype=torch.int64, device=self.model.device) for x in inputs]
        if config.right_shift_logits:  # the first prediction needs a token before it
            start = torch.tensor([self.tokenizer.bos_token_id], device=self.model.device)
            prompts = [prompt if len(prompt) else start for prompt in prompts]
        return prompts

    def _decode(self, prompts: list[Tensor], new: int, config: AttnSamplerConfig) -> Any:
        tokenizer = self.tokenizer
        for name in ("mask_token_id", "eos_token_id"):
            if getattr(tokenizer, name, None) is None:
                raise ValueError(f"tokenizer: expected one with a {name}, got {type(tokenizer).__name__}")
        longest = max(map(len, prompts))
        canvas = torch.full(
            (len(prompts), longest + new), tokenizer.eos_token_id, dtype=torch.int64, device=self.model.device
        )
        to_fill: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            canvas[i, : len(prompt)] = prompt
            if new or (prompt == tokenizer.mask_token_id).any():
                to_fill.setdefault(len(prompt), []).append(i)

        def model(tokens: Tensor) -> Tensor:
            logits = self.model(tokens, attention_mask=torch.ones_like(tokens)).logits
            if config.suppress_tokens:
                logits[..., config.suppress_tokens] = -torch.inf
            return logits

        for length, members in to_fill.items():
            given = torch.stack([prompts[i] for i in members])
            without = None
            if config.cfg_scale > 0.0:
                kept = torch.isin(given, given.new_tensor(config.cfg_keep_tokens or []))
                without = torch.where(kept, given, tokenizer.mask_token_id)
            generation = generate(
                model,
                given,
                mask_token_id=tokenizer.mask_token_id,
                gen_length=new,
                block_length=config.block_size or longest + new,
                policy=config.policy,
                tau=config.tau,
                temperature=config.temperature,
                seed=[config.seed + i for i in members],
                logit_shift=config.right_shift_logits,
                guidance_scale=config.cfg_scale,
                unconditional_prompt_ids=without,
                eos_token_id=tokenizer.eos_token_id if config.eos_early_stop else None,
                layers=config.layers,
                query_rows=config.query_rows,
                softmax_scope=config.softmax_scope,
                diagonal=config.diagonal,
                backend=config.backend,
                rows=config.rows,
            )
            canvas[members, : length + new] = generation.tokens
        return _samplers.BaseSamplerOutput(sequences=canvas) if config.return_dict else canvas


def _changed(config: AttnSamplerConfig | None, changes: dict[str, Any]) -> AttnSamplerConfig:
    if not (config is None or isinstance(config, AttnSamplerConfig)):
        raise TypeError(f"config: expected an AttnSamplerConfig, got {type(config).__name__}")
    fields = {field.name for field in dataclasses.fields(AttnSamplerConfig)}
    if refusal := unserved(changes, fields, _NEUTRAL):
        raise TypeError(f"AttnSampler: {refusal}")
    known = {name: value for name, value in changes.items() if name in fields}
    return dataclasses.replace(config or AttnSamplerConfig(), **known)
