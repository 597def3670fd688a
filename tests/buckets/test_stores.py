"""Buckets of S3 (moto's server) and of Google (a small server of the tests), through obstore."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError

import gcs
import pytest

from imgtool import buckets
from imgtool.buckets import Found, Interrupted, Offline, account, patience, stores
from imgtool.buckets.fetch import fetch
from imgtool.buckets.manifest import read
from imgtool.buckets.mirror import mirror
from imgtool.buckets.send import put
from imgtool.buckets.state import PIECE
from imgtool.errors import ImgtoolError

pytest.importorskip("obstore")


@pytest.fixture(autouse=True)
def _nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody is signed in, and no cloud is around."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "STORAGE_", "CLOUDSDK_", "GCE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(account, "_FIRMWARE", tmp_path)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[gcs.Bucket]:
    with gcs.serve({}) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        yield server


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(moto: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a bucket that is empty."""
    import boto3

    for name, value in {"ENDPOINT_URL": moto, "ACCESS_KEY_ID": "me", "SECRET_ACCESS_KEY": "secret"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    name = f"photos{os.urandom(6).hex()}"
    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket=name)
    return name


def _read(place: buckets.Place, found: Found) -> bytes:
    return place.read(found, 0, found.size)


def test_a_folder_of_a_bucket_is_listed_with_sizes_tags_and_hashes(bucket: gcs.Bucket) -> None:
    bucket.objects.update(
        {"p/ü #%+?.jpg": b"one", "p/q/b": b"two", "pq": b"3", "p/q/": b"", "p/": b"", "p/e": b""}
    )
    place = buckets.open("gs://bucket/p")
    listed = place.list()
    assert [(found.path, found.size) for found in listed] == [("e", 0), ("q/b", 3), ("ü #%+?.jpg", 3)]
    assert listed[1].digests == (("etag-md5", hashlib.md5(b"two").hexdigest()),)
    assert [_read(place, found) for found in listed] == [b"", b"two", b"one"]
    assert place.read(listed[1], 1, 2) == b"w"
    assert place.url("q/b") == "gs://bucket/p/q/b"
    assert [found.path for found in buckets.open("gs://bucket").list()] == [
        "p/e",
        "p/q/b",
        "p/ü #%+?.jpg",
        "pq",
    ]
    bucket.composite = True
    assert {found.digests for found in place.list()} == {()}


def test_a_single_object_is_listed_by_its_name_and_has_its_own_url(bucket: gcs.Bucket) -> None:
    bucket.objects["p/a.jpg"] = b"one"
    place = buckets.open("gs://bucket/p/a.jpg")
    (found,) = place.list()
    assert (found.path, place.url(found.path), _read(place, found)) == (
        "a.jpg",
        "gs://bucket/p/a.jpg",
        b"one",
    )
    assert buckets.open("gs://bucket/p/a.jpg/").list() == []
    assert buckets.open("gs://bucket/nothing").list() == []


def test_a_listing_of_many_pages_is_whole(bucket: gcs.Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcs, "PAGE", 10)
    bucket.objects.update({f"{number:03}": b"1" for number in range(35)})
    assert len(buckets.open("gs://bucket").list()) == 35
    assert bucket.listings == 4


def test_a_listing_that_obstore_gives_in_parts_is_whole() -> None:
    place = stores.open("gs://bucket/p")
    row = {"size": 1, "e_tag": None, "last_modified": datetime(2026, 1, 1)}
    parts = [[row | {"path": f"p/{part}-{number}"} for number in range(2)] for part in range(3)]
    place.__dict__["_patient"] = SimpleNamespace(list=lambda *_, **__: iter(parts))
    assert [found.path for found in place.list()] == ["0-0", "0-1", "1-0", "1-1", "2-0", "2-1"]


def test_what_is_written_is_there(bucket: gcs.Bucket, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"one")
    place = buckets.open("gs://bucket/out")
    place.write(tmp_path / "a.jpg", "x/a.jpg")
    assert bucket.objects == {"out/x/a.jpg": b"one"}
    with pytest.raises(ImgtoolError, match="no such file"):
        place.write(tmp_path / "b.jpg", "x/b.jpg")


def test_a_server_that_is_busy_when_something_is_written_is_asked_again(
    bucket: gcs.Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "RETRIES", 0)
    monkeypatch.setattr(patience, "WAITS", (0.0, 0.0))
    (tmp_path / "a").write_bytes(b"one")
    bucket.busy = 1
    with pytest.raises(Interrupted, match="no answer from gs://bucket/a: 503"):
        buckets.open("gs://bucket").write(tmp_path / "a", "a")
    bucket.busy = 2
    put(buckets.open("gs://bucket"), tmp_path / "a", "a")
    assert bucket.objects == {"a": b"one"}
    bucket.busy = 9
    with pytest.raises(Offline):
        put(buckets.open("gs://bucket"), tmp_path / "a", "a")


