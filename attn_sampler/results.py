"""What an evaluation has decoded so far, in a JSON file."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from attn_sampler import documents
from attn_sampler.documents import ANYTHING, COUNT, NUMBER, TEXT, Kind
from attn_sampler.problem_sets import ProblemSet
from attn_sampler.report import summarise
from attn_sampler.rules import BASELINE, spelled

_ONE_OR_ZERO = Kind("1 or 0", lambda x: type(x) is int and x in (0, 1))
_SHARE = Kind("a number from 0 to 1", lambda x: NUMBER.accepts(x) and 0 <= x <= 1)
#: A log-likelihood, of a token that the model rules out too.
_NATS = Kind("a number that is no NaN", lambda x: NUMBER.accepts(x) or x == -math.inf)
_SHAPE = {
    "tasks": {
        ...: {
            "problems": Kind("an integer >= 1", lambda x: COUNT.accepts(x) and x > 0),
            "fingerprint?": TEXT,
            "model?": TEXT,
            "rules": {...: {"right": [_ONE_OR_ZERO], "passes": [COUNT], ...: [_SHARE]}},
            "orders": {...: {"nats": [_NATS], "passes": [COUNT]}},
        }
    },
    "summary?": ANYTHING,
}
#: What a row of the summary holds beside the measures.
_NOT_MEASURES = {
    *("task", "rule", "problems", "measures", "difference", "p_value", "passes_difference"),
    *("nats", "nats_difference", "order_passes", "measure_differences"),
}


class Results:
    """What has been decoded so far, by task and rule, kept in a JSON file.

    ``cells[task]["rules"][label]`` holds what ``decode`` gives for the first so many problems, ``["orders"]``
    what ``order_log_likelihood`` does.
    """

    def __init__(self, path: Path | None = None, baseline: str = BASELINE) -> None:
        self.path = path
        self.baseline = spelled(baseline)  # the rule with which the summary compares
        self.cells: dict[str, Any] = {}
        if path is not None and path.exists():
            try:
                self.cells = _read_cells(path)
            except ValueError as error:
                raise ValueError(f"{path}: holds no results of an evaluation: {error}") from None

    def of(self, problems: ProblemSet, model: str) -> dict[str, Any]:
        """The cells of these problems decoded by this model.

        Raises
        ------
        ValueError
            The file holds results of other problems or of another model under this name.
        """
        identity = {"problems": len(problems), "fingerprint": problems.fingerprint, "model": model}
        cell = self.cells.setdefault(problems.name, {**identity, "rules": {}, "orders": {}})
        if any(cell.get(key) != value for key, value in identity.items()):
            raise ValueError(
                f"{self.path}: holds results of {problems.name} on other problems or with another model; "
                "name another file"
            )
        return cell

    def save(self, with_summary: bool = False) -> None:
        """Write the file, all of it or nothing."""
        if self.path is None:
            return
        content: dict[str, Any] = {"tasks": self.cells}
        if with_summary:
            content["summary"] = summarise(self.cells, self.baseline)
        text = json.dumps(content, indent=1)
        text = re.sub(r"\[\s+([-\d][^\[\]{}]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
        documents.write(self.path, text + "\n")


def _read_cells(path: Path) -> dict[str, Any]:
    """The cells of a file that ``Results.save`` wrote, rules as they are written now."""
    content = documents.parse_json(documents.read_text(path))
    documents.check_shape(content, _SHAPE)
    for name, cell in content["tasks"].items():
        for kind in ("rules", "orders"):
            held = {spelled(label): values for label, values in cell[kind].items()}
            if len(held) < len(cell[kind]):
                raise ValueError(f"task {name!r}: one of its {kind} is there by its old name too")
            for label, values in held.items():
                if kind == "rules" and (taken := _NOT_MEASURES & values.keys()):
                    raise ValueError(f"task {name!r}, rules {label!r}: got a measure called {min(taken)}")
                counts = {len(value) for value in values.values()}
                if len(counts) > 1 or max(counts) > cell["problems"]:
                    raise ValueError(
                        f"task {name!r}, {kind} {label!r}: expected as many values of each measure, at most "
                        f"{cell['problems']}, got {sorted(counts)}"
                    )
            cell[kind] = held
    return content["tasks"]
