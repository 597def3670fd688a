"""Trackers: what they are told, what they do not take, and that training goes on all the same."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_walls import imports, within
from toy import TOY, Numbers, go, rows, toy

from imgtool import checkpoint, track, train
from imgtool.engine import Engine
from imgtool.errors import USAGE, ImgtoolError
from imgtool.port import Axis, Port, Slot
from imgtool.settings.sources import to_toml
from imgtool.track import address, facts, mlflow, recorder, tensorboard, wandb
from imgtool.track.sink import About, Row
from imgtool.train.crew import CAMPAIGN

needs = {
    name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"needs {name}")
    for name in ("mlflow", "wandb", "tensorboard")
}
LONG = 900
"""Seconds in which whatever is waited for has come on the slowest machine."""
# Of the trackers themselves and of what they import.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred:UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def port(net: Any, settings: Any) -> Port:
    """The toy's network takes and gives pictures of any size."""
    shape = ("batch", 3, "height", "width")
    side = Axis(16, least=2)
    return Port(
        net.eval(),
        (Slot("image", shape, 0, 1, "A picture.", picture=True),),
        (Slot("half", shape, 0, 1, "Half of it.", picture=True),),
        {"batch": Axis(1), "height": side, "width": side},
        "",
        "",
        lambda path, sizes: (),
        lambda kind, sizes, rng: (
            rng.random((sizes["batch"], 3, sizes["height"], sizes["width"]), np.float32),
        ),
    )


PORTED: Engine = dataclasses.replace(TOY, port=port)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody's tracker is asked, and nothing is written but into the test's folder; it may be slow."""
    for name in [each for each in os.environ if each.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(recorder, "PATIENCE", LONG)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)


# --- settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"register_as": "net"}, "--register is for a tracker"),
        ({"track_to": "there"}, "--track-to is for a tracker"),
        ({"experiment": "mine"}, "--experiment is for a tracker"),
        ({"track": "tensorboard", "register_as": "net"}, "TensorBoard keeps no models"),
        ({"track": "mlflow", "track_to": "file:./mlruns"}, "MLflow keeps no runs in a folder"),
        ({"track": "mlflow", "track_to": "mlruns"}, "MLflow keeps no runs in a folder"),
        ({"track": "wandb", "track_to": "http://server"}, "records into a folder"),
        ({"track": "mlflow", "track_to": "postgresql://me:SECRET@host/db"}, "--track-to holds a password"),
        ({"track": "mlflow", "track_to": "http://me:SECRET@/x@host:5000"}, "--track-to holds a password"),
        ({"track": "mlflow", "track_to": "mysql://host/db?user=me&passwd=SECRET"}, "--track-to holds a pass"),
        ({"track": "wandb", "track_to": "http://me:SECRET@server"}, "--track-to holds a password"),
        ({"track": "mlflow", "register_as": "a/b"}, "no name of a model"),
    ],
)
def test_what_no_tracker_can_do_is_refused(
    given: dict[str, str], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ImgtoolError, match=what) as fault:
        track.check(toy(tmp_path, **given))
    assert fault.value.code == USAGE
    assert fault.value.hint
    assert "SECRET" not in fault.value.what + fault.value.hint


@pytest.mark.parametrize(
    "place", ["http://host:5000", "postgresql://me@host/db", "sqlite:////home/a:b@c/runs.db", "databricks"]
)
def test_a_place_without_a_password_is_taken(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    track.check(toy(tmp_path, track="mlflow", track_to=place))


@pytest.mark.parametrize("kind", track.NEEDS)
def test_a_missing_extra_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImgtoolError, match=f"--track {kind} needs") as fault:
        track.check(toy(tmp_path, track=kind))
    assert (fault.value.hint, fault.value.code) == (f"pip install 'imgtool[{kind}]'", USAGE)


def test_a_store_keeps_its_place_and_an_address_loses_its_password(tmp_path: Path) -> None:
    assert mlflow.absolute("sqlite:///runs/mlflow.db") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert mlflow.absolute("http://host:5000/") == "http://host:5000"
    assert address.public("postgresql://me:se@cr/et@host/runs") == "postgresql://host/runs"
    assert address.public("sqlite:////home/a:b@c/runs.db") == "sqlite:////home/a:b@c/runs.db"
    found = address.public("mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3Dsecret%3BEncrypt%3Dyes")
    assert found == "mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3D***%3BEncrypt%3Dyes"


def test_what_others_say_is_told_without_passwords() -> None:
    fault = ValueError("cannot reach 'http://me:sec'ret@host:5000/api' nor\npostgresql://me:a@b@db/runs")
    assert recorder.line(fault) == "cannot reach 'http://host:5000/api' nor postgresql://db/runs"
    assert recorder.line(ValueError("x" * 190 + " http://me:secret@host/")) == "x" * 190 + " http://ho ..."


class Client:
    """As much of MLflow's client as a run takes that begins and ends."""

    def __init__(self, place: str) -> None:
        self.place, self.ended = place, ""

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id="7", lifecycle_stage="active")

    def create_run(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(info=SimpleNamespace(run_id="42"))

    def get_run(self, run: str) -> Any:
        return SimpleNamespace(
            info=SimpleNamespace(lifecycle_stage="active"), data=SimpleNamespace(params={})
        )

    def set_terminated(self, run: str, status: str) -> None:
        self.ended = status

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> list[Client]:
    """Clients that were asked for, newest last, by a package that need not be there."""
    made: list[Client] = []

    def client(place: str, registry_uri: str) -> Client:
        assert registry_uri == place
        made.append(Client(place))
        return made[-1]

    entities = dict.fromkeys(("Metric", "Param", "RunTag"), lambda *each: each)
    modules = {
        "mlflow.tracking": SimpleNamespace(MlflowClient=client),
        "mlflow.entities": SimpleNamespace(**entities),
    }
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: modules.get(name) or real(name))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return made


