"""The table that ends a run: how many tests of each function passed in each place."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from attn_sampler.backends import OPS

OTHER = "other tests"


class Table:
    """A plugin that hears of every test's reports, those of other processes too."""

    def __init__(self, places: list[str], names: dict[str, str]) -> None:
        self._places = places
        self._names = names
        self._cells: defaultdict[tuple[str, str], Counter] = defaultdict(Counter)
        self._absent: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        if report.when != "call" and report.passed:
            return
        if "place" in properties:
            self._cells[row(report.nodeid), properties["place"]][report.outcome] += 1
        elif "absent" in properties:
            self._absent.append(properties["absent"])

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        columns = [name for name in self._places if any(place == name for _, place in self._cells)]
        rows = [name for name in (*OPS, OTHER) if any(row == name for row, _ in self._cells)]
        if not columns:
            return
        heads = [self._names.get(name, name).split("@") for name in columns]
        lines = [
            ["", *(head[0] for head in heads)],
            ["", *("".join(head[1:]) for head in heads)],
            *([name, *(cell(self._cells[name, place]) for place in columns)] for name in rows),
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        terminalreporter.section("tests passed by function and backend (F failed, s skipped)")
        for first, *others in lines:
            numbers = (text.rjust(width) for text, width in zip(others, widths[1:], strict=True))
            terminalreporter.write_line("  ".join((first.ljust(widths[0]), *numbers)).rstrip())
        for absent in self._absent:
            terminalreporter.write_line(absent)


def row(name: str) -> str:
    """The function that a test is about: its file's, or else the one that its own name or parameters name."""
    file, _, test = name.partition("::")
    return next((op for part in (file, test) for op in OPS if op in part), OTHER)


def cell(counts: Counter) -> str:
    if not counts:
        return ""
    others = ((counts["failed"], "F"), (counts["skipped"], "s"))
    return " ".join((str(counts["passed"]), *(f"{n}{sign}" for n, sign in others if n)))
