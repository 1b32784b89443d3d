"""Looking for a rule that the bundled tasks favour: as right as confidence, in fewer passes than a threshold.

    python -m bench.rule_search             # candidates on the development problems
    python -m bench.rule_search --heldout   # those chosen there, and their rivals, on the held-out ones

Candidates that the library does not have are defined here; they are experiments and stay out of it. Options
of ``attn-sampler eval`` may follow. Results lie in ``bench/results/quality``; a rerun goes on where it stops.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
from torch import Tensor

from attn_sampler import Policy, StepState, register_policy
from attn_sampler.cli import main as command
from attn_sampler.dependency import MapPolicy, attention_weights, independent_set
from attn_sampler.sampler import top_positions

RESULTS = Path(__file__).parent / "results" / "quality"
TASKS = ("sudoku", "addition", "addition-second")
TAUS = (0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998)
CANDIDATES = (
    "confidence",
    *(f"threshold:tau={tau}" for tau in TAUS),
    *(f"factor:factor={factor}" for factor in (0.02, 0.05, 0.1, 0.15, 0.2)),
    *(f"eb:gamma={gamma}" for gamma in (0.005, 0.02, 0.05)),
    *(f"joint:budget={budget}" for budget in (0.02, 0.05, 0.1)),
    *(f"settled:tau={tau},tau_low={low}" for tau, low in ((0.99, 0.9), (0.98, 0.9), (0.99, 0.8))),
    "doubt:budget=0.02",
    *(
        f"dawn:tau=0.99,tau_induced=0.99,tau_low={low},tau_sink=1,tau_edge={edge}"
        for low, edge in ((0.9, 0.02), (0.9, 0.05), (0.8, 0.02), (0.95, 0.02))
    ),
    "dawn:tau=0.99,tau_induced=0.99,tau_low=0.9,tau_sink=1,tau_edge=0.05,layers=last",
    "dawn:tau=0.99,tau_induced=0.95,tau_low=0.9,tau_sink=1,tau_edge=0.05",
    "same-token:tau=0.99,tau_low=0.9,tau_edge=0.02",
    "dapd:tau=0.99,tau_min=0.001,tau_max=0.004",
    *(f"clad:tau={tau}" for tau in (0.9, 0.99)),
    *(f"adas:tau={tau},strength=4" for tau in (0.9, 0.98)),
)
#: What the development problems speak for, beside the thresholds around the best one.
CHOSEN = (
    "confidence",
    *(f"threshold:tau={tau}" for tau in TAUS),
    "factor:factor=0.05",
    "factor:factor=0.1",
    "factor:factor=0.15",
    "joint:budget=0.02",
    "dawn:tau=0.99,tau_induced=0.99,tau_low=0.9,tau_sink=1,tau_edge=0.05",
)


@dataclasses.dataclass
class Joint(Policy):
    """In descending p, while the sum of 1 - p stays within a budget, at least one: bounds a step's error."""

    budget: float = 0.02

    def select(self, state: StepState) -> Tensor:
        doubt = (1.0 - state.confidence.to(torch.float64)).masked_fill(~state.masked, torch.inf)
        ascending, order = doubt.sort(dim=1, stable=True)
        within = torch.zeros_like(state.masked).scatter(1, order, ascending.cumsum(dim=1) <= self.budget)
        return within | top_positions(state.confidence, state.masked, 1)


@dataclasses.dataclass
class Settled(Policy):
    """p >= tau, or p >= tau_low and the same token as in the step before; at least one."""

    tau: float = 0.99
    tau_low: float = 0.9

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None

    def select(self, state: StepState) -> Tensor:
        same = torch.zeros_like(state.masked)
        if self._last is not None:
            sequence, token_ids = self._last
            same = token_ids[torch.searchsorted(sequence, state.sequence)] == state.token_ids
        self._last = (state.sequence, state.token_ids)
        p = state.confidence
        passing = state.masked & ((p >= self.tau) | (same & (p >= self.tau_low)))
        return passing | top_positions(p, state.masked, 1)


@dataclasses.dataclass
class Doubt(MapPolicy):
    """1 - p plus the 1 - p of masked positions, weighted by the attention to them, within a budget."""

    budget: float = 0.02

    def select(self, state: StepState) -> Tensor:
        doubt = (1.0 - state.confidence.to(torch.float64)).masked_fill(~state.masked, 0.0)
        total = doubt + (attention_weights(state) * doubt[:, None, :]).sum(dim=2)
        return (state.masked & (total <= self.budget)) | top_positions(state.confidence, state.masked, 1)


@dataclasses.dataclass
class SameToken(MapPolicy):
    """p >= tau, and an independent set of p >= tau_low; attending pairs of one token are in conflict."""

    tau: float = 0.99
    tau_low: float = 0.9
    tau_edge: float = 0.02

    def select(self, state: StepState) -> Tensor:
        p, weight = state.confidence, attention_weights(state)
        conflict = torch.maximum(weight, weight.transpose(1, 2)) >= self.tau_edge
        conflict &= state.token_ids[:, :, None] == state.token_ids[:, None, :]
        first = state.masked & (p >= self.tau)
        rest = state.masked & (p >= self.tau_low) & ~first & ~(conflict & first[:, None, :]).any(dim=2)
        return first | independent_set(rest, conflict, p) | top_positions(p, state.masked, 1)


def main(arguments: list[str]) -> int:
    """Register the candidates and run ``attn-sampler eval`` on them."""
    for name, policy in {"joint": Joint, "settled": Settled, "doubt": Doubt, "same-token": SameToken}.items():
        register_policy(name, policy)
    held_out = "--heldout" in arguments
    name = "search_heldout" if held_out else "search_dev"
    words = ["eval", "--split", "heldout" if held_out else "dev", "--task", *TASKS, "--batch", "250"]
    words += ["--problems", "500" if held_out else "250"]
    words += ["--rule", *(CHOSEN if held_out else CANDIDATES)]
    words += ["--out", str(RESULTS / f"{name}.json"), "--table", str(RESULTS / f"{name}.md")]
    return command([*words, *(word for word in arguments if word != "--heldout")])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
