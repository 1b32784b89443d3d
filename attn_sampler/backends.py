"""Which backend can serve which problem, and if not, why.

``"auto"`` takes the first backend of ``AUTO_ORDER`` that serves the problem. A backend asked for by name
either runs or raises ``BackendUnavailableError`` with the reason; there is no silent fallback.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

from attn_sampler import _core

BACKENDS = ("cuda", "triton", "cpu", "reference")
OPS = ("column_scores", "attention_map", "token_confidence", "select_tokens", "decode_step")

#: What "auto" tries, in order, by the device that the tensors are on. The reference serves everything.
AUTO_ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}


class BackendUnavailableError(RuntimeError):
    """The backend asked for by name cannot run this problem; the message says why."""


class Support(NamedTuple):
    """An answer of the backend table."""

    supported: bool
    reason: str  # "" where supported


@functools.cache
def installation_problem(backend: str) -> str | None:
    """Why this machine or installation cannot run the backend at all; None where it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        return "this version has no Triton kernels yet"
    if _core.UNAVAILABLE is not None:
        return _core.UNAVAILABLE
    return _core.cuda_unavailable() if backend == "cuda" else None


def _problem(backend: str, op: str, tensors: tuple[Tensor, ...]) -> str | None:
    """Why the backend cannot run op on these tensors; None where it can."""
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
    reason = installation_problem(backend)
    if reason is not None or backend == "reference":
        return reason
    device = "cpu" if backend == "cpu" else "cuda"
    for tensor in tensors:
        if tensor.device.type != device:
            return f"it takes {device} tensors, and these are on {tensor.device}"
        if tensor.dtype == torch.float64:
            return "it does not serve float64 (the reference does)"
        if op not in ("select_tokens",) and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return (
                "it reads tensors whose last dimension is contiguous, "
                f"and one here has strides {tuple(tensor.stride())} (call .contiguous())"
            )
    return None


def is_backend_supported(op: str, backend: str, *tensors: Tensor) -> Support:
    """Whether ``backend`` can run ``op`` on tensors like these.

    Parameters
    ----------
    op
        One of ``OPS``.
    backend
        One of ``BACKENDS``.
    *tensors
        The floating-point inputs (q and k; logits; scores and confidence). With none, the answer is about
        this machine and installation alone.

    Returns
    -------
    Support
        ``(supported, reason)``; the reason is empty where supported.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    reason = _problem(backend, op, tensors)
    return Support(reason is None, reason or "")


def choose_backend(op: str, backend: str, *tensors: Tensor) -> str:
    """The backend that will run, or BackendUnavailableError."""
    if backend == "auto":
        for candidate in AUTO_ORDER.get(tensors[0].device.type, ("reference",)):
            if _problem(candidate, op, tensors) is None:
                return candidate
        return "reference"
    reason = _problem(backend, op, tensors)
    if reason is not None:
        raise BackendUnavailableError(f"backend {backend!r} cannot run {op} here: {reason}")
    return backend
