"""Folders of web servers and of the Hub: real clients against servers of this process."""

from __future__ import annotations

import base64
import datetime
import functools
import hashlib
import http.server
import importlib
import ipaddress
import json
import socket
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hub
import pytest

from imgtool import buckets
from imgtool.buckets import Found, Interrupted, Offline, client, getting, manifest, patience, state
from imgtool.buckets import fetch as fetching
from imgtool.buckets.fetch import fetch
from imgtool.errors import USAGE, ImgtoolError

PHOTOS = {"/set/a b.jpg": b"one" * 40, "/set/inner/deep/c.png": b"two" * 50, "/set/ü.jpg": b"three"}


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "WAITS", (0.0, 0.0))
    for name in ("HF_TOKEN", "HF_ENDPOINT", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def web() -> Iterator[hub.Server]:
    server = hub.Server(hub.Web)
    server.files = dict(PHOTOS)
    with hub.serving(server):
        yield server


def _tag(content: bytes) -> str:
    return f'"{hashlib.sha1(content).hexdigest()}"'


def _listing(base: str) -> list[Found]:
    return sorted(
        (Found(path[len(base) :], len(content), _tag(content)) for path, content in PHOTOS.items()),
        key=lambda found: found.path,
    )


@pytest.mark.parametrize("slash", ["/", ""])
def test_a_folder_is_listed_from_its_index_pages_to_the_bottom(web: hub.Server, slash: str) -> None:
    place = buckets.open(f"{web.url}/set{slash}")
    assert place.list() == _listing("/set/")
    assert place.url("a b.jpg") == f"{web.url}/set/a%20b.jpg"
    assert not any("?C=N" in path for _, path, _ in web.asked)


def test_what_is_listed_is_read_whole_and_in_ranges(web: hub.Server) -> None:
    place = buckets.open(f"{web.url}/set/")
    for found in place.list():
        content = PHOTOS[f"/set/{found.path}"]
        assert place.whole(found) == content
        assert place.read(found, 1, 4) == content[1:4]
        assert place.read(found, 0, found.size) == content


def test_a_single_file_is_listed_by_its_name_and_keeps_its_query(web: hub.Server) -> None:
    place = buckets.open(f"{web.url}/set/a%20b.jpg?sig=a%2Fb")
    (found,) = place.list()
    content = PHOTOS["/set/a b.jpg"]
    assert found == Found("a b.jpg", len(content), _tag(content))
    assert place.whole(found) == content
    assert {path for _, path, _ in web.asked} == {"/set/a%20b.jpg?sig=a%2Fb"}
    assert place.url("a b.jpg") == f"{web.url}/set/a%20b.jpg"


def test_an_address_signed_for_reading_alone_is_asked_by_a_range(web: hub.Server) -> None:
    web.wrong["/set/a b.jpg"] = ["403"]  # the answer to HEAD
    assert buckets.open(f"{web.url}/set/a b.jpg").list()[0].size == 120


def test_a_server_that_tells_no_size_before_it_is_asked_for_all_has_no_empty_files(web: hub.Server) -> None:
    web.wrong["/set/a b.jpg"] = ["empty"]  # the answer to HEAD
    place = buckets.open(f"{web.url}/set/a b.jpg")
    (found,) = place.list()
    assert found.size == -1
    assert place.whole(found) == PHOTOS["/set/a b.jpg"]


def test_nothing_is_listed_where_nothing_is(web: hub.Server) -> None:
    assert buckets.open(f"{web.url}/other").list() == []
    assert buckets.open(f"{web.url}/other/").list() == []


def test_a_folder_with_a_manifest_is_listed_from_it_with_hashes(web: hub.Server) -> None:
    rows = [
        {"url": "s3://b", "files": 1},
        {"path": "x.jpg", "size": 3, "tag": "t", "sha256": "AB" * 32, "md5": "cd" * 16},
    ]
    web.files = {f"/set/{manifest.NAME}": "\n".join(map(json.dumps, rows)).encode(), "/set/x.jpg": b"abc"}
    place = buckets.open(f"{web.url}/set/")
    (found,) = place.list()
    assert (found.path, found.size, dict(found.digests)) == (
        "x.jpg",
        3,
        {"sha256": "ab" * 32, "md5": "cd" * 16},
    )
    assert place.whole(found) == b"abc"


HEAD = {"url": "s3://b", "files": 1, "date": "2026-01-01"}
ROW = {"path": "x.jpg", "size": 3}


@pytest.mark.parametrize(
    "rows",
    [
        [HEAD, ROW | {"size": None}],
        [HEAD, ROW | {"size": -1}],
        [HEAD, ROW | {"size": True}],
        [HEAD, ROW | {"path": 7}],
        [HEAD, ROW | {"tag": 7}],
        [HEAD, ROW | {"sha256": "ab"}],
        [HEAD, ROW | {"md5": 7}],
        [HEAD, {"path": "x.jpg"}],
        [HEAD, [ROW]],
        [HEAD | {"files": 2}, ROW, ROW],
        [HEAD | {"files": 2}, ROW],
        [HEAD | {"date": ""}, ROW],
        [{"error": "not found"}],
        [ROW],
        [[]],
        ["error: no url"],
        [],
    ],
)
def test_what_is_no_whole_manifest_counts_as_none(web: hub.Server, rows: list[object]) -> None:
    web.files = {f"/set/{manifest.NAME}": "\n".join(map(json.dumps, rows)).encode(), "/set/y.jpg": b"abc"}
    assert [each.path for each in buckets.open(f"{web.url}/set/").list()] == [manifest.NAME, "y.jpg"]


def test_pages_and_manifests_without_end_are_not_read_to_it(
    web: hub.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [HEAD, ROW]
    web.files = {f"/set/{manifest.NAME}": "\n".join(map(json.dumps, rows)).encode(), "/set/y.jpg": b"abc"}
    monkeypatch.setattr("imgtool.buckets.web._MANIFEST", 60)
    assert "y.jpg" in [each.path for each in buckets.open(f"{web.url}/set/").list()]
    monkeypatch.setattr("imgtool.buckets.web._PAGE", 60)
    with pytest.raises(ImgtoolError, match="too long for a list"):
        buckets.open(f"{web.url}/set/").list()


def test_a_manifest_that_leads_out_of_the_folder_is_refused(web: hub.Server) -> None:
    rows = [HEAD, {"path": "../x.jpg", "size": 3}]
    web.files = {f"/set/{manifest.NAME}": "\n".join(map(json.dumps, rows)).encode()}
    with pytest.raises(ImgtoolError, match=r"\.\./x\.jpg"):
        buckets.open(f"{web.url}/set/").list()


def test_links_out_of_the_folder_and_folders_without_end_are_not_followed(web: hub.Server) -> None:
    web.files = {f"/set/{'again/' * depth}x.jpg": b"x" for depth in range(40)}
    web.files["/set/%2e%2e/y.jpg"] = b"y"  # shown as %252e
    assert len(buckets.open(f"{web.url}/set/").list()) <= 34


def test_a_file_that_changed_is_noticed_between_two_ranges(web: hub.Server) -> None:
    place = buckets.open(f"{web.url}/set/")
    found = place.list()[0]
    assert place.read(found, 0, 5)
    web.files[f"/set/{found.path}"] = b"six" * 40
    with pytest.raises(ImgtoolError, match="has changed"):
        place.read(found, 5, 10)


def test_a_broken_connection_and_a_busy_server_are_interruptions(web: hub.Server) -> None:
    place = buckets.open(f"{web.url}/set/ü.jpg")
    web.wrong["/set/ü.jpg"] = ["cut", "busy"]
    with pytest.raises(Interrupted) as fault:
        place.whole(Found("ü.jpg"))
    assert fault.value.got == b"th"
    with pytest.raises(Interrupted, match="503"):
        place.whole(Found("ü.jpg"))
    assert place.whole(Found("ü.jpg")) == b"three"


def test_less_than_was_asked_for_is_an_interruption(web: hub.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.Reply, "read", lambda reply, most=None: b"on")
    place = buckets.open(f"{web.url}/set/")
    for begin, end in ((0, 3), (3, 6)):
        with pytest.raises(Interrupted, match="sent 2 bytes of 3"):
            place.read(Found("a b.jpg"), begin, end)


def test_nothing_is_taken_of_another_range_than_was_asked_for(web: hub.Server) -> None:
    place = buckets.open(f"{web.url}/set/")
    web.wrong["/set/a b.jpg"] = ["other"]
    with pytest.raises(Interrupted, match="bytes 0-3/100 for bytes 10-13/") as fault:
        place.read(Found("a b.jpg"), 10, 14)
    assert fault.value.got == b""


def test_a_listing_is_asked_again_and_then_says_that_nobody_answers(web: hub.Server) -> None:
    web.wrong["/set/"] = ["busy", "busy"]
    assert len(buckets.open(f"{web.url}/set/").list()) == 3
    web.wrong["/set/"] = ["busy"] * 9
    with pytest.raises(Offline, match="too busy"):
        buckets.open(f"{web.url}/set/").list()


@pytest.mark.parametrize(("status", "words"), [("403", "no permission"), ("404", "no such file")])
def test_what_may_not_be_read_is_said(web: hub.Server, status: str, words: str) -> None:
    web.wrong["/set/ü.jpg"] = [status]
    with pytest.raises(ImgtoolError, match=words):
        buckets.open(f"{web.url}/set/").whole(Found("ü.jpg"))


def test_a_password_goes_with_requests_but_to_no_other_server_and_into_no_message(web: hub.Server) -> None:
    other = hub.Server(hub.Web)
    other.files = {"/y.jpg": b"moved"}
    with hub.serving(other):
        web.wrong["/set/ü.jpg"] = [f"moved:{other.url}/y.jpg"]
        place = buckets.open(f"http://ann:s%40crt@127.0.0.1:{web.server_address[1]}/set/")
        assert place.whole(Found("ü.jpg")) == b"moved"
    assert web.asked[0][2]["Authorization"] == f"Basic {base64.b64encode(b'ann:s@crt').decode()}"
    assert "Authorization" not in other.asked[0][2]
    assert place.url("x") == f"{web.url}/set/x"


def test_a_password_may_hold_an_at_sign(web: hub.Server) -> None:
    place = buckets.open(f"http://ann:s@cr@t@127.0.0.1:{web.server_address[1]}/set/")
    assert place.whole(Found("ü.jpg")) == b"three"
    assert web.asked[0][2]["Authorization"] == f"Basic {base64.b64encode(b'ann:s@cr@t').decode()}"
    assert place.url("x") == f"{web.url}/set/x"


def test_redirects_in_a_circle_end(web: hub.Server) -> None:
    web.wrong["/set/ü.jpg"] = ["moved:/set/%C3%BC.jpg"] * 20
    with pytest.raises(ImgtoolError, match="leads nowhere"):
        buckets.open(f"{web.url}/set/").whole(Found("ü.jpg"))


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("moved:/set/%C3%BC.jpg", "leads nowhere but on"),
        ("moved:http://nowhere.invalid/", "no such host: nowhere.invalid"),
        ("moved:http://[::/x", "cannot be followed"),
        ("moved:http://host:port/x", "cannot be followed"),
        ("moved:http://a..b/x", "no such host: a..b"),
        ("busy", "too busy"),
    ],
)
def test_a_link_that_fails_is_a_fault_of_one_file(
    web: hub.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, words: str
) -> None:
    monkeypatch.setattr(getting, "WAITS", (0.0,))
    monkeypatch.setattr(socket, "getaddrinfo", _known(socket.getaddrinfo))
    web.wrong["/set/ü.jpg"] = [where] * 99
    record = fetch(f"{web.url}/set/", tmp_path)
    (fault,) = record["faults"]  # type: ignore[misc, attr-defined]
    assert fault.startswith("ü.jpg: ")
    assert words in fault
    assert record["fetched"] == len(PHOTOS) - 1


