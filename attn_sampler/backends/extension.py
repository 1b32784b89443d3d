"""The backends of the compiled extension ``attn_sampler._C``: its CPU and its CUDA kernels.

The extension knows nothing of torch: it reads tensors by DLPack's C exchange, or is handed their addresses,
shapes and strides; records it reads by place; and on CUDA it is handed the stream and a workspace. It checks
everything itself, so ``attempt`` hands it what the caller gave.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attn_sampler.backends.base import Backend
from attn_sampler.checks import Span
from attn_sampler.options import MAX_HEADDIM

try:
    import attn_sampler._C as _C
except ImportError as error:
    #: Why the extension cannot be used; None where it can.
    UNAVAILABLE: str | None = (
        f"the compiled extension attn_sampler._C is not installed ({error}); in a clone, pip install -e . "
        "builds it in place"
    )
else:
    UNAVAILABLE = None

#: Whether the extension reads torch's tensors itself. Of an older torch it is handed their fields.
READS_TENSORS = UNAVAILABLE is None and _C.read_tensors_of(Tensor)


def _find_flags() -> bool:
    """Show the extension where a tensor says that it is negated, or zeros without memory; else it asks."""
    plain = torch.zeros(1)
    try:
        samples = [plain, torch._neg_view(plain), torch._efficientzerotensor(1)]
        words = [torch._C._dispatch_keys(x).raw_repr() for x in samples]
    except AttributeError:  # another torch keeps them elsewhere
        return False
    bits = (words[1] | words[2]) & ~words[0]
    return _C.find_flags([(x, x._cdata, word) for x, word in zip(samples, words, strict=True)], bits)


if READS_TENSORS:
    _find_flags()

# The values of attn_sampler_dtype in csrc/include/attn_sampler.h.
_DTYPE = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.int64: 3,
    torch.bool: 4,
    torch.float8_e4m3fn: 5,
    torch.uint8: 6,
    torch.int32: 7,
}

#: Device memory, with counters at 0 at its start, for what the kernels pass on to one another, by device and
#: stream.
_workspaces: dict[tuple[int, int], Tensor] = {}


class _OfThread(threading.local):
    """The same for the stream that each thread calls its own by one handle (cudaStreamPerThread)."""

    HANDLE = 2

    def __init__(self) -> None:
        self.workspaces: dict[tuple[int, int], Tensor] = {}


_of_thread = _OfThread()


def cpu_isa() -> str:
    """The instruction set that the CPU kernels run with here."""
    return _C.cpu_isa()


@functools.cache
def _cuda_device_unavailable(index: int) -> str | None:
    """Why the CUDA kernels do not run on a device, such as one of an architecture without code."""
    return _C.cuda_device_unavailable(index)


def cpu_amx_refusal() -> str | None:
    """Why the processor's AMX unit does not serve; None where it does, or there is none."""
    return _C.cpu_amx_refusal()


class Extension(Backend):
    """The kernels of one device, up to a head dimension."""

    checks_memory = True

    def __init__(self, device: str, max_headdim: float) -> None:
        self.name = self.auto = device
        self._max_headdim = max_headdim

    @property
    def checks_itself(self) -> bool:  # type: ignore[override]
        return READS_TENSORS

    def unavailable(self) -> str | None:
        return UNAVAILABLE or getattr(_C, f"{self.name}_unavailable")()

    def refuses(self, op: str, tensors: Sequence[Tensor]) -> str | None:
        index = tensors[0].get_device() if self.name == "cuda" and tensors else -1
        if index >= 0 and (reason := _cuda_device_unavailable(index)) is not None:
            return reason
        if any(x.dim() == 4 and x.shape[-1] > self._max_headdim for x in tensors):
            return f"its kernels take head dimensions up to {self._max_headdim}"
        return super().refuses(op, tensors)

    def attempt(self, op: str, *arguments: Any) -> bool:
        try:
            _run(getattr(_C, op), arguments[0], arguments)
        except _C.Refused:
            return False
        return True

    def function(self, op: str) -> Callable[..., None]:
        return functools.partial(_run_views, getattr(_C, op))


def _run_views(function: Callable[..., int], *arguments: Any) -> None:
    _run(function, arguments[0], tuple(map(_view, arguments)))


def _view(x: Any) -> Any:
    """The argument with what the extension reads in place of each tensor, None in place of no layers."""
    if isinstance(x, Tensor):
        is_read = READS_TENSORS and type(x) is Tensor
        return x if is_read else _C.TensorView(x.data_ptr(), _DTYPE[x.dtype], x.shape, x.stride())
    if isinstance(x, (tuple, list)) and not isinstance(x, Span):
        return tuple(map(_view, x)) or None
    return x


def _run(function: Callable[..., int], out: Any, arguments: tuple) -> None:
    """Run a function of the extension on the device of its output, on CUDA on torch's current stream."""
    like = out[0] if isinstance(out, tuple) else out
    if like.is_cpu:
        function(*arguments, (0, torch.get_num_threads(), 0, 0, 0, 0))
        return
    index = like.get_device()
    if index < 0:
        raise _C.Refused("an output is neither on the CPU nor on a CUDA device")
    # What torch.cuda.current_stream(index).cuda_stream is, without an object made for it.
    stream = torch._C._cuda_getCurrentRawStream(index)
    # A captured graph outlives this call and may be replayed beside others: it has memory of its own.
    capturing = torch.cuda.is_current_stream_capturing()
    workspaces = _workspaces if stream != _OfThread.HANDLE else _of_thread.workspaces
    workspace = None if capturing else workspaces.get((index, stream))
    address, size = (0, 0) if workspace is None else (workspace.data_ptr(), workspace.numel())
    try:
        while needed := function(*arguments, (1, 1, index, stream, address, size)):
            workspace = torch.empty(needed, dtype=torch.uint8, device=like.device)
            workspace[: _C.WORKSPACE_ZEROS].zero_()  # in a captured graph it is done in each replay
            if not capturing:
                workspaces[index, stream] = workspace
            address, size = workspace.data_ptr(), needed
    except _C.Refused:
        raise
    except BaseException:  # launches may have failed half-way, and left counters that are not zero
        workspaces.pop((index, stream), None)
        raise


CPU, CUDA = Extension("cpu", math.inf), Extension("cuda", MAX_HEADDIM)
