"""Clocks, peak memory and measured ceilings of a device.

Every sample is taken with cold caches: before each, a buffer larger than the last-level cache goes through
them. Candidates take turns, so that what disturbs the machine disturbs them alike.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

Run = Callable[[], Any]

_MOST_SAMPLES = 100  # of one candidate
_WARM_BELOW_MS = 10.0  # what takes longer is hardly ever found in a cache


class Observed(NamedTuple):
    """One run: what it returned, how long it took and how much more memory the process held at its peak."""

    result: Any
    seconds: float
    peak_bytes: int | None  # None where the system does not tell


class Ceilings(NamedTuple):
    """What the device was measured to do."""

    bytes_per_s: float
    operations_per_s: float

    def floor_ms(self, n_bytes: float, operations: float) -> tuple[float, str]:
        """The least time for so many bytes and operations, and which of them sets it."""
        times = {
            "bytes": 1e3 * n_bytes / self.bytes_per_s,
            "operations": 1e3 * operations / self.operations_per_s,
        }
        bound = max(times, key=times.__getitem__)
        return times[bound], bound


def take_turns(sample: dict[str, Callable[[], float]], seconds: float, least: int) -> dict[str, list[float]]:
    """Milliseconds of each candidate, one sample a round, until it has had its seconds or enough of them."""
    samples: dict[str, list[float]] = {name: [] for name in sample}
    while waiting := [
        name
        for name, taken in samples.items()
        if len(taken) < least or (sum(taken) < 1e3 * seconds and len(taken) < _MOST_SAMPLES)
    ]:
        for name in waiting:
            samples[name].append(sample[name]())
    return samples


class CpuDevice:
    """The processor, at a number of threads."""

    name = "cpu"
    cold = "before each sample, a buffer of twice the last-level cache is read"

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._flush = torch.ones(2 * last_level_cache_bytes() // 4)

    def activate(self) -> None:
        """Have torch, and so our kernels, use this many threads."""
        torch.set_num_threads(self.threads)

    def ceilings(self, dtype: torch.dtype) -> Ceilings:
        """Bandwidth of a sum over 256 MB, the best of several; and of a 1024-cubed product."""
        self.activate()
        source, a = torch.ones(1 << 26), torch.randn(1024, 1024)
        if dtype == torch.bfloat16:  # float16 products are emulated on most processors
            a = a.bfloat16()
        read, product = self._least_seconds(source.sum), self._least_seconds(lambda: a @ a)
        return Ceilings(source.nbytes / read, 2 * 1024**3 / product)

    def observe(self, run: Run) -> Observed:
        """Run once; memory by the process's peak resident size."""
        before = _reset_peak_resident_bytes()
        start = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - start
        return Observed(result, seconds, None if before is None else max(0, _status_bytes("VmHWM") - before))

    def measure(self, runs: dict[str, Run], reset: Run, seconds: float, least: int) -> dict[str, dict]:
        """Milliseconds of each candidate; *warm* are calls one after the other, where they are short."""

        def sample(run: Run) -> float:
            reset()
            self._flush.sum()  # written, the cache would be cleaned again on the candidate's time
            return 1e3 * self._seconds_of(run)

        gc.collect()
        gc.disable()
        try:
            samples = take_turns({n: lambda run=r: sample(run) for n, r in runs.items()}, seconds, least)
            figures = {name: summary(taken) for name, taken in samples.items()}
            for name, figure in figures.items():
                if figure["median_ms"] < _WARM_BELOW_MS:
                    warm = [self._seconds_of(runs[name]) for _ in range(11)]
                    figure["warm_ms"] = 1e3 * statistics.median(warm[1:])
        finally:
            gc.enable()
        return figures

    def _least_seconds(self, run: Run) -> float:
        """Of the runs of half a second: a ceiling must not be set by what disturbs the machine."""
        stop = time.perf_counter() + 0.5
        least = self._seconds_of(run)
        while time.perf_counter() < stop:
            least = min(least, self._seconds_of(run))
        return least

    @staticmethod
    def _seconds_of(run: Run) -> float:
        """Seconds of one run."""
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    @staticmethod
    def available_bytes() -> int:
        """Memory that can be had without swapping."""
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
        raise RuntimeError("/proc/meminfo names no MemAvailable")


class CudaDevice:
    """The current GPU: replays of CUDA graphs between events."""

    name = "cuda"
    threads = None
    cold = "before each sample, a buffer of four times the L2 cache is read; a sample is one graph replay"
    calls = 20  # in the graph of which *warm* is a twentieth

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._flush = torch.ones(properties.L2_cache_size, dtype=torch.int32, device="cuda")

    def activate(self) -> None:
        """It has no modes."""

    def ceilings(self, dtype: torch.dtype) -> Ceilings:
        """Bandwidth of a copy of 1 GB, and an 8192-cubed product."""
        source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
        target = torch.empty_like(source)
        a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
        runs = {"copy": lambda: target.copy_(source), "product": lambda: a @ a}
        figures = self.measure(runs, lambda: None, 0.02, 5)
        copy, product = (1e-3 * min(figures[n]["median_ms"], figures[n]["warm_ms"]) for n in runs)
        return Ceilings(2 * source.nbytes / copy, 2 * 8192**3 / product)

    def observe(self, run: Run) -> Observed:
        """Run once; memory by torch's allocator."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = run()
        torch.cuda.synchronize()
        return Observed(result, time.perf_counter() - start, torch.cuda.max_memory_allocated() - before)

    def measure(self, runs: dict[str, Run], reset: Run, seconds: float, least: int) -> dict[str, dict]:
        """Milliseconds of each candidate; ``{"failed": reason}`` for one that no graph can hold."""
        figures: dict[str, dict] = {}
        graphs: dict[str, tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph]] = {}
        for name, run in runs.items():
            try:
                graphs[name] = (self._capture(run, 1), self._capture(run, self.calls))
            except RuntimeError as error:
                figures[name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}

        def sample(graph: torch.cuda.CUDAGraph) -> float:
            reset()
            self._flush.sum()  # written, the cache would be cleaned again on the candidate's time
            return self._replay(graph)

        cold = take_turns({n: lambda g=g: sample(g[0]) for n, g in graphs.items()}, seconds / 10, least)
        for name, (_, many) in graphs.items():
            warm = [self._replay(many) / self.calls for _ in range(3)]
            figures[name] = summary(cold[name]) | {"warm_ms": statistics.median(warm)}
        return figures

    def available_bytes(self) -> int:
        """Free memory of the GPU."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def _capture(self, run: Run, calls: int) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                run()
        graph.replay()
        return graph

    def _replay(self, graph: torch.cuda.CUDAGraph) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


Device = CpuDevice | CudaDevice


def summary(samples: list[float]) -> dict[str, Any]:
    """Median and quartiles of milliseconds."""
    if len(samples) == 1:
        return {"median_ms": samples[0], "q1_ms": samples[0], "q3_ms": samples[0], "samples": 1}
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median_ms": median, "q1_ms": q1, "q3_ms": q3, "samples": len(samples)}


def last_level_cache_bytes() -> int:
    """The largest cache that Linux names, or 32 MB where it names none."""
    sizes = [
        int(path.read_text().rstrip("KM\n")) << (20 if "M" in path.read_text() else 10)
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(sizes, default=32 << 20)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status names no {field}")


def _reset_peak_resident_bytes() -> int | None:
    """Give free memory back and have the peak counted anew: the resident size now, None where refused."""
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def thread_counts() -> list[int]:
    """One thread, and as many as this process may use."""
    return sorted({1, len(os.sched_getaffinity(0))})
