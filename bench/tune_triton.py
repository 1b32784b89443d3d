"""Measure the candidates of the Triton launch table on this machine's GPU.

    python -m bench.tune_triton [--kernel column_scores ...]

Prints the entries of ``kernels/triton/launch.py``'s TABLE for this architecture: of each kernel and shape
class the configuration of the least geometric mean over the decode shapes of that class, where it beats the
present one by more than 3%.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from attn_sampler.kernels import launch

from attn_sampler import attention_map, column_scores, token_confidence

from .rows import DECODE
from .timing import CudaDevice

_GAIN = 1.03
DTYPE = torch.bfloat16


def column_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    for row in DECODE.values():
        q, k = row.attention(DTYPE, "cuda")
        lse = row.softmax_lse(q, k)
        columns = row.block
        shape_class = launch.attention_class(row.columns, row.headdim, 2)
        yield (
            shape_class,
            lambda q=q, k=k, lse=lse, columns=columns: column_scores(
                q, k, columns=columns, softmax_lse=lse, backend="triton"
            ),
        )


def lse_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """The same columns without the log-sum-exp: both kernels run, and only one of them changes."""
    for row in DECODE.values():
        if row.n_keys > 16384:
            continue
        q, k = row.attention(DTYPE, "cuda")
        columns = row.block
        n_rows = row.n_rows * row.heads // row.kv_heads
        shape_class = launch.attention_class(n_rows, row.headdim, 2)
        yield (
            shape_class,
            lambda q=q, k=k, columns=columns: column_scores(q, k, columns=columns, backend="triton"),
        )


def map_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    for row in DECODE.values():
        q, k = row.attention(DTYPE, "cuda")
        lse = row.softmax_lse(q, k)
        rows, columns = slice(0, min(row.columns, row.n_rows)), row.block
        shape_class = launch.attention_class(row.columns, row.headdim, 2)
        yield (
            shape_class,
            lambda q=q, k=k, lse=lse, rows=rows, columns=columns: attention_map(
                q, k, rows=rows, columns=columns, softmax_lse=lse, backend="triton"
            ),
        )


def confidence_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    for row, (dtype, shape_class) in itertools.product(
        (DECODE[n] for n in ("2", "6", "10", "12")), ((DTYPE, "narrow"), (torch.float32, "float32"))
    ):
        logits = row.logits(dtype, "cuda")
        yield shape_class, lambda logits=logits: token_confidence(logits, backend="triton")


TILES = [
    launch.Config(m, n, warps, stages)
    for m, n, warps, stages in itertools.product((16, 32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
    if 1024 <= m * n <= 8192
]
STREAMS = [
    launch.Config(k, w, warps, 1)
    for k, w, warps in itertools.product((1, 2, 4, 8), (512, 1024, 2048), (4, 8))
]
KERNELS = {
    "column_scores": (column_calls, TILES),
    "row_lse": (lse_calls, TILES),
    "attention_map": (map_calls, TILES),
    "token_confidence": (confidence_calls, STREAMS),
}


def tune(kernel: str, timer: CudaDevice) -> None:
    """Print the better entries of one kernel."""
    make_calls, candidates = KERNELS[kernel]
    calls: dict[str, list[Callable[[], Any]]] = {}
    for shape_class, call in make_calls():
        calls.setdefault(shape_class, []).append(call)
    device = torch.device("cuda", torch.cuda.current_device())
    architecture = launch.architecture(device)
    for shape_class, runs in calls.items():
        key = (kernel, architecture, shape_class)
        present = launch.config(kernel, shape_class, device)
        times: dict[launch.Config, float] = {}
        for config in dict.fromkeys((present, *candidates)):
            launch.TABLE[key] = config
            try:
                runs_by_name = {str(i): run for i, run in enumerate(runs)}
                figures = timer.measure(runs_by_name, lambda: None, seconds=0.0, least=10).values()
                if failed := [f["failed"] for f in figures if "failed" in f]:
                    raise RuntimeError(failed[0])
                cold = [1e3 * figure["median_ms"] for figure in figures]
            except Exception as error:  # shared memory or registers beyond the device's
                print(f"# {shape_class} {tuple(config)}: {type(error).__name__}", flush=True)
                torch.cuda.synchronize()
                continue
            times[config] = math.exp(sum(map(math.log, cold)) / len(cold))
        launch.TABLE[key] = present
        best = min(times, key=times.__getitem__)
        figures = f"{times[best]:.1f} us, was {times[present]:.1f}"
        if times[present] > _GAIN * times[best]:
            print(f"    {key}: Config{tuple(best)},  # {figures}", flush=True)
        else:
            print(f"# {key}: stays at {tuple(present)} ({figures} at best)", flush=True)


def main() -> None:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune_triton", description="Tune the launch table.")
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    timer = CudaDevice()
    for kernel in options.kernel:
        tune(kernel, timer)


if __name__ == "__main__":
    main()
