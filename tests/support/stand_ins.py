"""Builds of the extension that take its place in a process: plugins of the pytest that runs there.

They are made before the package is imported.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import sys
import types
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

_ALIGNMENT, _COUNTERS = 256, 4 * (1 << 14)  # of a workspace, in bytes
OPS = ("column_scores", "attention_map", "top_columns", "token_confidence", "select_tokens", "decode_step")


def load(path: Path) -> ModuleType:
    """The extension module at this path."""
    loader = importlib.machinery.ExtensionFileLoader("_C", str(path))
    spec = importlib.util.spec_from_loader("_C", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    module.read_tensors_of(Tensor)
    return module


def install(module: ModuleType) -> None:
    assert "attn_sampler" not in sys.modules
    sys.modules["attn_sampler._C"] = module


class EmulatedAmx:
    """A build whose AMX kernels run on the emulator: no test leaves a thread's tiles configured."""

    def __init__(self, path: Path) -> None:
        install(load(path))
        self._threads_with_tiles = ctypes.CDLL(str(path)).amx_emulator_threads_with_tiles

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self) -> Iterator[None]:
        yield
        assert self._threads_with_tiles() == 0


class CudaHost:
    """The CUDA kernels on the CPU, on one of the devices (0 has wgmma, 1 has not), where "cpu" is asked for.

    Blocks and threads run in an order that is each test's own, drawn from its name. Every call's workspace is
    poisoned but for its counters, which must be zero again afterwards.
    """

    def __init__(self, path: Path, device: int) -> None:
        module = load(path)
        self._device = device
        self._shuffle = ctypes.CDLL(str(path)).cuda_host_shuffle
        functions = {op: self._on_device(getattr(module, op)) for op in OPS}
        stand_in = types.ModuleType("attn_sampler._C")
        stand_in.__dict__.update({**vars(module), **functions})
        install(stand_in)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self._shuffle(ctypes.c_uint64(zlib.crc32(item.nodeid.encode())))

    def _on_device(self, function: Callable[..., int]) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            *arguments, (kind, *_) = arguments
            assert kind == 0, "the tensors are the CPU's"
            where = (1, 1, self._device, 0)
            needed = function(*arguments, (*where, 0, 0))
            if needed:
                workspace = fresh_workspace(needed)
                assert function(*arguments, (*where, workspace.data_ptr(), needed)) == 0
                assert not workspace[:_COUNTERS].any()
            return 0

        return call


def fresh_workspace(size: int) -> Tensor:
    """So many bytes, aligned as a workspace is: its counters are 0, and the rest, as a float, NaN."""
    storage = torch.full((size + _ALIGNMENT,), 255, dtype=torch.uint8)
    workspace = storage[-storage.data_ptr() % _ALIGNMENT :][:size]
    workspace[:_COUNTERS] = 0
    return workspace
