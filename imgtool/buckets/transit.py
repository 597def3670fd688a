"""Photos on their way here, outputs on their way there: ``infer`` with URLs, a few files at a time."""

from __future__ import annotations

import os
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from urllib.parse import unquote

from imgtool import buckets, files, names
from imgtool.buckets import Found, Place, etags, manifest, spool
from imgtool.buckets.etags import Etags, Verdict
from imgtool.buckets.listing import Photo, fixed, named, photos, single, split, tame
from imgtool.buckets.outlet import Outlet, awaited, check_bucket
from imgtool.buckets.patience import patiently
from imgtool.buckets.pool import apart
from imgtool.buckets.send import put, writable
from imgtool.buckets.state import PIECE, Closed, pieces
from imgtool.console import Console
from imgtool.errors import USAGE, ImgtoolError

WHOLE = 2 * PIECE
"""Bytes of a photo up to which it is asked for at once, and held in memory."""

_WARN = Console().warn


@dataclass(frozen=True)
class Plan:
    """Where files from elsewhere lie on their way; of every machine that takes part.

    Attributes:
        spool: The folder that holds all of them, absolute.
        sources: Folder in the spool and the URL of the folder that it stands for, for all that was named.
        out: The same of the outputs, where they go to a URL.
        name: The last part of that URL where no slash at its end says that it is a folder.
        left: URL and path of outputs that earlier runs could not send; each goes when it is sent anew.
    """

    spool: str
    sources: tuple[tuple[str, str], ...]
    out: tuple[str, str] | None
    name: str = ""
    left: tuple[tuple[str, str], ...] = ()


