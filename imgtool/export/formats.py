"""The formats: what writes them, what they can hold, and how close to torch they must be."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgtool.errors import ImgtoolError

if TYPE_CHECKING:
    from imgtool.export.order import Order

HALF = 1 / 255


@dataclass(frozen=True)
class Format:
    """A format of model files.

    Attributes:
        suffix: Of the file.
        module: The module of this package that writes it.
        limits: Precision to the largest difference to torch in float64, as a share of the output's range;
            None where the engine says what is lost.
        free: Whether lengths can stay free.
        more: Suffixes of files that belong to it.
    """

    suffix: str
    module: str
    limits: Mapping[str, float | None]
    free: bool = True
    more: tuple[str, ...] = ()

    def require(self) -> None:
        """Raise ``ImgtoolError`` where a package is missing, naming what to install."""
        self._writer().require()

    def write(self, order: Order, path: Path) -> Mapping[str, Any]:
        """Write a file, and return what is worth knowing of it.

        Raises:
            ImgtoolError: The converter cannot do it.
        """
        try:
            facts: Mapping[str, Any] = self._writer().write(order, path)
        except ImportError as fault:
            what = f"{fault.name or 'a package'} is installed but cannot be imported: {fault}"
            raise ImgtoolError(what.splitlines()[0], "install it again") from None
        return facts

    def _writer(self) -> Any:
        return importlib.import_module(f"imgtool.export.{self.module}")


FORMATS: Mapping[str, Format] = {
    "onnx": Format(".onnx", "onnx", {"fp32": 1e-5, "fp16": HALF, "int8": None}),
    "tflite": Format(".tflite", "tflite", {"fp32": 1e-4, "fp16": HALF, "int8": None}, free=False),
    "openvino": Format(".xml", "openvino", {"fp32": 1e-5, "fp16": HALF, "int8": None}, more=(".bin",)),
    "pt2": Format(".pt2", "pt2", {"fp32": 1e-5, "fp16": HALF}),
    "npz": Format(".npz", "npz", {"fp32": 1e-5}),
    "libcamera": Format(".tflite", "tflite", {"fp32": 1e-4}, free=False),
}
"""By the word of --to."""

MODELS = tuple(FORMATS)
"""The words of --to that stand for model files."""

SERVICES = ("azure-function", "docker")
"""The words of --to that stand for folders."""
