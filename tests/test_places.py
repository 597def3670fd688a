"""URLs where a folder is named: what is read is a copy, what is written is sent, all shown as URLs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli

from imgtool import buckets, cli, names, places
from imgtool.console import Console
from imgtool.engines.deblur.settings import Infer, Train
from imgtool.errors import DONE, USAGE, ImgtoolError
from imgtool.settings import Fetch
from imgtool.settings.sources import make, to_toml
from imgtool.train import portable


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


def test_no_password_or_signature_is_shown_or_recorded(tmp_path: Path) -> None:
    url = "https://ann:p@ss@host/photos?signature=TOKEN"
    names.call(tmp_path / "of-ann", url)
    settings = Train(photos=(tmp_path / "of-ann",), weights=str(tmp_path / "of-ann"))
    (tmp_path / "of-ann").mkdir()
    kept = [
        to_toml(settings, "train", "deblur"),
        str(portable(settings)),
        names.shown(f"in {tmp_path}/of-ann/1.jpg"),
    ]
    assert [text for text in kept if "p@ss" in text or "TOKEN" in text] == []
    assert portable(settings)["photos"] == ["photos"]
    assert portable(settings)["weights"] == "photos"
    assert kept[2] == "in https://host/photos/1.jpg"


def test_a_name_within_another_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names.call("cache/b", "s3://b")
    text = f"{tmp_path}/cache/b/1.jpg and {tmp_path}/cache/bb and /home{tmp_path}/cache/b"
    assert names.shown(text) == f"s3://b/1.jpg and {tmp_path}/cache/bb and /home{tmp_path}/cache/b"


def test_rank_is_of_torchrun_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")  # as an array of jobs may set it
    assert (names.many(), names.rank()) == (False, 0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert (names.many(), names.rank()) == (True, 3)


SECRET = "https://ann:pw123@host/x.toml?sig=SECRET"


def _dry(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.run([*words.split(), "-n"]) == DONE, capsys.readouterr().err
    out, err = capsys.readouterr()
    assert [text for text in (out, err) if "pw123" in text or "SECRET" in text] == []
    return out


def test_a_dry_run_prints_no_password_or_signature(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(places, "_listed", lambda url: [])
    told = _dry(f"data fetch {SECRET} -o x", capsys)
    assert "# left out: names, passwords and queries in URLs of url\n" in told
    assert tomli.loads(told)["data"]["fetch"] == Fetch(url="https://host/x.toml", out="x").model_dump(
        mode="json"
    )
    assert _dry("data fetch https://host/x.toml -o x", capsys) == told.replace(
        "# left out: names, passwords and queries in URLs of url\n", ""
    )
    (record,) = map(json.loads, _dry(f"data fetch {SECRET} -o x --json", capsys).splitlines())
    assert record["plan"]["left out"].endswith("of url")
    told = _dry(f"train filter --photos {SECRET} --photos s3://b/p -o s3://b/x", capsys)
    assert tomli.loads(told)["train"]["filter"]["photos"] == ["https://host/x.toml", "s3://b/p"]
    told = _dry(f"data check deblur {SECRET}", capsys)
    assert tomli.loads(told)["data"]["check"]["deblur"]["folder"] == "https://host/x.toml"


@pytest.mark.parametrize("by", ["-c", "IMGTOOL_CONFIG"])
def test_settings_may_be_elsewhere(
    by: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked: list[str] = []

    def mirror(url: str, console: object) -> Path:
        asked.append(url)
        return tmp_path / "copy.toml"

    (tmp_path / "copy.toml").write_text('[data.fetch]\nout = "of-the-file"')
    monkeypatch.setattr(places, "mirror", mirror)
    words = ["data", "fetch", "s3://b/x", "-n"]
    if by == "-c":
        words += [by, "s3://out/run1/settings.toml"]
    else:
        monkeypatch.setenv(by, "s3://out/run1/settings.toml")
    assert cli.run(words) == DONE
    assert asked == ["s3://out/run1/settings.toml"]
    assert 'out = "of-the-file"' in capsys.readouterr().out


def test_a_place_is_free_once_its_process_is_gone(tmp_path: Path) -> None:
    """Workers that load samples are forks, and outlive a process that is killed."""
    pytest.importorskip("fcntl")
    script = f"""
