"""Time the kernels on real decode shapes on this machine's GPU, against what one would use instead.

    python -m bench.gpu FOLDER [--rows 1 2 6] [--seconds 240]

Writes ``gpu.json`` and ``gpu.md`` to FOLDER. Every result is checked before it is timed. *cold* is the
median of single replays of a CUDA graph, between events, with the L2 cache flushed before each; *warm* is a
graph of 20 calls over 20. The floor of a row is the larger of its bytes over the measured copy bandwidth
and its operations over the measured bfloat16 matrix rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attn_sampler
from attn_sampler import column_scores, decode_step, is_backend_supported, token_confidence
from attn_sampler.backends import installation_problem

from . import rivals
from .rows import ROWS, Row

DTYPE = torch.bfloat16
BACKENDS = ("cuda", "triton")
#: Batch, query rows, keys, causal: the shapes of flash-colreduce's own benchmark (32 heads, D 128, float16).
COLREDUCE_ROWS = (
    *((batch, 1024, 1024, False) for batch in (1, 4, 16, 64)),
    *((1, n, n, False) for n in (2048, 4096, 8192, 16384)),
    *((batch, 64, 16384, True) for batch in (1, 4, 16)),
    *((1, 512, n, True) for n in (16384, 65536, 262144)),
)
_CALLS = 20


class Timer:
    """Times functions on the current device."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.flush = torch.empty(4 * properties.L2_cache_size, dtype=torch.int8, device="cuda")

    def __call__(self, run: Callable[[], Any], samples: int = 30) -> dict[str, float]:
        """Median microseconds: {"cold": ..., "warm": ...}."""
        one, many = self._capture(run, 1), self._capture(run, _CALLS)
        cold = []
        for _ in range(samples):
            self.flush.zero_()
            cold.append(self._replay(one))
        return {
            "cold": statistics.median(cold),
            "warm": statistics.median(self._replay(many) for _ in range(max(3, samples // 3))) / _CALLS,
        }

    def _capture(self, run: Callable[[], Any], calls: int) -> torch.cuda.CUDAGraph:
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
        return 1e3 * start.elapsed_time(end)


class Floor:
    """What this device can do: bytes and bfloat16 operations for each microsecond."""

    def __init__(self, timer: Timer) -> None:
        source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
        target = torch.empty_like(source)
        self.bytes = 2 * source.numel() / timer(lambda: target.copy_(source), 10)["cold"]
        a = torch.randn(8192, 8192, dtype=DTYPE, device="cuda")
        self.operations = 2 * 8192**3 / timer(lambda: a @ a, 5)["warm"]

    def __call__(self, n_bytes: float, operations: float = 0.0) -> float:
        """Microseconds."""
        return max(n_bytes / self.bytes, operations / self.operations)


def attention_bytes(row: Row) -> float:
    """What the scores of one layer's columns have to read, in bytes."""
    q = row.batch * row.heads * row.n_rows * (2 * row.headdim + 4)
    return q + 2 * row.batch * row.kv_heads * row.columns * row.headdim


def attention_operations(row: Row) -> float:
    """Multiplications and additions of one layer's column scores."""
    return 2.0 * row.batch * row.heads * row.n_rows * row.columns * row.headdim


def ours(op: str, tensors: tuple[Tensor, ...], call: Callable[[str], Any]) -> dict[str, Callable[[], Any]]:
    """The call on every backend that can serve it here."""
    return {
        backend: (lambda backend=backend: call(backend))
        for backend in BACKENDS
        if is_backend_supported(op, backend, *tensors).supported
    }


def columns_case(row: Row) -> tuple[dict[str, Callable[[], Any]], Callable[[Any], None]]:
    """Scores of the candidate columns of one layer, the log-sum-exp given."""
    q, k, lse = row.attention(DTYPE, "cuda")
    columns = slice(row.n_keys - row.columns, row.n_keys)
    exact = rivals.block_scores(q.double(), k.double(), lse.double(), columns)
    candidates = ours(
        "column_scores",
        (q, k),
        lambda backend: column_scores(q, k, columns=columns, softmax_lse=lse, backend=backend),
    )
    candidates["block matmul"] = lambda: rivals.block_scores(q, k, lse, columns)
    compiled = torch.compile(rivals.block_scores, dynamic=False)
    candidates["torch.compile"] = lambda: compiled(q, k, lse, columns)
    if row.batch * row.heads * row.n_rows * row.n_keys < 1 << 31:
        candidates["naive"] = lambda: rivals.naive_scores(q, k, columns)
        candidates["reference"] = lambda: column_scores(
            q, k, columns=columns, softmax_lse=lse, backend="reference"
        )

    def check(result: Tensor) -> None:
        torch.testing.assert_close(result.double(), exact, rtol=2e-2, atol=2e-2)

    return candidates, check


def confidence_case(row: Row) -> tuple[dict[str, Callable[[], Any]], Callable[[Any], None]]:
    """Token and probability of every candidate."""
    logits = row.logits(DTYPE, "cuda")
    candidates = ours(
        "token_confidence", (logits,), lambda backend: token_confidence(logits, backend=backend)
    )
    candidates["softmax + max"] = lambda: rivals.softmax_max(logits)
    if logits.numel() < 1 << 28:
        candidates["float64"] = lambda: rivals.float64_confidence(logits)
        candidates["reference"] = lambda: token_confidence(logits, backend="reference")
    exact = logits.float().softmax(-1).amax(-1)

    def check(result: tuple[Tensor, Tensor]) -> None:
        torch.testing.assert_close(result[1].float(), exact, rtol=1e-4, atol=1e-6)

    return candidates, check


def step_case(row: Row) -> tuple[dict[str, Callable[[], Any]], Callable[[Any], None]]:
    """A whole decoding step over all layers, which share one tensor of keys."""
    q, k, lse = row.attention(DTYPE, "cuda")
    layers = [(q.clone(), k, lse) for _ in range(row.layers)]
    logits = row.logits(DTYPE, "cuda")
    block = slice(row.n_keys - row.columns, row.n_keys)
    tokens = torch.full((row.batch, row.n_keys), row.vocab - 1, device="cuda")

    def run(backend: str) -> Any:
        return decode_step(tokens, logits, layers, block=block, mask_token_id=row.vocab - 1, backend=backend)

    exact = row.layers * rivals.block_scores(q.double(), k.double(), lse.double(), block)

    def check(result: Any) -> None:
        torch.testing.assert_close(result.scores.double(), exact, rtol=1e-4, atol=1e-4)
        tokens.fill_(row.vocab - 1)

    return ours("decode_step", (logits, q, k), run), check


CASES = {
    "column_scores": (columns_case, attention_bytes, attention_operations),
    "token_confidence": (
        confidence_case,
        lambda row: 2.0 * row.batch * row.columns * row.vocab,
        lambda row: 0.0,
    ),
    "decode_step": (
        step_case,
        lambda row: row.layers * attention_bytes(row) + 2.0 * row.batch * row.columns * row.vocab,
        lambda row: row.layers * attention_operations(row),
    ),
}


def colreduce_case(
    batch: int, n_rows: int, n_keys: int, causal: bool
) -> tuple[dict[str, Callable[[], Any]], Callable[[Any], None]]:
    """All columns, per head, without the log-sum-exp; and what a decoder needs of it, 32 columns with it."""
    g = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(batch, 32, n_rows, 128, generator=g, device="cuda", dtype=torch.float16)
    k = torch.randn(batch, 32, n_keys, 128, generator=g, device="cuda", dtype=torch.float16)
    lse = torch.full((batch, 32, n_rows), 10.0, device="cuda")
    candidates = ours(
        "column_scores",
        (q, k),
        lambda backend: column_scores(q, k, causal=causal, per_head=True, backend=backend),
    )
    last = slice(n_keys - 32, n_keys)
    for backend in list(candidates):
        candidates[f"{backend}, 32 columns, LSE given"] = lambda backend=backend: column_scores(
            q, k, columns=last, causal=causal, softmax_lse=lse, backend=backend
        )
    try:
        from flash_colreduce import flash_colreduce
    except ImportError:
        pass
    else:
        candidates["flash-colreduce"] = lambda: flash_colreduce(q, k, "sum", is_causal=causal)

    def check(result: Tensor) -> None:
        if result.dim() == 3:  # every row of the attention matrix sums to 1
            total = result.float().sum(-1)
            torch.testing.assert_close(total, torch.full_like(total, n_rows), rtol=1e-2, atol=1e-2)

    return candidates, check


def forward_pass(row: Row, timer: Timer) -> float:
    """Microseconds of a forward pass of the row's model; one layer's random weights serve all layers."""
    width, hidden = row.heads * row.headdim, 3 * row.heads * row.headdim
    kv = row.kv_heads * row.headdim
    weights = [
        0.01 * torch.randn(shape, device="cuda", dtype=DTYPE)
        for shape in (
            (width, width + 2 * kv),
            (width, width),
            (width, 2 * hidden),
            (hidden, width),
            (width, row.vocab),
        )
    ]
    x = torch.randn(row.batch, row.n_rows, width, device="cuda", dtype=DTYPE)

    def run() -> Tensor:
        y = x
        for _ in range(row.layers):
            q, k, v = (y @ weights[0]).split([width, kv, kv], dim=-1)
            q, k, v = (t.unflatten(-1, (-1, row.headdim)).transpose(1, 2) for t in (q, k, v))
            a = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, enable_gqa=row.heads != row.kv_heads
            )
            y = y + a.transpose(1, 2).flatten(2) @ weights[1]
            gate, up = (y @ weights[2]).chunk(2, dim=-1)
            y = y + (torch.nn.functional.silu(gate) * up) @ weights[3]
        return y @ weights[4]

    return timer(run, 5)["cold"]


def main() -> None:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Time the kernels on this GPU.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", choices=ROWS, default=list(ROWS), metavar="N")
    parser.add_argument("--seconds", type=float, default=240.0, help="start no case after so long")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    stop = time.perf_counter() + options.seconds
    timer = Timer()
    floor = Floor(timer)
    results: list[dict[str, Any]] = []

    def measure(name: str, shape: str, make: Callable[[], Any], least: float | None) -> None:
        result: dict[str, Any] = {"case": name, "shape": shape, "floor_us": least, "us": {}, "failed": {}}
        results.append(result)
        if time.perf_counter() > stop:
            result["failed"]["all"] = f"not started: {options.seconds:g} seconds had passed"
            return
        try:
            candidates, check = make()
        except torch.OutOfMemoryError as error:
            result["failed"]["all"] = f"out of memory: {error}"
            return
        for candidate, run in candidates.items():
            try:
                check(run())
                result["us"][candidate] = timer(run)
            except (AssertionError, RuntimeError) as error:
                result["failed"][candidate] = f"{type(error).__name__}: {error}".splitlines()[0]
        torch.cuda.empty_cache()

    for name, (make, n_bytes, operations) in CASES.items():
        for number in options.rows:
            row = ROWS[number]
            label = f"{number}: {row.name}"
            measure(name, label, lambda make=make, row=row: make(row), floor(n_bytes(row), operations(row)))
    for shape in COLREDUCE_ROWS:
        label = "B={} M={} N={} causal={}".format(*shape)
        measure("all columns per head", label, lambda shape=shape: colreduce_case(*shape), None)
    for n_keys in (1024, 4096, 16384, 65536, 131072):
        row = ROWS[13]._replace(n_keys=n_keys)
        label = f"N={n_keys}"
        measure("columns by context", label, lambda row=row: columns_case(row), floor(attention_bytes(row)))
    forward = forward_pass(ROWS[2], timer)
    write(options.folder, results, floor, forward)


def write(folder: Path, results: list[dict[str, Any]], floor: Floor, forward: float) -> None:
    """The figures as JSON, and as tables to read."""
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "attn_sampler": attn_sampler.__version__,
        "copy_GB_per_s": round(floor.bytes / 1e3, 1),
        "bfloat16_TFLOP_per_s": round(floor.operations / 1e6, 1),
        "forward_pass_of_row_2_us": round(forward, 1),
        "off": {name: installation_problem(name) for name in BACKENDS if installation_problem(name)},
        "date": time.strftime("%Y-%m-%d"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    lines = ["# On a GPU", "", ", ".join(f"{name}: {value}" for name, value in machine.items())]
    for case in dict.fromkeys(result["case"] for result in results):
        lines += [
            "",
            f"## {case}",
            "",
            "| shape | floor us | candidate: cold / warm us (share of the floor) |",
            "|---|---|---|",
        ]
        for result in results:
            if result["case"] != case:
                continue
            least = result["floor_us"]
            cells = []
            for candidate, us in result["us"].items():
                share = f" ({100 * least / us['cold']:.0f}%)" if least else ""
                cells.append(f"{candidate}: {us['cold']:.1f} / {us['warm']:.1f}{share}")
            cells += [f"{candidate}: {reason}" for candidate, reason in result["failed"].items()]
            lines.append(f"| {result['shape']} | {f'{least:.1f}' if least else ''} | {'<br>'.join(cells)} |")
    (folder / "gpu.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
