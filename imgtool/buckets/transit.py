"""Photos on their way here, outputs on their way there: ``infer`` with URLs, a few files at a time."""

from __future__ import annotations

import glob
import os
import shutil
import threading
from collections import deque
from collections.abc import Collection, Container, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from urllib.parse import unquote

from imgtool import buckets, files, names
from imgtool.buckets import Found, Place, manifest
from imgtool.buckets.patience import patiently
from imgtool.buckets.send import put, writable
from imgtool.buckets.state import PIECE, pieces
from imgtool.buckets.web import safe
from imgtool.errors import USAGE, ImgtoolError

WHOLE = 2 * PIECE
"""Bytes of a photo up to which it is asked for at once, and held in memory."""

_LOCK = "lock"
_DATE = 1_000_000_000
"""Time of the last change, in seconds since 1970, that photos get here: what is made here has another."""
_UNTOLD = Found("")


@dataclass(frozen=True)
class Plan:
    """Where files from elsewhere lie on their way; of every machine that takes part.

    Attributes:
        spool: The folder that holds all of them, absolute.
        sources: Folder in the spool and the URL of the folder that it stands for, for all that was named.
        out: The same of the outputs, where they go to a URL.
        name: The last part of that URL where no slash at its end says that it is a folder.
    """

    spool: str
    sources: tuple[tuple[str, str], ...]
    out: tuple[str, str] | None
    name: str = ""


@dataclass(frozen=True)
class Photo(files.Item):
    """An input that is fetched from a URL.

    Attributes:
        found: What was told of it when it was listed.
    """

    found: Found = _UNTOLD


