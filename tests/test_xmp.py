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


CRS = "http://ns.adobe.com/camera-raw-settings/1.0/"
LIGHTROOM = packet(
    '\n<rdf:Description rdf:about="x" xmlns:dc="http://purl.org/dc/elements/1.1/" dc:format="a &gt; b"/>\n'
    f"<rdf:Description rdf:about='x' xmlns:c='{CRS}' c:Tint='-4'\n  c:Exposure2012=' c:Tint=\"9\" >' >\n"
    "<c:Temperature>3000</c:Temperature><!-- c:Tint='2' --><c:Shadows>5</c:Shadows>\n"
    "<c:Look><rdf:Description c:Tint='7'><c:Temperature>1</c:Temperature></rdf:Description></c:Look>"
    "</rdf:Description>"
)


def test_properties_join_those_of_their_namespace() -> None:
    after = metadata.with_xmp_properties(LIGHTROOM, CRS, "crs", {"Temperature": "5100", "Tint": "<+2>"})
    before, found = ElementTree.fromstring(LIGHTROOM), ElementTree.fromstring(after)
    # The first of two descriptions is as it was, the other has changed in these two properties alone.
    settings = found[0][1]
    assert settings.attrib.pop(f"{{{CRS}}}Temperature") == "5100"
    assert settings.attrib.pop(f"{{{CRS}}}Tint") == "<+2>"
    del before[0][1].attrib[f"{{{CRS}}}Tint"]
    before[0][1].remove(before[0][1][0])
    assert ElementTree.tostring(found) == ElementTree.tostring(before)
    assert after.count(b"xmlns:") == LIGHTROOM.count(b"xmlns:")
    assert metadata.xmp_property(after, CRS, "Tint") == "<+2>"


@pytest.mark.parametrize("mark", ["rdf", "r"])
def test_a_new_description_is_about_the_same_and_named_as_usual(mark: str) -> None:
    older = packet('<rdf:Description rdf:about="photo"/>').replace(b"rdf:", mark.encode() + b":")
    older = older.replace(b":rdf=", f":{mark}=".encode())
    after = metadata.with_xmp_properties(older, NAMESPACE, PREFIX, {MARK: "True"})
    assert b"<rdf:Description" in after
    about = [element.attrib for element in ElementTree.fromstring(after)[0]]
    name = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}about"
    assert [facts.get(name) for facts in about] == ["photo", "photo"]
    assert read(after) == "True"


def test_what_a_property_holds_is_no_property_of_the_photo() -> None:
    inner = f'<x:y xmlns:x="x:"><rdf:Description xmlns:aux="{NAMESPACE}" aux:{MARK}="False"/></x:y>'
    older = packet(f"<rdf:Description>{inner}</rdf:Description>")
    assert read(older) is None
    after = metadata.with_xmp_properties(older, NAMESPACE, PREFIX, {MARK: "True"})
    assert inner.encode() in after
    assert read(after) == "True"


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
