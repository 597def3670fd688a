"""What VGG-19 sees in a picture: the layer relu5_4, for the loss of the original.

Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition", ICLR 2015
(configuration E), with torchvision's weights. The network is a yardstick: nothing in it learns, and it is no
part of what is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imgtool import compute
from imgtool.errors import USAGE, ImgtoolError

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's photos, in 0..1: what the weights expect."""

BLOCKS = ((2, 64), (2, 128), (4, 256), (4, 512), (4, 512))
"""Convolutions of each block and their channels; between the blocks, the maximum of 2x2 is taken."""

STRIDE = 16
"""Of the map that is made."""

_TAKE = "give torchvision's vgg19 file by --vgg, or take another --loss"


def _layers() -> list[nn.Module]:
    """Return the layers up to relu5_4, numbered as torchvision numbers its ``features``: 0 to 35."""
    layers: list[nn.Module] = []
    channels = 3
    for block, (count, width) in enumerate(BLOCKS):
        layers += [nn.MaxPool2d(2)] if block else []
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return layers


class Features(nn.Module):
    """VGG-19 up to the ReLU behind its last convolution, relu5_4."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        """Build the network.

        Args:
            state: Its weights, named "0.weight", "0.bias" to "34.bias"; taken, not copied.

        Raises:
            RuntimeError: Weights missing, too many or of other shapes.
        """
        super().__init__()
        with torch.device("meta"):
            self.layers = nn.Sequential(*_layers())
        self.layers.load_state_dict(dict(state), assign=True)
        self.register_buffer("mean", torch.tensor(MEAN).reshape(3, 1, 1))
        self.register_buffer("deviation", torch.tensor(DEVIATION).reshape(3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor) -> Tensor:
        """Look at pictures, in float32 whatever autocast says.

        Args:
            image: ``(B, 3, H, W)`` sRGB in 0..1, sides of at least 16; gradients pass to it.

        Returns:
            ``(B, 512, H // 16, W // 16)``.
        """
        with torch.autocast(image.device.type, enabled=False):
            seen: Tensor = self.layers((image.float() - self.mean) / self.deviation)
        return seen


@lru_cache(maxsize=1)
def features(path: Path | None, where: torch.device) -> Features:
    """Return the network on a device; kept, so that every step of a training has it.

    Args:
        path: File of weights; None takes torchvision's own (``weights_file``).
        where: The device.

    Raises:
        ImgtoolError: Weights that cannot be had or read.
    """
    return read(weights_file(path)).to(where)


def weights_file(path: Path | None) -> Path:
    """Return the file of weights: the one that is named, else torchvision's, downloaded where it is not yet.

    Raises:
        ImgtoolError: Code 2, where there is no such file; code 1, where it cannot be downloaded.
    """
    if path is not None:
        if not path.is_file():
            raise ImgtoolError(f"no weights file {path}", _TAKE, USAGE)
        return path
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    found = sorted(folder.glob("vgg19-*.pth"))
    if found:
        return found[-1]
    models: Any = compute.torchvision().models
    return compute.download(models.VGG19_Weights.IMAGENET1K_V1.url, folder, "name it by --vgg")


def read(path: Path) -> Features:
    """Read torchvision's VGG-19, whole, without its classifier, or its features alone.

    No code of the file is run.

    Raises:
        ImgtoolError: A file that is damaged or of another network.
    """
    return compute.take_features(path, Features, "VGG-19", _TAKE)
