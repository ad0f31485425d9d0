"""The sizes that are measured: those of MS-Former, of the stages of SegFormer and PVTv2, and small ones."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

_TEXT = re.compile(r"(\d+)x(\d+)x(\d+)x(\d+)(?:h(\d+))?(?:m(\d+))?")
EXPECTED = "BATCHxHEIGHTxWIDTHxDIM, then optionally hHEADS and mHIDDEN, such as 1x257x257x100 or 8x64x64x64h2m256"


@dataclass(frozen=True)
class Shape:
    """Images of ``height * width`` tokens with ``dim`` channels, attention heads, and width of the hidden layer."""

    batch: int
    height: int
    width: int
    dim: int
    heads: int = 1
    hidden: int = 0
    """0 means the usual 4 * dim."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", self.hidden or 4 * self.dim)
        for name in ("batch", "height", "width", "dim", "heads", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.dim % self.heads:
            raise ValueError(f"heads: {self.heads} does not divide {self.dim} channels")

    @property
    def tokens(self) -> int:
        """Of all images of the batch."""
        return self.batch * self.height * self.width

    def __str__(self) -> str:
        hidden = "" if self.hidden == 4 * self.dim else f"m{self.hidden}"
        return f"{self.batch}x{self.height}x{self.width}x{self.dim}h{self.heads}{hidden}"


def parse_shape(text: str) -> Shape:
    """The shape that a text such as ``1x257x257x100h1`` names.

    Raises:
        ValueError: not of that form, a size below 1, heads that do not divide the channels.
    """
    match = _TEXT.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is not a shape; expected {EXPECTED}")
    batch, height, width, dim, heads, hidden = (int(part) if part is not None else None for part in match.groups())
    assert batch is not None
    assert height is not None
    assert width is not None
    assert dim is not None
    if heads == 0 or hidden == 0:
        raise ValueError(f"{text!r}: heads and hidden must be at least 1")
    return Shape(batch, height, width, dim, heads or 1, hidden or 0)


def _square(size: int, dim: int, heads: int) -> Shape:
    return Shape(1, size, size, dim, heads)


MSFORMER = tuple(_square(size, 100, 1) for size in (65, 129, 257, 513, 1025))
# strides 4, 8, 16 and 32 of an image of 512 x 512
SEGFORMER = (_square(128, 32, 1), _square(64, 64, 2), _square(32, 160, 5), _square(16, 256, 8))
PVT = (_square(128, 64, 1), _square(64, 128, 2), _square(32, 320, 5), _square(16, 512, 8))
SMALL = (_square(14, 160, 5), _square(14, 256, 8), _square(7, 256, 8), _square(7, 512, 8))
STAGES = SEGFORMER + PVT + SMALL

_FAMILIES = {"MS-Former": MSFORMER, "SegFormer stages": SEGFORMER, "PVTv2 stages": PVT, "few tokens": SMALL}


def batched(shapes: tuple[Shape, ...], batch: int) -> tuple[Shape, ...]:
    return tuple(replace(shape, batch=batch) for shape in shapes)


def family(shape: Shape) -> str:
    """The group of the grid that a shape belongs to, by whatever size of batch."""
    single = replace(shape, batch=1)
    name = next((name for name, members in _FAMILIES.items() if single in members), None)
    if name is None:
        name = "MS-Former" if replace(MSFORMER[0], height=shape.height, width=shape.width) == single else "other"
    return name if shape.batch == 1 else f"{name}, batch {shape.batch}"
