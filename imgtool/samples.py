"""What data sets of pictures share: decoded pictures, lists of files, held-out parts, a fixed order.

Sample ``number`` of a set is a function of the seed and the number alone, whoever asks and in whatever
order, so that data order survives worker processes and a resumed run.
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from imgtool import files
from imgtool.errors import USAGE, ImgtoolError
from imgtool.images import READABLE

Picture = npt.NDArray[Any]
Reader = Callable[[Path, int], Picture]
Item = TypeVar("Item")
Source = TypeVar("Source", bound=Sized)
Stages = Sequence[tuple[int, int]]
"""Parts of a run one after another: the steps of each, and its samples per step."""

VALIDATION_SEED = 20_000_003
"""Seed of held-out samples, whatever that of the training."""
CACHE_BYTES = 1_500_000_000
"""Memory for decoded pictures, of all worker processes together."""
HELD_OUT = 0.05
"""Share of the pictures that is held out."""


class Decoded:
    """Decoded pictures by path, the least recently used dropped when they exceed a budget."""

    def __init__(self, read: Reader, budget: int = CACHE_BYTES) -> None:
        """Hold up to ``budget`` bytes of what ``read`` makes of a path and a least length."""
        self._held: OrderedDict[tuple[Path, int], Picture] = OrderedDict()
        self._read, self._budget, self._bytes = read, budget, 0

    def __reduce__(self) -> tuple[type[Decoded], tuple[Any, ...]]:
        """Come empty to a worker process."""
        return Decoded, (self._read, self._budget)

    def __call__(self, path: Path, least: int = 0) -> Picture:
        """Return the picture ``(H, W, 3)``, from memory where it is held.

        Args:
            path: The file.
            least: Length that the shorter side must keep; 0 is all.
        """
        if (path, least) in self._held:
            self._held.move_to_end((path, least))
            return self._held[path, least]
        picture = self._read(path, least)
        self._held[path, least] = picture
        self._bytes += picture.nbytes
        while self._bytes > self._budget and len(self._held) > 1:
            self._bytes -= self._held.popitem(last=False)[1].nbytes
        return picture


class Order(Generic[Source]):
    """The order in which the items of sources are drawn: all of them in one order, then in another."""

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        """Draw from ``sources`` in proportion to their sizes; empty ones are left out."""
        self.sources = [source for source in sources if len(source)]
        self.seed = seed
        self._ends = np.cumsum([len(source) for source in self.sources])
        self._order = lru_cache(maxsize=4)(self._shuffled)

    def _shuffled(self, turn: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self.seed, 1, turn]).permutation(int(self._ends[-1]))

    def __getstate__(self) -> dict[str, object]:
        """Leave the cache of orders behind when sent to a worker process."""
        return {name: value for name, value in self.__dict__.items() if name != "_order"}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take up the state in a worker process."""
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=4)(self._shuffled)

    def chosen(self, number: int) -> tuple[Source, int, np.random.Generator]:
        """Return the source of sample ``number``, the index in it, and the sample's own randomness."""
        turn, position = divmod(number, int(self._ends[-1]))
        item = int(self._order(turn)[position])
        source = int(np.searchsorted(self._ends, item, side="right"))
        index = item - (int(self._ends[source - 1]) if source else 0)
        return self.sources[source], index, np.random.default_rng([self.seed, 0, number])


def pictures_in(folder: Path) -> list[Path]:
    """List the pictures in a folder and its sub-folders, sorted; a file stands for itself.

    Raises:
        ImgtoolError: Code 2: no such folder.
    """
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise ImgtoolError(f"no such folder: {folder}", "check the path", USAGE)
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in READABLE and p.is_file())


def distinct(folders: Sequence[Path]) -> dict[Path, Path]:
    """Return the pictures of folders, each once though folders overlap: resolved path to path."""
    return {path.resolve(): path for folder in folders for path in pictures_in(folder)}


@lru_cache(maxsize=64)
def _index(folder: Path) -> Mapping[str, str]:
    """Return file to "from" of a folder's ``index.tsv``; {} where there is none."""
    path = folder / "index.tsv"
    if not path.exists():
        return {}
    rows = csv.DictReader(files.read(path).decode(errors="replace").splitlines(), delimiter="\t")
    return {row["file"]: row["from"] for row in rows if row.get("file") and row.get("from")}


def indexed_source(path: Path) -> str:
    """Return the photograph that a file is a view of, as ``index.tsv`` beside it says, "" where it does not.

    The table has the columns file and from.
    """
    return _index(path.parent).get(path.name, "")


def held(name: str, share: float = HELD_OUT) -> bool:
    """Decide by the name alone whether a picture is held out, whatever else is in its folder."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) < share * 2**32


def split(
    items: Sequence[Item], name: Callable[[Item], str], decide: Callable[[str, float], bool] = held
) -> tuple[list[Item], list[Item]]:
    """Split items into those to train on and those held out, by a hash of their names.

    Where the names put all on one side, as it may for a few, those of the last name are held out; where
    all have one name, the last item.

    Args:
        items: Any number.
        name: Item to the name that decides, the same for items that belong on the same side.
        decide: Name and share to whether what has the name is held out.
    """
    kept = [item for item in items if not decide(name(item), HELD_OUT)]
    out = [item for item in items if decide(name(item), HELD_OUT)]
    if items and not (kept and out):
        last = name(items[-1])
        kept = [item for item in items if name(item) != last]
        out = [item for item in items if name(item) == last]
    if not kept:
        kept, out = list(items[:-1]), list(items[-1:])
    return kept, out


def turns(count: int, photos: int, seed: int) -> Iterator[int]:
    """Yield the photo of each pair that is written: all of them in one order, then in another."""
    for number in range(count):
        turn, position = divmod(number, photos)
        if not position:
            order = np.random.default_rng([seed, 3, turn]).permutation(photos)
        yield int(order[position])


def stage_of(stages: Stages, number: int) -> int:
    """Return the index of the stage in which a run asks for sample ``number``.

    Beyond the last one's end that is the last.

    >>> [stage_of([(2, 8), (3, 4)], number) for number in (0, 15, 16, 27, 28)]
    [0, 0, 1, 1, 1]
    """
    ends = accumulate(steps * batch for steps, batch in stages)
    return next((index for index, end in enumerate(ends) if number < end), len(stages) - 1)


def smoothed(values: Sequence[float], decay: float) -> float:
    """Return the last of exponential moving averages that begin at the first value; NaN for none.

    >>> smoothed([4.0, 2.0, 2.0], 0.5)
    2.5
    """
    mean = values[0] if values else math.nan
    for value in values[1:]:
        mean = decay * mean + (1 - decay) * value
    return mean
