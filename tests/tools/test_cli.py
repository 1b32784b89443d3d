"""The command ``attn-sampler``: what it prints, writes and refuses."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch
from rich.console import Console

from attn_sampler import __version__, collect_env
from attn_sampler.backends import BACKENDS, is_backend_supported
from attn_sampler.bundled import load_model, load_task
from attn_sampler.cli import main
from attn_sampler.demo import RULES, default_tau, run_demo
from attn_sampler.generate import Generation, generate
from attn_sampler.sampler import POLICIES, make_policy
from attn_sampler.trace import DecodeTrace


def decode(task_name: str, policy: str, problems: int, seed: int = 0, **options: object) -> Generation:
    """What the demonstration should have decoded, by the library itself."""
    task = load_task(task_name)
    return generate(
        load_model(task_name),
        torch.from_numpy(task.problems(problems, seed=seed)[0]),
        mask_token_id=task.mask_token_id,
        block_length=task.length,
        policy=policy,
        seed=seed,
        trace=True,
        **options,  # type: ignore[arg-type]
    )


def commits(trace: DecodeTrace | None) -> list[tuple]:
    """What was decided: without scores, NaN where a rule reads none, and with no last bits to differ."""
    assert trace is not None
    return [(c.sequence, c.step, c.position, c.token) for c in trace.commits]


def table_rows(output: str) -> list[list[str]]:
    """The cells of the printed tables' body rows."""
    rows = []
    for line in output.splitlines():
        if re.search(r"\d to [\d.]+%", line):
            rows.append(re.split(r"\s{2,}", line.strip()))
    return rows


# --- info -----------------------------------------------------------------------------------------------


def test_info_json_holds_the_whole_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    env = json.loads(capsys.readouterr().out)
    assert env == collect_env.collect_env()
    assert list(env) == [
        "attn_sampler",
        "python",
        "platform",
        "torch",
        "torch_cuda",
        "triton",
        "cpu",
        "extension",
        "gpus",
        "backends",
    ]
    assert env["attn_sampler"] == __version__
    assert env["torch"] == torch.__version__
    assert env["cpu"]["torch_threads"] == torch.get_num_threads()
    assert len(env["gpus"]) == torch.cuda.device_count()
    assert list(env["backends"]) == list(BACKENDS)
    assert env["backends"]["reference"] == {"available": True, "reason": ""}
    assert env["extension"]["installed"] == (env["extension"]["cpu_isa"] is not None)
    for name, state in env["backends"].items():
        assert (state["available"], state["reason"]) == is_backend_supported("column_scores", name)
        assert state["available"] == (state["reason"] == "")


def test_info_prints_each_backend_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    env = collect_env.collect_env()
    for name, state in env["backends"].items():
        expected = "on" if state["available"] else f"off: {state['reason']}"
        assert f"  {name:<11} {expected}" in lines
    assert f"attn_sampler  {__version__}" in lines
    assert collect_env.main([]) == 0
    assert capsys.readouterr().out.splitlines() == lines  # python -m attn_sampler.collect_env


def test_report_of_a_machine_with_everything_and_with_nothing() -> None:
    env = collect_env.collect_env()
    env["extension"] = {"installed": True, "reason": "", "cpu_isa": "avx512"}
    env["gpus"] = [{"name": "H", "compute_capability": "9.0", "memory_gib": 80.0}]
    env |= {"torch_cuda": "13.0", "triton": "3.9.0"}
    text = collect_env.format_env(env)
    assert "H, compute capability 9.0, 80.0 GiB" in text
    assert "built with CUDA 13.0" in text
    assert "runs avx512" in text
    env["extension"] = {"installed": False, "reason": "no compiler was at hand", "cpu_isa": None}
    env |= {"gpus": [], "torch_cuda": None, "triton": None}
    text = collect_env.format_env(env)
    for words in (
        "no compiler was at hand",
        "none that torch can use",
        "built without CUDA",
        "not installed",
    ):
        assert words in text


# --- demo -----------------------------------------------------------------------------------------------


