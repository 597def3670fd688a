"""Many photos: parts of a batch, the dealer, the manifest, and workers that die."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from imgtool import cli, engines, files, names
from imgtool.errors import USAGE, Fatal, ImgtoolError
from imgtool.infer.listing import Job, Order
from imgtool.infer.work import Outcome
from imgtool.runner import Books, copies_of
from imgtool.runner.cluster import CROWDED, REMINDER, Cluster, connect
from imgtool.runner.dealer import Dealer, Hand, Lost, News
from imgtool.runner.manifest import Manifest
from imgtool.runner.manifest import name as manifest_name
from imgtool.runner.shards import Shard, shard
from imgtool.runner.worker import Brief, Dealt, Reply, Worker

# --- parts of a batch ------------------------------------------------------------------------


def test_a_part_is_that_of_the_checksum_of_the_path() -> None:
    # 0xCBF43926 is the check value of this CRC, of the digits from 1 to 9.
    check = 0xCBF43926
    assert [part for part in range(7) if Shard(part, 7).holds(Path("123456789"))] == [check % 7]
    assert not Shard(check % 5, 5).holds(Path("123456788"))


def test_every_photo_is_in_one_part() -> None:
    paths = [Path(f"day-{n % 5}", f"photo {n}.jpg") for n in range(400)] + [Path("\udcff.jpg")]
    parts = [[path for path in paths if Shard(part, 8).holds(path)] for part in range(8)]
    assert sorted(path for part in parts for path in part) == sorted(paths)
    assert min(map(len, parts)) > 25


@pytest.mark.parametrize("text", ["", "1", "2/2", "-1/2", "0/0", "a/b", "1/2/3", "0 /2", "0/", "٠/٢"])
def test_what_is_no_part(text: str) -> None:
    with pytest.raises(ImgtoolError) as caught:
        shard(text)
    assert caught.value.code == USAGE
    assert text in caught.value.what


@pytest.mark.parametrize("text", ["3/16", "03/0016"])
def test_parts_and_their_files(text: str) -> None:
    part = shard(text)
    assert (part, str(part)) == (Shard(3, 16), "3/16")
    assert part.named(Path("out/coefficients.csv")) == Path("out/coefficients-3-of-16.csv")
    assert manifest_name(part) == Path("infer-manifest-3-of-16.jsonl")
    assert manifest_name(None) == Path("infer-manifest.jsonl")


# --- the manifest ----------------------------------------------------------------------------


def item(name: str) -> files.Item:
    return files.Item(Path(name), Path(name))


def test_a_line_that_was_torn_is_left_out_and_the_next_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out" / "infer-manifest.jsonl"
    first = Manifest(path, "awb")
    first.add({"input": "a.png", "status": "begun"})
    first.add({"input": "a.png", "status": "done", "facts": {"x": np.float32(0.5)}, "row": {"k": 1.5}})
    first.add({"input": "b.png", "status": "begun"})
    first.close()
    with path.open("ab") as file:
        file.write(b'{"input": "b.png", "sta')
    second = Manifest(path, "awb")
    assert files.json_lines(path)[1]["facts"] == {"x": 0.5}
    assert second.rows == {"a.png": {"k": 1.5}}
    assert [second.broken(item(name)) for name in ("a.png", "b.png", "c.png")] == [False, True, False]
    second.add({"input": "c.png", "status": "failed", "begun": True})
    second.add({"input": "d.png", "status": "failed", "begun": False})
    second.add({"input": "a.png", "status": "left out"})
    second.close()
    third = Manifest(path, "awb")
    assert [third.broken(item(name)) for name in ("a.png", "c.png", "d.png")] == [False, True, False]
    assert third.rows == second.rows
    third.close()


def noted(path: Path, *records: dict[str, object], engine: str = "awb") -> Manifest:
    """Return a manifest that is opened again, by awb, after a run of an engine that wrote these lines."""
    earlier = Manifest(path, engine)
    for record in records:
        earlier.add({"input": "photos/a.png", **record})
    earlier.close()
    return Manifest(path, "awb")


def test_what_broke_stays_broken_until_it_is_done(tmp_path: Path) -> None:
    path, photo = tmp_path / "infer-manifest.jsonl", item("photos/a.png")
    cases: list[tuple[dict[str, object], bool]] = [
        ({"status": "begun"}, True),
        ({"status": "failed", "begun": False}, True),
        ({"status": "failed", "begun": True}, True),
        ({"status": "failed", "begun": False}, True),
        ({"status": "done"}, False),
        ({"status": "failed", "begun": False}, False),
    ]
    for status, broken in cases:
        manifest = noted(path, status)
        assert manifest.broken(photo) is broken
        manifest.close()


def test_lines_of_another_engine_are_not_gone_on_from(tmp_path: Path) -> None:
    path, photo = tmp_path / "infer-manifest.jsonl", item("photos/a.png")
    manifest = noted(path, {"status": "begun"}, {"status": "done", "row": {"k": 1.5}}, engine="lens")
    assert manifest.rows == {}
    manifest.close()
    manifest = noted(path, {"status": "begun"}, {"status": "failed", "begun": True}, engine="lens")
    assert not manifest.broken(photo)
    manifest.close()
    ours: dict[str, object] = {"status": "begun", "output": "out/a.png"}
    cases: list[tuple[str, dict[str, object], bool]] = [
        ("awb", ours, True),
        ("lens", {"status": "failed", "begun": False, "output": "out/a.png"}, True),
        ("lens", {"status": "done", "output": "out/a.jpg"}, True),
        ("lens", {"status": "begun", "output": "out/a.jpg"}, True),
        ("lens", {"status": "begun", "output": None}, True),
        ("lens", ours, False),  # it may be the other engine's by now
    ]
    for engine, line, broken in cases:
        manifest = noted(path, line, engine=engine)
        assert manifest.broken(photo) is broken
        manifest.close()


def test_a_photo_is_known_by_whatever_path_it_is_named(tmp_path: Path) -> None:
    Path("photos").mkdir()
    Path("link").symlink_to("photos")
    url = files.Item(Path("x"), Path("x"), url="s3://bucket/photos/../a.png")
    manifest = noted(tmp_path / "m.jsonl", {"status": "begun"}, {"input": url.name, "status": "begun"})
    for name in ("photos/a.png", f"{Path.cwd()}/photos/a.png", "link/a.png", "./photos/../photos/a.png"):
        assert manifest.broken(item(name))
    assert manifest.broken(url)
    assert not manifest.broken(files.Item(Path("x"), Path("x"), url="s3://bucket/a.png"))
    assert not manifest.broken(item("a.png"))
    manifest.close()


def test_a_manifest_is_of_one_batch_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    first, path = Manifest(tmp_path / "m.jsonl", "awb"), tmp_path / "m.jsonl"
    with pytest.raises(ImgtoolError, match="another batch writes into") as caught:
        Manifest(path, "lens")
    assert str(tmp_path) in caught.value.what
    assert "wait until it has ended" in caught.value.hint
    Manifest(tmp_path / "m-0-of-2.jsonl", "awb").close()
    first.close()
    Manifest(path, "awb").close()
    assert path.read_bytes() == b""


# --- the dealer ------------------------------------------------------------------------------


def orders(count: int) -> list[Order]:
    return [Order(Job(item(f"{n:02}.png"), None, None), {}, {}, ()) for n in range(count)]


def name(order: Order) -> str:
    return str(order.job.item.relative)


class Staff:
    """Workers that answer at once, but for photos that they die of or fail with."""

    def __init__(
        self,
        poison: Sequence[str] = (),
        bad: Sequence[str] = (),
        stillborn: Collection[int] = (),
        seconds: Callable[[str], float] = lambda name: 1.0,
        spell: int = 1000,
        fault: ImgtoolError | None = None,
    ) -> None:
        self.fault = fault or ImgtoolError("bad")
        self.poison, self.bad, self.stillborn = poison, bad, stillborn
        self.seconds, self.spell, self.now = seconds, spell, 0.0
        self.has: dict[Hand, deque[Dealt]] = {}
        self.queue: deque[News] = deque()
        self.dead: set[Hand] = set()
        self.most = 0
        self.calls: list[list[str]] = []

    def hire(self) -> Hand:
        hand = Hand()
        self.has[hand] = deque()
        born = len(self.has) not in self.stillborn
        self.queue.append((hand, [Reply(f"w{len(self.has)}")] if born else Lost("SIGKILL")))
        return hand

    def call(self, hand: Hand, more: Sequence[Dealt], most: int) -> None:
        if hand in self.dead:
            return
        self.has[hand].extend(more)
        self.most = max(self.most, len(self.has[hand]))
        done = [self.has[hand].popleft() for _ in range(min(most, self.spell))]
        self.calls.append([name(dealt.order) for dealt in done])
        if set(self.calls[-1]) & set(self.poison):
            self.dead.add(hand)
            self.queue.append((hand, Lost("SIGKILL")))
        else:
            self.queue.append((hand, [self.reply(hand, dealt) for dealt in done]))

    def reply(self, hand: Hand, dealt: Dealt) -> Reply:
        if name(dealt.order) in self.bad:
            return Reply(hand.worker, dealt.number, fault=self.fault)
        return Reply(hand.worker, dealt.number, Outcome({"input": name(dealt.order)}))

    def news(self, seconds: float) -> list[News]:
        """Return the oldest news; a clock goes on as if workers took turns."""
        hand, news = self.queue.popleft()
        if not isinstance(news, Lost):
            self.now += sum(self.seconds(str(each.outcome.record["input"])) for each in news if each.outcome)
        return [(hand, news)]

    def clock(self) -> float:
        return self.now

    def close(self, at_once: bool) -> None: ...


class Ledger:
    def __init__(self) -> None:
        self.done: list[str] = []
        self.wrong: dict[str, str] = {}
        self.taken: list[list[str]] = []
        self.started: list[str] = []
        self.said: list[str] = []

    def begun(self, order: Order, worker: str) -> None:
        self.started.append(name(order))

    def ended(self, order: Order, outcome: Outcome, worker: str) -> None:
        assert outcome.record["input"] == name(order)
        self.done.append(name(order))

    def failed(self, order: Order, fault: ImgtoolError, worker: str) -> None:
        self.wrong[name(order)] = fault.what

    def lost(self, worker: str, orders: Sequence[Order], reason: str) -> None:
        self.taken.append([name(order) for order in orders])

    def words(self, words: Sequence[tuple[str, str]]) -> None:
        self.said += [text for _, text in words]


def test_every_photo_is_dealt_once_and_few_at_a_time() -> None:
    staff, ledger = Staff(), Ledger()
    dealer = Dealer(staff, ledger, 3, clock=staff.clock)
    dealer.run(orders(40))
    assert sorted(ledger.done) == [f"{n:02}.png" for n in range(40)] == sorted(ledger.started)
    assert len(staff.has) == 3
    assert staff.most <= 4
    assert {len(call) for call in staff.calls} == {1}
    assert dealer.finished == 40


@pytest.mark.parametrize("spell", [1000, 5])
def test_quick_photos_are_dealt_many_at_a_time(spell: int) -> None:
    staff, ledger = Staff(seconds=lambda name: 0.002, spell=spell), Ledger()
    Dealer(staff, ledger, 2, clock=staff.clock).run(orders(1000))
    assert ledger.done == [*dict.fromkeys(ledger.done)]
    assert sorted(ledger.done) == sorted(ledger.started) == sorted(map(name, orders(1000)))
    sizes = [len(call) for call in staff.calls]
    assert max(sizes) == min(64, spell)
    assert max(sizes[-4:]) <= 2  # all end together
    assert staff.most <= 128


def test_photos_that_are_slow_again_are_dealt_one_by_one() -> None:
    staff, ledger = Staff(seconds=lambda name: 0.002 if name < "300" else 1.0), Ledger()
    Dealer(staff, ledger, 2, clock=staff.clock).run(orders(600))
    assert max(len(call) for call in staff.calls) > 16
    assert {len(call) for call in staff.calls[-100:]} == {1}
    assert len(ledger.done) == 600


def test_a_quick_photo_that_kills_is_found_among_those_of_its_call() -> None:
    staff, ledger = Staff(poison=["400.png", "403.png"], seconds=lambda name: 0.002), Ledger()
    dealer = Dealer(staff, ledger, 2, clock=staff.clock)
    dealer.run(orders(900))
    assert sorted(ledger.wrong) == ["400.png", "403.png"]
    assert sorted([*ledger.done, *ledger.wrong]) == sorted(map(name, orders(900)))
    first = next(n for n, call in enumerate(staff.calls) if "400.png" in call)
    assert len(staff.calls[first]) > 4
    alone = [call for call in staff.calls if "400.png" in call or "403.png" in call][1:]
    assert alone.count(["400.png"]) == 3
    assert alone.count(["403.png"]) in (2, 3)
    last = max(n for n, call in enumerate(staff.calls) if call in alone)
    assert max(len(call) for call in staff.calls[last:]) > 16  # once they are found
    assert dealer.finished == 900


def test_no_more_workers_than_photos() -> None:
    staff, ledger = Staff(), Ledger()
    Dealer(staff, ledger, 8).run(orders(2))
    assert len(staff.has) == 2


def test_a_photo_that_kills_is_given_up_and_no_other_is() -> None:
    staff, ledger = Staff(poison=["03.png"]), Ledger()
    dealer = Dealer(staff, ledger, 2)
    dealer.run(orders(12))
    assert sorted(ledger.done) == [f"{n:02}.png" for n in range(12) if n != 3]
    assert ledger.wrong == {"03.png": "the process that worked on it died 3 times, perhaps for its memory"}
    assert [taken[0] for taken in ledger.taken] == ["03.png"] * 3
    assert len(ledger.taken[0]) > 1  # what else it had is done by others
    assert dealer.finished == 12


def test_two_photos_that_kill_at_the_end() -> None:
    staff, ledger = Staff(poison=["04.png", "05.png"]), Ledger()
    Dealer(staff, ledger, 2).run(orders(6))
    assert sorted(ledger.done) == [f"{n:02}.png" for n in range(4)]
    assert sorted(ledger.wrong) == ["04.png", "05.png"]


def test_what_a_worker_says_of_a_photo_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    staff, ledger = Staff(), Ledger()
    reply = staff.reply
    monkeypatch.setattr(staff, "reply", lambda *each: replace(reply(*each), words=[("warn", "odd")]))
    Dealer(staff, ledger, 1).run(orders(2))
    assert ledger.said == ["odd", "odd"]


def test_a_failure_stops_dealing_where_that_is_asked_for() -> None:
    staff, ledger = Staff(bad=["01.png"]), Ledger()
    Dealer(staff, ledger, 1, fail_fast=True).run(orders(20))
    assert {len(call) for call in staff.calls} == {1}
    assert list(ledger.wrong) == ["01.png"]
    assert len(ledger.done) <= 3
    staff, ledger = Staff(bad=["01.png"]), Ledger()
    Dealer(staff, ledger, 1).run(orders(20))
    assert len(ledger.done) == 19


def test_a_fatal_fault_ends_the_batch() -> None:
    seconds = lambda name: 0.002  # noqa: E731
    staff, ledger = Staff(bad=["400.png"], seconds=seconds, fault=Fatal("no such bucket")), Ledger()
    Dealer(staff, ledger, 2, clock=staff.clock).run(orders(1000))
    assert ledger.wrong == {"400.png": "no such bucket"}
    last = next(n for n, call in enumerate(staff.calls) if "400.png" in call)
    assert len(staff.calls) - last <= 4  # those that were on their way
    assert len(ledger.done) < 800


def test_a_worker_does_nothing_after_a_fatal_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, dealt = Worker(SimpleNamespace()), [Dealt(n, order) for n, order in enumerate(orders(9))]  # type: ignore[arg-type]

    def do(order: Order, *_: object) -> Outcome:
        if name(order) == "02.png":
            raise Fatal("no such bucket", "make it", 2)
        return Outcome({})

    monkeypatch.setattr(worker, "work", SimpleNamespace(do=do, transit=None))
    replies = pickle.loads(pickle.dumps(worker.do(dealt, 9)))
    assert [reply.number for reply in replies] == [0, 1, 2]
    fault = replies[-1].fault
    assert (type(fault), fault.what, fault.hint, fault.code) == (Fatal, "no such bucket", "make it", 2)


@pytest.mark.parametrize("workers", [2, 4, 6])
def test_after_a_failure_nothing_is_dealt_nor_booked_to_another_photo(workers: int) -> None:
    for bad, poison in ((bad, poison) for bad in range(8) for poison in range(24) if bad != poison):
        staff, ledger = Staff(poison=[f"{poison:02}.png"], bad=[f"{bad:02}.png"]), Ledger()
        dealer = Dealer(staff, ledger, workers, fail_fast=True)
        dealer.run(orders(40))  # the ledger compares each outcome with its photo
        assert f"{bad:02}.png" in ledger.wrong or f"{poison:02}.png" in ledger.wrong
        ended = [*ledger.done, *ledger.wrong]
        assert len({*ended}) == len(ended) == dealer.finished
        failed = max(n for n, call in enumerate(staff.calls) if set(call) & {*ledger.wrong})
        assert len(staff.calls) - failed <= 2 * workers


def test_an_answer_for_another_photo_is_not_booked() -> None:
    staff, ledger = Staff(), Ledger()
    reply = staff.reply
    staff.reply = lambda hand, dealt: reply(hand, Dealt(dealt.number ^ 1, dealt.order))  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"w1 answered for photo 1, not 0, 00\.png"):
        Dealer(staff, ledger, 1).run(orders(4))
    assert not ledger.done


def test_workers_that_die_as_they_start_do_not_stop_those_that_work() -> None:
    staff, ledger = Staff(stillborn=range(2, 99)), Ledger()
    dealer = Dealer(staff, ledger, 3)
    dealer.run(orders(40))
    assert len(ledger.done) == 40
    assert len(staff.has) < 6
    assert ledger.said[-1] == "workers die before they are ready: the batch goes on with 1 and no more"


def test_workers_that_die_as_they_start() -> None:
    staff, ledger = Staff(stillborn=[1, 2]), Ledger()
    Dealer(staff, ledger, 1).run(orders(3))
    assert len(ledger.done) == 3
    with pytest.raises(ImgtoolError, match="workers die before they are ready: SIGKILL"):
        Dealer(Staff(stillborn=range(99)), Ledger(), 1).run(orders(3))


def test_a_bug_in_a_worker_is_not_hidden() -> None:
    staff = Staff()

    def news(seconds: float) -> list[News]:
        return [(next(iter(staff.has)), [Reply("w", bug="ZeroDivisionError: here")])]

    staff.news = news  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="ZeroDivisionError: here"):
        Dealer(staff, Ledger(), 1).run(orders(3))


# --- the command -----------------------------------------------------------------------------

AUTH = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "of-these-tests-alone"}
WORDS = ("infer", "filter", "in", "--target", "tv", "--device", "cpu", "--threads", "1")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, value in AUTH.items():
        monkeypatch.setenv(name, value)


def put(path: str, height: int = 24, width: int = 32) -> None:
    import cv2

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path) + height)
    tones = cv2.resize(rng.uniform(0, 255, (5, 6, 3)), (width, height), interpolation=cv2.INTER_LINEAR)
    cv2.imwrite(path, tones.astype(np.uint8))


def content(folder: str) -> dict[str, bytes]:
    """Return every file below a folder, hidden ones too, but for manifests."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*.*")}
    return {name: data for name, data in found.items() if "manifest" not in name}


