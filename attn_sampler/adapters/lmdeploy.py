"""LMDeploy: attention-guided decoding in its ``UnmaskingProcessor``.

Install: ``pip install "lmdeploy>=0.18,<0.19"``.

    from attn_sampler.adapters.lmdeploy import install
    install(tau=0.9)                                     # before the pipeline is made
    pipe = pipeline("JetLM/SDAR-8B-Chat", PytorchEngineConfig(dllm_block_length=4, eager_mode=True))

Where LMDeploy starts processes of its own (several GPUs), put these lines and ``MODULE_MAP = {}`` in a file,
and name it as ``custom_module_map``: each of them reads it, and the ranks' heads are added up. LMDeploy draws
the tokens, as a request's ``GenerationConfig`` asks, and all of that is in the logits and tokens that reach
the policy; it chooses which of them stay, by their probability and by the attention inside the block (its
kernels give no log-sum-exp over the context). The engine's ``dllm_unmasking_strategy``,
``dllm_denoising_steps`` and ``dllm_confidence_threshold`` have to stay at their defaults. Interface of
version 0.18.0; tested without a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attn_sampler import checks
from attn_sampler.adapters._engine import (
    BlockScores,
    attention_layers,
    last_tokens,
    refuse_attention,
    require,
    stateless_policy,
    step_seeds,
    unserved,
)
from attn_sampler.capture import check_layer_choice
from attn_sampler.functional import token_confidence
from attn_sampler.policy import Policy, StepState, check_progress


def _require(module: str) -> Any:
    return require(module, "lmdeploy", 'pip install "lmdeploy>=0.18,<0.19"', "0.18", "0.19")


#: What of an attention is not among the scaled products of a block.
_KINDS = ("alibi", "logit_softcapping", "sliding_window", "learnable_sink")
#: Keywords of ``Attention.forward`` that leave the attention as it is.
_PLAIN = ("k_scales_zeros", "v_scales_zeros", "inplace")


class Unmasking:
    """What ``install`` puts in the place of ``UnmaskingProcessor.__call__``."""

    def __init__(self, policy: Policy, seed: int, layers: Any, score_options: dict[str, Any]) -> None:
        self.policy = policy
        self._seed = seed
        self._layers = layers
        self._score_options = score_options
        self._consts = _require("lmdeploy.pytorch.consts")
        self._scores: BlockScores | None = None
        self._steps = 0

    def watch(self, model: nn.Module) -> None:
        """Add up the attention inside the blocks that the model decodes from now on."""
        attention = _require("lmdeploy.pytorch.nn.attention").Attention
        watched = attention_layers(model, attention, self._layers)
        block_length: int = watched[0].impl.block_sparse_size  # type: ignore
        scores = BlockScores(block_length, group=_head_group(), **self._score_options)
        for layer in watched:
            kinds: dict[str, Any] = {name: getattr(layer.impl, name, None) for name in _KINDS}
            refuse_attention(block_length, **kinds)

        def before(layer: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            q, k, _, _, _, metadata, *_ = inputs
            refuse_attention(
                block_length, **{name: keywords[name] for name in keywords if name not in _PLAIN}
            )
            index = None
            if not metadata.is_decoding:  # a prompt, with its last block to be filled
                index = last_tokens(metadata.q_seqlens.cumsum(0), block_length)
            scores.add(
                q.flatten(0, -3),
                k.flatten(0, -3),
                first=layer is watched[0],
                last=layer is watched[-1],
                softmax_scale=layer.impl.scale,
                index=index,
            )

        for layer in watched:
            # Before the kernel, which may write its output over the queries.
            layer.register_forward_pre_hook(before, with_kwargs=True)
        self._scores = scores

    def __call__(
        self, processor: Any, logits: Tensor, input_ids: Tensor, token_ids: Tensor, dllm_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The states and tokens ``[B * C]`` after the step, from those before it and the tokens drawn."""
        consts = self._consts
        block_length = processor.dllm_config.block_length
        state = dllm_mask.unflatten(0, (-1, block_length)).clone()
        state[(state == consts.DLLM_UNMASKED).all(dim=1)] = consts.DLLM_CACHED
        masked = state == consts.DLLM_MASKED
        token_ids = torch.where(masked.flatten(), token_ids, input_ids)

        x = logits.unflatten(0, (-1, block_length))
        drawn = token_ids.view_as(masked)
        backend = self._score_options.get("backend", "auto")
        p = token_confidence(x, current_ids=drawn, backend=backend).current
        assert p is not None
        sequence = torch.arange(len(masked), device=masked.device)
        scores = None
        if self.policy.needs_scores:
            if self._scores is None:
                raise RuntimeError(
                    "no model was watched: call install() before the pipeline is made, in each process that "
                    "LMDeploy starts (custom_module_map)"
                )
            scores = self._scores.read(len(masked))
        seeds = step_seeds(self._seed, self._steps, sequence)
        self._steps += 1
        selected = masked & self.policy.select(StepState(masked, drawn, p, scores, x, -1, sequence, seeds))
        check_progress(masked, selected, p, scores, sequence)
        return torch.where(selected, consts.DLLM_UNMASKED, state).flatten(), token_ids


