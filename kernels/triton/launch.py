"""How the kernels are launched: how work is cut, what class a device is of, and the table of parameters.

Nothing is tuned at run time. ``TABLE`` holds one ``Config`` for each kernel, architecture class and shape
class; ``bench/tune_triton.py`` measures the candidates of a device and prints the entries to put here.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

#: True where kernels are interpreted on CPU tensors (TRITON_INTERPRET=1 when triton was imported).
INTERPRET: bool = triton.knobs.runtime.interpret

#: Rows of all heads, keys, and positions: the kernels compute with sums of two in 32 bits.
MAX_POSITIONS = 1 << 29
_MAX_PROGRAMS = (1 << 31) - 1

# Two for each multiprocessor of a large GPU; see ``parts``.
_PROGRAMS = 264


class Config(NamedTuple):
    """Tile sizes and launch parameters of one kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


#: (kernel, architecture class or "any", shape class) -> Config. A device's own class goes before "any".
TABLE: dict[tuple[str, str, str], Config] = {
    # block_n keys resident, query rows streamed.
    ("column_scores", "any", "narrow"): Config(32, 32, 4, 3),
    ("column_scores", "sm90", "narrow"): Config(64, 32, 4, 3),
    ("column_scores", "any", "wide"): Config(64, 64, 4, 3),
    ("column_scores", "any", "deep"): Config(32, 32, 4, 1),
    ("column_scores", "any", "float32"): Config(16, 32, 4, 1),
    ("column_scores", "any", "float8"): Config(32, 32, 4, 3),
    # block_m query rows resident, keys streamed.
    ("row_lse", "any", "narrow"): Config(32, 64, 4, 3),
    ("row_lse", "any", "wide"): Config(64, 64, 4, 3),
    ("row_lse", "sm90", "wide"): Config(128, 64, 8, 3),
    ("row_lse", "sm100", "wide"): Config(128, 64, 8, 3),
    ("row_lse", "any", "deep"): Config(32, 32, 4, 2),
    ("row_lse", "any", "float32"): Config(32, 32, 8, 1),
    ("row_lse", "any", "float8"): Config(64, 64, 4, 3),
    # One tile of the map for each program.
    ("attention_map", "any", "narrow"): Config(32, 32, 4, 2),
    ("attention_map", "any", "wide"): Config(64, 64, 4, 2),
    ("attention_map", "any", "deep"): Config(32, 32, 4, 2),
    ("attention_map", "any", "float32"): Config(32, 32, 8, 1),
    ("attention_map", "any", "float8"): Config(64, 64, 4, 2),
    # A tile of rows for each program, which walks along the columns.
    ("reduced_map", "any", "narrow"): Config(32, 32, 4, 2),
    ("reduced_map", "any", "wide"): Config(64, 64, 8, 2),
    ("reduced_map", "any", "deep"): Config(32, 32, 4, 2),
    ("reduced_map", "any", "float32"): Config(32, 32, 8, 1),
    ("reduced_map", "any", "float8"): Config(64, 64, 8, 2),
    # block_n lanes, block_m tokens for each of them in one iteration.
    ("token_confidence", "any", "narrow"): Config(4, 1024, 4, 1),
    ("token_confidence", "any", "float32"): Config(4, 512, 4, 1),
}


def attention_class(size: int, headdim: int, element_size: int) -> str:
    """Shape class of a kernel whose tiles are cut out of so many columns (or packed rows)."""
    if element_size == 4:
        return "float32"
    if headdim > 128:
        return "deep"
    if element_size == 1:
        return "float8"
    return "narrow" if size <= 32 else "wide"


def config(kernel: str, shape_class: str, device: torch.device) -> Config:
    """The table's entry for a kernel on a device."""
    own = TABLE.get((kernel, architecture(device), shape_class))
    return own or TABLE[kernel, "any", shape_class]


def architecture(device: torch.device) -> str:
    """Architecture class: "sm80" (8.x), "sm90", "sm100" (10.x), "sm120" (12.x), "hip", or "other". On meta
    that of the current device, which is compiled for."""
    if device.type == "meta":
        device = torch.device("cuda", torch.cuda.current_device())
    return _architecture(device)


@functools.cache
def _architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "other"
    if torch.version.hip is not None:
        return "hip"
    major, _ = torch.cuda.get_device_capability(device)
    return f"sm{major}0"


