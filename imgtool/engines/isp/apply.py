"""A frame developed: levels, balance, noise, network and colours, in tiles; then cropped, turned upright."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt
import torch

from imgtool import compute, files, images, mosaic, raw, tiles
from imgtool.engine import Result, TileFacts, Watch
from imgtool.engines.isp import bayer, colour, model, unprocess
from imgtool.engines.isp import noise as measured
from imgtool.errors import USAGE, ImgtoolError
from imgtool.images import metadata

if TYPE_CHECKING:
    from torch import Tensor, nn

    from imgtool.engine import Pixels
    from imgtool.engines.isp.settings import Infer
    from imgtool.mosaic import Mosaic

_SRGB_16 = 65535

MOST_GAIN, MOST_NOISE = 50.0, 0.1
"""What --wb and --noise take at most: beyond, a number is a slip."""

Gains = tuple[float, float, float]

LEAST_BYTES, BYTES_A_CHANNEL = 130, {"lrfu": 13, "punet": 7}
"""Resident memory per pixel of the mosaic: growth of VmHWM, float32, two threads; of the front end, and for
each channel of a network's first level."""

LARGEST = {"lrfu": 512, "punet": 2048}
"""Core edge of tiles: from 512 to 1024 CPU time does not depend on it, memory does. Where the halo is wide,
small tiles compute little else."""

SUFFIXES = files.RAW | {".png"}
"""Of the files that are inputs in folders."""

TURNS = {3: cv2.ROTATE_180, 5: cv2.ROTATE_90_COUNTERCLOCKWISE, 6: cv2.ROTATE_90_CLOCKWISE}
"""How a picture that lies as LibRaw's flip says is turned upright."""

_TOP = 65535
_NONE = (1.0, 1.0, 1.0)


def check(settings: Infer) -> None:
    """Raise what is wrong with the settings whatever the frame; the decoder starts meanwhile.

    Raises:
        ImgtoolError: Code 2: --wb or --noise is neither a known word nor numbers that make sense.
    """
    mosaic.warm()
    mosaic.blacks(settings.black)
    if settings.wb not in ("camera", "daylight", "auto"):
        limits = (1 / MOST_GAIN, MOST_GAIN)
        known = "camera, daylight, auto, or three gains such as 2.1,1,1.6, from {:g} to {:g}".format(*limits)
        _numbers(settings.wb, 3, "--wb", known, limits)
    if settings.noise != "auto":
        known = f"auto, or two variances such as 1e-3,1e-6, up to {MOST_NOISE:g}"
        _numbers(settings.noise, 2, "--noise", known, (0, MOST_NOISE))


def _numbers(
    text: str, count: int, flag: str, known: str, limits: tuple[float, float] = (0, math.inf)
) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if len(found) != count or not all(limits[0] <= number <= limits[1] for number in found):
        raise ImgtoolError(f"{flag} {text!r} is not understood", f"known: {known}", USAGE)
    return found


def form(settings: Infer) -> str:
    """Return the file type that is written where nothing else is said."""
    return "png" if settings.depth == "16" else "jpg"


def uses_weights(settings: Infer) -> bool:
    """Tell whether a network is asked."""
    return settings.demosaic == "net"


def opened(source: Path | bytes, name: str, settings: Infer, net: nn.Module | None) -> Mosaic:
    """Read a frame: camera RAW, a PNG of one channel, or a file without a header whose size is stated.

    Args:
        source: The file, or its content.
        name: What messages call it.
        settings: Of ``infer``: what is stated of files without a header.
        net: Not used.

    Raises:
        ImgtoolError: As ``mosaic.read``.
    """
    black = mosaic.blacks(settings.black)
    stated = mosaic.Stated(settings.size, settings.pattern, settings.bits, black, settings.white)
    return mosaic.read(source, stated, name)


@dataclass(frozen=True)
class Told:
    """What a frame is developed with, and where each part is from.

    Attributes:
        gains: White balance of red, green and blue, the least 1.
        gains_from: "camera", "daylight", "auto", "given", "none", or "weights" where they fix it.
        noise: Shot and read variance, black at 0 and white at 1.
        noise_from: "file", "measured", "given" or "weights".
        matrix: ``(3, 3)`` balanced camera RGB to linear sRGB.
        matrix_from: "library", "file", "none" or "weights".
    """

    gains: Gains
    gains_from: str
    noise: tuple[float, float]
    noise_from: str
    matrix: npt.NDArray[np.float64]
    matrix_from: str


