"""What a trained network says of an image: probabilities, a label map, the mask of the object, and how sure it is.

The network sees the image at its own size, as its sight says, in four mirror images, whose probabilities are averaged.
Masks are decided at `TEACHER_SIZE`, where the rules see the image as well, and brought to the size of the image through
the probabilities, so that borders stay smooth.

A network with the objective ``teacher`` knows the object, and is fused with the rules that taught it, pixel by pixel:
where the network is sure, its word stands, elsewhere that of the rules. Its word counts as much as it is sure of the
image as a whole. Networks of clusters know no object: their label map is one for the rule of their domain to choose
from.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.special import expit, logit
from torch import Tensor

import msformer_kernels
from msformer.io.prepare import resize_image, resize_labels
from msformer.model import MSFormer
from msformer.scoring import Mask
from msformer.selection import clean_up, largest_hole, select
from msformer.streams import own_stream
from msformer.training.domains import Domain, find_domain
from msformer.training.saved import TrainedModel
from msformer.training.teachers import TEACHER_SIZE, rule_masks

VOTES = 3.0
"""What the masks of the rules count for together: they are of three label maps."""
LEAST = 1e-6
"""No network is surer than this."""

Gate = Literal["fused", "net"]
DecidedBy = Literal["net", "fused", "rule"]
FloatMap = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What `predict` returns; arrays have the size of the image."""

    probability: FloatMap
    """``[H, W]``: of the object, by the network alone. Of clusters: of those that lie mostly in the mask."""
    labels: NDArray[np.integer]
    """``[H, W]``: label 1 is the object, 0 what is around it, by the network alone. Of clusters: their numbers, which
    mean the same in every image."""
    mask: Mask
    """``[H, W]``: the object, without specks and holes."""
    confidence: float
    """From 0 to 1: 1 - 2 sum min(p, 1 - p) / (number of pixels with p > 1/2), at least 0."""
    decided_by: DecidedBy
    """``net``: the network alone; ``fused``: with the rules; ``rule``: a rule, from clusters."""


def predict(
    model: TrainedModel,
    image: Tensor,
    *,
    gate: Gate = "fused",
    rule: str | None = None,
    votes: Sequence[Mask] = (),
    backend: str | None = None,
) -> Prediction:
    """Finds the object in one image. May be called from several threads.

    Args:
        image: ``[3, H, W]``, floating point, values in [0, 1], on the CPU, as `msformer.io.prepare.prepare_image` makes
            it; any size.
        gate: ``"fused"`` with the rules, or the ``"net"`` alone. Has no meaning for clusters.
        rule: of `msformer.selection`; that of the model's domain by default.
        votes: further masks ``[h, w]`` of the object, of any size, that are fused like those of the rules.
        backend: of the kernels, see `msformer_kernels.use_backend`.

    Raises:
        ValueError: an image of another shape, an unknown rule or gate.
    """
    if image.dim() != 3 or image.shape[0] != 3:
        raise ValueError(f"image: expected [3, H, W], got {tuple(image.shape)}")
    if gate not in get_args(Gate):
        raise ValueError(f"gate: unknown {gate!r}; expected fused or net")
    domain = find_domain(model.domain)
    if rule is not None:
        domain = replace(domain, rule=rule)
    size = (image.shape[1], image.shape[2])
    shares = shares_of(model, image, backend)
    if model.objective != "teacher":
        return _by_rule(shares, image, domain, size)
    found = shares[1]
    decided, sure = found, confidence(found)
    if gate == "fused":
        decided = fused(found, _share(image, domain, votes), sure)
    probability = _enlarged(found, size)
    return Prediction(
        probability=probability,
        labels=(probability > 0.5).astype(np.uint8),
        mask=object_mask(decided, domain.rule, size),
        confidence=sure,
        decided_by=gate,
    )


@torch.inference_mode()
def shares_of(model: TrainedModel, image: Tensor, backend: str | None = None) -> FloatMap:
    """Shares of the labels ``[K, h, w]`` of an image ``[3, H, W]``, at `TEACHER_SIZE`."""
    seen = model.sight(resize_image(image, (model.size, model.size)))
    with own_stream(model.device), msformer_kernels.use_backend(backend) if backend is not None else nullcontext():
        shares = probabilities(model.network, seen[None].to(model.device))[0]
        found: FloatMap = _resized(shares, (TEACHER_SIZE, TEACHER_SIZE)).cpu().numpy()
    return found


