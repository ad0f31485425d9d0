"""Ways to show values that are no straight line: DICOM's values of interest (PS3.3, C.11.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sigmoid:
    """An S-shaped curve (C.11.2.1.3.1)."""

    centre: float
    width: float

    def brightness(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Values of any shape -> brightness in [0, 1]."""
        exponent = np.clip(-4 * (values.astype(np.float64) - self.centre) / self.width, -700, 700)
        return np.asarray(1 / (1 + np.exp(exponent)))


@dataclass(frozen=True, eq=False)
class Table:
    """A look-up table: an entry for each of a row of integers (C.11.1.1.1).

    Attributes:
        first: the integer that has the first entry; those below have it, too, those above the last have the last.
        entries: uint16 ``[n]``.
        bits: of an entry; the brightest is ``2**bits - 1``.
    """

    first: int
    entries: NDArray[np.uint16]
    bits: int

    def look_up(self, values: NDArray[Any]) -> NDArray[np.uint16]:
        """The entries of values of any shape, which are rounded."""
        last = self.first + len(self.entries) - 1
        places = np.clip(np.rint(values), self.first, last).astype(np.int64) - self.first
        return self.entries[places]

    def brightness(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Values of any shape -> brightness in [0, 1]."""
        return np.asarray(np.minimum(self.look_up(values) / (2.0**self.bits - 1), 1))


Curve = Sigmoid | Table
