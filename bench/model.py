"""A model of the time of a decoding step on an H200: what each assumption costs, beside what was measured.

    python -m bench model [--results FILE.json ...] [--output FILE.md] [--json]

The CUDA backend's step of bfloat16 inputs with the log-sum-exp given, greedy. Every term is an assumption
that a measurement can refute; the constants say where they come from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .cases import columns_cost, confidence_cost
from .rows import DECODE, Row

ELEMENT = 2  # bytes of q, k and the logits


class Gpu(NamedTuple):
    """What the device is assumed to do."""

    name: str = "H200"
    processors: int = 132
    schedulers: int = 4  # of a multiprocessor: a warp's instruction a cycle each
    bytes_per_s: float = 4.3e12  # of 4.8 on the data sheet, what a copy is reported to reach
    clock_hz: float = 1.755e9  # the lowest that it is seen to hold under load; 1.98e9 at most
    exponentials: int = 16  # a cycle of a multiprocessor: "CUDA C++ Programming Guide", arithmetic throughput
    products_per_s: float = 495e12  # by mma.sync, half of the data sheet's dense 989e12, which takes wgmma
    shared: int = 228 * 1024  # bytes of a multiprocessor


H200 = Gpu()

#: Instructions of a warp for a step of 64 rows and a tile of so many columns: in all, and for each further
#: slice of 128 of the head dimension. Common paths in `bench.cuda_resources --sass`, sm_90a, of the kernels
#: column_scores_or_step_kernel<BFloat16, 1, false>, <BFloat16, 4, false> and <BFloat16, 8, false>.
STEP_INSTRUCTIONS = {8: (400, 140), 32: (684, 282), 64: (836, 363)}

#: Of a thread for a greedy bfloat16 logit, counted in the same code; where tokens are drawn, more for each
#: eight of one load, and for each four that ask for random words, if none of them wins.
LOGIT_INSTRUCTIONS = 219 / 32
ASKED_INSTRUCTIONS = 30
NOISE_INSTRUCTIONS = 165

#: For how many of all fours of logits random words are made: where they are flat, rising or normal, and where
#: they are peaked. Counted of threads: a warp issues for its 32 together, which is more where they differ.
NOISE_SHARES = {"flat": 1.03, "peaked": 0.25}

#: Of the issue slots that can be used while loads are outstanding: an assumption.
ISSUE_SHARE = 0.8

# Microseconds, all assumptions.
LAUNCH_US = 2.5  # a graph's kernel, until it starts and from its end until that is seen
FIRST_LOAD_US = 1.5  # behind the arguments and the divisions before it
LOAD_US = 0.8  # until a load of a busy memory has come
REDUCE_US = 0.4  # a unit's sums over the threads of its block, which loads nothing meanwhile
TICKET_US = 1.0  # a fence and the counter
PARTIAL_LOAD_US = 0.019  # of a thread that adds the units' sums, each
LOOK_UP_US = 0.6  # which token of the group with the largest logit that is
SELECT_US = 2.0  # layers' sums among it

#: What most rows are meant to take, over their floor.
TARGET_RATIO = 1.25

_THREADS, _WARPS, _BLOCK_ROWS = 128, 4, 64
_MOST_PARTS = 528
_GROUP = 8  # tokens
_TURN = 4 * _THREADS  # groups that a block has in flight


class Plan(NamedTuple):
    """How csrc/cuda cuts a step into units (column_scores.cu, token_confidence.cu), for how many blocks."""

    resident: int  # blocks of a multiprocessor
    blocks: int
    logit_units: int
    splits: int  # units of a position's logits
    turns: int  # of a unit of them
    score_units: int
    members: int  # units whose sums add up to a tile's
    unit_steps: int  # of 64 rows
    tile: int  # columns
    tiles: int
    steps: int  # of a tile of a sequence and layer


class Share(NamedTuple):
    """What a block has to do."""

    steps: int = 0
    score_units: int = 0
    score_parts: int = 0  # tiles of a layer that it has units of
    groups: int = 0
    turns: int = 0
    logit_units: int = 0
    logit_parts: int = 0  # positions that it has units of


class Prediction(NamedTuple):
    """Microseconds of a row, and what they are made of."""

    row: str
    plan: Plan
    n_bytes: float
    floor: float
    warp_instructions: float
    memory: float  # of all multiprocessors alike, as the three that follow
    issue: float
    exponentials: float
    products: float
    rounds: float  # of the block that waits longest: its loads one behind the other, sums and tickets
    imbalance: float  # of the longest of these four: the fullest multiprocessor over the mean
    start: float
    tail: float

    @property
    def body(self) -> float:
        """The longest of the four at the fullest multiprocessor, or rounds."""
        return max(
            self.rounds, self.imbalance * max(self.memory, self.issue, self.exponentials, self.products)
        )

    @property
    def bound(self) -> str:
        """Which of them it is."""
        if self.body == self.rounds:
            return "rounds"
        names = ("memory", "issue", "exponentials", "products")
        return max(names, key=lambda name: getattr(self, name))

    @property
    def total(self) -> float:
        """What is predicted."""
        return self.start + self.body + self.tail

    @property
    def waves(self) -> float:
        """Of blocks, on the device whose multiprocessors hold `resident` each: one at the most."""
        return self.plan.blocks / (H200.processors * self.plan.resident)


def _clamp(x: int, least: int, most: int) -> int:
    return max(least, min(x, most))


def plan(row: Row, gpu: Gpu = H200) -> Plan:
    """The units and blocks of a row's step."""
    positions = row.batch * row.columns
    tile = 8 if row.columns <= 8 else 32 if row.columns <= 32 else 64
    tiles = -(-row.columns // tile)
    resident = 3 if tile > 32 else 4
    groups = -(-row.vocab // _GROUP)
    turns = _clamp(row.columns * groups // (_TURN * _MOST_PARTS // 2), 2, 8)
    splits = -(-groups // (turns * _TURN)) if positions else 0
    rows_per_list = row.n_rows * row.heads // row.kv_heads
    keys_bytes = -(-row.headdim // 32) * tile * 64
    slots = 1
    while slots < _WARPS and 2 * slots * rows_per_list <= _BLOCK_ROWS and 2 * slots * keys_bytes <= 48 * 1024:
        slots *= 2
    steps_per_list = max(-(-rows_per_list // (_BLOCK_ROWS // slots)), 1)
    steps = -(-row.kv_heads // slots) * steps_per_list
    unit_steps = members = 0
    if tiles and row.layers:
        unit_steps = -(-steps // _clamp(_MOST_PARTS // 2 // tiles, 1, steps))
        members = -(-steps // unit_steps)
    resident = min(max(gpu.shared // (keys_bytes * slots + 2048 + 1024), 1), resident)
    logit_units, score_units = positions * splits, row.batch * tiles * row.layers * members
    blocks = min(logit_units + score_units, gpu.processors * resident)
    return Plan(
        resident,
        blocks,
        logit_units,
        splits,
        turns,
        score_units,
        members,
        unit_steps,
        tile,
        tiles,
        steps,
    )


def _deal(units: int, blocks: int, start: int = 0) -> list[range]:
    """Each block's units: as many next to each other, the first few one more."""
    each, extra = divmod(units, max(blocks, 1))
    ends = [start + i * each + min(i, extra) for i in range(blocks + 1)]
    return [range(first, last) for first, last in itertools.pairwise(ends)]


def shares(row: Row, p: Plan) -> list[Share]:
    """What each block of a plan has to do: equal bytes (decode_step.cu)."""
    scores = _deal(p.score_units, p.blocks)
    first = p.score_units % p.blocks if p.blocks else 0
    others = p.blocks - first
    score_bytes = p.unit_steps * _BLOCK_ROWS * row.headdim * ELEMENT
    more = others * score_bytes // (p.turns * _TURN * _GROUP * ELEMENT)
    of_first = _clamp((p.logit_units - more) * first // max(p.blocks, 1), 0, p.logit_units)
    logits = _deal(of_first, first) + _deal(p.logit_units - of_first, others, of_first)
    groups, of_unit = -(-row.vocab // _GROUP), p.turns * _TURN
    found = []
    for own_scores, own_logits in zip(scores, logits, strict=True):
        steps = sum(min(p.unit_steps, p.steps - u % p.members * p.unit_steps) for u in own_scores)
        of_units = [min(of_unit, groups - u % p.splits * of_unit) for u in own_logits]
        found.append(
            Share(
                steps,
                len(own_scores),
                len({u // p.members for u in own_scores}),
                sum(of_units),
                sum(-(-n // _TURN) for n in of_units),
                len(own_logits),
                len({u // p.splits for u in own_logits}),
            )
        )
    return found


def _fullest(of_blocks: Sequence[float], processors: int) -> float:
    """Of a multiprocessor, blocks being handed out in turn."""
    return max(sum(of_blocks[i::processors]) for i in range(processors)) if of_blocks else 0.0


def predict(name: str, row: Row, gpu: Gpu = H200, noise: float | None = None) -> Prediction:
    """What a step of this row should take: greedy, or with such a share of the random words asked for."""
    p = plan(row, gpu)
    n_bytes = products = 0.0
    if p.score_units:
        n_bytes += row.layers * columns_cost(row, ELEMENT)[0]
        products = 2.0 * _BLOCK_ROWS * p.tile * row.headdim
    if p.logit_units:
        n_bytes += confidence_cost(row, ELEMENT)[0]
    slices = max(-(-row.headdim // 128), 1)
    first, further = STEP_INSTRUCTIONS[p.tile]
    of_step = first + (slices - 1) * further
    of_logit = LOGIT_INSTRUCTIONS
    if noise is not None:
        of_logit += ASKED_INSTRUCTIONS / _GROUP + noise * NOISE_INSTRUCTIONS / 4
    each = shares(row, p)
    cycles = gpu.processors * gpu.clock_hz
    step_bytes = _BLOCK_ROWS * (row.headdim * ELEMENT + 4.0)
    # Of each block: bytes, instructions of warps, exponentials, operations.
    of_blocks = [
        (
            s.steps * step_bytes + s.groups * _GROUP * ELEMENT,
            _WARPS * s.steps * of_step + s.groups * _GROUP * of_logit / 32,
            s.steps * _BLOCK_ROWS * p.tile + s.groups * _GROUP,
            s.steps * products,
        )
        for s in each
    ]
    sums = [sum(x) for x in zip(*of_blocks, strict=True)] or [0.0] * 4
    terms = {
        "memory": 1e6 * n_bytes / gpu.bytes_per_s,
        "issue": 1e6 * sums[1] / (cycles * gpu.schedulers * ISSUE_SHARE),
        "exponentials": 1e6 * sums[2] / (cycles * gpu.exponentials),
        "products": 1e6 * sums[3] / gpu.products_per_s,
    }
    longest = list(terms.values()).index(max(terms.values()))
    imbalance = 1.0
    if p.blocks:
        imbalance = _fullest([x[longest] for x in of_blocks], gpu.processors) * gpu.processors / sums[longest]
    step_us = LOAD_US + 1e6 * of_step / gpu.clock_hz
    turn_us = max(LOAD_US, 1e6 * of_logit * _GROUP * _TURN / _THREADS / gpu.clock_hz)
    waits = [
        s.steps * step_us
        + s.turns * turn_us
        + (s.score_units + s.logit_units) * REDUCE_US
        + (s.score_parts * (p.members > 1) + s.logit_parts * (p.splits > 1)) * TICKET_US
        for s in each
    ]
    tails = [0.0]
    if p.members > 1:
        tails.append(TICKET_US + math.ceil(p.members * p.tile / _THREADS) * PARTIAL_LOAD_US)
    if p.logit_units:
        of_units = TICKET_US + math.ceil(p.splits / _THREADS) * PARTIAL_LOAD_US
        tails.append(LOOK_UP_US + of_units * (p.splits > 1))
    return Prediction(
        row=name,
        plan=p,
        n_bytes=n_bytes,
        floor=terms["memory"],
        warp_instructions=sums[1],
        memory=terms["memory"],
        issue=terms["issue"],
        exponentials=terms["exponentials"],
        products=terms["products"],
        # The first load is part of the start, a last ticket of the tail.
        rounds=max((w - LOAD_US - TICKET_US * (max(p.members, p.splits) > 1) for w in waits), default=0.0),
        imbalance=imbalance,
        start=LAUNCH_US + (FIRST_LOAD_US if p.blocks else 0.0),
        tail=max(tails) + TICKET_US + SELECT_US if p.blocks else 0.0,
    )


def target(name: str, floor: float) -> float | None:
    """What a row is meant to take at the most; None of one of which that is not said."""
    if name in ("1", "2", "4", "6", "8", "11", "12"):
        return TARGET_RATIO * floor
    if name == "13":
        return TARGET_RATIO * floor + 3.0
    return 8.0 if name == "10" else None


def measured(results: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Microseconds of the CUDA backend's steps, cold and warm, by row, in result files of a GPU."""
    found: dict[str, dict[str, float]] = {}
    for result in results:
        for cell in result["cells"]:
            figure = cell.get("figures", {}).get("cuda", {})
            if cell["case"] == "step" and cell["device"] == "cuda" and "median_ms" in figure:
                of_row = found.setdefault(cell["row"], {})
                of_row["cold"] = 1e3 * figure["median_ms"]
                if "warm_ms" in figure:
                    of_row["warm"] = 1e3 * figure["warm_ms"]
    return found


def table(taken: Mapping[str, Mapping[str, float]], rows: Mapping[str, Row] = DECODE) -> str:
    """A Markdown table of all rows."""
    lines = [
        "| row | MB | floor | M instructions | memory | issue | exponentials | products | rounds "
        "| units, logits + scores | blocks | waves | imbalance | start | tail "
        "| predicted, 1.98 to 1.755 GHz | bound | target | sampled, peaked to flat | measured cold | warm "
        "| cold over predicted |",
        "|---" * 22 + "|",
    ]
    for name, row in rows.items():
        slow, fast = predict(name, row), predict(name, row, H200._replace(clock_hz=1.98e9))
        sampled = " to ".join(
            f"{predict(name, row, noise=NOISE_SHARES[kind]).total:.1f}" for kind in ("peaked", "flat")
        )
        figure = taken.get(name, {})
        cold, warm = (f"{figure[key]:.1f}" if key in figure else "-" for key in ("cold", "warm"))
        ratio = f"{figure['cold'] / slow.total:.2f}" if "cold" in figure else "-"
        most = target(name, slow.floor)
        lines.append(
            f"| {name}: {row.name} | {slow.n_bytes / 1e6:.1f} | {slow.floor:.1f} "
            f"| {slow.warp_instructions / 1e6:.1f} | {slow.memory:.1f} | {slow.issue:.1f} "
            f"| {slow.exponentials:.1f} | {slow.products:.1f} | {slow.rounds:.1f} "
            f"| {slow.plan.logit_units} + {slow.plan.score_units} | {slow.plan.blocks} | {slow.waves:.2f} "
            f"| {slow.imbalance:.2f} | {slow.start:.1f} | {slow.tail:.1f} | {fast.total:.1f} to "
            f"{slow.total:.1f} | {slow.bound} | {'-' if most is None else f'{most:.1f}'} | {sampled} "
            f"| {cold} | {warm} | {ratio} |"
        )
    return "\n".join(lines)


def verdict(rows: Mapping[str, Row] = DECODE) -> str:
    """Which rows the model puts within their target, and why not the others: a Markdown list."""
    within, lines = [], []
    for name, row in rows.items():
        p = predict(name, row)
        most = target(name, p.floor)
        if most is None:
            continue
        if p.total <= most:
            within.append(name)
            continue
        why = (
            f"Start and tail alone are {p.start + p.tail:.1f}, and the target leaves {most - p.floor:.1f} "
            "beside the floor"
        )
        if p.body > 1.05 * p.floor:
            cause = {
                "rounds": "a block waits for one round of loads after the other",
                "memory": f"the fullest multiprocessor has {p.imbalance:.2f} times its share",
            }.get(p.bound, f"the bound is {p.bound}")
            why += f"; the body takes {p.body - p.floor:.1f} more than the floor: {cause}"
        lines.append(f"- Row {name}: {p.total:.1f} for {most:.1f}. {why}.")
    if within:
        lines.insert(0, f"- Within: rows {', '.join(within)}.")
    return "\n".join(lines)


def page(results: Iterable[Mapping[str, Any]] = ()) -> str:
    """The whole page."""
    taken = measured(results)
    if taken:
        state = "The columns *measured* are from result files; all others are computed."
    else:
        state = (
            "**Nothing here is measured**: every figure is computed from shapes, counts of machine code and "
            "assumptions, for a first run on a GPU to confirm or refute."
        )
    of_steps = ", ".join(f"{n} for {columns} columns" for columns, (n, _) in STEP_INSTRUCTIONS.items())
    return f"""# A model of the time of a decoding step

{state}

`python -m bench model`: the CUDA backend, bfloat16, log-sum-exp given, greedy; microseconds. Predicted is
start + body + tail; the body is imbalance x the longest of memory, issue, exponentials and products, or the
rounds of one block, where these take longer. Where a measured time differs, the column that would have to be
another tells which assumption was wrong.

{table(taken)}

## Targets

Rows 1, 2, 4, 6, 8, 11 and 12 are to take {TARGET_RATIO:g} times their floor at the most, row 13 that and
3 us, row 10 8 us in a graph. What the model says of them:

{verdict()}

## What is assumed

- Of an {H200.name}: {H200.processors} multiprocessors of {H200.schedulers} schedulers,
  {H200.bytes_per_s / 1e12:g} TB/s, {H200.exponentials} exponentials a cycle of a multiprocessor,
  {H200.products_per_s / 1e12:g} TFLOP/s by `mma.sync`, {ISSUE_SHARE:g} of the issue slots.
- Counted in sm_90a's code: {LOGIT_INSTRUCTIONS:.1f} instructions a logit;
  of a warp for 16 rows of 128 elements, {of_steps}.
- Sampled: {ASKED_INSTRUCTIONS / _GROUP:.1f} instructions more for every logit, and {NOISE_INSTRUCTIONS} for
  each four that ask for random words and do not win. Words are made for {NOISE_SHARES["flat"]:g} of all fours
  where logits are flat, normal or rising, for {NOISE_SHARES["peaked"]:g} where they are peaked: where the
  largest, scaled, is more than the largest noise, 22.9, above most others, and known to the block. These
  shares are those of single threads: a warp of which one asks takes as long as if all did.
- The units and their shares are those of `csrc/cuda`: units of a size that one sequence decides, one wave of
  blocks with equal bytes. Imbalance is what the fullest multiprocessor has over the mean, where blocks are
  handed out in turn.
- Rounds, of the block that has most of them: {LOAD_US:g} for each turn of logits (64 bytes a thread, asked
  for while the turn before is worked on); the same and the step's own instructions for each step of scores
  (nothing is asked for ahead); {REDUCE_US:g} for the sums of a unit; {TICKET_US:g} for a ticket.
- Start: {LAUNCH_US:g} for the launch, {FIRST_LOAD_US:g} to the first bytes. Tail: a ticket of the units that
  add up, {1e3 * PARTIAL_LOAD_US:g} ns for each partial sum that a thread adds, {LOOK_UP_US:g} for the token
  of the largest logit, a ticket of the sequence, {SELECT_US:g} for the selection with the sums over layers.
"""


def write(path: Path, results: Iterable[Mapping[str, Any]] = ()) -> None:
    """Write the page."""
    path.write_text(page(results))
