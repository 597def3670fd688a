"""Searches: what a space may say, who may work on what, limits before training, nothing trained twice."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy import TOY, rows, toy

from imgtool import cli, engines, files, plots, sheets, track, train
from imgtool.console import Console
from imgtool.engine import Engine
from imgtool.errors import DONE, FAILED, USAGE, ImgtoolError
from imgtool.search import board, campaign, gauge, samplers, space, task
from imgtool.search.board import Board
from imgtool.search.cost import Cost, Limits, cpu_times
from imgtool.search.space import Choice, Span
from imgtool.settings import Train
from imgtool.settings.sources import make, table
from imgtool.train import searching
from imgtool.train.crew import Crew

FILTER = engines.settings("filter").Train
needs_optuna = pytest.mark.skipif(find_spec("optuna") is None, reason="needs imgtool[search]")
needs_ax = pytest.mark.skipif(find_spec("ax") is None, reason="needs imgtool[search-ax]")
needs_posix = pytest.mark.skipif(os.name != "posix", reason="limits how large files may be")


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pictures take time, and have tests of their own."""
    for name in ("curves", "front"):
        monkeypatch.setattr(plots, name, lambda *_, **__: None)
    monkeypatch.setattr(sheets, "sheet", lambda *_, **__: None)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- the space ---


def written(folder: Path, text: str) -> Path:
    path = folder / "space.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "words", "hint"),
    [
        ("depth = {low = 2", "is not valid TOML", "search.<engine>"),
        ("[filter]\nlr = [1e-3, 1e-2]", r"unknown table \[filter\]", "search"),
        (
            "[search.fliter]\nlr = [1e-3, 1e-2]",
            r"unknown table \[search.fliter\]",
            "did you mean search.filter?",
        ),
        ("[search.deblur]\nlr = [1e-3, 1e-2]", "has no space for filter", "write [search.filter]"),
        ("search = 3", "search in .* is not a table", "write [search.<engine>]"),
    ],
)
def test_a_file_that_is_no_space_is_refused(tmp_path: Path, text: str, words: str, hint: str) -> None:
    with pytest.raises(ImgtoolError, match=words) as caught:
        space.read(written(tmp_path, text), "filter", FILTER)
    assert caught.value.code == USAGE
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("line", "words", "hint"),
    [
        ("widht = [4, 8]", "unknown setting widht", "did you mean width?"),
        ("threads = [1, 2]", "threads is no setting to search", "training"),
        ("max_ms = [1.0, 2.0]", "max_ms is no setting to search", "training"),
        ("lr = 0.1", "lr is neither a list of choices nor a range", "lr = ["),
        ("arch = ['fold']", "arch needs two different choices", "flag"),
        ("width = [4, 8, 4]", "width needs two different choices", "flag"),
        ("arch = ['fold', 'flod']", "search.filter: arch: input should be 'fold'", "arch: Network"),
        ("arch = {low = 1, high = 2}", "arch: is no number", "arch = ["),
        ("lr = {low = 1e-4, hihg = 1e-2}", "lr: unknown key hihg", "did you mean high?"),
        ("lr = {low = 1e-4}", "lr: high is missing", "low = ..."),
        ("lr = {low = '1', high = 2}", "lr: low is '1'", "give a number"),
        ("lr = {low = inf, high = 2}", "lr: low is inf", "give a number"),
        ("width = {low = 4.5, high = 8}", "width: low is 4.5", "give a whole number"),
        ("width = {low = true, high = 8}", "width: low is True", "give a whole number"),
        ("lr = {low = 1e-2, high = 1e-4}", "lr: low 0.01 is not below high 0.0001", "two ends"),
        ("lr = {low = 1e-4, high = 1e-2, log = 1}", "lr: log is true or false", "logarithm"),
        ("ema = {low = 0, high = 0.9, log = true}", "ema: log needs a low above 0", "raise low"),
        ("lr = {low = 0.1, high = 1, log = true, step = 0.1}", "lr: log and step exclude", "choices"),
        ("width = {low = 4, high = 8, step = 9}", "width: step 9 does not fit", "smaller"),
        (
            "width = {low = 4, high = 512}",
            "search.filter: width: input should be less than or equal to 256",
            "",
        ),
    ],
)
def test_a_range_or_choice_that_does_not_fit_names_file_and_key(
    tmp_path: Path, line: str, words: str, hint: str
) -> None:
    path = written(tmp_path, f"[search.filter]\n{line}")
    with pytest.raises(ImgtoolError, match=words) as caught:
        space.read(path, "filter", FILTER)
    assert caught.value.code == USAGE
    assert str(path) in caught.value.what
    assert hint in caught.value.hint


def test_a_range_keeps_to_the_multiples_of_its_setting(tmp_path: Path) -> None:
    deblur = engines.settings("deblur").Train
    with pytest.raises(ImgtoolError, match="crop: must be a multiple of 16") as caught:
        space.read(written(tmp_path, "[search.deblur]\ncrop = {low = 32, high = 64}"), "deblur", deblur)
    assert "step = 16" in caught.value.hint
    path = written(tmp_path, "[search.deblur]\ncrop = {low = 32, high = 64, step = 16}")
    assert space.read(path, "deblur", deblur) == {"crop": Span(32, 64, whole=True, step=16)}


