"""One attention call of a model: its log-sum-exp, and how the open captures hear of it.

``AttentionCapture`` sees the calls of an eager model itself. Inside a compiled one, where no mode can see
them, they are an operator that looks for the open captures when the graph runs; an attention that is no call
of PyTorch's is handed over by ``report_attention``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from attn_sampler import checks
from attn_sampler.attention_masks import as_is_causal, is_causal_bias, read_mask


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


class Arguments(NamedTuple):
    """What ``F.scaled_dot_product_attention`` is called with."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def passed_to(self, attention: Callable[..., Any]) -> Any:
        *positional, scale, enable_gqa = self
        return attention(*positional, scale=scale, enable_gqa=enable_gqa)


class Call(NamedTuple):
    """An attention call as it was computed."""

    query: Tensor  # [B, Hq, M, D]
    key: Tensor  # [B, Hkv, N, D]
    softmax_lse: Tensor  # [B, Hq, M]
    attn_mask: Tensor | None
    is_causal: bool
    scale: float | None
    is_reported: bool = False  # the log-sum-exp is what its caller said, and may count a sink
    copy: bool = False  # the memory of its tensors is used again


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
    lse = tap.softmax_lse
    if lse is None:
        if query.numel() and key.numel():
            raise NotImplementedError(f"scaled_dot_product_attention gives no log-sum-exp on {query.device}")
        lse = query.new_full(output.shape[:-1], -torch.inf, dtype=torch.float32)
    # Some kernels pad the rows, or add a last axis of 1.
    lse = lse.squeeze(-1) if lse.dim() == output.dim() else lse
    return output, lse.narrow(-1, 0, output.shape[-2]).expand(output.shape[:-1])


def observe(given: Arguments) -> tuple[Tensor, Call | Exception]:
    """``F.scaled_dot_product_attention``, and the call for the captures, or why there is none."""
    query, key, value, attn_mask = given[:4]
    seen: Call | Exception
    if (reason := _unscorable(query, key, value, attn_mask)) is not None:
        seen = NotImplementedError(reason)
    else:
        try:
            output, lse = given.passed_to(attention_with_lse)
            mask = (
                attn_mask if attn_mask is None or not _is_plain(attn_mask) else autocast(attn_mask.detach())
            )
            # PyTorch repeats batches and heads that are 1; but the output of an empty batch has q's heads.
            batch, heads = output.shape[0], max(output.shape[1], key.shape[1])
            q = autocast(query.detach()).expand(batch, heads, -1, -1)
            k = autocast(key.detach()).expand(batch, -1, -1, -1)
            limits = as_is_causal(mask, given.is_causal)
            return output, Call(q, k, lse.detach().expand(batch, heads, -1), *limits, given.scale)
        except Exception as error:  # whatever it is, the model's own call is not to suffer from it
            seen = error
    return given.passed_to(F.scaled_dot_product_attention), seen


def _unscorable(query: Any, key: Any, value: Any, attn_mask: Any) -> str | None:
    """Why a call is left alone; None where it need not be."""
    for name, x in (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask)):
        if x is None or (name == "attn_mask" and is_causal_bias(x)):
            continue
        if not _is_plain(x):
            return f"{name} is a {type(x).__name__}, whose attention is its own"
        if torch._C._functorch.is_batchedtensor(x) or _is_tracked(x):
            return f"{name} stands for other tensors, inside a transform of torch.func"
        if x.is_nested or x.layout != torch.strided:
            return f"{name} is {'nested' if x.is_nested else 'sparse'}"
        if name != "attn_mask" and x.dim() != 4:
            return f"{name} is expected to be [B, H, M, D], and is {list(x.shape)}"
    return None


def _is_plain(x: Any) -> bool:
    return type(x) in (Tensor, torch.nn.Parameter)


def _is_tracked(x: Tensor) -> bool:
    """Whether torch.func differentiates it; a compiled graph knows that as a gradient."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_gradtrackingtensor(x)


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
        ``[B, Hq, M, D]`` and ``[B, Hkv, N, D]``, after RoPE, in the dtype that was computed with.
    softmax_lse
        ``[B, Hq, M]``, natural logarithm, float32. It may count an attention sink. A row of -inf saw nothing.
    attn_mask, is_causal, scale
        As in ``F.scaled_dot_product_attention``; a row that has no more than the lowest value saw nothing.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.
    """
    captures = open_captures()
    if not captures:
        return
    with torch._C.DisableTorchFunction():  # the captures' own mode is on
        query, key, softmax_lse = (
            checks.tensor(name, x, axes, dtypes).detach()
            for name, x, axes, dtypes in (
                ("query", query, "[B, Hq, M, D]", checks.ATTENTION_DTYPES),
                ("key", key, "[B, Hkv, N, D]", checks.ATTENTION_DTYPES),
                ("softmax_lse", softmax_lse, "[B, Hq, M]", (torch.float32, torch.float64)),
            )
        )
        checks.shape("softmax_lse", softmax_lse, "[B, Hq, M]", query.shape[:3])
        limits = as_is_causal(attn_mask, is_causal)
        call = Call(query, key, softmax_lse, *limits, scale, is_reported=True)
        for capture in captures:
            capture.add_call(call)


