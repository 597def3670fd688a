"""MLflow: a file of SQLite here, or a server; numbers in batches, the model with its signature."""

from __future__ import annotations

import importlib
import logging
import os
import sqlite3
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import imgtool
from imgtool.errors import ImgtoolError
from imgtool.track import WITHOUT, Unreachable
from imgtool.track.address import public
from imgtool.track.facts import COMMIT
from imgtool.track.package import Package
from imgtool.track.recorder import line
from imgtool.track.sink import About, Row, Status

STORE = "sqlite:///runs/mlflow.db"
ADDRESS = "MLFLOW_TRACKING_URI"
SQLITE = "sqlite:///"
SERVERS = ("http", "databricks", "uc:")
SURROUNDINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # The recorder tries again by itself, and does not wait for it.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""Variables that are set where the user has not set them."""
CHATTY = ("mlflow", "alembic", "urllib3.connectionpool")
PATIENCE = 120.0
"""Seconds that a run waits at most while other processes open its store."""
BATCH, PARAMETERS = 1000, 100
"""Numbers, and parameters or tags, that a request may hold."""
LONGEST = 5000
"""Letters of a parameter or a tag that are told."""
STATUSES: Mapping[str, str] = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
NOT_THERE, THERE = "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"


def open_sink(about: About) -> MLflow:
    """Begin a run, or go on with it.

    Raises:
        Unreachable: The store or the server does not answer, or refuses.
    """
    given = about.settings.track_to or os.environ.get(ADDRESS, "") or STORE
    place = _again(absolute(given), about.before.get("to", ""))
    for name, value in SURROUNDINGS.items():
        os.environ.setdefault(name, value)
    try:
        library = importlib.import_module("mlflow.tracking")
        with _alone(place), warnings.catch_warnings(action="ignore"):
            client = library.MlflowClient(place, registry_uri=place)
            for name in CHATTY:
                logging.getLogger(name).setLevel(logging.ERROR)
            return MLflow(client, about, place, given)
    except Exception as fault:  # noqa: BLE001 - of any of the libraries under it
        hint = "is the server running, and the address right?"
        if place.startswith(SQLITE):
            hint = "name a file that can be written: --track-to sqlite:///FOLDER/mlflow.db;"
        what = f"MLflow cannot record into {public(place)}: {line(fault)}"
        raise Unreachable(what, f"{hint} {WITHOUT}") from None


