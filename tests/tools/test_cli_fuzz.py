"""Whatever a user types or has in a file, a command answers with a result or one line, and no traceback."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hostile_files import CONFIG, MASK, SMALL, hostile_text, hostile_weights, make_checkpoint, place

from attn_sampler.bundled.model import TinyMaskedLM, save_weights
from attn_sampler.cli import main
from attn_sampler.evaluate import Results
from attn_sampler.problem_sets import EvaluatedModel, bundled_problems

NUMBERS = ["nan", "inf", "-inf", "-1", "1e-300", "1e999", "1.5", "0x10", "", " ", "9" * 5000, "0,5", "high"]
INTEGERS = [
    "0",
    "-1",
    "1.0",
    "nan",
    str(2**31 + 1),
    str(2**63),
    str(-(2**70)),
    "9" * 5000,
    "",
    "1 2",
    "ten",
    "٣",
]
NAMES = ["", " ", "none-such", "a\nb", "../x", "x" * 5000, "%s{0}", "-", "é", "\udcff", "attn:", "[bold]"]
DEVICES = ["cuda:99", "cuda:-1", "cpu:1", "meta", "mps", "hpu", "lazy", "ideep", "privateuseone", *NAMES]
LAYERS = ["0,4", "-5", "99", str(2**70), "0,", "first", "1:2", "", "0;1", "9" * 5000]
RULES = [
    *(
        "attn:layers=99",
        "attn:layers=-99",
        f"attn:layers={2**70}",
        "attn:layers=3:1",
        f"attn:layers=-{2**70}:",
    ),
    *(
        "attn:layers=0+",
        "attn:layers=1:2:3",
        "attn:layers=",
        "attn:tau=nan",
        "attn:tau",
        "attn:=",
        "attn:=1",
        ":",
    ),
    *(
        "attn:tau=0.5,tau=0.6",
        "attn:mode=both",
        "attn-sequential:mode=parallel",
        "attn:rows=masked",
        "attn:rows=x",
    ),
    *(f"adas:count={2**70}", "adas:count=-1", "adas:count=true", "adas:strength=inf", "adas:strength=none"),
    *(f"klass:history={2**70}", f"klass:kl={2**70}", f"factor:factor={2**70}", "factor:factor=" + "9" * 400),
    *(
        "eb:gamma=nan",
        f"eb:gamma={2**70}",
        "random:seed=1",
        "dawn:tau_low=2",
        "dapd:tau_min=nan",
        "clad:tau=x",
    ),
    *(
        "confidence:metric=entropy",
        "attn:diagonal=none",
        "attn:softmax_scope=1",
        "attn:query_rows=none",
        "attn,tau=1",
    ),
    *(
        f"dapd:tau_max={2**70}",
        f"dawn:tau_sink={2**70}",
        f"adas:strength={2**70}",
        "attn:self=1",
        "attn:policy=1",
    ),
]


class Draw(NamedTuple):
    """A command and what a message about it may name."""

    words: list[str]
    names: list[str]
    out: Path | None = None


def toy() -> EvaluatedModel:
    torch.manual_seed(0)
    return EvaluatedModel(TinyMaskedLM(CONFIG).eval(), MASK)


def not_a_model() -> dict[str, int]:
    return {}


def needs_an_argument(name: str) -> str:
    return name


number = 3


RECORDS = [{"prompt": [1, 2, MASK, MASK], "answer": [3, 4]}, {"prompt": [5], "answer": [6]}]
RESULTS = {
    "tasks": {
        "addition": {
            "problems": 2,
            "fingerprint": bundled_problems("addition", 2).fingerprint,
            "model": "addition",
            "rules": {
                "confidence": {"right": [1, 0], "passes": [3, 4]},
                "attn:tau=1": {"right": [], "passes": []},
            },
            "orders": {"confidence": {"nats": [-0.5, -1.25], "passes": [3, 4]}},
        }
    },
    "summary": [],
}


# Commands, wrong in one or two places.


def draw_demo(folder: Path, rng: random.Random) -> Draw:
    words = ["demo", "--task", "addition", "--policy", "confidence", "attn", "--problems", "1"]
    options: dict[str, list[str]] = {
        "--task": NAMES,
        "--policy": NAMES,
        "--tau": NUMBERS,
        "--problems": ["1001", *INTEGERS],
        "--temperature": NUMBERS,
        "--seed": INTEGERS,
        "--layers": LAYERS,
        "--backend": ["cuda", "triton", *NAMES],
        "--threads": ["1025", *INTEGERS],
        "--trace": [place(folder, rng)],
        "--svg": [place(folder, rng)],
    }
    return with_options(words, options, rng)


def with_options(
    words: list[str], options: dict[str, list[str]], rng: random.Random, out: Path | None = None
) -> Draw:
    chosen = rng.sample(list(options), rng.choice([1, 1, 1, 2]))
    given = [word for name in chosen for word in (name, rng.choice(options[name]))]
    if rng.random() < 0.05:
        given.append(rng.choice(["--none", "word", "--", "-h", "--version"]))
    return Draw(words + given, [*chosen, *given, *map(repr, given), "arguments", "rule", "cannot load"], out)


def draw_eval(folder: Path, rng: random.Random) -> Draw:
    words = ["eval", "--rule", "confidence", "--problems", "2"]
    words += rng.choice([[], [], ["--order-log-likelihood"], ["--table", str(folder / "table.md")]])
    out, task, weights = folder / "out.json", folder / "task.jsonl", folder / "weights.safetensors"
    names = [str(out), str(task), str(weights), "weights.safetensors", "test_cli_fuzz", "task,", "prompt_ids"]
    results = json.loads(json.dumps(RESULTS))
    if rng.random() < 0.5:
        words += ["--task", "addition"]
    else:
        task.write_text("\n".join(map(json.dumps, RECORDS)))
        words += ["--task-file", str(task), "--model"]
        words.append(rng.choice(["test_cli_fuzz:toy", str(weights)]))
        save_weights(toy().model, weights)  # type: ignore[arg-type]
    options: dict[str, list[str]] = {
        "--task": NAMES,
        "--model": [
            *NAMES,
            "os:",
            ":",
            ".:x",
            ".json:x",
            "test_cli_fuzz:" + rng.choice(MEMBERS),
            "hub:",
            "hub:/",
            "hub:a b",
        ],
        "--adapter": NAMES,
        "--rule": [*RULES, *NAMES],
        "--baseline": [*RULES, *NAMES],
        "--tau": NUMBERS,
        "--problems": INTEGERS,
        "--split": NAMES,
        "--block-length": INTEGERS,
        "--batch": INTEGERS,
        "--device": DEVICES,
        "--threads": ["1025", *INTEGERS],
        "--time-limit": [*NUMBERS, "0"],
        "--out": [place(folder, rng), str(task), str(weights)],
        "--table": [place(folder, rng), str(out), str(task), str(weights)],
        "--plot": [place(folder, rng), str(out), str(folder / "plot.xyz")],
        "--task-file": [place(folder, rng)],
    }
    hostile = rng.random()
    if hostile < 0.25:
        out.write_bytes(hostile_text(results, rng))
        return Draw([*words, "--out", str(out)], names, out)
    if hostile < 0.4 and "--task-file" in words:
        lines = [json.dumps(RECORDS[0]).encode(), hostile_text(RECORDS[1], rng)]
        task.write_bytes(b"\n".join(lines))
        return Draw([*words, "--out", str(out)], names, out)
    if hostile < 0.55 and "--task-file" in words:
        hostile_weights(weights, rng)
        model = rng.choice([str(weights), str(folder)])
        return Draw(
            [*words, "--model", model, "--rule", "attn", "--out", str(out)], [*names, "position"], out
        )
    if rng.random() < 0.5:
        out.write_text(json.dumps(results))
    drawn = with_options([*words, "--out", str(out)], options, rng, out)
    return drawn._replace(names=[*drawn.names, *names])


MEMBERS = ["toy", "none", "not_a_model", "needs_an_argument", "number", "pytest", "toy.x", ""]


def draw_generate(folder: Path, rng: random.Random) -> Draw:
    model = folder / "model"
    words = ["generate", "--model", str(model), "--prompt", "w1 w2", "w3", "--adapter", "bidirectional"]
    words += ["--gen-length", "4", "--device", "cpu"]
    options: dict[str, list[str]] = {
        "--model": [place(folder, rng), str(model / "config.json")],
        "--prompt": NAMES,
        "--policy": NAMES,
        "--tau": NUMBERS,
        "--gen-length": [str(2**21), *INTEGERS],
        "--block-length": INTEGERS,
        "--cache": NAMES,
        "--layers": LAYERS,
        "--temperature": NUMBERS,
        "--seed": INTEGERS,
        "--backend": ["cuda", "triton", *NAMES],
        "--trace": [place(folder, rng), str(model / "config.json"), str(model)],
        "--device": DEVICES,
        "--dtype": NAMES,
        "--adapter": ["llada", "dream", "sdar", "fast-dllm-v2", "llada2", *NAMES],
        "--attention": [
            "eager",
            "attn_sampler_fa2",
            "attn_sampler_flex",
            "flash_attention_2",
            "paged|sdpa",
            *NAMES,
        ],
        "--mask-token-id": ["15", "16", "3", *INTEGERS],
    }
    if rng.random() < 0.5:
        drawn = with_options(words, options, rng)
        return drawn._replace(
            names=[*drawn.names, "prompt_ids", "layers", "flash_attn", "cache", "block_length"]
        )
    path = rng.choice(sorted(model.iterdir()))
    content = bytearray(path.read_bytes())
    if path.suffix == ".json" and rng.random() < 0.8:
        path.write_bytes(hostile_text(json.loads(content), rng, SMALL))
    else:
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(min(len(content), 900))] = rng.randrange(256)
        path.write_bytes(content[: rng.choice([0, 7, 8, 100, len(content) - 1, len(content)])])
        if rng.random() < 0.1:
            path.unlink()
    return Draw(
        [*words, "--policy", "attn"], [str(model), path.name, "position", "layers", "prompt", "token"]
    )


TRACE = {
    **{"format": 3, "prompt": [[1, MASK, MASK], [0, 2, MASK]], "mask_token_id": MASK, "policy": "attn"},
    "commits": [
        {
            "sequence": 0,
            "step": 0,
            "position": 1,
            "token": 3,
            "score": 0.5,
            "confidence": 1.0,
            "kind": "commit",
        },
        {"sequence": 1, "step": 1, "position": 2, "token": 4, "score": None, "confidence": None},
    ],
    **{"padding": [0, 1], "symbols": {"1": "one", "3": " three"}, "width": None},
}


def draw_trace(folder: Path, rng: random.Random) -> Draw:
    trace, output = folder / "trace.json", folder / "trace.html"
    words = ["trace", rng.choice(["view", "show"]), str(trace)]
    if rng.random() < 0.5:
        trace.write_bytes(hostile_text(TRACE, rng))
        return Draw(words, ["FILE"], output)
    trace.write_text(json.dumps(TRACE))
    options = {
        "--task": ["sudoku", *NAMES],
        "--tokenizer": [place(folder, rng), str(trace), str(folder)],
        "--width": INTEGERS,
        **(
            {"--output": [place(folder, rng), str(trace)]}
            if words[1] == "view"
            else {"--step": INTEGERS, "--sequence": INTEGERS}
        ),
    }
    drawn = with_options(words, options, rng, output)
    return drawn._replace(names=[*drawn.names, "FILE", str(trace)])


def draw_info(folder: Path, rng: random.Random) -> Draw:
    return Draw(
        [rng.choice(["info", "", "x", "--", "-1"]), *rng.sample(["--json", "--x", "word"], 1)],
        ["arguments", "command"],
    )


def run(words: list[str]) -> tuple[Any, str]:
    """The exit status and stderr of a command, in this process."""
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            status = main(words)
        except SystemExit as stop:
            status = stop.code
    return status, err.getvalue()


def judge(drawn: Draw) -> None:
    before = drawn.out.read_bytes() if drawn.out is not None and drawn.out.exists() else None
    status, told = run(drawn.words)
    assert status in (0, 1, 2), status
    assert "Traceback" not in told
    if status == 0:
        return
    lines = [line for line in told.splitlines() if "is called query_rows now" not in line]
    assert len(lines) == 1, told
    assert lines[0].startswith("attn-sampler"), told
    assert any(name.lstrip("-") in lines[0] for name in drawn.names if name.strip("- ")), told
    if drawn.out is not None:
        after = drawn.out.read_bytes() if drawn.out.exists() else None
        assert after == before or (status == 1 and Results(drawn.out).cells), told


def check_draws(seed: int, checkpoint: Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rng = random.Random(seed)
    for index in range(15):
        folder = tmp_path / str(index)
        folder.mkdir()
        monkeypatch.chdir(folder)
        draws = [draw_demo, draw_eval, draw_info, draw_generate, draw_trace]
        (draw,) = rng.choices(draws, [3, 8, 1, 3, 2])
        if draw is draw_generate:
            if checkpoint is None:
                continue
            shutil.copytree(checkpoint, folder / "model")
        drawn = draw(folder, rng)
        try:
            judge(drawn)
        except BaseException as error:
            error.add_note(f"draw {index} of seed {seed}: {drawn.words}")
            raise
        assert not list(folder.glob(".*.part")), drawn.words


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """None where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder)
    return folder


