"""Settings of the filter engine: only what differs from the common ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from imgtool import settings as common
from imgtool.settings import DATA, FILES, MEASUREMENT, MODEL, NETWORK, TRAINING, Settings, setting

TARGET = (
    "Filter to imitate, with parameters as in bilateral:d=5; pairs:DIR (input/ beside output/); or a Python "
    "function, module:function or file.py:function, from (H, W, 3) uint8 RGB to (H, W) or (H, W, 3)."
)


class Model(Settings):
    """What shapes the network, and what it imitates."""

    target: str = setting("sobel_3", TARGET, panel=MODEL)
    arch: Literal["fold", "pooled", "unshuffle", "dilated", "clapp"] = setting(
        "fold",
        "Network: fold (convolutions alone), pooled (with context from a smaller picture), unshuffle (at a "
        "fraction of the size), dilated (of large reach), clapp (the original).",
        panel=MODEL,
    )
    width: int = setting(8, "Channels of the layers.", panel=MODEL, ge=1, le=256)
    depth: int = setting(4, "Convolutions of 3x3; of pooled, those at full size.", panel=MODEL, ge=1, le=16)
    factor: int = setting(
        4,
        "pooled, unshuffle: how much smaller the picture is that context comes from.",
        panel=MODEL,
        ge=2,
        le=8,
    )
    context: int = setting(
        24, "pooled: channels of the layers at the smaller size.", panel=MODEL, ge=1, le=256
    )
    carried: int = setting(
        8, "pooled: channels that the smaller picture hands to the full size.", panel=MODEL, ge=1, le=64
    )
    dilations: str = setting(
        "",
        "Dilations of the layers at the smaller size, or of dilated, as 1,2,4 [default: 1,1,1,1; dilated "
        "1,2,4,8,16,1].",
        panel=MODEL,
    )
    activation: Literal["gelu", "relu", "leaky-relu", "silu", "tanh"] = setting(
        "gelu", "clapp: activation.", panel=MODEL
    )
    kernel: int = setting(3, "clapp: edge of the kernels, odd.", panel=MODEL, ge=1, le=15)
    flip: bool = setting(True, "clapp: normalise before the convolution, not after it.", panel=MODEL)
    rezero: bool = setting(True, "clapp: a learned factor per channel on each block.", panel=MODEL)
    reskip: bool = setting(True, "clapp: a learned factor per channel on each block's skip.", panel=MODEL)
    arithmetic: Literal["float", "int8"] = setting(
        "float",
        "int8: weights and activations in 8 bits, as a quantised network computes.",
        panel=MODEL,
    )
    channels: Literal["auto", "1", "3"] = setting(
        "auto", "Colours of the output of pairs and functions: 1 (grey) or 3; auto is 3.", panel=MODEL
    )


class Stream(Settings):
    """Photographs from a stream, through a buffer that is drawn from again and again."""

    stream: str = setting(
        "",
        "Stream of photographs: the name of a Hugging Face data set, as imagenet-1k (name:configuration), "
        "or files, folders, globs or URLs ({000..012}) of .parquet or WebDataset .tar shards (extra hf).",
        panel=DATA,
    )
    stream_split: str = setting("train", "Split of the data set to stream.", panel=DATA)
    stream_column: str = setting(
        "", "Column of the pictures [default: the first that holds any].", panel=DATA
    )
    buffer_min: int = setting(
        200, "Pictures in the buffers of all workers before training begins.", panel=DATA, ge=1
    )
    buffer_max: int = setting(800, "Most pictures in the buffers; the oldest go first.", panel=DATA, ge=1)
    buffer_delay: float = setting(
        0.0, "Seconds to wait between two pictures once the buffer is full.", panel=DATA, ge=0
    )


class Train(Model, Stream, common.Train):
    """Train a network to imitate a filter."""

    example: ClassVar[str] = "imgtool train filter --photos ~/Pictures --target bilateral -o runs/bilateral"
    photos: tuple[Path, ...] = setting((), "Folders of photographs.", panel=DATA)
    synthetic: float = setting(
        0.0,
        "Share of samples from drawn pictures: dead leaves, gradients, text, noise.",
        panel=DATA,
        ge=0,
        le=1,
    )
    validate_on: tuple[Path, ...] = setting(
        (), "Folders of photos to validate on [default: a part of the training data].", panel=DATA
    )
    crop: int = setting(64, "Edge of the square training crops, in pixels.", panel=DATA, ge=16, le=4096)
    held_out: int = setting(
        32, "Validation crops, fixed, from photos that are not trained on.", panel=DATA, ge=1
    )
    stages: int = setting(
        1,
        "Progressive resolution: equal parts of the run; in each next one crops double and batches halve.",
        panel=TRAINING,
        ge=1,
        le=6,
    )
    prune: common.Place = setting(
        "",
        "Weights of a wider network of the same kind: begin with its most important channels.",
        panel=TRAINING,
    )
    steps: int = setting(10_000, "Optimiser steps in all.", panel=TRAINING, ge=1)
    optimiser: Literal["adamw", "soap"] = setting(
        "soap",
        "soap, Adam in the basis of the gradients' covariances; or adamw.",
        panel=TRAINING,
    )
    batch: int = setting(8, "Samples per step.", panel=TRAINING, ge=1)
    lr: float = setting(4e-3, "Peak learning rate.", panel=TRAINING, gt=0)
    warmup: int = setting(100, "Steps over which the rate rises from zero.", panel=TRAINING, ge=0)
    weight_decay: float = setting(0.0, "Weight decay, decoupled.", panel=TRAINING, ge=0)
    ema: float = setting(
        0.998, "Decay of the averaged weights that are validated and kept.", panel=TRAINING, ge=0, lt=1
    )
    loss: Literal["l1", "l2", "log-cosh", "all", "relative-mse"] = setting(
        "l1",
        "l1, l2, log-cosh, all (their sum, as the original has it), or relative-mse (squared error as a "
        "share of what doing nothing leaves).",
        panel=TRAINING,
    )
    stop_below: float = setting(
        0.0,
        "Stop when the smoothed l2 of the held-out crops falls below this, in the last stage; 0 never does.",
        panel=TRAINING,
        ge=0,
    )


class Infer(common.Infer):
    """Filter photos."""

    example: ClassVar[str] = "imgtool infer filter photo.jpg --target bilateral -o smooth.jpg --compare"
    target: str = setting(
        "",
        "Filter: takes the shipped weights that imitate it; with --weights, what these must imitate.",
        panel=NETWORK,
        served=True,
    )
    compare: bool = setting(
        False,
        "Also write a sheet with the photo, the network's result and the classical filter's, "
        "<output>-compare.png.",
        panel=FILES,
    )
    tile: int | None = setting(
        None,
        "Edge of a tile in pixels; 0 takes the photo whole [default: from --memory].",
        panel=NETWORK,
        ge=0,
        le=65536,
    )
    memory: float = setting(
        0.5,
        "Resident memory that the network's arithmetic may take, in GB: sets the tile.",
        panel=NETWORK,
        gt=0,
    )


class Export(common.Export):
    """Write a network as a file that runs elsewhere, and prove it."""

    example: ClassVar[str] = "imgtool export filter --weights tv --to onnx"


class Bench(common.Bench):
    """Measure networks beside the filters that they imitate: error, and time per megapixel."""

    example: ClassVar[str] = "imgtool bench filter --photos held-out/ --report bench/"
    target: tuple[str, ...] = setting(
        (), "Filters to measure [default: all that shipped weights imitate].", panel=MEASUREMENT
    )
    photos: Path | None = setting(
        None, "Folder of photos that were not trained on [default: the time alone].", panel=MEASUREMENT
    )
    megapixels: float = setting(1.0, "Size of the timed picture.", panel=MEASUREMENT, gt=0.01, le=64)
    variants: bool = setting(
        False, "Also measure int8 arithmetic and half-precision weights.", panel=MEASUREMENT
    )


class Synth(common.Data):
    """Write pairs: photos, and what a filter makes of them."""

    example: ClassVar[str] = "imgtool data synth filter ~/Pictures -o pairs --target weighted_median"
    photos: tuple[Path, ...] = setting(..., "Folders of photographs.", panel=DATA, argument=True)
    out: Path = setting(..., "Folder for input/, output/ and preview.png.", panel=DATA, short="-o")
    target: str = setting("sobel_3", TARGET, panel=DATA)
    count: int = setting(0, "Pairs to write; 0 is one for each photo.", panel=DATA, ge=0)


class Check(common.Data):
    """Check a folder of pairs: missing partners, sizes that differ, unreadable files."""

    example: ClassVar[str] = "imgtool data check filter pairs"
    folder: Path = setting(..., "Folder of pairs.", panel=DATA, argument=True)


class Targets(common.Data):
    """List the filters that can be imitated, with their parameters."""

    example: ClassVar[str] = "imgtool data targets filter"


ACTIONS: Mapping[str, type[common.Data]] = {"synth": Synth, "check": Check, "targets": Targets}
"""The actions of ``imgtool data`` that this engine has."""