class Transit:
    """Photos that are fetched from buckets before they are read, outputs that are sent when they are written.

    At most ``ahead`` photos lie or are under way here beside those that somebody waits for. The spool stays
    where it holds outputs that were not sent.
    """

    def __init__(self, plan: Plan, ahead: int = 8) -> None:
        """Fetch nothing yet.

        Args:
            plan: What the driver planned.
            ahead: Photos that are fetched before they are asked for, and threads that do it.
        """
        self.plan = plan
        self._many, self._owner, self._held = ahead, False, -1
        self._lock = threading.RLock()
        self._threads: ThreadPoolExecutor | None = None
        self._tasks: dict[Path, Future[None]] = {}
        self._coming: deque[files.Item] = deque()
        self._dropped: set[Path] = set()
        self._doubted: set[str] = set()
        self._known: set[Path] = set()
        self._whole: set[Path] = set()
        self._there: set[Path] | None = None
        self._asked: dict[Path, bool] = {}
        self._places: dict[str, Place] = {}

    @classmethod
    def begin(cls, inputs: Sequence[str], out: str | None) -> Transit:
        """Make the spool of a run, and plan what goes through it; clear those of runs that were killed.

        Args:
            inputs: What was named as inputs; only URLs matter.
            out: What -o said.

        Raises:
            ImgtoolError: Code 2: nothing can be written to the URL of ``out``. Code 1: no disk space, ...
        """
        spool = files.cache_folder().absolute() / "spool" / os.urandom(8).hex()
        _sweep(spool.parent)
        urls = dict.fromkeys(names.url(text) for text in inputs if names.is_url(text))
        folders = dict.fromkeys(_fixed(url)[0] for url in urls)
        sources = tuple((str(spool / f"in-{n}"), url) for n, url in enumerate(folders))
        away, name = None, ""
        if out is not None and names.is_url(out):
            url = names.url(out)
            writable(url)
            above, name = (url, "") if url.endswith("/") else _split(url)
            away = (str(spool / "out"), above)
        found = cls(Plan(str(spool), sources, away, name))
        found._owner = True
        hidden = spool.with_name(f".{spool.name}")
        try:
            hidden.mkdir(parents=True)
            found._held = _locked(hidden)
            hidden.rename(spool)  # who sweeps sees no spool that is not held
        except OSError as fault:
            raise ImgtoolError(f"cannot write {spool}: {fault.strerror}", "set IMGTOOL_CACHE") from None
        return found

    # --- what is there ---

    def items(self, url: str, suffixes: Collection[str]) -> list[files.Item]:
        """List the photos that a URL stands for: a folder, a file, or a pattern with ``*``, ``**`` or ``[``.

        A file or folder of just that name comes before what a pattern matches.

        Args:
            url: One of those that this began with.
            suffixes: Suffixes, in lower case, that count as photos; a file named in full is taken whatever
                its suffix.

        Returns:
            Items whose ``source`` is where they will lie, sorted as those of folders here; hidden files are
            left out.

        Raises:
            ImgtoolError: Code 2: nothing is there, or no photo. Code 1: it may not be read, ...
        """
        above, pattern = _fixed(url)
        local = Path(next(local for local, each in self.plan.sources if each == above))
        name = "" if pattern else _split(url)[1]
        place = buckets.open(above if pattern else url)
        listing = place.list()
        if not pattern and _single(listing, url, place):
            self._known.add(local / name)
            return [Photo(local / name, Path(name), url=place.url(name), found=listing[0])]
        found = []
        for each in (each for each in listing if safe(each.path)):
            source = local / name / each.path
            told = replace(each, path=source.relative_to(local).as_posix())
            found.append(Photo(source, Path(each.path), True, place.url(each.path), told))
            self._known.add(source)
        self._whole.add(local / name)
        exact = _named(found, unquote(pattern) if url.startswith("http") else pattern) if pattern else []
        if exact and not exact[0].folder:
            return exact
        return _photos(exact, url, "", suffixes) if exact else _photos(found, url, pattern, suffixes)

    def local(self, out: str) -> str:
        """Return what stands on this machine for the URL of -o; that of a folder ends in a slash.

        Where no slash tells, it is a folder if there are files below it.
        """
        if self.plan.out is None:
            raise ValueError(f"{out} was not planned")
        folder = Path(self.plan.out[0])
        if not self.plan.name:
            return f"{folder}/"
        path = folder / self.plan.name
        below = any(each != path for each in self._written())
        return f"{path}/" if below else str(path)

    def sent(self) -> Container[Path]:
        """Return the paths, of those that stand for files elsewhere, of which there is such a file already.

        One listing tells for all, except beside photos that were named one by one: those are asked for.
        """
        return _Sent(self)

    def holds(self, path: Path) -> bool:
        """Tell whether there is already a file elsewhere for which a path stands."""
        path = path.absolute()
        if self.plan.out and path.is_relative_to(self.plan.out[0]):
            return path in self._written()
        if path in self._known:
            return True
        owner = self._owned(path)
        if owner is None or any(path.is_relative_to(whole) for whole in self._whole):
            return False
        if path not in self._asked:
            self._asked[path] = bool(buckets.open(self.shown(path)).list())
        return self._asked[path]

    def _written(self) -> set[Path]:
        if self._there is None and self.plan.out:
            local, url = self.plan.out
            url += self.plan.name
            place = buckets.open(url)
            found = place.list()
            base = Path(local) if _single(found, url, place) else Path(local, self.plan.name)
            self._there = {base / each.path for each in found}
        return self._there or set()

    def check_writable(self, targets: Iterable[Path]) -> None:
        """Refuse outputs that would go beside photos where nothing can be written.

        Raises:
            ImgtoolError: Code 2.
        """
        for path in targets:
            owner = self._owned(path)
            if owner is not None and not owner[1].startswith(("s3://", "gs://")):
                raise ImgtoolError(
                    f"cannot write {self.shown(path)}", "give -o DIR, here or in a bucket", USAGE
                )

    # --- photos ---

    def ahead(self, items: Iterable[files.Item]) -> None:
        """Begin to fetch photos, as many as may lie here; the others follow as these are dropped."""
        with self._lock:
            self._coming.extend(item for item in items if item.url)
            self._go_on()

    def bring(self, item: files.Item) -> None:
        """Wait until a photo lies here, and fetch it now if nothing does so yet.

        Raises:
            ImgtoolError: It is gone, may not be read, the network is down, the disk is full.
        """
        source = item.source
        if not item.url or source is None:
            return
        with self._lock:
            self._dropped.discard(source)
            task = self._tasks.get(source) or self._start(item)
        try:
            task.result()
        except ImgtoolError:
            with self._lock:
                self._tasks.pop(source, None)
                self._go_on()
            raise

    def drop(self, item: files.Item) -> None:
        """Let go of a photo that was read, or is not wanted any more."""
        source = item.source
        if not item.url or source is None:
            return
        with self._lock:
            if item in self._coming:
                self._coming.remove(item)
            task = self._tasks.get(source)
            if task and not task.done() and not task.cancel():
                self._dropped.add(source)
            else:
                self._forget(source)

    def _landed(self, source: Path) -> None:
        with self._lock:
            if source in self._dropped:
                self._forget(source)

    def _forget(self, source: Path) -> None:
        self._dropped.discard(source)
        self._tasks.pop(source, None)
        source.unlink(missing_ok=True)
        self._go_on()

    def _start(self, item: files.Item) -> Future[None]:
        if item in self._coming:
            self._coming.remove(item)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._many, thread_name_prefix="imgtool-transit")
        source = Path(item.source or "")
        task = self._tasks[source] = self._threads.submit(self._fetch, item, source)
        task.add_done_callback(lambda _: self._landed(source))
        return task

    def _go_on(self) -> None:
        while self._coming and len(self._tasks) < self._many:
            item = self._coming[0]
            if item.source in self._tasks:
                self._coming.popleft()
            else:
                self._start(item)

    def _fetch(self, item: files.Item, source: Path) -> None:
        if source.exists():
            return
        owner = self._owned(source)
        if owner is None:
            raise ValueError(f"{source} is not of this run")
        self._hold()
        found = item.found if isinstance(item, Photo) else Found(source.relative_to(owner[0]).as_posix())
        with files.atomic(source) as temporary:
            self._fetch_right(owner[1], found, item.url, temporary)
            os.utime(temporary, (_DATE, _DATE))

    def _fetch_right(self, above: str, found: Found, url: str, target: Path) -> None:
        """Fetch a photo into a file; once more, where its hashes are not those that were told.

        An ETag that contradicts the same content twice is no MD5, and none there is believed any more.
        """
        told = dict(found.digests)
        if above in self._doubted:
            told.pop("etag-md5", None)
        before: dict[str, str] = {}
        for _ in range(2):
            _copy(self._place(above), found, target)
            if found.size not in (-1, target.stat().st_size):
                raise ImgtoolError(f"{url} has changed since it was listed", "run it again")
            made = manifest.hashes(target, told) if told else {}
            wrong = [name for name, value in told.items() if (made.get(name) or value) != value]
            if wrong == ["etag-md5"] and made == before:
                self._doubted.add(above)
                return
            if not wrong:
                return
            before = made
        hint = "run it again; where that does not help, what is stored or the way to it is damaged"
        raise ImgtoolError(f"{url}: its {wrong[0].upper()} is not what the store tells, twice", hint)

    # --- outputs ---

    def send(self, paths: Iterable[Path]) -> None:
        """Send those files that stand for files elsewhere, in this order, and delete each here.

        Raises:
            ImgtoolError: One cannot be sent; it and those behind it stay in the spool, which is named.
        """
        for path in paths:
            owner = self._owned(path)
            if owner is None:
                continue
            writable(owner[1])
            try:
                put(self._place(owner[1]), path, path.absolute().relative_to(owner[0]).as_posix())
            except ImgtoolError as fault:
                # Of all that lies in it messages give the URL; the spool itself has none.
                hint = f"{fault.hint}; what was to be sent is in {self.plan.spool}".removeprefix("; ")
                raise ImgtoolError(fault.what, hint, fault.code) from None
            path.unlink(missing_ok=True)
            if self._there is not None:
                self._there.add(path.absolute())

    def shown(self, path: Path) -> str:
        """Return the URL for which a path stands, or the path where it stands for itself."""
        owner = self._owned(path)
        if owner is None:
            return str(path)
        return self._place(owner[1]).url(path.absolute().relative_to(owner[0]).as_posix())

    def close(self) -> list[Path]:
        """End what is under way; who began, or is the last on another machine, deletes the spool.

        Returns:
            Outputs that were not sent, for which the spool stays; those of a worker are told by who began.
        """
        with self._lock:
            self._coming.clear()
            threads, here = self._threads, [*self._tasks]
        if threads:
            threads.shutdown(cancel_futures=True)
        for source in here:
            source.unlink(missing_ok=True)
        left: list[Path] = []
        if self._owner or (self._held >= 0 and _alone(self._held)):
            left = _cleared(Path(self.plan.spool))
        if self._held >= 0:
            os.close(self._held)
            self._held = -1
        return left

    def _hold(self) -> None:
        """Hold the spool, on whatever machine this is, against who sweeps."""
        with self._lock, suppress(OSError):  # which the photo itself meets too
            if self._held < 0:
                Path(self.plan.spool).mkdir(parents=True, exist_ok=True)
                self._held = _locked(Path(self.plan.spool))

    def _owned(self, path: Path) -> tuple[str, str] | None:
        """Return the folder in the spool that holds a path, and its URL; None for any other path."""
        path = path.absolute()
        for local, url in [*self.plan.sources, *([self.plan.out] if self.plan.out else [])]:
            if path.is_relative_to(local):
                return local, url
        return None

    def _place(self, url: str) -> Place:
        with self._lock:
            if url not in self._places:
                self._places[url] = buckets.open(url)
            return self._places[url]