def manifest(path: str = "out/infer-manifest.jsonl") -> list[dict[str, Any]]:
    return files.json_lines(Path(path)) if Path(path).exists() else []


def last(path: str = "out/infer-manifest.jsonl") -> dict[str, str]:
    return {line["input"]: line["status"] for line in manifest(path)}


def test_parts_make_the_whole(capfd: pytest.CaptureFixture[str]) -> None:
    for n in range(5):
        put(f"in/{n}/x.png", 24 + n)
    assert cli.run([*WORDS, "-o", "plain"]) == 0
    for part in range(3):
        capfd.readouterr()
        assert cli.run([*WORDS, "-o", "out", "--shard", f"{part}/3"]) == 0
    assert content("out") == content("plain")
    status = [last(f"out/infer-manifest-{part}-of-3.jsonl") for part in range(3)]
    assert sorted(name for part in status for name in part) == [f"in/{n}/x.png" for n in range(5)]
    assert not Path("plain/infer-manifest.jsonl").exists()
    assert cli.run([*WORDS, "-o", "out", "--shard", "1/3", "--skip-existing"]) == 0
    assert set(last("out/infer-manifest-1-of-3.jsonl").values()) == {"left out"}


def test_a_part_without_photos(capfd: pytest.CaptureFixture[str]) -> None:
    put("in/x.png")
    empty = next(part for part in range(2) if not Shard(part, 2).holds(Path("x.png")))
    assert cli.run([*WORDS, "-o", "out", "--shard", f"{empty}/2"]) == 0
    assert f"part {empty}/2: the one photo is not in it" in capfd.readouterr().err
    assert not Path("out").exists()


