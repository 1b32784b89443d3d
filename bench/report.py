"""Tables and plots out of result files, bench/RESULTS.md out of all of them, and the comparison of two."""

from __future__ import annotations

import contextlib
import json
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from attn_sampler import documents
from attn_sampler.documents import ANYTHING, NUMBER, TEXT, Kind

from .cases import CASES
from .harness import ROOT, digest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = ROOT / "bench" / "results"
_PLOTS = {
    "by_keys": ("time_by_keys.png", "keys in context (N)", "n_keys"),
    "by_rows": ("time_by_rows.png", "query rows (M)", "n_rows"),
    "by_columns": ("time_by_columns.png", "candidate columns (C)", "columns"),
    "by_batch": ("time_by_batch.png", "batch (B)", "batch"),
}
_SHARES = ("columns", "block_scope", "confidence", "sampled", "step")
_SHARE_PLOT = "share_of_floor.png"

Cell = dict[str, Any]


def _is_figure(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("ours"), bool):
        return False
    times = [value.get(name) for name in ("median_ms", "q1_ms", "q3_ms")]
    return "median_ms" not in value or all(NUMBER.accepts(x) and x > 0 for x in times)


#: Of a result file, what two of them are compared by.
_SHAPE: dict[Any, Any] = {
    "environment": {"machine": TEXT, ...: ANYTHING},
    "cells": [
        {
            **dict.fromkeys(("case", "row", "device", "dtype"), TEXT),
            "threads": Kind("an integer or null", lambda x: x is None or type(x) is int),
            "figures?": {...: Kind("a figure, or the reason why there is none", _is_figure)},
            ...: ANYTHING,
        }
    ],
    ...: ANYTHING,
}


def read(path: Path) -> dict[str, Any]:
    """A result file; ValueError where it is none."""
    try:
        content = documents.parse_json(documents.read_text(path))
        documents.check_shape(content, _SHAPE)
    except ValueError as error:
        raise ValueError(f"{path} is no result file: {error}") from None
    return content


def folder_of(machine: str, results: Path = RESULTS) -> Path:
    """Where a machine's files lie."""
    return results / re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")


def ours(cell: Cell) -> tuple[str, dict[str, Any]] | None:
    """The fastest of our backends in a cell."""
    own = [(n, f) for n, f in cell.get("figures", {}).items() if f["ours"] and "median_ms" in f]
    return min(own, key=lambda named: named[1]["median_ms"], default=None)


# Tables.


def table(cells: Sequence[Cell]) -> str:
    """Markdown of cells of one case, device and number of threads, with the reasons for what is missing."""
    names = list(dict.fromkeys(name for cell in cells for name in cell.get("figures", {})))
    own = [n for n in names if any(cell.get("figures", {}).get(n, {}).get("ours") for cell in cells)]
    others = [n for n in names if n not in own]
    head = ["row", "shape", "floor", *(f"{n}" for n in own), "share of floor", *others]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    reasons: dict[str, list[str]] = {}
    for cell in cells:
        if "skipped" in cell:
            reasons.setdefault(cell["skipped"], []).append(f"row {cell['row']}")
            continue
        best = ours(cell)
        fastest = best[1]["median_ms"] if best else None
        line = [cell["row"], cell["shape"]["name"], _floor(cell)]
        for name in own + others:
            if name == (others or [None])[0]:
                line.append(_share(cell))
            figure = cell["figures"].get(name)
            line.append("" if figure is None else _figure(figure, fastest))
            if figure is not None and "median_ms" not in figure:
                reason = figure.get("skipped") or figure.get("failed")
                reasons.setdefault(reason, []).append(f"row {cell['row']} {name}")
        if not others:
            line.append(_share(cell))
        lines.append("| " + " | ".join(line) + " |")
    missing = [f"- {', '.join(what)}: {reason}" for reason, what in reasons.items()]
    return "\n".join([*lines, *([""] if missing else []), *missing])


def _floor(cell: Cell) -> str:
    work = cell["bytes"] if cell["bound"] == "bytes" else cell["operations"]
    return f"{_ms(cell['floor_ms'])} ({_si(work)}{'B' if cell['bound'] == 'bytes' else 'FLOP'})"


def _share(cell: Cell) -> str:
    best = ours(cell)
    return f"{100 * cell['floor_ms'] / best[1]['median_ms']:.0f}%" if best else "-"


def _figure(figure: dict[str, Any], fastest: float | None) -> str:
    """Milliseconds with their spread, times the fastest of ours, peak extra memory."""
    if "median_ms" not in figure:
        return "-"
    median = figure["median_ms"]
    spread = (
        f" ±{50 * (figure['q3_ms'] - figure['q1_ms']) / median:.0f}%" if figure["samples"] > 1 else " once"
    )
    parts = [_ms(median) + spread]
    if not figure["ours"] and fastest:
        parts.append(f"**{median / fastest:.1f}x**")
    if "warm_ms" in figure:
        parts.append(f"warm {_ms(figure['warm_ms'])}")
    if figure.get("peak_bytes") is not None:
        parts.append(f"+{_si(figure['peak_bytes'])}B")
    return ", ".join(parts)


