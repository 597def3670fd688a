"""Metadata as bytes: EXIF blocks, XMP packets, the chunks of PNG and the directories of TIFF.

An EXIF block is a small TIFF file. It is patched in place, never rebuilt, so that maker notes, which
hold offsets of their own, stay readable; only from TIFF to another format and back is it rebuilt.
"""

from __future__ import annotations

import io
import mmap
import re
import struct
import zlib
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from typing import BinaryIO, NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat
from xml.sax.saxutils import quoteattr

ORIENTATION, EXIF_IFD, GPS_IFD, INTEROP_IFD = 0x0112, 0x8769, 0x8825, 0xA005
ICC, XMP, DNG_VERSION, SUBFILE_TYPE, MAKER_NOTE = 34675, 700, 50706, 254, 0x927C
_WIDTH, _HEIGHT = 0xA002, 0xA003
_RESOLUTION_UNIT, _RESOLUTION = 296, (282, 283, 296)
_POINTERS = (EXIF_IFD, GPS_IFD, INTEROP_IFD)
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
# A hostile directory may point at the whole file hundreds of times.
_MOST_ENTRIES, _LONGEST = 500, 1 << 20
_DIRECTORY = 4 << 20  # bytes at the beginning of a TIFF of ours that hold its directory
_PORTABLE = frozenset(
    # Description, maker, model, orientation, resolution, software, date, artist, host, rating,
    # copyright, Windows' own texts, Exif and GPS: what is said of the photo and not of its storage.
    [
        270,
        271,
        272,
        274,
        282,
        283,
        296,
        305,
        306,
        315,
        316,
        18246,
        33432,
        *range(40091, 40096),
        EXIF_IFD,
        GPS_IFD,
    ]
)
_PNG = b"\x89PNG\r\n\x1a\n"
Data = bytes | mmap.mmap
"""A file's content, or the file mapped into memory."""

