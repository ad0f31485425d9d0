"""What a network sees of an image ``[3, H, W]`` with values in [0, 1]: the same in training and whenever it is asked.

A network of few blocks sees a pixel's near surroundings, and what the image holds as a whole, but not where in the
image it is. So it tells a lesion from skin, but not the air in the lungs from that around the body, which are equally
black in the window of CT: there, all around the body is painted white.

A sight has two parts: `Sight.paint` changes an image as a whole, before crops are taken of it, and `Sight.scale` every
crop. Models keep the name of theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from msformer.io.prepare import standardise_channels
from msformer.selection import body_mask


@dataclass(frozen=True)
class Sight:
    """A way to see images."""

    name: str
    """In ``model.json``."""
    words: str
    """On the model card."""
    paint: Callable[[Tensor], Tensor]
    """``[3, H, W]`` in [0, 1], on the CPU, to the same."""
    scale: Callable[[Tensor], Tensor]
    """Of crops or images ``[..., H, W]`` in [0, 1]: to values around 0."""

    def __call__(self, image: Tensor) -> Tensor:
        """A whole image ``[3, H, W]`` in [0, 1], on the CPU, as the network sees it."""
        return self.scale(self.paint(image))


def body_on_white(image: Tensor) -> Tensor:
    """A CT slice with all that is not within the body in white."""
    return torch.where(torch.from_numpy(body_mask(image)), image, 1.0)


STANDARDISED = Sight(
    "standardised", "each channel of each image is standardised", lambda image: image, standardise_channels
)
"""Raw values of colours do not carry over from one camera to the next."""
BODY = Sight("body", "all around the body is painted white", body_on_white, lambda image: 2 * image - 1)
"""Values of CT mean the same in every image of the same window. Standardised, a crop of lung would be grey as any."""

SIGHTS = {sight.name: sight for sight in (STANDARDISED, BODY)}


def find_sight(name: str) -> Sight:
    """The sight of this name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in SIGHTS:
        raise ValueError(f"sight: unknown {name!r}; expected one of {', '.join(SIGHTS)}")
    return SIGHTS[name]
