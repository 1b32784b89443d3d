"""The Python examples of Markdown pages, as tests run them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch

_FENCE = re.compile(r'^```python(?: title="(.*?)")?\n(.*?)^```$', flags=re.S | re.M)


class Example(NamedTuple):
    code: str
    line: int  # of its first line in the page
    needs: str  # what a reader has to have for it, or ""


def examples(page: Path) -> list[Example]:
    """The examples of a page; the title of one that not every machine can run begins with "needs"."""
    text = page.read_text(encoding="utf-8")
    return [
        Example(match[2], text.count("\n", 0, match.start(2)) + 1, match[1] or "")
        for match in _FENCE.finditer(text)
    ]


def run(page: Path, *codes: Example) -> dict[str, object]:
    """The names that examples leave which run one after the other; errors name the page's own lines."""
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": page.stem}
    for code in codes:
        exec(compile("\n" * (code.line - 1) + code.code, str(page), "exec"), names)
    return names