def _ms(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else f"{value:.0f} ms"


def _si(value: float) -> str:
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} "


def groups(cells: Iterable[Cell]) -> dict[tuple[str, str, int | None], list[Cell]]:
    """Cells by case, device and threads, in order of appearance."""
    grouped: dict[tuple[str, str, int | None], list[Cell]] = {}
    for cell in cells:
        grouped.setdefault((cell["case"], cell["device"], cell["threads"]), []).append(cell)
    return grouped


def markdown(results: dict[str, Any], level: str = "##") -> str:
    """All tables of one result file."""
    about = results["environment"]
    devices = ", ".join(
        f"{_place(d['device'], d['threads'])}: {d['GB_per_s']} GB/s and {d['GFLOP_per_s']} GFLOP/s"
        for d in results["devices"]
    )
    cold = "; ".join(dict.fromkeys(d["cold"] for d in results["devices"]))
    lines = [
        f"Measured in the same run, {devices}: a floor is the larger of bytes over the one and operations "
        f"over the other. Cold caches: {cold}. Medians ± half the interquartile range, **times ours** (below "
        f"1: we lose), and +peak extra memory. {results['dtype']}, torch {about['torch']}, "
        f"OMP_WAIT_POLICY {about['omp_wait_policy']}.",
        "",
        *(f"- {name}: {reason}" for name, reason in results["missing"].items()),
    ]
    for (case, device, threads), cells in groups(results["cells"]).items():
        lines += ["", f"{level} {CASES[case].title}: {_place(device, threads)}", "", caption(results, device)]
        lines += ["", table(cells)]
    return "\n".join(lines)


def caption(results: dict[str, Any], device: str) -> str:
    """Command, date, commit, machine; and whether the kernels have changed since."""
    about = results["environment"]
    text = f"`{results['command']}`, {about['date']}, commit {about['commit']}, {about['machine']}."
    if about["sources"].get(device) != digest(device):
        text += " **Stale: the kernels' sources have changed since.**"
    if device == "cpu" and results["load_average"] > about["cpu"]["cores"] / 2:
        text += f" **On a busy machine (load average {results['load_average']}): read the ratios only.**"
    return text


def _place(device: str, threads: int | None) -> str:
    return "GPU" if device == "cuda" else f"CPU, {threads} thread{'s' if threads != 1 else ''}"


# Plots.


def plot(results: dict[str, Any], folder: Path) -> list[str]:
    """PNG files of the figures; their names."""
    written = []
    for name, figure in figures(results):
        figure.savefig(folder / name, dpi=120)
        written.append(name)
    return written


def figures(results: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """The sweeps and the shares of the floor, of the run's last device, by the names of their files."""
    from matplotlib.figure import Figure  # an extra: pip install .[plot]
    from matplotlib.ticker import NullLocator

    device = results["devices"][-1]
    place = (device["device"], device["threads"])
    cells = [c for c in results["cells"] if (c["device"], c["threads"]) == place and "figures" in c]
    caption_text = f"{results['environment']['machine']}, {_place(*place)}, {results['dtype']}"
    for case, (name, label, field) in _PLOTS.items():
        points = [c for c in cells if c["case"] == case]
        if not points:
            continue
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for candidate in dict.fromkeys(n for c in points for n in c["figures"]):
            known = [c for c in points if "median_ms" in c["figures"].get(candidate, {})]
            if not known:
                continue
            timings = [c["figures"][candidate] for c in known]
            x = [c["shape"][field] for c in known]
            style = {"linewidth": 2.5} if timings[0]["ours"] else {"linestyle": "--"}
            line = axes.plot(x, [t["median_ms"] for t in timings], marker="o", label=candidate, **style)
            low, high = [t["q1_ms"] for t in timings], [t["q3_ms"] for t in timings]
            axes.fill_between(x, low, high, alpha=0.15, color=line[0].get_color())
        floor = [c["floor_ms"] for c in points]
        at = [c["shape"][field] for c in points]
        axes.plot(at, floor, color="grey", linestyle=":", label="floor")
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel="ms (median, cold)")
        axes.set_xticks(at, [f"{x:,}" for x in at])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(f"{CASES[case].title}\n{caption_text}", fontsize=9)
        axes.legend(fontsize=8)
        yield name, figure
    shares = {
        case: {
            c["row"]: 100 * c["floor_ms"] / best[1]["median_ms"]
            for c in cells
            if c["case"] == case and (best := ours(c))
        }
        for case in _SHARES
    }
    rows = list(dict.fromkeys(row for by_row in shares.values() for row in by_row))
    if rows:
        figure = Figure(figsize=(9, 4), layout="constrained")
        axes = figure.subplots()
        width = 0.8 / len(shares)
        for i, (case, by_row) in enumerate(shares.items()):
            at = [rows.index(row) + (i - (len(shares) - 1) / 2) * width for row in by_row]
            axes.bar(at, list(by_row.values()), width, label=CASES[case].title)
        axes.set_xticks(range(len(rows)), rows)
        axes.set(xlabel="row", ylabel="share of the floor, %")
        axes.set_title(f"The floor's time over ours\n{caption_text}", fontsize=9)
        axes.legend(fontsize=8)
        yield _SHARE_PLOT, figure