def tile_facts(net: nn.Module | model.Exported) -> TileFacts:
    """Return what cutting a mosaic into tiles may assume; sizes in its pixels."""
    if isinstance(net, model.Exported):
        multiple, halo = net.multiple, net.halo
        return TileFacts(
            multiple, halo=halo, border=halo, bytes_per_pixel=net.bytes_per_pixel, largest=net.largest
        )
    kind, channels = "lrfu", 0
    if isinstance(net, model.Lrfu):
        channels = net.head.out_channels
    elif isinstance(net, model.Punet):
        kind, channels = "punet", 4 * net.last.in_channels
    wide = max(LEAST_BYTES, channels * BYTES_A_CHANNEL[kind])
    halo, multiple = int(net.halo), int(net.multiple)  # type: ignore[arg-type]
    return TileFacts(multiple, halo=halo, border=halo, bytes_per_pixel=wide, largest=LARGEST[kind])


def apply(net: nn.Module | model.Exported | None, frame: Mosaic, settings: Infer, watch: Watch) -> Result:
    """Develop a frame into an upright sRGB photo.

    Args:
        net: The network, of torch or in a file; None for the front end alone (``settings.demosaic``).
        frame: What ``opened`` gave.
        settings: Of ``infer``.
        watch: Told how it goes; asked for another engine's white where the settings want it.

    Returns:
        The photo, 8 or 16 bit, and what it was made with.

    Raises:
        ImgtoolError: Memory runs out, the network is damaged, or no white balance is found.
    """
    if net is None:
        net = model.Demosaic(settings.demosaic).to(compute.device(settings.device))
    for warning in frame.warnings:
        watch.say(warning)
    told = _told(net, frame, settings, watch)
    photo, labels = images.Photo(np.empty((0, 0, 3), np.uint8)), ("before", "after")
    photo = replace(photo, exif=_exif(frame, watch.source), icc=metadata.srgb_profile(), format="raw")
    image, cut = developed(net, frame, told, settings, watch)
    facts: dict[str, Any] = {
        "pattern": frame.pattern,
        "black": list(frame.black),
        "white": frame.white,
        "wb": list(told.gains),
        "wb_source": told.gains_from,
        "noise": list(told.noise),
        "noise_source": told.noise_from,
        "matrix_source": told.matrix_from,
        "camera": frame.camera or None,
        **cut,
    }
    if watch.before:
        before, name = _before(frame, told, settings, watch)
        photo, labels = replace(photo, pixels=before), (name, "imgtool")
        if settings.compare:
            watch.say(f"PSNR between the photo and {name}: {_apart(before, image)}")
    return Result(image, facts, before=photo, labels=labels, line=_line(told))


def _line(told: Told) -> str:
    red, _, blue = told.gains
    shown = f"wb {red:.2f}, {blue:.2f} ({told.gains_from})" if told.gains_from != "none" else ""
    return f"{shown}  noise {told.noise[0]:.1e}, {told.noise[1]:.1e} ({told.noise_from})".strip()


def _told(net: nn.Module | model.Exported, frame: Mosaic, settings: Infer, watch: Watch) -> Told:
    if isinstance(net, model.Exported) and net.fixed:
        watch.say("balance, noise and colours are those of the camera that these weights were exported for")
        return Told(net.camera.gains, "weights", net.camera.noise, "weights", net.camera.matrix, "weights")
    if net.scaling == "mai21" and settings.wb != "camera":
        watch.say("--wb does nothing here: these weights were trained without any white balance")
    gains, source = _balance(net, frame, settings, watch)
    if isinstance(net, model.Exported) and net.balanced:
        variances, heard = net.camera.noise, "weights"
    else:
        variances, heard = _noise(frame, settings)
    return Told(gains, source, variances, heard, *_colours(net, frame, watch))


def _noise(frame: Mosaic, settings: Infer) -> tuple[tuple[float, float], str]:
    """Return the variances of a frame, and what they are from."""
    if settings.noise != "auto":
        (shot, read), heard = _numbers(settings.noise, 2, "--noise", ""), "given"
    elif frame.noise is not None:
        (shot, read), heard = frame.noise, "file"
    else:
        (shot, read), heard = measured.estimate(frame), "measured"
    return (shot, max(read, unprocess.rounding(frame.white - min(frame.black)))), heard


