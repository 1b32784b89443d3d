"""The demonstration: bundled or published models decode held-out problems by every rule, side by side.

For each task: the boards fill in live, each cell coloured by the step that committed it; then the order of
commitment on one problem, and a table of what each rule costs and how often it is right.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from attn_sampler import documents
from attn_sampler._version import __version__
from attn_sampler.backends import choose_backend
from attn_sampler.bundled import TASKS, load_task
from attn_sampler.bundled.tasks import Score
from attn_sampler.generate import Generation, StepEvent, generate
from attn_sampler.problem_sets import EvaluatedModel, default_model, load_model, make_problems, rules_of
from attn_sampler.sampler import make_policy
from attn_sampler.trace import DecodeTrace, step_colour, step_commits

#: The rules that are compared by default; the first four are also drawn.
RULES = (
    "attn-parallel",
    "attn-sequential",
    "confidence",
    "left-to-right",
    "random",
    "margin",
    "entropy",
    "threshold",
    "factor",
    "eb",
    "klass",
    "pard",
    "t2t",
    "t2m",
    "saber",
    "attn-check",
    "rollback",
)
_DRAWN_RULES = 4
_LIVE_PROBLEMS = 4
_FRAME_SECONDS = 0.05
_FILLS = {"commit": 1, "replace": 0, "remask": -1}  # positions, by the kind of a commit
_COLUMNS = """\
passes: forward passes per answer, checks included. tokens/s: committed by the whole batch.
sampling: the share of the sampling step in the time of it and the model.
*: with the model that was trained to judge what it sees."""


@dataclasses.dataclass
class Shown:
    """Problems to decode, and how they are drawn."""

    name: str
    prompts: list[torch.Tensor]  # int64 [L] each
    mask_token_id: int
    judge: Callable[[int, torch.Tensor], bool]  # of a problem's index and filled prompt, int64 [L]
    symbols: Sequence[str]  # of each token
    grid_width: int | None = None  # cells a line; None: one line of symbols of any width
    cell_separator: str = ""

    @property
    def padding(self) -> list[int]:
        """Positions that ``generate`` puts at the left of each prompt."""
        return [max(map(len, self.prompts)) - len(prompt) for prompt in self.prompts]


@dataclasses.dataclass
class Run:
    """One task decoded by one rule."""

    task: Shown
    policy: str
    label: str
    score: Score
    right: list[bool]  # for each problem
    generation: Generation

    @property
    def trace(self) -> DecodeTrace:
        """Every commit of the run."""
        assert self.generation.trace is not None
        return self.generation.trace

    @property
    def passes(self) -> float:
        """Forward passes per answer."""
        return self.generation.num_forward_passes.double().mean().item()

    @property
    def tokens_per_second(self) -> float:
        """Committed tokens of the whole batch by time in the model and the sampling step."""
        filled = sum(_FILLS[commit.kind] for commit in self.trace.commits)
        return filled / (self.generation.forward_seconds + self.generation.sampling_seconds)

    @property
    def sampling_share(self) -> float:
        """Part of that time spent in the sampling step."""
        sampling = self.generation.sampling_seconds
        return sampling / (self.generation.forward_seconds + sampling)


def default_tau(policy: str) -> float | None:
    """The confidence threshold of the rule of that name; None where it reads none."""
    rule = make_policy(policy)
    return None if getattr(rule, "mode", None) == "sequential" else getattr(rule, "tau", None)


def run_demo(
    console: Console,
    *,
    tasks: Sequence[str],
    policies: Sequence[str] = RULES,
    tau: float | None = None,
    problems: int = 100,
    temperature: float = 0.0,
    seed: int = 0,
    layers: str | Sequence[int] = "all",
    backend: str = "auto",
    live: bool = True,
    svg: Path | None = None,
) -> list[Run]:
    """Decode, draw and compare.

    Parameters
    ----------
    console
        Where to print. Without a terminal nothing is animated.
    tasks, policies
        Names of ``bundled.TASKS`` or of problems for published models (``problem_sets.make_problems``), which
        are fetched where they are not here; and of ``sampler.POLICIES``.
    tau
        Confidence threshold of the rules that read one. Default: each rule's own.
    problems
        Held-out problems for each task, decoded in one batch.
    temperature, seed, layers, backend
        As in ``generate``; the seed also chooses the problems.
    live
        Animate while decoding.
    svg
        Where to write a picture of the orders of commitment. Default: nowhere.

    Returns
    -------
    list of Run
        Task by task, rule by rule.

    Raises
    ------
    BackendUnavailableError
        The backend asked for by name cannot run here.
    """
    device = torch.device("cuda" if backend in ("cuda", "triton") else "cpu")
    chosen = choose_backend("decode_step", backend, torch.empty(0, device=device)).name
    threads = torch.get_num_threads()
    console.print(f"attn_sampler {__version__}, sampling step by backend {chosen}, CPU threads: {threads}")
    runs: list[Run] = []
    drawings: list[RenderableType] = []
    for name in tasks:
        specs = {rule: _model_of(name, rule) for rule in policies}
        models = {spec: load_model(spec, str(device)) for spec in set(specs.values())}
        task = _shown(name, problems, seed, models[specs[policies[0]]])
        options = {"tau": tau, "temperature": temperature, "seed": seed, "layers": layers, "backend": backend}
        few = dataclasses.replace(task, prompts=task.prompts[:2])
        _decode(models[specs[policies[0]]], few, policies[0], options, None)  # start-up costs stay out
        blanks = sum(int((prompt == task.mask_token_id).sum()) for prompt in task.prompts)
        console.print(f"\n[bold]{name}[/]: {problems} held-out problems, {blanks / problems:.1f} blanks each")
        with _live_view(console if live else None, task, blanks * len(policies)) as watch:
            task_runs = [_decode(models[specs[rule]], task, rule, options, watch(rule)) for rule in policies]
        drawings.append(_draw_orders(task_runs[:_DRAWN_RULES]))
        console.print(drawings[-1], Text(), _tabulate(task_runs), Text(), sep="\n")
        verdict = _verdict(task_runs)
        if verdict:
            console.print(verdict, soft_wrap=True)
        runs += task_runs
    console.print("\n" + _COLUMNS, style="dim")
    if svg is not None:
        _save_svg(svg, drawings)
    return runs


def _shown(name: str, count: int, seed: int, model: EvaluatedModel) -> Shown:
    if name not in TASKS:
        problems = make_problems(name, count, model)
        names = model.tokenizer.convert_ids_to_tokens(range(len(model.tokenizer)))
        names[model.mask_token_id] = "·"
        for special in {*model.tokenizer.all_special_ids} - {model.mask_token_id}:
            names[special] = ""
        judge = functools.partial(problems.judge, mask_token_id=model.mask_token_id)
        return Shown(name, problems.prompts, model.mask_token_id, judge, names)
    task = load_task(name)
    prompts = list(torch.from_numpy(task.problems(count, seed=seed)[0]))
    drawn = (task.symbols, task.grid_width, task.cell_separator)
    return Shown(name, prompts, task.mask_token_id, rules_of(task, prompts), *drawn)


def _model_of(task: str, policy: str) -> str:
    """The model that a rule decodes with; that of the task, or its twin that judges what it sees."""
    rule = make_policy(policy)
    judging = task in TASKS and rule.revises and not rule.shadows
    return f"{task}-edits" if judging else default_model(task)


def _decode(
    model: EvaluatedModel,
    task: Shown,
    policy: str,
    options: dict[str, Any],
    on_step: Callable[[StepEvent], None] | None,
) -> Run:
    tau = default_tau(policy)
    label = policy
    if tau is not None:
        tau = tau if options["tau"] is None else options["tau"]
        label = f"{policy} tau={tau:g}"
    if _model_of(task.name, policy) != default_model(task.name):
        label += " *"
    generation = generate(
        model.model,
        task.prompts,
        policy=policy,
        trace=True,
        on_step=on_step,
        **{
            "block_length": max(map(len, task.prompts)),
            **model.options,
            "mask_token_id": task.mask_token_id,
            **options,
            "tau": tau,
        },
    )
    filled = zip(generation.tokens.cpu(), generation.attention_mask.cpu(), strict=True)
    right = [task.judge(i, tokens[visible]) for i, (tokens, visible) in enumerate(filled)]
    return Run(task, policy, label, Score(sum(right), len(right)), right, generation)


@contextlib.contextmanager
def _live_view(
    console: Console | None, task: Shown, total: int
) -> Iterator[Callable[[str], Callable[[StepEvent], None] | None]]:
    """Boards that fill in above a progress bar; ``watch(policy)`` gives the callback for one run."""
    if console is None or not console.is_terminal or console.is_dumb_terminal:
        yield lambda policy: None
        return
    progress = Progress(
        BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeElapsedColumn(), auto_refresh=False
    )
    bar = progress.add_task("", total=total)
    # Drawn from the callback alone: a refreshing thread would compete with the decoder that is timed.
    with Live(console=console, auto_refresh=False, transient=True) as screen:

        def watch(policy: str) -> Callable[[StepEvent], None]:
            padding = task.padding[:_LIVE_PROBLEMS]
            rows = [[0] * pad + row.tolist() for pad, row in zip(padding, task.prompts, strict=False)]
            trace = DecodeTrace(rows, task.mask_token_id, policy, padding=padding)
            drawn = 0.0

            def on_step(event: StepEvent) -> None:
                nonlocal drawn
                step = torch.full_like(event.sequence, event.step - 1)
                commits = step_commits(event.result, event.sequence, step, event.block, task.mask_token_id)
                progress.advance(bar, sum(_FILLS[commit.kind] for commit in commits))
                trace.commits += [commit for commit in commits if commit.sequence < len(trace.prompt)]
                if time.perf_counter() - drawn > _FRAME_SECONDS:
                    drawn = time.perf_counter()
                    boards = [_board(task, trace, i) for i in range(len(trace.prompt))]
                    screen.update(
                        Group(Text(policy), Columns(boards, padding=(1, 4)), progress), refresh=True
                    )

            return on_step

        yield watch


def _board(task: Shown, trace: DecodeTrace, sequence: int) -> Text:
    return trace.render(sequence, task.symbols, width=task.grid_width if task.cell_separator else None)


def _step_numbers(task: Shown, trace: DecodeTrace, sequence: int) -> Text:
    """The step, from 1, that committed each position, under the same colours as the board."""
    if task.grid_width is None:
        return Text()
    steps = trace.steps(sequence)
    last = max(step for step in steps if step is not None)
    width = len(str(trace.prompt[sequence].count(task.mask_token_id)))
    text = Text()
    for position, step in enumerate(steps):
        if position and position % task.grid_width == 0:
            text.append("\n")
        label = ("·" if task.cell_separator else " ") if step is None else str(step + 1)
        style = "dim" if step is None else step_colour(step, last)
        text.append(label.rjust(width) + task.cell_separator, style=style)
    return text


def _draw_orders(runs: Sequence[Run]) -> Group:
    """The first problem: its answer by each rule, and the step that committed each position."""
    task = runs[0].task
    gap = "" if task.grid_width is None else "\n\n" if task.cell_separator else "\n"
    cells = [
        (
            Text(run.policy, style="bold"),
            Text.assemble(_board(task, run.trace, 0), gap, _step_numbers(task, run.trace, 0)),
            Text(
                f"{'solved' if run.right[0] else 'wrong'}, {int(run.generation.num_forward_passes[0])} passes"
            ),
        )
        for run in runs
    ]
    grid = Table.grid(padding=(0, 3, 1, 0))
    if task.grid_width is None:  # a line may be longer than the screen
        for overflow in ("ellipsis", "fold", "ellipsis"):
            grid.add_column(overflow=overflow)
    # Square boards stand side by side, one-line problems below each other.
    for row in zip(*cells, strict=True) if task.cell_separator else cells:
        grid.add_row(*row)
    caption = f"One {task.name} problem, and the step of each commit (blue first, red last)"
    if any(run.trace.revised(0) for run in runs):
        caption += "; underlined: revised"
    return Group(Text(caption, style="dim"), Text(), grid)


def _tabulate(runs: Sequence[Run]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)  # as narrow as 80 columns
    table.add_column("rule", no_wrap=True)
    for heading in ("solved", "95% interval", "passes", "tokens/s", "sampling"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        low, high = run.score.interval
        table.add_row(
            run.label,
            f"{run.score.rate:.1%}",
            f"{100 * low:.1f} to {high:.1%}",
            f"{run.passes:.1f}",
            f"{run.tokens_per_second:,.0f}",
            f"{run.sampling_share:.0%}",
        )
    return table


def _verdict(runs: Sequence[Run]) -> str:
    """What the table says about attention as the only guide, in one line."""
    by_policy = {run.policy: run.score for run in runs}
    if not {"attn-sequential", "confidence"} <= by_policy.keys():
        return ""
    attention, confidence = by_policy["attn-sequential"], by_policy["confidence"]
    line = f"attn-sequential solves {attention.rate:.1%}, confidence {confidence.rate:.1%}"
    if attention.interval[1] < confidence.interval[0]:
        line += ": attention alone is a weak guide here"
    return line + "."


def _save_svg(path: Path, drawings: Sequence[RenderableType]) -> None:
    console = Console(record=True, file=io.StringIO(), color_system="truecolor", width=200)
    drawing = Group(*[part for drawing in drawings for part in (drawing, Text())][:-1])
    console.width = Measurement.get(console, console.options, drawing).maximum
    console.print(drawing)
    picture = console.export_svg(title="attn-sampler demo")
    # Self-contained: rich links a font from the network, and any monospaced one does.
    documents.write(path, re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL))