def test_what_had_begun_and_not_ended_is_done_again() -> None:
    put("in/x.png")
    Path("in/bad.png").write_bytes(b"no photo")
    words, path = [*WORDS, "-o", "out", "--shard", "0/1"], "out/infer-manifest-0-of-1.jsonl"
    assert cli.run(words) == 1
    whole = content("out")
    assert last(path) == {"in/x.png": "done", "in/bad.png": "failed"}
    Path("out/x.png").write_bytes(b"half")
    with Path(path).open("a") as file:  # as a process that was killed leaves it
        file.write(json.dumps({"input": "in/x.png", "status": "begun", "engine": "filter"}) + "\n")
    assert cli.run([*words, "--skip-existing"]) == 1
    assert content("out") == whole
    assert last(path) == {"in/x.png": "done", "in/bad.png": "failed"}


def test_rows_are_those_of_the_engine(tmp_path: Path) -> None:
    put("in/a.png", 64, 64)
    put("in/b.png", 64, 64)
    words = ["-o", "out/", "--shard", "00/01", "--device", "cpu"]
    assert cli.run(["infer", "awb", "in/a.png", *words]) == 0
    assert cli.run(["infer", "lens", "in", *words, "--skip-existing"]) == 0
    assert {line["engine"] for line in manifest("out/infer-manifest-0-of-1.jsonl")} == {"awb", "lens"}
    header, *rows = Path("out/coefficients-0-of-1.csv").read_text().splitlines()
    assert "k1" in header
    assert "gain" not in header
    assert [row.split(",")[0] for row in rows] == ["b.png"]


