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

from msformer.io.base import AIR, Geometry, ImageError, Slice, decoding, needs_package
from msformer.output import complete_file

_SUFFIXES_NIFTI = (".nii", ".nii.gz")

IDENTITY = np.array([[0, 1], [1, 1], [2, 1]])

# by the world axis that the slices follow: where the picture's columns, its rows and the slices go
_DISPLAY = ("PIR", "LIA", "LPS")

_GEOMETRY_FIELDS = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code", "srow_x", "srow_y", "srow_z"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
)


def is_volume(path: str | PathLike[str]) -> bool:
    """Whether the path has a suffix of NIfTI."""
    return Path(path).name.lower().endswith(_SUFFIXES_NIFTI)


def count_slices(path: str | PathLike[str]) -> int:
    """How many slices `read_nifti` can read from the file; 1 for DICOM.

    Raises:
        FileNotFoundError, PermissionError: as the system says, naming the file.
        ImageError: as for `read_nifti`.
    """
    path = Path(path)
    if not is_volume(path):
        return 1
    with decoding(path, "NIfTI"):
        image = _open_nifti(path)
        return _volume_shape(image.shape)[_slice_axis(image)]


def slices_with_labels(path: str | PathLike[str], labels: Sequence[int] = ()) -> list[int]:
    """The indexes of a NIfTI file's slices, as `read_nifti` counts them, that hold one of the labels; anything but 0 if
    none is given.

    Raises:
        FileNotFoundError, PermissionError, ImageError: as for `read_nifti`.
    """
    path = Path(path)
    with decoding(path, "NIfTI"):
        image = _open_nifti(path)
        axis = _slice_axis(image)
        volume = np.asarray(image.dataobj).reshape(_volume_shape(image.shape))
        volume = np.isin(volume, labels) if labels else volume
        filled = np.flatnonzero(volume.any(axis=tuple(a for a in range(3) if a != axis)))
        forward = _display_orientation(image, axis)[axis, 1] > 0
        return sorted(int(i) if forward else volume.shape[axis] - 1 - int(i) for i in filled)


def read_nifti(path: str | PathLike[str], index: int | None = None) -> Slice:
    """A slice of a NIfTI file, ``.nii`` or ``.nii.gz``, with one volume; scl_slope and scl_inter are applied.

    Slices are axial: they follow the axis that is closest to inferior-superior. A volume of a single slice along
    another axis is shown as it is cut: coronal with the head at the top and the patient's right at the left, sagittal
    with the head at the top and the front at the left.

    Args:
        index: counted from the patient's feet, in whichever order the file has the slices; by default the middle one.

    Raises:
        FileNotFoundError, PermissionError: as the system says, naming the file.
        ImageError: not NIfTI, damaged, several volumes, NaN or infinite values, no such slice, nibabel missing.
    """
    path = Path(path)
    with decoding(path, "NIfTI"):
        image = _open_nifti(path)
        shape = _volume_shape(image.shape)
        axis = _slice_axis(image)
        if index is not None and not 0 <= index < shape[axis]:
            raise ImageError(f"{path}: expected a slice index from 0 to {shape[axis] - 1}, got {index}")
        index = shape[axis] // 2 if index is None else index
        orientation = _display_orientation(image, axis)
        start = index if orientation[axis, 1] > 0 else shape[axis] - 1 - index
        whole = [slice(0, length) for length in shape]
        place = (*whole[:axis], slice(start, start + 1), *whole[axis + 1 :])
        pixels = _nifti_pixels(image, place, orientation)
        if not np.isfinite(pixels).all():
            raise ImageError(f"{path}: slice {index} holds NaN or infinite values")
        geometry = Geometry(np.asarray(image.affine, np.float64), image.shape, place, orientation, image.header.copy())
        low, high = float(image.header["cal_min"]), float(image.header["cal_max"])
        window = (low, high) if np.isfinite([low, high]).all() and low < high else None
        modality = "CT" if _lowest_value(path, path.stat().st_mtime_ns) <= AIR else ""
        return Slice(pixels, window, geometry, modality)