def _copy(place: Place, found: Found, target: Path) -> None:
    """Write what lies elsewhere into a file; a large one goes there in pieces."""
    with target.open("wb") as file:
        if found.size <= WHOLE:
            file.write(patiently(lambda: place.whole(found)))
            return
        for begin, end in pieces(found.size):
            file.write(patiently(partial(place.read, found, begin, end)))


def _locked(spool: Path) -> int:
    """Open the lock of a spool, and share it with all who take part in the run; -1 where there are none."""
    try:
        import fcntl
    except ImportError:  # Windows: what a killed process leaves stays
        return -1
    lock = os.open(spool / _LOCK, os.O_CREAT | os.O_RDWR, 0o666)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return lock


def _alone(lock: int) -> bool:
    """Take a lock for oneself; tell whether nobody else holds it."""
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def _sweep(folder: Path) -> None:
    """Clear the spools that nobody holds."""
    for lock in folder.glob(f"[!.]*/{_LOCK}"):
        with suppress(OSError):
            held = os.open(lock, os.O_RDWR)
            if _alone(held):
                _cleared(lock.parent)
            os.close(held)


def _cleared(spool: Path) -> list[Path]:
    """Remove all of a spool but outputs, and return these; without any, it is gone."""
    left = []
    for parent, _, found in os.walk(spool, topdown=False):
        for path in (Path(parent, name) for name in found):
            with suppress(OSError):
                if path.name.startswith(".imgtool-") or path.stat().st_mtime == _DATE:
                    path.unlink()
                elif path != spool / _LOCK:
                    left.append(path)
        with suppress(OSError):  # something stays in it
            os.rmdir(parent)
    if not left:
        shutil.rmtree(spool, ignore_errors=True)
    return sorted(left)