def _known(ask: Callable[..., object]) -> Callable[..., object]:
    """Return what knows no host but this one, and needs no network."""

    def asked(host: str, *rest: object, **named: object) -> object:
        if host.endswith(".invalid"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return ask(host, *rest, **named)

    return asked


def test_a_folder_below_that_shows_no_list_is_a_fault_and_the_rest_is_fetched(
    web: hub.Server, tmp_path: Path
) -> None:
    web.files["/set/closed/x.jpg"] = b"x"
    web.wrong["/set/closed/"] = ["403"]
    record = fetch(f"{web.url}/set/", tmp_path)
    assert record["faults"] == [
        f"closed/: {web.url}/set/closed/: the server shows no list of this folder (403)"
    ]
    assert record["fetched"] == len(PHOTOS)


def test_a_site_that_is_gone_or_answers_for_few_links_is_offline(
    web: hub.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.files |= {f"/set/{number}.jpg": b"x" for number in range(5)}
    web.wrong |= {f"/set/{number}.jpg": ["busy"] * 9 for number in range(5)}
    assert len(buckets.open(f"{web.url}/set/").list()) == len(PHOTOS) + 5
    web.wrong |= {f"/set/{number}.jpg": ["busy"] * 9 for number in range(5)}
    monkeypatch.setattr("imgtool.buckets.web.SILENT", 4)
    with pytest.raises(Offline, match="too busy"):
        buckets.open(f"{web.url}/set/").list()
    place = buckets.open(f"{web.url}/set/")
    ask, down = place.client.ask, Interrupted("refused the connection")

    def asked(method: str, url: str, headers: dict[str, str]) -> object:
        if method == "HEAD":
            raise down
        return ask(method, url, headers)

    monkeypatch.setattr(place.client, "ask", asked)
    with pytest.raises(Offline, match="refused"):
        place.list()


class Untold(hub.Web):
    """Tells nothing of a content, which is another one each time that it is asked for."""

    def send_header(self, name: str, value: str) -> None:
        if name != "ETag":
            super().send_header(name, value)

    def _file(self, content: bytes) -> None:
        if self.command == "GET":
            content = bytes([len(self.server.asked)]) * len(content)
        super()._file(content)


def test_pieces_of_a_file_of_which_nothing_tells_them_apart_come_in_one_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "PIECE", 10)
    monkeypatch.setattr(fetching, "LARGE", 20)
    server = hub.Server(Untold)
    server.files = {"/x.bin": bytes(95)}
    with hub.serving(server):
        assert fetch(f"{server.url}/x.bin", tmp_path)["faults"] == []
    data = (tmp_path / "x.bin").read_bytes()
    assert (len(data), len(set(data))) == (95, 1)
    assert [method for method, _, _ in server.asked] == ["HEAD", "GET"]


def test_connections_are_kept_and_a_stale_one_is_replaced(web: hub.Server) -> None:
    place = buckets.open(f"{web.url}/set/")
    found = Found("ü.jpg")
    for _ in range(20):
        place.whole(found)
    assert web.connections == 1
    web.wrong["/set/ü.jpg"] = ["408"]
    with pytest.raises(Interrupted):
        place.whole(found)
    for connections in place.client._idle.values():
        for connection in connections:
            connection.sock.shutdown(socket.SHUT_RDWR)  # as a server that waited too long
    assert place.whole(found) == b"three"


@pytest.mark.slow
def test_a_server_without_ranges_sends_a_large_file_once(tmp_path: Path) -> None:
    content = bytes(range(256)) * 4000
    (tmp_path / "large.bin").write_bytes(content)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/ü x.jpg").write_bytes(b"small")
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(quiet, directory=str(tmp_path))
    )
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    with hub.serving(server):
        place = buckets.open(f"http://127.0.0.1:{server.server_address[1]}/")
        small, large = place.list()
        assert (small.path, small.size, large.size) == ("inner/ü x.jpg", 5, len(content))
        cuts = range(0, len(content), 100_000)
        with ThreadPoolExecutor(4) as threads:
            parts = threads.map(lambda n: place.read(large, n, min(n + 100_000, large.size)), cuts)
        assert b"".join(parts) == content
        assert not place._copies
        assert place.whole(small) == b"small"


