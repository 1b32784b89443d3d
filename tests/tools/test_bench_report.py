"""The benchmark's pages and command line: what is written can be read, what cannot be run is named."""

from __future__ import annotations

import json
import re

import pytest
import torch
from test_bench import _same_threads, needs_cpu_kernels  # noqa: F401  (for all tests here)

from bench import __main__ as command
from bench import end_to_end, harness, report, timing
from bench.rows import ROWS


def cell(case="columns", row="1", threads=1, **figures):
    """A cell as the harness writes it; a figure is a median or a reason."""
    made = {
        name: {"ours": name in ("cpu", "cuda")}
        | (
            {"failed": f}
            if isinstance(f, str)
            else timing.summary([f * 0.8, f, f, f * 1.2]) | {"peak_bytes": 5000}
        )
        for name, f in figures.items()
    }
    return {
        "case": case,
        "row": row,
        "shape": ROWS[row]._asdict(),
        "device": "cpu",
        "threads": threads,
        "dtype": "bfloat16",
        "bytes": 2e6,
        "operations": 3e9,
        "floor_ms": 0.5,
        "bound": "bytes",
        "figures": made,
    }


def results(*cells, machine="A Machine (R)", sources=None, load=0.2):
    return {
        "command": "python -m bench",
        "dtype": "bfloat16",
        "environment": {
            "machine": machine,
            "date": "2026-01-02",
            "commit": "abc1234",
            "torch": "2.13.0",
            "omp_wait_policy": "PASSIVE",
            "sources": sources or {"cpu": harness.digest("cpu")},
            "cpu": {"cores": 2},
        },
        "load_average": load,
        "missing": {"cuda": "there is no CUDA device"},
        "devices": [
            {"device": "cpu", "threads": 1, "GB_per_s": 40.0, "GFLOP_per_s": 500.0, "cold": "flushed"}
        ],
        "cells": list(cells),
    }


def test_table_of_ratios_and_reasons():
    text = report.table(
        [
            cell(row="1", cpu=1.0, naive=20.0, tiled=0.5),
            cell(row="2", cpu="wrong result: off", naive=3.0),
            cell(row="3") | {"skipped": "its floor is too high"},
        ]
    )
    first, second = text.splitlines()[2:4]
    assert text.startswith("| row | shape | floor | cpu | share of floor | naive | tiled |")
    assert first == (
        "| 1 | LLaDA-8B, no cache, zero-shot | 0.5 ms (2 MB) | 1 ms ±5%, +5 kB | 50% "
        "| 20 ms ±5%, **20.0x**, +5 kB | 0.5 ms ±5%, **0.5x**, +5 kB |"
    )
    assert second == "| 2 | LLaDA-8B, no cache, 5-shot + 256 | 0.5 ms (2 MB) | - | - | 3 ms ±5%, +5 kB |  |"
    assert "- row 2 cpu: wrong result: off" in text
    assert "- row 3: its floor is too high" in text


def test_results_page_marks_stale_tables(tmp_path):
    (tmp_path / "findings.md").write_text("We win here.\n")
    fresh, old = tmp_path / "fresh", tmp_path / "old"
    for folder, sources in ((fresh, None), (old, {"cpu": "another"})):
        folder.mkdir()
        load = 5.0 if folder is old else 0.2
        made = results(cell(cpu=1.0), machine=folder.name, sources=sources, load=load)
        (folder / "2026-01-02.json").write_text(json.dumps(made))
        (folder / "2026-01-03-quick.json").write_text("only the newest full run is read")
    (fresh / "share_of_floor.png").write_bytes(b"")
    (tmp_path / "quality").mkdir()
    for name in ("rules.md", "frontier.png"):
        (tmp_path / "quality" / name).touch()
    page = report.write_results_page(tmp_path / "").read_text()
    assert "We win here." in page
    assert f"- [rules]({tmp_path.name}/quality/rules.md)" in page
    assert f"![frontier.png]({tmp_path.name}/quality/frontier.png)" in page
    of_fresh, of_old = page.split("## fresh")[1].split("## old")
    caption = "`python -m bench`, 2026-01-02, commit abc1234, "
    assert caption + "fresh." in of_fresh
    assert "Stale" not in of_fresh
    assert "busy" not in of_fresh
    assert "**On a busy machine (load average 5.0): read the ratios only.**" in of_old
    assert f"![share_of_floor.png]({tmp_path.name}/fresh/share_of_floor.png)" in of_fresh
    assert caption + "old. **Stale: the kernels' sources have changed since.**" in of_old
    assert "- cuda: there is no CUDA device" in of_old


def test_digest_follows_the_sources(tmp_path):
    folder = tmp_path / "csrc" / "cpu"
    folder.mkdir(parents=True)
    (folder / "a.cpp").write_text("1")
    first = harness.digest("cpu", tmp_path)
    (folder / "notes.txt").write_text("not a source")
    assert harness.digest("cpu", tmp_path) == first
    (folder / "a.cpp").write_text("2")
    assert harness.digest("cpu", tmp_path) != first
    assert harness.digest("cuda") != harness.digest("cpu")


