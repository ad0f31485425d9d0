"""Whether a trained network follows its teachers on whole images, and a warning where it does not.

A network of few blocks may be unable to see what the rules see, as it knows no positions; or it had too few steps.
Where teachers are wrong on some images, a network that learned the others disagrees with them there, and is right. So
the median over images counts, not the mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from msformer.model import MSFormer
from msformer.training.batches import Batch
from msformer.training.domains import Domain, guess_domain
from msformer.training.kinds import Kind
from msformer.training.lessons import Pool
from msformer.training.settings import PREDICTION_SIZE, STEPS
from msformer.training.sight import Sight
from msformer.training.trainer import agreement
from msformer.training.views import shares

SAMPLE = 50
"""Images that are looked at, spread over the pool."""
FOLLOWED = 0.9
"""A network whose median agreement is lower than this does not follow its teachers: 79 to 86 % of those that could not
see what they see, at least 97 % of those that could."""


def some_of(pool: Pool, count: int) -> list[int]:
    """Places of some images, spread over the pool."""
    return np.unique(np.linspace(0, len(pool) - 1, min(count, len(pool))).astype(int)).tolist()


def followed(network: MSFormer, pool: Pool, sight: Sight) -> float:
    """Median over some images of the agreement of network and target: the Dice coefficient of the object or that of
    what is around it, whichever is less, each pixel by its weight. An object that fills the image is no excuse.
    """
    found = []
    for place in some_of(pool, SAMPLE):
        seen = shares(network, pool.images[place], sight, PREDICTION_SIZE)[None]
        target, weight = pool.target[place][None].float(), pool.weight[place][None] / 255
        inside = agreement(seen, Batch(seen, target, weight))
        around = agreement(seen.flip(1), Batch(seen, 1 - target, weight))
        found.append(torch.minimum(inside, around))
    return float(torch.stack(found).quantile(0.5))


def doubts(median: float, domain: Domain, kinds: Iterable[Kind], steps: int) -> Iterator[str]:
    """What a user should know of the result, and what to do.

    Args:
        median: as `followed` found it.
        domain: of the training.
        kinds: of the images.
        steps: that the training took.
    """
    if median >= FOLLOWED:
        return
    likely = guess_domain(list(kinds))
    ways = [f"--domain {likely.name}, as the images look" if likely != domain else "another --domain"]
    if steps < STEPS:
        ways.insert(0, f"more --steps than {steps} (usual are {STEPS})")
    yield (
        f"The network does not follow its teachers: in half of the images it agrees with them to {100 * median:.0f} % "
        f"or less, on the object or on what is around it; at least {100 * FOLLOWED:.0f} % are expected. Do not rely on "
        f"its masks. Look at the images of the report; try {', or '.join(ways)}; or fit each image instead: msformer "
        "segment --mask."
    )