def test_no_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ImgtoolError, match="no such search space") as caught:
        space.read(tmp_path / "none.toml", "filter", FILTER)
    assert caught.value.code == USAGE


def test_a_space_is_written_as_it_is_read(tmp_path: Path) -> None:
    text = (
        "[search.filter]\nwidth = {low = 4, high = 18, step = 4}\n"
        "lr = {low = 1e-4, high = 1e-2, log = true}\n"
        "synthetic = {low = 0, high = 1}\nflip = [true, false]\nloss = ['l1', 'l2']\n"
    )
    found = space.read(written(tmp_path, text), "filter", FILTER)
    assert found["width"] == Span(4, 18, whole=True, step=4)
    assert found["flip"] == Choice((True, False))
    again = written(tmp_path, space.to_toml(found, "filter"))
    assert space.read(again, "filter", FILTER) == found
    assert space.in_words(found)["lr"] == "0.0001 to 0.01 by its logarithm"


def test_numbers_are_those_that_a_span_holds() -> None:
    stepped = Span(4, 18, whole=True, step=4)
    assert [stepped.nearest(each) for each in (-3.0, 5.9, 6.1, 15.0, 40.0)] == [4, 4, 8, 16, 16]
    assert stepped.bounds() == pytest.approx((4 - 4 * 0.499, 16 + 4 * 0.499))
    assert Span(0.5, 2).nearest(1.23456) == 1.235
    assert Span(0.99, 0.99995).nearest(0.99995) == 0.99995  # rounded, it would be above the span
    assert type(Span(1, 5, whole=True).nearest(2.7)) is int
    assert space.taken({"a": Span(1, 5, whole=True), "b": Choice(("x", "y"))}, {"a": 2.7, "b": "y"}) == {
        "a": 3, "b": "y",
    }  # fmt: skip


@pytest.mark.parametrize("engine", ["lens", "deblur", "isp", "filter"])
def test_the_spaces_that_ship_fit_their_engines(engine: str) -> None:
    found = space.read(space.shipped(engine), engine, engines.settings(engine).Train)
    assert "lr" in found
    assert 4 <= len(found) <= 8


# --- limits ---


def test_limits_are_told_in_words_and_by_how_much() -> None:
    limits = Limits(10, 0, 1000)
    assert limits.missed(Cost(9, 5000, parameters=1000)) == ""
    assert limits.missed(Cost(11, 1, measured=False)) == "at least 11 ms, over 10 ms"
    assert limits.missed(Cost(1, 1, parameters=1001)) == "1,001 parameters, over 1,000"
    assert Limits(mb=5).missed(Cost(1, 6)) == "6 MB, over 5 MB"
    assert limits.excess(Cost(12, 7, parameters=900)) == {"cpu_ms": 2, "parameters": -100}
    assert (str(limits), str(Limits())) == ("10 ms, 1,000 parameters", "none")


def test_what_is_hopeless_is_called_once() -> None:
    calls: list[int] = []

    def work() -> None:
        calls.append(sum(range(20_000)))

    assert len(cpu_times(work, 1e-6, rounds=3)) == 1
    assert len(calls) == 1
    assert len(cpu_times(work, 0, rounds=1)) >= 5


# --- who works on what ---


def test_what_one_process_holds_no_other_gets(tmp_path: Path) -> None:
    one, two = Board(tmp_path), Board(tmp_path)
    assert one.claim("a")
    assert one.claim("a")
    assert not two.claim("a")
    one.release("a")
    assert two.claim("a")
    assert not one.claim("a")


def owned(folder: Path, **owner: Any) -> Path:
    path = folder / board.FOLDER / "a.claim-0"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(owner))
    return path


