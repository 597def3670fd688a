"""What exported files of networks that take one RGB picture have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from imgtool import images, tiles
from imgtool.errors import ImgtoolError

if TYPE_CHECKING:
    from imgtool.runtime import Loaded

Floats = npt.NDArray[np.float32]

SHIFT = 40
"""Pixels between the pictures of a batch."""

BEFORE = (
    "Decode the photo and turn it upright as its EXIF orientation says; its colours and gamma stay: an "
    "embedded ICC profile is not applied, the values are taken as they are, and the profile goes with the "
    "result; channels R, G, B; divide levels of 8 bits by 255, of 16 bits by 65535; clip to 0..1."
)
AFTER = "Clip to 0..1, multiply by 255 (65535) and round to the nearest."


def real(path: Path, sizes: Mapping[str, int]) -> tuple[Floats, ...]:
    """Return the middle of a photo, mirrored where it is smaller; more pictures of a batch lie beside it.

    Args:
        path: The photo.
        sizes: "batch", "height" and "width".

    Returns:
        One array ``(batch, 3, height, width)`` of RGB in 0..1.
    """
    photo = images.read(path).pixels
    size = sizes["height"], sizes["width"]
    parts = [tiles.middle(photo, *size, SHIFT * number).clip(0, 1) for number in range(sizes["batch"])]
    return (np.ascontiguousarray(np.stack(parts).transpose(0, 3, 1, 2)),)


def made(kind: str, sizes: Mapping[str, int], rng: np.random.Generator) -> tuple[Floats, ...]:
    """Return a picture like ``real`` of noise, of one grey ("flat"), or of black and white ("extreme")."""
    values: Floats = rng.random((sizes["batch"], 3, sizes["height"], sizes["width"]), np.float32)
    if kind == "flat":
        values[:] = 0.5
    return (np.rint(values) if kind == "extreme" else values,)


def fixed_size(loaded: Loaded) -> tuple[int, int] | None:
    """Return height and width of a file's first input, ``(B, C, H, W)``; None where one of them is free."""
    height, width = loaded.inputs[0].shape[-2:]
    return None if height is None or width is None else (height, width)


def check_size(path: Path, size: tuple[int, int] | None, given: Sequence[int]) -> None:
    """Refuse a photo for a file of a network that looks at the whole of it, and takes another size.

    Args:
        path: The file.
        size: What it takes; None takes any.
        given: Height and width of the photo.

    Raises:
        ImgtoolError: They differ.
    """
    if size is None or size == tuple(given):
        return
    own, other = ("x".join(map(str, each)) for each in (size, given))
    raise ImgtoolError(
        f"{path} takes photos of {own} alone, and this one has {other}",
        f"export it for free sizes, or with --size {other}: it normalises over the whole photo",
    )
