"""How the rules do on published models: fetched, decoded, plotted.

    make evidence                              # a first look: minutes on two cores, into build/evidence
    make evidence ARGS=--full                  # the tables of bench/results/quality: hours on one core
    python -m bench.evidence --out FOLDER      # continues what FOLDER holds

For each group of tasks a results file, a table and a picture as ``attn-sampler eval`` writes them, and what
one pass tells of where its predictions are right (``bench.order_signals``). Needs the extras ``published``
and ``plot``; the models are downloaded once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from attn_sampler import command_line
from attn_sampler.cli import main as command
from bench import order_signals

RESULTS = Path(__file__).parent / "results" / "quality"
FIRST_LOOK = Path("build") / "evidence"
ORDERS = ("confidence", "grounded:tau=none", "attn-sequential", "left-to-right", "random")
THRESHOLDS = ("threshold:tau=0.9", "grounded:tau=0.9")


class Run(NamedTuple):
    """Tasks that are decoded by the same rules."""

    group: str
    tasks: tuple[str, ...]
    problems: int
    rules: tuple[str, ...]
    model: str | None = None  # None: that of the tasks


RUNS = (
    Run(
        "published_rxnmapper",
        ("reactions-reagent",),
        300,
        (*ORDERS, "attn-sequential:query_rows=masked", *THRESHOLDS),
    ),
    Run("published_rxnmapper", ("reactions-product",), 150, (*ORDERS, THRESHOLDS[0])),
    Run("published_rxnmapper", ("reactions-50",), 100, (*ORDERS[:3], "random", THRESHOLDS[0])),
    # A model that no rule was made on.
    Run("published_rxnfp", ("reactions-reagent",), 300, (*ORDERS, *THRESHOLDS), "rxnfp"),
    Run("published_sapiens", ("heavy-framework", "light-framework"), 100, (*ORDERS, *THRESHOLDS)),
    Run("published_sapiens", ("heavy-30",), 100, (*ORDERS[:3], "random", THRESHOLDS[0])),
    Run("published_sapiens", ("heavy-100",), 50, ORDERS),
)
SIGNALS = (
    *("reactions-product", "reactions-reagent", "reactions-20", "reactions-50", "reactions-80"),
    *("heavy-cdr", "heavy-framework", "heavy-30", "heavy-70", "heavy-100"),
    *("light-framework", "light-70", "light-100"),
)
SIGNAL_PROBLEMS = 500
FIRST_LOOK_PROBLEMS = 12


def main() -> int:
    """Run what is missing; 0, or the status of what failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="as many problems as the published tables")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"default: {FIRST_LOOK}, or {RESULTS}")
    parser.add_argument("--threads", type=command_line.threads, default=1, metavar="N")
    options = parser.parse_args()
    folder = options.out or (RESULTS if options.full else FIRST_LOOK)
    folder.mkdir(parents=True, exist_ok=True)
    for run in RUNS:
        count = run.problems if options.full else FIRST_LOOK_PROBLEMS
        files = [
            word
            for name, ending in (("--out", "json"), ("--table", "md"), ("--plot", "png"))
            for word in (name, str(folder / f"{run.group}.{ending}"))
        ]
        words = [
            "eval",
            "--task",
            *run.tasks,
            "--problems",
            str(count),
            "--batch",
            "50",
            "--rule",
            *run.rules,
        ]
        print(
            f"{run.group}: {', '.join(run.tasks)}, {count} problems, {len(run.rules)} rules", file=sys.stderr
        )
        if status := command([*words, *files, "--threads", str(options.threads)]):
            return status
    count = SIGNAL_PROBLEMS if options.full else FIRST_LOOK_PROBLEMS
    print(f"signals: {len(SIGNALS)} tasks, {count} problems", file=sys.stderr)
    words = ["--task", *SIGNALS, "--problems", str(count), "--threads", str(options.threads)]
    order_signals.main([*words, "--out", str(folder / "published_signals.json")])
    print(f"wrote {folder}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
