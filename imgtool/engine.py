"""The record that an engine fills in: functions and facts, no loop of its own."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from imgtool.errors import ImgtoolError

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor, nn

    from imgtool.images import Photo
    from imgtool.port import Port
    from imgtool.search.task import Task
    from imgtool.settings import Settings

    Pixels = npt.NDArray[Any]
    Surveyed = Sequence[tuple[str, Callable[[], Photo]]]

Terms = Mapping[str, "Tensor"]


def later(module: str, name: str) -> Callable[..., Any]:
    """Return a function that imports the real one when it is first called.

    An engine whose ``infer`` needs no torch names its training functions so.

    Args:
        module: Dotted name of the module.
        name: The function in it.
    """

    def call(*arguments: Any, **named: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*arguments, **named)

    return call


class Examples(Protocol):
    """A data set: ``len`` is one epoch, and item i is the same for every i >= 0, always.

    Training asks for items beyond ``len``: step after step takes the numbers that follow (with one
    stage, number = step x batch + position), so the data order is a function of the step and a resumed
    run needs no state of the data set.
    """

    def __len__(self) -> int:
        """Return the number of samples in an epoch."""
        ...

    def __getitem__(self, number: int) -> tuple[Any, ...]:
        """Return sample ``number``: a (named) tuple of tensors."""
        ...


@dataclass(frozen=True)
class TileFacts:
    """What cutting an image into tiles may assume of a network.

    Attributes:
        multiple: Sizes and tile origins must be multiples of this many pixels.
        block: Cores of tiles are cut at multiples of this many pixels: what is computed in blocks of one size
            is then the same whatever the tiles are.
        local: True where an output pixel depends only on input pixels near it; a network with
            statistics of the whole image is not local and is never cut.
        halo: Context in pixels that a tile carries on each side and throws away.
        border: Mirrored pixels added around the whole photo before anything else.
        bytes_per_pixel: Resident memory that a forward pass takes per pixel, in bytes (float32,
            CPU, measured).
        reason: Why a network that is not local is not cut.
        largest: Core edge of the fastest tiles: larger tensors get fresh pages from the system, layer by
            layer, and smaller tiles compute more halo. CPU seconds per megapixel of the deblurring network:
            256 1.03, 384 0.84, 512 0.75, 768 0.65, 1024 0.61; whole photos of 2 megapixels 0.7, of 6 1.0.
    """

    multiple: int = 1
    block: int = 1
    local: bool = True
    halo: int = 0
    border: int = 0
    bytes_per_pixel: int = 1000
    reason: str = ""
    largest: int = 1024

    @property
    def grid(self) -> int:
        """Pixels that cores of tiles are multiples of."""
        return math.lcm(self.multiple, self.block)


@dataclass(frozen=True)
class Result:
    """What ``Engine.apply`` gives back.

    Attributes:
        image: ``(H, W, 3)`` RGB, or ``(H, W)`` grey, in the input's own data type; None where no picture
            was wanted.
            Where it is the very array of the photo, the photo is left as it is: where the format
            stays the same, the output is a copy of the input's bytes.
        facts: The engine's part of the JSON contract.
        alpha: ``(H, W)`` of the same type, where the engine makes or moves the photo's alpha; None
            keeps the photo's own.
        files: Files beside the output: suffix, such as ".lens.yml", to content. The output's stem is
            put in front. ``Engine.beside`` tells the suffixes before.
        row: The photo's row in ``Engine.table``: column to value.
        xmp: Properties in Adobe's namespace ``metadata.AUX`` that the output's XMP is to state.
        before: The photo before, where what was opened is no photo: its metadata are the output's, and
            where ``Watch.before`` asks for it, its pixels are shown beside the image.
        labels: What a sheet calls the pictures before and after, and the reference where there is one.
        reference: A picture of the image's size that a sheet shows beside it.
        line: The result in a line for people, "" where the picture is all.
    """

    image: Pixels | None
    facts: Mapping[str, object] = field(default_factory=dict)
    alpha: Pixels | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    row: Mapping[str, object] = field(default_factory=dict)
    xmp: Mapping[str, str] = field(default_factory=dict)
    before: Photo | None = None
    labels: tuple[str, ...] = ("before", "after")
    reference: Pixels | None = None
    line: str = ""

    @property
    def pixels(self) -> Pixels:
        """The image, where one was wanted; raises ``TypeError`` where there is none."""
        if self.image is None:
            raise TypeError("the engine made no picture")
        return self.image


def _nobody(engine: str, source: bytes | None = None, **settings: Any) -> Mapping[str, Any]:
    raise ImgtoolError(f"the engine {engine} cannot be asked here", "run imgtool infer")


@dataclass(frozen=True)
class Watch:
    """Who is told how the work on one photo goes on, what is wanted of it, and who else may be asked.

    Attributes:
        done: Told how many tiles of how many are finished.
        say: Told in words what a user should know, such as that tiles were made smaller.
        name: The photo's path below the folder that it was found in.
        source: The file, or its content where it came through standard input.
        place: Path whose folder and stem the files beside take; None where there are none.
        beside: Suffix to path of the files beside that are wanted; None where all are, named by ``place``.
        picture: Whether the picture is wanted, and not only the facts.
        before: Whether the picture before is wanted too.
        overwrite: Whether the photo's pixels are not needed afterwards: its memory may take the result, of
            which ``Result.image`` is then a view (``tiles.canvas`` gives one), not the very array.
        consult: ``(engine, source, **settings) -> facts``: what another engine finds with its own weights in
            this photo, or in the content of a file that ``source`` is; None is this photo.
    """

    done: Callable[[int, int], None] = lambda finished, total: None
    say: Callable[[str], None] = lambda text: None
    name: str = ""
    source: Path | bytes | None = None
    place: Path | None = None
    beside: Mapping[str, Path] | None = None
    picture: bool = True
    before: bool = False
    overwrite: bool = False
    consult: Callable[..., Mapping[str, Any]] = _nobody


@dataclass(frozen=True)
class Subject:
    """Something that ``bench`` times on a picture of random pixels, in a process of its own.

    Attributes:
        name: What the table calls it.
        height: Rows of the picture.
        width: Columns of the picture.
        model: "Model" settings of an untrained network; {} takes the weights under test.
        settings: Settings of ``infer``.
        baseline: Time the engine's classical method instead of a network.
        warm: Run once before the timed run.
    """

    name: str
    height: int
    width: int
    model: Mapping[str, object] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    baseline: bool = False
    warm: bool = True


@dataclass(frozen=True)
class Timing:
    """What was measured of a subject.

    Attributes:
        cpu: CPU seconds, user and system, of one run.
        wall: Seconds by the clock.
        peak_mb: Peak resident memory of the whole process, in 10^6 bytes.
        base_mb: The same before the network was built.
    """

    cpu: float
    wall: float
    peak_mb: float
    base_mb: float


@dataclass(frozen=True)
class Budget:
    """A stated limit and what was measured."""

    name: str
    limit: float
    value: float
    unit: str
    sense: Literal["<=", ">="] = "<="

    @property
    def passed(self) -> bool:
        """Whether the limit is met."""
        return self.value <= self.limit if self.sense == "<=" else self.value >= self.limit


@dataclass(frozen=True)
class Table:
    """A table for people."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[object, ...]]


