"""Many photos: parts of a batch, the dealer, the manifest, and workers that die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imgtool import cli, files
from imgtool.errors import USAGE, ImgtoolError
from imgtool.infer.listing import Job, Order
from imgtool.infer.work import Outcome
from imgtool.runner.dealer import Dealer, Hand, Lost, News
from imgtool.runner.manifest import Manifest
from imgtool.runner.shards import Shard, shard
from imgtool.runner.worker import Reply

# --- parts of a batch ------------------------------------------------------------------------


def test_a_part_is_that_of_the_checksum_of_the_path() -> None:
    # 0xCBF43926 is the check value of this CRC, of the digits from 1 to 9.
    check = 0xCBF43926
    assert [part for part in range(7) if Shard(part, 7).holds(Path("123456789"))] == [check % 7]
    assert not Shard(check % 5, 5).holds(Path("123456788"))


def test_every_photo_is_in_one_part() -> None:
    paths = [Path(f"day-{n % 5}", f"photo {n}.jpg") for n in range(400)] + [Path("\udcff.jpg")]
    parts = [[path for path in paths if Shard(part, 8).holds(path)] for part in range(8)]
    assert sorted(path for part in parts for path in part) == sorted(paths)
    assert min(map(len, parts)) > 25


@pytest.mark.parametrize("text", ["1", "2/2", "-1/2", "0/0", "a/b", "1/2/3", "0 /2", "0/", "٠/٢"])
def test_what_is_no_part(text: str) -> None:
    with pytest.raises(ImgtoolError) as caught:
        shard(text)
    assert caught.value.code == USAGE
    assert text in caught.value.what


def test_parts_and_their_files() -> None:
    assert shard("") is None
    part = shard("3/16")
    assert part == Shard(3, 16)
    assert part.named(Path("out/coefficients.csv")) == Path("out/coefficients-3-of-16.csv")


# --- the manifest ----------------------------------------------------------------------------


def item(name: str) -> files.Item:
    return files.Item(Path(name), Path(name))


def test_a_line_that_was_torn_is_left_out_and_the_next_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out" / "infer-manifest.jsonl"
    first = Manifest(path)
    first.add({"input": "a.png", "status": "begun"})
    first.add({"input": "a.png", "status": "done", "facts": {"x": np.float32(0.5)}, "row": {"k": 1.5}})
    first.add({"input": "b.png", "status": "begun"})
    first.close()
    with path.open("ab") as file:
        file.write(b'{"input": "b.png", "sta')
    second = Manifest(path)
    assert second.earlier["a.png"]["facts"] == {"x": 0.5}
    assert second.rows == {"a.png": {"k": 1.5}}
    assert [second.broken(item(name)) for name in ("a.png", "b.png", "c.png")] == [False, True, False]
    second.add({"input": "c.png", "status": "failed", "begun": True})
    second.add({"input": "d.png", "status": "failed", "begun": False})
    second.add({"input": "a.png", "status": "left out"})
    second.close()
    third = Manifest(path)
    assert [third.broken(item(name)) for name in ("a.png", "c.png", "d.png")] == [False, True, False]
    assert third.rows == second.rows
    third.close()


# --- the dealer ------------------------------------------------------------------------------


def orders(count: int) -> list[Order]:
    return [Order(Job(item(f"{n:02}.png"), None, None), {}, {}, ()) for n in range(count)]


def name(order: Order) -> str:
    return str(order.job.item.relative)


class Staff:
    """Workers that answer at once, but for photos that they die of or fail with."""

    def __init__(self, poison: Sequence[str] = (), bad: Sequence[str] = (), stillborn: int = 0) -> None:
        self.poison, self.bad, self.stillborn = poison, bad, stillborn
        self.has: dict[Hand, deque[Order]] = {}
        self.queue: deque[News] = deque()
        self.dead: set[Hand] = set()
        self.most = 0

    def hire(self) -> Hand:
        hand = Hand()
        self.has[hand] = deque()
        born = len(self.has) > self.stillborn
        self.queue.append((hand, Reply(f"w{len(self.has)}") if born else Lost("SIGKILL")))
        return hand

    def call(self, hand: Hand, more: Sequence[Order]) -> None:
        if hand in self.dead:
            return
        self.has[hand].extend(more)
        self.most = max(self.most, len(self.has[hand]))
        order = self.has[hand].popleft()
        if name(order) in self.poison:
            self.dead.add(hand)
            self.queue.append((hand, Lost("SIGKILL")))
        elif name(order) in self.bad:
            self.queue.append((hand, Reply(hand.worker, fault=ImgtoolError("bad"))))
        else:
            self.queue.append((hand, Reply(hand.worker, Outcome({"input": name(order)}))))

    def news(self, seconds: float) -> list[News]:
        return [self.queue.popleft()]

    def close(self, at_once: bool) -> None: ...


class Ledger:
    def __init__(self) -> None:
        self.done: list[str] = []
        self.wrong: dict[str, str] = {}
        self.taken: list[list[str]] = []
        self.started: list[str] = []

    def begun(self, order: Order, worker: str) -> None:
        self.started.append(name(order))

    def ended(self, order: Order, outcome: Outcome, worker: str) -> None:
        assert outcome.record["input"] == name(order)
        self.done.append(name(order))

    def failed(self, order: Order, fault: ImgtoolError, worker: str) -> None:
        self.wrong[name(order)] = fault.what

    def lost(self, worker: str, orders: Sequence[Order], reason: str) -> None:
        self.taken.append([name(order) for order in orders])

    def words(self, words: Sequence[tuple[str, str]]) -> None: ...


def test_every_photo_is_dealt_once_and_few_at_a_time() -> None:
    staff, ledger = Staff(), Ledger()
    dealer = Dealer(staff, ledger, 3)
    dealer.run(orders(40))
    assert sorted(ledger.done) == [f"{n:02}.png" for n in range(40)] == sorted(ledger.started)
    assert len(staff.has) == 3
    assert staff.most <= 4
    assert dealer.finished == 40


def test_no_more_workers_than_photos() -> None:
    staff, ledger = Staff(), Ledger()
    Dealer(staff, ledger, 8).run(orders(2))
    assert len(staff.has) == 2


def test_a_photo_that_kills_is_given_up_and_no_other_is() -> None:
    staff, ledger = Staff(poison=["03.png"]), Ledger()
    dealer = Dealer(staff, ledger, 2)
    dealer.run(orders(12))
    assert sorted(ledger.done) == [f"{n:02}.png" for n in range(12) if n != 3]
    assert ledger.wrong == {"03.png": "the process that worked on it died 3 times, perhaps for its memory"}
    assert [taken[0] for taken in ledger.taken] == ["03.png"] * 3
    assert len(ledger.taken[0]) > 1  # what else it had is done by others
    assert dealer.finished == 12


def test_two_photos_that_kill_at_the_end() -> None:
    staff, ledger = Staff(poison=["04.png", "05.png"]), Ledger()
    Dealer(staff, ledger, 2).run(orders(6))
    assert sorted(ledger.done) == [f"{n:02}.png" for n in range(4)]
    assert sorted(ledger.wrong) == ["04.png", "05.png"]


def test_a_failure_stops_dealing_where_that_is_asked_for() -> None:
    staff, ledger = Staff(bad=["01.png"]), Ledger()
    Dealer(staff, ledger, 1, fail_fast=True).run(orders(20))
    assert list(ledger.wrong) == ["01.png"]
    assert len(ledger.done) <= 3
    staff, ledger = Staff(bad=["01.png"]), Ledger()
    Dealer(staff, ledger, 1).run(orders(20))
    assert len(ledger.done) == 19


def test_workers_that_die_as_they_start() -> None:
    staff, ledger = Staff(stillborn=2), Ledger()
    Dealer(staff, ledger, 1).run(orders(3))
    assert len(ledger.done) == 3
    with pytest.raises(ImgtoolError, match="workers die before they are ready: SIGKILL"):
        Dealer(Staff(stillborn=9), Ledger(), 1).run(orders(3))


def test_a_bug_in_a_worker_is_not_hidden() -> None:
    staff = Staff()
    staff.news = lambda seconds: [(next(iter(staff.has)), Reply("w", bug="ZeroDivisionError: here"))]  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="ZeroDivisionError: here"):
        Dealer(staff, Ledger(), 1).run(orders(3))


# --- the command -----------------------------------------------------------------------------

AUTH = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "of-these-tests-alone"}
WORDS = ("infer", "filter", "in", "--target", "tv", "--device", "cpu", "--threads", "1")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, value in AUTH.items():
        monkeypatch.setenv(name, value)


def put(path: str, height: int = 24, width: int = 32) -> None:
    import cv2

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path) + height)
    tones = cv2.resize(rng.uniform(0, 255, (5, 6, 3)), (width, height), interpolation=cv2.INTER_LINEAR)
    cv2.imwrite(path, tones.astype(np.uint8))


def content(folder: str) -> dict[str, bytes]:
    """Return every file below a folder, hidden ones too, but for manifests."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*.*")}
    return {name: data for name, data in found.items() if "manifest" not in name}


