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
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import gcs
import pytest

from imgtool.buckets import Found, Interrupted, Offline, manifest, state
from imgtool.buckets import fetch as fetching
from imgtool.buckets.fetch import action, checked, fetch, mirror
from imgtool.buckets.state import FOLDER, PIECE
from imgtool.engine import Watch
from imgtool.errors import ImgtoolError


class Shelf:
    """A place in memory: what it holds, what it was asked, and what goes wrong."""

    def __init__(self, files: dict[str, bytes], digests: bool = True) -> None:
        self.files, self.digests = files, digests
        self.tags: dict[str, str] = {}
        self.asked: list[tuple[str, int, int]] = []
        self.breaks: list[int] = []
        self.damaged: list[bytes] = []
        self.offline = False

    def list(self) -> list[Found]:
        if self.offline:
            raise Offline("no answer from the shelf", "check the network")
        return [
            Found(
                path,
                len(data),
                self.tags.get(path, _md5(data)),
                (("md5", _md5(data)),) if self.digests else (),
            )
            for path, data in sorted(self.files.items())
        ]

    def read(self, found: Found, begin: int, end: int) -> bytes:
        self.asked.append((found.path, begin, end))
        if found.path not in self.files:
            raise ImgtoolError(f"no such file: {found.path}")
        data = self.files[found.path][begin:end]
        if self.damaged:
            return self.damaged.pop(0)
        if self.breaks:
            raise Interrupted("the connection broke", data[: self.breaks.pop(0)])
        return data

    def whole(self, found: Found) -> bytes:
        return self.read(found, 0, len(self.files[found.path]))

    def write(self, source: Path, path: str) -> None:
        raise AssertionError

    def url(self, path: str) -> str:
        return f"gs://shelf/{path}"


