"""The backend table: supported, or not and why."""

from __future__ import annotations

import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from problems import normal

import attn_sampler
from attn_sampler import (
    BackendUnavailableError,
    Support,
    backends,
    column_scores,
    is_backend_supported,
)
from attn_sampler.backends import BACKENDS, OPS, extension, triton


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_the_table_answers_for_all(op, name):
    support = is_backend_supported(op, name)
    assert isinstance(support, Support)
    assert support.supported is (support.reason == "")
    assert support.supported is (backends.unavailable(name) is None)


def test_a_backend_that_runs_takes_its_tensors(backend, device):
    x = torch.zeros(1, 2, 3, 8, device=device)
    for op in OPS:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            tensor = x.to(dtype)
            assert is_backend_supported(op, backend, tensor, tensor) == Support(True, "")


def test_what_a_backend_does_not_serve(backend, device):
    double = torch.zeros(1, 2, 3, 8, dtype=torch.float64, device=device)
    if backend == "reference":
        assert is_backend_supported("column_scores", backend, double, double.transpose(2, 3)).supported
        return
    assert "float64" in is_backend_supported("column_scores", backend, double).reason
    elsewhere = torch.zeros(1, 2, 3, 8, device="meta")
    reason = is_backend_supported("column_scores", backend, elsewhere).reason
    assert device.type in reason
    assert "meta" in reason
    column_major = torch.zeros(1, 2, 8, 3, device=device).transpose(2, 3)
    assert "contiguous" in is_backend_supported("token_confidence", backend, column_major).reason
    scores = torch.zeros(4, 6, device=device).T
    assert is_backend_supported("select_tokens", backend, scores, scores).supported


@pytest.mark.usefixtures("backend")
def test_a_name_runs_or_raises_with_the_reason():
    q, k = normal(0, 1, 2, 3, 8), normal(1, 1, 2, 5, 8)
    for name in BACKENDS:
        support = is_backend_supported("column_scores", name, q, k)
        out = torch.full((1, 5), 3.0)
        if support.supported:
            column_scores(q, k, out=out, backend=name)
            torch.testing.assert_close(out.sum(), torch.tensor(15.0 + 6.0))
        else:
            with pytest.raises(BackendUnavailableError) as caught:
                column_scores(q, k, out=out, backend=name)
            assert str(caught.value).startswith(f"backend: {name!r} cannot run column_scores here: ")
            assert str(caught.value).endswith(support.reason)
            assert (out == 3.0).all()


def test_auto_takes_the_first_that_serves(backend, device):
    x = torch.zeros(1, 2, 3, 8, device=device)
    order = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}[device.type]
    expected = next(n for n in order if is_backend_supported("column_scores", n, x, x).supported)
    assert backends.choose_backend("column_scores", "auto", x, x).name == expected
    assert backends.choose_backend("column_scores", "auto", x.double()).name == "reference"
    assert backends.choose_backend("column_scores", "auto", x.transpose(2, 3)).name == "reference"


def test_auto_serves_what_only_the_reference_can():
    q, k = normal(0, 1, 2, 3, 8).double(), normal(1, 1, 2, 5, 8).double()
    torch.testing.assert_close(
        column_scores(q, k), attn_sampler.reference.column_scores(q, k).float(), rtol=0, atol=0
    )


@pytest.mark.parametrize("options", [{}, {"softmax_scope": "block", "columns": slice(2, 9)}], ids=str)
@pytest.mark.parametrize("function", [column_scores, attn_sampler.attention_map])
def test_autocast_changes_nothing(function, options, backend, device):
    q, k = normal(0, 2, 4, 11, 32).to(device), normal(1, 2, 2, 11, 32).to(device)
    expected = function(q, k, backend=backend, **options)
    with torch.autocast(device.type, torch.bfloat16):
        result = function(q, k, backend=backend, **options)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def test_unknown_names():
    with pytest.raises(
        ValueError, match=r"^backend: expected one of cuda, triton, cpu, reference, got 'tpu'"
    ):
        is_backend_supported("column_scores", "tpu")
    with pytest.raises(ValueError, match=r"^op: expected one of column_scores, .*, got 'softmax'"):
        is_backend_supported("softmax", "reference")


@pytest.fixture
def triton_kernels(monkeypatch):
    """A stand-in for the Triton kernels' module, in interpreter mode."""
    module = types.ModuleType(triton.MODULE)
    module.refuses = lambda op, tensors: "it is a stand-in" if tensors[0].shape[-1] == 99 else None
    module.select_tokens = lambda out, *_: out.selected.fill_(True)
    monkeypatch.setitem(sys.modules, triton.MODULE, module)
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    sys.modules["triton"].__spec__ = types.SimpleNamespace()
    sys.modules["triton"].__version__ = "3.6.0"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    _forget()
    yield module
    monkeypatch.undo()
    _forget()


