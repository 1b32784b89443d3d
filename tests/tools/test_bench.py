"""The benchmark harness: what it times is right, what it cannot time it names."""

from __future__ import annotations

import time

import pytest
import torch

from attn_sampler.backends import unavailable
from bench import cases, harness, problems, rivals, timing
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
    return eager(cases.CASES[name].make(row, problems.Setting("cpu", dtype, backends)))


def eager(problem):
    """Without what is compiled, which takes seconds."""
    return problem._replace(candidates={n: c for n, c in problem.candidates.items() if not c.compiled})


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
    assert problem.error(problem.candidates["cpu"].run(), True) <= problems.OUR_TOLERANCE


def row_of(name):
    """SMALL as the case's rows are: all columns for those without a log-sum-exp, causal for the peer's."""
    if name not in ("peer", "all_columns", "paged_all", "top_columns", "snapkv", "observed"):
        return SMALL
    causal = name in ("peer", "snapkv", "observed")
    return SMALL._replace(columns=SMALL.n_keys, causal=causal)


@pytest.mark.parametrize(
    "name", ["columns", "peer", "all_columns", "block_scope", "confidence", "sampled", "truncated"]
)
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
    with pytest.raises(problems.WrongResultError, match="not the most probable token"):
        greedy.error(((token_ids + 1) % 50, confidence), True)
    with pytest.raises(problems.WrongResultError, match="not the specified random stream"):
        sampled.error((token_ids, confidence), True)
    step.reset()
    result = step.candidates["reference"].run()
    result.tokens[0, -1] += 1
    with pytest.raises(problems.WrongResultError, match="not the tokens that were selected"):
        step.error(result, True)
    with pytest.raises(problems.WrongResultError, match="not the tokens that the rule selects"):
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
    problem = problems.Problem({n: problems.Candidate(*c) for n, c in candidates.items()}, error)
    return harness._measure(problem, timing.CpuDevice(1), effort)


def test_no_figure_from_a_wrong_result():
    def error(result, ours):
        problems.require(result != "garbage", "garbage came out")
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
    setting = problems.Setting("cpu", torch.bfloat16, ("reference",))
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
    monkeypatch.setattr(harness, "Setting", lambda place, *rest: problems.Setting("cpu", *rest))
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


# The commands.