def test_what_is_no_address_a_host_that_is_not_there_and_a_closed_port_are_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ImgtoolError, match="no address") as fault:
        buckets.open("https://host:port/x")
    assert fault.value.code == USAGE

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with socket.socket() as port:  # which nobody listens at, and nobody else can take
        port.bind(("127.0.0.1", 0))
        with pytest.raises(Offline, match="refused"):
            buckets.open(f"http://127.0.0.1:{port.getsockname()[1]}/x").list()
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(Offline, match=r"no such host: nowhere\.test"):
        buckets.open("http://nowhere.test/x").list()


def test_a_server_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = buckets.open(f"http://127.0.0.1:{silent.getsockname()[1]}/")
        with pytest.raises(Interrupted, match="did not answer"):
            place.whole(Found("x"))


@pytest.mark.slow
def test_a_certificate_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pem = tmp_path / "own.pem"
    pem.write_bytes(_certificate())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    web = hub.Server(hub.Web)
    web.files = dict(PHOTOS)
    web.socket = context.wrap_socket(web.socket, server_side=True)
    with hub.serving(web):
        address = f"https://127.0.0.1:{web.server_address[1]}/set/"
        with pytest.raises(ImgtoolError, match=r"certificate of .* is not trusted: self-signed") as fault:
            buckets.open(address).list()
        assert "SSL_CERT_FILE" in fault.value.hint
        monkeypatch.setenv("SSL_CERT_FILE", str(pem))
        assert buckets.open(address).list() == _listing("/set/")
        web.wrong["/set/ü.jpg"] = ["moved:http://127.0.0.1/ü.jpg"]
        with pytest.raises(ImgtoolError, match="not encrypted"):
            buckets.open(address).whole(Found("ü.jpg"))


