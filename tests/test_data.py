"""The verb ``data``: one record, an exit code that tells of faults, progress in percent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from imgtool import data
from imgtool.console import Bar, Console
from imgtool.engine import Engine, Watch
from imgtool.engines.deblur.engine import ENGINE


def engine_with(record: Mapping[str, object], steps: int = 0, seen: list[Any] | None = None) -> Engine:
    def action(settings: Any, watch: Watch) -> Mapping[str, object]:
        for number in range(steps):
            watch.done(number + 1, steps)
        watch.say("half way")
        if seen is not None:
            seen.append(settings)
        return record

    return replace(ENGINE, actions={"check": action})


SETTINGS: Any = SimpleNamespace(threads=0, out="pairs")


@pytest.mark.parametrize(("faults", "code"), [([], 0), (["a.png: no partner"], 1)])
@pytest.mark.parametrize("with_json", [True, False])
def test_faults_decide_the_exit_code(
    capsys: pytest.CaptureFixture[str], faults: list[str], code: int, with_json: bool
) -> None:
    record = {"pairs": 3, "mean": float("nan"), "faults": faults}
    seen: list[Any] = []
    engine = engine_with(record, seen=seen)
    assert data.run(engine, "check", SETTINGS, Console(json=with_json)) == code
    assert seen == [SETTINGS]
    out, err = capsys.readouterr()
    assert "half way" in err
    if with_json:
        assert json.loads(out) == {"pairs": 3, "mean": None, "faults": faults}
    else:
        assert out == "pairs: 3\nmean: nan\n" + "".join(f"fault: {each}\n" for each in faults)


def test_people_read_short_lines(capsys: pytest.CaptureFixture[str]) -> None:
    floors = {"count": 30, "mean": 1.23456789012345}
    record = {
        "frames": 12345, "gain": {"red": {"5": 1.0, "50": 1234.5678}, "blue": {}}, "floors": floors,
        "none": None, "plots": ["a.png", "b.png"], "long": 2 * ["a" * 40], "far": float("inf"),
    }  # fmt: skip
    assert data.run(engine_with(record), "check", SETTINGS, Console()) == 0
    assert capsys.readouterr().out.splitlines() == [
        "frames: 12345", "gain:", "  red:", "    5: 1", "    50: 1235", "  blue: none",
        "floors:", "  count: 30", "  mean: 1.235", "none: none", "plots: a.png, b.png",
        "long:", "  " + "a" * 40, "  " + "a" * 40, "far: inf",
    ]  # fmt: skip


def test_people_read_a_list_of_records(capsys: pytest.CaptureFixture[str]) -> None:
    matrix = [[1.25, -0.123456, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 12345.6]]
    files = [
        {"input": "a.dng", "matrix": matrix, "crop": None},
        {"input": "b.dng", "levels": {"red": [1, 2]}},
    ]
    data.run(engine_with({"inputs": 2, "files": files}), "check", SETTINGS, Console())
    assert capsys.readouterr().out.splitlines() == [
        "inputs: 2", "files:", "  a.dng:", "    matrix: 1.25 -0.1235 0, 0 1 0, 0 0 12346", "    crop: none",
        "  b.dng:", "    levels:", "      red: 1, 2",
    ]  # fmt: skip


def test_progress_ends_at_100_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    advanced: list[float] = []
    monkeypatch.setattr(Bar, "advance", lambda self, n=1, **_: advanced.append(n))
    data.run(engine_with({}, steps=7), "check", SETTINGS, Console(quiet=True))
    assert sum(advanced) == 100
    assert min(advanced) >= 0


def test_the_plan_names_the_output() -> None:
    assert data.plan(ENGINE, "synth", SETTINGS) == {"action": "synth deblur", "output": "pairs"}
    assert data.plan(ENGINE, "check", SimpleNamespace()) == {"action": "check deblur"}  # type: ignore[arg-type]
    lone: Any = SimpleNamespace(alone=True)
    assert data.plan(ENGINE, "inspect", lone) == {"action": "inspect"}
