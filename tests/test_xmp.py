"""Properties stated in XMP packets, and read from them."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from imgtool.images import metadata

NAMESPACE, PREFIX = metadata.AUX
MARK = "DistortionCorrectionAlreadyApplied"
RDF = 'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"'


def packet(inside: str) -> bytes:
    return (
        '<?xpacket begin="\ufeff" id="x"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        f"<rdf:RDF {RDF}>{inside}</rdf:RDF></x:xmpmeta>"
        '\n   <?xpacket end="w"?>'
    ).encode()


ATTRIBUTE = packet(f'<rdf:Description xmlns:aux="{NAMESPACE}" aux:{MARK}="False" aux:Lens="50 mm"/>')
ELEMENT = packet(f'<rdf:Description xmlns:a="{NAMESPACE}"><a:{MARK}>False</a:{MARK}></rdf:Description>')
OTHER = packet('<rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/" dc:format="image/jpeg"/>')


def read(xmp: bytes | None, name: str = MARK) -> str | None:
    return metadata.xmp_property(xmp, NAMESPACE, name)


def test_both_forms_are_read() -> None:
    assert read(ATTRIBUTE) == read(ELEMENT) == "False"
    assert read(ATTRIBUTE, "Lens") == "50 mm"
    assert read(OTHER) is None
    assert read(None) is None


def test_a_packet_is_made() -> None:
    made = metadata.with_xmp_properties(None, NAMESPACE, PREFIX, {MARK: "True", "Lens": "<\"50\" & '8'>"})
    assert made.startswith(b"<?xpacket begin=")
    assert (read(made), read(made, "Lens")) == ("True", "<\"50\" & '8'>")


@pytest.mark.parametrize("before", [ATTRIBUTE, ELEMENT, OTHER])
def test_a_property_is_stated_once_and_the_rest_stays(before: bytes) -> None:
    after = metadata.with_xmp_properties(before, NAMESPACE, PREFIX, {MARK: "True"})
    assert read(after) == "True"
    assert after.count(MARK.encode()) == 1
    assert read(after, "Lens") == read(before, "Lens")
    assert (b'dc:format="image/jpeg"' in after) == (before == OTHER)
    ElementTree.fromstring(after)
    assert metadata.with_xmp_properties(after, NAMESPACE, PREFIX, {MARK: "True"}).count(MARK.encode()) == 1


BOMB = (
    '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
    f'<rdf:RDF {RDF}><rdf:Description xmlns:aux="{NAMESPACE}" aux:{MARK}="&b;"/></rdf:RDF>'
).encode()


@pytest.mark.parametrize(
    "xmp",
    [
        b"\xff\xfe",
        b"<x",
        b"no xml",
        b"\0",
        BOMB,
        b"<a/>",
        ATTRIBUTE[:-60],
        ATTRIBUTE.decode().encode("utf-16"),
    ],
)
def test_hostile_packets_break_nothing(xmp: bytes) -> None:
    assert read(xmp) is None
    assert metadata.with_xmp_properties(xmp, NAMESPACE, PREFIX, {MARK: "True"}) == xmp
