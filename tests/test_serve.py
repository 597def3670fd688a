"""An engine over HTTP: what comes in, what goes out, and everything that is refused."""

from __future__ import annotations

import base64
import http.client
import io
import json
import logging
import socket
import struct
import tempfile
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from imgtool import cli, engines, header, images
from imgtool.errors import ImgtoolError
from imgtool.serve import Limits, Reply, Request, Service, request, served, sizes, wsgi
from imgtool.serve.server import Server

ROOT = Path(__file__).parents[1]
CHART = ROOT / "examples" / "chart.kdc"
LIMITS = Limits(max_mb=0.2, max_megapixels=0.5)
SERVED = {
    "awb": "black ct_range domain fallback format lux mask method quality sure white",
    "deblur": "format quality strength",
    "filter": "format quality target",
    "isp": "area bits black demosaic depth ev flip format noise pattern quality size wb white",
    "lens": "border crop estimator format interpolation normalisation quality risk strength",
}
LONG = 300
"""Seconds in which whatever is waited for has come on the slowest machine."""


@pytest.fixture(scope="module")
def sobel() -> Service:
    return Service("filter", header.find("filter-sobel_3"), LIMITS, threads=1)


@pytest.fixture(scope="module")
def awb() -> Service:
    return Service("awb", header.find("awb-hist"), LIMITS, threads=1)


def scene() -> Image.Image:
    rng = np.random.default_rng(3)
    return Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8).repeat(1, 0))