class Transit:
    """Photos that are fetched from buckets before they are read, outputs that are sent when they are written.

    At most ``ahead`` photos lie or are under way here beside those that somebody waits for. The spool stays
    where it holds outputs that were not sent.
    """

    def __init__(self, plan: Plan, ahead: int = 8, warn: Callable[[str], None] = _WARN) -> None:
        """Fetch nothing yet.

        Args:
            plan: What the driver planned.
            ahead: Photos that are fetched before they are asked for.
            warn: Told of what may be wrong, from any thread.
        """
        self.plan, self._warn = plan, warn
        self._many, self._owner, self._held = ahead, False, -1
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._outlet = Outlet()
        self._tasks: dict[Path, Future[None]] = {}
        self._coming: deque[files.Item] = deque()
        self._dropped: set[Path] = set()
        self._etags: defaultdict[str, Etags] = defaultdict(Etags)
        self._known: set[Path] = set()
        self._whole: set[Path] = set()
        self._there: set[Path] | None = None
        self._asked: dict[Path, bool] = {}
        self._places: dict[str, Place] = {}
        self._left: defaultdict[str, list[Path]] = defaultdict(list)
        for url, path in plan.left:
            self._left[url].append(Path(path))

    @classmethod
    def begin(cls, inputs: Sequence[str], out: str | None, warn: Callable[[str], None] = _WARN) -> Transit:
        """Make the spool of a run, and plan what goes through it; clear those of runs that were killed.

        Args:
            inputs: What was named as inputs; only URLs matter.
            out: What -o said.
            warn: Told of what may be wrong, from any thread; first, of outputs that earlier runs left.

        Raises:
            ImgtoolError: Code 2: nothing can be written to the URL of ``out``. Code 1: no disk space, ...
        """
        own = files.cache_folder().absolute() / "spool" / os.urandom(8).hex()
        urls = dict.fromkeys(names.url(text) for text in inputs if names.is_url(text))
        folders = dict.fromkeys(fixed(url)[0] for url in urls)
        sources = tuple((str(own / f"in-{n}"), url) for n, url in enumerate(folders))
        away, name = None, ""
        if out is not None and names.is_url(out):
            url = names.url(out)
            writable(url)
            check_bucket(url)
            above, name = (url, "") if url.endswith("/") else split(url)
            away = (str(own / "out"), above)
        left = spool.sweep(own.parent)
        if left:
            warn(spool.told(path for _, path in left))
        found = cls(Plan(str(own), sources, away, name, tuple(left)), warn=warn)
        ends = {
            Path(local).name: url for local, url in found._folders() if url.startswith(("s3://", "gs://"))
        }
        found._owner, found._held = True, spool.make(own, ends)
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
            left out. To bring one fails whose name leads out of the folder, or could be another's.

        Raises:
            ImgtoolError: Code 2: nothing is there, or no photo. Code 1: it may not be read, ...
        """
        above, pattern = fixed(url)
        local = Path(next(local for local, each in self.plan.sources if each == above))
        name = "" if pattern else split(url)[1]
        place = buckets.open(above if pattern else url)
        listing = awaited(place.list)
        if not pattern and single(listing, url, place):
            self._known.add(local / name)
            return [Photo(local / name, Path(name), url=place.url(name), found=listing[0])]
        found = []
        for each in listing:
            path = tame(each.path)
            source = local / name / path
            told = replace(each, path=source.relative_to(local).as_posix())
            odd = (
                ""
                if path == each.path
                else "refused, for a part of its name is empty, dots alone, or has a backslash"
            )
            found.append(Photo(source, Path(path), True, place.url(each.path), told, each.fault or odd))
            self._known.add(source)
        self._whole.add(local / name)
        exact = named(found, unquote(pattern) if url.startswith("http") else pattern) if pattern else []
        if exact and not exact[0].folder:
            return [*exact]
        return photos(exact or found, url, "" if exact else pattern, suffixes)

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
            self._asked[path] = bool(awaited(buckets.open(self.shown(path)).list))
        return self._asked[path]

    def _written(self) -> set[Path]:
        if self._there is None and self.plan.out:
            local, url = self.plan.out
            url += self.plan.name
            place = buckets.open(url)
            found = self._outlet.listed(lambda: awaited(place.list))
            base = Path(local) if single(found, url, place) else Path(local, self.plan.name)
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
            Fatal: What is made of it could not be sent.
        """
        source = item.source
        self._outlet.check()
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
            if task and not task.done():
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
        source = Path(item.source or "")
        task = self._tasks[source] = apart(partial(self._fetch, item, source))
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
        if isinstance(item, Photo) and item.refused:
            raise ImgtoolError(f"{item.url}: {item.refused}")
        self._hold()
        found = item.found if isinstance(item, Photo) else Found(source.relative_to(owner[0]).as_posix())
        with ExitStack() as stack:
            with self._lock:  # nothing is made in a spool that is being cleared
                self._go_on_or_close()
                temporary = stack.enter_context(files.atomic(source))
            self._fetch_right(owner[1], found, item.url, temporary)
            os.utime(temporary, (spool.DATE, spool.DATE))
            self._go_on_or_close()

    def _fetch_right(self, above: str, found: Found, url: str, target: Path) -> None:
        """Fetch a photo into a file; once more, where its hashes are not those that were told."""
        told = dict(found.digests)
        before: dict[str, str] | None = None
        while True:
            self._copy(self._place(above), found, target)
            if found.size not in (-1, target.stat().st_size):
                raise ImgtoolError(f"{url} has changed since it was listed", "run it again")
            made = manifest.hashes(target, told) if told else {}
            try:
                verdict = self._etags[above].judge(found, made, before)
            except ImgtoolError as fault:
                raise ImgtoolError(f"{url}: {fault.what}", fault.hint) from None
            if verdict is not Verdict.AGAIN:
                break
            before = made
        if verdict is Verdict.DOUBTFUL and before:  # else all there are so, and the first ones were named
            self._warn(etags.warning([url]))

    def _copy(self, place: Place, found: Found, target: Path) -> None:
        """Write what lies elsewhere into a file; a large one goes there in pieces."""
        with target.open("wb") as file:
            ranges = [None] if found.size <= WHOLE else pieces(found.size)
            for each in ranges:
                self._go_on_or_close()
                read = partial(place.read, found, *each) if each else partial(place.whole, found)
                file.write(patiently(read, self._stop))

    def _go_on_or_close(self) -> None:
        if self._stop.is_set():
            raise Closed

    # --- outputs ---

    def send(self, paths: Iterable[Path]) -> None:
        """Send those files that stand for files elsewhere, in this order, and delete each here.

        Raises:
            ImgtoolError: One cannot be sent; it and those behind it stay in the spool, which is named.
            Fatal: Nor can any other.
        """
        for path in paths:
            owner = self._owned(path)
            if owner is None:
                continue
            writable(owner[1])
            below = path.absolute().relative_to(owner[0]).as_posix()
            work = partial(put, self._place(owner[1]), path, below)
            try:
                self._outlet.sent(partial(awaited, work))
            except ImgtoolError as fault:
                # Of all that lies in it messages give the URL; the spool itself has none.
                hint = f"{fault.hint}; what was to be sent is in {self.plan.spool}".removeprefix("; ")
                raise type(fault)(fault.what, hint, fault.code) from None
            for each in (path, *self._left.pop(spool.address(owner[1], below), ())):
                each.unlink(missing_ok=True)
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
            self._stop.set()  # a request may take long: nobody waits for its thread
            self._coming.clear()
            here = [*self._tasks]
        for source in here:
            source.unlink(missing_ok=True)
        left: list[Path] = []
        if self._owner or (self._held >= 0 and spool.alone(self._held)):
            left = spool.cleared(Path(self.plan.spool))
        if self._held >= 0:
            os.close(self._held)
            self._held = -1
        if self._owner and self.plan.left:
            spool.sweep(Path(self.plan.spool).parent)
        return left

    def _hold(self) -> None:
        """Hold the spool, on whatever machine this is, against who sweeps."""
        with self._lock, suppress(OSError):  # which the photo itself meets too
            if self._held < 0 and not self._stop.is_set():
                Path(self.plan.spool).mkdir(parents=True, exist_ok=True)
                self._held = spool.held(Path(self.plan.spool))

    def _owned(self, path: Path) -> tuple[str, str] | None:
        """Return the folder in the spool that holds a path, and its URL; None for any other path."""
        path = path.absolute()
        return next((each for each in self._folders() if path.is_relative_to(each[0])), None)

    def _folders(self) -> Iterable[tuple[str, str]]:
        return [*self.plan.sources, *([self.plan.out] if self.plan.out else [])]

    def _place(self, url: str) -> Place:
        with self._lock:
            if url not in self._places:
                self._places[url] = buckets.open(url)
            return self._places[url]


class _Sent(Container[Path]):
    def __init__(self, transit: Transit) -> None:
        self._transit = transit

    def __contains__(self, path: object) -> bool:
        return isinstance(path, Path) and self._transit.holds(path)
