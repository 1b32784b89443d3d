"""bench/gpu_check.sh: what it would run, within its time, and that nothing which went well is run again."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from bench import __main__ as bench_command
from bench import profiled

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu_check.sh"
CALLS = ("correct", "timing", "rest")


def dry_run(folder: Path, call: str) -> dict[str, tuple[int, list[str]]]:
    """The stages of a call: the seconds that each may take, and its command."""
    result = subprocess.run(
        ["bash", SCRIPT, folder, call],
        env={"DRY_RUN": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = re.findall(r"^== (\w+) \(at most (\d+) s\): (.*)$", result.stdout, re.MULTILINE)
    return {name: (int(seconds), shlex.split(command)) for name, seconds, command in lines}


def test_the_calls_fit_their_time(tmp_path):
    """Five minutes each on a machine that has to build; eleven together where one build serves all, so that a
    minute of twelve is left for a machine's start."""
    stages = {call: dry_run(tmp_path, call) for call in CALLS}
    seconds = {call: sum(limit for limit, _ in found.values()) for call, found in stages.items()}
    assert max(seconds.values()) <= 300
    assert sum(seconds.values()) - 2 * stages["rest"]["build"][0] <= 660
    names = [name for found in stages.values() for name in found if name != "build"]
    assert len(names) == len(set(names))


def test_each_call_is_in_the_order_of_what_matters(tmp_path):
    assert list(dry_run(tmp_path, "correct"))[:5] == ["build", "kernels", "graphs", "memcheck", "racecheck"]
    timing = dry_run(tmp_path, "timing")
    assert list(timing) == ["build", "bench_first", "bench_second", "ncu_10", "ncu_13", "ncu_6"]
    assert {"synccheck", "initcheck", "tests"} < dry_run(tmp_path, "rest").keys()


@pytest.mark.parametrize("call", CALLS)
def test_what_it_names_exists(call, tmp_path):
    stages = dry_run(tmp_path, call)
    for _, words in stages.values():
        for word in words:
            file, _, test = word.partition("::")
            if file.startswith("tests/"):
                assert (ROOT / file).exists(), word
                assert not test or f"def {test}(" in (ROOT / file).read_text(), word
        if "bench" in words:
            options = words[words.index("bench") + 1 :]
            assert bench_command._parser().parse_args(options).cases == ["step"]
        if "bench.profiled" in words:
            assert words[words.index("--row") + 1] in profiled.DECODE
    build = stages["build"][1]
    for option in ("ATTN_SAMPLER_WGMMA=ON", "ATTN_SAMPLER_CHECKS=ON", "CUDAARCHS=90a-real"):
        assert option in build
        name = option.partition("=")[0]
        assert name in (ROOT / "CMakeLists.txt").read_text()
    assert "cuda_check" in (ROOT / "CMakeLists.txt").read_text()


class Machine:
    """The script over sources that can be changed, with programs that write down what they are asked."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.programs, self.out = folder / "tree", folder / "bin", folder / "out"
        self.calls = folder / "calls"
        for path in ("bench", "csrc", "attn_sampler", "tests/support", "build/cmake-x"):
            (self.tree / path).mkdir(parents=True)
        shutil.copy(SCRIPT, self.tree / "bench")
        (self.tree / "csrc" / "kernel.cu").write_text("one")
        (self.tree / "attn_sampler" / "_C.x.so").touch()
        self.programs.mkdir()
        self.program(self.tree / "build/cmake-x/cuda_check")
        self.program(self.programs / "python3")
        self.program(self.programs / "compute-sanitizer")
        self.program(self.programs / "nvidia-smi", answer="9.0")

    def program(self, path: Path, status: int = 0, answer: str = "") -> None:
        path.write_text(
            f'#!/bin/bash\n[ -z "{answer}" ] && echo "{path.name} $*" >>{self.calls}\n'
            f"echo {answer}\nexit {status}\n"
        )
        path.chmod(0o755)

    def run(self, call: str) -> tuple[int, list[str], str]:
        """The exit status, what was asked of the programs, and what was shown."""
        self.calls.write_text("")
        result = subprocess.run(
            ["bash", self.tree / "bench/gpu_check.sh", self.out, call],
            env={**os.environ, "PATH": f"{self.programs}:/usr/bin:/bin"},
            capture_output=True,
            text=True,
        )
        asked = [line.split(" -p ")[0] for line in self.calls.read_text().splitlines()]
        return result.returncode, asked, result.stdout


def test_what_went_well_is_not_run_again(tmp_path):
    machine = Machine(tmp_path)
    status, asked, shown = machine.run("correct")
    assert status == 0, shown
    assert asked[0].startswith("python3 -m pip install --no-build-isolation")
    assert [line.split()[0] for line in asked[1:5]] == [
        "cuda_check",
        "python3",
        "compute-sanitizer",
        "compute-sanitizer",
    ]
    table = shown.split("== stages so far")[1]
    names = ["build", "graphs", "kernels", "memcheck", "racecheck", "steps", "triton"]
    assert re.findall(r"^(\w+) +\d+ s  ok$", table, re.MULTILINE) == names
    assert machine.run("correct")[:2] == (0, [])
    (machine.tree / "csrc" / "kernel.cu").write_text("two")
    assert machine.run("correct")[1] == asked
    (machine.tree / "tests" / "test_new.py").write_text("")  # read by the tests alone
    assert [line.split()[0] for line in machine.run("correct")[1]] == ["python3"] * 3
    (machine.tree / "attn_sampler" / "_C.x.so").unlink()  # a fresh machine
    assert len(machine.run("correct")[1]) == 1


def test_a_stage_that_fails_keeps_none_from_running(tmp_path):
    machine = Machine(tmp_path)
    machine.program(machine.programs / "compute-sanitizer", status=3)
    status, asked, shown = machine.run("correct")
    assert status == 1
    assert len(asked) == 7
    assert re.search(r"^memcheck +\d+ s  failed: exit status 3$", shown, re.MULTILINE)
    status, again, _ = machine.run("correct")
    assert (status, [line.split()[0] for line in again]) == (1, ["compute-sanitizer"] * 2)
    machine.program(machine.programs / "compute-sanitizer")
    assert machine.run("correct")[0] == 0


def test_a_build_that_fails_ends_the_call_and_absent_tools_are_named(tmp_path):
    machine = Machine(tmp_path)
    (machine.programs / "compute-sanitizer").unlink()
    status, _, shown = machine.run("correct")
    if shutil.which("compute-sanitizer", path="/usr/bin:/bin") is None:
        assert status == 0
        assert re.search(r"^racecheck +0 s  skipped: compute-sanitizer was not found$", shown, re.MULTILINE)
    (machine.tree / "csrc" / "kernel.cu").write_text("broken")
    machine.program(machine.programs / "python3", status=1)
    status, asked, shown = machine.run("timing")
    assert (status, len(asked)) == (1, 1)
    assert re.search(r"^build +\d+ s  failed: exit status 1$", shown, re.MULTILINE)


@pytest.mark.parametrize("words", [[], ["correct"], ["FOLDER", "everything"]])
def test_usage(words, tmp_path):
    words = [str(tmp_path) if word == "FOLDER" else word for word in words]
    result = subprocess.run(["bash", SCRIPT, *words], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "usage: bench/gpu_check.sh FOLDER correct|timing|rest\n"


def test_the_profiled_step(capsys):
    assert profiled.main(["--row", "10", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "committed: 1\n"
