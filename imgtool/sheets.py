"""Sheets of photos as PNG: before and after with details, and samples of a training run."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgtool.files import write
from imgtool.views import (
    Array,
    Bytes,
    Region,
    colour_profile,
    detail_view,
    enlarge,
    fit,
    regions,
    same_size,
    to_bytes,
)

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

    Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# A neutral surround: a tint would shift how the eye sees the photo's own colours.
BACKGROUND, TEXT, MUTED, OUTLINE = (27, 27, 27), (240, 240, 240), (158, 158, 158), (255, 255, 255)
MARGIN, GAP, TALLEST = 28, 16, 1000


@functools.cache
def _font(size: int, bold: bool = False) -> Font:
    from PIL import ImageFont

    # matplotlib brings a font with many scripts; finding its folder does not import it.
    spec = find_spec("matplotlib")
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    if spec is not None and spec.origin is not None:
        file = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / name
        if file.is_file():
            return ImageFont.truetype(str(file), size)
    return ImageFont.load_default(size)


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, font: Font, room: float, fill: Any = TEXT
) -> None:
    """Write one line from its left baseline, shortened to the room there is."""
    line = " ".join(text.encode("utf-8", "replace").decode().split())
    if font.getlength(line) > room:
        while line and font.getlength(line + "…") > room:
            line = line[:-1]
        line += "…" * bool(line)
    draw.text(at, line, font=font, fill=fill, anchor="ls")


def _blank(width: int, height: int) -> Image.Image:
    from PIL import Image

    return Image.new("RGB", (width, height), BACKGROUND)


def _picture(pixels: Bytes) -> Image.Image:
    from PIL import Image

    return Image.fromarray(pixels)


def _pen(picture: Image.Image) -> ImageDraw.ImageDraw:
    from PIL import ImageDraw

    return ImageDraw.Draw(picture)


def _pile(strips: Sequence[Image.Image], path: Path, icc: bytes = b"") -> None:
    """Write strips of one width below each other as a PNG."""
    write(path, _packed(strips, icc))


def _packed(strips: Sequence[Image.Image], icc: bytes = b"") -> bytes:
    """Return strips of one width below each other as a PNG."""
    whole = _blank(strips[0].width, sum(strip.height for strip in strips) + MARGIN)
    top = 0
    for strip in strips:
        whole.paste(strip, (0, top))
        top += strip.height
    data = io.BytesIO()
    whole.save(data, "PNG", compress_level=4, icc_profile=colour_profile(icc))
    return data.getvalue()


def _heading(title: str, note: str, width: int) -> Image.Image:
    strip = _blank(width, 76 if title or note else MARGIN - GAP)
    font = _font(17)
    taken = font.getlength(note)
    if taken < width / 2:
        _write(_pen(strip), (width - MARGIN - int(taken), 50), note, font, taken + 1, MUTED)
    _write(_pen(strip), (MARGIN, 50), title, _font(26, bold=True), width - 3 * MARGIN - taken)
    return strip


def _row(pictures: Sequence[Image.Image], width: int, labels: Sequence[str] = ()) -> Image.Image:
    """Set pictures in columns of equal width, each centred, with its label above it."""
    top = 30 if labels else 0
    strip = _blank(width, top + max(picture.height for picture in pictures) + GAP)
    slot = _slot(width, len(pictures))
    for column, picture in enumerate(pictures):
        left = MARGIN + column * (slot + GAP) + (slot - picture.width) // 2
        strip.paste(picture, (left, top))
        if labels:
            _write(_pen(strip), (left, top - 10), labels[column], _font(19), max(slot, picture.width))
    return strip


def _slot(width: int, columns: int) -> int:
    return max(1, (width - 2 * MARGIN - (columns - 1) * GAP) // columns)


def _tag(draw: ImageDraw.ImageDraw, x: int, y: int, number: int, size: int) -> None:
    """Draw a small numbered square whose top left corner is x, y."""
    draw.rectangle((x, y, x + size - 1, y + size - 1), fill=OUTLINE)
    middle = (x + size / 2, y + size / 2)
    draw.text(middle, str(number), font=_font(size * 2 // 3, bold=True), fill=BACKGROUND, anchor="mm")


def _mark(picture: Image.Image, places: Sequence[Region], scale: tuple[float, float]) -> None:
    """Outline the places, white within black so that it shows on anything, and number them."""
    draw = _pen(picture)
    for number, place in enumerate(places, 1):
        left, top = round(place.x * scale[0]), round(place.y * scale[1])
        right = min(picture.width, round((place.x + place.width) * scale[0])) - 1
        bottom = min(picture.height, round((place.y + place.height) * scale[1])) - 1
        if right - left < 6 or bottom - top < 6:
            continue
        draw.rectangle((left, top, right, bottom), outline=(0, 0, 0), width=3)
        draw.rectangle((left + 1, top + 1, right - 1, bottom - 1), outline=OUTLINE)
        if min(right - left, bottom - top) >= 24:
            _tag(draw, left + 1, top + 1, number, 18)


def _overview(pixels: Array, places: Sequence[Region], slot: int, tallest: int) -> Image.Image:
    small = fit(pixels, slot, tallest)
    picture = _picture(small)
    _mark(picture, places, (small.shape[1] / pixels.shape[1], small.shape[0] / pixels.shape[0]))
    return picture


def _details(photos: Sequence[Array], places: Sequence[Region], factor: int, width: int) -> list[Image.Image]:
    strips = []
    for number, place in enumerate(places, 1):
        pictures = [_picture(enlarge(to_bytes(place.cut(pixels)), factor)) for pixels in photos]
        for picture in pictures:
            if min(picture.size) >= 48:
                _tag(_pen(picture), 0, 0, number, 24)
        strips.append(_row(pictures, width))
    return strips


def _caption(text: str, width: int, baseline: int = 24) -> Image.Image:
    strip = _blank(width, 36)
    _write(_pen(strip), (MARGIN, baseline), text, _font(15), width - 2 * MARGIN, MUTED)
    return strip


def compare(  # noqa: PLR0913 - what a sheet may say
    before: Array,
    after: Array,
    path: Path,
    *,
    title: str = "",
    labels: Sequence[str] = ("before", "after"),
    more: Sequence[Array] = (),
    crops: int = 3,
    width: int = 1600,
    icc: bytes = b"",
) -> None:
    """Write a before/after sheet as PNG: the photos, and below them where detail changed most.

    The details are shown at 100 %, or enlarged by a whole factor where the photo is small; outlines
    on the photo "after" say where they come from. A very wide photo is stacked.

    Args:
        before: ``(H, W, 3)`` RGB or ``(H, W)`` grey, uint8, uint16 (full range) or float (0..1); 1x1 and up.
        after: The same; where its size differs, ``before`` is scaled to it.
        path: The file to write.
        title: Line at the top, such as the photo's name.
        labels: What stands above the photos.
        more: Others to be shown beside them, of the size of ``after``.
        crops: Details wanted; 0 shows none.
        width: Of the sheet, in pixels, at least 320.
        icc: The photo's ICC profile, so that the sheet shows its colours.

    Raises:
        ImgtoolError: The file cannot be written.
    """
    before = same_size(before, after)
    height, wide = after.shape[:2]
    width = max(320, width)
    slot = _slot(width, 2 + len(more))
    factor, size = detail_view((wide, height), (slot, slot * 21 // 50), 0.45)
    places = regions(before, after, crops, size) if crops > 0 and size != (wide, height) else []
    stacked = wide > 2.4 * height
    room = _slot(width, 1) if stacked else slot
    tallest = TALLEST * width // 1600
    photos = [before, after, *more]
    pictures = [_overview(each, places if each is after else (), room, tallest) for each in photos]
    strips = [_heading(title, f"{wide} × {height}", width)]
    if stacked:
        strips += [_row([picture], width, [label]) for picture, label in zip(pictures, labels, strict=True)]
    else:
        strips.append(_row(pictures, width, labels))
    if places:
        note = f"{100 * factor} %, where detail changed most: {' | '.join(labels)}"
        strips.append(_caption(note, width))
    _pile(strips + _details(photos, places, factor, width), path, icc)


LONGEST_EDGE = 65_500
"""Of a JPEG, in pixels."""


def side_by_side(before: Array, after: Array, path: Path, quality: int = 95, icc: bytes = b"") -> float:
    """Write before and after in one JPEG at full size; ``before`` is scaled to the height of ``after``.

    Args:
        before: As for ``compare``.
        after: The same.
        path: The file to write.
        quality: 1..100.
        icc: The photo's ICC profile.

    Returns:
        The scale: 1, or less where both together are larger than a JPEG can be.

    Raises:
        ImgtoolError: The file cannot be written.
    """
    import numpy as np

    height = after.shape[0]
    width = max(1, round(before.shape[1] * height / before.shape[0]))
    scale: float = min(1.0, LONGEST_EDGE / (width + after.shape[1]), LONGEST_EDGE / height)
    high = max(1, math.floor(height * scale))
    pictures = [
        _sized(pixels, max(1, math.floor(wide * scale)), high)
        for pixels, wide in ((before, width), (after, after.shape[1]))
    ]
    data = io.BytesIO()
    options = {
        "quality": quality,
        "subsampling": 0 if quality >= 90 else 2,
        "icc_profile": colour_profile(icc),
    }
    _picture(np.hstack(pictures)).save(data, "JPEG", **options)
    write(path, data.getvalue())
    return scale


def _sized(pixels: Array, width: int, height: int) -> Bytes:
    """Return uint8 RGB of exactly this size."""
    import cv2

    if pixels.shape[:2] == (height, width):
        return to_bytes(pixels)
    way = cv2.INTER_AREA if width < pixels.shape[1] else cv2.INTER_CUBIC
    return to_bytes(cv2.resize(pixels, (width, height), interpolation=way))


def sheet(
    rows: Mapping[str, Array],
    path: Path,
    *,
    title: str = "",
    captions: Sequence[str] | None = None,
    width: int = 1600,
) -> None:
    """Write a sample sheet as PNG: a column for each label, a row for each sample.

    Args:
        rows: Label to images ``(N, H, W, 3)``; types as for ``compare``. All have the same N.
        path: The file to write.
        title: Line at the top.
        captions: A line below each row, N of them.
        width: Largest width of the sheet in pixels; it is narrower where the images are small.

    Raises:
        ValueError: The counts differ.
        ImgtoolError: The file cannot be written.
    """
    counts = {len(images) for images in rows.values()}
    if len(counts) > 1 or (captions is not None and counts and len(captions) not in counts):
        raise ValueError("every column and the captions need the same number of samples")
    columns = max(1, len(rows))
    slot = _slot(max(320, width), columns)
    pictures = [[_picture(fit(image, slot, 2 * slot)) for image in images] for images in rows.values()]
    widest = max((picture.width for column in pictures for picture in column), default=slot)
    room = max(320, 2 * MARGIN + columns * widest + (columns - 1) * GAP)
    strips = [_heading(title, "", room)]
    for number, samples in enumerate(zip(*pictures, strict=True)):
        strips.append(_row(samples, room, list(rows) if number == 0 else ()))
        if captions is not None:
            strips.append(_caption(captions[number], room, 13))
    _pile(strips, path)


def grid(tiles: Mapping[str, Array], *, title: str = "", columns: int = 3, width: int = 1600) -> bytes:
    """Return a sheet of labelled pictures as PNG, filled row by row.

    Args:
        tiles: Label to picture; types as for ``compare``.
        title: Line at the top.
        columns: Pictures in a row.
        width: Of the sheet, in pixels, at least 320.
    """
    width = max(320, width)
    slot = _slot(width, columns)
    labels = list(tiles)
    pictures = [_picture(fit(tile, slot, slot)) for tile in tiles.values()]
    strips = [_heading(title, "", width)]
    for first in range(0, len(pictures), columns):
        row, told = pictures[first : first + columns], labels[first : first + columns]
        row += [_blank(1, 1)] * (columns - len(row))
        strips.append(_row(row, width, [*told, *[""] * (columns - len(told))]))
    return _packed(strips)
