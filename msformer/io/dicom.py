"""DICOM files, through pydicom. A picture is shown as stored."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msformer.io.base import Geometry, ImageError, Slice, Window, decoding, needs_package
from msformer.io.nifti import IDENTITY

_MONOCHROME = ("MONOCHROME1", "MONOCHROME2")

_COLOUR = ("RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")


def is_dicom(path: str | PathLike[str]) -> bool:
    """Whether the file has DICOM's signature after the preamble; False for what cannot be opened."""
    try:
        with Path(path).open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def read_dicom(path: str | PathLike[str]) -> Slice:
    """The picture of a DICOM file with one frame, as stored: rows top to bottom, not turned.

    Rescaling (or the modality look-up table) is applied. Padding gets the darkest value of the other pixels: the
    lowest, or with MONOCHROME1, which `show` inverts, the highest. YBR and palettes become RGB, of 8 bits. Without a
    position, the picture is taken as axial, its first pixel at 0.

    Raises:
        FileNotFoundError, PermissionError: as the system says, naming the file.
        ImageError: not DICOM, damaged, no picture or several, pixels that cannot be decoded, pydicom missing.
    """
    path = Path(path)
    with needs_package("pydicom", path):
        import pydicom
        import pydicom.pixels
    with decoding(path, "DICOM"):
        if not is_dicom(path):
            raise ImageError(f"{path}: not a DICOM file")
        dataset = pydicom.dcmread(path)
        _spread_functional_groups(dataset)
        stored = _stored_pixels(dataset, path)
        grey, inverted = stored.ndim == 2, dataset.PhotometricInterpretation == "MONOCHROME1"
        pixels = _grey(dataset, stored, inverted) if grey else _colour(dataset, stored)
        if not np.isfinite(pixels).all():
            raise ImageError(f"{path}: holds NaN or infinite values")
        geometry = _dicom_geometry(dataset, pixels.shape[0], pixels.shape[1])
        window = _dicom_window(dataset) if grey else None
        return Slice(pixels, window, geometry, str(dataset.get("Modality") or ""), inverted)


def _spread_functional_groups(dataset: Any) -> None:
    """Puts what enhanced objects say in functional groups where ordinary objects say it; of several frames, the
    first's."""
    for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in (dataset.get(keyword) or [])[:1]:
            for macro in group:
                for element in macro.value[0] if macro.VR == "SQ" and macro.value else ():
                    dataset.setdefault(element.tag, element)


def _stored_pixels(dataset: Any, path: Path) -> NDArray[Any]:
    """The decoded pixels before any rescaling, ``[H, W]``, or RGB or palette colour ``[H, W, 3]``."""
    from pydicom.pixels import apply_color_lut, pixel_array

    if not any(keyword in dataset for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise ImageError(f"{path}: holds no picture, or is truncated before it")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise ImageError(f"{path}: expected one frame, got {frames}")
    kind = str(dataset.get("PhotometricInterpretation"))
    if kind not in (*_MONOCHROME, *_COLOUR):
        raise ImageError(f"{path}: unsupported photometric interpretation {kind}")
    try:
        stored = pixel_array(dataset)
    except Exception as error:  # decoders raise whatever they like
        syntax = getattr(dataset.file_meta.get("TransferSyntaxUID"), "name", "unknown")
        reason = " ".join(str(error).split())
        raise ImageError(f"{path}: the pixels (transfer syntax {syntax}) cannot be decoded: {reason}") from error
    stored = stored.reshape(stored.shape[-2:] if kind not in _COLOUR or kind == "PALETTE COLOR" else stored.shape[-3:])
    return apply_color_lut(stored, dataset) if kind == "PALETTE COLOR" else stored


def _colour(dataset: Any, stored: NDArray[Any]) -> NDArray[np.uint8]:
    """The upper 8 bits of the samples, ``[H, W, 3]``."""
    palette = dataset.PhotometricInterpretation == "PALETTE COLOR"
    bits = stored.dtype.itemsize * 8 if palette else int(dataset.BitsStored)
    return np.ascontiguousarray((stored >> max(bits - 8, 0)).astype(np.uint8))


def _grey(dataset: Any, stored: NDArray[Any], inverted: bool) -> NDArray[np.float32]:
    """Stored values ``[H, W]`` -> values in the modality's units."""
    from pydicom.pixels import apply_modality_lut

    for keyword in ("RescaleSlope", "RescaleIntercept"):
        if keyword in dataset and dataset[keyword].is_empty:
            del dataset[keyword]
    values = apply_modality_lut(stored, dataset).astype(np.float64)
    padding = _padding(dataset, stored)
    if padding.any() and not padding.all():
        values[padding] = values[~padding].max() if inverted else values[~padding].min()
    return values.astype(np.float32)


def _padding(dataset: Any, stored: NDArray[Any]) -> NDArray[np.bool_]:
    value = _numbers(dataset, "PixelPaddingValue")
    if not value.size or stored.dtype.kind not in "iu":
        return np.zeros(stored.shape, dtype=np.bool_)
    ends = np.concatenate([value, _numbers(dataset, "PixelPaddingRangeLimit")])
    ends = ends.astype(np.int64).astype(stored.dtype)  # some files give a signed value as unsigned: this wraps it
    return (stored >= ends.min()) & (stored <= ends.max())


def _dicom_window(dataset: Any) -> Window | None:
    centre, width = _numbers(dataset, "WindowCenter"), _numbers(dataset, "WindowWidth")
    if not centre.size or not width.size or width[0] <= 0:
        return None
    return float(centre[0] - width[0] / 2), float(centre[0] + width[0] / 2)


def _numbers(dataset: Any, keyword: str, count: int | None = None) -> NDArray[np.float64]:
    """An element's values; none if it is missing, empty, not finite or has not `count` values."""
    value = dataset.get(keyword)
    values = np.atleast_1d(np.asarray([] if value is None or value == "" else value, dtype=np.float64))
    return values if np.isfinite(values).all() and count in (None, values.size) else np.empty(0)


def _dicom_geometry(dataset: Any, rows: int, columns: int) -> Geometry:
    """The picture as a volume ``[columns, rows, 1]``. DICOM PS3.3, C.7.6.2.1.1, and its LPS+ turned into RAS+."""
    keywords = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
    spacings = [_numbers(dataset, keyword, 2) for keyword in keywords]  # between rows, between columns
    spacing = next((found for found in spacings if found.size and (found > 0).all()), np.ones(2))
    depths = [_numbers(dataset, keyword, 1) for keyword in ("SliceThickness", "SpacingBetweenSlices")]
    depth = next((float(found[0]) for found in depths if found.size and found[0] > 0), 1.0)
    axes = _numbers(dataset, "ImageOrientationPatient", 6).reshape(-1, 3)
    if not axes.size or np.linalg.norm(np.cross(axes[0], axes[1])) < 0.5:
        axes = np.eye(3)[:2]
    affine = np.eye(4)
    affine[:3, 0] = axes[0] * spacing[1]
    affine[:3, 1] = axes[1] * spacing[0]
    affine[:3, 2] = np.cross(axes[0], axes[1]) * depth
    position = _numbers(dataset, "ImagePositionPatient", 3)
    affine[:3, 3] = position if position.size else 0
    affine[:2] *= -1
    return Geometry(affine, (columns, rows, 1), (slice(0, columns), slice(0, rows), slice(0, 1)), IDENTITY)