def _md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def _lies(folder: Path) -> dict[str, bytes]:
    """Return all that lies in a folder but the manifest."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != manifest.NAME
    }


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fetching, "WAITS", (0.0, 0.0, 0.0))
    yield
    _as_another_process()


def _as_another_process() -> None:
    """Let go of the copies that this process uses, as its end would."""
    for lock in state._USED.values():
        os.close(lock)
    state._USED.clear()


def _mirrored(shelf: Shelf, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    monkeypatch.setenv("IMGTOOL_CACHE", str(cache))
    monkeypatch.setattr("imgtool.buckets.open", lambda url: shelf)
    return mirror(shelf.url(""))


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child leaves alone
        return os.fork()


def _killed(work: Callable[[], object]) -> None:
    """Do a work in a process that ends in the middle of it."""
    child = _fork()
    if not child:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


PHOTOS = {"a.jpg": b"one", "b/c.JPG": b"two" * 50, "b/notes.txt": b"", "ü #%.jpg": b"three"}


def test_a_fetched_folder_is_the_same_and_has_a_manifest_with_hashes(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    record = fetch(Shelf(dict(PHOTOS)), tmp_path, watch=Watch(lambda *step: steps.append(step)))
    assert _lies(tmp_path) == PHOTOS
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
    assert _lies(tmp_path) == shelf.files


def test_suffixes_choose_in_any_case_and_the_rest_may_come_later(tmp_path: Path) -> None:
    shelf = Shelf(dict(PHOTOS))
    fetch(shelf, tmp_path, suffixes=(".jpg",))
    assert sorted(_lies(tmp_path)) == ["a.jpg", "b/c.JPG", "ü #%.jpg"]
    assert fetch(shelf, tmp_path)["fetched"] == 1
    assert _lies(tmp_path) == PHOTOS


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
    assert _lies(tmp_path) == PHOTOS


def test_a_folder_of_another_url_is_refused(tmp_path: Path) -> None:
    fetch(Shelf({"a": b"1"}), tmp_path)
    other = Shelf({"a": b"2"})
    other.url = lambda path: f"s3://other/{path}"  # type: ignore[method-assign]
    with pytest.raises(ImgtoolError, match="holds files of gs://shelf") as caught:
        fetch(other, tmp_path)
    assert caught.value.code == 2
    assert fetch(other, tmp_path, force=True)["fetched"] == 1
    assert _lies(tmp_path) == {"a": b"2"}


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
    assert sorted(_lies(tmp_path)) == ["in/f/g", "in/good..jpg", "in/h/i"]


def test_a_broken_connection_goes_on_at_the_byte_reached(tmp_path: Path) -> None:
    shelf = Shelf({"a": bytes(range(100))})
    shelf.breaks = [10, 0, 25]
    assert fetch(shelf, tmp_path)["faults"] == []
    assert shelf.asked == [("a", 0, 100), ("a", 10, 100), ("a", 10, 100), ("a", 35, 100)]
    assert _lies(tmp_path) == shelf.files


def test_a_file_that_cannot_be_had_is_a_fault_and_the_others_are_kept(tmp_path: Path) -> None:
    shelf = Shelf({"a": b"1", "b": b"2"})
    listed = shelf.list()
    del shelf.files["a"]
    shelf.list = lambda: listed  # type: ignore[method-assign]
    record = fetch(shelf, tmp_path)
    assert record["faults"] == ["a: no such file: a"]
    assert (_lies(tmp_path), record["files"]) == ({"b": b"2"}, 1)
    known = manifest.read(tmp_path)
    assert known
    assert not known.complete


def test_a_connection_that_stays_broken_ends_in_a_fault_after_some_attempts(tmp_path: Path) -> None:
    shelf = Shelf({"a": b"123"})
    shelf.breaks = [0] * 50
    assert "the connection broke" in str(fetch(shelf, tmp_path)["faults"])
    assert len(shelf.asked) == 4


def test_failure_after_failure_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "WAITS", ())
    shelf = Shelf({f"{number:03}": b"1" for number in range(200)})
    shelf.breaks = [0] * 200
    faults = fetch(shelf, tmp_path, jobs=1)["faults"]
    assert len(faults) == 65  # type: ignore[arg-type]
    assert faults[-1] == "136 more were not tried, after 64 failures in a row"  # type: ignore[index]


def test_damage_on_the_way_is_fetched_again_and_damage_that_stays_is_a_fault(tmp_path: Path) -> None:
    shelf = Shelf({"a": b"123"})
    shelf.damaged = [b"1x3"]
    assert fetch(shelf, tmp_path)["faults"] == []
    assert _lies(tmp_path) == shelf.files
    shelf.files["b"] = b"456"
    shelf.damaged = [b"4x6", b"4x6"]
    assert "b: its MD5 is not what the store tells, twice" in str(fetch(shelf, tmp_path)["faults"])
    assert _lies(tmp_path) == {"a": b"123"}


def test_an_etag_that_is_no_md5_is_found_out_by_a_second_look_and_said_once(tmp_path: Path) -> None:
    shelf = Shelf({"a": b"123", "b": b"456", "c": b"789"})
    listed = [Found(each.path, 3, "t", (("etag-md5", "0" * 32),)) for each in shelf.list()]
    shelf.list = lambda: listed  # type: ignore[method-assign]
    said: list[str] = []
    assert fetch(shelf, tmp_path, jobs=1, watch=Watch(say=said.append))["faults"] == []
    assert [path for path, _, _ in shelf.asked] == ["a", "a", "b", "c"]
    assert len(said) == 1


def test_other_hashes_are_checked_too(tmp_path: Path) -> None:
    data = b"what is up, doc?"
    # The name that git gives this content: git-scm.com, Pro Git, chapter 10.2.
    told = [
        ("git-sha1", "bd9dbf5aae1a3862dd1526723246b20206e5fc37"),
        ("sha256", hashlib.sha256(data).hexdigest()),
    ]
    shelf = Shelf({"a": data})
    for name, value in told:
        shelf.list = lambda name=name, value=value: [Found("a", -1, value, ((name, value),))]  # type: ignore
        assert fetch(shelf, tmp_path / name)["faults"] == []
        shelf.list = lambda name=name, value=value: [Found("a", -1, "", ((name, value[::-1]),))]  # type: ignore
        assert name.upper() in str(fetch(shelf, tmp_path / f"{name}2")["faults"])


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


def test_a_second_process_waits_and_finds_all_there(tmp_path: Path) -> None:
    shelf, said = Shelf(dict(PHOTOS)), []
    first = Shelf(dict(PHOTOS))
    began, go = threading.Event(), threading.Event()
    read = first.read

    def slow(found: Found, begin: int, end: int) -> bytes:
        began.set()
        go.wait(10)
        return read(found, begin, end)

    def waits(text: str) -> None:
        said.append(text)
        go.set()

    first.read = slow  # type: ignore[method-assign]
    thread = threading.Thread(target=fetch, args=(first, tmp_path))
    thread.start()
    began.wait(10)
    record = fetch(shelf, tmp_path, watch=Watch(say=waits))
    thread.join()
    assert (record["fetched"], record["unchanged"], shelf.asked) == (0, 4, [])
    assert "waiting" in said[0]


def test_a_mirror_follows_what_changes_and_goes_and_serves_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMGTOOL_CACHE", str(tmp_path))
    shelf = Shelf(dict(PHOTOS))
    monkeypatch.setattr("imgtool.buckets.open", lambda url: shelf)
    folder = mirror("gs://shelf")
    assert folder.is_relative_to(tmp_path / "buckets/gs/shelf")
    assert _lies(folder) == PHOTOS
    del shelf.files["b/c.JPG"], shelf.files["b/notes.txt"]
    shelf.files["a.jpg"] = b"new"
    _as_another_process()
    assert _lies(mirror("gs://shelf")) == shelf.files
    assert not (folder / "b").exists()
    shelf.offline = True
    said: list[str] = []
    _as_another_process()
    assert mirror("gs://shelf", said.append) == folder
    assert "no answer from the shelf; the copy of 20" in said[0]
    shelf.offline, shelf.files["z"], shelf.breaks = False, b"1", [0] * 9
    _as_another_process()
    with pytest.raises(ImgtoolError, match="1 files of gs://shelf could not be fetched"):
        mirror("gs://shelf")
    shelf.offline = True
    with pytest.raises(Offline):  # that copy is not complete
        mirror("gs://shelf")


def test_no_password_or_signature_of_an_address_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf({"a b.zip": b"1"})
    shelf.url = lambda path: "https://host/x/a%20b.zip"  # type: ignore[method-assign]
    monkeypatch.setattr("imgtool.buckets.open", lambda url: shelf)
    monkeypatch.setenv("IMGTOOL_CACHE", str(tmp_path))
    path = mirror("https://me:secret@host/x/a b.zip?sign=hidden")
    assert path.read_bytes() == b"1"
    assert path.name == "a b.zip"
    text = (path.parent / manifest.NAME).read_text() + str(path)
    assert "secret" not in text
    assert "hidden" not in text


def test_a_copy_stays_as_it_is_while_a_process_uses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf({"a": b"1", "b": b"2"})
    folder = _mirrored(shelf, monkeypatch, tmp_path)
    shelf.files = {"a": b"new"}
    assert mirror("gs://shelf") == folder  # this process asks twice
    assert _lies(folder) == {"a": b"1", "b": b"2"}
    used = state._USED.copy()
    state._USED.clear()  # another process comes, and this one goes on
    said: list[str] = []
    assert mirror("gs://shelf", said.append) == folder
    assert said == ["another process uses the copy: it is not refreshed"]
    assert _lies(folder) == {"a": b"1", "b": b"2"}
    _as_another_process()
    for lock in used.values():
        os.close(lock)
    assert mirror("gs://shelf") == folder
    assert _lies(folder) == {"a": b"new"}


def test_a_copy_is_used_until_the_last_fork_of_its_process_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf({"a": b"1"})
    folder = _mirrored(shelf, monkeypatch, tmp_path)
    reads, writes = os.pipe()
    child = _fork()  # as a data worker is
    if not child:
        os.close(writes)
        os.read(reads, 1)
        os._exit(0 if mirror("gs://shelf") == folder else 1)
    os.close(reads)
    _as_another_process()
    shelf.files = {"a": b"new"}
    mirror("gs://shelf")
    assert _lies(folder) == {"a": b"1"}
    os.close(writes)
    assert os.waitpid(child, 0)[1] == 0
    _as_another_process()
    mirror("gs://shelf")
    assert _lies(folder) == {"a": b"new"}


def test_a_cache_that_cannot_be_written_serves_where_its_copy_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf({"a": b"1"})
    folder = _mirrored(shelf, monkeypatch, tmp_path)
    _as_another_process()
    real = os.open

    def opened(path: str, *arguments: int, **named: int) -> int:
        if str(path).endswith(state.LOCK):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "open", opened)
    said: list[str] = []
    assert mirror("gs://shelf", said.append) == folder
    assert said == ["the copy cannot be refreshed: read-only file system"]
    (folder / manifest.NAME).unlink()
    with pytest.raises(ImgtoolError, match="read-only file system") as caught:
        mirror("gs://shelf")
    assert "IMGTOOL_CACHE" in caught.value.hint


def test_a_copy_that_was_removed_is_fetched_again_by_the_process_that_used_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf({"a": b"1"})
    folder = _mirrored(shelf, monkeypatch, tmp_path)
    shutil.rmtree(tmp_path / "buckets")
    assert _lies(mirror("gs://shelf")) == shelf.files
    assert folder.is_dir()


def test_processes_that_begin_at_once_wait_for_one_and_all_have_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMGTOOL_CACHE", str(tmp_path))
    shelf = Shelf({"a": b"1", "b": b"2"})
    monkeypatch.setattr("imgtool.buckets.open", lambda url: shelf)
    log = tmp_path / "read"

    def read(found: Found, begin: int, end: int) -> bytes:
        time.sleep(0.05)
        with log.open("ab") as file:
            file.write(b"x")
        return shelf.files[found.path][begin:end]

    shelf.read = read  # type: ignore[method-assign]
    children = []
    for _ in range(3):
        child = _fork()
        if not child:
            os._exit(0 if _lies(mirror("gs://shelf")) == shelf.files else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert log.read_bytes() == b"xx"


def test_a_refresh_that_was_killed_leaves_no_copy_that_counts_as_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf({"a": b"1", "b": b"2", "c": b"3"})
    folder = _mirrored(shelf, monkeypatch, tmp_path)
    _as_another_process()
    shelf.files = {"a": b"new", "b": b"new"}
    before = shelf.read
    shelf.read = lambda found, *rest: before(found, *rest) if found.path == "a" else os._exit(9)  # type: ignore
    _killed(lambda: mirror("gs://shelf"))
    shelf.read, shelf.offline = before, True  # type: ignore[method-assign]
    with pytest.raises(Offline):
        mirror("gs://shelf")
    with pytest.raises(ImgtoolError, match="has not ended"):
        checked("gs://shelf", folder)
    shelf.offline = False
    assert _lies(mirror("gs://shelf")) == shelf.files


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


def test_what_a_mirror_cannot_find_or_is_no_file_any_more_is_no_trouble_when_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf({"d/e/x": b"1", "f/y": b"2", "g": b"3", "h": b"4"})
    folder = _mirrored(shelf, monkeypatch, tmp_path)
    shutil.rmtree(folder / "d/e")
    shutil.rmtree(folder / "f")
    (folder / "f").write_bytes(b"mine")
    (folder / "g").unlink()
    (folder / "g").mkdir()
    (folder / "g/mine").write_bytes(b"")
    shelf.files = {"h": b"4"}
    _as_another_process()
    mirror("gs://shelf")
    assert sorted(_lies(folder)) == ["f", "g/mine", "h"]
    assert not (folder / "d").exists()


def test_a_folder_belongs_to_its_url_before_the_first_file_has_come(tmp_path: Path) -> None:
    shelf = Shelf({"x": b"1", "y": b"2"})
    before = shelf.read
    shelf.read = lambda found, *rest: before(found, *rest) if found.path == "x" else os._exit(9)  # type: ignore
    _killed(lambda: fetch(shelf, tmp_path, jobs=1))
    other = Shelf({"x": b"other"})
    other.url = lambda path: f"s3://other/{path}"  # type: ignore[method-assign]
    with pytest.raises(ImgtoolError, match="holds files of gs://shelf"):
        fetch(other, tmp_path)
    shelf.read = before  # type: ignore[method-assign]
    assert fetch(shelf, tmp_path)["fetched"] == 1


def test_copies_of_different_urls_lie_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf({"a": b"1"})
    long = "q" * 250
    urls = [
        "s3://b", "s3://b/.copy/x", "s3://b/.copy", "s3://b/.lock", "s3://b/a/b", "s3://b/a//b", "s3://b/a%2Fb",
        "s3://b/..", "s3://b/%2E%2E", f"s3://b/{long}/1", f"s3://b/zz{long}/1", "gs://b", "s3://b/a?b",
        "https://h/a/b", "https://h/a%2Fb", "https://h/a%252Fb", "http://h/a/b", "https://h/a/b?c", "https://h/a/b?d",
    ]  # fmt: skip
    found = []
    for url in urls:
        shelf.url = lambda path, url=url: url  # type: ignore[misc]
        found.append(_mirrored(shelf, monkeypatch, tmp_path))
    assert len(set(found)) == len(urls)
    folders = [path if path.is_dir() else path.parent for path in found]
    assert not [(a, b) for a in folders for b in folders if a != b and a.is_relative_to(b)]
    _as_another_process()
    shelf.url = lambda path: "https://h/a%20b"  # type: ignore[method-assign]
    same = _mirrored(shelf, monkeypatch, tmp_path)
    assert mirror("https://ann:p@ss@h/a b#top") == same


def test_an_etag_of_parts_is_checked_where_their_size_is_a_usual_one(tmp_path: Path) -> None:
    data = os.urandom((5 << 20) + 1)

    def etag(part: int) -> str:
        sums = [hashlib.md5(data[at : at + part]).digest() for at in range(0, len(data), part)]
        return f"{hashlib.md5(b''.join(sums)).hexdigest()}-{len(sums)}"

    for part in (5 << 20, 8 << 20, 3 << 20):
        assert manifest.hashes(data, {"etag-parts": etag(part)})["etag-parts"] == etag(part)
    assert manifest.hashes(data, {"etag-parts": etag(4_000_001)})["etag-parts"] == ""
    shelf = Shelf({"a": data})
    for name, part in {"usual": 5 << 20, "unusual": 4_000_001}.items():
        told = (("etag-parts", etag(part)),)
        shelf.list = lambda told=told: [Found("a", len(data), "t", told)]  # type: ignore[misc]
        assert fetch(shelf, tmp_path / name)["faults"] == []  # nothing is known of an unusual size
        (tmp_path / name / manifest.NAME).unlink()
    assert fetch(shelf, tmp_path / "unusual")["faults"] == [
        "a: another file is there already; --force overwrites it"
    ]
    shelf.list = lambda: [Found("a", len(data), "t", (("etag-parts", etag(5 << 20)),))]  # type: ignore
    assert fetch(shelf, tmp_path / "usual")["unchanged"] == 1  # it is known to be the same


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
    assert _lies(tmp_path) == shelf.files
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


@pytest.mark.slow
def test_ctrl_c_ends_a_fetch_at_once_and_what_came_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = {f"p/{number:03}": b"1" * 1000 for number in range(900)}
    with gcs.serve(objects) as bucket:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket.url)
        code = "import sys; from imgtool.cli import run\n"
        code += "sys.exit(run(['data', 'fetch', 'gs://bucket/p', '-o', sys.argv[1]]))"
        bucket.latency = 0.1
        child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE)
        while len(list(tmp_path.glob("???"))) < 40:
            time.sleep(0.01)
        bucket.latency = 300
        time.sleep(0.5)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)  # no request that runs is waited for
        assert (child.returncode, said.splitlines()[-1]) == (130, b"interrupted")
        there = len(list(tmp_path.glob("???")))
        bucket.latency = 0
        record = fetch("gs://bucket/p", tmp_path)
        assert (record["unchanged"], record["faults"]) == (there, [])


@pytest.mark.slow
def test_a_killed_fetch_leaves_nothing_half_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = {f"p/{number:03}.jpg": os.urandom(20_000) for number in range(300)}
    objects["p/big"] = os.urandom(6 * PIECE + 77)
    objects["p/tail"] = b""
    with gcs.serve(objects) as bucket:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket.url)
        bucket.latency = 0.05
        code = "import sys; from pathlib import Path; from imgtool.buckets.fetch import fetch\n"
        code += "fetch('gs://bucket/p', Path(sys.argv[1]), jobs=3)"
        child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
        until = time.monotonic() + 30
        while len(list(tmp_path.glob("*.jpg"))) < 40 and time.monotonic() < until:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
        there = _lies(tmp_path)
        names = {name for name in there if not name.startswith(FOLDER)}
        assert 40 <= len(names) < 302
        assert all(there[name] == objects[f"p/{name}"] for name in names)
        bucket.latency = 0.0
        bucket.asked.clear()
        record = fetch("gs://bucket/p", tmp_path)
        assert record["faults"] == []
        asked = {key.removeprefix("p/") for key, _ in bucket.asked}
        assert not asked & names
        assert {f"p/{name}": data for name, data in _lies(tmp_path).items()} == objects
        assert not (tmp_path / FOLDER).exists()


@pytest.mark.slow
def test_pieces_that_came_before_a_kill_are_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = {"p/big": os.urandom(6 * PIECE + 77)}
    with gcs.serve(objects) as bucket:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket.url)
        bucket.latency, bucket.composite = 0.3, True
        code = "import sys; from pathlib import Path; from imgtool.buckets.fetch import fetch\n"
        code += "fetch('gs://bucket/p', Path(sys.argv[1]), jobs=1)"
        child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
        until, journal = time.monotonic() + 30, b""
        while journal.count(b"\n") < 3 and time.monotonic() < until:
            time.sleep(0.01)
            journal = b"".join(path.read_bytes() for path in tmp_path.glob(f"{FOLDER}/*.journal"))
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not (tmp_path / "big").exists()
    with gcs.serve(
        objects
    ) as bucket:  # another server: the killed one's last request may still be on its way
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket.url)
        bucket.composite = True
        assert fetch("gs://bucket/p", tmp_path)["faults"] == []
        begins = sorted(int(asked.removeprefix("bytes=").partition("-")[0]) for _, asked in bucket.asked)
        assert (
            begins == [number * PIECE for number in range(len(objects["p/big"]) // PIECE + 1)][-len(begins) :]
        )
        assert len(begins) <= 5  # of 7; two at least had come
        assert (tmp_path / "big").read_bytes() == objects["p/big"]
