"""The command ``attn-sampler trace``: decode traces as a page for a browser, or drawn in the terminal."""

from __future__ import annotations

import argparse
import functools
import sys
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path

from attn_sampler import command_line, documents, viewer
from attn_sampler.bundled import TASKS, load_task
from attn_sampler.published import MODELS, folder
from attn_sampler.trace import DecodeTrace

_FILE = "as --trace of generate and demo writes it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``attn-sampler trace``."""
    commands = parser.add_subparsers(dest="picture", required=True)
    view = commands.add_parser("view", help="a page that plays them, side by side, in any browser")
    view.add_argument("files", type=command_line.input_file, nargs="+", metavar="FILE", help=_FILE)
    view.add_argument(
        "--output",
        type=command_line.output_file,
        metavar="PAGE",
        help="the page to write (default: beside the first FILE, with .html for its ending)",
    )
    view.add_argument("--open", action="store_true", help="show it in the browser")
    show = commands.add_parser("show", help="a state of it in the terminal, coloured by step")
    show.add_argument("files", type=command_line.input_file, nargs=1, metavar="FILE", help=_FILE)
    count = command_line.integer(0, 2**62)
    show.add_argument("--step", type=count, metavar="N", help="after N steps (default: at the end)")
    show.add_argument("--sequence", type=count, metavar="N", help="one of them, from 0 (default: all)")
    for command in (view, show):
        _add_names(command)


def _add_names(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--task", choices=TASKS, help="print tokens as this bundled task does")
    group.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="print tokens as this checkpoint's tokenizer does: a folder, an id on the hub, or one of "
        "attn-sampler models (default: as the file says, which generate and demo write into it)",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the tokenizer"
    )
    parser.add_argument(
        "--width",
        type=command_line.integer(1, 4096),
        metavar="N",
        help="positions a line (default: as the file says, or running text)",
    )


def run(options: argparse.Namespace) -> int:
    """What ``attn-sampler trace`` does.

    Raises
    ------
    ValueError
        A file is no decode trace, or the options do not go together.
    LoadError, FetchError
        The tokenizer is not to be had.
    """
    inputs = {f"FILE {number}": path for number, path in enumerate(options.files, start=1)}
    command_line.check_distinct(inputs)
    traces = {path: _load(path) for path in options.files}
    _name_tokens(traces, options)
    if options.picture == "show":
        return _show(traces[options.files[0]], options)
    output = options.output or _beside(options.files[0])
    command_line.check_distinct({**inputs, "--output": output})
    short = len({path.name for path in traces}) == len(traces)
    try:
        text = viewer.page({path.name if short else str(path): trace for path, trace in traces.items()})
    except ValueError as error:
        raise ValueError(f"argument FILE: {str(error).removeprefix('traces: ')}") from None
    documents.write(output, text)
    print(f"wrote {output}")
    if options.open and not webbrowser.open(output.resolve().as_uri()):
        print("attn-sampler: no browser was found to show it", file=sys.stderr)
        return 1
    return 0


def _load(path: Path) -> DecodeTrace:
    try:
        return DecodeTrace.load(path)
    except ValueError as error:
        raise ValueError(f"argument FILE: {str(error).removeprefix('path: ')}") from None


def _beside(file: Path) -> Path:
    """Where the page goes unless --output says."""
    try:
        if not file.is_file():
            raise argparse.ArgumentTypeError(f"expected one where FILE is a device or a pipe, as {file} is")
        return command_line.output_file(str(file.with_suffix(".html")))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"argument --output: {error}") from None


def _name_tokens(traces: dict[Path, DecodeTrace], options: argparse.Namespace) -> None:
    """Replace what the traces say of how they are drawn by what the options say."""
    symbols: Sequence[str] | Callable[[int], str | None] | None = None
    if options.tokenizer is not None:
        from attn_sampler.adapters.run import load_tokenizer, token_text

        source = str(folder(options.tokenizer)) if options.tokenizer in MODELS else options.tokenizer
        tokenizer = load_tokenizer(source, trust_remote_code=options.trust_remote_code)
        symbols = functools.partial(token_text, tokenizer)
    task = None if options.task is None else load_task(options.task)
    for path, trace in traces.items():
        if task is not None:
            symbols, last = task.symbols, trace.token_ids()[-1]
            if last >= len(symbols):
                raise ValueError(
                    f"argument --task: {task.name} has {len(symbols)} tokens, and {path} has token {last}"
                )
            trace.width = task.grid_width if task.cell_separator else None
        if symbols is not None:
            trace.name_tokens(symbols)
        if options.width is not None:
            trace.width = options.width


def _show(trace: DecodeTrace, options: argparse.Namespace) -> int:
    from rich.console import Console

    count = len(trace.prompt)
    if options.sequence is not None and options.sequence >= count:
        raise ValueError(
            f"argument --sequence: expected one of the file's {count}, from 0, got {options.sequence}"
        )
    trace.symbols = {token: _printable(text) for token, text in trace.symbols.items()}
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for sequence in range(count) if options.sequence is None else [options.sequence]:
        steps = 1 + max((c.step for c in trace.commits if c.sequence == sequence), default=-1)
        until = steps if options.step is None else min(options.step, steps)
        console.print(
            f"{_printable(trace.policy)}, sequence {sequence}, step {until} of {steps}", style="dim"
        )
        console.print(trace.render(sequence, until_step=until - 1))
    return 0


def _printable(text: str) -> str:
    """Text that only prints, whatever a terminal would make of its control characters."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode()
        for letter in text
    )
