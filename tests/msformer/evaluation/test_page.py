"""The report in a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from markupsafe import Markup

from msformer.cli import main
from msformer.evaluation.page import Shown
from msformer.evaluation.protocols import PROTOCOLS
from msformer.page import rendered
from msformer.pictures import picture_url
from tests.msformer.evaluation import data

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation with spaces & ümlaut" + "_and_a_long_name" * 5)
    data.make_pairs(folder / "data", ("a <b>", "b", "c", "empty"))
    data.save(folder / "data" / "masks" / "empty.png", np.zeros((40, 48), np.uint8))
    data.save(folder / "data" / "masks" / "alone.png", np.zeros((40, 48), np.uint8))
    arguments = ["--methods", "everything,otsu,kmeans-3", "--size", "40", "--out", str(folder / "out")]
    done = CliRunner().invoke(main, ["evaluate", "--data", str(folder / "data"), *arguments])
    assert done.exit_code == 0, done.output
    return folder / "out" / "report.html"


def test_the_page_is_self_contained(report: Path) -> None:
    text = report.read_text()
    assert "http://" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("http://matplotlib.org", ""), "nothing is fetched; namespaces of SVG are names only"
    assert text.count("data:image/webp;base64,") == 4 * (2 + 3 * 2)
    assert "alone.png: has no image" in text
    assert "a &lt;b&gt;" in text
    assert "<b>" not in text.split("a &lt;b&gt;")[0].split("<template")[1]


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["desktop", "phone"])
def page(request: pytest.FixtureRequest, report: Path) -> Iterator[Any]:
    if BROWSER is None:
        pytest.skip("no Chromium here")
    from playwright.sync_api import sync_playwright

    width, height = request.param
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=BROWSER, args=flags)
        opened = browser.new_page(viewport={"width": width, "height": height})
        opened.problems = []
        opened.on("pageerror", lambda error: opened.problems.append(str(error)))
        opened.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else opened.problems.append(r.url))
        opened.goto(report.as_uri())
        yield opened
        browser.close()


def test_in_a_browser(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "no sideways scrolling"
    assert page.locator("table").count() == 4
    assert page.locator(".plot svg").count() == 4
    for image in page.locator("figure img:visible").all():
        image.scroll_into_view_if_needed()
        assert image.evaluate("i => i.decode().then(() => i.naturalWidth)") == 160

    def order() -> list[str]:
        return page.locator("article h3").all_inner_texts()

    def scores() -> list[float]:
        texts = page.locator("figure.chosen b").all_inner_texts()
        assert texts[-1] == "-", "what has no score stands last"
        return [float(text) for text in texts[:-1]]

    page.select_option("#method", "Otsu")
    page.select_option("#protocol", "oracle")
    page.select_option("#order", "1")
    worst_first = order()
    assert scores() == sorted(scores())
    lefts = [figure.bounding_box()["x"] for figure in page.locator("article").first.locator("figure").all()]
    assert sorted(lefts)[2] == page.locator("figure.chosen").first.bounding_box()["x"], "image, border, chosen"
    page.select_option("#order", "-1")
    assert scores() == sorted(scores(), reverse=True)
    assert set(order()) == set(worst_first) == {"a <b>", "b", "c", "empty"}
    page.select_option("#method", "")
    assert order() == ["a <b>", "b", "c", "empty"]
    assert page.locator(".mask:visible").count() == 0
    page.select_option("#show", "blind")
    assert page.locator(".map:visible").count() == 0
    assert page.locator(".mask:visible").count() == 12
    assert page.problems == []


NAMES = (
    "<script>document.title = 1</script>",
    'a" onmouseover="document.title = 1',
    "\u202egnp.\x1b[31m",
    "病变 آفة 😀",
)


def test_a_thousand_images_of_any_name(tmp_path: Path) -> None:
    """A page of them at a time; usable by keyboard, in the dark, on paper-like contrast; nothing is fetched."""
    if BROWSER is None:
        pytest.skip("no Chromium here")
    from playwright.sync_api import sync_playwright

    path = tmp_path / "report.html"
    path.write_text("".join(page_of([*NAMES, *(f"image {i:03d}" for i in range(996))])), encoding="utf-8")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(color_scheme="dark")
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.goto(path.as_uri())
        assert page.title() == "msformer: evaluation"
        assert page.inner_text("#place") == "images 1 to 20 of 1000"
        assert page.locator("article").count() == 20
        page.fill("#name", "gnp")
        assert page.locator("h3").all_inner_texts() == ["\\u202egnp.\\x1b[31m"]
        page.fill("#name", "")
        page.focus("#on")
        for _ in range(49):
            page.keyboard.press("Enter")
        assert page.inner_text("#place") == "images 981 to 1000 of 1000"
        assert page.evaluate("document.activeElement.id") == "back", "where one goes on from the end"
        assert page.locator("img:not([alt]), select:not(label select), input:not(label input)").count() == 0
        for scheme in ("dark", "light"):
            page.emulate_media(color_scheme=scheme)
            for selector in ("h1", "dt", ".note", "td", "thead th", ".controls label", "button", "figcaption"):
                assert page.evaluate(CONTRAST, selector) >= 4.5, (scheme, selector)
        assert problems == []
        browser.close()


def page_of(names: list[str]) -> Iterator[str]:
    picture = picture_url(np.zeros((8, 8, 3), np.uint8))
    rows = [["<i>Otsu</i>", "81.2"]]
    shown = [Shown(1, "<i>Otsu</i>", picture, picture, dict.fromkeys(PROTOCOLS, "81.2"))]
    method = SimpleNamespace(title="<i>Otsu</i>")
    return rendered(
        "msformer.evaluation",
        "page.html",
        "page.js",
        about={"data": NAMES[0]},
        failures={NAMES[0]: NAMES[1]},
        left_out=NAMES,
        explanation="",
        methods=[method],
        tables=[("blind", "Blind", ["method", "DSC"], rows, Markup("<svg></svg>"))],
        gallery=[(name, picture, picture, shown) for name in names],
        protocols=PROTOCOLS,
        width=160,
    )


CONTRAST = """selector => {
  const element = document.querySelector(selector);
  const luminance = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  let behind = element;
  while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
  const found = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor].map(luminance).sort();
  return (Math.max(...found) + 0.05) / (Math.min(...found) + 0.05);
}"""
