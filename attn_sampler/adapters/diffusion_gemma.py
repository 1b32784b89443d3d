"""DiffusionGemma of transformers with Attn-Sampler as its sampler.

>>> model = DiffusionGemmaForAttnSampling.from_pretrained("google/diffusiongemma-26B-A4B-it")
>>> model.attn_sampler = AttnSampler(tau=0.8)
>>> model.generate(input_ids, max_new_tokens=256)

The model denoises a canvas of random tokens, without masks: in each step a sampler accepts some positions and
draws the others anew. Here it accepts by the attention that positions of the canvas receive, in place of
the entropy bound; schedule, stopping and everything else are the model's own. A call of ``generate`` that
brings an entropy bound along (``sampler_config``) is refused; the checkpoint's goes unread.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
    EntropyBoundSampler,
)
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaForBlockDiffusion

from attn_sampler.capture import AttentionCapture
from attn_sampler.functional import token_confidence
from attn_sampler.sampler import AttnSampler, StepState


class CanvasSampler(EntropyBoundSampler):
    """Accepts positions of the canvas by the dynamic attention threshold (arXiv 2604.08564).

    Every position is a candidate in every step. A position's confidence is the probability of the token drawn
    for it, in the distribution it was drawn from (the model's schedule sets its temperature).

    Parameters
    ----------
    policy
        Its rule is applied as it is.
    canvas_length, vocab_size
        Of the model.
    """

    def __init__(self, policy: AttnSampler, canvas_length: int, vocab_size: int) -> None:
        self.policy, self.canvas_length, self.vocab_size = policy, canvas_length, vocab_size
        self.accepted_token_mask: Tensor | None = None
        #: Open around the decoder's forward pass; the canvas is the last of its keys.
        self.capture = AttentionCapture(slice(-canvas_length, None))

    def accept_canvas(
        self, current_canvas: Tensor, denoiser_canvas: Tensor, logits: Tensor, cur_step: int
    ) -> Tensor:
        """The canvas int64 [B, C] with the drawn tokens at the accepted positions."""
        confidence = token_confidence(logits, current_ids=denoiser_canvas).current
        assert confidence is not None
        everywhere = torch.ones_like(denoiser_canvas, dtype=torch.bool)
        sequence = torch.arange(len(everywhere), device=everywhere.device)
        no_mask = -1  # the canvas has no mask token
        self.accepted_token_mask = self.policy.select(
            StepState(
                everywhere,
                denoiser_canvas,
                confidence,
                self.capture.scores,
                logits,
                no_mask,
                sequence,
                seeds=sequence,
            )
        )
        return torch.where(self.accepted_token_mask, denoiser_canvas, current_canvas)


class DiffusionGemmaForAttnSampling(DiffusionGemmaForBlockDiffusion):
    """``DiffusionGemmaForBlockDiffusion``, sampled by ``attn_sampler``; its checkpoints load as they are.

    Its attention has to be ``"sdpa"`` (the default) or one of ``attn_sampler.adapters.transformers``. Static
    caches, with which transformers compiles the sampler, are refused.
    """

    attn_sampler = AttnSampler()

    def _prepare_sampler(self, generation_config: DiffusionGemmaGenerationConfig) -> CanvasSampler:
        if not isinstance(self.attn_sampler, AttnSampler):
            raise TypeError(f"attn_sampler: expected an AttnSampler, got {type(self.attn_sampler).__name__}")
        if generation_config.cache_implementation in ALL_STATIC_CACHE_IMPLEMENTATIONS:
            raise NotImplementedError(
                "cache_implementation: Attn-Sampler needs the dynamic cache, got "
                f"{generation_config.cache_implementation!r}"
            )
        if generation_config.sampler_config not in (
            None,
            self.generation_config.sampler_config,
            generation_config._get_default_generation_params()["sampler_config"],
        ):
            raise ValueError(
                "sampler_config: expected the checkpoint's, which attn_sampler takes the place of, got "
                f"{generation_config.sampler_config}"
            )
        return CanvasSampler(self.attn_sampler, self.config.canvas_length, self.config.text_config.vocab_size)

    def _denoising_step(self, decoder_forward: Any, *, sampler: CanvasSampler, **arguments: Any) -> Any:
        def captured(*inputs: Any, **keywords: Any) -> Any:
            with sampler.capture:
                return decoder_forward(*inputs, **keywords)

        return super()._denoising_step(decoder_forward=captured, sampler=sampler, **arguments)
