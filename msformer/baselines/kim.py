"""Differentiable feature clustering of one image.

Kim, Kanezaki, Tanaka, "Unsupervised Learning of Image Segmentation Based on Differentiable Feature Clustering", IEEE
TIP 2020: logits against their own argmax, plus spatial continuity (equations 2 and 3). Published with up to 1000
steps, in table 1 up to 200: docs/evaluation.md has how little the rest changes.
"""

from __future__ import annotations

from torch import Tensor

from msformer.baselines import Method
from msformer.baselines.pixel_network import Fit, continuity, self_labelling


def loss(logits: Tensor) -> Tensor:
    """Of logits ``[1, K, h, w]``."""
    return self_labelling(logits) + continuity(logits)


METHODS = [
    Method("kim", "Kim et al.", 4, Fit(loss, max_steps=200).label_map),
    Method("kim-1000", "Kim et al., 1000 steps", 4, Fit(loss, max_steps=1000).label_map, tables=()),
]
