"""What decides a training, but for the images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

STEPS = 1700
"""About 5 minutes on two cores."""
FEW_IMAGES = 50
"""A network that was trained on fewer is no better than the rules that taught it."""
PRECISIONS = ("float32", "bfloat16")
SIZES = (65, 73, 81, 89, 97)
"""Sides that crops have, pixels; all crops of a step have the same."""
PREDICTION_SIZE = 113
"""Side at which a trained network is asked, pixels: crops show three quarters of an image, mostly."""
WARM_UP = 20
"""Steps over which the learning rate rises."""
WEIGHT_DECAY = 1e-4
LARGEST_GRADIENT = 1.0
"""Norm that gradients are cut to."""
SECOND_LEARNING_RATE = 1e-3
"""Of every round but the first."""
AGREED = 0.85
"""In further rounds, images are left out on which network and fused mask agree less than this."""


class SettingsError(ValueError):
    """Settings that no training has, whatever its images."""


@dataclass(frozen=True)
class Settings:
    """Two trainings with the same settings on the same images give the same weights, on one machine in one process.

    Raises:
        SettingsError: a number out of range, or settings that exclude each other.
    """

    objective: str
    weights: Mapping[str, float]
    """Of the terms of the loss."""
    domain: str
    steps: int
    """A round."""
    seed: int
    batch: int
    """Crops a step, of all processes together."""
    accumulate: int
    """Parts that each process splits its share of the batch in, one after the other, to save memory."""
    precision: str
    rounds: int
    learning_rate: float
    embed_dim: int
    depth: int
    device: str
    """Kind of device."""
    backend: str
    sizes: tuple[int, ...] = field(default=SIZES)

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("seed", 0), ("batch", 1), ("accumulate", 1), ("rounds", 1), ("depth", 1)):
            if getattr(self, name) < least:
                raise SettingsError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.precision not in PRECISIONS:
            raise SettingsError(f"precision: unknown {self.precision!r}; expected one of {', '.join(PRECISIONS)}")
        if self.rounds > 1 and self.objective != "teacher":
            raise SettingsError(f"rounds: {self.rounds} are for the objective teacher, got {self.objective}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise SettingsError(f"learning_rate: expected a positive number, got {self.learning_rate}")

    def check_split(self, processes: int) -> None:
        """Raises SettingsError where a batch does not divide into equal parts."""
        parts = processes * self.accumulate
        if self.batch % parts:
            among = f"{processes} processes, accumulate {self.accumulate}"
            raise SettingsError(f"batch: expected a multiple of {parts} for {among}, got {self.batch}")

    def rate(self, step: int, round: int = 1) -> float:
        """The learning rate of a step, counted from 0: a short rise, then half a cosine to 0."""
        highest = self.learning_rate if round == 1 else min(self.learning_rate, SECOND_LEARNING_RATE)
        rise = min(1.0, (step + 1) / WARM_UP)
        return highest * rise * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def record(self) -> dict[str, Any]:
        """As plain JSON."""
        return {**asdict(self), "weights": dict(self.weights), "sizes": list(self.sizes)}
