"""Settings of the awb engine: only what differs from the common ones."""

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
    OUTPUT,
    SEARCH,
    TRAINING,
    Settings,
    setting,
)

Method = Literal["net", "bayes", "grey-world", "white-patch", "shades-of-grey", "grey-edge", "grayness-index"]
"""How the white of a scene is found; all but "net" are free of training."""

Fallback = Literal[
    "none", "bayes", "grey-world", "white-patch", "shades-of-grey", "grey-edge", "grayness-index"
]

Format = Literal["onnx", "tflite", "pt2", "openvino", "npz", "libcamera", "azure-function", "docker"]
"""What the engine is exported as."""

SURE = 0.2
"""Least confidence of the network with which it is believed."""


class Model(Settings):
    """What shapes the network."""

    arch: Literal["hist", "deepawb"] = setting(
        "hist",
        "Network: hist (log-chroma histograms, tiny) or deepawb (the original: convolutions and an MLP).",
        panel=MODEL,
    )
    channels: str = setting("32,64,128", "deepawb: channels of the three blocks.", panel=MODEL)
    kernels: str = setting("3,5,5", "deepawb: kernel sizes of the three blocks.", panel=MODEL)
    strides: str = setting("1,2,2", "deepawb: strides of the three blocks.", panel=MODEL)
    neurons: int = setting(
        200, "deepawb: neurons of the MLP in all of its hidden layers.", panel=MODEL, ge=4, le=4096
    )
    decay: float = setting(
        0.5, "deepawb: how fast the hidden layers narrow: exp(-decay x layer).", panel=MODEL, ge=0, le=4
    )
    layers: int = setting(4, "deepawb: hidden layers of the MLP.", panel=MODEL, ge=1, le=8)
    height: int = setting(288, "deepawb: rows of its input.", panel=MODEL, ge=16, le=2048)
    width: int = setting(432, "deepawb: columns of its input.", panel=MODEL, ge=16, le=2048)


class Sources(Settings):
    """How frames are read."""

    tuning: Path | None = setting(
        None,
        "libcamera tuning file, or a folder of them by sensor [default: tunings/ beside the frames].",
        panel=DATA,
    )
    black: float = setting(
        -1.0, "Black level of linear PNG and TIFF frames; -1 takes what the data set is known for, or 0.",
        panel=DATA, ge=-1, served=True,
    )  # fmt: skip
    white: float = setting(
        -1.0, "Their white level; -1 takes what the frame and its bits say.", panel=DATA, ge=-1, served=True
    )
    mask: str = setting(
        "auto",
        "What does not count: auto (Cube++'s cube where the data set is Cube++, else pixels that are zero), "
        "none, cube, or x,y,w,h in pixels: of a RAW file's mosaic as it lies, of a photo upright.",
        panel=DATA,
        served=True,
    )
    domain: Literal["auto", "raw", "srgb"] = setting(
        "auto",
        "What frames are: raw (linear, the camera's colours), srgb (rendered photos), or auto (camera RAW, "
        "statistics and 16-bit PNG that say nothing of how they are shown are raw, other photos srgb).",
        panel=DATA,
        served=True,
    )


class Train(Model, Sources, common.Train):
    """Train a white balance network on frames with known white, or on photographs relit."""

    example: ClassVar[str] = "imgtool train awb --data awb_nn --folds 7 -o runs/awb"
    data: tuple[Path, ...] = setting(
        (),
        "Folders with known white: Raspberry Pi statistics, Cube++, SimpleCube++, or what data synth writes.",
        panel=DATA,
    )
    photos: tuple[Path, ...] = setting(
        (), "Folders of photographs, RAW files or HDR panoramas to relight on the fly.", panel=DATA
    )
    synthetic: float = setting(
        0.1, "Share of samples that are relit photographs, where there are both.", panel=DATA, ge=0, le=1
    )
    relight: float = setting(
        0.3, "Share of real samples that get another light of the camera's locus.", panel=DATA, ge=0, le=1
    )
    strange: float = setting(
        0.15,
        "Share of real samples relit off the curve, as for a camera of which only the colour matrix is "
        "known, or nothing.",
        panel=DATA,
        ge=0,
        le=1,
    )
    group: Literal["photographer", "camera", "none"] = setting(
        "photographer", "What a split keeps together: photographer (or day), camera, or none.", panel=DATA
    )
    held_out: int = setting(
        64, "Validation samples, fixed, where there are only photographs.", panel=DATA, ge=1
    )
    folds: int = setting(
        0, "Grouped cross-validation with this many folds, then one training on all frames; 0 only trains.",
        panel=DATA, ge=0, le=64,
    )  # fmt: skip
    fold: int = setting(
        -1, "Hold this fold out, counted from 0; -1 holds out one group in about twenty.", panel=DATA, ge=-1
    )
    train_on_all: bool = setting(
        False, "Hold nothing out: scores are then those of the training data.", panel=DATA
    )
    steps: int = setting(1200, "Optimiser steps in all.", panel=TRAINING, ge=1)
    batch: int = setting(32, "Samples per step.", panel=TRAINING, ge=1)
    epoch_steps: int = setting(250, "Steps between validations: one epoch.", panel=TRAINING, ge=1)
    lr: float = setting(3e-3, "Peak learning rate.", panel=TRAINING, gt=0)
    weight_decay: float = setting(1e-3, "AdamW weight decay.", panel=TRAINING, ge=0)
    ema: float = setting(
        0.995, "Decay of the averaged weights that are validated and kept.", panel=TRAINING, ge=0, lt=1
    )
    loss: Literal["angular", "mse"] = setting(
        "angular",
        "angular: recovery and reproduction error and the likelihood; mse: the original's, on R/G and B/G.",
        panel=TRAINING,
    )
    density: float = setting(
        0.5,
        "Exponent of the density weights (1 / KDE of the white points, 0.1 to 15): 1 the original's, 0 off.",
        panel=TRAINING, ge=0, le=1,
    )  # fmt: skip
    max_ms: float = setting(
        10.0, "Search: CPU time of a frame at most, p95, measured before a network is trained.",
        panel=SEARCH, gt=0,
    )  # fmt: skip
    max_mb: float = setting(
        100.0, "Search: memory of the whole process at most, measured.", panel=SEARCH, gt=0
    )
    remote: str = setting("", "Search: measure on this host, by the system's ssh: [user@]host.", panel=SEARCH)


