"""Small trainings: images that teach something within seconds, and settings that make steps short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage

from msformer.synthetic import synthetic_lesion
from msformer.training.augment import Strengths
from msformer.training.batches import Batches
from msformer.training.lessons import Pool
from msformer.training.objectives import find_objective
from msformer.training.settings import Settings

OPTIONS = ["--steps", "20", "--batch", "2", "--embed-dim", "6", "--workers", "1", "--device", "cpu"]
"""Of the command line."""


def small_settings(**changes: Any) -> Settings:
    """Of a network of width 6 that sees 33 pixels."""
    objective = find_objective(changes.get("objective", "teacher"))
    settings: dict[str, Any] = {
        "objective": objective.name,
        "weights": objective.weights,
        "domain": "dermoscopy",
        "steps": 20,
        "seed": 0,
        "batch": 4,
        "accumulate": 1,
        "precision": "float32",
        "rounds": 1,
        "learning_rate": 2e-3,
        "embed_dim": 6,
        "depth": 1,
        "device": "cpu",
        "backend": "reference",
        "sizes": (33, 41),
    }
    return Settings(**{**settings, **changes})


def small_pool(images: int = 6, size: int = 49) -> Pool:
    """Dark discs on noise, with their targets."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:size, :size]
    pixels, target = [], []
    for _ in range(images):
        y, x = random.uniform(0.4, 0.6, 2) * size
        disc = np.hypot(rows - y, columns - x) < random.uniform(0.15, 0.3) * size
        values = random.normal(170, 15, (3, size, size)) - 90 * disc
        pixels.append(torch.from_numpy(values.clip(0, 255)).to(torch.uint8))
        target.append(torch.from_numpy(disc).to(torch.uint8))
    weight = torch.full((images, size, size), 255, dtype=torch.uint8)
    return Pool(tuple(map(str, range(images))), torch.stack(pixels), torch.stack(target), weight)


def small_batches(settings: Settings, share: tuple[int, int] = (0, 1)) -> Batches:
    """Of `small_pool`, with the settings' seed."""
    views = find_objective(settings.objective).views
    strengths = Strengths(noise=0.1, hairs=0.4, corners=0.4)
    return Batches(
        small_pool(),
        strengths,
        seed=settings.seed,
        batch=settings.batch,
        sizes=settings.sizes,
        views=views,
        share=share,
    )


def save_lesions(folder: Path, count: int, size: int = 96) -> dict[str, np.ndarray]:
    """Writes synthetic lesions; returns their masks by name."""
    folder.mkdir(parents=True)
    masks = {}
    for number in range(count):
        lesion = synthetic_lesion(number, size, size)
        PILImage.fromarray(lesion.image).save(folder / f"{number:02d}.png")
        masks[f"{number:02d}"] = lesion.mask
    return masks
