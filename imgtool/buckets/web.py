"""Folders of web servers, ``https://`` and ``http://``, to read from."""

from __future__ import annotations

import json
import re
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, unquote, urldefrag, urljoin, urlsplit

from imgtool.buckets import Found, Interrupted, Offline, Place, manifest
from imgtool.buckets.client import Client, Reply, basic
from imgtool.buckets.patience import patiently
from imgtool.errors import USAGE, ImgtoolError

DEEPEST = 32
"""Levels of folders that are looked into: a link that leads back to its own folder has no end."""
MOST = 1_000_000
"""Files at most in one folder and all below it."""

SILENT = 64
"""Links at most that the site does not answer for before the site itself counts as out of reach."""

_THREADS = 16
_PAGE = 1 << 26
_MANIFEST = 1 << 28
_SUMS = {"sha256": 64, "md5": 32}


def open(text: str) -> Place:
    """Return the place that an address names, ``https://``, ``http://`` or ``hf://``; nothing is asked yet.

    Raises:
        ImgtoolError: Code 2: no such address can be, or huggingface_hub is not installed.
    """
    if text.startswith("hf://"):
        from imgtool.buckets import hub

        return hub.Hub(text)
    return Site(text)


def safe(path: str) -> bool:
    r"""Tell whether a path that a server names stays below the folder that it is put into.

    >>> safe("a/b.jpg"), safe("../b.jpg"), safe("/b.jpg"), safe("a\\..\\b.jpg")
    (True, False, False, False)
    """
    return not any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in path.split("/"))


class Remote:
    """Files behind HTTP: what sites and the Hub have in common."""

    def __init__(self) -> None:
        """Connect to nothing yet."""
        self.client = Client()
        self.headers: dict[str, str] = {}
        self._copies: dict[str, IO[bytes]] = {}
        self._given: Counter[str] = Counter()
        self._copying = threading.Lock()

    def address(self, path: str) -> str:
        """Return what is asked for to read a path below."""
        raise NotImplementedError

    def url(self, path: str) -> str:
        """Return the URL of a path below, as people may see it."""
        raise NotImplementedError

    def read(self, found: Found, begin: int, end: int) -> bytes:
        """Return bytes ``begin`` to ``end`` (excluded) of a file, in one request; raises as ``Place``.

        A server that knows no ranges sends the whole file: it is kept, in a temporary file, until every
        byte of it was asked for. So is one of which nothing tells whether two ranges are of one content.
        """
        if end <= begin:
            return b""
        if found.path in self._copies or (end - begin < found.size and not found.telling):
            return self._from_copy(found, begin, end)
        asked = {"Range": f"bytes={begin}-{end - 1}"} | self.headers
        with self.client.ask("GET", self.address(found.path), asked) as reply:
            self._check(reply, found)
            if reply.status == 206:
                return self._exactly(reply, found, begin, end)
            if begin == 0 and reply.size == end:
                return self._exactly(reply, found, 0, end)
        return self._from_copy(found, begin, end)

    def _exactly(self, reply: Reply, found: Found, begin: int, end: int) -> bytes:
        asked = f"bytes {begin}-{end - 1}/"
        said = reply.headers.get("Content-Range", asked)
        if not said.startswith(asked):
            raise Interrupted(f"{self.url(found.path)} sent {said} for {asked}")
        data = reply.read()
        if len(data) != end - begin:
            raise Interrupted(f"{self.url(found.path)} sent {len(data)} bytes of {end - begin}")
        return data

    def _from_copy(self, found: Found, begin: int, end: int) -> bytes:
        with self._copying:
            copy = self._copies.get(found.path)
            if copy is None:
                copy = self._copies[found.path] = self._copied(found)
            copy.seek(begin)
            data = copy.read(end - begin)
            self._given[found.path] += len(data)
            copy.seek(0, 2)
            if self._given[found.path] >= copy.tell():
                self._copies.pop(found.path).close()
                del self._given[found.path]
        if len(data) != end - begin:
            raise self._changed(found)
        return data

    def _copied(self, found: Found) -> IO[bytes]:
        copy = tempfile.TemporaryFile()  # noqa: SIM115 - kept open
        try:
            with self.client.ask("GET", self.address(found.path), self.headers) as reply:
                self._check(reply, found)
                reply.copy(copy)
        except BaseException:
            copy.close()
            raise
        return copy

    def whole(self, found: Found) -> bytes:
        """Return a file in one request; raises as ``Place``."""
        with self.client.ask("GET", self.address(found.path), self.headers) as reply:
            self._check(reply, found)
            data = reply.read()
        if found.size not in (-1, len(data)):
            raise self._changed(found)
        return data

    def _check(self, reply: Reply, found: Found) -> None:
        """Raise what an answer means that is not the file that was listed."""
        if reply.status not in (200, 206):
            raise reply.refusal(self.url(found.path))
        changed = found.tag and reply.tag and self.tells(found) and found.tag != reply.tag
        if changed or found.size not in (-1, reply.size if reply.size >= 0 else found.size):
            raise self._changed(found)

    def _changed(self, found: Found) -> ImgtoolError:
        return ImgtoolError(f"{self.url(found.path)} has changed since it was listed", "run it again")

    def tells(self, found: Found) -> bool:
        """Tell whether a file's tag is the one that comes with its bytes."""
        return True

    def write(self, source: Path, path: str) -> None:
        """Refuse: nothing is sent to web servers or the Hub."""
        raise ImgtoolError(
            f"cannot write {self.url(path)}: it is to read from", "write to s3:// or gs://", USAGE
        )


