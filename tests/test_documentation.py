"""The pages of docs/: they are all named, their links lead somewhere, their examples run, the reference is complete.

`make docs` checks more, on the built site.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from inspect import isclass, isroutine
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import msformer_kernels as kernels
from msformer_kernels.core import backends
from msformer_kernels.core.operator import OPERATORS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
WITH_LINKS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PUBLIC = ("msformer_kernels", "msformer_kernels.nn", "msformer", "msformer.data", "msformer.medical", "msformer.runs")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and MyST make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    text = re.sub(r"^    .*$|`[^`\n]*`", "", text, flags=re.MULTILINE)
    yield from re.findall(r"\]\(([^)\s]+)\)", text)


def examples(page: str, mark: str) -> list[str]:
    """The blocks of Python of a page that stand below a comment that starts with this mark."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"<!-- {mark}[^>]*-->\n```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_navigation_names_every_page_once() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    trees = re.findall(r"```\{toctree\}\n(.*?)```", index, re.DOTALL)
    named = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    assert sorted(named) == sorted(page.stem for page in PAGES if page.stem != "index")


@pytest.mark.parametrize("page", WITH_LINKS, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_pages_that_the_sources_mention_are_there() -> None:
    folders = ("kernels", "msformer", "benchmarks", "studies", "csrc", "tests", "examples")
    kinds = (".py", ".h", ".cpp", ".cu")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    mentioned = {
        name for path in sources for name in re.findall(r"docs/([\w-]+\.\w+)", path.read_text(encoding="utf-8"))
    }
    assert "design.md" in mentioned
    assert {name for name in mentioned if not (DOCS / name).exists()} == set()


def test_the_reference_names_all_that_is_public() -> None:
    reference = "\n".join(page.read_text(encoding="utf-8") for page in DOCS.glob("reference-*.md"))
    for module in PUBLIC:
        for name in import_module(module).__all__:
            value = getattr(import_module(module), name)
            if isclass(value) or isroutine(value):
                assert re.search(rf":: (?:[\w.]+\.)?{name}(\(\))?$", reference, re.MULTILINE), f"{module}.{name}"
                assert value.__doc__, f"{module}.{name} has no docstring"


@pytest.mark.parametrize("code", examples("start-kernels.md", "tested"))
def test_the_first_steps_with_the_kernels_run(code: str) -> None:
    exec(compile(code, "start-kernels.md", "exec"), {"__name__": "page"})


def test_the_first_steps_with_segmentation_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller than they stand there."""
    from msformer.demo import make_images

    (code,) = examples("start-segmentation.md", "tested")
    make_images(tmp_path / "demo", 1, 0)
    monkeypatch.chdir(tmp_path)
    assert 'preset="quick"' in code
    found: dict[str, Any] = {}
    exec(code.replace('preset="quick"', 'preset="quick", size=33, max_steps=2'), found)
    assert found["picture"].shape == (*found["result"].labels_full.shape, 3)


def test_the_recipe_of_a_backend_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """`add-a-backend.md`: its two blocks, in the places that it names."""
    why_not, module = examples("add-a-backend.md", "recipe")
    monkeypatch.setattr(backends, "_why_not_products", None, raising=False)
    exec(why_not, vars(backends))
    made = ModuleType("msformer_kernels.ops.linear.products")
    exec(module, vars(made))
    linear = OPERATORS["linear"]
    monkeypatch.setitem(sys.modules, made.__name__, made)
    monkeypatch.setitem(backends._WHY_NOT, "products", vars(backends)["_why_not_products"])
    monkeypatch.setitem(backends.MODULES, "products", "products")
    monkeypatch.setattr(backends, "BACKENDS", (*backends.BACKENDS, "products"))
    monkeypatch.setattr(linear, "served_by", (*linear.served_by, "products"))
    monkeypatch.setattr(linear, "_checked", {})
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias = (torch.randn(*s, dtype=dtype).requires_grad_() for s in ((2, 7, 6), (5, 6), (5,)))
        found = kernels.linear(x, weight, bias, backend="products")
        expected = kernels.linear(x, weight, bias, backend="reference")
        torch.testing.assert_close(found, expected)
        gradient = torch.randn_like(found)
        for a, b in zip(*(torch.autograd.grad(y, (x, weight, bias), gradient) for y in (found, expected)), strict=True):
            torch.testing.assert_close(a, b)
    assert kernels.explain("cpu", operator="linear").reasons["products"] == "usable"
    assert "it serves CPU tensors" in kernels.explain("cuda", operator="linear").reasons["products"]
    with pytest.raises(kernels.BackendError, match="it has no kernels for mix_ffn"):
        backends.resolve("products", "cpu", torch.float32, OPERATORS["mix_ffn"])
