"""Files: lists of inputs, names of outputs, writing whole or not at all, the cache folder."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from imgtool.errors import FAILED, USAGE, ImgtoolError

FORMATS = {
    ".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".tif": "tif", ".tiff": "tif", ".webp": "webp",
}  # fmt: skip
"""Suffix of a photo that can be written to the name of its format."""

RAW = frozenset({
    ".3fr", ".ari", ".arw", ".bay", ".cap", ".cr2", ".cr3", ".crw", ".dcr", ".dcs", ".dng",
    ".drf", ".eip", ".erf", ".fff", ".gpr", ".iiq", ".k25", ".kdc", ".mdc", ".mef", ".mos",
    ".mrw", ".nef", ".nrw", ".orf", ".pef", ".ptx", ".pxn", ".r3d", ".raf", ".raw", ".rw2",
    ".rwl", ".rwz", ".sr2", ".srf", ".srw", ".x3f",
})  # fmt: skip
"""Suffixes of camera RAW files, in lower case. ``.raw`` is read only where the file has a header."""

READABLE = frozenset(FORMATS) | {".jpe", ".jfif", ".bmp", ".dib"} | RAW
"""Suffixes of the photos that can be read, camera RAW among them."""

SHEETS = ("-compare", "-side-by-side")
"""How the stems of pictures of an output end."""

_CURES = {
    errno.ENOSPC: "free some space or choose another folder with -o",
    errno.EDQUOT: "free some space or choose another folder with -o",
    errno.EFBIG: "the file system or a limit of the shell allows no file so large",
    errno.EACCES: "check the permissions, or choose another folder with -o",
    errno.EPERM: "check the permissions, or choose another folder with -o",
    errno.EROFS: "the file system is read-only; choose another folder with -o",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another with -o",
    errno.EEXIST: "a part of the path is a file, not a folder; choose another with -o",
    errno.EISDIR: "it is a folder; give the path of a file, or end the folder's name with a /",
    errno.ENOTEMPTY: "it is a folder; give the path of a file, or end the folder's name with a /",
    errno.ENAMETOOLONG: "choose a shorter name with -o",
}


def extension(source: Path | None) -> str:
    """Return the ending, without its dot, for the output of an input: its own where that can be written.

    PNG takes what has no format of its own to go back to: BMP, camera RAW, standard input.
    """
    suffix = source.suffix.lower() if source else ""
    return suffix[1:] if suffix in FORMATS else "jpg" if suffix in (".jpe", ".jfif") else "png"


def file_type(text: str) -> str:
    """Return "jpg", "png", "tif" or "webp" for a suffix or name such as ".JPEG"; code 2 for any other."""
    kind = FORMATS.get("." + text.lower().removeprefix("."))
    if kind is None:
        what = f"cannot write photos of the type {text!r}" if text else "the output has no file type"
        raise ImgtoolError(what, "known: jpg, png, tif, webp", USAGE)
    return kind


@dataclass(frozen=True)
class Item:
    """One input.

    Attributes:
        source: The file, or None for standard input.
        relative: Its path below the folder or glob that it was found by; else its bare name.
        folder: True where it was found in a folder, whose sub-folders an output folder keeps.
        url: Where it is fetched from; ``source`` is then where it will lie on this machine.
    """

    source: Path | None
    relative: Path
    folder: bool = False
    url: str = ""

    @property
    def name(self) -> str:
        """Return the name for messages: the path or URL, "-" for standard input."""
        return self.url or ("-" if self.source is None else str(self.source))


def _reason(fault: OSError) -> str:
    return (fault.strerror or str(fault)).lower()


def _unwritable(target: Path, fault: OSError) -> ImgtoolError:
    hint = _CURES.get(fault.errno or 0, "choose another place with -o")
    return ImgtoolError(f"cannot write {target}: {_reason(fault)}", hint)


def unreadable(source: Path, fault: OSError) -> ImgtoolError:
    """Return the error of a file that cannot be read; code 2 where there is no such file."""
    if isinstance(fault, FileNotFoundError):
        return ImgtoolError(f"no such file: {source}", "check the path", USAGE)
    hints = {
        errno.EISDIR: "give a file here",
        errno.EACCES: "check the permissions of the file and its folders",
        errno.ENOTDIR: "a part of the path is a file, not a folder",
    }
    hint = hints.get(fault.errno or 0, "check the path and the disk")
    return ImgtoolError(f"cannot read {source}: {_reason(fault)}", hint)


def read(source: Path) -> bytes:
    """Return a file's bytes.

    Raises:
        ImgtoolError: Code 2 where there is no such file, code 1 where it cannot be read.
    """
    try:
        return source.read_bytes()
    except OSError as fault:
        raise unreadable(source, fault) from None


def _blank(target: Path) -> Path:
    """Make an empty hidden file beside the target, its permissions those of any new file."""
    # A short name of its own, for the target's may already be as long as the file system allows. It tells
    # whose it is, should that process be killed.
    temporary = target.with_name(f".imgtool-{os.getpid()}-{os.urandom(8).hex()}{target.suffix[:8]}")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Unlike tempfile's 0600, this mode leaves the permissions to the umask.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return temporary


def _refuse_special(target: Path) -> None:
    if target.is_dir():
        raise _unwritable(target, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)))
    if target.exists() and not target.is_file():
        # Renaming onto a device such as /dev/null would replace the device.
        raise ImgtoolError(f"cannot write {target}: not a regular file", "-o - writes to standard output")


@contextmanager
def atomic(target: Path) -> Iterator[Path]:
    """Give a temporary file beside the target that becomes the target when the block succeeds.

    Missing folders are made. When the block fails, even by Ctrl-C, nothing is left behind and an
    existing target stays as it was.

    Args:
        target: The file to write; its link is followed.

    Yields:
        The temporary file, empty, with the target's suffix.

    Raises:
        ImgtoolError: The disk is full, the place may not be written, the name is too long, ...
    """
    try:
        _refuse_special(target)
        final = target.resolve() if target.is_symlink() else target
        temporary = _blank(final)
    except OSError as fault:
        raise _unwritable(target, fault) from None
    try:
        yield temporary
        os.replace(temporary, final)
    except OSError as fault:
        # Faults of other files, or without a number, are not about this file.
        ours = fault.filename in (None, str(temporary), temporary, str(final), final)
        if not ours or fault.errno is None:
            raise
        raise _unwritable(target, fault) from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder beside the target whose content becomes the target's when the block succeeds.

    What was in the target before is gone then. When the block fails, nothing is left behind and an existing
    target stays as it was.

    Raises:
        ImgtoolError: The disk is full, the place may not be written, ...
    """
    blank = target.absolute().with_name(f".imgtool-{os.urandom(8).hex()}")
    old = blank.with_suffix(".old")
    try:
        blank.mkdir(parents=True)
        yield blank
        _move(target, old) if target.exists() else target.mkdir()
        _move(blank, target)
    except OSError as fault:
        if old.exists():
            _move(old, target)
        raise _unwritable(target, fault) from None
    finally:
        for folder in (blank, old):
            shutil.rmtree(folder, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    """Move all that a folder holds into another; the folder itself may be somebody's working directory."""
    target.mkdir(exist_ok=True)
    for path in list(source.iterdir()):
        os.replace(path, target / path.name)


@contextmanager
def as_file(source: Path | bytes, name: str) -> Iterator[Path]:
    """Give a file of a source that may be the content of one, as standard input is.

    Args:
        source: The file, or its content.
        name: Name of the temporary file that content is put into.
    """
    if isinstance(source, Path):
        yield source
        return
    import tempfile  # not before it is needed: it is large

    with tempfile.TemporaryDirectory(prefix="imgtool-") as folder:
        path = Path(folder, name)
        write(path, source)
        yield path


def json_lines(source: Path) -> list[dict[str, Any]]:
    """Read one JSON object a line; a line that a killed process left unfinished is left out."""
    found = []
    for line in read(source).decode(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def write(target: Path, data: bytes) -> None:
    """Write a file whole or not at all; see ``atomic`` for the errors."""
    with atomic(target) as temporary, temporary.open("wb") as file:
        file.write(data)


def fill(target: Path, write_to: Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all through a function of it, open for writing and reading.

    Raises:
        ImgtoolError: As ``atomic``.
    """
    with atomic(target) as temporary, temporary.open("w+b") as file:
        write_to(file)


def check_new(path: Path, force: bool) -> None:
    """Raise ``ImgtoolError`` (code 1) where the output exists and may not be overwritten."""
    if not force and os.path.lexists(path):
        raise ImgtoolError(f"{path} exists", "--force overwrites it, --skip-existing leaves it out", FAILED)


def cache_folder() -> Path:
    """Return the folder for what can be made again: $IMGTOOL_CACHE, or imgtool in the user's cache."""
    own = os.environ.get("IMGTOOL_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "imgtool"


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _refuse(fault: OSError) -> None:
    raise unreadable(Path(str(fault.filename)), fault)


def _below(folder: Path, suffixes: Collection[str]) -> list[Item]:
    found = []
    for parent, _, names in os.walk(folder, onerror=_refuse):
        for name in names:
            path = Path(parent, name)
            relative = path.relative_to(folder)
            if path.suffix.lower() in suffixes and not _hidden(relative) and path.is_file():
                found.append(Item(path, relative, folder=True))
    if not found:
        raise ImgtoolError(f"no photo in the folder {folder}", _known(suffixes), USAGE)
    return sorted(found, key=lambda item: item.relative.parts)


def _known(suffixes: Collection[str]) -> str:
    return "photos end in " + " ".join(sorted(suffixes))


def _matching(pattern: str, suffixes: Collection[str]) -> list[Item]:
    fixed = Path(*_before_magic(Path(pattern)))
    paths = sorted(Path(path) for path in glob.glob(pattern, recursive=True))
    photos = [path for path in paths if path.suffix.lower() in suffixes and path.is_file()]
    if not photos:
        hint = _known(suffixes) if paths else "check the pattern"
        raise ImgtoolError(f"no photo matches {pattern}", hint, USAGE)
    return [Item(path, path.relative_to(fixed), folder=True) for path in photos]


def _before_magic(pattern: Path) -> list[str]:
    """Return the leading parts of a pattern that hold no glob character."""
    parts: list[str] = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return parts


def _one(text: str, suffixes: Collection[str]) -> list[Item]:
    if text == "-":
        return [Item(None, Path("stdin"))]
    path = Path(text)
    if not text:  # which as a path would be the current folder
        raise ImgtoolError("no such file: an empty name", "check the path", USAGE)
    try:
        if path.is_dir():
            return _below(path, suffixes)
        if path.exists():
            return [Item(path, Path(path.name))]
    except OSError as fault:
        raise unreadable(path, fault) from None
    if glob.has_magic(text):
        return _matching(text, suffixes)
    raise ImgtoolError(f"no such file: {text}", "check the path", USAGE)


def without_own(items: list[Item], endings: Collection[str]) -> list[Item]:
    """Leave out found files ``<stem><ending>`` whose ``<stem>`` is beside them."""
    stems = {item.source.with_suffix("") for item in items if item.source}

    def own(item: Item) -> bool:
        """Tell whether a file was made of another one that is there."""
        source = item.source
        if source is None or not item.folder:
            return False
        return any(
            source.stem.endswith(ending) and source.with_name(source.stem.removesuffix(ending)) in stems
            for ending in endings
        )

    return [item for item in items if not own(item)]


def expand(
    inputs: Sequence[str], suffixes: Collection[str], engine: str = "", endings: Collection[str] = ()
) -> list[Item]:
    """List the inputs that words on the command line stand for.

    Args:
        inputs: Files, folders (searched to the bottom, sorted, hidden files left out), globs (``**``
            too; a file of just that name comes first) and "-" for standard input.
        suffixes: Suffixes, in lower case with their dot, that count as photos in folders and globs;
            a file named in full is taken whatever its suffix.
        engine: Where given, outputs of an earlier run of this engine beside their inputs
            (``photo-deblur.jpg`` beside ``photo.jpg``) are not taken for inputs.
        endings: How the stems of other files end that are left out beside their inputs, such as "-methods".

    Returns:
        The inputs in the order given, each file once.

    Raises:
        ImgtoolError: Code 2: no such file, no photo in a folder, no match for a glob.
    """
    found = [item for text in inputs for item in _one(text, suffixes)]
    own = [f"-{engine}{more}" for more in ("", *SHEETS)] if engine else []
    if own or endings:
        found = without_own(found, [*own, *endings])
    unique = {item.source.resolve() if item.source else None: item for item in reversed(found)}
    kept = set(map(id, unique.values()))
    return [item for item in found if id(item) in kept]


def is_folder(items: Sequence[Item], out: str | None) -> bool:
    """Decide whether -o names a folder: for many inputs it has to.

    Raises:
        ImgtoolError: Code 2, where it names a file for many inputs.
    """
    if out in (None, "-"):
        return False
    out = str(out)
    path = Path(out)
    if path.is_dir() or out.endswith(("/", os.sep)):
        return True
    if len(items) == 1 and not items[0].folder:
        return False
    if path.exists() or path.suffix.lower() in FORMATS:
        raise ImgtoolError(
            f"-o {out} is one file for {len(items)} photos found", "give a folder: -o DIR/", USAGE
        )
    return True


def _place(item: Item, engine: str, out: str | None, folder: bool, extension: str) -> Path | None:
    if out == "-" or (out is None and item.source is None):
        return None
    if out is None:
        source = item.source or item.relative
        return source.with_name(f"{source.stem}-{engine}.{extension}")
    if folder:
        return Path(out) / item.relative.with_name(f"{item.relative.stem}.{extension}")
    return Path(out) if Path(out).suffix or Path(out).exists() else Path(f"{out}.{extension}")


def _refuse_clashes(items: Sequence[Item], places: Sequence[Path | None]) -> None:
    sources = {item.source.resolve(): item for item in items if item.source}
    taken: dict[Path, Item] = {}
    for item, place in zip(items, places, strict=True):
        if place is None:
            continue
        real = place.resolve()
        if real in sources:
            what = f"the output of {item.name} would be {place}, which is the input {sources[real].name}"
            raise ImgtoolError(what, "choose another place with -o", USAGE)
        if real in taken:
            what = f"{taken[real].name} and {item.name} would both be written to {place}"
            raise ImgtoolError(what, "rename one, or run them apart into different folders", USAGE)
        taken[real] = item


def outputs(
    items: Sequence[Item], engine: str, out: str | None, extension: Callable[[Item], str]
) -> list[Path | None]:
    """Name the output of each input.

    Without ``out``: ``<stem>-<engine>.<extension>`` beside the input, standard output for standard
    input. With it: a file for one input (an ending is added where it has none), or a folder that
    keeps sub-folders and stems.

    Args:
        items: The inputs.
        engine: The engine's name.
        out: What -o said, or None.
        extension: Item to file ending without its dot, such as "jpg".

    Returns:
        One path per input; None is standard output.

    Raises:
        ImgtoolError: Code 2: a file or standard output for many inputs, two inputs with the same
            output, or an output that is an input. Code 1: a place that cannot be looked at.
    """
    if out == "":
        raise ImgtoolError("-o is empty", "give a file, a folder or - for standard output", USAGE)
    if out == "-" and len(items) > 1:
        raise ImgtoolError(
            f"standard output takes one photo, not {len(items)}", "give a folder: -o DIR/", USAGE
        )
    try:
        folder = is_folder(items, out)
        places = [_place(item, engine, out, folder, extension(item)) for item in items]
        _refuse_clashes(items, places)
    except OSError as fault:  # a folder that may not be looked into, a name that is too long
        raise _unwritable(Path(str(fault.filename)), fault) from None
    return places
