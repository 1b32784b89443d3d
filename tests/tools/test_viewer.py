"""The page of decode traces and ``attn-sampler trace``: data, what is refused, and the page in a browser."""

from __future__ import annotations

import contextlib
import html.parser
import json
import math
import os
import random
import threading
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from browser import Visit, launch, visit

from attn_sampler.bundled import load_task
from attn_sampler.cli import main
from attn_sampler.trace import Commit, DecodeTrace
from attn_sampler.viewer import page

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAN = math.nan
MASK = 9
AGAIN = "\N{MULTIPLICATION SIGN}"  # masked again
WORDS = ["The", " cat", " sat", " down", ".", " dog", "\n", " ", "", "[MASK]"]


def example() -> DecodeTrace:
    """Position 2 is masked again in the second step and written in the third, in which 3 is replaced."""
    trace = DecodeTrace(
        prompt=[[0, MASK, MASK, MASK, MASK], [7, 7, 0, MASK, MASK]],
        mask_token_id=MASK,
        policy="attn",
        commits=[
            Commit(0, 0, 2, 5, 1.25, 0.5),
            Commit(0, 0, 3, 2, 2.5, 0.625),
            Commit(1, 0, 3, 1, NAN, 0.1),
            Commit(0, 1, 1, 5, 0.5, 0.75),
            Commit(0, 1, 2, MASK, 0.25, 0.125, "remask"),
            Commit(0, 2, 2, 2, 0.125, 0.875),
            Commit(0, 2, 3, 3, math.inf, 0.9375, "replace"),
            Commit(0, 3, 4, 4, NAN, NAN),
        ],
        padding=[0, 2],
    )
    trace.name_tokens(WORDS)
    return trace


