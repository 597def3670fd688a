"""Settings of the isp engine: only what differs from the common ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from imgtool import settings as common
from imgtool.settings import (
    DATA,
    FILES,
    MEASUREMENT,
    MODEL,
    NETWORK,
    TRAINING,
    Place,
    Settings,
    setting,
)

Pattern = Literal["RGGB", "BGGR", "GRBG", "GBRG"]
"""Colours of the first two pixels of the first two rows."""


class Model(Settings):
    """What shapes the network and what it is fed."""

    arch: Literal["lrfu", "punet"] = setting(
        "lrfu",
        "Network: lrfu (adaptive-weight residual units, fused) or punet (the original's U-Net).",
        panel=MODEL,
    )
    size: Literal["xs", "s", "m", "l"] = setting("s", "lrfu: how large.", panel=MODEL)
    width: Literal["8", "16", "32"] = setting("16", "punet: channels of the first level.", panel=MODEL)
    packing: Literal["rggb", "mai21"] = setting(
        "rggb",
        "Order of the four planes that the network is fed: rggb (R, Gr, Gb, B) or mai21 (the original's: "
        "B, Gr, R, Gb).",
        panel=MODEL,
    )
    scaling: Literal["levels", "mai21"] = setting(
        "levels",
        "levels: black is 0, white is 1, balanced; mai21: the original's value / 1020, nothing subtracted.",
        panel=MODEL,
    )
    colour: Literal["camera", "learned"] = setting(
        "camera",
        "camera: white balance and matrix of the camera are applied; learned: the network learns the colours "
        "of its targets, as of another camera's photos.",
        panel=MODEL,
    )


class Noise(Settings):
    """Raw frames that are made of photographs."""

    least_shot: float = setting(
        5e-5, "Least shot noise: variance of a pixel is shot x signal + read, white is 1.", panel=DATA, gt=0
    )
    most_shot: float = setting(2e-2, "Largest shot noise.", panel=DATA, gt=0, le=0.1)
    noise_free: float = setting(
        0.1, "Share of frames without any noise but that of rounding.", panel=DATA, ge=0, le=1
    )


class Levels(Settings):
    """What mosaics without a header hold; camera RAW files say it themselves."""

    size: str = setting("", "Headerless .raw: WIDTHxHEIGHT, as 1920x1080.", panel=FILES, served=True)
    pattern: Pattern = setting(
        "RGGB", "PNG and headerless mosaics: colours of the first 2x2 pixels.", panel=FILES, served=True
    )
    bits: int = setting(
        0, "PNG and headerless mosaics: bits of a pixel; 0 takes those of the largest value.",
        panel=FILES, ge=0, le=16, served=True,
    )  # fmt: skip
    black: str = setting(
        "",
        "Their black level, or four, of the pattern's places row by row, as 58,60,61,62.",
        panel=FILES,
        served=True,
    )
    white: float = setting(-1.0, "Their white level; -1 is 2^bits - 1.", panel=FILES, ge=-1, served=True)


class Train(Model, Noise, common.Train):
    """Train a network from RAW to RGB on photographs, RAW files or aligned pairs."""

    example: ClassVar[str] = "imgtool train isp --photos ~/Pictures --steps 60000 -o runs/isp"
    photos: tuple[Path, ...] = setting(
        (), "Folders of photographs, turned into raw frames on the fly.", panel=DATA
    )
    raws: tuple[Path, ...] = setting(
        (), "Folders of RAW files; the target is LibRaw's rendering, at low sensitivity.", panel=DATA
    )
    data: tuple[Path, ...] = setting(
        (),
        "Folders of pairs: MAI21 (train/mediatek_raw and train/fujifilm), Zurich (train/huawei_raw and "
        "train/canon), or what data synth and data render write.",
        panel=DATA,
    )
    crop: int = setting(
        128, "Edge of the square training crops, in pixels of the mosaic.", panel=DATA, ge=32, le=4096,
        multiple_of=2,
    )  # fmt: skip
    held_out: int = setting(
        30, "Validation crops, fixed, from files that are not trained on.", panel=DATA, ge=1
    )
    demosaic: Literal["linear", "ppg", "ahd", "dcb", "dht", "aahd"] = setting(
        "dht", "--raws: LibRaw's algorithm that renders the targets.", panel=DATA
    )
    steps: int = setting(60_000, "Optimiser steps in all.", panel=TRAINING, ge=1)
    batch: int = setting(16, "Samples per step.", panel=TRAINING, ge=1)
    epoch_steps: int = setting(2000, "Steps between validations: one epoch.", panel=TRAINING, ge=1)
    lr: float = setting(1e-3, "Peak learning rate.", panel=TRAINING, gt=0)
    warmup: int = setting(500, "Steps over which the rate rises from zero.", panel=TRAINING, ge=0)
    loss: Literal["relative-mse", "charbonnier", "charbonnier-msssim", "original"] = setting(
        "relative-mse",
        "relative-mse: squared error as a share of the front end's; charbonnier; charbonnier-msssim: with "
        "0.15 (1 - MS-SSIM) over the last 30 % of the steps; original: 20 MSE + VGG-19 + 20 (1 - SSIM).",
        panel=TRAINING,
    )
    vgg: Path | None = setting(
        None,
        "original: file of VGG-19 weights (torchvision's) [default: torchvision's own, downloaded once].",
        panel=TRAINING,
    )


class Infer(Levels, common.Infer):
    """Develop RAW files into photographs."""

    example: ClassVar[str] = "imgtool infer isp IMG_1.DNG -o photo.jpg --compare libraw"
    inputs: tuple[Place, ...] = setting(
        ..., "RAW files, PNG mosaics, folders of them, globs, or - for standard input.", panel=FILES,
        argument=True, min_length=1,
    )  # fmt: skip
    format: Literal["", "jpg", "png", "tif", "webp"] = setting(
        "",
        "File type of the output [default: that of -o, else jpg; png with --depth 16].",
        panel=FILES,
        served=True,
    )
    depth: Literal["auto", "8", "16"] = setting(
        "auto",
        "Bits of a colour in the output; auto is 16 for TIFF and 8 for others.",
        panel=FILES,
        served=True,
    )
    compare: Literal["", "libraw"] = setting(  # type: ignore[assignment]
        "", "Also write a sheet beside another rendering, <output>-compare.png: libraw.", panel=FILES
    )
    area: Literal["camera", "visible"] = setting(
        "camera",
        "What is developed: the camera's crop, or every pixel that sees light.",
        panel=FILES,
        served=True,
    )
    flip: bool = setting(True, "Turn the photo upright, as the camera says.", panel=FILES, served=True)
    wb: str = setting(
        "camera",
        "White balance: camera, daylight, auto (of the awb engine), or gains R,G,B.",
        panel=NETWORK,
        served=True,
    )
    ev: float = setting(0.0, "Exposure compensation in stops.", panel=NETWORK, ge=-8, le=8, served=True)
    noise: str = setting(
        "auto",
        "Noise of the frame: auto (what the file says, else measured in it), or SHOT,READ variances at "
        "white = 1.",
        panel=NETWORK,
        served=True,
    )
    demosaic: Literal["net", "malvar", "linear"] = setting(
        "net", "net, or the fixed front end alone with a classical demosaicing.", panel=NETWORK, served=True
    )
    tile: int | None = setting(
        None,
        "Edge of a tile in pixels, without its overlap, at least 64; 0 takes the frame whole [default: from "
        "--memory].",
        panel=NETWORK,
        ge=0,
        le=65536,
    )
    memory: float = setting(
        0.5, "Resident memory that the network's arithmetic may take, in GB: sets the tile.",
        panel=NETWORK, gt=0,
    )  # fmt: skip


class Export(common.Export):
    """Write a network as a file that runs elsewhere, and prove it."""

    example: ClassVar[str] = "imgtool export isp --to tflite --size 1088x1920"
    inputs: Literal["auto", "all", "planes"] = setting(
        "auto",
        "all: planes, gains, noise and colour matrix are inputs; planes: they alone are, the rest is fixed "
        "in the file; auto is planes for tflite, else all.",
        panel=NETWORK,
    )
    packing: Literal["rggb", "mai21"] = setting(
        "rggb", "Order of the planes: R, Gr, Gb, B, or that of the Mobile AI 2021 challenge.", panel=NETWORK
    )
    camera: Path | None = setting(
        None,
        "With --inputs planes: RAW file whose gains, noise and colour matrix are fixed in the file [default: "
        "planes are balanced, and their colours sRGB's].",
        panel=DATA,
    )


class Bench(common.Bench):
    """Measure latency on GPU or CPU beside the original and LibRaw, and quality on pairs."""

    example: ClassVar[str] = "imgtool bench isp --max-ms 0.5"
    height: int = setting(1088, "Rows of the timed picture.", panel=MEASUREMENT, ge=32)
    width: int = setting(1920, "Columns of the timed picture.", panel=MEASUREMENT, ge=32)
    max_ms: float = setting(
        0.0,
        "Latency of the network alone at most, in ms: in fp16 as a CUDA graph, on a CPU in its fastest form; "
        "0 sets no limit.",
        panel=MEASUREMENT, ge=0,
    )  # fmt: skip
    iterations: int = setting(200, "Timed iterations on a GPU.", panel=MEASUREMENT, ge=20)
    megapixels: int = setting(
        12, "Size of the RAW file that is developed into a JPEG beside LibRaw's AHD; 0 leaves it out.",
        panel=MEASUREMENT, ge=0, le=200,
    )  # fmt: skip
    photos: Path | None = setting(
        None, "Folder of photos: quality on raw frames made of them, at each noise of --shot.",
        panel=MEASUREMENT,
    )  # fmt: skip
    shot: str = setting(
        "0,1e-4,1e-3,4e-3,1e-2", "Shot noise of the frames that are made of --photos.", panel=MEASUREMENT
    )


class Inspect(Levels, common.Data):
    """Say what RAW files hold: sizes, pattern, levels, white balance, colour matrix, noise."""

    example: ClassVar[str] = "imgtool data inspect IMG_1.DNG --json"
    alone: ClassVar[bool] = True
    inputs: tuple[Path, ...] = setting(..., "RAW files, or folders of them.", panel=DATA, argument=True)


class Synth(Noise, common.Data):
    """Turn photographs into DNG files with real noise, and keep the truth."""

    example: ClassVar[str] = "imgtool data synth isp ~/Pictures -o pairs --shot 1e-3,1e-2"
    photos: tuple[Path, ...] = setting(..., "Folders of photographs.", panel=DATA, argument=True)
    out: Path = setting(
        ..., "Folder for raw/NAME.dng, rgb/NAME.png, samples.jsonl and preview.png.", panel=DATA, short="-o"
    )
    shot: str = setting(
        "", "Shot noise levels: every photo at each [default: one drawn for each photo].", panel=DATA
    )
    bits: int = setting(12, "Bits of a pixel.", panel=DATA, ge=8, le=16)
    pattern: Pattern = setting("RGGB", "Colours of the first 2x2 pixels.", panel=DATA)
    camera: str = setting(
        "", "One of the known cameras [default: another mixture of them for each photo].", panel=DATA
    )
    shrink: float = setting(
        1.0,
        "Times that photos are shrunk before, by averaging: hides the marks of JPEG.",
        panel=DATA,
        ge=1,
        le=8,
    )
    count: int = setting(0, "Photos to take; 0 takes all.", panel=DATA, ge=0)
    seed: int = setting(0, "Seed: the same seed writes the same files.", panel=DATA, ge=0)


class Render(common.Data):
    """Render RAW files by LibRaw, the same way every time: targets to train on."""

    example: ClassVar[str] = "imgtool data render isp raws/ -o pairs --demosaic dht"
    raws: tuple[Path, ...] = setting(..., "RAW files, or folders of them.", panel=DATA, argument=True)
    out: Path = setting(
        ...,
        "Folder for rgb/NAME.png (16 bit), and raw/, links or copies of the files.",
        panel=DATA,
        short="-o",
    )
    demosaic: Literal["linear", "ppg", "ahd", "dcb", "dht", "aahd"] = setting(
        "dht", "LibRaw's algorithm.", panel=DATA
    )


class Check(common.Data):
    """Check a folder of pairs: every fault, in one list."""

    example: ClassVar[str] = "imgtool data check isp mai21/"
    folder: Path = setting(..., "Folder of pairs.", panel=DATA, argument=True)


class Stats(common.Data):
    """Draw the distributions of levels, colours, noise and alignment of a folder of pairs."""

    example: ClassVar[str] = "imgtool data stats isp mai21/ -o stats"
    folder: Path = setting(..., "Folder of pairs.", panel=DATA, argument=True)
    out: Path | None = setting(None, "Folder for the plots [default: FOLDER/stats].", panel=DATA, short="-o")


ACTIONS: Mapping[str, type[common.Data]] = {
    "inspect": Inspect,
    "synth": Synth,
    "render": Render,
    "check": Check,
    "stats": Stats,
}
"""The actions of ``imgtool data`` that this engine has."""
