"""How a DICOM file wants its values shown: windows and look-up tables (PS3.3, C.11.2)."""

from __future__ import annotations

import numpy as np

from msformer.io.base import Notes, Window
from msformer.io.dicom_tables import read_table
from msformer.io.dicom_values import Values
from msformer.io.voi import Curve, Sigmoid

_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")


def read_window(values: Values, signed: bool, notes: Notes) -> tuple[Window | None, Curve | None]:
    """The ends of what is shown, and the curve between them if it is no straight line; None, None without either.

    Of several windows or tables the first that can be used is taken, and a table rather than a window.

    Args:
        signed: whether there are negative values.
    """
    items = values.items("VOILUTSequence")
    for item in items:
        table = read_table(item, "LUT", notes, signed)
        if table is not None:
            if len(items) > 1:
                notes.assume(f"the first of {len(items)} look-up tables is taken")
            return (float(table.first), float(table.first + max(len(table.entries) - 1, 1))), table
    centres, widths = values.numbers("WindowCenter"), values.numbers("WindowWidth")
    pairs = [(float(centre), float(width)) for centre, width in zip(centres, widths, strict=False)]
    function = values.text("VOILUTFunction").upper() or "LINEAR"
    if pairs and function not in _FUNCTIONS:
        notes.warn(f"VOILUTFunction: expected {', '.join(_FUNCTIONS)}, got {function}; LINEAR is assumed")
        function = "LINEAR"
    usable = [pair for pair in pairs if pair[1] > 0]
    if not usable:
        if pairs:
            notes.warn(f"WindowWidth: expected more than 0, got {pairs[0][1]:g}; the window is left out")
        return None, None
    if len(pairs) > 1:
        notes.assume(f"the window {usable[0][0]:g}, {usable[0][1]:g} is taken, one of {len(pairs)}")
    return _ends(*usable[0], function, notes)


def _ends(centre: float, width: float, function: str, notes: Notes) -> tuple[Window, Curve | None]:
    if function == "LINEAR" and width < 1:
        notes.assume(f"a window of width {width:g} is taken as LINEAR_EXACT, as LINEAR has none below 1")
        function = "LINEAR_EXACT"
    if function != "LINEAR":
        ends = centre - width / 2, centre + width / 2
        return ends, Sigmoid(centre, width) if function == "SIGMOID" else None
    low, high = centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2  # C.11.2.1.2.1
    return (low, high if low < high else float(np.nextafter(np.float32(low), np.float32(np.inf)))), None
