"""An evaluation that several processes share: the same bytes, and no process left behind."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from launcher import Ended, launch

from attn_sampler import evaluate
from attn_sampler.cli import main
from attn_sampler.errors import DecodingError
from attn_sampler.problem_sets import EvaluatedModel, load_model
from attn_sampler.ranks import ALONE, Ranks

# Five batches of each rule, the last one smaller.
WORDS = [
    *(
        "eval",
        "--task",
        "addition",
        "--model",
        "test_evaluate_ranks:model",
        "--problems",
        "22",
        "--batch",
        "5",
    ),
    *("--rule", "confidence", "attn-random:tau=0.9"),
]
ORDERS = "--order-log-likelihood"
_fault = ""


def evaluate_with(fault: str, words: list[str]) -> int:
    """What a rank does."""
    global _fault
    _fault = fault
    return main(words)


def model() -> EvaluatedModel:
    """The bundled one, in which something happens to a rank, mostly 1, in its second batch."""
    loaded, passes = load_model("addition"), itertools.count()

    def happen(*_: Any) -> None:
        if next(passes) != 12 or os.environ.get("RANK") != (_fault.partition("killed ")[2] or "1"):
            return
        if _fault.startswith("killed "):
            os.kill(os.getpid(), signal.SIGKILL)
        if _fault == "refused":
            raise DecodingError("the model\nrefuses")
        if _fault == "broken":
            raise KeyError("layer")
        if _fault == "late":
            evaluate.time = SimpleNamespace(monotonic=lambda: math.inf)

    if _fault == "not there" and os.environ.get("RANK") == "1":
        raise FileNotFoundError(2, "No such file", "weights")
    loaded.model.register_forward_pre_hook(happen)
    return loaded


def run(size: int, folder: Path, *more: str, fault: str = "") -> list[Ended]:
    return launch(size, folder, evaluate_with, fault, [*WORDS, "--out", str(folder / "out.json"), *more])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes."""
    folder = tmp_path_factory.mktemp("alone")
    files = ["--out", str(folder / "out.json"), "--table", str(folder / "table.md")]
    assert main([*WORDS, ORDERS, *files]) == 0
    return folder


def same_results(folder: Path, alone: Path) -> bool:
    return (folder / "out.json").read_bytes() == (alone / "out.json").read_bytes()


@pytest.mark.parametrize("size", [2, 3])
def test_the_bytes_of_one_process(size: int, alone: Path, tmp_path: Path) -> None:
    ranks = run(size, tmp_path, ORDERS)
    assert [rank.status for rank in ranks] == [0] * size
    assert same_results(tmp_path, alone)
    assert ranks[0].out == (alone / "table.md").read_text() + "\n"
    assert {rank.out + rank.err for rank in ranks[1:]} == {""}


def test_started_by_torchrun(alone: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    files = ["--out", str(tmp_path / "out.json"), "--table", str(tmp_path / "table.md")]
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]
    ended = subprocess.run(
        [*command, "-m", "attn_sampler", *WORDS, ORDERS, *files],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == ""
    assert same_results(tmp_path, alone)
    assert (tmp_path / "table.md").read_bytes() == (alone / "table.md").read_bytes()


def test_others_go_on_where_a_rank_was_killed(alone: Path, tmp_path: Path) -> None:
    first, second = run(2, tmp_path, ORDERS, fault="killed 1")
    assert second.status == -signal.SIGKILL
    assert (first.status, first.err) == (1, "attn-sampler: another process of this run has ended\n")
    held = json.loads((tmp_path / "out.json").read_text())["tasks"]["addition"]["rules"]
    assert [len(values["passes"]) for values in held.values()] == [10]
    (tmp_path / "by one").mkdir()
    shutil.copy(tmp_path / "out.json", tmp_path / "by one")
    assert main([*WORDS, ORDERS, "--out", str(tmp_path / "by one" / "out.json")]) == 0
    assert [rank.status for rank in run(3, tmp_path, ORDERS)] == [0, 0, 0]
    assert same_results(tmp_path / "by one", alone)
    assert same_results(tmp_path, alone)


@pytest.mark.parametrize(("size", "killed"), [(2, 0), (5, 2)])
def test_none_waits_for_a_rank_that_was_killed(size: int, killed: int, tmp_path: Path) -> None:
    """Of five, those that are no neighbours of it in the ring of a gather learn it from others."""
    ranks = run(size, tmp_path, ORDERS, fault=f"killed {killed}")
    assert [rank.status for rank in ranks] == [-9 if i == killed else 1 for i in range(size)]
    assert {rank.err for rank in ranks[1:]} == {""}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("refused", "addition by confidence: the model refuses"),
        ("broken", "KeyError: 'layer'"),
        ("not there", "[Errno 2] No such file: 'weights'"),
    ],
)
def test_an_error_of_one_rank_ends_all(fault: str, message: str, tmp_path: Path) -> None:
    first, second = run(2, tmp_path, fault=fault)
    assert (first.status, second.status) == (1, 1)
    assert first.err == f"attn-sampler: {message}\n"
    assert ("Traceback" in second.err) == (fault == "broken")
    assert not first.out + second.out


def test_a_file_of_something_else_ends_all(tmp_path: Path) -> None:
    """Read by the first rank alone."""
    (tmp_path / "out.json").write_text("{}")
    first, second = run(2, tmp_path)
    assert (first.status, second.status, second.err) == (1, 1, "")
    assert "out.json: holds no results of an evaluation" in first.err


def test_ranks_agree_on_the_time(alone: Path, tmp_path: Path) -> None:
    """The clock of one is far ahead."""
    first, second = run(2, tmp_path, ORDERS, "--time-limit", "1000", fault="late")
    assert (first.status, second.status, second.err) == (0, 0, "")
    assert first.err == "68 of 88 decodings are left: run again with the same --out\n"
    assert main([*WORDS, ORDERS, "--out", str(tmp_path / "out.json")]) == 0
    assert same_results(tmp_path, alone)


def test_each_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [Ranks(11, 16).device(name) for name in ("cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:1", "cpu"]
    assert ALONE.device("cuda") == "cuda"
