"""Settings of the lens engine: only what differs from the common ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from imgtool import settings as common
from imgtool.settings import Place, Settings, setting

RISK = 0.03
"""Largest probability of harm with which a photo is still changed."""


class Model(Settings):
    """What shapes the network."""

    arch: Literal["lines", "efficientnet-b0"] = setting(
        "lines",
        "Network: lines (weighs the edges of a photo, tiny) or efficientnet-b0 (looks at its pixels).",
        panel="Model",
    )
    head: Literal["field", "original"] = setting(
        "field",
        "Head of efficientnet-b0: field (displacements at half and full radius, cannot fold) or original "
        "(512, 128, 4, tanh).",
        panel="Model",
    )
    input: int = setting(
        224, "Edge of what efficientnet-b0 sees, in pixels.", panel="Model", ge=64, le=1024, multiple_of=32
    )


class Synthesis(Settings):
    """How straight photographs are distorted."""

    prior: Literal["photo", "mixed", "wide"] = setting(
        "mixed",
        "Distribution of the distortion: photo (lenses of cameras), mixed (also action and machine cameras) "
        "or wide (lenses below 35 mm).",
        panel="Data",
    )
    untouched: float = setting(
        0.2, "Share of samples that are not distorted, so that straight photos stay straight.",
        panel="Data", ge=0, le=1,
    )  # fmt: skip
    decentred: float = setting(0.002, "Standard deviation of p1 and p2.", panel="Data", ge=0, le=0.02)
    noisy: float = setting(
        0.5, "Share of samples that get noise, a little blur and JPEG.", panel="Data", ge=0, le=1
    )


class Train(Model, Synthesis, common.Train):
    """Train a lens estimator on straight photographs distorted on the fly, or on pairs."""

    example: ClassVar[str] = "imgtool train lens --photos ~/Pictures -o runs/mine"
    photos: tuple[Path, ...] = setting(
        (), "Folders of straight photographs; they are distorted on the fly.", panel="Data"
    )
    pairs: tuple[Path, ...] = setting(
        (), "Folders of <id>_original.jpg (distorted) and <id>_generated.jpg (straight).", panel="Data"
    )
    validate_on: tuple[Path, ...] = setting(
        (), "Folders of photos to validate on [default: a part of the training data].", panel="Data"
    )
    held_out: int = setting(
        64, "Validation samples, fixed, from photos that are not trained on.", panel="Data", ge=1
    )
    loss: Literal["field", "photo", "both"] = setting(
        "field",
        "field: the displacement field (lines: its likelihood); photo: as the original, 0.8 (1 - SSIM) + "
        "0.2 L1 of the straightened photo; both: their sum.",
        panel="Training",
    )
    photo_size: int = setting(
        384, "Longer side of the photos that the loss photo compares, in pixels.",
        panel="Training", ge=64, le=2048, multiple_of=32,
    )  # fmt: skip
    backbone: Place = setting(
        "auto",
        "Weights of EfficientNet-B0 to begin with: auto (ImageNet's if torchvision has them already), "
        "imagenet (downloaded where need be), none, or a file.",
        panel="Training",
    )


class Infer(common.Infer):
    """Straighten photos."""

    example: ClassVar[str] = "imgtool infer lens photo.jpg -o straight.jpg --compare"
    estimator: Literal["auto", "net", "lines", "profile", "none"] = setting(
        "auto",
        "auto: the lens profile where there is one, else the network; net; lines (edges with fixed weights); "
        "profile (lensfun, needs imgtool[lensfun]); none.",
        panel="Network",
        served=True,
    )
    risk: float = setting(
        RISK,
        "Largest probability of doing harm with which a photo is still changed, six times that where much is "
        "won; 1 corrects whatever is found.",
        panel="Network", ge=0, le=1, served=True,
    )  # fmt: skip
    group: Literal["none", "exif", "folder"] = setting(
        "none",
        "Photos solved together: exif (same camera, lens, focal length and size), folder (same folder and "
        "size) or none.",
        panel="Network",
    )
    coeffs: Place = setting(
        "",
        "Coefficients instead of an estimate: k1,k2,p1,p2, or a file (OpenCV, lensfun, LCP, JSON, CSV).",
        panel="Network",
    )
    normalisation: Literal["half-diagonal", "original"] = setting(
        "half-diagonal",
        "What k1,k2,p1,p2 of --coeffs are relative to: half of the diagonal, or width and height (original).",
        panel="Network",
        served=True,
    )
    strength: float = setting(
        1.0, "Share of the correction that is applied.", panel="Network", ge=0, le=1, served=True
    )
    crop: Literal["fill", "keep", "same"] = setting(
        "fill",
        "fill: zoom until no border shows; keep: zoom until nothing is lost; same: do not zoom.",
        panel="Output",
        served=True,
    )
    border: Literal["black", "replicate", "reflect", "transparent"] = setting(
        "black", "What is shown where the photo has nothing.", panel="Output", served=True
    )
    interpolation: Literal["linear", "cubic", "lanczos"] = setting(
        "cubic", "How pixels are interpolated.", panel="Output", served=True
    )
    export: str = setting(
        "",
        "Also write coefficient files beside the output: opencv, lensfun, lcp, json, separated by commas.",
        panel="Input and output",
    )


class Export(common.Export):
    """Write a network as a file that runs elsewhere, and prove it."""

    example: ClassVar[str] = "imgtool export lens --to onnx"


class Bench(common.Bench):
    """Measure the lens engine: accuracy beside doing nothing, harm, and the cost of applying."""

    example: ClassVar[str] = "imgtool bench lens --photos sharp/ --data boards/"
    photos: Path | None = setting(
        None, "Folder of straight photos that were not trained on; they are distorted.", panel="Measurement"
    )
    prior: Literal["photo", "mixed", "wide"] = setting(
        "photo", "Distribution of that distortion.", panel="Measurement"
    )
    count: int = setting(200, "Distorted photos to measure on.", panel="Measurement", ge=1)
    large: bool = setting(True, "Also time 6000x4000 beside cv2.undistort.", panel="Measurement")


class Synth(Synthesis, common.Data):
    """Write pairs of distorted and straight photos with their coefficients."""

    example: ClassVar[str] = "imgtool data synth lens ~/Pictures -o pairs --count 500"
    photos: tuple[Path, ...] = setting(..., "Folders of straight photographs.", panel="Data", argument=True)
    out: Path = setting(
        ...,
        "Folder for <id>_original.jpg, <id>_generated.jpg, labels.jsonl and preview.png.",
        panel="Data", short="-o",
    )  # fmt: skip
    count: int = setting(100, "Pairs to write.", panel="Data", ge=1)
    size: int = setting(1024, "Longer side of a pair at most, in pixels.", panel="Data", ge=64, le=16384)
    seed: int = setting(0, "Seed: the same seed writes the same pairs.", panel="Data", ge=0)


class Check(common.Data):
    """Check a folder of pairs: missing partners, sizes that differ, unreadable files, labels that fold."""

    example: ClassVar[str] = "imgtool data check lens pairs"
    folder: Path = setting(..., "Folder of pairs.", panel="Data", argument=True)


class Stats(common.Data):
    """Draw the distributions of a folder's coefficients beside those of real lenses."""

    example: ClassVar[str] = "imgtool data stats lens pairs -o stats"
    folder: Path = setting(..., "Folder with labels.jsonl or coefficients.csv.", panel="Data", argument=True)
    out: Path | None = setting(
        None, "Folder for the plots [default: FOLDER/stats].", panel="Data", short="-o"
    )


class Calibrate(common.Data):
    """Calibrate a camera from photos of a chessboard."""

    example: ClassVar[str] = "imgtool data calibrate lens boards/ --pattern 9x6 -o camera"
    boards: tuple[Place, ...] = setting(
        ..., "Photos of a chessboard, folders or globs.", panel="Data", argument=True
    )
    out: Path = setting(
        ..., "Folder for camera.yml, camera.json, labels.jsonl and corners.png.", panel="Data", short="-o"
    )
    pattern: str = setting("9x6", "Inner corners of the board, COLUMNSxROWS.", panel="Data")
    square: float = setting(1.0, "Edge of a square, in the unit that you like.", panel="Data", gt=0)


ACTIONS: Mapping[str, type[common.Data]] = {
    "synth": Synth, "check": Check, "stats": Stats, "calibrate": Calibrate,
}  # fmt: skip
"""The actions of ``imgtool data`` that this engine has."""