# All results.


def write_results_page(results: Path = RESULTS) -> Path:
    """RESULTS.md beside the results folder: the findings as written, then the newest run of each machine."""
    lines = [
        "# Results",
        "",
        "Written by `python -m bench report` from the files under `results/`; the findings are "
        "`results/findings.md`.",
        "",
        (results / "findings.md").read_text().strip(),
    ]
    for folder in sorted(p for p in results.iterdir() if p.is_dir()):
        if (path := newest(folder)) is not None:
            kernels = json.loads(path.read_text())
            with contextlib.suppress(
                ImportError
            ):  # without matplotlib the plots stay those of the run itself
                plot(kernels, folder)
            lines += ["", f"## {kernels['environment']['machine']}", ""]
            for png in (_SHARE_PLOT, *(name for name, _, _ in _PLOTS.values())):
                if (folder / png).exists():
                    lines.append(f"![{png}]({results.name}/{folder.name}/{png})")
            lines += ["", markdown(kernels, "###")]
        for path in sorted(folder.glob("*-end-to-end.json"))[-1:]:
            steps = json.loads(path.read_text())
            lines += ["", f"### End to end: {steps['model']}", "", caption(steps, steps["device"])]
            lines += ["", end_to_end_table(steps)]
    if (caches := results / "caches.md").exists():
        lines += ["", "## Caches for long contexts", ""]
        if (results / "caches.png").exists():
            lines += [f"![caches.png]({results.name}/caches.png)", ""]
        lines.append(caches.read_text().strip())
    quality = results / "quality"
    if pages := sorted(quality.glob("*.md")):
        lines += ["", "## Decoding quality", ""]
        lines += [f"- [{p.stem}]({results.name}/quality/{p.name})" for p in pages]
        lines += [
            "",
            *(f"![{p.name}]({results.name}/quality/{p.name})" for p in sorted(quality.glob("*.png"))),
        ]
    page = results.parent / "RESULTS.md"
    page.write_text("\n".join(lines) + "\n")
    return page


def newest(folder: Path) -> Path | None:
    """A machine's newest full run, or its newest quick one if there is no other."""
    paths = sorted(p for p in folder.glob("*.json") if re.fullmatch(r"\d{4}-\d\d-\d\d(-quick)?", p.stem))
    return max(paths, key=lambda p: (not p.stem.endswith("-quick"), p.stem), default=None)


def end_to_end_table(results: dict[str, Any]) -> str:
    """One line for each way to decode."""
    parts = list(results["variants"][0]["parts_ms"])
    head = ["decoding", "tokens/s", "step", *parts]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for variant in results["variants"]:
        figures = [f"{variant['tokens_per_s']:.3g}", _ms(variant["step_ms"])]
        figures += ["" if (ms := variant["parts_ms"][p]) is None else _ms(ms) for p in parts]
        lines.append("| " + " | ".join([variant["name"], *figures]) + " |")
    return "\n".join([*lines, "", results["note"]])


# Regressions.


class Change(NamedTuple):
    """One of our figures in two files."""

    what: str
    old_ms: float
    new_ms: float | None  # None where the new file has a reason in its place
    regressed: bool
    reason: str = ""


def compare(old: dict[str, Any], new: dict[str, Any], threshold: float) -> tuple[list[Change], float | None]:
    """Every figure of ours that both runs could take, and by how much the rivals' own medians moved.

    A regression is a median more than ``threshold`` times the old one, the quartile ranges apart; or a
    result that was right and is now wrong or fails.
    """
    before, after = _by_name(old), _by_name(new)
    changes, rivals = [], []
    for key, was in before.items():
        now = after.get(key)
        if now is None or "median_ms" not in was:
            continue
        if not was["ours"]:
            if "median_ms" in now:
                rivals.append(now["median_ms"] / was["median_ms"])
            continue
        what = " ".join(str(part) for part in key if part is not None)
        if "median_ms" in now:
            slower = now["median_ms"] > threshold * was["median_ms"] and now["q1_ms"] > was["q3_ms"]
            changes.append(Change(what, was["median_ms"], now["median_ms"], slower))
        else:
            reason = now.get("failed") or now.get("skipped", "")
            changes.append(Change(what, was["median_ms"], None, "failed" in now, reason))
    return changes, statistics.median(rivals) if rivals else None


def _by_name(results: dict[str, Any]) -> dict[tuple, dict[str, Any]]:
    return {
        (cell["case"], cell["row"], cell["device"], cell["threads"], cell["dtype"], name): figure
        for cell in results["cells"]
        for name, figure in cell.get("figures", {}).items()
    }
