"""What the caches of ``generate`` cost by the length of the context, and what tokens they lead to.

    python -m bench caches [--contexts 2048 ... 32768] [--threads 1] [--problems 100] [--quick]

*Time*: one pass over a block of 32 masks behind a context, of a model of random weights with LLaDA's layers
(rotary positions, SwiGLU, heads of 128 channels), in float32 on the CPU: without a cache, with the keys of
all positions, and with the keys that an exact pass chose. The exact pass is timed beside a plain one, and the
choice of one layer beside the same in PyTorch (kvpress's SnapKVPress without its pooling).

*Tokens*: of the bundled models and of two published ones (the extra ``published``; they are downloaded once),
decoded block by block in the order of confidence. What is compared with is ``cache="none"``.

Checked before anything is timed: with the keys of all positions the block has the logits of a whole pass, and
both choices are the same. Written to ``results/caches.json``, ``caches.md`` and, with matplotlib,
``caches.png``; without contexts, or without tasks, that part stays as it is there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

from attn_sampler import command_line, generate, top_columns
from attn_sampler.caching import AdaptiveCache, ForwardPasses, SparseCache
from attn_sampler.problem_sets import load_model, make_problems

from . import rivals
from .capture import MASK, Model
from .harness import on_cpu
from .report import RESULTS
from .timing import CpuDevice

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTEXTS = (2048, 4096, 8192, 16384, 32768)
BUDGETS = (512, 2048)
WIDTH, HEADS, LAYERS, VOCAB, BLOCK = 1024, 8, 2, 8192, 32

#: Problems, their model, how many positions a block has, and budgets of its keys.
TASKS = {
    "addition": ("addition", 8, (2, 4, 6, 8, 12, 19)),
    "sudoku": ("sudoku", 12, (4, 8, 12, 16, 20, 24)),
    "reactions-50": ("rxnmapper", 16, (4, 8, 16, 32, 64, 128)),
    "heavy-30": ("sapiens-heavy", 16, (4, 8, 16, 32, 64, 128)),
}
#: What is decoded of each beside those: the keys of all positions, and stale rows computed again.
OTHERS: dict[str, Any] = {
    "dual": "dual",
    **{f"adaptive {threshold:g}": AdaptiveCache(threshold) for threshold in (0.02, 0.005, 0.001)},
}


class PlacedModel(Model):
    """``bench.capture``'s model, whose rows run at any positions."""

    places: Tensor | None = None

    def forward_at(self, tokens: Tensor, positions: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.places = positions[0]
        try:
            return self(tokens)
        finally:
            self.places = None

    def rotation(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.places is None:
            return super().rotation(length, like)
        cos, sin = super().rotation(int(self.places.max()) + 1, like)
        return cos[self.places], sin[self.places]


# Time.


def passes_of(model: Model, context: int) -> dict[str, Callable[[], Any]]:
    """A pass of each way to decode the block behind the context, ready to run again and again."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, VOCAB, (1, context + BLOCK), generator=generator)
    tokens[:, context:] = MASK
    block, first = slice(context, context + BLOCK), torch.tensor([0])

    def entered(cache: Any) -> ForwardPasses:
        passes = ForwardPasses(model, cache, logit_shift=False)
        passes.begin(tokens, None)
        passes.enter(tokens, None, block)
        return passes

    def run(passes: ForwardPasses) -> Tensor:
        return passes.logits(tokens, None, block, first)

    whole = model(tokens)[:, block] if context <= 8192 else None  # what is longer is checked by what is not
    ways: dict[str, Callable[[], Any]] = {
        "all rows": lambda: model(tokens),
        "all rows, and the choice": lambda: run(entered(SparseCache(BUDGETS[0]))),
    }
    for name, cache in (("all keys", "dual"), *((f"{n} keys", SparseCache(n)) for n in BUDGETS)):
        passes = entered(cache)
        run(passes)
        if whole is not None and (cache == "dual" or context <= cache.budget):
            torch.testing.assert_close(run(passes), whole, rtol=1e-3, atol=1e-3)
        ways[name] = lambda passes=passes: run(passes)
    return ways


def choices_of(context: int) -> dict[str, Callable[[], Any]]:
    """The choice of a layer's keys, from its queries, keys and log-sum-exp."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, HEADS, context + BLOCK, WIDTH // HEADS)
    k = torch.randn(shape, generator=generator)
    q = torch.randn((*shape[:2], BLOCK, shape[3]), generator=generator)
    lse = (q @ k.transpose(-1, -2) * shape[3] ** -0.5).logsumexp(dim=-1)
    count = min(BUDGETS[0], context)
    ways: dict[str, Callable[[], Any]] = {
        "choice": lambda: top_columns(q, k, count=count, softmax_lse=lse),
        "choice, PyTorch": lambda: rivals.top_columns(q, k, lse, count),
    }
    ours, theirs = (way() for way in ways.values())
    torch.testing.assert_close(ours.scores, theirs[1], rtol=1e-4, atol=1e-5)
    return ways


def medians(ways: dict[str, Callable[[], Any]], seconds: float, most: int) -> dict[str, float]:
    """Milliseconds of each, in turns: one turn at least, then while there is time."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    began = time.perf_counter()
    for turn in range(most):
        if turn and time.perf_counter() - began > seconds:
            break
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in samples.items()}


@torch.no_grad()
def times(context: int, seconds: float) -> dict[str, float]:
    """Milliseconds of each pass and choice behind so many tokens."""
    torch.manual_seed(0)
    model = PlacedModel(VOCAB, WIDTH, HEADS, LAYERS).eval().requires_grad_(False)
    ways = passes_of(model, context)
    slow = {name: ways.pop(name) for name in ("all rows", "all rows, and the choice")}
    quick = ways | choices_of(context)
    medians(quick, 0.0, 1)
    return medians(slow, seconds, 7) | medians(quick, seconds, 50)


# Tokens.


@torch.no_grad()
def tokens_of(task: str, count: int) -> dict[str, dict[str, float]]:
    """For each cache, how many blanks have the token that they have without, how many the right one, ..."""
    name, block_length, budgets = TASKS[task]
    model = load_model(name, "cpu")
    problems = make_problems(task, count, model)
    caches = {"none": "none", **OTHERS, **{f"sparse {n}": SparseCache(n) for n in budgets}}
    totals = {cache: dict.fromkeys(("same", "right", "blanks", "rows", "passes"), 0.0) for cache in caches}
    dropped: dict[str, list[float]] = {cache: [] for cache in caches}
    for prompt, answer in zip(problems.prompts, problems.answers, strict=True):
        blank, plain = prompt == model.mask_token_id, None
        for label, cache in caches.items():
            shares = dropped[label]

            def note(event: Any, shares: list[float] = shares) -> None:
                if event.dropped is not None:
                    shares.append(float(event.dropped))

            result = generate(
                model.model,
                prompt[None],
                mask_token_id=model.mask_token_id,
                block_length=block_length,
                policy="confidence",
                cache=cache,
                on_step=note,
            )
            tokens = result.tokens[0]
            plain = tokens if plain is None else plain
            total = totals[label]
            total["same"] += int((tokens == plain)[blank].sum())
            total["right"] += int((tokens[blank] == answer).sum())
            total["blanks"] += int(blank.sum())
            total["rows"] += int(result.num_rows)
            total["passes"] += int(result.num_forward_passes)
    return {
        label: {
            "same": total["same"] / total["blanks"],
            "right": total["right"] / total["blanks"],
            "rows": total["rows"] / total["passes"],
            **({"dropped": statistics.fmean(dropped[label])} if dropped[label] else {}),
        }
        for label, total in totals.items()
    }


# Results.


def report(results: dict[str, Any]) -> str:
    """The results as tables."""
    lines = []
    if "times" in results:
        rows = results["times"]["rows"]
        names = list(next(iter(rows.values())))
        lines += [
            f"**Time of a pass** over a block of {BLOCK} masks behind the context, milliseconds (medians): "
            f"{LAYERS} layers of width {WIDTH}, {HEADS} heads, float32, random weights. "
            f"{caption(results['times'])}",
            "",
            "| context | " + " | ".join(names) + " | exact over plain | choices in it |",
            "|---" * (len(names) + 3) + "|",
        ]
        for context, row in rows.items():
            ratio = row["all rows, and the choice"] / row["all rows"]
            share = LAYERS * row["choice"] / row["all rows"]
            figures = " | ".join(f"{row[n]:.4g}" for n in names)
            lines.append(f"| {context} | {figures} | {ratio:.2f} | {100 * share:.2f} % |")
        lines.append("")
    if "tokens" in results:
        lines += [
            "**Tokens**, against decoding without a cache, in the order of confidence: the same at a blank, "
            "the right one; query rows a pass; the share of a block's attention left out in its exact pass. "
            f"{caption(results['tokens'])}",
            "",
        ]
        for task, by_cache in results["tokens"]["rows"].items():
            name, block_length, _ = TASKS[task]
            lines += [
                f"{task} ({name}, {results['tokens']['problems']} problems, blocks of {block_length}):",
                "",
                "| cache | same | right | rows | attention dropped |",
                "|---|---|---|---|---|",
            ]
            lines += [
                f"| {cache} | {100 * row['same']:.1f} % | {100 * row['right']:.1f} % | {row['rows']:.1f} | "
                + (f"{100 * row['dropped']:.2f} % |" if "dropped" in row else "|")
                for cache, row in by_cache.items()
            ]
            lines.append("")
    return "\n".join(lines).rstrip()


def caption(part: dict[str, Any]) -> str:
    """Where a part was measured, in words."""
    of = part["machine"]
    return (
        f"`{part['command']}`, {of['date']}, commit {of['commit']}: {of['processor']}, {of['cpu_isa']}, "
        f"{of['threads']} thread(s), torch {of['torch']}, load {of['load']:.1f}."
    )


def drawn(results: dict[str, Any]) -> Figure:
    """Time by context, and tokens by budget."""
    from matplotlib.figure import Figure  # an extra: pip install .[plot]

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    times_ = results.get("times", {}).get("rows", {})
    contexts = sorted(map(int, times_))
    for name in next(iter(times_.values()), {}):
        if not name.startswith("choice"):
            left.plot(contexts, [times_[str(n)][name] for n in contexts], marker="o", label=name)
    left.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="a pass, ms")
    left.set_xticks(contexts, [f"{n // 1024}K" if n >= 1024 else str(n) for n in contexts], minor=False)
    left.set_xticks([], minor=True)
    left.set_title("Time of a pass over a block of 32", fontsize=9)
    left.legend(fontsize=8)
    for task, by_cache in results.get("tokens", {}).get("rows", {}).items():
        budgets = TASKS[task][2]
        line = right.plot(
            budgets, [100 * by_cache[f"sparse {n}"]["same"] for n in budgets], marker="o", label=task
        )[0]
        right.axhline(100 * by_cache["dual"]["same"], color=line.get_color(), linestyle=":", linewidth=1)
    right.set(
        xscale="log", xlabel="budget, keys of a layer and head", ylabel="same token as without a cache, %"
    )
    right.set_title("Tokens by budget (dotted: the keys of all positions)", fontsize=9)
    right.legend(fontsize=8)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text. The exit status."""
    return command_line.guarded(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    parser = command_line.Parser(
        prog="python -m bench caches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    positive = command_line.integer(1, 1 << 20)
    parser.add_argument("--contexts", type=positive, nargs="*", default=list(CONTEXTS), metavar="N")
    parser.add_argument("--tasks", choices=TASKS, nargs="*", default=list(TASKS), metavar="TASK")
    parser.add_argument("--problems", type=positive, default=100)
    parser.add_argument("--threads", type=command_line.threads, default=1)
    parser.add_argument("--seconds", type=command_line.seconds, default=20.0, help="for each context")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="short contexts and few problems: a minute")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    command = " ".join(["python -m bench caches", *given])
    if options.quick:
        options.contexts, options.problems, options.seconds = [512, 1024], 4, 1.0
        options.tasks = [task for task in options.tasks if task in ("addition", "sudoku")]
    CpuDevice(options.threads).activate()
    path = options.output / "caches.json"
    options.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    log = Console(stderr=True)
    for part, keys, measure in (
        ("times", options.contexts, lambda context: times(context, options.seconds)),
        ("tokens", options.tasks, lambda task: tokens_of(task, options.problems)),
    ):
        if keys:
            results[part] = {"command": command, "machine": on_cpu(options.threads)}
            results[part] |= {"problems": options.problems, "rows": {}}
        for key in keys:
            log.print(f"{part}: {key}")
            results[part]["rows"][str(key)] = measure(key)
            path.write_text(json.dumps(results, indent=1) + "\n")
    text = report(results)
    (options.output / "caches.md").write_text(text + "\n")
    try:
        drawn(results).savefig(options.output / "caches.png", dpi=120)
    except ImportError:
        log.print("no picture: pip install 'attn_sampler[plot]'")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