@contextmanager
def _alone(place: str) -> Iterator[None]:
    """Keep other processes out while a file is opened: two that make its tables at once spoil each other's.

    The lock is SQLite's on an empty file beside, which stays: it holds wherever SQLite works, and ends with
    its process.
    """
    if not place.startswith(SQLITE):
        yield
        return
    store = _file_of(place)
    path = store.with_name(f".{store.name}-lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)) as lock:
        lock.execute("BEGIN EXCLUSIVE")
        yield


def absolute(place: str) -> str:
    """Return a store whose file has its whole path; anything else as it is.

    >>> absolute("http://127.0.0.1:5000/"), absolute("sqlite:////runs/mlflow.db")
    ('http://127.0.0.1:5000', 'sqlite:////runs/mlflow.db')
    """
    if not place.startswith(SQLITE):
        return place.rstrip("/")
    return SQLITE + os.path.abspath(os.path.expanduser(place.removeprefix(SQLITE)))


def _again(place: str, before: str) -> str:
    """Return where a run goes on: as before, with the user and the password that are given now."""
    return place if not before or public(before) == public(place) else before


def _file_of(place: str) -> Path:
    return Path(place.removeprefix(SQLITE).partition("?")[0])


def _code(fault: BaseException) -> str:
    return str(getattr(fault, "error_code", ""))


def _cut(values: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(name, value[:LONGEST]) for name, value in values.items()]


def _utc(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")


class MLflow:
    """A run of MLflow."""

    rewinds = False
    graphs = True

    def __init__(self, client: Any, about: About, place: str, given: str) -> None:
        """Find or make experiment and run, and tell all settings."""
        self._client, self._about, self._place = client, about, place
        self._entities = importlib.import_module("mlflow.entities")
        self._experiment = self._find_experiment(about.experiment)
        self._run, self._model = self._go_on() or self._begin(), ""
        self.memory = {"run": self._run, "to": public(place)}
        if place.startswith("http"):
            self.where = f"{public(place)}/#/experiments/{self._experiment}/runs/{self._run}"
        else:
            self.where = (
                f"run {about.name} of {about.experiment}; see it by: "
                f"mlflow ui --backend-store-uri {public(given)}  (by pip install mlflow)"
            )

    def _find_experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name, artifact_location=self._artifacts(name)))
            except Exception as fault:
                if _code(fault) != THERE:  # by another process, just now
                    raise
                found = self._client.get_experiment_by_name(name)
        if found.lifecycle_stage == "deleted":
            raise ImgtoolError(f"the experiment {name} was deleted there")
        return str(found.experiment_id)

    def _artifacts(self, name: str) -> str | None:
        """Return the folder of an experiment's files; a server knows its own."""
        if self._place.startswith(SERVERS):
            return None
        beside = _file_of(self._place).parent if self._place.startswith(SQLITE) else Path("runs").absolute()
        return (beside / "mlartifacts" / name).as_uri()

    def _begin(self) -> str:
        about = self._about
        tags = {
            **about.facts,
            "mlflow.source.name": f"imgtool train {about.engine.name}",
            "mlflow.source.type": "LOCAL",
            **({"group": about.group} if about.group else {}),
            **({"mlflow.source.git.commit": c} if (c := about.facts.get(COMMIT)) else {}),
        }
        run = self._client.create_run(self._experiment, tags=dict(_cut(tags)), run_name=about.name)
        found = str(run.info.run_id)
        parameters = [self._entities.Param(*each) for each in _cut(about.parameters)]
        for start in range(0, len(parameters), PARAMETERS):
            self._client.log_batch(found, params=parameters[start : start + PARAMETERS])
        self._client.log_text(found, "\n".join(about.packages) + "\n", "packages.txt")
        return found

    def _go_on(self) -> str | None:
        """Open the run again that the folder names; None where there is none any more."""
        before = self._about.before.get("run")
        if not before:
            return None
        try:
            run = self._client.get_run(before)
        except Exception as fault:
            if _code(fault) != NOT_THERE:
                raise
            return None
        if run.info.lifecycle_stage == "deleted":
            return None
        self._client.update_run(before, status="RUNNING")
        known = run.data.params  # which cannot be changed
        changed = [each for each in _cut(self._about.parameters) if known.get(each[0]) != each[1]]
        tags = [self._entities.RunTag(f"resumed.{name}", value) for name, value in changed]
        if tags:
            self._client.log_batch(before, tags=tags[:PARAMETERS])
        return str(before)

    def rewind(self, step: int) -> None:
        """Do nothing: a store takes nothing back."""

    def numbers(self, rows: Sequence[Row]) -> None:
        """Send numbers, a thousand at a time; what arrives twice counts once."""
        metrics = [
            self._entities.Metric(name, value, int(row.time * 1000), row.step)
            for row in rows
            for name, value in row.values.items()
        ]
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(self._run, metrics=metrics[start : start + BATCH])

    def picture(self, path: Path, tag: str, step: int) -> None:
        """Send a picture as an artifact, at its path in the run folder."""
        self._client.log_artifact(self._run, str(path), tag.rpartition("/")[0] or None)

    def file(self, path: Path) -> None:
        """Send a file as an artifact."""
        self._client.log_artifact(self._run, str(path))

    def model(self, package: Package) -> str:
        """Send the model, and register it where that was asked for."""
        if not self._model:
            self._send(package)
        words = f"the model is models:/{self._model}"
        name = self._about.settings.register_as
        if name:
            version = self._register(name)
            words = f"registered {name} version {version}: models:/{name}/{version}"
        if package.why:
            words += f"; only imgtool loads it, for it has no graph: {package.why}"
        return words

    def _send(self, package: Package) -> None:
        tags = {
            name: str(value) for name, value in package.card.items() if isinstance(value, str | int | float)
        }
        model = self._client.create_logged_model(
            self._experiment, self._about.engine.name, source_run_id=self._run, tags=dict(_cut(tags)),
            params={name: str(value) for name, value in package.card["model"].items()}, model_type="imgtool",
        )  # fmt: skip
        names = {
            "artifact_path": model.artifact_location,
            "model_id": model.model_id,
            "model_uuid": model.model_id,
            "run_id": self._run,
            "mlflow_version": importlib.import_module("mlflow.version").VERSION,
            "utc_time_created": _utc(model.creation_timestamp),
            "is_signature_from_type_hint": False,
        }
        with tempfile.TemporaryDirectory(prefix="imgtool-") as folder:
            about = package.write(Path(folder), names)
            dump = importlib.import_module("yaml").safe_dump
            Path(folder, "MLmodel").write_text(dump(about, sort_keys=True), encoding="utf-8")
            self._client.log_model_artifacts(model.model_id, folder)
        self._client.finalize_logged_model(model.model_id, "READY")
        step = int(package.card.get("step") or 0)
        output = self._entities.LoggedModelOutput(model.model_id, step=step)
        self._client.log_outputs(self._run, models=[output])
        self._model = str(model.model_id)

    def _register(self, name: str) -> str:
        try:
            self._client.create_registered_model(name)
        except Exception as fault:
            if _code(fault) != THERE:
                raise
        told = {"imgtool": imgtool.__version__, "engine": self._about.engine.name}
        source = f"models:/{self._model}"
        if not self._place.startswith(SERVERS):  # a store here would look for it in MLFLOW_TRACKING_URI
            source = self._client.get_logged_model(self._model).artifact_location
        version = self._client.create_model_version(
            name, source, run_id=self._run, tags=told, model_id=self._model
        )
        return str(version.version)

    def close(self, status: Status) -> None:
        """End the run."""
        self._client.set_terminated(self._run, STATUSES[status])
