"""Triton kernels of attn_sampler, behind the signatures of a backend.

The functions take checked tensors and records, and write into the first of them. They run on CUDA and ROCm
devices, and on CPU tensors under ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from attn_sampler.options import MAX_HEADDIM

from . import launch
from .attention_map import attention_map
from .column_scores import column_scores
from .decode_step import MAX_LAYERS, decode_step
from .select_tokens import select_tokens
from .token_confidence import token_confidence

__all__ = [
    "attention_map",
    "column_scores",
    "decode_step",
    "refuses",
    "select_tokens",
    "token_confidence",
]


def refuses(op: str, tensors: Sequence[Tensor]) -> str | None:
    """Why ``op`` cannot be served on these floating-point tensors of the backend's device; None where it can.

    Parameters
    ----------
    op
        A name of ``attn_sampler.backends.OPS``.
    tensors
        q and k; logits; scores and confidence; or, for decode_step, logits and the layers' q and k.
    """
    for tensor in tensors:
        if launch.architecture(tensor.device) in ("sm50", "sm60", "sm70"):
            return "it needs a GPU of compute capability 8.0 or later"
        if tensor.dim() == 4 and tensor.shape[3] > MAX_HEADDIM:
            return f"it serves head dimensions up to {MAX_HEADDIM}, and this one is {tensor.shape[3]}"
        positions = tensor.shape[-2] * (tensor.shape[1] if tensor.dim() == 4 else 1)
        if positions > launch.MAX_POSITIONS:
            return f"it serves up to 2^29 positions times heads, and these are {positions}"
    layers = sum(tensor.dim() == 4 for tensor in tensors) // 2
    if op == "decode_step" and layers > MAX_LAYERS:
        return f"it serves up to {MAX_LAYERS} layers in a step, and these are {layers}"
    return None
