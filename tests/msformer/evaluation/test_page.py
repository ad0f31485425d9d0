"""The report in a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from msformer.cli import main
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
