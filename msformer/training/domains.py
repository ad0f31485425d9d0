"""Kinds of images: what decides, for each, the rule of the teachers, the augmentation, and how images are prepared.

Needs no heavy import but torch; where no domain is given, `guess_domain` says which one the images are of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from msformer.training.augment import Strengths


@dataclass(frozen=True)
class Domain:
    """A kind of images."""

    name: str
    rule: str
    """Of `msformer.selection`: how the object is found in a label map."""
    hairs: bool
    """Whether teachers see each image without hairs, too."""
    strengths: Strengths
    """Of the augmentation."""


DERMOSCOPY = Domain("dermoscopy", "lesion", True, Strengths(hairs=0.4, corners=0.4))
CT = Domain("ct", "lung", False, Strengths(gain=0.1, contrast=0.15, balance=0.0, saturation=0.0, gamma=0.15))
GENERIC = Domain("generic", "central", False, Strengths(hairs=0.0, corners=0.0))

DOMAINS = {domain.name: domain for domain in (DERMOSCOPY, CT, GENERIC)}


def find_domain(name: str) -> Domain:
    """The domain of this name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in DOMAINS:
        raise ValueError(f"domain: unknown {name!r}; expected one of {', '.join(DOMAINS)}")
    return DOMAINS[name]


class Kind(NamedTuple):
    """What is known of an image before its domain is."""

    colour: bool
    ct: bool

    @property
    def domain(self) -> Domain:
        """The domain that images of this kind are most likely of."""
        return DERMOSCOPY if self.colour else CT if self.ct else GENERIC


def guess_domain(kinds: Sequence[Kind]) -> Domain:
    """The domain that most of the images are of; of several with as many images, the first in `DOMAINS`.

    Raises:
        ValueError: no images.
    """
    if not kinds:
        raise ValueError("kinds: expected at least one image, got none")
    counts = {name: sum(kind.domain.name == name for kind in kinds) for name in DOMAINS}
    return DOMAINS[max(counts, key=lambda name: counts[name])]


def standardised(images: Tensor) -> Tensor:
    """Images ``[B, C, H, W]``, each channel of each brought to mean 0 and variance 1; constant channels become 0.

    This is how every network here sees images, in training and afterwards: raw values do not carry over from one
    camera to the next.
    """
    spread, mean = torch.std_mean(images, dim=(2, 3), correction=0, keepdim=True)
    return (images - mean) / torch.where(spread > 1e-6, spread, 1)
