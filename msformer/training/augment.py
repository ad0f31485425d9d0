"""Views of images for training: batches of crops, with their targets and weights, changed as images of one kind differ.

What is drawn for a crop comes from its own random generator and nothing else, so a crop is the same in whatever batch,
process or run it is made. A view is drawn in two parts: `Geometry`, by which image, target and weight move together,
and `Appearance`, which changes the image: light and colour, drawn hairs, drawn dark corners, noise. Coordinates of a
view run from -1 to 1, as in `torch.nn.functional.affine_grid`. Everything is computed on the device of the images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MOST_HAIRS = 8
"""Hairs that are drawn into a crop at most."""
SAMPLES = 2
"""A pixel of a view is the mean of this many samples each way, against aliasing where the view is smaller."""


@dataclass(frozen=True)
class Strengths:
    """How much views differ. Factors are drawn between 1 less and 1 plus a strength."""

    rotation: float = math.pi
    """Largest angle, radians."""
    zoom: tuple[float, float] = (0.45, 1.1)
    """Side of what a view shows, of the image's side."""
    aspect: float = 0.15
    """Largest change of the ratio of width and height."""
    gain: float = 0.15
    contrast: float = 0.25
    balance: float = 0.08
    """Of the gain of each channel."""
    saturation: float = 0.3
    gamma: float = 0.25
    shade: float = 0.0
    """Largest change of the gain from the middle to an edge, as light from one side makes it."""
    noise: float = 0.03
    """Largest standard deviation."""
    hairs: float = 0.0
    """Probability that hairs are drawn."""
    corners: float = 0.0
    """Probability that dark corners are drawn."""


class Geometry(NamedTuple):
    """Where a batch of views lies in its images."""

    matrix: Tensor
    """``[B, 2, 3]``, from coordinates of the view to those of the image."""


class Appearance(NamedTuple):
    """How a batch of views looks."""

    light: Tensor
    """``[B, 9]``: gain of each channel, contrast, saturation, gamma, standard deviation of the noise, change of gain
    to the right and down."""
    hairs: Tensor
    """``[B, MOST_HAIRS, 9]``: angle, distance from the middle, curvature, where it begins and ends, half its width,
    opacity (0: no hair), grey value, brownness."""
    corners: Tensor
    """``[B, 6]``: middle, radius and softness of the field of view, grey value outside, opacity (0: no corners)."""
    noise: Tensor
    """``[B, 3, S, S]``, of variance 1."""


def generator(seed: int, *place: int) -> torch.Generator:
    """Random numbers that follow from a seed and a place, such as the step and the index in the batch."""
    state = np.random.SeedSequence([seed, *place]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def draw_geometry(generators: Sequence[torch.Generator], strengths: Strengths) -> Geometry:
    """A view for each generator: what it shows of the image lies mostly within it."""
    flip_x, flip_y, turn, zoom, aspect, x, y = _uniform(generators, 7).unbind(1)
    low, high = strengths.zoom
    scale = low + (high - low) * zoom
    stretch = _factor(aspect, strengths.aspect).sqrt()
    angle = strengths.rotation * (2 * turn - 1)
    room = (1 - scale).clamp(min=0)
    columns = torch.stack([scale * stretch * _sign(flip_x), scale / stretch * _sign(flip_y)], dim=1)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).unflatten(1, (2, 2))
    middle = torch.stack([(2 * x - 1) * room, (2 * y - 1) * room], dim=1)
    return Geometry(torch.cat([rotation * columns[:, None], middle[:, :, None]], dim=2))


def draw_appearance(generators: Sequence[torch.Generator], size: int, strengths: Strengths) -> Appearance:
    """A look for each generator, of views of `size` pixels."""
    u = _uniform(generators, 18 + 9 * MOST_HAIRS)
    gain = _factor(u[:, :1], strengths.gain) * _factor(u[:, 1:4], strengths.balance)
    contrast, saturation = _factor(u[:, 4:5], strengths.contrast), _factor(u[:, 5:6], strengths.saturation)
    gamma, noise = _factor(u[:, 6:7], strengths.gamma), strengths.noise * u[:, 7:8]
    angle, steepness = 2 * math.pi * u[:, 16:17], strengths.shade * u[:, 17:18]
    shade = torch.cat([steepness * angle.cos(), steepness * angle.sin()], dim=1)
    corners = torch.stack(
        [
            _between(u[:, 8], -0.12, 0.12),
            _between(u[:, 9], -0.12, 0.12),
            _between(u[:, 10], 0.85, 1.3),
            0.01 * 15 ** u[:, 11],
            _between(u[:, 12], 0.0, 0.15),
            (u[:, 13] < strengths.corners).float(),
        ],
        dim=1,
    )
    h = u[:, 18:].unflatten(1, (MOST_HAIRS, 9))
    count = torch.where(u[:, 14] < strengths.hairs, 1 + (u[:, 15] * MOST_HAIRS).floor(), 0.0)
    there = torch.arange(MOST_HAIRS) < count[:, None]
    hairs = torch.stack(
        [
            2 * math.pi * h[..., 0],
            _between(h[..., 1], -1.0, 1.0),
            _between(h[..., 2], -0.7, 0.7),
            _between(h[..., 3], -2.0, 0.3),
            _between(h[..., 4], 0.0, 2.0),
            _between(h[..., 5], 0.005, 0.018),
            there * _between(h[..., 6], 0.4, 0.95),
            _between(h[..., 7], 0.02, 0.3),
            _between(h[..., 8], 0.0, 0.3),
        ],
        dim=2,
    )
    values = torch.stack([torch.randn(3, size, size, generator=each) for each in generators])
    return Appearance(torch.cat([gain, contrast, saturation, gamma, noise, shade], dim=1), hairs, corners, values)


