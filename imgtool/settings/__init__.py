"""Settings: one declaration each, from which come flag, help, TOML key, record and argument.

A setting is a field of a frozen pydantic model, with its default, its limits and the sentence that
help shows; ``imgtool.settings.sources`` tells where its value comes from.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator
from pydantic.fields import FieldInfo

from imgtool import names

VERBS: Mapping[str, str] = {
    "train": "Train a network.",
    "infer": "Run a network over photos.",
    "export": "Write a network as a file that runs elsewhere, and prove it.",
    "bench": "Measure speed, memory and quality.",
    "data": "Make or check training data.",
}
"""The verbs and what help says of them; each is a module of the same name."""

FILES = "Input and output"
OUTPUT = "Output"
NETWORK = "Network"
MODEL = "Model"
DATA = "Data"
MEASUREMENT = "Measurement"
SERVICE = "Service"
TRAINING = "Training"
SEARCH = "Search"
TRACKING = "Tracking"
RUN = "Run"
PANELS = (FILES, OUTPUT, DATA, MEASUREMENT, NETWORK, SERVICE, MODEL, TRAINING, SEARCH, TRACKING, RUN)
"""The headings of help, in the order in which it shows them."""

Place = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path or pattern that may begin with ``~``, or a plain word."""


def setting(
    default: Any,
    help: str,
    *,
    panel: str = RUN,
    short: str = "",
    argument: bool = False,
    served: bool = False,
    **limits: Any,
) -> Any:
    """Declare a setting.

    Args:
        default: Value when nothing says otherwise; ``...`` makes it required.
        help: The sentence that ``--help`` shows. It may end in "[default: ...]" where the default
            is found out at run time.
        panel: Heading under which help lists it. Those under "Model" shape the network and are
            taken from the checkpoint when one is loaded.
        short: One-letter flag such as "-o"; or the word of the flag, where it is not the setting's name.
        argument: True for a positional argument.
        served: Whether a request to a service may give it: of one photo, and none that names a file, a
            device, or memory.
        limits: Any constraint of ``pydantic.Field``: ge, gt, le, lt, multiple_of.
    """
    extra: dict[str, Any] = {"panel": panel, "short": short, "argument": argument, "served": served}
    return Field(default=default, description=help, json_schema_extra=extra, **limits)


def declared(info: FieldInfo) -> dict[str, Any]:
    """Return what ``setting`` was told beside default, help and limits: panel, short, argument, served."""
    extra = info.json_schema_extra
    usual = {"panel": RUN, "short": "", "argument": False, "served": False}
    return usual | (extra if isinstance(extra, dict) else {})


def flag(name: str, info: FieldInfo) -> str:
    """Return what is typed for a setting that is no argument: "--out"."""
    short: str = declared(info)["short"]
    return short if short.startswith("--") else "--" + name.replace("_", "-")


def _at_home(value: Any) -> Any:
    return Path(os.path.expanduser(value)) if isinstance(value, Path) else value


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown names, usable from Python as keyword arguments."""

    # A validator is built when its class is first used, not for every class of the package: it takes memory.
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, defer_build=True
    )
    example: ClassVar[str] = ""

    @field_validator("*", mode="after")
    @classmethod
    def _expand_home(cls, value: Any) -> Any:
        """Expand ``~`` in paths: TOML files and ``--flag=~/x`` do not pass through a shell's hands."""
        return tuple(_at_home(each) for each in value) if isinstance(value, tuple) else _at_home(value)

    @property
    def elsewhere(self) -> bool:
        """Whether any setting is a URL."""
        values = (getattr(self, name) for name in type(self).model_fields)
        return any(
            names.is_url(each)
            for value in values
            for each in (value if isinstance(value, tuple) else (value,))
        )

    def changed(self, **values: Any) -> Self:
        """Return a copy with some values replaced, validated again."""
        return type(self).model_validate(self.model_dump() | values)


class Common(Settings):
    """What every verb takes."""

    device: str = setting("auto", "Where to compute: auto, cpu, cuda, cuda:1, mps.")
    threads: int = setting(0, "CPU threads; 0 takes all cores.", ge=0, le=1024)


