"""Classical filters as targets: pure functions of a photo, with typed parameters and a stated scale.

A filter is named as on the command line: ``bilateral``, or with parameters ``bilateral:d=5,sr=0.2``. Each
takes ``(H, W, 3)`` RGB, uint8 or float32 in 0..1, of any size from 1x1, and returns float32, ``(H, W)`` or
``(H, W, C)``, nominally in 0..1. Unless its words say otherwise, a filter mirrors the photo at its border
without repeating the edge (OpenCV's ``BORDER_REFLECT_101``).

Where a filter divides by the maximum of the whole photo, or follows edges through it, no local network can
know the result. Such a filter has two passes: ``map`` is what a network learns, ``finish`` makes the result
of a whole map.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, get_type_hints

import numpy as np

from imgtool.engines.filter import edges, pyramid, simple, smoothing, texture
from imgtool.engines.filter.edges import Levels
from imgtool.engines.filter.pixels import Floats, Limits, Pixels, eight_bit, unit
from imgtool.errors import USAGE, ImgtoolError, did_you_mean

Values = Mapping[str, int | float]


@dataclass(frozen=True)
class Target:
    """A filter with its parameters.

    Attributes:
        spec: How it is written: name and all parameters that are not the default, in the order declared.
        map: ``(H, W, 3)`` to what a network learns, float32 ``(H, W)`` or ``(H, W, C)``.
        channels: Channels of the map: 1, 2 or 3.
        finish: Map of a whole photo to the result; None where the map is the result.
        levels: Where ``finish`` divides by the maximum first: what it makes of the quotient, uint8 to uint8.
        slow: Whether it takes more than about 50 ms per megapixel, so that maps are worth keeping.
        metric: What tells how near a result is: "psnr", or "f1" for thin edges.
        local: Pixels around a pixel of the map that it depends on; None where it depends on the whole photo.
    """

    spec: str
    map: Callable[[Pixels], Floats]
    channels: int
    finish: Callable[[Floats], Floats] | None = None
    slow: bool = False
    metric: str = "psnr"
    local: int | None = None
    levels: Callable[[Levels], Levels] | None = None

    @property
    def name(self) -> str:
        """The name without parameters."""
        return self.spec.partition(":")[0]

    def __call__(self, image: Pixels) -> Floats:
        """Return the result for a whole photo."""
        found = self.map(image)
        return self.finish(found) if self.finish else found


# --- the registry ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """How a filter of the registry is made.

    Parameters are those of ``run`` and of ``finish``, after the first, whose annotations give their limits.

    Attributes:
        run: The photo to the map; its docstring describes the filter.
        channels: See ``Target``.
        reach: The parameters to ``Target.local``; a number where they do not matter.
        finish: Of a whole map, to the result.
        levels: Of a whole map over its maximum in 8 bits, to the result in 8 bits.
        slow: See ``Target``.
        metric: See ``Target``.
    """

    run: Callable[..., Floats]
    channels: int = 3
    reach: int | Callable[[Any], int] | None = None
    finish: Callable[..., Floats] | None = None
    levels: Callable[..., Levels] | None = None
    slow: bool = False
    metric: str = "psnr"

    @property
    def last(self) -> Callable[..., Any] | None:
        """What is done with a whole map."""
        return self.finish or self.levels


def _half(values: Any) -> int:
    return int(values["size"]) // 2


def _gaussian(values: Any) -> int:
    return simple.reach_of(float(values["sigma"]))


def _rolling(values: Any) -> int:
    return int(values["n"]) * max(1, round(1.5 * float(values["ss"])))


KINDS: Mapping[str, Kind] = {
    "sobel_3": Kind(edges.sobel_3, 1, 1),
    "sobel_3_max": Kind(edges.sobel_3_max, 1, 2, levels=edges.as_they_are),
    "sobel_5_canny": Kind(edges.sobel_5_canny, 1, 3, levels=edges.thin_edges, metric="f1"),
    "scharr": Kind(edges.scharr, 1, 1),
    "laplacian": Kind(edges.laplacian, 1, 1),
    "canny": Kind(edges.canny, 2, 1, edges.follow_edges, metric="f1"),
    "random_conv": Kind(simple.random_conv, 1, 1),
    "random_sobel": Kind(edges.random_sobel, 1, 1, levels=edges.as_they_are),
    "gaussian": Kind(simple.gaussian, reach=_gaussian),
    "unsharp": Kind(simple.unsharp, reach=_gaussian),
    "median": Kind(simple.median, reach=_half),
    "erode": Kind(simple.erode, reach=_half),
    "dilate": Kind(simple.dilate, reach=_half),
    "clahe": Kind(simple.clahe),
    "bilateral": Kind(smoothing.bilateral, reach=lambda values: values["d"] // 2, slow=True),
    "guided": Kind(smoothing.guided, reach=lambda values: 2 * values["radius"], slow=True),
    "anisotropic": Kind(smoothing.anisotropic, reach=lambda values: values["n"], slow=True),
    "tv": Kind(smoothing.tv, slow=True),
    "nlm": Kind(smoothing.nlm, reach=lambda values: values["search"] // 2 + values["patch"] // 2, slow=True),
    "rolling_guidance": Kind(smoothing.rolling_guidance, reach=_rolling, slow=True),
    "weighted_median": Kind(smoothing.weighted_median, reach=lambda values: values["radius"], slow=True),
    "wls": Kind(smoothing.wls),
    "l0": Kind(smoothing.l0, slow=True),
    "rtv": Kind(texture.rtv, slow=True),
    "local_laplacian": Kind(pyramid.local_laplacian, slow=True),
}  # fmt: skip
"""The filters by name."""


def parse(spec: str) -> Target:
    """Make a filter of what the command line says.

    >>> parse("bilateral:sr=0.20,d=5,ss=3").spec
    'bilateral:d=5,sr=0.2'

    Raises:
        ImgtoolError: Code 2: unknown name or parameter, a value that is none, or one outside its limits.
    """
    name, _, rest = spec.partition(":")
    if name not in KINDS:
        raise ImgtoolError(f"no filter named {name}", did_you_mean(name, KINDS), USAGE)
    kind = KINDS[name]
    known = parameters(name)
    given = _given(name, rest, known)
    told = ",".join(
        f"{word}={_text(given[word])}" for word in known if given.get(word, known[word]) != known[word]
    )
    running = {word: value for word, value in given.items() if word in _parameters(kind.run)}
    finishing = {word: value for word, value in given.items() if word not in running}
    last = partial(kind.last, **finishing) if kind.last else None
    return Target(
        f"{name}:{told}" if told else name,
        partial(_mapped, partial(kind.run, **running)),
        kind.channels,
        partial(_finished, last) if last and kind.levels else last,
        kind.slow,
        kind.metric,
        kind.reach(known | given) if callable(kind.reach) else kind.reach,
        last if kind.levels else None,
    )


def _finished(levels: Callable[[Levels], Levels], found: Floats) -> Floats:
    return unit(levels(edges.over_maximum(found, float(found.max(initial=0.0)))))


def _mapped(run: Callable[[Pixels], Floats], image: Pixels) -> Floats:
    return np.ascontiguousarray(run(np.ascontiguousarray(image)))


def parameters(name: str) -> dict[str, int | float]:
    """Return the parameters of a filter with their defaults, in the order declared."""
    kind = KINDS[name]
    return _parameters(kind.run) | (_parameters(kind.last) if kind.last else {})


def _parameters(function: Callable[..., Any]) -> dict[str, int | float]:
    found = list(inspect.signature(function).parameters.values())
    return {each.name: each.default for each in found[1:]}


def _limits(name: str, word: str) -> Limits:
    kind = KINDS[name]
    hints = [get_type_hints(each, include_extras=True) for each in (kind.run, kind.last) if each]
    found: Limits = next(each[word] for each in hints if word in each).__metadata__[0]
    return found


def _given(name: str, text: str, known: Values) -> dict[str, int | float]:
    given: dict[str, int | float] = {}
    for part in filter(None, text.split(",")):
        word, _, value = part.partition("=")
        if word not in known:
            hint = did_you_mean(word, known) if known else f"{name} takes none"
            raise ImgtoolError(f"{name} has no parameter {word}", hint, USAGE)
        if word in given:
            raise ImgtoolError(f"{name}: {word} is given twice", f"write {name}:{word}=... once", USAGE)
        given[word] = _value(name, word, value, known[word])
    return given


def _value(name: str, word: str, text: str, default: float) -> int | float:
    usual = f"as in {name}:{word}={_text(default)}"
    try:
        value = type(default)(text)
    except ValueError:
        what = "whole number" if isinstance(default, int) else "number"
        raise ImgtoolError(f"{name}: {word} is a {what}, not {text!r}", usual, USAGE) from None
    limits = _limits(name, word)
    if not limits.allow(value):
        raise ImgtoolError(f"{name}: {word} is {limits}, not {text}", usual, USAGE)
    return value


def _text(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


# --- for lists -------------------------------------------------------------------------------


class Row(NamedTuple):
    """A filter in a list: name, parameters with their defaults, channels of the map, cost and a sentence."""

    name: str
    parameters: Values
    channels: int
    slow: bool
    sentence: str


def describe(name: str) -> str:
    """Return what a filter does, in one sentence.

    >>> describe("erode")
    'The least value of each colour in a square window.'
    """
    first = (inspect.getdoc(KINDS[name].run) or "").partition("\n")[0]
    words = first.removeprefix("Return ")
    return words[:1].upper() + words[1:]


def overview() -> list[Row]:
    """Return all filters, in the order of the registry."""
    return [
        Row(name, parameters(name), kind.channels, kind.slow, describe(name)) for name, kind in KINDS.items()
    ]


__all__ = [
    "KINDS",
    "Kind",
    "Row",
    "Target",
    "describe",
    "eight_bit",
    "overview",
    "parameters",
    "parse",
    "unit",
]