class Elements(html.parser.HTMLParser):
    """What a parser of HTML makes of a page: its elements, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts.append(data)


def data_of(text: str) -> Any:
    return json.loads(Elements(text).scripts[0])


# Its data.


def test_the_data_is_the_trace() -> None:
    assert data_of(page({"a.json": example()})) == {
        "traces": [
            {
                "name": "a.json",
                "policy": "attn",
                "mask": MASK,
                "symbols": {str(token): text for token, text in enumerate(WORDS) if token not in (6, 8)},
                "width": None,
                "sequences": [
                    {
                        "padding": 0,
                        "prompt": [0, MASK, MASK, MASK, MASK],
                        "commits": [
                            [0, 2, 5, 1.25, 0.5, "commit"],
                            [0, 3, 2, 2.5, 0.625, "commit"],
                            [1, 1, 5, 0.5, 0.75, "commit"],
                            [1, 2, MASK, 0.25, 0.125, "remask"],
                            [2, 2, 2, 0.125, 0.875, "commit"],
                            [2, 3, 3, None, 0.9375, "replace"],
                            [3, 4, 4, None, None, "commit"],
                        ],
                    },
                    {
                        "padding": 2,
                        "prompt": [7, 7, 0, MASK, MASK],
                        "commits": [[0, 3, 1, None, 0.1, "commit"]],
                    },
                ],
            }
        ]
    }


def test_several_traces_keep_their_order_and_names() -> None:
    traces = data_of(page({"b": DecodeTrace([], MASK, "random"), "a": example()}))["traces"]
    assert [(trace["name"], trace["policy"]) for trace in traces] == [("b", "random"), ("a", "attn")]
    assert traces[0]["sequences"] == []


HOSTILE = (
    "</script><script>document.title = 'owned'</script>",
    "<!--<script>",
    "]]><img src=x onerror=\"document.title = 'owned'\">",
    "{{data}}{{script}}&lt;\u2028\0\ud800\u202e",
    "'\"`\\",
)


def hostile() -> DecodeTrace:
    trace = DecodeTrace([[MASK, *range(5)]], MASK, HOSTILE[0], [Commit(0, 0, 0, 5, NAN, NAN)])
    trace.symbols = dict(enumerate((*HOSTILE, HOSTILE[2])))
    return trace


def test_nothing_in_a_trace_becomes_markup() -> None:
    text = page({HOSTILE[2]: hostile()})
    plain = Elements(page({"": DecodeTrace([], 0, "")}))
    assert Elements(text).tags == plain.tags
    assert Elements(text).scripts[1] == plain.scripts[1]
    (trace,) = data_of(text)["traces"]
    assert (trace["name"], trace["policy"]) == (HOSTILE[2], HOSTILE[0])
    assert [trace["symbols"][str(token)] for token in range(5)] == list(HOSTILE)


def test_what_a_page_cannot_show() -> None:
    with pytest.raises(ValueError, match="traces: expected at least one, got none"):
        page({})
    for trace in (DecodeTrace([[2**53]], 0, ""), DecodeTrace([[0]], 0, "", [Commit(0, 2**53, 0, 1, 0, 0)])):
        with pytest.raises(ValueError, match="traces: 'a': expected tokens and steps up to 9007199254740991"):
            page({"a": trace})


# The command.


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.json"
    example().save(path)
    return path


def test_view_writes_the_page_beside_the_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "view", str(file)]) == 0
    output = file.with_name("a.html")
    assert capsys.readouterr().out == f"wrote {output}\n"
    assert output.read_text(encoding="utf-8") == page({"a.json": DecodeTrace.load(file)})


def test_view_of_several_files(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: bool(opened.append(url)))
    other, output = tmp_path / "b" / "a.json", tmp_path / "page"
    other.parent.mkdir()
    bare = example()
    bare.symbols = {}
    bare.save(other)
    words = ["trace", "view", str(file), str(other), "--output", str(output), "--width", "2"]
    assert main([*words, "--open"]) == 1  # as no browser was found
    assert opened == [output.as_uri()]
    traces = data_of(output.read_text(encoding="utf-8"))["traces"]
    assert [trace["name"] for trace in traces] == [str(file), str(other)]
    assert [trace["width"] for trace in traces] == [2, 2]
    assert traces[1]["symbols"] == {}


def test_what_a_bundled_task_calls_its_tokens(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    demo = ["demo", "--task", "sudoku", "--policy", "pard", "--problems", "1", "--no-live", "--trace"]
    assert main([*demo, str(path)]) == 0
    trace = DecodeTrace.load(path)
    assert trace.symbols == dict(enumerate(load_task("sudoku").symbols))
    assert trace.width == 6
    data = json.loads(path.read_text())
    del data["symbols"], data["width"]
    (tmp_path / "old.json").write_text(json.dumps(data | {"format": 2}))
    for name in ("t", "old"):
        assert main(["trace", "view", str(tmp_path / f"{name}.json"), "--task", "sudoku"]) == 0
    new, old = (data_of((tmp_path / f"{name}.html").read_text())["traces"][0] for name in ("t", "old"))
    assert new | {"name": ""} == old | {"name": ""}


def test_what_a_tokenizer_calls_its_tokens(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="tokenizers are loaded with it")
    from hostile_files import make_checkpoint

    make_checkpoint(tmp_path / "model")
    assert main(["trace", "view", str(file), "--tokenizer", str(tmp_path / "model")]) == 0
    symbols = data_of(file.with_suffix(".html").read_text())["traces"][0]["symbols"]
    assert symbols == {"0": " [UNK]", "1": " [PAD]", "2": " [EOS]"} | {
        str(token): f" w{token - 3}" for token in (3, 4, 5, 7, 9)
    }


def test_show_draws_what_render_does(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "show", str(file)]) == 0
    shown = "attn, sequence 0, step 4 of 4\nThe dog sat down.\nattn, sequence 1, step 1 of 1\nThe cat·\n"
    assert capsys.readouterr().out == shown
    assert main(["trace", "show", str(file), "--sequence", "0", "--step", "2", "--width", "3"]) == 0
    assert capsys.readouterr().out == "attn, sequence 0, step 2 of 4\nThe  dog ·\n sat ·\n"
    assert main(["trace", "show", str(file), "--sequence", "0", "--step", "0"]) == 0
    assert capsys.readouterr().out == "attn, sequence 0, step 0 of 4\nThe····\n"


def test_show_sends_no_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    DecodeTrace([[0, 1]], 9, "\x1b[2J[bold]", symbols={0: "\x1b]0;owned\x07", 1: "\x9b1m\n[red]é"}).save(path)
    assert main(["trace", "show", str(path)]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head == r"\x1b[2J[bold], sequence 0, step 0 of 0"
    assert (first, second) == (r"\x1b]0;owned\x07\x9b1m", "[red]é")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["view"], "the following arguments are required: FILE"),
        (["view", "."], "argument FILE: expected a file, got '.'"),
        (["view", "not.json"], "argument FILE: not.json is not a decode trace ("),
        (["view", "a.json", "./a.json"], "argument FILE 2: expected another file than that of FILE 1"),
        (
            ["view", "a.json", "--output", "a.json"],
            "argument --output: expected another file than that of FILE",
        ),
        (["view", "a.html"], "argument --output: expected another file than that of FILE 1, got a.html"),
        (["view", "a.json", "--output", "no/such"], "argument --output: expected a file in a directory that"),
        (["view", "/dev/null"], "argument FILE: /dev/null is not a decode trace"),
        (["view", "pipe"], "argument --output: expected one where FILE is a device or a pipe, as pipe is"),
        (["view", "large.json"], "argument FILE: 'large.json': expected tokens and steps up to"),
        (
            ["view", "a.json", "--task", "sudoku"],
            "argument --task: sudoku has 7 tokens, and a.json has token 9",
        ),
        (["view", "a.json", "--task", "chess"], "argument --task: invalid choice: 'chess'"),
        (["view", "a.json", "--task", "sudoku", "--tokenizer", "x"], "not allowed with argument --task"),
        (["view", "a.json", "--width", "0"], "argument --width: expected an integer from 1 to 4096, got '0'"),
        (["show", "a.json", "b.json"], "unrecognized arguments: b.json"),
        (["show", "a.json", "--step", "-1"], "argument --step: expected an integer from 0"),
        (
            ["show", "a.json", "--sequence", "2"],
            "argument --sequence: expected one of the file's 2, from 0, got 2",
        ),
        ([], "the following arguments are required: picture"),
    ],
)
def test_a_mistake_is_named_and_nothing_written(
    words: list[str],
    message: str,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(file.parent)
    example().save("a.html")
    Path("not.json").write_text("{}")
    DecodeTrace([[2**60]], 0, "").save("large.json")
    os.mkfifo("pipe")
    if "pipe" in words:
        threading.Thread(target=example().save, args=["pipe"], daemon=True).start()
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        main(["trace", *words])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before


def test_files_and_tokenizers_that_are_not_there(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing"
    assert main(["trace", "view", str(missing)]) == 1
    assert capsys.readouterr().err == f"attn-sampler: [Errno 2] No such file or directory: '{missing}'\n"
    pytest.importorskip("transformers", reason="tokenizers are loaded with it")
    assert main(["trace", "show", str(file), "--tokenizer", str(missing)]) == 1
    assert capsys.readouterr().err == f"attn-sampler: {missing}: no such folder\n"


# In a browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launch() as browser:
        yield browser


class Shown(Visit):
    """What a test reads of a page."""

    def panels(self, step: int | None = None) -> list[list[tuple[str, str, set[str]]]]:
        """The text, the mark below it and the classes of each token of each panel; at a step, if given."""
        script = """(step) => {
            if (step !== null) show(step);
            const read = (token) => [token.textContent, token.dataset.step, [...token.classList]];
            return panels.map(({ element }) => [...element.querySelectorAll(".token")].map(read));
        }"""
        found = self.page.evaluate(script, step)
        return [[(text, mark, {*kinds} - {"token"}) for text, mark, kinds in panel] for panel in found]

    def tokens(self, panel: int = 0) -> list[tuple[str, str, set[str]]]:
        return self.panels()[panel]

    def marks(self, panel: int = 0) -> list[str]:
        return [mark for _, mark, _ in self.tokens(panel)]

    def step(self) -> str:
        return self.page.get_by_role("slider", name="Step").get_attribute("aria-valuetext") or ""

    def told(self) -> list[str] | None:
        """The lines of what is told of a token."""
        tip = self.page.get_by_role("tooltip")
        return [*tip.locator("p, dt, dd").all_text_contents()] if tip.is_visible() else None


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Any:
    """A function that opens a page of traces. In the end it has asked for nothing, and nothing failed."""
    with contextlib.ExitStack() as stack:
        visits: list[Visit] = []

        def opened(traces: dict[str, DecodeTrace], **options: Any) -> Shown:
            path = tmp_path / f"{len(visits)}.html"
            path.write_text(page(traces), encoding="utf-8")
            seen = stack.enter_context(visit(browser, path.as_uri(), **options))
            visits.append(seen)
            return Shown(seen.page, seen.requests, seen.errors)

        yield opened
        for number, seen in enumerate(visits):
            assert seen.requests == [(tmp_path / f"{number}.html").as_uri()]
            assert seen.errors == []


def test_the_keys_and_buttons_go_through_the_steps(opened: Any) -> None:
    shown = opened({"a.json": example()})
    assert shown.step() == "4 of 4"
    given, masked, written, revised, now = "given", "masked", "written", "revised", "now"
    final = [
        ("The", "", {given}),
        (" dog", "2", {written}),
        (" sat", "↻3", {written, revised}),
        (" down", "↻3", {written, revised}),
        (".", "4", {written, now}),
    ]
    assert shown.tokens() == final
    press = shown.page.keyboard.press
    press("Home")
    assert shown.step() == "0 of 4"
    assert shown.tokens() == [("The", "", {given}), *[("·", "", {masked})] * 4]
    press("ArrowRight")
    assert shown.tokens()[1:4] == [
        ("·", "", {masked}),
        (" dog", "1", {written, now}),
        (" sat", "1", {written, now}),
    ]
    shown.page.get_by_role("button", name="One step on").click()
    assert shown.tokens()[1:4] == [
        (" dog", "2", {written, now}),
        ("·", AGAIN + "2", {masked, revised, now}),
        (" sat", "1", {written}),
    ]
    status = shown.page.locator(".status").first
    assert status.text_content() == "step 2 of 4 · 2 of 4 filled · 1 revised"
    shown.page.get_by_role("button", name="One step back").click()
    assert shown.step() == "1 of 4"
    press("End")
    assert shown.tokens() == final
    shown.page.get_by_role("slider", name="Step").fill("1")
    assert shown.step() == "1 of 4"
    shown.page.get_by_role("slider", name="Step").focus()
    press("ArrowRight")  # once, though the slider has keys of its own
    assert shown.step() == "2 of 4"
    assert shown.marks(1) == ["", "1", ""]
    assert (
        shown.page.locator(".status").nth(1).text_content() == "done after step 1 · 1 of 2 filled · no scores"
    )


def test_it_plays_and_pauses(opened: Any) -> None:
    shown = opened({"a.json": example()})
    shown.page.get_by_role("combobox", name="Speed").select_option("50")
    shown.page.locator("h1").click()  # so that the space is not the list's
    shown.page.keyboard.press("Home")
    shown.page.keyboard.press("Space")
    shown.page.get_by_role("status").get_by_text("4 of 4").wait_for()
    shown.page.get_by_role("button", name="Play").wait_for()  # and no longer Pause
    shown.page.get_by_role("combobox", name="Speed").select_option("1")
    shown.page.get_by_role("button", name="Play").click()  # from the start again
    assert shown.step() == "0 of 4"
    shown.page.get_by_role("button", name="Pause").click()
    shown.page.get_by_role("button", name="Play").wait_for()


def test_what_is_told_of_a_token(opened: Any) -> None:
    shown = opened({"a.json": example()})
    assert shown.told() is None
    tokens = shown.page.locator(".panel").first.locator(".token")
    tokens.nth(2).hover()
    assert shown.told() == [
        *("“ sat”", "token", "2", "position", "2"),
        *("step", "3, written", "score", "0.125", "confidence", "0.875"),
        *("earlier", "“ dog” by step 1: score 1.25, confidence 0.5"),
        *("earlier", "masked by step 2: score 0.25, confidence 0.125"),
    ]
    shown.page.keyboard.press("ArrowLeft")
    shown.page.keyboard.press("ArrowLeft")  # under the pointer, as nothing moves
    told = shown.told() or []
    assert told[:7] == ["masked", "token", "9", "position", "2", "step", "2, masked again"]
    tokens.nth(3).hover()
    assert (shown.told() or [])[7:9] == ["score", "2.5, rank 1 of 2 in step 1"]
    shown.page.mouse.move(0, 0)
    assert shown.told() is None
    shown.page.keyboard.press("End")
    shown.page.locator("summary").focus()
    shown.page.keyboard.press("Tab")  # to the first token that the decoder wrote
    focused = shown.page.locator(":focus")
    assert focused.get_attribute("aria-label") == " dog, step 2"
    assert focused.get_attribute("aria-describedby") == "tip"
    assert (shown.told() or [])[:3] == ["“ dog”", "token", "5"]
    shown.page.keyboard.press("Tab")
    shown.page.keyboard.press("Tab")
    assert shown.page.locator(":focus").get_attribute("aria-label") == " down, step 3, revised"
    assert "3, put in the place of another" in (shown.told() or [])
    shown.page.keyboard.press("Tab")
    assert (shown.told() or [])[5:] == ["step", "4, written", "score", "none", "confidence", "none"]
    shown.page.keyboard.press("Escape")
    assert shown.told() is None


def test_bars_are_shares_of_the_largest_score(opened: Any) -> None:
    shown = opened({"a.json": example()})
    shown.page.keyboard.press("Home")
    shown.page.keyboard.press("ArrowRight")
    bars = "(token) => getComputedStyle(token, '::after').backgroundSize"
    tokens = shown.page.locator(".panel").first.locator(".token")
    assert [tokens.nth(i).evaluate(bars) for i in (1, 2, 3)] == ["100% 0px", "100% 8px", "100% 16px"]


@pytest.mark.parametrize("seed", range(3))
def test_every_step_is_what_the_trace_says(seed: int, opened: Any) -> None:
    rng = random.Random(seed)
    prompt = [[rng.choice([0, 1, MASK]) for _ in range(rng.randint(1, 12))] for _ in range(3)]
    commits = []  # in no order
    for sequence in rng.choices(range(3), k=60):
        kind = rng.choice(["commit", "replace", "remask"])
        token = MASK if kind == "remask" else rng.randrange(MASK)
        position = rng.randrange(len(prompt[sequence]))
        commits.append(Commit(sequence, rng.choice([0, 0, 1, 2, 5, 9]), position, token, 0.5, 0.5, kind))
    trace = DecodeTrace(prompt, MASK, "any", commits, [0, 0, rng.randint(0, len(prompt[2]))])
    trace.name_tokens(lambda token: f"t{token}")
    shown = opened({"a": trace})
    order = [*range(11), *rng.sample(range(11), 11)]  # back and forth, by any number of steps
    for step in order:
        for sequence, found in enumerate(shown.panels(step)):
            padding = trace.padding[sequence]
            tokens = trace.tokens(sequence, until_step=step - 1)[padding:]
            steps = trace.steps(sequence, until_step=step - 1)[padding:]
            revised = trace.revised(sequence, until_step=step - 1)
            assert [text for text, _, _ in found] == ["·" if t == MASK else f"t{t}" for t in tokens]
            marks = [mark.lstrip("↻") if "written" in kinds else "" for _, mark, kinds in found]
            assert marks == ["" if step is None else str(step + 1) for step in steps]
            assert {padding + i for i, (_, _, kinds) in enumerate(found) if "revised" in kinds} == {
                position for position in revised if position >= padding
            }


def test_rules_stand_side_by_side(opened: Any) -> None:
    traces = {
        "a.json": example(),
        "b.json": DecodeTrace([[0, MASK]], MASK, "pard", [Commit(0, 9, 1, 1, NAN, 1.0)]),
    }
    shown = opened(traces, viewport={"width": 1200, "height": 800})
    assert shown.step() == "10 of 10"
    headings = shown.page.locator("main h2, main h3").all_text_contents()
    assert headings == ["Sequence 0", "attn (a.json)", "pard (b.json)", "Sequence 1", "attn (a.json)"]
    left, right = (shown.page.locator(".panel").nth(i).bounding_box() for i in (0, 1))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    hue = "(token) => token.style.getPropertyValue('--hue')"
    hues = [shown.page.locator(f".panel >> nth={i} >> .written").last.evaluate(hue) for i in (0, 1)]
    assert hues == ["148.7", "0.0"]  # of steps 4 and 10 on one scale
    assert shown.tokens(1) == [("⟨0⟩", "", {"given"}), ("⟨1⟩", "10", {"written", "now"})]
    shown.page.get_by_role("combobox", name="Sequence").select_option("1")
    assert shown.page.locator(".panel").count() == 1
    assert shown.tokens() == [("The", "", {"given"}), (" cat", "1", {"written"}), ("·", "", {"masked"})]


def test_many_sequences_are_shown_one_at_a_time(opened: Any) -> None:
    shown = opened(
        {"a": DecodeTrace([[i, MASK] for i in range(13)], MASK, "attn", [Commit(12, 0, 1, 1, 1, 1)])}
    )
    assert shown.page.locator("h3").all_text_contents() == ["Sequence 0"]
    shown.page.get_by_role("combobox", name="Sequence").select_option("all")
    assert shown.page.locator("h3").count() == 13
    assert shown.tokens(12) == [("⟨12⟩", "", {"given"}), ("⟨1⟩", "1", {"written", "now"})]


def test_boards_and_lines(opened: Any) -> None:
    board = DecodeTrace([[*range(6)] * 2], MASK, "attn", symbols=dict(enumerate("abcdef")), width=6)
    text = DecodeTrace([[0, 6, 1, 7, 8]], MASK, "attn", symbols=dict(enumerate(WORDS)))
    shown = opened({"board": board, "text": text})
    places = [
        shown.page.locator(f".panel >> nth={panel} >> .token").evaluate_all(
            "(tokens) => tokens.map((token) => token.getBoundingClientRect().top)"
        )
        for panel in (0, 1)
    ]
    assert len({*places[0][:6]}) == len({*places[0][6:]}) == 1
    assert places[0][0] < places[0][6]
    assert places[1][0] == places[1][1] < places[1][2] == places[1][3]
    assert [token for token, _, _ in shown.tokens(1)] == ["The", "↵", " cat", "␣", ""]
    assert shown.page.get_by_role("button", name="Play").is_disabled()


def test_a_long_text_changes_only_where_a_step_does(opened: Any) -> None:
    count = 1500
    commits = [Commit(0, position // 3, position, 1, 1.0, 1.0) for position in range(count)]
    shown = opened({"a": DecodeTrace([[MASK] * count], MASK, "attn", commits)})
    assert shown.step() == "500 of 500"
    assert shown.page.locator(".part").count() == 6
    assert shown.page.locator(".ruler").last.text_content() == "positions 1280 to 1499"
    changed = shown.page.evaluate("""async () => {
        const seen = new Set();
        new MutationObserver((records) => records.forEach(({ target }) => seen.add(target)))
            .observe(document.querySelector("main"), { subtree: true, childList: true, attributes: true });
        show(499);
        await new Promise((done) => setTimeout(done));
        return seen.size;
    }""")
    assert changed == 7  # three of step 500, three of step 499, and the status


def test_a_hostile_trace_is_only_text(opened: Any) -> None:
    shown = opened({HOSTILE[2]: hostile()})
    assert "owned" not in shown.page.title().removeprefix(HOSTILE[0])
    assert shown.page.title() == f"{HOSTILE[0]}: decoding, step by step"
    texts = [text for text, _, _ in shown.tokens()]
    assert texts[1:4] == list(HOSTILE[:3])
    assert "{{data}}{{script}}&lt;" in texts[4]
    assert texts[0] == HOSTILE[2]
    shown.page.locator("main .token").first.hover()
    assert (shown.told() or [])[0] == f"“{HOSTILE[2]}”"
    assert shown.page.locator("img").count() == 0
    assert shown.page.evaluate("document.scripts.length") == 2


def test_dark_narrow_and_printed(opened: Any) -> None:
    script = "getComputedStyle(document.body).backgroundColor"
    light = opened({"a.json": example()}, color_scheme="light")
    dark = opened({"a.json": example()}, color_scheme="dark", viewport={"width": 380, "height": 700})
    assert light.page.evaluate(script) == "rgb(255, 255, 255)"
    assert dark.page.evaluate(script) == "rgb(21, 23, 27)"
    assert dark.page.evaluate("document.documentElement.scrollWidth") == 380
    dark.page.locator(".token").last.hover()
    box = dark.page.get_by_role("tooltip").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 380
    light.page.emulate_media(media="print")
    assert not light.page.get_by_role("button", name="Play").is_visible()
    assert light.page.get_by_text("written in step 3").is_visible()


def test_every_control_has_a_name(opened: Any) -> None:
    shown = opened({"a.json": example()})
    roles = shown.page.locator("body").aria_snapshot()
    for name in (
        *('group "Steps"', 'button "Play"', 'button "One step back"', 'button "One step on"'),
        *('slider "Step"', 'combobox "Speed"', 'combobox "Sequence"', 'list "Legend"'),
        *('heading "attn (a.json)"', 'list "Sequence 0, positions 0 to 4"', 'listitem "dog, step 2"'),
    ):
        assert name in roles
