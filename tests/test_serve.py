"""An engine over HTTP: what comes in, what goes out, and everything that is refused."""

from __future__ import annotations

import base64
import http.client
import io
import json
import logging
import struct
import tempfile
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import waitress
from PIL import Image
from waitress import wasyncore

from imgtool import cli, engines, header, images
from imgtool.errors import ImgtoolError
from imgtool.serve import SERVED, Limits, Reply, Request, Service, served, wsgi

ROOT = Path(__file__).parents[1]
CHART = ROOT / "examples" / "chart.kdc"
LIMITS = Limits(max_mb=0.2, max_megapixels=0.5)
WITHHELD = {
    "device", "threads", "inputs", "out", "force", "skip_existing", "fail_fast", "compare", "side_by_side",
    "report", "zip", "weights", "memory", "tile", "overlap", "runtime", "tuning", "export", "compare_methods",
    "group", "coeffs",
}  # fmt: skip


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
    for image in (text, f"data:image/png;base64,{text}"):
        sent = json.dumps({"image": image}).encode()
        assert post(sobel, sent, kind="application/json; charset=utf-8").body == expected


@pytest.mark.parametrize(
    ("body", "kind", "word"),
    [
        (b"", "", "no body"),
        (b"{", "application/json", "not JSON"),
        (b"[" * 100_000, "application/json", "not JSON"),
        (b'{"image": 3}', "application/json", "image"),
        (b'{"image": "", "out": "/etc/x"}', "application/json", "image"),
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
def test_every_setting_of_infer_is_served_or_withheld(engine: str) -> None:
    fields = set(engines.settings(engine).Infer.model_fields)
    assert fields <= SERVED | WITHHELD, "say in imgtool.serve whether a stranger may give it"
    assert not SERVED & WITHHELD
    assert set(served(engine)) == fields - WITHHELD
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
    ("what", "told_so"),
    [
        ("cannot read /home/site/wwwroot/x y.png: bad", "cannot read a file y.png: bad"),
        ("C:\\apps\\site\\x.png is bad", "a file is bad"),
        ("'/tmp/imgtool-x/input.dng' is bad at 1/8, 1/4", "'a file' is bad at 1/8, 1/4"),
    ],
)
def test_no_path_of_the_server_gets_into_a_reply(
    what: str, told_so: str, sobel: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ImgtoolError(what, what)

    monkeypatch.setattr(images, "read", fail)
    assert told(post(sobel, encoded())) == {"error": told_so, "hint": told_so}


def test_no_memory_is_a_reason_to_try_again(sobel: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(images, "read", full)
    reply = post(sobel, encoded())
    assert reply.status == 503
    assert "Retry-After" in reply.headers


def test_only_so_many_requests_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service("filter", header.find("filter-sobel_3"), Limits(waiting=0), threads=1)
    began, go, read = threading.Event(), threading.Event(), images.read

    def slow(*given: Any) -> Any:
        began.set()
        assert go.wait(10)
        return read(*given)

    monkeypatch.setattr(images, "read", slow)
    found: list[Reply] = []
    first = threading.Thread(target=lambda: found.append(post(service, encoded())))
    first.start()
    assert began.wait(10)
    assert post(service, encoded()).status == 503
    go.set()
    first.join()
    assert found[0].status == 200
    assert post(service, encoded()).status == 200


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
    assert call(app, "POST", "/api/filter", body, HTTP_AUTHORIZATION="Bearer sécret")[0] == "200 OK"


@pytest.fixture
def port(sobel: Service) -> Iterator[int]:
    sockets: dict[int, Any] = {}
    server = waitress.create_server(wsgi.of(sobel), sockets, host="127.0.0.1", port=0, threads=1)
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            wasyncore.loop(0.02, map=sockets, count=1)

    thread = threading.Thread(target=run)
    thread.start()
    yield server.effective_port
    over.set()
    thread.join()
    server.task_dispatcher.shutdown()
    wasyncore.close_all(sockets)


def test_a_real_server_serves(port: int, sobel: Service) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", "/api/filter?format=png", encoded("JPEG"), {"Connection": "close"})
    reply = connection.getresponse()
    assert (reply.status, reply.getheader("Content-Type")) == (200, "image/png")
    assert json.loads(str(reply.getheader("X-Imgtool-Facts")))["target"] == "sobel_3"
    assert reply.read() == post(sobel, encoded("JPEG"), format="png").body
    connection.close()
