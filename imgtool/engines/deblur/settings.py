"""Settings of the deblur engine: only what differs from the common ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from imgtool import settings as common
from imgtool.settings import Settings, setting


class Model(Settings):
    """What shapes the network."""

    arch: Literal["unet-lite", "unet-seed"] = setting(
        "unet-lite",
        "Network: unet-lite (3.0 M parameters, local) or unet-seed (8.6 M, GroupNorm).",
        panel="Model",
    )


class Severity(Settings):
    """How hard sharp photographs are treated when blur is synthesised."""

    untouched: float = setting(
        0.1,
        "Share of synthetic samples that are not blurred, so that sharp photos stay sharp.",
        panel="Data",
        ge=0,
        le=1,
    )
    shortest_blur: float = setting(
        2.0, "Least extent of synthetic blur, in pixels.", panel="Data", ge=1, le=60
    )
    longest_blur: float = setting(
        26.0, "Largest extent of synthetic blur, in pixels.", panel="Data", ge=1, le=60
    )
    noisy: float = setting(
        0.5, "Share of the blurred samples that get noise; 0.6 of it get JPEG.", panel="Data", ge=0, le=1
    )


class Train(Model, Severity, common.Train):
    """Train a deblurring network on pairs, on photographs blurred on the fly, or on frames."""

    example: ClassVar[str] = "imgtool train deblur --photos ~/Pictures --steps 20000 -o runs/mine"
    photos: tuple[Path, ...] = setting(
        (), "Folders of sharp photographs; blur is synthesised on the fly.", panel="Data"
    )
    pairs: tuple[Path, ...] = setting(
        (), "Folders of pairs: GoPro layout, or blur/ and sharp/ with the same names.", panel="Data"
    )
    frames: tuple[Path, ...] = setting(
        (), "Folders of consecutive sharp frames; runs of them are averaged.", panel="Data"
    )
    blur_folder: Literal["blur", "blur_gamma"] = setting(
        "blur", "Which of GoPro's blurred folders to take.", panel="Data"
    )
    crop: int = setting(
        256, "Edge of the square training crops, in pixels.", panel="Data", ge=32, le=4096, multiple_of=16
    )
    validate_on: tuple[Path, ...] = setting(
        (), "Folders of photos or pairs to validate on [default: a part of the training data].", panel="Data"
    )
    held_out: int = setting(
        24, "Validation crops, fixed, from photos that are not trained on.", panel="Data", ge=1
    )
    lr: float = setting(1e-3, "Peak learning rate.", panel="Training", gt=0)
    loss: Literal["relative-mse", "charbonnier-fft", "msssim-charbonnier"] = setting(
        "relative-mse",
        "relative-mse: squared error as a share of the input's; charbonnier-fft: Charbonnier + spectrum; "
        "msssim-charbonnier: the original's 0.84 (1 - MS-SSIM) + 0.16 Charbonnier.",
        panel="Training",
    )


class Infer(common.Infer):
    """Sharpen photos."""

    example: ClassVar[str] = "imgtool infer deblur photo.jpg -o sharp.jpg --compare"
    tile: int | None = setting(
        None,
        "Edge of a tile in pixels, without its overlap; 0 takes the photo whole [default: from --memory].",
        panel="Network",
        ge=0,
        le=65536,
    )
    overlap: int = setting(
        64,
        "Context around each tile, computed and thrown away, in pixels; from 64 on tiles are exact.",
        panel="Network",
        ge=0,
        le=1024,
    )
    memory: float = setting(
        1.0,
        "Resident memory that the network's arithmetic may take, in GB: sets the tile.",
        panel="Network",
        gt=0,
    )
    strength: float = setting(
        1.0,
        "Share of the correction that is applied: 0 none, 1 all.",
        panel="Network",
        ge=0,
        le=1,
        served=True,
    )


class Export(common.Export):
    """Write a network as a file that runs elsewhere, and prove it."""

    example: ClassVar[str] = "imgtool export deblur --to onnx"


class Bench(common.Bench):
    """Measure the deblurring network beside the original and an unsharp mask."""

    example: ClassVar[str] = "imgtool bench deblur --data GoPro/test"
    height: int = setting(1080, "Height of the timed picture.", panel="Measurement", ge=16)
    width: int = setting(1920, "Width of the timed picture.", panel="Measurement", ge=16)
    large: bool = setting(
        True, "Also measure the memory that a photo of 6000x4000 takes.", panel="Measurement"
    )
    photos: Path | None = setting(
        None,
        "Folder of sharp photos that must stay sharp, and on which tiling is checked.",
        panel="Measurement",
    )


class Synth(Severity, common.Data):
    """Write blurred and sharp pairs made from sharp photographs."""

    example: ClassVar[str] = "imgtool data synth deblur ~/Pictures -o pairs --count 500"
    photos: tuple[Path, ...] = setting(..., "Folders of sharp photographs.", panel="Data", argument=True)
    out: Path = setting(
        ..., "Folder for blur/, sharp/, samples.jsonl and preview.png.", panel="Data", short="-o"
    )
    count: int = setting(100, "Pairs to write.", panel="Data", ge=1)
    crop: int = setting(512, "Edge of a pair, in pixels.", panel="Data", ge=32, le=4096)
    seed: int = setting(0, "Seed: the same seed writes the same pairs.", panel="Data", ge=0)


class Average(common.Data):
    """Write blurred and sharp pairs by averaging runs of sharp high-speed frames."""

    example: ClassVar[str] = "imgtool data average deblur frames/ -o pairs --shortest 7 --longest 13"
    frames: tuple[Path, ...] = setting(
        ..., "Folders of consecutive sharp frames, in the order of their names.", panel="Data", argument=True
    )
    out: Path = setting(..., "Folder for blur/, sharp/ and samples.jsonl.", panel="Data", short="-o")
    shortest: int = setting(
        7, "Fewest frames averaged (odd counts have a sharp centre frame).", panel="Data", ge=3
    )
    longest: int = setting(13, "Most frames averaged.", panel="Data", ge=3)
    gamma: float = setting(
        2.2,
        "Exponent that makes the frames linear before averaging; 1 averages as they are.",
        panel="Data",
        ge=1,
        le=4,
    )
    stride: int = setting(7, "Frames from one pair to the next.", panel="Data", ge=1)


class Check(common.Data):
    """Check a folder of pairs: missing partners, sizes that differ, unreadable files, blur measured."""

    example: ClassVar[str] = "imgtool data check deblur GoPro/train"
    folder: Path = setting(..., "Folder of pairs.", panel="Data", argument=True)
    blur_folder: Literal["blur", "blur_gamma"] = setting(
        "blur", "Which of GoPro's blurred folders to take.", panel="Data"
    )


ACTIONS: Mapping[str, type[common.Data]] = {"synth": Synth, "average": Average, "check": Check}
"""The actions of ``imgtool data`` that this engine has."""