def test_what_a_dead_process_held_is_taken_over_once(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    owned(tmp_path, host=socket.gethostname(), pid=child.pid, token="x")
    one, two = Board(tmp_path), Board(tmp_path)
    assert one.claim("a")
    assert not two.claim("a")


def test_a_process_of_the_same_number_is_not_the_one_before(tmp_path: Path) -> None:
    owned(tmp_path, host=socket.gethostname(), pid=os.getpid(), token="of the one before")
    assert Board(tmp_path).claim("a")


def test_a_process_elsewhere_counts_as_dead_when_its_heart_stands_still(tmp_path: Path) -> None:
    path = owned(tmp_path, host="elsewhere", pid=1, token="x")
    one = Board(tmp_path)
    assert not one.claim("a")
    os.utime(path, (time.time() - 2 * board.STALE,) * 2)
    assert one.claim("a")


@pytest.mark.skipif(os.name != "posix", reason="asks the system for a process by its number")
def test_a_process_here_lives_as_long_as_the_system_says(tmp_path: Path) -> None:
    """A laptop that slept is awake again, and its processes are too."""
    path = owned(tmp_path, host=socket.gethostname(), pid=os.getppid(), token="x")
    os.utime(path, (time.time() - 2 * board.STALE,) * 2)
    assert not Board(tmp_path).claim("a")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_a_process_that_got_the_number_of_a_dead_one_is_another(tmp_path: Path) -> None:
    owned(tmp_path, host=socket.gethostname(), pid=os.getppid(), born="long ago", token="x")
    assert Board(tmp_path).claim("a")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_what_a_killed_process_held_is_free_before_its_parent_asks(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from imgtool.search.board import Board\n"
    code += "Board(Path(sys.argv[1])).claim('a'); print(flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert not Board(tmp_path).claim("a")
        child.kill()
        child.stdout.read()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert Board(tmp_path).claim("a")


def test_a_heart_beats_on_after_a_fault_of_the_file_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults, touch = [OSError("stale handle")] * 3, os.utime

    def utime(path: Path, *more: Any) -> None:
        if faults:
            raise faults.pop()
        touch(path, *more)

    monkeypatch.setattr(board, "BEAT", 0.005)
    with Board(tmp_path) as one:
        monkeypatch.setattr(board.os, "utime", utime)
        assert one.claim("a")
        path = tmp_path / board.FOLDER / "a.claim-0"
        ends = time.monotonic() + 120
        for _ in range(2):
            touch(path, (0, 0))
            while path.stat().st_mtime == 0 and time.monotonic() < ends:
                time.sleep(0.005)
        assert path.stat().st_mtime > 0
        assert not faults


def test_who_was_taken_for_dead_holds_nothing_any_more(tmp_path: Path) -> None:
    one = Board(tmp_path)
    assert one.claim("a")
    assert one.holds("a")
    (tmp_path / board.FOLDER / "a.claim-1").write_text("{}")
    assert not one.holds("a")


def test_a_place_is_never_seen_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(
        board.os, "link", lambda blank, path: seen.append(f"{path.name}: {blank.read_text()}")
    )
    assert Board(tmp_path).admit(4, 1)
    assert seen == ["training-000: 4"]
    assert not [path for path in (tmp_path / board.FOLDER).iterdir() if path.name.startswith(".")]


def test_a_file_system_without_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(board.os, "link", link)
    one, two = Board(tmp_path), Board(tmp_path)
    assert (one.claim("a"), two.claim("a")) == (True, False)
    assert (one.admit(4, 1), two.admit(7, 1), two.admitted(4)) == (True, False, True)


@contextmanager
def full_disk(room: int = 0) -> Iterator[None]:
    """No file gets larger than so many bytes."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@needs_posix
def test_a_full_disk_leaves_no_place_taken(tmp_path: Path) -> None:
    one = Board(tmp_path)
    with full_disk(), pytest.raises(ImgtoolError, match=r"cannot write .*training-000: file too large"):
        one.admit(4, 1)
    assert one.started() == 0
    assert one.admit(7, 1)


def test_no_more_are_admitted_than_were_asked_for(tmp_path: Path) -> None:
    one, two = Board(tmp_path), Board(tmp_path)
    assert [one.admit(4, 2), two.admit(7, 2), one.admit(9, 2)] == [True, True, False]
    assert two.admit(4, 2)
    assert (one.started(), one.admitted(7), one.admitted(9)) == (2, True, False)
    assert one.admit(9, 3)
    assert [Board(tmp_path).worker() for _ in range(3)] == [0, 1, 2]


# --- a search, in this process ---


def toys() -> Engine:
    """The toy, whose network costs 100 ms for each unit of dropout."""

    def described(settings: Any) -> task.Task:
        return task.Task(
            {"drop": Span(0, 0.8), "lr": Span(1e-3, 1e-1, log=True)},
            lambda trial: {"drop": trial.drop},
            lambda net, limits: Cost(100 * net["drop"], 50, parameters=7),
            "by the toy",
        )

    return dataclasses.replace(TOY, search=described)


def found(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / board.TRIALS).read_text().splitlines()]


def told(capsys: pytest.CaptureFixture[str]) -> Mapping[str, Any]:
    record: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return record


def searched(engine: Engine, settings: Train) -> int:
    return train.run(engine, settings, Console(json=True, quiet=True))


class Listed:
    """Proposes what it is given, in its order."""

    def __init__(self, *points: tuple[float, float], first: int = 0) -> None:
        self._left = iter([(at, {"drop": drop, "lr": lr}) for at, (drop, lr) in enumerate(points, first)])
        self.told: list[tuple[int, str]] = []

    def ask(self) -> tuple[int, space.Point] | None:
        return next(self._left, None)

    def tell(self, row: dict[str, Any]) -> None:
        self.told.append((row["trial"], row["status"]))


@pytest.fixture
def propose(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let a search be proposed points from a list, and return who proposes them."""
    monkeypatch.setattr(samplers, "check", lambda name, parallel: None)

    def proposing(*points: tuple[float, float], first: int = 0) -> Listed:
        sampler = Listed(*points, first=first)
        monkeypatch.setattr(searching, "_sampler", lambda *_: sampler)
        return sampler

    return proposing


GOOD, WORSE, BAD = (0.1, 0.01), (0.2, 0.02), (0.1, 0.1)
"""Points of the toys: dropout, which costs, and a learning rate; ``failing`` fails with that of the last."""


def failing(fault: ImgtoolError) -> Engine:
    def loss(net: Any, batch: Any, settings: Train) -> Any:
        if settings.lr > 0.05:
            raise fault
        return TOY.loss(net, batch, settings)

    return dataclasses.replace(toys(), loss=loss)


DIVERGED = ImgtoolError("not finite", "go on from the last good weights with a lower --lr")


def test_failures_in_a_row_end_a_go_and_not_the_search(
    tmp_path: Path, propose: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = failing(DIVERGED)
    propose(BAD, GOOD, BAD, BAD, BAD, WORSE)
    assert train.run(engine, toy(tmp_path, search=6), Console(json=True)) == DONE
    said = capsys.readouterr()
    record = json.loads(said.out.splitlines()[-1])
    assert (record["trained"], record["failed"], record["best"]["trial"]) == (1, 4, 1)
    assert (
        f"stopped after 5 candidates: too many fail; try other candidates by --resume {tmp_path}" in said.err
    )
    sampler = propose(WORSE, first=5)
    assert searched(engine, toy(tmp_path, resume=tmp_path)) == DONE
    assert sampler.told[-1] == (5, "trained")
    assert told(capsys)["trained"] == 2


def test_where_none_was_trained_failures_in_a_row_are_an_error(tmp_path: Path, propose: Any) -> None:
    engine = failing(DIVERGED)
    propose(BAD, BAD, BAD, GOOD)
    with pytest.raises(ImgtoolError, match="3 trainings failed in a row, the last one: not finite") as caught:
        searched(engine, toy(tmp_path, search=4))
    assert caught.value.code == FAILED
    assert caught.value.hint == (
        f"begin anew with a narrower --space, or try other candidates by --resume {tmp_path}"
    )
    propose(GOOD, first=3)
    assert searched(engine, toy(tmp_path, resume=tmp_path)) == DONE
    assert [row["status"] for row in found(tmp_path)] == ["failed"] * 3 + ["trained"]


def test_what_was_asked_wrongly_is_tried_once_more(tmp_path: Path, propose: Any) -> None:
    """Photos may have been put where they belong; or it is this candidate that asks for what there is not."""
    fault = ImgtoolError("crops too small", "", USAGE)
    propose(BAD, GOOD)
    with pytest.raises(ImgtoolError) as caught:
        searched(failing(fault), toy(tmp_path, search=2))
    assert caught.value is fault
    propose(GOOD, first=1)
    assert searched(failing(fault), toy(tmp_path, resume=tmp_path)) == DONE
    assert [(row["status"], row["why"]) for row in found(tmp_path)] == [
        ("failed", "crops too small"), ("trained", ""),
    ]  # fmt: skip


def test_a_tracker_that_does_not_answer_spends_no_candidate(
    tmp_path: Path, propose: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def begin(*_: object) -> None:
        raise track.Unreachable("no server answers", "start one")

    propose(GOOD, WORSE)
    with monkeypatch.context() as away:
        away.setattr(track, "begin", begin)
        with pytest.raises(track.Unreachable):
            searched(toys(), toy(tmp_path, search=2))
    assert [row["status"] for row in found(tmp_path)] == ["training"]
    propose(WORSE, first=1)
    assert searched(toys(), toy(tmp_path, resume=tmp_path)) == DONE
    record = told(capsys)
    assert (record["trained"], record["failed"]) == (2, 0)


@pytest.mark.parametrize(("limit", "trained"), [(60, 0), (20, 3)], ids=["it is within", "others are"])
def test_a_search_that_found_nothing_goes_on_with_higher_limits(
    tmp_path: Path, propose: Any, monkeypatch: pytest.MonkeyPatch, limit: int, trained: int
) -> None:
    monkeypatch.setattr(campaign, "PROPOSALS", 3)
    propose(*[(0.5, 0.01)] * 9)
    with pytest.raises(ImgtoolError, match=r"none of 3 .* the least that they cost is 50 ms, 50 MB, 7 para"):
        searched(toys(), toy(tmp_path, search=1, max_ms=10))
    sampler = propose((0.15, 0.01), first=3)
    assert searched(toys(), toy(tmp_path, resume=tmp_path, max_ms=limit)) == DONE
    assert [row["trial"] for row in found(tmp_path) if row["status"] == "trained"] == [trained]
    assert ((0, "rejected") in sampler.told) == (trained == 3)


def test_a_space_that_is_used_up_ends_a_search(
    tmp_path: Path, propose: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    propose(GOOD, WORSE)
    for given in (toy(tmp_path, search=4), toy(tmp_path, resume=tmp_path)):
        assert train.run(toys(), given, Console(json=True)) == DONE
        said = capsys.readouterr()
        assert json.loads(said.out.splitlines()[-1])["trained"] == 2
        assert "stopped after 2 candidates: too few are within the limits, or new" in said.err


def trained(trial: int, ms: float, score: float) -> dict[str, Any]:
    return {
        "trial": trial, "status": "trained", "why": "", "settings": {"drop": 0.1}, "structure": str(trial),
        "cpu_ms": ms, "mb": 1.0, "measured": True, "parameters": 7, "metric": "psnr", "score": score,
        "scores": {"psnr": score}, "weights": "", "seconds": 0.0, "point": {},
    }  # fmt: skip


def test_the_front_holds_what_nothing_beats_within_the_limits_of_now(tmp_path: Path) -> None:
    settings, engine = toy(tmp_path, search=4, max_ms=40), toys()
    assert engine.search
    crew = Crew(engine, settings, tmp_path, Console(quiet=True))
    search = campaign.Search(engine, settings, crew, engine.search(settings))
    for trial, (ms, score) in enumerate([(10, 20), (20, 20), (30, 25), (50, 99)]):
        search.board.save(trained(trial, ms, score))  # the last one when the limit was higher
    record = search.report()
    assert [each["trial"] for each in record["front"]] == [0, 2]
    assert record["best"]["trial"] == 2


@needs_optuna
@pytest.mark.slow
def test_what_is_over_a_limit_is_never_trained(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert searched(toys(), toy(tmp_path, search=6, max_ms=40)) == DONE
    out, err = capfd.readouterr()
    record = json.loads(out.splitlines()[-1])
    assert not err
    assert record["trained"] == 6
    assert record["rejected"] >= 1
    every = found(tmp_path)
    assert len(every) == record["trials"]
    for row in every:
        assert row["status"] == ("rejected" if 100 * row["settings"]["drop"] > 40 else "trained")
        assert (tmp_path / f"trial-{row['trial']:03}").exists() == (row["status"] == "trained")
    trained = [row for row in every if row["status"] == "trained"]
    best = max(trained, key=lambda row: row["score"])
    assert record["best"]["trial"] == best["trial"]
    assert best["score"] == max(
        each["scores"]["psnr"] for each in rows(tmp_path / f"trial-{best['trial']:03}")
    )
    costs = [each["cpu_ms"] for each in record["front"]]
    assert costs == sorted(costs)
    assert (tmp_path / "best.toml").read_text().startswith("[train.deblur]")
    assert f"lr = {best['settings']['lr']}" in (tmp_path / "best.toml").read_text()
    alone = table(tmp_path / "best.toml", "train", "deblur") | {"out": tmp_path / "alone"}
    assert searched(toys(), make(type(toy(tmp_path)), alone, "best.toml")) == 0
    trial, again = (rows(tmp_path / name) for name in (f"trial-{best['trial']:03}", "alone"))
    assert again[-1]["scores"] == trial[-1]["scores"]
    import optuna

    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / samplers.JOURNAL))
    )
    study = optuna.load_study(study_name="search", storage=storage)
    infeasible = {t.number for t in study.trials if any(v > 0 for v in t.constraints.values())}
    assert infeasible == {row["trial"] for row in every if row["status"] == "rejected"}
    assert study.best_trial.number == best["trial"]


@needs_optuna
@pytest.mark.slow
def test_a_search_is_interrupted_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = iter(range(1000))

    def loss(net: Any, batch: Any, settings: Train) -> Any:
        if next(steps) == 8 + 5:
            os.kill(os.getpid(), signal.SIGINT)
        return TOY.loss(net, batch, settings)

    engine = dataclasses.replace(toys(), loss=loss)
    with pytest.raises(KeyboardInterrupt):
        searched(engine, toy(tmp_path, search=3))
    assert [row["status"] for row in found(tmp_path)] == ["trained", "training"]
    assert searched(engine, toy(tmp_path, resume=tmp_path)) == DONE
    assert next(steps) == 3 * 8
    assert told(capsys)["trained"] == 3
    assert searched(engine, toy(tmp_path, resume=tmp_path, search=4)) == DONE
    assert next(steps) == 4 * 8 + 1
    assert searched(engine, toy(tmp_path, search=4)) == DONE  # the same command once more: it is all there
    assert told(capsys)["trained"] == 4
    with pytest.raises(ImgtoolError, match=r"goes on as it began, with --lr 0\.01") as caught:
        searched(engine, toy(tmp_path, search=4, lr=0.5))
    assert caught.value.code == USAGE


@needs_optuna
@pytest.mark.slow
def test_what_nobody_needed_waits_for_a_longer_search(tmp_path: Path) -> None:
    """Another process took the last place while a candidate was measured."""
    engine, given = toys(), toy(tmp_path, search=1)
    measured = engine.search(given).gauge if engine.search else None

    def slowly(settings: Any) -> task.Task:
        def measure(net: task.Structure, limits: Limits) -> Cost:
            Board(tmp_path).admit(99, 1)
            assert measured is not None
            return measured(net, limits)

        assert engine.search is not None
        return dataclasses.replace(engine.search(settings), gauge=measure)

    with pytest.raises(ImgtoolError, match="none of 1 candidates"):
        searched(dataclasses.replace(engine, search=slowly), given)
    assert [row["status"] for row in found(tmp_path)] == ["waiting"]
    assert searched(engine, toy(tmp_path, resume=tmp_path, search=2)) == DONE
    assert [row["status"] for row in found(tmp_path)] == ["trained"]


def test_a_search_does_not_become_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "check", lambda name, parallel: None)
    engine = toys()
    train.Crew(engine, toy(tmp_path, search=2), tmp_path, Console(quiet=True))
    with pytest.raises(ImgtoolError, match="the folder holds a search"):
        searched(engine, toy(tmp_path, resume=tmp_path, search=0))
    (tmp_path / "space.toml").write_text("[search.deblur]\nlr = [1.0, 2.0]\n")
    with pytest.raises(ImgtoolError, match="begun with another space") as caught:
        searched(engine, toy(tmp_path, resume=tmp_path))
    assert caught.value.code == USAGE
    with pytest.raises(ImgtoolError, match="--runs repeats one training"):
        searching.plan(engine, toy(tmp_path / "runs", search=2, runs=2))
    with pytest.raises(ImgtoolError, match="--register is for one training"):
        searching.plan(engine, toy(tmp_path / "named", search=2, register_as="me"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ImgtoolError, match="--search makes many trainings"):
        searching.plan(engine, toy(tmp_path / "many", search=2))


def test_who_begins_at_the_same_time_joins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "check", lambda name, parallel: None)
    engine, other = toys(), Board(tmp_path)
    assert other.claim(searching.BEGINNING)

    def begin() -> None:
        text = space.to_toml(searching.task(engine, toy(tmp_path, search=2)).space, "deblur").encode()
        train.Crew(engine, toy(tmp_path, search=2), tmp_path, Console(), first={"space.toml": text})
        other.release(searching.BEGINNING)

    timer = threading.Timer(0.05, begin)
    timer.start()
    with pytest.raises(ImgtoolError, match=r"goes on as it began, with --lr 0\.01"):
        searched(engine, toy(tmp_path, search=2, lr=0.5))
    timer.join()
    assert "lr = 0.01" in (tmp_path / train.SETTINGS).read_text()


def test_a_folder_counts_as_that_of_a_search_before_it_counts_as_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samplers, "check", lambda name, parallel: None)
    monkeypatch.setattr(searching.Search, "go", ended)
    names: list[str] = []
    write = files.write
    monkeypatch.setattr(files, "write", lambda path, data: (names.append(path.name), write(path, data)))
    with pytest.raises(KeyboardInterrupt):
        searched(toys(), toy(tmp_path, search=2))
    assert names[:3] == ["settings.toml", "space.toml", "campaign.json"]


def ended(*_: object) -> None:
    raise KeyboardInterrupt


def test_other_limits_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(samplers, "check", lambda name, parallel: None)
    monkeypatch.setattr(searching.Search, "go", ended)
    for given in (toy(tmp_path, search=2, max_ms=2), toy(tmp_path, resume=tmp_path, max_ms=3)):
        assert "limits" not in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            train.run(toys(), given, Console(json=True))
    assert "limits: 3 ms, before: 2 ms" in capsys.readouterr().err


def test_ax_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(ImgtoolError, match="Ax proposes in one process") as caught:
        samplers.check("ax", 2)
    assert (caught.value.code, "--sampler optuna" in caught.value.hint) == (USAGE, True)
    samplers.check("optuna", 2)


def test_what_would_be_searched_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "check", lambda name, parallel: None)
    shown = train.plan(toys(), toy(tmp_path, search=5, max_ms=3))
    assert (shown["search"], shown["sampler"], shown["limits"]) == (5, "optuna", "3 ms")
    assert shown["space of lr"] == "0.001 to 0.1 by its logarithm"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@needs_ax
