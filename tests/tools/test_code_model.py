"""The benchmark that trains a model of Python source, at toy size."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch

from attn_sampler.bundled.model import load_weights
from bench.train_code_model import (
    SIZES,
    Tokenizer,
    infilling_problems,
    main,
    parses,
    permissive_files,
    read_texts,
)

SOURCE = 'def f(x, y=12):\n    """Überall ∑."""\n    if x:\n\treturn x ** 2\n    return f"{x!r}" + "\\n"\n'


@pytest.mark.parametrize("vocab_size", [257, 260, 400])
def test_the_tokenizer_loses_nothing(vocab_size: int) -> None:
    tokenizer = Tokenizer.fit([SOURCE, "def g(x): return f(x)\n"], vocab_size)
    ids = tokenizer.encode(SOURCE)
    assert tokenizer.decode(ids) == SOURCE
    assert max(ids) < vocab_size - 1
    assert (len(ids) < len(SOURCE.encode())) == (vocab_size == 400)


def test_no_text_is_on_both_sides(tmp_path: Path) -> None:
    paths = []
    for i in range(300):
        paths.append(tmp_path / f"{i}.py")
        paths[-1].write_text(f"# {i % 250}\n" + "x = 1\n" * 40)
    training, held_out = read_texts(paths)
    assert len(training) + len(held_out) == 250  # copies once
    assert not set(training) & set(held_out)
    assert 1 <= len(held_out) <= 25
    assert read_texts(reversed(paths)) == (training, held_out)


def test_problems_are_functions_with_a_run_blanked() -> None:
    text = Path(__file__).read_text()
    size = dataclasses.replace(SIZES["toy"], length=256)
    tokenizer = Tokenizer.fit([text], size.vocab_size)
    problems = infilling_problems([text, "def broken(:\n"], tokenizer, size, 3)
    assert len(problems) == 3
    mask = size.vocab_size - 1
    for i, (prompt, answer) in enumerate(zip(problems.prompts, problems.answers, strict=True)):
        blank = (prompt == mask).nonzero().squeeze(1)
        assert torch.equal(blank, torch.arange(blank[0], blank[0] + len(answer)))
        truth = problems.truth(i, mask)
        assert tokenizer.decode(truth.tolist()).startswith(("def ", "async def "))
        assert problems.measures["parses"](i, truth)
        truth[:4] = tokenizer.encode(")")[0]
        assert not problems.measures["parses"](i, truth)


def test_what_parses() -> None:
    assert parses(SOURCE.replace("\t", "        "))
    assert not parses("def f(:")
    assert not parses("a\0b")


def test_permissive_files_hold_the_standard_library() -> None:
    names = {path.name for path in itertools.islice(permissive_files(), 100)}
    assert {"argparse.py", "ast.py"} <= names


def test_toy_run_and_rerun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--size", "toy", "--device", "cpu", "--seconds", "1", "--max-files", "60", "--problems", "3"]
    words += ["--rule", "confidence", "threshold", "dawn", "--tau", "0.5", "--out", str(tmp_path)]
    assert main(words) == 0
    output = capsys.readouterr().out
    assert "3 rules complete, 0 decodings left" in output
    losses = [float(line.split("loss ")[1].split()[0]) for line in output.splitlines() if "loss" in line]
    assert losses[0] > 4.0
    saved = json.loads((tmp_path / "results.json").read_text())
    cells = saved["tasks"]["code"]
    assert cells["rules"]["confidence"].keys() == {"right", "parses", "passes"}
    assert (
        8 <= min(cells["rules"]["confidence"]["passes"]) <= max(cells["rules"]["confidence"]["passes"]) <= 24
    )
    assert max(cells["orders"]["confidence"]["nats"]) < -1.0
    assert saved["summary"][0]["measures"] == ["parses"]
    assert "| parses |" in (tmp_path / "results.md").read_text()
    weights = load_weights(tmp_path / "code.safetensors").state_dict()
    assert main(words) == 0  # nothing is trained or decoded again
    assert "loss" not in capsys.readouterr().out
    again = load_weights(tmp_path / "code.safetensors").state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
