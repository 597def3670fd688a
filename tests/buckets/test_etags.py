"""What came is checked by the hashes that the store tells, and what an ETag leaves open is told."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path

import pytest
from shelf import Shelf, lies, md5

from imgtool.buckets import Found, manifest
from imgtool.buckets.fetch import checked, fetch
from imgtool.cli import run


def test_damage_on_the_way_is_fetched_again_and_damage_that_stays_is_a_fault(tmp_path: Path) -> None:
    shelf = Shelf({"a": b"123"})
    shelf.damaged = [b"1x3"]
    assert fetch(shelf, tmp_path)["faults"] == []
    assert lies(tmp_path) == shelf.files
    shelf.files["b"] = b"456"
    shelf.damaged = [b"4x6", b"4x6"]
    assert "b: its MD5 is not what the store tells, twice" in str(fetch(shelf, tmp_path)["faults"])
    assert lies(tmp_path) == {"a": b"123"}


def _tagged(files: dict[str, bytes], wrong: Collection[str] = ()) -> Shelf:
    """Return a place whose ETags look like MD5s, and are none of these files."""
    shelf = Shelf(files)
    told = {path: md5(data[::-1] if path in wrong else data) for path, data in files.items()}
    listed = [Found(path, len(files[path]), tag, (("etag-md5", tag),)) for path, tag in sorted(told.items())]
    shelf.list = lambda: listed  # type: ignore[method-assign]
    return shelf


FILES = {name: f"{name}{number}".encode() for number, name in enumerate("abcdefgh")}


def test_a_file_whose_etag_is_not_its_md5_is_kept_and_told_and_every_other_one_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = _tagged(FILES, wrong="bcdeg")
    read, spoilt = shelf.read, [b"h?"]  # once, on the way

    def spoils(found: Found, begin: int, end: int) -> bytes:
        data = read(found, begin, end)
        return spoilt.pop() if found.path == "h" and spoilt else data

    shelf.read = spoils  # type: ignore[method-assign]
    monkeypatch.setattr("imgtool.buckets.open", lambda url: shelf)
    assert run(["data", "fetch", "gs://shelf", "-o", str(tmp_path), "--jobs", "1", "-q", "--json"]) == 0
    said = capsys.readouterr()
    record = json.loads(said.out)
    words = "5 files are kept whose ETag is not their MD5 (encrypted by the store, or damaged): b, ..."
    assert (record["doubtful"], record["warnings"]) == (5, [words])
    assert said.err == f"warning: {words}\n"
    assert [path for path, _, _ in shelf.asked] == list("abbccddeefgghh")
    assert lies(tmp_path) == FILES
    known = manifest.read(tmp_path)
    assert known
    assert sorted(known.doubtful) == list("bcdeg")
    assert checked("gs://shelf", tmp_path)["warnings"] == [words]
    assert fetch(shelf, tmp_path)["doubtful"] == 5  # what lies there, and is not fetched again


def test_where_no_etag_is_an_md5_files_are_fetched_once_after_some(tmp_path: Path) -> None:
    shelf = _tagged(FILES, wrong=FILES)
    assert fetch(shelf, tmp_path, jobs=1)["doubtful"] == len(FILES)
    assert [path for path, _, _ in shelf.asked] == list("aabbccdefgh")


def test_the_first_etag_that_is_an_md5_has_every_later_file_fetched_twice(tmp_path: Path) -> None:
    shelf = _tagged(FILES, wrong="abcdfg")
    assert fetch(shelf, tmp_path, jobs=1)["doubtful"] == 6
    assert [path for path, _, _ in shelf.asked] == list("aabbccdeffggh")


def test_what_comes_differently_twice_and_is_not_what_an_etag_tells_is_a_fault(tmp_path: Path) -> None:
    shelf = _tagged({"a": b"123", "b": b"456"})
    shelf.damaged = [b"1x3", b"12y"]
    record = fetch(shelf, tmp_path, jobs=1)
    assert "a: its ETAG-MD5 is not what the store tells, twice" in str(record["faults"])
    assert (record["doubtful"], record["warnings"], lies(tmp_path)) == (0, [], {"b": b"456"})


def test_a_large_file_whose_etag_is_not_its_md5_is_kept_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imgtool.buckets.state.PIECE", 4)
    monkeypatch.setattr("imgtool.buckets.fetch.LARGE", 8)
    shelf = _tagged({"big": b"123456789"}, wrong=["big"])
    assert fetch(shelf, tmp_path, jobs=1)["doubtful"] == 1
    assert [begin for _, begin, _ in shelf.asked] == [0, 4, 8] * 2
    assert lies(tmp_path) == shelf.files


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