def test_ax_searches_choices_and_numbers(capfd: pytest.CaptureFixture[str]) -> None:
    asked = samplers.Question(
        {"a": Span(1, 8, whole=True), "b": Choice(("x", "y")), "c": Span(1e-3, 1, log=True)}
        | {"d": Choice((0, 0.5, 0.9)), "e": Choice((True, False))},
        (), Limits(ms=5), "psnr", True, 0,
    )  # fmt: skip
    ax = samplers.Ax(asked, known=3)
    for number in range(3, 9):
        trial, point = ax.ask() or (0, {})
        assert trial == number
        assert point["b"] in ("x", "y")
        assert (type(point["d"]), type(point["e"])) == (float, bool)
        state = "trained" if float(point["a"]) < 5 else "rejected"
        ax.tell(
            {"trial": trial, "point": point, "status": state, "score": 20.0 + number}
            | {"cpu_ms": point["a"], "measured": True}
        )
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@needs_ax
def test_ax_learns_from_what_was_over_a_limit() -> None:
    """What is within costs the same everywhere: that more costs more, only the rejected tell."""
    asked = samplers.Question({"a": Span(0, 10), "b": Span(0, 1)}, (), Limits(5, 50, 500), "psnr", True, 0)
    ax = samplers.Ax(asked)
    trained = 0
    while trained <= samplers.RANDOM:
        trial, point = ax.ask() or (0, {})
        cost = 1.0 if float(point["a"]) < 5 else 20.0
        state = "trained" if cost < 5 else "rejected"
        trained += state == "trained"
        ax.tell(
            {"trial": trial, "point": point, "status": state, "score": 20 + float(point["a"])}
            | {"cpu_ms": cost, "mb": 10 * cost, "parameters": round(100 * cost), "measured": True}
        )
    ax.ask()
    cheap, dear = ax._client.predict([{"a": 2.0, "b": 0.5}, {"a": 9.0, "b": 0.5}])
    for name, limit in asked.limits.given().items():
        assert dear[name][0] > cheap[name][0] + limit


