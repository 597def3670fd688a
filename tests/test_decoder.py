"""The child that decodes: files one after another, crashes, silence, forks, its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from imgtool import decoder
from imgtool.errors import ImgtoolError

TASK = "test_decoder:reverse"
CHILD = """
import json, os, sys, time
for line in sys.stdin.buffer:
    name = json.loads(line)["name"]
    if name == "crash":
        os.abort()
    if name == "interrupt":
        os.kill(os.getppid(), 14)
    if name in ("hang", "interrupt"):
        time.sleep(600)
    if name == "words":
        print("libraw: oh", flush=True)
        continue
    size = 9 if name == "short" else 3
    print(json.dumps({"facts": {"process": os.getpid()}, "bytes": size}) + "\\nabc", end="", flush=True)
    if name == "short":
        sys.exit()
"""
CRASHED = r"cannot decode (crash|words|short): decoding crashed"


def reverse(path: Path, name: str, **options: Any) -> tuple[dict[str, Any], bytes]:
    """Give a file's bytes backwards, in the child."""
    os.write(1, b"a library that speaks\n")
    if name == "fault":
        raise ImgtoolError("no good", "take another")
    if name == "large":
        raise MemoryError
    if name == "bug":
        raise LookupError("no such thing")
    if name == "endless":
        time.sleep(60)
    return {"process": os.getpid(), "name": name, **options}, path.read_bytes()[::-1]


@pytest.fixture(scope="module")
def real() -> Iterator[decoder.Decoder]:
    """The child as it is, which finds this module."""
    with pytest.MonkeyPatch.context() as patch, closing(decoder.Decoder()) as found:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        found.warm()
        yield found


@pytest.fixture
def fake() -> Iterator[decoder.Decoder]:
    """A child that goes wrong as it is told."""
    with closing(decoder.Decoder([sys.executable, "-S", "-c", CHILD])) as found:
        yield found


def test_one_child_decodes_file_after_file(real: decoder.Decoder, tmp_path: Path) -> None:
    processes = set()
    for size in (0, 1, 3_000_000):
        path = tmp_path / f"{size} été.bin"
        path.write_bytes(os.urandom(size))
        facts, data = real.ask(TASK, path, "a", gains=[1.0, 2.0])
        assert data == path.read_bytes()[::-1]
        assert (facts["name"], facts["gains"]) == ("a", [1.0, 2.0])
        processes.add(facts["process"])
    assert len(processes) == 1
    assert os.getpid() not in processes


