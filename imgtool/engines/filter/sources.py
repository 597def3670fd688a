"""Where samples come from: photographs and what a filter makes of them, pairs, drawn pictures, streams.

A filter is run over whole pictures, so that crops hold what it makes of them in their surroundings; the
maps of slow filters are kept in the cache folder.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

import imgtool
from imgtool import files, images
from imgtool.engines.filter import stream, synthetic
from imgtool.engines.filter.targets import Target
from imgtool.errors import ImgtoolError
from imgtool.samples import Decoded, indexed_source

if TYPE_CHECKING:
    pass

Picture = npt.NDArray[Any]

WINDOW = 1024
"""Edge of what is taken of a larger photograph, where crops are no larger."""
STREAMED = 512
"""The same of a picture of a stream: its buffer holds hundreds."""
MARGIN = 32
"""Pixels by which a drawn picture is larger than the crop, whose place in it is drawn too."""
DIGEST = 16
"""Bytes in front of a map in the cache folder, by which a damaged one is known."""


class Mapped(NamedTuple):
    """A picture and what is wanted of it.

    Attributes:
        photo: ``(H, W, 3)`` uint8 RGB.
        wanted: ``(H, W, C)``, uint8, or float16 where 1 is white.
    """

    photo: Picture
    wanted: Picture

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return int(self.photo.nbytes + self.wanted.nbytes)


class Source(Protocol):
    """Something that samples can be drawn from."""

    def __len__(self) -> int:
        """Return how many different pictures there are at a time."""
        ...

    def draw(self, index: int, rng: np.random.Generator, crop: int) -> Mapped:
        """Return a picture with its map, from which a crop is cut at a place that ``rng`` then draws."""
        ...

    def about(self) -> dict[str, Any]:
        """Return what the weights' header keeps of it."""
        ...


def window(photo: Picture, name: str, edge: int = WINDOW) -> Picture:
    """Return what is taken of a photograph: all, or of a large one a square whose place its name gives."""
    height, width = photo.shape[:2]
    if max(height, width) <= edge:
        return photo
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]))
    top, left = (int(rng.integers(0, max(size - edge, 0) + 1)) for size in (height, width))
    return np.ascontiguousarray(photo[top : top + edge, left : left + edge])


def as_map(found: Picture) -> Picture:
    """Return a filter's map ``(H, W)`` or ``(H, W, C)`` as it is held: ``(H, W, C)``.

    That is uint8 where the filter computes in 8 bits, which halves what it takes, else float16.
    """
    plain = found[..., None] if found.ndim == 2 else found
    levels = np.rint(255 * plain)
    exact = levels.min(initial=0) >= 0 and levels.max(initial=0) <= 255
    if exact and float(np.abs(255 * plain - levels).max(initial=0)) < 1e-3:
        return np.ascontiguousarray(levels, np.uint8)
    return np.ascontiguousarray(plain, np.float16)


@dataclass(frozen=True)
class Reader:
    """Reads a photograph and runs the filter over it, or takes its map from the cache folder."""

    target: Target
    edge: int = WINDOW

    def __call__(self, path: Path, least: int = 0) -> Any:
        """Return the photograph with its map, a ``Mapped``; raises as ``images.read``."""
        photo = window(images.read_rgb8(path), path.name, self.edge)
        if not self.target.slow:
            return Mapped(photo, as_map(self.target.map(photo)))
        place = self._place(photo)
        wanted = _kept(place, (*photo.shape[:2], self.target.channels))
        if wanted is None:
            wanted = as_map(self.target.map(photo))
            _keep(place, wanted)
        return Mapped(photo, wanted)

    def _place(self, photo: Picture) -> Path:
        versions = f"{imgtool.__version__} {cv2.__version__}"
        told = f"{self.target.spec} {versions} {photo.shape}".encode()
        name = hashlib.sha256(told + photo.tobytes()).hexdigest()[:32]
        return files.cache_folder() / "filter" / self.target.name / name


def _kept(place: Path, shape: tuple[int, int, int]) -> Picture | None:
    """Return a map of the cache folder, None where there is none, or it is damaged."""
    try:
        data = files.read(place)
    except ImgtoolError:
        return None
    told, content = data[:DIGEST], data[DIGEST:]
    kind = np.uint8 if len(content) == math.prod(shape) else np.float16
    size = np.dtype(kind).itemsize * math.prod(shape)
    if len(content) != size or hashlib.sha256(content).digest()[:DIGEST] != told:
        return None
    return np.frombuffer(content, kind).reshape(shape)


def _keep(place: Path, wanted: Picture) -> None:
    content = wanted.tobytes()
    try:
        files.write(place, hashlib.sha256(content).digest()[:DIGEST] + content)
    except ImgtoolError:  # a full disk costs time, and no more
        return


@dataclass
class Photographs:
    """Photographs whose maps a filter makes."""

    paths: Sequence[Path]
    decoded: Decoded

    def __len__(self) -> int:
        """Return the number of photographs."""
        return len(self.paths)

    def draw(self, index: int, rng: np.random.Generator, crop: int) -> Mapped:
        """Return a photograph with its map."""
        return self.decoded(self.paths[index])  # type: ignore[return-value]

    def about(self) -> dict[str, Any]:
        """Return the photographs by source or name."""
        return {"trained_on": sorted({indexed_source(path) or path.stem for path in self.paths})}


