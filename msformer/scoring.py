"""Scores of a label map against a true mask.

A label map says which pixels belong together, not which label is the object. So every score names how the label was
chosen, and the floor, a predictor that says "everything", stands beside it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def dice(predicted: Mask, truth: Mask) -> float:
    """Dice similarity coefficient ``2 |A and G| / (|A| + |G|)`` in [0, 1]; 1 if both are empty."""
    total = int(predicted.sum()) + int(truth.sum())
    return 1.0 if total == 0 else 2 * int((predicted & truth).sum()) / total


def oracle(labels: NDArray[Any], truth: Mask) -> Mask:
    """The one label with the best Dice coefficient, chosen with the mask in hand."""
    return max((labels == label for label in np.unique(labels)), key=lambda mask: dice(mask, truth))


def oracle_union(labels: NDArray[Any], truth: Mask) -> Mask:
    """All labels whose pixels lie mostly in the mask: the ceiling of a label map."""
    mostly_inside = [label for label in np.unique(labels) if truth[labels == label].mean() > 0.5]
    return np.isin(labels, mostly_inside)


class Scores(NamedTuple):
    """Dice coefficients in [0, 1]."""

    oracle: float
    """Of the one label with the best score."""
    oracle_union: float
    """Of all labels that lie mostly in the mask."""
    everything: float
    """The floor: of the whole image."""


def score(labels: NDArray[Any], truth: Mask) -> Scores:
    """Scores of a label map ``[H, W]`` against a true mask ``[H, W]``.

    Raises:
        ValueError: different sizes, or a mask that is not boolean.
    """
    if truth.dtype != np.bool_:
        raise ValueError(f"truth: expected a boolean mask, got {truth.dtype}")
    if labels.shape != truth.shape:
        raise ValueError(f"truth: has shape {truth.shape}, the label map {labels.shape}")
    return Scores(
        dice(oracle(labels, truth), truth),
        dice(oracle_union(labels, truth), truth),
        dice(np.ones_like(truth), truth),
    )
