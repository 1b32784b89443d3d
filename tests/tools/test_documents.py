"""Files are read with a clear error for what they should not hold, and written whole or not at all."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from attn_sampler import documents
from attn_sampler.documents import ANYTHING, COUNT, NUMBER, TEXT, check_shape, parse_json, read_text
from attn_sampler.results import Results
from attn_sampler.trace import Commit, DecodeTrace


def test_what_was_there_stays_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    documents.write(path, "before")

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*file'"):
        documents.write(path, "after")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "before"
    with pytest.raises(FileNotFoundError, match="missing"):
        documents.write(tmp_path / "missing" / "file", "")


def test_a_link_and_the_mode_stay(tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_text("before")
    path.chmod(0o640)
    link.symlink_to("file")
    documents.write(link, "é\udcff")
    assert link.is_symlink()
    assert path.read_bytes() == "é?".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    documents.write(tmp_path / "new", b"")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~mask


def test_a_device_is_written_to_and_not_replaced_or_read() -> None:
    documents.write(os.devnull, "text")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    with pytest.raises(ValueError, match="expected a file, got a device"):
        read_text(os.devnull)


def test_text_with_and_without_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in ("é\n", "\ufeffé\n"):
        path.write_text(content, encoding="utf-8")
        assert read_text(path) == "é\n"
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="expected text in UTF-8: invalid start byte"):
        read_text(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": {"b": 1, "c": 2, "b": 3}}', "the key 'b' stands twice"),
        ("", "Expecting value"),
        ("9" * 5000, "4300 digits"),
    ],
)
def test_what_is_no_json(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"n": 0, "rows": []}, None),
        ({"n": 0, "rows": [{"x": 1, "y": -2.5}], "text": "", "any": None}, None),
        ([], r"the document: expected an object, got \[\]"),
        ({"n": 0}, "the document: expected the key 'rows', which is missing"),
        ({"n": 0, "rows": [], "more": 1}, "the document: got the key 'more', which is not known"),
        ({"n": True, "rows": []}, r"the document\['n'\]: expected an integer >= 0, got True"),
        ({"n": 1.0, "rows": []}, "expected an integer >= 0, got 1.0"),
        ({"n": -1, "rows": []}, "expected an integer >= 0, got -1"),
        ({"n": 1 << 63, "rows": []}, "expected an integer >= 0, got 9223372036854775808"),
        ({"n": 0, "rows": {}}, r"the document\['rows'\]: expected a list, got {}"),
        (
            {"n": 0, "rows": [{"x": 0}, {"x": float("nan")}]},
            r"\['rows'\]\[1\]\['x'\]: expected a finite number",
        ),
        ({"n": 0, "rows": [{"x": 10**400}]}, "expected a finite number, got 1000"),
        ({"n": 0, "rows": [], "text": None}, "expected text, got None"),
    ],
)
def test_shapes(value: Any, message: str | None) -> None:
    shape = {"n": COUNT, "rows": [{...: NUMBER}], "text?": TEXT, "any?": ANYTHING}
    if message is None:
        check_shape(value, shape)
        return
    with pytest.raises(ValueError, match=message):
        check_shape(value, shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"commits": [Commit(1, 0, 0, 1, 0.0, 0.0)]}, "expected a position of the prompts, got Commit"),
        ({"commits": [Commit(0, 0, 2, 1, 0.0, 0.0)]}, "expected a position of the prompts, got Commit"),
        ({"commits": [Commit(0, 0, -1, 1, 0.0, 0.0)]}, "expected an integer >= 0, got -1"),
        ({"padding": [0, 0]}, "padding: expected one for each of 1 prompts, got 2"),
        ({"padding": [3]}, "padding: expected at most the 2 positions, got 3"),
        ({"prompt": [1, 2]}, "expected a list, got 1"),
    ],
)
def test_a_trace_at_odds_with_itself(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    DecodeTrace(**{"prompt": [[5, 9]], "mask_token_id": 9, "policy": "attn", **change}).save(path)
    with pytest.raises(ValueError, match=rf"trace\.json is not a decode trace \(.*{message}"):
        DecodeTrace.load(path)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"a": {"right": [1], "passes": [2, 3]}},
            r"rules 'a': expected as many values of each .*got \[1, 2\]",
        ),
        ({"a": {"right": [1] * 3, "passes": [1] * 3}}, r"at most 2, got \[3\]"),
        ({"a": {"right": [2], "passes": [1]}}, "expected 1 or 0, got 2"),
        ({"a": {"passes": [1]}}, "expected the key 'right'"),
        ({"a": {"right": [1], "passes": [1], "task": [1]}}, "rules 'a': got a measure called task"),
        (
            {f"attn:{name}=all": {"right": [], "passes": []} for name in ("rows", "query_rows")},
            "task 'toy': one of its rules is there by its old name too",
        ),
    ],
)
def test_results_at_odds_with_themselves(rules: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    cell = {"problems": 2, "fingerprint": "", "model": "", "rules": rules, "orders": {}}
    path.write_text(json.dumps({"tasks": {"toy": cell}}))
    with pytest.raises(ValueError, match=rf"results\.json: holds no results of an evaluation: .*{message}"):
        Results(path)
