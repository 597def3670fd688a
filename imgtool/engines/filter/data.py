"""Data sets: pictures, and what a filter makes of them.

A filter is run over whole pictures, so that crops hold what it makes of them in their surroundings; the
maps of slow filters are kept in the cache folder. Sample ``number`` is a function of the seed and the number
alone, except with a stream: what its buffer holds depends on how fast pictures come, so that neither a
second run nor one that is resumed draws the same; a resumed run fills its buffer anew.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

import imgtool
from imgtool import files, images, samples
from imgtool.engines.filter import blackbox, model, stream, synthetic, targets
from imgtool.engines.filter.sample import Sample
from imgtool.engines.filter.targets import Target
from imgtool.errors import USAGE, ImgtoolError
from imgtool.samples import CACHE_BYTES, VALIDATION_SEED, Decoded, distinct, indexed_source, split
from imgtool.tiles import mirrored

if TYPE_CHECKING:
    from imgtool.engines.filter.settings import Train

Picture = npt.NDArray[Any]

WINDOW = 1024
"""Edge of what is taken of a larger photograph, where crops are no larger."""
STREAMED = 512
"""The same of a picture of a stream: its buffer holds hundreds."""
MARGIN = 32
"""Pixels by which a drawn picture is larger than the crop, whose place in it is drawn too."""
DIGEST = 16
"""Bytes in front of a map in the cache folder, by which a damaged one is known."""
ALIKE = 0.1 / 255
"""Mean difference up to which what a filter makes of a changed picture is its result, changed."""


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
class Symmetries:
    """Changes of a photo that a filter goes along with: they make several samples of one.

    Attributes:
        turned: What it makes of a photo mirrored and turned is its result, mirrored and turned.
        colours: What it makes of a photo whose colours are exchanged is its result, with them exchanged.
        negative: What it makes of a negative: "negative" of the result, the "same" result, or "" neither.
    """

    turned: bool = False
    colours: bool = False
    negative: str = ""

    def changed(self, seen: Picture, wanted: Picture, rng: np.random.Generator) -> tuple[Picture, Picture]:
        """Return a sample changed at random: what a network sees, uint8, and what is wanted, float32."""
        if self.turned:
            quarter, mirror = int(rng.integers(4)), bool(rng.integers(2))
            seen, wanted = (np.rot90(p[:, ::-1] if mirror else p, quarter) for p in (seen, wanted))
        if self.colours:
            order = rng.permutation(3)
            seen, wanted = seen[..., order], wanted[..., order] if wanted.shape[2] == 3 else wanted
        if self.negative and rng.random() < 0.5:
            seen = 255 - seen
            wanted = 1 - wanted if self.negative == "negative" else wanted
        return seen, wanted


def symmetries(target: Target) -> Symmetries:
    """Try a filter on a small drawn picture.

    Where it does not go along, as with directed kernels, iterations that sweep in one direction, or grey that
    weighs the colours, changed samples would teach what the filter does not do.
    """
    probe = synthetic.leaves(np.random.default_rng(1), 40, 56)
    photo = images.to_type(probe, np.uint8)
    plain = target.map(photo)

    def alike(changed: Picture, wanted: Picture) -> bool:
        found = target.map(np.ascontiguousarray(changed))
        return found.shape == wanted.shape and float(np.abs(found - wanted).mean()) <= ALIKE

    order = [1, 2, 0]
    forms = {"negative": 1 - plain, "same": plain}
    return Symmetries(
        alike(photo[:, ::-1], plain[:, ::-1]) and alike(np.rot90(photo), np.rot90(plain)),
        alike(photo[..., order], plain[..., order] if plain.shape[2:] == (3,) else plain),
        next((name for name, wanted in forms.items() if alike(255 - photo, wanted)), ""),
    )


# --- sources ---------------------------------------------------------------------------------


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
        yield _with_map(picture, target)


def _with_map(picture: stream.Picture, target: Target) -> Mapped:
    photo = window(picture.pixels, picture.name, STREAMED)
    return Mapped(photo, as_map(target.map(photo)))


# --- samples ---------------------------------------------------------------------------------


class Stage(NamedTuple):
    """A part of a run: its steps, samples per step, and the edge of their crops."""

    steps: int
    batch: int
    crop: int


def course(settings: Train) -> list[Stage]:
    """Return the parts of a run: equal numbers of steps, crops that double, batches that halve."""
    count, steps = settings.stages, settings.steps
    ends = [steps * part // count for part in range(count + 1)]
    parts = [
        Stage(end - start, max(settings.batch >> number, 1), settings.crop << number)
        for number, (start, end) in enumerate(pairwise(ends))
    ]
    return [part for part in parts if part.steps]


def stages(settings: Train) -> list[tuple[int, int]]:
    """Return steps and samples per step of the parts of a run, as ``Engine.stages`` wants them."""
    return [(part.steps, part.batch) for part in course(settings)]


@dataclass(frozen=True)
class Shape:
    """What samples look like.

    Attributes:
        parts: The parts of the run, by which crops grow.
        reach: Pixels around a crop that the network sees.
        symmetries: How samples are changed at random.
        drawn: Share of the samples that show drawn pictures.
    """

    parts: Sequence[Stage]
    reach: int
    symmetries: Symmetries = Symmetries()
    drawn: float = 0.0

    def crop(self, number: int) -> int:
        """Return the edge of the crop of a sample."""
        return self.parts[samples.stage_of([part[:2] for part in self.parts], number)].crop


class Samples(samples.Order[Source]):
    """The data set: crops of sources in proportion to their sizes, with surroundings, changed at random."""

    def __init__(
        self, sources: Sequence[Source], seed: int, length: int, shape: Shape, drawn: Source | None = None
    ) -> None:
        """Draw from ``sources``, and from ``drawn`` the share that ``shape`` says.

        Args:
            sources: Where from.
            seed: Of everything random.
            length: Samples that are called an epoch.
            shape: What they look like.
            drawn: The source of drawn pictures.
        """
        super().__init__(sources, seed)
        self.length, self.shape, self.drawn = length, shape, drawn

    def __len__(self) -> int:
        """Return the number of samples in an epoch."""
        return self.length

    def __getitem__(self, number: int) -> Sample:
        """Return sample ``number``, for any number from 0 on."""
        cv2.setNumThreads(0)  # the worker processes are the parallelism
        source, index, rng = self.chosen(number)
        crop, reach = self.shape.crop(number), self.shape.reach
        mapped = source.draw(index, rng, crop)
        top, left = (int(rng.integers(0, max(size - crop, 0) + 1)) for size in mapped.photo.shape[:2])
        seen, wanted = cut(mapped, (top, left), crop, reach)
        seen, values = self.shape.symmetries.changed(seen, images.to_float(wanted), rng)
        return Sample(
            torch.from_numpy(np.ascontiguousarray(seen.transpose(2, 0, 1))),
            torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1))),
        )

    def chosen(self, number: int) -> tuple[Source, int, np.random.Generator]:
        """Return the source of a sample, the index in it, and the sample's own randomness."""
        share = self.shape.drawn
        if self.drawn is not None and math.floor((number + 1) * share) > math.floor(number * share):
            return self.drawn, 0, np.random.default_rng([self.seed, 0, number])
        return super().chosen(number)


