"""What a file that runs elsewhere holds of a deblurring network, and such a file as the network again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtool import images, tiles, traced
from imgtool.engine import Axis, Port, Slot, TileFacts
from imgtool.engines.deblur import model
from imgtool.errors import ImgtoolError

if TYPE_CHECKING:
    from imgtool.engine import Pixels
    from imgtool.engines.deblur.settings import Export, Infer
    from imgtool.runtime import Loaded

Floats = npt.NDArray[np.float32]

BORDER = 16
"""Pixels, of each stage's own picture, that are mirrored around it."""
GRID = model.UNetLite.shrink * model.LocalUNet.multiple
"""Pixels: from one place to the next at which the stages' blocks lie alike."""
HALO = -(-(model.UNetLite.shrink * (model.HALO + 2) + model.HALO) // GRID) * GRID
"""Pixels that both stages together reach: the fine one's, and at a quarter of the size the coarse one's, with
a pixel of the enlargement and the block that a pixel lies in."""
USUAL = 1024
LEAST, LEAST_SEED = 8, 17
"""Pixels: a trace of free sizes tells one pixel, also of a shrunk photo, from several."""
SHIFT = 40
"""Pixels between the pictures of a batch."""

BEFORE = (
    "Decode the photo and turn it upright as its EXIF orientation says; its colours and gamma stay, sRGB is "
    "meant; channels R, G, B; divide levels of 8 bits by 255, of 16 bits by 65535; clip to 0..1."
)
AFTER = "Clip to 0..1, multiply by 255 (65535) and round to the nearest."
CUT = (
    f" A photo that is too large is cut: tiles begin at multiples of {GRID}; of each, {HALO} pixels are "
    "thrown away on every side that is not the photo's own edge."
)


class Whole(nn.Module):
    """Both stages over a whole photo, mirrored at its edges within: what ``apply`` computes of it."""

    def __init__(self, net: model.UNetLite) -> None:
        """Wrap the network."""
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        """Sharpen ``(B, 3, H, W)`` sRGB in 0..1; the result has the same shape and is not clipped."""
        factor = self.net.shrink
        small = F.avg_pool2d(traced.mirror(image, 0, factor), factor)
        correction = model.enlarge(_mended(self.net.coarse, small) - small, factor)
        return _mended(self.net.fine, image + traced.crop(correction, 0, *image.shape[-2:]))


def _mended(net: model.LocalUNet, image: Tensor) -> Tensor:
    wide = traced.mirror(image, BORDER, net.multiple)
    return traced.crop(wide + net.change(wide), BORDER, *image.shape[-2:])


class Original(nn.Module):
    """The original network, of any size."""

    def __init__(self, net: model.UNetSeed) -> None:
        """Wrap the network."""
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        """Sharpen ``(B, 3, H, W)`` sRGB in 0..1; the result has the same shape and is not clipped."""
        found = self.net.whole(traced.mirror(image, 0, self.net.multiple))
        return traced.crop(found, 0, *image.shape[-2:])


def port(net: nn.Module, settings: Export) -> Port:
    """Return what a file holds of a network: a photo in, the sharp photo out."""
    local = isinstance(net, model.UNetLite)
    shape = ("batch", 3, "height", "width")
    side = Axis(USUAL, least=LEAST if local else LEAST_SEED)
    return Port(
        Whole(net).eval() if isinstance(net, model.UNetLite) else Original(net).eval(),  # type: ignore[arg-type]
        (Slot("image", shape, 0, 1, "The blurred photo: sRGB, 0 black, 1 white.", picture=True),),
        (Slot("sharp", shape, 0, 1, "The sharp photo: sRGB, 0 black, 1 white, not clipped.", picture=True),),
        {"batch": Axis(1), "height": side, "width": side},
        BEFORE,
        AFTER + CUT if local else AFTER + " The network looks at the whole photo, which may not be cut.",
        real,
        made,
        {"local": local, "halo": HALO if local else 0, "grid": GRID if local else net.multiple},
    )


def real(path: Path, sizes: Mapping[str, int]) -> tuple[Pixels, ...]:
    """Return the middle of a photo as the network's input; further pictures of a batch lie beside it."""
    photo = images.read(path).pixels
    size = sizes["height"], sizes["width"]
    parts = [tiles.middle(photo, *size, SHIFT * number).clip(0, 1) for number in range(sizes["batch"])]
    return (np.ascontiguousarray(np.stack(parts).transpose(0, 3, 1, 2)),)


def made(kind: str, sizes: Mapping[str, int], rng: np.random.Generator) -> tuple[Pixels, ...]:
    """Return an input of noise, of one grey, or of black and white pixels."""
    values: Floats = rng.random((sizes["batch"], 3, sizes["height"], sizes["width"]), np.float32)
    if kind == "flat":
        values[:] = 0.5
    return (np.rint(values) if kind == "extreme" else values,)


class Ported(nn.Module):
    """An exported file as a network.

    Where sizes are free, a photo in tiles is the photo whole, and both are what ``apply`` makes with torch. A
    file of fixed size sees a photo that does not end with its last window mirrored up to the window's end:
    near the right and lower edges some levels of 8 bits are then others by 1, few by 2 (measured).

    Attributes:
        tiles: What cutting may assume. Bytes per pixel are those of onnxruntime, measured as the growth of
            VmHWM: 460 to 475 with one photo of 1 to 2 megapixels.
        window: Height and width of a file that takes no others; None where sizes are free.
    """

    def __init__(self, loaded: Loaded) -> None:
        """Look at what the file says of itself.

        Raises:
            ImgtoolError: It says too little.
        """
        super().__init__()
        self.loaded = loaded
        facts = loaded.about.get("facts", {})
        try:
            local, halo, grid = bool(facts["local"]), int(facts["halo"]), int(facts["grid"])
        except (KeyError, TypeError, ValueError):
            raise ImgtoolError(f"{loaded.path} does not say how it may be used", "export it again") from None
        height, width = loaded.inputs[0].shape[-2:]
        self.window = None if height is None or width is None else (height, width)
        reason = "" if local else "it normalises over the whole photo (GroupNorm)"
        self.tiles = TileFacts(
            block=grid, local=local, halo=halo, bytes_per_pixel=500, largest=4096, reason=reason
        )

    def forward(self, image: Tensor) -> Tensor:
        """Sharpen ``(1, 3, H, W)`` sRGB in 0..1 of the window's size, or of any where there is none."""
        return torch.from_numpy(self.loaded(np.ascontiguousarray(image.numpy()))[0])

    def plan(self, image: Pixels, settings: Infer) -> tiles.Plan:
        """Return how a photo is cut.

        Raises:
            ImgtoolError: The file takes photos of another size alone; code 2 for tiles of a network that
                may not be cut.
        """
        height, width = image.shape[:2]
        facts = self.tiles
        overlap = -(-max(settings.overlap, facts.halo) // facts.grid) * facts.grid if facts.local else 0
        core = tiles.choose(height, width, settings.tile, overlap, settings.memory * 1e9, facts)
        if self.window and not facts.local and (height, width) != self.window:
            what = "{} takes photos of {}x{} alone, and this one has {}x{}"
            raise ImgtoolError(
                what.format(self.loaded.path, *self.window, height, width),
                f"export it for free sizes, or with --size {height}x{width}: {facts.reason}",
            )
        return tiles.Plan(core, overlap, settings.strength, self.window)


def ported(loaded: Any, settings: Any) -> Ported:
    """Return an exported file as a network that ``apply`` takes."""
    return Ported(loaded)