class _Sent(Container[Path]):
    def __init__(self, transit: Transit) -> None:
        self._transit = transit

    def __contains__(self, path: object) -> bool:
        return isinstance(path, Path) and self._transit.holds(path)


def _split(url: str) -> tuple[str, str]:
    """Return the URL of the folder that holds what a URL names, and the name.

    Of a bucket, a host and a repository it is their own URL, and "".

    >>> _split("s3://b/a/x.jpg"), _split("s3://b/a/"), _split("s3://b")
    (('s3://b/a/', 'x.jpg'), ('s3://b/', 'a'), ('s3://b/', ''))
    >>> _split("https://h/a/x%20y.jpg?key=1"), _split("hf://datasets/u/n@refs/pr/1")
    (('https://h/a/?key=1', 'x y.jpg'), ('hf://datasets/u/n@refs/pr/1/', ''))
    """
    url, query = _apart(url)
    scheme, _, rest = url.partition("://")
    parts = rest.rstrip("/").split("/")
    if len(parts) <= _root(scheme, parts):
        return f"{scheme}://{'/'.join(parts)}/{query}", ""
    name = unquote(parts[-1]) if scheme.startswith("http") else parts[-1]
    return f"{scheme}://{'/'.join(parts[:-1])}/{query}", name


def _root(scheme: str, parts: Sequence[str]) -> int:
    """Return how many parts name the bucket, the host or the repository."""
    if scheme != "hf":
        return 1
    count = 3 if parts[0] in ("datasets", "spaces", "models") else 2
    return count + 2 * (len(parts) >= count and parts[count - 1].endswith("@refs"))


