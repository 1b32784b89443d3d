"""attn_sampler: exact, fast kernels for attention-guided decoding of diffusion language models."""

from attn_sampler._version import __version__
from attn_sampler.attention import attention_map, column_scores, top_columns
from attn_sampler.backends import BackendUnavailableError, Support, is_backend_supported
from attn_sampler.capture import AttentionCapture, CapturedLayer, report_attention
from attn_sampler.dependency import ADAS, CLAD, DAPD, DAWN, DOS, Grounded
from attn_sampler.functional import decode_step, revise_tokens, select_tokens, token_confidence

# Not left to a lazy attribute: the name of the module would hide the function.
from attn_sampler.generate import Generation, StepEvent, generate
from attn_sampler.policy import Decision
from attn_sampler.reference import Prediction, StepResult, TopColumns
from attn_sampler.revision import T2M, T2T, WINO, AttnCheck, Saber
from attn_sampler.sampler import POLICIES, Policy, StepState, make_policy, register_policy
from attn_sampler.trace import Commit, DecodeTrace
from attn_sampler.warming import warm_up

__all__ = [
    "ADAS",
    "CLAD",
    "DAPD",
    "DAWN",
    "DOS",
    "POLICIES",
    "T2M",
    "T2T",
    "WINO",
    "AttentionCapture",
    "AttnCheck",
    "BackendUnavailableError",
    "CapturedLayer",
    "Commit",
    "Decision",
    "DecodeTrace",
    "Generation",
    "Grounded",
    "Policy",
    "Prediction",
    "Saber",
    "StepEvent",
    "StepResult",
    "StepState",
    "Support",
    "TopColumns",
    "__version__",
    "attention_map",
    "column_scores",
    "decode_step",
    "generate",
    "is_backend_supported",
    "make_policy",
    "register_policy",
    "report_attention",
    "revise_tokens",
    "select_tokens",
    "token_confidence",
    "top_columns",
    "warm_up",
]
