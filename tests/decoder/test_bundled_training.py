"""The training of the bundled models."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from test_bundled import TINY, needs_muon

from attn_sampler.bundled.tasks import (
    Addition,
)
from attn_sampler.bundled.train import RECIPES, Recipe, edit_loss, masked_loss, train
from attn_sampler.bundled.train import main as training_main


@needs_muon
def test_training_lowers_the_loss_and_repeats_exactly() -> None:
    task = Addition(2)
    recipe = Recipe(steps=120, batch_size=64, warmup_steps=10)
    losses: list[float] = []
    stream = torch.get_rng_state()
    first = train(task, recipe, TINY, report=lambda step, loss: losses.append(loss))
    assert torch.equal(torch.get_rng_state(), stream)  # the caller's random numbers are untouched
    assert len(losses) == 120
    assert np.mean(losses[:5]) == pytest.approx(math.log(12), abs=0.3)  # knows nothing at first
    assert np.mean(losses[-20:]) < np.mean(losses[:5]) - 0.4
    assert not first.training
    first, again = (train(task, dataclasses.replace(recipe, steps=12), TINY) for _ in range(2))
    other = train(task, dataclasses.replace(recipe, steps=2, seed=1), TINY)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(other.head.weight, first.head.weight)


def test_training_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(RuntimeError, match=r"^training needs torch\.optim\.Muon, from torch 2\.9 on"):
        train(Addition(2), Recipe(steps=1), TINY)


@needs_muon
def test_training_command_writes_what_it_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "addition.safetensors"
    common = ["--problems", "3", "--seed", "4", "--threads", str(torch.get_num_threads())]
    training_main(["addition", "--out", str(path), "--steps", "2", *common])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 2/2  mean loss 2.")
    assert [line.partition(":")[0] for line in lines[1:]] == [
        f"addition, held out, {blank} blank" for blank in ("sum", "first", "second")
    ]
    with safe_open(str(path), framework="pt") as file:
        recipe = dataclasses.replace(RECIPES["addition"], steps=2, seed=4)
        assert file.metadata()["recipe"] == str(dataclasses.asdict(recipe))
    training_main(["addition", "--evaluate", str(path), *common])
    assert capsys.readouterr().out.splitlines() == lines[1:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evaluate", "x", "--problems", "0"], "argument --problems: expected 1 to 1000, got 0"),
        (
            ["--out", "no/such/x"],
            "argument --out: expected a file in a directory that exists, got 'no/such/x'",
        ),
        ([], "one of the arguments --out --evaluate is required"),
    ],
)
def test_training_command_refuses_before_it_trains(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        training_main(["sudoku", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_masked_loss_of_a_known_model_bounds_its_nats_per_token() -> None:
    vocab, mask = 13, 12
    # Only blanks count, and a model that says p(token) = 1/12 pays log 12 for each, in the mean over masks.
    nothing = torch.zeros(64, 10, vocab)
    nothing[..., mask] = -torch.inf
    tokens = torch.randint(0, 12, (64, 10), generator=torch.Generator().manual_seed(0))
    answer = torch.rand(64, 10, generator=torch.Generator().manual_seed(1)) < 0.5
    answer[:, 0] = True
    seen: list[torch.Tensor] = []

    def model(masked: torch.Tensor) -> torch.Tensor:
        seen.append(masked)
        return nothing

    generator = torch.Generator().manual_seed(2)
    losses = [masked_loss(model, tokens, answer, mask, generator).item() for _ in range(300)]
    assert np.mean(losses) == pytest.approx(math.log(12), rel=0.02)
    blank = torch.stack(seen) == mask
    assert not (blank & ~answer).any()
    assert all(torch.equal(masked[~b], tokens[~b]) for masked, b in zip(seen, blank, strict=True))
    assert blank[:, answer].double().mean().item() == pytest.approx(0.5, abs=0.01)  # rates are uniform


def test_edit_loss_shows_guesses_in_the_place_of_blanks() -> None:
    vocab, mask, batch = 13, 12, 64
    tokens = torch.randint(0, 12, (batch, 10), generator=torch.Generator().manual_seed(0))
    answer = torch.rand(batch, 10, generator=torch.Generator().manual_seed(1)) < 0.5
    answer[:, 0] = True
    seen: list[torch.Tensor] = []

    def model(shown: torch.Tensor) -> torch.Tensor:
        """Certain of the truth; at blanks it would guess 3 instead."""
        seen.append(shown)
        says = tokens if len(seen) % 2 == 0 else torch.full_like(tokens, 3)
        logits = torch.full((batch, 10, vocab), -30.0)
        return logits.scatter(2, says[..., None], 30.0).index_fill(2, torch.tensor([mask]), -torch.inf)

    generator = torch.Generator().manual_seed(2)
    losses = [edit_loss(model, tokens, answer, mask, generator).item() for _ in range(200)]
    assert max(losses) == 0.0  # of the second pass alone, which knows
    blanks, shown = torch.stack(seen[::2]) == mask, torch.stack(seen[1::2])
    assert not (blanks & ~answer).any()
    assert (shown == tokens)[~blanks.expand_as(shown)].all()
    guessed = blanks & (shown != mask)
    without = (guessed.sum(dim=2) == 0).double().mean().item()
    assert 0.5 < without < 0.75  # half of them, and where no blank was drawn
    assert (shown[guessed] == 3).double().mean().item() == pytest.approx(0.95 + 0.05 / 12, abs=0.01)
    assert (shown[guessed] != mask).all()


def test_edit_loss_counts_what_is_shown_too() -> None:
    """Nats of a model that says p(token) = 1/12 everywhere, and so is sure of no guess."""
    nothing = torch.zeros(512, 10, 13)
    nothing[..., 12] = -torch.inf
    tokens = torch.randint(0, 12, (512, 10), generator=torch.Generator().manual_seed(0))
    answer = torch.ones(512, 10, dtype=torch.bool)
    seen: list[torch.Tensor] = []

    def model(shown: torch.Tensor) -> torch.Tensor:
        seen.append(shown)
        return nothing

    losses = [
        edit_loss(model, tokens, answer, 12, torch.Generator().manual_seed(n)).item() for n in range(100)
    ]
    share_shown = (torch.stack(seen[1::2]) != 12).double().mean().item()
    # Blanks count in half of the sequences.
    assert np.mean(losses) == pytest.approx(math.log(12) * (0.5 + share_shown), rel=0.05)


def test_learning_rate_warms_up_stays_and_decays() -> None:
    recipe = Recipe(steps=1000, warmup_steps=100, decay_fraction=0.4)
    factor = [recipe.learning_rate_factor(step) for step in range(1000)]
    assert factor[0] == 0.01
    assert factor[99:601] == [1.0] * 502
    assert factor[800] == pytest.approx(0.5)
    assert factor[999] == pytest.approx(1 / 400)
