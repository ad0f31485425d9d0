"""SGSCN, the spatial guided self-supervised clustering network.

Ahn, Feng, Kim, "A Spatial Guided Self-supervised Clustering Network for Medical Image Segmentation", MICCAI 2021:
self-labelling, continuity, and a context-consistency term that asks each cluster to lie in one place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msformer.baselines import Method
from msformer.baselines.pixel_network import Fit, continuity, self_labelling


def context_consistency(logits: Tensor) -> Tensor:
    """Sum over clusters of the spatial variance of their probability: ``sum_c sum_p p_c(p) |p - mean_c|^2``.

    ``p_c`` is the softmax over clusters of the logits ``[1, K, h, w]``, normalised to a distribution over pixels;
    positions lie in [-1, 1].
    """
    height, width = logits.shape[2:]
    spread = logits.softmax(1)[0].flatten(1)  # [K, h * w]
    spread = spread / spread.sum(1, keepdim=True)
    rows, columns = (torch.linspace(-1, 1, size, device=logits.device) for size in (height, width))
    positions = torch.cartesian_prod(rows, columns)  # [h * w, 2]
    means = spread @ positions
    # E|p - mean|^2 = E|p|^2 - |mean|^2
    return (spread @ positions.square().sum(1) - means.square().sum(1)).sum()


def loss(logits: Tensor) -> Tensor:
    """Of logits ``[1, K, h, w]``."""
    return self_labelling(logits) + 5 * continuity(logits) + context_consistency(logits)


METHODS = [Method("sgscn", "SGSCN", 5, Fit(loss, max_steps=50).label_map)]
