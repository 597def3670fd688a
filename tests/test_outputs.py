"""The table that a batch keeps, and the archive of all that it made."""

from __future__ import annotations

import csv
import io
import zipfile
from pathlib import Path

import pytest

from imgtool import outputs
from imgtool.errors import ImgtoolError


def test_rows_come_in_the_order_of_the_inputs_and_columns_as_first_seen(tmp_path: Path) -> None:
    table = outputs.Table(tmp_path / "t.csv", ["b.jpg", "a, b.jpg"])
    table.add("a, b.jpg", {"k1": -0.1, "k2": None})
    table.add("b.jpg", {"k1": 1e-9, "why": 'a "word"\nof two lines'})
    assert list(csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text(), newline=""))) == [
        {"file": "b.jpg", "k1": "1e-09", "k2": "", "why": 'a "word"\nof two lines'},
        {"file": "a, b.jpg", "k1": "-0.1", "k2": "", "why": ""},
    ]


def test_an_earlier_table_is_gone_on_with(tmp_path: Path) -> None:
    first = outputs.Table(tmp_path / "t.csv", ["a.jpg", "\udcff.jpg"])
    first.add("\udcff.jpg", {"k1": 1})
    first.add("a.jpg", {"k1": 2})
    again = outputs.Table(tmp_path / "t.csv", ["a.jpg", "c.jpg"])
    again.load()
    again.add("c.jpg", {"k1": 3})
    lines = (tmp_path / "t.csv").read_bytes().splitlines()
    assert lines == [b"file,k1", b"a.jpg,2", b"c.jpg,3", b"\xff.jpg,1"]


@pytest.mark.parametrize(
    "text",
    [b"", b"name,k1\na.jpg,1\n", b"file,k1,k1\n", b"file,k1\na.jpg\n", b"\xff\xd8\0\0", b'file,k1\n"a'],
)
def test_a_foreign_or_damaged_table_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(text)
    with pytest.raises(ImgtoolError, match=r"t\.csv") as caught:
        outputs.Table(path, []).load()
    assert "--force" in caught.value.hint
    assert path.read_bytes() == text


def test_the_same_files_make_the_same_archive(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"j" * 1000)
    (tmp_path / "t.csv").write_bytes(b"file\n" * 1000)
    members = {"outputs/ä.jpg": tmp_path / "a.jpg", "t.csv": tmp_path / "t.csv"}
    for name in ("1.zip", "2.zip"):
        outputs.archive(tmp_path / name, members)
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "1.zip") as zipped:
        assert zipped.testzip() is None
        stored, packed = zipped.infolist()
        assert (stored.filename, stored.compress_type) == ("outputs/ä.jpg", zipfile.ZIP_STORED)
        assert packed.compress_size < packed.file_size == 5000


def test_an_archive_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ImgtoolError, match="no such file"):
        outputs.archive(tmp_path / "1.zip", {"a": tmp_path / "none"})
    assert list(tmp_path.iterdir()) == []
