"""Which backend can serve which problem, and if not, why.

``"auto"`` takes the first backend of ``AUTO_ORDER`` that serves the problem, or else the reference. A backend
asked for by name either runs or raises ``BackendUnavailableError`` with the reason.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from attn_sampler import _core, checks

BACKENDS = ("cuda", "triton", "cpu", "reference")
OPS = ("column_scores", "attention_map", "token_confidence", "select_tokens", "decode_step")

#: What "auto" tries, in order, by the device that the tensors are on; then the reference, which serves all.
AUTO_ORDER = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}

#: Where the Triton kernels live, imported when first asked for: the functions of a backend, and
#: ``problem(op, tensors) -> str | None``, which says why they do not serve a problem.
TRITON_MODULE = "attn_sampler.kernels"

#: What they need; an older Triton cannot import them.
OLDEST_TRITON = "3.6"


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
        return _triton_problem()
    if _core.UNAVAILABLE is not None:
        return _core.UNAVAILABLE
    return _core.cuda_unavailable() if backend == "cuda" else _core.cpu_unavailable()


def _triton_problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        version = importlib.import_module("triton").__version__
        if TorchVersion(version) < OLDEST_TRITON:
            return f"triton {version} is installed; the kernels need {OLDEST_TRITON} or newer"
        importlib.import_module(TRITON_MODULE)
    except ImportError as error:
        if error.name == TRITON_MODULE:
            return "this installation has no Triton kernels"
        return f"the Triton kernels cannot be imported ({error})"
    if device_type("triton") == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU (TRITON_INTERPRET=1 would run the kernels on CPU tensors)"
    return None


def device_type(backend: str) -> str:
    """The type of device whose tensors the backend takes; the reference takes any."""
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    return "cpu" if backend == "cpu" else "cuda"


def names_extension(backend: str, tensor: Tensor) -> bool:
    """Whether ``backend`` means the compiled extension for tensors of this device: by name, or as the first
    that "auto" tries."""
    device = "cpu" if tensor.is_cpu else "cuda" if tensor.is_cuda else "none"
    return backend in ("auto", device) and device in AUTO_ORDER and installation_problem(device) is None


def _problem(backend: str, op: str, tensors: tuple[Tensor, ...]) -> str | None:
    """Why the backend cannot run op on these tensors; None where it can."""
    reason = installation_problem(backend)
    if reason is not None or backend == "reference":
        return reason
    device = device_type(backend)
    for tensor in tensors:
        if tensor.device.type != device:
            return f"it takes {device} tensors, and one here is on {tensor.device}"
        if tensor.dtype == torch.float64:
            return "it does not serve float64 (the reference does)"
        if op != "select_tokens" and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return (
                "it reads tensors whose last dimension is contiguous, "
                f"and one here has strides {tuple(tensor.stride())} (call .contiguous())"
            )
    if backend == "triton":
        return importlib.import_module(TRITON_MODULE).problem(op, tensors)
    return _core.cuda_problem(op, tensors) if backend == "cuda" else None


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
    checks.choice("op", op, OPS)
    checks.choice("backend", backend, BACKENDS)
    reason = _problem(backend, op, tensors)
    return Support(reason is None, reason or "")


def choose_backend(op: str, backend: str, *tensors: Tensor) -> str:
    """The backend that will run, or BackendUnavailableError."""
    if backend == "auto":
        for candidate in AUTO_ORDER.get(tensors[0].device.type, ()):
            if _problem(candidate, op, tensors) is None:
                return candidate
        return "reference"
    reason = _problem(backend, op, tensors)
    if reason is not None:
        raise BackendUnavailableError(f"backend: {backend!r} cannot run {op} here: {reason}")
    return backend
