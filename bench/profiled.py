"""One decoding step of a real shape, warm, between the profiler's start and stop.

ncu --profile-from-start off python -m bench.profiled --row 6 --backend cuda
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence

import torch

from attn_sampler import checks, decode_step

from .rows import DECODE

_WARM_UP = 3


@contextlib.contextmanager
def _profiler(device: str) -> Iterator[None]:
    """What a profiler that waits for it sees."""
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    yield
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def run(row_name: str, backend: str, device: str) -> int:
    """How many positions the step committed."""
    row = DECODE[row_name]
    q, k = row.attention(torch.bfloat16, device)
    layers = [(q, k, torch.zeros(q.shape[:3], device=device))] * row.layers
    logits = row.logits(torch.bfloat16, device)
    tokens = torch.full((row.batch, row.n_keys), row.vocab - 1, device=device)

    def step() -> int:
        how = {"block": row.block, "query_start": row.n_keys - row.n_rows, "mask_token_id": row.vocab - 1}
        return int(decode_step(tokens.clone(), logits, layers, backend=backend, **how).selected.sum())

    for _ in range(_WARM_UP):
        step()
    with _profiler(device):
        return step()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.profiled",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--row", choices=DECODE, required=True, metavar="ROW", help=f"of {' '.join(DECODE)}")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options = parser.parse_args(arguments)
    try:
        checks.device("argument --device", options.device)
    except ValueError as error:
        parser.error(str(error))
    print(f"committed: {run(options.row, options.backend, options.device)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
