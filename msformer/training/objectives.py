"""What a network is trained for: losses of a batch, as sums of terms with weights.

- ``teacher``: cross-entropy and soft Dice against the teachers' target, each pixel by its weight.
- ``consistency``: clusters that tell as much as they can about those of the same pixels in another light (IIC), and
  contexts of the two scales that agree.
- ``published``: the losses of MS-Former (`msformer.losses`), on batches.

Every term is normalised over the whole batch, whichever processes have it: each gives its share, and the shares add up
to the loss of the batch. The batch may be split in parts, too, one after the other; terms that are no sums over pixels
or images (mutual information) are then means over the parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from msformer.losses import cross_entropy, inter_scale, intra_scale
from msformer.model import MSFormerOutput
from msformer.training.distributed import total

SMOOTHING = 10.0
"""Pixels added to both sides of the soft Dice coefficient."""
ENTROPY = 1.1
"""Weight of the entropy of the clusters within the mutual information (lambda of IIC): above 1 it uses more of them."""


class Shares(NamedTuple):
    """What turns sums of a part of the batch into shares of the loss of the whole."""

    images: int
    """In the whole batch, of all processes."""
    weight: Tensor
    """Sum of the weights of all its pixels, a number."""
    parts: int
    """Parts that a process splits its share of the batch in."""
    processes: int


class Targets(NamedTuple):
    """What the teachers say of a part of the batch."""

    target: Tensor
    """``[B, S, S]``, 0 or 1."""
    weight: Tensor
    """``[B, S, S]``."""


Term = Callable[[MSFormerOutput, Targets, Shares], Tensor]


def weighted_cross_entropy(output: MSFormerOutput, targets: Targets, shares: Shares) -> Tensor:
    """sum of w CE over sum of w, over all pixels of the batch."""
    losses = F.cross_entropy(output.logits.float(), targets.target.long(), reduction="none")
    return (targets.weight * losses).sum() / shares.weight.clamp(min=1)


def soft_dice(output: MSFormerOutput, targets: Targets, shares: Shares) -> Tensor:
    """1 less the mean over images of (2 sum of w p t + 10) / (sum of w (p + t) + 10)."""
    p, t, w = output.logits.float().softmax(1)[:, 1], targets.target, targets.weight
    both, either = (w * p * t).sum((1, 2)), (w * (p + t)).sum((1, 2))
    return (1 - (2 * both + SMOOTHING) / (either + SMOOTHING)).sum() / shares.images


def mutual_information(output: MSFormerOutput, targets: Targets, shares: Shares) -> Tensor:
    """-sum P (ln P - l ln P1 - l ln P2): minus what clusters in one light tell about those in the other.

    The first half of the images in one light, the second half in another. P is the mean over pixels of the product of
    both probabilities, symmetrised. Ji, Henriques, Vedaldi, "Invariant Information Clustering for Unsupervised Image
    Classification and Segmentation", ICCV 2019, with l for `ENTROPY`.
    """
    first, second = output.logits.float().softmax(1).chunk(2)
    joint = total(torch.einsum("bchw,bdhw->cd", first, second))
    joint = joint / joint.sum()
    joint = ((joint + joint.T) / 2).clamp(min=torch.finfo(joint.dtype).tiny)
    margins = joint.sum(0).log()[None] + joint.sum(1).log()[:, None]
    information = -(joint * (joint.log() - ENTROPY * margins)).sum()
    return information / (shares.parts * shares.processes)


def own_labels(output: MSFormerOutput, targets: Targets, shares: Shares) -> Tensor:
    """Cross-entropy of the logits against their own argmax."""
    return cross_entropy(output.logits.float(), output.logits.argmax(1)) / (shares.parts * shares.processes)


def scales(output: MSFormerOutput, targets: Targets, shares: Shares) -> Tensor:
    """1 less the cosine between the rows of the contexts of both scales."""
    found = inter_scale(output.context_small.float(), output.context_large.float())
    return found / (shares.parts * shares.processes)


def attention(output: MSFormerOutput, targets: Targets, shares: Shares) -> Tensor:
    """Mean absolute difference between the attention map and the identity."""
    return intra_scale(output.attention.float()) / (shares.parts * shares.processes)


@dataclass(frozen=True)
class Objective:
    """A way to train."""

    name: str
    clusters: int
    """Channels of the logits."""
    terms: Mapping[str, Term]
    weights: Mapping[str, float]
    """Of the terms; 0 switches one off, and it is then not computed."""
    taught: bool = False
    """Whether it needs teachers: channel 1 of the logits is then the object."""
    views: int = 1
    """In how many lights an image of the batch is seen."""
    learning_rate: float = 2e-3
    used: tuple[str, ...] = field(init=False)
    """Names of the terms that are switched on."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "used", tuple(name for name in self.terms if self.weights[name]))

    @property
    def needs_attention(self) -> bool:
        return "intra" in self.used

    def losses(self, output: MSFormerOutput, targets: Targets, shares: Shares) -> dict[str, Tensor]:
        """Each term that is switched on, before its weight: the share of it that this part of the batch has."""
        return {name: self.terms[name](output, targets, shares) for name in self.used}

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The sum of terms with their weights."""
        return torch.stack([self.weights[name] * loss for name, loss in losses.items()]).sum()


OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective("teacher", 2, {"ce": weighted_cross_entropy, "dice": soft_dice}, {"ce": 1.0, "dice": 1.0}, True),
        Objective(
            "consistency", 8, {"mutual": mutual_information, "inter": scales}, {"mutual": 1.0, "inter": 0.1}, views=2
        ),
        Objective(
            "published",
            32,
            {"ce": own_labels, "inter": scales, "intra": attention},
            {"ce": 1.0, "inter": 1.5, "intra": 1.3},
        ),
    )
}


def find_objective(name: str, weights: Mapping[str, float] | None = None) -> Objective:
    """The objective of this name, with other weights of its terms where given.

    Raises:
        ValueError: an unknown name or term; a weight that is negative or not finite, or all of them zero.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective: unknown {name!r}; expected one of {', '.join(OBJECTIVES)}")
    objective = OBJECTIVES[name]
    given = dict(weights or {})
    unknown = given.keys() - objective.terms.keys()
    if unknown:
        expected = ", ".join(objective.terms)
        raise ValueError(f"weights: {name} has no {', '.join(sorted(unknown))}; expected some of {expected}")
    for term, weight in given.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weights: {term} is {weight}, expected a finite number of at least 0")
    changed = {**objective.weights, **given}
    if not any(changed.values()):
        raise ValueError("weights: all losses are switched off")
    return replace(objective, weights=changed)
