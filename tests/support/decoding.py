"""Short runs of generate() with the toy model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from toy_model import MASK, VOCAB

from attn_sampler.generate import Generation, generate

ALL_POLICIES = (
    *("attn", "attn-sequential", "random", "left-to-right", "confidence", "margin"),
    *("entropy", "threshold", "factor", "eb", "klass", "pard"),
)


def prompt(length: int, seed: int = 0) -> list[int]:
    """Tokens without masks and without the end of text."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(VOCAB - 5, (length,), generator=generator) + 4).tolist()


def decode(model: Callable[..., Any], prompts: Any, **options: Any) -> Generation:
    return generate(model, prompts, **{"mask_token_id": MASK, "block_length": 4, **options})
