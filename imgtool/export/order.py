"""What a writer of files is given, and the lengths of the inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from imgtool.errors import ImgtoolError
from imgtool.port import length

if TYPE_CHECKING:
    import numpy.typing as npt

    from imgtool.port import Port

    Arrays = tuple[npt.NDArray[Any], ...]

Precision = Literal["fp32", "fp16", "int8"]

PICTURE = ("height", "width")
"""The axes that --size fixes."""


@dataclass(frozen=True)
class Order:
    """A network to be written.

    Attributes:
        port: What the file shall hold, on the CPU, in evaluation mode, float32.
        sizes: Length of every axis: that of the file where it is fixed, else of the example.
        free: Axes that stay free.
        about: What the file shall say of itself, as JSON; see ``sidecar``.
        precision: Of the numbers in it.
        calibration: Real inputs to find the ranges of 8 bits with; empty for other precisions.
        opset: Of ONNX.
        gpu_safe: Whether TFLite spells sub-pixel layers as transposed convolutions.
    """

    port: Port
    sizes: Mapping[str, int]
    free: frozenset[str]
    about: Mapping[str, Any]
    precision: Precision = "fp32"
    calibration: Sequence[Arrays] = ()
    opset: int = 18
    gpu_safe: bool = False

    def shape(self, number: int) -> tuple[int, ...]:
        """Return the shape of input ``number`` with every axis at its length."""
        return tuple(length(word, self.sizes) for word in self.port.inputs[number].shape)


def read_size(text: str, flag: str) -> tuple[int, int]:
    """Return height and width of a text such as "1080x1920".

    Raises:
        ImgtoolError: It is no such text.
    """
    found = re.fullmatch(r"\s*(\d{1,5})\s*[xX×]\s*(\d{1,5})\s*", text)
    if not found or "0" in found.groups():
        raise ImgtoolError(f"{flag} {text} is no size", f"give HEIGHTxWIDTH, such as {flag} 1080x1920")
    return int(found[1]), int(found[2])


def lengths(port: Port, size: str, dynamic: bool, free_form: bool) -> tuple[dict[str, int], frozenset[str]]:
    """Return the length of every axis, and which axes stay free.

    Args:
        port: Whose axes.
        size: What --size says, "" for nothing.
        dynamic: Whether sizes are to stay free although --size names one.
        free_form: Whether the format knows free lengths.

    Raises:
        ImgtoolError: A size that the network cannot take.
    """
    sizes = {name: axis.usual for name, axis in port.axes.items()}
    if size:
        if not set(PICTURE) <= set(port.axes):
            raise ImgtoolError("--size: this network takes no pictures of a size", "leave it out")
        sizes |= dict(zip(PICTURE, sized(port, size, "--size"), strict=True))
    can = frozenset(name for name, axis in port.axes.items() if axis.free and free_form)
    return sizes, can if dynamic or not size else frozenset()


def sized(port: Port, size: str, flag: str) -> tuple[int, int]:
    """Return height and width of a text, if the network takes such pictures, or takes none at all.

    Raises:
        ImgtoolError: It cannot take them.
    """
    found = read_size(size, flag)
    for name, given in zip(PICTURE, found, strict=True):
        axis = port.axes.get(name)
        if axis is not None and (given % axis.multiple or given < axis.least):
            least = -(-axis.least // axis.multiple) * axis.multiple
            near = max(-(-given // axis.multiple) * axis.multiple, least)
            rule = f"it must be {least} or more" + f", a multiple of {axis.multiple}" * (axis.multiple > 1)
            what = f"{flag} {size}: a {name} of {given} is not possible"
            raise ImgtoolError(what, f"{rule}, such as {near}")
    return found
