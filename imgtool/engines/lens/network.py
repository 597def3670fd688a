"""The network that looks at a photo's pixels: EfficientNet-B0 and a head that cannot fold a picture.

The backbone is torchvision's (Tan and Le, "EfficientNet", ICML 2019), begun with ImageNet's weights
where there are any. The head "field" keeps where in the picture something bends: coordinates go along,
and the map is flattened, not averaged (Janos and Benesova, "Improving radial lens distortion
correction with multi-task learning", 2024). It tells displacements at half and full radius, of which
k1 and k2 are linear functions: k1 and k2 themselves are too much alike to be told apart well. The head
"original" is the original's: the averaged map, layers of 512 and 128, and four numbers through tanh.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from imgtool import compute
from imgtool.engines.lens import data
from imgtool.engines.lens.geometry import STEEPEST
from imgtool.errors import USAGE, ImgtoolError
from imgtool.images import to_float, to_type

if TYPE_CHECKING:
    from imgtool.engines.lens.settings import Model, Train

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's photos, in 0..1: what the backbone's weights expect."""
CHANNELS, STRIDE = 1280, 32
"""Of the map that the backbone makes."""
INWARD, OUTWARD = 0.30, 0.15
"""Largest relative displacements that the head "field" can tell, of barrels and of pincushions."""
TANGENTIAL = 0.02
"""Largest p1 and p2 of the head "field"."""
ORIGINAL = (1 / 2, 0.5 / 4, 0.1 / math.sqrt(2), 0.1 / math.sqrt(2))
"""Bounds of the head "original": 1, 0.5, 0.1, 0.1 where the unit is the edge of a square photo."""
SHARE = 0.4
"""The displacement at half radius is about this much of that in the corner (4/16 to 1/4 of k2 and k1)."""
FIRST_SPREAD = (0.05, 0.01, 0.003, 0.003)
"""Standard deviations before anything is learnt: corner, half radius beyond its share, p1, p2."""
RADII = 65
"""Radii from 0 to 1 at which the map is kept monotone."""
MARGIN = 0.01
"""Slope by which it is kept more so than ``geometry`` asks: between the radii, and for rounding."""


class Guess(NamedTuple):
    """What the network says of a batch of photos, in float32.

    Attributes:
        coefficients: ``(B, 4)`` k1, k2, p1, p2, half-diagonal normalisation; they never fold.
        log_spread: ``(B, 4)`` logarithms of standard deviations: of the displacement in the corner
            (k1 + k2), of that at half radius beyond ``SHARE`` of it, of p1, of p2.
    """

    coefficients: Tensor
    log_spread: Tensor


def unfolded(coefficients: Tensor) -> Tensor:
    """Return coefficients ``(B, 4)``, or the largest share of them that does not fold a photo.

    With a share s the slope of the radius is 1 + s g(r), p1 and p2 taken at their worst, so the largest s
    is (1 - least slope) / max(-g). Differentiable.
    """
    k1, k2, p1, p2 = coefficients.unbind(-1)
    radius = torch.linspace(0, 1, RADII, device=coefficients.device, dtype=coefficients.dtype)
    r2 = radius * radius
    tangential = torch.sqrt(p1 * p1 + p2 * p2 + 1e-12)[:, None]
    slope = r2 * (3 * k1[:, None] + 5 * k2[:, None] * r2) - 6 * tangential * radius
    share = (1 - STEEPEST - MARGIN) / (-slope.amin(1)).clamp(min=1e-6)
    return coefficients * share.clamp(max=1)[:, None]


