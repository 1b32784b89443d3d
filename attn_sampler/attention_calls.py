"""One attention call of a model: its log-sum-exp, and how the open captures hear of it.

``AttentionCapture`` sees the calls of an eager model itself. Inside a compiled one, where no mode can see
them, they are an operator that looks for the open captures when the graph runs; an attention that is no call
of PyTorch's is handed over by ``report_attention``.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode


class _LogSumExpTap(TorchDispatchMode):
    """Reads the log-sum-exp off whatever operators an attention call runs."""

    # The fused operators return (output, logsumexp, ...). Some compute it on demand only: at this argument.
    _FUSED = {  # noqa: RUF012
        operator: [a.name for a in operator._schema.arguments].index("compute_log_sumexp")
        if "compute_log_sumexp" in str(operator._schema)
        else None
        for operator in (
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
            torch.ops.aten._scaled_dot_product_flash_attention.default,
            torch.ops.aten._scaled_dot_product_efficient_attention.default,
            torch.ops.aten._scaled_dot_product_cudnn_attention.default,
            torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,
        )
    }
    _SOFTMAX = (torch.ops.aten._safe_softmax.default, torch.ops.aten._softmax.default)
    # Under inference_mode these arrive whole.
    _COMPOSITE = (
        torch.ops.aten.scaled_dot_product_attention.default,
        torch.ops.aten._scaled_dot_product_attention_math.default,
    )

    softmax_lse: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in self._COMPOSITE:
            with self:
                return func.decompose(*args, **kwargs)
        if func in self._SOFTMAX:  # the math path: these are the biased and masked logits
            logits = args[0] if args[0].dtype == torch.float64 else args[0].float()
            self.softmax_lse = torch.logsumexp(logits, dim=-1)
        if func not in self._FUSED:
            return func(*args, **kwargs)
        on_demand = self._FUSED[func]
        if on_demand is not None:
            args = (*args[:on_demand], True, *args[on_demand + 1 :])
        result = func(*args, **kwargs)
        self.softmax_lse = result[1]
        return result


def attention_with_lse(query: Tensor, key: Tensor, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    """``F.scaled_dot_product_attention`` and the row log-sum-exp that it computes inside.

    Parameters
    ----------
    query, key, ...
        As in ``F.scaled_dot_product_attention``.

    Returns
    -------
    output, softmax_lse
        The very output of the call, and [B, Hq, M], natural logarithm, float32 (float64 for float64).

    Raises
    ------
    NotImplementedError
        The device's attention returns no log-sum-exp.
    """
    with _LogSumExpTap() as tap:
        output = F.scaled_dot_product_attention(query, key, *arguments, **keywords)
    if tap.softmax_lse is None:
        raise NotImplementedError(f"scaled_dot_product_attention gives no log-sum-exp on {query.device}")
    # Some kernels pad the rows, or add a last axis of 1.
    shape = query.shape[:-1]
    return output, tap.softmax_lse.narrow(len(shape) - 1, 0, shape[-1]).view(shape)


def report_attention(
    query: Tensor,
    key: Tensor,
    softmax_lse: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> None:
    """Hand an attention call that no mode can see to the captures open in this thread; none is no error.

    For an attention that knows its log-sum-exp: flash-attn, FlexAttention, a kernel of one's own. Inside a
    compiled model call ``torch.compiler.disable(report_attention)``, which breaks the graph.

    Parameters
    ----------
    query, key
        ``[B, Hq, M, D]`` and ``[B, Hkv, N, D]``, after RoPE.
    softmax_lse
        ``[B, Hq, M]``, natural logarithm, float32.
    attn_mask, is_causal, scale
        As in ``F.scaled_dot_product_attention``.

    Raises
    ------
    TypeError, ValueError
        As the reduction of ``AttentionCapture`` that receives it.
    """
    with torch._C.DisableTorchFunction():  # the captures' own mode is on
        for capture in open_captures():
            capture.add_call(
                softmax_lse, query, key, key, attn_mask=attn_mask, is_causal=is_causal, scale=scale
            )


def is_capturing() -> bool:
    """Whether this thread has a capture open, so that reporting to it is worth preparing."""
    return bool(open_captures())


_THREAD = threading.local()


def open_captures() -> list[Any]:
    """The ``AttentionCapture`` objects that are open in this thread, outermost first."""
    if not hasattr(_THREAD, "captures"):
        _THREAD.captures = []
    return _THREAD.captures


def compiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What an attention call becomes in a graph that is compiled while a capture is open."""
    query, key, value = autocast(query), autocast(key), autocast(value)
    attn_mask = None if attn_mask is None else autocast(attn_mask)
    return torch.ops.attn_sampler.captured_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    )


def autocast(x: Tensor) -> Tensor:
    """The tensor as ``F.scaled_dot_product_attention`` sees it under ``torch.autocast``."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype in (torch.float64, torch.bool):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _captured_attention(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    """The operator: the graph knows nothing of the captures, which it finds open when it runs."""
    keywords = dict(zip(_OPTIONS, options, strict=True))
    with torch._C.DisableTorchFunction():  # the captures' own mode is still on
        output, softmax_lse = attention_with_lse(query, key, value, **keywords)
        for capture in open_captures():
            # The graph uses the memory of its tensors again after this, their last use that it knows of.
            capture.add_call(softmax_lse, query, key, value, **keywords, copy=True)
    return output


def _captured_attention_autograd(*arguments: Any) -> Tensor:
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
        raise RuntimeError(
            "AttentionCapture carries no gradient through a model under torch.compile: run it under "
            "torch.no_grad()"
        )
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.attn_sampler.captured_attention(*arguments)


_OPTIONS = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_LIBRARY = torch.library.Library("attn_sampler", "FRAGMENT")
_LIBRARY.define(
    "captured_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p, "
    "bool is_causal, float? scale, bool enable_gqa) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else (),
)
_LIBRARY.impl("captured_attention", _captured_attention_autograd, "Autograd")
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("captured_attention", _captured_attention, _key)


@torch.library.register_fake("attn_sampler::captured_attention", lib=_LIBRARY)
def _captured_attention_fake(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, **dict(zip(_OPTIONS, options, strict=True)))
