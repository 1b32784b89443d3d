"""The CUDA kernels' own sources, compiled as C++ and run on the CPU, one fiber a thread (support/cuda_host).

The tests that judge every backend judge them too, at the places cuda@host and cuda@host-wgmma; here they are
called straight. A program built with the sanitizers runs them on buffers of exact size, and shows that broken
kernels are reported.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import subprocess
import types
from pathlib import Path

import pytest
import torch
from cmake_build import build, tool
from places import CUDA_HOST, WITH_WGMMA, WITHOUT_WGMMA, cuda_host
from problems import FLOAT8, normal, row_lse
from stand_ins import fresh_workspace, load

from attn_sampler import options
from attn_sampler.backends import extension as backend_of_extension
from attn_sampler.backends.extension import _view

CPU, CUDA = 0, 1
N_DEVICES = 10  # emulated; none has code on device 2
#: Multiprocessors of those that differ by their number of them alone, by device.
PROCESSORS = {1: 2, 3: 1, 4: 3, 5: 5, 6: 13, 7: 64, 8: 132, 9: 264}


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python module, with the CUDA kernels on the host."""
    return cuda_host(tmp_path_factory)


def attention_options(columns: slice, query_start: int, scale: float | None = None) -> options.Attention:
    return options.Attention(
        columns, None, query_start, scale, "e", False, "sequence", True, "sum", False, False
    )


class Step:
    """A decoding step of 70 layers, more than one launch's table holds, straight at the extension."""

    def __init__(
        self,
        extension: Path,
        n_layers: int,
        with_lse: bool,
        dtype: torch.dtype = torch.bfloat16,
        sequences: slice = slice(2),
        vocab: int = 11,
    ) -> None:
        self.module = load(extension)
        self.host = ctypes.CDLL(str(extension))
        q = [normal(i, 2, 4, 6, 32, dtype=dtype)[sequences] for i in range(n_layers)]
        k = [normal(100 + i, 2, 2, 24, 32, dtype=dtype)[sequences] for i in range(n_layers)]
        batch = q[0].shape[0]
        scales = [
            normal(200 + i, 2, 2)[sequences].abs() if dtype == FLOAT8 else None for i in range(n_layers)
        ]
        lse = [row_lse(x, y, k_descale=z) if with_lse else None for x, y, z in zip(q, k, scales, strict=True)]
        self.tokens = torch.full((batch, 24), 7)
        self.tokens[:, ::3] = 5  # no mask token: it may be revised
        self.start = self.tokens.clone()
        self.scores = torch.full((batch, 6), torch.nan)
        self.token_ids, self.confidence = torch.zeros(batch, 6, dtype=torch.int64), torch.zeros(batch, 6)
        self.selected = torch.zeros(batch, 6, dtype=torch.bool)
        self.log_prob, self.current = torch.zeros(batch, 6), torch.zeros(batch, 6)
        self.revised = torch.zeros(batch, 6, dtype=torch.uint8)
        self.budget = torch.ones(batch, 6, dtype=torch.int32)
        self.logits = normal(7, 2, 6, vocab, dtype=torch.float32).mul(5)[sequences]
        layers = zip(q, k, lse, [None] * n_layers, scales, strict=True)
        self.keep = q, k, lse, scales
        how = options.Step(
            slice(18, 24),
            7,
            "all",
            attention_options(slice(18, 24), 18),
            options.Sampling("probability", 0.0, None),
            options.Selection("parallel", "confidence", 0.4, 0.4, 0.1, 1),
        )
        self.arguments = [
            _view(x) for x in (self._outputs(), self.logits, list(layers), options.Masks(), how)
        ]

    def run(self, where: tuple) -> int:
        self.tokens.copy_(self.start)
        self.budget.fill_(1)
        return self.module.decode_step(*self.arguments, where)

    def results(self) -> list[torch.Tensor]:
        return [x.clone() for x in self._outputs()]

    def _outputs(self) -> tuple[torch.Tensor, ...]:
        step = self.tokens, self.token_ids, self.confidence, self.scores, self.selected
        return *step, self.log_prob, self.current, self.revised, self.budget


