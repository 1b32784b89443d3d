"""What pages are filled in with: committed results, and facts that the sources hold.

Every number comes from a file under ``bench/results``, every table of names from the objects themselves.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attn_sampler.report
from attn_sampler import POLICIES, make_policy
from attn_sampler.adapters.models import FAMILIES, WHOLE_TEXT
from bench import report

RESULTS = report.RESULTS
QUALITY = RESULTS / "quality"

#: What a page can compare a rule's figures by: the published models' results and what was asked of them.
PUBLISHED = ("published_rxnmapper", "published_rxnfp", "published_sapiens")


@functools.cache
def read(name: str) -> Any:
    """A file of results, by its name under ``bench/results``, without the ending."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@functools.cache
def machines() -> list[Path]:
    """The newest run of the kernels on each machine."""
    folders = sorted(p for p in RESULTS.iterdir() if p.is_dir())
    return [path for folder in folders if (path := report.newest(folder)) is not None]


@functools.cache
def kernels() -> dict[str, Any]:
    """The first machine's run."""
    return report.read(machines()[0])


def findings() -> str:
    """What the figures of the kernels say, as it is written beside them."""
    return (RESULTS / "findings.md").read_text(encoding="utf-8").strip()


def kernel_tables() -> str:
    """Every case and row of every machine."""
    parts = []
    for path in machines():
        run = report.read(path)
        parts += [f"## {run['environment']['machine']}", report.markdown(run, "###")]
    return "\n\n".join(parts)


def provenance() -> str:
    """Where and when the kernels' figures were taken, and whether they are out of date."""
    return report.caption(kernels(), "cpu")


def end_to_end() -> str:
    """Tokens per second of a whole model."""
    path = sorted(machines()[0].parent.glob("*-end-to-end.json"))[-1]
    run = json.loads(path.read_text(encoding="utf-8"))
    return f"{run['model']}. {report.caption(run, run['device'])}\n\n{report.end_to_end_table(run)}"


def losses(threads: int) -> str:
    """The rows in which the fastest other way takes less time than ours."""
    lines = ["| what | row | ours | faster | times ours |", "|---|---|---|---|---|"]
    for title, cell, name, ratio in sorted(comparisons(threads), key=lambda x: x[3]):
        if ratio < 1:
            own, other = report.ours(cell), cell["figures"][name]
            assert own is not None
            times = (f"{figure['median_ms']:.3g} ms" for figure in (own[1], other))
            ours, theirs = times
            shape = cell["shape"]["name"]
            lines.append(f"| {title} | {cell['row']}: {shape} | {ours} | {name}, {theirs} | {ratio:.2f} |")
    return "\n".join(lines)


#: Of the rivals in a cell, what does less than it is compared with, and so is no other way to do it.
NO_RIVALS = ("attention alone",)
COMPARED = ("columns", "step", "confidence", "sampled", "block_scope", "attention", "all_columns", "peer")


def comparisons(threads: int) -> list[tuple[str, dict[str, Any], str, float]]:
    """The title of each cell of the compared cases, its fastest rival and the ratio of their times."""
    found = []
    for case in COMPARED:
        for cell in kernels()["cells"]:
            best = report.ours(cell)
            if cell["case"] != case or cell["threads"] != threads or best is None:
                continue
            rivals = [
                (figure["median_ms"] / best[1]["median_ms"], name)
                for name, figure in cell["figures"].items()
                if not figure["ours"] and name not in NO_RIVALS and "median_ms" in figure
            ]
            if rivals:
                ratio, name = min(rivals)
                found.append((report.CASES[case].title, cell, name, ratio))
    return found


def engines() -> str:
    """What a step costs in the engines, without the page's own title."""
    text = (RESULTS / "engines.md").read_text(encoding="utf-8")
    return text.split("\n", 1)[1].strip()


def caches() -> str:
    """What the caches cost by the context, and what tokens they lead to."""
    return (RESULTS / "caches.md").read_text(encoding="utf-8").strip()


def row(file: str, task: str, rule: str) -> dict[str, Any]:
    """What decoding by a rule came to, by a file of ``bench/results/quality``."""
    rows = read(f"quality/{file}")["summary"]
    return next(x for x in rows if (x["task"], x["rule"]) == (task, rule))


def right(file: str, task: str, rule: str) -> str:
    """Percent of the problems that were solved."""
    return f"{100 * row(file, task, rule)['right'][0]:.1f} %"


def passes(file: str, task: str, rule: str) -> str:
    """Forward passes for each problem."""
    return f"{row(file, task, rule)['passes']:.2f}"


def points(file: str, task: str, rule: str) -> str:
    """By how many percentage points more of the blanks hold the true token than by confidence."""
    value, low, high = (100 * x for x in row(file, task, rule)["measure_differences"]["tokens"])
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def auc(task: str, signal: str) -> str:
    """How often a blank predicted right has the larger value of the signal than one predicted wrong."""
    return f"{read('quality/published_signals')[task]['signals'][signal]['auc'][0]:.2f}"