def _colours(
    net: nn.Module | model.Exported, frame: Mosaic, watch: Watch
) -> tuple[npt.NDArray[np.float64], str]:
    """Return the camera's matrix, and what it is from."""
    if isinstance(net, model.Exported) and net.balanced:
        matrix, known, more = net.camera.matrix, "weights", ": export with --inputs all, or with --camera"
    elif frame.matrix is None:
        matrix, known, more = np.eye(3), "none", ""
    else:
        return frame.matrix, frame.matrix_source or "file"
    if net.colour == "camera":
        watch.say(f"the camera's colours are taken for those of sRGB{more}")
    return matrix, known


def _balance(
    net: nn.Module | model.Exported, frame: Mosaic, settings: Infer, watch: Watch
) -> tuple[Gains, str]:
    """Return the gains, the least 1, and what they are from."""
    if net.scaling == "mai21":
        return _NONE, "none"
    known = {"camera": frame.gains, "daylight": frame.daylight}
    if settings.wb not in (*known, "auto"):
        return bayer.least_is_one(_numbers(settings.wb, 3, "--wb", "")), "given"
    for source in dict.fromkeys((settings.wb, "daylight")) if settings.wb in known else ():
        gains = known[source]
        if gains is not None:
            if source != settings.wb:
                watch.say("daylight's white balance is taken for the camera's")
            return bayer.least_is_one(gains), source
    if settings.wb == "camera" and net.colour == "learned":  # as it was trained
        return _NONE, "none"
    if settings.wb in known:
        watch.say(f"no white balance of {settings.wb} is known: the engine awb finds one")
    return _found(frame, watch), "auto"


def _found(frame: Mosaic, watch: Watch) -> Gains:
    """Return the gains that the awb engine finds: in the file, or in a picture of a bare mosaic."""
    if frame.matrix_source:
        facts: Mapping[str, Any] = watch.consult("awb")
    else:
        facts = watch.consult("awb", _linear_png(frame), black=0.0, white=float(_TOP), domain="raw")
    gains = (float(facts["red_gain"]), 1.0, float(facts["blue_gain"]))
    return bayer.least_is_one(gains)


def _linear_png(frame: Mosaic) -> bytes:
    """Return a 16-bit PNG of linear camera RGB, half as large: black is 0, white the greatest value."""
    height, width = bayer.aligned_size(frame)
    red, above, below, blue = bayer.pack(bayer.window(frame, (0, height), (0, width)))
    rgb = np.stack([red, (above + below) / 2, blue], 2)
    return images.encode(images.Photo(images.to_type(rgb, np.uint16)), "png")


def developed(
    net: nn.Module | model.Exported, frame: Mosaic, told: Told, settings: Infer, watch: Watch
) -> tuple[Pixels, dict[str, int]]:
    """Return the upright picture, and how it was cut into tiles."""
    facts = tile_facts(net)
    height, width = bayer.aligned_size(frame)
    out = np.empty((height, width, 3), np.uint16 if _is_deep(settings, watch) else np.uint8)
    if isinstance(net, model.Exported):
        make: _Maker = _FileMaker(net, frame, told, settings.ev, out.dtype)
    else:
        make = _TorchMaker(
            compute.channels_last(model.folded(net)), levelled(net, frame), told, settings.ev, out.dtype
        )
    if isinstance(net, model.Exported) and net.size:
        count, edge = _walked(make, out, frame, net, net.size, watch)
    else:
        tile = settings.tile and max(settings.tile, tiles.SMALLEST)
        core = tiles.choose(height, width, tile, facts.halo, settings.memory * 1e9, facts)
        if settings.tile is None:
            core = core or facts.largest
        count, edge = tiles.walk(make, out, tiles.Plan(core, facts.halo), facts, watch)
    down, right = bayer.phase(frame.pattern)
    visible = out[down : down + frame.values.shape[0], right : right + frame.values.shape[1]]
    cut = {"tiles": count, "tile": edge, "halo": facts.halo if count > 1 else 0}
    return _laid(visible, frame, settings), cut


def _walked(
    make: _Maker, out: Pixels, frame: Mosaic, net: model.Exported, size: tuple[int, int], watch: Watch
) -> tuple[int, int]:
    """Fill a picture by a file of fixed size, and return as ``tiles.walk``."""
    # An RGGB mosaic of even sides ends as what the file is given: there the file's own mirroring is right.
    whole = frame.pattern == "RGGB" and out.shape[:2] == frame.values.shape and net.mirrors
    facts = TileFacts(net.multiple, halo=net.halo, border=0 if whole else net.halo)
    axes = [_spans(have, takes, facts) for have, takes in zip(out.shape[:2], size, strict=True)]
    every = [tiles.Tile(rows, columns) for rows in axes[0] for columns in axes[1]]
    for number, tile in enumerate(every, 1):
        tiles.write(out, tile, make(tile))
        watch.done(number, len(every))
    return len(every), max(max(t.rows.stop - t.rows.start, t.columns.stop - t.columns.start) for t in every)


