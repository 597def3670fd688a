"""Lengths of an exported network: what --size and --dynamic make of its axes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from toys import picture

from imgtool.errors import ImgtoolError
from imgtool.export.order import lengths, read_size
from imgtool.port import Axis, axis_of, length

PORT = replace(
    picture(),
    axes={"batch": Axis(1), "height": Axis(64, 8, 16), "width": Axis(96, 2), "lights": Axis(5, free=False)},
)


@pytest.mark.parametrize(("word", "wanted"), [(3, 3), ("height", 6), ("2*height", 12), ("height/3", 2)])
def test_a_length_is_a_number_or_follows_an_axis(word: int | str, wanted: int) -> None:
    assert length(word, {"height": 6}) == wanted
    assert axis_of(word) == ("" if word == 3 else "height")


@pytest.mark.parametrize("text", ["", "640", "640x", "0x480", "640x480x3", "-1x5", "1e3x5", "9999999x1"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ImgtoolError, match="is no size") as fault:
        read_size(text, "--size")
    assert fault.value.code == 1
    assert "--size 1080x1920" in fault.value.hint


def test_a_size_is_height_by_width() -> None:
    assert read_size("480x640", "--size") == read_size(" 480 × 640 ", "--size") == (480, 640)


def test_without_a_size_lengths_stay_free_where_the_format_can() -> None:
    assert lengths(PORT, "", False, True)[1] == {"batch", "height", "width"}
    sizes, free = lengths(PORT, "", False, False)
    assert not free
    assert sizes == {"batch": 1, "height": 64, "width": 96, "lights": 5}


def test_a_size_fixes_them_unless_they_shall_stay_free() -> None:
    sizes, free = lengths(PORT, "80x32", False, True)
    assert (sizes["height"], sizes["width"], free) == (80, 32, frozenset())
    assert lengths(PORT, "80x32", True, True)[1] == {"batch", "height", "width"}


@pytest.mark.parametrize(
    ("size", "words", "near"),
    [
        ("81x32", "a height of 81 is not possible", "16 or more, a multiple of 8, such as 88"),
        ("8x32", "a height of 8 is not possible", "such as 16"),
        ("80x33", "a width of 33 is not possible", "a multiple of 2, such as 34"),
    ],
)
def test_a_wrong_size_names_the_rule_and_the_nearest(size: str, words: str, near: str) -> None:
    with pytest.raises(ImgtoolError, match=words) as fault:
        lengths(PORT, size, False, True)
    assert near in fault.value.hint
    assert fault.value.code == 1


def test_a_network_without_pictures_takes_no_size() -> None:
    with pytest.raises(ImgtoolError, match="takes no pictures of a size"):
        lengths(replace(PORT, axes={"batch": Axis(1)}), "80x80", False, True)
