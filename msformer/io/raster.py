"""A decoded picture of an ordinary file, upright, and what its kind of file knows besides the colours."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msformer.io.base import ImageError

MOST_PIXELS = 2**30
"""Of a file: more, as whole slides have, would need tens of gigabytes on the way to a label map."""


@dataclass(frozen=True, eq=False)
class Raster:
    """A picture of ``[H, W]`` pixels."""

    pixels: NDArray[Any]
    """``[H, W]`` or ``[H, W, channels]``, as stored; palettes are resolved, alpha is dropped."""
    alpha: NDArray[np.uint8] | None = None
    """``[H, W]``, 0 where it is transparent; None for a file without transparency."""
    indexes: NDArray[Any] | None = None
    """``[H, W]``, the numbers that a palette made colours of."""
    lossy: bool = False
    """Whether the codec changes values, as JPEG does."""
    orientation: int = 1
    """By which the stored picture was turned, as TIFF and EXIF number them."""
    notes: tuple[str, ...] = ()
    """What was assumed or left out, a sentence each."""

    def turned(self, orientation: int) -> Raster:
        """A picture as it lies in a file, upright."""
        pixels = turn_upright(self.pixels, orientation)
        alpha = None if self.alpha is None else turn_upright(self.alpha, orientation)
        indexes = None if self.indexes is None else turn_upright(self.indexes, orientation)
        return replace(self, pixels=pixels, alpha=alpha, indexes=indexes, orientation=orientation)


def check_size(path: Path, height: int, width: int, samples: int = 1) -> None:
    """Raises ImageError for more pixels than are read, or more than four samples for each of so many."""
    if height * width * max(samples / 4, 1) > MOST_PIXELS:
        raise ImageError(f"{path}: has {width} x {height} pixels; at most 2^30 are read, take a smaller copy or a part")


def eight_bits(samples: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """The upper 8 of the bits of unsigned samples, or what fewer bits mean in 8."""
    if samples.dtype == np.bool_:
        return np.asarray(samples, np.uint8) * np.uint8(255)
    if bits < 8:  # stored in bytes, the upper bits of which mean nothing
        white = 2**bits - 1
        return ((samples & white) * (255 / white)).round().astype(np.uint8)
    return samples.astype(np.uint8) if bits == 8 else (samples >> (bits - 8)).astype(np.uint8)


def turn_upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Undoes an orientation as TIFF and EXIF number them, 1 to 8 (TIFF 6.0, page 36)."""
    if orientation in (5, 6, 7, 8):
        pixels = np.swapaxes(pixels, 0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels
