"""How the kernels are launched: the device's class and size, and the static table of launch parameters.

Nothing is tuned at run time. ``TABLE`` holds one ``Config`` for each kernel, architecture class and shape
class; ``bench/tune_triton.py`` measures the candidates of a device and prints the entries to put here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

#: True where kernels are interpreted on CPU tensors (TRITON_INTERPRET=1 when triton was imported).
INTERPRET: bool = triton.knobs.runtime.interpret

#: Rows of all heads, keys, and positions: the kernels compute with sums of two in 32 bits.
MAX_POSITIONS = 1 << 29
_MAX_PROGRAMS = (1 << 31) - 1

# The interpreter runs programs one after the other: few of them, but more than one of everything.
_INTERPRETER_PROCESSORS = 4


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


@functools.cache
def architecture(device: torch.device) -> str:
    """Architecture class: "sm80" (8.x), "sm90", "sm100" (10.x), "sm120" (12.x), "hip", or "other"."""
    if device.type != "cuda":
        return "other"
    if torch.version.hip is not None:
        return "hip"
    major, _ = torch.cuda.get_device_capability(device)
    return f"sm{major}0"


@functools.cache
def processors(device: torch.device) -> int:
    """Number of multiprocessors (compute units) of the device."""
    if device.type != "cuda":
        return _INTERPRETER_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


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
    return INTERPRET or device.type == "cuda"


def launch(
    kernel: Any,
    programs: int,
    arguments: Mapping[str, object],
    parameters: Config,
    *,
    device: torch.device,
    fuse_multiply_add: bool = True,
) -> None:
    """Start ``programs`` programs of a kernel on the device's current stream."""
    if programs > _MAX_PROGRAMS:
        raise ValueError(
            f"backend: a launch takes at most {_MAX_PROGRAMS} programs, and these are {programs}"
        )
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        kernel[(programs,)](
            **arguments,
            num_warps=parameters.num_warps,
            num_stages=parameters.num_stages,
            enable_fp_fusion=fuse_multiply_add,
        )


def workspace(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uninitialised memory for partial results.

    It comes from torch's caching allocator on the current stream, so under CUDA graph capture it belongs to
    the graph, and nothing outlives or outruns the launches that use it.
    """
    return torch.empty(shape, dtype=dtype, device=device)