@pytest.mark.parametrize(
    ("n_layers", "with_lse", "dtype", "launches"),
    [
        (28, True, torch.bfloat16, 1),
        (28, False, torch.bfloat16, 2),
        (70, True, torch.bfloat16, 2),
        (28, True, FLOAT8, 1),
    ],
)
def test_a_step_of_many_layers(
    extension: Path, n_layers: int, with_lse: bool, dtype: torch.dtype, launches: int
) -> None:
    step = Step(extension, n_layers, with_lse, dtype)
    assert step.run((CPU, 1, 0, 0, 0, 0)) == 0
    expected = step.results()
    needed = step.run((CUDA, 1, 0, 0, 0, 0))
    workspace = fresh_workspace(needed)
    first = None
    for seed in range(5):  # one workspace, as a replayed graph uses it, in different orders of the blocks
        step.host.cuda_host_shuffle(ctypes.c_uint64(seed))
        before = step.host.cuda_host_launches()
        assert step.run((CUDA, 1, 0, 0, workspace.data_ptr(), needed)) == 0
        assert step.host.cuda_host_launches() - before == launches
        results = step.results()
        for result, other in zip(results, expected, strict=True):
            torch.testing.assert_close(result, other, rtol=1e-5, atol=1e-5)
        first = first or results
        assert all(torch.equal(x, y) for x, y in zip(results, first, strict=True))


@pytest.mark.parametrize("with_lse", [True, False])
def test_bits_are_a_matter_of_one_sequence(extension: Path, with_lse: bool) -> None:
    """Whatever the number of multiprocessors, the order of the blocks, and the sequences beside it."""

    def results(device: int, sequences: slice) -> tuple[list[torch.Tensor], int]:
        step = Step(extension, 3, with_lse, sequences=sequences, vocab=8211)
        needed = step.run((CUDA, 1, device, 0, 0, 0))
        workspace = fresh_workspace(needed)
        assert step.run((CUDA, 1, device, 0, workspace.data_ptr(), needed)) == 0
        return step.results(), step.host.cuda_host_blocks()

    expected, _ = results(1, slice(2))
    host = ctypes.CDLL(str(extension))
    for device, processors in PROCESSORS.items():
        host.cuda_host_shuffle(ctypes.c_uint64(processors))
        found, blocks = results(device, slice(2))
        assert blocks == min(4 * processors, 30)  # of each layer, and two of each row
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True)), processors
        alone, _ = results(device, slice(1, 2))
        assert all(torch.equal(x, y[1:]) for x, y in zip(alone, expected, strict=True)), processors


def test_a_step_adds_layers_up_as_calls_would(extension: Path) -> None:
    module = load(extension)
    step = Step(extension, 3, True)
    needed = step.run((CUDA, 1, 1, 0, 0, 0))
    workspace = fresh_workspace(needed)
    assert step.run((CUDA, 1, 1, 0, workspace.data_ptr(), needed)) == 0
    q, k, lse, _ = step.keep
    out = torch.full((2, 6), torch.nan)
    for i in range(3):
        how = attention_options(slice(18, 24), 18)._replace(accumulate=i > 0)
        arguments = [_view(x) for x in (out, options.Layer(q[i], k[i], lse[i]), options.Masks(), how)]
        assert module.column_scores(*arguments, (CUDA, 1, 1, 0, 0, 0)) == 0  # one unit: no partial sums
    assert torch.equal(out, step.scores)


def test_sampling_asks_for_little_noise(extension: Path) -> None:
    """Once for four tokens, and not at all for those that the noise cannot lift above a key that was met."""
    module, host = load(extension), ctypes.CDLL(str(extension))
    host.cuda_host_noise_groups.restype = ctypes.c_int64
    flat, normals = torch.zeros(2, 4, 1 << 15), normal(0, 2, 4, 1 << 15, dtype=torch.float32).mul(3)
    peaked = normals.clone()
    peaked[..., 100] = 45
    rising = torch.linspace(0, 30, 1 << 15).expand(2, 4, -1).contiguous()

    def noise(logits: torch.Tensor) -> float:
        outputs = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4), torch.zeros(2, 4), None
        how = options.Sampling("probability", 1.0, 3)
        arguments = [_view(x) for x in (outputs, logits, None, how)]
        needed = module.token_confidence(*arguments, (CUDA, 1, 1, 0, 0, 0))
        workspace = fresh_workspace(needed)
        before = host.cuda_host_noise_groups()
        assert module.token_confidence(*arguments, (CUDA, 1, 1, 0, workspace.data_ptr(), needed)) == 0
        assert host.cuda_host_blocks() == 8  # each has a row
        return (host.cuda_host_noise_groups() - before) / (logits.numel() / 4)

    for logits, least, most in [
        (flat, 1.0, 1.05),
        (normals, 0.9, 1.05),
        (rising, 0.9, 1.05),
        (normals.mul(5), 0.05, 0.3),
        (peaked, 0.03, 0.3),
        (peaked.flip(2), 0.9, 1.05),  # the last to be met
    ]:
        assert least <= noise(logits) <= most


