"""A service for WSGI servers (PEP 3333), and the waitress that runs it in a container."""

from __future__ import annotations

import hmac
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from imgtool.errors import DONE, ImgtoolError
from imgtool.serve.request import Refused, Reply, Request, check_length, too_large
from imgtool.serve.service import Service

TOKEN = "IMGTOOL_TOKEN"
"""The variable of the environment that holds the token that requests must bear, where there is one."""

PORT, THREADS, MOST_FIELDS = 8080, 4, 50
HEALTH = "/api/health"
SLACK = 2
"""Times the limit up to which a body is received, so that its sender hears why it is refused; where one is
larger still, the connection ends."""

Environ = dict[str, Any]
Start = Callable[..., Any]
Application = Callable[[Environ, Start], Iterable[bytes]]


def application(folder: Path | str = ".") -> Application:
    """Return the WSGI application of a folder that ``imgtool export`` wrote; its network is loaded.

    Raises:
        ImgtoolError: As ``Service.of`` and ``Service.load``.
    """
    return of(_loaded(Path(folder)), os.environ.get(TOKEN, ""))


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
    """Return what a WSGI server was asked; the body is read once the rest is in order.

    Raises:
        Refused: 400, 401 or 413.
    """
    path = environ.get("PATH_INFO", "")
    if token and path != HEALTH:
        _check_token(environ.get("HTTP_AUTHORIZATION", ""), token)
    headers = {
        name[5:].replace("_", "-"): value for name, value in environ.items() if name.startswith("HTTP_")
    }
    headers["content-type"] = environ.get("CONTENT_TYPE", "")
    headers["content-length"] = environ.get("CONTENT_LENGTH", "")
    try:
        query = dict(parse_qsl(environ.get("QUERY_STRING", ""), True, max_num_fields=MOST_FIELDS))
    except ValueError:
        raise Refused(400, "the query has too many parameters", f"give at most {MOST_FIELDS}") from None
    request = Request(environ.get("REQUEST_METHOD", ""), path, query, headers)
    check_length(request, service.limits)
    return Request(request.method, path, query, headers, _body(environ, service))


def _body(environ: Environ, service: Service) -> bytes:
    told, most = environ.get("CONTENT_LENGTH", ""), service.limits.bytes
    if not told.isdecimal() and not environ.get("wsgi.input_terminated"):
        return b""
    body: bytes = environ["wsgi.input"].read(int(told) if told.isdecimal() else most + 1)
    if len(body) > most:
        raise too_large(service.limits)
    return body


def _check_token(given: str, token: str) -> None:
    kind, _, word = given.partition(" ")
    same = hmac.compare_digest(word.strip().encode("utf-8", "replace"), token.encode())
    if not same or kind.lower() != "bearer":
        hint = "send the header Authorization: Bearer TOKEN"
        raise Refused(401, "the request bears no valid token", hint, WWW_Authenticate="Bearer")


def _send(reply: Reply, start: Start) -> Iterable[bytes]:
    headers = [("Content-Type", reply.mimetype), ("Content-Length", str(len(reply.body)))]
    headers += [("Cache-Control", "no-store"), *reply.headers.items()]
    start(f"{reply.status} {HTTPStatus(reply.status).phrase}", headers)
    return [reply.body]


def main() -> int:
    """Serve the current folder on port 8080 of every address, until ended.

    Returns:
        1 where it cannot be served.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    import waitress

    try:
        served = _loaded(Path())
    except ImgtoolError as fault:
        sys.stderr.write(f"error: {fault.what}\nhint: {fault.hint}\n")
        return fault.code
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(DONE))  # the first process of a container has no other
    waitress.serve(
        of(served, os.environ.get(TOKEN, "")),
        listen=f"*:{PORT}",
        threads=THREADS,
        ident="imgtool",
        max_request_body_size=SLACK * served.limits.bytes,
    )
    return DONE
