"""What pages share: templates that escape all they are given, the style, and a policy that lets nothing be fetched."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader
from markupsafe import Markup

from msformer.text import visible


def rendered(package: str, name: str, script: str | None = None, **content: Any) -> Iterator[str]:
    """The parts of a page, one after the other, so that a long one never is in memory as a whole.

    The page can fetch nothing, and runs no script but its own; its pictures are data.

    Args:
        package: where the template is.
        name: of the template, which extends ``base.html`` or ``gallery.html``, and may show ``script``.
        script: the name of a file of JavaScript beside it, for a page that extends ``gallery.html``.
        content: what the template shows.
    """
    code = "" if script is None else f'"use strict";\n{_read(package, script)}\n{_read("msformer", "gallery.js")}'
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    scripts = f"'sha256-{digest}'" if code else "'none'"
    environment = Environment(autoescape=True, loader=FunctionLoader(lambda base: _read("msformer", base)))
    environment.filters["visible"] = visible
    return environment.from_string(_read(package, name)).generate(
        style=Markup(_read("msformer", "page.css")),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {scripts}",
        script=Markup(code),
        **content,
    )


def _read(package: str, name: str) -> str:
    return files(package).joinpath(name).read_text(encoding="utf-8")