@pytest.mark.parametrize("with_lse", [True, False])
def test_wgmma_is_chosen_and_gives_the_same_bits(extension: Path, with_lse: bool) -> None:
    """On the device that has it, in every order of blocks and threads; and not with a wider head."""
    module, host = load(extension), ctypes.CDLL(str(extension))

    def scores(device: int, headdim: int) -> tuple[torch.Tensor, int]:
        q = normal(0, 1, 2, 150, headdim, dtype=torch.bfloat16)
        k = normal(1, 1, 2, 260, headdim, dtype=torch.bfloat16)
        lse, out = row_lse(q, k), torch.full((1, 260), torch.nan)
        layer = options.Layer(q, k, lse if with_lse else None)
        how = attention_options(slice(0, 260), 110, headdim**-0.5)
        arguments = [_view(x) for x in (out, layer, options.Masks(), how)]
        needed = module.column_scores(*arguments, (CUDA, 1, device, 0, 0, 0))
        workspace = fresh_workspace(needed)
        before = host.cuda_host_products()
        assert module.column_scores(*arguments, (CUDA, 1, device, 0, workspace.data_ptr(), needed)) == 0
        return out, host.cuda_host_products() - before

    first, products = scores(WITH_WGMMA, 128)
    row_tiles, column_tiles, per_tile, heads = 3, 3, 128 // 16, 2
    assert products == (1 if with_lse else 2) * heads * row_tiles * column_tiles * per_tile
    for seed in range(4):
        host.cuda_host_shuffle(ctypes.c_uint64(seed))
        assert torch.equal(scores(WITH_WGMMA, 128)[0], first)
    other, products = scores(WITHOUT_WGMMA, 128)
    assert products == 0
    torch.testing.assert_close(other, first, rtol=1e-5, atol=1e-5)
    assert scores(WITH_WGMMA, 136)[1] == 0


def test_the_device_is_current_during_the_call_only(extension: Path) -> None:
    step = Step(extension, 1, True)
    needed = step.run((CUDA, 1, 1, 0, 0, 0))
    workspace = fresh_workspace(needed)
    for device in (1, 0):
        assert step.run((CUDA, 1, device, 0, workspace.data_ptr(), needed)) == 0
        assert step.host.cuda_host_launch_device() == device
        assert step.host.cuda_host_current_device() == 0
    with pytest.raises(RuntimeError, match="cudaSetDevice: invalid device ordinal"):
        step.run((CUDA, 1, N_DEVICES, 0, workspace.data_ptr(), needed))


@pytest.mark.parametrize(
    ("former", "contexts", "after", "made"),
    [
        (0, 0b001, 0, 0b011),  # in use: current again
        (0, 0b010, 1, 0b010),  # the process uses the other alone, and gets no context on this
        (0, 0b000, 1, 0b010),
        (1, 0b010, 1, 0b010),
        (2, 0b110, 2, 0b110),
        (2, 0b010, 1, 0b010),
    ],
)
def test_no_context_is_made_on_another_device(
    extension: Path, former: int, contexts: int, after: int, made: int
) -> None:
    """Of a thread whose current device is `former`, by a step on device 1, nor where its launch fails."""
    step = Step(extension, 1, True)
    needed = step.run((CUDA, 1, 1, 0, 0, 0))
    workspace = fresh_workspace(needed)
    for fails in (False, True):
        step.host.cuda_host_become(former, contexts)
        step.host.cuda_host_fail(int(fails))
        expected = (
            pytest.raises(RuntimeError, match="as was asked for") if fails else contextlib.nullcontext()
        )
        with expected:
            step.run((CUDA, 1, 1, 0, workspace.data_ptr(), needed))
        found = step.host.cuda_host_current_device(), step.host.cuda_host_contexts()
        step.host.cuda_host_become(0, 1)
        assert found == (after, made)