def encoded(kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    scene().save(buffer, kind, **options)
    return buffer.getvalue()


def post(service: Service, body: bytes, accept: str = "", kind: str = "", **query: str) -> Reply:
    headers = {"Accept": accept, "Content-Type": kind}
    return service.answer(Request("POST", service.route, query, headers, body))


def told(reply: Reply) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(reply.body)
    return found


def form(body: bytes, name: str = "photo.png", boundary: str = "x7") -> bytes:
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="f"; filename="{name}"\r\n\r\n'
    return head.encode() + body + f"\r\n--{boundary}--\r\n".encode()


def png_of(width: int, height: int) -> bytes:
    """Return a PNG that claims a size, with hardly a byte of pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def tiff_of(width: int, height: int, dng: bool = False) -> bytes:
    """Return a small TIFF, or a DNG, whose directory claims a size."""
    buffer = io.BytesIO()
    tags = [(50706, "B", 4, (1, 4, 0, 0), True), (50708, "s", 0, "none", True)] * dng
    tifffile.imwrite(buffer, np.zeros((8, 8), np.uint16), photometric=32803 if dng else 1, extratags=tags)
    data = bytearray(buffer.getvalue())
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as opened:
        for tag, value in ((256, width), (257, height)):
            place = opened.pages[0].tags[tag]
            data[place.offset + 2 : place.offset + 12] = struct.pack("<HII", 4, 1, value)
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_the_picture_is_the_file_that_infer_writes(kind: str, sobel: Service, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a scene"
    body = encoded(kind, exif=exif)
    ending = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "TIFF": "tif"}[kind]
    source, target = tmp_path / f"photo.{ending}", tmp_path / f"out.{ending}"
    source.write_bytes(body)
    assert cli.run(["infer", "filter", str(source), "-o", str(target), "--threads", "1", "-q"]) == 0
    reply = post(sobel, body)
    assert (reply.status, reply.body) == (200, target.read_bytes())
    with Image.open(target) as image:
        assert reply.mimetype == image.get_format_mimetype()
    assert json.loads(reply.headers["X-Imgtool-Facts"])["target"] == "sobel_3"


def test_the_gains_and_the_picture_of_a_raw_file_are_those_of_infer(
    awb: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    target = tmp_path / "out.png"
    assert cli.run(["infer", "awb", str(CHART), "-o", str(target), "--json", "-q"]) == 0
    record = json.loads(capsys.readouterr().out)
    expected = target.read_bytes()
    target.unlink()
    reply = post(awb, CHART.read_bytes(), "application/json", image="1")
    found = told(reply)
    assert base64.b64decode(found["image"]) == expected
    assert found["mimetype"] == "image/png"
    assert {name: found[name] for name in ("engine", "model", "width", "height", "facts")} == {
        name: record[name] for name in ("engine", "model", "width", "height", "facts")
    }
    bare = told(post(awb, CHART.read_bytes()))
    assert "image" not in bare
    assert bare["facts"]["red_gain"] == record["facts"]["red_gain"]
    assert not list(tmp_path.iterdir()), "temporary files are left"


def test_an_engine_asks_another_one_as_in_infer(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--wb", "auto", "--demosaic", "malvar", "-o", str(tmp_path / "out.webp"), "--json", "-q"]
    assert cli.run(["infer", "isp", str(CHART), *words]) == 0
    record = json.loads(capsys.readouterr().out)
    isp = Service("isp", header.find("isp-lrfu-xs"), LIMITS, threads=1)
    reply = post(isp, CHART.read_bytes(), wb="auto", demosaic="malvar", format="webp")
    assert json.loads(reply.headers["X-Imgtool-Facts"]) == record["facts"]
    assert record["facts"]["wb_source"] == "auto"
    assert reply.body == (tmp_path / "out.webp").read_bytes()


def test_settings_in_the_query_do_what_flags_do(sobel: Service, awb: Service) -> None:
    body = encoded()
    small, large = (post(sobel, body, format="jpg", quality=quality) for quality in ("30", "90"))
    assert small.mimetype == large.mimetype == "image/jpeg"
    assert len(small.body) < len(large.body)
    facts = told(post(awb, body, method="grey-world"))["facts"]
    assert facts["method"] == "grey-world"
    assert post(sobel, body, code="the key of a function app").status == 200


def test_a_body_a_form_and_json_are_one_photo(sobel: Service) -> None:
    body = encoded()
    expected = post(sobel, body).body
    text = base64.b64encode(body).decode()
    hostile = form(body, "../../../../etc/passwd\0.png")
    assert post(sobel, form(body), kind='multipart/form-data; boundary="x7"').body == expected
    assert post(sobel, b"preamble\r\n" + hostile, kind="multipart/form-data; boundary=x7").body == expected
    assert "+" in text
    assert "/" in text
    for image in (text, f"data:image/png;base64,{text}"):
        plain = json.dumps({"image": image}, indent=1)
        # What writers of JSON may make of these characters.
        for sent in (plain, plain.replace("/", "\\/").replace("+", "\\u002B").replace("=", "\\u003d")):
            assert json.loads(sent) == {"image": image}
            assert post(sobel, sent.encode(), kind="application/json; charset=utf-8").body == expected


def test_json_is_not_built_before_it_is_known_to_be_a_photo(sobel: Service) -> None:
    body = b"[" + b"[]," * 60_000 + b"[]]"
    tracemalloc.start()
    try:
        assert post(sobel, body, kind="application/json").status == 400
        assert tracemalloc.get_traced_memory()[1] < 2 * len(body)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("body", "kind", "word"),
    [
        (b"", "", "no body"),
        (b"{", "application/json", "image"),
        (b"[" * 100_000, "application/json", "image"),
        (b'{"image": 3}', "application/json", "image"),
        (b'{"image": "", "out": "/etc/x"}', "application/json", "image"),
        (b'{"image": "", "image": ""}', "application/json", "image"),
        (b'{"image": "AAA"}', "application/json", "base64"),
        (b'{"image": "\\u0041"}', "application/json", "base64"),
        (b'{"image": "not*base64"}', "application/json", "base64"),
        (b'{"image": ""}', "application/json", "empty"),
        (form(b"x"), "multipart/form-data", "boundary"),
        (form(b"x")[:-10], "multipart/form-data; boundary=x7", "cut short"),
        (form(b"x"), "multipart/form-data; boundary=other", "boundary"),
        (form(b"x")[:-4] + b"\r\n\r\n" + form(b"y"), "multipart/form-data; boundary=x7", "several"),
        (form(b"x").replace(b"filename", b"field"), "multipart/form-data; boundary=x7", "no file"),
    ],
)
def test_a_body_without_one_photo_is_refused(body: bytes, kind: str, word: str, sobel: Service) -> None:
    reply = post(sobel, body, kind=kind)
    assert reply.status == 400
    assert word in told(reply)["error"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weights", "/etc/passwd"), ("out", "/tmp/x"), ("device", "cuda"), ("report", "/tmp"), ("zip", "/x"),
        ("config", "/etc/passwd"), ("threads", "64"), ("memory", "1e9"), ("tile", "0"), ("inputs", "/etc"),
        ("compare", "1"), ("format", "exe"), ("format", "../x"), ("quality", "101"), ("quality", "nan"),
        ("image", "yes"), ("target", "tv"), ("target", "os:system"),
    ],
)  # fmt: skip
def test_hostile_and_wrong_settings_are_refused(name: str, value: str, sobel: Service) -> None:
    reply = post(sobel, encoded(), **{name: value})
    assert reply.status == 400
    assert set(told(reply)) == {"error", "hint"}
    assert request.NAME.encode() not in reply.body
    assert str(ROOT).encode() not in reply.body


def test_a_wrong_setting_is_told_in_the_words_of_the_command_line(
    sobel: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["infer", "filter", "x.png", "--quality", "0", "--json"]) == 2
    assert told(post(sobel, encoded(), quality="0")) == {
        "error": "--quality: input should be greater than or equal to 1, not '0'",
        "hint": "--quality: Quality of JPEG and WebP output.",
    }


@pytest.mark.parametrize("engine", engines.SUMMARY)
def test_a_stranger_may_give_these_settings_and_no_path(engine: str) -> None:
    assert " ".join(served(engine)) == SERVED[engine]
    for name in served(engine):
        info = engines.settings(engine).Infer.model_fields[name]
        assert "Path" not in str(info.annotation)
        assert "expanduser" not in str(info.metadata), f"{name} may be a path"


def test_other_paths_and_methods_are_refused(sobel: Service) -> None:
    assert sobel.answer(Request("POST", "/api/deblur", body=b"x")).status == 404
    assert sobel.answer(Request("GET", "/etc/passwd")).status == 404
    reply = sobel.answer(Request("GET", "/api/filter"))
    assert (reply.status, reply.headers["Allow"]) == (405, "POST")
    assert sobel.answer(Request("DELETE", "/api/health")).status == 405


def test_health_tells_what_is_served_and_nothing_else(sobel: Service) -> None:
    sobel.load()
    found = told(sobel.answer(Request("GET", "/api/health")))
    known = {"status": "ok", "ready": True, "engine": "filter", "weights": "filter-sobel_3"}
    assert found | known == found
    assert set(found) == {*known, "imgtool"}


def test_large_bodies_are_refused_before_they_are_looked_at(sobel: Service) -> None:
    assert post(sobel, bytes(200_001)).status == 413
    told_only = Request("POST", sobel.route, {}, {"CONTENT-LENGTH": "200001"}, encoded())
    assert sobel.answer(told_only).status == 413


@pytest.mark.parametrize("length", ["9" * 5000, "1" * 16, "-1", "1e3", "٣", "12, 12", " 7"])
def test_a_length_that_is_no_number_of_bytes_is_refused(length: str, sobel: Service) -> None:
    sent = Request("POST", sobel.route, {}, {"Content-Length": length}, encoded())
    assert sobel.answer(sent).status == 400
    status, body = call(wsgi.of(sobel), "POST", sobel.route, CONTENT_LENGTH=length)
    assert status == "400 Bad Request"
    assert "Content-Length" in json.loads(body)["error"]


def deflated(width: int, height: int, tile: int = 0, **options: Any) -> bytes:
    """Return a TIFF of zeros that claims a size, and has one tile or strip of deflate."""
    buffer = io.BytesIO()
    array = np.zeros((height, width, options.pop("samples", 3)), options.pop("dtype", np.uint8))
    options |= {"photometric": "rgb", "metadata": None, "compression": "zlib"}
    tifffile.imwrite(buffer, array, tile=(tile, tile) if tile else None, **options)
    return buffer.getvalue()


def replaced(data: bytes, segment: bytes, tile: int = 0) -> bytes:
    """Return a TIFF whose one tile or strip is another, of another size."""
    out = bytearray(data)
    with tifffile.TiffFile(io.BytesIO(data)) as opened:
        tags = opened.pages[0].tags
        places = {324: len(data), 325: len(segment), 322: tile, 323: tile} if tile else {
            273: len(data), 279: len(segment)
        }  # fmt: skip
        for tag, value in places.items():
            place = tags[tag].offset
            out[place + 2 : place + 12] = struct.pack("<HII", 4, 1, value)
    return bytes(out) + segment


def test_the_tiles_samples_and_depth_of_a_tiff_count(sobel: Service) -> None:
    bomb = replaced(deflated(64, 64, 64), zlib.compress(bytes(9)), 20480)
    assert sizes.claimed(bomb) == 20480**2 // 2
    assert post(sobel, bomb).status == 413
    assert sizes.claimed(deflated(64, 64, 256)) == 256**2 // 2
    assert sizes.claimed(deflated(64, 48)) == 64 * 48
    assert sizes.claimed(deflated(64, 48, samples=4, dtype=np.float32)) == 64 * 48
    assert (
        sizes.claimed(deflated(64, 48, samples=40, dtype=np.float32, extrasamples=[0] * 37)) == 10 * 64 * 48
    )
    below = io.BytesIO()
    with tifffile.TiffWriter(below) as writer:
        writer.write(np.zeros((8, 8), np.uint8), subifds=1, metadata=None)
        writer.write(np.zeros((100, 90), np.uint8), metadata=None)
    assert sizes.claimed(below.getvalue()) == 100 * 90


def test_a_strip_that_unpacks_to_more_than_the_photo_is_refused(sobel: Service) -> None:
    bomb = replaced(deflated(64, 64), zlib.compress(bytes(20_000_000)))
    post(sobel, encoded("TIFF"))
    tracemalloc.start()
    try:
        reply = post(sobel, bomb)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (reply.status, told(reply)["error"]) == (
        422, "photo is truncated or corrupt: its strips hold more than the photo",
    )  # fmt: skip
    assert peak < 2_000_000


def test_a_jpeg_of_countless_scans_is_refused(sobel: Service) -> None:
    once = encoded("JPEG", progressive=True)
    assert 2 < sizes.scans(once) < 20
    assert sizes.scans(encoded("JPEG")) == 1
    assert sizes.scans(encoded()) == 0
    last = once.rindex(b"\xff\xda")
    assert sizes.scans(once[:-2] + once[last:]) == sizes.scans(once) + 1
    reply = post(sobel, once[:-2] + once[last:-2] * 100 + b"\xff\xd9")
    assert (reply.status, "scans" in told(reply)["error"]) == (422, True)


@pytest.mark.parametrize(
    "body",
    [
        png_of(60_000, 60_000),
        png_of(1000, 501),
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 90, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
        tiff_of(60_000, 60_000),
        tiff_of(60_000, 60_000, dng=True),
    ],
    ids=["png", "half a megapixel too much", "bmp", "tiff", "dng"],
)
def test_photos_that_claim_too_many_pixels_are_refused_by_their_header(
    body: bytes, sobel: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "read", lambda *_: pytest.fail("it was decoded"))
    reply = post(sobel, body)
    assert reply.status == 413
    assert "more than 0.5 megapixels" in told(reply)["error"]


def test_the_sensor_of_a_raw_file_counts_and_not_its_preview(monkeypatch: pytest.MonkeyPatch) -> None:
    # 768 x 512 pixels, with a preview of 96 x 64
    small = Service("awb", header.find("awb-hist"), Limits(max_megapixels=0.39))
    assert post(small, CHART.read_bytes()).status == 413
    large = Service("awb", header.find("awb-hist"), Limits(max_megapixels=0.45))
    assert post(large, CHART.read_bytes()).status == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (encoded("JPEG")[:-400], 422),
        (encoded()[:-400], 422),
        (encoded("TIFF")[:-4000], 422),
        (b"\xff\xd8\xff", 422),
        (b"hello, I am no photo", 415),
        (b"\0\0\0\x18ftypheic" + bytes(40), 415),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415),
    ],
)
def test_what_is_no_photo_is_told_from_what_is_damaged(body: bytes, status: int, sobel: Service) -> None:
    reply = post(sobel, body)
    assert reply.status == status
    assert told(reply)["error"].startswith("photo is ")
    assert str(tempfile.gettempdir()).encode() not in reply.body


def test_a_fault_of_ours_is_in_the_log_and_not_in_the_reply(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone = Service("awb", tmp_path / "gone.safetensors")
    with caplog.at_level(logging.ERROR, "imgtool.serve"):
        reply = post(gone, encoded())
    found = told(reply)
    assert (reply.status, set(found), found["error"]) == (500, {"error", "id"}, "internal error")
    assert found["id"] in caplog.text
    assert "Traceback" in caplog.text


@pytest.mark.parametrize(
    "what",
    [
        "cannot read /home/my user/private/x.png: bad",
        "/app is bad",
        "cannot write photo.png into C:\\apps",
        "file:///etc is bad",
        "bad",
    ],
)
@pytest.mark.parametrize(("code", "status"), [(1, 422), (2, 400)])
def test_what_does_not_concern_the_photo_is_for_the_log_alone(
    what: str, code: int, status: int, sobel: Service, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def fail(*_: object) -> None:
        raise ImgtoolError(what, what, code)

    monkeypatch.setattr(images, "read", fail)
    reply = post(sobel, encoded())
    found = told(reply)
    assert reply.status == status
    assert found["error"] == "the photo cannot be worked on as it was asked"
    assert what not in found["hint"]
    number = found["hint"].split()[-1]
    assert [number in each.getMessage() for each in caplog.records if what in each.getMessage()] == [True]


def test_what_concerns_the_photo_or_the_query_is_said(
    sobel: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(data: bytes, name: str) -> None:
        raise ImgtoolError(f"{name} is bad", "take another")

    monkeypatch.setattr(images, "read", fail)
    assert told(post(sobel, encoded())) == {"error": "photo is bad", "hint": "take another"}
    monkeypatch.undo()
    isp = Service("isp", header.find("isp-lrfu-xs"), LIMITS, threads=1)
    reply = post(isp, CHART.read_bytes(), wb="purple")
    assert (reply.status, "--wb 'purple'" in told(reply)["error"]) == (400, True)


def test_no_memory_is_a_reason_to_try_again(sobel: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(images, "read", full)
    reply = post(sobel, encoded())
    assert reply.status == 503
    assert "Retry-After" in reply.headers


class Gate:
    """Holds the reading of photos until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self.go, self.count = threading.Event(), threading.Event(), 0
        read = images.read

        def slow(*given: Any) -> Any:
            self.count += 1
            self.began.set()
            assert self.go.wait(LONG)
            return read(*given)

        monkeypatch.setattr(images, "read", slow)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.go.set()


def started(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def fresh(**limits: Any) -> Service:
    return Service("filter", header.find("filter-sobel_3"), Limits(0.2, 0.5, **limits), threads=1)


def unread() -> bytes:
    pytest.fail("the body was read")


def test_only_so_many_requests_wait_and_no_other_body_is_read(gate: Gate) -> None:
    service, found = fresh(waiting=0), list[Reply]()
    first = started(lambda: found.append(post(service, encoded())))
    assert gate.began.wait(LONG)
    surplus = service.answer(Request("POST", service.route, body=unread))
    assert (surplus.status, surplus.headers["Retry-After"]) == (503, "10")
    gate.go.set()
    first.join()
    assert found[0].status == 200
    assert post(service, encoded()).status == 200


def test_a_request_that_takes_too_long_is_answered(gate: Gate) -> None:
    service = fresh(waiting=1, seconds=0.2)
    service.load()
    begun = post(service, encoded())
    assert (begun.status, told(begun)["error"]) == (503, "no reply within 0.2 s")
    # Where it was over before its thread had a turn, it was not begun.
    until(lambda: gate.began.is_set() or post(service, encoded()).status != 503)
    assert gate.began.is_set()
    waited = service.answer(Request("POST", service.route, body=unread))
    assert waited.status == 503
    until(lambda: service.answer(Request("GET", "/api/health")).status == 503)
    health = told(service.answer(Request("GET", "/api/health")))
    assert health["status"] == "stuck"
    gate.go.set()
    until(lambda: service.answer(Request("GET", "/api/health")).status == 200)
    assert gate.count == 1, "what nobody waits for any more is not begun"


def test_work_that_nobody_waits_for_ends_at_the_next_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    service, told_so = fresh(seconds=0.2), threading.Event()
    service.load()
    engine = engines.load("filter")

    def apply(net: Any, photo: Any, settings: Any, watch: Any) -> Any:
        try:
            for tile in range(2000):
                time.sleep(0.01)
                watch.done(tile, 2000)
        except TimeoutError:
            told_so.set()
            raise
        raise ImgtoolError("over")

    service._loaded["filter"].engine = replace(engine, apply=apply)
    # Where the photo is not read in time, its first tile is not begun.
    until(lambda: post(service, encoded()).status != 503 or told_so.is_set())
    assert told_so.is_set()


def test_requests_at_a_time_each_get_their_own_answer(sobel: Service) -> None:
    bodies = [encoded(), encoded("JPEG"), b"no photo"]
    expected = [post(sobel, body).body for body in bodies]
    found: dict[int, bytes] = {}

    def ask(number: int) -> None:
        found[number] = post(sobel, bodies[number % 3]).body

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[number] == expected[number % 3] for number in range(6))


def call(
    app: wsgi.Application, method: str, path: str, body: bytes = b"", **environ: Any
) -> tuple[str, bytes]:
    """Call a WSGI application as a server does."""
    status: list[str] = []
    given = {
        "REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": "", "wsgi.input": io.BytesIO(body),
        "CONTENT_LENGTH": str(len(body)),
    }  # fmt: skip
    reply = app(given | environ, lambda line, headers: status.append(line))
    return status[0], b"".join(reply)


class Untouched:
    def read(self, size: int) -> bytes:
        pytest.fail("the body was read")


def test_wsgi_hands_requests_on(sobel: Service) -> None:
    app, body = wsgi.of(sobel), encoded()
    expected = post(sobel, body, format="webp").body
    assert call(app, "POST", "/api/filter", body, QUERY_STRING="format=webp") == ("200 OK", expected)
    more = {"CONTENT_LENGTH": "", "wsgi.input_terminated": True, "QUERY_STRING": "format=webp"}
    assert call(app, "POST", "/api/filter", body, **more) == ("200 OK", expected)
    assert call(app, "POST", "/api/filter", bytes(300_000), **more)[0].startswith("413")
    assert call(app, "GET", "/api/filter?" * 9, **{"wsgi.input": Untouched()})[0].startswith("404")
    long = {"CONTENT_LENGTH": "99999999", "wsgi.input": Untouched()}
    assert call(app, "POST", "/api/filter", **long)[0].startswith("413")
    assert call(app, "POST", "/api/filter", body, QUERY_STRING="a=1&" * 60)[0].startswith("400")
    assert call(app, "PATCH", "/api/filter")[0] == "405 Method Not Allowed"


def test_a_token_opens_all_but_health(sobel: Service) -> None:
    app, body = wsgi.of(sobel, "sécret"), encoded()
    assert call(app, "GET", "/api/health")[0] == "200 OK"
    for given in ("", "Bearer", "Bearer wrong", "Basic sécret", "sécret"):
        more = {"HTTP_AUTHORIZATION": given, "wsgi.input": Untouched()}
        assert call(app, "POST", "/api/filter", body, **more)[0] == "401 Unauthorized"
    sent = "Bearer sécret".encode().decode("latin-1")  # PEP 3333
    assert call(app, "POST", "/api/filter", body, HTTP_AUTHORIZATION=sent)[0] == "200 OK"


def test_an_open_service_is_warned_of_and_an_empty_token_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(wsgi.TOKEN, raising=False)
    assert wsgi.token() == ""
    assert "IMGTOOL_TOKEN is not set" in caplog.text
    caplog.clear()
    for word in ("", "  ", " x", "x\n"):
        monkeypatch.setenv(wsgi.TOKEN, word)
        with pytest.raises(ImgtoolError, match="IMGTOOL_TOKEN"):
            wsgi.token()
        assert wsgi.main() == 2, "before anything is loaded"
    monkeypatch.setenv(wsgi.TOKEN, "word")
    assert (wsgi.token(), caplog.text) == ("word", "")


class Running:
    """A real server in a thread."""

    def __init__(self, service: Service, token: str = "") -> None:
        self.ending, self.done = threading.Event(), list[bool]()
        self.server = Server(service, token, "127.0.0.1:0")
        self.port = self.server.port
        self.thread = started(lambda: self.done.append(self.server.run(self.ending)))

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONG)
        try:
            connection.request(method, path, body, headers)
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()

    def raw(self, head: str) -> bytes:
        """Send the head of a request and no body; return all that comes until the connection ends."""
        with socket.create_connection(("127.0.0.1", self.port), LONG) as connection:
            connection.sendall(head.replace("\n", "\r\n").encode())
            parts = []
            while part := connection.recv(4096):
                parts.append(part)
        return b"".join(parts)

    def end(self) -> None:
        self.ending.set()
        self.thread.join(LONG)
        assert not self.thread.is_alive()


