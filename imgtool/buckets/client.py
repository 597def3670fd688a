"""HTTP as reading many files needs it: connections that are kept, redirects, proxies, faults in plain words.

It stands on the standard library, so that an https:// address can be read with the plain install.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import importlib
import importlib.util
import socket
import ssl
import threading
import time
import urllib.request
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import IO
from urllib.parse import quote, unquote, urljoin, urlsplit

from imgtool.buckets import Interrupted, Offline
from imgtool.errors import USAGE, ImgtoolError

TIMEOUT = 30.0
"""Seconds without a byte after which a connection is given up."""
PATIENCE = 30.0
"""Seconds at most that a server's Retry-After is followed before the request counts as interrupted."""

_REDIRECTS = 10
_MOVED = (301, 302, 303, 307, 308)
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_CHUNK = 1 << 16
_SAFE = "/%:@!$&'()*+,;=~?#[]"

Pool = dict[tuple[str, str], list[http.client.HTTPConnection]]


def basic(user: str) -> dict[str, str]:
    """Return the header that signs in as ``NAME:PASSWORD``, which may be percent-encoded.

    >>> basic("ann:s%40crt")
    {'Authorization': 'Basic YW5uOnNAY3J0'}
    """
    return {"Authorization": "Basic " + base64.b64encode(unquote(user).encode()).decode()}


class Reply:
    """What a server answered.

    Attributes:
        status: The status code.
        headers: The headers.
        url: What answered, after redirects.
    """

    def __init__(self, response: http.client.HTTPResponse, url: str) -> None:
        """Take an answer whose body is not read yet."""
        self._response, self.url = response, url
        self.status, self.headers = response.status, response.headers

    @property
    def tag(self) -> str:
        """What changes with the content: the ETag, or the date where there is none; "" without either."""
        return (self.headers.get("ETag") or self.headers.get("Last-Modified") or "").removeprefix("W/")

    @property
    def size(self) -> int:
        """Bytes of the whole file, though only a part of it may come; -1 where that is not told."""
        said = self.headers.get("Content-Range", "").rpartition("/")[2]
        if self.status != 206:
            said = self.headers.get("Content-Length", "")
        return int(said) if said.isdecimal() else -1

    def read(self, most: int | None = None) -> bytes:
        """Return the body.

        Args:
            most: Bytes after which no more is read: of a body that is longer, more than these are returned.

        Raises:
            Interrupted: It broke off; what had come is with it.
        """
        got = bytearray()
        try:
            for chunk in self._chunks():
                got += chunk
                if most is not None and len(got) > most:
                    break
        except Interrupted as fault:
            raise Interrupted(str(fault), bytes(got)) from None
        return bytes(got)

    def copy(self, target: IO[bytes]) -> None:
        """Write the body into a file; raises as ``read``."""
        for chunk in self._chunks():
            target.write(chunk)

    def _chunks(self) -> Iterator[bytes]:
        host = urlsplit(self.url).netloc
        while True:
            try:
                chunk = self._response.read(_CHUNK)
            except (http.client.HTTPException, OSError) as fault:
                raise _trouble(host, fault) from None
            if not chunk:
                break
            yield chunk
        if self._response.length:  # bytes that were promised
            raise Interrupted(f"the connection to {host} broke off")

    def refusal(self, url: str) -> Interrupted | ImgtoolError:
        """Return what a status other than success means; waits where the server asks for it.

        Args:
            url: What was asked for, as people may see it.
        """
        if self.status in _BUSY:
            time.sleep(min(_seconds(self.headers.get("Retry-After", "")), PATIENCE))
            return Interrupted(f"{url}: the server is too busy ({self.status} {self._response.reason})")
        if self.status in (401, 403):
            hint = "sign in by https://NAME:PASSWORD@…, or ask for a new address if it has run out"
            return ImgtoolError(f"no permission to read {url} ({self.status})", hint)
        if self.status in (404, 410):
            return ImgtoolError(f"no such file: {url}", "check the address")
        if self.status in (412, 416):
            return ImgtoolError(f"{url} has changed since it was listed", "run it again")
        return ImgtoolError(f"cannot read {url}: the server says {self.status} {self._response.reason}")