def test_a_device_without_code_is_refused(extension: Path) -> None:
    """Before anything is launched, so that "auto" goes to another backend."""
    step = Step(extension, 1, True)
    before = step.host.cuda_host_launches()
    message = r"no code for device 2, of compute capability 7\.0 \(no kernel image is available\)"
    for _ in range(2):
        with pytest.raises(step.module.Refused, match=message):
            step.run((CUDA, 1, 2, 0, 0, 0))
        assert re.search(message, step.module.cuda_device_unavailable(2))
    assert step.module.cuda_device_unavailable(0) is step.module.cuda_device_unavailable(1) is None
    assert "invalid device ordinal" in step.module.cuda_device_unavailable(N_DEVICES)
    for index in (-1, 64):
        assert step.module.cuda_device_unavailable(index) == "there is no such device"
    assert step.host.cuda_host_launches() == before
    assert step.host.cuda_host_current_device() == 0
    assert torch.equal(step.tokens, step.start)


def test_auto_passes_over_a_device_without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU for which the CUDA kernels are not compiled is Triton's."""
    x = types.SimpleNamespace(
        device=torch.device("cuda", 5), dtype=torch.float32, shape=(2, 3), get_device=lambda: 5
    )
    x.dim, x.stride = lambda: 2, lambda _: 1
    monkeypatch.setattr(backend_of_extension, "_cuda_device_unavailable", {5: "no code", 6: None}.get)
    assert backend_of_extension.CUDA.refuses("select_tokens", (x, x)) == "no code"
    x.get_device = lambda: 6
    assert backend_of_extension.CUDA.refuses("select_tokens", (x, x)) is None


def test_a_small_workspace_runs_nothing(extension: Path) -> None:
    step = Step(extension, 1, True)
    needed = step.run((CUDA, 1, 0, 0, 0, 0))
    workspace = fresh_workspace(needed)
    before = step.host.cuda_host_launches()
    assert step.run((CUDA, 1, 0, 0, workspace.data_ptr(), needed - 1)) == needed
    assert step.host.cuda_host_launches() == before
    assert torch.equal(step.tokens, step.start)
    with pytest.raises(ValueError, match="workspace: expected an address aligned to 256 bytes"):
        step.run((CUDA, 1, 0, 0, workspace.data_ptr() + 16, needed))


def test_what_the_kernels_do_not_take(extension: Path) -> None:
    module = load(extension)
    q, k, out = torch.zeros(1, 1, 2, 520), torch.zeros(1, 1, 3, 520), torch.zeros(1, 3)
    how = attention_options(slice(0, 3), 1, 1.0)
    arguments = [_view(x) for x in (out, options.Layer(q, k), options.Masks(), how)]
    with pytest.raises(module.Refused, match="q: head dimension: the CUDA kernels take at most 512, got 520"):
        module.column_scores(*arguments, (CUDA, 1, 0, 0, 0, 0))


def test_under_the_sanitizers(tmp_path: Path) -> None:
    build(tmp_path, *CUDA_HOST, "-DATTN_SAMPLER_SANITIZE=address,undefined", "-DCMAKE_BUILD_TYPE=Debug")
    result = subprocess.run([tool("ctest"), "--verbose"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr
    assert "CPU and GPU committed the block in the same" in result.stdout
    assert "all agree" in result.stdout
    for report in (
        "waits at cuda_check.cpp:",
        "while others are at cuda_check.cpp:",
        "have ended",
        "a write beyond the 1024 bytes of shared memory",
        "a product without a fence before it",
        "a product reads what was not published",
        "a product reads beyond the shared memory",
        "warps multiply by different matrices",
        "took part in 0 of the block's 1 products",
    ):
        assert report in result.stdout, result.stdout
