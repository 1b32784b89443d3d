"""Evaluation of decoding rules: what is decoded, what is kept, and the statistics of it."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from decoding import decode as decode_toy
from toy_model import MASK, ToyModel

from attn_sampler import evaluate as evaluation
from attn_sampler.bundled import load_model as load_bundled_model
from attn_sampler.bundled import load_task
from attn_sampler.bundled.tasks import Score
from attn_sampler.cli import main
from attn_sampler.evaluate import (
    BASELINE,
    RULES,
    SWITCHES,
    Results,
    Rule,
    evaluate,
    expand,
    order_log_likelihood,
)
from attn_sampler.problem_sets import (
    BUNDLED,
    EvaluatedModel,
    bundled_problems,
    load_model,
    read_problems,
)
from attn_sampler.report import (
    bootstrap_mean,
    markdown,
    mcnemar,
    paired_rate_difference,
    plot_frontier,
    summarise,
)
from attn_sampler.sampler import make_policy

TOY = EvaluatedModel(ToyModel(2), MASK)


def toy_model() -> EvaluatedModel:
    return TOY


def broken_model() -> None:
    return None


def write_problems(path: Path, records: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    return path


def test_order_log_likelihood_goes_on_behind_an_end_of_text(toy_file: Path) -> None:
    problems = read_problems(toy_file, TOY, 3)
    end = int(next(answer for answer in problems.answers if len(answer) > 4)[0])
    ending = EvaluatedModel(TOY.model, MASK, options={"eos_token_id": end})
    rule = Rule.parse("left-to-right")
    expected, got = (order_log_likelihood(problems, range(12), model, rule) for model in (TOY, ending))
    assert got == expected


def test_order_log_likelihood_of_a_rule_that_takes_back(toy_file: Path) -> None:
    """The truth stays: the order is that of the same rule without revisions."""
    problems = read_problems(toy_file, TOY, 3)
    rules = (Rule.parse(f"{name}:tau=0.3") for name in ("threshold", "t2m"))
    expected, got = (order_log_likelihood(problems, range(12), TOY, rule) for rule in rules)
    assert got == expected


@pytest.fixture
def toy_file(tmp_path: Path) -> Path:
    rng = random.Random(0)
    records = []
    for _ in range(12):
        prompt = [rng.randrange(MASK) for _ in range(rng.randint(2, 6))]
        answer = [rng.randrange(MASK) for _ in range(rng.randint(1, 6))]
        if rng.random() < 0.5:  # infilling
            for _ in answer:
                prompt.insert(rng.randrange(len(prompt) + 1), MASK)
        records.append({"prompt": prompt, "answer": answer})
    return write_problems(tmp_path / "toy.jsonl", records)


def test_rules_are_read_as_written() -> None:
    rule = Rule.parse("attn-parallel:tau=0.95,layers=last,query_rows=masked,diagonal=false,threshold=mean")
    assert rule.make() == make_policy("attn-parallel", tau=0.95, threshold="mean")
    assert rule.attention == {"layers": [-1], "query_rows": "masked", "diagonal": False}
    assert Rule.parse("adas:count=2").options == {"count": 2}
    assert Rule.parse("adas:count=none").options == {"count": None}
    assert Rule.parse("attn:layers=1:").attention == {"layers": slice(1, None)}
    assert Rule.parse("attn:layers=0+3").attention == {"layers": [0, 3]}
    for text in (*RULES, *SWITCHES):
        assert Rule.parse(text).label == text
        Rule.parse(text).make()
    labels = [
        rule.label
        for rule in expand(["confidence", "threshold", "attn-parallel:layers=last", "pard:tau=0.5"], [0.5, 1])
    ]
    assert labels == [
        "confidence",
        "threshold:tau=0.5",
        "threshold:tau=1",
        "attn-parallel:layers=last,tau=0.5",
        "attn-parallel:layers=last,tau=1",
        "pard:tau=0.5",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nobody", "policy: expected one of"),
        ("threshold:tau", r"rule 'threshold:tau': expected policy:option=value,..., got 'tau'"),
        ("threshold:tau=2", "tau: expected"),
        ("threshold:size=2", "rule 'threshold:size=2': .*'size'"),
        ("attn:layers=first", "layers: expected all, last, a slice 0:2 or indices"),
        ("threshold:tau=high", "tau: "),
        ("attn:query_rows=some", "query_rows: expected one of all, masked, got 'some'"),
        ("attn:softmax_scope=all", "softmax_scope: expected one of"),
        ("attn:diagonal=1", "rule 'attn:diagonal=1': diagonal: expected True or False"),
    ],
)
def test_bad_rules(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rule.parse(text)


def test_bundled_problems_are_held_out_and_disjoint() -> None:
    for name in BUNDLED:
        held_out, dev = (bundled_problems(name, 40, split) for split in ("heldout", "dev"))
        mask = load_task(name.partition("-")[0]).mask_token_id
        for problems in (held_out, dev):
            assert len(problems) == 40
            for i in range(40):
                truth = problems.truth(i, mask)
                assert problems.judge(i, truth, mask)
                wrong = truth.clone()
                blank = int((problems.prompts[i] == mask).nonzero()[0])
                wrong[blank] = (wrong[blank] + 1) % 6
                assert not problems.judge(i, wrong, mask)
        solved = [{tuple(p.truth(i, mask).tolist()) for i in range(40)} for p in (held_out, dev)]
        assert not solved[0] & solved[1]
        assert held_out.fingerprint != dev.fingerprint == bundled_problems(name, 40, "dev").fingerprint
    with pytest.raises(ValueError, match="task and split: expected one of"):
        bundled_problems("chess", 1)


def test_a_file_of_problems(toy_file: Path) -> None:
    problems = read_problems(toy_file, TOY, 4)
    records = [json.loads(line) for line in toy_file.read_text().split("\n") if line]
    assert len(problems) == 12
    assert problems.name == "toy"
    appended = 0
    for i, record in enumerate(records):
        blanks = [j for j, token in enumerate(record["prompt"]) if token == MASK]
        appended += not blanks
        full = list(record["prompt"]) + [MASK] * (0 if blanks else len(record["answer"]))
        assert problems.prompts[i].tolist() == full
        for j, token in zip([j for j, t in enumerate(full) if t == MASK], record["answer"], strict=True):
            full[j] = token
        assert problems.truth(i, MASK).tolist() == full
        assert problems.judge(i, torch.tensor(full), MASK)
        full[-1] = (full[-1] + 1) % MASK
        assert not problems.judge(i, torch.tensor(full), MASK)
    assert 0 < appended < 12
    assert len(read_problems(toy_file, TOY, 4, count=5)) == 5


class Letters:
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return [ord(letter) - ord("a") for letter in text]


def test_problems_given_as_text(tmp_path: Path) -> None:
    path = write_problems(tmp_path / "text.jsonl", [{"prompt": "abc", "answer": "de"}])
    problems = read_problems(path, EvaluatedModel(TOY.model, MASK, Letters()), 4)
    assert problems.prompts[0].tolist() == [0, 1, 2, MASK, MASK]
    assert problems.answers[0].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": [1]}, r"line 2: expected prompt and answer: KeyError\('answer'\)"),
        ({"prompt": "a", "answer": "b"}, "line 2: .*comes without a tokenizer"),
        ({"prompt": [1, 2.5], "answer": [1]}, "line 2: .*a list of token ids"),
        ({"prompt": [1, -2], "answer": [1]}, "line 2: .*a list of token ids"),
        ({"prompt": [1, 1 << 70], "answer": [1]}, "line 2: .*a list of token ids"),
        ({"prompt": [1, MASK], "answer": [1, 2]}, "line 2: 1 blanks, but 2 true tokens"),
        ({"prompt": [1], "answer": []}, "line 2: 0 blanks, but 0 true tokens"),
        ({"prompt": [1], "answer": [MASK]}, "line 2: 1 blanks, but 1 true tokens"),
        ([1], "line 2: expected prompt and answer"),
    ],
)
def test_bad_problems(record: object, message: str, tmp_path: Path) -> None:
    path = write_problems(tmp_path / "bad.jsonl", [{"prompt": [1], "answer": [2]}, record])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=message):
        read_problems(path, TOY, 4)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no problem"):
        read_problems(tmp_path / "empty.jsonl", TOY, 4)


def test_models_by_name(tmp_path: Path) -> None:
    packaged = Path(evaluation.__file__).parent / "bundled" / "sudoku.safetensors"
    (tmp_path / "weights.safetensors").write_bytes(packaged.read_bytes())
    tokens = bundled_problems("sudoku", 2).prompts[0][None]
    expected = load_bundled_model("sudoku")(tokens)
    for spec in ("sudoku", str(tmp_path), str(tmp_path / "weights.safetensors")):
        loaded = load_model(spec)
        assert loaded.mask_token_id == 6
        assert torch.equal(loaded.model(tokens), expected)
    assert load_model("test_evaluate:toy_model") is not None
    (tmp_path / "more.safetensors").write_bytes(b"")
    for spec, message in (
        (str(tmp_path), "expected one .safetensors file"),
        ("nowhere", "expected a bundled model"),
        ("no_such_module:f", "cannot be loaded"),
        ("test_evaluate:nothing", "cannot be loaded"),
        ("test_evaluate:broken_model", "must return an EvaluatedModel, got NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            load_model(spec)


def by_hand(problems: evaluation.ProblemSet, index: int, rule: Rule) -> tuple[int, int]:
    """Right or wrong, and passes, decoded alone with ``generate``."""
    result = decode_toy(
        TOY.model,
        [problems.prompts[index]],
        policy=rule.make(),
        block_length=problems.block_length,
        seed=index,
        **rule.attention,
    )
    truth = problems.truth(index, MASK)
    return int(torch.equal(result.tokens[0], truth)), int(result.num_forward_passes[0])


def test_evaluate_decodes_each_problem_and_resumes(toy_file: Path, tmp_path: Path) -> None:
    problems = read_problems(toy_file, TOY, 4)
    for i in (0, 5, 7):  # answers that the model gives, so that some are right
        result = decode_toy(TOY.model, [problems.prompts[i]], policy="confidence", block_length=4)
        problems.answers[i] = result.tokens[0][problems.prompts[i] == MASK]
    rules = expand(["confidence", "threshold:tau=0.2", "attn-parallel:tau=0.2,layers=last"])
    rules += expand(["dawn:tau_low=0.2", "attn-random:tau=0.2"])
    results, batches = Results(tmp_path / "out.json"), []
    arguments = {"batch_size": 5, "on_batch": lambda *event: batches.append(event)}
    assert evaluate([(problems, TOY, "toy")], rules, results, **arguments, time_limit=0.0) == 60  # type: ignore[arg-type]
    assert not batches
    assert evaluate([(problems, TOY, "toy")], rules[:2], results, **arguments) == 0  # type: ignore[arg-type]
    assert [(rule, count) for _, rule, count in batches] == [
        (r.label, n) for r in rules[:2] for n in (5, 5, 2)
    ]
    # Another process: what is in the file is not decoded again, not even half of a rule.
    results = Results(tmp_path / "out.json")
    held = results.cells["toy"]["rules"]
    held["threshold:tau=0.2"] = {key: value[:7] for key, value in held["threshold:tau=0.2"].items()}
    batches.clear()
    assert evaluate([(problems, TOY, "toy")], rules, results, **arguments) == 0  # type: ignore[arg-type]
    assert [count for *_, count in batches] == [5, *(5, 5, 2) * 3]
    saved = json.loads((tmp_path / "out.json").read_text())
    for rule in rules:
        cell = saved["tasks"]["toy"]["rules"][rule.label]
        assert list(zip(cell["right"], cell["passes"], strict=True)) == [
            by_hand(problems, i, rule) for i in range(12)
        ]
    assert saved["summary"] == summarise(saved["tasks"], BASELINE)
    right = saved["tasks"]["toy"]["rules"]["confidence"]["right"]
    assert [right[i] for i in (0, 5, 7)] == [1, 1, 1]
    assert sum(right) < 12
    # Other problems, or another model, under the same name.
    problems.answers[3] = problems.answers[3] + 1
    with pytest.raises(ValueError, match="holds results of toy on other problems"):
        evaluate([(problems, TOY, "toy")], rules, Results(tmp_path / "out.json"))


def test_a_model_brings_options_of_its_own(toy_file: Path) -> None:
    model = EvaluatedModel(TOY.model, MASK, options={"block_length": 2, "logit_shift": True})
    problems = read_problems(toy_file, model, 4)
    for i in range(4):
        own = decode_toy(
            TOY.model, [problems.prompts[i]], policy="confidence", block_length=2, logit_shift=True
        )
        problems.answers[i] = own.tokens[0][problems.prompts[i] == MASK]
    assert evaluation.decode(problems, range(4), model, Rule.parse("confidence"))["right"] == [1] * 4
    assert evaluation.decode(problems, range(4), TOY, Rule.parse("confidence"))["right"] != [1] * 4


@pytest.mark.parametrize(
    "rule", ["confidence", "threshold:tau=0.1", "left-to-right", "attn-sequential", "dapd"]
)
def test_order_log_likelihood_written_out(rule: str, toy_file: Path) -> None:
    """Alone and pass by pass, in float64: which positions the rule takes, and their true tokens' log p."""
    problems = read_problems(toy_file, TOY, 3)
    got = order_log_likelihood(problems, range(2, 9), TOY, Rule.parse(rule))
    for n, i in enumerate(range(2, 9)):
        truth = problems.truth(i, MASK)
        taken: list[tuple[int, list[int]]] = []
        _trace_order(problems.prompts[i], truth, Rule.parse(rule), taken)
        tokens, nats = problems.prompts[i].clone(), 0.0
        model = ToyModel(2, dtype=torch.float64).requires_grad_(False)
        for _, positions in taken:
            logits = model(tokens[None])[0]
            logits[:, MASK] = -math.inf
            log_p = logits.log_softmax(dim=-1)
            nats += sum(float(log_p[j, truth[j]]) for j in positions)
            for j in positions:
                tokens[j] = truth[j]
        assert torch.equal(tokens, truth)
        assert got["passes"][n] == len(taken)
        assert got["nats"][n] == pytest.approx(nats, abs=1e-3)
        assert nats < -0.5


