"""What readers share: the error, one picture of a medical file, and the window that its values are shown in."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msformer.extras import missing_package
from msformer.io.voi import Curve


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
        shape: the shape as stored, 2 or more axes; those after the third count volumes.
        place: the slice in the axes as stored, 3 or more: those that `shape` lacks have length 1.
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
        curve: how the file wants values shown, where that is not linear between the ends of the window.
        background: bool [H, W], pixels without a value of their own, which have the darkest of the others; None: none.
        index, count: which picture of how many the file has.
        modality_source: where the modality comes from: the file, the user, or what else; "" if it is not known.
        notes: what was assumed where the file says nothing or nonsense, a sentence each.
    """

    pixels: NDArray[Any]
    window: Window | None = None
    geometry: Geometry | None = None
    modality: str = ""
    inverted: bool = False
    curve: Curve | None = None
    background: NDArray[np.bool_] | None = None
    index: int = 0
    count: int = 1
    modality_source: str = ""
    notes: tuple[str, ...] = ()


@dataclass
class Notes:
    """Collects what is assumed of a file."""

    path: Path
    sentences: list[str] = field(default_factory=list)

    def assume(self, sentence: str) -> None:
        """For the record."""
        if sentence not in self.sentences:
            self.sentences.append(sentence)

    def warn(self, sentence: str) -> None:
        """For the record and for the user, as the picture or its place may be wrong."""
        if sentence not in self.sentences:
            self.sentences.append(sentence)
            warnings.warn(f"{self.path}: {sentence}", stacklevel=2)


@contextmanager
def needs_package(path: Path) -> Iterator[None]:
    """Around an import: says what to install when the package is missing."""
    try:
        yield
    except ImportError as error:
        raise ImageError(f"{path}: {missing_package(error) or error}") from error


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
    """The picture in 8 bits, ``[H, W]`` or ``[H, W, 3]``: within a window, by default as the file says, else
    `default_window`."""
    if slice.pixels.ndim == 3:
        return slice.pixels
    if window is None and slice.curve is not None:
        shown = np.rint(slice.curve.brightness(slice.pixels) * 255).astype(np.uint8)
    else:
        shown = apply_window(slice.pixels, *(default_window(slice) if window is None else window))
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
    """The file's own window; for CT without one -512 to 512 HU; 0 to 255 for colour; else the 0.5 and 99.5 percentiles
    of all but the background.

    Where the percentiles are equal, the minimum and maximum are taken; a constant picture will be all black.
    """
    if slice.window is not None:
        return slice.window
    if slice.pixels.ndim == 3:
        return 0.0, 255.0
    if slice.modality == "CT":
        return CT_WINDOW
    values = slice.pixels if slice.background is None else slice.pixels[~slice.background]
    if not values.size:
        values = slice.pixels
    low, high = np.percentile(values.astype(np.float64), [0.5, 99.5])
    if low >= high:
        low, high = values.min(), values.max()
    return float(low), float(high) if high > low else float(np.nextafter(low, np.inf, dtype=np.float32))


def fill_background(values: NDArray[Any], background: NDArray[np.bool_], inverted: bool = False) -> None:
    """Gives the pixels of the background the darkest of the other values, in place; 0 if there is no other."""
    if background.any():
        others = values[~background]
        values[background] = 0 if not others.size else others.max() if inverted else others.min()


def as_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """Values as float32; finite ones that it cannot hold become the largest or smallest that it can."""
    limit = np.finfo(np.float32).max
    return np.ascontiguousarray(np.where(np.isfinite(values), np.clip(values, -limit, limit), values), np.float32)
