"""What an engine tells of a network that is to run elsewhere: its inputs and outputs, in shapes and words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn

    Pixels = npt.NDArray[Any]


def length(word: int | str, sizes: Mapping[str, int]) -> int:
    """Return a length of a ``Slot``: a number, an axis, or an axis times or divided by a number.

    >>> [length(word, {"height": 6}) for word in (3, "height", "2*height", "height/2")]
    [3, 6, 12, 3]
    """
    if isinstance(word, int):
        return word
    factor, _, divided = word.rpartition("*")
    axis, _, divisor = divided.partition("/")
    return int(factor or 1) * sizes[axis] // int(divisor or 1)


def axis_of(word: int | str) -> str:
    """Return the axis that a length speaks of, "" for a number.

    >>> [axis_of(word) for word in (3, "height", "2*height", "height/2")]
    ['', 'height', 'height', 'height']
    """
    return "" if isinstance(word, int) else word.rpartition("*")[2].partition("/")[0]


@dataclass(frozen=True)
class Axis:
    """A length of an exported network's inputs that the user may choose, or leave free.

    Attributes:
        usual: Its length where nothing is said.
        multiple: It must be a multiple of this.
        least: Its smallest length.
        free: Whether it may stay free in formats that know free lengths.
    """

    usual: int
    multiple: int = 1
    least: int = 1
    free: bool = True


@dataclass(frozen=True)
class Slot:
    """An input or an output of an exported network; float32.

    Attributes:
        name: Its name in the file.
        shape: Lengths; a word is the name of an ``Axis``, or, of an output, an expression such as "2*height".
        low: Least value that is meant.
        high: Largest value that is meant; differences are judged as shares of ``high - low``, or of what the
            output covers where that is more.
        meaning: What it holds, with its unit, in a sentence.
        picture: Whether it is ``(B, C, H, W)``; formats of phones store such as ``(B, H, W, C)``.
    """

    name: str
    shape: tuple[int | str, ...]
    low: float
    high: float
    meaning: str
    picture: bool = False


@dataclass(frozen=True)
class Loss:
    """What arithmetic in 8 bits may cost, in the engine's own terms.

    Attributes:
        name: Such as "PSNR to torch" or "angle".
        unit: Such as "dB" or "degrees".
        of: ``(outputs of torch, outputs of the file) -> value`` for one set of inputs.
        limit: The mean over real inputs must be at least, or at most, this.
        higher_is_better: Its direction.
        worst: What no real input may be worse than; None where the mean alone is judged.
    """

    name: str
    unit: str
    of: Callable[[Sequence[Pixels], Sequence[Pixels]], float]
    limit: float
    higher_is_better: bool
    worst: float | None = None

    def holds(self, value: float, limit: float) -> bool:
        """Tell whether a value keeps a limit; one that is not a number keeps none."""
        return value >= limit if self.higher_is_better else value <= limit


@dataclass(frozen=True)
class Port:
    """What a file that runs elsewhere holds of an engine: a network with named inputs and outputs.

    Attributes:
        module: Takes tensors in the order of ``inputs`` and returns one tensor, or a tuple in the order of
            ``outputs``; in float64 it computes in float64. No branch of it depends on values.
        inputs: What it takes.
        outputs: What it gives.
        axes: The words of the inputs' shapes.
        before: The steps from a file to the inputs, in words.
        after: The steps from the outputs to a result, in words.
        real: ``(file, lengths of the axes) -> inputs`` of a real photo; arrays of float32.
        made: ``(kind, lengths, generator) -> inputs`` without one: "noise", "flat", or "extreme" values.
        facts: What ``Engine.ported`` needs beside the file; JSON.
        loss: What 8 bits may cost; None judges by PSNR.
        refuse: Format or precision to the reason why it makes no sense.
        beside: Suffix to content of files that go with the file, such as ".tuning.json".
        note: What a user should know of what was chosen; "" for nothing.
    """

    module: nn.Module
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    axes: Mapping[str, Axis]
    before: str
    after: str
    real: Callable[[Path, Mapping[str, int]], tuple[Pixels, ...]]
    made: Callable[[str, Mapping[str, int], Any], tuple[Pixels, ...]]
    facts: Mapping[str, object] = field(default_factory=dict)
    loss: Loss | None = None
    refuse: Mapping[str, str] = field(default_factory=dict)
    beside: Mapping[str, bytes] = field(default_factory=dict)
    note: str = ""