def _forget():
    """What was found out about the backends."""
    backends.unavailable.cache_clear()
    triton.TRITON._kernels.cache_clear()


def test_triton_kernels_are_found_by_their_module(triton_kernels):
    x = torch.zeros(2, 3)
    assert is_backend_supported("select_tokens", "triton", x, x) == Support(True, "")
    assert is_backend_supported("select_tokens", "triton", torch.zeros(2, 99)).reason == "it is a stand-in"
    assert "float64" in is_backend_supported("select_tokens", "triton", x.double()).reason
    selected = attn_sampler.select_tokens(x, x, torch.zeros(2, 3, dtype=torch.bool), backend="triton")
    assert selected.all()  # what the stand-in writes
    assert backends.choose_backend("select_tokens", "auto", x).name != "triton"


def test_triton_takes_gpu_tensors_outside_the_interpreter(triton_kernels, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    _forget()
    reason = is_backend_supported("select_tokens", "triton", torch.zeros(2, 3)).reason
    assert ("takes cuda tensors" if torch.cuda.is_available() else "no GPU") in reason


def test_a_broken_triton_module_is_a_reason(triton_kernels, monkeypatch):
    monkeypatch.setitem(sys.modules, triton.MODULE, None)
    _forget()
    assert "no Triton kernels" in is_backend_supported("select_tokens", "triton").reason


@pytest.mark.parametrize("version", ["2.3.1", "3.2.0", "3.5.1", "3.5.1+git0a1b2c3d"])
def test_an_old_triton_is_a_reason(triton_kernels, monkeypatch, version):
    """The kernels are not imported then: they cannot be."""
    monkeypatch.setattr(sys.modules["triton"], "__version__", version)
    monkeypatch.setitem(sys.modules, triton.MODULE, None)
    reason = is_backend_supported("select_tokens", "triton").reason
    assert reason == f"triton {version} is installed; the kernels need 3.6 or newer"


@pytest.mark.parametrize("version", ["3.6.0", "3.6.0+git0a1b2c3d", "3.10.0", "4.0.0"])
def test_a_triton_that_is_new_enough(triton_kernels, monkeypatch, version):
    monkeypatch.setattr(sys.modules["triton"], "__version__", version)
    x = torch.zeros(2, 3)
    assert is_backend_supported("select_tokens", "triton", x, x) == Support(True, "")


def test_importing_does_not_import_triton_or_ask_for_a_gpu():
    code = (
        "import sys, torch, attn_sampler; "
        "loaded = 'triton' in sys.modules; "
        "print(loaded, torch.cuda.is_initialized())"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.split() == ["False", "False"]


def test_a_workspace_for_each_device_and_stream(monkeypatch):
    """The bridge to the extension on CUDA, with a stand-in for torch's streams and for the kernels."""
    streams, capturing = {0: 11, 1: 12}, False
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", streams.get, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(extension, "_workspaces", {})
    ran: list[tuple] = []

    def kernels(needed: int, where: tuple) -> int:
        cuda, _, index, stream, address, size = where
        assert (cuda, stream) == (1, streams[index])
        if size < needed:
            return needed
        ran.append((index, address, size))
        return 0

    def run(index: int, needed: int) -> tuple:
        like = types.SimpleNamespace(is_cpu=False, get_device=lambda: index, device=torch.device("cpu"))
        extension._run(kernels, like, (needed,))
        return ran[-1]

    first = run(0, 512)
    assert first[2] == 512
    workspace = extension._workspaces[0, 11]
    assert (workspace.data_ptr(), workspace.dtype, workspace.any().item()) == (first[1], torch.uint8, False)
    assert run(0, 100) == run(0, 512) == first
    other = run(1, 512)
    assert other[1] != first[1]
    streams[0] = 13
    assert run(0, 512)[1] not in (first[1], other[1])
    assert len(extension._workspaces) == 3
    streams[0] = 2  # the default stream of each thread: two that meet there do not share
    own = run(0, 512)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, 0, 512).result()[1] != own[1]
    assert run(0, 512) == own
    assert len(extension._workspaces) == 3
    streams[0], capturing = 11, True
    assert run(0, 512)[1] != first[1]
    assert extension._workspaces[0, 11] is workspace
    capturing = False
    assert run(0, 4096)[2] == 4096  # more is needed now
    assert extension._workspaces[0, 11].numel() == 4096
    assert run(0, 512)[2] == 4096
    monkeypatch.setattr(torch, "empty", lambda *size, **keywords: torch.full(size, 7, **keywords))
    zeros = extension._C.WORKSPACE_ZEROS
    assert run(0, zeros + 64)[2] == zeros + 64
    grown = extension._workspaces[0, 11]
    assert not grown[:zeros].any()  # the counters alone
    assert (grown[zeros:] == 7).all()
