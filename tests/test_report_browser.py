"""The report in a real browser: the slider moves by click, drag and keys, and no error is logged."""

import io
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from imgtool import report

pytestmark = pytest.mark.slow

SIZE = "--window-size=1200,1000"
RED, BLUE = (200, 30, 30), (30, 30, 200)


@pytest.fixture
def browser(monkeypatch):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs the package selenium")
    from selenium.webdriver.chrome.service import Service

    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs Chromium and chromedriver, e.g. apt-get install chromium chromium-driver")
    monkeypatch.setenv("SE_OFFLINE", "true")  # never download another driver
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    arguments = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", SIZE]
    # Chromium's sandbox refuses to run as root, which is what containers have.
    for argument in arguments + ["--no-sandbox"] * (os.geteuid() == 0):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    session = webdriver.Chrome(options=options, service=Service(driver))
    yield session
    session.quit()


@pytest.fixture
def page(browser, tmp_path):
    red, blue = (np.full((300, 600, 3), colour, np.uint8) for colour in (RED, BLUE))
    name = "<script>alert(1)</script>.jpg"
    entries = [report.entry(name, red, blue, {"seconds": 1.0}), report.failed(name, "broken", "mend it")]
    report.page(entries, tmp_path / "index.html", title=name, about={"engine": "deblur"})
    browser.get((tmp_path / "index.html").as_uri())
    # Pictures are decoded beside the page: wait until both can be drawn.
    browser.execute_async_script(
        "const done = arguments[0]; Promise.all([...document.images].map((i) => i.decode())).then(() => "
        "requestAnimationFrame(() => requestAnimationFrame(() => done())));"
    )
    return browser


def slider(page):
    found = page.find_element("css selector", ".slider")
    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", found)
    return found


def split(page):
    """Return the share of the slider's width that is drawn red, seen in a screenshot."""
    with Image.open(io.BytesIO(slider(page).screenshot_as_png)) as picture:
        row = np.asarray(picture.convert("RGB"))[picture.height // 4].astype(int)
    red = np.abs(row - RED).max(axis=1) < 40
    blue = np.abs(row - BLUE).max(axis=1) < 40
    assert red.sum() + blue.sum() > 0.95 * len(row)
    assert not red.any() or not blue.any() or np.nonzero(red)[0].max() < np.nonzero(blue)[0].min()
    return red.sum() / len(row)


def reach(page, share):
    """Return the offset from the slider's middle of a share of its width."""
    return round((share - 0.5) * slider(page).size["width"])


def test_the_slider_follows_clicks_drags_and_keys(page):
    from selenium.webdriver import ActionChains, Keys

    assert split(page) == pytest.approx(0.5, abs=0.02)

    ActionChains(page).move_to_element_with_offset(slider(page), reach(page, 0.8), 60).click().perform()
    assert split(page) == pytest.approx(0.8, abs=0.02)

    start, end = reach(page, 0.6), reach(page, 0.2)
    drag = ActionChains(page).move_to_element_with_offset(slider(page), start, 60).click_and_hold()
    drag.move_by_offset(end - start, 10).release().move_by_offset(100, 0).perform()
    assert split(page) == pytest.approx(0.2, abs=0.02)

    ActionChains(page).send_keys(Keys.ARROW_RIGHT * 10).perform()
    field = page.switch_to.active_element
    assert field.get_attribute("type") == "range"
    assert field.get_attribute("value") == "30"
    assert field.get_attribute("aria-valuetext") == "30 % before"
    assert split(page) == pytest.approx(0.3, abs=0.02)

    ActionChains(page).send_keys(Keys.HOME).perform()
    assert split(page) == pytest.approx(0, abs=0.01)
    page.find_element("css selector", "[data-share='1']").click()
    assert split(page) == pytest.approx(1, abs=0.01)
    assert page.get_log("browser") == []


def test_details_open_and_slide_by_themselves(page):
    from selenium.webdriver import ActionChains

    assert not page.find_element("css selector", ".crops").is_displayed()
    page.find_element("css selector", "article summary").click()
    crop = page.find_element("css selector", ".crops .slider")
    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", crop)
    assert crop.is_displayed()
    ActionChains(page).move_to_element_with_offset(crop, crop.size["width"] // 4, 0).click().perform()
    assert crop.find_element("css selector", "input").get_attribute("value") in {"74", "75", "76"}
    assert split(page) == pytest.approx(0.5, abs=0.02)
    assert page.get_log("browser") == []


def test_the_page_asks_the_network_for_nothing(page):
    names = page.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in names if not name.startswith("data:")] == []
    assert page.title == "<script>alert(1)</script>.jpg"


def test_without_scripts_both_pictures_stand_side_by_side(page):
    page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    page.refresh()
    before, after = page.find_elements("css selector", ".slider img.before, .slider img.after")[:2][::-1]
    assert before.rect["x"] + before.rect["width"] <= after.rect["x"]
