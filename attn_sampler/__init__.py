"""attn_sampler: exact, fast kernels for attention-guided decoding of diffusion language models."""

from attn_sampler._version import __version__
from attn_sampler.backends import BackendUnavailableError, Support, is_backend_supported
from attn_sampler.functional import (
    attention_map,
    column_scores,
    decode_step,
    select_tokens,
    token_confidence,
)
from attn_sampler.reference import StepResult

__all__ = [
    "BackendUnavailableError",
    "StepResult",
    "Support",
    "__version__",
    "attention_map",
    "column_scores",
    "decode_step",
    "is_backend_supported",
    "select_tokens",
    "token_confidence",
]
