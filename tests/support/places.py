"""Where the tests of a backend run: in this process, or in one of its own that is set up for it.

A test that takes the fixture ``backend`` runs once for each place. What the tests need of the package's
insides to know what runs here, this file alone knows.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cmake_build import CPU_ISAS, build_once, python_module

from attn_sampler.backends import REGISTRY, extension
from attn_sampler.backends import unavailable as backend_unavailable

TESTS = Path(__file__).resolve().parents[1]


def _nothing(*_: object) -> None:
    return None


class Place(NamedTuple):
    #: What tests are given as their ``backend``.
    backend: str
    #: The files whose tests run there, each with a pattern of the tests' names; None: all, in this process.
    tests: Mapping[str, str] | None = None
    #: Set in the environment of the process.
    environment: Mapping[str, str] = {}
    #: Why it cannot run here.
    unavailable: Callable[[], str | None] = _nothing
    #: Why it is left out unless asked for by name: another place runs the same.
    left_out: Callable[[], str | None] = _nothing
    #: Further ones of its pytest.
    options: tuple[str, ...] = ()
    #: Of the tests that differ by their seed alone, one in so many runs: what is interpreted takes its time.
    one_seed_in: int = 1
    #: A pattern of test cases that do not run there: they take long and tell no more than those that do.
    without: str | None = None
    #: The kind and the arguments of what stands in for the extension (stand_ins.py), which it builds.
    stand_in: Callable[[pytest.TempPathFactory], tuple | None] = _nothing


def device_of(backend: str) -> torch.device:
    """Where the tensors of a test of this backend live."""
    return torch.device(REGISTRY[backend].device or "cpu")


def cpu_isa() -> str:
    """The instruction set that the backend cpu runs with in this process."""
    return extension.cpu_isa()


def _local(backend: str) -> Place:
    return Place(backend, unavailable=lambda: backend_unavailable(backend))


# --- The instruction sets that the CPU kernels can be pinned to.


@functools.cache
def _isas_here() -> str | None:
    """What ATTN_SAMPLER_CPU_ISA may ask for on this machine: the names, as the extension lists them where it
    is asked for another. None without the extension."""
    spec = importlib.util.find_spec("attn_sampler._C")
    if spec is None or spec.origin is None:
        return None
    code = "import sys; sys.path.append(sys.argv[1]); import _C; print(_C.cpu_unavailable())"
    command = [sys.executable, "-c", code, str(Path(spec.origin).parent)]
    environment = {**os.environ, "ATTN_SAMPLER_CPU_ISA": "none of them"}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    found = re.search(r"expected one of (.*) here", answer)
    assert found is not None, answer
    return found[1]


def _isa_unavailable(isa: str) -> str | None:
    here = _isas_here()
    if here is None:
        return backend_unavailable("cpu")
    return None if isa in here.split(", ") else f"this processor, with what was compiled, has {here}"


def _is_the_processors_own(isa: str) -> str | None:
    if backend_unavailable("cpu") is None and cpu_isa() == isa:
        return "the backend cpu runs with it"
    return None


def _emulator_unavailable() -> str | None:
    if (reason := _isa_unavailable("avx512_bf16")) is not None:
        return f"the code around the tiles needs avx512_bf16, and {reason}"
    compiler = (os.environ.get("CXX", "c++"), "-mamx-bf16", "-fsyntax-only", "-x", "c++", os.devnull)
    return "the compiler has no AMX" if subprocess.run(compiler, capture_output=True).returncode else None


def _has_amx() -> str | None:
    return "this processor has AMX: cpu@amx uses the unit itself" if _isa_unavailable("amx") is None else None


def emulated_amx(factory: pytest.TempPathFactory) -> Path:
    """The folder of a build whose AMX kernels run on an emulator (amx_emulator.cpp)."""
    options = ("-DATTN_SAMPLER_CUDA=0", "-DATTN_SAMPLER_EMULATE_AMX=ON", "-DATTN_SAMPLER_WERROR=ON")
    return build_once(factory, "emulate_amx", *python_module(), *options)[0]


def _isa(isa: str) -> Place:
    return Place(
        "cpu",
        {
            **dict.fromkeys(
                (COLUMN_SCORES, ATTENTION_MAP, TOKEN_CONFIDENCE, DECODE_STEP, LOGIT_RANGE, WINDOWS), ""
            ),
            REVISION: "reduced|column_mask|tell_of|parts",  # the rest is the same on all
            PAGED_KEYS: "random_problems|layouts|same_bits",
            TOP_COLUMNS: "random_problems|same_bits",
            ROW_SAMPLING: "random_problems|real_model",
        },
        {"ATTN_SAMPLER_CPU_ISA": isa},
        unavailable=lambda: _isa_unavailable(isa),
        left_out=lambda: _is_the_processors_own(isa),
    )


# --- Triton either interprets kernels or compiles them, decided when it is imported.


def _triton_unavailable() -> str | None:
    reason = backend_unavailable("triton")
    # The interpreter and the compiler do without.
    return None if reason is not None and reason.startswith("torch sees no GPU") else reason


def _triton_runs_here() -> str | None:
    return "the backend triton runs in this process" if backend_unavailable("triton") is None else None


# --- The CUDA kernels' own sources, compiled as C++ and run on the CPU, one fiber a thread.


def cuda_host(factory: pytest.TempPathFactory) -> Path:
    """The extension whose CUDA kernels run on the CPU (cuda_host/), where its backend cpu calls them."""
    folder, _ = build_once(factory, "cuda_host", *CUDA_HOST, *python_module())
    (module,) = folder.glob("_C.*.so")
    return module


def _cuda_host(device: int, tests: Mapping[str, str]) -> Place:
    return Place(
        "cpu",
        tests,
        {"OMP_NUM_THREADS": "1", "ATTN_SAMPLER_CPU_ISA": ""},
        one_seed_in=3,
        stand_in=lambda factory: ("CudaHost", cuda_host(factory), device),
    )


CUDA_HOST = (
    *("-DATTN_SAMPLER_CUDA=host", "-DATTN_SAMPLER_WGMMA=ON"),
    *("-DATTN_SAMPLER_X86=OFF", "-DATTN_SAMPLER_WERROR=ON"),
)
WITH_WGMMA, WITHOUT_WGMMA = 0, 1  # devices

COLUMN_SCORES, ATTENTION_MAP = "contract/test_column_scores.py", "contract/test_attention_map.py"
TOKEN_CONFIDENCE, SELECT_TOKENS = "contract/test_token_confidence.py", "contract/test_select_tokens.py"
DECODE_STEP, ERRORS = "contract/test_decode_step.py", "contract/test_errors.py"
PAGED_KEYS, TOP_COLUMNS = "contract/test_paged_keys.py", "contract/test_top_columns.py"
LOGIT_RANGE, OPERANDS = "contract/test_logit_range.py", "contract/test_operands.py"
WINDOWS, REVISION = "contract/test_windows.py", "contract/test_revision.py"
ROW_SAMPLING = "contract/test_row_sampling.py"
#: All but what says nothing there: programs run one after another, alike in every run, and the noise of
#: samples is compared with the CPU's bit by bit.
INTERPRETED = "^(?!.*(reruns_give_the_same_bits|samples_follow_the_softmax))"
#: Of what each row is asked: not once more what is refused before any kernel.
DRAWS = "random_problems|real_model|of_rows|of_each|as_alone|bits|no_token"
FUNCTIONS = (COLUMN_SCORES, ATTENTION_MAP, WINDOWS, TOKEN_CONFIDENCE, SELECT_TOKENS, DECODE_STEP)
CUDA_GRAPHS = "backends/test_cuda_graphs.py"
TABLE, AMX_EMULATOR = "backends/test_backends.py", "backends/test_amx_emulator.py"
TRITON_KERNELS, TRITON_COMPILE = "backends/test_triton_kernels.py", "backends/test_triton_compile.py"

PLACES = {
    "reference": _local("reference"),
    "cpu": _local("cpu"),
    **{f"cpu@{isa}": _isa(isa) for isa in CPU_ISAS},
    "cpu@amx-emulated": Place(
        "cpu",
        {
            **dict.fromkeys((COLUMN_SCORES, ATTENTION_MAP, LOGIT_RANGE, AMX_EMULATOR), ""),
            REVISION: "reduced|column_mask",
            PAGED_KEYS: "random_problems|layouts|same_bits",
        },
        {"ATTN_SAMPLER_CPU_ISA": "amx"},
        unavailable=_emulator_unavailable,
        left_out=_has_amx,
        options=("-p", "no:faulthandler"),  # it would take the signal that the emulator needs
        stand_in=lambda factory: ("EmulatedAmx", *emulated_amx(factory).glob("_C.*.so")),
    ),
    "triton": _local("triton"),
    "triton@interpreter": Place(
        "triton",
        {
            **dict.fromkeys((*FUNCTIONS, REVISION, LOGIT_RANGE, ERRORS, TABLE, TRITON_KERNELS), INTERPRETED),
            OPERANDS: "anywhere|counted|interleaved|memory_of",  # the rest is before any kernel
            TOP_COLUMNS: "random_problems|present|positions_are",
            PAGED_KEYS: "random_problems|not_read|no_rows|count_from|small_pages|test_step$",
            ROW_SAMPLING: DRAWS,
        },
        {"TRITON_INTERPRET": "1"},
        unavailable=_triton_unavailable,
        left_out=_triton_runs_here,
        one_seed_in=8,
        without="|".join(
            (
                r"weights_are_by_value.*(-900-1|-0-40|float(16|8_e4m3fn)-32-900-40)\]",
                r"real_model\S*(dtype1|0\.8-dtype2)|small_rows\S*(0\.5|1\.0)-",
                r"several_chunks\S*revision[134]|same_bits_every_run|seeds_are_streams",
            )
        ),
    ),
    "triton@compiler": Place(
        "triton", {TRITON_COMPILE: ""}, {"TRITON_INTERPRET": "0"}, unavailable=_triton_unavailable
    ),
    "cuda": _local("cuda"),
    "cuda@host": _cuda_host(
        WITHOUT_WGMMA,
        dict.fromkeys(
            (COLUMN_SCORES, TOKEN_CONFIDENCE, SELECT_TOKENS, DECODE_STEP, REVISION, LOGIT_RANGE, WINDOWS), ""
        )
        | {
            TOP_COLUMNS: "^(?!.*(held_at_once|bad_arguments))",
            ROW_SAMPLING: DRAWS + "|samples_follow",
            PAGED_KEYS: "random_problems|not_read|no_rows|count_from|same_bits|test_step$|pages|layouts",
            CUDA_GRAPHS: "",
        },
    ),
    "cuda@host-wgmma": _cuda_host(
        WITH_WGMMA,
        {
            COLUMN_SCORES: "random_problems|many_rows|visible_nan",
            ATTENTION_MAP: "",
            WINDOWS: "many_rows",
            PAGED_KEYS: "random_problems",
            DECODE_STEP: "random_steps",
            LOGIT_RANGE: "",
            CUDA_GRAPHS: "",
        },
    ),
}

#: Files that cannot even be imported here.
NOT_IMPORTABLE = [] if _triton_unavailable() is None else [TRITON_KERNELS, TRITON_COMPILE]


def takes(name: str, function: pytest.Function) -> bool:
    """Whether a test runs in this place. Slow and long ones are left to this process, but for the files that
    are of one place."""
    only = function.get_closest_marker("places")
    tests = PLACES[name].tests
    if only is not None:
        return name in only.args
    if tests is None:
        return True
    pattern = tests.get(function.path.relative_to(TESTS).as_posix())
    if pattern is None or re.search(pattern, function.originalname) is None:
        return False
    without = PLACES[name].without
    if without is not None and re.search(without, function.name) is not None:
        return False
    parameters = function.callspec.params if hasattr(function, "callspec") else {}
    seed, one_in = parameters.get("seed"), PLACES[name].one_seed_in
    # By the bits of a product: what a test draws often depends on its seed modulo a small number.
    if isinstance(seed, int) and (seed * 0x9E3779B1 >> 16) % one_in != 0:
        return False
    return function.get_closest_marker("slow") is None and function.get_closest_marker("long") is None