def test_demo_prints_every_rule_with_the_numbers_of_its_decoding(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--problems", "4"]) == 0
    output = capsys.readouterr().out
    rows = table_rows(output)
    assert [row[0].split()[0] for row in rows] == [*RULES, *RULES]  # both tasks, all rules
    # All but those on the attention map, whose thresholds are for longer sequences, the control, and shadows.
    left_out = {"adas", "clad", "dapd", "dawn", "dos", "grounded", "attn-random", "wino"}
    shown = {make_policy(p).__class__ for p in POLICIES.keys() - left_out}
    assert {make_policy(rule).__class__ for rule in RULES} == shown
    for i, (label, solved, interval, passes, speed, share) in enumerate(rows):
        name, rule = ("sudoku", "addition")[i // len(RULES)], label.split()[0]
        tau = default_tau(rule)
        told = rule if tau is None else f"{rule} tau={tau:g}"
        assert label == (f"{told} *" if make_policy(rule).revises else told)
        assert re.fullmatch(r"[\d.]+ to [\d.]+%", interval)
        assert int(speed.replace(",", "")) > 0
        assert re.fullmatch(r"\d+%", share)
        if rule in ("attn-parallel", "attn-sequential", "threshold", "left-to-right"):
            task, generation = load_task(name), decode(name, rule, 4)
            right = task.check(generation.tokens.numpy(), task.problems(4)[0])
            assert solved == f"{right.mean():.1%}"
            assert passes == f"{generation.num_forward_passes.double().mean().item():.1f}"
    for first in (0, len(RULES)):
        attention, confidence = rows[first + 1][1], rows[first + 2][1]
        assert f"\nattn-sequential solves {attention}, confidence {confidence}" in output


def test_the_verdict_calls_attention_weak_only_where_the_intervals_are_apart(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = "attention alone is a weak guide"
    rules = ["demo", "--task", "sudoku", "--policy", "attn-sequential", "confidence", "--problems"]
    assert main([*rules, "1"]) == 0
    assert words not in capsys.readouterr().out
    assert main([*rules, "40"]) == 0
    assert words in capsys.readouterr().out
    assert main(["demo", "--policy", "confidence", "--problems", "1"]) == 0
    assert "attn-sequential solves" not in capsys.readouterr().out


def test_demo_draws_the_answer_above_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--task", "sudoku", "--policy", "confidence", "--problems", "1", "--seed", "3"]) == 0
    output = capsys.readouterr().out
    generation = decode("sudoku", "confidence", 1, seed=3)
    assert generation.trace is not None
    board = load_task("sudoku").format(generation.tokens[0]).splitlines()
    steps = ["·" if step is None else str(step + 1) for step in generation.trace.steps(0)]
    grid = [line.split() for line in output.splitlines()]
    at = grid.index(board[0].split())
    assert grid[at : at + 6] == [line.split() for line in board]
    assert grid[at + 7 : at + 13] == [steps[i : i + 6] for i in range(0, 36, 6)]
    assert "addition" not in output
    assert len(table_rows(output)) == 1


def test_demo_says_what_underlines_mean(capsys: pytest.CaptureFixture[str]) -> None:
    for rule, revises in (("t2t", True), ("confidence", False)):
        arguments = ["demo", "--task", "sudoku", "--policy", rule, "--problems", "1"]
        assert main([*arguments, *(["--tau", "0.3"] if revises else [])]) == 0
        output = capsys.readouterr().out
        assert ("red last); underlined: revised" in output) == revises


def test_addition_steps_stand_under_their_digits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--task", "addition", "--policy", "confidence", "--problems", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    generation = decode("addition", "confidence", 1)
    assert generation.trace is not None
    answer = load_task("addition").format(generation.tokens[0])
    at = next(i for i, line in enumerate(lines) if answer in line)
    start = lines[at].index(answer)
    below = lines[at + 1][start:].ljust(len(answer))
    assert [None if c == " " else int(c) - 1 for c in below[: len(answer)]] == generation.trace.steps(0)


def test_trace_file_is_what_was_decoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    arguments = ["demo", "--task", "sudoku", "--policy", "attn-parallel", "--tau", "0.7", "--problems", "3"]
    arguments += ["--layers", "last", "--seed", "2", "--trace", str(path)]
    assert main(arguments) == 0
    assert f"wrote {path}" in capsys.readouterr().out
    expected = decode("sudoku", "attn-parallel", 3, seed=2, tau=0.7, layers=[3])
    trace = DecodeTrace.load(path)
    assert trace == expected.trace
    assert [trace.tokens(i) for i in range(3)] == expected.tokens.tolist()
    assert trace.prompt == load_task("sudoku").problems(3, seed=2)[0].tolist()
    assert {(c.sequence, c.position) for c in trace.commits} == {
        (i, j) for i, row in enumerate(trace.prompt) for j, token in enumerate(row) if token == 6
    }
    # The flags reached the decoder: another tau or other layers give another order.
    for options in ({"tau": 0.7}, {"layers": [3]}):
        assert commits(trace) != commits(decode("sudoku", "attn-parallel", 3, seed=2, **options).trace)


def test_several_runs_write_a_trace_each(tmp_path: Path) -> None:
    arguments = ["demo", "--policy", "confidence", "pard", "confidence", "--problems", "2"]
    assert main([*arguments, "--trace", str(tmp_path / "t.json")]) == 0
    names = [f"t-{task}-{rule}.json" for task in ("addition", "sudoku") for rule in ("confidence", "pard")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for task in ("addition", "sudoku"):
        for rule in ("confidence", "pard"):
            trace = DecodeTrace.load(tmp_path / f"t-{task}-{rule}.json")
            assert commits(trace) == commits(decode(task, rule, 2).trace)
            assert all(math.isnan(c.score) for c in trace.commits)  # through JSON's null


def test_temperature_samples_from_the_seed(tmp_path: Path) -> None:
    def run(*arguments: str) -> list[tuple]:
        path = tmp_path / "t.json"
        fixed = ["demo", "--task", "sudoku", "--policy", "random", "--problems", "3", "--trace", str(path)]
        assert main([*fixed, *arguments]) == 0
        return commits(DecodeTrace.load(path))

    hot = run("--temperature", "1.5", "--seed", "1")
    assert hot == run("--temperature", "1.5", "--seed", "1", "--backend", "reference")
    assert hot != run("--seed", "1")
    assert hot == commits(decode("sudoku", "random", 3, seed=1, temperature=1.5).trace)


def test_svg_shows_the_drawn_orders(tmp_path: Path) -> None:
    path = tmp_path / "orders.svg"
    rules = ["attn-parallel", "confidence", "pard", "eb", "random"]
    assert main(["demo", "--task", "sudoku", "--policy", *rules, "--problems", "1", "--svg", str(path)]) == 0
    root = xml.etree.ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = "".join(root.itertext()).replace("\xa0", " ")
    assert all(rule in text for rule in rules[:4])
    assert "random" not in text  # four rules are drawn
    fills = set(re.findall(r"fill: (#[0-9a-f]{6})", path.read_text(encoding="utf-8")))
    steps = decode("sudoku", "confidence", 1).num_forward_passes.item()
    assert len(fills) >= steps  # a colour for each step


def test_live_view_animates_and_changes_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attn_sampler.demo._FRAME_SECONDS", 0.0)  # every step is drawn
    monkeypatch.delenv("NO_COLOR", raising=False)
    outputs, runs = [], []
    for live in (True, False):
        console = Console(
            file=io.StringIO(), force_terminal=True, width=120, height=40, color_system="truecolor"
        )
        runs.append(run_demo(console, tasks=["sudoku"], policies=["confidence"], problems=2, live=live))
        outputs.append(console.file.getvalue())  # type: ignore[attr-defined]
    animated, still = outputs
    passes = int(runs[0][0].generation.num_forward_passes.max())
    cursor_up = re.findall(r"\x1b\[1A", animated)
    assert len(cursor_up) > passes  # each frame is drawn over the one before
    assert "\x1b[1A" not in still
    assert "\x1b[" in still  # coloured
    total = len(runs[0][0].trace.commits)
    assert f"{total}/{total}" in animated  # the progress bar got to its end
    assert commits(runs[0][0].trace) == commits(runs[1][0].trace)


def test_live_view_of_what_is_revised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attn_sampler.demo._FRAME_SECONDS", 0.0)
    monkeypatch.delenv("NO_COLOR", raising=False)
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120, height=40, color_system="truecolor")
    (run,) = run_demo(console, tasks=["sudoku"], policies=["saber"], problems=2)
    kinds = [c.kind for c in run.trace.commits]
    total = kinds.count("commit") - kinds.count("remask")
    assert total < kinds.count("commit")
    assert re.search(r"\x1b\[(1;)?4;[0-9;]*m", file.getvalue())  # underlined on a board
    assert f"{total}/{total}" in file.getvalue()
    seconds = run.generation.forward_seconds + run.generation.sampling_seconds
    assert run.tokens_per_second == total / seconds


def test_threads_are_used_and_given_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    for given, used in (([], 1), (["--threads", "2"], 2)):
        assert main(["demo", "--policy", "confidence", "--problems", "1", *given]) == 0
        assert f"CPU threads: {used}\n" in capsys.readouterr().out
        assert torch.get_num_threads() == before


def test_no_live_reaches_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("attn_sampler.demo.run_demo", lambda console, **options: seen.append(options) or [])
    assert main(["demo"]) == 0
    assert main(["demo", "--no-live"]) == 0
    assert [options["live"] for options in seen] == [True, False]
    assert seen[0]["tasks"] == ("sudoku", "addition")
    assert seen[0]["policies"] == RULES


# --- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: command"),
        (["decode"], "invalid choice: 'decode'"),
        (["info", "--xml"], "unrecognized arguments: --xml"),
        (["demo", "--task", "chess"], "argument --task: expected both, sudoku, addition or problems of"),
        (["demo", "--policy", "greedy"], "argument --policy: invalid choice: 'greedy'"),
        (["demo", "--policy"], "argument --policy: expected at least one argument"),
        (["demo", "--tau", "1.5"], "argument --tau: expected a number in [0, 1], got '1.5'"),
        (["demo", "--tau", "nan"], "argument --tau: expected a number in [0, 1], got 'nan'"),
        (["demo", "--tau", "high"], "argument --tau: expected a number in [0, 1], got 'high'"),
        (
            ["demo", "--tau", "0.5", "--policy", "confidence", "attn-sequential"],
            "argument --tau: none of the chosen rules reads it (confidence, attn-sequential)",
        ),
        (["demo", "--problems", "0"], "argument --problems: expected an integer from 1 to 1000, got '0'"),
        (
            ["demo", "--problems", "1001"],
            "argument --problems: expected an integer from 1 to 1000, got '1001'",
        ),
        (["demo", "--problems", "2.5"], "argument --problems: expected an integer from 1 to 1000, got '2.5'"),
        (["demo", "--temperature", "-1"], "argument --temperature: expected a finite number >= 0, got '-1'"),
        (
            ["demo", "--temperature", "inf"],
            "argument --temperature: expected a finite number >= 0, got 'inf'",
        ),
        (["demo", "--seed", "-1"], "argument --seed: expected an integer from 0"),
        (["demo", "--threads", "0"], "argument --threads: expected an integer from 1 to 1024, got '0'"),
        (["demo", "--layers", "first"], "argument --layers: expected all, last or indices such as 0,1"),
        (["demo", "--layers", "0,4"], "argument --layers: the models have layers 0 to 3, got 4"),
        (["demo", "--layers=-5"], "argument --layers: the models have layers 0 to 3, got -5"),
        (["demo", "--backend", "tpu"], "argument --backend: invalid choice: 'tpu'"),
        (
            ["demo", "--trace", "no/such/t.json"],
            "argument --trace: expected a file in a directory that exists",
        ),
        (["demo", "--svg", "."], "argument --svg: expected a file in a directory that exists, got '.'"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_a_backend_that_cannot_run_is_refused_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("attn_sampler.backends.unavailable", lambda backend: "it was left at home")
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--backend", "cpu"])
    assert stop.value.code == 2
    assert "argument --backend: cpu cannot run here: it was left at home" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def save(self: DecodeTrace, path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(DecodeTrace, "save", save)
    path = tmp_path / "t.json"
    assert (
        main(["demo", "--task", "sudoku", "--policy", "pard", "--problems", "1", "--trace", str(path)]) == 1
    )
    assert capsys.readouterr().err == f"attn-sampler: [Errno 13] Permission denied: '{path}'\n"


def test_an_interrupt_ends_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("attn_sampler.demo.run_demo", interrupt)
    assert main(["demo"]) == 130


# --- as a process ---------------------------------------------------------------------------------------


def test_command_without_a_terminal_colour_or_unicode() -> None:
    command = [sys.executable, "-m", "attn_sampler", "demo", "--policy", "confidence", "--problems", "2"]
    environment = {**os.environ, "NO_COLOR": "1", "PYTHONIOENCODING": "ascii", "TERM": "dumb"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    assert "\x1b" not in result.stdout  # neither colours nor cursor moves
    assert result.stdout.isascii()
    assert result.stdout.count("95% interval") == 2


def test_collect_env_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "attn_sampler.collect_env", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["attn_sampler"] == __version__
