"""The waitress that serves in a container: its limits, health under load, and an orderly end."""

from __future__ import annotations

import threading
import time
from typing import Any

import waitress
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.server import BaseWSGIServer

from imgtool.serve import wsgi
from imgtool.serve.service import Service

PORT = 8080
SPARE = 3
"""Threads for health and for what is refused, beside those of the requests that are worked on and wait."""

SLACK = 2
"""Times the limit up to which a body is received, so that its sender hears why it is refused; where one is
larger still, the connection ends."""

GRACE = 8.0
"""Seconds in which work in progress is finished once the service ends: Docker kills after 10."""

CONNECTIONS, IDLE = 64, 60
"""Connections at a time, and seconds after which one is closed on which nothing moves."""

_HEAD = 1 << 14  # bytes of the headers, the query among them
_IN_MEMORY = 1 << 18  # bytes of a body or a reply, the rest of which lies in a temporary file
_NEVER = 1 << 40  # bytes of a reply from which on a thread would wait for a slow reader
_PATIENCE = 0.5


class _Parser(HTTPRequestParser):  # type: ignore[misc]
    """Receives no body but of a photo that bears the token; the connection then ends with the reply."""

    route, token = "", ""
    body_rcv: Any = None

    def parse_header(self, header_plus: bytes) -> None:
        """Read the header; the body that it announces is taken only where it will be worked on."""
        try:
            super().parse_header(header_plus)
        except ValueError:  # a length of thousands of digits
            raise ParsingError("the header cannot be read") from None
        wanted = self.command == "POST" and self.path.rstrip("/") == self.route
        bears = not self.token or wsgi.bears(self.headers.get("AUTHORIZATION", ""), self.token)
        if self.body_rcv is not None and not (wanted and bears):
            self.body_rcv, self.content_length, self.expect_continue = None, 0, False
            self.headers["CONNECTION"] = "close"


class Server:
    """A service behind waitress, listening from now on.

    Args:
        service: The service.
        token: What requests must bear, "" for nothing.
        listen: Address and port, 0 for any that is free.
    """

    def __init__(self, service: Service, token: str = "", listen: str = f"*:{PORT}") -> None:
        """Listen, but answer nothing yet."""
        self._service = service
        self._map: dict[int, Any] = {}
        try:
            self._server = waitress.create_server(
                wsgi.of(service, token),
                self._map,
                listen=listen,
                threads=service.places + SPARE,
                ident="imgtool",
                connection_limit=CONNECTIONS,
                channel_timeout=IDLE,
                cleanup_interval=IDLE // 4,
                max_request_header_size=_HEAD,
                max_request_body_size=SLACK * service.limits.bytes,
                inbuf_overflow=_IN_MEMORY,
                outbuf_overflow=_IN_MEMORY,
                outbuf_high_watermark=_NEVER,
            )
        except (OSError, ValueError):
            wasyncore.close_all(self._map)
            raise
        parser = type("Parser", (_Parser,), {"route": service.route, "token": token})
        channel = type("Channel", (HTTPChannel,), {"parser_class": parser})
        for each in self._all(BaseWSGIServer):
            each.channel_class = channel

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._all(BaseWSGIServer)[0].effective_port)

    def run(self, ending: threading.Event) -> bool:
        """Serve until an event is set; then listen no more, refuse what waits, and finish what is begun.

        Returns:
            Whether all replies are sent; where work takes longer than GRACE, not.
        """
        while not ending.is_set():
            self._turn()
        for each in self._all(BaseWSGIServer):
            wasyncore.dispatcher.close(each)  # its own would close what wakes this loop, too
        self._service.close()
        until = time.monotonic() + GRACE
        while self._busy() and time.monotonic() < until:
            self._turn()
        done = not self._busy()
        self._server.task_dispatcher.shutdown(timeout=_PATIENCE)
        wasyncore.close_all(self._map)
        return done

    def _turn(self) -> None:
        wasyncore.loop(_PATIENCE, use_poll=True, map=self._map, count=1)

    def _all(self, kind: type) -> list[Any]:
        return [each for each in self._map.values() if isinstance(each, kind)]

    def _busy(self) -> bool:
        return any(each.requests or each.total_outbufs_len for each in self._all(HTTPChannel))
