"""What readers share: the error, one picture of a medical file, and the window that its values are shown in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class ImageError(ValueError):
    """A file that is not a usable image; the message names it and says why."""


Window = tuple[float, float]

CT_WINDOW = (-512.0, 512.0)  # Hounsfield units

AIR = -500.0  # Hounsfield units; only CT has values this low


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where a slice lies in its volume, and the volume in the world: what is needed to write labels back.

    Attributes:
        affine: float64 [4, 4], from voxel indexes of the volume to RAS+ positions in mm.
        shape: the volume's shape as stored, 2 or more axes; those after the third have length 1.
        place: the slice in the volume's first three axes.
        orientation: [3, 2] as in nibabel.orientations, from the volume's axes to columns, rows and slices as shown.
        header: of a NIfTI file; None for DICOM.
    """

    affine: NDArray[np.float64]
    shape: tuple[int, ...]
    place: tuple[slice, ...]
    orientation: NDArray[Any]
    header: Any = None


@dataclass(frozen=True, eq=False)
class Slice:
    """One picture of a medical file.

    Attributes:
        pixels: float32 [H, W] in the modality's units (Hounsfield units for CT), or uint8 [H, W, 3].
        window: the lowest and highest value to show, as the file says; None if it says nothing.
        geometry: None where a label map will not be written back.
        modality: as DICOM abbreviates it, such as "CT" or "MR"; "" if it is not known.
        inverted: whether low values are bright (MONOCHROME1).
    """

    pixels: NDArray[Any]
    window: Window | None = None
    geometry: Geometry | None = None
    modality: str = ""
    inverted: bool = False


@contextmanager
def needs_package(name: str, path: Path) -> Iterator[None]:
    """Around an import: says what to install when the package is missing."""
    try:
        yield
    except ImportError as error:
        raise ImageError(f'{path}: needs the package {name}: pip install "msformer[medical]"') from error


@contextmanager
def decoding(path: Path, kind: str) -> Iterator[None]:
    """Turns whatever a decoder raises on a damaged file into ImageError."""
    try:
        path.open("rb").close()  # the packages hide why a file cannot be opened
        yield
    except (ImageError, FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:
        raise ImageError(f"{path}: damaged or unsupported {kind} file: {error}") from error


def show(slice: Slice, window: Window | None = None) -> NDArray[np.uint8]:
    """The picture in 8 bits, ``[H, W]`` or ``[H, W, 3]``, within a window, by default `default_window`."""
    low, high = default_window(slice) if window is None else window
    if slice.pixels.ndim == 3:
        return slice.pixels
    shown = apply_window(slice.pixels, low, high)
    return 255 - shown if slice.inverted else shown


def apply_window(pixels: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Values of any shape -> 0 (`low` and below) to 255 (`high` and above), linear between and rounded.

    Raises:
        ValueError: `low` is not below `high`, or they are not finite.
    """
    if not low < high or not np.isfinite([low, high]).all():
        raise ValueError(f"window: expected low < high, got {low:g} and {high:g}")
    values = np.clip(pixels.astype(np.float64), low, high)
    return np.rint((values - low) / (high - low) * 255).astype(np.uint8)


def default_window(slice: Slice) -> Window:
    """The file's own window; for CT without one -512 to 512 HU; 0 to 255 for colour; else the 0.5 and 99.5 percentiles.

    Where the percentiles are equal, the minimum and maximum are taken; a constant picture will be all black.
    """
    if slice.window is not None:
        return slice.window
    if slice.pixels.ndim == 3:
        return 0.0, 255.0
    if slice.modality == "CT":
        return CT_WINDOW
    low, high = np.percentile(slice.pixels, [0.5, 99.5])
    if low >= high:
        low, high = slice.pixels.min(), slice.pixels.max()
    return float(low), float(high) if high > low else float(np.nextafter(low, np.inf, dtype=np.float32))