AUX = ("http://ns.adobe.com/exif/1.0/aux/", "aux")
"""Adobe's namespace of lens and camera properties, and its usual prefix."""

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_ATTRIBUTE = re.compile(rb"\s+([^\s=<>/]+)\s*=\s*(?:\"[^\"]*\"|'[^']*')")
_TAG = re.compile(rb"<[^\s<>/]+(?:" + _ATTRIBUTE.pattern + rb")*\s*/?>")
_BOM, _AROUND = b"\xef\xbb\xbf", b"\0 \t\r\n"
_PACKET = (
    b'<?xpacket begin="' + _BOM + b'" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="' + _RDF.encode() + b'">'
    b'</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)
_XMP_ORIENTATION = re.compile(rb"(tiff:Orientation\s*=\s*[\"']|<tiff:Orientation>\s*)[2-8]")


class Entry(NamedTuple):
    """One entry of a TIFF directory; ``children`` are those of the directory it points to."""

    tag: int
    kind: int
    number: int
    value: bytes
    children: tuple[Entry, ...] = ()


def byte_order(data: Data) -> str:
    """Return struct's sign for the byte order of a TIFF structure: "<", ">", or "" where it is none.

    A BigTIFF, whose offsets are longer, counts as none.
    """
    order = {b"II": "<", b"MM": ">"}.get(data[:2], "") if len(data) >= 8 else ""
    return "" if data[2:4] in (b"+\0", b"\0+") else order


def _positions(data: Data, offset: int, order: str) -> dict[int, int]:
    """Map each tag of the directory at ``offset`` to the position of its entry; {} where it is broken."""
    if not 8 <= offset <= len(data) - 2:
        return {}
    (count,) = struct.unpack_from(order + "H", data, offset)
    starts = range(offset + 2, offset + 2 + 12 * count, 12)
    if starts.stop > len(data) or count > _MOST_ENTRIES:
        return {}
    return {struct.unpack_from(order + "H", data, start)[0]: start for start in starts}


def _first(data: Data, order: str) -> int:
    return int(struct.unpack_from(order + "I", data, 4)[0])


def _entry(data: Data, position: int, order: str, depth: int) -> Entry | None:
    tag, kind, count = struct.unpack_from(order + "HHI", data, position)
    length = _SIZES.get(kind, 0) * count
    start = position + 8 if length <= 4 else struct.unpack_from(order + "I", data, position + 8)[0]
    if length > _LONGEST:
        return None
    value = data[start : start + length]
    if not length or len(value) < length:
        return None
    if tag in _POINTERS and length == 4 and depth < 3:
        inner = entries(data, struct.unpack(order + "I", value)[0], order, depth + 1)
        return Entry(tag, 4, 1, value, inner) if inner else None
    return Entry(tag, kind, count, value)


def entries(data: Data, offset: int, order: str, depth: int = 0) -> tuple[Entry, ...]:
    """Read the TIFF directory at ``offset`` with those below it; broken entries are left out."""
    found = (_entry(data, position, order, depth) for position in _positions(data, offset, order).values())
    return tuple(entry for entry in found if entry)


def directory(found: Collection[Entry], order: str, base: int) -> bytes:
    """Write a TIFF directory that will stand at offset ``base``, its values and sub-directories behind it."""
    head = struct.pack(order + "H", len(found))
    body = b""
    start = base + 2 + 12 * len(found) + 4
    for entry in sorted(found, key=lambda entry: entry.tag):
        value = entry.value
        if entry.children or len(value) > 4:
            place = start + len(body)
            body += directory(entry.children, order, place) if entry.children else value
            body += b"\0" * (len(body) % 2)
            value = struct.pack(order + "I", place)
        head += struct.pack(order + "HHI", entry.tag, entry.kind, entry.number) + value.ljust(4, b"\0")
    return head + struct.pack(order + "I", 0) + body


def exif_of_tiff(data: Data, leave_out: Collection[int] = ()) -> bytes | None:
    """Return an EXIF block with what a TIFF-structured file says of its photo; None if it says nothing.

    Args:
        data: The file.
        leave_out: Tags of the Exif directory that are not taken.
    """
    order = byte_order(data)
    if not order:
        return None
    # Without a unit the resolution says nothing, though TIFF demands that it is there.
    unwanted = _RESOLUTION if tag_value(data, _RESOLUTION_UNIT) == 1 else ()
    told = entries(data, _first(data, order), order)
    kept = [entry for entry in told if entry.tag in _PORTABLE and entry.tag not in unwanted]
    kept = [
        entry._replace(children=tuple(child for child in entry.children if child.tag not in leave_out))
        for entry in kept
    ]
    header = data[:2] + struct.pack(order + "HI", 42, 8)
    return header + directory(kept, order, 8) if kept else None


def exif_of_raw(data: bytes) -> bytes | None:
    """Return what a camera RAW file says of its photo, upright; None if it says nothing or is no TIFF.

    Maker notes are left out: they are large, and hold offsets into the file.
    """
    exif = exif_of_tiff(data, leave_out=(MAKER_NOTE,))
    return upright(exif) if exif else None


@lru_cache(maxsize=1)
def srgb_profile() -> bytes:
    """Return an ICC profile of sRGB (IEC 61966-2-1), the same bytes always."""
    from PIL import ImageCms

    made = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return made[:24] + struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + made[36:]  # when it was made


def tag_value(data: Data, tag: int) -> int | None:
    """Return a short or long number from a TIFF file's first directory, None where there is none."""
    order = byte_order(data)
    position = _positions(data, _first(data, order), order).get(tag) if order else None
    if position is None:
        return None
    kind = struct.unpack_from(order + "H", data, position + 2)[0]
    return int(struct.unpack_from(order + ("H" if kind == 3 else "I"), data, position + 8)[0])


def has_tag(data: Data, tag: int) -> bool:
    """Tell whether a TIFF file's first directory has a tag."""
    order = byte_order(data)
    return bool(order) and tag in _positions(data, _first(data, order), order)


def tag_bytes(data: Data, tag: int) -> bytes | None:
    """Return the bytes of a tag in a TIFF file's first directory, None where there are none."""
    order = byte_order(data)
    position = _positions(data, _first(data, order), order).get(tag) if order else None
    entry = None if position is None else _entry(data, position, order, 0)
    return entry.value if entry else None


def orientation(exif: bytes | None) -> int:
    """Return the EXIF orientation, 1 (upright) to 8; 1 where there is none or a senseless one."""
    value = tag_value(exif, ORIENTATION) if exif else None
    return value if value is not None and 1 <= value <= 8 else 1


def upright(exif: bytes) -> bytes:
    """Reset the orientation of an EXIF block or TIFF file to 1, in place.

    Where it was another, the thumbnail is cut off, as it lies the old way, and where width and height
    change places, so do their tags.
    """
    turned = orientation(exif)
    if turned == 1:
        return exif
    data, order = bytearray(exif), byte_order(exif)
    first = _first(exif, order)
    places = _positions(exif, first, order)
    struct.pack_into(order + "HIHH", data, places[ORIENTATION] + 2, 3, 1, 1, 0)
    after = first + 2 + 12 * struct.unpack_from(order + "H", exif, first)[0]
    data[after : after + 4] = bytes(4) if after + 4 <= len(data) else b""
    inner = tag_value(exif, EXIF_IFD)
    sizes = _positions(exif, inner, order) if inner else {}
    if turned >= 5 and _WIDTH in sizes and _HEIGHT in sizes:
        wide, high = sizes[_WIDTH] + 2, sizes[_HEIGHT] + 2
        data[wide : wide + 10], data[high : high + 10] = exif[high : high + 10], exif[wide : wide + 10]
    return bytes(data)


def upright_xmp(xmp: bytes) -> bytes:
    """Reset the orientation that an XMP packet states to 1."""
    return _XMP_ORIENTATION.sub(rb"\g<1>1", xmp)


def _xmp_tree(xmp: bytes) -> ElementTree.Element | None:
    """Parse an XMP packet; None where it is broken, or declares entities, which XMP has no use for."""
    if b"<!" in xmp.replace(b"<!--", b"").replace(b"<![CDATA[", b"") or b"\0" in xmp.strip(b"\0"):
        return None
    try:
        return ElementTree.fromstring(xmp.strip(_AROUND).removeprefix(_BOM))
    except (ElementTree.ParseError, ValueError, LookupError):
        return None


def xmp_property(xmp: bytes | None, namespace: str, name: str) -> str | None:
    """Return a simple property that an XMP packet states, None where there is none.

    Args:
        xmp: The packet; one that is no XML states nothing.
        namespace: Of the property, such as ``AUX[0]``.
        name: Of the property.
    """
    tree = _xmp_tree(xmp) if xmp else None
    wanted = f"{{{namespace}}}{name}"
    for rdf in () if tree is None else tree.iter(f"{{{_RDF}}}RDF"):
        for description in rdf.findall(f"{{{_RDF}}}Description"):
            found = description.get(wanted, description.findtext(wanted))
            if found is not None:
                return found.strip()
    return None


class _Description(NamedTuple):
    """A description of the photo in an XMP packet.

    Attributes:
        start: Offset of its start tag in bytes.
        tag: The start tag.
        prefixes: Of the namespaces that hold in it, to the namespace.
        about: What it is about, "" for the photo itself.
        elements: Of each property that is an element: namespace}name, offsets of start and end.
    """

    start: int
    tag: bytes
    prefixes: Mapping[str, str]
    about: str
    elements: list[tuple[str, int, int]]


class _Outline:
    """Where in an XMP packet its descriptions are.

    Attributes:
        descriptions: All right below rdf:RDF; not those within properties.
        end: Offset of the end tag of rdf:RDF, -1 where it has none.
        prefixes: Of the namespaces that hold there.
    """

    def __init__(self, packet: bytes) -> None:
        self.descriptions: list[_Description] = []
        self.end, self.prefixes = -1, dict[str, str]()
        self._packet, self._open, self._scope = packet, list[tuple[str, int]](), list[tuple[str, str]]()
        self._parser = parser = expat.ParserCreate(namespace_separator="}")
        parser.StartNamespaceDeclHandler = lambda prefix, uri: self._scope.append((prefix or "", uri or ""))
        parser.EndNamespaceDeclHandler = lambda prefix: self._scope.pop()
        parser.StartElementHandler, parser.EndElementHandler = self._start, self._stop
        parser.Parse(packet, True)

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        place = self._parser.CurrentByteIndex
        if name == f"{_RDF}}}Description" and self._open and self._open[-1][0] == f"{_RDF}}}RDF":
            about = attributes.get(f"{_RDF}}}about", "")
            found = _Description(place, self._tag(place), dict(self._scope), about, [])
            self.descriptions.append(found)
        self._open.append((name, place))

    def _stop(self, name: str) -> None:
        end, (_, start) = self._parser.CurrentByteIndex, self._open.pop()
        tag = self._tag(start)
        if name == f"{_RDF}}}RDF" and not tag.endswith(b"/>"):
            self.end, self.prefixes = end, dict(self._scope)
        if [opened for opened, _ in self._open[-2:]] == [f"{_RDF}}}RDF", f"{_RDF}}}Description"]:
            end = start + len(tag) if tag.endswith(b"/>") else self._packet.index(b">", end) + 1
            self.descriptions[-1].elements.append((name, start, end))

    def _tag(self, start: int) -> bytes:
        match = _TAG.match(self._packet, start)
        return match[0] if match else b""


def with_xmp_properties(
    xmp: bytes | None, namespace: str, prefix: str, properties: Mapping[str, str]
) -> bytes:
    """State simple properties in an XMP packet (ISO 16684-1), without touching the rest of it.

    They are added to the first description that knows their namespace, else to a new one.

    Args:
        xmp: The packet, or None to make one. One that is no XML in UTF-8, or holds no RDF, comes back
            as it is.
        namespace: Of the properties, such as ``AUX[0]``.
        prefix: For the namespace, such as ``AUX[1]``, where the packet has none for it.
        properties: Name to value; an older value is replaced.
    """
    packet = xmp or _PACKET
    if _xmp_tree(packet) is None:
        return packet
    body = packet.strip(_AROUND).removeprefix(_BOM)
    lead, outline = packet.index(body), _Outline(body)
    if outline.end < 0:
        return packet
    for start, end, text in sorted(_edits(outline, namespace, prefix, properties), reverse=True):
        packet = packet[: lead + start] + text + packet[lead + end :]
    return packet


def _edits(
    outline: _Outline, namespace: str, prefix: str, properties: Mapping[str, str]
) -> Iterator[tuple[int, int, bytes]]:
    """Yield start, end and what to put there instead, to state properties once and nothing older."""
    stated, wanted = False, {f"{namespace}}}{name}" for name in properties}
    for description in outline.descriptions:
        bound = [short for short, uri in description.prefixes.items() if uri == namespace and short]
        older = {f"{short}:{name}".encode() for short in bound for name in properties}
        tag = description.tag
        for match in reversed([match for match in _ATTRIBUTE.finditer(tag) if match[1] in older]):
            tag = tag[: match.start()] + tag[match.end() :]
        if bound and not stated:
            place = len(tag) - (2 if tag.endswith(b"/>") else 1)
            tag = tag[:place].rstrip() + _attributes(bound[0], properties) + tag[place:]
            stated = True
        yield description.start, description.start + len(description.tag), tag
        for name, start, end in description.elements:
            if name in wanted:
                yield start, end, b""
    if not stated:
        rdf = "" if outline.prefixes.get("rdf") == _RDF else f' xmlns:rdf="{_RDF}"'
        about = quoteattr(outline.descriptions[0].about if outline.descriptions else "")
        head = f'<rdf:Description{rdf} rdf:about={about} xmlns:{prefix}="{namespace}"'.encode()
        yield outline.end, outline.end, head + _attributes(prefix, properties) + b"/>"


def _attributes(prefix: str, properties: Mapping[str, str]) -> bytes:
    return "".join(f" {prefix}:{name}={quoteattr(value)}" for name, value in properties.items()).encode()


def into_tiff(tiff: bytes, exif: bytes | None, icc: bytes | None, xmp: bytes | None) -> bytes:
    """Add metadata to a TIFF file written in the byte order of ``exif``.

    A new first directory is written behind the file; pixels stay where they are.
    """
    file = io.BytesIO(tiff)
    add_to_tiff(file, exif, icc, xmp)
    return file.getvalue()


def add_to_tiff(file: BinaryIO, exif: bytes | None, icc: bytes | None, xmp: bytes | None) -> None:
    """Add metadata to an open TIFF file, as ``into_tiff`` does.

    Args:
        file: Can be read, written and sought; its first directory is near its beginning.
        exif: EXIF block.
        icc: ICC profile.
        xmp: XMP packet.
    """
    file.seek(0)
    tiff = file.read(_DIRECTORY)
    order = byte_order(tiff)
    found = {entry.tag: entry for entry in entries(tiff, _first(tiff, order), order)}
    told = entries(exif, _first(exif, order), order) if exif and byte_order(exif) == order else ()
    found |= {entry.tag: entry for entry in told if entry.tag in _PORTABLE}
    for tag, kind, value in ((ICC, 7, icc), (XMP, 1, xmp)):
        if value:
            found[tag] = Entry(tag, kind, len(value), value)
    end = file.seek(0, io.SEEK_END)
    base = end + end % 2
    file.write(b"\0" * (base - end) + directory(found.values(), order, base))
    file.seek(4)
    file.write(struct.pack(order + "I", base))


def chunks(data: bytes | memoryview) -> Iterator[tuple[bytes, bytes | memoryview]]:
    """Walk through the chunks of a PNG file.

    Yields:
        Name and whole chunk, its length and check sum included.

    Raises:
        ValueError: The file is cut short or a check sum is wrong.
    """
    place, name = len(_PNG), b""
    while name != b"IEND":
        if place + 12 > len(data):
            raise ValueError("the file ends within a chunk")
        length, name = struct.unpack_from(">I4s", data, place)
        chunk = data[place : place + 12 + length]
        if len(chunk) < 12 + length or zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
            raise ValueError(f"broken chunk {name!r}")
        yield name, chunk
        place += 12 + length


def bare_png(data: bytes) -> bytes:
    """Return a PNG file with nothing but its pixels; raises ValueError as ``chunks`` does."""
    kept = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
    return _PNG + b"".join(chunk for name, chunk in chunks(data) if name in kept)


def png(parts: Collection[tuple[bytes, bytes]]) -> bytes:
    """Write a PNG file from the names and contents of its chunks."""
    return _PNG + b"".join(chunk(name, data) for name, data in parts)


def chunk(name: bytes, data: bytes) -> bytes:
    """Return a chunk of PNG with its length and check sum."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def into_png(data: bytes, exif: bytes | None, icc: bytes | None, xmp: bytes | None) -> bytes:
    """Add metadata to a PNG file that has none, right behind its header."""
    added = b""
    if icc:
        added += chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc))
    if exif:
        added += chunk(b"eXIf", exif)
    if xmp:
        added += chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    header = len(_PNG) + 12 + 13
    return data[:header] + added + data[header:]
