"""The site's figures, which matplotlib draws at build time from committed results and the bundled model."""

from __future__ import annotations

import functools
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from attn_sampler import AttentionCapture, StepEvent, generate
from attn_sampler.bundled import load_model, load_task
from attn_sampler.report import plot_frontier
from attn_sampler.trace import step_colour
from bench import caches, report
from docs import results

#: Every colour of a figure: as it is drawn, on light pages; and on dark ones.
MODES = ("light", "dark")
TEXT, MUTED, FAINT = "#1f2329", "#6d7681", "#d1d8e1"
BLUE, ORANGE, GREEN, PURPLE, RED = "#0a69da", "#bc4c01", "#1a7f38", "#8250e0", "#cf222f"
TEAL, PINK, OLIVE, INDIGO, BROWN = "#117a7d", "#bf3989", "#667a00", "#33417a", "#7d4e01"
_DARK = {
    **{TEXT: "#e6ebf2", MUTED: "#9aa5b1", FAINT: "#444c57"},
    **{BLUE: "#58a6ff", ORANGE: "#f0883e", GREEN: "#4cc25f", PURPLE: "#bc8cff", RED: "#ff7b72"},
    **{TEAL: "#56d4dd", PINK: "#f778ba", OLIVE: "#b5cc4a", INDIGO: "#a5b4fc", BROWN: "#d9a441"},
}
_STYLE = {
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.labelcolor": TEXT,
    "axes.prop_cycle": mpl.cycler(
        color=[*(BLUE, ORANGE, GREEN, PURPLE, RED), *(TEAL, PINK, OLIVE, INDIGO, BROWN)]
    ),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "font.size": 9.5,
    "figure.facecolor": "none",
    "grid.color": FAINT,
    "legend.facecolor": "none",
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "savefig.facecolor": "none",
    "savefig.transparent": True,
    "svg.hashsalt": "attn_sampler",
    "text.color": TEXT,
    "xtick.color": MUTED,
    "xtick.labelcolor": TEXT,
    "ytick.color": MUTED,
    "ytick.labelcolor": TEXT,
}
_WEIGHTS = LinearSegmentedColormap.from_list("weights", [(0.04, 0.41, 0.85, 0.0), (0.2, 0.52, 0.96, 1.0)])
TAU = 0.9


def pictures() -> Iterator[tuple[str, str]]:
    """The names and contents of all SVG files."""
    with mpl.rc_context(_STYLE):
        drawn = {name: _svg(draw()) for name, draw in _DRAWN.items()}
        drawn |= {Path(name).stem: _svg(figure) for name, figure in report.figures(results.kernels())}
    assert set(drawn) == set(NAMES), set(drawn) ^ set(NAMES)
    for name, picture in drawn.items():
        yield f"{name}-light.svg", picture
        for light, dark in _DARK.items():
            picture = picture.replace(light, dark)
        yield f"{name}-dark.svg", picture


def _svg(figure: Figure | str) -> str:
    if isinstance(figure, str):
        return figure
    content = io.StringIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


# The method, on a held-out sudoku and the model that is packaged.


class Pass:
    """A forward pass of the bundled sudoku model over a held-out problem."""

    def __init__(self) -> None:
        task, model = load_task("sudoku"), load_model("sudoku")
        self.prompt = torch.from_numpy(task.problems(1)[0])  # [1, T]
        self.mask = task.mask_token_id
        self.masked = (self.prompt[0] == self.mask).numpy()
        with torch.no_grad(), AttentionCapture(keep=True) as capture:
            model(self.prompt)
        self.map = capture.attention_map[0].numpy()  # [T, T], the mean over heads and layers
        self.model = model

    def decode(self, policy: str) -> tuple[list[StepEvent], list[int | None]]:
        """The steps of decoding by a rule, and the one that wrote each position."""
        events: list[StepEvent] = []
        out = generate(
            *(self.model, self.prompt),
            mask_token_id=self.mask,
            block_length=self.prompt.shape[1],
            policy=policy,
            tau=TAU,
            trace=True,
            on_step=events.append,
        )
        assert out.trace is not None
        return events, out.trace.steps(0)


