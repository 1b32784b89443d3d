"""Decoding quality: every rule on the same problems, accuracy against forward passes, with intervals.

    attn-sampler eval --out results.json --table results.md --plot results.png

A *rule* is a policy with its options and switches, written ``attn-parallel:tau=0.95,layers=last``. Results go
to a JSON file after every batch; a rerun with the same file goes on where it stopped, and adds rules.
``report`` makes intervals, paired differences to the baseline, the table and the plot of them. Besides
decoding, ``--order-log-likelihood`` measures an order by itself: the true answer is revealed in the order
that the rule chooses, and log p(true token | what is revealed) is added up.

Problems are those of the bundled tasks, those made for published models (``attn-sampler models``), which are
fetched first, or a JSON Lines file with one problem a line::

    {"prompt": [4, 7, 99, 99, 2], "answer": [5, 1]}      token ids; the mask token at the blanks
    {"prompt": [4, 7], "answer": [5, 1]}                  no blank: as many as the answer has are appended
    {"prompt": "def f(", "answer": "x):"}                 text, for a model that comes with a tokenizer

An answer is right where it equals the true one token by token (for bundled tasks: where it obeys the rules;
for reactions: where it is the same chemistry).

Several processes, on one machine or more, share the batches::

    torchrun --nproc-per-node 8 -m attn_sampler eval --device cuda --out results.json

Each holds the whole model, on a GPU of its own with ``--device cuda``, and takes ``--threads`` of the CPU.
The first one reads and writes the files, which hold the same bytes as those of one process; any number of
processes goes on where others stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_sampler import checks, command_line, documents
from attn_sampler.adapters.models import FAMILIES
from attn_sampler.errors import DecodingError
from attn_sampler.generate import Generation, generate
from attn_sampler.policy import Decision, Policy, StepState
from attn_sampler.problem_sets import (
    BUNDLED,
    SPLITS,
    EvaluatedModel,
    ProblemSet,
    default_model,
    load_model,
    make_problems,
    read_problems,
)
from attn_sampler.ranks import ALONE, Ranks
from attn_sampler.reference import StepResult
from attn_sampler.report import markdown, picture_path, plot_frontier, summarise
from attn_sampler.results import Results
from attn_sampler.rules import BASELINE, RULES, SWITCHES, Rule, current, expand


class _Revealing(Policy):
    """Another policy's order, with the true tokens committed and their log-probabilities added up."""

    def __init__(self, inner: Policy, truth: Tensor) -> None:
        self.inner = inner
        self.truth = truth  # [B, T]
        self.nats = torch.zeros(len(truth), dtype=torch.float64, device=truth.device)
        # Instead of the class's: these are the inner policy's.
        self.metric, self.needs_scores, self.needs_map = inner.metric, inner.needs_scores, inner.needs_map  # type: ignore[misc]
        self.revises, self.max_edits = inner.revises, 0  # type: ignore[misc]  # the truth stays

    def reset(self) -> None:
        self.inner.reset()

    def select(self, state: StepState) -> Tensor | Decision:
        return self.inner.select(state)

    def step(self, tokens: Tensor, logits: Tensor, *arguments: Any, **options: Any) -> StepResult:
        result = self.inner.step(tokens, logits, *arguments, **options)
        block, sequence = options["block"], options["sequence"]
        truth = self.truth[sequence, block]
        tokens[:, block] = torch.where(result.selected, truth, tokens[:, block])
        logits = logits.to(torch.float64, copy=True)
        logits[..., options["mask_token_id"]] = -torch.inf
        log_p = logits.log_softmax(dim=-1).gather(-1, truth[..., None]).squeeze(-1)
        self.nats[sequence] += log_p.masked_fill(~result.selected, 0.0).sum(dim=1)
        return result


def decode(problems: ProblemSet, indices: range, model: EvaluatedModel, rule: Rule) -> dict[str, list]:
    """Decode some problems in one batch: ``right`` (0 or 1), other measures and ``passes`` of each."""
    result = _generate(problems, indices, model, rule, rule.make())
    batch = zip(result.tokens.cpu(), result.attention_mask.cpu(), strict=True)
    filled = [tokens[mask] for tokens, mask in batch]
    right = [problems.judge(i, f, model.mask_token_id) for i, f in zip(indices, filled, strict=True)]
    measured = {
        name: [_plain(measure(i, f)) for i, f in zip(indices, filled, strict=True)]
        for name, measure in problems.measures.items()
    }
    return {"right": [int(r) for r in right], **measured, "passes": result.num_forward_passes.tolist()}