def test_a_password_of_the_environment_is_used_and_kept_nowhere(
    clients: list[Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    folder = tmp_path / "run"
    for password in ("SECRET", "SECRET2"):  # it was changed before the run goes on
        monkeypatch.setitem(os.environ, "MLFLOW_TRACKING_URI", f"http://me:{password}@host:5000/")
        before = recorder.remembered(folder).get("mlflow", {})
        told = about(folder, before)
        recorder.Recorder(mlflow.open_sink(told), told, said.append, recorder.Post(0)).end("finished")
        assert clients[-1].place == f"http://me:{password}@host:5000"
        assert clients[-1].ended == "FINISHED"
    text = (folder / "track.json").read_text()
    assert json.loads(text)["mlflow"]["to"] == "http://host:5000"
    assert "SECRET" not in text + " ".join(said)
    assert said[0] == "MLflow: http://host:5000/#/experiments/7/runs/42"
    # Named otherwise now, the run goes on where it was.
    monkeypatch.setitem(os.environ, "MLFLOW_TRACKING_URI", "http://me:SECRET@other")
    mlflow.open_sink(about(folder, before))
    assert clients[-1].place == "http://host:5000"


@pytest.mark.parametrize(("status", "told"), [("failed", "FAILED"), ("killed", "KILLED")])
def test_mlflow_is_told_how_a_run_ended(
    status: Any, told: str, clients: list[Client], tmp_path: Path
) -> None:
    mlflow.open_sink(about(tmp_path / "run")).close(status)
    assert clients[-1].ended == told


def test_mlflow_is_told_all_in_requests_that_it_takes(
    clients: list[Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Mapping[str, list[Any]]] = []
    monkeypatch.setattr(Client, "log_batch", lambda *_, **batch: sent.append(batch), raising=False)
    many = {f"setting {n}": str(n) for n in range(250)}
    sink = mlflow.open_sink(dataclasses.replace(about(tmp_path / "run"), parameters=many))
    assert [len(each["params"]) for each in sent] == [100, 100, 50]
    assert dict(chain(*(each["params"] for each in sent))) == many
    sent.clear()
    sink.numbers([Row(step, 1.5, {f"term {n}": float(n) for n in range(7)}) for step in range(300)])
    assert [len(each["metrics"]) for each in sent] == [1000, 1000, 100]
    assert list(chain(*(each["metrics"] for each in sent))) == [
        (f"term {n}", float(n), 1500, step) for step in range(300) for n in range(7)
    ]


def test_requests_end_soon_unless_the_user_wants_otherwise(
    clients: list[Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow.open_sink(about(tmp_path / "run"))
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "10"
    monkeypatch.setitem(os.environ, "MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    mlflow.open_sink(about(tmp_path / "run"))
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"


def test_processes_open_a_file_one_after_the_other_and_without_warnings(
    clients: list[Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    inside: list[int] = []

    def begin(self: Client, place: str) -> None:
        inside.append(+1)
        warnings.warn("Unnamed CHECK constraint", UserWarning, stacklevel=1)
        time.sleep(0.05)
        inside.append(-1)
        self.place, self.ended = place, ""

    monkeypatch.setattr(Client, "__init__", begin)
    settings = toy(tmp_path, track="mlflow", track_to=f"sqlite:///{tmp_path}/new/store.db?timeout=9")
    told = dataclasses.replace(about(tmp_path / "run"), settings=settings)
    both = [threading.Thread(target=mlflow.open_sink, args=(told,)) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join(60)
    assert inside == [1, -1, 1, -1]
    assert not recwarn.list
    assert [path.name for path in (tmp_path / "new").iterdir()] == [".store.db-lock"]


class Service:
    """As much of Weights & Biases as numbers and pictures take: it may refuse a row."""

    def __init__(self, folder: Path) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.refused, self.step, self.id, self.url = -1, 0, "9", ""
        self.summary: dict[str, Any] = {}
        self.dir = str(folder / "wandb" / "offline-run-9" / "files")

    def log(self, values: dict[str, Any], step: int, commit: bool) -> None:
        if step == self.refused:
            self.refused = -1
            raise OSError(28, "No space left on device")
        self.rows.append((step, values))

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def wandb_run(service: Service, told: About, monkeypatch: pytest.MonkeyPatch) -> recorder.Recorder:
    module = SimpleNamespace(
        init=lambda **_: service, Settings=lambda **_: None, Image=lambda path: Path(path).name
    )
    monkeypatch.setattr(importlib, "import_module", lambda name: {"wandb": module}[name])
    return recorder.Recorder(wandb.open_sink(told), told, lambda text: None, recorder.Post(0))


def test_rows_of_wandb_are_told_once_and_counted_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(tmp_path)
    service.refused = 2
    told = about(tmp_path / "run")
    record = wandb_run(service, told, monkeypatch)
    for step in (1, 2, 3, 4):
        record.step(step, {"loss": float(step)})
    record.epoch({"epoch": 1, "step": 4})
    record.picture(told.folder / "samples" / "1.png", 4)
    record.end("killed")
    assert [row for row, _ in service.rows] == list(range(6))
    losses = [(each["step"], each["train/loss"]) for _, each in service.rows if "train/loss" in each]
    assert losses == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    before = recorder.remembered(told.folder)["mlflow"]
    assert before["rows"] == 6

    # The end of its file was a picture: what follows has rows of its own.
    again = Service(tmp_path)
    record = wandb_run(again, about(tmp_path / "run", before), monkeypatch)
    record.step(5, {"loss": 5.0})
    record.end("finished")
    assert again.rows == [(6, {"train/loss": 5.0, "step": 5})]


def test_wandb_is_offline_until_somebody_is_logged_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wandb.mode() == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123\n")
    assert wandb.mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb.mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    assert wandb.mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb.mode() == "disabled"
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ImgtoolError, match="nobody is logged in"):
        wandb.mode()


# --- what is told -------------------------------------------------------------------------------------


def test_numbers_come_from_tensors_and_what_is_not_finite_is_left_out() -> None:
    given = [
        (7, 1.5, {"loss": torch.tensor(0.5), "a term": torch.tensor([2.0], dtype=torch.float64), "lr": 0.25}),
        (8, 2.5, {"loss": torch.tensor(torch.nan), "a=b": torch.tensor(torch.inf), "lr": 0.125}),
    ]
    assert recorder.numbers(given, "train/") == [
        Row(7, 1.5, {"train/loss": 0.5, "train/a term": 2.0, "train/lr": 0.25}),
        Row(8, 2.5, {"train/lr": 0.125}),
    ]
    row = {
        "epoch": 2,
        "step": 8,
        "lr": 1.0,
        "loss": float("nan"),
        "terms": {"l1": 0.5},
        "scores": {"psnr": 30.0},
    }
    assert recorder.of_epoch(row) == {"epoch/number": 2.0, "epoch/l1": 0.5, "score/psnr": 30.0}


def test_the_commit_is_told_and_whether_files_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert facts.commit(tmp_path) == {}
    who = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    (tmp_path / "file").write_text("1")
    for words in (["init", "-q"], ["add", "file"], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    head = (tmp_path / ".git" / "HEAD").read_text().split()[1]
    commit = (tmp_path / ".git" / head).read_text().strip()
    assert facts.commit(tmp_path) == {facts.COMMIT: commit, facts.DIRTY: "false"}
    (tmp_path / "file").write_text("2")
    assert facts.commit(tmp_path) == {facts.COMMIT: commit, facts.DIRTY: "true"}


def test_a_run_is_told_the_commit_that_it_was_begun_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {facts.COMMIT: "c0ffee", facts.DIRTY: "true"}
    monkeypatch.setattr(facts, "commit", lambda folder: there if folder == tmp_path else {})
    told = recorder.about(TOY, toy(tmp_path / "run", track="mlflow"), tmp_path / "run")
    assert {name: told.facts.get(name) for name in there} == there


def test_the_size_of_a_picture_is_read_off_its_header() -> None:
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 300, 20)
    assert tensorboard.size(head) == (300, 20)


@needs["tensorboard"]
def test_runs_of_one_name_have_folders_of_their_own(tmp_path: Path) -> None:
    settings = toy(tmp_path, track="tensorboard", track_to="all")

    def opened(before: Mapping[str, Any]) -> tensorboard.TensorBoard:
        told = dataclasses.replace(about(tmp_path / "run", before), settings=settings, name="many/run-00")
        return tensorboard.open_sink(told)

    sinks = [opened({}) for _ in range(3)]
    folder = tmp_path / "all" / "toy" / "many"
    assert [each.memory["run"] for each in sinks] == [
        str(folder / name) for name in ("run-00", "run-00-2", "run-00-3")
    ]
    assert opened(sinks[1].memory).memory == sinks[1].memory
    elsewhere = {"run": "/moved/all/toy/many/run-00-2"}
    assert opened(elsewhere).memory == sinks[1].memory
    files = {path.name: list(path.iterdir()) for path in folder.iterdir()}
    assert {name: len(each) for name, each in files.items()} == {"run-00": 1, "run-00-2": 3, "run-00-3": 1}
    assert b"many/run-00-2" in files["run-00-2"][0].read_bytes()  # the trial among hyperparameters


# --- resuming -----------------------------------------------------------------------------------------


SERVER = {"track": "mlflow", "track_to": "http://127.0.0.1:9", "experiment": "mine", "register_as": "net"}


def begun(folder: Path, **given: Any) -> Path:
    """Make as much of a run's folder as says how it goes on."""
    record = toy(folder, **given).changed(out=None)
    folder.mkdir(exist_ok=True)
    (folder / "settings.toml").write_text(to_toml(record, "train", "deblur"))
    return folder


def test_a_run_whose_tracker_is_gone_goes_on_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(told: About) -> Any:
        raise track.Unreachable("MLflow cannot record", track.WITHOUT)

    monkeypatch.setattr(track, "NEEDS", {"mlflow": ()})
    monkeypatch.setattr(recorder, "about", lambda engine, settings, folder: about(folder))
    monkeypatch.setattr(mlflow, "open_sink", lambda about: Memo())
    run = tmp_path / "one"
    assert go(TOY, toy(run, steps=1, **SERVER)) == 0
    monkeypatch.setattr(mlflow, "open_sink", gone)
    with pytest.raises(track.Unreachable) as fault:
        go(TOY, toy(run, resume=run, steps=2))
    assert "--track none" in fault.value.hint
    assert go(TOY, toy(run, resume=run, steps=2, track="none")) == 0
    assert go(TOY, toy(run, resume=run, steps=3)) == 0  # as it was last time
    assert rows(run)[-1]["step"] == 3


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({}, ("http://127.0.0.1:9", "mine", "net")),
        ({"track": "mlflow"}, ("http://127.0.0.1:9", "mine", "net")),
        ({"track": "wandb"}, ("", "mine", "net")),
        ({"track": "wandb", "track_to": "there"}, ("there", "mine", "net")),
        ({"track": "tensorboard"}, ("", "mine", "")),
        ({"track": "none"}, ("", "mine", "net")),
    ],
)
def test_another_tracker_is_told_what_it_can_take(
    given: dict[str, str], left: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(track, "NEEDS", dict.fromkeys(track.NEEDS, ()))
    run = begun(tmp_path / "one", **SERVER)
    found = train.resumed(TOY, toy(run, resume=run, **given))
    assert (found.track_to, found.experiment, found.register_as) == left
    track.check(found)


def test_a_record_may_name_no_tracker(tmp_path: Path) -> None:
    run = begun(tmp_path / "one")
    assert 'track = ""' in (run / "settings.toml").read_text()
    assert train.resumed(TOY, toy(run, resume=run)).track == ""


@pytest.mark.parametrize("given", [{"max_ms": 1.0}, {"sampler": "ax"}, {"parallel": 3}, {"space": "sp.toml"}])
def test_a_single_run_goes_on_without_flags_of_a_search(given: dict[str, Any], tmp_path: Path) -> None:
    run = begun(tmp_path / "one")
    name = next(iter(given)).replace("_", "-")
    for ask in (go, train.plan):
        with pytest.raises(ImgtoolError, match=f"--{name} is for a search, and there is none") as fault:
            ask(TOY, toy(run, resume=run, **given))
        assert (fault.value.code, fault.value.hint) == (USAGE, f"leave out --{name}, or begin anew")


# --- sending ------------------------------------------------------------------------------------------


def test_what_fails_is_tried_again_behind_the_others_and_in_the_end_given_up() -> None:
    done: list[str] = []

    def job(name: str, faults: int) -> Callable[[], None]:
        left = iter([True] * faults + [False] * 9)

        def work() -> None:
            if next(left):
                raise ValueError(f"{name} fails")
            done.append(name)

        return work

    post = recorder.Post(0)
    for name, faults in (("a", 1), ("b", 0), ("poison", 9), ("c", 0)):
        post.put(job(name, faults))
    deadline = time.monotonic() + 60
    while not post.lost and time.monotonic() < deadline:
        time.sleep(0.001)
    post.put(job("d", 0))
    post.end()
    assert post.ended(60)
    assert done == ["b", "c", "a", "d"]
    assert (post.lost, post.fault) == (1, "poison fails")


def test_jobs_that_need_their_order_keep_it_and_pauses_grow() -> None:
    done: list[tuple[str, float]] = []
    left = {"b": 3, "poison": 9}

    def job(name: str) -> Callable[[], None]:
        def work() -> None:
            left[name] = left.get(name, 0) - 1
            if left[name] >= 0:
                raise ValueError(name)
            done.append((name, time.monotonic()))

        return work

    post = recorder.Post(0.01, in_order=True)
    for name in ("a", "b", "c", "poison", "d"):
        post.put(job(name))
    deadline = time.monotonic() + 60
    while len(done) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    post.end(job("last"))
    assert post.ended(60)
    assert [name for name, _ in done] == ["a", "b", "c", "d", "last"]
    assert (post.lost, post.dead) == (1, False)
    when = dict(done)
    assert when["b"] - when["a"] >= 0.01 + 0.02 + 0.04  # it failed three times
    assert when["d"] - when["c"] >= 0.01 + 0.02 + 0.04 + 0.08 + 0.16


class Memo:
    """A record in memory, that may refuse."""

    rewinds = graphs = False
    where = "here"

    def __init__(self, faults: int = 0, run: str = "1") -> None:
        self.memory: dict[str, Any] = {"run": run, "to": "memory"}
        self.left, self.said = faults, []  # type: ignore[var-annotated]

    def numbers(self, rows: Sequence[Row]) -> None:
        if self.left:
            self.left -= 1
            raise OSError(28, "No space left on device")
        self.said.append([(row.step, dict(row.values)) for row in rows])

    def picture(self, path: Path, tag: str, step: int) -> None:
        self.said.append((tag, step))

    def file(self, path: Path) -> None:
        self.said.append(path.name)

    def model(self, package: Any) -> str:
        self.said.append(package.card["step"])
        return "registered"

    def rewind(self, step: int) -> None:
        self.said.append(f"back to {step}")

    def close(self, status: str) -> None:
        self.said.append(status)


def about(folder: Path, before: Mapping[str, Any] | None = None) -> About:
    settings = toy(folder, track="mlflow")
    folder.mkdir(exist_ok=True)
    return About(TOY, settings, folder, "run", "", "toy", {}, {}, [], before or {})


def test_steps_are_sent_a_hundred_at_a_time_and_with_each_epoch(tmp_path: Path) -> None:
    sink = Memo()
    told = recorder.Recorder(sink, about(tmp_path / "run"), lambda text: None, recorder.Post(0))
    for step in range(1, 151):
        told.step(step, {"loss": torch.tensor(float(step)), "lr": 0.5})
    told.epoch({"epoch": 1, "step": 150, "loss": 2.0})
    told.end("finished")
    first, rest, epoch, status = sink.said
    assert first == [(n, {"train/loss": float(n), "train/lr": 0.5}) for n in range(1, 101)]
    assert [step for step, _ in rest] == list(range(101, 151))
    assert epoch == [(150, {"epoch/number": 1.0, "epoch/loss": 2.0})]
    assert status == "finished"
    memory = json.loads((tmp_path / "run" / "track.json").read_text())["mlflow"]
    assert memory == {"run": "1", "to": "memory", "given": "", "step": 150, "epoch": 150}


@pytest.mark.parametrize(("faults", "lost"), [(2, False), (10_000, True)])
def test_a_tracker_that_fails_is_warned_of_once(faults: int, lost: bool, tmp_path: Path) -> None:
    sink, said = Memo(faults), []  # type: ignore[var-annotated]
    post = recorder.Post(0)
    told = recorder.Recorder(sink, about(tmp_path / "run"), said.append, post)
    for epoch in (1, 2, 3):
        told.step(epoch, {"loss": torch.tensor(1.0)})
        told.epoch({"epoch": epoch, "step": epoch})
        deadline = time.monotonic() + 60
        while not post.fault and time.monotonic() < deadline:
            time.sleep(0.001)
    told.end("finished")
    warnings = [text for text in said if "training goes on" in text]
    assert len(warnings) == 1
    assert "No space left on device" in warnings[0]
    assert ("all of it is in" in said[-1]) == lost
    assert sorted(step for each in sink.said[:-1] for step, _ in each) == ([] if lost else [1, 1, 2, 2, 3, 3])


@pytest.mark.parametrize("rewinds", [False, True])
def test_a_resumed_run_is_not_told_twice(rewinds: bool, tmp_path: Path) -> None:
    sink = Memo()
    sink.rewinds = rewinds
    before = {"run": "1", "step": 3, "epoch": 2}
    told = recorder.Recorder(sink, about(tmp_path / "run", before), lambda text: None, recorder.Post(0))
    for step in (3, 4):
        told.step(step, {"loss": 1.0})
    told.epoch({"epoch": 2, "step": 4})
    told.end("finished")
    again = {"train/loss": 1.0}
    expected: list[Any] = [[(4, again)], [(4, {"epoch/number": 2.0})], "finished"]
    if rewinds:
        expected = ["back to 3", [(3, again), (4, again)], *expected[1:]]
    assert sink.said == expected


@pytest.mark.parametrize("in_order", [False, True])
def test_a_rewind_that_is_tried_again_takes_nothing_newer_back(in_order: bool, tmp_path: Path) -> None:
    class Refusing(Memo):
        rewinds = True
        faults = 2

        def rewind(self, step: int) -> None:
            self.faults -= 1
            if self.faults >= 0:
                raise OSError(28, "No space left on device")
            super().rewind(step)

    sink, before = Refusing(), {"run": "1", "step": 3, "epoch": 2}
    told = recorder.Recorder(
        sink, about(tmp_path / "run", before), lambda text: None, recorder.Post(0, in_order=in_order)
    )
    told.step(3, {"loss": 1.0})
    told.picture(tmp_path / "run" / "samples" / "3.png", 3)  # which comes before the step's numbers
    told.epoch({"epoch": 2, "step": 3})
    told.step(4, {"loss": 1.0})
    told.epoch({"epoch": 3, "step": 4})
    told.end("finished")
    assert [each for each in sink.said if isinstance(each, str)] == ["back to 3", "finished"]
    assert sink.said[0] == "back to 3"
    assert len(sink.said) == 7
    if in_order:
        assert [each[0][0] for each in sink.said[2:-1]] == [3, 3, 4, 4]


def test_what_never_arrived_is_sent_when_its_steps_are_taken_again(tmp_path: Path) -> None:
    class Choosy(Memo):
        def numbers(self, rows: Sequence[Row]) -> None:
            if rows[0].step == 1 and "train/loss" in rows[0].values:
                raise ValueError("no such number")
            super().numbers(rows)

    folder = tmp_path / "run"
    told = recorder.Recorder(Choosy(), about(folder), lambda text: None, recorder.Post(0))
    for step in range(1, 201):
        told.step(step, {"loss": 1.0})
    told.epoch({"epoch": 1, "step": 200})
    told.end("killed")
    before = recorder.remembered(folder)["mlflow"]
    assert (before.get("step", 0), before["epoch"]) == (0, 200)
    sink = Memo()
    told = recorder.Recorder(sink, about(folder, before), lambda text: None, recorder.Post(0))
    told.step(51, {"loss": 1.0})
    told.end("finished")
    assert sink.said[0] == [(51, {"train/loss": 1.0})]


class Hanging(Memo):
    """Takes what it is given and never answers, until the test ends."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.free = threading.Event(), threading.Event()

    def numbers(self, rows: Sequence[Row]) -> None:
        self.asked.set()
        assert self.free.wait(LONG)


@pytest.mark.parametrize("by", ["time", "signal", "second signal"])
def test_the_end_does_not_wait_for_ever(by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late: list[float] = []
    clock = SimpleNamespace(time=time.time, sleep=time.sleep, monotonic=lambda: time.monotonic() + sum(late))
    monkeypatch.setattr(recorder, "time", clock)
    monkeypatch.setattr(recorder, "PATIENCE", LONG)
    monkeypatch.setattr(recorder, "SOON", 0.0)
    monkeypatch.setattr(recorder, "LOOK", 0.02)
    came: list[int] = []

    def heard(number: int, frame: Any) -> None:  # as the loop: the first is kept in mind, the second acts
        came.append(number)
        if by == "second signal":
            raise KeyboardInterrupt

    def say(text: str) -> None:
        said.append(text)
        if text.startswith("waiting for MLflow"):
            assert sink.asked.wait(LONG)
            if by == "time":
                late.append(2 * LONG)
            else:
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, heard)
    sink, said = Hanging(), []  # type: ignore[var-annotated]
    post = recorder.Post(0)
    told = recorder.Recorder(sink, about(tmp_path / "run"), say, post)
    told.step(1, {"loss": 1.0})
    try:
        with pytest.raises(KeyboardInterrupt) if by == "second signal" else nullcontext():
            told.end("finished")
        assert signal.getsignal(signal.SIGINT) is heard
    finally:
        signal.signal(signal.SIGINT, before)
        sink.free.set()
    assert sink.asked.is_set()
    assert came == ([] if by == "time" else [signal.SIGINT])
    assert any(text.startswith("waiting for MLflow") for text in said)
    if by != "second signal":
        why = f"it did not answer for {2 * LONG // 100}" if by == "time" else "interrupted"
        assert said[-1].startswith(f"warning: MLflow lacks a part of this run ({why}")
    assert post.ended(60)
    assert sink.said == []  # closing would have hung as well


def test_a_record_that_was_given_up_is_not_closed(tmp_path: Path) -> None:
    sink, said = Memo(10_000), []  # type: ignore[var-annotated]
    told = recorder.Recorder(sink, about(tmp_path / "run"), said.append, recorder.Post(0))
    for step in range(1, 10):
        told.epoch({"epoch": step, "step": step})
    told.end("finished")
    assert sink.said == []
    assert "lacks a part of this run (No space left on device)" in said[-1]


def test_trackers_know_no_verb_that_uses_them() -> None:
    for path in Path(track.__file__).parent.glob("*.py"):
        assert not [
            name
            for name in imports(path)
            if within(name, *(f"imgtool.{verb}" for verb in ("train", "bench", "infer", "data")))
        ], path
    assert recorder.MANY == CAMPAIGN


def test_a_record_that_is_a_new_one_is_told_all(tmp_path: Path) -> None:
    sink = Memo(run="2")
    before = {"run": "1", "step": 3, "epoch": 2}
    told = recorder.Recorder(sink, about(tmp_path / "run", before), lambda text: None, recorder.Post(0))
    told.step(1, {"loss": 1.0})
    told.end("finished")
    assert sink.said == [[(1, {"train/loss": 1.0})], "finished"]


def test_a_run_that_is_recorded_elsewhere_now_is_told_all(tmp_path: Path) -> None:
    memory = {"mlflow": {"run": "1", "to": "sqlite:///a.db", "step": 5, "given": "sqlite:///a.db"}}
    (tmp_path / "track.json").write_text(json.dumps(memory))
    for place, before in (("sqlite:///a.db", memory["mlflow"]), ("sqlite:///b.db", {})):
        settings = toy(tmp_path, track="mlflow", track_to=place).changed(resume=tmp_path)
        assert recorder.about(TOY, settings, tmp_path).before == before


@pytest.mark.parametrize(
    ("fault", "status"), [(None, "finished"), (KeyboardInterrupt, "killed"), (ImgtoolError("x"), "failed")]
)
def test_a_record_says_how_its_run_ended(
    fault: Any, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = Memo()
    monkeypatch.setattr(track, "check", lambda settings: None)
    monkeypatch.setattr(mlflow, "open_sink", lambda about: sink)
    monkeypatch.setattr(recorder, "about", lambda engine, settings, folder: about(folder))

    def work() -> None:
        with track.begin(TOY, toy(tmp_path, track="mlflow"), tmp_path, lambda text: None):
            if fault:
                raise fault

    if fault:
        with pytest.raises(fault if isinstance(fault, type) else type(fault)):
            work()
    else:
        work()
    assert sink.said == [status]


# --- the trackers themselves --------------------------------------------------------------------------


def client(store: str) -> Any:
    return importlib.import_module("mlflow.tracking").MlflowClient(store, registry_uri=store)


def only_run(found: Any, experiment: str = "imgtool-deblur") -> Any:
    runs = found.search_runs([found.get_experiment_by_name(experiment).experiment_id])
    assert len(runs) == 1
    return runs[0]


def names_of(found: Any, run: str, folder: str | None = None) -> set[str]:
    return {each.path for each in found.list_artifacts(run, folder)}


def compare_model(store: str, name: str, version: int, engine: Engine, weights: Path) -> None:
    """A registered model computes what its weights do, also at sizes that it was not traced with."""
    net = checkpoint.network(engine, checkpoint.read_weights(weights, engine.name))
    module = engine.port(net, None).module if engine.port else net
    picture = np.random.default_rng(1).random((2, 3, 30, 22), np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(picture)).numpy()
    full = importlib.import_module("mlflow")
    full.set_tracking_uri(store)
    full.set_registry_uri(store)
    try:
        uri = f"models:/{name}/{version}"
        loaded = importlib.import_module("mlflow.pytorch").load_model(uri)
        function = importlib.import_module("mlflow.pyfunc").load_model(uri)
        np.testing.assert_allclose(loaded(torch.from_numpy(picture)).detach().numpy(), expected, atol=1e-6)
        signature = function.metadata.signature
        (given,), (taken,) = signature.inputs.inputs, signature.outputs.inputs
        assert (given.name, given.shape) == ("image", (-1, 3, -1, -1))
        found = function.predict({"image": picture})
        assert list(found) == [taken.name]
        np.testing.assert_allclose(found[taken.name], expected, atol=1e-6)
        assert function.predict(function.input_example)[taken.name].shape[0] == 1
    finally:
        full.set_tracking_uri(None)
        full.set_registry_uri(None)
        os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.mark.slow
@needs["mlflow"]
def test_mlflow_keeps_a_run_in_a_file_without_a_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "one"
    assert go(PORTED, toy(run, track="mlflow", register_as="toy-net")) == 0
    out, err = capsys.readouterr()
    assert all(line.startswith("{") for line in out.splitlines())
    assert "mlflow ui --backend-store-uri sqlite:///runs/mlflow.db" in err
    assert "registered toy-net version 1" in err
    assert "INFO" not in err
    assert "warning" not in err.lower()
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "one", "mlflow.db", ".mlflow.db-lock", "mlartifacts",
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    store = f"sqlite:///{tmp_path}/runs/mlflow.db"
    found = client(store)
    told = only_run(found)
    assert told.info.status == "FINISHED"
    assert (told.data.params["lr"], told.data.params["track"]) == ("0.01", "mlflow")
    assert {"imgtool", "torch", "python", "system", "cpu", "device"} <= told.data.tags.keys()
    run_id = told.info.run_id
    history = found.get_metric_history(run_id, "train/loss")
    assert sorted(each.step for each in history) == list(range(1, 9))
    scores = {each.step: each.value for each in found.get_metric_history(run_id, "score/psnr")}
    assert scores == {row["step"]: row["scores"]["psnr"] for row in rows(run)}
    assert names_of(found, run_id) == {"curves.png", "log.jsonl", "packages.txt", "samples", "settings.toml"}
    assert names_of(found, run_id, "samples") == {"samples/epoch-0001.png", "samples/epoch-0002.png"}
    compare_model(store, "toy-net", 1, PORTED, run / "best.safetensors")

    # The run goes on in its record, and is another version.
    assert go(PORTED, toy(run, resume=run, steps=12, epoch_steps=4)) == 0
    told = only_run(found)
    assert (told.info.run_id, told.info.status) == (run_id, "FINISHED")
    history = found.get_metric_history(run_id, "train/loss")
    assert sorted(each.step for each in history) == list(range(1, 13))
    assert told.data.tags["resumed.steps"] == "12"
    # Asked for again with nothing left to do, it registers nothing again.
    versions = len(found.search_model_versions("name='toy-net'"))
    assert go(PORTED, toy(run, resume=run, steps=12)) == 0
    assert len(found.search_model_versions("name='toy-net'")) == versions


@pytest.mark.slow
@needs["mlflow"]
def test_repeated_runs_are_runs_of_one_group(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/store.db"
    assert go(TOY, toy(tmp_path / "many", track="mlflow", track_to=store, runs=2, experiment="mine")) == 0
    found = client(store)
    runs = found.search_runs([found.get_experiment_by_name("mine").experiment_id])
    assert {each.data.tags["group"] for each in runs} == {"many"}
    assert sorted(each.info.run_name for each in runs) == ["many/run-00", "many/run-01"]
    assert sorted(each.data.params["seed"] for each in runs) == ["0", "1"]


@pytest.mark.slow
@needs["mlflow"]
def test_runs_side_by_side_begin_one_file(tmp_path: Path, photographs: Path) -> None:
    words = [
        sys.executable, "-m", "imgtool", "train", "filter", "--photos", str(photographs), "-o", "many",
        "--steps", "4", "--epoch-steps", "2", "--batch", "2", "--crop", "32", "--held-out", "2",
        "--workers", "0", "--device", "cpu", "--threads", "2", "--track", "mlflow",
        "--runs", "2", "--parallel", "2",
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower()
    found = client(f"sqlite:///{tmp_path}/runs/mlflow.db")
    runs = found.search_runs([found.get_experiment_by_name("imgtool-filter").experiment_id])
    assert sorted(each.info.run_name for each in runs) == ["many/run-00", "many/run-01"]


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=LONG).close()
    except OSError:
        return False
    return True


@contextmanager
def server(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Give the address of an MLflow server that keeps all it is told in a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/server.db"]
    words += ["--artifacts-destination", str(folder / "artifacts")]
    surroundings = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=surroundings, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        while not answers(f"{address}/health"):
            assert process.poll() is None, (folder / "server.log").read_text()
            time.sleep(0.1)
        yield address, process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@needs["mlflow"]
def test_a_server_of_mlflow_keeps_a_model_and_its_death_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", str(LONG))
    with server(tmp_path) as (address, process):
        run = tmp_path / "one"
        assert go(PORTED, toy(run, track="mlflow", track_to=address, register_as="toy-net")) == 0
        out, err = capsys.readouterr()
        assert all(line.startswith("{") for line in out.splitlines())
        told = only_run(client(address))
        assert f"{address}/#/experiments/{told.info.experiment_id}/runs/{told.info.run_id}" in err
        assert told.info.status == "FINISHED"
        compare_model(address, "toy-net", 1, PORTED, run / "best.safetensors")

        def score(net: Any, batch: Any) -> Any:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            return TOY.score(net, batch)

        deadly = dataclasses.replace(PORTED, score=score)
        assert go(deadly, toy(tmp_path / "two", track="mlflow", track_to=address)) == 0
        assert (tmp_path / "two" / "best.safetensors").exists()
        err = capsys.readouterr().err
        assert err.count("warning: MLflow") <= 2
        assert "warning: MLflow lacks a part of this run (Connection refused)" in err

        with pytest.raises(ImgtoolError, match=f"MLflow cannot record into {address}: Connection refused"):
            go(PORTED, toy(tmp_path / "three", track="mlflow", track_to=address))


PATIENT = f"""
from imgtool import cli
from imgtool.track import recorder
recorder.PATIENCE = {LONG}
cli.main()
"""


@pytest.mark.slow
@needs["mlflow"]
def test_the_command_line_registers_a_network_of_an_engine(tmp_path: Path, photographs: Path) -> None:
    store = f"sqlite:///{tmp_path}/store.db"
    words = [
        sys.executable, "-c", PATIENT, "train", "filter", "--photos", str(photographs), "-o", "run",
        "--steps", "4", "--epoch-steps", "2", "--batch", "2", "--crop", "32", "--held-out", "2",
        "--workers", "0", "--device", "cpu", "--threads", "1",
        "--track", "mlflow", "--track-to", store, "--register", "edges",
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "MLflow: registered edges version 1: models:/edges/1" in done.stderr
    assert only_run(client(store), "imgtool-filter").data.params["target"] == "sobel_3"
    from imgtool import engines

    compare_model(store, "edges", 1, engines.load("filter"), tmp_path / "run" / "best.safetensors")


def wandb_records(path: Path) -> list[Any]:
    """Return the records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    messages = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, whole, found = 7, b"", []
    while at < len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block is filled up
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in {1, 4}:  # full, or the last part
            record = messages.Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def of_kind(records: Sequence[Any], kind: str) -> list[Any]:
    return [getattr(each, kind) for each in records if each.WhichOneof("record_type") == kind]


def wandb_history(records: Sequence[Any]) -> list[dict[str, str]]:
    return [
        {item.key or item.nested_key[0]: item.value_json for item in each.item}
        for each in of_kind(records, "history")
    ]


@pytest.mark.slow
@needs["wandb"]
def test_wandb_keeps_a_run_that_can_be_sent_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "runs" / "one"
    assert go(PORTED, toy(run, track="wandb", register_as="toy-net")) == 0
    out, err = capsys.readouterr()
    assert all(line.startswith("{") for line in out.splitlines())
    assert "wandb sync runs/wandb/offline-run-" in err
    (folder,) = (tmp_path / "runs" / "wandb").glob("offline-run-*")
    records = wandb_records(next(folder.glob("*.wandb")))
    (begun,) = of_kind(records, "run")
    assert (begun.project, begun.display_name) == ("imgtool-deblur", "one")
    config = {each.key: json.loads(each.value_json) for each in begun.config.update}
    assert config["settings"]["lr"] == 0.01
    history = wandb_history(records)
    assert [int(each["step"]) for each in history if "train/loss" in each] == list(range(1, 9))
    scores = {int(each["step"]): float(each["score/psnr"]) for each in history if "score/psnr" in each}
    assert scores == {row["step"]: row["scores"]["psnr"] for row in rows(run)}
    (artifact,) = of_kind(records, "artifact")
    assert (artifact.name, artifact.type) == ("toy-net", "model")
    kept = {each.path: Path(each.local_path) for each in artifact.manifest.contents}
    assert kept["best.safetensors"].read_bytes() == (run / "best.safetensors").read_bytes()
    assert of_kind(records, "exit")[0].exit_code == 0

    assert go(PORTED, toy(run, resume=run, steps=12)) == 0
    assert "wandb sync runs/wandb/offline-run-*-" in capsys.readouterr().err
    later = max((tmp_path / "runs" / "wandb").glob("offline-run-*"))
    records = wandb_records(next(later.glob("*.wandb")))
    assert of_kind(records, "run")[0].run_id == begun.run_id
    items = wandb_history(records)
    assert [int(each["step"]) for each in items if "train/loss" in each] == list(range(9, 13))
    assert int(items[0]["_step"]) == len(history)


class Cut(Numbers):
    """Ends a training at a sample, as a kill would: more was told than the state knows."""

    def __getitem__(self, number: int) -> Any:
        if number == self.fault_at:
            raise RuntimeError("killed")
        return super().__getitem__(number)


@pytest.mark.slow
@needs["tensorboard"]
def test_tensorboard_shows_a_run_that_was_killed_and_resumed(tmp_path: Path) -> None:
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "runs" / "one"
    cut = dataclasses.replace(TOY, data=lambda settings: (Cut(4, 12), Numbers(2)))  # at step 7
    with pytest.raises(RuntimeError, match="killed"):
        go(cut, toy(run, track="tensorboard"))
    assert go(TOY, toy(run, resume=run, lr=1e-3)) == 0  # from step 4 or 6 on, otherwise than before
    found = accumulator.EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    assert [each.step for each in found.Scalars("train/loss")] == list(range(1, 9))
    rates = [each.value for each in found.Scalars("train/lr")]
    assert rates[:3] == pytest.approx([0.005, 0.01, 0.01], rel=1e-5)
    assert max(rates[6:]) < 1e-3
    scores = {each.step: each.value for each in found.Scalars("score/psnr")}
    assert scores == pytest.approx({row["step"]: row["scores"]["psnr"] for row in rows(run)}, rel=1e-6)
    assert [each.step for each in found.Images("samples")] == [4, 8]
    assert found.Images("samples")[0].encoded_image_string == (run / "samples/epoch-0001.png").read_bytes()
    assert "lr = 0.01" in found.Tensors("settings")[0].tensor_proto.string_val[0].decode()
    assert "_hparams_/session_start_info" in found.PluginTagToContent("hparams")