@functools.cache
def _pass() -> Pass:
    return Pass()


def _column_sums() -> Figure:
    seen = _pass()
    length = len(seen.map)
    figure = Figure(figsize=(6.4, 6.2), layout="constrained")
    bars, table = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [1, 4]})
    colours = [ORANGE if masked else MUTED for masked in seen.masked]
    bars.bar(range(length), seen.map.sum(axis=0), color=colours, width=0.8)
    bars.axhline(1.0, color=MUTED, linewidth=0.8, linestyle=":")
    bars.set(ylabel="column sum")
    bars.set_title("Attention received: masked cells in orange, given ones in grey")
    table.imshow(seen.map, cmap=_WEIGHTS, vmin=0, vmax=np.quantile(seen.map, 0.995), aspect="auto")
    table.set(xlabel="key: the position that is looked at", ylabel="query: the position that looks")
    for axes in (bars, table):
        axes.tick_params(length=2)
    return figure


def _threshold() -> Figure:
    """The first step in which the dynamic threshold holds back a confident position."""
    seen = _pass()
    tokens = seen.prompt.clone()
    for event in seen.decode("attn")[0]:
        result = event.result
        masked, selected = (tokens == seen.mask)[0], result.selected[0]
        confidence, scores = result.confidence[0], result.scores[0]
        high = masked & (confidence >= TAU)
        held = high & ~selected
        if held.any() and selected.sum() > 2:
            break
        tokens = torch.where(result.selected, result.token_ids, tokens)
    low = masked & ~high
    theta = float(scores[low].max())
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    kinds = (
        (low, MUTED, "o", "not confident: waits"),
        (held, ORANGE, "s", "confident, but below the threshold: waits"),
        (high & selected, BLUE, "D", "committed"),
    )
    for chosen, colour, marker, label in kinds:
        axes.scatter(confidence[chosen], scores[chosen], c=colour, marker=marker, s=34, label=label)
    axes.axvline(TAU, color=MUTED, linestyle="--", linewidth=1)
    axes.axhline(theta, color=MUTED, linestyle="--", linewidth=1)
    axes.annotate("tau", (TAU, axes.get_ylim()[0]), (3, 4), textcoords="offset points")
    axes.annotate(
        "theta: the largest score of those that are not confident",
        *((axes.get_xlim()[0], theta), (4, 4)),
        textcoords="offset points",
    )
    axes.set(xlabel="confidence: the probability of the predicted token", ylabel="attention received")
    axes.set_title(f"Step {event.step} of a sudoku, one point for each masked cell")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _order() -> Figure:
    seen = _pass()
    figure = Figure(figsize=(6.4, 3.3), layout="constrained")
    for axes, policy in zip(figure.subplots(1, 2), ("attn", "threshold"), strict=True):
        steps = seen.decode(policy)[1]
        last = max(step for step in steps if step is not None)
        tokens = seen.prompt[0].tolist()
        for cell, step in enumerate(steps):
            row, column = divmod(cell, 6)
            colour = FAINT if step is None else step_colour(step, last)
            axes.add_patch(Rectangle((column, row), 0.94, 0.94, facecolor=colour))
            label = str(tokens[cell] + 1) if step is None else str(step)
            ink = MUTED if step is None else "#101010"
            axes.text(column + 0.47, row + 0.5, label, ha="center", va="center", color=ink, fontsize=10)
        axes.set(xlim=(0, 6), ylim=(6, 0), aspect="equal")
        axes.set_axis_off()
        axes.set_title(f'"{policy}": {last + 1} passes')
    return figure