def _spans(have: int, takes: int, facts: TileFacts) -> list[tiles.Span]:
    """Cut ``have`` pixels so that what each part reads is at most what a file takes."""
    if have + 2 * facts.border <= takes:
        return tiles.spans(have, 0, facts.halo, facts)
    core = (takes - 2 * facts.halo) // facts.multiple * facts.multiple
    if core < facts.multiple:
        what = f"these weights take {takes} pixels at once, of which none has all its neighbours"
        raise ImgtoolError(what, f"export them for more than {2 * facts.halo}, by --size")
    return tiles.spans(have, core, facts.halo, facts)


def levelled(net: nn.Module | model.Exported, frame: Mosaic) -> Mosaic:
    """Return a frame with the levels that a network's planes are made with."""
    if net.scaling != "mai21":
        return frame
    # 4 x 255 of 10 bits, nothing subtracted.
    return replace(frame, black=(0.0,) * 4, white=frame.white * bayer.MAI21_WHITE / 1023)


def _is_deep(settings: Infer, watch: Watch) -> bool:
    if settings.depth != "auto":
        return settings.depth == "16"
    named = settings.format or (watch.place.suffix if watch.place else "")
    return bool(named) and files.file_type(named) == "tif"


class _Maker(Protocol):
    """Makes the core of a tile of the picture, as the sensor lies."""

    def __call__(self, tile: tiles.Tile) -> Pixels:
        """Return ``(h, w, 3)`` of the output's type, clipped and rounded to nearest."""
        ...


class _TorchMaker:
    """Makes it by a network of torch."""

    def __init__(self, net: nn.Module, frame: Mosaic, told: Told, ev: float, dtype: npt.DTypeLike) -> None:
        where = next(net.parameters()).device
        self.net, self.frame, self.ev, self.dtype = net, frame, ev, np.dtype(dtype)
        self.gains = torch.tensor([told.gains], dtype=torch.float32, device=where)
        self.noise = torch.tensor([told.noise], dtype=torch.float32, device=where)
        self.matrix = torch.tensor(told.matrix, dtype=torch.float32, device=where)
        self.where = where

    @torch.inference_mode()
    def __call__(self, tile: tiles.Tile) -> Pixels:
        rows, columns = tile.rows, tile.columns
        values = bayer.window(
            self.frame, (rows.read_start, rows.read_stop), (columns.read_start, columns.read_stop)
        )
        packed = torch.from_numpy(bayer.pack(values))[None].to(self.where)
        fed = model.feed(self.net, packed, self.gains, self.noise)
        photo = model.photo(self.net, fed.contiguous(memory_format=torch.channels_last), self.matrix, self.ev)
        return _cut_out(photo, tile, self.dtype)


class _FileMaker:
    """Makes it by a file; where that has one size, more is read than the tile needs."""

    def __init__(
        self, net: model.Exported, frame: Mosaic, told: Told, ev: float, dtype: npt.DTypeLike
    ) -> None:
        self.net, self.frame, self.dtype = net, levelled(net, frame), np.dtype(dtype)
        inside = "matrix" in net.inputs
        self.after = 0.0 if inside else ev
        matrix = np.asarray(told.matrix) * (2.0**ev if inside else 1.0)
        known = {"gains": told.gains, "noise": told.noise, "matrix": matrix}
        self.rest = [np.asarray(known[name], np.float32)[None] for name in net.inputs[1:]]
        self.balance = np.asarray([told.gains[of] for of in (0, 1, 1, 2)], np.float32)[:, None, None]

    def __call__(self, tile: tiles.Tile) -> Pixels:
        rows, columns = (
            (span.read_start, span.read_start + self.net.size[axis] if self.net.size else span.read_stop)
            for axis, span in enumerate((tile.rows, tile.columns))
        )
        planes = bayer.pack(bayer.window(self.frame, rows, columns))
        if self.net.balanced:
            planes = np.minimum(planes * self.balance, np.float32(1))
        if self.net.packing == "mai21":
            planes = planes[list(bayer.MAI21)]
        (photo,) = self.net.run(planes[None], *self.rest)
        display = torch.from_numpy(photo)
        if self.after:
            display = colour.encode(colour.decode(display) * 2.0**self.after)
        return _cut_out(display, tile, self.dtype)