ODD = ["p/x//y", "p/./y", "p/../y", "p/t//", "p//z"]
"""Names that are no paths, at which obstore stops."""


def test_names_that_are_no_paths_are_faults_and_all_others_are_fetched(
    bucket: gcs.Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gcs, "PAGE", 3)
    bucket.objects.update(
        dict.fromkeys(ODD, b"odd") | {"p/x/y": b"1", "p/ü #%+?&.jpg": b"2", "p/x/": b"", "q": b"3"}
    )
    record = fetch("gs://bucket/p", tmp_path)
    assert sorted(str(fault).partition(": ")[0] for fault in record["faults"]) == [  # type: ignore[attr-defined]
        "../y", "./y", "/z", "t//", "x//y",
    ]  # fmt: skip
    assert (record["files"], (tmp_path / "x/y").read_bytes()) == (2, b"1")
    known = read(tmp_path)
    assert known
    assert known.entries["ü #%+?&.jpg"].md5 == hashlib.md5(b"2").hexdigest()
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("GOOGLE_BASE_URL", bucket.url)
    assert len(buckets.open("gs://bucket/p").list()) == 7  # nobody signed in
    monkeypatch.setattr(account, "listing", lambda *given: {}["role"])
    with pytest.raises(ImgtoolError, match=r"gs://bucket/p/.* is no path") as caught:
        buckets.open("gs://bucket/p").list()
    assert "sign in by keys" in caught.value.hint


@pytest.mark.slow
def test_a_listing_of_s3_is_signed_as_amazons_own_library_does(monkeypatch: pytest.MonkeyPatch) -> None:
    auth = pytest.importorskip("botocore.auth")
    request = pytest.importorskip("botocore.awsrequest").AWSRequest
    credentials = pytest.importorskip("botocore.credentials").Credentials
    config = {
        "region": "eu-west-1",
        "access_key_id": "me",
        "secret_access_key": "secret/+",
        "session_token": "t=",
    }
    query = {"list-type": "2", "prefix": "ü a/+&=", "continuation-token": "1/+="}
    url, made = account.listing("s3", "photos", config, query)
    assert url.startswith(
        "https://s3.eu-west-1.amazonaws.com/photos?continuation-token=1%2F%2B%3D&list-type=2&"
    )
    theirs = request("GET", url, headers={name: made[name] for name in ("x-amz-content-sha256",)})
    now = datetime.strptime(made["x-amz-date"] + "+0000", "%Y%m%dT%H%M%SZ%z")
    for name in ("get_current_datetime", "datetime"):
        if hasattr(auth, name):
            fixed = (
                SimpleNamespace(datetime=SimpleNamespace(utcnow=lambda: now)) if name == "datetime" else None
            )
            monkeypatch.setattr(auth, name, fixed or (lambda remove_tzinfo=True: now))
    signer = auth.S3SigV4Auth(credentials("me", "secret/+", "t="), "s3", "eu-west-1")
    signer.add_auth(theirs)
    assert made["Authorization"] == theirs.headers["Authorization"]
    assert account.listing("s3", "photos", {"region": "x", "skip_signature": True}, {})[1] == {}
    with pytest.raises(LookupError):  # a role
        account.listing("s3", "photos", {"region": "x"}, {})
    with pytest.raises(LookupError):
        account.listing("gs", "photos", {"application_credentials": "x"}, {})


def test_a_bucket_is_asked_for_its_region_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def opened(request: Any, timeout: float) -> Any:
        asked.append(request.full_url)
        if len(asked) == 1:
            raise OSError("no network")
        raise HTTPError(request.full_url, 403, "", {"x-amz-bucket-region": "eu-west-9"}, None)  # type: ignore

    monkeypatch.setattr(account, "_REGIONS", {})
    opener = SimpleNamespace(open=opened)
    monkeypatch.setattr("urllib.request.build_opener", lambda *given: opener)
    regions = [account.s3(bucket)[0]["region"] for bucket in ("a", "a", "a", "b")]
    assert regions == ["us-east-1", "eu-west-9", "eu-west-9", "eu-west-9"]
    assert [url.rpartition("/")[2] for url in asked] == ["a", "a", "b"]


