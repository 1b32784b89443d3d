"""The documentation site: built without a warning; its links, numbers, reference and examples."""

from __future__ import annotations

import ast
import functools
import html.parser
import importlib.util
import inspect
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from examples import examples, run
from site_build import ROOT, built_site

import attn_sampler

PAGES = sorted((ROOT / "docs" / "pages").rglob("*.md"))
PAGES_WITH_EXAMPLES = [page for page in PAGES if examples(page)]


class Document(html.parser.HTMLParser):
    """What a page refers to, the places that it has, and the rows of its tables by the object they are of."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []  # to go to
        self.parts: list[str] = []  # that the page itself is made of
        self.ids: set[str] = set()
        self.alternatives: list[str | None] = []  # of its images
        self.rows: dict[str, list[list[str]]] = {}
        self.tags: set[str] = set()
        self._object = ""
        self._cell = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        if name := given.get("id"):
            self.ids.add(name)
            if tag in ("h2", "h3", "h4"):
                self._object = name
        address = given.get("href") or given.get("src")
        if address is not None:
            (self.links if tag == "a" else self.parts).append(address)
        if tag == "img":
            self.alternatives.append(given.get("alt"))
        if tag == "tr":
            self.rows.setdefault(self._object, []).append([])
        self._cell = tag in ("td", "th") or (self._cell and tag != "tr")
        if tag in ("td", "th"):
            self.rows[self._object][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[self._object][-1][-1] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_site(tmp_path_factory)


@pytest.fixture(scope="module")
def documents(site: Path) -> dict[Path, Document]:
    return {path: Document(path) for path in sorted(site.rglob("*.html"))}


def test_every_page_is_built(site: Path, documents: dict[Path, Document]) -> None:
    for page in PAGES:
        name = page.relative_to(ROOT / "docs" / "pages").with_suffix(".html")
        assert site / name in documents, name
    config = yaml.safe_load((ROOT / "docs" / "site.yml").read_text(encoding="utf-8"))
    assert set(_listed(config["nav"])) == {p.relative_to(ROOT / "docs" / "pages").as_posix() for p in PAGES}


def _listed(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [page for entry in entries for page in _listed(entry)]


def test_every_internal_link_and_image_is_there(site: Path, documents: dict[Path, Document]) -> None:
    checked = 0
    for path, document in documents.items():
        if path.name == "404.html":  # served at any address, so its links begin at the site's root
            continue
        for address in document.links + document.parts:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.relative_to(site)}: {address}"
            assert target.is_relative_to(site.resolve())
            if parts.fragment and target in documents and not parts.fragment.startswith("__"):
                assert unquote(parts.fragment) in documents[target].ids, (
                    f"{path.relative_to(site)}: {address}"
                )
            checked += 1
        assert all(document.alternatives), f"{path.relative_to(site)}: an image without words"
    assert checked > 1000


def test_nothing_of_a_page_comes_from_elsewhere(site: Path, documents: dict[Path, Document]) -> None:
    """And what links lead out of the site is printed, not fetched."""
    outside: set[str] = set()
    for path, document in documents.items():
        for address in document.parts:
            assert not urlsplit(address).netloc, f"{path.relative_to(site)}: {address}"
        outside |= {address for address in document.links if urlsplit(address).netloc}
    print("links to elsewhere:", *sorted(outside), sep="\n  ")
    assert all(urlsplit(address).scheme in ("http", "https") for address in outside)
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert "url(http" not in text.replace('"', "").replace("'", ""), sheet
        assert "@import" not in text, sheet


def test_every_public_name_has_its_place(site: Path, documents: dict[Path, Document]) -> None:
    ids = set().union(*(document.ids for document in documents.values()))
    names = [name for name in attn_sampler.__all__ if not name.startswith("__")]
    places = {f"attn_sampler.{name}{'.generate' if name == 'generate' else ''}" for name in names}
    assert places <= ids, places - ids


def functions() -> list[str]:
    return [name for name in attn_sampler.__all__ if inspect.isfunction(getattr(attn_sampler, name))]


@pytest.mark.parametrize("name", functions())
def test_every_parameter_is_told_with_its_type(name: str, documents: dict[Path, Document]) -> None:
    place = f"attn_sampler.{name}{'.generate' if name == 'generate' else ''}"
    (rows,) = (document.rows.get(place, []) for document in documents.values() if place in document.ids)
    told = {
        row[0].strip().lstrip("*"): [" ".join(cell.split()) for cell in row[1:]]
        for row in rows
        if len(row) == 4
    }
    for parameter in inspect.signature(getattr(attn_sampler, name)).parameters.values():
        assert parameter.name in told, parameter.name
        kind, description, _default = told[parameter.name]
        assert kind, parameter.name
        assert description, parameter.name
        if kind == "Tensor" and parameter.kind != parameter.VAR_POSITIONAL:  # else its type has the shape
            assert "[" in description or "as in" in description.lower(), f"{parameter.name}: {description}"


def test_fields_and_shapes_come_from_the_comments(documents: dict[Path, Document]) -> None:
    rows = {place: rows for document in documents.values() for place, rows in document.rows.items()}
    state = {row[0].strip(): row for row in rows["attn_sampler.StepState"] if len(row) == 3}
    assert state["masked"][1].strip() == "Tensor"
    assert "[B, C] bool, the positions still to fill" in state["masked"][2]
    scores = {row[0].strip(): row[1].strip() for row in rows["attn_sampler.column_scores"] if len(row) == 4}
    assert scores["q"] == "Tensor[B, Hq, M, D]"
    assert scores["softmax_lse"] == "Tensor[B, Hq, M] | None"
    # And nothing of a docstring is taken for another kind of Markdown.
    assert not any(tag in ("blockquote", "dt") for document in documents.values() for tag in document.tags)
    names = [row[0].strip() for row in rows["attn_sampler.top_columns"] if len(row) == 4]
    assert "..." not in names
    assert "query_mask" in names


def test_a_broken_link_or_anchor_ends_the_build(tmp_path: Path) -> None:
    pytest.importorskip("zensical", reason="zensical is not installed (pip install '.[docs]')")
    from docs.__main__ import run_zensical

    pages = tmp_path / "pages"
    pages.mkdir()
    (pages / "index.md").write_text("# One\n\n[three](three.md) [two](two.md) [there](two.md#there)\n")
    (pages / "two.md").write_text("# Two\n")
    config = {"site_name": "two pages", "plugins": [], "use_directory_urls": False}
    with pytest.raises(RuntimeError, match=r"(?s)page does not exist.*anchor does not exist.*2 issues found"):
        run_zensical(tmp_path, config)


def test_numbers_come_from_the_committed_results() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install '.[plot]')")
    from docs import results

    cell = json.loads((results.QUALITY / "heldout.json").read_text())["tasks"]["sudoku"]["rules"][
        "threshold:tau=0.99"
    ]
    count = len(cell["right"])
    assert (
        results.right("heldout", "sudoku", "threshold:tau=0.99")
        == f"{100 * sum(cell['right']) / count:.1f} %"
    )
    assert results.passes("heldout", "sudoku", "threshold:tau=0.99") == f"{sum(cell['passes']) / count:.2f}"
    for title, measured, name, ratio in results.comparisons(1):
        ours = min(f["median_ms"] for f in measured["figures"].values() if f["ours"] and "median_ms" in f)
        assert ratio == measured["figures"][name]["median_ms"] / ours, title
    lost = [x for x in results.comparisons(1) if x[3] < 1]
    assert len(lost) == len(results.losses(1).splitlines()) - 2 > 0


def test_command_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("zensical", reason="zensical is not installed (pip install '.[docs]')")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install '.[plot]')")
    from docs import __main__ as command

    def fail(_: Path) -> Path:
        raise RuntimeError("anchor does not exist")

    monkeypatch.setattr(command, "build", fail)
    assert command.main([str(tmp_path / "new")]) == 1
    assert capsys.readouterr().err == "anchor does not exist\n"
    monkeypatch.setattr(command, "build", lambda folder: folder / "site")
    assert command.main([str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'new' / 'site'}\n"


def test_a_page_that_asks_for_what_is_not_there_is_refused() -> None:
    pytest.importorskip("zensical", reason="zensical is not installed (pip install '.[docs]')")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install '.[plot]')")
    from docs.__main__ import fill_in

    assert "../figures/order-dark.svg#only-dark" in fill_in('{{ figure("order", "words") }}', "results/a.md")
    with pytest.raises(KeyError, match="no figure 'nope'"):
        fill_in('{{ figure("nope", "words") }}', "index.md")
    with pytest.raises(Exception, match="'speed' is undefined"):
        fill_in("{{ speed() }}", "index.md")


def test_make_docs_runs_though_a_folder_is_called_so() -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = subprocess.run(["make", "-n", "docs"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "python -m docs" in done.stdout


# Examples.


@pytest.mark.parametrize("page", PAGES_WITH_EXAMPLES, ids=lambda page: page.stem)
def test_examples_run(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = [code for code in examples(page) if not code.needs]
    if not here:
        pytest.skip(f"none of its examples runs here: {', '.join(code.needs for code in examples(page))}")
    if any("from transformers import" in code.code for code in here):
        pytest.importorskip("transformers", reason="transformers is not installed")
    run(page, *here)


@pytest.mark.parametrize(
    ("page", "index"),
    [
        pytest.param(page, index, id=f"{page.stem}-{index}")
        for page in PAGES_WITH_EXAMPLES
        for index, code in enumerate(examples(page))
        if code.needs
    ],
)
def test_what_the_other_examples_import_of_ours_is_there(page: Path, index: int) -> None:
    """They need an engine, a GPU or a checkpoint, and say so in their title."""
    example = examples(page)[index]
    assert example.needs.startswith("needs "), f"{page.name}: a title that is no need"
    imports = [node for node in ast.walk(ast.parse(example.code)) if isinstance(node, ast.ImportFrom)]
    for node in imports:
        if (node.module or "").partition(".")[0] == "attn_sampler":
            assert {alias.name for alias in node.names} <= defined(node.module or ""), node.module


@functools.cache
def defined(module: str) -> set[str]:
    """The names at a module's top, which is not imported: its engine may not be here."""
    parts = module.split(".")
    path = ROOT.joinpath(*parts).with_suffix(".py")
    if not path.exists():
        path = ROOT.joinpath(*parts, "__init__.py")
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def test_docs_extra_is_what_the_test_extra_brings() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras["docs"]) <= set(extras["test"])
    assert importlib.util.find_spec("docs") is not None
