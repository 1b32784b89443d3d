"""The backend of the Triton kernels, which are imported when first asked for."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from attn_sampler import reference
from attn_sampler.backends.base import Backend
from attn_sampler.checks import Span
from attn_sampler.options import Layer, Masks, Top

#: Where the kernels live: the functions of a backend, and ``refuses``.
MODULE = __name__.removesuffix(".backends.triton") + ".kernels"

#: What they need; an older Triton cannot import them.
OLDEST = "3.6"


class Triton(Backend):
    """CUDA and ROCm devices, and CPU tensors under TRITON_INTERPRET=1."""

    name = "triton"
    auto = "cuda"

    @property
    def device(self) -> str:
        """Interpreted, the kernels take CPU tensors."""
        return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        try:
            version = importlib.import_module("triton").__version__
            if TorchVersion(version) < OLDEST:
                return f"triton {version} is installed; the kernels need {OLDEST} or newer"
            self._kernels()
        except ImportError as error:
            if error.name == MODULE:
                return "this installation has no Triton kernels"
            return f"the Triton kernels cannot be imported ({error})"
        if self.device == "cuda" and not torch.cuda.is_available():
            return "torch sees no GPU (TRITON_INTERPRET=1 would run the kernels on CPU tensors)"
        return None

    def refuses(self, op: str, tensors: Sequence[Tensor]) -> str | None:
        return super().refuses(op, tensors) or self._kernels().refuses(op, tensors)

    def compiled_by(self, device: torch.device, calls: Callable[[], None]) -> int:
        return self._kernels().launch.compiled_by(device, calls)

    def function(self, op: str) -> Callable[..., None]:
        return self._top_columns if op == "top_columns" else getattr(self._kernels(), op)

    def _top_columns(self, out: reference.TopColumns, layer: Layer, masks: Masks, options: Top) -> None:
        """The scores by a kernel; the choice, which is little next to them, by PyTorch."""
        columns = options.attention.columns
        assert isinstance(columns, Span)  # of checked options
        size = *layer.q.shape[:2], columns.stop - columns.start
        scores = torch.empty(size, dtype=torch.float32, device=layer.q.device)
        self._kernels().column_scores(scores, layer, masks, options.attention._replace(per_head=True))
        how = options.count, options.sinks, options.recent, options.pool
        where = {"columns": slice(*columns), **masks._asdict()}
        groups = out.scores.shape[1]
        ordered = _ordered if size[2] <= 1 << 29 else None
        chosen = reference.choose_columns(scores, layer.k, groups, *how, ordered=ordered, **where)
        out.positions.copy_(chosen.positions)
        out.scores.copy_(chosen.scores)

    @staticmethod
    @functools.cache
    def _kernels() -> ModuleType:
        return importlib.import_module(MODULE)


def _ordered(rank: Tensor, scores: Tensor, count: int) -> Tensor:
    """What ``reference`` finds by sorting: no two keys are alike, so that a selection has one answer only.

    A key has the rank's 2 bits, the score's 32 as an integer of the same order, and the column's 29.
    """
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # of -0.0 those of 0.0
    level = torch.where(bits < 0, 0x7FFFFFFF & ~bits, bits + (1 << 31))
    column = torch.arange(scores.shape[-1], device=scores.device)
    return ((3 - rank.to(torch.int64)) << 61 | level << 29 | (1 << 29) - 1 - column).topk(count).indices


TRITON = Triton()