def test_a_line_that_is_cut_tells_what_had_come_and_fetching_asks_for_the_rest_alone(
    bucket: gcs.Bucket, tmp_path: Path
) -> None:
    bucket.objects["a"] = os.urandom(400_000)
    place = buckets.open("gs://bucket")
    (found,) = place.list()
    bucket.cut, bucket.cut_at = 1, 300_000
    with pytest.raises(Interrupted, match="the connection broke") as caught:
        _read(place, found)
    had = len(caught.value.got)
    assert 200_000 < had <= 300_000
    assert caught.value.got == bucket.objects["a"][:had]
    bucket.asked.clear()
    bucket.cut = 1
    assert fetch("gs://bucket", tmp_path)["faults"] == []
    assert (tmp_path / "a").read_bytes() == bucket.objects["a"]
    (_, whole), (_, rest) = bucket.asked
    begin = int(rest.removeprefix("bytes=").removesuffix("-399999"))
    assert whole == ""
    assert 200_000 < begin <= 300_000


def test_less_than_was_asked_for_is_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    place = stores.open("gs://bucket/p")
    monkeypatch.setattr(place, "_get", lambda found, options: b"12")
    for begin, end in ((0, 3), (4, 7)):
        with pytest.raises(Interrupted, match="sent 2 bytes of 3"):
            place.read(Found("a.jpg", 3), begin, end)


def test_a_busy_server_is_asked_again(bucket: gcs.Bucket, tmp_path: Path) -> None:
    bucket.objects.update({"a": b"one", "b": b"two"})
    bucket.busy = 2
    assert fetch("gs://bucket", tmp_path)["faults"] == []
    assert len(bucket.asked) == 4


def test_an_object_that_changed_since_it_was_listed_is_not_mixed(bucket: gcs.Bucket) -> None:
    bucket.objects["a"] = b"one"
    place = buckets.open("gs://bucket")
    (found,) = place.list()
    bucket.objects["a"] = b"two"
    with pytest.raises(ImgtoolError, match="gs://bucket/a has changed since it was listed"):
        place.read(found, 0, 2)
    del bucket.objects["a"]
    with pytest.raises(ImgtoolError, match="no such file: gs://bucket/a"):
        place.read(found, 0, 2)


def test_what_cannot_be_reached_is_one_line(
    bucket: gcs.Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ImgtoolError, match="no such bucket: gs://other"):
        buckets.open("gs://other/p").list()
    with pytest.raises(ImgtoolError, match="no bucket can be named 'a b'"):
        buckets.open("gs://a b/p")
    with pytest.raises(ImgtoolError, match="there is nothing at gs://bucket/nothing"):
        fetch("gs://bucket/nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(stores, "RETRIES", 0)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "127.0.0.1:1")
    with pytest.raises(Offline, match="no answer from gs://bucket/: the connection was refused") as caught:
        buckets.open("gs://bucket").list()
    assert "STORAGE_EMULATOR_HOST" in caught.value.hint


def test_a_public_bucket_is_read_without_signing_in(
    bucket: gcs.Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.objects["a"] = b"one"
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("GOOGLE_BASE_URL", bucket.url)
    place = buckets.open("gs://bucket")
    assert _read(place, place.list()[0]) == b"one"
    assert bucket.signed == {""}


def test_a_refusal_says_whether_anybody_had_signed_in(
    bucket: gcs.Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.objects["p/a"] = b"one"
    bucket.denied = ("list", "GET", "HEAD")
    with pytest.raises(ImgtoolError, match="no permission to read gs://bucket/p with the credentials given"):
        buckets.open("gs://bucket/p").list()
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("GOOGLE_BASE_URL", bucket.url)
    with pytest.raises(
        ImgtoolError, match="no permission to read gs://bucket/p without credentials"
    ) as caught:
        buckets.open("gs://bucket/p").list()
    assert "gcloud auth application-default login" in caught.value.hint
    with pytest.raises(ImgtoolError, match="no permission to read gs://bucket/p/a"):
        buckets.open("gs://bucket").read(Found("p/a", 3), 0, 3)
    bucket.denied = ("list",)  # objects of many public buckets may be read, and their names not be asked for
    assert [found.path for found in buckets.open("gs://bucket/p/a").list()] == ["a"]
    with pytest.raises(ImgtoolError, match="no permission"):
        buckets.open("gs://bucket/p").list()


def test_without_the_extra_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImgtoolError, match="s3://b needs obstore") as caught:
        buckets.open("s3://b")
    assert (caught.value.hint, caught.value.code) == ("pip install 'imgtool[cloud]'", 2)


def test_nobody_signed_in_asks_unsigned_and_waits_for_no_metadata_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert account.s3("b")[0]["skip_signature"] is True
    assert account.gs()[0] == {"skip_signature": True}
    (tmp_path / "sys_vendor").write_text("Amazon EC2\n")
    assert "skip_signature" not in account.s3("b")[0]
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert account.s3("b")[0]["skip_signature"] is True
    (tmp_path / "product_name").write_text("Google Compute Engine\n")
    assert account.gs()[0] == {}
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
    assert account.gs()[0] == {"skip_signature": True}


def test_the_files_of_the_aws_tools_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = tmp_path / "home/.aws"
    home.mkdir(parents=True)
    (home / "credentials").write_text(
        "[default]\naws_access_key_id = one\naws_secret_access_key = a%b\n[work]\naws_access_key_id=two\n"
        "aws_secret_access_key=c\naws_session_token=t\n"
    )
    (home / "config").write_text(
        "[default]\nregion = eu-west-1\nendpoint_url = http://127.0.0.1:9\n[profile work]\nregion=eu-west-3\n"
        "[profile browser]\nsso_start_url = https://example.org\nregion = eu-west-2\n"
    )
    config, client = account.s3("b")
    assert config == {
        "access_key_id": "one", "secret_access_key": "a%b", "region": "eu-west-1",
        "endpoint": "http://127.0.0.1:9",
    }  # fmt: skip
    assert client == {"allow_http": True}
    monkeypatch.setenv("AWS_PROFILE", "work")
    config, _ = account.s3("b")
    assert (config["access_key_id"], config["session_token"], config["region"]) == ("two", "t", "eu-west-3")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ImgtoolError, match="there is no AWS profile nobody"):
        account.s3("b")
    monkeypatch.setenv("AWS_PROFILE", "browser")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImgtoolError, match="the AWS profile browser holds no keys") as caught:
        account.s3("b")
    assert "export-credentials" in caught.value.hint
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")  # what is set goes before what lies in files
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    assert account.s3("b")[0] == {}