@lru_cache(maxsize=16)
def _lowest_value(path: Path, changed: int) -> float:
    """Of a whole NIfTI file, last changed at this time: a slice of tissue alone is of CT where others hold air."""
    data = _open_nifti(path).dataobj
    stored = data.get_unscaled()
    ends = [float(find.reduce(stored, axis=None)) for find in (np.fmin, np.fmax)]
    return min(data.slope * end + data.inter for end in ends)


def _open_nifti(path: Path) -> Any:
    """The file as a nibabel image that is known to hold one volume of real numbers; its pixels are not read yet."""
    with needs_package("nibabel", path):
        import nibabel
        from nibabel.orientations import io_orientation
    try:
        image = nibabel.load(path)
    except nibabel.filebasedimages.ImageFileError as error:
        raise ImageError(f"{path}: not a NIfTI file") from error
    if not isinstance(image, nibabel.Nifti1Image):
        raise ImageError(f"{path}: expected a NIfTI file, got {type(image).__name__}")
    volumes = int(np.prod(image.shape[3:]))
    if volumes > 1:
        raise ImageError(f"{path}: expected one volume, got {volumes}")
    if len(image.shape) < 2 or 0 in image.shape:
        raise ImageError(f"{path}: expected a picture or a volume, got shape {image.shape}")
    if image.get_data_dtype().kind not in "iuf":
        raise ImageError(f"{path}: expected integer or floating-point values, got {image.get_data_dtype()}")
    if np.isnan(io_orientation(image.affine)).any():
        raise ImageError(f"{path}: its affine is singular")
    return image


def _volume_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The first three lengths; a picture is a volume of one slice."""
    return shape[0], shape[1], shape[2] if len(shape) > 2 else 1


def _slice_axis(image: Any) -> int:
    """The only axis of length 1, else the one closest to inferior-superior."""
    from nibabel.orientations import io_orientation

    flat = [axis for axis, length in enumerate(_volume_shape(image.shape)) if length == 1]
    return flat[0] if len(flat) == 1 else int(np.argmax(io_orientation(image.affine)[:, 0]))


def _display_orientation(image: Any, axis: int) -> NDArray[Any]:
    """The orientation ``[3, 2]`` that brings the volume to columns, rows, slices as shown."""
    from nibabel import orientations

    stored = orientations.io_orientation(image.affine)
    shown = orientations.axcodes2ornt(_DISPLAY[int(stored[axis, 0])])
    return np.asarray(orientations.ornt_transform(stored, shown))


def _nifti_pixels(image: Any, place: tuple[slice, ...], orientation: NDArray[Any]) -> NDArray[np.float32]:
    """Reads only this slice from the file -> ``[H, W]`` as shown."""
    from nibabel.orientations import apply_orientation

    axes = len(image.shape)
    stored = np.asarray(image.dataobj[place[:axes] + (0,) * (axes - 3)])
    volume = stored.reshape([part.stop - part.start for part in place])
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
        return np.ascontiguousarray(apply_orientation(volume, orientation)[:, :, 0].T.astype(np.float32))


def write_nifti(path: str | PathLike[str], parts: Sequence[tuple[NDArray[Any], Slice]]) -> None:
    """Writes labels or values as a NIfTI file, ``.nii`` or ``.nii.gz``, whose voxels lie exactly on those of the input.

    A label map of a DICOM picture becomes a volume ``[columns, rows, 1]``; those of slices of a NIfTI file one volume
    of the input's shape that is 0 outside them. The type is the smallest unsigned one that holds the labels; that of
    values is float32.

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
    if not is_volume(path):
        raise ValueError(f"path: expected a name ending in .nii or .nii.gz, got {path}")
    with needs_package("nibabel", path):
        from nibabel import orientations

    whole = placed[0][1]
    volume = np.zeros(_volume_shape(whole.shape), dtype=_type_of([labels for labels, _ in placed]))
    for labels, geometry in placed:
        undo = orientations.ornt_transform(IDENTITY, geometry.orientation)
        volume[geometry.place] = orientations.apply_orientation(labels.T[:, :, None], undo)
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
