"""``imgtool infer`` with URLs: photos are fetched, outputs sent, by the plain run and by workers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import cv2
import gcs
import numpy as np
import pytest

from imgtool import cli
from imgtool.buckets import account
from imgtool.infer import batch

pytest.importorskip("obstore")

WORDS = ("infer", "filter", "--target", "tv", "--device", "cpu", "--threads", "1")


def photo(seed: int) -> bytes:
    tones = cv2.resize(np.random.default_rng(seed).uniform(0, 255, (5, 6, 3)), (40, 30 + seed))
    return bytes(cv2.imencode(".png", tones.astype(np.uint8))[1])


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[gcs.Bucket]:
    """A bucket with five photos in ``set``, of which one is none; the same photos lie in ./set."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "STORAGE_", "CLOUDSDK_", "GCE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(account, "_FIRMWARE", tmp_path)
    monkeypatch.setenv("IMGTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    photos = {f"set/{n % 2}/{n}.png": photo(n) for n in range(4)} | {"set/bad.png": b"no photo"}
    for name, data in photos.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(data)
    with gcs.serve(dict(photos)) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        yield server


def below(bucket: gcs.Bucket, folder: str) -> dict[str, bytes]:
    return {name[len(folder) :]: data for name, data in bucket.objects.items() if name.startswith(folder)}


def made() -> dict[str, bytes]:
    """Return what the plain run makes of the photos here."""
    assert cli.run([*WORDS, "set", "-o", "plain", "--side-by-side"]) == 1
    return {str(path.relative_to("plain")): path.read_bytes() for path in Path("plain").rglob("*.*")}


def spool() -> list[Path]:
    return [path for path in Path("cache").rglob("*") if path.is_file()]


def test_photos_come_from_a_bucket_and_go_to_one(
    bucket: gcs.Bucket, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = made()
    capfd.readouterr()
    words = [*WORDS, "gs://bucket/set", "-o", "gs://bucket/out/", "--side-by-side", "--json"]
    assert cli.run(words) == 1
    out, err = capfd.readouterr()
    assert below(bucket, "out/") == plain
    records = {each["input"]: each for each in map(json.loads, out.splitlines())}
    assert records["gs://bucket/set/1/1.png"]["output"] == "gs://bucket/out/1/1.png"
    assert records["gs://bucket/set/bad.png"]["error"] == "gs://bucket/set/bad.png is not an image"
    assert "side by side: gs://bucket/out/0/0-side-by-side.jpg" in err
    assert "cache" not in out + err
    assert spool() == []
    del bucket.objects["out/1/1.png"], bucket.objects["out/1/1-side-by-side.jpg"]
    assert cli.run([*words, "--skip-existing"]) == 1
    out = capfd.readouterr().out
    assert [each.get("skipped") for each in map(json.loads, out.splitlines())].count(True) == 3
    assert below(bucket, "out/") == plain
    assert cli.run(words) == 1
    assert "gs://bucket/set/0/0.png: gs://bucket/out/0/0.png exists" in capfd.readouterr().err
    assert below(bucket, "out/") == plain


def test_outputs_beside_their_photos(bucket: gcs.Bucket, capfd: pytest.CaptureFixture[str]) -> None:
    plain = made()
    assert cli.run([*WORDS, "gs://bucket/set/0", "gs://bucket/set/1/1.png"]) == 0
    assert bucket.objects["set/0/2-filter.png"] == plain["0/2.png"]
    assert bucket.objects["set/1/1-filter.png"] == plain["1/1.png"]
    capfd.readouterr()
    assert cli.run([*WORDS, "gs://bucket/set/0", "--dry-run"]) == 0  # its outputs are not inputs
    assert capfd.readouterr().out.count(" -> ") == 2
    assert cli.run([*WORDS, "gs://bucket/set/0", "-o", "gs://bucket/x/", "--zip", "x.zip"]) == 2
    assert "--zip holds files of this machine" in capfd.readouterr().err


@pytest.mark.slow
def test_workers_fetch_and_send(bucket: gcs.Bucket) -> None:
    plain = made()
    more = ["gs://bucket/set", "-o", "gs://bucket/out/", "--side-by-side", "--runner", "processes"]
    command = [sys.executable, "-W", "error", "-m", "imgtool", *WORDS, *more, "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    found = below(bucket, "out/")
    lines = [json.loads(line) for line in found.pop("infer-manifest.jsonl").splitlines()]
    assert found == plain, done.stderr
    assert {line["input"]: line["status"] for line in lines} == {
        f"gs://bucket/set/{n % 2}/{n}.png": "done" for n in range(4)
    } | {"gs://bucket/set/bad.png": "failed"}
    assert {line["output"] for line in lines} > {"gs://bucket/out/0/0.png"}
    assert spool() == []
    again = subprocess.run([*command, "--skip-existing"], capture_output=True, text=True)
    assert again.returncode == 1
    assert "gs://bucket/out/0/0.png exists, left out" in again.stderr
    assert bucket.objects["out/infer-manifest.jsonl"].count(b"left out") == 4
    assert bucket.objects["out/infer-manifest.jsonl"].count(b'"done"') == 4


# --- the table and the manifest --------------------------------------------------------------

AWB = ("infer", "awb", "--threads", "1")


def refusing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Have the bucket refuse to take what is named like this."""
    put = gcs._Handler.do_PUT

    def do_put(self: gcs._Handler) -> None:
        if name not in self.path:
            return put(self)
        self.rfile.read(int(self.headers["Content-Length"]))
        return self._error(403, "AccessDenied")

    monkeypatch.setattr(gcs._Handler, "do_PUT", do_put)


def test_a_table_that_cannot_be_sent_stays_here_and_is_told(
    bucket: gcs.Bucket, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([*AWB, "set/0", "-o", "plain"]) == 0
    capfd.readouterr()
    with monkeypatch.context() as patch:
        refusing(patch, "gains")
        words = [*AWB, "gs://bucket/set/0", "-o", "gs://bucket/out/", "--shard", "0/1"]
        assert cli.run(words) == 1
    table, told = Path("plain/gains.csv").read_bytes(), capfd.readouterr().err
    assert sorted(below(bucket, "out/")) == ["0.png", "2.png", "infer-manifest-0-of-1.jsonl"]
    (kept,) = (path for path in spool() if path.suffix == ".csv")
    assert kept.read_bytes() == table
    assert "error: no permission to write gs://bucket/out/gains-0-of-1.csv" in told
    assert f"{Path('cache/spool').absolute() / kept.parts[2]}\n" in told
    assert cli.run([*words, "--skip-existing"]) == 0  # the manifest knows the rows
    assert bucket.objects["out/gains-0-of-1.csv"] == table


def test_a_page_that_cannot_be_written_costs_no_table(
    bucket: gcs.Bucket, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("page").write_text("a file")
    assert cli.run([*AWB, "gs://bucket/set/0", "-o", "gs://bucket/out/", "--report", "page"]) == 1
    assert "cannot write page" in capfd.readouterr().err
    assert sorted(below(bucket, "out/")) == ["0.png", "2.png", "gains.csv"]
    assert spool() == []


def test_the_table_and_the_manifest_are_sent_while_the_batch_goes_on(
    bucket: gcs.Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "EVERY", 0.0)
    books = ("out/gains-0-of-1.csv", "out/infer-manifest-0-of-1.jsonl")
    seen: dict[str, list[int]] = {}
    put = gcs._Handler.do_PUT

    def do_put(self: gcs._Handler) -> None:
        table, manifest = (bucket.objects.get(name, b"") for name in books)
        seen.setdefault(unquote(self.path), [table.count(b"\n"), manifest.count(b'"done"')])
        put(self)

    monkeypatch.setattr(gcs._Handler, "do_PUT", do_put)
    assert cli.run([*AWB, "gs://bucket/set/0", "-o", "gs://bucket/out/", "--shard", "0/1"]) == 0
    assert [seen[f"/bucket/out/{name}.png"] for name in (0, 2)] == [[0, 0], [2, 1]]
    assert [bucket.objects[name].count(b"\n") for name in books] == [3, 4]
    assert spool() == []


def test_sigterm_while_a_photo_is_sent(
    bucket: gcs.Bucket, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    put = gcs._Handler.do_PUT

    def do_put(self: gcs._Handler) -> None:
        if "out/2.png" in unquote(self.path):
            os.kill(os.getpid(), signal.SIGTERM)
        put(self)

    monkeypatch.setattr(gcs._Handler, "do_PUT", do_put)
    assert cli.run([*AWB, "gs://bucket/set/0", "-o", "gs://bucket/out/"]) == 130
    told = capfd.readouterr().err
    assert "1 of 2 photos are done: the same command with --skip-existing goes on" in told
    assert "not sent" not in told
    assert [line[:4] for line in bucket.objects["out/gains.csv"].splitlines()] == [b"file", b"0.pn", b"2.pn"]
    assert spool() == []


@pytest.mark.slow
def test_a_driver_that_gets_sigterm_sends_what_it_has(bucket: gcs.Bucket) -> None:
    for n in range(40):
        bucket.objects[f"many/{n:02}.png"] = photo(n)
    bucket.latency, bucket.answers = 0.05, 30
    more = ["gs://bucket/many", "-o", "gs://bucket/out/", "--runner", "processes", "--workers", "2"]
    command = [sys.executable, "-W", "error", "-m", "imgtool", *AWB, *more]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert " -> " in child.stdout.readline()
    child.send_signal(signal.SIGTERM)
    _, told = child.communicate()
    assert child.returncode == 130, told
    assert re.search(r"of 40 photos (is|are) done: the same command with --skip-existing goes on", told)
    found = below(bucket, "out/")
    done = found["infer-manifest.jsonl"].count(b'"done"')
    assert 0 < done < 40
    assert found["gains.csv"].count(b"\n") == done + 1
    assert spool() == []
    bucket.answers = sys.maxsize
    again = subprocess.run([*command, "--skip-existing"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert bucket.objects["out/gains.csv"].count(b"\n") == 41


# --- what is there already -------------------------------------------------------------------


def test_the_page_shows_outputs_that_are_elsewhere(
    bucket: gcs.Bucket, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, "gs://bucket/set/0", "-o", "gs://bucket/out/"]
    assert cli.run(words) == 0
    made = below(bucket, "out/")
    capfd.readouterr()
    assert cli.run([*words, "--skip-existing", "--report", "page"]) == 0
    assert capfd.readouterr().err.count("exists, left out") == 2
    page = Path("page/index.html").read_text()
    assert page.count("it was there already") == 2
    assert below(bucket, "out/") == made
    assert spool() == []


def test_photos_that_are_refused_are_not_fetched(bucket: gcs.Bucket) -> None:
    bucket.objects |= {f"out/0/{n}.png": b"mine" for n in (0, 2)} | {"out/bad.png": b"mine"}
    assert cli.run([*WORDS, "gs://bucket/set", "-o", "gs://bucket/out/"]) == 1
    assert {key for key, _ in bucket.asked} == {"set/1/1.png", "set/1/3.png"}
    assert bucket.objects["out/0/0.png"] == b"mine"


def test_inputs_are_looked_at_together(bucket: gcs.Bucket, capfd: pytest.CaptureFixture[str]) -> None:
    drawn = "set/0/0-filter.png"
    bucket.objects[drawn] = photo(9)
    Path(drawn).write_bytes(photo(9))
    names = ["set/0/0.png", "set/0/*-filter.png", "set/1", "set/1/*.png", "set/1/3.png"]

    def planned(above: str) -> list[str]:
        assert cli.run([*WORDS, *(above + name for name in names), "-o", "out/", "--json", "-n"]) == 0
        outcomes = json.loads(capfd.readouterr().out)["plan"]["outputs"]
        return [outcome.removeprefix(above) for outcome in outcomes]

    assert planned("gs://bucket/") == planned("")
    assert cli.run([*WORDS, "gs://bucket/set/0/0.png", "set/0/0-filter.png", "-n"]) == 0


def test_outputs_in_the_root_of_a_bucket(bucket: gcs.Bucket) -> None:
    assert cli.run([*AWB, "gs://bucket/set/0", "-o", "gs://bucket"]) == 0
    assert {"0.png", "2.png", "gains.csv"} <= bucket.objects.keys()
    assert cli.run([*AWB, "gs://bucket/set/1/1.png", "-o", "gs://bucket"]) == 1  # there is a table
    assert cli.run([*AWB, "gs://bucket/set/1/1.png", "-o", "gs://bucket", "--skip-existing"]) == 0
    assert bucket.objects["gains.csv"].count(b"\n") == 4
