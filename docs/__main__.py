"""Build the site: pages with their figures and numbers filled in, then Zensical over them, which takes no
warning. Nothing in it is fetched from another host.

    pip install -e '.[docs]'
    python -m docs [FOLDER]        # FOLDER/site, and what it is made of; default: build
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from docs import figures, results

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "pages"

#: In a page ``{{ name(...) }}`` stands for what a function of ``results`` answers, or for a figure.
_TEMPLATES = jinja2.Environment(
    undefined=jinja2.StrictUndefined,
    comment_start_string="<!--#",
    comment_end_string="#-->",
    autoescape=False,
)


def fill_in(text: str, name: str) -> str:
    """A page with its figures and numbers; ``name`` is its place among the pages."""
    up = "../" * name.count("/")

    def figure(of: str, words: str) -> str:
        if of not in figures.NAMES:
            raise KeyError(f"{name}: no figure {of!r}; there are {', '.join(figures.NAMES)}")
        return "\n".join(f"![{words}]({up}figures/{of}-{mode}.svg#only-{mode})" for mode in figures.MODES)

    return _TEMPLATES.from_string(text).render(**results.FUNCTIONS, figure=figure) + "\n"


def build(folder: Path) -> Path:
    """Build the site in a folder, from the pages of this tree.

    Returns
    -------
    Path
        The folder of the site.

    Raises
    ------
    RuntimeError
        As ``run_zensical``.
    """
    pages = folder / "pages"
    shutil.rmtree(pages, ignore_errors=True)
    shutil.copytree(PAGES, pages)
    for path in pages.rglob("*.md"):
        name = path.relative_to(pages).as_posix()
        path.write_text(fill_in(path.read_text(encoding="utf-8"), name), encoding="utf-8")
    (pages / "figures").mkdir()
    for name, picture in figures.pictures():
        (pages / "figures" / name).write_text(picture, encoding="utf-8")
    config = yaml.safe_load((ROOT / "docs" / "site.yml").read_text(encoding="utf-8"))
    python = next(plugin for plugin in config["plugins"] if "mkdocstrings" in plugin)["mkdocstrings"][
        "handlers"
    ]["python"]
    python["paths"] = [str(ROOT)]
    python["options"]["extensions"] = [str(ROOT / "docs" / "docstrings.py")]
    return run_zensical(folder, config)


def run_zensical(folder: Path, config: dict[str, Any]) -> Path:
    """Make a site of ``folder/pages``, in ``folder/site``, which is returned.

    Raises
    ------
    RuntimeError
        It warns of something: a link, an anchor or a name that is not there, a docstring that cannot be read.
        The message is all that it said.
    """
    config = {**config, "docs_dir": "pages", "site_dir": "site"}  # beside the file
    (folder / "site.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", "site.yml"]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    if done.returncode or "griffe:" in said:  # whose warnings are none of Zensical's
        raise RuntimeError(said)
    return folder / "site"


def main(arguments: Sequence[str]) -> int:
    """The command; its exit status."""
    folder = Path(arguments[0]) if arguments else ROOT / "build"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        print(f"wrote {build(folder.resolve())}")
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
