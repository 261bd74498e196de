"""The report in a real browser: pictures are there, nothing is fetched, and it fits a telephone."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.browser import CHROMIUM, Page, chromium
from support.study_fixtures import CONFIG, make_study

from lrope_gguf.plot import COLOURS
from lrope_search.report.page import write_report

pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH"), pytest.mark.pictures]

HOSTILE = "<script>document.title='owned'</script><img src=https://example.org/x onerror=document.title='owned'>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("study")
    return write_report(make_study(directory).summary)


def quiet(page: Page) -> None:
    """Nothing was fetched but the page, and nothing was complained about."""
    requests = [event["request"]["url"] for event in page.told("Network.requestWillBeSent")]
    assert len(requests) == 1 and requests[0].startswith("file:"), requests
    for complaint in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
        assert not page.told(complaint)


def pixels(png: bytes) -> NDArray[np.float64]:
    """Red, green and blue, 0 to 255, shape (height, width, 3)."""
    from matplotlib.image import imread

    return np.asarray(imread(io.BytesIO(png), format="png"), np.float64)[..., :3] * 255.0


def share(image: NDArray[np.float64], colour: str) -> float:
    """The share of pixels near a colour."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return float((np.abs(image - rgb).max(axis=2) < 24).mean())


@pytest.mark.parametrize("width", [320, 400, 760, 1280])
def test_it_fits_the_width(browser: Page, report: Path, width: int) -> None:
    browser.open(report, width=width)
    quiet(browser)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    # and nothing sticks out of a card either, but for tables, which scroll by themselves
    outside = browser.evaluate(
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('svg, .scroll') &&"
        " e.getBoundingClientRect().right > innerWidth).length"
    )
    assert outside == 0
    if width >= 400:  # tables need no scrolling
        assert browser.evaluate("[...document.querySelectorAll('.scroll')].every(e => e.scrollWidth <= e.clientWidth)")


@pytest.mark.parametrize("dark", [False, True])
def test_the_pictures_are_shown(browser: Page, report: Path, dark: bool) -> None:
    browser.open(report, width=1280, dark=dark)
    names = browser.evaluate("[...document.querySelectorAll('figure')].map(e => e.id)")
    assert names == ["factors", "accuracy", "fitness", "population", "cost"]
    drawn = {name: pixels(browser.screenshot(f"#{name} svg")) for name in names}
    for name, image in drawn.items():
        height, width, _ = image.shape
        assert width > 450 and height > 150
        background = image[2, 2]
        assert (background.mean() < 60) == dark
        strokes = (np.abs(image - background).max(axis=2) > 48).mean()
        assert 0.01 < strokes < 0.5, name
    curve = "#ff8a3c" if dark else "#c65600"
    for name in ("factors", "accuracy", "fitness", "population"):
        assert share(drawn[name], curve) > 0.001, name
    assert share(drawn["cost"], "#5ab4ee" if dark else "#0072b2") > 0.03


def test_text_in_pictures_is_inside_them_and_readable_on_a_telephone(browser: Page, report: Path) -> None:
    browser.open(report, width=400)
    smallest = browser.evaluate("Math.min(...[...document.querySelectorAll('svg text')].map(e =>"
                                " parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a ||"
                                " parseFloat(getComputedStyle(e).fontSize) * Math.abs(e.getScreenCTM().b)))"
                                )  # fmt: skip
    assert smallest > 6.5
    outside = browser.evaluate(
        "[...document.querySelectorAll('svg')].flatMap(s => { const b = s.getBoundingClientRect();"
        " return [...s.querySelectorAll('text')].filter(t => { const c = t.getBoundingClientRect();"
        " return c.left < b.left - 2 || c.right > b.right + 2 || c.top < b.top - 2 || c.bottom > b.bottom + 2; })"
        ".map(t => t.textContent); })"
    )
    assert outside == []


def test_it_can_be_read_without_eyes(browser: Page, report: Path) -> None:
    browser.open(report, width=1280)
    tree = browser.call("Accessibility.getFullAXTree")["nodes"]
    images = [n for n in tree if n.get("role", {}).get("value") in ("image", "img")]
    names = [n["name"]["value"] for n in images]
    assert names == [
        "Factors over the layers", "Accuracy by depth", "Fitness over evaluations", "The population over time", "Cost"
    ]  # fmt: skip
    assert all(len(n["description"]["value"]) > 40 for n in images)
    assert browser.evaluate("[...document.querySelectorAll('table')].every(t => t.caption && t.tHead)")
    ids = browser.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


def test_contrast_of_text(browser: Page, report: Path) -> None:
    script = (
        "[...document.querySelectorAll('h2, p, small, figcaption, dt, th, td')].map(e => [getComputedStyle(e).color,"
        " getComputedStyle(e.closest('.card') || document.body).backgroundColor])"
    )

    def luminance(colour: str) -> float:
        values = [float(v) / 255.0 for v in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for dark in (False, True):
        browser.open(report, width=1280, dark=dark)
        for text, behind in {tuple(pair) for pair in browser.evaluate(script)}:
            low, high = sorted((luminance(text), luminance(behind)))
            assert (high + 0.05) / (low + 0.05) > 4.5, (text, behind)  # WCAG 2.2, level AA


def test_hostile_names_do_nothing(browser: Page, tmp_path: Path) -> None:
    config = CONFIG | {"model": {"name": HOSTILE * 3}, "task": {"task": HOSTILE, HOSTILE: ["x" * 500, HOSTILE]}}

    browser.open(write_report(make_study(tmp_path, config=config).summary), width=400)
    quiet(browser)
    assert browser.evaluate("document.querySelectorAll('script, img').length") == 0
    assert browser.evaluate("document.title").startswith("Layer factors of <script>")
    assert browser.evaluate("document.documentElement.scrollWidth") == 400


def test_png_files_show_the_same(report: Path) -> None:
    for name in ("factors", "accuracy", "fitness", "population"):
        image = pixels((report.parent / f"report-{name}.png").read_bytes())
        assert share(image, COLOURS["curve"]) > 0.001 and share(image, COLOURS["paper"]) > 0.5
