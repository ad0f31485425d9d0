"""Kinds of images: what decides, for each, the rule of the teachers, the augmentation and what a network sees.

Where no domain is given, `guess_domain` says which one the images are of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from msformer.training.augment import Strengths
from msformer.training.kinds import Kind
from msformer.training.sight import BODY, STANDARDISED, Sight


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
    sight: Sight = STANDARDISED
    """What a network sees of the images."""


DERMOSCOPY = Domain("dermoscopy", "lesion", True, Strengths(shade=0.3, hairs=0.4, corners=0.4))
CT = Domain("ct", "lung", False, Strengths(gain=0.1, contrast=0.15, balance=0.0, saturation=0.0, gamma=0.15), BODY)
GENERIC = Domain("generic", "central", False, Strengths(shade=0.2))

DOMAINS = {domain.name: domain for domain in (DERMOSCOPY, CT, GENERIC)}


def find_domain(name: str) -> Domain:
    """The domain of this name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in DOMAINS:
        raise ValueError(f"domain: unknown {name!r}; expected one of {', '.join(DOMAINS)}")
    return DOMAINS[name]


def likely_domain(kind: Kind) -> Domain:
    """The domain that images of a kind are most likely of."""
    return DERMOSCOPY if kind.colour else CT if kind.ct else GENERIC


def guess_domain(kinds: Sequence[Kind]) -> Domain:
    """The domain that most of the images are of; of several with as many images, the first in `DOMAINS`.

    Raises:
        ValueError: no images.
    """
    if not kinds:
        raise ValueError("kinds: expected at least one image, got none")
    counts = {name: sum(likely_domain(kind).name == name for kind in kinds) for name in DOMAINS}
    return DOMAINS[max(counts, key=lambda name: counts[name])]
