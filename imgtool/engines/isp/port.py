"""What a file that runs elsewhere holds of an isp network: planes of a mosaic in, a photograph out."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from imgtool import loading, mosaic, pictures
from imgtool.engines.isp import apply, bayer, colour, model, noise, unprocess
from imgtool.engines.isp.model import Camera
from imgtool.errors import USAGE, ImgtoolError
from imgtool.mosaic import Mosaic
from imgtool.port import Axis, Port, Slot

if TYPE_CHECKING:
    from imgtool.engines.isp.settings import Export, Infer
    from imgtool.runtime import Loaded

Floats = npt.NDArray[np.float32]

USUAL = (1088, 1920)
"""Rows and columns of the photo that the Mobile AI 2021 challenge made."""

TYPICAL_SHOT = 1e-4
"""Shot noise of a phone or compact camera at ISO 100 (Brooks et al., CVPR 2019, table of smartphones)."""

_NEUTRAL = (1.0, 1.0, 1.0)
_STEP = 64  # rows and columns between the pictures of a batch
_MATRIX = np.array([[1.53, -0.46, -0.07], [-0.01, 1.40, -0.39], [0.05, -0.40, 1.35]])  # of a compact camera
_NOISE = "a pixel's variance is shot x signal + read, before the balance, with black at 0 and white at 1"
_RGGB = "R, Gr, Gb, B, where Gr is the green in the rows of red"
_MAI21 = "B, Gr, R, Gb, where Gr is the green in the rows of red"


def neutral() -> Camera:
    """Return the camera of planes that are balanced already, in sRGB's own colours, at ISO 100."""
    return Camera(_NEUTRAL, (TYPICAL_SHOT, unprocess.typical_read(TYPICAL_SHOT)), np.eye(3))


def camera_of(frame: Mosaic, net: nn.Module) -> Camera:
    """Return what a frame tells of its camera: the balance of the shot, its noise, the colours.

    Raises:
        ImgtoolError: It states no white balance, or no colours, and the network needs them.
    """
    gains, matrix = frame.gains or frame.daylight, frame.matrix
    if net.scaling != "mai21" and net.colour == "camera" and (gains is None or matrix is None):
        missing = "white balance" if gains is None else "colours"
        raise ImgtoolError(
            f"{frame.name} tells no {missing} of its camera", "name another RAW file by --camera"
        )
    shot, read = frame.noise or noise.estimate(frame)
    read = max(read, unprocess.rounding(frame.white - min(frame.black)))
    matrix = np.eye(3) if matrix is None else matrix
    return Camera(bayer.least_is_one(gains or _NEUTRAL), (shot, read), matrix)


def mirrored(planes: Tensor, border: int) -> Tensor:
    """Return planes of an RGGB mosaic that goes on beyond its edges, mirrored without repeating the edge.

    Pixel -k of the mosaic is pixel k, so that planes of even and of odd rows continue differently.

    Args:
        planes: ``(B, 4, h, w)`` R, Gr, Gb, B; more than ``border`` rows and columns.
        border: Rows and columns to add to a plane on every side.
    """
    even, odd = (_around(planes.shape[2], border, first, planes.device) for first in (0, 1))
    tall = torch.cat([planes[:, :2].index_select(2, even), planes[:, 2:].index_select(2, odd)], 1)
    even, odd = (_around(planes.shape[3], border, first, planes.device) for first in (0, 1))
    return torch.cat([tall[:, n : n + 1].index_select(3, odd if n % 2 else even) for n in range(4)], 1)


def _around(size: int, border: int, first: int, where: torch.device) -> Tensor:
    """Return which of a plane's rows follow one another; row k is row 2 k + first of the mosaic."""
    row = torch.arange(-border, size + border, device=where)
    return torch.minimum(torch.maximum(row, -first - row), 2 * size - 1 - first - row)