def cut(mapped: Mapped, corner: tuple[int, int], crop: int, reach: int) -> tuple[Picture, Picture]:
    """Cut what a network sees for a crop, and the crop of the map: mirrored where the picture ends.

    Args:
        mapped: The picture.
        corner: Top and left of the crop.
        crop: Its edge.
        reach: Pixels around it that the network sees.
    """
    spans = list(zip(corner, mapped.photo.shape[:2], strict=True))
    near, far = (
        [mirrored(start - more, start + crop + more, size) for start, size in spans] for more in (0, reach)
    )
    return mapped.photo[np.ix_(*far)], mapped.wanted[np.ix_(*near)]


# --- from settings ---------------------------------------------------------------------------

Split = tuple[list[Source], list[Source]]


def load(settings: Train) -> tuple[Samples, Samples]:
    """Build the training and the held-out set.

    Held out are the photographs of ``validate_on``, which are then not trained on; else those that a hash of
    their names chooses (5 %); of a stream alone its first pictures, and of drawn pictures alone others.
    Held-out crops are the same for every run, every seed and every part of a run.

    Raises:
        ImgtoolError: Code 2, for folders that do not exist or hold too little, sources that contradict each
            other, or crops that the network cannot take. Code 1: a stream fails.
    """
    net = model.build(settings)
    if settings.crop % net.multiple:
        what = f"--crop {settings.crop} is no multiple of {net.multiple}, as this network needs"
        raise ImgtoolError(what, f"take {-(-settings.crop // net.multiple) * net.multiple}", USAGE)
    folder = settings.target.removeprefix(f"{blackbox.PAIRS}:")
    (kept, held), drawn, changes = (
        (_of_pairs(settings, Path(folder).expanduser()), None, Symmetries())
        if folder != settings.target
        else _of_filter(settings, net.count)
    )
    parts = course(settings)
    share = settings.synthetic if kept else 1.0
    train = Shape(parts, net.reach, changes, share if drawn else 0.0)
    fixed = Shape([Stage(1, 1, settings.crop)], net.reach, drawn=0.0 if held else 1.0)
    length = settings.epoch_steps * settings.batch
    return (
        Samples(kept, settings.seed, length, train, drawn),
        Samples(held, VALIDATION_SEED, settings.held_out, fixed, None if held else drawn),
    )


def describe(examples: Samples) -> dict[str, Any]:
    """Return what the weights' header keeps of the training set: photographs by name, stream, drawn share."""
    found: dict[str, Any] = {"trained_on": []}
    for source in [*examples.sources, *([examples.drawn] if examples.drawn else [])]:
        found |= source.about()
    return found | ({"synthetic": examples.shape.drawn} if examples.drawn else {})