def _reads() -> Figure:
    """Which keys a column's score needs."""
    figure = Figure(figsize=(7.2, 1.45), layout="constrained")
    rows, keys, first, columns = 3, 16, 8, 3
    titles = ("without the log-sum-exp: all keys", "with it: the block's keys")
    for axes, title, every in zip(figure.subplots(1, 2), titles, (True, False), strict=True):
        for row in range(rows):
            for key in range(keys):
                inside = first <= key < first + columns
                colour = BLUE if inside else ORANGE if every else FAINT
                axes.add_patch(Rectangle((key, row), 0.88, 0.88, facecolor=colour, linewidth=0))
        axes.text(first + columns / 2, rows + 0.35, "columns C", ha="center", va="top", color=BLUE)
        axes.text(0, rows + 0.35, "keys N", va="top", color=MUTED)
        axes.text(-0.6, rows / 2, "rows M", ha="right", va="center", rotation=90, color=MUTED)
        if not every:
            for row in range(rows):
                axes.add_patch(Rectangle((keys + 0.9, row), 0.88, 0.88, facecolor=PURPLE, linewidth=0))
            axes.text(keys + 2.1, rows + 0.35, "log-sum-exp", ha="right", va="top", color=PURPLE)
        axes.set(xlim=(-2, keys + 3), ylim=(rows + 1.5, -0.4), aspect="equal")
        axes.set_axis_off()
        axes.set_title(title)
    return figure


# Speed.


def _ratios() -> Figure:
    """The fastest other way over ours, of every row on one thread."""
    points = results.comparisons(1)
    titles = list(dict.fromkeys(title for title, *_ in points))
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    losses = 0
    for title, cell, _, ratio in sorted(points, key=lambda x: x[3]):
        y, colour = titles.index(title), RED if ratio < 1 else BLUE
        axes.plot(ratio, y, "o", color=colour, markersize=6, alpha=0.75, markeredgewidth=0)
        if ratio < 1:  # above and below in turns, where they are close
            away = (0, 7) if losses % 2 else (0, -12)
            losses += 1
            axes.annotate(
                cell["row"],
                (ratio, y),
                away,
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
                color=RED,
            )
    axes.axvline(1, color=MUTED, linewidth=1)
    axes.set_yticks(range(len(titles)), [_wrapped(title) for title in titles])
    axes.set(xscale="log", ylim=(len(titles) - 0.5, -0.6), xlabel="time of the fastest other way, over ours")
    axes.set_xticks([0.2, 0.5, 1, 2, 5, 10, 20, 50], ["0.2", "0.5", "1", "2", "5", "10", "20", "50"])
    axes.minorticks_off()
    axes.grid(axis="x", linewidth=0.6)
    axes.set_title("Every row on one thread; red, with its number: we lose")
    return figure


def _wrapped(title: str, width: int = 34) -> str:
    """A title on two lines."""
    if len(title) <= width:
        return title
    cut = title.rfind(" ", 0, width)
    return f"{title[:cut]}\n{title[cut + 1 :]}"


def _engines() -> Figure:
    steps = [x for x in results.read("engines")["steps"] if x["batch"] == 8]
    names = ["its own", "ours, threshold", "ours, attention"]
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.subplots()
    for index, (name, colour) in enumerate(zip(names, (MUTED, TEAL, BLUE), strict=True)):
        known = [(y, x["ms"][name]) for y, x in enumerate(steps) if name in x["ms"]]
        at = [y + (index - 1) * 0.27 for y, _ in known]
        axes.barh(at, [ms for _, ms in known], 0.25, color=colour, label=name)
    axes.set_yticks(range(len(steps)), [x["engine"].replace(", ", "\n") for x in steps])
    axes.set(xscale="log", xlabel="ms a step, batch of 8, one CPU thread", ylim=(len(steps) - 0.5, -0.5))
    axes.set_xticks([20, 50, 100, 200, 500, 1000], ["20", "50", "100", "200", "500", "1000"])
    axes.minorticks_off()
    axes.grid(axis="x", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, 1.12), ncols=3)
    return figure


