"""What is asked and what is answered, and how a photo is taken out of a request's body."""

from __future__ import annotations

import base64
import json
import re
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

NAME = f"photo-{secrets.token_hex(8)}"
"""What a request's photo is called within: a message that holds it concerns that photo. Replies say PHOTO."""

PHOTO = "photo"

FORM = "a form holds one file and nothing else; settings belong into the query"

_BOUNDARY = re.compile(r'boundary="?([^";,]{1,70})"?', re.IGNORECASE)
_LONGEST_HEAD = 4096
_LENGTH = re.compile(r"[0-9]{1,15}")
_SPACE = rb"[ \t\r\n]*"
# One key, whose value needs no more of JSON's escapes than those below: nothing is built of what is hostile.
_JSON = re.compile(
    _SPACE.join(
        [rb"", rb"\{", rb'"image"', rb":", rb'"(?:data:[^",]{0,200},)?([A-Za-z0-9+/=\\]*)"', rb"\}", rb""]
    )
)
_ESCAPED = {rb"\/": b"/", rb"\u002B": b"+", rb"\u002b": b"+", rb"\u002F": b"/", rb"\u002f": b"/",
            rb"\u003D": b"=", rb"\u003d": b"="}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        max_mb: Largest body in 10^6 bytes.
        max_megapixels: Largest photo in 10^6 pixels.
        waiting: Requests that may wait while one is worked on.
        seconds: Longest time from a request's arrival to its reply.
    """

    max_mb: float = 25.0
    max_megapixels: float = 36.0
    waiting: int = 8
    seconds: float = 300.0

    @property
    def bytes(self) -> int:
        """Largest body in bytes."""
        return int(self.max_mb * 1e6)


@dataclass(frozen=True)
class Request:
    """What is asked.

    Attributes:
        method: "GET", "POST", ...
        path: Such as "/api/deblur", without the query.
        query: Its parameters, decoded.
        headers: By name, in any case.
        body: What was sent, or what reads it: it is then read when its turn has come.
    """

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | Callable[[], bytes] = b""

    def content(self) -> bytes:
        """Return the body, read now where it was not."""
        return self.body() if callable(self.body) else self.body

    def header(self, name: str) -> str:
        """Return a header whatever the case of its name, "" where it is not there."""
        wanted = name.lower()
        return next((value for key, value in self.headers.items() if key.lower() == wanted), "")


@dataclass(frozen=True)
class Reply:
    """What is answered.

    Attributes:
        status: Such as 200.
        body: Its content.
        mimetype: What that is.
        headers: Further ones, in ASCII.
    """

    status: int
    body: bytes
    mimetype: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, record: Mapping[str, object], status: int = 200, **headers: str) -> Reply:
        """Return JSON, in which NAME is PHOTO; underscores in the names of headers stand for hyphens."""
        from imgtool.console import plain

        named = {name.replace("_", "-"): value for name, value in headers.items()}
        text = json.dumps(plain(record), allow_nan=False).replace(NAME, PHOTO)
        return cls(status, text.encode(), headers=named)


class Refused(Exception):
    """A request that is not served.

    Args:
        status: Of the reply.
        what: What is wrong with it, in one line.
        hint: What to do about it.
        headers: Of the reply.
    """

    def __init__(self, status: int, what: str, hint: str = "", **headers: str) -> None:
        """Keep what the reply says."""
        super().__init__(what)
        self.status, self.what, self.hint, self.headers = status, what, hint, headers

    def reply(self) -> Reply:
        """Return it as JSON, "error" and "hint" as on the command line."""
        return Reply.of({"error": self.what, "hint": self.hint}, self.status, **self.headers)


def length(told: str) -> int:
    """Return the value of a header Content-Length, 0 where there is none.

    Raises:
        Refused: 400, it is no number, or one of more digits than any body has bytes for.
    """
    if told and not _LENGTH.fullmatch(told):
        raise Refused(400, "Content-Length is not a number of bytes", "leave it to the library that sends")
    return int(told or 0)


def check_length(request: Request, limits: Limits) -> None:
    """Refuse (413) a body that is too large, or says that it is; 400 where it does not say it in digits."""
    here = 0 if callable(request.body) else len(request.body)
    if max(here, length(request.header("content-length"))) > limits.bytes:
        raise too_large(limits)


def too_large(limits: Limits) -> Refused:
    """Return the refusal of a body that is too large."""
    return Refused(413, f"the request is larger than {limits.max_mb:g} MB", "send a smaller photo, or JPEG")


def photo(request: Request, limits: Limits) -> bytes:
    """Return the photo's file: the body, the one file of a form, or "image" of JSON in base64.

    Raises:
        Refused: 400, there is none, or not one; 413, the body is larger than was said.
    """
    kind, body = request.header("content-type"), request.content()
    plain = kind.partition(";")[0].strip().lower()
    if len(body) > limits.bytes:
        raise too_large(limits)
    if not body:
        raise Refused(400, "the request has no body", "send the bytes of a photo")
    if plain == "multipart/form-data":
        found = _of_form(body, kind)
    elif plain == "application/json":
        found = _of_json(body)
    else:
        found = body
    if not found:
        raise Refused(400, f"the {PHOTO} is empty", "send the bytes of a photo")
    return found


def _of_json(body: bytes) -> bytes:
    """Return the file in an object of the one key "image", without a general parser.

    Of ``[[],[],...]`` a parser makes 25 times its bytes before anybody can say that it is not what is wanted.
    """
    match = _JSON.fullmatch(body)
    if match:
        text = match[1]
        for escaped, plain in _ESCAPED.items() if b"\\" in text else ():
            text = text.replace(escaped, plain)
        with suppress(ValueError):
            return base64.b64decode(text, validate=True)
    what = "the body is not an object of JSON with the one key image, whose value is base64"
    raise Refused(400, what, 'send {"image": "<the file in base64>"}; settings belong into the query')


def _of_form(body: bytes, kind: str) -> bytes:
    """Return the one file of a form (RFC 7578); the names that it gives to files and fields are not used."""
    match = _BOUNDARY.search(kind)
    if not match:
        raise Refused(400, "the form names no boundary", FORM)
    mark = b"--" + match[1].strip().encode("latin-1", "replace")
    start = 0 if body.startswith(mark) else body.find(b"\r\n" + mark) + 2
    first = start + len(mark)
    end = body.find(b"\r\n" + mark, first)
    if (start < 2 and not body.startswith(mark)) or end < 0:
        raise Refused(400, "the form is cut short, or its boundary is another", FORM)
    last = end + 2 + len(mark)
    if body[last : last + 2] != b"--":
        raise Refused(400, "the form has several parts", FORM)
    split = body.find(b"\r\n\r\n", first, min(end, first + _LONGEST_HEAD))
    if split < 0 or b"filename" not in body[first:split].lower():
        raise Refused(400, "the form holds no file", FORM)
    return body[split + 4 : end]
