"""NIfTI files in and out, through nibabel; label maps are written on the input's voxels.

A slice is turned to the way radiologists look at it: an axial one has the front of the patient at the top and the
patient's right at the left, so that it looks like the axial DICOM picture of the same patient. World positions are in
mm in NIfTI's RAS+ convention: x to the patient's right, y to the front, z to the head. DICOM's are LPS+: x and y the
other way round.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msformer.io.base import Geometry, ImageError, Slice, as_float32, decoding, fill_background, needs_package
from msformer.io.modality import find_modality, warn_of_air
from msformer.io.nifti_file import SUFFIXES_NIFTI, NiftiFile, is_volume, open_nifti
from msformer.output import complete_file

__all__ = ["count_slices", "is_volume", "read_nifti", "slices_with_labels", "write_nifti"]

IDENTITY = np.array([[0, 1], [1, 1], [2, 1]])

# by the world axis that the slices follow: where the picture's columns, its rows and the slices go
_DISPLAY = ("PIR", "LIA", "LPS")

_GEOMETRY_FIELDS = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code", "srow_x", "srow_y", "srow_z"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
)


def count_slices(path: str | PathLike[str]) -> int:
    """How many slices `read_nifti` can read from the file: those of all of its volumes.

    Raises:
        FileNotFoundError, PermissionError: as the system says, naming the file.
        ImageError: as for `read_nifti`.
    """
    path = Path(path)
    with decoding(path, "NIfTI"):
        file = open_nifti(path)
        return file.volume_shape[file.slice_axis] * file.volumes


def slices_with_labels(path: str | PathLike[str], labels: Sequence[int] = ()) -> list[int]:
    """The indexes of a NIfTI file's slices, as `read_nifti` counts them, that hold one of the labels; where none is
    given, anything but 0 and NaN.

    Raises:
        FileNotFoundError, PermissionError, ImageError: as for `read_nifti`.
    """
    path = Path(path)
    with decoding(path, "NIfTI"):
        file = open_nifti(path)
        axis, count = file.slice_axis, file.volume_shape[file.slice_axis]
        volumes = np.nan_to_num(file.read()).reshape(*file.volume_shape, file.volumes, -1, order="F")
        volumes = np.isin(volumes, labels) if labels else volumes
        filled = np.moveaxis(volumes, axis, 0).any(axis=(1, 2, 4)).T  # volumes, slices
        if _display_orientation(file.affine, axis)[axis, 1] < 0:
            filled = filled[:, ::-1]
        return [int(volume * count + index) for volume, index in np.argwhere(filled)]


def read_nifti(path: str | PathLike[str], index: int | None = None, modality: str | None = None) -> Slice:
    """A slice of a NIfTI file, compressed or not; scl_slope and scl_inter are applied, RGB becomes uint8.

    Slices are axial: they follow the axis that is closest to inferior-superior, without resampling. A volume of a
    single slice along another axis is shown as it is cut: coronal with the head at the top and the patient's right at
    the left, sagittal with the head at the top and the front at the left.

    NaN and infinite values are taken for background, which gets the lowest of the slice's other values (0 if there are
    none) and does not count for the window.

    Args:
        index: counted from the patient's feet, in whichever order the file has the slices, and where there are several
            volumes on through all of them; by default the middle one of the first volume.
        modality: what the file is of, if that is known.

    Raises:
        FileNotFoundError, PermissionError: as the system says, naming the file.
        ImageError: not NIfTI, damaged, complex values, no such slice, nibabel missing.
    """
    path = Path(path)
    with decoding(path, "NIfTI"):
        file = open_nifti(path)
        per_volume = file.volume_shape[file.slice_axis]
        count = per_volume * file.volumes
        if index is not None and not 0 <= index < count:
            volumes = f", {file.volumes} volumes of {per_volume}" if file.volumes > 1 else ""
            raise ImageError(f"{path}: expected a slice index from 0 to {count - 1}{volumes}, got {index}")
        if index is None and file.volumes > 1:
            file.notes.warn(f"a slice of the first of {file.volumes} volumes is read")
        index = per_volume // 2 if index is None else index
        return _read_slice(file, index, count, modality)


def _read_slice(file: NiftiFile, index: int, count: int, given: str | None) -> Slice:
    axis, notes = file.slice_axis, file.notes
    volume, of_volume = divmod(index, file.volume_shape[axis])
    orientation = _display_orientation(file.affine, axis)
    place = _place(file, axis, volume, of_volume if orientation[axis, 1] > 0 else -1 - of_volume)
    pixels = _turned(file.read(place), place, orientation)
    geometry = Geometry(file.affine, file.shape, place, orientation, file.header.copy())
    changed = file.path.stat().st_mtime_ns
    modality, source = find_modality(file.path, given, lambda: _lowest_value(file.path, changed), notes)
    common: dict[str, Any] = {"modality": modality, "modality_source": source, "index": index, "count": count}
    if pixels.ndim == 3:
        return Slice(pixels, None, geometry, notes=tuple(notes.sentences), **common)
    background = ~np.isfinite(pixels)
    if background.any():
        notes.warn("it holds NaN or infinite values, which are taken for background")
        pixels = pixels.copy()
        fill_background(pixels, background)
    warn_of_air(float(pixels.min()), modality, notes)
    low, high = float(file.header["cal_min"]), float(file.header["cal_max"])
    window = (low, high) if np.isfinite([low, high]).all() and low < high else None
    shown = background if background.any() else None
    return Slice(as_float32(pixels), window, geometry, background=shown, notes=tuple(notes.sentences), **common)


@lru_cache(maxsize=16)
def _lowest_value(path: Path, changed: int) -> float:
    """Of a whole NIfTI file, last changed at this time: a slice of tissue alone is of CT where others hold air."""
    values = open_nifti(path).read()
    finite = values[np.isfinite(values)]
    return float(finite.min()) if finite.size else 0.0


def _place(file: NiftiFile, axis: int, volume: int, index: int) -> tuple[slice, ...]:
    """A slice in the axes as stored, counted from the end of its axis if the index is negative."""
    place = [slice(0, length) for length in file.volume_shape]
    start = index % file.volume_shape[axis]
    place[axis] = slice(start, start + 1)
    further = np.unravel_index(volume, file.shape[3:], order="F") if len(file.shape) > 3 else ()
    return (*place, *(slice(int(i), int(i) + 1) for i in further))


def _display_orientation(affine: NDArray[np.float64], axis: int) -> NDArray[Any]:
    """The orientation ``[3, 2]`` that brings the volume to columns, rows, slices as shown."""
    from nibabel import orientations

    stored = orientations.io_orientation(affine)
    shown = orientations.axcodes2ornt(_DISPLAY[int(stored[axis, 0])])
    return np.asarray(orientations.ornt_transform(stored, shown))


def _turned(stored: NDArray[Any], place: tuple[slice, ...], orientation: NDArray[Any]) -> NDArray[Any]:
    """A slice as stored -> ``[H, W]`` or ``[H, W, 3]`` as shown."""
    from nibabel.orientations import apply_orientation

    colour = stored.shape[len(stored.shape) - 1 :] if stored.dtype == np.uint8 and stored.ndim > len(place) else ()
    volume = stored.reshape([part.stop - part.start for part in place[:3]] + list(colour))
    return np.ascontiguousarray(np.swapaxes(apply_orientation(volume, orientation)[:, :, 0], 0, 1))


def write_nifti(path: str | PathLike[str], parts: Sequence[tuple[NDArray[Any], Slice]]) -> None:
    """Writes labels or values as a NIfTI file, ``.nii`` or ``.nii.gz``, whose voxels lie exactly on those of the input.

    Label maps of frames of a DICOM file become a volume ``[columns, rows, frames]``; those of slices of a NIfTI file
    one of the input's shape; both are 0 outside them. The type is the smallest unsigned one that holds the labels;
    that of values is float32.

    Args:
        parts: at least one slice of one file, each with its labels, integers >= 0, or its values, float32; ``[H, W]``
            as the slice is shown.

    Raises:
        ValueError: unsuitable labels, a slice without geometry, or another suffix.
        ImageError: nibabel missing.
        OutputError: the file cannot be written.
    """
    path = Path(path)
    placed = [(labels, _checked_geometry(labels, slice)) for labels, slice in parts]
    if not path.name.lower().endswith(SUFFIXES_NIFTI):
        raise ValueError(f"path: expected a name ending in .nii or .nii.gz, got {path}")
    with needs_package(path):
        from nibabel import orientations

    whole = placed[0][1]
    shape = (*whole.shape, *[1] * (3 - len(whole.shape)))
    volume = np.zeros(shape, dtype=_type_of([labels for labels, _ in placed]))
    for labels, geometry in placed:
        undo = orientations.ornt_transform(IDENTITY, geometry.orientation)
        turned = orientations.apply_orientation(labels.T[:, :, None], undo)
        volume[geometry.place] = turned.reshape(volume[geometry.place].shape)
    content = _nifti_bytes(volume.reshape(whole.shape), whole)
    with complete_file(path) as temporary:
        temporary.write_bytes(gzip.compress(content, mtime=0) if path.name.lower().endswith(".gz") else content)


def _checked_geometry(labels: NDArray[Any], slice: Slice) -> Geometry:
    if slice.geometry is None:
        raise ValueError("slice: has no geometry to write labels with")
    if labels.shape != slice.pixels.shape[:2]:
        raise ValueError(f"labels: expected shape {slice.pixels.shape[:2]}, got {labels.shape}")
    if labels.dtype != np.float32 and (labels.dtype.kind not in "biu" or labels.min() < 0):
        raise ValueError(f"labels: expected integers >= 0 or float32, got {labels.dtype} from {labels.min()}")
    return slice.geometry


def _type_of(parts: Sequence[NDArray[Any]]) -> np.dtype[Any]:
    """Float32 for values, the smallest unsigned type for labels."""
    if any(part.dtype == np.float32 for part in parts):
        return np.dtype(np.float32)
    return np.min_scalar_type(max(int(part.max()) for part in parts))


def _nifti_bytes(volume: NDArray[Any], geometry: Geometry) -> bytes:
    """An uncompressed NIfTI file; of the input's header only what says where the voxels lie."""
    import nibabel

    if geometry.header is None:
        image = nibabel.Nifti1Image(volume, geometry.affine, dtype=volume.dtype)
        image.set_sform(geometry.affine, code="scanner")
        image.set_qform(geometry.affine, code="scanner")
        image.header.set_xyzt_units("mm")
        return bytes(image.to_bytes())
    header = type(geometry.header)()
    for field in _GEOMETRY_FIELDS:
        header[field] = geometry.header[field]
    kind = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    return bytes(kind(volume, geometry.affine, header, dtype=volume.dtype).to_bytes())
