"""Decoding steps that are done whole and on 2 and 4 ranks, for ``test_distributed``."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engine_toy import stub
from torch import Tensor, nn
from torch.nn import functional as F

from attn_sampler import decode_step, distributed
from attn_sampler.adapters._engine import BlockScores
from attn_sampler.reference import StepResult

BATCH, BLOCK, LENGTH, VOCAB, HEADS, KV_HEADS, HEADDIM = 3, 8, 20, 101, 8, 4, 16
PADDING = 5  # columns beyond the vocabulary on the last rank

#: Where each rank's share of the vocabulary begins and ends.
EVEN = {4: (0, 26, 52, 78, 101), 2: (0, 52, 101)}
UNEVEN = {4: (0, 7, 60, 60, 101), 2: (0, 1, 101)}  # a rank without a token; one with a single one


@dataclasses.dataclass
class Case:
    tokens: Tensor
    logits: Tensor
    layers: list[tuple[Tensor | None, ...]]
    bounds: dict[int, tuple[int, ...]]
    options: dict[str, Any]

    def whole(self) -> StepResult:
        """The step in one process."""
        return decode_step(self.tokens.clone(), self.logits, self.layers, **self.fresh_options())

    def fresh_options(self) -> dict[str, Any]:
        """The step writes its budget."""
        budget = self.options.get("budget")
        return self.options if budget is None else {**self.options, "budget": budget.clone()}

    def run(self, part: Case, group: dist.ProcessGroup | None) -> StepResult:
        start = part.bounds[1][0]
        return distributed.decode_step(
            part.tokens.clone(),
            part.logits,
            part.layers,
            vocab_start=start,
            vocab_size=VOCAB,
            group=group,
            **part.fresh_options(),
        )


def share(case: Case, rank: int, ranks: int) -> Case:
    """What one rank holds of a step."""

    def heads(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.tensor_split(ranks, dim=1)[rank]

    start, stop = case.bounds[ranks][rank : rank + 2]
    logits = case.logits[..., start:stop]
    if rank == ranks - 1:
        poison = torch.full((*logits.shape[:2], PADDING), torch.nan, dtype=logits.dtype)
        logits = torch.cat([logits, poison], dim=-1)
    layers = [tuple(heads(x) for x in layer) for layer in case.layers]
    return dataclasses.replace(case, logits=logits, layers=layers, bounds={1: (start, stop)})


class HeadShard(nn.Module):
    """A model with some of the heads of the case's first layer."""

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__()
        (q, k, _), *_ = CASES["probability, temperature 0.0"].layers
        self.q, self.k = (x.tensor_split(ranks, dim=1)[rank] for x in (q, k))

    def forward(self) -> Tensor:
        return F.scaled_dot_product_attention(self.q, self.k, self.k, enable_gqa=True)