def _certificate() -> bytes:
    """Return a key and the certificate that it gives itself, of 127.0.0.1, as PEM."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(encoding, form, plain) + made.public_bytes(encoding)


def test_a_proxy_is_used_where_one_is_set(web: hub.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    web.files = {"/x.jpg": b"through"}
    monkeypatch.setenv("http_proxy", web.url.replace("//", "//me:word@"))
    monkeypatch.setenv("no_proxy", "")
    assert buckets.open("http://far.test/").whole(Found("x.jpg")) == b"through"
    _, target, headers = web.asked[0]
    assert (target, headers["Host"]) == ("http://far.test/x.jpg", "far.test")
    assert headers["Proxy-Authorization"] == f"Basic {base64.b64encode(b'me:word').decode()}"


def test_nothing_is_written_to_the_web(web: hub.Server, tmp_path: Path) -> None:
    with pytest.raises(ImgtoolError, match="to read from"):
        buckets.open(web.url).write(tmp_path / "x", "x")


# --- the Hub ---


@pytest.fixture
def photos(monkeypatch: pytest.MonkeyPatch) -> Iterator[hub.Server]:
    pytest.importorskip("huggingface_hub")
    server = hub.Server(hub.Hub)
    server.files = {"/README.md": b"about", "/inner/a b.jpg": b"one" * 40, "/inner/b.jpg": b"two"}
    server.large = {"/inner/a b.jpg"}
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN_PATH", "/nowhere")
    with hub.serving(server):
        yield server


@pytest.mark.slow
def test_a_data_set_is_listed_with_hashes_and_read_at_one_commit(photos: hub.Server) -> None:
    place = buckets.open("hf://datasets/ann/photos@v1/inner")
    large, small = place.list()
    assert (large.path, large.size) == ("a b.jpg", 120)
    assert large.digests == (("sha256", hashlib.sha256(b"one" * 40).hexdigest()),)
    assert small.digests == (("git-sha1", hashlib.sha1(b"blob 3\0two").hexdigest()),)
    assert place.whole(large) == b"one" * 40
    assert place.read(large, 3, 6) == b"one"
    assert place.whole(small) == b"two"
    assert place.url("b.jpg") == "hf://datasets/ann/photos@v1/inner/b.jpg"
    assert importlib.import_module("huggingface_hub").get_session().timeout.read == client.TIMEOUT
    reads = [path for _, path, _ in photos.asked if "/resolve/" in path]
    assert reads[-1] == f"/datasets/ann/photos/resolve/{hub.COMMIT}/inner/b.jpg"
    assert [each.path for each in buckets.open("hf://datasets/ann/photos").list()] == [
        "README.md", "inner/a b.jpg", "inner/b.jpg",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_name_on_the_hub_that_leads_outside_is_a_fault(photos: hub.Server, tmp_path: Path) -> None:
    photos.files["/inner/../../out.jpg"] = b"out"
    record = fetch("hf://datasets/ann/photos", tmp_path / "in")
    assert record["faults"] == ["inner/../../out.jpg: refused, for it would lie outside the folder"]
    assert record["fetched"] == 3


@pytest.mark.slow
def test_a_single_file_of_the_hub_is_read(photos: hub.Server) -> None:
    place = buckets.open("hf://datasets/ann/photos/inner/b.jpg")
    (found,) = place.list()
    assert (found.path, place.whole(found)) == ("b.jpg", b"two")
    assert place.url("b.jpg") == "hf://datasets/ann/photos/inner/b.jpg"
    assert buckets.open("hf://datasets/ann/photos/inner/c.jpg").list() == []
    assert buckets.open("hf://datasets/ann/photos/inner/c/").list() == []


@pytest.mark.slow
def test_what_the_hub_refuses_is_said(photos: hub.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    photos.token = "secret"
    with pytest.raises(ImgtoolError, match="no such repository") as fault:
        buckets.open("hf://datasets/ann/photos").list()
    assert "HF_TOKEN" in fault.value.hint
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert len(buckets.open("hf://datasets/ann/photos").list()) == 3
    with pytest.raises(ImgtoolError, match="no branch, tag or commit v2"):
        buckets.open("hf://datasets/ann/photos@v2").list()
    with pytest.raises(ImgtoolError, match="only to who asked") as fault:
        buckets.open("hf://datasets/ann/gated").list()
    assert f"{photos.url}/datasets/ann/gated" in fault.value.hint
    for bad in ("hf://gpt2", "hf://buckets/ann/b"):
        with pytest.raises(ImgtoolError) as fault:
            buckets.open(bad)
        assert fault.value.code == USAGE