# Quality.


def _signals() -> Figure:
    tasks = results.read("quality/published_signals")
    kinds = {
        "confidence": ("confidence", MUTED, "o"),
        "attention received": ("received", ORANGE, "s"),
        "... from masked rows alone": ("received, masked rows", RED, "v"),
        "... from visible rows alone": ("received, visible rows", GREEN, "^"),
        "grounded": ("confidence x lean", BLUE, "D"),
    }
    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    axes = figure.subplots()
    for label, (signal, colour, marker) in kinds.items():
        values = np.array([task["signals"][signal]["auc"] for task in tasks.values()])
        y = np.arange(len(values))
        axes.plot(values[:, 0], y, marker, color=colour, label=label, markersize=6, alpha=0.85)
    axes.axvline(0.5, color=MUTED, linewidth=1, linestyle=":")
    axes.set_yticks(range(len(tasks)), list(tasks))
    axes.set(xlim=(0.1, 1.0), ylim=(len(tasks) - 0.5, -0.5), xlabel="AUC: 0.5 is chance")
    axes.grid(axis="y", linewidth=0.6)
    axes.set_title("Does it tell right predictions from wrong ones?")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _orders() -> Figure:
    rules = {
        "attn-sequential": ("attention received", ORANGE, "s"),
        "random": ("random", MUTED, "o"),
        "left-to-right": ("left to right", TEAL, "^"),
        "grounded:tau=none": ("grounded", BLUE, "D"),
    }
    rows = [x for file in results.PUBLISHED for x in _summary(file)]
    tasks = list(dict.fromkeys(x["at"] for x in rows))
    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    axes = figure.subplots()
    for index, (rule, (label, colour, marker)) in enumerate(rules.items()):
        chosen = [x for x in rows if x["rule"] == rule]
        value, low, high = (
            np.array([100 * x["measure_differences"]["tokens"][k] for x in chosen]) for k in range(3)
        )
        y = [tasks.index(x["at"]) + (index - 1.5) * 0.19 for x in chosen]
        axes.errorbar(
            *(value, y),
            xerr=(value - low, high - value),
            fmt=marker,
            color=colour,
            label=label,
            markersize=5,
            elinewidth=1,
        )
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set(
        ylim=(len(tasks) - 0.5, -0.5), xlabel="true tokens, percentage points more than by confidence (95 %)"
    )
    axes.set_title("One token a pass, in each order")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _summary(file: str) -> list[dict[str, Any]]:
    content = results.read(f"quality/{file}")
    models = {task: cell["model"] for task, cell in content["tasks"].items()}
    return [{**x, "at": f"{x['task']}\n{models[x['task']]}"} for x in content["summary"]]


def _frontier(file: str, task: str, keep: Callable[[str], bool]) -> str:
    """Accuracy against forward passes, as ``attn-sampler eval --plot`` draws it."""
    rows = results.read(f"quality/{file}")["summary"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frontier.svg"
        plot_frontier([x for x in rows if x["task"] == task and keep(x["rule"])], path)
        return path.read_text(encoding="utf-8")


def _is_plain(rule: str) -> bool:
    """Whether a rule has no other option than its threshold."""
    return ":" not in rule or rule.partition(":")[2].startswith("tau=")


_DRAWN: dict[str, Callable[[], Figure | str]] = {
    "column_sums": _column_sums,
    "threshold": _threshold,
    "order": _order,
    "reads": _reads,
    "ratios": _ratios,
    "engines": _engines,
    "signals": _signals,
    "orders": _orders,
    "caches": lambda: caches.drawn(results.read("caches")),
    "rules": lambda: _frontier("heldout", "sudoku", _is_plain),
    "revision": lambda: _frontier("revision_sudoku-edits", "sudoku", _is_plain),
}
NAMES = (*_DRAWN, *("time_by_keys", "time_by_rows", "time_by_columns", "time_by_batch", "share_of_floor"))
