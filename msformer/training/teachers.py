"""What a network is taught without masks: where rules on simple label maps of an image agree on the object.

The teachers of an image are the domain's rule on the label maps of Otsu's threshold and of k-means with 2 and with 3
clusters; for dermoscopy on those of the image without hairs, too. Their majority is the target. A pixel counts for as
much as they agree there, and an image whose teachers disagree as a whole teaches nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msformer.baselines import Task, kmeans, otsu
from msformer.io.read import is_colour
from msformer.scoring import Mask, dice
from msformer.selection import select
from msformer.training.domains import Domain
from msformer.training.hairs import without_hairs

TEACHER_SIZE = 129
"""Side of the square that images are resized to for their teachers, pixels."""
AGREEMENT = 0.8
"""Images whose teachers agree less than this are left out."""


@dataclass(frozen=True, eq=False)
class Teachers:
    """What the teachers say of one image."""

    masks: NDArray[np.bool_]
    """``[T, H, W]``."""
    names: tuple[str, ...]
    """Of the T teachers."""

    @cached_property
    def mean(self) -> NDArray[np.float32]:
        """The share of teachers that see the object, ``[H, W]``."""
        return self.masks.mean(0, dtype=np.float32)

    @property
    def target(self) -> Mask:
        """What most teachers see, ``[H, W]``; where as many do as do not, there is no object, and no weight."""
        return np.asarray(self.mean > 0.5)

    @property
    def weight(self) -> NDArray[np.float32]:
        """How much a pixel counts, ``[H, W]``: 1 where all teachers agree, 0 where half of them see the object."""
        return np.abs(2 * self.mean - 1)

    @cached_property
    def agreement(self) -> float:
        """Mean Dice coefficient of all pairs of teachers, in [0, 1]."""
        return float(np.mean([dice(first, second) for first, second in combinations(self.masks, 2)]))


def rule_masks(image: Tensor, domain: Domain, seed: int = 0) -> Teachers:
    """The teachers of an image ``[3, H, W]`` with values in [0, 1], float32, on the CPU; masks have its size.

    The same for the same image, domain and seed. Meant for images of about `TEACHER_SIZE` pixels.

    Raises:
        ValueError: another shape.
    """
    if image.dim() != 3 or image.shape[0] != 3:
        raise ValueError(f"image: expected [3, H, W], got {tuple(image.shape)}")
    masks, names = _masks(image, domain, seed)
    if domain.hairs:
        clear = without_hairs(image.permute(1, 2, 0).numpy())
        more, more_names = _masks(torch.from_numpy(clear).permute(2, 0, 1).contiguous(), domain, seed)
        masks, names = masks + more, names + [f"{name}, no hairs" for name in more_names]
    return Teachers(np.stack(masks), tuple(names))


def _masks(image: Tensor, domain: Domain, seed: int) -> tuple[list[Mask], list[str]]:
    task = Task(image, is_colour(image), seed, torch.device("cpu"))
    maps = {
        "otsu": otsu.label_map(task),
        "kmeans-2": kmeans.label_map(task, clusters=2),
        "kmeans-3": kmeans.label_map(task, clusters=3),
    }
    return [select(domain.rule, found.labels, image) for found in maps.values()], list(maps)