def test_plots(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install .[plot]")
    sweep = [cell("by_keys", n, cpu=1.0, naive=float(i + 2)) for i, n in enumerate(("N=1024", "N=4096"))]
    written = report.plot(results(*sweep, cell(cpu=1.0), cell("step", "2", cpu="failed")), tmp_path)
    assert written == ["time_by_keys.png", "share_of_floor.png"]
    for name in written:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_regressions(tmp_path, capsys):
    old = results(
        cell(cpu=1.0, naive=10.0), cell(row="2", cpu=1.0), cell(row="3", cpu=1.0), cell(row="4", cpu=1.0)
    )
    noisy = cell(row="2", cpu=1.3)
    noisy["figures"]["cpu"]["q1_ms"] = 0.8  # the ranges overlap: noise
    new = results(cell(cpu=1.3, naive=11.0), noisy, cell(row="3", cpu="wrong result"), cell(row="4", cpu=1.1))
    changes, rivals_moved = report.compare(old, new, 1.15)
    assert [c.what for c in changes if c.regressed] == [
        "columns 1 cpu 1 bfloat16 cpu",
        "columns 3 cpu 1 bfloat16 cpu",
    ]
    assert rivals_moved == pytest.approx(1.1)
    paths = [tmp_path / "old.json", tmp_path / "new.json", tmp_path / "none.json"]
    for path, content in zip(paths, (old, new, results()), strict=True):
        path.write_text(json.dumps(content))
    assert command.main(["compare", str(paths[0]), str(paths[1])]) == 1
    shown = capsys.readouterr().out
    assert "2 of 4 figures regressed beyond 1.15 times" in shown
    assert "the rivals' own: 1.10 times" in shown
    assert "regressed: columns 1 cpu 1 bfloat16 cpu: 1 ms, now 1.3 ms, 1.30 times" in shown
    assert "regressed: columns 3 cpu 1 bfloat16 cpu: 1 ms, now wrong result" in shown
    assert command.main(["compare", str(paths[0]), str(paths[0])]) == 0
    assert command.main(["compare", str(paths[0]), str(paths[2])]) == 2


@needs_cpu_kernels
def test_a_run_from_the_command_line(tmp_path, capsys):
    arguments = [
        "--quick",
        "--rows",
        "B=1",
        "--threads",
        "1",
        "--dtype",
        "float32",
        "--output",
        str(tmp_path),
    ]
    assert command.main(arguments) == 0
    assert "not measured: reference" in capsys.readouterr().out
    # Neither in place of the results of all rows, nor with pictures.
    path, _ = sorted(tmp_path.glob("*/*"))
    assert path.name.endswith("-quick-part.json")
    assert report.newest(path.parent) is None
    written = json.loads(path.read_text())
    assert written["command"] == "python -m bench " + " ".join(arguments)
    (made,) = written["cells"]
    assert (made["case"], made["row"], made["dtype"]) == ("by_batch", "B=1", "float32")
    assert set(made["figures"]) == {"cpu", "block matmul", "naive, no LSE", "tiled, no LSE"}
    assert all(f["median_ms"] > 0 for f in made["figures"].values())
    assert made["figures"]["naive, no LSE"]["peak_bytes"] is None or (
        made["figures"]["naive, no LSE"]["peak_bytes"] >= 32 * 32 * 1280 * 4
    )
    assert "| B=1 | row 4 at B=1 |" in path.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    "arguments", [["--rows", "99"], ["--backends", "gpu"], ["--cases", "all"], ["compare", "x"]]
)
def test_command_line_errors(arguments):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2


def test_a_row_without_a_case_is_an_error(capsys):
    assert command.main(["--cases", "by_keys", "--rows", "1", "--backends", "reference"]) == 2
    assert "nothing to measure" in capsys.readouterr().out


def test_end_to_end():
    made = end_to_end.run("cpu", torch.float32, brief=True)
    assert len(made["variants"]) == 5
    for variant in made["variants"]:
        assert variant["tokens_per_s"] == pytest.approx(1e3 * 2 / variant["step_ms"])
        assert variant["parts_ms"]["forward"] > 0
    plain, whole = made["variants"][1], made["variants"][3]
    assert plain["parts_ms"]["capture"] is None
    assert whole["parts_ms"]["scores"] > 0
    assert whole["parts_ms"]["selection"] is None
    table = report.end_to_end_table(made)
    assert table.startswith(
        "| decoding | tokens/s | step | forward | capture | scores | confidence | selection |"
    )
    assert table.count("\n| ") == 5


@torch.no_grad()
def test_all_ways_to_take_attention_commit_the_same():
    decoder = end_to_end.Decoder(end_to_end.SHAPES["brief"], "cpu", torch.float32)
    filled = []
    for way in (decoder.ours, decoder.ours_in_parts, decoder.eager):
        tokens = decoder.start.clone()
        for _ in range(4):
            way(tokens, end_to_end.Stopwatch("cpu", waits=True))
        assert int((tokens[:, decoder.block] != end_to_end.MASK).sum()) == 2 * 4
        filled.append(tokens)
    assert torch.equal(filled[0], filled[1])
    assert torch.equal(filled[0], filled[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"environment": {}}, "expected the key 'machine', which is missing"),
        ({"cells": [1]}, r"expected an object, got 1"),
        ({"cells": [cell(threads=[])]}, "expected an integer or null, got"),
        ({"cells": [{**cell(), "figures": {"cpu": {"ours": True, "median_ms": 0.0}}}]}, "expected a figure"),
    ],
)
def test_what_is_no_result_file_is_not_compared(change, message, tmp_path, capsys):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(results(cell(cpu=1.0))))
    bad.write_text(json.dumps(results(cell(cpu=1.0)) | change))
    with pytest.raises(SystemExit, match="2"):
        command.main(["compare", str(good), str(bad)])
    assert re.search(rf"error: .*bad\.json is no result file: .*{message}", capsys.readouterr().err)
    assert command.main(["compare", str(good), str(tmp_path / "missing.json")]) == 1
    assert "No such file or directory" in capsys.readouterr().err
