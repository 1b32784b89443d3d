"""The benchmark harness: what it times is right, what it cannot time it names, what it writes can be read."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

import pytest
import torch

from attn_sampler.backends import unavailable
from bench import __main__ as command
from bench import cases, end_to_end, harness, report, rivals, timing
from bench.rows import DECODE, PEER, QUICK, ROWS, Row

EFFORT = harness.Effort(seconds=0.001, least=3, slow=5.0, floor=1.0)
SMALL = Row("small", 2, 4, 2, 8, 24, 8, 16, layers=2, vocab=50)
CEILINGS = timing.Ceilings(bytes_per_s=1e9, operations_per_s=1e9)

needs_cpu_kernels = pytest.mark.skipif(
    unavailable("cpu") is not None, reason=f"backend cpu: {unavailable('cpu')}"
)


@pytest.fixture(autouse=True)
def _same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make(name, row=SMALL, backends=("reference",), dtype=torch.float32):
    return eager(cases.CASES[name].make(row, cases.Setting("cpu", dtype, backends)))


def eager(problem):
    """Without what is compiled, which takes seconds."""
    return problem._replace(candidates={n: c for n, c in problem.candidates.items() if not c.compiled})


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


# What is timed.


@pytest.mark.parametrize("name", cases.CASES)
def test_every_candidate_is_right(name):
    problem = make(name, row_of(name))
    assert "reference" in problem.candidates
    assert len(problem.candidates) > 1
    for candidate in problem.candidates.values():
        problem.reset()
        assert problem.error(candidate.run(), candidate.ours) < 1e-5


@needs_cpu_kernels
@pytest.mark.parametrize("name", cases.CASES)
def test_our_kernels_are_right_in_the_precision_that_is_timed(name):
    problem = make(name, row_of(name)._replace(n_rows=16), ("cpu",), torch.bfloat16)
    problem.reset()
    assert problem.error(problem.candidates["cpu"].run(), True) <= cases.OUR_TOLERANCE


def row_of(name):
    """SMALL as the case's rows are: all columns for those without a log-sum-exp, causal for the peer's."""
    if name not in ("peer", "all_columns"):
        return SMALL
    return SMALL._replace(columns=SMALL.n_keys, causal=name == "peer")


@pytest.mark.parametrize("name", ["columns", "peer", "all_columns", "block_scope", "confidence", "sampled"])
def test_a_wrong_result_is_seen(name):
    problem = make(name, row_of(name))
    result = problem.candidates["reference"].run()
    numbers = result if isinstance(result, torch.Tensor) else result[1]
    for change in (1.01, float("nan")):
        wrong = numbers * torch.where(torch.arange(numbers.shape[-1]) == 3, change, 1.0)
        assert not problem.error(wrong if numbers is result else (result[0], wrong), True) < 1e-4


def test_wrong_tokens_are_seen():
    greedy, sampled, step = (make(name) for name in ("confidence", "sampled", "step"))
    token_ids, confidence = greedy.candidates["reference"].run()
    with pytest.raises(cases.WrongResultError, match="not the most probable token"):
        greedy.error(((token_ids + 1) % 50, confidence), True)
    with pytest.raises(cases.WrongResultError, match="not the specified random stream"):
        sampled.error((token_ids, confidence), True)
    step.reset()
    result = step.candidates["reference"].run()
    result.tokens[0, -1] += 1
    with pytest.raises(cases.WrongResultError, match="not the tokens that were selected"):
        step.error(result, True)
    with pytest.raises(cases.WrongResultError, match="not the tokens that the rule selects"):
        step.error(result._replace(selected=~result.selected), True)


@pytest.mark.parametrize("causal", [False, True])
def test_tiles_change_nothing(causal, monkeypatch):
    row = Row("", 1, 6, 3, 40, 300, 7, 8)
    q, k = row.attention(torch.float64)
    whole = rivals.naive_scores(q, k, row.block, causal, per_head=True)
    # 300 keys x 2 heads a key head: 40 rows of 1 key head a tile, then all of it.
    tiled = rivals.tiled_scores(q, k, row.block, causal, per_head=True, tile_bytes=4 * 600 * 17)
    torch.testing.assert_close(tiled, whole)


def test_rows_are_those_of_the_benchmarks():
    assert len(DECODE) == 13
    assert {row.batch for row in PEER.values()} == {1, 4, 16, 64, 256}
    assert max(row.n_keys for row in PEER.values()) == 262144
    assert all(row.causal == (row.n_rows < row.n_keys) for row in PEER.values())
    assert set(QUICK) <= set(ROWS)
    assert len(ROWS) == sum(len({id(c.rows): c.rows}[id(c.rows)]) for c in unique_row_sets())


def unique_row_sets():
    """One case for each set of rows, so that no key is used twice."""
    seen = {}
    for case in cases.CASES.values():
        seen.setdefault(frozenset(case.rows), case)
    return [c for keys, c in seen.items() if not any(keys < other for other in seen)]


def test_costs_by_hand():
    # B 2, Hq 4, Hkv 2, M 8, N 24, C 8, D 16, V 50, 2 layers, 2 bytes an element.
    q, candidates, keys = 2 * 4 * 8 * 16 * 2, 2 * 2 * 8 * 16 * 2, 2 * 2 * 24 * 16 * 2
    scores = q + candidates + 4 * 2 * 4 * 8 + 4 * 2 * 8
    products = 2 * 2 * 4 * 8 * 8 * 16
    logits = 2 * 8 * (50 * 2 + 12)
    assert cases.columns_cost(SMALL, 2) == (scores, products)
    assert cases.step_cost(SMALL, 2) == (2 * scores + logits, 2 * products)
    assert cases.confidence_cost(SMALL, 2) == (logits, 0)
    everything = SMALL._replace(columns=24)
    assert cases.all_columns_cost(everything, 2) == (q + keys + 4 * 2 * 4 * 24, 3 * products)
    visible = sum(24 - 8 + i + 1 for i in range(8))  # keys that the causal rows see
    assert cases.all_columns_cost(everything._replace(causal=True), 2)[1] == 2 * 2 * 4 * visible * 16


# How it is timed.


def test_turns_end_when_each_has_enough():
    calls = []

    def sampler(name, ms):
        return lambda: calls.append(name) or ms

    samples = timing.take_turns({"a": sampler("a", 1.0), "b": sampler("b", 40.0)}, 0.01, 3)
    assert samples == {"a": [1.0] * 10, "b": [40.0] * 3}
    assert calls[:6] == ["a", "b"] * 3
    endless = timing.take_turns({"c": lambda: 0.0}, 1.0, 3)
    assert len(endless["c"]) == 100


def test_summary_is_median_and_quartiles():
    assert timing.summary([4.0, 1.0, 2.0, 3.0, 5.0]) == {
        "median_ms": 3.0,
        "q1_ms": 2.0,
        "q3_ms": 4.0,
        "samples": 5,
    }
    assert timing.summary([7.0])["samples"] == 1


def test_the_floor_is_the_slower_of_bytes_and_operations():
    assert CEILINGS.floor_ms(2e6, 1e6) == (2.0, "bytes")
    assert CEILINGS.floor_ms(2e6, 5e6) == (5.0, "operations")


def test_peak_memory_is_what_a_run_held_at_once():
    device = timing.CpuDevice(1)
    size = 64 << 20

    def run():
        torch.ones(size, dtype=torch.int8)  # freed before the next
        return torch.ones(size // 2, dtype=torch.int8).max()

    peak = device.observe(run).peak_bytes
    if peak is None:
        pytest.skip("this system does not let a process reset its peak resident size")
    assert 0.95 * size < peak < 1.1 * size
    assert device.observe(lambda: None).peak_bytes < 1 << 20


def test_cold_samples_reset_first_and_leave_the_reset_out():
    device = timing.CpuDevice(1)
    log = []
    figures = device.measure(
        {"a": lambda: log.append("a"), "b": lambda: log.append("b")},
        lambda: (log.append("reset"), time.sleep(0.01)),
        seconds=0.0,
        least=3,
    )
    assert log == ["reset", "a", "reset", "b"] * 3 + ["a"] * 11 + ["b"] * 11  # then the warm calls
    assert figures["a"]["samples"] == 3
    assert figures["a"]["median_ms"] < 5


# What gets no figure, and why.


def measure(candidates, error=lambda result, ours: 0.0, effort=EFFORT):
    problem = cases.Problem({n: cases.Candidate(*c) for n, c in candidates.items()}, error)
    return harness._measure(problem, timing.CpuDevice(1), effort)


def test_no_figure_from_a_wrong_result():
    def error(result, ours):
        cases.require(result != "garbage", "garbage came out")
        return result

    figures = measure(
        {
            "right": (lambda: 1e-6, True),
            "ours, rounded": (lambda: 1e-2, True),
            "rival, rounded": (lambda: 1e-2,),
            "rival, off": (lambda: 1.0,),
            "rival, broken": (lambda: "garbage",),
            "rival, raising": (lambda: {}["x"],),
            "rival, too large": (lambda: 0.0, False, 1e18),
        },
        error,
    )
    assert {n for n, f in figures.items() if "median_ms" in f} == {"right", "rival, rounded"}
    assert figures["ours, rounded"]["failed"] == "wrong result: relative error 0.01, tolerance 0.0001"
    assert figures["rival, off"]["failed"] == "wrong result: relative error 1, tolerance 0.03"
    assert figures["rival, broken"]["failed"] == "wrong result: garbage came out"
    assert figures["rival, raising"]["failed"] == "KeyError: 'x'"
    assert "it needs 931322574.6 GiB of" in figures["rival, too large"]["skipped"]


def test_a_slow_candidate_is_run_once():
    runs = []
    figures = measure(
        {"slow": (lambda: runs.append(time.sleep(0.02)),), "quick": (lambda: None,)},
        effort=EFFORT._replace(slow=0.01),
    )
    assert len(runs) == 1
    assert figures["slow"]["samples"] == 1
    assert figures["slow"]["median_ms"] >= 20
    assert figures["quick"]["samples"] >= 3


def test_rows_that_are_not_measured_say_why(monkeypatch):
    device = timing.CpuDevice(1)
    setting = cases.Setting("cpu", torch.bfloat16, ("reference",))
    heavy = harness.measure_row("peer", "p9", setting, [(device, CEILINGS)], EFFORT)
    assert [c["skipped"] for c in heavy] == ["its floor is 2199.0 s, the limit 1 s"]
    late = harness.measure_row("columns", "1", setting, [(device, CEILINGS)], EFFORT, "not started")
    assert late[0]["skipped"] == "not started"
    monkeypatch.setattr(timing.CpuDevice, "available_bytes", staticmethod(lambda: 1 << 20))
    large = harness.measure_row("columns", "1", setting, [(device, CEILINGS)], EFFORT)
    assert large[0]["skipped"] == "its tensors take 0.0 GiB of 0.0 free"


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    absent = harness.missing(["cpu"])
    assert "not timed unless asked for" in absent["reference"]
    assert "reference" not in harness.missing(["cpu", "reference"])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert harness.default_backends() == ["cuda", "cpu"]
    assert "interpreted" in harness.missing(["cuda", "cpu"])["triton"]
    monkeypatch.delenv("TRITON_INTERPRET")
    assert harness.default_backends() == ["cuda", "triton", "cpu"]
    for backend in ("cuda", "triton", "cpu"):
        assert absent.get(backend) == unavailable(backend)
    if not torch.cuda.is_available():
        assert absent["flash-colreduce"] == "its kernels need a GPU, and torch sees none"


def test_each_device_measures_its_own_backends_and_types(monkeypatch):
    """With a processor in the GPU's place."""

    class Stand(timing.CpuDevice):
        name = "cuda"

        def __init__(self):
            super().__init__(1)

        def activate(self):
            self.threads = None

        def ceilings(self, dtype):
            return CEILINGS

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(harness, "CudaDevice", Stand)
    monkeypatch.setattr(timing.CpuDevice, "ceilings", lambda self, dtype: CEILINGS)
    monkeypatch.setattr(harness, "Setting", lambda place, *rest: cases.Setting("cpu", *rest))
    for name in ("peer", "block_scope"):
        case = cases.CASES[name]
        quick = case._replace(
            rows={"x": row_of(name)},
            make=lambda row, setting, made=case.make: eager(made(row, setting)),
        )
        monkeypatch.setitem(cases.CASES, name, quick)
    seen = []
    measured = harness.run(
        ["block_scope", "peer"],
        ["x"],
        ["reference"],
        [1],
        torch.bfloat16,
        EFFORT,
        advance=lambda label, done, total: seen.append((label, done, total)),
    )
    assert [(c["device"], c["case"], c["dtype"]) for c in measured["cells"]] == [
        ("cpu", "block_scope", "bfloat16"),
        ("cpu", "peer", "bfloat16"),
        ("cuda", "block_scope", "bfloat16"),
        ("cuda", "peer", "float16"),
    ]
    assert all("median_ms" in f for c in measured["cells"] for f in c["figures"].values())
    assert [(d["device"], d["GB_per_s"], d["GFLOP_per_s"]) for d in measured["devices"]] == [
        ("cpu", 1.0, 1.0),
        ("cuda", 1.0, 1.0),
    ]
    assert seen[0] == ("cpu block_scope x", 0, 4)
    assert seen[-1] == ("", 4, 4)
    late = harness.run(["peer"], ["x"], ["reference"], [1], torch.bfloat16, EFFORT, seconds=-1)
    assert {c["skipped"] for c in late["cells"]} == {"not started: -1 seconds had passed"}


# What is written.


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


# The commands.


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


@pytest.mark.parametrize("part", ["tests", "bench"])
def test_gpu_check_stays_within_nine_minutes(part, tmp_path):
    script = Path(harness.ROOT) / "bench" / "gpu_check.sh"
    shown = subprocess.run(
        ["bash", script, tmp_path, part],
        env={"DRY_RUN": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert sum(int(seconds) for seconds in re.findall(r"at most (\d+) s", shown)) <= 9 * 60
    for word in (
        "memcheck racecheck synccheck initcheck" if part == "tests" else "end-to-end kernels"
    ).split():
        assert word.replace("kernels", "--backends cuda triton") in shown
    for test in re.findall(r"(tests/\S+\.py)::(\w+)", shown):
        assert f"def {test[1]}(" in (harness.ROOT / test[0]).read_text()
    wrong = subprocess.run(["bash", script, tmp_path], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "usage: bench/gpu_check.sh FOLDER tests|bench" in wrong.stderr
