"""How well a predicted mask agrees with the true one.

With A the prediction and G the truth:

- DSC = 2 |A and G| / (|A| + |G|), Jaccard = |A and G| / |A or G|, precision = |A and G| / |A|, recall = |A and G| /
  |G|;
- HM = |A xor G| / |A or G| and XOR = |A xor G| / |G|, as published (so HM <= XOR and HM <= 1);
- HD95: the 95th percentile of the distances between the two borders, in pixels, of the worse direction (by MONAI).

A fraction of nothing is None, which means leave out; it is never a 0/0. If both masks are empty they agree: DSC =
Jaccard = 1 and HM = 0.

`speckle` needs no true mask: it tells whether a label map is one to look at.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from msformer.io.prepare import nearest
from msformer.scoring import Mask


class Measures(NamedTuple):
    """Fractions, and a distance in pixels; None is left out of means."""

    dsc: float | None
    hm: float | None
    xor: float | None
    jaccard: float | None
    precision: float | None
    recall: float | None
    hd95: float | None


UNDEFINED = Measures(*[None] * len(Measures._fields))


def measure(predicted: Mask, truth: Mask) -> Measures:
    """Of two masks ``[H, W]``; raises ValueError for different sizes."""
    if predicted.shape != truth.shape:
        raise ValueError(f"truth: has shape {truth.shape}, the prediction {predicted.shape}")
    both, either = int((predicted & truth).sum()), int((predicted | truth).sum())
    found, wanted = int(predicted.sum()), int(truth.sum())
    return Measures(
        dsc=2 * both / (found + wanted) if either else 1.0,
        hm=(either - both) / either if either else 0.0,
        xor=(either - both) / wanted if wanted else None,
        jaccard=both / either if either else 1.0,
        precision=both / found if found else None,
        recall=both / wanted if wanted else None,
        hd95=border_distance(predicted, truth) if found and wanted else None,
    )


class OwnSize:
    """Dice coefficients at the size of the image, of masks at the fitted size.

    The same as of the masks brought to that size by nearest neighbour, which large images would make slow: for each
    fitted pixel is counted how many pixels of the image it becomes, and how many of them are true. Void pixels count
    for nothing.
    """

    def __init__(self, truth: Mask, size: tuple[int, int], void: Mask | None = None) -> None:
        lines = [nearest(new, old) for new, old in zip(truth.shape, size, strict=True)]
        self.areas = np.outer(*(np.bincount(line, minlength=old) for line, old in zip(lines, size, strict=True)))
        self.true_areas = _areas(truth, lines, size)
        if void is not None:
            self.areas = self.areas - _areas(void, lines, size)

    def dice(self, predicted: Mask) -> float:
        """Of a mask ``[*size]``; 1 if both are empty."""
        total = int(self.areas[predicted].sum()) + int(self.true_areas.sum())
        return 2 * int(self.true_areas[predicted].sum()) / total if total else 1.0


def _areas(mask: Mask, lines: list[NDArray[np.int64]], size: tuple[int, int]) -> NDArray[np.int64]:
    """For each fitted pixel, how many of its pixels a mask has."""
    areas = mask.astype(np.int64)
    for axis, (line, old) in enumerate(zip(lines, size, strict=True)):
        areas = _sums_of_groups(areas, line, old, axis)
    return areas


def _sums_of_groups(values: NDArray[np.int64], groups: NDArray[np.int64], count: int, axis: int) -> NDArray[np.int64]:
    """Sums over the lines of an axis that have the same group; groups rise, and may be empty."""
    found, first = np.unique(groups, return_index=True)
    shape = list(values.shape)
    shape[axis] = count
    sums = np.zeros(shape, dtype=np.int64)
    sums[(slice(None),) * axis + (found,)] = np.add.reduceat(values, first, axis=axis)
    return sums


def border_distance(predicted: Mask, truth: Mask) -> float:
    """HD95 in pixels, of two masks that are not empty."""
    from monai.metrics import compute_hausdorff_distance

    found, wanted = (torch.from_numpy(mask)[None, None].float() for mask in (predicted, truth))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI's own use of an argument of its own
        return float(compute_hausdorff_distance(found, wanted, include_background=True, percentile=95))


def speckle(labels: NDArray[Any]) -> float:
    """Of a label map ``[h, w]``, the share of its inner pixels that differ from both neighbours along their row, or
    from both along their column: near 1 for a checkerboard, 0 for two halves.
    """
    inner = labels[1:-1, 1:-1]
    along = ((labels[1:-1, :-2], labels[1:-1, 2:]), (labels[:-2, 1:-1], labels[2:, 1:-1]))
    alone = np.any([np.all([inner != neighbour for neighbour in pair], axis=0) for pair in along], axis=0)
    return float(alone.mean()) if inner.size else 0.0
