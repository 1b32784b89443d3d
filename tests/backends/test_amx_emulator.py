"""The emulator on which the AMX kernels run where the processor has no AMX (support/amx_emulator.cpp).

It executes the instructions that the compiler made, as Intel's manual describes them: that says nothing of
the unit itself. The contract's tests run on it at the place cpu@amx-emulated.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import subprocess
import sys

import pytest
import torch
from places import PLACES, emulated_amx
from problems import normal, row_lse

from attn_sampler import column_scores


def test_instructions(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Addressing, arithmetic and refusals against values worked out by hand."""
    place = PLACES["cpu@amx-emulated"]
    if (reason := place.unavailable() or place.left_out()) is not None:
        pytest.skip(reason)
    program = emulated_amx(tmp_path_factory) / "amx_emulator_check"
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"\d+ checks\n", result.stdout)


@pytest.mark.parametrize(
    ("error", "isa", "reason"),
    [
        (0, "amx", "None"),
        (
            errno.ENOSPC,
            "avx512_bf16",
            "the signal stack of a thread of this program (sigaltstack) has no room",
        ),
        (errno.EPERM, "avx512_bf16", "the operating system refuses its registers: Operation not permitted"),
    ],
)
def test_a_unit_that_the_system_refuses(tmp_path_factory, error: int, isa: str, reason: str) -> None:
    """Other kernels serve then, and it can be known why. What the system answers is made up."""
    place = PLACES["cpu@amx-emulated"]
    if (why := place.unavailable() or place.left_out()) is not None:
        pytest.skip(why)
    code = "import sys; sys.path.append(sys.argv[1]); import _C; print(_C.cpu_isa(), _C.cpu_amx_refusal())"
    command = [sys.executable, "-c", code, str(emulated_amx(tmp_path_factory))]
    environment = {**os.environ, "ATTN_SAMPLER_EMULATED_AMX_ERROR": str(error), "ATTN_SAMPLER_CPU_ISA": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.startswith(f"{isa} {reason}")


@pytest.mark.places("cpu@amx-emulated")
def test_kernels_reach_the_tiles(backend: str) -> None:
    import attn_sampler._C

    products = ctypes.CDLL(attn_sampler._C.__file__).amx_emulator_products
    products.restype = ctypes.c_uint64
    before = products()
    q = normal(0, 1, 2, 128, 64, dtype=torch.bfloat16)
    k = normal(1, 1, 2, 256, 64, dtype=torch.bfloat16)
    column_scores(q, k, softmax_lse=row_lse(q, k), backend=backend)
    heads, rows, columns, elements = 2, 128 // 16, 256 // 16, 64 // 32  # in tiles
    assert products() - before == heads * rows * columns * elements
