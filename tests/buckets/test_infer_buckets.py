"""``imgtool infer`` with URLs: photos are fetched, outputs sent, by the plain run and by workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import gcs
import numpy as np
import pytest

from imgtool import cli
from imgtool.buckets import account

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