class Site(Remote):
    """A folder of a web server, or a single file.

    A folder is known by the slash at its end, or by a server that adds it. It is listed from the manifest
    in it that ``imgtool data fetch`` wrote, else from the index page that the server shows (those of Apache,
    nginx, Caddy, Python and any other that links its files), and so are the folders below.
    """

    def __init__(self, text: str) -> None:
        """Take the address apart.

        Args:
            text: The address; ``NAME:PASSWORD@`` signs in, and what follows a ? goes with every request.
        """
        super().__init__()
        try:
            parts = urlsplit(text)
            valid = bool(parts.hostname) and parts.port != 0
        except ValueError:
            valid = False
        if not valid:
            raise ImgtoolError(f"{text} is no address of a web server", "write https://HOST/PATH", USAGE)
        user, at, host = parts.netloc.rpartition("@")
        self.headers = basic(user) if at else {}
        self._base = f"{parts.scheme}://{host}{quote(parts.path or '/', safe='/%:@!$&()*+,;=~')}"
        self._silent: list[ImgtoolError] = []
        self._query = f"?{quote(parts.query, safe='/%:@!$&()*+,;=~?')}" if parts.query else ""

    def url(self, path: str) -> str:
        """Return the address of a path below, without what signs in."""
        if self._base.endswith("/"):
            return self._base + quote(path)
        last = unquote(self._base.rpartition("/")[2])
        return self._base if path == last else f"{self._base}/{quote(path)}"

    def address(self, path: str) -> str:
        """Return the address of a path below, as it is asked for."""
        return self.url(path) + self._query

    def tells(self, found: Found) -> bool:
        """Tell whether a file's tag is the server's: a manifest brings others."""
        return not found.tag.startswith("manifest:")

    def list(self) -> list[Found]:
        """Return every file below, by path; one where the address is a file; [] where there is nothing.

        A link that fails is listed as a file without a size, a folder below without an index as a fault.

        Raises:
            Offline: Nobody answers.
            ImgtoolError: It may not be read, or is a folder of which the server shows no index.
        """
        if not self._base.endswith("/"):
            name = unquote(self._base.rpartition("/")[2])
            reply = patiently(lambda: self._look(name, strict=True))
            if isinstance(reply, Found):
                return [reply]
            if reply is None:
                return []
            self._base += "/"
        told = patiently(self._manifest)
        return sorted(self._crawled() if told is None else told, key=lambda found: found.path)

    def _look(self, path: str, strict: bool = False) -> Found | str | None:
        """Return what is known of a file before it is read.

        Args:
            path: Its path below.
            strict: Whether a file that may not be read is an error here, and not when it is read.

        Returns:
            The file; its path with a slash where it is a folder; None where there is none.
        """
        for method, more in (("HEAD", {}), ("GET", {"Range": "bytes=0-0"})):
            with self.client.ask(method, self.address(path), self.headers | more) as reply:
                if urlsplit(reply.url).path.endswith("/"):
                    return path + "/"
                if reply.status in (200, 206):
                    # Pages that are made when they are asked for have 0 in the answer to HEAD.
                    return Found(path, reply.size or (-1 if method == "HEAD" else 0), reply.tag)
                if reply.status in (404, 410):
                    return None
                refusal = reply if method == "GET" else None
                # An address that is signed for GET, or a server that knows no HEAD, still answers GET.
                if method == "HEAD" and reply.status in (429, 502, 503, 504):
                    raise reply.refusal(self.url(path))
        if strict and refusal:
            raise refusal.refusal(self.url(path))
        return Found(path)

    def _manifest(self) -> Sequence[Found] | None:
        """Return what a manifest in the folder lists; None where there is none, or what is none.

        Raises:
            ImgtoolError: It names a path that leads out of the folder.
        """
        with self.client.ask("GET", self.address(manifest.NAME), self.headers) as reply:
            if reply.status != 200:
                return None
            text = reply.read(_MANIFEST)
        rows = _rows(text) if len(text) <= _MANIFEST else None
        for found in rows or []:
            if not safe(found.path):
                raise ImgtoolError(
                    f"{self.url(manifest.NAME)} names {found.path!r}", "it is not to be trusted"
                )
        return rows

    # --- index pages ---

    def _crawled(self) -> Iterable[Found]:
        found: dict[str, Found] = {}
        self._silent.clear()
        seen, folders = {""}, {""}
        with ThreadPoolExecutor(_THREADS) as threads:
            for _ in range(DEEPEST):
                pages = list(threads.map(self._page, sorted(folders)))
                links = {link for page in pages if not isinstance(page, Found) for link in page} - seen
                names = sorted(link for link in links if not link.endswith("/"))
                looked = list(threads.map(self._linked, names))
                found |= {each.path: each for each in (*pages, *looked) if isinstance(each, Found)}
                folders = links - set(names) | {each for each in looked if isinstance(each, str)} - seen
                seen |= links | folders
                if len(found) > MOST:
                    raise ImgtoolError(f"{self._base} lists more than {MOST:,} files", "name a folder in it")
                if not folders:
                    break
        return found.values()

    def _page(self, folder: str) -> Iterable[str] | Found:
        """Return what a folder's page links to; of a folder below that cannot be listed, its fault."""
        try:
            return patiently(lambda: self._links(folder))
        except ImgtoolError as fault:
            if not folder:
                raise
            self._bear(fault)
            return Found(folder, fault=fault.what)

    def _linked(self, path: str) -> Found | str | None:
        """Return as ``_look`` what is linked to; of what fails the name alone: who reads it learns why."""
        try:
            return patiently(lambda: self._look(path))
        except ImgtoolError as fault:
            self._bear(fault)
            return Found(path)

    def _bear(self, fault: ImgtoolError) -> None:
        """Raise a fault of one link again where the site itself is out of reach."""
        if not isinstance(fault, Offline):
            return
        self._silent.append(fault)
        try:
            with self.client.ask("HEAD", self.address(""), self.headers):
                reached = len(self._silent) <= SILENT
        except (Interrupted, Offline):
            reached = False
        if not reached:
            raise fault

    def _links(self, folder: str) -> Iterable[str]:
        """Return the paths that an index page links to, below its own folder; folders end in a slash."""
        with self.client.ask("GET", self.address(folder), self.headers) as reply:
            if reply.status in (404, 410):
                return []
            if reply.status in (401, 403):
                hint = f"name a file, or put the {manifest.NAME} there that imgtool data fetch wrote"
                what = f"{self.url(folder)}: the server shows no list of this folder ({reply.status})"
                raise ImgtoolError(what, hint)
            if reply.status != 200:
                raise reply.refusal(self.url(folder))
            if "html" not in reply.headers.get("Content-Type", ""):
                return []
            root = urljoin(reply.url, ".").partition("?")[0]
            text = reply.read(_PAGE)
            if len(text) > _PAGE:
                raise ImgtoolError(f"{self.url(folder)} is too long for a list of files", "name a file")
            page = _Links()
            page.feed(text.decode(errors="replace"))
        return {folder + path for href in page.found if (path := _below(root, reply.url, href))}


