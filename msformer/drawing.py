"""What figures of matplotlib share: names in any script, and figures as part of a page."""

from __future__ import annotations

import io
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from html import escape
from typing import TYPE_CHECKING, Any

from msformer.text import visible

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

_DEFAULT = "DejaVu Sans"
"""Comes with matplotlib."""
_REPLACEMENT = "\ufffd"
_WITHOUT_WIDTH = ("Mn", "Me", "Cf")
"""Categories of characters that change others, and are left out where no font has them."""


def drawn(name: str) -> dict[str, Any]:
    """Text of others as arguments of matplotlib: what to write, in which fonts, and that it is no formula.

    Characters that no font here has are replaced.
    """
    shown = visible(name)
    missing = {c for c in shown if not _has(_default_path(), c)}
    families = _families(frozenset(missing))
    text = "".join(_replaced(c) if c in missing and c not in families else c for c in shown)
    return {"text": text, "fontfamily": list(dict.fromkeys([_DEFAULT, *families.values()])), "parse_math": False}


def _replaced(character: str) -> str:
    return "" if unicodedata.category(character) in _WITHOUT_WIDTH else _REPLACEMENT


@cache
def _default_path() -> str:
    from matplotlib.font_manager import findfont

    return str(findfont(_DEFAULT))


@cache
def _families(characters: frozenset[str]) -> dict[str, str]:
    """Of characters, those that some font of this machine can draw, and its family."""
    from matplotlib.font_manager import fontManager

    found: dict[str, str] = {}
    upright = [font for font in fontManager.ttflist if font.style == "normal" and "Last Resort" not in font.name]
    for font in sorted(upright, key=lambda font: (font.name, font.weight != 400, font.fname)):
        left = characters - found.keys()
        if not left:
            break
        found |= {c: font.name for c in left if _has(font.fname, c)}
    return found


@cache
def _has(path: str, character: str) -> bool:
    """Whether a font can draw a character."""
    font = _font(path)
    if font is None or font.get_char_index(ord(character)) == 0:
        return False
    try:
        font.load_char(ord(character))
    except RuntimeError:  # bitmaps in colour
        return False
    return True


@cache
def _font(path: str) -> Any:
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
        font.set_size(10, 72)
    except (RuntimeError, OSError):
        return None
    return font


@contextmanager
def quiet_fonts() -> Iterator[None]:
    """Without warnings of glyphs that the bold variant of a font lacks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def svg(figure: Figure, description: str) -> Markup:
    """A figure as part of a page, the same bytes for the same figure.

    Args:
        description: read out to those who do not see it.
    """
    from markupsafe import Markup
    from matplotlib import rc_context

    buffer = io.StringIO()
    with quiet_fonts(), rc_context({"svg.hashsalt": "msformer"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    content = buffer.getvalue()
    named = f'<svg role="img" aria-label="{escape(description)}"'
    return Markup(content[content.index("<svg") :].replace("<svg", named, 1))
