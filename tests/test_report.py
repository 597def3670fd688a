"""The report: one page that needs nothing else, whatever the photos are called."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from imgtool import report
from imgtool.errors import ImgtoolError

HOSTILE = "<script>alert(1)</script>.jpg"


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def pixels(height=80, width=120, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def written(entries, tmp_path, **options):
    path = tmp_path / "report" / "index.html"
    report.page(entries, path, **({"title": "Photos", "about": {}} | options))
    assert [entry.name for entry in path.parent.iterdir()] == ["index.html"]
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def decoded(data):
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.format == "JPEG"
        return np.asarray(picture).astype(int)


def test_entry_holds_small_pictures_and_details_in_full_resolution():
    after = np.repeat(np.repeat(pixels(400, 600), 4, axis=0), 4, axis=1)
    before = after.copy()
    before[400:720, 800:1280] = 128
    entry = report.entry("a.jpg", before, after, {"seconds": 1.5}, details=1)
    assert entry.size == (2400, 1600)
    assert decoded(entry.before).shape == decoded(entry.after).shape == (1067, 1600, 3)
    (detail,) = entry.details
    assert (detail.factor, detail.width, detail.height) == (1, 480, 320)
    x, y = round(detail.place[0] * 2400), round(detail.place[1] * 1600)
    error = np.abs(decoded(detail.after) - after[y : y + 320, x : x + 480])
    assert error.mean() < 4
    assert np.abs(decoded(detail.before) - 128).mean() < 4


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (5, 9), (61, 37)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_entry_of_any_photo(size, dtype, tmp_path):
    top = 1.0 if dtype == np.float32 else np.iinfo(dtype).max
    after = (np.random.default_rng(0).random((*size, 3)) * top).astype(dtype)
    entry = report.entry("a.jpg", after // 2, after, {})
    assert max(decoded(entry.after).shape[:2]) == min(1600, max(size))
    assert not entry.error
    written([entry], tmp_path)


def test_entry_keeps_the_profile():
    profile = bytes(16) + b"RGB " + bytes(108)
    entry = report.entry("a.jpg", pixels(), pixels(seed=1), {}, icc=profile)
    with Image.open(io.BytesIO(entry.after)) as picture:
        assert picture.info["icc_profile"] == profile


def test_page_has_a_labelled_slider_with_both_pictures_for_every_photo(tmp_path):
    photos = [pixels(240, 360, seed) for seed in range(4)]
    entries = [report.entry(f"{n}.jpg", photo // 2, photo, {}, details=2) for n, photo in enumerate(photos)]
    _, page = written(entries, tmp_path)
    sliders = [tag for tag in page.all("input") if tag["type"] == "range"]
    assert len(sliders) == 4 * (1 + 2)
    assert all(tag["aria-label"] for tag in sliders)
    pictures = [
        base64.b64decode(tag["src"].removeprefix("data:image/jpeg;base64,")) for tag in page.all("img")
    ]
    for entry in entries:
        wanted = [entry.after, entry.before]
        assert any(pictures[n : n + 2] == wanted for n in range(0, len(pictures), 2))
    assert all(tag["alt"] for tag in page.all("img"))
    assert [tag["href"] for tag in page.all("a")] == [f"#photo-{n}" for n in range(1, 5)]


def test_page_needs_nothing_else(tmp_path):
    html, page = written([report.entry("a.jpg", pixels(), pixels(), {})], tmp_path)
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert re.match(r"(data:|#|$)", attributes.get(name) or ""), attributes
    assert not page.all("iframe")
    assert not re.search(r"https?:|url\(|@import|fetch\(", re.sub(r"base64,[^\"]+", "", html))
    assert any("default-src 'none'" in (tag.get("content") or "") for tag in page.all("meta"))


def test_names_facts_and_errors_are_text_not_markup(tmp_path):
    good = report.entry(HOSTILE, pixels(), pixels(), {HOSTILE: HOSTILE, "list": [HOSTILE]})
    bad = report.failed('"><img src=x onerror=alert(1)>', "<b>broken</b>", "<i>hint</i>")
    html, page = written([good, bad], tmp_path, title=HOSTILE, about={HOSTILE: "</style>"})
    assert len(page.all("script")) == 1
    assert not page.all("i")
    assert all((tag["src"] or "").startswith("data:") for tag in page.all("img"))
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "<script>alert" not in html
    assert page.text.count(HOSTILE) >= 5


def test_failures_are_listed_without_pictures(tmp_path):
    entries = [report.failed("broken.jpg", "the file is truncated", "copy it again")]
    _, page = written(entries, tmp_path)
    for words in ("broken.jpg", "the file is truncated", "copy it again", "0 photos", "1 failed"):
        assert words in page.text
    assert not page.all("img")
    assert not page.all("input")


def test_facts_are_readable():
    facts = {
        "seconds": 1.23456789,
        "flag": True,
        "none": None,
        "gains": [1.5, 2],
        "nested": {"k1": -0.000123456},
    }
    assert [report.plain(value) for value in facts.values()] == [
        "1.235",
        "yes",
        "none",
        "1.5, 2",
        "k1 -0.0001235",
    ]


def test_an_empty_page_and_a_name_that_is_no_unicode(tmp_path):
    written([], tmp_path)
    _, page = written([report.failed("bad\udce9name.jpg", "no such file")], tmp_path)
    assert "bad?name.jpg" in page.text


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ImgtoolError):
        report.page([], tmp_path / "file" / "index.html", title="", about={})
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_a_hundred_photos_stay_usable(tmp_path):
    entry = report.entry("a.jpg", pixels(1000, 1600) // 2, pixels(1000, 1600), {})
    held = sum(
        map(
            len,
            [
                entry.before,
                entry.after,
                *(d.before for d in entry.details),
                *(d.after for d in entry.details),
            ],
        )
    )
    html, page = written([entry] * 100, tmp_path)
    assert len(page.all("article")) == 100
    # Base64 takes 4 bytes for 3; the rest of the page must be small beside the pictures.
    assert len(html) < 100 * held * 4 / 3 + 1_000_000


def test_noise_at_any_size_can_be_encoded():
    """Pillow's encoder gave up on noisy pictures of some sizes when asked to optimise them."""
    noise = pixels(160, 240)
    entry = report.entry("noise.jpg", noise, noise, {})
    assert entry.details
    assert decoded(entry.details[0].after).shape[2] == 3
