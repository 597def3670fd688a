"""What a run learns from, batch after batch: the numbers of its samples, and who prepares them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from imgtool import dist
from imgtool.engine import Examples
from imgtool.errors import ImgtoolError
from imgtool.samples import Stages


class _Guarded(Dataset[Any]):
    """Hands a user's fault on as a sample: torch would remake it from the text of its traceback."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __getitem__(self, number: int) -> Any:
        try:
            return self.examples[number]
        except ImgtoolError as fault:
            return fault


def _collate(samples: Sequence[Any]) -> Any:
    faults = [sample for sample in samples if isinstance(sample, ImgtoolError)]
    return faults[0] if faults else default_collate(list(samples))


@dataclass(frozen=True)
class Numbers:
    """The sample numbers of every batch of a run, made as they are asked for.

    Attributes:
        stages: Steps and samples per step of each part of the run.
        start: Step to begin at.
        world: The processes that share each batch; of the numbers, this one's part are made.
    """

    stages: Stages
    start: int = 0
    world: dist.World = field(default_factory=dist.World)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield batch after batch: each has the numbers that follow those of the step before."""
        first, past = 0, self.start
        for steps, size in self.stages:
            gone = min(past, steps)
            past -= gone
            first += gone * size
            for _ in range(steps - gone):
                part = self.world.part(size)
                yield list(range(first + part.start, first + part.stop))
                first += size

    def __len__(self) -> int:
        """Return the number of batches."""
        return max(sum(steps for steps, _ in self.stages) - self.start, 0)


def size_at(stages: Stages, step: int) -> int:
    """Return the samples of a step, of all processes together; beyond the end 0.

    >>> [size_at([(2, 8), (1, 4)], step) for step in range(4)]
    [8, 8, 4, 0]
    """
    for steps, size in stages:
        if step < steps:
            return size
        step -= steps
    return 0


def load(examples: Examples, numbers: Iterable[list[int]], workers: int) -> Iterator[Any]:
    """Yield the batches of the given sample numbers, in their order.

    Raises:
        ImgtoolError: As the data set raised it, also from another process.
    """
    loader = DataLoader(
        _Guarded(examples),
        batch_sampler=numbers,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_start_worker if workers else None,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
        # Else each loader, and so each resume, would draw from the run's own random numbers.
        generator=torch.Generator(),
    )
    batches = iter(loader)
    if workers and hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        # Torch's own handler raises wherever the run is, even amid saving; it also looks when it waits.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    while (batch := _next(batches)) is not None:
        if isinstance(batch, ImgtoolError):
            raise batch
        yield batch


def _next(batches: Iterator[Any]) -> Any:
    """Return the next batch, or None; turn the end of a process that should make it into advice."""
    try:
        return next(batches, None)
    except (RuntimeError, ConnectionError, EOFError) as fault:
        # What ends while it hands over a batch is seen as a broken connection. A fault of the data
        # set itself begins with "Caught", and is a bug.
        lost = str(fault).startswith("DataLoader worker")
        if str(fault).startswith("Caught") or (isinstance(fault, RuntimeError) and not lost):
            raise
        raise ImgtoolError(
            "a process that prepares data was killed, perhaps for its memory", "lower --workers"
        ) from None


def _start_worker(number: int) -> None:
    """Leave Ctrl-C to the main process, which may still need its data, and one core to each worker.

    SIGTERM must end a worker: by it the main process, when it ends, ends those that still wait.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
