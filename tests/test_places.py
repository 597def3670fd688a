"""URLs where a folder is named: what is read is a copy, what is written is sent, all shown as URLs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli

from imgtool import names, places
from imgtool.engines.deblur.settings import Infer, Train
from imgtool.errors import DONE, USAGE
from imgtool.settings import Fetch, make, to_toml


def test_urls_are_known_in_paths_words_and_tuples() -> None:
    settings = Train(photos=("s3://b/photos", "photos"), out="gs://b/run", weights="https://h/w.safetensors")
    assert places.urls(settings) == {
        "out": ["gs://b/run"], "weights": ["https://h/w.safetensors"], "photos": ["s3://b/photos"],
    }  # fmt: skip
    assert places.urls(Train(photos=("s3", "./s3/b", "https.jpg"))) == {}


def test_photos_of_infer_and_what_is_fetched_are_left_to_them() -> None:
    settings = Infer(inputs=("s3://b/x.jpg",), out="s3://b/y", weights="s3://b/w.safetensors")
    assert places.urls(settings) == {"weights": ["s3://b/w.safetensors"]}
    assert places.urls(Fetch(url="s3://b/x", out="y")) == {}


def test_a_record_has_urls_with_all_their_slashes(tmp_path: Path) -> None:
    names.call(tmp_path / "copy", "hf://datasets/a/b")
    settings = Train(photos=("s3://b/photos", tmp_path / "copy" / "sub"), weights=str(tmp_path / "copying"))
    table = tomli.loads(to_toml(settings, "train", "deblur"))["train"]["deblur"]
    assert table["photos"] == ["s3://b/photos", "hf://datasets/a/b/sub"]
    assert table["weights"] == str(tmp_path / "copying")  # another name that begins alike
    assert make(Train, table, "record").photos[0] == Path("s3:/b/photos")


# --- with a server --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket(photographs: Path) -> Iterator[dict[str, str]]:
    """A bucket of a loopback server with photographs; gives what a command's environment needs."""
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("obstore")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    given = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }
    client = boto3.client(
        "s3", endpoint_url=given["AWS_ENDPOINT_URL"], region_name="us-east-1",
        aws_access_key_id="test", aws_secret_access_key="test",
    )  # fmt: skip
    client.create_bucket(Bucket="work")
    for path in photographs.iterdir():
        client.upload_file(str(path), "work", f"photos/{path.name}")
    yield given
    server.stop()


def run(bucket: dict[str, str], here: Path, *words: str) -> subprocess.CompletedProcess[str]:
    here.mkdir(parents=True, exist_ok=True)
    surroundings = os.environ | bucket | {"IMGTOOL_CACHE": str(here / "cache"), "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(
        [sys.executable, "-m", "imgtool", *words],
        capture_output=True, text=True, cwd=here, env=surroundings, check=False, timeout=300,
    )  # fmt: skip


TRAIN = "--steps 4 --epoch-steps 2 --save-every 2 --batch 2 --workers 0 --crop 32 --device cpu".split()


@pytest.mark.slow
def test_a_training_reads_from_a_bucket_and_writes_into_it(bucket: dict[str, str], tmp_path: Path) -> None:
    words = ["train", "filter", "--photos", "s3://work/photos", "-o", "s3://work/runs/a", "--json"]
    first = run(bucket, tmp_path / "one", *words, *TRAIN)
    assert first.returncode == DONE, first.stderr
    last = json.loads(first.stdout.splitlines()[-1])
    assert (last["folder"], last["weights"]) == ("s3://work/runs/a", "s3://work/runs/a/best.safetensors")
    assert "cache" not in first.stdout + first.stderr
    # Another machine, with an empty cache: what was sent is all that is needed.
    again = run(bucket, tmp_path / "two", "train", "filter", "--resume", "s3://work/runs/a", "--steps", "6")
    assert again.returncode == DONE, again.stderr
    assert "resuming s3://work/runs/a at step 4 of 6" in again.stderr
    kept = run(bucket, tmp_path / "three", "data", "fetch", "s3://work/runs/a", "-o", "run")
    assert kept.returncode == DONE, kept.stderr
    folder = tmp_path / "three/run"
    assert [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()] == [2, 4, 6]
    record = tomli.loads((folder / "settings.toml").read_text())["train"]["filter"]
    assert record["photos"] == ["s3://work/photos"]
    assert not list((tmp_path / "two/cache/outgoing").iterdir())
    taken = run(bucket, tmp_path / "four", *words, *TRAIN)
    assert taken.returncode == USAGE
    assert "error: s3://work/runs/a is not empty\nhint: go on with what is there by --resume" in taken.stderr


@pytest.mark.slow
def test_data_is_made_in_a_bucket_and_weights_are_read_from_it(
    bucket: dict[str, str], tmp_path: Path
) -> None:
    made = run(
        bucket,
        tmp_path,
        "data",
        "synth",
        "deblur",
        "s3://work/photos",
        "-o",
        "s3://work/pairs",
        "--count",
        "2",
    )
    assert made.returncode == DONE, made.stderr
    checked = run(bucket, tmp_path, "data", "check", "deblur", "s3://work/pairs")
    assert checked.returncode == DONE, checked.stderr
    absent = run(bucket, tmp_path, "data", "check", "deblur", "s3://work/nothing")
    assert absent.returncode == USAGE
    assert absent.stderr.count("error: ") == 1
    assert "s3://work/nothing" in absent.stderr


@pytest.mark.slow
def test_a_dry_run_fetches_nothing(bucket: dict[str, str], tmp_path: Path) -> None:
    told = run(
        bucket, tmp_path, "train", "filter", "--photos", "s3://work/photos", "-o", "s3://work/runs/b", "-n"
    )
    assert told.returncode == DONE, told.stderr
    assert "# photos s3://work/photos: 8 files" in told.stdout
    assert not (tmp_path / "cache").exists()
