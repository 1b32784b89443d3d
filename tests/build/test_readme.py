"""The README's example runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = Path(__file__).resolve().parents[2] / "README.md"


def test_example_decodes_the_block() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), names)
    tokens, mask = names["tokens"], names["mask"]
    assert isinstance(tokens, torch.Tensor)
    assert tokens[0, :4].tolist() == [1, 2, 3, 4]
    assert not (tokens == mask).any()
    assert len(code.splitlines()) <= 20