def _apart(url: str) -> tuple[str, str]:
    """Return an address, and what follows its ?, if it is one of the web: elsewhere a ? may be in a name."""
    if not url.startswith("http"):
        return url, ""
    address, mark, query = url.partition("?")
    return address, mark + query


def _fixed(url: str) -> tuple[str, str]:
    """Return the URL of the folder that a URL's files are found in, and the pattern of them or "".

    >>> _fixed("s3://b/a/**/x*.jpg"), _fixed("s3://b/a/x.jpg")
    (('s3://b/a/', '**/x*.jpg'), ('s3://b/a/', ''))
    """
    address, query = _apart(url)
    if not glob.has_magic(address):
        return _split(url)[0], ""
    parts = address.split("/")
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:first]) + "/" + query, "/".join(parts[first:])


def _single(listing: Sequence[Found], url: str, place: Place) -> bool:
    """Tell whether what was listed is the file that a URL names: in a folder, its URL is longer."""
    name = _split(url)[1]
    if len(listing) != 1 or listing[0].path != name or url.endswith("/"):
        return False
    return place.url(name).count("/") == _apart(url)[0].count("/")


def _named(found: Sequence[Photo], name: str) -> list[files.Item]:
    """Return the file of a name, or the files in the folder of that name."""
    name = name.rstrip("/")
    for item in found:
        if item.relative.as_posix() == name:
            return [replace(item, relative=Path(item.relative.name), folder=False)]
    inside = [item for item in found if item.relative.is_relative_to(name)]
    return [replace(item, relative=item.relative.relative_to(name)) for item in inside]


def _photos(
    found: Sequence[files.Item], url: str, pattern: str, suffixes: Collection[str]
) -> list[files.Item]:
    """Return what a folder or pattern stands for, sorted."""
    if not found:
        raise ImgtoolError(f"there is nothing at {url}", "check the address", USAGE)
    if pattern:
        found = [item for item in found if _matches(item.relative.parts, pattern.split("/"))]
        what = f"no photo matches {url}"
    else:
        what = f"no photo in the folder {url}"
    photos = [
        item
        for item in found
        if item.relative.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in item.relative.parts)
    ]
    if not photos:
        hint = "photos end in " + " ".join(sorted(suffixes)) if found else "check the pattern"
        raise ImgtoolError(what, hint, USAGE)
    return sorted(photos, key=lambda item: item.relative.parts)


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Tell whether a path matches a pattern, part by part; ``**`` stands for any number of parts.

    >>> _matches(["a", "b", "x.jpg"], ["**", "*.jpg"]), _matches(["a", "x.jpg"], ["*.jpg"])
    (True, False)
    """
    if not pattern:
        return not parts
    if pattern[0] == "**":
        rest = pattern[1:]
        return any(_matches(parts[n:], rest) for n in range(len(parts) + 1)) or not rest
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