class Train(Common):
    """Train a network."""

    out: Path | None = setting(None, "Run folder [default: runs/<engine>/<date-time>].", short="-o")
    resume: Path | None = setting(None, "Run folder to go on with, exactly where it stopped.")
    seed: int = setting(0, "Seed of weights, data and augmentation.", ge=0)
    workers: int = setting(1, "Processes that prepare data; 0 prepares it in the main one.", ge=0, le=256)
    runs: int = setting(
        1,
        "Repeat the run with the seeds --seed, --seed + 1, ...; draws the loss with its confidence interval.",
        ge=1,
        le=100,
    )
    parallel: int = setting(
        1,
        "Of --runs or --search, how many at a time, each in a process with its share of the threads.",
        ge=1,
        le=100,
    )
    sample_every: int = setting(
        0, "Steps between further sheets of samples; 0 draws one at each validation alone.", ge=0
    )
    search: int = setting(
        0, "Train N times with settings chosen from a search space (needs imgtool[search]); 0: none.",
        panel=SEARCH, ge=0,
    )  # fmt: skip
    space: Path | None = setting(
        None, "TOML file of the search space, [search.<engine>] [default: the engine's own].", panel=SEARCH
    )
    sampler: Literal["", "optuna", "ax"] = setting(
        "", "Who proposes settings; ax needs imgtool[search-ax] [default: optuna, of awb ax].", panel=SEARCH
    )
    max_ms: float = setting(
        0.0,
        "CPU time of a network at most, measured before it is trained, in ms, of one thread and one input: a "
        "picture of 512x512, for awb a frame; 0: any.",
        panel=SEARCH,
        ge=0,
    )
    max_mb: float = setting(
        0.0, "Memory of the process that does so at most, measured, in 10^6 bytes; 0: any.",
        panel=SEARCH, ge=0,
    )  # fmt: skip
    max_parameters: int = setting(0, "Parameters of a network at most; 0: any.", panel=SEARCH, ge=0)
    track: Literal["", "none", "tensorboard", "mlflow", "wandb"] = setting(
        "",
        "Also record the run there, by imgtool[tensorboard], imgtool[mlflow] or imgtool[wandb]; none: "
        "nowhere [default: none, of a resumed run as it was].",
        panel=TRACKING,
    )
    track_to: Place = setting(
        "",
        "Where to: MLflow's server or store, the folder of the others [default: MLFLOW_TRACKING_URI, else "
        "sqlite:///runs/mlflow.db; of wandb runs/, of tensorboard the run folder].",
        panel=TRACKING,
    )
    experiment: str = setting(
        "", "Name under which runs are gathered [default: imgtool-<engine>].", panel=TRACKING
    )
    register_as: str = setting(
        "",
        "mlflow, wandb: register the best network as a new version of the model of this name.",
        panel=TRACKING,
        short="--register",
    )
    steps: int = setting(20_000, "Optimiser steps in all.", panel=TRAINING, ge=1)
    batch: int = setting(
        16, "Samples per step, of all processes together where torchrun starts many.", panel=TRAINING, ge=1
    )
    epoch_steps: int = setting(500, "Steps between validations: one epoch.", panel=TRAINING, ge=1)
    optimiser: Literal["adamw", "soap"] = setting(
        "adamw",
        "adamw; or soap, Adam in the basis of the gradients' covariances: better steps for small networks.",
        panel=TRAINING,
    )
    lr: float = setting(3e-4, "Peak learning rate.", panel=TRAINING, gt=0)
    warmup: int = setting(200, "Steps over which the rate rises from zero.", panel=TRAINING, ge=0)
    final_lr: float = setting(
        0.01, "Rate at the last step as a share of the peak (cosine).", panel=TRAINING, ge=0, le=1
    )
    cycle: int = setting(
        0,
        "Steps of the first cosine cycle; each next one begins at the peak and is twice as long; 0 is one "
        "cosine over all steps.",
        panel=TRAINING,
        ge=0,
    )
    weight_decay: float = setting(1e-4, "Weight decay, decoupled.", panel=TRAINING, ge=0)
    clip: float = setting(1.0, "Largest norm of the gradient; 0 does not clip.", panel=TRAINING, ge=0)
    ema: float = setting(
        0.999, "Decay of the averaged weights that are validated and kept.", panel=TRAINING, ge=0, lt=1
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto",
        "Arithmetic of the forward pass; auto is bf16 or fp16 on a GPU, fp32 on a CPU.",
        panel=TRAINING,
    )
    compile: bool = setting(
        False, "Compile the network with torch.compile: pays on GPUs, in runs of hours.", panel=TRAINING
    )
    patience: int = setting(
        0,
        "Epochs without a better score before stopping, counted once nothing is left to unfreeze; 0 never "
        "stops early.",
        panel=TRAINING,
        ge=0,
    )
    max_bad_steps: int = setting(20, "Non-finite steps in a row that end the run.", panel=TRAINING, ge=1)
    save_every: int = setting(
        200, "Steps between saves of the state that --resume takes.", panel=TRAINING, ge=1
    )
    weights: Place = setting(
        "", "Weights to start from: a file or the name of shipped weights.", panel=TRAINING
    )
    freeze: str = setting("", "Prefix of the parameter names that stay fixed.", panel=TRAINING)
    unfreeze_epoch: int = setting(
        0,
        "Epoch, counted from 1 as in the log, from which on frozen parameters learn; 0 never.",
        panel=TRAINING,
        ge=0,
    )
    unfreeze_share: float = setting(
        1.0,
        "Share of the frozen parameter tensors that then learn, from the output end.",
        panel=TRAINING,
        gt=0,
        le=1,
    )
    unfreeze_lr: float = setting(0.1, "Their learning rate as a share of --lr.", panel=TRAINING, gt=0)
    frozen_norm: bool = setting(
        True,
        "Keep batch normalisation of the frozen part as it is, statistics and all, also when the rest of it "
        "learns.",
        panel=TRAINING,
    )


