"""pytest plugin: the suite's "cpu" backend is the CUDA kernels, run by the extension at --cuda-host.

    pytest -p cuda_host.plugin --cuda-host build/_C.so --backend cpu tests/test_column_scores.py

Every call's workspace is poisoned but for its counters, which must be zero again afterwards.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from attn_sampler import _core, backends

_ALIGNMENT, _COUNTERS = 256, 4 * (1 << 14)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cuda-host", required=True, help="the extension, built with ATTN_SAMPLER_CUDA=host")
    parser.addoption("--cuda-host-seed", type=int, default=0, help="of the orders of blocks and threads")
    parser.addoption("--cuda-host-device", type=int, default=1, help="0 has wgmma, 1 has not")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--cuda-host")
    install(load(path), config.getoption("--cuda-host-device"))
    ctypes.CDLL(path).cuda_host_shuffle(ctypes.c_uint64(config.getoption("--cuda-host-seed")))


def load(path: str) -> ModuleType:
    """The extension module at this path."""
    loader = importlib.machinery.ExtensionFileLoader("_C", path)
    spec = importlib.util.spec_from_loader("_C", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    module.read_tensors_of(Tensor)
    return module


def install(module: ModuleType, device: int) -> None:
    """Makes the CUDA kernels of this module, on one of its devices, the "cpu" backend."""
    _core._C = module
    _core.UNAVAILABLE = None
    _core._run = functools.partial(_run, device)
    backends.installation_problem.cache_clear()


def aligned(size: int) -> Tensor:
    storage = torch.empty(size + _ALIGNMENT, dtype=torch.uint8)
    return storage[-storage.data_ptr() % _ALIGNMENT :][:size]


def _run(device: int, function: Callable[..., int], like: Tensor, arguments: tuple) -> None:
    assert like.device.type == "cpu"
    cuda, stream = 1, 0
    needed = function(*arguments, (cuda, 1, device, stream, 0, 0))
    if needed:
        workspace = aligned(needed)
        workspace[:_COUNTERS] = 0
        workspace[_COUNTERS:] = 255  # as a float, NaN
        assert function(*arguments, (cuda, 1, device, stream, workspace.data_ptr(), needed)) == 0
        assert not workspace[:_COUNTERS].any()
