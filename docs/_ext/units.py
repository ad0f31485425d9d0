"""Numbers stay on one line with their units in the cells of tables: ``12 %``, ``177 ms``."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

UNIT = re.compile(r"(?<=\d) (?=(?:\N{MULTIPLICATION SIGN}|%|[mµ]?s|[KMG]iB|[kM]B|GF/s|[GM]F)(?![\w/]))")


class Units(SphinxTransform):
    """Puts a space that does not break between a number and its unit."""

    default_priority = 500

    def apply(self, **options: Any) -> None:
        for cell in self.document.findall(nodes.entry):
            for text in list(cell.findall(nodes.Text)):
                if UNIT.search(text):
                    text.parent.replace(text, nodes.Text(UNIT.sub("\N{NO-BREAK SPACE}", text)))


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the transform."""
    app.add_transform(Units)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
