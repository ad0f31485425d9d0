"""Reading a file as an image, whatever kind it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from msformer.io.base import AIR, CT_WINDOW, apply_window, show
from msformer.io.medical import is_medical, read_slice
from msformer.io.ordinary import read_ordinary


@dataclass(frozen=True)
class Reading:
    """How files without a white point are read.

    Raises:
        ValueError: a window whose ends are not finite or not in order.
    """

    window: tuple[float, float] | None = None
    """The values that become black and white; None: what the file says, else the usual for its kind."""
    slice_index: int | None = None
    """The slice of a NIfTI volume, counted from the feet; None: the middle one."""

    def __post_init__(self) -> None:
        if self.window is not None and not -math.inf < self.window[0] < self.window[1] < math.inf:
            raise ValueError(f"window: expected two numbers, the lower first, got {self.window}")


def read_image(path: str | PathLike[str], reading: Reading = Reading()) -> NDArray[np.generic]:
    """The pixels of a PNG, JPEG, BMP or TIFF file as stored: ``[H, W]``, or ``[H, W, 3]``; 8 or 16 bits, or floating
    point. Of a DICOM or NIfTI file (`msformer.io.medical`), the slice as it is shown, 8 bits.

    EXIF orientation is applied, palettes are resolved, alpha is dropped. Of a TIFF with several pages the first is
    read, with a warning. A window is applied to any grey image; without one, an image of signed integers as low as
    only CT has, such as a TIFF of Hounsfield units, is shown from -512 to 512.

    Raises:
        FileNotFoundError, PermissionError: as the system says, naming the file.
        ImageError: not an image, damaged, truncated, or of a kind that is not supported.
    """
    path = Path(path)
    if is_medical(path):
        return show(read_slice(path, reading.slice_index), reading.window)
    pixels = read_ordinary(path)
    window = CT_WINDOW if reading.window is None and _has_air(pixels) else reading.window
    return pixels if window is None or pixels.ndim == 3 else apply_window(pixels, *window)


def is_ct(path: Path, slice_index: int | None = None) -> bool:
    """Whether a file is of computed tomography: as DICOM says, else by values as low as only CT has."""
    if is_medical(path):
        return read_slice(path, slice_index).modality == "CT"
    return _has_air(read_ordinary(path))


def _has_air(pixels: NDArray[Any]) -> bool:
    """Of signed integers; floating-point values as low may be anything."""
    return pixels.dtype.kind == "i" and bool(pixels.min(initial=0) <= AIR)


def is_colour(image: Tensor) -> bool:
    """Whether the channels of an image ``[3, H, W]`` differ."""
    return not bool((image[0] == image[1]).all() and (image[0] == image[2]).all())