@pytest.mark.slow
@needs_ax
def test_ax_proposes_nothing_when_the_space_is_used_up() -> None:
    asked = samplers.Question({"a": Choice(("x", "y"))}, (), Limits(), "psnr", True, 0)
    ax, every = samplers.Ax(asked), []
    while (found := ax.ask()) is not None:
        row = {"trial": found[0], "point": found[1], "status": "trained", "score": 20.0, "cpu_ms": 1.0}
        every.append(row)
        ax.tell(row)
    assert sorted(row["point"]["a"] for row in every) == ["x", "y"]
    again = samplers.Ax(asked, known=2)
    for row in every:
        again.tell(row)
    assert again.ask() is None
    again._client.get_next_trials = dict
    with pytest.raises(ImgtoolError, match="Ax proposes no candidate") as caught:
        again.ask()
    assert "--sampler optuna" in caught.value.hint


def proposed(sampler: samplers.Optuna, count: int = 1) -> list[dict[str, Any]]:
    asked = [sampler.ask() for _ in range(count)]
    return [{"trial": trial, "point": dict(point), "status": "training"} for trial, point in asked]


ASKED = samplers.Question({"a": Span(0, 10)}, (), Limits(5), "psnr", True, 0)
REJECTED = {"status": "rejected", "cpu_ms": 7.0, "mb": 1.0, "measured": True, "parameters": 0}