def manifest(path: str = "out/infer-manifest.jsonl") -> list[dict[str, Any]]:
    return files.json_lines(Path(path)) if Path(path).exists() else []


def last(path: str = "out/infer-manifest.jsonl") -> dict[str, str]:
    return {line["input"]: line["status"] for line in manifest(path)}


def test_parts_make_the_whole(capfd: pytest.CaptureFixture[str]) -> None:
    for n in range(5):
        put(f"in/{n}/x.png", 24 + n)
    assert cli.run([*WORDS, "-o", "plain"]) == 0
    for part in range(3):
        capfd.readouterr()
        assert cli.run([*WORDS, "-o", "out", "--shard", f"{part}/3"]) == 0
    assert content("out") == content("plain")
    status = [last(f"out/infer-manifest-{part}-of-3.jsonl") for part in range(3)]
    assert sorted(name for part in status for name in part) == [f"in/{n}/x.png" for n in range(5)]
    assert not Path("plain/infer-manifest.jsonl").exists()
    assert cli.run([*WORDS, "-o", "out", "--shard", "1/3", "--skip-existing"]) == 0
    assert set(last("out/infer-manifest-1-of-3.jsonl").values()) == {"left out"}


def test_a_part_without_photos(capfd: pytest.CaptureFixture[str]) -> None:
    put("in/x.png")
    empty = next(part for part in range(2) if not Shard(part, 2).holds(Path("x.png")))
    assert cli.run([*WORDS, "-o", "out", "--shard", f"{empty}/2"]) == 0
    assert f"part {empty}/2: none of the 1 photos is in it" in capfd.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--runner", "processes", "--report", "page"], "--report needs all photos in one process"),
        (["--shard", "0/2", "--zip", "x.zip"], "--zip needs all photos in one process"),
        (["--shard", "2/2"], "--shard '2/2' is no part of a whole"),
        (["--workers", "2"], "--workers says how many processes a runner has"),
    ],
)
def test_asked_wrongly(words: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    put("in/a.png")
    assert cli.run([*WORDS, "-o", "out", *words]) == 2
    assert message in capfd.readouterr().err
    assert not Path("out").exists()


def test_streams_are_not_spread(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["infer", "filter", "-", "--target", "tv", "-o", "a.png", "--runner", "processes"]) == 2
    assert "standard input needs all photos in one process, and --runner" in capfd.readouterr().err


def test_what_is_found_from_all_photos_is_not_spread(capfd: pytest.CaptureFixture[str]) -> None:
    put("in/a.png")
    assert cli.run(["infer", "lens", "in", "-o", "out", "--group", "folder", "--shard", "0/2"]) == 2
    assert "from all photos together needs all photos in one process" in capfd.readouterr().err


def test_without_ray(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    put("in/a.png")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.run([*WORDS, "-o", "out", "--runner", "ray"]) == 2
    told = capfd.readouterr().err
    assert "--runner ray needs Ray" in told
    assert "pip install 'imgtool[ray]'" in told


# --- workers ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Return the address of a Ray cluster of this machine."""
    pytest.importorskip("ray")
    script = (
        "import os, sys, ray\n"
        "ray.init(address='local', num_cpus=2, include_dashboard=False, log_to_driver=False,"
        " logging_level='ERROR', object_store_memory=100_000_000)\n"
        "print(ray.get_runtime_context().gcs_address, flush=True)\n"
        "sys.stdin.read()\n"
        "ray.shutdown()\n"
    )
    environment = os.environ | AUTH | {"RAY_USAGE_STATS_ENABLED": "0"}
    environment["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    environment.pop("RAY_ADDRESS", None)
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    ) as process:  # fmt: skip
        assert process.stdout
        yield process.stdout.readline().strip()
        process.communicate()


@pytest.fixture(params=["processes", "ray"])
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "ray":
        monkeypatch.setenv("RAY_ADDRESS", request.getfixturevalue("cluster"))
    return str(request.param)


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Return a function that starts a command; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def call(*words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "imgtool", *WORDS, "-o", "out", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield call
    for process in started:
        with process:
            process.kill()


def until(found: Callable[[], Any]) -> Any:
    """Wait until something is found, and return it."""
    for _ in range(3000):
        value = found()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError("waited in vain")


def begun(name: str) -> list[int]:
    """Return the processes that began with a photo, one after the other."""
    lines = [line for line in manifest() if line["input"] == name and line["status"] == "begun"]
    return [int(line["worker"].rpartition(":")[2]) for line in lines]


def alive(process: int) -> bool:
    with suppress(OSError):
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z"
    return False


@pytest.mark.slow
def test_workers_do_what_the_plain_run_does(runner: str, start: Start) -> None:
    for n in range(7):
        put(f"in/{n % 2}/{n}.png", 100 + n, 90)
    Path("in/bad.png").write_bytes(b"no photo")
    words = ["--compare", "--side-by-side"]
    assert cli.run([*WORDS, *words, "-o", "plain"]) == 1
    process = start("--runner", runner, "--workers", "2", "--json", *words)
    out, err = process.communicate()
    assert process.returncode == 1
    assert content("out") == content("plain")
    *records, end = [json.loads(line) for line in out.splitlines()]
    assert {each["input"] for each in records} == {f"in/{n % 2}/{n}.png" for n in range(7)} | {"in/bad.png"}
    assert {key: end["summary"][key] for key in ("photos", "done", "failed", "left_out")} == {
        "photos": 8, "done": 7, "failed": 1, "left_out": 0,
    }  # fmt: skip
    assert end["summary"]["images_per_second"] > 0
    assert "error: in/bad.png is not an image" in err
    assert "1 of 8 failed:" in err
    assert len({line["worker"] for line in manifest() if line["status"] == "begun"}) == 2
    until(lambda: not any(alive(int(line["worker"].rpartition(":")[2])) for line in manifest()))


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_of_its_photo_loses_nothing(runner: str, start: Start) -> None:
    put("in/a.png", 1500, 2000)
    for n in range(6):
        put(f"in/b{n}.png", 40 + n)
    assert cli.run([*WORDS, "-o", "plain"]) == 0
    process = start("--runner", runner, "--workers", "2")
    os.kill(until(lambda: begun("in/a.png"))[0], signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == 0
    assert "died (" in err
    assert content("out") == content("plain")
    assert len(begun("in/a.png")) == 2
    assert set(last().values()) == {"done"}


@pytest.mark.slow
def test_a_photo_whose_workers_die_is_given_up_after_three(start: Start) -> None:
    put("in/a.png", 1500, 2000)
    put("in/b.png")
    process = start("--runner", "processes", "--workers", "1")
    for count in (1, 2, 3):
        os.kill(
            until(lambda count=count: len(begun("in/a.png")) == count and begun("in/a.png"))[-1],
            signal.SIGKILL,
        )
    out, err = process.communicate()
    assert process.returncode == 1
    assert "error: in/a.png: the process that worked on it died 3 times" in err
    assert "in/b.png -> out/b.png" in out
    assert last() == {"in/a.png": "failed", "in/b.png": "done"}
    assert list(content("out")) == ["b.png"]


@pytest.mark.slow
def test_a_driver_that_is_killed_is_gone_on_from(runner: str, start: Start) -> None:
    for n in range(30):
        put(f"in/{n:02}.png", 300, 400)
    assert cli.run([*WORDS, "-o", "plain"]) == 0
    words = ["--runner", runner, "--workers", "2"]
    process = start(*words)
    until(lambda: list(last().values()).count("done") >= 3)
    process.kill()
    process.communicate()
    workers = {int(line["worker"].rpartition(":")[2]) for line in manifest()}
    until(lambda: not any(map(alive, workers)))
    done = {name for name, status in last().items() if status == "done"}
    assert 3 <= len(done) < 30
    _, err = start(*words, "--skip-existing").communicate()
    assert content("out") == content("plain")
    assert {name for name, status in last().items() if status == "left out"} >= done
    assert set(last().values()) <= {"left out", "done"}
    assert "images/s" in err


@pytest.mark.slow
def test_an_interrupted_batch_ends_its_workers_and_says_how_to_go_on(start: Start) -> None:
    for n in range(30):
        put(f"in/{n:02}.png", 300, 400)
    process = start("--runner", "processes", "--workers", "2")
    until(lambda: list(last().values()).count("done") >= 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert "of 30 photos are done: the same command with --skip-existing goes on" in err
    assert "Traceback" not in err
    assert not any(alive(int(line["worker"].rpartition(":")[2])) for line in manifest())
    assert not [name for name in content("out") if name.startswith(".")]
    process = start("--runner", "processes", "--workers", "2", "--skip-existing")
    process.communicate()
    assert process.returncode == 0
    assert len(content("out")) == 30


@pytest.mark.slow
def test_ray_starts_for_the_batch_and_ends_with_it(start: Start) -> None:
    pytest.importorskip("ray")
    put("in/a.png")
    put("in/b.png")
    process = start("--runner", "ray", "--workers", "1")
    _, err = process.communicate()
    assert process.returncode == 0
    assert "2 photos in" in err
    assert len(content("out")) == 2
    until(lambda: not any(alive(int(line["worker"].rpartition(":")[2])) for line in manifest()))


@pytest.mark.slow
def test_no_cluster_there(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    put("in/a.png")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    process = start("--runner", "ray")
    _, err = process.communicate()
    assert process.returncode == 1
    assert "no Ray cluster at 127.0.0.1:1" in err
    assert "Traceback" not in err
