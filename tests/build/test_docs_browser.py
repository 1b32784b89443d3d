"""The documentation site as a reader meets it: in a browser, over a local server."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from browser import launch, visit
from site_build import built_site

NARROW = {"viewport": {"width": 380, "height": 800}}


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Not into the test's output."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the site is served."""
    handler = functools.partial(_Handler, directory=str(built_site(tmp_path_factory)))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launch() as started:
        yield started


def test_every_page_opens_wide_and_narrow(browser: Any, address: str) -> None:
    """All that the navigation has: without an error, a request to elsewhere or a missing picture, and on a
    narrow screen without scrolling sideways."""
    with visit(browser, address + "index.html") as seen:
        page = seen.page
        links = page.eval_on_selector_all("nav.md-nav--primary a.md-nav__link", "all => all.map(a => a.href)")
        targets = list(dict.fromkeys(link.partition("#")[0] for link in links))
        assert len(targets) > 30, targets
        for target in targets:
            page.set_viewport_size({"width": 1300, "height": 900})
            page.goto(target)
            assert page.locator("h1").first.inner_text().strip("¶\n "), target
            broken = "all => all.filter(i => getComputedStyle(i).display != 'none' && !i.naturalWidth).length"
            assert page.eval_on_selector_all("article img", broken) == 0, target
            for size in ({"width": 1300, "height": 900}, NARROW["viewport"]):
                page.set_viewport_size(size)
                wide, screen = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
                assert wide <= screen, f"{target}: {wide} on a screen of {screen}"
        # The search's worker may still be loading when the next page is asked for, and says so.
        assert [error for error in seen.errors if "/workers/search." not in error] == []
        assert {urlsplit(url).hostname for url in seen.requests if not url.startswith("data:")} == {
            "127.0.0.1"
        }


def test_search_finds_a_function(browser: Any, address: str) -> None:
    with visit(browser, address + "start.html") as seen:
        page = seen.page
        page.locator(".md-search__button").click()
        page.keyboard.type("column_scores", delay=5)
        found = page.locator("a[href*='attention.html']").filter(has_text="column_scores").first
        found.wait_for(state="visible", timeout=10_000)
        found.click()
        page.wait_for_url("**/api/attention.html**")
        assert seen.errors == []


def test_copied_code_is_the_code(browser: Any, address: str) -> None:
    host = address.rstrip("/")
    with visit(browser, address + "start.html") as seen:
        page = seen.page
        page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=host)
        block = page.locator(".highlight", has_text="load_task").first
        block.hover()
        block.locator("button").first.click()
        page.wait_for_function("navigator.clipboard.readText().then(text => text.includes('load_task'))")
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied.strip() == block.locator("code").first.inner_text().strip()
        assert copied.startswith("import torch\nfrom attn_sampler import generate\n")
        assert seen.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figures_follow_the_colours_of_the_page(scheme: str, browser: Any, address: str) -> None:
    """Which are the system's at first, and those of the button afterwards, on the next page too."""
    names = {"light": "default", "dark": "slate"}
    other = "dark" if scheme == "light" else "light"
    with visit(browser, address + "method.html", color_scheme=scheme) as seen:
        page = seen.page

        def shown() -> set[str]:
            pictures = "all => all.filter(i => getComputedStyle(i).display != 'none').map(i => i.src)"
            urls = page.eval_on_selector_all("article img", pictures)
            return {url.partition("#")[0].removesuffix(".svg").rpartition("-")[2] for url in urls}

        assert page.locator("body").get_attribute("data-md-color-scheme") == names[scheme]
        assert shown() == {scheme}
        page.locator("form[data-md-component=palette] label:visible").click()
        assert page.locator("body").get_attribute("data-md-color-scheme") == names[other]
        assert shown() == {other}
        page.goto(address + "results/quality.html")
        assert shown() == {other}
        assert seen.errors == []


def test_menu_opens_on_a_narrow_screen(browser: Any, address: str) -> None:
    with visit(browser, address + "limits.html", **NARROW) as seen:
        page = seen.page
        entry = page.locator("nav.md-nav--primary a.md-nav__link[href$='start.html']").first
        assert not entry.is_visible() or entry.bounding_box()["x"] < 0
        page.locator("header label[for=__drawer]").click()
        page.wait_for_function(
            "() => document.querySelector('.md-sidebar--primary').getBoundingClientRect().left >= 0"
        )
        entry.click()
        page.wait_for_url("**/start.html")
        assert seen.errors == []


def test_logo_leads_home_from_any_depth(browser: Any, address: str) -> None:
    with visit(browser, address + "engines/vllm.html") as seen:
        for place in ("engines/vllm.html", "limits.html"):
            seen.page.goto(address + place)
            seen.page.locator("a.md-logo:visible").first.click()
            seen.page.wait_for_url(address + "index.html")


def test_pages_open_from_disk_too(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    site: Path = built_site(tmp_path_factory)
    with visit(browser, (site / "method.html").as_uri()) as seen:
        seen.page.locator("nav.md-tabs a", has_text="Results").click()
        seen.page.wait_for_url("**/results/index.html")
        assert seen.page.locator("article img:visible").count() > 3
