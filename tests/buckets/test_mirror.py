"""Copies in the cache: refreshed where nobody uses them, the same for all, never half."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from shelf import PHOTOS, Shelf, as_another_process, fork, killed, lies

from imgtool.buckets import Found, Offline, getting, manifest
from imgtool.buckets import mirror as mirrors
from imgtool.buckets.fetch import checked
from imgtool.buckets.mirror import mirror
from imgtool.errors import ImgtoolError


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(getting, "WAITS", (0.0, 0.0, 0.0))
    yield
    as_another_process()


def _mirrored(shelf: Shelf, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    monkeypatch.setenv("IMGTOOL_CACHE", str(cache))
    monkeypatch.setattr("imgtool.buckets.open", lambda url: shelf)
    return mirror(shelf.url(""))


def test_a_mirror_follows_what_changes_and_goes_and_serves_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMGTOOL_CACHE", str(tmp_path))
    shelf = Shelf(dict(PHOTOS))
    monkeypatch.setattr("imgtool.buckets.open", lambda url: shelf)
    folder = mirror("gs://shelf")
    assert folder.is_relative_to(tmp_path / "buckets/gs/shelf")
    assert lies(folder) == PHOTOS
    del shelf.files["b/c.JPG"], shelf.files["b/notes.txt"]
    shelf.files["a.jpg"] = b"new"
    as_another_process()
    assert lies(mirror("gs://shelf")) == shelf.files
    assert not (folder / "b").exists()
    shelf.offline = True
    said: list[str] = []
    as_another_process()
    assert mirror("gs://shelf", said.append) == folder
    assert "no answer from the shelf; the copy of 20" in said[0]
    shelf.offline, shelf.files["z"], shelf.breaks = False, b"1", [0] * 9
    as_another_process()
    with pytest.raises(ImgtoolError, match="1 files of gs://shelf could not be fetched"):
        mirror("gs://shelf")
    shelf.offline = True
    with pytest.raises(Offline):  # that copy is not complete
        mirror("gs://shelf")


def test_a_warning_of_what_was_fetched_goes_with_its_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf({"a": b"1"})
    listed = [Found("a", 1, "t", (("etag-md5", "0" * 32),))]
    shelf.list = lambda: listed  # type: ignore[method-assign]
    monkeypatch.setenv("IMGTOOL_CACHE", str(tmp_path))
    monkeypatch.setattr("imgtool.buckets.open", lambda url: shelf)
    warned: list[str] = []
    assert lies(mirror("gs://shelf", warn=warned.append)) == shelf.files
    words = "1 file is kept whose ETag is not its MD5 (encrypted by the store, or damaged): a"
    assert warned == [f"gs://shelf: {words}"]


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
    assert lies(folder) == {"a": b"1", "b": b"2"}
    used = mirrors._USED.copy()
    mirrors._USED.clear()  # another process comes, and this one goes on
    said: list[str] = []
    assert mirror("gs://shelf", said.append) == folder
    assert said == ["another process uses the copy: it is not refreshed"]
    assert lies(folder) == {"a": b"1", "b": b"2"}
    as_another_process()
    for lock in used.values():
        os.close(lock)
    assert mirror("gs://shelf") == folder
    assert lies(folder) == {"a": b"new"}


def test_a_copy_is_used_until_the_last_fork_of_its_process_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf({"a": b"1"})
    folder = _mirrored(shelf, monkeypatch, tmp_path)
    reads, writes = os.pipe()
    child = fork()  # as a data worker is
    if not child:
        os.close(writes)
        os.read(reads, 1)
        os._exit(0 if mirror("gs://shelf") == folder else 1)
    os.close(reads)
    as_another_process()
    shelf.files = {"a": b"new"}
    mirror("gs://shelf")
    assert lies(folder) == {"a": b"1"}
    os.close(writes)
    assert os.waitpid(child, 0)[1] == 0
    as_another_process()
    mirror("gs://shelf")
    assert lies(folder) == {"a": b"new"}


def test_a_cache_that_cannot_be_written_serves_where_its_copy_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf({"a": b"1"})
    folder = _mirrored(shelf, monkeypatch, tmp_path)
    as_another_process()
    real = os.open

    def opened(path: str, *arguments: int, **named: int) -> int:
        if str(path).endswith(mirrors.LOCK):
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
    assert lies(mirror("gs://shelf")) == shelf.files
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
        child = fork()
        if not child:
            os._exit(0 if lies(mirror("gs://shelf")) == shelf.files else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert log.read_bytes() == b"xx"


def test_a_refresh_that_was_killed_leaves_no_copy_that_counts_as_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf({"a": b"1", "b": b"2", "c": b"3"})
    folder = _mirrored(shelf, monkeypatch, tmp_path)
    as_another_process()
    shelf.files = {"a": b"new", "b": b"new"}
    before = shelf.read
    shelf.read = lambda found, *rest: before(found, *rest) if found.path == "a" else os._exit(9)  # type: ignore
    killed(lambda: mirror("gs://shelf"))
    shelf.read, shelf.offline = before, True  # type: ignore[method-assign]
    with pytest.raises(Offline):
        mirror("gs://shelf")
    with pytest.raises(ImgtoolError, match="has not ended"):
        checked("gs://shelf", folder)
    shelf.offline = False
    assert lies(mirror("gs://shelf")) == shelf.files


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
    as_another_process()
    mirror("gs://shelf")
    assert sorted(lies(folder)) == ["f", "g/mine", "h"]
    assert not (folder / "d").exists()


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
    as_another_process()
    shelf.url = lambda path: "https://h/a%20b"  # type: ignore[method-assign]
    same = _mirrored(shelf, monkeypatch, tmp_path)
    assert mirror("https://ann:p@ss@h/a b#top") == same
