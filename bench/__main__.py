"""Measure the kernels on real decode shapes against what one would use instead.

    python -m bench [--rows 1 2 a1] [--cases columns step] [--backends cpu] [--threads 1 2] [--quick]
    python -m bench end-to-end        tokens per second, and where a step's time goes
    python -m bench compare OLD NEW   exit status 1 where ours became slower
    python -m bench report            RESULTS.md from the files under results/
    python -m bench model             what steps should take on a GPU, beside what they took
    python -m bench caches            passes by the context, and tokens by the budget of keys

Every result is checked before it is timed. Candidates take turns in one process, with cold caches.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from attn_sampler import checks, command_line
from attn_sampler.backends import BACKENDS

from . import harness, report
from .cases import CASES
from .rows import QUICK, ROWS
from .timing import thread_counts

_DTYPES = ("bfloat16", "float16", "float32")


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    shared.add_argument("--output", type=Path, default=report.RESULTS, metavar="FOLDER")
    shared.add_argument("--quick", action="store_true", help="few rows and samples, under two minutes")
    parser = command_line.Parser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    kernels = commands.add_parser("kernels", parents=[shared], help="the default: every case on every row")
    kernels.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"of {' '.join(ROWS)}")
    kernels.add_argument(
        "--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=f"of {' '.join(CASES)}"
    )
    kernels.add_argument("--backends", nargs="+", choices=BACKENDS, default=harness.default_backends())
    kernels.add_argument(
        "--threads", type=command_line.threads, nargs="+", default=thread_counts(), help="of the CPU"
    )
    kernels.add_argument(
        "--seconds", type=command_line.seconds, default=math.inf, help="start no row after so long"
    )
    steps = commands.add_parser("end-to-end", parents=[shared], help="whole decoding steps of a model")
    steps.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    compare = commands.add_parser("compare", help="two result files")
    compare.add_argument("old", type=command_line.input_file)
    compare.add_argument("new", type=command_line.input_file)
    compare.add_argument(
        "--threshold",
        type=command_line.non_negative,
        default=1.15,
        help="times the old median (default 1.15)",
    )
    commands.add_parser("report", help="write RESULTS.md")
    commands.add_parser("caches", help="passes by context, tokens by budget of keys", add_help=False)
    model = commands.add_parser("model", help="write results/model.md: predicted times on a GPU")
    model.add_argument(
        "--results", type=command_line.input_file, nargs="+", default=[], help="files of that GPU"
    )
    model.add_argument("--output", type=Path, default=report.RESULTS / "model.md", metavar="FILE")
    model.add_argument("--json", action="store_true", help="print the rows, and write nothing")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text. The exit status."""
    return command_line.guarded(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["caches"]:
        from . import caches

        return caches.main(given[1:])
    parser = _parser()
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given.insert(0, "kernels")
    options = parser.parse_args(given)
    if options.command == "compare":
        try:
            before, after = map(report.read, (options.old, options.new))
        except ValueError as error:
            parser.error(str(error))
        return _compare(before, after, options.threshold)
    if options.command == "report":
        print(f"written: {report.write_results_page()}")
        return 0
    if options.command == "model":
        try:
            taken = list(map(report.read, options.results))
        except ValueError as error:
            parser.error(str(error))
        return _model(taken, options.output, options.json)
    shown = [word for word in given if word != "kernels"]
    command = " ".join(["python -m bench", *shown])
    if options.command == "end-to-end":
        try:
            checks.device("argument --device", options.device)
        except ValueError as error:
            parser.error(str(error))
        return _end_to_end(options, command)
    return _kernels(options, command)


def _model(taken: list[dict[str, Any]], path: Path, as_json: bool) -> int:
    from . import model

    if as_json:
        rows = [model.predict(name, row) for name, row in model.DECODE.items()]
        derived = ("body", "bound", "total", "waves")
        shown = [
            {**r._asdict(), "plan": r.plan._asdict(), **{n: getattr(r, n) for n in derived}} for r in rows
        ]
        print(json.dumps({"predicted_us": shown, "measured_us": model.measured(taken)}, indent=1))
        return 0
    model.write(path, taken)
    print(f"written: {path}")
    return 0


def _kernels(options: argparse.Namespace, command: str) -> int:
    load = harness.load_average()
    absent = harness.missing(options.backends)
    for name, reason in absent.items():
        print(f"not measured: {name}: {reason}")
    rows = options.rows or (QUICK if options.quick else ROWS)
    with _progress() as advance:
        measured = harness.run(
            options.cases,
            rows,
            options.backends,
            options.threads,
            getattr(torch, options.dtype),
            harness.BRIEF if options.quick else harness.FULL,
            seconds=options.seconds,
            advance=advance,
        )
    if not measured["cells"]:
        print(
            f"nothing to measure: none of {' '.join(options.backends)} runs here, or no case has "
            f"the rows {' '.join(rows)}",
        )
        return 2
    results = {
        "command": command,
        "dtype": options.dtype,
        "environment": harness.environment(measured),
        "load_average": load,
        "missing": absent,
        **measured,
    }
    # Apart from a run of everything, and not among the results: it would stand for the machine otherwise.
    part = options.rows is not None or set(options.cases) != set(CASES)
    path = _write(options, results, ("-quick" if options.quick else "") + ("-part" if part else ""))
    tables = report.markdown(results)
    path.with_suffix(".md").write_text(f"# {results['environment']['machine']}\n\n{tables}\n")
    _show(tables)
    print(f"written: {path} and .md")
    if not part:
        try:
            plots = report.plot(results, path.parent)
        except ImportError as error:
            print(f"no plots: {error} (pip install .[plot])")
        else:
            print(f"plots: {', '.join(plots) or 'none, for want of rows'}")
    wrong = [
        f"{cell['case']} {cell['row']} {name}: {figure['failed']}"
        for cell in results["cells"]
        for name, figure in cell.get("figures", {}).items()
        if figure["ours"] and "failed" in figure
    ]
    for line in wrong:
        print(f"failed: {line}")
    return 1 if wrong else 0


def _end_to_end(options: argparse.Namespace, command: str) -> int:
    from . import end_to_end

    load = harness.load_average()
    measured = end_to_end.run(options.device, getattr(torch, options.dtype), brief=options.quick)
    devices = {"devices": [{"device": options.device}]}
    results = {
        "command": command,
        "environment": harness.environment(devices),
        "load_average": load,
        **measured,
    }
    path = _write(options, results, "-end-to-end")
    _show(report.end_to_end_table(results))
    print(f"written: {path}")
    return 0


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal, and lines in a log."""
    if not sys.stderr.isatty():
        yield lambda label, done, total: print(f"{done}/{total} {label}", file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda label, done, total: bar.update(task, description=label, completed=done, total=total)


def _show(markdown: str) -> None:
    """Tables drawn on a terminal, and as they are in a log."""
    if not sys.stdout.isatty():
        print(markdown)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(markdown))


def _write(options: argparse.Namespace, results: dict[str, Any], suffix: str) -> Path:
    about = results["environment"]
    folder = report.folder_of(about["machine"], options.output)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{about['date']}{suffix}.json"
    # Five digits are more than any figure here is worth, and half the file.
    rounded = json.loads(json.dumps(results), parse_float=lambda text: float(f"{float(text):.5g}"))
    path.write_text(json.dumps(rounded, indent=1) + "\n")
    return path


def _compare(before: dict[str, Any], after: dict[str, Any], threshold: float) -> int:
    machines = [r["environment"]["machine"] for r in (before, after)]
    if machines[0] != machines[1]:
        print(f"different machines: {machines[0]}; {machines[1]}")
    changes, rivals = report.compare(before, after, threshold)
    if not changes:
        print("the files have no figure of ours in common")
        return 2
    regressions = [change for change in changes if change.regressed]
    for change in regressions:
        became = change.reason if change.new_ms is None else f"{change.new_ms:.3g} ms"
        times = "" if change.new_ms is None else f", {change.new_ms / change.old_ms:.2f} times"
        print(f"regressed: {change.what}: {change.old_ms:.3g} ms, now {became}{times}")
    ratios = [change.new_ms / change.old_ms for change in changes if change.new_ms is not None]
    if ratios:
        print(f"ours: {statistics.median(ratios):.2f} times the old medians, over {len(ratios)} figures")
    if rivals is not None:
        print(f"the rivals' own: {rivals:.2f} times, which is the machine's doing")
    print(f"{len(regressions)} of {len(changes)} figures regressed beyond {threshold:g} times")
    return 1 if regressions else 0


if __name__ == "__main__":
    sys.exit(main())
