"""Text of others, such as names of files, in what people and programs read: terminals, pages, tables.

A name may hold line breaks, escape sequences of terminals, marks that turn the direction of writing, markup, and bytes
that are no Unicode. On a disk it stays as it is; everywhere else it says what it is.
"""

from __future__ import annotations

import re

# control characters, line and paragraph separators, what turns the direction of writing or cannot be seen
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)
_NOT_ASCII = re.compile("[^\x20-\x7e]")
_MARKDOWN = re.compile(r"[\\`*\[\]|]|(?<!\w)_|_(?!\w)")
_FORMULA = ("=", "+", "-", "@")


def printable(text: str) -> str:
    """With a replacement character for what is no Unicode; names of files need not be."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def visible(text: str) -> str:
    r"""`printable`, on one line, with ``\x1b`` or ``\u202e`` for characters that do something instead of being seen."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), printable(text))


def json_text(text: str) -> str:
    r"""JSON with ``\u202e`` for characters that are not seen: the same content. Line breaks of the layout stay."""
    return _UNSEEN.sub(_json_escape, printable(text))


def ascii_json(text: str) -> str:
    r"""JSON on one line with ``\u00e4`` for all that is not ASCII, which any terminal and any encoding can hold."""
    return _NOT_ASCII.sub(_json_escape, printable(text))


def _json_escape(found: re.Match[str]) -> str:
    if found[0] == "\n":  # within strings it is escaped already
        return "\n"
    units = found[0].encode("utf-16-be")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))


def markdown_text(text: str) -> str:
    """`visible`, as it reads in Markdown: nothing of it is markup, HTML or the end of a table's cell."""
    shown = visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(lambda found: f"\\{found[0]}", shown)


def cell_text(text: str) -> str:
    """`visible`, as a cell of a table; with an apostrophe before what a spreadsheet would calculate."""
    shown = visible(text)
    return f"'{shown}" if shown.startswith(_FORMULA) else shown


def visible_lines(text: str) -> str:
    """`visible` of each line."""
    return "\n".join(map(visible, text.split("\n")))
