"""Synthetic dermoscopy-like images with known masks, so that a first run needs no data.

Each has a skin tone, uneven light, a vignette and fine texture; a lesion with an irregular, soft border, two pigments
and a darker rim; and hairs across it. Everything follows from the seed. They look like dermoscopy from afar, no more:
they show that the program works, not how well it does on patients.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFilter

SKIN = np.array([[224, 172, 150], [214, 160, 128], [236, 192, 172], [196, 140, 108]], dtype=np.float64)
PIGMENT = np.array([[116, 70, 50], [88, 52, 42], [140, 92, 66], [70, 44, 40]], dtype=np.float64)

FADING = 1.4
"""Widths of its border that a varied lesion's mask takes in: up to where it has faded to a fifth."""


class SyntheticLesion(NamedTuple):
    """An image ``[H, W, 3]`` uint8 and the true mask ``[H, W]`` of its lesion."""

    image: NDArray[np.uint8]
    mask: NDArray[np.bool_]


def synthetic_lesion(seed: int, height: int = 384, width: int = 512, *, varied: bool = False) -> SyntheticLesion:
    """One image with its mask; the same for the same arguments.

    Args:
        seed: of all that is drawn.
        height, width: of the image, pixels.
        varied: with up to 30 hairs, dark corners in two fifths of the images, and light that may come from one side:
            images on which simple rules fail now and then. The mask takes in where the lesion fades, as those who draw
            masks do; otherwise it ends at half of the contrast.

    Raises:
        ValueError: an image smaller than 64 x 64.
    """
    if min(height, width) < 64:
        raise ValueError(f"height, width: expected at least 64 each, got {height} and {width}")
    random = np.random.default_rng([seed, 7])
    skin = SKIN[random.integers(len(SKIN))] + random.normal(0, 5, 3)
    image = np.broadcast_to(skin, (height, width, 3)).copy()
    image += 5 * _noise(random, height, width, 24)[..., None] + 3 * _noise(random, height, width, 4)[..., None]
    distance = _distance_to_border(random, height, width)
    image, softness = _paint_lesion(random, image, distance)
    image = _paint_hairs(random, image, int(random.integers(0, 30) if varied else random.integers(3, 12)))
    image *= _light(random, height, width, steepest=0.25 if varied else 0.12)[..., None]
    if varied and random.random() < 0.4:
        image *= _field_of_view(random, height, width)[..., None]
    image += random.normal(0, 2.0, image.shape)
    mask = distance < (softness * FADING if varied else 0)
    return SyntheticLesion(image.clip(0, 255).round().astype(np.uint8), mask)


def _noise(random: np.random.Generator, height: int, width: int, scale: int) -> NDArray[np.float64]:
    """Smooth noise of zero mean and unit size, with features about `scale` pixels wide."""
    coarse = random.standard_normal((1, 1, height // scale + 3, width // scale + 3))
    return F.interpolate(torch.from_numpy(coarse), size=(height, width), mode="bicubic").numpy()[0, 0]


def _distance_to_border(random: np.random.Generator, height: int, width: int) -> NDArray[np.float64]:
    """Negative inside the lesion, in units of its radius."""
    size = min(height, width)
    rows, columns = np.mgrid[:height, :width].astype(np.float64)
    y = (rows - height * random.uniform(0.42, 0.58)) / size
    x = (columns - width * random.uniform(0.42, 0.58)) / size
    turn, stretch = random.uniform(0, np.pi), random.uniform(0.75, 1.0)
    x, y = np.cos(turn) * x + np.sin(turn) * y, (np.cos(turn) * y - np.sin(turn) * x) / stretch
    angle, radius = np.arctan2(y, x), np.hypot(x, y)
    border = np.full_like(radius, random.uniform(0.2, 0.33))
    for wave in range(2, 8):
        border *= 1 + random.normal(0, 0.16 / wave) * np.cos(wave * angle + random.uniform(0, 2 * np.pi))
    return radius / border - 1 + 0.02 * _noise(random, height, width, 14)


def _paint_lesion(
    random: np.random.Generator, image: NDArray[np.float64], distance: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """The image with the lesion, and the width of its border, in units of its radius."""
    height, width = distance.shape
    first, second = PIGMENT[random.choice(len(PIGMENT), 2, replace=False)]
    patches = 1 / (1 + np.exp(-3 * _noise(random, height, width, 40)))[..., None]
    pigment = patches * first + (1 - patches) * second
    # a net of fine lines, and a darker rim
    pigment = pigment * (1 + 0.10 * _noise(random, height, width, 6))[..., None]
    pigment = pigment * (1 - 0.18 * np.exp(-((distance + 0.12) ** 2) / 0.01))[..., None]
    softness = random.uniform(0.03, 0.08)
    cover = random.uniform(0.75, 0.95) / (1 + np.exp(np.clip(distance / softness, -50, 50)))
    return image * (1 - cover[..., None]) + pigment * cover[..., None], softness


def _paint_hairs(random: np.random.Generator, image: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    height, width = image.shape[:2]
    layer = PILImage.new("L", (2 * width, 2 * height), 0)
    draw = ImageDraw.Draw(layer)
    for _ in range(count):
        start, middle, end = (random.uniform(-0.1, 1.1, 2) * (2 * width, 2 * height) for _ in range(3))
        t = np.linspace(0, 1, 60)[:, None]
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * ((start + end) / 2 + 0.25 * (middle - start)) + t**2 * end
        draw.line([tuple(point) for point in curve.tolist()], fill=int(random.integers(130, 230)), width=3)
    smooth = layer.filter(ImageFilter.GaussianBlur(0.8)).resize((width, height), PILImage.Resampling.BOX)
    cover = np.asarray(smooth, dtype=np.float64)[..., None] / 255
    return image * (1 - cover) + np.array([40.0, 30.0, 26.0]) * cover


def _light(random: np.random.Generator, height: int, width: int, steepest: float) -> NDArray[np.float64]:
    rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    angle = random.uniform(0, 2 * np.pi)
    slope = random.uniform(0.02, steepest) * (np.cos(angle) * columns + np.sin(angle) * rows)
    vignette = random.uniform(0.08, 0.22) * (rows**2 + columns**2) / 2
    return 1.04 + slope - vignette


def _field_of_view(random: np.random.Generator, height: int, width: int) -> NDArray[np.float64]:
    """1 within a circle that leaves the corners out, near 0 beyond, with a soft edge."""
    rows, columns = np.mgrid[:height, :width]
    y, x = height * random.uniform(0.46, 0.54), width * random.uniform(0.46, 0.54)
    half = np.hypot(height, width) / 2
    distance = (np.hypot(rows - y, columns - x) / half - random.uniform(0.75, 0.95)) / random.uniform(0.01, 0.08)
    return 0.05 + 0.95 / (1 + np.exp(np.clip(distance, -50, 50)))
