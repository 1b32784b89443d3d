"""DecodeTrace: replay, JSON and drawing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from attn_sampler.trace import Commit, DecodeTrace, step_colour

NAN = math.nan
MASK = 9


def example() -> DecodeTrace:
    return DecodeTrace(
        prompt=[[1, MASK, MASK, 2, MASK], [0, 0, MASK, 3, MASK]],
        mask_token_id=MASK,
        policy="attn",
        commits=[
            Commit(0, 0, 2, 4, 1.25, 0.5),
            Commit(1, 0, 2, 5, NAN, 0.1),
            Commit(0, 1, 1, 6, 0.1, 0.9),
            Commit(0, 1, 4, 7, 3e-38, -0.0),
            Commit(1, 1, 4, 8, NAN, NAN),
        ],
        padding=[0, 2],
    )


def same(a: DecodeTrace, b: DecodeTrace) -> bool:
    """Equal field by field, where NaN equals NaN."""
    return repr(a) == repr(b)


def test_steps() -> None:
    assert example().steps(0) == [None, 1, 0, None, 1]
    assert example().steps(1) == [None, None, 0, None, 1]


def test_tokens_at_each_step() -> None:
    trace = example()
    assert trace.tokens(0) == [1, 6, 4, 2, 7]
    assert trace.tokens(0, until_step=1) == [1, 6, 4, 2, 7]
    assert trace.tokens(0, until_step=0) == [1, MASK, 4, 2, MASK]
    assert trace.tokens(0, until_step=-1) == trace.prompt[0] == [1, MASK, MASK, 2, MASK]
    assert trace.tokens(1, until_step=0) == [0, 0, 5, 3, MASK]


def test_a_later_commit_replaces_an_earlier_one() -> None:
    trace = example()
    trace.commits.append(Commit(0, 2, 4, 3, NAN, NAN))
    assert trace.tokens(0) == [1, 6, 4, 2, 3]
    assert trace.tokens(0, until_step=1) == [1, 6, 4, 2, 7]
    assert trace.steps(0) == [None, 1, 0, None, 2]


def test_json_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    example().save(path)
    loaded = DecodeTrace.load(path)
    assert same(loaded, example())
    assert isinstance(loaded.commits[0], Commit)
    assert math.isnan(loaded.commits[1].score)
    loaded.save(str(tmp_path / "again.json"))
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_json_is_strict_and_names_its_fields(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    trace = example()
    trace.commits.append(Commit(0, 2, 1, 3, math.inf, -math.inf))
    trace.save(path)

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    data = json.loads(path.read_text(), parse_constant=no_constant)
    assert data["format"] == 3
    assert (data["policy"], data["mask_token_id"], data["padding"]) == ("attn", MASK, [0, 2])
    assert data["prompt"] == trace.prompt
    assert data["commits"][0] == {
        "sequence": 0,
        "step": 0,
        "position": 2,
        "token": 4,
        "score": 1.25,
        "confidence": 0.5,
        "kind": "commit",
    }
    assert data["commits"][1]["score"] is None
    assert data["commits"][5]["score"] is data["commits"][5]["confidence"] is None


def test_a_file_from_another_run(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    code = (
        "import sys, torch\n"
        "from attn_sampler.generate import generate\n"
        "logits = torch.arange(20.0).view(1, 4, 5).sin()\n"
        "options = {'mask_token_id': 4, 'gen_length': 3, 'policy': 'confidence', 'trace': True}\n"
        "run = generate(lambda tokens: logits, [[1]], **options)\n"
        "run.trace.save(sys.argv[1])\n"
        "print(run.tokens.tolist())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    trace = DecodeTrace.load(path)
    assert [trace.tokens(0)] == json.loads(run.stdout)
    assert sorted(s for s in trace.steps(0) if s is not None) == [0, 1, 2]
    assert trace.render(0, "abcde").plain == "".join("abcde"[t] for t in trace.tokens(0))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not JSON",
        "[]",
        "{}",
        '{"format": 4, "prompt": [], "mask_token_id": 1, "policy": "", "commits": []}',
        '{"format": 1, "prompt": [], "mask_token_id": 1, "policy": ""}',
        '{"format": 1, "prompt": [], "mask_token_id": 1, "policy": "", "commits": [{"step": 1}]}',
        '{"format": 1, "prompt": [], "mask_token_id": 1, "policy": "", "commits": [], "extra": 1}',
    ],
)
def test_files_that_are_no_trace(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"path: .*other\.json is not a decode trace"):
        DecodeTrace.load(path)
    with pytest.raises(FileNotFoundError):
        DecodeTrace.load(tmp_path / "missing.json")


SYMBOLS = "abcdefgh?·"


def spans(trace: DecodeTrace, sequence: int, **options: object) -> list[tuple[str, str]]:
    """The drawn pieces with their styles; the separators between them have none."""
    text = trace.render(sequence, SYMBOLS, **options)  # type: ignore[arg-type]
    return [(text.plain[span.start : span.end], str(span.style)) for span in text.spans]


def test_render() -> None:
    first, last = step_colour(0, 1), step_colour(1, 1)
    assert spans(example(), 0) == [
        ("b", "dim"),
        ("g", f"bold {last}"),
        ("e", f"bold {first}"),
        ("c", "dim"),
        ("h", f"bold {last}"),
    ]
    assert example().render(0, SYMBOLS).plain == "bgech"
    assert example().render(1, SYMBOLS).plain == "fd?"  # without its padding


def test_render_a_state_on_the_way() -> None:
    assert spans(example(), 0, until_step=0) == [
        ("b", "dim"),
        ("·", "grey50"),
        ("e", f"bold {step_colour(0, 1)}"),
        ("c", "dim"),
        ("·", "grey50"),
    ]
    assert example().render(0, SYMBOLS, until_step=-1).plain == "b··c·"


def test_render_in_lines() -> None:
    assert example().render(0, SYMBOLS, width=2).plain == "b g\ne c\nh"
    assert spans(example(), 0, width=2) == spans(example(), 0)
    assert example().render(1, SYMBOLS, width=2).plain == "f d\n?"


def test_render_with_a_function() -> None:
    assert example().render(0, lambda token: f"<{token}>").plain == "<1><6><4><2><7>"


def revised() -> DecodeTrace:
    """Position 2 is masked again in step 1 and filled in step 2, in which position 1 is replaced."""
    trace = example()
    trace.commits[3:3] = [Commit(0, 1, 2, MASK, 1.0, 0.2, "remask")]
    trace.commits += [Commit(0, 2, 2, 3, 0.5, 0.75), Commit(0, 2, 1, 5, 0.5, 0.875, "replace")]
    return trace


def test_steps_and_tokens_under_revision() -> None:
    trace = revised()
    assert [trace.tokens(0, until_step=s) for s in (0, 1, 2)] == [
        [1, MASK, 4, 2, MASK],
        [1, 6, MASK, 2, 7],
        [1, 5, 3, 2, 7],
    ]
    assert [trace.steps(0, until_step=s) for s in (0, 1, None)] == [
        [None, None, 0, None, None],
        [None, 1, None, None, 1],
        [None, 2, 2, None, 1],
    ]
    assert [trace.revised(0, until_step=s) for s in (0, 1, None)] == [set(), {2}, {1, 2}]
    assert trace.revised(1) == set()


def test_revisions_are_saved_and_the_former_formats_are_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    revised().save(path)
    assert same(DecodeTrace.load(path), revised())
    example().save(path)
    data = json.loads(path.read_text())
    del data["symbols"], data["width"]
    data["format"] = 2
    path.write_text(json.dumps(data))
    assert same(DecodeTrace.load(path), example())
    data["format"] = 1
    for commit in data["commits"]:
        del commit["kind"]
    path.write_text(json.dumps(data))
    assert same(DecodeTrace.load(path), example())
    data["commits"][0]["kind"] = "undo"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"\['kind'\]: expected one of commit, replace, remask, got 'undo'"):
        DecodeTrace.load(path)


def test_what_tokens_are_called_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    trace = example()
    assert trace.token_ids() == [0, 1, 2, 3, 4, 5, 6, 7, 8, MASK]
    trace.name_tokens(lambda token: None if token == 3 else f"t{token}\n<\ud800")
    trace.width = 2
    trace.save(path)
    loaded = DecodeTrace.load(path)
    assert same(loaded, trace)
    assert loaded.symbols == {t: f"t{t}\n<\ud800" for t in (0, 1, 2, 4, 5, 6, 7, 8, MASK)}
    trace.name_tokens("abcdefghij")
    assert trace.symbols == dict(enumerate("abcdefghij"))
    bare, named = (DecodeTrace([[1, MASK]], MASK, "attn") for _ in range(2))
    named.name_tokens(str)
    assert bare == named  # the same was decoded


def test_render_by_its_own_symbols() -> None:
    trace = example()
    assert trace.render(0, until_step=0).plain == "⟨1⟩·⟨4⟩⟨2⟩·"
    trace.name_tokens("abcdefghij")
    assert trace.render(0, until_step=0).plain == "b·ec·"
    trace.width = 3
    assert trace.render(0).plain == "b g e\nc h"
    assert trace.render(0, "ABCDEFGHIJ", width=5).plain == "B G E C H"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"symbols": {"01": "a"}}, "symbols: expected token ids as keys, got '01'"),
        ({"symbols": {"-1": "a"}}, "symbols: expected token ids as keys, got '-1'"),
        ({"symbols": {"٣": "a"}}, "symbols: expected token ids as keys, got '٣'"),
        ({"symbols": {"9" * 5000: "a"}}, "symbols: expected token ids as keys, got '999"),
        ({"symbols": {"1": 1}}, r"\['symbols'\]\['1'\]: expected text, got 1"),
        ({"symbols": []}, r"\['symbols'\]: expected an object"),
        ({"width": 0}, r"\['width'\]: expected an integer >= 1 or null, got 0"),
        ({"width": True}, r"\['width'\]: expected an integer >= 1 or null, got True"),
    ],
)
def test_symbols_that_are_none(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    example().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        DecodeTrace.load(path)


def test_render_revisions() -> None:
    assert [style for _, style in spans(revised(), 0)] == [
        "dim",
        f"underline bold {step_colour(2, 2)}",
        f"underline bold {step_colour(2, 2)}",
        "dim",
        f"bold {step_colour(1, 2)}",
    ]
    assert spans(revised(), 0, until_step=1)[1:3] == [
        ("g", f"bold {step_colour(1, 2)}"),
        ("·", "underline grey50"),
    ]


def test_render_an_overwritten_token_on_the_way() -> None:
    trace = example()
    trace.commits.append(Commit(0, 2, 4, 3, NAN, NAN))
    assert spans(trace, 0, until_step=1)[4] == ("h", f"bold {step_colour(1, 2)}")


def test_render_to_a_terminal() -> None:
    console = Console(force_terminal=True, color_system="truecolor", width=40)
    with console.capture() as capture:
        console.print(example().render(0, SYMBOLS))
    red, green, blue = (int(step_colour(0, 1)[i : i + 2], 16) for i in (1, 3, 5))
    assert f"\x1b[1;38;2;{red};{green};{blue}me\x1b[0m" in capture.get()


def test_colours_go_from_blue_to_red() -> None:
    def channels(step: int, last: int) -> tuple[int, ...]:
        colour = step_colour(step, last)
        assert len(colour) == 7
        return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))

    red, green, blue = channels(0, 8)
    assert blue > green > red
    red, green, blue = channels(8, 8)
    assert red > green == blue
    red, green, blue = channels(4, 8)
    assert green == max(red, green, blue)
    assert len({step_colour(step, 30) for step in range(31)}) == 31
    assert step_colour(0, 0) == step_colour(0, 5)  # a run of one step
