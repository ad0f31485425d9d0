"""The report of `msformer segment`, as it is written and in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as PILImage

from msformer.page import rendered
from msformer.pictures import picture_url
from msformer.runs.report import LARGEST, SORTED_BY, Article, Shown
from tests.msformer.conftest import QUICK_OPTIONS
from tests.msformer.evaluation.test_page import BROWSER, CONTRAST, NAMES
from tests.msformer.test_cli import run


def test_of_a_run_and_of_the_resumed_one(tmp_path: Path, picture: NDArray[Any]) -> None:
    """Of the same images it is the same, however they came about."""
    images, out = tmp_path / "images", tmp_path / "out"
    (images / "sub").mkdir(parents=True)
    PILImage.fromarray(picture).save(images / "sub" / "a <b> & 100%.png")
    (images / "broken.png").write_bytes(b"no image")
    arguments = ("segment", images, "--out", out, "--mask", *QUICK_OPTIONS)
    run(*arguments)
    first = (out / "report.html").read_bytes()
    text = first.decode()
    assert text.count("data:image/webp;base64,") == 4
    assert 'data-name="sub/a &lt;b&gt; &amp; 100%"' in text
    for kind in ("overlay", "labels", "mask"):
        assert f'href="sub/a%20%3Cb%3E%20%26%20100%25.{kind}.png"' in text
    assert f"<b>{images / 'broken.png'}</b>: not an image that can be read" in text
    assert "2 steps" in text
    assert "40 x 48 pixels, rule lesion" in text
    assert "1 segmented, 1 failed" in text
    run(*arguments)
    assert (out / "report.html").read_bytes() == first


def page_of(names: list[str]) -> str:
    url = picture_url(np.zeros((8, 8, 3), np.uint8))
    pictures = [Shown("image", url, 8, 8, None), Shown("labels", url, 8, 8, "a%20b.labels.png")]
    articles = [
        Article(name, pictures, "3 labels", [NAMES[0]] * (i % 3), {"labels": i, "notes": i % 3})
        for i, name in enumerate(names)
    ]
    content: dict[str, Any] = {"about": {"command": NAMES[0]}, "failures": {NAMES[0]: NAMES[1]}, "warnings": NAMES}
    return "".join(
        rendered(
            "msformer.runs", "report.html", "report.js", **content, keys=SORTED_BY, gallery=articles, width=LARGEST
        )
    )


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_in_a_browser(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    path = tmp_path / "report.html"
    path.write_text(page_of([*NAMES, *(f"image {i:02d}" for i in range(41))]), encoding="utf-8")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.goto(path.as_uri())
        assert page.title() == "msformer: segmentation"
        assert page.inner_text("#place") == "images 1 to 20 of 45"
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "no sideways scrolling"
        page.select_option("#sort", "labels")
        assert page.locator("h3").first.inner_text() == "image 40", "the highest first"
        page.select_option("#order", "1")
        assert page.locator("h3").first.inner_text() == NAMES[0]
        page.select_option("#sort", "notes")
        page.select_option("#order", "-1")
        assert page.locator("article").first.locator("li").all_inner_texts() == [NAMES[0]] * 2
        page.fill("#name", "gnp")
        assert page.locator("h3").all_inner_texts() == ["\\u202egnp.\\x1b[31m"]
        assert page.locator("article a").get_attribute("href") == "a%20b.labels.png"
        assert page.locator("img:not([alt]), select:not(label select), input:not(label input)").count() == 0
        for scheme in ("dark", "light"):
            page.emulate_media(color_scheme=scheme)
            for selector in ("h1", "dt", ".note", "article p", "article li", ".controls label", "button", "figcaption"):
                assert page.evaluate(CONTRAST, selector) >= 4.5, (scheme, selector)
        assert problems == []
        browser.close()
