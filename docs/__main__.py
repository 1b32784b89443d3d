"""Build the site: pages with their figures and numbers filled in, then Zensical over them, which takes no
warning. Nothing in it is fetched from another host.

    python -m docs [FOLDER]        # FOLDER/site, and what it is made of; default: build
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2
import yaml

from docs import figures, results

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "pages"

#: In a page ``{{ name(...) }}`` stands for what a function of ``results`` answers, or for a figure.
_TEMPLATES = jinja2.Environment(
    undefined=jinja2.StrictUndefined, comment_start_string="<!--#", comment_end_string="#-->", autoescape=False
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
    """Build the site in a folder.

    Returns
    -------
    Path
        The folder of the site.

    Raises
    ------
    RuntimeError
        Zensical warns of something; what it says.
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
    config |= {"docs_dir": "pages", "site_dir": "site"}  # beside the file
    (python,) = (plugin["mkdocstrings"]["handlers"]["python"] for plugin in config["plugins"] if "search" not in plugin)
    python["paths"] = [str(ROOT)]
    python["options"]["extensions"] = [str(ROOT / "docs" / "docstrings.py")]
    (folder / "site.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", "site.yml"]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(re.sub(r"\x1b\[[0-9;]*m", "", done.stdout))
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
