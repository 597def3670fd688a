"""The console: results on standard output, words on standard error, JSON that any reader takes."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imgtool.console import Console
from imgtool.errors import ImgtoolError


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_words_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(verbose=True)
    console.say("hello")
    console.detail("more")
    console.warn("odd")
    console.error(ImgtoolError("broken", "mend it"), "photo.jpg")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "hello",
        "more",
        "warning: odd",
        "error: photo.jpg: broken",
        "hint: mend it",
    ]


def test_quiet_keeps_warnings_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True, verbose=True)
    console.say("hello")
    console.detail("more")
    console.warn("odd")
    console.error(ImgtoolError("broken"))
    assert capsys.readouterr().err.splitlines() == ["warning: odd", "error: broken"]


def test_details_need_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    Console().detail("more")
    assert capsys.readouterr() == ("", "")


def test_result_is_text_or_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    Console().result({"a": 1}, "a is 1")
    Console().result({"a": 1})
    assert capsys.readouterr().out == "a is 1\n"
    Console(json=True).result({"a": "x\ny", "b": "é"}, "unused")
    out, err = capsys.readouterr()
    assert (json.loads(out), out.count("\n"), err) == ({"a": "x\ny", "b": "é"}, 1, "")


def test_json_takes_what_verbs_have(capsys: pytest.CaptureFixture[str]) -> None:
    third = 1 / 3
    record: dict[str, Any] = {
        "path": Path("a") / "b.png",
        "float": third,
        "nan": float("nan"),
        "inside": [float("inf"), {"deep": -float("inf")}],
        "float32": np.float32(0.5),
        "float64": np.float64(third),
        "int64": np.int64(7),
        "bool": np.bool_(True),
        "array": np.array([[1.0, np.nan]]),
        "none": None,
        "true": True,
        "tuple": (1, "x"),
    }
    Console(json=True).result(record)
    assert json.loads(capsys.readouterr().out) == {
        "path": str(Path("a/b.png")),
        "float": third,
        "nan": None,
        "inside": [None, {"deep": None}],
        "float32": 0.5,
        "float64": third,
        "int64": 7,
        "bool": True,
        "array": [[1.0, None]],
        "none": None,
        "true": True,
        "tuple": [1, "x"],
    }


def test_names_that_cannot_be_encoded_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    Console().result({}, "caf\u00e9 \udcff")
    assert raw.getvalue() == b"caf\\xe9 \\udcff\n"


def test_table_only_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    Console(json=True).table("Speed", ["what", "seconds"], [["net", 1.5]])
    assert capsys.readouterr() == ("", "")
    Console().table("Speed", ["what", "seconds"], [["net [bold]", 1.5]])
    out, err = capsys.readouterr()
    assert all(word in out for word in ("Speed", "what", "seconds", "net [bold]", "1.5"))
    assert (err, "\x1b" in out) == ("", False)


def test_binary_goes_out_untouched_and_results_step_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, words = io.BytesIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="utf-8"))
    monkeypatch.setattr(sys, "stderr", words)
    console = Console()
    console.binary(b"\x89PNG\r\n\x00\xff")
    console.result({}, "written")
    assert raw.getvalue() == b"\x89PNG\r\n\x00\xff"
    assert "written" in words.getvalue()


def test_no_binary_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    with pytest.raises(ImgtoolError, match="terminal") as caught:
        Console().binary(b"x")
    assert caught.value.code == 2


def test_no_bar_where_standard_error_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    assert not console.live
    with console.progress(3, "train") as bar:
        bar.advance(loss="0.1")
        bar.update("text")
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal_leaves_results_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, out = Terminal(), io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", out)
    console = Console(json=True)
    assert console.live
    with console.progress(4, "train [x]") as bar:
        bar.advance(4, loss="0.125")
        console.result({"epoch": 1})
        console.say("one epoch")
    assert out.getvalue() == '{"epoch": 1}\n'
    assert all(words in screen.getvalue() for words in ("train [x]", "4/4", "loss 0.125", "one epoch"))
    assert not Console(quiet=True).live
    monkeypatch.setenv("TERM", "dumb")
    assert not console.live
