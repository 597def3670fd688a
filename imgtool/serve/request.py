"""What is asked and what is answered, and how a photo is taken out of a request's body."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from imgtool.errors import ImgtoolError

NAME = "photo"
"""What messages call the photo of a request."""

FORM = "a form holds one file and nothing else; settings belong into the query"

_BOUNDARY = re.compile(r'boundary="?([^";,]{1,70})"?', re.IGNORECASE)
_LONGEST_HEAD = 4096
_PATH = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?(?:[/\\][^\s/\\:;,'\"]+){2,}")


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        max_mb: Largest body in 10^6 bytes.
        max_megapixels: Largest photo in 10^6 pixels.
        waiting: Requests that may wait while one is worked on.
    """

    max_mb: float = 25.0
    max_megapixels: float = 36.0
    waiting: int = 8

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
        body: What was sent.
    """

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

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
        """Return JSON; underscores in the names of headers stand for hyphens."""
        from imgtool.console import plain

        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return cls(status, json.dumps(plain(record), allow_nan=False).encode(), headers=named)


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

    @classmethod
    def of(cls, fault: ImgtoolError, status: int) -> Refused:
        """Return the refusal that says what a fault says, but for paths of the server."""
        return cls(status, *(_PATH.sub("a file", text) for text in (fault.what, fault.hint)))

    def reply(self) -> Reply:
        """Return it as JSON, "error" and "hint" as on the command line."""
        return Reply.of({"error": self.what, "hint": self.hint}, self.status, **self.headers)


def check_length(request: Request, limits: Limits) -> None:
    """Refuse (413) a body that is too large, or says that it is."""
    told = request.header("content-length")
    if max(len(request.body), int(told) if told.isdecimal() else 0) > limits.bytes:
        raise too_large(limits)


def too_large(limits: Limits) -> Refused:
    """Return the refusal of a body that is too large."""
    return Refused(413, f"the request is larger than {limits.max_mb:g} MB", "send a smaller photo, or JPEG")


def photo(request: Request) -> bytes:
    """Return the photo's file: the body, the one file of a form, or "image" of JSON in base64.

    Raises:
        Refused: 400, there is none, or not one.
    """
    kind = request.header("content-type")
    plain = kind.partition(";")[0].strip().lower()
    if not request.body:
        raise Refused(400, "the request has no body", "send the bytes of a photo")
    if plain == "multipart/form-data":
        found = _of_form(request.body, kind)
    elif plain == "application/json":
        found = _of_json(request.body)
    else:
        found = request.body
    if not found:
        raise Refused(400, f"the {NAME} is empty", "send the bytes of a photo")
    return found


def _of_json(body: bytes) -> bytes:
    hint = 'send {"image": "<the file in base64>"}; settings belong into the query'
    try:
        record = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON", hint) from None
    if not isinstance(record, dict) or set(record) != {"image"} or not isinstance(record["image"], str):
        raise Refused(400, "the JSON is not an object with the one key image", hint)
    text = record["image"]
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(400, "image is not base64", hint) from None


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
