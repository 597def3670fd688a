"""TensorBoard: event files in the run folder, which ``tensorboard --logdir runs`` shows."""

from __future__ import annotations

import importlib
import io
import itertools
import json
import os
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from imgtool.track import WITHOUT, Unreachable
from imgtool.track.package import Package
from imgtool.track.sink import About, Row, Status

RUNS = "runs"
"""Where run folders are by default."""
HIDDEN = ("track", "track_to", "experiment", "register_as")
"""Settings that are no hyperparameters."""
ENDED = {"finished": "STATUS_SUCCESS", "failed": "STATUS_FAILURE", "killed": "STATUS_FAILURE"}


def open_sink(about: About) -> TensorBoard:
    """Begin a file of events.

    Raises:
        Unreachable: The folder cannot be written.
    """
    to = about.settings.track_to
    try:
        if to:
            return TensorBoard(about, _among_others(about, Path(to)), Path(to))
        return TensorBoard(about, about.folder, _root(about.folder))
    except OSError as fault:
        what = f"TensorBoard cannot record into {to or about.folder}: {fault.strerror}"
        raise Unreachable(what, f"name another folder by --track-to; {WITHOUT}") from None


def _among_others(about: About, to: Path) -> Path:
    """Return the folder in which a run goes on, or a new one: no two runs of the same name share one."""
    place = Path(about.experiment, about.name)
    before = Path(about.before.get("run", "")).parts
    if before[-len(place.parts) : -1] == place.parts[:-1]:  # the rest of its path may have been moved
        return to / place.with_name(before[-1])
    for number in itertools.count(1):
        folder = to / (place if number == 1 else place.with_name(f"{place.name}-{number}"))
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir()
            break
    return folder


def _root(folder: Path) -> Path:
    """Return the folder of all runs that a run is one of."""
    return next((each for each in folder.parents if each.name == RUNS), folder)


def size(png: bytes) -> tuple[int, int]:
    """Return width and height of a PNG, from its header (PNG specification, 11.2.2)."""
    width, height = struct.unpack(">II", png[16:24])
    return width, height


class TensorBoard:
    """A file of events: each write goes into it whole or not at all."""

    rewinds = True
    graphs = False

    def __init__(self, about: About, folder: Path, root: Path) -> None:
        """Make the file and tell all settings."""
        self._event = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self._summary = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
        self._records = importlib.import_module("tensorboard.summary.writer.record_writer").RecordWriter
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / name
        self.memory = {"run": str(folder.resolve()), "to": str(root)}
        self._name = Path(about.name).with_name(folder.resolve().name).as_posix()
        self.where = f"tensorboard --logdir {root}"
        self._write(
            [self._event.Event(file_version="brain.Event:2", wall_time=time.time()), *self._first(about)]
        )

    def _first(self, about: About) -> list[Any]:
        """Return the events that tell settings, working directory and machine."""
        api = importlib.import_module("tensorboard.plugins.hparams.summary_v2")
        text = importlib.import_module("tensorboard.plugins.text.summary_v2").text_pb
        chosen = about.settings.model_dump(mode="json", exclude={"resume", "out", *HIDDEN})
        parameters = {
            name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
            for name, value in chosen.items()
        }
        best = [api.Metric(f"best/{name}") for name in (about.engine.best, about.engine.otherwise) if name]
        table = "\n".join(f"| {name} | {value} |" for name, value in about.facts.items())
        summaries = [
            api.hparams_config_pb([api.HParam(name) for name in parameters], best),
            api.hparams_pb(parameters, trial_id=self._name),
            text("settings", "\n".join(f"    {name} = {value}" for name, value in about.parameters.items())),
            text("facts", f"| | |\n|---|---|\n{table}"),
            text("packages", "\n".join(f"    {each}" for each in about.packages)),
        ]
        return [self._told(each) for each in summaries]

    def _told(self, summary: Any, step: int = 0, when: float = 0.0) -> Any:
        return self._event.Event(summary=summary, step=step, wall_time=when or time.time())

    def _write(self, events: Sequence[Any]) -> None:
        """Append events; a full disk leaves the file as it was."""
        gathered = io.BytesIO()
        writer = self._records(gathered)
        for event in events:
            writer.write(event.SerializeToString())
        with self._path.open("ab") as file:
            end = file.tell()
            try:
                file.write(gathered.getvalue())
                file.flush()
            except OSError:
                file.truncate(end)
                raise

    def rewind(self, step: int) -> None:
        """Have TensorBoard forget this step and what follows it in older files of the run."""
        log = self._event.SessionLog
        self._write([
            self._event.Event(step=step, session_log=log(status=log.START), wall_time=time.time())
        ])  # fmt: skip

    def numbers(self, rows: Sequence[Row]) -> None:
        """Write numbers."""
        value = self._summary.Value
        told = [(row, [value(tag=tag, simple_value=x) for tag, x in row.values.items()]) for row in rows]
        self._write([self._told(self._summary(value=each), row.step, row.time) for row, each in told])

    def picture(self, path: Path, tag: str, step: int) -> None:
        """Write a picture; all sheets of samples are one picture that changes."""
        png = path.read_bytes()
        width, height = size(png)
        image = self._summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png)
        name = tag.rpartition("/")[0] or Path(tag).stem
        self._write([self._told(self._summary(value=[self._summary.Value(tag=name, image=image)]), step)])

    def file(self, path: Path) -> None:
        """Do nothing: the files lie in the run folder."""

    def model(self, package: Package) -> str:
        """Write what the best weights are."""
        text = importlib.import_module("tensorboard.plugins.text.summary_v2").text_pb
        card = json.dumps(package.card, indent=2)
        indented = "\n".join(f"    {each}" for each in card.splitlines())
        self._write([self._told(text("best", indented), int(package.card.get("step") or 0))])
        return ""

    def close(self, status: Status) -> None:
        """Write how the run ended."""
        hparams = "tensorboard.plugins.hparams."
        data = importlib.import_module(hparams + "plugin_data_pb2")
        code = getattr(importlib.import_module(hparams + "api_pb2"), ENDED[status])
        metadata = importlib.import_module(hparams + "metadata")
        # TensorBoard's own function for this needs TensorFlow.
        ended = data.HParamsPluginData(
            session_end_info=data.SessionEndInfo(status=code, end_time_secs=time.time())
        )
        value = self._summary.Value(
            tag=metadata.SESSION_END_INFO_TAG,
            metadata=metadata.create_summary_metadata(ended),
            tensor=metadata.NULL_TENSOR,
        )
        self._write([self._told(self._summary(value=[value]))])