class _Exact(nn.Module):
    """A 3x3 convolution that stays in single precision in a file of half precision.

    There, ``export.trace`` rounds parameters and what ``conv2d`` is given. Near black, the camera's matrix
    and the curve of sRGB enlarge the rounding of the last layers: a photo was wrong by up to 1.1 of 255
    levels, and is by 0.03.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.register_buffer("weight", layer.weight.detach())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        x, one, none = x.to(self.weight.dtype), (1, 1), (0, 0)
        return torch.convolution(x, self.weight, self.bias, one, one, one, False, none, 1)


class Photograph(nn.Module):
    """A network with all that makes a photograph of raw planes: borders, balance, noise, colours."""

    gains: Tensor
    noise: Tensor
    matrix: Tensor

    def __init__(self, net: nn.Module, inputs: tuple[str, ...], packing: str, camera: Camera) -> None:
        """Wrap a network.

        Args:
            net: One of ``model``.
            inputs: What it is given: "planes", then some of "gains", "noise" and "matrix".
            packing: Order of the planes, "rggb" or "mai21".
            camera: Of what it is not given.
        """
        super().__init__()
        self.net = model.repacked(net)
        if isinstance(self.net, model.Lrfu):
            for name in ("tail", "demosaic"):
                setattr(self.net, name, _Exact(getattr(self.net, name)))
        self.inputs, self.packing = inputs, packing
        self.border = border_of(net)
        self.register_buffer("gains", torch.tensor([camera.gains], dtype=torch.float32))
        self.register_buffer("noise", torch.tensor([camera.noise], dtype=torch.float32))
        self.register_buffer("matrix", torch.tensor(camera.matrix, dtype=torch.float32))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return ``(B, 3, 2h, 2w)`` sRGB in 0..1 of ``(B, 4, h, w)`` planes and the other inputs."""
        given = dict(zip(self.inputs, inputs, strict=True))
        planes = given["planes"]
        if self.packing == "mai21":
            planes = torch.cat(
                [planes[:, place : place + 1] for place in map(bayer.MAI21.index, range(4))], 1
            )
        wide = mirrored(planes, self.border) if self.border else planes
        fed = model.feed(self.net, wide, given.get("gains", self.gains), given.get("noise", self.noise))
        rgb = self.net(fed)
        cut = 2 * self.border
        display: Tensor = rgb[..., cut:-cut, cut:-cut] if cut else rgb
        if self.net.colour == "camera":
            display = colour.render(display, given.get("matrix", self.matrix))
        return display.clamp(0, 1)


def border_of(net: nn.Module) -> int:
    """Return the rows that the file mirrors around each plane; 0 where they would outweigh the photo."""
    return 0 if isinstance(net, model.Punet) else int(net.halo) // 2  # type: ignore[arg-type]


def wanted(net: nn.Module, settings: Export) -> tuple[str, ...]:
    """Return the names of the inputs: those that the network looks at, or the planes alone.

    Raises:
        ImgtoolError: Code 2: settings that do not go together.
    """
    if settings.camera is not None and net.scaling == "mai21":
        raise ImgtoolError("these weights are told nothing of a camera", "leave --camera out", USAGE)
    alone = settings.inputs == "planes" or (settings.inputs == "auto" and settings.to == "tflite")
    if alone or net.scaling == "mai21":
        return ("planes",)
    if settings.camera is not None:
        raise ImgtoolError("--camera fixes a camera in the file", "take --inputs planes with it", USAGE)
    known = {"gains": True, "noise": not isinstance(net, model.Punet), "matrix": net.colour == "camera"}
    return ("planes", *(name for name, used in known.items() if used))