def adapters_step(rank: int, ranks: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Tokens that the dInfer decoder commits, and scores as the engines with paged caches add them up."""
    case = CASES["probability, temperature 0.0"]
    with pytest.MonkeyPatch.context() as patch:
        decoder = type("ParallelDecoder", (), {"__init__": lambda self, *_, **__: None})
        modules = {"dinfer": {"__version__": "0.1"}}
        stub(patch, modules | {"dinfer.decoding.parallel_strategy": {"ParallelDecoder": decoder}})
        from attn_sampler.adapters.dinfer import AttnParallelDecoder
    model = HeadShard(rank, ranks)
    adapter = AttnParallelDecoder(model, mask_id=case.options["mask_token_id"], tau=0.3, group=group)
    model()
    tokens, block = case.tokens.clone(), case.options["block"]
    adapter.decode(case.logits, block.start, block.stop, tokens)

    scores = BlockScores(BLOCK, group=group)
    for first in (True, False):
        q, k = (x[:, :, block].transpose(1, 2).flatten(0, 1) for x in (model.q, model.k))
        scores.add(q, k, first=first, last=not first)
    return tokens, scores.read(BATCH)


def _case(
    number: int, bounds: dict[int, tuple[int, ...]] = EVEN, *, batch: int = BATCH, **options: Any
) -> Case:
    generator = torch.Generator().manual_seed(number)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    block, mask = slice(9, 9 + BLOCK), options.pop("mask_token_id", 60)
    dtype = options.pop("dtype", torch.float32)
    tokens = torch.randint(0, VOCAB, (batch, LENGTH), generator=generator)
    tokens[tokens == mask] = (mask + 1) % VOCAB
    tokens[:, block] = torch.where(normal(batch, BLOCK) < 0.6, mask, tokens[:, block])
    layers = []
    for _ in range(2):
        q, k = normal(batch, HEADS, LENGTH, HEADDIM), normal(batch, KV_HEADS, LENGTH, HEADDIM)
        grouped = k.repeat_interleave(HEADS // KV_HEADS, dim=1)
        lse = torch.logsumexp(q @ grouped.transpose(-1, -2) * HEADDIM**-0.5, dim=-1)
        layers.append((q.to(dtype), k.to(dtype), lse if options.get("softmax_scope") != "block" else None))
    logits = (normal(batch, BLOCK, VOCAB) * options.pop("spread", 3.0)).to(dtype)
    return Case(
        tokens, logits, layers, bounds, {"block": block, "mask_token_id": mask, "tau": 0.3, **options}
    )


def _tied() -> Case:
    """Whole-numbered logits: the largest is met several times, on several ranks."""
    case = _case(20, UNEVEN, temperature=0.0)
    case.logits.round_().clamp_(-2, 4)
    return case


def _float8() -> Case:
    """Queries and keys in float8, with a scale for each head."""
    case = _case(18, UNEVEN)
    descales = 1.0 + torch.rand(2, BATCH, KV_HEADS, generator=torch.Generator().manual_seed(18))
    group = HEADS // KV_HEADS
    layers = []
    for q, k, _ in case.layers:
        q, k = q.to(torch.float8_e4m3fn), k.to(torch.float8_e4m3fn)
        real_q = q.float() * descales[0].repeat_interleave(group, dim=1)[:, :, None, None]
        real_k = (k.float() * descales[1][:, :, None, None]).repeat_interleave(group, dim=1)
        lse = torch.logsumexp(real_q @ real_k.transpose(-1, -2) * HEADDIM**-0.5, dim=-1)
        layers.append((q, k, lse, *descales))
    return dataclasses.replace(case, layers=layers)


def _revising(number: int, bounds: dict[int, tuple[int, ...]] = EVEN, **options: Any) -> Case:
    """Some positions may be revised, and some of these are."""
    generator = torch.Generator().manual_seed(number)
    budget = torch.randint(0, 3, (BATCH, BLOCK), generator=generator, dtype=torch.int32)
    thresholds = {"replace_tau": 0.2, "remask_tau": 0.01, "max_revisions": 2}
    return _case(number, bounds, budget=budget, rule="threshold", **{**thresholds, **options})


def _undefined(number: int, **options: Any) -> Case:
    """Infinities and NaN: in one shard, in all, alone and beside numbers."""
    case = _case(number, **options)
    x, mask = case.logits, case.options["mask_token_id"]
    x[0, 0] = -torch.inf
    x[0, 1, :78] = -torch.inf
    x[0, 2, 78:] = -torch.inf
    x[0, 3, 30] = torch.nan
    x[0, 4, 80] = torch.inf
    x[0, 5] = torch.nan
    x[0, 6, :52], x[0, 6, 61] = -torch.inf, torch.nan
    x[0, 7, 26:52] = -torch.inf
    x[0, 7, 40] = torch.nan
    x[1, :, mask] = torch.inf  # the excluded token counts nowhere
    x[2, :, mask] = torch.nan
    return case


def _cases() -> dict[str, Case]:
    cases = {}
    for metric in ("probability", "margin", "entropy"):
        for temperature in (0.0, 0.7):
            drawn = {"temperature": temperature, "seed": 11 if temperature else None, "metric": metric}
            if metric == "entropy":
                drawn["tau"] = 0.0
            label = f"{metric}, temperature {temperature}"
            cases[label] = _case(1, **drawn)
            cases[f"{label}, uneven"] = _case(2, UNEVEN, rule="sequential", **drawn)
            cases[f"{label}, undefined"] = _undefined(3, **drawn)
    drawn = {"temperature": 1.0, "seed": torch.tensor([5, -7, 2**62])}
    cases |= {
        "ties": _tied(),
        "one seed a row": _case(4, UNEVEN, **drawn),
        "large seed": _case(5, temperature=0.9, seed=2**63 + 12345),
        "cold": _case(6, temperature=2.0**-40, seed=3),
        "hot": _case(7, UNEVEN, temperature=1e4, seed=3, metric="margin"),
        "large logits": _case(8, spread=300.0),
        "bfloat16": _case(9, UNEVEN, dtype=torch.bfloat16),
        "float16, sampled": _case(10, UNEVEN, dtype=torch.float16, temperature=0.5, seed=1),
        "mask alone in its shard": _case(11, UNEVEN, mask_token_id=0, temperature=0.7, seed=9),
        "mask first in its shard": _case(12, mask_token_id=52, temperature=0.7, seed=9),
        "masked rows": _case(13, query_rows="masked", fallback="score", tau=0.99),
        "block scope": _case(14, softmax_scope="block", diagonal=False, reduction="mean"),
        "largest": _case(15, reduction="max"),
        "reference": _case(16, UNEVEN, backend="reference"),
        "empty batch": _case(17, batch=0),
        "float8": _float8(),
        "revision": _revising(21),
        "revision, uneven": _revising(22, UNEVEN, replace_tau=0.5, revision_order="doubt"),
        "revision, sampled": _revising(23, UNEVEN, max_revisions=None, **drawn),
    }
    return cases


CASES = _cases()