def test_a_fault_of_the_task_is_told_and_costs_no_child(real: decoder.Decoder, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.touch()
    before = real.ask(TASK, path, "a")[0]["process"]
    with pytest.raises(ImgtoolError, match="no good") as caught:
        real.ask(TASK, path, "fault")
    assert caught.value.hint == "take another"
    with pytest.raises(ImgtoolError, match="not enough memory to decode large"):
        real.ask(TASK, path, "large")
    assert real.ask(TASK, path, "a")[0]["process"] == before


def test_a_bug_of_the_task_is_shown_as_one(real: decoder.Decoder, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.touch()
    before = real.ask(TASK, path, "a")[0]["process"]
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*in reverse.*LookupError: no such thing"):
        real.ask(TASK, path, "bug")
    assert real.ask(TASK, path, "a")[0]["process"] == before


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there is no such clock here")
def test_an_endless_task_ends_though_nobody_is_there_to_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with subprocess.Popen(decoder.COMMAND, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as child:
        assert child.stdin is not None
        question = {"task": TASK, "path": str(tmp_path), "name": "endless", "options": {}}
        question["timeout"] = -0.95  # it has a second longer
        child.stdin.write(json.dumps(question).encode() + b"\n")
        child.stdin.flush()
        assert child.wait(120) == -signal.SIGALRM


@pytest.mark.skipif(sys.platform != "linux", reason="the pipe's size is Linux's")
def test_a_user_whose_pipes_may_hold_no_more_decodes_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with closing(decoder.Decoder([sys.executable, "-S", "-c", CHILD])) as found:
        assert found.ask("", Path("a"), "a")[1] == b"abc"


def test_the_end_does_not_wait_for_a_question(fake: decoder.Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, exchange = threading.Event(), decoder._exchange

    def exchanged(*given: Any) -> Any:
        asked.set()
        return exchange(*given)

    monkeypatch.setattr(decoder, "_PATIENCE", 0.05)
    fake.ask("", Path("a"), "a")
    monkeypatch.setattr(decoder, "_exchange", exchanged)
    faults: list[ImgtoolError] = []

    def ask() -> None:
        try:
            fake.ask("", Path("a"), "hang")
        except ImgtoolError as fault:
            faults.append(fault)

    thread = threading.Thread(target=ask)
    thread.start()
    assert asked.wait(120)
    fake.close()
    thread.join(120)  # a question takes longer
    assert len(faults) == 1
    assert fake.ask("", Path("a"), "a")[1] == b"abc"


def test_a_path_counts_from_here(
    real: decoder.Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    monkeypatch.chdir(tmp_path)
    assert real.ask(TASK, Path("a"), "a")[1] == b"cba"


def test_a_child_killed_between_files_is_replaced_unnoticed(real: decoder.Decoder, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.touch()
    process = real.ask(TASK, path, "a")[0]["process"]
    os.kill(process, signal.SIGKILL)
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    assert real.ask(TASK, path, "a")[0]["process"] != process


@pytest.mark.parametrize("name", ["crash", "words", "short"])
def test_a_crash_is_an_error_of_one_file(fake: decoder.Decoder, name: str) -> None:
    before = fake.ask("", Path("a"), "a")[0]["process"]
    with pytest.raises(ImgtoolError, match=CRASHED) as caught:
        fake.ask("", Path("a"), name)
    assert caught.value.code == 1
    assert caught.value.hint
    facts, data = fake.ask("", Path("a"), "a")
    assert facts["process"] != before
    assert data == b"abc"
    with pytest.raises(ChildProcessError):  # the dead one is not left behind
        os.waitpid(before, os.WNOHANG)


def test_a_child_that_does_not_end_is_given_up(fake: decoder.Decoder) -> None:
    before = fake.ask("", Path("a"), "a")[0]["process"]
    with pytest.raises(ImgtoolError, match=r"cannot decode hang: no end after 0\.1 s"):
        fake.ask("", Path("a"), "hang", timeout=0.1)
    assert fake.ask("", Path("a"), "a")[0]["process"] != before


def test_an_interruption_leaves_no_stale_answer(fake: decoder.Decoder) -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    first = fake.ask("", Path("a"), "a")[0]["process"]
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            fake.ask("", Path("a"), "interrupt")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert fake.ask("", Path("a"), "a", timeout=120)[0]["process"] != first


def test_an_interruption_before_the_clock_runs_leaves_no_child(
    fake: decoder.Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: threading.Timer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Timer, "start", start)
    with pytest.raises(KeyboardInterrupt):
        fake.ask("", Path("a"), "a")
    assert fake._child is None


def test_threads_take_turns(fake: decoder.Decoder) -> None:
    answers: list[tuple[dict[str, Any], bytearray]] = []
    threads = [
        threading.Thread(target=lambda: answers.append(fake.ask("", Path("a"), "a"))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [data for _, data in answers] == [b"abc"] * 8
    assert len({facts["process"] for facts, _ in answers}) == 1


FORKS = """
import os, sys, time
from pathlib import Path
from imgtool import decoder
decoder._DECODER = decoder.Decoder([sys.executable, "-S", "-c", sys.argv[1]])
first = decoder.ask("", Path("a"), "a")[0]["process"]
reader, writer = os.pipe()
child = os.fork()
if not child:
    decoder._DECODER._command = [sys.executable, "-S", "-c", sys.argv[1]]
    os.write(writer, str(decoder.ask("", Path("a"), "a")[0]["process"]).encode())
    time.sleep(600)
second = int(os.read(reader, 99))
third = decoder.ask("", Path("a"), "a")[0]["process"]
decoder._DECODER._child.stdin.close()  # as when this process ends: no fork may keep the pipe open
decoder._DECODER._child.wait(120)
os.kill(child, 9)
os.waitpid(child, 0)
print(first == third, first == second, second)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
def test_a_fork_has_a_child_of_its_own_and_lets_go_of_ours() -> None:
    command = [sys.executable, "-W", "error", "-c", FORKS, CHILD]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.split()[:2] == ["True", "False"]
    assert done.stderr == ""
    assert gone(int(done.stdout.split()[2]))


def gone(process: int) -> bool:
    """Tell whether a process ends; nobody may have taken notice of its end."""
    for _ in range(2400):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc here")
@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 9)"])
def test_it_ends_with_this_process(end: str) -> None:
    code = (
        "import os, sys\nfrom imgtool import decoder\n"
        "decoder._DECODER = decoder.Decoder([sys.executable, '-S', '-c', sys.argv[1]])\n"
        f"decoder.warm()\nprint(decoder._DECODER._child.pid, flush=True)\n{end}"
    )
    command = [sys.executable, "-W", "error", "-c", code, CHILD]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=300)
    assert gone(int(done.stdout))


def test_the_child_is_light() -> None:
    code = (
        "import sys, imgtool.decoder\n"
        "print({'torch', 'cv2', 'PIL', 'numpy', 'rawpy', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
