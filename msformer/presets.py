"""Settings of a fit, and names for some of them. docs/preset-results.md has what each gains and costs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

Size = int | tuple[int, int] | None


@dataclass(frozen=True)
class LossWeights:
    """Factors of the three losses; 0 switches one off, and it is then not computed.

    The defaults are those under which the published demo scores itself.

    Raises:
        ValueError: a factor that is negative or not finite, or all of them zero.
    """

    ce: float = 1.0
    inter: float = 1.5
    intra: float = 1.3

    def __post_init__(self) -> None:
        for name, weight in asdict(self).items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"weights: {name} is {weight}, expected a finite number of at least 0")
        if not any(asdict(self).values()):
            raise ValueError("weights: all losses are switched off")


@dataclass(frozen=True)
class Preset:
    """How an image is prepared, and how an MS-Former is fitted to it.

    Raises:
        ValueError: a number out of range.
    """

    size: Size
    """Side the image is resized to, or height and width; None keeps its size."""
    max_steps: int
    min_labels: int
    """The fit stops when the map has no more labels than this."""
    weights: LossWeights
    embed_dim: int
    num_clusters: int | None
    depth: int
    num_heads: int
    """Of the `MSFormer`."""
    learning_rate: float
    momentum: float
    standardise: bool = False
    """Each channel of the resized image is brought to mean 0 and variance 1."""
    icnr: bool = False
    """The four matrices of `MSFormer.linear_up` start equal: no checkerboards where the image is flat."""
    margin: int = 0
    """Pixels mirrored around the resized image and taken off the label map, so that its rim is not labelled for the
    zeros that convolutions pad with."""

    def __post_init__(self) -> None:
        for name, least in (("max_steps", 1), ("min_labels", 1), ("margin", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate: expected a positive number, got {self.learning_rate}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected a number in [0, 1), got {self.momentum}")


PUBLISHED = Preset(
    size=257,
    max_steps=50,
    min_labels=3,
    weights=LossWeights(),
    embed_dim=100,
    num_clusters=None,
    depth=2,
    num_heads=1,
    learning_rate=0.1,
    momentum=0.9,
)
"""Of the published demo (Karimijafarbigloo et al., "MS-Former", MIDL 2023)."""

SMOOTH = replace(PUBLISHED, icnr=True, margin=8)
"""Without checkerboards, and without a frame that shares its label with the object (docs/preset-results.md)."""

QUICK = replace(SMOOTH, size=129)
"""In less than half of the time: half the size, with coarser borders (docs/preset-results.md)."""

PRESETS = {"smooth": SMOOTH, "published": PUBLISHED, "quick": QUICK}
DEFAULT = "smooth"


def find_preset(name: str, **changes: Any) -> Preset:
    """The preset of this name, with other values where these are not None.

    Raises:
        ValueError: an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: unknown {name!r}; expected one of {', '.join(PRESETS)}")
    return replace(PRESETS[name], **{key: value for key, value in changes.items() if value is not None})
