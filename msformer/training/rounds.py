"""Further rounds: a network is taught by itself, fused with the rules that taught it before.

The target of an image is what network and rules see together, as in a prediction; images where the network alone sees
something else are left out. All pixels count alike.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from msformer.model import MSFormer
from msformer.scoring import Mask, dice
from msformer.selection import clean_up, largest_hole
from msformer.training.domains import Domain
from msformer.training.lessons import Lesson, Pool
from msformer.training.predict import confidence, fused
from msformer.training.settings import AGREED, PREDICTION_SIZE
from msformer.training.views import object_probability


def taught_again(network: MSFormer, pool: Pool, lessons: Mapping[str, Lesson], domain: Domain) -> Pool:
    """The images of a pool with targets of the network and its teachers.

    Args:
        network: after the round before, in evaluation mode.
        pool: the images of the first round.
        lessons: theirs, by name.
        domain: of the teachers.

    Raises:
        ValueError: network and teachers agree on no image.
    """
    kept, targets = [], []
    for place, name in enumerate(pool.names):
        probability = object_probability(network, pool.images[place], domain.sight, PREDICTION_SIZE)
        share = np.float32(lessons[name].votes / max(lessons[name].teachers, 1))
        together = fused(probability, share, confidence(probability))
        alone, target = (_cleaned(values, domain) for values in (probability, together))
        if target.any() and dice(alone, target) >= AGREED:
            kept.append(place)
            targets.append(torch.from_numpy(target.astype(np.uint8)))
    if not kept:
        raise ValueError(
            f"rounds: the network and its teachers agree on none of {len(pool)} images; expected a network that "
            "learned something: leave --rounds out, or take more --steps"
        )
    stacked = torch.stack(targets)
    names = tuple(pool.names[place] for place in kept)
    return Pool(names, pool.images[kept], stacked, torch.full_like(stacked, 255))


def _cleaned(probability: NDArray[np.float32], domain: Domain) -> Mask:
    return clean_up(probability > 0.5, largest_hole(domain.rule))
