"""Batches of crops, from images in memory.

Which image a crop is of, and everything that is drawn for it, follows from the seed, the step and the crop's index in
the batch alone. So a training that is resumed, or shared by several processes, sees the same crops; nothing about the
order of the data has to be kept. Making a batch of 8 takes a tenth of the time of a step on two cores, so it is made
when it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from msformer.training.augment import (
    Strengths,
    add_noise,
    change_light,
    draw_appearance,
    draw_corners,
    draw_geometry,
    draw_hairs,
    generator,
    warp_images,
    warp_targets,
)
from msformer.training.lessons import Pool
from msformer.training.sight import STANDARDISED, Sight

_ORDER, _SIZE, _CROP = 0, 1, 2  # what random numbers are for


class Batch(NamedTuple):
    """Crops as the network sees them."""

    images: Tensor
    """``[views * B, 3, S, S]``: all crops in one light, then all in the next."""
    target: Tensor
    """``[B, S, S]``, 0 or 1; of the first light."""
    weight: Tensor
    """``[B, S, S]``."""

    def parts(self, count: int, views: int) -> Iterator[Batch]:
        """The batch in equal parts, each with every light of its crops."""
        lights = self.images.unflatten(0, (views, -1))
        split = zip(lights.chunk(count, 1), self.target.chunk(count), self.weight.chunk(count), strict=True)
        for images, target, weight in split:
            yield Batch(images.flatten(0, 1), target, weight)


class Batches:
    """All batches of a training, or the share of them that one process has."""

    def __init__(
        self,
        pool: Pool,
        strengths: Strengths,
        sight: Sight = STANDARDISED,
        *,
        seed: int,
        batch: int,
        sizes: tuple[int, ...],
        views: int = 1,
        device: torch.device | str = "cpu",
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """
        Args:
            pool: the images.
            strengths: of the augmentation.
            sight: of the network; the images of the pool are painted already.
            seed: of everything that is drawn.
            batch: crops a step, of all processes.
            sizes: of the crops, of which each step has one.
            views: lights in which each crop is seen.
            device: where crops are made.
            share: this process and how many there are.
        """
        self.pool, self.strengths, self.sight, self.seed, self.batch = pool, strengths, sight, seed, batch
        self.sizes, self.views, self.device = sizes, views, torch.device(device)
        rank, processes = share
        self.mine = range(rank * batch // processes, (rank + 1) * batch // processes)
        self._order: tuple[int, Tensor] = -1, torch.empty(0)

    def make(self, step: int) -> Batch:
        """The crops of a step, counted from 0."""
        size = self.sizes[int(torch.randint(len(self.sizes), (), generator=generator(self.seed, _SIZE, step)))]
        places = torch.tensor([self._image(step * self.batch + index) for index in self.mine])
        generators = [generator(self.seed, _CROP, step, index) for index in self.mine]
        geometry = draw_geometry(generators, self.strengths)
        images = warp_images(self._values(self.pool.images[places]) / 255, geometry, size)
        seen, weight = self._values(self.pool.target[places]), self._values(self.pool.weight[places]) / 255
        first = warp_targets(seen, weight, geometry, size)
        shown, changed = [], []
        for _ in range(self.views):
            look = draw_appearance(generators, size, self.strengths)
            lit = draw_hairs(change_light(images, look), look)
            view, target, weight = draw_corners(lit, *first, look)
            shown.append(self.sight.scale(add_noise(view, look)))
            changed.append((target, weight))
        return Batch(torch.cat(shown), *changed[0])

    def _values(self, stored: Tensor) -> Tensor:
        return stored.to(self.device).float()

    def _image(self, number: int) -> int:
        """The image that crop `number` of the training is of: all images once, in some order, then in another."""
        turn, place = divmod(number, len(self.pool))
        if turn != self._order[0]:
            self._order = turn, torch.randperm(len(self.pool), generator=generator(self.seed, _ORDER, turn))
        return int(self._order[1][place])
