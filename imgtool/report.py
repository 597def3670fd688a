"""One self-contained HTML page with a before/after slider for every photo.

The page needs no other file and no network: styles and script are inline, pictures are JPEG in
base64. An ``Entry`` holds encoded pictures only, so that a page of many photos needs little memory.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgtool.files import atomic

if TYPE_CHECKING:
    from markupsafe import Markup

    from imgtool.views import Array, Bytes, Region

LONGEST = 1600
DETAIL = (480, 320)


@dataclass(frozen=True)
class Detail:
    """A part of a photo at full resolution.

    Attributes:
        before: JPEG file.
        after: JPEG file of the same size.
        factor: Enlargement at which it is shown: 1 is 100 %.
        width: In pixels of the photo.
        height: In pixels of the photo.
        place: Left, top, width and height as shares of the photo, 0..1.
    """

    before: bytes
    after: bytes
    factor: int
    width: int
    height: int
    place: tuple[float, float, float, float]


@dataclass(frozen=True)
class Entry:
    """One photo on the page; made by ``entry`` or ``failed``.

    Attributes:
        name: What the photo is called.
        before: JPEG file, at most ``LONGEST`` pixels on the long side; empty for a failure.
        after: JPEG file of the same size.
        size: Width and height of the photo "after", in pixels.
        facts: What to tell about it.
        details: Where it changed most, at full resolution.
        error: What went wrong, for a failure.
        hint: What to do about it.
    """

    name: str
    before: bytes = b""
    after: bytes = b""
    size: tuple[int, int] = (0, 0)
    facts: Mapping[str, object] = field(default_factory=dict)
    details: tuple[Detail, ...] = ()
    error: str = ""
    hint: str = ""


def _jpeg(pixels: Bytes, icc: bytes, **options: Any) -> bytes:
    from PIL import Image

    from imgtool.views import colour_profile

    data = io.BytesIO()
    # Not optimize=True: Pillow's buffer for it is too small for noisy pictures, which then fail.
    Image.fromarray(pixels).save(data, "JPEG", icc_profile=colour_profile(icc), **options)
    return data.getvalue()


def _detail(before: Array, after: Array, region: Region, factor: int, icc: bytes) -> Detail:
    from imgtool.views import to_bytes

    # Full colour resolution and little loss: here people look for artefacts.
    old, new = (_jpeg(to_bytes(region.cut(p)), icc, quality=93, subsampling=0) for p in (before, after))
    height, width = after.shape[:2]
    place = (region.x / width, region.y / height, region.width / width, region.height / height)
    return Detail(old, new, factor, region.width, region.height, place)


def entry(
    name: str, before: Array, after: Array, facts: Mapping[str, object], *, details: int = 3, icc: bytes = b""
) -> Entry:
    """Encode one photo for the page; the arrays are no longer needed afterwards.

    Args:
        name: What the photo is called.
        before: ``(H, W, 3)`` RGB, uint8, uint16 (full range) or float (0..1).
        after: The same; where its size differs, ``before`` is scaled to it.
        facts: What to tell about it, in this order; values may be nested.
        details: Parts shown at full resolution, taken where the change is greatest.
        icc: The photo's ICC profile.
    """
    from imgtool.views import detail_view, regions, same_size, shrink

    before = same_size(before, after)
    height, width = after.shape[:2]
    factor, size = detail_view((width, height), DETAIL, 0.25)
    places = regions(before, after, details, size) if details > 0 and size != (width, height) else []
    old, new = (_jpeg(shrink(pixels, LONGEST, LONGEST), icc, quality=90) for pixels in (before, after))
    parts = tuple(_detail(before, after, place, factor, icc) for place in places)
    return Entry(name, old, new, (width, height), dict(facts), parts)


def failed(name: str, error: str, hint: str = "") -> Entry:
    """Return the entry of a photo that could not be done."""
    return Entry(name, error=error, hint=hint)


def plain(value: object) -> str:
    """Return a fact as people read it: figures to four digits, lists and mappings in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(inner) for inner in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "none" if value is None else str(value)


def _source(data: bytes) -> Markup:
    from markupsafe import Markup

    # Base64 has nothing to escape: searching megabytes for it would double the time.
    return Markup("data:image/jpeg;base64," + base64.b64encode(data).decode("ascii"))


def page(entries: Sequence[Entry], path: Path, *, title: str, about: Mapping[str, object]) -> None:
    """Write the page.

    Args:
        entries: The photos, in the order of the page; failures are listed first, by name.
        path: The file to write.
        title: Heading of the page.
        about: Facts about the whole run, such as engine and weights.

    Raises:
        ImgtoolError: The file cannot be written.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).with_name("templates")
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"plain": plain, "jpeg": _source}
    parts = environment.get_template("report.html.j2").generate(
        title=title,
        about=about,
        photos=[item for item in entries if not item.error],
        failures=[item for item in entries if item.error],
    )
    # Names of files need not be valid Unicode, a page must be.
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", errors="replace") as file:
        file.writelines(parts)
