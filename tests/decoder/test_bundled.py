"""The bundled tasks, their model, and the packaged weights with their card."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from attn_sampler import bundled
from attn_sampler.bundled import MODELS, TASKS, load_model, load_task
from attn_sampler.bundled.model import TinyMaskedLM, TinyMaskedLMConfig, load_weights, save_weights
from attn_sampler.bundled.tasks import (
    SUDOKU_PUZZLES,
    SUDOKU_PUZZLES_SEED,
    Addition,
    Score,
    Sudoku,
    is_held_out,
    make_sudoku_puzzles,
    read_sudoku_puzzles,
    solve_sudoku,
    write_sudoku_puzzles,
)
from attn_sampler.bundled.train import RECIPES, Recipe, evaluate, train

PACKAGE = Path(bundled.__file__).parent
TINY = TinyMaskedLMConfig(13, 12, hidden_size=32, num_layers=2, num_heads=2, ffn_size=48)

needs_muon = pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="training needs torch.optim.Muon, from torch 2.9 on"
)


# --- the split ------------------------------------------------------------------------------------------


def held_out_by_the_documented_rule(tokens: list[int]) -> bool:
    h = 0xCBF29CE484222325
    for token in tokens:
        h = (h ^ token) * 0x100000001B3 % 2**64
    h ^= h >> 32
    return h * 0x9E3779B97F4A7C15 % 2**64 >> 59 == 0


@pytest.mark.parametrize("name", TASKS)
def test_split_is_the_documented_hash(name: str) -> None:
    task = load_task(name)
    tokens = task._draw(3000, np.random.default_rng(0))
    held_out = is_held_out(tokens)
    assert held_out.tolist() == [held_out_by_the_documented_rule(row) for row in tokens.tolist()]
    assert 60 <= held_out.sum() <= 130  # 1 in 32 of 3000 is 94; five standard deviations either way


@pytest.mark.parametrize("name", TASKS)
def test_each_side_of_the_split_yields_only_its_own_sequences(name: str) -> None:
    task, rng = load_task(name), np.random.default_rng(1)
    tokens, answer = task.sample(20_000, rng)
    assert not is_held_out(tokens).any()
    assert task.check(tokens, tokens).all()
    assert answer.shape == tokens.shape
    assert answer.any(axis=1).all()
    tokens, _ = task.sample(50, rng, held_out=True)
    assert is_held_out(tokens).all()


@needs_muon
@pytest.mark.parametrize("name", TASKS)
def test_training_never_sees_a_held_out_sequence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task(name)
    seen = []

    def sample(n: int, rng: np.random.Generator, held_out: bool = False):  # type: ignore[no-untyped-def]
        batch = type(task).sample(task, n, rng, held_out)
        seen.append(batch[0])
        return batch

    monkeypatch.setattr(task, "sample", sample)
    config = dataclasses.replace(TINY, vocab_size=task.vocab_size, mask_token_id=task.mask_token_id)
    train(task, Recipe(steps=6, batch_size=256), config)
    assert len(seen) == 6
    assert not is_held_out(np.concatenate(seen)).any()
    _, solutions = task.problems(100)
    assert is_held_out(solutions).all()


# --- sudoku ---------------------------------------------------------------------------------------------


def count_solutions(cells: list[int], limit: int = 2) -> int:
    """An independent and plain solver: fill the first blank by every digit that nothing near forbids."""
    if -1 not in cells:
        return 1
    at = cells.index(-1)
    row, column = divmod(at, 6)
    near = {
        cells[6 * r + c]
        for r in range(6)
        for c in range(6)
        if r == row or c == column or (r // 2, c // 3) == (row // 2, column // 3)
    }
    found = 0
    for digit in set(range(6)) - near:
        found += count_solutions([*cells[:at], digit, *cells[at + 1 :]], limit - found)
        if found >= limit:
            break
    return found


def blanked(prompt: np.ndarray) -> list[list[int]]:
    return [[-1 if token == 6 else token for token in row] for row in prompt.tolist()]


def test_packaged_puzzles_have_one_solution_which_is_the_stated_one() -> None:
    prompt, solution = read_sudoku_puzzles(SUDOKU_PUZZLES)
    assert prompt.shape == solution.shape == (1000, 36)
    assert [solve_sudoku(cells) for cells in blanked(prompt)] == [[row] for row in solution.tolist()]
    assert is_held_out(solution).all()
    assert len(np.unique(prompt, axis=0)) == 1000
    assert all(count_solutions(cells) == 1 for cells in blanked(prompt[:60]))


def test_no_clue_of_a_packaged_puzzle_can_be_taken_away() -> None:
    prompt, _ = read_sudoku_puzzles(SUDOKU_PUZZLES)
    for cells in blanked(prompt[:25]):
        for clue in (i for i, digit in enumerate(cells) if digit >= 0):
            assert len(solve_sudoku([*cells[:clue], -1, *cells[clue + 1 :]])) == 2


def test_packaged_puzzles_are_those_of_the_stated_seed(tmp_path: Path) -> None:
    made = make_sudoku_puzzles(6, SUDOKU_PUZZLES_SEED)
    packaged = read_sudoku_puzzles(SUDOKU_PUZZLES)
    for a, b in zip(made, packaged, strict=True):
        np.testing.assert_array_equal(a, b[:6])
    write_sudoku_puzzles(tmp_path / "puzzles.txt", 6)
    assert SUDOKU_PUZZLES.read_text().startswith((tmp_path / "puzzles.txt").read_text())


def test_sudoku_check_rejects_every_broken_rule() -> None:
    task = Sudoku()
    prompt, solution = task.problems(20)
    assert task.check(solution, prompt).all()
    assert not task.check(prompt, prompt).any()  # blanks are no answer
    for row, given in zip(solution, prompt, strict=True):
        wrong = np.repeat(row[None], 36, axis=0)
        wrong[np.arange(36), np.arange(36)] = (row + 1) % 6  # one digit altered, once in every cell
        assert not task.check(wrong, np.repeat(given[None], 36, axis=0)).any()
    # Valid boards that contradict a given: the digits 1 and 2 exchanged everywhere.
    renamed = np.array([1, 0, 2, 3, 4, 5])[solution]
    assert task.check(renamed, np.full_like(prompt, 6)).all()
    assert not task.check(renamed, prompt).any()
    # Rows and columns that are right cannot make up for a box that is not.
    latin = (np.arange(6)[:, None] + np.arange(6)) % 6
    assert not task.check(latin.reshape(1, 36), np.full((1, 36), 6)).any()
    with pytest.raises(ValueError, match=r"sudoku: tokens .* must both be \[n, 36\]"):
        task.check(solution[:, :35], prompt)


def test_sudoku_boards_are_many() -> None:
    tokens, _ = Sudoku().sample(5000, np.random.default_rng(3))
    assert len(np.unique(tokens, axis=0)) > 4900


def test_sudoku_problems_depend_on_the_seed_alone() -> None:
    task = Sudoku()
    np.testing.assert_array_equal(task.problems(30, seed=5)[0], Sudoku().problems(30, seed=5)[0])
    assert (task.problems(30, seed=5)[0] != task.problems(30, seed=6)[0]).any()
    with pytest.raises(ValueError, match=r"n must be 0 to 1000 .* got 1001"):
        task.problems(1001)


# --- addition -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("digits", [1, 8, 17])
def test_addition_sequences_are_true_sums(digits: int) -> None:
    task = Addition(digits)
    tokens, answer = task.sample(500, np.random.default_rng(0))
    for row in tokens:
        first, second, total = re.split(r"[+=]", task.format(row))
        assert (len(first), len(second), len(total)) == (digits, digits, digits + 1)
        assert int(first) + int(second) == int(total)
    assert task.check(tokens, tokens).all()
    assert not answer[:, [digits, 2 * digits + 1]].any()  # the signs are never blanked


@pytest.mark.parametrize(
    ("blank", "places"), [("sum", range(18, 27)), ("first", range(8)), ("second", range(9, 17))]
)
def test_addition_problems_blank_one_number(blank: str, places: range) -> None:
    task = Addition()
    prompt, solution = task.problems(200, seed=4, blank=blank)
    expected = np.zeros((200, 27), bool)
    expected[:, list(places)] = True
    np.testing.assert_array_equal(prompt == task.mask_token_id, expected)
    np.testing.assert_array_equal(np.where(expected, solution, prompt), solution)
    assert task.check(solution, prompt).all()
    assert is_held_out(solution).all()


def test_addition_check_rejects_wrong_answers() -> None:
    task = Addition()
    prompt, solution = task.problems(50)
    for place in range(18, 27):
        wrong = solution.copy()
        wrong[:, place] = (wrong[:, place] + 1) % 10
        assert not task.check(wrong, prompt).any()
    sign = solution.copy()
    sign[:, 20] = 10
    assert not task.check(sign, prompt).any()
    assert not task.check(prompt, prompt).any()
    with pytest.raises(ValueError, match="blank must be one of sum, first, second, got 'product'"):
        task.problems(1, blank="product")
    with pytest.raises(ValueError, match="digits must be 1 to 17"):
        Addition(18)


def test_unknown_task_is_named() -> None:
    for kind, load in (("task", load_task), ("model", load_model)):
        with pytest.raises(ValueError, match=f"unknown {kind} 'chess': accepted are 'sudoku', 'addition'"):
            load("chess")


def test_format_prints_a_board_and_a_line() -> None:
    prompt, _ = Sudoku().problems(1)
    lines = Sudoku().format(prompt[0]).split("\n")
    assert [line.split() for line in lines] == [
        ["·" if token == 6 else str(token + 1) for token in row] for row in prompt[0].reshape(6, 6).tolist()
    ]
    assert Addition(2).format([1, 2, 10, 3, 4, 11, 12, 12, 6]) == "12+34=··6"


# --- the score ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solved", "total"), [(0, 10), (5, 10), (10, 10), (489, 500)])
def test_score_interval_is_wilsons(solved: int, total: int) -> None:
    score = Score.of(np.arange(total) < solved)
    assert (score.solved, score.total) == (solved, total)
    low, high = score.interval
    assert 0.0 <= low < high <= 1.0
    assert low - 1e-9 <= score.rate <= high + 1e-9
    # Wilson's bounds are the rates from which the observed one is 1.96 standard errors away.
    for bound in (low, high):
        distance = 1.959964 * math.sqrt(max(bound * (1 - bound), 0.0) / total)
        assert abs(score.rate - bound) == pytest.approx(distance, abs=1e-6)
    assert str(score).startswith(f"{solved}/{total} = {solved / total:.1%} (95 % interval ")


# --- the model ------------------------------------------------------------------------------------------


def random_model(config: TinyMaskedLMConfig = TINY, seed: int = 0) -> TinyMaskedLM:
    torch.manual_seed(seed)
    model = TinyMaskedLM(config)
    with torch.no_grad():
        for parameter in model.parameters():  # away from the small initial values, norms included
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def written_out_logits(model: TinyMaskedLM, tokens: list[int]) -> torch.Tensor:
    """The network for one sequence in float64, rotary positions as complex numbers, softmax spelt out."""
    p = {name: value.double() for name, value in model.state_dict().items()}
    config = model.config
    length, heads, half = len(tokens), config.num_heads, config.head_dim // 2

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(dim=-1, keepdim=True) + config.norm_eps).sqrt() * weight

    frequency = torch.tensor([config.rope_base ** (-i / half) for i in range(half)], dtype=torch.float64)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        turned = torch.complex(x[:, :half].contiguous(), x[:, half:].contiguous()) * turn
        return torch.cat([turned.real, turned.imag], dim=1)

    x = p["embedding.weight"][tokens]
    for i in range(config.num_layers):
        layer = f"blocks.{i}."
        q, k, v = (norm(x, p[layer + "attention_norm.weight"]) @ p[layer + "attention.qkv.weight"].T).chunk(
            3, dim=1
        )
        mixed = []
        for h in range(heads):
            span = slice(h * 2 * half, (h + 1) * 2 * half)
            weights = torch.exp(rotate(q[:, span]) @ rotate(k[:, span]).T / math.sqrt(2 * half))
            mixed.append(weights / weights.sum(dim=1, keepdim=True) @ v[:, span])
        x = x + torch.cat(mixed, dim=1) @ p[layer + "attention.out.weight"].T
        gate, up = (norm(x, p[layer + "ffn_norm.weight"]) @ p[layer + "ffn.gate_up.weight"].T).chunk(2, dim=1)
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ p[layer + "ffn.down.weight"].T
    return norm(x, p["final_norm.weight"]) @ p["head.weight"].T


def test_model_is_the_network_written_out() -> None:
    model = random_model()
    tokens = [3, 12, 0, 7, 12, 12, 11, 5, 1, 10, 2]
    logits = model(torch.tensor([tokens]))[0]
    expected = written_out_logits(model, tokens)
    assert logits.dtype == torch.float32
    assert (logits[:, 12] == -torch.inf).all()  # the mask token is never predicted
    torch.testing.assert_close(logits[:, :12].double(), expected[:, :12], rtol=1e-4, atol=1e-4)


def test_positions_are_relative_and_matter() -> None:
    model = random_model()
    tokens = torch.tensor([[3, 12, 0, 7, 12, 5]])
    swapped = tokens[:, [3, 1, 2, 0, 4, 5]]
    assert (model(tokens) - model(swapped))[0, 1, :12].abs().max() > 1e-2


def test_padding_on_either_side_changes_nothing() -> None:
    model = random_model()
    tokens = torch.tensor([[3, 12, 0, 7, 12, 5]])
    alone = model(tokens)
    for left, right in ((4, 0), (0, 4), (3, 2)):
        padded = torch.nn.functional.pad(tokens, (left, right), value=9)
        mask = torch.nn.functional.pad(torch.ones_like(tokens), (left, right)).bool()
        with_padding = model(padded, attention_mask=mask)[:, left : left + 6]
        torch.testing.assert_close(with_padding, alone, rtol=1e-4, atol=1e-4)
    both = model(tokens.expand(2, 6), attention_mask=torch.tensor([[True] * 6, [False] * 6]))
    torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-4)
    assert both[1, :, :12].isfinite().all()  # a sequence that is padding only


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"mask_token_id": 13}, "mask_token_id 13 is outside the vocabulary of 13"),
        ({"mask_token_id": -1}, "mask_token_id -1 is outside"),
        ({"hidden_size": 30}, r"hidden_size 30 must be a multiple of 2 \* num_heads \(4\)"),
    ],
)
def test_config_errors_name_the_size(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **sizes)


def test_weights_survive_the_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = random_model()
    path = tmp_path / "model.safetensors"
    save_weights(model, path, {"task": "none"})
    loaded = load_weights(path)
    assert loaded.config == model.config
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half().float()), name
    with safe_open(str(path), framework="pt") as file:
        assert file.metadata()["task"] == "none"
    save_file({"x": torch.zeros(1)}, str(path))
    with pytest.raises(ValueError, match=r"model\.safetensors holds no 'config' metadata"):
        load_weights(path)


# --- training -------------------------------------------------------------------------------------------


# --- the packaged weights -------------------------------------------------------------------------------


def test_weights_are_float16_and_small() -> None:
    files = sorted(PACKAGE.glob("*.safetensors"))
    assert sorted(file.stem for file in files) == sorted(MODELS)
    assert sum(file.stat().st_size for file in files) <= 3_000_000
    for file in files:
        with safe_open(str(file), framework="pt") as weights:
            names = weights.keys()
            assert {weights.get_tensor(name).dtype for name in names} == {torch.float16}


@pytest.mark.parametrize("name", MODELS)
def test_weights_solve_held_out_problems(name: str) -> None:
    model, task = load_model(name), load_task(name.removesuffix("-edits"))
    prompt, _ = task.problems(64, seed=1)
    assert evaluate(model, task, prompt).rate >= 0.9
    # What makes it the order that matters: every blank at once solves next to nothing of a sudoku.
    if task.name == "sudoku":
        at_once = model(torch.from_numpy(prompt)).argmax(dim=-1).numpy()
        filled = np.where(prompt == task.mask_token_id, at_once, prompt)
        assert task.check(filled, prompt).mean() < 0.1


@pytest.mark.parametrize(
    ("name", "finds"), [("sudoku-edits", True), ("addition-edits", True), ("addition", False)]
)
def test_models_of_edits_know_the_wrong_token_of_an_answer(name: str, finds: bool) -> None:
    task = load_task(name.removesuffix("-edits"))
    tokens = torch.from_numpy(task.problems(200, seed=2)[1])
    at = torch.randint(task.length - 9, task.length, (200, 1), generator=torch.Generator().manual_seed(0))
    tokens.scatter_(1, at, (tokens.gather(1, at) + 1) % 6)
    p = load_model(name)(tokens).softmax(dim=2).gather(2, tokens[..., None]).squeeze(2)[:, -9:]
    found = (p.argmin(dim=1) == at.squeeze(1) - (task.length - 9)).double().mean().item()
    assert (found > 0.95) == finds
    assert (found < 0.3) != finds


@pytest.mark.parametrize("name", MODELS)
def test_card_states_what_was_run_and_measured(name: str) -> None:
    card = (PACKAGE / "MODEL_CARD.md").read_text(encoding="utf-8")
    with safe_open(str(PACKAGE / f"{name}.safetensors"), framework="pt") as file:
        metadata = file.metadata()
    recipe = dataclasses.asdict(RECIPES[name])
    if not recipe["edits"]:
        del recipe["edits"]  # those files are older than that
    assert metadata["recipe"] == str(recipe)  # its command trains these weights
    assert json.loads(metadata["config"])["hidden_size"] == 96
    recipe = RECIPES[name]
    row = re.search(rf"^\| {name} \| (\d+) \| (\d+) \| (\d+) \| ([\d,]+) \|", card, re.MULTILINE)
    assert row is not None, "no recipe row"
    parameters = sum(p.numel() for p in load_model(name).parameters())
    stated = [int(cell.replace(",", "")) for cell in row.groups()]
    assert stated == [recipe.steps, recipe.batch_size, recipe.seed, parameters]
    command = name.replace("-edits", " --edits")
    assert f"python -m attn_sampler.bundled.train {command} --out {name}.safetensors --compile" in card

    score = re.search(rf"^\| {name}[^|]*\| confidence \| (\d+)/500 \|", card, re.MULTILINE)
    assert score is not None, "no score row"
    task = load_task(name.removesuffix("-edits"))
    measured = evaluate(load_model(name), task, task.problems(500)[0])
    # The last bits of a forward pass differ between processors; a rare tie may fall the other way.
    assert abs(measured.solved - int(score[1])) <= 5
