"""One rank of the processes that ``test_distributed`` starts: ``rank world_size folder``."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from distributed_cases import CASES, adapters_step, share

from attn_sampler import distributed


def main(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    rendezvous = (folder / "rendezvous").as_uri()
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    results = {}
    for name, case in CASES.items():
        for ranks, group in ((4, None), (2, pairs[rank // 2])):
            results[name, ranks] = case.run(share(case, dist.get_rank(group), ranks), group)
    results["adapters", 4] = adapters_step(rank, world_size, dist.group.WORLD)
    scores = torch.full((2, 3), 0.1 * (rank + 1))
    results["sum_scores", 4] = (distributed.sum_scores(scores),)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
