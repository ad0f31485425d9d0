"""How well a predicted mask agrees with the true one.

With A the prediction and G the truth:

- DSC = 2 |A and G| / (|A| + |G|), Jaccard = |A and G| / |A or G|, precision = |A and G| / |A|, recall = |A and G| /
  |G|;
- HM = |A xor G| / |A or G| and XOR = |A xor G| / |G|, as published (so HM <= XOR and HM <= 1);
- HD95: the 95th percentile of the distances between the two borders, in pixels, of the worse direction (by MONAI).

A fraction of nothing is None, which means leave out; it is never a 0/0. If both masks are empty they agree: DSC =
Jaccard = 1 and HM = 0.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch

from msformer.scoring import Mask


class Measures(NamedTuple):
    """Fractions, and a distance in pixels."""

    dsc: float
    hm: float
    xor: float | None
    jaccard: float
    precision: float | None
    recall: float | None
    hd95: float | None


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


def border_distance(predicted: Mask, truth: Mask) -> float:
    """HD95 in pixels, of two masks that are not empty."""
    from monai.metrics import compute_hausdorff_distance

    found, wanted = (torch.from_numpy(mask)[None, None].float() for mask in (predicted, truth))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI's own use of an argument of its own
        return float(compute_hausdorff_distance(found, wanted, include_background=True, percentile=95))
