"""What a backend is."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

OPS = ("column_scores", "attention_map", "top_columns", "token_confidence", "select_tokens", "decode_step")


class Backend(abc.ABC):
    """A way to run the functions."""

    name: str
    #: The type of device on whose tensors "auto" tries it; None: it serves whatever is left.
    auto: str | None
    #: Whether ``attempt`` takes arguments that nobody has checked.
    checks_itself = False
    #: Whether its functions refuse an output in the memory of an input.
    checks_memory = False
    #: Whether torch writes the outputs, and so counts that: autograd then knows of it.
    counts_writes = False

    @property
    def device(self) -> str | None:
        """The type of device whose tensors it takes; None: any."""
        return self.auto

    def unavailable(self) -> str | None:
        """Why this machine or installation cannot run it at all; None where it can."""
        return None

    def refuses(self, op: str, tensors: Sequence[Tensor]) -> str | None:
        """Why it does not serve op on these floating-point tensors (q and k; logits; scores and confidence;
        of a step logits, then q and k of all layers); None where it does."""
        own = self.device
        for tensor in tensors:
            if tensor.device.type != own:
                return f"it takes {own} tensors, and one here is on {tensor.device}"
            if tensor.dtype == torch.float64:
                return "it does not serve float64 (the reference does)"
            if op != "select_tokens" and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
                return (
                    "it reads tensors whose last dimension is contiguous, "
                    f"and one here has strides {tuple(tensor.stride())} (call .contiguous())"
                )
        return None

    def attempt(self, op: str, *arguments: Any) -> bool:
        """Run op on unchecked arguments; False, and nothing is written, if they are not plainly right."""
        return False

    def compiled_by(self, device: torch.device, calls: Callable[[], None]) -> int:
        """Make calls of its functions on meta tensors, which stand for some on the device: how many kernels
        were compiled. Nobody needs them where nothing is compiled at run time."""
        return 0

    @abc.abstractmethod
    def function(self, op: str) -> Callable[..., None]:
        """What runs op on checked arguments, and writes into the first of them:

        - ``column_scores(out, layer, masks, options)`` and ``attention_map(out, layer, masks, options)``
        - ``top_columns(out, layer, masks, options)`` with a ``TopColumns`` as out
        - ``token_confidence((token_ids, confidence, log_prob, current), logits, current_ids, options)``,
        current
          and current_ids both None or neither
        - ``select_tokens(out, scores, confidence, masked, current, differs, options)`` with a ``Selected`` as
          out; revised, budget, current and differs are all None or none
        - ``decode_step(out, logits, layers, masks, options)`` with a ``StepResult`` as out, whose last four
        are
          all None or none, and a list of layers, empty where the scores of out are given

        The options are ``Attention``, ``Top``, ``Sampling``, ``Selection`` and ``Step`` of
        ``attn_sampler.options``.
        """
