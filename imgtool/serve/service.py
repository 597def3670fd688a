"""One engine with its weights, kept in memory, that answers requests one after the other."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import imgtool
from imgtool import engines, files, loading, outputs
from imgtool.engine import Engine, Result, Watch
from imgtool.errors import USAGE, ImgtoolError, did_you_mean
from imgtool.serve.request import NAME, PHOTO, Limits, Refused, Reply, Request, check_length, photo
from imgtool.settings import Infer, Settings, declared, setting
from imgtool.settings.sources import make

if TYPE_CHECKING:
    from imgtool.images import Photo

CONFIG = "service.json"
"""The file of a folder that says what it serves."""

MIMETYPES = {"jpg": "image/jpeg", "png": "image/png", "tif": "image/tiff", "webp": "image/webp"}

FACTS = "X-Imgtool-Facts"
"""The header that holds the facts, in JSON, beside a picture."""

UNSAID = "the photo cannot be worked on as it was asked"
"""What a reply says of faults whose words are for the log alone."""

AGAIN = "try again in a while"

STUCK = 2
"""Times the longest time of a request after which one that is still worked on counts as stuck."""

_KEYS = frozenset(["code", "clientId"])  # of Azure, which hands them on
_LOG = logging.getLogger("imgtool.serve")
_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
_RETRY = "10"


VARIABLES = ("max_mb", "max_megapixels", "seconds", "threads", "device")
"""What the environment may set, as IMGTOOL_MAX_MB and so on."""


class Config(Settings):
    """What the file ``CONFIG`` of a folder says."""

    engine: str = setting(..., "Engine.")
    weights: str = setting(..., "Weights, a file below the folder.")
    sha256: str = setting(..., "Hash of their content.")
    max_mb: float = setting(25.0, "Largest request in 10^6 bytes.", gt=0, le=1000)
    max_megapixels: float = setting(36.0, "Largest photo in 10^6 pixels.", gt=0, le=1000)
    seconds: float = setting(300.0, "Longest time from a request's arrival to its reply.", gt=0, le=86400)
    threads: int = setting(0, "CPU threads; 0 takes all cores.", ge=0, le=1024)
    device: str = setting("cpu", "Where to compute.")

    @classmethod
    def read(cls, folder: Path) -> Config:
        """Read a folder's; IMGTOOL_MAX_MB and the others of VARIABLES in the environment go first.

        Raises:
            ImgtoolError: There is none, or it is damaged.
        """
        path = folder / CONFIG
        try:
            record = json.loads(files.read(path))
        except ValueError as fault:
            raise ImgtoolError(f"{path} is damaged: {fault}", "export the folder again") from None
        for name in VARIABLES:
            told = os.environ.get(f"IMGTOOL_{name.upper()}")
            record |= {name: told} if told else {}
        return make(cls, record, str(path))


def served(engine: str) -> list[str]:
    """Return the names of the settings that a request to an engine may give."""
    fields = engines.settings(engine).Infer.model_fields
    return sorted(name for name, info in fields.items() if declared(info)["served"])


@dataclass
class _Loaded:
    """An engine with its network.

    Attributes:
        engine: Its record.
        weights: Their file.
        net: What ``engine.apply`` takes.
    """

    engine: Engine
    weights: Path
    net: Any

    @classmethod
    def of(cls, name: str, weights: Path, settings: Infer) -> _Loaded:
        engine = engines.load(name)
        return cls(engine, weights, loading.network(engine, weights, settings, _LOG.warning))

    def _net(self, settings: Infer) -> Any:
        return self.net if self.engine.uses_weights(settings) else None

    def open(self, data: bytes, settings: Infer) -> Any:
        if self.engine.open:
            return self.engine.open(data, NAME, settings, self._net(settings))
        from imgtool import images

        return images.read(data, NAME)

    def apply(self, opened: Any, settings: Infer, watch: Watch) -> Result:
        return self.engine.apply(self._net(settings), opened, settings, watch)


@dataclass
class _Order:
    """What one request wants.

    Attributes:
        settings: Of ``infer``.
        picture: Whether a picture is made.
        json: Whether JSON is the reply.
        until: When nobody waits for it any more, on the clock ``time.monotonic``.
        notes: What a user should know, in words.
    """

    settings: Infer
    picture: bool
    json: bool
    until: float
    notes: list[str] = field(default_factory=list)

    def check(self, *_: object) -> None:
        """Break the work off where nobody waits for it.

        Raises:
            TimeoutError: So.
        """
        if time.monotonic() > self.until:
            raise TimeoutError


class Service:
    """Answers requests to one engine, one after the other.

    One thread does all the work: of every thread that computes, the libraries keep memory and helpers. It
    reads the body too, so that memory holds one at a time.

    Args:
        engine: Its name.
        weights: Their file.
        limits: What a request may ask for.
        threads: CPU threads; 0 takes all cores.
        device: Where to compute.
    """

    def __init__(
        self, engine: str, weights: Path, limits: Limits | None = None, threads: int = 0, device: str = "cpu"
    ) -> None:
        """Load nothing yet."""
        self.engine, self.weights, self.limits = engine, weights, limits or Limits()
        self._cls: type[Infer] = engines.settings(engine).Infer
        self._where = {"inputs": ("-",), "weights": weights.stem, "device": device, "threads": threads}
        self._worker = ThreadPoolExecutor(1, "imgtool")
        self._places = threading.Semaphore(self.places)
        self._began = math.inf
        self._loaded: dict[str, _Loaded] = {}

    @classmethod
    def of(cls, folder: Path) -> Service:
        """Return the service of a folder that ``imgtool export`` wrote.

        Raises:
            ImgtoolError: It is incomplete, or the weights are not those that it was written with.
        """
        config = Config.read(folder)
        weights = folder / config.weights
        if hashlib.sha256(files.read(weights)).hexdigest() != config.sha256:
            what = f"{config.weights} has changed since this service was made of it"
            raise ImgtoolError(what, "export the folder again")
        limits = Limits(config.max_mb, config.max_megapixels, seconds=config.seconds)
        return cls(config.engine, weights, limits, config.threads, config.device)

    @property
    def places(self) -> int:
        """Requests that are taken at a time: the one that is worked on, and those that may wait."""
        return 1 + self.limits.waiting

    @property
    def route(self) -> str:
        """The path that takes photos."""
        return f"/api/{self.engine}"

    def load(self) -> None:
        """Load the network, where it is not loaded; else the first request does.

        Raises:
            ImgtoolError: The weights or the device do not do.
        """
        self._worker.submit(self._own).result()

    def close(self) -> None:
        """Refuse all requests from now on, those that wait too; the one that is worked on is finished."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    def answer(self, request: Request) -> Reply:
        """Answer a request, whatever it is."""
        try:
            return self._routed(request)
        except Refused as fault:
            return fault.reply()
        except MemoryError:
            return _short_of_memory().reply()
        except Exception as fault:  # noqa: BLE001 - a bug: its traceback is for the log alone
            if any(words in str(fault).lower() for words in _NO_MEMORY):
                return _short_of_memory().reply()
            number = secrets.token_hex(6)
            _LOG.error("internal error %s", number, exc_info=fault)
            return Reply.of({"error": "internal error", "id": number}, 500)

    def _routed(self, request: Request) -> Reply:
        allowed = {"/api/health": "GET", self.route: "POST"}.get(request.path.rstrip("/"))
        if allowed is None:
            raise Refused(404, "there is nothing here", f"POST {self.route}, GET /api/health")
        if request.method.upper() != allowed:
            raise Refused(405, f"{request.path} takes {allowed} alone", f"use {allowed}", Allow=allowed)
        return self._health() if allowed == "GET" else self._photo(request)

    def _health(self) -> Reply:
        told = {"engine": self.engine, "weights": self.weights.stem, "imgtool": imgtool.__version__}
        stuck = time.monotonic() - self._began > STUCK * self.limits.seconds
        record = {"status": "stuck" if stuck else "ok", "ready": self.engine in self._loaded, **told}
        return Reply.of(record, 503 if stuck else 200)

    def _photo(self, request: Request) -> Reply:
        check_length(request, self.limits)
        asked = self._asked(request)
        if not self._places.acquire(blocking=False):
            raise Refused(503, "too many requests at a time", AGAIN, Retry_After=_RETRY)
        try:
            future = self._worker.submit(self._worked, request, asked)
        except RuntimeError:
            self._places.release()
            raise _ending() from None
        try:
            return future.result(self.limits.seconds)
        except CancelledError:
            self._places.release()
            raise _ending() from None
        except TimeoutError:
            if future.cancel():  # else it has begun, and gives its place back when it is over
                self._places.release()
            what = f"no reply within {self.limits.seconds:g} s"
            raise Refused(
                503, what, "send a smaller photo, or try again in a while", Retry_After=_RETRY
            ) from None

    def _worked(self, request: Request, asked: _Order) -> Reply:
        """Do what a request wants, in the thread that works, and give its place back."""
        self._began = time.monotonic()
        try:
            asked.check()
            return self._done(photo(request, self.limits), asked)
        except ImgtoolError as fault:
            raise self._refused(fault, 422) from None
        finally:
            self._began = math.inf
            self._places.release()

    def _asked(self, request: Request) -> _Order:
        """Return what a request wants, checked as the command line checks it.

        Raises:
            Refused: 400, something unknown or out of range.
        """
        given = {name: value for name, value in request.query.items() if name not in _KEYS}
        image = given.pop("image", "0")
        known = served(self.engine)
        accept = request.header("accept").lower()
        try:
            for name in given:
                if name not in known:
                    what = f"unknown setting {name} in the query"
                    raise ImgtoolError(what, did_you_mean(name, [*known, "image"]), USAGE)
            if image not in ("0", "1"):
                what = f"image: input should be 0 or 1, not {image!r}"
                raise ImgtoolError(what, "image=1: JSON holds the picture too", USAGE)
            settings = make(self._cls, given | self._where, self.route, flags=True)
        except ImgtoolError as fault:
            raise Refused(400, fault.what, fault.hint) from None
        as_json = "application/json" in accept and "image/" not in accept
        until = time.monotonic() + self.limits.seconds
        return _Order(settings, image == "1" or not as_json, as_json, until)

    def _own(self) -> _Loaded:
        if self.engine not in self._loaded:
            settings = make(self._cls, self._where, self.route)
            self._loaded[self.engine] = _Loaded.of(self.engine, self.weights, settings)
        return self._loaded[self.engine]

    def _done(self, data: bytes, asked: _Order) -> Reply:
        try:
            own, settings, began = self._own(), asked.settings, time.monotonic()
        except ImgtoolError as fault:  # which is not the request's
            raise RuntimeError(fault.what) from fault
        own.engine.check(settings)
        if not own.engine.picture:
            asked.picture, asked.json = asked.picture and asked.json, True
        opened = self._opened(own, data, settings)
        consult = partial(self._consult, data, asked.notes)
        asked.check()
        watch = Watch(done=asked.check, say=asked.notes.append, name=NAME, source=data, picture=asked.picture,
                      overwrite=True, consult=consult)  # fmt: skip
        result = own.apply(opened, settings, watch)
        asked.check()
        record: dict[str, Any] = {"engine": self.engine, "model": self.weights.stem}
        body, kind = b"", ""
        if asked.picture and result.image is not None:
            body, kind = _encoded(own.engine, result.before or opened, result, data, asked)
            record |= {"width": result.image.shape[1], "height": result.image.shape[0]}
        record |= {"seconds": time.monotonic() - began, "facts": result.facts, "notes": asked.notes}
        if not asked.json:
            told = Reply.of(result.facts).body.decode()
            return Reply(200, body, kind, {FACTS: told, "X-Content-Type-Options": "nosniff"})
        if body:
            record |= {"mimetype": kind, "image": base64.b64encode(body).decode()}
        return Reply.of(record)

    def _opened(self, own: _Loaded, data: bytes, settings: Infer) -> Any:
        """Read a photo whose size is within the limit, by its header and when it is decoded.

        Raises:
            Refused: 413, 415 or 422.
        """
        from imgtool.serve import sizes

        if sizes.scans(data) > sizes.MOST_SCANS:
            raise Refused(422, f"the {PHOTO} has more than {sizes.MOST_SCANS} scans", "save it as plain JPEG")
        self._check_pixels(sizes.claimed(data))
        try:
            opened = own.open(data, settings)
        except ImgtoolError as fault:
            raise self._refused(fault, 422 if sizes.known(data) else 415) from None
        array = getattr(opened, "pixels", getattr(opened, "values", None))
        if array is not None and hasattr(array, "shape"):
            self._check_pixels(array.shape[0] * array.shape[1])
        return opened

    def _check_pixels(self, count: int) -> None:
        if count > self.limits.max_megapixels * 1e6:
            what = f"the {PHOTO} has more than {self.limits.max_megapixels:g} megapixels"
            raise Refused(413, what, "shrink it")

    def _refused(self, fault: ImgtoolError, status: int) -> Refused:
        """Return the refusal of a fault: 400 where it was asked wrongly, 503 where memory ran out.

        In words it says what concerns the request's photo, or a setting that requests may give; what else is
        wrong could name the server's files, and is for the log.
        """
        if any(words in fault.what for words in _NO_MEMORY):
            return _short_of_memory()
        status = 400 if fault.code == USAGE else status
        flags = tuple("--" + name.replace("_", "-") for name in served(self.engine))
        if NAME in fault.what or (fault.code == USAGE and fault.what.startswith(flags)):
            return Refused(status, fault.what, fault.hint)
        number = secrets.token_hex(6)
        _LOG.error("refused %s: %.500s (%.500s)", number, fault.what, fault.hint)
        return Refused(status, UNSAID, f"the log says more of {number}")

    def _consult(
        self, data: bytes, notes: list[str], name: str, source: bytes | None = None, **settings: Any
    ) -> Mapping[str, Any]:
        """Return what another engine finds in a photo; see ``Watch.consult``."""
        where = {key: self._where[key] for key in ("inputs", "device", "threads")}
        asked = make(engines.settings(name).Infer, where | settings, name)
        if name not in self._loaded:
            from imgtool import header

            weights = header.find(engines.load(name).weights, name)
            self._loaded[name] = _Loaded.of(name, weights, asked)
        given, other = data if source is None else source, self._loaded[name]
        watch = Watch(say=notes.append, name=NAME, source=given, picture=False)
        return other.apply(other.open(given, asked), asked, watch).facts


def _short_of_memory() -> Refused:
    return Refused(503, "out of memory", "send a smaller photo, or try again in a while", Retry_After=_RETRY)


def _ending() -> Refused:
    return Refused(503, "the service is ending", AGAIN, Retry_After=_RETRY)


def _encoded(engine: Engine, before: Photo, result: Result, data: bytes, asked: _Order) -> tuple[bytes, str]:
    """Return the file of a picture and its type; a photo that was left as it is stays the same bytes."""
    from imgtool import images

    settings = asked.settings
    form = settings.format or engine.form(settings) or before.format
    form = form if form in MIMETYPES else "png"
    after = outputs.made(before, result)
    if after is before and before.format == form:
        return data, MIMETYPES[form]
    asked.notes.extend(images.losses(after, form))
    return images.encode(after, form, settings.quality), MIMETYPES[form]
