"""The self-supervised losses of MS-Former (Karimijafarbigloo et al., MIDL 2023).

- ``ce``: cross-entropy of the logits against their own argmax.
- ``inter``: 1 - cosine between the rows of the two branches' contexts, mean over rows (cosine embedding loss with
  target +1).
- ``intra``: mean absolute difference between the attention map and the identity.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from msformer.model import MSFormerOutput
from msformer.presets import LossWeights


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of logits ``[B, K, H, W]`` against their argmax ``[B, H, W]``."""
    # as rows of K values, which is how channels-last logits lie in memory
    return F.cross_entropy(logits.permute(0, 2, 3, 1).flatten(0, 2), labels.flatten())


def inter_scale(context_small: Tensor, context_large: Tensor) -> Tensor:
    """Of two contexts ``[B, D, E]``."""
    rows = context_small.flatten(0, 1)
    return F.cosine_embedding_loss(rows, context_large.flatten(0, 1), rows.new_ones(rows.shape[0]))


def intra_scale(attention: Tensor) -> Tensor:
    """Of an attention map ``[B, T, T]``."""
    identity = torch.eye(attention.shape[-1], dtype=attention.dtype, device=attention.device)
    return F.l1_loss(attention, identity.expand_as(attention))


def total_loss(output: MSFormerOutput, labels: Tensor, weights: LossWeights) -> Tensor:
    """The weighted sum of the losses that are switched on; labels are the argmax of the logits."""
    terms = []
    if weights.ce:
        terms.append(weights.ce * cross_entropy(output.logits, labels))
    if weights.inter:
        terms.append(weights.inter * inter_scale(output.context_small, output.context_large))
    if weights.intra:
        terms.append(weights.intra * intra_scale(output.attention))
    return torch.stack([term.to(output.logits.dtype) for term in terms]).sum()
