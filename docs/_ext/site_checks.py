"""What the built site must hold; a fault is a warning, and `make docs` lets none pass.

- Every public name of `public_modules` stands in the reference and has a docstring.
- No page asks the network for anything: scripts, styles, fonts and pictures are files of the site.
- Every link within the site leads to a file and an anchor that are there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import import_module
from inspect import isclass, isroutine
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

logger = logging.getLogger(__name__)
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
"""What a browser fetches without being asked, by tag the attribute that names it."""
NO_FILE = {"canonical", "index", "search", "next", "prev", "edit"}
"""Kinds of <link> that are not fetched."""


class Page(HTMLParser):
    """The anchors, links and fetched files of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.anchors.update(given[name] for name in ("id", "name") if name in given)
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if given.get(LOADS.get(tag, "")) and given.get("rel") not in NO_FILE:
            self.loads.append(given[LOADS[tag]])


def _is_external(address: str) -> bool:
    return address.startswith("//") or urlsplit(address).scheme in ("http", "https")


def faults_of_site(folder: Path) -> Iterator[str]:
    """What is wrong with the links and files of a built site."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}
    for path, page in pages.items():
        where = path.relative_to(folder)
        yield from (f"{where}: fetches {load}" for load in page.loads if _is_external(load))
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                yield f"{where}: leads to {link}, which is not there"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{where}: leads to {link}, an anchor that is not there"
    for style in sorted(folder.rglob("*.css")):
        for address in re.findall(r"""(?:url\(|@import)\s*['"]?([^'")\s;]+)""", style.read_text(encoding="utf-8")):
            where = style.relative_to(folder)
            if _is_external(address):
                yield f"{where}: fetches {address}"
            elif not address.startswith(("data:", "url(")) and not (style.parent / urlsplit(address).path).is_file():
                yield f"{where}: fetches {address}, which is not there"


def faults_of_reference(documented: set[str], modules: list[str]) -> Iterator[str]:
    """Public names that the reference lacks, or that have no docstring."""
    for module in modules:
        found = import_module(module)
        for name in found.__all__:
            value = getattr(found, name)
            if not (isclass(value) or isroutine(value)):
                continue
            homes = {f"{module}.{name}", f"{value.__module__}.{name}", f"{value.__module__.split('.')[0]}.{name}"}
            if not homes & documented:
                yield f"{module}.{name} is not in the reference"
            if not value.__doc__:
                yield f"{module}.{name} has no docstring"


def _check_reference(app: Sphinx, environment: BuildEnvironment) -> None:
    documented = {name for name, *_ in environment.get_domain("py").get_objects()}
    for fault in faults_of_reference(documented, app.config.public_modules):
        logger.warning(fault)


def _check_site(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.name == "html":
        for fault in faults_of_site(Path(app.outdir)):
            logger.warning(fault)


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the checks."""
    app.add_config_value("public_modules", [], "env")
    app.connect("env-check-consistency", _check_reference)
    app.connect("build-finished", _check_site)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