def _of_filter(settings: Train, count: int) -> tuple[Split, Source | None, Symmetries]:
    """Return the sources of a filter that can be run, that of drawn pictures, and how to change samples."""
    target = blackbox.resolve(settings.target)
    if target.channels != count:
        what = f"{settings.target} gives {target.channels} channel(s), and the network {count}"
        ours = settings.target.partition(":")[0] in targets.KINDS
        raise ImgtoolError(
            what, "leave out --channels" if ours else f"give --channels {target.channels}", USAGE
        )
    _check_shares(settings)
    edge = max(WINDOW, course(settings)[-1].crop)
    reader = Reader(target, edge)
    kept: list[Source] = []
    held: list[Source] = []
    apart = distinct(settings.validate_on)
    if settings.validate_on:
        held.append(_held_photographs(list(apart.values()), reader))
    if settings.photos:
        inside, out = _photographs(settings, set(apart), reader)
        kept.append(inside)
        held += [] if held else [out]
    if settings.stream:
        streamed, first = _streamed(settings, target, not held)
        kept.append(streamed)
        held += first
    return (kept, held), Drawn(target) if settings.synthetic else None, symmetries(target)


def _check_shares(settings: Train) -> None:
    """Refuse to train on nothing, and sources of which nothing would be taken."""
    others = bool(settings.photos or settings.stream)
    if not others and settings.synthetic < 1:
        hint = "give --photos DIR or --stream NAME, or --synthetic 1"
        what = "no training data named"
        if settings.synthetic:
            what = f"--synthetic {settings.synthetic:g} leaves samples for which no source is named"
        raise ImgtoolError(what, hint, USAGE)
    if others and settings.synthetic == 1:
        what = "--synthetic 1 leaves nothing for --photos and --stream"
        raise ImgtoolError(what, "lower it; to validate on photos, give --validate-on", USAGE)


def _held_photographs(paths: Sequence[Path], reader: Reader) -> Photographs:
    if not paths:
        raise ImgtoolError("no photographs to validate on", "check the path of --validate-on", USAGE)
    return Photographs(paths, Decoded(reader))


def _photographs(settings: Train, apart: set[Path], reader: Reader) -> tuple[Photographs, Photographs]:
    paths = [path for real, path in distinct(settings.photos).items() if real not in apart]
    if len(paths) < 2 - bool(apart):
        raise ImgtoolError("fewer than two photographs found", "name folders by --photos", USAGE)
    decoded = Decoded(reader, CACHE_BYTES // max(settings.workers, 1))
    if apart:
        return Photographs(paths, decoded), Photographs([], decoded)
    kept, out = split(paths, lambda path: indexed_source(path) or path.stem)
    return Photographs(kept, decoded), Photographs(out, Decoded(reader))


def _streamed(settings: Train, target: Target, validated: bool) -> tuple[Streamed, list[Source]]:
    """Return a stream, and its first pictures where they are what is validated on."""
    if settings.buffer_max < settings.buffer_min:
        what = f"--buffer-min {settings.buffer_min} is above --buffer-max {settings.buffer_max}"
        raise ImgtoolError(what, "raise --buffer-max", USAGE)
    place = stream.Place.of(settings)
    held: list[Source] = []
    apart: frozenset[bytes] = frozenset()
    if validated:
        first = stream.first(place, settings.held_out)
        if not first:
            raise ImgtoolError(f"the stream {place.text} holds no pictures", "name another by --stream")
        apart = frozenset(picture.digest for picture in first)
        held = [Listed([_with_map(picture, target) for picture in first])]
    counts = torch.zeros(max(settings.workers, 1), 2, dtype=torch.int64)
    counts.share_memory_()  # type: ignore[no-untyped-call]
    limits = stream.Limits(settings.buffer_min, settings.buffer_max, settings.buffer_delay, CACHE_BYTES)
    return Streamed(place, target, limits, apart, counts), held


def _of_pairs(settings: Train, folder: Path) -> Split:
    for name in ("photos", "stream", "synthetic"):
        if getattr(settings, name):
            what = f"--{name} cannot be used with --target {settings.target}"
            raise ImgtoolError(what, "what made the pairs cannot be run on other pictures", USAGE)
    apart = [pair for each in settings.validate_on for pair in blackbox.pairs_in(each)]
    taken = {before.resolve() for before, _ in apart}
    found = [pair for pair in blackbox.pairs_in(folder) if pair[0].resolve() not in taken]
    if len(found) < 2 - bool(apart):
        raise ImgtoolError(f"fewer than two pairs in {folder}", blackbox.LAYOUTS, USAGE)
    kept, out = (found, apart) if apart else split(found, lambda pair: pair[0].stem)
    read = images.read_rgb8 if model.channels(settings) == 3 else read_grey

    def source(paths: Sequence[tuple[Path, Path]], budget: int) -> Source:
        return Pairs(paths, Decoded(images.read_rgb8, budget // 2), Decoded(read, budget // 2))

    return [source(kept, CACHE_BYTES // max(settings.workers, 1))], [source(out, CACHE_BYTES)]