def _plain(share: float) -> float:
    """As JSON shows it best."""
    return int(share) if share in (0, 1) else round(share, 6)


def order_log_likelihood(
    problems: ProblemSet, indices: range, model: EvaluatedModel, rule: Rule
) -> dict[str, list]:
    """Reveal true answers in the order that the rule chooses: ``nats`` and ``passes``, a value for each.

    ``nats`` is the sum over the answer's positions of log p(true token | prompt and what was revealed in
    earlier steps), temperature 1, the mask token excluded; for a rule that commits several positions in a
    step, these are predicted independently of each other, as in decoding.
    """
    truths = [problems.truth(i, model.mask_token_id) for i in indices]
    length = max(map(len, truths))
    padded = torch.stack([torch.nn.functional.pad(t, (length - len(t), 0)) for t in truths])
    parameter = next(model.model.parameters(), None) if isinstance(model.model, torch.nn.Module) else None
    policy = _Revealing(rule.make(), padded if parameter is None else padded.to(parameter.device))
    # A true answer may hold the end of text before its end.
    model = dataclasses.replace(model, options={**model.options, "eos_token_id": None})
    result = _generate(problems, indices, model, rule, policy)
    nats = [round(x, 6) for x in policy.nats.tolist()]
    return {"nats": nats, "passes": result.num_forward_passes.tolist()}


def _generate(
    problems: ProblemSet, indices: range, model: EvaluatedModel, rule: Rule, policy: Policy
) -> Generation:
    options = {"block_length": problems.block_length, **model.options, **rule.attention}
    return generate(
        model.model,
        [problems.prompts[i] for i in indices],
        mask_token_id=model.mask_token_id,
        policy=policy,
        seed=list(indices),  # a problem's own random stream, in whatever batch it is
        **options,
    )


class _Batch(NamedTuple):
    """Problems to decode together, by one rule."""

    problems: ProblemSet
    indices: range
    model: EvaluatedModel
    rule: Rule
    run: Callable[..., dict[str, list]]
    held: dict[str, dict[str, list]]  # what there is of each rule, to which the values are appended

    def decode(self) -> dict[str, list]:
        try:
            return self.run(self.problems, self.indices, self.model, self.rule)
        except DecodingError as error:
            raise DecodingError(f"{self.problems.name} by {self.rule.label}: {error}") from error

    def keep(self, values: dict[str, list], path: Path | None) -> None:
        held = self.held.setdefault(self.rule.label, {key: [] for key in values})
        if held.keys() != values.keys():
            raise ValueError(
                f"{path}: holds {', '.join(held)} of {self.problems.name} by {self.rule.label}, "
                f"not {', '.join(values)}; name another file"
            )
        for key, value in values.items():
            held[key] += value