@needs_optuna
@needs_posix
def test_a_journal_survives_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / samplers.JOURNAL
    one, two = samplers.Optuna(ASKED, tmp_path), samplers.Optuna(ASKED, tmp_path, 1)
    proposed(one)
    with full_disk(path.stat().st_size + 20), pytest.raises(ImgtoolError, match="cannot write") as caught:
        one.ask()
    assert f"--resume {tmp_path}" in caught.value.hint
    assert not path.read_bytes().endswith(b"\n")
    (row,) = proposed(two)
    assert samplers.put_aside(tmp_path) is None
    two.tell(row | REJECTED)
    assert [each.state.name for each in samplers.Optuna(ASKED, tmp_path)._study.trials] == [
        "RUNNING",
        "PRUNED",
    ]


@needs_optuna
def test_a_damaged_journal_is_put_aside(tmp_path: Path) -> None:
    assert samplers.put_aside(tmp_path) is None
    path = tmp_path / samplers.JOURNAL
    (row,) = proposed(samplers.Optuna(ASKED, tmp_path))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:-1], lines[-1][:9], *lines[-1:]]))
    aside = samplers.put_aside(tmp_path)
    assert aside is not None
    assert (aside.name, aside.exists(), path.exists()) == ("search.journal.damaged", True, False)
    again = samplers.Optuna(ASKED, tmp_path)
    again.tell(row | REJECTED)
    assert [each.params for each in again._study.trials] == [row["point"]]


