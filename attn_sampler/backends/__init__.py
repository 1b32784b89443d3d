"""Which backend can serve which problem, and if not, why.

A backend is an object that declares itself: its name, the devices that it takes, why it cannot run here,
which problems it refuses, and its functions. ``REGISTRY`` lists them; nothing else knows their names.
``"auto"`` takes the first that serves the problem. A backend asked for by name either runs or raises
``BackendUnavailableError`` with the reason.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from torch import Tensor

from attn_sampler import checks
from attn_sampler.backends.base import OPS, Backend
from attn_sampler.backends.extension import CPU, CUDA
from attn_sampler.backends.reference import REFERENCE
from attn_sampler.backends.triton import TRITON

#: In the order in which "auto" tries them.
REGISTRY: dict[str, Backend] = {backend.name: backend for backend in (CUDA, TRITON, CPU, REFERENCE)}
BACKENDS = tuple(REGISTRY)
BACKEND_CHOICES = ("auto", *BACKENDS)

__all__ = ["BACKENDS", "BACKEND_CHOICES", "OPS", "REGISTRY", "Backend", "BackendUnavailableError", "Support"]


class BackendUnavailableError(RuntimeError):
    """The backend asked for by name cannot run this problem; the message says why."""


class Support(NamedTuple):
    """An answer of the backend table."""

    supported: bool
    reason: str  # "" where supported


@functools.cache
def unavailable(name: str) -> str | None:
    """Why this machine or installation cannot run the backend at all; None where it can."""
    return REGISTRY[name].unavailable()


def refusal(name: str, op: str, tensors: tuple[Tensor, ...]) -> str | None:
    """Why the backend cannot run op on these tensors; None where it can."""
    return unavailable(name) or REGISTRY[name].refuses(op, tensors)


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
    reason = refusal(backend, op, tensors)
    return Support(reason is None, reason or "")


def choose_backend(op: str, backend: str, *tensors: Tensor) -> Backend:
    """The backend that will run, or BackendUnavailableError."""
    if backend == "auto":
        device = tensors[0].device.type
        return next(
            candidate
            for name, candidate in REGISTRY.items()
            if candidate.auto in (device, None) and refusal(name, op, tensors) is None
        )
    reason = refusal(backend, op, tensors)
    if reason is not None:
        raise BackendUnavailableError(f"backend: {backend!r} cannot run {op} here: {reason}")
    return REGISTRY[backend]


def direct_backend(backend: Any, tensor: Tensor) -> Backend | None:
    """What takes a call on tensors of this device before it is checked, if that is what ``backend`` names."""
    if type(backend) is not str:
        return None
    return _first_choice(backend, "cpu" if tensor.is_cpu else "cuda" if tensor.is_cuda else "other")


@functools.cache
def _first_choice(backend: str, device: str) -> Backend | None:
    """What "auto" tries first on a device, of what runs here, where it is named and checks for itself."""
    running = (x for name, x in REGISTRY.items() if x.auto == device and unavailable(name) is None)
    first = next(running, None)
    return first if first is not None and backend in ("auto", first.name) and first.checks_itself else None