def _trace_order(prompt: torch.Tensor, truth: torch.Tensor, rule: Rule, taken: list) -> None:
    """The positions of each pass, from a run whose model hides what it predicted behind the truth."""

    class Hidden(torch.nn.Module):
        # The decoder commits predictions; the model is shown the true token wherever something stands.
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return TOY.model(torch.where(tokens == MASK, MASK, truth))

    def on_step(event) -> None:  # type: ignore[no-untyped-def]
        positions = (event.result.selected[0].nonzero().squeeze(1) + event.block.start).tolist()
        taken.append((event.step, positions))

    decode_toy(Hidden(), [prompt], policy=rule.make(), block_length=3, on_step=on_step, **rule.attention)


def test_paired_rate_difference_is_newcombes() -> None:
    def pairs(both: int, first: int, second: int, neither: int) -> tuple[list[int], list[int]]:
        x = [1] * (both + first) + [0] * (second + neither)
        return x, [1] * both + [0] * first + [1] * second + [0] * neither

    # Table II of Newcombe (1998), method 10.
    assert paired_rate_difference(*pairs(36, 12, 2, 0)) == pytest.approx((0.2, 0.0569, 0.3404), abs=6e-5)
    # Altman et al., Statistics with Confidence (2000), table 6.2, by the same method: the correction counts.
    assert paired_rate_difference(*pairs(14, 5, 0, 22)) == pytest.approx((5 / 41, 0.0115, 0.2265), abs=6e-5)
    difference, low, high = paired_rate_difference(*pairs(50, 0, 0, 0))
    assert difference == 0.0
    assert -0.1 < low < 0.0 < high < 0.1
    first, second = pairs(20, 9, 3, 8)
    assert paired_rate_difference(second, first) == pytest.approx(
        tuple(-x for x in (lambda d: (d[0], d[2], d[1]))(paired_rate_difference(first, second)))
    )