def auc_range(signal: str, pick: Callable[..., float]) -> str:
    """The least or the largest of all tasks."""
    tasks = read("quality/published_signals").values()
    return f"{pick(task['signals'][signal]['auc'][0] for task in tasks):.2f}"


def auc_wins(signal: str) -> int:
    """Of how many tasks the signal tells more than confidence, by an interval that leaves out 0."""
    tasks = read("quality/published_signals").values()
    return sum(task["signals"][signal]["auc less confidence"][1] > 0 for task in tasks)


def regimes() -> int:
    """How many tasks there are."""
    return len(read("quality/published_signals"))


def outcomes(file: str, task: str, rules: Sequence[str], baseline: str) -> str:
    """A table of some rules of a task."""
    rows = [row(file, task, rule) for rule in rules]
    rows = [{key: value for key, value in x.items() if not key.startswith("nats")} for x in rows]
    return attn_sampler.report.markdown(rows, baseline).split("\n", 2)[2]


def published() -> str:
    """What decoding on published models came to, against confidence."""
    rules = ("attn-sequential", "random", "left-to-right", "grounded:tau=none", "threshold:tau=0.9")
    lines = ["| task | model | " + " | ".join(f"`{rule}`" for rule in rules) + " |", "|---" * 7 + "|"]
    for file in PUBLISHED:
        content = read(f"quality/{file}")
        known = {(x["task"], x["rule"]) for x in content["summary"]}
        for task, cell in content["tasks"].items():
            cells = [points(file, task, rule) if (task, rule) in known else "" for rule in rules]
            lines.append("| " + " | ".join([task, cell["model"], *cells]) + " |")
    return "\n".join(lines)


def excerpt(path: str, start: str, end: str) -> str:
    """The lines of a source file from the first that begins with ``start`` to one that does with ``end``."""
    lines = (report.ROOT / path).read_text(encoding="utf-8").split("\n")
    first = next(i for i, line in enumerate(lines) if line.startswith(start))
    last = next(i for i in range(first, len(lines)) if lines[i].startswith(end))
    return "\n".join(lines[first : last + 1])


def readme_table(start: str) -> str:
    """The table of README.md that begins so."""
    lines = (report.ROOT / "README.md").read_text(encoding="utf-8").split("\n")
    first = next(i for i, line in enumerate(lines) if line.startswith(start))
    return "\n".join(lines[first : lines.index("", first)])


def c_functions() -> str:
    """The declarations of the C API."""
    header = (report.ROOT / "csrc/include/attn_sampler.h").read_text(encoding="utf-8")
    found = re.findall(r"^ATTN_SAMPLER_API (.*?;)", header, flags=re.S | re.M)
    return "\n".join(["```c", *(re.sub(r"\s+", " ", declaration) for declaration in found), "```"])


def rules() -> str:
    """The rules by name: what they read, and what they are."""
    lines = ["| name | reads | `tau` | takes back | what it is |", "|---|---|---|---|---|"]
    for name, factory in POLICIES.items():
        policy = make_policy(name)
        reads = "attention map" if policy.needs_map else "attention received" if policy.needs_scores else ""
        what = f"`{factory}`" if isinstance(factory, str) else _first_sentence(policy, name)
        tau = getattr(policy, "tau", None) if name != "attn-sequential" else None
        cells = [f"`{name}`", reads, "" if tau is None else f"{tau:g}", "yes" if policy.revises else "", what]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _first_sentence(policy: Any, name: str) -> str:
    if name == "attn-sequential":
        return "Attn-Sampler, the one position of the largest score"
    return (type(policy).__doc__ or "").split("\n", 1)[0].replace("``", "`").rstrip(".")


def families() -> str:
    """The checkpoints that ``adapt`` knows."""
    lines = [
        "| family | `model_type` | block | attention | caches of its own | predicts from the row before |",
        "|---" * 6 + "|",
    ]
    for name, family in FAMILIES.items():
        length = "the whole text" if family.block_length == WHOLE_TEXT else str(family.block_length)
        attention = "bidirectional" if family.causal_block is None else f"block-causal, {family.causal_block}"
        types = (
            ", ".join(f"`{kind}`" for kind in family.model_types) or "any causal class, made bidirectional"
        )
        caches = ", ".join(family.adapter.caches) or _CACHES_ELSEWHERE.get(name, "none")
        shift = "yes" if family.logit_shift else ""
        lines.append("| " + " | ".join([f"`{name}`", types, length, attention, caches, shift]) + " |")
    return "\n".join(lines)


#: Whose adapters find out when they see the model.
_CACHES_ELSEWHERE = dict.fromkeys(("llada", "dream"), "prefix, dual with Fast-dLLM's modelling code")

#: What pages may ask for.
FUNCTIONS: dict[str, Any] = {
    function.__name__: function
    for function in (
        *(findings, kernel_tables, provenance, end_to_end, losses, engines, caches),
        *(right, passes, points, auc, auc_wins, regimes, outcomes, published),
        *(excerpt, readme_table, c_functions, rules, families),
    )
} | {
    "lowest_auc": lambda signal: auc_range(signal, min),
    "highest_auc": lambda signal: auc_range(signal, max),
}
