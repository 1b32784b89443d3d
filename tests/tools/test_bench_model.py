"""The model of a step's time on a GPU: its bytes and blocks by hand, its terms, what stands beside them."""

from __future__ import annotations

import json
import math

import pytest

from bench import __main__ as command
from bench import model, report
from bench.rows import DECODE, Row


def test_bytes_and_floors_by_hand():
    """Queries with their log-sum-exp, the candidates' keys, scores; and the logits with their answers."""
    first = model.predict("1", DECODE["1"])
    layer = 32 * 384 * (128 * 2 + 4) + 32 * 32 * 128 * 2 + 4 * 32
    assert first.n_bytes == 32 * layer + 32 * (126464 * 2 + 12) == 118_722_944
    assert math.isclose(first.floor, 118.722944 / 4.3)
    tenth = model.predict("10", DECODE["10"])
    assert tenth.n_bytes == 28 * (28 * 8 * 260 + 4 * 8 * 256 + 32) + 8 * (152064 * 2 + 12) == 4_294_112
    assert math.isclose(tenth.floor, 4.294112 / 4.3)


def test_units_by_hand():
    """Row 10: 56 rows of seven heads are a step; 28 layers of 4 lists, each a unit, each tile adds up 4."""
    tenth = model.plan(DECODE["10"])
    assert (tenth.score_units, tenth.members, tenth.unit_steps, tenth.steps) == (28 * 4, 4, 1, 4)
    # 8 positions of 19008 groups of eight tokens, in units of two turns of 512.
    assert (tenth.logit_units, tenth.splits, tenth.turns) == (8 * 19, 19, 2)
    assert (tenth.blocks, tenth.resident, tenth.tile, tenth.tiles) == (8 * 19 + 28 * 4, 4, 8, 1)
    # 256 columns are four tiles of 64, whose keys of 512 elements leave room for three blocks.
    twelfth = model.plan(DECODE["12"])
    assert (twelfth.resident, twelfth.tile, twelfth.tiles) == (3, 64, 4)
    assert twelfth.steps == twelfth.members == 4 * (2 * 256 // 64)
    assert twelfth.score_units == 5 * 4 * twelfth.members
    assert twelfth.blocks == 3 * 132
    # Lists of four rows stand four side by side.
    eleventh = model.plan(DECODE["11"])
    assert (eleventh.steps, eleventh.score_units) == (8 // 4, 64 * 36 * 2)


def test_a_unit_depends_on_one_sequence_alone():
    row = DECODE["4"]
    for other, gpu in ((row._replace(batch=1), model.H200), (row, model.H200._replace(processors=78))):
        p, q = model.plan(row), model.plan(other, gpu)
        for name in ("splits", "turns", "members", "unit_steps", "steps"):
            assert getattr(p, name) == getattr(q, name), name


@pytest.mark.parametrize("name", DECODE)
def test_shares_are_all_of_the_work_and_equal(name):
    row, p = DECODE[name], model.plan(DECODE[name])
    shares = model.shares(row, p)
    assert len(shares) == p.blocks
    assert sum(s.score_units for s in shares) == p.score_units
    assert sum(s.steps for s in shares) == row.batch * p.tiles * row.layers * p.steps
    assert sum(s.logit_units for s in shares) == p.logit_units
    assert sum(s.groups for s in shares) == row.batch * row.columns * -(-row.vocab // 8)
    # Of whole units: blocks of one kind differ by one unit at the most, and a score less is logits more.
    scores = [s.score_units for s in shares]
    assert max(scores) - min(scores) <= 1
    assert scores == sorted(scores, reverse=True)
    for kind in set(scores):
        logits = [s.logit_units for s in shares if s.score_units == kind]
        assert max(logits) - min(logits) <= 1


@pytest.mark.parametrize("name", DECODE)
def test_the_terms_add_up(name):
    p = model.predict(name, DECODE[name])
    longest = max(p.memory, p.issue, p.exponentials, p.products)
    assert math.isclose(p.total, p.start + max(p.rounds, p.imbalance * longest) + p.tail)
    assert getattr(p, p.bound) == (p.rounds if p.bound == "rounds" else longest)
    assert p.memory == p.floor <= p.body < p.total
    assert 1 <= p.imbalance < 1.5
    assert math.isclose(p.waves, p.plan.blocks / 132 / p.plan.resident)
    assert p.waves <= 1
    faster = model.predict(name, DECODE[name], model.H200._replace(clock_hz=2e9))
    assert faster.issue < p.issue
    assert faster.memory == p.memory
    peaked, flat = (model.predict(name, DECODE[name], noise=share) for share in (0.25, 1.0))
    logits = DECODE[name].batch * DECODE[name].columns * -(-DECODE[name].vocab // 8) * 8
    assert math.isclose(
        flat.warp_instructions - peaked.warp_instructions, 0.75 * logits / 4 * model.NOISE_INSTRUCTIONS / 32
    )
    assert p.total <= peaked.total <= flat.total


def test_targets_and_why_they_are_missed():
    assert model.target("1", 20.0) == 25.0
    assert model.target("13", 4.0) == 8.0
    assert model.target("10", 1.0) == 8.0
    assert model.target("3", 20.0) is None
    lines = model.verdict().splitlines()
    missed = {line.split(":")[0].removeprefix("- Row ") for line in lines if line.startswith("- Row ")}
    within = set(lines[0].removeprefix("- Within: rows ").rstrip(".").split(", "))
    assert within | missed == {"1", "2", "4", "6", "8", "10", "11", "12", "13"}
    assert not within & missed
    for name in missed:
        p = model.predict(name, DECODE[name])
        assert p.total > model.target(name, p.floor)


def test_rows_without_columns_or_vocabulary():
    row = Row("none", 1, 8, 2, 16, 64, 0, 64, 2, 1000)
    nothing = model.predict("none", row)
    assert (nothing.n_bytes, nothing.plan.blocks, nothing.total) == (0, 0, model.LAUNCH_US)
    scores = model.predict("scores", row._replace(columns=8, vocab=0))
    assert scores.plan.logit_units == 0 < scores.plan.score_units
    assert scores.total > nothing.total
    no_layers = model.predict("logits", row._replace(columns=8, layers=0))
    assert no_layers.plan.score_units == 0 < no_layers.plan.logit_units


def test_more_of_anything_takes_longer():
    row = DECODE["4"]
    least = model.predict("", row)
    for more in ({"vocab": 2 * row.vocab}, {"layers": 64}, {"batch": 16}, {"headdim": 256}):
        other = model.predict("", row._replace(**more))
        assert other.body > least.body, more
        assert other.warp_instructions > least.warp_instructions


def result(cells):
    return {"cells": cells}


def test_measured_times_stand_beside(tmp_path, capsys):
    cells = [
        {
            "case": "step",
            "row": "1",
            "device": "cuda",
            "figures": {"cuda": {"median_ms": 0.05, "warm_ms": 0.04}},
        },
        {"case": "step", "row": "2", "device": "cuda", "figures": {"cuda": {"failed": "wrong"}}},
        {"case": "step", "row": "3", "device": "cpu", "figures": {"cpu": {"median_ms": 1.0}}},
        {"case": "columns", "row": "4", "device": "cuda", "figures": {"cuda": {"median_ms": 0.01}}},
        {"case": "step", "row": "5", "device": "cuda", "skipped": "late"},
    ]
    assert model.measured([result(cells)]) == {"1": {"cold": 50.0, "warm": 40.0}}
    lines = model.page([result(cells)]).splitlines()
    (line,) = (x for x in lines if x.startswith("| 1: "))
    ratio = 50 / model.predict("1", DECODE["1"]).total
    assert line.endswith(f"| 50.0 | 40.0 | {ratio:.2f} |")
    assert not any("Nothing here is measured" in x for x in lines)
    (line,) = (x for x in lines if x.startswith("| 2: "))
    assert line.endswith("| - | - | - |")


def test_the_page_is_what_the_model_says(tmp_path, capsys):
    path = tmp_path / "page.md"
    assert command.main(["model", "--output", str(path)]) == 0
    assert path.read_text() == (report.RESULTS / "model.md").read_text()
    assert "**Nothing here is measured**" in path.read_text()
    capsys.readouterr()
    assert command.main(["model", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [row["row"] for row in shown["predicted_us"]] == list(DECODE)
    assert shown["predicted_us"][0]["total"] == model.predict("1", DECODE["1"]).total
    assert shown["measured_us"] == {}