class Client:
    """Connections to servers, kept and used again; may be asked from many threads at once."""

    def __init__(self) -> None:
        """Connect to nothing yet."""
        self._idle: Pool = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _close, self._idle)

    @contextmanager
    def ask(self, method: str, url: str, headers: Mapping[str, str]) -> Iterator[Reply]:
        """Send a request, follow redirects, and give the answer, whatever its status.

        Args:
            method: GET or HEAD.
            url: The address, percent-encoded.
            headers: Further headers; Authorization goes to no other server that is redirected to.

        Raises:
            Interrupted: The connection failed, or nobody answered in time.
            Offline: No such host, which may be for want of a network.
            ImgtoolError: A certificate that is not trusted; redirects without end, out of encryption or to
                what is no address.
        """
        first = _origin(url)
        for _ in range(_REDIRECTS):
            own = _origin(url) == first
            sent = {name: value for name, value in headers.items() if own or name != "Authorization"}
            connection, response = self._send(method, url, {"Accept-Encoding": "identity", **sent})
            moved = response.headers.get("Location") if response.status in _MOVED else None
            try:
                if moved is None:
                    yield Reply(response, url)
                    return
            finally:
                self._give_back(_origin(url), connection, response)
            url = _led(url, moved)
        raise ImgtoolError(f"{_plain(url)} leads nowhere but on", "the server redirects without end")

    def _send(
        self, method: str, url: str, headers: Mapping[str, str]
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        origin = _origin(url)
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        through = self._proxy(*origin) if origin[0] == "http" else ""
        if through:
            target = f"http://{origin[1]}{target}"
        while True:
            with self._lock:
                idle = self._idle.get(origin)
                kept = idle.pop() if idle else None
            connection = kept or self._connect(*origin)
            try:
                connection.request(method, target, headers=dict(headers) | _proxy_user(through))
                return connection, connection.getresponse()
            except (http.client.HTTPException, OSError, UnicodeError) as fault:
                connection.close()
                if kept and not isinstance(fault, TimeoutError):
                    continue  # the server had ended a connection that was kept
                raise _trouble(origin[1], fault) from None

    def _connect(self, scheme: str, netloc: str) -> http.client.HTTPConnection:
        proxy = self._proxy(scheme, netloc)
        host = urlsplit(proxy).netloc.rpartition("@")[2] if proxy else netloc
        if scheme == "http":
            return http.client.HTTPConnection(host, timeout=TIMEOUT)
        connection = http.client.HTTPSConnection(host, timeout=TIMEOUT, context=self._trust)
        if proxy:
            connection.set_tunnel(netloc, headers=_proxy_user(proxy))
        return connection

    @cached_property
    def _trust(self) -> ssl.SSLContext:
        paths = ssl.get_default_verify_paths()
        if not (paths.cafile or paths.capath) and importlib.util.find_spec("certifi"):
            return ssl.create_default_context(cafile=importlib.import_module("certifi").where())
        return ssl.create_default_context()

    @staticmethod
    def _proxy(scheme: str, netloc: str) -> str:
        host = urlsplit(f"//{netloc}").hostname or ""
        proxy = urllib.request.getproxies().get(scheme, "")
        if not proxy or urllib.request.proxy_bypass(host):
            return ""
        return proxy if "://" in proxy else f"http://{proxy}"

    def _give_back(
        self,
        origin: tuple[str, str],
        connection: http.client.HTTPConnection,
        response: http.client.HTTPResponse,
    ) -> None:
        """Keep a connection whose answer was read, or is short enough to be read now; close any other."""
        try:
            if response.length is not None and response.length < _CHUNK:
                response.read()
        except (http.client.HTTPException, OSError):
            pass
        if response.isclosed() and not response.will_close:
            with self._lock:
                self._idle.setdefault(origin, []).append(connection)
        else:
            response.close()
            connection.close()


def _close(idle: Pool) -> None:
    for connections in idle.values():
        for connection in connections:
            connection.close()


def _proxy_user(proxy: str) -> dict[str, str]:
    user, at, _ = urlsplit(proxy).netloc.rpartition("@")
    return {"Proxy-Authorization": basic(user)["Authorization"]} if at else {}


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.rpartition("@")[2]


def _led(before: str, moved: str) -> str:
    """Return the address that a redirect leads to."""
    try:
        url = urljoin(before, quote(moved, safe=_SAFE))
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ImgtoolError(f"{_plain(before)} leads on to {_plain(moved)}, which cannot be followed")
    if (urlsplit(before).scheme, parts.scheme) == ("https", "http"):
        what = f"{_plain(before)} leads on to {_plain(url)}, which is not encrypted"
        raise ImgtoolError(what, "name that address where it may be trusted")
    return url


def _plain(url: str) -> str:
    return url.partition("?")[0]


def _seconds(text: str) -> float:
    """Return what a Retry-After asks for: a number of seconds, or a date; 0 for anything else."""
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def _trouble(host: str, fault: Exception) -> Interrupted | ImgtoolError:
    if isinstance(fault, ssl.SSLCertVerificationError):
        hint = "SSL_CERT_FILE names the certificates of an authority of your own"
        return ImgtoolError(f"the certificate of {host} is not trusted: {fault.verify_message}", hint)
    if isinstance(fault, ssl.SSLError) and not isinstance(fault, ssl.SSLEOFError):
        return ImgtoolError(f"no secure connection to {host}: {fault.reason}", "does it want http://?")
    unknown = isinstance(fault, socket.gaierror) and fault.errno == socket.EAI_NONAME
    if unknown or isinstance(fault, UnicodeError):  # which a name with an empty or a long part is
        return Offline(f"no such host: {host}", "check the address, and the network", USAGE)
    if isinstance(fault, http.client.InvalidURL):
        return ImgtoolError(f"{host} cannot be asked: {fault}", "check the address", USAGE)
    if isinstance(fault, TimeoutError):
        return Interrupted(f"{host} did not answer within {TIMEOUT:.0f} s")
    if isinstance(fault, ConnectionRefusedError):
        return Interrupted(f"{host} refused the connection")
    if isinstance(fault, OSError) and fault.strerror and not isinstance(fault, ConnectionError):
        return Interrupted(f"no connection to {host}: {fault.strerror.lower()}")
    return Interrupted(f"the connection to {host} broke off")
