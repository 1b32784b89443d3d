"""A model of the time of a decoding step on an H200: what each assumption costs, beside what was measured.

    python -m bench model [--results FILE.json ...] [--output FILE.md] [--json]

The CUDA backend's step of bfloat16 inputs with the log-sum-exp given, greedy. Every term is an assumption
that a measurement can refute; the constants say where they come from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
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
#: column_scores_or_step_kernel<BFloat16, 1>, <BFloat16, 4> and <BFloat16, 8>.
STEP_INSTRUCTIONS = {8: (437, 154), 32: (716, 270), 64: (861, 353)}

#: Of a thread for a greedy bfloat16 logit: 139 for eight, counted in the same code.
LOGIT_INSTRUCTIONS = 139 / 8

#: Of the issue slots that can be used while loads are outstanding: an assumption.
ISSUE_SHARE = 0.8

# Microseconds, all assumptions.
LAUNCH_US = 2.5  # a graph's kernel, until it starts and from its end until that is seen
FIRST_LOAD_US = 1.5  # behind the arguments and the divisions before it
TICKET_US = 1.0  # a fence and the counter
PARTIAL_LOAD_US = 0.019  # of a thread that adds the blocks' sums, each
SELECT_US = 2.0

_THREADS, _WARPS, _BLOCK_ROWS = 128, 4, 64
_GROUP, _LEAST_GROUPS = 8, 256  # tokens of a group; groups of a split at least


class Plan(NamedTuple):
    """How csrc/cuda cuts a step into blocks (column_scores.cu, token_confidence.cu)."""

    resident: int  # blocks of a multiprocessor
    confidence_blocks: int
    splits: int  # of a position's logits
    score_blocks: int
    members: int  # blocks whose sums add up to a tile's
    tile: int  # columns
    tiles: int
    steps: int  # of 64 rows, of a tile, over all members

    @property
    def blocks(self) -> int:
        """Of the launch."""
        return self.confidence_blocks + self.score_blocks


class Prediction(NamedTuple):
    """Microseconds of a row, and what they are made of."""

    row: str
    plan: Plan
    n_bytes: float
    floor: float
    warp_instructions: float
    memory: float
    issue: float
    exponentials: float
    products: float
    imbalance: float  # of the longest of these four: the blocks of the fullest multiprocessor over the mean
    start: float
    tail: float

    @property
    def body(self) -> float:
        """The longest of memory, issue, exponentials and products, at the fullest multiprocessor."""
        return self.imbalance * max(self.memory, self.issue, self.exponentials, self.products)

    @property
    def bound(self) -> str:
        """Which of them it is."""
        names = ("memory", "issue", "exponentials", "products")
        return max(names, key=lambda name: getattr(self, name))

    @property
    def total(self) -> float:
        """What is predicted."""
        return self.start + self.body + self.tail

    @property
    def waves(self) -> float:
        """Of blocks, on the device whose multiprocessors hold `resident` each."""
        return self.plan.blocks / (H200.processors * self.plan.resident)


def plan(row: Row, gpu: Gpu = H200) -> Plan:
    """The blocks of a row's step."""
    positions = row.batch * row.columns
    tile = 8 if row.columns <= 8 else 32 if row.columns <= 32 else 64
    tiles = -(-row.columns // tile)
    resident = 3 if tile > 32 else 4
    groups = row.vocab // _GROUP + 2
    splits = 0
    if positions and row.vocab:
        wanted = 2 * gpu.processors * 4 // positions
        most = min(max(groups // _LEAST_GROUPS, 1), _THREADS)
        splits = -(-groups // -(-groups // min(max(wanted, 1), most)))
    rows_per_list = row.n_rows * row.heads // row.kv_heads
    keys_bytes = -(-row.headdim // 32) * tile * 64
    slots = 1
    while slots < _WARPS and 2 * slots * rows_per_list <= _BLOCK_ROWS and 2 * slots * keys_bytes <= 48 * 1024:
        slots *= 2
    steps_per_list = max(-(-rows_per_list // (_BLOCK_ROWS // slots)), 1)
    steps = -(-row.layers * row.kv_heads // slots) * steps_per_list
    resident = min(max(gpu.shared // (keys_bytes * slots + 1024), 1), resident)
    outputs = row.batch * tiles
    members = 0
    if outputs and steps:
        most = min(max(gpu.processors * resident // outputs, 1), steps)
        members = -(-steps // -(-steps // most))
    return Plan(resident, positions * splits, splits, outputs * members, members, tile, tiles, steps)


def predict(name: str, row: Row, gpu: Gpu = H200) -> Prediction:
    """What a step of this row should take."""
    p = plan(row, gpu)
    n_bytes = operations = 0.0
    if p.score_blocks:
        layer_bytes, _ = columns_cost(row, ELEMENT)
        n_bytes += row.layers * layer_bytes
        whole_tiles = row._replace(columns=p.tile * p.tiles)
        operations = row.layers * columns_cost(whole_tiles, ELEMENT)[1]
    if p.confidence_blocks:
        n_bytes += confidence_cost(row, ELEMENT)[0]
    logits = float(row.batch * row.columns * row.vocab)
    slices = max(-(-row.headdim // 128), 1)
    first, further = STEP_INSTRUCTIONS[p.tile]
    of_steps = (
        row.batch * p.tiles * p.steps * _WARPS * (first + (slices - 1) * further) if p.score_blocks else 0
    )
    instructions = of_steps + logits * LOGIT_INSTRUCTIONS / 32
    powers = logits + row.batch * p.tiles * p.steps * _BLOCK_ROWS * p.tile * (p.score_blocks > 0)
    cycles = gpu.processors * gpu.clock_hz
    fullest = math.ceil(p.blocks / gpu.processors)
    tail = 0.0
    if p.blocks:
        tail += TICKET_US + SELECT_US
        if max(p.members, p.splits) > 1:  # partial sums of a tile, or of a position
            stripes = _THREADS // p.tile
            loads = max(math.ceil(p.members / stripes), math.ceil(p.splits / _THREADS))
            tail += TICKET_US + loads * PARTIAL_LOAD_US
    return Prediction(
        row=name,
        plan=p,
        n_bytes=n_bytes,
        floor=1e6 * n_bytes / gpu.bytes_per_s,
        warp_instructions=instructions,
        memory=1e6 * n_bytes / gpu.bytes_per_s,
        issue=1e6 * instructions / (cycles * gpu.schedulers * ISSUE_SHARE),
        exponentials=1e6 * powers / (cycles * gpu.exponentials),
        products=1e6 * operations / gpu.products_per_s,
        imbalance=fullest * gpu.processors / p.blocks if p.blocks else 1.0,
        start=LAUNCH_US + (FIRST_LOAD_US if p.blocks else 0.0),
        tail=tail,
    )


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
        "| row | MB | floor | M instructions | memory | issue | exponentials | products | blocks, confidence "
        "+ scores | waves | imbalance | start | tail | predicted, 1.98 to 1.755 GHz | bound | measured cold "
        "| warm | cold over predicted |",
        "|---" * 18 + "|",
    ]
    for name, row in rows.items():
        slow, fast = predict(name, row), predict(name, row, H200._replace(clock_hz=1.98e9))
        figure = taken.get(name, {})
        cold, warm = (f"{figure[key]:.1f}" if key in figure else "-" for key in ("cold", "warm"))
        ratio = f"{figure['cold'] / slow.total:.2f}" if "cold" in figure else "-"
        lines.append(
            f"| {name}: {row.name} | {slow.n_bytes / 1e6:.1f} | {slow.floor:.1f} "
            f"| {slow.warp_instructions / 1e6:.1f} | {slow.memory:.1f} | {slow.issue:.1f} "
            f"| {slow.exponentials:.1f} | {slow.products:.1f} | {slow.plan.confidence_blocks} + "
            f"{slow.plan.score_blocks} | {slow.waves:.2f} | {slow.imbalance:.2f} | {slow.start:.1f} "
            f"| {slow.tail:.1f} | {fast.total:.1f} to {slow.total:.1f} | {slow.bound} | {cold} | {warm} "
            f"| {ratio} |"
        )
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
start + imbalance x the longest of memory, issue, exponentials and products + tail. Where a measured time
differs, the column that would have to be another tells which assumption was wrong.

{table(taken)}

What is assumed:

- Of an {H200.name}: {H200.processors} multiprocessors of {H200.schedulers} schedulers,
  {H200.bytes_per_s / 1e12:g} TB/s, {H200.exponentials} exponentials a cycle of a multiprocessor,
  {H200.products_per_s / 1e12:g} TFLOP/s by `mma.sync`, {ISSUE_SHARE:g} of the issue slots.
- Counted in sm_90a's code: {LOGIT_INSTRUCTIONS:.1f} instructions a logit;
  of a warp for 16 rows of 128 elements, {of_steps}.
- Start: {LAUNCH_US:g} for the launch, {FIRST_LOAD_US:g} to the first bytes. Tail: {TICKET_US:g} a ticket,
  {1e3 * PARTIAL_LOAD_US:g} ns for each partial sum that a thread adds, {SELECT_US:g} for the selection.
- Imbalance: the blocks of the fullest multiprocessor over the mean, all blocks alike.
"""


def write(path: Path, results: Iterable[Mapping[str, Any]] = ()) -> None:
    """Write the page."""
    path.write_text(page(results))