import os, sys, time
from pathlib import Path
from imgtool import places
with places._alone(Path({str(tmp_path)!r})) as free:
    if os.fork() == 0:
        sys.stdin.read()
        os._exit(0)
    print(free, flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "True\n"
        with places._alone(tmp_path) as free:
            assert not free
        child.kill()
        child.wait()
        with places._alone(tmp_path) as free:
            assert free


class Refusing:
    """A place that holds nothing and takes nothing."""

    def __init__(self, url: str) -> None: ...

    def list(self) -> list[Any]:
        return []

    def write(self, source: Path, path: str) -> None:
        raise buckets.Denied("no permission to write", "ask who owns the bucket")


def test_what_could_not_be_sent_stays_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMGTOOL_CACHE", str(tmp_path))
    monkeypatch.setattr(buckets, "open", Refusing)
    settings = Train(photos=(tmp_path,), out=Path("s3://b/runs/a"))

    def work() -> None:
        with places.local(settings, Console(quiet=True)) as here:
            Path(here.out).mkdir()
            Path(here.out, "last.pt").write_bytes(b"a state")

    with pytest.raises(ImgtoolError, match="no permission to write") as caught:
        work()
    (left,) = tmp_path.glob("outgoing/*/a/last.pt")
    assert left.read_bytes() == b"a state"
    assert str(left.parent.parent) in caught.value.hint


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


def run(bucket: dict[str, str], here: Path, *words: str, many: int = 0) -> subprocess.CompletedProcess[str]:
    here.mkdir(parents=True, exist_ok=True)
    surroundings = os.environ | bucket | {"IMGTOOL_CACHE": str(here / "cache"), "OMP_WAIT_POLICY": "PASSIVE"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={many}"] if many else []
    return subprocess.run(
        [sys.executable, *torchrun, "-m", "imgtool", *words],
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
    # Two processes, which share one copy of the run.
    two = run(
        bucket, tmp_path / "five", "train", "filter", "--resume", "s3://work/runs/a", "--steps", "8", many=2
    )
    assert two.returncode == DONE, two.stderr
    assert two.stderr.count("resuming s3://work/runs/a at step 6 of 8") == 1
    assert not list((tmp_path / "five/cache/outgoing").iterdir())
    taken = run(bucket, tmp_path / "four", *words, *TRAIN)
    assert taken.returncode == USAGE
    assert "error: s3://work/runs/a is not empty\nhint: go on with what is there by --resume" in taken.stderr


@pytest.mark.slow
def test_where_something_lies_all_processes_end_with_one_error(
    bucket: dict[str, str], tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    words = ["train", "filter", "--photos", "s3://work/photos", "-o", "s3://work/photos", *TRAIN]
    given = os.environ | bucket | meeting | {"IMGTOOL_CACHE": str(tmp_path), "WORLD_SIZE": "2"}
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "imgtool", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
            env=given | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"},
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        told = "".join(each.communicate(timeout=300)[1] for each in both)
    finally:
        for each in both:
            with each:
                each.kill()
    assert [each.returncode for each in both] == [USAGE, USAGE], told
    assert told.count("error: ") == told.count("error: s3://work/photos is not empty") == 1
    assert not list(tmp_path.glob("outgoing/*/photos"))


@pytest.mark.slow
def test_a_run_killed_before_anything_was_sent_goes_on(bucket: dict[str, str], tmp_path: Path) -> None:
    words = ["train", "filter", "--photos", "s3://work/photos", "-o", "s3://work/runs/killed", *TRAIN]
    words += ["--steps", "100000"]
    surroundings = os.environ | bucket | {"IMGTOOL_CACHE": str(tmp_path / "cache")}
    child = subprocess.Popen([sys.executable, "-m", "imgtool", *words], env=surroundings, cwd=tmp_path)
    while not list(tmp_path.glob("cache/outgoing/*/killed/last.pt")):
        assert child.poll() is None
        time.sleep(0.05)
    child.kill()
    child.wait()
    anew = run(bucket, tmp_path, *words)
    assert anew.returncode == USAGE
    assert "hint: go on with what is there by --resume s3://work/runs/killed" in anew.stderr
    (log,) = tmp_path.glob("cache/outgoing/*/killed/log.jsonl")
    steps = str(json.loads(log.read_text().splitlines()[-1])["step"] + 8)
    done = run(bucket, tmp_path, "train", "filter", "--resume", "s3://work/runs/killed", "--steps", steps)
    assert done.returncode == DONE, done.stderr
    assert "going on with what was not sent to s3://work/runs/killed" in done.stderr
    assert not list(tmp_path.glob("cache/outgoing/*"))
    sent = run(bucket, tmp_path, "data", "fetch", "s3://work/runs/killed", "-o", "run")
    assert sent.returncode == DONE, sent.stderr
    assert {"last.pt", "best.safetensors", "settings.toml"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("train filter --photos x --max-ms 3", "--max-ms is for a search, and there is none"),
        ("train filter --photos x --parallel 2", "--parallel is for a search, and there is none"),
        ("train filter --photos x --track-to http://127.0.0.1:1", "--track-to is for a tracker"),
    ],
)
def test_what_would_change_nothing_is_refused(
    words: str, what: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(words.split()) == USAGE
    assert what in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_torchrun_is_for_trainings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    assert cli.run(["infer", "awb", "x.dng"]) == USAGE
    assert "torchrun is for imgtool train" in capsys.readouterr().err


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
    drawn = run(bucket, tmp_path, "data", "stats", "lens", "s3://work/pairs")
    assert drawn.returncode == USAGE
    assert "nothing is written beside s3://work/pairs\nhint: name a folder by -o" in drawn.stderr
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
    assert "# parameters: " in told.stdout
    assert "# output: s3://work/runs/b" in told.stdout
    assert not (tmp_path / "cache").exists()
