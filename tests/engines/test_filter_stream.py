"""Streams of the filter engine: the buffer, what ends a stream, shards through the real library."""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import logging
import os
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest

from imgtool import buckets, images
from imgtool.buckets import Found, spool
from imgtool.engines.filter import data, shards, stream, symmetry
from imgtool.engines.filter.settings import Train
from imgtool.engines.filter.stream import Buffer, Limits, Place
from imgtool.errors import ImgtoolError


class Thing(NamedTuple):
    number: int
    nbytes: int = 1


def endless() -> Iterator[Thing]:
    return map(Thing, count())


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def until(true: Callable[[], bool]) -> bool:
    """Wait for what a thread does; a limit only so that a fault does not hang the tests."""
    end = time.monotonic() + 20
    while not true() and time.monotonic() < end:
        time.sleep(0.002)
    return true()


def threads() -> int:
    return sum(thread.name == "stream" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def _no_thread_survives() -> Iterator[None]:
    yield
    if threads():
        gc.collect()
    assert until(lambda: threads() == 0)


# --- the buffer ------------------------------------------------------------------------------


def test_the_first_draw_waits_for_the_least_number() -> None:
    gate = threading.Semaphore(0)

    def items() -> Iterator[Thing]:
        for number in count():
            gate.acquire()
            yield Thing(number)

    buffer = Buffer(items, Limits(3, 5))
    drawn: list[Thing] = []
    drawer = threading.Thread(target=lambda: drawn.append(buffer.draw(rng())))
    drawer.start()
    gate.release(2)
    assert until(lambda: buffer.came == 2)
    drawer.join(0.1)
    assert not drawn
    gate.release(1)
    drawer.join(20)
    assert drawn[0].number in range(3)
    gate.release(9)
    buffer.close()


def test_items_are_drawn_again_and_again_and_the_oldest_goes() -> None:
    buffer = Buffer(endless, Limits(4, 4))
    assert sorted(item.number for item in buffer.all()) == [0, 1, 2, 3]
    random = rng()
    seen = [buffer.draw(random).number for _ in range(4)]
    assert set(seen) <= {0, 1, 2, 3}
    assert until(lambda: buffer.came == 5)  # as many draws as items: one more may come
    assert sorted(item.number for item in buffer.all()) == [1, 2, 3, 4]
    assert (buffer.came, buffer.drawn) == (5, 4)
    buffer.close()


def test_draws_are_spread_over_what_is_held() -> None:
    buffer = Buffer(lambda: map(Thing, range(10)), Limits(10, 20))
    random = rng()
    counts = np.bincount([buffer.draw(random).number for _ in range(2000)], minlength=10)
    assert counts.min() > 140
    assert buffer.drawn / buffer.came == 200
    buffer.close()


def test_full_it_waits_between_items() -> None:
    buffer = Buffer(endless, Limits(1, 2, delay=60))
    for _ in range(50):
        buffer.draw(rng())
    assert until(lambda: buffer.came == 2)
    buffer.draw(rng())
    assert buffer.came == 2
    buffer.close()


def test_memory_limits_it_too() -> None:
    buffer = Buffer(lambda: (Thing(number, 10) for number in count()), Limits(100, 200, budget=35))
    assert buffer.draw(rng()).number in range(4)  # though there are not 100
    assert until(lambda: buffer.came == 4)
    for _ in range(20):
        buffer.draw(rng())
    assert until(lambda: len(buffer.all()) == 3)
    buffer.close()


def test_what_ends_comes_whole() -> None:
    buffer = Buffer(lambda: map(Thing, range(3)), Limits(10, 10))
    assert [item.number for item in buffer.all()] == [0, 1, 2]
    buffer.close()


def test_an_empty_stream_is_an_error() -> None:
    with pytest.raises(ImgtoolError, match="holds no pictures"):
        Buffer(lambda: iter(()), Limits(1, 2)).draw(rng())


@pytest.mark.parametrize("after", [0, 5])
@pytest.mark.parametrize("fault", [ImgtoolError("gone", "look"), ZeroDivisionError("a bug")])
def test_a_fault_of_the_source_meets_the_next_draw(after: int, fault: Exception) -> None:
    gate = threading.Event()

    def items() -> Iterator[Thing]:
        yield from map(Thing, range(after))
        assert gate.wait(20)
        raise fault

    buffer = Buffer(items, Limits(2, 10))
    if after:
        assert buffer.draw(rng()).number < after
    gate.set()
    assert until(lambda: not threads())
    with pytest.raises(type(fault)) as met:
        buffer.draw(rng())
    assert met.value is fault


@pytest.mark.parametrize("held", [0, 5])
def test_a_source_that_says_nothing_is_given_up(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PATIENCE", 0.05)
    gate, silent = threading.Event(), threading.Event()

    def items() -> Iterator[Thing]:
        yield from map(Thing, range(held))
        silent.set()
        gate.wait(20)

    buffer = Buffer(items, Limits(2, 10))
    assert silent.wait(20)
    time.sleep(0.06)
    with pytest.raises(ImgtoolError, match=r"no picture for 0\.05 seconds") as fault:
        buffer.draw(rng())
    assert fault.value.hint
    gate.set()


def test_who_draws_slowly_is_not_told_that_the_source_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PATIENCE", 0.05)
    buffer = Buffer(endless, Limits(2, 4))
    assert until(lambda: buffer.came == 4)
    time.sleep(0.12)
    assert buffer.draw(rng()).number < 4
    buffer.close()


@pytest.mark.parametrize("closed", [True, False])
def test_the_thread_ends_with_the_buffer(closed: bool) -> None:
    buffer = Buffer(endless, Limits(1, 2))
    buffer.draw(rng())
    assert threads() == 1
    if closed:
        buffer.close()
    del buffer
    gc.collect()
    assert until(lambda: threads() == 0)


# --- passes ----------------------------------------------------------------------------------


def png(tone: int, size: int = 24) -> bytes:
    blocks = np.random.default_rng(tone).integers(0, 256, (size // 8, size // 8, 3), np.uint8)
    picture = np.kron(blocks, np.ones((8, 8, 1), np.uint8))
    picture[0, 0] = tone
    return bytes(cv2.imencode(".png", picture)[1])


def tones(pictures: list[stream.Picture]) -> list[int]:
    return [int(picture.pixels[0, 0, 0]) for picture in pictures]


def told(monkeypatch: pytest.MonkeyPatch, passes: Callable[[int | None], list[bytes]]) -> None:
    def encoded(place: Place, seed: int | None = None) -> Iterator[tuple[str, bytes]]:
        return ((f"{number}.png", content) for number, content in enumerate(passes(seed)))

    monkeypatch.setattr(stream, "encoded", encoded)


def test_single_pictures_that_cannot_be_read_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, lambda seed: [png(1), *[b"torn"] * 19, png(2), *[b""] * 19, png(3)])
    assert tones(list(stream.once(Place("x")))) == [1, 2, 3]


def test_nothing_but_unreadable_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, lambda seed: [png(1), *[b"torn"] * 20, png(2)])
    with pytest.raises(
        ImgtoolError, match=r"20 pictures of the stream in a row cannot be read: 20\.png is not"
    ):
        list(stream.once(Place("x")))


def test_pictures_that_are_held_out_are_left_out_in_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    told(
        monkeypatch,
        lambda seed: [png(tone) for tone in ([1, 2, 3, 4] if seed is None or seed % 2 else [4, 3, 2, 1])],
    )
    held = stream.first(Place("x"), 2)
    assert tones(held) == [1, 2]
    passes = stream.endless(Place("x"), 6, {picture.digest for picture in held})
    assert tones([next(passes) for _ in range(6)]) == [4, 3, 3, 4, 4, 3]


def test_a_pass_without_pictures_ends_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, lambda seed: [png(1)] if seed == 0 else [])
    pictures = stream.endless(Place("x"), 0)
    assert tones([next(pictures)]) == [1]
    with pytest.raises(ImgtoolError, match="holds no pictures to train on"):
        next(pictures)


def test_samples_of_a_stream_show_none_of_its_held_out_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, lambda seed: [png(tone) for tone in range(9)])
    settings = Train(
        stream="x", target="sobel_3", crop=24, held_out=3, batch=4, workers=0, buffer_min=4, buffer_max=6,
        validate_on=(),
    )  # fmt: skip
    train, held = data.load(settings)
    assert {int(held[number].seen[0, 4, 4]) for number in range(3)} == {0, 1, 2}
    train.shape = dataclasses.replace(train.shape, symmetries=symmetry.Symmetries())
    seen: list[int] = []
    # Fewer are held at a time: it goes on, when the thread that reads has its turn.
    assert until(lambda: seen.append(int(train[len(seen)].seen[0, 4, 4])) or {*seen} >= {3, 4, 5, 6, 7, 8})
    assert {*seen} == {3, 4, 5, 6, 7, 8}
    about = data.describe(train)
    assert about["stream"] == "x"
    assert about["echo"] == len(seen) / about["pictures"] >= 1