def _cut_out(photo: Tensor, tile: tiles.Tile, dtype: np.dtype[Any]) -> Pixels:
    """Return the core of a tile's photo ``(1, 3, h, w)``."""
    kept = photo[0, :, _core(tile.rows), _core(tile.columns)].permute(1, 2, 0)
    if not torch.isfinite(kept.sum()):
        raise ImgtoolError("the network's output is not finite", "its weights are damaged: take others")
    return _whole_numbers(kept, dtype)


def _core(span: tiles.Span) -> slice:
    return slice(span.start - span.read_start, span.stop - span.read_start)


def _whole_numbers(photo: Tensor, dtype: np.dtype[Any]) -> Pixels:
    wanted = torch.uint8 if dtype == np.uint8 else torch.int32  # few devices know 16 bits
    scaled = photo.clamp(0, 1).mul_(float(np.iinfo(dtype).max)).round_()
    numbers: Pixels = scaled.to(wanted).cpu().numpy().astype(dtype, copy=False)
    return numbers


def _laid(visible: Pixels, frame: Mosaic, settings: Infer) -> Pixels:
    """Cut the camera's crop out of a picture that lies as the sensor does, and turn it upright."""
    if settings.area == "camera" and frame.crop:
        top, left, height, width = frame.crop
        visible = visible[top : top + height, left : left + width]
    turn = TURNS.get(frame.flip) if settings.flip else None
    return np.ascontiguousarray(visible) if turn is None else np.asarray(cv2.rotate(visible, turn))


def _before(frame: Mosaic, told: Told, settings: Infer, watch: Watch) -> tuple[Pixels, str]:
    """Return another rendering with the same gains, and its name: LibRaw's, else the front end's."""
    try:
        if watch.source is None:
            raise ImgtoolError("no file is there", "")
        with files.as_file(watch.source, "input.dng") as path:
            lying = _exposed(raw.render(path, told.gains, demosaic="ahd", upright=False), settings.ev)
    except ImgtoolError:
        watch.say("LibRaw does not render this file: it is shown beside Malvar's demosaicing")
        plain = model.Demosaic("malvar").to(compute.device(settings.device))
        quiet = replace(watch, done=lambda finished, total: None)
        return developed(plain, frame, told, settings, quiet)[0], "front end (Malvar)"
    return _laid(lying, frame, settings), "LibRaw AHD"


def _exposed(picture: npt.NDArray[np.uint16], ev: float) -> Pixels:
    """Return a 16-bit sRGB picture, so many stops brighter."""
    if not ev:
        return picture
    linear = colour.decode(torch.arange(_SRGB_16 + 1, dtype=torch.float64) / _SRGB_16) * 2.0**ev
    table: Pixels = (colour.encode(linear).clamp(0, 1) * _SRGB_16).round().numpy().astype(np.uint16)
    brighter: Pixels = table[picture]
    return brighter


def _apart(before: Pixels, after: Pixels) -> str:
    """Return in words how far apart two pictures are."""
    if before.shape != after.shape:
        return f"none, their sizes differ ({before.shape[1]}x{before.shape[0]})"
    psnr = cv2.PSNR(images.convert(before, np.uint8), images.convert(after, np.uint8))
    return f"{min(psnr, 100.0):.2f} dB"


def _exif(frame: Mosaic, source: Path | bytes | None) -> bytes | None:
    """Return the EXIF block of the photo: what a TIFF-like file says, else what is known of the shot."""
    data = files.read(source) if isinstance(source, Path) else source
    told = metadata.exif_of_raw(data) if data else None
    return told or _made_exif(frame)


def _made_exif(frame: Mosaic) -> bytes | None:
    from PIL import Image
    from PIL.TiffImagePlugin import IFDRational

    exif = Image.Exif()
    if frame.camera:
        exif[0x010F], exif[0x0110] = frame.camera.split()[0], frame.camera
    if frame.exif.get("time"):
        exif[0x0132] = frame.exif["time"]
    inner = exif.get_ifd(0x8769)
    for tag, name in ((0x829A, "exposure"), (0x829D, "aperture"), (0x920A, "focal")):
        if frame.exif.get(name):
            inner[tag] = IFDRational(float(frame.exif[name])).limit_rational(10_000)
    if frame.exif.get("iso"):
        inner[0x8827] = round(frame.exif["iso"])
    if frame.exif.get("time"):
        inner[0x9003] = frame.exif["time"]
    if not exif and not inner:
        return None
    exif[0x0112] = 1
    return exif.tobytes().removeprefix(b"Exif\0\0")