def evaluate(
    work: Sequence[tuple[ProblemSet, EvaluatedModel, str]],
    rules: Sequence[Rule],
    results: Results,
    *,
    orders: bool = False,
    batch_size: int = 100,
    time_limit: float = math.inf,
    on_batch: Callable[[str, str, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> int:
    """Decode what ``results`` does not hold yet, and save it after every batch; a summary at the end.

    Parameters
    ----------
    work
        Problems, the model that decodes them, and the name under which the results remember it.
    orders
        Measure order log-likelihoods too.
    batch_size
        Problems decoded together.
    time_limit
        Seconds after which no further batch begins.
    on_batch
        Called with the task, the rule and the number of problems, after each batch.
    ranks
        Processes that share the batches, one each at a time. They are cut as one process cuts them, and all
        ranks get all values. Only the first has results with a file.

    Returns
    -------
    int
        How many (task, rule, problem) cells are left.
    """
    began, left = time.monotonic(), 0
    jobs: list[tuple[str, Callable[..., dict[str, list]]]] = [("rules", decode)]
    if orders:
        jobs.append(("orders", order_log_likelihood))
    batches = [
        _Batch(problems, range(first, min(first + batch_size, len(problems))), model, rule, run, cell[kind])
        for problems, model, model_name in work
        for cell in [results.of(problems, model_name)]
        for kind, run in jobs
        for rule in rules
        for first in range(len(cell[kind].get(rule.label, {}).get("passes", ())), len(problems), batch_size)
    ]
    for start in range(0, len(batches), ranks.size):
        if any(ranks.gather(time.monotonic() - began > time_limit)):  # by any clock, and for all
            left = sum(len(batch.indices) for batch in batches[start:])
            break
        dealt, values = batches[start : start + ranks.size], {}
        with ranks.together():
            if ranks.rank < len(dealt):
                values = dealt[ranks.rank].decode()
        gathered = ranks.gather(values)
        with ranks.together():
            for batch, values in zip(dealt, gathered, strict=False):  # the last round is not for all
                batch.keep(values, results.path)
            results.save()
        if on_batch is not None:
            for batch in dealt:
                on_batch(batch.problems.name, batch.rule.label, len(batch.indices))
    results.save(with_summary=True)
    return left


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``attn-sampler eval``."""
    parser.add_argument(
        "--task",
        nargs="+",
        type=_task,
        default=list(BUNDLED[:2]),
        metavar="NAME",
        help=f"bundled problems, of {', '.join(BUNDLED)} (default: {' '.join(BUNDLED[:2])}); or those of "
        "published models: reactions-product, reactions-reagent, heavy-cdr, heavy-framework, light-cdr, "
        "light-framework, or a percentage of all positions, as in reactions-70",
    )
    parser.add_argument(
        "--task-file",
        type=command_line.input_file,
        metavar="FILE",
        help='problems of your own instead, one a line: {"prompt": "2 + 2 =", "answer": " 4"}, as text or as '
        "lists of token ids",
    )
    parser.add_argument(
        "--model",
        metavar="SPEC",
        help="hub:ID or hub:FOLDER (a checkpoint), a .safetensors file of the bundled format, a folder with "
        "one, or module:function (default: the task's bundled model)",
    )
    parser.add_argument(
        "--adapter",
        choices=tuple(FAMILIES),
        help="how a checkpoint is called (default: by its model_type)",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with a checkpoint"
    )
    parser.add_argument(
        "--rule",
        nargs="+",
        default=list(RULES),
        metavar="RULE",
        help="policies, with options as in attn-parallel:tau=0.95,layers=last (default: every policy)",
    )
    parser.add_argument(
        "--baseline",
        default=BASELINE,
        metavar="RULE",
        help=f"the rule that differences are to (default: {BASELINE})",
    )
    parser.add_argument("--switches", action="store_true", help="add Attn-Sampler's switches, one at a time")
    parser.add_argument(
        "--tau",
        nargs="+",
        type=command_line.unit_interval,
        default=[],
        metavar="TAU",
        help="run rules with a threshold at each of these",
    )
    parser.add_argument(
        "--problems", type=command_line.positive, default=500, metavar="N", help="of each task (default: 500)"
    )
    parser.add_argument(
        "--split",
        choices=SPLITS,
        default=SPLITS[0],
        help="problems of --task to report on, or others to choose rules by (default: heldout)",
    )
    parser.add_argument(
        "--order-log-likelihood",
        action="store_true",
        help="add the log-likelihood (nats) of the true answer, revealed in each rule's order",
    )
    parser.add_argument(
        "--block-length",
        type=command_line.positive,
        default=32,
        metavar="N",
        help="for --task-file (default: 32)",
    )
    parser.add_argument(
        "--batch",
        type=command_line.positive,
        default=100,
        metavar="N",
        help="problems decoded together (default: 100)",
    )
    parser.add_argument("--device", default="cpu", help="of the model (default: cpu)")
    parser.add_argument(
        "--threads", type=command_line.threads, default=1, metavar="N", help="CPU threads (default: 1)"
    )
    parser.add_argument(
        "--time-limit",
        type=command_line.seconds,
        default=math.inf,
        metavar="SECONDS",
        help="begin no batch after that; a rerun with the same --out goes on",
    )
    parser.add_argument(
        "--out",
        type=command_line.output_file,
        metavar="FILE",
        help="results as JSON, read first where it exists",
    )
    parser.add_argument(
        "--table",
        type=command_line.output_file,
        metavar="FILE",
        help="write the table there, not to the screen",
    )
    parser.add_argument(
        "--plot", type=command_line.output_file, metavar="FILE", help="accuracy against passes, as a picture"
    )


def run(options: argparse.Namespace, ranks: Ranks = ALONE) -> int:
    """What ``attn-sampler eval`` does, in each of the processes that share the work.

    Raises
    ------
    ValueError
        An option is not accepted, or what it needs is not installed.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if ranks.rank > 0:  # the first one's alone
        options.out = options.table = options.plot = None
    with ranks.together():
        options.device = checks.device("--device", ranks.device(options.device))
        if options.plot is not None:
            options.plot = picture_path(options.plot)
        files = {f"--{name}": getattr(options, name) for name in ("out", "table", "plot")}
        command_line.check_distinct(
            {"--task-file": options.task_file, "--model": _file(options.model), **files}
        )
        if options.plot is not None:
            _check_plot(options.plot)
        rules = _rules(options, quiet=ranks.rank > 0)
        results = Results(options.out, options.baseline)
        labels = {rule.label for rule in rules}.union(*(cell["rules"] for cell in results.cells.values()))
        if ranks.rank == 0 and results.baseline not in {BASELINE, *labels}:
            raise ValueError(
                f"--baseline: expected one of the rules ({', '.join(sorted(labels))}), got {options.baseline}"
            )
        work = list(_work(options))
    results.cells = ranks.gather(results.cells)[0]
    total = len(rules) * sum(len(problems) for problems, *_ in work) * (1 + options.order_log_likelihood)

    with ranks.together():
        done = sum(
            _held(results.of(problems, name), rules, options.order_log_likelihood)
            for problems, _, name in work
        )
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    shown = console.is_terminal and ranks.rank == 0
    progress = Progress(*columns, console=console, transient=True, disable=not shown)
    with command_line.cpu_threads(options.threads), progress:
        bar = progress.add_task("", total=total, completed=done)
        left = evaluate(
            work,
            rules,
            results,
            orders=options.order_log_likelihood,
            batch_size=options.batch,
            time_limit=options.time_limit,
            on_batch=lambda task, rule, count: progress.update(
                bar, description=f"{task} {rule}", advance=count
            ),
            ranks=ranks,
        )
    if ranks.rank > 0:
        return 0
    rows = summarise(results.cells, results.baseline)
    table = markdown(rows, results.baseline)
    if options.table is None:
        print(table)
    else:
        documents.write(options.table, table)
    if options.plot is not None:
        plot_frontier(rows, options.plot)
    if left:
        print(f"{left} of {total} decodings are left: run again with the same --out", file=sys.stderr)
    return 0


def _check_plot(path: Path) -> None:
    """Raise ValueError where no picture of this name can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot: needs matplotlib: pip install 'attn_sampler[plot]'")
    from matplotlib.backend_bases import FigureCanvasBase

    accepted = FigureCanvasBase.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in accepted:
        raise ValueError(f"--plot: expected a name that ends in one of {', '.join(accepted)}, got {path}")


def _rules(options: argparse.Namespace, quiet: bool) -> list[Rule]:
    """The rules to decode by. What is to be said of how they are written is said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DeprecationWarning)  # which Python shows to programmers alone
        rules = expand([*options.rule, *(SWITCHES if options.switches else ())], options.tau)
        options.baseline = current(options.baseline)
    for warning in () if quiet else caught:
        print(f"attn-sampler: {warning.message}", file=sys.stderr)
    return rules


def _file(spec: str | None) -> Path | None:
    """The file that a model's name is, if it is one."""
    return Path(spec) if spec is not None and os.path.isfile(spec) else None


def _work(options: argparse.Namespace) -> Iterable[tuple[ProblemSet, EvaluatedModel, str]]:
    if options.task_file is not None:
        if options.model is None:
            raise ValueError("--task-file: needs --model")
        model = _load(options.model, options)
        problems = read_problems(options.task_file, model, options.block_length, options.problems)
        problems.check_model(model)
        called = f" as {options.adapter}" if options.adapter else ""  # other results than by its model_type
        yield problems, model, options.model + called
        return
    for name in dict.fromkeys(options.task):
        spec = options.model or default_model(name)
        model = _load(spec, options)
        problems = make_problems(name, options.problems, model, options.split)
        yield problems, model, spec


def _task(name: str) -> str:
    """A name of problems, for argparse."""
    try:
        default_model(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def _load(spec: str, options: argparse.Namespace) -> EvaluatedModel:
    return load_model(
        spec, options.device, family=options.adapter, trust_remote_code=options.trust_remote_code
    )


def _held(cell: dict[str, Any], rules: Sequence[Rule], orders: bool) -> int:
    kinds = ("rules", "orders") if orders else ("rules",)
    return sum(len(cell[kind].get(rule.label, {}).get("passes", ())) for kind in kinds for rule in rules)