def test_a_damaged_journal_is_told_of(
    tmp_path: Path, propose: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(campaign, "put_aside", lambda folder: folder / "aside")
    propose(GOOD)
    assert train.run(toys(), toy(tmp_path, search=1), Console(json=True)) == DONE
    assert (
        f"journal was damaged, and is written anew; it is now {tmp_path / 'aside'}" in capsys.readouterr().err
    )


@needs_optuna
def test_what_was_rejected_before_it_was_trained_is_told_once_more(tmp_path: Path) -> None:
    first = samplers.Optuna(ASKED, tmp_path)
    (row,) = proposed(first)
    first.tell(row | REJECTED)
    again = samplers.Optuna(ASKED, tmp_path)
    for _ in range(2):
        again.tell(row | REJECTED | {"status": "trained", "score": 24.0})
    assert [(each.state.name, each.value) for each in again._study.trials] == [
        ("PRUNED", None), ("COMPLETE", 24),
    ]  # fmt: skip


@needs_optuna
@pytest.mark.slow
def test_a_lost_journal_is_written_again(tmp_path: Path) -> None:
    asked = samplers.Question({"a": Span(0, 10), "b": Choice(("x", "y"))}, (), Limits(5), "psnr", True, 0)
    first = samplers.Optuna(asked, tmp_path)
    states = ["trained", "rejected", "training", "failed", "trained"]
    every = []
    for state in states:
        trial, point = first.ask()
        row = {"trial": trial, "point": dict(point), "status": state, "score": 20.0 + trial, "cpu_ms": 7.0}
        every.append(json.loads(json.dumps(row | {"mb": 1.0, "measured": True, "parameters": 0})))
    (tmp_path / samplers.JOURNAL).unlink()
    again = samplers.Optuna(asked, tmp_path)
    for row in [each for each in every if each["status"] != "training"] * 2:
        again.tell(row)
    trials = again._study.trials
    assert [each.state.name for each in trials] == ["COMPLETE", "PRUNED", "FAIL", "FAIL", "COMPLETE"]
    assert [trials[number].params == every[number]["point"] for number in range(5)] == [
        True, True, False, True, True,
    ]  # fmt: skip
    assert (trials[0].value, trials[4].value, trials[1].constraints) == (20, 24, {"cpu_ms": 2})
    assert again.ask()[0] == 5
    again.tell(every[2] | {"status": "trained"})
    assert again._study.trials[-1].params == every[2]["point"]


# --- measuring, and processes ---


@pytest.mark.slow
def test_an_untrained_network_is_measured_as_infer_runs_it() -> None:
    shape = gauge.structure(engines.load("filter"), engines.settings("filter").Model())
    found = gauge.measured("filter", shape, 0)
    assert found.parameters == 1985
    assert 0 < found.cpu_ms < 5000
    assert 20 < found.mb < 2000
    with pytest.raises(gauge.Unfit, match="depth"):
        gauge.measured("filter", shape | {"depth": 0}, 0)


def command(photographs: Path, folder: Path, *more: str) -> list[str]:
    text = folder.parent / "space.toml"
    text.write_text("[search.filter]\nlr = {low = 1e-3, high = 1e-2, log = true}\nloss = ['l1', 'l2']\n")
    words = (
        f"train filter --photos {photographs} --space {text} --steps 6 --epoch-steps 3 --save-every 1"
        " --warmup 3 --crop 32 --batch 2 --held-out 2 --device cpu --workers 0 --threads 1 --json"
    ).split()
    return [*words, "-o", str(folder), *more]


def in_two_processes(
    photographs: Path, folder: Path, search: int, capsys: pytest.CaptureFixture[str]
) -> tuple[Mapping[str, Any], str]:
    """Search, and return the record and what was said."""
    assert cli.run(command(photographs, folder, "--search", str(search), "--parallel", "2")) == DONE
    said = capsys.readouterr()
    return json.loads(said.out.splitlines()[-1]), said.err


BESIDE = """
import time
from imgtool import cli, train
learn, ends = train.Loop._learn, time.monotonic() + 300
def beside(loop, batch):
    while len(list(loop.folder.parent.glob("trials/training-*"))) < 2 and time.monotonic() < ends:
        time.sleep(0.05)
    learn(loop, batch)
train.Loop._learn = beside
cli.main()
"""
"""The command line, on which a training waits until another one is beside it."""

KILLED = """
import os, signal
from imgtool import cli, train
learn = train.Loop._learn
def killed(loop, batch):
    if loop.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    learn(loop, batch)
train.Loop._learn = killed
cli.main()
"""


@needs_optuna
@pytest.mark.slow
def test_two_processes_search_on_one_journal(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, words = tmp_path / "search", searching.Workers.command
    monkeypatch.setattr(
        searching.Workers, "command", lambda *given: [sys.executable, "-c", BESIDE, *words(*given)[3:]]
    )
    record, said = in_two_processes(photographs, folder, 4, capsys)
    assert (record["trained"], record["failed"]) == (4, 0)
    assert "worker-0: trial-" in said
    assert "worker-1: trial-" in said
    every = found(folder)
    assert sorted(row["trial"] for row in every) == [row["trial"] for row in every]
    assert len({json.dumps(row["point"]) for row in every}) == len(every)
    for row in every:
        assert [each["step"] for each in rows(folder / f"trial-{row['trial']:03}")] == [3, 6]
    best = record["best"]
    again = tmp_path / "again"
    assert cli.run(["train", "filter", "--config", record["config"], "-o", str(again), "--quiet"]) == DONE
    one, two = load_file(best["weights"]), load_file(again / "best.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one)


@needs_optuna
@pytest.mark.slow
def test_a_process_too_many_is_no_fault(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, said = in_two_processes(photographs, tmp_path / "search", 1, capsys)
    assert record["trained"] == 1
    assert "error" not in said
    assert "failed" not in said


@needs_optuna
@pytest.mark.slow
def test_what_a_killed_process_began_goes_on(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "search"
    words = [sys.executable, "-c", KILLED, *command(photographs, folder, "--search", "2")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [row["status"] for row in found(folder)] == ["training"]
    assert cli.run(["train", "filter", "--resume", str(folder), "--json"]) == DONE
    said = capsys.readouterr()
    assert "resuming" in said.err
    assert json.loads(said.out.splitlines()[-1])["trained"] == 2
    first = folder / "trial-000"
    assert [each["step"] for each in rows(first)] == [3, 6]
    assert len(list((folder / board.FOLDER).glob("trial-000.claim-*"))) == 2
    row = found(folder)[0]
    flags = [f"--{name}={value}" for name, value in row["settings"].items()]
    alone = command(photographs, tmp_path / "alone")
    del alone[(space_at := alone.index("--space")) : space_at + 2]
    assert cli.run([*alone, *flags]) == DONE
    one, two = load_file(first / "best.safetensors"), load_file(tmp_path / "alone" / "best.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one)