@pytest.fixture
def running() -> Iterator[Callable[..., Running]]:
    made: list[Running] = []

    def start(service: Service, token: str = "") -> Running:
        made.append(Running(service, token))
        return made[-1]

    yield start
    for each in made:
        each.end()


def test_a_real_server_serves(running: Callable[..., Running]) -> None:
    service = fresh()
    server = running(service)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=LONG)
    connection.request("POST", "/api/filter?format=png", encoded("JPEG"), {"Connection": "close"})
    reply = connection.getresponse()
    assert (reply.status, reply.getheader("Content-Type")) == (200, "image/png")
    assert json.loads(str(reply.getheader("X-Imgtool-Facts")))["target"] == "sobel_3"
    assert reply.read() == post(service, encoded("JPEG"), format="png").body
    connection.close()


def test_health_and_refusals_answer_while_all_places_are_taken(
    running: Callable[..., Running], gate: Gate
) -> None:
    service = fresh(waiting=2)
    server, found = running(service), list[int]()
    posts = [
        started(lambda: found.append(server.ask("POST", service.route, encoded())[0])) for _ in range(12)
    ]
    assert gate.began.wait(LONG)
    until(lambda: sum(thread.is_alive() for thread in posts) == 3)  # one is worked on and two wait
    assert found == [503] * 9
    status, body = server.ask("GET", "/api/health")
    assert (status, json.loads(body)["status"]) == (200, "ok")
    assert sum(thread.is_alive() for thread in posts) == 3
    gate.go.set()
    for thread in posts:
        thread.join(LONG)
    assert sorted(found) == [200] * 3 + [503] * 9


