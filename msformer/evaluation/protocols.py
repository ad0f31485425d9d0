"""How a label map becomes a predicted mask. Every score belongs to one of these.

- ``blind``: a rule of `msformer.selection` picks the labels without looking at the true mask.
- ``oracle``: the one label with the best Dice coefficient.
- ``oracle-union``: all labels whose pixels lie mostly in the true mask, the ceiling of a label map.
- ``published``: the label that covers most of the true mask, within the true mask dilated by 6 pixels each way, as
  published scores were computed. A predictor that says "everything" does well by it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.morphology import dilation, footprint_rectangle

from msformer.scoring import Mask, oracle, oracle_union

PROTOCOLS = ("blind", "oracle", "oracle-union", "published")
GATE = 6
"""Pixels by which the published score dilates the true mask, at the fitted size."""


def published(labels: NDArray[Any], truth: Mask) -> Mask:
    """The label that covers most of the true mask, within the dilated mask; nothing if the mask is empty."""
    if not truth.any():
        return np.zeros_like(truth)
    values, counts = np.unique(labels[truth], return_counts=True)
    gate: Mask = dilation(truth, footprint_rectangle((2 * GATE + 1, 2 * GATE + 1)))
    return (labels == values[counts.argmax()]) & gate


def predictions(labels: NDArray[Any], truth: Mask, blind: Mask) -> dict[str, Mask]:
    """The mask ``[h, w]`` of each protocol."""
    return {
        "blind": blind,
        "oracle": oracle(labels, truth),
        "oracle-union": oracle_union(labels, truth),
        "published": published(labels, truth),
    }
