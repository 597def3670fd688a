"""What a batch leaves beside its photos: a table with a row for each, and one archive of all."""

from __future__ import annotations

import csv
import io
import os
import shutil
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from imgtool import files
from imgtool.errors import ImgtoolError

if TYPE_CHECKING:
    from imgtool.engine import Result
    from imgtool.images import Photo

FIRST = "file"
"""Name of the first column of every table."""

_STORED = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp"})
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same outputs make the same archive, whenever


def compared(target: Path) -> Path:
    """Return the place of the before/after sheet of an output."""
    return target.with_name(f"{target.stem}-compare.png")


def paired(target: Path) -> Path:
    """Return the place of the side-by-side picture of an output."""
    return target.with_name(f"{target.stem}-side-by-side.jpg")


def beside(target: Path, suffix: str) -> Path:
    """Return the place of a file beside an output: its stem and a suffix such as ".lens.yml"."""
    return target.with_name(target.stem + suffix)


@dataclass
class Table:
    """A CSV file with a row for each photo, rewritten whole after every one.

    Attributes:
        path: The file.
        order: What the rows are sorted by: the first column of every photo of the batch.
        rows: Row by first column.
    """

    path: Path
    order: Sequence[str]
    rows: dict[str, dict[str, object]] = field(default_factory=dict)

    def load(self) -> None:
        """Take over the rows of an earlier run, if there was one.

        Raises:
            ImgtoolError: The file cannot be read, or is no such table.
        """
        if not self.path.exists():
            return
        hint = "move it away, or overwrite it with --force"
        try:
            lines = list(
                csv.reader(
                    io.StringIO(files.read(self.path).decode("utf-8-sig", "surrogateescape"), newline=""),
                    strict=True,
                )
            )
        except csv.Error as fault:
            raise ImgtoolError(f"{self.path} is not a readable table: {fault}", hint) from None
        head = lines[0] if lines else []
        if head[:1] != [FIRST] or len(set(head)) < len(head):
            raise ImgtoolError(f"{self.path} is not a table of this batch: no column {FIRST}", hint)
        for number, line in enumerate(lines[1:], 2):
            if len(line) != len(head):
                what = f"{self.path}, line {number}: {len(line)} cells, not {len(head)}"
                raise ImgtoolError(what, hint)
            self.rows[line[0]] = dict(zip(head[1:], line[1:], strict=True))

    def add(self, name: str, row: Mapping[str, object]) -> None:
        """Set a photo's row and write the file."""
        self.rows[name] = dict(row)
        columns = list(dict.fromkeys(column for each in self.rows.values() for column in each))
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([FIRST, *columns])
        known = [name for name in self.order if name in self.rows]
        for each in dict.fromkeys([*known, *sorted(self.rows)]):
            cells = self.rows[each]
            writer.writerow([each, *("" if cells.get(name) is None else cells[name] for name in columns)])
        files.write(self.path, text.getvalue().encode("utf-8", "surrogateescape"))


def below(folder: Path | None, targets: Iterable[Path]) -> dict[Path, str]:
    """Name outputs relative to the folder of all, or to the deepest one that holds them all."""
    found = list(targets)
    places = {target: Path(os.path.abspath(target)) for target in found}
    if not found:
        return {}
    root = Path(os.path.abspath(folder)) if folder else None
    root = root or Path(os.path.commonpath([place.parent for place in places.values()]))
    return {target: place.relative_to(root).as_posix() for target, place in places.items()}


def archive(path: Path, members: Mapping[str, Path]) -> None:
    """Write a zip archive whole or not at all; photos are stored, everything else is deflated.

    Args:
        path: The archive.
        members: Name in the archive to file, in the order wanted.

    Raises:
        ImgtoolError: The archive cannot be written, or a file not be read.
    """
    with files.atomic(path) as temporary, zipfile.ZipFile(temporary, "w") as zipped:
        for name, source in members.items():
            info = zipfile.ZipInfo(name.encode("utf-8", "replace").decode(), _EPOCH)
            stored = source.suffix.lower() in _STORED
            info.compress_type = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            try:
                opened = source.open("rb")
            except OSError as fault:
                raise files.unreadable(source, fault) from None
            with opened, zipped.open(info, "w", force_zip64=source.stat().st_size >= 1 << 31) as member:
                shutil.copyfileobj(opened, member, 1 << 20)


def made(photo: Photo, result: Result) -> Photo:
    """Return the photo that a result makes of one; the same object where nothing changes."""
    if result.pixels is photo.pixels and result.alpha is None and not result.xmp:
        return photo
    from imgtool.images import metadata

    after = photo.with_pixels(result.pixels)
    if result.alpha is not None:
        after = replace(after, alpha=result.alpha)
    if result.xmp:
        after = replace(after, xmp=metadata.with_xmp_properties(after.xmp, *metadata.AUX, result.xmp))
    return after
