"""What the cells of an evaluation say: intervals, paired differences, a Markdown table, a plot.

Rates have Wilson's 95 % interval. Differences to the baseline are paired, over the same problems: of rates,
Newcombe's square-and-add interval for paired proportions (his method 10, Statistics in Medicine 17, 1998),
which stays honest where no problem tells two rules apart, and McNemar's exact test; of nats and passes, the
percentile bootstrap over problems (10,000 resamples, fixed seed).
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attn_sampler import documents
from attn_sampler.bundled.tasks import Score

if TYPE_CHECKING:
    from numpy.typing import NDArray

_RESAMPLES = 10_000


def paired_rate_difference(first: Sequence[int], second: Sequence[int]) -> tuple[float, float, float]:
    """Rate of ``first`` less that of ``second``, 1 or 0 on each of the same problems, and its interval."""
    x, y = np.asarray(first, bool), np.asarray(second, bool)
    n, both, only_x, only_y = len(x), int((x & y).sum()), int((x & ~y).sum()), int((~x & y).sum())
    neither = n - both - only_x - only_y
    p, q = Score(both + only_x, n), Score(both + only_y, n)
    margins = (both + only_x) * (only_y + neither) * (both + only_y) * (only_x + neither)
    agreement = float(both * neither - only_x * only_y)
    if agreement > 0:  # method 10's continuity correction, without which the interval is too short
        agreement = max(0.0, agreement - n / 2)
    correlation = agreement / math.sqrt(margins) if margins else 0.0
    difference = p.rate - q.rate

    def half(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    low = difference - half(p.rate - p.interval[0], q.interval[1] - q.rate)
    high = difference + half(p.interval[1] - p.rate, q.rate - q.interval[0])
    return difference, low, high


def mcnemar(first: Sequence[int], second: Sequence[int]) -> float:
    """Exact two-sided p-value that the two rules are right equally often."""
    x, y = np.asarray(first, bool), np.asarray(second, bool)
    wins, losses = int((x & ~y).sum()), int((~x & y).sum())
    tail = sum(math.comb(wins + losses, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2 ** (wins + losses))


def bootstrap_mean(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over problems and its 95 % percentile bootstrap interval."""
    x = np.asarray(values, float)
    low, high = np.percentile(_resamples(len(x)) @ x / len(x), [2.5, 97.5])
    return float(x.mean()), float(low), float(high)


@functools.lru_cache(maxsize=1)
def _resamples(n: int) -> NDArray[np.float64]:
    """How often each of n problems is drawn, [resamples, n]."""
    drawn = np.random.default_rng(0).integers(n, size=(_RESAMPLES, n)) + n * np.arange(_RESAMPLES)[:, None]
    return np.bincount(drawn.ravel(), minlength=n * _RESAMPLES).reshape(_RESAMPLES, n).astype(float)


def summarise(tasks: Mapping[str, Any], baseline: str) -> list[dict[str, Any]]:
    """A row for each task and rule decoded to the end, differences where the baseline is one of them.

    ``right`` and other measures, ``nats`` and the differences are (value, low, high). A measure is 0 or 1 of
    each problem, as ``right`` is, or a share between.
    """
    rows = []
    for task, cell in tasks.items():
        total = cell["problems"]
        for label in dict.fromkeys([*cell["rules"], *cell["orders"]]):
            decoded, order = (_complete(cell[kind], label, total) for kind in ("rules", "orders"))
            row: dict[str, Any] = {"task": task, "rule": label, "problems": total}
            if decoded is not None:
                row["passes"] = float(np.mean(decoded["passes"]))
                row["measures"] = [name for name in decoded if name not in ("right", "passes")]
                for name in ("right", *row["measures"]):
                    row[name] = _mean(decoded[name])
                base = _complete(cell["rules"], baseline, total)
                if base is not None and label != baseline:
                    row["difference"] = paired_rate_difference(decoded["right"], base["right"])
                    row["p_value"] = mcnemar(decoded["right"], base["right"])
                    passes = np.subtract(decoded["passes"], base["passes"])
                    row["passes_difference"] = bootstrap_mean(passes.tolist())
                    row["measure_differences"] = {
                        name: bootstrap_mean(np.subtract(decoded[name], base[name]).tolist())
                        for name in row["measures"]
                        if name in base
                    }
            if order is not None:
                row |= {
                    "nats": bootstrap_mean(order["nats"]),
                    "order_passes": float(np.mean(order["passes"])),
                }
                base = _complete(cell["orders"], baseline, total)
                if base is not None and label != baseline:
                    row["nats_difference"] = bootstrap_mean(np.subtract(order["nats"], base["nats"]).tolist())
            if decoded is not None or order is not None:
                rows.append({key: _rounded(value) for key, value in row.items()})
    return rows


