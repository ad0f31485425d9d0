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

from msformer.io.base import CT_WINDOW, Notes, Slice, apply_window, default_window, show
from msformer.io.medical import is_medical, read_slice
from msformer.io.modality import GIVEN, find_modality, warn_of_air
from msformer.io.ordinary import drop_extra_channels, read_raster


@dataclass(frozen=True)
class Reading:
    """How files without a white point are read.

    Raises:
        ValueError: a window whose ends are not finite or not in order.
    """

    window: tuple[float, float] | None = None
    """The values that become black and white; None: what the file says, else the usual for its kind."""
    slice_index: int | None = None
    """The slice of a NIfTI volume, counted from the feet, or the frame of a DICOM file; None: the middle one."""
    modality: str | None = None
    """As DICOM abbreviates it; None: what the file says."""

    def __post_init__(self) -> None:
        if self.window is not None and not -math.inf < self.window[0] < self.window[1] < math.inf:
            raise ValueError(f"window: expected two numbers, the lower first, got {self.window}")


AS_IT_IS = Reading()
"""As the file says."""


@dataclass(frozen=True, eq=False)
class Picture:
    """An image file as it was read."""

    pixels: NDArray[np.generic]
    """As `read_image` gives them."""
    modality: str
    """As DICOM abbreviates it; "" if nothing says it."""
    facts: dict[str, Any]
    """How the file was read and what was assumed, as plain JSON."""
    slice: Slice | None = None
    """Of a DICOM or NIfTI file."""


def read_image(path: str | PathLike[str], reading: Reading = AS_IT_IS) -> NDArray[np.generic]:
    """The pixels of an ordinary picture (`msformer.io.ordinary`) as stored: ``[H, W]``, or ``[H, W, 3]``; 8 or 16 bits,
    or floating point. Of a DICOM or NIfTI file (`msformer.io.medical`), the slice as it is shown, 8 bits.

    EXIF orientation is applied, palettes are resolved, alpha is dropped. Of a TIFF with several pages the largest is
    read, with a warning. A window is applied to any grey image; without one, an image of signed or floating-point
    values of modality CT is shown from -512 to 512. An image is of CT if `reading` or a sidecar says so, or its name
    and its values do; never by its values alone.

    Raises:
        FileNotFoundError, PermissionError: as the system says, naming the file.
        ImageError: not an image, damaged, truncated, or of a kind that is not supported.
    """
    return read_picture(path, reading).pixels


def read_picture(path: str | PathLike[str], reading: Reading = AS_IT_IS) -> Picture:
    """As `read_image`, with what is known of the file; raises what that does."""
    path = Path(path)
    if is_medical(path):
        return _medical(read_slice(path, reading.slice_index, reading.modality), reading)
    raster = read_raster(path)
    pixels: NDArray[Any] = drop_extra_channels(raster.pixels, str(path))
    notes = Notes(path, list(raster.notes))
    modality, source = find_modality(path, reading.modality, lambda: float(pixels.min(initial=0)), notes)
    plain = pixels.ndim == 3 or pixels.dtype.kind not in "if"
    if modality == "CT" and plain and reading.window is None:
        notes.assume("colours and unsigned values are no Hounsfield units; the picture is shown as it is stored")
    if pixels.dtype.kind == "i" and reading.window is None:
        warn_of_air(float(pixels.min(initial=0)), modality, notes)
    window = CT_WINDOW if reading.window is None and modality == "CT" and not plain else reading.window
    facts: dict[str, Any] = {"modality": modality, "modality_source": source, "notes": notes.sentences}
    if window is None or pixels.ndim == 3:
        return Picture(pixels, modality, facts)
    facts |= {"window": list(window), "window_source": "the modality" if reading.window is None else GIVEN}
    return Picture(apply_window(pixels, *window), modality, facts)


def _medical(found: Slice, reading: Reading) -> Picture:
    facts: dict[str, Any] = {"modality": found.modality, "modality_source": found.modality_source}
    facts |= {"index": found.index, "count": found.count, "notes": list(found.notes)}
    if found.pixels.ndim == 2:
        facts["window"] = list(default_window(found) if reading.window is None else reading.window)
        if reading.window is not None:
            facts["window_source"] = GIVEN
        elif found.window is not None:
            facts["window_source"] = "the file"
            facts["curve"] = "linear" if found.curve is None else type(found.curve).__name__.lower()
        else:
            facts["window_source"] = "the modality" if found.modality == "CT" else "percentiles"
    return Picture(show(found, reading.window), found.modality, facts, found)


def is_ct(path: Path, reading: Reading = AS_IT_IS) -> bool:
    """Whether a file is of computed tomography; see `read_image`."""
    return read_picture(path, reading).modality == "CT"


def is_colour(image: Tensor) -> bool:
    """Whether the channels of an image ``[3, H, W]`` differ."""
    return not bool((image[0] == image[1]).all() and (image[0] == image[2]).all())