def warp_images(images: Tensor, geometry: Geometry, size: int) -> Tensor:
    """Images ``[B, C, H, W]`` as views ``[B, C, size, size]``; beyond the image its mirror image is seen."""
    grid = _grid(geometry, images, SAMPLES * size)
    samples = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return F.avg_pool2d(samples, SAMPLES)


def warp_targets(target: Tensor, weight: Tensor, geometry: Geometry, size: int) -> tuple[Tensor, Tensor]:
    """Targets (0 or 1) and weights ``[B, H, W]``, float, as views ``[B, size, size]``; the weight is 0 beyond the
    image.
    """
    grid = _grid(geometry, target, size)
    pair = torch.stack([target, weight], dim=1)
    seen = F.grid_sample(pair, grid, mode="bilinear", padding_mode="border", align_corners=False)
    within = (grid.abs() <= 1).all(dim=3)
    return (seen[:, 0] > 0.5).to(target.dtype), seen[:, 1] * within


def change_light(images: Tensor, appearance: Appearance) -> Tensor:
    """Gain, shade, contrast, saturation and gamma of views ``[B, 3, S, S]`` with values in [0, 1]."""
    light = appearance.light.to(images.device)[:, :, None, None]
    y, x = _axes(images)
    images = images * light[:, :3] * (1 + light[:, 7:8] * x + light[:, 8:9] * y)
    middle = images.mean((1, 2, 3), keepdim=True)
    images = middle + (images - middle) * light[:, 3:4]
    grey = images.mean(1, keepdim=True)
    return (grey + (images - grey) * light[:, 4:5]).clamp(0, 1).pow(light[:, 5:6])


def draw_hairs(images: Tensor, appearance: Appearance) -> Tensor:
    """Views with their hairs: parabolas, the distance to which is taken along their second axis and scaled by their
    slope, which is right to first order.
    """
    if not appearance.hairs[..., 6].any():
        return images
    y, x = _axes(images)
    parts = appearance.hairs.to(images.device)[..., None, None].unbind(2)  # each [B, MOST_HAIRS, 1, 1]
    angle, offset, curvature, begin, end, half_width, opacity, grey, brown = parts
    along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    distance = (across - offset - curvature * along**2).abs() / (1 + (2 * curvature * along) ** 2).sqrt()
    pixel = 2 / images.shape[2]
    cover = opacity * ((half_width - distance) / pixel + 0.5).clamp(0, 1) * ((along > begin) & (along < end))
    channels = torch.linspace(0, 1, 3, device=images.device)[:, None, None]
    for hair in range(cover.shape[1]):
        colour = grey[:, hair, None] * (1 - brown[:, hair, None] * channels)
        images = torch.lerp(images, colour.expand_as(images), cover[:, hair, None])
    return images


def draw_corners(images: Tensor, target: Tensor, weight: Tensor, appearance: Appearance) -> tuple[Tensor, ...]:
    """Views, targets and weights ``[B, S, S]`` with dark corners, which are background for sure."""
    y, x = _axes(images)
    parts = appearance.corners.to(images.device)[..., None, None].unbind(1)  # each [B, 1, 1]
    middle_x, middle_y, radius, softness, grey, opacity = parts
    distance = ((x - middle_x) ** 2 + (y - middle_y) ** 2).sqrt()
    cover = opacity * ((distance - radius) / softness).sigmoid()
    outside = cover > 0.5
    images = torch.lerp(images, grey[:, None].expand_as(images), cover[:, None])
    return images, target * ~outside, torch.where(outside, 1.0, weight)


def add_noise(images: Tensor, appearance: Appearance) -> Tensor:
    """Views with their noise."""
    return images + appearance.light[:, 6].to(images.device)[:, None, None, None] * appearance.noise.to(images.device)


def _uniform(generators: Sequence[torch.Generator], count: int) -> Tensor:
    """``[B, count]`` in [0, 1), a row a generator."""
    return torch.stack([torch.rand(count, generator=each) for each in generators])


def _between(u: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * u


def _factor(u: Tensor, strength: float) -> Tensor:
    return 1 + strength * (2 * u - 1)


def _sign(u: Tensor) -> Tensor:
    return torch.where(u < 0.5, 1.0, -1.0)


def _grid(geometry: Geometry, images: Tensor, size: int) -> Tensor:
    """Where the pixels of views of `size` lie in their images: ``[B, size, size, 2]``."""
    matrix = geometry.matrix.to(images)
    return F.affine_grid(matrix, [len(matrix), 1, size, size], align_corners=False)


def _axes(images: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates of the rows ``[S, 1]`` and columns ``[S]`` of square views."""
    size = images.shape[2]
    axis = (torch.arange(size, device=images.device, dtype=images.dtype) + 0.5) * 2 / size - 1
    return axis[:, None], axis