class _Frames:
    """Inputs out of RAW files, and without them."""

    def __init__(self, net: nn.Module, inputs: tuple[str, ...], packing: str, balanced: bool) -> None:
        self.net, self.inputs, self.packing, self.balanced = net, inputs, packing, balanced

    def real(self, path: Path, sizes: Mapping[str, int]) -> tuple[Floats, ...]:
        """Read the middle of a RAW file, mirrored where it is smaller."""
        frame = mosaic.read(path, mosaic.Stated(), path.name)
        told, seen = camera_of(frame, self.net), apply.levelled(self.net, frame)
        height, width = sizes["height"], sizes["width"]
        rows, columns = bayer.aligned_size(frame)
        parts = []
        for number in range(sizes["batch"]):
            top, left = (rows - height) // 4 * 2 + _STEP * number, (columns - width) // 4 * 2 + _STEP * number
            parts.append(bayer.pack(bayer.window(seen, (top, top + height), (left, left + width))))
        return self._all(np.stack(parts), told)

    def made(self, kind: str, sizes: Mapping[str, int], rng: Any) -> tuple[Floats, ...]:
        """Make planes of noise, of one brightness each, or of blocks as bright and as dark as can be."""
        shape = (sizes["batch"], 4, sizes["height"] // 2, sizes["width"] // 2)
        told = Camera((1.9, 1.0, 1.6), (2e-3, 1e-5), _MATRIX)
        if kind == "noise":
            planes = rng.random(shape, np.float32)
        elif kind == "flat":
            planes = np.broadcast_to(rng.uniform(0.05, 0.4, (shape[0], 1, 1, 1)), shape)
        else:
            planes, told = _blocks(shape), Camera((4.0, 1.0, 3.0), (2e-2, 1e-3), _MATRIX)
        return self._all(planes, told)

    def _all(self, planes: npt.NDArray[Any], told: Camera) -> tuple[Floats, ...]:
        if self.balanced:
            planes = np.minimum(planes * np.asarray(told.gains)[[0, 1, 1, 2], None, None], 1)
        if self.packing == "mai21":
            planes = planes[:, list(bayer.MAI21)]
        known = {"planes": planes}
        for name, value in told._asdict().items():
            known[name] = np.stack([np.asarray(value)] * len(planes))
        return tuple(np.ascontiguousarray(known[name], np.float32) for name in self.inputs)


def _blocks(shape: tuple[int, ...]) -> Floats:
    """Return blocks of 8x8 of white and of a little less than black."""
    rows, columns = (np.arange(size) // 8 for size in shape[2:])
    even = (rows[:, None] + columns) % 2 == 0
    return np.broadcast_to(np.where(even, np.float32(1), np.float32(-0.02)), shape)


_NEUTRAL_NOTE = (
    "without --camera FILE the file takes planes that are balanced already, their colours as those of sRGB, "
    "and the noise of ISO 100"
)


def port(net: nn.Module, settings: Export) -> Port:
    """Return what an exported file holds.

    Args:
        net: A network of this engine.
        settings: Of ``export``.

    Raises:
        ImgtoolError: Code 2: settings that do not go together; code 1: as ``camera_of``, or the file of
            --camera cannot be read.
    """
    inputs = wanted(net, settings)
    camera = neutral()
    if settings.camera is not None:
        camera = camera_of(mosaic.read(settings.camera, mosaic.Stated(), settings.camera.name), net)
    balanced = inputs == ("planes",) and settings.camera is None and net.scaling != "mai21"
    frames = _Frames(net, inputs, settings.packing, balanced)
    module = Photograph(net, inputs, settings.packing, camera).eval()
    tiling = apply.tile_facts(net)
    least = max(tiling.multiple, 2 * module.border + 2)
    return Port(
        module=module,
        inputs=tuple(_slots(net, settings.packing, balanced)[name] for name in inputs),
        outputs=(_PHOTO,),
        axes={
            "batch": Axis(1),
            **{
                name: Axis(usual, tiling.multiple, least)
                for name, usual in zip(("height", "width"), USUAL, strict=True)
            },
        },
        before=_before(net, settings, module, balanced),
        after=_AFTER,
        real=frames.real,
        made=frames.made,
        facts={
            "inputs": inputs,
            "packing": settings.packing,
            "scaling": net.scaling,
            "colour": net.colour,
            "halo": tiling.halo,
            "multiple": tiling.multiple,
            "mirrors": bool(module.border),
            "bytes_per_pixel": tiling.bytes_per_pixel,
            "largest": tiling.largest,
            "camera": settings.camera.name if settings.camera else None,
            "gains": list(camera.gains),
            "noise": list(camera.noise),
            "matrix": np.asarray(camera.matrix).tolist(),
        },
        note=_NEUTRAL_NOTE if balanced else "",
    )


def _slots(net: nn.Module, packing: str, balanced: bool) -> dict[str, Slot]:
    values = "black 0, white 1, noise below black negative, " + ("balanced" if balanced else "not balanced")
    if net.scaling == "mai21":
        values = "values of 10 bits / 1020, nothing subtracted"
    order = _MAI21 if packing == "mai21" else _RGGB
    size = ("batch", 4, "height/2", "width/2")
    meaning = (
        f"Planes of the Bayer mosaic, in the order {order}; {values}. Height and width are the mosaic's."
    )
    return {
        "planes": Slot("planes", size, -0.05, 1.0, meaning, picture=True),
        "gains": Slot(
            "gains", ("batch", 3), 1.0, 8.0, "White balance of red, green and blue, over the least of them."
        ),
        "noise": Slot("noise", ("batch", 2), 0.0, 0.1, f"Shot and read: {_NOISE}."),
        "matrix": Slot(
            "matrix", ("batch", 3, 3), -4.0, 4.0,
            "Balanced camera RGB to linear sRGB, its rows sum to 1; times 2^s the photo is s stops brighter.",
        ),
    }  # fmt: skip


_PHOTO = Slot("photo", ("batch", 3, "height", "width"), 0.0, 1.0, "The photograph: sRGB.", picture=True)

_AFTER = """\
1. Round 255 x photo, which lies in 0..1, to bytes of sRGB, red, green, blue (IEC 61966-2-1); cut off what was
added around the mosaic.
2. Cut out the camera's own crop (rawpy: sizes.crop_height rows from sizes.crop_top_margin - sizes.top_margin
on, and so the columns) where it lies inside and holds a quarter of the pixels or more. Turn the picture
upright (rawpy: sizes.flip 3 half a turn, 5 a quarter counterclockwise, 6 a quarter clockwise)."""

_GAINS = (
    "gains: the white balance of the shot (rawpy: camera_whitebalance[:3]; where one of them is 0, or a DNG "
    "without AsShotNeutral has three alike, daylight_whitebalance[:3]), divided by the least."
)
_MATRIX_OF = (
    "matrix: M = (XYZ to camera: rawpy's rgb_xyz_matrix[:3]) x (linear sRGB to XYZ, D65); divide each row by "
    "its sum; invert. rawpy's color_matrix[:, :3], where it can be inverted, is the result already: of a DNG "
    "whose first number in it is above 1/8, and of any file whose rgb_xyz_matrix is 0. Identity if both are "
    "unknown."
)
_NOISE_OF = f"""\
noise: shot and read; {_NOISE}.
Of a DNG the mean of the planes' pairs in its NoiseProfile (tag 51041), else measured on flat parts;
facts.noise is only that of ISO 100. read is at least that of rounding to whole numbers,
1 / (12 (white - the least black)^2).
To measure: blocks of {noise.BLOCK}x{noise.BLOCK} pixels of one colour, none a 0 of the file or above
{noise.CLIPPED:g} of the way to white; the mean square of their second differences, (1, -2, 1) across and down
at once, / 36 is their variance; of up to {noise.BINS} groups of blocks by mean brightness take the quantile
{noise.SHARE:g} of the variances, divided by what it is of pure noise of variance 1; through these a line of
least squares of the relative errors, slope shot and intercept read, neither below 0, points above it
counting {noise.ABOVE:g} of those below."""


def _before(net: nn.Module, settings: Export, module: Photograph, balanced: bool) -> str:
    """Return in words how the inputs are made, for those that the file takes."""
    told, learned = set(module.inputs), net.scaling == "mai21"
    levels = "Per plane: (value - black) / (white - black), not clipped; the file takes what is above 1."
    steps = [
        "Take the mosaic of all visible pixels, as the sensor lies.",
        "Divide the values, of 10 bits with nothing subtracted, by 1020." if learned else levels,
        _around_it(net, bool(module.border)),
        "Multiply red, green and blue by the gains, and clip at 1." if balanced else "",
        "Plane k holds every second pixel of every second row: see the order of planes.",
        _GAINS if "gains" in told or balanced else "",
        _NOISE_OF if "noise" in told else "",
        _MATRIX_OF if "matrix" in told else "",
        "" if {"gains", "matrix"} & told or learned else _fixed(settings, module),
    ]
    numbered = (f"{number}. {step}" for number, step in enumerate(filter(None, steps), 1))
    return "\n".join(textwrap.fill(step, 110) for step in numbered)


def _around_it(net: nn.Module, mirrors: bool) -> str:
    """Return in words what is added around a mosaic."""
    halo, multiple = int(net.halo), int(net.multiple)  # type: ignore[arg-type]
    more = f" Lengths are multiples of {multiple}: add more at the end." if multiple > 2 else ""
    words = (
        f"add mirrored rows and columns (pixel -k is pixel k) on both sides: {halo} (facts.halo, in pixels "
        f"of the mosaic), and {halo + 1} where the pattern or the evenness needs it; cut them off the photo."
    )
    if mirrors:
        return (
            "The file takes RGGB, red in the first row and column, and even numbers of rows and columns, and "
            "mirrors such a mosaic itself. To bring another pattern to RGGB, or an odd number to an even "
            f"one, {words} One row or column alone makes the outer {halo} pixels wrong.{more}"
        )
    return (
        "The file takes RGGB, red in the first row and column, and even numbers of rows and columns. Beyond "
        "the edges the network sees zeros: for a picture right up to them, and to bring another pattern to "
        f"RGGB or an odd number to an even one, {words}{more}"
    )


def _fixed(settings: Export, module: Photograph) -> str:
    shot, read = module.noise[0].tolist()
    told = f"noise is taken for shot {shot:.2g}, read {read:.2g} ({_NOISE})"
    if settings.camera is None:
        return f"Fixed in the file: colours are taken for those of sRGB; {told}, typical of ISO 100."
    gains = ", ".join(f"{gain:.4g}" for gain in module.gains[0].tolist())
    return f"Fixed in the file, of {settings.camera.name}: gains {gains}, its colours; {told}."


Gain = Annotated[float, Field(gt=0)]
Variance = Annotated[float, Field(ge=0)]
Row = tuple[float, float, float]

_TAKEN: Mapping[str, loading.Shape] = {
    "planes": (1, 4, "height", "width"), "gains": (1, 3), "noise": (1, 2), "matrix": (1, 3, 3)
}  # fmt: skip
_WORDS = {"packing", "scaling", "colour", "mirrors", "halo", "multiple", "bytes_per_pixel", "largest"}


class Facts(loading.Facts):
    """What is read of a file's facts; see ``model.Exported``."""

    inputs: tuple[Literal["planes", "gains", "noise", "matrix"], ...]
    packing: Literal["rggb", "mai21"]
    scaling: Literal["levels", "mai21"]
    colour: Literal["camera", "learned"]
    mirrors: bool
    halo: int = Field(ge=0, le=4096, multiple_of=2)
    multiple: int = Field(ge=2, le=4096, multiple_of=2)
    bytes_per_pixel: int = Field(ge=1)
    largest: int = Field(ge=1)
    camera: str | None
    gains: tuple[Gain, Gain, Gain]
    noise: tuple[Variance, Variance]
    matrix: tuple[Row, Row, Row]

    @model_validator(mode="after")
    def _fits(self) -> Facts:
        """Refuse what no file of a network is."""
        if self.inputs[:1] != ("planes",) or len({*self.inputs}) < len(self.inputs):
            raise ValueError("the inputs are planes, and others once each")
        if self.halo % self.multiple:
            raise ValueError(f"a halo of {self.halo} is no multiple of {self.multiple}")
        return self


def ported(loaded: Loaded, settings: Infer) -> model.Exported:
    """Return an exported file as what ``apply`` takes.

    Args:
        loaded: The file.
        settings: Of ``infer``; nothing of them matters here.

    Raises:
        ImgtoolError: The file does not say what it holds, or what cannot be, or holds something else.
    """
    facts = loading.facts(loaded.path, loaded.about, Facts)
    run = loading.checked(loaded, [_TAKEN[name] for name in facts.inputs], [(1, 3, "2*height", "2*width")])
    planes = pictures.fixed_size(loaded)
    return model.Exported(
        run=run,
        inputs=facts.inputs,
        camera=Camera(facts.gains, facts.noise, np.array(facts.matrix)),
        fixed=facts.camera is not None,
        size=planes and (2 * planes[0], 2 * planes[1]),
        **facts.model_dump(include=_WORDS),
    )