@dataclass(frozen=True)
class Report:
    """What an engine's bench gives back: one sentence, figures by name, limits, tables."""

    what: str
    figures: Mapping[str, object]
    budgets: list[Budget]
    tables: list[Table]


class Crew(Protocol):
    """What ``Engine.campaign`` is given.

    Attributes:
        folder: Folder of the campaign; everything that it writes goes there.
    """

    folder: Path

    def say(self, text: str) -> None:
        """Say a line."""
        ...

    def train(self, settings: Any, name: str) -> Mapping[str, Any]:
        """Train into the sub-folder ``name``, or go on there; return {"best", "folder", "weights"}."""
        ...


@dataclass(frozen=True)
class Engine:
    """One engine: what the five verbs need to know of it.

    Attributes:
        name: The word on the command line.
        model: The settings that shape the network; a checkpoint keeps them.
        build: Network for the settings, randomly initialised.
        data: ``(train, held_out)`` data sets for the settings.
        loss: ``(net, batch) -> {term: scalar}``; the sum is minimised, each term is logged.
        score: ``(net, batch) -> {metric: (B,) values}`` on held-out data.
        apply: ``(net, photo, settings, watch) -> Result``; its pixels are ``(H, W, 3)`` RGB, uint8, uint16
            (full range) or float32 (nominally 0..1), and upright.
        samples: ``(net, batch) -> {label: (B, 3, H, W) in 0..1}``, for the sample sheets.
        tiles: What may be assumed of a network when an image is cut into tiles.
        bench: ``(settings, lab) -> Report``; the lab has ``network()``, ``measure(subjects)``,
            ``watch``.
        actions: The engine's ``data`` actions by name: ``(settings, watch) -> record``; a record
            with entries under "faults" means exit code 1.
        reads: What ``apply`` takes.
        best: The metric that chooses the best checkpoint.
        higher_is_better: Its direction.
        scale: Output size over input size.
        weights: Name of the shipped weights used by default.
        choose: ``(settings of infer or bench) -> name`` of the shipped weights used where none are named;
            "" is ``weights``. ``chosen`` is how to ask.
        baseline: The classical method that ``bench`` compares with.
        begin: ``(net, settings) -> words``: fill a new network before a fresh run, as with weights
            learnt elsewhere; ``build`` never does. What it returns is said to the user, "" is not.
        otherwise: The metric that chooses, in the same direction, where held-out data does not tell ``best``.
        table: Name of a table in the output folder, such as "coefficients.csv", with a row for each
            photo (``Result.row``); "" keeps none.
        beside: ``(settings) -> suffixes`` of the files that ``Result.files`` will hold.
        check: Raises what is wrong with settings of ``infer`` whatever the photo.
        survey: ``(net, photos, settings, watch) -> entries``, called once before the first photo where
            ``wants_survey(settings)``. Photos are ``(name, read)``; ``read()`` gives the photo or raises
            ``ImgtoolError``, which must not stop the survey. One entry per photo: ``apply`` gets it as
            a fifth argument.
        wants_survey: Whether the settings ask for it.
        describe: ``(training set) -> facts`` that the weights' header keeps of what they were trained on.
        campaign: ``(settings, crew) -> record``, called instead of one training where
            ``wants_campaign(settings)``: cross-validation. It can be interrupted and resumed:
            ``crew.train`` does not repeat what has ended.
        wants_campaign: Whether the settings ask for it.
        search: ``(settings) -> search.task.Task``, for an engine that searches in a space or measures in a
            way of its own. Without it, settings of ``train`` are searched as ``space.toml`` beside
            the engine says.
        stages: ``(settings) -> [(steps, batch), ...]``: parts of a run one after another, with their samples
            per step; their steps add up to ``settings.steps``. ``samples.stage_of`` tells a data set the
            stage of a sample number. Patience counts in the last stage alone.
        enough: ``(rows, settings) -> words``: asked after each epoch with the rows of ``log.jsonl`` so far
            (what is not finite is None there), and where a run is resumed. Words end the run and are said
            to the user, "" does not.
        prepare: ``(weights file, settings) -> net``, for an engine that needs no torch to infer: what it
            returns is handed to ``apply``. Without it, that is the torch network.
        uses_weights: Whether the settings of ``infer`` need weights; where not, ``apply`` gets no network.
        open: ``(file or its content, name, settings, net) -> photo``, for an engine that reads its inputs
            itself; what it returns is handed to ``apply``. Without it, that is an ``images.Photo``.
        specimen: ``(height, width, seed) -> input`` of random content, as ``open`` would give it; without it,
            that is a photo.
        suffixes: Of the files that are inputs in folders and globs; () takes every photo that can be read.
        form: ``(settings) -> "jpg"``: what is written where neither -o nor --format says; "" is the input's
            own format.
        picture: Whether a picture is the result. Where not, one is written only where -o names it.
        sheets: How the stems of pictures among ``Result.files`` end, such as "-methods": they are not
            taken for inputs.
        drawn: Tells pictures that the engine's data actions draw: found in folders, they are no inputs.
        unfit: ``(suffix, file) -> words``: why a file beside makes no sense for an input, "" where it does.
            Of several inputs, such a one goes without it.
        port: ``(net, settings of export) -> Port``: what an exported file holds. The net is torch's.
        ported: ``(model, settings of infer) -> net``: an exported file that a runtime runs, a
            ``runtime.Loaded``, as what ``apply`` takes.
        archived: ``(what the file says, arrays) -> run``: runs the NumPy archive of an engine that
            exports one; ``run(*inputs) -> outputs``.
    """

    name: str
    model: type[Settings]
    build: Callable[[Any], nn.Module]
    data: Callable[[Any], tuple[Examples, Examples]]
    loss: Callable[[nn.Module, Any, Any], Terms]
    score: Callable[[nn.Module, Any], Terms]
    apply: Callable[..., Result]
    samples: Callable[[nn.Module, Any], Mapping[str, Tensor]]
    tiles: Callable[[nn.Module], TileFacts]
    bench: Callable[[Any, Any], Report]
    actions: Mapping[str, Callable[[Any, Watch], Mapping[str, object]]]
    reads: Literal["rgb", "bayer"]
    best: str
    higher_is_better: bool
    scale: int
    weights: str
    baseline: Callable[..., Pixels]
    begin: Callable[[nn.Module, Any], str] | None = None
    otherwise: str = ""
    table: str = ""
    beside: Callable[[Any], Sequence[str]] = lambda settings: ()
    check: Callable[[Any], None] = lambda settings: None
    survey: Callable[[nn.Module, Surveyed, Any, Watch], Sequence[object]] | None = None
    wants_survey: Callable[[Any], bool] = lambda settings: False
    describe: Callable[[Any], Mapping[str, Any]] = lambda examples: {}
    campaign: Callable[[Any, Crew], Mapping[str, Any]] | None = None
    wants_campaign: Callable[[Any], bool] = lambda settings: False
    search: Callable[[Any], Task] | None = None
    stages: Callable[[Any], Sequence[tuple[int, int]]] = lambda settings: ((settings.steps, settings.batch),)
    enough: Callable[[Sequence[Mapping[str, Any]], Any], str] = lambda rows, settings: ""
    prepare: Callable[[Path, Any], object] | None = None
    uses_weights: Callable[[Any], bool] = lambda settings: True
    open: Callable[[Path | bytes, str, Any, Any], object] | None = None
    specimen: Callable[[int, int, int], object] | None = None
    suffixes: Collection[str] = ()
    form: Callable[[Any], str] = lambda settings: ""
    picture: bool = True
    sheets: tuple[str, ...] = ()
    drawn: Callable[[Path], bool] = lambda path: False
    unfit: Callable[[str, Path], str] = lambda suffix, path: ""
    choose: Callable[[Any], str] = lambda settings: ""
    port: Callable[[nn.Module, Any], Port] | None = None
    ported: Callable[[Any, Any], Any] | None = None
    archived: Callable[[Mapping[str, Any], Mapping[str, Pixels]], Callable[..., Any]] | None = None

    def chosen(self, settings: Any) -> str:
        """Return the name of the weights for settings of ``infer`` or ``bench``: named, chosen or default."""
        return settings.weights or self.choose(settings) or self.weights
