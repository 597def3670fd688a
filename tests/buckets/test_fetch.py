"""Fetching: parallel, checked, resumed at the byte reached, never half a file under its name."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import gcs
import pytest
from shelf import PHOTOS, Shelf, killed, lies

from imgtool.buckets import Denied, Found, getting, manifest
from imgtool.buckets import fetch as fetching
from imgtool.buckets.fetch import action, checked, fetch
from imgtool.buckets.state import FOLDER, PIECE
from imgtool.engine import Watch
from imgtool.errors import ImgtoolError


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getting, "WAITS", (0.0, 0.0, 0.0))


def test_a_fetched_folder_is_the_same_and_has_a_manifest_with_hashes(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    record = fetch(Shelf(dict(PHOTOS)), tmp_path, watch=Watch(lambda *step: steps.append(step)))
    assert lies(tmp_path) == PHOTOS
    assert (record["files"], record["fetched"], record["unchanged"], record["faults"]) == (4, 4, 0, [])
    assert record["bytes"] == sum(map(len, PHOTOS.values()))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    head, *rows = map(json.loads, (tmp_path / manifest.NAME).read_text().splitlines())
    assert (head["url"], head["files"], head["bytes"], head["complete"]) == ("gs://shelf", 4, 158, True)
    assert {row["path"]: row["sha256"] for row in rows} == {
        path: hashlib.sha256(data).hexdigest() for path, data in PHOTOS.items()
    }


def test_only_what_is_missing_or_has_changed_is_fetched_again(tmp_path: Path) -> None:
    shelf = Shelf(dict(PHOTOS))
    fetch(shelf, tmp_path)
    shelf.asked.clear()
    shelf.files["b/c.JPG"] = b"new"
    (tmp_path / "a.jpg").unlink()
    os.utime(tmp_path / "ü #%.jpg", (1, 1))  # touched, and still the same
    record = fetch(shelf, tmp_path)
    assert sorted(path for path, _, _ in shelf.asked) == ["a.jpg", "b/c.JPG"]
    assert (record["fetched"], record["unchanged"]) == (2, 2)
    assert lies(tmp_path) == shelf.files


def test_suffixes_choose_in_any_case_and_the_rest_may_come_later(tmp_path: Path) -> None:
    shelf = Shelf(dict(PHOTOS))
    fetch(shelf, tmp_path, suffixes=(".jpg",))
    assert sorted(lies(tmp_path)) == ["a.jpg", "b/c.JPG", "ü #%.jpg"]
    assert fetch(shelf, tmp_path)["fetched"] == 1
    assert lies(tmp_path) == PHOTOS


def test_a_suffix_that_no_file_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImgtoolError, match=r"none of 4 files ends in \.jpeg") as fault:
        fetch(Shelf(dict(PHOTOS)), tmp_path, suffixes=(".jpeg",))
    assert fault.value.hint == "what is there ends in .jpg, .JPG, .txt"
    assert lies(tmp_path) == {}


@pytest.mark.parametrize("readable", [(), ("a.jpg",)])
def test_where_nothing_may_be_read_that_is_said_once(readable: tuple[str, ...], tmp_path: Path) -> None:
    class Shut(Shelf):
        def read(self, found: Found, begin: int, end: int) -> bytes:
            if found.path not in readable:
                raise Denied(f"no permission to read {found.path}", "sign in")
            return super().read(found, begin, end)

    if not readable:
        with pytest.raises(Denied, match="no permission to read") as fault:
            fetch(Shut(dict(PHOTOS)), tmp_path, jobs=1)
        assert fault.value.hint == "sign in"
    else:
        assert len(fetch(Shut(dict(PHOTOS)), tmp_path, jobs=1)["faults"]) == 3
    assert sorted(lies(tmp_path)) == [*readable]


def test_a_file_of_the_user_is_not_overwritten_without_force(tmp_path: Path) -> None:
    shelf = Shelf(dict(PHOTOS))
    (tmp_path / "a.jpg").write_bytes(b"mine")
    (tmp_path / "ü #%.jpg").write_bytes(b"three")  # the same as there
    record = fetch(shelf, tmp_path)
    assert record["faults"] == ["a.jpg: another file is there already; --force overwrites it"]
    assert (tmp_path / "a.jpg").read_bytes() == b"mine"
    assert (record["fetched"], record["unchanged"]) == (2, 1)
    (tmp_path / "b/c.JPG").write_bytes(b"edited")
    record = fetch(shelf, tmp_path)
    assert record["faults"] == [
        "a.jpg: another file is there already; --force overwrites it",
        "b/c.JPG: it was changed here; --force overwrites it",
    ]
    assert (record["files"], record["unchanged"]) == (2, 2)
    assert fetch(shelf, tmp_path, force=True)["faults"] == []
    assert lies(tmp_path) == PHOTOS


def test_a_folder_of_another_url_is_refused(tmp_path: Path) -> None:
    fetch(Shelf({"a": b"1"}), tmp_path)
    other = Shelf({"a": b"2"}, url="s3://other")
    with pytest.raises(ImgtoolError, match="holds files of gs://shelf") as caught:
        fetch(other, tmp_path)
    assert caught.value.code == 2
    assert fetch(other, tmp_path, force=True)["fetched"] == 1
    assert lies(tmp_path) == {"a": b"2"}


def test_names_that_lead_outside_or_clash_are_faults_and_the_others_are_kept(tmp_path: Path) -> None:
    names = [
        "../out",
        "/etc/x",
        "C:/x",
        "C:x",
        "d/../../e",
        "d\\..\\..\\e",
        "f",
        "f/g",
        "good..jpg",
        "h/i",
        "h/./i",
    ]
    record = fetch(Shelf(dict.fromkeys(names, b"1")), tmp_path / "in")
    assert [str(fault).partition(":")[0] for fault in record["faults"]] == [  # type: ignore[attr-defined]
        "../out", "/etc/x", "C", "C", "d/../../e", "d\\..\\..\\e", "f", "h/./i",
    ]  # fmt: skip
    assert sorted(lies(tmp_path)) == ["in/f/g", "in/good..jpg", "in/h/i"]


def test_a_broken_connection_goes_on_at_the_byte_reached(tmp_path: Path) -> None:
    shelf = Shelf({"a": bytes(range(100))})
    shelf.breaks = [10, 0, 25]
    assert fetch(shelf, tmp_path)["faults"] == []
    assert shelf.asked == [("a", 0, 100), ("a", 10, 100), ("a", 10, 100), ("a", 35, 100)]
    assert lies(tmp_path) == shelf.files


def test_of_a_file_without_tag_and_hash_nothing_is_put_together(tmp_path: Path) -> None:
    shelf = Shelf({"a": bytes(range(100))}, digests=False)
    shelf.tags, shelf.breaks = {"a": ""}, [10]
    assert fetch(shelf, tmp_path)["faults"] == []
    assert shelf.asked == [("a", 0, 100), ("a", 0, 100)]


def test_a_file_that_cannot_be_had_is_a_fault_and_the_others_are_kept(tmp_path: Path) -> None:
    shelf = Shelf({"a": b"1", "b": b"2"})
    listed = shelf.list()
    del shelf.files["a"]
    shelf.list = lambda: listed  # type: ignore[method-assign]
    record = fetch(shelf, tmp_path)
    assert record["faults"] == ["a: no such file: a"]
    assert (lies(tmp_path), record["files"]) == ({"b": b"2"}, 1)
    known = manifest.read(tmp_path)
    assert known
    assert not known.complete


def test_a_connection_that_stays_broken_ends_in_a_fault_after_some_attempts(tmp_path: Path) -> None:
    shelf = Shelf({"a": b"123"})
    shelf.breaks = [0] * 50
    assert "the connection broke" in str(fetch(shelf, tmp_path)["faults"])
    assert len(shelf.asked) == 4


def test_failure_after_failure_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getting, "WAITS", ())
    shelf = Shelf({f"{number:03}": b"1" for number in range(200)})
    shelf.breaks = [0] * 200
    faults = fetch(shelf, tmp_path, jobs=1)["faults"]
    assert len(faults) == 65  # type: ignore[arg-type]
    assert faults[-1] == "136 more were not tried, after 64 failures in a row"  # type: ignore[index]


def test_a_full_disk_is_one_error_and_what_came_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf({f"{number}": b"1" for number in range(20)})
    real = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if len(shelf.asked) > 5 and path.suffix == ".new":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ImgtoolError, match="no space left on device"):
        fetch(shelf, tmp_path, jobs=1)
    monkeypatch.setattr(Path, "write_bytes", real)
    assert fetch(shelf, tmp_path)["fetched"] == 15


def test_a_disk_too_small_for_all_is_told_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    shelf = Shelf({"a": bytes(2000)})
    with pytest.raises(ImgtoolError, match="0 MB free"):
        fetch(shelf, tmp_path)
    assert shelf.asked == []


def test_a_fetch_removes_nothing_here(tmp_path: Path) -> None:
    shelf = Shelf(dict(PHOTOS))
    fetch(shelf, tmp_path)
    del shelf.files["a.jpg"]
    assert fetch(shelf, tmp_path, suffixes=(".JPG",))["faults"] == []
    assert lies(tmp_path) == PHOTOS
    known = manifest.read(tmp_path)
    assert known
    assert known.entries.keys() == PHOTOS.keys()


def test_check_tells_what_is_missing_cut_or_changed_without_the_place(tmp_path: Path) -> None:
    shelf = Shelf({"a": b"123", "b": b"456", "c": b"789", "d": b"0"})
    fetch(shelf, tmp_path)
    (tmp_path / "a").unlink()
    (tmp_path / "b").write_bytes(b"45")
    (tmp_path / "c").write_bytes(b"78x")
    record = checked("gs://shelf", tmp_path)
    assert record["faults"] == [
        "a: no such file or directory", "b: 2 bytes, not 3", "c: its SHA-256 is not that of the manifest",
    ]  # fmt: skip
    assert (record["whole"], record["files"]) == (1, 4)
    settings = SimpleNamespace(url="gs://shelf", out=tmp_path, check=True)
    assert action(settings, Watch())["faults"] == record["faults"]  # type: ignore[arg-type]
    with pytest.raises(ImgtoolError, match="has no imgtool-manifest"):
        checked("gs://shelf", tmp_path / "elsewhere")


def test_pieces_of_a_large_file_that_came_are_not_fetched_again(tmp_path: Path) -> None:
    data = os.urandom(3 * PIECE + 5)
    shelf = Shelf({"big": data}, digests=False)
    before = shelf.read

    def third_fails(found: Found, begin: int, end: int) -> bytes:
        if begin == 2 * PIECE:
            raise ImgtoolError("not now")
        return before(found, begin, end)

    shelf.read = third_fails  # type: ignore[method-assign]
    assert "not now" in str(fetch(shelf, tmp_path, jobs=1)["faults"])
    assert not (tmp_path / "big").exists()
    part = next((tmp_path / FOLDER).glob("*.part"))
    with part.open("r+b") as file:  # the first piece is damaged, as by a power cut
        file.write(b"\0" * 100)
    shelf.read = before  # type: ignore[method-assign]
    shelf.asked.clear()
    assert fetch(shelf, tmp_path)["faults"] == []
    assert sorted(begin for _, begin, _ in shelf.asked) == [0, 2 * PIECE, 3 * PIECE]
    assert (tmp_path / "big").read_bytes() == data
    assert not (tmp_path / FOLDER).exists()


def test_a_large_file_that_changed_meanwhile_begins_anew(tmp_path: Path) -> None:
    shelf = Shelf({"big": bytes(2 * PIECE + 5)}, digests=False)
    before = shelf.read
    shelf.read = lambda found, begin, end: b"1" * PIECE if not begin else 1 / 0  # type: ignore
    with pytest.raises(ZeroDivisionError):
        fetch(shelf, tmp_path, jobs=1)
    shelf.read, shelf.tags = before, {"big": "other"}  # type: ignore[method-assign]
    assert fetch(shelf, tmp_path)["faults"] == []
    assert (tmp_path / "big").read_bytes() == shelf.files["big"]


def test_a_large_file_that_was_damaged_on_its_way_is_fetched_once_more(tmp_path: Path) -> None:
    shelf = Shelf({"a": os.urandom(2 * PIECE + 1)})
    shelf.damaged = [bytes(PIECE)]
    assert fetch(shelf, tmp_path, jobs=1)["faults"] == []
    assert lies(tmp_path) == shelf.files


def test_a_file_is_noted_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf, replace = Shelf({"a": b"1"}, digests=False), os.replace
    with monkeypatch.context() as dying:
        dying.setattr(os, "replace", lambda a, b: os._exit(9) if b == tmp_path / "a" else replace(a, b))
        killed(lambda: fetch(shelf, tmp_path))
    log = tmp_path / FOLDER / "finished.jsonl"
    assert [json.loads(line)["path"] for line in log.read_text().splitlines()] == ["a"]
    assert fetch(shelf, tmp_path)["faults"] == []
    assert lies(tmp_path) == shelf.files


def test_a_second_process_waits_and_finds_all_there(tmp_path: Path) -> None:
    shelf, said = Shelf(dict(PHOTOS)), []
    first = Shelf(dict(PHOTOS))
    began, go = threading.Event(), threading.Event()
    read = first.read

    def slow(found: Found, begin: int, end: int) -> bytes:
        began.set()
        go.wait(60)
        return read(found, begin, end)

    def waits(text: str) -> None:
        said.append(text)
        go.set()

    first.read = slow  # type: ignore[method-assign]
    thread = threading.Thread(target=fetch, args=(first, tmp_path))
    thread.start()
    assert began.wait(60)
    record = fetch(shelf, tmp_path, watch=Watch(say=waits))
    thread.join()
    assert (record["fetched"], record["unchanged"], shelf.asked) == (0, 4, [])
    assert "waiting" in said[0]


def test_a_folder_is_listed_when_no_other_process_fetches_into_it(tmp_path: Path) -> None:
    shelf = Shelf({"a": b"1"})
    list_, held = shelf.list, []

    def listed() -> list[Found]:
        held.append((tmp_path / "out" / FOLDER / "lock").exists())
        return list_()

    shelf.list = listed  # type: ignore[method-assign]
    fetch(shelf, tmp_path / "out")
    assert held == [True]
    shelf.files = {}
    with pytest.raises(ImgtoolError, match="there is nothing"):
        fetch(shelf, tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()


def test_a_folder_belongs_to_its_url_before_the_first_file_has_come(tmp_path: Path) -> None:
    shelf = Shelf({"x": b"1", "y": b"2"})
    before = shelf.read
    shelf.read = lambda found, *rest: before(found, *rest) if found.path == "x" else os._exit(9)  # type: ignore
    killed(lambda: fetch(shelf, tmp_path, jobs=1))
    other = Shelf({"x": b"other"}, url="s3://other")
    with pytest.raises(ImgtoolError, match="holds files of gs://shelf"):
        fetch(other, tmp_path)
    shelf.read = before  # type: ignore[method-assign]
    assert fetch(shelf, tmp_path)["fetched"] == 1


def test_requests_together_ask_for_no_more_than_there_is_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "ROOM", 250)
    shelf = Shelf({f"{number:02}": bytes(100) for number in range(10)} | {"big": bytes(1000)})
    listed = [*shelf.list(), Found("unknown", -1)]
    shelf.files["unknown"] = bytes(70)
    shelf.list = lambda: listed  # type: ignore[method-assign]
    before, lock, now, most = shelf.read, threading.Lock(), {"": 0}, []

    def read(found: Found, begin: int, end: int) -> bytes:
        size = 250 if found.path in ("big", "unknown") else end - begin
        with lock:
            now[""] += size
            most.append(now[""])
        time.sleep(0.005)
        with lock:
            now[""] -= size
        return before(found, begin, end)

    shelf.read = read  # type: ignore[method-assign]
    assert fetch(shelf, tmp_path, jobs=1000)["faults"] == []
    assert lies(tmp_path) == shelf.files
    assert max(most) == 250


def test_a_file_that_may_not_be_read_is_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf({"a": b"1"})
    fetch(shelf, tmp_path)
    os.utime(tmp_path / "a", (1, 1))
    real = Path.open

    def opened(path: Path, *arguments: object, **named: object) -> object:  # root may read everything
        if path.name == "a":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *arguments, **named)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", opened)
    assert "a: it was changed here" in str(fetch(shelf, tmp_path)["faults"])


def _begun(folder: Path, jobs: int, ready: Callable[[], bool]) -> subprocess.Popen[bytes]:
    """Return a process that fetches gs://bucket/p, and has come so far."""
    words = ["data", "fetch", "gs://bucket/p", "-o", str(folder), "--jobs", str(jobs)]
    child = subprocess.Popen([sys.executable, "-m", "imgtool", *words], stderr=subprocess.PIPE)
    until = time.monotonic() + 300
    while not ready():
        assert child.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    return child


