"""A headless Chromium for tests of pages: the system's own, driven by Playwright."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
_QUIET = (  # what a browser would fetch by itself
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-gpu",
)


@contextlib.contextmanager
def launch() -> Iterator[Browser]:
    """A browser with an empty profile, closed in the end; without one here, the test is skipped."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        pytest.skip(f"no Playwright for Python here: {error}")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser on PATH: {', '.join(NAMES)}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(_QUIET))
        try:
            yield browser
        finally:
            browser.close()


@dataclasses.dataclass
class Visit:
    """A page in a context of its own, and what it did."""

    page: Page
    requests: list[str] = dataclasses.field(default_factory=list)  # every address asked for, the page's first
    errors: list[str] = dataclasses.field(default_factory=list)  # of the console, of scripts and of requests


def _note_failure(seen: Visit, request: Any) -> None:
    if request.failure != "net::ERR_ABORTED":  # that is a page left before all of it had come
        seen.errors.append(f"failed: {request.url} ({request.failure})")


@contextlib.contextmanager
def visit(browser: Browser, url: str, **options: Any) -> Iterator[Visit]:
    """The page at an address, loaded; ``options`` are those of Playwright's ``new_context``."""
    context = browser.new_context(**options)
    try:
        seen = Visit(context.new_page())
        context.on("request", lambda request: seen.requests.append(request.url))
        context.on("requestfailed", lambda request: _note_failure(seen, request))
        context.on("weberror", lambda error: seen.errors.append(str(error.error)))
        context.on(
            "console",
            lambda said: seen.errors.append(said.text) if said.type in ("error", "warning") else None,
        )
        seen.page.goto(url)
        yield seen
    finally:
        context.close()