def test_mcnemar_is_the_binomial_test() -> None:
    first = [1] * 8 + [0] * 2 + [1] * 30
    second = [0] * 8 + [1] * 2 + [1] * 30
    # 2 P(X <= 2), X of Binomial(10, 1/2): 2 * (1 + 10 + 45) / 1024.
    assert mcnemar(first, second) == mcnemar(second, first) == pytest.approx(112 / 1024)
    assert mcnemar(first, first) == 1.0


def test_bootstrap_covers_as_a_normal_interval_does() -> None:
    x = np.random.default_rng(3).normal(2.0, 1.0, 400)
    mean, low, high = bootstrap_mean(x.tolist())
    half = 1.96 * x.std() / 20
    assert mean == pytest.approx(x.mean())
    assert (mean - low, high - mean) == pytest.approx((half, half), rel=0.08)
    assert bootstrap_mean(x.tolist()) == (mean, low, high)
    assert bootstrap_mean([0.25] * 10) == (0.25, 0.25, 0.25)


def test_summary_table_and_plot(tmp_path: Path) -> None:
    cells = {
        "toy": {
            "problems": 4,
            "rules": {
                "confidence": {"right": [1, 1, 0, 0], "passes": [4, 4, 4, 4]},
                "threshold:tau=0.5": {"right": [1, 1, 1, 0], "passes": [1, 2, 1, 2]},
                "unfinished": {"right": [1], "passes": [1]},
            },
            "orders": {
                "confidence": {"nats": [-1.0] * 4, "passes": [4] * 4},
                "left-to-right": {"nats": [-2.0, -1.5, -2.0, -1.5], "passes": [4] * 4},
            },
        }
    }
    rows = summarise(cells, "confidence")
    assert [row["rule"] for row in rows] == ["confidence", "threshold:tau=0.5", "left-to-right"]
    low, high = Score(3, 4).interval
    assert rows[1]["right"] == pytest.approx([0.75, low, high], abs=1e-5)
    assert (rows[1]["passes"], rows[1]["difference"][0], rows[1]["p_value"]) == (1.5, 0.25, 1.0)
    assert rows[1]["passes_difference"][0] == -2.5
    assert rows[1]["passes_difference"][1] < -2.5 < rows[1]["passes_difference"][2]
    assert not {"difference", "p_value", "nats_difference"} & set(rows[0])
    assert "right" not in rows[2]
    assert (rows[2]["nats"][0], rows[2]["nats_difference"][0]) == (-1.75, -0.75)
    lines = markdown(rows, "confidence").split("\n")
    assert lines[0] == "### toy, 4 problems"
    assert [line.split(" | ")[0] for line in lines[4:7]] == [
        "| `threshold:tau=0.5`",
        "| `confidence`",
        "| `left-to-right`",
    ]
    assert lines[4].startswith("| `threshold:tau=0.5` | 1.50 | 75.0 | 30.1 to 95.4 | +25.0 | ")
    assert len({line.count("|") for line in lines[2:7]}) == 1
    assert re.match(r"passes: .* less confidence: .* nats: ", lines[-2])
    decoded = [{name: value for name, value in row.items() if name != "nats"} for row in rows[:2]]
    assert "nats: " not in markdown(decoded, "confidence")
    plot_frontier(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_plot_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before anything is decoded."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["eval", "--plot", str(tmp_path / "plot.png")])
    assert "--plot: needs matplotlib: pip install 'attn_sampler[plot]'" in capsys.readouterr().err


def test_a_file_of_something_else(tmp_path: Path) -> None:
    for text in ("{}", "[1]", "tokens"):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match=r"other\.json: holds no results of an evaluation"):
            Results(tmp_path / "other.json")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], toy_file: Path) -> None:
    out, table = tmp_path / "out.json", tmp_path / "table.md"
    words = [
        "eval",
        "--task",
        "addition",
        "--problems",
        "6",
        "--rule",
        "confidence",
        "threshold",
        "--tau",
        "0.5",
        "0.99",
    ]
    assert main([*words, "--out", str(out), "--time-limit", "0"]) == 0
    assert "18 of 18 decodings are left" in capsys.readouterr().err
    assert main([*words, "--out", str(out), "--table", str(table), "--order-log-likelihood"]) == 0
    assert capsys.readouterr().out == ""
    cells = json.loads(out.read_text())["tasks"]["addition"]
    assert cells["rules"]["confidence"]["passes"] == [9] * 6
    assert (
        set(cells["rules"])
        == set(cells["orders"])
        == {"confidence", "threshold:tau=0.5", "threshold:tau=0.99"}
    )
    assert "### addition, 6 problems" in table.read_text()
    assert main([*words, "--out", str(out), "--baseline", "threshold:tau=0.5"]) == 0
    assert "less threshold:tau=0.5 |" in capsys.readouterr().out
    own = ["--task-file", str(toy_file), "--model", "test_evaluate:toy_model", "--problems", "3"]
    assert main(["eval", *own, "--rule", "confidence", "clad"]) == 0
    assert "### toy, 3 problems" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rule", "nobody"], "policy: expected one of"),
        (["--problems", "0"], "argument --problems: expected an integer from 1 to 2147483648, got '0'"),
        (["--problems", "1001"], "n must be 0 to 1000"),
        (["--out", "/no/such/folder/x.json"], "argument --out: expected a file in a directory that"),
        (["--task-file", "x.jsonl"], "--task-file: needs --model"),
        (["--model", "nowhere"], "model: expected a bundled model"),
        (["--rule", "pard", "--baseline", "prad"], "--baseline: expected one of the rules (pard), got prad"),
        (["--device", "gpu"], "--device: expected a device that torch can use here, got 'gpu'"),
    ],
)
def test_bad_arguments(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["eval", *words])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_decodes_the_bundled_tasks(rule: str) -> None:
    for name in ("sudoku", "addition-second"):
        problems, model = bundled_problems(name, 60, "dev"), load_model(name)
        results = Results()
        assert evaluate([(problems, model, name)], [Rule.parse(rule)], results, orders=True) == 0
        (row,) = summarise(results.cells, BASELINE)
        assert row["right"][0] > 0.1
        assert 1.0 <= row["passes"] <= 36.0
        assert row["nats"][0] < 0.0