#: What ``install`` has replaced: where, under which name, and what was there.
_replaced: list[tuple[Any, str, Any]] = []


def install(
    policy: str | Policy = "attn",
    *,
    tau: float | None = None,
    seed: int = 0,
    layers: str | slice | Sequence[int] = "all",
    diagonal: bool = True,
    reduction: str = "sum",
    backend: str = "auto",
) -> Unmasking:
    """Let the policy choose what LMDeploy unmasks, in this process, in models built from now on.

    Parameters
    ----------
    policy, tau, layers, diagonal, backend
        As in ``generate``; a policy that judges by the tokens' probability.
    seed
        For policies that draw.
    reduction
        As in ``column_scores``.

    Raises
    ------
    ImportError, RuntimeError
        LMDeploy is not installed, or another version.
    ValueError, TypeError
        Naming the argument. An engine that is made later raises where its own way of unmasking is not the
        default one, or its model's attention is of a kind that cannot be read.
    """
    chosen = stateless_policy(policy, tau)
    if chosen.metric != "probability":
        raise ValueError(
            f"policy: expected one that judges tokens by their probability, got {policy!r} ({chosen.metric})"
        )
    checks.integer("seed", seed)
    check_layer_choice(layers)
    score_options: dict[str, Any] = {"diagonal": diagonal, "reduction": reduction, "backend": backend}
    BlockScores(1, **score_options)  # checks them: the real one needs the model
    unmasking = Unmasking(chosen, seed, layers, score_options)
    processor = _require("lmdeploy.pytorch.strategies.dllm.unmasking").UnmaskingProcessor
    agent = _require("lmdeploy.pytorch.engine.model_agent.agent")
    uninstall()
    own_init, own_call, own_build = processor.__init__, processor.__call__, agent.build_patched_model

    @functools.wraps(own_init)
    def init(self: Any, *arguments: Any, **keywords: Any) -> None:
        own_init(self, *arguments, **keywords)
        _check_engine(self.dllm_config)

    @functools.wraps(own_call)
    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if self.dllm_config.unmasking_strategy is None:
            return own_call(self, *arguments, **keywords)
        return unmasking(self, *arguments, **keywords)

    @functools.wraps(own_build)
    def build(*arguments: Any, **keywords: Any) -> nn.Module:
        model = own_build(*arguments, **keywords)
        if chosen.needs_scores:
            unmasking.watch(model)
        return model

    for owner, name, replacement in (
        (processor, "__init__", init),
        (processor, "__call__", call),
        (agent, "build_patched_model", build),
    ):
        _replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, replacement)
    return unmasking


def _check_engine(config: Any) -> None:
    """Raise where the engine is asked to unmask in a way of its own; without a strategy it is left alone."""
    if config.unmasking_strategy is None:
        return
    given = {
        "dllm_unmasking_strategy": config.unmasking_strategy.name.lower(),
        "dllm_denoising_steps": config.denoising_steps,
        "dllm_confidence_threshold": config.confidence_threshold,
    }
    neutral: dict[str, list[Any]] = {
        "dllm_unmasking_strategy": ["low_confidence_dynamic"],
        "dllm_confidence_threshold": [0.85],
    }
    if refusal := unserved(given, (), neutral):
        raise ValueError(f"{refusal}: the policy that install() was given decides, by a tau of its own")


def uninstall() -> None:
    """Give LMDeploy its own unmasking back."""
    while _replaced:
        setattr(*_replaced.pop())


def _head_group() -> Any:
    """The ranks that share the attention heads; None where there is one."""
    distributed = _require("lmdeploy.pytorch.distributed")
    context = distributed.get_dist_manager().current_context()
    return context.attn_tp_group.gpu_group if context.dist_config.attn_tp > 1 else None
