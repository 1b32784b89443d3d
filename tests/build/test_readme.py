"""The README's examples run as printed."""

from __future__ import annotations

from pathlib import Path

import torch
from examples import examples, run

README = Path(__file__).resolve().parents[2] / "README.md"


def left_by(index: int) -> dict[str, object]:
    """The names that an example leaves."""
    codes = examples(README)
    assert len(codes) == 2
    assert len(codes[index].code.splitlines()) <= 20
    return run(README, codes[index])


def test_example_decodes_the_block() -> None:
    names = left_by(0)
    tokens, mask = names["tokens"], names["mask"]
    assert isinstance(tokens, torch.Tensor)
    assert tokens[0, :4].tolist() == [1, 2, 3, 4]
    assert not (tokens == mask).any()


def test_example_keeps_the_keys_that_matter() -> None:
    kept, k, v = map(left_by(1).get, ("kept", "k", "v"))
    assert isinstance(kept, torch.Tensor)
    assert kept[0, :, :36].tolist() == [[*range(4), *range(4064, 4096)]] * 2
    assert all(len(set(row)) == 512 for row in kept[0].tolist())
    for x in (k, v):
        assert isinstance(x, torch.Tensor)
        assert x.shape == (1, 2, 512, 64)