@pytest.mark.parametrize("seed", range(10))
def test_a_mistake_is_told_in_one_line(
    seed: int, checkpoint: Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_draws(seed, checkpoint, tmp_path, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10, 310))
def test_many_mistakes_are_told_in_one_line(
    seed: int, checkpoint: Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_draws(seed, checkpoint, tmp_path, monkeypatch)


# As a process.


def start(words: list[str], **options: Any) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "attn_sampler", *words], stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is full")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["info"], "attn-sampler: [Errno 28] No space left on device: 'standard output'\n"),
        (
            [*["demo", "--task", "addition", "--policy", "pard", "--problems", "1", "--trace", "/dev/full"]],
            "attn-sampler: [Errno 28] No space left on device: '/dev/full'\n",
        ),
    ],
)
def test_a_full_disk(words: list[str], told: str) -> None:
    with open("/dev/full" if words == ["info"] else os.devnull, "w") as output:
        process = start(words, stdout=output)
        assert process.communicate(timeout=120)[1] == told
    assert process.returncode == 1


def test_output_that_nobody_reads() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = start(["info", "--json"], stdout=writer)
    os.close(writer)
    assert process.communicate(timeout=120)[1] == ""
    assert process.returncode == 1


def test_an_interrupt_keeps_what_was_decoded(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = ["eval", "--task", "addition", "addition-first", "addition-second", "--batch", "1", "--out"]
    # What is started in the background may have been told to ignore it.
    heeded = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with start([*words, str(out)], stdout=subprocess.DEVNULL, preexec_fn=heeded) as process:
        while not out.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        try:
            assert process.communicate(timeout=120)[1] == ""
        finally:
            process.kill()
    assert process.returncode == 130
    assert Results(out).cells["addition"]["rules"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_an_old_name_in_a_rule_is_said_to_be_old() -> None:
    words = ["eval", "--task", "addition", "--problems", "1", "--rule", "attn:rows=masked"]
    process = start(words, stdout=subprocess.PIPE)
    output, told = process.communicate(timeout=120)
    assert told == "attn-sampler: rule 'attn:rows=masked': rows is called query_rows now\n"
    assert "`attn:query_rows=masked`" in output
    assert process.returncode == 0
