"""What a file that runs elsewhere holds of a deblurring network, and such a file as the network again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from imgtool import loading, pictures, tiles, traced
from imgtool.engine import TileFacts
from imgtool.engines.deblur import model
from imgtool.port import Axis, Port, Slot

if TYPE_CHECKING:
    from imgtool.engine import Pixels
    from imgtool.engines.deblur.settings import Export, Infer
    from imgtool.runtime import Loaded

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

CUT = (
    f" A photo that is too large is cut: tiles begin at multiples of {GRID}; of each, {HALO} pixels are "
    "thrown away on every side that is not the photo's own edge."
)
UNCUT = " The network looks at the whole photo, which may not be cut."


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
        pictures.BEFORE,
        pictures.AFTER + (CUT if local else UNCUT),
        pictures.real,
        pictures.made,
        {"local": local, "halo": HALO if local else 0, "grid": GRID if local else net.multiple},
    )


class Facts(loading.Facts):
    """What is read of a file's facts.

    Attributes:
        local: Whether a photo may be cut.
        halo: Pixels of context that a tile carries.
        grid: Pixels that tiles begin at multiples of.
    """

    local: bool
    halo: int = Field(ge=0, le=4096)
    grid: int = Field(ge=1, le=4096)


class Ported(nn.Module):
    """An exported file as a network.

    Where sizes are free, a photo in tiles is the photo whole, and both are what ``apply`` makes with torch. A
    file of fixed size sees a photo that does not end with its last window mirrored up to the window's end:
    near the right and lower edges levels of 8 bits are then others by up to 3, 1 in 5,000 by more than 1
    (measured). Windows that end with the photo would begin elsewhere in the network's blocks, which changes
    up to 1 level in 7 by more than 1.

    Attributes:
        tiles: What cutting may assume. Bytes per pixel are those of onnxruntime, measured as the growth of
            VmHWM: 460 to 475 with one photo of 1 to 2 megapixels.
        window: Height and width of a file that takes no others; None where sizes are free.
    """

    def __init__(self, loaded: Loaded) -> None:
        """Look at what the file says of itself.

        Raises:
            ImgtoolError: It says too little, or what cannot be, or is no file of such a network.
        """
        super().__init__()
        self.path, picture = loaded.path, (1, 3, "height", "width")
        facts = loading.facts(loaded.path, loaded.about, Facts)
        self.run = loading.checked(loaded, [picture], [picture])
        self.window = pictures.fixed_size(loaded)
        reason = "" if facts.local else "it normalises over the whole photo (GroupNorm)"
        self.tiles = TileFacts(
            block=facts.grid,
            local=facts.local,
            halo=facts.halo,
            bytes_per_pixel=500,
            largest=4096,
            reason=reason,
        )

    def forward(self, image: Tensor) -> Tensor:
        """Sharpen ``(1, 3, H, W)`` sRGB in 0..1 of the window's size, or of any where there is none."""
        return torch.from_numpy(self.run(np.ascontiguousarray(image.numpy()))[0])

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
        if not facts.local:
            pictures.check_size(self.path, self.window, (height, width))
        return tiles.Plan(core, overlap, settings.strength, self.window)


def ported(loaded: Any, settings: Any) -> Ported:
    """Return an exported file as a network that ``apply`` takes."""
    return Ported(loaded)