@pytest.mark.slow
def test_ctrl_c_ends_a_fetch_at_once_and_what_came_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = {f"p/{number:03}": b"1" * 1000 for number in range(900)}
    with gcs.serve(objects) as bucket:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket.url)
        bucket.answers = 60
        child = _begun(tmp_path, 32, lambda: len(list(tmp_path.glob("???"))) == bucket.answers)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=50)  # no request that runs is waited for
        assert (child.returncode, said.splitlines()[-1]) == (130, b"interrupted")
        assert len(list(tmp_path.glob("???"))) == bucket.answers
        bucket.answers = sys.maxsize
        record = fetch("gs://bucket/p", tmp_path)
        assert (record["unchanged"], record["faults"]) == (60, [])


@pytest.mark.slow
def test_a_killed_fetch_leaves_nothing_half_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = {f"p/{number:03}.jpg": os.urandom(20_000) for number in range(300)}
    objects["p/big"] = os.urandom(6 * PIECE + 77)
    objects["p/tail"] = b""
    with gcs.serve(objects) as bucket:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket.url)
        bucket.latency, bucket.answers = 0.05, 200
        child = _begun(tmp_path, 3, lambda: len(list(tmp_path.glob("*.jpg"))) >= 40)
        child.kill()
        child.communicate()
        there = lies(tmp_path)
        names = {name for name in there if not name.startswith(FOLDER)}
        assert 40 <= len(names) < 302
        assert all(there[name] == objects[f"p/{name}"] for name in names)
        bucket.latency, bucket.answers = 0.0, sys.maxsize
        bucket.asked.clear()
        record = fetch("gs://bucket/p", tmp_path)
        assert record["faults"] == []
        asked = {key.removeprefix("p/") for key, _ in bucket.asked}
        assert not asked & names
        assert {f"p/{name}": data for name, data in lies(tmp_path).items()} == objects
        assert not (tmp_path / FOLDER).exists()


@pytest.mark.slow
def test_pieces_that_came_before_a_kill_are_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = {"p/big": os.urandom(6 * PIECE + 77)}
    with gcs.serve(objects) as bucket:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket.url)
        bucket.answers, bucket.composite = 3, True
        journals = tmp_path.joinpath(FOLDER).glob
        child = _begun(
            tmp_path, 1, lambda: any(path.read_bytes().count(b"\n") >= 3 for path in journals("*.journal"))
        )
        child.kill()
        child.communicate()
    assert not (tmp_path / "big").exists()
    with gcs.serve(objects) as bucket:  # another one: the last request may still be on its way to that
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket.url)
        bucket.composite = True
        assert fetch("gs://bucket/p", tmp_path)["faults"] == []
        begins = sorted(int(asked.removeprefix("bytes=").partition("-")[0]) for _, asked in bucket.asked)
        assert begins == [number * PIECE for number in range(7)][-len(begins) :]
        assert len(begins) <= 5  # of 7; two at least had come
        assert (tmp_path / "big").read_bytes() == objects["p/big"]