class _Links(HTMLParser):
    """Gathers what a page links to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take the target of a link."""
        if tag == "a":
            self.found += [value for name, value in attrs if name == "href" and value]


def _below(root: str, page: str, href: str) -> str:
    """Return the path of a link below a folder, "" for any other link.

    >>> _below("http://h/a/", "http://h/a/", "my%20photo.jpg"), _below("http://h/a/", "http://h/a/", "../b/")
    ('my photo.jpg', '')
    """
    try:
        target = urldefrag(urljoin(page, href)).url
    except ValueError:
        return ""
    if not target.startswith(root) or "?" in target:
        return ""
    path = unquote(target[len(root) :])
    return path if safe(path.removesuffix("/")) else ""


def _rows(text: bytes) -> list[Found] | None:
    """Return what a manifest lists; None where a text is no manifest, or not the whole of one."""
    try:
        head, *rows = [json.loads(line) for line in text.split(b"\n") if line.strip()]
        if "url" not in head or not head.get("date", True) or head["files"] != len(rows):
            return None  # without a date, somebody is changing the folder
        found = [_of_row(row) for row in rows]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    return found if len({each.path for each in found}) == len(found) else None


def _of_row(row: dict[str, Any]) -> Found:
    """Return what a line tells of a file; raises ``ValueError``, ``TypeError`` or ``LookupError``."""
    path, size, tag = row["path"], row["size"], row.get("tag", "")
    if type(size) is not int or size < 0 or not isinstance(path, str) or not isinstance(tag, str):
        raise ValueError(row)
    sums = {name: str(row[name]).lower() for name in _SUMS if row.get(name) is not None}
    if not all(re.fullmatch(f"[0-9a-f]{{{_SUMS[name]}}}", value) for name, value in sums.items()):
        raise ValueError(row)
    tag = sums.get("sha256") or tag
    return Found(path, size, tag and f"manifest:{tag}", tuple(sums.items()))