def test_with_photos_to_validate_on_a_stream_is_not_read_before_the_first_draw(
    photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told(monkeypatch, lambda seed: [][1])  # which fails
    train, held = data.load(
        Train(stream="x", target="sobel_3", crop=32, validate_on=(photographs,), workers=0)
    )
    assert held[0].wanted.shape == (1, 32, 32)
    with pytest.raises(IndexError):
        train[0]


# --- where from ------------------------------------------------------------------------------


def test_words_for_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/1.tar", "a/b/2.tar", "p/1.parquet", "p/readme.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    assert shards.listed("a") == ["a/1.tar", "a/b/2.tar"]
    assert shards.listed("a/1.tar") == ["a/1.tar"]
    assert shards.listed("p/*.parquet") == ["p/1.parquet"]
    assert shards.listed("https://x.org/a-{008..010}.tar?k=v.w") == [
        f"https://x.org/a-{number}.tar?k=v.w" for number in ("008", "009", "010")
    ]
    assert shards.listed("imagenet-1k") == []
    assert shards.listed("someone/pictures:small") == []


@pytest.mark.parametrize(
    "words", ["gone.tar", "no/*.parquet", "/nowhere/x", ".", "file.txt", "https://x.org/y"]
)
def test_words_for_no_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("1.tar", "2.parquet", "file.txt"):
        Path(name).touch()
    with pytest.raises(ImgtoolError) as fault:
        shards.listed(words)
    assert (fault.value.code, bool(fault.value.hint)) == (2, True)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImgtoolError, match="needs the package datasets") as fault:
        stream.first(Place("imagenet-1k"), 1)
    assert fault.value.hint == "pip install 'imgtool[hf]'"