class Hired(Staff):
    """A worker of this process, which does what those of others do."""

    def __init__(self, batch: Any) -> None:
        super().__init__()
        self.worker = Worker(Brief(batch.engine.name, batch.settings, batch.work.total, os.getcwd()))
        assert not self.worker.start()[0].fault

    def reply(self, hand: Hand, dealt: Dealt) -> Reply:
        (reply,) = self.worker.do([dealt], 1)
        return reply


def test_a_table_has_the_rows_of_what_workers_did(monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(2):
        put(f"in/{n}.png", 60 + n, 64)
    words = ["infer", "lens", "in", "--device", "cpu", "--threads", "1"]
    assert cli.run([*words, "-o", "plain"]) == 0
    monkeypatch.setattr("imgtool.runner._pool", lambda books, *_: (Hired(books.batch), 1, 1))
    assert cli.run([*words, "-o", "out", "--runner", "processes"]) == 0
    assert content("out") == content("plain")
    assert len(Path("out/coefficients.csv").read_text().splitlines()) == 1 + 2


@pytest.mark.parametrize(("words", "most"), [(["--fail-fast"], 2), ([], 9)])
def test_after_a_failure_no_photo_is_begun_where_that_is_asked_for(
    words: list[str], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(9):
        put(f"in/{n}.png")
    staff = Staff(bad=[f"{n}.png" for n in range(9)])
    monkeypatch.setattr("imgtool.runner._pool", lambda *_: (staff, 1, 1))
    assert cli.run([*WORDS, "-o", "out", "--runner", "processes", *words]) == 1
    assert list(last().values()).count("failed") == most  # of two calls at the worker, one waited


def test_a_fatal_fault_is_the_last_one(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def do(*_: object) -> None:
        raise Fatal("no such bucket", "make it")

    for n in range(4):
        put(f"in/{n}.png")
    monkeypatch.setattr("imgtool.infer.work.Work.do", do)
    assert cli.run([*WORDS, "-o", "out"]) == 1
    told = capfd.readouterr().err
    assert told.count("no such bucket") == 2  # as it happens, and in the end
    assert "1 of 4 failed" in told
    assert "0 of 4 photos are done: the same command with --skip-existing goes on" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--runner", "processes", "--report", "page"], "--report needs all photos in one process"),
        (["--shard", "0/2", "--zip", "x.zip"], "--zip needs all photos in one process"),
        (["--shard", "2/2"], "--shard '2/2' is no part of a whole"),
        (["--shard", ""], "--shard is empty"),
        (["--shard", "", "--runner", "processes"], "--shard is empty"),
        (["--workers", "2"], "--workers says how many processes a runner has"),
    ],
)
def test_asked_wrongly(words: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    put("in/a.png")
    assert cli.run([*WORDS, "-o", "out", *words]) == 2
    assert message in capfd.readouterr().err
    assert not Path("out").exists()


def test_streams_are_not_spread(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["infer", "filter", "-", "--target", "tv", "-o", "a.png", "--runner", "processes"]) == 2
    assert "standard input needs all photos in one process, and --runner" in capfd.readouterr().err


def test_what_is_found_from_all_photos_is_not_spread(capfd: pytest.CaptureFixture[str]) -> None:
    put("in/a.png")
    assert cli.run(["infer", "lens", "in", "-o", "out", "--group", "folder", "--shard", "0/2"]) == 2
    assert "from all photos together needs all photos in one process" in capfd.readouterr().err


def test_without_ray(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    put("in/a.png")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.run([*WORDS, "-o", "out", "--runner", "ray"]) == 2
    told = capfd.readouterr().err
    assert "--runner ray needs Ray" in told
    assert "pip install 'imgtool[ray]'" in told


@pytest.mark.parametrize("runner", [["--runner", "processes"], ["--shard", "0/1"]])
def test_a_second_batch_on_a_folder_is_refused(runner: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fcntl")
    put("in/a.png")
    part = None if "processes" in runner else Shard(0, 1)
    first = Manifest(Path("out") / manifest_name(part), "lens")
    assert cli.run([*WORDS, "-o", "out/", *runner]) == 1
    first.close()
    assert capfd.readouterr().err.count("error: another batch writes into out\n") == 1
    assert not content("out")


def test_how_far_it_is_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    console = SimpleNamespace(live=False, say=said.append)
    books = Books(SimpleNamespace(console=console, jobs=[None] * 16))  # type: ignore[arg-type]
    monkeypatch.setattr("imgtool.runner.EVERY", -1.0)
    for _ in range(3):
        books.tick(0)
    assert said == ["0 of 16: workers start"]
    books.counts["done"] += 1
    books.tick(1)
    assert len(said) == 2


def test_only_what_a_worker_that_is_gone_left_is_removed(tmp_path: Path) -> None:
    books = Books(SimpleNamespace(shard=None, stopped=True, console=SimpleNamespace(say=print)))  # type: ignore[arg-type]
    order = Order(Job(item("a.png"), None, None), {}, {}, [tmp_path / "a.png"])
    left = [".imgtool-71-8f.png", ".imgtool-72-8f.png", ".imgtool-711-8f.png", ".imgtool-8f.png", "a.png"]
    for each in left:
        Path(each).touch()
    books.lost("host:71", [order], "SIGKILL")
    books.lost("host:711", [], "SIGKILL")
    books.lost("", [], "SIGKILL")
    books.sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(left[1:])
    Path(left[0]).touch()
    books.batch.shard = Shard(0, 2)
    books.sweep()  # a process of that number may work on another part, on a machine of its own
    assert Path(left[0]).exists()
    os.utime(left[0], (0, 0))
    books.sweep()
    assert not Path(left[0]).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_interrupt_is_enough(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    class Pool(Staff):
        def news(self, seconds: float) -> list[News]:
            signal.raise_signal(number)
            return super().news(seconds)

        def close(self, at_once: bool) -> None:
            signal.raise_signal(signal.SIGINT)
            ended.append("all")

    put("in/a.png")
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("imgtool.runner._pool", lambda *_: (Pool(), 1, 1))
    monkeypatch.setattr("imgtool.console.Console.result", lambda *_: None)
    assert cli.run([*WORDS, "-o", "out/", "--runner", "processes"]) == 130
    assert ended == ["all"]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


class Hostess:
    """A Ray cluster in name alone."""

    def __init__(self, *nodes: tuple[int, int], kinds: Sequence[str] | None = None) -> None:
        resources = [{"CPU": float(cpus), "GPU": float(gpus)} for cpus, gpus in nodes]
        self.found = [{"NodeID": f"{n:x}", "Alive": True, "Resources": r} for n, r in enumerate(resources)]
        self.found.append({"NodeID": "f", "Alive": False, "Resources": {"CPU": 99.0, "GPU": 9.0}})
        self.kinds = kinds
        self.running = True
        self.begun: list[dict[str, object]] = []

    def is_initialized(self) -> bool:
        return False

    def init(self, **options: object) -> None:
        self.begun.append(options)

    def nodes(self) -> list[dict[str, Any]]:
        return self.found

    def shutdown(self) -> None:
        self.running = False

    def _internal_kv_get(self, key: str) -> bytes | None:
        assert key == "__autoscaling_status"
        report = {"active_nodes": dict.fromkeys(self.kinds or (), 1)}
        return None if self.kinds is None else json.dumps({"autoscaler_report": report}).encode()

    def remote(self, **options: object) -> object:
        return lambda actor: None

    def wait(self, answers: Sequence[object], **_: object) -> tuple[list[object], list[object]]:
        return [], [*answers]


def enter(hostess: Hostess, monkeypatch: pytest.MonkeyPatch, address: str = "elsewhere") -> None:
    """Have a cluster taken for Ray."""
    real = importlib.import_module
    ours = ("ray", "ray.experimental.internal_kv")
    monkeypatch.setitem(sys.modules, "ray", hostess)
    monkeypatch.setattr("importlib.import_module", lambda name: hostess if name in ours else real(name))
    monkeypatch.setattr("imgtool.runtime.cores", lambda: 8)
    monkeypatch.setenv("RAY_ADDRESS", address)
    for variable in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
        monkeypatch.setenv(variable, "0")


def test_no_node_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []
    lack = "no node of the Ray cluster has the 4 CPUs of a worker: the largest has 2 CPUs"
    enter(by_hand := Hostess((2, 0), (2, 1), kinds=["node_0", "node_1"]), monkeypatch)
    with pytest.raises(ImgtoolError) as caught:
        connect(0, 4, False, warned.append)
    assert (caught.value.what, caught.value.hint) == (lack, "give fewer --threads")
    assert not by_hand.running
    assert connect(0, 2, True, warned.append) == (True, 1, 2)
    assert not warned
    for kinds in (None, [], ["ray.head.default", "node_1"]):  # it may grow
        enter(it := Hostess((2, 0), (2, 1), kinds=kinds), monkeypatch)
        assert connect(0, 4, False, warned.append) == (True, 1, 4)
        assert warned.pop() == f"{lack}; the workers wait for one that has"
        assert it.running


def test_gpus_are_counted_where_each_worker_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    enter(here := Hostess((8, 0)), monkeypatch, "local")
    with pytest.raises(
        ImgtoolError, match="1 CPU and 1 GPU of a worker: the largest has 8 CPUs and 0 GPUs"
    ) as caught:
        connect(0, 0, True, print)
    assert "--device cpu" in caught.value.hint
    assert not here.running
    enter(here := Hostess((8, 2)), monkeypatch, "local")
    assert connect(0, 0, True, print) == (True, 2, 4)
    assert here.begun[0]["num_cpus"] == 8
    assert connect(0, 0, False, print) == (True, 8, 1)


def test_workers_that_all_wait_are_told_of_again(monkeypatch: pytest.MonkeyPatch) -> None:
    enter(Hostess((2, 0)), monkeypatch)
    said: list[str] = []
    now = 100.0
    monkeypatch.setattr("imgtool.runner.cluster.time.monotonic", lambda: now)
    asked = SimpleNamespace(device="cpu", threads=4)
    pool = Cluster(SimpleNamespace(settings=asked), False, said.append)  # type: ignore[arg-type]
    told = []
    pool.placed = {"a": now, "b": now}
    pool.running = {Hand(): ("an actor", deque(["x"])), Hand(): ("an actor", deque(["y"]))}
    for _ in range(10):
        now += 10.0
        pool.news(0.0)
        told.append(len(said))
    assert told == [0, 0, 1, 1, 1, 1, 1, 1, 1, 2]
    assert CROWDED == 20.0
    assert REMINDER == 60.0
    assert {*said} == {
        "2 of 2 workers wait for room in the Ray cluster, 4 CPUs each: "
        "no node of the Ray cluster has the 4 CPUs of a worker: the largest has 2 CPUs"
    }


def test_a_worker_elsewhere_has_copies_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def mirror(url: str, say: object, warn: object) -> Path:
        fetched.append(url)
        say("fetched")  # type: ignore[operator]
        return Path("its.safetensors")

    monkeypatch.setattr("imgtool.buckets.mirror.mirror", mirror)
    copy = tmp_path / "cache" / "mine.safetensors"
    names.call(copy, "s3://bucket/mine.safetensors")
    asked = engines.settings("filter").Infer(inputs=("s3://bucket/in",), weights=str(copy), target="tv")
    copies = copies_of(asked)
    assert copies == {"weights": "s3://bucket/mine.safetensors"}
    here = Worker(Brief("filter", asked, 1, str(tmp_path), copies=copies)).start()[0]
    elsewhere = Worker(Brief("filter", asked, 1, str(tmp_path), host="elsewhere", copies=copies)).start()[0]
    assert here.fault
    assert "s3://bucket/mine.safetensors" in names.shown(here.fault.what)
    assert fetched == ["s3://bucket/mine.safetensors"]
    assert elsewhere.fault
    assert "its.safetensors" in elsewhere.fault.what
    assert elsewhere.words == [("say", "fetched")]


@pytest.mark.parametrize("there", ["RAY_AUTH_TOKEN", ".ray/auth_token", ""])
def test_a_token_that_is_there_is_shown_to_a_cluster(
    there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
        monkeypatch.setenv(name, "0")
    if there.isupper():
        monkeypatch.setenv(there, "secret")
    elif there:
        Path(there).parent.mkdir()
        Path(there).write_text("secret")
    told: dict[str, str | None] = {}

    class Ray:
        def is_initialized(self) -> bool:
            told["mode"] = os.environ.get("RAY_AUTH_MODE")
            return False

        def init(self, **options: object) -> None:
            os.write(2, b"noise\n")
            raise ConnectionError("Unauthenticated\nmore")

    monkeypatch.setenv("RAY_ADDRESS", "elsewhere")
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    real = importlib.import_module
    monkeypatch.setattr("importlib.import_module", lambda name: Ray() if name == "ray" else real(name))
    with pytest.raises(ImgtoolError, match=r"no Ray cluster at elsewhere: Unauthenticated$") as caught:
        connect(1, 1, False, print)
    assert told == {"mode": "token" if there else None}
    assert not capfd.readouterr().err
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert "RAY_AUTH_MODE=token" in caught.value.hint
    assert "RAY_AUTH_TOKEN" in caught.value.hint


# --- workers ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Return the address of a Ray cluster of this machine."""
    pytest.importorskip("ray")
    script = (
        "import os, sys, ray\n"
        "ray.init(address='local', num_cpus=2, include_dashboard=False, log_to_driver=False,"
        " logging_level='ERROR', object_store_memory=100_000_000)\n"
        "print(ray.get_runtime_context().gcs_address, flush=True)\n"
        "sys.stdin.read()\n"
        "ray.shutdown()\n"
    )
    environment = os.environ | AUTH | {"RAY_USAGE_STATS_ENABLED": "0"}
    environment["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    environment.pop("RAY_ADDRESS", None)
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    ) as process:  # fmt: skip
        assert process.stdout
        yield process.stdout.readline().strip()
        process.communicate()


@pytest.fixture(params=["processes", "ray"])
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "ray":
        monkeypatch.setenv("RAY_ADDRESS", request.getfixturevalue("cluster"))
    return str(request.param)


Start = Callable[..., "subprocess.Popen[str]"]
Hold = Callable[[str], "Held"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Return a function that starts a command; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def call(*words: str, first: Sequence[str] = ()) -> subprocess.Popen[str]:
        words = (*WORDS[:2], *first, *WORDS[2:], "-o", "out", *words)
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "imgtool", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield call
    for process in started:
        with process:
            process.kill()


class Held:
    """A photo that nobody can read to its end before it is let go: a pipe lies in its place."""

    def __init__(self, path: str) -> None:
        self.path, self.photo = Path(path), Path(path).with_suffix(".kept")
        self.ends: list[int] = []
        self.path.rename(self.photo)
        os.mkfifo(self.path)

    def is_read(self) -> bool:
        """Tell whether a process has it open."""
        with suppress(OSError):  # nobody has
            self.ends.append(os.open(self.path, os.O_WRONLY | os.O_NONBLOCK))
            return True
        return False

    def let_go(self) -> None:
        """Put the photo back; who reads the pipe comes to its end, and looks again."""
        if self.photo.exists():
            self.ends.append(os.open(self.path, os.O_RDWR))  # wakes who is about to open it
            os.replace(self.photo, self.path)
        while self.ends:
            os.close(self.ends.pop())


@pytest.fixture
def hold() -> Iterator[Callable[[str], Held]]:
    """Return a function that holds a photo, which must be named in full: in folders a pipe is no photo."""
    held: list[Held] = []

    def call(path: str) -> Held:
        held.append(Held(path))
        return held[-1]

    yield call
    for each in held:
        each.let_go()


def until(found: Callable[[], Any]) -> Any:
    """Wait until something is found, and return it."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        value = found()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError("waited in vain")


def begun(name: str) -> list[int]:
    """Return the processes that began with a photo, one after the other."""
    lines = [line for line in manifest() if line["input"] == name and line["status"] == "begun"]
    return [int(line["worker"].rpartition(":")[2]) for line in lines]


def alive(process: int) -> bool:
    with suppress(OSError):
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z"
    return False


@pytest.mark.slow
def test_workers_do_what_the_plain_run_does(runner: str, start: Start, hold: Hold) -> None:
    put("in/a.png", 1200, 1600)
    names = ["in/a.png", *(f"in/{n % 2}/{n}.png" for n in range(1, 7))]
    for n, each in enumerate(names[1:], 1):
        put(each, 100 + n, 90)
    Path("in/bad.png").write_bytes(b"no photo")
    words = ["--compare", "--side-by-side"]
    assert cli.run([*WORDS, *words, "-o", "plain"]) == 1
    held = hold("in/a.png")  # which the first worker has until the other one is there
    process = start("--runner", runner, "--workers", "2", "--json", *words, first=["in/a.png"])
    until(lambda: len({line["worker"] for line in manifest() if line["status"] == "begun"}) == 2)
    held.let_go()
    out, err = process.communicate()
    assert process.returncode == 1
    assert content("out") == content("plain")
    *records, end = [json.loads(line) for line in out.splitlines()]
    assert {each["input"] for each in records} == {*names, "in/bad.png"}
    assert {key: end["summary"][key] for key in ("photos", "done", "failed", "left_out")} == {
        "photos": 8, "done": 7, "failed": 1, "left_out": 0,
    }  # fmt: skip
    assert end["summary"]["images_per_second"] > 0
    assert "error: in/bad.png is not an image" in err
    assert "1 of 8 failed:" in err
    until(lambda: not any(alive(int(line["worker"].rpartition(":")[2])) for line in manifest()))


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_of_its_photo_loses_nothing(
    runner: str, start: Start, hold: Hold
) -> None:
    put("in/a.png", 1500, 2000)
    for n in range(6):
        put(f"in/b{n}.png", 40 + n)
    assert cli.run([*WORDS, "-o", "plain"]) == 0
    held = hold("in/a.png")
    process = start("--runner", runner, "--workers", "2", first=["in/a.png"])
    until(held.is_read)
    os.kill(begun("in/a.png")[0], signal.SIGKILL)
    held.let_go()
    _, err = process.communicate()
    assert process.returncode == 0
    assert "died (" in err
    assert content("out") == content("plain")
    assert len(begun("in/a.png")) == 2
    assert set(last().values()) == {"done"}


@pytest.mark.slow
def test_a_photo_whose_workers_die_is_given_up_after_three(start: Start, hold: Hold) -> None:
    put("in/a.png", 1500, 2000)
    put("in/b.png")
    held = hold("in/a.png")
    process = start("--runner", "processes", "--workers", "1", first=["in/a.png"])
    for count in (1, 2, 3):
        until(lambda count=count: len(begun("in/a.png")) == count and held.is_read())
        os.kill(begun("in/a.png")[-1], signal.SIGKILL)
    out, err = process.communicate()
    assert process.returncode == 1
    assert "error: in/a.png: the process that worked on it died 3 times" in err
    assert "in/b.png -> out/b.png" in out
    assert last() == {"in/a.png": "failed", "in/b.png": "done"}
    assert list(content("out")) == ["b.png"]


@pytest.mark.slow
def test_a_driver_that_is_killed_is_gone_on_from(runner: str, start: Start, hold: Hold) -> None:
    for n in range(30):
        put(f"in/{n:02}.png", 300, 400)
    assert cli.run([*WORDS, "-o", "plain"]) == 0
    words = ["--runner", runner, "--workers", "2"]
    held = hold("in/29.png")
    process = start("in/29.png", *words)
    until(lambda: list(last().values()).count("done") >= 3)
    process.kill()
    process.wait()
    held.let_go()  # its reader holds the other ends of the driver's streams
    process.communicate()
    workers = {int(line["worker"].rpartition(":")[2]) for line in manifest()}
    until(lambda: not any(map(alive, workers)))
    done = {name for name, status in last().items() if status == "done"}
    assert 3 <= len(done) < 30
    _, err = start(*words, "--skip-existing").communicate()
    assert content("out") == content("plain")
    assert {name for name, status in last().items() if status == "left out"} >= done
    assert set(last().values()) <= {"left out", "done"}
    assert "images/s" in err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_batch_ends_its_workers_and_says_how_to_go_on(
    number: signal.Signals, runner: str, start: Start, hold: Hold
) -> None:
    for n in range(30):
        put(f"in/{n:02}.png", 300, 400)
    held = hold("in/29.png")
    process = start("in/29.png", "--runner", runner, "--workers", "2")
    until(lambda: list(last().values()).count("done") >= 2)
    process.send_signal(number)
    time.sleep(0.15)
    process.send_signal(signal.SIGINT)  # which does not keep it from ending them
    _, err = process.communicate()
    # Killed by it, as the shell tells by 130 too, where Python has let go of its handlers already.
    assert process.returncode in (130, -signal.SIGINT)
    assert err.rstrip().endswith("interrupted")
    assert "of 30 photos are done: the same command with --skip-existing goes on" in err
    # Python warns of a file that the signal caught while it was being opened.
    assert "Traceback" not in err or "ResourceWarning: unclosed file" in err
    until(lambda: not any(alive(int(line["worker"].rpartition(":")[2])) for line in manifest()))
    assert not [name for name in content("out") if name.startswith(".")]
    held.let_go()
    process = start("--runner", runner, "--workers", "2", "--skip-existing")
    process.communicate()
    assert process.returncode == 0
    assert len(content("out")) == 30


@pytest.mark.slow
def test_ray_starts_for_the_batch_and_ends_with_it(start: Start) -> None:
    pytest.importorskip("ray")
    put("in/a.png")
    put("in/b.png")
    process = start("--runner", "ray", "--workers", "1")
    _, err = process.communicate()
    assert process.returncode == 0
    assert "2 photos in" in err
    assert len(content("out")) == 2
    until(lambda: not any(alive(int(line["worker"].rpartition(":")[2])) for line in manifest()))


@pytest.mark.slow
def test_no_cluster_there(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    put("in/a.png")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    process = start("--runner", "ray")
    _, err = process.communicate()
    assert process.returncode == 1
    assert "no Ray cluster at 127.0.0.1:1" in err
    # Python warns of a file that the signal caught while it was being opened.
    assert "Traceback" not in err or "ResourceWarning: unclosed file" in err