class Infer(Common):
    """Run a network over photos."""

    inputs: tuple[Place, ...] = setting(
        ..., "Photos, folders, globs, or - for standard input.", panel=FILES, argument=True, min_length=1
    )
    out: Place | None = setting(
        None,
        "File for one input, folder for many, - for standard output [default: beside the input].",
        panel=FILES,
        short="-o",
    )
    format: Literal["", "jpg", "png", "tif", "webp"] = setting(
        "", "File type of the output [default: that of the input or of -o].", panel=FILES, served=True
    )
    quality: int = setting(95, "Quality of JPEG and WebP output.", panel=FILES, ge=1, le=100, served=True)
    force: bool = setting(False, "Overwrite outputs that exist.", panel=FILES, short="-f")
    skip_existing: bool = setting(
        False, "Leave out inputs whose output exists: resumes a batch.", panel=FILES
    )
    fail_fast: bool = setting(False, "Stop at the first failure.", panel=FILES)
    compare: bool = setting(False, "Also write a before/after sheet, <output>-compare.png.", panel=FILES)
    side_by_side: bool = setting(
        False,
        "Also write <output>-side-by-side.jpg: before and after in one picture at full size.",
        panel=FILES,
    )
    report: Path | None = setting(
        None, "Write one page, DIR/index.html, with a before/after slider for every photo.", panel=FILES
    )
    zip: Path | None = setting(
        None,
        "Also write FILE, a zip archive of the outputs, side-by-sides and tables of the batch.",
        panel=FILES,
    )
    runner: Literal["", "processes", "ray"] = setting(
        "",
        "Spread the photos over processes of this machine, or over a Ray cluster (needs imgtool[ray]; "
        "RAY_ADDRESS names one) [default: one after the other here].",
    )
    workers: int = setting(
        0, "Of --runner, how many processes; 0: as many as cores, each with one thread.", ge=0, le=65536
    )
    shard: str | None = setting(
        None, "i/n: only part i, counted from 0, of n parts of the photos, as an array job gives out."
    )
    weights: Place = setting(
        "",
        "Weights: a file, also one that export wrote, or the name of shipped weights [default: the engine's "
        "own].",
        panel=NETWORK,
    )


