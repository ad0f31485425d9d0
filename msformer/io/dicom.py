"""DICOM files, through pydicom. A picture is shown as stored."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msformer.io.base import ImageError, Notes, Slice, as_float32, decoding, fill_background, needs_package
from msformer.io.dicom_file import DicomFile, is_dicom, open_dicom
from msformer.io.dicom_geometry import frame_geometry
from msformer.io.dicom_pixels import Layout, decode, read_layout
from msformer.io.dicom_tables import apply_palette, read_table
from msformer.io.dicom_values import Values
from msformer.io.dicom_windows import read_window
from msformer.io.modality import override

__all__ = ["count_frames", "is_dicom", "read_dicom"]


def count_frames(path: str | PathLike[str]) -> int:
    """How many pictures `read_dicom` can read from the file.

    Raises:
        FileNotFoundError, PermissionError, ImageError: as for `read_dicom`.
    """
    return _open(Path(path)).frames


def read_dicom(path: str | PathLike[str], index: int | None = None, modality: str | None = None) -> Slice:
    """A picture of a DICOM file, as stored: rows top to bottom, not turned.

    Rescaling (or the modality look-up table) is applied. Padding, and what is not finite, gets the darkest value of the
    other pixels: the lowest, or where `show` inverts, the highest. YBR and palettes become RGB, of 8 bits. Without a
    position, the picture is taken as axial, its first pixel at 0.

    Args:
        index: of the frame, counted from 0 in the order of the file; by default the middle one.
        modality: what the file is of, whatever it says; None: as it says.

    Raises:
        FileNotFoundError, PermissionError: as the system says, naming the file.
        ImageError: not DICOM, damaged, no picture, no such frame, pixels that cannot be decoded, pydicom missing.
    """
    path = Path(path)
    file = _open(path)
    if index is not None and not 0 <= index < file.frames:
        raise ImageError(f"{path}: expected a frame from 0 to {file.frames - 1}, got {index}")
    with decoding(path, "DICOM"), file.lock:
        return _read_frame(file, file.frames // 2 if index is None else index, modality)


def _open(path: Path) -> DicomFile:
    with needs_package(path):
        import pydicom  # noqa: F401
    with decoding(path, "DICOM"):
        return open_dicom(path)


def _read_frame(file: DicomFile, index: int, given: str | None) -> Slice:
    notes = Notes(file.path, file.notes.sentences.copy())
    values = file.frame(index, notes)
    layout = read_layout(file, values, notes)
    stored = decode(file, layout, index, notes)
    geometry = frame_geometry(file, index, layout, notes)
    modality, source = override(given, values.text("Modality").upper(), notes)
    common: dict[str, Any] = {"geometry": geometry, "modality": modality, "modality_source": source}
    common |= {"index": index, "count": file.frames}
    if layout.photometric == "PALETTE COLOR" or not layout.grey:
        pixels = _colour(file, values, layout, stored, notes)
        return Slice(pixels, notes=tuple(notes.sentences), **common)
    inverted = _inverted(values, layout, notes)
    grey = _rescaled(values, stored, modality, notes)
    padding = _padding(values, stored)
    background = ~np.isfinite(grey) | (padding & ~padding.all())
    fill_background(grey, background, inverted)
    window, curve = read_window(values, signed=bool(grey.min() < 0), notes=notes)
    shown = background if background.any() else None
    return Slice(
        as_float32(grey),
        window,
        inverted=inverted,
        curve=curve,
        background=shown,
        notes=tuple(notes.sentences),
        **common,
    )


def _colour(file: DicomFile, values: Values, layout: Layout, stored: NDArray[Any], notes: Notes) -> NDArray[np.uint8]:
    """Indexes of a palette, or samples, to 8 bits: ``[H, W, 3]``."""
    if layout.grey:
        pixels = apply_palette(stored, values, notes)
        if pixels is None:
            raise ImageError(f"{file.path}: its pixels are of a palette that it does not hold")
        return pixels
    if layout.stored < 8:
        return np.rint(stored * (255 / (2**layout.stored - 1))).astype(np.uint8)
    return np.ascontiguousarray((stored >> (layout.stored - 8)).astype(np.uint8))


def _inverted(values: Values, layout: Layout, notes: Notes) -> bool:
    """Whether low values are bright: as the photometric interpretation or the shape of the presentation LUT says."""
    shape, first = values.text("PresentationLUTShape").upper(), layout.photometric == "MONOCHROME1"
    if shape in ("IDENTITY", "INVERSE") and first != (shape == "INVERSE"):
        notes.warn(f"PresentationLUTShape {shape} contradicts {layout.photometric}; low values are shown bright")
    return first or shape == "INVERSE"


def _rescaled(values: Values, stored: NDArray[Any], modality: str, notes: Notes) -> NDArray[np.float64]:
    """Stored values ``[H, W]`` -> values in the modality's units (C.11.1)."""
    for item in values.items("ModalityLUTSequence")[:1]:
        table = read_table(item, "LUT", notes, signed=stored.dtype.kind == "i")
        if table is not None:
            return table.look_up(stored).astype(np.float64)
    slope, intercept = values.number("RescaleSlope"), values.number("RescaleIntercept")
    dose = values.number("DoseGridScaling")
    if slope is None and intercept is None and dose:
        return stored.astype(np.float64) * dose
    if slope is None and (intercept is not None or modality == "CT"):
        notes.warn("RescaleSlope is missing; 1 is assumed")
    if intercept is None and (slope is not None or modality == "CT"):
        notes.warn("RescaleIntercept is missing; 0 is assumed")
    if slope == 0:
        notes.warn("RescaleSlope is 0; 1 is assumed")
    return stored.astype(np.float64) * (slope or 1) + (intercept or 0)


def _padding(values: Values, stored: NDArray[Any]) -> NDArray[np.bool_]:
    if stored.dtype.kind == "f":
        value = values.numbers("FloatPixelPaddingValue")
        return stored == value[0] if value.size else np.zeros(stored.shape, np.bool_)
    value = values.numbers("PixelPaddingValue")
    if not value.size:
        return np.zeros(stored.shape, np.bool_)
    ends = np.concatenate([value[:1], values.numbers("PixelPaddingRangeLimit")[:1]])
    ends = ends.astype(np.int64).astype(stored.dtype)  # some files give a signed value as unsigned: this wraps it
    return np.asarray((stored >= ends.min()) & (stored <= ends.max()))