def probabilities(network: MSFormer, seen: Tensor) -> Tensor:
    """Shares of the labels ``[B, K, h, w]``, in float32, the mean over four mirror images; of ``[B, 3, h, w]`` as the
    network sees them.
    """
    sides: list[list[int]] = [[], [2], [3], [2, 3]]
    flipped = torch.cat([seen.flip(side) for side in sides])
    shares = network(flipped, attention=False).logits.float().softmax(1).chunk(4)
    return torch.stack([share.flip(side) for share, side in zip(shares, sides, strict=True)]).mean(0)


def confidence(probability: FloatMap) -> float:
    """How sure a network is of an object: 1 where every pixel is 0 or 1, 0 where nothing is above one half."""
    area = int((probability > 0.5).sum())
    doubt = 2 * float(np.minimum(probability, 1 - probability).sum())
    return max(0.0, 1 - doubt / area) if area else 0.0


def fused(probability: FloatMap, share: FloatMap, trust: float, votes: float = VOTES) -> FloatMap:
    """What a network and rules say together of the object, ``[h, w]``: the product of their odds, those of the network
    to the power of `trust`.

    Rules of which `share` ``[h, w]`` see the object give it (votes share + 1) / (votes + 2), by Laplace's rule of
    succession. So rules that agree are overruled by a network that is sure, and trusted.
    """
    rules = (votes * share + 1) / (votes + 2)
    odds = trust * logit(probability.clip(LEAST, 1 - LEAST)) + logit(rules)
    return np.asarray(expit(odds), dtype=np.float32)


def _share(image: Tensor, domain: Domain, votes: Sequence[Mask]) -> FloatMap:
    """The share of rules, and votes, that see the object, ``[h, w]``, at `TEACHER_SIZE`."""
    side = (TEACHER_SIZE, TEACHER_SIZE)
    masks = [*rule_masks(resize_image(image, side), domain).masks, *(resize_labels(vote, side) for vote in votes)]
    return np.asarray(np.mean(masks, axis=0, dtype=np.float32))


def _by_rule(shares: FloatMap, image: Tensor, domain: Domain, size: tuple[int, int]) -> Prediction:
    """Of the shares of clusters ``[K, h, w]``."""
    labels = shares.argmax(0).astype(np.min_scalar_type(len(shares) - 1))
    found = select(domain.rule, labels, resize_image(image, (labels.shape[0], labels.shape[1])))
    inside = [k for k in np.unique(labels) if found[labels == k].mean() > 0.5]
    probability = shares[inside].sum(0, dtype=np.float32)
    return Prediction(
        probability=_enlarged(probability, size),
        labels=resize_labels(labels, size),
        mask=_enlarged(_agreeing(probability, found), size) > 0.5,
        confidence=confidence(probability),
        decided_by="rule",
    )


def object_mask(decided: FloatMap, rule: str, size: tuple[int, int]) -> Mask:
    """What is above one half, cleaned up, at the size of the image."""
    cleaned = clean_up(decided > 0.5, largest_hole(rule))
    return _enlarged(_agreeing(decided, cleaned), size) > 0.5


def _agreeing(values: FloatMap, mask: Mask) -> FloatMap:
    """The values, but for pixels of the other side of one half than the mask says, which become 0 or 1."""
    return np.where((values > 0.5) == mask, values, mask).astype(np.float32)


def _enlarged(values: FloatMap, size: tuple[int, int]) -> FloatMap:
    """``[h, w]`` -> ``[*size]``."""
    found: FloatMap = _resized(torch.from_numpy(values)[None], size)[0].numpy()
    return found


def _resized(values: Tensor, size: tuple[int, int]) -> Tensor:
    """``[C, h, w]`` in [0, 1] -> ``[C, *size]``: bilinear, averaging over an area when shrinking."""
    return F.interpolate(values[None], size=size, mode="bilinear", antialias=True)[0].clamp(0, 1)
