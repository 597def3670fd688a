"""What goes between folders elsewhere and this machine: photos of ``infer``, and folders that are sent."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import gcs
import hub
import pytest

from imgtool import buckets, files, names
from imgtool.buckets import Denied, Found, Interrupted, Offline, Place, etags, outlet, patience, send
from imgtool.buckets import transit as transits
from imgtool.buckets.transit import Transit
from imgtool.errors import USAGE, Fatal, ImgtoolError

PHOTOS = {"a.jpg": b"1", "in/b.JPG": b"22", "in/c.png": b"333", "in/notes.txt": b"4", ".x/d.jpg": b"5"}


class Shelf:
    """A place in memory: all URLs share one dictionary of URL to content."""

    files: ClassVar[dict[str, bytes]] = {}
    wrong: ClassVar[list[Exception]] = []
    asked: ClassVar[list[str]] = []
    spoilt: ClassVar[list[bytes]] = []
    told: ClassVar[tuple[tuple[str, str], ...]] = ()
    gate: ClassVar[threading.Event | None] = None

    def __init__(self, url: str) -> None:
        self.base = url.rstrip("/")

    def url(self, path: str) -> str:
        single = self.base in self.files and self.base.endswith("/" + path)
        return self.base if single else f"{self.base}/{path}"

    def list(self) -> list[Found]:
        if self.base in self.files:
            return [Found(self.base.rpartition("/")[2], len(self.files[self.base]), "", self.told)]
        cut = len(self.base) + 1
        found = [
            Found(url[cut:], len(data)) for url, data in self.files.items() if url.startswith(self.base + "/")
        ]
        return sorted(found, key=lambda found: found.path)

    def whole(self, found: Found) -> bytes:
        if self.wrong:
            raise self.wrong.pop()
        self.asked.append(self.url(found.path))
        if self.gate:
            self.gate.wait(60)
        return self.spoilt.pop() if self.spoilt else self.files[self.url(found.path)]

    def read(self, found: Found, begin: int, end: int) -> bytes:
        if self.wrong:
            raise self.wrong.pop()
        self.asked.append(f"{begin}-{end}")
        return self.files[self.url(found.path)][begin:end]

    def write(self, source: Path, path: str) -> None:
        if self.wrong:
            raise self.wrong.pop()
        self.files[self.url(path)] = source.read_bytes()


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Shelf]:
    """The only place there is, with photos in s3://b/set."""
    monkeypatch.setattr(patience, "WAITS", (0.0, 0.0))
    monkeypatch.setenv("IMGTOOL_CACHE", str(tmp_path / "cache"))
    own = type("Own", (Shelf,), {"files": {f"s3://b/set/{name}": data for name, data in PHOTOS.items()}})
    own.wrong, own.asked, own.spoilt = [], [], []
    monkeypatch.setattr(buckets, "open", own)
    return own


@pytest.fixture
def transit(shelf: type[Shelf]) -> Iterator[Transit]:
    found = Transit.begin(["s3://b/set"], "s3://b/made/")
    yield found
    found.close()


def _items(transit: Transit, url: str = "s3://b/set") -> list[files.Item]:
    return transit.items(url, files.READABLE)


def _until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


# --- listings ---


def test_a_folder_elsewhere_is_listed_as_one_here(transit: Transit) -> None:
    items = _items(transit)
    assert [item.relative.as_posix() for item in items] == ["a.jpg", "in/b.JPG", "in/c.png"]
    assert [item.url for item in items] == [f"s3://b/set/{item.relative.as_posix()}" for item in items]
    spool = Path(transit.plan.spool)
    assert all(item.folder and item.source and item.source.is_relative_to(spool) for item in items)
    assert {item.name for item in items} == {item.url for item in items}


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("s3://b/set/*.jpg", ["a.jpg"]),
        ("s3://b/set/**/*.[Jp]*", ["in/b.JPG", "in/c.png"]),
        ("s3://b/s?t/in/*", ["set/in/b.JPG", "set/in/c.png"]),
        ("s3://b/set/", ["a.jpg", "in/b.JPG", "in/c.png"]),
        ("s3://b/set/in/notes.txt", ["notes.txt"]),
    ],
)
def test_patterns_folders_and_single_files_are_told_apart(
    shelf: type[Shelf], url: str, found: list[str]
) -> None:
    transit = Transit.begin([url], None)
    items = _items(transit, url)
    assert [item.relative.as_posix() for item in items] == found
    assert items[0].folder == (not url.endswith(".txt"))
    for item in items:
        transit.bring(item)
        assert item.source
        assert item.source.read_bytes() == shelf.files[item.url]
    transit.close()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://b/none", "there is nothing"),
        ("s3://b/set/*.tif", "no photo matches"),
        ("s3://b/no/*", "nothing"),
    ],
)
def test_what_holds_no_photo_is_refused(shelf: type[Shelf], url: str, words: str) -> None:
    transit = Transit.begin([url], None)
    with pytest.raises(ImgtoolError, match=words) as fault:
        _items(transit, url)
    assert fault.value.code == USAGE
    transit.close()


