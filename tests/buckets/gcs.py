"""A small Google Cloud Storage (its XML API, which obstore speaks) that can be slow, busy and cut lines."""

from __future__ import annotations

import base64
import hashlib
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 1000
"""Objects that one listing tells."""


@lru_cache(4096)
def md5(content: bytes) -> bytes:
    return hashlib.md5(content).digest()


class Bucket:
    """What the server holds, how it behaves, and what it was asked.

    Attributes:
        name: The bucket's name; any other is not there.
        url: Where the server listens: the value of STORAGE_EMULATOR_HOST.
        objects: Key to content.
        latency: Seconds that every request waits.
        cut: Requests of content that end in the middle, after ``cut_at`` bytes.
        busy: Requests of content, or to write, that are answered with 503.
        answers: Requests of content that are answered; all later ones wait until ``go`` is set.
        composite: Whether the ETag of an object is not its MD5.
        denied: What is answered with 403, of "list", "GET" and "HEAD".
        signed: The Authorization headers that were seen.
        asked: (key, Range header) of every request of content, in order.
    """

    def __init__(self, objects: dict[str, bytes], name: str = "bucket") -> None:
        """Hold these objects."""
        self.name, self.url, self.objects = name, "", objects
        self.latency, self.cut, self.cut_at, self.busy, self.composite = 0.0, 0, 1000, 0, False
        self.answers, self.go = sys.maxsize, threading.Event()
        self.asked: list[tuple[str, str]] = []
        self.denied: tuple[str, ...] = ()
        self.signed: set[str] = set()
        self.listings = 0
        self.lock = threading.Lock()

    def tag(self, content: bytes) -> str:
        digest = md5(content).hex()
        return f'"-{digest[:10]}"' if self.composite else f'"{digest}"'

    def take(self, name: str) -> bool:
        """Use up one of a number of faults."""
        with self.lock:
            left: int = getattr(self, name)
            setattr(self, name, max(0, left - 1))
        return left > 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    bucket: Bucket

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.get("length", str(len(body))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self._send(status, f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode())

    def do_GET(self) -> None:
        time.sleep(self.bucket.latency)
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        self.bucket.signed.add(self.headers.get("Authorization", ""))
        if (self.command if key else "list") in self.bucket.denied:
            return self._error(403, "AccessDenied")
        if bucket != self.bucket.name:
            return self._error(404, "NoSuchBucket")
        if not key:
            return self._list({name: value[0] for name, value in parse_qs(parts.query).items()})
        content = self.bucket.objects.get(key)
        if content is None:
            return self._error(404, "NoSuchKey")
        return self._content(key, content)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        key = unquote(urlsplit(self.path).path).lstrip("/").partition("/")[2]
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.bucket.take("busy"):
            return self._error(503, "SlowDown")
        self.bucket.objects[key] = content
        return self._send(200, ETag=self.bucket.tag(content))

    def _list(self, query: dict[str, str]) -> None:
        self.bucket.listings += 1
        after = query.get("continuation-token", query.get("start-after", ""))
        keys = sorted(k for k in self.bucket.objects if k.startswith(query.get("prefix", "")) and k > after)
        page, more = keys[:PAGE], len(keys) > PAGE
        rows = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-02T03:04:05.000Z</LastModified>"
            f"<ETag>{escape(self.bucket.tag(self.bucket.objects[key]))}</ETag>"
            f"<Size>{len(self.bucket.objects[key])}</Size></Contents>"
            for key in page
        )
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        body = f"<?xml version='1.0'?><ListBucketResult>{token}{rows}</ListBucketResult>"
        self._send(200, body.encode(), Content_Type="application/xml")

    def _content(self, key: str, content: bytes) -> None:
        asked = self.headers.get("Range", "")
        tag = self.bucket.tag(content)
        if self.command == "GET":
            with self.bucket.lock:
                self.bucket.asked.append((key, asked))
                waits = len(self.bucket.asked) > self.bucket.answers
            if waits:
                self.bucket.go.wait()
            if self.bucket.take("busy"):
                return self._error(503, "SlowDown")
        if self.headers.get("If-Match", tag) != tag:
            return self._error(412, "PreconditionFailed")
        more = {"ETag": tag, "Last_Modified": "Fri, 02 Jan 2026 03:04:05 GMT"}
        more["x_goog_hash"] = "md5=" + base64.b64encode(md5(content)).decode()
        status, body = 200, content
        if asked:
            begin, end = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()  # type: ignore[union-attr]
            body = content[int(begin) : int(end) + 1 if end else None]
            more["Content_Range"] = f"bytes {begin}-{int(begin) + len(body) - 1}/{len(content)}"
            status = 206
        if self.command == "GET" and self.bucket.take("cut"):
            self._send(status, body[: self.bucket.cut_at], length=str(len(body)), **more)
            self.wfile.flush()
            self.close_connection = True
            return None
        if self.command == "HEAD":
            more["length"] = str(len(body))
        return self._send(status, body, **more)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that were killed."""


@contextmanager
def serve(objects: dict[str, bytes], name: str = "bucket") -> Iterator[Bucket]:
    """Serve a bucket on this machine while the block runs."""
    bucket = Bucket(objects, name)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"bucket": bucket}))
    bucket.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield bucket
    finally:
        bucket.go.set()
        server.shutdown()
        server.server_close()
        thread.join()
