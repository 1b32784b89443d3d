"""Time what a call costs on its way to the kernels.

    python -m bench.overhead [--device cpu] [--seconds 0.5]
    TRITON_INTERPRET=1 python -m bench.overhead --backend triton

The batch is empty, so that the kernels find nothing to do. Of a call's microseconds (medians of the thread's
processor time), *extension* is the compiled part, which reads the tensors, checks everything and plans the
launch; *outputs* is torch's part in allocating the results; *Python* is the rest. *checked* is the call where
Python checks the arguments, as for a backend that does not: with an older torch, or Triton. *by operator* is
the call where it then goes through torch's operator, for whatever listens to operators.

Of Triton's calls there are the last two: up to the launch, which is left out, with a batch of one.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from attn_sampler import (
    attention_map,
    checks,
    column_scores,
    command_line,
    decode_step,
    ops,
    select_tokens,
    token_confidence,
)
from attn_sampler.backends import BACKENDS, REGISTRY, extension, unavailable

_CALLS = 10  # for each sample
_HEADS, _KV_HEADS, _ROWS, _KEYS, _HEADDIM, _VOCAB = 32, 8, 32, 1280, 128, 32000
_BLOCK = slice(_KEYS - _ROWS, _KEYS)


def median_us(call: Callable[[], Any], seconds: float) -> float:
    """Median microseconds of a call."""
    samples: list[float] = []
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(samples) < 10:
        start = time.thread_time()
        for _ in range(_CALLS):
            call()
        samples.append(1e6 * (time.thread_time() - start) / _CALLS)
    return statistics.median(samples)


def calls(device: str, backend: str, batch: int) -> list[tuple[str, int, Callable[[], Any]]]:
    """Function, number of layers, call."""

    def layer() -> tuple[torch.Tensor, ...]:
        q = torch.zeros(batch, _HEADS, _ROWS, _HEADDIM, dtype=torch.bfloat16, device=device)
        k = torch.zeros(batch, _KV_HEADS, _KEYS, _HEADDIM, dtype=torch.bfloat16, device=device)
        return q, k, torch.zeros(batch, _HEADS, _ROWS, device=device)

    def step(count: int) -> Callable[[], Any]:
        layers = [layer() for _ in range(count)]
        where = {"block": _BLOCK, "mask_token_id": _VOCAB - 1}
        return lambda: decode_step(tokens, logits, layers, **where, backend=backend)

    q, k, lse = layer()
    tokens = torch.zeros(batch, _KEYS, dtype=torch.int64, device=device)
    logits = torch.zeros(batch, _ROWS, _VOCAB, dtype=torch.bfloat16, device=device)
    scores = torch.zeros(batch, _ROWS, device=device)
    masked = torch.zeros(batch, _ROWS, dtype=torch.bool, device=device)
    attention = {"columns": _BLOCK, "softmax_lse": lse, "backend": backend}
    return [
        *(("decode_step", count, step(count)) for count in (1, 8, 32, 64)),
        ("column_scores", 1, lambda: column_scores(q, k, **attention)),
        ("attention_map", 1, lambda: attention_map(q, k, **attention)),
        ("token_confidence", 0, lambda: token_confidence(logits, backend=backend)),
        ("select_tokens", 0, lambda: select_tokens(scores, scores, masked, backend=backend)),
    ]


def split_us(call: Callable[[], Any], backend: str, seconds: float) -> dict[str, float]:
    """Median microseconds of a call and of its parts."""
    us = {}
    if REGISTRY[backend].checks_itself:
        with mock.patch.object(extension.Extension, "attempt", autospec=True, return_value=True) as attempt:
            result = call()
        arguments = attempt.call_args.args
        outputs = [
            x
            for x in torch.utils._pytree.tree_leaves(result)
            # What was asked for, but for the tokens, which are written in place.
            if x is not None and (x.dtype != torch.int64 or x.shape[1] == _ROWS)
        ]
        us["call"] = median_us(call, seconds)
        us["extension"] = median_us(lambda: extension.Extension.attempt(*arguments), seconds)
        us["outputs"] = median_us(lambda: [torch.empty_like(x) for x in outputs], seconds)
        us["Python"] = us["call"] - us["extension"] - us["outputs"]
    with mock.patch.object(ops, "direct", return_value=None):
        us["checked"] = median_us(call, seconds)
        with mock.patch.object(ops, "nothing_listens", return_value=False):
            us["by operator"] = median_us(call, seconds)
    return us


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    return command_line.guarded(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    parser = command_line.Parser(prog="python -m bench.overhead", description="Time the way to the kernels.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", choices=BACKENDS, help="default: the device's own")
    parser.add_argument("--seconds", type=command_line.seconds, default=0.5, help="for each figure")
    options = parser.parse_args(arguments)
    try:
        checks.device("argument --device", options.device)
    except ValueError as error:
        parser.error(str(error))
    backend = options.backend or options.device
    if (reason := unavailable(backend)) is not None:
        parser.error(reason)
    with contextlib.ExitStack() as stack:
        if backend == "triton":
            from attn_sampler.kernels import launch

            stack.enter_context(mock.patch.object(launch, "launch"))
        table = Table("function", "layers", title="microseconds a call")
        batch = 1 if backend == "triton" else 0
        for index, (function, layers, call) in enumerate(calls(options.device, backend, batch)):
            us = split_us(call, backend, options.seconds)
            for name in us if index == 0 else ():
                table.add_column(name, justify="right")
            table.add_row(function, str(layers or ""), *(f"{value:.1f}" for value in us.values()))
    Console(width=None if Console().is_terminal else 120).print(table)
    print(f"backend={backend} device={options.device} torch={torch.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