def test_a_photo_that_is_begun_too_late_brings_no_spool_back(
    transit: Transit, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, closed, spool = threading.Event(), threading.Event(), Path(transit.plan.spool)

    def hold(_: Transit) -> None:
        begun.set()
        closed.wait(60)

    monkeypatch.setattr(Transit, "_hold", hold)
    item = _items(transit)[0]
    transit.ahead([item])
    (task,) = transit._tasks.values()
    assert begun.wait(60)
    transit.close()
    closed.set()
    assert task.exception(60) is not None
    assert not spool.exists()


@pytest.mark.parametrize("shop", ["s3://b", "https://h"])
def test_a_name_that_looks_like_a_pattern_comes_first(shelf: type[Shelf], shop: str) -> None:
    shelf.files = {f"{shop}/in/{name}.jpg": name.encode() for name in ("x[1]", "x1", "[y]/z[2]", "y/z2")}
    for url, found in {
        f"{shop}/in/x[1].jpg": {"x[1].jpg": b"x[1]"},
        f"{shop}/in/[y]/z[2].jpg": {"z[2].jpg": b"[y]/z[2]"},
        f"{shop}/in/[y]": {"z[2].jpg": b"[y]/z[2]"},
        f"{shop}/in/[y]/*": {"y/z2.jpg": b"y/z2"},
        f"{shop}/in/x[12].jpg": {"x1.jpg": b"x1"},
    }.items():
        transit = Transit.begin([url], None)
        items = _items(transit, url)
        for item in items:
            transit.bring(item)
        assert {item.relative.as_posix(): item.source and item.source.read_bytes() for item in items} == found
        assert items[0].folder == ("z[2]" not in url and "x[1]." not in url)
        transit.close()


def test_a_name_that_leads_elsewhere_is_a_photo_that_fails(shelf: type[Shelf]) -> None:
    shelf.files |= {
        "s3://b/set/../../evil.jpg": b"x",
        "s3://b/set/in//b.JPG": b"x",
        "s3://b/set/a//x.txt": b"",
    }
    transit = Transit.begin(["s3://b/set"], None)
    items = _items(transit)
    odd = [item for item in items if "%" in str(item.relative)]
    assert len(items) == 5
    assert len({item.relative for item in items}) == 5
    assert sorted(item.url for item in odd) == ["s3://b/set/../../evil.jpg", "s3://b/set/in//b.JPG"]
    transit.ahead(items)
    for item in odd:
        assert str(item.source).startswith(transit.plan.spool)
        with pytest.raises(ImgtoolError, match="refused, for a part of its name is empty") as fault:
            transit.bring(item)
        assert item.url in fault.value.what
    for item in items:
        if item not in odd:
            transit.bring(item)
    transit.close()


def test_what_cannot_be_listed_fails_as_a_photo_does(
    shelf: type[Shelf], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = shelf.list
    monkeypatch.setattr(shelf, "list", lambda self: [*listed(self), Found("deep", fault="cannot be listed")])
    for url in ("s3://b/set", "s3://b/set/*.jpg"):
        transit = Transit.begin([url], None)
        with pytest.raises(ImgtoolError, match="s3://b/set/deep: cannot be listed"):
            transit.bring(next(item for item in _items(transit, url) if item.relative.name == "deep"))
        transit.close()


# --- photos ---


def test_photos_lie_here_from_bringing_to_dropping(transit: Transit, shelf: type[Shelf]) -> None:
    item = _items(transit)[1]
    transit.bring(item)
    assert item.source
    assert item.source.read_bytes() == b"22"
    transit.bring(item)
    assert shelf.asked == [item.url]
    transit.drop(item)
    assert not item.source.exists()
    here = files.Item(Path("here.jpg"), Path("here.jpg"))
    transit.ahead([here])
    transit.bring(here)
    transit.drop(here)


def test_no_more_photos_are_fetched_ahead_than_may_lie_here(shelf: type[Shelf]) -> None:
    shelf.files = {f"s3://b/many/{n:02}.jpg": b"x" for n in range(20)}
    transit = Transit(Transit.begin(["s3://b/many"], None).plan, ahead=3)
    items = _items(transit, "s3://b/many")
    transit.ahead(items)
    _until(lambda: len(shelf.asked) == 3)
    transit.bring(items[-1])  # out of turn
    for item in items:
        transit.bring(item)
        transit.drop(item)
    assert sorted(shelf.asked) == sorted(shelf.files)
    transit.close()


def test_a_photo_that_is_dropped_on_its_way_does_not_stay(transit: Transit, shelf: type[Shelf]) -> None:
    shelf.gate = threading.Event()
    items = _items(transit)
    transit.ahead(items)
    _until(lambda: len(shelf.asked) == 3)
    for item in items:
        transit.drop(item)
    task = threading.Thread(target=transit.bring, args=(items[0],))  # wanted again
    task.start()
    _until(lambda: items[0].source not in transit._dropped)
    shelf.gate.set()
    task.join()
    _until(lambda: [item.source and item.source.exists() for item in items] == [True, False, False])
    assert not transit._dropped
    assert len(shelf.asked) == 3


def test_a_photo_is_fetched_once_more_where_its_hash_is_wrong(shelf: type[Shelf]) -> None:
    url = "s3://b/set/in/b.JPG"
    shelf.told = (("sha256", hashlib.sha256(b"22").hexdigest()), ("md5", hashlib.md5(b"22").hexdigest()))
    transit = Transit.begin([url], None)
    (item,) = _items(transit, url)
    shelf.spoilt = [b"33"]
    worker = Transit(transit.plan)
    worker.bring(pickle.loads(pickle.dumps(item)))
    assert item.source
    assert item.source.read_bytes() == b"22"
    worker.drop(item)
    shelf.spoilt = [b"33", b"33"]
    with pytest.raises(ImgtoolError, match=r"in/b\.JPG: its SHA256 is not what the store tells, twice"):
        transit.bring(item)
    assert not item.source.exists()
    worker.close()
    transit.close()


def test_a_photo_of_another_size_than_was_listed_is_refused(transit: Transit, shelf: type[Shelf]) -> None:
    item = _items(transit)[1]
    shelf.spoilt = [b"2"]
    with pytest.raises(ImgtoolError, match=r"in/b\.JPG has changed since it was listed"):
        transit.bring(item)
    assert item.source
    assert not item.source.exists()


def test_an_etag_that_is_no_md5_is_doubted_aloud(shelf: type[Shelf], monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.files = {f"s3://b/set/{n}.jpg": b"x" for n in range(6)}
    shelf.told = (("etag-md5", "0" * 32),)
    listed = shelf.list
    monkeypatch.setattr(
        shelf, "list", lambda self: [replace(each, digests=self.told) for each in listed(self)]
    )
    said: list[str] = []
    transit = Transit.begin(["s3://b/set"], None, said.append)
    items = _items(transit)
    for item in items:
        transit.bring(item)
    assert len(shelf.asked) == 6 + etags.ENOUGH  # then it is plain that none there is an MD5
    assert [text.rpartition(" ")[2] for text in said] == [item.url for item in items[: etags.ENOUGH]]
    transit.close()
    url = "s3://b/set/0.jpg"
    transit = Transit.begin([url], None)
    shelf.spoilt = [b"3", b"4"]
    with pytest.raises(ImgtoolError, match=r"0\.jpg: its ETAG-MD5"):
        transit.bring(_items(transit, url)[0])
    transit.close()


def test_a_large_photo_comes_in_pieces(transit: Transit, shelf: type[Shelf]) -> None:
    data = os.urandom(transits.WHOLE + 1)
    shelf.files["s3://b/set/a.jpg"] = data
    item = _items(transit)[0]
    shelf.wrong = [Interrupted("cut")]
    transit.bring(item)
    assert item.source
    assert item.source.read_bytes() == data
    assert len(shelf.asked) == 3


def test_what_is_interrupted_is_asked_for_again_and_a_failure_is_no_last_word(
    transit: Transit, shelf: type[Shelf]
) -> None:
    item = _items(transit)[0]
    shelf.wrong += [Interrupted("cut"), Interrupted("cut")]
    transit.bring(item)
    transit.drop(item)
    shelf.wrong.append(ImgtoolError("no permission"))
    with pytest.raises(ImgtoolError, match="no permission"):
        transit.bring(item)
    transit.bring(item)
    assert item.source
    assert item.source.exists()


def test_a_worker_brings_and_sends_by_the_plan_alone(transit: Transit, shelf: type[Shelf]) -> None:
    item = _items(transit)[2]
    worker = Transit(pickle.loads(pickle.dumps(transit.plan)))
    worker.bring(item)
    assert item.source
    assert item.source.read_bytes() == b"333"
    made = Path(transit.local("s3://b/made/"), "c.png")
    files.write(made, b"made")
    worker.send([made])
    worker.close()
    assert shelf.files["s3://b/made/c.png"] == b"made"
    assert Path(transit.plan.spool).exists()
    transit.close()
    assert not Path(transit.plan.spool).exists()


# --- outputs ---


@pytest.mark.parametrize(
    ("out", "local"),
    [
        ("s3://b/made/", "out/"),
        ("s3://b", "out/"),
        ("s3://b/x.png", "out/x.png"),
        ("s3://b/set", "out/set/"),
        ("s3://b/new", "out/new"),
    ],
)
def test_outputs_stand_in_the_spool_as_their_url_says(shelf: type[Shelf], out: str, local: str) -> None:
    transit = Transit.begin([], out)
    assert transit.local(out) == f"{transit.plan.spool}/{local}"
    made = Path(transit.local(out), "y.png") if local.endswith("/") else Path(transit.local(out))
    files.write(made, b"made")
    url = transit.shown(made)
    assert made not in transit.sent()
    transit.send([made, Path("elsewhere.png")])
    assert made in transit.sent()
    assert (shelf.files[url], made.exists()) == (b"made", False)
    assert url == (f"{out.rstrip('/')}/y.png" if local.endswith("/") else out)
    transit.close()


def test_what_the_destination_holds_is_known(transit: Transit, shelf: type[Shelf]) -> None:
    shelf.files["s3://b/made/in/c.png"] = b"old"
    folder = Path(transit.local("s3://b/made/"))
    assert folder / "in/c.png" in transit.sent()
    assert folder / "a.jpg" not in transit.sent()
    assert Path("a.jpg") not in transit.sent()


@pytest.mark.parametrize("url", ["s3://b/set", "s3://b/set/a.jpg"])
def test_outputs_beside_their_inputs_go_back_there(shelf: type[Shelf], url: str) -> None:
    shelf.files["s3://b/set/b-deblur.jpg"] = b"old"
    transit = Transit.begin([url], None)
    item = _items(transit, url)[0]
    assert item.source
    made = item.source.with_name("a-deblur.jpg")
    transit.check_writable([made])
    assert made not in transit.sent()
    assert item.source.with_name("b-deblur.jpg") in transit.sent()
    files.write(made, b"made")
    transit.send([made])
    assert shelf.files["s3://b/set/a-deblur.jpg"] == b"made"
    assert transit.shown(made) == "s3://b/set/a-deblur.jpg"
    transit.close()


def test_nothing_is_written_where_one_can_only_read(shelf: type[Shelf]) -> None:
    shelf.files = {"https://h/set/a.jpg": b"1"}
    with pytest.raises(ImgtoolError, match="cannot write to https") as fault:
        Transit.begin([], "https://h/out/")
    assert fault.value.code == USAGE
    transit = Transit.begin(["https://h/set/a.jpg"], None)
    (item,) = _items(transit, "https://h/set/a.jpg")
    assert item.source
    with pytest.raises(ImgtoolError, match=r"cannot write https://h/set/a-x\.jpg"):
        transit.check_writable([item.source.with_name("a-x.jpg")])
    transit.close()


def test_an_output_that_cannot_be_sent_stays_here(transit: Transit, shelf: type[Shelf]) -> None:
    made = Path(transit.local("s3://b/made/"), "c.png")
    files.write(made, b"made")
    shelf.wrong.append(ImgtoolError("no permission"))
    spool = transit.plan.spool
    with pytest.raises(ImgtoolError, match="no permission") as fault:
        transit.send([made])
    assert spool in names.shown(fault.value.hint)
    assert made.exists()
    for item in _items(transit):
        transit.bring(item)
    beside = Path(transit.plan.sources[0][0], "set/in/b-x.JPG")
    files.write(beside, b"made")
    files.write(beside.with_name(".imgtool-1"), b"of a worker that was killed")
    assert transit.close() == [beside, made]
    said: list[str] = []
    again = Transit.begin(["s3://b/set"], "s3://b/made", said.append)
    assert "2 files of earlier runs (0.0 MB) were never sent" in said[0]
    assert spool in said[0]
    own = {Path(spool, "lock"), Path(spool, "urls.json")}
    assert {path for path in Path(spool).rglob("*") if path.is_file()} == {beside, made, *own}
    assert made.read_bytes() == b"made"
    worker = Transit(pickle.loads(pickle.dumps(again.plan)))
    for folder, name in (
        (again.local("s3://b/made") + "/", "c.png"),
        (again.plan.sources[0][0], "set/in/b-x.JPG"),
    ):
        assert beside.exists()
        files.write(Path(folder, name), b"anew")
        worker.send([Path(folder, name)])
    assert (shelf.files["s3://b/made/c.png"], shelf.files["s3://b/set/in/b-x.JPG"]) == (b"anew", b"anew")
    worker.close()
    again.close()
    assert not Path(spool).exists()


def test_the_spool_of_a_process_that_was_killed_is_swept(transit: Transit) -> None:
    killed = Transit.begin(["s3://b/set"], None)
    worker = Transit(killed.plan)
    worker.bring(_items(killed)[0])
    spool = Path(killed.plan.spool)
    for dies in (killed, worker):
        Transit.begin([], None).close()
        assert len([path for path in spool.rglob("*.jpg") if path.is_file()]) == 1
        os.close(dies._held)
    Transit.begin([], None).close()
    assert not spool.exists()
    assert Path(transit.plan.spool).exists()


def test_the_last_worker_of_another_machine_leaves_nothing(transit: Transit) -> None:
    item = _items(transit)[0]
    spool = Path(transit.plan.spool)
    os.close(transit._held)
    transit._held = -1
    shutil.rmtree(spool)  # as it is there
    workers = Transit(transit.plan), Transit(transit.plan)
    workers[0].bring(item)
    workers[1].bring(_items(transit)[1])
    assert workers[0].close() == []
    assert spool.exists()
    assert workers[1].close() == []
    assert not spool.exists()


# --- what stalls, and what is dead ---


def test_nobody_waits_for_a_server_that_stalls(transit: Transit, shelf: type[Shelf]) -> None:
    shelf.gate = threading.Event()
    transit.ahead(_items(transit))
    _until(lambda: len(shelf.asked) == 3)
    transit.close()
    assert not any(task.done() for task in transit._tasks.values())
    assert not Path(transit.plan.spool).exists()
    shelf.gate.set()
    _until(lambda: all(task.done() for task in transit._tasks.values()))
    assert not Path(transit.plan.spool).exists()
    assert not [thread for thread in threading.enumerate() if not thread.daemon and "imgtool" in thread.name]


def test_patience_has_an_end_when_all_is_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "WAITS", (60.0, 60.0))
    stop, asked = threading.Event(), []

    def broken() -> None:
        asked.append(1)
        stop.set()
        raise Interrupted("cut")

    with pytest.raises(Offline, match="cut"):
        patience.patiently(broken, stop)
    assert asked == [1]


def test_who_stops_waits_for_no_upload(
    transit: Transit, shelf: type[Shelf], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Path(transit.local("s3://b/made/"), "c.png")
    files.write(made, b"made")
    gate, written = threading.Event(), threading.Event()

    def stall(self: Shelf, source: Path, path: str) -> None:
        gate.wait(60)
        written.set()

    monkeypatch.setattr(outlet, "HURRY", 0.05)
    monkeypatch.setattr(shelf, "write", stall)

    def stopped() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            transit.send([made])

    with pytest.raises(Offline, match="no answer within"):
        stopped()
    assert not written.is_set()
    gate.set()


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_command_ends_while_a_server_stalls(
    stop: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("obstore")
    reached, gate = threading.Event(), threading.Event()

    def stall(self: gcs._Handler, *told: object) -> None:
        reached.set()
        gate.wait()

    monkeypatch.setattr(gcs._Handler, "_content", stall)
    with gcs.serve({f"set/{n}.jpg": b"x" for n in range(3)}) as server:
        surroundings = os.environ | {"STORAGE_EMULATOR_HOST": server.url, "IMGTOOL_CACHE": str(tmp_path)}
        child = subprocess.Popen(
            [sys.executable, "-m", "imgtool", "infer", "filter", "gs://bucket/set", "-o", "gs://bucket/x/"],
            env=surroundings, cwd=tmp_path, preexec_fn=lambda: signal.signal(stop, _usual(stop)),
        )  # fmt: skip
        try:
            assert reached.wait(300)
            child.send_signal(stop)
            assert child.wait(50) == 130  # before a request is given up, which is after 60 s
        finally:
            gate.set()
            child.kill()
            child.wait()
    assert not list(tmp_path.glob("spool/*"))


def _usual(stop: int) -> Any:
    """Return what a signal does in a command that is started by hand, not in the background."""
    return signal.default_int_handler if stop == signal.SIGINT else signal.SIG_DFL


def _sends(transit: Transit, shelf: type[Shelf], *faults: Exception) -> list[type]:
    """Return what comes of sending one file after the other while these faults are met."""
    kinds: list[type] = []
    for n, fault in enumerate(faults):
        made = Path(transit.local("s3://b/made/"), f"{n}.png")
        files.write(made, b"made")
        shelf.wrong[:] = [fault] * 3
        try:
            transit.send([made])
        except ImgtoolError as found:
            kinds.append(type(found))
    return kinds


def test_a_destination_that_is_down_ends_the_batch(transit: Transit, shelf: type[Shelf]) -> None:
    (item, *_) = _items(transit)
    down = Interrupted("busy")
    assert _sends(transit, shelf, down, down) == [Offline, Offline]
    shelf.wrong.clear()
    files.write(Path(transit.local("s3://b/made/"), "x.png"), b"made")
    transit.send([Path(transit.local("s3://b/made/"), "x.png")])
    odd = ImgtoolError("the name is too long")
    assert _sends(transit, shelf, down, odd, down, down, down) == [
        Offline,
        ImgtoolError,
        Offline,
        Fatal,
        Fatal,
    ]
    with pytest.raises(Fatal, match="busy"):
        transit.bring(item)


@pytest.mark.parametrize(
    "fault",
    [Denied("no permission"), ImgtoolError("no such bucket: s3://b", "check the name", USAGE)],
)
def test_a_destination_that_refuses_ends_the_batch(
    transit: Transit, shelf: type[Shelf], fault: ImgtoolError
) -> None:
    assert _sends(transit, shelf, fault) == [Fatal]


def test_a_permission_that_others_had_is_of_one_file(transit: Transit, shelf: type[Shelf]) -> None:
    files.write(Path(transit.local("s3://b/made/"), "x.png"), b"made")
    transit.send([Path(transit.local("s3://b/made/"), "x.png")])
    assert _sends(transit, shelf, Denied("no permission")) == [Denied]


def test_a_bucket_that_is_not_there_is_told_first(
    shelf: type[Shelf], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(self: Shelf) -> list[Found]:
        raise faults.pop()

    faults: list[Exception] = [ImgtoolError("no such bucket: s3://b", "check the name", USAGE)]
    monkeypatch.setattr(shelf, "list", missing)
    with pytest.raises(ImgtoolError, match="no such bucket"):
        Transit.begin([], "s3://b/made/")
    assert not list(files.cache_folder().glob("spool/*"))
    faults += [Denied("no permission to list")] * 2
    transit = Transit.begin([], "s3://b/made/")  # which one may write to
    with pytest.raises(Fatal, match="no permission to list"):
        transit.holds(Path(transit.local("s3://b/made/"), "c.png"))
    transit.close()


# --- folders that are sent ---


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    for name in (
        "done.json",
        "last.pt",
        "best.safetensors",
        "log.jsonl",
        "deep/last.pt",
        ".imgtool-1",
        ".h/x",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_a_state_is_sent_after_all_that_it_refers_to(shelf: type[Shelf], run: Path) -> None:
    shelf.files = {}
    known = send.send(run, "s3://b/run", {})
    order = [url.removeprefix("s3://b/run/") for url in shelf.files]
    assert set(order[:2]) == {"best.safetensors", "log.jsonl"}
    assert set(order[2:4]) == {"last.pt", "deep/last.pt"}
    assert order[4:] == ["done.json"]
    assert set(known) == set(order)
    assert not [path for path in run.iterdir() if path.name.startswith(".imgtool-") and path.is_dir()]


def test_a_state_that_is_replaced_meanwhile_is_sent_as_it_was(
    shelf: type[Shelf], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = shelf.write

    def slow(self: Shelf, source: Path, path: str) -> None:
        if path == "log.jsonl" and (run / "last.pt").read_text() == "last.pt":
            files.write(run / "best.safetensors", b"newer")
            files.write(run / "last.pt", b"refers to newer")
        write(self, source, path)

    monkeypatch.setattr(shelf, "write", slow)
    known = send.send(run, "s3://b/run", {}, jobs=1)
    assert shelf.files["s3://b/run/last.pt"] == b"last.pt"
    send.send(run, "s3://b/run", known)
    assert shelf.files["s3://b/run/last.pt"] == b"refers to newer"
    assert shelf.files["s3://b/run/best.safetensors"] == b"newer"


def test_only_what_changed_is_sent_again(shelf: type[Shelf], run: Path) -> None:
    known = send.send(run, "s3://b/run", {})
    shelf.files = {}
    send.send(run, "s3://b/run", known)
    assert shelf.files == {}
    (run / "log.jsonl").write_text("more and more")
    send.send(run, "s3://b/run", known)
    assert shelf.files == {"s3://b/run/log.jsonl": b"more and more"}


def test_no_state_is_sent_while_another_file_could_not_be(shelf: type[Shelf], run: Path) -> None:
    shelf.files = {}
    shelf.wrong = [ImgtoolError("no permission", "ask"), Interrupted("cut")]
    known: send.Known = {}
    with pytest.raises(ImgtoolError, match="no permission"):
        send.send(run, "s3://b/run", known, jobs=1)
    assert len(known) == 1
    assert not [url for url in shelf.files if url.endswith((".pt", "done.json"))]
    send.send(run, "s3://b/run", known)
    assert len(shelf.files) == 5


def test_an_upload_that_is_interrupted_is_tried_again(shelf: type[Shelf], run: Path) -> None:
    shelf.files = {}
    shelf.wrong = [Interrupted("cut"), Interrupted("cut")]
    send.send(run, "s3://b/run", {}, jobs=1)
    assert len(shelf.files) == 5


def test_a_sender_outlives_files_that_vanish_and_disks_that_fail(
    shelf: type[Shelf], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    faults = [PermissionError(13, "Permission denied"), OSError(28, "No space left on device")]
    kept = send._kept
    monkeypatch.setattr(send, "_kept", lambda folder: _raise(faults.pop()) if faults else kept(folder))
    with send.Sender(run, "s3://b/x", said.append, every=0.001) as sender:
        _until(lambda: not sender.unsent)
    assert said == [f"cannot send {run}: no space left on device; it is tried again"]
    faults.append(PermissionError(13, "Permission denied"))
    with (
        pytest.raises(ImgtoolError, match="permission denied") as fault,
        send.Sender(run, "s3://b/x", said.append, again="--resume s3://b/x sends the rest") as sender,
    ):
        pass
    assert sender.unsent
    assert fault.value.hint == f"--resume s3://b/x sends the rest; everything is in {run}"


def test_who_stops_twice_waits_for_no_folder(
    shelf: type[Shelf], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, begun, written = threading.Event(), threading.Event(), threading.Event()

    def stall(self: Shelf, source: Path, path: str) -> None:
        begun.set()
        gate.wait(60)
        written.set()

    def interrupt() -> None:
        begun.wait()
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(shelf, "write", stall)
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        send.send(run, "s3://b/run", {})
    assert not written.is_set()
    gate.set()
    signal.signal(signal.SIGUSR1, before)


def _raise(fault: Exception) -> None:
    raise fault


def test_what_vanishes_before_it_is_sent_stops_nothing_else(
    shelf: type[Shelf], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.files = {}
    listed = send.listed
    gone = {"gone.txt": (1, 1), "gone/last.pt": (1, 1)}
    monkeypatch.setattr(send, "listed", lambda folder: listed(folder) | gone)
    known = send.send(run, "s3://b/run", {})
    assert len(shelf.files) == len(known) == 5


def test_a_sender_sends_while_the_work_goes_on_and_after_it_failed(
    shelf: type[Shelf], tmp_path: Path
) -> None:
    said: list[str] = []
    folder = tmp_path / "made"

    def work() -> None:
        with send.Sender(folder, "s3://b/made", said.append, every=0.01):
            files.write(folder / "1.txt", b"1")
            _until(lambda: "s3://b/made/1.txt" in shelf.files)
            files.write(folder / "2.txt", b"2")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert shelf.files["s3://b/made/2.txt"] == b"2"
    assert said == []


def test_a_sender_that_fails_names_the_folder_and_hides_no_other_failure(
    shelf: type[Shelf], run: Path
) -> None:
    said: list[str] = []
    shelf.wrong = [ImgtoolError("no permission", "ask") for _ in range(100)]
    with (
        pytest.raises(ImgtoolError, match="no permission") as fault,
        send.Sender(run, "s3://b/x", said.append),
    ):
        pass
    assert str(run) in fault.value.hint
    with pytest.raises(ZeroDivisionError), send.Sender(run, "s3://b/x", said.append):
        raise ZeroDivisionError
    assert len(said) == 1
    assert str(run) in said[0]
    with pytest.raises(ImgtoolError, match="to read from"):
        send.Sender(run, "hf://datasets/ann/photos", said.append)


# --- through a store and the web ---


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """An S3 server of this process."""
    pytest.importorskip("obstore")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A new bucket that holds the photos below set/."""
    monkeypatch.setenv("IMGTOOL_CACHE", str(tmp_path / "cache"))
    for name, value in {
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    name = f"b{uuid.uuid4().hex}"
    for path in ("", *(f"/set/{each}" for each in PHOTOS)):
        data = PHOTOS[path[5:]] if path else b""
        kind = {"Content-Type": "application/octet-stream"}
        request = urllib.request.Request(f"{s3}/{name}{path}", data, kind, method="PUT")
        urllib.request.urlopen(request).close()
    return f"s3://{name}"


@pytest.mark.slow
def test_photos_and_outputs_pass_through_a_store(bucket: str) -> None:
    transit = Transit.begin([f"{bucket}/set"], f"{bucket}/made/")
    items = transit.items(f"{bucket}/set", files.READABLE)
    assert [item.relative.as_posix() for item in items] == ["a.jpg", "in/b.JPG", "in/c.png"]
    worker = Transit(transit.plan)
    for brings in (transit, worker):
        brings.ahead(items)
        for item in items:
            brings.bring(item)
            assert item.source
            assert item.source.read_bytes() == PHOTOS[item.relative.as_posix()]
            brings.drop(item)
    made = Path(transit.local(f"{bucket}/made/"), "in/c.png")
    assert made not in transit.sent()
    files.write(made, b"made")
    transit.send([made])
    assert Transit(transit.plan).holds(made)
    worker.close()
    transit.close()
    place: Place = buckets.open(f"{bucket}/made")
    (found,) = place.list()
    assert (found.path, place.whole(found)) == ("in/c.png", b"made")


@pytest.mark.slow
def test_a_folder_is_sent_to_a_store(bucket: str, run: Path) -> None:
    with send.Sender(run, f"{bucket}/run", print):
        files.write(run / "later.txt", b"later")
    found = {each.path for each in buckets.open(f"{bucket}/run").list()}
    assert found == {"best.safetensors", "done.json", "last.pt", "deep/last.pt", "log.jsonl", "later.txt"}


def test_photos_come_from_a_web_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMGTOOL_CACHE", str(tmp_path))
    monkeypatch.setattr(patience, "WAITS", (0.0, 0.0))
    server = hub.Server(hub.Web)
    server.files = {f"/my set/{name}": data for name, data in PHOTOS.items()}
    with hub.serving(server):
        url = f"{server.url}/my%20set"
        transit = Transit.begin([url, f"{url}/a.jpg?sig=1"], None)
        items = transit.items(url, files.READABLE)
        (single,) = transit.items(f"{url}/a.jpg?sig=1", files.READABLE)
        server.wrong["/my set/in/b.JPG"] = ["cut", "busy"]
        transit.ahead(items)
        for item in [*items, single]:
            transit.bring(item)
            assert item.source
            assert item.source.read_bytes() == PHOTOS[item.relative.as_posix()]
        assert single.url == f"{url}/a.jpg"
        assert server.asked[-1][1] == "/my%20set/a.jpg?sig=1"
        transit.close()
    assert list((tmp_path / "spool").iterdir()) == []
