"""XML that strangers wrote, read with care; and XML written."""

from __future__ import annotations

from collections.abc import Mapping
from xml.etree import ElementTree
from xml.parsers import expat

from imgtool.engines.lens.formats.frame import number
from imgtool.errors import ImgtoolError

DEEPEST = 64
"""Levels of an XML file at most."""


def parsed(text: str) -> ElementTree.Element:
    """Parse XML that has no document type, hence no entities, and is not nested deeply."""
    depth = 0

    def refuse(*_: object) -> None:
        raise ImgtoolError(
            "its XML has a document type, which may hold entities", "remove the line <!DOCTYPE ...>"
        )

    def start(*_: object) -> None:
        nonlocal depth
        depth += 1
        if depth > DEEPEST:
            raise ImgtoolError("its XML is nested too deeply")

    def end(_: object) -> None:
        nonlocal depth
        depth -= 1

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = start, end
    data = text.encode()
    try:
        parser.Parse(data, True)
        return ElementTree.fromstring(data)
    except (expat.ExpatError, ElementTree.ParseError, ValueError, LookupError) as fault:
        raise ImgtoolError(f"damaged XML: {fault}") from None


def attribute(element: ElementTree.Element, name: str, default: float | None = None) -> float:
    """Return a number that an element has as an attribute; the default where it has none."""
    text = element.get(name)
    if text is None:
        if default is None:
            raise ImgtoolError(f"{element.tag} has no {name}")
        return default
    return number(text, name)


def child(parent: ElementTree.Element, tag: str, text: str = "") -> ElementTree.Element:
    """Add an element to another, and return it."""
    added = ElementTree.SubElement(parent, tag)
    added.text = text or None
    return added


def encoded(root: ElementTree.Element) -> bytes:
    """Return XML as the content of a file, indented."""
    ElementTree.indent(root)
    data: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return data + b"\n"


def as_texts(facts: Mapping[str, object]) -> dict[str, str]:
    """Return facts as texts without control characters, which XML cannot hold; empty ones are left out."""
    texts = {
        name: "".join(filter(str.isprintable, str(value)))
        for name, value in facts.items()
        if value is not None
    }
    return {name: text for name, text in texts.items() if text}