def from_displacements(corner: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """Return k1 and k2 from the relative displacements k1 r^2 + k2 r^4 at r = 1 and r = 1/2."""
    k1 = (16 * half - corner) / 3
    return k1, corner - k1


def _bounded(value: Tensor) -> Tensor:
    """Return a value within -INWARD..OUTWARD; 0 stays 0, with slope 1."""
    inward, outward = INWARD * torch.tanh(value / INWARD), OUTWARD * torch.tanh(value / OUTWARD)
    return torch.where(value < 0, inward, outward)


def _exact(x: Tensor) -> Tensor:
    """Return numbers in float32, or in float64 where they are already."""
    return x if x.dtype == torch.float64 else x.float()


class FieldHead(nn.Module):
    """Map and place to displacements; see the module."""

    def __init__(self, edge: int) -> None:
        """Build the head for maps of ``edge`` x ``edge``."""
        super().__init__()
        self.mix = nn.Conv2d(CHANNELS + 3, 48, 1)
        self.hidden = nn.Linear(48 * edge * edge, 256)
        self.out = nn.Linear(256, 4)
        self.spread = nn.Linear(256, 4)
        nn.init.normal_(self.out.weight, std=0.01)
        nn.init.zeros_(self.out.bias)

    def forward(self, seen: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
        """Return coefficients, which may fold, and what corrects the first spread, both ``(B, 4)``."""
        mixed = functional.silu(self.mix(torch.cat([seen, places(seen, frame)], 1)))
        hidden = functional.silu(self.hidden(mixed.flatten(1)))
        told, spread = self.out(hidden), self.spread(hidden.detach())
        with torch.autocast(told.device.type, enabled=False):
            corner, half, p1, p2 = _exact(told).unbind(1)
            corner = _bounded(0.1 * corner)
            half = _bounded(SHARE * corner + 0.02 * half)
            tangential = [TANGENTIAL * torch.tanh(0.2 * each) for each in (p1, p2)]
            return torch.stack([*from_displacements(corner, half), *tangential], 1), _exact(spread)


def places(seen: Tensor, frame: Tensor) -> Tensor:
    """Return x, y and r^2 of every cell of a map, half-diagonal normalisation, ``(B, 3, h, w)``."""
    height, width = seen.shape[-2:]
    unit = frame.amax(1) / frame.square().sum(1).sqrt()
    across, down = (
        (torch.arange(size, device=seen.device, dtype=frame.dtype) * 2 + 1 - size) / size
        for size in (width, height)
    )
    x = (unit[:, None, None] * across).expand(-1, height, -1)
    y = (unit[:, None, None] * down[:, None]).expand(-1, -1, width)
    return torch.stack([x, y, x * x + y * y], 1).to(seen.dtype)


class OriginalHead(nn.Module):
    """The original's head: the averaged map, 512 and 128 SiLU with dropout, four tanh.

    The original's unit is the width across and the height down, after the photo was squashed into a
    square; no round lens is like that on an oblong photo. Here the unit is the edge of a square, 1/sqrt(2)
    of its diagonal, in both directions, so that the original's bounds 1, 0.5, 0.1, 0.1 become
    ``ORIGINAL`` in the half-diagonal normalisation. 17 % of that box folds; what does is shrunk.
    """

    bounds: Tensor

    def __init__(self) -> None:
        """Build the head."""
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(CHANNELS, 512), nn.SiLU(), nn.Dropout(0.3),
            nn.Linear(512, 128), nn.SiLU(), nn.Dropout(0.2),
        )  # fmt: skip
        self.out = nn.Linear(128, 4)
        self.spread = nn.Linear(128, 4)
        self.register_buffer("bounds", torch.tensor(ORIGINAL), persistent=False)

    def forward(self, seen: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
        """Return as ``FieldHead``; the frame is not looked at."""
        hidden = self.layers(seen.mean((2, 3)))
        told, spread = self.out(hidden), self.spread(hidden.detach())
        return torch.tanh(_exact(told)) * self.bounds, _exact(spread)


class ImageEstimator(nn.Module):
    """EfficientNet-B0 that tells the distortion of a photo and how sure it is."""

    mean: Tensor
    deviation: Tensor
    first_spread: Tensor

    def __init__(self, settings: Model) -> None:
        """Build the network with random weights; ``begin`` loads those of the backbone."""
        super().__init__()
        self.input = settings.input
        models: Any = compute.torchvision().models
        self.features: nn.Module = models.efficientnet_b0(weights=None).features
        self.head = FieldHead(settings.input // STRIDE) if settings.head == "field" else OriginalHead()
        self.register_buffer("mean", torch.tensor(MEAN).reshape(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION).reshape(3, 1, 1), persistent=False)
        self.register_buffer("first_spread", torch.tensor(FIRST_SPREAD).log(), persistent=False)

    def forward(self, image: Tensor, frame: Tensor) -> Guess:
        """Look at photos.

        Args:
            image: ``(B, 3, input, input)`` sRGB in 0..1, each photo whole, in the middle of a square.
            frame: ``(B, 2)`` half the width and half the height of each photo, in any unit.

        Returns:
            The coefficients and how sure they are. Learning to tell the latter changes nothing of
            the former.
        """
        seen = self.features((image - self.mean) / self.deviation)
        raw, spread = self.head(seen, frame)
        with torch.autocast(raw.device.type, enabled=False):
            return Guess(unfolded(raw), self.first_spread + spread.clamp(-5.0, 2.0))


def root(log_spread: Tensor) -> Tensor:
    """Return a root of the covariance of k1, k2, p1, p2, ``(B, 4, 4)``, from ``Guess.log_spread``.

    Its first column is the spread of the corner, of which ``SHARE`` goes to half radius; the second
    that of the rest at half radius.
    """
    corner, half, p1, p2 = log_spread.exp().unbind(1)
    of_corner = (16 * SHARE - 1) / 3
    zero = torch.zeros_like(corner)
    rows = [
        [of_corner * corner, 16 / 3 * half, zero, zero],
        [(1 - of_corner) * corner, -16 / 3 * half, zero, zero],
        [zero, zero, p1, zero],
        [zero, zero, zero, p2],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def _small(photo: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """Return a photo ``(H, W, 3)`` of any type as uint8, its longer side at most ``size``."""
    height, width = photo.shape[:2]
    scale = size / max(height, width)
    if photo.dtype != np.uint8 and scale < 1:
        shape = (max(round(scale * width), 1), max(round(scale * height), 1))
        photo = cv2.resize(photo, shape, interpolation=cv2.INTER_AREA)
    return to_type(to_float(photo), np.uint8) if photo.dtype != np.uint8 else photo


@dataclass(frozen=True)
class Exported:
    """An ``ImageEstimator`` in a file, run by a runtime.

    Attributes:
        run: Images and frames to coefficients and log-spreads, all of batch 1.
        input: Edge of what it sees, in pixels.
    """

    run: Callable[..., Sequence[npt.NDArray[Any]]]
    input: int


def seen(pixels: npt.NDArray[Any], edge: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the image ``(1, 3, edge, edge)`` and the frame ``(1, 2)`` that a network looks at.

    Args:
        pixels: ``(H, W, 3)`` uint8, uint16 or float32.
        edge: Of the square, in pixels.
    """
    height, width = pixels.shape[:2]
    square = data.letterbox(_small(pixels, edge), edge)
    image = np.ascontiguousarray(square.transpose(2, 0, 1)[None]).astype(np.float32) / np.float32(255)
    return image, np.array([data.frame_of(width, height)], np.float32)


@torch.inference_mode()
def says(
    net: ImageEstimator | Exported, pixels: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return what a network says of a photo: coefficients ``(4,)``, and a root of their covariance.

    Args:
        net: The network.
        pixels: ``(H, W, 3)`` uint8, uint16 or float32.
    """
    given = seen(pixels, net.input)
    if isinstance(net, Exported):
        guess = Guess(*map(torch.from_numpy, net.run(*given)))
    else:
        where = next(net.parameters()).device
        guess = net(*(torch.from_numpy(each).to(where) for each in given))
    return guess.coefficients[0].double().cpu().numpy(), root(guess.log_spread)[0].double().cpu().numpy()


# --- weights of the backbone -----------------------------------------------------------------------


def begin(net: nn.Module, settings: Train) -> str:
    """Fill the backbone of a new network as ``settings.backbone`` says; return what was done, in words.

    Raises:
        ImgtoolError: Weights that cannot be had or read; code 2, where random weights would be frozen.
    """
    if not isinstance(net, ImageEstimator) or settings.weights:
        return ""
    path = _backbone(settings.backbone)
    if path is not None:
        fill(net, path)
        return f"backbone: {path}"
    names = [f"features.{name}" for name, _ in net.features.named_parameters()]
    if settings.freeze and any(name.startswith(settings.freeze) for name in names):
        raise ImgtoolError(
            f"--freeze {settings.freeze} would keep random weights as they are",
            "take --backbone imagenet or a file, or leave --freeze out",
            USAGE,
        )
    return "backbone: random weights; --backbone imagenet loads ImageNet's"


def _backbone(wanted: str) -> Path | None:
    """Return the file of weights to begin with, downloaded where that was asked for; None for none."""
    if wanted == "none":
        return None
    if wanted not in ("auto", "imagenet"):
        if not Path(wanted).is_file():
            raise ImgtoolError(
                f"no weights file {wanted}", "--backbone takes auto, imagenet, none or a file", USAGE
            )
        return Path(wanted)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    # The hash in the name has changed once.
    found = sorted(folder.glob("efficientnet_b0*.pth"))
    if found or wanted == "auto":
        return found[-1] if found else None
    models: Any = compute.torchvision().models
    return compute.download(models.EfficientNet_B0_Weights.IMAGENET1K_V1.url, folder, "take --backbone none")


def fill(net: ImageEstimator, path: Path) -> None:
    """Fill the backbone from torchvision's EfficientNet-B0: with its classifier, without, or features alone.

    No code of the file is run.

    Raises:
        ImgtoolError: A file that is damaged or of another network.
    """
    compute.take_features(path, net.features.load_state_dict, "EfficientNet-B0", _TAKE)


_TAKE = "give torchvision's efficientnet_b0 file, or take --backbone none"