def is_capturing() -> bool:
    """Whether this thread has a capture open, so that reporting to it is worth preparing."""
    return bool(open_captures())


_THREAD = threading.local()


def open_captures() -> list[Any]:
    """The ``AttentionCapture`` objects that are open in this thread, outermost first."""
    if not hasattr(_THREAD, "captures"):
        _THREAD.captures = []
    return _THREAD.captures


#: PyTorch's call under another name, by which no mode takes it for the model's when the graph runs.
_PLAIN = torch.ops.aten.scaled_dot_product_attention.default


def compiled_attention(given: Arguments) -> Tensor:
    """What an attention call becomes in a graph that is compiled while a capture is open."""
    query, key, value, attn_mask = given[:4]
    attn_mask, is_causal = as_is_causal(attn_mask, given.is_causal)
    if is_causal_bias(attn_mask):
        visible = read_mask(attn_mask, is_causal, 1, 1, 1)
        attn_mask = visible.table(query.shape[2], key.shape[2], query.device)
    options = (is_causal, given.scale, given.enable_gqa)
    given = Arguments(query, key, value, attn_mask, given.dropout_p, *options)
    if not all(x is None or _is_plain(x) for x in given[:4]):
        return _observed_outside(given)
    reason = _unscorable(*given[:4])
    if reason is not None:
        output = given.passed_to(_PLAIN)
        return torch.ops.attn_sampler.observed_attention(output, None, None, None, None, *options, reason)
    tensors = [None if x is None else autocast(x) for x in given[:4]]
    if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)):
        return torch.ops.attn_sampler.captured_attention(*tensors, given.dropout_p, *options)
    # PyTorch's own call carries the gradient; the captures have it computed once more.
    output = given.passed_to(_PLAIN)
    tensors = [None if x is None else x.detach() for x in tensors]
    return torch.ops.attn_sampler.observed_attention(output, *tensors, *options, None)


@torch._disable_dynamo  # torch.compiler.disable takes seconds to import what it needs
def _observed_outside(given: Arguments) -> Tensor:
    """A call of tensor subclasses, which no operator of ours takes: it breaks the graph."""
    output, seen = observe(given)
    _tell(seen)
    return output


def autocast(x: Tensor) -> Tensor:
    """The tensor as ``F.scaled_dot_product_attention`` sees it under ``torch.autocast``."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype in (torch.float64, torch.bool):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _tell(seen: Call | Exception) -> None:
    # The graph uses the memory of its tensors again after this, their last use that it knows of.
    seen = seen._replace(copy=True) if isinstance(seen, Call) else seen
    for capture in open_captures():
        capture.add_call(seen)


def _captured_attention(*arguments: Any) -> Tensor:
    """The operator: the graph knows nothing of the captures, which it finds open when it runs."""
    with torch._C.DisableTorchFunction():  # the captures' own mode is still on
        output, seen = observe(Arguments(*arguments))
        _tell(seen)
    return output


def _observed_attention(output: Tensor, query: Tensor | None, *rest: Any) -> Tensor:
    """The operator beside a call of PyTorch's, whose output it hands on: observed, or the reason why not."""
    key, value, attn_mask, is_causal, scale, enable_gqa, reason = rest
    with torch._C.DisableTorchFunction():
        if query is None:
            _tell(NotImplementedError(reason))
        else:
            _tell(observe(Arguments(query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa))[1])
    return output.clone()


def _captured_attention_autograd(*arguments: Any) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.attn_sampler.captured_attention(*arguments)


_LIBRARY = torch.library.Library("attn_sampler", "FRAGMENT")
_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
_LIBRARY.define(
    "captured_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p, "
    "bool is_causal, float? scale, bool enable_gqa) -> Tensor",
    tags=_TAGS,
)
_LIBRARY.define(
    "observed_attention(Tensor output, Tensor? query, Tensor? key, Tensor? value, Tensor? attn_mask, "
    "bool is_causal, float? scale, bool enable_gqa, str? reason) -> Tensor",
    tags=_TAGS,
)
_LIBRARY.impl("captured_attention", _captured_attention_autograd, "Autograd")
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("captured_attention", _captured_attention, _key)
    _LIBRARY.impl("observed_attention", _observed_attention, _key)
_OBSERVED = "attn_sampler::observed_attention"
torch.library.register_fake(_OBSERVED, lambda output, *_: torch.empty_like(output), lib=_LIBRARY)
torch.library.register_autograd(_OBSERVED, lambda _, gradient: (gradient, *[None] * 8), lib=_LIBRARY)


@torch.library.register_vmap(_OBSERVED, lib=_LIBRARY)
def _observed_attention_vmap(info: Any, in_dims: tuple, output: Tensor, *rest: Any) -> tuple[Tensor, Any]:
    return torch.ops.attn_sampler.observed_attention(output, *rest), in_dims[0]


@torch.library.register_fake("attn_sampler::captured_attention", lib=_LIBRARY)
def _captured_attention_fake(*arguments: Any) -> Tensor:
    return Arguments(*arguments).passed_to(F.scaled_dot_product_attention)
