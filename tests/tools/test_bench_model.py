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


def test_blocks_by_hand():
    # 56 rows of seven heads are a step; 28 layers of 4 lists, each a block's own. 74 splits of 257 groups.
    assert model.plan(DECODE["10"]) == model.Plan(4, 8 * 74, 74, 112, 112, 8, 1, 112)
    # 256 columns are four tiles of 64, whose keys of 512 elements leave room for three blocks.
    twelfth = model.plan(DECODE["12"])
    assert (twelfth.resident, twelfth.tile, twelfth.tiles) == (3, 64, 4)
    assert twelfth.steps == 5 * 4 * (2 * 256 // 64)
    assert twelfth.score_blocks == 4 * twelfth.members
    # Lists of four rows stand four side by side.
    eleventh = model.plan(DECODE["11"])
    assert eleventh.steps == 36 * 8 // 4


@pytest.mark.parametrize("name", DECODE)
def test_the_terms_add_up(name):
    p = model.predict(name, DECODE[name])
    longest = max(p.memory, p.issue, p.exponentials, p.products)
    assert math.isclose(p.total, p.start + p.imbalance * longest + p.tail)
    assert getattr(p, p.bound) == longest
    assert p.memory == p.floor <= p.body < p.total
    assert 1 <= p.imbalance < 2
    assert p.plan.splits <= 128
    assert math.isclose(p.waves, p.plan.blocks / 132 / p.plan.resident)
    faster = model.predict(name, DECODE[name], model.H200._replace(clock_hz=2e9))
    assert faster.issue < p.issue
    assert faster.memory == p.memory


def test_rows_without_columns_or_vocabulary():
    row = Row("none", 1, 8, 2, 16, 64, 0, 64, 2, 1000)
    nothing = model.predict("none", row)
    assert (nothing.n_bytes, nothing.plan.blocks, nothing.total) == (0, 0, model.LAUNCH_US)
    scores = model.predict("scores", row._replace(columns=8, vocab=0))
    assert scores.plan.confidence_blocks == 0 < scores.plan.score_blocks
    assert scores.total > nothing.total
    no_layers = model.predict("logits", row._replace(columns=8, layers=0))
    assert no_layers.plan.score_blocks == 0 < no_layers.plan.confidence_blocks


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
