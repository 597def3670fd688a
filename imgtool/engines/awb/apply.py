"""A frame balanced: its statistics, a method's white, the gains, and what is written of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imgtool.engine import Result, Watch
from imgtool.engines.awb import estimate, reading, sidecar
from imgtool.engines.awb.camera import GENERIC
from imgtool.engines.awb.settings import Infer, Model
from imgtool.engines.awb.stats import COVERED, AwbStats
from imgtool.errors import USAGE, ImgtoolError

if TYPE_CHECKING:
    from imgtool.engine import Pixels
    from imgtool.engines.awb.estimate import Net
    from imgtool.images import Photo

White = tuple[float, float]

FREE = ("bayes", "grey-world", "white-patch", "shades-of-grey", "grey-edge", "grayness-index")
"""The methods that no network serves."""

EXPORTED = (".onnx", ".tflite", ".xml", ".pt2", ".npz")
"""Suffixes of exported files, which are weights as well."""

SHEET = "-methods.png"
DIMMEST = 0.005
"""Share of the range up to which a frame without colour is called black."""

LEAST, MOST = 0.5, 2.0
"""Gains of rendered photos: beyond these a cast is the scene's own, or cannot be undone in 8 bit."""

_ROW = (
    "red_gain", "blue_gain", "confidence", "method", "fallback", "domain", "cct", "tint", "duv", "camera",
    "saturated", "lux",
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What was found.

    Attributes:
        white: R/G and B/G of white.
        confidence: Of the network, in 0..1; None where it was not asked or cannot tell.
        fallback: The method that answered for the network; None where none did.
        blended: The method whose white was averaged with the network's; None where none was.
    """

    white: White
    confidence: float | None = None
    fallback: str | None = None
    blended: str | None = None


def check(settings: Infer) -> None:
    """Raise what is wrong with the settings whatever the frame."""
    sidecar.forms(settings.export)
    reading.rectangle(settings.mask)
    if not settings.ct_range.strip().isidentifier():  # a word may be a mode of the frame's tuning
        from imgtool.engines.awb.tuning import Tuning

        Tuning.of(GENERIC).span(settings.ct_range)


def opened(source: Path | bytes, name: str, settings: Infer, net: Net | None) -> AwbStats:
    """Read a frame, as fine as the network sees it; see ``reading.read``."""
    return reading.read(source, name, settings, reading.cells_for(net and net.shape))


def beside(settings: Infer) -> list[str]:
    """Return the suffixes of the files that will lie beside the output or the input."""
    suffixes = [sidecar.SUFFIXES[form] for form in sidecar.forms(settings.export)]
    return [*suffixes, *[SHEET] * settings.compare_methods]


def uses_weights(settings: Infer) -> bool:
    """Tell whether a network is asked."""
    return settings.method == "net" or settings.compare_methods


def prepare(path: Path, settings: Infer) -> Net:
    """Load the network for the runtime that the settings name; an exported file has its own.

    Raises:
        ImgtoolError: As ``header.read`` or ``exported.opened``; or the runtime is not installed, or is not
            that of the file.
    """
    if path.suffix.lower() in EXPORTED:
        return _exported(path, settings)
    from imgtool import header
    from imgtool.settings.sources import make

    weights = header.read(path, "awb")
    shape = make(Model, weights.model, f"weights {weights.name}")
    if settings.runtime == "numpy":
        return estimate.of_state(shape, weights.state)
    if settings.runtime == "torch":
        from imgtool import checkpoint, compute
        from imgtool.engines.awb.engine import ENGINE

        net = checkpoint.network(ENGINE, checkpoint.read_weights(path, "awb"))
        return estimate.of_module(net.to(compute.device(settings.device)), shape)
    from imgtool.engines.awb import exported

    return exported.ported(exported.of_weights(path, settings.runtime))


def _exported(path: Path, settings: Infer) -> Net:
    from imgtool import runtime
    from imgtool.engines.awb import exported

    if settings.runtime not in ("numpy", runtime.kind_of(path)):
        what = f"--runtime {settings.runtime} does not run {path}"
        raise ImgtoolError(what, "leave it out: an exported file has its own", USAGE)
    return exported.opened(path)


def apply(
    net: Net | None, seen: AwbStats | Photo, settings: Infer, watch: Watch, known: object = None
) -> Result:
    """Find the white of a frame, and correct its picture where one is wanted.

    Args:
        net: The network; None where the settings use none.
        seen: What ``reading.read`` gave; or a photo, whose picture is always made.
        settings: Of ``infer``.
        watch: Told how it goes; names the frame's source.
        known: Not used.

    Returns:
        The gains as facts, the picture where it is wanted, and files beside it.

    Raises:
        ImgtoolError: Nothing to measure, a file beside that cannot be right, or as ``images.read``.
    """
    stats = seen if isinstance(seen, AwbStats) else reading.of_photo(seen, watch.name, settings.mask)
    for note in stats.about.get("notes", ()):
        watch.say(note)
    if settings.lux >= 0:
        stats = stats.changed(lux=settings.lux)
    refuse_empty(stats)
    answer = decided(net, stats, settings, watch.say)
    facts = _facts(answer, stats, settings)
    if stats.domain == "srgb":
        watch.say(
            f"a rendered photo: the gains are a correction, within {LEAST:g} to {MOST:g}, not the camera's"
        )
    files = sidecar.write(settings.export, facts, stats, watch)
    result = Result(None, facts, files=files, row={name: facts[name] for name in _ROW}, line=_line(facts))
    source = watch.source if isinstance(seen, AwbStats) else seen
    if source is not None and (watch.picture or settings.compare_methods or source is seen):
        result = _pictured(result, net, stats, source, settings, watch)
    watch.done(1, 1)
    return result


def refuse_empty(stats: AwbStats) -> None:
    """Raise ``ImgtoolError`` where no cell of a frame counts, saying why."""
    if len(stats.points()):
        return
    name = stats.name or "the frame"
    if stats.saturated > 0.5:
        what, hint = "is saturated", "give a darker exposure, or check --white"
    elif np.nanmax(stats.cells[stats.coverage >= COVERED], initial=0) > DIMMEST:
        what = "has no cell with all three colours: its light is of one or two"
        hint = "give a frame under another light, or check --black"
    elif (stats.coverage >= COVERED).any():
        what, hint = "is black", "give a brighter exposure, or check --black"
    else:
        what = "has nothing to measure: every pixel is black, saturated or masked"
        hint = "give a frame with other exposure, or check --black, --white and --mask"
    raise ImgtoolError(f"{name} {what}", hint)


def by_method(name: str, stats: AwbStats, settings: Infer) -> White:
    """Return the white that a method free of training finds.

    Raises:
        ImgtoolError: The method finds nothing to go by.
    """
    from imgtool.engines.awb import bayes, classical

    if name == "bayes":
        likeliest = bayes.bayes(stats, ct_range=settings.ct_range)
        r, b = (likeliest.r, likeliest.b) if likeliest else (math.nan, math.nan)
    else:
        r, b = (float(value) for value in classical.METHODS[name](stats))
    if not (0 < r < math.inf and 0 < b < math.inf):
        raise ImgtoolError(f"{stats.name or 'the frame'}: {name} finds no white", "take another --method")
    return r, b


def decided(net: Net | None, stats: AwbStats, settings: Infer, say: Callable[[str], None]) -> Answer:
    """Return the white by the method of the settings; where the network is not sure, by the fallback.

    Of a camera of which nothing is known, the geometric mean of both is taken: docs/awb.md has the errors.

    Args:
        net: The network; None where the method needs none.
        stats: The frame, with something to measure.
        settings: Of ``infer``.
        say: Told why another method answers.
    """
    if settings.method != "net" or net is None:
        return Answer(by_method(settings.method, stats, settings))
    r, b, sure = (float(value) for value in estimate.white(net, stats))
    own = Answer((r, b), None if math.isnan(sure) else sure)
    why = _why(own, stats, settings)
    mean = own.confidence is not None and not stats.camera.known
    if settings.fallback == "none" or not (why or mean):
        return own
    from imgtool.engines.awb import classical

    try:
        white = classical.snapped(by_method(settings.fallback, stats, settings), stats.camera)
    except ImgtoolError as fault:
        say(f"{why or 'the camera is unknown'}, but {settings.fallback} knows no better: {fault.what}")
        return own
    if why:
        say(f"{why}; {settings.fallback} answers")
        return replace(own, white=white, fallback=settings.fallback)
    return replace(own, white=(math.sqrt(r * white[0]), math.sqrt(b * white[1])), blended=settings.fallback)


def _why(own: Answer, stats: AwbStats, settings: Infer) -> str:
    """Return why the network's answer is not taken, "" where it is."""
    if stats.domain == "srgb":
        return "the network has learnt raw frames, and this is a rendered photo"
    if own.confidence is not None and own.confidence < settings.sure:
        return f"the network is not sure: confidence {own.confidence:.2f} is below {settings.sure:g}"
    return ""


def _bounded(white: White, domain: str) -> tuple[float, float]:
    """Return the gains of red and blue; a rendered photo's are kept within bounds."""
    red, blue = 1 / white[0], 1 / white[1]
    if domain == "srgb":
        return min(max(red, LEAST), MOST), min(max(blue, LEAST), MOST)
    return red, blue


def _facts(answer: Answer, stats: AwbStats, settings: Infer) -> dict[str, Any]:
    """Return the engine's part of the JSON contract."""
    red, blue = _bounded(answer.white, stats.domain)
    return {
        "red_gain": red,
        "blue_gain": blue,
        "gains_libcamera": [red, blue],
        "illuminant": [1 / red, 1.0, 1 / blue],
        "confidence": answer.confidence,
        "method": settings.method,
        "fallback": answer.fallback,
        "blended": answer.blended,
        "domain": stats.domain,
        "bounded": (red, blue) != (1 / answer.white[0], 1 / answer.white[1]),
        **_light(stats, (1 / red, 1 / blue)),
        "camera": stats.camera.name or None,
        "camera_gains": stats.about.get("camera_gains"),
        "black": stats.black,
        "white": stats.white,
        "saturated": stats.saturated,
        "lux": stats.lux,
    }


def _light(stats: AwbStats, white: White) -> dict[str, float | None]:
    """Return colour temperature, Adobe's tint and Duv of a white, None where the camera does not tell."""
    from imgtool.engines.awb import temperature

    camera = stats.camera
    light = temperature.of_white(*white, camera) if stats.domain == "raw" else None
    if light and light.ct <= sidecar.HOTTEST:
        return {"cct": light.ct, "tint": light.tint, "duv": light.duv}
    on_curve = camera.known and camera.xyz_to_camera is None and stats.domain == "raw"
    return {"cct": camera.locus.nearest(*white)[0] if on_curve else None, "tint": None, "duv": None}


def _line(facts: Mapping[str, Any]) -> str:
    """Return the result in a line for people."""
    unsure = facts["fallback"] and facts["domain"] == "raw"
    told = [facts["fallback"] if unsure else _answered(facts)]
    if facts["confidence"] is not None and (unsure or not facts["fallback"]):
        told.append(f"{'net unsure,' if unsure else 'confidence'} {facts['confidence']:.2f}")
    if facts["cct"] is not None:
        told.append(f"{facts['cct']:.0f} K")
    if facts["domain"] == "srgb":
        told.append("a correction")
    return f"red {facts['red_gain']:.2f}  blue {facts['blue_gain']:.2f}  ({', '.join(told)})"


def _pictured(
    result: Result,
    net: Net | None,
    stats: AwbStats,
    source: Path | bytes | Photo,
    settings: Infer,
    watch: Watch,
) -> Result:
    """Add the pictures: the corrected one, the one before, the sheet of all methods."""
    from imgtool.engines.awb import picture

    view = picture.scene(stats, source)
    facts: dict[str, Any] = {**result.facts, "before": view.before}
    r, _, b = facts["illuminant"]
    if settings.compare_methods:
        whites = compared(net, stats, settings, watch.say) | {f"chosen ({_answered(facts)})": (r, b)}
        sheet = picture.methods_sheet(view, whites, watch.name, stats.truth)
        result = replace(result, files={**result.files, SHEET: sheet})
    if not watch.picture:
        return result
    image: Pixels = view.picture((r, b))
    return replace(result, image=image, facts=facts, before=view.photo_before(watch.before))


def _answered(facts: Mapping[str, Any]) -> str:
    """Return in words which method answered."""
    if facts["fallback"]:
        return f"{facts['fallback']} for net"
    return str(facts["method"]) + (f" with {facts['blended']}" if facts["blended"] else "")


def compared(
    net: Net | None, stats: AwbStats, settings: Infer, say: Callable[[str], None]
) -> dict[str, White]:
    """Return the white of a frame by every method that finds one."""
    found: dict[str, White] = {}
    for name in ("net", *FREE):
        own = settings.changed(method=name, fallback="none")
        try:
            if name != "net" or net is not None:
                r, b = _bounded(decided(net, stats, own, say).white, stats.domain)
                found[name] = (1 / r, 1 / b)
        except ImgtoolError as fault:
            say(f"{name} is left out: {fault.what}")
    return found


def baseline(image: Pixels) -> Pixels:
    """Correct a rendered photo classically: grey-world; one that has nothing to measure stays as it is."""
    from imgtool.engines.awb import classical, picture
    from imgtool.images import Photo

    stats = reading.of_photo(Photo(image), "")
    if not len(stats.points()):
        return image.copy()
    r, b = classical.METHODS["grey-world"](stats)
    red, blue = _bounded((float(r), float(b)), "srgb")
    corrected = picture.correct(image, (1 / red, 1 / blue))
    return corrected.copy() if corrected is image else corrected
