"""The processes that torchrun starts, on one machine or several, each with a share of the work.

Who this process is comes from the environment that torchrun sets, as ``accelerate launch`` and others do.
Objects are gathered through gloo, whatever device the models are on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import traceback
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch

from attn_sampler.errors import DecodingError

T = TypeVar("T")

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: A rank may wait for another's whole share of the work; one that has ended is noticed at once.
_PATIENCE = timedelta(weeks=52)
#: Errors whose message says enough; of others, the faults of a program, the traceback is shown.
_TOLD = (DecodingError, OSError, ValueError)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """``size`` processes, of which this is number ``rank``."""

    rank: int = 0
    size: int = 1
    group: Any = None  # of torch.distributed

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on each of them."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:  # as gloo says that a connection is closed
            if self.rank > 0:
                raise SystemExit(1) from None  # at once: who is connected to this one alone waits for that
            raise DecodingError("another process of this run has ended") from error
        return values

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is raised in here on one rank ends all: rank 0 with a ``DecodingError``, others in silence.

        Alone, a process raises what was raised. Every rank has to come here.
        """
        message = None
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            message = str(error)
            if not isinstance(error, _TOLD):
                message = f"{type(error).__name__}: {error}"
                traceback.print_exception(error)
        for told in self.gather(message):
            if told is not None and self.rank == 0:
                raise DecodingError(told)
            if told is not None:
                self._await_the_first()
                raise SystemExit(1)

    def device(self, name: str) -> str:
        """Where this rank's model is put when ``name`` is asked for: each has a GPU of its own."""
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if self.size > 1 and name == "cuda" else name

    def _await_the_first(self) -> None:
        """Until rank 0 has told what went wrong: torchrun stops all processes when the first has failed."""
        import torch.distributed as dist

        with contextlib.suppress(RuntimeError):  # that it is gone
            dist.recv(torch.empty(1), src=0, group=self.group)


ALONE = Ranks()


def join() -> Ranks:
    """The processes that were launched with this one; ``ALONE`` where none was."""
    if any(name not in os.environ for name in _LAUNCHED) or os.environ["WORLD_SIZE"] == "1":
        return ALONE
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return Ranks(dist.get_rank(), dist.get_world_size(), group)


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The same, until this is left."""
    ranks = join()
    try:
        yield ranks
    finally:
        if ranks.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()