class Infer(Sources, common.Infer):
    """Find the gains of red and blue; write the corrected picture where -o names one."""

    example: ClassVar[str] = "imgtool infer awb IMG_1.DNG --json"
    method: Method = setting("net", "How the white is found.", panel=NETWORK, served=True)
    runtime: Literal["numpy", "onnx", "tflite", "torch"] = setting(
        "numpy",
        "What runs the network; tflite needs imgtool[tflite-runtime].",
        panel=NETWORK,
    )
    fallback: Fallback = setting(
        "shades-of-grey",
        "Method that answers where the network is not sure and for rendered photos, and is averaged with it "
        "where the camera is unknown.",
        panel=NETWORK,
        served=True,
    )
    sure: float = setting(
        SURE, "Least confidence with which the network is believed.", panel=NETWORK, ge=0, le=1, served=True
    )
    lux: float = setting(
        -1.0, "Scene illuminance in lux; -1 takes what the frame says.", panel=NETWORK, ge=-1, served=True
    )
    ct_range: str = setting(
        "auto",
        "Colour temperatures that bayes searches: a mode of the tuning (auto, daylight, tungsten, ...) or "
        "LOW,HIGH in kelvin.",
        panel=NETWORK,
        served=True,
    )
    export: str = setting(
        "",
        "Also write files beside the output, or the input: json, xmp, libcamera, separated by commas.",
        panel=FILES,
    )
    compare_methods: bool = setting(
        False, "Also write <output>-methods.png: the picture as each method corrects it.", panel=OUTPUT
    )


class Export(common.Export):
    """Write a network as a file that runs elsewhere, and prove it."""

    example: ClassVar[str] = "imgtool export awb --to tflite"
    to: Format = setting(  # type: ignore[assignment]
        ...,
        "What is written: a model file, a NumPy archive, the model and tuning of libcamera's rpi.nn.awb, or "
        "a folder that serves the engine over HTTP.",
        panel=OUTPUT,
    )
    tuning: Path | None = setting(
        None, "libcamera: tuning file of the sensor that the model is for, such as imx477.json.", panel=DATA
    )


class Bench(Sources, common.Bench):
    """Measure CPU time and memory against limits, and all methods' errors where white is known."""

    example: ClassVar[str] = "imgtool bench awb --max-ms 10 --max-mb 100"
    max_ms: float = setting(
        10.0, "CPU time of a frame in memory at most, p95, in ms.", panel=MEASUREMENT, gt=0
    )
    max_mb: float = setting(
        100.0, "Peak resident memory of the whole process at most, in 10^6 bytes.", panel=MEASUREMENT, gt=0
    )
    frames: int = setting(300, "Timed calls per run.", panel=MEASUREMENT, ge=20)
    runtimes: str = setting(
        "numpy,onnx,tflite,torch", "Runtimes to measure, the default one always.", panel=MEASUREMENT
    )
    megapixels: int = setting(
        24, "Size of the RAW file that is measured; 0 measures none.", panel=MEASUREMENT, ge=0, le=200
    )
    original: bool = setting(True, "Also measure the original's network at its own size.", panel=MEASUREMENT)
    methods: str = setting(
        "net,default,bayes,grey-world,white-patch,shades-of-grey,grey-edge,grayness-index",
        "Methods whose errors are measured on --data.",
        panel=MEASUREMENT,
    )


class Synth(common.Data):
    """Relight photographs: write raw frames of imagined cameras with the white of their light."""

    example: ClassVar[str] = "imgtool data synth awb ~/Pictures -o relit --count 500"
    photos: tuple[Path, ...] = setting(
        ..., "Photographs, RAW files or HDR panoramas.", panel=DATA, argument=True
    )
    out: Path = setting(
        ..., "Folder for NNNNN.png (16-bit linear), gt.csv and preview.png.", panel=DATA, short="-o"
    )
    count: int = setting(100, "Frames to write.", panel=DATA, ge=1)
    seed: int = setting(0, "Seed: the same seed writes the same frames.", panel=DATA, ge=0)
    tuning: Path | None = setting(
        None, "Take this camera, from a libcamera tuning file, instead of imagined ones.", panel=DATA
    )


class Check(Sources, common.Data):
    """Check a folder of frames with known white: every fault, in one list."""

    example: ClassVar[str] = "imgtool data check awb SimpleCube++/train"
    folder: Path = setting(..., "Folder of a data set.", panel=DATA, argument=True)


class Stats(Sources, common.Data):
    """Draw the distribution of gains and the curve of white points of a data set."""

    example: ClassVar[str] = "imgtool data stats awb awb_nn -o stats"
    folder: Path = setting(..., "Folder of a data set.", panel=DATA, argument=True)
    out: Path | None = setting(
        None, "Folder for the plots and ct_curve.json [default: FOLDER/stats].", panel=DATA, short="-o"
    )


ACTIONS: Mapping[str, type[common.Data]] = {"synth": Synth, "check": Check, "stats": Stats}
"""The actions of ``imgtool data`` that this engine has."""
