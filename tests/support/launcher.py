"""Processes that are told who they are as torchrun tells its own, for what is shared between ranks.

They are forked from a process that has imported the package, which spares each the seconds of it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["attn_sampler.cli", "torch._dynamo"]
)  # which the bundled models take long for
_TIME_LIMIT = 100  # seconds


class Ended(NamedTuple):
    status: int  # -9: killed
    out: str
    err: str


def launch(size: int, folder: Path, target: Callable[..., int | None], *arguments: Any) -> list[Ended]:
    """How each of so many processes ended that called ``target``, a function of a module."""
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )  # as torchrun's agent has it
    processes = [
        _CONTEXT.Process(target=_run, args=(rank, size, store.port, folder, target, arguments))
        for rank in range(size)
    ]
    try:
        for process in processes:
            process.start()
        end = time.monotonic() + _TIME_LIMIT
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        statuses = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    written = [[(folder / f"{name}{rank}").read_text() for name in ("out", "err")] for rank in range(size)]
    assert None not in statuses, f"hangs: {statuses}, {written}"
    return [Ended(status, *texts) for status, texts in zip(statuses, written, strict=True)]


def _run(
    rank: int, size: int, port: int, folder: Path, target: Callable[..., int | None], arguments: tuple
) -> None:
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), stream.fileno())
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    sys.exit(target(*arguments))