def _mean(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean and its interval: Wilson's where each value is 0 or 1."""
    if any(value not in (0, 1) for value in values):
        return bootstrap_mean(values)
    score = Score(int(sum(values)), len(values))
    return (score.rate, *score.interval)


def _complete(cells: Mapping[str, Any], label: str, total: int) -> Any:
    cell = cells.get(label)
    return cell if cell is not None and len(cell["passes"]) == total else None


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(x) for key, x in value.items()}
    if isinstance(value, tuple):
        return [_rounded(x) for x in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def markdown(rows: Sequence[Mapping[str, Any]], baseline: str) -> str:
    """One table for each task: the rules by falling accuracy, those equally good by passes."""
    parts = []
    for task in dict.fromkeys(row["task"] for row in rows):
        chosen = [row for row in rows if row["task"] == task]
        chosen.sort(key=lambda row: (-row["right"][0], row["passes"]) if "right" in row else (1.0, 0.0))
        measures = list(dict.fromkeys(name for row in chosen for name in row.get("measures", ())))
        headings = ["rule", "passes", "right", "95 %", f"less {baseline}", "95 %", "p"]
        headings += ["nats", f"less {baseline}", "95 %"]
        headings += [heading for name in measures for heading in (name, f"less {baseline}", "95 %")]
        parts.append(
            f"### {task}, {chosen[0]['problems']} problems\n\n"
            f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}\n"
            + "".join(_markdown_row(row, measures) for row in chosen)
        )
    return "\n".join([*parts, _legend(rows, baseline)])


def _legend(rows: Sequence[Mapping[str, Any]], baseline: str) -> str:
    """What the columns hold, in one line."""
    text = (
        "passes: forward passes per problem. right: percent of the problems, with Wilson's interval. less "
        f"{baseline}: the difference to that rule on the same problems (Newcombe's interval; p of McNemar's "
        "exact test)."
    )
    if any("nats" in row for row in rows):
        text += (
            " nats: log-likelihood of the true answer revealed in the rule's order, per problem (bootstrap "
            "interval)."
        )
    if any(row.get("measures") for row in rows):
        text += " Other measures: percent, and the paired difference (bootstrap interval)."
    return text + "\n"


def _markdown_row(row: Mapping[str, Any], measures: Sequence[str]) -> str:
    cells = [f"`{row['rule']}`", *[""] * 9]
    for name in measures:
        cells.append(f"{100 * row[name][0]:.1f}" if name in row else "")
        difference = row.get("measure_differences", {}).get(name)
        cells += _percent_difference(difference) if difference is not None else ["", ""]
    if "right" in row:
        rate, low, high = (100 * x for x in row["right"])
        cells[1:4] = [f"{row['passes']:.2f}", f"{rate:.1f}", f"{low:.1f} to {high:.1f}"]
    if "difference" in row:
        cells[4:7] = [*_percent_difference(row["difference"]), f"{row['p_value']:.2g}"]
    if "nats" in row:
        cells[7] = f"{row['nats'][0]:.3f}"
    if "nats_difference" in row:
        difference, low, high = row["nats_difference"]
        cells[8:10] = [f"{difference:+.3f}", f"{low:+.3f} to {high:+.3f}"]
    return f"| {' | '.join(cells)} |\n"


def _percent_difference(values: Sequence[float]) -> list[str]:
    difference, low, high = (100 * x for x in values)
    return [f"{difference:+.1f}", f"{low:+.1f} to {high:+.1f}"]


def plot_frontier(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy against forward passes, a panel for each task.

    A colour and marker for each policy; rules that differ in tau alone are joined, and those with other
    options are hollow. Needs matplotlib, which the extra ``eval`` brings.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, ScalarFormatter

    rows = [row for row in rows if "right" in row]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    families = list(dict.fromkeys(_without_tau(row["rule"]) for row in rows))
    policies = list(dict.fromkeys(family.partition(":")[0] for family in families))
    figure = Figure(figsize=(6.5 * max(1, len(tasks)), 5.5), layout="constrained")
    panels = figure.subplots(1, max(1, len(tasks)), squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=False):
        for family in families:
            policy, _, switches = family.partition(":")
            index = policies.index(policy)
            points = [row for row in rows if row["task"] == task and _without_tau(row["rule"]) == family]
            points.sort(key=lambda row: row["passes"])
            if not points:
                continue
            rate, low, high = (np.array([100 * row["right"][k] for row in points]) for k in range(3))
            panel.errorbar(
                [row["passes"] for row in points],
                rate,
                yerr=np.maximum(0.0, (rate - low, high - rate)),  # rounding at 0 and 100 %
                label=policy if policy == family or policy not in families else None,
                color=f"C{index % 10}",
                marker="osD^v"[index // 10 % 5],
                markersize=4,
                markerfacecolor="none" if switches else None,
                linewidth=0.8,
                elinewidth=0.6,
            )
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.xaxis.set_minor_formatter("")
        panel.set_title(task, parse_math=False)  # whatever its file is called
        panel.set(xlabel="forward passes per answer", ylabel="right, % (Wilson's 95 % interval)")
        panel.grid(alpha=0.3, which="both")
    if rows:
        handles, labels = panels[0].get_legend_handles_labels()
        legend = dict(zip(labels, handles, strict=True))  # each policy once
        figure.legend(legend.values(), legend.keys(), loc="outside right upper", fontsize="small")
    picture, path = io.BytesIO(), picture_path(path)
    figure.savefig(picture, dpi=130, format=path.suffix[1:] or "png")
    documents.write(path, picture.getvalue())


def picture_path(path: Path) -> Path:
    """Where the picture called so is written: a name that says no format gets that of PNG."""
    is_device = path.exists() and not path.is_file()
    return path if path.suffix or is_device else path.with_name(f"{path.name}.png")


def _without_tau(label: str) -> str:
    policy, _, options = label.partition(":")
    rest = ",".join(option for option in options.split(",") if not option.startswith("tau="))
    return f"{policy}:{rest}" if rest else policy
