"""Buckets: ``s3://`` and ``gs://``, through obstore (one small extra for both clouds)."""

from __future__ import annotations

import importlib
import importlib.util
import mimetypes
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from imgtool import files
from imgtool.buckets import Denied, Found, Interrupted, Offline, account, manifest
from imgtool.buckets.client import Client
from imgtool.buckets.patience import patiently
from imgtool.errors import USAGE, ImgtoolError

RETRIES = 5
"""Times that a listing or an upload is tried again; reads are tried again by who asked for them."""

_CHUNK = 1 << 16
"""Bytes at most that a broken connection loses of what had come."""

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MD5 = re.compile(r'"([0-9a-f]{32})"')
_PARTS = re.compile(r'"([0-9a-f]{32}-[1-9]\d{0,4})"')
_ODD = re.compile(r'invalid path: [^"]*Path "(.*?)"', re.DOTALL)
_CODE = re.compile(r"<Code>(\w+)</Code>")
_PASSING = re.compile(r"status: (408|429|5\d\d)|kind: (Connect|Timeout|Interrupted|Request|Unknown),")
_REFUSED = re.compile(r"status: 40[13]\b")
_ELSEWHERE = re.compile("redirect|AuthorizationHeaderMalformed|IllegalLocationConstraint", re.IGNORECASE)
_SIGN_IN = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS",
}
_ENDPOINT = {"s3": "AWS_ENDPOINT_URL", "gs": "STORAGE_EMULATOR_HOST"}


def open(url: str) -> Store:
    """Return the place that ``s3://bucket/path`` or ``gs://bucket/path`` names; nothing is asked of it yet.

    Raises:
        ImgtoolError: Code 2: no bucket can have that name, or obstore is not installed.
    """
    if importlib.util.find_spec("obstore") is None:
        raise ImgtoolError(f"{url} needs obstore", "pip install 'imgtool[cloud]'", USAGE)
    scheme, _, rest = url.partition("://")
    bucket, _, path = rest.partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise ImgtoolError(f"no bucket can be named {bucket!r}: {url}", "write s3://BUCKET/PATH", USAGE)
    return Store(scheme, bucket, path)


Files = list[Found]


