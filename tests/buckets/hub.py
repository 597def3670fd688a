"""Web servers of the tests: one that does what it is told, wrong things too, and one that is a small Hub."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server(ThreadingHTTPServer):
    """Serves files from memory.

    Attributes:
        files: Path with a leading slash to content.
        wrong: Path to what happens instead, one answer after the other: "cut", "busy", "403", "empty",
            "moved:URL", "other" (half of another range than was asked for).
        asked: Method, path with its query, and headers of every request.
        connections: Number of connections that were made.
        token: What requests must bear; "" for nothing.
        large: Files of the Hub that lie in LFS.
    """

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self.files: dict[str, bytes] = {}
        self.wrong: dict[str, list[str]] = {}
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.connections = 0
        self.token = ""
        self.large: set[str] = set()
        super().__init__(("127.0.0.1", 0), handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients break off."""


def _tag(content: bytes) -> str:
    return f'"{hashlib.sha1(content).hexdigest()}"'


class Web(BaseHTTPRequestHandler):
    """HTTP/1.1 with ranges, ETags and index pages."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def setup(self) -> None:
        self.server.connections += 1
        super().setup()

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.asked.append((self.command, self.path, dict(self.headers)))
        path = unquote(urlsplit(self.path).path)
        if not self._goes_wrong(path):
            self._serve(path)

    def _goes_wrong(self, path: str) -> bool:
        wrong = self.server.wrong.get(path) or [""]
        what = wrong.pop(0)
        if what == "cut":
            content = self.server.files[path]
            self._head(200, {"Content-Length": str(len(content)), "ETag": _tag(content)})
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif what == "busy":
            self._answer(503, b"later", {"Retry-After": "0"})
        elif what.startswith("moved:"):
            self._answer(302, b"", {"Location": what[6:]})
        elif what == "empty":
            self._answer(200, b"")
        elif what == "other":
            self._head(206, {"Content-Length": "4", "Content-Range": "bytes 0-3/100"})
            self.wfile.write(b"no")
            self.close_connection = True
        elif what:
            self._answer(int(what), b"no")
        return bool(what)

    def _serve(self, path: str) -> None:
        content = self.server.files.get(path)
        if content is not None:
            self._file(content)
        elif path.endswith("/") and (names := self._names(path)):
            links = "".join(f'<a href="{quote(name)}">{name}</a>\n' for name in names)
            extra = '<a href="../">up</a><a href="?C=N">name</a><a href="https://example.org/x.jpg">far</a>'
            self._answer(200, f"<html>{extra}{links}".encode(), {"Content-Type": "text/html"})
        elif self._names(path + "/"):
            self._answer(301, b"", {"Location": path + "/"})
        else:
            self._answer(404, b"nothing here")

    def _names(self, folder: str) -> list[str]:
        rests = [path[len(folder) :] for path in self.server.files if path.startswith(folder)]
        return sorted({rest.partition("/")[0] + "/" * ("/" in rest) for rest in rests})

    def _file(self, content: bytes) -> None:
        headers = {"ETag": _tag(content), "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range", "")
        if not asked:
            self._answer(200, content, headers)
            return
        begin, _, end = asked.removeprefix("bytes=").partition("-")
        part = content[int(begin) : int(end) + 1]
        said = f"bytes {begin}-{int(begin) + len(part) - 1}/{len(content)}"
        self._answer(206, part, headers | {"Content-Range": said})

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self._head(status, {"Content-Length": str(len(body))} | (headers or {}))
        if self.command != "HEAD":
            self.wfile.write(body)


class Hub(Web):
    """What huggingface_hub asks the Hub for, of one data set: ``files`` are those of ann/photos."""

    def _serve(self, path: str) -> None:
        if self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self._answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/cdn/"):
            self._file(self.server.files[path[4:]])
        elif path.startswith("/api/datasets/ann/gated"):
            self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path.startswith("/api/datasets/ann/photos/revision/"):
            found = path.rpartition("/")[2] in ("main", "v1", COMMIT)
            body = json.dumps({"id": "ann/photos", "sha": COMMIT}).encode()
            self._answer(*(200, body) if found else (404, b"{}", {"X-Error-Code": "RevisionNotFound"}))
        elif path.startswith(f"/api/datasets/ann/photos/tree/{COMMIT}"):
            self._tree(path.removeprefix(f"/api/datasets/ann/photos/tree/{COMMIT}").rstrip("/") + "/")
        elif path.startswith("/datasets/ann/photos/resolve/"):
            self._resolve("/" + path.removeprefix("/datasets/ann/photos/resolve/").partition("/")[2])
        else:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _tree(self, folder: str) -> None:
        rows = [self._row(path) for path in self.server.files if path.startswith(folder)]
        if rows:
            rows.append({"type": "directory", "path": "inner", "oid": "0" * 40, "size": 0})
            self._answer(200, json.dumps(rows).encode())
        else:
            self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def _row(self, path: str) -> dict[str, object]:
        content = self.server.files[path]
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        row: dict[str, object] = {"type": "file", "path": path[1:], "size": len(content), "oid": blob}
        if path in self.server.large:
            sha256 = hashlib.sha256(content).hexdigest()
            row["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
        return row

    def _resolve(self, path: str) -> None:
        if path in self.server.large:
            self._answer(302, b"", {"Location": f"/cdn{quote(path)}", "X-Linked-Etag": '"other"'})
        elif path in self.server.files:
            self._file(self.server.files[path])
        else:
            self._answer(404, b"")

    def do_POST(self) -> None:
        """Answer paths-info."""
        form = self.rfile.read(int(self.headers["Content-Length"])).decode()
        wanted = [
            "/" + unquote(pair[6:].replace("+", " ")) for pair in form.split("&") if pair[:6] == "paths="
        ]
        rows = [self._row(path) for path in wanted if path in self.server.files]
        rows += [
            {"type": "directory", "path": path[1:], "oid": "0" * 40}
            for path in wanted
            if any(name.startswith(path + "/") for name in self.server.files)
        ]
        self._answer(200, json.dumps(rows).encode())


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[None]:
    """Run a server while a block does."""
    thread = threading.Thread(target=lambda: server.serve_forever(0.01), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
