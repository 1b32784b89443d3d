"""What only a device can show: captured graphs, streams, threads and another current device; and many runs.

Without a GPU the same bodies run on the kernels' stand-ins on the CPU, where a step that is "recorded" is
called again: what is compared with what is tried there, the capture is not.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from problems import assert_accurate, normal, row_lse
from test_decode_step import MASK, Step, small_step
from torch import Tensor

from attn_sampler import StepResult, column_scores, reference

CONTRACT = Path(__file__).resolve().parents[1] / "contract"

everywhere = pytest.mark.places("cuda", "triton", "cuda@host")


def record(device: torch.device, run: Callable[[], object]) -> Callable[[], object]:
    """What replays a captured graph of this call; without a GPU, the call."""
    if device.type != "cuda":
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def changing_inputs(step: Step, count: int) -> Iterator[Step]:
    """The same memory with other logits, queries, keys and tokens, so many times: yields what an eager call
    would be given. The log-sum-exps go with the queries and keys."""
    for seed in range(count):
        g = torch.Generator().manual_seed(seed)
        for q, k, lse in step.layers:
            for x in (q, k):
                x.copy_(torch.randn(x.shape, generator=g))
            if lse is not None:
                lse.copy_(row_lse(q.cpu(), k.cpu()))
        step.logits.copy_(3 * torch.randn(step.logits.shape, generator=g))
        step.tokens.copy_(torch.where(torch.rand(step.tokens.shape, generator=g) < 0.7, MASK, 3))
        yield step.copy()


def same_bits(result: StepResult, expected: StepResult) -> None:
    for x, y in zip(result[:5], expected[:5], strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


def reruns(device: torch.device, on_a_gpu: int, otherwise: int) -> int:
    return on_a_gpu if device.type == "cuda" else otherwise


def block_step(device: torch.device, batch: int, headdim: int, dtype: torch.dtype, **options: object) -> Step:
    """Blocks of four at the end of 24 keys, two layers."""
    layers: list[tuple[Tensor | None, ...]] = []
    for i in range(2):
        q = normal(i, batch, 8, 4, headdim, dtype=dtype).to(device)
        k = normal(10 + i, batch, 2, 24, headdim, dtype=dtype).to(device)
        layers.append((q, k, row_lse(q.cpu(), k.cpu()).to(device)))
    tokens = torch.full((batch, 24), MASK, device=device)
    tokens[::3, -2:] = 3
    how = {"block": slice(20, 24), "query_start": 20, "mask_token_id": MASK, "tau": 0.3, **options}
    return Step(tokens, normal(20, batch, 4, 300, dtype=dtype).mul(3).to(device), layers, how)


@pytest.mark.places("cuda", "cuda@host")
def test_the_first_launch_of_a_process_may_be_captured(backend, device):
    if device.type != "cuda":
        first_call(backend, device)
        return
    result = subprocess.run(
        [sys.executable, __file__, backend, str(device)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((*sys.path, str(CONTRACT)))},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.split()[-2:] == ["same", "bits"]


@everywhere
@pytest.mark.parametrize("options", [{}, {"query_rows": "masked"}, {"temperature": 0.7, "seed": 3}], ids=str)
def test_replays_with_changing_inputs(backend, device, options):
    """A hundred, with eager calls of the same and of another shape in between."""
    step = small_step(device, tau=0.3, **options)
    other = block_step(device, 3, 64, torch.bfloat16)
    expected_other = other.copy().run(backend=backend)
    step.copy().run(backend=backend)  # Triton's kernels are compiled before a capture
    results: list[StepResult] = []
    replay = record(device, lambda: results.append(step.run(backend=backend)))
    for number, eager in enumerate(changing_inputs(step, reruns(device, 100, 4))):
        given = step.tokens.clone()
        replay()
        expected = eager.run(backend=backend)
        same_bits(results[-1], expected)
        if number % 10 == 0:
            truth = dataclasses.replace(step, tokens=given).double().run(reference.decode_step)
            torch.testing.assert_close(expected.scores.double(), truth.scores, rtol=1e-3, atol=1e-4)
            same_bits(other.copy().run(backend=backend), expected_other)


@everywhere
def test_two_graphs_on_two_streams(backend, device):
    """Replayed at the same time, they share nothing."""
    steps = [block_step(device, 16, 64, torch.float16), block_step(device, 5, 128, torch.bfloat16)]
    given = [step.tokens.clone() for step in steps]
    expected = [step.copy().run(backend=backend) for step in steps]
    results: list[list[StepResult]] = [[], []]
    replays = [
        record(device, lambda s=s, r=r: r.append(s.run(backend=backend)))
        for s, r in zip(steps, results, strict=True)
    ]
    streams = [torch.cuda.Stream() for _ in steps] if device.type == "cuda" else [None, None]
    if device.type == "cuda":
        torch.cuda.synchronize()
    for _ in range(reruns(device, 50, 2)):
        for step, tokens, replay, stream in zip(steps, given, replays, streams, strict=True):
            with torch.cuda.stream(stream):
                step.tokens.copy_(tokens)
                replay()
        if device.type == "cuda":
            torch.cuda.synchronize()
        for result, wanted in zip(results, expected, strict=True):
            same_bits(result[-1], wanted)


@everywhere
def test_threads_with_streams_of_their_own(backend, device):
    steps = [block_step(device, 1 + i, 32 * (1 + i), torch.bfloat16) for i in range(4)]
    expected = [step.copy().run(backend=backend) for step in steps]

    def work(step: Step, wanted: StepResult, stream: object) -> None:
        with torch.cuda.stream(stream):
            for _ in range(reruns(device, 25, 2)):
                result = step.copy().run(backend=backend)
                if stream is not None:
                    stream.synchronize()
                same_bits(result, wanted)

    streams = [torch.cuda.Stream() for _ in steps] if device.type == "cuda" else [None] * len(steps)
    if device.type == "cuda":
        torch.cuda.synchronize()
    with ThreadPoolExecutor(len(steps)) as pool:
        list(pool.map(work, steps, expected, streams))


@pytest.mark.places("cuda", "triton")
@pytest.mark.parametrize("kind", ["of another library", "the thread's default"])
def test_streams_that_torch_did_not_make(backend, device, kind):
    """On the latter's handle, which is each thread's own stream, two threads meet."""
    step = block_step(device, 64, 64, torch.bfloat16)
    expected = step.copy().run(backend=backend)
    owner = torch.cuda.Stream()  # whose memory it is
    handle = owner.cuda_stream if kind == "of another library" else 2
    torch.cuda.synchronize()

    def work(_: int) -> None:
        stream = torch.cuda.ExternalStream(handle)
        with torch.cuda.stream(stream):
            for _ in range(50):
                result = step.copy().run(backend=backend)
                stream.synchronize()
                same_bits(result, expected)

    n_threads = 1 if kind == "of another library" else 2
    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(work, range(n_threads)))


@pytest.mark.places("cuda", "triton")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="another current device takes a second GPU")
def test_another_current_device(backend, device):
    with torch.cuda.device(0):
        step = block_step(torch.device("cuda", 1), 2, 64, torch.bfloat16)
        expected = step.copy().run(backend=backend)
        assert torch.cuda.current_device() == 0
        truth = step.double().run(reference.decode_step)
        torch.testing.assert_close(expected.scores.double(), truth.scores, rtol=1e-2, atol=1e-3)
    with torch.cuda.device(1):
        step.copy().run(backend=backend)
        results: list[StepResult] = []
        replay = record(device, lambda: results.append(step.run(backend=backend)))
    with torch.cuda.device(0):
        replay()
        torch.cuda.synchronize(1)
        same_bits(results[0], expected)


@everywhere
def test_many_runs_of_masked_rows_give_the_same_bits(backend, device):
    """Of 64 sequences with blocks of four, whose rows at committed positions are left out on the device."""
    step = block_step(device, 64, 128, torch.bfloat16, query_rows="masked")
    given, expected = step.tokens.clone(), step.copy().run(backend=backend)
    results: list[StepResult] = []
    replay = record(device, lambda: results.append(step.run(backend=backend)))
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(reruns(device, 10_000, 3)):
        step.tokens.copy_(given)
        replay()
        for x, y in zip(results[-1][:5], expected[:5], strict=True):
            wrong += (x.nan_to_num() != y.nan_to_num()).sum()  # asked for once, at the end
    assert wrong.item() == 0
    assert expected.selected.any(dim=1).any()


@pytest.mark.places("cuda", "triton", "cuda@host-wgmma")
@pytest.mark.parametrize("with_lse", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("headdim", [32, 64, 96, 128])
def test_tiles_of_every_head_dimension(backend, device, headdim, dtype, with_lse):
    """Of 64 rows and 128 columns, and not whole: the asynchronous products' where a device has them."""
    q = normal(0, 1, 2, 70, headdim, dtype=dtype)
    k = normal(1, 1, 1, 140, headdim, dtype=dtype)
    lse = row_lse(q, k) if with_lse else None
    where = {"columns": slice(0, 140), "query_start": 70}
    truth, plain = (
        reference.column_scores(x, y, softmax_lse=lse, **where) for x, y in ((q.double(), k.double()), (q, k))
    )
    q, k, lse = (x if x is None else x.to(device) for x in (q, k, lse))
    runs = [
        column_scores(q, k, softmax_lse=lse, **where, backend=backend) for _ in range(reruns(device, 20, 2))
    ]
    assert_accurate(runs[0].cpu(), plain, truth)
    assert all(torch.equal(x, runs[0]) for x in runs)


def first_call(backend: str, device: torch.device) -> None:
    """A step captured as the first call of all, replayed and then compared with an eager one."""
    step = block_step(device, 4, 64, torch.bfloat16)
    given, results = step.tokens.clone(), []
    replay = record(device, lambda: results.append(step.run(backend=backend)))
    for _ in range(3):
        step.tokens.copy_(given)
        replay()
    same_bits(results[-1], dataclasses.replace(step, tokens=given).run(backend=backend))
    print("same bits")


if __name__ == "__main__":
    first_call(sys.argv[1], torch.device(sys.argv[2]))