# --- the real library ------------------------------------------------------------------------


def _parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=3)


def put_parquet(folder: Path, shards: int = 2, each: int = 6) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        numbers = range(shard * each, shard * each + each)
        rows = [{"label": n, "image": {"bytes": png(n), "path": f"{n}.png"}} for n in numbers]
        _parquet(folder / f"{shard}.parquet", rows)


def put_tar(folder: Path, shards: int = 2, each: int = 6, size: int = 24) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(shard * each, shard * each + each):
                for name, content in ((f"{number:04d}.cls", b"7"), (f"{number:04d}.png", png(number, size))):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.usefixtures("library")
class TestLibrary:
    @pytest.mark.parametrize("put", [put_parquet, put_tar])
    def test_shards_give_all_their_pictures(self, tmp_path: Path, put: Callable[[Path], None]) -> None:
        put(tmp_path / "shards")
        place = Place(str(tmp_path / "shards"))
        plain = list(stream.once(place))
        assert tones(plain) == list(range(12))
        for picture in plain:
            assert np.array_equal(picture.pixels, images.read(png(int(picture.pixels[0, 0, 0]))).pixels)
        orders = {tuple(tones(list(stream.once(place, seed)))) for seed in range(6)}
        assert {tuple(sorted(order)) for order in orders} == {tuple(range(12))}
        assert len(orders) > 1
        import datasets

        assert not Path(datasets.config.HF_DATASETS_CACHE).exists()

    def test_a_column_of_bare_bytes(self, tmp_path: Path) -> None:
        _parquet(tmp_path / "a.parquet", [{"text": "x", "photo": png(n), "other": png(9)} for n in range(3)])
        assert tones(list(stream.once(Place(str(tmp_path))))) == [0, 1, 2]
        assert tones(list(stream.once(Place(str(tmp_path), column="other")))) == [9, 9, 9]
        with pytest.raises(ImgtoolError, match="has no column fotos") as fault:
            list(stream.once(Place(str(tmp_path), column="fotos")))
        assert (fault.value.code, fault.value.hint) == (2, "it has: text, photo, other")

    def test_a_column_of_the_kind_image(self, tmp_path: Path) -> None:
        import datasets

        features = datasets.Features({"blob": datasets.Value("binary"), "image": datasets.Image()})
        rows = {"blob": [b"x"], "image": [{"bytes": png(5), "path": None}]}
        datasets.Dataset.from_dict(rows, features).to_parquet(str(tmp_path / "a.parquet"))
        assert tones(list(stream.once(Place(str(tmp_path))))) == [5]

    def test_no_column_of_pictures(self, tmp_path: Path) -> None:
        _parquet(tmp_path / "a.parquet", [{"text": "x"}])
        with pytest.raises(ImgtoolError, match="has no column of pictures"):
            stream.first(Place(str(tmp_path)), 1)

    @pytest.mark.parametrize("put", [put_parquet, put_tar])
    def test_a_damaged_shard_is_an_error(self, tmp_path: Path, put: Callable[[Path], None]) -> None:
        put(tmp_path)
        path = sorted(tmp_path.iterdir())[1]
        whole = path.read_bytes()
        path.write_bytes(whole[: whole.index(b"\x89PNG", len(whole) // 4) + 100])
        with pytest.raises(ImgtoolError, match=f"the stream {tmp_path} failed: .+") as fault:
            list(stream.once(Place(str(tmp_path))))
        assert "shards are whole" in fault.value.hint

    @pytest.mark.parametrize(
        ("kind", "hint"),
        [
            ("DatasetNotFoundError", "hf auth login"),
            ("DataFilesNotFoundError", "answers"),
            ("FileFormatError", "whole"),
        ],
    )
    def test_what_the_library_raises_is_told(
        self, kind: str, hint: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import datasets

        def load(*rest: Any, **more: Any) -> Any:
            raise getattr(datasets.exceptions, kind)("Dataset 'a/b' is a gated one.\nVisit its page.")

        monkeypatch.setattr(datasets, "load_dataset", load)
        with pytest.raises(
            ImgtoolError, match="the stream a/b failed: Dataset 'a/b' is a gated one"
        ) as fault:
            stream.first(Place("a/b"), 1)
        assert hint in fault.value.hint

    def test_a_name_goes_to_the_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets

        asked: list[Any] = []

        def load(path: str, name: str | None, split: str, **more: Any) -> Any:
            asked.append((path, name, split, more["streaming"]))
            return datasets.Dataset.from_dict({"image": [png(4)]}).to_iterable_dataset()

        monkeypatch.setattr(datasets, "load_dataset", load)
        place = Place("some/set:small", "validation")
        assert tones(stream.first(place, 3)) == [4]
        assert asked == [("some/set", "small", "validation", True)]
        passes = stream.endless(place, 0)
        assert tones([next(passes) for _ in range(3)]) == [4, 4, 4]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_samples_from_a_stream(self, tmp_path: Path, workers: int) -> None:
        from torch.utils.data import DataLoader

        put_tar(tmp_path)
        settings = Train(
            stream=str(tmp_path), target="sobel_3", crop=16, held_out=3, batch=4, workers=workers,
            buffer_min=4, buffer_max=6,
        )  # fmt: skip
        train, held = data.load(settings)
        before = [{picture.photo.tobytes() for picture in source.held} for source in held.sources]
        assert {int(picture.photo[0, 0, 0]) for picture in held.sources[0].held} == {0, 1, 2}
        (source,) = train.sources
        loader = DataLoader(train, 4, sampler=range(80), num_workers=workers)
        batches = list(loader)
        assert len(batches) == 20
        assert batches[0].seen.shape == (4, 3, 24, 24)
        about = data.describe(train)
        assert about["stream"] == str(tmp_path)
        assert int(source.counts[:, 1].sum()) == 80
        assert about["echo"] == 80 / about["pictures"] >= 1
        if not workers:
            drawn = {picture.photo.tobytes() for picture in source._buffer[1].all()}
            assert not drawn & before[0]
            source._buffer[1].close()


# --- a source that dies ----------------------------------------------------------------------

SERVER = """
import functools, http.server, io, os, re, socket, sys

class Server(http.server.ThreadingHTTPServer):
    def server_bind(self):
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        super().server_bind()

class Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def send_head(self):
        asked = re.fullmatch(r"bytes=(\\d+)-(\\d*)", self.headers.get("Range", ""))
        path = self.translate_path(self.path)
        if not asked or not os.path.isfile(path):
            return super().send_head()
        size = os.path.getsize(path)
        start, end = int(asked[1]), min(int(asked[2] or size - 1), size - 1)
        with open(path, "rb") as file:
            file.seek(start)
            content = file.read(end - start + 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return io.BytesIO(content)
    def log_message(self, *rest):
        pass

address = ("127.0.0.1", int(sys.argv[2]))
server = Server(address, functools.partial(Handler, directory=sys.argv[1]))
print("listens", flush=True)
server.serve_forever()
"""


@pytest.fixture
def port() -> Iterator[int]:
    """A port that is nobody else's while no server listens, nor a client's that would meet itself."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def serve(folder: Path, port: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(folder), str(port)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "listens\n"
    return process


def imgtool(folder: Path, *words: str) -> subprocess.Popen[str]:
    environment = os.environ | {
        "IMGTOOL_CACHE": str(folder / "cache"),
        "HF_HOME": str(folder / "hf"),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "imgtool", *words],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_shards_that_are_stopped_begin_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Coming:
        def __init__(self, url: str, folder: Path) -> None:
            seen.append(url)

        def stop(self) -> None:
            seen.append("stopped")

    monkeypatch.setattr(shards, "_Coming", Coming)
    monkeypatch.setattr(shards.atexit, "unregister", lambda _: seen.append("left"))
    coming = shards._Shards(["a", "b"], tmp_path)
    with shards._at_the_latest(coming.stop):
        coming.begin(0)
    coming.begin(1)
    assert seen == ["a", "stopped", "left"]  # not left to the end of the process before it is done


def test_shards_in_buckets_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bucket:
        def __init__(self, url: str) -> None:
            self.base = url.rstrip("/")

        def list(self) -> list[Found]:
            return [Found(path) for path in ("b/2.tar", "a/1.tar", "a/notes.txt", "c.parquet")]

        def url(self, path: str) -> str:
            return f"{self.base}/{path}"

    monkeypatch.setattr(buckets, "open", Bucket)
    assert shards.listed("s3://x/set/*/*.tar") == ["s3://x/set/a/1.tar", "s3://x/set/b/2.tar"]
    assert shards.listed("gs://x/{1..2}/*/*.tar")[:2] == ["gs://x/1/a/1.tar", "gs://x/1/b/2.tar"]
    for words in ("s3://x/set", "hf://datasets/u/n/*.tar"):  # of two kinds, and none
        with pytest.raises(ImgtoolError) as fault:
            shards.listed(words)
        assert fault.value.code == 2


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], str]]:
    """A real server of S3, and what puts files into a bucket of it and tells its URL."""
    pytest.importorskip("obstore")
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    told = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "me", "SECRET_ACCESS_KEY": "secret"}
    for name, value in told.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("IMGTOOL_CACHE", str(tmp_path / "cache"))
    client = boto3.client("s3", region_name="us-east-1")

    def put(folder: Path) -> str:
        name = f"set{os.urandom(6).hex()}"  # servers of one process share their buckets
        client.create_bucket(Bucket=name)
        for path in folder.iterdir():
            client.put_object(Bucket=name, Key=f"shards/{path.name}", Body=path.read_bytes())
        return f"s3://{name}"

    yield put
    server.stop()


@pytest.mark.slow
def test_shards_in_a_bucket_come_one_after_the_other(
    tmp_path: Path, bucket: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        path = tmp_path / "in" / f"{number}.tar"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"%d" % number * 100)
    url = bucket(tmp_path / "in")
    cache, moved = tmp_path / "cache" / "streams", []
    old = spool.make(cache / "old", {})  # of a process that was killed
    os.close(old)
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun says
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    urls = [f"{url}/shards/{number}.tar" for number in (2, 0, 1)]
    for number, (path,) in zip((2, 0, 1), shards.arriving(urls, lambda: moved.append(1)), strict=True):
        assert Path(path).read_bytes() == b"%d" % number * 100
        assert len(list(cache.iterdir())) == 1
        assert len(list(cache.rglob("*.tar"))) <= 2
    assert moved
    assert not list(cache.iterdir())
    coming = shards.arriving([urls[1], f"{url}/gone.tar"], lambda: None)
    next(coming)
    with pytest.raises(ImgtoolError, match=r"/gone\.tar failed: there is nothing at"):
        next(coming)
    coming = shards.arriving(urls[:2], lambda: None)
    next(coming)
    coming.close()  # and nothing is left of it
    assert not list(cache.iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_from_a_bucket_trains(tmp_path: Path, bucket: Callable[[Path], str], workers: int) -> None:
    put_tar(tmp_path / "shards")
    url = bucket(tmp_path / "shards")
    run = imgtool(
        tmp_path, "train", "filter", "--stream", f"{url}/shards/*.tar", "--target", "sobel_3",
        "--crop", "16", "--held-out", "3", "--batch", "4", "--steps", "40", "--epoch-steps", "20",
        "--buffer-min", "4", "--buffer-max", "6", "--workers", str(workers), "--device", "cpu",
        "--threads", "1", "-o", "run",
    )  # fmt: skip
    _, err = run.communicate(timeout=400)
    assert run.returncode == 0, err
    assert f'stream = "{url}/shards/*.tar"' in (tmp_path / "run" / "settings.toml").read_text()
    assert not list((tmp_path / "cache" / "buckets").glob("**/*.tar"))
    assert workers or not list((tmp_path / "cache" / "streams").iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("put", "workers"), [(put_tar, 1), (put_parquet, 0)])
def test_a_source_that_is_killed_leaves_a_checkpoint(
    tmp_path: Path, port: int, put: Callable[[Path], None], workers: int
) -> None:
    pytest.importorskip("aiohttp")
    put(tmp_path / "shards")
    suffix = "tar" if put is put_tar else "parquet"
    server = serve(tmp_path / "shards", port)
    log = tmp_path / "run" / "log.jsonl"
    try:
        run = imgtool(
            tmp_path, "train", "filter", "--stream", f"http://127.0.0.1:{port}/{{0..1}}.{suffix}",
            "--target", "sobel_3", "--crop", "16", "--held-out", "3", "--batch", "4", "--steps", "1000000",
            "--epoch-steps", "20", "--buffer-min", "4", "--buffer-max", "6", "--workers", str(workers),
            "--device", "cpu", "--threads", "1", "-o", "run",
        )  # fmt: skip
        end = time.monotonic() + 400
        while not (log.exists() and log.read_text()) and run.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        server.kill()
        _, err = run.communicate(timeout=400)
    finally:
        server.kill()
        server.communicate()
    assert run.returncode == 1, err
    assert err.count("error: ") == 1
    assert f"error: the stream http://127.0.0.1:{port}/" in err
    assert "--resume run" in err.splitlines()[-1]
    assert "Traceback" not in err

    images.write(tmp_path / "photo.png", images.Photo(images.read(png(3, 64)).pixels))
    used = imgtool(
        tmp_path, "infer", "filter", "photo.png", "--weights", "run/best.safetensors", "-o", "x.png"
    )
    assert used.communicate(timeout=400)[1].count("error") == 0
    assert images.read(tmp_path / "x.png").pixels.shape == (64, 64, 3)

    steps = json.loads(log.read_text().splitlines()[-1])["step"]
    server = serve(tmp_path / "shards", port)
    try:
        again = imgtool(
            tmp_path, "train", "filter", "--resume", "run", "--steps", str(steps + 100), "--device", "cpu",
        )  # fmt: skip
        err = again.communicate(timeout=400)[1]
    finally:
        server.kill()
        server.communicate()
    assert again.returncode == 0, err
    assert json.loads(log.read_text().splitlines()[-1])["step"] == steps + 100
