"""Time the kernels on real decode shapes against PyTorch, on this machine's CPU.

    python -m bench [--rows 1 2 6] [--threads 1 2] [--dtype bfloat16] [--json FILE]

Every result is checked before it is timed. Candidates run interleaved in one process; the table shows
medians, and ratios to ours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import attn_sampler
from attn_sampler import _core, column_scores, reference, token_confidence

from . import rivals
from .rows import ROWS

_SECONDS = 1.5  # for each candidate of a comparison


def median_ms(candidates: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median milliseconds of each candidate, run in turns."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    stop = time.perf_counter() + _SECONDS * len(candidates)
    while time.perf_counter() < stop or min(map(len, samples.values())) < 3:
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(times[1:]) for name, times in samples.items()}


def column_scores_case(number: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Scores of the candidate columns of one layer."""
    row = ROWS[number]
    q, k, lse = row.attention(dtype)
    columns = slice(row.n_keys - row.columns, row.n_keys)
    exact = reference.column_scores(q.double(), k[:, :, columns].double(), softmax_lse=lse.double())
    candidates = {
        "ours": lambda: column_scores(q, k, columns=columns, softmax_lse=lse, backend="cpu"),
        "block matmul": lambda: rivals.block_scores(q, k, lse, columns),
        "naive": lambda: rivals.naive_scores(q, k, columns),
    }
    torch.testing.assert_close(candidates["ours"]().double(), exact, rtol=1e-5, atol=1e-6)
    return candidates


def token_confidence_case(number: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Token and probability of every candidate."""
    logits = ROWS[number].logits(dtype)
    candidates = {
        "ours": lambda: token_confidence(logits, backend="cpu"),
        "softmax + max": lambda: rivals.softmax_max(logits),
        "float64": lambda: rivals.float64_confidence(logits),
    }
    (ids, confidence), (true_ids, true_confidence) = candidates["ours"](), candidates["float64"]()
    torch.testing.assert_close(logits.gather(-1, ids[..., None]), logits.gather(-1, true_ids[..., None]))
    torch.testing.assert_close(confidence.double(), true_confidence, rtol=1e-5, atol=1e-7)
    return candidates


CASES = {"column_scores": column_scores_case, "token_confidence": token_confidence_case}


def main() -> None:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Time the kernels on this CPU.")
    parser.add_argument("--rows", type=int, nargs="+", choices=ROWS, default=list(ROWS), metavar="N")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    if (problem := _core.UNAVAILABLE) is not None:
        parser.error(problem)
    console = Console(width=None if Console().is_terminal else 120)
    results = []
    for function, make_case in CASES.items():
        table = Table("row", "shape", "threads", "ours ms", "rivals: ms (times ours)", title=function)
        for number in track(options.rows, description=function, console=console, transient=True):
            candidates = make_case(number, getattr(torch, options.dtype))
            for threads in options.threads:
                torch.set_num_threads(threads)
                ms = median_ms(candidates)
                results.append({"function": function, "row": number, "threads": threads, "ms": ms})
                others = [f"{n} {t:.3g} ({t / ms['ours']:.1f}x)" for n, t in ms.items() if n != "ours"]
                table.add_row(
                    str(number), ROWS[number].name, str(threads), f"{ms['ours']:.3g}", ", ".join(others)
                )
        console.print(table)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "cpu_isa": _core.cpu_isa(),
        "torch": torch.__version__,
        "attn_sampler": attn_sampler.__version__,
        "dtype": options.dtype,
        "date": time.strftime("%Y-%m-%d"),
    }
    console.print(" ".join(f"{name}={value}" for name, value in machine.items()))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