def test_a_server_ends_in_order(
    running: Callable[..., Running], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imgtool.serve.server.GRACE", LONG)
    service = fresh(waiting=2)
    server, found = running(service), list[tuple[int, bytes]]()
    first = started(lambda: found.append(server.ask("POST", service.route, encoded())))
    assert gate.began.wait(LONG)
    second = started(lambda: found.append(server.ask("POST", service.route, encoded())))
    until(lambda: service._worker._work_queue.qsize() == 1)
    server.ending.set()
    second.join(LONG)
    assert found[0][0] == 503
    assert json.loads(found[0][1])["error"] == "the service is ending"
    with pytest.raises(ConnectionError):
        server.ask("GET", "/api/health")
    gate.go.set()
    first.join(LONG)
    assert (found[1][0], server.thread.join(LONG), server.done) == (200, None, [True])
    assert service.answer(Request("POST", service.route, body=encoded())).status == 503


def test_a_body_that_is_not_wanted_is_not_received(running: Callable[..., Running]) -> None:
    server = running(fresh(), "word")
    more = "Host: x\nContent-Length: 100000\nExpect: 100-continue\n"
    for line, status in (
        ("POST /api/filter HTTP/1.1\n", 401),
        ("POST /api/filter HTTP/1.1\nAuthorization: Bearer other\n", 401),
        ("POST /api/else HTTP/1.1\nAuthorization: Bearer word\n", 404),
        ("PUT /api/filter HTTP/1.1\nAuthorization: Bearer word\n", 405),
    ):
        reply = server.raw(f"{line}{more}\n")
        assert reply.startswith(f"HTTP/1.1 {status} ".encode()), reply
        assert b"Connection: close" in reply
    chunked = "POST /api/filter HTTP/1.1\nHost: x\nTransfer-Encoding: chunked\n\n"
    assert server.raw(chunked).startswith(b"HTTP/1.1 401 ")
    assert server.ask("POST", "/api/filter", encoded(), Authorization="Bearer word")[0] == 200


def test_a_head_that_is_hostile_is_refused(running: Callable[..., Running]) -> None:
    server = running(fresh())
    long = f"POST /api/filter HTTP/1.1\nHost: x\nContent-Length: {'9' * 5000}\n\n"
    assert b" 400 " in server.raw(long).partition(b"\r\n")[0]
    wide = "GET /api/health?".ljust(1 << 14, "a")  # no more: what is not received would reset the connection
    assert b" 431 " in server.raw(wide).partition(b"\r\n")[0]
    large = "POST /api/filter HTTP/1.1\nHost: x\nContent-Length: 400001\n\n"
    assert b" 413 " in server.raw(large).partition(b"\r\n")[0]
    assert server.ask("GET", "/api/health")[0] == 200


def test_an_address_that_is_taken_is_one_error_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("IMGTOOL_LISTEN", where)
            service = SimpleNamespace(route="/api/awb", places=1, limits=Limits())
            with pytest.raises(ImgtoolError, match=f"cannot listen on {where}") as caught:
                wsgi._listening(service, "")  # type: ignore[arg-type]
    assert "IMGTOOL_LISTEN" in caught.value.hint