class Bench(Common):
    """Measure speed, memory and quality."""

    threads: int = setting(1, "CPU threads of each subject; 0 takes all cores.", ge=0, le=1024)
    weights: Place = setting(
        "",
        "Weights: a file or the name of shipped weights [default: the engine's own].",
        panel=NETWORK,
    )
    data: Path | None = setting(None, "Folder of pairs on which quality is measured.", panel=MEASUREMENT)
    runs: int = setting(
        3, "Timed runs of each subject, interleaved; the fastest counts.", panel=MEASUREMENT, ge=1
    )
    report: Path | None = setting(None, "Write the figures and pictures into this folder.", panel=MEASUREMENT)


class Export(Settings):
    """Write a network as a file that runs elsewhere, and prove it."""

    threads: int = setting(0, "CPU threads; 0 takes all cores.", ge=0, le=1024)
    to: Literal["onnx", "tflite", "pt2", "openvino", "azure-function", "docker"] = setting(
        ..., "What is written: a model file, or a folder that serves the engine over HTTP.", panel=OUTPUT
    )
    out: Place | None = setting(
        None,
        "The file, or for azure-function and docker the folder [default: <weights>.<suffix> here].",
        panel=OUTPUT,
        short="-o",
    )
    force: bool = setting(False, "Overwrite files that exist.", panel=OUTPUT, short="-f")
    weights: Place = setting(
        "",
        "Weights: a file or the name of shipped weights [default: the engine's own].",
        panel=NETWORK,
    )
    size: str = setting(
        "", "Size that the file is fixed to, HEIGHTxWIDTH [default: free, else the engine's usual one].",
        panel=NETWORK,
    )  # fmt: skip
    dynamic: bool = setting(
        False, "Leave sizes free, or say why that cannot be; --size is then only the example.", panel=NETWORK
    )
    precision: Literal["fp32", "fp16", "int8"] = setting(
        "fp32", "Numbers in the file; inputs and outputs are float32 all the same.", panel=NETWORK
    )
    opset: int = setting(18, "ONNX: version of the operators.", panel=NETWORK, ge=18, le=23)
    gpu_safe: bool = setting(
        False, "TFLite: sub-pixel layers as transposed convolutions, which GPU delegates take.", panel=NETWORK
    )
    photos: tuple[Place, ...] = setting(
        (),
        "Photos, RAW files or folders of them to compare on and to calibrate 8 bits with [default: the few "
        "that ship].",
        panel=MEASUREMENT,
    )
    calibration: int = setting(
        32, "int8: inputs taken from --photos to find the ranges.", panel=MEASUREMENT, ge=1, le=4096
    )
    largest: str = setting(
        "1080x1920", "Largest picture at which a file of free size is compared too.", panel=MEASUREMENT
    )
    limit: float | None = setting(
        None,
        "Largest difference to torch in float64, as a share of the output's range; for int8 what the engine "
        "counts in, such as least dB [default: 1e-5, TFLite 1e-4, fp16 1/255].",
        panel=MEASUREMENT,
        gt=0,
    )
    auth: Literal["function", "anonymous", "admin"] = setting(
        "function", "azure-function: who may call it.", panel=SERVICE
    )
    max_mb: float = setting(25.0, "Largest request in 10^6 bytes.", panel=SERVICE, gt=0, le=1000)
    max_megapixels: float = setting(36.0, "Largest photo in 10^6 pixels.", panel=SERVICE, gt=0, le=1000)


class Data(Common):
    """Make or check data."""


class Fetch(Settings):
    """Download a folder from a bucket or the web: in parallel, checked, and resumed where it stopped."""

    example: ClassVar[str] = "imgtool data fetch s3://bucket/photos -o photos"
    url: str = setting(..., "Folder or file: gs://, s3://, hf:// or https://.", panel=FILES, argument=True)
    out: Path = setting(..., "Folder for the files and their manifest.", panel=FILES, short="-o")
    suffix: tuple[str, ...] = setting((), "Only files that end so, such as .jpg.", panel=FILES)
    force: bool = setting(
        False, "Overwrite files that were there before or were changed since.", panel=FILES, short="-f"
    )
    check: bool = setting(
        False,
        "Download nothing: compare what lies there with the manifest, by size and SHA-256.",
        panel=FILES,
    )
    jobs: int = setting(32, "Downloads at a time.", ge=1, le=1024)


ACTIONS: Mapping[str, type[Settings]] = {"fetch": Fetch}
"""Actions of ``data`` that belong to no engine."""
