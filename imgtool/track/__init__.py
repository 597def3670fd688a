"""Records of a run elsewhere than in its folder: TensorBoard, MLflow, Weights & Biases.

The run folder stays the truth; what a tracker is told can be told again. No step waits for a tracker, and
no training ends because of one: what a tracker does not take is tried again, and then said. When a training
has ended, it waits about a minute at most for what is still to be sent.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from imgtool.engine import Engine
from imgtool.errors import USAGE, ImgtoolError
from imgtool.settings import Train
from imgtool.track import address

if TYPE_CHECKING:
    from torch import Tensor

    from imgtool.track.sink import Status

TITLES: Mapping[str, str] = {"tensorboard": "TensorBoard", "mlflow": "MLflow", "wandb": "Weights & Biases"}
"""The trackers, and what people call them."""
NEEDS: Mapping[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "wandb": ("wandb",),
}
"""The modules of each extra."""
STORES = ("http://", "https://", "sqlite:///", "postgresql", "mysql", "mssql", "databricks", "uc:")
"""How what MLflow records into may begin."""
OFF = ("", "none")
"""Words for no tracker: none was asked for, and none shall be."""
WITHOUT = "--track none goes on without it"
"""The end of the advice where a tracker cannot be opened."""
OURS = {"track_to": "--track-to", "experiment": "--experiment", "register_as": "--register"}
"""Settings that only a tracker reads, and their flags."""
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}"
"""What a registered model may be called everywhere."""


class Unreachable(ImgtoolError):
    """A tracker cannot be opened here: its package, server, store, folder or login is missing."""


class Tracker(Protocol):
    """Who is told how a run goes on."""

    def step(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        """Take the values of an optimiser step: "loss", its terms, "lr". Tensors may wait on their device.

        Args:
            step: Steps taken, this one among them.
            values: Name to scalar.
        """
        ...

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Take a row of ``log.jsonl``."""
        ...

    def picture(self, path: Path, step: int) -> None:
        """Take a picture that was written into the run folder."""
        ...

    def model(self, weights: Path, best: Mapping[str, Any]) -> None:
        """Take the best weights, when the run has ended.

        Args:
            weights: ``best.safetensors``.
            best: "epoch", "step", "scores".
        """
        ...


class Silent:
    """Takes everything and keeps nothing."""

    def step(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        """Keep nothing."""

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Keep nothing."""

    def picture(self, path: Path, step: int) -> None:
        """Keep nothing."""

    def model(self, weights: Path, best: Mapping[str, Any]) -> None:
        """Keep nothing."""


def check(settings: Train) -> None:
    """Refuse what no tracker can do, before anything is written.

    Raises:
        ImgtoolError: Code 2: settings of a tracker without one, a password in the place, a package that is
            missing, a place that the tracker does not record into, a name that no registered model may have.
    """
    kind: str = settings.track
    if not kind:
        _check_lone(settings)
    if kind in OFF:  # with "none", what else a file may say of a tracker changes nothing
        return
    _check_secret(settings.track_to)
    for module in NEEDS[kind]:
        if importlib.util.find_spec(module) is None:
            lacking = "" if module == kind else f" with {module}"
            what = f"--track {kind} needs {TITLES[kind]}{lacking}"
            raise Unreachable(what, f"pip install 'imgtool[{kind}]'", USAGE)
    _check_place(kind, settings.track_to)
    if settings.register_as and kind == "tensorboard":
        what = "--register: TensorBoard keeps no models"
        raise ImgtoolError(what, "take --track mlflow or --track wandb", USAGE)
    if settings.register_as and not re.fullmatch(NAME, settings.register_as):
        what = f"--register {settings.register_as}: no name of a model"
        raise ImgtoolError(what, "letters, digits and . _ - are possible", USAGE)


def _check_lone(settings: Train) -> None:
    for name, flag in OURS.items():
        if getattr(settings, name):
            what = f"{flag} is for a tracker, and there is none"
            raise ImgtoolError(what, "add --track mlflow, or another one", USAGE)


def unlike(begun: Train, wanted: Train) -> set[str]:
    """Return the settings of a run that do not hold for another tracker than the one it was begun with."""
    if begun.track == wanted.track:
        return set()
    return {"track_to", "register_as"} if wanted.track == "tensorboard" else {"track_to"}


def _check_secret(place: str) -> None:
    if address.has_password(place):
        what = "--track-to holds a password, which the run folder would keep"
        hint = (
            "set MLFLOW_TRACKING_URI to that address instead, or MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD: their passwords are not recorded"
        )
        raise ImgtoolError(what, hint, USAGE)


def _check_place(kind: str, place: str) -> None:
    if kind == "mlflow" and place and not place.startswith(STORES):
        what = f"--track-to {place}: MLflow keeps no runs in a folder any more"
        raise ImgtoolError(
            what, f"a file does: sqlite:///{place}/mlflow.db; or http://... of a server", USAGE
        )
    if kind != "mlflow" and "://" in place:
        what = f"--track-to {place}: {TITLES[kind]} records into a folder"
        raise ImgtoolError(what, "name a folder", USAGE)


@contextmanager
def begin(engine: Engine, settings: Train, folder: Path, say: Callable[[str], None]) -> Iterator[Tracker]:
    """Give the tracker that the settings name, and end its record however the block ends.

    A run that is resumed goes on in the record that ``track.json`` in its folder names.

    Args:
        engine: What is trained.
        settings: Of the run.
        folder: The run's.
        say: Told where to look at the run, what was registered, and what a tracker did not take.

    Raises:
        ImgtoolError: As ``check``; or the tracker cannot be begun: no server answers, nobody is logged in.
    """
    if settings.track in OFF:
        yield Silent()
        return
    check(settings)
    from imgtool.track.recorder import Recorder, about

    told = about(engine, settings, folder)
    sink = importlib.import_module(f"imgtool.track.{settings.track}").open_sink(told)
    recorder = Recorder(sink, told, say)
    status: Status = "failed"
    try:
        yield recorder
        status = "finished"
    except KeyboardInterrupt:
        status = "killed"
        raise
    finally:
        recorder.end(status)
