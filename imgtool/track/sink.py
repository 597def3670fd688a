"""What every tracker is told and must do: the seam between ``Recorder`` and the three of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from imgtool.engine import Engine
from imgtool.settings import Train

if TYPE_CHECKING:
    from imgtool.track.package import Package

Status = Literal["finished", "failed", "killed"]


class Row(NamedTuple):
    """Numbers of one step.

    Attributes:
        step: Steps taken.
        time: Seconds since 1970.
        values: Name, such as "train/loss", to a finite number.
    """

    step: int
    time: float
    values: Mapping[str, float]


@dataclass(frozen=True)
class About:
    """A run as it begins, or goes on.

    Attributes:
        engine: What is trained.
        settings: Of the run.
        folder: The run's.
        name: What the run is called.
        group: What the runs are called that it is one of, "" for a run of its own.
        experiment: What gathers runs.
        parameters: Every setting, as text, but where it records to.
        facts: Version, working directory's commit, machine: name to text.
        packages: What is installed, "name==version".
        before: What ``track.json`` says of the record to go on with; {} begins a new one.
    """

    engine: Engine
    settings: Train
    folder: Path
    name: str
    group: str
    experiment: str
    parameters: Mapping[str, str]
    facts: Mapping[str, str]
    packages: Sequence[str]
    before: Mapping[str, Any]


class Sink(Protocol):
    """One tracker's record of one run. Each method raises what it likes; it may then be called again.

    Attributes:
        memory: What ``track.json`` shall say of the record: "run", its name for the tracker, "to", and what
            else the tracker has to know when the run goes on.
        where: How to look at it, in words.
        rewinds: Whether ``rewind`` takes back what a run told before it was killed; if not, it is not told
            twice.
        graphs: Whether a model is wanted with its graph, which takes seconds.
    """

    memory: Mapping[str, Any]
    where: str
    rewinds: bool
    graphs: bool

    def rewind(self, step: int) -> None:
        """Take back what was told of this step and those after it."""
        ...

    def numbers(self, rows: Sequence[Row]) -> None:
        """Take numbers."""
        ...

    def picture(self, path: Path, tag: str, step: int) -> None:
        """Take a picture; ``tag`` is its path in the run folder."""
        ...

    def file(self, path: Path) -> None:
        """Take a file of the run folder, that may have been taken before."""
        ...

    def model(self, package: Package) -> str:
        """Take the best weights; return words about what was registered, or ""."""
        ...

    def close(self, status: Status) -> None:
        """End the record."""
        ...