@dataclass
class Pairs:
    """Photographs and, in files of the same size, what something unknown made of them.

    Attributes:
        paths: Photograph and result.
        photos: Where decoded photographs are kept.
        results: The same of results.
    """

    paths: Sequence[tuple[Path, Path]]
    photos: Decoded
    results: Decoded

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.paths)

    def draw(self, index: int, rng: np.random.Generator, crop: int) -> Mapped:
        """Return a pair; raises ``ImgtoolError`` where the sizes differ."""
        before, after = self.paths[index]
        photo, wanted = self.photos(before), self.results(after)
        if photo.shape[:2] != wanted.shape[:2]:
            sizes = [f"{each.shape[1]}x{each.shape[0]}" for each in (photo, wanted)]
            what = f"{before} is {sizes[0]}, its output {sizes[1]}"
            raise ImgtoolError(what, "imgtool data check filter lists all such pairs")
        return Mapped(photo, wanted)

    def about(self) -> dict[str, Any]:
        """Return the photographs by name."""
        return {"trained_on": sorted({before.stem for before, _ in self.paths})}


def read_grey(path: Path, least: int = 0) -> Picture:
    """Read a file as ``(H, W, 1)`` uint8: 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601)."""
    return np.asarray(cv2.cvtColor(images.read_rgb8(path), cv2.COLOR_RGB2GRAY))[..., None]


@dataclass
class Drawn:
    """Drawn pictures: a new one for each sample."""

    target: Target

    def __len__(self) -> int:
        """Return 1: there is no list of them."""
        return 1

    def draw(self, index: int, rng: np.random.Generator, crop: int) -> Mapped:
        """Draw a picture a little larger than a crop, and run the filter over it."""
        photo = synthetic.picture(rng, crop + MARGIN, crop + MARGIN)
        return Mapped(photo, as_map(self.target.map(photo)))

    def about(self) -> dict[str, Any]:
        """Return that there are such."""
        return {"drawn_pictures": True}


@dataclass
class Listed:
    """Pictures in memory."""

    held: Sequence[Mapped]

    def __len__(self) -> int:
        """Return how many."""
        return len(self.held)

    def draw(self, index: int, rng: np.random.Generator, crop: int) -> Mapped:
        """Return one of them."""
        return self.held[index]

    def about(self) -> dict[str, Any]:
        """Return nothing."""
        return {}


@dataclass
class Streamed:
    """A stream's pictures, through a buffer in each process that draws.

    The thread that reads also runs the filter, so that a draw costs no more than a crop.

    Attributes:
        place: The stream.
        target: The filter.
        limits: Of the buffers of all processes together.
        apart: Digests of the pictures that are not drawn.
        counts: For each process the pictures that have come and the draws, ``(P, 2)`` int64, shared.
    """

    place: stream.Place
    target: Target
    limits: stream.Limits
    apart: frozenset[bytes]
    counts: Tensor
    _buffer: tuple[int, stream.Buffer[Mapped]] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        """Return the most pictures that the buffers hold."""
        return self.limits.most

    def __getstate__(self) -> dict[str, object]:
        """Leave the buffer behind when sent to a worker process."""
        return self.__dict__ | {"_buffer": None}

    def draw(self, index: int, rng: np.random.Generator, crop: int) -> Mapped:
        """Draw any picture of this process's buffer, which the first draw starts; raises as the buffer."""
        number, buffer = self._here(rng)
        found = buffer.draw(rng)
        self.counts[number] = torch.tensor([buffer.came, buffer.drawn])
        return found

    def _here(self, rng: np.random.Generator) -> tuple[int, stream.Buffer[Mapped]]:
        worker = get_worker_info()
        if self._buffer is None or self._buffer[0] != os.getpid():
            # Each process takes the shards in an order of its own, and a resumed run in another.
            pictures = partial(stream.endless, self.place, int(rng.integers(2**31)), self.apart)
            share = worker.num_workers if worker else 1
            limits = replace(
                self.limits,
                least=-(-self.limits.least // share),
                most=-(-self.limits.most // share),
                budget=self.limits.budget // share,
            )
            self._buffer = os.getpid(), stream.Buffer(partial(_mapped, pictures, self.target), limits)
        return worker.id if worker else 0, self._buffer[1]

    def about(self) -> dict[str, Any]:
        """Return the stream, how many pictures have come, and how often each was drawn: the echo factor."""
        came, drawn = (int(each) for each in self.counts.sum(0))
        return {"stream": self.place.text, "pictures": came, "echo": drawn / came if came else 0.0}


def _mapped(pictures: Callable[[], Iterator[stream.Picture]], target: Target) -> Iterator[Mapped]:
    """Yield the pictures of a stream with their maps."""
    cv2.setNumThreads(0)
    for picture in pictures():
        yield with_map(picture, target)


def with_map(picture: stream.Picture, target: Target) -> Mapped:
    """Return a picture of a stream with its map."""
    photo = window(picture.pixels, picture.name, STREAMED)
    return Mapped(photo, as_map(target.map(photo)))