class Store:
    """A folder of a bucket, or a single object: a ``Place``.

    An object whose name ends in a slash is no file but how some tools draw a folder: it is left out.

    Of an object that Google put together from others no MD5 is told, and obstore does not hand on the CRC32C
    that is: only its size is checked, and that it did not change meanwhile.
    """

    def __init__(self, scheme: str, bucket: str, path: str) -> None:
        """Remember where, and ask nothing.

        Args:
            scheme: "s3" or "gs".
            bucket: The bucket's name.
            path: Leading part of the objects' names; a slash at its end says that it is a folder.
        """
        self.scheme, self.bucket, self.prefix = scheme, bucket, path.strip("/")
        self._folder = not self.prefix or path.endswith("/")
        self._single = False

    @cached_property
    def _options(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return account.s3(self.bucket) if self.scheme == "s3" else account.gs()

    def _client(self, retries: int) -> Any:
        config, client = self._options
        waits = {"connect_timeout": timedelta(seconds=10), "read_timeout": timedelta(seconds=60)}
        kind = importlib.import_module("obstore.store")
        make = kind.S3Store if self.scheme == "s3" else kind.GCSStore
        provider = {"credential_provider": config["by"]} if "by" in config else {}
        try:
            return make(
                self.bucket,
                config={name: value for name, value in config.items() if name != "by"},
                client_options=client | waits | {"timeout": timedelta(minutes=10)},
                retry_config={"max_retries": retries, "retry_timeout": timedelta(seconds=30)},
                **provider,
            )
        except _faults() as fault:
            raise ImgtoolError(_first(fault), _SIGN_IN[self.scheme]) from None

    @cached_property
    def _hasty(self) -> Any:
        return self._client(0)

    @cached_property
    def _patient(self) -> Any:
        return self._client(RETRIES)

    def _key(self, path: str) -> str:
        return self.prefix if self._single else "/".join(filter(None, (self.prefix, path)))

    def url(self, path: str) -> str:
        """Return the URL of a path below; of a single object, once it was listed, its own."""
        return f"{self.scheme}://{self.bucket}/{self._key(path)}"

    def list(self) -> Files:
        """Return every object below, by name; one where the URL is an object; [] where there is nothing."""
        denied: Denied | None = None
        try:
            rows = self._rows()
        except Denied as fault:  # objects may be read in many a bucket that may not be listed
            rows, denied = [], fault
        if not rows and not self._folder:
            rows = self._one()
        if denied and not rows:
            raise denied
        return sorted(rows, key=lambda found: found.path)

    def _rows(self) -> Files:
        cut = len(self.prefix) + 1 if self.prefix else 0
        try:
            pages = self._patient.list(self.prefix or None, chunk_size=1000)
            rows = [_found(row, row["path"][cut:]) for page in pages for row in page]
        except _faults() as fault:
            odd = _ODD.search(str(fault))
            if odd:
                return self._rows_with(odd[1])
            raise self._explain(
                fault, f"{self.scheme}://{self.bucket}/{self.prefix}", passing=False
            ) from None
        return self._without_drawn([found for found in rows if found.path])

    def _rows_with(self, odd: str) -> Files:
        """List what obstore refuses to for the sake of one name, such as "a//b"."""
        cut = len(self.prefix) + 1 if self.prefix else 0
        try:
            rows = list(self._told())
        except LookupError:
            what = f"{self.scheme}://{self.bucket}/{odd} is no path, and obstore lists nothing beside it"
            hint = (
                "rename that object, name a folder without it, or sign in by keys, not by a role or account"
            )
            raise ImgtoolError(what, hint) from None
        return [
            _found(row, row["path"][cut:]) for row in rows if row["size"] or not row["path"].endswith("/")
        ]

    def _told(self) -> Iterator[dict[str, Any]]:
        """Give the objects as the store's own XML tells them (ListObjectsV2)."""
        client, more = Client(), {"list-type": "2"} | ({"prefix": f"{self.prefix}/"} if self.prefix else {})
        while True:
            config = self._options[0]
            address, headers = account.listing(self.scheme, self.bucket, config, more)
            page = ElementTree.fromstring(patiently(lambda: self._page(client, address, headers)))  # noqa: B023
            for each in page.iterfind("{*}Contents"):
                told = {
                    name: each.findtext(f"{{*}}{name}", "")
                    for name in ("Key", "ETag", "LastModified", "Size")
                }
                yield {
                    "path": told["Key"],
                    "size": int(told["Size"]),
                    "e_tag": told["ETag"],
                    "last_modified": datetime.fromisoformat(told["LastModified"]),
                }
            token = page.findtext("{*}NextContinuationToken")
            if not token:
                return
            more["continuation-token"] = token

    def _page(self, client: Client, address: str, headers: dict[str, str]) -> bytes:
        with client.ask("GET", address, headers) as reply:
            if reply.status != 200:
                raise reply.refusal(f"{self.scheme}://{self.bucket}/{self.prefix}")
            return reply.read()

    def _without_drawn(self, rows: Files) -> Files:
        """Leave out empty objects that stand for folders; their names come without the slash at the end."""
        folders = {str(parent) for found in rows for parent in manifest.above(found.path)}
        rows = [found for found in rows if found.size or found.path not in folders]
        empty = [found for found in rows if not found.size]
        with ThreadPoolExecutor(32) as threads:
            real = dict(zip(empty, threads.map(self._is_there, empty), strict=True))
        return [found for found in rows if real.get(found, True)]

    def _is_there(self, found: Found) -> bool:
        try:
            self._patient.head(self._key(found.path))
        except FileNotFoundError:
            return False
        except _faults() as fault:
            raise self._explain(fault, self.url(found.path), passing=False) from None
        return True

    def _one(self) -> Files:
        try:
            row = self._patient.head(self.prefix)
        except FileNotFoundError:
            return []
        except _faults() as fault:
            explained = self._explain(fault, self.url(""), passing=False)
            if isinstance(explained, Denied):
                return []
            raise explained from None
        self._single = True
        return [_found(row, self.prefix.rpartition("/")[2])]

    def read(self, found: Found, begin: int, end: int) -> bytes:
        """Return bytes ``begin`` to ``end`` (excluded) of an object, in one request; raises as ``Place``."""
        if end <= begin:
            return b""
        data = self._get(found, {} if (begin, end) == (0, found.size) else {"range": (begin, end)})
        if len(data) != end - begin:
            raise Interrupted(f"{self.url(found.path)} sent {len(data)} bytes of {end - begin}", b"")
        return data

    def _get(self, found: Found, options: dict[str, object]) -> bytes:
        if found.tag.startswith('"'):
            options["if_match"] = found.tag
        got: list[bytes] = []
        try:
            answer = self._hasty.get(self._key(found.path), options=options)
            got.extend(answer.stream(min_chunk_size=_CHUNK))
        except _faults() as fault:
            explained = self._explain(fault, self.url(found.path))
            if isinstance(explained, Interrupted):
                explained.got = b"".join(got)
            raise explained from None
        return b"".join(got)

    def whole(self, found: Found) -> bytes:
        """Return all of an object in one request; raises as ``read``."""
        return self.read(found, 0, found.size) if found.size >= 0 else self._get(found, {})

    def write(self, source: Path, path: str) -> None:
        """Send a file of this machine, to a path below; a large one goes in parts and appears when whole.

        Raises:
            Interrupted: The connection broke, or the server was too busy: sending again may help.
            ImgtoolError: There is no such file; no permission.
        """
        kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
        try:
            source.stat()
        except OSError as fault:
            raise files.unreadable(source, fault) from None
        try:
            self._patient.put(self._key(path), source, attributes={"Content-Type": kind})
        except _faults() as fault:
            raise self._explain(fault, self.url(path), verb="write") from None

    def _explain(
        self, fault: Exception, url: str, passing: bool = True, verb: str = "read"
    ) -> Interrupted | ImgtoolError:
        """Say in plain words what went wrong; ``passing`` leaves to the caller what may pass."""
        text = str(fault)
        code = (_CODE.findall(text) or [""])[0]
        if code == "NoSuchBucket" or "bucket does not exist" in text:
            return ImgtoolError(f"no such bucket: {self.scheme}://{self.bucket}", "check the name", USAGE)
        if isinstance(fault, FileNotFoundError):
            return ImgtoolError(f"no such file: {url}", "it may have been removed since it was listed")
        if type(fault).__name__ == "PreconditionError":
            return ImgtoolError(f"{url} has changed since it was listed", "run it again")
        if "169.254.169.254" in text or "token request" in text:
            skip = "AWS_SKIP_SIGNATURE" if self.scheme == "s3" else "GOOGLE_SKIP_SIGNATURE"
            hint = f"{_SIGN_IN[self.scheme]}; for a public bucket {skip}=true"
            return Denied(f"this machine has no credentials for {url}", hint)
        if _REFUSED.search(text) or "Token" in code:
            return self._denied(url, verb, code)
        if _PASSING.search(text):
            what = f"no answer from {url}: {_reason(text)}"
            return (
                Interrupted(what)
                if passing
                else Offline(what, f"check the network, and {_ENDPOINT[self.scheme]} if it is set")
            )
        hint = "set AWS_REGION to the region of the bucket" if _ELSEWHERE.search(text) else ""
        return ImgtoolError(f"cannot {verb} {url}: {_first(fault)}", hint)

    def _denied(self, url: str, verb: str, code: str) -> ImgtoolError:
        if self._options[0].get("skip_signature"):
            return Denied(f"no permission to {verb} {url} without credentials", _SIGN_IN[self.scheme])
        what = f"no permission to {verb} {url} with the credentials given" + (f" ({code})" if code else "")
        return Denied(what, "ask who owns the bucket, or " + _SIGN_IN[self.scheme])


def _faults() -> tuple[type[Exception], ...]:
    base: type[Exception] = importlib.import_module("obstore.exceptions").BaseError
    return base, OSError, ValueError


def _first(fault: Exception) -> str:
    return str(fault).partition("\n\nDebug source")[0]


def _reason(text: str) -> str:
    """Return in a few words why a connection failed."""
    status = re.search(r"status code: (\d+ [A-Za-z ]+)", text)
    if status:
        return status[1].strip()
    words = {
        "dns error": "the name of the host is not known",
        "ConnectionRefused": "the connection was refused",
        "certificate": "its certificate is not trusted (AWS_CA_BUNDLE, SSL_CERT_FILE)",
        "TimedOut": "no connection in time",
        "kind: Timeout": "no answer in time",
        "kind: Interrupted": "the connection broke",
    }
    return next((said for mark, said in words.items() if mark in text), "the connection failed")


def _found(row: Any, path: str) -> Found:
    tag = row["e_tag"] or ""
    whole, parts = _MD5.fullmatch(tag), _PARTS.fullmatch(tag)
    told = (("etag-md5", whole[1]),) if whole else (("etag-parts", parts[1]),) if parts else ()
    return Found(path, row["size"], tag or f"{row['last_modified'].isoformat()} {row['size']}", told)
