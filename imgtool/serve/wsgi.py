"""A service for WSGI servers (PEP 3333), and what runs it in a container."""

from __future__ import annotations

import hmac
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from imgtool.errors import DONE, FAILED, USAGE, ImgtoolError
from imgtool.serve.request import Refused, Reply, Request, check_length, length
from imgtool.serve.service import Service

if TYPE_CHECKING:
    from imgtool.serve.server import Server

TOKEN = "IMGTOOL_TOKEN"
"""The variable of the environment that holds the token that requests must bear, where there is one."""

MOST_FIELDS = 50
HEALTH = "/api/health"
_LOG = logging.getLogger("imgtool.serve")

Environ = dict[str, Any]
Start = Callable[..., Any]
Application = Callable[[Environ, Start], Iterable[bytes]]


def application(folder: Path | str = ".") -> Application:
    """Return the WSGI application of a folder that ``imgtool export`` wrote; its network is loaded.

    Raises:
        ImgtoolError: As ``token``, ``Service.of`` and ``Service.load``.
    """
    word = token()
    return of(_loaded(Path(folder)), word)


def token() -> str:
    """Return the token that the environment holds, "" where the service is open to everybody.

    Raises:
        ImgtoolError: It is empty: who set it did not mean that; or no header could bear it.
    """
    word = os.environ.get(TOKEN)
    if word is None:
        _LOG.warning("%s is not set: whoever reaches the port may use this service", TOKEN)
        return ""
    if not word.strip():
        raise ImgtoolError(
            f"{TOKEN} is set but empty", "give it a value, or unset it for an open service", USAGE
        )
    if word != word.strip() or not word.isprintable():
        raise ImgtoolError(f"{TOKEN} has spaces or control characters around it", "take them away", USAGE)
    return word


def _loaded(folder: Path) -> Service:
    service = Service.of(folder)
    service.load()
    return service


def of(service: Service, token: str = "") -> Application:
    """Return the WSGI application of a service.

    Args:
        service: The service.
        token: What requests must bear, "" for nothing; health is for everybody.
    """

    def call(environ: Environ, start: Start) -> Iterable[bytes]:
        try:
            reply = service.answer(_request(environ, service, token))
        except Refused as fault:
            reply = fault.reply()
        return _send(reply, start)

    return call


def _request(environ: Environ, service: Service, token: str) -> Request:
    """Return what a WSGI server was asked; the body is read when its turn has come.

    Raises:
        Refused: 400, 401 or 413.
    """
    path = environ.get("PATH_INFO", "")
    if token and path != HEALTH and not bears(environ.get("HTTP_AUTHORIZATION", ""), token):
        hint = "send the header Authorization: Bearer TOKEN"
        raise Refused(401, "the request bears no valid token", hint, WWW_Authenticate="Bearer")
    headers = {
        name[5:].replace("_", "-"): value for name, value in environ.items() if name.startswith("HTTP_")
    }
    headers["content-type"] = environ.get("CONTENT_TYPE", "")
    headers["content-length"] = environ.get("CONTENT_LENGTH", "")
    try:
        query = dict(parse_qsl(environ.get("QUERY_STRING", ""), True, max_num_fields=MOST_FIELDS))
    except ValueError:
        raise Refused(400, "the query has too many parameters", f"give at most {MOST_FIELDS}") from None
    body = partial(_body, environ, service.limits.bytes)
    request = Request(environ.get("REQUEST_METHOD", ""), path, query, headers, body)
    check_length(request, service.limits)
    return request


def _body(environ: Environ, most: int) -> bytes:
    """Return the body, one byte more than is allowed where it is longer and did not say so."""
    told = environ.get("CONTENT_LENGTH", "")
    if not told and not environ.get("wsgi.input_terminated"):
        return b""
    body: bytes = environ["wsgi.input"].read(length(told) if told else most + 1)
    return body


def bears(given: str, token: str) -> bool:
    """Tell whether a header Authorization bears a token, which is sent in UTF-8 and comes as Latin-1."""
    kind, _, word = given.partition(" ")
    same = hmac.compare_digest(word.strip().encode("latin-1", "replace"), token.encode())
    return same and kind.lower() == "bearer"


def _send(reply: Reply, start: Start) -> Iterable[bytes]:
    headers = [("Content-Type", reply.mimetype), ("Content-Length", str(len(reply.body)))]
    headers += [("Cache-Control", "no-store"), *reply.headers.items()]
    start(f"{reply.status} {HTTPStatus(reply.status).phrase}", headers)
    return [reply.body]


def _listening(served: Service, word: str) -> Server:
    """Return the server.

    Raises:
        ImgtoolError: The address is taken or is none, or waitress is not installed.
    """
    listen = os.environ.get("IMGTOOL_LISTEN") or "*:8080"
    try:
        from imgtool.serve.server import Server

        return Server(served, word, listen)
    except ImportError:
        raise ImgtoolError("serving needs waitress", "pip install -r requirements.txt") from None
    except (OSError, ValueError) as fault:
        what = f"cannot listen on {listen}: {fault.strerror if isinstance(fault, OSError) else fault}"
        raise ImgtoolError(what, "set IMGTOOL_LISTEN=ADDRESS:PORT, such as 127.0.0.1:8081") from None


def main() -> int:
    """Serve the current folder on port 8080 of every address, or where IMGTOOL_LISTEN says, until ended.

    Returns:
        0 once it is ended; 1 or 2 where it cannot be served.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # the first process of a container has no other handler
        signal.signal(number, lambda *_: ending.set())
    try:
        word = token()
        served = _loaded(Path())
        server = _listening(served, word)
    except ImgtoolError as fault:
        sys.stderr.write(f"error: {fault.what}\nhint: {fault.hint}\n")
        return fault.code
    _LOG.info("%s of %s is served on port %d", served.route, served.weights.name, server.port)
    if not server.run(ending):
        _LOG.warning("ended with work in progress")
        logging.shutdown()
        os._exit(FAILED)  # else the interpreter would wait for it
    return DONE