def parts(programs: int, units: int, least: int) -> int:
    """Into how many parts at the most the ``units`` of work of each of a sequence's programs are cut.

    Sums are rounded by where they are cut, so every cut is made here, from the shapes of one sequence (and
    one layer) and from nothing else: its bits depend neither on what else is in the batch, nor on the
    device's size, nor on how many layers a call has. One sequence alone fills a large GPU then, where it has
    that much work: ``_PROGRAMS`` programs, not more. In a large batch the parts are as many as if the
    sequence were alone; what keeps them from being too small is ``least``, the units that each has at the
    least, which the kernels choose such that a part's own cost (its prologue, its partial result) is small
    beside them.

    The same bits are promised to operands of the same strides and alignment: these may change in which
    layout a tile is read and added up.
    """
    return max(1, min(_PROGRAMS // max(programs, 1), units // least))


# Triton's own functions of these names cost microseconds a call outside of a kernel.
def cdiv(x: int, y: int) -> int:
    """x / y, rounded up."""
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """The least power of two that is n >= 1 or more."""
    return 1 << (n - 1).bit_length()


@functools.cache
def block_d(headdim: int, element_size: int) -> int:
    """Size of the chunks that the head dimension is cut in: a power of two, from 16 to 128.

    Chosen for the least padded work, each chunk costing about as much as 8 elements of padding: 96 is 3 x 32
    and 192 is 3 x 64, but 100 is 1 x 128.
    """
    sizes = (32, 16) if element_size == 4 else (128, 64, 32, 16)
    return min(sizes, key=lambda size: cdiv(headdim, size) * (size + 8))


def converts_float8(device: torch.device) -> bool:
    """Whether e4m3 is a type of the device, and its conversion an instruction (8.9 counts as 8.0)."""
    return architecture(device) in ("sm90", "sm100", "sm120")


def last_program_commits(device: torch.device) -> bool:
    """Whether a kernel's last program may read what its other programs wrote.

    It needs a release-acquire increment at the device's scope, which CUDA and HIP devices have; elsewhere a
    decoding step is finished in one more launch.
    """
    return INTERPRET or device.type in ("cuda", "meta")


def launch(
    kernel: Any,
    programs: int,
    arguments: Mapping[str, object],
    parameters: Config,
    *,
    device: torch.device,
    fuse_multiply_add: bool = True,
) -> None:
    """Start ``programs`` programs of a kernel on the device's current stream. For operands on meta it is
    compiled, and nothing is started."""
    if programs > _MAX_PROGRAMS:
        raise ValueError(
            f"backend: a launch takes at most {_MAX_PROGRAMS} programs, and these are {programs}"
        )
    how = {
        "num_warps": parameters.num_warps,
        "num_stages": parameters.num_stages,
        "enable_fp_fusion": fuse_multiply_add,
    }
    if device.type == "meta":
        _compile(kernel, programs, {**arguments, **how})
        return
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    try:
        with on_device:
            kernel[(programs,)](**arguments, **how)
    except BaseException:
        _TICKETS.of_stream.clear()  # whatever it had counted
        raise


class _Compiled(threading.local):
    """By this thread."""

    count = 0


_COMPILED = _Compiled()


def _compile(kernel: Any, programs: int, arguments: Mapping[str, object]) -> None:
    """What a launch does before it starts anything: look for the variant, or compile and load it."""
    variants = kernel.device_caches[triton.runtime.driver.active.get_current_device()][0]
    known = len(variants)
    binary = kernel.warmup(**arguments, grid=(programs,))
    if len(variants) > known:
        _ = binary.run  # loads it
        _COMPILED.count += 1


def compiled_by(device: torch.device, calls: Callable[[], None]) -> int:
    """How many kernels were compiled for the device by some calls on meta tensors."""
    if INTERPRET:
        return 0
    before = _COMPILED.count
    with torch.cuda.device(device):
        calls()
    return _COMPILED.count - before


def workspace(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uninitialised memory for partial results.

    It comes from torch's caching allocator on the current stream, so under CUDA graph capture it belongs to
    the graph, and nothing outlives or outruns the launches that use it.
    """
    return torch.empty(shape, dtype=dtype, device=device)


class _Tickets(threading.local):
    """Of one thread: where its launches count."""

    def __init__(self) -> None:
        self.of_stream: dict[tuple[torch.device, int], Tensor] = {}


_TICKETS = _Tickets()


def tickets(device: torch.device, count: int) -> Tensor:
    """At least ``count`` int32 counters for one launch on the current stream, all 0 when it starts.

    They are 0 again when it ends: the last program that counts at one sets it back (``tile.is_last``). So one
    tensor, zeroed once, serves all launches of a stream, which run one after another; no launch has to zero
    it. Each stream has its own, and each thread, as different streams of two threads may bear the same
    number. A graph may be replayed on any stream, beside whatever runs there: what is captured has counters
    of its own, zeroed by the graph. A kernel that starts runs to its end, or its context is lost; where a
    launch fails before or while it starts, the counters are forgotten (``launch``).
    """
    stream = 0
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                return torch.zeros(count, dtype=torch.int32, device=device)
            stream = torch.cuda.current_stream().cuda_stream
    kept = _TICKETS.of_stream.get((device, stream))
    if kept is None or kept.numel() < count:
        kept = torch.zeros(max(4096, next_power_of_2(count)), dtype=torch.int32, device=device)
        _TICKETS.of_stream[device, stream] = kept
    return kept