def test_what_gcloud_left_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    (tmp_path / "application_default_credentials.json").write_text("{}")
    assert account.gs()[0] == {
        "application_credentials": str(tmp_path / "application_default_credentials.json")
    }
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "mine.json"))
    assert account.gs()[0] == {}
    with pytest.raises(ImgtoolError, match=r"mine\.json"):
        buckets.open("gs://bucket").list()
    (tmp_path / "mine.json").write_text(json.dumps({"type": "external_account"}))
    with pytest.raises(ImgtoolError, match="external_account"):
        buckets.open("gs://bucket").list()


@pytest.mark.slow
def test_a_bucket_of_s3_is_fetched_whole_with_many_pages_and_parts(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    client = boto3.client("s3", region_name="us-east-1")
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "100")
    files = {f"{number:04}.jpg": os.urandom(300) for number in range(250)} | {
        "d/ü #%+?.jpg": b"1",
        "d/e": b"",
    }
    for path, data in files.items():
        client.put_object(Bucket=s3, Key=f"p/{path}", Body=data)
    client.put_object(Bucket=s3, Key="p/d/", Body=b"")
    files["big.tif"] = os.urandom(2 * PIECE + 7)
    (tmp_path / "big.tif").write_bytes(files["big.tif"])
    buckets.open(f"s3://{s3}/p").write(tmp_path / "big.tif", "big.tif")
    assert "-" in client.head_object(Bucket=s3, Key="p/big.tif")["ETag"]  # it went in parts
    record = fetch(f"s3://{s3}/p", tmp_path / "out")
    assert (record["faults"], record["fetched"]) == ([], 253)
    assert all((tmp_path / "out" / path).read_bytes() == data for path, data in files.items())
    known = read(tmp_path / "out")
    assert known
    assert known.entries["0000.jpg"].md5 == hashlib.md5(files["0000.jpg"]).hexdigest()
    assert known.entries["big.tif"].md5 == ""
    assert fetch(f"s3://{s3}/p", tmp_path / "out")["unchanged"] == 253


@pytest.mark.slow
def test_what_s3_refuses_is_one_line(s3: str) -> None:
    with pytest.raises(ImgtoolError, match="no such bucket: s3://missing"):
        buckets.open("s3://missing/p").list()
    assert buckets.open(f"s3://{s3}/p").list() == []


@pytest.mark.slow
def test_a_mirror_of_a_file_of_s3_is_the_file(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMGTOOL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.jpg").write_bytes(b"one")
    buckets.open(f"s3://{s3}/p").write(tmp_path / "a.jpg", "a.jpg")
    path = mirror(f"s3://{s3}/p/a.jpg")
    assert (path.name, path.read_bytes()) == ("a.jpg", b"one")
    assert mirror(f"s3://{s3}/p").is_dir()
