"""Files for other programs: the facts as JSON, XMP for raw converters, gains for libcamera."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgtool import files, outputs
from imgtool.errors import USAGE, ImgtoolError

if TYPE_CHECKING:
    from imgtool.engine import Watch
    from imgtool.engines.awb.stats import AwbStats

SUFFIXES = {"json": ".awb.json", "xmp": ".xmp", "libcamera": ".libcamera.json"}
"""Files that --export writes, and how their names end."""

CRS = ("http://ns.adobe.com/camera-raw-settings/1.0/", "crs")
"""Adobe's namespace of the settings of Camera Raw and Lightroom, and its usual prefix."""

COLDEST, HOTTEST, GREENEST = 2000, 50_000, 150
"""Ends of Adobe's scales of temperature, in kelvin, and of tint, to both sides."""


def forms(text: str) -> list[str]:
    """Return the files that ``--export`` asks for.

    Raises:
        ImgtoolError: Code 2, for one that is unknown.
    """
    wanted = [word.strip() for word in text.split(",") if word.strip()]
    for word in wanted:
        if word not in SUFFIXES:
            raise ImgtoolError(f"--export {word}: unknown", "take some of " + ",".join(SUFFIXES), USAGE)
    return wanted


def write(text: str, facts: Mapping[str, Any], stats: AwbStats, watch: Watch) -> dict[str, bytes]:
    """Return the content of each file by its suffix.

    Args:
        text: What ``--export`` said.
        facts: What was found.
        stats: The frame.
        watch: Names its source and the files that are wanted: an XMP that is there keeps what else it says.

    Raises:
        ImgtoolError: An XMP is asked for where it cannot be right, or would replace one that is broken.
    """
    makers = {"json": lambda: _json(facts), "libcamera": lambda: _libcamera(facts)}
    makers["xmp"] = lambda: _xmp(facts, stats, watch)
    wanted = [form for form in forms(text) if watch.beside is None or SUFFIXES[form] in watch.beside]
    return {SUFFIXES[form]: makers[form]() for form in wanted}


def unfit(suffix: str, source: Path) -> str:
    """Return why a file beside makes no sense for an input, "" where it does."""
    from imgtool.engines.awb import reading

    try:
        fits = suffix != SUFFIXES["xmp"] or reading.is_raw(source, str(source))
    except ImgtoolError:  # which is said when its turn comes
        return ""
    return "" if fits else "raw converters read XMP of camera RAW alone"


def _json(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, indent=2, allow_nan=False).encode() + b"\n"


def _libcamera(facts: Mapping[str, Any]) -> bytes:
    """Return libcamera's controls: automatic white balance off, gains of red and blue."""
    return _json({"AwbEnable": False, "ColourGains": facts["gains_libcamera"]})


def _xmp(facts: Mapping[str, Any], stats: AwbStats, watch: Watch) -> bytes:
    """Return a sidecar that raw converters read, such as Adobe's and those that follow them."""
    temperature, tint = _adobe(facts, stats, watch.source)
    from imgtool.images import metadata

    suffix = SUFFIXES["xmp"]
    place = watch.beside[suffix] if watch.beside else watch.place and outputs.beside(watch.place, suffix)
    older = files.read(place) if place and place.exists() else None
    told = {"WhiteBalance": "Custom", "Temperature": str(temperature), "Tint": f"{tint:+d}" if tint else "0"}
    packet = metadata.with_xmp_properties(older, *CRS, told)
    if any(metadata.xmp_property(packet, CRS[0], name) != value for name, value in told.items()):
        raise ImgtoolError(
            f"{place} is no XMP that could be kept", "move it away, or leave xmp out of --export"
        )
    return packet


def _adobe(facts: Mapping[str, Any], stats: AwbStats, source: Path | bytes | None) -> tuple[int, int]:
    """Return temperature and tint on Adobe's scales.

    Raises:
        ImgtoolError: What they would mean is not known: no camera RAW, no colour matrix, off the scales.
    """
    from imgtool.engines.awb import reading

    name, hint = stats.name or "the frame", "leave xmp out of --export; json says the gains"
    if source is None or stats.domain != "raw" or not reading.is_raw(source, stats.name):
        raise ImgtoolError(f"{name} is no camera RAW, and raw converters read XMP of no other", hint)
    if stats.camera.xyz_to_camera is None:
        what = f"{name}: the colour matrix of the camera is not known, so neither are temperature and tint"
        raise ImgtoolError(what, hint)
    temperature, tint = facts["cct"], facts["tint"]
    if tint is None or not (temperature >= COLDEST and abs(tint) <= GREENEST):
        raise ImgtoolError(f"{name}: this white is off Adobe's scales of temperature and tint", hint)
    return round(temperature), round(tint)
